// The launches of the dense gradient, in order. `Launcher` is the CUDA stream, or the shim in the tests.
#pragma once

#include "grad_kernels.cuh"

namespace embedkernels::cuda {

// Elements per access in the finishing kernel: partial sums fill 16 bytes.
template <class T, int V>
constexpr int kFinishVector = V == 1 ? 1 : kVector<Accumulator<T>>;

// Whether rows can be read and written in 16-byte vectors.
template <class T>
bool vectors_fit(const T* grad_rows, const T* out, int64_t width) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return width % kVector<T> == 0 && aligned(grad_rows) && aligned(out);
}

template <class T, int V>
GradShape grad_shape_of(int64_t n, int64_t num_rows, int64_t width) {
  return grad_shape(n, num_rows, width, sizeof(T), V, kFinishVector<T, V>);
}

// partials holds 2 * tiles * D accumulators, tails one entry per tile. V and D must not be 0.
template <class Launcher, class T, int V>
void run_grad(Launcher& launcher, const T* grad_rows, const PlanView& plan, T* out, Accumulator<T>* partials,
              Tail* tails, const GradShape& shape) {
  launcher.launch(grad_reduce_kernel<T, V>, shape.reduce_blocks + shape.zero_blocks, grad_rows, plan, out, partials,
                  tails, shape);
  if (shape.tiles > 1) {
    launcher.launch(grad_finish_kernel<T, kFinishVector<T, V>>, shape.finish_blocks,
                    static_cast<const Accumulator<T>*>(partials), static_cast<const Tail*>(tails), out, shape);
  }
}

}  // namespace embedkernels::cuda
