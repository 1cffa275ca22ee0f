// Tensor maps: what TMA is told of a matrix.
#pragma once

#include <cuda.h>

#include "arguments.h"

namespace lorafast::cuda {

// A matrix of 16-bit elements as TMA is told of it. Raises, naming it, if TMA can't have it: elements of a row must be
// neighbours, rows begin at multiples of 16 bytes and not overlap, and be neither too many nor too long.
MatrixView rows_for_tma(const char* name, const MatrixView& matrix);

// The tensor map of what rows_for_tma gave, in boxes of `box_rows` rows and 64 columns that lie in shared memory with a
// swizzle of 128 bytes. Raises if the driver refuses. Made anew for every launch: nothing is kept that could outlive a
// tensor.
CUtensorMap tensor_map(const char* name, const MatrixView& matrix, int box_rows);

}  // namespace lorafast::cuda
