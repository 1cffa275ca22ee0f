// Copies by specialised warps: a producer has the copy engine fill a ring of buffers, consumers empty it.
#include "async.cuh"

constexpr int kStages = 3;
constexpr int kConsumers = 128;

struct Ring {
  Barrier full[kStages];   // the producer has arrived, and its bytes
  Barrier empty[kStages];  // the consumers have arrived
};

// By one thread, before all others meet it.
__device__ void make(Ring& ring, unsigned consumers) {
  for (int stage = 0; stage < kStages; ++stage) {
    barrier_init(ring.full[stage], 1);
    barrier_init(ring.empty[stage], consumers);
  }
  fence_barrier_init();
}

constexpr int kChunk = 512;  // floats of a copy

// y[i] = factor · x[i], n a multiple of four. A block has five warps, of which the last is the producer.
extern "C" __global__ void __launch_bounds__(kConsumers + 32)
    scale_bulk(const float* x, float* y, int n, float factor) {
  __shared__ alignas(16) float in[kStages][kChunk];
  __shared__ alignas(16) float out[2][kChunk];
  __shared__ Ring ring;
  if (threadIdx.x == 0) make(ring, kConsumers);
  __syncthreads();
  const int chunks = (n + kChunk - 1) / kChunk;
  Turn<kStages> turn;

  if (threadIdx.x >= kConsumers) {
    if (!elected()) return;
    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x, turn.next()) {
      const unsigned bytes = min(kChunk, n - chunk * kChunk) * sizeof(float);
      wait(ring.empty[turn.stage], turn.emptied());
      arrive_expecting(ring.full[turn.stage], bytes);
      copy_bulk(in[turn.stage], &x[chunk * kChunk], bytes, ring.full[turn.stage]);
    }
    return;
  }

  int half = 0;
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x, turn.next(), half ^= 1) {
    const int count = min(kChunk, n - chunk * kChunk);
    if (threadIdx.x == 0) wait_stores_read<1>();  // the store of two chunks ago has left this half
    meet(1, kConsumers);
    wait(ring.full[turn.stage], turn.filled());
    for (int i = threadIdx.x * 4; i < count; i += kConsumers * 4) {
      float4 four = *reinterpret_cast<const float4*>(&in[turn.stage][i]);
      four.x *= factor, four.y *= factor, four.z *= factor, four.w *= factor;
      *reinterpret_cast<float4*>(&out[half][i]) = four;
    }
    arrive(ring.empty[turn.stage]);
    fence_async_proxy();  // by every writer, before the one that stores is told
    meet(1, kConsumers);
    if (threadIdx.x == 0) {
      store_bulk(&y[chunk * kChunk], out[half], count * sizeof(float));
      commit_stores();
    }
  }
  if (threadIdx.x == 0) wait_stores();  // shared memory is read until then
}

constexpr int kTile = 32;  // rows and columns of floats: rows of 128 bytes

// Where the copy engine puts element (row, col) of a tile under the 128-byte swizzle.
__device__ int swizzled(int row, int col) { return row * kTile + ((col / 4 ^ (row & 7)) * 4 | col % 4); }

// y [N, M] = factor · xᵀ, x [M, N], tile by tile. x's map has boxes of 32 × 32 under the 128-byte swizzle, y's the
// same without. A block is two warpgroups: the first produces, with one thread, and leaves its registers to the second.
extern "C" __global__ void __launch_bounds__(2 * kConsumers, 1) transpose_tensor(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, int M, int N, float factor) {
  __shared__ alignas(1024) float in[kStages][kTile * kTile];
  __shared__ alignas(128) float out[2][kTile * kTile];
  __shared__ Ring ring;
  if (threadIdx.x == 0) {
    prefetch_map(x);
    prefetch_map(y);
    make(ring, kConsumers / 32);
  }
  __syncthreads();
  const int across = (N + kTile - 1) / kTile, tiles = (M + kTile - 1) / kTile * across;
  Turn<kStages> turn;

  if (threadIdx.x < kConsumers) {
    give_registers<40>();
    if (threadIdx.x != 0) return;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn.next()) {
      wait(ring.empty[turn.stage], turn.emptied());
      arrive_expecting(ring.full[turn.stage], sizeof(in[0]));  // the whole box, also where it leaves the tensor
      copy_box(in[turn.stage], x, tile / across * kTile, tile % across * kTile, ring.full[turn.stage]);
    }
    return;
  }

  take_registers<216>();
  const int thread = threadIdx.x - kConsumers;
  int half = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn.next(), half ^= 1) {
    if (thread == 0) wait_stores_read<1>();
    meet(1, kConsumers);
    wait(ring.full[turn.stage], turn.filled());
    for (int i = thread; i < kTile * kTile; i += kConsumers) {
      const int row = i % kTile, col = i / kTile;
      out[half][i] = factor * in[turn.stage][swizzled(row, col)];
    }
    __syncwarp();  // one lane arrives for what all have read
    if (thread % 32 == 0) arrive(ring.empty[turn.stage]);
    fence_async_proxy();
    meet(1, kConsumers);
    if (thread == 0) {
      store_box(y, tile % across * kTile, tile / across * kTile, out[half]);
      commit_stores();
    }
  }
  if (thread == 0) wait_stores();
}

#if __CUDA_ARCH__ < 1200 || !defined(__CUDA_ARCH__)
// y[rank] [M, N] = (rank + 1) · x [M, N], by clusters of two: each CTA reads half of every tile, 16 rows, and sends it
// to both. x's map has boxes of 16 × 32, not swizzled; y is [2, M, N], whose rows the second CTA writes from M on.
extern "C" __global__ void __launch_bounds__(kConsumers + 32)
    copy_multicast(const __grid_constant__ TensorMap x, float* y, int M, int N) {
  __shared__ alignas(128) float in[kStages][kTile * kTile];
  __shared__ Ring ring;
  const unsigned rank = cluster_rank();
  if (threadIdx.x == 0) make(ring, 2 * (kConsumers / 32));  // a buffer is empty when both CTAs' warps have read it
  cluster_sync();  // nothing is sent before the receiver's barriers are there
  const int across = (N + kTile - 1) / kTile, tiles = (M + kTile - 1) / kTile * across;
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  Turn<kStages> turn;

  if (threadIdx.x >= kConsumers) {
    if (elected())
      for (int tile = cluster; tile < tiles; tile += clusters, turn.next()) {
        wait_cluster(ring.empty[turn.stage], turn.emptied());
        arrive_expecting(ring.full[turn.stage], sizeof(in[0]));  // both halves
        const int first = rank * (kTile / 2);
        copy_box_to(
            &in[turn.stage][first * kTile], x, tile / across * kTile + first, tile % across * kTile,
            ring.full[turn.stage], 3);
      }
    __syncwarp();
  } else {
    for (int tile = cluster; tile < tiles; tile += clusters, turn.next()) {
      wait(ring.full[turn.stage], turn.filled());
      for (int i = threadIdx.x; i < kTile * kTile; i += kConsumers) {
        const int row = tile / across * kTile + i / kTile, col = tile % across * kTile + i % kTile;
        if (row < M && col < N)
          y[(static_cast<size_t>(rank) * M + row) * N + col] = (rank + 1) * in[turn.stage][i];
      }
      __syncwarp();
      if (threadIdx.x % 32 < 2) arrive_at(ring.empty[turn.stage], threadIdx.x % 32);
    }
  }
  cluster_sync();  // neither ends while the other may arrive at its barriers
}
#endif
