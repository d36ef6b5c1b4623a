// Kernels of the plan for more ids than one block sorts: ids -> sort keys, and sorted keys -> segments.
//
// All are bound by latency at the sizes of a training step (N ids: 4N to 12N bytes each). Nothing here waits for the
// host, and the grid depends on N alone, so a captured graph serves changed ids.
//
// Where a row and a position fit into 32 bits together, they are one key, and the sort moves nothing else.
#pragma once

#include "plan_ids.cuh"

namespace embedkernels::cuda {

// At most this many blocks look for segments, so that each can add up the counts of all blocks before it.
constexpr int kMaxSegmentBlocks = 1024;

struct SegmentShape {
  int64_t n;
  int64_t per_block;  // positions of one block, a multiple of kThreads
  int blocks;
};

inline SegmentShape segment_shape(int64_t n) {
  int64_t per_block = 4 * kThreads;
  const int64_t least = (n + kMaxSegmentBlocks - 1) / kMaxSegmentBlocks;
  if (per_block < least) per_block = (least + kThreads - 1) / kThreads * kThreads;
  const int64_t blocks = (n + per_block - 1) / per_block;
  return {n, per_block, int(blocks > 0 ? blocks : 1)};
}

// keys[i] is the row of position i, above the position where both are packed; else order[i] = i. Grid: ceil(N / 256).
template <class Id>
__global__ void __launch_bounds__(kThreads)
    plan_keys_kernel(PlanIds<Id> source, int64_t n, int position_bits, uint32_t* keys, int* order) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const uint32_t row = source.row(i);
  if (position_bits > 0) {
    keys[i] = row << position_bits | uint32_t(i);
  } else {
    keys[i] = row;
    order[i] = int(i);
  }
}

// Keys in the order of their rows.
struct SortedKeys {
  const uint32_t* keys;
  int position_bits;
  uint32_t num_rows;  // the row of dropped ids, which come last

  EK_DEVICE uint32_t row(int64_t i) const { return keys[i] >> position_bits; }
  EK_DEVICE bool kept(int64_t i) const { return row(i) < num_rows; }
  EK_DEVICE bool starts_segment(int64_t i, int64_t end) const {
    return i < end && kept(i) && (i == 0 || row(i - 1) != row(i));
  }
};

// counts[b] = segments that start among the positions of block b.
__global__ void __launch_bounds__(kThreads) plan_count_kernel(SortedKeys sorted, SegmentShape shape, int* counts) {
  const int64_t begin = int64_t(blockIdx.x) * shape.per_block;
  const int64_t end = begin + shape.per_block < shape.n ? begin + shape.per_block : shape.n;
  int total = 0;
  for (int64_t base = begin; base < end; base += kThreads) {
    total += __syncthreads_count(sorted.starts_segment(base + threadIdx.x, end));
  }
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

struct SegmentShared {
  int sum[kThreads];
  int warp[kThreads / kWarp];
};

// Sum of values[0, size) in every thread.
EK_DEVICE int block_sum(const int* values, int size, SegmentShared& shared) {
  int sum = 0;
  for (int i = threadIdx.x; i < size; i += kThreads) sum += values[i];
  shared.sum[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) shared.sum[threadIdx.x] += shared.sum[threadIdx.x + half];
    __syncthreads();
  }
  return shared.sum[0];
}

// Writes segment_ids, segment_offsets and count, and the order where it is part of the keys. Same grid as
// plan_count_kernel.
__global__ void __launch_bounds__(kThreads)
    plan_segments_kernel(SortedKeys sorted, const int* counts, SegmentShape shape, int* order, int* segment_ids,
                         int* segment_offsets, int* count) {
  EK_SHARED(SegmentShared, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t begin = int64_t(blockIdx.x) * shape.per_block;
  const int64_t end = begin + shape.per_block < shape.n ? begin + shape.per_block : shape.n;
  const uint32_t position_mask = (uint32_t{1} << sorted.position_bits) - 1;
  int segment = block_sum(counts, blockIdx.x, shared);

  for (int64_t base = begin; base < end; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const bool starts = sorted.starts_segment(i, end);
    const unsigned ballot = __ballot_sync(0xffffffffu, starts);
    if (lane == 0) shared.warp[warp] = __popc(ballot);
    __syncthreads();
    int before = __popc(ballot & ((1u << lane) - 1)), total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < warp) before += shared.warp[w];
      total += shared.warp[w];
    }
    const int mine = segment + before;
    if (starts) {
      segment_ids[mine] = int(sorted.row(i));
      segment_offsets[mine] = int(i);
    }
    if (i < end) {
      if (sorted.position_bits > 0) order[i] = int(sorted.keys[i] & position_mask);
      // The last kept position closes the list.
      if (sorted.kept(i) && (i + 1 == shape.n || !sorted.kept(i + 1))) {
        const int segments = mine + int(starts);
        segment_offsets[segments] = int(i + 1);
        *count = segments;
      }
    }
    segment += total;
    __syncthreads();  // shared.warp is written again
  }
  const bool nothing_kept = shape.n == 0 || !sorted.kept(0);
  if (nothing_kept && blockIdx.x == 0 && threadIdx.x == 0) {
    segment_offsets[0] = 0;
    *count = 0;
  }
}

}  // namespace embedkernels::cuda
