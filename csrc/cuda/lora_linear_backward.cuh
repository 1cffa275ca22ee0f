// A whole layer's backward in one launch, where launches take longer than the work: ds = scaling · dy·B,
// dx = dy·W + drop'(ds·A), dB = scaling · dyᵀ·s, dbias = Σ dy over rows, dA = dsᵀ·drop(x).
//
// A CTA of four warps has one part of a result, by a ticket that it draws when it starts:
//
//   rows      a tile of dx, 64 rows and 32 or 64 columns. It goes through N by blocks of 128 bytes of a row of dy,
//             beside which lie rows of W and of B: every such CTA makes the ds of its rows, in registers, where they
//             become the first factor of a last step. Those of the first columns leave it in memory, for dA.
//   columns   64 columns of dB and dbias, through all rows of dy and s; or 64 columns of dA, through x and ds.
//
// dA's CTAs wait until all of ds is there. They hold the last tickets: whoever makes ds has started before, and waits
// for nobody. Nothing is shared but ds, and each sum is one CTA's: the bits don't depend on the order.
#pragma once

#include <cstdint>

#include "counters.cuh"
#include "lora_linear_backward_products.cuh"
#include "philox.cuh"
#include "small.cuh"

namespace lorafast::cuda {

struct LoraLinearBackwardParams {
  const void* dy;      // [M, N]
  const void* x;       // [M, K], for dA
  const void* w;       // [N, K], for dx
  const void* a;       // [r, K], for dx
  const void* b;       // [N, r] in dy's dtype or float32, for dx and dA
  const void* s;       // [M, r] of Beside<T>, for dB
  void* dx;            // [M, K], contiguous as all results, null if it isn't wanted
  void* dA;            // [r, K]
  void* dB;            // [N, r]
  void* dbias;         // [N]
  void* ds;            // [M, ranks] of Beside<T>: scratch for dA
  uint32_t* counters;  // for dA: tickets, row blocks whose ds is there, CTAs that have done with it
  Dropout dropout;
  int64_t M, N, K;
  int64_t dy_row, dy_col, x_row, x_col, w_row, w_col, a_row, a_col, b_row, b_col, s_row, s_col;
  int32_t r, ranks;  // `ranks`: r rounded up to 16, 32 or 64
  int32_t stages;
  int32_t row_blocks;      // of dy
  int32_t of_rows, of_dB;  // CTAs for rows, then CTAs for dB and dbias; the rest is for dA
  float scaling;
  Dtype a_type, dA_type, dB_type;
  bool wide_b;                                             // B is float32 and dy isn't
  bool vector_dy, vector_x, vector_w, vector_b, vector_s;  // rows are aligned to 16 bytes
  bool vector_dx;                                          // to 16 bytes, to 8 for float32
};

// Where shared memory holds what. A stage: rows of dy or x; of W; of B, s or ds. Behind all stages the columns of A.
struct BackwardPlaces {
  int w_row, factor_row, wide_row;  // bytes from a row to the next
  int factor;                       // offset of rows of B, s or ds in a stage
  int stage, a, end;

  // `size` of an element of dy; `wide`: s and ds are float32.
  __host__ __device__ BackwardPlaces(int ranks, int columns, int stages, int size, bool wide, bool wide_b)
      : w_row(columns * size + (size == 4 ? 32 : 16)),
        factor_row(ranks * size + (size == 4 ? 32 : 16)),
        wide_row(4 * ranks + (size == 4 ? 32 : 16)),
        factor(kRows * (kBlock + 16) + kBlock / size * w_row),
        stage(factor + kBlock / size * (wide || wide_b ? wide_row : factor_row)),
        a(stages * stage),
        end(a + columns * (ranks + kPad) * (wide ? 4 : 2)) {}
};

// A thread's part of the copies of a matrix into stages: one chunk of 16 bytes of each of its rows. The next stage has
// what follows along the rows, or the rows that follow.
template <int kSize, bool kRowsFollow>
struct TileCopies {
  const char* from;  // its first chunk of the next stage
  int64_t step;      // bytes from one of its rows to the next
  int64_t next;      // bytes to what the stage after that has
  int64_t across;    // bytes from one element of a row to the next
  int to, apart;     // where in a stage its first chunk lies, and bytes to the next
  int count;         // of its rows in a stage
  int inside;        // its rows from there on that exist
  int left;          // bytes of a row from its chunk on

  // `rows` and `length` of the matrix, in elements, from where the tile begins. The tile has `tile_rows` of `chunks`,
  // a power of two.
  __device__ __forceinline__ TileCopies(
      const void* matrix, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t length, int tile_rows,
      int chunks, int offset, int pitch) {
    const int row = static_cast<int>(threadIdx.x) / chunks, chunk = static_cast<int>(threadIdx.x) % chunks;
    const int rows_apart = kThreads / chunks;
    from = static_cast<const char*>(matrix) + row * row_stride * kSize + 16 * chunk * col_stride;
    step = rows_apart * row_stride * kSize;
    next = kRowsFollow ? tile_rows * row_stride * kSize : kBlock * col_stride;
    across = col_stride * kSize;
    to = offset + row * pitch + 16 * chunk;
    apart = rows_apart * pitch;
    count = tile_rows / rows_apart;
    const int64_t there = (rows - row + rows_apart - 1) / rows_apart;
    inside = static_cast<int>(there < 0 ? 0 : there);
    left = static_cast<int>(length) * kSize - 16 * chunk;
  }

  // Starts the copies into a stage, zeros beyond the matrix. Where rows aren't aligned or their elements no neighbours
  // they are made at once, element by element.
  __device__ __forceinline__ void start(char* stage, bool vector) {
    const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
    char* at = stage + to;
    const char* row = from;
    if (vector) {
#pragma unroll 4
      for (int i = 0; i < count; ++i, at += apart, row += step) ptx::copy_16(at, row, i < inside ? bytes : 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < count; ++i, at += apart, row += step) {
        *reinterpret_cast<uint4*>(at) = load_elements<kSize>(row, across, i < inside ? bytes : 0);
      }
    }
    from += next;
    if constexpr (kRowsFollow) inside -= count;
    else left -= kBlock;
  }
};

template <class T, int kSpans>
struct BackwardCta {
  static constexpr bool kWide = DtypeOf<T>::value != Dtype::bfloat16;  // s and ds are float32
  static constexpr int kSize = sizeof(T), kElements = kBlock / kSize;
  static constexpr int kColumns = kSpans * kSpan;  // of a tile of dx
  static constexpr int kRowPitch = kBlock + 16;    // of dy, along its rows
  static constexpr int kDown = kRows;              // columns of dB, dbias or dA
  static constexpr int kDownPitch = kDown * kSize + (kSize == 4 ? 32 : 16);

  const LoraLinearBackwardParams& p;
  char* const shared;
  const BackwardPlaces at;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int g = lane / 4, t = lane % 4;
  const uint64_t seed;

  __device__ __forceinline__ BackwardCta(const LoraLinearBackwardParams& params, char* memory)
      : p(params),
        shared(memory),
        at(p.ranks, kColumns, p.stages, kSize, kWide, p.wide_b),
        seed(p.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*p.dropout.seed)) {}

  // Goes through blocks: `start` starts the copies of the next into a stage, `prepare` is for what a thread has copied,
  // `multiply` for what all have. `meanwhile` is called once, while the first copies are under way.
  template <class Start, class Meanwhile, class Prepare, class Multiply>
  __device__ __forceinline__ void walk(
      int blocks, Start start, Meanwhile meanwhile, Prepare prepare, Multiply multiply) const {
    for (int i = 0; i < p.stages - 1; ++i) {
      if (i < blocks) start(shared + i * at.stage);
      ptx::commit_copies();
    }
    meanwhile();
    int stage = 0, free = p.stages - 1;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      wait_for_stage(p.stages - 2);
      prepare(shared + stage * at.stage, block);
      __syncthreads();  // all copies of this stage are there, and nobody reads the one that is filled next
      if (block + p.stages - 1 < blocks) start(shared + free * at.stage);
      ptx::commit_copies();
      multiply(shared + stage * at.stage);
      free = stage;
      stage = stage + 1 == p.stages ? 0 : stage + 1;
    }
  }

  // sums [16, ranks] of a warp += a·(rows of B, s or ds). `wide`: those are float32.
  __device__ __forceinline__ void multiply_ranks(
      float (&sums)[kRankTiles][4], const FirstFactor<T>& a, const char* factor, bool wide) const {
#pragma unroll
    for (int tile = 0; tile < kRankTiles; tile += 2) {
      if (8 * tile >= p.r) break;
      if constexpr (kSize == 2) {
        if (!wide) {
          multiply_two<T>(sums[tile], sums[tile + 1], a, factor + 16 * tile, at.factor_row);
          continue;
        }
      }
      multiply_one<T>(sums[tile], a, factor + 32 * tile, at.wide_row);
      if (8 * tile + 8 < p.r) multiply_one<T>(sums[tile + 1], a, factor + 32 * tile + 32, at.wide_row);
    }
  }

  // ---- Rows: ds and a tile of dx

  __device__ __forceinline__ void rows(int index) const {
    const int64_t row = static_cast<int64_t>(index % p.row_blocks) * kRows;
    const int64_t col = static_cast<int64_t>(index / p.row_blocks) * kColumns;
    const int blocks = static_cast<int>((p.N + kElements - 1) / kElements);
    TileCopies<kSize, false> dy(
        static_cast<const T*>(p.dy) + row * p.dy_row, p.dy_row, p.dy_col, p.M - row, p.N, kRows, kBlock / 16, 0,
        kRowPitch);
    TileCopies<kSize, true> w(
        static_cast<const T*>(p.w) + col * p.w_col, p.w_row, p.w_col, p.N, p.K - col, kElements,
        kColumns * kSize / 16, kRows * kRowPitch, at.w_row);
    TileCopies<kSize, true> b(
        p.b, p.b_row, p.b_col, p.N, p.r, kElements, p.ranks * kSize / 16, at.factor, at.factor_row);
    TileCopies<4, true> wide(p.b, p.b_row, p.b_col, p.N, p.r, kElements, p.ranks / 4, at.factor, at.wide_row);
    float acc[kSpans][kTiles][4] = {}, ds[kRankTiles][4] = {};
    walk(
        blocks,
        [&](char* stage) {
          dy.start(stage, p.vector_dy);
          if (p.dx != nullptr) w.start(stage, p.vector_w);
          if (kSize == 2 && p.wide_b) wide.start(stage, p.vector_b);
          else b.start(stage, p.vector_b);
        },
        [&] {
          if (p.dx != nullptr) fill_a(col);
        },
        [](char*, int) {},
        [&](const char* stage) {
          FirstFactor<T> a;
          const char* const of_dy = stage + (16 * warp + (lane & 15)) * kRowPitch + (lane >> 4) * 16;
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            uint32_t raw[4];
            ptx::load_matrices(raw, of_dy + 32 * step);
            set_step(a, step, raw);
          }
          if (p.dx != nullptr) {
            const char* const of_w = stage + kRows * kRowPitch;
#pragma unroll
            for (int tile = 0; tile < kSpans * kTiles; tile += 2) {
              float (&first)[4] = acc[tile / kTiles][tile % kTiles],
                    (&second)[4] = acc[tile / kTiles][tile % kTiles + 1];
              if constexpr (kSize == 2) {
                multiply_two<T>(first, second, a, of_w + 16 * tile, at.w_row);
              } else {
                multiply_one<T>(first, a, of_w + 32 * tile, at.w_row);
                multiply_one<T>(second, a, of_w + 32 * tile + 32, at.w_row);
              }
            }
          }
          multiply_ranks(ds, a, stage + at.factor, kSize == 4 || p.wide_b);
        });
    scale_ranks(ds, p.r, p.scaling);
    const int64_t first = row + 16 * warp + g;
    if (p.ds != nullptr && col == 0) {
      store_ds(ds, first);
      arrive(p.counters + 1);
    }
    if (p.dx == nullptr) return;
    add_low_rank(acc, ds, first, col);
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
#pragma unroll
      for (int half = 0; half < 2; ++half) store_dx(acc[span], half, first + 8 * half, col + span * kSpan);
    }
  }

  // The columns of A that the last step takes, ranks as neighbours.
  __device__ __forceinline__ void fill_a(int64_t col) const {
    auto* const a = reinterpret_cast<Beside<T>*>(shared + at.a);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < kColumns * p.ranks; i += kThreads) {
      const int k = i % kColumns, rank = i / kColumns;
      const bool inside = col + k < p.K && rank < p.r;
      const float v = inside ? load_as_float(p.a, rank * p.a_row + (col + k) * p.a_col, p.a_type) : 0.0f;
      a[k * (p.ranks + kPad) + rank] = from_float<Beside<T>>(v);
    }
  }

  __device__ __forceinline__ void store_ds(const float (&ds)[kRankTiles][4], int64_t first) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + 8 * half;
      if (row >= p.M) break;
      auto* const to = static_cast<Beside<T>*>(p.ds) + row * p.ranks + 2 * t;
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) {
        if (8 * tile >= p.ranks) break;
        if constexpr (kWide) {
          *reinterpret_cast<float2*>(to + 8 * tile) = make_float2(ds[tile][2 * half], ds[tile][2 * half + 1]);
        } else {
          *reinterpret_cast<uint32_t*>(to + 8 * tile) = pack_two<T>(ds[tile][2 * half], ds[tile][2 * half + 1]);
        }
      }
    }
  }

  // acc += drop'(ds·A). Each lane of a quad makes the mask of one n8 tile of each span, for both of its rows.
  __device__ __forceinline__ void add_low_rank(
      float (&acc)[kSpans][kTiles][4], const float (&ds)[kRankTiles][4], int64_t first, int64_t col) const {
    uint32_t own = 0xFFFFFFFFu;
    float scale = 1.0f;
    if (p.dropout.seed != nullptr) {
      own = 0;
      scale = p.dropout.survivor_scale;
#pragma unroll
      for (int i = 0; i < 2 * kSpans; ++i) {
        const int64_t group = (col + i / 2 * kSpan) / 8 + t;
        own |= keep_bits(p.dropout, seed, first + 8 * (i % 2), group) << (8 * i);
      }
    }
    const int pitch = p.ranks + kPad;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t kept = __shfl_sync(0xFFFFFFFFu, own, lane / 4 * 4 + tile) >> (2 * t);
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
        float low[4];
        const char* const rows =
            shared + at.a + (span * kSpan + 8 * tile) * pitch * static_cast<int>(sizeof(Beside<T>));
        multiply_low_rank<T>(low, ds, rows, p.r, pitch, p.a_type != Dtype::float32);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool keeps = (kept >> (16 * span + 8 * (i / 2) + i % 2) & 1u) != 0;
          acc[span][tile][i] += keeps ? low[i] * scale : 0.0f;
        }
      }
    }
  }

  // 32 columns of a row of dx, from `col` on; the whole warp calls it.
  __device__ __forceinline__ void store_dx(
      const float (&acc)[kTiles][4], int half, int64_t row, int64_t col) const {
    T* const to = static_cast<T*>(p.dx) + row * p.K;
    if constexpr (kSize == 2) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = pack_two<T>(acc[i][2 * half], acc[i][2 * half + 1]);
      transpose_quad(word);
      const int64_t k = col + 8 * t;
      if (row >= p.M) return;
      if (p.vector_dx && k + 8 <= p.K) {
        ptx::store_16(to + k, make_uint4(word[0], word[1], word[2], word[3]));
        return;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (k + i < p.K)
          reinterpret_cast<uint16_t*>(to)[k + i] = static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)));
      }
    } else {
      if (row >= p.M) return;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int64_t k = col + 8 * i + 2 * t;
        const float2 v = make_float2(acc[i][2 * half], acc[i][2 * half + 1]);
        if (p.vector_dx && k + 2 <= p.K) {
          ptx::store_8(to + k, make_uint2(__float_as_uint(v.x), __float_as_uint(v.y)));
        } else {
          if (k < p.K) to[k] = v.x;
          if (k + 1 < p.K) to[k + 1] = v.y;
        }
      }
    }
  }

  // ---- Columns: dB and dbias, dA

  // D = scale · Xᵀ·Q for 64 columns of X, and the sums of these columns; one that is null isn't wanted.
  struct Columns {
    const T* x;  // [M, length], strides row and col
    int64_t row, col, length;
    bool vector;
    const Beside<T>* q;  // [M, r]
    int64_t q_row, q_col;
    bool vector_q;
    float scale;
    Dtype type;
    void* d;
    int64_t d_column, d_rank;  // strides
    T* sums;
    bool drops;
  };

  __device__ __forceinline__ void columns(const Columns& of, int64_t column) const {
    const int blocks = static_cast<int>((p.M + kElements - 1) / kElements);
    constexpr int kQSize = sizeof(Beside<T>);
    const int q_pitch = kQSize == 4 ? at.wide_row : at.factor_row;
    TileCopies<kSize, true> x(
        of.x + column * of.col, of.row, of.col, p.M, of.length - column, kElements, kDown * kSize / 16, 0,
        kDownPitch);
    TileCopies<kQSize, true> q(
        of.q, of.q_row, of.q_col, p.M, p.r, kElements, p.ranks * kQSize / 16, at.factor, q_pitch);
    float d[kRankTiles][4] = {}, sums[2] = {0.0f, 0.0f};
    walk(
        blocks,
        [&](char* stage) {
          x.start(stage, of.vector);
          if (of.d != nullptr) q.start(stage, of.vector_q);
        },
        [] {},
        [&](char* stage, int block) {
          if (of.drops) drop(stage, x, static_cast<int64_t>(block) * kElements, column);
        },
        [&](const char* stage) {
          FirstFactor<T> a;
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            uint32_t raw[4];
            if constexpr (kSize == 2) {
              ptx::load_matrices_transposed(
                  raw, stage + (16 * step + (lane & 7) + (lane >> 4) * 8) * kDownPitch +
                           (16 * warp + (lane >> 3 & 1) * 8) * kSize);
            } else {
              const char* const element = stage + (8 * step + t) * kDownPitch + (16 * warp + g) * kSize;
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                raw[i] = *reinterpret_cast<const uint32_t*>(element + i / 2 * 4 * kDownPitch + i % 2 * 8 * kSize);
              }
            }
            if (of.sums != nullptr) {
#pragma unroll
              for (int i = 0; i < 4; ++i) sums[i % 2] += sum_of(raw[i]);
            }
            set_step(a, step, raw);
          }
          if (of.d != nullptr) multiply_ranks(d, a, stage + at.factor, kQSize == 4);
        });
    const int64_t first = column + 16 * warp + g;
    if (of.d != nullptr) {
#pragma unroll
      for (int i = 0; i < 4 * kRankTiles; ++i) {
        const int64_t at_column = first + i % 4 / 2 * 8;
        const int rank = i / 4 * 8 + 2 * t + i % 2;
        if (at_column < of.length && rank < p.r) {
          store_as(of.d, at_column * of.d_column + rank * of.d_rank, d[i / 4][i % 4] * of.scale, of.type);
        }
      }
    }
    if (of.sums != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], 1);
        sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], 2);
        if (t == 0 && first + 8 * i < of.length) of.sums[first + 8 * i] = from_float<T>(sums[i]);
      }
    }
  }

  // Of a float32, or of two neighbours along the sum.
  static __device__ __forceinline__ float sum_of(uint32_t raw) {
    if constexpr (kSize == 4) return __uint_as_float(raw);
    else if constexpr (kWide) return half_of(raw, 0) + half_of(raw, 1);
    else return __uint_as_float(raw << 16) + __uint_as_float(raw & 0xFFFF0000u);
  }

  // Drops elements of x in the chunks that this thread has copied.
  __device__ __forceinline__ void drop(
      char* stage, const TileCopies<kSize, true>& x, int64_t row, int64_t column) const {
    constexpr int kChunks = kDown * kSize / 16;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const uint32_t below = (static_cast<uint32_t>(p.dropout.threshold) << 16) - 1;
    const float scale = p.dropout.survivor_scale;
    const int64_t group = (column + chunk * (16 / kSize)) / 8;
    int64_t counter = (row + static_cast<int>(threadIdx.x) / kChunks) * p.dropout.groups + group;
    char* to = stage + x.to;
#pragma unroll 1
    for (int i = 0; i < x.count; ++i) {
      const uint4 word = philox(seed, static_cast<uint64_t>(counter));
      uint4 v = *reinterpret_cast<const uint4*>(to);
      if constexpr (kSize == 2) {
        v.x = drop_two<T>(v.x, word.x, below, scale);
        v.y = drop_two<T>(v.y, word.y, below, scale);
        v.z = drop_two<T>(v.z, word.z, below, scale);
        v.w = drop_two<T>(v.w, word.w, below, scale);
      } else {
        const uint32_t first = chunk % 2 == 0 ? word.x : word.z, last = chunk % 2 == 0 ? word.y : word.w;
        v.x = drop_one(v.x, first << 16, below, scale);
        v.y = drop_one(v.y, first, below, scale);
        v.z = drop_one(v.z, last << 16, below, scale);
        v.w = drop_one(v.w, last, below, scale);
      }
      *reinterpret_cast<uint4*>(to) = v;
      to += x.apart;
      counter += kThreads / kChunks * p.dropout.groups;
    }
  }

  // ---- By the ticket

  __device__ __forceinline__ void run() const {
    // Without dA nobody waits, and any order will do.
    const int ticket = static_cast<int>(p.dA == nullptr ? blockIdx.x : take_next(p.counters));
    if (ticket < p.of_rows) return rows(ticket);
    const bool of_dA = ticket >= p.of_rows + p.of_dB;
    Columns of;
    if (of_dA) {
      if (threadIdx.x == 0) wait_for_count(p.counters + 1, static_cast<uint32_t>(p.row_blocks));
      __syncthreads();
      of.drops = p.dropout.seed != nullptr;
      of.x = static_cast<const T*>(p.x), of.row = p.x_row, of.col = p.x_col, of.length = p.K,
      of.vector = p.vector_x;
      of.q = static_cast<const Beside<T>*>(p.ds), of.q_row = p.ranks, of.q_col = 1, of.vector_q = true;
      of.d = p.dA, of.d_column = 1, of.d_rank = p.K, of.type = p.dA_type, of.sums = nullptr;
      // float16 isn't scaled when it is dropped.
      of.scale = of.drops && DtypeOf<T>::value == Dtype::float16 ? p.dropout.survivor_scale : 1.0f;
    } else {
      of.drops = false;
      of.x = static_cast<const T*>(p.dy), of.row = p.dy_row, of.col = p.dy_col, of.length = p.N;
      of.vector = p.vector_dy;
      of.q = static_cast<const Beside<T>*>(p.s), of.q_row = p.s_row, of.q_col = p.s_col, of.vector_q = p.vector_s;
      of.d = p.dB, of.d_column = p.r, of.d_rank = 1, of.type = p.dB_type, of.sums = static_cast<T*>(p.dbias);
      of.scale = p.scaling;
    }
    columns(of, static_cast<int64_t>(ticket - p.of_rows - (of_dA ? p.of_dB : 0)) * kDown);
    if (of_dA) {
      // The last to have read ds is the last to use counters: no ticket is left, and all of ds was there.
      const uint32_t others = gridDim.x - static_cast<uint32_t>(p.of_rows + p.of_dB) - 1;
      if (arrive(p.counters + 2) == others && threadIdx.x < 3) p.counters[threadIdx.x] = 0;
    }
  }
};

}  // namespace lorafast::cuda
