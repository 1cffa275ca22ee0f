// The dropout mask of a matrix, a bit an element: one call of Philox a byte.
#include "operations.h"
#include "philox.cuh"

namespace lorafast::cuda {

namespace {
constexpr unsigned kThreads = 256;
constexpr int kBytes = 4;  // neighbours, one store
constexpr int kWords = 4;  // of a thread, a CTA's width apart: the remainder that it begins with pays for all
constexpr int kStep = kThreads * kBytes;
}  // namespace

struct MaskParams {
  Dropout dropout;
  uint8_t* bits;
  int64_t count;  // bytes of all rows
  int64_t step;   // kStep modulo the bytes of a row
  int32_t last;   // which bits of a row's last byte are columns
};

// A byte's number is the counter of its call, whatever its row. Only where K is no multiple of 8 must a thread know
// which bytes end a row: it counts the place in the row up.
__global__ void __launch_bounds__(kThreads) mask_kernel(const __grid_constant__ MaskParams p) {
  const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
  const int64_t groups = p.dropout.groups;
  const uint32_t last = static_cast<uint32_t>(p.last);
  int64_t begin = static_cast<int64_t>(blockIdx.x) * (kWords * kStep) + threadIdx.x * kBytes;
  const bool whole = last == 0xFF;
  int64_t place = whole ? 0 : begin % groups;
#pragma unroll 1
  for (int word = 0; word < kWords && begin < p.count; ++word, begin += kStep) {
    uint32_t bits = 0;
    int64_t at = place;
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      uint32_t byte = keep_bits(p.dropout, seed, 0, begin + i);
      if (!whole) {
        const bool ends = at == groups - 1;
        byte &= ends ? last : 0xFF;
        at = ends ? 0 : at + 1;
      }
      bits |= byte << (8 * i);
    }
    if (begin + kBytes <= p.count) {
      *reinterpret_cast<uint32_t*>(p.bits + begin) = bits;
    } else {
      for (int i = 0; begin + i < p.count; ++i) p.bits[begin + i] = static_cast<uint8_t>(bits >> (8 * i));
    }
    place += p.step;
    if (place >= groups) place -= groups;
  }
}

void mask(const Tensor& seed, int64_t threshold, int64_t K, Tensor bits) {
  const OneDevice device(kDevice, "bits", bits);
  check_seed(seed, threshold, device);
  const int64_t groups = (K + 7) / 8;
  STD_TORCH_CHECK(K >= 0, "K is ", K, ", expected at least 0");
  STD_TORCH_CHECK(
      bits.dim() == 2 && bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() && bits.size(1) == groups,
      "bits is no contiguous matrix of ", groups, " columns of uint8");
  check_storage("bits", bits);
  const int64_t count = bits.numel();
  if (count == 0) return;
  auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % kBytes == 0, "bits is not aligned to ", kBytes, " bytes");
  const int64_t ctas = (count + kWords * kStep - 1) / (kWords * kStep);
  STD_TORCH_CHECK(ctas < INT64_C(1) << 31, "bits has ", count, " bytes, too many for one launch");
  const OnDevice on(device);
  const auto* from = static_cast<const int64_t*>(seed.const_data_ptr());
  launch<kOldestOfAll>(
      "mask", mask_kernel, dim3(static_cast<unsigned>(ctas)), kThreads, 0, on,
      MaskParams{
          {from, groups, static_cast<int32_t>(threshold), 1.0f},
          to,
          count,
          kStep % groups,
          static_cast<int32_t>(0xFF >> (8 * groups - K))});
}

}  // namespace lorafast::cuda
