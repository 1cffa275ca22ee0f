// mma.sync. PTX ISA, "Matrix multiply-accumulate operation using mma instruction".
#include <array>
#include <cmath>

#include "fragments.h"

namespace ptx {

// ---- What the three kinds of matrix instructions share

Element element_of(Words& words, const std::string& word) {
  static const std::pair<const char*, Element> elements[] = {
      {"f16", Element::F16},   {"bf16", Element::BF16}, {"tf32", Element::TF32}, {"e4m3", Element::E4M3},
      {"e5m2", Element::E5M2}, {"e3m2", Element::E3M2}, {"e2m3", Element::E2M3}, {"e2m1", Element::E2M1},
      {"s8", Element::S8},     {"u8", Element::U8},     {"s4", Element::S4},     {"u4", Element::U4},
      {"f64", Element::F64},   {"f32", Element::F32},   {"s32", Element::S32}};
  for (auto& [name, element] : elements)
    if (word == name) return element;
  words.unknown("the machine's matrix instructions have no type " + word);
}

// PTX ISA, "mma", .kind::f8f6f4: six bits are the lower ones of a byte, four bits are its bits 2 to 5.
const double* values_of_eight_bits(Element element) {
  using Values = std::array<double, 256>;
  const auto table = [](auto&& value) {
    Values values;
    for (int i = 0; i < 256; ++i) values[i] = value(i);
    return values;
  };
  static const Values e4m3 = table([](int bits) { return from_e4m3(bits); });
  static const Values e5m2 = table([](int bits) { return from_e5m2(bits); });
  static const Values e3m2 = table([](int bits) { return from_e3m2(bits & 63); });
  static const Values e2m3 = table([](int bits) { return from_e2m3(bits & 63); });
  static const Values e2m1 = table([](int bits) { return from_e2m1(bits >> 2 & 15); });
  switch (element) {
    case Element::E4M3: return e4m3.data();
    case Element::E5M2: return e5m2.data();
    case Element::E3M2: return e3m2.data();
    case Element::E2M3: return e2m3.data();
    default: return e2m1.data();
  }
}

void need_registers(const Words& words, const Operand& operand, int count, int width, const char* of) {
  const Operand* parts = registers(operand);
  bool right = register_count(operand) == count;
  for (int i = 0; right && i < count; ++i)
    right = parts[i].is == Is::Immediate || parts[i].is == Is::Sink ||
            (parts[i].is == Is::Register && (width == 64) == (parts[i].width == 64) && parts[i].width > 1);
  if (!right) words.unknown(format("its %s takes %d registers of %d bits", of, count, width));
}

// Compiled for what the processor has. Every version adds in the same order, and products are exact, so that
// all have the same bits.
#if defined(__x86_64__)
#define PTX_VECTORS __attribute__((optimize("O3"), target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PTX_VECTORS __attribute__((optimize("O3")))
#endif

PTX_VECTORS
void multiply_add(const double* a, const double* b, double* d, int m, int n, int k) {
  for (int row = 0; row < m; ++row) {
    double* __restrict to = d + row * n;
    for (int i = 0; i < k; i += 4) {
      const double *factors = a + row * k + i, *from = b + i * n;
      const double f0 = factors[0], f1 = factors[1], f2 = factors[2], f3 = factors[3];
      for (int c = 0; c < n; ++c) {
        double sum = to[c] + f0 * from[c];
        sum += f1 * from[n + c];
        sum += f2 * from[2 * n + c];
        sum += f3 * from[3 * n + c];
        to[c] = sum;
      }
    }
  }
}

void multiply_add_f64(const double* a, const double* b, double* d, int m, int n, int k) {
  for (int row = 0; row < m; ++row)
    for (int c = 0; c < n; ++c)
      for (int i = 0; i < k; ++i) d[row * n + c] = std::fma(a[row * k + i], b[i * n + c], d[row * n + c]);
}

// ---- mma

namespace {

constexpr int N = 8, MOST_M = 16, MOST_K = 64;

enum { M, K, A, B, ACCUMULATOR, SATFINITE };  // in Instr::data

// PTX ISA, "Matrix Fragments for mma": a register of B has `in_word` neighbours along k of column `group`.
template <Element E>
uint32_t gather_b(Step& step, const Operand& operand, double* b) {
  constexpr int IN_WORD = in_word(E);
  uint32_t undefined = 0;
  const Operand* parts = registers(operand);
  for (int i = 0, count = register_count(operand); i < count; ++i) {
    const Source source = step.source(parts[i]);
    for (int lane = 0; lane < LANES; ++lane) {
      const uint64_t word = E == Element::F64 ? source.get<uint64_t>(lane) : source.get<uint32_t>(lane);
      const int k = (4 * i + lane % 4) * IN_WORD;
      for (int j = 0; j < IN_WORD; ++j) b[(k + j) * N + lane / 4] = value_of<E>(word, j);
    }
    if (source.undefined) FOR_LANES(lane, source.undefined) undefined |= 1u << lane / 4;
  }
  return undefined;
}

// A row of C and D has two neighbours a lane: in one register for f16, in two for the others.
template <Element E>
Outcome run(Step& step) {
  if (step.active != ALL) throw Fault("needs all 32 lanes of its warp");
  const int64_t* data = step.instr.data;
  const int m = data[M], k = data[K];
  double a[MOST_M * MOST_K], b[MOST_K * N], d[MOST_M * N];
  uint32_t undefined_rows = 0, undefined_columns = 0;
  with_element(Element(data[A]), [&](auto e) { undefined_rows = gather_a<e()>(step, step.op(1), m, k, a); });
  with_element(Element(data[B]), [&](auto e) { undefined_columns = gather_b<e()>(step, step.op(2), b); });

  const Operand *from = registers(step.op(3)), *to = registers(step.op(0));
  Mask undefined[4];
  for (int below = 0; below < m / 8; ++below)
    for (int j = 0; j < 2; ++j) {
      const Source source = step.source(from[E == Element::F16 ? below : 2 * below + j]);
      for (int lane = 0; lane < LANES; ++lane) {
        const uint64_t word = E == Element::F64 ? source.get<uint64_t>(lane) : source.get<uint32_t>(lane);
        d[(lane / 4 + 8 * below) * N + lane % 4 * 2 + j] = value_of<E>(word, E == Element::F16 ? j : 0);
      }
      undefined[2 * below + j] =
          source.undefined | lanes_of_rows(undefined_rows >> 8 * below) | lanes_of_columns(undefined_columns, j);
    }

  if (E == Element::F64) multiply_add_f64(a, b, d, m, N, k);
  else multiply_add(a, b, d, m, N, k);

  for (int below = 0; below < m / 8; ++below) {
    for (int lane = 0; lane < LANES; ++lane) {
      const double* pair = &d[(lane / 4 + 8 * below) * N + lane % 4 * 2];
      if (E == Element::F16) {
        step.set(to[below], lane, uint32_t(to_half(pair[0])) | uint32_t(to_half(pair[1])) << 16);
        continue;
      }
      for (int j = 0; j < 2; ++j) {
        const Operand& operand = to[2 * below + j];
        if (E == Element::F64) step.set(operand, lane, pair[j]);
        else if (E == Element::F32) step.set(operand, lane, rounded_to_float(pair[j]));
        else step.set(operand, lane, rounded_to_s32(pair[j], data[SATFINITE]));
      }
    }
    if (E == Element::F16) step.set_undefined(to[below], undefined[2 * below] | undefined[2 * below + 1]);
    else
      for (int j = 0; j < 2; ++j) step.set_undefined(to[2 * below + j], undefined[2 * below + j]);
  }
  step.count.multiplies += m * N * k;
  return Outcome::Done;
}

// The shapes that a pair of types has, and the accumulators.
bool valid(int m, int k, Element d, Element a, Element b, Element c, bool small_floats) {
  const bool tall = m == 16;
  if (d != c) return false;
  if (small_floats)  // .kind::f8f6f4
    return is_eight_bits_float(a) && is_eight_bits_float(b) && tall && k == 32 &&
           (d == Element::F32 || d == Element::F16);
  if (is_integer(a)) {
    if (!is_integer(b) || bits_of(a) != bits_of(b) || d != Element::S32) return false;
    const int most = 256 / bits_of(a);
    return tall ? k == most || k == most / 2 : k == most / 2;
  }
  if (a == Element::F64) return b == a && d == a && (tall ? k == 4 || k == 8 || k == 16 : k == 4);
  if (!tall) return false;
  if (a == Element::E4M3 || a == Element::E5M2)
    return (b == Element::E4M3 || b == Element::E5M2) && (d == Element::F32 || d == Element::F16) &&
           (k == 16 || k == 32);
  if (a != b) return false;
  if (a == Element::F16) return (d == Element::F32 || d == Element::F16) && (k == 8 || k == 16);
  if (a == Element::BF16) return d == Element::F32 && (k == 8 || k == 16);
  return a == Element::TF32 && d == Element::F32 && (k == 4 || k == 8);
}

void decode_mma(Words& words, Instr& instr) {
  if (words.take("sp") || words.take("sp::ordered_metadata")) words.unknown("the machine has no sparse matrices");
  if (!words.take("sync") || !words.take("aligned")) words.unknown("mma is .sync.aligned");
  const std::string shape = words.next();
  int m = 0, n = 0, k = 0;
  if (std::sscanf(shape.c_str(), "m%dn%dk%d", &m, &n, &k) != 3 || n != N || (m != 8 && m != 16))
    words.unknown("mma has no shape " + shape);
  if (words.next() != "row" || words.next() != "col")
    words.unknown("the machine's mma takes A by rows and B by columns");
  if (words.take("block_scale")) words.unknown("the machine's mma has no block scales");
  const bool small_floats = words.take("kind::f8f6f4");
  const bool satfinite = words.take("satfinite");
  const std::string type = words.next();
  const Element d = element_of(words, type), a = element_of(words, words.next());
  const Element b = element_of(words, words.next()), c = element_of(words, words.next());
  if (!valid(m, k, d, a, b, c, small_floats) || (satfinite && d != Element::S32))
    words.unknown("the machine's mma has no such shape with such types");
  need_operands(words, instr, 4, 4);
  const int width = d == Element::F64 ? 64 : 32;
  need_registers(words, instr.ops[1], m * k / LANES / in_word(a), width, "A");
  need_registers(words, instr.ops[2], N * k / LANES / in_word(b), width, "B");
  need_registers(words, instr.ops[0], m * N / LANES / in_word(d), width, "D");
  need_registers(words, instr.ops[3], m * N / LANES / in_word(d), width, "C");
  instr.aligned = true;
  const int64_t data[] = {m, k, int64_t(a), int64_t(b), int64_t(d), satfinite};
  std::copy(std::begin(data), std::end(data), instr.data);
  switch (d) {
    case Element::F16: instr.run = run<Element::F16>; break;
    case Element::F32: instr.run = run<Element::F32>; break;
    case Element::F64: instr.run = run<Element::F64>; break;
    default: instr.run = run<Element::S32>; break;
  }
}

const Family mma("mma", decode_mma);

}  // namespace
}  // namespace ptx
