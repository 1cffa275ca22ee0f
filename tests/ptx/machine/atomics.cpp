// Atomics and fences.
#include <map>

#include "access.h"
#include "families.h"
#include "reductions.h"

namespace ptx {

namespace {

// ---- PTX ISA, Parallel Synchronization and Communication Instructions: atom, red

enum Data { SPACE, ORDER, SCOPE, BYTES, COUNT, COMBINE, RESULT, KIND };
enum Kind { ONE, PAIR, SINGLE, EXCHANGE, COMPARE };  // PAIR: two halves in a word; SINGLE: .f32
enum OrderBits { ACQUIRES = 1, RELEASES = 2 };

struct Values {
  uint8_t of[LANES][32];
  // An operand's elements, which must have values.
  void gather(Step& step, const Operand& operand, int bytes, int count) {
    for (int i = 0; i < count; ++i) {
      const Source source = step.defined(element(operand, i), "a stored value");
      FOR_LANES(lane, step.active) {
        std::memcpy(of[lane] + i * bytes, source.base + lane * source.stride, bytes);
      }
    }
  }
};

// One element of one lane. False if what was there had no value.
bool operate(Step& step, int lane, const Place& place, const uint8_t* b, const uint8_t* c, uint8_t* before) {
  const Instr& instr = step.instr;
  const uint32_t bytes = instr.data[BYTES];
  if (place.space != Space::Global && place.space != Space::Shared)
    throw Fault("updates what is neither in global nor in shared memory", lane);
  const bool global = place.space == Space::Global;
  const uint32_t offset = uint32_t(place.address);
  const Scope scope = Scope(instr.data[SCOPE]);
  if (instr.data[KIND] == EXCHANGE) {
    // What is replaced need not have a value.
    const bool undefined = global ? step.launch.strong_read(step, lane, place.address, bytes, scope, before)
                                  : place.cta->shared.strong_read(step, lane, offset, bytes, before);
    if (global) step.launch.strong_write(step, lane, place.address, bytes, scope, b);
    else place.cta->shared.strong_write(step, lane, offset, bytes, b);
    return !undefined;
  }
  uint8_t* at = global ? step.launch.atomic(step, lane, place.address, bytes, scope)
                       : place.cta->shared.atomic(step, lane, offset, bytes);
  std::memcpy(before, at, bytes);
  const Combine combine = reinterpret_cast<Combine>(instr.data[COMBINE]);
  switch (instr.data[KIND]) {
    case COMPARE:
      if (std::memcmp(at, b, bytes) == 0) std::memcpy(at, c, bytes);
      break;
    case PAIR:
      combine(at, b);
      combine(at + 2, b + 2);
      break;
    case SINGLE:
      // "atom.add.f32 on shared memory supports subnormal inputs and results".
      (global ? combine : reductions::combine_floats<reductions::Single, Reduction::Add>)(at, b);
      break;
    default: combine(at, b);
  }
  if (std::memcmp(before, at, bytes) != 0) step.launch.changed();
  return true;
}

Outcome atomic(Step& step) {
  const Instr& instr = step.instr;
  const bool result = instr.data[RESULT];
  const int bytes = instr.data[BYTES], count = instr.data[COUNT], size = bytes * count;
  const int order = instr.data[ORDER];
  const Scope scope = Scope(instr.data[SCOPE]);
  const Places places(step, step.op(result), Space(instr.data[SPACE]));
  Values b, c, before;
  b.gather(step, step.op(result + 1), bytes, count);
  if (instr.data[KIND] == COMPARE) c.gather(step, step.op(result + 2), bytes, count);

  // Nobody knows in which order the lanes of a warp come.
  const int first = step.launch.dice(LANES);
  Mask undefined[8] = {};
  for (int k = 0; k < LANES; ++k) {
    const int lane = (first + k) % LANES;
    if (!(step.active >> lane & 1)) continue;
    if (count > 1 && places[lane].address % size)
      throw Fault(format("updates %d bytes at an address that is not a multiple of them", size), lane);
    for (int i = 0; i < count; ++i) {
      const Place place = {places[lane].space, places[lane].address + i * bytes, places[lane].cta};
      if (!operate(step, lane, place, b.of[lane] + i * bytes, c.of[lane] + i * bytes, before.of[lane] + i * bytes))
        undefined[i] |= 1u << lane;
    }
  }
  for_each_address(places, step.active, bytes, count, [&](uint64_t at, Mask lanes) {
    if (order & ACQUIRES) step.launch.acquire(step.warp, scope, at, lanes);
    else step.launch.relaxed_load(step.warp, scope, at);
    if (order & RELEASES) step.launch.release(step.warp, scope, at, lanes);
    else step.launch.relaxed_store(step.warp, scope, at);
  });

  for (int i = 0; result && i < count; ++i) {
    const Operand& to = element(step.op(0), i);
    if (to.is == Is::Sink) continue;
    FOR_LANES(lane, step.active) {
      unsigned __int128 value = 0;
      std::memcpy(&value, before.of[lane] + i * bytes, bytes);
      step.set(to, lane, value);
    }
    step.set_undefined(to, undefined[i]);
  }
  count_access(step, places, step.active, size);
  return Outcome::Done;
}

// The types of an operation. PTX ISA, atom and red.
Combine combine_of(const std::string& op, const std::string& type) {
  static const std::map<std::string, Reduction> OPS = {
      {"add", Reduction::Add}, {"min", Reduction::Min}, {"max", Reduction::Max}, {"inc", Reduction::Inc},
      {"dec", Reduction::Dec}, {"and", Reduction::And}, {"or", Reduction::Or},   {"xor", Reduction::Xor}};
  static const std::map<std::string, Element> TYPES = {
      {"b32", Element::U32}, {"b64", Element::U64},   {"u32", Element::U32},   {"s32", Element::S32},
      {"u64", Element::U64}, {"s64", Element::S64},   {"f32", Element::F32},   {"f64", Element::F64},
      {"f16", Element::F16}, {"f16x2", Element::F16}, {"bf16", Element::BF16}, {"bf16x2", Element::BF16}};
  const auto found = TYPES.find(type);
  if (found == TYPES.end() || !OPS.count(op)) return nullptr;
  const Reduction reduction = OPS.at(op);
  if ((reduction >= Reduction::And) != (type[0] == 'b' && type[1] != 'f')) return nullptr;
  return combine_of(reduction, found->second);
}

// PTX ISA, atom: the sizes of a vector by that of its elements.
bool has_vector(const std::string& type, int count) {
  if (type == "f32" || type == "f16x2" || type == "bf16x2") return count <= 4;
  return type == "f16" || type == "bf16";
}

void decode_atomic(Words& words, Instr& instr, bool result) {
  need_operands(words, instr, result + 2, result + 4);
  instr.data[RESULT] = result;
  const Space space = take_space(words, instr.ops[result]);
  instr.data[SPACE] = int(space);
  if (space != Space::Generic && space != Space::Global && space != Space::Shared && space != Space::Cluster)
    words.unknown("updates global and shared memory");
  // PTX ISA: .relaxed and .gpu where nothing is said.
  switch (words.take_one({"relaxed", "acquire", "release", "acq_rel"})) {
    case 1: instr.data[ORDER] = ACQUIRES; break;
    case 2: instr.data[ORDER] = RELEASES; break;
    case 3: instr.data[ORDER] = ACQUIRES | RELEASES; break;
  }
  if (!result && instr.data[ORDER] & ACQUIRES) words.unknown("nothing is acquired by what returns nothing");
  const int scope = words.take_one({"cta", "cluster", "gpu", "sys"});
  instr.data[SCOPE] = scope < 0 ? int(Scope::Gpu) : scope;

  static const char* const OPS[] = {"and", "or", "xor", "cas", "exch", "add", "inc", "dec", "min", "max"};
  const std::string op =
      OPS[words.need_one({"and", "or", "xor", "cas", "exch", "add", "inc", "dec", "min", "max"})];
  static const char* const TYPES[] = {"b16", "b32", "b64", "b128", "u32",   "s32",  "u64",
                                      "s64", "f32", "f64", "f16",  "f16x2", "bf16", "bf16x2"};
  constexpr int BYTES_OF[] = {2, 4, 8, 16, 4, 4, 8, 8, 4, 8, 2, 4, 2, 4};
  const int index = words.need_one(
      {"b16", "b32", "b64", "b128", "u32", "s32", "u64", "s64", "f32", "f64", "f16", "f16x2", "bf16", "bf16x2"});
  const std::string type = TYPES[index];
  const int bytes = BYTES_OF[index];
  const bool compares = op == "cas", exchanges = op == "exch", half = type.find("f16") != std::string::npos;
  if (!result && (compares || exchanges)) words.unknown("needs a place for what it returns");
  const Combine combine = combine_of(op, type);
  const bool has = exchanges  ? type == "b32" || type == "b64" || type == "b128"
                   : compares ? type[0] == 'b' && type[1] != 'f'
                              : combine != nullptr;
  if (!has) words.unknown("there is no ." + op + " of type ." + type);
  if (half && !words.take("noftz")) words.unknown("needs .noftz");
  const int vector = words.take_one({"v2", "v4", "v8"});
  const int count = vector < 0 ? 1 : 2 << vector;
  if (count > 1 && (!has_vector(type, count) || (space != Space::Global && space != Space::Generic)))
    words.unknown("there is no such vector in that space");
  if (half && op != "add" && count == 1) words.unknown("is for vectors");
  instr.data[KIND] = compares                     ? COMPARE
                     : exchanges                  ? EXCHANGE
                     : type == "f32"              ? SINGLE
                     : half && type.back() == '2' ? PAIR
                                                  : ONE;
  instr.data[COMBINE] = reinterpret_cast<int64_t>(combine);
  instr.data[BYTES] = bytes;
  instr.data[COUNT] = count;

  const size_t policy = words.take("L2::cache_hint");  // a hint changes no value
  const size_t operands = result + 2 + compares + policy;
  need_operands(words, instr, operands, operands);
  const std::string what = format("registers of at least %d bits", 8 * bytes);
  for (size_t i = 0; i < operands - policy; ++i) {
    const bool written = result && i == 0;
    if (i == result) continue;  // the address
    need_elements(words, instr.ops[i], count, what.c_str(), [&](const Operand& part) {
      if (part.is == Is::Register) return part.width > 1 && part.width >= 8 * bytes;
      return written ? part.is == Is::Sink : part.is == Is::Immediate && bytes <= 8;
    });
  }
  instr.run = atomic;
}

void decode_atom(Words& words, Instr& instr) { decode_atomic(words, instr, true); }

void decode_red(Words& words, Instr& instr) {
  if (words.take("async")) decode_red_async(words, instr);
  else decode_atomic(words, instr, false);
}

// ---- PTX ISA, Parallel Synchronization and Communication Instructions: membar, fence

enum FenceData { FENCE_SCOPE, FENCE_ORDER, PROXY, SC };
enum ProxyBits { IN_SHARED = 1, IN_GLOBAL = 2 };  // of which memory a fence.proxy.async tells

Outcome fence(Step& step) {
  const Instr& instr = step.instr;
  const Scope scope = Scope(instr.data[FENCE_SCOPE]);
  if (instr.data[FENCE_ORDER] & ACQUIRES) step.launch.fence_acquire(step.warp, scope, step.active, instr.data[SC]);
  const int proxy = instr.data[PROXY];
  if (proxy) step.launch.proxy_fence(step.warp, proxy & IN_SHARED, proxy & IN_GLOBAL);
  if (instr.data[FENCE_ORDER] & RELEASES) step.launch.fence_release(step.warp, scope, step.active, instr.data[SC]);
  return Outcome::Done;
}

Outcome nothing(Step&) { return Outcome::Done; }

void set_fence(Instr& instr, int order, Scope scope, int proxy = 0) {
  instr.data[FENCE_ORDER] = order;
  instr.data[FENCE_SCOPE] = int(scope);
  instr.data[PROXY] = proxy;
  instr.run = fence;
}

// .acquire of what lies in the cluster's shared memory, .release of what lies in the CTA's. What else the warp
// has done within its cluster is ordered with it: that much more than the ISA promises.
void take_restricted(Words& words, Instr& instr, int proxy) {
  const bool acquires = words.need_one({"release", "acquire"}) == 1;
  words.need_one({acquires ? "sync_restrict::shared::cluster" : "sync_restrict::shared::cta"});
  words.need_one({"cluster"});
  set_fence(instr, acquires ? ACQUIRES : RELEASES, Scope::Cluster, proxy);
}

void decode_proxy_fence(Words& words, Instr& instr) {
  if (words.take("alias")) {
    // A tensor has one address.
    instr.run = nothing;
  } else if (words.take("async::generic")) {
    take_restricted(words, instr, IN_SHARED);
  } else if (words.take("tensormap::generic")) {
    const bool acquires = words.need_one({"release", "acquire"}) == 1;
    need_operands(words, instr, acquires ? 2 : 0, acquires ? 2 : 0);
    if (acquires &&
        (instr.ops[0].is != Is::Address || instr.ops[1].is != Is::Immediate || instr.ops[1].value != 128))
      words.unknown("takes an address in brackets and 128");
    set_fence(instr, acquires ? ACQUIRES : RELEASES, need_scope(words), IN_GLOBAL);
    return;
  } else {
    words.need_one({"async"});
    const int space = words.take_one({"global", "shared::cta", "shared::cluster"});
    set_fence(instr, 0, Scope::Cta, space < 0 ? IN_SHARED | IN_GLOBAL : space == 0 ? IN_GLOBAL : IN_SHARED);
  }
  need_operands(words, instr, 0, 0);
}

void decode_fence(Words& words, Instr& instr) {
  if (words.take("proxy")) {
    decode_proxy_fence(words, instr);
    return;
  }
  need_operands(words, instr, 0, 0);
  if (words.take("mbarrier_init")) {
    words.need_one({"release"});
    words.need_one({"cluster"});
    set_fence(instr, RELEASES, Scope::Cluster);
    return;
  }
  if (instr.opcode.find("sync_restrict") != std::string::npos) {
    take_restricted(words, instr, 0);
    return;
  }
  const int sem = words.take_one({"sc", "acq_rel", "acquire", "release"});
  const int order = sem == 2 ? ACQUIRES : sem == 3 ? RELEASES : ACQUIRES | RELEASES;
  set_fence(instr, order, need_scope(words));
  instr.data[SC] = sem == 0;
}

// membar is fence.sc.
void decode_membar(Words& words, Instr& instr) {
  need_operands(words, instr, 0, 0);
  if (words.take("proxy")) {
    words.need_one({"alias"});
    instr.run = nothing;
    return;
  }
  constexpr Scope SCOPES[] = {Scope::Cta, Scope::Gpu, Scope::System};
  set_fence(instr, ACQUIRES | RELEASES, SCOPES[words.need_one({"cta", "gl", "sys"})]);
  instr.data[SC] = true;
}

// ---- PTX ISA, Parallel Synchronization and Communication Instructions: griddepcontrol. A launch begins when those
// before it have ended, and those behind it wait for its end.
void decode_griddepcontrol(Words& words, Instr& instr) {
  need_operands(words, instr, 0, 0);
  words.need_one({"launch_dependents", "wait"});
  instr.run = nothing;
}

const Family families[] = {
    {"atom", decode_atom},
    {"red", decode_red},
    {"fence", decode_fence},
    {"membar", decode_membar},
    {"griddepcontrol", decode_griddepcontrol}};

}  // namespace

}  // namespace ptx
