// Sums of gradient rows, vectorised over D.
#pragma once

#include <cstdint>

#include "../numeric.h"

namespace embedkernels::cpu {

// total[d] = rows[order[0]][d] + rows[order[1]][d] + ..., one after the other, for count >= 1.
void sum_rows(const float* rows, const int32_t* order, int64_t count, int64_t width, float* total);
void sum_rows(const double* rows, const int32_t* order, int64_t count, int64_t width, double* total);
void sum_rows(const bf16* rows, const int32_t* order, int64_t count, int64_t width, float* total);
void sum_rows(const f16* rows, const int32_t* order, int64_t count, int64_t width, float* total);

// out[d] = total[d], rounded to nearest even.
void store_row(const float* total, int64_t width, bf16* out);
void store_row(const float* total, int64_t width, f16* out);

// Zeros. Plain stores, because the pages are mostly fresh: the system has just cleared them and they are in the cache,
// which memset's non-temporal stores would go around.
void store_zeros(void* out, int64_t bytes);

}  // namespace embedkernels::cpu
