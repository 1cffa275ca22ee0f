// Addresses: conversions between state spaces, and what is said about memory without reading or writing it.
#include "access.h"

namespace ptx {

namespace {

enum Data { SPACE, TO };

// A variable's name stands for its address; anything else must be a number.
bool is_number(const Operand& operand) {
  return operand.is == Is::Register || operand.is == Is::Immediate || operand.is == Is::Shared ||
         operand.is == Is::Local || operand.is == Is::Parameter;
}

uint64_t number(const Source& source, const Operand& operand, int lane) {
  return operand.is == Is::Register && operand.width == 32 ? source.get<uint32_t>(lane)
                                                           : source.get<uint64_t>(lane);
}

void need_64_bits(Words& words) {
  if (words.need_one({"u64", "u32"}) == 1) words.unknown("generic addresses have 64 bits");
}

uint64_t window_of(Space space) {
  switch (space) {
    case Space::Shared:
    case Space::Cluster: return SHARED_WINDOW;
    case Space::Local: return LOCAL_WINDOW;
    case Space::Parameter: return PARAMETER_WINDOW;
    default: return 0;
  }
}

bool has_window(uint64_t address) {
  const uint64_t window = address & WINDOW;
  return window == SHARED_WINDOW || window == LOCAL_WINDOW || window == PARAMETER_WINDOW;
}

// Whether a generic address lies in a space. The window of parameters is in that of .global.
bool is_in(const Step& step, Space space, uint64_t address) {
  const uint64_t window = address & WINDOW;
  switch (space) {
    case Space::Const:
    case Space::Global: {
      if (has_window(address)) return space == Space::Global && window == PARAMETER_WINDOW;
      const Region* region = step.launch.machine.find(address);
      return (region != nullptr && region->constant) == (space == Space::Const);
    }
    case Space::Shared: return window == SHARED_WINDOW && (address & ~WINDOW) >> RANK_SHIFT == step.cta.rank;
    case Space::Cluster:
      return window == SHARED_WINDOW && (address & ~WINDOW) >> RANK_SHIFT < step.cta.cluster->ctas.size();
    default: return window == window_of(space);
  }
}

Space need_space(Words& words) {
  constexpr Space SPACES[] = {Space::Global,  Space::Const, Space::Shared,    Space::Shared,
                              Space::Cluster, Space::Local, Space::Parameter, Space::Parameter};
  return SPACES[words.need_one(
      {"global", "const", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry"})];
}

// ---- PTX ISA, Data Movement and Conversion Instructions: cvta

Outcome cvta(Step& step) {
  const Operand& from = step.op(1);
  const Source source = step.source(from);
  const Space space = Space(step.instr.data[SPACE]);
  Mask undefined = source.undefined;
  FOR_LANES(lane, step.active) {
    uint64_t address = number(source, from, lane);
    if (!step.instr.data[TO]) {
      address |= window_of(space);
    } else if (space == Space::Const || space == Space::Global) {
      if (has_window(address) && (address & WINDOW) != PARAMETER_WINDOW) undefined |= 1u << lane;
    } else if (is_in(step, space, address)) {
      address &= ~WINDOW;
    } else {
      undefined |= 1u << lane;
    }
    step.set(step.op(0), lane, address);
  }
  step.set_undefined(step.op(0), undefined);
  return Outcome::Done;
}

void decode_cvta(Words& words, Instr& instr) {
  need_operands(words, instr, 2, 2);
  instr.data[TO] = words.take("to");
  const Space space = need_space(words);
  instr.data[SPACE] = int(space);
  need_64_bits(words);
  const Operand& from = instr.ops[1];
  const bool fits = from.is == Is::Register || from.is == Is::Immediate ||
                    (from.is == Is::Shared && (space == Space::Shared || space == Space::Cluster)) ||
                    (from.is == Is::Local && space == Space::Local) ||
                    (from.is == Is::Parameter && space == Space::Parameter);
  if (!fits) words.unknown("converts an address of another space");
  instr.run = cvta;
}

// ---- PTX ISA, Data Movement and Conversion Instructions: isspacep

Outcome isspacep(Step& step) {
  const Operand& from = step.op(1);
  const Source source = step.source(from);
  Mask inside = 0;
  FOR_LANES(lane, step.active) {
    if (is_in(step, Space(step.instr.data[SPACE]), number(source, from, lane))) inside |= 1u << lane;
  }
  step.set_predicate(step.op(0), inside, source.undefined);
  return Outcome::Done;
}

void decode_isspacep(Words& words, Instr& instr) {
  need_operands(words, instr, 2, 2);
  const Space space = need_space(words);
  instr.data[SPACE] = int(space);
  if (!instr.ops[0].predicate() || instr.ops[1].is != Is::Register || instr.ops[1].width != 64)
    words.unknown("takes a predicate and an address of 64 bits");
  instr.run = isspacep;
}

// ---- PTX ISA, Data Movement and Conversion Instructions: mapa

uint64_t shared_part(const Step& step, uint64_t address, bool generic, int lane) {
  if (!generic) return address;
  if (!is_in(step, Space::Cluster, address))
    throw Fault(format("takes %#llx, which is not in shared memory", (unsigned long long)address), lane);
  return address & ~WINDOW;
}

Outcome mapa(Step& step) {
  const Operand &from = step.op(1), &to = step.op(2);
  const Source source = step.defined(from, "an address"), ranks = step.defined(to, "the rank of a CTA");
  const bool generic = Space(step.instr.data[SPACE]) == Space::Generic;
  FOR_LANES(lane, step.active) {
    const uint64_t rank = ranks.get<uint32_t>(lane);
    const size_t ctas = step.cta.cluster->ctas.size();
    if (rank >= ctas)
      throw Fault(format("asks for CTA %llu of a cluster of %zu", (unsigned long long)rank, ctas), lane);
    const uint64_t address = shared_part(step, number(source, from, lane), generic, lane);
    step.set(step.op(0), lane, (generic ? SHARED_WINDOW : 0) | rank << RANK_SHIFT | Step::shared_offset(address));
  }
  step.set_undefined(step.op(0), 0);
  return Outcome::Done;
}

// .shared::cluster or generic, and the bits of an address.
void take_cluster_address(Words& words, Instr& instr, const Operand& from) {
  const bool generic = !words.take("shared::cluster");
  instr.data[SPACE] = int(generic ? Space::Generic : Space::Cluster);
  const int bits = words.need_one({"u32", "u64"}) ? 64 : 32;
  if (generic && (bits == 32 || from.is != Is::Register)) words.unknown("generic addresses have 64 bits");
  if (!is_number(from) || (from.is == Is::Register && from.width != bits))
    words.unknown(format("needs an address of %d bits", bits));
}

void decode_mapa(Words& words, Instr& instr) {
  need_operands(words, instr, 3, 3);
  take_cluster_address(words, instr, instr.ops[1]);
  instr.run = mapa;
}

// ---- PTX ISA, Data Movement and Conversion Instructions: getctarank

Outcome getctarank(Step& step) {
  const Operand& from = step.op(1);
  const Source source = step.defined(from, "an address");
  const bool generic = Space(step.instr.data[SPACE]) == Space::Generic;
  FOR_LANES(lane, step.active) {
    const uint64_t address = shared_part(step, number(source, from, lane), generic, lane);
    step.shared_cta(address, lane, false);
    step.set(step.op(0), lane, uint32_t(address >> RANK_SHIFT));
  }
  step.set_undefined(step.op(0), 0);
  return Outcome::Done;
}

void decode_getctarank(Words& words, Instr& instr) {
  need_operands(words, instr, 2, 2);
  take_cluster_address(words, instr, instr.ops[1]);
  instr.run = getctarank;
}

// ---- Hints to caches: the address must have a value, and nothing else happens

Outcome hint(Step& step) {
  step.address_base(step.op(0));
  return Outcome::Done;
}

// PTX ISA, Data Movement and Conversion Instructions: prefetch, prefetchu
void decode_prefetch(Words& words, Instr& instr) {
  need_operands(words, instr, 1, 1);
  if (words.take("tensormap")) {
    words.take_one({"param", "const"});
  } else {
    const int space = words.take_one({"global", "local"});
    const int level = words.need_one({"L1", "L2", "L2::evict_last", "L2::evict_normal"});
    if (level > 1 && space != 0) words.unknown("a priority is for .global");
  }
  if (instr.ops[0].is != Is::Address) words.unknown("needs an address in brackets");
  instr.run = hint;
}

void decode_prefetchu(Words& words, Instr& instr) {
  need_operands(words, instr, 1, 1);
  words.need_one({"L1"});
  if (instr.ops[0].is != Is::Address) words.unknown("needs an address in brackets");
  instr.run = hint;
}

void need_128_bytes(Words& words, const Instr& instr) {
  need_operands(words, instr, 2, 2);
  if (instr.ops[0].is != Is::Address || instr.ops[1].is != Is::Immediate || instr.ops[1].value != 128)
    words.unknown("takes an address in brackets and 128");
}

// PTX ISA, Data Movement and Conversion Instructions: applypriority
void decode_applypriority(Words& words, Instr& instr) {
  need_128_bytes(words, instr);
  words.take("global");
  words.need_one({"L2::evict_normal"});
  instr.run = hint;
}

// PTX ISA, Data Movement and Conversion Instructions: discard. What was stored there is lost.
Outcome discard(Step& step) {
  const Places places(step, step.op(0), Space(step.instr.data[SPACE]));
  FOR_LANES(lane, step.active) {
    if (places[lane].space != Space::Global) throw Fault("discards what is not in global memory", lane);
    const uint64_t address = places[lane].address;
    Region& region = step.launch.region(address, 128, 128, lane, "discards");
    const uint64_t offset = address - uint64_t(region.data);
    uint8_t bytes[128];
    std::memcpy(bytes, region.data + offset, 128);
    step.launch.write(step, lane, address, 128, 128, bytes);
    if (region.undefined.empty()) region.undefined.resize(region.size);
    std::memset(&region.undefined[offset], 1, 128);
  }
  return Outcome::Done;
}

void decode_discard(Words& words, Instr& instr) {
  need_128_bytes(words, instr);
  instr.data[SPACE] = int(take_space(words, instr.ops[0]));
  words.need_one({"L2"});
  instr.run = discard;
}

// PTX ISA, Data Movement and Conversion Instructions: createpolicy. A policy is opaque, and nobody asks what it says.
Outcome createpolicy(Step& step) {
  FOR_LANES(lane, step.active) step.set(step.op(0), lane, uint64_t(1));
  step.set_undefined(step.op(0), 0);
  return Outcome::Done;
}

void decode_createpolicy(Words& words, Instr& instr) {
  const auto priority = {"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"};
  const int kind = words.need_one({"fractional", "range", "cvt"});
  if (kind == 2) {
    need_operands(words, instr, 2, 2);
    words.need_one({"L2"});
  } else {
    need_operands(words, instr, kind == 0 ? 1 : 4, kind == 0 ? 2 : 4);
    if (kind == 1) words.take("global");
    words.need_one(priority);
    words.take_one({"L2::evict_first", "L2::evict_unchanged"});
  }
  words.need_one({"b64"});
  if (instr.ops[0].is != Is::Register || instr.ops[0].width != 64) words.unknown("writes 64 bits");
  instr.run = createpolicy;
}

const Family families[] = {
    {"cvta", decode_cvta},
    {"isspacep", decode_isspacep},
    {"mapa", decode_mapa},
    {"getctarank", decode_getctarank},
    {"prefetch", decode_prefetch},
    {"prefetchu", decode_prefetchu},
    {"applypriority", decode_applypriority},
    {"discard", decode_discard},
    {"createpolicy", decode_createpolicy}};

}  // namespace

}  // namespace ptx
