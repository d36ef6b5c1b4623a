// The whole plan of a few thousand ids in one launch of one block.
//
// A radix sort in shared memory, least significant digit first. Every thread holds up to kSmallItems ids; warps hold
// neighbouring stretches of them, and 32 neighbours are ranked at a time: ballots of a digit's bits tell a lane which
// others have its digit, and a counter of the warp and the digit where they go. The counters' prefix sums over digits,
// then warps, are places, so the sort is stable. Dropped ids are left out of the first pass.
//
// Bound by latency: passes of 8 bits at most (two for BERT's vocabulary, three from 64k rows on), each some 3 us.
// Shared memory: 4 + 2 bytes an id, 2 a counter. More ids do not fit into the 48 KiB that need no permission.
#pragma once

#include "plan_ids.cuh"

namespace embedkernels::cuda {

constexpr int kSmallThreads = 1024;
constexpr int kSmallWarps = kSmallThreads / kWarp;
constexpr int kSmallItems = 5;
constexpr int kSmallIds = kSmallThreads * kSmallItems;
constexpr int kSmallDigitBits = 8;
constexpr int kSmallDigits = 1 << kSmallDigitBits;

struct SmallShared {
  uint32_t keys[kSmallIds];
  uint16_t positions[kSmallIds];
  uint16_t places[kSmallWarps][kSmallDigits];  // how many, then where they go
  int starts[kSmallDigits];                    // first place of a digit
};

// Passes over the bits in use, and the bits of each.
struct SmallPasses {
  int passes, bits;
};

inline SmallPasses small_passes(int64_t num_rows) {
  const int in_use = bits_for(num_rows > 0 ? num_rows - 1 : 0);
  const int passes = (in_use + kSmallDigitBits - 1) / kSmallDigitBits;
  return {passes, (in_use + passes - 1) / passes};
}

// Lanes of the warp that are `active` and have the same digit. Called by all lanes.
EK_DEVICE unsigned lanes_with(unsigned digit, int bits, bool active) {
  unsigned lanes = __ballot_sync(0xffffffffu, active);
  for (int bit = 0; bit < bits; ++bit) {
    const bool one = digit >> bit & 1;
    const unsigned ones = __ballot_sync(0xffffffffu, one);
    lanes &= one ? ones : ~ones;
  }
  return lanes;
}

// Turns the counts of every warp and digit into places. Called by all threads.
EK_DEVICE void places_from_counts(SmallShared& shared, int digits) {
  const int digit = threadIdx.x;
  int total = 0;
  if (digit < digits) {
    for (int warp = 0; warp < kSmallWarps; ++warp) {
      const int here = shared.places[warp][digit];
      shared.places[warp][digit] = uint16_t(total);
      total += here;
    }
    shared.starts[digit] = total;
  }
  __syncthreads();
  // Inclusive sums over the digits, then each digit's own count is taken off again.
  for (int distance = 1; distance < digits; distance *= 2) {
    const int below = digit < digits && digit >= distance ? shared.starts[digit - distance] : 0;
    __syncthreads();
    if (digit < digits) shared.starts[digit] += below;
    __syncthreads();
  }
  if (digit < digits) shared.starts[digit] -= total;
  __syncthreads();
}

// Grid: 1 block of kSmallThreads. n <= kSmallIds.
template <class Id>
__global__ void __launch_bounds__(kSmallThreads)
    plan_small_kernel(PlanIds<Id> source, int n, SmallPasses how, int* order, int* segment_ids, int* segment_offsets,
                      int* count) {
  EK_SHARED(SmallShared, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned lower = (1u << lane) - 1;
  const int items = (n + kSmallThreads - 1) / kSmallThreads;
  const int first = warp * items * kWarp + lane;  // of this thread's ids, which are 32 apart
  const int digits = 1 << how.bits;

  uint32_t key[kSmallItems];
  int position[kSmallItems];
#pragma unroll
  for (int k = 0; k < kSmallItems; ++k) {
    position[k] = first + k * kWarp;
    key[k] = k < items && position[k] < n ? source.row(position[k]) : source.num_rows;
  }
  int kept = n;
  for (int pass = 0; pass < how.passes; ++pass) {
    const int shift = pass * how.bits;
    for (int i = threadIdx.x; i < kSmallWarps * digits; i += kSmallThreads) {
      shared.places[i / digits][i % digits] = 0;
    }
    __syncthreads();
    int rank[kSmallItems];  // among the ids of this warp with the same digit
#pragma unroll
    for (int k = 0; k < kSmallItems; ++k) {
      if (k < items) {
        const unsigned digit = key[k] >> shift & (digits - 1);
        const bool active = key[k] != source.num_rows;
        const unsigned same = lanes_with(digit, how.bits, active);
        const int before = shared.places[warp][digit];
        __syncwarp();
        rank[k] = before + __popc(same & lower);
        if (active && (same & lower) == 0) shared.places[warp][digit] = uint16_t(before + __popc(same));
        __syncwarp();
      }
    }
    __syncthreads();
    places_from_counts(shared, digits);
    // Everything that is active has its place below this: the last digit's first place and its count.
    int placed = 0;
#pragma unroll
    for (int k = 0; k < kSmallItems; ++k) {
      const bool active = k < items && key[k] != source.num_rows;
      if (active) {
        const unsigned digit = key[k] >> shift & (digits - 1);
        const int place = shared.starts[digit] + shared.places[warp][digit] + rank[k];
        shared.keys[place] = key[k];
        shared.positions[place] = uint16_t(position[k]);
        ++placed;
      }
    }
    if (pass == 0) {
      kept = 0;
#pragma unroll
      for (int k = 0; k < kSmallItems; ++k) {
        if (k < items) kept += __syncthreads_count(k < placed);
      }
    } else {
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < kSmallItems; ++k) {
      const int i = first + k * kWarp;
      const bool there = k < items && i < kept;
      key[k] = there ? shared.keys[i] : source.num_rows;
      position[k] = there ? shared.positions[i] : 0;
    }
    __syncthreads();
  }

  // Segments: counted in every warp, then written behind those of the warps before.
  unsigned heads[kSmallItems];
  int found = 0;
#pragma unroll
  for (int k = 0; k < kSmallItems; ++k) {
    heads[k] = 0;
    if (k < items) {
      const int i = first + k * kWarp;
      heads[k] = __ballot_sync(0xffffffffu, i < kept && (i == 0 || shared.keys[i - 1] != key[k]));
      found += __popc(heads[k]);
    }
  }
  if (lane == 0) shared.starts[warp] = found;
  __syncthreads();
  int segment = 0, segments = 0;
  for (int w = 0; w < kSmallWarps; ++w) {
    if (w < warp) segment += shared.starts[w];
    segments += shared.starts[w];
  }
#pragma unroll
  for (int k = 0; k < kSmallItems; ++k) {
    const int i = first + k * kWarp;
    if (k < items && i < kept) {
      order[i] = position[k];
      if (heads[k] >> lane & 1) {
        const int mine = segment + __popc(heads[k] & lower);
        segment_ids[mine] = int(key[k]);
        segment_offsets[mine] = i;
      }
    }
    segment += __popc(heads[k]);
  }
  if (threadIdx.x == 0) {
    segment_offsets[segments] = kept;
    *count = segments;
  }
}

}  // namespace embedkernels::cuda
