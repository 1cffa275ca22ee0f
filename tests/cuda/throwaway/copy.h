#pragma once

#include "../../../csrc/cuda/device.h"

namespace lorafast::cuda {

// y = x, of float32 and contiguous, launched as `how` says: well, or with one thing wrong.
void copy(const Tensor& x, int64_t how, Tensor y, std::optional<Tensor> partials, std::optional<Tensor> counters);

}  // namespace lorafast::cuda
