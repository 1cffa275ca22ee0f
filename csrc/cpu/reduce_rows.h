// Sums over rows, shared by dB and dA: out[j][c] = Σ over rows i of t[i][j] · y[i][c].
#pragma once

#include "matrix.h"

namespace lorafast::cpu {

// Rows are cut into chunks by their number alone, so that any number of threads adds up in the same order.
class RowSums {
 public:
  RowSums(int64_t M, int64_t r, int64_t cols)
      : chunk_rows(std::max<int64_t>(4 * kTileRows, blocks_of(blocks_of(M, kMostChunks), kTileRows) * kTileRows)),
        chunks(std::max<int64_t>(blocks_of(M, chunk_rows), 1)),
        ranks_(blocks_of(r, kLanes) * kLanes),
        ld_(padded(cols)),
        partials_(chunks * ranks_ * ld_, 0.0f) {}

  // Rank block j of a chunk's partial sums, at column `col`.
  float* of(int64_t chunk, int64_t j, int64_t col) {
    return &partials_[(chunk * ranks_ + j * kLanes) * ld_ + col];
  }
  int64_t ld() const { return ld_; }

  // to = scale · the sum of all chunks, [r, cols] with any strides
  void add_up(const Microkernels& kernels, const Matrix& to, float scale) {
    torch::stable::parallel_for(0, to.rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> total(to.cols);
      for (int64_t j = begin; j < end; ++j) {
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const float* partial = &partials_[(chunk * ranks_ + j) * ld_];
          for (int64_t c = 0; c < to.cols; ++c) total[c] += partial[c];
        }
        for (int64_t c = 0; c < to.cols; ++c) total[c] *= scale;
        if (to.col_stride == 1) {
          kernels.store(total.data(), to.dtype, to.cols, to.at(j, 0));
        } else {
          for (int64_t c = 0; c < to.cols; ++c) kernels.store(&total[c], to.dtype, 1, to.at(j, c));
        }
      }
    });
  }

  static constexpr int64_t kMostChunks = 32;
  const int64_t chunk_rows, chunks;

 private:
  int64_t ranks_, ld_;
  std::vector<float> partials_;
};

}  // namespace lorafast::cpu
