// Integer arithmetic, and its extended-precision forms.
#include <algorithm>
#include <limits>

#include "families.h"
#include "lanes.h"

namespace ptx {

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// The type of a product of two T.
template <class T>
using Twice = std::conditional_t<
    sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
    std::conditional_t<
        sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
        std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>>;

bool of_float(const Words& words) {
  const std::string opcode = words.opcode() + ".";
  for (const char* type : {".f16.", ".f16x2.", ".bf16.", ".bf16x2.", ".f32.", ".f32x2.", ".f64."})
    if (opcode.find(type) != std::string::npos) return true;
  return false;
}

int32_t clamp(int64_t value) {
  return int32_t(
      std::clamp<int64_t>(value, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()));
}

// PTX ISA, Integer Arithmetic Instructions: add, sub
template <class T>
T add(T a, T b) {
  return T(Unsigned<T>(a) + Unsigned<T>(b));
}
template <class T>
T sub(T a, T b) {
  return T(Unsigned<T>(a) - Unsigned<T>(b));
}
int32_t add_sat(int32_t a, int32_t b) { return clamp(int64_t(a) + b); }
int32_t sub_sat(int32_t a, int32_t b) { return clamp(int64_t(a) - b); }

// mul
template <class T>
Twice<T> mul_wide(T a, T b) {
  return Twice<T>(a) * Twice<T>(b);
}
template <class T>
T mul_lo(T a, T b) {
  return T(mul_wide(a, b));
}
template <class T>
T mul_hi(T a, T b) {
  return T(mul_wide(a, b) >> (8 * sizeof(T)));
}

// mad
template <class T>
T mad_lo(T a, T b, T c) {
  return add(mul_lo(a, b), c);
}
template <class T>
T mad_hi(T a, T b, T c) {
  return add(mul_hi(a, b), c);
}
template <class T>
Twice<T> mad_wide(T a, T b, Twice<T> c) {
  return add(mul_wide(a, b), c);
}
int32_t mad_hi_sat(int32_t a, int32_t b, int32_t c) { return clamp(int64_t(mul_hi(a, b)) + c); }

// mul24, mad24: the lower 24 bits of each factor
int64_t mul24_wide(int32_t a, int32_t b) {
  const int32_t lower_a = int32_t(uint32_t(a) << 8) >> 8;
  const int32_t lower_b = int32_t(uint32_t(b) << 8) >> 8;
  return int64_t(lower_a) * lower_b;
}
uint64_t mul24_wide(uint32_t a, uint32_t b) { return uint64_t(a & 0xffffff) * (b & 0xffffff); }
template <class T>
T mul24_lo(T a, T b) {
  return T(mul24_wide(a, b));
}
template <class T>
T mul24_hi(T a, T b) {
  return T(mul24_wide(a, b) >> 16);
}
template <class T>
T mad24_lo(T a, T b, T c) {
  return add(mul24_lo(a, b), c);
}
template <class T>
T mad24_hi(T a, T b, T c) {
  return add(mul24_hi(a, b), c);
}
int32_t mad24_hi_sat(int32_t a, int32_t b, int32_t c) { return clamp(int64_t(mul24_hi(a, b)) + c); }

// sad
template <class T>
T sad(T a, T b, T c) {
  return add(c, a < b ? sub(b, a) : sub(a, b));
}

// abs, neg
template <class T>
T neg(T a) {
  return sub(T(0), a);
}
template <class T>
T absolute(T a) {
  return a < 0 ? neg(a) : a;
}

// min, max
template <class T>
T smaller(T a, T b) {
  return std::min(a, b);
}
template <class T>
T larger(T a, T b) {
  return std::max(a, b);
}
template <class T>
T smaller_relu(T a, T b) {
  return std::max<T>(std::min(a, b), 0);
}
template <class T>
T larger_relu(T a, T b) {
  return std::max<T>(std::max(a, b), 0);
}

// .u16x2, .s16x2: F of the lower halves, and of the upper ones
template <auto F>
uint32_t halves(uint32_t a, uint32_t b) {
  const uint16_t low = F(a, b);
  const uint16_t high = F(a >> 16, b >> 16);
  return low | uint32_t(high) << 16;
}

// div, rem: a quotient by zero is "an unspecified, machine-specific value", so it is undefined.
template <class T, bool REM>
Outcome divide(Step& step) {
  const Source a = step.source(1), b = step.source(2);
  Target<T> to(step, step.op(0));
  Mask by_zero = 0;
  FOR_LANES(lane, step.active) {
    const T dividend = a.get<T>(lane), divisor = b.get<T>(lane);
    if (divisor == 0) {
      by_zero |= 1u << lane;
      to.set(lane, T(-1));
    } else if (std::is_signed_v<T> && divisor == T(-1)) {  // of the smallest number: it wraps
      to.set(lane, REM ? T(0) : neg(dividend));
    } else {
      to.set(lane, REM ? dividend % divisor : dividend / divisor);
    }
  }
  step.set_undefined(step.op(0), a.undefined | b.undefined | by_zero);
  return Outcome::Done;
}

// PTX ISA, Extended-Precision Integer Arithmetic Instructions: add.cc, addc, sub.cc, subc, mad.cc, madc.
// The carry is that of a + ~b + 1 in sub: it leaves one where nothing is borrowed, and subc takes it so. The ISA speaks
// of a borrow and leaves open what addc makes of one; in nvcc's division of 128 bits addc must find this, ptxas' answer.
enum class Form { Add, Sub, MadLo, MadHi };
constexpr int TAKES = 0, LEAVES = 1;  // data: whether it takes a carry, and whether it leaves one

template <class T, Form FORM>
Outcome with_carry(Step& step) {
  constexpr bool MAD = FORM == Form::MadLo || FORM == Form::MadHi;
  const Source a = step.source(1), b = step.source(2), c = step.source(MAD ? 3 : 2);
  const bool takes = step.instr.data[TAKES];
  Warp& warp = step.warp;
  Target<T> to(step, step.op(0));
  Mask carries = 0;
  FOR_LANES(lane, step.active) {
    T first = a.get<T>(lane);
    if (FORM == Form::MadLo) first = mul_lo(first, b.get<T>(lane));
    if (FORM == Form::MadHi) first = mul_hi(first, b.get<T>(lane));
    // The carry is of the unsigned sum, whatever the type.
    const auto second = Unsigned<T>(c.get<T>(lane));
    const unsigned __int128 x = Unsigned<T>(first), y = FORM == Form::Sub ? Unsigned<T>(~second) : second;
    const unsigned in = takes ? warp.carry >> lane & 1 : FORM == Form::Sub;
    const unsigned __int128 sum = x + y + in;
    to.set(lane, T(sum));
    if (sum >> (8 * sizeof(T)) & 1) carries |= 1u << lane;
  }
  const Mask undefined = a.undefined | b.undefined | c.undefined | (takes ? warp.carry_undefined : 0);
  step.set_undefined(step.op(0), undefined);
  if (step.instr.data[LEAVES]) {
    warp.carry = (warp.carry & ~step.active) | carries;
    warp.carry_undefined = (warp.carry_undefined & ~step.active) | (undefined & step.active);
  }
  return Outcome::Done;
}

// dp4a, dp2a
template <class A, class B>
uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i) c += uint32_t(int32_t(A(a >> 8 * i)) * int32_t(B(b >> 8 * i)));
  return c;
}
template <class A, class B, int FIRST>
uint32_t dp2a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 2; ++i) c += uint32_t(int32_t(A(a >> 16 * i)) * int32_t(B(b >> 8 * (FIRST + i))));
  return c;
}

// ---- Decoders

template <Form FORM>
void decode_carry(Words& words, Instr& instr, bool takes) {
  const size_t operands = FORM == Form::Add || FORM == Form::Sub ? 3 : 4;
  need_operands(words, instr, operands, operands);
  instr.data[TAKES] = takes;
  instr.data[LEAVES] = words.take("cc");
  with_words_and_longs(words, [&](auto type) {
    using T = decltype(type);
    need_register(words, instr.ops[0], 8 * sizeof(T));
    for (size_t i = 1; i < operands; ++i) need_source(words, instr.ops[i], 8 * sizeof(T));
    instr.run = with_carry<T, FORM>;
  });
}

bool has(const Words& words, const char* word) {
  return (words.opcode() + ".").find(std::string(".") + word + ".") != std::string::npos;
}

void decode_add(Words& words, Instr& instr) {
  if (of_float(words)) return decode_float_arithmetic(words, instr);
  if (has(words, "cc")) return decode_carry<Form::Add>(words, instr, false);
  if (words.take_one({"u16x2", "s16x2"}) >= 0) return use<halves<add<uint16_t>>>(words, instr);
  if (words.take("sat")) {
    words.need_one({"s32"});
    return use<add_sat>(words, instr);
  }
  with_integer(words, [&](auto type) { use<add<decltype(type)>>(words, instr); });
}

void decode_sub(Words& words, Instr& instr) {
  if (of_float(words)) return decode_float_arithmetic(words, instr);
  if (has(words, "cc")) return decode_carry<Form::Sub>(words, instr, false);
  if (words.take("sat")) {
    words.need_one({"s32"});
    return use<sub_sat>(words, instr);
  }
  with_integer(words, [&](auto type) { use<sub<decltype(type)>>(words, instr); });
}

void decode_addc(Words& words, Instr& instr) { decode_carry<Form::Add>(words, instr, true); }
void decode_subc(Words& words, Instr& instr) { decode_carry<Form::Sub>(words, instr, true); }

enum Part { LOW, HIGH, WIDE };

void decode_mul(Words& words, Instr& instr) {
  if (of_float(words)) return decode_float_arithmetic(words, instr);
  const int part = words.need_one({"lo", "hi", "wide"});
  with_integer(words, [&](auto type) {
    using T = decltype(type);
    if (part == LOW) return use<mul_lo<T>>(words, instr);
    if (part == HIGH) return use<mul_hi<T>>(words, instr);
    if constexpr (sizeof(T) < 8) return use<mul_wide<T>>(words, instr);
    words.unknown("there is no product of 128 bits");
  });
}

void decode_mad_carry(Words& words, Instr& instr, bool takes) {
  if (words.need_one({"lo", "hi"}) == LOW) decode_carry<Form::MadLo>(words, instr, takes);
  else decode_carry<Form::MadHi>(words, instr, takes);
}

void decode_mad(Words& words, Instr& instr) {
  if (of_float(words)) return decode_float_arithmetic(words, instr);
  if (has(words, "cc")) return decode_mad_carry(words, instr, false);
  const int part = words.need_one({"lo", "hi", "wide"});
  if (part == HIGH && words.take("sat")) {
    words.need_one({"s32"});
    return use<mad_hi_sat>(words, instr);
  }
  with_integer(words, [&](auto type) {
    using T = decltype(type);
    if (part == LOW) return use<mad_lo<T>>(words, instr);
    if (part == HIGH) return use<mad_hi<T>>(words, instr);
    if constexpr (sizeof(T) < 8) return use<mad_wide<T>>(words, instr);
    words.unknown("there is no product of 128 bits");
  });
}

void decode_madc(Words& words, Instr& instr) { decode_mad_carry(words, instr, true); }

void decode_mul24(Words& words, Instr& instr) {
  const bool low = words.need_one({"lo", "hi"}) == LOW;
  if (words.need_one({"u32", "s32"}) == 0)
    low ? use<mul24_lo<uint32_t>>(words, instr) : use<mul24_hi<uint32_t>>(words, instr);
  else low ? use<mul24_lo<int32_t>>(words, instr) : use<mul24_hi<int32_t>>(words, instr);
}

void decode_mad24(Words& words, Instr& instr) {
  const bool low = words.need_one({"lo", "hi"}) == LOW;
  if (!low && words.take("sat")) {
    words.need_one({"s32"});
    return use<mad24_hi_sat>(words, instr);
  }
  if (words.need_one({"u32", "s32"}) == 0)
    low ? use<mad24_lo<uint32_t>>(words, instr) : use<mad24_hi<uint32_t>>(words, instr);
  else low ? use<mad24_lo<int32_t>>(words, instr) : use<mad24_hi<int32_t>>(words, instr);
}

void decode_sad(Words& words, Instr& instr) {
  with_integer(words, [&](auto type) { use<sad<decltype(type)>>(words, instr); });
}

template <bool REM>
void decode_divide(Words& words, Instr& instr) {
  if (!REM && of_float(words)) return decode_float_arithmetic(words, instr);
  need_operands(words, instr, 3, 3);
  with_integer(words, [&](auto type) {
    using T = decltype(type);
    need_register(words, instr.ops[0], 8 * sizeof(T));
    need_source(words, instr.ops[1], 8 * sizeof(T));
    need_source(words, instr.ops[2], 8 * sizeof(T));
    instr.run = divide<T, REM>;
  });
}

void decode_abs(Words& words, Instr& instr) {
  if (of_float(words)) return decode_float_arithmetic(words, instr);
  with_signed(words, [&](auto type) { use<absolute<decltype(type)>>(words, instr); });
}

void decode_neg(Words& words, Instr& instr) {
  if (of_float(words)) return decode_float_arithmetic(words, instr);
  with_signed(words, [&](auto type) { use<neg<decltype(type)>>(words, instr); });
}

void decode_min(Words& words, Instr& instr) {
  if (of_float(words)) return decode_float_arithmetic(words, instr);
  if (words.take("relu")) {
    if (words.need_one({"s32", "s16x2"}) == 0) return use<smaller_relu<int32_t>>(words, instr);
    return use<halves<smaller_relu<int16_t>>>(words, instr);
  }
  if (words.take("u16x2")) return use<halves<smaller<uint16_t>>>(words, instr);
  if (words.take("s16x2")) return use<halves<smaller<int16_t>>>(words, instr);
  with_integer(words, [&](auto type) { use<smaller<decltype(type)>>(words, instr); });
}

void decode_max(Words& words, Instr& instr) {
  if (of_float(words)) return decode_float_arithmetic(words, instr);
  if (words.take("relu")) {
    if (words.need_one({"s32", "s16x2"}) == 0) return use<larger_relu<int32_t>>(words, instr);
    return use<halves<larger_relu<int16_t>>>(words, instr);
  }
  if (words.take("u16x2")) return use<halves<larger<uint16_t>>>(words, instr);
  if (words.take("s16x2")) return use<halves<larger<int16_t>>>(words, instr);
  with_integer(words, [&](auto type) { use<larger<decltype(type)>>(words, instr); });
}

// The types of the first and the second factor.
struct Signs {
  bool a, b;
};
Signs signs(Words& words) {
  Signs is_signed;
  for (bool* each : {&is_signed.a, &is_signed.b}) {
    const std::string type = words.next();
    if (type != "u32" && type != "s32") words.unknown("needs two types, each .u32 or .s32");
    *each = type == "s32";
  }
  return is_signed;
}

void decode_dp4a(Words& words, Instr& instr) {
  const Signs is_signed = signs(words);
  if (is_signed.a)
    is_signed.b ? use<dp4a<int8_t, int8_t>>(words, instr) : use<dp4a<int8_t, uint8_t>>(words, instr);
  else is_signed.b ? use<dp4a<uint8_t, int8_t>>(words, instr) : use<dp4a<uint8_t, uint8_t>>(words, instr);
}

template <int FIRST>
void decode_dp2a_of(Words& words, Instr& instr) {
  const Signs is_signed = signs(words);
  if (is_signed.a)
    is_signed.b ? use<dp2a<int16_t, int8_t, FIRST>>(words, instr)
                : use<dp2a<int16_t, uint8_t, FIRST>>(words, instr);
  else
    is_signed.b ? use<dp2a<uint16_t, int8_t, FIRST>>(words, instr)
                : use<dp2a<uint16_t, uint8_t, FIRST>>(words, instr);
}

void decode_dp2a(Words& words, Instr& instr) {
  if (words.need_one({"lo", "hi"}) == LOW) decode_dp2a_of<0>(words, instr);
  else decode_dp2a_of<2>(words, instr);
}

const Family family_add("add", decode_add);
const Family family_sub("sub", decode_sub);
const Family family_addc("addc", decode_addc);
const Family family_subc("subc", decode_subc);
const Family family_mul("mul", decode_mul);
const Family family_mad("mad", decode_mad);
const Family family_madc("madc", decode_madc);
const Family family_mul24("mul24", decode_mul24);
const Family family_mad24("mad24", decode_mad24);
const Family family_sad("sad", decode_sad);
const Family family_div("div", decode_divide<false>);
const Family family_rem("rem", decode_divide<true>);
const Family family_abs("abs", decode_abs);
const Family family_neg("neg", decode_neg);
const Family family_min("min", decode_min);
const Family family_max("max", decode_max);
const Family family_dp4a("dp4a", decode_dp4a);
const Family family_dp2a("dp2a", decode_dp2a);

}  // namespace
}  // namespace ptx
