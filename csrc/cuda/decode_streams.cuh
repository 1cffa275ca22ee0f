// Products of a few rows of a matrix that is read once, [rows, K], with up to 16 rows of x, [M, K]: the loads of
// several steps along K are in flight in registers, and nothing but registers is in between. The warps of a CTA
// share K, so each of them needs another part of x, which it loads as it loads the matrix.
//
// MmaStream multiplies on tensor cores (16-bit x, from sm_80 on), FmaStream in float32. Both are used so:
//   stream.start(...);       // the first loads
//   stream.run(sums);        // when it returns, the last loads are in flight
//   stream.drain(sums);
//   stream.rest(sums, ...);  // what couldn't be loaded 16 bytes at once
//   stream.spill(sums, to);  // kParts sums of each element, that the CTA adds up in order: `Spilled`
#pragma once

#include "numbers.cuh"
#include "ptx.cuh"

namespace lorafast::cuda::decode {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kBlock = 256;  // elements along K: a step of all warps, and what shares of K are multiples of

// x has up to 8 or up to 16 rows (TOKENS). Rows of the matrix are twice as many: x is read once for each so many.
constexpr int rows_of(int tokens) { return 2 * tokens; }

// A matrix [.., K], and the rows that a CTA has: those from `first` on. Beyond `last` it has the last one again,
// whose results nobody reads.
struct Rows {
  const void* data;
  int64_t row, col;  // strides
  int64_t first, last;
  bool vector;  // whether 16-byte loads are allowed: neighbours along K, rows aligned to 16 bytes

  template <class T>
  __device__ __forceinline__ const T* at(int i, int64_t k) const {
    const int64_t index = first + i < last ? first + i : last;
    return static_cast<const T*>(data) + index * row + k * col;
  }
};

// Elements i and i + 1 from `at` on as they lie in memory, of which those from `count` on become 0: words shifted into
// 16 bytes, or two times as many. What was there goes out at the front, so that loops needn't be unrolled.
template <class T>
__device__ __forceinline__ void shift_in(uint4 (&to)[sizeof(T) / 2], const T* at, int64_t col, int count, int i) {
  const T *first = at + i * col, *second = first + col;
  uint32_t words[2] = {0, 0};
  if constexpr (sizeof(T) == 4) {
    if (i < count) words[0] = __float_as_uint(*first);
    if (i + 1 < count) words[1] = __float_as_uint(*second);
  } else {
    if (i < count) words[0] = *reinterpret_cast<const uint16_t*>(first);
    if (i + 1 < count) words[0] |= *reinterpret_cast<const uint16_t*>(second) << 16;
  }
#pragma unroll
  for (int word = 0; word < static_cast<int>(sizeof(T)) / 2; ++word) {
#pragma unroll
    for (int j = 0; j < static_cast<int>(sizeof(T)) / 2; ++j) {
      uint4& v = to[j];
      const bool last = j == static_cast<int>(sizeof(T)) / 2 - 1;
      v.x = v.y, v.y = v.z, v.z = v.w, v.w = last ? words[word] : to[last ? j : j + 1].x;
    }
  }
}

// Eight neighbours along K from `at` on, of which `count` are there and the others become 0.
template <class T>
__device__ __forceinline__ void load_8(
    uint4 (&to)[sizeof(T) / 2], const T* at, int64_t col, int count, bool vector) {
  if (vector && count >= 8) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) to[i] = ptx::load_once(at + 16 / sizeof(T) * i);
  } else {
#pragma unroll 1
    for (int i = 0; i < 8; i += 2) shift_in<T>(to, at, col, count, i);
  }
}

// Of 16 bytes, or of the 4 in `word`, the numbers.
template <class T>
__device__ __forceinline__ void unpack(float (&to)[4 / sizeof(T)], uint32_t word) {
  if constexpr (sizeof(T) == 4) {
    to[0] = __uint_as_float(word);
  } else if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
    to[0] = __uint_as_float(word << 16);
    to[1] = __uint_as_float(word & 0xFFFF0000u);
  } else {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    to[0] = pair.x;
    to[1] = pair.y;
  }
}

// Eight numbers that load_8 has loaded.
template <class T>
__device__ __forceinline__ void unpack_8(float (&to)[8], const uint4 (&from)[sizeof(T) / 2]) {
  constexpr int kPer = 4 / sizeof(T);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
    const uint32_t words[4] = {from[i].x, from[i].y, from[i].z, from[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float few[kPer];
      unpack<T>(few, words[j]);
#pragma unroll
      for (int h = 0; h < kPer; ++h) to[kPer * (4 * i + j) + h] = few[h];
    }
  }
}

// Sums in shared memory: [part][token][row]. Four floats more a token than it has rows: no bank conflicts when
// fragments are stored.
template <int TOKENS, int PARTS>
struct Spilled {
  static constexpr int kPitch = rows_of(TOKENS) + 4, kFloats = PARTS * TOKENS * kPitch;

  static __device__ __forceinline__ int index(int part, int token, int row) {
    return (part * TOKENS + token) * kPitch + row;
  }
  // The parts' sum, always in one order.
  static __device__ __forceinline__ float sum(const float* from, int token, int row) {
    float total = from[index(0, token, row)];
#pragma unroll
    for (int part = 1; part < PARTS; ++part) total += from[index(part, token, row)];
    return total;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// c += a·b over 32 elements along K. A lane has rows g and g + 8 of the matrix (`low`, `high`) and row g of x, of each
// its elements 8t to 8t + 7. Which two elements of K meet in an mma doesn't matter, if a and b agree: the first one
// takes elements 0 to 3 of each lane, the second one 4 to 7, and nothing has to be moved. APART: s beside float16 stays
// in float32, and tensor cores cut a sum off each time they add to it, so these have sums of their own.
template <class T, bool APART = false>
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& low, const uint4& high, const uint4& x) {
  const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
  if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
    ptx::multiply_bf16(c, first, x.x, x.y);
    ptx::multiply_bf16(c, second, x.z, x.w);
  } else if constexpr (!APART) {
    ptx::multiply_f16(c, first, x.x, x.y);
    ptx::multiply_f16(c, second, x.z, x.w);
  } else {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    ptx::multiply_f16(part, first, x.x, x.y);
    ptx::multiply_f16(part, second, x.z, x.w);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += part[i];
  }
}

// The first two go behind the others.
__device__ __forceinline__ void next_two(float (&x)[8]) {
  const float first = x[0], second = x[1];
#pragma unroll
  for (int i = 0; i < 6; ++i) x[i] = x[i + 2];
  x[6] = first, x[7] = second;
}

template <bool EXACT>
__device__ __forceinline__ void split(uint32_t& high, uint32_t& low, float x) {
  if constexpr (EXACT) {
    high = __float_as_uint(x);
    low = 0;
  } else {
    const Tf32Pair pair = split_tf32(x);
    high = pair.high;
    low = pair.low;
  }
}

// The same of float32, which is two numbers in TF32 (EXACT ones, float16 before, are one): what float16 can't hold. The
// smallest products come first.
template <bool EXACT_ROWS, bool EXACT_X, int TILES>
__device__ __forceinline__ void multiply_wide(
    float (&c)[TILES][4], float (&low)[8], float (&high)[8], float (&x)[TILES][8]) {
  // Two elements after two others: all of them at once are more numbers than there are registers.
#pragma unroll 1
  for (int i = 0; i < 8; i += 2) {
    const float rows[4] = {low[0], high[0], low[1], high[1]};
    uint32_t a[4], rest[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) split<EXACT_ROWS>(a[j], rest[j], rows[j]);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      uint32_t b[2], rest_b[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) split<EXACT_X>(b[j], rest_b[j], x[tile][j]);
      if constexpr (!EXACT_ROWS) ptx::multiply_tf32(c[tile], rest, b[0], b[1]);
      if constexpr (!EXACT_X) ptx::multiply_tf32(c[tile], a, rest_b[0], rest_b[1]);
      ptx::multiply_tf32(c[tile], a, b[0], b[1]);
      next_two(x[tile]);
    }
    next_two(low);
    next_two(high);
  }
}

__device__ __forceinline__ uint4 pack_bf16(const float (&x)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The same for a matrix of R beside x of T: R is T or float. bfloat16 x takes a float32 factor rounded, as every
// backend has it, float16 x takes it whole.
template <class T, class R, int TILES>
__device__ __forceinline__ void multiply_rows(
    float (&c)[TILES][4], const uint4 (&low)[sizeof(R) / 2], const uint4 (&high)[sizeof(R) / 2],
    const uint4 (&x)[TILES][1]) {
  if constexpr (sizeof(R) == sizeof(T)) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) multiply<T, true>(c[tile], low[0], high[0], x[tile][0]);
  } else {
    float rows[2][8];
    unpack_8<R>(rows[0], low);
    unpack_8<R>(rows[1], high);
    if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
      const uint4 packed[2] = {pack_bf16(rows[0]), pack_bf16(rows[1])};
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) multiply<T, true>(c[tile], packed[0], packed[1], x[tile][0]);
    } else {
      float tokens[TILES][8];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) unpack_8<T>(tokens[tile], x[tile]);
      multiply_wide<false, true>(c, rows[0], rows[1], tokens);
    }
  }
}

// Sums of 16 · ROW_TILES rows with tiles of 8 tokens, as mma has them: of (tile of rows, tile of tokens) rows are
// 16·tile + g (elements 0, 1) and + 8 (2, 3), tokens 8·tile + 2t + 0, 1.
template <int TOKENS, int ROW_TILES>
struct MmaSums {
  static constexpr bool kBusy = false;
  static constexpr int kParts = kWarps, kTiles = TOKENS / 8, kRowTiles = ROW_TILES, kRows = 16 * kRowTiles;
  using Sums = float[kRowTiles][kTiles][4];
  using Spill = Spilled<TOKENS, kParts>;

  // The first tile of rows goes behind the others: loops over them needn't be unrolled.
  static __device__ __forceinline__ void next_rows(Sums& sums) {
#pragma unroll
    for (int part = 0; part < kTiles; ++part) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float first = sums[0][part][e];
#pragma unroll
        for (int tile = 1; tile < kRowTiles; ++tile) sums[tile - 1][part][e] = sums[tile][part][e];
        sums[kRowTiles - 1][part][e] = first;
      }
    }
  }

  // As rows `first` and so on.
  static __device__ __forceinline__ void spill(const Sums& sums, float* to, int first = 0) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int part = 0; part < kTiles; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[Spill::index(warp, 8 * part + 2 * t + i % 2, first + 16 * tile + 8 * (i / 2) + g)] =
              sums[tile][part][i];
        }
      }
    }
  }
};

// A matrix of R beside x of T. A warp takes 32 elements along K of every kBlock. Tensor cores cut off bits of long sums;
// short ones are added up APART where all bits of float32 count.
template <class T, class R, int TOKENS, bool APART>
class MmaStream : public MmaSums<TOKENS, sizeof(R) == sizeof(T) ? TOKENS / 8 : 1> {
  // As many tiles of rows as of tokens, but where registers are short.
  using Own = MmaSums<TOKENS, sizeof(R) == sizeof(T) ? TOKENS / 8 : 1>;

 public:
  using Own::kRowTiles, Own::kTiles, Own::next_rows;
  using typename Own::Sums;

  __device__ __forceinline__ void start(const Rows& rows, const Rows& x, int64_t begin, int64_t end) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    steps_ = steps(rows, x, begin, end);
    const int64_t k = begin + own(threadIdx.x);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      row_[tile][0] = rows.at<R>(16 * tile + g, k);
      row_[tile][1] = rows.at<R>(16 * tile + 8 + g, k);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) x_[tile] = x.at<T>(8 * tile + g, k);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      stages_[d] = {};
      if (d < steps_) load(stages_[d], d);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) tokens_[tile][0] = {};
    if (steps_ > 0) load_x(0);
  }

  __device__ __forceinline__ void run(Sums& sums) {
    while (steps_ >= 2 * kDepth) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        consume(sums, stages_[d]);
        load(stages_[d], d + kDepth);
        load_x(d + 1);
      }
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        row_[tile][0] += kDepth * kBlock;
        row_[tile][1] += kDepth * kBlock;
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) x_[tile] += kDepth * kBlock;
      steps_ -= kDepth;
    }
  }

  __device__ __forceinline__ void drain(Sums& sums) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (d >= steps_) continue;
      consume(sums, stages_[d]);
      if (d + kDepth < steps_) load(stages_[d], d + kDepth);
      if (d + 1 < steps_) load_x(d + 1);
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (d + kDepth >= steps_) continue;
      consume(sums, stages_[d]);
      if (d + kDepth + 1 < steps_) load_x(d + kDepth + 1);
    }
  }

  // Of the same arguments as `start`: what is left over, or all of it if rows can't be loaded 16 bytes at once.
  static __device__ __forceinline__ void rest(
      Sums& sums, const Rows& rows, const Rows& x, int64_t begin, int64_t end) {
    const int thread = ptx::again(threadIdx.x), g = thread % 32 / 4, mine = own(thread);
    for (int64_t k = begin + static_cast<int64_t>(steps(rows, x, begin, end)) * kBlock; k + mine / 32 * 32 < end;
         k += kBlock) {
      const int64_t at = k + mine;
      const int count = end - at < 8 ? static_cast<int>(end - at) : 8;
#pragma unroll 1
      for (int tile = 0; tile < kRowTiles; ++tile) {
        uint4 low[kWords], high[kWords], tokens[kTiles][1];
#pragma unroll 1
        for (int i = 0; i < 8; i += 2) {
          shift_in<R>(low, rows.at<R>(16 * tile + g, at), rows.col, count, i);
          shift_in<R>(high, rows.at<R>(16 * tile + 8 + g, at), rows.col, count, i);
#pragma unroll
          for (int part = 0; part < kTiles; ++part) {
            shift_in<T>(tokens[part], x.at<T>(8 * part + g, at), x.col, count, i);
          }
        }
        multiply_apart(sums[0], low, high, tokens);
        next_rows(sums);
      }
    }
  }

 private:
  // Steps in flight. Of W it is 32 KB a CTA, and 48 KB with 32 rows; of A there is less to do.
  static constexpr int kMost = TOKENS == 8 ? 4 : 3, kLess = (sizeof(R) == sizeof(T) ? 1 : 2) * (APART ? 2 : 1);
  static constexpr int kDepth = kMost > kLess ? kMost / kLess : 1;
  static constexpr int kWords = sizeof(R) / 2;

  struct Stage {
    uint4 rows[kRowTiles][2][kWords];
  };

  static __device__ __forceinline__ int steps(const Rows& rows, const Rows& x, int64_t begin, int64_t end) {
    return rows.vector && x.vector ? static_cast<int>((end - begin) / kBlock) : 0;
  }

  // Where the lane's eight elements of a block are.
  static __device__ __forceinline__ int own(int thread) { return thread / 32 * 32 + 8 * (thread % 4); }

  __device__ __forceinline__ void load(Stage& stage, int step) const {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        stage.rows[tile][0][i] = ptx::load_once(row_[tile][0] + step * kBlock + 16 / sizeof(R) * i);
        stage.rows[tile][1][i] = ptx::load_once(row_[tile][1] + step * kBlock + 16 / sizeof(R) * i);
      }
    }
  }

  // One step ahead: x comes from L2, which is near.
  __device__ __forceinline__ void load_x(int step) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) tokens_[tile][0] = ptx::load_constant(x_[tile] + step * kBlock);
  }

  __device__ __forceinline__ void consume(Sums& sums, const Stage& stage) const {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      multiply_apart(sums[tile], stage.rows[tile][0], stage.rows[tile][1], tokens_);
    }
  }

  static __device__ __forceinline__ void multiply_apart(
      float (&c)[kTiles][4], const uint4 (&low)[kWords], const uint4 (&high)[kWords],
      const uint4 (&x)[kTiles][1]) {
    if constexpr (APART) {
      float added[kTiles][4] = {};
      multiply_rows<T, R>(added, low, high, x);
#pragma unroll
      for (int part = 0; part < kTiles; ++part) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[part][e] += added[part][e];
      }
    } else {
      multiply_rows<T, R>(c, low, high, x);
    }
  }

  Stage stages_[kDepth];
  uint4 tokens_[kTiles][1];
  const R* row_[kRowTiles][2];
  const T* x_[kTiles];
  int steps_;  // of all warps, that are left
};

#endif

// A matrix of R beside x of T, any of both, summed in float32. A warp has four rows and all tokens; its lanes share K,
// 16 bytes of the matrix each. What a warp loads of x, the others that have other rows find in L1.
template <class T, class R, int TOKENS, bool>
class FmaStream {
  static constexpr int kOwn = 4, kGroups = rows_of(TOKENS) / kOwn;  // rows of a warp, and warps that have others

 public:
  static constexpr bool kBusy = false;
  static constexpr int kRows = rows_of(TOKENS), kParts = kWarps / kGroups;
  using Sums = float[kOwn][TOKENS];
  using Spill = Spilled<TOKENS, kParts>;

  __device__ __forceinline__ void start(const Rows& rows, const Rows& x, int64_t begin, int64_t end) {
    left_ = begin;
    tokens_ = x;
    steps_ = steps(rows, x, begin, end);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) row_[i] = rows.at<R>(kOwn * group() + i, begin + own());
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
        consume(sums, stages_[d], left_ + d * kStep);
        load(stages_[d], d + kDepth);
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) row_[i] += kDepth * kStep;
      left_ += kDepth * kStep;
      steps_ -= kDepth;
    }
  }

  __device__ __forceinline__ void drain(Sums& sums) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (d >= steps_) continue;
      consume(sums, stages_[d], left_ + d * kStep);
      if (d + kDepth < steps_) load(stages_[d], d + kDepth);
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (d + kDepth < steps_) consume(sums, stages_[d], left_ + (d + kDepth) * kStep);
    }
  }

  static __device__ __forceinline__ void rest(
      Sums& sums, const Rows& rows, const Rows& x, int64_t begin, int64_t end) {
    const int64_t first = begin + static_cast<int64_t>(steps(rows, x, begin, end)) * kStep;
    for (int64_t k = first + own(); k < end; k += kStep) {
      const int count = end - k < kEach ? static_cast<int>(end - k) : kEach;
#pragma unroll 1
      for (int j = 0; j < count; ++j) {
        float values[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) values[i] = to_float(*rows.at<R>(kOwn * group() + i, k + j));
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
          if (token > x.last) continue;
          const float one = to_float(*x.at<T>(token, k + j));
#pragma unroll
          for (int i = 0; i < kOwn; ++i) sums[i][token] = fmaf(values[i], one, sums[i][token]);
        }
      }
    }
  }

  // The lanes' sums are added up first.
  __device__ __forceinline__ void spill(Sums& sums, float* to, int first = 0) const {
    constexpr int kValues = kOwn * TOKENS, kLeft = kValues / 32;
    float values[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = sums[i / TOKENS][i % TOKENS];
    add_lanes<16, kValues / 2>(values);
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const int value = kLeft * (threadIdx.x % 32) + i;
      to[Spill::index(threadIdx.x / 32 / kGroups, value % TOKENS, first + kOwn * group() + value / TOKENS)] =
          values[i];
    }
  }

 private:
  static constexpr int kEach = 16 / sizeof(R), kDepth = sizeof(R) == 4 ? 2 : 1;
  static constexpr int kStep = 32 * kEach * kParts;  // elements along K of a step of all warps

  struct Stage {
    uint4 rows[kOwn];
  };

  static __device__ __forceinline__ int steps(const Rows& rows, const Rows& x, int64_t begin, int64_t end) {
    return rows.vector && x.vector ? static_cast<int>((end - begin) / kStep) : 0;
  }

  static __device__ __forceinline__ int group() { return threadIdx.x / 32 % kGroups; }
  static __device__ __forceinline__ int own() {
    return (threadIdx.x / 32 / kGroups * 32 + threadIdx.x % 32) * kEach;
  }

  __device__ __forceinline__ void load(Stage& stage, int step) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) stage.rows[i] = ptx::load_once(row_[i] + step * kStep);
  }

  // Of 2·HALF values a lane hands one half to another, which hands it the other half, and so on: all lanes' sums of
  // value i become those of lane i / (VALUES / 32).
  template <int OFFSET, int HALF, int VALUES>
  static __device__ __forceinline__ void add_lanes(float (&values)[VALUES]) {
    const bool upper = (threadIdx.x & OFFSET) != 0;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      const float mine = upper ? values[i + HALF] : values[i], other = upper ? values[i] : values[i + HALF];
      values[i] = mine + __shfl_xor_sync(0xFFFFFFFFu, other, OFFSET);
    }
    if constexpr (OFFSET > 1) add_lanes<OFFSET / 2, HALF / 2>(values);
  }

  static __device__ __forceinline__ void accumulate(
      Sums& sums, int token, const float (&values)[kOwn][kEach], const float (&x)[kEach]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) sums[i][token] = fmaf(values[i][j], x[j], sums[i][token]);
    }
  }

  __device__ __forceinline__ void consume(Sums& sums, const Stage& stage, int64_t k) const {
    constexpr int kPer = 4 / sizeof(R);
    float values[kOwn][kEach];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint32_t words[4] = {stage.rows[i].x, stage.rows[i].y, stage.rows[i].z, stage.rows[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float numbers[kPer];
        unpack<R>(numbers, words[j]);
#pragma unroll
        for (int h = 0; h < kPer; ++h) values[i][kPer * j + h] = numbers[h];
      }
    }
    const T* from = tokens_.at<T>(0, k + own());
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      if (token > tokens_.last) continue;
      float x[kEach];
      load_x(x, from);
      accumulate(sums, token, values, x);
      from += tokens_.row;
    }
  }

  static __device__ __forceinline__ void load_x(float (&to)[kEach], const T* from) {
    constexpr int kWords = kEach * sizeof(T) / 4, kPer = 4 / sizeof(T);
    uint32_t words[kWords];
    if constexpr (kWords == 4) {
      const uint4 v = ptx::load_constant(from);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
      words[0] = v.x, words[1] = v.y;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float numbers[kPer];
      unpack<T>(numbers, words[i]);
#pragma unroll
      for (int h = 0; h < kPer; ++h) to[kPer * i + h] = numbers[h];
    }
  }

  Stage stages_[kDepth];
  const R* row_[kOwn];
  Rows tokens_;
  int64_t left_;  // the element along K at which the steps begin that are left
  int steps_;
};

}  // namespace lorafast::cuda::decode
