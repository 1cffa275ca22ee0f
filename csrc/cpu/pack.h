// Factors as the microkernels read them: blocks of kLanes neighbouring columns, row after row.
//
// Measured at 2048 columns: element by element through strides this cost as much as the products.
#pragma once

#include "matrix.h"

namespace lorafast::cpu {

constexpr int64_t kSegment = 128;  // rows of a block that are transposed at a time
constexpr int64_t kSerial = 32;    // segments that are not worth waking a second thread for

// Element (i, j) at [j / kLanes][i][j % kLanes], zero beyond the last column.
inline Scratch<float> pack(const Microkernels& kernels, const Matrix& matrix) {
  const int64_t rows = matrix.rows, cols = matrix.cols, blocks = blocks_of(cols, kLanes);
  auto packed = scratch<float>(blocks * rows * kLanes);
  if (matrix.col_stride == 1 && cols == kLanes && matrix.row_stride == cols) {
    kernels.load(matrix.data, matrix.dtype, rows * cols, packed.get());
  } else if (matrix.row_stride == 1 && matrix.col_stride != 1) {
    const Matrix columns = transposed(matrix);
    const int64_t segments = blocks_of(rows, kSegment);
    torch::stable::parallel_for(0, blocks * segments, kSerial, [&](int64_t begin, int64_t end) {
      float lanes[kLanes][kSegment] = {};
      for (int64_t part = begin; part < end; ++part) {
        const int64_t block = part / segments, first = part % segments * kSegment;
        const int64_t count = std::min(kSegment, rows - first);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t col = block * kLanes + lane;
          if (col < cols) columns.load_row(kernels, col, first, count, lanes[lane]);
          else std::fill_n(lanes[lane], count, 0.0f);
        }
        float* to = &packed[(block * rows + first) * kLanes];
        for (int64_t i = 0; i < count; ++i)
          for (int64_t lane = 0; lane < kLanes; ++lane) to[i * kLanes + lane] = lanes[lane][i];
      }
    });
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t block = 0; block < blocks; ++block) {
        float* to = &packed[(block * rows + i) * kLanes];
        const int64_t count = std::min(kLanes, cols - block * kLanes);
        matrix.load_row(kernels, i, block * kLanes, count, to);
        std::fill(to + count, to + kLanes, 0.0f);
      }
  }
  return packed;
}

// The matrix in bfloat16 with neighbouring rows or neighbouring columns next to each other: itself, or in `copy`.
inline Matrix as_bfloat16(const Microkernels& kernels, const Matrix& matrix, Scratch<uint16_t>& copy) {
  if (matrix.row_stride == 1 && matrix.col_stride != 1)
    return transposed(as_bfloat16(kernels, transposed(matrix), copy));
  if (matrix.dtype == Dtype::kBFloat16 && matrix.col_stride == 1) return matrix;
  const int64_t rows = matrix.rows, cols = matrix.cols;
  copy = scratch<uint16_t>(rows * cols);
  Matrix from = matrix;
  if (matrix.col_stride == 1 && matrix.row_stride == cols) {  // one long row
    from.rows = 1;
    from.cols = rows * cols;
  }
  for (int64_t i = 0; i < from.rows; ++i) from.copy_row(kernels, i, 0, from.cols, &copy[i * from.cols]);
  return {copy.get(), Dtype::kBFloat16, rows, cols, cols, 1};
}

// Rows 2 i and 2 i + 1 as pairs of bfloat16: element (i, j) at [j / kLanes][i][j % kLanes]; the partner of an
// odd last row is zero.
inline Scratch<uint32_t> pack_pairs(const Microkernels& kernels, const Matrix& original) {
  Scratch<uint16_t> copy;
  const Matrix matrix = as_bfloat16(kernels, original, copy);
  const int64_t rows = matrix.rows, cols = matrix.cols;
  const int64_t blocks = blocks_of(cols, kLanes), pairs = blocks_of(rows, 2);
  auto packed = scratch<uint32_t>(blocks * pairs * kLanes);
  if (matrix.col_stride != 1) {  // pairs are neighbours in memory
    const int64_t segments = blocks_of(pairs, kSegment);
    torch::stable::parallel_for(0, blocks * segments, kSerial, [&](int64_t begin, int64_t end) {
      uint32_t lanes[kLanes][kSegment];
      for (int64_t part = begin; part < end; ++part) {
        const int64_t block = part / segments, first = part % segments * kSegment;
        const int64_t count = std::min(kSegment, pairs - first);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t col = block * kLanes + lane;
          const int64_t halves = col < cols ? std::min(2 * count, rows - 2 * first) : 0;
          auto* to = reinterpret_cast<uint16_t*>(lanes[lane]);
          if (halves == kLanes) {  // rank 16: a length that the compiler knows
            std::memcpy(to, matrix.at(2 * first, col), kLanes * sizeof(uint16_t));
          } else if (halves > 0) {
            std::memcpy(to, matrix.at(2 * first, col), halves * sizeof(uint16_t));
          }
          for (int64_t i = halves; i < 2 * count; ++i) to[i] = 0;
        }
        uint32_t* to = &packed[(block * pairs + first) * kLanes];
        for (int64_t i = 0; i < count; ++i)
          for (int64_t lane = 0; lane < kLanes; ++lane) to[i * kLanes + lane] = lanes[lane][i];
      }
    });
  } else {
    const std::vector<uint16_t> zeros(cols, 0);
    for (int64_t i = 0; i < pairs; ++i) {
      const auto* low = reinterpret_cast<const uint16_t*>(matrix.at(2 * i, 0));
      const auto* high =
          2 * i + 1 < rows ? reinterpret_cast<const uint16_t*>(matrix.at(2 * i + 1, 0)) : zeros.data();
      for (int64_t block = 0; block < blocks; ++block) {
        uint32_t* to = &packed[(block * pairs + i) * kLanes];
        const int64_t first = block * kLanes, count = std::min(kLanes, cols - first);
        if (count == kLanes) {  // a loop of constant length, for the compiler's vectors
          for (int64_t lane = 0; lane < kLanes; ++lane)
            to[lane] = low[first + lane] | static_cast<uint32_t>(high[first + lane]) << 16;
        } else {
          std::fill(to, to + kLanes, 0);
          for (int64_t lane = 0; lane < count; ++lane)
            to[lane] = low[first + lane] | static_cast<uint32_t>(high[first + lane]) << 16;
        }
      }
    }
  }
  return packed;
}

// The one or the other, as tiles of Value want it.
template <typename Value>
Scratch<Factor<Value>> pack_for(const Microkernels& kernels, const Matrix& matrix) {
  if constexpr (kPaired<Value>) return pack_pairs(kernels, matrix);
  else return pack(kernels, matrix);
}

}  // namespace lorafast::cpu
