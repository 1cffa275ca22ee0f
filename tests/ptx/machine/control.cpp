// Branches, calls, ends, barriers of the CTA.
#include "families.h"

namespace ptx {

namespace {

// PTX ISA, Control Flow Instructions: bra
Outcome bra(Step& step) {
  step.launch.advance(step.warp, step.active, step.op(0).value);
  return Outcome::Jumped;
}

void decode_bra(Words& words, Instr& instr) {
  words.take("uni");  // a promise that all active lanes branch, which the machine has no use for
  need_operands(words, instr, 1, 1);
  if (instr.ops[0].is != Is::Label) words.unknown("branches to no label");
  instr.run = bra;
}

// PTX ISA, Control Flow Instructions: brx.idx
Outcome brx(Step& step) {
  const Source index = step.defined(step.op(0), "the index of a branch");
  const auto& labels = step.op(1).parts;
  FOR_LANES(lane, step.active) {
    const uint32_t i = index.get<uint32_t>(lane);
    if (i >= labels.size()) throw Fault(format("branches to label %u of %zu", i, labels.size()), lane);
    step.launch.advance(step.warp, 1u << lane, labels[i].value);
  }
  return Outcome::Jumped;
}

void decode_brx(Words& words, Instr& instr) {
  words.need_one({"idx"});
  words.take("uni");
  need_operands(words, instr, 2, 2);
  instr.run = brx;
}

// PTX ISA, Control Flow Instructions: call, ret, exit
Outcome call(Step& step) {
  const uint32_t next = step.warp.pc_of(__builtin_ctz(step.active)) + 1;
  FOR_LANES(lane, step.active) step.warp.stack[lane].push_back(next);
  step.launch.advance(step.warp, step.active, step.op(0).value);
  return Outcome::Jumped;
}

void decode_call(Words& words, Instr& instr) {
  words.take("uni");
  need_operands(words, instr, 1, 1);
  instr.run = call;
}

Outcome end(Step& step) {
  step.launch.end_lanes(step.warp, step.active);
  return Outcome::Jumped;
}

Outcome ret(Step& step) {
  Mask ends = 0;
  FOR_LANES(lane, step.active) {
    auto& stack = step.warp.stack[lane];
    if (stack.empty()) {
      ends |= 1u << lane;
      continue;
    }
    step.launch.advance(step.warp, 1u << lane, stack.back());
    stack.pop_back();
  }
  if (ends) step.launch.end_lanes(step.warp, ends);
  return Outcome::Jumped;
}

void decode_ret(Words& words, Instr& instr) {
  words.take("uni");
  need_operands(words, instr, 0, 0);
  instr.run = ret;
}

void decode_exit(Words& words, Instr& instr) {
  need_operands(words, instr, 0, 0);
  instr.run = end;
}

// PTX ISA, Miscellaneous Instructions: trap
Outcome trap(Step& step) { throw Fault("stops the kernel", __builtin_ctz(step.active)); }

void decode_trap(Words& words, Instr& instr) {
  need_operands(words, instr, 0, 0);
  instr.run = trap;
}

Outcome assertfail(Step& step) { throw Fault("a device-side assertion fails", __builtin_ctz(step.active)); }

void decode_assertfail(Words&, Instr& instr) { instr.run = assertfail; }

// PTX ISA, Miscellaneous Instructions: setmaxnreg. Registers aren't counted here; ptxas does.
Outcome nothing(Step&) { return Outcome::Done; }

void decode_setmaxnreg(Words& words, Instr& instr) {
  words.need_one({"inc", "dec"});
  words.need_one({"sync"});
  words.need_one({"aligned"});
  words.need_one({"u32"});
  need_operands(words, instr, 1, 1);
  if (instr.ops[0].value < 24 || instr.ops[0].value > 256 || instr.ops[0].value % 8)
    words.unknown("takes a multiple of 8 from 24 to 256");
  instr.aligned = true;
  instr.run = nothing;
}

// ---- PTX ISA, Parallel Synchronization: bar, barrier

enum Kind { SYNC, ARRIVE, RED_POPC, RED_AND, RED_OR };
enum Data { KIND, HAS_COUNT };

struct Standing {  // the lanes of a warp that have arrived and wait
  uint32_t generation[LANES];
  Mask waits = 0;
};

Standing& standing_of(Warp& warp) {
  if (!warp.barriers) warp.barriers = std::make_shared<Standing>();
  return *static_cast<Standing*>(warp.barriers.get());
}

void complete(Step& step, Barrier& barrier) {
  ++barrier.generation;
  barrier.completed = std::move(barrier.clock);
  barrier.clock = {};
  barrier.arrived = barrier.expected = 0;
  barrier.result = barrier.votes;
  barrier.votes = {};
  step.launch.changed();
}

// A warp's lanes arrive once, then ask until the barrier has been completed.
Outcome barrier(Step& step) {
  const Instr& instr = step.instr;
  const int kind = instr.data[KIND];
  const bool red = kind >= RED_POPC;
  const size_t first = red ? 1 : 0;  // behind the destination
  const Source id = step.defined(step.op(first), "the number of a barrier");
  const int lane = __builtin_ctz(step.active);
  const uint32_t number = id.get<uint32_t>(lane);
  if (number >= 16) throw Fault(format("has %u for the number of a barrier", number), lane);
  const int threads = step.launch.options.block[0] * step.launch.options.block[1] * step.launch.options.block[2];
  int expected = (threads + LANES - 1) / LANES * LANES;
  if (instr.data[HAS_COUNT]) {
    expected = step.defined(step.op(first + 1), "the threads of a barrier").get<uint32_t>(lane);
    if (expected <= 0 || expected % LANES)
      throw Fault(format("waits for %d threads, not a multiple of the warp's", expected), lane);
  }
  Barrier& at = step.cta.barriers[number];
  Warp& warp = step.warp;
  Standing& standing = standing_of(warp);
  const Mask waiting = step.active & standing.waits;
  if (waiting == 0) {
    // Without .aligned the hardware counts warps all the same: those of a warp that come first wait.
    if (step.active != warp.alive) return Outcome::Wait;
    if (at.expected == 0) at.expected = expected;
    else if (at.expected != expected)
      throw Fault(
          format("waits for %d threads at barrier %u, others for %d", expected, number, at.expected), lane);
    at.arrived += LANES;
    at.clock.join(warp.clock);
    if (red) {
      const Operand& vote = step.op(first + (instr.data[HAS_COUNT] ? 2 : 1));
      const Mask value = step.defined_predicate(vote, "a vote");
      if (step.active & ~value) at.votes.all = 0;
      at.votes.any |= step.active & value;
      at.votes.count += __builtin_popcount(step.active & value);
    }
    Launch::tick(warp);
    step.launch.changed();
    if (at.arrived > at.expected)
      throw Fault(
          format("%d threads arrive at barrier %u, which waits for %d", at.arrived, number, at.expected), lane);
    const uint32_t generation = at.generation;
    if (at.arrived == at.expected) complete(step, at);
    if (kind == ARRIVE) return Outcome::Done;
    if (at.generation == generation) {
      standing.waits |= step.active;
      FOR_LANES(i, step.active) standing.generation[i] = generation;
      return Outcome::Wait;
    }
  } else {
    if (standing.generation[lane] == at.generation) return Outcome::Wait;
    standing.waits &= ~step.active;
  }
  warp.clock.join(at.completed);
  ++warp.epoch;
  if (red) {
    if (kind == RED_POPC) {
      FOR_LANES(i, step.active) step.set(step.op(0), i, uint32_t(at.result.count));
      step.set_undefined(step.op(0), 0);
    } else {
      const bool value = kind == RED_AND ? at.result.all != 0 : at.result.any != 0;
      step.set_predicate(step.op(0), value ? ALL : 0, 0);
    }
  }
  return Outcome::Done;
}

// Words that bar and barrier share; .cta is where they are.
void decode_barrier_of_cta(Words& words, Instr& instr, bool aligned) {
  words.take("cta");
  const int kind = words.need_one({"sync", "arrive", "red"});
  instr.data[KIND] = kind;
  if (kind == 2) instr.data[KIND] = RED_POPC + words.need_one({"popc", "and", "or"});
  const size_t first = kind == 2 ? 1 : 0;
  if (kind == 2) words.need_one({"u32", "pred"});
  instr.aligned = words.take("aligned") || aligned;
  need_operands(words, instr, first + 1, first + 3);
  instr.data[HAS_COUNT] = instr.ops.size() > first + 1 + (kind == 2 ? 1 : 0);
  if (kind == 1 && !instr.data[HAS_COUNT]) words.unknown("arrive needs a number of threads");
  instr.run = barrier;
}

void decode_bar(Words& words, Instr& instr) {
  if (words.take("warp")) {
    decode_bar_warp(words, instr);
    return;
  }
  decode_barrier_of_cta(words, instr, true);
}

void decode_barrier(Words& words, Instr& instr) {
  if (words.take("cluster")) {
    decode_barrier_cluster(words, instr);
    return;
  }
  decode_barrier_of_cta(words, instr, false);
}

const Family families[] = {
    {"bra", decode_bra},
    {"brx", decode_brx},
    {"call", decode_call},
    {"ret", decode_ret},
    {"exit", decode_exit},
    {"trap", decode_trap},
    {"bar", decode_bar},
    {"barrier", decode_barrier},
    {"assertfail", decode_assertfail},
    {"setmaxnreg", decode_setmaxnreg}};

}  // namespace

}  // namespace ptx
