// Copies by the async proxy (TMA): cp.async.bulk, cp.reduce.async.bulk and their tensor forms.
//
// PTX ISA, Data Movement and Conversion Instructions: Asynchronous copy operations. A copy into shared
// memory reads its source when it is delivered and completes bytes of an mbarrier then. Cache hints and
// policies are taken and have no meaning here.
#include "boxes.h"

namespace ptx {

using namespace bulk;

namespace {

// What fills the outside of a tensor of floats, 16 bits at a time: as measured on Hopper.
constexpr uint16_t FILL_NAN = 0x7ff7;

// ---- Into shared memory

// Puts `data` into shared memory, a chunk at a time, and tells the mbarrier. Undefined: a flag a chunk.
void put(
    Launch& launch, Cta& to, const Box& box, const std::vector<uint8_t>& data, const std::vector<bool>& undefined,
    SharedPlace barrier, int line) {
  const Copied copied = mbarrier_copied(*barrier.cta, barrier.offset);
  for (uint32_t begin = 0; begin < box.bytes; begin += CHUNK) {
    const uint32_t offset = box.place(begin);
    std::memcpy(to.shared.bytes(offset), &data[begin], CHUNK);
    to.shared.end_write(copied.agent, copied.time, line, offset, CHUNK, false, undefined[begin / CHUNK]);
  }
  --to.in_flight;
  mbarrier_complete(launch, *barrier.cta, barrier.offset, box.bytes, copied.clock);
}

struct Load : Delivery {
  Load(Step& step, Cta& to, const Box& box, SharedPlace barrier)
      : launch(step.launch), warp(step.warp), box(box), barrier(barrier) {
    line = step.instr.line;
    cta = &to;
    to.shared.begin_write(warp, line, box.shared, box.bytes, false);
    ++to.in_flight;
  }
  const char* what() const override { return "a bulk copy into shared memory"; }

  void happen() override {
    std::vector<uint8_t> data(box.bytes);
    std::vector<bool> undefined(box.bytes / CHUNK);
    if (box.fill_nan)
      for (uint32_t i = 0; i < box.bytes; i += sizeof FILL_NAN) std::memcpy(&data[i], &FILL_NAN, sizeof FILL_NAN);
    for (const Span& span : box.spans) {
      bool any = false;
      launch.read_async(warp, span.global, span.bytes, &data[span.begin], &any);
      for (uint32_t i = 0; any && i < span.bytes; i += box.unit) {
        bool one = false;
        launch.read_async(warp, span.global + i, box.unit, &data[span.begin + i], &one);
        if (one) undefined[(span.begin + i) / CHUNK] = true;
      }
    }
    put(launch, *cta, box, data, undefined, barrier, line);
  }

  Launch& launch;
  Warp& warp;
  Box box;
  SharedPlace barrier;
};

// From the shared memory of one CTA to another's. A reduction leaves the destination to others meanwhile.
struct Move : Delivery {
  Move(Step& step, uint32_t from, Cta& to, const Box& box, Combine combine, SharedPlace barrier)
      : launch(step.launch),
        warp(step.warp),
        instr(step.instr),
        from(from),
        box(box),
        combine(combine),
        barrier(barrier) {
    line = instr.line;
    cta = &to;
    warp.cta->shared.begin_read(warp, line, from, box.bytes);
    if (!combine) to.shared.begin_write(warp, line, box.shared, box.bytes, false);
    ++warp.cta->in_flight;
    ++to.in_flight;
  }
  const char* what() const override { return "a bulk copy between CTAs"; }

  void happen() override {
    SharedMemory& source = warp.cta->shared;
    const uint8_t* bytes = source.bytes(from);
    const std::vector<uint8_t> data(bytes, bytes + box.bytes);
    std::vector<bool> undefined(box.bytes / CHUNK);
    for (uint32_t i = 0; i < box.bytes; i += CHUNK) undefined[i / CHUNK] = source.undefined(from + i, CHUNK);
    const Copied copied = mbarrier_copied(*barrier.cta, barrier.offset);
    source.end_read(copied.agent, copied.time, line, from, box.bytes);
    --warp.cta->in_flight;
    if (!combine) {
      put(launch, *cta, box, data, undefined, barrier, line);
      return;
    }
    Count count;
    Step step{launch, *warp.cta, warp, instr, 1, 1, count};
    for (uint32_t i = 0; i < box.bytes; i += box.unit) {
      if (undefined[i / CHUNK])
        throw Fault(format("reduces by shared memory at %d, which nobody has written", at(from + i)));
      combine(cta->shared.atomic(step, 0, box.shared + i, box.unit), &data[i]);
    }
    cta->shared.mark_strong(copied.agent, copied.time, line, box.shared, box.bytes);
    --cta->in_flight;
    mbarrier_complete(launch, *barrier.cta, barrier.offset, box.bytes, copied.clock);
  }

  Launch& launch;
  Warp& warp;
  const Instr& instr;
  uint32_t from;
  Box box;
  Combine combine;
  SharedPlace barrier;
};

SharedPlace barrier_of(Step& step, const Operand& operand, const Source& base, int lane) {
  const SharedPlace place = shared_place(step, step.address(operand, base, lane), lane, false, false);
  mbarrier_used(step, place, lane);
  return place;
}

// Copies a box to where it is asked for, or to every CTA of a mask, and tells mbarriers there.
void load(Step& step, SharedPlace to, SharedPlace barrier, const Box& box, uint32_t mask, int lane) {
  const int64_t* data = step.instr.data;
  check_global(step, box, lane, false);
  if (!data[MULTICAST]) mask = 1u << to.cta->rank;
  const auto& ctas = step.cta.cluster->ctas;
  if (mask == 0 || mask >> ctas.size())
    throw Fault(format("copies to CTAs %#x of a cluster of %zu", mask, ctas.size()), lane);
  // A pair's CTAs may share an mbarrier, the even one's or the odd one's.
  const uint32_t parity = data[PAIR] ? 1 : 0;
  if (!data[MULTICAST] && (barrier.cta->rank | parity) != (to.cta->rank | parity))
    throw Fault(format("copies to CTA %u and tells an mbarrier of CTA %u", to.cta->rank, barrier.cta->rank), lane);
  for (uint32_t rank = 0; rank < ctas.size(); ++rank) {
    if (!(mask >> rank & 1)) continue;
    const uint32_t told = data[PAIR] ? (rank & ~1u) | (barrier.cta->rank & 1) : rank;
    if (told >= ctas.size()) throw Fault(format("tells an mbarrier of CTA %u, which isn't there", told), lane);
    const SharedPlace there{ctas[told].get(), barrier.offset};
    for (const uint32_t needed : {rank, told})
      if (ctas[needed]->running == 0)
        throw Fault(format("copies to CTA %u of its cluster, which has ended", needed), lane);
    if (told != barrier.cta->rank) mbarrier_used(step, there, lane);
    const auto delivery = std::make_shared<Load>(step, *ctas[rank], box, there);
    ctas[rank]->shared.check_met(step.warp, lane, box.shared, box.bytes, true);
    step.launch.later(delivery);
  }
}

// cp.async.bulk, global to shared memory: [to], [from], size, [mbarrier]{, mask}{, policy}
Outcome load_plain(Step& step) {
  const Source to = step.address_base(step.op(0)), from = step.address_base(step.op(1));
  const Source size = step.defined(step.op(2), "a size"), barriers = step.address_base(step.op(3));
  const bool multicast = step.instr.data[MULTICAST];
  const Source masks = multicast ? step.defined(step.op(4), "a mask of CTAs") : Source{};
  FOR_LANES(lane, step.active) {
    const SharedPlace place =
        shared_place(step, step.address(step.op(0), to, lane), lane, false, step.instr.data[TO_OWN]);
    check_alignment(place.offset, CHUNK, lane);
    const Box box = plain_box(step.address(step.op(1), from, lane), place.offset, size.get<uint32_t>(lane), lane);
    const SharedPlace barrier = barrier_of(step, step.op(3), barriers, lane);
    load(step, place, barrier, box, multicast ? masks.get<uint16_t>(lane) : 0, lane);
  }
  return Outcome::Done;
}

// cp.async.bulk.tensor, global to shared memory: [to], [map, {coordinates}], [mbarrier]{, mask}{, policy}
Outcome load_tensor(Step& step) {
  const Source to = step.address_base(step.op(0)), maps = step.address_base(step.op(1));
  const Source barriers = step.address_base(step.op(2));
  const bool multicast = step.instr.data[MULTICAST];
  const Source masks = multicast ? step.defined(step.op(3), "a mask of CTAs") : Source{};
  FOR_LANES(lane, step.active) {
    const SharedPlace place =
        shared_place(step, step.address(step.op(0), to, lane), lane, false, step.instr.data[TO_OWN]);
    check_alignment(place.offset, TENSOR_ALIGNMENT, lane);
    const Box box = tensor_operand(step, step.op(1), maps, place.offset, lane);
    const SharedPlace barrier = barrier_of(step, step.op(2), barriers, lane);
    load(step, place, barrier, box, multicast ? masks.get<uint16_t>(lane) : 0, lane);
  }
  return Outcome::Done;
}

// cp.async.bulk and cp.reduce.async.bulk, shared memory to another CTA's: [to], [from], size, [mbarrier]
Outcome move(Step& step) {
  const ByElements reduction = reduction_of(step.instr);
  const Source to = step.address_base(step.op(0)), from = step.address_base(step.op(1));
  const Source size = step.defined(step.op(2), "a size"), barriers = step.address_base(step.op(3));
  FOR_LANES(lane, step.active) {
    const SharedPlace target = shared_place(step, step.address(step.op(0), to, lane), lane, false, false);
    const SharedPlace source = shared_place(step, step.address(step.op(1), from, lane), lane, false, true);
    check_alignment(target.offset, CHUNK, lane);
    check_alignment(source.offset, CHUNK, lane);
    Box box = plain_box(0, target.offset, size.get<uint32_t>(lane), lane);
    box.unit = reduction.unit;
    const SharedPlace barrier = barrier_of(step, step.op(3), barriers, lane);
    if (barrier.cta != target.cta)
      throw Fault(
          format("copies to CTA %u and tells an mbarrier of CTA %u", target.cta->rank, barrier.cta->rank), lane);
    step.launch.later(std::make_shared<Move>(step, source.offset, *target.cta, box, reduction.combine, barrier));
  }
  return Outcome::Done;
}

// ---- Hints

// cp.async.bulk.prefetch: [from], size{, policy}
Outcome prefetch_plain(Step& step) {
  const Source from = step.address_base(step.op(0)), size = step.defined(step.op(1), "a size");
  FOR_LANES(lane, step.active) {
    const Box box = plain_box(step.address(step.op(0), from, lane), 0, size.get<uint32_t>(lane), lane);
    for (const Span& span : box.spans) step.launch.region(span.global, span.bytes, 1, lane, "prefetches");
  }
  return Outcome::Done;
}

// cp.async.bulk.prefetch.tensor: [map, {coordinates}]{, policy}
Outcome prefetch_tensor(Step& step) {
  const Source maps = step.address_base(step.op(0));
  FOR_LANES(lane, step.active) {
    const Box box = tensor_operand(step, step.op(0), maps, 0, lane);
    for (const Span& span : box.spans) step.launch.region(span.global, span.bytes, 1, lane, "prefetches");
  }
  return Outcome::Done;
}

// ---- Decoding

constexpr const char* BY_MBARRIER = "mbarrier::complete_tx::bytes";

// The number of dimensions, after .tensor; tiled mode alone.
void decode_dims(Words& words, Instr& instr) {
  instr.data[DIMS] = 1 + words.need_one({"1d", "2d", "3d", "4d", "5d"});
  words.take("tile");
}

// A cache hint has a policy as its last operand.
size_t decode_hint(Words& words) { return words.take("L2::cache_hint"); }

void need_coordinates(const Words& words, const Instr& instr, int index) {
  const Operand& operand = instr.ops[index];
  if (operand.is != Is::Address || operand.parts.size() != 2) words.unknown("needs [tensor map, coordinates]");
  const Operand& coordinates = operand.parts[1];
  const size_t found = coordinates.is == Is::Vector ? coordinates.parts.size() : 1;
  if (int64_t(found) != instr.data[DIMS])
    words.unknown(format("has %zu coordinates for %d dimensions", found, int(instr.data[DIMS])));
}

void decode_load(Words& words, Instr& instr, bool tensor, bool to_own) {
  instr.data[TO_OWN] = to_own;
  if (!words.take(BY_MBARRIER)) words.unknown("needs .mbarrier::complete_tx::bytes");
  instr.data[MULTICAST] = !to_own && words.take("multicast::cluster");
  if (tensor) instr.data[PAIR] = words.take_one({"cta_group::1", "cta_group::2"}) == 1;
  const size_t operands = (tensor ? 3 : 4) + size_t(instr.data[MULTICAST]) + decode_hint(words);
  need_operands(words, instr, operands, operands);
  if (tensor) need_coordinates(words, instr, 1);
  instr.run = tensor ? load_tensor : load_plain;
}

void decode_store(Words& words, Instr& instr, bool tensor) {
  if (!words.take("bulk_group")) words.unknown("needs .bulk_group");
  const size_t hint = decode_hint(words);
  if (!tensor) instr.data[BYTE_MASK] = words.take("cp_mask");
  const size_t operands = (tensor ? 2 : 3) + hint + size_t(instr.data[BYTE_MASK]);
  need_operands(words, instr, operands, operands);
  if (tensor) need_coordinates(words, instr, 0);
  instr.run = tensor ? store_tensor : store_plain;
}

void decode_prefetch(Words& words, Instr& instr) {
  const bool tensor = words.take("tensor");
  if (tensor) decode_dims(words, instr);
  words.need_one({"L2"});
  words.need_one({"global"});
  const size_t operands = (tensor ? 1 : 2) + decode_hint(words);
  need_operands(words, instr, operands, operands);
  if (tensor) need_coordinates(words, instr, 0);
  instr.run = tensor ? prefetch_tensor : prefetch_plain;
}

void decode_move(Words& words, Instr& instr) {
  if (!words.take(BY_MBARRIER)) words.unknown("needs .mbarrier::complete_tx::bytes");
  need_operands(words, instr, 4, 4);
  instr.run = move;
}

// The type of a reduction's elements: by the tables of PTX ISA, one for each destination.
void decode_element(Words& words, Instr& instr, bool to_cluster) {
  const bool exact = words.take("noftz");
  const int type = words.need_one({"u32", "s32", "u64", "s64", "b32", "b64", "f16", "bf16", "f32", "f64"});
  const Element elements[] = {Element::U32, Element::S32, Element::U64,  Element::S64, Element::U32,
                              Element::U64, Element::F16, Element::BF16, Element::F32, Element::F64};
  const Element element = elements[type];
  const Reduction op = Reduction(instr.data[REDUCTION]);
  const bool sixteen = element == Element::F16 || element == Element::BF16;
  if (exact != (sixteen && op == Reduction::Add)) words.unknown(".noftz goes with .add of 16-bit floats");
  const bool bits = type == 4 || type == 5;
  const bool of_cluster = type < 2 || type == 4 || (type == 2 && op == Reduction::Add);
  if (bits != (op >= Reduction::And) || (to_cluster && !of_cluster) || combine_of(op, element) == nullptr)
    words.unknown("has no such reduction of this type");
  instr.data[ELEMENT] = int64_t(element);
}

void decode_copy(Words& words, Instr& instr) {
  const bool tensor = words.take("tensor");
  if (tensor) decode_dims(words, instr);
  const std::string to = words.next(), from = words.next();
  if (from == "global" && (to == "shared::cta" || to == "shared::cluster")) {
    decode_load(words, instr, tensor, to == "shared::cta");
  } else if (to == "global" && from == "shared::cta") {
    decode_store(words, instr, tensor);
  } else if (!tensor && to == "shared::cluster" && from == "shared::cta") {
    decode_move(words, instr);
  } else {
    words.unknown("the machine has no copy from ." + from + " to ." + to);
  }
}

}  // namespace

void decode_bulk_copy(Words& words, Instr& instr) {
  instr.data[REDUCTION] = NO_REDUCTION;
  if (words.take("commit_group")) {
    need_operands(words, instr, 0, 0);
    instr.run = commit_group;
  } else if (words.take("wait_group")) {
    instr.data[READ_ONLY] = words.take("read");
    need_operands(words, instr, 1, 1);
    if (instr.ops[0].is != Is::Immediate || instr.ops[0].value < 0) words.unknown("waits for a constant number");
    instr.run = wait_group;
  } else if (words.take("prefetch")) {
    decode_prefetch(words, instr);
  } else {
    decode_copy(words, instr);
  }
}

void decode_bulk_reduce(Words& words, Instr& instr) {
  const bool tensor = words.take("tensor");
  if (tensor) decode_dims(words, instr);
  const std::string to = words.next(), from = words.next();
  const bool to_cluster = to == "shared::cluster" && !tensor;
  if ((to != "global" && !to_cluster) || from != "shared::cta")
    words.unknown("the machine has no reduction from ." + from + " to ." + to);
  instr.data[REDUCTION] = words.need_one({"add", "min", "max", "inc", "dec", "and", "or", "xor"});
  if (!tensor) decode_element(words, instr, to_cluster);
  if (to_cluster) decode_move(words, instr);
  else decode_store(words, instr, tensor);
}

}  // namespace ptx
