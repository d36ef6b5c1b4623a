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

}  // namespace embedkernels
