// The factors of a low-rank term as wgmma multiplies them: 16 bytes of s and of B, rounded or split.
//
// float16 has a float32 s. It is multiplied as TF32, in two products, three beside a float32 B: in as many steps.
#pragma once

#include "sm90_ring.cuh"
#include "tf32.cuh"

namespace lorafast::cuda {

// How the low-rank term of y in T is multiplied: 128 bytes of ranks a step.
template <class T>
using Sm90Factor = std::conditional_t<DtypeOf<T>::value == Dtype::bfloat16, bfloat16, float>;
template <class T>
constexpr int kSm90Ranks = kSm90Row / static_cast<int>(sizeof(Sm90Factor<T>));

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Those of y in T.
template <class T>
struct Sm90Factors {
  using Factor = Sm90Factor<T>;
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(Factor));  // ranks

  const Sm90Params& p;

  // Products of 32 bytes of ranks, from `rank` on to the end of its step.
  __device__ __forceinline__ int substeps(int rank) const {
    const int left = p.r - rank, of = left < kSm90Ranks<T> ? left : kSm90Ranks<T>;
    return (of + 2 * kChunk - 1) / (2 * kChunk);
  }

  // 16 bytes of s and of B. Ranks that there aren't are 0. Of TF32 the last part is the nearest numbers, those before it
  // have one factor's rest; there the other factor is 0 where it is infinite: the last part says it all.
  __device__ __forceinline__ uint4 s_chunk(int64_t row, int rank, int part) const {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row >= p.M || rank >= p.r) return v;
    if constexpr (std::is_same_v<Factor, bfloat16>) {
      const auto* const from = static_cast<const uint16_t*>(p.s) + row * p.s_row;
      if (p.vector_s) return *reinterpret_cast<const uint4*>(from + rank);
      uint32_t* const words = &v.x;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (rank + i < p.r) words[i / 2] |= static_cast<uint32_t>(from[(rank + i) * p.s_col]) << (16 * (i % 2));
      }
    } else {
      const auto* const from = static_cast<const float*>(p.s) + row * p.s_row;
      uint32_t* const words = &v.x;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (rank + i >= p.r) break;
        const Tf32Pair of = split_tf32(from[(rank + i) * p.s_col] * p.factor_scale);
        words[i] = part == 0 ? of.low : part == p.parts - 1 ? of.high : finite(of.high);
      }
    }
    return v;
  }

  __device__ __forceinline__ uint4 b_chunk(int64_t column, int rank, int part) const {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (column >= p.N || rank >= p.r) return v;
    uint32_t* const words = &v.x;
    if constexpr (std::is_same_v<Factor, bfloat16>) {
      if (p.vector_b) {
        v = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.b) + column * p.b_row + rank);
        if (p.factor_scale == 1.0f) return v;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = two(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xFFFF0000u));
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = two(b_at(column, rank + 2 * i), b_at(column, rank + 2 * i + 1));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const Tf32Pair of = split_tf32(b_at(column, rank + i));
        words[i] = part == p.parts - 1 ? of.high : part == 0 ? finite(of.high) : of.low;
      }
    }
    return v;
  }

  __device__ __forceinline__ float b_at(int64_t column, int rank) const {
    return rank < p.r ? load_as_float(p.b, column * p.b_row + rank * p.b_col, p.b_type) : 0.0f;
  }

  __device__ __forceinline__ uint32_t two(float low, float high) const {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low * p.factor_scale, high * p.factor_scale);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }

  static __device__ __forceinline__ uint32_t finite(uint32_t x) {
    return fabsf(__uint_as_float(x)) < __uint_as_float(0x7F800000u) ? x : 0u;
  }
};

#endif

}  // namespace lorafast::cuda
