// Codes as operations are given them: what their tensors must be.
#pragma once

#include "arguments.h"
#include "codes.cuh"

namespace lorafast::cuda {

struct FourBitTensors {
  const Tensor &codes, &scales;
  const std::optional<Tensor>&of_scales, &numbers_of_scales, &offset;
  const Tensor& numbers;
  int64_t block, nested_block;
  bool low_first;
};

struct EightBitTensors {
  const Tensor &codes, &scale;
  double unit;
  bool integers;
  int64_t block_rows, block_columns;
};

// Of W [N, K], which is stored for the dtype of this number: 0 float32, 1 bfloat16, 2 float16.
FourBit codes_of(const FourBitTensors& given, int64_t N, int64_t K, int64_t stored, const OneDevice& device);
EightBit codes_of(const EightBitTensors& given, int64_t N, int64_t K, int64_t stored, const OneDevice& device);

}  // namespace lorafast::cuda
