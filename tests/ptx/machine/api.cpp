// What tests/ptx/machine.py calls.
#include <algorithm>

#include "machine.h"

using namespace ptx;

namespace {

// What went wrong, for the caller's buffer.
int report(const std::string& what, char* message, int size, int code) {
  std::snprintf(message, size, "%s", what.c_str());
  return code;
}

enum { OK, FAULT, UNKNOWN };

// Marks the bytes of elements, and none between them.
void mark_elements(const Region& region, std::vector<uint8_t>& bytes, size_t dim = 0, uint64_t at = 0) {
  if (dim == region.shape.size()) {
    std::fill_n(bytes.begin() + at, region.item, 1);
    return;
  }
  for (int64_t i = 0; i < region.shape[dim]; ++i)
    mark_elements(region, bytes, dim + 1, at + i * region.strides[dim] * region.item);
}

}  // namespace

extern "C" {

void* ptx_program(const char* text, char* message, int size) {
  try {
    return read_program(text).release();
  } catch (const std::exception& error) {
    report(error.what(), message, size, UNKNOWN);
    return nullptr;
  }
}

void ptx_free_program(void* program) { delete static_cast<Program*>(program); }

void* ptx_machine() { return new Machine; }

void ptx_free_machine(void* machine) { delete static_cast<Machine*>(machine); }

// A region of global memory; replaces one at the same address. `read_only`: 2 of constant memory. `undefined`:
// none of its elements has a value.
void ptx_region(
    void* machine, const char* name, void* data, uint64_t size, int read_only, int undefined, int item, int dims,
    const int64_t* shape, const int64_t* strides) {
  auto region = std::make_unique<Region>();
  region->name = name;
  region->data = static_cast<uint8_t*>(data);
  region->size = size;
  region->read_only = read_only;
  region->constant = read_only == 2;
  region->item = item;
  region->shape.assign(shape, shape + dims);
  region->strides.assign(strides, strides + dims);
  uint64_t bytes = item;
  for (int i = 0; i < dims; ++i)
    if (strides[i]) bytes *= shape[i];
  const bool dense = bytes == size;
  std::vector<uint8_t> elements(undefined || !dense ? size : 0, dense);
  if (!dense) mark_elements(*region, elements);
  if (undefined) region->undefined = elements;
  if (!dense) region->elements = std::move(elements);
  auto* to = static_cast<Machine*>(machine);
  to->regions[uint64_t(data)] = std::move(region);
  to->forget();
}

void ptx_forget_region(void* machine, void* data) {
  auto* from = static_cast<Machine*>(machine);
  from->regions.erase(uint64_t(data));
  from->forget();
}

// Which bytes of a region have no value: their number; the first of them in `first`.
uint64_t ptx_undefined(void* machine, void* data, uint64_t* first) {
  Region* region = static_cast<Machine*>(machine)->find(uint64_t(data));
  if (region == nullptr || region->undefined.empty()) return 0;
  const auto& bytes = region->undefined;
  *first = std::find(bytes.begin(), bytes.end(), 1) - bytes.begin();
  return std::count(bytes.begin(), bytes.end(), 1);
}

struct CountOut {
  uint64_t issued, lanes, bytes, sectors, wavefronts, multiplies;
};

int ptx_launch(
    void* machine, void* program, const Options* options, const char* parameters, uint64_t parameter_bytes,
    CountOut* counts, uint64_t* issued_by_warp, uint64_t* steps, char* trace, int trace_size, char* message, int size) {
  const auto& of = *static_cast<Program*>(program);
  Launch launch(*static_cast<Machine*>(machine), of, *options, std::string(parameters, parameter_bytes));
  int code = OK;
  try {
    launch.run();
  } catch (const Unknown& unknown) {
    code = report(unknown.what(), message, size, UNKNOWN);
  } catch (const std::exception& fault) {
    code = report(fault.what(), message, size, FAULT);
  }
  *steps = launch.steps;
  if (counts != nullptr)
    for (size_t i = 0; i < of.code.size(); ++i) {
      const Count& c = launch.counts[i];
      counts[i] = {c.issued, c.lanes, c.bytes, c.sectors, c.wavefronts, c.multiplies};
    }
  if (issued_by_warp != nullptr)
    std::copy(launch.issued_by_warp.begin(), launch.issued_by_warp.end(), issued_by_warp);
  if (trace_size > 0) std::snprintf(trace, trace_size, "%s", launch.trace.c_str());
  return code;
}

int ptx_code_size(void* program) { return static_cast<Program*>(program)->code.size(); }

void ptx_code(void* program, int index, int* line, char* opcode, int size) {
  const Instr& instr = static_cast<Program*>(program)->code[index];
  *line = instr.line;
  std::snprintf(opcode, size, "%s", instr.opcode.c_str());
}
}
