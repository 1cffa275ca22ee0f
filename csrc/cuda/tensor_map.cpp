#include "tensor_map.h"

#include <cudaTypedefs.h>

#include "arguments.h"

namespace lorafast::cuda {

namespace {

constexpr int64_t kMost = INT64_C(1) << 31;       // rows or columns: TMA counts them in 32 bits with a sign
constexpr int64_t kMostBytes = INT64_C(1) << 40;  // from one row to the next
constexpr int64_t kSize = 2;                      // bytes of an element
constexpr cuuint32_t kBoxColumns = 64;

// The driver's function: libcuda isn't linked, so that the library loads where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) (void)cudaGetLastError();
    STD_TORCH_CHECK(
        error == cudaSuccess && result == cudaDriverEntryPointSuccess && function != nullptr,
        "the driver has no cuTensorMapEncodeTiled, expected one for CUDA 12.0 or later");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

}  // namespace

void check_for_tma(const char* name, const void* data, int64_t rows, int64_t columns, int64_t row) {
  STD_TORCH_CHECK(
      rows < kMost && columns < kMost, name, " has ", rows, " rows and ", columns,
      " columns, expected fewer than ", kMost);
  STD_TORCH_CHECK(
      aligned(data, row * kSize, 16), name, " has rows that don't begin at multiples of 16 bytes: they are ",
      row * kSize, " bytes apart");
  STD_TORCH_CHECK(
      row >= 1 && row < kMostBytes / kSize, name, " has rows ", row, " elements apart, expected 1 to ",
      kMostBytes / kSize - 1);
}

CUtensorMap tensor_map(
    const char* name, const void* data, Dtype dtype, int64_t rows, int64_t columns, int64_t row, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row * kSize)};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result = encoder()(
      &map, dtype == Dtype::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(
      result == CUDA_SUCCESS, name, " can't be described to TMA: the driver gives error ",
      static_cast<int>(result));
  return map;
}

}  // namespace lorafast::cuda
