// Matrices in registers and in the unit that multiplies them: what mma, wmma and wgmma share.
#pragma once

#include "decode.h"
#include "machine.h"
#include "numbers.h"

namespace ptx {

enum class Element : uint8_t { F16, BF16, TF32, E4M3, E5M2, E3M2, E2M3, E2M1, S8, U8, S4, U4, F64, F32, S32 };

constexpr int bits_of(Element element) {
  switch (element) {
    case Element::F64: return 64;
    case Element::F32:
    case Element::S32:
    case Element::TF32: return 32;
    case Element::F16:
    case Element::BF16: return 16;
    case Element::S4:
    case Element::U4: return 4;
    default: return 8;  // the formats of six and four bits are held in eight
  }
}
constexpr int in_word(Element element) { return element == Element::F64 ? 1 : 32 / bits_of(element); }
constexpr bool is_integer(Element element) {
  return element == Element::S8 || element == Element::U8 || element == Element::S4 || element == Element::U4;
}
constexpr bool is_eight_bits_float(Element element) {
  return element == Element::E4M3 || element == Element::E5M2 || element == Element::E3M2 ||
         element == Element::E2M3 || element == Element::E2M1;
}

// Takes a type's word. Unknown if it is none of these.
Element element_of(Words& words, const std::string& word);

// Every value of a format of eight bits.
const double* values_of_eight_bits(Element element);

// Element i of a word (of 64 bits for f64).
template <Element E>
double value_of(uint64_t word, int i) {
  const uint32_t part = uint32_t(word >> (i * bits_of(E) % 64));
  switch (E) {
    case Element::F16: return from_half(uint16_t(part));
    case Element::BF16: return from_bf16(uint16_t(part));
    case Element::TF32: return cut_to_tf32(float_of(part));
    case Element::F32: return float_of(part);
    case Element::S32: return int32_t(part);
    case Element::F64: return double_of(word);
    case Element::S8: return int8_t(part);
    case Element::U8: return uint8_t(part);
    case Element::S4: return int32_t(part << 28) >> 28;
    case Element::U4: return part & 15;
    default: return values_of_eight_bits(E)[part & 255];
  }
}

// Calls `does` with the element as a constant.
template <class Does>
void with_element(Element element, const Does& does) {
  switch (element) {
#define PTX_ELEMENT(E) \
  case Element::E: does(std::integral_constant<Element, Element::E>()); return;
    PTX_ELEMENT(F16)
    PTX_ELEMENT(BF16)
    PTX_ELEMENT(TF32)
    PTX_ELEMENT(E4M3)
    PTX_ELEMENT(E5M2)
    PTX_ELEMENT(E3M2)
    PTX_ELEMENT(E2M3)
    PTX_ELEMENT(E2M1)
    PTX_ELEMENT(S8)
    PTX_ELEMENT(U8)
    PTX_ELEMENT(S4)
    PTX_ELEMENT(U4)
    PTX_ELEMENT(F64)
    PTX_ELEMENT(F32)
    PTX_ELEMENT(S32)
#undef PTX_ELEMENT
  }
}

// d[m][n] += Σ over k of a[m][k] · b[k][n], in double: products of all formats but f64 are exact. f64 is
// multiplied and added with one rounding. K is a multiple of 4.
//
// The caller rounds d once, to the accumulator's format. The order in which a GPU adds, and the bits that it
// cuts off before it does, are not modelled: NVIDIA doesn't document them.
void multiply_add(const double* a, const double* b, double* d, int m, int n, int k);
void multiply_add_f64(const double* a, const double* b, double* d, int m, int n, int k);

// The registers of {…}, or of one register without braces.
inline const Operand* registers(const Operand& operand) {
  return operand.is == Is::Vector ? operand.parts.data() : &operand;
}
inline int register_count(const Operand& operand) {
  return operand.is == Is::Vector ? int(operand.parts.size()) : 1;
}
// Unknown unless an operand has so many registers, of that width.
void need_registers(const Words& words, const Operand& operand, int count, int width, const char* of);

// A float as a matrix instruction writes it: NaNs are canonical.
inline float rounded_to_float(double value) {
  return value != value ? float_of(0x7fffffff) : static_cast<float>(value);
}
// s32 of an exact sum: clamped if .satfinite, else its low 32 bits.
inline uint32_t rounded_to_s32(double sum, bool satfinite) {
  const int64_t whole = static_cast<int64_t>(sum);
  if (!satfinite) return uint32_t(whole);
  return uint32_t(whole > INT32_MAX ? INT32_MAX : whole < INT32_MIN ? INT32_MIN : whole);
}

// ---- The fragments of mma and wgmma. Lane = 4 · group + t. PTX ISA, "Matrix Fragments for mma": a register
// of A has `in_word` neighbours along k of row `group`; then follows row group + 8, then the next k.

// Rows of A, [rows][k], from the registers of a warp; 8 or 16 rows. Returns the rows that are undefined.
template <Element E>
uint32_t gather_a(Step& step, const Operand& operand, int rows, int k, double* a) {
  constexpr int N = in_word(E);
  uint32_t undefined = 0;
  const Operand* parts = registers(operand);
  for (int i = 0, count = register_count(operand); i < count; ++i) {
    const Source source = step.source(parts[i]);
    const int below = rows == 16 ? 8 * (i & 1) : 0, first = (rows == 16 ? i >> 1 : i) * 4 * N;
    for (int lane = 0; lane < LANES; ++lane) {
      const uint64_t word = E == Element::F64 ? source.get<uint64_t>(lane) : source.get<uint32_t>(lane);
      double* to = &a[(lane / 4 + below) * k + first + lane % 4 * N];
      for (int j = 0; j < N; ++j) to[j] = value_of<E>(word, j);
    }
    if (source.undefined) FOR_LANES(lane, source.undefined) undefined |= 1u << (lane / 4 + below);
  }
  return undefined;
}

// Lanes that hold something of rows (a bit a row, eight of them) and of columns in place j of two.
inline Mask lanes_of_rows(uint32_t rows) {
  Mask lanes = 0;
  for (int row = 0; row < 8; ++row)
    if (rows >> row & 1) lanes |= 0xfu << 4 * row;
  return lanes;
}
inline Mask lanes_of_columns(uint32_t columns, int j) {
  Mask lanes = 0;
  for (int t = 0; t < 4; ++t)
    if (columns >> (2 * t + j) & 1) lanes |= 0x11111111u << t;
  return lanes;
}

}  // namespace ptx
