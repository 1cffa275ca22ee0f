// The factors of a low-rank term as wgmma multiplies them, written by warps that have nothing else to do: s along the
// ranks, B along them or, where W lies across k, across them.
//
// float16 has a float32 s. It is multiplied as TF32, in two products, three beside a float32 B: in as many steps.
#pragma once

#include "factors.cuh"
#include "sm90_ring.cuh"

namespace lorafast::cuda {

// How the low-rank term of y in T is multiplied: 128 bytes of ranks a step.
template <class T>
using Sm90Factor = std::conditional_t<DtypeOf<T>::value == Dtype::bfloat16, bfloat16, float>;
template <class T>
constexpr int kSm90Ranks = kSm90Row / static_cast<int>(sizeof(Sm90Factor<T>));
// TF32 lies along k.
template <class T, bool kAcross>
constexpr bool kSm90RanksAcross = kAcross && std::is_same_v<Sm90Factor<T>, bfloat16>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kSm90Writers = 96, kSm90WritersMeet = 3;  // threads, and the barrier at which they meet

// A chunk of TF32's parts. The last part is the nearest numbers, those before it have one factor's rest; there the
// other factor is 0 where it is infinite: the last part says it all.
struct Sm90Tf32Chunk {
  float scale;
  bool rest, last;  // which of the two numbers; `last`: infinite too

  __device__ __forceinline__ uint4 operator()(const float (&v)[4]) const {
    return make_uint4(one(v[0]), one(v[1]), one(v[2]), one(v[3]));
  }
  __device__ __forceinline__ uint32_t one(float x) const {
    const Tf32Pair of = split_tf32(x * scale);
    if (rest) return of.low;
    return last || fabsf(__uint_as_float(of.high)) < __uint_as_float(0x7F800000u) ? of.high : 0u;
  }
};

// Those of tiles of y in T, of kN columns. A stage has rows of 128 bytes: of s, and behind it those of B [kN] or, where
// they lie across, blocks of 64 columns, each of all ranks.
template <class T, bool kAcross, int kN>
struct Sm90Factors {
  using Element = Sm90Factor<T>;
  using Tile = Sm90Tile<kN>;
  static constexpr int kElements = kChunk / static_cast<int>(sizeof(Element));
  static constexpr bool kRanksAcross = kSm90RanksAcross<T, kAcross>, kSplit = sizeof(Element) == 4;
  static constexpr int kBatch = kSplit ? 3 : 2;  // chunks that a thread has in registers

  const Sm90Params& p;

  // Products of 32 bytes of ranks, from `rank` on to the end of its step.
  __device__ __forceinline__ int products(int rank) const {
    const int left = p.r - rank, of = left < kSm90Ranks<T> ? left : kSm90Ranks<T>;
    return (of + 2 * kElements - 1) / (2 * kElements);
  }

  static __device__ __forceinline__ uint32_t place(uint32_t rows, int row, int chunk) {
    return rows + row * kSm90Row + kChunk * swizzled<kSm90Row>(row, chunk);
  }

  // B's ranks from `rank` on, for columns from `column` on. It may return while copies are on their way.
  __device__ __forceinline__ void write_b(uint32_t stage, int thread, int column, int rank, int part) const {
    if constexpr (kRanksAcross) {
      const FactorBlock<kSm90Writers, kN / 8, true> block{rank, column, 16 * products(rank), thread};
      lay(block, p.b, 1.0f, part != 0, part,
          [&](int row, int chunk) { return place(stage + Tile::kX + chunk / 8 * Tile::kHalf, row, chunk % 8); });
    } else {
      const FactorBlock<kSm90Writers, kN, false> block{column, rank, 2 * products(rank), thread};
      lay(block, p.b, 1.0f, part != 0, part,
          [&](int row, int chunk) { return place(stage + Tile::kX, row, chunk); });
    }
  }

  // Ranks of scaling · s from `rank` on, of rows from `row` on.
  __device__ __forceinline__ void write_s(uint32_t stage, int thread, int row, int rank, int part) const {
    const FactorBlock<kSm90Writers, Tile::kM, false> block{row, rank, 2 * products(rank), thread};
    lay(block, p.s, p.factor_scale, part == 0, part, [&](int row, int chunk) { return place(stage, row, chunk); });
  }

  template <class Block, class Address>
  __device__ __forceinline__ void lay(
      const Block& block, const Factor& f, float scale, bool rest, int part, const Address& address) const {
    const auto put = [&](int row, int chunk, uint4 v) { ptx::store_shared_16(address(row, chunk), v); };
    if constexpr (kSplit) {
      const bool last = part == p.parts - 1;
      const Sm90Tf32Chunk rounded{scale, rest && !last, last};
      block.template load<Element, kBatch>(f, rounded, put);
    } else if (f.vector && f.type == DtypeOf<Element>::value) {
      block.template copy<Element>(f, address);
      if (scale == 1.0f) return;
      ptx::commit_copies();
      ptx::wait_for_copies<0>();
      const RoundedChunk<Element> rounded{scale};
#pragma unroll 1
      for (int i = block.thread; i < block.count(); i += kSm90Writers) {
        const uint32_t at = address(block.row_of(i), block.chunk_of(i));
        const uint4 v = ptx::load_shared_16(at);
        const auto* const of = reinterpret_cast<const Element*>(&v);
        float x[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = to_float(of[e]);
        ptx::store_shared_16(at, rounded(x));
      }
    } else {
      block.template load<Element, kBatch>(f, RoundedChunk<Element>{scale}, put);
    }
  }
};

#endif

}  // namespace lorafast::cuda
