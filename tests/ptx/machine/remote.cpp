// st.async, red.async: stores and reductions to the shared memory of a CTA of the cluster, which an mbarrier there
// counts. They are asynchronous, and of the generic proxy.
#include "access.h"
#include "families.h"
#include "reductions.h"

namespace ptx {

namespace {

enum Data { SPACE, BYTES, COUNT, COMBINE };

// What one lane asked for.
struct Remote : Delivery {
  Remote(Step& step, int lane, const Place& place, SharedPlace barrier)
      : launch(step.launch),
        warp(step.warp),
        instr(step.instr),
        lane(lane),
        at(uint32_t(place.address)),
        barrier(barrier) {
    line = instr.line;
    cta = place.cta;
    ++cta->in_flight;
  }

  Launch& launch;
  Warp& warp;
  const Instr& instr;
  int lane;
  uint32_t at;
  SharedPlace barrier;
  uint8_t value[16];

  uint32_t bytes() const { return instr.data[BYTES] * instr.data[COUNT]; }

  void tell(const Copied& copied) {
    --cta->in_flight;
    mbarrier_complete(launch, *barrier.cta, barrier.offset, bytes(), copied.clock);
  }
};

struct Store : Remote {
  using Remote::Remote;
  const char* what() const override { return "st.async"; }
  void happen() override {
    const Copied copied = mbarrier_copied(*barrier.cta, barrier.offset);
    std::memcpy(cta->shared.bytes(at), value, bytes());
    cta->shared.end_write(copied.agent, copied.time, line, at, bytes(), true);
    tell(copied);
  }
};

struct Reduce : Remote {
  using Remote::Remote;
  const char* what() const override { return "red.async"; }
  void happen() override {
    const Copied copied = mbarrier_copied(*barrier.cta, barrier.offset);
    Count count;
    Step step{launch, *warp.cta, warp, instr, 1u << lane, 1u << lane, count};
    reinterpret_cast<Combine>(instr.data[COMBINE])(cta->shared.atomic(step, lane, at, bytes()), value);
    cta->shared.mark_strong(copied.agent, copied.time, line, at, bytes());
    tell(copied);
  }
};

template <class Kind>
Outcome remote(Step& step) {
  const Instr& instr = step.instr;
  // The ISA doesn't say so. On an H200 it was "an illegal instruction", and none in a cluster of one CTA.
  if (step.launch.program.cluster[0] == 0 && !step.launch.options.in_clusters)
    throw Fault("stores to a cluster, and the launch has none");
  const uint32_t bytes = instr.data[BYTES], count = instr.data[COUNT], size = bytes * count;
  const Space space = Space(instr.data[SPACE]);
  const Places places(step, step.op(0), space), barriers(step, step.op(2), space);
  uint8_t values[LANES][16];
  for (uint32_t i = 0; i < count; ++i) {
    const Source source = step.defined(element(step.op(1), i), "a stored value");
    FOR_LANES(lane, step.active) {
      std::memcpy(values[lane] + i * bytes, source.base + lane * source.stride, bytes);
    }
  }
  FOR_LANES(lane, step.active) {
    const Place& place = places[lane];
    if (place.space != Space::Shared || barriers[lane].space != Space::Shared)
      throw Fault("takes addresses in shared memory", lane);
    const SharedPlace barrier = {barriers[lane].cta, uint32_t(barriers[lane].address)};
    if (barrier.cta != place.cta)
      throw Fault(
          format("stores to CTA %u and tells an mbarrier of CTA %u", place.cta->linear, barrier.cta->linear),
          lane);
    mbarrier_used(step, barrier, lane);
    if (place.address % size)
      throw Fault(
          format("writes shared memory at %d, not a multiple of %u", int(place.address) - int(SHARED_START), size),
          lane);
    if (std::is_same_v<Kind, Store>)
      place.cta->shared.begin_write(step.warp, instr.line, uint32_t(place.address), size, true);
    const auto delivery = std::make_shared<Kind>(step, lane, place, barrier);
    std::memcpy(delivery->value, values[lane], size);
    step.launch.later(delivery);
  }
  count_access(step, places, step.active, size);
  return Outcome::Done;
}

void take_destination(Words& words, Instr& instr) {
  need_operands(words, instr, 3, 3);
  if (!words.take("mbarrier::complete_tx::bytes"))
    words.unknown("the machine has it with .mbarrier::complete_tx::bytes alone");
  const Space space = take_space(words, instr.ops[0]);
  if (space != Space::Cluster && space != Space::Generic) words.unknown("stores to .shared::cluster");
  if (instr.ops[2].is != Is::Address) words.unknown("needs an mbarrier in brackets");
  instr.data[SPACE] = int(space);
}

void need_values(Words& words, const Instr& instr) {
  const int bytes = instr.data[BYTES];
  const std::string what = format("registers of at least %d bits", 8 * bytes);
  need_elements(words, instr.ops[1], instr.data[COUNT], what.c_str(), [&](const Operand& part) {
    return part.is == Is::Immediate || (part.is == Is::Register && part.width > 1 && part.width >= 8 * bytes);
  });
}

}  // namespace

// PTX ISA, Data Movement and Conversion Instructions: st.async
void decode_st_async(Words& words, Instr& instr) {
  take_destination(words, instr);
  words.take("weak");
  words.take("cluster");
  const int vector = words.take_one({"v2", "v4"});
  const int type = words.need_one({"b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"});
  instr.data[BYTES] = type < 4 ? 4 : 8;
  instr.data[COUNT] = vector < 0 ? 1 : 2 << vector;
  if (instr.data[BYTES] * instr.data[COUNT] > 16) words.unknown("a vector has at most 16 bytes");
  need_values(words, instr);
  instr.run = remote<Store>;
}

// PTX ISA, Parallel Synchronization and Communication Instructions: red.async
void decode_red_async(Words& words, Instr& instr) {
  take_destination(words, instr);
  words.need_one({"relaxed"});
  words.need_one({"cluster"});
  constexpr Reduction OPS[] = {Reduction::Inc, Reduction::Dec, Reduction::Min, Reduction::Max,
                               Reduction::And, Reduction::Or,  Reduction::Xor, Reduction::Add};
  const Reduction op = OPS[words.need_one({"inc", "dec", "min", "max", "and", "or", "xor", "add"})];
  const int type = words.need_one({"b32", "u32", "s32", "u64"});
  const bool bits = op == Reduction::And || op == Reduction::Or || op == Reduction::Xor;
  if (bits != (type == 0) || (type == 3 && op != Reduction::Add)) words.unknown("is not of that type");
  constexpr Element ELEMENTS[] = {Element::U32, Element::U32, Element::S32, Element::U64};
  const Combine combine = combine_of(op, ELEMENTS[type]);
  if (combine == nullptr) words.unknown("is not of that type");
  instr.data[COMBINE] = reinterpret_cast<int64_t>(combine);
  instr.data[BYTES] = type == 3 ? 8 : 4;
  instr.data[COUNT] = 1;
  need_values(words, instr);
  instr.run = remote<Reduce>;
}

}  // namespace ptx
