// The largest entries of a row, one after the other, by a block of threads.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"

namespace titan {

constexpr int kVocabThreads = 256, kVocabWarps = kVocabThreads / kLanes;

// An order of (value, column) pairs as one number: larger values first, then smaller columns. NaN comes after all.
using RankKey = unsigned long long;

__device__ __forceinline__ RankKey rank_key(float value, int64_t column) {
  if (value != value) return 0;
  const float one_zero = value + 0.0f;  // -0 and 0 are equal
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
template <class T, int COUNT, class KeyOf>
__device__ __forceinline__ RankKey largest_of_tile(const T* row, int64_t real, int64_t tile, RankKey before,
                                                   const KeyOf& key_of) {
  const int64_t first = (tile * kLanes + threadIdx.x % kLanes) * COUNT;
  RankKey largest = 0;
  if (first < real) {
    const auto pack = load_pack<COUNT>(row + first);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const RankKey key = first + k < real ? key_of(to_float(pack.value[k]), first + k) : 0;
      if (key < before && key > largest) largest = key;
    }
  }
  return warp_largest(largest);
}

template <int COUNT>
__host__ __device__ __forceinline__ int64_t top_tiles(int64_t real) {
  return (real + kLanes * COUNT - 1) / (kLanes * COUNT);
}

// How many keys for_top_keys needs in shared memory: the largest left of each tile, and each warp's candidate.
template <int COUNT>
int64_t top_keys(int64_t real) {
  return kVocabWarps + top_tiles<COUNT>(real);
}

// One thread gets found(place, key) for the `count` largest of key_of(logit, column), largest first; 0 is no key.
// All threads of the block must call it.
template <class T, int COUNT, class KeyOf, class Found>
__device__ __forceinline__ void for_top_keys(const T* row, int64_t real, int64_t count, const KeyOf& key_of,
                                             RankKey* keys, const Found& found) {
  RankKey *winners = keys, *tiles = keys + kVocabWarps;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t tile_count = top_tiles<COUNT>(real);
  for (int64_t tile = warp; tile < tile_count; tile += kVocabWarps) {
    const RankKey key = largest_of_tile<T, COUNT>(row, real, tile, ~RankKey(0), key_of);
    if (lane == 0) tiles[tile] = key;
  }
  for (int64_t place = 0; place < count; ++place) {
    __syncthreads();
    RankKey winner = 0;
    for (int64_t tile = threadIdx.x; tile < tile_count; tile += kVocabThreads) {
      winner = tiles[tile] > winner ? tiles[tile] : winner;
    }
    winner = warp_largest(winner);
    if (lane == 0) winners[warp] = winner;
    __syncthreads();
    for (int i = 0; i < kVocabWarps; ++i) winner = winners[i] > winner ? winners[i] : winner;
    if (threadIdx.x == 0) found(place, winner);
    if (winner != 0 && warp == 0) {  // what is left of the winner's tile comes after it in the order
      const int64_t tile = column_of(winner) / (kLanes * COUNT);
      const RankKey next = largest_of_tile<T, COUNT>(row, real, tile, winner, key_of);
      if (lane == 0) tiles[tile] = next;
    }
  }
}

}  // namespace titan
