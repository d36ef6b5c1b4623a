// What a plan is made of, and how many bits of it matter.
#pragma once

#include "portable.cuh"

namespace embedkernels::cuda {

template <class Id>
struct PlanIds {
  const Id* ids;        // (N)
  const bool* ignored;  // (N), true where a position is dropped, or null
  int64_t padding_idx;
  int64_t vocab_start;
  uint32_t num_rows;

  // The row of a position, num_rows if it is dropped.
  EK_DEVICE uint32_t row(int64_t i) const {
    const int64_t id = ids[i];
    // Unsigned: an id below vocab_start wraps to a number above every row.
    const uint64_t local = uint64_t(id) - uint64_t(vocab_start);
    const bool kept = local < num_rows && id != padding_idx && !(ignored && ignored[i]);
    return kept ? uint32_t(local) : num_rows;
  }
};

// Bits that tell 0 to `largest` apart, at least one.
inline int bits_for(int64_t largest) {
  int bits = 1;
  while (bits < 32 && (largest >> bits) != 0) ++bits;
  return bits;
}

// num_rows is the key of dropped ids, and sorts last.
inline int key_bits(int64_t num_rows) { return bits_for(num_rows); }

}  // namespace embedkernels::cuda
