// A frozen weight W [N, K] as it is stored: codes of 4 or 8 bits, and what scales them.
#pragma once

#include "operations.h"

namespace lorafast::cpu {

// A float dtype by its number in lorafast/backends/cpu/dequantize.py.
inline Dtype dtype_of_number(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 2, "stored is ", number, ", expected 0 to 2");
  return static_cast<Dtype>(number);
}

inline const uint8_t* bytes_of(const char* name, const Tensor& codes, int64_t count, const OneDevice& device) {
  const int64_t bytes = codes.numel() * static_cast<int64_t>(codes.element_size());
  STD_TORCH_CHECK(
      codes.is_contiguous() && bytes == count, name, " has ", bytes,
      " bytes, contiguous: ", codes.is_contiguous() ? "yes" : "no", ", expected ", count, " contiguous ones");
  device.check(name, codes);
  check_storage(name, codes);
  return static_cast<const uint8_t*>(codes.const_data_ptr());
}

inline const float* floats_of(const char* name, const Tensor& tensor, int64_t count, const OneDevice& device) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count, name,
      " has ", tensor.numel(), " elements of dtype ", toString(tensor.scalar_type()), ", expected ", count,
      " of float32, contiguous");
  device.check(name, tensor);
  check_storage(name, tensor);
  return static_cast<const float*>(tensor.const_data_ptr());
}

// Asks for memory that is read soon, into the second cache.
inline void prefetch(const uint8_t* from, int64_t count) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

// Scales, nested: numbers[code] · scale of its block + offset. Each of the two is rounded.
struct Nested {
  const uint8_t* codes;
  const float *scales, *numbers, *offset;
  int64_t block;

  void load(int64_t first, int64_t count, float* to) const {
    const float added = *offset;
    for (int64_t i = 0; i < count;) {
      const int64_t at = first + i, of_block = at / block, end = std::min(count, (of_block + 1) * block - first);
      const float scale = scales[of_block];
      for (; i < end; ++i) to[i] = numbers[codes[first + i]] * scale;
    }
    for (int64_t i = 0; i < count; ++i) to[i] += added;
  }
};

class FourBit {
 public:
  int64_t N, K;

  FourBit(
      const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
      const std::optional<Tensor>& nested_quant_map, const std::optional<Tensor>& nested_offset,
      const Tensor& numbers, int64_t rows, int64_t columns, int64_t block, int64_t nested_block, bool low_first,
      int64_t stored, const OneDevice& device)
      : N(rows), K(columns), block_(block), low_first_(low_first), stored_(dtype_of_number(stored)) {
    STD_TORCH_CHECK(
        N >= 0 && K >= 0 && (K == 0 || N <= INT64_MAX / K) && block >= 1 && block <= INT32_MAX, "W is ", N, " x ",
        K, " in blocks of ", block, ", expected blocks of 1 to ", INT32_MAX);
    const int64_t count = N * K, blocks = blocks_of(count, block);
    codes_ = bytes_of("codes", codes, count / 2 + count % 2, device);
    numbers_ = floats_of("numbers", numbers, 16, device);
    if (nested_absmax.has_value()) {
      STD_TORCH_CHECK(
          nested_quant_map.has_value() && nested_offset.has_value() && nested_block >= 1 &&
              nested_block <= INT32_MAX,
          "nested_quant_map or nested_offset is None, or nested_block ", nested_block, ", beside nested_absmax");
      nested_.codes = bytes_of("absmax", absmax, blocks, device);
      nested_.scales = floats_of("nested_absmax", *nested_absmax, blocks_of(blocks, nested_block), device);
      nested_.numbers = floats_of("nested_quant_map", *nested_quant_map, 256, device);
      nested_.offset = floats_of("nested_offset", *nested_offset, 1, device);
      nested_.block = nested_block;
    } else {
      scales_ = floats_of("absmax", absmax, blocks, device);
    }
  }

  // The codes that `load` is going to read.
  void prefetch(int64_t row, int64_t column, int64_t count) const {
    cpu::prefetch(codes_ + (row * K + column) / 2, count / 2);
  }

  // to[i] = W[row, column + i], i < count; `scales` is the caller's memory.
  void load(
      const Microkernels& kernels, int64_t row, int64_t column, int64_t count, std::vector<float>& scales,
      Dtype dtype, void* to) const {
    const int64_t first = row * K + column, begin = first / block_;
    const float* of_blocks = scales_ + begin;
    if (nested_.codes != nullptr) {
      const int64_t blocks = blocks_of(first + count, block_) - begin;
      if (static_cast<int64_t>(scales.size()) < blocks) scales.resize(blocks);
      nested_.load(begin, blocks, scales.data());
      of_blocks = scales.data();
    }
    kernels.four_bit(
        codes_, first, count, low_first_, numbers_, of_blocks, first - begin * block_, block_, stored_, dtype, to);
  }

 private:
  int64_t block_;
  bool low_first_;
  Dtype stored_;
  const uint8_t* codes_;
  const float *numbers_, *scales_ = nullptr;
  Nested nested_{};
};

// scale: [], [1] or [N, 1], or with block_rows of blocks; `unit`: what it is multiplied by.
class EightBit {
 public:
  int64_t N, K;

  EightBit(
      const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
      int64_t block_columns, int64_t stored, const OneDevice& device)
      : unit_(static_cast<float>(unit)), integers_(integers), stored_(dtype_of_number(stored)) {
    STD_TORCH_CHECK(codes.dim() == 2 && codes.element_size() == 1, "codes are no matrix of bytes");
    N = codes.size(0);
    K = codes.size(1);
    codes_ = bytes_of("codes", codes, N * K, device);
    const bool of_blocks = block_rows > 0, one = !of_blocks && scale.numel() == 1;
    STD_TORCH_CHECK(
        !of_blocks || (block_columns >= 1 && std::max(block_rows, block_columns) <= INT32_MAX), "a block has ",
        block_rows, " x ", block_columns, " elements, expected up to ", INT32_MAX, " each way");
    across_ = of_blocks ? blocks_of(K, block_columns) : 1;
    width_ = of_blocks ? block_columns : std::max<int64_t>(K, 1);
    height_ = of_blocks ? block_rows : one ? std::max<int64_t>(N, 1) : 1;
    const int64_t down = of_blocks ? blocks_of(N, block_rows) : one ? 1 : N;
    scales_ = floats_of("scale", scale, down * across_, device);
  }

  void prefetch(int64_t row, int64_t column, int64_t count) const {
    cpu::prefetch(codes_ + row * K + column, count);
  }

  void load(
      const Microkernels& kernels, int64_t row, int64_t column, int64_t count, std::vector<float>&, Dtype dtype,
      void* to) const {
    const float* const of_row = scales_ + row / height_ * across_;
    char* at = static_cast<char*>(to);
    for (int64_t k = column, end = column + count; k < end;) {
      const int64_t some = std::min(end, (k / width_ + 1) * width_) - k;
      kernels.eight_bit(codes_ + row * K + k, some, integers_, of_row[k / width_] * unit_, stored_, dtype, at);
      at += some * size_of(dtype);
      k += some;
    }
  }

 private:
  float unit_;
  bool integers_;
  Dtype stored_;
  int64_t across_, width_, height_;
  const uint8_t* codes_;
  const float* scales_;
};

}  // namespace lorafast::cpu
