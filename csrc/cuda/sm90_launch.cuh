// What the launchers of sm90.cuh's GEMM share: their checks, the kernel's parameters.
#pragma once

#include "gemm_arguments.h"
#include "sm90.cuh"
#include "tensor_map.h"

namespace lorafast::cuda {

// How tiles are laid out and handed out, as a launcher is given it.
struct Sm90Grid {
  int64_t columns, group, ctas, cluster;
};

// A launch, but for what its operation adds.
struct Sm90Launch {
  Sm90Params p;
  unsigned ctas, cluster;
};

// `used`: counters.
inline void check_sm90_grid(const OneDevice& device, const Sm90Grid& grid, const Tensor& counters, int64_t used) {
  const auto [columns, group, ctas, cluster] = grid;
  STD_TORCH_CHECK(columns == 256 || columns == 128, "columns is ", columns, ", expected 128 or 256");
  STD_TORCH_CHECK(
      group >= 1 && group < INT64_C(1) << 16, "group is ", group, ", expected 1 to ", (INT64_C(1) << 16) - 1);
  STD_TORCH_CHECK(cluster == 1 || cluster == 2, "cluster is ", cluster, ", expected 1 or 2");
  STD_TORCH_CHECK(ctas >= cluster && ctas < INT64_C(1) << 16, "ctas is ", ctas, ", expected at least ", cluster);
  check_memory("counters", counters, ScalarType::Int, used, device);
}

// Checks what the forward launches have.
inline void check_sm90(
    const OneDevice& device, const Tensor& x, const Tensor& weight, const Tensor& s, const Tensor& lora_B,
    const std::optional<Tensor>& bias, const Tensor& y) {
  STD_TORCH_CHECK(
      x.scalar_type() != ScalarType::Float, "x has dtype ", toString(x.scalar_type()),
      ", expected bfloat16 or float16");
  const GemmSizes of = check_gemm(device, x, weight, s, lora_B, bias, y, INT64_C(1) << 31);
  STD_TORCH_CHECK(of.K >= 1, "x has no columns, expected at least 1");
  STD_TORCH_CHECK(of.r >= 1 || !bias.has_value(), "r is 0, expected at least 1 beside a bias");
}

// Makes the device of the tensors current, on which the driver describes them. It asks for the device's context, which
// a thread may not have yet.
inline void enter_sm90(const char* name, const OnDevice& on) {
  check_capability(name, 90, on, 90);
#ifndef LORAFAST_SM90A
  STD_TORCH_CHECK(false, name, " is not in this build, which has no code for sm_90a");
#endif
  check_started(name, cudaSetDevice(on.index()));
}

// Whether rows of W [N, K] lie across k.
inline bool lies_across(const MatrixView& weight) {
  return weight.column != 1 && (weight.columns > 1 || weight.row == 1);  // of one column any stride may be said
}

// Of arguments that are checked, of which none is empty: x [M, K], weight [N, K], whose rows lie `across`, s [M, r],
// lora_B [N, r]. Raises if TMA can't have them.
inline Sm90Launch sm90_launch(
    const MatrixView& x, const MatrixView& weight, bool across, const MatrixView& s, const MatrixView& lora_B,
    double scaling, const std::optional<Tensor>& bias, Tensor& y, Tensor& counters, const Sm90Grid& grid) {
  const auto [columns, group, ctas, cluster] = grid;
  const int64_t M = x.rows, K = x.columns, N = weight.rows, r = s.columns;
  const bool bf16 = x.type == Dtype::bfloat16;
  STD_TORCH_CHECK(
      !across || weight.row == 1 || N == 1, "weight has strides ", weight.row, " and ", weight.column,
      ", expected 1 for one of them");
  MatrixView to = view_of(y);
  to.from = y.mutable_data_ptr();
  const MatrixView of_x = rows_for_tma("x", x), of_y = rows_for_tma("y", to);
  const MatrixView of_w = rows_for_tma("weight", across ? weight.turned() : weight);
  const int64_t down = (M + 127) / 128, along = (N + columns - 1) / columns;
  const int64_t sets = (down + cluster - 1) / cluster, tiles = sets * along;  // of clusters
  STD_TORCH_CHECK(
      cluster * tiles + ctas < INT64_C(1) << 31, "y is ", M, " x ", N, ", more than ",
      (INT64_C(1) << 31) - 1 - ctas, " tiles");

  Sm90Launch of{};
  of.cluster = static_cast<unsigned>(cluster);
  of.ctas = static_cast<unsigned>(cluster * (tiles < ctas / cluster ? tiles : ctas / cluster));
  Sm90Params& p = of.p;
  p.x = tensor_map("x", of_x, 128);
  p.w = tensor_map("weight", of_w, across ? 64 : static_cast<int>(columns / cluster));
  p.y = tensor_map("y", of_y, 64);
  p.s = factor_of(s);
  p.b = factor_of(across && bf16 ? lora_B.turned() : lora_B);
  p.bias = bias_of(bias);
  p.counters = static_cast<uint32_t*>(counters.mutable_data_ptr());
  p.M = static_cast<int32_t>(M), p.N = static_cast<int32_t>(N), p.r = static_cast<int32_t>(r);
  const int64_t ranks = bf16 ? kSm90Ranks<bfloat16> : kSm90Ranks<float16>;
  p.parts = bf16 ? 1 : p.b.type == Dtype::float32 ? 3 : 2;
  p.k_steps = static_cast<int32_t>((K + 63) / 64);
  p.rank_steps = static_cast<int32_t>((r + ranks - 1) / ranks) * p.parts;
  p.row_tiles = static_cast<int32_t>(down), p.column_tiles = static_cast<int32_t>(along);
  p.cluster = static_cast<int32_t>(cluster), p.row_sets = static_cast<int32_t>(sets);
  const int64_t together = (group + cluster - 1) / cluster;
  p.group = static_cast<int32_t>(together < sets ? together : sets);  // then no product with it is above `tiles`
  p.factor_scale = static_cast<float>(scaling);
  p.sum_scale = 1.0f;
  return of;
}

}  // namespace lorafast::cuda
