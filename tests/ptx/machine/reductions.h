// What atomics, reductions and cp.reduce.async.bulk make of an element in memory and one that comes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "numbers.h"
#include "tensormap.h"

namespace ptx {

enum class Reduction : uint8_t { Add, Min, Max, Inc, Dec, And, Or, Xor };

using Combine = void (*)(uint8_t* to, const uint8_t* from);

namespace reductions {

// How a float is computed with. Sums of two halves in binary32 are good for one rounding at the end; what is
// no number becomes the canonical NaN.
struct Half {
  using Bits = uint16_t;
  static float widen(Bits bits) { return from_half(bits); }
  static Bits narrow(float value) { return to_half(value); }
};

struct Bfloat16 {
  using Bits = uint16_t;
  static float widen(Bits bits) { return from_bf16(bits); }
  static Bits narrow(float value) { return to_bf16(value); }
};

struct Single {
  using Bits = float;
  static float widen(Bits value) { return value; }
  static Bits narrow(float value) { return std::isnan(value) ? float_of(nan_bits<ptx::Single>()) : value; }
};

// Subnormal numbers, taken and made, are zeros.
struct Flushed {
  using Bits = float;
  static float widen(Bits value) { return flush(value); }
  static Bits narrow(float value) { return Single::narrow(flush(value)); }
};

struct Double {
  using Bits = double;
  static double widen(Bits value) { return value; }
  static Bits narrow(double value) { return std::isnan(value) ? double_of(nan_bits<ptx::Double>()) : value; }
};

template <class Float, Reduction op>
void combine_floats(uint8_t* to, const uint8_t* from) {
  typename Float::Bits mine, theirs;
  std::memcpy(&mine, to, sizeof mine);
  std::memcpy(&theirs, from, sizeof theirs);
  const auto a = Float::widen(mine), b = Float::widen(theirs);
  auto value = a + b;
  if (op != Reduction::Add) {
    if (std::isnan(a) || std::isnan(b)) value = std::isnan(a) ? b : a;
    else if (a == b) value = std::signbit(a) == (op == Reduction::Min) ? a : b;  // -0 < +0
    else value = (a < b) == (op == Reduction::Min) ? a : b;
  }
  const typename Float::Bits result = Float::narrow(value);
  std::memcpy(to, &result, sizeof result);
}

template <class T, Reduction op>
void combine_integers(uint8_t* to, const uint8_t* from) {
  using Bits = std::make_unsigned_t<T>;
  T mine, theirs;
  std::memcpy(&mine, to, sizeof mine);
  std::memcpy(&theirs, from, sizeof theirs);
  switch (op) {
    case Reduction::Add: mine = T(Bits(mine) + Bits(theirs)); break;
    case Reduction::Min: mine = std::min(mine, theirs); break;
    case Reduction::Max: mine = std::max(mine, theirs); break;
    case Reduction::Inc: mine = mine >= theirs ? 0 : mine + 1; break;
    case Reduction::Dec: mine = mine == 0 || mine > theirs ? theirs : mine - 1; break;
    case Reduction::And: mine &= theirs; break;
    case Reduction::Or: mine |= theirs; break;
    case Reduction::Xor: mine ^= theirs; break;
  }
  std::memcpy(to, &mine, sizeof mine);
}

template <class T>
Combine integers_of(Reduction op) {
  switch (op) {
    case Reduction::Add: return combine_integers<T, Reduction::Add>;
    case Reduction::Min: return combine_integers<T, Reduction::Min>;
    case Reduction::Max: return combine_integers<T, Reduction::Max>;
    case Reduction::Inc: return combine_integers<T, Reduction::Inc>;
    case Reduction::Dec: return combine_integers<T, Reduction::Dec>;
    case Reduction::And: return combine_integers<T, Reduction::And>;
    case Reduction::Or: return combine_integers<T, Reduction::Or>;
    case Reduction::Xor: return combine_integers<T, Reduction::Xor>;
  }
  return nullptr;
}

template <class Float>
Combine floats_of(Reduction op) {
  switch (op) {
    case Reduction::Add: return combine_floats<Float, Reduction::Add>;
    case Reduction::Min: return combine_floats<Float, Reduction::Min>;
    case Reduction::Max: return combine_floats<Float, Reduction::Max>;
    default: return nullptr;
  }
}

}  // namespace reductions

// By the table of PTX ISA, cp.reduce.async.bulk, for a destination in global memory; null if the table
// has no such pair.
inline Combine combine_of(Reduction op, Element element) {
  const bool bits = op >= Reduction::And;
  const bool steps = op == Reduction::Inc || op == Reduction::Dec;
  switch (element) {
    case Element::U32: return reductions::integers_of<uint32_t>(op);
    case Element::S32: return steps ? nullptr : reductions::integers_of<int32_t>(op);
    case Element::U64: return steps ? nullptr : reductions::integers_of<uint64_t>(op);
    case Element::S64: return steps || op == Reduction::Add ? nullptr : reductions::integers_of<int64_t>(op);
    case Element::F16: return bits || steps ? nullptr : reductions::floats_of<reductions::Half>(op);
    case Element::BF16: return bits || steps ? nullptr : reductions::floats_of<reductions::Bfloat16>(op);
    case Element::F32:
      return op == Reduction::Add ? reductions::combine_floats<reductions::Flushed, Reduction::Add> : nullptr;
    case Element::F64:
      return op == Reduction::Add ? reductions::combine_floats<reductions::Double, Reduction::Add> : nullptr;
    default: return nullptr;
  }
}

}  // namespace ptx
