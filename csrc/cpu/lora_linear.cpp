// The skinny products of a layer's forward in one call, added to its base GEMM, and those of its backward.
// They are short: a call of its own for each would cost a large part of it in Python and the dispatcher, whose
// code is cold after the base GEMM.
#include "operations.h"

namespace lorafast::cpu {

// s = drop(x)·Aᵀ and y += scaling · s·Bᵀ
void lora_linear_(
    Tensor y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor s) {
  shrink(x, lora_A, seed, threshold, survivor_scale, s);
  expand_(y, s, lora_B, scaling, std::nullopt, 0, 1.0);
}

// ds = scaling · dy·B, dB = scaling · dyᵀ·s, dA = dsᵀ·drop(x) and dx += drop(ds·A)
void lora_linear_backward_(
    Tensor dx, const Tensor& dy, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& s,
    double scaling, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor ds,
    Tensor dA, Tensor dB) {
  expand_backward(dy, s, lora_B, scaling, ds, dB);
  shrink_backward(ds, x, seed, threshold, survivor_scale, dA);
  const OneDevice device(kDevice, "dx", dx);
  check_output("dx", dx, x.size(0), x.size(1), device);
  check_matrix("lora_A", lora_A, ds.size(1), x.size(1), device);
  add_expanded(
      Matrix(dx), Matrix(ds), transposed(Matrix(lora_A)), 1.0, Dropout::of(seed, threshold, survivor_scale));
}

}  // namespace lorafast::cpu
