// Where the matrices of a wgmma lie in shared memory.
#pragma once

#include <algorithm>
#include <vector>

#include "machine.h"

namespace ptx {

constexpr uint32_t CHUNK = 16;  // bytes: the unit of descriptors and swizzles

// PTX ISA, "Matrix Descriptor Format" of wgmma.
struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t base;                    // where in its eight rows of 128 bytes a swizzle's pattern starts
  uint32_t swizzle;                 // bytes of a row within which chunks change places; 16: none

  explicit Descriptor(uint64_t bits) {
    const auto bytes = [&](int from) { return uint32_t(bits >> from & 0x3fff) * CHUNK; };
    if (bits & 0x3ff1c000c000c000)
      throw Fault(format("has a descriptor, %#llx, with bits that must be zero", (unsigned long long)bits));
    start = bytes(0);
    leading = bytes(16);
    stride = bytes(32);
    base = bits >> 49 & 7;
    swizzle = (bits >> 62) == 0 ? CHUNK : 256 >> (bits >> 62);
  }

  // Swizzles exchange chunks of absolute addresses: of 128 bytes, bits 4 to 6 are changed by bits 7 to 9; of
  // 64 and 32 bytes, fewer of them.
  uint32_t swizzled(uint32_t address) const {
    return address ^ (((address >> 7) - base) & (swizzle / CHUNK - 1)) << 4;
  }
};

// Where a matrix lies: its chunks, and the ranges that they make.
struct Tile {
  // K-major: chunk c of row r is at [r][c], neighbours in a chunk lie along k. MN-major: chunk c of column k
  // is at [k][c], and neighbours lie along m or n.
  std::vector<uint32_t> chunks;
  int per_line = 0;
  struct Range {
    uint32_t offset, bytes;
  };
  std::vector<Range> ranges;
};

// PTX ISA, "Strides" and "Canonical Layouts" of wgmma. `length`: of M or N; lines of K take 32 bytes.
inline Tile tile_of(const Descriptor& at, int length, int k, bool mn_major) {
  Tile tile;
  const bool plain = at.swizzle == CHUNK;
  if (!mn_major) {
    // Eight rows make a pattern; `stride` leads to the next eight. Without a swizzle `leading` leads to the
    // second chunk of each row, with one it follows the first and `leading` has no meaning.
    tile.per_line = 2;
    const uint32_t next = plain ? at.leading : CHUNK;
    for (int row = 0; row < length; ++row)
      for (int chunk = 0; chunk < tile.per_line; ++chunk)
        tile.chunks.push_back(at.swizzled(at.start + row / 8 * at.stride + row % 8 * at.swizzle + chunk * next));
  } else {
    // Eight columns of k make a pattern, each of as many chunks along m or n as the swizzle has. Beyond those
    // `leading` leads on, and `stride` to the next eight columns; without a swizzle it's the other way round.
    tile.per_line = length / 8;
    const int wide = at.swizzle / CHUNK;
    const uint32_t along = plain ? at.stride : at.leading, across = plain ? at.leading : at.stride;
    for (int column = 0; column < k; ++column)
      for (int chunk = 0; chunk < tile.per_line; ++chunk)
        tile.chunks.push_back(at.swizzled(
            at.start + column / 8 * across + column % 8 * at.swizzle + chunk / wide * along +
            chunk % wide * CHUNK));
  }
  std::vector<uint32_t> sorted = tile.chunks;
  std::sort(sorted.begin(), sorted.end());
  for (uint32_t chunk : sorted) {
    auto& ranges = tile.ranges;
    if (!ranges.empty() && ranges.back().offset + ranges.back().bytes == chunk) ranges.back().bytes += CHUNK;
    else if (ranges.empty() || ranges.back().offset + ranges.back().bytes < chunk)
      ranges.push_back({chunk, CHUNK});
  }
  return tile;
}

}  // namespace ptx
