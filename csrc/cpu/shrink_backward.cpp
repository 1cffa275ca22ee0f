// dA = dsᵀ·drop(x): ds [M, r], x [M, K] → dA [r, K].
#include "operations.h"
#include "skinny.h"

namespace lorafast::cpu {

void shrink_backward(
    const Tensor& ds, const Tensor& x, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor dA) {
  const int64_t M = x.size(0), K = x.size(1), r = ds.size(1);
  const OneDevice device(kDevice, "x", x);
  check_matrix("x", x, M, K, device);
  check_matrix("ds", ds, M, r, device);
  check_output("dA", dA, r, K, device);
  check_seed(seed, threshold, device);
  if (M == 0 || K == 0 || r == 0) return clear(dA);
  const Microkernels& kernels = microkernels();
  const auto dropout = Dropout::of(seed, threshold, survivor_scale);
  const Matrix from(x);

  choose_products(kernels, from, [&](auto value) {
    using Value = decltype(value);
    const ShrinkBackward<Value> all(kernels, Matrix(ds), from, dropout);
    torch::stable::parallel_for(0, all.sums.units(), 1, [&](int64_t begin, int64_t end) {
      Tiles<Value> tiles(kernels, from);
      for (int64_t index = begin; index < end; ++index) {
        const RowSums::Unit unit = all.sums.unit(index);
        const auto factors = all.factors(unit);
        for (int64_t row = unit.first; row < unit.last; row += kTileRows)
          all.tile(tiles, factors.get(), unit, row, std::min(kTileRows, unit.last - row));
      }
    });
    all.sums.add_up(kernels, Matrix(dA), dropout ? dropout->scale : 1.0f);
  });
}

}  // namespace lorafast::cpu
