// dA of s = conv(x, A): ds [batch, height, width, r], x [batch, H, W, C] → dA [r, kernel_h, kernel_w, C], all of them
// contiguous float32, C a multiple of kLanes.
#include "conv_shrink.h"
#include "operations.h"

namespace lorafast::cpu {

void conv_shrink_backward(
    const Tensor& ds, const Tensor& x, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, Tensor dA) {
  const OneDevice device(kDevice, "ds", ds);
  check_images("ds", ds, {}, device);
  check_images("x", x, {}, device);
  check_images("dA", dA, {}, device);
  const int64_t C = x.size(3), r = ds.size(3);
  STD_TORCH_CHECK(C % kLanes == 0, "x has ", C, " channels, expected a multiple of ", kLanes);
  check_images("dA", dA, {r, dA.size(1), dA.size(2), C}, device);
  const Windows windows(
      x, dA.size(1), dA.size(2), {stride_h, padding_h, dilation_h}, {stride_w, padding_w, dilation_w});
  check_images("ds", ds, {x.size(0), windows.height, windows.width, r}, device);
  if (dA.numel() == 0 || windows.positions == 0) return clear(dA);
  shrink_windows_backward(
      windows, static_cast<const float*>(ds.const_data_ptr()), r, C, static_cast<float*>(dA.mutable_data_ptr()));
}

}  // namespace lorafast::cpu
