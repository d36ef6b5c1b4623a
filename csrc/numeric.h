// Storage types and their conversions, the same bits on the host and on the device.
//
// The 16-bit types hold bits only: every sum is done in the type's accumulator (float, or double for double).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define EK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EK_HOST_DEVICE inline
#endif

namespace embedkernels {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

EK_HOST_DEVICE float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

EK_HOST_DEVICE uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// Widening is exact.
EK_HOST_DEVICE float widen(float value) { return value; }
EK_HOST_DEVICE double widen(double value) { return value; }
EK_HOST_DEVICE float widen(bf16 value) { return float_from_bits(uint32_t(value.bits) << 16); }
EK_HOST_DEVICE float widen(f16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Branch-free, so that loops over it vectorise; no subnormal float is ever formed, so flush-to-zero is harmless.
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t rebias = 112u << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t special = normal + rebias;  // infinity and NaN: the exponent becomes 255
  const uint32_t subnormal = bits_of_float(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x400u ? subnormal : normal;
  return float_from_bits((magnitude >= 0x7c00u ? special : finite) | sign);
#endif
}

// Narrowing rounds to nearest, ties to even.
template <class T>
EK_HOST_DEVICE T narrow(Accumulator<T> value);

template <>
EK_HOST_DEVICE float narrow<float>(float value) {
  return value;
}
template <>
EK_HOST_DEVICE double narrow<double>(double value) {
  return value;
}
template <>
EK_HOST_DEVICE bf16 narrow<bf16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {uint16_t(is_nan ? 0x7fffu : rounded)};
#endif
}
template <>
EK_HOST_DEVICE f16 narrow<f16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lets the floating-point unit round at 2^-24, the last place of a subnormal half.
  const uint32_t subnormal = bits_of_float(float_from_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7fffu : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {uint16_t((magnitude >= 0x47800000u ? special : finite) | sign)};
#endif
}

// The four words of Philox 4x32 with 7 rounds for the counter (c0, c1, 0, 0), as in embedkernels/reference/random.py.
struct PhiloxWords {
  uint32_t word[4];
};

EK_HOST_DEVICE PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t x0 = c0, x1 = c1, x2 = 0, x3 = 0;
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * x0, product2 = uint64_t(0xCD9E8D57u) * x2;
    x0 = uint32_t(product2 >> 32) ^ x1 ^ k0;
    x2 = uint32_t(product0 >> 32) ^ x3 ^ k1;
    x1 = uint32_t(product2);
    x3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

// The 16 random bits that round column `column` of a row, from the words of the counter (column / 8, row).
EK_HOST_DEVICE uint32_t rounding_bits(const PhiloxWords& words, int column) {
  return words.word[column % 8 / 2] >> (16 * (column % 2)) & 0xffffu;
}

// Rounds up with the probability that the cut-off part is of a unit in the last place: the mean is the value itself.
EK_HOST_DEVICE bf16 narrow_stochastic(float value, uint32_t random16) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return narrow<bf16>(value);
  return {uint16_t((bits + random16) >> 16)};
}

}  // namespace embedkernels
