#include "copy.h"

namespace lorafast::cuda {

struct CopyParams {
  const float* x;
  float* y;
  int64_t count;
  float* partials;
  uint32_t* counters;
};

__device__ void copy_one(const CopyParams& p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i == 0 && p.partials != nullptr) *p.partials = 1;
  if (i == 0 && p.counters != nullptr) *p.counters += 1;
  if (i < p.count) p.y[i] = p.x[i];
}

__global__ void copy_kernel(const __grid_constant__ CopyParams p) { copy_one(p); }

// Its shared memory is all that differs.
template <int kStatic>
__global__ void copy_by_shared_kernel(const __grid_constant__ CopyParams p) {
  extern __shared__ float dynamic[];
  __shared__ volatile float own[kStatic];
  if (threadIdx.x == 0) own[0] = dynamic[0] = 1;
  copy_one(p);
}

__global__ void copy_by_arguments_kernel(float factor, const float* x, int16_t shift, float* y, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) y[i] = factor * x[i] + shift;
}

namespace {

constexpr unsigned kThreads = 32;

// Without anything that csrc/cuda/device.h does.
void launch_bare(const CopyParams& p, unsigned ctas, unsigned threads, size_t shared, cudaStream_t stream) {
  void* arguments[] = {const_cast<CopyParams*>(&p)};
  const auto* kernel = reinterpret_cast<const void*>(copy_by_shared_kernel<2>);
  check_started("copy", cudaLaunchKernel(kernel, dim3(ctas), dim3(threads), arguments, shared, stream));
}

}  // namespace

void copy(const Tensor& x, int64_t how, Tensor y, std::optional<Tensor> partials, std::optional<Tensor> counters) {
  const OneDevice device(kDevice, "x", x);
  check_matrix("x", x, x.size(0), x.size(1), device);
  check_output("y", y, x.size(0), x.size(1), device);
  CopyParams p{
      static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()), x.numel(),
      partials.has_value() ? static_cast<float*>(partials->mutable_data_ptr()) : nullptr,
      counters.has_value() ? static_cast<uint32_t*>(counters->mutable_data_ptr()) : nullptr};
  const unsigned ctas = static_cast<unsigned>((p.count + kThreads - 1) / kThreads);
  if (how == 3) {  // without a guard
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(0, &stream));
    return launch_bare(p, ctas, kThreads, 4, static_cast<cudaStream_t>(stream));
  }
  const OnDevice on(device);
  switch (how) {
    case 1:  // exchanged
      p.y = const_cast<float*>(p.x);
      p.x = static_cast<const float*>(y.const_data_ptr());
      return launch("copy", copy_kernel, dim3(ctas), kThreads, 0, on, p);
    case 2: return launch_bare(p, ctas, kThreads, 4, nullptr);                  // another stream
    case 4: return launch_bare(p, ctas, kThreads, 48 * 1024 - 4, on.stream());  // not allowed
    case 5: return launch_bare(p, ctas, 2048, 4, on.stream());                  // more than a CTA has
    case 6:
      copy_by_arguments_kernel<<<ctas, kThreads, 0, on.stream()>>>(2.0f, p.x, -3, p.y, p.count);
      return check_started("copy", cudaGetLastError());
    case 7: return launch("copy", copy_kernel, dim3(ctas - 1), kThreads, 0, on, p);  // the last CTA is missing
    case 8: return launch("copy", copy_kernel, dim3(ctas), kThreads, 0, on, p, 2);
    case 9: return launch("copy", copy_kernel, dim3(ctas), kThreads, 0, on, p, 16);
    case 10:  // the second needs more than the first
      launch("copy", copy_by_shared_kernel<3>, dim3(ctas), kThreads, 40 * 1024, on, p);
      return launch("copy", copy_by_shared_kernel<3>, dim3(ctas), kThreads, 60 * 1024, on, p);
    case 11: return launch("copy", copy_by_shared_kernel<4>, dim3(ctas), kThreads, 300 * 1024, on, p);
    default: return launch("copy", copy_kernel, dim3(ctas), kThreads, 0, on, p);
  }
}

}  // namespace lorafast::cuda
