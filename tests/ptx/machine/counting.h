// What an access of a warp costs, counted: sectors of global memory, passes over the banks of shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "machine.h"

namespace ptx {

// Sectors of 32 bytes that the active lanes touch, each counted once. `addresses` has one a lane.
inline uint64_t sectors(const uint64_t* addresses, Mask active, int bytes) {
  uint64_t touched[2 * LANES];
  int n = 0;
  bool ascending = true;
  FOR_LANES(lane, active) {
    const uint64_t last = (addresses[lane] + bytes - 1) / 32;
    for (uint64_t sector = addresses[lane] / 32; sector <= last; ++sector) {
      if (n && touched[n - 1] == sector) continue;
      ascending &= n == 0 || touched[n - 1] < sector;
      touched[n++] = sector;
    }
  }
  if (ascending) return n;
  std::sort(touched, touched + n);
  return std::unique(touched, touched + n) - touched;
}

// Passes over the 32 banks of 4 bytes: as many as the fullest bank has distinct words. Accesses of 8 bytes
// are done in half warps, those of 16 in quarter warps. `offsets` in shared memory, one a lane.
inline uint64_t wavefronts(const uint32_t* offsets, Mask active, int bytes) {
  constexpr int BANKS = 32;
  const int lanes = bytes <= 4 ? LANES : std::max(1, 128 / bytes);
  uint64_t passes = 0;
  for (int first = 0; first < LANES; first += lanes) {
    const Mask group = active & (lanes == LANES ? ALL : ((1u << lanes) - 1) << first);
    if (!group) continue;
    uint32_t words[BANKS][LANES];
    int full[BANKS] = {};
    int fullest = 0;
    FOR_LANES(lane, group) {
      const uint32_t last = (offsets[lane] + bytes - 1) / 4;
      for (uint32_t word = offsets[lane] / 4; word <= last; ++word) {
        uint32_t* in_bank = words[word % BANKS];
        int& n = full[word % BANKS];
        if (std::find(in_bank, in_bank + n, word) != in_bank + n) continue;
        in_bank[n++] = word;
        fullest = std::max(fullest, n);
      }
    }
    passes += fullest;
  }
  return passes;
}

}  // namespace ptx
