// y += drop(scaling · s·Bᵀ), in place: y [M, N], s [M, r], lora_B [N, r]. Threads share out row blocks.
#include "matrix.h"
#include "operations.h"

namespace lorafast::cpu {

void expand_(
    Tensor y, const Tensor& s, const Tensor& lora_B, double scaling, const std::optional<Tensor>& seed,
    int64_t threshold, double survivor_scale) {
  const int64_t M = y.size(0), N = y.size(1), r = lora_B.size(1);
  check_output("y", y, M, N);
  check_matrix("s", s, M, r);
  check_matrix("lora_B", lora_B, N, r);
  check_seed(seed, threshold);
  const Microkernels& kernels = microkernels();
  const auto dropout = Dropout::of(seed, threshold, survivor_scale);
  const Matrix to(y), shrunk(s);
  const int64_t ld_factors = padded(N);
  const std::vector<float> factors =
      pack_transposed(kernels, Matrix(lora_B), static_cast<float>(scaling), ld_factors);
  const PairMicrokernels* pairs = dropout ? nullptr : pairs_for(kernels, to);
  const int64_t rank_pairs = blocks_of(r, 2);
  std::vector<uint32_t> factor_pairs;
  if (pairs) factor_pairs = pair_rows(kernels, factors.data(), r, ld_factors);

  torch::stable::parallel_for(0, blocks_of(M, kTileRows), 1, [&](int64_t begin, int64_t end) {
    Tile tile;
    std::vector<float> rows_of_s(kTileRows * r), row_of_y(kTileCols);
    std::vector<uint32_t> pairs_of_s(kTileRows * rank_pairs, 0);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kTileRows, rows = std::min(kTileRows, M - row);
      for (int64_t i = 0; i < rows; ++i) shrunk.load_row(kernels, row + i, 0, r, &rows_of_s[i * r]);
      if (pairs) {
        for (int64_t i = 0; i < rows; ++i)  // an odd rank's last pair has a zero from above
          kernels.store(&rows_of_s[i * r], Dtype::kBFloat16, r, &pairs_of_s[i * rank_pairs]);
        pairs->expand(
            reinterpret_cast<uint16_t*>(to.at(row, 0)), N, rows, N, pairs_of_s.data(), rank_pairs,
            factor_pairs.data(), ld_factors);
        continue;
      }
      for (int64_t col = 0; col < N; col += kTileCols) {
        const int64_t cols = std::min(kTileCols, N - col);
        if (to.dtype == Dtype::kFloat32 && cols % kLanes == 0 && !dropout) {
          kernels.expand(
              reinterpret_cast<float*>(to.at(row, col)), N, rows, cols, rows_of_s.data(), r, r, &factors[col],
              ld_factors);
          continue;
        }
        float* sums;
        if (dropout) {
          sums = tile.zeros(rows, cols);
          kernels.expand(sums, tile.ld(), rows, tile.cols(), rows_of_s.data(), r, r, &factors[col], ld_factors);
          dropout->apply(kernels, sums, tile.ld(), row, rows, col, cols, N);
          for (int64_t i = 0; i < rows; ++i) {
            to.load_row(kernels, row + i, col, cols, row_of_y.data());
            for (int64_t c = 0; c < cols; ++c) sums[i * tile.ld() + c] += row_of_y[c];
          }
        } else {
          sums = tile.copy(kernels, to, row, rows, col, cols);
          kernels.expand(sums, tile.ld(), rows, tile.cols(), rows_of_s.data(), r, r, &factors[col], ld_factors);
        }
        for (int64_t i = 0; i < rows; ++i)
          kernels.store(sums + i * tile.ld(), to.dtype, cols, to.at(row + i, col));
      }
    }
  });
}

}  // namespace lorafast::cpu
