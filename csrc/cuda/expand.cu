// y = drop(scaling · s·Bᵀ) + bias: y is written once, 16 bytes a thread, and not read, unless that is added to it.
//
// A CTA has a block of columns and goes through row blocks. Its rows of B lie in shared memory as the fragments of
// mma.sync, for all ranks. Rows of s come there by cp.async, a chunk of the ranks of a row block ahead of its use, once
// for all warps. On sm_75, without cp.async and TF32, they come through registers, and are multiplied in float32.
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
constexpr int kSliceBytes = 32;         // of a row of s
constexpr int kPad = 16;                // bytes after a row of a chunk: an odd number of 16, as ldmatrix likes it
constexpr int kMostChunk = 4;           // slices
constexpr size_t kMostOfB = 64 * 1024;  // some cards have 99 KB an SM
constexpr size_t kWanted = 48 * 1024;   // of all, where a smaller chunk makes it so: for two CTAs on those
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
  int32_t chunk;         // slices of a stage of s: 1, 2 or 4
  int64_t s_apart;       // bytes from one row of a thread to its next, in a stage
  int64_t s_chunk;       // from a chunk to the next of the same rows
  int64_t s_block;       // from the last chunk of a row block to the first of the next one
  int32_t column_warps;  // the warps side by side; the others lie below them
  int32_t row_blocks;    // that a CTA goes through
  float scale;           // of survivors, too
  Dtype b_type, bias_type;
  bool vector_s, vector_b, vector_y;
  bool onto;  // y has values, which are added: of float16
};

// Ranks become slices, each of one mma.sync, which are kSliceBytes of s. Half a slice is 16 bytes, a word of each lane
// of a quad.
template <class T>
constexpr int kSlice = DtypeOf<T>::value == Dtype::bfloat16 ? 16 : 8;

// Four words of a factor: half a slice of a row, from `rank` on, where ranks aren't neighbours or have another dtype.
// `at`: of the row's first element.
template <class T>
__device__ __forceinline__ uint4
load_half(const void* matrix, int64_t at, int64_t stride, int rank, int r, Dtype dtype) {
  constexpr int kCount = kSlice<T> / 2;
  float v[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    v[i] = rank + i < r ? load_as_float(matrix, at + (rank + i) * stride, dtype) : 0.0f;
  if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
    return make_uint4(
        pack_two<bfloat16>(v[0], v[1]), pack_two<bfloat16>(v[2], v[3]), pack_two<bfloat16>(v[4], v[5]),
        pack_two<bfloat16>(v[6], v[7]));
  } else {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  }
}

// All of the CTA's rows of B, of whatever dtype: [column warps][slices][2][32 lanes] of 16 bytes, which are the two
// registers of each of two tiles; on sm_75 [column warps][slices][8 ranks][32 columns]. A thread takes half
// a slice of a row: a word for each lane of a quad.
template <class T>
__device__ __forceinline__ void fill(uint32_t* shared, const ExpandParams& p, int64_t first) {
  const int halves = 2 * p.slices, count = p.column_warps * kSpan * halves;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int column = i / halves, half = i % halves, rank = half * (kSlice<T> / 2);
    const int64_t n = first + column, at = n * p.b_row;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (n < p.N) {
      if (p.vector_b && rank + kSlice<T> / 2 <= p.r) {
        v = ptx::load_constant(static_cast<const char*>(p.b) + (at + rank) * (32 / kSlice<T>));
      } else {
        v = load_half<T>(p.b, at, p.b_col, rank, p.r, p.b_type);
      }
    }
    const int slice = column / kSpan * p.slices + half / 2;
    if constexpr (kSm80) {
      const int tile = tile_of(column % kSpan), g = place_of(column % kSpan);
      uint32_t* const to = shared + 4 * (32 * (slice * 2 + tile / 2) + 4 * g) + tile % 2 * 2 + half % 2;
      to[0] = v.x, to[4] = v.y, to[8] = v.z, to[12] = v.w;
    } else {
      uint32_t* const to = shared + 32 * (kWords * slice + half % 2 * 4) + column % kSpan;
      to[0] = v.x, to[32] = v.y, to[64] = v.z, to[96] = v.w;
    }
  }
}

__device__ __forceinline__ void fill_bias(float* shared, const ExpandParams& p, int64_t first) {
  const int64_t n = first + static_cast<int>(threadIdx.x);
  if (threadIdx.x < static_cast<unsigned>(p.column_warps * kSpan))
    shared[threadIdx.x] =
        p.bias != nullptr && n < p.N ? load_as_float(p.bias, n * p.bias_stride, p.bias_type) : 0.0f;
}

// Rows of s on their way to shared memory: a row block's chunks, one after the other, then those of the next.
template <class T>
struct Copies {
  static constexpr Dtype kDtype = DtypeOf<T>::value == Dtype::bfloat16 ? Dtype::bfloat16 : Dtype::float32;
  static constexpr int kSize = kSliceBytes / kSlice<T>;

  const ExpandParams& p;
  const int pitch, rows;  // of a row block
  const int rank, row;    // this thread's first, in a chunk and in a row block
  const int apart;        // rows from one to the next
  int slice = 0;
  const char* from;

  __device__ __forceinline__ Copies(const ExpandParams& params, int64_t begin, int pitch_, int rows_)
      : p(params),
        pitch(pitch_),
        rows(rows_),
        rank(static_cast<int>(threadIdx.x) % (2 * p.chunk) * (kSlice<T> / 2)),
        row(static_cast<int>(threadIdx.x) / (2 * p.chunk)),
        apart(static_cast<int>(kThreads) / (2 * p.chunk)),
        from(static_cast<const char*>(p.s) + ((begin + row) * p.s_row + rank * p.s_col) * kSize) {}

  // `left`: rows from the row block on.
  __device__ __forceinline__ void start(char* stage, int64_t left) {
    char* to = stage + row * pitch + rank * kSize;
    const int ranks = p.r - slice * kSlice<T> - rank;  // to come
    if (p.vector_s && ranks >= kSlice<T> / 2 && left >= rows) {
      const char* at = from;
#pragma unroll 1
      for (int i = row; i < rows; i += apart) {
        ptx::copy_whole_16(to, at);
        to += apart * pitch;
        at += p.s_apart;
      }
    } else {
      at_an_edge(to, ranks, left);
    }
    slice += p.chunk;
    from += slice < p.slices ? p.s_chunk : p.s_block;
    if (slice >= p.slices) slice = 0;
  }

  // Rows and ranks of which there may be no more, or which aren't copied by 16 bytes.
  __device__ __forceinline__ void at_an_edge(char* to, int ranks, int64_t left) const {
    const int bytes = ranks <= 0 ? 0 : ranks * kSize < 16 ? ranks * kSize : 16;
    const char* at = from;
#pragma unroll 1
    for (int i = row; i < rows; i += apart) {
      const int there = i < left ? bytes : 0;
      if (p.vector_s) {  // nothing is read where `there` is 0, but an address must be good all the same
        ptx::copy_16(to, there > 0 ? at : p.s, there);
      } else {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (there > 0) v = load_half<T>(at, 0, p.s_col, 0, ranks, kDtype);
        *reinterpret_cast<uint4*>(to) = v;
      }
      to += apart * pitch;
      at += p.s_apart;
    }
  }
};

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

// The same on sm_75, without tensor cores: s of this lane's four rows, and B of its eight columns.
__device__ __forceinline__ void multiply(
    float (&acc)[2][kTiles][4], const char* of_s, int pitch, const float* b_columns) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float s[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 v = *reinterpret_cast<const float4*>(of_s + 8 * i * pitch + 16 * half);
      s[i][0] = v.x, s[i][1] = v.y, s[i][2] = v.z, s[i][3] = v.w;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const auto* const from = reinterpret_cast<const float4*>(b_columns + 32 * (4 * half + k));
      const float4 left = from[0], right = from[1];
      const float b[kEight] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < kEight; ++j) {
          float& sum = acc[i / 2][j / 2][2 * (i % 2) + j % 2];
          sum = fmaf(s[i][k], b[j], sum);
        }
    }
  }
}

// Adds eight neighbours of y that are there, at `to`, of which the row has `left`.
template <class T>
__device__ __forceinline__ void add_eight(float (&v)[kEight], const T* to, int64_t left, bool vector) {
  T old[kEight];
  if (vector && left >= kEight) {
    *reinterpret_cast<uint4*>(old) = *reinterpret_cast<const uint4*>(to);
  } else {
#pragma unroll
    for (int k = 0; k < kEight; ++k) old[k] = k < left ? to[k] : from_float<T>(0.0f);
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) v[k] += to_float(old[k]);
}

// A warp's rows of y, of which this lane has four: `row` and each eighth from there on, eight columns from `col` on.
// `left`: rows from `row` on.
template <class T>
__device__ __forceinline__ void store_block(
    const float (&acc)[2][kTiles][4], const ExpandParams& p, int64_t row, int64_t left, int64_t col,
    const float* bias) {
  T* to = static_cast<T*>(p.y) + row * p.N + col;
  const bool masked = p.dropout.seed != nullptr;
  const uint64_t seed = masked ? static_cast<uint64_t>(*p.dropout.seed) : 0;  // kept, it would take registers
  if (sizeof(T) == 2 && !masked && p.bias == nullptr && !p.onto && p.vector_y && left > kRows - 8 &&
      col + kEight <= p.N) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v[kEight];
#pragma unroll
      for (int k = 0; k < kEight; ++k) v[k] = acc[i / 2][k / 2][2 * (i % 2) + k % 2] * p.scale;
      if constexpr (sizeof(T) == 2) store_whole(to, v);
      to += 8 * p.N;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float v[kEight];
#pragma unroll
    for (int k = 0; k < kEight; ++k) v[k] = acc[i / 2][k / 2][2 * (i % 2) + k % 2] * p.scale;
    if (masked) drop_eight(v, p.dropout, seed, row, col / kEight);
    if (p.bias != nullptr) {
#pragma unroll
      for (int k = 0; k < kEight; ++k) v[k] += bias[k];
    }
    if constexpr (DtypeOf<T>::value == Dtype::float16) {
      if (p.onto && left > 8 * i) add_eight(v, to, p.N - col, p.vector_y);
    }
    store_eight<T>(to - col, v, col, p.N, p.vector_y, left > 8 * i);
    row += 8;
    to += 8 * p.N;
  }
}

// CTAs that an SM must have registers for.
template <class T>
constexpr int kOnSm = DtypeOf<T>::value == Dtype::bfloat16 ? 3 : 2;

// CTA (i, j): column block i, row blocks of group j.
template <class T>
__global__ void __launch_bounds__(kThreads, kOnSm<T>) expand_kernel(const __grid_constant__ ExpandParams p) {
  if constexpr (!kSm80 && DtypeOf<T>::value == Dtype::bfloat16) {
    __trap();  // the host doesn't launch it there
    return;
  }
  extern __shared__ uint4 expand_shared[];
  auto* const shared = reinterpret_cast<uint32_t*>(expand_shared);
  auto* const bias = reinterpret_cast<float*>(shared + p.column_warps * p.slices * (32 * kWords));
  char* const ring = reinterpret_cast<char*>(bias + p.column_warps * kSpan);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int pitch = p.chunk * kSliceBytes + kPad;
  const int step = kWarps / p.column_warps * kRows;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.row_blocks * step;
  int64_t left = p.M - begin;  // rows from the next row block on
  const int64_t most = static_cast<int64_t>(p.row_blocks) * step;
  const int blocks = left < most ? static_cast<int>((left + step - 1) / step) : p.row_blocks;
  Copies<T> copies(p, begin, pitch, step);
  copies.start(ring, left);
  ptx::commit_copies();

  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.column_warps * kSpan;
  fill<T>(shared, p, first);
  fill_bias(bias, p, first);
  const int64_t col = first + warp % p.column_warps * kSpan + lane % 4 * kEight;
  const uint32_t* const fragments =
      shared + warp % p.column_warps * p.slices * (32 * kWords) + (kSm80 ? 4 * lane : lane % 4 * kEight);
  const bool b_exact = p.b_type != Dtype::float32;
  const char* const own_s = ring + warp / p.column_warps * kRows * pitch +
                            (kSm80 ? lane % 16 * pitch + lane / 16 * 16 : lane / 4 * pitch);
  const float* const own_bias = bias + warp % p.column_warps * kSpan + lane % 4 * kEight;
  const int stage_bytes = step * pitch;
  int stage = 0;
  const int own_row = warp / p.column_warps * kRows + lane / 4;

  for (int block = 0; block < blocks; ++block) {
    float acc[2][kTiles][4] = {};
    const uint32_t* b = fragments;
    for (int slice = 0; slice < p.slices;) {
      ptx::wait_for_copies<0>();
      __syncthreads();  // s, and at first B, is there for all, and all have done with the other stage
      const char* of_s = own_s + stage;
      stage = stage_bytes - stage;
      const int behind = slice + p.chunk < p.slices ? slice + p.chunk : p.slices;
      if (behind < p.slices) copies.start(ring + stage, left);
      else if (block + 1 < blocks) copies.start(ring + stage, left - step);
      ptx::commit_copies();
#pragma unroll 1
      for (; slice < behind; ++slice) {
        if constexpr (kSm80) {
          uint32_t a[2][4];
          ptx::load_matrices(a[0], of_s);
          ptx::load_matrices(a[1], of_s + 16 * pitch);
          multiply<T>(acc, a, b, b_exact);
        } else {
          multiply(acc, of_s, pitch, reinterpret_cast<const float*>(b));
        }
        of_s += kSliceBytes;
        b += 32 * kWords;
      }
    }
    store_block<T>(acc, p, p.M - left + own_row, left - own_row, col, own_bias);
    left -= step;
  }
}

void expand(
    const Tensor& s, const Tensor& lora_B, double scaling, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor y, int64_t column_warps,
    int64_t row_blocks, bool onto) {
  const OneDevice device(kDevice, "s", s);
  STD_TORCH_CHECK(s.dim() == 2 && lora_B.dim() == 2, "s or lora_B is no matrix");
  const int64_t M = s.size(0), r = s.size(1), N = lora_B.size(0);
  check_matrix("s", s, M, r, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_output("y", y, M, N, device);
  const bool bf16 = dtype_of(y) == Dtype::bfloat16;
  STD_TORCH_CHECK(
      dtype_of(s) == (bf16 ? Dtype::bfloat16 : Dtype::float32), "s has dtype ", toString(s.scalar_type()),
      ", expected ", bf16 ? "bfloat16" : "float32", " beside y");
  if (bias.has_value()) check_vector("bias", *bias, N, device);
  check_seed(seed, threshold, device);
  STD_TORCH_CHECK(r >= 1, "r is ", r, ", expected at least 1");
  STD_TORCH_CHECK(
      !onto || dtype_of(y) == Dtype::float16, "y has dtype ", toString(y.scalar_type()),
      ", onto float16 alone can be added");
  STD_TORCH_CHECK(
      column_warps == 1 || column_warps == 2 || column_warps == 4, "column_warps is ", column_warps,
      ", expected 1, 2 or 4");
  STD_TORCH_CHECK(
      row_blocks >= 1 && row_blocks < INT64_C(1) << 24, "row_blocks is ", row_blocks, ", expected 1 to ",
      (1 << 24) - 1);
  if (M == 0 || N == 0) return;

  const int64_t slice = bf16 ? 16 : 8, slices = (r + slice - 1) / slice, columns = column_warps * kSpan;
  const size_t of_b = static_cast<size_t>(column_warps * slices) * (32 * kWords * 4);
  STD_TORCH_CHECK(
      of_b <= kMostOfB, "r is ", r, ": ", columns, " rows of lora_B take ", of_b,
      " bytes of shared memory, expected at most ", kMostOfB);
  const auto shared_with = [&](int64_t chunk) {
    return of_b +
           static_cast<size_t>(4 * columns + 2 * (kWarps / column_warps * kRows) * (chunk * kSliceBytes + kPad));
  };
  int64_t chunk = slices > 2 ? kMostChunk : slices;
  while (chunk > 1 && shared_with(chunk) > kWanted) chunk /= 2;
  const size_t shared = shared_with(chunk);
  const int64_t rows = kWarps / column_warps * kRows * row_blocks;
  const int64_t across = (N + columns - 1) / columns, down = (M + rows - 1) / rows;
  STD_TORCH_CHECK(
      across < INT64_C(1) << 31 && down <= kMostBlocks, "y is ", M, " x ", N, ", more than ", kMostBlocks,
      " groups of ", rows, " rows: row_blocks must be larger");
  const bool masked = seed.has_value() && threshold > 0;
  const int64_t size = static_cast<int64_t>(s.element_size());
  const OnDevice on(device);
  if (bf16) check_capability("expand of bfloat16", 80, on);
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
    p.chunk = static_cast<int32_t>(chunk);
    p.column_warps = static_cast<int32_t>(column_warps), p.row_blocks = static_cast<int32_t>(row_blocks);
    p.scale = static_cast<float>(masked ? scaling * survivor_scale : scaling);
    p.b_type = dtype_of(lora_B);
    p.bias_type = bias.has_value() ? dtype_of(*bias) : Dtype::float32;
    const int64_t row_block = kWarps / column_warps * kRows, of_chunk = chunk * slice * p.s_col * size;
    p.s_apart = kThreads / (2 * chunk) * p.s_row * size;
    p.s_chunk = of_chunk;
    p.s_block = row_block * p.s_row * size - (slices + chunk - 1) / chunk * of_chunk + of_chunk;
    p.vector_s = (p.s_col == 1 || r == 1) && aligned(p.s, M > 1 ? p.s_row * size : 0, 16);
    p.vector_b = p.b_type == dtype_of(s) && p.b_col == 1 && aligned(p.b, N > 1 ? p.b_row * size : 0, 16);
    p.vector_y = aligned(p.y, N * static_cast<int64_t>(sizeof(T)), 16);
    p.onto = onto;
    launch<kOldestOfAll>(
        "expand", expand_kernel<T>, dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), kThreads,
        shared, on, p);
  });
}

}  // namespace lorafast::cuda
