// Products of float32 on tensor cores, which multiply numbers of TF32: float32 with 11 of its 24 bits. A float32 is the
// sum of three of those.
//
// Of (high + low + last)·(high + low + last) TF32 products give high·high, low·high and high·low. What else counts is
// low·low, last·high and high·last: less than 2^-19 of the whole, so that 8 bits of each factor are enough, and
// bfloat16 has them at half the cost. What is left out is less than 2^-25. Without the last bits a sum of one term
// would be off by up to two units in its last place, without low·low by four.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace lorafast::cuda {

// The first is cut off, as are tensor cores' operands; the last has three bits at most. What isn't finite has NaN for
// a rest.
struct Tf32Parts {
  uint32_t high, low, last;
};

__device__ __forceinline__ Tf32Parts split_in_three(float x) {
  constexpr uint32_t kRead = 0xFFFFE000u;  // of a word, in TF32
  x += 0.0f;                               // of a NaN all bits may lie beyond; of a sum they don't
  const uint32_t high = __float_as_uint(x) & kRead;
  const float rest = x - __uint_as_float(high);
  const uint32_t low = __float_as_uint(rest) & kRead;
  return {high, low, __float_as_uint(rest - __uint_as_float(low))};
}

// A number that TF32 holds, such as a float16.
__device__ __forceinline__ Tf32Parts whole_tf32(float x) { return {__float_as_uint(x), 0u, 0u}; }

template <int kCount>
__device__ __forceinline__ void split_all(Tf32Parts (&to)[kCount], const float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = split_in_three(x[i]);
}

// Two float32 as bfloat16, cut off: nothing becomes infinite.
__device__ __forceinline__ uint32_t upper_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

// small += a·b without the product of the high parts. Of an exact factor there is no other part.
//   a [16, 8], b [8, 8]: the fragments of multiply_tf32. In those of bfloat16, which have twice as many places along
//   the sum, a lane has the same elements, of one part behind another.
template <bool kExactA, bool kExactB>
__device__ __forceinline__ void add_small(
    float (&small)[4], const Tf32Parts* a, const Tf32Parts& b0, const Tf32Parts& b1) {
  const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  if constexpr (!kExactA) {
    const uint32_t low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
    ptx::multiply_tf32(small, low, b0.high, b1.high);
  }
  if constexpr (!kExactB) ptx::multiply_tf32(small, high, b0.low, b1.low);
  if constexpr (!kExactA && !kExactB) {
    const uint32_t two[4] = {
        upper_halves(a[0].high, a[2].high), upper_halves(a[1].high, a[3].high), upper_halves(a[0].low, a[2].low),
        upper_halves(a[1].low, a[3].low)};
    ptx::multiply_bf16(small, two, upper_halves(b0.last, b1.last), upper_halves(b0.low, b1.low));
  } else if constexpr (!kExactB) {
    const uint32_t one[2] = {upper_halves(a[0].high, a[2].high), upper_halves(a[1].high, a[3].high)};
    ptx::multiply_bf16(small, one, upper_halves(b0.last, b1.last));
  }
  if constexpr (!kExactA) {
    const uint32_t one[2] = {upper_halves(a[0].last, a[2].last), upper_halves(a[1].last, a[3].last)};
    ptx::multiply_bf16(small, one, upper_halves(b0.high, b1.high));
  }
}

// large += a·b of the high parts.
__device__ __forceinline__ void add_large(
    float (&large)[4], const Tf32Parts* a, const Tf32Parts& b0, const Tf32Parts& b1) {
  const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  ptx::multiply_tf32(large, high, b0.high, b1.high);
}

// Of small products, before the large ones: infinity times a rest is NaN, or of the wrong sign. Where they aren't
// finite the large ones say it all.
__device__ __forceinline__ float if_finite(float x) { return fabsf(x) < __uint_as_float(0x7F800000u) ? x : 0.0f; }

__device__ __forceinline__ void keep_finite(float (&small)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) small[i] = if_finite(small[i]);
}

// c += a·b. Summed apart: tensor cores cut bits off what they add, the small products come first. `b_exact`: TF32
// holds all of b.
__device__ __forceinline__ void multiply_split(
    float (&c)[4], const Tf32Parts (&a)[4], const Tf32Parts (&b)[2], bool b_exact) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (b_exact) add_small<false, true>(part, a, b[0], b[1]);
  else add_small<false, false>(part, a, b[0], b[1]);
  keep_finite(part);
  add_large(part, a, b[0], b[1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += part[i];
}

}  // namespace lorafast::cuda
