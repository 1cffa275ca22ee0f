// s = conv(x, A): x [batch, H, W, C], lora_A [r, kernel_h, kernel_w, C] → s [batch, height, width, r], all of them
// contiguous float32. Threads share out blocks of positions.
#include "conv_shrink.h"

#include "operations.h"

namespace lorafast::cpu {

void conv_shrink(
    const Tensor& x, const Tensor& lora_A, int64_t stride_h, int64_t stride_w, int64_t padding_h,
    int64_t padding_w, int64_t dilation_h, int64_t dilation_w, Tensor s) {
  const OneDevice device(kDevice, "x", x);
  check_images("x", x, {}, device);
  check_images("lora_A", lora_A, {}, device);
  const int64_t C = x.size(3), r = lora_A.size(0);
  check_images("lora_A", lora_A, {r, lora_A.size(1), lora_A.size(2), C}, device);
  const Windows windows(
      x, lora_A.size(1), lora_A.size(2), {stride_h, padding_h, dilation_h}, {stride_w, padding_w, dilation_w});
  check_images("s", s, {x.size(0), windows.height, windows.width, r}, device);
  if (s.numel() == 0 || C == 0) return clear(s);
  shrink_windows(
      windows, static_cast<const float*>(lora_A.const_data_ptr()), r, C,
      static_cast<float*>(s.mutable_data_ptr()));
}

}  // namespace lorafast::cpu
