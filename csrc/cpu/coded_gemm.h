// The base GEMM of a quantized weight W [N, K] for few rows, straight from its codes: y = x·Wᵀ + bias, or dx = dy·W. A
// tile of W is made dense in a core's caches and multiplied there; sums are float32 and rounded once.
#pragma once

#include "codes.h"

namespace lorafast::cpu {

// A tile of W, measured at 4096 x 4096 in bfloat16: whole rows, read in the order of memory, of which it has few for
// y and more for dx, whose sums are as wide as the tile.
constexpr int64_t kRows = 8, kRowsOfDx = 32, kColumns = 4096;
// Of a tile's columns that are multiplied at a time, by all rows of x: they and some of x stay in the first cache.
constexpr int64_t kPieceBytes = 2048;
template <typename Value>
constexpr int64_t kPiece = kPieceBytes / static_cast<int64_t>(sizeof(Value));
// A power of two would take all rows to the same places of a cache. Pieces of kRows rows fill it evenly.
template <typename Value>
constexpr int64_t kLd = kColumns + 512 / static_cast<int64_t>(sizeof(Value));
constexpr int64_t kLdOfDx = kColumns + kDotCols;
constexpr int64_t kSums = 1 << 16;  // of dx, for one thread
constexpr int64_t kLeastColumns = 512;
constexpr int64_t kTask = 1 << 14;  // elements that are worth a thread

template <typename Value>
constexpr Dtype kDtype = kPaired<Value> ? Dtype::kBFloat16 : Dtype::kFloat32;

inline int64_t up(int64_t length, int64_t step) { return blocks_of(length, step) * step; }

// The rows of a matrix as Value, neighbours in memory, zeros up to a multiple of `step` columns: itself, or a copy.
template <typename Value>
class Rows {
 public:
  const Value* data;
  int64_t ld;

  Rows(const Microkernels& kernels, const Matrix& x, int64_t step) : ld(up(x.cols, step)) {
    if (x.dtype == kDtype<Value> && x.col_stride == 1 && x.cols == ld) {
      data = reinterpret_cast<const Value*>(x.data);
      ld = x.row_stride;
      return;
    }
    copy_ = scratch<Value>(x.rows * ld);
    for (int64_t m = 0; m < x.rows; ++m) {
      Value* const to = &copy_[m * ld];
      if constexpr (kPaired<Value>) x.copy_row(kernels, m, 0, x.cols, to);
      else x.load_row(kernels, m, 0, x.cols, to);
      std::fill(to + x.cols, to + ld, Value{});
    }
    data = copy_.get();
  }

 private:
  Scratch<Value> copy_;
};

// W[row.., column..] made dense, zeros up to [up_rows, up_columns]. The codes of the rows below are asked for: they
// come while this tile is multiplied, a third of the time at 16 rows of x.
template <typename Value, class Codes>
void load_tile(
    const Microkernels& kernels, const Codes& codes, int64_t row, int64_t rows, int64_t column, int64_t columns,
    int64_t up_rows, int64_t up_columns, std::vector<float>& scales, Value* tile, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    if (row + rows + i < codes.N) codes.prefetch(row + rows + i, column, columns);
    codes.load(kernels, row + i, column, columns, scales, kDtype<Value>, tile + i * ld);
    std::fill(tile + i * ld + columns, tile + i * ld + up_columns, Value{});
  }
  for (int64_t i = rows; i < up_rows; ++i) std::fill_n(tile + i * ld, up_columns, Value{});
}

// The adapter's part of y, scaling · s·Bᵀ: s [M, r] in float32, rows `ld` apart, zeros beyond r.
struct LowRank {
  const float* s;
  int64_t ld;
  Matrix B;
  float scaling;
};

// y = x·Wᵀ + bias, and the adapter's part if there is one. Threads share out rows of W.
template <typename Value, class Codes>
void multiply_rows(
    const Microkernels& kernels, const Rows<Value>& x, const Codes& codes, const std::optional<Matrix>& bias,
    const Matrix& y, const LowRank* low_rank = nullptr) {
  const int64_t M = y.rows, K = codes.K, N = codes.N, ranks = low_rank == nullptr ? 0 : low_rank->ld;
  const int64_t most = M == 1 ? 1 : kRows;  // one row stays in the first cache
  const int64_t few = kTask / (most * std::max<int64_t>(K, 1)) + 1;
  torch::stable::parallel_for(0, blocks_of(N, most), few, [&](int64_t begin, int64_t end) {
    const auto tile = scratch<Value>(most * kLd<Value>);
    const auto lanes = scratch<float>(most * M * kLanes), of_B = scratch<float>(most * ranks);
    std::fill_n(of_B.get(), most * ranks, 0.0f);
    std::vector<float> scales;
    float added[kRows] = {};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * most, rows = std::min(most, N - row);
      std::fill_n(lanes.get(), K == 0 ? rows * M * kLanes : 0, 0.0f);
      for (int64_t k = 0; k < K; k += kColumns) {
        const int64_t columns = std::min(kColumns, K - k), padded = up(columns, kDotCols);
        load_tile(kernels, codes, row, rows, k, columns, rows, padded, scales, tile.get(), kLd<Value>);
        const int64_t piece = M == 1 ? kColumns : kPiece<Value>;
        for (int64_t c = 0; c < padded; c += piece)
          products<Value>(kernels).dot(
              tile.get() + c, kLd<Value>, rows, std::min(piece, padded - c), x.data + k + c, x.ld, M, lanes.get(),
              k + c > 0);
      }
      if (bias) bias->load_row(kernels, 0, row, rows, added);
      for (int64_t i = 0; ranks > 0 && i < rows; ++i) {
        float* const to = &of_B[i * ranks];
        low_rank->B.load_row(kernels, row + i, 0, low_rank->B.cols, to);
        for (int64_t j = 0; j < low_rank->B.cols; ++j) to[j] *= low_rank->scaling;
      }
      kernels.add_up(
          lanes.get(), rows, M, ranks == 0 ? nullptr : low_rank->s, of_B.get(), ranks, added, y.dtype,
          y.row_stride * size_of(y.dtype), y.at(0, row));
    }
  });
}

// dx = dy·W. Threads share out columns of W: each sum is one thread's, whatever their number.
template <typename Value, class Codes>
void multiply_columns(const Microkernels& kernels, const Matrix& dy, const Codes& codes, const Matrix& dx) {
  const int64_t M = dy.rows, K = codes.K, N = codes.N;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t cap = std::min(kColumns, std::max(kLeastColumns, kSums / M / kDotCols * kDotCols));
  const int64_t rounds = blocks_of(blocks_of(K, threads), cap);  // as many blocks for each thread
  const int64_t most = std::max(kLeastColumns, up(blocks_of(K, threads * rounds), kDotCols));
  const int64_t ld = most + kDotCols;
  const Rows<Value> from(kernels, dy, 2);
  torch::stable::parallel_for(0, blocks_of(K, most), 1, [&](int64_t begin, int64_t end) {
    const auto tile = scratch<Value>(kRowsOfDx * kLdOfDx);
    const auto sums = scratch<float>(M * ld);
    std::vector<float> scales;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t column = block * most, columns = std::min(most, K - column), padded = up(columns, kDotCols);
      std::fill_n(sums.get(), N == 0 ? M * ld : 0, 0.0f);
      for (int64_t row = 0; row < N; row += kRowsOfDx) {
        const int64_t rows = std::min(kRowsOfDx, N - row), even = up(rows, 2);
        load_tile(kernels, codes, row, rows, column, columns, even, padded, scales, tile.get(), kLdOfDx);
        products<Value>(kernels).multiply(
            tile.get(), kLdOfDx, even, padded, from.data + row, from.ld, M, sums.get(), ld, row > 0);
      }
      for (int64_t m = 0; m < M; ++m) kernels.store(&sums[m * ld], dx.dtype, columns, dx.at(m, column));
    }
  });
}

}  // namespace lorafast::cpu
