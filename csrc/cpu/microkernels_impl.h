// The body of microkernels_<set>.cpp, which defines LORAFAST_SET (its name) and LORAFAST_ROWS (how many rows
// of accumulators, of kLanes floats or two times that, its registers hold), and is compiled for its instructions.
//
// Written with the compiler's vector type: measured at 115 GFLOP/s a core in float32 on a Zen 4, where
// intrinsics have nothing to add. Nothing here may call an inline function of a header that another file
// uses too: the linker could keep this one's instructions for all of them.
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "microkernels.h"

// Arrays of accumulators stay in registers only where every loop over them is unrolled early: without it they
// went through the stack, a quarter to a half of these kernels' time.
#if defined(__clang__)
#define LORAFAST_UNROLL _Pragma("unroll")
#else
#define LORAFAST_UNROLL _Pragma("GCC unroll 16")
#endif

namespace lorafast {
namespace {

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));

// Terms of a partial sum: one long sum in float32 errs more than those of oneDNN and MKL.
constexpr int64_t kSummed = 16;

template <int R>
void reduce_columns_of(const float* tile, int64_t ld, int64_t cols, const float* t, float* out) {
  Vector totals[R];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) totals[i] = Vector{};
  for (int64_t first = 0; first < cols; first += kSummed) {
    const int64_t last = first + kSummed < cols ? first + kSummed : cols;
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) __builtin_prefetch(tile + (i + R) * ld + first, 0, 2);  // the next rows, into L2
    Vector sums[R];
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) sums[i] = Vector{};
    for (int64_t c = first; c < last; ++c) {
      const Vector factors = *reinterpret_cast<const Vector*>(t + c * kLanes);
      LORAFAST_UNROLL
      for (int i = 0; i < R; ++i) sums[i] += tile[i * ld + c] * factors;
    }
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) totals[i] += sums[i];
  }
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) *reinterpret_cast<Vector*>(out + i * kLanes) += totals[i];
}

void reduce_columns(
    const float* tile, int64_t ld, int64_t rows, int64_t cols, int64_t blocks, const float* t, int64_t t_step,
    float* out, int64_t out_step) {
  for (int64_t b = 0; b < blocks; ++b, t += t_step, out += out_step) {
    int64_t i = 0;
    for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
      reduce_columns_of<LORAFAST_ROWS>(tile + i * ld, ld, cols, t, out + i * kLanes);
    for (; i < rows; ++i) reduce_columns_of<1>(tile + i * ld, ld, cols, t, out + i * kLanes);
  }
}

// Ranks [0, LORAFAST_ROWS) of t and out, kLanes columns: their sums stay in registers down the rows.
void reduce_rows_of(const float* tile, int64_t ld, int64_t rows, const float* t, float* out, bool add) {
  for (int64_t first = 0; first < rows; first += kSummed) {
    const int64_t last = first + kSummed < rows ? first + kSummed : rows;
    Vector sums[LORAFAST_ROWS];
    LORAFAST_UNROLL
    for (int j = 0; j < LORAFAST_ROWS; ++j) sums[j] = Vector{};
    for (int64_t i = first; i < last; ++i) {
      const Vector values = *reinterpret_cast<const Vector*>(tile + i * ld);
      __builtin_prefetch(tile + i * ld + kLanes);
      LORAFAST_UNROLL
      for (int j = 0; j < LORAFAST_ROWS; ++j) sums[j] += t[i * kLanes + j] * values;
    }
    LORAFAST_UNROLL
    for (int j = 0; j < LORAFAST_ROWS; ++j) {
      Vector& to = *reinterpret_cast<Vector*>(out + j * kLanes);
      to = add || first > 0 ? to + sums[j] : sums[j];
    }
  }
}

void reduce_rows(
    const float* tile, int64_t ld, int64_t rows, int64_t cols, const float* t, float* out, bool add) {
  for (int64_t c = 0; c < cols; c += kLanes)
    for (int64_t j = 0; j < kLanes; j += LORAFAST_ROWS)
      reduce_rows_of(tile + c, ld, rows, t + j, out + (c + j) * kLanes, add);
}

typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));

// All ones in the lanes whose bit is set.
inline Words lanes_of(const uint8_t* bits) {
  const Words lanes = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const uint32_t word = bits[0] | static_cast<uint32_t>(bits[1]) << 8;
  return (Words)((lanes & word) != 0);
}

template <int R>
void expand_of(
    float* tile, int64_t ld, const float* s, int64_t r, const float* t, float scale, const uint8_t* keep,
    const float* bias, bool add) {
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) __builtin_prefetch(tile + i * ld + 3 * kLanes);
  Vector sums[R];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) sums[i] = Vector{};
  for (int64_t j = 0; j < r; ++j) {
    const Vector factors = *reinterpret_cast<const Vector*>(t + j * kLanes);
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) sums[i] += s[i * r + j] * factors;
  }
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) {
    if (keep) sums[i] = (Vector)((Words)sums[i] & lanes_of(keep + i * kKeepRow));
    Vector& to = *reinterpret_cast<Vector*>(tile + i * ld);
    Vector before = bias ? *reinterpret_cast<const Vector*>(bias) : Vector{};
    if (add) before += to;
    to = before + scale * sums[i];  // rounded once
  }
}

void expand(
    float* tile, int64_t ld, int64_t rows, int64_t cols, const float* s, int64_t r, const float* t, float scale,
    const uint8_t* keep, const float* bias, bool add) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    const uint8_t* bits = keep ? keep + c / 8 : nullptr;
    const float* of_bias = bias ? bias + c : nullptr;
    int64_t i = 0;
    for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
      expand_of<LORAFAST_ROWS>(
          tile + i * ld + c, ld, s + i * r, r, t + c * r, scale, keep ? bits + i * kKeepRow : nullptr, of_bias, add);
    for (; i < rows; ++i)
      expand_of<1>(
          tile + i * ld + c, ld, s + i * r, r, t + c * r, scale, keep ? bits + i * kKeepRow : nullptr, of_bias, add);
  }
}

void mask(const float* from, int64_t cols, const uint8_t* keep, float* to) {
  for (int64_t c = 0; c < cols; c += kLanes)
    *reinterpret_cast<Words*>(to + c) = *reinterpret_cast<const Words*>(from + c) & lanes_of(keep + c / 8);
}

#if defined(__FLT16_MAX__) && !defined(LORAFAST_SOFTWARE_HALF)

inline float from_half(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, sizeof(half));
  return static_cast<float>(half);
}

inline uint16_t to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &half, sizeof(bits));
  return bits;
}

#else  // gcc before 12 has no _Float16 in C++

inline float from_half(uint16_t half) {
  const uint32_t rest = half & 0x7FFFu;
  uint32_t bits = rest << 13;
  float value;
  memcpy(&value, &bits, sizeof(value));
  value *= 0x1p112f;  // the exponents' biases differ by 112; right for denormals too
  memcpy(&bits, &value, sizeof(bits));
  if (rest >= 0x7C00u) bits = 0x7F800000u | rest << 13;  // infinity, NaN
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint16_t to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7FFFFFFFu;
  uint32_t half;
  if (bits >= 0x47800000u) {  // 65536 and up
    half = bits > 0x7F800000u ? 0x7E00u : 0x7C00u;
  } else if (bits < 0x38800000u) {  // denormal: the last bit of 0.5 is that of a half
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    memcpy(&half, &magnitude, sizeof(half));
    half -= 0x3F000000u;
  } else {
    half = (bits - 0x38000000u + 0xFFFu + (bits >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

#endif

void load(const void* from, Dtype dtype, int64_t count, float* to) {
  if (dtype == Dtype::kFloat32) {
    memcpy(to, from, count * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    const uint16_t* halves = static_cast<const uint16_t*>(from);
    uint32_t* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(halves[i]) << 16;
  } else {
    const uint16_t* halves = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = from_half(halves[i]);
  }
}

void store(const float* from, Dtype dtype, int64_t count, void* to) {
  if (dtype == Dtype::kFloat32) {
    memcpy(to, from, count * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    uint16_t* halves = static_cast<uint16_t*>(to);
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + kLanes <= count; i += kLanes) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
      memcpy(halves + i, &rounded, sizeof(rounded));
    }
#endif
    for (; i < count; ++i) {
      uint32_t bits;
      memcpy(&bits, from + i, sizeof(bits));
      const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
      // Rounding could carry a NaN into infinity or zero.
      halves[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
    }
  } else {
    uint16_t* halves = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) halves[i] = to_half(from[i]);
  }
}

#include "microkernels_codes.h"

// Philox on 8 calls at a time, a word of each in the low half of a 64-bit lane; what is above it is ignored.
typedef uint64_t Longs __attribute__((vector_size(64), may_alias));
constexpr int64_t kCalls = 8;

// By intrinsics, because the compiler takes a full 64-bit multiplication for the generic form, three times as slow.
inline __attribute__((always_inline)) Longs multiply(const Longs& a, uint32_t b) {
#if defined(__AVX512F__)
  return (Longs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  Longs product;
  for (int half = 0; half < 2; ++half)
    reinterpret_cast<__m256i_u*>(&product)[half] =
        _mm256_mul_epu32(reinterpret_cast<const __m256i_u*>(&a)[half], _mm256_set1_epi64x(b));
  return product;
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// Philox 4x32 with 7 rounds for kCalls counters from `counter` on: words 0 and 1 of each call to low, 2 and 3
// to high. lorafast/reference/dropout.py defines it.
inline __attribute__((always_inline)) void philox(uint64_t seed, uint64_t counter, Longs& low, Longs& high) {
  Longs c0 = counter + Longs{0, 1, 2, 3, 4, 5, 6, 7}, c1 = c0 >> 32, c2 = {}, c3 = {};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const Longs product0 = multiply(c0, 0xD2511F53u), product1 = multiply(c2, 0xCD9E8D57u);
    c0 = (product1 >> 32) ^ c1 ^ k0;
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ k1;
    c3 = product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  low = (c0 & 0xFFFFFFFFu) | c1 << 32;
  high = (c2 & 0xFFFFFFFFu) | c3 << 32;
}

// A byte for each call: whether its half-words, in the order of memory, are at or above the threshold.
#if defined(__AVX512F__)
inline __attribute__((always_inline)) void keep_bits(
    const Longs& low, const Longs& high, uint32_t threshold, uint8_t* bits) {
  // Above, not at or above: 65536 fits no half-word. Calls 0, 2, 4, 6 and calls 1, 3, 5, 7.
  const __m512i below = _mm512_set1_epi16(static_cast<short>(threshold - 1));
  const __m512i even = _mm512_unpacklo_epi64((__m512i)low, (__m512i)high);
  const __m512i odd = _mm512_unpackhi_epi64((__m512i)low, (__m512i)high);
  const uint32_t all = threshold == 0 ? ~0u : 0;
  const __m128i evens = _mm_cvtsi32_si128(static_cast<int>(_mm512_cmpgt_epu16_mask(even, below) | all));
  const __m128i odds = _mm_cvtsi32_si128(static_cast<int>(_mm512_cmpgt_epu16_mask(odd, below) | all));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(bits), _mm_unpacklo_epi8(evens, odds));
}
#elif defined(__AVX2__)
inline void keep_bits(const Longs& low, const Longs& high, uint32_t threshold, uint8_t* bits) {
  if (threshold > 0xFFFF) {  // fits no half-word
    memset(bits, 0, kCalls);
    return;
  }
  const __m256i least = _mm256_set1_epi16(static_cast<short>(threshold));
  for (int half = 0; half < 2; ++half) {
    const __m256i first = reinterpret_cast<const __m256i_u*>(&low)[half];
    const __m256i second = reinterpret_cast<const __m256i_u*>(&high)[half];
    const __m256i even = _mm256_unpacklo_epi64(first, second), odd = _mm256_unpackhi_epi64(first, second);
    const __m256i evens = _mm256_cmpeq_epi16(_mm256_max_epu16(even, least), even);
    const __m256i odds = _mm256_cmpeq_epi16(_mm256_max_epu16(odd, least), odd);
    const int found = _mm256_movemask_epi8(_mm256_packs_epi16(evens, odds));  // calls 0, 1, 2, 3
    memcpy(bits + 4 * half, &found, sizeof(found));
  }
}
#else
inline void keep_bits(const Longs& low, const Longs& high, uint32_t threshold, uint8_t* bits) {
  for (int i = 0; i < kCalls; ++i) {
    uint32_t byte = 0;
    for (int h = 0; h < 4; ++h) {
      byte |= static_cast<uint32_t>((low[i] >> 16 * h & 0xFFFF) >= threshold) << h;
      byte |= static_cast<uint32_t>((high[i] >> 16 * h & 0xFFFF) >= threshold) << (4 + h);
    }
    bits[i] = static_cast<uint8_t>(byte);
  }
}
#endif

void keep(
    int64_t row_index, int64_t first, int64_t cols, int64_t groups, uint64_t seed, uint32_t threshold,
    uint8_t* bits) {
  const uint64_t counter = static_cast<uint64_t>(row_index * groups + first / 8);
  for (int64_t call = 0; call < (cols + 7) / 8; call += kCalls) {
    Longs low, high;
    philox(seed, counter + static_cast<uint64_t>(call), low, high);
    keep_bits(low, high, threshold, bits + call);
  }
}

#if defined(__AVX512BF16__)

// By intrinsics: no compiler makes the pair product of its own accord. Measured at 1.8 times the float32 rate.

inline __m512bh as_pairs(__m512i bits) { return reinterpret_cast<const __m512bh&>(bits); }

// R rows, B blocks of ranks: each pair is spread over the lanes once for all of them.
template <int R, int B>
void reduce_column_pairs_of(
    const uint16_t* tile, int64_t ld, int64_t cols, const uint32_t* t, int64_t t_step, float* out,
    int64_t out_step) {
  __m512 sums[R][B];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int b = 0; b < B; ++b) sums[i][b] = _mm512_setzero_ps();
  for (int64_t c = 0; c < cols; c += 2) {
    if (c % 32 == 0)
      LORAFAST_UNROLL
      for (int i = 0; i < R; ++i) __builtin_prefetch(tile + (i + R) * ld + c, 0, 2);
    __m512bh factors[B];
    LORAFAST_UNROLL
    for (int b = 0; b < B; ++b) factors[b] = as_pairs(_mm512_loadu_si512(t + b * t_step + c / 2 * kLanes));
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) {
      int two;
      memcpy(&two, tile + i * ld + c, sizeof(two));
      const __m512bh pair = as_pairs(_mm512_set1_epi32(two));
      LORAFAST_UNROLL
      for (int b = 0; b < B; ++b) sums[i][b] = _mm512_dpbf16_ps(sums[i][b], pair, factors[b]);
    }
  }
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int b = 0; b < B; ++b) {
      float* to = out + b * out_step + i * kLanes;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sums[i][b]));
    }
}

template <int B>
void reduce_column_pairs_by(
    const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* t, int64_t t_step, float* out,
    int64_t out_step) {
  int64_t i = 0;
  for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
    reduce_column_pairs_of<LORAFAST_ROWS, B>(tile + i * ld, ld, cols, t, t_step, out + i * kLanes, out_step);
  for (; i < rows; ++i)
    reduce_column_pairs_of<1, B>(tile + i * ld, ld, cols, t, t_step, out + i * kLanes, out_step);
}

void reduce_column_pairs(
    const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, int64_t blocks, const uint32_t* t,
    int64_t t_step, float* out, int64_t out_step) {
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2)
    reduce_column_pairs_by<2>(tile, ld, rows, cols, t + b * t_step, t_step, out + b * out_step, out_step);
  if (b < blocks)
    reduce_column_pairs_by<1>(tile, ld, rows, cols, t + b * t_step, t_step, out + b * out_step, out_step);
}

const uint16_t kNoRow[kLanes] = {};

// Two rows of 16 bfloat16 as pairs: the first row low, the second high.
inline __m512i row_pairs(const uint16_t* first, const uint16_t* second) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Ranks [0, 8) of t and out, C blocks of columns: a whole cache line of every row at a visit.
template <int C>
void reduce_row_pairs_of(
    const uint16_t* tile, int64_t ld, int64_t rows, const uint32_t* t, float* out, bool add) {
  __m512 sums[8][C];
  LORAFAST_UNROLL
  for (int j = 0; j < 8; ++j)
    LORAFAST_UNROLL
    for (int v = 0; v < C; ++v) sums[j][v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < rows; i += 2) {
    __m512bh values[C];
    LORAFAST_UNROLL
    for (int v = 0; v < C; ++v) {
      const uint16_t* first = tile + i * ld + v * kLanes;
      values[v] = as_pairs(row_pairs(first, i + 1 < rows ? first + ld : kNoRow));
    }
    __builtin_prefetch(tile + i * ld + C * kLanes);
    __builtin_prefetch(tile + (i + 1) * ld + C * kLanes);
    LORAFAST_UNROLL
    for (int j = 0; j < 8; ++j) {
      const __m512bh factor = as_pairs(_mm512_set1_epi32(static_cast<int>(t[i / 2 * kLanes + j])));
      LORAFAST_UNROLL
      for (int v = 0; v < C; ++v) sums[j][v] = _mm512_dpbf16_ps(sums[j][v], factor, values[v]);
    }
  }
  LORAFAST_UNROLL
  for (int j = 0; j < 8; ++j)
    LORAFAST_UNROLL
    for (int v = 0; v < C; ++v) {
      float* to = out + (v * kLanes + j) * kLanes;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sums[j][v]) : sums[j][v]);
    }
}

void reduce_row_pairs(
    const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* t, float* out, bool add) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes)
    for (int64_t j = 0; j < kLanes; j += 8)
      reduce_row_pairs_of<2>(tile + c, ld, rows, t + j, out + (c + j) * kLanes, add);
  for (; c < cols; c += kLanes)
    for (int64_t j = 0; j < kLanes; j += 8)
      reduce_row_pairs_of<1>(tile + c, ld, rows, t + j, out + (c + j) * kLanes, add);
}

// R rows, C blocks of columns. What comes to the nearest cache for later begins at `next`.
template <int R, int C, bool Add>
void expand_pairs_of(
    uint16_t* tile, int64_t ld, const uint32_t* s, int64_t pairs, const uint32_t* t, float scale,
    const uint8_t* keep, const float* bias, const uint16_t* next) {
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) __builtin_prefetch(next + i * ld);
  __m512 sums[R][C];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int v = 0; v < C; ++v) sums[i][v] = _mm512_setzero_ps();
  for (int64_t j = 0; j < pairs; ++j) {
    __m512bh factors[C];
    LORAFAST_UNROLL
    for (int v = 0; v < C; ++v) factors[v] = as_pairs(_mm512_loadu_si512(t + (v * pairs + j) * kLanes));
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) {
      const __m512bh pair = as_pairs(_mm512_set1_epi32(static_cast<int>(s[i * pairs + j])));
      LORAFAST_UNROLL
      for (int v = 0; v < C; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], pair, factors[v]);
    }
  }
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 biases[C];
  LORAFAST_UNROLL
  for (int v = 0; v < C; ++v) biases[v] = bias ? _mm512_loadu_ps(bias + v * kLanes) : _mm512_setzero_ps();
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int v = 0; v < C; ++v) {
      __mmask16 kept = 0xFFFF;
      if (keep) memcpy(&kept, keep + i * kKeepRow + v * (kLanes / 8), sizeof(kept));
      uint16_t* to = tile + i * ld + v * kLanes;
      __m512 before = biases[v];
      if constexpr (Add) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to));
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
        before = _mm512_add_ps(before, _mm512_castsi512_ps(bits));
      }
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mask3_fmadd_ps(sums[i][v], factor, before, kept));
      memcpy(to, &rounded, sizeof(rounded));
    }
}

template <int R, bool Add>
void expand_pair_rows(
    uint16_t* tile, int64_t ld, int64_t cols, const uint32_t* s, int64_t pairs, const uint32_t* t, float scale,
    const uint8_t* keep, const float* bias) {
  constexpr int64_t kAhead = 6 * kLanes;
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes)
    expand_pairs_of<R, 2, Add>(
        tile + c, ld, s, pairs, t + c * pairs, scale, keep ? keep + c / 8 : nullptr, bias ? bias + c : nullptr,
        tile + c + kAhead + (c + kAhead < cols ? 0 : R * ld - cols));  // at the end of these rows, the next ones
  for (; c < cols; c += kLanes)
    expand_pairs_of<R, 1, Add>(
        tile + c, ld, s, pairs, t + c * pairs, scale, keep ? keep + c / 8 : nullptr, bias ? bias + c : nullptr,
        tile + c);
}

template <bool Add>
void expand_all_pairs(
    uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* s, int64_t pairs, const uint32_t* t,
    float scale, const uint8_t* keep, const float* bias) {
  int64_t i = 0;
  for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
    expand_pair_rows<LORAFAST_ROWS, Add>(
        tile + i * ld, ld, cols, s + i * pairs, pairs, t, scale, keep ? keep + i * kKeepRow : nullptr, bias);
  for (; i < rows; ++i)
    expand_pair_rows<1, Add>(
        tile + i * ld, ld, cols, s + i * pairs, pairs, t, scale, keep ? keep + i * kKeepRow : nullptr, bias);
}

void expand_pairs(
    uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* s, int64_t pairs, const uint32_t* t,
    float scale, const uint8_t* keep, const float* bias, bool add) {
  (add ? expand_all_pairs<true> : expand_all_pairs<false>)(tile, ld, rows, cols, s, pairs, t, scale, keep, bias);
}

void mask_pairs(const uint16_t* from, int64_t cols, const uint8_t* keep, uint16_t* to) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    __mmask16 kept;
    memcpy(&kept, keep + c / 8, sizeof(kept));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), _mm256_maskz_loadu_epi16(kept, from + c));
  }
}

#endif

#include "microkernels_activations.h"
#include "microkernels_gathered.h"
#include "microkernels_panels.h"
#include "microkernels_products.h"

#if defined(__AVX512BF16__)

const Products<uint16_t, uint32_t> kPairs = {
    reduce_column_pairs, reduce_row_pairs, expand_pairs, mask_pairs, dot_pairs, multiply_pairs,
};
const Products<uint16_t, uint32_t>* const kPairsOfThisSet = &kPairs;
const Panels kPanels = {pack_panel, multiply_panel};
const Panels* const kPanelsOfThisSet = &kPanels;

#else

const Products<uint16_t, uint32_t>* const kPairsOfThisSet = nullptr;
const Panels* const kPanelsOfThisSet = nullptr;

#endif

}  // namespace

#define LORAFAST_TABLE_OF(set) microkernels_##set
#define LORAFAST_TABLE(set) LORAFAST_TABLE_OF(set)
#define LORAFAST_NAME_OF(set) #set
#define LORAFAST_NAME(set) LORAFAST_NAME_OF(set)

namespace {
const Microkernels kTable = {
    LORAFAST_NAME(LORAFAST_SET), {reduce_columns, reduce_rows, expand, mask, dot, multiply}, kPairsOfThisSet,
    kPanelsOfThisSet, gather_columns, gather_rows, load, store, keep, four_bit, eight_bit, add_up, activate, activate_backward,
};
}  // namespace
const Microkernels* const LORAFAST_TABLE(LORAFAST_SET) = &kTable;

}  // namespace lorafast
