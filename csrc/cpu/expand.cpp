// y += drop(scaling · s·Bᵀ), in place: y [M, N], s [M, r], lora_B [N, r]. Threads share out row blocks.
#include "operations.h"
#include "pack.h"

namespace lorafast::cpu {

constexpr int64_t kFewBlocks = 16;

void add_expanded(
    const Matrix& y, const Matrix& s, const Matrix& lora_B, double scaling,
    const std::optional<Dropout>& dropout) {
  const int64_t M = y.rows, N = y.cols, r = lora_B.cols;
  if (M == 0 || N == 0 || r == 0) return;
  const Microkernels& kernels = microkernels();
  const float scale = static_cast<float>(scaling) * (dropout ? dropout->scale : 1.0f);

  choose_products(kernels, y, [&](auto value) {
    using Value = decltype(value);
    const auto factors = pack_for<Value>(kernels, transposed(lora_B));
    const int64_t ranks = blocks_of(r, kPer<Value>);
    // Few rows are shared out by columns too: every tile is computed by itself, so the bits stay the same.
    const int64_t row_blocks = blocks_of(M, kTileRows),
                  stripes = row_blocks < kFewBlocks ? blocks_of(N, kTileCols) : 1;
    const int64_t stripe_cols = stripes > 1 ? kTileCols : N;
    torch::stable::parallel_for(0, row_blocks * stripes, 1, [&](int64_t begin, int64_t end) {
      Tiles<Value> tiles(kernels, y);
      std::vector<Factor<Value>> rows_of_s(kTileRows * ranks, 0);
      uint8_t keep[kTileRows * kKeepRow];
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit / stripes * kTileRows, rows = std::min(kTileRows, M - row);
        const int64_t first = unit % stripes * stripe_cols, last = std::min(first + stripe_cols, N);
        for (int64_t i = 0; i < rows; ++i) {
          if constexpr (kPaired<Value>)
            s.copy_row(kernels, row + i, 0, r, reinterpret_cast<uint16_t*>(&rows_of_s[i * ranks]));
          else s.load_row(kernels, row + i, 0, r, &rows_of_s[i * ranks]);
        }
        for (int64_t col = first; col < last; col += kTileCols) {
          const int64_t cols = std::min(kTileCols, last - col);
          if (dropout) dropout->keep(kernels, row, rows, col, cols, N, keep);
          const auto tile = tiles.at(row, rows, col, cols);
          products<Value>(kernels).expand(
              tile.data, tile.ld, rows, tile.cols, rows_of_s.data(), ranks, &factors[col * ranks], scale,
              dropout ? keep : nullptr);
          tiles.put_back(tile, row, rows, col, cols);
        }
      }
    });
  });
}

void expand_(
    Tensor y, const Tensor& s, const Tensor& lora_B, double scaling, const std::optional<Tensor>& seed,
    int64_t threshold, double survivor_scale) {
  const int64_t M = y.size(0), N = y.size(1), r = lora_B.size(1);
  const OneDevice device(kDevice, "y", y);
  check_output("y", y, M, N, device);
  check_matrix("s", s, M, r, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_seed(seed, threshold, device);
  add_expanded(Matrix(y), Matrix(s), Matrix(lora_B), scaling, Dropout::of(seed, threshold, survivor_scale));
}

}  // namespace lorafast::cpu
