// What arguments must be, in one place and for every device. Every message names the argument, what it is,
// what was expected.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "tensor.h"

namespace lorafast {

// As a sentence has it: "the CPU", "cuda:0".
inline std::string name_of(DeviceType type, int64_t index = -1) {
  std::string name;
  switch (type) {
    case DeviceType::CPU: return "the CPU";
    case DeviceType::CUDA: name = "cuda"; break;
    case DeviceType::XPU: name = "xpu"; break;
    case DeviceType::MPS: name = "mps"; break;
    case DeviceType::Meta: name = "meta"; break;
    default: name = "a device of type " + std::to_string(static_cast<int>(type));
  }
  return index < 0 ? name : name + ":" + std::to_string(index);
}

// The device of a call's first argument, one that the kernels run on: all others must be there too.
class OneDevice {
 public:
  OneDevice(DeviceType kernels, const char* name, const Tensor& first) : name_(name), device_(first.device()) {
    STD_TORCH_CHECK(
        device_.type() == kernels, name, " is on ", name_of(device_.type(), device_.index()), ", expected ",
        name_of(kernels));
  }

  void check(const char* name, const Tensor& tensor) const {
    const Device device = tensor.device();
    STD_TORCH_CHECK(
        device.type() == device_.type() && device.index() == device_.index(), name, " is on ",
        name_of(device.type(), device.index()), " and ", name_, " on ", name_of(device_.type(), device_.index()),
        ", expected one device");
  }

  int64_t index() const { return device_.index(); }

 private:
  const char* name_;
  Device device_;
};

// A storage can be freed or cut under a tensor that keeps its sizes: resize_ of untyped_storage(), as FSDP does it.
inline void check_storage(const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  int64_t end = tensor.storage_offset() + 1, bytes = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) end += (tensor.size(i) - 1) * tensor.stride(i);
  end *= static_cast<int64_t>(tensor.element_size());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  STD_TORCH_CHECK(end <= bytes, name, " has a storage of ", bytes, " bytes, expected at least ", end);
}

// A tensor that the kernels can read: where it is, its dtype, its memory.
inline void check_float(const char* name, const Tensor& tensor, const OneDevice& device) {
  device.check(name, tensor);
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
      " has dtype ", toString(dtype), ", expected float32, bfloat16 or float16");
  check_storage(name, tensor);
}

inline void check_matrix(
    const char* name, const Tensor& tensor, int64_t rows, int64_t cols, const OneDevice& device) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " has ", tensor.dim(), " dimensions, expected a matrix");
  STD_TORCH_CHECK(
      tensor.size(0) == rows && tensor.size(1) == cols, name, " is ", tensor.size(0), " x ", tensor.size(1),
      ", expected ", rows, " x ", cols);
  check_float(name, tensor, device);
}

inline void check_output(
    const char* name, const Tensor& tensor, int64_t rows, int64_t cols, const OneDevice& device) {
  check_matrix(name, tensor, rows, cols, device);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

inline void check_seed(const std::optional<Tensor>& seed, int64_t threshold, const OneDevice& device) {
  STD_TORCH_CHECK(threshold >= 0 && threshold <= 65536, "threshold is ", threshold, ", expected 0 to 65536");
  if (!seed.has_value()) return;
  STD_TORCH_CHECK(
      seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, "seed has ", seed->numel(),
      " elements of dtype ", toString(seed->scalar_type()), ", expected one int64");
  device.check("seed", *seed);
  check_storage("seed", *seed);
}

}  // namespace lorafast
