// decode.cu over a quantized weight: y and s of at most 16 rows in one launch that reads codes.
#include "codes.h"
#include "decode_codes.cuh"
#include "decode_launch.cuh"
#include "operations.h"

namespace lorafast::cuda {

namespace {

using decode::Adapters;
using decode::Memory;

constexpr int kOldest = 80;

// Whether no 16 bytes of a row have two scales.
bool whole(const FourBit& codes, int64_t K) { return K % 32 == 0 && codes.block.by % 32 == 0; }
bool whole(const EightBit& codes, int64_t K) {
  return K % 16 == 0 && (codes.kind != Scales::blocks || codes.block_columns.by % 16 == 0);
}

template <class Codes>
void decode_layer(
    const char* name, const Tensor& x, int64_t N, const Codes& codes, const Adapters& adapters,
    const std::optional<Tensor>& bias, int64_t helpers, const Memory& memory, const OneDevice& device) {
  decode::ParamsOf<decode::CodedMatrix<Codes>> p = {};
  const decode::Grid grid = decode::prepare(p, x, N, adapters, bias, helpers, memory);
  if (grid.ctas == 0) return;
  STD_TORCH_CHECK(
      whole(codes, x.size(1)) && aligned(codes.codes, 0, 16), "codes of ", x.size(1),
      " columns aren't read 16 bytes at once, each with one scale: expected aligned ones");
  STD_TORCH_CHECK(p.x.vector, "x has rows that aren't aligned to 16 bytes");
  STD_TORCH_CHECK(x.element_size() == 2, "x has dtype Float, expected BFloat16 or Half");
  p.weight = {codes, x.size(1)};
  const OnDevice on(device);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      auto* const kernel =
          grid.tokens == 8 ? decode::decode_codes_kernel<T, 8, Codes> : decode::decode_codes_kernel<T, 16, Codes>;
      const size_t shared = 16 * (grid.tokens == 8 ? decode::kRing<8> : decode::kRing<16>)+grid.own_s;
      launch<kOldest>(name, kernel, dim3(grid.ctas), decode::kThreads, shared, on, p);
    }
  });
}

OneDevice check_x(const Tensor& x) {
  const OneDevice device(kDevice, "x", x);
  check_dimensions("x", x, 2);
  check_matrix("x", x, x.size(0), x.size(1), device);
  return device;
}

}  // namespace

void lora_linear_decode_four_bit(
    const Tensor& x, int64_t N, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& of_scales,
    const std::optional<Tensor>& numbers_of_scales, const std::optional<Tensor>& offset, const Tensor& numbers,
    int64_t block, int64_t nested_block, bool low_first, int64_t stored, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, const std::optional<Tensor>& scaling_of,
    const std::optional<Tensor>& adapter_of, const std::optional<Tensor>& bias, int64_t helpers,
    std::optional<Tensor> partials, std::optional<Tensor> counters, Tensor y, std::optional<Tensor> s) {
  const OneDevice device = check_x(x);
  const FourBitTensors given{codes,   scales, of_scales,    numbers_of_scales, offset,
                             numbers, block,  nested_block, low_first};
  decode_layer(
      "lora_linear_decode_four_bit", x, N, codes_of(given, N, x.size(1), stored, device),
      {lora_A, lora_B, scaling_of, adapter_of, scaling}, bias, helpers, {partials, counters, y, s}, device);
}

void lora_linear_decode_eight_bit(
    const Tensor& x, int64_t N, const Tensor& codes, const Tensor& scale, double unit, bool integers,
    int64_t block_rows, int64_t block_columns, int64_t stored, const Tensor& lora_A, const Tensor& lora_B,
    double scaling, const std::optional<Tensor>& scaling_of, const std::optional<Tensor>& adapter_of,
    const std::optional<Tensor>& bias, int64_t helpers, std::optional<Tensor> partials,
    std::optional<Tensor> counters, Tensor y, std::optional<Tensor> s) {
  const OneDevice device = check_x(x);
  const EightBitTensors given{codes, scale, unit, integers, block_rows, block_columns};
  decode_layer(
      "lora_linear_decode_eight_bit", x, N, codes_of(given, N, x.size(1), stored, device),
      {lora_A, lora_B, scaling_of, adapter_of, scaling}, bias, helpers, {partials, counters, y, s}, device);
}

}  // namespace lorafast::cuda
