// What the launchers of GEMMs with a low-rank term, y = x·Wᵀ + scaling · s·Bᵀ + bias, ask of their arguments.
#pragma once

#include "arguments.h"

namespace lorafast::cuda {

constexpr int64_t kRanksEnd = INT64_C(1) << 20;

struct GemmSizes {
  int64_t M, K, N, r;
};

// `first`: the tensor whose dtype the others have.
inline void check_same_dtype(const char* name, const Tensor& tensor, const char* first_name, const Tensor& first) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == first.scalar_type(), name, " has dtype ", toString(tensor.scalar_type()),
      ", expected ", toString(first.scalar_type()), " beside ", first_name);
}

// x [M, K], fewer than `columns_end` columns, weight [N, K], s [M, r] of wide(x.dtype), lora_B [N, r], bias [N],
// y [M, N].
inline GemmSizes check_gemm(
    const OneDevice& device, const Tensor& x, const Tensor& weight, const Tensor& s, const Tensor& lora_B,
    const std::optional<Tensor>& bias, const Tensor& y, int64_t columns_end) {
  check_dimensions("x", x, 2);
  check_dimensions("weight", weight, 2);
  check_dimensions("s", s, 2);
  const GemmSizes of{x.size(0), x.size(1), weight.size(0), s.size(1)};
  check_matrix("x", x, of.M, of.K, device);
  check_matrix("weight", weight, of.N, of.K, device);
  check_matrix("s", s, of.M, of.r, device);
  check_matrix("lora_B", lora_B, of.N, of.r, device);
  check_output("y", y, of.M, of.N, device);
  check_same_dtype("weight", weight, "x", x);
  check_same_dtype("y", y, "x", x);
  const bool bf16 = dtype_of(x) == Dtype::bfloat16;
  STD_TORCH_CHECK(
      dtype_of(s) == (bf16 ? Dtype::bfloat16 : Dtype::float32), "s has dtype ", toString(s.scalar_type()),
      ", expected ", bf16 ? "bfloat16" : "float32", " beside x");
  if (bias.has_value()) check_vector("bias", *bias, of.N, device);
  STD_TORCH_CHECK(of.K < columns_end, "x has ", of.K, " columns, expected fewer than ", columns_end);
  STD_TORCH_CHECK(of.r < kRanksEnd, "r is ", of.r, ", expected less than ", kRanksEnd);
  return of;
}

// Scratch memory.
inline void check_memory(
    const char* name, const std::optional<Tensor>& scratch, ScalarType dtype, int64_t elements,
    const OneDevice& device) {
  STD_TORCH_CHECK(scratch.has_value(), name, " is None, expected ", elements, " elements");
  STD_TORCH_CHECK(
      scratch->scalar_type() == dtype && scratch->is_contiguous() && scratch->numel() >= elements &&
          aligned(scratch->const_data_ptr(), 0, 16),
      name, " has ", scratch->numel(), " elements of dtype ", toString(scratch->scalar_type()), ", expected ",
      elements, " of ", toString(dtype), ", contiguous and aligned to 16 bytes");
  device.check(name, *scratch);
  check_storage(name, *scratch);
}

}  // namespace lorafast::cuda
