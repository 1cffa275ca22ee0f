// How an element of the skinny operations is multiplied: fragments of X, and their products with the factors beside it.
//
// bfloat16 is multiplied as such, P and Q rounded to it. float16 and float32 are multiplied as TF32: the float32
// factors as two numbers each, the sum of a tile apart from the total, since tensor cores cut bits off long sums.
#pragma once

#include "numbers.cuh"
#include "ptx.cuh"

namespace lorafast::cuda {

// Where an infinity meets the rest of a factor the small half of a sum is no number; the large half says it all.
__device__ __forceinline__ float if_finite(float x) { return fabsf(x) < __uint_as_float(0x7F800000u) ? x : 0.0f; }

// How a T is multiplied. A fragment of X is four registers of 32 bytes of a row: kSubsteps of the instruction.
template <class T>
struct Products {
  static constexpr bool kTf32 = DtypeOf<T>::value != Dtype::bfloat16;
  static constexpr int kSubsteps = DtypeOf<T>::value == Dtype::float16 ? 2 : 1;

  // The instruction's fragment of X. float16 becomes float32; a pair of neighbours along the sum, (2t, 2t + 1) of
  // eight, are its elements t and t + 4, so P and Q are read in that order.
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&raw)[4], int substep) {
    if constexpr (kSubsteps == 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const __half2 pair = *reinterpret_cast<const __half2*>(&raw[2 * substep + i]);
        a[i] = __float_as_uint(__low2float(pair));
        a[2 + i] = __float_as_uint(__high2float(pair));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = raw[i];
    }
  }

  // large + small += a·b
  static __device__ __forceinline__ void add(
      float (&large)[4], float (&small)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (!kTf32) {
      ptx::multiply_bf16(large, a, b0, b1);
    } else {
      const Tf32Pair first = split_tf32(__uint_as_float(b0)), second = split_tf32(__uint_as_float(b1));
      if constexpr (kSubsteps == 2) {
        ptx::multiply_tf32(small, a, first.low, second.low);
        ptx::multiply_tf32(large, a, first.high, second.high);
      } else {
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Tf32Pair of = split_tf32(__uint_as_float(a[i]));
          high[i] = of.high;
          low[i] = of.low;
        }
        ptx::multiply_tf32(small, low, first.high, second.high);
        ptx::multiply_tf32(small, high, first.low, second.low);
        ptx::multiply_tf32(large, high, first.high, second.high);
      }
    }
  }

  // sum += a·1. A float32 is the sum of three numbers of TF32.
  static __device__ __forceinline__ void add_ones(float (&sum)[4], const uint32_t (&a)[4]) {
    if constexpr (!kTf32) {
      ptx::multiply_bf16(sum, a, 0x3F803F80u, 0x3F803F80u);
    } else if constexpr (kSubsteps == 2) {
      ptx::multiply_tf32(sum, a, 0x3F800000u, 0x3F800000u);
    } else {
      uint32_t part[3][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Tf32Pair of = split_tf32(__uint_as_float(a[i])), rest = split_tf32(__uint_as_float(of.low));
        part[2][i] = of.high;
        part[1][i] = rest.high;
        part[0][i] = rest.low;
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) ptx::multiply_tf32(sum, part[i], 0x3F800000u, 0x3F800000u);
    }
  }
};

template <int kCount>
__device__ __forceinline__ void clear(float (&sums)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
}

}  // namespace lorafast::cuda
