// Functions of one number: rcp sqrt rsqrt sin cos lg2 ex2 tanh.
//
// PTX states how far an .approx may be from the true value, not which number it is. The machine has the number
// nearest to the true value, to a last bit: within every stated bound. So a kernel whose result hangs on the
// last bits of an approximation gets other ones on a device.
#include "floating.h"

namespace ptx {
namespace {

double rsqrt(double x) { return 1 / std::sqrt(x); }
double sine(double x) { return std::sin(x); }
double cosine(double x) { return std::cos(x); }
double binary_logarithm(double x) { return std::log2(x); }
double power_of_two(double x) { return std::exp2(x); }
double hyperbolic_tangent(double x) { return std::tanh(x); }

// In double precision, then rounded.
template <double (*FUNCTION)(double)>
struct Through {
  static constexpr int sources = 1;
  template <class F>
  static uint64_t apply(const uint64_t* in, int64_t, Rounding) {
    return encode<F>(number_of(FUNCTION(to_double(decode<F>(in[0])))));
  }
};

// Of the upper 32 bits of a double, as a double whose lower 32 are zero.
template <double (*FUNCTION)(double)>
struct Gross {
  static constexpr int sources = 1;
  template <class F>
  static uint64_t apply(const uint64_t* in, int64_t, Rounding) {
    const uint64_t upper = 0xffffffff00000000;
    if (is_nan<Double>(in[0])) return 0x7fffffff00000000;
    const double result = FUNCTION(double_of(in[0] & upper));
    return result != result ? 0x7fffffff00000000 : bits_of(result) & upper;
  }
};
double reciprocal(double x) { return 1 / x; }

FloatType one_float(Words& words, Instr& instr, FloatType type) {
  need_float_operands(words, instr, 2, type);
  return type;
}

// PTX ISA 9.7.3: rcp, rcp.approx.ftz.f64
void decode_rcp(Words& words, Instr& instr) {
  const FloatType type = one_float(words, instr, FloatType(words.need_one({"f32", "f64"})));
  instr.run = run_of<Rounded<Reciprocal>>(type);
  const bool approximate = words.take("approx");
  if (!approximate && !take_rounding(words, instr)) words.unknown("needs .approx or a rounding");
  if (type == FloatType::F32) {
    take_ftz(words, instr);
  } else if (approximate) {
    words.need_one({"ftz"});
    instr.data[0] |= FTZ;
    instr.run = elementwise<Double, 1, Gross<reciprocal>>;
  }
}

// PTX ISA 9.7.3: sqrt
void decode_sqrt(Words& words, Instr& instr) {
  const FloatType type = one_float(words, instr, FloatType(words.need_one({"f32", "f64"})));
  const bool approximate = type == FloatType::F32 && words.take("approx");
  if (!approximate && !take_rounding(words, instr)) words.unknown("needs .approx.f32 or a rounding");
  if (type == FloatType::F32) take_ftz(words, instr);
  instr.run = run_of<Rounded<SquareRoot>>(type);
}

// PTX ISA 9.7.3: rsqrt, rsqrt.approx.ftz.f64
void decode_rsqrt(Words& words, Instr& instr) {
  const FloatType type = one_float(words, instr, FloatType(words.need_one({"f32", "f64"})));
  words.need_one({"approx"});
  take_ftz(words, instr);
  instr.run = run_of<Through<rsqrt>>(type);
  if (type == FloatType::F64 && instr.data[0] & FTZ) instr.run = elementwise<Double, 1, Gross<rsqrt>>;
}

// PTX ISA 9.7.3: sin, cos, lg2
template <double (*FUNCTION)(double)>
void decode_single(Words& words, Instr& instr) {
  words.need_one({"f32"});
  words.need_one({"approx"});
  take_ftz(words, instr);
  instr.run = run_of<Through<FUNCTION>>(one_float(words, instr, FloatType::F32));
}

// PTX ISA 9.7.3, 9.7.4: ex2
void decode_ex2(Words& words, Instr& instr) {
  const FloatType type = one_float(words, instr, take_float_type(words));
  words.need_one({"approx"});
  if (type == FloatType::F64 || type == FloatType::F32x2) words.unknown("needs .f32 or a half");
  if (type == FloatType::BF16 || type == FloatType::BF16x2) {
    words.need_one({"ftz"});
    instr.data[0] |= FTZ;
  } else if (type == FloatType::F32) {
    take_ftz(words, instr);
  }
  instr.run = run_of<Through<power_of_two>>(type);
}

// PTX ISA 9.7.3, 9.7.4: tanh
void decode_tanh(Words& words, Instr& instr) {
  const FloatType type = one_float(words, instr, take_float_type(words));
  words.need_one({"approx"});
  if (type == FloatType::F64 || type == FloatType::F32x2) words.unknown("needs .f32 or a half");
  instr.run = run_of<Through<hyperbolic_tangent>>(type);
}

const Family rcp("rcp", decode_rcp);
const Family sqrt("sqrt", decode_sqrt);
const Family rsqrt_family("rsqrt", decode_rsqrt);
const Family sin("sin", decode_single<sine>);
const Family cos("cos", decode_single<cosine>);
const Family lg2("lg2", decode_single<binary_logarithm>);
const Family ex2("ex2", decode_ex2);
const Family tanh("tanh", decode_tanh);

}  // namespace
}  // namespace ptx
