#include "order.h"

#include <algorithm>

#include "machine.h"

namespace ptx {

void Times::join(const Times& other) {
  if (size() < other.size()) resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) (*this)[i] = std::max((*this)[i], other[i]);
}

void Times::raise(size_t first, const uint32_t* clocks, size_t count) {
  if (size() < first + count) resize(first + count);
  for (size_t i = 0; i < count; ++i) (*this)[first + i] = std::max((*this)[first + i], clocks[i]);
}

static void join_times(std::vector<uint32_t>& of, const std::vector<uint32_t>& other) {
  if (of.size() < other.size()) of.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) of[i] = std::max(of[i], other[i]);
}

void Clock::join(const Clock& other) {
  join_times(seen, other.seen);
  join_times(fenced, other.fenced);
  join_times(fenced_in_global, other.fenced_in_global);
  acquired.join(other.acquired);
  proxied.join(other.proxied);
  published.join(other.published);
  observed.join(other.observed);
}

void Clock::fence_proxy(bool shared, bool global) {
  if (shared) join_times(fenced, seen);
  if (!global) return;
  join_times(fenced_in_global, seen);
  proxied.join(acquired);
}

namespace {

constexpr int TIME_SHIFT = 4;  // the low bits of a read's record: which bytes of the word

template <class T>
T* zeros(size_t count) {
  void* memory = std::calloc(std::max<size_t>(count, 1), sizeof(T));
  if (memory == nullptr) throw std::bad_alloc();
  return static_cast<T*>(memory);
}

// The bytes of the word at `word` that [offset, offset + bytes) touches.
uint32_t bytes_of_word(uint32_t word, uint32_t offset, uint32_t bytes) {
  const uint32_t begin = std::max(offset, 4 * word) - 4 * word;
  const uint32_t end = std::min(offset + bytes, 4 * word + 4) - 4 * word;
  return ((1u << end) - 1) & ~((1u << begin) - 1);
}

}  // namespace

void SharedMemory::allocate(uint32_t bytes, int warps) {
  size_ = bytes;
  warps_ = warps;
  const size_t words = (size_t(bytes) + 3) / 4;
  data_.reset(zeros<uint8_t>(bytes));
  defined_.reset(zeros<uint8_t>(bytes));
  written_.reset(zeros<Written>(2 * words));
  read_.reset(zeros<uint32_t>(words * warps));
  read_line_.reset(zeros<uint32_t>(words));
  read_async_.reset(zeros<ReadAsync>(words));
  within_.reset(zeros<Within>(words));
  within_bytes_.reset(zeros<Within>(4 * words));
  reading_.reset(zeros<uint16_t>(words));
  writing_.reset(zeros<uint16_t>(words));
  async_line_.reset(zeros<uint32_t>(words));
  atomic_.reset(zeros<uint8_t>(words));
  closed_.reset(zeros<uint8_t>((words + 1) / 2));
}

void SharedMemory::inside(uint32_t offset, uint32_t bytes, int lane, const char* access) const {
  if (offset < SHARED_START || offset > size_ || bytes > size_ - offset)
    throw Fault(
        format(
            "%s %u bytes at %d of shared memory, which has %u", access, bytes, int(offset) - int(SHARED_START),
            size_ - SHARED_START),
        lane);
  for (uint32_t i = offset / 8; bytes && i <= (offset + bytes - 1) / 8; ++i)
    if (closed_[i])
      throw Fault(
          format(
              "%s the mbarrier at %d of shared memory as if it were data", access, int(8 * i) - int(SHARED_START)),
          lane);
}

void SharedMemory::close(uint32_t offset, bool closed) { closed_[offset / 8] = closed; }

bool SharedMemory::undefined(uint32_t offset, uint32_t bytes) const {
  return std::memchr(&defined_[offset], 0, bytes) != nullptr;
}

void SharedMemory::check_reads(
    const Clock& clock, int agent, uint32_t offset, uint32_t bytes, int lane, const char* access) const {
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    const ReadAsync& async = read_async_[word];
    if (reading_[word] || !clock.has_seen(async.agent, async.time))
      throw Fault(
          format(
              "%s shared memory at %d that line %u, asynchronous, may still be reading", access,
              int(4 * word) - int(SHARED_START), async_line_[word]),
          lane);
    const uint32_t mask = bytes_of_word(word, offset, bytes);
    const uint32_t* reads = &read_[size_t(word) * warps_];
    for (int other = 0; other < warps_; ++other)
      if (other != agent && (reads[other] & mask) && !clock.has_seen(other, reads[other] >> TIME_SHIFT))
        throw Fault(
            format(
                "%s shared memory at %d that warp %d reads in line %u, with no barrier between", access,
                int(4 * word) - int(SHARED_START), other, read_line_[word]),
            lane);
  }
}

void SharedMemory::check_writes(
    const Clock& clock, int agent, uint32_t offset, uint32_t bytes, int lane, const char* access,
    bool proxy) const {
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word)
    if (writing_[word])
      throw Fault(
          format(
              "%s shared memory at %d that line %u, asynchronous, may still be writing", access,
              int(4 * word) - int(SHARED_START), async_line_[word]),
          lane);
  for (uint32_t half = offset / 2; half <= (offset + bytes - 1) / 2; ++half) {
    const Written& last = written_[half];
    if (last.time == 0) continue;
    if (last.agent != agent && !clock.has_seen(last.agent, last.time)) {
      const std::string who = last.agent < warps_ ? format("warp %d", last.agent) : std::string("a bulk copy");
      throw Fault(
          format(
              "%s shared memory at %d that %s writes in line %u, with no barrier between", access,
              int(2 * half) - int(SHARED_START), who.c_str(), last.line),
          lane);
    }
    if (proxy && !last.async && !clock.has_fenced(last.agent, last.time))
      throw Fault(
          format(
              "%s, by the async proxy, shared memory at %d that line %u wrote, with no fence.proxy.async between",
              access, int(2 * half) - int(SHARED_START), last.line),
          lane);
  }
}

void SharedMemory::check_within(
    const Warp& warp, const Within& last, uint32_t at, int lane, const char* access, bool writes) const {
  if (last.agent != warp.agent + 1) return;
  const int place = int(at) - int(SHARED_START);
  if (last.write_epoch == warp.epoch && last.write_lane != lane)
    throw Fault(
        format(
            "%s shared memory at %d that lane %d of its warp writes in line %u, with no __syncwarp between",
            access, place, last.write_lane, last.write_line),
        lane);
  if (writes && last.read_epoch == warp.epoch && last.read_lane != lane)
    throw Fault(
        format(
            "%s shared memory at %d that another lane of its warp reads in line %u, with no __syncwarp between",
            access, place, last.read_line),
        lane);
}

void SharedMemory::check_met(const Warp& warp, int lane, uint32_t offset, uint32_t bytes, bool writes) const {
  const char* access = writes ? "writes" : "reads";
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    check_within(warp, within_[word], 4 * word, lane, access, writes);
    if (!within_[word].by_bytes) continue;
    for (uint32_t byte = 4 * word; byte < 4 * word + 4; ++byte)
      check_within(warp, within_bytes_[byte], byte, lane, access, writes);
  }
}

void SharedMemory::access_within(
    const Step& step, int lane, uint32_t offset, uint32_t bytes, bool writes, bool again) {
  const Warp& warp = step.warp;
  const char* access = writes ? "writes" : "reads";
  const auto check = [&](const Within& last, uint32_t at) {
    if (!again) check_within(warp, last, at, lane, access, writes);
  };
  const auto note = [&](Within& last) {
    if (last.agent != warp.agent + 1) last = {0, 0, 0, 0, uint16_t(warp.agent + 1), 0, 0, last.by_bytes};
    if (writes) {
      last.write_epoch = warp.epoch;
      last.write_lane = lane;
      last.write_line = step.instr.line;
    } else {
      last.read_lane = last.read_epoch == warp.epoch && last.read_lane != lane ? LANES : lane;
      last.read_epoch = warp.epoch;
      last.read_line = step.instr.line;
    }
  };
  const bool narrow = bytes < 4;
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    Within& whole = within_[word];
    check(whole, 4 * word);
    if (!narrow) note(whole);
    if (!narrow && !whole.by_bytes) continue;
    whole.by_bytes = true;
    const uint32_t end = std::min(offset + bytes, 4 * word + 4);
    for (uint32_t byte = std::max(offset, 4 * word); byte < end; ++byte) {
      check(within_bytes_[byte], byte);
      if (narrow) note(within_bytes_[byte]);
    }
  }
}

void SharedMemory::note_read(int agent, uint32_t time, uint32_t offset, uint32_t bytes) {
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    uint32_t& last = read_[size_t(word) * warps_ + agent];
    const uint32_t mask = bytes_of_word(word, offset, bytes);
    last = last >> TIME_SHIFT == time ? last | mask : time << TIME_SHIFT | mask;
  }
}

bool SharedMemory::read(Step& step, int lane, uint32_t offset, uint32_t bytes, uint32_t alignment, void* to) {
  inside(offset, bytes, lane, "reads");
  if (offset % alignment)
    throw Fault(
        format("reads shared memory at %d, not a multiple of %u", int(offset) - int(SHARED_START), alignment),
        lane);
  Warp& warp = step.warp;
  check_writes(warp.clock_of(lane), warp.agent, offset, bytes, lane, "reads", false);
  note_read(warp.agent, warp.clock.seen[warp.agent], offset, bytes);
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) read_line_[word] = step.instr.line;
  access_within(step, lane, offset, bytes, false, false);
  if (step.launch.program.lanes_release)
    warp.remember({this, nullptr, offset, uint16_t(bytes), uint8_t(lane), false});
  std::memcpy(to, &data_[offset], bytes);
  return undefined(offset, bytes);
}

// Whether a store writes what the same instruction has written there. Compilers let several threads
// hold one value and all of them store it: nobody can tell which of them did.
bool SharedMemory::repeats(const Step& step, uint32_t offset, uint32_t bytes, const void* from) const {
  if (std::memcmp(&data_[offset], from, bytes) != 0) return false;
  for (uint32_t half = offset / 2; half <= (offset + bytes - 1) / 2; ++half)
    if (written_[half].line != uint32_t(step.instr.line) || written_[half].async || writing_[half / 2])
      return false;
  return true;
}

void SharedMemory::write(
    Step& step, int lane, uint32_t offset, uint32_t bytes, uint32_t alignment, const void* from) {
  inside(offset, bytes, lane, "writes");
  if (offset % alignment)
    throw Fault(
        format("writes shared memory at %d, not a multiple of %u", int(offset) - int(SHARED_START), alignment),
        lane);
  Warp& warp = step.warp;
  const bool again = repeats(step, offset, bytes, from);
  if (!again) {
    check_reads(warp.clock_of(lane), warp.agent, offset, bytes, lane, "writes");
    check_writes(warp.clock_of(lane), warp.agent, offset, bytes, lane, "writes", false);
  }
  const uint32_t time = warp.clock.seen[warp.agent];
  access_within(step, lane, offset, bytes, true, again);
  if (step.launch.program.lanes_release)
    warp.remember({this, nullptr, offset, uint16_t(bytes), uint8_t(lane), true});
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) atomic_[word] = 0;
  for (uint32_t half = offset / 2; half <= (offset + bytes - 1) / 2; ++half)
    written_[half] = {time, uint32_t(step.instr.line), uint16_t(warp.agent), 0};
  std::memcpy(&data_[offset], from, bytes);
  std::memset(&defined_[offset], 1, bytes);
  step.launch.changed();
}

bool SharedMemory::check_strong(
    Step& step, int lane, uint32_t offset, uint32_t bytes, const char* access, bool writes) const {
  inside(offset, bytes, lane, access);
  if (offset % bytes)
    throw Fault(
        format("%s shared memory at %d, not a multiple of %u", access, int(offset) - int(SHARED_START), bytes),
        lane);
  bool all_atomic = true;
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word)
    all_atomic &= atomic_[word] && !writing_[word] && !(writes && reading_[word]);
  if (all_atomic) return false;
  const Warp& warp = step.warp;
  if (writes) check_reads(warp.clock_of(lane), warp.agent, offset, bytes, lane, access);
  check_writes(warp.clock_of(lane), warp.agent, offset, bytes, lane, access, false);
  return true;
}

void SharedMemory::mark_strong(int agent, uint32_t time, int line, uint32_t offset, uint32_t bytes) {
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) atomic_[word] = 1;
  for (uint32_t half = offset / 2; half <= (offset + bytes - 1) / 2; ++half)
    written_[half] = {time, uint32_t(line), uint16_t(agent), 0};
}

bool SharedMemory::strong_read(Step& step, int lane, uint32_t offset, uint32_t bytes, void* to) {
  check_strong(step, lane, offset, bytes, "reads", false);
  std::memcpy(to, &data_[offset], bytes);
  return undefined(offset, bytes);
}

void SharedMemory::strong_write(Step& step, int lane, uint32_t offset, uint32_t bytes, const void* from) {
  check_strong(step, lane, offset, bytes, "writes", true);
  const Warp& warp = step.warp;
  mark_strong(warp.agent, warp.clock.seen[warp.agent], step.instr.line, offset, bytes);
  if (!undefined(offset, bytes) && std::memcmp(&data_[offset], from, bytes) == 0) return;
  std::memcpy(&data_[offset], from, bytes);
  std::memset(&defined_[offset], 1, bytes);
  step.launch.changed();
}

uint8_t* SharedMemory::atomic(Step& step, int lane, uint32_t offset, uint32_t bytes) {
  if (check_strong(step, lane, offset, bytes, "updates", true) && undefined(offset, bytes))
    throw Fault(
        format("updates shared memory at %d, which nobody has written", int(offset) - int(SHARED_START)), lane);
  const Warp& warp = step.warp;
  mark_strong(warp.agent, warp.clock.seen[warp.agent], step.instr.line, offset, bytes);
  return &data_[offset];
}

void SharedMemory::begin_read(Warp& warp, int line, uint32_t offset, uint32_t bytes) {
  inside(offset, bytes, -1, "reads");
  check_writes(warp.clock, -1, offset, bytes, -1, "reads", true);
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    ++reading_[word];
    async_line_[word] = line;
  }
}

void SharedMemory::end_read(int agent, uint32_t time, int line, uint32_t offset, uint32_t bytes) {
  if (agent < warps_) note_read(agent, time, offset, bytes);
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    --reading_[word];
    if (agent < warps_) {
      read_line_[word] = line;
    } else {
      read_async_[word] = {time, uint16_t(agent)};
      async_line_[word] = line;
    }
  }
}

void SharedMemory::begin_write(Warp& warp, int line, uint32_t offset, uint32_t bytes, bool generic) {
  inside(offset, bytes, -1, "writes");
  check_reads(warp.clock, warp.agent, offset, bytes, -1, "writes");
  check_writes(warp.clock, generic ? warp.agent : -1, offset, bytes, -1, "writes", !generic);
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    ++writing_[word];
    async_line_[word] = line;
  }
}

void SharedMemory::end_write(
    int agent, uint32_t time, int line, uint32_t offset, uint32_t bytes, bool generic, bool undefined) {
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    --writing_[word];
    within_[word] = {};
    atomic_[word] = 0;
  }
  for (uint32_t half = offset / 2; half <= (offset + bytes - 1) / 2; ++half)
    written_[half] = {time, uint32_t(line), uint16_t(agent), uint16_t(!generic)};
  std::memset(&defined_[offset], !undefined, bytes);
}

void SharedMemory::postpone(int agent, uint32_t time, uint32_t offset, uint32_t bytes, bool writes) {
  if (writes) {
    for (uint32_t half = offset / 2; half <= (offset + bytes - 1) / 2; ++half)
      if (written_[half].agent == agent && !written_[half].async) written_[half].time = time;
    return;
  }
  note_read(agent, time, offset, bytes);
}

void SharedMemory::written_by(const Warp& warp, int lane, int line, uint32_t offset, uint32_t bytes) {
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    Within& within = within_[word];
    within = {};
    within.agent = warp.agent + 1;
    within.write_epoch = warp.epoch;
    within.write_lane = lane;
    within.write_line = line;
  }
}

}  // namespace ptx
