#include "launcher.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// The only symbol that PyTorch's CUDA build alone has. Weak, so that the library also loads beside a CPU build, where
// none of the ops below can be called.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device, void** stream);

// Whether this PyTorch can run the library's CUDA ops.
extern "C" __attribute__((visibility("default"))) int embedkernels_torch_has_cuda() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}

namespace embedkernels::cuda {

DeviceScope::DeviceScope(int device) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current != device) before_ = current;
  cudaSetDevice(device);
}

DeviceScope::~DeviceScope() {
  if (before_ >= 0) cudaSetDevice(before_);
}

void check_cuda(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  check(error != cudaErrorNoKernelImageForDevice, op,
        ": the extension has no code for this GPU (it was built for " EMBEDKERNELS_ARCHITECTURES
        "); rebuild it with EMBEDKERNELS_CUDA_ARCHS set to the GPU's compute capability");
  check(false, op, ": CUDA error: ", cudaGetErrorString(error));
}

Launcher::Launcher(const char* op, const Tensor& tensor)
    : op_(op), like_(tensor), device_(tensor.get_device_index()) {
  check(embedkernels_torch_has_cuda(), op, ": this PyTorch was built without CUDA");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, op,
        ": PyTorch gave no CUDA stream for device ", tensor.get_device_index());
  stream_ = static_cast<cudaStream_t>(stream);
}

}  // namespace embedkernels::cuda
