// A CTA of the GEMMs of sm_90a: its parameters, its shared memory, and how its warps hand over stages and tiles
// (sm90.cuh says who does what).
//
// A cluster has one CTA or two. Two have tiles below each other: the columns of both are the same, and so is W's box, of
// which each loads one half to both.
//
// Barriers of the ring: `full` when a stage has arrived, `empty` when all warps that multiply have read it, eight in
// each CTA: a copy to both needs both stages. Whoever waits for a stage alone, by the parity of its turn, must never be
// a turn off: the loading thread waits for each one and grants a stage of factors to those who write it, by `granted`.
// What there is to do goes round in two mail slots. CTA 0, the leader, sends it to its cluster: `posted`, and `taken`,
// the leader's, when all are done with it. A tile's bias is there when its first ranks are, in shared memory of the
// slot. A loading thread isn't counted as a reader of mail: those that are take what it has loaded.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "bias.cuh"
#include "factors.cuh"
#include "numbers.cuh"
#include "philox.cuh"
#include "tile_order.cuh"
#include "tma.cuh"

namespace lorafast::cuda {

struct Sm90Params {
  CUtensorMap x, w, y, a;
  Factor s;   // [M, r] of bfloat16 for y in it, else of float32
  Factor b;   // [N, r], or [r, N] where ranks lie across
  Bias bias;  // none without ranks
  uint32_t* counters;
  Dropout dropout;
  int32_t M, N, r;
  int32_t k_steps, rank_steps;  // of the ring
  int32_t row_tiles, column_tiles;
  int32_t cluster;     // CTAs
  int32_t row_sets;    // of a cluster's row blocks; the last one's may lie below x
  int32_t group;       // sets whose tiles run together
  int32_t parts;       // steps of the same ranks
  float factor_scale;  // of s
  float sum_scale;     // of the masked term
  void* made_s;        // by helpers: what `s` reads, contiguous
  int32_t helpers;     // clusters that make it
};

constexpr int kSm90Threads = 384;
constexpr int kSm90Row = 128;  // bytes of a row in shared memory

// Slots of the counters. With helpers a flag for each row block follows.
enum { kSm90Tiles, kSm90Finished, kSm90Tickets, kSm90Items, kSm90Flags };

template <int kN_>
struct Sm90Tile {
  static constexpr int kM = 128, kN = kN_, kK = 64;
  static constexpr int kStages = kN == 256 ? 4 : 6;
  static constexpr int kX = kM * kSm90Row, kStage = kX + kN * kSm90Row;
  static constexpr int kHalf = 64 * kSm90Row;  // rows of a warpgroup
  // In shared memory: the ring; two pieces of y a warpgroup, of 64 columns; two slots of bias; barriers; mail.
  static constexpr int kPieces = kStages * kStage, kBias = kPieces + 4 * kHalf, kBarriers = kBias + 2 * kN * 4;
  static constexpr int kFull = kBarriers, kEmpty = kFull + 8 * kStages, kGranted = kEmpty + 8 * kStages;
  static constexpr int kPosted = kGranted + 8 * kStages;
  static constexpr int kTaken = kPosted + 16, kMail = kTaken + 16;
  static constexpr int kShared = kMail + 16;
  static_assert(kShared <= 232448, "more than an SM has");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A place in a ring of so many, and the parity of the turn.
template <int kCount>
struct Turn {
  uint32_t at = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++at == kCount) at = 0, parity ^= 1;
  }
};

// What a cluster is to do: tiles, `row` is their set of row blocks and `column` the first column; or kHelp in its place,
// and `row` is an item of helpers' work; or kEnd, there is no more.
struct Sm90Work {
  static constexpr int kEnd = -1, kHelp = -2;

  int row, column;
};

// What a thread of such a CTA knows, whatever it does.
template <int kN>
struct Sm90Ring {
  using Tile = Sm90Tile<kN>;
  using Ring = Turn<Tile::kStages>;
  using Mail = Turn<2>;

  const Sm90Params& p;
  unsigned char* const memory;
  const uint32_t shared;
  const int warp, lane;
  const int rank;  // in the cluster
  const bool masked;

  __device__ Sm90Ring(const Sm90Params& params, unsigned char* from)
      : p(params),
        memory(from),
        shared(ptx::shared_address(from)),
        warp(__shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0)),
        lane(static_cast<int>(threadIdx.x % 32)),
        rank(static_cast<int>(ptx::cluster_rank())),
        masked(params.dropout.seed != nullptr) {}

  __device__ __forceinline__ uint32_t stage(const Ring& ring) const { return shared + ring.at * Tile::kStage; }
  __device__ __forceinline__ uint32_t full(const Ring& ring) const { return shared + Tile::kFull + 8 * ring.at; }
  __device__ __forceinline__ uint32_t empty(const Ring& ring) const { return shared + Tile::kEmpty + 8 * ring.at; }
  __device__ __forceinline__ uint32_t granted(const Ring& ring) const {
    return shared + Tile::kGranted + 8 * ring.at;
  }
  __device__ __forceinline__ uint32_t posted(const Mail& mail) const {
    return shared + Tile::kPosted + 8 * mail.at;
  }
  __device__ __forceinline__ uint32_t taken(const Mail& mail) const { return shared + Tile::kTaken + 8 * mail.at; }
  __device__ __forceinline__ float* bias(const Mail& mail) const {
    return reinterpret_cast<float*>(memory + Tile::kBias) + mail.at * kN;
  }
  // This CTA's one of a set of row blocks.
  __device__ __forceinline__ int row_block(int set) const { return p.cluster * set + rank; }

  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Tile::kStages; ++i) {
        ptx::init_barrier(shared + Tile::kFull + 8 * i, 1);
        ptx::init_barrier(shared + Tile::kEmpty + 8 * i, 8 * p.cluster);
        ptx::init_barrier(shared + Tile::kGranted + 8 * i, 1);
      }
      for (int i = 0; i < 2; ++i) {
        ptx::init_barrier(shared + Tile::kPosted + 8 * i, 1);
        ptx::init_barrier(shared + Tile::kTaken + 8 * i, (8 + 3) * p.cluster);
      }
      ptx::publish_barriers();
    }
    ptx::meet_cluster();
  }

  // Nobody leaves while others of the cluster can still arrive at its barriers.
  __device__ __forceinline__ void leave() const {
    __syncwarp();
    ptx::meet_cluster();
  }

  __device__ __forceinline__ Sm90Work read_mail(const Mail& mail) const {
    ptx::wait_at(posted(mail), mail.parity);
    const int2 work = *reinterpret_cast<const int2*>(memory + Tile::kMail + 8 * mail.at);
    return {work.x, work.y};
  }

  // A warp is done with what was in the slot.
  __device__ __forceinline__ void give_back(const Mail& mail) const {
    __syncwarp();
    if (lane == 0) ptx::arrive_in_cluster(ptx::in_cta(taken(mail), 0));
  }

  // ---- What the loading thread does.

  // Waits until a stage is empty, and promises that so many bytes will be there, also those that the other CTA copies.
  __device__ __forceinline__ void open(const Ring& ring, uint32_t bytes) const {
    ptx::wait_at(empty(ring), ring.parity ^ 1);
    ptx::arrive_and_expect(full(ring), bytes);
  }

  // Grants so many stages to those who write factors.
  __device__ __forceinline__ void grant(Ring& ring, int steps) const {
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ring.next()) {
      ptx::wait_at(empty(ring), ring.parity ^ 1);
      ptx::arrive_at(granted(ring));
    }
  }

  // The leader's alone.
  __device__ __forceinline__ void post(const Mail& mail, const Sm90Work& work) const {
    ptx::wait_at(taken(mail), mail.parity ^ 1);
    const uint32_t slot = shared + Tile::kMail + 8 * mail.at;
#pragma unroll 1
    for (int to = 0; to < p.cluster; ++to) {
      ptx::send_two(ptx::in_cta(slot, to), work.row, work.column, ptx::in_cta(posted(mail), to));
    }
  }

  // ---- What the warps that multiply do.

  // The stage that one holds is read: each CTA of the cluster is told.
  __device__ __forceinline__ void release(uint32_t& held) const {
    if (held != 0 && lane < p.cluster) ptx::arrive_in_cluster(ptx::in_cta(held, lane));
    held = 0;
  }
};

#endif

}  // namespace lorafast::cuda
