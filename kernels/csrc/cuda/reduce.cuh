// Sums and maxima over threads that share a row. Every thread gets the result, and the same bits of it on every run.
#pragma once

#include "cuda/portable.cuh"

namespace titan {

constexpr int kLanes = 32;

// All 32 lanes of a warp must call it.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// COUNT sums over the block, whose threads must be a multiple of 32 and all call it.
// scratch: COUNT floats of shared memory for each warp, free for the next call when this one returns
template <int COUNT>
__device__ __forceinline__ void block_sum(float (&value)[COUNT], float* scratch) {
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    value[k] = warp_sum(value[k]);
    if (threadIdx.x % kLanes == 0) scratch[warp * COUNT + k] = value[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    value[k] = 0.0f;
    for (int i = 0; i < warps; ++i) value[k] += scratch[i * COUNT + k];
  }
  __syncthreads();
}

// Who works on a row together: one warp where rows are short, else the whole block.
template <bool WARP>
struct Team {
  int thread, size;      // of the threads in a team
  int64_t index, count;  // of the teams in the grid
  int in_block;          // index among the teams of the block

  __device__ __forceinline__ Team()
      : thread(WARP ? threadIdx.x % kLanes : threadIdx.x),
        size(WARP ? kLanes : blockDim.x),
        index(WARP ? int64_t(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes : blockIdx.x),
        count(WARP ? int64_t(gridDim.x) * (blockDim.x / kLanes) : gridDim.x),
        in_block(WARP ? threadIdx.x / kLanes : 0) {}

  template <int COUNT>
  __device__ __forceinline__ void sum(float (&value)[COUNT], float* scratch) const {
    if constexpr (WARP) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) value[k] = warp_sum(value[k]);
    } else {
      block_sum(value, scratch);
    }
  }
};

}  // namespace titan
