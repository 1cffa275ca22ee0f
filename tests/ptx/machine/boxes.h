// What a bulk copy covers: spans of bytes in global memory, and where they are in shared memory.
#pragma once

#include "families.h"
#include "reductions.h"

namespace ptx::bulk {

constexpr uint32_t CHUNK = 16;  // bytes: alignment of bulk copies, and what swizzles move
constexpr uint32_t TENSOR_ALIGNMENT = 128;

// What decoders leave in Instr::data.
enum Data { DIMS, TO_OWN, MULTICAST, PAIR, READ_ONLY, REDUCTION, ELEMENT, BYTE_MASK };
constexpr int NO_REDUCTION = -1;

inline int at(uint32_t offset) { return int(offset) - int(SHARED_START); }

// A span of bytes in global memory, and where it is in the box, before swizzling.
struct Span {
  uint64_t global;
  uint32_t begin, bytes;
};

struct Box {
  uint32_t shared = 0, bytes = 0;
  uint32_t rows = 0;  // of 128 bytes after which the swizzle repeats, less one
  uint32_t unit = 1;  // bytes of an element
  bool fill_nan = false;
  std::vector<Span> spans;

  // Where byte `begin` lies: a swizzle XORs bits 4-6 of the address with bits 7-9, or fewer.
  uint32_t place(uint32_t begin) const {
    const uint32_t linear = shared + begin;
    return linear ^ (linear >> 7 & rows) << 4;
  }
};

// Calls `visit(offset in shared memory, offset in the box, bytes)` for pieces that lie together.
template <class Visit>
void for_pieces(const Box& box, uint32_t begin, uint32_t bytes, Visit visit) {
  const uint32_t end = begin + bytes;
  while (begin < end) {
    const uint32_t next = box.rows ? std::min(end, (begin / CHUNK + 1) * CHUNK) : end;
    visit(box.place(begin), begin, next - begin);
    begin = next;
  }
}

// The tensor map at a generic address.
TensorMap tensor_map(Step& step, uint64_t address, int lane);
// The box that a lane's tensor operand, [map, {coordinates}], names.
Box tensor_operand(Step& step, const Operand& operand, const Source& base, uint32_t shared, int lane);
// Bytes that lie together.
Box plain_box(uint64_t global, uint32_t shared, uint32_t bytes, int lane);

void check_alignment(uint32_t offset, uint32_t alignment, int lane);
// A fault if a span isn't within one tensor; counts what the copy costs.
void check_global(Step& step, const Box& box, int lane, bool writes);

// What an instruction that isn't a tensor's reduces by; null for a copy.
struct ByElements {
  Combine combine = nullptr;
  uint32_t unit = 1;
};

inline ByElements reduction_of(const Instr& instr) {
  static const uint32_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};  // by Element
  if (instr.data[REDUCTION] == NO_REDUCTION) return {};
  const Element element = Element(instr.data[ELEMENT]);
  return {combine_of(Reduction(instr.data[REDUCTION]), element), sizes[int(element)]};
}

// Out of shared memory (bulk_stores.cpp).
Outcome store_plain(Step& step);
Outcome store_tensor(Step& step);
Outcome commit_group(Step& step);
Outcome wait_group(Step& step);

}  // namespace ptx::bulk
