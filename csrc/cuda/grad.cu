// embedding_grad_dense on CUDA.
#include <torch/csrc/stable/library.h>

#include "grad_steps.h"
#include "launcher.h"

namespace embedkernels::cuda {
namespace {

template <class T, int V>
void reduce(const Tensor& grad_rows, const PlanView& plan, const Tensor& out) {
  const GradShape shape = grad_shape_of<T, V>(grad_rows.size(0), out.size(0), out.size(1));
  const ScalarType wide = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor partials = empty_like_device(out, {2 * shape.tiles * shape.width}, wide);
  const Tensor tails = empty_like_device(out, {2 * shape.tiles}, ScalarType::Int);
  static_assert(sizeof(Tail) == 2 * sizeof(int));
  Launcher launcher("embedding_grad_dense", out);
  run_grad<Launcher, T, V>(launcher, data<T>(grad_rows), plan, mutable_data<T>(out),
                           mutable_data<Accumulator<T>>(partials), mutable_data<Tail>(tails), shape);
}

template <class T>
void reduce(const Tensor& grad_rows, const PlanView& plan, const Tensor& out) {
  if (vectors_fit(data<T>(grad_rows), data<T>(out), out.size(1))) {
    reduce<T, kVector<T>>(grad_rows, plan, out);
  } else {
    reduce<T, 1>(grad_rows, plan, out);
  }
}

Tensor embedding_grad_dense(const Tensor& grad_rows, const Tensor& order, const Tensor& segment_ids,
                            const Tensor& segment_offsets, const Tensor& count, int64_t num_rows) {
  check_grad_arguments(grad_rows, order, segment_ids, segment_offsets, count, num_rows);
  const Tensor out = empty_like_device(grad_rows, {num_rows, grad_rows.size(1)}, grad_rows.scalar_type());
  if (out.numel() == 0) return out;
  const PlanView plan{data<int>(order), data<int>(segment_ids), data<int>(segment_offsets), data<int>(count)};
  switch (grad_rows.scalar_type()) {
    case ScalarType::Float: reduce<float>(grad_rows, plan, out); break;
    case ScalarType::Double: reduce<double>(grad_rows, plan, out); break;
    case ScalarType::Half: reduce<f16>(grad_rows, plan, out); break;
    default: reduce<bf16>(grad_rows, plan, out); break;  // check_grad_arguments let nothing else through
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(embedkernels_ext, CUDA, library) {
  library.impl("embedding_grad_dense", TORCH_BOX(&embedding_grad_dense));
}

}  // namespace embedkernels::cuda
