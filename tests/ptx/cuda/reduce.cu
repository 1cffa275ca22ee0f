// Sums of many numbers, and what the threads of a warp and the CTAs of a cluster tell each other.
#include <cooperative_groups.h>

namespace cg = cooperative_groups;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

// The sum over the warp, in lane 0.
__device__ float warp_sum(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(kAll, value, offset);
  return value;
}

// The sum over the block, in thread 0. Ends with a barrier: `of_warp` may be used again.
__device__ float block_sum(float value, float* of_warp) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = warp_sum(value);
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < warps ? of_warp[lane] : 0.0f);
  __syncthreads();
  return value;
}

// sum[0] = Σ x[i]. The block that arrives last adds up the blocks' partial sums, in their order: the bits don't
// depend on who that is. `arrived` is 0 before the launch, and after it.
extern "C" __global__ void sum(const float* x, long long n, float* partial, unsigned* arrived, float* sum) {
  __shared__ float of_warp[kMaxWarps];
  __shared__ bool last;
  float value = 0.0f;
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride)
    value += x[i];
  value = block_sum(value, of_warp);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = value;
    __threadfence();  // the partial sum is seen before the count
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();  // the count is seen before the partial sums
  value = 0.0f;
  // Written by other blocks: not through L1, which may hold an older line.
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) value += __ldcg(&partial[i]);
  value = block_sum(value, of_warp);
  if (threadIdx.x == 0) {
    sum[0] = value;
    arrived[0] = 0;
  }
}

// One warp. Row i of out [13, 32] is what question i is answered in each lane.
extern "C" __global__ void warp_words(const unsigned* x, unsigned* out) {
  const int lane = threadIdx.x;
  const unsigned value = x[lane];
  const unsigned lower = (1u << lane) - 1;
  out[0 * kWarp + lane] = __ballot_sync(kAll, value % 3 == 0);
  out[1 * kWarp + lane] = __any_sync(kAll, value == x[7]);
  out[2 * kWarp + lane] = __all_sync(kAll, value < 1000);
  out[3 * kWarp + lane] = __shfl_sync(kAll, value, (lane * 5) % kWarp);
  out[4 * kWarp + lane] = __shfl_up_sync(kAll, value, 3);
  out[5 * kWarp + lane] = __shfl_down_sync(kAll, value, 2, 8);  // within eight lanes
  out[6 * kWarp + lane] = __shfl_xor_sync(kAll, value, 9);
  const unsigned peers = __match_any_sync(kAll, value % 5);
  out[7 * kWarp + lane] = peers;
  out[8 * kWarp + lane] = __popc(peers & lower);  // the place among them
  int same;
  out[9 * kWarp + lane] = __match_all_sync(kAll, value / 1000, &same);
  out[10 * kWarp + lane] = same;
  // Half of the warp asks alone.
  unsigned odd = 0;
  if (lane % 2 == 1) odd = __ballot_sync(0xaaaaaaaau, value > 50);
  __syncwarp();
  out[11 * kWarp + lane] = odd;
  out[12 * kWarp + lane] = __activemask() >> lane & 1;  // of the others nothing is promised
}

// One block. out[i] = Σ x[j], j ≤ i: warps by shuffles, then the warps' sums by the first warp.
extern "C" __global__ void running_sum(const int* x, int* out) {
  __shared__ int of_warp[kMaxWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int value = x[threadIdx.x];
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int below = __shfl_up_sync(kAll, value, offset);
    if (lane >= offset) value += below;
  }
  if (lane == kWarp - 1) of_warp[warp] = value;
  __syncthreads();
  if (warp == 0) {
    int total = lane < static_cast<int>(blockDim.x) / kWarp ? of_warp[lane] : 0;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int below = __shfl_up_sync(kAll, total, offset);
      if (lane >= offset) total += below;
    }
    of_warp[lane] = total;
  }
  __syncthreads();
  out[threadIdx.x] = value + (warp > 0 ? of_warp[warp - 1] : 0);
}

// Barriers that count: how many threads of the block agree, whether all, whether any.
extern "C" __global__ void block_votes(const int* x, int* out) {
  const int value = x[threadIdx.x];
  const int count = __syncthreads_count(value > 0), all = __syncthreads_and(value > -100);
  const int any = __syncthreads_or(value == 77);
  out[threadIdx.x] = count * 4 + (all != 0) * 2 + (any != 0);
}

#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
// One warp. Row i of out [6, 32]: reductions that are one instruction, of the lanes in the mask.
extern "C" __global__ void warp_reductions(const int* x, int* out) {
  const int lane = threadIdx.x, value = x[lane];
  const unsigned bits = static_cast<unsigned>(value);
  out[0 * kWarp + lane] = __reduce_add_sync(kAll, value);
  out[1 * kWarp + lane] = __reduce_min_sync(kAll, value);
  out[2 * kWarp + lane] = static_cast<int>(__reduce_max_sync(kAll, bits));
  out[3 * kWarp + lane] = static_cast<int>(__reduce_xor_sync(kAll, bits));
  int part = -1;
  if (lane < 20) part = static_cast<int>(__reduce_or_sync(0x000fffffu, bits));
  else part = static_cast<int>(__reduce_and_sync(0xfff00000u, bits));
  out[4 * kWarp + lane] = part;
  const unsigned threes = __ballot_sync(kAll, lane % 3 == 0);
  out[5 * kWarp + lane] = lane % 3 == 0 ? __reduce_add_sync(threes, value) : 0;
}
#endif

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
// sum[cluster] = Σ of the cluster's part of x, every CTA taking n elements: each CTA's sum is read by the first
// through distributed shared memory.
extern "C" __global__ void cluster_sum(const float* x, int n, float* sum) {
  __shared__ float of_warp[kMaxWarps];
  __shared__ float of_cta;
  const cg::cluster_group cluster = cg::this_cluster();
  float value = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) value += x[blockIdx.x * n + i];
  value = block_sum(value, of_warp);
  if (threadIdx.x == 0) of_cta = value;
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) total += *cluster.map_shared_rank(&of_cta, rank);
    sum[blockIdx.x / cluster.num_blocks()] = total;
  }
  cluster.sync();  // no CTA may end while its shared memory is read
}

// The same by hand: every CTA writes its sum into every other's table and adds up its own.
extern "C" __global__ void cluster_sum_ptx(const float* x, int n, float* sum) {
  __shared__ float of_warp[kMaxWarps];
  __shared__ float of_rank[8];
  unsigned rank, ranks;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(ranks));
  float value = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) value += x[blockIdx.x * n + i];
  value = block_sum(value, of_warp);
  // All must have started before anyone writes to them.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  value = __shfl_sync(kAll, value, 0);
  if (threadIdx.x < ranks) {
    const unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(&of_rank[rank]));
    unsigned theirs;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(own), "r"(threadIdx.x));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(theirs), "f"(value) : "memory");
  }
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned i = 0; i < ranks; ++i) total += of_rank[i];
    // Neighbours check each other: read the next CTA's table, which must say the same.
    const unsigned first = static_cast<unsigned>(__cvta_generic_to_shared(&of_rank[0]));
    unsigned next;
    float theirs;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(next) : "r"(first), "r"((rank + 1) % ranks));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(theirs) : "r"(next) : "memory");
    sum[blockIdx.x] = theirs == of_rank[0] ? total : __int_as_float(0x7fc00000);
  }
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// hits[i] = how often bin i is in x, 32 bins: the CTAs of a cluster count into the first one's shared memory.
extern "C" __global__ void cluster_histogram(const unsigned* x, int n, unsigned* hits) {
  __shared__ unsigned bins[32];
  const cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x < 32) bins[threadIdx.x] = 0;
  cluster.sync();
  unsigned* of_first = cluster.map_shared_rank(bins, 0);
  for (unsigned i = cluster.thread_rank(); i < static_cast<unsigned>(n); i += cluster.num_threads())
    atomicAdd(&of_first[x[i] % 32], 1u);
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x < 32) hits[threadIdx.x] = bins[threadIdx.x];
}
#endif
