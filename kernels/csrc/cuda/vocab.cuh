// What losses and labels ask of logits: one block a row. See binding/vocab.h for what each operation means.
#pragma once

#include "binding/philox.h"
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vocab_top.cuh"

namespace titan {

// grid: tokens. Shared memory: a float for each warp and each of three sums, then the keys of for_top_keys.
template <class T, int COUNT>
__global__ void __launch_bounds__(kVocabThreads)
    vocab_statistics_rows(const T* __restrict__ logits, int64_t columns, int64_t real, float inverse_temperature,
                     const int64_t* __restrict__ ids, int64_t id_count, int64_t start, int64_t size, float* sums,
                     float* picked, float* top_values, int64_t* top_ids, int64_t top_k) {
  TITAN_SHARED(float, scratch);
  RankKey* keys = reinterpret_cast<RankKey*>(scratch + 4 * kVocabWarps);
  const int64_t row = blockIdx.x;
  const T* z = logits + row * columns;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;

  float largest = -INFINITY;
  for (int64_t at = int64_t(threadIdx.x) * COUNT; at < real; at += int64_t(kVocabThreads) * COUNT) {
    const auto pack = load_pack<COUNT>(z + at);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      if (at + k < real) largest = fmaxf(largest, to_float(pack.value[k]));
    }
  }
  largest = warp_max(largest);
  if (lane == 0) scratch[warp] = largest;
  __syncthreads();
  largest = scratch[0];
  for (int i = 1; i < kVocabWarps; ++i) largest = fmaxf(largest, scratch[i]);
  __syncthreads();

  float total[3] = {0.0f, 0.0f, 0.0f};  // of e^(z-m), e^((z-m)/T), (z-m) e^(z-m)
  for (int64_t at = int64_t(threadIdx.x) * COUNT; at < real; at += int64_t(kVocabThreads) * COUNT) {
    const auto pack = load_pack<COUNT>(z + at);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      if (at + k >= real) continue;
      const float d = to_float(pack.value[k]) - largest, power = expf(d);
      total[0] += power;
      total[1] += inverse_temperature == 1.0f ? power : expf(d * inverse_temperature);
      total[2] += power > 0.0f ? d * power : (power == 0.0f ? 0.0f : power);  // -inf adds 0, NaN stays
    }
  }
  block_sum(total, scratch);
  if (threadIdx.x == 0) {
    sums[row * 4] = largest;
    for (int i = 0; i < 3; ++i) sums[row * 4 + 1 + i] = total[i];
  }
  for (int64_t j = threadIdx.x; j < id_count; j += kVocabThreads) {
    const int64_t id = ids[row * id_count + j], local = id - start;
    const float here = local >= 0 && local < real ? to_float(z[local]) : 0.0f;
    picked[row * id_count + j] = id >= 0 && id < size ? here : NAN;
  }
  if (top_k == 0) return;

  const auto key = [](float logit, int64_t column) { return rank_key(logit, column); };
  for_top_keys<T, COUNT>(z, real, top_k, key, keys, [&](int64_t place, RankKey winner) {
    const int64_t column = column_of(winner);
    top_values[row * top_k + place] = winner ? to_float(z[column]) : -INFINITY;
    top_ids[row * top_k + place] = winner ? start + column : 0;
  });
}

__device__ __forceinline__ float dense_gradient(float z, float inverse_temperature, const float* coefficient,
                                                const float* log_sum_exp) {
  const float at_one = coefficient[0] * expf(z - log_sum_exp[0]);
  if (inverse_temperature == 1.0f) return at_one;
  return at_one + coefficient[1] * expf(z * inverse_temperature - log_sum_exp[1]);
}

// grid: tokens. Shared memory: a float for each id.
template <class T, int COUNT>
__global__ void __launch_bounds__(kVocabThreads)
    vocab_gradient_rows(T* logits, int64_t columns, int64_t real, float inverse_temperature,
                   const float* __restrict__ coefficient, const float* __restrict__ log_sum_exp,
                   const int64_t* __restrict__ ids, const float* __restrict__ values, int64_t id_count,
                   int64_t start) {
  TITAN_SHARED(float, sparse);
  const int64_t row = blockIdx.x;
  T* z = logits + row * columns;
  const float c[2] = {coefficient[row * 2], coefficient[row * 2 + 1]};
  const float l[2] = {log_sum_exp[row * 2], log_sum_exp[row * 2 + 1]};
  const int64_t* id = ids + row * id_count;
  for (int64_t j = threadIdx.x; j < id_count; j += kVocabThreads) {
    const int64_t local = id[j] - start;
    if (local < 0 || local >= real) continue;
    float at = dense_gradient(to_float(z[local]), inverse_temperature, c, l);
    for (int64_t i = 0; i < id_count; ++i) at += id[i] == id[j] ? values[row * id_count + i] : 0.0f;
    sparse[j] = at;
  }
  __syncthreads();  // the logits at the ids have been read
  for (int64_t at = int64_t(threadIdx.x) * COUNT; at < columns; at += int64_t(kVocabThreads) * COUNT) {
    auto pack = load_pack<COUNT>(z + at);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const bool there = at + k < real;
      pack.value[k] =
          from_float<T>(there ? dense_gradient(to_float(pack.value[k]), inverse_temperature, c, l) : 0.0f);
    }
    store_pack<COUNT>(z + at, pack);
  }
  __syncthreads();  // and the whole row has been written
  for (int64_t j = threadIdx.x; j < id_count; j += kVocabThreads) {
    const int64_t local = id[j] - start;
    if (local >= 0 && local < real) z[local] = from_float<T>(sparse[j]);
  }
}

// grid: enough threads for tokens * draws
static __global__ void counter_uniform_elements(uint64_t seed, const int64_t* __restrict__ sample,
                                const int64_t* __restrict__ position, int64_t tokens, int64_t draws, double* out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < tokens * draws) out[i] = philox_uniform(seed, sample[i / draws], position[i / draws], i % draws);
}

template <class T, int COUNT>
void launch_statistics(const T* logits, int64_t tokens, int64_t columns, int64_t real, float inverse_temperature,
                       const int64_t* ids, int64_t id_count, int64_t start, int64_t size, float* sums, float* picked,
                       float* top_values, int64_t* top_ids, int64_t top_k, cudaStream_t stream) {
  const size_t bytes = 4 * kVocabWarps * sizeof(float) + (top_k == 0 ? 0 : top_keys<COUNT>(real)) * sizeof(RankKey);
  TITAN_LAUNCH((vocab_statistics_rows<T, COUNT>), dim3(unsigned(tokens)), dim3(kVocabThreads), bytes, stream, logits,
               columns, real, inverse_temperature, ids, id_count, start, size, sums, picked, top_values, top_ids,
               top_k);
}

template <class T, int COUNT>
void launch_gradient(T* logits, int64_t tokens, int64_t columns, int64_t real, float inverse_temperature,
                     const float* coefficient, const float* log_sum_exp, const int64_t* ids, const float* values,
                     int64_t id_count, int64_t start, cudaStream_t stream) {
  TITAN_LAUNCH((vocab_gradient_rows<T, COUNT>), dim3(unsigned(tokens)), dim3(kVocabThreads), id_count * sizeof(float),
               stream, logits, columns, real, inverse_temperature, coefficient, log_sum_exp, ids, values, id_count,
               start);
}

}  // namespace titan
