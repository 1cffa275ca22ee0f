// Of decode.cuh a W that is stored as codes: memory moves the codes, registers have the numbers.
//
// A lane has 16 bytes of a row: the 32 or 16 elements along K that it multiplies with as many of x. Which elements meet
// in an mma doesn't matter, so a quad has 64 bytes of a row, whole sectors. Codes on their way wait in shared memory,
// each thread's at places of its own, so that the loop over K is rolled: an instruction comes from memory as well, and
// unrolled by its stages a body of this size is as many bytes as the codes that a CTA reads.
#pragma once

#include "codes.cuh"
#include "decode.cuh"
#include "eight.cuh"

namespace lorafast::cuda::decode {

// Rows of codes as Rows has those of a matrix.
template <class Codes>
struct CodeRows {
  const Codes& codes;
  int64_t K, first, last;

  // The number of an element.
  __device__ __forceinline__ int64_t at(int i, int64_t k) const {
    const int64_t index = first + i < last ? first + i : last;
    return index * K + k;
  }
};

// Codes at a multiple of 16 bytes, as many in a row; no 16 bytes of a row have two scales.
template <class Codes>
struct CodedMatrix {
  Codes codes;
  int64_t K;

  __device__ __forceinline__ CodeRows<Codes> rows(int64_t first, int64_t count) const {
    return {codes, K, first, count - 1};
  }
};

constexpr int kCodesDepth = 4;  // steps whose codes are in flight

// Of 16 bytes each: two rows for 16 of a CTA.
template <int TOKENS>
constexpr int kRing = kCodesDepth * kThreads * TOKENS / 4;

// A CTA's numbers of codes, then those of nested scales and their offset.
template <class Codes>
using Table = float[Codes::kNumbers + Codes::kScaleNumbers + 1];
template <class Codes>
__device__ __forceinline__ Table<Codes>& table_of() {
  __shared__ Table<Codes> table;
  return table;
}

// Dynamic shared memory: the ring, and behind it s, where a CTA makes its own.
__device__ __forceinline__ uint4* ring_of() {
  extern __shared__ __align__(16) uint4 ring[];
  return ring;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// What W is rounded to before it is rounded to T, if that is neither float32 nor T.
template <class T, int COUNT>
__device__ __forceinline__ void round_before(float (&v)[COUNT], Dtype stored) {
  using Other = std::conditional_t<DtypeOf<T>::value == Dtype::bfloat16, float16, bfloat16>;
  if (stored != DtypeOf<Other>::value) return;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) v[i] = to_float(from_float<Other>(v[i]));
}

// Elements of W of codes: of a scale, then of codes, 16 at a time, two elements a word.
template <class T, class Codes, bool INTEGERS>
class Numbers;

// Of 4 bits there are 16 elements in a block. They are made once for a lane's 32 codes, and chosen by `prmt`: of eight
// bytes it takes four, by three bits each, so there are their lower and their upper bytes, of numbers 0 to 7 and of 8 to
// 15. Bit 3 of a code chooses between these.
template <class T>
class Numbers<T, FourBit, false> {
 public:
  struct Scaled {
    uint32_t lower[4], upper[4];
  };

  __device__ __forceinline__ Numbers(const FourBit& codes, const float* table) : stored_(codes.stored) {
#pragma unroll
    for (int i = 0; i < FourBit::kNumbers; ++i) numbers_[i] = table[i];
    // The first code of a byte is its upper half, unless low_first.
    first_ = codes.low_first ? 0x5140u : 0x4051u;
    second_ = codes.low_first ? 0x7362u : 0x6273u;
  }

  __device__ __forceinline__ Scaled scaled(float scale) const {
    float v[FourBit::kNumbers];
#pragma unroll
    for (int i = 0; i < FourBit::kNumbers; ++i) v[i] = __fmul_rn(numbers_[i], scale);
    round_before<T>(v, stored_);
    Scaled to;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t a = pack_two<T>(v[4 * i], v[4 * i + 1]), b = pack_two<T>(v[4 * i + 2], v[4 * i + 3]);
      to.lower[i] = ptx::permute(a, b, 0x6420u);
      to.upper[i] = ptx::permute(a, b, 0x7531u);
    }
    return to;
  }

  // Those from code 16·`sixteen` on.
  __device__ __forceinline__ void make(
      uint4 (&to)[2], const Scaled& scaled, const uint4& codes, int sixteen) const {
    to[0] = eight(scaled, sixteen == 0 ? codes.x : codes.z);
    to[1] = eight(scaled, sixteen == 0 ? codes.y : codes.w);
  }

 private:
  __device__ __forceinline__ uint4 eight(const Scaled& scaled, uint32_t word) const {
    const uint32_t places = word & 0x77777777u, left = word << 4;
    // Bytes of ones where bit 3 is set: prmt repeats the highest bit of a byte if it is told 8 more than its number.
    const uint32_t early = ptx::permute(word, left, 0x9D8Cu), late = ptx::permute(word, left, 0xBFAEu);
    const uint2 first = four(scaled, places, early), second = four(scaled, places >> 16, late);
    return make_uint4(first.x, first.y, second.x, second.y);
  }

  __device__ __forceinline__ uint2 four(const Scaled& of, uint32_t places, uint32_t ones) const {
    const uint32_t lower = chosen(of.lower, places, ones), upper = chosen(of.upper, places, ones);
    return make_uint2(ptx::permute(lower, upper, first_), ptx::permute(lower, upper, second_));
  }

  static __device__ __forceinline__ uint32_t chosen(const uint32_t (&of)[4], uint32_t places, uint32_t ones) {
    const uint32_t zero_to_7 = ptx::permute(of[0], of[1], places), from_8 = ptx::permute(of[2], of[3], places);
    return (zero_to_7 & ~ones) | (from_8 & ones);
  }

  float numbers_[FourBit::kNumbers];
  uint32_t first_, second_;
  Dtype stored_;
};

// Of 8 bits an element is its number times the scale.
template <class T, bool INTEGERS>
class Numbers<T, EightBit, INTEGERS> {
 public:
  using Scaled = float;

  __device__ __forceinline__ Numbers(const EightBit& codes, const float*) : stored_(codes.stored) {}
  __device__ __forceinline__ Scaled scaled(float scale) const { return scale; }

  __device__ __forceinline__ void make(uint4 (&to)[2], Scaled scale, const uint4& codes, int) const {
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    float v[16];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float four[4];
      if constexpr (INTEGERS) EightBit::integers_of(four, words[word]);
      else EightBit::floats_of(four, words[word]);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[4 * word + j] = __fmul_rn(four[j], scale);
    }
    round_before<T>(v, stored_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* eight = v + 8 * i;
      to[i] = make_uint4(
          pack_two<T>(eight[0], eight[1]), pack_two<T>(eight[2], eight[3]), pack_two<T>(eight[4], eight[5]),
          pack_two<T>(eight[6], eight[7]));
    }
  }

 private:
  Dtype stored_;
};

// As MmaStream; rows of x must be aligned to 16 bytes.
template <class T, class Codes, int TOKENS>
class CodesStream : public MmaSums<TOKENS, TOKENS / 8> {
  using Own = MmaSums<TOKENS, TOKENS / 8>;
  static constexpr int kPer = 128 / Codes::kBits;    // elements of a lane
  static constexpr int kStep = kThreads / 8 * kPer;  // of all warps: each has four lanes along K
  static constexpr int kEights = kPer / 8;

 public:
  // Numbers take the time, not memory: all of W is multiplied before s is waited for.
  static constexpr bool kBusy = true;
  using Own::kRowTiles, Own::kTiles;
  using typename Own::Sums;

  __device__ __forceinline__ void start(const CodeRows<Codes>& rows, const Rows& x, int64_t begin, int64_t end) {
    const int thread = ptx::thread_again(), lane = thread % 32, g = lane / 4;
    codes_ = &rows.codes;
    steps_ = static_cast<int>((end - begin + kStep - 1) / kStep);
    const int64_t k = begin + (thread / 32 * 4 + lane % 4) * kPer;
    own_ = k < end ? static_cast<int>((end - k + kStep - 1) / kStep) : 0;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      at_[tile][0] = rows.at(16 * tile + g, k);
      at_[tile][1] = rows.at(16 * tile + 8 + g, k);
    }
    to_ = ptx::shared_address(ring_of() + thread);
#pragma unroll 1
    for (int d = 0; d < kCodesDepth; ++d) copy(d);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) asked_[tile][0] = asked_[tile][1] = {};
    ask(0);
    ask_for_table();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) x_[tile] = ptx::kept(x.template at<T>(8 * tile + g, k));
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) load_x(eight, 0);
  }

  // Hands over to the CTA, with the next barrier, what it loaded of the table.
  __device__ __forceinline__ void share() const {
    if constexpr (Codes::kNumbers > 0) {
      float* table = table_of<Codes>();
      if (threadIdx.x <= Codes::kNumbers) {
        table[threadIdx.x < Codes::kNumbers ? threadIdx.x : Codes::kNumbers + Codes::kScaleNumbers] = number_;
      }
      table[Codes::kNumbers + threadIdx.x] = of_scales_;
    }
  }

  // Calls `last` before the last step.
  template <class Last>
  __device__ __forceinline__ void run(Sums& sums, Last last) {
    const float* table = table_of<Codes>();
    if constexpr (Codes::kNumbers > 0) run_with(sums, Numbers<T, Codes, false>(*codes_, table), last);
    else if (codes_->integers) run_with(sums, Numbers<T, Codes, true>(*codes_, table), last);
    else run_with(sums, Numbers<T, Codes, false>(*codes_, table), last);
  }

 private:
  static constexpr uint32_t kCopy = kThreads * 16;  // bytes that all threads copy at once

  __device__ __forceinline__ uint32_t place(int step, int tile, int half) const {
    return to_ + (step % kCodesDepth * kRowTiles * 2 + tile * 2 + half) * kCopy;
  }

  __device__ __forceinline__ void ask_for_table() {
    if constexpr (Codes::kNumbers > 0) {
      static_assert(Codes::kScaleNumbers == kThreads, "a thread has one of them");
      const bool nested = steps_ > 0 && codes_->kind == Scales::nested;
      number_ = of_scales_ = 0.0f;
      if (steps_ > 0 && threadIdx.x < Codes::kNumbers) number_ = __ldg(codes_->numbers + threadIdx.x);
      if (nested && threadIdx.x == Codes::kNumbers) number_ = __ldg(codes_->offset);
      if (nested) of_scales_ = __ldg(codes_->numbers_of_scales + threadIdx.x);
    }
  }

  // A group of copies for each step. Behind the lane's last one there are zeros.
  __device__ __forceinline__ void copy(int step) const {
    const bool inside = step < own_;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* from =
            codes_->codes + (at_[tile][half] + static_cast<int64_t>(step) * kStep) / (8 / Codes::kBits);
        if (step < steps_) ptx::copy_16_to(place(step, tile, half), from, inside ? 16 : 0);
      }
    }
    ptx::commit_copies();
  }

  // Scales of a step.
  __device__ __forceinline__ void ask(int step) {
    if (step >= own_) return;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        asked_[tile][half] = codes_->load_scale(at_[tile][half] + static_cast<int64_t>(step) * kStep);
      }
    }
  }

  __device__ __forceinline__ void load_x(int eight, int step) {
#pragma unroll
    for (int part = 0; part < kTiles; ++part) {
      if (step < own_)
        tokens_[part][eight] = ptx::load_constant(x_[part] + step * static_cast<int64_t>(kStep) + 8 * eight);
      else tokens_[part][eight] = {};
    }
  }

  template <class Of, class Last>
  __device__ __forceinline__ void run_with(Sums& sums, const Of& numbers, Last last) {
    const float* of_scales = table_of<Codes>() + Codes::kNumbers;
#pragma unroll 1
    for (int step = 0; step < steps_; ++step) {
      if (step + 1 == steps_) last();
      float scales[kRowTiles][2];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          scales[tile][half] = step < own_ ? codes_->finish(asked_[tile][half], of_scales) : 0.0f;
        }
      }
      if (codes_->varies_in_rows()) ask(step + 1);
      ptx::wait_for_copies<kCodesDepth - 1>();
// Rolled, as the loop around it.
#pragma unroll 1
      for (int tile = 0; tile < kRowTiles; ++tile) {
        const typename Of::Scaled scaled[2] = {numbers.scaled(scales[0][0]), numbers.scaled(scales[0][1])};
        const uint4 codes[2] = {
            ptx::load_shared_16(place(step, tile, 0)), ptx::load_shared_16(place(step, tile, 1))};
#pragma unroll
        for (int sixteen = 0; sixteen < kEights / 2; ++sixteen) {
          uint4 low[2], high[2];
          numbers.make(low, scaled[0], codes[0], sixteen);
          numbers.make(high, scaled[1], codes[1], sixteen);
#pragma unroll
          for (int part = 0; part < kTiles; ++part) {
            multiply<T>(sums[0][part], low[0], high[0], tokens_[part][2 * sixteen]);
            multiply<T>(sums[0][part], low[1], high[1], tokens_[part][2 * sixteen + 1]);
          }
          if (tile + 1 < kRowTiles) continue;
          load_x(2 * sixteen, step + 1);
          load_x(2 * sixteen + 1, step + 1);
        }
        if constexpr (kRowTiles > 1) {
          Own::next_rows(sums);
          scales[0][0] = scales[1][0], scales[0][1] = scales[1][1];
        }
      }
      copy(step + kCodesDepth);
    }
  }

  const Codes* codes_;
  const T* x_[kTiles];
  uint4 tokens_[kTiles][kEights];  // of the step
  int64_t at_[kRowTiles][2];
  typename Codes::Asked asked_[kRowTiles][2];
  float number_, of_scales_;  // of the table
  uint32_t to_;
  int steps_, own_;  // of all warps; those in which the lane has elements
};

template <class T, int TOKENS, class Codes>
struct BaseStream<T, TOKENS, CodedMatrix<Codes>> {
  using Type = CodesStream<T, Codes, TOKENS>;
};

#endif

template <class T, int TOKENS, class Codes>
__global__ void __launch_bounds__(kThreads, (TOKENS == 8 ? 2 : 1))
    decode_codes_kernel(const __grid_constant__ ParamsOf<CodedMatrix<Codes>> p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Of = Layer<T, TOKENS, CodedMatrix<Codes>>;
  __shared__ typename Of::Shared shared;
  Of(p, shared, reinterpret_cast<float*>(ring_of() + kRing<TOKENS>)).run();
#else
  __trap();
#endif
}

}  // namespace lorafast::cuda::decode
