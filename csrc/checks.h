// What arguments must be, in one place. Every message names the argument, what it is, what was expected.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace lorafast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A storage can be freed or cut under a tensor that keeps its sizes: resize_ of untyped_storage(), as FSDP does it.
inline void check_storage(const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  int64_t end = tensor.storage_offset() + 1, bytes = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) end += (tensor.size(i) - 1) * tensor.stride(i);
  end *= static_cast<int64_t>(tensor.element_size());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  STD_TORCH_CHECK(end <= bytes, name, " has a storage of ", bytes, " bytes, expected at least ", end);
}

inline void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " has ", tensor.dim(), " dimensions, expected a matrix");
  STD_TORCH_CHECK(
      tensor.size(0) == rows && tensor.size(1) == cols, name, " is ", tensor.size(0), " x ", tensor.size(1),
      ", expected ", rows, " x ", cols);
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
      " has dtype ", static_cast<int>(dtype), ", expected float32, bfloat16 or float16");
  check_storage(name, tensor);
}

inline void check_output(const char* name, const Tensor& tensor, int64_t rows, int64_t cols) {
  check_matrix(name, tensor, rows, cols);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

inline void check_seed(const std::optional<Tensor>& seed, int64_t threshold) {
  STD_TORCH_CHECK(threshold >= 0 && threshold <= 65536, "threshold is ", threshold, ", expected 0 to 65536");
  if (!seed.has_value()) return;
  STD_TORCH_CHECK(
      seed->numel() == 1 && seed->scalar_type() == ScalarType::Long && seed->is_cpu(),
      "seed must be one int64 on the CPU");
  check_storage("seed", *seed);
}

}  // namespace lorafast
