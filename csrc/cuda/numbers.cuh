// The elements of a tensor, and float32, in which everything is summed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__
#include "ptx.cuh"
#endif

namespace lorafast::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// Of the elements that a kernel meets at run time: adapters may have another dtype than x.
enum class Dtype : int32_t { float32, bfloat16, float16 };

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::float32;
};
template <>
struct DtypeOf<bfloat16> {
  static constexpr Dtype value = Dtype::bfloat16;
};
template <>
struct DtypeOf<float16> {
  static constexpr Dtype value = Dtype::float16;
};

#ifdef __CUDACC__  // the rest is for kernels; bindings.cpp and device.cpp are plain C++

// Whether there are cp.async, TF32 and bfloat16: from sm_80 on. Of the host's code it decides nothing.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool kSm80 = true;
#else
constexpr bool kSm80 = false;
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (DtypeOf<T>::value == Dtype::bfloat16) return __float2bfloat16(x);
  else return __float2half(x);
}

// Element i of an array whose dtype is known at run time alone.
__device__ __forceinline__ float load_as_float(const void* array, int64_t i, Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return to_float(static_cast<const bfloat16*>(array)[i]);
    case Dtype::float16: return to_float(static_cast<const float16*>(array)[i]);
    default: return static_cast<const float*>(array)[i];
  }
}

__device__ __forceinline__ void store_as(void* array, int64_t i, float x, Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: static_cast<bfloat16*>(array)[i] = from_float<bfloat16>(x); break;
    case Dtype::float16: static_cast<float16*>(array)[i] = from_float<float16>(x); break;
    default: static_cast<float*>(array)[i] = x;
  }
}

// The nearest number of TF32, away from zero where two are; NaN stays one.
__device__ __forceinline__ uint32_t nearest_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  return ptx::nearest_tf32(x);
#else
  return __float_as_uint(x);  // there is no TF32
#endif
}

// A float32 as two numbers of TF32, the nearest and the rest: for sums that are rounded to float16. Of the rest TF32
// has all but the last bit: of a first number that is cut off it would have all but two, and what it lacks would add
// up. Infinity has no rest, NaN stays one, and what would round to infinity is cut off. All bits: tf32.cuh.
struct Tf32Pair {
  uint32_t high, low;
};

__device__ __forceinline__ Tf32Pair split_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  const float infinity = __int_as_float(0x7F800000);
  uint32_t high = ptx::nearest_tf32(x);
  if (fabsf(__uint_as_float(high)) == infinity) high = __float_as_uint(x) & 0xFFFFE000u;
  const float rest = x - __uint_as_float(high);
  return {high, __float_as_uint(fabsf(rest) < infinity ? rest : 0.0f)};
#else
  return {__float_as_uint(x), 0u};  // there is no TF32
#endif
}

#endif

}  // namespace lorafast::cuda
