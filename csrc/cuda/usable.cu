// Whether this build's kernels can run on a device at all: lorafast/backends/cuda asks before it offers them.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

// Tests play an older one.
#ifndef LORAFAST_TOOLKIT
#define LORAFAST_TOOLKIT CUDART_VERSION
#endif

namespace lorafast::cuda {

// Every file has code for the same architectures as this kernel.
__global__ void probe_kernel() {}

namespace {

// Of what the kernels are compiled for, as 800 or 8000, and of drivers, as 13000.
std::string version(int number, int of_major) {
  return std::to_string(number / of_major) + "." + std::to_string(number % of_major / 10);
}

std::string compiled_for() {
  std::string all;
  for (const int architecture : {__CUDA_ARCH_LIST__})
    all += (all.empty() ? "" : ", ") + version(architecture, 100);
  return all;
}

std::string why_unusable(int device) {
  const std::string built = "they were built with CUDA " + version(LORAFAST_TOOLKIT, 1000);
  int driver = 0;
  (void)cudaDriverGetVersion(&driver);
  if (driver == 0) return "there is no NVIDIA driver";
  const std::string has_driver = ", and the driver is for CUDA " + version(driver, 1000);
  // Within a major version every driver serves every runtime.
  if (driver / 1000 < LORAFAST_TOOLKIT / 1000) return built + has_driver + ": update the driver";
#ifdef LORAFAST_COMPRESSED
  // An older one finds no code, and says that there is none for the device (setup.py).
  if (driver < 12040)
    return "their code is compressed, which drivers for CUDA 12.4 or later read" + has_driver +
           ": update the driver";
#endif
  const std::string name = "cuda:" + std::to_string(device);
  DeviceGuardHandle guard = nullptr;
  if (aoti_torch_create_device_guard(device, &guard) != 0) return "there is no " + name;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) {
    aoti_torch_delete_device_guard(guard);
    return "";
  }
  (void)cudaGetLastError();  // else PyTorch finds it
  int major = 0, minor = 0;
  (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  (void)cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  (void)cudaGetLastError();
  aoti_torch_delete_device_guard(guard);
  const std::string has = name + " has " + std::to_string(major) + "." + std::to_string(minor);
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "they are compiled for compute capability " + compiled_for() + ", and " + has;
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      return built + has_driver + ", too old for PTX of it (" + has + "): update the driver";
    default: return "a kernel can't be loaded on " + name + ": " + cudaGetErrorString(error);
  }
}

}  // namespace
}  // namespace lorafast::cuda

#define LORAFAST_TEXT(x) #x
#define LORAFAST_VERSION(major, minor) LORAFAST_TEXT(major) "." LORAFAST_TEXT(minor)

// Found in the file: compressed code doesn't say it.
extern "C" __attribute__((visibility("default"))) const char lorafast_cuda_compiled_by[] =
    "lorafast: compiled by nvcc " LORAFAST_VERSION(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__);

// A sentence if the kernels can't run on a device of PyTorch's, else "". The caller's thread may read it until it
// asks again.
extern "C" __attribute__((visibility("default"))) const char* lorafast_cuda_why_unusable(int device) {
  thread_local std::string answer;
  answer = lorafast::cuda::why_unusable(device);
  return answer.c_str();
}

// Whether there is code for what sm_90a alone has.
extern "C" __attribute__((visibility("default"))) int lorafast_cuda_has_wgmma() {
#ifdef LORAFAST_SM90A
  return 1;
#else
  return 0;
#endif
}

// The compute capabilities that the kernels are compiled for: "8.0, 9.0".
extern "C" __attribute__((visibility("default"))) const char* lorafast_cuda_architectures() {
  static const std::string all = lorafast::cuda::compiled_for();
  return all.c_str();
}
