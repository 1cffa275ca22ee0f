#include "access.h"

#include "counting.h"

namespace ptx {

// PTX ISA, "State Spaces"; .shared is .shared::cta, .param is ::entry or ::func as the variable says.
Space take_space(Words& words, const Operand& address) {
  const int word = words.take_one(
      {"global", "const", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry",
       "param::func"});
  constexpr Space SPACES[] = {Space::Global, Space::Const,     Space::Shared,    Space::Shared, Space::Cluster,
                              Space::Local,  Space::Parameter, Space::Parameter, Space::Scratch};
  const Space named = word < 0 ? Space::Generic : SPACES[word];
  if (address.is != Is::Address) words.unknown("needs an address in brackets");
  Space own = named;
  switch (address.parts[0].is) {
    case Is::Shared: own = named == Space::Cluster ? named : Space::Shared; break;
    case Is::Local: own = Space::Local; break;
    case Is::Parameter: own = Space::Parameter; break;
    case Is::Scratch: own = Space::Scratch; break;
    default: break;
  }
  const bool parameters =
      (named == Space::Parameter || named == Space::Scratch) && (own == Space::Parameter || own == Space::Scratch);
  if (named != Space::Generic && named != own && !parameters) words.unknown("names a variable of another space");
  return own;
}

// PTX ISA, "Memory Consistency Model": Scope
Scope need_scope(Words& words) {
  constexpr Scope SCOPES[] = {Scope::Cta, Scope::Cluster, Scope::Gpu, Scope::System};
  return SCOPES[words.need_one({"cta", "cluster", "gpu", "sys"})];
}

// PTX ISA, "Cache Operators", "Cache Eviction Priority Hints": performance alone.
bool take_cache_hints(Words& words) {
  words.take_one(
      {"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate"});
  words.take_one({"L2::evict_normal", "L2::evict_first", "L2::evict_last"});
  words.take_one({"L2::64B", "L2::128B", "L2::256B"});
  return words.take("L2::cache_hint");
}

// PTX ISA, "Generic Addressing"
Place place_of(const Step& step, int lane, Space space, uint64_t address) {
  switch (space) {
    case Space::Generic:
      switch (address & WINDOW) {
        case SHARED_WINDOW: return place_of(step, lane, Space::Cluster, address & ~WINDOW);
        case LOCAL_WINDOW: return {Space::Local, address & ~WINDOW, nullptr};
        case PARAMETER_WINDOW: return {Space::Parameter, address & ~WINDOW, nullptr};
        default: return {Space::Global, address, nullptr};
      }
    case Space::Global:
    case Space::Const:
      // The window of parameters lies in that of .global.
      if ((address & WINDOW) == PARAMETER_WINDOW) return {Space::Parameter, address & ~WINDOW, nullptr};
      return {Space::Global, address, nullptr};
    case Space::Shared:
    case Space::Cluster: {
      Cta& cta = step.shared_cta(address, lane, space == Space::Shared);
      return {Space::Shared, Step::shared_offset(address), &cta};
    }
    default: return {space, address, nullptr};
  }
}

Places::Places(Step& step, const Operand& operand, Space space) {
  const Source base = step.address_base(operand);
  FOR_LANES(lane, step.active) at[lane] = place_of(step, lane, space, step.address(operand, base, lane));
}

void count_access(Step& step, const Places& places, Mask lanes, uint32_t bytes) {
  uint64_t addresses[LANES];
  uint32_t offsets[LANES];
  Mask global = 0, shared = 0;
  FOR_LANES(lane, lanes) {
    if (places[lane].space == Space::Global) {
      addresses[lane] = places[lane].address;
      global |= 1u << lane;
    } else if (places[lane].space == Space::Shared) {
      offsets[lane] = uint32_t(places[lane].address);
      shared |= 1u << lane;
    }
  }
  step.count.bytes += uint64_t(__builtin_popcount(lanes)) * bytes;
  if (global) step.count.sectors += sectors(addresses, global, bytes);
  if (shared) step.count.wavefronts += wavefronts(offsets, shared, bytes);
}

}  // namespace ptx
