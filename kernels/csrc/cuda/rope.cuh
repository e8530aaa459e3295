// Rotary position embedding. One thread turns one pack of pairs at a time, striding over the tensor.
#pragma once

#include "binding/rope_heads.h"
#include "cuda/pack.cuh"

namespace titan {

constexpr int kRopeThreads = 256;
constexpr int64_t kRopeBlocks = 4096;  // enough to fill any device; more work is strided over

template <class T, int COUNT>
__global__ void rope_turn(const RopeHeads<T> a) {
  constexpr int ANGLES = COUNT < kPack<float> ? COUNT : kPack<float>;
  const T* __restrict__ all_x = a.x;
  const float* __restrict__ all_cos = a.cos;
  const float* __restrict__ all_sin = a.sin;
  const int64_t packs_a_head = a.half / COUNT, total = a.sequence * a.batch * a.heads * packs_a_head;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t head = i / packs_a_head, column = i % packs_a_head * COUNT;
    const int64_t h = head % a.heads, position = head / a.heads, b = position % a.batch, s = position / a.batch;
    const T* x = all_x + s * a.sequence_stride + b * a.batch_stride + h * a.head_stride + column;
    const auto x1 = load_pack<COUNT>(x), x2 = load_pack<COUNT>(x + a.half);
    Pack<T, COUNT> y1, y2;
#pragma unroll
    for (int group = 0; group < COUNT; group += ANGLES) {
      const auto cos = load_pack<ANGLES>(all_cos + s * a.half + column + group);
      const auto sin = load_pack<ANGLES>(all_sin + s * a.half + column + group);
#pragma unroll
      for (int k = 0; k < ANGLES; ++k) {
        const float first = to_float(x1.value[group + k]), second = to_float(x2.value[group + k]);
        const float turn = a.sign * sin.value[k];
        y1.value[group + k] = from_float<T>(first * cos.value[k] - second * turn);
        y2.value[group + k] = from_float<T>(second * cos.value[k] + first * turn);
      }
    }
    T* y = a.y + head * 2 * a.half + column;
    store_pack<COUNT>(y, y1);
    store_pack<COUNT>(y + a.half, y2);
  }
}

template <class T, int COUNT>
void launch_rope_as(const RopeHeads<T>& a, cudaStream_t stream) {
  const int64_t threads = a.sequence * a.batch * a.heads * (a.half / COUNT);
  const int64_t blocks = (threads + kRopeThreads - 1) / kRopeThreads;
  const dim3 grid(unsigned(blocks < kRopeBlocks ? blocks : kRopeBlocks));
  TITAN_LAUNCH((rope_turn<T, COUNT>), grid, dim3(kRopeThreads), 0, stream, a);
}

template <class T>
void launch_rope(const RopeHeads<T>& a, cudaStream_t stream) {
  const bool strides_pack = (a.sequence_stride | a.batch_stride | a.head_stride) % kPack<T> == 0;
  if (strides_pack && packs<T>(a.half, a.x, a.y, a.cos, a.sin)) {
    launch_rope_as<T, kPack<T>>(a, stream);
  } else {
    launch_rope_as<T, 1>(a, stream);
  }
}

}  // namespace titan
