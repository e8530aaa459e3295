// Losses and labels from logits: one block a row. See binding/vocab.h for what each operation means.
#pragma once

#include "binding/philox.h"
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"

namespace titan {

constexpr int kVocabThreads = 256, kVocabWarps = kVocabThreads / kLanes;
constexpr int kVocabTailBlock = 256;          // columns whose tail weights are summed together
constexpr float kVocabTailScale = 34359738368.0f;  // 2^35

// An order of (logit, column) pairs as one number: larger logits first, then smaller columns. NaN comes after everything.
using RankKey = unsigned long long;

__device__ __forceinline__ RankKey rank_key(float logit, int64_t column) {
  if (logit != logit) return 0;
  const float one_zero = logit + 0.0f;  // -0 and 0 are equal
  uint32_t bits;
  memcpy(&bits, &one_zero, sizeof bits);
  const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
  return RankKey(rising) << 32 | (0xffffffffu - uint32_t(column));
}

__device__ __forceinline__ int64_t column_of(RankKey key) { return int64_t(0xffffffffu - uint32_t(key)); }

__device__ __forceinline__ RankKey warp_largest(RankKey key) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const RankKey other = __shfl_xor_sync(0xffffffffu, key, step);
    key = other > key ? other : key;
  }
  return key;
}

// The largest key below `before` of a tile: as many columns as a warp loads at once.
template <class T, int COUNT>
__device__ __forceinline__ RankKey largest_of_tile(const T* row, int64_t real, int64_t tile, RankKey before) {
  const int64_t first = (tile * kLanes + threadIdx.x % kLanes) * COUNT;
  RankKey largest = 0;
  if (first < real) {
    const auto pack = load_pack<COUNT>(row + first);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const RankKey key = first + k < real ? rank_key(to_float(pack.value[k]), first + k) : 0;
      if (key < before && key > largest) largest = key;
    }
  }
  return warp_largest(largest);
}

// grid: tokens. Shared memory: a float for each warp and each of three sums, then, for top_k, a key for each tile.
template <class T, int COUNT>
__global__ void __launch_bounds__(kVocabThreads)
    vocab_statistics_rows(const T* __restrict__ logits, int64_t columns, int64_t real, float inverse_temperature,
                     const int64_t* __restrict__ ids, int64_t id_count, int64_t start, int64_t size, float* sums,
                     float* picked, float* top_values, int64_t* top_ids, int64_t top_k) {
  TITAN_SHARED(float, scratch);
  RankKey* winners = reinterpret_cast<RankKey*>(scratch + 4 * kVocabWarps);  // of each warp
  RankKey* tiles = winners + kVocabWarps;
  const int64_t row = blockIdx.x, tile_count = (real + kLanes * COUNT - 1) / (kLanes * COUNT);
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

  for (int64_t tile = warp; tile < tile_count; tile += kVocabWarps) {
    const RankKey key = largest_of_tile<T, COUNT>(z, real, tile, ~RankKey(0));
    if (lane == 0) tiles[tile] = key;
  }
  for (int64_t place = 0; place < top_k; ++place) {
    __syncthreads();
    RankKey winner = 0;
    for (int64_t tile = threadIdx.x; tile < tile_count; tile += kVocabThreads) {
      winner = tiles[tile] > winner ? tiles[tile] : winner;
    }
    winner = warp_largest(winner);
    if (lane == 0) winners[warp] = winner;
    __syncthreads();
    for (int i = 0; i < kVocabWarps; ++i) winner = winners[i] > winner ? winners[i] : winner;
    const int64_t column = column_of(winner);
    if (threadIdx.x == 0) {
      top_values[row * top_k + place] = winner ? to_float(z[column]) : -INFINITY;
      top_ids[row * top_k + place] = winner ? start + column : 0;
    }
    if (winner != 0 && warp == 0) {  // what is left of the winner's tile comes after it in the order
      const int64_t tile = column / (kLanes * COUNT);
      const RankKey next = largest_of_tile<T, COUNT>(z, real, tile, winner);
      if (lane == 0) tiles[tile] = next;
    }
  }
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

// Weights of one row's tail, as whole numbers.
template <class T>
struct Tail {
  const T* z;
  int64_t real, start;
  float inverse_temperature, threshold;
  const int64_t* head;
  int64_t head_count;

  __device__ __forceinline__ double weight(int64_t column) const {
    if (column >= real) return 0.0;
    const float logit = to_float(z[column]);
    if (!(logit <= threshold)) return 0.0;
    if (logit == threshold) {  // only among equals has the head to be looked at
      for (int64_t i = 0; i < head_count; ++i) {
        if (head[i] == start + column) return 0.0;
      }
    }
    return double(rintf(expf((logit - threshold) * inverse_temperature) * kVocabTailScale));
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
  const int64_t tiles = top_k == 0 ? 0 : (real + kLanes * COUNT - 1) / (kLanes * COUNT);
  const size_t bytes = 4 * kVocabWarps * sizeof(float) + (kVocabWarps + tiles) * sizeof(RankKey);
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
