// y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias by mma.sync, a tile of y a CTA, in one accumulator.
//
// x and W come by cp.async through a ring of blocks. The low-rank term is multiplied first: its factors are loaded
// while the ring fills, a time in which nothing else is there to multiply, and a mask falls on it alone. Where tiles
// are few, K is cut: each CTA of a tile leaves a part in float32, and the last one adds them up in order.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "counters.cuh"
#include "gemm_arguments.h"
#include "gemm_epilogue.cuh"
#include "gemm_operands.cuh"
#include "operations.h"
#include "ptx.cuh"
#include "tile_order.cuh"

namespace lorafast::cuda {

// A tile of y, of which each warp has 64 x 64: so it loads no more from shared memory than that gives while tensor
// cores multiply, on sm_80 three quarters of it. A block has kBytes of each row of x and W.
template <int kRows, int kColumns, int kBlock, int kResident_>
struct GemmTile {
  static constexpr int kM = kRows, kN = kColumns, kBytes = kBlock, kStages = 3, kResident = kResident_;
  static constexpr int kWarp = 64, kWarpsDown = kM / kWarp, kThreads = 32 * kWarpsDown * (kN / kWarp);
  static constexpr int kSlabs = kWarp / 16, kTiles = kWarp / 8;  // of a warp: 16 rows, 8 columns
  static constexpr int kSteps = kBytes / kStepBytes;             // of a block
  static constexpr int kX = kM * kBytes, kStage = kX + kN * kBytes;
};
using WideTile = GemmTile<128, 256, 128, 1>;
using NarrowTile = GemmTile<128, 128, 64, 2>;

struct LinearExpandParams {
  const void* x;    // [M, K], rows of x_row bytes
  const void* w;    // [N, K] or, as it lies, [K, N], rows of w_row bytes
  void* y;          // [M, N], contiguous
  Factor s, b;      // [M, r], [N, r]
  Dropout dropout;  // of the low-rank term
  Bias bias;
  float* partials;     // [tiles, splits, kM · kN] in the order of fragments, or null
  uint32_t* counters;  // of each tile
  int64_t M, N, K, x_row, w_row;
  int64_t x_apart, w_apart;                 // bytes from one row that a thread copies to the next
  int32_t r, blocks, splits, down, across;  // blocks of K; tiles
  float scale;                              // of the low-rank term: that of survivors, too
  bool vector_y;
};

constexpr int kMostSplits = 64;  // times the blocks of K, in 32 bits

constexpr int kGroup = 16;  // row blocks whose tiles run together

struct TileShare {
  int row, col, tile, share;
};

__device__ __forceinline__ TileShare share_of(const LinearExpandParams& p, int index) {
  const int tile = index / p.splits;
  const TilePlace at = tile_at(tile, p.down, p.across, kGroup);
  return {at.row, at.column, tile, index % p.splits};
}

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 4) ptx::multiply_tf32(c, a, b0, b1);
  else if constexpr (DtypeOf<T>::value == Dtype::bfloat16) ptx::multiply_bf16(c, a, b0, b1);
  else ptx::multiply_f16(c, a, b0, b1);
}

// A warp's fragments of one step.
template <class Tile>
struct Fragments {
  uint32_t a[Tile::kSlabs][4], b[Tile::kTiles / 2][4];

  template <class A, class B>
  __device__ __forceinline__ void load(const A& of_a, const B& of_b, uint32_t stage, int step) {
#pragma unroll
    for (int i = 0; i < Tile::kTiles / 2; ++i) of_b.load(b[i], stage + Tile::kX, i, step);
#pragma unroll
    for (int i = 0; i < Tile::kSlabs; ++i) of_a.load(a[i], stage, i, step);
  }

  // To numbers of TF32: tensor cores would cut off what they don't read.
  __device__ __forceinline__ void round() {
#pragma unroll
    for (int i = 0; i < Tile::kTiles / 2; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) b[i][k] = nearest_tf32(__uint_as_float(b[i][k]));
    }
#pragma unroll
    for (int i = 0; i < Tile::kSlabs; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) a[i][k] = nearest_tf32(__uint_as_float(a[i][k]));
    }
  }

  template <class T>
  __device__ __forceinline__ void multiply_onto(float (&acc)[Tile::kSlabs][Tile::kTiles][4]) const {
#pragma unroll
    for (int i = 0; i < Tile::kSlabs; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kTiles; ++j) {
        multiply<T>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
};

// The element of a low-rank term's factors: float16 has s in float32, for which TF32 has the digits and the range.
template <class T>
using RankElement = std::conditional_t<DtypeOf<T>::value == Dtype::bfloat16, bfloat16, float>;

// Whether ranks may be copied by cp.async: then the first are, before the ring's first blocks.
template <class T>
constexpr bool kRanksFirst = sizeof(RankElement<T>) == 2;

// Lays ranks from `rank` on of s and B in a stage, as FragmentsAlongK reads them: they are there after the copies and a
// barrier.
template <class T, class Tile>
__device__ __forceinline__ void lay_ranks(
    uint32_t stage, const LinearExpandParams& p, int64_t row, int64_t col, int rank) {
  using E = RankElement<T>;
  constexpr int kOfStep = kStepBytes / static_cast<int>(sizeof(E)), kMost = Tile::kBytes / kStepBytes;
  const int steps = min((p.r - rank + kOfStep - 1) / kOfStep, kMost), thread = static_cast<int>(threadIdx.x);
  const auto lay = [&](const auto& block, const Factor& f, uint32_t rows) {
    const auto address = [&](int row, int chunk) {
      return rows + row * Tile::kBytes + kChunk * swizzled<Tile::kBytes>(row, chunk);
    };
    const auto put = [&](int row, int chunk, uint4 v) { ptx::store_shared_16(address(row, chunk), v); };
    if constexpr (sizeof(E) == 4) {
      block.template load<E, sizeof(T) == 4 ? 0 : 2>(f, NearestTf32Chunk(), put);
    } else {
      if (f.vector && f.type == DtypeOf<E>::value) block.template copy<E>(f, address);
      else block.template load<E, 2>(f, RoundedChunk<E>(), put);
    }
  };
  lay(FactorBlock<Tile::kThreads, Tile::kM, false>{row, rank, 2 * steps, thread}, p.s, stage);
  lay(FactorBlock<Tile::kThreads, Tile::kN, false>{col, rank, 2 * steps, thread}, p.b, stage + Tile::kX);
}

// acc = drop(scale · s·Bᵀ) + bias. `stage`: free, and read by nobody else before the next barrier; where kRanksFirst
// the first ranks are on their way to it.
template <class T, class Tile>
__device__ __forceinline__ void low_rank(
    float (&acc)[Tile::kSlabs][Tile::kTiles][4], uint32_t stage, const LinearExpandParams& p, int64_t row,
    int64_t col, int warp_row, int warp_col) {
  using E = RankElement<T>;
  constexpr int kRanks = Tile::kBytes / static_cast<int>(sizeof(E)),
                kOfStep = kStepBytes / static_cast<int>(sizeof(E));
  const auto of_a = FragmentsAlongK<Tile::kBytes>::of_a(warp_row);
  const auto of_b = FragmentsAlongK<Tile::kBytes>::of_b(warp_col);
#pragma unroll 1
  for (int rank = 0; rank < p.r; rank += kRanks) {
    const int steps = (min(p.r - rank, kRanks) + kOfStep - 1) / kOfStep;
    if (rank > 0) __syncthreads();  // the last ranks have been read
    if (kRanksFirst<T> && rank == 0) {
      ptx::wait_for_copies<Tile::kStages - 1>();
    } else {
      lay_ranks<T, Tile>(stage, p, row, col, rank);
      if constexpr (kRanksFirst<T>) {
        ptx::commit_copies();
        ptx::wait_for_copies<0>();
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      Fragments<Tile> of;
      of.load(of_a, of_b, stage, step);
      of.template multiply_onto<E>(acc);
    }
  }
  const uint64_t seed = p.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*p.dropout.seed);
#pragma unroll
  for (int i = 0; i < Tile::kSlabs; ++i) {
    end_low_rank(acc[i], p.scale, p.dropout, seed, row + warp_row + 16 * i, col + warp_col);
  }
  add_bias(acc, p.bias, col + warp_col);
}

// Leaves this CTA's part. The last CTA of a tile gets the sum of all, in order; the others are told that they aren't.
template <class Tile>
__device__ __forceinline__ bool add_parts(
    float (&acc)[Tile::kSlabs][Tile::kTiles][4], const LinearExpandParams& p, const TileShare& place) {
  constexpr int kFours = Tile::kSlabs * Tile::kTiles;
  float4* const parts = reinterpret_cast<float4*>(p.partials) +
                        static_cast<int64_t>(place.tile) * p.splits * (kFours * Tile::kThreads) +
                        ptx::thread_again();
  float4* const own = parts + static_cast<int64_t>(place.share) * (kFours * Tile::kThreads);
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const float (&v)[4] = acc[i / Tile::kTiles][i % Tile::kTiles];
    own[i * Tile::kThreads] = make_float4(v[0], v[1], v[2], v[3]);
  }
  if (arrive(p.counters + place.tile) + 1 != static_cast<uint32_t>(p.splits)) return false;
  if (threadIdx.x == 0) p.counters[place.tile] = 0;
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    float (&v)[4] = acc[i / Tile::kTiles][i % Tile::kTiles];
    v[0] = v[1] = v[2] = v[3] = 0.0f;
  }
  const float4* from = parts;
#pragma unroll 1
  for (int share = 0; share < p.splits; ++share, from += kFours * Tile::kThreads) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      float (&v)[4] = acc[i / Tile::kTiles][i % Tile::kTiles];
      const float4 part = from[i * Tile::kThreads];
      v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
    }
  }
  return true;
}

template <class T, class Tile, bool kByRows>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    linear_expand_kernel(const __grid_constant__ LinearExpandParams p) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ uint4 linear_expand_shared[];
  constexpr int kSize = sizeof(T), kBlockK = Tile::kBytes / kSize, kStages = Tile::kStages, kSteps = Tile::kSteps;
  using CopiesX = BlockCopies<Tile::kThreads, Tile::kM, Tile::kBytes, true>;
  using CopiesW = std::conditional_t<
      kByRows, BlockCopies<Tile::kThreads, Tile::kN, Tile::kBytes, true>,
      BlockCopies<Tile::kThreads, kBlockK, Tile::kN * kSize, false, kSize == 4>>;
  using AlongN = std::conditional_t<kSize == 4, WordsAlongN<Tile::kN * kSize>, FragmentsAlongN<Tile::kN * kSize>>;
  using FragmentsW = std::conditional_t<kByRows, FragmentsAlongK<Tile::kBytes>, AlongN>;

  char* const shared = reinterpret_cast<char*>(linear_expand_shared);
  const uint32_t ring = ptx::shared_address(shared);
  const TileShare place = share_of(p, static_cast<int>(blockIdx.x));
  const int64_t row = static_cast<int64_t>(place.row) * Tile::kM, col = static_cast<int64_t>(place.col) * Tile::kN;
  const int begin = p.blocks * place.share / p.splits, blocks = p.blocks * (place.share + 1) / p.splits - begin;
  const int64_t k = static_cast<int64_t>(begin) * kBlockK;
  CopiesX x(static_cast<const char*>(p.x) + row * p.x_row + k * kSize, p.x_row, p.M - row, (p.K - k) * kSize);
  CopiesW w =
      kByRows
          ? CopiesW(
                static_cast<const char*>(p.w) + col * p.w_row + k * kSize, p.w_row, p.N - col, (p.K - k) * kSize)
          : CopiesW(
                static_cast<const char*>(p.w) + k * p.w_row + col * kSize, p.w_row, p.K - k, (p.N - col) * kSize);
  if constexpr (kRanksFirst<T>) {
    if (place.share == 0) lay_ranks<T, Tile>(ring + (kStages - 1) * Tile::kStage, p, row, col, 0);
    ptx::commit_copies();
  }
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < blocks) {
      x.template start<1>(ring + stage * Tile::kStage, 0, p.x_apart);
      w.template start<1>(ring + stage * Tile::kStage + Tile::kX, 0, p.w_apart);
    }
    ptx::commit_copies();
  }

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp % Tile::kWarpsDown * Tile::kWarp, warp_col = warp / Tile::kWarpsDown * Tile::kWarp;
  float acc[Tile::kSlabs][Tile::kTiles][4] = {};
  if (place.share == 0) {
    low_rank<T, Tile>(
        acc, ring + (kStages - 1) * Tile::kStage, p, static_cast<int64_t>(place.row) * Tile::kM,
        static_cast<int64_t>(place.col) * Tile::kN, warp_row, warp_col);
  }

  const auto of_x = FragmentsAlongK<Tile::kBytes>::of_a(warp_row);
  const auto of_w = FragmentsW::of_b(warp_col);
  Fragments<Tile> of[2];
  uint32_t read = ring, write = ring + (kStages - 1) * Tile::kStage;
  const uint32_t last = write;
  ptx::wait_for_copies<kStages - 2>();
  __syncthreads();
  of[0].load(of_x, of_w, read, 0);
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    const bool more = block + kStages - 1 < blocks;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (more) {
        x.template start<kSteps>(write, step, p.x_apart);
        w.template start<kSteps>(write + Tile::kX, step, p.w_apart);
      }
      if (step + 1 == kSteps) {
        ptx::commit_copies();
        ptx::wait_for_copies<kStages - 2>();
        __syncthreads();  // the next block is there, and this one has been read
        write = read;
        read = read == last ? ring : read + Tile::kStage;
      }
      // After the last block nobody needs these.
      of[(step + 1) % 2].load(of_x, of_w, read, (step + 1) % kSteps);
      if constexpr (kSize == 4) of[step % 2].round();
      of[step % 2].template multiply_onto<T>(acc);
    }
  }

  // Computed again: registers are scarce.
  const TileShare end = share_of(p, ptx::again(static_cast<int>(blockIdx.x)));
  if (p.splits > 1 && !add_parts<Tile>(acc, p, end)) return;
  const int by = ptx::thread_again() / 32;
  const int64_t to_row = static_cast<int64_t>(end.row) * Tile::kM + by % Tile::kWarpsDown * Tile::kWarp;
  const int64_t to_col = static_cast<int64_t>(end.col) * Tile::kN + by / Tile::kWarpsDown * Tile::kWarp;
  // The block before the last one has been read by all; what `read` is at now by some warps not yet.
  static_assert(kStages == 3 && Tile::kStage >= Tile::kThreads / 32 * kSlabBytes<T>, "there is room");
  char* const free = shared + ((read == last ? ring : read + Tile::kStage) - ring) + by * kSlabBytes<T>;
#pragma unroll
  for (int i = 0; i < Tile::kSlabs; ++i) {
    store_slab(static_cast<T*>(p.y), acc[i], free, to_row + 16 * i, to_col, p.M, p.N, p.vector_y);
  }
#else
  __trap();  // the host doesn't launch it there
#endif
}

namespace {

// The strides of a matrix whose rows, or columns, cp.async can read: contiguous, aligned to 16 bytes.
bool lies_along(const Tensor& matrix, int along) {
  const int64_t size = static_cast<int64_t>(matrix.element_size()), across = 1 - along;
  const bool neighbours = matrix.stride(along) == 1 || matrix.size(along) == 1;
  const int64_t step = matrix.size(across) > 1 ? matrix.stride(across) * size : 0;
  return neighbours && aligned(matrix.const_data_ptr(), step, kChunk);
}

template <class T, class Tile, bool kByRows>
void start(LinearExpandParams& p, const OnDevice& on) {
  constexpr int kSize = sizeof(T);
  using CopiesX = BlockCopies<Tile::kThreads, Tile::kM, Tile::kBytes, true>;
  constexpr int kApartW = Tile::kThreads / (kByRows ? Tile::kBytes / kChunk : Tile::kN * kSize / kChunk);
  p.x_apart = CopiesX::kApart * p.x_row;
  p.w_apart = kApartW * p.w_row;
  const auto grid = dim3(static_cast<unsigned>(p.down) * static_cast<unsigned>(p.across * p.splits));
  launch(
      "linear_expand", linear_expand_kernel<T, Tile, kByRows>, grid, Tile::kThreads, Tile::kStages * Tile::kStage,
      on, p);
}

}  // namespace

void linear_expand(
    const Tensor& x, const Tensor& weight, const Tensor& s, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor y, const std::optional<Tensor>& partials, const std::optional<Tensor>& counters, int64_t columns,
    int64_t splits) {
  const OneDevice device(kDevice, "x", x);
  const auto [M, K, N, r] = check_gemm(device, x, weight, s, lora_B, bias, y, INT64_C(1) << 28);
  check_seed(seed, threshold, device);
  const bool single = dtype_of(x) == Dtype::float32;
  STD_TORCH_CHECK(
      columns == 128 || (columns == 256 && !single), "columns is ", columns, ", expected 128",
      single ? " in float32" : " or 256");
  STD_TORCH_CHECK(lies_along(x, 1), "the rows of x aren't contiguous and aligned to 16 bytes");
  const bool by_rows = lies_along(weight, 1);
  STD_TORCH_CHECK(
      by_rows || lies_along(weight, 0),
      "neither the rows nor the columns of weight are contiguous and aligned to ", kChunk, " bytes");
  if (M == 0 || N == 0) return;

  const int64_t size = static_cast<int64_t>(x.element_size());
  const int64_t of_block = (columns == 256 ? WideTile::kBytes : NarrowTile::kBytes) / size;
  const int64_t blocks = (K + of_block - 1) / of_block;
  const int64_t down = (M + 127) / 128, across = (N + columns - 1) / columns;
  const int64_t most_splits = std::max<int64_t>(std::min<int64_t>(blocks, kMostSplits), 1);
  STD_TORCH_CHECK(splits >= 1 && splits <= most_splits, "splits is ", splits, ", expected 1 to ", most_splits);
  STD_TORCH_CHECK(
      down < INT64_C(1) << 31 && across < INT64_C(1) << 26 && down * across <= ((INT64_C(1) << 31) - 1) / splits,
      "y is ", M, " x ", N, ", more than ", (INT64_C(1) << 31) - 1, " CTAs");
  if (splits > 1) {
    check_memory("partials", partials, ScalarType::Float, down * across * splits * 128 * columns, device);
    check_memory("counters", counters, ScalarType::Int, down * across, device);
  }
  const bool masked = seed.has_value() && threshold > 0;
  LinearExpandParams p{};
  p.x = x.const_data_ptr();
  p.w = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.s = factor_of(s);
  p.b = factor_of(lora_B);
  p.dropout = {
      masked ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr, (N + 7) / 8,
      static_cast<int32_t>(threshold), static_cast<float>(survivor_scale)};
  p.scale = static_cast<float>(masked ? scaling * survivor_scale : scaling);
  p.bias = bias_of(bias);
  p.partials = splits > 1 ? static_cast<float*>(partials->mutable_data_ptr()) : nullptr;
  p.counters = splits > 1 ? static_cast<uint32_t*>(counters->mutable_data_ptr()) : nullptr;
  p.M = M, p.N = N, p.K = K;
  p.x_row = x.stride(0) * size;
  p.w_row = weight.stride(by_rows ? 0 : 1) * size;
  p.r = static_cast<int32_t>(r), p.blocks = static_cast<int32_t>(blocks), p.splits = static_cast<int32_t>(splits);
  p.down = static_cast<int32_t>(down), p.across = static_cast<int32_t>(across);
  p.vector_y = aligned(p.y, N * size, kChunk);
  const OnDevice on(device);
  const auto with_tile = [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      if (columns == 256) return by_rows ? start<T, WideTile, true>(p, on) : start<T, WideTile, false>(p, on);
    }
    by_rows ? start<T, NarrowTile, true>(p, on) : start<T, NarrowTile, false>(p, on);
  };
  with_type(x, with_tile);
}

}  // namespace lorafast::cuda
