// tcgen05: tensor memory allocated, loaded, stored; fences, waits and commits.
//
// PTX ISA, "TensorCore 5th Generation Family Instructions". cta_group::1 alone.
#include "families.h"
#include "tensor_memory.h"

namespace ptx {

namespace {

// A value that all active lanes must have alike.
uint32_t uniform(Step& step, const Operand& operand, const char* as_what) {
  const Source source = step.defined(operand, as_what);
  const int first = __builtin_ctz(step.active);
  const uint32_t value = source.get<uint32_t>(first);
  FOR_LANES(lane, step.active) {
    if (source.get<uint32_t>(lane) != value)
      throw Fault(format("has another value for %s than lane %d", as_what, first), lane);
  }
  return value;
}

// .sync.aligned: by 32 lanes.
void whole_warp(const Step& step) {
  if (step.active != ALL) throw Fault("needs all 32 lanes of its warp");
}

void need_aligned(Words& words, Instr& instr) {
  words.need_one({"sync"});
  words.need_one({"aligned"});
  instr.aligned = true;
}

void need_one_cta(Words& words) {
  if (words.take("cta_group::2")) words.unknown("pairs of CTAs are not modelled: no .cta_group::2");
  words.need_one({"cta_group::1"});
}

void need_address(const Words& words, const Operand& operand) {
  if (operand.is != Is::Address) words.unknown("needs an address in brackets");
}

// ---- PTX ISA, tcgen05.alloc, tcgen05.dealloc, tcgen05.relinquish_alloc_permit

enum AllocData { GENERIC };

Outcome alloc(Step& step) {
  whole_warp(step);
  const Operand& operand = step.op(0);
  const Source base = step.address_base(operand);
  const uint64_t to = step.address(operand, base, 0);
  FOR_LANES(lane, step.active) {
    if (step.address(operand, base, lane) != to) throw Fault("has another address than lane 0", lane);
  }
  const SharedPlace place = shared_place(step, to, 0, step.instr.data[GENERIC], true);
  const int column =
      tensor_memory_of(step.cta).allocate(step.launch, uniform(step, step.op(1), "a number of columns"));
  if (column < 0) return Outcome::Wait;
  // Its store keeps "same-address ordering with respect to non-tcgen05 instructions", those of the async
  // proxy as well: it is as if a fence followed.
  SharedMemory& shared = step.cta.shared;
  Warp& warp = step.warp;
  const uint32_t address = column;
  if (place.offset % 4) throw Fault("has an address that is not a multiple of 4", 0);
  shared.begin_write(warp, step.instr.line, place.offset, 4, true);
  std::memcpy(shared.bytes(place.offset), &address, 4);
  shared.end_write(warp.agent, warp.clock.seen[warp.agent], step.instr.line, place.offset, 4, false);
  ++warp.epoch;
  step.launch.changed();
  return Outcome::Done;
}

void decode_alloc(Words& words, Instr& instr) {
  need_one_cta(words);
  need_aligned(words, instr);
  instr.data[GENERIC] = !words.take("shared::cta");
  words.need_one({"b32"});
  need_operands(words, instr, 2, 2);
  need_address(words, instr.ops[0]);
  instr.run = alloc;
}

Outcome dealloc(Step& step) {
  whole_warp(step);
  const uint32_t address = uniform(step, step.op(0), "an address");
  tensor_memory_of(step.cta).free(step.warp, address, uniform(step, step.op(1), "a number of columns"));
  step.launch.changed();
  return Outcome::Done;
}

void decode_dealloc(Words& words, Instr& instr) {
  need_one_cta(words);
  need_aligned(words, instr);
  words.need_one({"b32"});
  need_operands(words, instr, 2, 2);
  instr.run = dealloc;
}

Outcome relinquish(Step& step) {
  whole_warp(step);
  tensor_memory_of(step.cta).relinquish();
  return Outcome::Done;
}

void decode_relinquish(Words& words, Instr& instr) {
  need_one_cta(words);
  need_aligned(words, instr);
  need_operands(words, instr, 0, 0);
  instr.run = relinquish;
}

// ---- PTX ISA, tcgen05.ld, tcgen05.st

enum TransferData { SHAPE, NUM, PACKED, SPLIT };
enum Shape { S16x64, S16x128, S16x256, S32x32, S16x32x2 };
constexpr int REGISTERS[] = {1, 2, 4, 1, 1};  // of .x1
constexpr int COLUMNS[] = {2, 4, 8, 1, 1};

// The cell that register r of a lane is, in its rectangle. PTX ISA, "Data Movement Shape", the figures.
struct Place {
  int lane, column;
};

Place place_of(int shape, int lane, int r) {
  switch (shape) {
    case S16x64: return {lane / 4 + 8 * (lane % 2), lane / 2 % 2 + 2 * r};
    case S16x128: return {lane / 4 + 8 * (r % 2), lane % 4 + 4 * (r / 2)};
    case S16x256: return {lane / 4 + 8 * (r / 2 % 2), 2 * (lane % 4) + r % 2 + 8 * (r / 4)};
    case S16x32x2: return {lane % 16, r};
    default: return {lane, r};
  }
}

// A load or a store of a warp: what it touches, and where its registers lie in that.
class Transfer {
 public:
  Transfer(Step& step, const Operand& address, const Operand& registers)
      : memory(tensor_memory_of(step.cta)), data_(step.instr.data) {
    whole_warp(step);
    parts = registers.is == Is::Vector ? registers.parts.data() : &registers;
    count = REGISTERS[data_[SHAPE]] * data_[NUM];
    const uint32_t at = uniform(step, address.parts[0], "an address") + uint32_t(address.value);
    lane_ = at >> 16;
    column_ = at & 0xffff;
    const uint32_t lanes = data_[SHAPE] == S32x32 ? 32 : 16;
    if (lane_ / LANES_OF_A_WARP != uint32_t(step.warp.index % 4))
      throw Fault(format(
          "accesses lane %u of tensor memory: warp %d may access lanes %u to %u", lane_, step.warp.index,
          step.warp.index % 4 * LANES_OF_A_WARP, step.warp.index % 4 * LANES_OF_A_WARP + LANES_OF_A_WARP - 1));
    if (lane_ % lanes)
      throw Fault(format("accesses lane %u of tensor memory, not a multiple of %u", lane_, lanes));
    const uint32_t columns = COLUMNS[data_[SHAPE]] * data_[NUM] * (data_[PACKED] ? 2 : 1);
    areas.push_back({lane_, lanes, column_, columns});
    if (data_[SHAPE] == S16x32x2) areas.push_back({lane_, lanes, column_ + uint32_t(data_[SPLIT]), columns});
    step.count.bytes += 4 * LANES * count;
  }

  uint32_t begin(Step& step, TensorAccess::Kind kind) {
    TensorAccess access;
    access.kind = kind;
    access.line = step.instr.line;
    access.agent = tensor_warp_of(step.warp).agent;
    return memory.begin(access);
  }

  // Column of register r; with .pack and .unpack of its lower half, the upper one's is the next.
  Place at(int lane, int r) const {
    Place place = place_of(data_[SHAPE], lane, r);
    place.lane += lane_;
    place.column *= data_[PACKED] ? 2 : 1;
    place.column += column_ + (data_[SHAPE] == S16x32x2 && lane >= 16 ? data_[SPLIT] : 0);
    return place;
  }

  TensorMemory& memory;
  const Operand* parts;
  int count;
  std::vector<TensorArea> areas;

 private:
  const int64_t* data_;
  uint32_t lane_, column_;
};

// Its registers may be read before tcgen05.wait::ld: PTX ISA, "Register dependencies, same thread". What
// the wait is for is that nobody overwrites what may still be read.
Outcome load(Step& step) {
  Transfer transfer(step, step.op(1), step.op(0));
  const uint32_t id = transfer.begin(step, TensorAccess::Load);
  for (const TensorArea& area : transfer.areas) transfer.memory.reads(step.warp, id, area);
  tensor_warp_of(step.warp).loads.push_back(id);
  for (int r = 0; r < transfer.count; ++r) {
    Mask undefined = 0;
    FOR_LANES(lane, ALL) {
      const Place at = transfer.at(lane, r);
      uint32_t value = transfer.memory.cell(at.lane, at.column);
      bool unknown = transfer.memory.undefined(at.lane, at.column);
      if (step.instr.data[PACKED]) {
        value = (value & 0xffff) | transfer.memory.cell(at.lane, at.column + 1) << 16;
        unknown |= transfer.memory.undefined(at.lane, at.column + 1) != 0;
      }
      undefined |= Mask(unknown) << lane;
      step.set(transfer.parts[r], lane, value);
    }
    step.set_undefined(transfer.parts[r], undefined);
  }
  return Outcome::Done;
}

Outcome store(Step& step) {
  Transfer transfer(step, step.op(0), step.instr.ops.back());
  const uint32_t id = transfer.begin(step, TensorAccess::Store);
  for (const TensorArea& area : transfer.areas) transfer.memory.writes(step.warp, id, area);
  tensor_warp_of(step.warp).stores.push_back(id);
  for (int r = 0; r < transfer.count; ++r) {
    const Source source = step.source(transfer.parts[r]);
    FOR_LANES(lane, ALL) {
      const Place at = transfer.at(lane, r);
      const uint32_t value = source.get<uint32_t>(lane);
      const bool unknown = source.undefined >> lane & 1;
      const bool packed = step.instr.data[PACKED];
      transfer.memory.cell(at.lane, at.column) = packed ? value & 0xffff : value;
      transfer.memory.undefined(at.lane, at.column) = unknown;
      if (packed) {
        transfer.memory.cell(at.lane, at.column + 1) = value >> 16;
        transfer.memory.undefined(at.lane, at.column + 1) = unknown;
      }
    }
  }
  return Outcome::Done;
}

void decode_transfer(Words& words, Instr& instr, bool loads) {
  if (words.take("red")) words.unknown("tcgen05.ld.red is not of sm_100");
  need_aligned(words, instr);
  const int shape = words.need_one({"16x64b", "16x128b", "16x256b", "32x32b", "16x32bx2"});
  const int log2 = words.need_one({"x1", "x2", "x4", "x8", "x16", "x32", "x64", "x128"});
  instr.data[SHAPE] = shape;
  instr.data[NUM] = 1 << log2;
  instr.data[PACKED] = words.take(loads ? "pack::16b" : "unpack::16b");
  words.need_one({"b32"});
  const int registers = REGISTERS[shape] << log2;
  if (registers > 128) words.unknown("has no such number of its shape");
  const size_t operands = shape == S16x32x2 ? 3 : 2;
  need_operands(words, instr, operands, operands);
  need_address(words, instr.ops[loads ? 1 : 0]);
  const Operand& values = loads ? instr.ops[0] : instr.ops.back();
  const size_t given = values.is == Is::Vector ? values.parts.size() : 1;
  if (given != size_t(registers)) words.unknown(format("takes %d registers, not %zu", registers, given));
  if (shape == S16x32x2) {
    const Operand& split = instr.ops[loads ? 2 : 1];
    if (split.is != Is::Immediate) words.unknown("takes an immediate for the offset of its second half");
    instr.data[SPLIT] = split.value;
  }
  instr.run = loads ? load : store;
}

// ---- PTX ISA, tcgen05.wait

template <bool loads>
Outcome wait(Step& step) {
  whole_warp(step);
  TensorMemory& memory = tensor_memory_of(step.cta);
  TensorWarp& warp = tensor_warp_of(step.warp);
  warp.tick(step.warp);
  auto& waited = loads ? warp.loads : warp.stores;
  for (uint32_t id : waited) memory.access(id).time = warp.time;
  waited.clear();
  return Outcome::Done;
}

void decode_wait(Words& words, Instr& instr, bool loads) {
  need_aligned(words, instr);
  need_operands(words, instr, 0, 0);
  instr.run = loads ? wait<true> : wait<false>;
}

// ---- PTX ISA, tcgen05.fence. Barriers and mbarriers that release and acquire order tensor memory, too: the
// fences are for relaxed ones, and for what the tensor core has still to do.

// What of a clock is about tensor memory.
Clock about_tensor_memory(const Cta& cta, const Clock& clock) {
  Clock about;
  for (int agent : static_cast<const TensorMemory*>(cta.tensor_memory.get())->agents)
    if (size_t(agent) < clock.seen.size()) set_seen(about, agent, clock.seen[agent]);
  return about;
}

Outcome fence_before(Step& step) {
  tensor_warp_of(step.warp).tick(step.warp);
  step.warp.fence_released.join(about_tensor_memory(step.cta, step.warp.clock));
  return Outcome::Done;
}

Outcome fence_after(Step& step) {
  tensor_warp_of(step.warp);
  step.warp.clock.join(about_tensor_memory(step.cta, step.warp.to_acquire));
  return Outcome::Done;
}

void decode_fence(Words& words, Instr& instr, bool before) {
  need_operands(words, instr, 0, 0);
  instr.run = before ? fence_before : fence_after;
}

// ---- PTX ISA, tcgen05.commit

enum CommitData { ANYWHERE, MULTICAST };

// Its arrival comes behind what the thread has asked for before, other commits too.
struct Commit : TensorOperation {
  std::vector<SharedPlace> mbarriers;
  Clock clock;

  void execute() override {
    for (const SharedPlace& mbarrier : mbarriers) {
      --mbarrier.cta->in_flight;
      mbarrier_arrive(*cta->launch, *mbarrier.cta, mbarrier.offset, 1, clock);
    }
  }
  const char* what() const override { return "tcgen05.commit"; }
};

Outcome commit(Step& step) {
  const Source base = step.address_base(step.op(0));
  const bool multicast = step.instr.data[MULTICAST];
  const Source masks = multicast ? step.defined(step.op(1), "a mask of CTAs") : Source{};
  TensorWarp& warp = tensor_warp_of(step.warp);
  FOR_LANES(lane, step.active) {
    const SharedPlace first =
        shared_place(step, step.address(step.op(0), base, lane), lane, step.instr.data[ANYWHERE], false);
    auto commit = std::make_shared<Commit>();
    if (multicast) {
      const uint32_t mask = masks.get<uint16_t>(lane);
      auto& ctas = step.cta.cluster->ctas;
      if (mask >> ctas.size()) throw Fault(format("names CTAs %#x in a cluster of %zu", mask, ctas.size()), lane);
      for (size_t rank = 0; rank < ctas.size(); ++rank)
        if (mask >> rank & 1) commit->mbarriers.push_back({ctas[rank].get(), first.offset});
    } else {
      commit->mbarriers.push_back(first);
    }
    for (const SharedPlace& mbarrier : commit->mbarriers) {
      mbarrier_used(step, mbarrier, lane);
      ++mbarrier.cta->in_flight;
    }
    TensorWarp::Thread& thread = warp.threads[lane];
    // Who waits sees what the tensor core has done, what its thread had seen when it asked for that, and
    // that the mbarrier has been used.
    commit->clock = thread.issued;
    if (thread.agent >= 0) set_seen(commit->clock, thread.agent, thread.time);
    set_seen(commit->clock, step.warp.agent, step.warp.clock.seen[step.warp.agent]);
    ask_tensor_core(step, std::move(commit));
  }
  Launch::tick(step.warp);
  // It is a tcgen05.fence::before_thread_sync as well.
  return fence_before(step);
}

void decode_commit(Words& words, Instr& instr) {
  need_one_cta(words);
  words.need_one({"mbarrier::arrive::one"});
  instr.data[ANYWHERE] = !words.take("shared::cluster");
  instr.data[MULTICAST] = words.take("multicast::cluster");
  words.need_one({"b64"});
  const size_t operands = instr.data[MULTICAST] ? 2 : 1;
  need_operands(words, instr, operands, operands);
  need_address(words, instr.ops[0]);
  instr.run = commit;
}

// ----

void decode_tcgen05(Words& words, Instr& instr) {
  const std::string what = words.next();
  if (what == "alloc") decode_alloc(words, instr);
  else if (what == "dealloc") decode_dealloc(words, instr);
  else if (what == "relinquish_alloc_permit") decode_relinquish(words, instr);
  else if (what == "ld" || what == "st") decode_transfer(words, instr, what == "ld");
  else if (what == "wait::ld" || what == "wait::st") decode_wait(words, instr, what == "wait::ld");
  else if (what == "fence::before_thread_sync" || what == "fence::after_thread_sync")
    decode_fence(words, instr, what == "fence::before_thread_sync");
  else if (what == "commit") decode_commit(words, instr);
  else if (what == "mma") decode_tensor_mma(words, instr);
  else if (what == "cp") decode_tensor_copy(words, instr);
  else words.unknown("the machine has no tcgen05." + what);
}

const Family tcgen05("tcgen05", decode_tcgen05);

}  // namespace

}  // namespace ptx
