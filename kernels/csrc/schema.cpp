// Every operation of the library, by name and arguments. CPU and CUDA files add their implementations.
#include "binding/binding.h"

#define TITAN_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)  // expands TITAN_LIBRARY first

TITAN_DEFINE(TITAN_LIBRARY, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? query_segments, Tensor? key_segments, bool causal,"
      " float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? query_segments,"
      " Tensor? key_segments, Tensor out, Tensor log_sum_exp, bool causal, float scale) -> (Tensor, Tensor, Tensor)");

  m.def("swiglu(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor");

  m.def("rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor? grad_hidden, Tensor hidden, Tensor weight, Tensor rstd)"
      " -> (Tensor, Tensor)");
  m.def(
      "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor? grad_hidden, Tensor hidden, Tensor weight, Tensor mean, Tensor rstd)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");

  m.def(
      "vocab_statistics(Tensor logits, Tensor ids, int top_k, int start, int size, float temperature)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "vocab_gradient_(Tensor(a!) logits, Tensor coefficient, Tensor log_sum_exp, Tensor ids, Tensor values, int start,"
      " int size, float temperature) -> ()");
  m.def(
      "vocab_tail_blocks(Tensor logits, Tensor head_ids, Tensor threshold, int start, int size, float temperature)"
      " -> Tensor");
  m.def(
      "vocab_tail_draws(Tensor logits, Tensor head_ids, Tensor threshold, Tensor blocks, Tensor targets, int start,"
      " int size, float temperature) -> (Tensor, Tensor)");
  m.def(
      "vocab_tail_priorities(Tensor logits, Tensor head_ids, Tensor threshold, Tensor turns, int count, int start,"
      " int size, float temperature) -> (Tensor, Tensor, Tensor)");
  m.def("counter_uniform(int seed, Tensor sample, Tensor position, int draws) -> Tensor");
}
