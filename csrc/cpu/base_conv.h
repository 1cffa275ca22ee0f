// The convolution with a dense weight, by whatever PyTorch takes for it, without Python around it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <optional>

#include "windows.h"

namespace lorafast::cpu {

// Two dimensions, no groups.
struct BaseConv {
  int64_t stride[2], padding[2], dilation[2];

  Windows::Axis vertical() const { return {stride[0], padding[0], dilation[0]}; }
  Windows::Axis horizontal() const { return {stride[1], padding[1], dilation[1]}; }

  // y = conv(x, W) + bias
  Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) const {
    AtenTensorHandle of_bias = bias.has_value() ? bias->get() : nullptr, made = nullptr;
    const int64_t none[2] = {};
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(
        x.get(), weight.get(), bias.has_value() ? &of_bias : nullptr, stride, 2, padding, 2, dilation, 2, 0, none,
        2, 1, &made));
    return Tensor(made);
  }

  // Its gradient in x, of which size and strides count.
  Tensor backward(const Tensor& dy, const Tensor& x, const Tensor& weight) const {
    AtenTensorHandle made[3] = {};
    const int64_t none[2] = {};
    const int32_t wanted[3] = {1, 0, 0};
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
        dy.get(), x.get(), weight.get(), nullptr, 0, stride, 2, padding, 2, dilation, 2, 0, none, 2, 1, wanted, 3,
        &made[0], &made[1], &made[2]));
    for (AtenTensorHandle other : {made[1], made[2]})  // undefined
      if (other != nullptr) TORCH_ERROR_CODE_CHECK(aoti_torch_delete_tensor_object(other));
    return Tensor(made[0]);
  }
};

// [batch, channels, height, width] in memory as channels last
inline Tensor empty_last(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  const int64_t sizes[] = {batch, channels, height, width};
  const int64_t row = std::max<int64_t>(channels, 1), line = std::max<int64_t>(width, 1) * row;
  const int64_t strides[] = {std::max<int64_t>(height, 1) * line, 1, line, row};
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      4, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace lorafast::cpu
