// How a gradient is cut into tiles, strips and blocks. Tiles and strips follow from N alone, and with them the order of
// the additions and every bit of the result; the rest only says which thread does what.
#pragma once

#include <cstdint>

#include "../grad_mode.h"
#include "portable.cuh"

namespace embedkernels::cuda {

constexpr int kStripTiles = 8;        // tiles whose ends are added up in shared memory
constexpr int kShortTile = 16;        // positions of a tile
constexpr int kLongTile = 32;
constexpr int64_t kShortTiles = 16384;  // up to so many ids, tiles are short
constexpr int kMaxPositions = 1024;   // sorted positions of one block
constexpr int kMaxTiles = kMaxPositions / kShortTile;
constexpr int kMaxStrips = kMaxTiles / kStripTiles;
constexpr int kMaxZeroRows = 256;     // output rows of one block
constexpr int kZeroBytes = 32 << 10;  // output bytes of one block
constexpr int kFinishLanes = 8;       // threads of a group that adds partial sums
constexpr int kFinishStrips = kThreads / kFinishLanes;  // strips of one finishing block

struct GradShape {
  int64_t n;         // positions of the plan
  int64_t width;     // D
  int64_t vectors;   // of one row
  int tile;          // sorted positions summed by one group of threads
  int lanes;         // threads of a group, one vector each; a power of two, at most a warp
  int block_strips;  // strips of one block
  int chunks;        // blocks side by side along D
  int64_t strips;
  int64_t reduce_blocks;
  int zero_lanes;  // threads that clear a row together
  int zero_rows;   // output rows of one block that clears rows
  int64_t zero_blocks;
  int finish_chunks;  // blocks side by side along D when partial sums are added up
  int64_t finish_blocks;
};

// Elements that are moved at once.
struct GradVectors {
  int rows;     // of the gradient rows, and of an output row at the end of a segment
  int zeros;    // of an output row without a segment
  int partial;  // of a partial sum
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads for a row of `vectors` vectors: as many as leave few of them idle, but no fewer than fill a line of 128 bytes.
inline int row_lanes(int64_t vectors) {
  int lanes = kWarp;
  const auto idle = [&] { return ceil_div(vectors, lanes) * lanes - vectors; };
  while (lanes > 8 && 8 * idle() > vectors) lanes /= 2;
  while (lanes / 2 >= vectors) lanes /= 2;
  return lanes;
}

inline GradShape grad_shape(int64_t n, int64_t out_rows, int64_t width, GradMode mode, int out_element_size,
                            GradVectors moved) {
  GradShape shape{};
  shape.n = n;
  shape.width = width;
  shape.vectors = width / moved.rows;
  // Short tiles where there are few of them: a small batch must still fill the device. Long ones halve the partial
  // sums, two rows a strip: N * D / 16 bytes in fp32, N * D / 32 beyond kShortTiles.
  shape.tile = n <= kShortTiles ? kShortTile : kLongTile;
  const int strip = kStripTiles * shape.tile;
  shape.lanes = row_lanes(shape.vectors);
  const int fitting = kThreads / (kStripTiles * shape.lanes);
  shape.block_strips = fitting < kMaxPositions / strip ? fitting : kMaxPositions / strip;
  shape.chunks = int(ceil_div(shape.vectors, shape.lanes));
  shape.strips = ceil_div(n, strip);
  shape.reduce_blocks = ceil_div(shape.strips, shape.block_strips) * shape.chunks;
  if (mode == GradMode::kDense || mode == GradMode::kPaddedRows) {
    const int64_t rows = kZeroBytes / (width * out_element_size);
    shape.zero_lanes = row_lanes(width / moved.zeros);
    shape.zero_rows = int(rows < 1 ? 1 : rows > kMaxZeroRows ? kMaxZeroRows : rows);
    shape.zero_blocks = ceil_div(out_rows, shape.zero_rows);
  }
  shape.finish_chunks = int(ceil_div(width / moved.partial, kFinishLanes));
  shape.finish_blocks = ceil_div(shape.strips, kFinishStrips) * shape.finish_chunks;
  return shape;
}

}  // namespace embedkernels::cuda
