// Logic, shifts, and what counts, finds and moves bits.
#include <algorithm>

#include "lanes.h"

namespace ptx {
namespace {

template <class T>
constexpr int BITS = 8 * sizeof(T);

// PTX ISA, Integer Arithmetic Instructions: popc, clz
template <class T>
uint32_t popc(T a) {
  return __builtin_popcountll(a);
}
template <class T>
uint32_t clz(T a) {
  return a == 0 ? BITS<T> : __builtin_clzll(a) - (64 - BITS<T>);
}

// bfind: the most significant bit that isn't the sign
template <class T>
uint32_t bfind(T a) {
  const std::make_unsigned_t<T> bits = a < 0 ? ~a : a;
  return bits == 0 ? ALL : BITS<T> - 1 - clz(bits);
}
template <class T>
uint32_t bfind_shift(T a) {
  const uint32_t found = bfind(a);
  return found == ALL ? ALL : BITS<T> - 1 - found;
}

// brev
template <class T>
T brev(T a) {
  T reversed = 0;
  for (int i = 0; i < BITS<T>; ++i) reversed |= (a >> i & 1) << (BITS<T> - 1 - i);
  return reversed;
}

// bfe: what lies beyond the field, or beyond the register, is its sign
template <class T>
T bfe(T a, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  if (length == 0) return 0;
  const T shifted = position < BITS<T> ? a >> position : a < 0 ? T(-1) : T(0);
  if (position >= BITS<T> || length >= BITS<T> - position) return shifted;
  const int beyond = BITS<T> - length;
  return T(std::make_unsigned_t<T>(shifted) << beyond) >> beyond;
}

// bfi
template <class T>
T bfi(T a, T b, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  if (position >= BITS<T>) return b;
  const T field = (length >= BITS<T> ? T(-1) : (T(1) << length) - 1) << position;
  return (b & ~field) | (a << position & field);
}

// bmsk
template <bool CLAMP>
uint32_t bmsk(uint32_t position, uint32_t width) {
  if (CLAMP && position >= 32) return 0;
  const uint32_t first = position & 31;
  const uint32_t count = CLAMP ? std::min(width, 32u) : width & 31;
  const uint64_t ones = (uint64_t(1) << count) - 1;
  return uint32_t(ones << first);
}

// szext
template <class T, bool CLAMP>
T szext(T a, uint32_t width) {
  if (CLAMP && width >= 32) return a;
  width &= 31;
  if (width == 0) return 0;
  const int beyond = 32 - width;
  return T(uint32_t(a) << beyond) >> beyond;
}

// fns: the offset-th set bit from `base` on, upwards or downwards
Outcome fns(Step& step) {
  const Source bits = step.source(1), base = step.source(2), offset = step.source(3);
  Target<uint32_t> to(step, step.op(0));
  const Mask undefined = bits.undefined | base.undefined | offset.undefined;
  FOR_LANES(lane, step.active) {
    const uint32_t mask = bits.get<uint32_t>(lane), first = base.get<uint32_t>(lane);
    const int32_t nth = offset.get<int32_t>(lane);
    if (first > 31 && !(undefined >> lane & 1))
      throw Fault(format("starts at bit %u, which has no defined meaning", first), lane);
    uint32_t found = ALL;
    int64_t left = nth == 0 ? 1 : std::abs(int64_t(nth));
    for (int i = first & 31; i >= 0 && i < 32 && found == ALL; i += nth < 0 ? -1 : 1) {
      if (mask >> i & 1 && --left == 0) found = i;
      if (nth == 0) break;
    }
    to.set(lane, found);
  }
  step.set_undefined(step.op(0), undefined);
  return Outcome::Done;
}

// PTX ISA, Logic and Shift Instructions: and, or, xor, not, cnot
template <class T>
T bitwise_xor(T a, T b) {
  return a ^ b;
}
template <class T>
T bitwise_not(T a) {
  return ~a;
}
template <class T>
T cnot(T a) {
  return a == 0;
}

// An operand that decides the result alone (0 of an `and`, ones of an `or`) leaves it defined.
template <class T, Bool OPERATION>
Outcome and_or(Step& step) {
  const Source a = step.source(1), b = step.source(2);
  Target<T> to(step, step.op(0));
  const T decides = OPERATION == Bool::And ? T(0) : T(-1);
  Mask undefined = a.undefined | b.undefined;
  FOR_LANES(lane, step.active) {
    const T x = a.get<T>(lane), y = b.get<T>(lane);
    to.set(lane, OPERATION == Bool::And ? x & y : x | y);
    if (undefined >> lane & 1) {
      const bool by_a = !(a.undefined >> lane & 1) && x == decides;
      const bool by_b = !(b.undefined >> lane & 1) && y == decides;
      if (by_a || by_b) {
        undefined &= ~(1u << lane);
        to.set(lane, decides);
      }
    }
  }
  step.set_undefined(step.op(0), undefined);
  return Outcome::Done;
}

template <Bool OPERATION>
Outcome logic_of_predicates(Step& step) {
  const Truth result = combine(OPERATION, truth(step, step.op(1)), truth(step, step.op(2)));
  step.set_predicate(step.op(0), result.value, result.undefined);
  return Outcome::Done;
}

Outcome not_of_predicate(Step& step) {
  const Truth a = truth(step, step.op(1));
  step.set_predicate(step.op(0), ~a.value, a.undefined);
  return Outcome::Done;
}

// lop3: bit (a << 2 | b << 1 | c) of a table. Undefined where an operand is that the table depends on.
constexpr int TABLE = 0, OPERATION = 1;  // data

Outcome lop3(Step& step) {
  const uint32_t table = step.instr.data[TABLE];
  const auto operation = Bool(step.instr.data[OPERATION]);
  const bool pair = operation != Bool::None;
  const Operand& result = pair ? step.op(0).parts[0] : step.op(0);
  const Source a = step.source(1), b = step.source(2), c = step.source(3);
  Mask undefined = 0, nonzero = 0;
  if ((table >> 4 & 0x0f) != (table & 0x0f)) undefined |= a.undefined;
  if ((table >> 2 & 0x33) != (table & 0x33)) undefined |= b.undefined;
  if ((table >> 1 & 0x55) != (table & 0x55)) undefined |= c.undefined;
  FOR_LANES(lane, step.active) {
    const uint32_t x = a.get<uint32_t>(lane), y = b.get<uint32_t>(lane), z = c.get<uint32_t>(lane);
    uint32_t value = 0;
    for (int row = 0; row < 8; ++row)
      if (table >> row & 1) value |= (row & 4 ? x : ~x) & (row & 2 ? y : ~y) & (row & 1 ? z : ~z);
    if (value != 0) nonzero |= 1u << lane;
    step.set(result, lane, value);
  }
  step.set_undefined(result, undefined);
  if (pair) {
    const Truth p = combine(operation, {nonzero, undefined}, truth(step, step.op(5)));
    step.set_predicate(step.op(0).parts[1], p.value, p.undefined);
  }
  return Outcome::Done;
}

// shl, shr: shifts beyond the register are as shifts by its width
template <class T>
T shl(T a, uint32_t by) {
  return by < BITS<T> ? a << by : 0;
}
template <class T>
T shr(T a, uint32_t by) {
  return by < BITS<T> ? a >> by : a < 0 ? T(-1) : T(0);
}

// shf: of the 64 bits b:a
template <bool CLAMP>
uint32_t shf_l(uint32_t a, uint32_t b, uint32_t by) {
  by = CLAMP ? std::min(by, 32u) : by & 31;
  return uint32_t((uint64_t(b) << 32 | a) << by >> 32);
}
template <bool CLAMP>
uint32_t shf_r(uint32_t a, uint32_t b, uint32_t by) {
  by = CLAMP ? std::min(by, 32u) : by & 31;
  return uint32_t((uint64_t(b) << 32 | a) >> by);
}

// PTX ISA, Data Movement and Conversion Instructions: prmt. Of the bytes of b:a, four by number; with 8
// added, the byte's sign instead. The modes make four numbers of the lowest two bits.
enum Permute { GENERIC = -1, F4E, B4E, RC8, ECL, ECR, RC16 };

template <int MODE>
uint32_t numbers_of(uint32_t selector) {
  if (MODE == GENERIC) return selector & 0xffff;
  const int n = selector & 3;
  uint32_t numbers = 0;
  for (int i = 0; i < 4; ++i) {
    int number = 0;
    switch (MODE) {
      case F4E: number = n + i; break;
      case B4E: number = (n - i) & 7; break;
      case RC8: number = n; break;
      case ECL: number = std::max(n, i); break;
      case ECR: number = std::min(n, i); break;
      case RC16: number = (n & 1) * 2 + (i & 1); break;
    }
    numbers |= number << 4 * i;
  }
  return numbers;
}

template <int MODE>
Outcome prmt(Step& step) {
  const Source a = step.source(1), b = step.source(2), c = step.source(3);
  Target<uint32_t> to(step, step.op(0));
  Mask undefined = c.undefined;
  FOR_LANES(lane, step.active) {
    const uint64_t bytes = uint64_t(b.get<uint32_t>(lane)) << 32 | a.get<uint32_t>(lane);
    const uint32_t numbers = numbers_of<MODE>(c.get<uint32_t>(lane));
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t number = numbers >> 4 * i & 15;
      uint32_t byte = bytes >> 8 * (number & 7) & 0xff;
      if (number & 8) byte = byte & 0x80 ? 0xff : 0;
      value |= byte << 8 * i;
      // A source that no byte comes from may be undefined.
      const Mask from = number & 4 ? b.undefined : a.undefined;
      undefined |= from & 1u << lane;
    }
    to.set(lane, value);
  }
  step.set_undefined(step.op(0), undefined);
  return Outcome::Done;
}

// ---- Decoders

template <class F>
void with_bits(Words& words, F f) {
  if (words.need_one({"b32", "b64"}) == 0) return f(uint32_t());
  return f(uint64_t());
}

template <class F>
void with_all_bits(Words& words, F f) {
  switch (words.need_one({"b16", "b32", "b64"})) {
    case 0: return f(uint16_t());
    case 1: return f(uint32_t());
    default: return f(uint64_t());
  }
}

void decode_popc(Words& words, Instr& instr) {
  with_bits(words, [&](auto type) { use<popc<decltype(type)>>(words, instr); });
}

void decode_clz(Words& words, Instr& instr) {
  with_bits(words, [&](auto type) { use<clz<decltype(type)>>(words, instr); });
}

void decode_brev(Words& words, Instr& instr) {
  with_bits(words, [&](auto type) { use<brev<decltype(type)>>(words, instr); });
}

void decode_bfind(Words& words, Instr& instr) {
  const bool shift = words.take("shiftamt");
  with_words_and_longs(words, [&](auto type) {
    using T = decltype(type);
    shift ? use<bfind_shift<T>>(words, instr) : use<bfind<T>>(words, instr);
  });
}

void decode_bfe(Words& words, Instr& instr) {
  with_words_and_longs(words, [&](auto type) { use<bfe<decltype(type)>>(words, instr); });
}

void decode_bfi(Words& words, Instr& instr) {
  with_bits(words, [&](auto type) { use<bfi<decltype(type)>>(words, instr); });
}

void decode_bmsk(Words& words, Instr& instr) {
  const bool clamp = words.need_one({"clamp", "wrap"}) == 0;
  words.need_one({"b32"});
  clamp ? use<bmsk<true>>(words, instr) : use<bmsk<false>>(words, instr);
}

void decode_szext(Words& words, Instr& instr) {
  const bool clamp = words.need_one({"clamp", "wrap"}) == 0;
  if (words.need_one({"u32", "s32"}) == 0)
    clamp ? use<szext<uint32_t, true>>(words, instr) : use<szext<uint32_t, false>>(words, instr);
  else clamp ? use<szext<int32_t, true>>(words, instr) : use<szext<int32_t, false>>(words, instr);
}

void decode_fns(Words& words, Instr& instr) {
  words.need_one({"b32"});
  need_operands(words, instr, 4, 4);
  need_register(words, instr.ops[0], 32);
  for (int i = 1; i < 4; ++i) need_source(words, instr.ops[i], 32);
  instr.run = fns;
}

template <Bool OPERATION>
void decode_logic(Words& words, Instr& instr) {
  need_operands(words, instr, 3, 3);
  if (words.take("pred")) {
    need_predicate_register(words, instr.ops[0]);
    need_predicate(words, instr.ops[1]);
    need_predicate(words, instr.ops[2]);
    instr.run = logic_of_predicates<OPERATION>;
    return;
  }
  with_all_bits(words, [&](auto type) {
    using T = decltype(type);
    if constexpr (OPERATION == Bool::Xor) {
      use<bitwise_xor<T>>(words, instr);
    } else {
      need_register(words, instr.ops[0], BITS<T>);
      need_source(words, instr.ops[1], BITS<T>);
      need_source(words, instr.ops[2], BITS<T>);
      instr.run = and_or<T, OPERATION>;
    }
  });
}

void decode_not(Words& words, Instr& instr) {
  if (words.take("pred")) {
    need_operands(words, instr, 2, 2);
    need_predicate_register(words, instr.ops[0]);
    need_predicate(words, instr.ops[1]);
    instr.run = not_of_predicate;
    return;
  }
  with_all_bits(words, [&](auto type) { use<bitwise_not<decltype(type)>>(words, instr); });
}

void decode_cnot(Words& words, Instr& instr) {
  with_all_bits(words, [&](auto type) { use<cnot<decltype(type)>>(words, instr); });
}

void decode_lop3(Words& words, Instr& instr) {
  const int operation = words.take_one({"and", "or"});
  words.need_one({"b32"});
  const bool pair = operation >= 0;
  need_operands(words, instr, pair ? 6 : 5, pair ? 6 : 5);
  if (pair) {
    if (instr.ops[0].is != Is::Pair) words.unknown("writes no d|p");
    const auto& parts = instr.ops[0].parts;
    if (parts[0].is != Is::Sink) need_register(words, parts[0], 32);
    need_predicate_register(words, parts[1]);
    need_predicate(words, instr.ops[5]);
  } else {
    need_register(words, instr.ops[0], 32);
  }
  for (int i = 1; i < 4; ++i) need_source(words, instr.ops[i], 32);
  const Operand& table = instr.ops[4];
  if (table.is != Is::Immediate || table.value < 0 || table.value > 255)
    words.unknown("takes a table from 0 to 255");
  instr.data[TABLE] = table.value;
  instr.data[OPERATION] = operation;  // as Bool counts
  instr.run = lop3;
}

void decode_shl(Words& words, Instr& instr) {
  with_all_bits(words, [&](auto type) { use<shl<decltype(type)>>(words, instr); });
}

void decode_shr(Words& words, Instr& instr) {
  if (words.peek()[0] == 'b')
    return with_all_bits(words, [&](auto type) { use<shr<decltype(type)>>(words, instr); });
  with_integer(words, [&](auto type) { use<shr<decltype(type)>>(words, instr); });
}

void decode_shf(Words& words, Instr& instr) {
  const bool left = words.need_one({"l", "r"}) == 0;
  const bool clamp = words.need_one({"clamp", "wrap"}) == 0;
  words.need_one({"b32"});
  if (left) clamp ? use<shf_l<true>>(words, instr) : use<shf_l<false>>(words, instr);
  else clamp ? use<shf_r<true>>(words, instr) : use<shf_r<false>>(words, instr);
}

void decode_prmt(Words& words, Instr& instr) {
  words.need_one({"b32"});
  need_operands(words, instr, 4, 4);
  need_register(words, instr.ops[0], 32);
  for (int i = 1; i < 4; ++i) need_source(words, instr.ops[i], 32);
  switch (words.take_one({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"})) {
    case F4E: instr.run = prmt<F4E>; return;
    case B4E: instr.run = prmt<B4E>; return;
    case RC8: instr.run = prmt<RC8>; return;
    case ECL: instr.run = prmt<ECL>; return;
    case ECR: instr.run = prmt<ECR>; return;
    case RC16: instr.run = prmt<RC16>; return;
    default: instr.run = prmt<GENERIC>; return;
  }
}

const Family family_popc("popc", decode_popc);
const Family family_clz("clz", decode_clz);
const Family family_brev("brev", decode_brev);
const Family family_bfind("bfind", decode_bfind);
const Family family_bfe("bfe", decode_bfe);
const Family family_bfi("bfi", decode_bfi);
const Family family_bmsk("bmsk", decode_bmsk);
const Family family_szext("szext", decode_szext);
const Family family_fns("fns", decode_fns);
const Family family_and("and", decode_logic<Bool::And>);
const Family family_or("or", decode_logic<Bool::Or>);
const Family family_xor("xor", decode_logic<Bool::Xor>);
const Family family_not("not", decode_not);
const Family family_cnot("cnot", decode_cnot);
const Family family_lop3("lop3", decode_lop3);
const Family family_shl("shl", decode_shl);
const Family family_shr("shr", decode_shr);
const Family family_shf("shf", decode_shf);
const Family family_prmt("prmt", decode_prmt);

}  // namespace
}  // namespace ptx
