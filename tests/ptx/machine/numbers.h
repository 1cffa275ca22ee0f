// Floating-point numbers of every format of PTX, and rounding into them. All in integers, so exact.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace ptx {

// .rn .rna .rz .rm .rp; with an i (.rni ...) the same to integers.
enum class Rounding : uint8_t { Nearest, Away, Zero, Down, Up };

// What the codes of the largest exponent mean.
enum class Top : uint8_t { Ieee, OneNan, Finite };

template <int EXPONENT, int MANTISSA, Top TOP = Top::Ieee>
struct Format {
  static constexpr int exponent_bits = EXPONENT, mantissa_bits = MANTISSA;
  static constexpr Top top = TOP;
  static constexpr int bias = (1 << (EXPONENT - 1)) - 1;
  static constexpr uint64_t all = (uint64_t(1) << (EXPONENT + MANTISSA)) - 1;  // but the sign
  static constexpr uint64_t sign = all + 1;
  static constexpr uint64_t infinity = ((uint64_t(1) << EXPONENT) - 1) << MANTISSA;  // of Top::Ieee
  static constexpr uint64_t largest = TOP == Top::Ieee ? infinity - 1 : TOP == Top::OneNan ? all - 1 : all;
};
using E2M1 = Format<2, 1, Top::Finite>;
using E2M3 = Format<2, 3, Top::Finite>;
using E3M2 = Format<3, 2, Top::Finite>;
using E4M3 = Format<4, 3, Top::OneNan>;
using E5M2 = Format<5, 2>;
using Half = Format<5, 10>;
using BFloat = Format<8, 7>;
using Tf32 = Format<8, 10>;  // its bits are the upper 19 of 32
using Single = Format<8, 23>;
using Double = Format<11, 52>;

// mantissa * 2^exponent, and with `sticky` a bit more, less than 2^exponent. Whoever sets `sticky` has at
// least two bits more in the mantissa than the format that it is rounded to.
struct Number {
  enum Kind : uint8_t { Zero, Finite, Infinite, Nan } kind = Zero;
  bool negative = false;
  bool sticky = false;
  int exponent = 0;
  unsigned __int128 mantissa = 0;

  static Number nan() {
    Number number;
    number.kind = Nan;
    return number;
  }
  static Number of(uint64_t magnitude, bool negative) {
    Number number;
    number.kind = magnitude ? Finite : Zero;
    number.negative = negative;
    number.mantissa = magnitude;
    return number;
  }
};

inline int leading_zeros(unsigned __int128 value) {  // not of 0
  const uint64_t high = uint64_t(value >> 64);
  return high ? __builtin_clzll(high) : 64 + __builtin_clzll(uint64_t(value));
}

template <class F>
Number decode(uint64_t bits) {
  Number number;
  number.negative = bits & F::sign;
  const int exponent = int((bits & F::all) >> F::mantissa_bits);
  const uint64_t mantissa = bits & ((uint64_t(1) << F::mantissa_bits) - 1);
  if (F::top == Top::Ieee && exponent == (1 << F::exponent_bits) - 1) {
    number.kind = mantissa ? Number::Nan : Number::Infinite;
  } else if (F::top == Top::OneNan && (bits & F::all) == F::all) {
    number.kind = Number::Nan;
  } else if (exponent || mantissa) {
    number.kind = Number::Finite;
    number.mantissa = exponent ? mantissa | uint64_t(1) << F::mantissa_bits : mantissa;
    number.exponent = (exponent ? exponent : 1) - F::bias - F::mantissa_bits;
  }
  return number;
}

// Whether a magnitude is rounded up, of which `odd` is the last bit that is kept, `half` the next one, and
// `rest` whether anything follows.
inline bool rounds_up(Rounding rounding, bool negative, bool odd, bool half, bool rest) {
  switch (rounding) {
    case Rounding::Nearest: return half && (rest || odd);
    case Rounding::Away: return half;
    case Rounding::Zero: return false;
    case Rounding::Down: return negative && (half || rest);
    case Rounding::Up: return !negative && (half || rest);
  }
  return false;
}

// The canonical NaN, as the hardware makes it. A format without one has its largest number instead.
template <class F>
constexpr uint64_t nan_bits() {
  return F::mantissa_bits == 52 ? uint64_t(0xfff8000000000000) : F::all;
}

// `finite` (.satfinite): the largest number instead of infinity. A format without infinity always does so.
template <class F>
uint64_t encode(const Number& number, Rounding rounding = Rounding::Nearest, bool finite = false) {
  if (number.kind == Number::Nan) return nan_bits<F>();
  const uint64_t sign = number.negative ? F::sign : 0;
  const uint64_t infinite = finite || F::top != Top::Ieee ? F::largest : F::infinity;
  if (number.kind == Number::Zero) return sign;
  if (number.kind == Number::Infinite) return sign | infinite;

  // Its 64 leading bits, and whether there are more.
  const int shift = 64 - leading_zeros(number.mantissa);
  const uint64_t mantissa = shift >= 0 ? uint64_t(number.mantissa >> shift) : uint64_t(number.mantissa) << -shift;
  bool rest = number.sticky;
  if (shift > 0) rest |= (number.mantissa << (128 - shift)) != 0;
  const int biased = number.exponent + shift + 63 + F::bias;

  uint64_t bits;
  if (biased > (1 << F::exponent_bits)) {
    bits = F::all + 1;
  } else {
    // A subnormal number keeps fewer bits.
    const int kept = F::mantissa_bits + (biased >= 1 ? 1 : biased);
    const uint64_t whole = kept >= 1 ? mantissa >> (64 - kept) : 0;
    bool half = false;
    if (kept >= 0) {
      half = mantissa << kept >> 63;
      rest |= kept < 63 && mantissa << (kept + 1) != 0;
    } else {
      rest = true;
    }
    bits = whole + rounds_up(rounding, number.negative, whole & 1, half, rest);
    if (biased >= 1) bits += uint64_t(biased - 1) << F::mantissa_bits;
  }
  if (bits > F::largest) {
    const bool away = rounding == Rounding::Nearest || rounding == Rounding::Away ||
                      (rounding == Rounding::Down && number.negative) ||
                      (rounding == Rounding::Up && !number.negative);
    bits = away ? infinite : F::largest;
  }
  return sign | bits;
}

// Exact, unless numbers of more than 64 bits are multiplied.
inline Number multiply(const Number& a, const Number& b) {
  Number product;
  product.negative = a.negative != b.negative;
  product.kind = a.kind > b.kind ? a.kind : b.kind;
  const bool zero = a.kind == Number::Zero || b.kind == Number::Zero;
  if (product.kind == Number::Infinite && zero) return Number::nan();
  if (zero && product.kind == Number::Finite) product.kind = Number::Zero;
  if (product.kind != Number::Finite) return product;
  product.mantissa = a.mantissa * b.mantissa;
  product.exponent = a.exponent + b.exponent;
  return product;
}

// The sum of two numbers of at most 106 bits, good for rounding to any format. `rounding` decides the sign of
// a zero.
inline Number add(Number a, Number b, Rounding rounding = Rounding::Nearest) {
  if (a.kind == Number::Nan || b.kind == Number::Nan) return Number::nan();
  if (a.kind == Number::Infinite && b.kind == Number::Infinite)
    return a.negative == b.negative ? a : Number::nan();
  if (a.kind == Number::Infinite) return a;
  if (b.kind == Number::Infinite) return b;
  if (a.kind == Number::Zero && b.kind == Number::Zero) {
    a.negative = a.negative == b.negative ? a.negative : rounding == Rounding::Down;
    return a;
  }
  if (a.kind == Number::Zero) return b;
  if (b.kind == Number::Zero) return a;

  // The leading bit at bit 126, so that a sum has room.
  for (Number* number : {&a, &b}) {
    const int shift = leading_zeros(number->mantissa) - 1;
    number->mantissa = shift >= 0 ? number->mantissa << shift : number->mantissa >> 1;
    number->exponent -= shift;
  }
  if (a.exponent < b.exponent || (a.exponent == b.exponent && a.mantissa < b.mantissa)) {
    const Number larger = b;
    b = a;
    a = larger;
  }
  const int distance = a.exponent - b.exponent;
  if (distance > 126) {
    b.mantissa = 0;
    a.sticky = true;
  } else if (distance > 0) {
    a.sticky = (b.mantissa << (128 - distance)) != 0;
    b.mantissa >>= distance;
  }
  if (a.negative == b.negative) {
    a.mantissa += b.mantissa;
  } else {
    a.mantissa -= b.mantissa + a.sticky;
    if (a.mantissa == 0) {
      a.kind = Number::Zero;
      a.negative = rounding == Rounding::Down;
    }
  }
  return a;
}

// To a whole number; beyond 2^66 it is cut off there. 0 of a NaN.
inline __int128 to_integer(const Number& number, Rounding rounding) {
  const __int128 limit = __int128(1) << 66;
  __int128 whole = 0;
  if (number.kind == Number::Infinite) {
    whole = limit;
  } else if (number.kind == Number::Finite) {
    const int bits = 128 - leading_zeros(number.mantissa);
    if (bits + number.exponent > 66) {
      whole = limit;
    } else if (number.exponent >= 0) {
      whole = __int128(number.mantissa << number.exponent);
    } else {
      const int cut = -number.exponent;
      bool half = false, rest = true;
      if (cut <= 127) {
        whole = __int128(number.mantissa >> cut);
        half = number.mantissa >> (cut - 1) & 1;
        rest = number.sticky || (cut > 1 && number.mantissa << (129 - cut) != 0);
      }
      whole += rounds_up(rounding, number.negative, whole & 1, half, rest);
    }
  }
  return number.negative ? -whole : whole;
}

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &value, sizeof(To));
  return to;
}
inline uint32_t bits_of(float value) { return bits_as<uint32_t>(value); }
inline uint64_t bits_of(double value) { return bits_as<uint64_t>(value); }
inline float float_of(uint32_t bits) { return bits_as<float>(bits); }
inline double double_of(uint64_t bits) { return bits_as<double>(bits); }

inline Number number_of(float value) { return decode<Single>(bits_of(value)); }
inline Number number_of(double value) { return decode<Double>(bits_of(value)); }
inline float to_float(const Number& number, Rounding rounding = Rounding::Nearest) {
  return float_of(uint32_t(encode<Single>(number, rounding)));
}
inline double to_double(const Number& number, Rounding rounding = Rounding::Nearest) {
  return double_of(encode<Double>(number, rounding));
}
inline float to_float(double value, Rounding rounding) { return to_float(number_of(value), rounding); }

// .ftz: a subnormal float becomes a zero of its sign.
inline float flush(float value) {
  const uint32_t bits = bits_of(value);
  return bits & 0x7f800000 ? value : float_of(bits & 0x80000000);
}
// .sat: into [0, 1], NaN to +0, and -0 to +0.
inline float saturate(float value) { return value > 0 ? (value < 1 ? value : 1.0f) : 0.0f; }
inline double saturate(double value) { return value > 0 ? (value < 1 ? value : 1.0) : 0.0; }

template <class F>
float small_to_float(uint64_t bits) {
  return to_float(decode<F>(bits));
}

inline float from_half(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const uint32_t rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(rest > 0x7c00 ? 0x7fffffff : sign | 0x7f800000);
  if (rest >= 0x0400) return float_of(sign | ((rest << 13) + (112u << 23)));
  const float magnitude = float(rest) * 0x1p-24f;
  return float_of(sign | bits_of(magnitude));
}
inline uint16_t to_half(float value, Rounding rounding = Rounding::Nearest, bool finite = false) {
  return uint16_t(encode<Half>(number_of(value), rounding, finite));
}
inline uint16_t to_half(double value, Rounding rounding = Rounding::Nearest, bool finite = false) {
  return uint16_t(encode<Half>(number_of(value), rounding, finite));
}

// The upper half of a float: a NaN keeps what it carries.
inline float from_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
inline uint16_t to_bf16(float value, Rounding rounding = Rounding::Nearest, bool finite = false) {
  const uint32_t bits = bits_of(value);
  if (rounding != Rounding::Nearest || finite || (bits & 0x7fffffff) > 0x7f800000)
    return uint16_t(encode<BFloat>(number_of(value), rounding, finite));
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_bf16(double value, Rounding rounding = Rounding::Nearest, bool finite = false) {
  return uint16_t(encode<BFloat>(number_of(value), rounding, finite));
}

// A float whose lower 13 bits are zero. cvt knows .rn, .rna and .rz.
inline float to_tf32(float value, Rounding rounding = Rounding::Away, bool finite = false) {
  return float_of(uint32_t(encode<Tf32>(number_of(value), rounding, finite)) << 13);
}
// What a matrix instruction takes of a .tf32 operand that nobody has rounded.
inline float cut_to_tf32(float value) { return float_of(bits_of(value) & 0xffffe000); }

inline float from_e4m3(uint8_t bits) { return small_to_float<E4M3>(bits); }
inline float from_e5m2(uint8_t bits) { return small_to_float<E5M2>(bits); }
inline float from_e2m1(uint8_t bits) { return small_to_float<E2M1>(bits); }
inline float from_e2m3(uint8_t bits) { return small_to_float<E2M3>(bits); }
inline float from_e3m2(uint8_t bits) { return small_to_float<E3M2>(bits); }
// .satfinite, as PTX demands. (e5m2 has infinities, and still no conversion that makes one.)
template <class F>
uint8_t float_to_small(float value, Rounding rounding = Rounding::Nearest) {
  return uint8_t(encode<F>(number_of(value), rounding, true));
}
inline uint8_t to_e4m3(float value) { return float_to_small<E4M3>(value); }
inline uint8_t to_e5m2(float value) { return float_to_small<E5M2>(value); }

// ue8m0: 2^(bits - 127), 0xff is NaN.
inline float from_ue8m0(uint8_t bits) {
  if (bits == 0xff) return float_of(0x7fffffff);
  return float_of(bits ? uint32_t(bits) << 23 : 0x00400000);
}
// Of the magnitude, rounded to a power of two down or (Rounding::Up) up. Beyond the largest one: NaN, or with
// `finite` the largest one.
inline uint8_t to_ue8m0(float value, Rounding rounding, bool finite) {
  const uint32_t magnitude = bits_of(value) & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0xff;
  uint32_t exponent = magnitude >> 23;
  // 2^-127 and all that is smaller have exponent 0.
  const bool more = (magnitude & 0x007fffff) != 0 && magnitude > 0x00400000;
  if (rounding == Rounding::Up && more) ++exponent;
  return uint8_t(exponent == 0xff && finite ? 0xfe : exponent);
}

}  // namespace ptx
