// The products of a warp in a small layer's backward: 16 rows of one factor, in registers, by columns of the other.
//
// Second factors lie in shared memory as they do in memory, rows along the sum, and are transposed when they are read.
#pragma once

#include <cstdint>

#include "numbers.cuh"
#include "ptx.cuh"
#include "small.cuh"
#include "tf32.cuh"

namespace lorafast::cuda {

// The first factor of a warp's products of a block: 16 rows, 128 bytes along the sum in four steps.
template <class T>
struct FirstFactor {
  uint32_t of[4][4];
};
template <>
struct FirstFactor<float> {
  Tf32Parts of[4][4];
};

// The fragment of a step; float32 is split.
template <class T>
__device__ __forceinline__ void set_step(FirstFactor<T>& a, int step, const uint32_t (&raw)[4]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.of[step][i] = raw[i];
  } else {
    const float v[4] = {
        __uint_as_float(raw[0]), __uint_as_float(raw[1]), __uint_as_float(raw[2]), __uint_as_float(raw[3])};
    split_all(a.of[step], v);
  }
}

// c += a·b of the block for 16-bit numbers: `columns` are 16 of b [block, …], of two n8 tiles.
template <class T>
__device__ __forceinline__ void multiply_two(
    float (&first)[4], float (&second)[4], const FirstFactor<T>& a, const char* columns, int pitch) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const char* const at = columns + (lane & 15) * pitch + (lane >> 4) * 16;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t b[4];
    ptx::load_matrices_transposed(b, at + 16 * step * pitch);
    if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
      ptx::multiply_bf16(first, a.of[step], b[0], b[1]);
      ptx::multiply_bf16(second, a.of[step], b[2], b[3]);
    } else {
      ptx::multiply_f16(first, a.of[step], b[0], b[1]);
      ptx::multiply_f16(second, a.of[step], b[2], b[3]);
    }
  }
}

// The same for float32 columns, 8 of them. Of a float16 each number is in TF32 already; a bfloat16 is multiplied by
// rounded ones. Sums in TF32 are apart from c, small products first.
template <class T>
__device__ __forceinline__ void multiply_one(
    float (&c)[4], const FirstFactor<T>& a, const char* columns, int pitch) {
  const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
  const auto number = [&](int row) { return *reinterpret_cast<const float*>(columns + row * pitch + 4 * g); };
  if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int row = 16 * step + 2 * t;
      ptx::multiply_bf16(
          c, a.of[step], pack_two<T>(number(row), number(row + 1)), pack_two<T>(number(row + 8), number(row + 9)));
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int two = 0; two < 2; ++two) {
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f}, v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = number(16 * two + 4 * i + t);
      Tf32Parts b[4];
      split_all(b, v);
#pragma unroll
      for (int i = 0; i < 2; ++i) add_small<false, false>(part, a.of[2 * two + i], b[2 * i], b[2 * i + 1]);
      keep_finite(part);
#pragma unroll
      for (int i = 0; i < 2; ++i) add_large(part, a.of[2 * two + i], b[2 * i], b[2 * i + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] += part[i];
    }
  } else {
    // Halves 2t and 2t + 1 of eight are elements t and t + 4 of a product in TF32.
#pragma unroll
    for (int two = 0; two < 2; ++two) {
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f}, v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = number(32 * two + 8 * (i / 2) + 2 * t + i % 2);
      Tf32Parts b[8];
      split_all(b, v);
#pragma unroll
      for (int small = 1; small >= 0; --small) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t (&of)[4] = a.of[2 * two + i / 2];
          const uint32_t up = of[2 * (i % 2)], down = of[2 * (i % 2) + 1];
          const Tf32Parts x[4] = {
              whole_tf32(half_of(up, 0)), whole_tf32(half_of(down, 0)), whole_tf32(half_of(up, 1)),
              whole_tf32(half_of(down, 1))};
          if (small) add_small<true, false>(part, x, b[2 * i], b[2 * i + 1]);
          else add_large(part, x, b[2 * i], b[2 * i + 1]);
        }
        if (small) keep_finite(part);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] += part[i];
    }
  }
}

// Exchanges the words of a quad so that lane t has those of place t, of lanes 0 to 3.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
  const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (t & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, upper ? word[i] : word[i + bit], bit);
      if (upper) word[i] = other;
      else word[i + bit] = other;
    }
  }
}

}  // namespace lorafast::cuda
