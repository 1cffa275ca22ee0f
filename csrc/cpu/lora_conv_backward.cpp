// What a LoRA convolution's adapter needs in the backward, in one call:
//   ds = scaling · conv(dy, Bᵀ), dB = scaling · Σ dy ⊗ s, dA of s = conv(x, A) given ds
// dy [batch, height, width, N], x [batch, H, W, C], s and ds [batch, height, width, r], lora_B and dB [N, r],
// dA [r, kernel_h, kernel_w, C], all of them contiguous float32; N and C are multiples of kLanes.
#include "conv_shrink.h"
#include "operations.h"

namespace lorafast::cpu {

void lora_conv_backward(
    const Tensor& dy, const Tensor& x, const Tensor& s, const Tensor& lora_B, double scaling, int64_t stride_h,
    int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, Tensor ds,
    Tensor dA, Tensor dB) {
  const OneDevice device(kDevice, "dy", dy);
  check_images("dy", dy, {}, device);
  check_images("x", x, {}, device);
  check_images("dA", dA, {}, device);
  const int64_t N = dy.size(3), C = x.size(3), r = dA.size(0);
  STD_TORCH_CHECK(
      N % kLanes == 0 && C % kLanes == 0, "dy has ", N, " channels and x ", C, ", expected multiples of ", kLanes);
  check_images("dA", dA, {r, dA.size(1), dA.size(2), C}, device);
  const Windows of_x(
      x, dA.size(1), dA.size(2), {stride_h, padding_h, dilation_h}, {stride_w, padding_w, dilation_w});
  const Windows of_dy(dy, 1, 1, {1, 0, 1}, {1, 0, 1});
  check_images("dy", dy, {x.size(0), of_x.height, of_x.width, N}, device);
  check_images("s", s, {x.size(0), of_x.height, of_x.width, r}, device);
  check_images("ds", ds, {x.size(0), of_x.height, of_x.width, r}, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_output("dB", dB, N, r, device);
  STD_TORCH_CHECK(
      lora_B.scalar_type() == ScalarType::Float && dB.scalar_type() == ScalarType::Float && lora_B.is_contiguous(),
      "lora_B or dB is not a contiguous float32 tensor");
  if (dy.numel() == 0 || C == 0 || r == 0) {
    for (const Tensor& output : {ds, dA, dB}) clear(output);
    return;
  }
  const auto factor = static_cast<float>(scaling);
  const auto* B = static_cast<const float*>(lora_B.const_data_ptr());
  auto* to_ds = static_cast<float*>(ds.mutable_data_ptr());
  auto* to_dB = static_cast<float*>(dB.mutable_data_ptr());
  const auto transposed = scratch<float>(r * N);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t j = 0; j < r; ++j) transposed[j * N + n] = factor * B[n * r + j];
  shrink_windows(of_dy, transposed.get(), r, N, to_ds);
  shrink_windows_backward(of_dy, static_cast<const float*>(s.const_data_ptr()), r, N, transposed.get());
  for (int64_t n = 0; n < N; ++n)
    for (int64_t j = 0; j < r; ++j) to_dB[n * r + j] = factor * transposed[j * N + n];
  shrink_windows_backward(of_x, to_ds, r, C, static_cast<float*>(dA.mutable_data_ptr()));
}

}  // namespace lorafast::cpu
