// The operands of a GEMM in shared memory: where 16-byte chunks of a block lie, who copies them, and how a warp loads
// them as fragments of mma.sync. Sizes are in bytes: 16 bits and TF32 lie alike, an mma.sync takes 32 bytes of K.
//
// Chunks of a row are exchanged by an XOR with its number, so that what a warp loads at a time lies in all banks: eight
// rows of a matrix of ldmatrix, or four of words. The chunks that eight lanes copy do, too.
#pragma once

#include <cstdint>

#include "factors.cuh"
#include "ptx.cuh"

namespace lorafast::cuda {

constexpr int kStepBytes = 32;  // of K, that an mma.sync takes

// A thread's part of the copies by kThreads of a matrix into blocks of kRows rows of kRowBytes: one chunk of every
// kApart-th row.
// kAlong: whether blocks follow each other along the rows, else down the columns. kWords: as `swizzled` has it.
template <int kThreads, int kRows, int kRowBytes, bool kAlong, bool kWords = false>
struct BlockCopies {
  static constexpr int kChunks = kRowBytes / kChunk, kApart = kThreads / kChunks, kCount = kRows / kApart;
  static_assert(
      kApart % (kWords ? 4 : 8) == 0 && kRows % kApart == 0, "a thread's chunks lie at one place of their rows");

  const char* from;  // what is copied next
  int to;            // in a block, of the first of them
  int inside;  // rows of the thread that the block has, from this one on; of all blocks where they follow down
  int left;    // bytes of a row from the thread's chunk on

  // The first block begins at `matrix`, of which `rows` and `bytes` of each are left.
  __device__ __forceinline__ BlockCopies(const void* matrix, int64_t row_bytes, int64_t rows, int64_t bytes) {
    const int row = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
    from = static_cast<const char*>(matrix) + row * row_bytes + kChunk * chunk;
    to = row * kRowBytes + kChunk * swizzled<kRowBytes, kWords>(row, chunk);
    const int64_t count = (rows - row + kApart - 1) / kApart, of_chunk = bytes - kChunk * chunk;
    constexpr int64_t kMost = INT32_MAX;
    inside = static_cast<int>(count < 0 ? 0 : count > kMost ? kMost : count);
    left = static_cast<int>(of_chunk < 0 ? 0 : of_chunk > kMost ? kMost : of_chunk);
  }

  // Part `part` of kParts of the next block, of which the last one goes on to the block after it; zeros beyond the
  // matrix. `apart`: bytes from one of the thread's rows to the next.
  template <int kParts>
  __device__ __forceinline__ void start(uint32_t block, int part, int64_t apart) {
    constexpr int kEach = kCount / kParts;
    static_assert(kCount % kParts == 0, "parts are alike");
    const int bytes = left < kChunk ? left : kChunk;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = part * kEach + i;
      ptx::copy_16_to(block + to + at * (kApart * kRowBytes), from, at < inside ? bytes : 0);
      from += apart;
    }
    if (part + 1 < kParts) return;
    if constexpr (kAlong) {
      from += kRowBytes - kCount * apart;
      left = left < kRowBytes ? 0 : left - kRowBytes;
    } else {
      inside = inside < kCount ? 0 : inside - kCount;
    }
  }
};

// Fragments of a block whose rows are the matrix's, kRowBytes along K. Rows from the warp's first one on.
//   of A: lanes 0 to 15 give the rows of the first 16 bytes, the others those of the next;
//   of B: two n8 tiles; lanes 0 to 7 give rows of the first 16 bytes, 8 to 15 the next, 16 to 31 the other tile's.
template <int kRowBytes>
struct FragmentsAlongK {
  uint32_t row, flip;

  __device__ static __forceinline__ FragmentsAlongK of_a(int first) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return at(first + lane % 16, lane / 16);
  }
  __device__ static __forceinline__ FragmentsAlongK of_b(int first) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return at(first + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }
  __device__ static __forceinline__ FragmentsAlongK at(int row, int chunk) {
    // Chunk 2·step + `chunk` lies at its XOR with what the row says: of the steps the XOR is by itself.
    return {
        static_cast<uint32_t>(row * kRowBytes), static_cast<uint32_t>(kChunk * swizzled<kRowBytes>(row, chunk))};
  }

  // The i-th 16 rows, step `step`.
  __device__ __forceinline__ void load(uint32_t (&to)[4], uint32_t block, int i, int step) const {
    ptx::load_matrices_at(
        to, block + row + (flip ^ static_cast<uint32_t>(kStepBytes * step)) + i * (16 * kRowBytes));
  }
};

// The same of B, of 16 bits, where the block's rows lie along N: kRowBytes of them, as many rows as K has elements.
template <int kRowBytes>
struct FragmentsAlongN {
  uint32_t row, flip;

  __device__ static __forceinline__ FragmentsAlongN of_b(int first) {
    const int lane = static_cast<int>(threadIdx.x % 32), k = lane % 16;
    return {
        static_cast<uint32_t>(k * kRowBytes),
        static_cast<uint32_t>(kChunk * swizzled<kRowBytes>(k, first / 8 + lane / 16))};
  }

  __device__ __forceinline__ void load(uint32_t (&to)[4], uint32_t block, int i, int step) const {
    // A warp begins at a multiple of its columns: two chunks of it are further by an XOR.
    ptx::load_matrices_transposed_at(
        to, block + row + (flip ^ static_cast<uint32_t>(2 * kChunk * i)) + step * (16 * kRowBytes));
  }
};

// The same of B in float32, a word at a time: ldmatrix transposes 16 bits alone.
template <int kRowBytes>
struct WordsAlongN {
  uint32_t row, flip;

  __device__ static __forceinline__ WordsAlongN of_b(int first) {
    const int g = static_cast<int>(threadIdx.x % 32 / 4), k = static_cast<int>(threadIdx.x % 4);
    return {
        static_cast<uint32_t>(k * kRowBytes + 4 * (g % 4)),
        static_cast<uint32_t>(kChunk * swizzled<kRowBytes, true>(k, first / 4 + g / 4))};
  }

  __device__ __forceinline__ void load(uint32_t (&to)[4], uint32_t block, int i, int step) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Computed again each time: registers are scarce.
      const uint32_t turned = static_cast<uint32_t>(ptx::again(static_cast<int>(flip)));
      const uint32_t at =
          block + row + (turned ^ static_cast<uint32_t>(2 * kChunk * (2 * i + half))) + step * (8 * kRowBytes);
      to[2 * half] = ptx::load_word_at(at);
      to[2 * half + 1] = ptx::load_word_at(at + 4 * kRowBytes);
    }
  }
};

}  // namespace lorafast::cuda
