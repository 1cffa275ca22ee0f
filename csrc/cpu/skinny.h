// The skinny products of some rows, by one thread. What each writes depends on its rows and columns alone:
// operations may share them out as they like, the bits stay the same.
#pragma once

#include "reduce_rows.h"

namespace lorafast::cpu {

// All columns of a few rows before the next rows: x is read nearly in the order of memory. Measured cold.
constexpr int64_t kFewRows = 8;

// Whether so many parts keep all threads busy.
inline bool occupy(int64_t parts) {
  const int64_t threads = torch::stable::get_num_threads();
  return parts % threads == 0 || parts >= 4 * threads;
}

// Whether the same products read both.
inline bool alike(const Microkernels& kernels, const Matrix& first, const Matrix& second) {
  bool pairs[2];
  const Matrix* const matrices[2] = {&first, &second};
  for (int i = 0; i < 2; ++i)
    choose_products(kernels, *matrices[i], [&](auto value) { pairs[i] = kPaired<decltype(value)>; });
  return pairs[0] == pairs[1];
}

// s = drop(x)·Aᵀ
template <typename Value>
class Shrink {
 public:
  Shrink(
      const Microkernels& kernels, const Matrix& x, const Matrix& lora_A, const std::optional<Dropout>& dropout,
      const Matrix& s)
      : kernels_(kernels),
        x_(x),
        s_(s),
        dropout_(dropout),
        rank_blocks_(blocks_of(s.cols, kLanes)),
        factors_(pack_for<Value>(kernels, transposed(lora_A))) {}

  // What a thread needs for itself.
  struct Thread {
    explicit Thread(const Shrink& all)
        : tiles(all.kernels_, all.x_), sums(all.rank_blocks_ * kTileRows * kLanes) {}
    Tiles<Value> tiles;
    std::vector<float> sums;
  };

  // Up to kTileRows rows.
  void block(Thread& thread, int64_t row, int64_t rows) const {
    const int64_t K = x_.cols;
    std::fill(thread.sums.begin(), thread.sums.end(), 0.0f);
    for (int64_t first = 0; first < rows; first += kFewRows)
      for (int64_t col = 0; col < K; col += kTileCols) {
        const int64_t few = std::min(kFewRows, rows - first), cols = std::min(kTileCols, K - col);
        const auto tile = thread.tiles.at(row + first, few, col, cols, dropout_);
        products<Value>(kernels_).reduce_columns(
            tile.data, tile.ld, few, cols, rank_blocks_, &factors_[col / kPer<Value> * kLanes],
            blocks_of(K, kPer<Value>) * kLanes, &thread.sums[first * kLanes], kTileRows * kLanes);
      }
    store_ranks(kernels_, thread.sums.data(), dropout_ ? dropout_->scale : 1.0f, s_, row, rows);
  }

 private:
  const Microkernels& kernels_;
  const Matrix x_, s_;
  const std::optional<Dropout> dropout_;
  const int64_t rank_blocks_;
  const Scratch<Factor<Value>> factors_;
};

// y = (y +) drop(scaling · s·Bᵀ) + bias
template <typename Value>
class Expand {
 public:
  Expand(
      const Microkernels& kernels, const Matrix& y, const Matrix& s, const Matrix& lora_B, double scaling,
      const std::optional<Dropout>& dropout, const std::optional<Matrix>& bias = std::nullopt, bool add = true)
      : kernels_(kernels),
        add_(add),
        y_(y),
        s_(s),
        dropout_(dropout),
        scale_(static_cast<float>(scaling) * (dropout ? dropout->scale : 1.0f)),
        ranks_(blocks_of(s.cols, kPer<Value>)),
        factors_(pack_for<Value>(kernels, transposed(lora_B))) {
    if (!bias) return;
    bias_.resize(padded(y.cols), 0.0f);
    bias->load_row(kernels, 0, 0, y.cols, bias_.data());
  }

  struct Thread {
    explicit Thread(const Expand& all) : tiles(all.kernels_, all.y_), rows_of_s(kTileRows * all.ranks_, 0) {}
    Tiles<Value> tiles;
    std::vector<Factor<Value>> rows_of_s;
    uint8_t keep[kTileRows * kKeepRow];
  };

  // Up to kTileRows rows of the columns [first, last); `first` is a multiple of kTileCols.
  void block(Thread& thread, int64_t row, int64_t rows, int64_t first, int64_t last) const {
    take(thread, row, rows);
    for (int64_t col = first; col < last; col += kTileCols) {
      const int64_t cols = std::min(kTileCols, last - col);
      if (dropout_) dropout_->keep(kernels_, row, rows, col, cols, y_.cols, thread.keep);
      tile(thread, row, rows, col, cols, thread.keep);
    }
  }

  // Reads s of rows that tile() is to write.
  void take(Thread& thread, int64_t row, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      Factor<Value>* to = &thread.rows_of_s[i * ranks_];
      if constexpr (kPaired<Value>) s_.copy_row(kernels_, row + i, 0, s_.cols, reinterpret_cast<uint16_t*>(to));
      else s_.load_row(kernels_, row + i, 0, s_.cols, to);
    }
  }

  // One tile, with its mask if there is dropout.
  void tile(Thread& thread, int64_t row, int64_t rows, int64_t col, int64_t cols, const uint8_t* keep) const {
    const auto tile = thread.tiles.at(row, rows, col, cols);
    products<Value>(kernels_).expand(
        tile.data, tile.ld, rows, tile.cols, thread.rows_of_s.data(), ranks_, &factors_[col * ranks_], scale_,
        dropout_ ? keep : nullptr, bias_.empty() ? nullptr : &bias_[col], add_);
    thread.tiles.put_back(tile, row, rows, col, cols);
  }

 private:
  const Microkernels& kernels_;
  const bool add_;
  const Matrix y_, s_;
  const std::optional<Dropout> dropout_;
  const float scale_;
  const int64_t ranks_;
  const Scratch<Factor<Value>> factors_;
  std::vector<float> bias_;
};

// ds = scaling · dy·B and dB = scaling · dyᵀ·s, dy read once for both
template <typename Value>
class ExpandBackward {
 public:
  ExpandBackward(
      const Microkernels& kernels, const Matrix& dy, const Matrix& s, const Matrix& lora_B, double scaling,
      const Matrix& ds)
      : sums(dy.rows, s.cols, dy.cols),
        kernels_(kernels),
        dy_(dy),
        s_(s),
        ds_(ds),
        scale_(static_cast<float>(scaling)),
        rank_blocks_(blocks_of(s.cols, kLanes)),
        factors_(pack_for<Value>(kernels, lora_B)) {}

  // Floats that hold kTileRows rows of sums over columns, as store_ranks takes them.
  int64_t block_sums() const { return rank_blocks_ * kTileRows * kLanes; }

  // A unit's part of dB, and added to `over_columns` its part of ds for each kTileRows of its rows.
  void unit(Tiles<Value>& tiles, const RowSums::Unit& unit, float* over_columns) const {
    const Matrix rows_of_s = s_.rows_from(unit.first, unit.last);
    const auto factors = pack_for<Value>(kernels_, rows_of_s);
    const int64_t packed_rows = blocks_of(rows_of_s.rows, kPer<Value>);
    for (int64_t row = unit.first; row < unit.last; row += kTileRows, over_columns += block_sums()) {
      const int64_t rows = std::min(kTileRows, unit.last - row);
      const auto tile = tiles.at(row, rows, unit.col, unit.cols);
      products<Value>(kernels_).reduce_columns(
          tile.data, tile.ld, rows, unit.cols, rank_blocks_, &factors_[unit.col / kPer<Value> * kLanes],
          blocks_of(dy_.cols, kPer<Value>) * kLanes, over_columns, kTileRows * kLanes);
      for (int64_t j = 0; j < rank_blocks_; ++j)
        products<Value>(kernels_).reduce_rows(
            tile.data, tile.ld, rows, tile.cols,
            &factors[kLanes * (j * packed_rows + (row - unit.first) / kPer<Value>)],
            sums.of(unit.chunk, j, unit.col), row > unit.first);
    }
  }

  // Up to kTileRows rows of ds from the sums over all columns.
  void store(const float* over_columns, int64_t row, int64_t rows) const {
    store_ranks(kernels_, over_columns, scale_, ds_, row, rows);
  }

  const RowSums sums;  // for dB

 private:
  const Microkernels& kernels_;
  const Matrix dy_, s_, ds_;
  const float scale_;
  const int64_t rank_blocks_;
  const Scratch<Factor<Value>> factors_;
};

// dA = dsᵀ·drop(x)
template <typename Value>
class ShrinkBackward {
 public:
  ShrinkBackward(
      const Microkernels& kernels, const Matrix& ds, const Matrix& x, const std::optional<Dropout>& dropout)
      : sums(x.rows, ds.cols, x.cols),
        kernels_(kernels),
        ds_(ds),
        dropout_(dropout),
        rank_blocks_(blocks_of(ds.cols, kLanes)) {}

  // ds of a unit's rows, as tile() takes it.
  Scratch<Factor<Value>> factors(const RowSums::Unit& unit) const {
    return pack_for<Value>(kernels_, ds_.rows_from(unit.first, unit.last));
  }

  // The part of up to kTileRows of a unit's rows, in their order.
  void tile(
      Tiles<Value>& tiles, const Factor<Value>* factors, const RowSums::Unit& unit, int64_t row,
      int64_t rows) const {
    const int64_t packed_rows = blocks_of(unit.last - unit.first, kPer<Value>);
    const auto tile = tiles.at(row, rows, unit.col, unit.cols, dropout_);
    for (int64_t j = 0; j < rank_blocks_; ++j)
      products<Value>(kernels_).reduce_rows(
          tile.data, tile.ld, rows, tile.cols,
          &factors[kLanes * (j * packed_rows + (row - unit.first) / kPer<Value>)],
          sums.of(unit.chunk, j, unit.col), row > unit.first);
  }

  const RowSums sums;

 private:
  const Microkernels& kernels_;
  const Matrix ds_;
  const std::optional<Dropout> dropout_;
  const int64_t rank_blocks_;
};

}  // namespace lorafast::cpu
