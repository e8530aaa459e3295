// What a binding needs to know of a CUDA device: which one, and the stream to launch on. Under the host shim, nothing.
#pragma once

#include "binding/binding.h"
#include "cuda/portable.cuh"

#ifdef __CUDACC__
#include <torch/csrc/stable/accelerator.h>
#define TITAN_DEVICE CUDA
#else
#define TITAN_DEVICE CPU
#endif

namespace titan::cuda {

#ifdef __CUDACC__
struct Launch {
  explicit Launch(const Tensor& t)
      : guard(t.get_device_index()),
        stream(static_cast<cudaStream_t>(
            torch::stable::accelerator::getCurrentStream(t.get_device_index()).nativeHandle())) {}
  // A launch reports its failure (too much shared memory, no code for this device) only when asked.
  ~Launch() noexcept(false) {
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA launch: ") + cudaGetErrorString(status));
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};
#else
struct Launch {
  explicit Launch(const Tensor&) {}
  cudaStream_t stream = nullptr;
};
#endif

}  // namespace titan::cuda

#define TITAN_IMPLEMENT(library, device, m) STABLE_TORCH_LIBRARY_IMPL(library, device, m)  // expands both names first
