// What libcu++ and cooperative groups make of barriers, asynchronous copies, atomics and groups.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

#include <cuda/atomic>
#include <cuda/barrier>

namespace cg = cooperative_groups;

constexpr int kThreads = 128;
using BlockBarrier = cuda::barrier<cuda::thread_scope_block>;

// y[i] = x[i] + x[n - 1 - i], n = kThreads · 4 for each block: a copy that a barrier waits for.
extern "C" __global__ void __launch_bounds__(kThreads) fold(const float4* x, float4* y) {
  __shared__ alignas(16) float4 block[kThreads];
#pragma nv_diag_suppress static_var_with_dynamic_init
  __shared__ BlockBarrier barrier;
  if (threadIdx.x == 0) init(&barrier, kThreads);
  __syncthreads();
  const float4* const from = x + blockIdx.x * kThreads;
  cuda::memcpy_async(&block[threadIdx.x], &from[threadIdx.x], cuda::aligned_size_t<16>(sizeof(float4)), barrier);
  barrier.arrive_and_wait();
  const float4 a = block[threadIdx.x], b = block[kThreads - 1 - threadIdx.x];
  y[blockIdx.x * kThreads + threadIdx.x] = make_float4(a.x + b.w, a.y + b.z, a.z + b.y, a.w + b.x);
}

// Half of the block makes numbers, the other half uses them, round by round, each with a token of its own.
extern "C" __global__ void __launch_bounds__(kThreads) make_and_use(const int* x, int* y, int rounds) {
  constexpr int kHalf = kThreads / 2;
  __shared__ int made[2][kHalf];
#pragma nv_diag_suppress static_var_with_dynamic_init
  __shared__ BlockBarrier filled[2], used[2];
  if (threadIdx.x < 2) {
    init(&filled[threadIdx.x], kThreads);
    init(&used[threadIdx.x], kThreads);
  }
  __syncthreads();
  const int place = threadIdx.x % kHalf;
  if (threadIdx.x < kHalf) {
    for (int round = 0; round < rounds; ++round) {
      if (round >= 2) used[round % 2].arrive_and_wait();
      made[round % 2][place] = x[round * kHalf + place] * 7;
      [[maybe_unused]] const auto token = filled[round % 2].arrive();
    }
  } else {
    for (int round = 0; round < rounds; ++round) {
      filled[round % 2].arrive_and_wait();
      y[round * kHalf + place] = made[round % 2][kHalf - 1 - place] + round;
      if (round + 2 < rounds) [[maybe_unused]]
        const auto token = used[round % 2].arrive();
    }
  }
}

// Blocks pass a number on in their order: each adds its own to what the one before released.
extern "C" __global__ void chain(const int* x, int* sums, unsigned* turn) {
  if (threadIdx.x != 0) return;
  const cuda::atomic_ref<unsigned, cuda::thread_scope_device> next(*turn);
  while (next.load(cuda::memory_order_acquire) != blockIdx.x) __nanosleep(20);
  const int before = blockIdx.x > 0 ? sums[blockIdx.x - 1] : 0;
  sums[blockIdx.x] = before + x[blockIdx.x];
  next.fetch_add(1, cuda::memory_order_release);
}

// Groups of 8 neighbours: out rows are their sum, their greatest, the lanes of those that agree, and the rank.
extern "C" __global__ void groups(const int* x, int* out) {
  const cg::thread_block block = cg::this_thread_block();
  const auto tile = cg::tiled_partition<8>(block);
  const int i = block.thread_rank(), n = block.num_threads();
  out[i] = cg::reduce(tile, x[i], cg::plus<int>());
  out[n + i] = cg::reduce(tile, x[i], cg::greater<int>());
  out[2 * n + i] = static_cast<int>(tile.ballot(x[i] % 2 == 0));
  out[3 * n + i] = tile.shfl(x[i], (tile.thread_rank() + 3) % 8) * 100 + tile.meta_group_rank();
  if (x[i] > 10) {
    const cg::coalesced_group together = cg::coalesced_threads();
    out[4 * n + i] = together.thread_rank() < together.num_threads();
  } else {
    out[4 * n + i] = -1;
  }
  block.sync();
}
