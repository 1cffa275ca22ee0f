// linear_expand of a dense weight: a base GEMM of oneDNN or MKL, and expand before or after it. And the base GEMM of
// a quantized weight for few rows, to whose result expand adds the adapter's term.
#include "base_gemm.h"
#include "coded_gemm.h"
#include "panel_gemm.h"

namespace lorafast::cpu {

namespace {

// out = x·op(W) + bias, with W transposed unless dx is asked for.
template <class Codes>
void multiply(
    const Codes& codes, const Tensor& x, bool transposed, const std::optional<Tensor>& bias, Tensor& out,
    const OneDevice& device) {
  const int64_t M = x.size(0), length = transposed ? codes.N : codes.K, width = transposed ? codes.K : codes.N;
  check_matrix("x", x, M, length, device);
  check_output("out", out, M, width, device);
  STD_TORCH_CHECK(!transposed || !bias.has_value(), "bias is given for dx, expected None");
  const std::optional<Matrix> added = row_of_bias(bias, width, device);
  if (out.numel() == 0) return;
  const Microkernels& kernels = microkernels();
  const Matrix from(x), to(out);
  const auto serve = [&](auto value) {
    using Value = decltype(value);
    if (transposed) multiply_columns<Value>(kernels, from, codes, to);
    else multiply_rows<Value>(kernels, Rows<Value>(kernels, from, kDotCols), codes, added, to);
  };
  if (kernels.pairs != nullptr && from.dtype == Dtype::kBFloat16) serve(uint16_t{});
  else serve(float{});
}

}  // namespace

void linear_four_bit(
    const Tensor& x, const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& nested_quant_map, const std::optional<Tensor>& nested_offset,
    const Tensor& numbers, int64_t N, int64_t K, int64_t block, int64_t nested_block, bool low_first,
    int64_t stored, bool transposed, const std::optional<Tensor>& bias, Tensor out) {
  const OneDevice device(kDevice, "x", x);
  const FourBit weight(
      codes, absmax, nested_absmax, nested_quant_map, nested_offset, numbers, N, K, block, nested_block, low_first,
      stored, device);
  multiply(weight, x, transposed, bias, out, device);
}

void linear_eight_bit(
    const Tensor& x, const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
    int64_t block_columns, int64_t stored, bool transposed, const std::optional<Tensor>& bias, Tensor out) {
  const OneDevice device(kDevice, "x", x);
  const EightBit weight(codes, scale, unit, integers, block_rows, block_columns, stored, device);
  multiply(weight, x, transposed, bias, out, device);
}

// y = x·op(W) + drop(scaling · s·Bᵀ) + bias of a dense W, any strides, transposed unless dx is asked for
Tensor linear_expand(
    const Tensor& x, const Tensor& weight, bool transposed, const Tensor& s, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(transposed ? 1 : 0), r = s.size(1);
  const OneDevice device(kDevice, "x", x);
  check_matrix("x", x, M, K, device);
  check_matrix("weight", weight, transposed ? K : N, transposed ? N : K, device);
  check_matrix("s", s, M, r, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_seed(seed, threshold, device);
  const std::optional<Matrix> added = row_of_bias(bias, N, device);
  const Tensor W = transposed ? weight : transpose_of(weight);
  Tensor y = empty(M, N, x);
  const Matrix b = transposed ? Matrix(weight) : lorafast::transposed(Matrix(weight));
  const bool panels = panels_serve(microkernels(), Matrix(x), b, Matrix(y));
  if (panels && !seed.has_value()) {
    panel_gemm(microkernels(), Matrix(x), b, added, Expanded{Matrix(s), Matrix(lora_B), scaling}, Matrix(y));
    return y;
  }
  const auto expand = [&](const std::optional<Matrix>& bias_too, bool add) {
    const auto dropout = Dropout::of(seed, threshold, survivor_scale);
    add_expanded(Matrix(y), Matrix(s), Matrix(lora_B), scaling, dropout, bias_too, add);
  };
  if (panels) {
    panel_gemm(microkernels(), Matrix(x), b, added, std::nullopt, Matrix(y));
    expand(std::nullopt, true);
  } else if (gemm_adds(x.scalar_type(), M, N, K, bias.has_value())) {
    expand(added, false);
    gemm(y, y, x, W);
  } else {
    gemm(y, bias, x, W);
    expand(std::nullopt, true);
  }
  return y;
}

}  // namespace lorafast::cpu
