// Branches, loops, calls, and where a thread stands.
#include "rows.cuh"

// A switch, for which nvcc writes comparisons.
extern "C" __global__ void choose(const int* x, int* out, int n) {
  const int i = element();
  if (i >= n) return;
  int a = x[i];
  switch (a) {
    case 0: a = i * 3; break;
    case 1: a = i - 7; break;
    case 2: a = i ^ 21; break;
    case 3: a += i; [[fallthrough]];
    case 4: a = a * a; break;
    case 5: a = i / 5; break;
    case 6: a = i % 5; break;
    case 7: a = -i; break;
    case 9: a = i << 4; break;
    case 10: a = __popc(i); break;
    case 11: a = __clz(i); break;
    case 12: a = i & 13; break;
    case 13: a = i | 19; break;
    case 14: a = min(i, 11); break;
    case 15: a = i * i; break;
    default: a = 1000 + a;
  }
  out[i] = a;
}

// A jump through a table: nvcc writes none by itself. x is from 0 to 3.
extern "C" __global__ void jump(const int* x, int* out, int n) {
  const int i = element();
  if (i >= n) return;
  int a;
  asm volatile(
      "{\n\t"
      "targets: .branchtargets plus, minus, times, plus;\n\t"
      "brx.idx %1, targets;\n\t"
      "plus: add.s32 %0, %2, 100;\n\t"
      "bra done;\n\t"
      "minus: sub.s32 %0, 50, %2;\n\t"
      "bra done;\n\t"
      "times: mul.lo.s32 %0, %2, %2;\n\t"
      "done:\n\t"
      "}"
      : "=r"(a)
      : "r"(x[i]), "r"(i));
  out[i] = a;
}

// Steps to 1 of x → x / 2 or 3x + 1: lanes leave the loop one by one, and meet again for the warp's most.
extern "C" __global__ void steps_to_one(const int* x, int* out, int n) {
  const int i = element();
  int steps = 0;
  if (i < n)
    for (long long a = x[i]; a != 1; ++steps) {
      if (a % 2 == 0) a /= 2;
      else a = 3 * a + 1;
    }
  int most = steps;
  for (int offset = 16; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, offset));
  if (i < n) out[i] = steps + (most << 16);
}

// Greatest common divisor of x and each of y's: a loop in a loop, left early when it is 1.
extern "C" __global__ void divisors(const int* x, const int* y, int* out, int n) {
  const int i = element();
  if (i >= n) return;
  int a = x[i], j = 0;
  for (; j < n && a > 1; ++j) {
    int b = y[j];
    while (b != 0) {
      const int rest = a % b;
      a = b;
      b = rest;
    }
    if (a % 7 == 0) continue;
    if (j > 5 && a < 3) break;
  }
  out[i] = a * 1000 + j;
}

struct Box {
  float low[3];
  float high[3];
  short kind;
};

struct Cut {
  float volume;
  char empty;
  double kinds;
};

// Arguments and an answer that don't fit registers, and a call from a branch.
__device__ __noinline__ Cut cut(Box a, Box b) {
  Cut result{1.0f, 0, a.kind * 100.0 + b.kind};
  for (int axis = 0; axis < 3; ++axis) {
    const float length = fminf(a.high[axis], b.high[axis]) - fmaxf(a.low[axis], b.low[axis]);
    result.volume *= fmaxf(length, 0.0f);
    if (length <= 0) result.empty = 1;
  }
  return result;
}

__device__ __noinline__ float grow(Box& box, float by, int axis) {
  box.high[axis] += by;
  return box.high[axis] - box.low[axis];
}

__device__ __noinline__ unsigned char low_byte(unsigned char a, signed char b, bool both) {
  return both ? a + b : a;
}

extern "C" __global__ void boxes(const float* x, double* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<double> put(out, n, i);
  Box a, b;
  for (int axis = 0; axis < 3; ++axis) {
    a.low[axis] = x[i * 3 + axis];
    a.high[axis] = a.low[axis] + 2;
    b.low[axis] = 0;
    b.high[axis] = 1.5f;
  }
  a.kind = static_cast<short>(i);
  b.kind = -3;
  float grown = 0;
  if (i % 3 == 1) grown = grow(a, 0.5f, i % 2);
  const Cut result = cut(a, b);
  put(result.volume);
  put(result.empty);
  put(result.kinds);
  put(grown);
  put(low_byte(static_cast<unsigned char>(250 + i), static_cast<signed char>(-i), i % 2));
}

// A struct as the kernel's own argument, beside others of every size.
struct Settings {
  double scale;
  int shift[3];
  short small;
  char letter;
};

extern "C" __global__ void arguments(
    signed char a, Settings settings, unsigned short b, long long c, float d, double e, const int* x, double* out,
    int n) {
  const int i = element();
  if (i >= n) return;
  out[i] = settings.scale * x[i] + settings.shift[i % 3] + settings.small + settings.letter + a + b +
           static_cast<double>(c) + d + e;
}

// Where a thread of a grid of three dimensions stands: nine rows.
extern "C" __global__ void stands(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned all = gridDim.x * gridDim.y * gridDim.z * threads;
  Rows<unsigned> put(out, all, block * threads + thread);
  unsigned lane, below, upto, own;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
  asm("mov.u32 %0, %%lanemask_le;" : "=r"(upto));
  asm("mov.u32 %0, %%lanemask_eq;" : "=r"(own));
  put(block);
  put(thread);
  put(threadIdx.x | threadIdx.y << 10 | threadIdx.z << 20);
  put(blockIdx.x | blockIdx.y << 10 | blockIdx.z << 20);
  put(lane);
  put(below);
  put(upto);
  put(own);
  put(warpSize);
}

// Clocks don't go back, and a pause is one. out[i] is 1.
extern "C" __global__ void clocks(int* out) {
  unsigned long long before, after;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(before));
  const long long start = clock64();
  const auto low = static_cast<unsigned>(clock());
  __nanosleep(100);
  const long long end = clock64();
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(after));
  out[threadIdx.x] = end > start && after >= before && static_cast<unsigned>(clock()) != low;
}

// Stops the whole launch where x is negative.
extern "C" __global__ void stop_at_negative(const int* x, int* out, int n) {
  const int i = element();
  if (i >= n) return;
  if (x[i] < 0) __trap();
  out[i] = x[i];
}
