#include "tensor_map.h"

#include <cudaTypedefs.h>

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

MatrixView rows_for_tma(const char* name, const MatrixView& matrix) {
  MatrixView of = matrix;
  STD_TORCH_CHECK(
      of.rows < kMost && of.columns < kMost, name, " has ", of.rows, " rows and ", of.columns,
      " columns, expected fewer than ", kMost);
  STD_TORCH_CHECK(
      of.column == 1 || of.columns == 1, name, " has neighbours of a row ", of.column,
      " elements apart, expected 1");
  // One row may be any distance from the next.
  if (of.rows == 1) of.row = (of.columns + 7) / 8 * 8;
  STD_TORCH_CHECK(
      aligned(of.from, of.row * kSize, 16), name, " has rows that don't begin at multiples of 16 bytes: they are ",
      of.row * kSize, " bytes apart");
  STD_TORCH_CHECK(
      of.row >= of.columns, name, " has rows ", of.row, " elements apart, expected at least ", of.columns,
      ", as many as a row has: TMA reads none that overlap");
  STD_TORCH_CHECK(
      of.row < kMostBytes / kSize, name, " has rows ", of.row, " elements apart, expected fewer than ",
      kMostBytes / kSize);
  return of;
}

CUtensorMap tensor_map(const char* name, const MatrixView& matrix, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.row * kSize)};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result = encoder()(
      &map, matrix.type == Dtype::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(matrix.from), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(
      result == CUDA_SUCCESS, name, " can't be described to TMA: the driver gives error ",
      static_cast<int>(result));
  return map;
}

}  // namespace lorafast::cuda
