// Products of float32 on sm_75, whose tensor cores multiply float16 alone: no TF32, no bfloat16.
//
// float16 by float32: eight neighbours along the sum of a column of the float32 factor are scaled by a power of two, so
// that the largest is just below 2^15, and each is the sum of three float16, of 11 bits each. Three products have all of
// its 24 bits, if it isn't 2^16 times smaller than the largest of the eight. Where one has bits left, or anything isn't
// finite, the eight are multiplied in float32 without tensor cores: for numbers of a normal distribution that is one
// step in a thousand. float32 by float32 is always.
//
// Sums are rounded to float32 after every eight terms: tensor cores cut bits off what they add.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "ptx.cuh"

namespace lorafast::cuda::sm75 {

constexpr uint32_t kAll = 0xFFFFFFFFu;

// A fragment of the left factor [16, 8] in float16, as ptx::multiply_f16 has it; `finite`: all that this lane has.
struct Half {
  uint32_t a[2];
  bool finite;

  __device__ __forceinline__ void take(uint32_t upper, uint32_t lower) {
    a[0] = upper;
    a[1] = lower;
    // Of an exponent of ones, one more than that carries into the sign's place.
    const uint32_t carried = ((upper & 0x7C007C00u) + 0x04000400u) | ((lower & 0x7C007C00u) + 0x04000400u);
    finite = (carried & 0x80008000u) == 0;
  }
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

// Two float32 to float16; what is left of them stays.
__device__ __forceinline__ uint32_t take_halves(float& first, float& second) {
  const __half2 two = __floats2half2_rn(first, second);
  const float2 taken = __half22float2(two);
  first -= taken.x;
  second -= taken.y;
  return *reinterpret_cast<const uint32_t*>(&two);
}

// c += a·b: b0 and b1 are the pair (2t, 2t + 1) of column g.
__device__ __forceinline__ void multiply(float (&c)[4], const Half& a, float b0, float b1) {
  uint32_t most = max(__float_as_uint(b0) & 0x7FFFFFFFu, __float_as_uint(b1) & 0x7FFFFFFFu);
  most = max(most, __shfl_xor_sync(kAll, most, 1));
  most = max(most, __shfl_xor_sync(kAll, most, 2));
  // Both the scale, 2^(14 - exponent), and its inverse are normal numbers. Of what is smaller 2^-23 is the last bit.
  const uint32_t exponent = max(most, 15u << 23) & 0x7F800000u;
  const float scale = __uint_as_float((268u << 23) - exponent), inverse = __uint_as_float(exponent - (14u << 23));
  float first = b0 * scale, second = b1 * scale;
  const uint32_t high = take_halves(first, second), low = take_halves(first, second);
  const uint32_t last = take_halves(first, second);
  if (__all_sync(kAll, a.finite && first == 0.0f && second == 0.0f)) {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    ptx::multiply_f16(part, a.a, last);
    ptx::multiply_f16(part, a.a, low);
    ptx::multiply_f16(part, a.a, high);
    const int column = 8 * (static_cast<int>(threadIdx.x) & 3);
    const float inverses[2] = {__shfl_sync(kAll, inverse, column), __shfl_sync(kAll, inverse, column + 4)};
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = fmaf(part[i], inverses[i % 2], c[i]);
  } else {
    multiply_by_fma(c, a, b0, b1);
  }
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
