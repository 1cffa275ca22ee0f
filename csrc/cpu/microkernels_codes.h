// Part of microkernels_impl.h: codes of a few bits to the numbers they stand for, times a scale.
//
// Of 4-bit codes a block's 16 numbers are scaled and rounded, and then looked up: the same bits as those of every
// element scaled and rounded by itself.

typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

// Rounded to bfloat16, in the upper halves. The processor's own instruction takes what isn't normal for 0.
inline __attribute__((always_inline)) Words rounded_words(const Vector& values) {
  const Words bits = (Words)values, nan = bits | 0x400000u;
  return ((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u;
}

// Half of the numbers' bits, or all of them.
inline __attribute__((always_inline)) Halves halves_of(const Vector& values, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return __builtin_convertvector(rounded_words(values) >> 16, Halves);
  Halves found;
  for (int i = 0; i < kLanes; ++i) found[i] = to_half(values[i]);
  return found;
}

// Rounded to another dtype than they are then stored in.
inline __attribute__((always_inline)) Vector rounded(Vector values, Dtype stored, Dtype dtype) {
  if (stored == Dtype::kFloat32 || stored == dtype) return values;
  if (stored == Dtype::kBFloat16) return (Vector)rounded_words(values);
  for (int i = 0; i < kLanes; ++i) values[i] = from_half(to_half(values[i]));
  return values;
}

// 16 numbers to look up, as 16 or 32 bits; `look_up` the codes of 16 bytes.
template <bool kLowFirst, typename Word>
struct Table;

#if defined(__AVX512F__)
template <bool kLowFirst>
struct Table<kLowFirst, uint16_t> {
  __m512i twice;

  Table(const Vector& values, Dtype dtype) : twice(_mm512_broadcast_i64x4((__m256i)halves_of(values, dtype))) {}

#if defined(__AVX512BF16__)
  // Of values that the processor's own instruction rounds rightly.
  explicit Table(const Vector& values)
      : twice(_mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh((__m512)values))) {}
#endif

  // Of 32 bytes.
  void look_up_twice(const uint8_t* codes, uint16_t* to) const {
    // Neighbours are interleaved within lanes of 128 bits: first the bytes go where that puts them in order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(bytes, order));
    const __m512i low = _mm512_permutexvar_epi16(words, twice);  // reads 5 bits
    const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), twice);
    const __m512i a = kLowFirst ? low : high, b = kLowFirst ? high : low;
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi16(a, b));
  }

  void look_up(const uint8_t* codes, uint16_t* to) const {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    // Two lanes a byte, of which 5 bits are read.
    const __m512i index = kLowFirst ? _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12))
                                    : _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index, twice));
  }
};

template <bool kLowFirst>
struct Table<kLowFirst, uint32_t> {
  __m512i values;

  Table(const Vector& scaled, Dtype) : values((__m512i)scaled) {}

  void look_up(const uint8_t* codes, uint32_t* to) const {
    for (int half = 0; half < 2; ++half) {
      long long eight;
      memcpy(&eight, codes + 8 * half, sizeof(eight));
      const __m512i bytes = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(eight));
      const __m512i index = kLowFirst ? _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28))
                                      : _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
      _mm512_storeu_si512(to + 16 * half, _mm512_permutexvar_epi32(index, values));
    }
  }
};
#elif defined(__AVX2__)
// The codes of 16 bytes, a byte each, in their order.
template <bool kLowFirst>
inline void spread(const uint8_t* codes, __m128i (&index)[2]) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  index[0] = kLowFirst ? _mm_unpacklo_epi8(low, high) : _mm_unpacklo_epi8(high, low);
  index[1] = kLowFirst ? _mm_unpackhi_epi8(low, high) : _mm_unpackhi_epi8(high, low);
}

template <bool kLowFirst>
struct Table<kLowFirst, uint16_t> {
  __m128i lows, highs;  // bytes of the numbers

  Table(const Vector& values, Dtype dtype) {
    const Halves halves = halves_of(values, dtype);
    lows = (__m128i) __builtin_convertvector(halves & 255, Bytes);
    highs = (__m128i) __builtin_convertvector(halves >> 8, Bytes);
  }

  void look_up(const uint8_t* codes, uint16_t* to) const {
    __m128i index[2];
    spread<kLowFirst>(codes, index);
    for (int half = 0; half < 2; ++half) {
      const __m128i a = _mm_shuffle_epi8(lows, index[half]), b = _mm_shuffle_epi8(highs, index[half]);
      __m128i* const at = reinterpret_cast<__m128i*>(to + 16 * half);
      _mm_storeu_si128(at, _mm_unpacklo_epi8(a, b));
      _mm_storeu_si128(at + 1, _mm_unpackhi_epi8(a, b));
    }
  }
};

template <bool kLowFirst>
struct Table<kLowFirst, uint32_t> {
  __m256 first, second;  // eight numbers each

  Table(const Vector& values, Dtype) {
    memcpy(&first, &values, sizeof(first));
    memcpy(&second, reinterpret_cast<const char*>(&values) + sizeof(first), sizeof(second));
  }

  void look_up(const uint8_t* codes, uint32_t* to) const {
    __m128i index[2];
    spread<kLowFirst>(codes, index);
    for (int part = 0; part < 4; ++part) {
      const __m128i eight = part % 2 ? _mm_srli_si128(index[part / 2], 8) : index[part / 2];
      const __m256i wide = _mm256_cvtepu8_epi32(eight);
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 28));  // its sign is bit 3
      const __m256 a = _mm256_permutevar8x32_ps(first, wide), b = _mm256_permutevar8x32_ps(second, wide);
      _mm256_storeu_ps(reinterpret_cast<float*>(to) + 8 * part, _mm256_blendv_ps(a, b, upper));
    }
  }
};
#else
template <bool kLowFirst, typename Word>
struct Table {
  Word values[16];

  Table(const Vector& scaled, Dtype dtype) {
    if (sizeof(Word) == sizeof(scaled[0])) {
      memcpy(values, &scaled, sizeof(values));
    } else {
      const Halves halves = halves_of(scaled, dtype);
      memcpy(values, &halves, sizeof(values));
    }
  }

  void look_up(const uint8_t* codes, Word* to) const {
    for (int i = 0; i < 16; ++i) {
      to[2 * i] = values[kLowFirst ? codes[i] & 15 : codes[i] >> 4];
      to[2 * i + 1] = values[kLowFirst ? codes[i] >> 4 : codes[i] & 15];
    }
  }
};
#endif

constexpr int64_t kLookup = 32;  // elements at a time

inline bool is_within(float value, float least, float most) {
  const float magnitude = value < 0 ? -value : value;
  return magnitude == 0 || (magnitude >= least && magnitude <= most);
}

#if defined(__AVX512F__)
// Whole blocks of a multiple of 64 elements, from an even one on; returns how many elements they have.
template <bool kLowFirst>
int64_t whole_blocks(
    const uint8_t* codes, int64_t count, const Vector& numbers, const float* scales, int64_t block, Dtype stored,
    Dtype dtype, uint16_t* to) {
  const int64_t blocks = count / block;
#if defined(__AVX512BF16__)
  // Then no product is a denormal, infinite or NaN.
  const __m512 sizes = _mm512_abs_ps((__m512)numbers);
  const __mmask16 within = _mm512_cmp_ps_mask(sizes, _mm512_set1_ps(0x1p-20f), _CMP_GE_OQ) &
                           _mm512_cmp_ps_mask(sizes, _mm512_set1_ps(0x1p20f), _CMP_LE_OQ);
  const bool is_plain = dtype == Dtype::kBFloat16 && stored != Dtype::kFloat16 &&
                        (within | _mm512_cmp_ps_mask(sizes, _mm512_setzero_ps(), _CMP_EQ_OQ)) == 0xFFFF;
#endif
  for (int64_t b = 0; b < blocks; ++b) {
    const auto each = [&](const Table<kLowFirst, uint16_t>& table) {
      for (int64_t i = 0; i < block; i += 2 * kLookup, codes += kLookup, to += 2 * kLookup)
        table.look_up_twice(codes, to);
    };
#if defined(__AVX512BF16__)
    if (is_plain && is_within(scales[b], 0x1p-100f, 0x1p100f)) {
      each(Table<kLowFirst, uint16_t>(numbers * scales[b]));
      continue;
    }
#endif
    each(Table<kLowFirst, uint16_t>(rounded(numbers * scales[b], stored, dtype), dtype));
  }
  return blocks * block;
}
#endif

template <bool kLowFirst, typename Word>
void four_bit_of(
    const uint8_t* codes, int64_t first, int64_t count, const float* numbers, const float* scales, int64_t before,
    int64_t block, Dtype stored, Dtype dtype, Word* to) {
  const Vector of_codes = *reinterpret_cast<const Vector*>(numbers);
  for (const int64_t end = first + count; first < end; ++scales, before = 0) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Word) == sizeof(uint16_t)) {
      if (before == 0 && first % 2 == 0 && block % (2 * kLookup) == 0 && end - first >= block) {
        const int64_t made =
            whole_blocks<kLowFirst>(codes + first / 2, end - first, of_codes, scales, block, stored, dtype, to);
        first += made;
        to += made;
        scales += made / block;
        if (first == end) return;
      }
    }
#endif
    const int64_t left = block - before, some = left < end - first ? left : end - first;
    const Table<kLowFirst, Word> table(rounded(of_codes * *scales, stored, dtype), dtype);
    int64_t i = 0;
    while (i < some) {
      const int64_t at = first + i;
      if (at % 2 == 0 && some - i >= kLookup) {
        table.look_up(codes + at / 2, to + i);
        i += kLookup;
        continue;
      }
      // Those before an even one, or too few: of up to 16 bytes, of which the rest may not be there.
      const int64_t few = at % 2 ? 1 : some - i;
      uint8_t bytes[kLookup / 2] = {};
      memcpy(bytes, codes + at / 2, static_cast<size_t>((few + at % 2 + 1) / 2));
      Word found[kLookup];
      table.look_up(bytes, found);
      memcpy(to + i, found + at % 2, static_cast<size_t>(few) * sizeof(Word));
      i += few;
    }
    to += some;
    first += some;
  }
}

void four_bit(
    const uint8_t* codes, int64_t first, int64_t count, bool low_first, const float* numbers, const float* scales,
    int64_t before, int64_t block, Dtype stored, Dtype dtype, void* to) {
  const auto with = [&](auto* out) {
    if (low_first) four_bit_of<true>(codes, first, count, numbers, scales, before, block, stored, dtype, out);
    else four_bit_of<false>(codes, first, count, numbers, scales, before, block, stored, dtype, out);
  };
  if (dtype == Dtype::kFloat32) with(static_cast<uint32_t*>(to));
  else with(static_cast<uint16_t*>(to));
}

constexpr int64_t kSome = 256;  // elements on their way, a multiple of kLanes

// e4m3 without infinities: 1.mantissa · 2^(exponent − 7), or 0.mantissa · 2^-6; 0x7F is NaN. Nothing on the way is a
// denormal, which a processor may be told to flush. Loops over words alone: every compiler takes them to vectors.
inline void from_e4m3(const uint8_t* codes, int64_t count, float* values) {
  uint32_t bits[kSome], small[kSome];
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(codes[i] & 7) * 0x1p-9f;
  memcpy(small, values, static_cast<size_t>(count) * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t rest = codes[i] & 0x7F, sign = static_cast<uint32_t>(codes[i] & 0x80) << 24;
    const uint32_t magnitude = rest == 0x7F ? 0x7FC00000u : rest < 8 ? small[i] : (rest << 20) + (120u << 23);
    bits[i] = magnitude | sign;
  }
  memcpy(values, bits, static_cast<size_t>(count) * sizeof(float));
}

// As `store`, without the processor's own rounding to bfloat16.
inline void store_exactly(const float* from, Dtype dtype, int64_t count, void* to) {
  if (dtype != Dtype::kBFloat16) return store(from, dtype, count, to);
  uint32_t bits[kSome];
  uint16_t* const halves = static_cast<uint16_t*>(to);
  memcpy(bits, from, static_cast<size_t>(count) * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t rounded = (bits[i] + 0x7FFF + (bits[i] >> 16 & 1)) >> 16;
    halves[i] = static_cast<uint16_t>((bits[i] & 0x7FFFFFFF) > 0x7F800000 ? bits[i] >> 16 | 0x40 : rounded);
  }
}

#if defined(__AVX512BF16__)
constexpr int64_t kWorthBytes = 512;  // elements that are worth a table

// What the lower 7 bits of a code stand for: the magnitude of an int8 but -128, or of an e4m3.
struct Magnitudes {
  float values[2][128];

  constexpr Magnitudes() : values() {
    float power = 0x1p-9f;
    for (int i = 0; i < 128; ++i) {
      if (i >= 16 && i % 8 == 0) power *= 2;
      values[0][i] = static_cast<float>(i % 8 + (i < 8 ? 0 : 8)) * power;
      values[1][i] = static_cast<float>(i);
    }
    values[0][127] = __builtin_nanf("");
  }
};
constexpr Magnitudes kMagnitudes;

// The same as eight_bit_pairs, 64 at a time, looked up by bytes; an instruction of its own, which some processors with
// the bfloat16 product lack.
__attribute__((target("avx512vbmi"))) int64_t
eight_bit_bytes(const uint8_t* codes, int64_t count, bool integers, float scale, uint16_t* to) {
  const float* const magnitudes = kMagnitudes.values[integers];
  const __m512 factor = _mm512_set1_ps(scale);
  __m512i low[2], high[2];  // bytes of the magnitudes · scale in bfloat16
  for (int half = 0; half < 2; ++half) {
    __m256i lows[2], highs[2];
    for (int part = 0; part < 2; ++part) {
      const float* const from = magnitudes + 64 * half + 32 * part;
      const __m512 first = _mm512_mul_ps(_mm512_loadu_ps(from), factor);
      const __m512 second = _mm512_mul_ps(_mm512_loadu_ps(from + 16), factor);
      const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
      const __m512i words = reinterpret_cast<const __m512i&>(both);
      lows[part] = _mm512_cvtepi16_epi8(words);
      highs[part] = _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8));
    }
    low[half] = _mm512_inserti64x4(_mm512_castsi256_si512(lows[0]), lows[1], 1);
    high[half] = _mm512_inserti64x4(_mm512_castsi256_si512(highs[0]), highs[1], 1);
  }
  // Bytes are interleaved within lanes of 128 bits: first they go where that puts them in order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), sign = _mm512_set1_epi8(-128);
  __m512i least = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const __m512i bytes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(codes + i));
    least = _mm512_min_epi8(least, bytes);
    const __m512i index = integers ? _mm512_abs_epi8(bytes) : bytes;  // reads 7 bits
    const __m512i lows = _mm512_permutex2var_epi8(low[0], index, low[1]);
    const __m512i highs = _mm512_permutex2var_epi8(high[0], index, high[1]);
    const __m512i with_sign = _mm512_xor_si512(highs, _mm512_and_si512(bytes, sign));
    _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(lows, with_sign));
    _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(lows, with_sign));
  }
  return integers && _mm512_cmpeq_epi8_mask(least, sign) != 0 ? 0 : i;  // -128 has no magnitude here
}

// int8 or e4m3 · scale in bfloat16, 32 at a time: how many elements are made. No product may be a denormal, which the
// processor's own rounding takes for 0, nor may a NaN come of the scale.
int64_t eight_bit_pairs(const uint8_t* codes, int64_t count, bool integers, float scale, uint16_t* to) {
  if (!is_within(scale, 0x1p-100f, 0x1p100f)) return 0;
  static const bool has_bytes = __builtin_cpu_supports("avx512vbmi");
  int64_t i = has_bytes && count >= kWorthBytes ? eight_bit_bytes(codes, count, integers, scale, to) : 0;
  if (integers) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (; i + 32 <= count; i += 32) {
      const __m128i* const from = reinterpret_cast<const __m128i*>(codes + i);
      const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
      const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
      _mm512_storeu_si512(to + i, reinterpret_cast<const __m512i&>(both));
    }
  } else {
    // The bits of a float16 of 2^-8 times the value; float16 has denormals for those of e4m3.
    const __m512 factor = _mm512_set1_ps(scale * 0x1p8f);
    const __m512i sign_and_rest = _mm512_set1_epi16(static_cast<short>(0xBF80));
    const __m512i nan = _mm512_set1_epi16(0x3F80);
    for (; i + 32 <= count; i += 32) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
      const __m512i shifted = _mm512_srai_epi16(_mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 8), 1);
      __m512i halves = _mm512_and_si512(shifted, sign_and_rest);
      const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(halves, nan), nan);
      halves = _mm512_mask_set1_epi16(halves, is_nan, 0x7E00);
      const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
      const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
      _mm512_storeu_si512(to + i, reinterpret_cast<const __m512i&>(both));
    }
  }
  return i;
}
#endif

void eight_bit(
    const uint8_t* codes, int64_t count, bool integers, float scale, Dtype stored, Dtype dtype, void* to) {
  float values[kSome];
  uint16_t halves[kSome];
  char* out = static_cast<char*>(to);
#if defined(__AVX512BF16__)
  if (dtype == Dtype::kBFloat16 && stored != Dtype::kFloat16) {
    const int64_t made = eight_bit_pairs(codes, count, integers, scale, static_cast<uint16_t*>(to));
    codes += made;
    count -= made;
    out += made * static_cast<int64_t>(sizeof(uint16_t));
  }
#endif
  for (int64_t done = 0; done < count; done += kSome) {
    const int64_t some = count - done < kSome ? count - done : kSome;
    const uint8_t* const from = codes + done;
    if (integers) {
      for (int64_t i = 0; i < some; ++i) values[i] = static_cast<float>(static_cast<int8_t>(from[i]));
    } else {
      from_e4m3(from, some, values);
    }
    for (int64_t i = 0; i < some; ++i) values[i] *= scale;
    if (stored != Dtype::kFloat32 && stored != dtype) {
      store_exactly(values, stored, some, halves);
      load(halves, stored, some, values);
    }
    store_exactly(values, dtype, some, out);
    out += some * (dtype == Dtype::kFloat32 ? 4 : 2);
  }
}
