// Instructions on floating-point numbers, element by element.
#pragma once

#include <cmath>
#include <string>
#include <type_traits>

#include "lanes.h"
#include "numbers.h"

namespace ptx {

// What modifiers ask for, in data[0] of an instruction. data[1] is its Rounding.
enum Modifier : int64_t { FTZ = 1, SAT = 2, RELU = 4, NAN_WINS = 8, XOR_SIGN = 16, ABSOLUTE = 32 };

// The last types of opcodes, in this order everywhere.
enum class FloatType : int { F32, F64, F32x2, F16, F16x2, BF16, BF16x2 };
inline bool is_half(FloatType type) { return type >= FloatType::F16; }
FloatType take_float_type(Words& words);
void take_ftz(Words& words, Instr& instr);
// .rn .rz .rm .rp into data[1]; false if there is none.
bool take_rounding(Words& words, Instr& instr, bool nearest_only = false);
// As many operands, each a register of that type or a constant.
void need_float_operands(const Words& words, const Instr& instr, size_t count, FloatType type);
void need_float_operand(const Words& words, const Instr& instr, size_t index, FloatType type);

// ---- Bits

template <class F>
constexpr int total_bits = 1 + F::exponent_bits + F::mantissa_bits;
template <int BITS>
using BitsOf = std::conditional_t<BITS == 16, uint16_t, std::conditional_t<BITS == 32, uint32_t, uint64_t>>;
template <class F>
constexpr bool is_native = std::is_same_v<F, Single> || std::is_same_v<F, Double>;
template <class F>
using Native = std::conditional_t<std::is_same_v<F, Double>, double, float>;

template <class F>
bool is_nan(uint64_t bits) {
  return (bits & F::all) > F::infinity;
}
// A subnormal number becomes a zero of its sign.
template <class F>
uint64_t flush_bits(uint64_t bits) {
  return bits & F::infinity ? bits : bits & F::sign;
}
// Orders all that isn't NaN: -0 is less than +0.
template <class F>
int64_t order_of(uint64_t bits) {
  const int64_t magnitude = int64_t(bits & F::all);
  return bits & F::sign ? ~magnitude : magnitude;
}
// What .ftz, .sat and .relu make of a result.
template <class F>
uint64_t finished(uint64_t bits, int64_t modifiers) {
  constexpr uint64_t one = uint64_t(F::bias) << F::mantissa_bits;
  if (modifiers & FTZ) bits = flush_bits<F>(bits);
  if (modifiers & SAT) return is_nan<F>(bits) || bits & F::sign ? 0 : bits < one ? bits : one;
  if (modifiers & RELU && !is_nan<F>(bits) && bits & F::sign) return 0;
  return bits;
}

// ---- Arithmetic

// Quotients and roots, good for rounding to any format that the operands may have.
Number divide(const Number& a, const Number& b);
Number square_root(const Number& a);

struct Add {
  static constexpr int sources = 2;
  template <class T>
  static T nearest(const T* x) {
    return x[0] + x[1];
  }
  static Number exact(const Number* x, Rounding rounding) { return add(x[0], x[1], rounding); }
};
struct Subtract {
  static constexpr int sources = 2;
  template <class T>
  static T nearest(const T* x) {
    return x[0] - x[1];
  }
  static Number exact(const Number* x, Rounding rounding) {
    Number b = x[1];
    b.negative = !b.negative;
    return add(x[0], b, rounding);
  }
};
struct Multiply {
  static constexpr int sources = 2;
  template <class T>
  static T nearest(const T* x) {
    return x[0] * x[1];
  }
  static Number exact(const Number* x, Rounding) { return multiply(x[0], x[1]); }
};
struct MultiplyAdd {
  static constexpr int sources = 3;
  template <class T>
  static T nearest(const T* x) {
    return std::fma(x[0], x[1], x[2]);
  }
  static Number exact(const Number* x, Rounding rounding) { return add(multiply(x[0], x[1]), x[2], rounding); }
};
struct Divide {
  static constexpr int sources = 2;
  template <class T>
  static T nearest(const T* x) {
    return x[0] / x[1];
  }
  static Number exact(const Number* x, Rounding) { return divide(x[0], x[1]); }
};
struct Reciprocal {
  static constexpr int sources = 1;
  template <class T>
  static T nearest(const T* x) {
    return 1 / x[0];
  }
  static Number exact(const Number* x, Rounding) { return divide(Number::of(1, false), x[0]); }
};
struct SquareRoot {
  static constexpr int sources = 1;
  template <class T>
  static T nearest(const T* x) {
    return std::sqrt(x[0]);
  }
  static Number exact(const Number* x, Rounding) { return square_root(x[0]); }
};

inline float canonical(float x) { return x != x ? float_of(nan_bits<Single>()) : x; }
inline double canonical(double x) { return x != x ? double_of(nan_bits<Double>()) : x; }

// The result of Operation, rounded once. A NaN is the canonical one.
template <class F, class Operation>
uint64_t rounded(const uint64_t* in, Rounding rounding) {
  if constexpr (is_native<F>) {
    if (rounding == Rounding::Nearest) {
      using T = Native<F>;
      T x[Operation::sources];
      for (int i = 0; i < Operation::sources; ++i) x[i] = bits_as<T>(BitsOf<total_bits<F>>(in[i]));
      return bits_of(canonical(Operation::nearest(x)));
    }
  }
  Number x[Operation::sources];
  for (int i = 0; i < Operation::sources; ++i) x[i] = decode<F>(in[i]);
  return encode<F>(Operation::exact(x, rounding), rounding);
}

template <class Operation>
struct Rounded {
  static constexpr int sources = Operation::sources;
  template <class F>
  static uint64_t apply(const uint64_t* in, int64_t, Rounding rounding) {
    return rounded<F, Operation>(in, rounding);
  }
};

// ---- Runs

// PARTS numbers a register. .ftz flushes what goes in, too.
template <class F, int PARTS, class Operation>
Outcome elementwise(Step& step) {
  constexpr int sources = Operation::sources, bits = total_bits<F>;
  using Word = BitsOf<bits * PARTS>;
  const int64_t modifiers = step.instr.data[0];
  const Rounding rounding = Rounding(step.instr.data[1]);
  Source source[3];
  Mask undefined = 0;
  for (int i = 0; i < sources; ++i) {
    source[i] = step.source(1 + i);
    undefined |= source[i].undefined;
  }
  FOR_LANES(lane, step.active) {
    Word words[sources], result = 0;
    for (int i = 0; i < sources; ++i) words[i] = source[i].get<Word>(lane);
    for (int part = 0; part < PARTS; ++part) {
      uint64_t in[sources];
      for (int i = 0; i < sources; ++i) {
        in[i] = BitsOf<bits>(words[i] >> (PARTS == 1 ? 0 : part * bits));
        if (modifiers & FTZ) in[i] = flush_bits<F>(in[i]);
      }
      const uint64_t out = finished<F>(Operation::template apply<F>(in, modifiers, rounding), modifiers);
      result |= Word(out) << (PARTS == 1 ? 0 : part * bits);
    }
    step.set(step.op(0), lane, result);
  }
  step.set_undefined(step.op(0), undefined);
  return Outcome::Done;
}

// The same of one number a register, to nearest, without modifiers: by the processor.
template <class T, class Operation>
Outcome plain(Step& step) {
  constexpr int sources = Operation::sources;
  Source source[3];
  Mask undefined = 0;
  for (int i = 0; i < sources; ++i) {
    source[i] = step.source(1 + i);
    undefined |= source[i].undefined;
  }
  Target<T> to(step, step.op(0));
  FOR_LANES(lane, step.active) {
    T x[sources];
    for (int i = 0; i < sources; ++i) x[i] = source[i].get<T>(lane);
    to.set(lane, canonical(Operation::nearest(x)));
  }
  step.set_undefined(step.op(0), undefined);
  return Outcome::Done;
}

template <class Operation>
Run run_of(FloatType type) {
  switch (type) {
    case FloatType::F32: return elementwise<Single, 1, Operation>;
    case FloatType::F64: return elementwise<Double, 1, Operation>;
    case FloatType::F32x2: return elementwise<Single, 2, Operation>;
    case FloatType::F16: return elementwise<Half, 1, Operation>;
    case FloatType::F16x2: return elementwise<Half, 2, Operation>;
    case FloatType::BF16: return elementwise<BFloat, 1, Operation>;
    case FloatType::BF16x2: return elementwise<BFloat, 2, Operation>;
  }
  return nullptr;
}

// After all modifiers have been taken.
template <class Operation>
Run run_rounded(FloatType type, const Instr& instr) {
  if (instr.data[0] == 0 && Rounding(instr.data[1]) == Rounding::Nearest) {
    if (type == FloatType::F32) return plain<float, Operation>;
    if (type == FloatType::F64) return plain<double, Operation>;
  }
  return run_of<Rounded<Operation>>(type);
}

}  // namespace ptx
