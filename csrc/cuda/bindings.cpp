// What lorafast/_C_cuda offers, and which file serves it. Outputs are the caller's: written, never read. A mask is
// (seed, threshold, survivor_scale) as in lorafast/reference/dropout.py; without a seed there is none. Scratch
// memory is the caller's too: partial sums are float32, counters int32 zeros that a kernel leaves zero.
#include "operations.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lorafast_cuda, library) {
  // csrc/cuda/mask.cu
  library.def("mask(Tensor seed, int threshold, int K, Tensor(a!) bits) -> ()");

  // csrc/cuda/dequantize.cu
  library.def(
      "dequantize_four_bit(Tensor codes, Tensor scales, Tensor? of_scales, Tensor? numbers_of_scales, "
      "Tensor? offset, Tensor numbers, int block, int nested_block, bool low_first, int stored, Tensor(a!) out) "
      "-> ()");
  library.def(
      "dequantize_eight_bit(Tensor codes, Tensor scale, float unit, bool integers, int block_rows, "
      "int block_columns, int stored, Tensor(a!) out) -> ()");

  // csrc/cuda/expand.cu
  library.def(
      "expand(Tensor s, Tensor lora_B, float scaling, Tensor? bias, Tensor? seed, int threshold, "
      "float survivor_scale, Tensor(a!) y, int column_warps, int row_blocks, bool onto) -> ()");

  // csrc/cuda/linear_expand.cu
  library.def(
      "linear_expand(Tensor x, Tensor weight, Tensor s, Tensor lora_B, float scaling, Tensor? bias, Tensor? seed, "
      "int threshold, float survivor_scale, Tensor(a!) y, Tensor(b!)? partials, Tensor(c!)? counters, int "
      "columns, "
      "int splits) -> ()");

  // csrc/cuda/lora_linear.cu
  library.def(
      "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, Tensor? "
      "seed, "
      "int threshold, float survivor_scale, Tensor(a!) y, Tensor(b!)? s, int columns, int stages) -> ()");
  // csrc/cuda/linear_expand_sm90.cu
  library.def(
      "linear_expand_sm90(Tensor x, Tensor weight, Tensor s, Tensor lora_B, float scaling, Tensor? bias, "
      "Tensor? seed, int threshold, float survivor_scale, Tensor(a!) y, Tensor(b!) counters, "
      "int columns, int group, int ctas, int cluster) -> ()");

  // csrc/cuda/lora_linear_sm90.cu
  library.def(
      "lora_linear_sm90(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, "
      "Tensor? seed, int threshold, float survivor_scale, Tensor(a!) y, Tensor(b!) s, Tensor(c!) counters, "
      "int columns, int group, int ctas, int helpers, int cluster) -> ()");

  // csrc/cuda/lora_linear_backward.cu
  library.def(
      "lora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? s, "
      "float scaling, Tensor? seed, int threshold, float survivor_scale, Tensor(a!)? dx, Tensor(b!)? dA, "
      "Tensor(c!)? dB, Tensor(d!)? dbias, Tensor(e!)? scratch, Tensor(f!)? counters, int columns, int stages) "
      "-> ()");

  // csrc/cuda/lora_linear_backward_sm90.cu
  library.def(
      "lora_linear_backward_sm90(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? s, "
      "float scaling, Tensor(a!) dx, Tensor(b!) ds, Tensor(c!)? dA, Tensor(d!)? dB, Tensor(e!)? partials, "
      "Tensor(f!) counters, int group, int ctas, int helpers, int rows_ahead, int rows_behind, "
      "int cluster) -> ()");

  // csrc/cuda/shrink.cu
  library.def(
      "shrink(Tensor x, Tensor lora_A, Tensor? seed, int threshold, float survivor_scale, float scale, "
      "Tensor(a!) s, Tensor(b!)? partials, Tensor(c!)? counters, int ranks, int block_m, int block_n, int stages, "
      "int share) -> ()");
  // csrc/cuda/expand_backward.cu
  library.def(
      "expand_backward(Tensor dy, Tensor? s, Tensor? lora_B, float scaling, Tensor(a!)? ds, Tensor(b!)? dB, "
      "Tensor(c!)? dbias, Tensor(d!)? partials, Tensor(e!)? counters, int ranks, int block_m, int block_n, "
      "int stages, int share, int chunk) -> ()");
  // csrc/cuda/shrink_backward.cu
  library.def(
      "shrink_backward(Tensor ds, Tensor x, Tensor? seed, int threshold, float survivor_scale, Tensor(a!) dA, "
      "Tensor(b!)? partials, Tensor(c!)? counters, int ranks, int block_m, int block_n, int stages, int share) "
      "-> ()");

  // csrc/cuda/decode.cu
  library.def(
      "lora_linear_decode(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, "
      "int helpers, Tensor(a!)? partials, Tensor(b!)? counters, Tensor(c!) y, Tensor(d!)? s) -> ()");
  library.def(
      "grouped_lora_linear_decode(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scaling, "
      "Tensor adapter_of, Tensor? bias, int helpers, Tensor(a!)? partials, Tensor(b!)? counters, Tensor(c!) y, "
      "Tensor(d!)? s) -> ()");

  // csrc/cuda/decode_codes.cu
  library.def(
      "lora_linear_decode_four_bit(Tensor x, int N, Tensor codes, Tensor scales, Tensor? of_scales, "
      "Tensor? numbers_of_scales, Tensor? offset, Tensor numbers, int block, int nested_block, bool low_first, "
      "int stored, Tensor lora_A, Tensor lora_B, float one_scaling, Tensor? scaling, Tensor? adapter_of, "
      "Tensor? bias, int helpers, Tensor(a!)? partials, Tensor(b!)? counters, Tensor(c!) y, Tensor(d!)? s) -> ()");
  library.def(
      "lora_linear_decode_eight_bit(Tensor x, int N, Tensor codes, Tensor scale, float unit, bool integers, "
      "int block_rows, int block_columns, int stored, Tensor lora_A, Tensor lora_B, float one_scaling, "
      "Tensor? scaling, Tensor? adapter_of, Tensor? bias, int helpers, Tensor(a!)? partials, "
      "Tensor(b!)? counters, Tensor(c!) y, Tensor(d!)? s) -> ()");
}

// A tensor of any device gets as far as the checks.
STABLE_TORCH_LIBRARY_IMPL(lorafast_cuda, CompositeExplicitAutograd, library) {
  library.impl("mask", TORCH_BOX(&lorafast::cuda::mask));
  library.impl("dequantize_four_bit", TORCH_BOX(&lorafast::cuda::dequantize_four_bit));
  library.impl("dequantize_eight_bit", TORCH_BOX(&lorafast::cuda::dequantize_eight_bit));
  library.impl("expand", TORCH_BOX(&lorafast::cuda::expand));
  library.impl("linear_expand", TORCH_BOX(&lorafast::cuda::linear_expand));
  library.impl("lora_linear", TORCH_BOX(&lorafast::cuda::lora_linear));
  library.impl("linear_expand_sm90", TORCH_BOX(&lorafast::cuda::linear_expand_sm90));
  library.impl("lora_linear_sm90", TORCH_BOX(&lorafast::cuda::lora_linear_sm90));
  library.impl("lora_linear_backward", TORCH_BOX(&lorafast::cuda::lora_linear_backward));
  library.impl("lora_linear_backward_sm90", TORCH_BOX(&lorafast::cuda::lora_linear_backward_sm90));
  library.impl("shrink", TORCH_BOX(&lorafast::cuda::shrink));
  library.impl("expand_backward", TORCH_BOX(&lorafast::cuda::expand_backward));
  library.impl("shrink_backward", TORCH_BOX(&lorafast::cuda::shrink_backward));
  library.impl("lora_linear_decode", TORCH_BOX(&lorafast::cuda::lora_linear_decode));
  library.impl("lora_linear_decode_four_bit", TORCH_BOX(&lorafast::cuda::lora_linear_decode_four_bit));
  library.impl("lora_linear_decode_eight_bit", TORCH_BOX(&lorafast::cuda::lora_linear_decode_eight_bit));
  library.impl("grouped_lora_linear_decode", TORCH_BOX(&lorafast::cuda::grouped_lora_linear_decode));
}
