// A part of a frozen weight W [N, K] made dense: rows and columns from (row, column) on, as many as `out` has.
// Threads share out its rows.
#include "codes.h"

namespace lorafast::cpu {

namespace {

constexpr int64_t kTask = 1 << 14;  // elements that are worth a thread

template <class Codes>
void dequantize(const Codes& codes, int64_t row, int64_t column, Tensor& out) {
  const int64_t rows = out.size(0), columns = out.size(1), N = codes.N, K = codes.K;
  STD_TORCH_CHECK(
      row >= 0 && column >= 0 && row <= N - rows && column <= K - columns, "out is ", rows, " x ", columns,
      " from ", row, ", ", column, " on, expected a part of ", N, " x ", K);
  if (out.numel() == 0) return;
  const Microkernels& kernels = microkernels();
  const Dtype dtype = dtype_of(out);
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t few = std::max<int64_t>(kTask / columns, 1);
  torch::stable::parallel_for(0, rows, few, [&](int64_t begin, int64_t end) {
    std::vector<float> scales;
    for (int64_t i = begin; i < end; ++i)
      codes.load(kernels, row + i, column, columns, scales, dtype, to + i * columns * size_of(dtype));
  });
}

}  // namespace

void dequantize_four_bit(
    const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& nested_quant_map, const std::optional<Tensor>& nested_offset,
    const Tensor& numbers, int64_t N, int64_t K, int64_t block, int64_t nested_block, bool low_first, int64_t row,
    int64_t column, int64_t stored, Tensor out) {
  const OneDevice device(kDevice, "codes", codes);
  check_output("out", out, out.size(0), out.size(1), device);
  const FourBit weight(
      codes, absmax, nested_absmax, nested_quant_map, nested_offset, numbers, N, K, block, nested_block, low_first,
      stored, device);
  dequantize(weight, row, column, out);
}

void dequantize_eight_bit(
    const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
    int64_t block_columns, int64_t row, int64_t column, int64_t stored, Tensor out) {
  const OneDevice device(kDevice, "codes", codes);
  check_output("out", out, out.size(0), out.size(1), device);
  const EightBit weight(codes, scale, unit, integers, block_rows, block_columns, stored, device);
  dequantize(weight, row, column, out);
}

}  // namespace lorafast::cpu
