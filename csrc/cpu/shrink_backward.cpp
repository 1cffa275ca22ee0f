// dA = dsᵀ·drop(x): ds [M, r], x [M, K] → dA [r, K]. Threads share out chunks of rows.
#include "operations.h"
#include "reduce_rows.h"

namespace lorafast::cpu {

void shrink_backward(
    const Tensor& ds, const Tensor& x, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale, Tensor dA) {
  const int64_t M = x.size(0), K = x.size(1), r = ds.size(1);
  check_matrix("x", x, M, K);
  check_matrix("ds", ds, M, r);
  check_output("dA", dA, r, K);
  check_seed(seed, threshold);
  const Microkernels& kernels = microkernels();
  const auto dropout = Dropout::of(seed, threshold, survivor_scale);
  const Matrix from(x);
  const int64_t rank_blocks = blocks_of(r, kLanes);
  const std::vector<float> factors = pack_ranks(kernels, Matrix(ds), 1.0f);
  RowSums row_sums(M, r, K);
  const PairMicrokernels* pairs = pairs_for(kernels, from);
  std::vector<std::vector<uint32_t>> ds_pairs;
  for (int64_t j = 0; pairs && j < rank_blocks; ++j)
    ds_pairs.push_back(pair_rows(kernels, &factors[j * M * kLanes], M, kLanes));

  torch::stable::parallel_for(0, row_sums.chunks, 1, [&](int64_t begin, int64_t end) {
    Tile tile;
    PairTile pair_tile;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = std::min((chunk + 1) * row_sums.chunk_rows, M);
      for (int64_t row = chunk * row_sums.chunk_rows; row < last; row += kTileRows) {
        const int64_t rows = std::min(kTileRows, last - row);
        for (int64_t col = 0; col < K; col += kTileCols) {
          const int64_t cols = std::min(kTileCols, K - col);
          if (pairs) {
            const uint16_t* values = pair_tile.load(*pairs, from, row, rows, col, cols, dropout);
            for (int64_t j = 0; j < rank_blocks; ++j)
              pairs->reduce_rows(
                  values, pair_tile.ld(), rows, cols, &ds_pairs[j][row / 2 * kLanes],
                  row_sums.of(chunk, j, col), row_sums.ld());
            continue;
          }
          const float* values = tile.load(kernels, from, row, rows, col, cols, dropout);
          for (int64_t j = 0; j < rank_blocks; ++j)
            kernels.reduce_rows(
                values, tile.ld(), rows, tile.cols(), &factors[(j * M + row) * kLanes],
                row_sums.of(chunk, j, col), row_sums.ld());
        }
      }
    }
  });
  row_sums.add_up(kernels, Matrix(dA), pairs && dropout ? dropout->scale : 1.0f);
}

}  // namespace lorafast::cpu
