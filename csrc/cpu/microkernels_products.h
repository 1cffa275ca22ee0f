// Part of microkernels_impl.h: products with few rows, by a tile of a weight that was made dense a moment ago.
//
// Sums stay in registers: R rows of the tile by C rows of x, or C rows of dy by kWide columns of the tile.

// What a set's registers hold: kDot x kDot accumulators of kLanes floats.
constexpr int kDot = LORAFAST_ROWS / 2;

template <int R, int C>
void dot_of(
    const float* tile, int64_t ld, int64_t cols, const float* x, int64_t ldx, int64_t M, float* out, bool add) {
  Vector sums[R][C];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int m = 0; m < C; ++m) sums[i][m] = Vector{};
  for (int64_t c = 0; c < cols; c += kLanes) {
    Vector values[R];
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) values[i] = *reinterpret_cast<const Vector*>(tile + i * ld + c);
    LORAFAST_UNROLL
    for (int m = 0; m < C; ++m) {
      const Vector factors = *reinterpret_cast<const Vector*>(x + m * ldx + c);
      LORAFAST_UNROLL
      for (int i = 0; i < R; ++i) sums[i][m] += values[i] * factors;
    }
  }
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int m = 0; m < C; ++m) {
      Vector& to = *reinterpret_cast<Vector*>(out + (i * M + m) * kLanes);
      to = add ? to + sums[i][m] : sums[i][m];
    }
}

template <int C>
void dot_rows(
    const float* tile, int64_t ld, int64_t rows, int64_t cols, const float* x, int64_t ldx, int64_t M, float* out,
    bool add) {
  int64_t i = 0;
  for (; i + kDot <= rows; i += kDot)
    dot_of<kDot, C>(tile + i * ld, ld, cols, x, ldx, M, out + i * M * kLanes, add);
  for (; i < rows; ++i) dot_of<1, C>(tile + i * ld, ld, cols, x, ldx, M, out + i * M * kLanes, add);
}

void dot(
    const float* tile, int64_t ld, int64_t rows, int64_t cols, const float* x, int64_t ldx, int64_t M, float* out,
    bool add) {
  int64_t m = 0;
  for (; m + kDot <= M; m += kDot)
    dot_rows<kDot>(tile, ld, rows, cols, x + m * ldx, ldx, M, out + m * kLanes, add);
  for (; m < M; ++m) dot_rows<1>(tile, ld, rows, cols, x + m * ldx, ldx, M, out + m * kLanes, add);
}

// The lanes of an element's sum and those of its adapter's part, which are added up together.
inline __attribute__((always_inline)) Vector
lanes_of(const float* out, const float* s, const float* b, int64_t r) {
  Vector lanes = *reinterpret_cast<const Vector*>(out);
  for (int64_t j = 0; j < r; j += kLanes)
    lanes += *reinterpret_cast<const Vector*>(s + j) * *reinterpret_cast<const Vector*>(b + j);
  return lanes;
}

inline float sum_of_lanes(const Vector& lanes) {
  float halves[kLanes / 2];
  for (int c = 0; c < kLanes / 2; ++c) halves[c] = lanes[c] + lanes[c + kLanes / 2];
  for (int c = 0; c < kLanes / 4; ++c) halves[c] += halves[c + kLanes / 4];
  return (halves[0] + halves[2]) + (halves[1] + halves[3]);
}

#if defined(__AVX512F__)
// a and b halved: lanes Half apart are added, within groups of twice as many.
template <int Half>
inline __attribute__((always_inline)) __m512 halved(__m512 a, __m512 b) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i first = _mm512_add_epi32(lane, _mm512_andnot_si512(_mm512_set1_epi32(Half - 1), lane));
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(Half));
  return _mm512_add_ps(_mm512_permutex2var_ps(a, first, b), _mm512_permutex2var_ps(a, second, b));
}

// The sums of lanes of 16 vectors, added in the order of sum_of_lanes.
inline __attribute__((always_inline)) Vector sums_of_lanes(const Vector (&lanes)[kLanes]) {
  __m512 eighths[8], quarters[4];
  LORAFAST_UNROLL
  for (int i = 0; i < 8; ++i) eighths[i] = halved<8>((__m512)lanes[2 * i], (__m512)lanes[2 * i + 1]);
  LORAFAST_UNROLL
  for (int i = 0; i < 4; ++i) quarters[i] = halved<4>(eighths[2 * i], eighths[2 * i + 1]);
  return (Vector)halved<1>(halved<2>(quarters[0], quarters[1]), halved<2>(quarters[2], quarters[3]));
}
#endif

void add_up(
    const float* out, int64_t rows, int64_t M, const float* s, const float* b, int64_t r, const float* added,
    Dtype dtype, int64_t step, void* y) {
  char* const to = static_cast<char*>(y);
  int64_t m = 0;
#if defined(__AVX512F__)
  constexpr int64_t kHalf = kLanes / 2;
  if (rows == kHalf) {  // by two rows of y
    const __m256 of_half = _mm256_loadu_ps(added);
    const Vector added_twice = (Vector)_mm512_insertf32x8(_mm512_castps256_ps512(of_half), of_half, 1);
    for (; m + 2 <= M; m += 2) {
      Vector lanes[kLanes];
      LORAFAST_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = i % kHalf, of_y = m + i / kHalf;
        lanes[i] = lanes_of(out + (row * M + of_y) * kLanes, s + of_y * r, b + row * r, r);
      }
      const Vector sums = sums_of_lanes(lanes) + added_twice;
      if (dtype == Dtype::kFloat32) {
        memcpy(to + m * step, &sums, sizeof(sums) / 2);
        memcpy(to + (m + 1) * step, reinterpret_cast<const char*>(&sums) + sizeof(sums) / 2, sizeof(sums) / 2);
      } else {
        const Halves halves = halves_of(sums, dtype);
        memcpy(to + m * step, &halves, sizeof(halves) / 2);
        memcpy(to + (m + 1) * step, reinterpret_cast<const char*>(&halves) + sizeof(halves) / 2, sizeof(halves) / 2);
      }
    }
  }
#endif
  constexpr int64_t kSome = 16;
  for (; m < M; ++m)
    for (int64_t first = 0; first < rows; first += kSome) {
      const int64_t count = rows - first < kSome ? rows - first : kSome;
      float sums[kSome];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = first + i;
        sums[i] = sum_of_lanes(lanes_of(out + (row * M + m) * kLanes, s + m * r, b + row * r, r)) + added[row];
      }
      store(sums, dtype, count, to + m * step + first * (dtype == Dtype::kFloat32 ? 4 : 2));
    }
}

template <int C>
void multiply_of(
    const float* tile, int64_t ld, int64_t rows, int64_t cols, const float* t, int64_t ldt, float* out,
    int64_t ldo, bool add) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    Vector sums[C];
    LORAFAST_UNROLL
    for (int m = 0; m < C; ++m) sums[m] = Vector{};
    for (int64_t i = 0; i < rows; ++i) {
      const Vector values = *reinterpret_cast<const Vector*>(tile + i * ld + c);
      LORAFAST_UNROLL
      for (int m = 0; m < C; ++m) sums[m] += t[m * ldt + i] * values;
    }
    LORAFAST_UNROLL
    for (int m = 0; m < C; ++m) {
      Vector& to = *reinterpret_cast<Vector*>(out + m * ldo + c);
      to = add ? to + sums[m] : sums[m];
    }
  }
}

void multiply(
    const float* tile, int64_t ld, int64_t rows, int64_t cols, const float* t, int64_t ldt, int64_t M, float* out,
    int64_t ldo, bool add) {
  int64_t m = 0;
  for (; m + LORAFAST_ROWS <= M; m += LORAFAST_ROWS)
    multiply_of<LORAFAST_ROWS>(tile, ld, rows, cols, t + m * ldt, ldt, out + m * ldo, ldo, add);
  for (; m < M; ++m) multiply_of<1>(tile, ld, rows, cols, t + m * ldt, ldt, out + m * ldo, ldo, add);
}

#if defined(__AVX512BF16__)

inline __attribute__((always_inline)) __m512bh pairs_at(const uint16_t* from) {
  return reinterpret_cast<const __m512bh&>(static_cast<const __m512i&>(_mm512_loadu_si512(from)));
}

// Adds sums of lanes to what is there, or writes them.
inline __attribute__((always_inline)) void put(float* to, __m512 sums, bool add) {
  _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sums) : sums);
}

template <int R, int C>
void dot_pairs_of(
    const uint16_t* tile, int64_t ld, int64_t cols, const uint16_t* x, int64_t ldx, int64_t M, float* out,
    bool add) {
  __m512 sums[R][C];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int m = 0; m < C; ++m) sums[i][m] = _mm512_setzero_ps();
  for (int64_t c = 0; c < cols; c += 2 * kLanes) {
    __m512bh factors[C];
    LORAFAST_UNROLL
    for (int m = 0; m < C; ++m) factors[m] = pairs_at(x + m * ldx + c);
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) {
      const __m512bh values = pairs_at(tile + i * ld + c);
      LORAFAST_UNROLL
      for (int m = 0; m < C; ++m) sums[i][m] = _mm512_dpbf16_ps(sums[i][m], values, factors[m]);
    }
  }
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i)
    LORAFAST_UNROLL
    for (int m = 0; m < C; ++m) put(out + (i * M + m) * kLanes, sums[i][m], add);
}

// One row by one: four sums at a time, for a sum waits for the last.
void dot_pairs_of_one(const uint16_t* tile, int64_t cols, const uint16_t* x, float* out, bool add) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t c = 0;
  for (; c + 8 * kLanes <= cols; c += 8 * kLanes)
    LORAFAST_UNROLL
    for (int v = 0; v < 4; ++v)
      sums[v] = _mm512_dpbf16_ps(sums[v], pairs_at(tile + c + 2 * v * kLanes), pairs_at(x + c + 2 * v * kLanes));
  for (; c < cols; c += 2 * kLanes) sums[0] = _mm512_dpbf16_ps(sums[0], pairs_at(tile + c), pairs_at(x + c));
  put(out, _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])), add);
}

template <int R, int C>
void dot_pair_rows(
    const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint16_t* x, int64_t ldx, int64_t M,
    float* out, bool add) {
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    dot_pairs_of<R, C>(tile + i * ld, ld, cols, x, ldx, M, out + i * M * kLanes, add);
  for (; i < rows; ++i) dot_pairs_of<1, C>(tile + i * ld, ld, cols, x, ldx, M, out + i * M * kLanes, add);
}

void dot_pairs(
    const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint16_t* x, int64_t ldx, int64_t M,
    float* out, bool add) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4)
    dot_pair_rows<4, 4>(tile, ld, rows, cols, x + m * ldx, ldx, M, out + m * kLanes, add);
  for (; m + 2 <= M; m += 2)
    dot_pair_rows<8, 2>(tile, ld, rows, cols, x + m * ldx, ldx, M, out + m * kLanes, add);
  for (; m < M; ++m)
    for (int64_t i = 0; i < rows; ++i)
      dot_pairs_of_one(tile + i * ld, cols, x + m * ldx, out + (i * M + m) * kLanes, add);
}

// Two rows at a time, their neighbours interleaved: within lanes of 128 bits, which the last step puts in order.
template <int C>
void multiply_pairs_of(
    const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint16_t* t, int64_t ldt, float* out,
    int64_t ldo, bool add) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t c = 0; c < cols; c += 2 * kLanes) {
    __m512 sums[C][2];
    LORAFAST_UNROLL
    for (int m = 0; m < C; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; i += 2) {
      const __m512i a = _mm512_loadu_si512(tile + i * ld + c), b = _mm512_loadu_si512(tile + (i + 1) * ld + c);
      const __m512bh low = as_pairs(_mm512_unpacklo_epi16(a, b)), high = as_pairs(_mm512_unpackhi_epi16(a, b));
      LORAFAST_UNROLL
      for (int m = 0; m < C; ++m) {
        int pair;
        memcpy(&pair, t + m * ldt + i, sizeof(pair));
        const __m512bh factor = as_pairs(_mm512_set1_epi32(pair));
        sums[m][0] = _mm512_dpbf16_ps(sums[m][0], factor, low);
        sums[m][1] = _mm512_dpbf16_ps(sums[m][1], factor, high);
      }
    }
    LORAFAST_UNROLL
    for (int m = 0; m < C; ++m) {
      put(out + m * ldo + c, _mm512_permutex2var_ps(sums[m][0], first, sums[m][1]), add);
      put(out + m * ldo + c + kLanes, _mm512_permutex2var_ps(sums[m][0], second, sums[m][1]), add);
    }
  }
}

void multiply_pairs(
    const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint16_t* t, int64_t ldt, int64_t M,
    float* out, int64_t ldo, bool add) {
  int64_t m = 0;
  for (; m + 8 <= M; m += 8)
    multiply_pairs_of<8>(tile, ld, rows, cols, t + m * ldt, ldt, out + m * ldo, ldo, add);
  for (; m + 4 <= M; m += 4)
    multiply_pairs_of<4>(tile, ld, rows, cols, t + m * ldt, ldt, out + m * ldo, ldo, add);
  for (; m < M; ++m) multiply_pairs_of<1>(tile, ld, rows, cols, t + m * ldt, ldt, out + m * ldo, ldo, add);
}

#endif
