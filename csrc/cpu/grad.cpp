// The dense gradient of a table on the CPU: every row of the output is written once, by one thread.
//
// Segments longer than a block are first summed block by block (all threads, so that one hot id does not leave the
// others idle); then the table is cut into stretches of equal cost, and every thread writes the rows of its stretch,
// zeros included. Blocks have a fixed length and are added in order: the bits do not depend on the threads.
// Bound by memory: N*D reads and V*D writes.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../checks.h"
#include "parallel.h"
#include "rows.h"

namespace embedkernels::cpu {
namespace {

constexpr int64_t kBlock = 512;            // rows summed one after the other
constexpr int64_t kGrainBytes = 256 << 10;  // memory traffic per task: some 30 us

struct Plan {
  const int32_t *order, *segment_ids, *offsets;
  int64_t n, count, num_rows;

  int64_t begin(int64_t segment) const { return offsets[segment]; }
  // Not yet checked, the offsets may be so far apart that their difference does not fit into 32 bits.
  int64_t size(int64_t segment) const { return begin(segment + 1) - begin(segment); }
};

// A plan is data from outside: nothing below may read or write out of bounds because of it.
void check_plan(const Plan& plan) {
  check(plan.count >= 0 && plan.count <= plan.n, "embedding_grad_dense: count must be 0 to ", plan.n, ", got ",
        plan.count);
  check(plan.offsets[0] == 0 || plan.count == 0, "embedding_grad_dense: segment_offsets must start with 0");
  int64_t row = -1;
  for (int64_t s = 0; s < plan.count; ++s) {
    check(plan.segment_ids[s] > row && plan.segment_ids[s] < plan.num_rows,
          "embedding_grad_dense: segment_ids must ascend within 0 to num_rows - 1, got ", plan.segment_ids[s],
          " at position ", s);
    row = plan.segment_ids[s];
    check(plan.size(s) > 0 && plan.offsets[s + 1] <= plan.n,
          "embedding_grad_dense: segment_offsets must ascend to at most ", plan.n, ", got ", plan.offsets[s + 1],
          " at position ", s + 1);
  }
  const int64_t kept = plan.count ? plan.offsets[plan.count] : 0;
  for (int64_t i = 0; i < kept; ++i) {
    check(plan.order[i] >= 0 && plan.order[i] < plan.n, "embedding_grad_dense: order must hold positions below ",
          plan.n, ", got ", plan.order[i], " at position ", i);
  }
}

// Sums of the blocks of long segments.
template <class Acc>
class LongSegments {
 public:
  LongSegments(const Plan& plan, int64_t width) : width_(width), first_block_(plan.count, -1) {
    for (int64_t s = 0; s < plan.count; ++s) {
      if (plan.size(s) <= kBlock) continue;
      first_block_[s] = int64_t(blocks_.size());
      const int64_t end = plan.begin(s) + plan.size(s);
      for (int64_t i = plan.begin(s); i < end; i += kBlock) blocks_.push_back({i, std::min(kBlock, end - i)});
    }
    sums_ = std::make_unique_for_overwrite<Acc[]>(blocks_.size() * width);
  }

  template <class T>
  void sum_blocks(const T* rows, const int32_t* order) {
    const int64_t blocks = int64_t(blocks_.size());
    const int64_t tasks = task_count(blocks, 1);
    run_tasks(tasks, [&](int64_t task) {
      const int64_t end = part_begin(blocks, tasks, task + 1);
      for (int64_t b = part_begin(blocks, tasks, task); b < end; ++b) {
        sum_rows(rows, order + blocks_[b].begin, blocks_[b].size, width_, sums_.get() + b * width_);
      }
    });
  }

  bool contains(int64_t segment) const { return first_block_[segment] >= 0; }

  void add_up(int64_t segment, int64_t size, Acc* total) const {
    const Acc* sum = sums_.get() + first_block_[segment] * width_;
    std::memcpy(total, sum, width_ * sizeof(Acc));
    for (int64_t i = kBlock; i < size; i += kBlock) {
      sum += width_;
      for (int64_t d = 0; d < width_; ++d) total[d] += sum[d];
    }
  }

  int64_t cost(int64_t segment, int64_t size) const { return contains(segment) ? size / kBlock + 1 : size; }

 private:
  struct Block {
    int64_t begin, size;
  };
  int64_t width_;
  std::vector<int64_t> first_block_;
  std::vector<Block> blocks_;
  std::unique_ptr<Acc[]> sums_;
};

// Stretches of the table of equal cost, counted in rows moved: one for each row written, one for each row read.
class Stretches {
 public:
  template <class Acc>
  Stretches(const Plan& plan, const LongSegments<Acc>& longs) : plan_(plan), cost_(plan.count + 1) {
    int64_t cost = 0;
    for (int64_t s = 0; s < plan.count; ++s) {
      cost_[s] = cost;
      cost += plan.segment_ids[s] + 1 - first_row(s) + longs.cost(s, plan.size(s));
    }
    cost_[plan.count] = cost;
  }

  int64_t total() const { return cost_[plan_.count] + plan_.num_rows - first_row(plan_.count); }

  // Where a stretch that starts at `cost` begins: the first row, and the first segment that is not above it.
  std::pair<int64_t, int64_t> at(int64_t cost) const {
    if (cost >= total()) return {plan_.num_rows, plan_.count};
    const int64_t s = std::upper_bound(cost_.begin(), cost_.end(), cost) - cost_.begin() - 1;
    const int64_t row = first_row(s) + cost - cost_[s];
    if (s == plan_.count || row <= plan_.segment_ids[s]) return {row, s};
    return {plan_.segment_ids[s] + 1, s + 1};
  }

 private:
  // The row after the segment before: its gap of untouched rows starts here.
  int64_t first_row(int64_t segment) const { return segment ? int64_t(plan_.segment_ids[segment - 1]) + 1 : 0; }

  const Plan& plan_;
  std::vector<int64_t> cost_;
};

template <class T>
void dense_grad(const T* rows, const Plan& plan, int64_t width, T* out) {
  using Acc = Accumulator<T>;
  LongSegments<Acc> longs(plan, width);
  longs.sum_blocks(rows, plan.order);
  const Stretches stretches(plan, longs);
  const int64_t tasks = task_count(stretches.total() * width * int64_t(sizeof(T)), kGrainBytes);

  run_tasks(tasks, [&](int64_t task) {
    auto [row, segment] = stretches.at(part_begin(stretches.total(), tasks, task));
    const auto [row_end, segment_end] = stretches.at(part_begin(stretches.total(), tasks, task + 1));
    std::unique_ptr<Acc[]> wide;
    if constexpr (!std::is_same_v<T, Acc>) wide = std::make_unique_for_overwrite<Acc[]>(width);
    const auto write_zeros = [&](int64_t end) {
      store_zeros(out + row * width, (end - row) * width * int64_t(sizeof(T)));
    };
    for (; segment < segment_end; ++segment) {
      write_zeros(plan.segment_ids[segment]);
      row = plan.segment_ids[segment];
      Acc* total;
      if constexpr (std::is_same_v<T, Acc>) {
        total = out + row * width;
      } else {
        total = wide.get();
      }
      if (longs.contains(segment)) {
        longs.add_up(segment, plan.size(segment), total);
      } else {
        sum_rows(rows, plan.order + plan.begin(segment), plan.size(segment), width, total);
      }
      if constexpr (!std::is_same_v<T, Acc>) store_row(total, width, out + row * width);
      ++row;
    }
    write_zeros(row_end);
  });
}

// The whole output is about to be written, so huge pages cost no memory and save most of the page faults. Only for its
// first 256 MiB: a virtual machine may have to fetch huge pages from its host again, which takes longer than they save.
void prefer_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < (int64_t{8} << 20)) return;
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + page - 1) / page * page;
  const uintptr_t last = (address + uintptr_t(std::min(bytes, int64_t{256} << 20))) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: failure changes nothing
#endif
}

Tensor embedding_grad_dense(const Tensor& grad_rows, const Tensor& order, const Tensor& segment_ids,
                            const Tensor& segment_offsets, const Tensor& count, int64_t num_rows) {
  check_grad_arguments(grad_rows, order, segment_ids, segment_offsets, count, num_rows);
  const int64_t n = grad_rows.size(0), width = grad_rows.size(1);
  const Plan plan{data<int32_t>(order), data<int32_t>(segment_ids), data<int32_t>(segment_offsets), n,
                  *data<int32_t>(count), num_rows};
  check_plan(plan);
  Tensor out = empty_like_device(grad_rows, {num_rows, width}, grad_rows.scalar_type());
  if (out.numel() == 0) return out;
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * int64_t(out.element_size()));
  const auto run = [&]<class T>(T*) { dense_grad(data<T>(grad_rows), plan, width, mutable_data<T>(out)); };
  switch (grad_rows.scalar_type()) {
    case ScalarType::Float: run(static_cast<float*>(nullptr)); break;
    case ScalarType::Double: run(static_cast<double*>(nullptr)); break;
    case ScalarType::Half: run(static_cast<f16*>(nullptr)); break;
    default: run(static_cast<bf16*>(nullptr)); break;  // check_grad_arguments let nothing else through
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(embedkernels_ext, CPU, library) {
  library.impl("embedding_grad_dense", TORCH_BOX(&embedding_grad_dense));
}

}  // namespace embedkernels::cpu
