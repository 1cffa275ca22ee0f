// s = conv(x, A): x [batch, H, W, C], lora_A [r, kernel_h, kernel_w, C] → s [batch, height, width, r], all of them
// contiguous float32. Threads share out blocks of positions.
#include <cstdlib>
#include <new>

#include "operations.h"
#include "windows.h"

namespace lorafast::cpu {

namespace {

// Positions that a thread takes at a time, whose rows of x and s stay in a core's cache from tap to tap: fewer
// where there would be too few blocks for all threads.
constexpr int64_t kMostPositions = 64, kBlocks = 16;
constexpr int64_t kSegment = 512;  // columns of A that a thread packs at a time

// Whole cache lines: a vector that lies in two of them is loaded twice.
struct Free {
  void operator()(float* memory) const { std::free(memory); }
};
using Aligned = std::unique_ptr<float[], Free>;

Aligned aligned(int64_t count) {
  const size_t bytes = static_cast<size_t>(padded(std::max<int64_t>(count, 1))) * sizeof(float);
  auto* memory = static_cast<float*>(std::aligned_alloc(kLanes * sizeof(float), bytes));
  if (memory == nullptr) throw std::bad_alloc();
  return Aligned(memory);
}

// A as gather_columns takes it: [rank blocks][taps][columns][kLanes]; `Per` columns of a rank lie together.
template <int Per>
Aligned pack_taps(const float* A, int64_t r, int64_t all_cols) {
  constexpr int64_t kRanks = kLanes / Per;
  const int64_t blocks = blocks_of(r, kRanks);
  auto packed = aligned(blocks * all_cols * kRanks);
  const int64_t segments = blocks_of(all_cols, kSegment);
  torch::stable::parallel_for(0, blocks * segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t block = part / segments, first = part % segments * kSegment;
      const float* from[kRanks];  // beyond the last rank a row that is there, whose sums nobody reads
      for (int64_t j = 0; j < kRanks; ++j) from[j] = A + std::min(block * kRanks + j, r - 1) * all_cols;
      float* to = &packed[(block * all_cols + first) * kRanks];
      for (int64_t c = first; c < std::min(first + kSegment, all_cols); c += Per, to += kLanes)
        for (int64_t j = 0; j < kRanks; ++j) std::memcpy(to + j * Per, from[j] + c, Per * sizeof(float));
    }
  });
  return packed;
}

}  // namespace

void conv_shrink(
    const Tensor& x, const Tensor& lora_A, int64_t stride_h, int64_t stride_w, int64_t padding_h,
    int64_t padding_w, int64_t dilation_h, int64_t dilation_w, Tensor s) {
  const OneDevice device(kDevice, "x", x);
  check_images("x", x, {}, device);
  check_images("lora_A", lora_A, {}, device);
  const int64_t C = x.size(3), r = lora_A.size(0);
  check_images("lora_A", lora_A, {r, lora_A.size(1), lora_A.size(2), C}, device);
  const Windows windows(
      x, lora_A.size(1), lora_A.size(2), {stride_h, padding_h, dilation_h}, {stride_w, padding_w, dilation_w});
  check_images("s", s, {x.size(0), windows.height, windows.width, r}, device);
  if (s.numel() == 0 || C == 0) return clear(s);
  const Microkernels& kernels = microkernels();
  // Few ranks leave half of the lanes to a second column.
  const bool paired = r <= kLanes / 2 && C % 2 == 0;
  const int64_t per = paired ? 2 : 1, ranks = kLanes / per, rank_blocks = blocks_of(r, ranks);
  const int64_t step = C / per * kLanes;  // of a tap
  const auto* A = static_cast<const float*>(lora_A.const_data_ptr());
  const auto factors = paired ? pack_taps<2>(A, r, windows.taps * C) : pack_taps<1>(A, r, windows.taps * C);
  auto* to = static_cast<float*>(s.mutable_data_ptr());

  const int64_t size = std::min(kMostPositions, blocks_of(blocks_of(windows.positions, kBlocks), 8) * 8);
  torch::stable::parallel_for(0, blocks_of(windows.positions, size), 1, [&](int64_t begin, int64_t end) {
    const int64_t step_of_sums = (size + 1) * kLanes;  // of a rank block, with a row that nobody reads
    constexpr int64_t kRoom = kMostPositions + kGatheredRows;
    const auto sums = aligned(rank_blocks * step_of_sums);
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

}  // namespace lorafast::cpu
