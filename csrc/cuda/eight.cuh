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

// Stores columns `col` to col + 7 of a row that begins at `to` and has N. The whole warp calls it; neighbours in a
// quad have neighbouring eights. `vector`: rows are multiples of 16 bytes and begin at such. `inside`: there is such
// a row.
template <class T>
__device__ __forceinline__ void store_eight(
    T* to, const float (&v)[kEight], int64_t col, int64_t N, bool vector, bool inside) {
  const bool whole = vector && col + kEight <= N;
  if constexpr (sizeof(T) == 2) {
    if (inside && whole) {
      ptx::store_16(
          to + col,
          make_uint4(
              pack_two<T>(v[0], v[1]), pack_two<T>(v[2], v[3]), pack_two<T>(v[4], v[5]), pack_two<T>(v[6], v[7])));
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

// Of small products, before the large ones: infinity times a rest is NaN, or of the wrong sign. Where they aren't
// finite the large ones say it all.
__device__ __forceinline__ void keep_finite(float (&small)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) small[i] = fabsf(small[i]) < __int_as_float(0x7F800000) ? small[i] : 0.0f;
}

// split_tf32 of several, with the rest rounded too, by half of the last bit that tensor cores read. Of no rest they
// read 0. What isn't finite is rare: all are looked at together.
template <int kCount>
__device__ __forceinline__ void split_all(Tf32Pair (&to)[kCount], const float (&x)[kCount]) {
#if __CUDA_ARCH__ >= 800
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(to[i].high) : "f"(x[i]));
    const float high = __uint_as_float(to[i].high);
    finite = finite && fabsf(high) < __int_as_float(0x7F800000);
    to[i].low = __float_as_uint(x[i] - high) + 0x1000u;
  }
  if (finite) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    to[i] = split_tf32(x[i]);
    to[i].low += 0x1000u;
  }
#endif
}

// c += a·b of float32 numbers, in three products of TF32, or two where all of b is in TF32 already. Summed apart:
// tensor cores cut bits off what they add, the small products come first.
//   a [16, 8], b [8, 8], c [16, 8]: the fragments of multiply_tf32, of float32.
__device__ __forceinline__ void multiply_split(
    float (&c)[4], const Tf32Pair (&a)[4], const Tf32Pair (&b)[2], bool b_exact) {
  const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  const uint32_t low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  ptx::multiply_tf32(part, low, b[0].high, b[1].high);
  if (!b_exact) ptx::multiply_tf32(part, high, b[0].low, b[1].low);
  keep_finite(part);
  ptx::multiply_tf32(part, high, b[0].high, b[1].high);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += part[i];
}

}  // namespace lorafast::cuda
