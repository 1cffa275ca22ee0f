// Results row by row: out [rows, n], of which a thread writes column i.
#pragma once

template <typename T>
struct Rows {
  T* place;
  int n;

  __device__ Rows(T* out, int n, int i) : place(out + i), n(n) {}
  // The next row's element.
  __device__ void operator()(T value) {
    *place = value;
    place += n;
  }
};

__device__ inline int element() { return blockIdx.x * blockDim.x + threadIdx.x; }
