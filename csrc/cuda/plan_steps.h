// The launches of the plan, in order. `Launcher` is the CUDA stream, or the shim in the tests.
#pragma once

#include "plan_kernels.cuh"

namespace embedkernels::cuda {

// Memory of a plan. keys and order come twice: the sort goes back and forth and says where it ended.
struct PlanBuffers {
  uint32_t* keys[2];  // (N)
  int* order[2];      // (N)
  int* counts;        // (kMaxSegmentBlocks)
  int* segment_ids;   // (N)
  int* segment_offsets;  // (N + 1)
  int* count;            // (1)
};

// Returns which of the two order buffers holds the plan's order; known on the host without waiting.
template <class Launcher, class Id>
int run_plan(Launcher& launcher, const PlanIds<Id>& source, int64_t n, const PlanBuffers& buffers) {
  const uint32_t rows = source.num_rows;
  int which = 0;
  if (n > 0) {
    launcher.launch(plan_keys_kernel<Id>, (n + kThreads - 1) / kThreads, source, n, buffers.keys[0],
                    buffers.order[0]);
    which = launcher.sort_pairs(buffers.keys, buffers.order, n, key_bits(rows));
  }
  const SegmentShape shape = segment_shape(n);
  const uint32_t* keys = buffers.keys[which];
  launcher.launch(plan_count_kernel, shape.blocks, keys, rows, shape, buffers.counts);
  launcher.launch(plan_segments_kernel, shape.blocks, keys, static_cast<const int*>(buffers.counts), rows, shape,
                  buffers.segment_ids, buffers.segment_offsets, buffers.count);
  return which;
}

}  // namespace embedkernels::cuda
