// wgmma. PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Operation".
//
// The four warps of a warpgroup issue a wgmma.mma_async each on its own; it starts when the last of them has.
// From then until one of them has waited for it, shared memory that it reads may not be written; until a warp
// itself has waited, that warp's accumulators have no value and its registers of A may not be written. So
// nobody can tell when it is computed: that is done when the first warp waits.
#include <algorithm>
#include <deque>
#include <map>
#include <tuple>

#include "families.h"
#include "fragments.h"
#include "wgmma_tiles.h"

namespace ptx {
namespace {

constexpr int WARPS = 4, WARP_ROWS = 16, ROWS = WARPS * WARP_ROWS;
constexpr int MOST_N = 256, MOST_K = 32;

// In Instr::data. FLAGS: see below.
enum { N, K, A, B, ACCUMULATOR, FLAGS };
enum { A_IN_REGISTERS = 1, A_NEGATED = 2, B_NEGATED = 4, A_TRANSPOSED = 8, B_TRANSPOSED = 16, SATFINITE = 32 };

// ---- What a warpgroup has under way

struct Multiply {
  const Instr* instr;
  uint64_t a = 0, b = 0;  // descriptors
  bool accumulates = false;
  int issued = 0;  // a bit a warp
  Clock clock;     // what all of them have seen
  const Tile *tile_a = nullptr, *tile_b = nullptr;
  bool done = false;  // and then seen by whoever has seen this time of this agent
  int agent = 0;
  uint32_t time = 0;
};

struct Register {
  uint32_t written = 0;      // fences that had been when an ordinary instruction wrote it, plus one
  uint32_t accessed = 0;     // the same for any access
  uint32_t accumulated = 0;  // the same for a wgmma
  uint32_t shape = 0;        // of that wgmma
  int line = 0;              // of the last wgmma that used it
  int accumulating = 0;      // wgmmas that the warp hasn't waited for
  int reading = 0;
  Mask undefined = 0;  // what it will be
};

struct Member {
  Warp* warp = nullptr;
  uint64_t issued = 0, waited = 0;  // wgmmas
  std::deque<uint64_t> groups;      // committed and not waited for: how many had been issued
  uint32_t fences = 0;
  std::vector<Register> registers;
};

struct Warpgroup {
  Member members[WARPS];
  std::deque<Multiply> multiplies;
  uint64_t first = 0;  // the number of multiplies.front()
  std::map<std::tuple<uint64_t, int, int, bool>, Tile> tiles;

  Multiply& multiply(uint64_t number) { return multiplies[number - first]; }

  const Tile& tile(uint64_t descriptor, int length, int k, bool mn_major) {
    auto [at, made] = tiles.try_emplace({descriptor, length, k, mn_major});
    if (made) at->second = tile_of(Descriptor(descriptor), length, k, mn_major);
    return at->second;
  }
};

Warpgroup& warpgroup_of(Step& step) {
  Warp& warp = step.warp;
  if (!warp.wgmma) {
    const auto made = std::make_shared<Warpgroup>();
    const int first = warp.index / WARPS * WARPS;
    if (step.active != ALL || first + WARPS > int(step.cta.warps.size()))
      throw Fault("needs four whole warps, the first of which is a multiple of four");
    for (int i = 0; i < WARPS; ++i) {
      made->members[i].warp = step.cta.warps[first + i].get();
      made->members[i].registers.resize(step.launch.program.widths.size());
      step.cta.warps[first + i]->wgmma = made;
    }
  }
  return *static_cast<Warpgroup*>(warp.wgmma.get());
}
Member& member_of(Warpgroup& group, const Warp& warp) { return group.members[warp.index % WARPS]; }

uint32_t shape_of(const Instr& instr) {
  return instr.data[N] << 16 | instr.data[K] << 8 | instr.data[ACCUMULATOR];
}

// ---- Issue

// An operand that must be the same in all lanes.
uint64_t uniform(Step& step, const Operand& operand, const char* what) {
  const Source source = step.defined(operand, what);
  const uint64_t value = source.get<uint64_t>(0);
  for (int lane = 1; lane < LANES; ++lane)
    if (source.get<uint64_t>(lane) != value) throw Fault(format("has %s that differs between lanes", what), lane);
  return value;
}

// Accumulators that the wgmma before it wrote need no fence if that had the same shape; all else does that
// was written since the last one, and accumulators that were read.
void use_registers(Step& step, Member& member) {
  const Instr& instr = step.instr;
  if (member.fences == 0) throw Fault("needs a wgmma.fence before it, the first of its warp");
  const uint32_t since = member.fences + 1, shape = shape_of(instr);
  const auto check = [&](const Operand& part, const char* as) {
    const Register& of = member.registers[part.reg];
    if (of.written == since)
      throw Fault(format("needs a wgmma.fence: a register of its %s was written since the last one", as));
    const bool input = *as == 'A';
    if (of.accessed == since && !input)
      throw Fault(format("needs a wgmma.fence: a register of its %s was read since the last one", as));
    if (of.accumulated == since && (input || of.shape != shape))
      throw Fault(format(
          "needs a wgmma.fence: a register of its %s was an accumulator%s in line %d", as,
          input ? "" : " of another shape", of.line));
  };
  for (const Operand& part : instr.ops[0].parts) {
    if (part.is != Is::Register) throw Fault("accumulates in something that is no register");
    check(part, "accumulators");
    Register& of = member.registers[part.reg];
    if (of.reading || (of.accumulating && of.shape != shape))
      throw Fault(
          format("accumulates in registers that the wgmma of line %d still uses, without a wait", of.line));
  }
  if (instr.data[FLAGS] & A_IN_REGISTERS)
    for (const Operand& part : instr.ops[1].parts) {
      if (part.is != Is::Register) continue;
      check(part, "A");
      Register& of = member.registers[part.reg];
      if (of.accumulating)
        throw Fault(format("takes for A what the wgmma of line %d still accumulates in", of.line));
      ++of.reading;
      of.line = instr.line;
    }
  for (const Operand& part : instr.ops[0].parts) {
    Register& of = member.registers[part.reg];
    Mask& undefined = step.warp.undefined[part.reg];
    if (of.accumulating++ == 0) of.undefined = undefined;
    undefined = ALL;
    step.warp.undefined_bytes.erase(part.reg);
    of.shape = shape;
    of.accumulated = since;
    of.line = instr.line;
  }
}

void meet(Clock& clock, const Clock& other) {
  const auto least = [](std::vector<uint32_t>& of, const std::vector<uint32_t>& with) {
    of.resize(std::min(of.size(), with.size()));
    for (size_t i = 0; i < of.size(); ++i) of[i] = std::min(of[i], with[i]);
  };
  least(clock.seen, other.seen);
  least(clock.fenced, other.fenced);
}

// What all four warps have seen, the multiply may read.
void start(Cta& cta, Multiply& multiply) {
  Warp reader;
  reader.clock = multiply.clock;
  for (const Tile* tile : {multiply.tile_a, multiply.tile_b})
    if (tile != nullptr)
      for (const Tile::Range& range : tile->ranges)
        cta.shared.begin_read(reader, multiply.instr->line, range.offset, range.bytes);
}

// PTX ISA, "Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async"
Outcome mma_async(Step& step) {
  Warpgroup& group = warpgroup_of(step);
  if (step.active != ALL) throw Fault("needs all 32 lanes of its warp");
  Member& member = member_of(group, step.warp);
  const Instr& instr = step.instr;
  const int64_t* data = instr.data;
  const int flags = data[FLAGS];
  const bool in_registers = flags & A_IN_REGISTERS;
  const uint64_t a = in_registers ? 0 : uniform(step, step.op(1), "a descriptor");
  const uint64_t b = uniform(step, step.op(2), "a descriptor");
  const Mask accumulates = step.defined_predicate(step.op(3), "its scale-d");
  if (accumulates != 0 && accumulates != ALL) throw Fault("has a scale-d that differs between lanes");

  const uint64_t number = member.issued;
  if (number == group.first + group.multiplies.size()) {
    Multiply multiply;
    multiply.instr = &instr;
    multiply.a = a;
    multiply.b = b;
    multiply.accumulates = accumulates;
    multiply.clock = step.warp.clock;
    if (!in_registers) multiply.tile_a = &group.tile(a, ROWS, data[K], flags & A_TRANSPOSED);
    multiply.tile_b = &group.tile(b, data[N], data[K], flags & B_TRANSPOSED);
    group.multiplies.push_back(std::move(multiply));
  }
  Multiply& multiply = group.multiply(number);
  if (multiply.instr != &instr)
    throw Fault(format("is what another warp of its warpgroup has in line %d", multiply.instr->line));
  if (multiply.a != a || multiply.b != b || multiply.accumulates != (accumulates != 0))
    throw Fault("has other descriptors, or another scale-d, than another warp of its warpgroup");
  use_registers(step, member);
  ++member.issued;
  meet(multiply.clock, step.warp.clock);
  multiply.issued |= 1 << step.warp.index % WARPS;
  if (multiply.issued == (1 << WARPS) - 1) {
    start(step.cta, multiply);
    step.launch.changed();
  }
  step.count.multiplies += WARP_ROWS * data[N] * data[K];
  return Outcome::Done;
}

// ---- Computation

// A matrix of shared memory as [k][length], or [length][k] if `by_length`. `undefined`: by row of M, or column
// of N.
template <Element E>
void read_tile(
    SharedMemory& shared, const Tile& tile, int length, int k, bool mn_major, bool by_length, double* to,
    uint8_t* undefined) {
  constexpr int ITEM = bits_of(E) / 8, IN_CHUNK = CHUNK / ITEM;
  bool any = false;
  for (const Tile::Range& range : tile.ranges) any |= shared.undefined(range.offset, range.bytes);
  const int lines = mn_major ? k : length;
  for (int line = 0; line < lines; ++line)
    for (int chunk = 0; chunk < tile.per_line; ++chunk) {
      const uint32_t offset = tile.chunks[line * tile.per_line + chunk];
      const uint8_t* from = shared.bytes(offset);
      for (int i = 0; i < IN_CHUNK; ++i) {
        uint32_t word = 0;
        std::memcpy(&word, from + ITEM * i, ITEM);
        const int along = chunk * IN_CHUNK + i;
        const int x = mn_major ? along : line, y = mn_major ? line : along;
        to[by_length ? x * k + y : y * length + x] = value_of<E>(word, 0);
        if (any) undefined[x] |= shared.undefined(offset + ITEM * i, ITEM);
      }
    }
}

// The fragment of the accumulators: registers go along n by eights, and in each like C and D of mma. Calls
// `does(register, lane, j, row, column)`: j is the half of a register of two f16.
template <class Does>
void for_accumulators(int n, bool halves, const Does& does) {
  for (int i = 0; i < n / 2; ++i)
    for (int lane = 0; lane < LANES; ++lane)
      does(
          halves ? i / 2 : i, lane, halves ? i % 2 : 0, lane / 4 + 8 * (i >> 1 & 1),
          (i >> 2) * 8 + lane % 4 * 2 + (i & 1));
}

void compute(Cta& cta, Launch& launch, Warpgroup& group, const Multiply& multiply) {
  const Instr& instr = *multiply.instr;
  const int n = instr.data[N], k = instr.data[K], flags = instr.data[FLAGS];
  static thread_local double a[ROWS * MOST_K], b[MOST_N * MOST_K], d[ROWS * MOST_N];
  uint8_t undefined_rows[ROWS] = {}, undefined_columns[MOST_N] = {};

  with_element(Element(instr.data[B]), [&](auto e) {
    if constexpr (bits_of(e()) >= 8 && bits_of(e()) <= 32)
      read_tile<e()>(cta.shared, *multiply.tile_b, n, k, flags & B_TRANSPOSED, false, b, undefined_columns);
  });
  with_element(Element(instr.data[A]), [&](auto e) {
    if constexpr (bits_of(e()) >= 8 && bits_of(e()) <= 32) {
      if (multiply.tile_a != nullptr) {
        read_tile<e()>(cta.shared, *multiply.tile_a, ROWS, k, flags & A_TRANSPOSED, true, a, undefined_rows);
      } else {
        for (int w = 0; w < WARPS; ++w) {
          Count count;
          Step step{launch, cta, *group.members[w].warp, instr, ALL, ALL, count};
          const uint32_t rows = gather_a<e()>(step, instr.ops[1], WARP_ROWS, k, &a[w * WARP_ROWS * k]);
          for (int row = 0; row < WARP_ROWS; ++row) undefined_rows[w * WARP_ROWS + row] = rows >> row & 1;
        }
      }
    }
  });
  if (bool(flags & A_NEGATED) != bool(flags & B_NEGATED))
    for (int i = 0; i < ROWS * k; ++i) a[i] = -a[i];

  const Element sum = Element(instr.data[ACCUMULATOR]);
  const bool halves = sum == Element::F16;
  const Operand* parts = instr.ops[0].parts.data();
  std::fill_n(d, ROWS * n, 0.0);
  if (multiply.accumulates)
    for (int w = 0; w < WARPS; ++w) {
      Warp& warp = *group.members[w].warp;
      with_element(sum, [&](auto e) {
        if constexpr (e() == Element::F16 || e() == Element::F32 || e() == Element::S32)
          for_accumulators(n, halves, [&](int i, int lane, int j, int row, int column) {
            uint32_t word;
            std::memcpy(&word, warp.at(parts[i]) + 4 * lane, 4);
            d[(w * WARP_ROWS + row) * n + column] = value_of<e()>(word, j);
          });
      });
    }

  multiply_add(a, b, d, ROWS, n, k);

  const bool any = std::count(undefined_rows, undefined_rows + ROWS, 1) +
                   std::count(undefined_columns, undefined_columns + MOST_N, 1);
  for (int w = 0; w < WARPS; ++w) {
    Warp& warp = *group.members[w].warp;
    std::vector<Register>& registers = group.members[w].registers;
    if (!multiply.accumulates)
      for (const Operand& part : instr.ops[0].parts) registers[part.reg].undefined = 0;
    for_accumulators(n, halves, [&](int i, int lane, int j, int row, int column) {
      const int in_group = w * WARP_ROWS + row;
      const double value = d[in_group * n + column];
      char* to = warp.at(parts[i]) + 4 * lane;
      if (halves) {
        const uint16_t half = to_half(value);
        std::memcpy(to + 2 * j, &half, 2);
      } else {
        const uint32_t word =
            sum == Element::F32 ? bits_of(rounded_to_float(value)) : rounded_to_s32(value, flags & SATFINITE);
        std::memcpy(to, &word, 4);
      }
      if (any && (undefined_rows[in_group] || undefined_columns[column]))
        registers[parts[i].reg].undefined |= 1u << lane;
    });
  }
}

// Computes what nobody has waited for so far. Reads end at the time of the first warp that knows it, and the
// others learn of them when they wait: a warp of a group that has waited speaks for all four.
void finish(Step& step, Warpgroup& group, Multiply& multiply) {
  compute(step.cta, step.launch, group, multiply);
  multiply.done = true;
  multiply.agent = step.warp.agent;
  multiply.time = step.warp.clock.seen[step.warp.agent];
  for (const Tile* tile : {multiply.tile_a, multiply.tile_b})
    if (tile != nullptr)
      for (const Tile::Range& range : tile->ranges)
        step.cta.shared.end_read(multiply.agent, multiply.time, multiply.instr->line, range.offset, range.bytes);
}

void let_go(Member& member, const Multiply& multiply) {
  const Instr& instr = *multiply.instr;
  for (const Operand& part : instr.ops[0].parts) {
    Register& of = member.registers[part.reg];
    if (--of.accumulating == 0) member.warp->undefined[part.reg] = of.undefined;
  }
  if (instr.data[FLAGS] & A_IN_REGISTERS)
    for (const Operand& part : instr.ops[1].parts)
      if (part.is == Is::Register) --member.registers[part.reg].reading;
  std::vector<uint32_t>& seen = member.warp->clock.seen;
  if (int(seen.size()) <= multiply.agent) seen.resize(multiply.agent + 1);
  seen[multiply.agent] = std::max(seen[multiply.agent], multiply.time);
}

// PTX ISA, "Asynchronous Multiply-and-Accumulate Instruction: wgmma.wait_group"
Outcome wait_group(Step& step) {
  if (!step.warp.wgmma) return Outcome::Done;
  Warpgroup& group = warpgroup_of(step);
  Member& member = member_of(group, step.warp);
  const size_t may_be_pending = step.op(0).value;
  if (member.groups.size() <= may_be_pending) return Outcome::Done;
  const uint64_t target = member.groups[member.groups.size() - may_be_pending - 1];
  if (target > member.waited && group.multiply(target - 1).issued != (1 << WARPS) - 1) return Outcome::Wait;
  member.groups.erase(member.groups.begin(), member.groups.end() - may_be_pending);
  bool first = false;
  for (; member.waited < target; ++member.waited) {
    Multiply& multiply = group.multiply(member.waited);
    if (!multiply.done) finish(step, group, multiply), first = true;
    let_go(member, multiply);
  }
  if (first) Launch::tick(step.warp);
  const auto all_waited = [&] {
    return std::all_of(
        group.members, group.members + WARPS, [&](const Member& of) { return of.waited > group.first; });
  };
  while (!group.multiplies.empty() && all_waited()) {
    group.multiplies.pop_front();
    ++group.first;
  }
  return Outcome::Done;
}

// PTX ISA, "Asynchronous Multiply-and-Accumulate Instruction: wgmma.commit_group"
Outcome commit_group(Step& step) {
  Member& member = member_of(warpgroup_of(step), step.warp);
  member.groups.push_back(member.issued);
  return Outcome::Done;
}

// PTX ISA, "Asynchronous Multiply-and-Accumulate Instruction: wgmma.fence"
Outcome fence(Step& step) {
  ++member_of(warpgroup_of(step), step.warp).fences;
  return Outcome::Done;
}

// ---- Decoding

bool valid(int n, int k, Element d, Element a, Element b) {
  if (n < 8 || n > MOST_N || n % 8) return false;
  if (is_integer(a)) {
    // Of the odd multiples of 8, integers have 8 and 24 only.
    return bits_of(a) == 8 && is_integer(b) && bits_of(b) == 8 && d == Element::S32 && k == 32 &&
           (n % 16 == 0 || n == 8 || n == 24);
  }
  const bool small = a == Element::E4M3 || a == Element::E5M2;
  if (small)
    return (b == Element::E4M3 || b == Element::E5M2) && k == 32 && (d == Element::F32 || d == Element::F16);
  if (a != b) return false;
  if (a == Element::F16) return k == 16 && (d == Element::F32 || d == Element::F16);
  return d == Element::F32 && ((a == Element::BF16 && k == 16) || (a == Element::TF32 && k == 8));
}

void decode_mma_async(Words& words, Instr& instr) {
  if (words.take("sp")) words.unknown("the machine has no sparse matrices");
  if (!words.take("sync") || !words.take("aligned")) words.unknown("wgmma.mma_async is .sync.aligned");
  const std::string shape = words.next();
  int m = 0, n = 0, k = 0;
  if (std::sscanf(shape.c_str(), "m%dn%dk%d", &m, &n, &k) != 3 || m != ROWS)
    words.unknown("wgmma has no shape " + shape);
  const bool satfinite = words.take("satfinite");
  const std::string type = words.next();
  const Element d = element_of(words, type), a = element_of(words, words.next());
  const Element b = element_of(words, words.next());
  if (!valid(n, k, d, a, b) || (satfinite && d != Element::S32))
    words.unknown("the machine's wgmma has no such shape with such types");
  if (words.take("satfinite")) words.unknown("has .satfinite twice");

  // D, A, B, scale-d, then scales of A and B unless of integers, then for 16 bits what is transposed: A too
  // unless it is in registers.
  const bool in_registers = instr.ops.size() > 1 && instr.ops[1].is == Is::Vector;
  const int scales = is_integer(a) ? 0 : 2;
  const int transposes = bits_of(a) != 16 ? 0 : in_registers ? 1 : 2;
  need_operands(words, instr, 4 + scales + transposes, 4 + scales + transposes);
  need_registers(words, instr.ops[0], n / 2 / in_word(d), 32, "D");
  if (instr.ops[0].is != Is::Vector) words.unknown("its D is a vector");
  if (in_registers) need_registers(words, instr.ops[1], WARP_ROWS * k / LANES / in_word(a), 32, "A");
  else need_registers(words, instr.ops[1], 1, 64, "descriptor");
  need_registers(words, instr.ops[2], 1, 64, "descriptor");
  int flags = (in_registers ? A_IN_REGISTERS : 0) | (satfinite ? SATFINITE : 0);
  const auto immediate = [&](int i, int64_t first, int64_t second, int flag) {
    const Operand& op = instr.ops[i];
    if (op.is != Is::Immediate || (op.value != first && op.value != second))
      words.unknown(format("operand %d is %lld or %lld", i, (long long)first, (long long)second));
    if (op.value == second) flags |= flag;
  };
  if (scales) {
    immediate(4, 1, -1, A_NEGATED);
    immediate(5, 1, -1, B_NEGATED);
  }
  if (transposes == 2) immediate(6, 0, 1, A_TRANSPOSED);
  if (transposes) immediate(5 + transposes, 0, 1, B_TRANSPOSED);
  instr.aligned = true;
  const int64_t data[] = {n, k, int64_t(a), int64_t(b), int64_t(d), flags};
  std::copy(std::begin(data), std::end(data), instr.data);
  instr.run = mma_async;
}

void decode_wgmma(Words& words, Instr& instr) {
  const std::string what = words.next();
  if (what == "mma_async") return decode_mma_async(words, instr);
  if (!words.take("sync") || !words.take("aligned")) words.unknown("wgmma is .sync.aligned");
  instr.aligned = true;
  if (what == "fence") {
    need_operands(words, instr, 0, 0);
    instr.run = fence;
  } else if (what == "commit_group") {
    need_operands(words, instr, 0, 0);
    instr.run = commit_group;
  } else if (what == "wait_group") {
    need_operands(words, instr, 1, 1);
    if (instr.ops[0].is != Is::Immediate) words.unknown("takes a number of groups");
    instr.run = wait_group;
  } else {
    words.unknown("the machine has no wgmma." + what);
  }
}

const Family wgmma("wgmma", decode_wgmma);

}  // namespace

void wgmma_dirtied(Step& step) {
  if (!step.warp.wgmma) return;  // nothing since the first fence, as there has been none
  Warpgroup& group = *static_cast<Warpgroup*>(step.warp.wgmma.get());
  Member& member = member_of(group, step.warp);
  for (const Operand& op : step.instr.registers()) member.registers[op.reg].accessed = member.fences + 1;
  for (const Operand& to : step.instr.destinations()) {
    Register& of = member.registers[to.reg];
    if (of.accumulating || of.reading)
      throw Fault(format("writes a register that the wgmma of line %d still uses, without a wait", of.line));
    of.written = member.fences + 1;
  }
}

}  // namespace ptx
