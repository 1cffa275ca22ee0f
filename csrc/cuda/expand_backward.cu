// ds = scaling · dy·B, dB = scaling · dyᵀ·s, dbias = Σ dy over rows: dy [M, N], s [M, r], B [N, r] → ds [M, r],
// dB [N, r], dbias [N], in one pass over dy.
#include "arguments.h"
#include "skinny.cuh"

namespace lorafast::cuda {

// Without ds it is shrink_backward's kernel, which is compiled there.
extern template void launch_skinny<Skinny::kReduce>(
    const char*, const Tensor&, SkinnyParams&, const SkinnyPlan&, const std::optional<Tensor>&,
    const std::optional<Tensor>&, const OneDevice&);

void expand_backward(
    const Tensor& dy, const std::optional<Tensor>& s, const std::optional<Tensor>& lora_B, double scaling,
    std::optional<Tensor> ds, std::optional<Tensor> dB, std::optional<Tensor> dbias,
    const std::optional<Tensor>& partials, const std::optional<Tensor>& counters, int64_t ranks, int64_t block_m,
    int64_t block_n, int64_t stages, int64_t share, int64_t chunk) {
  const OneDevice device(kDevice, "dy", dy);
  check_dimensions("dy", dy, 2);
  if (ds.has_value()) check_dimensions("ds", *ds, 2);
  if (dB.has_value()) check_dimensions("dB", *dB, 2);
  check_matrix("dy", dy, dy.size(0), dy.size(1), device);
  const int64_t M = dy.size(0), N = dy.size(1);
  const Dtype dtype = dtype_of(dy);
  SkinnyParams p = params_of_x(dy);
  p.r = ds.has_value() ? ds->size(1) : dB.has_value() ? dB->size(1) : 1;
  STD_TORCH_CHECK(p.r >= 1, "the rank is ", p.r, ", expected at least 1");  // dbias has none
  p.S_scale = p.D_scale = static_cast<float>(scaling);
  if (ds.has_value()) {
    STD_TORCH_CHECK(lora_B.has_value(), "lora_B is missing, which ds is made of");
    check_matrix("lora_B", *lora_B, N, p.r, device);
    check_output("ds", *ds, M, p.r, device);
    check_dtype("ds", *ds, wide(dtype));
    check_pairs("ds", *ds);
    set_p(p, *lora_B, 0, dtype);
    p.S = ds->mutable_data_ptr();
  }
  if (dB.has_value()) {
    STD_TORCH_CHECK(s.has_value(), "s is missing, which dB is made of");
    check_matrix("s", *s, M, p.r, device);
    check_dtype("s", *s, wide(dtype));
    check_output("dB", *dB, N, p.r, device);
    set_q(p, *s);
    p.D = dB->mutable_data_ptr();
    p.D_column = p.r;
    p.D_rank = 1;
    p.D_dtype = dtype_of(*dB);
  }
  if (dbias.has_value()) {
    STD_TORCH_CHECK(
        dbias->dim() == 1 && dbias->size(0) == N && dbias->is_contiguous(), "dbias is no vector of ", N,
        " neighbours");
    check_dtype("dbias", *dbias, dtype);
    device.check("dbias", *dbias);
    check_storage("dbias", *dbias);
    p.bias = dbias->mutable_data_ptr();
  }
  const SkinnyPlan plan{ranks, block_m, block_n, stages, share, chunk};
  if (ds.has_value()) launch_skinny<Skinny::kBackward>("expand_backward", dy, p, plan, partials, counters, device);
  else if (dB.has_value() || dbias.has_value())
    launch_skinny<Skinny::kReduce>("expand_backward", dy, p, plan, partials, counters, device);
}

}  // namespace lorafast::cuda
