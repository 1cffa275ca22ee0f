// A tile's way to shared memory before sm_80, where there is no cp.async: through registers. They are loaded while the
// tile before is multiplied, and are what a second stage of a ring would be.
#pragma once

#include "skinny_tile.cuh"

namespace lorafast::cuda {

// What a thread has of a tile: chunks of 16 bytes of X and, beside it, of P or Q. Beside float16 those are eights along
// the sum of a rank, which it puts there in parts.
template <class T, Skinny kKind, int kRanks>
struct SkinnyHeld {
  // As it was loaded: of 16 bits the first half alone.
  struct Eight {
    uint4 words[2];
    bool narrow;
  };

  using Loads = SkinnyLoads<T, kKind, kRanks>;
  using Tile = typename Loads::Tile;
  using Factor = typename Loads::Factor;
  static constexpr int kRows = Loads::kRows, kColumns = Loads::kColumns, kSize = Loads::kSize;
  static constexpr int kChunk = Loads::kChunk, kChunks = Loads::kChunks, kStep = Loads::kStep;
  static constexpr int kOf16 = 16 / static_cast<int>(sizeof(Factor));
  static constexpr bool kSplit = Loads::kSplit;
  static constexpr int kAlong = kKind == Skinny::kShrink ? kColumns : kRows;  // the sum
  static constexpr int kBeside = kAlong * kRanks / (kSplit ? 8 : kOf16);
  static constexpr int kEach = (kBeside + kSkinnyThreads - 1) / kSkinnyThreads;

  uint4 x[kRows / kStep], beside[kSplit ? 1 : kEach];
  Eight eights[kSplit ? kEach : 1];

  __device__ __forceinline__ void fetch_x(const Loads& of, int64_t row0, int64_t column0) {
    const SkinnyParams& p = of.p;
    const int64_t column = column0 + of.thread % kChunks * kChunk, row = row0 + of.thread / kChunks;
    const char* from = static_cast<const char*>(p.x) + (row * p.x_row + column * p.x_column) * kSize;
    if (p.x_direct && row0 + kRows <= p.rows && column0 + kColumns <= p.columns) {
#pragma unroll
      for (int i = 0; i < kRows / kStep; ++i) {
        x[i] = ptx::load_constant(from);
        from += kStep * p.x_row * kSize;
      }
      return;
    }
    const int64_t columns_left = p.columns - column, rows_left = p.rows - row;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      x[i] = make_uint4(0, 0, 0, 0);
      if (i * kStep < rows_left) x[i] = chunk_of(from, p.x_column, columns_left, p.x_direct);
      from += kStep * p.x_row * kSize;
    }
  }

  // The first `left` of kChunk elements of X, then zeros. `direct`: 16 bytes at such an address.
  static __device__ __forceinline__ uint4 chunk_of(const char* from, int64_t apart, int64_t left, bool direct) {
    if (direct && left >= kChunk) return ptx::load_constant(from);
    T v[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      v[j] = j < left ? reinterpret_cast<const T*>(from)[j * apart] : from_float<T>(0.0f);
    return *reinterpret_cast<const uint4*>(v);
  }

  // Whether there is a float16 that isn't finite.
  __device__ __forceinline__ bool put_x(const Loads& of, char* stage) const {
    char* to = stage + of.thread / kChunks * Tile::kXPitch + of.thread % kChunks * 16;
    uint32_t special = 0;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      *reinterpret_cast<uint4*>(to + i * kStep * Tile::kXPitch) = x[i];
      if constexpr (kSplit)
        special |= sm75::not_finite(x[i].x) | sm75::not_finite(x[i].y) | sm75::not_finite(x[i].z) |
                   sm75::not_finite(x[i].w);
    }
    return special != 0;
  }

  // The rank and the place along the sum of eight i. Neighbouring threads take neighbours in memory.
  template <bool kOfP>
  static __device__ __forceinline__ int2 place_of(const Loads& of, int i) {
    constexpr int kEights = (kOfP ? kColumns : kRows) / 8;
    if (kOfP && of.p.p_rank != 1) return make_int2(i / kEights, i % kEights);
    return make_int2(i % kRanks, i / kRanks);
  }

  // Eight i: of P from a column on, of Q from a row. Of P eight neighbours in memory wait for nothing.
  template <bool kOfP>
  static __device__ __forceinline__ void fetch_eight(Eight& to, const Loads& of, int64_t first, int i) {
    const SkinnyParams& p = of.p;
    const int2 place = place_of<kOfP>(of, i);
    const int64_t rank = of.rank0 + place.x, from = first + place.y * 8;
    to.narrow = false;
    if (kOfP && p.p_column == 1 && rank < p.r && from + 8 <= p.columns) {
      const bool narrow = p.p_dtype != Dtype::float32;
      const char* at = static_cast<const char*>(p.p) + (rank * p.p_rank + from) * (narrow ? 2 : 4);
      if (reinterpret_cast<uintptr_t>(at) % 16 == 0) {
        to.words[0] = ptx::load_constant(at);
        if (!narrow) to.words[1] = ptx::load_constant(at + 16);
        to.narrow = narrow;
        return;
      }
    }
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = of.template factor<kOfP>(rank, from + j);
    to.words[0] = *reinterpret_cast<const uint4*>(v);
    to.words[1] = *reinterpret_cast<const uint4*>(v + 4);
  }

  // Whether its parts aren't all of it.
  template <bool kOfP>
  static __device__ __forceinline__ bool put_eight(const Eight& eight, const Loads& of, char* to, int i) {
    using Split = SplitTile<kRanks, kOfP ? kColumns : kRows>;
    float v[8];
    const uint32_t words[8] = {eight.words[0].x, eight.words[0].y, eight.words[0].z, eight.words[0].w,
                               eight.words[1].x, eight.words[1].y, eight.words[1].z, eight.words[1].w};
    if (!eight.narrow) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = __uint_as_float(words[j]);
    } else {
      const bool bf16 = of.p.p_dtype == Dtype::bfloat16;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&words[j]));
        v[2 * j] = bf16 ? __uint_as_float(words[j] << 16) : both.x;
        v[2 * j + 1] = bf16 ? __uint_as_float(words[j] & 0xFFFF0000u) : both.y;
      }
    }
    const sm75::Split parts = sm75::split(v);
    const int2 place = place_of<kOfP>(of, i);
    auto* at = reinterpret_cast<uint4*>(to + place.x * Split::kPitch + place.y * 16);
    at[0] = parts.high;
    at[Split::kPlane / 16] = parts.low;
    at[2 * Split::kPlane / 16] = parts.last;
    reinterpret_cast<float*>(to + Split::kInverses)[place.y * kRanks + place.x] = parts.inverse;
    return parts.inverse < 0.0f;
  }

  template <bool kOfP>
  __device__ __forceinline__ void fetch_eights(const Loads& of, int64_t first) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = of.thread + i * kSkinnyThreads;
      if (at < kBeside) fetch_eight<kOfP>(eights[i], of, first, at);
    }
  }

  __device__ __forceinline__ bool put_eights(const Loads& of, char* to) const {
    bool left = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = of.thread + i * kSkinnyThreads;
      if (at < kBeside) left = put_eight<kKind == Skinny::kShrink>(eights[i], of, to, at) || left;
    }
    return left;
  }

  // P of kBackward, which stays for all tiles. Whether its parts aren't all of it.
  static __device__ __forceinline__ bool split_p(const Loads& of, char* to, int64_t column0) {
    bool left = false;
#pragma unroll 1
    for (int i = of.thread; i < kRanks * (kColumns / 8); i += kSkinnyThreads) {
      Eight eight;
      fetch_eight<true>(eight, of, column0, i);
      left = put_eight<true>(eight, of, to, i) || left;
    }
    return left;
  }

  // Where chunk i of P lies in its tile: the rank, and the chunk of that. Neighbouring threads take neighbours in
  // memory.
  static __device__ __forceinline__ int2 place_in_p(const Loads& of, int i) {
    constexpr int kPerRank = kColumns / kOf16;
    return of.p.p_rank == 1 ? make_int2(i % kRanks, i / kRanks) : make_int2(i / kPerRank, i % kPerRank);
  }

  __device__ __forceinline__ void fetch_p(const Loads& of, int64_t column0) {
    const SkinnyParams& p = of.p;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int2 at = place_in_p(of, of.thread + i * kSkinnyThreads);
      const int64_t rank = of.rank0 + at.x;
      const int64_t column = column0 + at.y * kOf16;
      const int64_t left = at.x < kRanks && rank < p.r ? p.columns - column : 0;
      const int64_t offset = rank * p.p_rank + column * p.p_column;
      if (p.p_direct && left >= kOf16) {
        beside[i] = ptx::load_constant(static_cast<const Factor*>(p.p) + offset);
        continue;
      }
      float v[kOf16];
#pragma unroll
      for (int j = 0; j < kOf16; ++j)
        v[j] = j < left ? load_as_float(p.p, offset + j * p.p_column, p.p_dtype) : 0.0f;
      beside[i] =
          make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
    }
  }

  __device__ __forceinline__ void put_p(const Loads& of, char* to) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int2 at = place_in_p(of, of.thread + i * kSkinnyThreads);
      if (at.x < kRanks && at.y < kColumns / kOf16)
        *reinterpret_cast<uint4*>(to + at.x * Tile::kPPitch + at.y * 16) = beside[i];
    }
  }

  __device__ __forceinline__ void fetch_q(const Loads& of, int64_t row0) {
    constexpr int kPerRow = kRanks / kOf16;
    const SkinnyParams& p = of.p;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = of.thread + i * kSkinnyThreads;
      const int64_t row = row0 + at / kPerRow, rank = of.rank0 + at % kPerRow * kOf16;
      const int64_t left = at < kBeside && row < p.rows ? p.r - rank : 0;
      const Factor* from = static_cast<const Factor*>(p.q) + row * p.q_row + rank * p.q_rank;
      if (p.q_direct && left >= kOf16) {
        beside[i] = ptx::load_constant(from);
        continue;
      }
      Factor v[kOf16];
#pragma unroll
      for (int j = 0; j < kOf16; ++j) v[j] = j < left ? from[j * p.q_rank] : from_float<Factor>(0.0f);
      beside[i] = *reinterpret_cast<const uint4*>(v);
    }
  }

  __device__ __forceinline__ void put_q(const Loads& of, char* to) const {
    constexpr int kPerRow = kRanks / kOf16;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = of.thread + i * kSkinnyThreads;
      if (at < kBeside)
        *reinterpret_cast<uint4*>(to + at / kPerRow * Tile::kQPitch + at % kPerRow * 16) = beside[i];
    }
  }
};

}  // namespace lorafast::cuda
