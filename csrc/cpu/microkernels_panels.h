// Part of microkernels_impl.h: a whole base GEMM in bfloat16, a panel of its columns at a time.
//
// kPanelRows x kPanel sums stay in registers from the first term to the last: an element's terms are added in their
// order, wherever its tile begins.

#if defined(__AVX512BF16__)

constexpr int kPanelVectors = kPanel / kLanes;

// to[p][c] = from[c][p], for 16 by 16 pairs
inline __attribute__((always_inline)) void transpose_pairs(__m512i (&rows)[kLanes], uint32_t* to) {
  __m512i other[kLanes];
  LORAFAST_UNROLL
  for (int i = 0; i < kLanes; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  LORAFAST_UNROLL
  for (int i = 0; i < kLanes; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  LORAFAST_UNROLL
  for (int i = 0; i < kLanes / 4; ++i)
    LORAFAST_UNROLL
    for (int half = 0; half < 2; ++half) {  // 4 by 4 blocks of 128 bits, transposed
      const __m512i first = rows[8 * half + i], second = rows[8 * half + i + 4];
      other[8 * half + i] = _mm512_shuffle_i32x4(first, second, 0x88);
      other[8 * half + i + 4] = _mm512_shuffle_i32x4(first, second, 0xDD);
    }
  LORAFAST_UNROLL
  for (int i = 0; i < kLanes / 2; ++i) {
    _mm512_storeu_si512(to + i * kPanel, _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * kPanel, _mm512_shuffle_i32x4(other[i], other[i + 8], 0xDD));
  }
}

// Up to kLanes columns of b, each of them neighbours in memory.
void pack_columns(const uint16_t* from, int64_t ld, int64_t pairs, int64_t cols, uint32_t* to) {
  for (int64_t p = 0; p < pairs; p += kLanes, to += kLanes * kPanel) {
    const int64_t count = pairs - p < kLanes ? pairs - p : kLanes;
    const auto wanted = static_cast<__mmask16>((1u << count) - 1);
    __m512i rows[kLanes];
    LORAFAST_UNROLL
    for (int c = 0; c < kLanes; ++c)
      rows[c] = _mm512_maskz_loadu_epi32(c < cols ? wanted : 0, from + (c < cols ? c * ld : 0) + 2 * p);
    if (count == kLanes) {
      transpose_pairs(rows, to);
    } else {
      uint32_t some[kLanes * kPanel];
      transpose_pairs(rows, some);
      for (int64_t i = 0; i < count; ++i) memcpy(to + i * kPanel, some + i * kPanel, kLanes * sizeof(*to));
    }
  }
}

// Rows of b, two at a time, their neighbours interleaved.
void pack_rows(const uint16_t* from, int64_t ld, int64_t pairs, int64_t cols, uint32_t* to) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t p = 0; p < pairs; ++p, to += kPanel)
    for (int64_t c = 0; c < kPanel; c += 2 * kLanes) {
      const int64_t count = cols - c < 0 ? 0 : (cols - c < 2 * kLanes ? cols - c : 2 * kLanes);
      const auto wanted = static_cast<__mmask32>((uint64_t{1} << count) - 1);
      const __m512i even = _mm512_maskz_loadu_epi16(wanted, from + 2 * p * ld + c);
      const __m512i odd = _mm512_maskz_loadu_epi16(wanted, from + (2 * p + 1) * ld + c);
      const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
      _mm512_storeu_si512(to + c, _mm512_permutex2var_epi32(low, first, high));
      _mm512_storeu_si512(to + c + kLanes, _mm512_permutex2var_epi32(low, second, high));
    }
}

void pack_panel(const uint16_t* from, int64_t ld, bool by_column, int64_t pairs, int64_t cols, uint32_t* to) {
  if (!by_column) return pack_rows(from, ld, pairs, cols, to);
  for (int64_t c = 0; c < cols; c += kLanes)
    pack_columns(from + c * ld, ld, pairs, cols - c, to + c);
}

template <int R, int V>
void multiply_panel_of(
    const uint16_t* a, int64_t lda, int64_t pairs, const uint32_t* b, const uint32_t* s, int64_t r,
    const uint32_t* t, float scale, const float* bias, uint16_t* out, int64_t ldo, int64_t cols) {
  __m512 sums[R][V];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int v = 0; v < V; ++v) sums[i][v] = _mm512_setzero_ps();
  for (int64_t j = 0; j < r; ++j) {
    __m512bh factors[V];
    LORAFAST_UNROLL
    for (int v = 0; v < V; ++v) factors[v] = as_pairs(_mm512_loadu_si512(t + (v * r + j) * kLanes));
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) {
      const __m512bh pair = as_pairs(_mm512_set1_epi32(static_cast<int>(s[i * r + j])));
      LORAFAST_UNROLL
      for (int v = 0; v < V; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], pair, factors[v]);
    }
  }
  const __m512 scales = _mm512_set1_ps(scale);
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int v = 0; v < V; ++v) sums[i][v] = _mm512_mul_ps(sums[i][v], scales);
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh factors[V];
    LORAFAST_UNROLL
    for (int v = 0; v < V; ++v) factors[v] = as_pairs(_mm512_loadu_si512(b + p * kPanel + v * kLanes));
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) {
      int two;
      memcpy(&two, a + i * lda + 2 * p, sizeof(two));
      const __m512bh pair = as_pairs(_mm512_set1_epi32(two));
      LORAFAST_UNROLL
      for (int v = 0; v < V; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], pair, factors[v]);
    }
  }
  const auto last = static_cast<__mmask16>(0xFFFFu >> (V * kLanes - cols));
  LORAFAST_UNROLL
  for (int v = 0; v < V; ++v) {
    const __m512 added = bias ? _mm512_loadu_ps(bias + v * kLanes) : _mm512_setzero_ps();
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sums[i][v], added));
      const __m256i halves = reinterpret_cast<const __m256i&>(rounded);
      _mm256_mask_storeu_epi16(out + i * ldo + v * kLanes, v + 1 < V ? 0xFFFF : last, halves);
    }
  }
}

template <int V>
void multiply_panel_by(
    const uint16_t* a, int64_t lda, int64_t rows, int64_t pairs, const uint32_t* b, const uint32_t* s, int64_t r,
    const uint32_t* t, float scale, const float* bias, uint16_t* out, int64_t ldo, int64_t cols) {
  if (rows == kPanelRows)
    return multiply_panel_of<kPanelRows, V>(a, lda, pairs, b, s, r, t, scale, bias, out, ldo, cols);
  for (int64_t i = 0; i < rows; ++i)
    multiply_panel_of<1, V>(
        a + i * lda, lda, pairs, b, s + i * r, r, t, scale, bias, out + i * ldo, ldo, cols);
}

void multiply_panel(
    const uint16_t* a, int64_t lda, int64_t rows, int64_t pairs, const uint32_t* b, const uint32_t* s, int64_t r,
    const uint32_t* t, float scale, const float* bias, uint16_t* out, int64_t ldo, int64_t cols) {
  static_assert(kPanelVectors == 4, "a case for each number of vectors");
  const auto by = cols > 3 * kLanes   ? multiply_panel_by<4>
                  : cols > 2 * kLanes ? multiply_panel_by<3>
                  : cols > kLanes     ? multiply_panel_by<2>
                                      : multiply_panel_by<1>;
  by(a, lda, rows, pairs, b, s, r, t, scale, bias, out, ldo, cols);
}

#endif
