// ds = scaling · dy·B and dB = scaling · dyᵀ·s, dy read once for both:
// dy [M, N], s [M, r], lora_B [N, r] → ds [M, r], dB [N, r]. Threads share out chunks of rows.
#include "operations.h"
#include "reduce_rows.h"

namespace lorafast::cpu {

void expand_backward(
    const Tensor& dy, const Tensor& s, const Tensor& lora_B, double scaling, Tensor ds, Tensor dB) {
  const int64_t M = dy.size(0), N = dy.size(1), r = lora_B.size(1);
  check_matrix("dy", dy, M, N);
  check_matrix("s", s, M, r);
  check_matrix("lora_B", lora_B, N, r);
  check_output("ds", ds, M, r);
  check_output("dB", dB, N, r);
  const Microkernels& kernels = microkernels();
  const Matrix from(dy), to(ds), shrunk(s);
  const int64_t rank_blocks = blocks_of(r, kLanes);
  const std::vector<float> factors = pack_ranks(kernels, Matrix(lora_B), static_cast<float>(scaling));
  const std::vector<float> rows_of_s = pack_ranks(kernels, shrunk, 1.0f);
  RowSums row_sums(M, r, N);
  const PairMicrokernels* pairs = pairs_for(kernels, from);
  std::vector<uint32_t> factor_pairs;  // N is even: rank blocks don't meet in a pair
  std::vector<std::vector<uint32_t>> s_pairs;
  if (pairs) {
    factor_pairs = pair_rows(kernels, factors.data(), rank_blocks * N, kLanes);
    for (int64_t j = 0; j < rank_blocks; ++j)
      s_pairs.push_back(pair_rows(kernels, &rows_of_s[j * M * kLanes], M, kLanes));
  }

  torch::stable::parallel_for(0, row_sums.chunks, 1, [&](int64_t begin, int64_t end) {
    Tile tile;
    std::vector<float> sums(rank_blocks * kTileRows * kLanes), row_of_ds(rank_blocks * kLanes);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = std::min((chunk + 1) * row_sums.chunk_rows, M);
      for (int64_t row = chunk * row_sums.chunk_rows; row < last; row += kTileRows) {
        const int64_t rows = std::min(kTileRows, last - row);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t col = 0; col < N; col += kTileCols) {
          const int64_t cols = std::min(kTileCols, N - col);
          if (pairs) {
            const auto* values = reinterpret_cast<const uint16_t*>(from.at(row, col));
            for (int64_t j = 0; j < rank_blocks; ++j) {
              pairs->reduce_columns(
                  values, from.row_stride, rows, cols, &factor_pairs[(j * N + col) / 2 * kLanes],
                  &sums[j * kTileRows * kLanes]);
              pairs->reduce_rows(
                  values, from.row_stride, rows, cols, &s_pairs[j][row / 2 * kLanes],
                  row_sums.of(chunk, j, col), row_sums.ld());
            }
            continue;
          }
          const float* values = tile.load(kernels, from, row, rows, col, cols, std::nullopt);
          for (int64_t j = 0; j < rank_blocks; ++j) {
            kernels.reduce_columns(
                values, tile.ld(), rows, cols, &factors[(j * N + col) * kLanes], &sums[j * kTileRows * kLanes]);
            kernels.reduce_rows(
                values, tile.ld(), rows, tile.cols(), &rows_of_s[(j * M + row) * kLanes],
                row_sums.of(chunk, j, col), row_sums.ld());
          }
        }
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < r; ++j)
            row_of_ds[j] = sums[((j / kLanes) * kTileRows + i) * kLanes + j % kLanes];
          kernels.store(row_of_ds.data(), to.dtype, r, to.at(row + i, 0));
        }
      }
    }
  });
  row_sums.add_up(kernels, transposed(Matrix(dB)), static_cast<float>(scaling));
}

}  // namespace lorafast::cpu
