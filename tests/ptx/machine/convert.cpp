// cvt and cvt.pack.
#include "convert.h"

#include <limits>

#include "special.h"

namespace ptx {
namespace {

// The scalar types of floating-point numbers, by the format of their bits.
struct F16 {
  using Bits = uint16_t;
  using Format = Half;
};
struct BF16 {
  using Bits = uint16_t;
  using Format = BFloat;
};
struct F32 {
  using Bits = uint32_t;
  using Format = Single;
};
struct F64 {
  using Bits = uint64_t;
  using Format = Double;
};

// A register that may be wider than what is written: a signed integer is extended by its sign, all else by
// zeros.
class Wide {
 public:
  explicit Wide(Step& step) : step_(step), mask_(~uint64_t(0) >> (64 - step.op(0).width)) {}
  template <class T>
  void set(int lane, T value) {
    const uint64_t extended = std::is_signed_v<T> ? uint64_t(int64_t(value)) : uint64_t(value);
    step_.set(step_.op(0), lane, extended & mask_);
  }

 private:
  Step& step_;
  uint64_t mask_;
};

// ---- PTX ISA, Data Movement and Conversion Instructions: cvt, of integers

template <class D, class S>
D saturated(S value) {
  const __int128 least = std::numeric_limits<D>::min(), most = std::numeric_limits<D>::max();
  return D(std::clamp<__int128>(value, least, most));
}

template <class D, class S>
Outcome integer_to_integer(Step& step) {
  const Source a = step.source(1);
  Wide to(step);
  const bool saturates = step.instr.data[FLAGS] & SAT;
  FOR_LANES(lane, step.active) {
    const S value = a.get<S>(lane);
    to.set(lane, saturates ? saturated<D>(value) : D(value));
  }
  step.set_undefined(step.op(0), a.undefined);
  return Outcome::Done;
}

template <class D, class S>
Outcome special_to_integer(Step& step) {
  const auto& special = *reinterpret_cast<const Special*>(step.instr.data[SPECIAL]);
  Wide to(step);
  FOR_LANES(lane, step.active) to.set(lane, D(S(special.value(step, lane))));
  step.set_undefined(step.op(0), 0);
  return Outcome::Done;
}

// ---- of floating-point numbers

template <class S>
Number load(const Source& source, int lane, int flags) {
  const Number number = decode<typename S::Format>(source.get<typename S::Bits>(lane));
  if (std::is_same_v<S, F32> && flags & FTZ && number.kind == Number::Finite && number.mantissa < 1u << 23)
    return Number::of(0, number.negative);
  return number;
}

// What modifiers do with a result.
template <class D>
typename D::Bits finished(const Number& number, Rounding rounding, int flags) {
  using F = typename D::Format;
  uint64_t bits = relu<F>(encode<F>(number, rounding, flags & SATFINITE), flags);
  if (flags & SAT) {
    constexpr uint64_t one = uint64_t(F::bias) << F::mantissa_bits;
    // NaN to 0
    if ((bits & F::all) > F::infinity || bits & F::sign) bits = 0;
    bits = std::min(bits, one);
  }
  if (std::is_same_v<D, F32> && flags & FTZ && (bits & F::all) < 1u << 23) bits &= F::sign;
  return bits;
}

Number integral(const Number& number, Rounding rounding) {
  if (number.kind != Number::Finite || number.exponent >= 0) return number;
  const __int128 whole = to_integer(number, rounding);
  return Number::of(uint64_t(number.negative ? -whole : whole), number.negative);
}

template <class D, class S>
Outcome float_to_float(Step& step) {
  const Source a = step.source(1);
  Wide to(step);
  const int flags = step.instr.data[FLAGS];
  const Rounding rounding = rounding_of(step);
  FOR_LANES(lane, step.active) {
    Number number = load<S>(a, lane, flags);
    if (flags & INTEGRAL) number = integral(number, rounding);
    to.set(lane, finished<D>(number, rounding, flags));
  }
  step.set_undefined(step.op(0), a.undefined);
  return Outcome::Done;
}

template <class D, class S>
Outcome integer_to_float(Step& step) {
  const Source a = step.source(1);
  Wide to(step);
  const int flags = step.instr.data[FLAGS];
  const Rounding rounding = rounding_of(step);
  FOR_LANES(lane, step.active) {
    const S value = a.get<S>(lane);
    const uint64_t magnitude = value < 0 ? -uint64_t(value) : uint64_t(value);
    to.set(lane, finished<D>(Number::of(magnitude, value < 0), rounding, flags));
  }
  step.set_undefined(step.op(0), a.undefined);
  return Outcome::Done;
}

// Into the range of the integer; a NaN is zero, or of 64-bit types the highest bit alone.
template <class D, class S>
Outcome float_to_integer(Step& step) {
  const Source a = step.source(1);
  Wide to(step);
  const int flags = step.instr.data[FLAGS];
  const Rounding rounding = rounding_of(step);
  constexpr bool zero = !std::is_same_v<S, F64> && sizeof(D) < 8;
  const D of_nan = zero ? D(0) : D(std::make_unsigned_t<D>(1) << (8 * sizeof(D) - 1));
  FOR_LANES(lane, step.active) {
    const Number number = load<S>(a, lane, flags);
    to.set(lane, number.kind == Number::Nan ? of_nan : saturated<D>(to_integer(number, rounding)));
  }
  step.set_undefined(step.op(0), a.undefined);
  return Outcome::Done;
}

// What kernels are full of, without the way through Number.
uint16_t to_bf16_nearest(float a) { return to_bf16(a); }
float to_f32_nearest(int32_t a) { return float(a); }

// ---- cvt.pack: two saturated integers below bits of a third

template <int BITS, bool SIGNED>
uint32_t packed(int32_t a, int32_t b) {
  const int64_t least = SIGNED ? -(int64_t(1) << (BITS - 1)) : 0;
  const int64_t most = (int64_t(1) << (SIGNED ? BITS - 1 : BITS)) - 1;
  const uint32_t mask = (1u << BITS) - 1;
  const uint32_t high = uint32_t(std::clamp<int64_t>(a, least, most)) & mask;
  const uint32_t low = uint32_t(std::clamp<int64_t>(b, least, most)) & mask;
  return high << BITS | low;
}
template <int BITS, bool SIGNED>
uint32_t packed_below(int32_t a, int32_t b, uint32_t c) {
  return packed<BITS, SIGNED>(a, b) | c << 2 * BITS;
}

void decode_pack(Words& words, Instr& instr) {
  words.need_one({"sat"});
  const int type = words.need_one({"u16", "s16", "u2", "s2", "u4", "s4", "u8", "s8"});
  words.need_one({"s32"});
  if (type >= 2) words.need_one({"b32"});
  switch (type) {
    case 0: return use<packed<16, false>>(words, instr);
    case 1: return use<packed<16, true>>(words, instr);
    case 2: return use<packed_below<2, false>>(words, instr);
    case 3: return use<packed_below<2, true>>(words, instr);
    case 4: return use<packed_below<4, false>>(words, instr);
    case 5: return use<packed_below<4, true>>(words, instr);
    case 6: return use<packed_below<8, false>>(words, instr);
    default: return use<packed_below<8, true>>(words, instr);
  }
}

// ---- Decoders

Modifiers modifiers(Words& words) {
  Modifiers found = {-1, -1, 0};
  if (words.take("rs")) words.unknown("the machine has no stochastic rounding (.rs)");
  found.rounding = words.take_one({"rn", "rna", "rz", "rm", "rp"});
  found.integral = words.take_one({"rni", "rzi", "rmi", "rpi"});
  if (words.take("ftz")) found.flags |= FTZ;
  if (words.take("sat")) found.flags |= SAT;
  if (words.take("relu")) found.flags |= RELU;
  if (words.take("satfinite")) found.flags |= SATFINITE;
  return found;
}

template <class T>
constexpr bool is_integer = std::is_integral_v<T>;

template <class T>
constexpr int bits_of_scalar() {
  if constexpr (is_integer<T>) return 8 * sizeof(T);
  else return 8 * sizeof(typename T::Bits);
}

// f(the scalar type of that name)
template <class F>
void with_scalar(const Words& words, const std::string& type, F f) {
  if (type == "u8") return f(uint8_t());
  if (type == "u16") return f(uint16_t());
  if (type == "u32") return f(uint32_t());
  if (type == "u64") return f(uint64_t());
  if (type == "s8") return f(int8_t());
  if (type == "s16") return f(int16_t());
  if (type == "s32") return f(int32_t());
  if (type == "s64") return f(int64_t());
  if (type == "f16") return f(F16());
  if (type == "bf16") return f(BF16());
  if (type == "f32") return f(F32());
  if (type == "f64") return f(F64());
  words.unknown("the machine doesn't convert ." + type);
}

// Registers may be wider than their types, but those of .bf16.
template <class D, class S>
void need_wide(const Words& words, const Instr& instr) {
  need_operands(words, instr, 2, 2);
  const Operand &to = instr.ops[0], &from = instr.ops[1];
  if (to.is != Is::Register || to.width > 64 || to.width < bits_of_scalar<D>())
    words.unknown(format("writes no register of %d bits", bits_of_scalar<D>()));
  if (from.is == Is::Special) return;
  if (from.is != Is::Register) return need_source(words, from, bits_of_scalar<S>());
  if (from.width > 64 || from.width < bits_of_scalar<S>())
    words.unknown(format("takes no register of %d bits", bits_of_scalar<S>()));
  if ((std::is_same_v<D, BF16> && to.width != 16) || (std::is_same_v<S, BF16> && from.width != 16))
    words.unknown("takes a register of 16 bits for a .bf16");
}

template <class D, class S>
void decode_integers(const Words& words, Instr& instr, const Modifiers& with) {
  using Destination = std::numeric_limits<D>;
  using Origin = std::numeric_limits<S>;
  if (with.rounding >= 0 || with.integral >= 0) words.unknown("rounds no integer to an integer");
  const bool fits = __int128(Destination::min()) <= __int128(Origin::min()) &&
                    __int128(Destination::max()) >= __int128(Origin::max());
  allow(words, with, fits ? 0 : SAT);
  instr.run = integer_to_integer<D, S>;
  if (instr.ops[1].is == Is::Special) {
    const Special* special = special_register(instr.ops[1].word);
    if (special == nullptr) words.unknown("the machine has no special register " + instr.ops[1].word);
    if (special->width < bits_of_scalar<S>() || with.flags)
      words.unknown(format("%s has %d bits", instr.ops[1].word.c_str(), special->width));
    instr.data[SPECIAL] = reinterpret_cast<int64_t>(special);
    instr.run = special_to_integer<D, S>;
  }
}

template <class D, class S>
void decode_floats(const Words& words, Instr& instr, const Modifiers& with) {
  using To = typename D::Format;
  using From = typename S::Format;
  constexpr bool same = std::is_same_v<D, S>;
  constexpr bool exact = To::exponent_bits >= From::exponent_bits && To::mantissa_bits >= From::mantissa_bits;
  constexpr bool single = std::is_same_v<D, F32> || std::is_same_v<S, F32>;
  constexpr bool from_bfloat = std::is_same_v<S, BF16>;
  constexpr bool to_half_of_single = (std::is_same_v<D, F16> || std::is_same_v<D, BF16>) && std::is_same_v<S, F32>;
  const int sat = std::is_same_v<D, BF16> ? 0 : SAT;
  allow(words, with, sat | (single ? FTZ : 0) | (to_half_of_single ? RELU | SATFINITE : 0));
  if (with.integral >= 0 && (!same || with.rounding >= 0))
    words.unknown("rounds to integers of the same type only");
  if (!exact) need_rounding(words, with, {Rounding::Nearest, Rounding::Zero, Rounding::Down, Rounding::Up});
  // ptxas takes a rounding where one of .bf16 needs none.
  if (exact && with.rounding >= 0 && (same || !from_bfloat)) words.unknown("rounds what fits");
  if (with.rounding == int(Rounding::Away)) words.unknown(".rna is of .tf32");
  instr.run = float_to_float<D, S>;
  const bool plain =
      with.flags == 0 && with.rounding <= 0 && with.integral < 0 && instr.ops[0].width == bits_of_scalar<D>();
  if (!plain) return;
  if constexpr (std::is_same_v<D, F32> && from_bfloat) instr.run = Lanes<from_bf16>::run;
  if constexpr (std::is_same_v<D, F32> && std::is_same_v<S, F16>) instr.run = Lanes<from_half>::run;
  if constexpr (std::is_same_v<D, BF16> && std::is_same_v<S, F32>) instr.run = Lanes<to_bf16_nearest>::run;
}

void decode_cvt(Words& words, Instr& instr) {
  if (words.take("pack")) return decode_pack(words, instr);
  const Modifiers with = modifiers(words);
  const std::string to = words.next(), from = words.next();
  if (decode_packed(words, instr, with, to, from)) return;
  with_scalar(words, to, [&](auto d) {
    using D = decltype(d);
    with_scalar(words, from, [&](auto s) {
      using S = decltype(s);
      need_wide<D, S>(words, instr);
      if constexpr (is_integer<D> && is_integer<S>) return decode_integers<D, S>(words, instr, with);
      if (instr.ops[1].is == Is::Special) words.unknown("takes no special register for a .f");
      if constexpr (is_integer<D> && !is_integer<S>) {
        if (with.integral < 0 || with.rounding >= 0) words.unknown("needs .rni, .rzi, .rmi or .rpi");
        allow(words, with, SAT | (std::is_same_v<S, F32> ? FTZ : 0));  // it saturates anyway
        instr.run = float_to_integer<D, S>;
      }
      if constexpr (!is_integer<D> && is_integer<S>) {
        need_rounding(words, with, {Rounding::Nearest, Rounding::Zero, Rounding::Down, Rounding::Up});
        allow(words, with, (std::is_same_v<D, BF16> ? 0 : SAT) | (std::is_same_v<D, F32> ? FTZ : 0));
        instr.run = integer_to_float<D, S>;
        if (std::is_same_v<D, F32> && std::is_same_v<S, int32_t> && with.rounding == 0 && with.flags == 0 &&
            instr.ops[0].width == 32)
          instr.run = Lanes<to_f32_nearest>::run;
      }
      if constexpr (!is_integer<D> && !is_integer<S>) decode_floats<D, S>(words, instr, with);
    });
  });
}

const Family family_cvt("cvt", decode_cvt);

}  // namespace
}  // namespace ptx
