// Matrices as the kernels read and write them, cut into tiles of float32.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "../checks.h"
#include "microkernels.h"

namespace lorafast {

// A tile is small enough for the cache of one core, and a whole number of dropout's Philox calls.
constexpr int64_t kTileRows = 32;
constexpr int64_t kTileCols = 512;

inline int64_t blocks_of(int64_t length, int64_t block) { return (length + block - 1) / block; }
inline int64_t padded(int64_t length) { return blocks_of(length, kLanes) * kLanes; }

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: return Dtype::kFloat32;
  }
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// A matrix in memory, any strides.
struct Matrix {
  char* data;
  Dtype dtype;
  int64_t rows, cols, row_stride, col_stride;

  explicit Matrix(const Tensor& tensor)
      : data(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
        dtype(dtype_of(tensor)),
        rows(tensor.size(0)),
        cols(tensor.size(1)),
        row_stride(tensor.stride(0)),
        col_stride(tensor.stride(1)) {}

  char* at(int64_t row, int64_t col) const {
    return data + (row * row_stride + col * col_stride) * size_of(dtype);
  }

  // to[i] = the elements (row, first + i), i < count
  void load_row(const Microkernels& kernels, int64_t row, int64_t first, int64_t count, float* to) const {
    if (col_stride == 1) {
      kernels.load(at(row, first), dtype, count, to);
    } else {
      for (int64_t i = 0; i < count; ++i) kernels.load(at(row, first + i), dtype, 1, to + i);
    }
  }
};

// The transpose of a matrix, a view.
inline Matrix transposed(Matrix matrix) {
  std::swap(matrix.rows, matrix.cols);
  std::swap(matrix.row_stride, matrix.col_stride);
  return matrix;
}

// The mask that falls on a matrix, a function of (seed, row, column).
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float scale;

  static std::optional<Dropout> of(const std::optional<Tensor>& seed, int64_t threshold, double scale) {
    if (!seed.has_value()) return std::nullopt;
    const auto value = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    return Dropout{value, static_cast<uint32_t>(threshold), static_cast<float>(scale)};
  }

  // On a tile of a matrix of `all_cols` columns.
  void apply(
      const Microkernels& kernels, float* tile, int64_t ld, int64_t row, int64_t rows, int64_t col, int64_t cols,
      int64_t all_cols) const {
    for (int64_t i = 0; i < rows; ++i)
      kernels.dropout(tile + i * ld, row + i, col, cols, blocks_of(all_cols, 8), seed, threshold, scale);
  }
};

// A tile as the microkernels want it: where it lies if it is float32 already, a converted copy if not.
class Tile {
 public:
  Tile() : scratch_(new float[kTileRows * kTileCols]) {}

  const float* load(
      const Microkernels& kernels, const Matrix& x, int64_t row, int64_t rows, int64_t col, int64_t cols,
      const std::optional<Dropout>& dropout) {
    cols_ = padded(cols);
    if (x.dtype == Dtype::kFloat32 && x.col_stride == 1 && cols == cols_ && !dropout) {
      ld_ = x.row_stride;
      return reinterpret_cast<const float*>(x.at(row, col));
    }
    float* values = copy(kernels, x, row, rows, col, cols);
    if (dropout) dropout->apply(kernels, values, ld_, row, rows, col, cols, x.cols);
    return values;
  }

  float* copy(
      const Microkernels& kernels, const Matrix& x, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    cols_ = padded(cols);
    ld_ = kTileCols;
    for (int64_t i = 0; i < rows; ++i) {
      float* to = scratch_.get() + i * ld_;
      x.load_row(kernels, row + i, col, cols, to);
      std::fill(to + cols, to + cols_, 0.0f);
    }
    return scratch_.get();
  }

  float* zeros(int64_t rows, int64_t cols) {
    cols_ = padded(cols);
    ld_ = kTileCols;
    std::fill(scratch_.get(), scratch_.get() + rows * ld_, 0.0f);
    return scratch_.get();
  }

  int64_t ld() const { return ld_; }
  int64_t cols() const { return cols_; }

 private:
  std::unique_ptr<float[]> scratch_;
  int64_t ld_ = kTileCols, cols_ = 0;
};

// scale · matrix in rank blocks: element (i, j) at [j / kLanes][i][j % kLanes], float32, zero beyond the rank.
inline std::vector<float> pack_ranks(const Microkernels& kernels, const Matrix& matrix, float scale) {
  const int64_t rows = matrix.rows, r = matrix.cols, rank_blocks = blocks_of(r, kLanes);
  std::vector<float> packed(rank_blocks * rows * kLanes, 0.0f);
  if (matrix.col_stride == 1) {
    std::vector<float> row(r);
    for (int64_t i = 0; i < rows; ++i) {
      matrix.load_row(kernels, i, 0, r, row.data());
      for (int64_t j = 0; j < r; ++j)
        packed[((j / kLanes) * rows + i) * kLanes + j % kLanes] = scale * row[j];
    }
  } else {
    const Matrix columns = transposed(matrix);
    std::vector<float> column(rows);
    for (int64_t j = 0; j < r; ++j) {
      columns.load_row(kernels, j, 0, rows, column.data());
      float* to = &packed[(j / kLanes) * rows * kLanes + j % kLanes];
      for (int64_t i = 0; i < rows; ++i) to[i * kLanes] = scale * column[i];
    }
  }
  return packed;
}

// scale · matrixᵀ in rows: element (i, j) at [j][i], rows of `ld` floats.
inline std::vector<float> pack_transposed(const Microkernels& kernels, const Matrix& matrix, float scale, int64_t ld) {
  const int64_t rows = matrix.rows, r = matrix.cols;
  std::vector<float> packed(r * ld, 0.0f);
  if (matrix.col_stride == 1) {
    std::vector<float> row(r);
    for (int64_t i = 0; i < rows; ++i) {
      matrix.load_row(kernels, i, 0, r, row.data());
      for (int64_t j = 0; j < r; ++j) packed[j * ld + i] = scale * row[j];
    }
  } else {
    const Matrix columns = transposed(matrix);
    for (int64_t j = 0; j < r; ++j) {
      columns.load_row(kernels, j, 0, rows, &packed[j * ld]);
      for (int64_t i = 0; i < rows; ++i) packed[j * ld + i] *= scale;
    }
  }
  return packed;
}

// The pair kernels, where they can serve a matrix as it lies in memory.
inline const PairMicrokernels* pairs_for(const Microkernels& kernels, const Matrix& x) {
  const bool fits = x.dtype == Dtype::kBFloat16 && x.col_stride == 1 && x.cols % kLanes == 0;
  return fits ? kernels.pairs : nullptr;
}

// Neighbouring rows of a float32 matrix [rows, ld] as pairs of bfloat16: [ceil(rows / 2), ld].
inline std::vector<uint32_t> pair_rows(const Microkernels& kernels, const float* matrix, int64_t rows, int64_t ld) {
  std::vector<uint16_t> halves(2 * ld, 0);
  std::vector<uint32_t> paired(blocks_of(rows, 2) * ld);
  for (int64_t i = 0; i < rows; i += 2) {
    kernels.store(matrix + i * ld, Dtype::kBFloat16, ld, halves.data());
    if (i + 1 < rows) {
      kernels.store(matrix + (i + 1) * ld, Dtype::kBFloat16, ld, halves.data() + ld);
    } else {
      std::fill(halves.begin() + ld, halves.end(), 0);
    }
    for (int64_t c = 0; c < ld; ++c)
      paired[i / 2 * ld + c] = halves[c] | static_cast<uint32_t>(halves[ld + c]) << 16;
  }
  return paired;
}

// A tile of bfloat16: where it lies, or under a mask a copy (the survivors' scale is the caller's).
class PairTile {
 public:
  PairTile() : scratch_(new uint16_t[kTileRows * kTileCols]) {}

  const uint16_t* load(
      const PairMicrokernels& pairs, const Matrix& x, int64_t row, int64_t rows, int64_t col, int64_t cols,
      const std::optional<Dropout>& dropout) {
    const auto* from = reinterpret_cast<const uint16_t*>(x.at(row, col));
    ld_ = x.row_stride;
    if (!dropout) return from;
    for (int64_t i = 0; i < rows; ++i) {
      uint16_t* to = scratch_.get() + i * kTileCols;
      std::copy(from + i * ld_, from + i * ld_ + cols, to);
      pairs.mask(
          to, row + i, col, cols, blocks_of(x.cols, 8), dropout->seed, dropout->threshold);
    }
    ld_ = kTileCols;
    return scratch_.get();
  }

  int64_t ld() const { return ld_; }

 private:
  std::unique_ptr<uint16_t[]> scratch_;
  int64_t ld_ = 0;
};

}  // namespace lorafast
