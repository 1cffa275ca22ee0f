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

template <bool kLowFirst, typename Word>
void four_bit_of(
    const uint8_t* codes, int64_t first, int64_t count, const float* numbers, const float* scales, int64_t before,
    int64_t block, Dtype stored, Dtype dtype, Word* to) {
  const Vector of_codes = *reinterpret_cast<const Vector*>(numbers);
  for (const int64_t end = first + count; first < end; ++scales, before = 0) {
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

void eight_bit(
    const uint8_t* codes, int64_t count, bool integers, float scale, Dtype stored, Dtype dtype, void* to) {
  float values[kSome];
  uint16_t halves[kSome];
  char* out = static_cast<char*>(to);
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
