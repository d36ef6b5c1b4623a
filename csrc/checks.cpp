#include "checks.h"

#include <string>

#include "grad_mode.h"

namespace embedkernels {
namespace {

void check_part(const char* name, const Tensor& tensor, ScalarType dtype, const char* dtype_name, int64_t expected,
                const Tensor& grad_rows) {
  check(tensor.scalar_type() == dtype, "embedding_grad: ", name, " must be ", dtype_name);
  check(tensor.dim() == 1 && tensor.numel() == expected, "embedding_grad: ", name, " must have shape (", expected,
        ",), got ", shape_of(tensor));
  check(tensor.is_contiguous(), "embedding_grad: ", name, " must be contiguous");
  check(tensor.is_cuda() == grad_rows.is_cuda() && tensor.get_device_index() == grad_rows.get_device_index(),
        "embedding_grad: ", name, " must be on the device of grad_rows");
}

bool is_16_bit(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

bool is_supported_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || is_16_bit(dtype);
}

}  // namespace

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) text << (axis ? ", " : "") << tensor.size(axis);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

void check_plan_arguments(const Tensor& ids, int64_t num_rows, int64_t padding_idx, int64_t vocab_start,
                          const std::optional<Tensor>& ignored) {
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
  if (!ignored) return;
  check(ignored->scalar_type() == ScalarType::Bool, "embedding_plan: ignored must be bool");
  check(ignored->is_contiguous() && ignored->numel() == ids.numel(),
        "embedding_plan: ignored must be contiguous with one element for each of the ", ids.numel(), " ids, got ",
        shape_of(*ignored));
  check(ignored->is_cuda() == ids.is_cuda() && ignored->get_device_index() == ids.get_device_index(),
        "embedding_plan: ignored must be on the device of ids");
}

void check_grad_arguments(const GradArguments& given) {
  const Tensor &out = given.out, &grad_rows = given.grad_rows;
  check(grad_rows.dim() == 2, "embedding_grad: grad_rows must have shape (R, D), got ", shape_of(grad_rows));
  const ScalarType from = grad_rows.scalar_type(), to = out.scalar_type();
  check(is_supported_float(from), "embedding_grad: grad_rows must be float32, float64, float16 or bfloat16");
  check(grad_rows.size(1) <= 1 || grad_rows.stride(1) == 1, "embedding_grad: the elements of a row must be neighbours");
  check(grad_rows.size(0) <= kMaxInt32, "embedding_grad: grad_rows has ", grad_rows.size(0), " rows, at most ",
        kMaxInt32, " are supported");
  check(out.dim() == 2 && out.size(1) == grad_rows.size(1), "embedding_grad: out must have rows of ", grad_rows.size(1),
        " elements, got shape ", shape_of(out));
  check(out.is_contiguous(), "embedding_grad: out must be contiguous");
  check(out.size(0) <= kMaxInt32, "embedding_grad: out has ", out.size(0), " rows, at most ", kMaxInt32,
        " are supported");
  check(out.is_cuda() == grad_rows.is_cuda() && out.get_device_index() == grad_rows.get_device_index(),
        "embedding_grad: out must be on the device of grad_rows");
  const bool wider = is_16_bit(from) && to == ScalarType::Float, narrower = from == ScalarType::Float && is_16_bit(to);
  check(to == from || wider || narrower,
        "embedding_grad: out must be of grad_rows' dtype, or one of them float32 and the other float16 or bfloat16");
  const int64_t n = given.order.numel();
  check_part("order", given.order, ScalarType::Int, "int32", n, grad_rows);
  check_part("segment_ids", given.segment_ids, ScalarType::Int, "int32", n, grad_rows);
  check_part("segment_offsets", given.segment_offsets, ScalarType::Int, "int32", n + 1, grad_rows);
  check_part("count", given.count, ScalarType::Int, "int32", 1, grad_rows);
  check(given.mode >= int64_t(GradMode::kDense) && given.mode <= int64_t(GradMode::kPaddedRows),
        "embedding_grad: mode must be 0 to 3, got ", given.mode);
  if (given.sources) {
    check_part("sources", *given.sources, ScalarType::Int, "int32", n, grad_rows);
  } else {
    check(grad_rows.size(0) == n, "embedding_grad: grad_rows must have one row for each of the ", n, " ids, got shape ",
          shape_of(grad_rows));
  }
  if (given.weights) {
    const bool wide = from == ScalarType::Double;
    check_part("weights", *given.weights, wide ? ScalarType::Double : ScalarType::Float, wide ? "float64" : "float32",
               n, grad_rows);
  }
  if (given.seed) {
    check_part("seed", *given.seed, ScalarType::Long, "int64", 1, grad_rows);
    check(given.mode == int64_t(GradMode::kAccumulate) && to == ScalarType::BFloat16,
          "embedding_grad: stochastic rounding is for sums that are added to bfloat16");
  }
}

}  // namespace embedkernels
