// The launches of the gradient, in order. `Launcher` is the CUDA stream, or the shim in the tests.
#pragma once

#include "grad_kernels.cuh"

namespace embedkernels::cuda {

// Elements per access in the finishing kernel: partial sums fill 16 bytes.
template <class O, int V>
constexpr int kFinishVector = V == 1 ? 1 : kVector<Accumulator<Stored<O>>>;

// Elements of a thread: 16 bytes of the wider of the two dtypes, so that a warp's accesses of either have no gaps.
template <class T, class O>
constexpr int kGradVector = kVector<T> < kVector<Stored<O>> ? kVector<T> : kVector<Stored<O>>;

// Whether rows can be read and written in vectors.
template <class T, class O>
bool vectors_fit(const GradRows<T>& rows, const GradOutput<O>& out, int64_t width) {
  constexpr int kRows = kGradVector<T, O>, kZeros = kVector<Stored<O>>;
  const auto aligned = [](const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
  return width % kRows == 0 && width % kZeros == 0 && rows.stride % kRows == 0 &&
         aligned(rows.data, sizeof(Packed<T, kRows>)) && aligned(out.data, 16);
}

template <class O, int V>
GradShape grad_shape_of(int64_t n, int64_t out_rows, int64_t width, GradMode mode) {
  return grad_shape(n, out_rows, width, mode, sizeof(Stored<O>), {V, kZeroVector<O, V>, kFinishVector<O, V>});
}

// The output must not be empty.
template <int V, class Launcher, class T, class O>
void run_grad(Launcher& launcher, const GradRows<T>& rows, const PlanView& plan, const GradOutput<O>& out,
              const GradWorkspace<Accumulator<T>>& workspace, const GradShape& shape) {
  const int64_t blocks = shape.reduce_blocks + shape.zero_blocks;
  if (blocks > 0) launcher.launch(grad_reduce_kernel<T, O, V>, blocks, rows, plan, out, workspace, shape);
  if (shape.strips > 1) {
    launcher.launch(grad_finish_kernel<O, kFinishVector<O, V>>, shape.finish_blocks,
                    static_cast<const Accumulator<T>*>(workspace.partials), static_cast<const Tail*>(workspace.tails),
                    out, shape);
  }
}

}  // namespace embedkernels::cuda
