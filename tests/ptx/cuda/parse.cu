// What nvcc declares and calls: functions, initialised memory, struct parameters, branches.
#include <cassert>
#include <cstdint>

struct Pair {
  int32_t count;
  double weight;
  char tag[5];
};

struct __align__(64) Map {
  unsigned char bytes[128];
};

struct Node {
  int32_t value;
  const float* entry;
  int16_t rank;
};

__constant__ float table[4] = {1.0f, -0.5f, 2.25f, 0.001f};
__constant__ int32_t unset[3];
__device__ int32_t values[3] = {1, -2, 3};
__device__ int32_t* pointers[2] = {values, values + 2};
__device__ Node node = {3, table + 1, -7};
__device__ int32_t grid[2][3] = {{1, 2, 3}, {4}};
__device__ double weights[2] = {0.1, -1e300};

__device__ __noinline__ Pair twice(Pair pair, int32_t n) {
  pair.count *= n;
  pair.weight += pair.count;
  pair.tag[1] += n;
  return pair;
}

__device__ __noinline__ int32_t turned(int32_t x) {
  __shared__ int32_t own[4];
  own[x & 3] = x;
  __syncthreads();
  return own[(x + 1) & 3];
}

extern __shared__ double launched[];

extern "C" __global__ void __launch_bounds__(128, 2)
    mixed(int32_t* out, Pair pair, int32_t n, const __grid_constant__ Map map, float scale) {
  __shared__ int32_t fixed[129];
  int32_t own[8];
  for (int32_t i = 0; i < 8; ++i) own[i] = i * n;
  fixed[threadIdx.x] = pair.count;
  launched[threadIdx.x] = scale;
  __syncthreads();
  assert(n > 0);
  const Pair doubled = twice(pair, n);
  out[0] = own[n & 7] + doubled.count + doubled.tag[1] + static_cast<int32_t>(doubled.weight);
  out[1] = turned(n) + fixed[3] + static_cast<int32_t>(launched[4]) + map.bytes[n];
  out[2] = unset[n % 3] + grid[n & 1][n % 3] + *pointers[n & 1] + node.rank;
  out[3] = static_cast<int32_t>(table[n & 3] * *node.entry + weights[n & 1]);
}

// Labels of inline assembly are those of its own braces. By itself nvcc writes no table of branches.
extern "C" __global__ void __cluster_dims__(2, 1, 1) branches(int32_t* out, uint32_t n) {
  asm volatile("{\n .reg .pred p;\nagain: setp.eq.u32 p, %0, 0;\n @p bra again;\n}" ::"r"(n));
  asm volatile("{\n .reg .pred p;\nagain: setp.ne.u32 p, %0, 9;\n @p bra again;\n}" ::"r"(n));
  int32_t chosen;
  asm volatile(
      "{\n"
      "places: .branchtargets first, second, first;\n"
      "  brx.idx %1, places;\n"
      "first: mov.u32 %0, 1;\n"
      "  bra done;\n"
      "second: mov.u32 %0, 2;\n"
      "done:\n"
      "}"
      : "=r"(chosen)
      : "r"(n));
  out[blockIdx.x] = turned(chosen);
}
