// The gradient of a table from a plan: two launches, no atomics, every row of the output written once.
//
// grad_reduce_kernel: blocks [0, reduce_blocks) each take neighbouring strips of the sorted order and a chunk of D. A
//   strip is eight tiles; a group of threads walks one tile, a vector per thread, and adds in fp32 registers. A segment
//   that lies in its tile is written out at once. One that crosses tiles of a strip is added up in shared memory, tile
//   by tile, by the group where it starts. The ends of segments that cross strips go to `partials`, at most two rows a
//   strip. Blocks from reduce_blocks on write zeros to the rows that have no segment, where the mode asks for it.
// grad_finish_kernel: adds the partial sums of every segment that crosses strips, strip by strip, and writes its row.
//
// The mode, sources, weights and scales are looked at when a block starts and where a segment ends, never per element;
// without weights the factor is 1, which is exact.
//
// The host cannot look into a plan without waiting for the device. A plan that was made for another table is therefore
// met here: positions and sources that do not exist add nothing, rows that the output does not have are left out.
//
// Bound by memory. In elements, with U segments: N*D + V*D (dense), N*D + 2*U*D (accumulate), N*D + U*D (rows), and
// at most 2 * 2*N/128*D partial sums, written and read.
#pragma once

#include <type_traits>

#include "grad_shape.h"
#include "search.cuh"
#include "vector.cuh"

namespace embedkernels::cuda {

constexpr int kBlocksPerSm = 3;  // at most 80 registers: 8 rows in flight per thread without spilling one

// Stands for a row that the output does not have; no output has so many.
constexpr int kNoRow = 0x7fffffff;

// The plan, as embedding_plan returns it.
struct PlanView {
  const int* order;
  const int* segment_ids;
  const int* segment_offsets;
  const int* count;
};

// The rows that are added up.
template <class T>
struct GradRows {
  const T* data;
  int64_t count;
  int64_t stride;                 // elements from one to the next, 0 where they are all the same
  const int* sources;             // row of every position, or null: its own
  const Accumulator<T>* weights;  // factor of every position, or null: 1
};

template <class O>
struct GradOutput {
  Stored<O>* data;
  int64_t rows;
  GradMode mode;
  bool scale_by_freq;
  const int64_t* seed;  // for StochasticBf16
};

// The segment that starts in a strip and goes on behind it.
struct Tail {
  int row;         // of the output; -1: there is none
  int last_strip;  // where the segment ends
  int divisor;     // of the sum
};

template <class Acc>
struct GradWorkspace {
  Acc* partials;  // (strips, 2, D): the end of a segment from before, the start of one that goes on
  Tail* tails;    // (strips)
};

// Writes the sum of a segment, times its scale, to its row. `old` is what the row held, where sums are added to it.
template <class O, int V>
EK_DEVICE void write_sum(const GradOutput<O>& out, int row, int64_t width, int64_t column,
                         Accumulator<Stored<O>> (&sum)[V], Accumulator<Stored<O>> factor,
                         const Packed<Stored<O>, V>* old) {
  scale(sum, factor);
  if (old != nullptr) add<Stored<O>, V>(sum, *old);
  Stored<O>* const target = out.data + int64_t(row) * width + column;
  if constexpr (std::is_same_v<O, StochasticBf16>) {
    store<bf16, V>(target, pack_stochastic<V>(sum, uint64_t(*out.seed), row, column));
  } else {
    store<O, V>(target, pack<O, V>(sum));
  }
}

// The same, and reads what the row holds.
template <class O, int V>
EK_DEVICE void finish_sum(const GradOutput<O>& out, int row, int64_t width, int64_t column,
                          Accumulator<Stored<O>> (&sum)[V], Accumulator<Stored<O>> factor) {
  if (std::is_same_v<O, StochasticBf16> || out.mode == GradMode::kAccumulate) {
    const Packed<Stored<O>, V> old = load<Stored<O>, V>(out.data + int64_t(row) * width + column);
    write_sum<O, V>(out, row, width, column, sum, factor, &old);
  } else {
    write_sum<O, V>(out, row, width, column, sum, factor, nullptr);
  }
}

template <class Acc, int V>
struct ReduceShared {
  // Sums up to the first end of a segment in a tile, where the segment comes from the tile before.
  Packed<Acc, kPiece<Acc, V>> heads[V / kPiece<Acc, V>][kThreads];
  Acc weight[kMaxPositions];
  Acc factor[kMaxPositions];   // of the segment that ends at this position
  int source[kMaxPositions];   // row of the gradient at this position, or -1
  int ends_row[kMaxPositions];  // the output's row (or kNoRow) whose segment ends at this position, or -1
  int head_end[kMaxTiles];     // the position where the tile's head ends, or -1: not in this tile
  Tail tails[kMaxStrips];
};

// This thread's part of its tile's head.
template <class Acc, int V>
EK_DEVICE void put_head(ReduceShared<Acc, V>& shared, const Acc (&sum)[V]) {
#pragma unroll
  for (int i = 0; i < V; i += kPiece<Acc, V>) {
    memcpy(&shared.heads[i / kPiece<Acc, V>][threadIdx.x], sum + i, sizeof(shared.heads[0][0]));
  }
}

template <class Acc, int V>
EK_DEVICE void add_head(Acc (&sum)[V], const ReduceShared<Acc, V>& shared, int thread) {
  Acc head[V];
#pragma unroll
  for (int i = 0; i < V; i += kPiece<Acc, V>) {
    memcpy(head + i, &shared.heads[i / kPiece<Acc, V>][thread], sizeof(shared.heads[0][0]));
  }
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] += head[i];
}

// Fills `shared` but for the heads. Returns whether a segment from the block before goes on in this one.
template <class T, class O, int V>
EK_DEVICE bool read_plan(const GradRows<T>& rows, const PlanView& plan, const GradOutput<O>& out,
                         const GradShape& shape, int64_t first_strip, int& positions,
                         ReduceShared<Accumulator<T>, V>& shared) {
  using Acc = Accumulator<T>;
  const unsigned strip = kStripTiles * shape.tile;
  const int capacity = shape.block_strips * strip;
  const int64_t first = first_strip * strip;
  const int64_t listed = *plan.count;
  const int segments = int(listed < 0 ? 0 : listed < shape.n ? listed : shape.n);
  const int64_t end_of_all = segments > 0 ? plan.segment_offsets[segments] : 0;
  const int64_t kept = end_of_all < shape.n ? end_of_all : shape.n;
  const int64_t left = kept - first;
  positions = int(left < 0 ? 0 : left < capacity ? left : capacity);

  for (int i = threadIdx.x; i < capacity; i += kThreads) {
    int source = -1;
    Acc weight = 0;
    if (i < positions) {
      const int position = plan.order[first + i];
      if (position >= 0 && position < shape.n) {
        const int row = rows.sources ? rows.sources[position] : position;
        if (row >= 0 && row < rows.count) {
          source = row;
          weight = rows.weights ? rows.weights[position] : Acc(1);
        }
      }
    }
    shared.source[i] = source;
    shared.weight[i] = weight;
    shared.ends_row[i] = -1;
  }
  if (int(threadIdx.x) < kMaxTiles) shared.head_end[threadIdx.x] = -1;
  if (int(threadIdx.x) < kMaxStrips) shared.tails[threadIdx.x] = {-1, -1, 1};
  __syncthreads();

  bool open = false;
  if (positions > 0) {
    const int below = block_count_below(plan.segment_offsets, segments, first + 1);
    const int first_segment = below > 0 ? below - 1 : 0;
    open = plan.segment_offsets[first_segment] < first;
    for (int i = threadIdx.x; i < positions && i < segments - first_segment; i += kThreads) {
      const int segment = first_segment + i;
      const int64_t from = plan.segment_offsets[segment], to = plan.segment_offsets[segment + 1];
      const int64_t begin = from - first, end = (to < kept ? to : kept) - first;
      if (begin >= positions) break;
      const bool by_segment = out.mode == GradMode::kRows || out.mode == GradMode::kPaddedRows;
      const int wanted = by_segment ? segment : plan.segment_ids[segment];
      const int row = wanted >= 0 && wanted < out.rows ? wanted : kNoRow;
      const int divisor = out.scale_by_freq ? int(to - from) : 1;
      if (end > 0 && end <= positions) {
        shared.ends_row[end - 1] = row;
        shared.factor[end - 1] = Acc(1) / Acc(divisor);
      }
      if (row == kNoRow || begin < 0 || end <= begin) continue;
      const unsigned starts_in = unsigned(begin) / strip, ends_in = unsigned(end - 1) / strip;
      if (starts_in != ends_in) shared.tails[starts_in] = {row, int(first_strip + ends_in), divisor};
    }
  }
  __syncthreads();
  return open;
}

// What a thread knows of its tile.
struct TilePlace {
  int begin;       // first position, in the block
  int size;        // positions
  bool in_strip;   // whether tiles of the same strip come before
  int64_t column;  // first of this thread's vector
};

// Adds the rows of a tile and writes what ends in it. `open`: a segment from the tile before goes on here; false once
// it has ended. What is left in `sum` belongs to a segment that goes on in the next tile.
template <bool kAccumulate, class T, class O, int V>
EK_DEVICE void walk_tile(const GradRows<T>& rows, const GradOutput<O>& out, const GradShape& shape,
                         const TilePlace& place, Accumulator<T>* head_partial, bool& open, Accumulator<T> (&sum)[V],
                         ReduceShared<Accumulator<T>, V>& shared) {
  using Acc = Accumulator<T>;
  using S = Stored<O>;
  // Rows in flight per thread. With the old rows beside them half as many fill the registers.
  constexpr int kUnroll = kAccumulate ? 4 : 8;
  static_assert(kShortTile % kUnroll == 0 && kLongTile % kUnroll == 0);
  for (int base = 0; base < place.size; base += kUnroll) {
    const int at = place.begin + base;
    Packed<T, V> loaded[kUnroll];
    Packed<S, V> old[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int source = shared.source[at + u];
      loaded[u] = {};
      if (source >= 0) loaded[u] = load<T, V>(rows.data + source * rows.stride + place.column);
    }
    if constexpr (kAccumulate) {
      bool skipped = open;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int row = shared.ends_row[at + u];
        if (row >= 0) {
          if (!skipped && row != kNoRow) old[u] = load<S, V>(out.data + int64_t(row) * shape.width + place.column);
          skipped = false;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      add_weighted<T, V>(sum, loaded[u], shared.weight[at + u]);
      const int row = shared.ends_row[at + u];
      if (row < 0) continue;
      if (!open) {
        if (row != kNoRow) {
          write_sum<O, V>(out, row, shape.width, place.column, sum, shared.factor[at + u],
                          kAccumulate ? &old[u] : nullptr);
        }
      } else if (place.in_strip) {
        put_head<Acc, V>(shared, sum);
        if (threadIdx.x % shape.lanes == 0) shared.head_end[place.begin / shape.tile] = at + u;
      } else {
        store_partial<Acc, V>(head_partial, sum);
      }
      open = false;
      clear(sum);
    }
  }
}

template <class T, class O, int V>
EK_DEVICE void reduce_strips(const GradRows<T>& rows, const PlanView& plan, const GradOutput<O>& out,
                             const GradWorkspace<Accumulator<T>>& workspace, const GradShape& shape, unsigned block,
                             ReduceShared<Accumulator<T>, V>& shared) {
  using Acc = Accumulator<T>;
  const int64_t first_strip = int64_t(block / shape.chunks) * shape.block_strips;
  const int chunk = int(block % shape.chunks);
  int positions;
  bool open = read_plan<T, O, V>(rows, plan, out, shape, first_strip, positions, shared);

  if (chunk == 0 && int(threadIdx.x) < shape.block_strips && first_strip + threadIdx.x < shape.strips) {
    workspace.tails[first_strip + threadIdx.x] = shared.tails[threadIdx.x];
  }
  const int group = threadIdx.x / shape.lanes;
  const int64_t vector = int64_t(chunk) * shape.lanes + threadIdx.x % shape.lanes;
  const int begin = group * shape.tile;
  const int left = positions - begin;
  const TilePlace place{begin, left < shape.tile ? left : shape.tile, group % kStripTiles != 0, vector * V};
  const bool active = place.size > 0 && vector < shape.vectors;
  Acc* const partial = workspace.partials + 2 * (first_strip + group / kStripTiles) * shape.width + place.column;
  Acc sum[V];
  clear(sum);
  bool goes_on = false;
  if (active) {
    if (begin > 0) open = shared.ends_row[begin - 1] < 0;
    if constexpr (std::is_same_v<O, StochasticBf16>) {
      walk_tile<true, T, O, V>(rows, out, shape, place, partial, open, sum, shared);
    } else if (out.mode == GradMode::kAccumulate) {
      walk_tile<true, T, O, V>(rows, out, shape, place, partial, open, sum, shared);
    } else {
      walk_tile<false, T, O, V>(rows, out, shape, place, partial, open, sum, shared);
    }
    goes_on = shared.ends_row[begin + place.size - 1] < 0;
    if (goes_on && open && place.in_strip) put_head<Acc, V>(shared, sum);
  }
  __syncthreads();

  // The group where a segment starts adds what the tiles behind it found; so does the strip's first group for a
  // segment from the strip before.
  if (!goes_on || (open && place.in_strip)) return;
  const int strip_end = (group / kStripTiles + 1) * kStripTiles;
  for (int tile = group + 1; tile < strip_end && tile * shape.tile < positions; ++tile) {
    add_head<Acc, V>(sum, shared, threadIdx.x + (tile - group) * shape.lanes);
    const int end = shared.head_end[tile];
    if (end < 0) continue;
    if (open) break;
    const int row = shared.ends_row[end];
    if (row != kNoRow) finish_sum<O, V>(out, row, shape.width, place.column, sum, shared.factor[end]);
    return;
  }
  store_partial<Acc, V>(open ? partial : partial + shape.width, sum);
}

struct ZeroShared {
  int taken[kMaxZeroRows];
};

// Writes zeros to the rows that have no segment.
template <class S, int V>
EK_DEVICE void zero_rows(const PlanView& plan, S* out, int64_t out_rows, GradMode mode, const GradShape& shape,
                         int64_t block, ZeroShared& shared) {
  const int64_t first = block * shape.zero_rows;
  const int rows = int(out_rows - first < shape.zero_rows ? out_rows - first : shape.zero_rows);
  const int64_t listed = *plan.count;
  const int segments = int(listed < 0 ? 0 : listed < shape.n ? listed : shape.n);
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    shared.taken[r] = mode == GradMode::kPaddedRows && first + r < segments;
  }
  __syncthreads();
  if (mode == GradMode::kDense) {
    const int first_segment = block_count_below(plan.segment_ids, segments, first);
    for (int i = threadIdx.x; i < rows && i < segments - first_segment; i += kThreads) {
      const int64_t row = plan.segment_ids[first_segment + i] - first;
      if (row >= 0 && row < rows) shared.taken[row] = 1;
    }
    __syncthreads();
  }

  const int lanes = shape.zero_lanes, groups = kThreads / lanes;
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const Packed<S, V> zero{};
  for (int r = group; r < rows; r += groups) {
    if (shared.taken[r]) continue;
    S* const row = out + (first + r) * shape.width;
    for (int64_t column = int64_t(lane) * V; column < shape.width; column += lanes * V) store<S, V>(row + column, zero);
  }
}

template <class Acc, int V>
union GradShared {
  ReduceShared<Acc, V> reduce;
  ZeroShared zero;
};

// Elements per access of a row that is cleared.
template <class O, int V>
constexpr int kZeroVector = V == 1 ? 1 : kVector<Stored<O>>;

// Grid: reduce_blocks + zero_blocks.
template <class T, class O, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    grad_reduce_kernel(GradRows<T> rows, PlanView plan, GradOutput<O> out, GradWorkspace<Accumulator<T>> workspace,
                       GradShape shape) {
  using Shared = GradShared<Accumulator<T>, V>;
  EK_SHARED(Shared, shared);
  const int64_t block = blockIdx.x;
  if (block < shape.reduce_blocks) {
    reduce_strips<T, O, V>(rows, plan, out, workspace, shape, blockIdx.x, shared.reduce);
  } else if constexpr (!std::is_same_v<O, StochasticBf16>) {
    zero_rows<O, kZeroVector<O, V>>(plan, out.data, out.rows, out.mode, shape, block - shape.reduce_blocks,
                                    shared.zero);
  }
}

// Partial sums of a segment are numbered from the strip where it starts: the second slot of that strip, then the first
// slot of each strip after it.
template <class Acc, int V>
EK_DEVICE void add_partials(Acc (&sum)[V], const Acc* partials, int64_t width, int64_t strip, int from, int to) {
  constexpr int kUnroll = 32 / int(sizeof(Acc));  // sums in flight
  for (int base = from; base < to; base += kUnroll) {
    Packed<Acc, V> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = base + u;
      if (k < to) loaded[u] = load<Acc, V>(partials + (k == 0 ? 2 * strip + 1 : 2 * (strip + k)) * width);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u < to) add<Acc, V>(sum, loaded[u]);
    }
  }
}

template <class Acc, int V>
struct FinishShared {
  Acc sums[kFinishStrips][kFinishLanes][V];
  Tail long_tail;
  int64_t long_strip;  // where it starts
};

constexpr int kLongSpan = 32;  // partial sums that one group adds alone

// Grid: finish_blocks, kFinishStrips neighbouring strips and kFinishLanes vectors of D each. A group takes the segment
// that starts in its strip; one over many strips is shared by all groups of the block, an equal stretch each, and
// their sums are added in order.
template <class O, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    grad_finish_kernel(const Accumulator<Stored<O>>* partials, const Tail* tails, GradOutput<O> out, GradShape shape) {
  using Acc = Accumulator<Stored<O>>;
  using Shared = FinishShared<Acc, V>;
  EK_SHARED(Shared, shared);
  const int group = threadIdx.x / kFinishLanes, lane = threadIdx.x % kFinishLanes;
  const int64_t strip = int64_t(blockIdx.x / shape.finish_chunks) * kFinishStrips + group;
  const int64_t column = (int64_t(blockIdx.x % shape.finish_chunks) * kFinishLanes + lane) * V;
  const bool active = column < shape.width;
  const Tail tail = strip < shape.strips ? tails[strip] : Tail{-1, -1, 1};
  const int64_t span = tail.row < 0 ? 0 : tail.last_strip - strip + 1;
  if (threadIdx.x == 0) shared.long_tail.row = -1;
  __syncthreads();

  Acc sum[V];
  clear(sum);
  if (span > kLongSpan) {
    // There is one at most: it ends behind the block's strips.
    static_assert(kLongSpan >= kFinishStrips);
    if (lane == 0) {
      shared.long_tail = tail;
      shared.long_strip = strip;
    }
  } else if (span > 0 && active) {
    add_partials<Acc, V>(sum, partials + column, shape.width, strip, 0, int(span));
    finish_sum<O, V>(out, tail.row, shape.width, column, sum, Acc(1) / Acc(tail.divisor));
  }
  __syncthreads();
  const Tail shared_tail = shared.long_tail;
  if (shared_tail.row < 0) return;

  const int64_t start = shared.long_strip;
  const int size = int(shared_tail.last_strip - start) + 1;
  const int part = (size + kFinishStrips - 1) / kFinishStrips;
  const int from = group * part < size ? group * part : size;
  const int to = from + part < size ? from + part : size;
  clear(sum);
  if (active) add_partials<Acc, V>(sum, partials + column, shape.width, start, from, to);
#pragma unroll
  for (int i = 0; i < V; ++i) shared.sums[group][lane][i] = sum[i];
  __syncthreads();
  if (group == 0 && active) {
    for (int other = 1; other < kFinishStrips; ++other) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += shared.sums[other][lane][i];
    }
    finish_sum<O, V>(out, shared_tail.row, shape.width, column, sum, Acc(1) / Acc(shared_tail.divisor));
  }
}

}  // namespace embedkernels::cuda
