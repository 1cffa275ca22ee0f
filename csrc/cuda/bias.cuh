// The bias of a GEMM.
#pragma once

#include <cstdint>
#include <optional>

#include "device.h"
#include "numbers.cuh"

namespace lorafast::cuda {

// [N] of any dtype, or null.
struct Bias {
  const void* from;
  int64_t stride, N;
  Dtype type;

  // Of column n, which may lie beyond the last.
  __device__ __forceinline__ float at(int64_t n) const {
    return n < N ? load_as_float(from, n * stride, type) : 0.0f;
  }
};

inline Bias bias_of(const std::optional<Tensor>& bias) {
  if (!bias.has_value()) return {};
  return {bias->const_data_ptr(), bias->stride(0), bias->size(0), dtype_of(*bias)};
}

}  // namespace lorafast::cuda
