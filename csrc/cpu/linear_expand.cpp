// linear_expand of a dense weight: a base GEMM of oneDNN or MKL, and expand before or after it. And the base GEMM of
// a quantized weight W [N, K] for few rows, straight from its codes: y = x·Wᵀ + bias, or dx = dy·W. A tile of W is
// made dense in a core's first cache and multiplied there; sums are float32 and rounded once. The adapter's term is
// expand's, added to the result.
#include "base_gemm.h"
#include "codes.h"

namespace lorafast::cpu {

namespace {

// A tile of W, measured at 4096 x 4096 in bfloat16: whole rows, read in the order of memory, of which it has few for
// y and more for dx, whose sums are as wide as the tile.
constexpr int64_t kRows = 8, kRowsOfDx = 32, kColumns = 4096;
constexpr int64_t kLd = kColumns + kDotCols;  // a power of two would take all rows to the same places of a cache
constexpr int64_t kSums = 1 << 16;            // of dx, for one thread
constexpr int64_t kLeastColumns = 512;
constexpr int64_t kTask = 1 << 14;  // elements that are worth a thread

template <typename Value>
constexpr Dtype kDtype = kPaired<Value> ? Dtype::kBFloat16 : Dtype::kFloat32;

int64_t up(int64_t length, int64_t step) { return blocks_of(length, step) * step; }

// The rows of a matrix as Value, neighbours in memory, zeros up to a multiple of `step` columns: itself, or a copy.
template <typename Value>
class Rows {
 public:
  const Value* data;
  int64_t ld;

  Rows(const Microkernels& kernels, const Matrix& x, int64_t step) : ld(up(x.cols, step)) {
    if (x.dtype == kDtype<Value> && x.col_stride == 1 && x.cols == ld) {
      data = reinterpret_cast<const Value*>(x.data);
      ld = x.row_stride;
      return;
    }
    copy_ = scratch<Value>(x.rows * ld);
    for (int64_t m = 0; m < x.rows; ++m) {
      Value* const to = &copy_[m * ld];
      if constexpr (kPaired<Value>) x.copy_row(kernels, m, 0, x.cols, to);
      else x.load_row(kernels, m, 0, x.cols, to);
      std::fill(to + x.cols, to + ld, Value{});
    }
    data = copy_.get();
  }

 private:
  Scratch<Value> copy_;
};

// W[row.., column..] made dense, zeros up to [up_rows, up_columns]. The codes of the rows below are asked for: they
// come while this tile is multiplied, a third of the time at 16 rows of x.
template <typename Value, class Codes>
void load_tile(
    const Microkernels& kernels, const Codes& codes, int64_t row, int64_t rows, int64_t column, int64_t columns,
    int64_t up_rows, int64_t up_columns, std::vector<float>& scales, Value* tile) {
  for (int64_t i = 0; i < rows; ++i) {
    if (row + rows + i < codes.N) codes.prefetch(row + rows + i, column, columns);
    codes.load(kernels, row + i, column, columns, scales, kDtype<Value>, tile + i * kLd);
    std::fill(tile + i * kLd + columns, tile + i * kLd + up_columns, Value{});
  }
  for (int64_t i = rows; i < up_rows; ++i) std::fill_n(tile + i * kLd, up_columns, Value{});
}

float sum_of_lanes(const float* lanes) {
  float halves[kLanes / 2];
  for (int64_t c = 0; c < kLanes / 2; ++c) halves[c] = lanes[c] + lanes[c + kLanes / 2];
  for (int64_t c = 0; c < kLanes / 4; ++c) halves[c] += halves[c + kLanes / 4];
  return (halves[0] + halves[2]) + (halves[1] + halves[3]);
}

// y = x·Wᵀ + bias. Threads share out rows of W.
template <typename Value, class Codes>
void multiply_rows(
    const Microkernels& kernels, const Matrix& x, const Codes& codes, const std::optional<Matrix>& bias,
    const Matrix& y) {
  const int64_t M = x.rows, K = codes.K, N = codes.N;
  const int64_t most = M == 1 ? 1 : kRows;  // one row stays in the first cache
  const int64_t few = kTask / (most * std::max<int64_t>(K, 1)) + 1;
  const Rows<Value> from(kernels, x, kDotCols);
  torch::stable::parallel_for(0, blocks_of(N, most), few, [&](int64_t begin, int64_t end) {
    const auto tile = scratch<Value>(most * kLd);
    const auto lanes = scratch<float>(most * M * kLanes);
    std::vector<float> scales;
    float sums[kRows], added[kRows] = {};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * most, rows = std::min(most, N - row);
      std::fill_n(lanes.get(), K == 0 ? rows * M * kLanes : 0, 0.0f);
      for (int64_t k = 0; k < K; k += kColumns) {
        const int64_t columns = std::min(kColumns, K - k), padded = up(columns, kDotCols);
        load_tile(kernels, codes, row, rows, k, columns, rows, padded, scales, tile.get());
        products<Value>(kernels).dot(tile.get(), kLd, rows, padded, from.data + k, from.ld, M, lanes.get(), k > 0);
      }
      if (bias) bias->load_row(kernels, 0, row, rows, added);
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t i = 0; i < rows; ++i) sums[i] = sum_of_lanes(&lanes[(i * M + m) * kLanes]) + added[i];
        kernels.store(sums, y.dtype, rows, y.at(m, row));
      }
    }
  });
}

// dx = dy·W. Threads share out columns of W: each sum is one thread's, whatever their number.
template <typename Value, class Codes>
void multiply_columns(const Microkernels& kernels, const Matrix& dy, const Codes& codes, const Matrix& dx) {
  const int64_t M = dy.rows, K = codes.K, N = codes.N;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t cap = std::min(kColumns, std::max(kLeastColumns, kSums / M / kDotCols * kDotCols));
  const int64_t rounds = blocks_of(blocks_of(K, threads), cap);  // as many blocks for each thread
  const int64_t most = std::max(kLeastColumns, up(blocks_of(K, threads * rounds), kDotCols));
  const int64_t ld = most + kDotCols;
  const Rows<Value> from(kernels, dy, 2);
  torch::stable::parallel_for(0, blocks_of(K, most), 1, [&](int64_t begin, int64_t end) {
    const auto tile = scratch<Value>(kRowsOfDx * kLd);
    const auto sums = scratch<float>(M * ld);
    std::vector<float> scales;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t column = block * most, columns = std::min(most, K - column), padded = up(columns, kDotCols);
      std::fill_n(sums.get(), N == 0 ? M * ld : 0, 0.0f);
      for (int64_t row = 0; row < N; row += kRowsOfDx) {
        const int64_t rows = std::min(kRowsOfDx, N - row), even = up(rows, 2);
        load_tile(kernels, codes, row, rows, column, columns, even, padded, scales, tile.get());
        products<Value>(kernels).multiply(
            tile.get(), kLd, even, padded, from.data + row, from.ld, M, sums.get(), ld, row > 0);
      }
      for (int64_t m = 0; m < M; ++m) kernels.store(&sums[m * ld], dx.dtype, columns, dx.at(m, column));
    }
  });
}

// out = x·op(W) + bias, with W transposed unless dx is asked for.
template <class Codes>
void multiply(
    const Codes& codes, const Tensor& x, bool transposed, const std::optional<Tensor>& bias, Tensor& out,
    const OneDevice& device) {
  const int64_t M = x.size(0), length = transposed ? codes.N : codes.K, width = transposed ? codes.K : codes.N;
  check_matrix("x", x, M, length, device);
  check_output("out", out, M, width, device);
  STD_TORCH_CHECK(!transposed || !bias.has_value(), "bias is given for dx, expected None");
  const std::optional<Matrix> added = row_of_bias(bias, width, device);
  if (out.numel() == 0) return;
  const Microkernels& kernels = microkernels();
  const Matrix from(x), to(out);
  const auto serve = [&](auto value) {
    using Value = decltype(value);
    if (transposed) multiply_columns<Value>(kernels, from, codes, to);
    else multiply_rows<Value>(kernels, from, codes, added, to);
  };
  if (kernels.pairs != nullptr && from.dtype == Dtype::kBFloat16) serve(uint16_t{});
  else serve(float{});
}

}  // namespace

void linear_four_bit(
    const Tensor& x, const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& nested_quant_map, const std::optional<Tensor>& nested_offset,
    const Tensor& numbers, int64_t N, int64_t K, int64_t block, int64_t nested_block, bool low_first,
    int64_t stored, bool transposed, const std::optional<Tensor>& bias, Tensor out) {
  const OneDevice device(kDevice, "x", x);
  const FourBit weight(
      codes, absmax, nested_absmax, nested_quant_map, nested_offset, numbers, N, K, block, nested_block, low_first,
      stored, device);
  multiply(weight, x, transposed, bias, out, device);
}

void linear_eight_bit(
    const Tensor& x, const Tensor& codes, const Tensor& scale, double unit, bool integers, int64_t block_rows,
    int64_t block_columns, int64_t stored, bool transposed, const std::optional<Tensor>& bias, Tensor out) {
  const OneDevice device(kDevice, "x", x);
  const EightBit weight(codes, scale, unit, integers, block_rows, block_columns, stored, device);
  multiply(weight, x, transposed, bias, out, device);
}

// y = x·op(W) + drop(scaling · s·Bᵀ) + bias of a dense W, any strides, transposed unless dx is asked for
Tensor linear_expand(
    const Tensor& x, const Tensor& weight, bool transposed, const Tensor& s, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(transposed ? 1 : 0), r = s.size(1);
  const OneDevice device(kDevice, "x", x);
  check_matrix("x", x, M, K, device);
  check_matrix("weight", weight, transposed ? K : N, transposed ? N : K, device);
  check_matrix("s", s, M, r, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_seed(seed, threshold, device);
  const std::optional<Matrix> added = row_of_bias(bias, N, device);
  const Tensor W = transposed ? weight : transpose_of(weight);
  Tensor y = empty(M, N, x);
  const auto expand = [&](const std::optional<Matrix>& bias_too, bool add) {
    const auto dropout = Dropout::of(seed, threshold, survivor_scale);
    add_expanded(Matrix(y), Matrix(s), Matrix(lora_B), scaling, dropout, bias_too, add);
  };
  if (gemm_adds(x.scalar_type(), M, N, K, bias.has_value())) {
    expand(added, false);
    gemm(y, y, x, W);
  } else {
    gemm(y, bias, x, W);
    expand(std::nullopt, true);
  }
  return y;
}

}  // namespace lorafast::cpu
