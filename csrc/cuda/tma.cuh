// Barriers in shared memory that count bytes too (mbarrier), tensor copies (TMA) and what else sm_90 has for warps with
// work of their own. The sections are those of NVIDIA's PTX ISA.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ptx.cuh"

namespace lorafast::cuda::ptx {

// mbarrier. A phase is over when as many have arrived as `init` said and all bytes are there that were expected.

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: after `init` of all barriers, so that TMA and other CTAs find them initialised.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}

__device__ __forceinline__ void arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}

// shared::cluster: what is at this address in the window of shared memory of a CTA of the cluster.
__device__ __forceinline__ uint32_t in_cta(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Arrives at a barrier that in_cta gave. It says no scope: a release of the cluster waits for all that the thread has
// stored anywhere, some hundred clocks. What this arrival hands over are reads that have ended.
__device__ __forceinline__ void arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" : : "r"(barrier) : "memory");
}

// Stores two words in a CTA of the cluster. Its barrier counts them as it counts the bytes of a copy: who has waited
// there can load them. Both addresses are of in_cta.
__device__ __forceinline__ void send_two(uint32_t to, int a, int b, uint32_t barrier) {
  asm volatile(
      "{\n"
      "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%3], 8;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];\n"
      "}"
      :
      : "r"(to), "r"(a), "r"(b), "r"(barrier)
      : "memory");
}

// Arrives, and promises that tensor copies will bring so many bytes.
__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}

// Promises so many bytes beside an arrival of somebody else, which comes after this.
__device__ __forceinline__ void expect_at(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over; of a new barrier that of parity 1 is. Lanes may find it at
// different times.
__device__ __forceinline__ void wait_at(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n}"
      :
      : "r"(barrier), "r"(parity)
      : "memory");
}

// TMA. `map` is a tensor map among the kernel's parameters. What lies outside the matrix is read as 0 and not written.

__device__ __forceinline__ void fetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

// Copies the box whose first element is (row, column) to shared memory; its bytes count at the barrier.
__device__ __forceinline__ void copy_box(
    uint32_t to, const CUtensorMap* map, int32_t column, int32_t row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      :
      : "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same to two CTAs of the cluster, 0 and 1: to this place in each, and each has its bytes counted at this barrier.
__device__ __forceinline__ void copy_box_to_both(
    uint32_t to, const CUtensorMap* map, int32_t column, int32_t row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;"
      :
      : "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// Copies a box from shared memory. Before it those who wrote it call publish_shared and meet.
__device__ __forceinline__ void store_box(const CUtensorMap* map, int32_t column, int32_t row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               :
               : "l"(map), "r"(column), "r"(row), "r"(from)
               : "memory");
}

// The boxes that this thread has stored since the last call become a group.
__device__ __forceinline__ void commit_boxes() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }

// Of this thread's groups all but the last `left` have been read: their shared memory is free.
template <int left>
__device__ __forceinline__ void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(left) : "memory");
}

// All are written.
__device__ __forceinline__ void wait_until_stored() { asm volatile("cp.async.bulk.wait_group 0;" : : : "memory"); }

// Async Proxy: what this thread wrote to shared memory can be read by TMA and by tensor cores.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// As `meet`, without waiting: others do.
__device__ __forceinline__ void arrive_for(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(number), "r"(threads) : "memory");
}

// barrier: of `threads` threads, which are whole warps. Number 0 is __syncthreads'.
__device__ __forceinline__ void meet(int number, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(number), "r"(threads) : "memory");
}

// barrier.cluster: of all threads of a cluster, warps together.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" : : : "memory");
}

// Special registers: %cluster_ctarank. This CTA's number in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// setmaxnreg: this warpgroup gives registers back, or takes what others gave.
template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(registers));
}

template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(registers));
}

// stmatrix: four matrices of 8 x 8 halves, the inverse of load_matrices.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(row), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

}  // namespace lorafast::cuda::ptx
