// A launcher of layers of at most 16 rows, whatever W is stored in.
#pragma once

#include "arguments.h"
#include "decode.cuh"

namespace lorafast::cuda {

namespace decode {

// Of a matrix, or of each of a stack of them.
inline Matrix matrix_of(const Tensor& tensor) {
  const int64_t rows = tensor.dim() - 2, columns = tensor.dim() - 1;
  bool vector = tensor.stride(columns) == 1;
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t step = tensor.size(i) > 1 ? tensor.stride(i) * static_cast<int64_t>(tensor.element_size()) : 0;
    vector = vector && aligned(tensor.const_data_ptr(), step, 16);
  }
  return {tensor.const_data_ptr(), tensor.stride(rows), tensor.stride(columns), vector};
}

struct Adapters {
  const Tensor &lora_A, &lora_B;
  std::optional<Tensor> scaling_of, adapter_of;
  double scaling;
};

struct Memory {
  std::optional<Tensor>&partials, &counters;
  Tensor& y;
  std::optional<Tensor>& s;
};

// Each of `tensors`, of a stack for more than one adapter, is [n, rows, columns].
inline void check_stack(
    const char* name, const Tensor& tensor, int64_t n, int64_t rows, int64_t columns, const OneDevice& device) {
  STD_TORCH_CHECK(
      tensor.dim() == 3 && tensor.size(0) == n && tensor.size(1) == rows && tensor.size(2) == columns, name,
      " has ", tensor.dim(), " dimensions or another size, expected ", n, " x ", rows, " x ", columns);
  device.check(name, tensor);
  check_storage(name, tensor);
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, name, " has dtype ", toString(tensor.scalar_type()), ", expected ",
      toString(dtype));
}

inline void check_adapters(const Adapters& of, const Tensor& x, int64_t N, const OneDevice& device) {
  const int64_t K = x.size(1);
  STD_TORCH_CHECK(
      of.adapter_of.has_value() == of.scaling_of.has_value(),
      "scaling and adapter_of of several adapters are given together, or neither is");
  if (of.adapter_of.has_value()) {
    STD_TORCH_CHECK(of.lora_A.dim() == 3, "lora_A has ", of.lora_A.dim(), " dimensions, expected 3");
    const int64_t n = of.lora_A.size(0), r = of.lora_A.size(1);
    check_stack("lora_A", of.lora_A, n, r, K, device);
    check_stack("lora_B", of.lora_B, n, N, r, device);
    const Tensor &scaling = *of.scaling_of, &adapter_of = *of.adapter_of;
    check_vector("scaling", scaling, n, device);
    check_dtype("scaling", scaling, ScalarType::Float);
    STD_TORCH_CHECK(adapter_of.dim() == 1, "adapter_of has ", adapter_of.dim(), " dimensions, expected a vector");
    const int64_t M = x.size(0), E = adapter_of.numel();
    STD_TORCH_CHECK(
        E > 0 && M % E == 0, "adapter_of has ", E, " elements, expected one for each of ", M,
        " rows, or for as many of them each");
    check_dtype("adapter_of", adapter_of, ScalarType::Long);
    device.check("adapter_of", adapter_of);
    check_storage("adapter_of", adapter_of);
  } else {
    STD_TORCH_CHECK(of.lora_A.dim() == 2, "lora_A has ", of.lora_A.dim(), " dimensions, expected a matrix");
    check_matrix("lora_A", of.lora_A, of.lora_A.size(0), K, device);
    check_matrix("lora_B", of.lora_B, N, of.lora_A.size(0), device);
  }
  const ScalarType dtype = of.lora_A.scalar_type();
  STD_TORCH_CHECK(
      dtype == x.scalar_type() || dtype == ScalarType::Float, "lora_A has dtype ", toString(dtype),
      ", expected that of x or float32");
  check_dtype("lora_B", of.lora_B, dtype);
}

// None is needed where it has no elements.
inline void check_scratch(
    const char* name, const std::optional<Tensor>& scratch, ScalarType dtype, int64_t elements,
    const OneDevice& device) {
  if (elements == 0) return;
  STD_TORCH_CHECK(scratch.has_value(), name, " is None, expected ", elements, " elements");
  check_dtype(name, *scratch, dtype);
  STD_TORCH_CHECK(
      scratch->is_contiguous() && scratch->numel() >= elements && aligned(scratch->const_data_ptr(), 0, 16), name,
      " has ", scratch->numel(), " elements, expected ", elements, ", contiguous and aligned to 16 bytes");
  device.check(name, *scratch);
  check_storage(name, *scratch);
}

inline void check_memory(
    const Memory& memory, int64_t partials, int64_t counters, const Tensor& x, int64_t N, int64_t r,
    const OneDevice& device) {
  check_output("y", memory.y, x.size(0), N, device);
  check_dtype("y", memory.y, x.scalar_type());
  if (memory.s.has_value()) {
    const bool half = x.scalar_type() == ScalarType::Half;
    check_output("s", *memory.s, x.size(0), r, device);
    check_dtype("s", *memory.s, half ? ScalarType::Float : x.scalar_type());
  }
  check_scratch("partials", memory.partials, ScalarType::Float, partials, device);
  check_scratch("counters", memory.counters, ScalarType::Int, counters, device);
}

// What a launch needs beside its kernel and W.
struct Grid {
  unsigned ctas;
  int64_t tokens;  // 8 or 16
  size_t own_s;    // bytes of dynamic shared memory
};

// Checks all but W, of N rows, and fills in all but it. Without CTAs there is nothing to launch.
template <class Weight>
Grid prepare(
    ParamsOf<Weight>& p, const Tensor& x, int64_t N, const Adapters& adapters, const std::optional<Tensor>& bias,
    int64_t helpers, const Memory& memory) {
  const OneDevice device(kDevice, "x", x);
  const int64_t M = x.size(0), K = x.size(1);
  STD_TORCH_CHECK(M <= kMost, "x has ", M, " rows, expected at most ", kMost);
  STD_TORCH_CHECK(K > 0, "x has no columns");
  check_adapters(adapters, x, N, device);
  if (bias.has_value()) {
    check_vector("bias", *bias, N, device);
    check_dtype("bias", *bias, x.scalar_type());
  }
  const bool many = adapters.adapter_of.has_value();
  const int64_t r = adapters.lora_A.size(many ? 1 : 0);
  const int64_t tokens = M > 8 ? 16 : 8, rows = rows_of(static_cast<int>(tokens));
  const int64_t pitch = (r + rows - 1) / rows * rows;
  STD_TORCH_CHECK(r > 0 && r < INT64_C(1) << 20, "the rank is ", r, ", expected 1 to ", (1 << 20) - 1);
  STD_TORCH_CHECK(helpers >= 0 && helpers <= 4096, "there are ", helpers, " helpers, expected 0 to 4096");
  STD_TORCH_CHECK(
      helpers > 0 || tokens * pitch * 4 <= 16384, "without helpers s of rank ", r,
      " doesn't fit into shared memory");
  const int64_t partials = helpers > 0 ? tokens * pitch + helpers * rows * tokens : 0;
  STD_TORCH_CHECK(N > 0 || M == 0 || !memory.s.has_value(), "weight has no rows, no CTA makes s without them");
  check_memory(memory, partials, helpers > 0 ? kShares + helpers : 0, x, N, r, device);
  if (M == 0 || N == 0) return {0, tokens, 0};

  p.x = matrix_of(x);
  p.lora_A.one = matrix_of(adapters.lora_A);
  p.lora_B.one = matrix_of(adapters.lora_B);
  p.adapter_count = 1;
  p.rows_an_element = 1;
  p.scaling = static_cast<float>(adapters.scaling);
  if (many) {
    p.lora_A.adapter = adapters.lora_A.stride(0);
    p.lora_B.adapter = adapters.lora_B.stride(0);
    p.adapter_of = static_cast<const int64_t*>(adapters.adapter_of->const_data_ptr());
    p.adapter_of_stride = adapters.adapter_of->stride(0);
    p.scaling_of = static_cast<const float*>(adapters.scaling_of->const_data_ptr());
    p.scaling_stride = adapters.scaling_of->stride(0);
    p.adapter_count = adapters.lora_A.size(0);
    p.rows_an_element = static_cast<int32_t>(M / adapters.adapter_of->numel());
  }
  if (bias.has_value()) {
    p.bias = bias->const_data_ptr();
    p.bias_stride = bias->stride(0);
  }
  p.y = memory.y.mutable_data_ptr();
  p.s = memory.s.has_value() ? memory.s->mutable_data_ptr() : nullptr;
  if (helpers > 0) {
    p.partials = static_cast<float*>(memory.partials->mutable_data_ptr());
    p.counters = static_cast<uint32_t*>(memory.counters->mutable_data_ptr());
  }
  p.N = N;
  p.K = K;
  p.M = static_cast<int32_t>(M);
  p.r = static_cast<int32_t>(r);
  p.helpers = static_cast<int32_t>(helpers);
  p.adapters = dtype_of(adapters.lora_A);
  const int64_t ctas = p.helpers + (N + rows - 1) / rows;
  STD_TORCH_CHECK(ctas < INT64_C(1) << 31, "weight has ", N, " rows, too many for one launch");
  return {static_cast<unsigned>(ctas), tokens, helpers > 0 ? 0 : tokens * pitch * sizeof(float)};
}

}  // namespace decode

}  // namespace lorafast::cuda
