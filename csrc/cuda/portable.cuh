// What a kernel's body needs from its surroundings: nvcc's, or those of the thread-block shim that runs the very same
// bodies on a CPU in the tests (tests/extension/shim).
#pragma once

#include <cstdint>

#if defined(EMBEDKERNELS_HOST_SHIM)
#include "thread_block.h"
#else
#include <cuda_runtime.h>
#define EK_DEVICE __device__ __forceinline__
// One block's shared memory. Its contents are undefined until written.
#define EK_SHARED(type, name) __shared__ type name
// Told of every vector access; the shim checks alignment and counts the writes of each element.
#define EK_ON_LOAD(pointer, bytes)
#define EK_ON_STORE(pointer, bytes)
#endif

namespace embedkernels::cuda {

// Threads of a block, unless a kernel says otherwise.
constexpr int kThreads = 256;
constexpr int kWarp = 32;

}  // namespace embedkernels::cuda
