// How the dense gradient is cut into tiles and blocks: a function of N, V, D and the vector width alone, so that the
// order of the additions, and with it every bit of the result, depends on nothing else.
#pragma once

#include <cstdint>

#include "portable.cuh"

namespace embedkernels::cuda {

constexpr int kMaxPositions = 2048;   // sorted positions of one block
constexpr int kMaxGroups = 128;       // tiles of one block
constexpr int kMaxZeroRows = 256;     // table rows of one block
constexpr int kZeroBytes = 32 << 10;  // table bytes of one block
constexpr int kWarps = kThreads / kWarp;

struct GradShape {
  int64_t width;     // D
  int64_t num_rows;  // V
  int64_t vectors;   // of one row
  int tile;          // sorted positions summed by one group of threads
  int lanes;         // threads of a group, one vector each
  int groups;        // tiles of one block
  int chunks;        // blocks side by side along D
  int64_t tiles;
  int64_t reduce_blocks;
  int zero_rows;  // table rows of one zero-filling block
  int64_t zero_blocks;
  int finish_chunks;  // blocks side by side along D when partial sums are added up
  int64_t finish_blocks;
};

// `vector` elements are moved at once in the table's dtype, `partial_vector` in the accumulator's.
inline GradShape grad_shape(int64_t n, int64_t num_rows, int64_t width, int element_size, int vector,
                            int partial_vector) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  GradShape shape{};
  shape.width = width;
  shape.num_rows = num_rows;
  shape.vectors = width / vector;
  // Short tiles where there are few of them: a small batch must still fill the device. Long ones keep the partial
  // sums, two rows a tile, small: N * D / 8 bytes from 64k ids on.
  shape.tile = n <= 8192 ? 16 : n <= 65536 ? 32 : n <= (1 << 20) ? 64 : 128;
  const int64_t chunks = ceil_div(shape.vectors, 128);
  const int64_t lanes = ceil_div(shape.vectors, chunks);
  int64_t groups = kThreads / lanes;
  if (groups > kMaxPositions / shape.tile) groups = kMaxPositions / shape.tile;
  if (groups > kMaxGroups) groups = kMaxGroups;
  shape.chunks = int(chunks);
  shape.lanes = int(lanes);
  shape.groups = int(groups);
  shape.tiles = ceil_div(n, shape.tile);
  shape.reduce_blocks = ceil_div(shape.tiles, groups) * chunks;
  const int64_t rows = kZeroBytes / (width * element_size);
  shape.zero_rows = int(rows < 1 ? 1 : rows > kMaxZeroRows ? kMaxZeroRows : rows);
  shape.zero_blocks = ceil_div(num_rows, shape.zero_rows);
  shape.finish_chunks = int(ceil_div(width / partial_vector, kWarp));
  shape.finish_blocks = ceil_div(shape.tiles, kWarps) * shape.finish_chunks;
  return shape;
}

}  // namespace embedkernels::cuda
