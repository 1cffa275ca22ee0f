// What the launchers of sm90.cuh's GEMM share: their checks, the kernel's parameters.
#pragma once

#include "arguments.h"
#include "sm90.cuh"
#include "tensor_map.h"

namespace lorafast::cuda {

// A launch, but for what its operation adds.
struct Sm90Launch {
  Sm90Params p;
  bool across;  // the weight's columns are contiguous
  unsigned ctas, cluster;
};

// Checks what every such launch has. `used`: counters.
inline void check_sm90(
    const OneDevice& device, const Tensor& x, const Tensor& weight, const Tensor& s, const Tensor& lora_B,
    const std::optional<Tensor>& bias, const Tensor& y, const Tensor& counters, int64_t used, int64_t columns,
    int64_t group, int64_t ctas, int64_t cluster) {
  STD_TORCH_CHECK(
      x.dim() == 2 && weight.dim() == 2 && s.dim() == 2 && lora_B.dim() == 2,
      "x, weight, s or lora_B is no matrix");
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), r = s.size(1);
  check_matrix("x", x, M, K, device);
  check_matrix("weight", weight, N, K, device);
  check_matrix("s", s, M, r, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_output("y", y, M, N, device);
  const Dtype dtype = dtype_of(x);
  STD_TORCH_CHECK(
      dtype != Dtype::float32, "x has dtype ", torch::headeronly::toString(x.scalar_type()),
      ", expected bfloat16 or float16");
  STD_TORCH_CHECK(
      dtype_of(weight) == dtype && dtype_of(y) == dtype, "weight or y has another dtype than x, which has ",
      torch::headeronly::toString(x.scalar_type()));
  const bool bf16 = dtype == Dtype::bfloat16;
  STD_TORCH_CHECK(
      dtype_of(s) == (bf16 ? Dtype::bfloat16 : Dtype::float32), "s has dtype ",
      torch::headeronly::toString(s.scalar_type()), ", expected ", bf16 ? "bfloat16" : "float32", " beside x");
  if (bias.has_value()) check_vector("bias", *bias, N, device);
  STD_TORCH_CHECK(K >= 1 && K < INT64_C(1) << 31, "x has ", K, " columns, expected 1 to ", (INT64_C(1) << 31) - 1);
  STD_TORCH_CHECK(r < INT64_C(1) << 20, "r is ", r, ", expected fewer than ", INT64_C(1) << 20);
  STD_TORCH_CHECK(r >= 1 || !bias.has_value(), "r is 0, expected at least 1 beside a bias");
  STD_TORCH_CHECK(columns == 256 || columns == 128, "columns is ", columns, ", expected 256 or 128");
  STD_TORCH_CHECK(
      group >= 1 && group < INT64_C(1) << 16, "group is ", group, ", expected 1 to ", (INT64_C(1) << 16) - 1);
  STD_TORCH_CHECK(cluster == 1 || cluster == 2, "cluster is ", cluster, ", expected 1 or 2");
  STD_TORCH_CHECK(ctas >= cluster && ctas < INT64_C(1) << 16, "ctas is ", ctas, ", expected at least ", cluster);
  STD_TORCH_CHECK(
      counters.scalar_type() == ScalarType::Int && counters.is_contiguous() && counters.numel() >= used,
      "counters has ", counters.numel(), " elements of dtype ",
      torch::headeronly::toString(counters.scalar_type()), ", expected at least ", used, " int32");
  device.check("counters", counters);
  check_storage("counters", counters);
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

// Of arguments that are checked, of which none is empty. Raises if TMA can't have them.
inline Sm90Launch sm90_launch(
    const Tensor& x, const Tensor& weight, const Tensor& s, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, Tensor& y, Tensor& counters, int64_t columns, int64_t group, int64_t ctas,
    int64_t cluster) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), r = s.size(1);
  const Dtype dtype = dtype_of(x);
  const bool bf16 = dtype == Dtype::bfloat16;
  // A dimension of one element may have any stride.
  const int64_t even = (K + 7) / 8 * 8;
  STD_TORCH_CHECK(
      x.stride(1) == 1 || K == 1, "x has neighbours of a row ", x.stride(1), " elements apart, expected 1");
  const int64_t x_row = M == 1 ? even : x.stride(0), y_row = M == 1 ? (N + 7) / 8 * 8 : N;
  const bool across = weight.stride(1) != 1 && K > 1;
  STD_TORCH_CHECK(
      !across || weight.stride(0) == 1 || N == 1, "weight has strides ", weight.stride(0), " and ",
      weight.stride(1), ", expected 1 for one of them");
  const int64_t w_row = across ? weight.stride(1) : N == 1 ? even : weight.stride(0);
  check_for_tma("x", x.const_data_ptr(), M, K, x_row);
  check_for_tma("weight", weight.const_data_ptr(), across ? K : N, across ? N : K, w_row);
  check_for_tma("y", y.const_data_ptr(), M, N, y_row);
  const int64_t down = (M + 127) / 128, along = (N + columns - 1) / columns;
  const int64_t sets = (down + cluster - 1) / cluster, tiles = sets * along;  // of clusters
  STD_TORCH_CHECK(
      cluster * tiles + ctas < INT64_C(1) << 31, "y is ", M, " x ", N, ", more than ",
      (INT64_C(1) << 31) - 1 - ctas, " tiles");

  Sm90Launch of{};
  of.across = across;
  of.cluster = static_cast<unsigned>(cluster);
  of.ctas = static_cast<unsigned>(cluster * (tiles < ctas / cluster ? tiles : ctas / cluster));
  Sm90Params& p = of.p;
  p.x = tensor_map("x", x.const_data_ptr(), dtype, M, K, x_row, 128);
  p.w = tensor_map(
      "weight", weight.const_data_ptr(), dtype, across ? K : N, across ? N : K, w_row,
      across ? 64 : static_cast<int>(columns / cluster));
  p.y = tensor_map("y", y.mutable_data_ptr(), dtype, M, N, y_row, 64);
  p.s = factor_of(s);
  p.b = of.across && bf16 ? factor_of(lora_B, true) : factor_of(lora_B);
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
