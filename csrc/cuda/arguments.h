// What several launchers ask of their arguments.
#pragma once

#include "device.h"

namespace lorafast::cuda {

// Before its sizes are asked for.
inline void check_dimensions(const char* name, const Tensor& tensor, int64_t expected) {
  STD_TORCH_CHECK(tensor.dim() == expected, name, " has ", tensor.dim(), " dimensions, expected ", expected);
}

inline void check_vector(const char* name, const Tensor& tensor, int64_t size, const OneDevice& device) {
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.size(0) == size, name, " has ", tensor.dim(), " dimensions and ", tensor.numel(),
      " elements, expected a vector of ", size);
  device.check(name, tensor);
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
      " has dtype ", torch::headeronly::toString(dtype), ", expected float32, bfloat16 or float16");
  check_storage(name, tensor);
}

// Whether rows of `row` bytes that begin at `pointer` all begin at multiples of `bytes`.
inline bool aligned(const void* pointer, int64_t row, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(row)) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace lorafast::cuda
