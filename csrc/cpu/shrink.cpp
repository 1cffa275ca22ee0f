// s = drop(x)·Aᵀ: x [M, K], lora_A [r, K] → s [M, r]. Threads share out row blocks.
#include "operations.h"
#include "pack.h"

namespace lorafast::cpu {

// All columns of a few rows before the next rows: x is read nearly in the order of memory. Measured cold.
constexpr int64_t kFewRows = 8;

void shrink(
    const Tensor& x, const Tensor& lora_A, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale, Tensor s) {
  const int64_t M = x.size(0), K = x.size(1), r = lora_A.size(0);
  const OneDevice device(kDevice, "x", x);
  check_matrix("x", x, M, K, device);
  check_matrix("lora_A", lora_A, r, K, device);
  check_output("s", s, M, r, device);
  check_seed(seed, threshold, device);
  if (M == 0 || K == 0 || r == 0) return clear(s);
  const Microkernels& kernels = microkernels();
  const auto dropout = Dropout::of(seed, threshold, survivor_scale);
  const Matrix from(x), to(s);
  const int64_t rank_blocks = blocks_of(r, kLanes);

  choose_products(kernels, from, [&](auto value) {
    using Value = decltype(value);
    const auto factors = pack_for<Value>(kernels, transposed(Matrix(lora_A)));
    torch::stable::parallel_for(0, blocks_of(M, kTileRows), 1, [&](int64_t begin, int64_t end) {
      Tiles<Value> tiles(kernels, from);
      std::vector<float> sums(rank_blocks * kTileRows * kLanes);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * kTileRows, rows = std::min(kTileRows, M - row);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t first = 0; first < rows; first += kFewRows)
          for (int64_t col = 0; col < K; col += kTileCols) {
            const int64_t few = std::min(kFewRows, rows - first), cols = std::min(kTileCols, K - col);
            const auto tile = tiles.at(row + first, few, col, cols, dropout);
            for (int64_t j = 0; j < rank_blocks; ++j)
              products<Value>(kernels).reduce_columns(
                  tile.data, tile.ld, few, cols, &factors[(j * K + col) / kPer<Value> * kLanes],
                  &sums[(j * kTileRows + first) * kLanes]);
          }
        store_ranks(kernels, sums.data(), dropout ? dropout->scale : 1.0f, to, row, rows);
      }
    });
  });
}

}  // namespace lorafast::cpu
