// y += drop(scaling · s·Bᵀ), in place: y [M, N], s [M, r], lora_B [N, r]. Threads share out row blocks.
#include "operations.h"
#include "skinny.h"

namespace lorafast::cpu {

constexpr int64_t kFewBlocks = 16;

void add_expanded(
    const Matrix& y, const Matrix& s, const Matrix& lora_B, double scaling, const std::optional<Dropout>& dropout,
    const std::optional<Matrix>& bias, bool add) {
  const int64_t M = y.rows, N = y.cols, r = lora_B.cols;
  if (M == 0 || N == 0 || (r == 0 && add && !bias)) return;
  const Microkernels& kernels = microkernels();
  // Few rows are shared out by columns too.
  const int64_t row_blocks = blocks_of(M, kTileRows);
  const int64_t stripes = row_blocks < kFewBlocks ? blocks_of(N, kTileCols) : 1;
  const int64_t stripe_cols = stripes > 1 ? kTileCols : N;

  choose_products(kernels, y, [&](auto value) {
    using Value = decltype(value);
    const Expand<Value> all(kernels, y, s, lora_B, scaling, dropout, bias, add);
    torch::stable::parallel_for(0, row_blocks * stripes, 1, [&](int64_t begin, int64_t end) {
      typename Expand<Value>::Thread thread(all);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit / stripes * kTileRows, first = unit % stripes * stripe_cols;
        all.block(thread, row, std::min(kTileRows, M - row), first, std::min(first + stripe_cols, N));
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
