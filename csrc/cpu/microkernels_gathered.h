// Part of microkernels_impl.h: products over rows that lie anywhere, as a convolution's windows do (Dukhan,
// "The Indirect Convolution Algorithm", 2019).

typedef uint64_t Eights __attribute__((vector_size(64), aligned(4), may_alias));

// Two neighbours, in every pair of lanes.
inline __attribute__((always_inline)) Vector spread(const float* from) {
  uint64_t two;
  memcpy(&two, from, sizeof(two));
  return (Vector)(Eights{two, two, two, two, two, two, two, two});
}

// R rows; a step over the columns takes Per of them.
template <int R, int Per>
void gather_columns_of(const float* const* rows, int64_t cols, const float* t, float* const* to) {
  Vector totals[R];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) totals[i] = *reinterpret_cast<const Vector*>(to[i]);
  const float* from[R];
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) from[i] = rows[i];
  for (int64_t first = 0; first < cols; first += kSummed * Per) {
    const int64_t last = first + kSummed * Per < cols ? first + kSummed * Per : cols;
    Vector sums[R];
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) sums[i] = Vector{};
    for (int64_t c = first; c < last; c += Per) {
      const Vector factors = *reinterpret_cast<const Vector*>(t + c / Per * kLanes);
      LORAFAST_UNROLL
      for (int i = 0; i < R; ++i) {
        if constexpr (Per == 2) sums[i] += spread(from[i] + c) * factors;
        else sums[i] += from[i][c] * factors;
      }
    }
    LORAFAST_UNROLL
    for (int i = 0; i < R; ++i) totals[i] += sums[i];
  }
  LORAFAST_UNROLL
  for (int i = 0; i < R; ++i) *reinterpret_cast<Vector*>(to[i]) = totals[i];
}

template <int Per>
void gather_columns_by(const float* const* rows, int64_t count, int64_t cols, const float* t, float* const* to) {
  constexpr int kFew = LORAFAST_ROWS < kGatheredRows ? LORAFAST_ROWS : kGatheredRows;
  int64_t i = 0;
  for (; i + LORAFAST_ROWS <= count; i += LORAFAST_ROWS)
    gather_columns_of<LORAFAST_ROWS, Per>(rows + i, cols, t, to + i);
  for (; i < count; i += kFew) gather_columns_of<kFew, Per>(rows + i, cols, t, to + i);
}

void gather_columns(
    const float* const* rows, int64_t count, int64_t cols, bool paired, const float* t, float* const* to) {
  (paired ? gather_columns_by<2> : gather_columns_by<1>)(rows, count, cols, t, to);
}

// V blocks of columns, LORAFAST_ROWS ranks: their sums stay in registers down the rows.
template <int V>
void gather_rows_of(
    const float* const* rows, int64_t col, const float* const* t, int64_t rank, int64_t count, float* out,
    int64_t out_step) {
  for (int64_t first = 0; first < count; first += kSummed) {
    const int64_t last = first + kSummed < count ? first + kSummed : count;
    Vector sums[LORAFAST_ROWS][V];
    LORAFAST_UNROLL
    for (int j = 0; j < LORAFAST_ROWS; ++j)
      LORAFAST_UNROLL
      for (int v = 0; v < V; ++v) sums[j][v] = Vector{};
    for (int64_t i = first; i < last; ++i) {
      const float *from = rows[i] + col, *factors = t[i] + rank;
      Vector values[V];
      LORAFAST_UNROLL
      for (int v = 0; v < V; ++v) values[v] = *reinterpret_cast<const Vector*>(from + v * kLanes);
      LORAFAST_UNROLL
      for (int j = 0; j < LORAFAST_ROWS; ++j)
        LORAFAST_UNROLL
        for (int v = 0; v < V; ++v) sums[j][v] += factors[j] * values[v];
    }
    LORAFAST_UNROLL
    for (int j = 0; j < LORAFAST_ROWS; ++j)
      LORAFAST_UNROLL
      for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(out + v * out_step + j * kLanes) += sums[j][v];
  }
}

void gather_rows(
    const float* const* rows, int64_t count, int64_t cols, const float* const* t, int64_t ranks, float* out) {
  constexpr int kWide = LORAFAST_ROWS > 4 ? 2 : 1;  // what the registers hold
  const int64_t step = ranks * kLanes;
  for (int64_t rank = 0; rank < ranks; rank += LORAFAST_ROWS) {
    float* to = out + rank * kLanes;
    int64_t c = 0;
    for (; c + kWide * kLanes <= cols; c += kWide * kLanes)
      gather_rows_of<kWide>(rows, c, t, rank, count, to + c / kLanes * step, step);
    for (; c < cols; c += kLanes) gather_rows_of<1>(rows, c, t, rank, count, to + c / kLanes * step, step);
  }
}
