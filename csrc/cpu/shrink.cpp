// s = drop(x)·Aᵀ: x [M, K], lora_A [r, K] → s [M, r]. Threads share out row blocks.
#include "matrix.h"
#include "operations.h"

namespace lorafast::cpu {

void shrink(
    const Tensor& x, const Tensor& lora_A, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale, Tensor s) {
  const int64_t M = x.size(0), K = x.size(1), r = lora_A.size(0);
  check_matrix("x", x, M, K);
  check_matrix("lora_A", lora_A, r, K);
  check_output("s", s, M, r);
  check_seed(seed, threshold);
  const Microkernels& kernels = microkernels();
  const auto dropout = Dropout::of(seed, threshold, survivor_scale);
  const Matrix from(x), to(s);
  const int64_t rank_blocks = blocks_of(r, kLanes);
  const std::vector<float> factors = pack_ranks(kernels, transposed(Matrix(lora_A)), 1.0f);
  const PairMicrokernels* pairs = pairs_for(kernels, from);
  std::vector<uint32_t> factor_pairs;  // K is even: rank blocks don't meet in a pair
  if (pairs) factor_pairs = pair_rows(kernels, factors.data(), rank_blocks * K, kLanes);
  const float scale = pairs && dropout ? dropout->scale : 1.0f;

  torch::stable::parallel_for(0, blocks_of(M, kTileRows), 1, [&](int64_t begin, int64_t end) {
    Tile tile;
    PairTile pair_tile;
    std::vector<float> sums(rank_blocks * kTileRows * kLanes), row_of_s(rank_blocks * kLanes);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kTileRows, rows = std::min(kTileRows, M - row);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t col = 0; col < K; col += kTileCols) {
        const int64_t cols = std::min(kTileCols, K - col);
        if (pairs) {
          const uint16_t* values = pair_tile.load(*pairs, from, row, rows, col, cols, dropout);
          for (int64_t j = 0; j < rank_blocks; ++j)
            pairs->reduce_columns(
                values, pair_tile.ld(), rows, cols, &factor_pairs[(j * K + col) / 2 * kLanes],
                &sums[j * kTileRows * kLanes]);
          continue;
        }
        const float* values = tile.load(kernels, from, row, rows, col, cols, dropout);
        // Columns beyond K are zero in the tile; their factors would be read beyond the end.
        for (int64_t j = 0; j < rank_blocks; ++j)
          kernels.reduce_columns(
              values, tile.ld(), rows, cols, &factors[(j * K + col) * kLanes], &sums[j * kTileRows * kLanes]);
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < r; ++j)
          row_of_s[j] = scale * sums[((j / kLanes) * kTileRows + i) * kLanes + j % kLanes];
        kernels.store(row_of_s.data(), to.dtype, r, to.at(row + i, 0));
      }
    }
  });
}

}  // namespace lorafast::cpu
