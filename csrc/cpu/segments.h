// A plan, checked before it is used, and how the work on its segments is cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../checks.h"

namespace embedkernels::cpu {

constexpr int64_t kBlock = 512;  // rows summed one after the other

struct Plan {
  const int32_t *order, *segment_ids, *offsets;
  int64_t n, count;

  int64_t begin(int64_t segment) const { return offsets[segment]; }
  int64_t size(int64_t segment) const { return begin(segment + 1) - begin(segment); }
  // How many positions the segments before this one have. The offsets of a plan without segments mean nothing.
  int64_t positions_before(int64_t segment) const { return segment ? begin(segment) : 0; }
};

// The first i below `count` that is not fine, or `count`. Free of branches while all are.
template <class IsFine>
int64_t first_bad(int64_t count, const IsFine& is_fine) {
  bool all_fine = true;
  for (int64_t i = 0; i < count; ++i) all_fine &= is_fine(i);
  if (all_fine) return count;
  int64_t i = 0;
  while (is_fine(i)) ++i;
  return i;
}

// A plan is data from outside: nothing may be read or written out of bounds because of it.
inline void check_plan(const Plan& plan) {
  check(plan.count >= 0 && plan.count <= plan.n, "embedding_grad: count must be 0 to ", plan.n, ", got ", plan.count);
  check(plan.count == 0 || plan.offsets[0] == 0, "embedding_grad: segment_offsets must start with 0");
  const int64_t bad_offset = 1 + first_bad(plan.count, [&](int64_t s) {
    return bool((plan.offsets[s] < plan.offsets[s + 1]) & (plan.offsets[s + 1] <= plan.n));
  });
  if (bad_offset <= plan.count) {
    check(false, "embedding_grad: segment_offsets must ascend to at most ", plan.n, ", got ",
          plan.offsets[bad_offset], " at position ", bad_offset);
  }
  const int64_t kept = plan.positions_before(plan.count);
  const int64_t bad = first_bad(kept, [&](int64_t i) { return uint32_t(plan.order[i]) < uint32_t(plan.n); });
  if (bad < kept) {
    check(false, "embedding_grad: order must hold positions below ", plan.n, ", got ", plan.order[bad],
          " at position ", bad);
  }
}

inline void check_segment_ids(const Plan& plan, int64_t num_rows) {
  const int64_t bad = first_bad(plan.count, [&](int64_t s) {
    return bool((plan.segment_ids[s] > (s ? plan.segment_ids[s - 1] : -1)) & (plan.segment_ids[s] < num_rows));
  });
  if (bad < plan.count) {
    check(false, "embedding_grad: segment_ids must ascend within out's rows, 0 to ", num_rows - 1, ", got ",
          plan.segment_ids[bad], " at position ", bad);
  }
}

// `plan` has been checked.
inline void check_sources(const Plan& plan, const int32_t* sources, int64_t num_sources) {
  const int64_t kept = plan.positions_before(plan.count);
  const int64_t bad =
      first_bad(kept, [&](int64_t i) { return uint32_t(sources[plan.order[i]]) < uint32_t(num_sources); });
  if (bad < kept) {
    check(false, "embedding_grad: sources must be rows of grad_rows, 0 to ", num_sources - 1, ", got ",
          sources[plan.order[bad]], " at position ", plan.order[bad]);
  }
}

// The segments that are longer than a block. Their blocks are summed first, by all threads, so that one hot id does
// not leave the others idle.
class LongSegments {
 public:
  struct Block {
    int64_t begin, size;
  };

  explicit LongSegments(const Plan& plan) {
    int64_t saved = 0;
    for (int64_t s = 0; s < plan.count; ++s) {
      const int64_t size = plan.size(s);
      if (size <= kBlock) continue;
      const int64_t first_block = int64_t(blocks_.size());
      longs_.push_back({s, first_block, saved});
      for (int64_t i = 0; i < size; i += kBlock) blocks_.push_back({plan.begin(s) + i, std::min(kBlock, size - i)});
      saved += size - (int64_t(blocks_.size()) - first_block);
    }
    longs_.push_back({plan.count, int64_t(blocks_.size()), saved});
  }

  const std::vector<Block>& blocks() const { return blocks_; }

  // The first block of a segment and the one after its last; equal for a segment that has none.
  std::pair<int64_t, int64_t> blocks_of(int64_t segment) const {
    const auto found = from(segment);
    return {found->first_block, found->segment == segment ? found[1].first_block : found->first_block};
  }

  // How many rows fewer are left to read for the segments before this one, when block sums take the place of rows.
  int64_t saved_before(int64_t segment) const { return from(segment)->saved; }

 private:
  struct Long {
    int64_t segment, first_block, saved;
  };

  std::vector<Long>::const_iterator from(int64_t segment) const {
    return std::lower_bound(longs_.begin(), longs_.end(), segment,
                            [](const Long& entry, int64_t value) { return entry.segment < value; });
  }

  std::vector<Long> longs_;  // ascending, and one past the last segment
  std::vector<Block> blocks_;
};

// Places of the output in ascending order, some of them a segment's, cut into stretches of equal cost, counted in rows
// moved: one for each place written, one for each row or block sum read.
class Stretches {
 public:
  // by_row: segment s has place segment_ids[s]; otherwise place s.
  Stretches(const Plan& plan, const LongSegments& longs, bool by_row, int64_t places)
      : plan_(plan), longs_(longs), by_row_(by_row), places_(places) {}

  int64_t place(int64_t segment) const { return by_row_ ? plan_.segment_ids[segment] : segment; }

  int64_t total() const { return cost_before(plan_.count) + places_ - gap_before(plan_.count); }

  // Where a stretch that starts at `cost` begins: the first place, and the first segment that is not before it.
  std::pair<int64_t, int64_t> at(int64_t cost) const {
    if (cost >= total()) return {places_, plan_.count};
    int64_t s = 0;  // the last segment whose part starts at `cost` or before it
    for (int64_t end = plan_.count + 1; end - s > 1;) {
      const int64_t middle = s + (end - s) / 2;
      (cost_before(middle) <= cost ? s : end) = middle;
    }
    const int64_t reached = gap_before(s) + cost - cost_before(s);
    if (s == plan_.count || reached <= place(s)) return {reached, s};
    return {place(s) + 1, s + 1};
  }

 private:
  // The place after the segment before: the gap of places without a segment starts here.
  int64_t gap_before(int64_t segment) const { return segment ? place(segment - 1) + 1 : 0; }

  int64_t cost_before(int64_t segment) const {
    return gap_before(segment) + plan_.positions_before(segment) - longs_.saved_before(segment);
  }

  const Plan& plan_;
  const LongSegments& longs_;
  bool by_row_;
  int64_t places_;
};

}  // namespace embedkernels::cpu
