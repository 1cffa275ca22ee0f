// Tensor maps: 128 bytes that tests/ptx/tensormap.py makes in place of cuTensorMapEncodeTiled. NVIDIA's
// own content isn't public; this one is ours. Sizes and boxes have the fastest dimension first.
#pragma once

#include <cstdint>

namespace ptx {

constexpr int MOST_DIMS = 5;
constexpr char TENSOR_MAP_MAGIC[9] = "PTX-tmap";

// CUtensorMapDataType, as far as it is modelled.
enum class Element : uint8_t { U8, U16, U32, S32, U64, S64, F16, F32, F64, BF16 };

struct TensorMap {
  char magic[8];
  uint64_t address;
  uint64_t sizes[MOST_DIMS];
  uint64_t strides[MOST_DIMS - 1];  // in bytes, of dimensions 1, 2, …
  uint16_t box[MOST_DIMS];
  uint8_t element_strides[MOST_DIMS];
  uint8_t rank;
  Element element;
  uint8_t element_bytes;
  uint8_t swizzle;   // bytes: 0, 32, 64, 128
  uint8_t fill_nan;  // beyond the tensor: NaN, not zero
  uint8_t reserved[20];
};
static_assert(sizeof(TensorMap) == 128);

}  // namespace ptx
