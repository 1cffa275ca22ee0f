// Who runs when: clusters start as others end, warps take turns as a seed says, and the lanes of a warp
// that have parted go on by themselves, the group that is furthest behind first.
#include <algorithm>
#include <sstream>

#include "families.h"
#include "machine.h"

namespace ptx {

namespace {

constexpr int SLEEP_ONE_IN = 4;          // warps that sleep behind a release or an acquire, for others to overtake
constexpr int LONGEST_SLEEP = 500;       // steps of others meanwhile
constexpr int LONGEST_TURN = 64;         // steps of a warp before another one's turn
constexpr int DELIVER_ONE_IN = 4;        // turns between random deliveries
constexpr int OTHER_GROUP_ONE_IN = 16;   // steps of a warp's lowest group before a step of any
constexpr size_t MOST_TRACE = 15 << 20;  // bytes; launch.py has room for them
constexpr uint64_t IDLE_STEPS = 5000;    // without a change: those who spin wait for a delivery

}  // namespace

bool Cluster::running() const {
  for (const auto& cta : ctas)
    if (cta->running > 0) return true;
  return false;
}

Launch::Launch(Machine& machine, const Program& program, const Options& options, const std::string& parameters)
    : machine(machine),
      program(program),
      options(options),
      parameters(parameters.begin(), parameters.end()),
      random(options.seed),
      counts(program.code.size()),
      warps((options.block[0] * options.block[1] * options.block[2] + LANES - 1) / LANES),
      issued_by_warp(program.code.size() * warps) {
  cluster_count_ = 1;
  for (int i = 0; i < 3; ++i) cluster_count_ *= options.grid[i] / options.cluster[i];
  prepare_regions();
}

void Launch::later(std::shared_ptr<Delivery> delivery) {
  if (options.late == Late::Soon) {
    delivery->deliver();
    changed();
    return;
  }
  deliveries.push_back(std::move(delivery));
}

// Lets one of what is under way happen. False if nothing is.
bool Launch::deliver_something() {
  deliveries.erase(
      std::remove_if(deliveries.begin(), deliveries.end(), [](const auto& d) { return d->done; }),
      deliveries.end());
  if (deliveries.empty()) return false;
  const size_t index = dice(deliveries.size());
  const std::shared_ptr<Delivery> delivery = deliveries[index];
  deliver(*delivery);
  return true;
}

void Launch::deliver(Delivery& delivery) {
  try {
    delivery.deliver();
  } catch (const Fault& fault) {
    throw Fault(
        format("%s: line %d: %s: %s", program.kernel.c_str(), delivery.line, delivery.what(), fault.what()));
  }
  changed();
}

void Launch::start_cluster() {
  auto cluster = std::make_unique<Cluster>();
  cluster->linear = next_cluster_++;
  const uint32_t* size = options.cluster;
  uint32_t first[3];
  uint32_t left = cluster->linear;
  for (int i = 0; i < 3; ++i) {
    const uint32_t clusters = options.grid[i] / size[i];
    first[i] = left % clusters * size[i];
    left /= clusters;
  }
  const int threads = options.block[0] * options.block[1] * options.block[2];
  const int warps = (threads + LANES - 1) / LANES;
  const uint32_t ctas = size[0] * size[1] * size[2];
  cluster->warps = cluster->agents = warps * ctas;
  for (uint32_t rank = 0; rank < ctas; ++rank) {
    auto cta = std::make_unique<Cta>();
    cta->launch = this;
    cta->cluster = cluster.get();
    cta->rank = rank;
    cta->id[0] = first[0] + rank % size[0];
    cta->id[1] = first[1] + rank / size[0] % size[1];
    cta->id[2] = first[2] + rank / size[0] / size[1];
    cta->linear = cta->id[0] + options.grid[0] * (cta->id[1] + options.grid[1] * cta->id[2]);
    cta->running = warps;
    cta->shared.allocate(SHARED_START + program.shared + options.dynamic_shared, cluster->warps);
    for (int i = 0; i < warps; ++i) {
      auto warp = std::make_unique<Warp>();
      warp->cta = cta.get();
      warp->index = i;
      warp->agent = rank * warps + i;
      const int lanes = std::min(threads - i * LANES, LANES);
      warp->alive = lanes == LANES ? ALL : (1u << lanes) - 1;
      warp->file.resize(program.file_bytes / 8 + 1);
      warp->undefined.assign(program.widths.size(), ALL);
      warp->clock.seen.assign(cluster->warps, 0);
      warp->clock.seen[warp->agent] = 1;
      warp->stack.resize(LANES);
      warp->local.resize(size_t(program.local) * LANES);
      warp->local_undefined.assign(warp->local.size(), 1);
      warp->scratch.resize(size_t(program.scratch) * LANES);
      warp->scratch_undefined.assign(warp->scratch.size(), 1);
      cta->warps.push_back(std::move(warp));
    }
    cluster->ctas.push_back(std::move(cta));
  }
  running.push_back(std::move(cluster));
  changed();
}

// A CTA's shared memory ends with it: nothing may still read or write it.
void Launch::check_ended(const Cta& cta) const {
  const std::string who = format("%s: CTA %u has ended", program.kernel.c_str(), cta.linear);
  if (cta.in_flight > 0) {
    std::string what = "something asynchronous";
    for (const auto& delivery : deliveries)
      if (!delivery->done && delivery->cta == &cta)
        what = format("line %d, %s,", delivery->line, delivery->what());
    // Copies that have come, and nobody has waited for.
    for (const auto& warp : cta.warps)
      for (int lane = 0; lane < LANES; ++lane)
        for (const auto& copy : pending_copies(*warp, lane))
          what = format("line %d, %s,", copy->line, copy->what());
    throw Fault(who + " while " + what + " is under way");
  }
  if (const uint32_t columns = tensor_columns_left(cta))
    throw Fault(who + format(", and %u columns of tensor memory are not deallocated", columns));
}

// Lets go of clusters that have ended.
void Launch::retire() {
  for (auto& cluster : running) {
    if (cluster->running()) continue;
    // Nobody waits for the rest: it writes global memory.
    for (size_t i = 0; i < deliveries.size(); ++i) {
      const std::shared_ptr<Delivery> delivery = deliveries[i];
      if (!delivery->done && delivery->cta != nullptr && delivery->cta->cluster == cluster.get())
        deliver(*delivery);
    }
    cluster.reset();
  }
  running.erase(std::remove(running.begin(), running.end(), nullptr), running.end());
}

void Launch::run() {
  const uint32_t ctas_of_cluster = options.cluster[0] * options.cluster[1] * options.cluster[2];
  const size_t most = std::max<uint32_t>(1, options.resident / ctas_of_cluster);
  std::vector<Warp*> warps;
  uint64_t asked = 0;  // warps in a row that could only wait
  size_t first = 0;    // the first of them
  while (true) {
    bool started = false;
    while (running.size() < most && next_cluster_ < cluster_count_) {
      start_cluster();
      started = true;
    }
    if (running.empty()) return;
    if (started || warps.empty()) {
      warps.clear();
      for (auto& cluster : running)
        for (auto& cta : cluster->ctas)
          for (auto& warp : cta->warps)
            if (warp->alive) warps.push_back(warp.get());
      std::shuffle(warps.begin(), warps.end(), random);
    }
    if (asked == 0) first = dice(warps.size());
    // A wait is asked in order, so that everyone is asked before all are taken to be stuck.
    const size_t turn = (first + asked) % warps.size();
    Warp& warp = *warps[turn];
    bool progress = false;
    const bool sleeps = warp.sleeps_until > steps;
    for (int left = 1 + dice(LONGEST_TURN); !sleeps && left > 0 && warp.alive; --left) {
      ordered = false;
      if (!step(warp)) break;
      progress = true;
      if (ordered && dice(SLEEP_ONE_IN) == 0) {
        warp.sleeps_until = steps + dice(LONGEST_SLEEP);
        break;
      }
    }
    if (progress) stuck = false;
    asked = progress ? 0 : asked + 1;
    if (!warp.alive) {
      warps.erase(warps.begin() + turn);
      asked = 0;
      changed();
      if (warp.cta->running == 0) check_ended(*warp.cta);
      if (!warp.cta->cluster->running()) {
        warps.clear();
        retire();
        continue;
      }
    }
    if (options.late == Late::Random && dice(DELIVER_ONE_IN) == 0) deliver_something();
    if (asked > warps.size()) {  // the first was picked, the others were asked in order
      asked = 0;
      bool awake = true;
      for (Warp* other : warps) {
        awake &= other->sleeps_until <= steps;
        other->sleeps_until = 0;
      }
      if (!awake || deliver_something()) continue;
      if (stuck) throw Fault(program.kernel + ": everyone waits for ever\n" + standing());
      stuck = true;
    }
    if (steps - changed_at > IDLE_STEPS && (steps - changed_at) % IDLE_STEPS < LONGEST_TURN) deliver_something();
    if (steps - changed_at > options.most_silent)
      throw Fault(
          format(
              "%s: nothing has changed for %llu steps: those who spin wait for ever\n", program.kernel.c_str(),
              (unsigned long long)options.most_silent) +
          standing());
    if (steps > options.most_steps)
      throw Fault(
          format(
              "%s: has not ended after %llu steps\n", program.kernel.c_str(),
              (unsigned long long)options.most_steps) +
          standing());
  }
}

// ---- A warp

void Launch::advance(Warp& warp, Mask group, uint32_t pc) {
  if (!warp.diverged) {
    if (group == warp.alive) {
      warp.pc = pc;
      return;
    }
    warp.diverged = true;
    std::fill_n(warp.pcs, LANES, warp.pc);
  }
  FOR_LANES(lane, group) warp.pcs[lane] = pc;
}

// Lets a warp execute one instruction. False if all its lanes wait.
bool Launch::step(Warp& warp) {
  if (!warp.diverged) {
    if (execute(warp, warp.alive, warp.pc) == Outcome::Wait) return false;
  } else {
    // Groups by program counter, the lowest first; now and then another one, so that no group
    // starves behind one that spins.
    Mask left = warp.alive;
    bool done = false;
    const bool another = !options.lowest_first && dice(OTHER_GROUP_ONE_IN) == 0;
    int skip = another ? dice(__builtin_popcount(left)) : 0;
    while (left && !done) {
      uint32_t pc = ~0u;
      FOR_LANES(lane, left) pc = std::min(pc, warp.pcs[lane]);
      if (skip > 0) {
        FOR_LANES(lane, left) if (skip-- == 0) pc = warp.pcs[lane];
      }
      Mask group = 0;
      FOR_LANES(lane, warp.alive) if (warp.pcs[lane] == pc) group |= 1u << lane;
      left &= ~group;
      done = execute(warp, group, pc) != Outcome::Wait;
    }
    if (!done) return false;
    if (warp.diverged && warp.alive) {
      const uint32_t pc = warp.pcs[__builtin_ctz(warp.alive)];
      bool same = true;
      FOR_LANES(lane, warp.alive) same &= warp.pcs[lane] == pc;
      if (same) {
        warp.diverged = false;
        warp.pc = pc;
      }
    }
  }
  ++steps;
  return true;
}

void Launch::issue(const Warp& warp, uint32_t pc) {
  ++counts[pc].issued;
  ++issued_by_warp[pc * warps + warp.index];
}

Outcome Launch::execute(Warp& warp, Mask group, uint32_t pc) {
  const Instr* instr = pc < program.code.size() ? &program.code[pc] : nullptr;
  int lane = __builtin_ctz(group);
  try {
    if (instr == nullptr) throw Fault("runs past its last instruction");
    current = instr;
    Mask active = group;
    Count& count = counts[pc];
    Step step{*this, *warp.cta, warp, *instr, active, group, count};
    if (instr->guard >= 0) {
      Mask& undefined = warp.undefined[instr->guard];
      if (undefined & group) throw Fault("is guarded by an undefined predicate", __builtin_ctz(undefined & group));
      const Mask value = warp.predicate(program.places[instr->guard]);
      active = step.active = group & (instr->guard_negated ? ~value : value);
      if (active == 0) {
        advance(warp, group, pc + 1);
        issue(warp, pc);
        return Outcome::Done;
      }
    }
    if (instr->aligned && active != warp.alive) {
      if (active != group)
        throw Fault("is .aligned, and only some lanes of its warp execute it", __builtin_ctz(group & ~active));
      return Outcome::Wait;  // for the warp's other lanes to come
    }
    const Outcome outcome = instr->run(step);
    if (outcome == Outcome::Wait) return outcome;
    issue(warp, pc);
    count.lanes += __builtin_popcount(active);
    if (options.trace_thread >= 0) trace_step(warp, *instr, active);
    if (outcome == Outcome::Done) {
      advance(warp, group & warp.alive, pc + 1);
    } else if (group & ~active & warp.alive) {
      // Those whose guard was false go on.
      advance(warp, group & ~active & warp.alive, pc + 1);
    }
    if (instr->dirties_wgmma) wgmma_dirtied(step);
    return outcome;
  } catch (const Fault& fault) {
    if (fault.lane >= 0) lane = fault.lane;
    throw Fault(where(warp, pc, lane) + ": " + fault.what());
  }
}

void Launch::end_lanes(Warp& warp, Mask lanes) {
  warp.alive &= ~lanes;
  if (warp.alive == 0) --warp.cta->running;
  changed();
}

// ---- Reports

std::string Launch::where(const Warp& warp, uint32_t pc, int lane) const {
  const int thread = warp.thread(lane);
  const int line = pc < program.code.size() ? program.code[pc].line : 0;
  const char* opcode = pc < program.code.size() ? program.code[pc].opcode.c_str() : "";
  const uint32_t* block = options.block;
  const uint32_t* id = warp.cta->id;
  return format(
      "%s: line %d: CTA (%u, %u, %u), thread (%u, %u, %u): %s", program.kernel.c_str(), line, id[0], id[1], id[2],
      thread % block[0], thread / block[0] % block[1], thread / block[0] / block[1], opcode);
}

// Where everyone stands, those at one place together.
std::string Launch::standing() const {
  std::map<std::string, std::pair<int, std::string>> places;
  for (auto& cluster : running)
    for (auto& cta : cluster->ctas)
      for (auto& warp : cta->warps) {
        Mask left = warp->alive;
        while (left) {
          const int first = __builtin_ctz(left);
          const uint32_t pc = warp->pc_of(first);
          Mask group = 0;
          FOR_LANES(lane, left) if (warp->pc_of(lane) == pc) group |= 1u << lane;
          left &= ~group;
          const Instr& instr = program.code[pc];
          auto& [count, example] = places[format("line %d %s", instr.line, instr.opcode.c_str())];
          count += __builtin_popcount(group);
          if (example.empty()) example = format("CTA %u warp %d lane %d", cta->linear, warp->index, first);
        }
      }
  std::string text;
  for (auto& [place, at] : places)
    text +=
        format("  %d thread%s at %s (%s)\n", at.first, at.first == 1 ? "" : "s", place.c_str(), at.second.c_str());
  const uint32_t ctas = options.cluster[0] * options.cluster[1] * options.cluster[2];
  if (next_cluster_ < cluster_count_)
    text += format("  CTAs that have not started: %u\n", (cluster_count_ - next_cluster_) * ctas);
  return text;
}

void Launch::trace_step(Warp& warp, const Instr& instr, Mask active) {
  if (int(warp.cta->linear) != options.trace_cta || options.trace_thread / LANES != warp.index) return;
  const int lane = options.trace_thread % LANES;
  if (!(active >> lane & 1)) return;
  trace += format("%d %s", instr.line, instr.opcode.c_str());
  for (const Operand& op : instr.destinations()) {
    const char* at = warp.at(op);
    if (warp.undefined[op.reg] >> lane & 1) {
      trace += " undefined";
    } else if (op.width == 1) {
      trace += format(" %u", warp.predicate(op.at) >> lane & 1);
    } else if (op.width == 64) {
      uint64_t value;
      std::memcpy(&value, at + 8 * lane, 8);
      trace += format(" %#llx", (unsigned long long)value);
    } else if (op.width == 128) {
      uint64_t value[2];
      std::memcpy(value, at + 16 * lane, 16);
      trace += format(" 0x%llx%016llx", (unsigned long long)value[1], (unsigned long long)value[0]);
    } else if (op.width <= 32) {
      uint32_t value;
      std::memcpy(&value, at + 4 * lane, 4);
      trace += format(" %#x", value);
    }
  }
  trace += "\n";
  if (trace.size() > MOST_TRACE)
    trace = "0 earlier instructions are left out\n" + trace.substr(trace.find('\n', MOST_TRACE / 2) + 1);
}

// ---- A step's operands

Source Step::source(const Operand& operand) {
  switch (operand.is) {
    case Is::Register:
      if (operand.width == 1) throw Fault("takes a predicate as a number");
      return {warp.at(operand), operand.width <= 32 ? 4 : operand.width / 8, warp.undefined[operand.reg]};
    case Is::Immediate:
    case Is::Local:
    case Is::Parameter:
    case Is::Scratch: return {reinterpret_cast<const char*>(&operand.value), 0, 0};
    case Is::Shared: {
      uint64_t& value = temporary[temporaries++ % 8];
      value = (uint64_t(cta.rank) << RANK_SHIFT) + SHARED_START + operand.value;
      return {reinterpret_cast<const char*>(&value), 0, 0};
    }
    default: throw Fault("has an operand of a kind that it doesn't take");
  }
}

Source Step::defined(const Operand& operand, const char* as_what) {
  const Source source = this->source(operand);
  if (source.undefined & active)
    throw Fault(format("takes an undefined value for %s", as_what), __builtin_ctz(source.undefined & active));
  return source;
}

Mask Step::predicate(const Operand& operand) {
  switch (operand.is) {
    case Is::Register: return warp.predicate(operand.at);
    case Is::NotPredicate: return ~warp.predicate(operand.at);
    case Is::Immediate: return operand.value ? ALL : 0;
    default: throw Fault("has an operand that is no predicate");
  }
}

Mask Step::undefined(const Operand& operand) {
  return operand.is == Is::Register || operand.is == Is::NotPredicate ? warp.undefined[operand.reg] : 0;
}

Mask Step::defined_predicate(const Operand& operand, const char* as_what) {
  const Mask lanes = undefined(operand) & active;
  if (lanes) throw Fault(format("takes an undefined predicate for %s", as_what), __builtin_ctz(lanes));
  return predicate(operand);
}

void Step::set_predicate(const Operand& operand, Mask values, Mask undefined) {
  if (operand.is == Is::Sink) return;
  Mask& value = warp.predicate(operand.at);
  value = (value & ~active) | (values & active);
  set_undefined(operand, undefined);
}

Cta& Step::shared_cta(uint64_t address, int lane, bool own) const {
  const uint64_t rank = address >> RANK_SHIFT;
  if (rank >= cta.cluster->ctas.size() || (own && rank != cta.rank))
    throw Fault(format("has %#llx for an address in shared memory", (unsigned long long)address), lane);
  Cta& of = *cta.cluster->ctas[rank];
  if (of.running == 0) throw Fault(format("accesses shared memory of CTA %u, which has ended", of.linear), lane);
  return of;
}

}  // namespace ptx
