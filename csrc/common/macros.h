// How functions are marked, and the size of a warp: for code that is compiled for the host and for CUDA devices.
#pragma once

#define SHIKE_SIMD inline __attribute__((always_inline))

#ifdef __CUDACC__
#define SHIKE_HD __host__ __device__ __forceinline__
#define SHIKE_DEVICE __device__ __forceinline__
#else
#define SHIKE_HD SHIKE_SIMD
#endif

#ifdef __CUDA_ARCH__
#define SHIKE_UNROLL _Pragma("unroll")
#else
#define SHIKE_UNROLL
#endif

namespace shike {

constexpr int kWarp = 32;  // threads

}  // namespace shike
