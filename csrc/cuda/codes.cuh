// The codes that a quantized weight W [N, K] is stored in, and their scales, as lorafast/operands has them. Elements
// are counted row by row, and so are blocks: one may straddle rows.
//
//   W[i] = number(code[i]) · scale of i,  in float32, rounded to the dtype that W is stored for, then to T
//
// Of each kind of code: load(i) and load_scale(i) ask memory for what finish() and unpack() make numbers of, so that
// several can be in flight.
#pragma once

#include "numbers.cuh"

namespace lorafast::cuda {

enum class Scales : int32_t { plain, nested, exponents, one, rows, blocks };

// n / by for numbers that aren't negative: by a shift where `by` is a power of two, else by the upper word of a product
// with floor(2^64 / by) + 1, which is the quotient or one more. nvcc would call a function.
struct Divisor {
  int64_t by;
  uint64_t reciprocal;
  int32_t shift;  // -1 if there is none

#ifdef __CUDACC__
  __device__ __forceinline__ int64_t quotient(int64_t n) const {
    if (shift >= 0) return n >> shift;
    const int64_t most = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n), reciprocal));
    return most * by > n ? most - 1 : most;
  }
#endif
};

#ifdef __CUDACC__

// What W is rounded to before it is rounded to T.
__device__ __forceinline__ float rounded(float w, Dtype stored) {
  switch (stored) {
    case Dtype::bfloat16: return to_float(from_float<bfloat16>(w));
    case Dtype::float16: return to_float(from_float<float16>(w));
    default: return w;
  }
}

#endif

// Codes of 4 bits, two a byte, by a table of 16 numbers; scales of blocks: float32, or 8-bit codes with scales of their
// own (`nested`), or exponents of 2.
struct FourBit {
  static constexpr int kBits = 4, kNumbers = 16, kScaleNumbers = 256;

  const uint8_t* codes;
  const float* numbers;
  const void* scales;                                   // float32, or a byte each
  const float *of_scales, *numbers_of_scales, *offset;  // nested
  Divisor block, nested_block;
  Scales kind;
  Dtype stored;
  bool low_first;  // whether the first of two codes is the lower half of their byte

#ifdef __CUDACC__
  // A scale that is asked for.
  struct Asked {
    float number;   // it, or what its code is multiplied by
    uint32_t code;  // if it has one
  };

  __device__ __forceinline__ Asked load_scale(int64_t i) const {
    const int64_t of = block.quotient(i);
    if (kind == Scales::plain) return {__ldg(static_cast<const float*>(scales) + of), 0u};
    const uint32_t code = __ldg(static_cast<const uint8_t*>(scales) + of);
    return {kind == Scales::nested ? __ldg(of_scales + nested_block.quotient(of)) : 0.0f, code};
  }

  __device__ __forceinline__ float finish(const Asked& asked) const { return finish(asked, nullptr); }

  // `at_hand`: the 256 numbers that codes of nested scales are of, and the offset, if they are at hand. Both roundings
  // of a nested scale are the definition's.
  __device__ __forceinline__ float finish(const Asked& asked, const float* at_hand) const {
    if (kind == Scales::plain) return asked.number;
    if (kind == Scales::nested) {
      const float number = at_hand == nullptr ? __ldg(numbers_of_scales + asked.code) : at_hand[asked.code];
      const float more = at_hand == nullptr ? __ldg(offset) : at_hand[kScaleNumbers];
      return __fadd_rn(__fmul_rn(number, asked.number), more);
    }
    // 2^-127 is not normal, 255 is NaN.
    const uint32_t ends = asked.code == 0 ? 1u << 22 : asked.code == 255 ? 1u << 22 : 0u;
    return __uint_as_float((asked.code << 23) | ends);
  }

  __device__ __forceinline__ bool varies_in_rows() const { return true; }

  __device__ __forceinline__ uint32_t code(int64_t i) const {
    const uint32_t byte = __ldg(codes + i / 2), first = low_first ? 0u : 4u;
    return (byte >> ((i & 1) != 0 ? 4u - first : first)) & 15u;
  }

  // Eight codes in a word, the first in its lowest bits.
  __device__ __forceinline__ uint32_t in_order(uint32_t word) const {
    return low_first ? word : ((word & 0x0F0F0F0Fu) << 4) | ((word >> 4) & 0x0F0F0F0Fu);
  }

  // `table`: the numbers, in shared memory: 16 words in as many banks, of which lanes may have the same.
  static __device__ __forceinline__ float number(uint32_t code, const float* table) { return table[code]; }
  // Number j of a word that is in_order.
  static __device__ __forceinline__ float number_of(uint32_t word, int j, const float* table) {
    return table[(word >> (4 * j)) & 15u];
  }
#endif
};

// Codes of 8 bits: integers, or floats e4m3 without infinities; a scale of W, of each row, or of blocks of rows and
// columns, each times `unit`.
struct EightBit {
  static constexpr int kBits = 8, kNumbers = 0, kScaleNumbers = 0;

  const uint8_t* codes;
  const float* scales;
  Divisor columns, block_rows, block_columns;  // of W; of a block
  int64_t blocks_across;
  float unit;
  Scales kind;
  Dtype stored;
  bool integers;

#ifdef __CUDACC__
  struct Asked {
    float number;
  };

  __device__ __forceinline__ Asked load_scale(int64_t i) const {
    int64_t of = 0;
    if (kind != Scales::one) of = columns.quotient(i);
    if (kind == Scales::blocks) {
      const int64_t column = i - of * columns.by;
      of = block_rows.quotient(of) * blocks_across + block_columns.quotient(column);
    }
    return {__ldg(scales + of)};
  }

  __device__ __forceinline__ float finish(const Asked& asked) const { return __fmul_rn(asked.number, unit); }
  __device__ __forceinline__ float finish(const Asked& asked, const float*) const { return finish(asked); }
  __device__ __forceinline__ bool varies_in_rows() const { return kind == Scales::blocks; }

  __device__ __forceinline__ uint32_t code(int64_t i) const { return __ldg(codes + i); }
  __device__ __forceinline__ uint32_t in_order(uint32_t word) const { return word; }

  __device__ __forceinline__ float number(uint32_t code, const float*) const {
    if (integers) return static_cast<float>(static_cast<int32_t>(code << 24) >> 24);
    return float_of(code);
  }

  static __device__ __forceinline__ float float_of(uint32_t code) {
    // The bits of e4m3 at their place in float32, whose exponents are 120 more: subnormal ones come right too.
    const float small = __uint_as_float(((code & 0x80u) << 24) | ((code & 0x7Fu) << 20));
    const float value = small * 0x1p120f;
    return (code & 0x7Fu) == 0x7Fu ? __uint_as_float(0x7FC00000u) : value;
  }

  __device__ __forceinline__ float number_of(uint32_t word, int j, const float* table) const {
    return number((word >> (8 * j)) & 0xFFu, table);
  }

  // The four numbers of a word. An integer and 128, behind the exponent of 2^23, is that much more.
  static __device__ __forceinline__ void integers_of(float (&to)[4], uint32_t word) {
    const uint32_t more = word ^ 0x80808080u;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      to[j] = __uint_as_float(ptx::permute(more, 0x4B000000u, 0x7540u + j)) - 8388736.0f;
    }
  }

  static __device__ __forceinline__ void floats_of(float (&to)[4], uint32_t word) {
#if __CUDA_ARCH__ >= 890
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t halves = ptx::to_halves(j == 0 ? word : word >> 16);
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&halves));
      to[j] = two.x, to[j + 1] = two.y;
    }
#else
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = float_of((word >> (8 * j)) & 0xFFu);
#endif
  }
#endif
};

#ifdef __CUDACC__

// The table of a CTA of at least kNumbers threads; whoever reads it waits for a barrier first.
template <class Codes>
__device__ __forceinline__ void load_numbers(float* table, const Codes& codes) {
  if constexpr (Codes::kNumbers > 0) {
    if (threadIdx.x < Codes::kNumbers) table[threadIdx.x] = __ldg(codes.numbers + threadIdx.x);
  }
}

#endif

}  // namespace lorafast::cuda
