// Attention on CUDA tensors; compiled by g++ against the host shim, on CPU tensors of the library titan_shim.
#include "cuda/attention.cuh"

#include "binding/attention.h"
#include "cuda/launch.h"

namespace titan::cuda {
namespace {

struct Attention {
  using Bf16 = __nv_bfloat16;
  using Launch = cuda::Launch;

  template <class T>
  static void forward(const Launch& launch, const AttentionShape& shape, const T* query, const T* key, const T* value,
                      const int32_t* query_segments, const int32_t* key_segments, T* out, float* log_sum_exp) {
    launch_attention_forward(shape, query, key, value, query_segments, key_segments, out, log_sum_exp, launch.stream);
  }
  template <class T>
  static void backward(const Launch& launch, const AttentionShape& shape, const T* grad, const T* query, const T* key,
                       const T* value, const int32_t* query_segments, const int32_t* key_segments, const T* out,
                       const float* log_sum_exp, float* row_dot, T* grad_query, T* grad_key, T* grad_value) {
    launch_attention_backward(shape, grad, query, key, value, query_segments, key_segments, out, log_sum_exp, row_dot,
                              grad_query, grad_key, grad_value, launch.stream);
  }
};

}  // namespace
}  // namespace titan::cuda

TITAN_IMPLEMENT(TITAN_LIBRARY, TITAN_DEVICE, m) { titan::implement_attention<titan::cuda::Attention>(m); }
