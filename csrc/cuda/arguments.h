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
      " has dtype ", toString(dtype), ", expected float32, bfloat16 or float16");
  check_storage(name, tensor);
}

// Whether rows of `row` bytes that begin at `pointer` all begin at multiples of `bytes`.
inline bool aligned(const void* pointer, int64_t row, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(row)) % static_cast<uintptr_t>(bytes) == 0;
}

// A matrix as a kernel may be told to read it: a tensor, what it is turned, or its first columns. In elements.
struct MatrixView {
  const void* from;
  int64_t rows, columns, row, column;  // sizes; strides
  Dtype type;

  // The transpose.
  MatrixView turned() const { return {from, columns, rows, column, row, type}; }
  MatrixView first_columns(int64_t count) const { return {from, rows, count, row, column, type}; }
};

inline MatrixView view_of(const Tensor& matrix) {
  return {matrix.const_data_ptr(), matrix.size(0),   matrix.size(1),
          matrix.stride(0),        matrix.stride(1), dtype_of(matrix)};
}

}  // namespace lorafast::cuda
