// A layer's forward in one call, and its backward: the base GEMM of oneDNN or MKL, and the skinny products.
// These are short: a call of its own for each would cost a large part of it in Python and the dispatcher, whose
// code is cold after the base GEMM. Where there are rows for every thread, a thread does all products of its
// rows, and waits for the others once.
#include "base_gemm.h"
#include "operations.h"
#include "panel_gemm.h"
#include "skinny.h"

namespace lorafast::cpu {
namespace {

template <typename Value>
void forward_of_rows(
    const Microkernels& kernels, const Matrix& y, const Matrix& x, const Matrix& lora_A, const Matrix& lora_B,
    double scaling, const std::optional<Dropout>& dropout, const Matrix& s, const std::optional<Matrix>& bias,
    bool add) {
  const Shrink<Value> shrink(kernels, x, lora_A, dropout, s);
  const Expand<Value> expand(kernels, y, s, lora_B, scaling, std::nullopt, bias, add);
  torch::stable::parallel_for(0, blocks_of(x.rows, kTileRows), 1, [&](int64_t begin, int64_t end) {
    typename Shrink<Value>::Thread of_shrink(shrink);
    typename Expand<Value>::Thread of_expand(expand);
    for (int64_t row = begin * kTileRows; row < std::min(end * kTileRows, x.rows); row += kTileRows) {
      const int64_t rows = std::min(kTileRows, x.rows - row);
      shrink.block(of_shrink, row, rows);
      expand.block(of_expand, row, rows, 0, y.cols);
    }
  });
}

template <typename Value>
void backward_of_chunks(
    const Microkernels& kernels, const std::optional<Matrix>& dx, const Matrix& dy, const Matrix& x,
    const Matrix& lora_A, const Matrix& lora_B, const Matrix& s, double scaling,
    const std::optional<Dropout>& dropout, const Matrix& ds, const Matrix& dA, const Matrix& dB, bool add) {
  const ExpandBackward<Value> expand_backward(kernels, dy, s, lora_B, scaling, ds);
  const ShrinkBackward<Value> shrink_backward(kernels, ds, x, dropout);
  std::optional<Expand<Value>> expand;
  if (dx) expand.emplace(kernels, *dx, ds, transposed(lora_A), 1.0, dropout, std::nullopt, add);
  const RowSums &of_dB = expand_backward.sums, &of_dA = shrink_backward.sums;
  const int64_t block_sums = expand_backward.block_sums();
  torch::stable::parallel_for(0, of_dB.chunks, 1, [&](int64_t begin, int64_t end) {
    Tiles<Value> tiles_of_dy(kernels, dy), tiles_of_x(kernels, x);
    std::optional<typename Expand<Value>::Thread> of_expand;
    if (expand) of_expand.emplace(*expand);
    std::vector<float> over_columns;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      over_columns.assign(blocks_of(of_dB.chunk_rows, kTileRows) * block_sums, 0.0f);
      for (int64_t stripe = 0; stripe < of_dB.stripes; ++stripe)
        expand_backward.unit(tiles_of_dy, of_dB.unit(chunk, stripe), over_columns.data());
      const RowSums::Unit rows = of_dA.unit(chunk, 0);
      float* sums = over_columns.data();
      for (int64_t row = rows.first; row < rows.last; row += kTileRows, sums += block_sums)
        expand_backward.store(sums, row, std::min(kTileRows, rows.last - row));
      const auto factors = shrink_backward.factors(rows);
      for (int64_t stripe = 0; stripe < of_dA.stripes; ++stripe) {
        const RowSums::Unit unit = of_dA.unit(chunk, stripe);
        for (int64_t row = unit.first; row < unit.last; row += kTileRows) {
          const int64_t count = std::min(kTileRows, unit.last - row);
          shrink_backward.tile(tiles_of_x, factors.get(), unit, row, count);
          if (!expand) continue;
          expand->take(*of_expand, row, count);
          expand->tile(*of_expand, row, count, unit.col, unit.cols, tiles_of_x.keep());  // the mask of x
        }
      }
    }
  });
  const int64_t segments = of_dB.segments();
  torch::stable::parallel_for(0, segments + of_dA.segments(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i < segments) of_dB.add_up_segment(kernels, transposed(dB), static_cast<float>(scaling), i);
      else of_dA.add_up_segment(kernels, dA, dropout ? dropout->scale : 1.0f, i - segments);
    }
  });
}

// y = bias, or zeros
void write_rows(const Microkernels& kernels, const std::optional<Matrix>& bias, const Matrix& y) {
  std::vector<float> row(y.cols, 0.0f);
  if (bias) bias->load_row(kernels, 0, 0, y.cols, row.data());
  torch::stable::parallel_for(0, y.rows, kTileRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.store(row.data(), y.dtype, y.cols, y.at(i, 0));
  });
}

void check_rows(int64_t first, int64_t end, int64_t M) {
  STD_TORCH_CHECK(
      0 <= first && first <= end && end <= M, "the adapter's rows are ", first, " to ", end, " of ", M);
}

// s = drop(x)·Aᵀ and y = (y +) scaling · s·Bᵀ + bias
void forward(
    Tensor& y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor& s,
    const std::optional<Tensor>& bias, bool add) {
  const int64_t M = x.size(0), K = x.size(1), N = y.size(1), r = lora_A.size(0);
  const OneDevice device(kDevice, "x", x);
  check_matrix("x", x, M, K, device);
  check_matrix("lora_A", lora_A, r, K, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_output("y", y, M, N, device);
  check_output("s", s, M, r, device);
  check_seed(seed, threshold, device);
  const std::optional<Matrix> of_bias = row_of_bias(bias, N, device);
  const Microkernels& kernels = microkernels();
  const bool empty = M == 0 || K == 0 || N == 0 || r == 0;
  if (empty || !occupy(blocks_of(M, kTileRows)) || !alike(kernels, Matrix(x), Matrix(y))) {
    shrink(x, lora_A, seed, threshold, survivor_scale, s);
    return add_expanded(Matrix(y), Matrix(s), Matrix(lora_B), scaling, std::nullopt, of_bias, add);
  }
  choose_products(kernels, Matrix(x), [&](auto value) {
    forward_of_rows<decltype(value)>(
        kernels, Matrix(y), Matrix(x), Matrix(lora_A), Matrix(lora_B), scaling,
        Dropout::of(seed, threshold, survivor_scale), Matrix(s), of_bias, add);
  });
}

// ds = scaling · dy·B, dB = scaling · dyᵀ·s, dA = dsᵀ·drop(x) and, where it is given, dx = (dx +) drop(ds·A)
void backward(
    Tensor* dx, const Tensor& dy, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& s,
    double scaling, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor& ds,
    Tensor& dA, Tensor& dB, bool add) {
  const int64_t M = dy.size(0), N = dy.size(1), K = x.size(1), r = lora_B.size(1);
  const OneDevice device(kDevice, "dy", dy);
  if (dx != nullptr) check_output("dx", *dx, M, K, device);
  check_matrix("dy", dy, M, N, device);
  check_matrix("x", x, M, K, device);
  check_matrix("lora_A", lora_A, r, K, device);
  check_matrix("lora_B", lora_B, N, r, device);
  check_matrix("s", s, M, r, device);
  check_output("ds", ds, M, r, device);
  check_output("dA", dA, r, K, device);
  check_output("dB", dB, N, r, device);
  check_seed(seed, threshold, device);
  const auto dropout = Dropout::of(seed, threshold, survivor_scale);
  const Microkernels& kernels = microkernels();
  const bool empty = M == 0 || K == 0 || N == 0 || r == 0;
  const std::optional<Matrix> to = dx != nullptr ? std::optional(Matrix(*dx)) : std::nullopt;
  const bool one = alike(kernels, Matrix(x), to.value_or(Matrix(x))) && alike(kernels, Matrix(x), Matrix(dy));
  if (empty || !one || !occupy(RowSums::chunks_of(M))) {
    expand_backward(dy, s, lora_B, scaling, ds, dB);
    shrink_backward(ds, x, seed, threshold, survivor_scale, dA);
    if (to) add_expanded(*to, Matrix(ds), transposed(Matrix(lora_A)), 1.0, dropout, std::nullopt, add);
    return;
  }
  choose_products(kernels, Matrix(x), [&](auto value) {
    backward_of_chunks<decltype(value)>(
        kernels, to, Matrix(dy), Matrix(x), Matrix(lora_A), Matrix(lora_B), Matrix(s), scaling, dropout,
        Matrix(ds), Matrix(dA), Matrix(dB), add);
  });
}

}  // namespace

void lora_linear_(
    Tensor y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor s) {
  forward(y, x, lora_A, lora_B, scaling, seed, threshold, survivor_scale, s, std::nullopt, true);
}

void lora_linear_backward_(
    Tensor dx, const Tensor& dy, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& s,
    double scaling, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale, Tensor ds,
    Tensor dA, Tensor dB) {
  backward(&dx, dy, x, lora_A, lora_B, s, scaling, seed, threshold, survivor_scale, ds, dA, dB, true);
}

// y = x·Wᵀ + bias of all rows, and onto the rows from first to end scaling · s·Bᵀ, s = drop(x)·Aᵀ of these rows
std::tuple<Tensor, Tensor> lora_linear_on_rows(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale, int64_t first, int64_t end) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), r = lora_A.size(0);
  const OneDevice device(kDevice, "x", x);
  check_matrix("x", x, M, K, device);
  check_matrix("weight", weight, N, K, device);
  check_rows(first, end, M);
  Tensor y = empty(M, N, x), s = empty(end - first, r, x, x.scalar_type() == ScalarType::Half);
  const Tensor own_x = rows_between(x, first, end);
  const std::optional<Matrix> of_bias = row_of_bias(bias, N, device);
  if (panels_serve(microkernels(), Matrix(x), transposed(Matrix(weight)), Matrix(y))) {
    check_matrix("lora_B", lora_B, N, r, device);
    shrink(own_x, lora_A, seed, threshold, survivor_scale, s);
    const Expanded expanded = {Matrix(s), Matrix(lora_B), scaling, first};
    panel_gemm(microkernels(), Matrix(x), transposed(Matrix(weight)), of_bias, expanded, Matrix(y));
    return {y, s};
  }
  Tensor own_y = rows_between(y, first, end);
  const auto skinny = [&](const std::optional<Tensor>& added, bool add) {
    forward(own_y, own_x, lora_A, lora_B, scaling, seed, threshold, survivor_scale, s, added, add);
  };
  const bool all = end - first == M;
  if (all ? gemm_adds(x.scalar_type(), M, N, K, bias.has_value()) : gemm_adds_to_all(x.scalar_type(), M, N, K)) {
    if (!all) {
      write_rows(microkernels(), of_bias, rows_between(Matrix(y), 0, first));
      write_rows(microkernels(), of_bias, rows_between(Matrix(y), end, M));
    }
    skinny(bias, false);
    gemm(y, y, x, transpose_of(weight));
  } else {
    gemm(y, bias, x, transpose_of(weight));
    skinny(std::nullopt, true);
  }
  return {y, s};
}

std::tuple<Tensor, Tensor> lora_linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, const std::optional<Tensor>& seed, int64_t threshold,
    double survivor_scale) {
  return lora_linear_on_rows(
      x, weight, bias, lora_A, lora_B, scaling, seed, threshold, survivor_scale, 0, x.size(0));
}

// dx = dy·W of all rows; with x, s and dy of the rows from first on ds = scaling · dy·B, dA = dsᵀ·drop(x),
// dB = scaling · dyᵀ·s and, onto these rows of dx, drop(ds·A)
std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_on_rows(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& s, double scaling, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    int64_t first) {
  const int64_t M = dy.size(0), N = dy.size(1), K = weight.size(1), r = s.size(1), end = first + x.size(0);
  const OneDevice device(kDevice, "dy", dy);
  check_matrix("dy", dy, M, N, device);
  check_matrix("weight", weight, N, K, device);
  check_rows(first, end, M);
  Tensor dx = empty(M, K, dy), ds = empty(end - first, r, s), dA = empty(r, K, lora_A), dB = empty(N, r, lora_B);
  Tensor own_dx = rows_between(dx, first, end);
  const Tensor own_dy = rows_between(dy, first, end);
  const auto skinny = [&](Tensor* to, bool add) {
    backward(to, own_dy, x, lora_A, lora_B, s, scaling, seed, threshold, survivor_scale, ds, dA, dB, add);
  };
  if (panels_serve(microkernels(), Matrix(dy), Matrix(weight), Matrix(dx))) {
    const auto product = [&](const std::optional<Expanded>& expanded) {
      panel_gemm(microkernels(), Matrix(dy), Matrix(weight), std::nullopt, expanded, Matrix(dx));
    };
    if (seed.has_value()) {  // the mask is made once, for dA and the adapter's part of dx
      product(std::nullopt);
      skinny(&own_dx, true);
    } else {
      skinny(nullptr, false);
      product(Expanded{Matrix(ds), transposed(Matrix(lora_A)), 1.0, first});
    }
  } else if (end - first == M && gemm_adds(dy.scalar_type(), M, K, N, false)) {
    skinny(&dx, false);
    gemm(dx, dx, dy, weight);
  } else {
    gemm(dx, std::nullopt, dy, weight);
    skinny(&own_dx, true);
  }
  return {dx, dA, dB};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& s, double scaling, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale) {
  return lora_linear_backward_on_rows(
      dy, x, weight, lora_A, lora_B, s, scaling, seed, threshold, survivor_scale, 0);
}

}  // namespace lorafast::cpu
