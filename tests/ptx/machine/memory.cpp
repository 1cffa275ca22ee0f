// Global memory: bounds, undefined values, and the order of stores and loads between CTAs.
//
// Values are never stale here. A load that a GPU could answer with a stale value, because nothing orders
// it after the store, is a fault: so is any access that races with another's store (PTX ISA, "Memory
// Consistency Model": morally strong, causality order).
#include <algorithm>

#include "machine.h"

namespace ptx {

std::string Region::element(uint64_t offset) const {
  std::string text = name;
  if (shape.empty()) return text + format(" + %llu bytes", (unsigned long long)offset);
  int64_t left = offset / item;
  // Strides in falling order give the index; what they don't reach is a gap.
  std::vector<size_t> order(shape.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  std::vector<int64_t> index(shape.size());
  for (size_t i : order)
    if (strides[i] > 0) {
      index[i] = left / strides[i];
      left -= index[i] * strides[i];
    }
  text += "[";
  for (size_t i = 0; i < index.size(); ++i) text += (i ? ", " : "") + std::to_string(index[i]);
  return text + "]";
}

Region* Machine::find(uint64_t address) {
  if (last_ != nullptr && address - uint64_t(last_->data) < last_->size) return last_;
  auto after = regions.upper_bound(address);
  if (after == regions.begin()) return nullptr;
  Region* region = std::prev(after)->second.get();
  if (address - uint64_t(region->data) >= region->size) return nullptr;
  return last_ = region;
}

void Launch::prepare_regions() {
  for (auto& [address, region] : machine.regions) region->stored.clear();
}

Region& Launch::region(uint64_t address, uint32_t bytes, uint32_t alignment, int lane, const char* access) {
  Region* found = machine.find(address);
  if (found != nullptr && address - uint64_t(found->data) + bytes <= found->size) {
    if (address % alignment)
      throw Fault(
          format(
              "%s %u bytes at %s, whose address is not a multiple of %u", access, bytes,
              found->element(address - uint64_t(found->data)).c_str(), alignment),
          lane);
    const uint64_t offset = address - uint64_t(found->data);
    if (!found->elements.empty() && std::memchr(&found->elements[offset], 0, bytes) != nullptr)
      throw Fault(
          format(
              "%s %u bytes at %s, which lie between its elements", access, bytes, found->element(offset).c_str()),
          lane);
    return *found;
  }
  // The tensor that it is nearest to, behind or before.
  std::string near = address == 0 ? "a null pointer" : "no tensor";
  uint64_t least = 1 << 20;
  for (auto& [begin, region] : machine.regions) {
    const uint64_t end = begin + region->size;
    if (address + bytes > end && address + bytes - end < least) {
      least = address + bytes - end;
      near = format(
          "%llu bytes past the end of %s (element %llu of %llu)", (unsigned long long)least, region->name.c_str(),
          (unsigned long long)(address - begin) / region->item, (unsigned long long)region->size / region->item);
    }
    if (address < begin && begin - address < least) {
      least = begin - address;
      near = format("%llu bytes before %s", (unsigned long long)least, region->name.c_str());
    }
  }
  throw Fault(format("%s %u bytes at %#llx: %s", access, bytes, (unsigned long long)address, near.c_str()), lane);
}

// In the order of Times.
static size_t warp_of(const Region::Stored& stored, const Cta& cta) {
  return size_t(stored.cluster - 1) * cta.cluster->warps + stored.agent;
}

// Of an access, as Region::Stored keeps it; 0 is a weak one.
static int strength(Scope scope) { return 1 + int(scope); }

void Launch::check_race(
    const Warp& warp, const Region& region, uint64_t offset, uint32_t bytes, int lane, bool writes,
    int strong) const {
  if (region.stored.empty()) return;
  const uint32_t mine = warp.cta->cluster->linear + 1;
  const Clock& clock = warp.clock_of(lane);
  for (uint64_t i = offset; i < offset + bytes; ++i) {
    const Region::Stored& last = region.stored[i];
    if (last.cluster == 0) continue;
    const bool own = last.cluster == mine && last.agent == warp.agent;
    // Lanes that store to one place in one instruction are seen to where it is executed.
    const bool met = warp.has_met(lane, last.lane, last.epoch) || last.by_async ||
                     (writes && current != nullptr && last.line == uint32_t(current->line));
    const bool ordered = own                    ? met
                         : last.cluster == mine ? clock.has_seen(last.agent, last.clock)
                                                : clock.acquired.reach(warp_of(last, *warp.cta), last.clock);
    if (ordered) continue;
    // PTX ISA, "Memory Consistency Model": morally strong operations, whose scopes include each other.
    const bool same_cta = last.cluster == mine && last.agent / warp.cta->warps.size() == warp.cta->rank;
    const int needed = strength(same_cta ? Scope::Cta : last.cluster == mine ? Scope::Cluster : Scope::Gpu);
    if (strong >= needed && last.strong >= needed) continue;
    std::string why;
    if (strong && last.strong) why = "in a scope that does not include it";
    else if (own) why = "with no __syncwarp between";
    else if (last.cluster == mine) why = "with no barrier between";
    else if (!last.released) why = "and has not released";
    else why = "and this warp has not acquired";
    throw Fault(
        format(
            "%s %s, which %s stores to in line %u, %s", writes ? "stores to" : "reads", region.element(i).c_str(),
            own                    ? format("lane %d of its warp", last.lane).c_str()
            : last.cluster == mine ? "another warp"
                                   : format("CTA %u", last.cluster - 1).c_str(),
            last.line, why.c_str()),
        lane);
  }
}

static bool any_undefined(const Region& region, uint64_t offset, uint32_t bytes) {
  if (region.undefined.empty()) return false;
  for (uint64_t i = offset; i < offset + bytes; ++i)
    if (region.undefined[i]) return true;
  return false;
}

static void marks(
    Launch& launch, Warp& warp, int line, int lane, Region& region, uint64_t offset, uint32_t bytes, int strong,
    bool by_async) {
  if (region.stored.empty()) region.stored.resize(region.size);
  if (!region.undefined.empty()) std::memset(&region.undefined[offset], 0, bytes);
  Cluster& cluster = *warp.cta->cluster;
  const uint32_t clock = warp.clock.seen[warp.agent];
  Region::Stored stored;
  stored.cluster = cluster.linear + 1;
  stored.clock = clock;
  stored.line = line;
  stored.agent = warp.agent;
  stored.strong = strong;
  stored.lane = lane;
  stored.epoch = by_async ? 0 : warp.met();
  stored.by_async = by_async;
  // A fence and a relaxed store are a release together: of the store, too, but of nothing between them.
  const bool released = strong >= strength(Scope::Gpu) && !warp.fence_released_on_gpu.empty();
  if (released) stored.clock = warp.fence_released_on_gpu[warp_of(stored, *warp.cta)];
  stored.released = released;
  const auto first = region.stored.begin() + offset;
  const bool again = std::all_of(first, first + bytes, [&](const Region::Stored& before) {
    return before.cluster == stored.cluster && before.clock == clock && before.agent == stored.agent &&
           before.lane == stored.lane && !before.released;
  });
  std::fill_n(first, bytes, stored);
  if (!strong) launch.changed();
  if (released) return;
  if (launch.program.lanes_release && !by_async)
    warp.remember({nullptr, &region, offset, uint16_t(bytes), uint8_t(lane), true});
  if (again) return;
  // A warp's neighbouring stores are one piece. What is asynchronous no lane has to wait for.
  auto& pieces = cluster.unreleased;
  if (!pieces.empty() && pieces.back().region == &region && pieces.back().agent == warp.agent &&
      pieces.back().clock == clock && pieces.back().epoch == stored.epoch &&
      pieces.back().offset + pieces.back().bytes == offset) {
    pieces.back().bytes += bytes;
    pieces.back().lanes |= 1u << lane;
  } else {
    pieces.push_back({&region, offset, bytes, clock, warp.agent, 1u << lane, stored.epoch});
  }
}

bool Launch::read(Step& step, int lane, uint64_t address, uint32_t bytes, uint32_t alignment, void* to) {
  Region& from = region(address, bytes, alignment, lane, "reads");
  const uint64_t offset = address - uint64_t(from.data);
  check_race(step.warp, from, offset, bytes, lane, false, 0);
  std::memcpy(to, from.data + offset, bytes);
  return any_undefined(from, offset, bytes);
}

void Launch::write(Step& step, int lane, uint64_t address, uint32_t bytes, uint32_t alignment, const void* from) {
  Region& to = region(address, bytes, alignment, lane, "stores");
  const uint64_t offset = address - uint64_t(to.data);
  if (to.read_only) throw Fault("stores to " + to.element(offset) + ", an input", lane);
  check_race(step.warp, to, offset, bytes, lane, true, 0);
  std::memcpy(to.data + offset, from, bytes);
  marks(*this, step.warp, step.instr.line, lane, to, offset, bytes, 0, false);
}

bool Launch::strong_read(Step& step, int lane, uint64_t address, uint32_t bytes, Scope scope, void* to) {
  Region& from = region(address, bytes, bytes, lane, "reads");
  const uint64_t offset = address - uint64_t(from.data);
  check_race(step.warp, from, offset, bytes, lane, false, strength(scope));
  std::memcpy(to, from.data + offset, bytes);
  return any_undefined(from, offset, bytes);
}

void Launch::strong_write(Step& step, int lane, uint64_t address, uint32_t bytes, Scope scope, const void* from) {
  uint8_t* to = strong_place(step, lane, address, bytes, scope);
  if (std::memcmp(to, from, bytes) == 0) return;
  std::memcpy(to, from, bytes);
  changed();
}

uint8_t* Launch::atomic(Step& step, int lane, uint64_t address, uint32_t bytes, Scope scope) {
  Region& to = region(address, bytes, bytes, lane, "updates");
  const uint64_t offset = address - uint64_t(to.data);
  if (any_undefined(to, offset, bytes))
    throw Fault("updates " + to.element(offset) + ", which nobody has written", lane);
  return strong_place(step, lane, address, bytes, scope);
}

uint8_t* Launch::strong_place(Step& step, int lane, uint64_t address, uint32_t bytes, Scope scope) {
  Region& to = region(address, bytes, bytes, lane, "updates");
  const uint64_t offset = address - uint64_t(to.data);
  if (to.read_only) throw Fault("updates " + to.element(offset) + ", an input", lane);
  check_race(step.warp, to, offset, bytes, lane, true, strength(scope));
  marks(*this, step.warp, step.instr.line, lane, to, offset, bytes, strength(scope), false);
  return to.data + offset;
}

void Launch::read_async(Warp& warp, uint64_t address, uint32_t bytes, void* to, bool* undefined) {
  Region& from = region(address, bytes, 1, -1, "reads");
  const uint64_t offset = address - uint64_t(from.data);
  check_race(warp, from, offset, bytes, -1, false, 0);
  if (!from.stored.empty())
    for (uint64_t i = offset; i < offset + bytes; ++i) {
      const Region::Stored& last = from.stored[i];
      if (last.cluster == 0 || last.by_async) continue;
      const bool fenced = last.cluster == warp.cta->cluster->linear + 1
                              ? warp.clock.has_fenced_in_global(last.agent, last.clock)
                              : warp.clock.proxied.reach(warp_of(last, *warp.cta), last.clock);
      if (!fenced)
        throw Fault(format(
            "reads, by the async proxy, %s, which line %u stores to, with no fence.proxy.async between",
            from.element(i).c_str(), last.line));
    }
  std::memcpy(to, from.data + offset, bytes);
  *undefined = any_undefined(from, offset, bytes);
}

void Launch::write_async(Warp& warp, int line, uint64_t address, uint32_t bytes, const void* from) {
  Region& to = region(address, bytes, 1, -1, "stores");
  const uint64_t offset = address - uint64_t(to.data);
  if (to.read_only) throw Fault("stores to " + to.element(offset) + ", an input");
  check_race(warp, to, offset, bytes, -1, true, 0);
  std::memcpy(to.data + offset, from, bytes);
  marks(*this, warp, line, 0, to, offset, bytes, 0, true);
}

uint8_t* Launch::atomic_async(Warp& warp, int line, uint64_t address, uint32_t bytes) {
  Region& to = region(address, bytes, bytes, -1, "updates");
  const uint64_t offset = address - uint64_t(to.data);
  if (to.read_only) throw Fault("updates " + to.element(offset) + ", an input");
  if (any_undefined(to, offset, bytes))
    throw Fault("updates " + to.element(offset) + ", which nobody has written");
  check_race(warp, to, offset, bytes, -1, true, strength(Scope::Gpu));
  marks(*this, warp, line, 0, to, offset, bytes, strength(Scope::Gpu), true);
  changed();
  return to.data + offset;
}

// ---- Order

// Marks what the warp has stored and seen as released.
void Launch::release_stores(Warp& warp, Mask lanes) {
  Cluster& cluster = *warp.cta->cluster;
  auto& pieces = cluster.unreleased;
  auto kept = pieces.begin();
  for (Cluster::Unreleased& piece : pieces) {
    if (!warp.clock.has_seen(piece.agent, piece.clock)) {
      *kept++ = piece;
      continue;
    }
    const bool met = piece.agent != warp.agent || piece.epoch != warp.met();
    for (uint64_t i = piece.offset; i < piece.offset + piece.bytes; ++i) {
      Region::Stored& stored = piece.region->stored[i];
      if (stored.cluster == cluster.linear + 1 && stored.agent == piece.agent && stored.clock >= piece.clock &&
          warp.clock.has_seen(stored.agent, stored.clock) && (met || lanes >> stored.lane & 1))
        stored.released = true;
    }
    if (!met && piece.lanes & ~lanes) *kept++ = piece;
  }
  pieces.erase(kept, pieces.end());
}

void Launch::tell(const Warp& warp, Times& times) const {
  const Cluster& cluster = *warp.cta->cluster;
  times.join(warp.clock.acquired);
  times.raise(size_t(cluster.linear) * cluster.warps, warp.clock.seen.data(), cluster.warps);
}

void Launch::learn(Warp& warp) const {
  const Cluster& cluster = *warp.cta->cluster;
  const size_t first = size_t(cluster.linear) * cluster.warps;
  const Times& of = warp.clock.acquired;
  for (size_t i = 0; i < size_t(cluster.warps) && first + i < of.size(); ++i)
    warp.clock.seen[i] = std::max(warp.clock.seen[i], of[first + i]);
}

void Launch::release(Warp& warp, Scope scope, uint64_t address, Mask lanes) {
  warp.cta->released[address].join(warp.clock);
  if (scope >= Scope::Cluster) warp.cta->cluster->released[address].join(warp.clock);
  ordered = true;
  if (scope >= Scope::Gpu) {
    release_stores(warp, lanes);
    tell(warp, released_[address]);
  }
  tick(warp);
  warp.keep_back(lanes);
}

void Warp::keep_back(Mask lanes) {
  if (accessed_in != met() || (alive & ~lanes) == 0) accesses.clear();
  auto kept = accesses.begin();
  for (const Access& access : accesses) {
    if (lanes >> access.lane & 1) continue;
    *kept++ = access;
    if (access.region == nullptr) {
      access.memory->postpone(agent, clock.seen[agent], access.offset, access.bytes, access.writes);
      continue;
    }
    for (uint64_t i = access.offset; i < access.offset + access.bytes; ++i) {
      Region::Stored& stored = access.region->stored[i];
      if (stored.cluster == cta->cluster->linear + 1 && stored.agent == agent && stored.lane == access.lane)
        stored.clock = clock.seen[agent];
    }
  }
  accesses.erase(kept, accesses.end());
}

namespace {

template <class What>
void join_at(What& what, const std::unordered_map<uint64_t, What>& released, uint64_t address) {
  const auto found = released.find(address);
  if (found != released.end()) what.join(found->second);
}

}  // namespace

void Warp::acquire_apart(Mask lanes) {
  if (acquired_epoch != epoch) {
    before = clock;
    acquirers = 0;
    met_epoch = epoch;
  }
  acquirers |= lanes;
  acquired_epoch = ++epoch;
}

void Launch::acquire(Warp& warp, Scope scope, uint64_t address, Mask lanes) {
  ordered = true;
  warp.acquire_apart(lanes);
  join_at(warp.clock, warp.cta->released, address);
  if (scope >= Scope::Cluster) join_at(warp.clock, warp.cta->cluster->released, address);
  if (scope < Scope::Gpu) return;
  join_at(warp.clock.acquired, released_, address);
  learn(warp);
}

void Launch::fence_acquire(Warp& warp, Scope scope, Mask lanes, bool sc) {
  const bool nothing =
      warp.to_acquire.seen.empty() && warp.to_acquire_in_cluster.seen.empty() && warp.to_acquire_on_gpu.empty();
  ordered = true;
  if (nothing && (!sc || warp.clock.observed.empty())) return;
  warp.acquire_apart(lanes);
  warp.clock.join(warp.to_acquire);
  if (scope >= Scope::Cluster) warp.clock.join(warp.to_acquire_in_cluster);
  if (scope < Scope::Gpu) return;
  warp.clock.acquired.join(sc ? warp.clock.observed : warp.to_acquire_on_gpu);
  learn(warp);
}

void Launch::fence_release(Warp& warp, Scope scope, Mask lanes, bool sc) {
  ordered = true;
  warp.fence_released.join(warp.clock);
  if (scope >= Scope::Cluster) warp.fence_released_in_cluster.join(warp.clock);
  if (scope >= Scope::Gpu) {
    release_stores(warp, lanes);
    tell(warp, warp.fence_released_on_gpu);
    if (sc) warp.clock.published.join(warp.fence_released_on_gpu);
  }
  tick(warp);
  warp.keep_back(lanes);
}

void Launch::proxy_fence(Warp& warp, bool shared, bool global) {
  warp.clock.fence_proxy(shared, global);
  tick(warp);
}

void Launch::relaxed_store(Warp& warp, Scope scope, uint64_t address) {
  if (scope >= Scope::Gpu && !warp.clock.published.empty()) released_[address].join(warp.clock.published);
  if (warp.fence_released.seen.empty()) return;
  warp.cta->released[address].join(warp.fence_released);
  if (scope >= Scope::Cluster) warp.cta->cluster->released[address].join(warp.fence_released_in_cluster);
  if (scope >= Scope::Gpu) released_[address].join(warp.fence_released_on_gpu);
}

void Launch::relaxed_load(Warp& warp, Scope scope, uint64_t address) {
  join_at(warp.to_acquire, warp.cta->released, address);
  if (scope >= Scope::Cluster) join_at(warp.to_acquire_in_cluster, warp.cta->cluster->released, address);
  if (scope >= Scope::Gpu) {
    join_at(warp.to_acquire_on_gpu, released_, address);
    join_at(warp.clock.observed, released_, address);
  }
}

}  // namespace ptx
