// Where an access goes and how it is ordered: state spaces, generic addresses, scopes, hints to caches.
#pragma once

#include "decode.h"

namespace ptx {

enum class Space : uint8_t { Generic, Global, Const, Shared, Cluster, Local, Parameter, Scratch };

// Takes a state space's word; Generic if there is none. `address` may name a variable, whose space it is then.
Space take_space(Words& words, const Operand& address);

// Takes a scope's word.
Scope need_scope(Words& words);

// Takes what caches are told, which changes no value, and says whether an operand with a policy follows.
bool take_cache_hints(Words& words);

// A place in memory, without the windows of generic addresses.
struct Place {
  Space space;  // Global, Shared, Local, Parameter or Scratch
  uint64_t address;
  Cta* cta;  // whose shared memory it is

  // One name for it in the launch: other clusters have the same addresses of shared memory.
  uint64_t name() const {
    if (space != Space::Shared) return address;
    constexpr int CLUSTER_SHIFT = 32;
    const uint64_t cluster = uint64_t(cta->cluster->linear & 0xffff) << CLUSTER_SHIFT;
    return SHARED_WINDOW | cluster | uint64_t(cta->rank) << RANK_SHIFT | address;
  }
};
Place place_of(const Step& step, int lane, Space space, uint64_t address);

// The elements of a vector operand; a scalar is a vector of one.
inline const Operand& element(const Operand& operand, int i) {
  return operand.is == Is::Vector ? operand.parts[i] : operand;
}
// Unknown unless it has `count` elements that `fits` agrees to.
template <class Fits>
void need_elements(const Words& words, const Operand& operand, int count, const char* what, Fits fits) {
  const int has = operand.is == Is::Vector ? int(operand.parts.size()) : 1;
  if (has != count) words.unknown(format("has an operand of %d elements, not %d", has, count));
  for (int i = 0; i < count; ++i)
    if (!fits(element(operand, i))) words.unknown(format("needs %s", what));
}

// The places of an operand in brackets, one a lane.
struct Places {
  Places(Step& step, const Operand& operand, Space space);
  Place at[LANES];
  const Place& operator[](int lane) const { return at[lane]; }
};

// Adds what an access of `bytes` a lane costs.
void count_access(Step& step, const Places& places, Mask lanes, uint32_t bytes);

// Calls `act` with each address at which lanes access one of `count` elements, and those lanes.
template <class Act>
void for_each_address(const Places& places, Mask lanes, int bytes, int count, Act act) {
  while (lanes) {
    const uint64_t address = places[__builtin_ctz(lanes)].name();
    Mask there = 0;
    FOR_LANES(lane, lanes) {
      if (places[lane].name() == address) there |= 1u << lane;
    }
    for (int i = 0; i < count; ++i) act(address + i * bytes, there);
    lanes &= ~there;
  }
}

// st.async and red.async, after those words (remote.cpp).
void decode_st_async(Words& words, Instr& instr);
void decode_red_async(Words& words, Instr& instr);

}  // namespace ptx
