// wmma.load, wmma.mma, wmma.store. PTX ISA, "Matrix multiply-accumulate operation using wmma instructions".
//
// The ISA leaves open which lane holds which element. Here a lane has neighbours: of an A [M, K] by rows, of
// the elements m · K + k, by columns k · M + m; B likewise; C and D by rows. So A that was loaded by rows and
// is multiplied as if by columns gives a wrong result. Lanes have the neighbours in no order, so that nobody
// finds in memory what he himself stored, without a barrier, by luck. Where a fragment has more places than
// elements, which is so for f16, it has each several times.
#include "access.h"
#include "fragments.h"

namespace ptx {
namespace {

constexpr int MOST_PLACES = 16;
constexpr uint32_t MOST_PIECE = 16;  // bytes that a lane reads or writes at once

constexpr int part_of(int lane) { return (5 * lane + 3) % LANES; }

enum class Of : uint8_t { A, B, Accumulator };

struct Shape {
  int m, n, k;
  int rows(Of of) const { return of == Of::B ? k : m; }
  int columns(Of of) const { return of == Of::A ? k : n; }
  int elements(Of of) const { return rows(of) * columns(of); }
};

// Registers of a fragment. PTX ISA, "Matrix Fragments for WMMA".
int registers_of(const Shape& shape, Of of, Element element) {
  if (element == Element::F16 && of != Of::Accumulator) return 8;
  return shape.elements(of) / LANES / in_word(element);
}

bool valid(const Shape& shape, Element element) {
  const bool three =
      (shape.m == 16 && shape.n == 16) || (shape.m == 32 && shape.n == 8) || (shape.m == 8 && shape.n == 32);
  switch (element) {
    case Element::F16:
    case Element::BF16:
    case Element::S8:
    case Element::U8: return three && shape.k == 16;
    case Element::TF32: return shape.m == 16 && shape.n == 16 && shape.k == 8;
    case Element::F64: return shape.m == 8 && shape.n == 8 && shape.k == 4;
    case Element::F32: return three && (shape.k == 16 || (shape.k == 8 && shape.m == 16));
    case Element::S32: return three && shape.k == 16;
    default: return false;
  }
}

Shape take_shape(Words& words) {
  const std::string word = words.next();
  Shape shape = {};
  if (std::sscanf(word.c_str(), "m%dn%dk%d", &shape.m, &shape.n, &shape.k) != 3)
    words.unknown("wmma has no shape " + word);
  return shape;
}

enum { M, N, K, OF, ELEMENT, BY_COLUMNS, SPACE };  // in Instr::data of a load or store

Shape shape_of(const Instr& instr) { return {int(instr.data[M]), int(instr.data[N]), int(instr.data[K])}; }

// ---- Memory

struct Pieces {
  uint32_t bytes;
  int count;        // a lane
  int elements;     // a lane
  bool contiguous;  // a piece is one element otherwise
  uint64_t first;   // address
  uint64_t stride;  // bytes from a row to the next
  int64_t side;     // elements of the fragment's own inner dimension
  uint32_t item;

  // Where element i of a lane lies.
  uint64_t at(int lane, int i) const {
    const int64_t index = int64_t(part_of(lane)) * elements + i;
    const int64_t outer = index / side, inner_index = index % side;
    return contiguous ? first + outer * stride + inner_index * item : first + inner_index * stride + outer * item;
  }
};

Pieces pieces_of(Step& step, const Operand& address, const Operand* stride) {
  if (step.active != ALL) throw Fault("needs all 32 lanes of its warp");
  const Instr& instr = step.instr;
  const Shape shape = shape_of(instr);
  const Of of = Of(instr.data[OF]);
  const bool by_columns = instr.data[BY_COLUMNS];
  Pieces pieces;
  pieces.item = bits_of(Element(instr.data[ELEMENT])) / 8;
  pieces.elements = shape.elements(of) / LANES;
  const int inner = by_columns ? shape.rows(of) : shape.columns(of);
  // C and D lie by rows in registers, A and B as they do in memory.
  pieces.contiguous = of != Of::Accumulator || !by_columns;
  pieces.side = pieces.contiguous ? inner : shape.columns(of);
  pieces.bytes = pieces.contiguous ? std::min(MOST_PIECE, uint32_t(pieces.elements) * pieces.item) : pieces.item;
  pieces.count = pieces.elements * pieces.item / pieces.bytes;

  // "p and stride must be the same for all threads in the warp."
  const Source base = step.address_base(address);
  pieces.first = step.address(address, base, 0);
  uint64_t items = inner;
  if (stride != nullptr) items = step.defined(*stride, "a stride").get<uint32_t>(0);
  for (int lane = 1; lane < LANES; ++lane)
    if (step.address(address, base, lane) != pieces.first ||
        (stride != nullptr && step.source(*stride).get<uint32_t>(lane) != items))
      throw Fault("has an address or a stride that isn't the same in all lanes", lane);
  pieces.stride = items * pieces.item;

  // PTX ISA, "Matrix Storage for WMMA": rows start at multiples of the fragment's size. CUDA C++ asks that of
  // the first one only, and of the others multiples of 16 bytes.
  const uint64_t fragment = registers_of(shape, of, Element(instr.data[ELEMENT])) * (pieces.item == 8 ? 8 : 4);
  if (pieces.first % fragment || pieces.stride % std::min<uint64_t>(fragment, MOST_PIECE))
    throw Fault(format(
        "has rows of %llu bytes from %#llx, where a fragment has %llu bytes", (unsigned long long)pieces.stride,
        (unsigned long long)pieces.first, (unsigned long long)fragment));
  return pieces;
}

// Calls `access(lane, element, place)` piece by piece, and counts.
template <class Access>
void for_pieces(Step& step, const Operand& operand, const Pieces& pieces, const Access& access) {
  const int each = pieces.elements / pieces.count;
  Places places(step, operand, Space(step.instr.data[SPACE]));  // of the matrix, then piece by piece
  for (int piece = 0; piece < pieces.count; ++piece) {
    for (int lane = 0; lane < LANES; ++lane) {
      Place& place = places.at[lane];
      place = place_of(step, lane, Space(step.instr.data[SPACE]), pieces.at(lane, piece * each));
      if (place.space != Space::Global && place.cta != &step.cta)
        throw Fault("has an address that is neither in global memory nor in its CTA's shared memory", lane);
      access(lane, piece * each, place);
    }
    count_access(step, places, ALL, pieces.bytes);
  }
}

// PTX ISA, "Warp-level Matrix Load Instruction: wmma.load"
Outcome load(Step& step) {
  const Operand& fragment = step.op(0);
  const Pieces pieces = pieces_of(step, step.op(1), step.instr.ops.size() > 2 ? &step.op(2) : nullptr);
  alignas(8) uint8_t values[LANES][MOST_PLACES * 8];
  Mask undefined[MOST_PLACES] = {};
  const int each = pieces.elements / pieces.count;
  for_pieces(step, step.op(1), pieces, [&](int lane, int element, const Place& place) {
    uint8_t* to = &values[lane][element * pieces.item];
    const bool without = place.cta != nullptr
                             ? place.cta->shared.read(step, lane, place.address, pieces.bytes, pieces.item, to)
                             : step.launch.read(step, lane, place.address, pieces.bytes, pieces.item, to);
    if (without)
      for (int i = element; i < element + each; ++i) undefined[i] |= 1u << lane;
  });
  const int in_register = std::max(1, int(4 / pieces.item));
  const Operand* to = registers(fragment);
  for (int i = 0, place = 0; i < register_count(fragment); ++i) {
    Mask without = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      uint64_t word = 0;
      for (int j = 0; j < in_register; ++j) {
        uint64_t value = 0;
        std::memcpy(&value, &values[lane][(place + j) % pieces.elements * pieces.item], pieces.item);
        word |= value << 8 * pieces.item * j;
      }
      if (pieces.item == 8) step.set(to[i], lane, word);
      else step.set(to[i], lane, uint32_t(word));
    }
    for (int j = 0; j < in_register; ++j) without |= undefined[(place + j) % pieces.elements];
    step.set_undefined(to[i], without);
    place += in_register;
  }
  return Outcome::Done;
}

// PTX ISA, "Warp-level Matrix Store Instruction: wmma.store"
Outcome store(Step& step) {
  const Operand& fragment = step.op(1);
  const Pieces pieces = pieces_of(step, step.op(0), step.instr.ops.size() > 2 ? &step.op(2) : nullptr);
  alignas(8) uint8_t values[LANES][MOST_PLACES * 8];
  const int in_register = std::max(1, int(4 / pieces.item));
  const int bytes = in_register * pieces.item;
  const Operand* from = registers(fragment);
  for (int i = 0; i < register_count(fragment); ++i) {
    const Source source = step.source(from[i]);
    if (source.undefined) throw Fault("stores an undefined value", __builtin_ctz(source.undefined));
    for (int lane = 0; lane < LANES; ++lane)
      std::memcpy(&values[lane][i * bytes], source.base + lane * source.stride, bytes);
  }
  for_pieces(step, step.op(0), pieces, [&](int lane, int element, const Place& place) {
    const uint8_t* value = &values[lane][element * pieces.item];
    if (place.cta != nullptr) place.cta->shared.write(step, lane, place.address, pieces.bytes, pieces.item, value);
    else step.launch.write(step, lane, place.address, pieces.bytes, pieces.item, value);
  });
  return Outcome::Done;
}

void decode_memory(Words& words, Instr& instr, bool loads) {
  const std::string which = words.next();
  const Of of = which == "a" ? Of::A : which == "b" ? Of::B : Of::Accumulator;
  if (of == Of::Accumulator && which != (loads ? "c" : "d")) words.unknown("wmma has no matrix " + which);
  if (!words.take("sync") || !words.take("aligned")) words.unknown("wmma is .sync.aligned");
  const bool by_columns = words.need_one({"row", "col"});
  const Shape shape = take_shape(words);
  need_operands(words, instr, 2, 3);
  const Operand &fragment = instr.ops[loads ? 0 : 1], &address = instr.ops[loads ? 1 : 0];
  const Space space = take_space(words, address);
  if (space != Space::Generic && space != Space::Global && space != Space::Shared)
    words.unknown("wmma is of global and of shared memory");
  const Element element = element_of(words, words.next());
  const bool sum = element == Element::F32 || element == Element::S32;
  const bool either = element == Element::F16 || element == Element::F64;
  if (!valid(shape, element) || (!either && sum != (of == Of::Accumulator)))
    words.unknown("the machine's wmma has no such shape with such a type");
  need_registers(words, fragment, registers_of(shape, of, element), element == Element::F64 ? 64 : 32, "fragment");
  instr.aligned = true;
  const int64_t data[] = {shape.m, shape.n, shape.k, int64_t(of), int64_t(element), by_columns, int64_t(space)};
  std::copy(std::begin(data), std::end(data), instr.data);
  instr.run = loads ? load : store;
}

// ---- Product

// In Instr::data of wmma.mma, after M, N, K.
enum { INPUT_A = 3, INPUT_B, LAYOUTS, FROM, TO };  // LAYOUTS: A by columns, B by columns, .satfinite

// A whole matrix [rows][columns] of a fragment, and which elements are undefined.
template <Element E>
void gather(
    Step& step, const Operand& operand, int rows, int columns, bool by_columns, double* to, bool* undefined) {
  const int elements = rows * columns / LANES;
  const Operand* parts = registers(operand);
  for (int place = 0; place < elements; ++place) {
    const Source source = step.source(parts[place / in_word(E)]);
    for (int lane = 0; lane < LANES; ++lane) {
      const uint64_t word = E == Element::F64 ? source.get<uint64_t>(lane) : source.get<uint32_t>(lane);
      const int index = part_of(lane) * elements + place;
      const int at = by_columns ? index % rows * columns + index / rows : index;
      to[at] = value_of<E>(word, place % in_word(E));
      undefined[at] = source.undefined >> lane & 1;
    }
  }
}

// PTX ISA, "Warp-level Matrix Multiply-and-Accumulate Instruction: wmma.mma"
Outcome multiply(Step& step) {
  if (step.active != ALL) throw Fault("needs all 32 lanes of its warp");
  const int64_t* data = step.instr.data;
  const Shape shape = shape_of(step.instr);
  const auto [m, n, k] = shape;
  constexpr int MOST = 512;
  double a[MOST], b[MOST], d[MOST];
  bool undefined_a[MOST], undefined_b[MOST], undefined[MOST];
  const int layouts = data[LAYOUTS];
  const auto gather_matrix = [&](Of of, int op, int64_t element, bool by_columns, double* to, bool* without) {
    with_element(Element(element), [&](auto e) {
      gather<e()>(step, step.op(op), shape.rows(of), shape.columns(of), by_columns, to, without);
    });
  };
  gather_matrix(Of::A, 1, data[INPUT_A], layouts & 1, a, undefined_a);
  gather_matrix(Of::B, 2, data[INPUT_B], layouts & 2, b, undefined_b);
  gather_matrix(Of::Accumulator, 3, data[FROM], false, d, undefined);
  if (data[INPUT_A] == int64_t(Element::F64)) multiply_add_f64(a, b, d, m, n, k);
  else multiply_add(a, b, d, m, n, k);
  for (int i = 0; i < m * k; ++i)
    if (undefined_a[i]) std::fill_n(&undefined[i / k * n], n, true);
  for (int i = 0; i < k * n; ++i)
    if (undefined_b[i])
      for (int row = 0; row < m; ++row) undefined[row * n + i % n] = true;

  const Element element = Element(data[TO]);
  const int elements = m * n / LANES, in_register = in_word(element);
  const Operand* to = registers(step.op(0));
  for (int i = 0; i < elements / in_register; ++i) {
    Mask without = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      const int first = part_of(lane) * elements + i * in_register;
      switch (element) {
        case Element::F16:
          step.set(to[i], lane, uint32_t(to_half(d[first])) | uint32_t(to_half(d[first + 1])) << 16);
          break;
        case Element::F32: step.set(to[i], lane, rounded_to_float(d[first])); break;
        case Element::F64: step.set(to[i], lane, d[first]); break;
        default: step.set(to[i], lane, rounded_to_s32(d[first], layouts & 4)); break;
      }
      for (int j = 0; j < in_register; ++j) without |= Mask(undefined[first + j]) << lane;
    }
    step.set_undefined(to[i], without);
  }
  step.count.multiplies += m * n * k;
  return Outcome::Done;
}

void decode_multiply(Words& words, Instr& instr) {
  if (!words.take("sync") || !words.take("aligned")) words.unknown("wmma is .sync.aligned");
  const auto by_columns = [&] {
    const std::string layout = words.next();
    if (layout != "row" && layout != "col") words.unknown("wmma has no layout " + layout);
    return layout == "col";
  };
  const int a_by_columns = by_columns(), b_by_columns = by_columns();
  const Shape shape = take_shape(words);
  const bool satfinite = words.take("satfinite"), nearest = words.take("rn");
  const std::string type = words.next(), next = words.next();
  const Element to = element_of(words, type);
  Element a = Element::F16, b = Element::F16, from;
  if (words.peek().empty()) {  // of f16, only the accumulators are said
    from = element_of(words, next);
  } else {
    a = element_of(words, next);
    b = element_of(words, words.next());
    from = element_of(words, words.next());
  }
  const Element sum = is_integer(a) ? Element::S32 : a == Element::F64 ? Element::F64 : Element::F32;
  const auto fits = [&](Element c) { return c == sum || (a == Element::F16 && c == Element::F16); };
  if (!valid(shape, a) || a != b || !fits(to) || !fits(from) || (satfinite && !is_integer(a)) ||
      (nearest && a != Element::F64))
    words.unknown("the machine's wmma has no such shape with such types");
  need_operands(words, instr, 4, 4);
  const int width = a == Element::F64 ? 64 : 32;
  need_registers(words, instr.ops[0], registers_of(shape, Of::Accumulator, to), width, "D");
  need_registers(words, instr.ops[1], registers_of(shape, Of::A, a), width, "A");
  need_registers(words, instr.ops[2], registers_of(shape, Of::B, b), width, "B");
  need_registers(words, instr.ops[3], registers_of(shape, Of::Accumulator, from), width, "C");
  instr.aligned = true;
  const int64_t data[] = {shape.m,       shape.n,    shape.k,
                          int64_t(a),    int64_t(b), a_by_columns | b_by_columns << 1 | int(satfinite) << 2,
                          int64_t(from), int64_t(to)};
  std::copy(std::begin(data), std::end(data), instr.data);
  instr.run = multiply;
}

void decode_wmma(Words& words, Instr& instr) {
  const std::string what = words.next();
  if (what == "load") decode_memory(words, instr, true);
  else if (what == "store") decode_memory(words, instr, false);
  else if (what == "mma") decode_multiply(words, instr);
  else words.unknown("the machine has no wmma." + what);
}

const Family wmma("wmma", decode_wmma);

}  // namespace
}  // namespace ptx
