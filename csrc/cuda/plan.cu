// embedding_plan on CUDA.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "launcher.h"
#include "plan_steps.h"

namespace embedkernels::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> embedding_plan(const Tensor& ids, int64_t num_rows, int64_t padding_idx,
                                                          int64_t vocab_start,
                                                          const std::optional<Tensor>& ignored) {
  check_plan_arguments(ids, num_rows, padding_idx, vocab_start, ignored);
  Launcher launcher("embedding_plan", ids);
  const int64_t n = ids.numel();
  const auto ints = [&](int64_t size) { return empty_like_device(ids, {size}, ScalarType::Int); };
  const PlanPath path = plan_path(n, num_rows);
  const int64_t sorted = path.small ? 0 : n, moved = path.small || path.position_bits > 0 ? 0 : n;
  const Tensor order[2] = {ints(n), ints(moved)}, keys[2] = {ints(sorted), ints(sorted)};
  const Tensor segment_ids = ints(n), offsets = ints(n + 1), count = ints(1);
  const Tensor counts = ints(path.small ? 0 : kMaxSegmentBlocks);
  const PlanBuffers buffers{{mutable_data<uint32_t>(keys[0]), mutable_data<uint32_t>(keys[1])},
                            {mutable_data<int>(order[0]), mutable_data<int>(order[1])},
                            mutable_data<int>(counts),
                            mutable_data<int>(segment_ids),
                            mutable_data<int>(offsets),
                            mutable_data<int>(count)};
  const auto run = [&]<class Id>(const Id* typed_ids) {
    const PlanIds<Id> source{typed_ids, data<bool>(ignored), padding_idx, vocab_start, uint32_t(num_rows)};
    return run_plan(launcher, source, n, buffers);
  };
  const int which = ids.scalar_type() == ScalarType::Int ? run(data<int32_t>(ids)) : run(data<int64_t>(ids));
  return {order[which], segment_ids, offsets, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(embedkernels_ext, CUDA, library) {
  library.impl("embedding_plan", TORCH_BOX(&embedding_plan));
}

}  // namespace embedkernels::cuda
