// The library's CUDA kernels under the shim, for Python (tests/extension/shim/__init__.py calls these through ctypes).
//
// The launches are those of csrc/cuda/*_steps.h; only the stream is another, and CUB's sort is std::stable_sort.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../../../csrc/cuda/grad_steps.h"
#include "../../../csrc/cuda/plan_steps.h"

using namespace embedkernels;
using namespace embedkernels::cuda;

namespace {

std::string error;
const char* done() { return error.empty() ? nullptr : error.c_str(); }

class Launcher {
 public:
  Launcher(int order, uint64_t seed) : order_(shim::Order(order)), seed_(seed) {}

  template <int Threads = kThreads, class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) {
    ++launches;
    if (!error.empty()) return;
    if (blocks < 1 || blocks > 0x7fffffff) {
      error = "a grid of " + std::to_string(blocks) + " blocks";
      return;
    }
    error = shim::run_grid(blocks, Threads, order_, seed_++, selected, [&] { kernel(arguments...); });
  }

  // What CUB promises: by the lowest `bits` bits alone, stable, the result in either pair of buffers.
  int sort_pairs(uint32_t* const keys[2], int* const order[2], int64_t n, int bits) {
    if (!error.empty()) return 0;
    const std::vector<int64_t> places = sorted_places(keys[0], n, 0, bits);
    for (int64_t i = 0; i < n; ++i) order[1][i] = order[0][places[i]];
    std::memset(order[0], 0xff, n * sizeof(int));
    return move_keys(keys, places);
  }

  int sort_keys(uint32_t* const keys[2], int64_t n, int first_bit, int end_bit) {
    if (!error.empty()) return 0;
    return move_keys(keys, sorted_places(keys[0], n, first_bit, end_bit));
  }

  std::function<bool(int64_t)> selected;
  int sorted_from = 0, sorted_bits = 0, launches = 0;

 private:
  std::vector<int64_t> sorted_places(const uint32_t* keys, int64_t n, int first_bit, int end_bit) {
    sorted_from = first_bit;
    sorted_bits = end_bit - first_bit;
    const uint64_t mask = (uint64_t{1} << sorted_bits) - 1;
    std::vector<int64_t> places(n);
    std::iota(places.begin(), places.end(), 0);
    std::stable_sort(places.begin(), places.end(), [&](int64_t a, int64_t b) {
      return (keys[a] >> first_bit & mask) < (keys[b] >> first_bit & mask);
    });
    return places;
  }

  // CUB leaves anything in the other buffer.
  static int move_keys(uint32_t* const keys[2], const std::vector<int64_t>& places) {
    for (std::size_t i = 0; i < places.size(); ++i) keys[1][i] = keys[0][places[i]];
    std::memset(keys[0], 0xff, places.size() * sizeof(uint32_t));
    return 1;
  }

  shim::Order order_;
  uint64_t seed_;
};

// A guarded copy of what the caller passed.
template <class T>
class Input : public shim::Guarded {
 public:
  Input(const void* source, int64_t elements, bool at_start) : Guarded(elements * sizeof(T), at_start) {
    if (elements) std::memcpy(as<T>(), source, elements * sizeof(T));
  }
};

// A guarded buffer of NaN, copied to the caller by `deliver`.
template <class T>
class Output : public shim::Guarded {
 public:
  Output(int64_t elements, bool at_start) : Guarded(elements * sizeof(T), at_start), elements_(elements) {}
  T* get() const { return as<T>(); }
  void deliver(void* target) const {
    if (elements_) std::memcpy(target, as<T>(), elements_ * sizeof(T));
  }

 private:
  int64_t elements_;
};

// One call of the gradient, the same as in tests/extension/shim/__init__.py.
struct GradCall {
  int rows_dtype, out_dtype;  // 0 float, 1 double, 2 f16, 3 bf16; out: 4 bf16, rounded at random
  int vectors;                // whether to use vectors where they fit; then, whether they were used
  int mode, scale_by_freq;
  int schedule, at_start;
  uint64_t schedule_seed;
  int64_t n, row_count, row_stride, out_rows, width;
  const void* grad_rows;
  const int *order, *segment_ids, *segment_offsets, *count;
  const int* sources;     // or null
  const void* weights;    // or null
  const int64_t* seed;    // or null
  void* out;              // read and written
  uint8_t *reads, *writes;  // of every element of `out`
  int64_t loaded, stored;   // bytes of all vector accesses
};

template <class T, class O, int V>
void grad(GradCall& call, const GradRows<T>& rows, const PlanView& plan, const GradOutput<O>& out) {
  const GradShape shape = grad_shape_of<O, V>(call.n, call.out_rows, call.width, out.mode);
  const Output<Accumulator<T>> partials(2 * shape.strips * call.width, call.at_start);
  const Output<Tail> tails(shape.strips, call.at_start);
  const int64_t elements = call.out_rows * call.width;
  shim::watch(out.data, elements, sizeof(Stored<O>));
  Launcher launcher(call.schedule, call.schedule_seed);
  run_grad<V>(launcher, rows, plan, out, GradWorkspace<Accumulator<T>>{partials.get(), tails.get()}, shape);
  const shim::Traffic& traffic = shim::traffic();
  std::copy(traffic.reads.begin(), traffic.reads.end(), call.reads);
  std::copy(traffic.writes.begin(), traffic.writes.end(), call.writes);
  call.loaded = traffic.loaded;
  call.stored = traffic.stored;
  shim::watch(nullptr, 0, 1);
}

template <class T, class O>
void grad(GradCall& call) {
  using Acc = Accumulator<T>;
  const bool at_start = call.at_start;
  const int64_t n = call.n, span = call.row_count ? (call.row_count - 1) * call.row_stride + call.width : 0;
  const Input<T> rows(call.grad_rows, span, at_start);
  const Input<int> order(call.order, n, at_start), ids(call.segment_ids, n, at_start),
      offsets(call.segment_offsets, n + 1, at_start), count(call.count, 1, at_start),
      sources(call.sources, call.sources ? n : 0, at_start);
  const Input<Acc> weights(call.weights, call.weights ? n : 0, at_start);
  const Input<int64_t> seed(call.seed, call.seed ? 1 : 0, at_start);
  const Input<Stored<O>> table(call.out, call.out_rows * call.width, at_start);
  const GradRows<T> given{rows.template as<T>(), call.row_count, call.row_stride,
                          call.sources ? sources.template as<int>() : nullptr,
                          call.weights ? weights.template as<Acc>() : nullptr};
  const GradOutput<O> out{table.template as<Stored<O>>(), call.out_rows, GradMode(call.mode), call.scale_by_freq != 0,
                          seed.template as<int64_t>()};
  const PlanView plan{order.template as<int>(), ids.template as<int>(), offsets.template as<int>(),
                      count.template as<int>()};
  call.vectors = call.vectors && vectors_fit(given, out, call.width);
  if (call.vectors) {
    grad<T, O, kGradVector<T, O>>(call, given, plan, out);
  } else {
    grad<T, O, 1>(call, given, plan, out);
  }
  std::memcpy(call.out, out.data, call.out_rows * call.width * sizeof(Stored<O>));
}

template <class Id>
void plan(const void* source, const bool* ignored, int64_t n, int64_t num_rows, int64_t padding_idx,
          int64_t vocab_start, int schedule, uint64_t seed, bool at_start, int* order, int* segment_ids,
          int* segment_offsets, int* count, int* how) {
  const Input<Id> ids(source, n, at_start);
  const Input<bool> marks(ignored, ignored ? n : 0, at_start);
  const PlanPath path = plan_path(n, num_rows);
  const int64_t sorted = path.small ? 0 : n, moved = path.small || path.position_bits > 0 ? 0 : n;
  const Output<uint32_t> keys_a(sorted, at_start), keys_b(sorted, at_start);
  const Output<int> order_a(n, at_start), order_b(moved, at_start), counts(path.small ? 0 : kMaxSegmentBlocks, at_start),
      id_list(n, at_start), offsets(n + 1, at_start), total(1, at_start);
  const PlanBuffers buffers{{keys_a.get(), keys_b.get()}, {order_a.get(), order_b.get()},
                            counts.get(),                 id_list.get(),
                            offsets.get(),                total.get()};
  Launcher launcher(schedule, seed);
  const PlanIds<Id> made_of{ids.template as<Id>(), ignored ? marks.template as<bool>() : nullptr, padding_idx, vocab_start,
                            uint32_t(num_rows)};
  const int which = run_plan(launcher, made_of, n, buffers);
  (which ? order_b : order_a).deliver(order);
  id_list.deliver(segment_ids);
  offsets.deliver(segment_offsets);
  total.deliver(count);
  how[0] = launcher.sorted_from;
  how[1] = launcher.sorted_bits;
  how[2] = launcher.launches;
}

}  // namespace

extern "C" const char* shim_plan(const void* ids, const bool* ignored, int id_bytes, int64_t n, int64_t num_rows,
                                 int64_t padding_idx, int64_t vocab_start, int schedule, uint64_t seed, int at_start,
                                 int* order, int* segment_ids, int* segment_offsets, int* count, int* how) {
  error.clear();
  (id_bytes == 4 ? plan<int32_t> : plan<int64_t>)(ids, ignored, n, num_rows, padding_idx, vocab_start, schedule, seed, at_start,
                                                  order, segment_ids, segment_offsets, count, how);
  return done();
}

extern "C" const char* shim_grad(GradCall* call) {
  error.clear();
  switch (10 * call->rows_dtype + call->out_dtype) {
    case 00: grad<float, float>(*call); break;
    case 02: grad<float, f16>(*call); break;
    case 03: grad<float, bf16>(*call); break;
    case 04: grad<float, StochasticBf16>(*call); break;
    case 11: grad<double, double>(*call); break;
    case 20: grad<f16, float>(*call); break;
    case 22: grad<f16, f16>(*call); break;
    case 30: grad<bf16, float>(*call); break;
    case 33: grad<bf16, bf16>(*call); break;
    case 34: grad<bf16, StochasticBf16>(*call); break;
    default: error = "no such pair of dtypes";
  }
  return done();
}

// A table and gradient rows of more than 2^31 elements each, of which only the blocks that matter run: the pages of the
// others stay unmapped. The plan keeps n - 1 times the last row and once the one before, from the last gradient rows,
// which hold 1; the last three rows of the table hold 7. Writes the first element of these to `ends`.
extern "C" const char* shim_far(int64_t n, int64_t kept, int64_t num_rows, int64_t width, int64_t stride, int mode,
                                float* ends) {
  error.clear();
  const GradShape shape = grad_shape_of<float, 4>(n, num_rows, width, GradMode(mode));
  const Output<int> order(n, false), ids(n, false), offsets(n + 1, false);
  std::iota(order.get(), order.get() + kept, int(n - kept));
  ids.get()[0] = int(num_rows - 2);
  ids.get()[1] = int(num_rows - 1);
  const int bounds[] = {0, 1, int(kept)};
  std::copy(std::begin(bounds), std::end(bounds), offsets.get());
  const int count = 2;
  const shim::Guarded rows(((n - 1) * stride + width) * sizeof(float), false),
      table(num_rows * width * sizeof(float), false), partials(2 * shape.strips * width * sizeof(float), false);
  for (int64_t i = n - kept; i < n; ++i) std::fill_n(rows.as<float>() + i * stride, width, 1.0f);
  std::fill_n(table.as<float>() + (num_rows - 3) * width, 3 * width, 7.0f);
  const Output<Tail> tails(shape.strips, false);
  Launcher launcher(0, 0);
  const int64_t last = shape.reduce_blocks + shape.zero_blocks - 1;
  launcher.selected = [&](int64_t block) { return block < shape.finish_chunks || block == last; };
  const PlanView plan{order.get(), ids.get(), offsets.get(), &count};
  run_grad<4>(launcher, GradRows<float>{rows.as<float>(), n, stride, nullptr, nullptr}, plan,
              GradOutput<float>{table.as<float>(), num_rows, GradMode(mode), false, nullptr},
              GradWorkspace<float>{partials.as<float>(), tails.get()}, shape);
  for (int i = 0; i < 3; ++i) ends[i] = table.as<float>()[(num_rows - 1 - i) * width];
  return done();
}

// The host's conversions, for comparison with PyTorch's.
extern "C" void shim_convert(int dtype, const float* values, int64_t n, uint16_t* narrowed, float* widened) {
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == 2) {
      narrowed[i] = narrow<f16>(values[i]).bits;
      widened[i] = widen(f16{narrowed[i]});
    } else {
      narrowed[i] = narrow<bf16>(values[i]).bits;
      widened[i] = widen(bf16{narrowed[i]});
    }
  }
}

extern "C" int shim_key_bits(int64_t num_rows) { return key_bits(num_rows); }

extern "C" void shim_small_passes(int64_t num_rows, int* found) {
  const SmallPasses how = small_passes(num_rows);
  found[0] = how.passes;
  found[1] = how.bits;
}

// strips, tile, reduce_blocks, zero_blocks, finish_blocks, lanes, block_strips, zero_rows of a launch.
extern "C" void shim_shape(int64_t n, int64_t num_rows, int64_t width, int element_size, int vector, int zero_vector,
                           int partial_vector, int64_t* out) {
  const GradShape shape =
      grad_shape(n, num_rows, width, GradMode::kDense, element_size, {vector, zero_vector, partial_vector});
  const int64_t values[] = {shape.strips,        shape.tile,  shape.reduce_blocks, shape.zero_blocks,
                            shape.finish_blocks, shape.lanes, shape.block_strips,  shape.zero_rows};
  std::copy(std::begin(values), std::end(values), out);
}
