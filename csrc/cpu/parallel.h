// Work split over PyTorch's own threads, so that torch.set_num_threads and OMP_NUM_THREADS hold here too.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace embedkernels::cpu {

// How many tasks `work` units are worth, at least `grain` units each.
inline int64_t task_count(int64_t work, int64_t grain, int64_t tasks_per_thread = 1) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1) return 1;
  return std::max<int64_t>(1, std::min(threads * tasks_per_thread, work / grain));
}

// body(task) for every task in [0, tasks), each taken by the first thread that is free.
template <class Body>
void run_tasks(int64_t tasks, const Body& body) {
  if (tasks == 1) {
    body(int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
  });
}

// Start of the task-th of `tasks` nearly equal parts of [0, total).
inline int64_t part_begin(int64_t total, int64_t tasks, int64_t task) {
  return total / tasks * task + std::min(task, total % tasks);
}

}  // namespace embedkernels::cpu
