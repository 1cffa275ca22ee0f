// What a tile of a skinny operation adds to sums, and where sums go. S is a CTA's by tiles of rows, D and the bias
// stay in registers over a walk.
//
// Where several CTAs share a sum each leaves its part in float32 as its fragments have it, and the last to arrive
// adds them in the order of their numbers: the bits don't depend on who was first.
#pragma once

#include "counters.cuh"
#include "skinny_tile.cuh"

namespace lorafast::cuda {

template <class T, Skinny kKind, int kRanks>
struct SkinnySums : SkinnyLoads<T, kKind, kRanks> {
  using Loads = SkinnyLoads<T, kKind, kRanks>;
  using Loads::kColumns;
  using Loads::kRows;
  using Loads::kSize;
  using Loads::lane;
  using Loads::p;
  using Loads::rank0;
  using Loads::thread;
  using Loads::warp;
  using typename Loads::Factor;
  using typename Loads::Product;
  using typename Loads::Tile;
  static constexpr int kRankTiles = kRanks / 8;
  // Rank tiles whose sums of a tile of X are apart at once. On sm_75 two CTAs share an SM's registers.
  static constexpr int kAtOnce = kSm80 || kRankTiles <= 4 ? kRankTiles : 2;
  static constexpr int kSTiles = kRows / 16 / Tile::kWarpRows;  // of a warp: 16 rows each
  static constexpr int kSColumns = kColumns / Tile::kWarpColumns;
  static constexpr int kSSteps = kSColumns * kSize / 32;
  static constexpr int kDTiles = kColumns / 128;  // of a warp: 16 columns each
  static constexpr int kSFragments = kRows / 16 * kRankTiles * 32;
  static_assert(kSTiles >= 1 && kSSteps >= 1, "no whole steps");

  using Loads::Loads;

  // ---- Products of a tile

  using PStep = uint32_t[Product::kSubsteps][kRankTiles / 2][4];

  // P's fragments for a step: of two rank tiles in a load.
  template <int kTiles = kRankTiles>
  __device__ __forceinline__ void fragments_of_p(PStep& b, const char* of_warp, int step) const {
    const char* at = of_warp + ((lane & 7) + (lane >> 4) * 8) * Tile::kPPitch + ((lane >> 3) & 1) * 16;
#pragma unroll
    for (int sub = 0; sub < Product::kSubsteps; ++sub)
#pragma unroll
      for (int n = 0; n < kTiles / 2; ++n)
        ptx::load_matrices(b[sub][n], at + n * 16 * Tile::kPPitch + (step * Product::kSubsteps + sub) * 32);
  }

  // sums += X·P or Xᵀ·Q of 16 rows or columns of X, by a factor in parts: `steps` of 16 terms. This lane reads X at `x`,
  // each step `apart`; the factor's eights are those from `first` on. `careful`: something isn't finite, or not all in
  // its parts. There the factor itself is read, whose neighbours are those from `origin` on.
  template <bool kOfP, int kAlong>
  __device__ __forceinline__ void add_parts(
      float (&sums)[kRankTiles][4], const char* x, int apart, const char* factor, int steps, int first,
      int64_t origin, bool careful) const {
    using Split = SplitTile<kRanks, kAlong>;
    const char* at = factor + ((lane & 7) + (lane >> 4) * 8) * Split::kPitch + ((lane >> 3) & 1) * 16 + first * 16;
    const float* inverses =
        reinterpret_cast<const float*>(factor + Split::kInverses) + first * kRanks + lane % 4 * 2;
    float large[kRankTiles][4];
    clear(large);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      uint32_t raw[4];
      if constexpr (kOfP) ptx::load_matrices(raw, x);
      else ptx::load_matrices_transposed(raw, x);
      x += apart;
#pragma unroll
      for (int two = 0; two < kRankTiles / 2; ++two) {
        uint32_t b[3][4];
#pragma unroll
        for (int part = 0; part < 3; ++part)
          ptx::load_matrices(b[part], at + two * 16 * Split::kPitch + part * Split::kPlane);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 2 * two + i / 2, sub = i % 2;
          const sm75::Half a = {{raw[2 * sub], raw[2 * sub + 1]}};
          const float2 inverse = *reinterpret_cast<const float2*>(inverses + sub * kRanks + n * 8);
          if (careful) {
            if (!__all_sync(sm75::kAll, a.finite() && inverse.x > 0.0f && inverse.y > 0.0f)) {
              const int64_t rank = rank0 + n * 8 + lane / 4, from = origin + step * 16 + sub * 8 + lane % 4 * 2;
              sm75::multiply_by_fma(
                  large[n], a, this->template factor<kOfP>(rank, from),
                  this->template factor<kOfP>(rank, from + 1));
              continue;
            }
          }
          sm75::multiply(large[n], a, b[0][i], b[1][i], b[2][i], inverse);
        }
      }
      at += 32;
      inverses += 2 * kRanks;
    }
#pragma unroll
    for (int n = 0; n < kRankTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] += large[n][i];
  }

  // The same of all that a warp has: X·P, of columns from `column0` on.
  __device__ __forceinline__ void add_parts_of_p(
      float (&sums)[kSTiles][kRankTiles][4], const char* x, const char* of_p, int64_t column0,
      bool careful) const {
    const int warp_row = warp % Tile::kWarpRows, first = warp / Tile::kWarpRows * kSColumns;
    const char* at =
        x + (warp_row * kSTiles * 16 + (lane & 15)) * Tile::kXPitch + first * kSize + (lane >> 4) * 16;
#pragma unroll
    for (int m = 0; m < kSTiles; ++m)
      add_parts<true, kColumns>(
          sums[m], at + m * 16 * Tile::kXPitch, 32, of_p, kSSteps, first / 8, column0 + first, careful);
  }

  // Xᵀ·Q, of rows from `row0` on, and Xᵀ·1.
  __device__ __forceinline__ void add_parts_of_q(
      float (&sums)[kDTiles][kRankTiles][4], float (&ones)[kDTiles][4], const char* x, const char* q, int64_t row0,
      bool wants_bias, bool careful) const {
    const char* at =
        x + warp * kDTiles * 16 * kSize + ((lane & 7) + (lane >> 4) * 8) * Tile::kXPitch + ((lane >> 3) & 1) * 16;
#pragma unroll
    for (int m = 0; m < kDTiles; ++m) {
      if (p.D != nullptr)
        add_parts<false, kRows>(sums[m], at + m * 32, 16 * Tile::kXPitch, q, kRows / 16, 0, row0, careful);
      if (!wants_bias) continue;
      float column[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
      for (int step = 0; step < kRows / 16; ++step) {
        uint32_t raw[4];
        ptx::load_matrices_transposed(raw, at + m * 32 + step * 16 * Tile::kXPitch);
        sm75::add_ones(column, sm75::Half{{raw[0], raw[1]}});
        sm75::add_ones(column, sm75::Half{{raw[2], raw[3]}});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) ones[m][i] += column[i];
    }
  }

  // sums += X·P of a warp's rows and columns. P is in registers (`kept`), or in shared memory.
  template <bool kKept>
  __device__ __forceinline__ void multiply_s(
      float (&sums)[kSTiles][kRankTiles][4], const char* x, const char* of_p, const PStep* kept) const {
    const int warp_row = warp % Tile::kWarpRows, warp_column = warp / Tile::kWarpRows;
    const char* at = x + (warp_row * kSTiles * 16 + (lane & 15)) * Tile::kXPitch +
                     warp_column * kSColumns * kSize + (lane >> 4) * 16;
    const char* from_p = of_p + warp_column * kSColumns * static_cast<int>(sizeof(Factor));
    if constexpr (!Product::kTf32) {
#pragma unroll
      for (int step = 0; step < kSSteps; ++step) {
        PStep b;
        if constexpr (!kKept) fragments_of_p(b, from_p, step);
        const PStep& of = *(kKept ? kept + step : &b);
#pragma unroll
        for (int m = 0; m < kSTiles; ++m) {
          uint32_t a[4];
          ptx::load_matrices(a, at + m * 16 * Tile::kXPitch + step * 32);
#pragma unroll
          for (int n = 0; n < kRankTiles; ++n)
            ptx::multiply_bf16(sums[m][n], a, of[0][n / 2][n % 2 * 2], of[0][n / 2][n % 2 * 2 + 1]);
        }
      }
    } else {
#pragma unroll
      for (int m = 0; m < kSTiles; ++m)
#pragma unroll
        for (int n0 = 0; n0 < kRankTiles; n0 += kAtOnce) {
          float large[kAtOnce][4], small[kAtOnce][4];
          clear(large);
          clear(small);
#pragma unroll 1  // the code of a step is long
          for (int step = 0; step < kSSteps; ++step) {
            PStep b;
            if constexpr (!kKept) fragments_of_p<kAtOnce>(b, from_p + n0 * 8 * Tile::kPPitch, step);
            const PStep& of = *(kKept ? kept + step : &b);
            uint32_t raw[4];
            ptx::load_matrices(raw, at + m * 16 * Tile::kXPitch + step * 32);
#pragma unroll
            for (int sub = 0; sub < Product::kSubsteps; ++sub) {
              typename Product::Left a;
              Product::take(a, raw, sub);
#pragma unroll
              for (int n = 0; n < kAtOnce; ++n)
                Product::add(large[n], small[n], a, of[sub][n / 2][n % 2 * 2], of[sub][n / 2][n % 2 * 2 + 1]);
            }
          }
          add_apart(sums[m] + n0, large, small);
        }
    }
  }

  static __device__ __forceinline__ void add_apart(
      float (*sums)[4], const float (&large)[kAtOnce][4], const float (&small)[kAtOnce][4]) {
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] += large[n][i] + if_finite(small[n][i]);
  }

  // sums += Xᵀ·Q of a warp's columns, and ones += Xᵀ·1: what is wanted of both.
  template <bool kWantsD, bool kWantsBias>
  __device__ __forceinline__ void multiply_d(
      float (&sums)[kDTiles][kRankTiles][4], float (&ones)[kDTiles][4], const char* x, const char* q) const {
    const char* of_warp = x + warp * kDTiles * 16 * kSize;
    // Transposed: matrices of the rows 0 and columns 0, rows 0 and columns 8, rows 8 and columns 0, rows 8 and columns 8.
    const char* at = of_warp + ((lane & 7) + (lane >> 4) * 8) * Tile::kXPitch + ((lane >> 3) & 1) * 16;
    if constexpr (!Product::kTf32) {
      const char* from_q = q + (lane & 15) * Tile::kQPitch + (lane >> 4) * 16;
#pragma unroll
      for (int step = 0; step < kRows / 16; ++step) {
        uint32_t b[kRankTiles / 2][4];
        if constexpr (kWantsD) {
#pragma unroll
          for (int n = 0; n < kRankTiles / 2; ++n)
            ptx::load_matrices_transposed(b[n], from_q + step * 16 * Tile::kQPitch + n * 32);
        }
#pragma unroll
        for (int m = 0; m < kDTiles; ++m) {
          uint32_t a[4];
          ptx::load_matrices_transposed(a, at + step * 16 * Tile::kXPitch + m * 32);
          if constexpr (kWantsD) {
#pragma unroll
            for (int n = 0; n < kRankTiles; ++n)
              ptx::multiply_bf16(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
          }
          if constexpr (kWantsBias) ptx::multiply_bf16(ones[m], a, 0x3F803F80u, 0x3F803F80u);  // 1 and 1
        }
      }
    } else {
      const int g = lane / 4, t = lane % 4;
      const char* from_q = q + 2 * t * Tile::kQPitch + g * 4;
#pragma unroll
      for (int m = 0; m < kDTiles; ++m)
#pragma unroll
        for (int n0 = 0; n0 < (kWantsD ? kRankTiles : 1); n0 += kAtOnce) {
          float large[kAtOnce][4], small[kAtOnce][4], column[2][4];
          clear(large);
          clear(small);
          clear(column);
#pragma unroll 1
          for (int step = 0; step < kRows / (8 * Product::kSubsteps); ++step) {
            uint32_t raw[4];
            if constexpr (kSize == 2) {
              ptx::load_matrices_transposed(raw, at + step * 16 * Tile::kXPitch + m * 32);
            } else {
              const char* element = of_warp + (step * 8 + 2 * t) * Tile::kXPitch + (m * 16 + g) * 4;
#pragma unroll
              for (int i = 0; i < 4; ++i)
                raw[i] = *reinterpret_cast<const uint32_t*>(element + i / 2 * Tile::kXPitch + i % 2 * 32);
            }
#pragma unroll
            for (int sub = 0; sub < Product::kSubsteps; ++sub) {
              typename Product::Left a;
              Product::take(a, raw, sub);
              if constexpr (kWantsD) {
                const char* pair = from_q + (step * Product::kSubsteps + sub) * 8 * Tile::kQPitch + n0 * 32;
#pragma unroll
                for (int n = 0; n < kAtOnce; ++n) {
                  const uint32_t b0 = *reinterpret_cast<const uint32_t*>(pair + n * 32);
                  const uint32_t b1 = *reinterpret_cast<const uint32_t*>(pair + Tile::kQPitch + n * 32);
                  Product::add(large[n], small[n], a, b0, b1);
                }
              }
              if (kWantsBias && n0 == 0) Product::add_ones(column[0], column[1], a);
            }
          }
          if constexpr (kWantsD) add_apart(sums[m] + n0, large, small);
#pragma unroll
          for (int i = 0; i < 4; ++i) ones[m][i] += column[0][i] + if_finite(column[1][i]);
        }
    }
  }

  // ---- Sums of S. Fragment f of a tile is a float4: lane f % 32 of rank tile f / 32 % kRankTiles of 16 rows.

  // Where a part of a tile's S lies: `part` of `parts` CTAs that share its columns.
  __device__ __forceinline__ float4* parts_of_s(int64_t tile, int part, int parts) const {
    const int64_t tiles = (p.rows + kRows - 1) / kRows;
    return reinterpret_cast<float4*>(p.S_parts) +
           ((static_cast<int64_t>(blockIdx.z) * parts + part) * tiles + tile) * kSFragments;
  }

  __device__ __forceinline__ void store_s(int64_t tile, int f, float4 v) const {
    const int of = f % 32;
    const int64_t row = tile * kRows + f / (32 * kRankTiles) * 16 + of / 4;
    const int64_t rank = rank0 + f / 32 % kRankTiles * 8 + of % 4 * 2;
    Factor* to = static_cast<Factor*>(p.S) + row * p.r + rank;
    const float scale = p.S_scale;
    if (row < p.rows) store_pair(to, rank, v.x * scale, v.y * scale);
    if (row + 8 < p.rows) store_pair(to + 8 * p.r, rank, v.z * scale, v.w * scale);
  }

  __device__ __forceinline__ void store_pair(Factor* to, int64_t rank, float first, float second) const {
    if (rank + 1 < p.r && p.r % 2 == 0) {
      if constexpr (sizeof(Factor) == 4) {
        *reinterpret_cast<float2*>(to) = make_float2(first, second);
      } else {
        *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(first, second);
      }
    } else {
      if (rank < p.r) to[0] = from_float<Factor>(first);
      if (rank + 1 < p.r) to[1] = from_float<Factor>(second);
    }
  }

  // Each warp's sums to where all can add them.
  __device__ __forceinline__ void cross(float4* to, const float (&sums)[kSTiles][kRankTiles][4]) const {
    const int warp_row = warp % Tile::kWarpRows, warp_column = warp / Tile::kWarpRows;
    float4* at = to + warp_column * kSFragments + warp_row * kSTiles * kRankTiles * 32 + lane;
#pragma unroll
    for (int m = 0; m < kSTiles; ++m)
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n)
        at[(m * kRankTiles + n) * 32] = make_float4(sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]);
  }

  static __device__ __forceinline__ void add(float4& to, const float4& v) {
    to.x += v.x;
    to.y += v.y;
    to.z += v.z;
    to.w += v.w;
  }

  // A tile's S, of all warps: stored, or left as this CTA's part.
  __device__ __forceinline__ void finish_s(const float4* from, int64_t tile, int part, int parts) const {
    float4* to = parts > 1 ? parts_of_s(tile, part, parts) + thread : nullptr;
#pragma unroll
    for (int i = 0; i < kSFragments; i += kSkinnyThreads) {
      if (kSFragments % kSkinnyThreads != 0 && i + thread >= kSFragments) break;
      float4 v = from[i + thread];
#pragma unroll
      for (int j = 1; j < Tile::kWarpColumns; ++j) add(v, from[j * kSFragments + i + thread]);
      if (to != nullptr) to[i] = v;
      else store_s(tile, i + thread, v);
    }
  }

  // Adds up the parts of a tile's S.
  __device__ __forceinline__ void add_up_s(int64_t tile, int parts) const {
    const int64_t stride = (p.rows + kRows - 1) / kRows * kSFragments;
    for (int f = thread; f < kSFragments; f += kSkinnyThreads) {
      const float4* from = parts_of_s(tile, 0, parts) + f;
      float4 v = *from;
#pragma unroll 4
      for (int i = 1; i < parts; ++i) {
        from += stride;
        add(v, *from);
      }
      store_s(tile, f, v);
    }
  }

  // ---- Sums of D and of the bias

  __device__ __forceinline__ void store_d(float (&sums)[kDTiles][kRankTiles][4], float (&ones)[kDTiles][4]) const {
    const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kColumns + warp * kDTiles * 16 + lane / 4;
#pragma unroll
    for (int m = 0; m < kDTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t column = column0 + m * 16 + h * 8;
        if (column >= p.columns) continue;
        if (p.D != nullptr) {
#pragma unroll
          for (int n = 0; n < kRankTiles; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int64_t rank = rank0 + n * 8 + lane % 4 * 2 + j;
              if (rank < p.r)
                store_as(p.D, column * p.D_column + rank * p.D_rank, sums[m][n][2 * h + j] * p.D_scale, p.D_dtype);
            }
        }
        if (p.bias != nullptr && blockIdx.z == 0 && lane % 4 == 0)
          static_cast<T*>(p.bias)[column] = from_float<T>(ones[m][2 * h]);
      }
  }

  __device__ __forceinline__ void finish_d(
      float (&sums)[kDTiles][kRankTiles][4], float (&ones)[kDTiles][4], uint32_t* counter) const {
    const int parts = static_cast<int>(gridDim.y);
    if (parts == 1) return store_d(sums, ones);
    // A part: [column block] of fragments, a float4 a thread.
    const int64_t block = static_cast<int64_t>(blockIdx.z) * parts * gridDim.x + blockIdx.x;
    const int64_t of_ones = static_cast<int64_t>(blockIdx.x) * kDTiles * kSkinnyThreads + thread;
    constexpr int64_t kFragments = kDTiles * kRankTiles * kSkinnyThreads;
    float4* at = reinterpret_cast<float4*>(p.D_parts) + block * kFragments + thread;
    float2* at_ones = reinterpret_cast<float2*>(p.bias_parts) + of_ones;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kFragments;
    const int64_t stride_ones = static_cast<int64_t>(gridDim.x) * kDTiles * kSkinnyThreads;
    const bool has_bias = p.bias != nullptr && blockIdx.z == 0;
    if (p.D != nullptr) {
#pragma unroll
      for (int m = 0; m < kDTiles; ++m)
#pragma unroll
        for (int n = 0; n < kRankTiles; ++n)
          at[blockIdx.y * stride + (m * kRankTiles + n) * kSkinnyThreads] =
              make_float4(sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]);
    }
    if (has_bias) {
#pragma unroll
      for (int m = 0; m < kDTiles; ++m)
        at_ones[blockIdx.y * stride_ones + m * kSkinnyThreads] = make_float2(ones[m][0], ones[m][2]);
    }
    if (arrive(counter) != static_cast<uint32_t>(parts - 1)) return;
    if (p.D != nullptr) {
#pragma unroll
      for (int m = 0; m < kDTiles; ++m)
#pragma unroll
        for (int n = 0; n < kRankTiles; ++n) {
          const float4* from = at + (m * kRankTiles + n) * kSkinnyThreads;
          float4 v = *from;
#pragma unroll 4
          for (int i = 1; i < parts; ++i) {
            from += stride;
            add(v, *from);
          }
          sums[m][n][0] = v.x;
          sums[m][n][1] = v.y;
          sums[m][n][2] = v.z;
          sums[m][n][3] = v.w;
        }
    }
    if (has_bias) {
#pragma unroll
      for (int m = 0; m < kDTiles; ++m) {
        const float2* from = at_ones + m * kSkinnyThreads;
        float2 v = *from;
        for (int i = 1; i < parts; ++i) {
          v.x += from[i * stride_ones].x;
          v.y += from[i * stride_ones].y;
        }
        ones[m][0] = v.x;
        ones[m][2] = v.y;
      }
    }
    store_d(sums, ones);
    if (thread == 0) *counter = 0;
  }
};

}  // namespace lorafast::cuda
