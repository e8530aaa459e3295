// Attention with grouped queries (arXiv 2305.13245), tile by tile without the score matrix (arXiv 2307.08691).
#pragma once

#include "binding/attention_shape.h"
#include "binding/binding.h"

namespace titan {

// Checks the arguments that both directions share, and says what the kernels need to know of them.
inline AttentionShape attention_shape(const Arguments& arguments, const Tensor& query, const Tensor& key,
                                      const Tensor& value, const std::optional<Tensor>& query_segments,
                                      const std::optional<Tensor>& key_segments, bool causal, double scale) {
  arguments.floating(query, "query");
  arguments.require(query.dim() == 4, "query", "must be [S, B, heads, D], got " + shape_text(sizes_of(query)));
  arguments.require(key.dim() == 4, "key", "must be [S, B, heads, D], got " + shape_text(sizes_of(key)));
  const int64_t queries = query.size(0), batch = query.size(1), heads = query.size(2), width = query.size(3);
  const int64_t keys = key.size(0), key_heads = key.size(2);
  arguments.like(key, "key", {keys, batch, key_heads, width}, query.scalar_type(), query);
  arguments.like(value, "value", {keys, batch, key_heads, width}, query.scalar_type(), query);
  arguments.require(key_heads > 0 && heads % key_heads == 0, "query",
                    "must have a multiple of the key's " + std::to_string(key_heads) + " heads, got " +
                        std::to_string(heads));
  arguments.require(width > 0 && width <= kWidestHead && width % 4 == 0, "query",
                    "must have heads of a width that is a multiple of 4 and at most " + std::to_string(kWidestHead) +
                        ", got " + std::to_string(width));
  arguments.require(query_segments.has_value() == key_segments.has_value(), "query_segments",
                    "and key_segments belong together, got one of them");
  if (query_segments && key_segments) {
    arguments.like(*query_segments, "query_segments", {batch, queries}, kInt32, query);
    arguments.like(*key_segments, "key_segments", {batch, keys}, kInt32, query);
  }
  AttentionShape shape{};
  shape.batch = int(batch);
  shape.query_heads = int(heads);
  shape.key_heads = int(key_heads);
  shape.queries = int(queries);
  shape.keys = int(keys);
  shape.width = int(width);
  shape.causal = causal;
  shape.scale = float(scale);
  return shape;
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

// query: [Sq, B, Hq, D], key, value: [Sk, B, Hkv, D]; segments int32 [B, Sq] and [B, Sk] or none. Query i sees key j if
// their segments are equal and, when causal, j <= i + Sk - Sq.
// returns [Sq, B, Hq, D] and the log-sum-exp of the scores [B, Hq, Sq] float32; 0 and -inf where a query sees nothing
template <class Kernels>
std::tuple<Tensor, Tensor> attention(const Tensor& query_any, const Tensor& key_any, const Tensor& value_any,
                                     const std::optional<Tensor>& query_segments_any,
                                     const std::optional<Tensor>& key_segments_any, bool causal, double scale) {
  const AttentionShape shape = attention_shape(Arguments{"attention"}, query_any, key_any, value_any,
                                               query_segments_any, key_segments_any, causal, scale);
  const Tensor query = dense(query_any), key = dense(key_any), value = dense(value_any);
  const auto query_segments = dense(query_segments_any), key_segments = dense(key_segments_any);
  Tensor out = torch::stable::empty_like(query);
  Tensor log_sum_exp = torch::stable::new_empty(query, {shape.batch, shape.query_heads, shape.queries}, kFloat);
  if (out.numel() == 0) return {out, log_sum_exp};
  const typename Kernels::Launch launch(query);
  with_type<Kernels>(query, [&](auto element) {
    using T = decltype(element);
    Kernels::forward(launch, shape, read<T>(query), read<T>(key), read<T>(value), read<int32_t>(query_segments),
                     read<int32_t>(key_segments), write<T>(out), write<float>(log_sum_exp));
  });
  return {out, log_sum_exp};
}

// Gradients of query, key and value.
template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_any, const Tensor& query_any, const Tensor& key_any, const Tensor& value_any,
    const std::optional<Tensor>& query_segments_any, const std::optional<Tensor>& key_segments_any,
    const Tensor& out_any, const Tensor& log_sum_exp_any, bool causal, double scale) {
  const Arguments arguments{"attention_backward"};
  const AttentionShape shape = attention_shape(arguments, query_any, key_any, value_any, query_segments_any,
                                               key_segments_any, causal, scale);
  arguments.like(grad_any, "grad", sizes_of(query_any), query_any.scalar_type(), query_any);
  arguments.like(out_any, "out", sizes_of(query_any), query_any.scalar_type(), query_any);
  arguments.like(log_sum_exp_any, "log_sum_exp", {shape.batch, shape.query_heads, shape.queries}, kFloat, query_any);
  const Tensor grad = dense(grad_any), query = dense(query_any), key = dense(key_any), value = dense(value_any);
  const Tensor out = dense(out_any), log_sum_exp = dense(log_sum_exp_any);
  const auto query_segments = dense(query_segments_any), key_segments = dense(key_segments_any);
  Tensor grad_query = torch::stable::empty_like(query), grad_key = torch::stable::empty_like(key);
  Tensor grad_value = torch::stable::empty_like(value);
  if (query.numel() == 0 || key.numel() == 0) {
    for (Tensor* gradient : {&grad_query, &grad_key, &grad_value}) torch::stable::zero_(*gradient);
    return {grad_query, grad_key, grad_value};
  }
  // Row sums of grad * out: what the softmax's gradient takes away from every score of a query.
  Tensor row_dot = torch::stable::empty_like(log_sum_exp);
  const typename Kernels::Launch launch(query);
  with_type<Kernels>(query, [&](auto element) {
    using T = decltype(element);
    Kernels::backward(launch, shape, read<T>(grad), read<T>(query), read<T>(key), read<T>(value),
                      read<int32_t>(query_segments), read<int32_t>(key_segments), read<T>(out),
                      read<float>(log_sum_exp), write<float>(row_dot), write<T>(grad_query), write<T>(grad_key),
                      write<T>(grad_value));
  });
  return {grad_query, grad_key, grad_value};
}

template <class Kernels>
void implement_attention(torch::stable::detail::StableLibrary& library) {
  library.impl("attention", TORCH_BOX(&attention<Kernels>));
  library.impl("attention_backward", TORCH_BOX(&attention_backward<Kernels>));
}

}  // namespace titan
