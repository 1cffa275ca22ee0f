// The factors of a low-rank term beside the operands of a GEMM: s [M, r], B [N, r] or Bᵀ [r, N], of any dtype and
// strides, laid in shared memory in chunks of 16 bytes along their rows, rounded or split.
#pragma once

#include <cstdint>
#include <type_traits>

#include "arguments.h"
#include "eight.cuh"
#include "numbers.cuh"
#include "ptx.cuh"

namespace lorafast::cuda {

constexpr int kChunk = 16;  // bytes

// Where chunk `chunk` of a row lies in it, so that what a warp loads at a time lies in all banks: eight rows of a matrix
// of ldmatrix, or four of words (kWords). Two rows of 64 bytes share the banks that others have alone. With 128 bytes it
// is what TMA and wgmma call a swizzle of 128 bytes.
template <int kRowBytes, bool kWords = false>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0, "rows fill the banks");
  if (kWords) return chunk ^ 2 * (row & 3);
  return kRowBytes == 64 ? chunk ^ (row / 2 & 3) : chunk ^ (row & 7);
}

// A matrix of adapters, or of s. Strides are in elements.
struct Factor {
  const void* from;
  int64_t rows, columns, row, col;
  Dtype type;
  bool vector;  // eight elements of a row lie together, rows are aligned to 16 bytes, and columns have no rest
};

inline Factor factor_of(const MatrixView& matrix) {
  const int64_t size = matrix.type == Dtype::float32 ? 4 : 2;
  Factor f{matrix.from, matrix.rows, matrix.columns, matrix.row, matrix.column, matrix.type, false};
  f.vector = f.col == 1 && f.columns % 8 == 0 && aligned(f.from, f.rows > 1 ? f.row * size : 0, kChunk);
  return f;
}

inline Factor factor_of(const Tensor& matrix) { return factor_of(view_of(matrix)); }

// Neighbours of a row as they lie in memory; zeros beyond the matrix. A factor that is `vector` has them in one load or
// two.
template <class S, int kElements>
struct Neighbours {
  static constexpr int kEach = kElements * static_cast<int>(sizeof(S)) >= 16 ? 4 : 2;  // words of a load
  static constexpr int kLoads = kElements * static_cast<int>(sizeof(S)) / (4 * kEach);
  using Words = std::conditional_t<kEach == 4, uint4, uint2>;

  Words words[kLoads];

  __device__ __forceinline__ void load(const Factor& f, int64_t row, int64_t column) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) words[i] = {};
    if (row >= f.rows || column >= f.columns) return;
    const S* at = static_cast<const S*>(f.from) + row * f.row + column;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) words[i] = reinterpret_cast<const Words*>(at)[i];
  }

  __device__ __forceinline__ void as_floats(float (&to)[kElements]) const {
    const S* const of = reinterpret_cast<const S*>(words);
#pragma unroll
    for (int i = 0; i < kElements; ++i) to[i] = to_float(of[i]);
  }
};

// The same of any factor, each loaded by itself: as bits, so that none waits for the one before.
template <class S, int kElements>
struct Elements {
  using Bits = std::conditional_t<sizeof(S) == 2, uint16_t, uint32_t>;

  Bits bits[kElements];

  __device__ __forceinline__ void load(const Factor& f, int64_t row, int64_t column) {
    const Bits* at = static_cast<const Bits*>(f.from) + row * f.row + column * f.col;
    const int64_t count = row < f.rows ? f.columns - column : 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i, at += f.col) bits[i] = i < count ? *at : Bits{0};
  }

  __device__ __forceinline__ void as_floats(float (&to)[kElements]) const {
    const S* const of = reinterpret_cast<const S*>(bits);
#pragma unroll
    for (int i = 0; i < kElements; ++i) to[i] = to_float(of[i]);
  }
};

// The chunks of a block that kThreads threads lay: kAcross of them side by side, rows of a column of chunks, or (kAlong)
// chunks of a row; the others follow.
template <int kThreads, int kAcross, bool kAlong>
struct FactorBlock {
  int64_t row, column;  // of the factor, its first
  int others;
  int thread;

  __device__ __forceinline__ int count() const { return others * kAcross; }
  __device__ __forceinline__ int row_of(int i) const { return kAlong ? i / kAcross : i % kAcross; }
  __device__ __forceinline__ int chunk_of(int i) const { return kAlong ? i % kAcross : i / kAcross; }

  // Each chunk of E, put(row, chunk, rounded(its elements)). Of kBatch chunks the loads are on their way together.
  template <class E, int kBatch, class Rounded, class Put>
  __device__ __forceinline__ void load(const Factor& f, const Rounded& rounded, const Put& put) const {
    switch (f.type) {
      case Dtype::bfloat16: load_of<bfloat16, E, kBatch>(f, rounded, put); break;
      case Dtype::float16: load_of<float16, E, kBatch>(f, rounded, put); break;
      default: load_of<float, E, kBatch>(f, rounded, put);
    }
  }

  template <class S, class E, int kBatch, class Rounded, class Put>
  __device__ __forceinline__ void load_of(const Factor& f, const Rounded& rounded, const Put& put) const {
    constexpr int kElements = kChunk / static_cast<int>(sizeof(E));
    if constexpr (kBatch > 0) {
      if (f.vector) return load_batches<Neighbours<S, kElements>, E, kBatch>(f, rounded, put);
    }
    constexpr int kFew = kElements * kBatch > 12 ? 12 / kElements : kBatch;  // in registers, each in one
    load_batches<Elements<S, kElements>, E, kFew == 0 ? 1 : kFew>(f, rounded, put);
  }

  template <class Loaded, class E, int kBatch, class Rounded, class Put>
  __device__ __forceinline__ void load_batches(const Factor& f, const Rounded& rounded, const Put& put) const {
    constexpr int kElements = kChunk / static_cast<int>(sizeof(E));
    float x[kElements];
#pragma unroll 1
    for (int i = thread; i < count(); i += kBatch * kThreads) {
      Loaded of[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int at = i + j * kThreads;
        of[j].load(f, row + row_of(at), at < count() ? column + kElements * chunk_of(at) : f.columns);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int at = i + j * kThreads;
        if (at >= count()) break;
        of[j].as_floats(x);
        put(row_of(at), chunk_of(at), rounded(x));
      }
    }
  }

  // The same of a factor whose chunks are as they shall be, by cp.async: copied to address(row, chunk).
  template <class E, class Address>
  __device__ __forceinline__ void copy(const Factor& f, const Address& address) const {
    constexpr int kElements = kChunk / static_cast<int>(sizeof(E));
#pragma unroll 1
    for (int i = thread; i < count(); i += kThreads) {
      const int64_t at_row = row + row_of(i), at_column = column + kElements * chunk_of(i);
      const bool inside = at_row < f.rows && at_column < f.columns;
      const int64_t at = inside ? at_row * f.row + at_column : 0;
      ptx::copy_16_to(address(row_of(i), chunk_of(i)), static_cast<const E*>(f.from) + at, inside ? kChunk : 0);
    }
  }
};

// A chunk of 16 bits.
template <class E>
struct RoundedChunk {
  float scale = 1.0f;

  __device__ __forceinline__ uint4 operator()(const float (&v)[8]) const {
    return make_uint4(two(v[0], v[1]), two(v[2], v[3]), two(v[4], v[5]), two(v[6], v[7]));
  }
  __device__ __forceinline__ uint32_t two(float low, float high) const {
    return pack_two<E>(low * scale, high * scale);
  }
};

// A chunk of TF32.
struct NearestTf32Chunk {
  __device__ __forceinline__ uint4 operator()(const float (&v)[4]) const {
    return make_uint4(nearest_tf32(v[0]), nearest_tf32(v[1]), nearest_tf32(v[2]), nearest_tf32(v[3]));
  }
};

}  // namespace lorafast::cuda
