// The operations that bindings.cpp lists, a file each.
#pragma once

#include <tuple>

#include "matrix.h"

namespace lorafast::cpu {

constexpr DeviceType kDevice = DeviceType::CPU;

void shrink(
    const Tensor& x, const Tensor& lora_A, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale, Tensor s);

void expand_(
    Tensor y, const Tensor& s, const Tensor& lora_B, double scaling, const std::optional<Tensor>& seed,
    int64_t threshold, double survivor_scale);

// The body of expand_, for y and lora_B as views; bias [1, N]. With `add` false y is written, not read.
void add_expanded(
    const Matrix& y, const Matrix& s, const Matrix& lora_B, double scaling, const std::optional<Dropout>& dropout,
    const std::optional<Matrix>& bias = std::nullopt, bool add = true);

void expand_backward(
    const Tensor& dy, const Tensor& s, const Tensor& lora_B, double scaling, Tensor ds, Tensor dB);

void shrink_backward(
    const Tensor& ds, const Tensor& x, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor dA);

void conv_shrink(
    const Tensor& x, const Tensor& lora_A, int64_t stride_h, int64_t stride_w, int64_t padding_h,
    int64_t padding_w, int64_t dilation_h, int64_t dilation_w, Tensor s);

void conv_shrink_backward(
    const Tensor& ds, const Tensor& x, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, Tensor dA);

std::tuple<Tensor, std::optional<Tensor>> lora_conv(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, bool merge);

std::tuple<std::optional<Tensor>, Tensor, Tensor, Tensor> lora_conv_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight, const Tensor& s, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, bool merge);

Tensor linear_expand(
    const Tensor& x, const Tensor& weight, bool transposed, const Tensor& s, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale);

std::tuple<Tensor, Tensor> lora_linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale);

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& s, double scaling, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale);

std::tuple<Tensor, Tensor> lora_linear_on_rows(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale, int64_t first, int64_t end);

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_on_rows(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& s, double scaling, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    int64_t first);

void lora_linear_(
    Tensor y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor s);

void lora_linear_backward_(
    Tensor dx, const Tensor& dy, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& s,
    double scaling, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor ds,
    Tensor dA, Tensor dB);

void bottleneck(
    const Tensor& h, const Tensor& down, const Tensor& up, const std::optional<Tensor>& down_bias,
    const std::optional<Tensor>& up_bias, double scaling, int64_t activation,
    const std::optional<Tensor>& residual, Tensor y, std::optional<Tensor> a);

void bottleneck_backward(
    const Tensor& dy, const Tensor& h, const Tensor& a, const Tensor& down, const Tensor& up, double scaling,
    int64_t activation, bool residual, std::optional<Tensor> dh, Tensor dD, std::optional<Tensor> dd, Tensor dU,
    std::optional<Tensor> du);

void dequantize_four_bit(
    const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& nested_quant_map, const std::optional<Tensor>& nested_offset,
    const Tensor& numbers, int64_t N, int64_t K, int64_t block, int64_t nested_block, bool low_first, int64_t row,
    int64_t column, int64_t stored, Tensor out);

void dequantize_eight_bit(
    const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
    int64_t block_columns, int64_t row, int64_t column, int64_t stored, Tensor out);

void linear_four_bit(
    const Tensor& x, const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& nested_quant_map, const std::optional<Tensor>& nested_offset,
    const Tensor& numbers, int64_t N, int64_t K, int64_t block, int64_t nested_block, bool low_first,
    int64_t stored, bool transposed, const std::optional<Tensor>& bias, Tensor out);

void linear_eight_bit(
    const Tensor& x, const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
    int64_t block_columns, int64_t stored, bool transposed, const std::optional<Tensor>& bias, Tensor out);

std::tuple<Tensor, Tensor> lora_linear_four_bit(
    const Tensor& x, const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& nested_quant_map, const std::optional<Tensor>& nested_offset,
    const Tensor& numbers, int64_t N, int64_t K, int64_t block, int64_t nested_block, bool low_first,
    int64_t stored, const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B, double scaling);

std::tuple<Tensor, Tensor> lora_linear_eight_bit(
    const Tensor& x, const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
    int64_t block_columns, int64_t stored, const std::optional<Tensor>& bias, const Tensor& lora_A,
    const Tensor& lora_B, double scaling);

}  // namespace lorafast::cpu
