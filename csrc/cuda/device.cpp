#include "device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <utility>

namespace lorafast::cuda {

// Tests execute the kernels on tensors of the CPU (tests/cuda/launchers.py).
#ifndef LORAFAST_TENSORS_ON
#define LORAFAST_TENSORS_ON CUDA
#endif

const DeviceType kDevice = DeviceType::LORAFAST_TENSORS_ON;

// Of PyTorch's CUDA library, which isn't linked: the CPU build, which has none, can compile this too.
// Tests have their own.
#pragma weak aoti_torch_get_current_cuda_stream

namespace {

using CurrentStream = decltype(&aoti_torch_get_current_cuda_stream);

// Python has loaded that library for itself alone: its symbols must be asked for by its name.
CurrentStream find_current_stream() {
  if (aoti_torch_get_current_cuda_stream != nullptr) return aoti_torch_get_current_cuda_stream;
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(found);
}

CurrentStream current_stream() {
  static const CurrentStream found = find_current_stream();
  STD_TORCH_CHECK(
      found != nullptr,
      "PyTorch's CUDA library isn't loaded, or has no aoti_torch_get_current_cuda_stream, as from PyTorch 2.10");
  return found;
}

}  // namespace

OnDevice::OnDevice(const OneDevice& device) : index_(static_cast<int>(device.index())) {
  const CurrentStream stream_of = current_stream();
  DeviceGuardHandle guard = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(index_, &guard));
  guard_ = guard;
  void* stream = nullptr;
  const auto error = stream_of(index_, &stream);
  if (error != 0) (void)aoti_torch_delete_device_guard(guard);  // no destructor will
  TORCH_ERROR_CODE_CHECK(error);
  stream_ = static_cast<cudaStream_t>(stream);
}

OnDevice::~OnDevice() { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_)); }

void allow_shared(const void* kernel, size_t bytes, const OnDevice& on) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;  // the most that was asked for
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, on.index()}];
  if (bytes <= most) return;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    STD_TORCH_CHECK(false, "a kernel can't have ", bytes, " bytes of shared memory: ", cudaGetErrorString(error));
  }
  most = bytes;
}

int capability_of(const char* name, const OnDevice& on) {
  int major = 0, minor = 0;
  check_started(name, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, on.index()));
  check_started(name, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, on.index()));
  return 10 * major + minor;
}

void check_capability(const char* name, int oldest, const OnDevice& on, int newest) {
  const int has = capability_of(name, on);
  STD_TORCH_CHECK(
      has >= oldest && has <= newest, name, " needs compute capability ", oldest / 10, ".", oldest % 10, ", and ",
      name_of(DeviceType::CUDA, on.index()), " has ", has / 10, ".", has % 10);
}

void check_started(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // else the next who asks finds it
  STD_TORCH_CHECK(false, name, " didn't start: ", cudaGetErrorString(error));
}

}  // namespace lorafast::cuda
