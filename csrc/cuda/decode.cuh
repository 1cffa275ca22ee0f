// A LoRA linear layer of at most 16 rows, all of it in one launch:
//   y = x·Wᵀ + scaling·(x·Aᵀ)·Bᵀ + bias,   s = x·Aᵀ
// or, where each row has an adapter of its own or none, y_i = x_i·Wᵀ + scaling[g]·(x_i·A[g]ᵀ)·B[g]ᵀ + bias.
//
// Reading W takes the time. A CTA has a block of rows of W and streams them through its registers (decode_streams.cuh).
// A is rows of a matrix like any other: helpers stream blocks of its rows, for shares of K where there are few, and
// count what is done. The others look at the count when their last loads of W are in flight, or, where W is codes and
// its numbers take longer than its loads, when all of it is multiplied. Helpers are the first CTAs of the grid, and a
// device commonly starts them first; what each of them does says the ticket that it draws. A CTA that would wait while
// tickets are left, draws them itself and begins with W again. So whoever waits, waits for CTAs that run, which wait
// for nobody.
//
// Where A is so small that loading it takes each CTA less time than s would come late, each computes s for itself:
// there are no helpers (lorafast/backends/cuda/decode.py decides). CTAs of a cluster could have a part of A each: four of
// them save 24 of A's 32 KB at 1024 x 1024 and r = 16, at most 400 clocks of L2 (counted: 548 for W, 1096 with all of A).
// Two barriers of a cluster and s from three other SMs' memory take about as long, and only sm_90 and later have them.
//
// x isn't kept in shared memory. The warps of a CTA share K, so that none of x is read by two of them: it would be
// stored to be loaded once. Each CTA takes it from L2 to registers instead, as it takes W, with 16 rows half as many
// bytes as of W (counted: 1.5 times W is moved at 16 x 4096 -> 4096), of which memory gives none but the first time.
#pragma once

#include <type_traits>

#include "counters.cuh"
#include "decode_streams.cuh"

namespace lorafast::cuda::decode {

constexpr int kMost = 16;  // rows of x

// Counters: tickets that were drawn, CTAs that won't look at counters any more, items of s that are there; then the
// shares of K that are there, an item each.
enum Counter { kTickets, kFinished, kReady, kShares };

struct Matrix {
  const void* data;
  int64_t row, col;  // strides
  bool vector;       // as Rows has it

  __device__ __forceinline__ Rows rows(int64_t first, int64_t count) const {
    return {data, row, col, first, count - 1, vector};
  }
};

// A matrix an adapter.
struct Stack {
  Matrix one;
  int64_t adapter;  // stride

  template <class T>
  __device__ __forceinline__ Matrix of(int64_t g) const {
    return {static_cast<const T*>(one.data) + g * adapter, one.row, one.col, one.vector};
  }
};

// Weight: a Matrix, or what else has rows(first, count) and a BaseStream that takes them.
template <class Weight>
struct ParamsOf {
  Matrix x;
  Weight weight;
  Stack lora_A, lora_B;
  int64_t adapter_count;
  const int64_t* adapter_of;  // of each `rows_an_element` rows of x, -1 for none; null: all have adapter 0
  int64_t adapter_of_stride;
  const float* scaling_of;  // of each adapter; null: `scaling`
  int64_t scaling_stride;
  const void* bias;  // of x's dtype, or null
  int64_t bias_stride;
  void *y, *s;  // s, of x's dtype and float32 for float16, may be null
  float* partials;
  uint32_t* counters;
  int64_t N, K;
  float scaling;
  int32_t M, r, rows_an_element, helpers;
  Dtype adapters;  // that of x or float32
};

// The adapters that the rows have, each once, in the order of rows.
struct Batch {
  int distinct;
  int slot[kMost];  // of a row: which of them; -1 for none
  int64_t adapter[kMost];
  float scaling[kMost];
};

// By the first warp.
template <class Params>
__device__ __forceinline__ void find_adapters(Batch& batch, const Params& p) {
  const int lane = ptx::again(threadIdx.x);
  int64_t g = -1;
  if (lane < p.M) g = p.adapter_of == nullptr ? 0 : p.adapter_of[lane / p.rows_an_element * p.adapter_of_stride];
  // Nobody could say so earlier without waiting for the device.
  if (__any_sync(0xFFFFFFFFu, g < -1 || g >= p.adapter_count)) __trap();
  const uint32_t same = __match_any_sync(0xFFFFFFFFu, static_cast<unsigned long long>(g));
  const int first = __ffs(same) - 1;
  const uint32_t firsts = __ballot_sync(0xFFFFFFFFu, g >= 0 && first == lane);
  const int slot = g < 0 ? -1 : __popc(firsts & ((1u << first) - 1));
  if (lane < kMost) batch.slot[lane] = slot;
  if (g >= 0 && first == lane) {
    batch.adapter[slot] = g;
    batch.scaling[slot] = p.scaling_of == nullptr ? p.scaling : p.scaling_of[g * p.scaling_stride];
  }
  if (lane == 0) batch.distinct = __popc(firsts);
}

// What s is made of: an item is a block of ranks of one adapter.
template <int TOKENS>
struct Items {
  static constexpr int kRanks = rows_of(TOKENS);
  int blocks, count;

  template <class Params>
  __device__ __forceinline__ Items(const Params& p, int distinct) {
    blocks = (p.r + kRanks - 1) / kRanks;
    count = distinct * blocks;
  }
};

// How items are shared out: a unit is an item's share of K, as large as helpers are few.
struct Shares {
  int each;   // shares of an item
  int steps;  // of kBlock elements, in a share

  template <class Params>
  __device__ __forceinline__ Shares(const Params& p, int items) {
    const int all = static_cast<int>((p.K + kBlock - 1) / kBlock);
    const int wanted = items > 0 && p.helpers > items ? p.helpers / items : 1;
    steps = (all + wanted - 1) / wanted;
    each = (all + steps - 1) / steps;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <class T>
constexpr bool kTensorCores = sizeof(T) == 2;
template <class T, class R, int TOKENS, bool APART>
using Stream = std::conditional_t<kTensorCores<T>, MmaStream<T, R, TOKENS, APART>, FmaStream<T, R, TOKENS, APART>>;
#else
template <class T>
constexpr bool kTensorCores = false;
template <class T, class R, int TOKENS, bool APART>
using Stream = FmaStream<T, R, TOKENS, APART>;
#endif

// What multiplies x by W.
template <class T, int TOKENS, class Weight>
struct BaseStream {
  using Type = Stream<T, T, TOKENS, false>;
};

template <class T, int TOKENS, class Weight>
class Layer {
 public:
  static constexpr int kRows = rows_of(TOKENS), kTiles = TOKENS / 8;
  using Base = typename BaseStream<T, TOKENS, Weight>::Type;
  using Spill = typename Base::Spill;

  struct Shared {
    float sums[Spill::kFloats];
    Batch batch;
    uint32_t started;
  };

  // `own_s`: s of this CTA, where there are no helpers.
  __device__ __forceinline__ Layer(const ParamsOf<Weight>& p, Shared& shared, float* own_s)
      : p(p), shared_(shared), s_(p.helpers > 0 ? p.partials : own_s) {}

  __device__ __forceinline__ void run() {
    const int block = static_cast<int>(blockIdx.x) - p.helpers;
    const Rows x = p.x.rows(0, p.M);
    Base stream;
    typename Base::Sums sums;
    for (bool again = false;; again = true) {
      // A CTA that helps, or helps itself, has no rows of W or takes them later.
      const bool shrinks = !again && (block < 0 || p.helpers == 0);
      // Nothing is loaded of no elements. Without a condition around it no register is kept for a stream before.
      stream.start(p.weight.rows(first_row(block), p.N), x, 0, shrinks ? 0 : p.K);
      clear(sums);
      if (!again) {
        if (threadIdx.x < 32) find_adapters(shared_.batch, p);
        if (!Base::kBusy && p.helpers > 0) look_for_helpers();
      }
      if constexpr (Base::kBusy) stream.share();
      if (Base::kBusy || !again) {
        __syncthreads();
      }
      const Items<TOKENS> items(p, shared_.batch.distinct);
      if (!shrinks) {
        multiply(stream, sums, block, again);
        // The last loads of W are in flight: time to wait for s.
        if (again || have_started() || all_have_started()) {
          if constexpr (kTensorCores<T>) wait_to_expand(items, block);
          else wait_for_s(items);
          break;
        }
      }
      shrink(items, block);
      if (block < 0) return finish();
    }
    const Items<TOKENS> items(p, shared_.batch.distinct);
    if constexpr (!Base::kBusy) {
      stream.drain(sums);
      Base::rest(sums, p.weight.rows(first_row(ptx::again(block)), p.N), x, 0, p.K);
    }
    if constexpr (kTensorCores<T>) expand(sums, items, block);
    stream.spill(sums, shared_.sums);
    __syncthreads();
    store_y(items, block);
    finish();
  }

 private:
  static __device__ __forceinline__ int64_t first_row(int block) { return static_cast<int64_t>(block) * kRows; }

  static __device__ __forceinline__ void clear(typename Base::Sums& sums) {
    float* all = reinterpret_cast<float*>(&sums);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(sums) / sizeof(float)); ++i) all[i] = 0.0f;
  }

  // By W, until its last loads are in flight; where that keeps a CTA busy (kBusy), all of it. Then B comes closer and
  // helpers are looked for meanwhile.
  __device__ __forceinline__ void multiply(Base& stream, typename Base::Sums& sums, int block, bool again) {
    if constexpr (Base::kBusy) {
      this->fetch(block);  // there is none for sm_75
      stream.run(sums, [&] {
        if (!again) look_for_helpers();
      });
      if (!again) __syncthreads();
    } else {
      stream.run(sums);
    }
  }

  // ---- s

  // Columns of s_ a row, of which those from r on are 0.
  __device__ __forceinline__ int pitch(const Items<TOKENS>& items) const { return items.blocks * kRows; }

  // How many helpers have started, or have others in their place.
  __device__ __forceinline__ void look_for_helpers() {
    if (threadIdx.x == 0) shared_.started = ptx::load_acquire(p.counters + kTickets);
  }

  __device__ __forceinline__ bool have_started() const {
    return shared_.started >= static_cast<uint32_t>(p.helpers);
  }

  // Looks again.
  __device__ __forceinline__ bool all_have_started() {
    __syncthreads();  // the last number has been read
    look_for_helpers();
    __syncthreads();
    return have_started();
  }

  // Without helpers all of s, which is this CTA's own. A helper takes one ticket; a CTA that has rows of W, but has found
  // that helpers haven't started, all that are left.
  __device__ __forceinline__ void shrink(const Items<TOKENS>& items, int block) {
    const uint32_t helpers = static_cast<uint32_t>(p.helpers);
    do {
      const uint32_t ticket = helpers == 0 ? 0 : take_next(p.counters + kTickets);
      if (ticket >= helpers && helpers > 0) return;
      shrink(items, ticket);
    } while (block >= 0 && helpers > 0);
  }

  // The units of a ticket: every one of as many as there are helpers.
  __device__ __forceinline__ void shrink(const Items<TOKENS>& items, uint32_t ticket) {
    const bool alone = p.helpers == 0;
    if (alone ? blockIdx.x == 0 : ticket == 0) clear_s();
    const int step = alone ? 1 : p.helpers;
    const Shares shares(p, items.count);
    for (int unit = static_cast<int>(ticket); unit < items.count * shares.each; unit += step) {
      const int item = unit / shares.each, part = unit % shares.each;
      if (p.adapters == DtypeOf<T>::value) sum_of<T>(items, item, part, shares.steps);
      else sum_of<float>(items, item, part, shares.steps);
      __syncthreads();
      if (shares.each == 1) {
#pragma unroll 1
        for (int i = threadIdx.x; i < kRows * TOKENS; i += kThreads) {
          store_s(items, item, i, Spill::sum(shared_.sums, i / kRows, i % kRows));
        }
      } else if (!add_shares(items, shares.each, item, part)) {
        continue;
      }
      __syncthreads();  // s is stored, the sums have been read
      if (!alone && threadIdx.x == 0) ptx::add_acquire_release(p.counters + kReady, 1);
    }
    __syncthreads();
  }

  // x·Aᵀ of an item over a share of K, spilled.
  template <class R>
  __device__ __forceinline__ void sum_of(const Items<TOKENS>& items, int item, int part, int steps) {
    // s of float16 x is float32.
    using Ranks = Stream<T, R, TOKENS, DtypeOf<T>::value == Dtype::float16>;
    const Rows x = p.x.rows(0, p.M);
#pragma unroll 1
    for (int first = 0; first < kRows; first += Ranks::kRows) {
      Ranks stream;
      typename Ranks::Sums sums = {};
      stream.start(ranks<R>(items, item, first), x, begin_of(part, steps), begin_of(part + 1, steps));
      stream.run(sums);
      stream.drain(sums);
      const int same = ptx::again(part);
      Ranks::rest(
          sums, ranks<R>(items, ptx::again(item), first), x, begin_of(same, steps), begin_of(same + 1, steps));
      stream.spill(sums, shared_.sums, first);
    }
  }

  // Where a share of K begins, and the one before it ends.
  __device__ __forceinline__ int64_t begin_of(int part, int steps) const {
    const int64_t begin = static_cast<int64_t>(part) * steps * kBlock;
    return begin < p.K ? begin : p.K;
  }

  template <class R>
  __device__ __forceinline__ Rows ranks(const Items<TOKENS>& items, int item, int first) const {
    const Matrix A = p.lora_A.template of<R>(shared_.batch.adapter[item / items.blocks]);
    return A.rows(item % items.blocks * kRows + first, p.r);
  }

  // Hands a share over; the last one of an item adds them up, in order. Whether this is the last one.
  __device__ __forceinline__ bool add_shares(const Items<TOKENS>& items, int each, int item, int part) {
    float* sums = p.partials + TOKENS * pitch(items) + static_cast<int64_t>(item * each) * kRows * TOKENS;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * TOKENS; i += kThreads) {
      sums[part * kRows * TOKENS + i] = Spill::sum(shared_.sums, i / kRows, i % kRows);
    }
    uint32_t* counter = p.counters + kShares + item;
    if (arrive(counter) != static_cast<uint32_t>(each) - 1) return false;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * TOKENS; i += kThreads) {
      float total = sums[i];
#pragma unroll 1
      for (int other = 1; other < each; ++other) total += sums[other * kRows * TOKENS + i];
      store_s(items, item, i, total);
    }
    if (threadIdx.x == 0) *counter = 0;
    return true;
  }

  // Element i of an item, by token, then by rank.
  __device__ __forceinline__ void store_s(const Items<TOKENS>& items, int item, int i, float value) {
    const int token = i / kRows, rank = item % items.blocks * kRows + i % kRows;
    if (shared_.batch.slot[token] != item / items.blocks) return;  // another adapter's
    s_[token * pitch(items) + rank] = rank < p.r ? value : 0.0f;
    if (p.s != nullptr && rank < p.r && (p.helpers > 0 || blockIdx.x == 0)) put_s(token, rank, value);
  }

  // Of tokens without an adapter.
  __device__ __forceinline__ void clear_s() {
    if (p.s == nullptr) return;
    for (int token = 0; token < p.M; ++token) {
      if (shared_.batch.slot[token] >= 0) continue;
#pragma unroll 1
      for (int rank = threadIdx.x; rank < p.r; rank += kThreads) put_s(token, rank, 0.0f);
    }
  }

  __device__ __forceinline__ void put_s(int token, int rank, float value) {
    using Wide = std::conditional_t<DtypeOf<T>::value == Dtype::float16, float, T>;
    static_cast<Wide*>(p.s)[token * static_cast<int64_t>(p.r) + rank] = from_float<Wide>(value);
  }

  __device__ __forceinline__ void wait_for_s(const Items<TOKENS>& items) const {
    if (p.helpers > 0 && items.count > 0) wait_for_count(p.counters + kReady, items.count);
  }

  // ---- scaling·s·Bᵀ

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  // On tensor cores a warp takes 32 ranks of one adapter at a time. Its rows of B come closer while it waits.
  __device__ __forceinline__ void wait_to_expand(const Items<TOKENS>& items, int block) const {
    if (!expands()) return;
    if constexpr (!Base::kBusy) fetch(block);
    wait_for_s(items);
  }

  // Whether this warp has ranks.
  __device__ __forceinline__ bool expands() const {
    return static_cast<int>(threadIdx.x / 32) < shared_.batch.distinct * chunks();
  }

  __device__ __forceinline__ void fetch(int block) const {
    if (!expands()) return;
    if (p.adapters == DtypeOf<T>::value) fetch_of<T>(block);
    else fetch_of<float>(block);
  }

  __device__ __forceinline__ int chunks() const { return (p.r + 31) / 32; }

  template <class R>
  __device__ __forceinline__ void fetch_of(int block) const {
    const int i = threadIdx.x / 32, slot = i / chunks(), k = i % chunks() * 32 + threadIdx.x % 4 * 8;
    if (k >= p.r) return;
    const Rows rows = p.lora_B.template of<R>(shared_.batch.adapter[slot]).rows(first_row(block), p.N);
#pragma unroll
    for (int row = 0; row < kRows; row += 8) ptx::fetch(rows.at<R>(row + threadIdx.x % 32 / 4, k));
  }

  // Adds to the sums of W.
  __device__ __forceinline__ void expand(typename Base::Sums& sums, const Items<TOKENS>& items, int block) const {
    if (p.adapters == DtypeOf<T>::value) expand_of<T>(sums, items, block);
    else expand_of<float>(sums, items, block);
  }

  template <class R>
  __device__ __forceinline__ void expand_of(
      typename Base::Sums& sums, const Items<TOKENS>& items, int block) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int i = threadIdx.x / 32; i < shared_.batch.distinct * chunks(); i += kWarps) {
      const int slot = i / chunks(), k = i % chunks() * 32 + 8 * t;
      const Matrix B = p.lora_B.template of<R>(shared_.batch.adapter[slot]);
      const Rows rows = B.rows(first_row(block), p.N);
      float s[kTiles][8] = {};
#pragma unroll
      for (int part = 0; part < kTiles; ++part) {
        const int token = 8 * part + g;
        if (shared_.batch.slot[token] != slot || k >= p.r) continue;
        const auto* from = reinterpret_cast<const float4*>(s_ + token * pitch(items) + k);
        const float4 first = from[0], second = from[1];
        s[part][0] = first.x, s[part][1] = first.y, s[part][2] = first.z, s[part][3] = first.w;
        s[part][4] = second.x, s[part][5] = second.y, s[part][6] = second.z, s[part][7] = second.w;
      }
#pragma unroll 1
      for (int tile = 0; tile < kTiles; ++tile) {
        uint4 low[sizeof(R) / 2], high[sizeof(R) / 2];
        load_8<R>(low, rows.at<R>(16 * tile + g, k), B.col, p.r - k, B.vector);
        load_8<R>(high, rows.at<R>(16 * tile + 8 + g, k), B.col, p.r - k, B.vector);
        float added[kTiles][4] = {};
        multiply_s<R>(added, low, high, s);
#pragma unroll
        for (int part = 0; part < kTiles; ++part) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const bool one = shared_.batch.slot[8 * part + 2 * t + e % 2] == slot;
            if (one) sums[0][part][e] = fmaf(shared_.batch.scaling[slot], added[part][e], sums[0][part][e]);
          }
        }
        Base::next_rows(sums);
      }
    }
  }

  template <class R>
  static __device__ __forceinline__ void multiply_s(
      float (&c)[kTiles][4], const uint4 (&low)[sizeof(R) / 2], const uint4 (&high)[sizeof(R) / 2],
      float (&s)[kTiles][8]) {
    if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
      uint4 packed[kTiles][1];
#pragma unroll
      for (int part = 0; part < kTiles; ++part) packed[part][0] = pack_bf16(s[part]);
      multiply_rows<T, R>(c, low, high, packed);
    } else {
      float rows[2][8];
      unpack_8<R>(rows[0], low);
      unpack_8<R>(rows[1], high);
      multiply_wide<sizeof(R) == 2, false>(c, rows[0], rows[1], s);
    }
  }
#endif

  // One element of it, in float32.
  __device__ __forceinline__ float expanded(const Items<TOKENS>& items, int64_t row, int token) const {
    const int slot = shared_.batch.slot[token];
    if (slot < 0) return 0.0f;
    const float* s = s_ + token * pitch(items);
    const float total = p.adapters == DtypeOf<T>::value ? dot<T>(row, slot, s) : dot<float>(row, slot, s);
    return shared_.batch.scaling[slot] * total;
  }

  template <class R>
  __device__ __forceinline__ float dot(int64_t row, int slot, const float* s) const {
    const Matrix B = p.lora_B.template of<R>(shared_.batch.adapter[slot]);
    const R* from = static_cast<const R*>(B.data) + row * B.row;
    float total = 0.0f;
#pragma unroll 4
    for (int k = 0; k < p.r; ++k) total = fmaf(to_float(from[k * B.col]), s[k], total);
    return total;
  }

  // ---- y

  __device__ __forceinline__ void store_y(const Items<TOKENS>& items, int block) const {
    const T* bias = static_cast<const T*>(p.bias);
    T* y = static_cast<T*>(p.y);
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * TOKENS; i += kThreads) {
      const int token = i / kRows;
      const int64_t row = first_row(block) + i % kRows;
      if (token >= p.M || row >= p.N) continue;
      float total = Spill::sum(shared_.sums, token, i % kRows);
      if constexpr (!kTensorCores<T>) total += expanded(items, row, token);
      if (bias != nullptr) total += to_float(bias[row * p.bias_stride]);
      y[token * p.N + row] = from_float<T>(total);
    }
  }

  // No thread of this CTA will look at counters again. The last CTA leaves them zero.
  __device__ __forceinline__ void finish() const {
    if (p.helpers == 0 || threadIdx.x != kThreads - 1) return;  // a thread that has no y, with up to 8 rows
    if (ptx::add_acquire_release(p.counters + kFinished, 1) != gridDim.x - 1) return;
    p.counters[kTickets] = p.counters[kFinished] = p.counters[kReady] = 0;
  }

  const ParamsOf<Weight>& p;
  Shared& shared_;
  float* const s_;  // [TOKENS, pitch] of float32
};

// CTAs an SM, for which there are registers. With more than 8 rows of x a CTA has twice as much in flight.
template <class T, int TOKENS>
constexpr int kResident = kTensorCores<T> && TOKENS == 8 ? 2 : 1;

template <class T, int TOKENS>
__global__ void __launch_bounds__(kThreads, (kResident<T, TOKENS>))
    decode_kernel(const __grid_constant__ ParamsOf<Matrix> p) {
  __shared__ typename Layer<T, TOKENS, Matrix>::Shared shared;
  extern __shared__ __align__(16) float own_s[];
  Layer<T, TOKENS, Matrix>(p, shared, own_s).run();
}

}  // namespace lorafast::cuda::decode
