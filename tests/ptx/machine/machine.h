// What every room of the machine speaks of: operands, instructions, warps, CTAs, launches, faults.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "order.h"

namespace ptx {

constexpr int LANES = 32;
constexpr uint32_t ALL = 0xffffffff;
using Mask = uint32_t;  // a bit a lane

// What a program did wrong. The launch adds kernel, line, CTA and thread.
struct Fault : std::runtime_error {
  explicit Fault(const std::string& what, int lane = -1) : std::runtime_error(what), lane(lane) {}
  int lane;
};

// An instruction, modifier or operand that the machine doesn't have.
struct Unknown : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// ---- Programs

enum class Is : uint8_t {
  Register,
  NotPredicate,
  Immediate,
  Vector,     // parts
  Address,    // parts[0] is the base, value the offset; the rest follows it inside the brackets
  Pair,       // d|p
  Label,      // value is the index of an instruction
  Labels,     // parts
  Special,    // word is its name, with %
  Sink,       // _
  Shared,     // value is an offset in the CTA's shared memory
  Local,      // in the thread's local memory
  Parameter,  // in the kernel's parameters
  Scratch     // in the thread's .param space of calls
};

struct Operand {
  Is is = Is::Sink;
  int reg = -1;
  int width = 0;    // bits of the register: 1 for a predicate
  uint32_t at = 0;  // its byte offset in a warp's register file
  int64_t value = 0;
  std::vector<Operand> parts;
  std::string word;

  bool predicate() const { return (is == Is::Register && width == 1) || is == Is::NotPredicate; }
};

struct Step;
enum class Outcome : uint8_t {
  Done,    // the lanes go on to the next instruction
  Jumped,  // the active lanes' program counters have been set
  Wait     // nothing was done: try again later
};
using Run = Outcome (*)(Step&);

struct Instr {
  Run run = nullptr;
  int line = 0;
  std::string opcode;
  int guard = -1;  // a predicate register
  bool guard_negated = false;
  // .aligned: all lanes of the warp that haven't ended execute it together.
  bool aligned = false;
  std::vector<Operand> ops;
  // What the family's decoder keeps: sizes, shapes, flags.
  int64_t data[8] = {};
  // It accesses a register that a wgmma of this program reads or accumulates in.
  bool dirties_wgmma = false;
  std::vector<Operand> registers() const;  // that it names
  // Registers that it writes and reads; the sinks of a trace, and of undefined accumulators.
  std::vector<Operand> destinations() const;
};

// How an instruction was executed, over all warps.
struct Count {
  uint64_t issued = 0;      // times that a warp issued it
  uint64_t lanes = 0;       // active lanes, summed
  uint64_t bytes = 0;       // of memory that it asked for
  uint64_t sectors = 0;     // 32-byte sectors of global memory
  uint64_t wavefronts = 0;  // passes over the banks of shared memory
  uint64_t multiplies = 0;  // multiply-adds of a matrix instruction
};

struct Program {
  std::string kernel;
  std::vector<int> widths;       // of registers, in bits
  std::vector<uint32_t> places;  // their byte offsets in a warp's register file
  uint32_t file_bytes = 0;
  uint32_t shared = 0, local = 0, params = 0, scratch = 0;
  uint32_t cluster[3] = {};
  bool lanes_release = false;  // something that a lane may do for itself alone
  std::vector<Instr> code;
};
std::unique_ptr<Program> read_program(const std::string& text);

// ---- Memory

// A tensor in global memory, or a module's variable.
struct Region {
  // The last store to a byte in this launch.
  struct Stored {
    uint32_t cluster = 0;  // linear, plus one; 0: not stored to in this launch
    uint32_t clock = 0;
    uint32_t line = 0;
    uint16_t agent = 0;
    uint8_t strong = 0;  // one more than the scope of an atomic or a relaxed or stronger store
    uint8_t lane = 0;
    uint32_t epoch = 0;    // of the warp
    uint8_t by_async = 0;  // by the async proxy
    uint8_t released = 0;  // to other clusters, by whomever
  };
  std::string name;
  uint8_t* data = nullptr;
  uint64_t size = 0;
  bool read_only = false;
  bool constant = false;  // of .const memory
  int item = 1;
  std::vector<int64_t> shape, strides;  // in items
  std::vector<uint8_t> elements;        // by byte, whether it is one's; empty where all are
  std::vector<uint8_t> undefined;       // by byte; empty where all is defined
  std::vector<Stored> stored;           // by byte; made at the first store of a launch

  std::string element(uint64_t offset) const;  // "y[3, 17]"
};

// Windows of the generic address space. Global addresses are the host's own.
constexpr uint64_t WINDOW = 0xffff000000000000;
constexpr uint64_t SHARED_WINDOW = 0xf100000000000000;
constexpr uint64_t LOCAL_WINDOW = 0xf200000000000000;
constexpr uint64_t PARAMETER_WINDOW = 0xf300000000000000;
constexpr int RANK_SHIFT = 24;           // shared addresses of a cluster: rank of the CTA, then offset
constexpr uint32_t SHARED_START = 1024;  // what lies below is the system's

// ---- What runs

struct Launch;
struct Cta;
struct Cluster;

// Something asynchronous that happens later than it was asked for. Doing it twice does it once.
struct Delivery {
  virtual ~Delivery() = default;
  void deliver() {
    if (!done) {
      done = true;
      happen();
    }
  }
  virtual void happen() = 0;
  virtual const char* what() const = 0;
  bool done = false;
  int line = 0;
  Cta* cta = nullptr;
};

struct Source {
  const char* base;
  int stride;
  Mask undefined;

  template <class T>
  T get(int lane) const {
    T value;
    std::memcpy(&value, base + lane * stride, sizeof(T));
    return value;
  }
};

struct Warp {
  Cta* cta = nullptr;
  int index = 0;  // in its CTA
  int agent = 0;  // in its cluster
  Mask alive = 0;
  bool diverged = false;
  uint32_t pc = 0;  // of all lanes that are alive, unless diverged
  uint32_t pcs[LANES] = {};
  std::vector<uint64_t> file;
  std::vector<Mask> undefined;  // by register: lanes in which it has no value
  // Of registers that were made of parts, some of them undefined: lanes in which each byte has no value.
  std::unordered_map<int, std::array<Mask, 16>> undefined_bytes;
  Clock clock;
  // What fences have released and a relaxed store will publish; what relaxed loads have found and a fence
  // will acquire: within the CTA, the cluster, and beyond.
  Clock fence_released, to_acquire;
  Clock fence_released_in_cluster, to_acquire_in_cluster;
  Times fence_released_on_gpu, to_acquire_on_gpu;
  // Some lanes have acquired since the warp last met: what the others know.
  Clock before;
  Mask acquirers = 0;
  uint32_t acquired_epoch = 0, met_epoch = 0;
  Mask carry = 0, carry_undefined = ALL;     // of .cc instructions, a bit a lane
  uint32_t epoch = 1;                        // counts what orders the memory accesses of its lanes
  std::vector<std::vector<uint32_t>> stack;  // by lane: where calls return to
  std::vector<uint8_t> local, scratch;       // by lane
  std::vector<uint8_t> local_undefined, scratch_undefined;
  // What its lanes have accessed in shared memory, or stored to global memory, since they last met.
  struct Access {
    SharedMemory* memory;  // or
    Region* region;
    uint64_t offset;
    uint16_t bytes;
    uint8_t lane;
    bool writes;
  };
  std::vector<Access> accesses;
  uint32_t accessed_in = 0;  // the epoch since then
  void remember(const Access& access) {
    constexpr size_t MOST = 1 << 16;  // of a warp that doesn't meet for long
    if (accessed_in != met() || accesses.size() == MOST) accesses.clear();
    accessed_in = met();
    accesses.push_back(access);
  }
  // What `lanes` have just released isn't what other lanes have accessed since the warp last met: those
  // accesses are taken to come later.
  void keep_back(Mask lanes);
  // `lanes` are about to acquire something, which the others know when they have met.
  void acquire_apart(Mask lanes);
  // `lanes` have waited at a barrier, where the whole warp has met if all of them have.
  void pass(Mask lanes) {
    if (lanes == alive) ++epoch;
    else acquire_apart(lanes);
  }
  uint64_t sleeps_until = 0;  // a step of the launch
  // What the families keep: each its own, made when first used.
  std::shared_ptr<void> copies;  // cp.async
  std::shared_ptr<void> wgmma;
  std::shared_ptr<void> bulk;
  std::shared_ptr<void> tensor;    // tcgen05
  std::shared_ptr<void> barriers;  // bar, barrier: which it waits at

  char* at(const Operand& op) { return reinterpret_cast<char*>(file.data()) + op.at; }
  Mask& predicate(uint32_t at) { return *reinterpret_cast<Mask*>(reinterpret_cast<char*>(file.data()) + at); }
  const Clock& clock_of(int lane) const {
    return acquired_epoch == epoch && lane >= 0 && !(acquirers >> lane & 1) ? before : clock;
  }
  // The epoch since which its lanes have not met.
  uint32_t met() const { return acquired_epoch == epoch ? met_epoch : epoch; }
  // Whether a lane knows what another one did in an epoch.
  bool has_met(int lane, int other, uint32_t at) const {
    return lane < 0 || lane == other || at != met() || (acquired_epoch == epoch && acquirers >> lane & 1);
  }
  uint32_t pc_of(int lane) const { return diverged ? pcs[lane] : pc; }
  int thread(int lane) const { return index * LANES + lane; }
};

struct Votes {  // of bar.red
  Mask all = ALL;
  Mask any = 0;
  int count = 0;
};

struct Barrier {  // bar, barrier
  int expected = 0;
  int arrived = 0;
  uint32_t generation = 0;
  Clock clock, completed;  // of those who have arrived; of the last generation
  Votes votes, result;     // likewise
};

struct Mbarrier {
  uint32_t count = 0;        // arrivals of a phase
  int64_t pending = 0;       // arrivals that this phase still waits for
  int64_t bytes = 0;         // bytes that it still waits for
  uint32_t phase = 0;        // phases completed
  Clock arrived, completed;  // of those who arrive in this phase; of the last phase
  int agent = -1;            // of the async copies that it counts
  uint32_t copies = 0;       // that agent's time
  bool valid = false;
  std::vector<uint32_t> asked;  // by agent: the phase, plus one, that its try_wait was last answered in
  uint32_t first_asked = 0;     // the phase, plus one, that anybody's try_wait was first answered in
  bool times_out = false;       // that of everybody who asks in it
};

struct Cta {
  Launch* launch = nullptr;
  Cluster* cluster = nullptr;
  uint32_t id[3] = {};
  uint32_t linear = 0;
  uint32_t rank = 0;  // in its cluster
  std::vector<std::unique_ptr<Warp>> warps;
  SharedMemory shared;
  Barrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;        // by offset in shared memory
  std::unordered_map<uint64_t, Clock> released;  // by address: what releases there, of any scope, say to its warps
  std::shared_ptr<void> tensor_memory;           // tcgen05
  int running = 0;                               // warps that haven't ended
  int in_flight = 0;                             // deliveries that read or write its shared memory
};

struct Cluster {
  uint32_t linear = 0;
  std::vector<std::unique_ptr<Cta>> ctas;
  int warps = 0;   // agents below this number are warps, those above mbarriers' copies
  int agents = 0;  // in use
  // barrier.cluster: its generations, and by agent who has arrived and not waited, in which of them.
  struct Arrival {
    Mask arrived = 0;  // in this generation
    Mask waits = 0;    // has arrived and not waited
    uint32_t generation[LANES] = {};
  };
  uint32_t generation = 0;
  std::vector<Arrival> arrivals;
  Clock arriving, completed;
  // Stores to global memory that aren't visible to other clusters.
  struct Unreleased {
    Region* region;
    uint64_t offset;
    uint32_t bytes;
    uint32_t clock;
    int agent;
    Mask lanes;      // that stored it
    uint32_t epoch;  // of their warp
  };
  std::vector<Unreleased> unreleased;
  std::unordered_map<uint64_t, Clock> released;  // by address: what releases of .cluster and wider say
  bool running() const;
};

enum class Scope : uint8_t { Cta, Cluster, Gpu, System };
enum class Late : uint8_t { Late, Random, Soon };

struct Options {
  uint32_t grid[3], block[3], cluster[3];
  uint32_t dynamic_shared;
  uint64_t seed;
  int resident;  // CTAs at once
  Late late;
  uint64_t most_steps;   // of warps
  uint64_t most_silent;  // steps in which nothing changes that another warp could see
  int trace_cta, trace_thread;
  bool lowest_first;  // always, of the lanes of a warp that have parted
  bool in_clusters;   // the launch says so, be they of one CTA
};

struct Machine {
  std::map<uint64_t, std::unique_ptr<Region>> regions;  // by address
  Region* find(uint64_t address);
  void forget() { last_ = nullptr; }

 private:
  Region* last_ = nullptr;  // that was found
};

struct Launch {
  Launch(Machine& machine, const Program& program, const Options& options, const std::string& parameters);
  void run();

  Machine& machine;
  const Program& program;
  Options options;
  std::vector<uint8_t> parameters;
  std::mt19937_64 random;
  uint64_t steps = 0;    // of warps
  uint64_t changes = 0;  // bumped by whatever another warp could be waiting for
  uint64_t changed_at = 0;
  std::vector<Count> counts;             // by instruction
  uint32_t warps;                        // of a CTA
  std::vector<uint64_t> issued_by_warp;  // by instruction, then by the warp's place in its CTA
  std::vector<std::shared_ptr<Delivery>> deliveries;
  std::vector<std::unique_ptr<Cluster>> running;
  std::string trace;
  // A wait that has lasted until nothing else can happen may end without success (try_wait).
  bool stuck = false;
  // The warp has just released or acquired something: here it shows most if others overtake it.
  bool ordered = false;
  const Instr* current = nullptr;

  uint64_t dice(uint64_t n) { return random() % n; }
  void changed() {
    ++changes;
    changed_at = steps;
  }
  // Registers something asynchronous: it happens at once, at random, or as late as waits allow.
  void later(std::shared_ptr<Delivery> delivery);

  // Global memory. `read` returns whether what it read is undefined.
  Region& region(uint64_t address, uint32_t bytes, uint32_t alignment, int lane, const char* access);
  bool read(Step& step, int lane, uint64_t address, uint32_t bytes, uint32_t alignment, void* to);
  void write(Step& step, int lane, uint64_t address, uint32_t bytes, uint32_t alignment, const void* from);
  // The same past caches, in order with every other strong access to the place whose scope includes this
  // thread, as this scope does the other.
  bool strong_read(Step& step, int lane, uint64_t address, uint32_t bytes, Scope scope, void* to);
  void strong_write(Step& step, int lane, uint64_t address, uint32_t bytes, Scope scope, const void* from);
  // The memory of an atomic: checked, marked as stored to, and for the caller to change, who then calls
  // `changed`.
  uint8_t* atomic(Step& step, int lane, uint64_t address, uint32_t bytes, Scope scope);
  // Memory that the async proxy reads or writes for a thread, when it does.
  void read_async(Warp& warp, uint64_t address, uint32_t bytes, void* to, bool* undefined);
  void write_async(Warp& warp, int line, uint64_t address, uint32_t bytes, const void* from);
  uint8_t* atomic_async(Warp& warp, int line, uint64_t address, uint32_t bytes);

  // Order. A release makes what the warp has stored and seen visible to who acquires. `address` is
  // the location through which it does, in the generic address space; 0 for a fence.
  // `lanes` release what they have stored themselves, and what others have before the warp last met.
  void release(Warp& warp, Scope scope, uint64_t address, Mask lanes);
  void acquire(Warp& warp, Scope scope, uint64_t address, Mask lanes);
  // `sc`: a fence.sc, all of which are in one order.
  void fence_acquire(Warp& warp, Scope scope, Mask lanes, bool sc);
  void fence_release(Warp& warp, Scope scope, Mask lanes, bool sc);
  // fence.proxy.async: what the warp has written and seen, the async proxy sees from here on.
  void proxy_fence(Warp& warp, bool shared, bool global);
  // Ends an interval of the warp's clock: what it does later isn't published by what it did before.
  static void tick(Warp& warp) { ++warp.clock.seen[warp.agent]; }
  // A relaxed access carries what a fence before it has released, or will acquire with a fence after.
  void relaxed_store(Warp& warp, Scope scope, uint64_t address);
  void relaxed_load(Warp& warp, Scope scope, uint64_t address);
  // These lanes go on at `pc`: for an instruction that returns Jumped.
  void advance(Warp& warp, Mask group, uint32_t pc);
  void end_lanes(Warp& warp, Mask lanes);

 private:
  std::unordered_map<uint64_t, Times> released_;  // by address: what releases of .gpu and wider say
  uint32_t next_cluster_ = 0;
  uint32_t cluster_count_ = 0;
  void start_cluster();
  bool step(Warp& warp);
  Outcome execute(Warp& warp, Mask group, uint32_t pc);
  void issue(const Warp& warp, uint32_t pc);
  void check_ended(const Cta& cta) const;
  void retire();
  bool deliver_something();
  void deliver(Delivery& delivery);
  void prepare_regions();
  void check_race(
      const Warp& warp, const Region& region, uint64_t offset, uint32_t bytes, int lane, bool writes,
      int strong) const;
  void release_stores(Warp& warp, Mask lanes);
  // Of all that a warp has seen, for others than its cluster's.
  void tell(const Warp& warp, Times& times) const;
  // What has come back of its own cluster's warps by way of others.
  void learn(Warp& warp) const;
  uint8_t* strong_place(Step& step, int lane, uint64_t address, uint32_t bytes, Scope scope);
  std::string where(const Warp& warp, uint32_t pc, int lane) const;
  std::string standing() const;
  void trace_step(Warp& warp, const Instr& instr, Mask active);
};

// One warp at one instruction. `active`: lanes that execute it.
struct Step {
  Launch& launch;
  Cta& cta;
  Warp& warp;
  const Instr& instr;
  Mask active;
  Mask group;  // with the lanes whose guard is false
  Count& count;
  uint64_t temporary[8] = {};
  int temporaries = 0;

  const Operand& op(int i) const { return instr.ops[i]; }

  // The values of an operand; undefined ones are known by their bit.
  Source source(const Operand& operand);
  Source source(int i) { return source(instr.ops[i]); }
  // For what decides a branch, an address or a stored value: a fault if it is undefined.
  Source defined(const Operand& operand, const char* as_what);
  Mask predicate(const Operand& operand);  // values, a bit a lane
  Mask undefined(const Operand& operand);  // a bit a lane
  Mask defined_predicate(const Operand& operand, const char* as_what);
  void set_predicate(const Operand& operand, Mask values, Mask undefined);

  // Writes the active lanes of a register.
  template <class T>
  void set(const Operand& operand, int lane, T value) {
    if (operand.is == Is::Sink) return;
    char* to = warp.at(operand);
    if (operand.width == 64) {
      uint64_t wide = 0;
      std::memcpy(&wide, &value, sizeof(T) < 8 ? sizeof(T) : 8);
      std::memcpy(to + 8 * lane, &wide, 8);
    } else if (operand.width == 128) {
      std::memset(to + 16 * lane, 0, 16);
      std::memcpy(to + 16 * lane, &value, sizeof(T) < 16 ? sizeof(T) : 16);
    } else {
      uint32_t narrow = 0;
      std::memcpy(&narrow, &value, sizeof(T) < 4 ? sizeof(T) : 4);
      std::memcpy(to + 4 * lane, &narrow, 4);
    }
  }
  // Says which of the active lanes of a register that was written are undefined.
  void set_undefined(const Operand& operand, Mask lanes) {
    if (operand.is == Is::Sink) return;
    Mask& of = warp.undefined[operand.reg];
    of = (of & ~active) | (lanes & active);
    if (lanes & active) warp.undefined_bytes.erase(operand.reg);
  }
  // The address of an operand in brackets, lane by lane, with its offset.
  uint64_t address(const Operand& operand, const Source& base, int lane) const {
    uint64_t value = operand.parts[0].width == 64 || operand.parts[0].is != Is::Register
                         ? base.get<uint64_t>(lane)
                         : base.get<uint32_t>(lane);
    return value + operand.value;
  }
  Source address_base(const Operand& operand) { return defined(operand.parts[0], "an address"); }

  // The CTA whose shared memory a shared address lies in, and the offset there.
  Cta& shared_cta(uint64_t address, int lane, bool own) const;
  static uint32_t shared_offset(uint64_t address) { return address & ((1u << RANK_SHIFT) - 1); }
};

#define FOR_LANES(lane, mask)                                                  \
  for (Mask lanes_left_ = (mask); lanes_left_; lanes_left_ &= lanes_left_ - 1) \
    if (const int lane = __builtin_ctz(lanes_left_); true)

}  // namespace ptx
