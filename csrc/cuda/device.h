// Where a launcher's kernels run: the device of its tensors, on PyTorch's current stream.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "../checks.h"
#include "numbers.cuh"

namespace lorafast::cuda {

// Of the tensors that the kernels take.
extern const DeviceType kDevice;

// Makes a device current for the time of a launch.
class OnDevice {
 public:
  explicit OnDevice(const OneDevice& device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const { return stream_; }
  int index() const { return index_; }

 private:
  void* guard_;  // PyTorch's
  cudaStream_t stream_;
  int index_;
};

// No code is compiled for devices before it.
inline constexpr int kOldestOfAll = 75;

// A launch that asks for no more dynamic shared memory needs no permission: with what the kernel declares itself
// it has less than 48 KB.
inline constexpr size_t kSharedAlways = 32 * 1024;

// Permits a kernel so much dynamic shared memory on this device.
void allow_shared(const void* kernel, size_t bytes, const OnDevice& on);

// Raises if a launch gave an error. `name` is the kernel's.
void check_started(const char* name, cudaError_t error);

// Its compute capability, as 75. `name` is the kernel's that asks.
int capability_of(const char* name, const OnDevice& on);

// Raises if the device's compute capability is less than `oldest`, as 80, or more than `newest`.
void check_capability(const char* name, int oldest, const OnDevice& on, int newest = 1000);

// Launches a kernel whose only parameter is a struct, in clusters of `cluster` CTAs along x, which may be of one: what
// only clusters may do (st.async) is an illegal instruction where the launch has none, 0. For devices older than
// `kOldest` the kernel is code that traps, after which CUDA serves the process no more: they are refused.
template <int kOldest = 80, class Params>
void launch(
    const char* name, void (*kernel)(Params), dim3 grid, unsigned threads, size_t shared, const OnDevice& on,
    const std::common_type_t<Params>& params, unsigned cluster = 0) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if constexpr (kOldest > kOldestOfAll) check_capability(name, kOldest, on);
  if (shared > kSharedAlways) allow_shared(function, shared, on);
  void* arguments[] = {const_cast<Params*>(&params)};
  if (cluster == 0) {
    check_started(name, cudaLaunchKernel(function, grid, dim3(threads), arguments, shared, on.stream()));
  } else {
    cudaLaunchAttribute clusters = {};
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim = {cluster, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = on.stream();
    config.attrs = &clusters;
    config.numAttrs = 1;
    check_started(name, cudaLaunchKernelExC(&config, function, arguments));
  }
}

// The dtype of a tensor that a check has let through.
inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: return Dtype::float32;
  }
}

// Calls `with` with an object of the tensor's element type: with(bfloat16()).
template <class With>
void with_type(const Tensor& tensor, With with) {
  switch (dtype_of(tensor)) {
    case Dtype::bfloat16: return with(bfloat16());
    case Dtype::float16: return with(float16());
    default: return with(float());
  }
}

}  // namespace lorafast::cuda
