// y = 2·x, of float32.
#include "twice.h"

namespace lorafast::cuda {

__global__ void twice_kernel(const float* x, float* y, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) y[i] = 2 * x[i];
}

void twice(const Tensor& x, Tensor y) {
  const OneDevice device(DeviceType::CUDA, "x", x);
  check_matrix("x", x, x.size(0), x.size(1), device);
  check_output("y", y, x.size(0), x.size(1), device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(static_cast<int32_t>(device.index()), &stream));
  twice_kernel<<<static_cast<unsigned>((x.numel() + 255) / 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()), x.numel());
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "twice didn't start: ", cudaGetErrorString(error));
}

}  // namespace lorafast::cuda
