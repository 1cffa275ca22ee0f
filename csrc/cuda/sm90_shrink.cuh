// What helpers of a layer's forward do before they take tiles: row blocks of s = x·Aᵀ, in bfloat16.
//
// They go through the ring of the GEMM: the factor beside x is A. A row block's flag counts the two warpgroups that have
// stored their rows; those who write the factors of a tile wait for it. Helpers wait for nobody before the queue of row
// blocks is empty, so every flag is raised, whatever starts first.
#pragma once

#include "counters.cuh"
#include "sm90.cuh"

namespace lorafast::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// kRanks: of A's tile.
template <int kRanks>
struct ShrinkFirst {
  static constexpr bool kAny = true;
  static constexpr int kWriterRegisters = 40;
  struct State {
    bool asked = false, helps = false;
    uint32_t next = 0;
  };

  template <class Cta>
  static __device__ __forceinline__ int draw(const Cta& cta, State& state) {
    const Sm90Params& p = cta.p;
    if (!state.asked) {
      state.asked = true;
      state.helps = ptx::add_relaxed(p.counters + kSm90Tickets, 1) < static_cast<uint32_t>(p.helpers);
      if (state.helps) state.next = ptx::add_relaxed(p.counters + kSm90Items, 1);
    }
    if (!state.helps || state.next >= static_cast<uint32_t>(p.row_sets)) return -1;
    const int item = static_cast<int>(state.next);
    state.next = ptx::add_relaxed(p.counters + kSm90Items, 1);
    return item;
  }

  template <class Cta>
  static __device__ __forceinline__ void load(const Cta& cta, typename Cta::Ring& ring, int item) {
    using Tile = typename Cta::Tile;
    const Sm90Params& p = cta.p;
    ptx::fetch_map(&p.a);
    const int row = cta.row_block(item) * Tile::kM;
    for (int k = 0; k < p.k_steps; ++k, ring.next()) {
      cta.open(ring, Tile::kX + kRanks * kSm90Row);
      ptx::copy_box(cta.stage(ring), &p.x, k * Tile::kK, row, cta.full(ring));
      ptx::copy_box(cta.stage(ring) + Tile::kX, &p.a, k * Tile::kK, 0, cta.full(ring));
    }
  }

  template <class Cta>
  static __device__ __forceinline__ void write(const Cta& cta, typename Cta::Ring& ring, uint32_t&, int) {
    cta.skip(ring);
  }

  template <class Cta>
  static __device__ __forceinline__ void multiply(const Cta& cta, typename Cta::Ring& ring, int item, int half) {
    using T = bfloat16;
    const Sm90Params& p = cta.p;
    float d[kRanks / 8][4];
    uint32_t held = 0;
    cta.template multiply<false, false>(d, ring, held, half);
    ptx::wait_for_products<0>();
    cta.release(held);
    ptx::hold(d);
    const int row_block = cta.row_block(item);
    const int64_t row =
        static_cast<int64_t>(row_block) * Cta::Tile::kM + half * 64 + cta.warp % 4 * 16 + cta.lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row + 8 * h >= p.M) break;
      T* const to = static_cast<T*>(p.made_s) + (row + 8 * h) * p.r;
#pragma unroll
      for (int j = 0; j < kRanks / 8; ++j) {
        const int rank = 8 * j + 2 * (cta.lane % 4);
        if (p.r % 2 == 0) {
          if (rank < p.r) *reinterpret_cast<uint32_t*>(to + rank) = pack_two<T>(d[j][2 * h], d[j][2 * h + 1]);
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (rank + e < p.r) to[rank + e] = from_float<T>(d[j][2 * h + e]);
          }
        }
      }
    }
    ptx::meet(1 + half, 128);
    if (threadIdx.x % 128 == 0 && row_block < p.row_tiles) {
      ptx::add_acquire_release(p.counters + kSm90Flags + row_block, 1);
    }
  }

  // Nothing is left to do when there are no more tiles.
  template <class Cta>
  static __device__ __forceinline__ int draw_behind(const Cta&, State&) {
    return -1;
  }

  // Counters: behind those of every launch a flag for each row block.
  template <class Cta>
  static __device__ __forceinline__ int used(const Cta& cta) {
    return kSm90Flags + cta.p.row_tiles;
  }

  // A row block of s.
  template <class Cta>
  static __device__ __forceinline__ void wait_for(const Cta& cta, int row_block) {
    wait_for_count(cta.p.counters + kSm90Flags + row_block, 2);
  }
};

#endif

}  // namespace lorafast::cuda
