// tcgen05.mma and tcgen05.cp: what the tensor core is asked for, which it does later, in order.
//
// PTX ISA, "TensorCore 5th Generation Matrix Multiply and accumulate Operations" and "Matrix Descriptors".
#include "families.h"
#include "numbers.h"
#include "tensor_memory.h"

namespace ptx {

namespace {

constexpr int CHUNK = 16;           // bytes that stay together in shared memory, however it is swizzled
constexpr int DEPTH = 32;           // bytes of K of one multiply
constexpr int ROWS_OF_AN_ATOM = 8;  // of swizzled rows

uint32_t bits(uint64_t value, int first, int last) {
  return uint32_t(value >> first & ((uint64_t(1) << (last - first + 1)) - 1));
}

// ---- PTX ISA, "Shared Memory Descriptor", "Canonical Layouts", "Shared Memory Layout and Swizzling"

// A matrix in shared memory, of `size` bytes an element. `across` is M or N, `along` is K.
struct SharedMatrix {
  enum Swizzle : uint32_t { None = 0, Base32 = 1, By128 = 2, By64 = 4, By32 = 6 };
  uint32_t start, leading, stride;
  Swizzle swizzle;
  bool transposed;  // M or N lies together, not K
  int size;

  SharedMatrix(uint64_t descriptor, bool transposed, int size)
      : start(bits(descriptor, 0, 13) << 4),
        leading(bits(descriptor, 16, 29) << 4),
        stride(bits(descriptor, 32, 45) << 4),
        swizzle(Swizzle(bits(descriptor, 61, 63))),
        transposed(transposed),
        size(size) {
    const auto refuse = [&](const char* what) {
      throw Fault(format("has a matrix descriptor, %#llx, %s", (unsigned long long)descriptor, what));
    };
    if (bits(descriptor, 46, 48) != 1) refuse("whose bits 46 to 48 aren't 0b001");
    if (bits(descriptor, 14, 15) || bits(descriptor, 30, 31) || bits(descriptor, 53, 60))
      refuse("with reserved bits that aren't 0");
    if (bits(descriptor, 49, 51)) refuse("with a base offset, which is not modelled");
    if (bits(descriptor, 52, 52)) refuse("with an absolute leading dimension, which sm_100 doesn't have");
    if (swizzle != None && swizzle != Base32 && swizzle != By128 && swizzle != By64 && swizzle != By32)
      refuse("with no swizzling mode");
    // "Valid Combinations of Type-Size, Major-ness and Swizzling"
    if (swizzle == Base32 && !(transposed && size == 4))
      refuse("whose swizzling, 128 bytes by 32, is for transposed elements of 32 bits");
    if (transposed && size == 4 && swizzle != Base32)
      refuse("whose swizzling is not for transposed elements of 32 bits: only 128 bytes by 32 is");
  }

  int in_a_chunk() const { return CHUNK / size; }
  int chunks_of_a_row() const { return swizzle == None ? 1 : swizzle == By32 ? 2 : swizzle == By64 ? 4 : 8; }

  // The offset in shared memory of the 16 bytes in which an element is.
  uint32_t chunk(int across, int along) const {
    const int row = CHUNK * chunks_of_a_row();
    uint32_t at = start;
    if (!transposed) {
      const int column = along / in_a_chunk();
      at += across % ROWS_OF_AN_ATOM * row + across / ROWS_OF_AN_ATOM * stride;
      at += column * (swizzle == None ? leading : CHUNK);
    } else {
      const int rows = swizzle == Base32 ? 4 : ROWS_OF_AN_ATOM;
      const int column = across / in_a_chunk();
      at += along % rows * row + along / rows * (swizzle == None ? leading : stride);
      at += column % chunks_of_a_row() * CHUNK;
      at += column / chunks_of_a_row() * (swizzle == None ? stride : leading);
    }
    switch (swizzle) {
      case None: return at;
      case Base32: return at ^ (at >> 2 & 0x60);
      case By128: return at ^ (at >> 3 & 0x70);
      case By64: return at ^ (at >> 3 & 0x30);
      case By32: return at ^ (at >> 3 & 0x10);
    }
    return at;
  }

  // Every 16 bytes of a matrix once, and its first element.
  template <class Visit>
  void chunks(int acrosses, int alongs, Visit visit) const {
    const int together = in_a_chunk();
    for (int across = 0; across < acrosses; across += transposed ? together : 1)
      for (int along = 0; along < alongs; along += transposed ? 1 : together)
        visit(across, along, chunk(across, along));
  }
};

void begin_reading(Step& step, const SharedMatrix& matrix, int acrosses, int alongs) {
  matrix.chunks(acrosses, alongs, [&](int, int, uint32_t at) {
    step.cta.shared.begin_read(step.warp, step.instr.line, at, CHUNK);
  });
}

// ---- Asking the tensor core

// Makes the access of a thread that asks it.
TensorAccess access_of(Step& step, int lane, TensorAccess::Kind kind) {
  TensorWarp& warp = tensor_warp_of(step.warp);
  TensorWarp::Thread& thread = warp.threads[lane];
  if (thread.agent < 0) {
    thread.agent = step.cta.cluster->agents++;
    tensor_memory_of(step.cta).agents.push_back(thread.agent);
  }
  TensorAccess access;
  access.kind = kind;
  access.line = step.instr.line;
  access.agent = thread.agent;
  access.time = ++thread.time;
  access.issuer = warp.agent;
  access.issued = warp.time + 1;
  thread.issued = step.warp.clock;
  return access;
}

// ---- PTX ISA, "Instruction descriptor"

enum Kind { F16, TF32, F8F6F4 };
enum class Element { Half, BFloat, Tf32, E4m3, E5m2 };

struct Description {
  Kind kind;
  Element a, b;
  bool half_d;  // D is of .f16
  bool negate_a, negate_b, transpose_a, transpose_b;
  int m, n;

  int size() const { return kind == F16 ? 2 : kind == TF32 ? 4 : 1; }
  int k() const { return DEPTH / size(); }
};

Element element_of(Kind kind, uint32_t type) {
  if (kind == F16 && type == 0) return Element::Half;
  if (kind == F16 && type == 1) return Element::BFloat;
  if (kind == TF32 && type == 2) return Element::Tf32;
  if (kind == F8F6F4 && type == 0) return Element::E4m3;
  if (kind == F8F6F4 && type == 1) return Element::E5m2;
  if (kind == F8F6F4 && (type == 3 || type == 4 || type == 5))
    throw Fault("multiplies elements of 6 or 4 bits, which are not modelled");
  throw Fault(format("has an instruction descriptor with type %u of A or B, which its kind has not", type));
}

Description describe(Kind kind, uint32_t word) {
  const auto refuse = [&](const char* what) {
    throw Fault(format("has an instruction descriptor, %#x, %s", word, what));
  };
  if (bits(word, 2, 2)) refuse("of a sparse matrix, which is for tcgen05.mma.sp");
  if (bits(word, 3, 3)) refuse("that saturates, which is for integers");
  if (bits(word, 0, 1) || bits(word, 6, 6) || bits(word, 23, 23) || bits(word, 29, 29))
    refuse("with reserved bits that aren't 0");
  if (bits(word, 30, 31)) refuse("with a shift of B, which is for tcgen05.mma.ws");
  Description description;
  description.kind = kind;
  const uint32_t d = bits(word, 4, 5);
  if (d > 1 || (d == 0 && kind == TF32)) refuse("with a type of D that its kind has not");
  description.half_d = d == 0;
  description.a = element_of(kind, bits(word, 7, 9));
  description.b = element_of(kind, bits(word, 10, 12));
  if (kind == F16 && description.half_d && (description.a != Element::Half || description.b != Element::Half))
    refuse("whose D is of .f16 and A or B is not");
  description.negate_a = bits(word, 13, 13);
  description.negate_b = bits(word, 14, 14);
  description.transpose_a = bits(word, 15, 15);
  description.transpose_b = bits(word, 16, 16);
  description.n = 8 * bits(word, 17, 22);
  description.m = 16 * bits(word, 24, 28);
  if (description.m != 64 && description.m != 128) refuse("whose M is not 64 or 128");
  if (description.n < 8 || description.n > 256) refuse("whose N is not 8 to 256");
  if (kind == F8F6F4 && description.transpose_b && description.n % 16)
    refuse("whose N is not a multiple of 16, with B of 8 bits transposed");
  return description;
}

double value_of(Element element, uint32_t value) {
  switch (element) {
    case Element::Half: return from_half(uint16_t(value));
    case Element::BFloat: return from_bf16(uint16_t(value));
    case Element::Tf32: return cut_to_tf32(float_of(value));
    case Element::E4m3: return from_e4m3(uint8_t(value));
    case Element::E5m2: return from_e5m2(uint8_t(value));
  }
  return 0;
}

uint32_t element_at(const uint8_t* bytes, int size, int i) {
  uint32_t value = 0;
  std::memcpy(&value, bytes + size * i, size);
  return value;
}

// ---- PTX ISA, tcgen05.mma

// Which lanes of tensor memory hold a row. PTX ISA, "Data Path Layout Organization": layouts D and F.
uint32_t lane_of(uint32_t first, int m, int row) { return m == 128 ? row : first + row / 16 * 32 + row % 16; }

struct Multiply : TensorOperation {
  Description description;
  bool a_in_tensor_memory;
  uint32_t a_address;
  SharedMatrix a, b;
  uint32_t d_lane, d_column;
  bool accumulates;
  int scale;                  // D is divided by 2 to this power
  uint32_t disabled[4] = {};  // a bit a lane
  int agent;
  uint32_t time;

  Multiply(const SharedMatrix& a, const SharedMatrix& b) : a(a), b(b) {}
  const char* what() const override { return "tcgen05.mma"; }

  void execute() override {
    SharedMemory& shared = cta->shared;
    TensorMemory& memory = tensor_memory_of(*cta);
    const int m = description.m, n = description.n, k = description.k();
    std::vector<double> left(m * k), right(k * n);  // right: by K, so that the innermost loop runs over N
    std::vector<uint8_t> left_undefined(m), right_undefined(n);
    if (a_in_tensor_memory) {
      read_a(memory, left, left_undefined);
    } else {
      read(shared, a, description.a, description.negate_a, m, [&](int row, int depth, double value, bool unknown) {
        left[row * k + depth] = value;
        left_undefined[row] |= unknown;
      });
    }
    read(
        shared, b, description.b, description.negate_b, n, [&](int column, int depth, double value, bool unknown) {
          right[depth * n + column] = value;
          right_undefined[column] |= unknown;
        });

    std::vector<double> sums(n);
    for (int row = 0; row < m; ++row) {
      const uint32_t lane = lane_of(d_lane, m, row);
      if (disabled[lane / 32] >> lane % 32 & 1) continue;
      uint32_t* cells = &memory.cell(lane, d_column);
      uint8_t* undefined = &memory.undefined(lane, d_column);
      for (int column = 0; column < n; ++column) sums[column] = accumulates ? d_of(cells[column]) : 0;
      for (int depth = 0; depth < k; ++depth) {
        const double factor = left[row * k + depth];
        const double* with = &right[depth * n];
        for (int column = 0; column < n; ++column) sums[column] += factor * with[column];
      }
      for (int column = 0; column < n; ++column) {
        cells[column] = description.half_d ? to_half(sums[column]) : bits_of(float(sums[column]));
        undefined[column] = (accumulates && undefined[column]) || left_undefined[row] || right_undefined[column];
      }
    }
  }

 private:
  // 16-bit elements of D have a word each.
  double d_of(uint32_t cell) const {
    const double value = description.half_d ? from_half(uint16_t(cell)) : float_of(cell);
    return scale ? std::ldexp(value, -scale) : value;
  }

  template <class Take>
  void read(
      SharedMemory& shared, const SharedMatrix& matrix, Element element, bool negate, int acrosses, Take take) {
    const int size = matrix.size;
    matrix.chunks(acrosses, description.k(), [&](int across, int along, uint32_t at) {
      const uint8_t* bytes = shared.bytes(at);
      const bool unknown = shared.undefined(at, CHUNK);
      for (int i = 0; i < matrix.in_a_chunk(); ++i) {
        const double value = value_of(element, element_at(bytes, size, i));
        take(
            across + (matrix.transposed ? i : 0), along + (matrix.transposed ? 0 : i), negate ? -value : value,
            unknown && shared.undefined(at + size * i, size));
      }
      shared.end_read(agent, time, line, at, CHUNK);
    });
  }

  // "Packing formats of elements in Tensor and Shared memory": A's fill whole words.
  void read_a(TensorMemory& memory, std::vector<double>& left, std::vector<uint8_t>& undefined) {
    const int k = description.k(), size = description.size(), in_a_word = 4 / size;
    for (int row = 0; row < description.m; ++row) {
      const uint32_t lane = lane_of(a_address >> 16, description.m, row);
      for (int depth = 0; depth < k; ++depth) {
        const uint32_t column = (a_address & 0xffff) + depth / in_a_word;
        const uint32_t cell = memory.cell(lane, column);
        const uint32_t value = element_at(reinterpret_cast<const uint8_t*>(&cell), size, depth % in_a_word);
        left[row * k + depth] = value_of(description.a, value) * (description.negate_a ? -1 : 1);
        undefined[row] |= memory.undefined(lane, column);
      }
    }
  }
};

// The rectangles of a matrix in tensor memory, of as many columns.
std::vector<TensorArea> areas_of(uint32_t address, int m, uint32_t columns, const char* which) {
  const uint32_t lane = address >> 16, column = address & 0xffff;
  if (lane != 0 && !(m == 64 && lane == 16))
    throw Fault(format("has %s in lane %u of tensor memory, not %s", which, lane, m == 64 ? "0 or 16" : "0"));
  if (m == 128) return {{0, TENSOR_LANES, column, columns}};
  std::vector<TensorArea> areas;
  for (uint32_t quarter = 0; quarter < 4; ++quarter) areas.push_back({lane + 32 * quarter, 16, column, columns});
  return areas;
}

enum MmaData { KIND, TENSOR_A, MASKED, SCALED };

Outcome mma(Step& step) {
  const Instr& instr = step.instr;
  const bool tensor_a = instr.data[TENSOR_A];
  int next = 3;
  const Source d = step.address_base(step.op(0));
  const Source a = tensor_a ? step.address_base(step.op(1)) : step.defined(step.op(1), "a matrix descriptor");
  const Source b = step.defined(step.op(2), "a matrix descriptor");
  const Source words = step.defined(step.op(next++), "an instruction descriptor");
  const Operand* mask = instr.data[MASKED] ? &step.op(next++) : nullptr;
  const Mask enabled = step.defined_predicate(step.op(next++), "whether it accumulates");
  const int scale = instr.data[SCALED] ? step.op(next).value : 0;
  TensorMemory& memory = tensor_memory_of(step.cta);
  FOR_LANES(lane, step.active) {
    const Description description = describe(Kind(instr.data[KIND]), words.get<uint32_t>(lane));
    const int size = description.size(), k = description.k();
    const uint32_t d_address = step.address(step.op(0), d, lane);
    const SharedMatrix b_matrix(b.get<uint64_t>(lane), description.transpose_b, size);
    const SharedMatrix a_matrix =
        tensor_a ? b_matrix : SharedMatrix(a.get<uint64_t>(lane), description.transpose_a, size);
    auto multiply = std::make_shared<Multiply>(a_matrix, b_matrix);
    multiply->description = description;
    multiply->a_in_tensor_memory = tensor_a;
    multiply->a_address = tensor_a ? step.address(step.op(1), a, lane) : 0;
    multiply->d_lane = d_address >> 16;
    multiply->d_column = d_address & 0xffff;
    multiply->accumulates = enabled >> lane & 1;
    multiply->scale = scale;
    if (mask)
      for (int i = 0; i < 4; ++i)
        multiply->disabled[i] = step.defined(mask->parts[i], "a mask of lanes").get<uint32_t>(lane);

    TensorAccess access = access_of(step, lane, TensorAccess::Mma);
    access.pipeline = uint64_t(d_address) << 32 | uint64_t(description.kind) << 24 |
                      uint64_t(description.half_d) << 20 | uint64_t(description.m) << 10 | description.n;
    multiply->agent = access.agent;
    multiply->time = access.time;
    const uint32_t id = memory.begin(access);
    if (tensor_a) {
      if (description.transpose_a) throw Fault("transposes A, which is in tensor memory", lane);
      if (multiply->a_address >> 16 != multiply->d_lane)
        throw Fault("has A and D in different lanes of tensor memory", lane);
      for (const TensorArea& area : areas_of(multiply->a_address, description.m, DEPTH / 4, "A"))
        memory.reads(step.warp, id, area);
    } else {
      begin_reading(step, a_matrix, description.m, k);
    }
    begin_reading(step, b_matrix, description.n, k);
    for (const TensorArea& area : areas_of(d_address, description.m, description.n, "D")) {
      if (multiply->accumulates) memory.reads(step.warp, id, area);
      memory.writes(step.warp, id, area);
    }
    step.count.multiplies += uint64_t(description.m) * description.n * k;
    step.count.bytes += DEPTH * (uint64_t(tensor_a ? 0 : description.m) + description.n);
    ask_tensor_core(step, std::move(multiply));
  }
  return Outcome::Done;
}

// ---- PTX ISA, tcgen05.cp

struct Copied2D {
  int rows, bytes;
  std::vector<uint32_t> (*lanes)(uint32_t row);  // where a row goes to
};

const Copied2D COPIES[] = {
    {128, 32, [](uint32_t row) { return std::vector<uint32_t>{row}; }},
    {4, 32, [](uint32_t row) { return std::vector<uint32_t>{32 * row}; }},
    {128, 16, [](uint32_t row) { return std::vector<uint32_t>{row}; }},
    {64, 16, [](uint32_t row) { return std::vector<uint32_t>{row, row + 64}; }},
    {64, 16,
     [](uint32_t row) {
       const uint32_t lane = row / 32 * 64 + row % 32;
       return std::vector<uint32_t>{lane, lane + 32};
     }},
    {32, 16, [](uint32_t row) { return std::vector<uint32_t>{row, row + 32, row + 64, row + 96}; }}};

struct Copy : TensorOperation {
  const Copied2D* shape;
  SharedMatrix from;
  uint32_t lane, column;
  int agent;
  uint32_t time;

  explicit Copy(const SharedMatrix& from) : from(from) {}
  const char* what() const override { return "tcgen05.cp"; }

  void execute() override {
    SharedMemory& shared = cta->shared;
    TensorMemory& memory = tensor_memory_of(*cta);
    from.chunks(shape->rows, shape->bytes, [&](int row, int byte, uint32_t at) {
      for (uint32_t to : shape->lanes(row))
        for (int word = 0; word < CHUNK / 4; ++word) {
          const uint32_t in = column + byte / 4 + word;
          std::memcpy(&memory.cell(lane + to, in), shared.bytes(at + 4 * word), 4);
          memory.undefined(lane + to, in) = shared.undefined(at + 4 * word, 4);
        }
      shared.end_read(agent, time, line, at, CHUNK);
    });
  }
};

enum CopyData { COPY };

Outcome copy(Step& step) {
  const Source to = step.address_base(step.op(0));
  const Source descriptors = step.defined(step.op(1), "a matrix descriptor");
  TensorMemory& memory = tensor_memory_of(step.cta);
  const Copied2D& shape = COPIES[step.instr.data[COPY]];
  FOR_LANES(lane, step.active) {
    const uint32_t address = step.address(step.op(0), to, lane);
    auto copy = std::make_shared<Copy>(SharedMatrix(descriptors.get<uint64_t>(lane), false, 1));
    copy->shape = &shape;
    copy->lane = address >> 16;
    copy->column = address & 0xffff;
    if (copy->lane >= (shape.rows == 4 ? LANES_OF_A_WARP : 1))
      throw Fault(format("copies to lane %u of tensor memory", copy->lane), lane);
    const TensorAccess access = access_of(step, lane, TensorAccess::Copy);
    copy->agent = access.agent;
    copy->time = access.time;
    const uint32_t id = memory.begin(access);
    begin_reading(step, copy->from, shape.rows, shape.bytes);
    for (int row = 0; row < shape.rows; ++row)
      for (uint32_t lane_of_row : shape.lanes(row))
        memory.writes(step.warp, id, {copy->lane + lane_of_row, 1, copy->column, uint32_t(shape.bytes) / 4});
    step.count.bytes += shape.rows * shape.bytes;
    ask_tensor_core(step, std::move(copy));
  }
  return Outcome::Done;
}

}  // namespace

void decode_tensor_mma(Words& words, Instr& instr) {
  for (const char* refused :
       {"sp", "ws", "block_scale", "ashift", "cta_group::2", "kind::i8", "kind::mxf8f6f4", "kind::mxf4",
        "kind::mxf4nvf4", "collector::a::use", "collector::a::lastuse"})
    if (words.take(refused)) words.unknown(format(".%s is not modelled", refused));
  words.need_one({"cta_group::1"});
  instr.data[KIND] = words.need_one({"kind::f16", "kind::tf32", "kind::f8f6f4"});
  // What stays in the collector's buffer is of no use without .use.
  words.take_one({"collector::a::fill", "collector::a::discard"});
  need_operands(words, instr, 5, 7);
  if (instr.ops[0].is != Is::Address) words.unknown("needs an address in brackets");
  instr.data[TENSOR_A] = instr.ops[1].is == Is::Address;
  instr.data[MASKED] = instr.ops[4].is == Is::Vector;
  if (instr.data[MASKED] && instr.ops[4].parts.size() != 4) words.unknown("takes a mask of 4 registers");
  const size_t least = 5 + instr.data[MASKED];
  instr.data[SCALED] = instr.ops.size() > least;
  need_operands(words, instr, least, least + 1);
  if (instr.data[SCALED]) {
    const Operand& scale = instr.ops.back();
    if (scale.is != Is::Immediate || scale.value < 0 || scale.value > 15)
      words.unknown("scales D by an immediate of 0 to 15");
    if (instr.data[KIND] == F8F6F4) words.unknown("scales D with .kind::f16 and .kind::tf32 alone");
  }
  instr.run = mma;
}

void decode_tensor_copy(Words& words, Instr& instr) {
  for (const char* refused : {"cta_group::2", "b8x16", "b6x16_p32", "b4x16_p64"})
    if (words.take(refused)) words.unknown(format(".%s is not modelled", refused));
  words.need_one({"cta_group::1"});
  int shape = words.need_one({"128x256b", "4x256b", "128x128b", "64x128b", "32x128b"});
  if (shape == 3) shape += words.need_one({"warpx2::02_13", "warpx2::01_23"});
  else if (shape == 4) {
    words.need_one({"warpx4"});
    shape = 5;
  }
  instr.data[COPY] = shape;
  need_operands(words, instr, 2, 2);
  if (instr.ops[0].is != Is::Address) words.unknown("needs an address in brackets");
  instr.run = copy;
}

}  // namespace ptx
