#include "rows.h"

#include <algorithm>
#include <cstring>

// One copy of each loop for AVX2 machines and one for all others, chosen when the library is loaded. The additions of
// one element are never reordered or fused, so both give the same bits.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define EK_CLONES __attribute__((target_clones("avx2", "default")))
#define EK_INLINE __attribute__((always_inline)) inline
#else
#define EK_CLONES
#define EK_INLINE inline
#endif

namespace embedkernels::cpu {
namespace {

template <class T>
EK_INLINE void sum_plain(const GradRows<T>& rows, const int32_t* __restrict order, int64_t count, int64_t width,
                         Accumulator<T>* __restrict total) {
  const auto row = [&](int64_t i) { return rows.at(order[i]); };
  int64_t done = 1;
  if (count >= 2) {
    const T *a = row(0), *b = row(1);
    for (int64_t d = 0; d < width; ++d) total[d] = widen(a[d]) + widen(b[d]);
    done = 2;
  } else {
    const T* a = row(0);
    for (int64_t d = 0; d < width; ++d) total[d] = widen(a[d]);
  }
  // Four rows for one trip of the running total through the cache.
  for (; done + 4 <= count; done += 4) {
    const T *a = row(done), *b = row(done + 1), *c = row(done + 2), *e = row(done + 3);
    for (int64_t d = 0; d < width; ++d) {
      total[d] = (((total[d] + widen(a[d])) + widen(b[d])) + widen(c[d])) + widen(e[d]);
    }
  }
  for (; done < count; ++done) {
    const T* a = row(done);
    for (int64_t d = 0; d < width; ++d) total[d] += widen(a[d]);
  }
}

template <class T>
EK_INLINE void sum_weighted(const GradRows<T>& rows, const int32_t* __restrict order, int64_t count, int64_t width,
                            Accumulator<T>* __restrict total) {
  using Acc = Accumulator<T>;
  const auto row = [&](int64_t i) { return rows.at(order[i]); };
  const auto weight = [&](int64_t i) { return rows.weights[order[i]]; };
  const T* first = row(0);
  const Acc first_weight = weight(0);
  for (int64_t d = 0; d < width; ++d) total[d] = first_weight * widen(first[d]);
  int64_t done = 1;
  for (; done + 4 <= count; done += 4) {
    const T *a = row(done), *b = row(done + 1), *c = row(done + 2), *e = row(done + 3);
    const Acc p = weight(done), q = weight(done + 1), r = weight(done + 2), s = weight(done + 3);
    for (int64_t d = 0; d < width; ++d) {
      total[d] = (((total[d] + p * widen(a[d])) + q * widen(b[d])) + r * widen(c[d])) + s * widen(e[d]);
    }
  }
  for (; done < count; ++done) {
    const T* a = row(done);
    const Acc p = weight(done);
    for (int64_t d = 0; d < width; ++d) total[d] += p * widen(a[d]);
  }
}

template <class T>
EK_INLINE void sum_rows_of(const GradRows<T>& rows, const int32_t* order, int64_t count, int64_t width,
                           Accumulator<T>* total) {
  if (rows.weights) {
    sum_weighted(rows, order, count, width, total);
  } else {
    sum_plain(rows, order, count, width, total);
  }
}

template <class Acc>
EK_INLINE void add_to_total_of(const Acc* __restrict row, int64_t width, Acc* __restrict total) {
  for (int64_t d = 0; d < width; ++d) total[d] += row[d];
}

template <class Acc>
EK_INLINE void scale_total_of(Acc factor, int64_t width, Acc* total) {
  for (int64_t d = 0; d < width; ++d) total[d] *= factor;
}

template <class T>
EK_INLINE void store_row_of(const float* __restrict total, int64_t width, T* __restrict out) {
  for (int64_t d = 0; d < width; ++d) out[d] = narrow<T>(total[d]);
}

template <class T>
EK_INLINE void add_row_of(const Accumulator<T>* __restrict total, int64_t width, T* __restrict out) {
  for (int64_t d = 0; d < width; ++d) out[d] = narrow<T>(widen(out[d]) + total[d]);
}

constexpr int64_t kGroup = 8;    // columns that share the words of one counter
constexpr int64_t kGroups = 64;  // counters at a time

// Three loops, each of which vectorises; one loop for all would not.
EK_INLINE void add_row_stochastic_of(const float* __restrict total, int64_t width, uint64_t seed, uint32_t row,
                                     bf16* __restrict out) {
  PhiloxWords words[kGroups];
  uint16_t random[kGroups * kGroup];
  for (int64_t begin = 0; begin < width; begin += kGroups * kGroup) {
    const int64_t columns = std::min(kGroups * kGroup, width - begin);
    const int64_t groups = (columns + kGroup - 1) / kGroup;
    for (int64_t g = 0; g < groups; ++g) words[g] = philox(seed, uint32_t(begin / kGroup + g), row);
    for (int64_t g = 0; g < groups; ++g) {
      for (int d = 0; d < kGroup; ++d) random[g * kGroup + d] = uint16_t(rounding_bits(words[g], d));
    }
    for (int64_t d = 0; d < columns; ++d) {
      out[begin + d] = narrow_stochastic(widen(out[begin + d]) + total[begin + d], random[d]);
    }
  }
}

}  // namespace

EK_CLONES void sum_rows(const GradRows<float>& rows, const int32_t* order, int64_t count, int64_t width,
                        float* total) {
  sum_rows_of(rows, order, count, width, total);
}
EK_CLONES void sum_rows(const GradRows<double>& rows, const int32_t* order, int64_t count, int64_t width,
                        double* total) {
  sum_rows_of(rows, order, count, width, total);
}
EK_CLONES void sum_rows(const GradRows<bf16>& rows, const int32_t* order, int64_t count, int64_t width,
                        float* total) {
  sum_rows_of(rows, order, count, width, total);
}
EK_CLONES void sum_rows(const GradRows<f16>& rows, const int32_t* order, int64_t count, int64_t width, float* total) {
  sum_rows_of(rows, order, count, width, total);
}

EK_CLONES void add_to_total(const float* row, int64_t width, float* total) { add_to_total_of(row, width, total); }
EK_CLONES void add_to_total(const double* row, int64_t width, double* total) { add_to_total_of(row, width, total); }
EK_CLONES void scale_total(float factor, int64_t width, float* total) { scale_total_of(factor, width, total); }
EK_CLONES void scale_total(double factor, int64_t width, double* total) { scale_total_of(factor, width, total); }

EK_CLONES void store_row(const float* total, int64_t width, bf16* out) { store_row_of(total, width, out); }
EK_CLONES void store_row(const float* total, int64_t width, f16* out) { store_row_of(total, width, out); }

EK_CLONES void add_row(const float* total, int64_t width, float* out) { add_row_of(total, width, out); }
EK_CLONES void add_row(const double* total, int64_t width, double* out) { add_row_of(total, width, out); }
EK_CLONES void add_row(const float* total, int64_t width, bf16* out) { add_row_of(total, width, out); }
EK_CLONES void add_row(const float* total, int64_t width, f16* out) { add_row_of(total, width, out); }
EK_CLONES void add_row_stochastic(const float* total, int64_t width, uint64_t seed, uint32_t row, bf16* out) {
  add_row_stochastic_of(total, width, seed, row, out);
}

EK_CLONES void store_zeros(void* out, int64_t bytes) {
  using Line [[gnu::vector_size(64), gnu::aligned(1), gnu::may_alias]] = char;
  char* to = static_cast<char*>(out);
  for (; bytes >= int64_t(sizeof(Line)); bytes -= sizeof(Line), to += sizeof(Line)) {
    *reinterpret_cast<Line*>(to) = Line{};
    // Otherwise the compiler makes one large memset of the loop.
    asm volatile("" : : "r"(to) : "memory");
  }
  std::memset(to, 0, bytes);
}

}  // namespace embedkernels::cpu
