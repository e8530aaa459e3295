// RMSNorm and LayerNorm on CUDA tensors; compiled by g++ against the host shim, on CPU tensors of titan_shim.
#include "cuda/norm.cuh"

#include "binding/norm.h"
#include "cuda/launch.h"

namespace titan::cuda {
namespace {

struct Norm {
  using Bf16 = __nv_bfloat16;
  using Launch = cuda::Launch;

  template <class T>
  static int64_t partial_rows(int64_t rows, int64_t width) {
    return norm_partial_rows(rows, width);
  }
  template <class T>
  static void forward(const Launch& launch, const NormForward<T>& a) {
    a.bias ? launch_norm_forward<T, true>(a, launch.stream) : launch_norm_forward<T, false>(a, launch.stream);
  }
  template <class T>
  static void backward(const Launch& launch, const NormBackward<T>& a) {
    a.mean ? launch_norm_backward<T, true>(a, launch.stream) : launch_norm_backward<T, false>(a, launch.stream);
  }
};

}  // namespace
}  // namespace titan::cuda

TITAN_IMPLEMENT(TITAN_LIBRARY, TITAN_DEVICE, m) { titan::implement_norm<titan::cuda::Norm>(m); }
