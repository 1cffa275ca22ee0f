// A whole layer in one launch: y = x·Wᵀ + scaling · s·Bᵀ + bias and s = drop(x)·Aᵀ, where launches take longer than
// the work.
//
// A CTA of four warps has a tile of y, 64 rows and 32 or 64 columns, and goes through K by blocks of 128 bytes a row in
// a ring of cp.async. The rows of A lie below those of W in each stage: every CTA makes the s of its rows, in
// registers, where they become the first factor of a last step. A warp has 16 rows and all columns, so that no s
// changes hands.
//
// The order of k in a product is free if both factors have the same: a lane's elements of a row in a block are
// neighbours. So one load from shared memory has 16 bytes of two products, and one call of Philox is one lane's.
#include "arguments.h"
#include "operations.h"
#include "small.cuh"

namespace lorafast::cuda {

struct LoraLinearParams {
  const void* x;     // [M, K]
  const void* w;     // [N, K]
  const void* a;     // [r, K] in x's dtype or float32
  const void* b;     // [N, r]
  const void* bias;  // [N] or null
  void* y;           // [M, N], contiguous
  void* s;           // [M, r], contiguous, or null
  Dropout dropout;
  int64_t M, N, K;
  int64_t x_row, x_col, w_row, w_col, a_row, a_col, b_row, b_col, bias_stride;
  int32_t r, stages;
  float scaling;
  Dtype b_type, bias_type;
  bool wide_a;  // A is float32 and x isn't
  bool vector;  // rows of x, W and A are aligned to 16 bytes
  bool vector_y;
};

// Where shared memory holds what. A stage: rows of x, of W, of A; behind all stages B and bias.
struct Places {
  int ranks;  // rounded up to 16
  int a_row;  // bytes
  int stage, b, bias, end;

  __host__ __device__ Places(int r, int columns, int stages, bool wide_a, int b_size)
      : ranks((r + 15) / 16 * 16),
        a_row(wide_a ? 2 * kBlock : kBlock),
        stage((kRows + columns) * kBlock + ranks * a_row),
        b(stages * stage),
        bias(b + columns * (ranks + kPad) * b_size),
        end(bias + columns * 4) {}
};

// Chunks of 16 bytes of a row in a stage: lane t of a quad has `each` neighbours, the i-th of which lies at place
// 4·i + t. Odd rows have the halves of 64 bytes exchanged: the quads of two rows read all banks.
__device__ __forceinline__ int place_of_chunk(int row, int lane, int i) {
  return (4 * i + lane) ^ ((row & 1) << 2);
}

// A thread's part of the copies of a matrix: one chunk of every block, of each of its rows.
template <int kEach>
struct Copies {
  static constexpr int kChunks = 4 * kEach;          // of a row in a block
  static constexpr int kApart = kThreads / kChunks;  // rows from one of its rows to the next
  static_assert(kApart % 2 == 0, "odd rows are laid out otherwise");

  const char* from;  // its first row, in the next block
  int64_t step;      // bytes from one of its rows to the next
  int to;            // where in a stage
  int inside;        // its rows before this one exist
  int left;          // bytes of the rows from the next block's chunk on

  __device__ __forceinline__
  Copies(const void* matrix, int64_t row_bytes, int64_t rows, int64_t length, int stage_offset) {
    // Lanes take chunks in the order of their places: what they write covers all banks, what they read whole rows.
    const int row = static_cast<int>(threadIdx.x) / kChunks, place = static_cast<int>(threadIdx.x) % kChunks;
    const int chunk = place % 4 * kEach + place / 4;
    from = static_cast<const char*>(matrix) + row * row_bytes + 16 * chunk;
    step = kApart * row_bytes;
    to = stage_offset + 16 * (row * kChunks + place_of_chunk(row, place % 4, place / 4));
    const int64_t count = (rows - row + kApart - 1) / kApart;
    inside = static_cast<int>(count < 0 ? 0 : count > kRows ? kRows : count);
    left = static_cast<int>(length) - 16 * chunk;
  }

  // The next block, of which a stage has `rows` rows; zeros beyond the matrix.
  __device__ __forceinline__ void start(char* stage, int rows) {
    const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
    const char* row = from;
#pragma unroll 4
    for (int i = 0; i < rows / kApart; ++i, row += step) {
      ptx::copy_16(stage + to + i * (16 * kChunks * kApart), row, i < inside ? bytes : 0);
    }
    from += 16 * kChunks;
    left -= 16 * kChunks;
  }
};

// The same by elements of kSize bytes, where rows aren't aligned or their elements no neighbours: at once.
template <int kSize, int kEach>
__device__ __forceinline__ void copy_elements(
    char* to, const void* matrix, int rows, int64_t inside, int64_t k, int64_t K, int64_t stride_row,
    int64_t stride_col) {
  constexpr int kChunks = 4 * kEach, kElements = 16 / kSize;
  const auto* const from = static_cast<const char*>(matrix);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    char* const at = to + 16 * (row * kChunks + place_of_chunk(row, chunk / kEach, chunk % kEach));
    const int64_t column = k + chunk * kElements, left = row < inside ? K - column : 0;
    const int bytes = left <= 0 ? 0 : left < kElements ? static_cast<int>(left) * kSize : 16;
    const char* const element = from + (row * stride_row + column * stride_col) * kSize;
    *reinterpret_cast<uint4*>(at) = load_elements<kSize>(element, stride_col * kSize, bytes);
  }
}

// What fills stages: rows of x, W and A from the first of this CTA on, block by block.
template <class T, int kColumns>
struct Filler {
  static constexpr int kSize = sizeof(T), kElements = kBlock / kSize;
  static constexpr int kW = kRows * kBlock, kA = kW + kColumns * kBlock;

  const LoraLinearParams& p;
  int64_t row, col, k = 0;
  int ranks;
  Copies<2> x, w, a;
  Copies<4> wide;

  __device__ __forceinline__ Filler(const LoraLinearParams& params, int64_t first_row, int64_t first_col, int r)
      : p(params),
        row(first_row),
        col(first_col),
        ranks(r),
        x(p.x, 0, 0, 0, 0),
        w(x),
        a(x),
        wide(p.a, 4 * p.a_row, p.r, 4 * p.K, kA) {
    x = Copies<2>(static_cast<const T*>(p.x) + row * p.x_row, kSize * p.x_row, p.M - row, kSize * p.K, 0);
    w = Copies<2>(static_cast<const T*>(p.w) + col * p.w_row, kSize * p.w_row, p.N - col, kSize * p.K, kW);
    a = Copies<2>(p.a, kSize * p.a_row, p.r, kSize * p.K, kA);
  }

  __device__ __forceinline__ void start(char* stage) {
    if (p.vector) {
      x.start(stage, kRows);
      w.start(stage, kColumns);
      if (kSize == 2 && p.wide_a) wide.start(stage, ranks);
      else a.start(stage, ranks);
    } else {
      const auto* const x_rows = static_cast<const T*>(p.x) + row * p.x_row;
      const auto* const w_rows = static_cast<const T*>(p.w) + col * p.w_row;
      copy_elements<kSize, 2>(stage, x_rows, kRows, p.M - row, k, p.K, p.x_row, p.x_col);
      copy_elements<kSize, 2>(stage + kW, w_rows, kColumns, p.N - col, k, p.K, p.w_row, p.w_col);
      char* const to = stage + kA;
      if (kSize == 2 && p.wide_a) copy_elements<4, 4>(to, p.a, ranks, p.r, k, p.K, p.a_row, p.a_col);
      else copy_elements<kSize, 2>(to, p.a, ranks, p.r, k, p.K, p.a_row, p.a_col);
    }
    k += kElements;
  }
};

// B and bias, which the last step takes. Rows of B in the order of tiles.
template <class T>
__device__ __forceinline__ void fill(
    char* shared, const LoraLinearParams& p, const Places& at, int columns, int64_t col) {
  using Factor = Beside<T>;
  auto* const b = reinterpret_cast<Factor*>(shared + at.b);
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < columns * at.ranks; i += kThreads) {
    const int n = i / at.ranks, rank = i % at.ranks;
    const bool inside = col + n < p.N && rank < p.r;
    const float v = inside ? load_as_float(p.b, (col + n) * p.b_row + rank * p.b_col, p.b_type) : 0.0f;
    const int row = n / kSpan * kSpan + 8 * tile_of(n % kSpan) + place_of(n % kSpan);
    b[row * (at.ranks + kPad) + rank] = from_float<Factor>(v);
  }
  auto* const bias = reinterpret_cast<float*>(shared + at.bias);
  for (int n = static_cast<int>(threadIdx.x); n < columns; n += kThreads) {
    bias[n] =
        p.bias != nullptr && col + n < p.N ? load_as_float(p.bias, (col + n) * p.bias_stride, p.bias_type) : 0.0f;
  }
}

// A lane's elements of two rows, `below` eight below: 32 bytes of each.
struct Elements {
  uint4 row[2], below[2];
};

__device__ __forceinline__ uint4 read(const char* row, int place) {
  return *reinterpret_cast<const uint4*>(row + 16 * place);
}

// c += x·wᵀ of a chunk of 16-bit numbers: two products.
template <class T>
__device__ __forceinline__ void multiply_chunk(
    float (&c)[4], const uint4& row, const uint4& below, const uint4& w) {
  const uint32_t first[4] = {row.x, below.x, row.y, below.y}, second[4] = {row.z, below.z, row.w, below.w};
  if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
    ptx::multiply_bf16(c, first, w.x, w.y);
    ptx::multiply_bf16(c, second, w.z, w.w);
  } else {
    ptx::multiply_f16(c, first, w.x, w.y);
    ptx::multiply_f16(c, second, w.z, w.w);
  }
}

// The same for s, which beside float16 stays in float32. Tensor cores cut a sum off each time they add to it: over 24
// products that was 4 units of the last place, measured on an H200. So chunks are summed apart.
template <class T>
__device__ __forceinline__ void add_chunk(float (&s)[4], const uint4& row, const uint4& below, const uint4& a) {
  if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
    multiply_chunk<T>(s, row, below, a);
  } else {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply_chunk<T>(part, row, below, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] += part[i];
  }
}

// Two chunks of float32 in parts of TF32, in the order of two fragments or, of W, of four.
__device__ __forceinline__ void split_chunks(Tf32Parts (&to)[8], const uint4& first, const uint4& second) {
  const float v[8] = {__uint_as_float(first.x),  __uint_as_float(second.x), __uint_as_float(first.y),
                      __uint_as_float(second.y), __uint_as_float(first.z),  __uint_as_float(second.z),
                      __uint_as_float(first.w),  __uint_as_float(second.w)};
  split_all(to, v);
}

struct Pairs {
  Tf32Parts of[8];

  __device__ __forceinline__ Pairs(const uint4& row, const uint4& below) { split_chunks(of, row, below); }
};

// c += x·wᵀ of the block in float32, summed apart, small products first.
__device__ __forceinline__ void multiply_block(float (&c)[4], const Pairs (&x)[2], const uint4 (&w)[2]) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  Tf32Parts b[8];  // of the chunks first and second, x y z w: at 2·(place of x …) and one behind
  split_chunks(b, w[0], w[1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Tf32Parts* const of = b + 4 * (i % 2) + i / 2;
    add_small<false, false>(part, x[i / 2].of + 4 * (i % 2), of[0], of[2]);
  }
  keep_finite(part);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Tf32Parts* const of = b + 4 * (i % 2) + i / 2;
    add_large(part, x[i / 2].of + 4 * (i % 2), of[0], of[2]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += part[i];
}

// c += x·aᵀ of the block, x in float16 and A in float32: x is in TF32 already, A is the sum of three such.
__device__ __forceinline__ void multiply_wide(float (&c)[4], const Elements& x, const uint4 (&a)[4]) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  Tf32Parts parts[2][8];
#pragma unroll
  for (int i = 0; i < 2; ++i) split_chunks(parts[i], a[2 * i], a[2 * i + 1]);
#pragma unroll
  for (int low = 1; low >= 0; --low) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 &up = x.row[i / 4], &down = x.below[i / 4];
      const uint32_t u[4] = {up.x, up.y, up.z, up.w}, d[4] = {down.x, down.y, down.z, down.w};
      const Tf32Parts two[4] = {
          whole_tf32(half_of(u[i % 4], 0)), whole_tf32(half_of(d[i % 4], 0)), whole_tf32(half_of(u[i % 4], 1)),
          whole_tf32(half_of(d[i % 4], 1))};
      const Tf32Parts* const of = parts[i / 4] + 4 * (i % 2) + i / 2 % 2;
      if (low) add_small<true, false>(part, two, of[0], of[2]);
      else add_large(part, two, of[0], of[2]);
    }
    if (low) keep_finite(part);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += part[i];
}

// Dropout of a lane's elements of one row in the block that begins at column k; `first` is the counter of the row's
// first call.
template <class T>
__device__ __forceinline__ void drop_row(
    uint4 (&v)[2], const Dropout& dropout, uint64_t seed, int64_t first, int64_t k, int lane) {
  const uint32_t below = (static_cast<uint32_t>(dropout.threshold) << 16) - 1;
  const float scale = dropout.survivor_scale;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 word = philox(seed, static_cast<uint64_t>(first + k / 8 + 2 * lane + i));
      v[i].x = drop_two<T>(v[i].x, word.x, below, scale);
      v[i].y = drop_two<T>(v[i].y, word.y, below, scale);
      v[i].z = drop_two<T>(v[i].z, word.z, below, scale);
      v[i].w = drop_two<T>(v[i].w, word.w, below, scale);
    }
  } else {
    const uint4 word = philox(seed, static_cast<uint64_t>(first + k / 8 + lane));
    v[0].x = drop_one(v[0].x, word.x << 16, below, scale);
    v[0].y = drop_one(v[0].y, word.x, below, scale);
    v[0].z = drop_one(v[0].z, word.y << 16, below, scale);
    v[0].w = drop_one(v[0].w, word.y, below, scale);
    v[1].x = drop_one(v[1].x, word.z << 16, below, scale);
    v[1].y = drop_one(v[1].y, word.z, below, scale);
    v[1].z = drop_one(v[1].z, word.w << 16, below, scale);
    v[1].w = drop_one(v[1].w, word.w, below, scale);
  }
}

// acc [16, kSpans · 32] and s [16, ranks] of a warp: += x·Wᵀ and drop(x)·Aᵀ of one block.
template <class T, int kSpans>
__device__ __forceinline__ void multiply_stage(
    float (&acc)[kSpans][kTiles][4], float (&s)[kRankTiles][4], const char* stage, const LoraLinearParams& p,
    const Places& at, uint64_t seed, int64_t row, int64_t k) {
  const int warp = static_cast<int>(threadIdx.x / 32), g = static_cast<int>(threadIdx.x % 32 / 4);
  const int lane = static_cast<int>(threadIdx.x % 4);
  const int place[4] = {
      place_of_chunk(g, lane, 0), place_of_chunk(g, lane, 1), place_of_chunk(g, lane, 2),
      place_of_chunk(g, lane, 3)};
  const char* const from = stage + (16 * warp + g) * kBlock;
  Elements x;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    x.row[i] = read(from, place[i]);
    x.below[i] = read(from + 8 * kBlock, place[i]);
  }
  const char* const w = stage + (kRows + column_of(0, g)) * kBlock;
  const char* const a = stage + (kRows + kSpans * kSpan) * kBlock + g * at.a_row;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int tile = 0; tile < kSpans * kTiles; ++tile) {
      const char* const rows = w + (tile / kTiles * kSpan + 2 * (tile % kTiles)) * kBlock;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_chunk<T>(acc[tile / kTiles][tile % kTiles], x.row[i], x.below[i], read(rows, place[i]));
      }
    }
  } else {
    const Pairs pairs[2] = {Pairs(x.row[0], x.below[0]), Pairs(x.row[1], x.below[1])};
#pragma unroll
    for (int tile = 0; tile < kSpans * kTiles; ++tile) {
      const char* const rows = w + (tile / kTiles * kSpan + 2 * (tile % kTiles)) * kBlock;
      const uint4 both[2] = {read(rows, place[0]), read(rows, place[1])};
      multiply_block(acc[tile / kTiles][tile % kTiles], pairs, both);
    }
  }
  if (p.dropout.seed != nullptr) {
    const int64_t first = (row + 16 * warp + g) * p.dropout.groups;
    drop_row<T>(x.row, p.dropout, seed, first, k, lane);
    drop_row<T>(x.below, p.dropout, seed, first + 8 * p.dropout.groups, k, lane);
  }
#pragma unroll
  for (int tile = 0; tile < kRankTiles; ++tile) {
    if (8 * tile >= p.r) break;
    const char* const rows = a + 8 * tile * at.a_row;
    if constexpr (sizeof(T) == 4) {
      const Pairs pairs[2] = {Pairs(x.row[0], x.below[0]), Pairs(x.row[1], x.below[1])};
      const uint4 both[2] = {read(rows, place[0]), read(rows, place[1])};
      multiply_block(s[tile], pairs, both);
    } else if (!p.wide_a) {
#pragma unroll
      for (int i = 0; i < 2; ++i) add_chunk<T>(s[tile], x.row[i], x.below[i], read(rows, place[i]));
    } else {
      const uint4 v[4] = {read(rows, place[0]), read(rows, place[1]), read(rows, place[2]), read(rows, place[3])};
      if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 &one = v[2 * i], &two = v[2 * i + 1];
          const uint4 rounded = make_uint4(
              pack_two<T>(__uint_as_float(one.x), __uint_as_float(one.y)),
              pack_two<T>(__uint_as_float(one.z), __uint_as_float(one.w)),
              pack_two<T>(__uint_as_float(two.x), __uint_as_float(two.y)),
              pack_two<T>(__uint_as_float(two.z), __uint_as_float(two.w)));
          multiply_chunk<T>(s[tile], x.row[i], x.below[i], rounded);
        }
      } else {
        multiply_wide(s[tile], x, v);
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void store_s(const float (&s)[kRankTiles][4], const LoraLinearParams& p, int64_t row) {
  using S = Beside<T>;
  auto* const to = static_cast<S*>(p.s);
  const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int tile = 0; tile < kRankTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = row + 8 * (i / 2);
      const int rank = 8 * tile + 2 * lane + i % 2;
      if (at < p.M && rank < p.r) to[at * p.r + rank] = from_float<S>(s[tile][i]);
    }
  }
}

// CTAs that an SM must have registers for: as many as there are without spilling.
template <class T, int kSpans>
constexpr int kOnSm = DtypeOf<T>::value == Dtype::bfloat16 ? 4
                      : sizeof(T) == 4 && kSpans == 2      ? 2
                                                           : 3;

// CTA (i, j): column block i, row block j of y.
template <class T, int kSpans>
__global__ void __launch_bounds__(kThreads, kOnSm<T, kSpans>)
    lora_linear_kernel(const __grid_constant__ LoraLinearParams p) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ uint4 lora_linear_shared[];
  auto* const shared = reinterpret_cast<char*>(lora_linear_shared);
  constexpr int kColumns = kSpans * kSpan, kElements = kBlock / sizeof(T);
  const Places at(p.r, kColumns, p.stages, p.wide_a, DtypeOf<T>::value == Dtype::bfloat16 ? 2 : 4);
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kColumns, row = static_cast<int64_t>(blockIdx.y) * kRows;
  const int blocks = static_cast<int>((p.K + kElements - 1) / kElements);
  Filler<T, kColumns> filler(p, row, col, at.ranks);
  for (int i = 0; i < p.stages - 1; ++i) {
    if (i < blocks) filler.start(shared + i * at.stage);
    ptx::commit_copies();
  }
  fill<T>(shared, p, at, kColumns, col);
  const uint64_t seed = p.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*p.dropout.seed);

  float acc[kSpans][kTiles][4] = {}, s[kRankTiles][4] = {};
  int stage = 0, free = p.stages - 1;
  for (int block = 0; block < blocks; ++block) {
    wait_for_stage(p.stages - 2);
    __syncthreads();  // all copies of this stage are there, and nobody reads the one that is filled next
    if (block + p.stages - 1 < blocks) filler.start(shared + free * at.stage);
    ptx::commit_copies();
    multiply_stage<T, kSpans>(
        acc, s, shared + stage * at.stage, p, at, seed, row, static_cast<int64_t>(block) * kElements);
    free = stage;
    stage = stage + 1 == p.stages ? 0 : stage + 1;
  }

  const int warp = static_cast<int>(threadIdx.x / 32), g = static_cast<int>(threadIdx.x % 32 / 4);
  const int lane = static_cast<int>(threadIdx.x % 4);
  const int64_t first = row + 16 * warp + g;
  const float scale =
      DtypeOf<T>::value == Dtype::float16 && p.dropout.seed != nullptr ? p.dropout.survivor_scale : 1.0f;
  scale_ranks(s, p.r, scale);
  if (p.s != nullptr && blockIdx.x == 0) store_s<T>(s, p, first);
  const int b_row = (at.ranks + kPad) * static_cast<int>(sizeof(Beside<T>));
#pragma unroll
  for (int span = 0; span < kSpans; ++span) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float low[4];
      const char* const rows = shared + at.b + (span * kSpan + 8 * tile) * b_row;
      multiply_low_rank<T>(low, s, rows, p.r, at.ranks + kPad, p.b_type != Dtype::float32);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[span][tile][i] += p.scaling * low[i];
    }
    const int begin = span * kSpan + kEight * lane;
    const auto* const bias = reinterpret_cast<const float*>(shared + at.bias) + begin;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t to = first + 8 * half;
      float v[kEight];
#pragma unroll
      for (int i = 0; i < kEight; ++i) v[i] = acc[span][i / 2][2 * half + i % 2] + bias[i];
      store_eight<T>(static_cast<T*>(p.y) + to * p.N, v, col + begin, p.N, p.vector_y, to < p.M);
    }
  }
#else
  __trap();  // the host doesn't launch it there
#endif
}

void lora_linear(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    Tensor y, const std::optional<Tensor>& s, int64_t columns, int64_t stages) {
  const OneDevice device(kDevice, "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && lora_A.dim() == 2, "x, weight or lora_A is no matrix");
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), r = lora_A.size(0);
  check_matrix("x", x, M, K, device);
  check_matrix("weight", weight, N, K, device);
  check_matrix("lora_A", lora_A, r, K, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_output("y", y, M, N, device);
  const Dtype dtype = dtype_of(x);
  STD_TORCH_CHECK(
      dtype_of(weight) == dtype && dtype_of(y) == dtype, "weight or y has another dtype than x, ",
      toString(x.scalar_type()));
  const bool wide_a = dtype != Dtype::float32 && dtype_of(lora_A) == Dtype::float32;
  STD_TORCH_CHECK(
      wide_a || dtype_of(lora_A) == dtype, "lora_A has dtype ", toString(lora_A.scalar_type()),
      ", expected float32 or that of x, ", toString(x.scalar_type()));
  if (bias.has_value()) check_vector("bias", *bias, N, device);
  if (s.has_value()) {
    check_output("s", *s, M, r, device);
    STD_TORCH_CHECK(
        dtype_of(*s) == (dtype == Dtype::bfloat16 ? dtype : Dtype::float32), "s has dtype ",
        toString(s->scalar_type()), ", expected bfloat16 beside that, float32 otherwise");
  }
  check_seed(seed, threshold, device);
  STD_TORCH_CHECK(r >= 1 && r <= kMostRanks, "r is ", r, ", expected 1 to ", kMostRanks);
  STD_TORCH_CHECK(K >= 1 && K < INT64_C(1) << 28, "K is ", K, ", expected 1 to 2**28 - 1");
  STD_TORCH_CHECK(columns == 32 || columns == 64, "a tile has ", columns, " columns, expected 32 or 64");
  STD_TORCH_CHECK(stages >= 2 && stages <= 4, "stages is ", stages, ", expected 2 to 4");
  if (M == 0 || N == 0) return;

  const int64_t across = (N + columns - 1) / columns, down = (M + kRows - 1) / kRows;
  STD_TORCH_CHECK(across < INT64_C(1) << 31 && down <= 65535, "y is ", M, " x ", N, ", too large for one launch");
  const Places at(
      static_cast<int>(r), static_cast<int>(columns), static_cast<int>(stages), wide_a,
      dtype == Dtype::bfloat16 ? 2 : 4);
  STD_TORCH_CHECK(
      static_cast<size_t>(at.end) <= kShared, stages, " stages take ", at.end,
      " bytes of shared memory, expected at most ", kShared);
  const bool masked = seed.has_value() && threshold > 0;
  const auto vector = [](const Tensor& tensor) {
    const int64_t row = tensor.size(0) > 1 ? tensor.stride(0) * static_cast<int64_t>(tensor.element_size()) : 0;
    return tensor.stride(1) == 1 && aligned(tensor.const_data_ptr(), row, 16);
  };
  const OnDevice on(device);
  with_type(x, [&](auto element) {
    using T = decltype(element);
    LoraLinearParams p{};
    p.x = x.const_data_ptr(), p.w = weight.const_data_ptr();
    p.a = lora_A.const_data_ptr(), p.b = lora_B.const_data_ptr();
    p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
    p.y = y.mutable_data_ptr();
    p.s = s.has_value() ? s->mutable_data_ptr() : nullptr;
    p.dropout = {
        masked ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr, (K + 7) / 8,
        static_cast<int32_t>(threshold), static_cast<float>(survivor_scale)};
    p.M = M, p.N = N, p.K = K;
    p.x_row = x.stride(0), p.x_col = x.stride(1);
    p.w_row = weight.stride(0), p.w_col = weight.stride(1);
    p.a_row = lora_A.stride(0), p.a_col = lora_A.stride(1);
    p.b_row = lora_B.stride(0), p.b_col = lora_B.stride(1);
    p.bias_stride = bias.has_value() ? bias->stride(0) : 0;
    p.r = static_cast<int32_t>(r), p.stages = static_cast<int32_t>(stages);
    p.scaling = static_cast<float>(scaling);
    p.b_type = dtype_of(lora_B);
    p.bias_type = bias.has_value() ? dtype_of(*bias) : Dtype::float32;
    p.wide_a = wide_a;
    p.vector = vector(x) && vector(weight) && vector(lora_A);
    p.vector_y = aligned(p.y, N * static_cast<int64_t>(sizeof(T)), 16);
    launch(
        "lora_linear", columns == 32 ? lora_linear_kernel<T, 1> : lora_linear_kernel<T, 2>,
        dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), kThreads, static_cast<size_t>(at.end),
        on, p);
  });
}

}  // namespace lorafast::cuda
