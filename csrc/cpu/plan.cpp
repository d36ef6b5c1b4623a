// The plan on the CPU: a stable radix sort of the kept ids, then the segments of equal ids.
//
// Least significant digit first, at most 11 bits a pass (two passes for any vocabulary up to 4M rows). Every pass
// counts digits per task and moves each task's elements in order, so the result is the one stable order whatever the
// number of threads. Dropped ids leave in the first pass. Key and position travel together in 64 bits.
#include <torch/csrc/stable/library.h>

#include <bit>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "parallel.h"

namespace embedkernels::cpu {
namespace {

constexpr int kMaxDigitBits = 11;
constexpr int64_t kGrain = 32768;  // ids per task: 0.2 ms, below which a second thread costs more than it brings

using Pair = uint64_t;  // key << 32 | position

inline uint32_t key_of(Pair pair) { return uint32_t(pair >> 32); }

struct Digits {
  int shift;
  uint32_t mask;
  uint32_t operator()(uint32_t key) const { return (key >> shift) & mask; }
};

// Turns counts[task][digit] into the place where that task's first element of that digit goes; returns the total.
int64_t places_from_counts(std::vector<int32_t>& counts, int64_t tasks, int64_t digits) {
  int64_t place = 0;
  for (int64_t digit = 0; digit < digits; ++digit) {
    for (int64_t task = 0; task < tasks; ++task) {
      int32_t& entry = counts[task * digits + digit];
      const int32_t here = entry;
      entry = int32_t(place);
      place += here;
    }
  }
  return place;
}

// One pass over [0, total): visit(i, emit) calls emit(key, pair) for elements to keep. Returns how many there were.
template <class Visit>
int64_t radix_pass(int64_t total, int64_t tasks, Digits digit_of, Pair* out, const Visit& visit) {
  const int64_t digits = int64_t(digit_of.mask) + 1;
  std::vector<int32_t> counts(tasks * digits, 0);
  run_tasks(tasks, [&](int64_t task) {
    int32_t* count = counts.data() + task * digits;
    const int64_t end = part_begin(total, tasks, task + 1);
    for (int64_t i = part_begin(total, tasks, task); i < end; ++i) {
      visit(i, [&](uint32_t key, Pair) { ++count[digit_of(key)]; });
    }
  });
  const int64_t kept = places_from_counts(counts, tasks, digits);
  run_tasks(tasks, [&](int64_t task) {
    int32_t* place = counts.data() + task * digits;
    const int64_t end = part_begin(total, tasks, task + 1);
    for (int64_t i = part_begin(total, tasks, task); i < end; ++i) {
      visit(i, [&](uint32_t key, Pair pair) { out[place[digit_of(key)]++] = pair; });
    }
  });
  return kept;
}

// Writes order, segment ids and offsets from the sorted pairs; returns the number of segments.
int64_t write_segments(const Pair* pairs, int64_t kept, int32_t* order, int32_t* segment_ids, int32_t* offsets) {
  const int64_t tasks = task_count(kept, kGrain);
  std::vector<int64_t> heads(tasks + 1, 0);
  const auto is_head = [&](int64_t i) { return i == 0 || key_of(pairs[i]) != key_of(pairs[i - 1]); };
  run_tasks(tasks, [&](int64_t task) {
    int64_t found = 0;
    const int64_t end = part_begin(kept, tasks, task + 1);
    for (int64_t i = part_begin(kept, tasks, task); i < end; ++i) found += is_head(i);
    heads[task + 1] = found;
  });
  for (int64_t task = 0; task < tasks; ++task) heads[task + 1] += heads[task];
  run_tasks(tasks, [&](int64_t task) {
    int64_t segment = heads[task];
    const int64_t end = part_begin(kept, tasks, task + 1);
    for (int64_t i = part_begin(kept, tasks, task); i < end; ++i) {
      order[i] = int32_t(uint32_t(pairs[i]));
      if (is_head(i)) {
        segment_ids[segment] = int32_t(key_of(pairs[i]));
        offsets[segment] = int32_t(i);
        ++segment;
      }
    }
  });
  offsets[heads[tasks]] = int32_t(kept);
  return heads[tasks];
}

// is_ignored(i): whether position i is dropped whatever its id.
template <class Id, class IsIgnored>
int64_t make_plan(const Id* ids, int64_t n, int64_t num_rows, int64_t padding_idx, int64_t vocab_start,
                  const IsIgnored& is_ignored, int32_t* order, int32_t* segment_ids, int32_t* offsets) {
  // Unsigned, so that an id far below vocab_start wraps to a large number instead of overflowing.
  const uint64_t start = uint64_t(vocab_start), rows = uint64_t(num_rows);
  const auto from_ids = [=](int64_t i, const auto& emit) {
    const int64_t id = ids[i];
    const uint64_t local = uint64_t(id) - start;
    if (local < rows && id != padding_idx && !is_ignored(i)) emit(uint32_t(local), Pair(local << 32) | Pair(i));
  };

  const int bits = std::max(1, int(std::bit_width(uint32_t(std::max<int64_t>(num_rows - 1, 0)))));
  const int passes = (bits + kMaxDigitBits - 1) / kMaxDigitBits;
  const int digit_bits = (bits + passes - 1) / passes;
  const uint32_t mask = (1u << digit_bits) - 1;

  const auto storage = std::make_unique_for_overwrite<Pair[]>(2 * n);
  Pair *from = storage.get() + n, *to = storage.get();
  int64_t kept = radix_pass(n, task_count(n, kGrain), Digits{0, mask}, to, from_ids);
  for (int pass = 1; pass < passes; ++pass) {
    std::swap(from, to);
    const Pair* sorted = from;
    radix_pass(kept, task_count(kept, kGrain), Digits{pass * digit_bits, mask}, to,
               [=](int64_t i, const auto& emit) { emit(key_of(sorted[i]), sorted[i]); });
  }
  return write_segments(to, kept, order, segment_ids, offsets);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> embedding_plan(const Tensor& ids, int64_t num_rows, int64_t padding_idx,
                                                          int64_t vocab_start, std::optional<Tensor> ignored) {
  check_plan_arguments(ids, num_rows, padding_idx, vocab_start, ignored);
  const int64_t n = ids.numel();
  Tensor order = empty_like_device(ids, {n}, ScalarType::Int);
  Tensor segment_ids = empty_like_device(ids, {n}, ScalarType::Int);
  Tensor offsets = empty_like_device(ids, {n + 1}, ScalarType::Int);
  Tensor count = empty_like_device(ids, {1}, ScalarType::Int);
  const auto make = [&](const auto& is_ignored) {
    const auto make_typed = [&](const auto* typed_ids) {
      return make_plan(typed_ids, n, num_rows, padding_idx, vocab_start, is_ignored, mutable_data<int32_t>(order),
                       mutable_data<int32_t>(segment_ids), mutable_data<int32_t>(offsets));
    };
    return ids.scalar_type() == ScalarType::Int ? make_typed(data<int32_t>(ids)) : make_typed(data<int64_t>(ids));
  };
  // Bytes, not bools: a view of another dtype may hold more than 0 and 1.
  const uint8_t* mask = data<uint8_t>(ignored);
  const int64_t segments =
      mask ? make([=](int64_t i) { return mask[i] != 0; }) : make([](int64_t) { return false; });
  *mutable_data<int32_t>(count) = int32_t(segments);
  return {order, segment_ids, offsets, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(embedkernels_ext, CPU, library) {
  library.impl("embedding_plan", TORCH_BOX(&embedding_plan));
}

}  // namespace embedkernels::cpu
