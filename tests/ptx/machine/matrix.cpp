// Matrices of 8 × 8 elements of 16 bits, between shared memory and registers: ldmatrix, stmatrix, movmatrix.
#include "access.h"
#include "counting.h"

namespace ptx {
namespace {

constexpr int SIDE = 8, ROW_BYTES = 16;

enum { MATRICES, TRANSPOSED, SPACE };  // in Instr::data

using Rows = uint16_t[LANES][SIDE];  // row r of matrix i is row 8 i + r

// PTX ISA, "ldmatrix": lane 4 r + c of a fragment holds the elements 2 c and 2 c + 1 of row r; of column r if
// transposed.
struct At {
  int row, column;
};
At at(int lane, int half, bool transposed) {
  const int along = 2 * (lane % 4) + half, across = lane / 4;
  return transposed ? At{along, across} : At{across, along};
}

// Where the rows lie: lane 8 i + r has the address of row r of matrix i.
void row_offsets(Step& step, const Operand& operand, uint32_t* offsets) {
  if (step.active != ALL) throw Fault("needs all 32 lanes of its warp");
  const int64_t* data = step.instr.data;
  const Mask rows = data[MATRICES] == 4 ? ALL : (1u << SIDE * data[MATRICES]) - 1;
  const Source base = step.source(operand.parts[0]);
  if (base.undefined & rows)
    throw Fault("takes an undefined value for an address", __builtin_ctz(base.undefined & rows));
  FOR_LANES(lane, rows) {
    const Place place = place_of(step, lane, Space(data[SPACE]), step.address(operand, base, lane));
    if (place.cta != &step.cta) throw Fault("has an address that isn't in its CTA's shared memory", lane);
    offsets[lane] = uint32_t(place.address);
  }
  step.count.bytes += __builtin_popcount(rows) * ROW_BYTES;
  step.count.wavefronts += wavefronts(offsets, rows, ROW_BYTES);
}

// PTX ISA, "Warp-level matrix load instruction: ldmatrix"
Outcome ldmatrix(Step& step) {
  uint32_t offsets[LANES];
  row_offsets(step, step.op(1), offsets);
  const int matrices = step.instr.data[MATRICES];
  const bool transposed = step.instr.data[TRANSPOSED];
  SharedMemory& shared = step.cta.shared;
  Rows rows;
  uint8_t undefined[LANES] = {};  // by row: a bit an element
  for (int row = 0; row < SIDE * matrices; ++row)
    if (shared.read(step, row, offsets[row], ROW_BYTES, ROW_BYTES, rows[row]))
      for (int column = 0; column < SIDE; ++column)
        undefined[row] |= shared.undefined(offsets[row] + 2 * column, 2) << column;
  const Operand* to = step.op(0).is == Is::Vector ? step.op(0).parts.data() : &step.op(0);
  for (int i = 0; i < matrices; ++i) {
    Mask without = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      uint32_t word = 0;
      for (int half = 0; half < 2; ++half) {
        const auto [row, column] = at(lane, half, transposed);
        word |= uint32_t(rows[SIDE * i + row][column]) << 16 * half;
        without |= Mask(undefined[SIDE * i + row] >> column & 1) << lane;
      }
      step.set(to[i], lane, word);
    }
    step.set_undefined(to[i], without);
  }
  return Outcome::Done;
}

// PTX ISA, "Warp-level matrix store instruction: stmatrix"
Outcome stmatrix(Step& step) {
  uint32_t offsets[LANES];
  row_offsets(step, step.op(0), offsets);
  const int matrices = step.instr.data[MATRICES];
  const bool transposed = step.instr.data[TRANSPOSED];
  const Operand* from = step.op(1).is == Is::Vector ? step.op(1).parts.data() : &step.op(1);
  Rows rows;
  for (int i = 0; i < matrices; ++i) {
    const Source source = step.source(from[i]);
    if (source.undefined) throw Fault("stores an undefined value", __builtin_ctz(source.undefined));
    for (int lane = 0; lane < LANES; ++lane)
      for (int half = 0; half < 2; ++half) {
        const auto [row, column] = at(lane, half, transposed);
        rows[SIDE * i + row][column] = uint16_t(source.get<uint32_t>(lane) >> 16 * half);
      }
  }
  for (int row = 0; row < SIDE * matrices; ++row)
    step.cta.shared.write(step, row, offsets[row], ROW_BYTES, ROW_BYTES, rows[row]);
  return Outcome::Done;
}

// PTX ISA, "Warp-level matrix transpose instruction: movmatrix"
Outcome movmatrix(Step& step) {
  if (step.active != ALL) throw Fault("needs all 32 lanes of its warp");
  const Source source = step.source(1);
  uint16_t matrix[SIDE][SIDE];
  bool undefined[SIDE][SIDE];
  for (int lane = 0; lane < LANES; ++lane)
    for (int half = 0; half < 2; ++half) {
      const auto [row, column] = at(lane, half, false);
      matrix[row][column] = uint16_t(source.get<uint32_t>(lane) >> 16 * half);
      undefined[row][column] = source.undefined >> lane & 1;
    }
  Mask without = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    uint32_t word = 0;
    for (int half = 0; half < 2; ++half) {
      const auto [row, column] = at(lane, half, true);
      word |= uint32_t(matrix[row][column]) << 16 * half;
      without |= Mask(undefined[row][column]) << lane;
    }
    step.set(step.op(0), lane, word);
  }
  step.set_undefined(step.op(0), without);
  return Outcome::Done;
}

void decode_shape(Words& words) {
  if (!words.take("sync") || !words.take("aligned")) words.unknown("is .sync.aligned");
  const std::string shape = words.next();
  if (shape != "m8n8") words.unknown("the machine has no matrices of " + shape + " here");
}

// What ldmatrix and stmatrix have in common; `values` and `address` are places of operands.
void decode_memory(Words& words, Instr& instr, int values, int address) {
  decode_shape(words);
  const int matrices = 1 << words.need_one({"x1", "x2", "x4"});
  instr.data[MATRICES] = matrices;
  instr.data[TRANSPOSED] = words.take("trans");
  words.need_one({"b16"});
  need_operands(words, instr, 2, 2);
  const Space space = take_space(words, instr.ops[address]);
  if (space != Space::Generic && space != Space::Shared) words.unknown("is of shared memory");
  instr.data[SPACE] = int(space);
  const Operand& operand = instr.ops[values];
  if ((operand.is == Is::Vector ? int(operand.parts.size()) : 1) != matrices)
    words.unknown(format("takes %d registers", matrices));
  instr.aligned = true;
}

void decode_ldmatrix(Words& words, Instr& instr) {
  decode_memory(words, instr, 0, 1);
  instr.run = ldmatrix;
}

void decode_stmatrix(Words& words, Instr& instr) {
  decode_memory(words, instr, 1, 0);
  instr.run = stmatrix;
}

void decode_movmatrix(Words& words, Instr& instr) {
  decode_shape(words);
  words.need_one({"trans"});
  words.need_one({"b16"});
  need_operands(words, instr, 2, 2);
  instr.aligned = true;
  instr.run = movmatrix;
}

const Family load("ldmatrix", decode_ldmatrix), store("stmatrix", decode_stmatrix),
    move("movmatrix", decode_movmatrix);

}  // namespace
}  // namespace ptx
