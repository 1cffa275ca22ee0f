// The order in which the tiles of a GEMM start.
#pragma once

namespace lorafast::cuda {

struct TilePlace {
  int row, column;  // in tiles
};

// Where tile `number` lies, of `down` x `across`. Tiles come in groups of so many row blocks, from the first column to
// the last: those which run together share rows of x and W in the L2 cache.
__device__ __forceinline__ TilePlace tile_at(int number, int down, int across, int group) {
  const int size = group * across, first = number / size * group, inside = number % size;
  const int rows = min(down - first, group);
  return {first + inside % rows, inside / rows};
}

}  // namespace lorafast::cuda
