// s = drop(x)·Aᵀ: x [M, K], lora_A [r, K] → s [M, r]. Threads share out row blocks.
#include "operations.h"
#include "skinny.h"

namespace lorafast::cpu {

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
  const Matrix from(x);

  choose_products(kernels, from, [&](auto value) {
    using Value = decltype(value);
    const Shrink<Value> all(kernels, from, Matrix(lora_A), dropout, Matrix(s));
    torch::stable::parallel_for(0, blocks_of(M, kTileRows), 1, [&](int64_t begin, int64_t end) {
      typename Shrink<Value>::Thread thread(all);
      for (int64_t row = begin * kTileRows; row < std::min(end * kTileRows, M); row += kTileRows)
        all.block(thread, row, std::min(kTileRows, M - row));
    });
  });
}

}  // namespace lorafast::cpu
