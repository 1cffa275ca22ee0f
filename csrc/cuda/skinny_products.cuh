// How an element of the skinny operations is multiplied: fragments of X, and their products with the factors beside it.
//
// bfloat16 is multiplied as such, P and Q rounded to it. float16 and float32 are multiplied as TF32: the float32
// factors as three numbers each, the sum of a tile apart from the total, since tensor cores cut bits off long sums.
#pragma once

#include "numbers.cuh"
#include "ptx.cuh"
#include "tf32.cuh"

namespace lorafast::cuda {

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

  // Four elements of X for products with float32 factors.
  static __device__ __forceinline__ void split(Tf32Parts (&to)[4], const uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[i] = kSubsteps == 2 ? whole_tf32(__uint_as_float(a[i])) : split_in_three(__uint_as_float(a[i]));
  }

  // large + small += a·b
  static __device__ __forceinline__ void add(
      float (&large)[4], float (&small)[4], const Tf32Parts (&a)[4], uint32_t b0, uint32_t b1) {
    const Tf32Parts first = split_in_three(__uint_as_float(b0)), second = split_in_three(__uint_as_float(b1));
    add_small<kSubsteps == 2, false>(small, a, first, second);
    add_large(large, a, first, second);
  }

  // large + small += a·1
  static __device__ __forceinline__ void add_ones(float (&large)[4], float (&small)[4], const Tf32Parts (&a)[4]) {
    constexpr uint32_t kOne = 0x3F800000u;
    if constexpr (kSubsteps == 1) {
      const uint32_t last[4] = {a[0].last, a[1].last, a[2].last, a[3].last};
      const uint32_t low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
      ptx::multiply_tf32(small, last, kOne, kOne);
      ptx::multiply_tf32(small, low, kOne, kOne);
    }
    const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
    ptx::multiply_tf32(large, high, kOne, kOne);
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
