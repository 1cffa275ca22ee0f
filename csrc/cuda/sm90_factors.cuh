// The factors of a low-rank term as wgmma multiplies them: 16 bytes of s and of B, rounded or split.
//
// float16 has a float32 s. It is multiplied as TF32, in two products, three beside a float32 B: in as many steps.
#pragma once

#include "eight.cuh"
#include "sm90_ring.cuh"
#include "tf32.cuh"

namespace lorafast::cuda {

constexpr int kSm90Writers = 96, kSm90WritersMeet = 3;  // threads, and the barrier at which they meet

// How the low-rank term of y in T is multiplied: 128 bytes of ranks a step.
template <class T>
using Sm90Factor = std::conditional_t<DtypeOf<T>::value == Dtype::bfloat16, bfloat16, float>;
template <class T>
constexpr int kSm90Ranks = kSm90Row / static_cast<int>(sizeof(Sm90Factor<T>));

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Those of y in T.
template <class T>
struct Sm90Factors {
  using Factor = Sm90Factor<T>;
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(Factor));  // ranks

  const Sm90Params& p;

  // Products of 32 bytes of ranks, from `rank` on to the end of its step.
  __device__ __forceinline__ int substeps(int rank) const {
    const int left = p.r - rank, of = left < kSm90Ranks<T> ? left : kSm90Ranks<T>;
    return (of + 2 * kChunk - 1) / (2 * kChunk);
  }

  // Writes B's rows from `column` on, and s' rows from `row` on, to a stage: so many chunks of 16 bytes from `rank` on.
  // They are there after `settle`. `part`: of TF32, whose last part is the nearest numbers, and those before it have one
  // factor's rest; there the other factor is 0 where it is infinite: the last part says it all.
  template <int kRows>
  __device__ __forceinline__ void write_b(
      uint32_t tile, int column, int rank, int chunks, int part, int thread) const {
    const Matrix from = {p.b, p.b_row, p.b_col, p.N, p.vector_b};
    const auto write = [&](auto element) {
      using E = decltype(element);
      copy<kRows, E>(tile, from, column, rank, chunks, thread, [&](const Chunk& c) { return b_bits<E>(c, part); });
    };
    if (copied_b()) copy_as_it_is<kRows>(tile, from, column, rank, chunks, thread);
    else if (p.b_type == Dtype::bfloat16) write(bfloat16());
    else if (p.b_type == Dtype::float16) write(float16());
    else write(float());
  }

  template <int kRows>
  __device__ __forceinline__ void write_s(
      uint32_t tile, int row, int rank, int chunks, int part, int thread) const {
    const Matrix from = {p.s, p.s_row, p.s_col, p.M, p.vector_s};
    if (kTogether && p.vector_s) {
      copy_as_it_is<kRows>(tile, from, row, rank, chunks, thread);
    } else {
      copy<kRows, Factor>(tile, from, row, rank, chunks, thread, [&](const Chunk& c) { return s_bits(c, part); });
    }
  }

  // What this thread has copied is there; of B it is scaled.
  template <int kRows>
  __device__ __forceinline__ void settle(uint32_t b_tile, int chunks, int thread) const {
    ptx::commit_copies();
    ptx::wait_for_copies<0>();
    if (!copied_b() || p.factor_scale == 1.0f) return;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const uint32_t first = chunk_at(b_tile, thread, chunk);
#pragma unroll
      for (int i = 0; i < kEach<kRows>; ++i) {
        if (thread + i * kSm90Writers >= kRows) break;
        const uint32_t to = first + i * kApart;
        uint4 v = ptx::load_shared_16(to);
        uint32_t* const words = &v.x;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float low = __uint_as_float(words[w] << 16), high = __uint_as_float(words[w] & 0xFFFF0000u);
          words[w] = pack_two<bfloat16>(low * p.factor_scale, high * p.factor_scale);
        }
        ptx::store_shared_16(to, v);
      }
    }
  }

 private:
  // Where a factor comes from. `vector`: by 16 bytes at once, also of a row's last ranks.
  struct Matrix {
    const void* from;
    int64_t row, col;
    int32_t rows;
    bool vector;
  };

  // The elements of a chunk, a word each; of 16 bits that are loaded at once two in each of the first words.
  struct Chunk {
    uint32_t words[kChunk];
  };

  // A thread has every 96th row, with the same place in the swizzle. So many of them:
  template <int kRows>
  static constexpr int kEach = (kRows + kSm90Writers - 1) / kSm90Writers;
  static constexpr int kApart = kSm90Writers * kSm90Row;
  static_assert(kSm90Writers % 8 == 0, "the swizzle has eight rows");

  // A use of what was loaded waits for it, and nothing that the compiler knows passes a store to shared memory: so
  // first come the loads of a chunk of all its rows.
  template <int kRows, class E, class Bits>
  __device__ __forceinline__ void copy(
      uint32_t tile, const Matrix& from, int first, int rank, int chunks, int thread, const Bits& bits) const {
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      Chunk rows[kEach<kRows>];
#pragma unroll
      for (int i = 0; i < kEach<kRows>; ++i) {
        const int row = thread + i * kSm90Writers;
        if (row < kRows) load<E>(rows[i], from, first + row, rank + chunk * kChunk);
      }
      const uint32_t to = chunk_at(tile, thread, chunk);
#pragma unroll
      for (int i = 0; i < kEach<kRows>; ++i) {
        if (thread + i * kSm90Writers < kRows) ptx::store_shared_16(to + i * kApart, bits(rows[i]));
      }
    }
  }

  // The same of 16 bytes that are multiplied as they are: without registers, all of them are under way together.
  template <int kRows>
  __device__ __forceinline__ void copy_as_it_is(
      uint32_t tile, const Matrix& from, int first, int rank, int chunks, int thread) const {
    const auto* const source = static_cast<const uint16_t*>(from.from) + rank;
#pragma unroll
    for (int i = 0; i < kEach<kRows>; ++i) {
      const int row = thread + i * kSm90Writers;
      if (row >= kRows) break;
      const bool there = first + row < from.rows;
      const uint16_t* at = source + (there ? (first + row) * from.row : 0);
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk, at += kChunk) {
        const bool copied = there && rank + chunk * kChunk < p.r;
        ptx::copy_16_to(chunk_at(tile, row, chunk), copied ? at : source, copied ? 16 : 0);
      }
    }
  }

  __device__ __forceinline__ bool copied_b() const {
    return kTogether && p.vector_b && p.b_type == Dtype::bfloat16;
  }

  // Rows and ranks that there aren't are 0.
  template <class E>
  __device__ __forceinline__ void load(Chunk& to, const Matrix& from, int row, int rank) const {
    using Word = std::conditional_t<sizeof(E) == 2, uint16_t, uint32_t>;
    const bool there = row < from.rows;
    const auto* at = static_cast<const Word*>(from.from) + row * from.row + rank * from.col;
    if (kTogether && from.vector) {
      constexpr int kLoads = kChunk * static_cast<int>(sizeof(E)) / 16;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (there && rank < p.r) v = reinterpret_cast<const uint4*>(at)[i];
        uint32_t* const words = to.words + 4 * i;
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      }
    } else if (there && rank + kChunk <= p.r) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i, at += from.col) to.words[i] = *at;
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        Word word = 0;
        if (there && rank + i < p.r) word = at[i * from.col];
        to.words[i] = word;
      }
    }
  }

  // Whether a chunk is as many elements as 16 bytes of 16 bits, as which alone they are loaded at once.
  static constexpr bool kTogether = kChunk == 8;

  // Element i of a chunk, in E.
  template <class E>
  static __device__ __forceinline__ float element(const Chunk& of, int i, bool vector) {
    if constexpr (sizeof(E) == 4) {
      return __uint_as_float(of.words[i]);
    } else {
      const bool two = kTogether && vector;
      const uint32_t bits = two ? of.words[i / 2] >> (16 * (i % 2)) & 0xFFFF : of.words[i];
      if constexpr (std::is_same_v<E, bfloat16>) return __uint_as_float(bits << 16);
      else return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    }
  }

  __device__ __forceinline__ uint4 s_bits(const Chunk& of, int part) const {
    uint4 v = make_uint4(0, 0, 0, 0);
    uint32_t* const words = &v.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<Factor, bfloat16>) {
        words[i] = p.vector_s ? of.words[i] : of.words[2 * i] | of.words[2 * i + 1] << 16;
      } else {
        const Tf32Pair pair = split_tf32(__uint_as_float(of.words[i]) * p.factor_scale);
        words[i] = part == 0 ? pair.low : part == p.parts - 1 ? pair.high : finite(pair.high);
      }
    }
    return v;
  }

  template <class E>
  __device__ __forceinline__ uint4 b_bits(const Chunk& of, int part) const {
    uint4 v = make_uint4(0, 0, 0, 0);
    uint32_t* const words = &v.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<Factor, bfloat16>) {
        const float low = element<E>(of, 2 * i, p.vector_b), high = element<E>(of, 2 * i + 1, p.vector_b);
        words[i] = pack_two<bfloat16>(low * p.factor_scale, high * p.factor_scale);
      } else {
        const Tf32Pair pair = split_tf32(element<E>(of, i, p.vector_b));
        words[i] = part == p.parts - 1 ? pair.high : part == 0 ? finite(pair.high) : pair.low;
      }
    }
    return v;
  }

  static __device__ __forceinline__ uint32_t finite(uint32_t x) {
    return fabsf(__uint_as_float(x)) < __uint_as_float(0x7F800000u) ? x : 0u;
  }
};

#endif

}  // namespace lorafast::cuda
