// y = drop(scaling · s·Bᵀ) + bias: y is written once, 16 bytes a thread, and not read.
//
// A CTA has a block of columns and goes through row blocks. Its rows of B lie in shared memory as the fragments of
// mma.sync, for all ranks; each warp loads its own rows of s, one slice of the ranks ahead.
#include "arguments.h"
#include "eight.cuh"
#include "operations.h"
#include "ptx.cuh"
#include "tf32.cuh"

namespace lorafast::cuda {

namespace {
constexpr int kWarps = 8;
constexpr unsigned kThreads = 32 * kWarps;
constexpr int kRows = 32;               // of a warp, in two m16 tiles
constexpr int kWords = 2 * kTiles;      // of a lane's fragments of B for a slice
constexpr size_t kShared = 64 * 1024;   // of B: some cards have 99 KB an SM
constexpr int64_t kMostBlocks = 65535;  // in the second dimension of a grid
}  // namespace

struct ExpandParams {
  const void* s;     // [M, r] of bfloat16 for y in it, else of float32
  const void* b;     // [N, r]
  const void* bias;  // [N] or null
  void* y;           // [M, N], contiguous
  Dropout dropout;
  int64_t M, N, s_row, s_col, b_row, b_col, bias_stride;
  int32_t r, slices;
  int32_t column_warps;  // the warps side by side; the others lie below them
  int32_t row_blocks;    // that a CTA goes through
  float scale;           // of survivors, too
  Dtype b_type, bias_type;
  bool vector_s, vector_y;
};

// How ranks become slices, each of one mma.sync. A lane's ranks in a slice are neighbours: both factors have them in
// the same order, so that the order is free.
template <class T>
constexpr int kSlice = DtypeOf<T>::value == Dtype::bfloat16 ? 16 : 8;
template <class T>
constexpr int kPerLane = kSlice<T> / 4;

// The fragment of s [16, kSlice] at rows `row` and row + 8 of this lane.
template <class T>
__device__ __forceinline__ void load_s(uint32_t (&a)[4], const ExpandParams& p, int64_t row, int slice) {
  constexpr bool kBf16 = DtypeOf<T>::value == Dtype::bfloat16;
  const int rank = slice * kSlice<T> + static_cast<int>(threadIdx.x % 4) * kPerLane<T>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t at = row + 8 * half;
    uint32_t first = 0, second = 0;
    if (at < p.M && rank < p.r) {
      if (p.vector_s) {
        const char* const from = static_cast<const char*>(p.s) + (at * p.s_row + rank) * (kBf16 ? 2 : 4);
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
        first = v.x, second = v.y;
      } else if constexpr (kBf16) {
        const auto* const from = static_cast<const uint16_t*>(p.s) + at * p.s_row;
        uint32_t v[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (rank + i < p.r) v[i] = from[(rank + i) * p.s_col];
        }
        first = v[0] | v[1] << 16, second = v[2] | v[3] << 16;
      } else {
        const auto* const from = static_cast<const uint32_t*>(p.s) + at * p.s_row;
        first = from[rank * p.s_col];
        if (rank + 1 < p.r) second = from[(rank + 1) * p.s_col];
      }
    }
    a[half] = first;
    a[2 + half] = second;
  }
}

// A lane's word of the fragments of B: column n, ranks from `rank` on.
template <class T>
__device__ __forceinline__ uint32_t load_b(const ExpandParams& p, int64_t n, int rank) {
  const int64_t at = n * p.b_row;
  if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
    float v[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (n < p.N && rank + i < p.r) v[i] = load_as_float(p.b, at + (rank + i) * p.b_col, p.b_type);
    }
    return pack_two<bfloat16>(v[0], v[1]);
  } else {
    return n < p.N && rank < p.r ? __float_as_uint(load_as_float(p.b, at + rank * p.b_col, p.b_type)) : 0u;
  }
}

// All of the CTA's rows of B, of whatever dtype: [column warps][slices][2][32 lanes] of 16 bytes, which are the two
// registers of each of two tiles.
template <class T>
__device__ __forceinline__ void fill(uint32_t* shared, const ExpandParams& p, int64_t first) {
  const int count = p.column_warps * p.slices * 32 * kWords;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int word = i % 4, lane = i / 4 % 32, two = i / 128 % 2, block = i / 256;
    const int slice = block % p.slices, span = block / p.slices;
    const int64_t n = first + span * kSpan + column_of(2 * two + word / 2, lane / 4);
    shared[i] = load_b<T>(p, n, slice * kSlice<T> + lane % 4 * kPerLane<T> + word % 2 * (kPerLane<T> / 2));
  }
}

template <class T>
__device__ __forceinline__ void multiply(
    float (&acc)[2][kTiles][4], const uint32_t (&a)[2][4], const uint32_t* fragments, bool b_exact) {
  const auto* const from = reinterpret_cast<const uint4*>(fragments);
  if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
#pragma unroll
    for (int two = 0; two < 2; ++two) {
      const uint4 b = from[32 * two];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::multiply_bf16(acc[i][2 * two], a[i], b.x, b.y);
        ptx::multiply_bf16(acc[i][2 * two + 1], a[i], b.z, b.w);
      }
    }
  } else {
    Tf32Parts pairs[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float v[4] = {
          __uint_as_float(a[i][0]), __uint_as_float(a[i][1]), __uint_as_float(a[i][2]), __uint_as_float(a[i][3])};
      split_all(pairs[i], v);
    }
#pragma unroll
    for (int two = 0; two < 2; ++two) {
      const uint4 b = from[32 * two];
      const float v[4] = {__uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)};
      Tf32Parts of[4];
      split_all(of, v);
      const Tf32Parts even[2] = {of[0], of[1]}, odd[2] = {of[2], of[3]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_split(acc[i][2 * two], pairs[i], even, b_exact);
        multiply_split(acc[i][2 * two + 1], pairs[i], odd, b_exact);
      }
    }
  }
}

// CTA (i, j): column block i, row blocks of group j.
template <class T>
__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ ExpandParams p) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ uint4 expand_shared[];
  auto* const shared = reinterpret_cast<uint32_t*>(expand_shared);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.column_warps * kSpan;
  fill<T>(shared, p, first);
  const int64_t col = first + warp % p.column_warps * kSpan + lane % 4 * kEight;
  float bias[kEight] = {};
  if (p.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (col + i < p.N) bias[i] = load_as_float(p.bias, (col + i) * p.bias_stride, p.bias_type);
    }
  }
  const uint64_t seed = p.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*p.dropout.seed);
  const int step = kWarps / p.column_warps * kRows;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.row_blocks * step;
  const int64_t limit = begin + static_cast<int64_t>(p.row_blocks) * step;
  const int64_t end = limit < p.M ? limit : p.M;
  int64_t row = begin + warp / p.column_warps * kRows + lane / 4;
  const uint32_t* const fragments = shared + warp % p.column_warps * p.slices * (32 * kWords) + 4 * lane;
  const bool b_exact = p.b_type != Dtype::float32;
  __syncthreads();

  uint32_t next[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) load_s<T>(next[i], p, row + 16 * i, 0);
  for (int64_t block = begin; block < end; block += step, row += step) {
    float acc[2][kTiles][4] = {};
    for (int slice = 0; slice < p.slices; ++slice) {
      uint32_t a[2][4];
      const bool last = slice + 1 == p.slices;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) a[i][k] = next[i][k];
        load_s<T>(next[i], p, row + 16 * i + (last ? step : 0), last ? 0 : slice + 1);
      }
      multiply<T>(acc, a, fragments + slice * (32 * kWords), b_exact);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = row + 8 * i;
      float v[kEight];
#pragma unroll
      for (int k = 0; k < kEight; ++k) v[k] = acc[i / 2][k / 2][2 * (i % 2) + k % 2] * p.scale;
      if (p.dropout.seed != nullptr) drop_eight(v, p.dropout, seed, at, col / kEight);
      if (p.bias != nullptr) {
#pragma unroll
        for (int k = 0; k < kEight; ++k) v[k] += bias[k];
      }
      store_eight<T>(static_cast<T*>(p.y) + at * p.N, v, col, p.N, p.vector_y, at < p.M);
    }
  }
#else
  __trap();  // the host doesn't launch it there
#endif
}

void expand(
    const Tensor& s, const Tensor& lora_B, double scaling, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor y, int64_t column_warps,
    int64_t row_blocks) {
  const OneDevice device(kDevice, "s", s);
  STD_TORCH_CHECK(s.dim() == 2 && lora_B.dim() == 2, "s or lora_B is no matrix");
  const int64_t M = s.size(0), r = s.size(1), N = lora_B.size(0);
  check_matrix("s", s, M, r, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_output("y", y, M, N, device);
  const bool bf16 = dtype_of(y) == Dtype::bfloat16;
  STD_TORCH_CHECK(
      dtype_of(s) == (bf16 ? Dtype::bfloat16 : Dtype::float32), "s has dtype ",
      torch::headeronly::toString(s.scalar_type()), ", expected ", bf16 ? "bfloat16" : "float32", " beside y");
  if (bias.has_value()) check_vector("bias", *bias, N, device);
  check_seed(seed, threshold, device);
  STD_TORCH_CHECK(r >= 1, "r is ", r, ", expected at least 1");
  STD_TORCH_CHECK(
      column_warps == 1 || column_warps == 2 || column_warps == 4, "column_warps is ", column_warps,
      ", expected 1, 2 or 4");
  STD_TORCH_CHECK(
      row_blocks >= 1 && row_blocks < INT64_C(1) << 24, "row_blocks is ", row_blocks, ", expected 1 or more");
  if (M == 0 || N == 0) return;

  const int64_t slice = bf16 ? 16 : 8, slices = (r + slice - 1) / slice, columns = column_warps * kSpan;
  const size_t shared = static_cast<size_t>(column_warps * slices) * (32 * kWords * 4);
  STD_TORCH_CHECK(
      shared <= kShared, "r is ", r, ": ", columns, " rows of lora_B take ", shared,
      " bytes of shared memory, expected at most ", kShared);
  const int64_t rows = kWarps / column_warps * kRows * row_blocks;
  const int64_t across = (N + columns - 1) / columns, down = (M + rows - 1) / rows;
  STD_TORCH_CHECK(
      across < INT64_C(1) << 31 && down <= kMostBlocks, "y is ", M, " x ", N, ", more than ", kMostBlocks,
      " groups of ", rows, " rows: row_blocks must be larger");
  const bool masked = seed.has_value() && threshold > 0;
  const int64_t size = static_cast<int64_t>(s.element_size()), ranks = 8 / size;
  const OnDevice on(device);
  with_type(y, [&](auto element) {
    using T = decltype(element);
    ExpandParams p{};
    p.s = s.const_data_ptr();
    p.b = lora_B.const_data_ptr();
    p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
    p.y = y.mutable_data_ptr();
    p.dropout = {
        masked ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr, (N + 7) / 8,
        static_cast<int32_t>(threshold), static_cast<float>(survivor_scale)};
    p.M = M, p.N = N;
    p.s_row = s.stride(0), p.s_col = s.stride(1);
    p.b_row = lora_B.stride(0), p.b_col = lora_B.stride(1);
    p.bias_stride = bias.has_value() ? bias->stride(0) : 0;
    p.r = static_cast<int32_t>(r), p.slices = static_cast<int32_t>(slices);
    p.column_warps = static_cast<int32_t>(column_warps), p.row_blocks = static_cast<int32_t>(row_blocks);
    p.scale = static_cast<float>(masked ? scaling * survivor_scale : scaling);
    p.b_type = dtype_of(lora_B);
    p.bias_type = bias.has_value() ? dtype_of(*bias) : Dtype::float32;
    p.vector_s = p.s_col == 1 && r % ranks == 0 && aligned(p.s, M > 1 ? p.s_row * size : 0, 8);
    p.vector_y = aligned(p.y, N * static_cast<int64_t>(sizeof(T)), 16);
    launch(
        "expand", expand_kernel<T>, dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), kThreads,
        shared, on, p);
  });
}

}  // namespace lorafast::cuda
