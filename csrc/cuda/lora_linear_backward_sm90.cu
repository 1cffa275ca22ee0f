// dx = dy·W + ds·A of bfloat16 on sm_90a and, of dA = dsᵀ·x and dB = scaling · dyᵀ·s, what is wanted, in one launch:
// helpers make ds = scaling · dy·B and dB before they take tiles of dx, dA is made when there are no more.
#include "operations.h"
#include "sm90_gradients.cuh"
#include "sm90_launch.cuh"

namespace lorafast::cuda {

constexpr int kBackwardColumns = 256;  // of a tile

template <int kRanks>
__global__ void __launch_bounds__(kSm90Threads, 1)
    lora_linear_backward_sm90_kernel(const __grid_constant__ Sm90BackwardParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char sm90_shared[];
  const Sm90Cta<bfloat16, true, kBackwardColumns, Gradients<kRanks>> cta(p, sm90_shared);
  cta.run();
#else
  __trap();  // the host doesn't launch it there
#endif
}

namespace {

// A matrix of bfloat16 that TMA reads.
MatrixView check_rows(const char* name, const Tensor& matrix) {
  STD_TORCH_CHECK(
      dtype_of(matrix) == Dtype::bfloat16, name, " has dtype ", toString(matrix.scalar_type()),
      ", expected bfloat16");
  return rows_for_tma(name, view_of(matrix));
}

// How a sum over M rows is cut: groups of so many row blocks, ranges of so many steps.
Sm90Sum cut(int64_t M, int64_t columns, int64_t of_group, int64_t of_range) {
  const auto blocks = [](int64_t n, int64_t of) { return static_cast<int32_t>((n + of - 1) / of); };
  Sm90Sum sum{};
  sum.columns = static_cast<int32_t>(columns), sum.steps = blocks(columns, 128);
  sum.ranges = blocks(sum.steps, of_range), sum.of_group = static_cast<int32_t>(of_group);
  sum.groups = blocks(blocks(M, 128), of_group);
  return sum;
}

}  // namespace

void lora_linear_backward_sm90(
    const Tensor& dy, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, const std::optional<Tensor>& s, double scaling, Tensor dx, Tensor ds,
    std::optional<Tensor> dA, std::optional<Tensor> dB, const std::optional<Tensor>& partials, Tensor counters,
    int64_t group, int64_t ctas, int64_t helpers, int64_t rows_ahead, int64_t rows_behind, int64_t cluster) {
  const OneDevice device(kDevice, "dy", dy);
  check_dimensions("dy", dy, 2);
  check_dimensions("weight", weight, 2);
  check_dimensions("lora_B", lora_B, 2);
  const int64_t M = dy.size(0), N = dy.size(1), K = weight.size(1), r = lora_B.size(1);
  STD_TORCH_CHECK(
      M >= 1 && N >= 1 && K >= 1, "dy is ", M, " x ", N, " and dx ", M, " x ", K, ", expected no zeros");
  STD_TORCH_CHECK(r >= 1 && r <= 64, "r is ", r, ", expected 1 to 64");
  const int64_t ranks = r <= 16 ? 16 : r <= 32 ? 32 : 64, range = 256 / ranks;
  check_matrix("dy", dy, M, N, device);
  check_matrix("weight", weight, N, K, device);
  check_matrix("lora_A", lora_A, r, K, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_output("dx", dx, M, K, device);
  check_output("ds", ds, M, ranks, device);
  const MatrixView of_dy = check_rows("dy", dy);
  check_same_dtype("weight", weight, "dy", dy);
  check_same_dtype("dx", dx, "dy", dy);
  STD_TORCH_CHECK(
      weight.stride(1) == 1 || K == 1, "weight has strides ", weight.stride(0), " and ", weight.stride(1),
      ", expected contiguous rows");
  STD_TORCH_CHECK(N < INT64_C(1) << 31, "dy has ", N, " columns, expected fewer than ", INT64_C(1) << 31);
  STD_TORCH_CHECK(
      dtype_of(ds) == Dtype::bfloat16 && aligned(ds.const_data_ptr(), 0, 16), "ds has dtype ",
      toString(ds.scalar_type()), ", expected bfloat16, aligned to 16 bytes");
  const int64_t rows_end = INT64_C(1) << 16;
  STD_TORCH_CHECK(helpers >= 1 && helpers <= ctas, "helpers is ", helpers, ", expected 1 to ", ctas);
  STD_TORCH_CHECK(
      rows_ahead >= 1 && rows_ahead < rows_end && rows_behind >= 1 && rows_behind < rows_end, "rows_ahead is ",
      rows_ahead, " and rows_behind ", rows_behind, ", expected 1 to ", rows_end - 1);
  Sm90Sum of_dB = cut(M, N, rows_ahead, range), of_dA = cut(M, K, rows_behind, range);
  of_dB.wanted = dB.has_value(), of_dA.wanted = dA.has_value();
  const int64_t row_tiles = (M + 127) / 128;
  const Sm90BackwardCounters places(static_cast<int32_t>(row_tiles), of_dB.ranges, of_dA.ranges);
  const Sm90Grid grid{kBackwardColumns, group, ctas, cluster};
  check_sm90_grid(device, grid, counters, places.used);
  if (dB.has_value()) {
    STD_TORCH_CHECK(s.has_value(), "s is missing, which dB is made of");
    check_matrix("s", *s, M, r, device);
    check_output("dB", *dB, N, r, device);
    STD_TORCH_CHECK(
        dtype_of(*s) == Dtype::bfloat16, "s has dtype ", toString(s->scalar_type()), ", expected bfloat16");
    of_dB.factor = factor_of(*s);
    of_dB.to = dB->mutable_data_ptr(), of_dB.to_column = r, of_dB.to_rank = 1, of_dB.type = dtype_of(*dB);
    of_dB.scale = static_cast<float>(scaling);
  }
  MatrixView of_x{};
  if (dA.has_value()) {
    STD_TORCH_CHECK(x.has_value(), "x is missing, which dA is made of");
    check_matrix("x", *x, M, K, device);
    check_output("dA", *dA, r, K, device);
    of_x = check_rows("x", *x);
    of_dA.factor = factor_of(ds);
    of_dA.to = dA->mutable_data_ptr(), of_dA.to_column = 1, of_dA.to_rank = K, of_dA.type = dtype_of(*dA);
    of_dA.scale = 1.0f;
  }
  // Parts: of ds, dB and dA.
  const int64_t block = 128 * ranks;
  const int64_t of_ds = of_dB.ranges > 1 ? of_dB.ranges * row_tiles * block : 0;
  const auto parts_of = [&](const Sm90Sum& sum) { return int64_t{sum.groups} * sum.steps * block * sum.wanted; };
  const int64_t needed = of_ds + parts_of(of_dB) + parts_of(of_dA);
  STD_TORCH_CHECK(needed / block < INT64_C(1) << 31, "dy is ", M, " x ", N, ": more parts than are counted");
  float* parts = nullptr;
  if (needed > 0) {
    check_memory("partials", partials, ScalarType::Float, needed, device);
    parts = static_cast<float*>(partials->mutable_data_ptr());
    if (of_dB.wanted) of_dB.parts = parts + of_ds;
    if (of_dA.wanted) of_dA.parts = parts + of_ds + parts_of(of_dB);
  }

  const OnDevice on(device);
  enter_sm90("lora_linear_backward_sm90", on);
  Sm90BackwardParams p{};
  // dx = dy·(Wᵀ)ᵀ + ds·(Aᵀ)ᵀ
  const Sm90Launch of = sm90_launch(
      of_dy, view_of(weight).turned(), true, view_of(ds).first_columns(r), view_of(lora_A).turned(), 1.0,
      std::nullopt, dx, counters, grid);
  static_cast<Sm90Params&>(p) = of.p;
  if (dA.has_value()) p.a = tensor_map("x", of_x, 128);
  p.s.vector = true;  // zeros behind a row's ranks are part of it
  p.made_s = ds.mutable_data_ptr();
  p.helpers = static_cast<int32_t>((helpers + cluster - 1) / cluster);
  p.dB = of_dB, p.dA = of_dA;
  p.ds_parts = of_ds > 0 ? parts : nullptr;
  p.lora_B = factor_of(lora_B);
  p.scaling = static_cast<float>(scaling);
  const int64_t tiles = int64_t{p.row_sets} * p.column_tiles, most = ctas / cluster;
  const int64_t behind = dA.has_value() ? of_dA.items(static_cast<int>(cluster)) : 0;
  const int64_t useful = tiles + p.helpers + behind;
  const auto started = static_cast<unsigned>(cluster * (useful < most ? useful : most));
  const auto start = [&](auto of_ranks) {
    launch(
        "lora_linear_backward_sm90", lora_linear_backward_sm90_kernel<decltype(of_ranks)::value>, dim3(started),
        kSm90Threads, Sm90Tile<kBackwardColumns>::kShared, on, p, of.cluster);
  };
  if (ranks == 16) start(std::integral_constant<int, 16>());
  else if (ranks == 32) start(std::integral_constant<int, 32>());
  else start(std::integral_constant<int, 64>());
}

}  // namespace lorafast::cuda
