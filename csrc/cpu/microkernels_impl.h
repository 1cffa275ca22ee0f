// The body of microkernels_<set>.cpp, which defines LORAFAST_SET (its name) and LORAFAST_ROWS (how many
// accumulators of kLanes floats its registers hold beside operands), and is compiled for its instructions.
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

// Terms of a sum before it is added to those before it: one long sum in float32 errs more than the vendor's.
constexpr int64_t kSummed = 16;

template <int R>
void reduce_columns_of(const float* tile, int64_t ld, int64_t cols, const float* t, float* out) {
  Vector totals[R];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) totals[i] = *reinterpret_cast<const Vector*>(out + i * kLanes);
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
  for (int i = 0; i < R; ++i) *reinterpret_cast<Vector*>(out + i * kLanes) = totals[i];
}

void reduce_columns(
    const float* tile, int64_t ld, int64_t rows, int64_t cols, const float* t, float* out) {
  int64_t i = 0;
  for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
    reduce_columns_of<LORAFAST_ROWS>(tile + i * ld, ld, cols, t, out + i * kLanes);
  for (; i < rows; ++i) reduce_columns_of<1>(tile + i * ld, ld, cols, t, out + i * kLanes);
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
    float* tile, int64_t ld, const float* s, int64_t r, const float* t, float scale, const uint8_t* keep) {
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
    *reinterpret_cast<Vector*>(tile + i * ld) += scale * sums[i];
  }
}

void expand(
    float* tile, int64_t ld, int64_t rows, int64_t cols, const float* s, int64_t r, const float* t, float scale,
    const uint8_t* keep) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    const uint8_t* bits = keep ? keep + c / 8 : nullptr;
    int64_t i = 0;
    for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
      expand_of<LORAFAST_ROWS>(
          tile + i * ld + c, ld, s + i * r, r, t + c * r, scale, keep ? bits + i * kKeepRow : nullptr);
    for (; i < rows; ++i)
      expand_of<1>(tile + i * ld + c, ld, s + i * r, r, t + c * r, scale, keep ? bits + i * kKeepRow : nullptr);
  }
}

void mask(const float* from, int64_t cols, const uint8_t* keep, float* to) {
  for (int64_t c = 0; c < cols; c += kLanes)
    *reinterpret_cast<Words*>(to + c) = *reinterpret_cast<const Words*>(from + c) & lanes_of(keep + c / 8);
}

void load(const void* from, Dtype dtype, int64_t count, float* to) {
  if (dtype == Dtype::kFloat32) {
    memcpy(to, from, count * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    const uint16_t* halves = static_cast<const uint16_t*>(from);
    uint32_t* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(halves[i]) << 16;
  } else {
    const _Float16* halves = static_cast<const _Float16*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(halves[i]);
  }
}

void store(const float* from, Dtype dtype, int64_t count, void* to) {
  if (dtype == Dtype::kFloat32) {
    memcpy(to, from, count * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    uint16_t* halves = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      memcpy(&bits, from + i, sizeof(bits));
      const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
      // Rounding could carry a NaN into infinity or zero.
      halves[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
    }
  } else {
    _Float16* halves = static_cast<_Float16*>(to);
    for (int64_t i = 0; i < count; ++i) halves[i] = static_cast<_Float16>(from[i]);
  }
}

// The 64-bit products of 16 words with one: high and low halves. By intrinsics, because the compiler takes
// a full 64-bit multiplication for the generic form, three times as slow.
inline __attribute__((always_inline)) void multiply(const Words& a, uint32_t b, Words& high, Words& low) {
#if defined(__AVX512F__)
  const __m512i words = (__m512i)a, factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(words, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(words, 32), factor);
  high = (Words)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB);
  low = (Words)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB);
#elif defined(__AVX2__)
  const __m256i_u* words = reinterpret_cast<const __m256i_u*>(&a);
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  for (int half = 0; half < 2; ++half) {
    const __m256i even = _mm256_mul_epu32(words[half], factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(words[half], 32), factor);
    reinterpret_cast<__m256i_u*>(&high)[half] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    reinterpret_cast<__m256i_u*>(&low)[half] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Philox 4x32 with 7 rounds for kLanes counters from `counter` on: word w of call i in words[w][i].
// lorafast/reference/dropout.py defines it.
inline __attribute__((always_inline)) void philox(uint64_t seed, uint64_t counter, Words* words) {
  const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
  Words c0 = low + lanes, c2 = {}, c3 = {};
  Words c1 = high - (Words)(c0 < low);  // a comparison gives -1: the carry
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    Words high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Bit 8 i + 2 w + h of `bits` is that of half h of word w of call i.
#if defined(__AVX512F__)
inline __attribute__((always_inline)) void keep_bits(const Words* words, uint32_t threshold, uint8_t* bits) {
  const __m512i w0 = (__m512i)words[0], w1 = (__m512i)words[1], w2 = (__m512i)words[2], w3 = (__m512i)words[3];
  const __m512i low01 = _mm512_unpacklo_epi32(w0, w1), low23 = _mm512_unpacklo_epi32(w2, w3);
  const __m512i high01 = _mm512_unpackhi_epi32(w0, w1), high23 = _mm512_unpackhi_epi32(w2, w3);
  // In 128-bit lane l of calls[q]: the words of call 4 l + q.
  const __m512i calls[4] = {
      _mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
      _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
  // 65536 doesn't fit a half: above the highest half is not at or above it
  const __m512i below = _mm512_set1_epi16(static_cast<short>(threshold - 1));
  uint32_t found[4];
  for (int q = 0; q < 4; ++q) found[q] = threshold == 0 ? ~0u : _mm512_cmpgt_epu16_mask(calls[q], below);
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(found));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bits), _mm_shuffle_epi8(all, order));
}
#else
inline void keep_bits(const Words* words, uint32_t threshold, uint8_t* bits) {
  // Lane by lane 0 or 1, a bit at a time: the compiler keeps the calls side by side.
  Words all = {};
  for (int w = 0; w < 4; ++w) {
    const Words low = words[w] & 0xFFFF, high = words[w] >> 16;
    all |= ((Words)(low >= threshold) & (1u << 2 * w)) | ((Words)(high >= threshold) & (2u << 2 * w));
  }
  for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<uint8_t>(all[i]);
}
#endif

void keep(
    int64_t row_index, int64_t first, int64_t cols, int64_t groups, uint64_t seed, uint32_t threshold,
    uint8_t* bits) {
  for (int64_t c = 0; c < cols; c += 8 * kLanes) {
    Words words[4];
    philox(seed, static_cast<uint64_t>(row_index * groups + (first + c) / 8), words);
    keep_bits(words, threshold, bits + c / 8);
  }
}

#if defined(__AVX512BF16__)

// By intrinsics: no compiler makes the pair product of its own accord. Measured at 1.8 times the float32 rate.

inline __m512bh as_pairs(__m512i bits) { return reinterpret_cast<const __m512bh&>(bits); }

template <int R>
void reduce_column_pairs_of(
    const uint16_t* tile, int64_t ld, int64_t cols, const uint32_t* t, float* out) {
  __m512 sums[R];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t c = 0; c < cols; c += 2) {
    if (c % 32 == 0)
      LORAFAST_UNROLL
      for (int i = 0; i < R; ++i) __builtin_prefetch(tile + (i + R) * ld + c, 0, 2);
    const __m512bh factors = as_pairs(_mm512_loadu_si512(t + c / 2 * kLanes));
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) {
      int pair;
      memcpy(&pair, tile + i * ld + c, sizeof(pair));
      sums[i] = _mm512_dpbf16_ps(sums[i], as_pairs(_mm512_set1_epi32(pair)), factors);
    }
  }
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    _mm512_storeu_ps(out + i * kLanes, _mm512_add_ps(_mm512_loadu_ps(out + i * kLanes), sums[i]));
}

void reduce_column_pairs(
    const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* t, float* out) {
  int64_t i = 0;
  for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
    reduce_column_pairs_of<LORAFAST_ROWS>(tile + i * ld, ld, cols, t, out + i * kLanes);
  for (; i < rows; ++i) reduce_column_pairs_of<1>(tile + i * ld, ld, cols, t, out + i * kLanes);
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

// R rows, C blocks of columns.
template <int R, int C>
void expand_pairs_of(
    uint16_t* tile, int64_t ld, const uint32_t* s, int64_t pairs, const uint32_t* t, float scale,
    const uint8_t* keep) {
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) __builtin_prefetch(tile + i * ld + 3 * C * kLanes);
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
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int v = 0; v < C; ++v) {
      __mmask16 kept = 0xFFFF;
      if (keep) memcpy(&kept, keep + i * kKeepRow + v * (kLanes / 8), sizeof(kept));
      uint16_t* to = tile + i * ld + v * kLanes;
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to));
      const __m512 before = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mask3_fmadd_ps(sums[i][v], factor, before, kept));
      memcpy(to, &rounded, sizeof(rounded));
    }
}

template <int R>
void expand_pair_rows(
    uint16_t* tile, int64_t ld, int64_t cols, const uint32_t* s, int64_t pairs, const uint32_t* t, float scale,
    const uint8_t* keep) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes)
    expand_pairs_of<R, 2>(tile + c, ld, s, pairs, t + c * pairs, scale, keep ? keep + c / 8 : nullptr);
  for (; c < cols; c += kLanes)
    expand_pairs_of<R, 1>(tile + c, ld, s, pairs, t + c * pairs, scale, keep ? keep + c / 8 : nullptr);
}

void expand_pairs(
    uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* s, int64_t pairs, const uint32_t* t,
    float scale, const uint8_t* keep) {
  int64_t i = 0;
  for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
    expand_pair_rows<LORAFAST_ROWS>(
        tile + i * ld, ld, cols, s + i * pairs, pairs, t, scale, keep ? keep + i * kKeepRow : nullptr);
  for (; i < rows; ++i)
    expand_pair_rows<1>(
        tile + i * ld, ld, cols, s + i * pairs, pairs, t, scale, keep ? keep + i * kKeepRow : nullptr);
}

void mask_pairs(const uint16_t* from, int64_t cols, const uint8_t* keep, uint16_t* to) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    __mmask16 kept;
    memcpy(&kept, keep + c / 8, sizeof(kept));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), _mm256_maskz_loadu_epi16(kept, from + c));
  }
}

const Products<uint16_t, uint32_t> kPairs = {reduce_column_pairs, reduce_row_pairs, expand_pairs, mask_pairs};
const Products<uint16_t, uint32_t>* const kPairsOfThisSet = &kPairs;

#else

const Products<uint16_t, uint32_t>* const kPairsOfThisSet = nullptr;

#endif

}  // namespace

#define LORAFAST_TABLE_OF(set) microkernels_##set
#define LORAFAST_TABLE(set) LORAFAST_TABLE_OF(set)
#define LORAFAST_NAME_OF(set) #set
#define LORAFAST_NAME(set) LORAFAST_NAME_OF(set)

extern const Microkernels LORAFAST_TABLE(LORAFAST_SET);
const Microkernels LORAFAST_TABLE(LORAFAST_SET) = {
    LORAFAST_NAME(LORAFAST_SET), {reduce_columns, reduce_rows, expand, mask}, kPairsOfThisSet, load, store, keep,
};

}  // namespace lorafast
