// Operations on a chunk of logits [N, V], where V may be one rank's part of the vocabulary: columns [start, start + V) of
// `size` in all; columns from `size` on are padding and count as absent.
//
// They are the parts of a loss or a label that look at every logit. What is left between them are sums over ranks and
// tensors of a few numbers per token, which titan.ops.head does in plain torch.
#pragma once

#include "binding/binding.h"

namespace titan {

constexpr int64_t kTailBlock = 256;  // columns whose tail weights are summed together

// Real columns of this part: those that are not padding.
inline int64_t real_columns(const Arguments& arguments, const Tensor& logits, int64_t start, int64_t size) {
  arguments.floating(logits, "logits");
  arguments.require(logits.dim() == 2, "logits", "must be [tokens, columns], got " + shape_text(sizes_of(logits)));
  arguments.require(start >= 0, "start", "must be at least 0, got " + std::to_string(start));
  arguments.require(size >= 1, "size", "must be at least 1, got " + std::to_string(size));
  const int64_t left = size - start;
  return left < 0 ? 0 : (left < logits.size(1) ? left : logits.size(1));
}

// [tokens, any] ids of the whole vocabulary. On a GPU nobody looks: an id out of range gives NaN there.
inline void vocabulary_ids(const Arguments& arguments, const Tensor& ids, const char* name, const Tensor& logits,
                           int64_t size) {
  arguments.same_device(ids, name, logits);
  arguments.type(ids, name, kInt64);
  arguments.require(ids.dim() == 2 && ids.size(0) == logits.size(0), name,
                    "must be [" + std::to_string(logits.size(0)) + ", any], got " + shape_text(sizes_of(ids)));
  if (!ids.is_cpu()) return;
  const int64_t* values = read<int64_t>(ids);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    arguments.require(values[i] >= 0 && values[i] < size, name,
                      "must be in [0, " + std::to_string(size) + "), got " + std::to_string(values[i]));
  }
}

inline void positive_temperature(const Arguments& arguments, double temperature) {
  arguments.require(temperature > 0, "temperature", "must be above 0, got " + std::to_string(temperature));
}

// One look at every logit.
// sums [N, 4]: maximum m, sum of e^(z-m), sum of e^((z-m)/T), sum of (z-m) e^(z-m)
// picked [N, J]: logits at ids, 0 where another part holds the id
// top_values, top_ids [N, K]: the largest logits, ties by smaller id; -inf and 0 where there are fewer than K
template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> vocab_statistics(const Tensor& logits_any, const Tensor& ids_any,
                                                            int64_t top_k, int64_t start, int64_t size,
                                                            double temperature) {
  const Arguments arguments{"vocab_statistics"};
  const int64_t real = real_columns(arguments, logits_any, start, size);
  const Tensor logits = dense(logits_any), ids = dense(ids_any);
  vocabulary_ids(arguments, ids, "ids", logits, size);
  positive_temperature(arguments, temperature);
  arguments.require(top_k >= 0 && top_k <= Kernels::kLargestTopK, "top_k",
                    "must be from 0 to " + std::to_string(Kernels::kLargestTopK) + ", got " + std::to_string(top_k));
  const int64_t tokens = logits.size(0);
  Tensor sums = torch::stable::new_empty(logits, {tokens, 4}, kFloat);
  Tensor picked = torch::stable::new_empty(logits, {tokens, ids.size(1)}, kFloat);
  Tensor top_values = torch::stable::new_empty(logits, {tokens, top_k}, kFloat);
  Tensor top_ids = torch::stable::new_empty(logits, {tokens, top_k}, kInt64);
  if (tokens == 0) return {sums, picked, top_values, top_ids};
  const typename Kernels::Launch launch(logits);
  with_type<Kernels>(logits, [&](auto element) {
    using T = decltype(element);
    Kernels::statistics(launch, read<T>(logits), tokens, logits.size(1), real, float(1.0 / temperature),
                        read<int64_t>(ids), ids.size(1), start, size, write<float>(sums), write<float>(picked),
                        write<float>(top_values), write<int64_t>(top_ids), top_k);
  });
  return {sums, picked, top_values, top_ids};
}

// Turns logits into their gradient, in place:
//   z[n, v] = c[n, 0] e^(z - l[n, 0]) + c[n, 1] e^(z/T - l[n, 1]) + sum of values[n, j] where ids[n, j] = v
// coefficient c and log_sum_exp l: [N, 2] float32 (column 1 is unused at T = 1); values: [N, J] float32. Ids may repeat.
// Padding becomes 0. Values are added in float32 before rounding, so that q - 1 keeps its digits in bfloat16.
template <class Kernels>
void vocab_gradient(Tensor logits, const Tensor& coefficient_any, const Tensor& log_sum_exp_any, const Tensor& ids_any,
                    const Tensor& values_any, int64_t start, int64_t size, double temperature) {
  const Arguments arguments{"vocab_gradient_"};
  const int64_t real = real_columns(arguments, logits, start, size), tokens = logits.size(0);
  arguments.require(logits.is_contiguous(), "logits", "must be contiguous, for they are overwritten");
  const Tensor coefficient = dense(coefficient_any), log_sum_exp = dense(log_sum_exp_any);
  const Tensor ids = dense(ids_any), values = dense(values_any);
  arguments.like(coefficient, "coefficient", {tokens, 2}, kFloat, logits);
  arguments.like(log_sum_exp, "log_sum_exp", {tokens, 2}, kFloat, logits);
  vocabulary_ids(arguments, ids, "ids", logits, size);
  arguments.like(values, "values", sizes_of(ids), kFloat, logits);
  arguments.require(ids.size(1) <= Kernels::kMostIds, "ids",
                    "may be at most " + std::to_string(Kernels::kMostIds) + " a token, got " +
                        std::to_string(ids.size(1)));
  positive_temperature(arguments, temperature);
  if (logits.numel() == 0) return;
  const typename Kernels::Launch launch(logits);
  with_type<Kernels>(logits, [&](auto element) {
    using T = decltype(element);
    Kernels::gradient(launch, write<T>(logits), tokens, logits.size(1), real, float(1.0 / temperature),
                      read<float>(coefficient), read<float>(log_sum_exp), read<int64_t>(ids), read<float>(values),
                      ids.size(1), start);
  });
}

// Weight of the tail in whole numbers, so that sums are the same whatever their order and however the vocabulary is cut:
//   w[v] = round(2^35 e^((z[v] - t)/T)) for z[v] <= t that are not among head_ids, else 0
// threshold t: [N] float32, the largest logit of the tail. head_ids: [N, K], all ids above it and those that the head
// has of the equal ones. returns [N, ceil(V / 256)] float64, one sum a block.
template <class Kernels>
Tensor vocab_tail_blocks(const Tensor& logits_any, const Tensor& head_ids_any, const Tensor& threshold_any,
                         int64_t start, int64_t size, double temperature) {
  const Arguments arguments{"vocab_tail_blocks"};
  const int64_t real = real_columns(arguments, logits_any, start, size);
  const Tensor logits = dense(logits_any), head_ids = dense(head_ids_any), threshold = dense(threshold_any);
  const int64_t tokens = logits.size(0), columns = logits.size(1);
  vocabulary_ids(arguments, head_ids, "head_ids", logits, size);
  arguments.like(threshold, "threshold", {tokens}, kFloat, logits);
  positive_temperature(arguments, temperature);
  const int64_t blocks = (columns + kTailBlock - 1) / kTailBlock;
  Tensor sums = torch::stable::new_empty(logits, {tokens, blocks}, ScalarType::Double);
  if (sums.numel() == 0) return sums;
  const typename Kernels::Launch launch(logits);
  with_type<Kernels>(logits, [&](auto element) {
    using T = decltype(element);
    Kernels::tail_blocks(launch, read<T>(logits), tokens, columns, real, float(1.0 / temperature),
                         read<int64_t>(head_ids), head_ids.size(1), read<float>(threshold), start,
                         write<double>(sums), blocks);
  });
  return sums;
}

// The tail entry that each target falls on, counting weights from column 0 of this part up.
// blocks: from vocab_tail_blocks; targets: [N, M] float64 whole numbers; one below 0 or beyond the part's sum is another
// part's. returns ids [N, M] of the whole vocabulary and their logits; 0 and 0 where the target is not here.
template <class Kernels>
std::tuple<Tensor, Tensor> vocab_tail_draws(const Tensor& logits_any, const Tensor& head_ids_any,
                                            const Tensor& threshold_any, const Tensor& blocks_any,
                                            const Tensor& targets_any, int64_t start, int64_t size,
                                            double temperature) {
  const Arguments arguments{"vocab_tail_draws"};
  const int64_t real = real_columns(arguments, logits_any, start, size);
  const Tensor logits = dense(logits_any), head_ids = dense(head_ids_any), threshold = dense(threshold_any);
  const Tensor blocks = dense(blocks_any), targets = dense(targets_any);
  const int64_t tokens = logits.size(0), columns = logits.size(1);
  vocabulary_ids(arguments, head_ids, "head_ids", logits, size);
  arguments.like(threshold, "threshold", {tokens}, kFloat, logits);
  arguments.like(blocks, "blocks", {tokens, (columns + kTailBlock - 1) / kTailBlock}, ScalarType::Double, logits);
  arguments.same_device(targets, "targets", logits);
  arguments.type(targets, "targets", ScalarType::Double);
  arguments.require(targets.dim() == 2 && targets.size(0) == tokens, "targets",
                    "must be [" + std::to_string(tokens) + ", draws], got " + shape_text(sizes_of(targets)));
  positive_temperature(arguments, temperature);
  Tensor ids = torch::stable::new_empty(logits, {tokens, targets.size(1)}, kInt64);
  Tensor drawn = torch::stable::new_empty(logits, {tokens, targets.size(1)}, kFloat);
  if (ids.numel() == 0) return {ids, drawn};
  const typename Kernels::Launch launch(logits);
  with_type<Kernels>(logits, [&](auto element) {
    using T = decltype(element);
    Kernels::tail_draws(launch, read<T>(logits), tokens, columns, real, float(1.0 / temperature),
                        read<int64_t>(head_ids), head_ids.size(1), read<float>(threshold), start,
                        read<double>(blocks), blocks.size(1), read<double>(targets), targets.size(1),
                        write<int64_t>(ids), write<float>(drawn));
  });
  return {ids, drawn};
}

// The tail entries of highest priority e^((z - t)/T) / u, where u in (0, 1) is a number of the token and the entry's id
// (binding/turn.h), with 2^w the least that is not below size.
// threshold t and head_ids: as for vocab_tail_blocks. turns: [N, 4] int64, a, b, c and d of each token.
// returns ids [N, count] of the whole vocabulary, their logits and their priorities, falling, ties by smaller id; 0, -inf
// and 0 where this part has no more entries of a priority above 0.
template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> vocab_tail_priorities(const Tensor& logits_any, const Tensor& head_ids_any,
                                                         const Tensor& threshold_any, const Tensor& turns_any,
                                                         int64_t count, int64_t start, int64_t size,
                                                         double temperature) {
  const Arguments arguments{"vocab_tail_priorities"};
  const int64_t real = real_columns(arguments, logits_any, start, size);
  arguments.require(size < int64_t(1) << 31, "size", "must be below 2^31, got " + std::to_string(size));
  const Tensor logits = dense(logits_any), head_ids = dense(head_ids_any), threshold = dense(threshold_any);
  const Tensor turns = dense(turns_any);
  const int64_t tokens = logits.size(0);
  vocabulary_ids(arguments, head_ids, "head_ids", logits, size);
  arguments.like(threshold, "threshold", {tokens}, kFloat, logits);
  arguments.like(turns, "turns", {tokens, 4}, kInt64, logits);
  arguments.require(count >= 0 && count <= Kernels::kLargestTopK, "count",
                    "must be from 0 to " + std::to_string(Kernels::kLargestTopK) + ", got " + std::to_string(count));
  positive_temperature(arguments, temperature);
  Tensor ids = torch::stable::new_empty(logits, {tokens, count}, kInt64);
  Tensor drawn = torch::stable::new_empty(logits, {tokens, count}, kFloat);
  Tensor priorities = torch::stable::new_empty(logits, {tokens, count}, kFloat);
  if (ids.numel() == 0) return {ids, drawn, priorities};
  const typename Kernels::Launch launch(logits);
  with_type<Kernels>(logits, [&](auto element) {
    using T = decltype(element);
    Kernels::tail_priorities(launch, read<T>(logits), tokens, logits.size(1), real, float(1.0 / temperature),
                             read<int64_t>(head_ids), head_ids.size(1), read<float>(threshold), read<int64_t>(turns),
                             start, size, write<int64_t>(ids), write<float>(drawn), write<float>(priorities), count);
  });
  return {ids, drawn, priorities};
}

// Uniform numbers in [0, 1) with 53 bits, a pure function of (seed, sample, position, draw): Philox 4x32-10
// (Salmon et al. 2011) with key = seed and counter = (draw, position, sample). sample, position: [N] int64 -> [N, draws].
template <class Kernels>
Tensor counter_uniform(int64_t seed, const Tensor& sample_any, const Tensor& position_any, int64_t draws) {
  const Arguments arguments{"counter_uniform"};
  const Tensor sample = dense(sample_any), position = dense(position_any);
  arguments.type(sample, "sample", kInt64);
  arguments.require(sample.dim() == 1, "sample", "must be [tokens], got " + shape_text(sizes_of(sample)));
  arguments.like(position, "position", sizes_of(sample), kInt64, sample);
  arguments.require(draws >= 0, "draws", "must be at least 0, got " + std::to_string(draws));
  Tensor uniform = torch::stable::new_empty(sample, {sample.numel(), draws}, ScalarType::Double);
  if (uniform.numel() == 0) return uniform;
  const typename Kernels::Launch launch(sample);
  Kernels::uniform(launch, uint64_t(seed), read<int64_t>(sample), read<int64_t>(position), sample.numel(), draws,
                   write<double>(uniform));
  return uniform;
}

template <class Kernels>
void implement_vocab(torch::stable::detail::StableLibrary& library) {
  library.impl("vocab_statistics", TORCH_BOX(&vocab_statistics<Kernels>));
  library.impl("vocab_gradient_", TORCH_BOX(&vocab_gradient<Kernels>));
  library.impl("vocab_tail_blocks", TORCH_BOX(&vocab_tail_blocks<Kernels>));
  library.impl("vocab_tail_draws", TORCH_BOX(&vocab_tail_draws<Kernels>));
  library.impl("vocab_tail_priorities", TORCH_BOX(&vocab_tail_priorities<Kernels>));
  library.impl("counter_uniform", TORCH_BOX(&counter_uniform<Kernels>));
}

}  // namespace titan
