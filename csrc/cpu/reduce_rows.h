// Sums over rows, shared by dB and dA: out[j][c] = Σ over rows i of t[i][j] · y[i][c].
#pragma once

#include "pack.h"

namespace lorafast::cpu {

// The matrix is cut into stripes of kTileCols columns by chunks of rows, each a unit of a thread's work. The cut
// depends on the shape alone, so that any number of threads adds up in the same order. Units are numbered stripe
// by stripe: a thread then adds up what it wrote itself.
class RowSums {
 public:
  RowSums(int64_t M, int64_t r, int64_t cols)
      : chunk_rows(chunk_rows_of(M)),
        chunks(chunks_of(M)),
        stripes(blocks_of(cols, kTileCols)),
        rows_(M),
        all_cols_(cols),
        rank_blocks_(blocks_of(r, kLanes)),
        cols_(padded(cols)),
        partials_(scratch<float>(chunks * rank_blocks_ * kLanes * cols_)) {}

  static int64_t chunks_of(int64_t M) { return blocks_of(M, chunk_rows_of(M)); }
  static int64_t chunk_rows_of(int64_t M) {
    return std::max(kFewestRows, blocks_of(blocks_of(M, kMostChunks), kTileRows) * kTileRows);
  }

  struct Unit {
    int64_t chunk, first, last;  // rows [first, last)
    int64_t stripe, col, cols;   // columns [col, col + cols)
  };
  int64_t units() const { return chunks * stripes; }
  Unit unit(int64_t index) const { return unit(index % chunks, index / chunks); }
  Unit unit(int64_t chunk, int64_t stripe) const {
    const int64_t col = stripe * kTileCols, first = chunk * chunk_rows;
    return {chunk, first, std::min(first + chunk_rows, rows_), stripe, col, std::min(kTileCols, all_cols_ - col)};
  }

  // Rank block j of a chunk's partial sums from column `col` on: [.][kLanes ranks][kLanes columns], not cleared.
  float* of(int64_t chunk, int64_t j, int64_t col) const {
    return &partials_[((chunk * rank_blocks_ + j) * cols_ + col) * kLanes];
  }

  // to = scale · the sum of all chunks, [r, cols]; ranks or columns are neighbours in memory
  void add_up(const Microkernels& kernels, const Matrix& to, float scale) const {
    torch::stable::parallel_for(0, segments(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t segment = begin; segment < end; ++segment) add_up_segment(kernels, to, scale, segment);
    });
  }

  // The same in parts.
  int64_t segments() const { return blocks_of(all_cols_, kSegment); }
  void add_up_segment(const Microkernels& kernels, const Matrix& to, float scale, int64_t segment) const {
    const int64_t r = to.rows, ranks = rank_blocks_ * kLanes;
    const bool by_rank = to.col_stride == 1;
    const auto lines = scratch<float>(ranks * kSegment);
    const int64_t first = segment * kSegment, count = std::min(kSegment, to.cols - first);
    for (int64_t j = 0; j < rank_blocks_; ++j)
      for (int64_t c = 0; c < count; c += kLanes) {
        float sums[kLanes * kLanes] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const float* partial = of(chunk, j, first + c);
          for (int64_t i = 0; i < kLanes * kLanes; ++i) sums[i] += partial[i];
        }
        float* const to_block = &lines[by_rank ? j * kLanes * kSegment + c : c * ranks + j * kLanes];
        if (by_rank) {
          for (int64_t rank = 0; rank < kLanes; ++rank)
            for (int64_t lane = 0; lane < kLanes; ++lane)
              to_block[rank * kSegment + lane] = scale * sums[rank * kLanes + lane];
        } else {
          for (int64_t lane = 0; lane < kLanes; ++lane)
            for (int64_t rank = 0; rank < kLanes; ++rank)
              to_block[lane * ranks + rank] = scale * sums[rank * kLanes + lane];
        }
      }
    if (by_rank) {
      for (int64_t rank = 0; rank < r; ++rank)
        kernels.store(&lines[rank * kSegment], to.dtype, count, to.at(rank, first));
    } else {
      for (int64_t c = 0; c < count; ++c) kernels.store(&lines[c * ranks], to.dtype, r, to.at(0, first + c));
    }
  }

  const int64_t chunk_rows, chunks, stripes;

 private:
  static constexpr int64_t kFewestRows = 8 * kTileRows, kMostChunks = 16;

  int64_t rows_, all_cols_, rank_blocks_, cols_;
  Scratch<float> partials_;
};

}  // namespace lorafast::cpu
