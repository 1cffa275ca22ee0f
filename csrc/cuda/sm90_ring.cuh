// A CTA of the GEMMs of sm_90a: its parameters, its shared memory, and how its warps hand over stages and tiles
// (sm90.cuh says who does what).
//
// Barriers of the ring: `full` when a stage has arrived, `empty` when all eight warps that multiply have read it.
// Whoever waits for a stage alone, by the parity of its turn, must never be a turn off: the loading thread waits
// for each one and grants a stage of factors to those who write it, by `granted`. A tile's number goes round in two
// mail slots: `posted`, and `taken` when a tile is done with. Its bias is there when its first ranks are, in shared
// memory of the slot.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "factors.cuh"
#include "numbers.cuh"
#include "philox.cuh"
#include "tma.cuh"

namespace lorafast::cuda {

struct Sm90Params {
  CUtensorMap x, w, y, a;
  Factor s;          // [M, r] of bfloat16 for y in it, else of float32
  Factor b;          // [N, r], or [r, N] where ranks lie across
  const void* bias;  // [N] or null, as without ranks
  uint32_t* counters;
  Dropout dropout;
  int64_t bias_stride;
  int32_t M, N, r;
  int32_t k_steps, rank_steps;  // of the ring
  int32_t row_tiles, column_tiles;
  int32_t group;       // row blocks whose tiles run together
  int32_t parts;       // steps of the same ranks
  float factor_scale;  // of s
  float sum_scale;     // of the masked term
  Dtype bias_type;
  void* made_s;     // by helpers: what `s` reads, contiguous
  int32_t helpers;  // that make it
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
  static constexpr int kShared = kMail + 8;
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

// Tiles come in groups of row blocks, so that those which run together share tiles of W in the L2 cache.
struct TileAt {
  int row, column;  // its first ones

  __device__ __forceinline__ TileAt(const Sm90Params& p, int tile, int rows, int columns) {
    const int size = p.group * p.column_tiles, first = tile / size * p.group, inside = tile % size;
    const int left = p.row_tiles - first, of = left < p.group ? left : p.group;
    row = (first + inside % of) * rows;
    column = inside / of * columns;
  }
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
  const bool masked;

  __device__ Sm90Ring(const Sm90Params& params, unsigned char* from)
      : p(params),
        memory(from),
        shared(ptx::shared_address(from)),
        warp(__shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0)),
        lane(static_cast<int>(threadIdx.x % 32)),
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
  __device__ __forceinline__ int* slot(const Mail& mail) const {
    return reinterpret_cast<int*>(memory + Tile::kMail) + mail.at;
  }

  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Tile::kStages; ++i) {
        ptx::init_barrier(shared + Tile::kFull + 8 * i, 1);
        ptx::init_barrier(shared + Tile::kEmpty + 8 * i, 8);
        ptx::init_barrier(shared + Tile::kGranted + 8 * i, 1);
      }
      for (int i = 0; i < 2; ++i) {
        ptx::init_barrier(shared + Tile::kPosted + 8 * i, 1);
        ptx::init_barrier(shared + Tile::kTaken + 8 * i, 8 + 3);
      }
      ptx::publish_barriers();
    }
    __syncthreads();
  }

  // The tile in the slot; -1: there are no more; below that a row block of s, kFirstItem less its number.
  static constexpr int kFirstItem = -2;
  __device__ __forceinline__ int read_mail(const Mail& mail) const {
    ptx::wait_at(posted(mail), mail.parity);
    return *slot(mail);
  }

  // ---- What the loading thread does.

  // Waits until a stage is empty, and promises that so many bytes will be there.
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

  __device__ __forceinline__ void post(Mail& mail, int what) const {
    ptx::wait_at(taken(mail), mail.parity ^ 1);
    *slot(mail) = what;
    ptx::arrive_at(posted(mail));
    mail.next();
  }

  // ---- What the warps that multiply do.

  // The stage that one holds is read.
  __device__ __forceinline__ void release(uint32_t& held) const {
    if (held != 0 && lane == 0) ptx::arrive_at(held);
    held = 0;
  }
};

#endif

}  // namespace lorafast::cuda
