// Errors as PyTorch shows them (RuntimeError), and the argument checks that the CPU and the CUDA ops share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace embedkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxInt32 = 0x7fffffff;

// STD_TORCH_CHECK would put the path of the source file into the user's message.
template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (!condition) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

std::string shape_of(const Tensor& tensor);

// embedding_plan's arguments.
void check_plan_arguments(const Tensor& ids, int64_t num_rows, int64_t padding_idx, int64_t vocab_start,
                          const std::optional<Tensor>& ignored);

// embedding_grad's arguments.
struct GradArguments {
  const Tensor &out, &grad_rows, &order, &segment_ids, &segment_offsets, &count;
  int64_t mode;
  const std::optional<Tensor>&sources, &weights;
  const std::optional<Tensor>& seed;
};
void check_grad_arguments(const GradArguments& given);

inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype,
                              std::nullopt, like.device());
}

template <class T>
inline const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Null where there is no tensor.
template <class T>
inline const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
inline T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace embedkernels
