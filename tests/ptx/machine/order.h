// Who has seen what: clocks of warps, and the state of shared memory word by word.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace ptx {

struct Step;
struct Warp;

// A vector clock of all warps of a launch, those of a cluster one behind the other; 0 of those beyond its end.
struct Times : std::vector<uint32_t> {
  void join(const Times& other);
  // At least `clocks`, of the warps from `first` on.
  void raise(size_t first, const uint32_t* clocks, size_t count);
  bool reach(size_t warp, uint32_t clock) const { return warp < size() && (*this)[warp] >= clock; }
};

// Vector clocks. Agents are the warps of a cluster, and for each mbarrier the copies that it counts. An
// access of agent a at time t happens before a warp's next one if the warp has seen[a] >= t.
struct Clock {
  std::vector<uint32_t> seen;
  // The same for what a fence.proxy.async on the way has made visible to the async proxy, in shared memory and
  // in global.
  std::vector<uint32_t> fenced, fenced_in_global;
  // What releases of .gpu and wider have told of the launch's warps, those of its own cluster too; and what of it
  // is visible to the async proxy.
  Times acquired, proxied;
  // What fence.sc has released, so that a relaxed store behind a barrier publishes it; what relaxed loads have
  // found, so that a fence.sc behind a barrier acquires it.
  Times published, observed;

  void join(const Clock& other);
  // What is seen becomes visible to the async proxy.
  void fence_proxy(bool shared, bool global);
  bool has_seen(int agent, uint32_t time) const {
    return time == 0 || (agent < int(seen.size()) && seen[agent] >= time);
  }
  bool has_fenced_in_global(int agent, uint32_t time) const {
    return time == 0 || (agent < int(fenced_in_global.size()) && fenced_in_global[agent] >= time);
  }
  bool has_fenced(int agent, uint32_t time) const {
    return time == 0 || (agent < int(fenced.size()) && fenced[agent] >= time);
  }
};

// The shared memory of a CTA. An access that isn't ordered with one that it conflicts with is a fault
// that names both lines.
class SharedMemory {
 public:
  void allocate(uint32_t bytes, int warps);
  uint32_t size() const { return size_; }

  // By a thread, through the generic proxy. `read` returns whether a byte of it is undefined.
  bool read(Step& step, int lane, uint32_t offset, uint32_t bytes, uint32_t alignment, void* to);
  void write(Step& step, int lane, uint32_t offset, uint32_t bytes, uint32_t alignment, const void* from);
  // Relaxed and stronger accesses, and atomics: ordered among themselves. Whoever changes what `atomic`
  // hands out calls Launch::changed.
  bool strong_read(Step& step, int lane, uint32_t offset, uint32_t bytes, void* to);
  void strong_write(Step& step, int lane, uint32_t offset, uint32_t bytes, const void* from);
  uint8_t* atomic(Step& step, int lane, uint32_t offset, uint32_t bytes);
  // Whose a strong write is, if not the step's.
  void mark_strong(int agent, uint32_t time, int line, uint32_t offset, uint32_t bytes);

  // By the async proxy, from when it is asked for until it is known to be done: nobody may write what
  // it may still read, nor touch what it may still write. `generic`: cp.async, which is asynchronous,
  // and yet of the generic proxy. `agent`, `time`: whose the access is once it is done.
  void begin_read(Warp& warp, int line, uint32_t offset, uint32_t bytes);
  void end_read(int agent, uint32_t time, int line, uint32_t offset, uint32_t bytes);
  void begin_write(Warp& warp, int line, uint32_t offset, uint32_t bytes, bool generic);
  void end_write(
      int agent, uint32_t time, int line, uint32_t offset, uint32_t bytes, bool generic, bool undefined = false);
  // An access happens at a later time of its warp than it was taken to.
  void postpone(int agent, uint32_t time, uint32_t offset, uint32_t bytes, bool writes);
  // What a lane asks for asynchronously is ordered with its warp's other lanes only where they have met.
  void check_met(const Warp& warp, int lane, uint32_t offset, uint32_t bytes, bool writes) const;
  // A lane knows that a write of its own is complete; others of its warp must meet it first.
  void written_by(const Warp& warp, int lane, int line, uint32_t offset, uint32_t bytes);
  // The 8 bytes of an mbarrier: while they are closed, no other access may touch them.
  void close(uint32_t offset, bool closed);
  // Its bytes, without any check: for what begin_ and end_ surround.
  uint8_t* bytes(uint32_t offset) { return data_.get() + offset; }
  bool undefined(uint32_t offset, uint32_t bytes) const;

 private:
  struct Written {  // by half word
    uint32_t time;
    uint32_t line;
    uint16_t agent;
    uint16_t async;  // by the async proxy
  };
  struct ReadAsync {  // by word: the last read by an agent that is no warp
    uint32_t time;
    uint16_t agent;
  };
  struct Within {  // by word, and by byte for narrower accesses: the last ones by lanes of one warp
    uint32_t write_epoch, read_epoch;
    uint32_t write_line, read_line;
    uint16_t agent;
    uint8_t write_lane, read_lane;
    uint8_t by_bytes;  // of a word: there were narrower accesses
  };
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  template <class T>
  using Array = std::unique_ptr<T[], Free>;

  uint32_t size_ = 0;
  int warps_ = 0;
  Array<uint8_t> data_;
  Array<uint8_t> defined_;       // by byte
  Array<Written> written_;       // by half word
  Array<uint32_t> read_;         // by word and warp: time << 4 | bytes
  Array<uint32_t> read_line_;    // by word
  Array<ReadAsync> read_async_;  // by word
  Array<Within> within_;         // by word
  Array<Within> within_bytes_;   // by byte
  Array<uint16_t> reading_;      // by word: asynchronous reads in flight
  Array<uint16_t> writing_;      // and writes
  Array<uint32_t> async_line_;   // by word: of the last of them
  Array<uint8_t> closed_;        // by double word: an mbarrier
  Array<uint8_t> atomic_;        // by word: last written by an atomic

  // A read by a warp's generic proxy, or by what it has asked for.
  void note_read(int agent, uint32_t time, uint32_t offset, uint32_t bytes);
  bool repeats(const Step& step, uint32_t offset, uint32_t bytes, const void* from) const;
  void check_within(
      const Warp& warp, const Within& last, uint32_t at, int lane, const char* access, bool writes) const;
  // A lane's access, in order with those of its warp's other lanes only where they have met.
  void access_within(const Step& step, int lane, uint32_t offset, uint32_t bytes, bool writes, bool again);
  void inside(uint32_t offset, uint32_t bytes, int lane, const char* access) const;
  // What a strong access may touch. False where the last writes were strong too: no need of a value then.
  bool check_strong(Step& step, int lane, uint32_t offset, uint32_t bytes, const char* access, bool writes) const;
  void check_reads(
      const Clock& clock, int agent, uint32_t offset, uint32_t bytes, int lane, const char* access) const;
  void check_writes(
      const Clock& clock, int agent, uint32_t offset, uint32_t bytes, int lane, const char* access,
      bool proxy) const;
};

}  // namespace ptx
