// cvt of pairs of floating-point numbers, and to tf32.
#include "convert.h"

namespace ptx {
namespace {

// PTX ISA, Data Movement and Conversion Instructions: cvt. The first source makes the upper part.
template <class F>
uint32_t part(const Number& number, const Step& step) {
  const int flags = step.instr.data[FLAGS];
  return relu<F>(encode<F>(number, rounding_of(step), flags & SATFINITE), flags);
}

template <class R, class F, int BITS>
Outcome floats_to_pair(Step& step) {
  const Source a = step.source(1), b = step.source(2);
  FOR_LANES(lane, step.active) {
    const uint32_t high = part<F>(number_of(a.get<float>(lane)), step);
    const uint32_t low = part<F>(number_of(b.get<float>(lane)), step);
    step.set(step.op(0), lane, R(high << BITS | low));
  }
  step.set_undefined(step.op(0), a.undefined | b.undefined);
  return Outcome::Done;
}

// Between two pairs, with elements of FROM and TO bits.
template <class R, class T, int TO, class F, int FROM>
Outcome pair_to_pair(Step& step) {
  const Source a = step.source(1);
  FOR_LANES(lane, step.active) {
    uint32_t pair = 0;
    std::memcpy(&pair, a.base + lane * a.stride, 2 * FROM / 8);
    const uint32_t high = part<T>(decode<F>(pair >> FROM), step);
    const uint32_t low = part<T>(decode<F>(pair & ((1u << FROM) - 1)), step);
    step.set(step.op(0), lane, R(high << TO | low));
  }
  step.set_undefined(step.op(0), a.undefined);
  return Outcome::Done;
}

Outcome floats_to_ue8m0(Step& step) {
  const Source a = step.source(1), b = step.source(2);
  const bool finite = step.instr.data[FLAGS] & SATFINITE;
  FOR_LANES(lane, step.active) {
    const uint32_t high = to_ue8m0(a.get<float>(lane), rounding_of(step), finite);
    const uint32_t low = to_ue8m0(b.get<float>(lane), rounding_of(step), finite);
    step.set(step.op(0), lane, uint16_t(high << 8 | low));
  }
  step.set_undefined(step.op(0), a.undefined | b.undefined);
  return Outcome::Done;
}

Outcome bf16x2_to_ue8m0(Step& step) {
  const Source a = step.source(1);
  const bool finite = step.instr.data[FLAGS] & SATFINITE;
  FOR_LANES(lane, step.active) {
    const uint32_t pair = a.get<uint32_t>(lane);
    const uint32_t high = to_ue8m0(from_bf16(pair >> 16), rounding_of(step), finite);
    const uint32_t low = to_ue8m0(from_bf16(uint16_t(pair)), rounding_of(step), finite);
    step.set(step.op(0), lane, uint16_t(high << 8 | low));
  }
  step.set_undefined(step.op(0), a.undefined);
  return Outcome::Done;
}

uint32_t ue8m0_to_bf16x2(uint16_t a) {
  return uint32_t(to_bf16(from_ue8m0(a >> 8))) << 16 | to_bf16(from_ue8m0(uint8_t(a)));
}

Outcome float_to_tf32(Step& step) {
  const Source a = step.source(1);
  FOR_LANES(lane, step.active) {
    step.set(step.op(0), lane, part<Tf32>(number_of(a.get<float>(lane)), step) << 13);
  }
  step.set_undefined(step.op(0), a.undefined);
  return Outcome::Done;
}

// What kernels are full of, without the way through Number.
uint32_t to_bf16x2_nearest(float a, float b) { return uint32_t(to_bf16(a)) << 16 | to_bf16(b); }

// ---- Decoders

// Between f16x2 and pairs of a format of less than 16 bits.
template <class R, class F, int BITS>
void decode_small(const Words& words, Instr& instr, const Modifiers& with, const std::string& other, bool to) {
  need_rounding(words, with, {Rounding::Nearest});
  if (!to) {
    allow(words, with, RELU);
    need_exactly(words, instr, 32, 1, 2 * BITS);
    instr.run = pair_to_pair<uint32_t, Half, 16, F, BITS>;
    return;
  }
  allow(words, with, RELU | SATFINITE);
  if (!(with.flags & SATFINITE)) words.unknown("needs .satfinite");
  if (other == "f32") {
    need_exactly(words, instr, 2 * BITS, 2, 32);
    instr.run = floats_to_pair<R, F, BITS>;
  } else if (other == "f16x2" && BITS == 8 && F::top != Top::Finite) {
    need_exactly(words, instr, 2 * BITS, 1, 32);
    instr.run = pair_to_pair<R, F, BITS, Half, 16>;
  } else {
    words.unknown("makes no such pair of ." + other);
  }
}

}  // namespace

bool decode_packed(
    const Words& words, Instr& instr, const Modifiers& with, const std::string& to, const std::string& from) {
  keep(instr, with);
  if ((to == "f16x2" || to == "bf16x2") && from == "f32") {
    need_rounding(words, with, {Rounding::Nearest, Rounding::Zero});
    allow(words, with, RELU | SATFINITE);
    need_exactly(words, instr, 32, 2, 32);
    if (to == "f16x2") instr.run = floats_to_pair<uint32_t, Half, 16>;
    else if (with.flags || with.rounding != int(Rounding::Nearest))
      instr.run = floats_to_pair<uint32_t, BFloat, 16>;
    else instr.run = Lanes<to_bf16x2_nearest>::run;
    return true;
  }
  if (to == "tf32" && from == "f32") {
    need_rounding(words, with, {Rounding::Nearest, Rounding::Away, Rounding::Zero});
    allow(words, with, with.rounding == int(Rounding::Away) ? SATFINITE : RELU | SATFINITE);
    need_exactly(words, instr, 32, 1, 32);
    instr.run = float_to_tf32;
    return true;
  }
  if (to == "ue8m0x2") {
    need_rounding(words, with, {Rounding::Zero, Rounding::Up});
    allow(words, with, SATFINITE);
    if (from != "f32" && from != "bf16x2") words.unknown("makes no .ue8m0x2 of ." + from);
    need_exactly(words, instr, 16, from == "f32" ? 2 : 1, 32);
    instr.run = from == "f32" ? floats_to_ue8m0 : bf16x2_to_ue8m0;
    return true;
  }
  if (to == "bf16x2" && from == "ue8m0x2") {
    need_rounding(words, with, {Rounding::Nearest});
    allow(words, with, 0);
    need_exactly(words, instr, 32, 1, 16);
    instr.run = Lanes<ue8m0_to_bf16x2>::run;
    return true;
  }
  const bool small_from = to == "f16x2";
  const std::string& small = small_from ? from : to;
  const std::string& other = small_from ? to : from;
  if (small == "e4m3x2") decode_small<uint16_t, E4M3, 8>(words, instr, with, other, !small_from);
  else if (small == "e5m2x2") decode_small<uint16_t, E5M2, 8>(words, instr, with, other, !small_from);
  else if (small == "e2m3x2") decode_small<uint16_t, E2M3, 8>(words, instr, with, other, !small_from);
  else if (small == "e3m2x2") decode_small<uint16_t, E3M2, 8>(words, instr, with, other, !small_from);
  else if (small == "e2m1x2") decode_small<uint8_t, E2M1, 4>(words, instr, with, other, !small_from);
  else return false;
  return true;
}

}  // namespace ptx
