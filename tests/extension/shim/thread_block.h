// Runs CUDA kernel bodies on a CPU: a block's threads are fibers that take turns at barriers.
//
// What it is good for is finding faults, so it is unkind where a GPU would be lucky: shared memory starts as NaN,
// threads and blocks run in whatever order the test asks for (a missing barrier then shows as a wrong result),
// buffers end at unmapped pages, vectors must be aligned, and every element of a watched buffer must be written once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define EK_DEVICE inline
#define EK_SHARED(type, name) type& name = *static_cast<type*>(shim::shared_memory(sizeof(type)))
#define EK_ON_LOAD(pointer, bytes) shim::on_load(pointer, bytes)
#define EK_ON_STORE(pointer, bytes) shim::on_store(pointer, bytes)

#define __syncthreads() shim::block_barrier(__LINE__, 0)
#define __syncthreads_count(predicate) shim::block_barrier(__LINE__, (predicate) != 0)
#define __ballot_sync(mask, predicate) shim::warp_ballot(__LINE__, mask, (predicate) != 0)
#define __syncwarp() shim::warp_ballot(__LINE__, 0xffffffffu, false)
#define __popc(bits) __builtin_popcount(bits)

namespace shim {

struct Index {
  unsigned x;
};

// In which order threads run between barriers, and blocks in a grid.
enum class Order { kForward = 0, kReverse = 1, kShuffled = 2 };

void* shared_memory(std::size_t bytes);
int block_barrier(int line, int predicate);
unsigned warp_ballot(int line, unsigned mask, bool predicate);
void on_load(const void* pointer, std::size_t bytes);
void on_store(const void* pointer, std::size_t bytes);

// Runs `body` as every thread of every block in [0, blocks) that `selected` lets through. Returns an empty string, or
// what went wrong: an access outside every buffer, a barrier that not all threads reach, a misaligned vector.
std::string run_grid(int64_t blocks, int threads, Order order, uint64_t seed, const std::function<bool(int64_t)>& selected,
                     const std::function<void()>& body);

// Memory whose neighbouring pages cannot be touched: the last byte (or the first, if `at_start`) borders on one.
// Filled with 0xff, which is NaN in every floating-point type.
class Guarded {
 public:
  Guarded(std::size_t bytes, bool at_start);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* mapping_;
  std::size_t mapped_;
  void* data_;
};

// Counts the reads and writes of every element of [begin, begin + elements * size), and the bytes of all vector
// accesses, until the next call. A second read or write of an element is a fault.
void watch(const void* begin, std::size_t elements, std::size_t size);
// An empty string if every watched element was written exactly once.
std::string watched_once();

// What happened since the last call of `watch`.
struct Traffic {
  std::vector<uint8_t> reads, writes;  // of every watched element
  int64_t loaded = 0, stored = 0;      // bytes, wherever they lie
};
const Traffic& traffic();

}  // namespace shim

extern shim::Index threadIdx, blockIdx;
