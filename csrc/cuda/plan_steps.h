// The launches of the plan, in order. `Launcher` is the CUDA stream, or the shim in the tests.
#pragma once

#include "plan_kernels.cuh"
#include "plan_small.cuh"

namespace embedkernels::cuda {

// Which way a plan is made: a function of N and V alone.
struct PlanPath {
  bool small;         // one launch
  int position_bits;  // of a packed key, 0 where row and position do not fit into 32 bits together
  int row_bits;       // that are sorted
};

inline PlanPath plan_path(int64_t n, int64_t num_rows) {
  const int row_bits = key_bits(num_rows), position_bits = bits_for(n > 0 ? n - 1 : 0);
  return {n <= kSmallIds, row_bits + position_bits <= 32 ? position_bits : 0, row_bits};
}

// Memory of a plan. keys come twice, and order too where it is sorted along: the sort goes back and forth.
struct PlanBuffers {
  uint32_t* keys[2];     // (N), not for a small plan
  int* order[2];         // (N); the second only where keys are not packed
  int* counts;           // (kMaxSegmentBlocks), not for a small plan
  int* segment_ids;      // (N)
  int* segment_offsets;  // (N + 1)
  int* count;            // (1)
};

// Returns which of the two order buffers holds the plan's order; known on the host without waiting.
template <class Launcher, class Id>
int run_plan(Launcher& launcher, const PlanIds<Id>& source, int64_t n, const PlanBuffers& buffers) {
  const PlanPath path = plan_path(n, source.num_rows);
  if (path.small) {
    launcher.template launch<kSmallThreads>(plan_small_kernel<Id>, 1, source, int(n), small_passes(source.num_rows),
                                            buffers.order[0], buffers.segment_ids, buffers.segment_offsets,
                                            buffers.count);
    return 0;
  }
  launcher.launch(plan_keys_kernel<Id>, (n + kThreads - 1) / kThreads, source, n, path.position_bits, buffers.keys[0],
                  buffers.order[0]);
  const bool packed = path.position_bits > 0;
  const int which =
      packed ? launcher.sort_keys(buffers.keys, n, path.position_bits, path.position_bits + path.row_bits)
             : launcher.sort_pairs(buffers.keys, buffers.order, n, path.row_bits);
  const SegmentShape shape = segment_shape(n);
  const SortedKeys sorted{buffers.keys[which], path.position_bits, source.num_rows};
  int* const order = buffers.order[packed ? 0 : which];
  launcher.launch(plan_count_kernel, shape.blocks, sorted, shape, buffers.counts);
  launcher.launch(plan_segments_kernel, shape.blocks, sorted, static_cast<const int*>(buffers.counts), shape, order,
                  buffers.segment_ids, buffers.segment_offsets, buffers.count);
  return packed ? 0 : which;
}

}  // namespace embedkernels::cuda
