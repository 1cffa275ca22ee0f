// A convolution's forward in one call, and its backward: the convolutions with W are PyTorch's, what A and B add is
// made here. These are short: a call of its own for each would cost a large part of it in Python and the dispatcher.
// x [batch, C, H, W], s [batch, r, height, width] and dy [batch, N, height, width] are channels last, lora_A
// [r, C, kernel_h, kernel_w] and weight [N, C, kernel_h, kernel_w] that or contiguous, lora_B [N, r, 1, 1]; all of
// them float32, without groups.
#include "base_conv.h"
#include "conv_shrink.h"
#include "operations.h"
#include "skinny.h"

namespace lorafast::cpu {
namespace {

// Four dimensions in the order in which channels last has them in memory.
Tensor channels_last(const Tensor& images) {
  const int64_t order[] = {0, 2, 3, 1};
  int64_t sizes[4], strides[4];
  for (int i = 0; i < 4; ++i) {
    sizes[i] = images.size(order[i]);
    strides[i] = images.stride(order[i]);
  }
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(images.get(), 4, sizes, strides, 0, &made));
  return Tensor(made);
}

// What PyTorch's convolution gave, which may be contiguous: of images of one row or column, or by another library.
Tensor in_channels_last(const Tensor& images) {
  if (channels_last(images).is_contiguous()) return images;
  return torch::stable::contiguous(images, torch::headeronly::MemoryFormat::ChannelsLast);
}

void check_dimensions(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " has ", tensor.dim(), " dimensions, expected 4");
}

// A kernel [rows, C, kernel_h, kernel_w] that is channels last or contiguous.
struct Kernel {
  Kernel(const char* name, const Tensor& tensor, const OneDevice& device)
      : data(static_cast<const float*>(tensor.const_data_ptr())),
        rows(tensor.size(0)),
        C(tensor.size(1)),
        taps(tensor.size(2) * tensor.size(3)),
        last(channels_last(tensor).is_contiguous()) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Float && (last || tensor.is_contiguous()), name,
        " is not a float32 tensor in a memory format");
    check_float(name, tensor, device);
  }

  const float* data;
  const int64_t rows, C, taps;
  const bool last;
};

Matrix matrix(const float* data, int64_t rows, int64_t cols) {
  return {const_cast<float*>(data), Dtype::kFloat32, rows, cols, cols, 1};
}

// A as [r, columns], the columns in the order of taps or of C: where it is, or in `copy`.
const float* rows_of(const Kernel& A, bool taps_first, Scratch<float>& copy) {
  if (A.last == taps_first) return A.data;
  copy = scratch<float>(A.rows * A.taps * A.C);
  const int64_t first = taps_first ? A.taps : A.C, second = taps_first ? A.C : A.taps;
  for (int64_t j = 0; j < A.rows; ++j) {
    const float* from = A.data + j * first * second;
    float* to = &copy[j * first * second];
    for (int64_t p = 0; p < first; ++p)
      for (int64_t q = 0; q < second; ++q) *to++ = from[q * first + p];
  }
  return copy.get();
}

// The same as `expand` takes it: [columns / kLanes, r, kLanes].
Scratch<float> packed(const Kernel& A, bool taps_first) {
  Scratch<float> copy;
  const float* from = rows_of(A, taps_first, copy);
  const int64_t cols = A.taps * A.C;
  auto to = scratch<float>(cols * A.rows);
  for (int64_t j = 0; j < A.rows; ++j)
    for (int64_t col = 0; col < cols; col += kLanes)
      std::copy_n(from + j * cols + col, kLanes, &to[col * A.rows + j * kLanes]);
  return to;
}

// W + scaling · B·A, in the memory format of W
Tensor merged(const Tensor& weight, const Kernel& A, const float* B, double scaling, const OneDevice& device) {
  const Kernel W("weight", weight, device);
  const int64_t N = W.rows, cols = W.C * W.taps, r = A.rows;
  Tensor sum = torch::stable::empty_like(weight);
  auto* to = static_cast<float*>(sum.mutable_data_ptr());
  const auto factors = packed(A, W.last);
  const auto scale = static_cast<float>(scaling);
  const auto& expand = microkernels().floats.expand;
  const int64_t row_blocks = blocks_of(N, kTileRows), stripes = blocks_of(cols, kTileCols);
  torch::stable::parallel_for(0, row_blocks * stripes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / stripes * kTileRows, rows = std::min(kTileRows, N - row);
      const int64_t col = unit % stripes * kTileCols, some = std::min(kTileCols, cols - col);
      for (int64_t i = row; i < row + rows; ++i) std::copy_n(W.data + i * cols + col, some, to + i * cols + col);
      expand(
          to + row * cols + col, cols, rows, some, B + row * r, r, &factors[col * r], scale, nullptr, nullptr,
          true);
    }
  });
  return sum;
}

// The adapter and the geometry of a call, checked.
struct Layer {
  Layer(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const BaseConv& base, const OneDevice& device)
      : rows_of_x(channels_last(x)),
        C(x.size(1)),
        N(lora_B.size(0)),
        r(lora_A.size(0)),
        kernel_h(lora_A.size(2)),
        kernel_w(lora_A.size(3)),
        A("lora_A", lora_A, device),
        B(static_cast<const float*>(lora_B.const_data_ptr())),
        windows(checked(rows_of_x, device), lora_A.size(2), lora_A.size(3), base.vertical(), base.horizontal()) {
    STD_TORCH_CHECK(A.C == C, "lora_A has ", A.C, " channels, expected ", C);
    STD_TORCH_CHECK(C % kLanes == 0, "x has ", C, " channels, expected a multiple of ", kLanes);
    STD_TORCH_CHECK(
        lora_B.numel() == N * r && lora_B.scalar_type() == ScalarType::Float && lora_B.is_contiguous(),
        "lora_B is not a contiguous float32 tensor of ", N, " x ", r, " elements");
    check_float("lora_B", lora_B, device);
  }

  // Tensors over the positions of y, channels last.
  void check(const char* name, const Tensor& rows, int64_t channels, const OneDevice& device) const {
    check_images(name, rows, {rows_of_x.size(0), windows.height, windows.width, channels}, device);
  }

  const Tensor rows_of_x;
  const int64_t C, N, r, kernel_h, kernel_w;
  const Kernel A;
  const float* B;
  const Windows windows;

 private:
  static const Tensor& checked(const Tensor& rows, const OneDevice& device) {
    check_images("x", rows, {}, device);
    return rows;
  }
};

// Where a tap's windows lie along one axis: the position of y that sees `at` of x, or -1.
int64_t position_of(int64_t at, int64_t tap, const Windows::Axis& axis, int64_t outputs) {
  const int64_t from = at + axis.padding - tap * axis.dilation;
  return from >= 0 && from % axis.stride == 0 && from / axis.stride < outputs ? from / axis.stride : -1;
}

// dx += the gradient of s = conv(x, A) in x, given ds [positions, r]: what ds has for each tap of a row of x is one
// long row, and all taps of A are one matrix. Threads share out rows of dx.
void add_to_dx(const Layer& layer, const BaseConv& base, const float* ds, float* dx) {
  const int64_t r = layer.r, C = layer.C, taps = layer.A.taps, all = taps * r;
  const int64_t H = layer.rows_of_x.size(1), W = layer.rows_of_x.size(2), M = layer.rows_of_x.size(0) * H * W;
  Scratch<float> copy;
  const float* from = rows_of(layer.A, true, copy);
  const auto factors = scratch<float>(C * all);
  for (int64_t col = 0; col < C; col += kLanes)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t j = 0; j < r; ++j)
        std::copy_n(from + (j * taps + tap) * C + col, kLanes, &factors[col * all + (tap * r + j) * kLanes]);

  const auto& expand = microkernels().floats.expand;
  const int64_t size = std::min(kTileRows, blocks_of(blocks_of(M, kBlocks), 8) * 8);
  torch::stable::parallel_for(0, blocks_of(M, size), 1, [&](int64_t begin, int64_t end) {
    const auto rows_of_ds = scratch<float>(size * all);
    for (int64_t first = begin * size; first < std::min(end * size, M); first += size) {
      const int64_t rows = std::min(size, M - first);
      std::fill_n(rows_of_ds.get(), rows * all, 0.0f);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = first + i, image = row / (H * W);
        for (int64_t v = 0; v < layer.kernel_h; ++v) {
          const int64_t h = position_of(row / W % H, v, base.vertical(), layer.windows.height);
          if (h < 0) continue;
          for (int64_t u = 0; u < layer.kernel_w; ++u) {
            const int64_t w = position_of(row % W, u, base.horizontal(), layer.windows.width);
            if (w < 0) continue;
            const int64_t position = (image * layer.windows.height + h) * layer.windows.width + w;
            std::copy_n(ds + position * r, r, &rows_of_ds[i * all + (v * layer.kernel_w + u) * r]);
          }
        }
      }
      expand(dx + first * C, C, rows, C, rows_of_ds.get(), all, factors.get(), 1.0f, nullptr, nullptr, true);
    }
  });
}

void check_weight(const Tensor& weight, const Layer& layer, const Tensor& lora_A) {
  check_dimensions("weight", weight);
  const int64_t sizes[] = {layer.N, layer.C, lora_A.size(2), lora_A.size(3)};
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(
        weight.size(i) == sizes[i], "weight is ", weight.size(i), " in dimension ", i, ", expected ", sizes[i]);
}

// Of x's batch, channels last: [batch, channels, height, width].
Tensor empty_images(const Layer& layer, int64_t channels) {
  const int64_t height = layer.windows.height, width = layer.windows.width;
  return empty_last(layer.rows_of_x.size(0), channels, height, width);
}

}  // namespace

// y = conv(x, W) + scaling · B·s + bias and s = conv(x, A), or with `merge` y = conv(x, W + scaling · B·A) + bias
// alone
std::tuple<Tensor, std::optional<Tensor>> lora_conv(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, bool merge) {
  const OneDevice device(kDevice, "x", x);
  const BaseConv base{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  check_dimensions("x", x);
  check_dimensions("lora_A", lora_A);
  const Layer layer(x, lora_A, lora_B, base, device);
  check_weight(weight, layer, lora_A);
  if (merge) return {base.forward(x, merged(weight, layer.A, layer.B, scaling, device), bias), std::nullopt};
  const Tensor y = in_channels_last(base.forward(x, weight, bias)), rows_of_y = channels_last(y);
  layer.check("y", rows_of_y, layer.N, device);
  Tensor s = empty_images(layer, layer.r);
  if (s.numel() == 0 || layer.C == 0) {
    clear(s);
    return {y, s};
  }
  auto* to = static_cast<float*>(s.mutable_data_ptr());
  Scratch<float> copy;
  shrink_windows(layer.windows, rows_of(layer.A, true, copy), layer.r, layer.C, to);
  const int64_t positions = layer.windows.positions;
  add_expanded(
      matrix(static_cast<const float*>(y.const_data_ptr()), positions, layer.N), matrix(to, positions, layer.r),
      matrix(layer.B, layer.N, layer.r), scaling, std::nullopt);
  return {y, s};
}

// What a LoRA convolution's adapter needs in the backward, in one call:
//   ds = scaling · conv(dy, Bᵀ), dB = scaling · Σ dy ⊗ s, dA of s = conv(x, A) given ds
// and with a weight dx, of W + scaling · B·A or of both convolutions. C and N are multiples of kLanes.
std::tuple<std::optional<Tensor>, Tensor, Tensor, Tensor> lora_conv_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight, const Tensor& s, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, bool merge) {
  const OneDevice device(kDevice, "dy", dy);
  const BaseConv base{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  check_dimensions("dy", dy);
  check_dimensions("x", x);
  check_dimensions("s", s);
  check_dimensions("lora_A", lora_A);
  const Layer layer(x, lora_A, lora_B, base, device);
  const int64_t N = layer.N, C = layer.C, r = layer.r;
  STD_TORCH_CHECK(N % kLanes == 0, "dy has ", N, " channels, expected a multiple of ", kLanes);
  const Tensor rows_of_dy = channels_last(dy);
  layer.check("dy", rows_of_dy, N, device);
  layer.check("s", channels_last(s), r, device);
  if (weight.has_value()) check_weight(*weight, layer, lora_A);

  Tensor ds = empty_images(layer, r), dB = torch::stable::empty_like(lora_B),
         dA = torch::stable::empty_like(lora_A);
  if (dy.numel() == 0 || C == 0 || r == 0) {
    for (const Tensor& output : {ds, dA, dB}) clear(output);
  } else {
    const auto factor = static_cast<float>(scaling);
    const float* B = layer.B;
    auto* to_ds = static_cast<float*>(ds.mutable_data_ptr());
    auto* to_dB = static_cast<float*>(dB.mutable_data_ptr());
    auto* to_dA = static_cast<float*>(dA.mutable_data_ptr());
    const Windows of_dy(rows_of_dy, 1, 1, {1, 0, 1}, {1, 0, 1});
    const auto turned = scratch<float>(r * N);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t j = 0; j < r; ++j) turned[j * N + n] = factor * B[n * r + j];
    shrink_windows(of_dy, turned.get(), r, N, to_ds);
    shrink_windows_backward(of_dy, static_cast<const float*>(s.const_data_ptr()), r, N, turned.get());
    for (int64_t n = 0; n < N; ++n)
      for (int64_t j = 0; j < r; ++j) to_dB[n * r + j] = factor * turned[j * N + n];
    if (layer.A.last) {
      shrink_windows_backward(layer.windows, to_ds, r, C, to_dA);
    } else {
      const auto found = scratch<float>(dA.numel());
      shrink_windows_backward(layer.windows, to_ds, r, C, found.get());
      const float* from = found.get();
      const int64_t taps = layer.A.taps;
      for (int64_t j = 0; j < r; ++j)
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t c = 0; c < C; ++c) to_dA[(j * C + c) * taps + tap] = *from++;
    }
  }
  if (!weight.has_value()) return {std::nullopt, ds, dA, dB};
  if (merge) return {base.backward(dy, x, merged(*weight, layer.A, layer.B, scaling, device)), ds, dA, dB};
  const Tensor dx = in_channels_last(base.backward(dy, x, *weight));
  if (dx.numel() > 0 && ds.numel() > 0) {
    const Tensor rows_of_dx = channels_last(dx);
    check_images("dx", rows_of_dx, {x.size(0), x.size(2), x.size(3), C}, device);
    add_to_dx(
        layer, base, static_cast<const float*>(ds.const_data_ptr()), static_cast<float*>(dx.mutable_data_ptr()));
  }
  return {dx, ds, dA, dB};
}

}  // namespace lorafast::cpu
