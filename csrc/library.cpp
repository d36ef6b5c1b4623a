// The library's face: the schemas of its ops, and what the loader asks before it trusts the file.
#include <torch/csrc/stable/library.h>

#ifndef EMBEDKERNELS_ARCHITECTURES
#define EMBEDKERNELS_ARCHITECTURES ""
#endif

#if defined(_WIN32)
#define EK_EXPORT extern "C" __declspec(dllexport)
#else
#define EK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Raised with every change of a schema below or of what an op means; embedkernels/ops/extension.py expects the same.
EK_EXPORT int embedkernels_interface() { return 2; }

// "sm_80,sm_90,compute_90", or nothing for a CPU-only build.
EK_EXPORT const char* embedkernels_architectures() { return EMBEDKERNELS_ARCHITECTURES; }

STABLE_TORCH_LIBRARY(embedkernels_ext, library) {
  library.def(
      "embedding_plan(Tensor ids, int num_rows, int padding_idx, int vocab_start, Tensor? ignored)"
      " -> (Tensor order, Tensor segment_ids, Tensor segment_offsets, Tensor count)");
  library.def(
      "embedding_grad(Tensor(a!) out, Tensor grad_rows, Tensor order, Tensor segment_ids, Tensor segment_offsets,"
      " Tensor count, int mode, Tensor? sources, Tensor? weights, bool scale_by_freq, Tensor? seed) -> ()");
}
