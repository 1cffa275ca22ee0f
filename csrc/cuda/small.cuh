// What a small layer's forward and backward in one launch share: lora_linear.cu, lora_linear_backward.cu.
//
// A CTA has four warps with 16 rows each of a tile of 64. Blocks of its factors go through a ring of cp.async stages.
// What has r columns (s, ds) a warp has in registers, as accumulators of up to 64 ranks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "eight.cuh"
#include "numbers.cuh"
#include "ptx.cuh"
#include "tf32.cuh"

namespace lorafast::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;
constexpr int kMostRanks = 64;
constexpr int kRankTiles = kMostRanks / 8;
constexpr int kBlock = 128;         // bytes of a block, along the sum
constexpr int kPad = 8;             // elements between rows of r elements in shared memory, against bank conflicts
constexpr size_t kShared = 232448;  // bytes of a CTA, on the architecture that has most

// What s, ds and their factors are beside x of T.
template <class T>
using Beside = std::conditional_t<DtypeOf<T>::value == Dtype::bfloat16, bfloat16, float>;

// 16 bytes of a row whose elements are no neighbours, or aren't aligned: the first `bytes` of them, then zeros. All
// loads are under way at once.
template <int kSize>
__device__ __forceinline__ uint4 load_elements(const char* from, int64_t across, int bytes) {
  uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16 / kSize; ++i) {
    if (kSize * i >= bytes) continue;
    if constexpr (kSize == 4) word[i] = *reinterpret_cast<const uint32_t*>(from + i * across);
    else
      word[i / 2] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(from + i * across))
                     << (16 * (i % 2));
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// At most `left` groups of copies are under way when it returns.
__device__ __forceinline__ void wait_for_stage(int left) {
  switch (left) {
    case 0: return ptx::wait_for_copies<0>();
    case 1: return ptx::wait_for_copies<1>();
    default: return ptx::wait_for_copies<2>();
  }
}

// A float16 of two neighbours.
__device__ __forceinline__ float half_of(uint32_t two, int i) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(i == 0 ? two & 0xFFFFu : two >> 16)));
}

// Dropout of two 16-bit neighbours. float16 isn't scaled, which would round: its sum is.
template <class T>
__device__ __forceinline__ uint32_t drop_two(uint32_t two, uint32_t word, uint32_t below, float scale) {
  if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
    float first = __uint_as_float(two << 16) * scale, second = __uint_as_float(two & 0xFFFF0000u) * scale;
    if ((word << 16) <= below) first = 0.0f;
    if (word <= below) second = 0.0f;
    return pack_two<bfloat16>(first, second);
  } else {
    return two & (((word << 16) > below ? 0x0000FFFFu : 0u) | (word > below ? 0xFFFF0000u : 0u));
  }
}

__device__ __forceinline__ uint32_t drop_one(uint32_t one, uint32_t word, uint32_t below, float scale) {
  return word <= below ? 0u : __float_as_uint(__uint_as_float(one) * scale);
}

// s times a number. Ranks from r on are set to 0: infinity times the zeros of ranks that A hasn't is NaN.
__device__ __forceinline__ void scale_ranks(float (&s)[kRankTiles][4], int r, float scale) {
  const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 4 * kRankTiles; ++i) {
    const bool is = 8 * (i / 4) + 2 * lane + i % 2 < r;
    s[i / 4][i % 4] = is ? s[i / 4][i % 4] * scale : 0.0f;
  }
}

// s·Bᵀ of one n8 tile. s is rounded to its dtype first. Rows of B have `pitch` elements of Beside<T>; `exact`: all of
// them are in TF32.
template <class T>
__device__ __forceinline__ void multiply_low_rank(
    float (&low)[4], const float (&s)[kRankTiles][4], const char* rows, int r, int pitch, bool exact) {
  const int g = static_cast<int>(threadIdx.x % 32 / 4), lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) low[i] = 0.0f;
  const auto* const b = reinterpret_cast<const Beside<T>*>(rows) + g * pitch + 2 * lane;
  if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
#pragma unroll
    for (int two = 0; two < kRankTiles / 2; ++two) {
      if (16 * two >= r) break;
      const float (&left)[4] = s[2 * two], (&right)[4] = s[2 * two + 1];
      const uint32_t a[4] = {
          pack_two<T>(left[0], left[1]), pack_two<T>(left[2], left[3]), pack_two<T>(right[0], right[1]),
          pack_two<T>(right[2], right[3])};
      ptx::multiply_bf16(
          low, a, *reinterpret_cast<const uint32_t*>(b + 16 * two),
          *reinterpret_cast<const uint32_t*>(b + 16 * two + 8));
    }
  } else {
#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile) {
      if (8 * tile >= r) break;
      const float2 v = *reinterpret_cast<const float2*>(b + 8 * tile);
      const float all[6] = {v.x, v.y, s[tile][0], s[tile][2], s[tile][1], s[tile][3]};
      Tf32Parts of[6];
      split_all(of, all);
      const Tf32Parts pairs[2] = {of[0], of[1]}, a[4] = {of[2], of[3], of[4], of[5]};
      multiply_split(low, a, pairs, exact);
    }
  }
}

}  // namespace lorafast::cuda
