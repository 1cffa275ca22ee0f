// s = scale · drop(x)·Aᵀ: x [M, K], A [r, K] → s [M, r].
#include "arguments.h"
#include "skinny.cuh"

namespace lorafast::cuda {

void shrink(
    const Tensor& x, const Tensor& lora_A, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale, double scale, Tensor s, const std::optional<Tensor>& partials,
    const std::optional<Tensor>& counters, int64_t ranks, int64_t block_m, int64_t block_n, int64_t stages,
    int64_t share) {
  const OneDevice device(kDevice, "x", x);
  check_dimensions("x", x, 2);
  check_dimensions("lora_A", lora_A, 2);
  check_matrix("x", x, x.size(0), x.size(1), device);
  const int64_t M = x.size(0), r = lora_A.size(0);
  const Dtype dtype = dtype_of(x);
  check_matrix("lora_A", lora_A, r, x.size(1), device);
  check_output("s", s, M, r, device);
  check_dtype("s", s, wide(dtype));
  check_pairs("s", s);
  check_seed(seed, threshold, device);
  SkinnyParams p = params_of_x(x);
  p.r = r;
  set_p(p, lora_A, 1, dtype);
  p.S = s.mutable_data_ptr();
  p.S_scale = static_cast<float>(scale);
  set_dropout(p, seed, threshold, survivor_scale, dtype);
  const SkinnyPlan plan{ranks, block_m, block_n, stages, share, 1};
  launch_skinny<Skinny::kShrink>("shrink", x, p, plan, partials, counters, device);
}

}  // namespace lorafast::cuda
