// A tile of a skinny operation in shared memory, and how it comes there: X through a ring of cp.async stages, P or Q
// with it.
//
// Rows of tiles are 16 bytes longer than the data: an odd number of chunks, so that ldmatrix finds eight rows in
// different banks, plain or transposed, and addresses are constants.
#pragma once

#include <type_traits>

#include "numbers.cuh"
#include "philox.cuh"
#include "ptx.cuh"
#include "skinny_products.cuh"

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

// P or Q in parts, of kAlong neighbours along the sum: three planes [kRanks, kAlong] of float16, then the scales' inverses
// [kAlong / 8, kRanks] (sm75.cuh).
template <int kRanks, int kAlong>
struct SplitTile {
  static constexpr int kPitch = 2 * kAlong + kSkinnyPad, kPlane = kRanks * kPitch, kInverses = 3 * kPlane;
  static constexpr int kBytes = kInverses + kAlong / 8 * kRanks * 4;
};

// The tile of an instance, and what of shared memory it takes. `kSplit`: P and Q come in parts, as those beside float16
// do on sm_75.
template <class T, Skinny kKind, int kRanks, bool kSplit>
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
  static constexpr int kX = kRows * kXPitch;
  static constexpr int kP = kSplit ? SplitTile<kRanks, kColumns>::kBytes : kRanks * kPPitch;
  static constexpr int kQ = kSplit ? SplitTile<kRanks, kRows>::kBytes : kRows * kQPitch;
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

  static constexpr int kLeast = kKind == Skinny::kShrink && kStage < kCross ? kCross : kBefore + kStage;

  static constexpr int shared(int stages) {
    const int ring = stages * kStage;
    return kKind == Skinny::kShrink && ring < kCross ? kCross : kBefore + ring;
  }
};

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

// Tiles into shared memory, by all threads of a CTA. What lies outside the matrices is 0.
template <class T, Skinny kKind, int kRanks>
struct SkinnyLoads {
  static constexpr bool kSplit = !kSm80 && DtypeOf<T>::value == Dtype::float16;
  using Tile = SkinnyTile<T, kKind, kRanks, kSplit>;
  using Factor = Beside<T>;
  using Product = Products<T>;
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kChunk = 16 / kSize;               // elements of 16 bytes
  static constexpr int kChunks = kColumns / kChunk;       // of a row
  static constexpr int kStep = kSkinnyThreads / kChunks;  // rows between two chunks of a thread
  static_assert(kSkinnyThreads % kChunks == 0 && kRows % kStep == 0, "no whole steps");

  const SkinnyParams& p;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.z) * kRanks;
  uint64_t seed = 0;

  __device__ explicit SkinnyLoads(const SkinnyParams& params) : p(params) {
    if (p.dropout.seed != nullptr) seed = static_cast<uint64_t>(*p.dropout.seed);
  }

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

  // An element of P in a column, or of Q in a row; 0 outside.
  template <bool kOfP>
  __device__ __forceinline__ float factor(int64_t rank, int64_t at) const {
    if (rank >= p.r || at >= (kOfP ? p.columns : p.rows)) return 0.0f;
    if constexpr (kOfP) return load_as_float(p.p, rank * p.p_rank + at * p.p_column, p.p_dtype);
    else return static_cast<const float*>(p.q)[at * p.q_row + rank * p.q_rank];
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
};

}  // namespace lorafast::cuda
