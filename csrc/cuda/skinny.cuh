// The skinny operations: one pass over a large matrix X [rows, columns], which is x or dy, beside factors of r
// columns. S = scale · drop(X)·P sums over columns (P is Aᵀ or B), D = scale · drop(X)ᵀ·Q over rows (Q is s or ds),
// and bias = Σ X over rows.
//
//   kShrink    S, a CTA to a row block: it walks along columns.
//   kReduce    D and bias, a CTA to a column block: it walks down rows, its sums stay in registers.
//   kBackward  all three, down rows too: S leaves it tile by tile.
//
// Tiles of X come through a ring of cp.async stages. Their rows are 16 bytes longer than the data: an odd number of
// chunks, so that ldmatrix finds eight rows in different banks, plain or transposed, and addresses are constants.
// Where several CTAs share a sum each leaves its part in float32 as its fragments have it, and the last to arrive
// adds them in the order of their numbers: the bits don't depend on who was first.
//
// bfloat16 is multiplied as such, P and Q rounded to it. float16 and float32 are multiplied as TF32: the float32
// factors as two numbers each, the sum of a tile apart from the total, since tensor cores cut bits off long sums.
#pragma once

#include <algorithm>
#include <type_traits>

#include "counters.cuh"
#include "numbers.cuh"
#include "operations.h"
#include "philox.cuh"
#include "ptx.cuh"

namespace lorafast::cuda {

enum class Skinny { kShrink, kReduce, kBackward };

struct SkinnyParams {
  const void* x;
  int64_t x_row, x_column;  // strides, in elements, as all of these
  int64_t rows, columns, r;
  const void* p;
  int64_t p_column, p_rank;  // of P's element for (column, rank)
  const void* q;
  int64_t q_row, q_rank;
  void* S;  // [rows, r], contiguous
  void* D;
  int64_t D_column, D_rank;
  void* bias;
  float* S_parts;  // null where one CTA has a sum to itself, as those below
  float* D_parts;
  float* bias_parts;
  uint32_t* counters;  // of S first, then of D
  Dropout dropout;
  float S_scale, D_scale;
  int32_t share;   // tiles of a CTA's walk
  int32_t chunk;   // kBackward: tiles after which S is added up
  int32_t stages;  // of the ring
  Dtype p_dtype, D_dtype;
  bool x_direct, p_direct, q_direct;  // by cp.async: rows of neighbours at multiples of 16 bytes
};

constexpr int kSkinnyThreads = 256;
constexpr int kSkinnyPad = 16;  // bytes after a row in shared memory
constexpr int kSkinnyMostStages = 8;

// P and Q beside X of T: in shared memory, and what s and ds are.
template <class T>
using Beside = std::conditional_t<DtypeOf<T>::value == Dtype::bfloat16, bfloat16, float>;

// The tile of an instance, and what of shared memory it takes.
template <class T, Skinny kKind, int kRanks>
struct SkinnyTile {
  static constexpr bool kBf16 = DtypeOf<T>::value == Dtype::bfloat16;
  static constexpr int kRows = kKind == Skinny::kBackward ? (kBf16 && kRanks <= 16 ? 64 : 32)
                               : kBf16                    ? (kKind == Skinny::kReduce && kRanks >= 64 ? 64 : 128)
                               : kKind == Skinny::kReduce && sizeof(T) == 4 ? 32
                                                                            : 64;
  static constexpr int kColumns = kKind == Skinny::kBackward       ? (kBf16 ? 256 : 128)
                                  : kKind == Skinny::kReduce       ? 128
                                  : sizeof(T) == 2 && kRanks <= 32 ? 128
                                                                   : 64;
  static constexpr int kXPitch = kColumns * static_cast<int>(sizeof(T)) + kSkinnyPad;
  static constexpr int kPPitch = kColumns * static_cast<int>(sizeof(Beside<T>)) + kSkinnyPad;
  static constexpr int kQPitch = kRanks * static_cast<int>(sizeof(Beside<T>)) + kSkinnyPad;
  static constexpr int kX = kRows * kXPitch, kP = kRanks * kPPitch, kQ = kRows * kQPitch;
  // Warps share a tile's S: kWarpRows of them take its rows, kWarpColumns its columns, whose sums are added.
  static constexpr int kWarpRows = kKind == Skinny::kShrink ? 4 : 2;
  static constexpr int kWarpColumns = 8 / kWarpRows;
  static constexpr int kCross = kWarpColumns * kRows * kRanks * 4;
  static constexpr int kStage = kX + (kKind == Skinny::kShrink ? kP : kQ);
  // Before the ring: P, which for bfloat16 goes to registers, and the warps' sums. kShrink's lie in the ring when it
  // is done.
  static constexpr bool kKeepP = kKind == Skinny::kBackward && kBf16;
  static constexpr int kAtCross = kKeepP ? 0 : kP;
  static constexpr int kBefore = kKind != Skinny::kBackward ? 0 : kKeepP && kP > kCross ? kP : kAtCross + kCross;

  static constexpr int shared(int stages) {
    const int ring = stages * kStage;
    return kKind == Skinny::kShrink && ring < kCross ? kCross : kBefore + ring;
  }
};

// Where an infinity meets the rest of a factor the small half of a sum is no number; the large half says it all.
__device__ __forceinline__ float if_finite(float x) { return fabsf(x) < __uint_as_float(0x7F800000u) ? x : 0.0f; }

// How a T is multiplied. A fragment of X is four registers of 32 bytes of a row: kSubsteps of the instruction.
template <class T>
struct Products {
  static constexpr bool kTf32 = DtypeOf<T>::value != Dtype::bfloat16;
  static constexpr int kSubsteps = DtypeOf<T>::value == Dtype::float16 ? 2 : 1;

  // The instruction's fragment of X. float16 becomes float32; a pair of neighbours along the sum, (2t, 2t + 1) of
  // eight, are its elements t and t + 4, so P and Q are read in that order.
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&raw)[4], int substep) {
    if constexpr (kSubsteps == 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const __half2 pair = *reinterpret_cast<const __half2*>(&raw[2 * substep + i]);
        a[i] = __float_as_uint(__low2float(pair));
        a[2 + i] = __float_as_uint(__high2float(pair));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = raw[i];
    }
  }

  // large + small += a·b
  static __device__ __forceinline__ void add(
      float (&large)[4], float (&small)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (!kTf32) {
      ptx::multiply_bf16(large, a, b0, b1);
    } else {
      const Tf32Pair first = split_tf32(__uint_as_float(b0)), second = split_tf32(__uint_as_float(b1));
      if constexpr (kSubsteps == 2) {
        ptx::multiply_tf32(small, a, first.low, second.low);
        ptx::multiply_tf32(large, a, first.high, second.high);
      } else {
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Tf32Pair of = split_tf32(__uint_as_float(a[i]));
          high[i] = of.high;
          low[i] = of.low;
        }
        ptx::multiply_tf32(small, low, first.high, second.high);
        ptx::multiply_tf32(small, high, first.low, second.low);
        ptx::multiply_tf32(large, high, first.high, second.high);
      }
    }
  }

  // sum += a·1. A float32 is the sum of three numbers of TF32.
  static __device__ __forceinline__ void add_ones(float (&sum)[4], const uint32_t (&a)[4]) {
    if constexpr (!kTf32) {
      ptx::multiply_bf16(sum, a, 0x3F803F80u, 0x3F803F80u);
    } else if constexpr (kSubsteps == 2) {
      ptx::multiply_tf32(sum, a, 0x3F800000u, 0x3F800000u);
    } else {
      uint32_t part[3][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Tf32Pair of = split_tf32(__uint_as_float(a[i])), rest = split_tf32(__uint_as_float(of.low));
        part[2][i] = of.high;
        part[1][i] = rest.high;
        part[0][i] = rest.low;
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) ptx::multiply_tf32(sum, part[i], 0x3F800000u, 0x3F800000u);
    }
  }
};

template <int kCount>
__device__ __forceinline__ void clear(float (&sums)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
}

// Waits for all but the last `left` stages of this thread.
__device__ __forceinline__ void wait_for_stages(int left) {
  switch (left) {
    case 0: return ptx::wait_for_copies<0>();
    case 1: return ptx::wait_for_copies<1>();
    case 2: return ptx::wait_for_copies<2>();
    case 3: return ptx::wait_for_copies<3>();
    case 4: return ptx::wait_for_copies<4>();
    case 5: return ptx::wait_for_copies<5>();
    case 6: return ptx::wait_for_copies<6>();
    default: return ptx::wait_for_copies<7>();
  }
}

template <class T, Skinny kKind, int kRanks>
struct SkinnyCta {
  using Tile = SkinnyTile<T, kKind, kRanks>;
  using Factor = Beside<T>;
  using Product = Products<T>;
  static constexpr bool kHasS = kKind != Skinny::kReduce, kHasD = kKind != Skinny::kShrink;
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  static constexpr int kRankTiles = kRanks / 8;
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kChunk = 16 / kSize;                     // elements of 16 bytes
  static constexpr int kChunks = kColumns / kChunk;             // of a row
  static constexpr int kStep = kSkinnyThreads / kChunks;        // rows between two chunks of a thread
  static constexpr int kSTiles = kRows / 16 / Tile::kWarpRows;  // of a warp: 16 rows each
  static constexpr int kSColumns = kColumns / Tile::kWarpColumns;
  static constexpr int kSSteps = kSColumns * kSize / 32;
  static constexpr int kDTiles = kColumns / 128;  // of a warp: 16 columns each
  static constexpr int kSFragments = kRows / 16 * kRankTiles * 32;
  static_assert(
      kSkinnyThreads % kChunks == 0 && kRows % kStep == 0 && kSTiles >= 1 && kSSteps >= 1, "no whole steps");

  const SkinnyParams& p;
  char* const ring;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.z) * kRanks;
  uint64_t seed = 0;

  __device__ SkinnyCta(const SkinnyParams& params, char* shared) : p(params), ring(shared + Tile::kBefore) {
    if (p.dropout.seed != nullptr) seed = static_cast<uint64_t>(*p.dropout.seed);
  }

  // ---- Tiles into shared memory. What lies outside the matrices is 0.

  __device__ __forceinline__ void load_x(char* stage, int64_t row0, int64_t column0) const {
    const int chunk = thread % kChunks;
    const int64_t column = column0 + chunk * kChunk, row = row0 + thread / kChunks;
    char* to = stage + (thread / kChunks) * Tile::kXPitch + chunk * 16;
    if (p.x_direct && row0 + kRows <= p.rows && column0 + kColumns <= p.columns) {
      const char* from = static_cast<const char*>(p.x) + (row * p.x_row + column) * kSize;
#pragma unroll
      for (int i = 0; i < kRows / kStep; ++i) {
        ptx::copy_whole_16(to + i * kStep * Tile::kXPitch, from);
        from += kStep * p.x_row * kSize;
      }
    } else if (p.x_direct) {
      const int64_t left = (p.columns - column) * kSize;
      const int bytes = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
      const char* from = static_cast<const char*>(p.x) + (row * p.x_row + column) * kSize;
      const int64_t rows_left = p.rows - row;
      const int inside = rows_left < kRows ? static_cast<int>(rows_left) : kRows;
#pragma unroll 1
      for (int i = 0; i < kRows / kStep; ++i) {
        const int there = i * kStep < inside ? bytes : 0;
        // Nothing is read where `there` is 0, but an address must be good all the same.
        ptx::copy_16(to + i * kStep * Tile::kXPitch, there != 0 ? from : p.x, there);
        from += kStep * p.x_row * kSize;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows / kStep; ++i) {
        T v[kChunk];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          const bool inside = row + i * kStep < p.rows && column + j < p.columns;
          v[j] = inside ? static_cast<const T*>(p.x)[(row + i * kStep) * p.x_row + (column + j) * p.x_column]
                        : from_float<T>(0.0f);
        }
        *reinterpret_cast<uint4*>(to + i * kStep * Tile::kXPitch) = *reinterpret_cast<uint4*>(v);
      }
    }
  }

  // Drops elements of the chunks that this thread has copied, and scales the others (float16: the sum is scaled).
  __device__ __forceinline__ void drop_x(char* stage, int64_t row0, int64_t column0) const {
    const int chunk = thread % kChunks;
    const int64_t column = column0 + chunk * kChunk, row = row0 + thread / kChunks;
    const uint32_t threshold = static_cast<uint32_t>(p.dropout.threshold);
    const float scale = p.dropout.survivor_scale;
    uint64_t counter = static_cast<uint64_t>(row * p.dropout.groups + column / 8);
    char* at = stage + (thread / kChunks) * Tile::kXPitch + chunk * 16;
#pragma unroll 1
    for (int i = 0; i < kRows / kStep; ++i) {
      const uint4 words = philox(seed, counter);
      uint4 x = *reinterpret_cast<uint4*>(at);
      if constexpr (kSize == 2) {
        x.x = dropped(x.x, words.x, threshold, scale);
        x.y = dropped(x.y, words.y, threshold, scale);
        x.z = dropped(x.z, words.z, threshold, scale);
        x.w = dropped(x.w, words.w, threshold, scale);
      } else {
        const bool second = column % 8 != 0;
        const uint32_t first = second ? words.z : words.x, last = second ? words.w : words.y;
        x.x = (first & 0xFFFFu) >= threshold ? scaled(x.x, scale) : 0u;
        x.y = (first >> 16) >= threshold ? scaled(x.y, scale) : 0u;
        x.z = (last & 0xFFFFu) >= threshold ? scaled(x.z, scale) : 0u;
        x.w = (last >> 16) >= threshold ? scaled(x.w, scale) : 0u;
      }
      *reinterpret_cast<uint4*>(at) = x;
      at += kStep * Tile::kXPitch;
      counter += static_cast<uint64_t>(kStep * p.dropout.groups);
    }
  }

  static __device__ __forceinline__ uint32_t scaled(uint32_t x, float scale) {
    return __float_as_uint(__uint_as_float(x) * scale);
  }

  // Two elements of 16 bits.
  static __device__ __forceinline__ uint32_t
  dropped(uint32_t pair, uint32_t word, uint32_t threshold, float scale) {
    if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
      const __nv_bfloat162 rounded =
          __floats2bfloat162_rn(__uint_as_float(pair << 16) * scale, __uint_as_float(pair & 0xFFFF0000u) * scale);
      pair = *reinterpret_cast<const uint32_t*>(&rounded);
    }
    const uint32_t kept =
        ((word & 0xFFFFu) >= threshold ? 0x0000FFFFu : 0u) | ((word >> 16) >= threshold ? 0xFFFF0000u : 0u);
    return pair & kept;
  }

  // P [kRanks, kColumns], transposed: columns are neighbours.
  __device__ __forceinline__ void load_p(char* to, int64_t column0) const {
    constexpr int kSizeP = static_cast<int>(sizeof(Factor)), kOf16 = 16 / kSizeP, kPerRow = kColumns / kOf16;
    if (p.p_direct && rank0 + kRanks <= p.r && column0 + kColumns <= p.columns) {
      constexpr int kPStep = kSkinnyThreads / kPerRow;
      const char* from = static_cast<const char*>(p.p) +
                         ((rank0 + thread / kPerRow) * p.p_rank + column0 + thread % kPerRow * kOf16) * kSizeP;
      char* at = to + thread / kPerRow * Tile::kPPitch + thread % kPerRow * 16;
#pragma unroll
      for (int i = 0; i < kRanks; i += kPStep) {
        if (kPStep <= kRanks || thread < kRanks * kPerRow) ptx::copy_whole_16(at + i * Tile::kPPitch, from);
        from += kPStep * p.p_rank * kSizeP;
      }
      return;
    }
    if (p.p_direct) {
#pragma unroll 1
      for (int i = thread; i < kRanks * kPerRow; i += kSkinnyThreads) {
        const int64_t rank = rank0 + i / kPerRow, column = column0 + i % kPerRow * kOf16;
        const int64_t left = (p.columns - column) * kSizeP;
        const int bytes = rank >= p.r || left <= 0 ? 0 : left >= 16 ? 16 : static_cast<int>(left);
        const char* from = static_cast<const char*>(p.p) + (rank * p.p_rank + column) * kSizeP;
        ptx::copy_16(to + i / kPerRow * Tile::kPPitch + i % kPerRow * 16, bytes != 0 ? from : p.p, bytes);
      }
      return;
    }
    constexpr int kGroups = kColumns / 8;
    const bool by_rank = p.p_rank == 1;
#pragma unroll 1
    for (int i = thread; i < kRanks * kGroups; i += kSkinnyThreads) {
      const int rank = by_rank ? i % kRanks : i / kGroups, group = by_rank ? i / kRanks : i % kGroups;
      const int64_t column = column0 + group * 8, offset = (rank0 + rank) * p.p_rank + column * p.p_column;
      Factor v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const bool inside = rank0 + rank < p.r && column + j < p.columns;
        // float16 is multiplied in the order 0 2 4 6 1 3 5 7, as Products has it.
        const int place = Product::kSubsteps == 2 ? (j % 2) * 4 + j / 2 : j;
        v[place] = from_float<Factor>(inside ? load_as_float(p.p, offset + j * p.p_column, p.p_dtype) : 0.0f);
      }
      char* at = to + rank * Tile::kPPitch + group * 8 * kSizeP;
#pragma unroll
      for (int j = 0; j < 8 / kOf16; ++j)
        *reinterpret_cast<uint4*>(at + 16 * j) = reinterpret_cast<const uint4*>(v)[j];
    }
  }

  // Q [kRows, kRanks]
  __device__ __forceinline__ void load_q(char* to, int64_t row0) const {
    constexpr int kSizeQ = static_cast<int>(sizeof(Factor)), kOf16 = 16 / kSizeQ, kPerRow = kRanks / kOf16;
    if (p.q_direct && rank0 + kRanks <= p.r && row0 + kRows <= p.rows) {
      constexpr int kQStep = kSkinnyThreads / kPerRow;
      const char* from = static_cast<const char*>(p.q) +
                         ((row0 + thread / kPerRow) * p.q_row + rank0 + thread % kPerRow * kOf16) * kSizeQ;
      char* at = to + thread / kPerRow * Tile::kQPitch + thread % kPerRow * 16;
#pragma unroll
      for (int i = 0; i < kRows; i += kQStep) {
        if (kQStep <= kRows || thread < kRows * kPerRow) ptx::copy_whole_16(at + i * Tile::kQPitch, from);
        from += kQStep * p.q_row * kSizeQ;
      }
      return;
    }
#pragma unroll 1
    for (int i = thread; i < kRows * kPerRow; i += kSkinnyThreads) {
      const int64_t row = row0 + i / kPerRow, rank = rank0 + i % kPerRow * kOf16;
      char* at = to + i / kPerRow * Tile::kQPitch + i % kPerRow * 16;
      if (p.q_direct) {
        const int64_t left = (p.r - rank) * kSizeQ;
        const int bytes = row >= p.rows || left <= 0 ? 0 : left >= 16 ? 16 : static_cast<int>(left);
        const char* from = static_cast<const char*>(p.q) + (row * p.q_row + rank) * kSizeQ;
        ptx::copy_16(at, bytes != 0 ? from : p.q, bytes);
      } else {
        Factor v[kOf16];
#pragma unroll
        for (int j = 0; j < kOf16; ++j) {
          const bool inside = row < p.rows && rank + j < p.r;
          v[j] = inside ? static_cast<const Factor*>(p.q)[row * p.q_row + (rank + j) * p.q_rank]
                        : from_float<Factor>(0.0f);
        }
        *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(v);
      }
    }
  }

  // ---- Products of a tile

  using PStep = uint32_t[Product::kSubsteps][kRankTiles / 2][4];

  // P's fragments for a step: of two rank tiles in a load.
  __device__ __forceinline__ void fragments_of_p(PStep& b, const char* of_warp, int step) const {
    const char* at = of_warp + ((lane & 7) + (lane >> 4) * 8) * Tile::kPPitch + ((lane >> 3) & 1) * 16;
#pragma unroll
    for (int sub = 0; sub < Product::kSubsteps; ++sub)
#pragma unroll
      for (int n = 0; n < kRankTiles / 2; ++n)
        ptx::load_matrices(b[sub][n], at + n * 16 * Tile::kPPitch + (step * Product::kSubsteps + sub) * 32);
  }

  // sums += X·P of a warp's rows and columns. P is in registers (`kept`), or in shared memory.
  template <bool kKept>
  __device__ __forceinline__ void multiply_s(
      float (&sums)[kSTiles][kRankTiles][4], const char* x, const char* of_p, const PStep* kept) const {
    const int warp_row = warp % Tile::kWarpRows, warp_column = warp / Tile::kWarpRows;
    const char* at = x + (warp_row * kSTiles * 16 + (lane & 15)) * Tile::kXPitch +
                     warp_column * kSColumns * kSize + (lane >> 4) * 16;
    const char* from_p = of_p + warp_column * kSColumns * static_cast<int>(sizeof(Factor));
    if constexpr (!Product::kTf32) {
#pragma unroll
      for (int step = 0; step < kSSteps; ++step) {
        PStep b;
        if constexpr (!kKept) fragments_of_p(b, from_p, step);
        const PStep& of = *(kKept ? kept + step : &b);
#pragma unroll
        for (int m = 0; m < kSTiles; ++m) {
          uint32_t a[4];
          ptx::load_matrices(a, at + m * 16 * Tile::kXPitch + step * 32);
#pragma unroll
          for (int n = 0; n < kRankTiles; ++n)
            Product::add(sums[m][n], sums[m][n], a, of[0][n / 2][n % 2 * 2], of[0][n / 2][n % 2 * 2 + 1]);
        }
      }
    } else {
#pragma unroll
      for (int m = 0; m < kSTiles; ++m) {
        float large[kRankTiles][4], small[kRankTiles][4];
        clear(large);
        clear(small);
#pragma unroll 1  // the code of a step is long
        for (int step = 0; step < kSSteps; ++step) {
          PStep b;
          if constexpr (!kKept) fragments_of_p(b, from_p, step);
          const PStep& of = *(kKept ? kept + step : &b);
          uint32_t raw[4];
          ptx::load_matrices(raw, at + m * 16 * Tile::kXPitch + step * 32);
#pragma unroll
          for (int sub = 0; sub < Product::kSubsteps; ++sub) {
            uint32_t a[4];
            Product::fragment(a, raw, sub);
#pragma unroll
            for (int n = 0; n < kRankTiles; ++n)
              Product::add(large[n], small[n], a, of[sub][n / 2][n % 2 * 2], of[sub][n / 2][n % 2 * 2 + 1]);
          }
        }
        add_apart(sums[m], large, small);
      }
    }
  }

  static __device__ __forceinline__ void add_apart(
      float (&sums)[kRankTiles][4], const float (&large)[kRankTiles][4], const float (&small)[kRankTiles][4]) {
#pragma unroll
    for (int n = 0; n < kRankTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] += large[n][i] + if_finite(small[n][i]);
  }

  // sums += Xᵀ·Q of a warp's columns, and ones += Xᵀ·1: what is wanted of both.
  template <bool kWantsD, bool kWantsBias>
  __device__ __forceinline__ void multiply_d(
      float (&sums)[kDTiles][kRankTiles][4], float (&ones)[kDTiles][4], const char* x, const char* q) const {
    const char* of_warp = x + warp * kDTiles * 16 * kSize;
    // Transposed: matrices of the rows 0 and columns 0, rows 0 and columns 8, rows 8 and columns 0, rows 8 and columns 8.
    const char* at = of_warp + ((lane & 7) + (lane >> 4) * 8) * Tile::kXPitch + ((lane >> 3) & 1) * 16;
    if constexpr (!Product::kTf32) {
      const char* from_q = q + (lane & 15) * Tile::kQPitch + (lane >> 4) * 16;
#pragma unroll
      for (int step = 0; step < kRows / 16; ++step) {
        uint32_t b[kRankTiles / 2][4];
        if constexpr (kWantsD) {
#pragma unroll
          for (int n = 0; n < kRankTiles / 2; ++n)
            ptx::load_matrices_transposed(b[n], from_q + step * 16 * Tile::kQPitch + n * 32);
        }
#pragma unroll
        for (int m = 0; m < kDTiles; ++m) {
          uint32_t a[4];
          ptx::load_matrices_transposed(a, at + step * 16 * Tile::kXPitch + m * 32);
          if constexpr (kWantsD) {
#pragma unroll
            for (int n = 0; n < kRankTiles; ++n)
              Product::add(sums[m][n], sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
          }
          if constexpr (kWantsBias) Product::add_ones(ones[m], a);
        }
      }
    } else {
      const int g = lane / 4, t = lane % 4;
      const char* from_q = q + 2 * t * Tile::kQPitch + g * 4;
#pragma unroll
      for (int m = 0; m < kDTiles; ++m) {
        float large[kRankTiles][4], small[kRankTiles][4], column[1][4];
        clear(large);
        clear(small);
        clear(column);
#pragma unroll 1
        for (int step = 0; step < kRows / (8 * Product::kSubsteps); ++step) {
          uint32_t raw[4];
          if constexpr (kSize == 2) {
            ptx::load_matrices_transposed(raw, at + step * 16 * Tile::kXPitch + m * 32);
          } else {
            const char* element = of_warp + (step * 8 + 2 * t) * Tile::kXPitch + (m * 16 + g) * 4;
#pragma unroll
            for (int i = 0; i < 4; ++i)
              raw[i] = *reinterpret_cast<const uint32_t*>(element + i / 2 * Tile::kXPitch + i % 2 * 32);
          }
#pragma unroll
          for (int sub = 0; sub < Product::kSubsteps; ++sub) {
            uint32_t a[4];
            Product::fragment(a, raw, sub);
            if constexpr (kWantsD) {
              const char* pair = from_q + (step * Product::kSubsteps + sub) * 8 * Tile::kQPitch;
#pragma unroll
              for (int n = 0; n < kRankTiles; ++n) {
                const uint32_t b0 = *reinterpret_cast<const uint32_t*>(pair + n * 32);
                const uint32_t b1 = *reinterpret_cast<const uint32_t*>(pair + Tile::kQPitch + n * 32);
                Product::add(large[n], small[n], a, b0, b1);
              }
            }
            if constexpr (kWantsBias) Product::add_ones(column[0], a);
          }
        }
        if constexpr (kWantsD) add_apart(sums[m], large, small);
#pragma unroll
        for (int i = 0; i < 4; ++i) ones[m][i] += column[0][i];
      }
    }
  }

  // ---- Sums of S. Fragment f of a tile is a float4: lane f % 32 of rank tile f / 32 % kRankTiles of 16 rows.

  // Where a part of a tile's S lies: `part` of `parts` CTAs that share its columns.
  __device__ __forceinline__ float4* parts_of_s(int64_t tile, int part, int parts) const {
    const int64_t tiles = (p.rows + kRows - 1) / kRows;
    return reinterpret_cast<float4*>(p.S_parts) +
           ((static_cast<int64_t>(blockIdx.z) * parts + part) * tiles + tile) * kSFragments;
  }

  __device__ __forceinline__ void store_s(int64_t tile, int f, float4 v) const {
    const int of = f % 32;
    const int64_t row = tile * kRows + f / (32 * kRankTiles) * 16 + of / 4;
    const int64_t rank = rank0 + f / 32 % kRankTiles * 8 + of % 4 * 2;
    Factor* to = static_cast<Factor*>(p.S) + row * p.r + rank;
    const float scale = p.S_scale;
    if (row < p.rows) store_pair(to, rank, v.x * scale, v.y * scale);
    if (row + 8 < p.rows) store_pair(to + 8 * p.r, rank, v.z * scale, v.w * scale);
  }

  __device__ __forceinline__ void store_pair(Factor* to, int64_t rank, float first, float second) const {
    if (rank + 1 < p.r && p.r % 2 == 0) {
      if constexpr (sizeof(Factor) == 4) {
        *reinterpret_cast<float2*>(to) = make_float2(first, second);
      } else {
        *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(first, second);
      }
    } else {
      if (rank < p.r) to[0] = from_float<Factor>(first);
      if (rank + 1 < p.r) to[1] = from_float<Factor>(second);
    }
  }

  // Each warp's sums to where all can add them.
  __device__ __forceinline__ void cross(float4* to, const float (&sums)[kSTiles][kRankTiles][4]) const {
    const int warp_row = warp % Tile::kWarpRows, warp_column = warp / Tile::kWarpRows;
    float4* at = to + warp_column * kSFragments + warp_row * kSTiles * kRankTiles * 32 + lane;
#pragma unroll
    for (int m = 0; m < kSTiles; ++m)
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n)
        at[(m * kRankTiles + n) * 32] = make_float4(sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]);
  }

  static __device__ __forceinline__ void add(float4& to, const float4& v) {
    to.x += v.x;
    to.y += v.y;
    to.z += v.z;
    to.w += v.w;
  }

  // A tile's S, of all warps: stored, or left as this CTA's part.
  __device__ __forceinline__ void finish_s(const float4* from, int64_t tile, int part, int parts) const {
    float4* to = parts > 1 ? parts_of_s(tile, part, parts) + thread : nullptr;
#pragma unroll
    for (int i = 0; i < kSFragments; i += kSkinnyThreads) {
      if (kSFragments % kSkinnyThreads != 0 && i + thread >= kSFragments) break;
      float4 v = from[i + thread];
#pragma unroll
      for (int j = 1; j < Tile::kWarpColumns; ++j) add(v, from[j * kSFragments + i + thread]);
      if (to != nullptr) to[i] = v;
      else store_s(tile, i + thread, v);
    }
  }

  // Adds up the parts of a tile's S.
  __device__ __forceinline__ void add_up_s(int64_t tile, int parts) const {
    const int64_t stride = (p.rows + kRows - 1) / kRows * kSFragments;
    for (int f = thread; f < kSFragments; f += kSkinnyThreads) {
      const float4* from = parts_of_s(tile, 0, parts) + f;
      float4 v = *from;
#pragma unroll 4
      for (int i = 1; i < parts; ++i) {
        from += stride;
        add(v, *from);
      }
      store_s(tile, f, v);
    }
  }

  // ---- Sums of D and of the bias

  __device__ __forceinline__ void store_d(float (&sums)[kDTiles][kRankTiles][4], float (&ones)[kDTiles][4]) const {
    const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kColumns + warp * kDTiles * 16 + lane / 4;
#pragma unroll
    for (int m = 0; m < kDTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t column = column0 + m * 16 + h * 8;
        if (column >= p.columns) continue;
        if (p.D != nullptr) {
#pragma unroll
          for (int n = 0; n < kRankTiles; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int64_t rank = rank0 + n * 8 + lane % 4 * 2 + j;
              if (rank < p.r)
                store_as(p.D, column * p.D_column + rank * p.D_rank, sums[m][n][2 * h + j] * p.D_scale, p.D_dtype);
            }
        }
        if (p.bias != nullptr && blockIdx.z == 0 && lane % 4 == 0)
          static_cast<T*>(p.bias)[column] = from_float<T>(ones[m][2 * h]);
      }
  }

  __device__ __forceinline__ void finish_d(
      float (&sums)[kDTiles][kRankTiles][4], float (&ones)[kDTiles][4], uint32_t* counter) const {
    const int parts = static_cast<int>(gridDim.y);
    if (parts == 1) return store_d(sums, ones);
    // A part: [column block] of fragments, a float4 a thread.
    const int64_t block = static_cast<int64_t>(blockIdx.z) * parts * gridDim.x + blockIdx.x;
    const int64_t of_ones = static_cast<int64_t>(blockIdx.x) * kDTiles * kSkinnyThreads + thread;
    constexpr int64_t kFragments = kDTiles * kRankTiles * kSkinnyThreads;
    float4* at = reinterpret_cast<float4*>(p.D_parts) + block * kFragments + thread;
    float2* at_ones = reinterpret_cast<float2*>(p.bias_parts) + of_ones;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kFragments;
    const int64_t stride_ones = static_cast<int64_t>(gridDim.x) * kDTiles * kSkinnyThreads;
    const bool has_bias = p.bias != nullptr && blockIdx.z == 0;
    if (p.D != nullptr) {
#pragma unroll
      for (int m = 0; m < kDTiles; ++m)
#pragma unroll
        for (int n = 0; n < kRankTiles; ++n)
          at[blockIdx.y * stride + (m * kRankTiles + n) * kSkinnyThreads] =
              make_float4(sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]);
    }
    if (has_bias) {
#pragma unroll
      for (int m = 0; m < kDTiles; ++m)
        at_ones[blockIdx.y * stride_ones + m * kSkinnyThreads] = make_float2(ones[m][0], ones[m][2]);
    }
    if (arrive(counter) != static_cast<uint32_t>(parts - 1)) return;
    if (p.D != nullptr) {
#pragma unroll
      for (int m = 0; m < kDTiles; ++m)
#pragma unroll
        for (int n = 0; n < kRankTiles; ++n) {
          const float4* from = at + (m * kRankTiles + n) * kSkinnyThreads;
          float4 v = *from;
#pragma unroll 4
          for (int i = 1; i < parts; ++i) {
            from += stride;
            add(v, *from);
          }
          sums[m][n][0] = v.x;
          sums[m][n][1] = v.y;
          sums[m][n][2] = v.z;
          sums[m][n][3] = v.w;
        }
    }
    if (has_bias) {
#pragma unroll
      for (int m = 0; m < kDTiles; ++m) {
        const float2* from = at_ones + m * kSkinnyThreads;
        float2 v = *from;
        for (int i = 1; i < parts; ++i) {
          v.x += from[i * stride_ones].x;
          v.y += from[i * stride_ones].y;
        }
        ones[m][0] = v.x;
        ones[m][2] = v.y;
      }
    }
    store_d(sums, ones);
    if (thread == 0) *counter = 0;
  }

  // ---- The walk

  // Stage of tile i of the walk into the ring; P or Q goes with it.
  __device__ __forceinline__ void load(char* stage, int64_t first, int i) const {
    if constexpr (kKind == Skinny::kShrink) {
      const int64_t column = (first + i) * kColumns;
      load_x(stage, static_cast<int64_t>(blockIdx.x) * kRows, column);
      load_p(stage + Tile::kX, column);
    } else {
      const int64_t row = (first + i) * kRows;
      load_x(stage, row, static_cast<int64_t>(blockIdx.x) * kColumns);
      if (p.D != nullptr) load_q(stage + Tile::kX, row);
    }
  }

  __device__ __forceinline__ void run() {
    constexpr int kAlong = kKind == Skinny::kShrink ? kColumns : kRows;
    const int64_t length = kKind == Skinny::kShrink ? p.columns : p.rows;
    const int64_t all = (length + kAlong - 1) / kAlong, first = static_cast<int64_t>(blockIdx.y) * p.share;
    const int tiles = static_cast<int>(all - first < p.share ? all - first : p.share);
    const int ahead = p.stages - 1;
    const int groups = static_cast<int>(gridDim.x);  // kBackward: of columns
    const int chunks = kKind == Skinny::kBackward ? (p.share + p.chunk - 1) / p.chunk : 0;

    char* before = ring - Tile::kBefore;
    if constexpr (kKind == Skinny::kBackward) {
      load_p(before, static_cast<int64_t>(blockIdx.x) * kColumns);
      ptx::commit_copies();
    }
    float s[kHasS ? kSTiles : 1][kRankTiles][4];
    float d[kHasD ? kDTiles : 1][kRankTiles][4], ones[kHasD ? kDTiles : 1][4];
    PStep kept[Tile::kKeepP ? kSSteps : 1];
    if constexpr (kKind == Skinny::kShrink) {
#pragma unroll
      for (int m = 0; m < kSTiles; ++m) clear(s[m]);
    }
    if constexpr (kHasD) {
#pragma unroll
      for (int m = 0; m < kDTiles; ++m) clear(d[m]);
      clear(ones);
    }

    char *stage = ring, *next = ring, *const end = ring + p.stages * Tile::kStage;
#pragma unroll 1
    for (int i = -ahead; i < tiles; ++i) {  // before the first tile is there, others are asked for
      if (i >= 0) {
        wait_for_stages(ahead - 1);
        if (p.dropout.seed != nullptr) {
          if constexpr (kKind == Skinny::kShrink)
            drop_x(stage, static_cast<int64_t>(blockIdx.x) * kRows, (first + i) * kColumns);
          else drop_x(stage, (first + i) * kRows, static_cast<int64_t>(blockIdx.x) * kColumns);
        }
        __syncthreads();  // the tile is there for all, and all have done with the one before
      }
      if (i + ahead < tiles) load(next, first, i + ahead);
      ptx::commit_copies();
      next += Tile::kStage;
      if (next == end) next = ring;
      if (i < 0) continue;
      if constexpr (Tile::kKeepP) {
        if (i == 0) {
#pragma unroll
          for (int step = 0; step < kSSteps; ++step)
            fragments_of_p(
                kept[step], before + warp / Tile::kWarpRows * kSColumns * static_cast<int>(sizeof(Factor)), step);
          __syncthreads();  // the warps' sums go where P was
        }
      }
      if constexpr (kKind == Skinny::kShrink) multiply_s<false>(s, stage, stage + Tile::kX, nullptr);
      if constexpr (kKind == Skinny::kBackward) {
#pragma unroll
        for (int m = 0; m < kSTiles; ++m) clear(s[m]);
        multiply_s<Tile::kKeepP>(s, stage, before, kept);
        cross(reinterpret_cast<float4*>(before + Tile::kAtCross), s);
      }
      if constexpr (kHasD) {
        if (p.bias == nullptr || blockIdx.z != 0) {
          if (p.D != nullptr) multiply_d<true, false>(d, ones, stage, stage + Tile::kX);
        } else if (p.D != nullptr) {
          multiply_d<true, true>(d, ones, stage, stage + Tile::kX);
        } else {
          multiply_d<false, true>(d, ones, stage, stage + Tile::kX);
        }
      }
      if constexpr (kKind == Skinny::kBackward) {
        __syncthreads();  // the warps' sums are there
        finish_s(
            reinterpret_cast<const float4*>(before + Tile::kAtCross), first + i, static_cast<int>(blockIdx.x),
            groups);
        if (groups > 1 && ((i + 1) % p.chunk == 0 || i + 1 == tiles)) {
          const int chunk = i / p.chunk;
          uint32_t* counter =
              p.counters + (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * chunks + chunk;
          if (arrive(counter) == static_cast<uint32_t>(groups - 1)) {
            for (int j = chunk * p.chunk; j <= i; ++j) add_up_s(first + j, groups);
            if (thread == 0) *counter = 0;
          }
        }
      }
      stage += Tile::kStage;
      if (stage == end) stage = ring;
    }
    ptx::wait_for_copies<0>();

    if constexpr (kKind == Skinny::kShrink) {
      const int parts = static_cast<int>(gridDim.y);
      const int64_t tile = blockIdx.x;
      __syncthreads();  // the ring is done with
      cross(reinterpret_cast<float4*>(ring), s);
      __syncthreads();
      finish_s(reinterpret_cast<const float4*>(ring), tile, static_cast<int>(blockIdx.y), parts);
      if (parts > 1) {
        uint32_t* counter = p.counters + static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x;
        if (arrive(counter) == static_cast<uint32_t>(parts - 1)) {
          add_up_s(tile, parts);
          if (thread == 0) *counter = 0;
        }
      }
    }
    if constexpr (kHasD) {
      uint32_t* of_d = p.counters + static_cast<int64_t>(gridDim.z) * gridDim.y * chunks;
      finish_d(d, ones, of_d + static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x);
    }
  }
};

template <class T, Skinny kKind, int kRanks>
__global__ void __launch_bounds__(kSkinnyThreads, 1) skinny_kernel(const __grid_constant__ SkinnyParams p) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  SkinnyCta<T, kKind, kRanks>(p, shared).run();
#else
  __trap();
#endif
}

// ---- Launchers

// What lorafast/backends/cuda/skinny.py has decided: the instance (`ranks`, of a tile of rows x columns), stages of
// its ring, how many tiles a CTA walks, after how many S is added up.
struct SkinnyPlan {
  int64_t ranks, rows, columns, stages, share, chunk;
};

// Calls `with` with the number of ranks of an instance, if there is one: with(std::integral_constant<int, 16>()).
template <class T, Skinny kKind, class With>
bool with_ranks(int64_t ranks, With with) {
  if (ranks == 16) with(std::integral_constant<int, 16>());
  else if (ranks == 32) with(std::integral_constant<int, 32>());
  else if (ranks == 64) with(std::integral_constant<int, 64>());
  else if constexpr (DtypeOf<T>::value == Dtype::bfloat16 && kKind != Skinny::kBackward) {
    if (ranks != 128) return false;
    with(std::integral_constant<int, 128>());
  } else return false;
  return true;
}

// Whether rows of a matrix can be copied by 16 bytes; `along` is the dimension of neighbours. Without elements there is
// no address at all.
inline bool is_direct(const Tensor& matrix, int along) {
  const int64_t size = static_cast<int64_t>(matrix.element_size());
  return matrix.numel() > 0 && (matrix.stride(along) == 1 || matrix.size(along) == 1) &&
         reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0 &&
         (matrix.stride(1 - along) * size % 16 == 0 || matrix.size(1 - along) == 1);
}

inline Dtype wide(Dtype dtype) { return dtype == Dtype::float16 ? Dtype::float32 : dtype; }

inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? "bfloat16" : dtype == Dtype::float16 ? "float16" : "float32";
}

inline void check_dtype(const char* name, const Tensor& tensor, Dtype expected) {
  STD_TORCH_CHECK(
      dtype_of(tensor) == expected, name, " has dtype ", name_of(dtype_of(tensor)), ", expected ",
      name_of(expected));
}

// The data of scratch memory of at least `count` elements of 4 bytes.
inline void* check_scratch(
    const char* name, const std::optional<Tensor>& scratch, ScalarType dtype, int64_t count,
    const OneDevice& device) {
  if (count == 0) return nullptr;
  STD_TORCH_CHECK(scratch.has_value(), name, " is missing, expected ", count, " elements");
  STD_TORCH_CHECK(
      scratch->scalar_type() == dtype && scratch->is_contiguous() && scratch->numel() >= count, name, " has ",
      scratch->numel(), " elements of dtype ", torch::headeronly::toString(scratch->scalar_type()), ", expected ",
      count, " neighbours of ", torch::headeronly::toString(dtype));
  device.check(name, *scratch);
  check_storage(name, *scratch);
  void* data = scratch->mutable_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, " is not aligned to 16 bytes");
  return data;
}

// Two neighbours of S are one store.
inline void check_pairs(const char* name, const Tensor& S) {
  const uintptr_t bytes = 2 * S.element_size();
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(S.const_data_ptr()) % bytes == 0, name, " is not aligned to ", bytes, " bytes");
}

inline SkinnyParams params_of_x(const Tensor& x) {
  SkinnyParams p{};
  p.x = x.const_data_ptr();
  p.x_row = x.stride(0);
  p.x_column = x.stride(1);
  p.rows = x.size(0);
  p.columns = x.size(1);
  p.x_direct = is_direct(x, 1);
  return p;
}

// P is `factor` with columns of X along dimension `along`.
inline void set_p(SkinnyParams& p, const Tensor& factor, int along, Dtype of_x) {
  p.p = factor.const_data_ptr();
  p.p_column = factor.stride(along);
  p.p_rank = factor.stride(1 - along);
  p.p_dtype = dtype_of(factor);
  p.p_direct = of_x != Dtype::float16 && p.p_dtype == of_x && is_direct(factor, along);
}

inline void set_q(SkinnyParams& p, const Tensor& q) {
  p.q = q.const_data_ptr();
  p.q_row = q.stride(0);
  p.q_rank = q.stride(1);
  p.q_direct = is_direct(q, 1);
}

inline void set_dropout(
    SkinnyParams& p, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Dtype of_x) {
  if (!seed.has_value()) return;
  p.dropout = {
      static_cast<const int64_t*>(seed->const_data_ptr()), (p.columns + 7) / 8, static_cast<int32_t>(threshold),
      static_cast<float>(survivor_scale)};
  if (of_x == Dtype::float16) {  // whose elements aren't scaled: that would round
    p.S_scale *= p.dropout.survivor_scale;
    p.D_scale *= p.dropout.survivor_scale;
  }
}

template <class T, Skinny kKind, int kRanks>
void launch_instance(
    const char* name, SkinnyParams& p, const SkinnyPlan& plan, const std::optional<Tensor>& partials,
    const std::optional<Tensor>& counters, const OneDevice& device) {
  using Tile = SkinnyTile<T, kKind, kRanks>;
  STD_TORCH_CHECK(
      plan.rows == Tile::kRows && plan.columns == Tile::kColumns, name, " has no tile of ", plan.rows, " x ",
      plan.columns, ", for ", name_of(DtypeOf<T>::value), " and ", kRanks, " ranks it is ", Tile::kRows, " x ",
      Tile::kColumns);
  STD_TORCH_CHECK(
      plan.stages >= 2 && plan.stages <= kSkinnyMostStages, "stages is ", plan.stages, ", expected 2 to ",
      kSkinnyMostStages);
  STD_TORCH_CHECK(
      plan.share >= 1 && plan.share < INT64_C(1) << 30, "share is ", plan.share, ", expected 1 to 1073741823");
  STD_TORCH_CHECK(
      plan.chunk >= 1 && plan.chunk < INT64_C(1) << 30, "chunk is ", plan.chunk, ", expected 1 to 1073741823");
  const auto blocks = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
  const int64_t row_tiles = blocks(p.rows, Tile::kRows), column_tiles = blocks(p.columns, Tile::kColumns);
  constexpr bool kAlong = kKind == Skinny::kShrink;
  int64_t across = kAlong ? row_tiles : column_tiles;
  const int64_t shares = std::max<int64_t>(blocks(kAlong ? column_tiles : row_tiles, plan.share), 1);
  const int64_t rank_blocks = blocks(p.r, kRanks);
  if (kKind == Skinny::kBackward) across = std::max<int64_t>(across, 1);  // of no columns ds is 0
  if (across == 0 || rank_blocks == 0) return;
  STD_TORCH_CHECK(
      across < INT64_C(1) << 31 && shares <= 65535 && rank_blocks <= 65535, name, " would take a grid of ", across,
      " x ", shares, " x ", rank_blocks, " CTAs, at most 2147483647 x 65535 x 65535 can be launched");

  // Scratch: parts of S, of D, of the bias; counters of S and of D.
  const int64_t parts_of_s = kKind == Skinny::kReduce ? 1 : kAlong ? shares : across;
  const int64_t parts_of_d = kAlong ? 1 : shares;
  const int64_t of_s = parts_of_s > 1 ? rank_blocks * parts_of_s * row_tiles * Tile::kRows * kRanks : 0;
  const int64_t of_d =
      parts_of_d > 1 && p.D != nullptr ? rank_blocks * parts_of_d * across * Tile::kColumns * kRanks : 0;
  const int64_t of_bias =
      parts_of_d > 1 && p.bias != nullptr ? parts_of_d * across * (Tile::kColumns / 128) * kSkinnyThreads * 2 : 0;
  const int64_t chunks = kKind == Skinny::kBackward ? blocks(plan.share, plan.chunk) : 1;
  const int64_t counted = (kKind == Skinny::kReduce ? 0 : rank_blocks * (kAlong ? across : shares * chunks)) +
                          (kAlong ? 0 : rank_blocks * across);
  auto* parts =
      static_cast<float*>(check_scratch("partials", partials, ScalarType::Float, of_s + of_d + of_bias, device));
  p.S_parts = parts;
  p.D_parts = parts + of_s;
  p.bias_parts = parts + of_s + of_d;
  p.counters = static_cast<uint32_t*>(
      check_scratch("counters", counters, ScalarType::Int, of_s > 0 || parts_of_d > 1 ? counted : 0, device));
  p.share = static_cast<int32_t>(plan.share);
  p.chunk = static_cast<int32_t>(plan.chunk);
  p.stages = static_cast<int32_t>(plan.stages);
  const dim3 grid(
      static_cast<unsigned>(across), static_cast<unsigned>(shares), static_cast<unsigned>(rank_blocks));
  const OnDevice on(device);
  launch(
      name, skinny_kernel<T, kKind, kRanks>, grid, kSkinnyThreads,
      static_cast<size_t>(Tile::shared(static_cast<int>(plan.stages))), on, p);
}

template <Skinny kKind>
void launch_skinny(
    const char* name, const Tensor& x, SkinnyParams& p, const SkinnyPlan& plan,
    const std::optional<Tensor>& partials, const std::optional<Tensor>& counters, const OneDevice& device) {
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const bool there = with_ranks<T, kKind>(plan.ranks, [&](auto ranks) {
      launch_instance<T, kKind, decltype(ranks)::value>(name, p, plan, partials, counters, device);
    });
    STD_TORCH_CHECK(
        there, name, " has no kernel of ", plan.ranks, " ranks for ", name_of(DtypeOf<T>::value),
        ", there are 16, 32, 64",
        DtypeOf<T>::value == Dtype::bfloat16 && kKind != Skinny::kBackward ? " and 128" : "");
  });
}

}  // namespace lorafast::cuda
