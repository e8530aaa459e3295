// Rotary position embedding on CUDA tensors; compiled by g++ against the host shim, on CPU tensors of titan_shim.
#include "cuda/rope.cuh"

#include "binding/rope.h"
#include "cuda/launch.h"

namespace titan::cuda {
namespace {

struct Rope {
  using Bf16 = __nv_bfloat16;
  using Launch = cuda::Launch;

  template <class T>
  static void turn(const Launch& launch, const RopeHeads<T>& a) {
    launch_rope(a, launch.stream);
  }
};

}  // namespace
}  // namespace titan::cuda

TITAN_IMPLEMENT(TITAN_LIBRARY, TITAN_DEVICE, m) { titan::implement_rope<titan::cuda::Rope>(m); }
