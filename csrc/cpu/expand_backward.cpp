// ds = scaling · dy·B and dB = scaling · dyᵀ·s, dy read once for both:
// dy [M, N], s [M, r], lora_B [N, r] → ds [M, r], dB [N, r].
#include "operations.h"
#include "reduce_rows.h"

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
  const Matrix from(dy), to(ds);
  const auto scale = static_cast<float>(scaling);
  const int64_t rank_blocks = blocks_of(r, kLanes), row_blocks = blocks_of(M, kTileRows);
  const int64_t block_sums = rank_blocks * kTileRows * kLanes;
  RowSums sums_of_rows(M, r, N);
  // [stripe][row block]: as store_ranks takes them
  const int64_t stripes = std::max<int64_t>(sums_of_rows.stripes, 1);
  std::vector<float> sums_of_columns(stripes * row_blocks * block_sums, 0.0f);

  choose_products(kernels, from, [&](auto value) {
    using Value = decltype(value);
    const auto factors = pack_for<Value>(kernels, Matrix(lora_B));
    const auto rows_of_s = pack_for<Value>(kernels, Matrix(s));
    const int64_t packed_rows = blocks_of(M, kPer<Value>);
    torch::stable::parallel_for(0, sums_of_rows.units(), 1, [&](int64_t begin, int64_t end) {
      Tiles<Value> tiles(kernels, from);
      for (int64_t index = begin; index < end; ++index) {
        const RowSums::Unit unit = sums_of_rows.unit(index);
        for (int64_t row = unit.first; row < unit.last; row += kTileRows) {
          const int64_t rows = std::min(kTileRows, unit.last - row);
          const auto tile = tiles.at(row, rows, unit.col, unit.cols);
          float* sums = &sums_of_columns[(unit.stripe * row_blocks + row / kTileRows) * block_sums];
          for (int64_t j = 0; j < rank_blocks; ++j) {
            products<Value>(kernels).reduce_columns(
                tile.data, tile.ld, rows, unit.cols, &factors[(j * N + unit.col) / kPer<Value> * kLanes],
                sums + j * kTileRows * kLanes);
            products<Value>(kernels).reduce_rows(
                tile.data, tile.ld, rows, tile.cols, &rows_of_s[kLanes * (j * packed_rows + row / kPer<Value>)],
                sums_of_rows.of(unit.chunk, j, unit.col), row > unit.first);
          }
        }
      }
    });
  });

  torch::stable::parallel_for(0, row_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* sums = &sums_of_columns[block * block_sums];
      for (int64_t stripe = 1; stripe < stripes; ++stripe)
        for (int64_t i = 0; i < block_sums; ++i) sums[i] += sums[stripe * row_blocks * block_sums + i];
      const int64_t row = block * kTileRows;
      store_ranks(kernels, sums, scale, to, row, std::min(kTileRows, M - row));
    }
  });
  sums_of_rows.add_up(kernels, transposed(Matrix(dB)), scale);
}

}  // namespace lorafast::cpu
