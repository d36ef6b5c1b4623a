// The dense gradient of a table from a plan: two launches, no atomics, every row of the output written once.
//
// grad_reduce_kernel: blocks [0, reduce_blocks) each take `groups` neighbouring tiles of the sorted order and a chunk
//   of D; a group of threads walks one tile, a vector per thread, and adds in fp32 registers. A segment that lies in
//   its tile is written to the table; the ends of segments that cross tiles go to `partials`, at most two rows a
//   tile. Blocks from reduce_blocks on write zeros to the table's rows that have no segment.
// grad_finish_kernel: adds the partial sums of every segment that crosses tiles, tile by tile, and writes its row.
//
// The host cannot look into a plan without waiting for the device. A plan that was made for another table is therefore
// met here: rows that this one does not have are left out, and nothing is written out of bounds.
//
// Moves N*D + V*D elements and at most 2*2*N/tile*D partial sums: bound by memory.
#pragma once

#include "grad_shape.h"
#include "search.cuh"
#include "vector.cuh"

namespace embedkernels::cuda {

constexpr int kBlocksPerSm = 3;  // at most 80 registers: 8 rows in flight per thread without spilling one

// Stands for a row that the table does not have; no table has so many.
constexpr int kNoRow = 0x7fffffff;

// The segment that starts in a tile and goes on behind it.
struct Tail {
  int row;        // of the table; -1: there is none
  int last_tile;  // where the segment ends
};

// The plan, as embedding_plan returns it.
struct PlanView {
  const int* order;
  const int* segment_ids;
  const int* segment_offsets;
  const int* count;
};

struct ReduceShared {
  int source[kMaxPositions];   // row of grad_rows at this position
  int ends_row[kMaxPositions];  // the table's row (or kNoRow) whose segment ends at this position, or -1
  Tail tails[kMaxGroups];
};

template <class T, int V>
EK_DEVICE void reduce_tiles(const T* grad_rows, const PlanView& plan, T* out, Accumulator<T>* partials, Tail* tails,
                            const GradShape& shape, int64_t block, ReduceShared& shared) {
  using Acc = Accumulator<T>;
  constexpr int kUnroll = 8;  // rows in flight per thread
  const int64_t first_tile = block / shape.chunks * shape.groups;
  const int64_t chunk = block % shape.chunks;
  const int64_t first = first_tile * shape.tile;  // sorted position
  const int segments = *plan.count;
  const int64_t kept = segments > 0 ? plan.segment_offsets[segments] : 0;
  const int64_t left = kept - first;
  const int block_positions = shape.groups * shape.tile;
  const int positions = int(left < 0 ? 0 : left < block_positions ? left : block_positions);

  for (int i = threadIdx.x; i < positions; i += kThreads) {
    shared.source[i] = plan.order[first + i];
    shared.ends_row[i] = -1;
  }
  for (int g = threadIdx.x; g < shape.groups; g += kThreads) shared.tails[g] = {-1, -1};
  __syncthreads();

  bool open = false;  // does a segment from the block before go on here?
  if (positions > 0) {
    const int first_segment = block_count_below(plan.segment_offsets, segments, first + 1) - 1;
    open = plan.segment_offsets[first_segment] < first;
    for (int i = threadIdx.x; i < positions && i < segments - first_segment; i += kThreads) {
      const int segment = first_segment + i;
      const int64_t begin = plan.segment_offsets[segment] - first, end = plan.segment_offsets[segment + 1] - first;
      if (begin >= positions) break;
      const int listed = plan.segment_ids[segment];
      const int row = listed >= 0 && listed < shape.num_rows ? listed : kNoRow;
      if (end > 0 && end <= positions) shared.ends_row[end - 1] = row;
      if (row != kNoRow && begin >= 0 && begin / shape.tile != (end - 1) / shape.tile) {
        shared.tails[begin / shape.tile] = {row, int((first + end - 1) / shape.tile)};
      }
    }
  }
  __syncthreads();

  const int group = threadIdx.x / shape.lanes;
  const int64_t vector = chunk * shape.lanes + threadIdx.x % shape.lanes;
  const int64_t tile = first_tile + group;
  if (group >= shape.groups || tile >= shape.tiles) return;
  if (chunk == 0 && threadIdx.x % shape.lanes == 0) tails[tile] = shared.tails[group];
  const int begin = group * shape.tile;
  const int size = positions - begin < shape.tile ? positions - begin : shape.tile;
  if (size <= 0 || vector >= shape.vectors) return;

  if (begin > 0) open = shared.ends_row[begin - 1] < 0;
  const int64_t column = vector * V;
  Acc* const partial = partials + 2 * tile * shape.width + column;
  Acc sum[V];
  clear(sum);
  for (int base = 0; base < size; base += kUnroll) {
    Packed<T, V> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u < size) {
        loaded[u] = load<T, V>(grad_rows + int64_t(shared.source[begin + base + u]) * shape.width + column);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u < size) {
        add<T, V>(sum, loaded[u]);
        const int row = shared.ends_row[begin + base + u];
        if (row >= 0) {
          if (open) {
            store_partial<Acc, V>(partial, sum);
          } else if (row != kNoRow) {
            store_sum<T, V>(out + int64_t(row) * shape.width + column, sum);
          }
          open = false;
          clear(sum);
        }
      }
    }
  }
  // What is left goes on in the next tile: in the first slot if it also came from the tile before, else in the second.
  if (shared.ends_row[begin + size - 1] < 0) store_partial<Acc, V>(open ? partial : partial + shape.width, sum);
}

struct ZeroShared {
  int taken[kMaxZeroRows];
};

template <class T, int V>
EK_DEVICE void zero_rows(const PlanView& plan, T* out, const GradShape& shape, int64_t block, ZeroShared& shared) {
  const int64_t first = block * shape.zero_rows;
  const int rows = int(shape.num_rows - first < shape.zero_rows ? shape.num_rows - first : shape.zero_rows);
  const int segments = *plan.count;
  for (int r = threadIdx.x; r < rows; r += kThreads) shared.taken[r] = 0;
  __syncthreads();
  const int first_segment = block_count_below(plan.segment_ids, segments, first);
  for (int i = threadIdx.x; i < rows && i < segments - first_segment; i += kThreads) {
    const int64_t row = plan.segment_ids[first_segment + i] - first;
    if (row >= 0 && row < rows) shared.taken[row] = 1;
  }
  __syncthreads();

  // Here a group of threads takes a row, and its threads the row's vectors in turn.
  const int lanes = shape.lanes, groups = kThreads / lanes;
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  if (group >= groups) return;
  Accumulator<T> zero[V];
  clear(zero);
  for (int r = group; r < rows; r += groups) {
    if (shared.taken[r]) continue;
    T* const row = out + (first + r) * shape.width;
    for (int64_t vector = lane; vector < shape.vectors; vector += lanes) store_sum<T, V>(row + vector * V, zero);
  }
}

union GradShared {
  ReduceShared reduce;
  ZeroShared zero;
};

// Grid: reduce_blocks + zero_blocks.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    grad_reduce_kernel(const T* grad_rows, PlanView plan, T* out, Accumulator<T>* partials, Tail* tails,
                       GradShape shape) {
  EK_SHARED(GradShared, shared);
  const int64_t block = blockIdx.x;
  if (block < shape.reduce_blocks) {
    reduce_tiles<T, V>(grad_rows, plan, out, partials, tails, shape, block, shared.reduce);
  } else {
    zero_rows<T, V>(plan, out, shape, block - shape.reduce_blocks, shared.zero);
  }
}

// Partial sums of a segment are numbered from the tile where it starts: the second slot of that tile, then the first
// slot of each tile after it.
template <class Acc, int V>
EK_DEVICE void add_partials(Acc (&sum)[V], const Acc* partials, int64_t width, int64_t tile, int from, int to) {
  constexpr int kUnroll = 4;
  for (int base = from; base < to; base += kUnroll) {
    Packed<Acc, V> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = base + u;
      if (k < to) loaded[u] = load<Acc, V>(partials + (k == 0 ? 2 * tile + 1 : 2 * (tile + k)) * width);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u < to) add<Acc, V>(sum, loaded[u]);
    }
  }
}

template <class Acc, int V>
struct FinishShared {
  Tail tails[kWarps];
  Acc sums[kWarps][kWarp][V];
};

constexpr int kLongSpan = 32;  // partial sums that one warp adds alone

// Grid: finish_blocks, eight neighbouring tiles and 32 vectors of D each. A warp takes the segment that starts in its
// tile; one over many tiles is shared by the eight warps, an equal stretch each, and their sums are added in order.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    grad_finish_kernel(const Accumulator<T>* partials, const Tail* tails, T* out, GradShape shape) {
  using Acc = Accumulator<T>;
  using Shared = FinishShared<Acc, V>;
  EK_SHARED(Shared, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first_tile = int64_t(blockIdx.x) / shape.finish_chunks * kWarps;
  const int64_t column = (int64_t(blockIdx.x) % shape.finish_chunks * kWarp + lane) * V;
  const bool active = column < shape.width;
  if (lane == 0) shared.tails[warp] = first_tile + warp < shape.tiles ? tails[first_tile + warp] : Tail{-1, -1};
  __syncthreads();

  for (int w = 0; w < kWarps; ++w) {
    const Tail tail = shared.tails[w];
    if (tail.row < 0) continue;
    const int64_t tile = first_tile + w;
    const int span = int(tail.last_tile - tile) + 1;
    T* const target = out + int64_t(tail.row) * shape.width + column;
    Acc sum[V];
    clear(sum);
    if (span <= kLongSpan) {
      if (w == warp && active) {
        add_partials<Acc, V>(sum, partials + column, shape.width, tile, 0, span);
        store_sum<T, V>(target, sum);
      }
      continue;
    }
    const int part = (span + kWarps - 1) / kWarps;
    const int from = warp * part < span ? warp * part : span;
    const int to = from + part < span ? from + part : span;
    if (active) add_partials<Acc, V>(sum, partials + column, shape.width, tile, from, to);
#pragma unroll
    for (int i = 0; i < V; ++i) shared.sums[warp][lane][i] = sum[i];
    __syncthreads();
    // No barrier before the next round: a second segment this long cannot start among the same tiles.
    static_assert(kLongSpan >= kWarps);
    if (warp == 0 && active) {
      clear(sum);
      for (int other = 0; other < kWarps; ++other) {
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] += shared.sums[other][lane][i];
      }
      store_sum<T, V>(target, sum);
    }
  }
}

}  // namespace embedkernels::cuda
