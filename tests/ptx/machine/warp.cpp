// Instructions of a warp's lanes together: shfl vote match redux elect bar.warp.sync activemask, and those that
// do nothing here.
//
// A .sync instruction waits until all lanes of its membermask that haven't ended are at it, with the same
// membermask. Lanes of one warp may have several membermasks; each is served by itself. Those that wait at two
// places meet at a bar.warp.sync only: what the others exchange has no meaning there.
#include "families.h"
#include "numbers.h"

namespace ptx {
namespace {

// Active lanes that have all of their membermask with them.
Mask gathered(Step& step) {
  const Source masks = step.defined(step.instr.ops.back(), "a membermask");
  Mask ready = 0;
  FOR_LANES(lane, step.active) {
    const Mask mask = masks.get<uint32_t>(lane);
    if (!(mask >> lane & 1)) throw Fault(format("is not in its membermask %#x", mask), lane);
    if (mask & step.warp.alive & ~step.active) continue;
    FOR_LANES(other, mask & step.active) {
      const Mask its = masks.get<uint32_t>(other);
      if (its != mask)
        throw Fault(format("has membermask %#x, and lane %d, which is in it, has %#x", mask, other, its), lane);
    }
    ready |= 1u << lane;
  }
  return ready;
}

// Lanes that have gathered go on. The others stay, but let those go on whose guard is false.
Outcome gone_on(Step& step, Mask asked, Mask ready) {
  if (ready == asked) return Outcome::Done;
  if (ready) step.launch.advance(step.warp, ready, step.warp.pc_of(__builtin_ctz(asked)) + 1);
  else if (step.group == asked) return Outcome::Wait;
  return Outcome::Jumped;
}

template <void (*COMPUTE)(Step&)>
Outcome together(Step& step) {
  const Mask asked = step.active;
  step.active = gathered(step);
  if (step.active) COMPUTE(step);
  return gone_on(step, asked, step.active);
}

// The lanes that a lane is together with.
Mask members(const Step& step, const Source& masks, int lane) { return masks.get<uint32_t>(lane) & step.active; }

Source membermasks(Step& step) { return step.source(step.instr.ops.back()); }

void need_sync(Words& words, const char* what) {
  if (!words.take("sync")) words.unknown(format("%s without .sync ended with sm_6x", what));
}

// d of d or d|p, and p, or a sink.
const Operand& value_of(const Operand& op) { return op.is == Is::Pair ? op.parts[0] : op; }
const Operand& predicate_of(const Operand& op) {
  static const Operand sink;
  return op.is == Is::Pair ? op.parts[1] : sink;
}

void need_result(const Words& words, const Operand& op, bool pair_allowed = false) {
  const bool value = value_of(op).is == Is::Sink || (value_of(op).is == Is::Register && value_of(op).width == 32);
  const bool predicate = predicate_of(op).is == Is::Sink || predicate_of(op).predicate();
  if (!value || !predicate || (op.is == Is::Pair && !pair_allowed))
    words.unknown(pair_allowed ? "has no result d or d|p" : "has no result of 32 bits");
}

// ---- PTX ISA, Data Movement Instructions: shfl.sync

enum class Shuffle { Up, Down, Butterfly, Index };

template <Shuffle MODE>
void shfl(Step& step) {
  const Source a = step.source(1), b = step.source(2), c = step.source(3), masks = membermasks(step);
  uint32_t values[LANES];
  FOR_LANES(lane, step.active) values[lane] = a.get<uint32_t>(lane);
  Mask in_range = 0, undefined = b.undefined | c.undefined;
  const Mask undefined_range = undefined;
  FOR_LANES(lane, step.active) {
    const int by = b.get<uint32_t>(lane) & 31;
    const int clamp = c.get<uint32_t>(lane) & 31, segment = c.get<uint32_t>(lane) >> 8 & 31;
    const int first = lane & segment, last = first | (clamp & ~segment);
    int from = MODE == Shuffle::Up          ? lane - by
               : MODE == Shuffle::Down      ? lane + by
               : MODE == Shuffle::Butterfly ? lane ^ by
                                            : first | (by & ~segment);
    const bool within = MODE == Shuffle::Up ? from >= last : from <= last;
    if (within) in_range |= 1u << lane;
    else from = lane;
    // A lane that doesn't take part has nothing to give.
    const bool gives = members(step, masks, lane) >> from & 1 && !(a.undefined >> from & 1);
    if (!gives) undefined |= 1u << lane;
    step.set(value_of(step.op(0)), lane, gives ? values[from] : 0);
  }
  step.set_undefined(value_of(step.op(0)), undefined);
  step.set_predicate(predicate_of(step.op(0)), in_range, undefined_range);
}

void decode_shfl(Words& words, Instr& instr) {
  need_sync(words, "shfl");
  const Run runs[] = {
      together<shfl<Shuffle::Up>>, together<shfl<Shuffle::Down>>, together<shfl<Shuffle::Butterfly>>,
      together<shfl<Shuffle::Index>>};
  instr.run = runs[words.need_one({"up", "down", "bfly", "idx"})];
  words.need_one({"b32"});
  need_operands(words, instr, 5, 5);
  need_result(words, instr.ops[0], true);
}

// ---- PTX ISA, Parallel Synchronization: vote.sync

enum class Vote { All, Any, Uniform, Ballot };

template <Vote MODE>
void vote(Step& step) {
  const Mask undefined = step.undefined(step.op(1)) & step.active;
  const Mask ayes = step.predicate(step.op(1)) & step.active & ~undefined;
  const Mask noes = step.active & ~undefined & ~ayes;
  const Source masks = membermasks(step);
  Mask result = 0, result_undefined = 0;
  FOR_LANES(lane, step.active) {
    const Mask mask = members(step, masks, lane);
    const bool aye = ayes & mask, no = noes & mask, unknown = undefined & mask;
    if (MODE == Vote::Ballot) step.set(step.op(0), lane, ayes & mask);
    else if (MODE == Vote::All ? !no : MODE == Vote::Any ? aye : !(aye && no)) result |= 1u << lane;
    // An undefined vote matters unless the others have decided.
    const bool decided = MODE == Vote::All ? no : MODE == Vote::Any ? aye : aye && no;
    if (unknown && (MODE == Vote::Ballot || !decided)) result_undefined |= 1u << lane;
  }
  if (MODE == Vote::Ballot) step.set_undefined(step.op(0), result_undefined);
  else step.set_predicate(step.op(0), result, result_undefined);
}

void decode_vote(Words& words, Instr& instr) {
  need_sync(words, "vote");
  const Run runs[] = {
      together<vote<Vote::All>>, together<vote<Vote::Any>>, together<vote<Vote::Uniform>>,
      together<vote<Vote::Ballot>>};
  const int mode = words.need_one({"all", "any", "uni", "ballot"});
  instr.run = runs[mode];
  words.need_one({mode == 3 ? "b32" : "pred"});
  need_operands(words, instr, 3, 3);
  if (mode == 3) need_result(words, instr.ops[0]);
  else if (instr.ops[0].is != Is::Register || instr.ops[0].width != 1)
    words.unknown("has no predicate for a result");
  if (!instr.ops[1].predicate() && instr.ops[1].is != Is::Immediate) words.unknown("votes with no predicate");
}

// ---- PTX ISA, Parallel Synchronization: activemask

Outcome activemask(Step& step) {
  FOR_LANES(lane, step.active) step.set(step.op(0), lane, step.active);
  step.set_undefined(step.op(0), 0);
  return Outcome::Done;
}

void decode_activemask(Words& words, Instr& instr) {
  words.need_one({"b32"});
  need_operands(words, instr, 1, 1);
  need_result(words, instr.ops[0]);
  instr.run = activemask;
}

// ---- PTX ISA, Parallel Synchronization: match.sync

template <class T, bool ALL_EQUAL>
void match(Step& step) {
  const Source a = step.source(1), masks = membermasks(step);
  T values[LANES] = {};
  FOR_LANES(lane, step.active) values[lane] = a.get<T>(lane);
  Mask undefined = 0, matched = 0;
  FOR_LANES(lane, step.active) {
    const Mask mask = members(step, masks, lane);
    if (a.undefined & mask) undefined |= 1u << lane;
    Mask equal = 0;
    FOR_LANES(other, mask) if (values[other] == values[lane]) equal |= 1u << other;
    if (ALL_EQUAL && equal != mask) equal = 0;
    if (equal) matched |= 1u << lane;
    step.set(value_of(step.op(0)), lane, equal);
  }
  step.set_undefined(value_of(step.op(0)), undefined);
  step.set_predicate(predicate_of(step.op(0)), matched, undefined);
}

void decode_match(Words& words, Instr& instr) {
  need_sync(words, "match");
  const bool all = words.need_one({"any", "all"}) == 1, wide = words.need_one({"b32", "b64"}) == 1;
  if (all) instr.run = wide ? together<match<uint64_t, true>> : together<match<uint32_t, true>>;
  else instr.run = wide ? together<match<uint64_t, false>> : together<match<uint32_t, false>>;
  need_operands(words, instr, 3, 3);
  need_result(words, instr.ops[0], all);
  if (instr.ops[1].is == Is::Register && instr.ops[1].width != (wide ? 64 : 32))
    words.unknown("compares registers of another width");
}

// ---- PTX ISA, Parallel Synchronization: redux.sync

struct Sum {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a + b; }
};
struct And {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a & b; }
};
struct Or {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};
struct Xor {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a ^ b; }
};
template <class T>
struct Least {
  uint32_t operator()(uint32_t a, uint32_t b) const { return T(b) < T(a) ? b : a; }
};
template <class T>
struct Greatest {
  uint32_t operator()(uint32_t a, uint32_t b) const { return T(b) > T(a) ? b : a; }
};

// VALUE(bits, index) of each lane, and then COMBINE.
template <class Combine>
void redux(Step& step) {
  const Source a = step.source(1), masks = membermasks(step);
  uint32_t values[LANES], results[LANES];
  FOR_LANES(lane, step.active) values[lane] = a.get<uint32_t>(lane);
  Mask undefined = 0;
  FOR_LANES(lane, step.active) {
    const Mask mask = members(step, masks, lane);
    if (a.undefined & mask) undefined |= 1u << lane;
    const int first = __builtin_ctz(mask);
    if (first < lane) {
      results[lane] = results[first];
    } else {
      results[lane] = values[lane];
      FOR_LANES(other, mask & (mask - 1)) results[lane] = Combine()(results[lane], values[other]);
    }
    step.set(step.op(0), lane, results[lane]);
  }
  step.set_undefined(step.op(0), undefined);
}

enum RealData { ABSOLUTE, NAN_WINS };

// -0 is less than +0. A NaN is passed over, but with .NaN.
template <bool MAX>
void redux_real(Step& step) {
  const Source a = step.source(1), masks = membermasks(step);
  uint32_t values[LANES];
  FOR_LANES(lane, step.active)
  values[lane] = a.get<uint32_t>(lane) & (step.instr.data[ABSOLUTE] ? 0x7fffffff : 0xffffffff);
  Mask undefined = 0;
  FOR_LANES(lane, step.active) {
    const Mask mask = members(step, masks, lane);
    if (a.undefined & mask) undefined |= 1u << lane;
    uint32_t best = nan_bits<Single>();
    bool found = false, nan = false;
    auto order = [](uint32_t bits) { return int32_t(bits & 0x80000000 ? ~(bits & 0x7fffffff) : bits); };
    FOR_LANES(other, mask) {
      const uint32_t value = values[other];
      if ((value & 0x7fffffff) > 0x7f800000) {
        nan = true;
      } else if (!found || (MAX ? order(value) > order(best) : order(value) < order(best))) {
        best = value;
        found = true;
      }
    }
    if (nan && step.instr.data[NAN_WINS]) best = nan_bits<Single>();
    step.set(step.op(0), lane, best);
  }
  step.set_undefined(step.op(0), undefined);
}

void decode_redux(Words& words, Instr& instr) {
  need_sync(words, "redux");
  need_operands(words, instr, 3, 3);
  need_result(words, instr.ops[0]);
  const int operation = words.need_one({"add", "min", "max", "and", "or", "xor"});
  if (operation >= 3) {
    const Run runs[] = {together<redux<And>>, together<redux<Or>>, together<redux<Xor>>};
    words.need_one({"b32"});
    instr.run = runs[operation - 3];
    return;
  }
  const Run runs[][3] = {
      {together<redux<Sum>>, together<redux<Sum>>, nullptr},
      {together<redux<Least<uint32_t>>>, together<redux<Least<int32_t>>>, together<redux_real<false>>},
      {together<redux<Greatest<uint32_t>>>, together<redux<Greatest<int32_t>>>, together<redux_real<true>>}};
  const int type = words.need_one({"u32", "s32", "f32"});
  instr.run = runs[operation][type];
  if (type == 2) {
    instr.data[ABSOLUTE] = words.take("abs");
    instr.data[NAN_WINS] = words.take("NaN");
  }
}

// ---- PTX ISA, Parallel Synchronization: elect.sync

// The ISA lets the hardware choose, always the same one for a membermask: here the lowest lane.
void elect(Step& step) {
  const Source masks = membermasks(step);
  Mask leaders = 0;
  FOR_LANES(lane, step.active) {
    const int leader = __builtin_ctz(members(step, masks, lane));
    if (leader == lane) leaders |= 1u << lane;
    step.set(value_of(step.op(0)), lane, leader);
  }
  step.set_undefined(value_of(step.op(0)), 0);
  step.set_predicate(predicate_of(step.op(0)), leaders, 0);
}

void decode_elect(Words& words, Instr& instr) {
  need_sync(words, "elect");
  need_operands(words, instr, 2, 2);
  need_result(words, instr.ops[0], true);
  if (instr.ops[0].is != Is::Pair) words.unknown("has no result d|p");
  instr.run = together<elect>;
}

// ---- PTX ISA, Parallel Synchronization: bar.warp.sync

Outcome bar_warp(Step& step);

// Lanes of a membermask that wait with it at another bar.warp.sync.
Mask waiting_elsewhere(Step& step, Mask mask) {
  Mask there = 0;
  if (!step.warp.diverged) return there;
  FOR_LANES(lane, mask & step.warp.alive & ~step.group) {
    const Instr& instr = step.launch.program.code[step.warp.pcs[lane]];
    if (instr.run != bar_warp) continue;
    Step other{step.launch, step.cta, step.warp, instr, 1u << lane, 1u << lane, step.count};
    if (instr.guard >= 0) {
      const Mask value = step.warp.predicate(step.launch.program.places[instr.guard]);
      const Mask comes = (instr.guard_negated ? ~value : value) & ~step.warp.undefined[instr.guard];
      if (!(comes >> lane & 1)) continue;
    }
    const Source masks = other.source(instr.ops.back());
    if (!(masks.undefined >> lane & 1) && masks.get<uint32_t>(lane) == mask) there |= 1u << lane;
  }
  return there;
}

Outcome bar_warp(Step& step) {
  const Mask asked = step.active;
  const Source masks = step.defined(step.op(0), "a membermask");
  Mask ready = gathered(step), released = 0;
  FOR_LANES(lane, asked & ~ready) {
    const Mask mask = masks.get<uint32_t>(lane);
    const Mask there = waiting_elsewhere(step, mask);
    if (mask & step.warp.alive & ~step.active & ~there) continue;
    ready |= mask & asked;
    released |= there;
  }
  if (ready) ++step.warp.epoch;
  FOR_LANES(lane, released) {
    const uint32_t pc = step.warp.pcs[lane];
    ++step.launch.counts[pc].lanes;
    step.launch.advance(step.warp, 1u << lane, pc + 1);
  }
  return gone_on(step, asked, ready);
}

// ---- PTX ISA, Miscellaneous Instructions: nanosleep, brkpt. There is no time here, and no debugger.

Outcome nothing(Step&) { return Outcome::Done; }

void decode_nanosleep(Words& words, Instr& instr) {
  words.need_one({"u32"});
  need_operands(words, instr, 1, 1);
  instr.run = nothing;
}

void decode_brkpt(Words& words, Instr& instr) {
  need_operands(words, instr, 0, 0);
  instr.run = nothing;
}

const Family shfl_family("shfl", decode_shfl);
const Family vote_family("vote", decode_vote);
const Family activemask_family("activemask", decode_activemask);
const Family match_family("match", decode_match);
const Family redux_family("redux", decode_redux);
const Family elect_family("elect", decode_elect);
const Family nanosleep_family("nanosleep", decode_nanosleep);
const Family brkpt_family("brkpt", decode_brkpt);

}  // namespace

void decode_bar_warp(Words& words, Instr& instr) {
  need_sync(words, "bar.warp");
  need_operands(words, instr, 1, 1);
  instr.run = bar_warp;
}

}  // namespace ptx
