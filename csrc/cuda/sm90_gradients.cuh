// What CTAs of a layer's backward do beside tiles of dx = dy·W + ds·A: before them helpers make ds = scaling · dy·B and
// parts of dB = scaling · dyᵀ·s, in one pass over dy; after them all make parts of dA = dsᵀ·x, and add up parts.
//
// Both sums over rows are a Sm90Sum, columnsᵀ·factor: a group of row blocks and a range of columns are an item, whose sums
// stay in registers. An item walks down its row blocks and, in each, along its range, in steps of the GEMM's ring: two
// boxes of the large matrix by TMA, 64 columns for each warpgroup, and beside dy the rows of B that belong to its columns.
// The rows of the narrow factor of a row block, s or ds, lie where tiles stage y, which are done by then.
//
// A range leaves its part of ds in float32, by warps, 16 rows each: the last one to come adds the parts in order and
// raises the row block's flag, which counts eight warps. Items before tiles wait for nobody, and whoever waits draws its
// ticket later than a helper, so every flag is raised, whatever starts first. What comes after tiles is taken from one
// queue, in an order in which each waits only for what was taken before it.
//
// All that waits for a counter is the writers', who are counted as finished after that: the counters are set back when
// nobody reads them, and every count was waited for in full, so that nobody adds to them.
#pragma once

#include "counters.cuh"
#include "sm90.cuh"
#include "wgmma_narrow.cuh"

namespace lorafast::cuda {

// D [columns, r] = scale · matrixᵀ·factor, matrix [M, columns], factor [M, r] of bfloat16.
struct Sm90Sum {
  Factor factor;
  void* to;
  float* parts;  // of each group of row blocks
  int64_t to_column, to_rank;
  int32_t columns, steps;            // of 128 columns
  int32_t ranges, groups, of_group;  // ranges of columns, groups of so many row blocks
  float scale;
  Dtype type;
  bool wanted;

  // Items of the queue in which a cluster adds up parts, a step of 128 columns each CTA.
  __host__ __device__ int pieces(int cluster) const { return wanted ? (steps + cluster - 1) / cluster : 0; }
  // Items in which it makes them: each CTA has a group, below each other.
  __host__ __device__ int items(int cluster) const { return (groups + cluster - 1) / cluster * ranges; }
};

struct Sm90BackwardParams
    : Sm90Params {  // x is dy, w is W across, y is dx, s is ds and b is Aᵀ; a is the layer's x
  Sm90Sum dB, dA;
  float* ds_parts;  // null if there is but one range
  Factor lora_B;
  float scaling;
};

// Places of the counters behind the flags of row blocks.
struct Sm90BackwardCounters {
  int32_t arrived, dB, dA, queue, used;

  __host__ __device__ Sm90BackwardCounters(int32_t row_tiles, int32_t ranges_dB, int32_t ranges_dA)
      : arrived(kSm90Flags + row_tiles),
        dB(arrived + 8 * row_tiles),
        dA(dB + ranges_dB),
        queue(dA + ranges_dA),
        used(queue + 1) {}
};

// Steps of a range: its sums take 128 registers of a thread.
template <int kRanks>
constexpr int kSm90Range = 256 / kRanks;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// kRanks: 16, 32 or 64, of which r are there.
template <int kRanks>
struct Gradients {
  static constexpr bool kAny = true;
  static constexpr int kWriterRegisters = 56;
  static constexpr int kRow = 2 * kRanks, kChunks = kRow / 16;  // of a narrow factor in shared memory
  static constexpr int kSteps = kSm90Range<kRanks>, kTiles = kRanks / 8;
  static constexpr int kColumns = 128, kWarps = 8;
  // Barriers of threads: a factor's buffer is written, or read; two of each. Parts can be added up. The two warpgroups
  // have read the last factor.
  static constexpr int kWritten = 4, kRead = 6, kAdd = 8, kAll = kSm90Writers + 256, kEnd = 9;

  struct State {
    bool asked = false, helps = false, behind = false;
    uint32_t next = 0;
  };

  // Row blocks and steps of an item. Both CTAs of a cluster go through as many; some of the second one's may be below the
  // last row block, or all: they are zeros that leave nothing.
  struct Item {
    int row, rows, step, steps, group, range;

    __device__ __forceinline__ Item(const Sm90Sum& of, const Sm90Params& p, int item, int rank) {
      const int first = item / of.ranges * p.cluster;
      group = first + rank, range = item % of.ranges;
      row = group * of.of_group, step = range * kSteps;
      rows = min(of.of_group, p.row_tiles - first * of.of_group), steps = min(kSteps, of.steps - step);
    }
  };

  template <class Cta>
  static __device__ __forceinline__ const Sm90BackwardParams& params(const Cta& cta) {
    return static_cast<const Sm90BackwardParams&>(cta.p);
  }
  static __device__ __forceinline__ Sm90BackwardCounters counters(const Sm90BackwardParams& p) {
    return {p.row_tiles, p.dB.ranges, p.dA.ranges};
  }
  static __device__ __forceinline__ int ahead(const Sm90BackwardParams& p) { return p.dB.items(p.cluster); }
  static __device__ __forceinline__ int behind(const Sm90BackwardParams& p) {
    return p.dA.wanted ? p.dA.items(p.cluster) : 0;
  }

  // Numbers of items: ahead, behind, then the pieces of dB and of dA.
  enum Kind { kAhead, kBehind, kAddB, kAddA };
  static __device__ __forceinline__ Kind kind_of(const Sm90BackwardParams& p, int& item) {
    if (item < ahead(p)) return kAhead;
    if ((item -= ahead(p)) < behind(p)) return kBehind;
    if ((item -= behind(p)) < p.dB.pieces(p.cluster)) return kAddB;
    item -= p.dB.pieces(p.cluster);
    return kAddA;
  }

  template <class Cta>
  static __device__ __forceinline__ int used(const Cta& cta) {
    return counters(params(cta)).used;
  }

  // ---- The loading thread

  template <class Cta>
  static __device__ __forceinline__ int draw(const Cta& cta, State& state) {
    const Sm90BackwardParams& p = params(cta);
    if (!state.asked) {
      state.asked = true;
      state.helps = ptx::add_relaxed(p.counters + kSm90Tickets, 1) < static_cast<uint32_t>(p.helpers);
      if (state.helps) state.next = ptx::add_relaxed(p.counters + kSm90Items, 1);
    }
    if (!state.helps || state.next >= static_cast<uint32_t>(ahead(p))) return -1;
    const int item = static_cast<int>(state.next);
    state.next = ptx::add_relaxed(p.counters + kSm90Items, 1);
    return item;
  }

  // When there are no more tiles.
  template <class Cta>
  static __device__ __forceinline__ int draw_behind(const Cta& cta, State& state) {
    const Sm90BackwardParams& p = params(cta);
    const int left = behind(p) + p.dB.pieces(p.cluster) + p.dA.pieces(p.cluster);
    if (left == 0) return -1;
    uint32_t* const queue = p.counters + counters(p).queue;
    if (!state.behind) {
      state.behind = true;
      state.next = ptx::add_relaxed(queue, 1);
    }
    if (state.next >= static_cast<uint32_t>(left)) return -1;
    const int item = ahead(p) + static_cast<int>(state.next);
    state.next = ptx::add_relaxed(queue, 1);
    return item;
  }

  template <class Cta>
  static __device__ __forceinline__ void load(const Cta& cta, typename Cta::Ring& ring, int item) {
    using Tile = typename Cta::Tile;
    static_assert(2 * Tile::kX + kColumns * kRow <= Tile::kStage, "two boxes and B");
    const Sm90BackwardParams& p = params(cta);
    const Kind kind = kind_of(p, item);
    if (kind > kBehind) {  // an empty stage: who has taken it knows that this thread has read its mail
      cta.open(ring, 0);
      ring.next();
      return;
    }
    const Item at(kind == kAhead ? p.dB : p.dA, p, item, cta.rank);
    const CUtensorMap* const map = kind == kAhead ? &p.x : &p.a;
#pragma unroll 1
    for (int row = 0; row < at.rows; ++row) {
#pragma unroll 1
      for (int step = 0; step < at.steps; ++step, ring.next()) {
        if (kind == kAhead) share(cta, ring, 2 * Tile::kX);
        else cta.open(ring, 2 * Tile::kX);
#pragma unroll
        for (int box = 0; box < 2; ++box) {
          ptx::copy_box(
              cta.stage(ring) + box * Tile::kX, map, (at.step + step) * kColumns + 64 * box,
              (at.row + row) * Tile::kM, cta.full(ring));
        }
      }
    }
  }

  // Opens a stage of which those who write factors fill the rest. They arrive in place of this thread.
  template <class Cta>
  static __device__ __forceinline__ void share(const Cta& cta, const typename Cta::Ring& ring, uint32_t bytes) {
    ptx::wait_at(cta.empty(ring), ring.parity ^ 1);
    ptx::expect_at(cta.full(ring), bytes);
    ptx::arrive_at(cta.granted(ring));
  }

  // ---- Those who write factors

  // 128 rows of a narrow factor. Copies may be under way when it returns.
  static __device__ __forceinline__ void put(uint32_t tile, const Factor& from, int64_t first, int thread) {
    const FactorBlock<kSm90Writers, kChunks, true> block{first, 0, 128, thread};
    const auto place = [&](int row, int chunk) {
      return tile + row * kRow + 16 * (chunk ^ ptx::swizzle_of<kRow>(row));
    };
    if (from.vector && from.type == Dtype::bfloat16) {
      block.template copy<bfloat16>(from, place);
    } else {
      block.template load<bfloat16, 3>(from, RoundedChunk<bfloat16>(), [&](int row, int chunk, uint4 v) {
        ptx::store_shared_16(place(row, chunk), v);
      });
    }
    ptx::commit_copies();
  }

  // What was put is there, but for the last kLeft times.
  template <int kLeft>
  static __device__ __forceinline__ void publish() {
    ptx::wait_for_copies<kLeft>();
    ptx::publish_shared();
    ptx::meet(kSm90WritersMeet, kSm90Writers);
  }

  // B of a step is under way while that of the next one is asked for.
  template <class Cta>
  static __device__ __forceinline__ void write(
      const Cta& cta, typename Cta::Ring& ring, uint32_t& parities, int item) {
    using Tile = typename Cta::Tile;
    const Sm90BackwardParams& p = params(cta);
    const int thread = static_cast<int>(threadIdx.x) - 32;
    const Kind kind = kind_of(p, item);
    const Sm90BackwardCounters at_counters = counters(p);
    if (kind > kBehind) {
      ring.next();
      const Sm90Sum& of = kind == kAddB ? p.dB : p.dA;
      const uint32_t* const stored = p.counters + (kind == kAddB ? at_counters.dB : at_counters.dA);
      const int step = p.cluster * item + cta.rank;
      if (step >= of.steps) return;
      if (thread == 0) wait_for_count(stored + step / kSteps, kWarps * static_cast<uint32_t>(of.groups));
      __syncwarp();
      ptx::meet(kAdd, kAll);
      return;
    }
    const Sm90Sum& of = kind == kAhead ? p.dB : p.dA;
    const Item at(of, p, item, cta.rank);
    for (int i = 0; i < at.rows; ++i) {
      const int64_t top = static_cast<int64_t>(at.row + i) * Tile::kM;
      if (of.wanted) {
        const int buffer = i % 2;
        ptx::meet(kRead + buffer, kAll);
        if (kind == kBehind) {
          if (thread == 0 && at.row + i < p.row_tiles) wait_for(cta, at.row + i);
          ptx::meet(kSm90WritersMeet, kSm90Writers);
        }
        put(cta.shared + Tile::kPieces + buffer * 128 * kRow, of.factor, top, thread);
        ptx::wait_for_copies<0>();
        ptx::publish_shared();
        ptx::arrive_for(kWritten + buffer, kAll);
      }
      if (kind == kBehind) {
        ring.at = (ring.at + static_cast<uint32_t>(at.steps)) % Tile::kStages;
        continue;
      }
      uint32_t before = 0;
      for (int step = 0; step < at.steps; ++step, ring.next()) {
        cta.wait_for_grant(ring, parities);
        put(cta.stage(ring) + 2 * Tile::kX, p.lora_B, static_cast<int64_t>(at.step + step) * kColumns, thread);
        if (step > 0) {
          publish<1>();
          if (thread == 0) ptx::arrive_at(before);
        }
        before = cta.full(ring);
      }
      publish<0>();
      if (thread == 0) ptx::arrive_at(before);
    }
  }

  // A row block of ds.
  template <class Cta>
  static __device__ __forceinline__ void wait_for(const Cta& cta, int row_block) {
    wait_for_count(cta.p.counters + kSm90Flags + row_block, kWarps);
  }

  // ---- Those who multiply

  template <class Cta>
  static __device__ __forceinline__ void multiply(const Cta& cta, typename Cta::Ring& ring, int item, int half) {
    const Sm90BackwardParams& p = params(cta);
    const Kind kind = kind_of(p, item);
    const Sm90BackwardCounters at = counters(p);
    if (kind > kBehind) add(cta, ring, kind == kAddB ? p.dB : p.dA, p.cluster * item + cta.rank);
    else if (kind == kBehind) accumulate<false>(cta, ring, p.dA, p.counters + at.dA, item, half);
    else if (p.dB.wanted) accumulate<true>(cta, ring, p.dB, p.counters + at.dB, item, half);
    else make_ds(cta, ring, p.dB, item, half);
  }

  // Products of a step of ds: 64 rows of dy, 128 columns along.
  template <class Cta>
  static __device__ __forceinline__ void multiply_along(
      const Cta&, float (&d)[kTiles][4], uint32_t stage, int half, int adds) {
    using Tile = typename Cta::Tile;
    const uint64_t a = ptx::describe_rows(stage + half * Tile::kHalf);
    const uint64_t b = ptx::describe_narrow<kRow>(stage + 2 * Tile::kX);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      ptx::multiply_narrow<0>(d, a + k / 4 * (Tile::kX / 16) + 2 * (k % 4), b + k * kRow, adds);
      adds = 1;
    }
  }

  // The products of a stage end, and it is given back.
  template <class Cta>
  static __device__ __forceinline__ void end_step(const Cta& cta, typename Cta::Ring& ring) {
    ptx::commit_products();
    ptx::wait_for_products<0>();
    uint32_t held = cta.empty(ring);
    cta.release(held);
    ring.next();
  }

  // An item without a sum over rows.
  template <class Cta>
  static __device__ __forceinline__ void make_ds(
      const Cta& cta, typename Cta::Ring& ring, const Sm90Sum& of, int item, int half) {
    const Item at(of, cta.p, item, cta.rank);
#pragma unroll 1
    for (int i = 0; i < at.rows; ++i) {
      float d[kTiles][4];
#pragma unroll 1
      for (int step = 0; step < at.steps; ++step) {
        ptx::wait_at(cta.full(ring), ring.parity);
        ptx::begin_products();
        multiply_along(cta, d, cta.stage(ring), half, step > 0);
        end_step(cta, ring);
      }
      ptx::hold(d);
      leave_ds(cta, d, at.row + i, at.range);
    }
  }

  // An item's sums over rows and, before tiles, its ds.
  template <bool kWithDs, class Cta>
  static __device__ __forceinline__ void accumulate(
      const Cta& cta, typename Cta::Ring& ring, const Sm90Sum& of, uint32_t* stored, int item, int half) {
    using Tile = typename Cta::Tile;
    const Item at(of, cta.p, item, cta.rank);
    float sums[kSteps][kTiles][4];
#pragma unroll
    for (int i = 0; i < kSteps * kTiles * 4; ++i) (&sums[0][0][0])[i] = 0.0f;
    if (threadIdx.x % 128 == 0) ptx::wait_until_read<0>();  // y's pieces
    __syncwarp();
    ptx::arrive_for(kRead, kAll);
    if (at.rows > 1) ptx::arrive_for(kRead + 1, kAll);
#pragma unroll 1
    for (int i = 0; i < at.rows; ++i) {
      const int buffer = i % 2;
      float d[kTiles][4];
      ptx::meet(kWritten + buffer, kAll);
      const uint64_t factor = ptx::describe_narrow<kRow>(cta.shared + Tile::kPieces + buffer * 128 * kRow);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step < at.steps) {
          ptx::wait_at(cta.full(ring), ring.parity);
          const uint32_t stage = cta.stage(ring);
          const uint64_t a = ptx::describe_columns<Tile::kM>(stage + half * Tile::kX);
          ptx::begin_products();
          if constexpr (kWithDs) multiply_along(cta, d, stage, half, step > 0);
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            ptx::multiply_narrow<1>(sums[step], a + 128 * k, factor + k * kRow, 1);
          }
          end_step(cta, ring);
        }
      }
      if (i + 2 < at.rows) ptx::arrive_for(kRead + buffer, kAll);
      if constexpr (kWithDs) {
        ptx::hold(d);
        leave_ds(cta, d, at.row + i, at.range);
      }
    }
    ptx::meet(kEnd, 256);  // then y may be where it was
    if (at.group >= of.groups) return;
    const int warp = cta.warp - 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step < at.steps) {
        ptx::hold(sums[step]);
        store_part(of.parts + part_at(at.group * of.steps + at.step + step, warp, cta.lane), sums[step]);
      }
    }
    __syncwarp();
    if (cta.lane == 0) ptx::add_acquire_release(stored + at.range, 1);
  }

  // Where a warp's part of 128 rows or columns begins, of this lane, four numbers for each eight ranks.
  static __device__ __forceinline__ int64_t part_at(int64_t block, int warp, int lane) {
    return ((block * kWarps + warp) * kTiles * 32 + lane) * 4;
  }

  static __device__ __forceinline__ void store_part(float* to, const float (&d)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      *reinterpret_cast<float4*>(to + 128 * j) = make_float4(d[j][0], d[j][1], d[j][2], d[j][3]);
    }
  }

  // d += the part, or it is that.
  static __device__ __forceinline__ void add_part(float (&d)[kTiles][4], const float* from, bool first) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float4 v = *reinterpret_cast<const float4*>(from + 128 * j);
      d[j][0] = first ? v.x : d[j][0] + v.x;
      d[j][1] = first ? v.y : d[j][1] + v.y;
      d[j][2] = first ? v.z : d[j][2] + v.z;
      d[j][3] = first ? v.w : d[j][3] + v.w;
    }
  }

  // A warp's 16 rows of ds, of a range of dy's columns.
  template <class Cta>
  static __device__ __forceinline__ void leave_ds(
      const Cta& cta, float (&d)[kTiles][4], int row_block, int range) {
    const Sm90BackwardParams& p = params(cta);
    if (row_block >= p.row_tiles) return;
    const int warp = cta.warp - 4, ranges = p.dB.ranges;
    if (p.ds_parts != nullptr) {
      store_part(p.ds_parts + part_at(range * p.row_tiles + row_block, warp, cta.lane), d);
      __syncwarp();
      uint32_t* const arrived = p.counters + counters(p).arrived + row_block * kWarps + warp;
      uint32_t before = 0;
      if (cta.lane == 0) before = ptx::add_acquire_release(arrived, 1);
      if (__shfl_sync(0xFFFFFFFFu, before, 0) != static_cast<uint32_t>(ranges) - 1) return;
      __syncwarp();  // what lane 0 acquired
#pragma unroll 1
      for (int i = 0; i < ranges; ++i) {
        add_part(d, p.ds_parts + part_at(i * p.row_tiles + row_block, warp, cta.lane), i == 0);
      }
    }
    const int64_t row = static_cast<int64_t>(row_block) * 128 + warp * 16 + cta.lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row + 8 * h >= p.M) break;
      bfloat16* const to = static_cast<bfloat16*>(p.made_s) + (row + 8 * h) * kRanks;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int rank = 8 * j + 2 * (cta.lane % 4);
        // A rank that there isn't would be NaN where dy is infinite.
        const float low = rank < p.r ? d[j][2 * h] * p.scaling : 0.0f;
        const float high = rank + 1 < p.r ? d[j][2 * h + 1] * p.scaling : 0.0f;
        *reinterpret_cast<uint32_t*>(to + rank) = pack_two<bfloat16>(low, high);
      }
    }
    __syncwarp();
    if (cta.lane == 0) ptx::add_acquire_release(p.counters + kSm90Flags + row_block, 1);
  }

  // Adds up the parts of 128 columns, in the order of row blocks.
  template <class Cta>
  static __device__ __forceinline__ void add(
      const Cta& cta, typename Cta::Ring& ring, const Sm90Sum& of, int step) {
    ptx::wait_at(cta.full(ring), ring.parity);
    uint32_t held = cta.empty(ring);
    cta.release(held);
    ring.next();
    if (step >= of.steps) return;
    const int warp = cta.warp - 4;
    float d[kTiles][4];
    ptx::meet(kAdd, kAll);
#pragma unroll 1
    for (int group = 0; group < of.groups; ++group) {
      add_part(d, of.parts + part_at(group * of.steps + step, warp, cta.lane), group == 0);
    }
    store(cta, of, d, step);
  }

  // Of 128 columns of the large matrix a warp has 16.
  template <class Cta>
  static __device__ __forceinline__ void store(
      const Cta& cta, const Sm90Sum& of, const float (&d)[kTiles][4], int step) {
    const int r = cta.p.r;
    const int64_t column = static_cast<int64_t>(step) * kColumns + (cta.warp - 4) * 16 + cta.lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (column + 8 * h >= of.columns) break;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int rank = 8 * j + 2 * (cta.lane % 4) + e;
          const int64_t to = (column + 8 * h) * of.to_column + rank * of.to_rank;
          if (rank < r) store_as(of.to, to, d[j][2 * h + e] * of.scale, of.type);
        }
      }
    }
  }
};

#endif

}  // namespace lorafast::cuda
