// SwiGLU on CUDA tensors; compiled by g++ against the host shim, on CPU tensors of the library titan_shim.
#include "cuda/swiglu.cuh"

#include "binding/swiglu.h"
#include "cuda/launch.h"

namespace titan::cuda {
namespace {

struct Swiglu {
  using Bf16 = __nv_bfloat16;
  using Launch = cuda::Launch;

  template <class T>
  static void forward(const Launch& launch, const T* x, T* y, int64_t rows, int64_t width) {
    launch_swiglu_forward(x, y, rows, width, launch.stream);
  }
  template <class T>
  static void backward(const Launch& launch, const T* grad, const T* x, T* grad_x, int64_t rows, int64_t width) {
    launch_swiglu_backward(grad, x, grad_x, rows, width, launch.stream);
  }
};

}  // namespace
}  // namespace titan::cuda

TITAN_IMPLEMENT(TITAN_LIBRARY, TITAN_DEVICE, m) { titan::implement_swiglu<titan::cuda::Swiglu>(m); }
