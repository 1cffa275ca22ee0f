// Comparisons, what chooses by them, and the properties of floating-point numbers.
#include "lanes.h"
#include "numbers.h"

namespace ptx {
namespace {

// ---- setp, set

// How two numbers can lie; a comparison is the set of those that it is true of.
enum : int { LESS = 1, EQUAL = 2, GREATER = 4, UNORDERED = 8 };
constexpr int COMPARISON = 0, OPERATION = 1;  // data: the set, and the Bool with operand 3

// What is compared: the value of a register's bits.
template <class T>
T itself(T value) {
  return value;
}
float flushed(float value) { return flush(value); }
float flushed_half(uint16_t bits) { return bits & 0x7c00 ? from_half(bits) : from_half(bits & 0x8000); }
template <float (*VALUE)(uint16_t)>
float lower(uint32_t bits) {
  return VALUE(uint16_t(bits));
}
template <float (*VALUE)(uint16_t)>
float upper(uint32_t bits) {
  return VALUE(uint16_t(bits >> 16));
}

template <class V>
int relation(V a, V b) {
  return a < b ? LESS : a == b ? EQUAL : a > b ? GREATER : UNORDERED;
}

template <auto VALUE>
struct Compared;

template <class V, class R, V (*VALUE)(R)>
struct Compared<VALUE> {
  using Raw = R;
  static Mask mask(Step& step, const Source& a, const Source& b) {
    const int comparison = step.instr.data[COMPARISON];
    Mask result = 0;
    FOR_LANES(lane, step.active) {
      const int is = relation(VALUE(a.template get<R>(lane)), VALUE(b.template get<R>(lane)));
      if (comparison & is) result |= 1u << lane;
    }
    return result;
  }
};

// p = t OP c, and so it is of q
Truth with_operand(Step& step, Truth t) {
  const auto operation = Bool(step.instr.data[OPERATION]);
  return operation == Bool::None ? t : combine(operation, t, truth(step, step.op(3)));
}

// PTX ISA, Comparison and Selection Instructions: setp. q is made of the complement.
template <auto VALUE>
Outcome setp(Step& step) {
  const Source a = step.source(1), b = step.source(2);
  const Mask t = Compared<VALUE>::mask(step, a, b), undefined = a.undefined | b.undefined;
  const Operand& to = step.op(0);
  const Truth p = with_operand(step, {t, undefined});
  if (to.is != Is::Pair) {
    step.set_predicate(to, p.value, p.undefined);
  } else {
    const Truth q = with_operand(step, {~t, undefined});
    step.set_predicate(to.parts[0], p.value, p.undefined);
    step.set_predicate(to.parts[1], q.value, q.undefined);
  }
  return Outcome::Done;
}

// PTX ISA, Half Precision Comparison Instructions: setp of two halves: p of the lower, q of the upper
template <auto LOWER, auto UPPER>
Outcome setp_x2(Step& step) {
  const Source a = step.source(1), b = step.source(2);
  const Mask undefined = a.undefined | b.undefined;
  const Truth p = with_operand(step, {Compared<LOWER>::mask(step, a, b), undefined});
  const Truth q = with_operand(step, {Compared<UPPER>::mask(step, a, b), undefined});
  const Operand& to = step.op(0);
  const bool pair = to.is == Is::Pair;
  step.set_predicate(pair ? to.parts[0] : to, p.value, p.undefined);
  if (pair) step.set_predicate(to.parts[1], q.value, q.undefined);
  return Outcome::Done;
}

// set: data[ONE] where it is true, zero where not
constexpr int ONE = 2;

template <auto VALUE>
Outcome set(Step& step) {
  const Source a = step.source(1), b = step.source(2);
  const Mask t = Compared<VALUE>::mask(step, a, b);
  const Truth result = with_operand(step, {t, a.undefined | b.undefined});
  const uint32_t one = step.instr.data[ONE];
  FOR_LANES(lane, step.active) step.set(step.op(0), lane, result.value >> lane & 1 ? one : 0);
  step.set_undefined(step.op(0), result.undefined);
  return Outcome::Done;
}

template <auto LOWER, auto UPPER>
Outcome set_x2(Step& step) {
  const Source a = step.source(1), b = step.source(2);
  const Mask undefined = a.undefined | b.undefined;
  const Truth low = with_operand(step, {Compared<LOWER>::mask(step, a, b), undefined});
  const Truth high = with_operand(step, {Compared<UPPER>::mask(step, a, b), undefined});
  const uint32_t one = step.instr.data[ONE];
  FOR_LANES(lane, step.active) {
    step.set(step.op(0), lane, (low.value >> lane & 1) * one | (high.value >> lane & 1) * one << 16);
  }
  step.set_undefined(step.op(0), low.undefined | high.undefined);
  return Outcome::Done;
}

struct Comparison {
  const char* word;
  int relations;
};
constexpr Comparison OF_ALL[] = {{"eq", EQUAL},        {"ne", LESS | GREATER}, {"lt", LESS},
                                 {"le", LESS | EQUAL}, {"gt", GREATER},        {"ge", GREATER | EQUAL}};
constexpr Comparison OF_UNSIGNED[] = {
    {"lo", LESS}, {"ls", LESS | EQUAL}, {"hi", GREATER}, {"hs", GREATER | EQUAL}};
constexpr Comparison OF_FLOATS[] = {{"equ", EQUAL | UNORDERED},      {"neu", LESS | GREATER | UNORDERED},
                                    {"ltu", LESS | UNORDERED},       {"leu", LESS | EQUAL | UNORDERED},
                                    {"gtu", GREATER | UNORDERED},    {"geu", GREATER | EQUAL | UNORDERED},
                                    {"num", LESS | EQUAL | GREATER}, {"nan", UNORDERED}};

// The comparison, as far as the type has it, and what it is combined with.
void decode_comparison(Words& words, Instr& instr, const std::string& type) {
  const bool floats = type[0] == 'f' || type.substr(0, 2) == "bf";
  auto take = [&](const Comparison& comparison) {
    const bool taken = words.take(comparison.word);
    if (taken) instr.data[COMPARISON] = comparison.relations;
    return taken;
  };
  bool found = false;
  for (const Comparison& comparison : OF_ALL)
    if (!found) found = take(comparison);
  const int relations = instr.data[COMPARISON];
  if (type[0] == 'b' && !floats && relations != EQUAL && relations != (LESS | GREATER)) found = false;
  if (type[0] == 'u')
    for (const Comparison& comparison : OF_UNSIGNED)
      if (!found) found = take(comparison);
  if (floats)
    for (const Comparison& comparison : OF_FLOATS)
      if (!found) found = take(comparison);
  if (!found) words.unknown("there is no such comparison of ." + type);
  const int operation = words.take_one({"and", "or", "xor"});
  instr.data[OPERATION] = operation;  // as Bool counts
  const size_t operands = operation < 0 ? 3 : 4;
  need_operands(words, instr, operands, operands);
  if (operation >= 0) need_predicate(words, instr.ops[3]);
}

struct Runs {
  Run setp, set;
};

template <auto VALUE>
Runs runs(const Words& words, const Instr& instr) {
  constexpr int BITS = 8 * sizeof(typename Compared<VALUE>::Raw);
  need_source(words, instr.ops[1], BITS);
  need_source(words, instr.ops[2], BITS);
  return {setp<VALUE>, set<VALUE>};
}

template <auto VALUE>
Runs runs_x2(const Words& words, const Instr& instr) {
  need_source(words, instr.ops[1], 32);
  need_source(words, instr.ops[2], 32);
  return {setp_x2<lower<VALUE>, upper<VALUE>>, set_x2<lower<VALUE>, upper<VALUE>>};
}

Runs runs_of(Words& words, const Instr& instr, const std::string& type, bool ftz) {
  if (type == "f16") return ftz ? runs<flushed_half>(words, instr) : runs<from_half>(words, instr);
  if (type == "f16x2") return ftz ? runs_x2<flushed_half>(words, instr) : runs_x2<from_half>(words, instr);
  if (type == "f32") return ftz ? runs<flushed>(words, instr) : runs<itself<float>>(words, instr);
  if (ftz) words.unknown("there is no .ftz of ." + type);
  if (type == "bf16") return runs<from_bf16>(words, instr);
  if (type == "bf16x2") return runs_x2<from_bf16>(words, instr);
  if (type == "f64") return runs<itself<double>>(words, instr);
  if (type == "s16") return runs<itself<int16_t>>(words, instr);
  if (type == "s32") return runs<itself<int32_t>>(words, instr);
  if (type == "s64") return runs<itself<int64_t>>(words, instr);
  if (type == "u16" || type == "b16") return runs<itself<uint16_t>>(words, instr);
  if (type == "u32" || type == "b32") return runs<itself<uint32_t>>(words, instr);
  if (type == "u64" || type == "b64") return runs<itself<uint64_t>>(words, instr);
  words.unknown("compares no ." + type);
}

// The last word of an opcode.
std::string last_word(const Words& words) { return words.opcode().substr(words.opcode().rfind('.') + 1); }

void decode_setp(Words& words, Instr& instr) {
  const bool ftz = words.take("ftz");
  const std::string type = last_word(words);
  if (!words.take(type.c_str())) words.unknown("needs a type");
  decode_comparison(words, instr, type);
  const Operand& to = instr.ops[0];
  if (to.is == Is::Pair) {
    if (type == "f16" || type == "bf16") words.unknown("there is no p|q of ." + type);
    for (const Operand& part : to.parts) need_predicate_register(words, part);
  } else {
    need_predicate_register(words, to);
  }
  instr.run = runs_of(words, instr, type, ftz).setp;
}

void decode_set(Words& words, Instr& instr) {
  const bool ftz = words.take("ftz");
  const std::string type = last_word(words);
  // The type of the result stands before that of the sources, and may be the same.
  const std::string before = words.opcode().substr(0, words.opcode().size() - type.size() - 1);
  const std::string result = before.substr(before.rfind('.') + 1);
  if (!words.take(result.c_str()) || !words.take(type.c_str())) words.unknown("needs two types");
  decode_comparison(words, instr, type);
  const bool halves = type == "f16" || type == "bf16";
  const bool pair = type == "f16x2" || type == "bf16x2";
  int width = 32;
  int64_t& one = instr.data[ONE];
  if (pair && result == type) {
    one = type == "f16x2" ? 0x3c00 : 0x3f80;
  } else if (pair && (result == "u32" || result == "s32")) {
    one = 0xffff;
  } else if (!pair && (result == "u32" || result == "s32")) {
    one = 0xffffffff;
  } else if (!pair && !halves && result == "f32") {
    one = bits_of(1.0f);
  } else if (halves && (result == "u16" || result == "s16")) {
    one = 0xffff;
    width = 16;
  } else if (!pair && type != "bf16" && result == "f16") {
    one = 0x3c00;
    width = 16;
  } else if (!pair && result == "bf16") {
    one = 0x3f80;
    width = 16;
    if (ftz) words.unknown("there is no .ftz to .bf16");
  } else {
    words.unknown("makes no ." + result + " of ." + type);
  }
  need_register(words, instr.ops[0], width);
  instr.run = runs_of(words, instr, type, ftz).set;
}

// ---- selp, slct: undefined only if what they choose is, or what chooses

template <class T>
void choose(Step& step, Mask first, Mask undefined) {
  const Source a = step.source(1), b = step.source(2);
  Target<T> to(step, step.op(0));
  FOR_LANES(lane, step.active) to.set(lane, first >> lane & 1 ? a.get<T>(lane) : b.get<T>(lane));
  step.set_undefined(step.op(0), undefined | (a.undefined & first) | (b.undefined & ~first));
}

// PTX ISA, Comparison and Selection Instructions: selp
template <class T>
Outcome selp(Step& step) {
  const Truth c = truth(step, step.op(3));
  choose<T>(step, c.value, c.undefined);
  return Outcome::Done;
}

// slct: by the sign of c. -0 is not negative, a NaN takes b.
template <class T, class C, C (*VALUE)(C)>
Outcome slct(Step& step) {
  const Source c = step.source(3);
  Mask first = 0;
  FOR_LANES(lane, step.active) {
    if (VALUE(c.get<C>(lane)) >= 0) first |= 1u << lane;
  }
  choose<T>(step, first, c.undefined);
  return Outcome::Done;
}

template <class F>
void with_any(const Words& words, const std::string& type, F f) {
  for (const char* each : {"b16", "u16", "s16"})
    if (type == each) return f(uint16_t());
  for (const char* each : {"b32", "u32", "s32", "f32"})
    if (type == each) return f(uint32_t());
  for (const char* each : {"b64", "u64", "s64", "f64"})
    if (type == each) return f(uint64_t());
  words.unknown("needs a type of 16, 32 or 64 bits");
}

template <class T>
void need_choice(const Words& words, const Instr& instr) {
  need_operands(words, instr, 4, 4);
  need_register(words, instr.ops[0], 8 * sizeof(T));
  need_source(words, instr.ops[1], 8 * sizeof(T));
  need_source(words, instr.ops[2], 8 * sizeof(T));
}

void decode_selp(Words& words, Instr& instr) {
  with_any(words, words.next(), [&](auto type) {
    using T = decltype(type);
    need_choice<T>(words, instr);
    need_predicate(words, instr.ops[3]);
    instr.run = selp<T>;
  });
}

void decode_slct(Words& words, Instr& instr) {
  const bool ftz = words.take("ftz");
  const std::string type = words.next();
  const bool by_float = words.need_one({"s32", "f32"}) == 1;
  if (ftz && !by_float) words.unknown("there is no .ftz of .s32");
  with_any(words, type, [&](auto of) {
    using T = decltype(of);
    need_choice<T>(words, instr);
    need_source(words, instr.ops[3], 32);
    if (!by_float) instr.run = slct<T, int32_t, itself<int32_t>>;
    else instr.run = ftz ? slct<T, float, flushed> : slct<T, float, itself<float>>;
  });
}

// ---- PTX ISA, Floating Point Instructions: testp, copysign

enum Property { FINITE, INFINITE, NUMBER, NOTANUMBER, NORMAL, SUBNORMAL };

template <class T, int PROPERTY>
Outcome testp(Step& step) {
  const Source a = step.source(1);
  Mask result = 0;
  FOR_LANES(lane, step.active) {
    const int kind = std::fpclassify(a.get<T>(lane));
    bool is = false;
    switch (PROPERTY) {
      case FINITE: is = kind != FP_NAN && kind != FP_INFINITE; break;
      case INFINITE: is = kind == FP_INFINITE; break;
      case NUMBER: is = kind != FP_NAN; break;
      case NOTANUMBER: is = kind == FP_NAN; break;
      case NORMAL: is = kind == FP_NORMAL || kind == FP_ZERO; break;  // zeros count as normal
      case SUBNORMAL: is = kind == FP_SUBNORMAL; break;
    }
    if (is) result |= 1u << lane;
  }
  step.set_predicate(step.op(0), result, a.undefined);
  return Outcome::Done;
}

template <class T>
Run testp_of(int property) {
  switch (property) {
    case FINITE: return testp<T, FINITE>;
    case INFINITE: return testp<T, INFINITE>;
    case NUMBER: return testp<T, NUMBER>;
    case NOTANUMBER: return testp<T, NOTANUMBER>;
    case NORMAL: return testp<T, NORMAL>;
    default: return testp<T, SUBNORMAL>;
  }
}

void decode_testp(Words& words, Instr& instr) {
  const int property = words.need_one({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  const bool single = words.need_one({"f32", "f64"}) == 0;
  need_operands(words, instr, 2, 2);
  need_predicate_register(words, instr.ops[0]);
  need_source(words, instr.ops[1], single ? 32 : 64);
  instr.run = single ? testp_of<float>(property) : testp_of<double>(property);
}

// The sign is of the first source, and of a NaN's bits too.
template <class T>
T copysign_bits(T a, T b) {
  const T sign = T(1) << (8 * sizeof(T) - 1);
  return (a & sign) | (b & ~sign);
}

void decode_copysign(Words& words, Instr& instr) {
  if (words.need_one({"f32", "f64"}) == 0) use<copysign_bits<uint32_t>>(words, instr);
  else use<copysign_bits<uint64_t>>(words, instr);
}

const Family family_setp("setp", decode_setp);
const Family family_set("set", decode_set);
const Family family_selp("selp", decode_selp);
const Family family_slct("slct", decode_slct);
const Family family_testp("testp", decode_testp);
const Family family_copysign("copysign", decode_copysign);

}  // namespace
}  // namespace ptx
