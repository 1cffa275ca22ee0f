#include "boxes.h"

namespace ptx::bulk {

namespace {

constexpr uint32_t MAP_ALIGNMENT = 64;
constexpr uint32_t SECTOR = 32, PASS = 128;

// PTX ISA, Tensors: tiled mode. Elements outside of the tensor are in no span.
Box tensor_box(const TensorMap& map, const int64_t* first, uint32_t shared) {
  Box box;
  box.shared = shared;
  box.unit = map.element_bytes;
  box.fill_nan = map.fill_nan;
  const uint32_t inner = map.box[0] * map.element_bytes;
  if (map.swizzle) {
    if (inner != map.swizzle)
      throw Unknown(format("a box of %u bytes a row, swizzled in %d, isn't modelled", inner, map.swizzle));
    box.rows = map.swizzle / CHUNK - 1;
  }
  int64_t count[MOST_DIMS];
  int64_t rows = 1;
  for (int i = 1; i < map.rank; ++i) {
    count[i] = (map.box[i] + map.element_strides[i] - 1) / map.element_strides[i];
    rows *= count[i];
  }
  box.bytes = inner * rows;
  const int64_t begin = std::max<int64_t>(0, -first[0]);
  const int64_t end = std::min<int64_t>(map.box[0], int64_t(map.sizes[0]) - first[0]);
  for (int64_t row = 0; row < rows && begin < end; ++row) {
    uint64_t address = map.address + (first[0] + begin) * map.element_bytes;
    bool inside = true;
    int64_t left = row;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t index = first[i] + left % count[i] * map.element_strides[i];
      left /= count[i];
      inside &= index >= 0 && index < int64_t(map.sizes[i]);
      address += uint64_t(index) * map.strides[i - 1];
    }
    if (!inside) continue;
    box.spans.push_back(
        {address, uint32_t(row * inner + begin * map.element_bytes), uint32_t((end - begin) * map.element_bytes)});
  }
  return box;
}

}  // namespace

TensorMap tensor_map(Step& step, uint64_t address, int lane) {
  TensorMap map;
  if ((address & WINDOW) == PARAMETER_WINDOW) {
    const uint64_t offset = address & ~WINDOW;
    const auto& parameters = step.launch.parameters;
    if (offset > parameters.size() || sizeof map > parameters.size() - offset)
      throw Fault(format("has a tensor map at %llu of the kernel's parameters", (unsigned long long)offset), lane);
    if (offset % MAP_ALIGNMENT)
      throw Fault(
          format("has a tensor map at %llu of the parameters, not a multiple of 64", (unsigned long long)offset),
          lane);
    std::memcpy(&map, &parameters[offset], sizeof map);
  } else {
    step.launch.region(address, sizeof map, MAP_ALIGNMENT, lane, "reads a tensor map of");
    std::memcpy(&map, reinterpret_cast<const void*>(address), sizeof map);
  }
  if (std::memcmp(map.magic, TENSOR_MAP_MAGIC, sizeof map.magic) != 0)
    throw Fault(format("has no tensor map at %#llx", (unsigned long long)address), lane);
  if (map.rank != step.instr.data[DIMS])
    throw Fault(
        format("copies %d dimensions of a tensor map that has %d", int(step.instr.data[DIMS]), map.rank), lane);
  return map;
}

Box tensor_operand(Step& step, const Operand& operand, const Source& base, uint32_t shared, int lane) {
  const TensorMap map = tensor_map(step, step.address(operand, base, lane), lane);
  int64_t first[MOST_DIMS];
  const Operand& coordinates = operand.parts[1];
  for (int i = 0; i < map.rank; ++i) {
    const Operand& one = coordinates.is == Is::Vector ? coordinates.parts[i] : coordinates;
    first[i] = step.defined(one, "a coordinate").get<int32_t>(lane);
  }
  return tensor_box(map, first, shared);
}

Box plain_box(uint64_t global, uint32_t shared, uint32_t bytes, int lane) {
  if (bytes % CHUNK || bytes == 0) throw Fault(format("copies %u bytes, not a multiple of 16", bytes), lane);
  if (global % CHUNK)
    throw Fault(format("has a global address %#llx, not a multiple of 16", (unsigned long long)global), lane);
  Box box;
  box.shared = shared;
  box.bytes = bytes;
  box.spans.push_back({global, 0, bytes});
  return box;
}

void check_alignment(uint32_t offset, uint32_t alignment, int lane) {
  if (offset % alignment)
    throw Fault(format("has shared memory at %d, not a multiple of %u", at(offset), alignment), lane);
}

void check_global(Step& step, const Box& box, int lane, bool writes) {
  for (const Span& span : box.spans) {
    const Region& region = step.launch.region(span.global, span.bytes, 1, lane, writes ? "stores" : "reads");
    if (writes && region.read_only)
      throw Fault("stores to " + region.element(span.global - uint64_t(region.data)) + ", an input", lane);
    step.count.bytes += span.bytes;
    step.count.sectors += (span.global + span.bytes - 1) / SECTOR - span.global / SECTOR + 1;
  }
  step.count.wavefronts += (box.bytes + PASS - 1) / PASS;
}

}  // namespace ptx::bulk
