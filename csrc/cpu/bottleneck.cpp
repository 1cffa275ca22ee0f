// A bottleneck adapter, y = residual + scaling · (f(h·Dᵀ + d)·Uᵀ + u), and its backward. A thread does all products
// of a block of rows, and goes through them at most twice: forward through h for a, then for y; backward through dy
// for da and dU, then through h for dD, and through dy again for dh, or for du where dh isn't dy + da·D. As far as
// the block stays in its cache the second time costs no memory.
#include "base_gemm.h"
#include "operations.h"
#include "skinny.h"

namespace lorafast::cpu {
namespace {

Activation activation_of(int64_t index) {
  STD_TORCH_CHECK(
      index >= 0 && index < kActivations, "activation is ", index, ", expected 0 to ", kActivations - 1);
  return static_cast<Activation>(index);
}

// What lies between the products, row by row in float32.
class Between {
 public:
  Between(const Microkernels& kernels, Activation activation, Dtype dtype, int64_t b)
      : kernels_(kernels), activation_(activation), dtype_(dtype), b_(b) {}

  // What a thread needs for itself.
  struct Thread {
    explicit Thread(const Between& all)
        : line(padded(all.b_), 0.0f), gradient(padded(all.b_), 0.0f), rounded(all.b_) {}
    std::vector<float> line, gradient;
    std::vector<uint16_t> rounded;
  };

  // Sums over columns become f(a) in place; a = sums + bias, rounded, is written where it is wanted.
  void forward(
      Thread& thread, const Matrix& sums, const float* bias, const std::optional<Matrix>& a, int64_t row,
      int64_t rows) const {
    float* line = thread.line.data();
    for (int64_t i = row; i < row + rows; ++i) {
      kernels_.load(sums.at(i, 0), Dtype::kFloat32, b_, line);
      if (bias)
        for (int64_t j = 0; j < b_; ++j) line[j] += bias[j];
      if (dtype_ != Dtype::kFloat32) {
        kernels_.store(line, dtype_, b_, thread.rounded.data());
        kernels_.load(thread.rounded.data(), dtype_, b_, line);
      }
      if (a) kernels_.store(line, dtype_, b_, a->at(i, 0));
      kernels_.activate(activation_, padded(b_), line, line);
      kernels_.store(line, Dtype::kFloat32, b_, sums.at(i, 0));
    }
  }

  // z = f(a)
  void again(Thread& thread, const Matrix& a, const Matrix& z, int64_t row, int64_t rows) const {
    float* line = thread.line.data();
    for (int64_t i = row; i < row + rows; ++i) {
      a.load_row(kernels_, i, 0, b_, line);
      kernels_.activate(activation_, padded(b_), line, line);
      kernels_.store(line, Dtype::kFloat32, b_, z.at(i, 0));
    }
  }

  // dz becomes da = dz ⊙ f'(a) in place, and is added to its sums
  void backward(Thread& thread, const Matrix& a, const Matrix& dz, double* sums, int64_t row, int64_t rows) const {
    float *line = thread.line.data(), *gradient = thread.gradient.data();
    for (int64_t i = row; i < row + rows; ++i) {
      a.load_row(kernels_, i, 0, b_, line);
      kernels_.load(dz.at(i, 0), Dtype::kFloat32, b_, gradient);
      kernels_.activate_backward(activation_, padded(b_), line, gradient);
      kernels_.store(gradient, Dtype::kFloat32, b_, dz.at(i, 0));
      for (int64_t j = 0; j < b_; ++j) sums[j] += gradient[j];
    }
  }

 private:
  const Microkernels& kernels_;
  const Activation activation_;
  const Dtype dtype_;
  const int64_t b_;
};

// The columns [first, first + cols) of rows of a matrix, in another of its size.
void copy(
    const Microkernels& kernels, const Matrix& from, const Matrix& to, int64_t row, int64_t rows, int64_t first,
    int64_t cols) {
  std::vector<float> line;
  for (int64_t i = row; i < row + rows; ++i) {
    if (from.col_stride == 1 && from.dtype == to.dtype) {
      std::memcpy(to.at(i, first), from.at(i, first), cols * size_of(to.dtype));
      continue;
    }
    line.resize(cols);
    from.load_row(kernels, i, first, cols, line.data());
    kernels.store(line.data(), to.dtype, cols, to.at(i, first));
  }
}

// sums[c] += the rows [first, last) of the columns from `col` on
void add_rows(
    const Microkernels& kernels, const Matrix& from, int64_t first, int64_t last, int64_t col, int64_t cols,
    double* sums) {
  float line[kTileCols];
  for (int64_t i = first; i < last; ++i) {
    from.load_row(kernels, i, col, cols, line);
    for (int64_t c = 0; c < cols; ++c) sums[c] += line[c];
  }
}

// Sums of each chunk of rows, added up in their order.
class BiasSums {
 public:
  BiasSums(int64_t chunks, int64_t cols) : chunks_(chunks), cols_(cols), sums_(chunks * cols, 0.0) {}
  double* of(int64_t chunk, int64_t col = 0) { return &sums_[chunk * cols_ + col]; }
  void store(const Microkernels& kernels, double scale, const std::optional<Tensor>& to) const {
    if (!to) return;
    std::vector<float> line(cols_);
    for (int64_t c = 0; c < cols_; ++c) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += sums_[chunk * cols_ + c];
      line[c] = static_cast<float>(scale * sum);
    }
    kernels.store(line.data(), dtype_of(*to), cols_, to->mutable_data_ptr());
  }

 private:
  const int64_t chunks_, cols_;
  std::vector<double> sums_;
};

std::vector<float> numbers(
    const Microkernels& kernels, const std::optional<Tensor>& bias, int64_t count, double scale,
    const OneDevice& device) {
  const auto row = row_of_bias(bias, count, device);
  std::vector<float> found(row ? count : 0);
  if (row) row->load_row(kernels, 0, 0, count, found.data());
  for (float& value : found) value *= static_cast<float>(scale);
  return found;
}

void check_bias_output(
    const char* name, const std::optional<Tensor>& tensor, int64_t count, const OneDevice& device) {
  if (!tensor) return;
  STD_TORCH_CHECK(
      tensor->dim() == 1 && tensor->size(0) == count && tensor->is_contiguous(), name,
      " is no contiguous vector of ", count, " elements");
  check_float(name, *tensor, device);
}

Dtype low_rank(const Matrix& like) { return like.dtype == Dtype::kBFloat16 ? like.dtype : Dtype::kFloat32; }

// What the backward reads, its scratch, and dh.
struct Backward {
  const Matrix dy, h, a, down, up, dz, z;
  const double scaling;
  const bool residual;
  const std::optional<Matrix> dh;
  const Between& between;
};

template <typename Value>
void backward_of_chunks(
    const Microkernels& kernels, const Backward& all, const Matrix& dD, const Matrix& dU, BiasSums& of_d,
    BiasSums& of_u, bool want_du) {
  const ExpandBackward<Value> expand_backward(kernels, all.dy, all.z, all.up, all.scaling, all.dz);
  const ShrinkBackward<Value> shrink_backward(kernels, all.dz, all.h, std::nullopt);
  std::optional<Expand<Value>> expand;
  if (all.dh)
    expand.emplace(kernels, *all.dh, all.dz, transposed(all.down), 1.0, std::nullopt, std::nullopt, !all.residual);
  const bool copies = all.dh && !all.residual;
  const RowSums &of_dU = expand_backward.sums, &of_dD = shrink_backward.sums;
  const int64_t block_sums = expand_backward.block_sums();
  torch::stable::parallel_for(0, of_dU.chunks, 1, [&](int64_t begin, int64_t end) {
    Tiles<Value> tiles_of_dy(kernels, all.dy), tiles_of_h(kernels, all.h);
    std::optional<typename Expand<Value>::Thread> of_expand;
    if (expand) of_expand.emplace(*expand);
    Between::Thread of_between(all.between);
    std::vector<float> over_columns;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const RowSums::Unit rows = of_dU.unit(chunk, 0);
      all.between.again(of_between, all.a, all.z, rows.first, rows.last - rows.first);
      over_columns.assign(blocks_of(of_dU.chunk_rows, kTileRows) * block_sums, 0.0f);
      for (int64_t stripe = 0; stripe < of_dU.stripes; ++stripe) {
        const RowSums::Unit unit = of_dU.unit(chunk, stripe);
        expand_backward.unit(tiles_of_dy, unit, over_columns.data());
        if (want_du && !copies)
          add_rows(kernels, all.dy, unit.first, unit.last, unit.col, unit.cols, of_u.of(chunk, unit.col));
      }
      float* sums = over_columns.data();
      for (int64_t row = rows.first; row < rows.last; row += kTileRows, sums += block_sums) {
        const int64_t count = std::min(kTileRows, rows.last - row);
        expand_backward.store(sums, row, count);
        all.between.backward(of_between, all.a, all.dz, of_d.of(chunk), row, count);
      }
      const auto factors = shrink_backward.factors(rows);
      for (int64_t stripe = 0; stripe < of_dD.stripes; ++stripe) {
        const RowSums::Unit unit = of_dD.unit(chunk, stripe);
        for (int64_t row = unit.first; row < unit.last; row += kTileRows) {
          const int64_t count = std::min(kTileRows, unit.last - row);
          shrink_backward.tile(tiles_of_h, factors.get(), unit, row, count);
          if (!expand) continue;
          if (copies) {
            copy(kernels, all.dy, *all.dh, row, count, unit.col, unit.cols);
            if (want_du)
              add_rows(kernels, all.dy, row, row + count, unit.col, unit.cols, of_u.of(chunk, unit.col));
          }
          expand->take(*of_expand, row, count);
          expand->tile(*of_expand, row, count, unit.col, unit.cols, nullptr);
        }
      }
    }
  });
  const int64_t segments = of_dU.segments();
  torch::stable::parallel_for(0, segments + of_dD.segments(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i < segments) of_dU.add_up_segment(kernels, transposed(dU), static_cast<float>(all.scaling), i);
      else of_dD.add_up_segment(kernels, dD, 1.0f, i - segments);
    }
  });
}

}  // namespace

// a, if it is wanted, and y
void bottleneck(
    const Tensor& h, const Tensor& down, const Tensor& up, const std::optional<Tensor>& down_bias,
    const std::optional<Tensor>& up_bias, double scaling, int64_t activation,
    const std::optional<Tensor>& residual, Tensor y, std::optional<Tensor> a) {
  const int64_t M = h.size(0), K = h.size(1), N = up.size(0), b = down.size(0);
  const OneDevice device(kDevice, "h", h);
  check_matrix("h", h, M, K, device);
  check_matrix("down", down, b, K, device);
  check_matrix("up", up, N, b, device);
  const Tensor& onto = residual ? *residual : h;
  check_matrix("residual", onto, M, N, device);
  check_output("y", y, M, N, device);
  if (a) check_output("a", *a, M, b, device);
  const Microkernels& kernels = microkernels();
  const std::vector<float> d = numbers(kernels, down_bias, b, 1.0, device);
  std::vector<float> u = numbers(kernels, up_bias, N, scaling, device);
  if (M == 0) return;
  const Matrix of_h(h), of_y(y), of_residual(onto);
  std::optional<Matrix> of_a, of_u;
  if (a) of_a.emplace(*a);
  if (up_bias) of_u.emplace(u.data(), Dtype::kFloat32, 1, N, N, 1);
  const Tensor change = empty(M, b, h, true);
  const Matrix z(change);
  const Between between(kernels, activation_of(activation), low_rank(of_h), b);
  choose_products(kernels, of_h, [&](auto of_shrink) {
    choose_products(kernels, of_y, [&](auto of_expand) {
      const Shrink<decltype(of_shrink)> shrink(kernels, of_h, Matrix(down), std::nullopt, z);
      const Expand<decltype(of_expand)> expand(kernels, of_y, z, Matrix(up), scaling, std::nullopt, of_u, true);
      torch::stable::parallel_for(0, blocks_of(M, kTileRows), 1, [&](int64_t begin, int64_t end) {
        typename Shrink<decltype(of_shrink)>::Thread of_sums(shrink);
        typename Expand<decltype(of_expand)>::Thread of_change(expand);
        Between::Thread of_between(between);
        for (int64_t row = begin * kTileRows; row < std::min(end * kTileRows, M); row += kTileRows) {
          const int64_t rows = std::min(kTileRows, M - row);
          shrink.block(of_sums, row, rows);
          between.forward(of_between, z, d.empty() ? nullptr : d.data(), of_a, row, rows);
          copy(kernels, of_residual, of_y, row, rows, 0, N);
          expand.block(of_change, row, rows, 0, N);
        }
      });
    });
  });
}

// dh = (dy +) da·D if it is wanted, dD = daᵀ·h, dd = Σ da, dU = scaling · dyᵀ·f(a) and du = scaling · Σ dy, with
// da = scaling · dy·U ⊙ f'(a)
void bottleneck_backward(
    const Tensor& dy, const Tensor& h, const Tensor& a, const Tensor& down, const Tensor& up, double scaling,
    int64_t activation, bool residual, std::optional<Tensor> dh, Tensor dD, std::optional<Tensor> dd, Tensor dU,
    std::optional<Tensor> du) {
  const int64_t M = dy.size(0), N = dy.size(1), K = h.size(1), b = a.size(1);
  const OneDevice device(kDevice, "dy", dy);
  check_matrix("dy", dy, M, N, device);
  check_matrix("h", h, M, K, device);
  check_matrix("a", a, M, b, device);
  check_matrix("down", down, b, K, device);
  check_matrix("up", up, N, b, device);
  STD_TORCH_CHECK(residual || N == K, "dy has ", N, " columns and h ", K, ", expected as many");
  if (dh) check_output("dh", *dh, M, K, device);
  check_output("dD", dD, b, K, device);
  check_output("dU", dU, N, b, device);
  check_bias_output("dd", dd, b, device);
  check_bias_output("du", du, N, device);
  const Microkernels& kernels = microkernels();
  Tensor of_z = empty(M, b, dy, true), of_dz = empty(M, b, dy, true);
  const Between between(kernels, activation_of(activation), low_rank(Matrix(dy)), b);
  std::optional<Matrix> to;
  if (dh) to.emplace(*dh);
  const Backward all{Matrix(dy),   Matrix(h), Matrix(a), Matrix(down), Matrix(up), Matrix(of_dz),
                     Matrix(of_z), scaling,   residual,  to,           between};
  const int64_t chunks = RowSums::chunks_of(M), chunk_rows = RowSums::chunk_rows_of(M);
  BiasSums of_d(chunks, b), of_u(chunks, N);
  const bool one = alike(kernels, all.h, all.dy) && (!to || alike(kernels, all.h, *to));
  if (M > 0 && N > 0 && K > 0 && one && occupy(chunks)) {
    choose_products(kernels, all.dy, [&](auto value) {
      backward_of_chunks<decltype(value)>(kernels, all, Matrix(dD), Matrix(dU), of_d, of_u, du.has_value());
    });
  } else {  // the products of dy, h and dh aren't the same, or chunks leave threads idle: one by one
    const auto by_chunk = [&](auto serve) {
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        Between::Thread thread(between);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t first = chunk * chunk_rows, last = std::min(first + chunk_rows, M);
          serve(thread, chunk, first, std::max(first, last));
        }
      });
    };
    by_chunk([&](Between::Thread& thread, int64_t, int64_t first, int64_t last) {
      between.again(thread, all.a, all.z, first, last - first);
    });
    expand_backward(dy, of_z, up, scaling, of_dz, dU);
    by_chunk([&](Between::Thread& thread, int64_t chunk, int64_t first, int64_t last) {
      between.backward(thread, all.a, all.dz, of_d.of(chunk), first, last - first);
      for (int64_t row = first; row < last; row += kTileRows)
        for (int64_t col = 0; col < N; col += kTileCols) {
          const int64_t rows = std::min(kTileRows, last - row), cols = std::min(kTileCols, N - col);
          if (du) add_rows(kernels, all.dy, row, row + rows, col, cols, of_u.of(chunk, col));
          if (to && !residual) copy(kernels, all.dy, *to, row, rows, col, cols);
        }
    });
    shrink_backward(of_dz, h, std::nullopt, 0, 1.0, dD);
    if (to) add_expanded(*to, all.dz, transposed(all.down), 1.0, std::nullopt, std::nullopt, !residual);
  }
  of_d.store(kernels, 1.0, dd);
  of_u.store(kernels, scaling, du);
}

}  // namespace lorafast::cpu
