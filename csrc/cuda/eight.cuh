// Tiles of y of which a thread has eight neighbouring columns: one call of Philox, 16 bytes of bf16.
//
// A warp has 32 columns, in four n8 tiles of mma.sync. Column g of tile j is column column_of(j, g) of the 32, so
// that the lane which has columns 2t and 2t + 1 of each tile has columns 8t to 8t + 7 of the 32.
#pragma once

#include <cstdint>

#include "numbers.cuh"
#include "philox.cuh"
#include "ptx.cuh"

namespace lorafast::cuda {

constexpr int kTiles = 4;
constexpr int kSpan = 8 * kTiles;  // columns of a warp
constexpr int kEight = 8;

__device__ __forceinline__ int column_of(int tile, int g) { return kEight * (g >> 1) + 2 * tile + (g & 1); }

// The inverse: tile and g of a column of the 32.
__device__ __forceinline__ int tile_of(int column) { return column % kEight / 2; }
__device__ __forceinline__ int place_of(int column) { return column / kEight * 2 + column % 2; }

// Sets to 0 what `keep_bits` doesn't keep. `dropout.threshold` isn't 0.
__device__ __forceinline__ void drop_eight(
    float (&v)[kEight], const Dropout& dropout, uint64_t seed, int64_t row, int64_t group) {
  const uint4 words = philox(seed, static_cast<uint64_t>(row * dropout.groups + group));
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  // A half-word is at least the threshold where, moved to the upper half, it is above this. Of threshold 65536 it is
  // the greatest of all: nothing is kept.
  const uint32_t below = (static_cast<uint32_t>(dropout.threshold) << 16) - 1;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if ((word[i] << 16) <= below) v[2 * i] = 0.0f;
    if (word[i] <= below) v[2 * i + 1] = 0.0f;
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
  } else {
    const __half2 two = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
  }
}

// Stores eight neighbours of 16 bits, at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void store_whole(T* to, const float (&v)[kEight]) {
  ptx::store_16(
      to, make_uint4(
              pack_two<T>(v[0], v[1]), pack_two<T>(v[2], v[3]), pack_two<T>(v[4], v[5]), pack_two<T>(v[6], v[7])));
}

// Stores columns `col` to col + 7 of a row that begins at `to` and has N. The whole warp calls it; neighbours in a
// quad have neighbouring eights. `vector`: rows are multiples of 16 bytes and begin at such. `inside`: there is such
// a row.
template <class T>
__device__ __forceinline__ void store_eight(
    T* to, const float (&v)[kEight], int64_t col, int64_t N, bool vector, bool inside) {
  const bool whole = vector && col + kEight <= N;
  if constexpr (sizeof(T) == 2) {
    if (inside && whole) {
      store_whole(to + col, v);
      return;
    }
  } else {
    // 32 bytes a thread: two threads exchange halves, so that each store fills whole sectors.
    const bool odd = threadIdx.x % 2 != 0;
    uint32_t first[4], second[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, odd ? v[i] : v[4 + i], 1);
      first[i] = __float_as_uint(odd ? other : v[i]);
      second[i] = __float_as_uint(odd ? v[4 + i] : other);
    }
    const int64_t pair = odd ? col - kEight : col;  // where the columns of both begin
    if (inside && vector && pair + 2 * kEight <= N) {
      float* const at = to + pair + (odd ? 4 : 0);
      ptx::store_16(at, make_uint4(first[0], first[1], first[2], first[3]));
      ptx::store_16(at + kEight, make_uint4(second[0], second[1], second[2], second[3]));
      return;
    }
  }
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (col + i < N) to[col + i] = from_float<T>(v[i]);
  }
}

}  // namespace lorafast::cuda
