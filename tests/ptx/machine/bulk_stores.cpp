// Bulk copies and reductions out of shared memory, and the groups that their threads wait for.
//
// PTX ISA, Data Movement and Conversion Instructions: Asynchronous copy operations. Such a copy reads
// shared memory some time before its thread's wait_group.read returns, and has written global memory when
// wait_group returns.
#include <algorithm>
#include <deque>

#include "boxes.h"

namespace ptx::bulk {

namespace {

// The second half of a store: global memory is written.
struct Written : Delivery {
  Written(Launch& launch, Warp& warp, int of_line, const Box& box, Combine combine)
      : launch(launch), warp(warp), box(box), data(box.bytes), combine(combine) {
    line = of_line;
    cta = warp.cta;
  }
  const char* what() const override { return "a bulk copy out of shared memory"; }

  void happen() override {
    for (const Span& span : box.spans) {
      if (combine == nullptr) {
        launch.write_async(warp, line, span.global, span.bytes, &data[span.begin]);
        continue;
      }
      for (uint32_t i = 0; i < span.bytes; i += box.unit)
        combine(launch.atomic_async(warp, line, span.global + i, box.unit), &data[span.begin + i]);
    }
  }

  Launch& launch;
  Warp& warp;
  Box box;
  std::vector<uint8_t> data;
  Combine combine;
};

// The first half: shared memory is read, and must stay as it is until its thread has waited.
struct Store : Delivery {
  Store(Step& step, const Box& box, Combine combine)
      : launch(step.launch),
        warp(step.warp),
        written(std::make_shared<Written>(step.launch, step.warp, step.instr.line, box, combine)) {
    line = step.instr.line;
    cta = &step.cta;
    cta->shared.begin_read(warp, line, box.shared, box.bytes);
    ++cta->in_flight;
  }
  const char* what() const override { return "a bulk copy out of shared memory"; }

  void happen() override {
    const Box& box = written->box;
    for (const Span& span : box.spans)
      for_pieces(box, span.begin, span.bytes, [&](uint32_t offset, uint32_t begin, uint32_t bytes) {
        std::memcpy(&written->data[begin], cta->shared.bytes(offset), bytes);
      });
    launch.later(written);
  }

  // Its thread knows that it has been read, or written.
  void finish_read() {
    if (known) return;
    known = true;
    deliver();
    const Box& box = written->box;
    cta->shared.end_read(warp.agent, warp.clock.seen[warp.agent], line, box.shared, box.bytes);
    --cta->in_flight;
    launch.changed();
  }
  void finish() {
    finish_read();
    written->deliver();
  }

  Launch& launch;
  Warp& warp;
  std::shared_ptr<Written> written;
  bool known = false;
};

using Stores = std::vector<std::shared_ptr<Store>>;

// Bulk groups of a warp's lanes.
struct Groups {
  struct Lane {
    Stores open;  // not committed
    std::deque<Stores> committed;
    size_t read = 0;  // of those, that have been waited for with .read
  };
  Lane lanes[LANES];
};

Groups& groups_of(Warp& warp) {
  if (!warp.bulk) warp.bulk = std::make_shared<Groups>();
  return *static_cast<Groups*>(warp.bulk.get());
}

void store(Step& step, const Box& box, Combine combine, int lane) {
  check_global(step, box, lane, true);
  for (const Span& span : box.spans)
    for_pieces(box, span.begin, span.bytes, [&](uint32_t offset, uint32_t, uint32_t bytes) {
      if (!step.cta.shared.undefined(offset, bytes)) return;
      while (!step.cta.shared.undefined(offset, 1)) ++offset;
      throw Fault(format("stores shared memory at %d, which nobody has written", at(offset)), lane);
    });
  const auto store = std::make_shared<Store>(step, box, combine);
  step.cta.shared.check_met(step.warp, lane, box.shared, box.bytes, false);
  groups_of(step.warp).lanes[lane].open.push_back(store);
  step.launch.later(store);
}

// Only the bytes of each 16 that a mask names.
void keep_bytes(Box& box, uint16_t mask) {
  std::vector<Span> kept;
  for (const Span& span : box.spans)
    for (uint32_t i = 0; i < span.bytes; ++i) {
      if (!(mask >> i % CHUNK & 1)) continue;
      if (!kept.empty() && kept.back().begin + kept.back().bytes == span.begin + i) ++kept.back().bytes;
      else kept.push_back({span.global + i, span.begin + i, 1});
    }
  box.spans = std::move(kept);
}

}  // namespace

// cp.async.bulk and cp.reduce.async.bulk, shared to global memory: [to], [from], size{, policy}{, mask}
Outcome store_plain(Step& step) {
  const int64_t* data = step.instr.data;
  const Source to = step.address_base(step.op(0)), from = step.address_base(step.op(1));
  const Source size = step.defined(step.op(2), "a size");
  const bool masked = data[BYTE_MASK];
  const Source masks = masked ? step.defined(step.instr.ops.back(), "a mask of bytes") : Source{};
  const ByElements reduction = reduction_of(step.instr);
  FOR_LANES(lane, step.active) {
    const SharedPlace source = shared_place(step, step.address(step.op(1), from, lane), lane, false, true);
    check_alignment(source.offset, CHUNK, lane);
    Box box = plain_box(step.address(step.op(0), to, lane), source.offset, size.get<uint32_t>(lane), lane);
    if (masked) keep_bytes(box, masks.get<uint16_t>(lane));
    box.unit = reduction.unit;
    store(step, box, reduction.combine, lane);
  }
  return Outcome::Done;
}

// The tensor forms: [map, {coordinates}], [from]{, policy}
Outcome store_tensor(Step& step) {
  const int64_t* data = step.instr.data;
  const Source maps = step.address_base(step.op(0)), from = step.address_base(step.op(1));
  FOR_LANES(lane, step.active) {
    const SharedPlace source = shared_place(step, step.address(step.op(1), from, lane), lane, false, true);
    check_alignment(source.offset, TENSOR_ALIGNMENT, lane);
    const Box box = tensor_operand(step, step.op(0), maps, source.offset, lane);
    Combine combine = nullptr;
    if (data[REDUCTION] != NO_REDUCTION) {
      const Element element = tensor_map(step, step.address(step.op(0), maps, lane), lane).element;
      combine = element == Element::F64 ? nullptr : combine_of(Reduction(data[REDUCTION]), element);
      if (combine == nullptr) throw Fault("reduces elements of a type that it has no such reduction of", lane);
    }
    store(step, box, combine, lane);
  }
  return Outcome::Done;
}

// cp.async.bulk.commit_group
Outcome commit_group(Step& step) {
  FOR_LANES(lane, step.active) {
    Groups::Lane& of = groups_of(step.warp).lanes[lane];
    of.committed.push_back(std::move(of.open));
    of.open.clear();
  }
  return Outcome::Done;
}

// cp.async.bulk.wait_group{.read} n: all but the last n groups.
Outcome wait_group(Step& step) {
  const size_t most = step.op(0).value;
  FOR_LANES(lane, step.active) {
    Groups::Lane& of = groups_of(step.warp).lanes[lane];
    for (; of.read + most < of.committed.size(); ++of.read)
      for (const auto& store : of.committed[of.read]) store->finish_read();
    if (!step.instr.data[READ_ONLY]) {
      for (; of.committed.size() > most; of.committed.pop_front(), --of.read)
        for (const auto& store : of.committed.front()) store->finish();
    } else {
      const auto written = [](const auto& store) { return store->written->done; };
      for (; of.read > 0 && std::all_of(of.committed[0].begin(), of.committed[0].end(), written); --of.read)
        of.committed.pop_front();
    }
  }
  return Outcome::Done;
}

}  // namespace ptx::bulk
