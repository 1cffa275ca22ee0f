#pragma once

#include "../checks.h"

namespace lorafast::cuda {

void twice(const Tensor& x, Tensor y);

}  // namespace lorafast::cuda
