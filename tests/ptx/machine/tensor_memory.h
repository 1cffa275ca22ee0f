// Tensor memory of a CTA: what is allocated, what it holds, and who may access it when.
//
// PTX ISA, "Tensor Memory" and "Memory Consistency Model for 5th generation of TensorCore operations".
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "decode.h"

namespace ptx {

constexpr uint32_t TENSOR_LANES = 128, TENSOR_COLUMNS = 512;
constexpr uint32_t TENSOR_SLICE = 32;     // columns that are allocated together, at least
constexpr uint32_t LANES_OF_A_WARP = 32;  // that tcgen05.ld and .st of one warp reach

// A rectangle of 32-bit cells.
struct TensorArea {
  uint32_t lane, lanes, column, columns;
};

// An instruction that accesses tensor memory.
struct TensorAccess {
  enum Kind : uint8_t { Load, Store, Mma, Copy } kind = Load;
  int line = 0;
  // Whose it is, and when it was known to be done. ld and st belong to the warp and are done when it
  // waits (0: not yet); mma and cp belong to the thread, and who has waited for its commit has seen them.
  int agent = 0;
  uint32_t time = 0;
  // mma and cp: the warp, and its time from which on other threads know that this one came before.
  int issuer = 0;
  uint32_t issued = 0;
  // mma: kind, shape and accumulator, which make a pipeline of two if they are the same.
  uint64_t pipeline = 0;
};

// What the tensor core is asked for, and does in order.
struct TensorOperation : Delivery {
  void happen() final;
  virtual void execute() = 0;
};

class TensorMemory {
 public:
  TensorMemory();

  // Columns, where they begin at random; -1 if there is no room.
  int allocate(Launch& launch, uint32_t columns);
  void free(Warp& warp, uint32_t column, uint32_t columns);
  void relinquish() { relinquished_ = true; }
  // Columns that nobody has freed.
  uint32_t allocated() const;

  uint32_t& cell(uint32_t lane, uint32_t column) { return cells_[lane * TENSOR_COLUMNS + column]; }
  uint8_t& undefined(uint32_t lane, uint32_t column) { return undefined_[lane * TENSOR_COLUMNS + column]; }

  // An access is begun once, then says what it touches. Faults if an earlier one isn't known to be done.
  uint32_t begin(const TensorAccess& access);
  TensorAccess& access(uint32_t id) { return accesses_[id]; }
  void reads(Warp& warp, uint32_t id, const TensorArea& area);
  void writes(Warp& warp, uint32_t id, const TensorArea& area);

  // What the tensor core has been asked for and not done.
  std::deque<std::shared_ptr<TensorOperation>> queue;
  // Agents of this memory: of warps, and of threads that ask the tensor core.
  std::vector<int> agents;

 private:
  // Accesses are known by units of 16 lanes of a column.
  static constexpr uint32_t UNIT_LANES = 16, UNITS = TENSOR_LANES / UNIT_LANES;
  static constexpr int READERS = 9;  // warps that reach a lane, and the tensor core
  struct Unit {
    uint32_t write;           // the last one; 0 if there is none
    uint32_t reads[READERS];  // since then
    uint16_t readers;
  };

  std::vector<uint32_t> cells_;
  std::vector<uint8_t> undefined_;
  std::vector<Unit> units_;
  std::vector<TensorAccess> accesses_;
  uint32_t sizes_[TENSOR_COLUMNS / TENSOR_SLICE] = {};  // of allocations, where they begin
  bool taken_[TENSOR_COLUMNS / TENSOR_SLICE] = {};
  uint32_t most_ = TENSOR_COLUMNS;  // columns of the next allocation
  bool relinquished_ = false;

  void check_allocated(const TensorArea& area, const char* verb) const;
  void check(
      const Warp& warp, const TensorAccess& later, uint32_t earlier, bool earlier_writes, const char* verb,
      uint32_t unit) const;
};

TensorMemory& tensor_memory_of(Cta& cta);

// What a warp has under way.
struct TensorWarp {
  int agent = -1;
  uint32_t time = 0;
  std::vector<uint32_t> loads, stores;  // that it hasn't waited for
  struct Thread {
    int agent = -1;
    uint32_t time = 0;
    Clock issued;  // what it had seen when it last asked the tensor core
  };
  Thread threads[LANES];

  // The warp's accesses so far come before what it does next.
  void tick(Warp& warp);
};
TensorWarp& tensor_warp_of(Warp& warp);

void set_seen(Clock& clock, int agent, uint32_t time);
void ask_tensor_core(Step& step, std::shared_ptr<TensorOperation> operation);

// tcgen05.mma and .cp, after those words (tcgen05_mma.cpp).
void decode_tensor_mma(Words& words, Instr& instr);
void decode_tensor_copy(Words& words, Instr& instr);

}  // namespace ptx
