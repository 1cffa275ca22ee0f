// mov: of registers, constants, addresses, special registers; and between a register and its parts.
#include "lanes.h"
#include "special.h"

namespace ptx {
namespace {

struct Quad {  // 128 bits
  uint64_t low, high;
};

// PTX ISA, Data Movement and Conversion Instructions: mov. A variable's address is in its own space.
template <class T>
T copy(T a) {
  return a;
}

Outcome copy_predicate(Step& step) {
  const Truth a = truth(step, step.op(1));
  step.set_predicate(step.op(0), a.value, a.undefined);
  return Outcome::Done;
}

// Parts of type P into a register of type T, the first part lowest.
template <class T, class P>
Outcome pack(Step& step) {
  constexpr int COUNT = sizeof(T) / sizeof(P);
  const auto& parts = step.op(1).parts;
  Source sources[COUNT];
  Mask undefined = 0;
  for (int i = 0; i < COUNT; ++i) {
    sources[i] = step.source(parts[i]);
    undefined |= sources[i].undefined;
  }
  FOR_LANES(lane, step.active) {
    P values[COUNT];
    for (int i = 0; i < COUNT; ++i) values[i] = sources[i].template get<P>(lane);
    T whole;
    std::memcpy(&whole, values, sizeof(T));
    step.set(step.op(0), lane, whole);
  }
  step.set_undefined(step.op(0), undefined);
  if (undefined & step.active) {
    auto& bytes = step.warp.undefined_bytes[step.op(0).reg];
    for (size_t i = 0; i < sizeof(T); ++i) bytes[i] = sources[i / sizeof(P)].undefined | ~step.active;
  }
  return Outcome::Done;
}

template <class T, class P>
Outcome unpack(Step& step) {
  constexpr int COUNT = sizeof(T) / sizeof(P);
  const auto& parts = step.op(0).parts;
  const Source whole = step.source(1);
  FOR_LANES(lane, step.active) {
    const T value = whole.get<T>(lane);
    P values[COUNT];
    std::memcpy(values, &value, sizeof(T));
    for (int i = 0; i < COUNT; ++i) step.set(parts[i], lane, values[i]);
  }
  // One of the parts may be the register that was read.
  Mask undefined[COUNT];
  for (Mask& part : undefined) part = whole.undefined;
  const auto known = step.warp.undefined_bytes.find(step.op(1).reg);
  if (whole.undefined && known != step.warp.undefined_bytes.end())
    for (int i = 0; i < COUNT; ++i) {
      Mask any = 0;
      for (size_t byte = 0; byte < sizeof(P); ++byte) any |= known->second[i * sizeof(P) + byte];
      undefined[i] &= any;
    }
  for (int i = 0; i < COUNT; ++i) step.set_undefined(parts[i], undefined[i]);
  return Outcome::Done;
}

Outcome read_special(Step& step) {
  const auto& special = *reinterpret_cast<const Special*>(step.instr.data[0]);
  const uint64_t mask = ~uint64_t(0) >> (64 - step.op(0).width);
  FOR_LANES(lane, step.active) step.set(step.op(0), lane, special.value(step, lane) & mask);
  step.set_undefined(step.op(0), 0);
  return Outcome::Done;
}

Outcome read_special_predicate(Step& step) {
  const auto& special = *reinterpret_cast<const Special*>(step.instr.data[0]);
  Mask values = 0;
  FOR_LANES(lane, step.active) values |= Mask(special.value(step, lane)) << lane;
  step.set_predicate(step.op(0), values, 0);
  return Outcome::Done;
}

// ---- Decoders

void decode_special(Words& words, Instr& instr, int bits) {
  const Operand& source = instr.ops[1];
  const Special* special = special_register(source.word);
  if (special == nullptr) words.unknown("the machine has no special register " + source.word);
  // %gridid has had 32 bits.
  if (bits != special->width && !(source.word == "%gridid" && bits == 32))
    words.unknown(format("%s has %d bits", source.word.c_str(), special->width));
  instr.data[0] = reinterpret_cast<int64_t>(special);
  instr.run = bits == 1 ? read_special_predicate : read_special;
}

// f(a part's type) for so many parts of a T
template <class T, class F>
void with_parts(const Words& words, size_t count, F f) {
  if constexpr (sizeof(T) >= 8)
    if (count * 8 == sizeof(T)) return f(uint64_t());
  if constexpr (sizeof(T) >= 4)
    if (count * 4 == sizeof(T)) return f(uint32_t());
  if (count * 2 == sizeof(T)) return f(uint16_t());
  if (count == sizeof(T)) return f(uint8_t());
  words.unknown(format("has %zu parts of %zu bytes", count, sizeof(T)));
}

template <class T>
void decode_mov_of(Words& words, Instr& instr, bool bits) {
  const Operand& to = instr.ops[0];
  const Operand& from = instr.ops[1];
  if (to.is != Is::Vector && from.is != Is::Vector) return use<copy<T>>(words, instr);
  if (!bits) words.unknown("only .b types have parts");
  const Operand& vector = to.is == Is::Vector ? to : from;
  with_parts<T>(words, vector.parts.size(), [&](auto part) {
    using P = decltype(part);
    if constexpr (sizeof(P) < sizeof(T)) {
      if (to.is == Is::Vector) {
        need_source(words, from, 8 * sizeof(T));
        for (const Operand& each : vector.parts)
          if (each.is != Is::Sink) need_register(words, each, 8 * sizeof(P));
        instr.run = unpack<T, P>;
      } else {
        need_register(words, to, 8 * sizeof(T));
        for (const Operand& each : vector.parts) need_source(words, each, 8 * sizeof(P));
        instr.run = pack<T, P>;
      }
    } else {
      words.unknown("has one part");
    }
  });
}

void decode_mov(Words& words, Instr& instr) {
  need_operands(words, instr, 2, 2);
  const bool special = instr.ops[1].is == Is::Special;
  if (words.take("pred")) {
    need_predicate_register(words, instr.ops[0]);
    if (special) return decode_special(words, instr, 1);
    need_predicate(words, instr.ops[1]);
    instr.run = copy_predicate;
    return;
  }
  const std::string type = words.next();
  const std::string size = type.empty() ? "" : type.substr(1);
  const bool bits = type[0] == 'b';
  const bool integer = bits || type[0] == 'u' || type[0] == 's';
  const bool scalar = integer || type[0] == 'f';
  if (integer && special) {
    const int width = size == "16" ? 16 : size == "32" ? 32 : 64;
    need_register(words, instr.ops[0], width);
    // Thread indices have had 16 bits.
    if (width == 16 && instr.ops[1].word.find("id.") != std::string::npos) {
      decode_special(words, instr, 32);
      return;
    }
    return decode_special(words, instr, width);
  }
  if (integer && size == "16") return decode_mov_of<uint16_t>(words, instr, bits);
  if (scalar && size == "32") return decode_mov_of<uint32_t>(words, instr, bits);
  if (scalar && size == "64") return decode_mov_of<uint64_t>(words, instr, bits);
  if (bits && size == "128") return decode_mov_of<Quad>(words, instr, bits);
  words.unknown("needs .pred or a type of 16 to 128 bits");
}

const Family family_mov("mov", decode_mov);

}  // namespace
}  // namespace ptx
