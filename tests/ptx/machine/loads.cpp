// Loads and stores of every state space.
#include <algorithm>

#include "access.h"

namespace ptx {

namespace {

enum Data { BYTES, COUNT, SIGNED, SPACE, ORDER, SCOPE, CHECK };
enum class Order { Weak, Relaxed, Ordered };      // Ordered: acquire of a load, release of a store
enum class Check { None, NonCoherent, Uniform };  // what .nc and ldu promise
constexpr int MOST = 32;                          // bytes of a vector
constexpr int MOST_ELEMENTS = 8;

// ---- Memory of a thread: local, the parameters of calls, those of the kernel

struct Bytes {
  uint8_t* data;
  uint8_t* undefined;  // by byte; null where all is defined
};

Bytes bytes_of_thread(
    Step& step, int lane, const Place& place, uint32_t bytes, uint32_t alignment, const char* access) {
  Warp& warp = step.warp;
  std::vector<uint8_t>* data = nullptr;
  std::vector<uint8_t>* undefined = nullptr;
  uint64_t size = 0;
  const char* name = "";
  switch (place.space) {
    case Space::Local:
      data = &warp.local;
      undefined = &warp.local_undefined;
      size = step.launch.program.local;
      name = "local memory";
      break;
    case Space::Scratch:
      data = &warp.scratch;
      undefined = &warp.scratch_undefined;
      size = step.launch.program.scratch;
      name = "the parameters of calls";
      break;
    default:
      data = &step.launch.parameters;
      size = data->size();
      name = "the kernel's parameters";
  }
  if (place.address > size || bytes > size - place.address)
    throw Fault(
        format(
            "%s %u bytes at %lld of %s, of %llu bytes", access, bytes, (long long)place.address, name,
            (unsigned long long)size),
        lane);
  if (place.address % alignment)
    throw Fault(
        format(
            "%s %u bytes at %llu of %s, not a multiple of %u", access, bytes, (unsigned long long)place.address,
            name, alignment),
        lane);
  const uint64_t at = place.space == Space::Parameter ? place.address : lane * size + place.address;
  return {data->data() + at, undefined == nullptr ? nullptr : undefined->data() + at};
}

bool is_strong(const Step& step) { return Order(step.instr.data[ORDER]) != Order::Weak; }
Scope scope_of(const Step& step) { return Scope(step.instr.data[SCOPE]); }

// ---- PTX ISA, Data Movement and Conversion Instructions: ld, ld.global.nc, ldu

// Reads for a lane; whether what it read is undefined.
bool read(Step& step, int lane, const Place& place, uint32_t bytes, uint32_t alignment, void* to) {
  const bool strong = is_strong(step);
  switch (place.space) {
    case Space::Global:
      return strong ? step.launch.strong_read(step, lane, place.address, bytes, scope_of(step), to)
                    : step.launch.read(step, lane, place.address, bytes, alignment, to);
    case Space::Shared: {
      const uint32_t offset = uint32_t(place.address);
      return strong ? place.cta->shared.strong_read(step, lane, offset, bytes, to)
                    : place.cta->shared.read(step, lane, offset, bytes, alignment, to);
    }
    default: {
      if (strong) throw Fault("is ordered, in memory of one thread", lane);
      const Bytes from = bytes_of_thread(step, lane, place, bytes, alignment, "reads");
      std::memcpy(to, from.data, bytes);
      return from.undefined != nullptr && std::count(from.undefined, from.undefined + bytes, 1) > 0;
    }
  }
}

// What is accessed element by element is one vector to its address.
void check_whole(Step& step, int lane, const Place& place, uint32_t size, const char* access) {
  if (place.space == Space::Global) step.launch.region(place.address, size, size, lane, access);
  else if (place.address % size)
    throw Fault(format("%s %u bytes at an address that is not a multiple of them", access, size), lane);
}

// What .nc promises: nobody stores there while the kernel runs.
void check_only_read(Step& step, int lane, const Place& place, uint32_t bytes) {
  if (place.space != Space::Global) return;
  const Region& region = step.launch.region(place.address, bytes, 1, lane, "reads");
  if (region.stored.empty()) return;
  const uint64_t offset = place.address - uint64_t(region.data);
  for (uint64_t i = offset; i < offset + bytes; ++i)
    if (region.stored[i].cluster)
      throw Fault(
          format(
              "reads %s as read-only memory, which line %u stores to", region.element(i).c_str(),
              region.stored[i].line),
          lane);
}

void check_uniform(const Places& places, Mask lanes) {
  const int first = __builtin_ctz(lanes);
  FOR_LANES(lane, lanes) {
    if (places[lane].name() != places[first].name())
      throw Fault("has another address in this lane than in others of its warp", lane);
  }
}

// Writes a register that may be wider than what was read.
void set_extended(Step& step, const Operand& to, int lane, const uint8_t* from, int bytes, bool is_signed) {
  unsigned __int128 wide = 0;
  if (bytes == 16) {
    std::memcpy(&wide, from, 16);
    step.set(to, lane, wide);
    return;
  }
  uint64_t value = 0;
  std::memcpy(&value, from, bytes);
  if (is_signed) value = uint64_t(int64_t(value << (64 - 8 * bytes)) >> (64 - 8 * bytes));
  if (to.width < 64) value &= (uint64_t(1) << to.width) - 1;
  step.set(to, lane, value);
}

bool has_sink(const Operand& operand) {
  for (const Operand& part : operand.parts)
    if (part.is == Is::Sink) return true;
  return false;
}

Outcome load(Step& step) {
  const Instr& instr = step.instr;
  const uint32_t bytes = instr.data[BYTES], count = instr.data[COUNT], size = bytes * count;
  const Order order = Order(instr.data[ORDER]);
  const Scope scope = scope_of(step);
  const Operand& to = step.op(0);
  const Places places(step, step.op(1), Space(instr.data[SPACE]));
  if (Check(instr.data[CHECK]) == Check::Uniform) check_uniform(places, step.active);

  uint8_t values[LANES][MOST];
  Mask undefined[MOST_ELEMENTS] = {};
  // A strong vector is a strong access an element, and of what goes to a sink nothing is read.
  const bool apart = (order != Order::Weak && count > 1) || has_sink(to);
  FOR_LANES(lane, step.active) {
    const Place& place = places[lane];
    if (!apart && !read(step, lane, place, size, size, values[lane])) continue;
    check_whole(step, lane, place, size, "reads");
    for (uint32_t i = 0; i < count; ++i) {
      if (element(to, i).is == Is::Sink) continue;
      const Place part = {place.space, place.address + i * bytes, place.cta};
      if (read(step, lane, part, bytes, bytes, values[lane] + i * bytes)) undefined[i] |= 1u << lane;
    }
  }
  if (Check(instr.data[CHECK]) != Check::None)
    FOR_LANES(lane, step.active) check_only_read(step, lane, places[lane], size);
  if (order == Order::Ordered)
    for_each_address(places, step.active, bytes, count, [&](uint64_t at, Mask by) {
      step.launch.acquire(step.warp, scope, at, by);
    });
  else if (order == Order::Relaxed)
    for_each_address(places, step.active, bytes, count, [&](uint64_t at, Mask) {
      step.launch.relaxed_load(step.warp, scope, at);
    });

  for (uint32_t i = 0; i < count; ++i) {
    const Operand& part = element(to, i);
    if (part.is == Is::Sink) continue;
    FOR_LANES(lane, step.active) {
      set_extended(step, part, lane, values[lane] + i * bytes, bytes, instr.data[SIGNED]);
    }
    step.set_undefined(part, undefined[i]);
  }
  count_access(step, places, step.active, size);
  return Outcome::Done;
}

// ---- PTX ISA, Data Movement and Conversion Instructions: st

void write(Step& step, int lane, const Place& place, uint32_t bytes, uint32_t alignment, const void* from) {
  const bool strong = is_strong(step);
  switch (place.space) {
    case Space::Global:
      if (strong) step.launch.strong_write(step, lane, place.address, bytes, scope_of(step), from);
      else step.launch.write(step, lane, place.address, bytes, alignment, from);
      break;
    case Space::Shared: {
      const uint32_t offset = uint32_t(place.address);
      if (strong) place.cta->shared.strong_write(step, lane, offset, bytes, from);
      else place.cta->shared.write(step, lane, offset, bytes, alignment, from);
      break;
    }
    case Space::Parameter: throw Fault("stores to the kernel's parameters", lane);
    default: {
      if (strong) throw Fault("is ordered, in memory of one thread", lane);
      const Bytes to = bytes_of_thread(step, lane, place, bytes, alignment, "stores");
      std::memcpy(to.data, from, bytes);
      std::memset(to.undefined, 0, bytes);
    }
  }
}

bool of_one_thread(const Place& place) { return place.space == Space::Local || place.space == Space::Scratch; }

// Two lanes of one instruction that store different values to a place: nobody knows which one stays.
void check_conflicts(Step& step, const Places& places, const uint8_t (*values)[MOST], uint32_t size) {
  int lanes[LANES];
  int n = 0;
  bool ascending = true;
  uint64_t end = 0;
  FOR_LANES(lane, step.active) {
    if (places[lane].space != Space::Global) continue;
    ascending &= n == 0 || places[lane].address >= end;
    end = places[lane].address + size;
    lanes[n++] = lane;
  }
  if (ascending) return;
  std::sort(lanes, lanes + n, [&](int a, int b) { return places[a].address < places[b].address; });
  for (int i = 1; i < n; ++i) {
    const int a = lanes[i - 1], b = lanes[i];
    // Both are multiples of their size.
    if (places[a].address != places[b].address || std::memcmp(values[a], values[b], size) == 0) continue;
    const Region& region = step.launch.region(places[b].address, size, size, b, "stores");
    throw Fault(
        format(
            "stores to %s what lane %d of the same warp stores other values to",
            region.element(places[b].address - uint64_t(region.data)).c_str(), a),
        b);
  }
}

Outcome store(Step& step) {
  const Instr& instr = step.instr;
  const uint32_t bytes = instr.data[BYTES], count = instr.data[COUNT], size = bytes * count;
  const Order order = Order(instr.data[ORDER]);
  const Scope scope = scope_of(step);
  const Operand& from = step.op(1);
  const Places places(step, step.op(0), Space(instr.data[SPACE]));
  Mask shared = 0;  // lanes whose memory others can read: it takes no undefined values
  FOR_LANES(lane, step.active) {
    if (!of_one_thread(places[lane])) shared |= 1u << lane;
  }

  uint8_t values[LANES][MOST];
  Mask undefined[MOST_ELEMENTS] = {};
  for (uint32_t i = 0; i < count; ++i) {
    const Operand& part = element(from, i);
    if (part.is == Is::Sink) continue;
    const Source source = step.source(part);
    if (source.undefined & shared)
      throw Fault("stores an undefined value", __builtin_ctz(source.undefined & shared));
    undefined[i] = source.undefined;
    FOR_LANES(lane, step.active) {
      std::memcpy(values[lane] + i * bytes, source.base + lane * source.stride, bytes);
    }
  }

  const bool apart = (order != Order::Weak && count > 1) || has_sink(from);
  if (order == Order::Weak && !apart) check_conflicts(step, places, values, size);
  FOR_LANES(lane, step.active) {
    const Place& place = places[lane];
    if (!apart) {
      write(step, lane, place, size, size, values[lane]);
    } else {
      check_whole(step, lane, place, size, "stores");
      for (uint32_t i = 0; i < count; ++i)
        if (element(from, i).is != Is::Sink)
          write(
              step, lane, {place.space, place.address + i * bytes, place.cta}, bytes, bytes,
              values[lane] + i * bytes);
    }
    if (!of_one_thread(place)) continue;
    const Bytes to = bytes_of_thread(step, lane, place, size, size, "stores");
    for (uint32_t i = 0; i < count; ++i)
      if (undefined[i] >> lane & 1) std::memset(to.undefined + i * bytes, 1, bytes);
  }
  if (order == Order::Ordered)
    for_each_address(places, step.active, bytes, count, [&](uint64_t at, Mask by) {
      step.launch.release(step.warp, scope, at, by);
    });
  else if (order == Order::Relaxed)
    for_each_address(places, step.active, bytes, count, [&](uint64_t at, Mask) {
      step.launch.relaxed_store(step.warp, scope, at);
    });
  count_access(step, places, step.active, size);
  return Outcome::Done;
}

// ---- Words of ld and st

// The type and the vector: BYTES, COUNT, SIGNED.
void take_type(Words& words, Instr& instr) {
  const int count = words.take_one({"v2", "v4", "v8"});
  const int type = words.need_one(
      {"b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "b128"});
  constexpr int BYTES_OF[] = {1, 1, 1, 2, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 16};
  instr.data[BYTES] = BYTES_OF[type];
  instr.data[COUNT] = count < 0 ? 1 : 2 << count;
  instr.data[SIGNED] = type == 2 || type == 5 || type == 8 || type == 12;
}

// The operand that is read into, or whose values are stored.
void check_vector(const Words& words, const Instr& instr, const Operand& operand, bool written) {
  const int bytes = instr.data[BYTES], count = instr.data[COUNT];
  const bool wide = bytes * count == 32 && bytes >= 4 && Space(instr.data[SPACE]) == Space::Global;
  if (bytes * count > 16 && !wide) words.unknown("a vector has at most 16 bytes, in .global 32");
  if (count > 4 && !wide) words.unknown(".v8 is for 32 bytes");
  const std::string what = format("registers of at least %d bits", 8 * bytes);
  need_elements(words, operand, count, what.c_str(), [&](const Operand& part) {
    switch (part.is) {
      case Is::Register: return part.width > 1 && part.width >= 8 * bytes;
      case Is::Sink: return wide || (written && count > 1);
      case Is::Immediate: return !written && bytes <= 8;
      case Is::Vector:
      case Is::Address:
      case Is::Pair:
      case Is::NotPredicate: return false;
      default: return !written && bytes >= 4 && bytes <= 8;  // a variable's address
    }
  });
}

// .weak, .volatile, .relaxed, and `ordered`: .acquire or .release.
void take_order(Words& words, Instr& instr, const char* ordered) {
  if (words.take("mmio")) words.unknown("the machine has no memory-mapped devices: .mmio");
  Order order = Order::Weak;
  Scope scope = Scope::System;
  switch (words.take_one({"weak", "volatile", "relaxed", ordered})) {
    case 1: order = Order::Relaxed; break;
    case 2:
      order = Order::Relaxed;
      scope = need_scope(words);
      break;
    case 3:
      order = Order::Ordered;
      scope = need_scope(words);
      break;
  }
  instr.data[ORDER] = int(order);
  instr.data[SCOPE] = int(scope);
  const Space space = Space(instr.data[SPACE]);
  if (order != Order::Weak && space != Space::Generic && space != Space::Global && space != Space::Shared &&
      space != Space::Cluster)
    words.unknown("only .global and .shared memory is ordered");
}

void decode_ld(Words& words, Instr& instr) {
  need_operands(words, instr, 2, 3);
  instr.data[SPACE] = int(take_space(words, instr.ops[1]));
  take_order(words, instr, "acquire");
  if (instr.data[ORDER] == int(Order::Weak)) {
    words.take_one({"ca", "cg", "cs", "lu", "cv"});  // performance alone
    if (words.take("nc")) {
      if (Space(instr.data[SPACE]) != Space::Global) words.unknown(".nc is of .global");
      instr.data[CHECK] = int(Check::NonCoherent);
    }
  }
  const size_t policy = take_cache_hints(words);
  need_operands(words, instr, 2 + policy, 2 + policy);
  take_type(words, instr);
  check_vector(words, instr, instr.ops[0], true);
  instr.run = load;
}

// PTX ISA, Data Movement and Conversion Instructions: ldu. Generic addresses or .global.
void decode_ldu(Words& words, Instr& instr) {
  need_operands(words, instr, 2, 2);
  instr.data[SPACE] = int(take_space(words, instr.ops[1]));
  if (Space(instr.data[SPACE]) != Space::Global && Space(instr.data[SPACE]) != Space::Generic)
    words.unknown("reads .global");
  instr.data[CHECK] = int(Check::Uniform);
  take_type(words, instr);
  if (instr.data[BYTES] * instr.data[COUNT] > 16) words.unknown("a vector has at most 16 bytes");
  check_vector(words, instr, instr.ops[0], true);
  instr.run = load;
}

void decode_st(Words& words, Instr& instr) {
  if (words.take("async")) {
    decode_st_async(words, instr);
    return;
  }
  need_operands(words, instr, 2, 3);
  const Space space = take_space(words, instr.ops[0]);
  instr.data[SPACE] = int(space);
  if (space == Space::Const) words.unknown("constant memory is only read");
  // A register's address in .param is that of a call's parameters.
  if (space == Space::Parameter) {
    if (instr.ops[0].parts[0].is == Is::Parameter) words.unknown("the kernel's parameters are only read");
    instr.data[SPACE] = int(Space::Scratch);
  }
  take_order(words, instr, "release");
  if (instr.data[ORDER] == int(Order::Weak)) words.take_one({"wb", "cg", "cs", "wt"});  // performance alone
  const size_t policy = take_cache_hints(words);
  need_operands(words, instr, 2 + policy, 2 + policy);
  take_type(words, instr);
  check_vector(words, instr, instr.ops[1], false);
  instr.run = store;
}

// ---- Between a caller's parameters and those of what it calls

Outcome copy_scratch(Step& step) {
  const uint32_t bytes = step.op(2).value;
  FOR_LANES(lane, step.active) {
    const Place from = {
        step.op(1).is == Is::Parameter ? Space::Parameter : Space::Scratch, uint64_t(step.op(1).value), nullptr};
    const Bytes source = bytes_of_thread(step, lane, from, bytes, 1, "reads");
    const Bytes to =
        bytes_of_thread(step, lane, {Space::Scratch, uint64_t(step.op(0).value), nullptr}, bytes, 1, "stores");
    std::memcpy(to.data, source.data, bytes);
    if (source.undefined == nullptr) std::memset(to.undefined, 0, bytes);
    else std::memcpy(to.undefined, source.undefined, bytes);
  }
  return Outcome::Done;
}

void decode_copy(Words& words, Instr& instr) {
  if (!words.take("scratch")) words.unknown("the machine has no such instruction");
  need_operands(words, instr, 3, 3);
  const Is to = instr.ops[0].is, from = instr.ops[1].is;
  if (to != Is::Scratch || (from != Is::Scratch && from != Is::Parameter) || instr.ops[2].is != Is::Immediate)
    words.unknown("copies parameters");
  instr.run = copy_scratch;
}

const Family families[] = {{"ld", decode_ld}, {"ldu", decode_ldu}, {"st", decode_st}, {"copy", decode_copy}};

}  // namespace

}  // namespace ptx
