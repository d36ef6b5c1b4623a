// V neighbouring elements of a row, moved by one instruction: 16 bytes where alignment allows, else one element.
#pragma once

#include <cmath>

#include "../numeric.h"
#include "portable.cuh"

namespace embedkernels::cuda {

// A bfloat16 output whose sums are rounded up or down at random. A type of its own, so that the random numbers cost
// the other outputs no registers.
struct StochasticBf16 {};

// What an output is in memory.
template <class O>
struct StoredOf {
  using type = O;
};
template <>
struct StoredOf<StochasticBf16> {
  using type = bf16;
};
template <class O>
using Stored = typename StoredOf<O>::type;

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
#if defined(__CUDA_ARCH__)
  // nvcc would store a struct word by word where its words were made one by one.
  const auto& word = packed.word;
  if constexpr (sizeof(packed) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(pointer)), "r"(word[0]),
                 "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
    return;
  } else if constexpr (sizeof(packed) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(pointer)), "r"(word[0]),
                 "r"(word[1])
                 : "memory");
    return;
  }
#endif
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

// a * b + c rounded once, and a * b rounded on its own: which of the two is not left to the compiler.
EK_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
EK_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
#if defined(__CUDA_ARCH__)
EK_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
EK_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
#else
EK_DEVICE float multiply(float a, float b) { return a * b; }
EK_DEVICE double multiply(double a, double b) { return a * b; }
#endif

template <class Acc, int V>
EK_DEVICE void clear(Acc (&sum)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = Acc(0);
}

template <class T, int V>
EK_DEVICE void add(Accumulator<T> (&sum)[V], const Packed<T, V>& packed) {
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] += widen(element<T, V>(packed, i));
}

template <class T, int V>
EK_DEVICE void add_weighted(Accumulator<T> (&sum)[V], const Packed<T, V>& packed, Accumulator<T> weight) {
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = multiply_add(widen(element<T, V>(packed, i)), weight, sum[i]);
}

template <class Acc, int V>
EK_DEVICE void scale(Acc (&sum)[V], Acc factor) {
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = multiply(sum[i], factor);
}

// The bits that round columns [column, column + V) of a row, V of them within one counter of Philox.
template <int V>
EK_DEVICE Packed<bf16, V> pack_stochastic(const float (&values)[V], uint64_t seed, int64_t row, int64_t column) {
  static_assert(V <= 8);
  const PhiloxWords words = philox(seed, uint32_t(column / 8), uint32_t(row));
  bf16 rounded[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    // Selects in place of an index, which would put the words into local memory.
    const int at = V == 8 ? i : int(column % 8) + i;
    const uint32_t low = at & 2 ? words.word[1] : words.word[0], high = at & 2 ? words.word[3] : words.word[2];
    rounded[i] = narrow_stochastic(values[i], (at & 4 ? high : low) >> (16 * (at & 1)) & 0xffffu);
  }
  Packed<bf16, V> packed;
  memcpy(&packed, rounded, sizeof(packed));
  return packed;
}

// Sums as they are, in pieces of at most 16 bytes.
template <class Acc, int V>
constexpr int kPiece = V < kVector<Acc> ? V : kVector<Acc>;

template <class Acc, int V>
EK_DEVICE void store_partial(Acc* pointer, const Acc (&sum)[V]) {
#pragma unroll
  for (int i = 0; i < V; i += kPiece<Acc, V>) {
    Packed<Acc, kPiece<Acc, V>> piece;
    memcpy(&piece, sum + i, sizeof(piece));
    store<Acc, kPiece<Acc, V>>(pointer + i, piece);
  }
}

}  // namespace embedkernels::cuda
