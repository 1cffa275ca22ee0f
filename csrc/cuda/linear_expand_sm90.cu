// y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias on sm_90a.
#include "operations.h"
#include "sm90_launch.cuh"

namespace lorafast::cuda {

// Clusters take tiles from the queue. kAcross: rows of W lie across k, as those of Wᵀ do.
template <class T, bool kAcross, int kN>
__global__ void __launch_bounds__(kSm90Threads, 1)
    linear_expand_sm90_kernel(const __grid_constant__ Sm90Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char sm90_shared[];
  const Sm90Cta<T, kAcross, kN> cta(p, sm90_shared);
  cta.run();
#else
  __trap();  // the host doesn't launch it there
#endif
}

void linear_expand_sm90(
    const Tensor& x, const Tensor& weight, const Tensor& s, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor y, Tensor counters, int64_t columns, int64_t group, int64_t ctas, int64_t cluster) {
  const OneDevice device(kDevice, "x", x);
  const Sm90Grid grid{columns, group, ctas, cluster};
  check_sm90(device, x, weight, s, lora_B, bias, y);
  check_sm90_grid(device, grid, counters, kSm90Flags);
  check_seed(seed, threshold, device);
  if (y.numel() == 0) return;
  const OnDevice on(device);
  enter_sm90("linear_expand_sm90", on);
  const bool lies = lies_across(view_of(weight));
  Sm90Launch of = sm90_launch(
      view_of(x), view_of(weight), lies, view_of(s), view_of(lora_B), scaling, bias, y, counters, grid);
  if (seed.has_value() && threshold > 0 && s.size(1) > 0) {
    of.p.dropout = {
        static_cast<const int64_t*>(seed->const_data_ptr()), (y.size(1) + 7) / 8, static_cast<int32_t>(threshold),
        static_cast<float>(survivor_scale)};
    of.p.factor_scale = 1.0f;
    of.p.sum_scale = static_cast<float>(scaling * survivor_scale);
  }
  const auto start = [&](auto element, auto across, auto tile) {
    constexpr int kN = decltype(tile)::value;
    launch(
        "linear_expand_sm90", linear_expand_sm90_kernel<decltype(element), decltype(across)::value, kN>,
        dim3(of.ctas), kSm90Threads, Sm90Tile<kN>::kShared, on, of.p, of.cluster);
  };
  const auto with_tile = [&](auto element, auto across) {
    if (columns == 256) start(element, across, std::integral_constant<int, 256>());
    else start(element, across, std::integral_constant<int, 128>());
  };
  const auto with_layout = [&](auto element) {
    if (lies) with_tile(element, std::true_type());
    else with_tile(element, std::false_type());
  };
  if (dtype_of(x) == Dtype::bfloat16) with_layout(bfloat16());
  else with_layout(float16());
}

}  // namespace lorafast::cuda
