// Kernels with one fault each: the shim must notice every one of them.
#include "../../../csrc/cuda/vector.cuh"

using namespace embedkernels::cuda;

namespace {

struct Shared {
  float values[kThreads];
};

void missing_barrier(const float* in, float* out) {
  EK_SHARED(Shared, shared);
  shared.values[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = shared.values[kThreads - 1 - threadIdx.x];
}

void with_barrier(const float* in, float* out) {
  EK_SHARED(Shared, shared);
  shared.values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared.values[kThreads - 1 - threadIdx.x];
}

void read_past_the_end(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

void read_before_the_start(const float* in, float* out) { out[threadIdx.x] = in[int(threadIdx.x) - 1]; }

void divergent_barrier(const float* in, float* out) {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

void barrier_and_ballot(const float* in, float* out) {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    out[threadIdx.x] = float(__ballot_sync(0xffffffffu, in[threadIdx.x] > 0));
  }
}

void uninitialised_shared(const float*, float* out) {
  EK_SHARED(Shared, shared);
  out[threadIdx.x] = shared.values[threadIdx.x] * 0.0f;
}

void shared_out_of_range(const float* in, float* out) {
  EK_SHARED(Shared, shared);
  shared.values[threadIdx.x + 1] = in[threadIdx.x];
  out[threadIdx.x] = 0;
}

void misaligned(const float* in, float* out) {
  if (threadIdx.x < 16) store<float, 4>(out + 4 * threadIdx.x, load<float, 4>(in + 4 * threadIdx.x + 1));
}

void written_twice(const float* in, float* out) {
  store<float, 1>(out + threadIdx.x / 2, load<float, 1>(in + threadIdx.x));
}

void never_written(const float* in, float* out) {
  if (threadIdx.x != 5) store<float, 1>(out + threadIdx.x, load<float, 1>(in + threadIdx.x));
}

using Kernel = void (*)(const float*, float*);
constexpr Kernel kKernels[] = {with_barrier,      missing_barrier,      read_past_the_end,   read_before_the_start,
                               divergent_barrier, barrier_and_ballot,   uninitialised_shared, shared_out_of_range,
                               misaligned,        written_twice,        never_written};

}  // namespace

// Runs one kernel in one block on 256 floats. `counted` also asks that every output is stored exactly once.
extern "C" const char* shim_fault(int which, int order, int at_start, int counted, const float* in, float* out) {
  static std::string error;
  const shim::Guarded source(kThreads * sizeof(float), at_start), target(kThreads * sizeof(float), at_start);
  std::memcpy(source.as<float>(), in, kThreads * sizeof(float));
  if (counted) shim::watch(target.as<float>(), kThreads, sizeof(float));
  error = shim::run_grid(1, kThreads, shim::Order(order), 1, {},
                         [&] { kKernels[which](source.as<float>(), target.as<float>()); });
  if (counted && error.empty()) error = shim::watched_once();
  shim::watch(nullptr, 0, 1);
  std::memcpy(out, target.as<float>(), kThreads * sizeof(float));
  return error.empty() ? nullptr : error.c_str();
}
