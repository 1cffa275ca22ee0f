// dA of s = conv(x, A): ds [batch, height, width, r], x [batch, H, W, C] → dA [r, kernel_h, kernel_w, C], all of them
// contiguous float32, C a multiple of kLanes.
#include "operations.h"
#include "windows.h"

namespace lorafast::cpu {

namespace {

constexpr int64_t kColumns = 64;     // of x that a thread takes at a time
constexpr int64_t kPositions = 256;  // at a time, whose part of these columns stays in a core's cache
constexpr int64_t kMostChunks = 32;

// ds with zeros beyond the last rank, if there are to be more: itself, or in `copy`.
const float* with_ranks(const float* ds, int64_t rows, int64_t r, int64_t ranks, std::unique_ptr<float[]>& copy) {
  if (r == ranks) return ds;
  copy = scratch<float>(rows * ranks);
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(ds + i * r, r, &copy[i * ranks]);
    std::fill(&copy[i * ranks + r], &copy[(i + 1) * ranks], 0.0f);
  }
  return copy.get();
}

}  // namespace

void conv_shrink_backward(
    const Tensor& ds, const Tensor& x, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, Tensor dA) {
  const OneDevice device(kDevice, "ds", ds);
  check_images("ds", ds, {}, device);
  check_images("x", x, {}, device);
  check_images("dA", dA, {}, device);
  const int64_t C = x.size(3), r = ds.size(3);
  STD_TORCH_CHECK(C % kLanes == 0, "x has ", C, " channels, expected a multiple of ", kLanes);
  check_images("dA", dA, {r, dA.size(1), dA.size(2), C}, device);
  const Windows windows(
      x, dA.size(1), dA.size(2), {stride_h, padding_h, dilation_h}, {stride_w, padding_w, dilation_w});
  check_images("ds", ds, {x.size(0), windows.height, windows.width, r}, device);
  if (dA.numel() == 0 || windows.positions == 0) return clear(dA);
  const Microkernels& kernels = microkernels();
  const int64_t positions = windows.positions, taps = windows.taps;
  const int64_t ranks = blocks_of(r, kGatheredRanks) * kGatheredRanks;
  std::unique_ptr<float[]> copy;
  const float* factors = with_ranks(static_cast<const float*>(ds.const_data_ptr()), positions, r, ranks, copy);

  // The cut depends on the shape alone, so that any number of threads adds up in the same order.
  const int64_t chunk_rows = std::max(kPositions, blocks_of(positions, kMostChunks));
  const int64_t chunks = blocks_of(positions, chunk_rows), stripes = blocks_of(C, kColumns);
  const int64_t size = taps * C * ranks;  // of a chunk's sums [C / kLanes][taps][ranks][kLanes], by stripes
  const auto partials = scratch<float>(chunks * size);
  torch::stable::parallel_for(0, chunks * stripes, 1, [&](int64_t begin, int64_t end) {
    const float *rows[kPositions], *of_rows[kPositions];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit % chunks, col = unit / chunks * kColumns, cols = std::min(kColumns, C - col);
      const int64_t last = std::min((chunk + 1) * chunk_rows, positions);
      float* sums = &partials[chunk * size + col * taps * ranks];
      std::fill_n(sums, cols * taps * ranks, 0.0f);
      for (int64_t first = chunk * chunk_rows; first < last; first += kPositions)
        for (int64_t tap = 0; tap < taps; ++tap) {
          int64_t count = 0;
          windows.visit(tap, first, std::min(first + kPositions, last), [&](int64_t position, const float* row) {
            rows[count] = row + col;
            of_rows[count++] = factors + position * ranks;
          });
          kernels.gather_rows(rows, count, cols, of_rows, ranks, sums + tap * cols * ranks);
        }
    }
  });

  auto* to = static_cast<float*>(dA.mutable_data_ptr());
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
