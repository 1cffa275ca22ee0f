// The instructions of asynchronous copies, by name: mbarriers, bulk copies, the fences between proxies.
#pragma once

#include <cuda.h>

using Barrier = unsigned long long;  // an mbarrier, in shared memory
using TensorMap = CUtensorMap;

__device__ inline unsigned shared_address(const void* place) {
  return static_cast<unsigned>(__cvta_generic_to_shared(place));
}

// Whether this lane is the one of the warp that acts for it. All lanes ask.
__device__ inline bool elected() {
  unsigned is_elected;
  asm volatile(
      "{\n\t"
      ".reg .pred p;\n\t"
      "elect.sync _|p, 0xffffffff;\n\t"
      "selp.b32 %0, 1, 0, p;\n\t"
      "}"
      : "=r"(is_elected));
  return is_elected != 0;
}

__device__ inline void barrier_init(Barrier& barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
}

// What was initialised is seen by the other CTAs of the cluster and by the asynchronous proxy.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives at the same barrier of the CTA of that rank.
__device__ inline void arrive_at(Barrier& barrier, unsigned rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 theirs;\n\t"
      "mapa.shared::cluster.u32 theirs, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [theirs];\n\t"
      "}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// Arrives, and says how many bytes will come.
__device__ inline void arrive_expecting(Barrier& barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of that parity is complete.
__device__ inline void wait(Barrier& barrier, unsigned parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra finished;\n\t"
      "bra again;\n\t"
      "finished:\n\t"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// The same, seeing too what other CTAs of the cluster released by their arrival.
__device__ inline void wait_cluster(Barrier& barrier, unsigned parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// What ordinary stores wrote to shared memory is seen by bulk stores and by the tensor cores.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Threads of some warps of the block meet; barrier 0 is that of __syncthreads.
__device__ inline void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// `bytes`, a multiple of 16, to shared memory; the barrier counts them.
__device__ inline void copy_bulk(void* to, const void* from, unsigned bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

__device__ inline void store_bulk(void* to, const void* from, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}

// The map's box at (row, col) to shared memory, zero beyond the tensor.
__device__ inline void copy_box(void* to, const TensorMap& map, int row, int col, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(shared_address(to)),
      "l"(&map), "r"(col), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// The same to every CTA of the cluster whose bit is in `ranks`, at the same place; the barrier of each counts.
__device__ inline void copy_box_to(
    void* to, const TensorMap& map, int row, int col, Barrier& barrier, unsigned short ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(col), "r"(row), "r"(shared_address(&barrier)), "h"(ranks)
      : "memory");
}

// What of the box is within the tensor, from shared memory.
__device__ inline void store_box(const TensorMap& map, int row, int col, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(col),
               "r"(row), "r"(shared_address(from))
               : "memory");
}

__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the last `kPending` groups have read shared memory.
template <int kPending>
__device__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until all groups have written.
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ inline void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

template <int kRegisters>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A place in a ring of kStages buffers, and how often the ring has been gone around.
template <int kStages>
struct Turn {
  int stage = 0;
  unsigned round = 0;

  // Of the phase in which this round's data arrive.
  __device__ unsigned filled() const { return round & 1; }
  // Of the phase in which the round before was used up: in the first round, that before the first, which is over.
  __device__ unsigned emptied() const { return (round & 1) ^ 1; }
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      ++round;
    }
  }
};
