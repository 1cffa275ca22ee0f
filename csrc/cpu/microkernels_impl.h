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

namespace lorafast {
namespace {

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));

// Terms of a sum before it is added to those before it: one long sum in float32 errs more than the vendor's.
constexpr int64_t kSummed = 16;

template <int R>
void reduce_columns_of(const float* tile, int64_t ld, int64_t cols, const float* t, float* out) {
  Vector totals[R];
  for (int i = 0; i < R; ++i) totals[i] = *reinterpret_cast<const Vector*>(out + i * kLanes);
  for (int64_t first = 0; first < cols; first += kSummed) {
    const int64_t last = first + kSummed < cols ? first + kSummed : cols;
    Vector sums[R];
    for (int i = 0; i < R; ++i) sums[i] = Vector{};
    for (int64_t c = first; c < last; ++c) {
      const Vector factors = *reinterpret_cast<const Vector*>(t + c * kLanes);
      for (int i = 0; i < R; ++i) sums[i] += tile[i * ld + c] * factors;
    }
    for (int i = 0; i < R; ++i) totals[i] += sums[i];
  }
  for (int i = 0; i < R; ++i) *reinterpret_cast<Vector*>(out + i * kLanes) = totals[i];
}

void reduce_columns(
    const float* tile, int64_t ld, int64_t rows, int64_t cols, const float* t, float* out) {
  int64_t i = 0;
  for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
    reduce_columns_of<LORAFAST_ROWS>(tile + i * ld, ld, cols, t, out + i * kLanes);
  for (; i < rows; ++i) reduce_columns_of<1>(tile + i * ld, ld, cols, t, out + i * kLanes);
}

// Ranks [0, LORAFAST_ROWS) of t and out: their sums stay in registers down all rows.
void reduce_rows_of(
    const float* tile, int64_t ld, int64_t rows, const float* t, float* out, int64_t ld_out) {
  for (int64_t first = 0; first < rows; first += kSummed) {
    const int64_t last = first + kSummed < rows ? first + kSummed : rows;
    Vector sums[LORAFAST_ROWS];
    for (int j = 0; j < LORAFAST_ROWS; ++j) sums[j] = Vector{};
    for (int64_t i = first; i < last; ++i) {
      const Vector values = *reinterpret_cast<const Vector*>(tile + i * ld);
      for (int j = 0; j < LORAFAST_ROWS; ++j) sums[j] += t[i * kLanes + j] * values;
    }
    for (int j = 0; j < LORAFAST_ROWS; ++j) *reinterpret_cast<Vector*>(out + j * ld_out) += sums[j];
  }
}

void reduce_rows(
    const float* tile, int64_t ld, int64_t rows, int64_t cols, const float* t, float* out, int64_t ld_out) {
  for (int64_t c = 0; c < cols; c += kLanes)
    for (int64_t j = 0; j < kLanes; j += LORAFAST_ROWS)
      reduce_rows_of(tile + c, ld, rows, t + j, out + j * ld_out + c, ld_out);
}

template <int R>
void expand_of(
    float* tile, int64_t ld, const float* s, int64_t ld_s, int64_t r, const float* t, int64_t ld_t) {
  Vector sums[R];
  for (int i = 0; i < R; ++i) sums[i] = *reinterpret_cast<const Vector*>(tile + i * ld);
  for (int64_t j = 0; j < r; ++j) {
    const Vector factors = *reinterpret_cast<const Vector*>(t + j * ld_t);
    for (int i = 0; i < R; ++i) sums[i] += s[i * ld_s + j] * factors;
  }
  for (int i = 0; i < R; ++i) *reinterpret_cast<Vector*>(tile + i * ld) = sums[i];
}

void expand(
    float* tile, int64_t ld, int64_t rows, int64_t cols, const float* s, int64_t ld_s, int64_t r,
    const float* t, int64_t ld_t) {
  int64_t i = 0;
  for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
    for (int64_t c = 0; c < cols; c += kLanes)
      expand_of<LORAFAST_ROWS>(tile + i * ld + c, ld, s + i * ld_s, ld_s, r, t + c, ld_t);
  for (; i < rows; ++i)
    for (int64_t c = 0; c < cols; c += kLanes)
      expand_of<1>(tile + i * ld + c, ld, s + i * ld_s, ld_s, r, t + c, ld_t);
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

typedef uint32_t Words __attribute__((vector_size(64), may_alias));

// The 64-bit products of 16 words with one: high and low halves. By intrinsics, because the compiler takes
// a full 64-bit multiplication for the generic form, three times as slow.
inline __attribute__((always_inline)) void multiply(const Words& a, uint32_t b, Words& high, Words& low) {
#if defined(__AVX512F__)
  const __m512i words = reinterpret_cast<const __m512i&>(a), factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(words, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(words, 32), factor);
  high = reinterpret_cast<const Words&>(
      static_cast<const __m512i&>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd)));
  low = reinterpret_cast<const Words&>(
      static_cast<const __m512i&>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32))));
#elif defined(__AVX2__)
  const __m256i* words = reinterpret_cast<const __m256i*>(&a);
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  for (int half = 0; half < 2; ++half) {
    const __m256i even = _mm256_mul_epu32(words[half], factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(words[half], 32), factor);
    reinterpret_cast<__m256i*>(&high)[half] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    reinterpret_cast<__m256i*>(&low)[half] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Philox 4x32 with 7 rounds for kLanes counters from `counter` on: word w of call i to words[4 i + w], whose
// half-words then lie in the order of the columns. lorafast/reference/dropout.py defines it.
void philox(uint64_t seed, uint64_t counter, uint32_t* words) {
  Words c0, c1, c2 = {}, c3 = {};
  for (int i = 0; i < kLanes; ++i) {
    c0[i] = static_cast<uint32_t>(counter + i);
    c1[i] = static_cast<uint32_t>((counter + i) >> 32);
  }
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
  for (int i = 0; i < kLanes; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

void dropout(
    float* row, int64_t row_index, int64_t first, int64_t cols, int64_t groups, uint64_t seed,
    uint32_t threshold, float scale) {
  uint32_t words[4 * kLanes];
  uint16_t halves[8 * kLanes];
  for (int64_t c = 0; c < cols; c += 8 * kLanes) {
    philox(seed, static_cast<uint64_t>(row_index * groups + (first + c) / 8), words);
    memcpy(halves, words, sizeof(halves));  // the low half of a word first, as x86 and Arm store it
    const int64_t count = cols - c < 8 * kLanes ? cols - c : 8 * kLanes;
    for (int64_t i = 0; i < count; ++i) row[c + i] = halves[i] >= threshold ? row[c + i] * scale : 0.0f;
  }
}

#if defined(__AVX512BF16__)

// By intrinsics: no compiler makes the pair product of its own accord. Measured at 1.8 times the float32 rate.

inline __m512bh as_pairs(__m512i bits) { return reinterpret_cast<const __m512bh&>(bits); }

template <int R>
void reduce_column_pairs_of(
    const uint16_t* tile, int64_t ld, int64_t cols, const uint32_t* t, float* out) {
  __m512 sums[R];
  for (int i = 0; i < R; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t c = 0; c < cols; c += 2) {
    const __m512bh factors = as_pairs(_mm512_loadu_si512(t + c / 2 * kLanes));
    for (int i = 0; i < R; ++i) {
      int pair;
      memcpy(&pair, tile + i * ld + c, sizeof(pair));
      sums[i] = _mm512_dpbf16_ps(sums[i], as_pairs(_mm512_set1_epi32(pair)), factors);
    }
  }
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

// Ranks [0, 8) of t and out, C vectors of columns: a whole cache line of every row at a visit.
template <int C>
void reduce_row_pairs_of(
    const uint16_t* tile, int64_t ld, int64_t rows, const uint32_t* t, float* out, int64_t ld_out) {
  __m512 sums[8][C];
  for (int j = 0; j < 8; ++j)
    for (int v = 0; v < C; ++v) sums[j][v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < rows; i += 2) {
    __m512bh values[C];
    for (int v = 0; v < C; ++v) {
      const uint16_t* first = tile + i * ld + v * kLanes;
      values[v] = as_pairs(row_pairs(first, i + 1 < rows ? first + ld : kNoRow));
    }
    for (int j = 0; j < 8; ++j) {
      const __m512bh factor = as_pairs(_mm512_set1_epi32(static_cast<int>(t[i / 2 * kLanes + j])));
      for (int v = 0; v < C; ++v) sums[j][v] = _mm512_dpbf16_ps(sums[j][v], factor, values[v]);
    }
  }
  for (int j = 0; j < 8; ++j)
    for (int v = 0; v < C; ++v) {
      float* to = out + j * ld_out + v * kLanes;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sums[j][v]));
    }
}

void reduce_row_pairs(
    const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* t, float* out, int64_t ld_out) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes)
    for (int64_t j = 0; j < kLanes; j += 8)
      reduce_row_pairs_of<2>(tile + c, ld, rows, t + j, out + j * ld_out + c, ld_out);
  for (; c < cols; c += kLanes)
    for (int64_t j = 0; j < kLanes; j += 8)
      reduce_row_pairs_of<1>(tile + c, ld, rows, t + j, out + j * ld_out + c, ld_out);
}

template <int R>
void expand_pairs_of(
    uint16_t* tile, int64_t ld, const uint32_t* s, int64_t pairs, const uint32_t* t, int64_t ld_t) {
  __m512 sums[R];
  for (int i = 0; i < R; ++i) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + i * ld));
    sums[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  for (int64_t j = 0; j < pairs; ++j) {
    const __m512bh factors = as_pairs(_mm512_loadu_si512(t + j * ld_t));
    for (int i = 0; i < R; ++i) {
      const int pair = static_cast<int>(s[i * pairs + j]);
      sums[i] = _mm512_dpbf16_ps(sums[i], as_pairs(_mm512_set1_epi32(pair)), factors);
    }
  }
  for (int i = 0; i < R; ++i) {
    const __m256bh rounded = _mm512_cvtneps_pbh(sums[i]);
    memcpy(tile + i * ld, &rounded, sizeof(rounded));
  }
}

void expand_pairs(
    uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* s, int64_t pairs,
    const uint32_t* t, int64_t ld_t) {
  int64_t i = 0;
  for (; i + LORAFAST_ROWS <= rows; i += LORAFAST_ROWS)
    for (int64_t c = 0; c < cols; c += kLanes)
      expand_pairs_of<LORAFAST_ROWS>(tile + i * ld + c, ld, s + i * pairs, pairs, t + c, ld_t);
  for (; i < rows; ++i)
    for (int64_t c = 0; c < cols; c += kLanes)
      expand_pairs_of<1>(tile + i * ld + c, ld, s + i * pairs, pairs, t + c, ld_t);
}

void mask_pairs(
    uint16_t* row, int64_t row_index, int64_t first, int64_t cols, int64_t groups, uint64_t seed,
    uint32_t threshold) {
  uint32_t words[4 * kLanes];
  uint16_t halves[8 * kLanes];
  for (int64_t c = 0; c < cols; c += 8 * kLanes) {
    philox(seed, static_cast<uint64_t>(row_index * groups + (first + c) / 8), words);
    memcpy(halves, words, sizeof(halves));
    const int64_t count = cols - c < 8 * kLanes ? cols - c : 8 * kLanes;
    for (int64_t i = 0; i < count; ++i) row[c + i] = halves[i] >= threshold ? row[c + i] : 0;
  }
}

const PairMicrokernels kPairs = {reduce_column_pairs, reduce_row_pairs, expand_pairs, mask_pairs};
const PairMicrokernels* const kPairsOfThisSet = &kPairs;

#else

const PairMicrokernels* const kPairsOfThisSet = nullptr;

#endif

}  // namespace

#define LORAFAST_TABLE_OF(set) microkernels_##set
#define LORAFAST_TABLE(set) LORAFAST_TABLE_OF(set)
#define LORAFAST_NAME_OF(set) #set
#define LORAFAST_NAME(set) LORAFAST_NAME_OF(set)

extern const Microkernels LORAFAST_TABLE(LORAFAST_SET);
const Microkernels LORAFAST_TABLE(LORAFAST_SET) = {
    LORAFAST_NAME(LORAFAST_SET), kPairsOfThisSet, reduce_columns, reduce_rows, expand, load, store, dropout,
};

}  // namespace lorafast
