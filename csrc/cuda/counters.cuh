// How the CTAs of a launch speak to each other. Counters are zero at the kernel boundary: a kernel finds them zero,
// and its last CTA sets them back (kernels/common/counters.py).
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace lorafast::cuda {

// Counts this CTA; how many were counted before it. What they stored before it can be loaded by all its threads.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
  __shared__ uint32_t before;
  __syncthreads();  // all threads have stored
  if (threadIdx.x == 0) before = ptx::add_acquire_release(counter, 1);
  __syncthreads();  // and none loads earlier
  return before;
}

// Takes the next number of a queue, for the whole CTA.
__device__ __forceinline__ uint32_t take_next(uint32_t* queue) {
  __shared__ uint32_t taken;
  __syncthreads();  // the last number has been read
  if (threadIdx.x == 0) taken = ptx::add_relaxed(queue, 1);
  __syncthreads();
  return taken;
}

// Waits until `least` CTAs were counted, each after what it has stored, which can be loaded then. If that takes two
// seconds they never will be, and the launch ends in an error.
__device__ __forceinline__ void wait_for_count(const uint32_t* counter, uint32_t least) {
  if (ptx::load_acquire(counter) >= least) return;
  const uint64_t since = ptx::nanoseconds();
  while (ptx::load_acquire(counter) < least) {
    if (ptx::nanoseconds() - since > 2000000000ull) __trap();
  }
}

}  // namespace lorafast::cuda
