// The persistent GEMM of sm_90a, whose warps have work of their own: y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias, and,
// where helpers make s beside it, s = x·Aᵀ.
//
// A CTA has three warpgroups. The first one's warp 0 loads x and W by TMA, of the tiles of y that its cluster takes from
// a queue; the other three write the factors of the low-rank term. Two more multiply, 64 rows of the tile each. All
// hand over stages of a ring in shared memory: its steps are the K blocks of a tile and, in the same form, its rank
// blocks. They are the last steps, so that nothing waits for s.
//
// s and B go through shared memory, written by those three warps: adapters have any dtype and layout, which TMA can't
// round or turn, and those who multiply have no registers to load s into. By counts the ring has no gap where ranks
// follow (0.4 % of a tile at r = 16, K = 4096). The two that multiply aren't skewed: the ring of four stages holds no
// lead that hides the whole epilogue of the other one, which is 1.4 % of such a tile.
//
// A mask falls on the low-rank term alone. Which elements are kept is made by those who write factors, while the tile
// is multiplied, and is a step before its ranks. Those who multiply get products of ranks for 64 columns at a time, in
// sums of their own, and add what is kept.
//
// Helpers are the clusters that draw the first tickets. Before they take tiles they do work that others wait for,
// through the same ring (sm90_shrink.cuh). `draw` gives the number of the next item of it, or -1; only the leader asks.
// An item is then done by `load`, `write` and `multiply` of each CTA, which go through as many stages in both.
#pragma once

#include "counters.cuh"
#include "eight.cuh"
#include "sm90_factors.cuh"
#include "wgmma.cuh"

namespace lorafast::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct NoHelpers {
  static constexpr bool kAny = false;
  static constexpr int kWriterRegisters = 56;  // 8 more than a multiple of 16, so that both shares are of 8
  struct State {};

  template <class Cta>
  static __device__ __forceinline__ int draw(const Cta&, State&) {
    return -1;
  }
  template <class Cta>
  static __device__ __forceinline__ int draw_behind(const Cta&, State&) {
    return -1;
  }
  template <class Cta>
  static __device__ __forceinline__ int used(const Cta&) {
    return kSm90Flags;
  }
  template <class Cta, class Ring>
  static __device__ __forceinline__ void load(const Cta&, Ring&, int) {}
  template <class Cta, class Ring>
  static __device__ __forceinline__ void write(const Cta&, Ring&, uint32_t&, int) {}
  template <class Cta>
  static __device__ __forceinline__ void wait_for(const Cta&, int) {}
};

struct NoChange {
  __device__ __forceinline__ void operator()(uint32_t, int) const {}
};

// kAcross: rows of W lie across k, as those of Wᵀ do. Helpers: what the first clusters do before they take tiles.
template <class T, bool kAcross, int kN, class Helpers = NoHelpers>
struct Sm90Cta : Sm90Ring<kN> {
  using Base = Sm90Ring<kN>;
  using typename Base::Mail;
  using typename Base::Ring;
  using typename Base::Tile;
  using Factors = Sm90Factors<T, kAcross, kN>;
  using Factor = typename Factors::Element;
  using Base::Base, Base::bias, Base::empty, Base::full, Base::give_back, Base::granted, Base::grant, Base::lane;
  using Base::masked, Base::p, Base::rank, Base::read_mail, Base::release, Base::row_block, Base::shared;
  using Base::stage, Base::warp;
  static constexpr int kTiles = kN / 8;        // of eight columns, of which a thread has four sums
  static constexpr int kSixtyFours = kN / 64;  // columns
  static constexpr bool kMasks = !Helpers::kAny;
  static constexpr int kMaskBytes = Tile::kM * kN / 8;
  static constexpr int kBegun = 10, kAll = kSm90Writers + 256;  // a barrier of threads: a tile's products begin

  // ---- One thread loads x and W. The leader's takes from the queues.

  // What is drawn next was asked for one tile ago, so that nobody waits for the counter.
  struct Draws {
    typename Helpers::State helpers;
    bool tiles = false;  // helpers have no other work left
    uint32_t next = 0;
  };

  __device__ __forceinline__ Sm90Work draw(Draws& draws) const {
    uint32_t* const queue = p.counters + kSm90Tiles;
    if (!draws.tiles) {
      if constexpr (Helpers::kAny) {
        const int item = Helpers::draw(*this, draws.helpers);
        if (item >= 0) return {item, Sm90Work::kHelp};
      }
      draws.tiles = true;
      draws.next = ptx::add_relaxed(queue, 1);
    }
    const uint32_t number = draws.next;
    if (number >= static_cast<uint32_t>(p.row_sets * p.column_tiles)) {
      const int item = Helpers::draw_behind(*this, draws.helpers);
      return {item, item >= 0 ? Sm90Work::kHelp : Sm90Work::kEnd};
    }
    draws.next = ptx::add_relaxed(queue, 1);
    const TilePlace at = tile_at(static_cast<int>(number), p.row_sets, p.column_tiles, p.group);
    return {at.row, at.column * kN};
  }

  __device__ __forceinline__ void load() const {
    ptx::fetch_map(&p.x);
    ptx::fetch_map(&p.w);
    ptx::fetch_map(&p.y);
    Ring ring;
    Draws draws;
    for (Mail mail;; mail.next()) {
      if (rank == 0) this->post(mail, draw(draws));
      const Sm90Work work = read_mail(mail);
      if (work.column == Sm90Work::kEnd) return;
      if (Helpers::kAny && work.column == Sm90Work::kHelp) {
        Helpers::load(*this, ring, work.row);
        continue;
      }
      const int row = row_block(work.row) * Tile::kM;
      for (int k = 0; k < p.k_steps; ++k, ring.next()) {
        this->open(ring, Tile::kStage);
        ptx::copy_box(stage(ring), &p.x, k * Tile::kK, row, full(ring));
        load_w(ring, k * Tile::kK, work.column);
      }
      grant(ring, p.rank_steps + (kMasks && masked));
    }
  }

  // A K block of W: of a cluster of two, one half to both CTAs.
  __device__ __forceinline__ void load_w(const Ring& ring, int k, int column) const {
    const uint32_t w = stage(ring) + Tile::kX;
    if constexpr (kAcross) {
      constexpr int kBoxes = kN / 64;
      if (p.cluster == 1) {
#pragma unroll
        for (int i = 0; i < kBoxes; ++i) {
          ptx::copy_box(w + i * Tile::kHalf, &p.w, column + 64 * i, k, full(ring));
        }
      } else {
#pragma unroll
        for (int i = 0; i < kBoxes / 2; ++i) {
          const int box = rank * (kBoxes / 2) + i;
          ptx::copy_box_to_both(w + box * Tile::kHalf, &p.w, column + 64 * box, k, full(ring));
        }
      }
    } else {
      if (p.cluster == 1) {
        ptx::copy_box(w, &p.w, k, column, full(ring));
      } else {
        const int first = rank * (kN / 2);
        ptx::copy_box_to_both(w + first * kSm90Row, &p.w, k, column + first, full(ring));
      }
    }
  }

  // ---- Three warps write bias and the factors of the low-rank term.

  __device__ __forceinline__ void write() const {
    const int thread = static_cast<int>(threadIdx.x) - 32;
    const Factors factors{p};
    Ring ring;              // its parity means nothing here
    uint32_t parities = 0;  // of each stage's next grant, a bit a stage
    Mail mail;
    for (;; mail.next()) {
      const Sm90Work work = read_mail(mail);
      if (work.column == Sm90Work::kEnd) break;
      if (Helpers::kAny && work.column == Sm90Work::kHelp) {
        Helpers::write(*this, ring, parities, work.row);
        give_back(mail);
        continue;
      }
      const int own = row_block(work.row), top = own * Tile::kM;
      if (p.bias.from != nullptr) {
        for (int i = thread; i < kN; i += kSm90Writers) bias(mail)[i] = p.bias.at(work.column + i);
      }
      skip(ring);
      if (kMasks && masked) {
        write_mask(ring, parities, thread, top, work.column);
        ring.next();
      }
      for (int step = 0; step < p.rank_steps; ++step, ring.next()) {
        const int first = step / p.parts * kSm90Ranks<T>, part = step % p.parts;
        wait_for_grant(ring, parities);
        factors.write_b(stage(ring), thread, work.column, first, part);
        if (Helpers::kAny && step == 0) {
          if (thread == 0 && own < p.row_tiles) Helpers::wait_for(*this, own);
          ptx::meet(kSm90WritersMeet, kSm90Writers);
        }
        factors.write_s(stage(ring), thread, top, first, part);
        ptx::commit_copies();
        ptx::wait_for_copies<0>();
        ptx::publish_shared();
        ptx::meet(kSm90WritersMeet, kSm90Writers);
        if (thread == 0) ptx::arrive_at(full(ring));
      }
      give_back(mail);
    }
    if constexpr (!Helpers::kAny) finish();
  }

  // Making a mask takes issue slots, which those who store the last tile want. A short tile can't wait for that: a mask
  // takes as long as nine K blocks.
  static constexpr int kPatient = 16;
  __device__ __forceinline__ bool makes_mask_later() const { return p.k_steps >= kPatient; }

  // Which elements of the tile are kept, in a stage of their own, which is granted when they are long there. Eight
  // rows of a half of 128 columns after each other: 16 bytes of a row are four words, one of each lane that has it.
  __device__ __forceinline__ void write_mask(
      const Ring& ring, uint32_t& parities, int thread, int top, int column) const {
    constexpr int kUnits = (kN + kSm90Writers - 1) / kSm90Writers;
    if (makes_mask_later()) ptx::meet(kBegun, kAll);
    const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
    const uint32_t threshold = static_cast<uint32_t>(p.dropout.threshold);
    uint64_t counter[kUnits];
    uint32_t keep[kUnits][4] = {};
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = thread + kSm90Writers * i;
      const int64_t row = top + unit % 64 / 8 * 16 + unit % 8 + unit / 64 % 2 * 8;
      counter[i] = static_cast<uint64_t>(row * p.dropout.groups + column / 8 + unit / 128 * 16);
    }
#pragma unroll 1
    for (int group = 0; group < 16; ++group) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const uint4 words = philox(seed, counter[i]++);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          keep[i][t] = __funnelshift_r(keep[i][t], keep_two(word[t], threshold), 2);
        }
      }
    }
    wait_for_grant(ring, parities);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = thread + kSm90Writers * i;
      if (unit < kN) {
        ptx::store_shared_16(stage(ring) + 16 * unit, make_uint4(keep[i][0], keep[i][1], keep[i][2], keep[i][3]));
      }
    }
    // Beside them what is kept is scaled by: of a parameter ptxas would make a load for each sum.
    if (thread == 0) ptx::store_word_at(stage(ring) + kMaskBytes, __float_as_uint(p.sum_scale));
    ptx::publish_shared();
    ptx::meet(kSm90WritersMeet, kSm90Writers);
    if (thread == 0) ptx::arrive_at(full(ring));
  }

  // The last CTA leaves the counters as it found them. Its own writers call it: nobody waits for a flag. Where there are
  // flags, those of this CTA's are raised, which a barrier says.
  __device__ __forceinline__ void finish() const {
    if (warp != 1) return;
    uint32_t before = 0;
    if (lane == 0) before = ptx::add_acquire_release(p.counters + kSm90Finished, 1);
    if (__shfl_sync(0xFFFFFFFFu, before, 0) != gridDim.x - 1) return;
    __syncwarp();  // what lane 0 acquired
    const int used = Helpers::used(*this);
    for (int i = lane; i < used; i += 32) p.counters[i] = 0;
  }

  // Past the K blocks, which TMA loads.
  __device__ __forceinline__ void skip(Ring& ring) const {
    ring.at = (ring.at + static_cast<uint32_t>(p.k_steps)) % Tile::kStages;
  }

  __device__ __forceinline__ void wait_for_grant(const Ring& ring, uint32_t& parities) const {
    ptx::wait_at(granted(ring), parities >> ring.at & 1);
    parities ^= 1u << ring.at;
  }

  // ---- Two warpgroups multiply.

  // The K blocks of the GEMM, or of a row block of s, of which there is one at least. Of the last one `held` is the stage,
  // which is not released yet. The first one stands by itself where it adds to nothing: else sums that nobody needs
  // would keep their registers from tile to tile, beside those of helpers. `change`: what is done to a warpgroup's rows
  // of x, of K block k, before they are multiplied.
  template <bool across, bool kAdds, int kCount, class Change = NoChange>
  __device__ __forceinline__ void multiply(
      float (&d)[kCount][4], Ring& ring, uint32_t& held, int half, const Change& change = {}) const {
    if constexpr (!kAdds) multiply_block<across, false>(d, ring, held, half, 0, change);
    for (int k = kAdds ? 0 : 1; k < p.k_steps; ++k) multiply_block<across, true>(d, ring, held, half, k, change);
  }

  template <bool across, bool kAdds, int kCount, class Change>
  __device__ __forceinline__ void multiply_block(
      float (&d)[kCount][4], Ring& ring, uint32_t& held, int half, int k, const Change& change) const {
    ptx::wait_at(full(ring), ring.parity);
    change(stage(ring) + half * Tile::kHalf, k);
    const uint64_t a = ptx::describe_rows(stage(ring) + half * Tile::kHalf);
    const uint64_t b = across ? ptx::describe_columns<Tile::kK>(stage(ring) + Tile::kX)
                              : ptx::describe_rows(stage(ring) + Tile::kX);
    ptx::begin_products();
#pragma unroll
    for (int i = 0; i < Tile::kK / 16; ++i) {
      ptx::multiply_add<T, across>(d, a + 2 * i, b + (across ? 128 : 2) * i, kAdds || i > 0);
    }
    ptx::commit_products();
    ptx::wait_for_products<1>();
    release(held);
    held = empty(ring);
    ring.next();
  }

  // Those of the low-rank term, and the end of all that was begun.
  __device__ __forceinline__ void multiply_ranks(
      float (&d)[kTiles][4], Ring& ring, uint32_t& held, int half) const {
    if constexpr (!std::is_same_v<Factor, T>) {
      ptx::wait_for_products<0>();  // products of another shape add to the same sums
      release(held);
    }
    for (int step = 0; step < p.rank_steps; ++step, ring.next()) {
      ptx::wait_at(full(ring), ring.parity);
      const uint64_t a = ptx::describe_rows(stage(ring) + half * Tile::kHalf);
      constexpr bool kRanksAcross = Factors::kRanksAcross;
      const uint64_t b = kRanksAcross ? ptx::describe_columns<64>(stage(ring) + Tile::kX)
                                      : ptx::describe_rows(stage(ring) + Tile::kX);
      const int count = Factors{p}.products(step / p.parts * kSm90Ranks<T>);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        ptx::begin_products();
        ptx::multiply_add<Factor, kRanksAcross>(d, a + 2 * i, b + (kRanksAcross ? 128 : 2) * i, 1);
        ptx::commit_products();
      }
      ptx::wait_for_products<1>();  // at most the last group of this step is left
      release(held);
      held = empty(ring);
    }
    ptx::wait_for_products<0>();
    release(held);
    ptx::hold(d);
  }

  // The same under a mask: products of 64 columns, of which those that are kept are added; meanwhile the next are made.
  __device__ __forceinline__ void add_masked_ranks(
      float (&d)[kTiles][4], Ring& ring, uint32_t& held, int half) const {
    uint32_t keep[kSixtyFours];
    ptx::wait_at(full(ring), ring.parity);
#pragma unroll
    for (int i = 0; i < kSixtyFours; ++i) {
      keep[i] = ptx::load_word_at(stage(ring) + 1024 * i + 4 * (128 * half + threadIdx.x % 128));
    }
    const float scale = __uint_as_float(ptx::load_word_at(stage(ring) + kMaskBytes));
    __syncwarp();
    uint32_t read = empty(ring);
    release(read);
    ring.next();
    ptx::wait_for_products<0>();
    release(held);
    ptx::hold(d);
    for (int step = 0; step < p.rank_steps; ++step, ring.next()) {
      ptx::wait_at(full(ring), ring.parity);
      const int count = Factors{p}.products(step / p.parts * kSm90Ranks<T>);
      if (count == 1) add_masked<true>(d, ring, half, count, keep, scale);
      else add_masked<false>(d, ring, half, count, keep, scale);
    }
  }

  // Of a step of ranks, which is released. kOne: `count` is 1.
  template <bool kOne>
  __device__ __forceinline__ void add_masked(
      float (&d)[kTiles][4], const Ring& ring, int half, int count, const uint32_t (&keep)[kSixtyFours],
      float scale) const {
    float e[2][8][4];
    multiply_piece<kOne>(e[0], ring, half, 0, count);
#pragma unroll
    for (int piece = 0; piece < kSixtyFours; ++piece) {
      if (piece + 1 < kSixtyFours) {
        multiply_piece<kOne>(e[(piece + 1) % 2], ring, half, piece + 1, count);
        ptx::wait_for_products<1>();
      } else {
        ptx::wait_for_products<0>();
        uint32_t read = empty(ring);
        release(read);
      }
      ptx::hold(e[piece % 2]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t bits = keep[piece / 2 * 2 + i / 2] >> (2 * (piece % 2 * 8 + j) + i % 2);
          float& sum = d[8 * piece + j][i];
          if (bits & 1) sum = fmaf(scale, e[piece % 2][j][i], sum);
        }
      }
    }
  }

  // Of a step of ranks the products of 64 columns, so many.
  template <bool kOne>
  __device__ __forceinline__ void multiply_piece(
      float (&e)[8][4], const Ring& ring, int half, int piece, int count) const {
    constexpr bool kRanksAcross = Factors::kRanksAcross;
    const uint32_t columns = stage(ring) + Tile::kX + piece * Tile::kHalf;
    const uint64_t a = ptx::describe_rows(stage(ring) + half * Tile::kHalf);
    const uint64_t b = kRanksAcross ? ptx::describe_columns<64>(columns) : ptx::describe_rows(columns);
    ptx::begin_products();  // the sums were read by other instructions
    if constexpr (kOne) {
      ptx::multiply_add<Factor, kRanksAcross>(e, a, b, 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        ptx::begin_products();
        ptx::multiply_add<Factor, kRanksAcross>(e, a + 2 * i, b + (kRanksAcross ? 128 : 2) * i, i > 0);
      }
      ptx::begin_products();
    }
    ptx::commit_products();
  }

  // y leaves in pieces of 64 columns; while TMA writes one the next is made.
  __device__ __forceinline__ void store(
      const float (&d)[kTiles][4], int top, int left, int half, const Mail& mail) const {
    const bool first = threadIdx.x % 128 == 0;
    const uint32_t pieces = shared + Tile::kPieces + half * 2 * Tile::kHalf;
    const int row = (warp % 4) * 16 + (lane & 15), high = lane >> 4;  // whose address this lane gives
    const float* const added = bias(mail) + 2 * (lane % 4);
#pragma unroll
    for (int piece = 0; piece < kSixtyFours; ++piece) {
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
          if (p.bias.from != nullptr) b = *reinterpret_cast<const float2*>(added + 8 * tile);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            v[2 * i + h] = pack_two<T>(d[tile][2 * h] + b.x, d[tile][2 * h + 1] + b.y);
          }
        }
        ptx::store_matrices(to + row * kSm90Row + 16 * ((j + high) ^ (row & 7)), v[0], v[1], v[2], v[3]);
      }
      ptx::publish_shared();
      ptx::meet(1 + half, 128);
      const int column = left + 64 * piece;
      if (first && column < p.N && top < p.M) ptx::store_box(&p.y, column, top, to);
      if (first) ptx::commit_boxes();
    }
  }

  __device__ __forceinline__ void consume() const {
    const int half = warp / 4 - 1;
    Ring ring;
    Mail mail;
    for (;; mail.next()) {
      const Sm90Work work = read_mail(mail);
      if (work.column == Sm90Work::kEnd) break;
      uint32_t held = 0;
      if constexpr (Helpers::kAny) {
        if (work.column == Sm90Work::kHelp) {
          Helpers::multiply(*this, ring, work.row, half);
          give_back(mail);
          continue;
        }
      }
      const int top = row_block(work.row) * Tile::kM + 64 * half;
      float d[kTiles][4];
      if (kMasks && masked && makes_mask_later()) ptx::arrive_for(kBegun, kAll);
      multiply<kAcross, false>(d, ring, held, half);
      if (kMasks && masked) add_masked_ranks(d, ring, held, half);
      else multiply_ranks(d, ring, held, half);
      store(d, top, work.column, half, mail);
      give_back(mail);
    }
    if (threadIdx.x % 128 == 0) ptx::wait_until_stored();
  }

  __device__ __forceinline__ void run() const {
    static_assert(Helpers::kWriterRegisters % 16 == 8, "setmaxnreg takes multiples of 8");
    this->init();
    if (warp < 4) {
      ptx::give_registers<Helpers::kWriterRegisters>();
      if (warp > 0) write();
      else if (lane == 0) load();
    } else {
      ptx::take_registers<252 - Helpers::kWriterRegisters / 2>();  // of 168 that each began with
      consume();
    }
    this->leave();
    if constexpr (Helpers::kAny) finish();
  }
};

#endif

}  // namespace lorafast::cuda
