// What lorafast/_C_cpu offers, and which file serves it. Outputs are the caller's: written, never read
// (but for y and dx where a name ends in _: added to); what has a base GEMM returns its own. A mask is (seed, threshold,
// survivor_scale) as in lorafast/reference/dropout.py; without a seed there is none.
#include <exception>
#include <string>

#include "microkernels.h"
#include "operations.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lorafast_cpu, library) {
  // csrc/cpu/shrink.cpp
  library.def(
      "shrink(Tensor x, Tensor lora_A, Tensor? seed, int threshold, float survivor_scale, Tensor(a!) s) -> ()");
  // csrc/cpu/expand.cpp
  library.def(
      "expand_(Tensor(a!) y, Tensor s, Tensor lora_B, float scaling, Tensor? seed, int threshold, "
      "float survivor_scale) -> ()");
  // csrc/cpu/expand_backward.cpp
  library.def(
      "expand_backward(Tensor dy, Tensor s, Tensor lora_B, float scaling, Tensor(a!) ds, Tensor(b!) dB) -> ()");
  // csrc/cpu/shrink_backward.cpp
  library.def(
      "shrink_backward(Tensor ds, Tensor x, Tensor? seed, int threshold, float survivor_scale, "
      "Tensor(a!) dA) -> ()");
  // csrc/cpu/conv_shrink.cpp
  library.def(
      "conv_shrink(Tensor x, Tensor lora_A, int stride_h, int stride_w, int padding_h, int padding_w, "
      "int dilation_h, int dilation_w, Tensor(a!) s) -> ()");
  // csrc/cpu/conv_shrink_backward.cpp
  library.def(
      "conv_shrink_backward(Tensor ds, Tensor x, int stride_h, int stride_w, int padding_h, int padding_w, "
      "int dilation_h, int dilation_w, Tensor(a!) dA) -> ()");
  // csrc/cpu/lora_conv.cpp
  library.def(
      "lora_conv(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, int "
      "stride_h, "
      "int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, bool merge) -> "
      "(Tensor, Tensor?)");
  library.def(
      "lora_conv_backward(Tensor dy, Tensor x, Tensor? weight, Tensor s, Tensor lora_A, Tensor lora_B, float "
      "scaling, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, bool "
      "merge) -> (Tensor?, Tensor, Tensor, Tensor)");
  // csrc/cpu/lora_linear.cpp
  library.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
      "Tensor? seed, int threshold, float survivor_scale) -> (Tensor, Tensor)");
  library.def(
      "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, "
      "float scaling, Tensor? seed, int threshold, float survivor_scale) -> (Tensor, Tensor, Tensor)");
  library.def(
      "lora_linear_on_rows(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
      "Tensor? seed, int threshold, float survivor_scale, int first, int end) -> (Tensor, Tensor)");
  library.def(
      "lora_linear_backward_on_rows(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, "
      "float scaling, Tensor? seed, int threshold, float survivor_scale, int first) -> (Tensor, Tensor, Tensor)");
  library.def(
      "lora_linear_(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, float scaling, Tensor? seed, "
      "int threshold, float survivor_scale, Tensor(b!) s) -> ()");
  library.def(
      "lora_linear_backward_(Tensor(a!) dx, Tensor dy, Tensor x, Tensor lora_A, Tensor lora_B, Tensor s, "
      "float scaling, Tensor? seed, int threshold, float survivor_scale, Tensor(b!) ds, Tensor(c!) dA, "
      "Tensor(d!) dB) -> ()");
  // csrc/cpu/bottleneck.cpp
  library.def(
      "bottleneck(Tensor h, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, float scaling, "
      "int activation, Tensor? residual, Tensor(a!) y, Tensor(b!)? a) -> ()");
  library.def(
      "bottleneck_backward(Tensor dy, Tensor h, Tensor a, Tensor down, Tensor up, float scaling, int activation, "
      "bool residual, Tensor(a!)? dh, Tensor(b!) dD, Tensor(c!)? dd, Tensor(d!) dU, Tensor(e!)? du) -> ()");
  // csrc/cpu/dequantize.cpp
  library.def(
      "dequantize_four_bit(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_quant_map, "
      "Tensor? nested_offset, Tensor numbers, int N, int K, int block, int nested_block, bool low_first, int row, "
      "int column, int stored, Tensor(a!) out) -> ()");
  library.def(
      "dequantize_eight_bit(Tensor codes, Tensor scale, float unit, bool integers, int block_rows, "
      "int block_columns, int row, int column, int stored, Tensor(a!) out) -> ()");
  // csrc/cpu/linear_expand.cpp
  library.def(
      "linear_expand(Tensor x, Tensor weight, bool transposed, Tensor s, Tensor lora_B, float scaling, Tensor? "
      "bias, "
      "Tensor? seed, int threshold, float survivor_scale) -> Tensor");
  library.def(
      "linear_four_bit(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_quant_map, "
      "Tensor? nested_offset, Tensor numbers, int N, int K, int block, int nested_block, bool low_first, "
      "int stored, bool transposed, Tensor? bias, Tensor(a!) out) -> ()");
  library.def(
      "linear_eight_bit(Tensor x, Tensor codes, Tensor scale, float unit, bool integers, int block_rows, "
      "int block_columns, int stored, bool transposed, Tensor? bias, Tensor(a!) out) -> ()");
  // csrc/cpu/lora_linear_codes.cpp
  library.def(
      "lora_linear_four_bit(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? "
      "nested_quant_map, Tensor? nested_offset, Tensor numbers, int N, int K, int block, int nested_block, bool "
      "low_first, int stored, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling) -> (Tensor, Tensor)");
  library.def(
      "lora_linear_eight_bit(Tensor x, Tensor codes, Tensor scale, float unit, bool integers, int block_rows, "
      "int block_columns, int stored, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lorafast_cpu, CPU, library) {
  library.impl("shrink", TORCH_BOX(&lorafast::cpu::shrink));
  library.impl("expand_", TORCH_BOX(&lorafast::cpu::expand_));
  library.impl("expand_backward", TORCH_BOX(&lorafast::cpu::expand_backward));
  library.impl("shrink_backward", TORCH_BOX(&lorafast::cpu::shrink_backward));
  library.impl("conv_shrink", TORCH_BOX(&lorafast::cpu::conv_shrink));
  library.impl("conv_shrink_backward", TORCH_BOX(&lorafast::cpu::conv_shrink_backward));
  library.impl("lora_conv", TORCH_BOX(&lorafast::cpu::lora_conv));
  library.impl("lora_conv_backward", TORCH_BOX(&lorafast::cpu::lora_conv_backward));
  library.impl("lora_linear", TORCH_BOX(&lorafast::cpu::lora_linear));
  library.impl("lora_linear_backward", TORCH_BOX(&lorafast::cpu::lora_linear_backward));
  library.impl("lora_linear_on_rows", TORCH_BOX(&lorafast::cpu::lora_linear_on_rows));
  library.impl("lora_linear_backward_on_rows", TORCH_BOX(&lorafast::cpu::lora_linear_backward_on_rows));
  library.impl("lora_linear_", TORCH_BOX(&lorafast::cpu::lora_linear_));
  library.impl("lora_linear_backward_", TORCH_BOX(&lorafast::cpu::lora_linear_backward_));
  library.impl("bottleneck", TORCH_BOX(&lorafast::cpu::bottleneck));
  library.impl("bottleneck_backward", TORCH_BOX(&lorafast::cpu::bottleneck_backward));
  library.impl("dequantize_four_bit", TORCH_BOX(&lorafast::cpu::dequantize_four_bit));
  library.impl("dequantize_eight_bit", TORCH_BOX(&lorafast::cpu::dequantize_eight_bit));
  library.impl("linear_expand", TORCH_BOX(&lorafast::cpu::linear_expand));
  library.impl("linear_four_bit", TORCH_BOX(&lorafast::cpu::linear_four_bit));
  library.impl("linear_eight_bit", TORCH_BOX(&lorafast::cpu::linear_eight_bit));
  library.impl("lora_linear_four_bit", TORCH_BOX(&lorafast::cpu::lora_linear_four_bit));
  library.impl("lora_linear_eight_bit", TORCH_BOX(&lorafast::cpu::lora_linear_eight_bit));
}

// The name of the instruction set in use, for lorafast info; "error: ..." if LORAFAST_CPU names none.
extern "C" __attribute__((visibility("default"))) const char* lorafast_cpu_capability() {
  static std::string name;
  try {
    name = lorafast::microkernels().name;
  } catch (const std::exception& error) {
    name = std::string("error: ") + error.what();
  }
  return name.c_str();
}
