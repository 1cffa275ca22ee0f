// The operations that bindings.cpp lists, a file each.
#pragma once

#include "device.h"

namespace lorafast::cuda {

// bits [M, ceil(K / 8)] of uint8: bit j of byte (row, group) says whether column 8·group + j of the row is kept.
// Bits beyond K are 0.
void mask(const Tensor& seed, int64_t threshold, int64_t K, Tensor bits);

// dequantize.cu. out [N, K] = W of 4-bit codes, ceil(N·K / 2) bytes of any dtype by `numbers` [16], in blocks: scales are
// float32, or bytes that are nested (of_scales, numbers_of_scales [256], offset [1]) or exponents of 2. W is rounded to
// `stored` (0 float32, 1 bfloat16, 2 float16), then to out's dtype. The first of two codes is the upper half of its byte,
// or the lower one (`low_first`).
void dequantize_four_bit(
    const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& of_scales,
    const std::optional<Tensor>& numbers_of_scales, const std::optional<Tensor>& offset, const Tensor& numbers,
    int64_t block, int64_t nested_block, bool low_first, int64_t stored, Tensor out);

// The same of 8-bit codes, integers or e4m3; `scale`, times `unit`, is one, one each row, or, where block_rows isn't 0,
// one each block of rows and columns.
void dequantize_eight_bit(
    const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
    int64_t block_columns, int64_t stored, Tensor out);

// expand.cu. y [M, N] = drop(scaling · s·Bᵀ) + bias, or in float16 that and what y has, if it is `onto` that. A CTA has
// 32 · column_warps columns, and goes through row_blocks blocks of 256 / column_warps rows.
void expand(
    const Tensor& s, const Tensor& lora_B, double scaling, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor y, int64_t column_warps,
    int64_t row_blocks, bool onto);

// linear_expand.cu. y [M, N] = x·Wᵀ + drop(scaling · s·Bᵀ) + bias: x [M, K], weight [N, K], s [M, r] of wide(x.dtype),
// lora_B [N, r]. Of float32 all are rounded to TF32. The rows of x, and the rows or the columns of weight, are
// contiguous and aligned to 16 bytes. Tiles of y have 128 rows and `columns`, 128 or, in 16 bits, 256. Where K is cut
// into `splits`, partials has 128 · columns elements for each part of each tile, and counters one for each tile.
void linear_expand(
    const Tensor& x, const Tensor& weight, const Tensor& s, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor y, const std::optional<Tensor>& partials, const std::optional<Tensor>& counters, int64_t columns,
    int64_t splits);

// lora_linear.cu. y [M, N] = x·Wᵀ + scaling · s·Bᵀ + bias and, if it is wanted, s [M, r] = drop(x)·Aᵀ, in one launch.
// Tiles of y have 64 rows and 32 or 64 columns.
void lora_linear(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor y, const std::optional<Tensor>& s, int64_t columns, int64_t stages);

// linear_expand_sm90.cu. y [M, N] = x·Wᵀ + drop(scaling · s·Bᵀ) + bias of bfloat16 or float16 on sm_90a, by TMA: rows of x
// and y, and either rows or columns of the weight, must begin at multiples of 16 bytes. s [M, r] is of bfloat16, for
// float16 of float32. Tiles of y have 128 rows and 256 or 128 columns; those of `group` row blocks run together, on as
// many as `ctas` CTAs, in clusters of `cluster`, 1 or 2. There are four counters.
void linear_expand_sm90(
    const Tensor& x, const Tensor& weight, const Tensor& s, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor y, Tensor counters, int64_t columns, int64_t group, int64_t ctas, int64_t cluster);

// lora_linear_sm90.cu. y as linear_expand_sm90 without a mask, of bfloat16, and s [M, r] = drop(x)·Aᵀ, which the first
// `helpers` CTAs make in the same launch. r is at most `columns`. There is a counter more for every 128 rows.
void lora_linear_sm90(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor y, Tensor s, Tensor counters, int64_t columns, int64_t group, int64_t ctas, int64_t helpers,
    int64_t cluster);

// lora_linear_backward.cu. Of these what is given, in one launch: dx [M, K] = dy·W + drop'(ds·A), dA [r, K] = dsᵀ·drop(x),
// dB [N, r] = scaling · dyᵀ·s, dbias [N] = Σ dy over rows, where ds = scaling · dy·B. dx takes weight, lora_A and lora_B;
// dA takes x, lora_B, scratch [M, r rounded up to 16, 32 or 64] of s's dtype and 3 counters; dB takes s. Tiles of dx
// have 64 rows and 32 or 64 columns.
void lora_linear_backward(
    const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, const std::optional<Tensor>& s,
    double scaling, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    std::optional<Tensor> dx, std::optional<Tensor> dA, std::optional<Tensor> dB, std::optional<Tensor> dbias,
    std::optional<Tensor> scratch, std::optional<Tensor> counters, int64_t columns, int64_t stages);

// lora_linear_backward_sm90.cu, of bfloat16 and r up to 64, in one launch: dx [M, K] = dy·W + ds·A, ds [M, ranks] =
// scaling · dy·B of r rounded up to 16, 32 or 64 ranks, zeros behind r; and of dA [r, K] = dsᵀ·x, dB [N, r] = scaling ·
// dyᵀ·s what is given, which take x and s. dy, x, weight and dx are as TMA reads them. Of `ctas` persistent CTAs
// `helpers` make ds and dB first; dB is summed over groups of rows_ahead row blocks of 128, dA of rows_behind. partials
// and counters have the sizes that lorafast/backends/cuda/wgmma_backward.py computes.
void lora_linear_backward_sm90(
    const Tensor& dy, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, const std::optional<Tensor>& s, double scaling, Tensor dx, Tensor ds,
    std::optional<Tensor> dA, std::optional<Tensor> dB, const std::optional<Tensor>& partials, Tensor counters,
    int64_t group, int64_t ctas, int64_t helpers, int64_t rows_ahead, int64_t rows_behind, int64_t cluster);

// The skinny operations (skinny.cuh). `ranks`, `block_m`, `block_n`, `stages`, `share` and `chunk` are a SkinnyPlan;
// partials and counters have the sizes that lorafast/backends/cuda/skinny.py computes, where sums are shared.

// s [M, r] = scale · drop(x)·Aᵀ in wide(x.dtype): x [M, K], lora_A [r, K]
void shrink(
    const Tensor& x, const Tensor& lora_A, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale, double scale, Tensor s, const std::optional<Tensor>& partials,
    const std::optional<Tensor>& counters, int64_t ranks, int64_t block_m, int64_t block_n, int64_t stages,
    int64_t share);

// dA [r, K] = dsᵀ·drop(x) in any dtype: ds [M, r] of wide(x.dtype), x [M, K]
void shrink_backward(
    const Tensor& ds, const Tensor& x, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor dA, const std::optional<Tensor>& partials, const std::optional<Tensor>& counters, int64_t ranks,
    int64_t block_m, int64_t block_n, int64_t stages, int64_t share);

// Of these what is given: ds [M, r] = scaling · dy·B, dB [N, r] = scaling · dyᵀ·s, dbias [N] = Σ dy over rows.
// dy [M, N], s [M, r] of wide(dy.dtype), lora_B [N, r]; s is read for dB alone, lora_B for ds.
void expand_backward(
    const Tensor& dy, const std::optional<Tensor>& s, const std::optional<Tensor>& lora_B, double scaling,
    std::optional<Tensor> ds, std::optional<Tensor> dB, std::optional<Tensor> dbias,
    const std::optional<Tensor>& partials, const std::optional<Tensor>& counters, int64_t ranks, int64_t block_m,
    int64_t block_n, int64_t stages, int64_t share, int64_t chunk);

// csrc/cuda/decode.cu: a layer of at most 16 rows, y = x·Wᵀ + scaling·s·Bᵀ + bias with s = x·Aᵀ [M, r], in one launch.
// y is of x's dtype, s of x's too, float32 for float16. Of the CTAs `helpers` make s for the others; with 0 each
// makes its own. Let rows be 16 for up to 8 rows of x, 32 for more, and s have `wide` columns, r rounded up to rows:
// then `partials` has rows / 2 · (wide + helpers · rows) elements and `counters` 3 + helpers; none without helpers.
void lora_linear_decode(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, int64_t helpers, std::optional<Tensor> partials,
    std::optional<Tensor> counters, Tensor y, std::optional<Tensor> s);

// The same where each of E elements of the batch, M / E rows each, has one of n adapters or none (-1): adapter_of [E] of
// int64, lora_A [n, r, K], lora_B [n, N, r], scaling [n] of float32. The indices aren't checked.
void grouped_lora_linear_decode(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling,
    const Tensor& adapter_of, const std::optional<Tensor>& bias, int64_t helpers, std::optional<Tensor> partials,
    std::optional<Tensor> counters, Tensor y, std::optional<Tensor> s);

// decode_codes.cu: both of these over W [N, K] of codes, which dequantize_four_bit takes: x of 16 bits, its rows and the
// codes aligned to 16 bytes, no 16 bytes of the codes of a row with two scales. With one adapter there is `scaling`;
// scaling_of [n] and adapter_of [E] are of several. From sm_80 on.
void lora_linear_decode_four_bit(
    const Tensor& x, int64_t N, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& of_scales,
    const std::optional<Tensor>& numbers_of_scales, const std::optional<Tensor>& offset, const Tensor& numbers,
    int64_t block, int64_t nested_block, bool low_first, int64_t stored, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, const std::optional<Tensor>& scaling_of,
    const std::optional<Tensor>& adapter_of, const std::optional<Tensor>& bias, int64_t helpers,
    std::optional<Tensor> partials, std::optional<Tensor> counters, Tensor y, std::optional<Tensor> s);

// The same of what dequantize_eight_bit takes.
void lora_linear_decode_eight_bit(
    const Tensor& x, int64_t N, const Tensor& codes, const Tensor& scale, double unit, bool integers,
    int64_t block_rows, int64_t block_columns, int64_t stored, const Tensor& lora_A, const Tensor& lora_B,
    double scaling, const std::optional<Tensor>& scaling_of, const std::optional<Tensor>& adapter_of,
    const std::optional<Tensor>& bias, int64_t helpers, std::optional<Tensor> partials,
    std::optional<Tensor> counters, Tensor y, std::optional<Tensor> s);

}  // namespace lorafast::cuda
