// A part of a frozen weight W [N, K] made dense: rows and columns from (row, column) on, as many as `out` has.
// Threads share out its rows.
#include "operations.h"

namespace lorafast::cpu {

namespace {

// A float dtype by its number in lorafast/backends/cpu/dequantize.py.
Dtype dtype_of_number(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 2, "stored is ", number, ", expected 0 to 2");
  return static_cast<Dtype>(number);
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
      " has ", tensor.numel(), " elements of dtype ", torch::headeronly::toString(tensor.scalar_type()),
      ", expected ", count, " of float32, contiguous");
  device.check(name, tensor);
  check_storage(name, tensor);
  return static_cast<const float*>(tensor.const_data_ptr());
}

// The part's size, and where it begins.
struct Part {
  int64_t row, column, rows, columns;

  Part(const Tensor& out, int64_t first_row, int64_t first_column, int64_t N, int64_t K)
      : row(first_row), column(first_column), rows(out.size(0)), columns(out.size(1)) {
    STD_TORCH_CHECK(
        row >= 0 && column >= 0 && row <= N - rows && column <= K - columns, "out is ", rows, " x ", columns,
        " from ", row, ", ", column, " on, expected a part of ", N, " x ", K);
  }
};

constexpr int64_t kTask = 1 << 14;  // elements that are worth a thread

template <class Row>
void each_row(const Part& part, const Row& of) {
  const int64_t few = std::max<int64_t>(kTask / std::max<int64_t>(part.columns, 1), 1);
  torch::stable::parallel_for(0, part.rows, few, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) of(i);
  });
}

// Scales, nested: numbers[code] · scale of its block + offset. Each of the two is rounded.
struct Nested {
  const uint8_t* codes;
  const float *scales, *numbers, *offset;
  int64_t block;

  void load(int64_t first, int64_t count, float* to) const {
    for (int64_t i = 0; i < count; ++i) to[i] = numbers[codes[first + i]] * scales[(first + i) / block];
    const float added = *offset;
    for (int64_t i = 0; i < count; ++i) to[i] += added;
  }
};

}  // namespace

void dequantize_four_bit(
    const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& nested_quant_map, const std::optional<Tensor>& nested_offset,
    const Tensor& numbers, int64_t N, int64_t K, int64_t block, int64_t nested_block, bool low_first, int64_t row,
    int64_t column, int64_t stored, Tensor out) {
  const OneDevice device(kDevice, "codes", codes);
  check_output("out", out, out.size(0), out.size(1), device);
  STD_TORCH_CHECK(
      N >= 0 && K >= 0 && (K == 0 || N <= INT64_MAX / K) && block >= 1 && block <= INT32_MAX, "W is ", N, " x ", K,
      " in blocks of ", block, ", expected blocks of 1 to ", INT32_MAX);
  const Part part(out, row, column, N, K);
  const int64_t count = N * K, blocks = blocks_of(count, block);
  const uint8_t* const from = bytes_of("codes", codes, (count + 1) / 2, device);
  const float* const of_codes = floats_of("numbers", numbers, 16, device);
  const Dtype rounded = dtype_of_number(stored), dtype = dtype_of(out);
  Nested nested{};
  const float* scales = nullptr;
  if (nested_absmax.has_value()) {
    STD_TORCH_CHECK(
        nested_quant_map.has_value() && nested_offset.has_value() && nested_block >= 1,
        "nested_quant_map or nested_offset is None, or nested_block ", nested_block, ", beside nested_absmax");
    nested.codes = bytes_of("absmax", absmax, blocks, device);
    nested.scales = floats_of("nested_absmax", *nested_absmax, blocks_of(blocks, nested_block), device);
    nested.numbers = floats_of("nested_quant_map", *nested_quant_map, 256, device);
    nested.offset = floats_of("nested_offset", *nested_offset, 1, device);
    nested.block = nested_block;
  } else {
    scales = floats_of("absmax", absmax, blocks, device);
  }
  if (out.numel() == 0) return;
  const Microkernels& kernels = microkernels();
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  each_row(part, [&](int64_t i) {
    const int64_t first = (part.row + i) * K + part.column, last = first + part.columns;
    const int64_t begin = first / block, end = blocks_of(last, block);
    const auto made = scratch<float>(nested.codes != nullptr ? end - begin : 0);
    if (nested.codes != nullptr) nested.load(begin, end - begin, made.get());
    kernels.four_bit(
        from, first, part.columns, low_first, of_codes, nested.codes != nullptr ? made.get() : scales + begin,
        first % block, block, rounded, dtype, to + i * part.columns * size_of(dtype));
  });
}

// scale: [], [1] or [N, 1], or with block_rows of blocks; `unit`: what it is multiplied by.
void dequantize_eight_bit(
    const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
    int64_t block_columns, int64_t row, int64_t column, int64_t stored, Tensor out) {
  const OneDevice device(kDevice, "codes", codes);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.element_size() == 1, "codes are no matrix of bytes");
  const int64_t N = codes.size(0), K = codes.size(1);
  check_output("out", out, out.size(0), out.size(1), device);
  const Part part(out, row, column, N, K);
  const uint8_t* const from = bytes_of("codes", codes, N * K, device);
  const bool of_blocks = block_rows > 0, one = !of_blocks && scale.numel() == 1;
  STD_TORCH_CHECK(!of_blocks || block_columns >= 1, "a block has ", block_rows, " x ", block_columns, " elements");
  const int64_t across = of_blocks ? blocks_of(K, block_columns) : 1;
  const int64_t down = of_blocks ? blocks_of(N, block_rows) : one ? 1 : N;
  const float* const scales = floats_of("scale", scale, down * across, device);
  const Dtype rounded = dtype_of_number(stored), dtype = dtype_of(out);
  if (out.numel() == 0) return;
  const Microkernels& kernels = microkernels();
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t width = of_blocks ? block_columns : K;
  each_row(part, [&](int64_t i) {
    const int64_t n = part.row + i, end = part.column + part.columns;
    const float* const of_row = scales + (of_blocks ? n / block_rows : one ? 0 : n) * across;
    char* at = to + i * part.columns * size_of(dtype);
    for (int64_t k = part.column; k < end;) {
      const int64_t some = std::min(end, (k / width + 1) * width) - k;
      const float factor = of_row[k / width] * static_cast<float>(unit);
      kernels.eight_bit(from + n * K + k, some, integers, factor, rounded, dtype, at);
      at += some * size_of(dtype);
      k += some;
    }
  });
}

}  // namespace lorafast::cpu
