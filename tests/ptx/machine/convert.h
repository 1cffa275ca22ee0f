// What the rooms of cvt share: its modifiers.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "lanes.h"
#include "numbers.h"

namespace ptx {

// Instr::data of a cvt.
constexpr int ROUNDING = 0, FLAGS = 1, SPECIAL = 2;
enum : int { FTZ = 1, SAT = 2, RELU = 4, SATFINITE = 8, INTEGRAL = 16 };

inline Rounding rounding_of(const Step& step) { return Rounding(step.instr.data[ROUNDING]); }

// .relu: nothing is negative
template <class F>
uint64_t relu(uint64_t bits, int flags) {
  const bool nan =
      F::top == Top::Ieee ? (bits & F::all) > F::infinity : F::top == Top::OneNan && (bits & F::all) == F::all;
  return flags & RELU && bits & F::sign && !nan ? 0 : bits;
}

struct Modifiers {
  int rounding;  // of floats, as Rounding counts; -1: none
  int integral;  // .rni .rzi .rmi .rpi; -1: none
  int flags;
};

inline void keep(Instr& instr, const Modifiers& with) {
  constexpr Rounding OF_INTEGRAL[] = {Rounding::Nearest, Rounding::Zero, Rounding::Down, Rounding::Up};
  const Rounding rounding = with.integral >= 0 ? OF_INTEGRAL[with.integral] : Rounding(std::max(with.rounding, 0));
  instr.data[ROUNDING] = int(rounding);
  instr.data[FLAGS] = with.flags | (with.integral >= 0 ? INTEGRAL : 0);
}

inline void allow(const Words& words, const Modifiers& with, int flags) {
  if (with.flags & ~flags) words.unknown("has a modifier that its types don't take");
}

inline void need_rounding(const Words& words, const Modifiers& with, std::initializer_list<Rounding> which) {
  for (Rounding each : which)
    if (with.rounding == int(each) && with.integral < 0) return;
  words.unknown("needs a rounding that its types have");
}

// So many registers of so many bits each: what is packed is never wider than its type.
inline void need_exactly(const Words& words, const Instr& instr, int to, int sources, int from) {
  need_operands(words, instr, 1 + sources, 1 + sources);
  need_register(words, instr.ops[0], to);
  for (int i = 1; i <= sources; ++i) need_source(words, instr.ops[i], from);
}

// Pairs, and tf32 (convert_packed.cpp). False if the types are neither.
bool decode_packed(
    const Words& words, Instr& instr, const Modifiers& with, const std::string& to, const std::string& from);

}  // namespace ptx
