// Products of float32 on sm_75, whose tensor cores multiply float16 alone: no TF32, no bfloat16.
//
// float16 by float32: eight neighbours along the sum of a column of the float32 factor are scaled by a power of two, so
// that the largest is just below 2^15, and each is the sum of three float16, of 11 bits each. Three products have all of
// its 24 bits, if it isn't 2^16 times smaller than the largest of the eight. Where one has bits left, or anything isn't
// finite, the eight are multiplied in float32 without tensor cores: of numbers of a normal distribution that is one in a
// thousand of what an instruction multiplies. float32 by float32 is always.
//
// Sums are rounded to float32 after every eight terms: tensor cores cut bits off what they add.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "ptx.cuh"

namespace lorafast::cuda::sm75 {

constexpr uint32_t kAll = 0xFFFFFFFFu;

// Not 0 if one of the two float16 isn't finite: of an exponent of ones, one more carries into the sign's place.
__device__ __forceinline__ uint32_t not_finite(uint32_t two) {
  return ((two & 0x7C007C00u) + 0x04000400u) & 0x80008000u;
}

// A fragment of the left factor [16, 8] in float16, as ptx::multiply_f16 has it.
struct Half {
  uint32_t a[2];

  // All that this lane has of it.
  __device__ __forceinline__ bool finite() const { return (not_finite(a[0]) | not_finite(a[1])) == 0; }
};

// The same in float32: rows g and g + 8 in whole, of elements (0, 4, 1, 5, 2, 6, 3, 7) of the fragment of
// ptx::multiply_tf32.
struct Float {
  float x[2][8];

  __device__ __forceinline__ void take(const uint32_t (&a)[4]) {
    const int quad = static_cast<int>(threadIdx.x) & 28;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i % 2][2 * j + i / 2] = __uint_as_float(__shfl_sync(kAll, a[i], quad + j));
  }
};

// c += x·b of elements j of both halves of the eight: x [2][2] are this lane's two rows, b0 and b1 a fragment.
__device__ __forceinline__ void add_by_fma(float (&c)[4], const float (&x)[2][2], float b0, float b1, int j) {
  const int column =
      8 * (static_cast<int>(threadIdx.x) & 3) + j;  // of the lane that has the first of this lane's two
  const float b[2][2] = {
      {__shfl_sync(kAll, b0, column), __shfl_sync(kAll, b1, column)},
      {__shfl_sync(kAll, b0, column + 4), __shfl_sync(kAll, b1, column + 4)}};
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int k = 0; k < 2; ++k) c[i] = fmaf(x[i / 2][k], b[i % 2][k], c[i]);
}

// c += a·b in float32.
__device__ __forceinline__ void multiply(float (&c)[4], const Float& a, float b0, float b1) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float x[2][2] = {{a.x[0][2 * j], a.x[0][2 * j + 1]}, {a.x[1][2 * j], a.x[1][2 * j + 1]}};
    add_by_fma(c, x, b0, b1, j);
  }
}

__device__ __forceinline__ void multiply_by_fma(float (&c)[4], const Half& a, float b0, float b1) {
  const int quad = static_cast<int>(threadIdx.x) & 28;
#pragma unroll 1
  for (int j = 0; j < 4; ++j) {
    float x[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t two = __shfl_sync(kAll, a.a[i], quad + j);
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&two));
      x[i][0] = both.x;
      x[i][1] = both.y;
    }
    add_by_fma(c, x, b0, b1, j);
  }
}

// Eight neighbours of the float32 factor as three float16 each, high + low + last, times `inverse`, a power of two. It
// is negative where that isn't all.
struct Split {
  uint4 high, low, last;
  float inverse;
};

// Eight float32 to float16; what is left of them stays.
__device__ __forceinline__ uint4 take_halves(float (&v)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 two = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
    const float2 taken = __half22float2(two);
    v[2 * i] -= taken.x;
    v[2 * i + 1] -= taken.y;
    words[i] = *reinterpret_cast<const uint32_t*>(&two);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ Split split(const float (&eight)[8]) {
  uint32_t most = 15u << 23;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = max(most, __float_as_uint(eight[i]) & 0x7FFFFFFFu);
  // Both the scale, 2^(14 - exponent), and its inverse are normal numbers. Of what is smaller 2^-23 is the last bit.
  const uint32_t exponent = most & 0x7F800000u;
  const float scale = __uint_as_float((268u << 23) - exponent), inverse = __uint_as_float(exponent - (14u << 23));
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = eight[i] * scale;
  Split to;
  to.high = take_halves(v);
  to.low = take_halves(v);
  to.last = take_halves(v);
  bool is_all = true;  // not of infinity, which leaves NaN
#pragma unroll
  for (int i = 0; i < 8; ++i) is_all = is_all && v[i] == 0.0f;
  to.inverse = is_all ? inverse : -inverse;
  return to;
}

// c += a·b of a pair (2t, 2t + 1) of column g in three parts. `inverse`: those of this lane's two columns of c.
__device__ __forceinline__ void multiply(
    float (&c)[4], const Half& a, uint32_t high, uint32_t low, uint32_t last, float2 inverse) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  ptx::multiply_f16(part, a.a, last);
  ptx::multiply_f16(part, a.a, low);
  ptx::multiply_f16(part, a.a, high);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = fmaf(part[i], i % 2 == 0 ? inverse.x : inverse.y, c[i]);
}

// c += a·1
__device__ __forceinline__ void add_ones(float (&c)[4], const Half& a) {
  ptx::multiply_f16(c, a.a, 0x3C003C00u);  // 1 and 1
}

__device__ __forceinline__ void add_ones(float (&c)[4], const Float& a) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) c[i] += a.x[i / 2][j];
}

}  // namespace lorafast::cuda::sm75
