// CUB's radix sort, limited to the bits in use: a histogram, a scan and one pass per 8 bits.
// Alone in its file because it takes longer to compile than all the rest.
#include <cub/device/device_radix_sort.cuh>

#include "launcher.h"

namespace embedkernels::cuda {

int Launcher::sort_pairs(uint32_t* const keys[2], int* const order[2], int64_t n, int bits) {
  cub::DoubleBuffer<uint32_t> key_buffers(keys[0], keys[1]);
  cub::DoubleBuffer<int> order_buffers(order[0], order[1]);
  size_t bytes = 0;
  check_cuda(cub::DeviceRadixSort::SortPairs(nullptr, bytes, key_buffers, order_buffers, int(n), 0, bits, stream_),
             op_);
  const Tensor workspace = empty_like_device(like_, {int64_t(bytes)}, ScalarType::Byte);
  check_cuda(cub::DeviceRadixSort::SortPairs(workspace.mutable_data_ptr(), bytes, key_buffers, order_buffers, int(n),
                                             0, bits, stream_),
             op_);
  // Both buffers swap together.
  return key_buffers.selector;
}

int Launcher::sort_keys(uint32_t* const keys[2], int64_t n, int first_bit, int end_bit) {
  cub::DoubleBuffer<uint32_t> buffers(keys[0], keys[1]);
  size_t bytes = 0;
  check_cuda(cub::DeviceRadixSort::SortKeys(nullptr, bytes, buffers, int(n), first_bit, end_bit, stream_), op_);
  const Tensor workspace = empty_like_device(like_, {int64_t(bytes)}, ScalarType::Byte);
  check_cuda(cub::DeviceRadixSort::SortKeys(workspace.mutable_data_ptr(), bytes, buffers, int(n), first_bit, end_bit,
                                            stream_),
             op_);
  return buffers.selector;
}

}  // namespace embedkernels::cuda
