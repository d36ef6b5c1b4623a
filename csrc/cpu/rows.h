// Sums of gradient rows and what becomes of them, vectorised over D.
#pragma once

#include <cstdint>

#include "../numeric.h"

namespace embedkernels::cpu {

// The gradient row of every position, and its weight.
template <class T>
struct GradRows {
  const T* data;
  int64_t stride;                 // elements from row to row
  const int32_t* sources;         // the row of each position, null for the row of the same number
  const Accumulator<T>* weights;  // of each position, null for 1

  const T* at(int32_t position) const { return data + (sources ? sources[position] : position) * stride; }
};

// total[d] = row(order[0])[d] + row(order[1])[d] + ..., one after the other, for count >= 1; a weighted row is
// rounded before it is added.
void sum_rows(const GradRows<float>& rows, const int32_t* order, int64_t count, int64_t width, float* total);
void sum_rows(const GradRows<double>& rows, const int32_t* order, int64_t count, int64_t width, double* total);
void sum_rows(const GradRows<bf16>& rows, const int32_t* order, int64_t count, int64_t width, float* total);
void sum_rows(const GradRows<f16>& rows, const int32_t* order, int64_t count, int64_t width, float* total);

// total[d] += row[d], and total[d] *= factor.
void add_to_total(const float* row, int64_t width, float* total);
void add_to_total(const double* row, int64_t width, double* total);
void scale_total(float factor, int64_t width, float* total);
void scale_total(double factor, int64_t width, double* total);

// out[d] = total[d], rounded to nearest even.
void store_row(const float* total, int64_t width, bf16* out);
void store_row(const float* total, int64_t width, f16* out);

// out[d] += total[d], rounded once, to nearest even.
void add_row(const float* total, int64_t width, float* out);
void add_row(const double* total, int64_t width, double* out);
void add_row(const float* total, int64_t width, bf16* out);
void add_row(const float* total, int64_t width, f16* out);

// out[d] += total[d], rounded up or down by the random bits of the table's row `row`.
void add_row_stochastic(const float* total, int64_t width, uint64_t seed, uint32_t row, bf16* out);

// Zeros. Plain stores, because the pages are mostly fresh: the system has just cleared them and they are in the cache,
// which memset's non-temporal stores would go around.
void store_zeros(void* out, int64_t bytes);

}  // namespace embedkernels::cpu
