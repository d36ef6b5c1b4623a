// The gradient of a table on the CPU: the sum of every segment's rows, written to, or added to, one row of the output
// by one thread.
//
// Blocks of long segments are summed first; then the output is cut into stretches of equal cost, and every thread
// writes the rows of its stretches, zeros included. Blocks have a fixed length and are added in order: the bits do not
// depend on the threads. Bound by memory: N*D reads, and V*D writes (dense), U*D reads and writes (accumulate) or U*D
// writes (rows), for U segments.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>

#include "../checks.h"
#include "../grad_mode.h"
#include "pages.h"
#include "parallel.h"
#include "rows.h"
#include "segments.h"

namespace embedkernels::cpu {
namespace {

constexpr int64_t kGrainBytes = 256 << 10;  // memory traffic per task: some 30 us
constexpr int64_t kTasksPerThread = 4;      // a thread that is held up leaves the rest to the others

struct Options {
  GradMode mode;
  bool scale_by_freq;
  std::optional<uint64_t> seed;
};

// Sums of segments, the blocks of the long ones summed beforehand.
template <class T>
class SegmentSums {
 public:
  using Acc = Accumulator<T>;

  SegmentSums(const GradRows<T>& rows, const Plan& plan, const LongSegments& longs, int64_t width, bool scale_by_freq)
      : rows_(rows), plan_(plan), longs_(longs), width_(width), scale_by_freq_(scale_by_freq) {
    const auto& blocks = longs.blocks();
    const int64_t count = int64_t(blocks.size());
    block_sums_ = std::make_unique_for_overwrite<Acc[]>(count * width);
    const int64_t tasks = std::min(count, task_count(count * kBlock * width * int64_t(sizeof(T)), kGrainBytes,
                                                     kTasksPerThread));
    if (count == 0) return;
    run_tasks(tasks, [&](int64_t task) {
      const int64_t end = part_begin(count, tasks, task + 1);
      for (int64_t b = part_begin(count, tasks, task); b < end; ++b) {
        sum_rows(rows, plan.order + blocks[b].begin, blocks[b].size, width, block_sums_.get() + b * width);
      }
    });
  }

  void sum(int64_t segment, Acc* total) const {
    const int64_t size = plan_.size(segment);
    if (size <= kBlock) {
      sum_rows(rows_, plan_.order + plan_.begin(segment), size, width_, total);
    } else {
      const auto [first, end] = longs_.blocks_of(segment);
      std::memcpy(total, block_sums_.get() + first * width_, width_ * sizeof(Acc));
      for (int64_t b = first + 1; b < end; ++b) add_to_total(block_sums_.get() + b * width_, width_, total);
    }
    if (scale_by_freq_) scale_total(Acc(1) / Acc(size), width_, total);
  }

 private:
  const GradRows<T>& rows_;
  const Plan& plan_;
  const LongSegments& longs_;
  int64_t width_;
  bool scale_by_freq_;
  std::unique_ptr<Acc[]> block_sums_;
};

template <class T, class Out>
void write_sums(const GradRows<T>& rows, const Plan& plan, int64_t width, const Options& options, int64_t places,
                Out* out) {
  using Acc = Accumulator<T>;
  const bool adds = options.mode == GradMode::kAccumulate, dense = options.mode == GradMode::kDense;
  const LongSegments longs(plan);
  const SegmentSums<T> sums(rows, plan, longs, width, options.scale_by_freq);
  const Stretches stretches(plan, longs, dense, places);
  const auto address = [&](int64_t place) { return reinterpret_cast<char*>(out + place * width); };
  const bool fresh = dense && worth_fetching(address(0), address(places) - address(0));
  const int64_t tasks = task_count(stretches.total() * width * int64_t(sizeof(T)), kGrainBytes, kTasksPerThread);

  run_tasks(tasks, [&](int64_t task) {
    auto [place, segment] = stretches.at(part_begin(stretches.total(), tasks, task));
    const auto [place_end, segment_end] = stretches.at(part_begin(stretches.total(), tasks, task + 1));
    FreshPages pages(fresh, address(place), address(place_end));
    const auto write_zeros = [&](int64_t end) {
      for (char* at = address(place); at < address(end);) {
        const int64_t bytes = std::min(address(end) - at, kFetchedBytes);
        pages.before_writing(at + bytes);
        store_zeros(at, bytes);
        at += bytes;
      }
    };
    const auto scratch = std::make_unique_for_overwrite<Acc[]>(width);
    for (; segment < segment_end; ++segment, ++place) {
      write_zeros(stretches.place(segment));
      place = stretches.place(segment);
      if (adds) {
        Out* row = out + plan.segment_ids[segment] * width;
        sums.sum(segment, scratch.get());
        if constexpr (std::is_same_v<Out, bf16>) {
          if (options.seed) {
            add_row_stochastic(scratch.get(), width, *options.seed, uint32_t(plan.segment_ids[segment]), row);
            continue;
          }
        }
        add_row(scratch.get(), width, row);
        continue;
      }
      pages.before_writing(address(place + 1));
      if constexpr (std::is_same_v<Out, Acc>) {
        sums.sum(segment, out + place * width);
      } else {
        sums.sum(segment, scratch.get());
        store_row(scratch.get(), width, out + place * width);
      }
    }
    write_zeros(place_end);
  });
}

template <class T, class Out>
void run(const Tensor& out, const Tensor& grad_rows, const Plan& plan, const std::optional<Tensor>& sources,
         const std::optional<Tensor>& weights, const Options& options, int64_t places) {
  const GradRows<T> rows{data<T>(grad_rows), grad_rows.stride(0), data<int32_t>(sources),
                         data<Accumulator<T>>(weights)};
  write_sums(rows, plan, grad_rows.size(1), options, places, mutable_data<Out>(out));
}

void embedding_grad(Tensor out, Tensor grad_rows, Tensor order, Tensor segment_ids, Tensor segment_offsets,
                    Tensor count, int64_t mode, std::optional<Tensor> sources, std::optional<Tensor> weights,
                    bool scale_by_freq, std::optional<Tensor> seed) {
  check_grad_arguments(
      {out, grad_rows, order, segment_ids, segment_offsets, count, mode, sources, weights, seed});
  Options options{GradMode(mode), scale_by_freq, std::nullopt};
  if (seed) options.seed = uint64_t(*data<int64_t>(*seed));
  Plan plan{data<int32_t>(order), data<int32_t>(segment_ids), data<int32_t>(segment_offsets), order.numel(),
            *data<int32_t>(count)};
  check_plan(plan);
  if (sources) check_sources(plan, data<int32_t>(*sources), grad_rows.size(0));

  const int64_t out_rows = out.size(0);
  int64_t places = out_rows;
  switch (options.mode) {
    case GradMode::kDense: check_segment_ids(plan, out_rows); break;
    case GradMode::kAccumulate:
      check_segment_ids(plan, out_rows);
      places = plan.count;
      break;
    case GradMode::kRows:
      plan.count = places = std::min(plan.count, out_rows);
      break;
    case GradMode::kPaddedRows: plan.count = std::min(plan.count, out_rows); break;
  }
  if (places == 0 || out.size(1) == 0) return;

  const auto with = [&]<class T, class Out>(std::type_identity<T>, std::type_identity<Out>) {
    run<T, Out>(out, grad_rows, plan, sources, weights, options, places);
  };
  constexpr std::type_identity<float> f32;
  constexpr std::type_identity<double> f64;
  constexpr std::type_identity<f16> half;
  constexpr std::type_identity<bf16> brain;
  const ScalarType to = out.scalar_type();
  switch (grad_rows.scalar_type()) {  // check_grad_arguments let no other pairs through
    case ScalarType::Double: with(f64, f64); break;
    case ScalarType::Half: to == ScalarType::Half ? with(half, half) : with(half, f32); break;
    case ScalarType::BFloat16: to == ScalarType::BFloat16 ? with(brain, brain) : with(brain, f32); break;
    default: to == ScalarType::Half ? with(f32, half) : to == ScalarType::Float ? with(f32, f32) : with(f32, brain);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(embedkernels_ext, CPU, library) {
  library.impl("embedding_grad", TORCH_BOX(&embedding_grad));
}

}  // namespace embedkernels::cpu
