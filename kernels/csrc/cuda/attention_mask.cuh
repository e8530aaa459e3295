// Which keys a query sees, and where the rows of a tensor are.
#pragma once

#include "binding/attention_shape.h"
#include "cuda/portable.cuh"

namespace titan {

struct AttentionMask {
  int queries, keys, offset;  // offset: how far a query's position is ahead of its number
  bool causal;
  const int32_t *query_segments, *key_segments;  // of one sample, or nullptr

  __device__ __forceinline__ bool sees(int query, int key) const {
    return query < queries && key < keys && (!causal || key <= query + offset) &&
           (query_segments == nullptr || query_segments[query] == key_segments[key]);
  }
  // Keys from here on are seen by no query below end_query.
  __device__ __forceinline__ int end_key(int end_query) const {
    return causal ? max(0, min(keys, end_query + offset)) : keys;
  }
  // Queries before this see no key from first_key on.
  __device__ __forceinline__ int first_query(int first_key) const {
    return causal ? max(0, first_key - offset) : 0;
  }
};

__device__ __forceinline__ AttentionMask attention_mask(const AttentionShape& shape, int sample,
                                                        const int32_t* query_segments, const int32_t* key_segments) {
  return {shape.queries,
          shape.keys,
          shape.keys - shape.queries,
          shape.causal,
          query_segments == nullptr ? nullptr : query_segments + int64_t(sample) * shape.queries,
          key_segments == nullptr ? nullptr : key_segments + int64_t(sample) * shape.keys};
}

// The rows of one head of one sample in a tensor [steps, batch, heads, width]: row i is at start + i * stride.
template <class T>
struct HeadRows {
  T* start;
  int64_t stride;

  __device__ __forceinline__ T* row(int index) const { return start + index * stride; }
};

template <class T>
__device__ __forceinline__ HeadRows<T> head_rows(T* tensor, int batch, int heads, int width, int sample, int head) {
  return {tensor + (int64_t(sample) * heads + head) * width, int64_t(batch) * heads * width};
}

}  // namespace titan
