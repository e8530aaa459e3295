// Draws from the tail of each row: what is not above its threshold and not in its head. See binding/vocab.h.
#pragma once

#include "binding/turn.h"
#include "cuda/vocab_top.cuh"

namespace titan {

constexpr int kVocabTailBlock = 256;  // columns whose tail weights are summed together
constexpr float kVocabTailScale = 34359738368.0f;  // 2^35

// One row's tail.
template <class T>
struct Tail {
  const T* z;
  int64_t real, start;
  float inverse_temperature, threshold;
  const int64_t* head;
  int64_t head_count;

  __device__ __forceinline__ bool holds(float logit, int64_t column) const {
    if (logit == threshold) {  // only among equals has the head to be looked at
      for (int64_t i = 0; i < head_count; ++i) {
        if (head[i] == start + column) return false;
      }
    }
    return logit <= threshold;
  }
  __device__ __forceinline__ double weight(int64_t column) const {  // a whole number
    if (column >= real) return 0.0;
    const float logit = to_float(z[column]);
    if (!holds(logit, column)) return 0.0;
    return double(rintf(expf((logit - threshold) * inverse_temperature) * kVocabTailScale));
  }
  __device__ __forceinline__ float priority(float logit, int64_t column, const Turn& turn) const {
    const float exponent = (logit - threshold) * inverse_temperature;
    if (!(exponent >= kLeastExponent) || !holds(logit, column)) return 0.0f;
    return expf(exponent) / turn.uniform(uint32_t(start + column));
  }
};

__device__ __forceinline__ double warp_sum_exact(double value) {  // of whole numbers below 2^53: any order gives the same
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// grid: tokens; a warp sums a block of columns.
template <class T>
__global__ void __launch_bounds__(kVocabThreads)
    vocab_tail_blocks_rows(const T* __restrict__ logits, int64_t columns, int64_t real, float inverse_temperature,
                      const int64_t* __restrict__ head_ids, int64_t head_count, const float* __restrict__ threshold,
                      int64_t start, double* sums, int64_t blocks) {
  const int64_t row = blockIdx.x;
  const Tail<T> tail{logits + row * columns, real,       start, inverse_temperature, threshold[row],
                     head_ids + row * head_count, head_count};
  for (int64_t block = threadIdx.x / kLanes; block < blocks; block += kVocabWarps) {
    double sum = 0.0;
    for (int i = threadIdx.x % kLanes; i < kVocabTailBlock; i += kLanes) sum += tail.weight(block * kVocabTailBlock + i);
    sum = warp_sum_exact(sum);
    if (threadIdx.x % kLanes == 0) sums[row * blocks + block] = sum;
  }
}

// The first of `count` numbers whose running sum exceeds `left`, which loses what comes before it; -1 if none does.
template <class Numbers>
__device__ __forceinline__ int64_t find_in_sums(double& left, int64_t count, const Numbers& number) {
  const int lane = threadIdx.x % kLanes;
  for (int64_t first = 0; first < count; first += kLanes) {
    const double own = first + lane < count ? number(first + lane) : 0.0;
    double until = own;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const double before = __shfl_up_sync(0xffffffffu, until, step);
      if (lane >= step) until += before;
    }
    const unsigned hits = __ballot_sync(0xffffffffu, left < until);
    if (hits != 0) {
      const int hit = __ffs(int(hits)) - 1;
      left -= __shfl_sync(0xffffffffu, until - own, hit);
      return first + hit;
    }
    left -= __shfl_sync(0xffffffffu, until, kLanes - 1);
  }
  return -1;
}

// grid: tokens; a warp finds a draw.
template <class T>
__global__ void __launch_bounds__(kVocabThreads)
    vocab_tail_draws_rows(const T* __restrict__ logits, int64_t columns, int64_t real, float inverse_temperature,
                     const int64_t* __restrict__ head_ids, int64_t head_count, const float* __restrict__ threshold,
                     int64_t start, const double* __restrict__ sums, int64_t blocks,
                     const double* __restrict__ targets, int64_t draws, int64_t* ids, float* drawn) {
  const int64_t row = blockIdx.x;
  const Tail<T> tail{logits + row * columns, real,       start, inverse_temperature, threshold[row],
                     head_ids + row * head_count, head_count};
  for (int64_t j = threadIdx.x / kLanes; j < draws; j += kVocabWarps) {
    double left = targets[row * draws + j];
    int64_t column = -1;
    if (left >= 0) {
      const int64_t block = find_in_sums(left, blocks, [&](int64_t i) { return sums[row * blocks + i]; });
      if (block >= 0) {
        const int64_t in_block = find_in_sums(left, int64_t(kVocabTailBlock),
                                              [&](int64_t i) { return tail.weight(block * kVocabTailBlock + i); });
        column = in_block < 0 ? -1 : block * kVocabTailBlock + in_block;
      }
    }
    if (threadIdx.x % kLanes == 0) {
      ids[row * draws + j] = column < 0 ? 0 : start + column;
      drawn[row * draws + j] = column < 0 ? 0.0f : to_float(tail.z[column]);
    }
  }
}

// grid: tokens. Shared memory: the keys of for_top_keys.
template <class T, int COUNT>
__global__ void __launch_bounds__(kVocabThreads, 4)  // or ptxas keeps to 32 registers, and spills
    vocab_tail_priorities_rows(const T* __restrict__ logits, int64_t columns, int64_t real, float inverse_temperature,
                               const int64_t* __restrict__ head_ids, int64_t head_count,
                               const float* __restrict__ threshold, const int64_t* __restrict__ turns, int64_t start,
                               int64_t size, int64_t* ids, float* drawn, float* priorities, int64_t count) {
  TITAN_SHARED(RankKey, keys);
  const int64_t row = blockIdx.x;
  const Tail<T> tail{logits + row * columns, real,       start, inverse_temperature, threshold[row],
                     head_ids + row * head_count, head_count};
  const Turn turn(turns + row * 4, size);
  const auto key_of = [&](float logit, int64_t column) {
    const float priority = tail.priority(logit, column, turn);
    return priority > 0.0f ? rank_key(priority, column) : RankKey(0);
  };
  for_top_keys<T, COUNT>(tail.z, real, count, key_of, keys, [&](int64_t place, RankKey winner) {
    const int64_t column = column_of(winner), at = row * count + place;
    const float logit = winner ? to_float(tail.z[column]) : -INFINITY;
    ids[at] = winner ? start + column : 0;
    drawn[at] = logit;
    priorities[at] = winner ? tail.priority(logit, column, turn) : 0.0f;
  });
}

template <class T, int COUNT>
void launch_tail_priorities(const T* logits, int64_t tokens, int64_t columns, int64_t real, float inverse_temperature,
                            const int64_t* head_ids, int64_t head_count, const float* threshold, const int64_t* turns,
                            int64_t start, int64_t size, int64_t* ids, float* drawn, float* priorities, int64_t count,
                            cudaStream_t stream) {
  TITAN_LAUNCH((vocab_tail_priorities_rows<T, COUNT>), dim3(unsigned(tokens)), dim3(kVocabThreads),
               top_keys<COUNT>(real) * sizeof(RankKey), stream, logits, columns, real, inverse_temperature, head_ids,
               head_count, threshold, turns, start, size, ids, drawn, priorities, count);
}

}  // namespace titan
