// The one include of every kernel: CUDA under nvcc, the host shim under any other compiler.
//
// Kernels use dynamic shared memory only, so that the shim can poison it and watch its end.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define TITAN_SHARED(type, name)                                \
  extern __shared__ __align__(128) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)

namespace titan {
// More than 48 KiB of shared memory is only given to kernels that say so. A failure shows in cudaGetLastError.
template <class Kernel>
void allow_shared_bytes(Kernel kernel, size_t bytes) {
  if (bytes > (48 << 10)) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}
}  // namespace titan

// The kernel stands in parentheses, for the commas between its template arguments.
#define TITAN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)       \
  do {                                                                     \
    ::titan::allow_shared_bytes(kernel, shared_bytes);                     \
    TITAN_BARE kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__); \
  } while (0)
#define TITAN_BARE(...) __VA_ARGS__

#else

#include "host_shim/cuda_host_shim.h"

#define TITAN_SHARED(type, name) type* name = reinterpret_cast<type*>(cushim::shared_memory())
#define TITAN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  cushim::launch(grid, block, shared_bytes, [=] { (kernel)(__VA_ARGS__); })

#endif

namespace titan {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16(value);
}

}  // namespace titan
