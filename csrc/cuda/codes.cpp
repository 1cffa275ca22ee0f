#include "codes.h"

namespace lorafast::cuda {

namespace {

Dtype dtype_of_number(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 2, "stored is ", number, ", expected 0 to 2");
  return static_cast<Dtype>(number);
}

// Of a size from 1 to 2^31 - 1.
Divisor divisor(const char* name, int64_t by) {
  STD_TORCH_CHECK(by >= 1 && by <= INT32_MAX, name, " is ", by, ", expected 1 to ", INT32_MAX);
  int32_t shift = 0;
  while ((INT64_C(1) << shift) < by) ++shift;
  if ((INT64_C(1) << shift) == by) return {by, 0, shift};
  return {by, UINT64_MAX / static_cast<uint64_t>(by) + 1, -1};
}

const uint8_t* bytes_of(const char* name, const Tensor& codes, int64_t count, const OneDevice& device) {
  const int64_t bytes = codes.numel() * static_cast<int64_t>(codes.element_size());
  STD_TORCH_CHECK(
      codes.is_contiguous() && bytes == count, name, " has ", bytes,
      " bytes, contiguous: ", codes.is_contiguous() ? "yes" : "no", ", expected ", count, " contiguous ones");
  device.check(name, codes);
  check_storage(name, codes);
  return static_cast<const uint8_t*>(codes.const_data_ptr());
}

const float* floats_of(const char* name, const Tensor& tensor, int64_t count, const OneDevice& device) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count, name,
      " has ", tensor.numel(), " elements of dtype ", toString(tensor.scalar_type()), ", expected ", count,
      " of float32, contiguous");
  device.check(name, tensor);
  check_storage(name, tensor);
  return static_cast<const float*>(tensor.const_data_ptr());
}

int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

}  // namespace

FourBit codes_of(const FourBitTensors& given, int64_t N, int64_t K, int64_t stored, const OneDevice& device) {
  FourBit made = {};
  made.block = divisor("block", given.block);
  const int64_t count = N * K, blocks = blocks_of(count, given.block);
  made.codes = bytes_of("codes", given.codes, (count + 1) / 2, device);
  made.numbers = floats_of("numbers", given.numbers, FourBit::kNumbers, device);
  made.stored = dtype_of_number(stored);
  made.low_first = given.low_first;
  if (given.scales.scalar_type() == ScalarType::Float) {
    made.kind = Scales::plain;
    made.scales = floats_of("scales", given.scales, blocks, device);
    return made;
  }
  made.scales = bytes_of("scales", given.scales, blocks, device);
  made.kind = given.of_scales.has_value() ? Scales::nested : Scales::exponents;
  STD_TORCH_CHECK(
      given.numbers_of_scales.has_value() == given.of_scales.has_value() &&
          given.offset.has_value() == given.of_scales.has_value(),
      "of numbers_of_scales, of_scales and offset one is None beside another");
  if (made.kind == Scales::nested) {
    made.nested_block = divisor("nested_block", given.nested_block);
    made.of_scales = floats_of("of_scales", *given.of_scales, blocks_of(blocks, given.nested_block), device);
    made.numbers_of_scales = floats_of("numbers_of_scales", *given.numbers_of_scales, 256, device);
    made.offset = floats_of("offset", *given.offset, 1, device);
  }
  return made;
}

EightBit codes_of(const EightBitTensors& given, int64_t N, int64_t K, int64_t stored, const OneDevice& device) {
  EightBit made = {};
  made.codes = bytes_of("codes", given.codes, N * K, device);
  made.columns = divisor("the number of columns", K > 0 ? K : 1);
  made.unit = static_cast<float>(given.unit);
  made.stored = dtype_of_number(stored);
  made.integers = given.integers;
  made.block_rows = made.block_columns = divisor("block", 1);
  made.blocks_across = 1;
  int64_t count = 1;
  if (given.block_rows > 0) {
    made.kind = Scales::blocks;
    made.block_rows = divisor("block_rows", given.block_rows);
    made.block_columns = divisor("block_columns", given.block_columns);
    made.blocks_across = blocks_of(K, given.block_columns);
    count = blocks_of(N, given.block_rows) * made.blocks_across;
  } else {
    made.kind = given.scale.numel() == 1 ? Scales::one : Scales::rows;
    if (made.kind == Scales::rows) count = N;
  }
  made.scales = floats_of("scale", given.scale, count, device);
  return made;
}

}  // namespace lorafast::cuda
