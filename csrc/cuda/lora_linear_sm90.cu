// y = x·Wᵀ + scaling · s·Bᵀ + bias and s = x·Aᵀ of bfloat16 on sm_90a, in one launch: helpers make s.
#include "operations.h"
#include "sm90_launch.cuh"
#include "sm90_shrink.cuh"

namespace lorafast::cuda {

// The clusters that draw the first tickets help, then take tiles like the others.
template <int kN, int kHelperRanks>
__global__ void __launch_bounds__(kSm90Threads, 1) lora_linear_sm90_kernel(const __grid_constant__ Sm90Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char sm90_shared[];
  const Sm90Cta<bfloat16, false, kN, ShrinkFirst<kHelperRanks>> cta(p, sm90_shared);
  cta.run();
#else
  __trap();  // the host doesn't launch it there
#endif
}

void lora_linear_sm90(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, Tensor y, Tensor s, Tensor counters, int64_t columns, int64_t group,
    int64_t ctas, int64_t helpers, int64_t cluster) {
  const OneDevice device(kDevice, "x", x);
  const int64_t down = x.dim() == 2 ? (x.size(0) + 127) / 128 : 0;
  check_sm90(device, x, weight, s, lora_B, bias, y, counters, kSm90Flags + down, columns, group, ctas, cluster);
  const int64_t K = x.size(1), r = s.size(1);
  check_output("s", s, x.size(0), r, device);
  check_matrix("lora_A", lora_A, r, K, device);
  STD_TORCH_CHECK(
      dtype_of(x) == Dtype::bfloat16 && dtype_of(lora_A) == Dtype::bfloat16, "x has dtype ",
      torch::headeronly::toString(x.scalar_type()), " and lora_A ",
      torch::headeronly::toString(lora_A.scalar_type()), ", expected bfloat16");
  STD_TORCH_CHECK(r >= 1 && r <= 64, "r is ", r, ", expected 1 to 64");
  STD_TORCH_CHECK(helpers >= 1 && helpers <= ctas, "helpers is ", helpers, ", expected 1 to ", ctas);
  STD_TORCH_CHECK(
      lora_A.stride(1) == 1 || K == 1, "lora_A has neighbours of a row ", lora_A.stride(1),
      " elements apart, expected 1");
  STD_TORCH_CHECK(y.size(1) >= 1, "weight has no rows, expected at least 1");
  if (x.size(0) == 0) return;
  STD_TORCH_CHECK(aligned(s.const_data_ptr(), 0, 4), "s doesn't begin at a multiple of 4 bytes");
  const OnDevice on(device);
  enter_sm90("lora_linear_sm90", on);
  Sm90Launch of = sm90_launch(x, weight, s, lora_B, scaling, bias, y, counters, columns, group, ctas, cluster);
  STD_TORCH_CHECK(
      !of.across, "weight has strides ", weight.stride(0), " and ", weight.stride(1),
      ", expected contiguous rows");
  const int64_t a_row = r == 1 ? (K + 7) / 8 * 8 : lora_A.stride(0);
  check_for_tma("lora_A", lora_A.const_data_ptr(), r, K, a_row);
  of.p.a = tensor_map("lora_A", lora_A.const_data_ptr(), Dtype::bfloat16, r, K, a_row, r <= 16 ? 16 : 64);
  of.p.made_s = s.mutable_data_ptr();
  of.p.helpers = static_cast<int32_t>((helpers + cluster - 1) / cluster);
  const int64_t useful = int64_t{of.p.row_sets} * of.p.column_tiles + of.p.helpers, most = ctas / cluster;
  const auto started = static_cast<unsigned>(cluster * (useful < most ? useful : most));
  const auto start = [&](auto tile, auto ranks) {
    constexpr int kN = decltype(tile)::value;
    launch(
        "lora_linear_sm90", lora_linear_sm90_kernel<kN, decltype(ranks)::value>, dim3(started), kSm90Threads,
        Sm90Tile<kN>::kShared, on, of.p, of.cluster);
  };
  const auto with_tile = [&](auto ranks) {
    if (columns == 256) start(std::integral_constant<int, 256>(), ranks);
    else start(std::integral_constant<int, 128>(), ranks);
  };
  if (r <= 16) with_tile(std::integral_constant<int, 16>());
  else with_tile(std::integral_constant<int, 64>());
}

}  // namespace lorafast::cuda
