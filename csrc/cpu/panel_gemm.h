// A base GEMM in bfloat16 of our own, out = a·b + scaling · s·lora_Bᵀ + bias: the adapter's term is in the sums before
// the base GEMM's, and they are rounded once.
//
// oneDNN packs the weight in every call, every thread for itself. Here threads share out its columns, pack as many as
// the second cache holds, and multiply all rows by them, which stay as they lie in memory. Measured on a Zen 4 with
// 117 GMAC/s a core, y and dx: 107 to 111 a core where oneDNN reaches 102 to 109, at 1024 x 1024 to 2048 x 5632.
#pragma once

#include <limits>

#include "pack.h"

namespace lorafast::cpu {

// The adapter's term, s [rows, r] and lora_B [N, r], of so many rows of out from `first` on. The others meet no number
// of the adapter's.
struct Expanded {
  Matrix s, lora_B;
  double scaling;
  int64_t first = 0;
};

constexpr int64_t kPackedBytes = 512 << 10;  // of panels for one thread: half a second cache
constexpr int64_t kMostDepth = 8192;         // of which one panel fills that cache; at 14336 oneDNN was ahead
constexpr int64_t kFewestRows = 64;          // below, oneDNN was ahead by up to a tenth with large weights
constexpr int64_t kRowsToPack = 16;          // rows that packing a panel is taken to cost: an estimate
constexpr int64_t kRowsToRead = 4;           // rows whose reading is taken to cost one more: an estimate

// Whether it serves out [M, N] = a [M, K] · b [K, N]. Where a processor has AMX, oneDNN uses it.
inline bool panels_serve(const Microkernels& kernels, const Matrix& a, const Matrix& b, const Matrix& out) {
  const auto halves = [](const Matrix& matrix) { return matrix.dtype == Dtype::kBFloat16; };
  const bool by_pairs = a.cols > 0 && a.cols % 2 == 0 && a.cols <= kMostDepth && b.cols > 0;
  const bool in_place = a.col_stride == 1 && out.col_stride == 1 && (b.col_stride == 1 || b.row_stride == 1);
  return kernels.panels != nullptr && !has_amx() && halves(a) && halves(b) && halves(out) && by_pairs &&
         in_place && a.rows >= kFewestRows;
}

// How threads share out the panels and, where there are too few for all threads, the rows.
struct PanelParts {
  int64_t panels = 1, rows = 1;

  PanelParts(int64_t M, int64_t all_panels, int64_t panel_bytes) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t least = blocks_of(all_panels, std::max<int64_t>(1, kPackedBytes / panel_bytes));
    int64_t best = std::numeric_limits<int64_t>::max();
    for (int64_t r = 1; r <= threads; ++r) {
      const int64_t p = std::min(all_panels, blocks_of(std::max(least * r, threads), r));
      const int64_t rows_of_a = blocks_of(M, r);  // which each part reads anew
      const int64_t part = blocks_of(all_panels, p) * (rows_of_a + kRowsToPack) + rows_of_a / kRowsToRead;
      const int64_t time = blocks_of(p * r, threads) * part;
      if (time < best) {
        best = time;
        panels = p;
        rows = r;
      }
    }
  }
};

inline void panel_gemm(
    const Microkernels& kernels, const Matrix& a, const Matrix& b, const std::optional<Matrix>& bias,
    const std::optional<Expanded>& expanded, const Matrix& out) {
  const int64_t M = a.rows, N = b.cols, pairs = a.cols / 2, panels = blocks_of(N, kPanel);
  const int64_t r = expanded ? expanded->s.cols : 0, ranks = blocks_of(r, 2), panel = pairs * kPanel;
  const bool by_column = b.col_stride != 1;
  const int64_t ld = by_column ? b.col_stride : b.row_stride;
  const auto factors = ranks > 0 ? pack_pairs(kernels, transposed(expanded->lora_B)) : scratch<uint32_t>(0);
  std::vector<float> added;
  if (bias) {
    added.resize(panels * kPanel, 0.0f);
    bias->load_row(kernels, 0, 0, N, added.data());
  }
  const int64_t own = expanded ? expanded->first : M, end = expanded ? own + expanded->s.rows : M;
  const PanelParts parts(M, panels, panel * static_cast<int64_t>(sizeof(uint32_t)));
  torch::stable::parallel_for(0, parts.panels * parts.rows, 1, [&](int64_t begin, int64_t end_of_units) {
    const auto packed = scratch<uint32_t>(blocks_of(panels, parts.panels) * panel);
    std::vector<uint32_t> rows_of_s(kPanelRows * ranks, 0);
    int64_t first = 0, last = 0;  // the panels that are packed
    const auto multiply = [&](int64_t top, int64_t bottom, int64_t terms) {
      for (int64_t next = top; next < bottom; next += kPanelRows) {
        const int64_t row =
            std::max(top, std::min(next, bottom - kPanelRows));  // some twice, rather than one by one
        const int64_t rows = std::min(kPanelRows, bottom - row);
        for (int64_t i = 0; terms > 0 && i < rows; ++i)
          expanded->s.copy_row(kernels, row + i - own, 0, r, reinterpret_cast<uint16_t*>(&rows_of_s[i * ranks]));
        for (int64_t i = first; i < last; ++i)
          kernels.panels->multiply(
              reinterpret_cast<const uint16_t*>(a.at(row, 0)), a.row_stride, rows, pairs,
              &packed[(i - first) * panel], rows_of_s.data(), terms, &factors[i * kPanel * ranks],
              terms > 0 ? static_cast<float>(expanded->scaling) : 1.0f, bias ? &added[i * kPanel] : nullptr,
              reinterpret_cast<uint16_t*>(out.at(row, i * kPanel)), out.row_stride,
              std::min(kPanel, N - i * kPanel));
      }
    };
    int64_t last_part = -1;
    for (int64_t unit = begin; unit < end_of_units; ++unit) {
      const int64_t part = unit / parts.rows, rows_part = unit % parts.rows;
      first = panels * part / parts.panels, last = panels * (part + 1) / parts.panels;
      if (part != last_part)
        for (int64_t i = first; i < last; ++i)
          kernels.panels->pack(
              reinterpret_cast<const uint16_t*>(b.at(0, i * kPanel)), ld, by_column, pairs,
              std::min(kPanel, N - i * kPanel), &packed[(i - first) * panel]);
      last_part = part;
      const int64_t top = M * rows_part / parts.rows, bottom = M * (rows_part + 1) / parts.rows;
      multiply(top, std::min(bottom, own), 0);
      multiply(std::max(top, own), std::min(bottom, end), ranks);
      multiply(std::max(top, end), bottom, 0);
    }
  });
}

}  // namespace lorafast::cpu
