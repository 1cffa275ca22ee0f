// Matrices as the kernels read and write them, and cutting them into tiles.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "microkernels.h"

namespace lorafast {

inline int64_t blocks_of(int64_t length, int64_t block) { return (length + block - 1) / block; }
inline int64_t padded(int64_t length) { return blocks_of(length, kLanes) * kLanes; }

// Whole cache lines: a vector that lies in two of them is loaded twice.
constexpr std::align_val_t kLine{64};

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, kLine); }
};

template <typename T>
using Scratch = std::unique_ptr<T[], Release>;

template <typename T>
Scratch<T> scratch(int64_t count) {  // not cleared, unlike a vector
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T);
  return Scratch<T>(static_cast<T*>(::operator new(bytes, kLine)));
}

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

  Matrix(void* first, Dtype type, int64_t m, int64_t n, int64_t row_step, int64_t col_step)
      : data(static_cast<char*>(first)),
        dtype(type),
        rows(m),
        cols(n),
        row_stride(row_step),
        col_stride(col_step) {}

  char* at(int64_t row, int64_t col) const {
    return data + (row * row_stride + col * col_stride) * size_of(dtype);
  }

  // The rows [first, last), a view.
  Matrix rows_from(int64_t first, int64_t last) const {
    Matrix part = *this;
    part.data = at(first, 0);
    part.rows = last - first;
    return part;
  }

  // to[i] = the elements (row, first + i), i < count
  void load_row(const Microkernels& kernels, int64_t row, int64_t first, int64_t count, float* to) const {
    if (col_stride == 1) {
      kernels.load(at(row, first), dtype, count, to);
    } else if (col_stride == 0) {  // expanded, as the gradient of a sum
      kernels.load(at(row, first), dtype, 1, to);
      std::fill(to + 1, to + count, to[0]);
    } else {
      for (int64_t i = 0; i < count; ++i) kernels.load(at(row, first + i), dtype, 1, to + i);
    }
  }

  // the same, as bfloat16
  void copy_row(const Microkernels& kernels, int64_t row, int64_t first, int64_t count, uint16_t* to) const {
    if (dtype == Dtype::kBFloat16 && col_stride == 1) {
      std::memcpy(to, at(row, first), count * sizeof(uint16_t));
      return;
    }
    float values[1024];
    for (int64_t done = 0; done < count; done += 1024) {
      const int64_t some = std::min<int64_t>(count - done, 1024);
      load_row(kernels, row, first + done, some, values);
      kernels.store(values, Dtype::kBFloat16, some, to + done);
    }
  }
};

// An output that sums nothing. An empty matrix has no memory: no kernel may come near one.
inline void clear(const Tensor& output) {
  if (output.numel() == 0) return;
  std::memset(output.mutable_data_ptr(), 0, static_cast<size_t>(output.numel()) * output.element_size());
}

// Rows of a matrix, a view.
inline Matrix rows_between(Matrix matrix, int64_t first, int64_t end) {
  matrix.data = matrix.at(first, 0);
  matrix.rows = end - first;
  return matrix;
}

// The transpose of a matrix, a view.
inline Matrix transposed(Matrix matrix) {
  std::swap(matrix.rows, matrix.cols);
  std::swap(matrix.row_stride, matrix.col_stride);
  return matrix;
}

// bias [N] as one row.
inline std::optional<Matrix> row_of_bias(const std::optional<Tensor>& bias, int64_t N, const OneDevice& device) {
  if (!bias.has_value()) return std::nullopt;
  STD_TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == N, "bias has ", bias->dim(), " dimensions and ", bias->numel(),
      " elements, expected [", N, "]");
  check_float("bias", *bias, device);
  return Matrix(const_cast<void*>(bias->const_data_ptr()), dtype_of(*bias), 1, N, N, bias->stride(0));
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

  // The bits of a tile of a matrix of `all_cols` columns.
  void keep(
      const Microkernels& kernels, int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t all_cols,
      uint8_t* bits) const {
    for (int64_t i = 0; i < rows; ++i)
      kernels.keep(row + i, col, cols, blocks_of(all_cols, 8), seed, threshold, bits + i * kKeepRow);
  }
};

// The products that read tiles of Value: bfloat16 in pairs, or float32.
template <typename Value>
constexpr bool kPaired = std::is_same_v<Value, uint16_t>;

template <typename Value>
using Factor = std::conditional_t<kPaired<Value>, uint32_t, float>;

// Elements of a row of x that one factor multiplies.
template <typename Value>
constexpr int64_t kPer = kPaired<Value> ? 2 : 1;

template <typename Value>
const Products<Value, Factor<Value>>& products(const Microkernels& kernels) {
  if constexpr (kPaired<Value>) return *kernels.pairs;
  else return kernels.floats;
}

// Calls serve with a uint16_t if the pair products can read x as it lies in memory, else with a float.
template <typename Serve>
void choose_products(const Microkernels& kernels, const Matrix& x, Serve serve) {
  if (kernels.pairs && x.dtype == Dtype::kBFloat16 && x.col_stride == 1 && x.cols % kLanes == 0) serve(uint16_t{});
  else serve(float{});
}

// A tile in memory.
template <typename Value>
struct Tile {
  Value* data;
  int64_t ld, cols;  // cols is a multiple of kLanes
};

// Cuts tiles out of a matrix, for one thread: the next one overwrites the last.
template <typename Value>
class Tiles {
 public:
  Tiles(const Microkernels& kernels, const Matrix& x)
      : kernels_(kernels), x_(x), scratch_(scratch<Value>(kTileRows * kTileCols)) {}

  // Where it lies; or if it can't be read there, a copy in float32 with zeros beyond the last column.
  Tile<Value> at(int64_t row, int64_t rows, int64_t col, int64_t cols) {
    if (in_place(cols)) return {reinterpret_cast<Value*>(x_.at(row, col)), x_.row_stride, cols};
    const Tile<Value> tile = {scratch_.get(), kTileCols, padded(cols)};
    if constexpr (!kPaired<Value>) {
      for (int64_t i = 0; i < rows; ++i) {
        Value* to = tile.data + i * tile.ld;
        x_.load_row(kernels_, row + i, col, cols, to);
        std::fill(to + cols, to + tile.cols, 0.0f);
      }
    }
    return tile;
  }

  // The same in a copy, zero where the mask drops an element: the survivors' scale is the caller's.
  Tile<Value> at(int64_t row, int64_t rows, int64_t col, int64_t cols, const std::optional<Dropout>& dropout) {
    const Tile<Value> from = at(row, rows, col, cols);
    if (!dropout) return from;
    const Tile<Value> tile = {scratch_.get(), kTileCols, from.cols};
    for (int64_t i = 0; i < rows; ++i) {
      uint8_t* keep = keep_ + i * kKeepRow;
      const Value* next = from.data + (i + 1) * from.ld;  // comes while the mask is made
      for (int64_t c = 0; c < cols; c += 64 / static_cast<int64_t>(sizeof(Value))) __builtin_prefetch(next + c);
      dropout->keep(kernels_, row + i, 1, col, cols, x_.cols, keep);
      products<Value>(kernels_).mask(from.data + i * from.ld, from.cols, keep, tile.data + i * tile.ld);
    }
    return tile;
  }

  // The mask of the tile that at() masked last.
  const uint8_t* keep() const { return keep_; }

  // Writes back what at() copied.
  void put_back(const Tile<Value>& tile, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    if (tile.data != scratch_.get()) return;
    if constexpr (!kPaired<Value>)
      for (int64_t i = 0; i < rows; ++i)
        kernels_.store(tile.data + i * tile.ld, x_.dtype, cols, x_.at(row + i, col));
  }

 private:
  bool in_place(int64_t cols) const {
    return kPaired<Value> || (x_.dtype == Dtype::kFloat32 && x_.col_stride == 1 && cols % kLanes == 0);
  }

  const Microkernels& kernels_;
  const Matrix& x_;
  Scratch<Value> scratch_;
  uint8_t keep_[kTileRows * kKeepRow];
};

// Rows of sums over rank blocks, [rank_blocks][kTileRows][kLanes], times scale, into rows of a matrix [M, r].
inline void store_ranks(
    const Microkernels& kernels, const float* sums, float scale, const Matrix& to, int64_t row, int64_t rows) {
  const int64_t r = to.cols;
  float values[kLanes];
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t first = 0; first < r; first += kLanes) {
      const int64_t count = std::min(kLanes, r - first);
      for (int64_t j = 0; j < count; ++j) values[j] = scale * sums[(first * kTileRows) + i * kLanes + j];
      kernels.store(values, to.dtype, count, to.at(row + i, first));
    }
}

}  // namespace lorafast
