// The inner loops, compiled once per instruction set and chosen at run time.
//
// All of them work on tiles: rows of elements in cache, `ld` elements apart, `cols` of them, a multiple of
// kLanes (reduce_columns takes any number of float32). Factors are packed in blocks of kLanes lanes (pack.h),
// zero beyond the last. A mask is a bit for each element, the lowest bit first, rows of kKeepRow bytes.
#pragma once

#include <cstdint>

namespace lorafast {

constexpr int64_t kLanes = 16;

// A tile is small enough for the cache of one core, and a whole number of dropout's Philox calls.
constexpr int64_t kTileRows = 32;
constexpr int64_t kTileCols = 512;
constexpr int64_t kKeepRow = kTileCols / 8;

// What gather_columns and gather_rows take a multiple of.
constexpr int64_t kGatheredRows = 4, kGatheredRanks = 8;

// Columns of a tile that `dot` and `multiply` take at a time.
constexpr int64_t kDotCols = 2 * kLanes;

// Columns of a weight that a base GEMM takes at a time, and the rows of x that it multiplies by them at a time.
constexpr int64_t kPanel = 64, kPanelRows = 6;

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// In the order of lorafast.core.problem.ACTIVATIONS.
enum class Activation { kGelu, kGeluTanh, kRelu, kSilu, kTanh };
constexpr int64_t kActivations = 5;

// Either both are float32, or a tile is bfloat16 as it lies in memory and the factors are pairs: two bfloat16
// in 32 bits, the first one low, which the processor multiplies by two neighbours and sums in float32.
// Then t has half as many rows (or ranks, in expand), rounded up.
template <typename Value, typename Factor>
struct Products {
  // out[b][i][:] += sum over c of tile[i][c] * t[b][c][:] for `blocks` blocks of kLanes ranks
  // t [cols, kLanes], out [rows, kLanes], blocks of them `t_step` and `out_step` elements apart
  void (*reduce_columns)(
      const Value* tile, int64_t ld, int64_t rows, int64_t cols, int64_t blocks, const Factor* t, int64_t t_step,
      float* out, int64_t out_step);

  // out[c / kLanes][j][c % kLanes] (+)= sum over i of t[i][j] * tile[i][c]    t [rows, kLanes]; out is added
  // to, or with `add` false written
  void (*reduce_rows)(
      const Value* tile, int64_t ld, int64_t rows, int64_t cols, const Factor* t, float* out, bool add);

  // tile[i][c] = (tile[i][c] +) bias[c] + keep[i][c] * scale * sum over j < r of s[i][j] * t[c / kLanes][j][c % kLanes]
  // s [rows, r], t [cols / kLanes, r, kLanes]; in pairs r counts pairs; keep nullptr: all ones; bias nullptr: zeros;
  // with `add` false the tile is written, not read
  void (*expand)(
      Value* tile, int64_t ld, int64_t rows, int64_t cols, const Factor* s, int64_t r, const Factor* t,
      float scale, const uint8_t* keep, const float* bias, bool add);

  // to[c] = keep[c] ? from[c] : 0
  void (*mask)(const Value* from, int64_t cols, const uint8_t* keep, Value* to);

  // out[i][m][:] (+)= sum over c of tile[i][c] * x[m][c], a lane for every 16th c (in pairs, for every 16th pair)
  // x [M, cols] with rows `ldx` apart, out [rows, M, kLanes]; cols is a multiple of kDotCols
  void (*dot)(
      const Value* tile, int64_t ld, int64_t rows, int64_t cols, const Value* x, int64_t ldx, int64_t M,
      float* out, bool add);

  // out[m][c] (+)= sum over i of t[m][i] * tile[i][c]     t [M, rows], out [M, cols], rows `ldt` and `ldo` apart;
  // rows is even, cols a multiple of kDotCols
  void (*multiply)(
      const Value* tile, int64_t ld, int64_t rows, int64_t cols, const Value* t, int64_t ldt, int64_t M,
      float* out, int64_t ldo, bool add);
};

// A base GEMM of pairs. The weight's factor b is [2 * pairs, cols], of which a panel is up to kPanel columns.
struct Panels {
  // to[p][c] = b[2 p][c] and b[2 p + 1][c]    to [pairs, kPanel], zero beyond cols up to the next multiple of kLanes;
  // columns of b are `ld` apart and their elements neighbours with `by_column`, else its rows
  void (*pack)(const uint16_t* from, int64_t ld, bool by_column, int64_t pairs, int64_t cols, uint32_t* to);

  // out[i][c] = bias[c] + scale * sum over j < r of s[i][j] * t[c / kLanes][j][c % kLanes]
  //             + sum over p < pairs of a[i][p] * b[p][c], rounded once
  // for up to kPanelRows rows; s [rows, r], t [cols / kLanes, r, kLanes], b as packed; bias nullptr: zeros
  void (*multiply)(
      const uint16_t* a, int64_t lda, int64_t rows, int64_t pairs, const uint32_t* b, const uint32_t* s, int64_t r,
      const uint32_t* t, float scale, const float* bias, uint16_t* out, int64_t ldo, int64_t cols);
};

struct Microkernels {
  const char* name;
  Products<float, float> floats;
  const Products<uint16_t, uint32_t>* pairs;  // nullptr where the processor has no such product
  const Panels* panels;                       // likewise

  // to[i][:] += sum over c of rows[i][c] * t[c][:], i < count, a multiple of kGatheredRows; t [cols, kLanes]
  // With `paired` t is [cols / 2, kLanes / 2 ranks, 2]: a rank has a lane for the even and one for the odd columns.
  void (*gather_columns)(
      const float* const* rows, int64_t count, int64_t cols, bool paired, const float* t, float* const* to);

  // out[c / kLanes][j][c % kLanes] += sum over i < count of t[i][j] * rows[i][c]
  // out [cols / kLanes, ranks, kLanes]; cols is a multiple of kLanes, ranks one of kGatheredRanks
  void (*gather_rows)(
      const float* const* rows, int64_t count, int64_t cols, const float* const* t, int64_t ranks, float* out);

  // to[i] = from[i], from another dtype or into it, rounded to nearest even
  void (*load)(const void* from, Dtype dtype, int64_t count, float* to);
  void (*store)(const float* from, Dtype dtype, int64_t count, void* to);

  // The mask of the columns [first, first + cols) of row `row_index` of a matrix of `groups` Philox calls
  // a row; `first` is a multiple of 8. Whole vectors are written: up to kKeepRow bytes.
  void (*keep)(
      int64_t row_index, int64_t first, int64_t cols, int64_t groups, uint64_t seed, uint32_t threshold,
      uint8_t* bits);

  // to[i] = numbers[code first + i] * scales[(before + i) / block], rounded to `stored` and then in `dtype`. Two
  // codes a byte, the first of them in its upper half, or with low_first in its lower one.
  void (*four_bit)(
      const uint8_t* codes, int64_t first, int64_t count, bool low_first, const float* numbers,
      const float* scales, int64_t before, int64_t block, Dtype stored, Dtype dtype, void* to);

  // to[i] = code i * scale, rounded to `stored` and then in `dtype`; codes are int8, or else e4m3.
  void (*eight_bit)(
      const uint8_t* codes, int64_t count, bool integers, float scale, Dtype stored, Dtype dtype, void* to);

  // y[m][i] = added[i] + sum over lanes of out[i][m][:], as `dot` made them, + sum over j < r of s[m][j] * b[i][j],
  // rounded; s [M, r], b [rows, r], r is a multiple of kLanes; rows of y are `step` bytes apart.
  void (*add_up)(
      const float* out, int64_t rows, int64_t M, const float* s, const float* b, int64_t r, const float* added,
      Dtype dtype, int64_t step, void* y);

  // to[i] = f(from[i]), which may be the same memory; count is a multiple of kLanes
  void (*activate)(Activation activation, int64_t count, const float* from, float* to);

  // gradient[i] *= f'(from[i])
  void (*activate_backward)(Activation activation, int64_t count, const float* from, float* gradient);
};

// One for each microkernels_<set>.cpp; nullptr where the compiler couldn't make it.
extern const Microkernels* const microkernels_portable;
extern const Microkernels* const microkernels_avx2;
extern const Microkernels* const microkernels_avx512;
extern const Microkernels* const microkernels_avx512_bf16;

// The fastest set that this processor has, or the one that LORAFAST_CPU names.
const Microkernels& microkernels();

// Whether the processor multiplies whole tiles of bfloat16.
bool has_amx();

}  // namespace lorafast
