// What the attention kernels are told besides pointers.
#pragma once

namespace titan {

constexpr int kWidestHead = 256;

// Tensors are contiguous: query [queries, batch, query_heads, width], key and value [keys, batch, key_heads, width].
struct AttentionShape {
  int batch, query_heads, key_heads, queries, keys, width;
  bool causal;  // query i sees keys up to i + keys - queries
  float scale;  // of the scores
};

}  // namespace titan
