// Tensor maps: what TMA is told of a matrix.
#pragma once

#include <cuda.h>

#include "device.h"

namespace lorafast::cuda {

// The matrix [rows, columns] at `data`, of 16-bit elements, neighbours in a row, a row `row` elements after the other, in
// boxes of `box_rows` rows and 64 columns that lie in shared memory with a swizzle of 128 bytes. Raises, naming the
// matrix, if TMA can't have it. Made anew for every launch: nothing is kept that could outlive a tensor.
CUtensorMap tensor_map(
    const char* name, const void* data, Dtype dtype, int64_t rows, int64_t columns, int64_t row, int box_rows);

// Raises if rows of such a matrix don't begin at multiples of 16 bytes, or are too many or too long for TMA.
void check_for_tma(const char* name, const void* data, int64_t rows, int64_t columns, int64_t row);

}  // namespace lorafast::cuda
