// What helpers of a layer's forward do before they take tiles: row blocks of s = drop(x)·Aᵀ, in bfloat16.
//
// They go through the ring of the GEMM. x comes by TMA. A, of any dtype and layout, is written beside it by those who
// write factors: a stage is full when they have done so and the bytes of x are there. A mask falls on x in the stage,
// by those who then multiply it.
//
// A row block's flag counts the two warpgroups that have stored their rows; those who write the factors of a tile wait
// for it. Helpers wait for nobody before the queue of row blocks is empty, so every flag is raised, whatever starts
// first.
#pragma once

#include "counters.cuh"
#include "sm90.cuh"

namespace lorafast::cuda {

// What the kernel of a layer is told beside what a GEMM is.
struct Sm90ForwardParams : Sm90Params {
  const void* lora_A;    // [r, K]
  int64_t A_row, A_col;  // bytes from one to the next
  Dtype A_type;
  int32_t K;
  bool vector_A;  // rows of neighbours at multiples of 16 bytes
  Dropout x_dropout;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A writer's part of the K blocks of A: 8 columns of every twelfth row. There are kRanks rows in shared memory. From r
// on they aren't written, and what comes of them isn't stored.
//
// It isn't a FactorBlock, which lays chunks where it loads them: here a batch is on its way from one K block to the
// next, of any layout, and the dtype is known at run time alone. As a template of it, as there, registers spill; where
// all rows are loaded as zeros instead none do, and 16 ranks take twice the instructions. Strides are bytes for the same
// reason: a Factor's, of elements, take an eighth more.
template <int kRanks>
struct Sm90FactorA {
  static constexpr int kApart = kSm90Writers / 8;  // rows
  static constexpr int kRows = (kRanks + kApart - 1) / kApart;
  static constexpr int kBatch = kRows < 4 ? kRows : 4;  // whose loads are under way at once
  static constexpr int kBatches = (kRows + kBatch - 1) / kBatch;

  struct Eight {
    uint32_t words[8];  // the bits of A: of two elements of 16 bits each, in the first four
  };

  const Sm90ForwardParams& p;
  const int chunk, row;
  Eight rows[kBatch];

  __device__ __forceinline__ Sm90FactorA(const Sm90ForwardParams& params, int thread)
      : p(params), chunk(thread % 8), row(thread / 8) {}

  // Asks for a batch of K block k. What lies outside of A is 0.
  __device__ __forceinline__ void load(int k, int batch) {
    const int column = 64 * k + 8 * chunk, first = row + batch * kBatch * kApart;
    const char* from = static_cast<const char*>(p.lora_A) + first * p.A_row + column * p.A_col;
    const bool whole = p.vector_A && column + 8 <= p.K;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kApart >= p.r) break;
      if (whole) {
        set(rows[i].words, ptx::load_constant(from));
        if (p.A_type == Dtype::float32) set(rows[i].words + 4, ptx::load_constant(from + 16));
      } else {
        gather(rows[i].words, from, p.K - column);
      }
      from += kApart * p.A_row;
    }
  }

  static __device__ __forceinline__ void set(uint32_t* words, uint4 v) {
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }

  // Of so many columns that there are.
  __device__ __forceinline__ void gather(uint32_t (&words)[8], const char* from, int columns) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = 0;
    if (p.A_type == Dtype::float32) {
#pragma unroll
      for (int i = 0; i < 8; ++i, from += p.A_col) {
        if (i < columns) words[i] = *reinterpret_cast<const uint32_t*>(from);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i, from += p.A_col) {
        const uint32_t bits = i < columns ? *reinterpret_cast<const uint16_t*>(from) : 0;
        words[i / 2] |= bits << (16 * (i % 2));
      }
    }
  }

  // Writes the batch, rounded.
  __device__ __forceinline__ void put(uint32_t tile, int batch) const {
    const int first = row + batch * kBatch * kApart;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int to = first + i * kApart;
      if (to >= p.r) break;
      ptx::store_shared_16(tile + to * kSm90Row + 16 * (chunk ^ (to & 7)), rounded(rows[i].words));
    }
  }

  __device__ __forceinline__ uint4 rounded(const uint32_t (&words)[8]) const {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.A_type == Dtype::float32) {
        v[i] = pack_two<bfloat16>(__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1]));
      } else if (p.A_type == Dtype::float16) {
        const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        v[i] = pack_two<bfloat16>(two.x, two.y);
      } else {
        v[i] = words[i];
      }
    }
    return make_uint4(v[0], v[1], v[2], v[3]);
  }
};

// kRanks: rows of A in shared memory.
template <int kRanks>
struct ShrinkFirst {
  static constexpr bool kAny = true;
  static constexpr int kWriterRegisters = 88;  // for A on its way
  struct State {
    bool asked = false, helps = false;
    uint32_t next = 0;
  };

  template <class Cta>
  static __device__ __forceinline__ const Sm90ForwardParams& params(const Cta& cta) {
    return static_cast<const Sm90ForwardParams&>(cta.p);
  }

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
    const int row = cta.row_block(item) * Tile::kM;
    for (int k = 0; k < p.k_steps; ++k, ring.next()) {
      ptx::wait_at(cta.empty(ring), ring.parity ^ 1);
      ptx::expect_at(cta.full(ring), Tile::kX);  // before who arrives there is granted the stage
      ptx::copy_box(cta.stage(ring), &p.x, k * Tile::kK, row, cta.full(ring));
      ptx::arrive_at(cta.granted(ring));
    }
  }

  // The factor beside x.
  template <class Cta>
  static __device__ __forceinline__ void write(
      const Cta& cta, typename Cta::Ring& ring, uint32_t& parities, int /*item*/) {
    using A = Sm90FactorA<kRanks>;
    const int thread = static_cast<int>(threadIdx.x) - 32;
    A a(params(cta), thread);
    a.load(0, 0);
    for (int k = 0; k < cta.p.k_steps; ++k, ring.next()) {
      cta.wait_for_grant(ring, parities);
#pragma unroll 1
      for (int batch = 0; batch < A::kBatches; ++batch) {
        a.put(cta.stage(ring) + Cta::Tile::kX, batch);
        // The next one is on its way while this block is handed over and the next one is waited for.
        if (batch + 1 < A::kBatches) a.load(k, batch + 1);
        else if (k + 1 < cta.p.k_steps) a.load(k + 1, 0);
      }
      ptx::publish_shared();
      ptx::meet(kSm90WritersMeet, kSm90Writers);
      if (thread == 0) ptx::arrive_at(cta.full(ring));
    }
  }

  template <class Cta>
  static __device__ __forceinline__ void multiply(const Cta& cta, typename Cta::Ring& ring, int item, int half) {
    using T = bfloat16;
    const Sm90Params& p = cta.p;
    const int row_block = cta.row_block(item);
    const int64_t first = static_cast<int64_t>(row_block) * Cta::Tile::kM + half * 64;
    const int64_t row = first + cta.warp % 4 * 16 + cta.lane / 4;
    float d[kRanks / 8][4] = {};
    uint32_t held = 0;
    const int64_t* const seed_at = params(cta).x_dropout.seed;
    const uint64_t seed = seed_at != nullptr ? static_cast<uint64_t>(*seed_at) : 0;
    cta.template multiply<false, true>(d, ring, held, half, [&](uint32_t rows, int k) {
      if (seed_at != nullptr) drop(cta, rows, seed, first, k, half);
    });
    ptx::wait_for_products<0>();
    cta.release(held);
    ptx::hold(d);
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

  // Drops elements of x in a stage that is full, and rounds what is kept, scaled. `row`: the warpgroup's first one. Each
  // thread has 8 columns of four rows.
  template <class Cta>
  static __device__ __forceinline__ void drop(
      const Cta& cta, uint32_t rows, uint64_t seed, int64_t row, int k, int half) {
    const Dropout& dropout = params(cta).x_dropout;
    const int own = cta.warp % 4 * 16 + cta.lane / 8, chunk = cta.lane % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = own + 4 * i;
      const uint4 words = philox(seed, static_cast<uint64_t>((row + at) * dropout.groups + 8 * k + chunk));
      const uint32_t address = rows + at * kSm90Row + 16 * (chunk ^ (at & 7));
      const uint4 x = ptx::load_shared_16(address);
      ptx::store_shared_16(
          address, make_uint4(
                       dropped(x.x, words.x, dropout), dropped(x.y, words.y, dropout),
                       dropped(x.z, words.z, dropout), dropped(x.w, words.w, dropout)));
    }
    ptx::publish_shared();
    ptx::meet(1 + half, 128);
  }

  // Two columns, whose half-words are in `word`.
  static __device__ __forceinline__ uint32_t dropped(uint32_t pair, uint32_t word, const Dropout& dropout) {
    // What is at most `below`, moved to the upper half, is below the threshold. Of 65536 it is the greatest of all.
    const uint32_t below = (static_cast<uint32_t>(dropout.threshold) << 16) - 1;
    const float low = __uint_as_float(pair << 16) * dropout.survivor_scale;
    const float high = __uint_as_float(pair & 0xFFFF0000u) * dropout.survivor_scale;
    return pack_two<bfloat16>(word << 16 <= below ? 0.0f : low, word <= below ? 0.0f : high);
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
