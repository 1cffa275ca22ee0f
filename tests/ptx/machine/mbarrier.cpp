// mbarrier: barriers in shared memory that count arrivals and bytes.
//
// PTX ISA, Parallel Synchronization and Communication Instructions: mbarrier. A phase is complete when
// no arrivals and no bytes are pending. The object's 8 bytes are opaque: its state is Cta::mbarriers.
#include "families.h"

namespace ptx {

namespace {

constexpr int64_t MOST = (1 << 20) - 1;  // arrivals, and bytes either way
constexpr uint32_t ALIGNMENT = 8, BYTES = 8;
constexpr int TIMES_OUT_ONE_IN = 4;  // a try_wait of an incomplete phase, when it first asks

enum Space { CTA, CLUSTER, GENERIC };
enum Ordered { RELAXED, WIDE, NARROW };  // narrow: .cta
enum Data { SPACE, ORDERED, DROP, EXPECT, NO_COMPLETE, PARITY, TRIES, NO_INCREMENT };

int at(uint32_t offset) { return int(offset) - int(SHARED_START); }

Mbarrier& valid(Cta& cta, uint32_t offset, int lane = -1) {
  const auto found = cta.mbarriers.find(offset);
  if (found == cta.mbarriers.end() || !found->second.valid)
    throw Fault(format("uses the mbarrier at %d of shared memory, which is not initialised", at(offset)), lane);
  return found->second;
}

void check_alignment(SharedPlace place, int lane) {
  if (place.offset % ALIGNMENT)
    throw Fault(format("has an mbarrier at %d of shared memory, not a multiple of 8", at(place.offset)), lane);
}

// The object at an address; whoever uses it must have seen its initialisation.
Mbarrier& object(Step& step, SharedPlace place, int lane) {
  check_alignment(place, lane);
  Mbarrier& barrier = valid(*place.cta, place.offset, lane);
  uint8_t opaque[BYTES];
  SharedMemory& shared = place.cta->shared;
  shared.close(place.offset, false);
  shared.read(step, lane, place.offset, BYTES, ALIGNMENT, opaque);
  shared.close(place.offset, true);
  return barrier;
}

SharedPlace place_of(const Step& step, const Operand& operand, const Source& base, int lane) {
  const int space = step.instr.data[SPACE];
  return shared_place(step, step.address(operand, base, lane), lane, space == GENERIC, space == CTA);
}

// ---- Phases

void complete_phase(Launch& launch, Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    ++barrier.phase;
    barrier.pending = barrier.count;
    barrier.completed = std::move(barrier.arrived);
    barrier.arrived = {};
  }
  launch.changed();
}

void count_bytes(Mbarrier& barrier, uint32_t offset, int64_t bytes, int lane) {
  barrier.bytes += bytes;
  if (barrier.bytes > MOST || barrier.bytes < -MOST)
    throw Fault(
        format(
            "makes the mbarrier at %d of shared memory wait for %lld bytes, beyond its range", at(offset),
            (long long)barrier.bytes),
        lane);
}

void arrive_on(Mbarrier& barrier, uint32_t offset, uint32_t count, int lane) {
  if (count == 0 || int64_t(count) > barrier.pending)
    throw Fault(
        format(
            "arrives %u times at the mbarrier at %d of shared memory, which waits for %lld of %u arrivals", count,
            at(offset), (long long)barrier.pending, barrier.count),
        lane);
  barrier.pending -= count;
}

// ---- What an arrival returns: its phase, and what was pending then. Opaque to programs.

constexpr uint64_t TOKEN = 0xb5, TOKEN_SHIFT = 56;
constexpr int PHASE_SHIFT = 24, NO_COMPLETE_SHIFT = 20;

uint64_t token_of(const Mbarrier& barrier, bool no_complete) {
  return TOKEN << TOKEN_SHIFT | uint64_t(barrier.phase) << PHASE_SHIFT |
         uint64_t(no_complete) << NO_COMPLETE_SHIFT | uint64_t(barrier.pending);
}

void check_token(uint64_t token, int lane) {
  if (token >> TOKEN_SHIFT != TOKEN)
    throw Fault(format("has %#llx for the state of an mbarrier", (unsigned long long)token), lane);
}

// ---- Instructions

// Its bytes change, which must be ordered with all other use.
void write_over(Step& step, SharedPlace place, int lane) {
  const uint64_t nothing = 0;
  place.cta->shared.write(step, lane, place.offset, BYTES, ALIGNMENT, &nothing);
}

// mbarrier.init
Outcome init(Step& step) {
  const Source base = step.address_base(step.op(0));
  const Source counts = step.defined(step.op(1), "the count of an mbarrier");
  FOR_LANES(lane, step.active) {
    const SharedPlace place = place_of(step, step.op(0), base, lane);
    const uint32_t count = counts.get<uint32_t>(lane);
    if (count < 1 || count > MOST)
      throw Fault(format("initialises an mbarrier for %u arrivals, not 1 to %lld", count, (long long)MOST), lane);
    check_alignment(place, lane);
    Mbarrier& barrier = place.cta->mbarriers[place.offset];
    if (barrier.valid)
      throw Fault(
          format(
              "initialises the mbarrier at %d of shared memory again, with no mbarrier.inval between",
              at(place.offset)),
          lane);
    write_over(step, place, lane);
    place.cta->shared.close(place.offset, true);
    Mbarrier fresh;
    fresh.count = fresh.pending = count;
    fresh.agent = barrier.agent;  // clocks know it
    fresh.copies = barrier.copies;
    fresh.valid = true;
    barrier = std::move(fresh);
  }
  return Outcome::Done;
}

// mbarrier.inval
Outcome inval(Step& step) {
  const Source base = step.address_base(step.op(0));
  FOR_LANES(lane, step.active) {
    const SharedPlace place = place_of(step, step.op(0), base, lane);
    Mbarrier& barrier = object(step, place, lane);
    place.cta->shared.close(place.offset, false);
    write_over(step, place, lane);
    barrier.valid = false;
    step.launch.changed();
  }
  return Outcome::Done;
}

// mbarrier.expect_tx, mbarrier.complete_tx
template <int sign>
Outcome count_tx(Step& step) {
  const Source base = step.address_base(step.op(0));
  const Source bytes = step.defined(step.op(1), "the bytes of an mbarrier");
  FOR_LANES(lane, step.active) {
    const SharedPlace place = place_of(step, step.op(0), base, lane);
    Mbarrier& barrier = object(step, place, lane);
    count_bytes(barrier, place.offset, sign * int64_t(bytes.get<uint32_t>(lane)), lane);
    complete_phase(step.launch, barrier);
  }
  return Outcome::Done;
}

// mbarrier.arrive, mbarrier.arrive_drop
Outcome arrive(Step& step) {
  const int64_t* data = step.instr.data;
  const Operand& state = step.op(0);
  const Source base = step.address_base(step.op(1));
  const bool counted = step.instr.ops.size() > 2;
  const Source counts = counted ? step.defined(step.op(2), "the count of an arrival") : Source{};
  FOR_LANES(lane, step.active) {
    const SharedPlace place = place_of(step, step.op(1), base, lane);
    Mbarrier& barrier = object(step, place, lane);
    if (place.cta != &step.cta && state.is != Is::Sink)
      throw Fault("wants the state of another CTA's mbarrier", lane);
    const uint32_t operand = counted ? counts.get<uint32_t>(lane) : 1;
    const uint32_t count = data[EXPECT] ? 1 : operand;
    step.set(state, lane, token_of(barrier, data[NO_COMPLETE]));
    if (data[EXPECT]) count_bytes(barrier, place.offset, operand, lane);
    arrive_on(barrier, place.offset, count, lane);
    if (data[DROP]) barrier.count -= std::min(count, barrier.count);
    if (data[NO_COMPLETE] && barrier.pending == 0 && barrier.bytes == 0)
      throw Fault(
          format("completes a phase of the mbarrier at %d of shared memory, by .noComplete", at(place.offset)),
          lane);
    // A relaxed arrival carries what a fence before it has released.
    const bool reaches = data[ORDERED] == WIDE || (data[ORDERED] == NARROW && place.cta == &step.cta);
    barrier.arrived.join(reaches ? step.warp.clock : step.warp.fence_released);
    complete_phase(step.launch, barrier);
  }
  step.set_undefined(state, 0);
  if (data[ORDERED]) {
    Launch::tick(step.warp);
    step.warp.keep_back(step.active);
  }
  return Outcome::Done;
}

// A clock without what warps of other CTAs have done.
Clock of_own_cta(const Cta& cta, const Clock& clock) {
  const size_t warps = cta.warps.size(), first = cta.rank * warps, all = cta.cluster->warps;
  Clock own = clock;
  for (std::vector<uint32_t>* times : {&own.seen, &own.fenced})
    for (size_t agent = 0; agent < std::min(times->size(), all); ++agent)
      if (agent < first || agent >= first + warps) (*times)[agent] = 0;
  return own;
}

bool is_complete(const Mbarrier& barrier, bool parity, uint64_t state, int lane) {
  if (parity) {
    if (state > 1) throw Fault(format("waits for a phase of parity %u", uint32_t(state)), lane);
    return (barrier.phase & 1) != state;
  }
  check_token(state, lane);
  const uint32_t phase = state >> PHASE_SHIFT & 0xffffffff;
  if (phase != barrier.phase && phase + 1 != barrier.phase)
    throw Fault(format("waits for phase %u of an mbarrier that is in phase %u", phase, barrier.phase), lane);
  return phase != barrier.phase;
}

// Whether a try_wait that can only wait runs into its time limit: at most once a phase and warp, or if
// nobody can go on any more. In one phase it is everybody's that does or nobody's: where those who wait meet
// behind it, one of them alone would hide that the others haven't.
bool times_out(Step& step, Mbarrier& barrier) {
  if (step.launch.stuck) return true;
  const size_t agent = step.warp.agent;
  if (barrier.asked.size() <= agent) barrier.asked.resize(agent + 1);
  if (barrier.asked[agent] == barrier.phase + 1) return false;
  barrier.asked[agent] = barrier.phase + 1;
  if (barrier.first_asked != barrier.phase + 1) {
    barrier.first_asked = barrier.phase + 1;
    barrier.times_out = step.launch.dice(TIMES_OUT_ONE_IN) == 0;
  }
  return barrier.times_out;
}

// mbarrier.test_wait, mbarrier.try_wait
Outcome wait(Step& step) {
  const int64_t* data = step.instr.data;
  const Source base = step.address_base(step.op(1));
  const Source states = step.defined(step.op(2), "the phase of an mbarrier");
  Mask complete = 0;
  Mbarrier* waited[LANES];
  FOR_LANES(lane, step.active) {
    waited[lane] = &object(step, place_of(step, step.op(1), base, lane), lane);
    const uint64_t state = data[PARITY] ? states.get<uint32_t>(lane) : states.get<uint64_t>(lane);
    complete |= Mask(is_complete(*waited[lane], data[PARITY], state, lane)) << lane;
  }
  const Mask incomplete = step.active & ~complete;
  if (data[TRIES] && incomplete && !times_out(step, *waited[__builtin_ctz(incomplete)])) return Outcome::Wait;
  if (data[ORDERED] && complete) step.warp.pass(complete);
  // A relaxed wait leaves it to a fence behind it to acquire.
  Clock& clock = data[ORDERED] ? step.warp.clock : step.warp.to_acquire;
  const Mbarrier* joined = nullptr;
  FOR_LANES(lane, complete) {
    const Clock& completed = waited[lane]->completed;
    if (waited[lane] != joined) clock.join(data[ORDERED] == NARROW ? of_own_cta(step.cta, completed) : completed);
    joined = waited[lane];
  }
  step.set_predicate(step.op(0), complete, 0);
  return Outcome::Done;
}

// mbarrier.pending_count
Outcome pending_count(Step& step) {
  const Source states = step.defined(step.op(1), "the state of an mbarrier");
  FOR_LANES(lane, step.active) {
    const uint64_t token = states.get<uint64_t>(lane);
    check_token(token, lane);
    if (!(token >> NO_COMPLETE_SHIFT & 1)) throw Fault("counts what no .noComplete arrival returned", lane);
    step.set(step.op(0), lane, uint32_t(token & MOST));
  }
  step.set_undefined(step.op(0), 0);
  return Outcome::Done;
}

// cp.async.mbarrier.arrive: an arrival when all cp.async of the thread so far are complete.
struct ArrivesAfter : Delivery {
  ArrivesAfter(Step& step, SharedPlace place, std::vector<std::shared_ptr<Delivery>> copies)
      : launch(step.launch), warp(step.warp), place(place), copies(std::move(copies)) {
    line = step.instr.line;
    cta = place.cta;
    ++cta->in_flight;
  }
  const char* what() const override { return "an arrival after copies"; }

  void happen() override {
    for (const auto& copy : copies) copy->deliver();
    --cta->in_flight;
    mbarrier_arrive(launch, *place.cta, place.offset, 1, warp.clock);
    Launch::tick(warp);
  }

  Launch& launch;
  Warp& warp;
  SharedPlace place;
  std::vector<std::shared_ptr<Delivery>> copies;
};

Outcome arrive_after(Step& step) {
  const Source base = step.address_base(step.op(0));
  FOR_LANES(lane, step.active) {
    const SharedPlace place =
        shared_place(step, step.address(step.op(0), base, lane), lane, step.instr.data[SPACE] == GENERIC, true);
    mbarrier_used(step, place, lane);
    if (!step.instr.data[NO_INCREMENT]) mbarrier_increment(*place.cta, place.offset, lane);
    step.launch.later(std::make_shared<ArrivesAfter>(step, place, pending_copies(step.warp, lane)));
  }
  return Outcome::Done;
}

// ---- Decoding

// .shared is .shared::cta. `anywhere`: .shared::cluster too, and generic addresses of other CTAs.
void decode_space(Words& words, Instr& instr, bool anywhere) {
  const int space = words.take_one({"shared::cta", "shared", "shared::cluster"});
  if (space == 2 && !anywhere) words.unknown("is for the CTA's own shared memory");
  instr.data[SPACE] = space < 0 ? GENERIC : space == 2 ? CLUSTER : CTA;
}

// .cta is only that where it is said: without a scope, arrivals are made at other CTAs' mbarriers too.
Ordered decode_order(Words& words, const char* by_default) {
  const int sem = words.take_one({by_default, "relaxed"});
  const int scope = words.take_one({"cta", "cluster"});
  if ((sem < 0) != (scope < 0)) words.unknown("needs both an order and a scope, or neither");
  return sem == 1 ? RELAXED : scope == 0 ? NARROW : WIDE;
}

void decode_arrive(Words& words, Instr& instr, bool drop) {
  instr.data[DROP] = drop;
  instr.data[EXPECT] = words.take("expect_tx");
  instr.data[NO_COMPLETE] = words.take("noComplete");
  instr.data[ORDERED] = decode_order(words, "release");
  decode_space(words, instr, true);
  const bool counted = instr.data[EXPECT] || instr.data[NO_COMPLETE];
  need_operands(words, instr, counted ? 3 : 2, 3);
  if (instr.data[EXPECT] && instr.data[NO_COMPLETE])
    words.unknown(".expect_tx and .noComplete exclude each other");
  if (instr.data[SPACE] == CLUSTER && instr.ops[0].is != Is::Sink)
    words.unknown("an mbarrier of the cluster returns no state");
  instr.run = arrive;
}

void decode_wait(Words& words, Instr& instr, bool tries) {
  instr.data[TRIES] = tries;
  instr.data[PARITY] = words.take("parity");
  instr.data[ORDERED] = decode_order(words, "acquire");
  decode_space(words, instr, false);
  // A time limit comes last; times aren't modelled.
  need_operands(words, instr, 3, tries ? 4 : 3);
  instr.run = wait;
}

void decode_mbarrier(Words& words, Instr& instr) {
  const std::string what = words.next();
  if (what == "init" || what == "inval") {
    decode_space(words, instr, false);
    need_operands(words, instr, what == "init" ? 2 : 1, what == "init" ? 2 : 1);
    instr.run = what == "init" ? init : inval;
  } else if (what == "expect_tx" || what == "complete_tx") {
    // Neither orders anything: .relaxed is all there is.
    if (words.take("relaxed")) words.need_one({"cta", "cluster"});
    decode_space(words, instr, true);
    need_operands(words, instr, 2, 2);
    instr.run = what == "expect_tx" ? count_tx<1> : count_tx<-1>;
  } else if (what == "arrive" || what == "arrive_drop") {
    decode_arrive(words, instr, what == "arrive_drop");
  } else if (what == "test_wait" || what == "try_wait") {
    decode_wait(words, instr, what == "try_wait");
  } else if (what == "pending_count") {
    need_operands(words, instr, 2, 2);
    instr.run = pending_count;
  } else {
    words.unknown("the machine has no such instruction");
  }
  words.need_one({"b64"});
}

const Family mbarrier("mbarrier", decode_mbarrier);

}  // namespace

// ---- What other families ask

void decode_copy_arrive(Words& words, Instr& instr) {
  words.need_one({"arrive"});
  instr.data[NO_INCREMENT] = words.take("noinc");
  decode_space(words, instr, false);
  words.need_one({"b64"});
  need_operands(words, instr, 1, 1);
  instr.run = arrive_after;
}

SharedPlace shared_place(const Step& step, uint64_t address, int lane, bool generic, bool own) {
  if (generic) {
    if ((address & WINDOW) != SHARED_WINDOW)
      throw Fault(format("has %#llx for an address in shared memory", (unsigned long long)address), lane);
    address &= ~WINDOW;
  }
  address &= 0xffffffff;
  return {&step.shared_cta(address, lane, own), Step::shared_offset(address)};
}

void mbarrier_used(Step& step, SharedPlace place, int lane) { object(step, place, lane); }

void mbarrier_increment(Cta& cta, uint32_t offset, int lane) {
  Mbarrier& barrier = valid(cta, offset, lane);
  if (++barrier.pending > MOST)
    throw Fault(format("makes the mbarrier at %d of shared memory wait for too many arrivals", at(offset)), lane);
}

void mbarrier_arrive(Launch& launch, Cta& cta, uint32_t offset, uint32_t count, const Clock& clock) {
  Mbarrier& barrier = valid(cta, offset);
  arrive_on(barrier, offset, count, -1);
  barrier.arrived.join(clock);
  complete_phase(launch, barrier);
}

void mbarrier_expect(Launch& launch, Cta& cta, uint32_t offset, int64_t bytes) {
  Mbarrier& barrier = valid(cta, offset);
  count_bytes(barrier, offset, bytes, -1);
  complete_phase(launch, barrier);
}

void mbarrier_complete(Launch& launch, Cta& cta, uint32_t offset, int64_t bytes, const Clock& clock) {
  Mbarrier& barrier = valid(cta, offset);
  count_bytes(barrier, offset, -bytes, -1);
  barrier.arrived.join(clock);
  complete_phase(launch, barrier);
}

Copied mbarrier_copied(Cta& cta, uint32_t offset) {
  Mbarrier& barrier = valid(cta, offset);
  if (barrier.agent < 0) barrier.agent = cta.cluster->agents++;
  Copied copied{barrier.agent, ++barrier.copies, {}};
  copied.clock.seen.resize(barrier.agent + 1);
  copied.clock.seen[barrier.agent] = copied.time;
  return copied;
}

}  // namespace ptx
