// Products on tensor cores: through nvcuda::wmma, and by mma.sync on fragments that ldmatrix loads.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>

#include <type_traits>

namespace wmma = nvcuda::wmma;

constexpr int kThreads = 128;  // 2 × 2 warps
constexpr int kTile = 64;      // rows and columns of C a block, of which a warp has a quarter
constexpr int kWarpTile = kTile / 2;

template <typename T>
struct Element {  // of a matrix in memory, and how a fragment calls it
  using Fragment = T;
  static constexpr int kDepth = 16;  // of one product
};
#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
template <>
struct Element<float> {
  using Fragment = wmma::precision::tf32;
  static constexpr int kDepth = 8;
};
#endif

// A tile [kRows, kCols] at (row, col) of a matrix [rows, cols] whose rows start at multiples of 16 bytes, asynchronously;
// zero beyond the matrix. cols is a multiple of 16 bytes.
template <int kRows, int kCols, int kPitch, typename T>
__device__ void copy_tile(T* to, const T* from, int rows, int cols, int row, int col) {
  constexpr int kPer = 16 / sizeof(T), kChunks = kCols / kPer;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, c = i % kChunks * kPer;
    T* place = &to[r * kPitch + c];
    if (row + r < rows && col + c < cols)
      __pipeline_memcpy_async(place, &from[static_cast<size_t>(row + r) * cols + col + c], 16);
    else *reinterpret_cast<uint4*>(place) = make_uint4(0, 0, 0, 0);
  }
}

// C [M, N] = A [M, K] · B [K, N]: tiles of the next step are on their way while this one's are multiplied.
template <typename T>
__device__ void product_wmma(const T* A, const T* B, float* C, int M, int N, int K) {
  constexpr int kDepth = Element<T>::kDepth, kStep = 32;
  constexpr int kPitchA = kStep + 16 / sizeof(T), kPitchB = kTile + 16 / sizeof(T), kPitchC = 20;
  using Fragment = typename Element<T>::Fragment;
  __shared__ alignas(128) T a[2][kTile * kPitchA];
  __shared__ alignas(128) T b[2][kStep * kPitchB];
  __shared__ alignas(128) float staged[kThreads / 32][16 * kPitchC];
  const int row = blockIdx.y * kTile, col = blockIdx.x * kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / 2 * kWarpTile, warp_col = warp % 2 * kWarpTile;

  wmma::fragment<wmma::accumulator, 16, 16, kDepth, float> sums[2][2];
  for (auto& of_row : sums)
    for (auto& sum : of_row) wmma::fill_fragment(sum, 0.0f);

  const auto load = [&](int step) {
    copy_tile<kTile, kStep, kPitchA>(a[step % 2], A, M, K, row, step * kStep);
    copy_tile<kStep, kTile, kPitchB>(b[step % 2], B, K, N, step * kStep, col);
    __pipeline_commit();
  };
  const int steps = (K + kStep - 1) / kStep;
  if (steps > 0) load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();  // everyone's part of the tile has arrived
    for (int k = 0; k < kStep; k += kDepth) {
      wmma::fragment<wmma::matrix_a, 16, 16, kDepth, Fragment, wmma::row_major> left[2];
      wmma::fragment<wmma::matrix_b, 16, 16, kDepth, Fragment, wmma::row_major> right[2];
      for (int i = 0; i < 2; ++i) {
        wmma::load_matrix_sync(left[i], &a[step % 2][(warp_row + i * 16) * kPitchA + k], kPitchA);
        wmma::load_matrix_sync(right[i], &b[step % 2][k * kPitchB + warp_col + i * 16], kPitchB);
#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
        if constexpr (std::is_same_v<T, float>) {
          for (float& x : left[i].x) x = wmma::__float_to_tf32(x);
          for (float& x : right[i].x) x = wmma::__float_to_tf32(x);
        }
#endif
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) wmma::mma_sync(sums[i][j], left[i], right[j], sums[i][j]);
    }
    __syncthreads();  // the next step but one is loaded over this tile
  }

  // A fragment's elements lie in lanes as the hardware likes: through shared memory to their places.
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      wmma::store_matrix_sync(staged[warp], sums[i][j], kPitchC, wmma::mem_row_major);
      __syncwarp();
      for (int e = lane; e < 16 * 16; e += 32) {
        const int m = row + warp_row + i * 16 + e / 16, n = col + warp_col + j * 16 + e % 16;
        if (m < M && n < N) C[static_cast<size_t>(m) * N + n] = staged[warp][e / 16 * kPitchC + e % 16];
      }
      __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    product_wmma_fp16(const __half* A, const __half* B, float* C, int M, int N, int K) {
  product_wmma(A, B, C, M, N, K);
}

#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
extern "C" __global__ void __launch_bounds__(kThreads)
    product_wmma_bf16(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int M, int N, int K) {
  product_wmma(A, B, C, M, N, K);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    product_wmma_tf32(const float* A, const float* B, float* C, int M, int N, int K) {
  product_wmma(A, B, C, M, N, K);
}
#endif

// One warp: C [32, 8] = A [32, 16] · Bᵀ, B [8, 16], added to C, straight from and to global memory.
extern "C" __global__ void product_wmma_tall(const __half* A, const __half* B, float* C) {
  wmma::fragment<wmma::matrix_a, 32, 8, 16, __half, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 32, 8, 16, __half, wmma::col_major> b;
  wmma::fragment<wmma::accumulator, 32, 8, 16, float> c;
  wmma::load_matrix_sync(a, A, 16);
  wmma::load_matrix_sync(b, B, 16);
  wmma::load_matrix_sync(c, C, 8, wmma::mem_row_major);
  wmma::mma_sync(c, a, b, c);
  wmma::store_matrix_sync(C, c, 8, wmma::mem_row_major);
}

__device__ unsigned shared_address(const void* place) {
  return static_cast<unsigned>(__cvta_generic_to_shared(place));
}

// Matrix i of 8 × 8 has its row j at the address that lane 8 · i + j gives.
__device__ void ldmatrix_x4(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ void ldmatrix_x2(unsigned (&to)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ void ldmatrix_x2_trans(unsigned (&to)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ void ldmatrix_x1(unsigned& to, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(to)
               : "r"(shared_address(row))
               : "memory");
}

#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
__device__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __half2 round_pair(float low, float high, __half) { return __floats2half2_rn(low, high); }
__device__ __nv_bfloat162 round_pair(float low, float high, __nv_bfloat16) {
  return __floats2bfloat162_rn(low, high);
}

constexpr int kRow = 64;  // elements of a row of a tile in shared memory: 128 bytes, which cross all banks
constexpr int kStages = 3;

// Where chunk c of 16 bytes of a row lies: eight rows' chunks of one number are in different banks.
__device__ int swizzled(int row, int chunk) { return row * kRow + (chunk ^ (row & 7)) * 8; }

// Rows [row, row + 64) and columns [col, col + 64) of a matrix [rows, cols] with `pitch` elements from row to row.
// The part of a chunk that is beyond the matrix is zero, and not read.
template <typename T>
__device__ void copy_swizzled(T* to, const T* from, int rows, int cols, int pitch, int row, int col) {
  for (int i = threadIdx.x; i < 64 * 8; i += kThreads) {
    const int r = i / 8, chunk = i % 8, left = cols - (col + chunk * 8);
    const bool inside = row + r < rows && left > 0;
    const T* source = inside ? &from[static_cast<size_t>(row + r) * pitch + col + chunk * 8] : from;
    const int bytes = inside ? min(left, 8) * static_cast<int>(sizeof(T)) : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(&to[swizzled(r, chunk)])),
                 "l"(source), "r"(bytes)
                 : "memory");
  }
}

// C [M, N] = A · Bᵀ, or A · B if kPlain: A [M, K], B [N, K] or [K, N]; rows start at multiples of 16 bytes, ld
// elements apart, whatever M, N, K. A ring of tiles: the tile of two steps later is asked for while this is used.
template <bool kPlain, typename T>
__device__ void product_mma(const T* A, const T* B, T* C, int M, int N, int K, int lda, int ldb, int ldc) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  T* const a = reinterpret_cast<T*>(dynamic_shared);  // [kStages][kTile][kRow]
  T* const b = a + kStages * kTile * kRow;
  const int row = blockIdx.y * kTile, col = blockIdx.x * kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / 2 * kWarpTile, warp_col = warp % 2 * kWarpTile;
  float sums[2][4][4] = {};

  const int steps = (K + kRow - 1) / kRow;
  const auto load = [&](int step) {
    if (step < steps) {
      const int place = step % kStages * kTile * kRow;
      copy_swizzled(a + place, A, M, K, lda, row, step * kRow);
      if (kPlain) copy_swizzled(b + place, B, K, N, ldb, step * kRow, col);
      else copy_swizzled(b + place, B, N, K, ldb, col, step * kRow);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");  // an empty one at the end: the count below stays true
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();  // this tile is there, and nobody reads the one that is overwritten
    load(step + kStages - 1);
    const T* const left = a + step % kStages * kTile * kRow;
    const T* const right = b + step % kStages * kTile * kRow;
#pragma unroll
    for (int k = 0; k < kRow / 16; ++k) {
      unsigned x[2][4], y[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ldmatrix_x4(x[i], &left[swizzled(warp_row + i * 16 + lane % 16, k * 2 + lane / 16)]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = warp_col + j * 8;
        if (kPlain) ldmatrix_x2_trans(y[j], &right[swizzled(k * 16 + lane % 16, n / 8)]);
        else ldmatrix_x2(y[j], &right[swizzled(n + lane % 8, k * 2 + lane / 8 % 2)]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(sums[i][j], x[i], y[j], T{});
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");

  // A thread has two neighbours of a row: one store, but at the last column of an odd N.
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = row + warp_row + i * 16 + half * 8 + lane / 4, n = col + warp_col + j * 8 + lane % 4 * 2;
        if (m >= M || n >= N) continue;
        const auto pair = round_pair(sums[i][j][half * 2], sums[i][j][half * 2 + 1], T{});
        T* const place = &C[static_cast<size_t>(m) * ldc + n];
        if (n + 1 < N) *reinterpret_cast<std::remove_const_t<decltype(pair)>*>(place) = pair;
        else *place = pair.x;
      }
}

extern "C" __global__ void __launch_bounds__(kThreads) product_mma_bf16(
    const __nv_bfloat16* A, const __nv_bfloat16* B, __nv_bfloat16* C, int M, int N, int K, int lda, int ldb,
    int ldc) {
  product_mma<false>(A, B, C, M, N, K, lda, ldb, ldc);
}

extern "C" __global__ void __launch_bounds__(kThreads) product_mma_fp16_plain(
    const __half* A, const __half* B, __half* C, int M, int N, int K, int lda, int ldb, int ldc) {
  product_mma<true>(A, B, C, M, N, K, lda, ldb, ldc);
}

__device__ unsigned to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// A warp a tile of 16 × 8: C [M, N] = A [M, K] · B [K, N] in tf32, fragments straight from global memory.
extern "C" __global__ void product_mma_tf32(const float* A, const float* B, float* C, int M, int N, int K) {
  const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  const int row = (blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32) * 16, col = blockIdx.x * 8;
  const auto a_at = [&](int m, int k) {
    return to_tf32(m < M && k < K ? A[static_cast<size_t>(m) * K + k] : 0.0f);
  };
  const auto b_at = [&](int k, int n) {
    return to_tf32(k < K && n < N ? B[static_cast<size_t>(k) * N + n] : 0.0f);
  };
  float c[4] = {};
  for (int k = 0; k < K; k += 8) {
    const unsigned a[4] = {
        a_at(row + group, k + member), a_at(row + group + 8, k + member), a_at(row + group, k + member + 4),
        a_at(row + group + 8, k + member + 4)};
    const unsigned b[2] = {b_at(k + member, col + group), b_at(k + member + 4, col + group)};
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = row + group + i / 2 * 8, n = col + member * 2 + i % 2;
    if (m < M && n < N) C[static_cast<size_t>(m) * N + n] = c[i];
  }
}
#endif

// A warp a tile of 16 × 8, as sm_75 multiplies: C [M, N] = A [M, K] · Bᵀ, B [N, K], eight of K at a time.
extern "C" __global__ void product_mma_k8(const __half* A, const __half* B, float* C, int M, int N, int K) {
  __shared__ alignas(16) __half a[16][8];
  __shared__ alignas(16) __half b[8][8];
  const int lane = threadIdx.x, row = blockIdx.y * 16, col = blockIdx.x * 8;
  const __half zero = __ushort_as_half(0);
  float c[4] = {};
  for (int k = 0; k < K; k += 8) {
    for (int i = lane; i < 16 * 8; i += 32) {
      const int m = row + i / 8, at = k + i % 8;
      a[i / 8][i % 8] = m < M && at < K ? A[static_cast<size_t>(m) * K + at] : zero;
    }
    for (int i = lane; i < 8 * 8; i += 32) {
      const int n = col + i / 8, at = k + i % 8;
      b[i / 8][i % 8] = n < N && at < K ? B[static_cast<size_t>(n) * K + at] : zero;
    }
    __syncwarp();
    unsigned x[2], y;
    ldmatrix_x2(x, a[lane % 16]);
    ldmatrix_x1(y, b[lane % 8]);
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(x[0]), "r"(x[1]), "r"(y));
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = row + lane / 4 + i / 2 * 8, n = col + lane % 4 * 2 + i % 2;
    if (m < M && n < N) C[static_cast<size_t>(m) * N + n] = c[i];
  }
}
