// ds = scaling · dy·B and dB = scaling · dyᵀ·s, dy read once for both:
// dy [M, N], s [M, r], lora_B [N, r] → ds [M, r], dB [N, r].
#include "operations.h"
#include "skinny.h"

namespace lorafast::cpu {

void expand_backward(
    const Tensor& dy, const Tensor& s, const Tensor& lora_B, double scaling, Tensor ds, Tensor dB) {
  const int64_t M = dy.size(0), N = dy.size(1), r = lora_B.size(1);
  const OneDevice device(kDevice, "dy", dy);
  check_matrix("dy", dy, M, N, device);
  check_matrix("s", s, M, r, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_output("ds", ds, M, r, device);
  check_output("dB", dB, N, r, device);
  if (M == 0 || N == 0 || r == 0) {
    clear(ds);
    return clear(dB);
  }
  const Microkernels& kernels = microkernels();
  const Matrix from(dy);

  choose_products(kernels, from, [&](auto value) {
    using Value = decltype(value);
    const ExpandBackward<Value> all(kernels, from, Matrix(s), Matrix(lora_B), scaling, Matrix(ds));
    const int64_t row_blocks = blocks_of(M, kTileRows), stripe_sums = row_blocks * all.block_sums();
    std::vector<float> over_columns(all.sums.stripes * stripe_sums, 0.0f);
    torch::stable::parallel_for(0, all.sums.units(), 1, [&](int64_t begin, int64_t end) {
      Tiles<Value> tiles(kernels, from);
      for (int64_t index = begin; index < end; ++index) {
        const RowSums::Unit unit = all.sums.unit(index);
        all.unit(
            tiles, unit, &over_columns[unit.stripe * stripe_sums + unit.first / kTileRows * all.block_sums()]);
      }
    });
    torch::stable::parallel_for(0, row_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * kTileRows, sums = all.block_sums();
        float* const first = &over_columns[block * sums];
        for (int64_t stripe = 1; stripe < all.sums.stripes; ++stripe)
          for (int64_t i = 0; i < sums; ++i) first[i] += first[stripe * stripe_sums + i];
        all.store(first, row, std::min(kTileRows, M - row));
      }
    });
    all.sums.add_up(kernels, transposed(Matrix(dB)), static_cast<float>(scaling));
  });
}

}  // namespace lorafast::cpu
