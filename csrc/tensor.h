// PyTorch's tensors, by its stable interface.
//
// nvcc reads a .cu file once more for each architecture. There the code of the host is only parsed, and PyTorch's headers
// would take most of the time: what launchers read of a tensor is declared instead, nothing of it is ever linked.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#ifndef __CUDA_ARCH__

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/util/Exception.h>

namespace lorafast {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Device;
using torch::stable::Tensor;

}  // namespace lorafast

#else

#define STD_TORCH_CHECK(...) ::lorafast::parsed(__VA_ARGS__)
#define TORCH_ERROR_CODE_CHECK(...) ::lorafast::parsed(__VA_ARGS__)

namespace lorafast {

template <class... Arguments>
void parsed(const Arguments&...);

enum class DeviceType : int8_t { CPU, CUDA, XPU, MPS, Meta };
enum class ScalarType : int8_t { Byte, Char, Int, Long, Half, Float, BFloat16, Float8_e4m3fn };
const char* toString(ScalarType);

struct Device {
  DeviceType type() const;
  int32_t index() const;
};

struct Tensor {
  int64_t dim() const;
  int64_t numel() const;
  int64_t size(int64_t) const;
  int64_t stride(int64_t) const;
  int64_t storage_offset() const;
  size_t element_size() const;
  bool is_contiguous() const;
  ScalarType scalar_type() const;
  Device device() const;
  void* get() const;
  const void* const_data_ptr() const;
  void* mutable_data_ptr() const;
  template <class T>
  const T* const_data_ptr() const;
  template <class T>
  T* mutable_data_ptr() const;
};

int aoti_torch_get_storage_size(void*, int64_t*);
int aoti_torch_get_current_cuda_stream(int32_t, void**);

}  // namespace lorafast

#endif
