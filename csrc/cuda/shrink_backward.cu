// dA = dsᵀ·drop(x): ds [M, r], x [M, K] → dA [r, K].
#include "arguments.h"
#include "skinny.cuh"

namespace lorafast::cuda {

template void launch_skinny<Skinny::kReduce>(
    const char*, const Tensor&, SkinnyParams&, const SkinnyPlan&, const std::optional<Tensor>&,
    const std::optional<Tensor>&, const OneDevice&);

void shrink_backward(
    const Tensor& ds, const Tensor& x, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor dA, const std::optional<Tensor>& partials, const std::optional<Tensor>& counters, int64_t ranks,
    int64_t block_m, int64_t block_n, int64_t stages, int64_t share) {
  const OneDevice device(kDevice, "x", x);
  check_dimensions("x", x, 2);
  check_dimensions("ds", ds, 2);
  check_matrix("x", x, x.size(0), x.size(1), device);
  const int64_t K = x.size(1), r = ds.size(1);
  const Dtype dtype = dtype_of(x);
  check_matrix("ds", ds, x.size(0), r, device);
  check_dtype("ds", ds, wide(dtype));
  check_output("dA", dA, r, K, device);
  check_seed(seed, threshold, device);
  SkinnyParams p = params_of_x(x);
  p.r = r;
  set_q(p, ds);
  p.D = dA.mutable_data_ptr();
  p.D_column = 1;
  p.D_rank = K;
  p.D_dtype = dtype_of(dA);
  p.D_scale = 1.0f;
  set_dropout(p, seed, threshold, survivor_scale, dtype);
  const SkinnyPlan plan{ranks, block_m, block_n, stages, share, 1};
  launch_skinny<Skinny::kReduce>("shrink_backward", x, p, plan, partials, counters, device);
}

}  // namespace lorafast::cuda
