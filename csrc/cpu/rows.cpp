#include "rows.h"

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
EK_INLINE void sum_rows_of(const T* __restrict rows, const int32_t* __restrict order, int64_t count, int64_t width,
                           Accumulator<T>* __restrict total) {
  const auto row = [=](int64_t i) { return rows + int64_t(order[i]) * width; };
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
EK_INLINE void store_row_of(const float* __restrict total, int64_t width, T* __restrict out) {
  for (int64_t d = 0; d < width; ++d) out[d] = narrow<T>(total[d]);
}

}  // namespace

EK_CLONES void sum_rows(const float* rows, const int32_t* order, int64_t count, int64_t width, float* total) {
  sum_rows_of(rows, order, count, width, total);
}
EK_CLONES void sum_rows(const double* rows, const int32_t* order, int64_t count, int64_t width, double* total) {
  sum_rows_of(rows, order, count, width, total);
}
EK_CLONES void sum_rows(const bf16* rows, const int32_t* order, int64_t count, int64_t width, float* total) {
  sum_rows_of(rows, order, count, width, total);
}
EK_CLONES void sum_rows(const f16* rows, const int32_t* order, int64_t count, int64_t width, float* total) {
  sum_rows_of(rows, order, count, width, total);
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
EK_CLONES void store_row(const float* total, int64_t width, bf16* out) { store_row_of(total, width, out); }
EK_CLONES void store_row(const float* total, int64_t width, f16* out) { store_row_of(total, width, out); }

}  // namespace embedkernels::cpu
