// The operations that bindings.cpp lists, a file each.
#pragma once

#include "../checks.h"

namespace lorafast::cpu {

void shrink(
    const Tensor& x, const Tensor& lora_A, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale, Tensor s);

void expand_(
    Tensor y, const Tensor& s, const Tensor& lora_B, double scaling, const std::optional<Tensor>& seed,
    int64_t threshold, double survivor_scale);

void expand_backward(
    const Tensor& dy, const Tensor& s, const Tensor& lora_B, double scaling, Tensor ds, Tensor dB);

void shrink_backward(
    const Tensor& ds, const Tensor& x, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale, Tensor dA);

}  // namespace lorafast::cpu
