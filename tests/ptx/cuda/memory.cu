// Loads and stores of every width and kind, tables, local arrays, and atomics.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "rows.cuh"

// out[i] of 16 bytes is in[n - 1 - i] with its bytes, halves and words moved by accesses of each width.
extern "C" __global__ void widths(const uint4* in, uint4* out, int n) {
  __shared__ alignas(16) unsigned char bytes[128][16];
  const int i = element();
  if (i >= n) return;
  unsigned char* const own = bytes[threadIdx.x];
  *reinterpret_cast<uint4*>(own) = in[n - 1 - i];
  const auto* const words = reinterpret_cast<const unsigned*>(own);
  const uint2 pair = *reinterpret_cast<const uint2*>(own + 8);
  const uchar4 four = *reinterpret_cast<const uchar4*>(own + 4);
  const ushort2 two = *reinterpret_cast<const ushort2*>(own);
  const auto low = *reinterpret_cast<const signed char*>(own + 3);
  const auto high = *reinterpret_cast<const short*>(own + 6);
  auto* const to = reinterpret_cast<unsigned char*>(out + i);
  *reinterpret_cast<uint2*>(to) = make_uint2(pair.y, pair.x ^ words[1]);
  *reinterpret_cast<ushort2*>(to + 8) = make_ushort2(two.y, two.x + high);
  *reinterpret_cast<uchar2*>(to + 12) = make_uchar2(four.w + low, four.x - four.y);
  to[14] = low < 0;
  *reinterpret_cast<signed char*>(to + 15) = high >> 8;
}

// The caches that a load or store may ask for mean nothing to the values: out is in, seven times.
extern "C" __global__ void cached(const float* in, const float4* wide, float* out, volatile float* seen, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<float> put(out, n, i);
  asm volatile("prefetch.global.L2 [%0];" ::"l"(in + i));
  asm volatile("prefetch.global.L1 [%0];" ::"l"(in + i));
  put(__ldg(in + i));
  put(__ldca(in + i));
  put(__ldcg(in + i));
  put(__ldcs(in + i));
  put(__ldlu(in + i));
  put(__ldcv(in + i));
  seen[i] = 2 * in[i];
  put(seen[i]);
  const float4 four = __ldg(wide + i);
  __stcg(out + 7 * n + i, four.x);
  __stcs(out + 8 * n + i, four.y);
  __stwt(out + 9 * n + i, four.z);
  __stwb(out + 10 * n + i, four.w);
}

// Addresses of which the compiler doesn't know the space: shared, global, constant or local by i % 4.
__constant__ const int kConstant[8] = {3, -1, 4, -1, 5, -9, 2, -6};

extern "C" __global__ void generic(const int* in, int* out, int n) {
  __shared__ int shared[8];
  if (threadIdx.x < 8) shared[threadIdx.x] = 100 + threadIdx.x;
  __syncthreads();
  const int i = element();
  if (i >= n) return;
  int local[8];
  for (int j = 0; j < 8; ++j) local[j] = in[(i + j) % n] - 1;
  const int* from[4] = {shared, in, kConstant, local};
  const int* const chosen = from[i & 3];
  int sum = 0;
  for (int j = 0; j < 8; ++j) sum = sum * 3 + chosen[j];
  out[i] = sum + (__isShared(chosen) ? 1000000 : 0) + (__isGlobal(chosen) ? 2000000 : 0) +
           (__isConstant(chosen) ? 3000000 : 0) + (__isLocal(chosen) ? 4000000 : 0);
}

// Tables that the module brings along: numbers, text, and addresses of other tables.
__constant__ const float kPowers[6] = {1.0f, 0.5f, 0.25f, 0.125f, 0.0625f, 0.03125f};
__constant__ const double kThirds[2] = {1.0 / 3, 2.0 / 3};
__device__ const unsigned char kText[] = "a table of letters";
__device__ unsigned short fifths[5] = {0, 5, 10, 15, 20};
__device__ int counts[32];  // zero when the module is loaded
__constant__ const unsigned short* const kTables[2] = {fifths, fifths + 2};
struct Entry {
  char kind;
  short weight;
  int64_t code;
};
__constant__ const Entry kEntries[3] = {{1, -2, 3}, {'x', 500, -(int64_t{1} << 40)}, {-7, 0, 9}};

extern "C" __global__ void tables(const int* in, double* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<double> put(out, n, i);
  const int a = in[i];  // from 0 to 5
  put(kPowers[a]);
  put(kThirds[a & 1]);
  put(kText[a * 3]);
  put(kTables[a & 1][a / 2]);
  const Entry& entry = kEntries[a % 3];
  put(entry.kind + entry.weight * 10);
  put(static_cast<double>(entry.code));
  put(atomicAdd(&counts[i], 1));
}

// out row i: row i of in [n, 12], sorted: a local array whose places are computed.
extern "C" __global__ void sort_rows(const int* in, int* out, int n) {
  const int i = element();
  if (i >= n) return;
  int row[12];
  for (int j = 0; j < 12; ++j) row[j] = in[i * 12 + j];
  for (int j = 1; j < 12; ++j) {
    const int value = row[j];
    int place = j;
    for (; place > 0 && row[place - 1] > value; --place) row[place] = row[place - 1];
    row[place] = value;
  }
  for (int j = 0; j < 12; ++j) out[i * 12 + j] = row[j];
}

// Every atomic on words of global memory. Thread i of n; each word has an answer that no order changes.
extern "C" __global__ void atomics(
    int* ints, unsigned* unsigneds, long long* wides, unsigned long long* unsigned_wides, float* sum,
    double* wide_sum, int n) {
  const int i = element();
  if (i >= n) return;
  atomicAdd(&ints[0], i);
  atomicSub(&ints[1], 2 * i);
  atomicMin(&ints[2], 7 - i);
  atomicMax(&ints[3], i - 1000);
  atomicAnd(&ints[4], ~(1 << i % 29));
  atomicOr(&ints[5], 1 << i % 29);
  atomicXor(&ints[6], i * 77);
  const int before = atomicExch(&ints[7], i + 1);  // whoever is replaced is counted by the one that came after
  atomicAdd(&ints[8], before);
  // By hand: a maximum of absolute values.
  int seen = *static_cast<volatile int*>(&ints[9]);
  for (int old = seen; abs(i - 20) > seen; seen = old) {
    old = atomicCAS(&ints[9], seen, abs(i - 20));
    if (old == seen) break;
  }
  atomicInc(&unsigneds[0], 9);  // modulo 10
  atomicDec(&unsigneds[1], 6);  // modulo 7, downwards
  atomicMin(&unsigneds[2], 4000000000u - i);
  atomicMax(&unsigneds[3], 4000000000u + i);
  atomicSub(&unsigneds[4], 1u);
  atomicAdd_block(&unsigneds[8 + blockIdx.x], 3u);  // which no other block touches
  atomicAdd_system(&unsigneds[5], 5u);
  atomicMin(&wides[0], (7ll << 40) - i);
  atomicMax(&wides[1], -(7ll << 40) + i);
  atomicAnd(&unsigned_wides[0], ~(1ull << i % 61));
  atomicOr(&unsigned_wides[1], 1ull << i % 61);
  atomicXor(&unsigned_wides[2], static_cast<unsigned long long>(i) << 33);
  atomicAdd(&unsigned_wides[3], 1ull << 31);
  atomicExch(&unsigned_wides[4], 5ull << 40);
  atomicCAS(&unsigned_wides[5], 0ull, 1ull + (9ull << 40));
  asm volatile("red.global.add.u32 [%0], %1;" ::"l"(&unsigneds[6]), "r"(i) : "memory");
  asm volatile("red.relaxed.gpu.global.max.u32 [%0], %1;" ::"l"(&unsigneds[7]), "r"(i) : "memory");
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(&unsigned_wides[6]), "l"(7ull) : "memory");
  atomicAdd(sum, 0.5f * i);
  atomicAdd(wide_sum, 0.25 * i);
}

// What an atomic answers: the places of n threads are 0 … n - 1, each once.
extern "C" __global__ void places(unsigned* next, int* taken, int n) {
  __shared__ unsigned of_block[2];
  if (threadIdx.x < 2) of_block[threadIdx.x] = 0;
  __syncthreads();
  const int i = element();
  unsigned place = 0;
  if (i < n) place = atomicAdd(&of_block[0], 1u);
  if (i < n) atomicMax(&of_block[1], place + 1);
  __syncthreads();
  if (threadIdx.x == 0) of_block[0] = atomicAdd(next, of_block[1]);
  __syncthreads();
  if (i < n) taken[of_block[0] + place] = i;
}

// Atomics on shared memory: hits of 16 bins, then an exclusive or, a minimum, a swap, and float sums of all.
extern "C" __global__ void shared_atomics(const int* in, int* out, float* sums, int n) {
  __shared__ int bins[16];
  __shared__ unsigned mixed;
  __shared__ int least, swapped;
  __shared__ unsigned long long wide;
  __shared__ float sum;
  __shared__ double wide_sum;
  if (threadIdx.x < 16) bins[threadIdx.x] = 0;
  if (threadIdx.x == 0) mixed = 0, least = INT_MAX, swapped = -1, wide = 0, sum = 0.0f, wide_sum = 0.0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    atomicAdd(&bins[in[i] & 15], 1);
    atomicXor(&mixed, static_cast<unsigned>(in[i]));
    atomicMin(&least, in[i]);
    atomicCAS(&swapped, -1, 12);
    atomicAdd(&wide, static_cast<unsigned long long>(in[i]) << 20);
    atomicAdd(&sum, static_cast<float>(in[i]));
    atomicAdd(&wide_sum, in[i] * 0.125);
  }
  __syncthreads();
  if (threadIdx.x < 16) out[threadIdx.x] = bins[threadIdx.x];
  if (threadIdx.x == 0) {
    out[16] = static_cast<int>(mixed);
    out[17] = least;
    out[18] = swapped;
    out[19] = static_cast<int>(wide >> 20);
    sums[0] = sum;
    sums[1] = static_cast<float>(wide_sum);
  }
}

// Sums of half precision: pairs in global memory, of which n threads add one each.
extern "C" __global__ void half_atomics(__half2* halves, __half* single, int n) {
  const int i = element();
  if (i >= n) return;
  atomicAdd(&halves[i % 4], __floats2half2_rn(1.0f, -0.5f));
  atomicAdd(single, __float2half_rn(0.25f));
}

// The first block hands numbers to the second, under a flag; both run at once. flag is 0 before the launch.
extern "C" __global__ void hand_over(const int* in, int* between, int* flag, int* out, int n) {
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) between[i] = in[i] * 3;
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
  } else {
    if (threadIdx.x == 0) {
      int ready = 0;
      while (!ready) {
        asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(ready) : "l"(flag) : "memory");
        if (!ready) __nanosleep(40);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = between[i] + 1;
  }
}

// The same with volatile flags and fences, as code before scopes does it.
extern "C" __global__ void hand_over_fenced(const int* in, int* between, volatile int* flag, int* out, int n) {
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) between[i] = in[i] * 5;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *flag = 1;
  } else {
    if (threadIdx.x == 0)
      while (*flag == 0) {
      }
    __syncthreads();
    __threadfence();
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = __ldcg(&between[i]) - 1;
  }
}
