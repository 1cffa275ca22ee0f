// dx, dA, dB and dbias of a small layer in one launch: lora_linear_backward.cuh has what the CTAs do.
#include "arguments.h"
#include "lora_linear_backward.cuh"
#include "operations.h"

namespace lorafast::cuda {

// CTAs that an SM must have registers for: as many as there are without spilling.
template <class T>
constexpr int kBackwardOnSm = DtypeOf<T>::value == Dtype::bfloat16 ? 3 : 2;

template <class T, int kSpans>
__global__ void __launch_bounds__(kThreads, kBackwardOnSm<T>)
    lora_linear_backward_kernel(const __grid_constant__ LoraLinearBackwardParams p) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ uint4 lora_linear_backward_shared[];
  BackwardCta<T, kSpans>(p, reinterpret_cast<char*>(lora_linear_backward_shared)).run();
#else
  __trap();  // the host doesn't launch it there
#endif
}

namespace {

const char* dtype_name(const Tensor& tensor) { return toString(tensor.scalar_type()); }

const Tensor& needed(const char* name, const std::optional<Tensor>& tensor, const char* what) {
  STD_TORCH_CHECK(tensor.has_value(), name, " is missing, which ", what, " is made of");
  return *tensor;
}

// Whether rows can be copied by 16 bytes.
bool has_vectors(const Tensor& tensor) {
  const int64_t row = tensor.size(0) > 1 ? tensor.stride(0) * static_cast<int64_t>(tensor.element_size()) : 0;
  return tensor.stride(1) == 1 && aligned(tensor.const_data_ptr(), row, 16);
}

}  // namespace

void lora_linear_backward(
    const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, const std::optional<Tensor>& s,
    double scaling, const std::optional<Tensor>& seed, int64_t threshold, double survivor_scale,
    std::optional<Tensor> dx, std::optional<Tensor> dA, std::optional<Tensor> dB, std::optional<Tensor> dbias,
    std::optional<Tensor> scratch, std::optional<Tensor> counters, int64_t columns, int64_t stages) {
  const OneDevice device(kDevice, "dy", dy);
  check_dimensions("dy", dy, 2);
  const int64_t M = dy.size(0), N = dy.size(1);
  check_matrix("dy", dy, M, N, device);
  const Dtype dtype = dtype_of(dy);
  const bool wide = dtype != Dtype::bfloat16;
  LoraLinearBackwardParams p{};
  p.dy = dy.const_data_ptr(), p.dy_row = dy.stride(0), p.dy_col = dy.stride(1), p.vector_dy = has_vectors(dy);
  p.M = M, p.N = N, p.r = 1;
  if (dx.has_value() || dA.has_value()) {
    const Tensor& b = needed("lora_B", lora_B, dx.has_value() ? "dx" : "dA");
    check_dimensions("lora_B", b, 2);
    check_matrix("lora_B", b, N, b.size(1), device);
    p.wide_b = dtype != Dtype::float32 && dtype_of(b) == Dtype::float32;
    STD_TORCH_CHECK(
        p.wide_b || dtype_of(b) == dtype, "lora_B has dtype ", dtype_name(b), ", expected float32 or that of dy, ",
        dtype_name(dy));
    STD_TORCH_CHECK(b.size(1) >= 1 && b.size(1) <= kMostRanks, "r is ", b.size(1), ", expected 1 to ", kMostRanks);
    p.r = static_cast<int32_t>(b.size(1));
    p.b = b.const_data_ptr(), p.b_row = b.stride(0), p.b_col = b.stride(1), p.vector_b = has_vectors(b);
  } else if (dB.has_value()) {
    check_dimensions("dB", *dB, 2);
    STD_TORCH_CHECK(
        dB->size(1) >= 1 && dB->size(1) <= kMostRanks, "r is ", dB->size(1), ", expected 1 to ", kMostRanks);
    p.r = static_cast<int32_t>(dB->size(1));
  }
  p.ranks = p.r <= 16 ? 16 : p.r <= 32 ? 32 : 64;
  if (dx.has_value()) {
    const Tensor& w = needed("weight", weight, "dx");
    const Tensor& a = needed("lora_A", lora_A, "dx");
    check_dimensions("weight", w, 2);
    p.K = w.size(1);
    check_matrix("weight", w, N, p.K, device);
    check_matrix("lora_A", a, p.r, p.K, device);
    check_output("dx", *dx, M, p.K, device);
    STD_TORCH_CHECK(
        dtype_of(w) == dtype && dtype_of(*dx) == dtype, "weight or dx has another dtype than dy, ",
        dtype_name(dy));
    p.w = w.const_data_ptr(), p.w_row = w.stride(0), p.w_col = w.stride(1), p.vector_w = has_vectors(w);
    p.a = a.const_data_ptr(), p.a_row = a.stride(0), p.a_col = a.stride(1), p.a_type = dtype_of(a);
    p.dx = dx->mutable_data_ptr();
    const int64_t size = static_cast<int64_t>(dx->element_size());
    p.vector_dx = aligned(p.dx, p.K * size, size == 4 ? 8 : 16);
  }
  if (dA.has_value()) {
    const Tensor& of = needed("x", x, "dA");
    check_dimensions("x", of, 2);
    STD_TORCH_CHECK(!dx.has_value() || of.size(1) == p.K, "x has ", of.size(1), " columns, expected ", p.K);
    p.K = of.size(1);
    check_matrix("x", of, M, p.K, device);
    check_output("dA", *dA, p.r, p.K, device);
    STD_TORCH_CHECK(
        dtype_of(of) == dtype, "x has dtype ", dtype_name(of), ", expected that of dy, ", dtype_name(dy));
    p.x = of.const_data_ptr(), p.x_row = of.stride(0), p.x_col = of.stride(1), p.vector_x = has_vectors(of);
    p.dA = dA->mutable_data_ptr(), p.dA_type = dtype_of(*dA);
  }
  if (dB.has_value()) {
    const Tensor& of = needed("s", s, "dB");
    check_matrix("s", of, M, p.r, device);
    check_output("dB", *dB, N, p.r, device);
    STD_TORCH_CHECK(
        dtype_of(of) == (wide ? Dtype::float32 : dtype), "s has dtype ", dtype_name(of),
        ", expected bfloat16 beside that, float32 otherwise");
    p.s = of.const_data_ptr(), p.s_row = of.stride(0), p.s_col = of.stride(1), p.vector_s = has_vectors(of);
    p.dB = dB->mutable_data_ptr(), p.dB_type = dtype_of(*dB);
  }
  if (dbias.has_value()) {
    check_vector("dbias", *dbias, N, device);
    STD_TORCH_CHECK(
        dtype_of(*dbias) == dtype && dbias->is_contiguous(), "dbias has dtype ", dtype_name(*dbias),
        " and stride ", dbias->stride(0), ", expected neighbours of ", dtype_name(dy));
    p.dbias = dbias->mutable_data_ptr();
  }
  check_seed(seed, threshold, device);
  constexpr int64_t kMost = INT64_C(1) << 28;
  STD_TORCH_CHECK(N >= 1 && N < kMost, "N is ", N, ", expected 1 to 2**28 - 1");
  const bool has_K = dx.has_value() || dA.has_value();
  STD_TORCH_CHECK(!has_K || (p.K >= 1 && p.K < kMost), "K is ", p.K, ", expected 1 to 2**28 - 1");
  STD_TORCH_CHECK(M < kMost, "M is ", M, ", expected up to 2**28 - 1");
  STD_TORCH_CHECK(columns == 32 || columns == 64, "a tile has ", columns, " columns, expected 32 or 64");
  STD_TORCH_CHECK(stages >= 2 && stages <= 4, "stages is ", stages, ", expected 2 to 4");

  const auto blocks = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
  const int64_t down = blocks(M, kRows), across = dx.has_value() ? blocks(p.K, columns) : dA.has_value() ? 1 : 0;
  const int64_t of_dB = dB.has_value() || dbias.has_value() ? blocks(N, kRows) : 0;
  const int64_t of_dA = dA.has_value() ? blocks(p.K, kRows) : 0;
  const int64_t ctas = down * across + of_dB + of_dA;
  if (ctas == 0) return;
  STD_TORCH_CHECK(ctas < INT64_C(1) << 31, "dx is ", M, " x ", p.K, ", too large for one launch");
  p.row_blocks = static_cast<int32_t>(down);
  p.of_rows = static_cast<int32_t>(down * across), p.of_dB = static_cast<int32_t>(of_dB);
  if (dA.has_value()) {
    const Tensor& ds = needed("scratch", scratch, "dA");
    check_output("scratch", ds, M, p.ranks, device);
    STD_TORCH_CHECK(
        dtype_of(ds) == (wide ? Dtype::float32 : dtype) && aligned(ds.const_data_ptr(), 0, 16),
        "scratch has dtype ", dtype_name(ds),
        ", expected bfloat16 beside that, float32 otherwise, aligned to 16 bytes");
    const Tensor& count = needed("counters", counters, "dA");
    STD_TORCH_CHECK(
        count.scalar_type() == ScalarType::Int && count.is_contiguous() && count.numel() >= 3, "counters has ",
        count.numel(), " elements of dtype ", dtype_name(count), ", expected 3 neighbours of Int");
    device.check("counters", count);
    check_storage("counters", count);
    p.ds = ds.mutable_data_ptr();
    p.counters = static_cast<uint32_t*>(count.mutable_data_ptr());
  }
  const BackwardPlaces at(
      p.ranks, static_cast<int>(columns), static_cast<int>(stages), static_cast<int>(dy.element_size()), wide,
      p.wide_b);
  STD_TORCH_CHECK(
      static_cast<size_t>(at.end) <= kShared, stages, " stages take ", at.end,
      " bytes of shared memory, expected at most ", kShared);
  if (seed.has_value() && threshold > 0) {
    p.dropout = {
        static_cast<const int64_t*>(seed->const_data_ptr()), (p.K + 7) / 8, static_cast<int32_t>(threshold),
        static_cast<float>(survivor_scale)};
  }
  p.stages = static_cast<int32_t>(stages);
  p.scaling = static_cast<float>(scaling);
  const OnDevice on(device);
  with_type(dy, [&](auto element) {
    using T = decltype(element);
    launch(
        "lora_linear_backward",
        columns == 32 ? lora_linear_backward_kernel<T, 1> : lora_linear_backward_kernel<T, 2>,
        dim3(static_cast<unsigned>(ctas)), kThreads, static_cast<size_t>(at.end), on, p);
  });
}

}  // namespace lorafast::cuda
