// PyTorch's current stream, the launches on it, and their errors.
#pragma once

#include <cuda_runtime.h>

#include "../checks.h"
#include "portable.cuh"

namespace embedkernels::cuda {

// Makes a device current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = -1;
};

// Raises what went wrong, naming the op.
void check_cuda(cudaError_t error, const char* op);

class Launcher {
 public:
  // The current stream of the tensor's device.
  Launcher(const char* op, const Tensor& tensor);

  template <int Threads = kThreads, class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) {
    check(blocks <= kMaxInt32, op_, ": ", blocks, " thread blocks are needed, CUDA allows ", kMaxInt32);
    kernel<<<unsigned(blocks), Threads, 0, stream_>>>(arguments...);
    check_cuda(cudaGetLastError(), op_);
  }

  // Stable sort of keys by their lowest `bits` bits, with order moved along. Returns which buffers hold the result.
  int sort_pairs(uint32_t* const keys[2], int* const order[2], int64_t n, int bits);
  // Stable sort of keys by their bits [first_bit, end_bit) alone.
  int sort_keys(uint32_t* const keys[2], int64_t n, int first_bit, int end_bit);

 private:
  const char* op_;
  Tensor like_;
  DeviceScope device_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace embedkernels::cuda
