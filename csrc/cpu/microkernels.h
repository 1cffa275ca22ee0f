// The inner loops, compiled once per instruction set and chosen at run time.
//
// All of them work on tiles: rows of float32 in cache, `ld` floats apart, `cols` of them, `cols` and every
// `ld` a multiple of kLanes. A rank block is kLanes ranks wide; ranks beyond r are zero.
#pragma once

#include <cstdint>

namespace lorafast {

constexpr int64_t kLanes = 16;

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// bfloat16 as the processor multiplies it: products of neighbouring pairs, summed in float32. A pair is two
// bfloat16 in 32 bits, the first one low. Tiles are rows of bfloat16 as they lie in memory.
struct PairMicrokernels {
  // out[i][:] += sum over c of tile[i][c] * t[c][:]          t [cols / 2, kLanes] pairs of columns
  void (*reduce_columns)(
      const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* t, float* out);

  // out[j][c] += sum over i of t[i][j] * tile[i][c]          t [ceil(rows / 2), kLanes] pairs of rows
  void (*reduce_rows)(
      const uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* t, float* out,
      int64_t ld_out);

  // tile[i][c] += sum over j of s[i][j] * t[j][c], rounded once   s [rows, pairs], t [pairs, ld_t] pairs of ranks
  void (*expand)(
      uint16_t* tile, int64_t ld, int64_t rows, int64_t cols, const uint32_t* s, int64_t pairs,
      const uint32_t* t, int64_t ld_t);

  // row[c] = kept ? row[c] : 0, as dropout below without the scale
  void (*mask)(
      uint16_t* row, int64_t row_index, int64_t first, int64_t cols, int64_t groups, uint64_t seed,
      uint32_t threshold);
};

struct Microkernels {
  const char* name;
  const PairMicrokernels* pairs;  // nullptr where the processor has no such product

  // out[i][:] += sum over c of tile[i][c] * t[c][:]          t [cols, kLanes], out [rows, kLanes]
  void (*reduce_columns)(const float* tile, int64_t ld, int64_t rows, int64_t cols, const float* t, float* out);

  // out[j][c] += sum over i of t[i][j] * tile[i][c]          t [rows, kLanes], out [kLanes, ld_out]
  void (*reduce_rows)(
      const float* tile, int64_t ld, int64_t rows, int64_t cols, const float* t, float* out, int64_t ld_out);

  // tile[i][c] += sum over j < r of s[i][j] * t[j][c]        s [rows, ld_s], t [r, ld_t]
  void (*expand)(
      float* tile, int64_t ld, int64_t rows, int64_t cols, const float* s, int64_t ld_s, int64_t r,
      const float* t, int64_t ld_t);

  // to[i] = from[i], from another dtype or into it, rounded to nearest even
  void (*load)(const void* from, Dtype dtype, int64_t count, float* to);
  void (*store)(const float* from, Dtype dtype, int64_t count, void* to);

  // row[c] = kept ? row[c] * scale : 0 for the columns [first, first + cols) of row `row_index` of a
  // matrix of `groups` Philox calls a row; `first` is a multiple of 8
  void (*dropout)(
      float* row, int64_t row_index, int64_t first, int64_t cols, int64_t groups, uint64_t seed,
      uint32_t threshold, float scale);
};

// The fastest set that this processor has, or the one that LORAFAST_CPU names.
const Microkernels& microkernels();

}  // namespace lorafast
