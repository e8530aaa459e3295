// Attention: which kernels a shape gets, and their launches.
#pragma once

#include <type_traits>

#include "cuda/attention_mma.cuh"
#include "cuda/attention_simt.cuh"

namespace titan {

inline unsigned tiles_of(int rows, int a_tile) { return unsigned((rows + a_tile - 1) / a_tile); }

template <int D>
void launch_forward_mma(const AttentionShape& shape, const __nv_bfloat16* query, const __nv_bfloat16* key,
                        const __nv_bfloat16* value, const int32_t* query_segments, const int32_t* key_segments,
                        __nv_bfloat16* out, float* log_sum_exp, cudaStream_t stream) {
  const size_t bytes = sizeof(__nv_bfloat16) * (kMmaRows + 4 * kMmaTile<D>) * D;
  TITAN_LAUNCH((attention_forward_mma<D>), dim3(tiles_of(shape.queries, kMmaRows), shape.batch * shape.query_heads),
               dim3(kMmaThreads), bytes, stream, shape, query, key, value, query_segments, key_segments, out,
               log_sum_exp);
}

template <int D>
void launch_backward_mma(const AttentionShape& shape, const __nv_bfloat16* grad, const __nv_bfloat16* query,
                         const __nv_bfloat16* key, const __nv_bfloat16* value, const int32_t* query_segments,
                         const int32_t* key_segments, const float* log_sum_exp, const float* row_dot,
                         __nv_bfloat16* grad_query, __nv_bfloat16* grad_key, __nv_bfloat16* grad_value,
                         cudaStream_t stream) {
  const size_t bytes = sizeof(__nv_bfloat16) * (2 * kMmaRows + 4 * kMmaTile<D>) * D;
  TITAN_LAUNCH((attention_grad_query_mma<D>), dim3(tiles_of(shape.queries, kMmaRows), shape.batch * shape.query_heads),
               dim3(kMmaThreads), bytes, stream, shape, grad, query, key, value, query_segments, key_segments,
               log_sum_exp, row_dot, grad_query);
  TITAN_LAUNCH((attention_grad_key_value_mma<D>), dim3(tiles_of(shape.keys, kMmaRows), shape.batch * shape.key_heads),
               dim3(kMmaThreads), bytes, stream, shape, grad, query, key, value, query_segments, key_segments,
               log_sum_exp, row_dot, grad_key, grad_value);
}

// Tensors as AttentionShape says; log_sum_exp: [batch, query heads, queries].
template <class T>
void launch_attention_forward(const AttentionShape& shape, const T* query, const T* key, const T* value,
                              const int32_t* query_segments, const int32_t* key_segments, T* out, float* log_sum_exp,
                              cudaStream_t stream) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (shape.width == 64 || shape.width == 128) {
      const auto launch = shape.width == 64 ? launch_forward_mma<64> : launch_forward_mma<128>;
      launch(shape, query, key, value, query_segments, key_segments, out, log_sum_exp, stream);
      return;
    }
  }
  TITAN_LAUNCH((attention_forward_simt<T>), dim3(tiles_of(shape.queries, kSimtRows), shape.batch * shape.query_heads),
               dim3(kSimtThreads), simt_shared_bytes(shape.width), stream, shape, query, key, value, query_segments,
               key_segments, out, log_sum_exp);
}

// row_dot: scratch like log_sum_exp.
template <class T>
void launch_attention_backward(const AttentionShape& shape, const T* grad, const T* query, const T* key,
                               const T* value, const int32_t* query_segments, const int32_t* key_segments,
                               const T* out, const float* log_sum_exp, float* row_dot, T* grad_query, T* grad_key,
                               T* grad_value, cudaStream_t stream) {
  TITAN_LAUNCH((attention_row_dot<T>), dim3(shape.queries, shape.batch * shape.query_heads), dim3(32), 0, stream, shape,
               grad, out, row_dot);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (shape.width == 64 || shape.width == 128) {
      const auto launch = shape.width == 64 ? launch_backward_mma<64> : launch_backward_mma<128>;
      launch(shape, grad, query, key, value, query_segments, key_segments, log_sum_exp, row_dot, grad_query, grad_key,
             grad_value, stream);
      return;
    }
  }
  const size_t bytes = simt_shared_bytes(shape.width);
  TITAN_LAUNCH((attention_grad_query_simt<T>),
               dim3(tiles_of(shape.queries, kSimtRows), shape.batch * shape.query_heads), dim3(kSimtThreads), bytes,
               stream, shape, grad, query, key, value, query_segments, key_segments, log_sum_exp, row_dot, grad_query);
  TITAN_LAUNCH((attention_grad_key_value_simt<T>), dim3(tiles_of(shape.keys, kSimtRows), shape.batch * shape.key_heads),
               dim3(kSimtThreads), bytes, stream, shape, grad, query, key, value, query_segments, key_segments,
               log_sum_exp, row_dot, grad_key, grad_value);
}

}  // namespace titan
