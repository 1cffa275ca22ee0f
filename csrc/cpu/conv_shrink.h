// conv(x, A) and its gradient in A over the windows of channels-last images, all of them contiguous float32.
#pragma once

#include "windows.h"

namespace lorafast::cpu {

// Positions that a thread takes at a time, whose rows of x and s stay in a core's cache from tap to tap: fewer
// where there would be too few blocks for all threads.
constexpr int64_t kMostPositions = 64, kBlocks = 16;
constexpr int64_t kPackedColumns = 512;  // of A, that a thread packs at a time

// A as gather_columns takes it: [rank blocks][taps][columns][kLanes]; `Per` columns of a rank lie together.
template <int Per>
Scratch<float> pack_taps(const float* A, int64_t r, int64_t all_cols) {
  constexpr int64_t kRanks = kLanes / Per;
  const int64_t blocks = blocks_of(r, kRanks);
  auto packed = scratch<float>(blocks * all_cols * kRanks);
  const int64_t segments = blocks_of(all_cols, kPackedColumns);
  torch::stable::parallel_for(0, blocks * segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t block = part / segments, first = part % segments * kPackedColumns;
      const float* from[kRanks];  // beyond the last rank a row that is there, whose sums nobody reads
      for (int64_t j = 0; j < kRanks; ++j) from[j] = A + std::min(block * kRanks + j, r - 1) * all_cols;
      float* to = &packed[(block * all_cols + first) * kRanks];
      for (int64_t c = first; c < std::min(first + kPackedColumns, all_cols); c += Per, to += kLanes)
        for (int64_t j = 0; j < kRanks; ++j) std::memcpy(to + j * Per, from[j] + c, Per * sizeof(float));
    }
  });
  return packed;
}

// to = conv(x, A): A [r, taps, C], to [positions, r]. Threads share out blocks of positions.
inline void shrink_windows(const Windows& windows, const float* A, int64_t r, int64_t C, float* to) {
  const Microkernels& kernels = microkernels();
  // Few ranks leave half of the lanes to a second column.
  const bool paired = r <= kLanes / 2 && C % 2 == 0;
  const int64_t per = paired ? 2 : 1, ranks = kLanes / per, rank_blocks = blocks_of(r, ranks);
  const int64_t step = C / per * kLanes;  // of a tap
  const auto factors = paired ? pack_taps<2>(A, r, windows.taps * C) : pack_taps<1>(A, r, windows.taps * C);

  const int64_t size = std::min(kMostPositions, blocks_of(blocks_of(windows.positions, kBlocks), 8) * 8);
  torch::stable::parallel_for(0, blocks_of(windows.positions, size), 1, [&](int64_t begin, int64_t end) {
    const int64_t step_of_sums = (size + 1) * kLanes;  // of a rank block, with a row that nobody reads
    constexpr int64_t kRoom = kMostPositions + kGatheredRows;
    const auto sums = scratch<float>(rank_blocks * step_of_sums);
    const float* rows[kRoom];
    float* outs[kRoom];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * size, last = std::min(first + size, windows.positions);
      std::fill_n(sums.get(), rank_blocks * step_of_sums, 0.0f);
      for (int64_t tap = 0; tap < windows.taps; ++tap) {
        int64_t count = 0;
        windows.visit(tap, first, last, [&](int64_t position, const float* row) {
          rows[count] = row;
          outs[count++] = &sums[(position - first) * kLanes];
        });
        for (const int64_t found = count; count % kGatheredRows != 0; ++count) {
          rows[count] = rows[found - 1];
          outs[count] = &sums[size * kLanes];
        }
        kernels.gather_columns(rows, count, C, paired, &factors[tap * step], outs);
        for (int64_t j = 1; j < rank_blocks; ++j) {
          for (int64_t i = 0; i < count; ++i) outs[i] += step_of_sums;
          kernels.gather_columns(rows, count, C, paired, &factors[(j * windows.taps + tap) * step], outs);
        }
      }
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < r; ++j) {
          const float* sum = &sums[j / ranks * step_of_sums + (i - first) * kLanes + j % ranks * per];
          to[i * r + j] = paired ? sum[0] + sum[1] : sum[0];
        }
    }
  });
}

constexpr int64_t kColumns = 64;  // of x that a thread takes at a time
constexpr int64_t kRows = 256;    // at a time, whose part of these columns stays in a core's cache
constexpr int64_t kMostParts = 32;

// ds with zeros beyond the last rank, if there are to be more: itself, or in `copy`.
inline const float* with_ranks(const float* ds, int64_t rows, int64_t r, int64_t ranks, Scratch<float>& copy) {
  if (r == ranks) return ds;
  copy = scratch<float>(rows * ranks);
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(ds + i * r, r, &copy[i * ranks]);
    std::fill(&copy[i * ranks + r], &copy[(i + 1) * ranks], 0.0f);
  }
  return copy.get();
}

// to = dA of s = conv(x, A): ds [positions, r], to [r, taps, C]; C is a multiple of kLanes.
inline void shrink_windows_backward(const Windows& windows, const float* ds, int64_t r, int64_t C, float* to) {
  const Microkernels& kernels = microkernels();
  const int64_t positions = windows.positions, taps = windows.taps;
  const int64_t ranks = blocks_of(r, kGatheredRanks) * kGatheredRanks;
  Scratch<float> copy;
  const float* factors = with_ranks(ds, positions, r, ranks, copy);

  // The cut depends on the shape alone, so that any number of threads adds up in the same order.
  const int64_t chunk_rows = std::max(kRows, blocks_of(positions, kMostParts));
  const int64_t chunks = blocks_of(positions, chunk_rows), stripes = blocks_of(C, kColumns);
  const int64_t size = taps * C * ranks;  // of a chunk's sums [C / kLanes][taps][ranks][kLanes], by stripes
  const auto partials = scratch<float>(chunks * size);
  torch::stable::parallel_for(0, chunks * stripes, 1, [&](int64_t begin, int64_t end) {
    const float *rows[kRows], *of_rows[kRows];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit % chunks, col = unit / chunks * kColumns, cols = std::min(kColumns, C - col);
      const int64_t last = std::min((chunk + 1) * chunk_rows, positions);
      float* sums = &partials[chunk * size + col * taps * ranks];
      std::fill_n(sums, cols * taps * ranks, 0.0f);
      for (int64_t first = chunk * chunk_rows; first < last; first += kRows)
        for (int64_t tap = 0; tap < taps; ++tap) {
          int64_t count = 0;
          windows.visit(tap, first, std::min(first + kRows, last), [&](int64_t position, const float* row) {
            rows[count] = row + col;
            of_rows[count++] = factors + position * ranks;
          });
          kernels.gather_rows(rows, count, cols, of_rows, ranks, sums + tap * cols * ranks);
        }
    }
  });

  torch::stable::parallel_for(0, C / kLanes * taps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t tap = part % taps, col = part / taps * kLanes, stripe = col / kColumns * kColumns;
      const int64_t cols = std::min(kColumns, C - stripe);
      const float* from = &partials[(stripe * taps + tap * cols + col - stripe) * ranks];
      for (int64_t j = 0; j < r; ++j) {
        float sums[kLanes] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += from[chunk * size + j * kLanes + lane];
        std::copy_n(sums, kLanes, to + (j * taps + tap) * C + col);
      }
    }
  });
}

}  // namespace lorafast::cpu
