// The persistent GEMM of sm_90a, whose warps have work of their own: y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias, and,
// where helpers make s beside it, s = x·Aᵀ.
//
// A CTA has three warpgroups. The first one's warp 0 takes tiles of y from a queue and loads x and W by TMA,
// the other three write the factors of the low-rank term. Two more multiply, 64 rows of the tile each. All hand
// over stages of a ring in shared memory: its steps are the K blocks of a tile and, in the same form, its rank
// blocks. They are the last steps, so that nothing waits for s; under a mask, which falls on the low-rank term
// alone, they are the first, the sums are masked, and the GEMM adds to them.
//
// Barriers of the ring: `full` when a stage has arrived, `empty` when all eight warps that multiply have read it.
// Whoever waits for a stage alone, by the parity of its turn, must never be a turn off: the loading thread waits
// for each one and grants a stage of ranks to those who write it, by `granted`. A tile's number goes round in two
// mail slots: `posted`, and `taken` when a tile is done with. Its bias is there when its first ranks are, in shared
// memory of the slot.
//
// float16 has a float32 s. It is multiplied as TF32, in two products, three beside a float32 B: in as many steps.
//
// Helpers are the CTAs that draw the first tickets. Before they take tiles they take row blocks of s, which go
// through the same ring: the factor beside x is A. A row block's flag counts the two warpgroups that have stored
// their rows; those who write the factors of a tile wait for it. Helpers wait for nobody before the queue of row
// blocks is empty, so every flag is raised, whatever starts first.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "counters.cuh"
#include "numbers.cuh"
#include "philox.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace lorafast::cuda {

struct Sm90Params {
  CUtensorMap x, w, y, a;
  void* s;           // [M, r] of bfloat16 for y in it, else of float32
  const void* b;     // [N, r]
  const void* bias;  // [N] or null, as without ranks
  uint32_t* counters;
  Dropout dropout;
  int64_t s_row, s_col, b_row, b_col, bias_stride;
  int32_t M, N, r;
  int32_t k_steps, rank_steps;  // of the ring
  int32_t row_tiles, column_tiles;
  int32_t group;       // row blocks whose tiles run together
  int32_t parts;       // steps of the same ranks
  float factor_scale;  // of B, of s where that is float32
  float sum_scale;     // of the masked term
  Dtype b_type, bias_type;
  bool vector_s, vector_b;  // rows of whole 16 bytes, aligned, of the dtype that is multiplied
  int32_t helpers;          // that make s, which is contiguous
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

// How the low-rank term of y in T is multiplied: 128 bytes of ranks a step.
template <class T>
using Sm90Factor = std::conditional_t<DtypeOf<T>::value == Dtype::bfloat16, bfloat16, float>;
template <class T>
constexpr int kSm90Ranks = kSm90Row / static_cast<int>(sizeof(Sm90Factor<T>));

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

// kAcross: rows of W lie across k, as those of Wᵀ do. kHelperRanks: with helpers, those of A's tile, else 0.
template <class T, bool kAcross, int kN, int kHelperRanks = 0>
struct Sm90Cta {
  using Tile = Sm90Tile<kN>;
  using Factor = Sm90Factor<T>;
  using Ring = Turn<Tile::kStages>;
  using Mail = Turn<2>;
  static constexpr int kSums = kN / 2;
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(Factor));  // ranks
  static constexpr int kWriters = 96, kWritersMeet = 3;

  const Sm90Params& p;
  unsigned char* const memory;
  const uint32_t shared;
  const int warp, lane;
  const bool masked;

  __device__ Sm90Cta(const Sm90Params& params, unsigned char* from)
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

  // ---- One thread takes tiles and loads x and W.

  __device__ __forceinline__ void load() const {
    ptx::fetch_map(&p.x);
    ptx::fetch_map(&p.w);
    ptx::fetch_map(&p.y);
    Ring ring;
    Mail mail;
    if constexpr (kHelperRanks > 0) load_items(ring, mail);
    const uint32_t tiles = static_cast<uint32_t>(p.row_tiles * p.column_tiles);
    uint32_t tile = ptx::add_relaxed(p.counters + kSm90Tiles, 1);
    for (;;) {
      post(mail, tile < tiles ? static_cast<int>(tile) : -1);
      if (tile >= tiles) return;
      const TileAt at(p, static_cast<int>(tile), Tile::kM, kN);
      tile = ptx::add_relaxed(p.counters + kSm90Tiles, 1);  // is there when this tile is loaded
      if (masked) grant(ring);
      for (int k = 0; k < p.k_steps; ++k, ring.next()) {
        ptx::wait_at(empty(ring), ring.parity ^ 1);
        ptx::arrive_and_expect(full(ring), Tile::kStage);
        ptx::copy_box(stage(ring), &p.x, k * Tile::kK, at.row, full(ring));
        const uint32_t w = stage(ring) + Tile::kX;
        if constexpr (kAcross) {
#pragma unroll
          for (int i = 0; i < kN / 64; ++i) {
            ptx::copy_box(w + i * Tile::kHalf, &p.w, at.column + 64 * i, k * Tile::kK, full(ring));
          }
        } else {
          ptx::copy_box(w, &p.w, k * Tile::kK, at.column, full(ring));
        }
      }
      if (!masked) grant(ring);
    }
  }

  __device__ __forceinline__ void post(Mail& mail, int what) const {
    ptx::wait_at(taken(mail), mail.parity ^ 1);
    *slot(mail) = what;
    ptx::arrive_at(posted(mail));
    mail.next();
  }

  // A helper's row blocks.
  __device__ __forceinline__ void load_items(Ring& ring, Mail& mail) const {
    const uint32_t items = static_cast<uint32_t>(p.row_tiles);
    if (ptx::add_relaxed(p.counters + kSm90Tickets, 1) >= static_cast<uint32_t>(p.helpers)) return;
    ptx::fetch_map(&p.a);
    uint32_t item = ptx::add_relaxed(p.counters + kSm90Items, 1);
    while (item < items) {
      post(mail, kFirstItem - static_cast<int>(item));
      const int row = static_cast<int>(item) * Tile::kM;
      item = ptx::add_relaxed(p.counters + kSm90Items, 1);
      for (int k = 0; k < p.k_steps; ++k, ring.next()) {
        ptx::wait_at(empty(ring), ring.parity ^ 1);
        ptx::arrive_and_expect(full(ring), Tile::kX + kHelperRanks * kSm90Row);
        ptx::copy_box(stage(ring), &p.x, k * Tile::kK, row, full(ring));
        ptx::copy_box(stage(ring) + Tile::kX, &p.a, k * Tile::kK, 0, full(ring));
      }
    }
  }

  __device__ __forceinline__ void grant(Ring& ring) const {
    for (int step = 0; step < p.rank_steps; ++step, ring.next()) {
      ptx::wait_at(empty(ring), ring.parity ^ 1);
      ptx::arrive_at(granted(ring));
    }
  }

  // ---- Three warps write bias and the factors of the low-rank term.

  __device__ __forceinline__ void write() const {
    const int thread = static_cast<int>(threadIdx.x) - 32;
    Ring ring;              // its parity means nothing here
    uint32_t parities = 0;  // of each stage's next grant, a bit a stage
    Mail mail;
    for (;; mail.next()) {
      const int tile = read_mail(mail);
      if (tile == -1) break;
      if (kHelperRanks > 0 && tile < 0) {
        ring.at = (ring.at + static_cast<uint32_t>(p.k_steps)) % Tile::kStages;
        __syncwarp();
        if (lane == 0) ptx::arrive_at(taken(mail));
        continue;
      }
      const TileAt at(p, tile, Tile::kM, kN);
      if (p.bias != nullptr) {
        for (int i = thread; i < kN; i += kWriters) {
          const int64_t n = at.column + i;
          bias(mail)[i] = n < p.N ? load_as_float(p.bias, n * p.bias_stride, p.bias_type) : 0.0f;
        }
      }
      if (!masked) ring.at = (ring.at + static_cast<uint32_t>(p.k_steps)) % Tile::kStages;
      for (int step = 0; step < p.rank_steps; ++step, ring.next()) {
        const int rank = step / p.parts * kSm90Ranks<T>, part = step % p.parts;
        ptx::wait_at(granted(ring), parities >> ring.at & 1);
        parities ^= 1u << ring.at;
        const int chunks = 2 * substeps(rank);
        for (int i = thread; i < chunks * kN; i += kWriters) {
          const int row = i % kN, chunk = i / kN;
          put(stage(ring) + Tile::kX, row, chunk, b_chunk(at.column + row, rank + chunk * kChunk, part));
        }
        if (kHelperRanks > 0 && step == 0) {
          if (thread == 0) wait_for_count(p.counters + kSm90Flags + at.row / Tile::kM, 2);
          ptx::meet(kWritersMeet, kWriters);
        }
        for (int i = thread; i < chunks * Tile::kM; i += kWriters) {
          const int row = i % Tile::kM, chunk = i / Tile::kM;
          put(stage(ring), row, chunk, s_chunk(at.row + row, rank + chunk * kChunk, part));
        }
        ptx::publish_shared();
        ptx::meet(kWritersMeet, kWriters);
        if (thread == 0) ptx::arrive_at(full(ring));
      }
      if (masked) ring.at = (ring.at + static_cast<uint32_t>(p.k_steps)) % Tile::kStages;
      __syncwarp();
      if (lane == 0) ptx::arrive_at(taken(mail));
    }
    // The last CTA leaves the counters as it found them. Its own writers are here: nobody waits for a flag.
    if (warp != 1) return;
    uint32_t before = 0;
    if (lane == 0) before = ptx::add_acquire_release(p.counters + kSm90Finished, 1);
    if (__shfl_sync(0xFFFFFFFFu, before, 0) != gridDim.x - 1) return;
    __syncwarp();  // what lane 0 acquired
    const int used = kSm90Flags + (kHelperRanks > 0 ? p.row_tiles : 0);
    for (int i = lane; i < used; i += 32) p.counters[i] = 0;
  }

  // Products of 32 bytes of ranks, from `rank` on to the end of its step.
  __device__ __forceinline__ int substeps(int rank) const {
    const int left = p.r - rank, of = left < kSm90Ranks<T> ? left : kSm90Ranks<T>;
    return (of + 2 * kChunk - 1) / (2 * kChunk);
  }

  static __device__ __forceinline__ void put(uint32_t tile, int row, int chunk, uint4 v) {
    ptx::store_shared_16(tile + row * kSm90Row + 16 * (chunk ^ (row & 7)), v);
  }

  // 16 bytes of s and of B. Ranks that there aren't are 0. Of TF32 the last part is the nearest numbers, those before it
  // have one factor's rest; there the other factor is 0 where it is infinite: the last part says it all.
  __device__ __forceinline__ uint4 s_chunk(int64_t row, int rank, int part) const {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row >= p.M || rank >= p.r) return v;
    if constexpr (std::is_same_v<Factor, bfloat16>) {
      const auto* const from = static_cast<const uint16_t*>(p.s) + row * p.s_row;
      if (p.vector_s) return *reinterpret_cast<const uint4*>(from + rank);
      uint32_t* const words = &v.x;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (rank + i < p.r) words[i / 2] |= static_cast<uint32_t>(from[(rank + i) * p.s_col]) << (16 * (i % 2));
      }
    } else {
      const auto* const from = static_cast<const float*>(p.s) + row * p.s_row;
      uint32_t* const words = &v.x;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (rank + i >= p.r) break;
        const Tf32Pair of = split_tf32(from[(rank + i) * p.s_col] * p.factor_scale);
        words[i] = part == 0 ? of.low : part == p.parts - 1 ? of.high : finite(of.high);
      }
    }
    return v;
  }

  __device__ __forceinline__ uint4 b_chunk(int64_t column, int rank, int part) const {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (column >= p.N || rank >= p.r) return v;
    uint32_t* const words = &v.x;
    if constexpr (std::is_same_v<Factor, bfloat16>) {
      if (p.vector_b) {
        v = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.b) + column * p.b_row + rank);
        if (p.factor_scale == 1.0f) return v;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = two(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xFFFF0000u));
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = two(b_at(column, rank + 2 * i), b_at(column, rank + 2 * i + 1));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const Tf32Pair of = split_tf32(b_at(column, rank + i));
        words[i] = part == p.parts - 1 ? of.high : part == 0 ? finite(of.high) : of.low;
      }
    }
    return v;
  }

  __device__ __forceinline__ float b_at(int64_t column, int rank) const {
    return rank < p.r ? load_as_float(p.b, column * p.b_row + rank * p.b_col, p.b_type) : 0.0f;
  }

  __device__ __forceinline__ uint32_t two(float low, float high) const {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low * p.factor_scale, high * p.factor_scale);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }

  static __device__ __forceinline__ uint32_t finite(uint32_t x) {
    return fabsf(__uint_as_float(x)) < __uint_as_float(0x7F800000u) ? x : 0u;
  }

  // ---- Two warpgroups multiply.

  __device__ __forceinline__ void release(uint32_t& held) const {
    if (held != 0 && lane == 0) ptx::arrive_at(held);
    held = 0;
  }

  // The K blocks of the GEMM, or of a row block of s. Of the last one `held` is the stage, which is not released yet.
  template <bool across, int kCount>
  __device__ __forceinline__ void multiply(
      float (&d)[kCount], Ring& ring, uint32_t& held, int adds, int half) const {
    for (int k = 0; k < p.k_steps; ++k, ring.next()) {
      ptx::wait_at(full(ring), ring.parity);
      const uint64_t a = ptx::describe_rows(stage(ring) + half * Tile::kHalf);
      const uint64_t b = across ? ptx::describe_columns<Tile::kK>(stage(ring) + Tile::kX)
                                : ptx::describe_rows(stage(ring) + Tile::kX);
      ptx::begin_products();
#pragma unroll
      for (int i = 0; i < Tile::kK / 16; ++i) {
        ptx::multiply_add<T, across>(d, a + 2 * i, b + (across ? 128 : 2) * i, adds);
        adds = 1;
      }
      ptx::commit_products();
      ptx::wait_for_products<1>();
      release(held);
      held = empty(ring);
    }
  }

  // Those of the low-rank term, and the end of all that was begun.
  __device__ __forceinline__ void multiply_ranks(
      float (&d)[kSums], Ring& ring, uint32_t& held, int adds, int half) const {
    if constexpr (!std::is_same_v<Factor, T>) {
      ptx::wait_for_products<0>();  // products of another shape add to the same sums
      release(held);
    }
    for (int step = 0; step < p.rank_steps; ++step, ring.next()) {
      ptx::wait_at(full(ring), ring.parity);
      const uint64_t a = ptx::describe_rows(stage(ring) + half * Tile::kHalf);
      const uint64_t b = ptx::describe_rows(stage(ring) + Tile::kX);
      const int count = substeps(step / p.parts * kSm90Ranks<T>);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        ptx::begin_products();
        ptx::multiply_add<Factor, 0>(d, a + 2 * i, b + 2 * i, adds);
        ptx::commit_products();
        adds = 1;
      }
      ptx::wait_for_products<1>();  // at most the last group of this step is left
      release(held);
      held = empty(ring);
    }
    ptx::wait_for_products<0>();
    release(held);
    ptx::hold(d);
  }

  // Scales the sums, and sets to 0 what the mask drops. `row`: of d[0]. A call of Philox is for eight columns, which four
  // lanes share: each makes every fourth one of them and keeps its bits.
  __device__ __forceinline__ void drop(float (&d)[kSums], int64_t row, int column) const {
    constexpr int kWords = kN / 128;
    const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
    const int t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        uint32_t own = 0;
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const int64_t group = column / 8 + 16 * word + 4 * i + t;
          own |= keep_bits(p.dropout, seed, row + 8 * h, group) << (8 * i);
        }
#pragma unroll
        for (int other = 0; other < 4; ++other) {
          const uint32_t bits = __shfl_sync(0xFFFFFFFFu, own, other, 4) >> (2 * t);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = 16 * word + 4 * i + other;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& sum = d[4 * j + 2 * h + e];
              sum = (bits >> (8 * i + e) & 1) != 0 ? sum * p.sum_scale : 0.0f;
            }
          }
        }
      }
    }
  }

  // y leaves in pieces of 64 columns; while TMA writes one the next is made.
  __device__ __forceinline__ void store(
      const float (&d)[kSums], const TileAt& at, int half, const Mail& mail) const {
    const bool first = threadIdx.x % 128 == 0;
    const uint32_t pieces = shared + Tile::kPieces + half * 2 * Tile::kHalf;
    const int row = (warp % 4) * 16 + (lane & 15), high = lane >> 4;  // whose address this lane gives
    const float* const added = bias(mail) + 2 * (lane % 4);
#pragma unroll
    for (int piece = 0; piece < kN / 64; ++piece) {
      const uint32_t to = pieces + piece % 2 * Tile::kHalf;
      if (first) ptx::wait_until_read<1>();
      ptx::meet(1 + half, 128);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int tile = 8 * piece + j + i;
          float2 b = make_float2(0.0f, 0.0f);
          if (p.bias != nullptr) b = *reinterpret_cast<const float2*>(added + 8 * tile);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            v[2 * i + h] = pack(d[4 * tile + 2 * h] + b.x, d[4 * tile + 2 * h + 1] + b.y);
          }
        }
        ptx::store_matrices(to + row * kSm90Row + 16 * ((j + high) ^ (row & 7)), v[0], v[1], v[2], v[3]);
      }
      ptx::publish_shared();
      ptx::meet(1 + half, 128);
      const int column = at.column + 64 * piece, top = at.row + 64 * half;
      if (first && column < p.N && top < p.M) ptx::store_box(&p.y, column, top, to);
      if (first) ptx::commit_boxes();
    }
  }

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      const __half2 pair = __floats2half2_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&pair);
    }
  }

  // A row block of s, and its flag.
  __device__ __forceinline__ void shrink(Ring& ring, int item, int half) const {
    float d[kHelperRanks / 2];
    uint32_t held = 0;
    multiply<false>(d, ring, held, 0, half);
    ptx::wait_for_products<0>();
    release(held);
    ptx::hold(d);
    const int64_t row = static_cast<int64_t>(item) * Tile::kM + half * 64 + warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row + 8 * h >= p.M) break;
      T* const to = static_cast<T*>(p.s) + (row + 8 * h) * p.r;
#pragma unroll
      for (int j = 0; j < kHelperRanks / 8; ++j) {
        const int rank = 8 * j + 2 * (lane % 4);
        if (p.r % 2 == 0) {
          if (rank < p.r) *reinterpret_cast<uint32_t*>(to + rank) = pack(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]);
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (rank + e < p.r) to[rank + e] = from_float<T>(d[4 * j + 2 * h + e]);
          }
        }
      }
    }
    ptx::meet(1 + half, 128);
    if (threadIdx.x % 128 == 0) ptx::add_acquire_release(p.counters + kSm90Flags + item, 1);
  }

  __device__ __forceinline__ void consume() const {
    const int half = warp / 4 - 1;
    Ring ring;
    Mail mail;
    float d[kSums];
    for (;; mail.next()) {
      const int tile = read_mail(mail);
      if (tile == -1) break;
      uint32_t held = 0;
      if constexpr (kHelperRanks > 0) {
        if (tile < 0) {
          shrink(ring, kFirstItem - tile, half);
          if (lane == 0) ptx::arrive_at(taken(mail));
          continue;
        }
      }
      const TileAt at(p, tile, Tile::kM, kN);
      if (masked) {
        multiply_ranks(d, ring, held, 0, half);
        drop(d, at.row + 64 * half + warp % 4 * 16 + lane / 4, at.column);
        multiply<kAcross>(d, ring, held, 1, half);
        ptx::wait_for_products<0>();
        release(held);
        ptx::hold(d);
      } else {
        multiply<kAcross>(d, ring, held, 0, half);
        multiply_ranks(d, ring, held, 1, half);
      }
      store(d, at, half, mail);
      __syncwarp();
      if (lane == 0) ptx::arrive_at(taken(mail));
    }
    if (threadIdx.x % 128 == 0) ptx::wait_until_stored();
  }

  __device__ __forceinline__ void run() const {
    init();
    if (warp < 4) {
      ptx::give_registers<40>();
      if (warp > 0) write();
      else if (lane == 0) load();
    } else {
      ptx::take_registers<232>();
      consume();
    }
  }
};

#endif

}  // namespace lorafast::cuda
