// The base GEMM of a dense weight, by oneDNN or MKL, without Python or the dispatcher around it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <optional>

#include "../checks.h"

namespace lorafast::cpu {

// Memory for a result, like `like` but for its size.
inline Tensor empty(int64_t rows, int64_t cols, const Tensor& like, bool wide = false) {
  const int64_t sizes[] = {rows, cols}, strides[] = {std::max<int64_t>(cols, 1), 1};
  int32_t dtype = aoti_torch_dtype_float32();
  if (!wide) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  }
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor transpose_of(const Tensor& weight) {
  const int64_t sizes[] = {weight.size(1), weight.size(0)}, strides[] = {weight.stride(1), weight.stride(0)};
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(weight.get(), 2, sizes, strides, 0, &made));
  return Tensor(made);
}

inline Tensor rows_between(const Tensor& matrix, int64_t first, int64_t end) {
  if (first == 0 && end == matrix.size(0)) return matrix;
  const int64_t sizes[] = {end - first, matrix.size(1)}, strides[] = {matrix.stride(0), matrix.stride(1)};
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes, strides, first * matrix.stride(0), &made));
  return Tensor(made);
}

// out = a·b + added, a bias or the output itself
inline void gemm(Tensor& out, const std::optional<Tensor>& added, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(
      added ? aoti_torch_cpu_addmm_out(out.get(), added->get(), a.get(), b.get(), 1.0, 1.0)
            : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// Whether the base GEMM, [rows, depth] by [depth, cols], comes last, onto the low-rank product. MKL adds to float32
// for nothing, where it adds what it has summed: not with few rows or columns, nor all of a long sum at once.
// oneDNN's halves take a pass more, which they take for a bias too: that is in memory first, here as in the frozen
// layer. Measured at 512 x 384 x 384 and 2048 x 1024 x 1024. Either way zeros in lora_B change no bit.
inline bool gemm_adds(ScalarType dtype, int64_t rows, int64_t cols, int64_t depth, bool with_bias) {
  return rows >= 16 && cols >= 16 && (dtype == ScalarType::Float ? depth <= 1024 : with_bias);
}

// The same where the low-rank product is of some rows alone, and the others' bias or zeros must be written for it: with
// many columns, which are in the caches then. Measured in float32 at 512 x 576 x 1536, and not with 192 and 576 columns.
inline bool gemm_adds_to_all(ScalarType dtype, int64_t rows, int64_t cols, int64_t depth) {
  return dtype == ScalarType::Float && rows >= 128 && cols >= 1024 && depth <= 1024;
}

}  // namespace lorafast::cpu
