// What one family asks of another.
#pragma once

#include <memory>

#include "decode.h"

namespace ptx {

// add, sub, mul, div, abs, neg, min, max, mad of a float type, after their first word (floating.cpp).
void decode_float_arithmetic(Words& words, Instr& instr);
// bar.warp.sync, after `bar.warp` (warp.cpp).
void decode_bar_warp(Words& words, Instr& instr);
// cp.async.bulk…, cp.reduce.async.bulk…, after those words (bulk.cpp).
void decode_bulk_copy(Words& words, Instr& instr);
void decode_bulk_reduce(Words& words, Instr& instr);
// cp.async.mbarrier.arrive, after `cp.async.mbarrier` (mbarrier.cpp).
void decode_copy_arrive(Words& words, Instr& instr);
// barrier.cluster.arrive and .wait, after `barrier.cluster` (cluster.cpp).
void decode_barrier_cluster(Words& words, Instr& instr);

// cp.async copies of one lane that are not complete (copies.cpp): for cp.async.mbarrier.arrive.
std::vector<std::shared_ptr<Delivery>> pending_copies(Warp& warp, int lane);

// Called after an instruction has written a register that a wgmma uses (wgmma.cpp).
void wgmma_dirtied(Step& step);

// Where an address of shared memory points to (mbarrier.cpp): in the CTA's own if `own`, else in any of
// the cluster. `generic`: it is an address of the generic space.
struct SharedPlace {
  Cta* cta;
  uint32_t offset;
};
SharedPlace shared_place(const Step& step, uint64_t address, int lane, bool generic, bool own);

// A fault if there is no mbarrier, or the warp hasn't seen its initialisation.
void mbarrier_used(Step& step, SharedPlace place, int lane);
// One arrival more for the current phase to wait for.
void mbarrier_increment(Cta& cta, uint32_t offset, int lane);

// An arrival at the mbarrier at an offset of a CTA's shared memory (mbarrier.cpp): `count` arrivals, by
// somebody who has seen `clock`. Completes the phase if nothing else is pending.
void mbarrier_arrive(Launch& launch, Cta& cta, uint32_t offset, uint32_t count, const Clock& clock);
// Bytes that a phase waits for, and bytes that have come.
void mbarrier_expect(Launch& launch, Cta& cta, uint32_t offset, int64_t bytes);
void mbarrier_complete(Launch& launch, Cta& cta, uint32_t offset, int64_t bytes, const Clock& clock);
// The agent of the copies that it counts, and a time of that agent that nobody else has; a fault if
// there is no mbarrier. What is written at that time is seen by who has waited for `clock`.
struct Copied {
  int agent;
  uint32_t time;
  Clock clock;
};
Copied mbarrier_copied(Cta& cta, uint32_t offset);

// Columns of tensor memory that a CTA has allocated and not deallocated (tensor_memory.cpp).
uint32_t tensor_columns_left(const Cta& cta);

}  // namespace ptx
