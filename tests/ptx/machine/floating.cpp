// Floating-point arithmetic: add sub mul fma mad div abs neg min max.
//
// Without a rounding modifier add, sub and mul round to nearest even; ptxas may fuse those, the machine never
// does. Single-precision results and those of half the width have the canonical NaN, as PTX ISA 9.7.3 has it.
#include "floating.h"

#include "families.h"

namespace ptx {

// ---- Numbers

Number divide(const Number& a, const Number& b) {
  Number quotient;
  quotient.negative = a.negative != b.negative;
  if (a.kind == Number::Nan || b.kind == Number::Nan) return Number::nan();
  if (a.kind == b.kind && a.kind != Number::Finite) return Number::nan();
  if (a.kind == Number::Infinite || b.kind == Number::Zero) {
    quotient.kind = Number::Infinite;
  } else if (a.kind == Number::Finite && b.kind == Number::Finite) {
    // A mantissa of 127 bits over one of 53 at most leaves 74.
    const int shift = leading_zeros(a.mantissa) - 1;
    const unsigned __int128 whole = a.mantissa << shift;
    quotient.kind = Number::Finite;
    quotient.mantissa = whole / b.mantissa;
    quotient.sticky = whole % b.mantissa != 0;
    quotient.exponent = a.exponent - shift - b.exponent;
  }
  return quotient;
}

Number square_root(const Number& a) {
  if (a.kind == Number::Nan || a.kind == Number::Zero) return a;
  if (a.negative) return Number::nan();
  if (a.kind == Number::Infinite) return a;
  // A mantissa of 126 or 127 bits times an even power of two has a root of 63 or 64.
  int shift = leading_zeros(a.mantissa) - 1;
  if ((a.exponent - shift) % 2 != 0) --shift;
  unsigned __int128 rest = a.mantissa << shift, root = 0;
  for (unsigned __int128 bit = (unsigned __int128)1 << 126; bit; bit >>= 2) {
    if (rest >= root + bit) {
      rest -= root + bit;
      root = (root >> 1) + bit;
    } else {
      root >>= 1;
    }
  }
  Number result = Number::of(1, false);
  result.mantissa = root;
  result.exponent = (a.exponent - shift) / 2;
  result.sticky = rest != 0;
  return result;
}

// ---- Modifiers and operands

FloatType take_float_type(Words& words) {
  return FloatType(words.need_one({"f32", "f64", "f32x2", "f16", "f16x2", "bf16", "bf16x2"}));
}

void take_ftz(Words& words, Instr& instr) {
  if (words.take("ftz")) instr.data[0] |= FTZ;
}

bool take_rounding(Words& words, Instr& instr, bool nearest_only) {
  const int index = nearest_only ? words.take_one({"rn"}) : words.take_one({"rn", "rz", "rm", "rp"});
  const Rounding roundings[] = {Rounding::Nearest, Rounding::Zero, Rounding::Down, Rounding::Up};
  instr.data[1] = int64_t(roundings[index < 0 ? 0 : index]);
  return index >= 0;
}

void need_float_operand(const Words& words, const Instr& instr, size_t index, FloatType type) {
  static const int widths[] = {32, 64, 64, 16, 32, 16, 32};
  const Operand& op = instr.ops[index];
  const int width = widths[int(type)];
  if (op.is == Is::Register && op.width != width)
    words.unknown(format("operand %zu has %d bits, not %d", index, op.width, width));
  if (op.is != Is::Register && (index == 0 || op.is != Is::Immediate))
    words.unknown(format("operand %zu is no register of %d bits", index, width));
}

void need_float_operands(const Words& words, const Instr& instr, size_t count, FloatType type) {
  need_operands(words, instr, count, count);
  for (size_t i = 0; i < count; ++i) need_float_operand(words, instr, i, type);
}

namespace {

void take_sat(Words& words, Instr& instr) {
  if (words.take("sat")) instr.data[0] |= SAT;
}

FloatType take_unpaired_type(Words& words) {
  const FloatType type = take_float_type(words);
  if (type == FloatType::F32x2) words.unknown("has no .f32x2");
  return type;
}

// ---- Mixed precision

// All operands but the last are converted to f32, which is exact.
template <class F, class Operation>
Outcome mixed(Step& step) {
  constexpr int sources = Operation::sources;
  const int64_t modifiers = step.instr.data[0];
  const Rounding rounding = Rounding(step.instr.data[1]);
  Source source[3];
  Mask undefined = 0;
  for (int i = 0; i < sources; ++i) {
    source[i] = step.source(1 + i);
    undefined |= source[i].undefined;
  }
  FOR_LANES(lane, step.active) {
    uint64_t in[sources];
    for (int i = 0; i < sources - 1; ++i) {
      const uint16_t bits = source[i].get<uint16_t>(lane);
      in[i] = bits_of(std::is_same_v<F, Half> ? from_half(bits) : from_bf16(bits));
    }
    in[sources - 1] = source[sources - 1].get<uint32_t>(lane);
    const uint64_t result = finished<Single>(rounded<Single, Operation>(in, rounding), modifiers);
    step.set(step.op(0), lane, uint32_t(result));
  }
  step.set_undefined(step.op(0), undefined);
  return Outcome::Done;
}

// PTX ISA, Mixed Precision Floating-Point Instructions: add, sub, fma {.rnd}{.sat}.f32.{f16, bf16}
template <class Operation>
bool decode_mixed(Words& words, Instr& instr) {
  const int half = words.take_one({"f16", "bf16"});
  if (half < 0) return false;
  constexpr size_t sources = Operation::sources;
  need_operands(words, instr, 1 + sources, 1 + sources);
  for (size_t i = 0; i < 1 + sources; ++i)
    need_float_operand(
        words, instr, i,
        i == 0 || i == sources ? FloatType::F32
        : half                 ? FloatType::BF16
                               : FloatType::F16);
  take_sat(words, instr);
  instr.run = half ? mixed<BFloat, Operation> : mixed<Half, Operation>;
  return true;
}

// ---- add, sub, mul

// PTX ISA 9.7.3 Floating-Point Instructions and 9.7.4 Half Precision: add, sub, mul
template <class Operation, bool MIXED>
void decode_sum(Words& words, Instr& instr) {
  const FloatType type = take_float_type(words);
  if (is_half(type)) take_rounding(words, instr, true);
  else take_rounding(words, instr);
  if constexpr (MIXED)
    if (type == FloatType::F32 && decode_mixed<Operation>(words, instr)) return;
  need_float_operands(words, instr, 3, type);
  if (type != FloatType::F64 && type != FloatType::BF16 && type != FloatType::BF16x2) {
    take_ftz(words, instr);
    if (type != FloatType::F32x2) take_sat(words, instr);
  }
  instr.run = run_rounded<Operation>(type, instr);
}

// ---- fma, mad

// PTX ISA 9.7.3, 9.7.4: fma
void decode_fma(Words& words, Instr& instr) {
  if (words.take("oob")) words.unknown("the bits of an OOB NaN are not documented, so the machine has no .oob");
  const FloatType type = take_float_type(words);
  if (!take_rounding(words, instr, is_half(type))) words.unknown("needs a rounding");
  if (type == FloatType::F32 && decode_mixed<MultiplyAdd>(words, instr)) return;
  need_float_operands(words, instr, 4, type);
  if (type != FloatType::F64 && type != FloatType::BF16 && type != FloatType::BF16x2) {
    take_ftz(words, instr);
    if (type != FloatType::F32x2) take_sat(words, instr);
  }
  if (is_half(type) && !(instr.data[0] & SAT) && words.take("relu")) instr.data[0] |= RELU;
  instr.run = run_rounded<MultiplyAdd>(type, instr);
}

// PTX ISA 9.7.3: mad. From sm_20 on it is fma; what sm_1x had without a rounding is not in the machine.
void decode_mad(Words& words, Instr& instr) {
  const FloatType type = FloatType(words.need_one({"f32", "f64"}));
  if (!take_rounding(words, instr)) words.unknown("needs a rounding");
  need_float_operands(words, instr, 4, type);
  if (type == FloatType::F32) {
    take_ftz(words, instr);
    take_sat(words, instr);
  }
  instr.run = run_rounded<MultiplyAdd>(type, instr);
}

// ---- div

// a · (1 / b), where 1 / b is flushed to zero for the largest b. Else correctly rounded, where the ISA allows
// 2 ulp.
struct DivideApproximately {
  static constexpr int sources = 2;
  template <class F>
  static uint64_t apply(const uint64_t* in, int64_t, Rounding) {
    constexpr uint64_t large = uint64_t(126 + F::bias) << F::mantissa_bits;
    const uint64_t b = in[1] & F::all;
    if (b > large && b < F::infinity) {
      const uint64_t factors[] = {in[0], in[1] & F::sign};
      return rounded<F, Multiply>(factors, Rounding::Nearest);
    }
    return rounded<F, Divide>(in, Rounding::Nearest);
  }
};

// PTX ISA 9.7.3: div
void decode_div(Words& words, Instr& instr) {
  const FloatType type = FloatType(words.need_one({"f32", "f64"}));
  need_float_operands(words, instr, 3, type);
  instr.run = run_of<Rounded<Divide>>(type);
  if (take_rounding(words, instr)) {
    if (type == FloatType::F32) take_ftz(words, instr);
    return;
  }
  if (type != FloatType::F32) words.unknown("needs a rounding");
  // .full: correctly rounded, where the ISA allows 2 ulp.
  if (words.need_one({"approx", "full"}) == 0) instr.run = elementwise<Single, 1, DivideApproximately>;
  take_ftz(words, instr);
}

// ---- abs, neg

struct Magnitude {
  static constexpr int sources = 1;
  template <class F>
  static uint64_t apply(const uint64_t* in, int64_t, Rounding) {
    return in[0] & F::all;
  }
};
struct Negative {
  static constexpr int sources = 1;
  template <class F>
  static uint64_t apply(const uint64_t* in, int64_t, Rounding) {
    return in[0] ^ F::sign;
  }
};

// PTX ISA 9.7.3, 9.7.4: abs, neg. A NaN stays one; which one is not specified.
template <class Operation>
void decode_sign(Words& words, Instr& instr) {
  const FloatType type = take_unpaired_type(words);
  need_float_operands(words, instr, 2, type);
  if (type == FloatType::F32 || type == FloatType::F16 || type == FloatType::F16x2) take_ftz(words, instr);
  instr.run = run_of<Operation>(type);
}

// ---- min, max

template <bool MAX, int SOURCES>
struct Extreme {
  static constexpr int sources = SOURCES;
  template <class F>
  static uint64_t apply(const uint64_t* in, int64_t modifiers, Rounding) {
    uint64_t best = nan_bits<F>(), sign = 0;
    bool nan = false, found = false;
    for (int i = 0; i < SOURCES; ++i) {
      uint64_t value = in[i];
      sign ^= value & F::sign;
      if (modifiers & ABSOLUTE) value &= F::all;
      if (is_nan<F>(value)) {
        nan = true;
      } else if (
          !found || (MAX ? order_of<F>(value) > order_of<F>(best) : order_of<F>(value) < order_of<F>(best))) {
        best = value;
        found = true;
      }
    }
    // A NaN is passed over, but with .NaN.
    if (!found || (nan && modifiers & NAN_WINS)) return nan_bits<F>();
    return modifiers & XOR_SIGN ? best | sign : best;
  }
};

// PTX ISA 9.7.3, 9.7.4: min, max
template <bool MAX>
void decode_extreme(Words& words, Instr& instr) {
  const FloatType type = take_unpaired_type(words);
  const bool three = type == FloatType::F32 && instr.ops.size() == 4;
  need_float_operands(words, instr, three ? 4 : 3, type);
  instr.run = run_of<Extreme<MAX, 2>>(type);
  if (type == FloatType::F64) return;
  if (type != FloatType::BF16 && type != FloatType::BF16x2) take_ftz(words, instr);
  if (words.take("NaN")) instr.data[0] |= NAN_WINS;
  if (three) {
    instr.run = elementwise<Single, 1, Extreme<MAX, 3>>;
    if (words.take("abs")) instr.data[0] |= ABSOLUTE;
  } else if (words.take("xorsign")) {
    if (!words.take("abs")) words.unknown(".xorsign goes with .abs");
    instr.data[0] |= XOR_SIGN | ABSOLUTE;
  }
}

}  // namespace

void decode_float_arithmetic(Words& words, Instr& instr) {
  const std::string& word = words.first();
  if (word == "add") decode_sum<Add, true>(words, instr);
  else if (word == "sub") decode_sum<Subtract, true>(words, instr);
  else if (word == "mul") decode_sum<Multiply, false>(words, instr);
  else if (word == "mad") decode_mad(words, instr);
  else if (word == "div") decode_div(words, instr);
  else if (word == "abs") decode_sign<Magnitude>(words, instr);
  else if (word == "neg") decode_sign<Negative>(words, instr);
  else if (word == "min") decode_extreme<false>(words, instr);
  else if (word == "max") decode_extreme<true>(words, instr);
  else words.unknown("has no floating-point form");
}

static const Family fma("fma", decode_fma);

}  // namespace ptx
