// What a GEMM of mma.sync does to its accumulators before and after its main loop: scaling, bias and mask of a
// low-rank term, and 16-byte stores.
//
// A slab is a warp's 16 rows and 8 · kTiles columns: tile j of a lane has (g, 2t), (g, 2t + 1), (g + 8, 2t) and
// (g + 8, 2t + 1) of columns 8j to 8j + 7, g = lane / 4, t = lane % 4.
#pragma once

#include <cstdint>

#include "bias.cuh"
#include "eight.cuh"
#include "numbers.cuh"
#include "philox.cuh"
#include "ptx.cuh"

namespace lorafast::cuda {

// Which of 32 columns of a row are kept: bit 8j + i is column i of tile j. `group`: of Philox, the first tile's. The
// four lanes of a quad make a tile each.
__device__ __forceinline__ uint32_t
keep_of_quad(const Dropout& dropout, uint64_t seed, int64_t row, int64_t group) {
  const int t = static_cast<int>(threadIdx.x % 4);
  uint32_t bits = keep_bits(dropout, seed, row, group + t) << (8 * t);
  bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 1);
  return bits | __shfl_xor_sync(0xFFFFFFFFu, bits, 2);
}

// acc = drop(scale · acc), of a slab at (row, col). `scale`: of survivors, too; without a seed nothing is dropped. col is
// a multiple of 8. The whole warp calls it.
template <int kTiles>
__device__ __forceinline__ void end_low_rank(
    float (&acc)[kTiles][4], float scale, const Dropout& dropout, uint64_t seed, int64_t row, int64_t col) {
  static_assert(kTiles % 4 == 0, "a quad makes the mask of four tiles");
  const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[j][i] *= scale;
  }
  if (dropout.seed == nullptr) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      const uint32_t bits = keep_of_quad(dropout, seed, row + g + 8 * half, col / 8 + j) >> (2 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* const two = acc[j + i] + 2 * half;
        if ((bits >> (8 * i) & 1) == 0) two[0] = 0.0f;
        if ((bits >> (8 * i + 1) & 1) == 0) two[1] = 0.0f;
      }
    }
  }
}

// acc += bias, of slabs whose columns begin at `col`.
template <int kSlabs, int kTiles>
__device__ __forceinline__ void add_bias(float (&acc)[kSlabs][kTiles][4], const Bias& bias, int64_t col) {
  if (bias.from == nullptr) return;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float b = bias.at(col + 8 * j + 2 * (threadIdx.x % 4) + i);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        acc[slab][j][i] += b;
        acc[slab][j][2 + i] += b;
      }
    }
  }
}

// Bytes of shared memory through which a slab is stored, 128 of each row at a time. Behind them are more, so that what
// a warp stores at a time lies in all banks: words of eight rows, or pairs of words of four.
template <class T>
constexpr int kSlabRow = 128 + (sizeof(T) == 4 ? 32 : 16);
template <class T>
constexpr int kSlabBytes = 16 * kSlabRow<T>;

// Rounds a slab and stores it at (row, col) of y [M, N], contiguous. `shared`: kSlabBytes of this warp alone, aligned
// to 16 bytes. `vector`: rows of y begin at multiples of 16 bytes. The whole warp calls it.
template <class T, int kTiles>
__device__ __forceinline__ void store_slab(
    T* y, const float (&acc)[kTiles][4], char* shared, int64_t row, int64_t col, int64_t M, int64_t N,
    bool vector) {
  constexpr int kRow = kSlabRow<T>, kSize = sizeof(T), kEach = 128 / (8 * kSize);  // tiles at a time
  constexpr int kOfChunk = 16 / kSize;
  static_assert(kTiles % kEach == 0, "rows of 128 bytes");
  const int lane = ptx::thread_again() % 32, g = lane / 4, t = lane % 4;
  char* const own = shared + g * kRow + 2 * kSize * t;
  const char* const first = shared + lane / 8 * kRow + lane % 8 * 16;
#pragma unroll
  for (int part = 0; part < kTiles / kEach; ++part) {
    __syncwarp();  // what was here has been read
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&tile)[4] = acc[part * kEach + j];
        char* const at = own + 8 * half * kRow + 8 * kSize * j;
        if constexpr (kSize == 2) {
          *reinterpret_cast<uint32_t*>(at) = pack_two<T>(tile[2 * half], tile[2 * half + 1]);
        } else {
          *reinterpret_cast<float2*>(at) = make_float2(tile[2 * half], tile[2 * half + 1]);
        }
      }
    }
    __syncwarp();
    const int64_t n = col + part * (8 * kEach) + lane % 8 * kOfChunk;
    T* to = y + (row + lane / 8) * N + n;
    const char* from = first;
#pragma unroll
    for (int i = 0; i < 4; ++i, to += 4 * N, from += 4 * kRow) {
      if (row + lane / 8 + 4 * i >= M) break;
      if (vector && n + kOfChunk <= N) {
        ptx::store_16(to, *reinterpret_cast<const uint4*>(from));
      } else {
#pragma unroll 1
        for (int e = 0; e < kOfChunk && n + e < N; ++e) to[e] = reinterpret_cast<const T*>(from)[e];
      }
    }
  }
}

}  // namespace lorafast::cuda
