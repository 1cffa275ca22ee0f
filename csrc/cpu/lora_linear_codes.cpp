// A LoRA layer's forward over a quantized weight W [N, K] for few rows, in one call: s = x·Aᵀ, and
// y = x·Wᵀ + scaling · s·Bᵀ + bias straight from the codes. The adapter's part joins the sums before they are rounded:
// y is written once.
#include "base_gemm.h"
#include "coded_gemm.h"

namespace lorafast::cpu {

namespace {

// A [r, K], multiplied as a weight of codes is.
class DenseRows {
 public:
  int64_t N, K;

  explicit DenseRows(const Tensor& matrix) : N(matrix.size(0)), K(matrix.size(1)), matrix_(matrix) {}

  void prefetch(int64_t, int64_t, int64_t) const {}

  void load(
      const Microkernels& kernels, int64_t row, int64_t column, int64_t count, std::vector<float>&, Dtype dtype,
      void* to) const {
    if (dtype == Dtype::kBFloat16) matrix_.copy_row(kernels, row, column, count, static_cast<uint16_t*>(to));
    else matrix_.load_row(kernels, row, column, count, static_cast<float*>(to));
  }

 private:
  Matrix matrix_;
};

template <class Codes>
std::tuple<Tensor, Tensor> forward(
    const Codes& codes, const Tensor& x, const std::optional<Tensor>& bias, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, const OneDevice& device) {
  const int64_t M = x.size(0), K = codes.K, N = codes.N, r = lora_A.size(0);
  check_matrix("x", x, M, K, device);
  check_matrix("lora_A", lora_A, r, K, device);
  check_matrix("lora_B", lora_B, N, r, device);
  const std::optional<Matrix> added = row_of_bias(bias, N, device);
  Tensor y = empty(M, N, x), s = empty(M, r, x, x.scalar_type() == ScalarType::Half);
  if (M == 0) return {y, s};
  const Microkernels& kernels = microkernels();
  const Matrix from(x), to(y), of_s(s);
  const auto serve = [&](auto value) {
    using Value = decltype(value);
    const Rows<Value> rows(kernels, from, kDotCols);
    multiply_rows<Value>(kernels, rows, DenseRows(lora_A), std::nullopt, of_s);
    const int64_t ld = padded(r);
    const auto widened = scratch<float>(M * ld);
    for (int64_t m = 0; m < M; ++m) {
      of_s.load_row(kernels, m, 0, r, &widened[m * ld]);
      std::fill(&widened[m * ld] + r, &widened[m * ld] + ld, 0.0f);
    }
    const LowRank low_rank{widened.get(), ld, Matrix(lora_B), static_cast<float>(scaling)};
    multiply_rows<Value>(kernels, rows, codes, added, to, &low_rank);
  };
  if (kernels.pairs != nullptr && from.dtype == Dtype::kBFloat16) serve(uint16_t{});
  else serve(float{});
  return {y, s};
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear_four_bit(
    const Tensor& x, const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& nested_quant_map, const std::optional<Tensor>& nested_offset,
    const Tensor& numbers, int64_t N, int64_t K, int64_t block, int64_t nested_block, bool low_first,
    int64_t stored, const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B,
    double scaling) {
  const OneDevice device(kDevice, "x", x);
  const FourBit weight(
      codes, absmax, nested_absmax, nested_quant_map, nested_offset, numbers, N, K, block, nested_block, low_first,
      stored, device);
  return forward(weight, x, bias, lora_A, lora_B, scaling, device);
}

std::tuple<Tensor, Tensor> lora_linear_eight_bit(
    const Tensor& x, const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
    int64_t block_columns, int64_t stored, const std::optional<Tensor>& bias, const Tensor& lora_A,
    const Tensor& lora_B, double scaling) {
  const OneDevice device(kDevice, "x", x);
  const EightBit weight(codes, scale, unit, integers, block_rows, block_columns, stored, device);
  return forward(weight, x, bias, lora_A, lora_B, scaling, device);
}

}  // namespace lorafast::cpu
