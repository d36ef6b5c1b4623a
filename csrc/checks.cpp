#include "checks.h"

#include <string>

namespace embedkernels {
namespace {

void check_plan_tensor(const char* name, const Tensor& tensor, int64_t expected, const Tensor& grad_rows) {
  check(tensor.scalar_type() == ScalarType::Int, "embedding_grad_dense: ", name, " must be int32");
  check(tensor.dim() == 1 && tensor.numel() == expected, "embedding_grad_dense: ", name, " must have shape (", expected,
        ",), got ", shape_of(tensor));
  check(tensor.is_contiguous(), "embedding_grad_dense: ", name, " must be contiguous");
  check(tensor.is_cuda() == grad_rows.is_cuda() && tensor.get_device_index() == grad_rows.get_device_index(),
        "embedding_grad_dense: ", name, " must be on the device of grad_rows");
}

bool is_supported_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

}  // namespace

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) text << (axis ? ", " : "") << tensor.size(axis);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

void check_plan_arguments(const Tensor& ids, int64_t num_rows, int64_t padding_idx, int64_t vocab_start) {
  const ScalarType dtype = ids.scalar_type();
  check(dtype == ScalarType::Int || dtype == ScalarType::Long, "embedding_plan: ids must be int32 or int64");
  check(ids.is_contiguous(), "embedding_plan: ids must be contiguous");
  check(ids.numel() <= kMaxInt32, "embedding_plan: ids has ", ids.numel(), " elements, at most ", kMaxInt32,
        " are supported");
  check(num_rows >= 0 && num_rows <= kMaxInt32, "embedding_plan: num_rows must be 0 to ", kMaxInt32, ", got ",
        num_rows);
  check(padding_idx >= -1, "embedding_plan: padding_idx must be an id, or -1 for none, got ", padding_idx);
  check(vocab_start >= 0 && vocab_start <= INT64_MAX - num_rows,
        "embedding_plan: vocab_start must be 0 to 2^63 - 1 - num_rows, got ", vocab_start);
}

void check_grad_arguments(const Tensor& grad_rows, const Tensor& order, const Tensor& segment_ids,
                          const Tensor& segment_offsets, const Tensor& count, int64_t num_rows) {
  check(grad_rows.dim() == 2, "embedding_grad_dense: grad_rows must have shape (N, D), got ", shape_of(grad_rows));
  check(is_supported_float(grad_rows.scalar_type()),
        "embedding_grad_dense: grad_rows must be float32, float64, float16 or bfloat16");
  check(grad_rows.is_contiguous(), "embedding_grad_dense: grad_rows must be contiguous");
  const int64_t n = grad_rows.size(0);
  check(n <= kMaxInt32, "embedding_grad_dense: grad_rows has ", n, " rows, at most ", kMaxInt32, " are supported");
  check_plan_tensor("order", order, n, grad_rows);
  check_plan_tensor("segment_ids", segment_ids, n, grad_rows);
  check_plan_tensor("segment_offsets", segment_offsets, n + 1, grad_rows);
  check_plan_tensor("count", count, 1, grad_rows);
  check(num_rows >= 0 && num_rows <= kMaxInt32, "embedding_grad_dense: num_rows must be 0 to ", kMaxInt32, ", got ",
        num_rows);
}

}  // namespace embedkernels
