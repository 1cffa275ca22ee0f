// Instructions that compute something of their sources in each lane, and what their decoders share.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "decode.h"

namespace ptx {

// ---- What a decoder demands of operands

// Registers of 8 bits have 16 here.
inline int register_bits(int bits) { return bits == 8 ? 16 : bits; }

inline void need_register(const Words& words, const Operand& operand, int bits) {
  if (operand.is != Is::Register) words.unknown("writes what is no register");
  if (operand.width != register_bits(bits))
    words.unknown(format("writes a register of %d bits, expected %d", operand.width, bits));
}

inline void need_source(const Words& words, const Operand& operand, int bits) {
  switch (operand.is) {
    case Is::Register:
      if (operand.width != register_bits(bits))
        words.unknown(format("takes a register of %d bits, expected %d", operand.width, bits));
      return;
    case Is::Immediate:
    case Is::Shared:
    case Is::Local:
    case Is::Parameter:
    case Is::Scratch: return;
    default: words.unknown("takes neither a register nor a constant");
  }
}

inline void need_predicate(const Words& words, const Operand& operand) {
  if (!operand.predicate() && operand.is != Is::Immediate) words.unknown("takes what is no predicate");
}

inline void need_predicate_register(const Words& words, const Operand& operand) {
  if (operand.is != Is::Sink && (operand.is != Is::Register || operand.width != 1))
    words.unknown("writes what is no predicate");
}

// f(a number of the integer type of the opcode)
template <class F>
void with_integer(Words& words, F f) {
  switch (words.need_one({"u16", "u32", "u64", "s16", "s32", "s64"})) {
    case 0: return f(uint16_t());
    case 1: return f(uint32_t());
    case 2: return f(uint64_t());
    case 3: return f(int16_t());
    case 4: return f(int32_t());
    default: return f(int64_t());
  }
}

template <class F>
void with_signed(Words& words, F f) {
  switch (words.need_one({"s16", "s32", "s64"})) {
    case 0: return f(int16_t());
    case 1: return f(int32_t());
    default: return f(int64_t());
  }
}

template <class F>
void with_words_and_longs(Words& words, F f) {
  switch (words.need_one({"u32", "u64", "s32", "s64"})) {
    case 0: return f(uint32_t());
    case 1: return f(uint64_t());
    case 2: return f(int32_t());
    default: return f(int64_t());
  }
}

// ---- What runs

// The lanes of a register whose slots are as wide as T, or 32 bits where T is narrower.
template <class T>
class Target {
 public:
  Target(Step& step, const Operand& operand) : to_(step.warp.at(operand)) {}
  void set(int lane, T value) {
    if constexpr (sizeof(T) < 4) {
      const uint32_t slot = std::make_unsigned_t<T>(value);
      std::memcpy(to_ + 4 * lane, &slot, 4);
    } else {
      std::memcpy(to_ + sizeof(T) * lane, &value, sizeof(T));
    }
  }

 private:
  char* to_;
};

// Operand 0 = F(operand 1, operand 2, ...) in each lane; undefined where a source is.
template <auto F>
struct Lanes;

template <class D, class... A, D (*F)(A...)>
struct Lanes<F> {
  static Outcome run(Step& step) { return run(step, std::index_sequence_for<A...>()); }

  static void use(Words& words, Instr& instr) {
    need_operands(words, instr, 1 + sizeof...(A), 1 + sizeof...(A));
    need_register(words, instr.ops[0], 8 * sizeof(D));
    int i = 1;
    (need_source(words, instr.ops[i++], 8 * sizeof(A)), ...);
    instr.run = run;
  }

 private:
  template <size_t... I>
  static Outcome run(Step& step, std::index_sequence<I...>) {
    const Source sources[] = {step.source(1 + I)...};
    Target<D> to(step, step.op(0));
    FOR_LANES(lane, step.active) to.set(lane, F(sources[I].template get<A>(lane)...));
    step.set_undefined(step.op(0), (sources[I].undefined | ...));
    return Outcome::Done;
  }
};

template <auto F>
void use(Words& words, Instr& instr) {
  Lanes<F>::use(words, instr);
}

// ---- Predicates that may be undefined

enum class Bool : int8_t { None = -1, And, Or, Xor };

struct Truth {
  Mask value;
  Mask undefined;
};

// A false operand decides an `and`, and a true one an `or`, whatever the other is.
inline Truth combine(Bool operation, Truth a, Truth b) {
  const Mask either = a.undefined | b.undefined;
  switch (operation) {
    case Bool::And: return {a.value & b.value, either & ~(~a.value & ~a.undefined) & ~(~b.value & ~b.undefined)};
    case Bool::Or: return {a.value | b.value, either & ~(a.value & ~a.undefined) & ~(b.value & ~b.undefined)};
    case Bool::Xor: return {a.value ^ b.value, either};
    default: return a;
  }
}

inline Truth truth(Step& step, const Operand& operand) {
  return {step.predicate(operand), step.undefined(operand)};
}

}  // namespace ptx
