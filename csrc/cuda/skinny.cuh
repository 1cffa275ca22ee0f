// The skinny operations: one pass over a large matrix X [rows, columns], which is x or dy, beside factors of r
// columns. S = scale · drop(X)·P sums over columns (P is Aᵀ or B), D = scale · drop(X)ᵀ·Q over rows (Q is s or ds),
// and bias = Σ X over rows.
//
//   kShrink    S, a CTA to a row block: it walks along columns.
//   kReduce    D and bias, a CTA to a column block: it walks down rows, its sums stay in registers.
//   kBackward  all three, down rows too: S leaves it tile by tile.
//
// Tiles and their loads: skinny_tile.cuh, on sm_75 skinny_held.cuh. Products of elements: skinny_products.cuh. Sums:
// skinny_sums.cuh.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "operations.h"
#include "skinny_held.cuh"
#include "skinny_sums.cuh"

namespace lorafast::cuda {

// A CTA's walk.
template <class T, Skinny kKind, int kRanks>
struct SkinnyCta : SkinnySums<T, kKind, kRanks> {
  using Sums = SkinnySums<T, kKind, kRanks>;
  using Sums::kColumns;
  using Sums::kDTiles;
  using Sums::kRankTiles;
  using Sums::kRows;
  using Sums::kSColumns;
  using Sums::kSplit;
  using Sums::kSSteps;
  using Sums::kSTiles;
  using Sums::p;
  using Sums::thread;
  using Sums::warp;
  using typename Sums::Factor;
  using typename Sums::PStep;
  using typename Sums::Tile;
  static constexpr bool kHasS = kKind != Skinny::kReduce, kHasD = kKind != Skinny::kShrink;

  char* const ring;

  __device__ SkinnyCta(const SkinnyParams& params, char* shared) : Sums(params), ring(shared + Tile::kBefore) {}

  using Held = SkinnyHeld<T, kKind, kRanks>;

  // Where tile i of a walk that begins at tile `first` begins in X.
  static __device__ __forceinline__ int64_t row_of(int64_t first, int i) {
    return (kKind == Skinny::kShrink ? static_cast<int64_t>(blockIdx.x) : first + i) * kRows;
  }
  static __device__ __forceinline__ int64_t column_of(int64_t first, int i) {
    return (kKind == Skinny::kShrink ? first + i : static_cast<int64_t>(blockIdx.x)) * kColumns;
  }

  // Stage of tile i of the walk into the ring; P or Q goes with it.
  __device__ __forceinline__ void load(char* stage, int64_t first, int i) const {
    const int64_t row = row_of(first, i), column = column_of(first, i);
    this->load_x(stage, row, column);
    if constexpr (kKind == Skinny::kShrink) this->load_p(stage + Tile::kX, column);
    else if (p.D != nullptr) this->load_q(stage + Tile::kX, row);
  }

  // The same in two steps, through registers.
  __device__ __forceinline__ void fetch(Held& held, int64_t first, int i) const {
    const int64_t row = row_of(first, i), column = column_of(first, i);
    held.fetch_x(*this, row, column);
    if constexpr (kSplit) {
      if constexpr (kKind == Skinny::kShrink) held.template fetch_eights<true>(*this, column);
      else if (p.D != nullptr) held.template fetch_eights<false>(*this, row);
    } else {
      if constexpr (kKind == Skinny::kShrink) held.fetch_p(*this, column);
      else if (p.D != nullptr) held.fetch_q(*this, row);
    }
  }

  // Whether its products need care: add_parts.
  __device__ __forceinline__ bool put(const Held& held, char* stage) const {
    bool careful = held.put_x(*this, stage);
    if constexpr (kSplit) {
      if (kKind == Skinny::kShrink || p.D != nullptr)
        careful = held.put_eights(*this, stage + Tile::kX) || careful;
    } else {
      if constexpr (kKind == Skinny::kShrink) held.put_p(*this, stage + Tile::kX);
      else if (p.D != nullptr) held.put_q(*this, stage + Tile::kX);
    }
    return careful;
  }

  __device__ __forceinline__ void run() {
    constexpr int kAlong = kKind == Skinny::kShrink ? kColumns : kRows;
    const int64_t length = kKind == Skinny::kShrink ? p.columns : p.rows;
    const int64_t all = (length + kAlong - 1) / kAlong, first = static_cast<int64_t>(blockIdx.y) * p.share;
    const int tiles = static_cast<int>(all - first < p.share ? all - first : p.share);
    const int ahead = p.stages - 1;
    const int groups = static_cast<int>(gridDim.x);  // kBackward: of columns
    const int chunks = kKind == Skinny::kBackward ? (p.share + p.chunk - 1) / p.chunk : 0;

    char* before = ring - Tile::kBefore;
    bool careful_of_p = false;
    if constexpr (kKind == Skinny::kBackward) {
      const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns;
      if constexpr (kSplit) careful_of_p = Held::split_p(*this, before, column);
      else this->load_p(before, column);
      ptx::commit_copies();
    }
    float s[kHasS ? kSTiles : 1][kRankTiles][4];
    float d[kHasD ? kDTiles : 1][kRankTiles][4], ones[kHasD ? kDTiles : 1][4];
    PStep kept[Tile::kKeepP ? kSSteps : 1];
    if constexpr (kKind == Skinny::kShrink) {
#pragma unroll
      for (int m = 0; m < kSTiles; ++m) clear(s[m]);
    }
    if constexpr (kHasD) {
#pragma unroll
      for (int m = 0; m < kDTiles; ++m) clear(d[m]);
      clear(ones);
    }

    // Tile i of the walk, which is there for all.
    const auto multiply = [&](const char* stage, int i, [[maybe_unused]] bool careful) {
      if constexpr (Tile::kKeepP) {
        if (i == 0) {
#pragma unroll
          for (int step = 0; step < kSSteps; ++step)
            this->fragments_of_p(
                kept[step], before + warp / Tile::kWarpRows * kSColumns * static_cast<int>(sizeof(Factor)), step);
          __syncthreads();  // the warps' sums go where P was
        }
      }
      if constexpr (kKind == Skinny::kShrink) {
        const char* of_p = stage + Tile::kX;
        if constexpr (!kSplit) this->template multiply_s<false>(s, stage, of_p, nullptr);
        else this->add_parts_of_p(s, stage, of_p, column_of(first, i), careful);
      }
      if constexpr (kKind == Skinny::kBackward) {
#pragma unroll
        for (int m = 0; m < kSTiles; ++m) clear(s[m]);
        if constexpr (!kSplit) this->template multiply_s<Tile::kKeepP>(s, stage, before, kept);
        else this->add_parts_of_p(s, stage, before, column_of(first, i), careful);
        this->cross(reinterpret_cast<float4*>(before + Tile::kAtCross), s);
      }
      if constexpr (kHasD && kSplit) {
        const bool wants_bias = p.bias != nullptr && blockIdx.z == 0;
        this->add_parts_of_q(d, ones, stage, stage + Tile::kX, row_of(first, i), wants_bias, careful);
      } else if constexpr (kHasD) {
        if (p.bias == nullptr || blockIdx.z != 0) {
          if (p.D != nullptr) this->template multiply_d<true, false>(d, ones, stage, stage + Tile::kX);
        } else if (p.D != nullptr) {
          this->template multiply_d<true, true>(d, ones, stage, stage + Tile::kX);
        } else {
          this->template multiply_d<false, true>(d, ones, stage, stage + Tile::kX);
        }
      }
      if constexpr (kKind == Skinny::kBackward) {
        __syncthreads();  // the warps' sums are there
        this->finish_s(
            reinterpret_cast<const float4*>(before + Tile::kAtCross), first + i, static_cast<int>(blockIdx.x),
            groups);
        if (groups > 1 && ((i + 1) % p.chunk == 0 || i + 1 == tiles)) {
          const int chunk = i / p.chunk;
          uint32_t* counter =
              p.counters + (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * chunks + chunk;
          if (arrive(counter) == static_cast<uint32_t>(groups - 1)) {
            for (int j = chunk * p.chunk; j <= i; ++j) this->add_up_s(first + j, groups);
            if (thread == 0) *counter = 0;
          }
        }
      }
    };

    if constexpr (kSm80) {
      char *stage = ring, *next = ring, *const end = ring + p.stages * Tile::kStage;
#pragma unroll 1
      for (int i = -ahead; i < tiles; ++i) {  // before the first tile is there, others are asked for
        if (i >= 0) {
          wait_for_stages(ahead - 1);
          if (p.dropout.seed != nullptr) this->drop_x(stage, row_of(first, i), column_of(first, i));
          __syncthreads();  // the tile is there for all, and all have done with the one before
        }
        if (i + ahead < tiles) load(next, first, i + ahead);
        ptx::commit_copies();
        next += Tile::kStage;
        if (next == end) next = ring;
        if (i < 0) continue;
        multiply(stage, i, false);
        stage += Tile::kStage;
        if (stage == end) stage = ring;
      }
      ptx::wait_for_copies<0>();
    } else {
      Held held;
      if (tiles > 0) fetch(held, first, 0);
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) {
        // All have done with the tile before. kBackward has a barrier behind its products.
        if (kKind != Skinny::kBackward) __syncthreads();
        bool careful = put(held, ring) || careful_of_p;
        if (p.dropout.seed != nullptr) this->drop_x(ring, row_of(first, i), column_of(first, i));
        careful = __syncthreads_or(careful);  // the tile is there for all
        if (i + 1 < tiles) fetch(held, first, i + 1);
        multiply(ring, i, careful);
      }
    }

    if constexpr (kKind == Skinny::kShrink) {
      const int parts = static_cast<int>(gridDim.y);
      const int64_t tile = blockIdx.x;
      __syncthreads();  // the ring is done with
      this->cross(reinterpret_cast<float4*>(ring), s);
      __syncthreads();
      this->finish_s(reinterpret_cast<const float4*>(ring), tile, static_cast<int>(blockIdx.y), parts);
      if (parts > 1) {
        uint32_t* counter = p.counters + static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x;
        if (arrive(counter) == static_cast<uint32_t>(parts - 1)) {
          this->add_up_s(tile, parts);
          if (thread == 0) *counter = 0;
        }
      }
    }
    if constexpr (kHasD) {
      uint32_t* of_d = p.counters + static_cast<int64_t>(gridDim.z) * gridDim.y * chunks;
      this->finish_d(d, ones, of_d + static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x);
    }
  }
};

// Of sm_75: bytes of shared memory of an SM, and those that a kernel needs at least.
constexpr int kSharedOfSm75 = 64 * 1024;
template <class T, Skinny kKind, int kRanks>
constexpr int kLeastOnSm75 = SkinnyTile<T, kKind, kRanks, DtypeOf<T>::value == Dtype::float16>::kLeast;

// CTAs that an SM must have registers for: on sm_75 one loads while the other multiplies, where there is room for two,
// as lorafast/backends/cuda/skinny.py reckons it.
template <class T, Skinny kKind, int kRanks>
constexpr int kSkinnyOnSm = kSm80 || 2 * (kLeastOnSm75<T, kKind, kRanks> + 1040) > kSharedOfSm75 ? 1 : 2;

template <class T, Skinny kKind, int kRanks>
__global__ void __launch_bounds__(kSkinnyThreads, kSkinnyOnSm<T, kKind, kRanks>)
    skinny_kernel(const __grid_constant__ SkinnyParams p) {
  constexpr bool kOnSm75 = DtypeOf<T>::value != Dtype::bfloat16 && kLeastOnSm75<T, kKind, kRanks> <= kSharedOfSm75;
  if constexpr (kSm80 || kOnSm75) {
    extern __shared__ __align__(16) char shared[];
    SkinnyCta<T, kKind, kRanks>(p, shared).run();
  } else {
    __trap();  // the host doesn't launch it there
  }
}

// ---- Launchers

// What lorafast/backends/cuda/skinny.py has decided: the instance (`ranks`, of a tile of rows x columns), stages of
// its ring, one on sm_75 and at least two elsewhere, how many tiles a CTA walks, after how many S is added up.
struct SkinnyPlan {
  int64_t ranks, rows, columns, stages, share, chunk;
};

// Calls `with` with the number of ranks of an instance, if there is one: with(std::integral_constant<int, 16>()).
template <class T, Skinny kKind, class With>
bool with_ranks(int64_t ranks, With with) {
  if (ranks == 16) with(std::integral_constant<int, 16>());
  else if (ranks == 32) with(std::integral_constant<int, 32>());
  else if (ranks == 64) with(std::integral_constant<int, 64>());
  else if constexpr (DtypeOf<T>::value == Dtype::bfloat16 && kKind != Skinny::kBackward) {
    if (ranks != 128) return false;
    with(std::integral_constant<int, 128>());
  } else return false;
  return true;
}

// Whether rows of a matrix can be copied by 16 bytes; `along` is the dimension of neighbours. Without elements there is
// no address at all.
inline bool is_direct(const Tensor& matrix, int along) {
  const int64_t size = static_cast<int64_t>(matrix.element_size());
  return matrix.numel() > 0 && (matrix.stride(along) == 1 || matrix.size(along) == 1) &&
         reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0 &&
         (matrix.stride(1 - along) * size % 16 == 0 || matrix.size(1 - along) == 1);
}

inline Dtype wide(Dtype dtype) { return dtype == Dtype::float16 ? Dtype::float32 : dtype; }

inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? "bfloat16" : dtype == Dtype::float16 ? "float16" : "float32";
}

inline void check_dtype(const char* name, const Tensor& tensor, Dtype expected) {
  STD_TORCH_CHECK(
      dtype_of(tensor) == expected, name, " has dtype ", name_of(dtype_of(tensor)), ", expected ",
      name_of(expected));
}

// The data of scratch memory of at least `count` elements of 4 bytes.
inline void* check_scratch(
    const char* name, const std::optional<Tensor>& scratch, ScalarType dtype, int64_t count,
    const OneDevice& device) {
  if (count == 0) return nullptr;
  STD_TORCH_CHECK(scratch.has_value(), name, " is missing, expected ", count, " elements");
  STD_TORCH_CHECK(scratch->is_contiguous(), name, " is not contiguous");
  STD_TORCH_CHECK(
      scratch->scalar_type() == dtype && scratch->numel() >= count, name, " has ", scratch->numel(),
      " elements of dtype ", toString(scratch->scalar_type()), ", expected ", count, " of ", toString(dtype));
  device.check(name, *scratch);
  check_storage(name, *scratch);
  void* data = scratch->mutable_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, " is not aligned to 16 bytes");
  return data;
}

// Two neighbours of S are one store.
inline void check_pairs(const char* name, const Tensor& S) {
  const uintptr_t bytes = 2 * S.element_size();
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(S.const_data_ptr()) % bytes == 0, name, " is not aligned to ", bytes, " bytes");
}

inline SkinnyParams params_of_x(const Tensor& x) {
  SkinnyParams p{};
  p.x = x.const_data_ptr();
  p.x_row = x.stride(0);
  p.x_column = x.stride(1);
  p.rows = x.size(0);
  p.columns = x.size(1);
  p.x_direct = is_direct(x, 1);
  return p;
}

// P is `factor` with columns of X along dimension `along`.
inline void set_p(SkinnyParams& p, const Tensor& factor, int along, Dtype of_x) {
  p.p = factor.const_data_ptr();
  p.p_column = factor.stride(along);
  p.p_rank = factor.stride(1 - along);
  p.p_dtype = dtype_of(factor);
  p.p_direct = of_x != Dtype::float16 && p.p_dtype == of_x && is_direct(factor, along);
}

inline void set_q(SkinnyParams& p, const Tensor& q) {
  p.q = q.const_data_ptr();
  p.q_row = q.stride(0);
  p.q_rank = q.stride(1);
  p.q_direct = is_direct(q, 1);
}

inline void set_dropout(
    SkinnyParams& p, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Dtype of_x) {
  if (!seed.has_value()) return;
  p.dropout = {
      static_cast<const int64_t*>(seed->const_data_ptr()), (p.columns + 7) / 8, static_cast<int32_t>(threshold),
      static_cast<float>(survivor_scale)};
  if (of_x == Dtype::float16) {  // whose elements aren't scaled: that would round
    p.S_scale *= p.dropout.survivor_scale;
    p.D_scale *= p.dropout.survivor_scale;
  }
}

template <class T, Skinny kKind, int kRanks>
void launch_instance(
    const char* name, SkinnyParams& p, const SkinnyPlan& plan, const std::optional<Tensor>& partials,
    const std::optional<Tensor>& counters, const OneDevice& device) {
  using Tile = SkinnyTile<T, kKind, kRanks, false>;
  STD_TORCH_CHECK(
      plan.rows == Tile::kRows && plan.columns == Tile::kColumns, name, " has no tile of ", plan.rows, " x ",
      plan.columns, ", for ", name_of(DtypeOf<T>::value), " and ", kRanks, " ranks it is ", Tile::kRows, " x ",
      Tile::kColumns);
  const OnDevice on(device);
  const bool old = capability_of(name, on) < 80;  // which has no ring
  if (old && DtypeOf<T>::value == Dtype::bfloat16)
    check_capability((std::string(name) + " of bfloat16").c_str(), 80, on);
  STD_TORCH_CHECK(
      old ? plan.stages == 1 : plan.stages >= 2 && plan.stages <= kSkinnyMostStages, "stages is ", plan.stages,
      ", expected ", old ? "1 before compute capability 8.0" : "2 to 8");
  STD_TORCH_CHECK(
      plan.share >= 1 && plan.share < INT64_C(1) << 30, "share is ", plan.share, ", expected 1 to 1073741823");
  STD_TORCH_CHECK(
      plan.chunk >= 1 && plan.chunk < INT64_C(1) << 30, "chunk is ", plan.chunk, ", expected 1 to 1073741823");
  const auto blocks = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
  const int64_t row_tiles = blocks(p.rows, Tile::kRows), column_tiles = blocks(p.columns, Tile::kColumns);
  constexpr bool kAlong = kKind == Skinny::kShrink;
  int64_t across = kAlong ? row_tiles : column_tiles;
  const int64_t shares = std::max<int64_t>(blocks(kAlong ? column_tiles : row_tiles, plan.share), 1);
  const int64_t rank_blocks = blocks(p.r, kRanks);
  if (kKind == Skinny::kBackward) across = std::max<int64_t>(across, 1);  // of no columns ds is 0
  if (across == 0 || rank_blocks == 0) return;
  STD_TORCH_CHECK(
      across < INT64_C(1) << 31 && shares <= 65535 && rank_blocks <= 65535, name, " would take a grid of ", across,
      " x ", shares, " x ", rank_blocks, " CTAs, at most 2147483647 x 65535 x 65535 can be launched");

  // Scratch: parts of S, of D, of the bias; counters of S and of D.
  const int64_t parts_of_s = kKind == Skinny::kReduce ? 1 : kAlong ? shares : across;
  const int64_t parts_of_d = kAlong ? 1 : shares;
  const int64_t of_s = parts_of_s > 1 ? rank_blocks * parts_of_s * row_tiles * Tile::kRows * kRanks : 0;
  const int64_t of_d =
      parts_of_d > 1 && p.D != nullptr ? rank_blocks * parts_of_d * across * Tile::kColumns * kRanks : 0;
  const int64_t of_bias =
      parts_of_d > 1 && p.bias != nullptr ? parts_of_d * across * (Tile::kColumns / 128) * kSkinnyThreads * 2 : 0;
  const int64_t chunks = kKind == Skinny::kBackward ? blocks(plan.share, plan.chunk) : 1;
  const int64_t counted = (kKind == Skinny::kReduce ? 0 : rank_blocks * (kAlong ? across : shares * chunks)) +
                          (kAlong ? 0 : rank_blocks * across);
  auto* parts =
      static_cast<float*>(check_scratch("partials", partials, ScalarType::Float, of_s + of_d + of_bias, device));
  p.S_parts = parts;
  p.D_parts = parts + of_s;
  p.bias_parts = parts + of_s + of_d;
  p.counters = static_cast<uint32_t*>(
      check_scratch("counters", counters, ScalarType::Int, of_s > 0 || parts_of_d > 1 ? counted : 0, device));
  p.share = static_cast<int32_t>(plan.share);
  p.chunk = static_cast<int32_t>(plan.chunk);
  p.stages = static_cast<int32_t>(plan.stages);
  const dim3 grid(
      static_cast<unsigned>(across), static_cast<unsigned>(shares), static_cast<unsigned>(rank_blocks));
  const bool split = old && DtypeOf<T>::value == Dtype::float16;
  const int stages = static_cast<int>(plan.stages);
  const int shared = split ? SkinnyTile<T, kKind, kRanks, true>::shared(stages) : Tile::shared(stages);
  launch<kOldestOfAll>(
      name, skinny_kernel<T, kKind, kRanks>, grid, kSkinnyThreads, static_cast<size_t>(shared), on, p);
}

template <Skinny kKind>
void launch_skinny(
    const char* name, const Tensor& x, SkinnyParams& p, const SkinnyPlan& plan,
    const std::optional<Tensor>& partials, const std::optional<Tensor>& counters, const OneDevice& device) {
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const bool there = with_ranks<T, kKind>(plan.ranks, [&](auto ranks) {
      launch_instance<T, kKind, decltype(ranks)::value>(name, p, plan, partials, counters, device);
    });
    STD_TORCH_CHECK(
        there, name, " has no kernel of ", plan.ranks, " ranks for ", name_of(DtypeOf<T>::value),
        ", there are 16, 32, 64",
        DtypeOf<T>::value == Dtype::bfloat16 && kKind != Skinny::kBackward ? " and 128" : "");
  });
}

}  // namespace lorafast::cuda
