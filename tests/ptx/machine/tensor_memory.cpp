#include "tensor_memory.h"

#include <algorithm>

#include "families.h"

namespace ptx {

namespace {

bool asynchronous(const TensorAccess& access) {
  return access.kind == TensorAccess::Mma || access.kind == TensorAccess::Copy;
}

const char* name_of(const TensorAccess& access) {
  switch (access.kind) {
    case TensorAccess::Load: return "tcgen05.ld";
    case TensorAccess::Store: return "tcgen05.st";
    case TensorAccess::Mma: return "tcgen05.mma";
    case TensorAccess::Copy: return "tcgen05.cp";
  }
  return "";
}

// PTX ISA, "Pipelined tcgen05 Instructions": pairs that are executed in the order in which they are issued.
// Other threads' come before if a tcgen05.fence::before_thread_sync and a barrier say so.
bool pipelined(const Warp& warp, const TensorAccess& earlier, const TensorAccess& later) {
  if (later.kind != TensorAccess::Mma) return false;
  if (earlier.kind == TensorAccess::Mma && earlier.pipeline != later.pipeline) return false;
  return earlier.agent == later.agent || warp.clock.has_seen(earlier.issuer, earlier.issued);
}

}  // namespace

void set_seen(Clock& clock, int agent, uint32_t time) {
  if (clock.seen.size() <= size_t(agent)) clock.seen.resize(agent + 1);
  clock.seen[agent] = std::max(clock.seen[agent], time);
}

void TensorOperation::happen() {
  auto& queue = tensor_memory_of(*cta).queue;
  while (true) {
    const std::shared_ptr<TensorOperation> next = queue.front();
    queue.pop_front();
    next->done = true;
    next->execute();
    --cta->in_flight;
    if (next.get() == this) return;
  }
}

void ask_tensor_core(Step& step, std::shared_ptr<TensorOperation> operation) {
  operation->line = step.instr.line;
  operation->cta = &step.cta;
  ++step.cta.in_flight;
  tensor_memory_of(step.cta).queue.push_back(operation);
  step.launch.later(std::move(operation));
}

// ---- Allocation

TensorMemory::TensorMemory()
    : cells_(TENSOR_LANES * TENSOR_COLUMNS),
      undefined_(TENSOR_LANES * TENSOR_COLUMNS, 1),
      units_(UNITS * TENSOR_COLUMNS),
      accesses_(1) {}

int TensorMemory::allocate(Launch& launch, uint32_t columns) {
  if (columns < TENSOR_SLICE || columns > TENSOR_COLUMNS || (columns & (columns - 1)))
    throw Fault(format("allocates %u columns, not a power of two from 32 to 512", columns));
  if (columns > most_) throw Fault(format("allocates %u columns after %u: it may not be more", columns, most_));
  if (relinquished_) throw Fault("allocates after tcgen05.relinquish_alloc_permit");
  const uint32_t slices = columns / TENSOR_SLICE;
  std::vector<uint32_t> places;
  for (uint32_t begin = 0; begin < TENSOR_COLUMNS / TENSOR_SLICE; begin += slices)
    if (std::none_of(taken_ + begin, taken_ + begin + slices, [](bool taken) { return taken; }))
      places.push_back(begin);
  if (places.empty()) return -1;
  // Anywhere, so that a program which takes it to begin at 0 is found out.
  const uint32_t begin = places[launch.dice(places.size())];
  std::fill_n(taken_ + begin, slices, true);
  sizes_[begin] = columns;
  most_ = columns;
  return begin * TENSOR_SLICE;
}

void TensorMemory::free(Warp& warp, uint32_t column, uint32_t columns) {
  const bool begins = column < TENSOR_COLUMNS && column % TENSOR_SLICE == 0;
  const uint32_t size = begins ? sizes_[column / TENSOR_SLICE] : 0;
  if (size == 0) throw Fault(format("deallocates column %u, where no allocation begins", column));
  if (size != columns) throw Fault(format("deallocates %u columns of an allocation of %u", columns, size));
  TensorAccess access;
  access.kind = TensorAccess::Store;
  access.agent = tensor_warp_of(warp).agent;
  for (uint32_t unit = column * UNITS; unit < (column + columns) * UNITS; ++unit) {
    check(warp, access, units_[unit].write, true, "deallocates", unit);
    for (int reader = 0; reader < READERS; ++reader)
      if (units_[unit].readers >> reader & 1)
        check(warp, access, units_[unit].reads[reader], false, "deallocates", unit);
    units_[unit] = {};
  }
  for (uint32_t lane = 0; lane < TENSOR_LANES; ++lane) std::fill_n(&undefined(lane, column), columns, 1);
  std::fill_n(taken_ + column / TENSOR_SLICE, columns / TENSOR_SLICE, false);
  sizes_[column / TENSOR_SLICE] = 0;
}

uint32_t TensorMemory::allocated() const {
  return TENSOR_SLICE * std::count(std::begin(taken_), std::end(taken_), true);
}

void TensorMemory::check_allocated(const TensorArea& area, const char* verb) const {
  if (area.lane + area.lanes > TENSOR_LANES)
    throw Fault(format("%s lanes %u to %u of tensor memory", verb, area.lane, area.lane + area.lanes - 1));
  for (uint32_t column = area.column; column < area.column + area.columns; ++column)
    if (column >= TENSOR_COLUMNS || !taken_[column / TENSOR_SLICE])
      throw Fault(format("%s column %u of tensor memory, which is not allocated", verb, column));
}

// ---- Order

uint32_t TensorMemory::begin(const TensorAccess& access) {
  accesses_.push_back(access);
  return accesses_.size() - 1;
}

void TensorMemory::check(
    const Warp& warp, const TensorAccess& later, uint32_t earlier, bool earlier_writes, const char* verb,
    uint32_t unit) const {
  if (earlier == 0) return;
  const TensorAccess& last = accesses_[earlier];
  const bool done = asynchronous(last) || last.time != 0;
  if (done && warp.clock.has_seen(last.agent, last.time)) return;
  if (asynchronous(last) && pipelined(warp, last, later)) return;
  std::string why;
  if (asynchronous(last)) why = "with no wait for its tcgen05.commit between";
  else if (last.agent != later.agent) why = "by another warp, with no wait and no barrier between";
  else why = format("with no tcgen05.wait::%s between", last.kind == TensorAccess::Load ? "ld" : "st");
  throw Fault(format(
      "%s column %u, lanes %u to %u of tensor memory, which %s in line %d may still be %s, %s", verb, unit / UNITS,
      unit % UNITS * UNIT_LANES, unit % UNITS * UNIT_LANES + UNIT_LANES - 1, name_of(last), last.line,
      earlier_writes ? "writing" : "reading", why.c_str()));
}

void TensorMemory::reads(Warp& warp, uint32_t id, const TensorArea& area) {
  check_allocated(area, "reads");
  const TensorAccess& mine = accesses_[id];
  const int reader = asynchronous(mine) ? READERS - 1 : warp.index / 4;
  uint32_t checked = 0;
  for (uint32_t column = area.column; column < area.column + area.columns; ++column)
    for (uint32_t i = area.lane / UNIT_LANES; i <= (area.lane + area.lanes - 1) / UNIT_LANES; ++i) {
      Unit& unit = units_[column * UNITS + i];
      if (unit.write != checked) check(warp, mine, unit.write, true, "reads", column * UNITS + i);
      checked = unit.write;
      unit.reads[reader] = id;
      unit.readers |= 1 << reader;
    }
}

void TensorMemory::writes(Warp& warp, uint32_t id, const TensorArea& area) {
  check_allocated(area, "writes");
  const TensorAccess& mine = accesses_[id];
  uint32_t checked = id;
  for (uint32_t column = area.column; column < area.column + area.columns; ++column)
    for (uint32_t i = area.lane / UNIT_LANES; i <= (area.lane + area.lanes - 1) / UNIT_LANES; ++i) {
      const uint32_t at = column * UNITS + i;
      Unit& unit = units_[at];
      if (unit.write != checked && unit.write != id) check(warp, mine, unit.write, true, "writes", at);
      checked = unit.write;
      for (int reader = 0; unit.readers >> reader; ++reader)
        if ((unit.readers >> reader & 1) && unit.reads[reader] != id)
          check(warp, mine, unit.reads[reader], false, "writes", at);
      unit.readers = 0;
      unit.write = id;
    }
}

// ---- Of CTAs and warps

TensorMemory& tensor_memory_of(Cta& cta) {
  if (!cta.tensor_memory) cta.tensor_memory = std::make_shared<TensorMemory>();
  return *static_cast<TensorMemory*>(cta.tensor_memory.get());
}

TensorWarp& tensor_warp_of(Warp& warp) {
  if (!warp.tensor) {
    auto tensor = std::make_shared<TensorWarp>();
    tensor->agent = warp.cta->cluster->agents++;
    tensor_memory_of(*warp.cta).agents.push_back(tensor->agent);
    warp.tensor = tensor;
  }
  return *static_cast<TensorWarp*>(warp.tensor.get());
}

void TensorWarp::tick(Warp& warp) { set_seen(warp.clock, agent, ++time); }

uint32_t tensor_columns_left(const Cta& cta) {
  return cta.tensor_memory ? static_cast<const TensorMemory*>(cta.tensor_memory.get())->allocated() : 0;
}

}  // namespace ptx
