// y = x·Wᵀ + scaling · s·Bᵀ + bias and s = drop(x)·Aᵀ of bfloat16 on sm_90a, in one launch: helpers make s.
#include "operations.h"
#include "sm90_launch.cuh"
#include "sm90_shrink.cuh"

namespace lorafast::cuda {

// The clusters that draw the first tickets help, then take tiles like the others. kAcross: rows of W lie across k.
template <bool kAcross, int kN, int kHelperRanks>
__global__ void __launch_bounds__(kSm90Threads, 1)
    lora_linear_sm90_kernel(const __grid_constant__ Sm90ForwardParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char sm90_shared[];
  const Sm90Cta<bfloat16, kAcross, kN, ShrinkFirst<kHelperRanks>> cta(p, sm90_shared);
  cta.run();
#else
  __trap();  // the host doesn't launch it there
#endif
}

void lora_linear_sm90(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor y, Tensor s, Tensor counters, int64_t columns, int64_t group, int64_t ctas, int64_t helpers,
    int64_t cluster) {
  const OneDevice device(kDevice, "x", x);
  const Sm90Grid grid{columns, group, ctas, cluster};
  check_sm90(device, x, weight, s, lora_B, bias, y);
  check_sm90_grid(device, grid, counters, kSm90Flags + (x.size(0) + 127) / 128);
  const int64_t K = x.size(1), r = s.size(1);
  check_output("s", s, x.size(0), r, device);
  check_matrix("lora_A", lora_A, r, K, device);
  check_seed(seed, threshold, device);
  STD_TORCH_CHECK(
      dtype_of(x) == Dtype::bfloat16, "x has dtype ", toString(x.scalar_type()), ", expected bfloat16");
  STD_TORCH_CHECK(r >= 1 && r <= columns, "r is ", r, ", expected 1 to ", columns, ", the columns of a tile");
  STD_TORCH_CHECK(helpers >= 1 && helpers <= ctas, "helpers is ", helpers, ", expected 1 to ", ctas);
  STD_TORCH_CHECK(y.size(1) >= 1, "weight has no rows, expected at least 1");
  if (x.size(0) == 0) return;
  STD_TORCH_CHECK(aligned(s.const_data_ptr(), 0, 4), "s doesn't begin at a multiple of 4 bytes");
  const OnDevice on(device);
  enter_sm90("lora_linear_sm90", on);
  const bool lies = lies_across(view_of(weight));
  const Sm90Launch of = sm90_launch(
      view_of(x), view_of(weight), lies, view_of(s), view_of(lora_B), scaling, bias, y, counters, grid);
  Sm90ForwardParams p{};
  static_cast<Sm90Params&>(p) = of.p;
  p.made_s = s.mutable_data_ptr();
  p.helpers = static_cast<int32_t>((helpers + cluster - 1) / cluster);
  const int64_t size = lora_A.element_size();
  p.lora_A = lora_A.const_data_ptr();
  p.A_row = lora_A.stride(0) * size, p.A_col = lora_A.stride(1) * size;
  p.A_type = dtype_of(lora_A);
  p.K = static_cast<int32_t>(K);
  p.vector_A = (K == 1 || lora_A.stride(1) == 1) && aligned(p.lora_A, r > 1 ? p.A_row : 0, 16);
  if (seed.has_value() && threshold > 0) {
    p.x_dropout = {
        static_cast<const int64_t*>(seed->const_data_ptr()), (K + 7) / 8, static_cast<int32_t>(threshold),
        static_cast<float>(survivor_scale)};
  }
  const int64_t useful = int64_t{p.row_sets} * p.column_tiles + p.helpers, most = ctas / cluster;
  const auto started = static_cast<unsigned>(cluster * (useful < most ? useful : most));
  const auto start = [&](auto across, auto tile, auto ranks) {
    constexpr int kN = decltype(tile)::value;
    launch(
        "lora_linear_sm90", lora_linear_sm90_kernel<decltype(across)::value, kN, decltype(ranks)::value>,
        dim3(started), kSm90Threads, Sm90Tile<kN>::kShared, on, p, of.cluster);
  };
  const auto with_layout = [&](auto tile, auto ranks) {
    if (lies) start(std::true_type(), tile, ranks);
    else start(std::false_type(), tile, ranks);
  };
  const auto with_ranks = [&](auto tile) {
    if (r <= 64) with_layout(tile, std::integral_constant<int, 64>());
    else with_layout(tile, tile);
  };
  if (columns == 256) with_ranks(std::integral_constant<int, 256>());
  else with_ranks(std::integral_constant<int, 128>());
}

}  // namespace lorafast::cuda
