// dA = dsᵀ·drop(x): ds [M, r], x [M, K] → dA [r, K].
#include "operations.h"
#include "reduce_rows.h"

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
  const int64_t rank_blocks = blocks_of(r, kLanes);
  RowSums sums(M, r, K);

  choose_products(kernels, from, [&](auto value) {
    using Value = decltype(value);
    const auto factors = pack_for<Value>(kernels, Matrix(ds));
    const int64_t packed_rows = blocks_of(M, kPer<Value>);
    torch::stable::parallel_for(0, sums.units(), 1, [&](int64_t begin, int64_t end) {
      Tiles<Value> tiles(kernels, from);
      for (int64_t index = begin; index < end; ++index) {
        const RowSums::Unit unit = sums.unit(index);
        for (int64_t row = unit.first; row < unit.last; row += kTileRows) {
          const int64_t rows = std::min(kTileRows, unit.last - row);
          const auto tile = tiles.at(row, rows, unit.col, unit.cols, dropout);
          for (int64_t j = 0; j < rank_blocks; ++j)
            products<Value>(kernels).reduce_rows(
                tile.data, tile.ld, rows, tile.cols, &factors[kLanes * (j * packed_rows + row / kPer<Value>)],
                sums.of(unit.chunk, j, unit.col), row > unit.first);
        }
      }
    });
  });
  sums.add_up(kernels, Matrix(dA), dropout ? dropout->scale : 1.0f);
}

}  // namespace lorafast::cpu
