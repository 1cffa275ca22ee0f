// A quantized weight W [N, K] made dense in one launch, scales and their scales included: memory moves the codes and
// W, each once.
#include "codes.h"
#include "eight.cuh"
#include "operations.h"

namespace lorafast::cuda {

namespace {
constexpr unsigned kThreads = 256;
constexpr int kUnits = 4;  // of a thread, a CTA's width apart: what is in flight

bool divides(int64_t by, int64_t n) { return n % by == 0; }

// Whether each of the units, of so many elements, has one scale.
bool in_blocks(const FourBit& codes, int64_t, int unit) { return divides(unit, codes.block.by); }
bool in_blocks(const EightBit& codes, int64_t K, int unit) {
  if (codes.kind == Scales::one) return true;
  return divides(unit, K) && (codes.kind == Scales::rows || divides(unit, codes.block_columns.by));
}
}  // namespace

// 16 bytes.
template <class T>
__device__ __forceinline__ void store_unit(T* to, const float (&v)[16 / sizeof(T)]) {
  if constexpr (sizeof(T) == 2) {
    store_whole(to, v);
  } else {
    ptx::store_16(
        to,
        make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
  }
}

template <class Codes>
struct DequantizeParams {
  Codes codes;
  void* W;
  int64_t count;  // elements
  bool whole;     // whether each unit has one scale, and is loaded and stored at once
};

// 16 bytes of W are a unit: a warp stores 512 neighbours, and loads their codes, a quarter to all of a line at once.
template <class T, class Codes>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ DequantizeParams<Codes> p) {
  constexpr int kUnit = 16 / sizeof(T), kBytes = kUnit * Codes::kBits / 8, kWords = kBytes > 4 ? kBytes / 4 : 1;
  constexpr int kCodes = kUnit / kWords;  // of a word
  __shared__ float table[Codes::kNumbers > 0 ? Codes::kNumbers : 1];
  load_numbers(table, p.codes);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * (kUnits * kThreads) + threadIdx.x) * kUnit;
  uint32_t words[kUnits][kWords] = {};
  typename Codes::Asked asked[kUnits] = {};
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const int64_t i = first + unit * static_cast<int>(kThreads) * kUnit;
    if (!p.whole || i + kUnit > p.count) continue;
    const uint8_t* from = p.codes.codes + i / 8 * Codes::kBits + (i % 8) * Codes::kBits / 8;
    if constexpr (kBytes == 2) {
      words[unit][0] = __ldg(reinterpret_cast<const uint16_t*>(from));
    } else if constexpr (kBytes == 4) {
      words[unit][0] = __ldg(reinterpret_cast<const uint32_t*>(from));
    } else {
      const uint2 both = __ldg(reinterpret_cast<const uint2*>(from));
      words[unit][0] = both.x, words[unit][kWords - 1] = both.y;
    }
    asked[unit] = p.codes.load_scale(i);
  }
  __syncthreads();
  T* const W = static_cast<T*>(p.W);
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const int64_t i = first + unit * static_cast<int>(kThreads) * kUnit;
    if (!p.whole || i + kUnit > p.count) continue;
    const float scale = p.codes.finish(asked[unit]);
    float v[kUnit];
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint32_t codes = p.codes.in_order(words[unit][word]);
#pragma unroll
      for (int j = 0; j < kCodes; ++j) {
        v[word * kCodes + j] = __fmul_rn(p.codes.number_of(codes, j, table), scale);
      }
    }
    if (p.codes.stored != Dtype::float32 && p.codes.stored != DtypeOf<T>::value) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) v[j] = rounded(v[j], p.codes.stored);
    }
    store_unit(W + i, v);
  }
  // What is left over, one by one: W's last elements, or all of it.
  const int64_t step = static_cast<int64_t>(kThreads) * kUnit;
#pragma unroll 1
  for (int64_t i = first; i < first + kUnits * step && i < p.count; i += step) {
    if (p.whole && i + kUnit <= p.count) continue;
#pragma unroll 1
    for (int64_t at = i; at < i + kUnit && at < p.count; ++at) {
      const float scale = p.codes.finish(p.codes.load_scale(at));
      const float w = __fmul_rn(p.codes.number(p.codes.code(at), table), scale);
      W[at] = from_float<T>(rounded(w, p.codes.stored));
    }
  }
}

namespace {

// `out` is W, of which the codes were given.
template <class Codes>
void dequantize(const char* name, const Codes& codes, Tensor& out, const OneDevice& device) {
  const int64_t count = out.numel();
  if (count == 0) return;
  const OnDevice on(device);
  with_type(out, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kUnit = 16 / sizeof(T);
    const bool vector = aligned(codes.codes, 0, kUnit * Codes::kBits / 8) && aligned(out.const_data_ptr(), 0, 16);
    constexpr int64_t kEach = static_cast<int64_t>(kUnits) * kThreads * kUnit;
    const int64_t ctas = (count + kEach - 1) / kEach;
    STD_TORCH_CHECK(ctas < INT64_C(1) << 31, "out has ", count, " elements, too many for one launch");
    launch<kOldestOfAll>(
        name, dequantize_kernel<T, Codes>, dim3(static_cast<unsigned>(ctas)), kThreads, 0, on,
        DequantizeParams<Codes>{
            codes, out.mutable_data_ptr(), count, vector && in_blocks(codes, out.size(1), kUnit)});
  });
}

void check_matrix_of(Tensor& out, const OneDevice& device) {
  STD_TORCH_CHECK(out.dim() == 2, "out has ", out.dim(), " dimensions, expected a matrix");
  check_output("out", out, out.size(0), out.size(1), device);
}

}  // namespace

void dequantize_four_bit(
    const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& of_scales,
    const std::optional<Tensor>& numbers_of_scales, const std::optional<Tensor>& offset, const Tensor& numbers,
    int64_t block, int64_t nested_block, bool low_first, int64_t stored, Tensor out) {
  const OneDevice device(kDevice, "codes", codes);
  check_matrix_of(out, device);
  const FourBitTensors given{codes,   scales, of_scales,    numbers_of_scales, offset,
                             numbers, block,  nested_block, low_first};
  dequantize("dequantize_four_bit", codes_of(given, out.size(0), out.size(1), stored, device), out, device);
}

void dequantize_eight_bit(
    const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
    int64_t block_columns, int64_t stored, Tensor out) {
  const OneDevice device(kDevice, "codes", codes);
  check_matrix_of(out, device);
  const EightBitTensors given{codes, scale, unit, integers, block_rows, block_columns};
  dequantize("dequantize_eight_bit", codes_of(given, out.size(0), out.size(1), stored, device), out, device);
}

}  // namespace lorafast::cuda
