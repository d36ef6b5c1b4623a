// V neighbouring elements of a row, moved by one instruction: 16 bytes where alignment allows, else one element.
#pragma once

#include "../numeric.h"
#include "portable.cuh"

namespace embedkernels::cuda {

// Elements in 16 bytes.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

template <int Bytes>
struct Words;
template <>
struct alignas(16) Words<16> {
  uint32_t word[4];
};
template <>
struct alignas(8) Words<8> {
  uint32_t word[2];
};
template <>
struct alignas(4) Words<4> {
  uint32_t word[1];
};
template <>
struct alignas(2) Words<2> {
  uint16_t word[1];
};

// As loaded: unpacked only when it is added, so that many loads fit into the registers.
template <class T, int V>
using Packed = Words<int(sizeof(T)) * V>;

template <class T, int V>
EK_DEVICE Packed<T, V> load(const T* pointer) {
  EK_ON_LOAD(pointer, sizeof(Packed<T, V>));
  return *reinterpret_cast<const Packed<T, V>*>(pointer);
}

template <class T, int V>
EK_DEVICE void store(T* pointer, const Packed<T, V>& packed) {
  EK_ON_STORE(pointer, sizeof(Packed<T, V>));
  *reinterpret_cast<Packed<T, V>*>(pointer) = packed;
}

// The i-th element of a packed vector; i is a compile-time constant once the loop around it is unrolled.
template <class T, int V>
EK_DEVICE T element(const Packed<T, V>& packed, int i) {
  if constexpr (sizeof(T) == 2 && V > 1) {
    return T{uint16_t(packed.word[i / 2] >> (16 * (i % 2)))};
  } else if constexpr (sizeof(T) == 2) {
    return T{packed.word[0]};
  } else {
    T value;
    memcpy(&value, &packed.word[i * (sizeof(T) / 4)], sizeof(T));
    return value;
  }
}

template <class T, int V>
EK_DEVICE Packed<T, V> pack(const Accumulator<T> (&values)[V]) {
  Packed<T, V> packed;
  if constexpr (sizeof(T) == 2 && V > 1) {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      packed.word[i / 2] = uint32_t(narrow<T>(values[i]).bits) | uint32_t(narrow<T>(values[i + 1]).bits) << 16;
    }
  } else if constexpr (sizeof(T) == 2) {
    packed.word[0] = narrow<T>(values[0]).bits;
  } else {
    memcpy(&packed, values, sizeof(packed));
  }
  return packed;
}

template <class T, int V>
EK_DEVICE void add(Accumulator<T> (&sum)[V], const Packed<T, V>& packed) {
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] += widen(element<T, V>(packed, i));
}

template <class Acc, int V>
EK_DEVICE void clear(Acc (&sum)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = Acc(0);
}

// The sum, rounded to T.
template <class T, int V>
EK_DEVICE void store_sum(T* pointer, const Accumulator<T> (&sum)[V]) {
  store<T, V>(pointer, pack<T, V>(sum));
}

// The sum as it is, in vectors of at most 16 bytes.
template <class Acc, int V>
EK_DEVICE void store_partial(Acc* pointer, const Acc (&sum)[V]) {
  constexpr int kStep = V < kVector<Acc> ? V : kVector<Acc>;
#pragma unroll
  for (int i = 0; i < V; i += kStep) {
    Packed<Acc, kStep> packed;
    memcpy(&packed, sum + i, sizeof(packed));
    store<Acc, kStep>(pointer + i, packed);
  }
}

}  // namespace embedkernels::cuda
