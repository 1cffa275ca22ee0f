// The dropout mask: a function of (seed, row, column). lorafast/reference/dropout.py defines it.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace lorafast::cuda {

// What a kernel is told of a mask; without one `seed` is null.
struct Dropout {
  const int64_t* seed;
  int64_t groups;     // calls of Philox a row: its columns over 8, rounded up
  int32_t threshold;  // half-words below it are dropped
  float survivor_scale;
};

// Philox 4x32 with 7 rounds, of one counter: eight half-words, half-word h of word h / 2 first the low one.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint2 p0 = ptx::multiply_wide(c0, 0xD2511F53u), p1 = ptx::multiply_wide(c2, 0xCD9E8D57u);
    c0 = p1.y ^ c1 ^ k0;
    c1 = p1.x;
    c2 = p0.y ^ c3 ^ k1;
    c3 = p0.x;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Which of the two columns of a word are kept: bit 0 is the low half-word's.
__device__ __forceinline__ uint32_t keep_two(uint32_t word, uint32_t threshold) {
  return ((word & 0xFFFFu) >= threshold ? 1u : 0u) | ((word >> 16) >= threshold ? 2u : 0u);
}

// Which of the columns 8·group to 8·group + 7 of a row are kept: bit j is column 8·group + j.
__device__ __forceinline__ uint32_t keep_bits(const Dropout& dropout, uint64_t seed, int64_t row, int64_t group) {
  const uint4 words = philox(seed, static_cast<uint64_t>(row * dropout.groups + group));
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  const uint32_t threshold = static_cast<uint32_t>(dropout.threshold);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // by keep_two linear_expand has no registers left on sm_120
    bits |= ((word[i] & 0xFFFFu) >= threshold ? 1u : 0u) << (2 * i);
    bits |= ((word[i] >> 16) >= threshold ? 1u : 0u) << (2 * i + 1);
  }
  return bits;
}

}  // namespace lorafast::cuda
