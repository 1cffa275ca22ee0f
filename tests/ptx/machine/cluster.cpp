// barrier.cluster: all threads of a cluster meet.
#include "families.h"

namespace ptx {

namespace {

enum Data { ORDERED };

Cluster::Arrival& arrival_of(const Warp& warp) {
  Cluster& cluster = *warp.cta->cluster;
  if (cluster.arrivals.empty()) cluster.arrivals.resize(cluster.warps);
  return cluster.arrivals[warp.agent];
}

// Goes on to the next generation if all threads that haven't ended have arrived.
void complete(Launch& launch, Cluster& cluster) {
  for (const auto& cta : cluster.ctas)
    for (const auto& warp : cta->warps)
      if (warp->alive & ~arrival_of(*warp).arrived) return;
  ++cluster.generation;
  for (Cluster::Arrival& arrival : cluster.arrivals) arrival.arrived = 0;
  cluster.completed = std::move(cluster.arriving);
  cluster.arriving = {};
  launch.changed();
}

// PTX ISA, Parallel Synchronization and Communication Instructions: barrier.cluster.arrive
Outcome arrive(Step& step) {
  Cluster& cluster = *step.cta.cluster;
  Cluster::Arrival& arrival = arrival_of(step.warp);
  if (const Mask again = arrival.waits & step.active)
    throw Fault(
        "arrives at the cluster's barrier again, with no barrier.cluster.wait between", __builtin_ctz(again));
  arrival.arrived |= step.active;
  arrival.waits |= step.active;
  FOR_LANES(lane, step.active) arrival.generation[lane] = cluster.generation;
  if (step.instr.data[ORDERED]) {
    cluster.arriving.join(step.warp.clock);
    Launch::tick(step.warp);
  }
  complete(step.launch, cluster);
  return Outcome::Done;
}

// barrier.cluster.wait
Outcome wait(Step& step) {
  Cluster& cluster = *step.cta.cluster;
  Cluster::Arrival& arrival = arrival_of(step.warp);
  if (const Mask stray = step.active & ~arrival.waits)
    throw Fault("waits at the cluster's barrier, and hasn't arrived at it", __builtin_ctz(stray));
  for (int tries = 0; tries < 2; ++tries) {
    bool all = true;
    FOR_LANES(lane, step.active) all &= arrival.generation[lane] != cluster.generation;
    if (all) {
      arrival.waits &= ~step.active;
      if (step.instr.data[ORDERED]) {
        step.warp.pass(step.active);
        step.warp.clock.join(cluster.completed);
      }
      return Outcome::Done;
    }
    complete(step.launch, cluster);  // others may have ended since they were last asked
  }
  return Outcome::Wait;
}

}  // namespace

void decode_barrier_cluster(Words& words, Instr& instr) {
  const int what = words.need_one({"arrive", "wait"});
  const int sem = what == 0 ? words.take_one({"release", "relaxed"}) : words.take_one({"acquire"});
  instr.data[ORDERED] = sem != 1;
  instr.aligned = words.take("aligned");
  need_operands(words, instr, 0, 0);
  instr.run = what == 0 ? arrive : wait;
}

}  // namespace ptx
