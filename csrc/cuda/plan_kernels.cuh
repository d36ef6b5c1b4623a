// Kernels of the plan, around the radix sort: ids -> sort keys, and sorted keys -> segments.
//
// All are bound by latency at the sizes of a training step (N ids: 4N to 12N bytes each). Nothing here waits for the
// host, and the grid depends on N alone, so a captured graph serves changed ids.
#pragma once

#include "portable.cuh"

namespace embedkernels::cuda {

// At most this many blocks look for segments, so that each can add up the counts of all blocks before it.
constexpr int kMaxSegmentBlocks = 1024;

struct SegmentShape {
  int64_t n;
  int64_t per_block;  // positions of one block, a multiple of kThreads
  int blocks;
};

// Bits that tell keys 0 to num_rows apart (num_rows is the key of dropped ids, and sorts last).
inline int key_bits(int64_t num_rows) {
  int bits = 1;
  while (bits < 32 && (num_rows >> bits) != 0) ++bits;
  return bits;
}

inline SegmentShape segment_shape(int64_t n) {
  int64_t per_block = 4 * kThreads;
  const int64_t least = (n + kMaxSegmentBlocks - 1) / kMaxSegmentBlocks;
  if (per_block < least) per_block = (least + kThreads - 1) / kThreads * kThreads;
  const int64_t blocks = (n + per_block - 1) / per_block;
  return {n, per_block, int(blocks > 0 ? blocks : 1)};
}

// What a plan is made of.
template <class Id>
struct PlanIds {
  const Id* ids;        // (N)
  const bool* ignored;  // (N), true where a position is dropped, or null
  int64_t padding_idx;
  int64_t vocab_start;
  uint32_t num_rows;

  // The row of a position, num_rows if it is dropped.
  EK_DEVICE uint32_t row(int64_t i) const {
    const int64_t id = ids[i];
    // Unsigned: an id below vocab_start wraps to a number above every row.
    const uint64_t local = uint64_t(id) - uint64_t(vocab_start);
    const bool kept = local < num_rows && id != padding_idx && !(ignored && ignored[i]);
    return kept ? uint32_t(local) : num_rows;
  }
};

// keys[i] is the row of position i, order[i] = i. Grid: ceil(N / 256).
template <class Id>
__global__ void __launch_bounds__(kThreads)
    plan_keys_kernel(PlanIds<Id> source, int64_t n, uint32_t* keys, int* order) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  keys[i] = source.row(i);
  order[i] = int(i);
}

EK_DEVICE bool starts_segment(const uint32_t* keys, int64_t i, int64_t end, uint32_t num_rows) {
  return i < end && keys[i] < num_rows && (i == 0 || keys[i - 1] != keys[i]);
}

// counts[b] = segments that start among the positions of block b.
__global__ void __launch_bounds__(kThreads)
    plan_count_kernel(const uint32_t* keys, uint32_t num_rows, SegmentShape shape, int* counts) {
  const int64_t begin = int64_t(blockIdx.x) * shape.per_block;
  const int64_t end = begin + shape.per_block < shape.n ? begin + shape.per_block : shape.n;
  int total = 0;
  for (int64_t base = begin; base < end; base += kThreads) {
    total += __syncthreads_count(starts_segment(keys, base + threadIdx.x, end, num_rows));
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

// Writes segment_ids, segment_offsets and count. Same grid as plan_count_kernel.
__global__ void __launch_bounds__(kThreads)
    plan_segments_kernel(const uint32_t* keys, const int* counts, uint32_t num_rows, SegmentShape shape,
                         int* segment_ids, int* segment_offsets, int* count) {
  EK_SHARED(SegmentShared, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t begin = int64_t(blockIdx.x) * shape.per_block;
  const int64_t end = begin + shape.per_block < shape.n ? begin + shape.per_block : shape.n;
  int segment = block_sum(counts, blockIdx.x, shared);

  for (int64_t base = begin; base < end; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const bool starts = starts_segment(keys, i, end, num_rows);
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
      segment_ids[mine] = int(keys[i]);
      segment_offsets[mine] = int(i);
    }
    // The last kept position closes the list.
    if (i < end && keys[i] < num_rows && (i + 1 == shape.n || keys[i + 1] >= num_rows)) {
      const int segments = mine + int(starts);
      segment_offsets[segments] = int(i + 1);
      *count = segments;
    }
    segment += total;
    __syncthreads();  // shared.warp is written again
  }
  const bool nothing_kept = shape.n == 0 || keys[0] >= num_rows;
  if (nothing_kept && blockIdx.x == 0 && threadIdx.x == 0) {
    segment_offsets[0] = 0;
    *count = 0;
  }
}

}  // namespace embedkernels::cuda
