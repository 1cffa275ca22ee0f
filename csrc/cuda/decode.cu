// A LoRA linear layer of at most 16 rows in one launch, with one adapter or with one for each element of the batch.
#include "decode_launch.cuh"
#include "operations.h"

namespace lorafast::cuda {

namespace {

using decode::Adapters;
using decode::Memory;

void decode_layer(
    const char* name, const Tensor& x, const Tensor& weight, const Adapters& adapters,
    const std::optional<Tensor>& bias, int64_t helpers, const Memory& memory) {
  const OneDevice device(kDevice, "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x or weight is no matrix");
  check_matrix("x", x, x.size(0), x.size(1), device);
  check_matrix("weight", weight, weight.size(0), x.size(1), device);
  decode::check_dtype("weight", weight, x.scalar_type());
  decode::ParamsOf<decode::Matrix> p = {};
  const decode::Grid grid = decode::prepare(p, x, weight.size(0), adapters, bias, helpers, memory);
  if (grid.ctas == 0) return;
  p.weight = decode::matrix_of(weight);
  const OnDevice on(device);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    auto* const kernel = grid.tokens == 8 ? decode::decode_kernel<T, 8> : decode::decode_kernel<T, 16>;
    launch<kOldestOfAll>(name, kernel, dim3(grid.ctas), decode::kThreads, grid.own_s, on, p);
  });
}

}  // namespace

void lora_linear_decode(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, int64_t helpers, std::optional<Tensor> partials,
    std::optional<Tensor> counters, Tensor y, std::optional<Tensor> s) {
  decode_layer(
      "lora_linear_decode", x, weight, {lora_A, lora_B, std::nullopt, std::nullopt, scaling}, bias, helpers,
      {partials, counters, y, s});
}

void grouped_lora_linear_decode(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling,
    const Tensor& adapter_of, const std::optional<Tensor>& bias, int64_t helpers, std::optional<Tensor> partials,
    std::optional<Tensor> counters, Tensor y, std::optional<Tensor> s) {
  decode_layer(
      "grouped_lora_linear_decode", x, weight, {lora_A, lora_B, scaling, adapter_of, 0.0}, bias, helpers,
      {partials, counters, y, s});
}

}  // namespace lorafast::cuda
