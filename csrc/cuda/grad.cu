// embedding_grad on CUDA.
#include <torch/csrc/stable/library.h>

#include "grad_steps.h"
#include "launcher.h"

namespace embedkernels::cuda {
namespace {

constexpr const char* kOp = "embedding_grad";

struct Call {
  const Tensor &out, &grad_rows;
  PlanView plan;
  int64_t n;
  GradMode mode;
  const std::optional<Tensor>&sources, &weights;
  bool scale_by_freq;
  const std::optional<Tensor>& seed;
};

template <int V, class T, class O>
void reduce(const Call& call, const GradRows<T>& rows, const GradOutput<O>& out) {
  const GradShape shape = grad_shape_of<O, V>(call.n, out.rows, call.out.size(1), call.mode);
  const ScalarType wide = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor partials = empty_like_device(call.out, {2 * shape.strips * shape.width}, wide);
  const Tensor tails = empty_like_device(call.out, {3 * shape.strips}, ScalarType::Int);
  static_assert(sizeof(Tail) == 3 * sizeof(int));
  Launcher launcher(kOp, call.out);
  run_grad<V>(launcher, rows, call.plan, out,
              GradWorkspace<Accumulator<T>>{mutable_data<Accumulator<T>>(partials), mutable_data<Tail>(tails)}, shape);
}

template <class T, class O>
void reduce(const Call& call) {
  const int64_t count = call.grad_rows.size(0);
  const GradRows<T> rows{data<T>(call.grad_rows), count, count > 1 ? call.grad_rows.stride(0) : 0,
                         data<int>(call.sources), data<Accumulator<T>>(call.weights)};
  const GradOutput<O> out{mutable_data<Stored<O>>(call.out), call.out.size(0), call.mode, call.scale_by_freq,
                          data<int64_t>(call.seed)};
  if (vectors_fit(rows, out, call.out.size(1))) {
    reduce<kGradVector<T, O>>(call, rows, out);
  } else {
    reduce<1>(call, rows, out);
  }
}

template <class T>
void reduce_16_bit(const Call& call) {
  if (call.out.scalar_type() == ScalarType::Float) return reduce<T, float>(call);
  if constexpr (std::is_same_v<T, bf16>) {
    if (call.seed) return reduce<bf16, StochasticBf16>(call);
  }
  reduce<T, T>(call);
}

void reduce_float(const Call& call) {
  switch (call.out.scalar_type()) {
    case ScalarType::Float: return reduce<float, float>(call);
    case ScalarType::Half: return reduce<float, f16>(call);
    default: return call.seed ? reduce<float, StochasticBf16>(call) : reduce<float, bf16>(call);
  }
}

void embedding_grad(const Tensor& out, const Tensor& grad_rows, const Tensor& order, const Tensor& segment_ids,
                    const Tensor& segment_offsets, const Tensor& count, int64_t mode,
                    const std::optional<Tensor>& sources, const std::optional<Tensor>& weights, bool scale_by_freq,
                    const std::optional<Tensor>& seed) {
  check_grad_arguments(
      {out, grad_rows, order, segment_ids, segment_offsets, count, mode, sources, weights, seed});
  if (out.numel() == 0) return;
  const PlanView plan{data<int>(order), data<int>(segment_ids), data<int>(segment_offsets), data<int>(count)};
  const Call call{out, grad_rows, plan, order.numel(), GradMode(mode), sources, weights, scale_by_freq, seed};
  switch (grad_rows.scalar_type()) {
    case ScalarType::Float: return reduce_float(call);
    case ScalarType::Double: return reduce<double, double>(call);
    case ScalarType::Half: return reduce_16_bit<f16>(call);
    default: return reduce_16_bit<bf16>(call);  // check_grad_arguments let nothing else through
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(embedkernels_ext, CUDA, library) {
  library.impl("embedding_grad", TORCH_BOX(&embedding_grad));
}

}  // namespace embedkernels::cuda
