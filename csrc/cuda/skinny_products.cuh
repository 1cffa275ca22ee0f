// How an element of the skinny operations is multiplied: fragments of X, and their products with the factors beside it.
//
// bfloat16 is multiplied as such, P and Q rounded to it. float16 and float32 are multiplied as TF32: the float32
// factors as three numbers each, the sum of a tile apart from the total, since tensor cores cut bits off long sums. On
// sm_75 they are multiplied as sm75.cuh has it: float32 here, float16 by skinny_sums.cuh.
#pragma once

#include <type_traits>

#include "numbers.cuh"
#include "ptx.cuh"
#include "sm75.cuh"
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

  // A fragment of X for products with float32 factors. On sm_75 X is float32 too.
  struct Tf32 {
    Tf32Parts parts[4];
  };
  using Left = std::conditional_t<kSm80, Tf32, sm75::Float>;

  static __device__ __forceinline__ void take(Left& to, const uint32_t (&raw)[4], int substep) {
    if constexpr (kSm80) {
      uint32_t a[4];
      fragment(a, raw, substep);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to.parts[i] = kSubsteps == 2 ? whole_tf32(__uint_as_float(a[i])) : split_in_three(__uint_as_float(a[i]));
    } else {
      to.take(raw);
    }
  }

  // large + small += a·b
  static __device__ __forceinline__ void add(
      float (&large)[4], float (&small)[4], const Left& a, uint32_t b0, uint32_t b1) {
    if constexpr (kSm80) {
      const Tf32Parts first = split_in_three(__uint_as_float(b0)), second = split_in_three(__uint_as_float(b1));
      add_small<kSubsteps == 2, false>(small, a.parts, first, second);
      add_large(large, a.parts, first, second);
    } else {
      sm75::multiply(large, a, __uint_as_float(b0), __uint_as_float(b1));
    }
  }

  // large + small += a·1
  static __device__ __forceinline__ void add_ones(float (&large)[4], float (&small)[4], const Left& a) {
    if constexpr (kSm80) {
      constexpr uint32_t kOne = 0x3F800000u;
      const Tf32Parts(&parts)[4] = a.parts;
      if constexpr (kSubsteps == 1) {
        const uint32_t last[4] = {parts[0].last, parts[1].last, parts[2].last, parts[3].last};
        const uint32_t low[4] = {parts[0].low, parts[1].low, parts[2].low, parts[3].low};
        ptx::multiply_tf32(small, last, kOne, kOne);
        ptx::multiply_tf32(small, low, kOne, kOne);
      }
      const uint32_t high[4] = {parts[0].high, parts[1].high, parts[2].high, parts[3].high};
      ptx::multiply_tf32(large, high, kOne, kOne);
    } else {
      sm75::add_ones(large, a);
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
