// cp.async: copies from global to shared memory that happen later, and whoever waits for them.
#include <algorithm>

#include "access.h"
#include "counting.h"
#include "families.h"

namespace ptx {

namespace {

enum Data { BYTES, SOURCE };
enum SourceOperand { WHOLE, SIZE, IGNORE };  // what operand 3 is

// One instruction of a warp. Its data may come whenever it likes; the destination is nobody's until the lane that
// asked for it knows that it has.
struct Copy : Delivery {
  Warp& warp;
  const Instr& instr;
  Mask coming;   // lanes whose data has not come
  Mask unknown;  // lanes that don't know that it has
  uint64_t from[LANES];
  uint32_t to[LANES];
  uint32_t size[LANES];   // bytes of the source; zeros follow
  uint32_t group[LANES];  // by lane, as they are committed
  Mask undefined = 0;

  Copy(Step& step) : warp(step.warp), instr(step.instr), coming(step.active), unknown(step.active) {
    line = instr.line;
    cta = &step.cta;
  }

  uint32_t bytes() const { return instr.data[BYTES]; }
  const char* what() const override { return "cp.async"; }
  void happen() override { move(coming); }

  // Reads what is there: at any time between the request and the wait.
  void read(Mask lanes, uint8_t (*values)[16]) {
    Count count;
    Step step{*cta->launch, *cta, warp, instr, lanes, lanes, count};
    FOR_LANES(lane, lanes) {
      std::memset(values[lane], 0, bytes());
      // The alignment was seen to when it was asked for.
      if (size[lane] && cta->launch->read(step, lane, from[lane], size[lane], 1, values[lane]))
        undefined |= 1u << lane;
    }
  }

  void move(Mask lanes) {
    lanes &= coming;
    if (!lanes) return;
    uint8_t values[LANES][16];
    read(lanes, values);
    FOR_LANES(lane, lanes) std::memcpy(cta->shared.bytes(to[lane]), values[lane], bytes());
    coming &= ~lanes;
    done = coming == 0;
  }

  // Lanes that know that their copies are complete.
  void complete(Mask lanes) {
    lanes &= unknown;
    if (!lanes) return;
    try {
      move(lanes);
    } catch (const Fault& fault) {
      throw Fault(format("line %d: %s: %s", line, what(), fault.what()), fault.lane);
    }
    const uint32_t time = warp.clock.seen[warp.agent];
    FOR_LANES(lane, lanes) {
      cta->shared.end_write(warp.agent, time, line, to[lane], bytes(), true, undefined >> lane & 1);
      cta->shared.written_by(warp, lane, line, to[lane], bytes());
    }
    unknown &= ~lanes;
    if (!unknown) --cta->in_flight;
  }
};

// A warp's copies that some of its lanes have not waited for.
struct Copies {
  std::vector<std::shared_ptr<Copy>> open;
  uint32_t committed[LANES] = {};  // groups, by lane

  // The lanes' copies of groups below a number of each lane.
  template <class Below>
  void complete(Mask lanes, Below below) {
    for (auto& copy : open) {
      Mask known = 0;
      FOR_LANES(lane, lanes & copy->unknown) {
        if (copy->group[lane] < below(lane)) known |= 1u << lane;
      }
      copy->complete(known);
    }
    open.erase(std::remove_if(open.begin(), open.end(), [](auto& copy) { return !copy->unknown; }), open.end());
  }
};

Copies& copies_of(Warp& warp) {
  if (!warp.copies) warp.copies = std::make_shared<Copies>();
  return *static_cast<Copies*>(warp.copies.get());
}

// A lane's part of an instruction, for whoever completes it in the lane's stead.
struct LanesCopy : Delivery {
  std::shared_ptr<Copy> copy;
  int lane;
  LanesCopy(std::shared_ptr<Copy> whole, int lane) : copy(std::move(whole)), lane(lane) {
    line = copy->line;
    cta = copy->cta;
  }
  const char* what() const override { return copy->what(); }
  void happen() override { copy->complete(1u << lane); }
};

// ---- PTX ISA, Data Movement and Conversion Instructions: cp.async

void find_sizes(Step& step, Copy& copy) {
  const uint32_t bytes = copy.bytes();
  switch (step.instr.data[SOURCE]) {
    case SIZE: {
      const Source sizes = step.defined(step.op(3), "the size of a source");
      FOR_LANES(lane, step.active) {
        copy.size[lane] = sizes.get<uint32_t>(lane);
        if (copy.size[lane] > bytes) throw Fault(format("copies %u bytes to %u", copy.size[lane], bytes), lane);
      }
      break;
    }
    case IGNORE: {
      const Mask ignored = step.defined_predicate(step.op(3), "whether a source is ignored");
      FOR_LANES(lane, step.active) copy.size[lane] = ignored >> lane & 1 ? 0 : bytes;
      break;
    }
    default: FOR_LANES(lane, step.active) copy.size[lane] = bytes;
  }
}

Outcome copy(Step& step) {
  const auto copy = std::make_shared<Copy>(step);
  const uint32_t bytes = copy->bytes();
  const Places to(step, step.op(0), Space::Shared), from(step, step.op(1), Space::Global);
  find_sizes(step, *copy);
  Copies& copies = copies_of(step.warp);
  Mask reads = 0;
  FOR_LANES(lane, step.active) {
    copy->to[lane] = uint32_t(to[lane].address);
    copy->from[lane] = from[lane].address;
    copy->group[lane] = copies.committed[lane];
    if (copy->size[lane]) {
      reads |= 1u << lane;
      if (from[lane].space != Space::Global) throw Fault("copies from what is not global memory", lane);
      step.launch.region(from[lane].address, copy->size[lane], bytes, lane, "reads");
    }
    if (copy->to[lane] % bytes)
      throw Fault(
          format(
              "writes shared memory at %d, not a multiple of %u", int(copy->to[lane]) - int(SHARED_START), bytes),
          lane);
  }
  // The source may be read from here on, so that it must be ordered already.
  uint8_t values[LANES][16];
  copy->read(reads, values);
  copy->undefined = 0;
  FOR_LANES(lane, step.active) {
    try {
      step.cta.shared.begin_write(step.warp, step.instr.line, copy->to[lane], bytes, true);
      step.cta.shared.check_met(step.warp, lane, copy->to[lane], bytes, true);
    } catch (const Fault& fault) {
      throw Fault(fault.what(), lane);
    }
  }
  ++step.cta.in_flight;
  copies.open.push_back(copy);
  step.launch.later(copy);

  FOR_LANES(lane, reads) step.count.bytes += copy->size[lane];
  step.count.sectors += sectors(copy->from, reads, bytes);
  step.count.wavefronts += wavefronts(copy->to, step.active, bytes);
  return Outcome::Done;
}

void decode_cp_async(Words& words, Instr& instr) {
  const bool all_levels = words.need_one({"ca", "cg"}) == 0;  // of caches, which change no value
  words.need_one({"shared", "shared::cta"});
  words.need_one({"global"});
  words.take_one({"L2::64B", "L2::128B", "L2::256B"});
  const size_t policy = words.take("L2::cache_hint");
  need_operands(words, instr, 3 + policy, 4 + policy);
  if (instr.ops[0].is != Is::Address || instr.ops[1].is != Is::Address)
    words.unknown("needs two addresses in brackets");
  const Operand& size = instr.ops[2];
  if (size.is != Is::Immediate || (size.value != 16 && (!all_levels || (size.value != 4 && size.value != 8))))
    words.unknown(all_levels ? "copies 4, 8 or 16 bytes" : ".cg copies 16 bytes");
  instr.data[BYTES] = size.value;
  instr.data[SOURCE] = WHOLE;
  if (instr.ops.size() == 4 + policy) instr.data[SOURCE] = instr.ops[3].predicate() ? IGNORE : SIZE;
  instr.run = copy;
}

// ---- PTX ISA, Data Movement and Conversion Instructions: cp.async.commit_group, .wait_group, .wait_all

// A group may have nothing in it.
Outcome commit_group(Step& step) {
  Copies& copies = copies_of(step.warp);
  FOR_LANES(lane, step.active)++ copies.committed[lane];
  return Outcome::Done;
}

Outcome wait_group(Step& step) {
  Copies& copies = copies_of(step.warp);
  const uint32_t under_way = step.op(0).value;
  copies.complete(
      step.active, [&](int lane) { return copies.committed[lane] - std::min(copies.committed[lane], under_way); });
  return Outcome::Done;
}

Outcome wait_all(Step& step) {
  copies_of(step.warp).complete(step.active, [](int) { return ~0u; });
  return Outcome::Done;
}

void decode_cp(Words& words, Instr& instr) {
  if (words.peek() == "reduce") {
    words.take("reduce");
    words.need_one({"async"});
    if (!words.take("bulk")) words.unknown("the machine has no such instruction");
    decode_bulk_reduce(words, instr);
    return;
  }
  words.need_one({"async"});
  if (words.take("bulk")) {
    decode_bulk_copy(words, instr);
  } else if (words.take("mbarrier")) {
    decode_copy_arrive(words, instr);
  } else if (words.take("commit_group")) {
    need_operands(words, instr, 0, 0);
    instr.run = commit_group;
  } else if (words.take("wait_group")) {
    need_operands(words, instr, 1, 1);
    if (instr.ops[0].is != Is::Immediate || instr.ops[0].value < 0) words.unknown("waits for a constant number");
    instr.run = wait_group;
  } else if (words.take("wait_all")) {
    need_operands(words, instr, 0, 0);
    instr.run = wait_all;
  } else {
    decode_cp_async(words, instr);
  }
}

const Family cp("cp", decode_cp);

}  // namespace

std::vector<std::shared_ptr<Delivery>> pending_copies(Warp& warp, int lane) {
  std::vector<std::shared_ptr<Delivery>> pending;
  if (warp.copies)
    for (auto& copy : copies_of(warp).open)
      if (copy->unknown >> lane & 1) pending.push_back(std::make_shared<LanesCopy>(copy, lane));
  return pending;
}

}  // namespace ptx
