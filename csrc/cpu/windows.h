// The windows of a convolution over channels-last images: which row of x each position of y sees at each tap.
#pragma once

#include "matrix.h"

namespace lorafast::cpu {

// x [batch, H, W, C], y [batch, height, width, .], both contiguous; a row is the C channels of a position.
class Windows {
 public:
  struct Axis {
    int64_t stride, padding, dilation;
  };

  Windows(const Tensor& x, int64_t kernel_h, int64_t kernel_w, Axis vertical, Axis horizontal)
      : taps(kernel_h * kernel_w),
        height(outputs(x.size(1), kernel_h, vertical)),
        width(outputs(x.size(2), kernel_w, horizontal)),
        positions(x.size(0) * height * width),
        data_(static_cast<const float*>(x.const_data_ptr())),
        H_(x.size(1)),
        W_(x.size(2)),
        C_(x.size(3)),
        kernel_w_(kernel_w),
        vertical_(vertical),
        horizontal_(horizontal) {}

  // Calls visit(position, row of x) for each position of [first, last) whose window has the tap within x.
  template <typename Visit>
  void visit(int64_t tap, int64_t first, int64_t last, Visit visit) const {
    const int64_t down = tap / kernel_w_ * vertical_.dilation - vertical_.padding;
    const int64_t right = tap % kernel_w_ * horizontal_.dilation - horizontal_.padding;
    const int64_t stride = horizontal_.stride;
    const int64_t least = std::max<int64_t>(blocks_of(-right, stride), 0);
    const int64_t most = std::min(W_ > right ? blocks_of(W_ - right, stride) : 0, width);
    for (int64_t line = first / width, position = first; position < last; ++line) {
      const int64_t start = line * width, end = std::min(start + width, last);
      const int64_t row = line % height * vertical_.stride + down;
      if (row >= 0 && row < H_) {
        const int64_t from = std::max(position, start + least), to = std::min(end, start + most);
        const float* at = data_ + ((line / height * H_ + row) * W_ + (from - start) * stride + right) * C_;
        for (int64_t i = from; i < to; ++i, at += stride * C_) visit(i, at);
      }
      position = end;
    }
  }

  const int64_t taps, height, width, positions;

 private:
  static int64_t outputs(int64_t size, int64_t kernel, Axis axis) {
    STD_TORCH_CHECK(
        axis.stride > 0 && axis.padding >= 0 && axis.dilation > 0, "stride, padding and dilation are ",
        axis.stride, ", ", axis.padding, ", ", axis.dilation, ", expected at least 1, 0 and 1");
    return (size + 2 * axis.padding - axis.dilation * (kernel - 1) - 1) / axis.stride + 1;
  }

  const float* data_;
  int64_t H_, W_, C_, kernel_w_;
  Axis vertical_, horizontal_;
};

// A contiguous float32 tensor of four dimensions, of these sizes.
inline void check_images(
    const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes, const OneDevice& device) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " has ", tensor.dim(), " dimensions, expected 4");
  check_float(name, tensor, device);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
      " is not a contiguous float32 tensor");
  int64_t i = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(
        tensor.size(i) == size, name, " is ", tensor.size(i), " in dimension ", i, ", expected ", size);
    ++i;
  }
}

}  // namespace lorafast::cpu
