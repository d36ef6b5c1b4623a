// Search of a sorted array by a whole block: 256 probes a round, so 2 rounds of memory latency for 64k elements.
#pragma once

#include "portable.cuh"

namespace embedkernels::cuda {

// How many of values[0, size), which ascend, are below `key`. Called by all threads of the block, with equal arguments.
EK_DEVICE int block_count_below(const int* values, int size, int64_t key) {
  int64_t low = 0, high = size;  // the answer lies in [low, high]
  while (low < high) {
    const int64_t step = (high - low + kThreads - 1) / kThreads;
    const int64_t probe = low + int64_t(threadIdx.x) * step;
    const int below = __syncthreads_count(probe < high && values[probe] < key);
    // Probes 0 to below - 1 are below the key, the next one is not.
    const int64_t next_high = low + below * step;
    if (below > 0) low += (below - 1) * step + 1;
    if (next_high < high) high = next_high;
  }
  return int(low);
}

}  // namespace embedkernels::cuda
