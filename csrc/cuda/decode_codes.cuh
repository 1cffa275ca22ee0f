// Of decode.cuh a W that is stored as codes: memory moves the codes, registers have the numbers.
//
// A lane has 16 bytes of a row: the 32 or 16 elements along K that it multiplies with as many of x, eight at a time.
// Which elements meet in an mma doesn't matter, so a quad has 64 bytes of a row, whole sectors.
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

// The numbers of codes: a CTA's own.
template <class Codes>
__device__ __forceinline__ float* table_of() {
  __shared__ float table[Codes::kNumbers > 0 ? Codes::kNumbers : 1];
  return table;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// As MmaStream; rows of x must be aligned to 16 bytes.
template <class T, class Codes, int TOKENS>
class CodesStream : public MmaSums<TOKENS, TOKENS / 8> {
  using Own = MmaSums<TOKENS, TOKENS / 8>;
  static constexpr int kPer = 128 / Codes::kBits;    // elements of a lane
  static constexpr int kStep = kThreads / 8 * kPer;  // of all warps: each has four lanes along K
  static constexpr int kDepth = TOKENS == 8 ? 4 : 2;

 public:
  using Own::kRowTiles, Own::kTiles;
  using typename Own::Sums;

  __device__ __forceinline__ void start(const CodeRows<Codes>& rows, const Rows& x, int64_t begin, int64_t end) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    codes_ = &rows.codes;
    steps_ = static_cast<int>((end - begin + kStep - 1) / kStep);
    const int64_t k = begin + (threadIdx.x / 32 * 4 + lane % 4) * kPer;
    left_ = end - k;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      at_[tile][0] = rows.at(16 * tile + g, k);
      at_[tile][1] = rows.at(16 * tile + 8 + g, k);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) x_[tile] = x.template at<T>(8 * tile + g, k);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      stages_[d] = {};
      if (d < steps_) load(stages_[d], d);
    }
  }

  __device__ __forceinline__ void run(Sums& sums) {
    while (steps_ >= 2 * kDepth) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        consume(sums, stages_[d], d);
        load(stages_[d], d + kDepth);
      }
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        at_[tile][0] += kDepth * kStep;
        at_[tile][1] += kDepth * kStep;
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) x_[tile] += kDepth * kStep;
      left_ -= kDepth * kStep;
      steps_ -= kDepth;
    }
  }

  __device__ __forceinline__ void drain(Sums& sums) {
#pragma unroll
    for (int d = 0; d < 2 * kDepth; ++d) {
      if (d >= steps_) continue;
      consume(sums, stages_[d % kDepth], d);
      if (d < kDepth && d + kDepth < steps_) load(stages_[d % kDepth], d + kDepth);
    }
  }

  // Nothing is left over: lanes beyond the end of K have zeros.
  static __device__ __forceinline__ void rest(Sums&, const CodeRows<Codes>&, const Rows&, int64_t, int64_t) {}

 private:
  struct Stage {
    uint4 codes[kRowTiles][2];
    typename Codes::Asked scales[kRowTiles][2];
  };

  __device__ __forceinline__ bool is_inside(int step) const { return step * kStep < left_; }

  __device__ __forceinline__ void load(Stage& stage, int step) const {
    if (!is_inside(step)) return;  // it has none but in the last step
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t i = at_[tile][half] + step * kStep;
        stage.codes[tile][half] = ptx::load_once(codes_->codes + i / (8 / Codes::kBits));
        stage.scales[tile][half] = codes_->load_scale(i);
      }
    }
  }

  // Eight numbers of W, from the one with number `first` among the lane's.
  static __device__ __forceinline__ uint4
  numbers_of(const Codes& codes, const uint4& from, int eight, float scale, bool twice) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
    constexpr int kWords = Codes::kBits / 4, kEach = 32 / Codes::kBits;  // words of eight, codes of a word
    float v[8];
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint32_t in_order = codes.in_order(words[eight * kWords + word]);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        v[word * kEach + j] = __fmul_rn(codes.number_of(in_order, j, table_of<Codes>()), scale);
      }
    }
    if (twice) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = rounded(v[j], codes.stored);
    }
    return make_uint4(
        pack_two<T>(v[0], v[1]), pack_two<T>(v[2], v[3]), pack_two<T>(v[4], v[5]), pack_two<T>(v[6], v[7]));
  }

  __device__ __forceinline__ void consume(Sums& sums, const Stage& stage, int step) const {
    const bool inside = is_inside(step);
    const bool twice = codes_->stored != Dtype::float32 && codes_->stored != DtypeOf<T>::value;
    float scales[kRowTiles][2];
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[tile][half] = inside ? codes_->finish(stage.scales[tile][half]) : 0.0f;
      }
    }
#pragma unroll
    for (int eight = 0; eight < kPer / 8; ++eight) {
      uint4 x[kTiles];
#pragma unroll
      for (int part = 0; part < kTiles; ++part) {
        x[part] = {};
        if (inside) x[part] = ptx::load_constant(x_[part] + step * kStep + 8 * eight);
      }
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        const uint4 low = numbers_of(*codes_, stage.codes[tile][0], eight, scales[tile][0], twice);
        const uint4 high = numbers_of(*codes_, stage.codes[tile][1], eight, scales[tile][1], twice);
#pragma unroll
        for (int part = 0; part < kTiles; ++part) multiply<T>(sums[tile][part], low, high, x[part]);
      }
    }
  }

  Stage stages_[kDepth];
  const Codes* codes_;
  const T* x_[kTiles];
  int64_t at_[kRowTiles][2];
  int64_t left_;  // elements along K from the lane's first one on
  int steps_;     // of all warps, that are left
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
  extern __shared__ __align__(16) float own_s[];
  load_numbers(table_of<Codes>(), p.weight.codes);  // there before the first barrier of run
  Of(p, shared, own_s).run();
#else
  __trap();
#endif
}

}  // namespace lorafast::cuda::decode
