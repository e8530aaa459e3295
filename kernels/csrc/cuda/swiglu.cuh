// SwiGLU: y = silu(gate) * up. One thread handles one pack of elements at a time, striding over the tensor.
#pragma once

#include "cuda/pack.cuh"

namespace titan {

constexpr int kSwigluThreads = 256;
constexpr int64_t kSwigluBlocks = 4096;  // enough to fill any device; more work is strided over

// x: [rows, 2 * width] gate then up;  y: [rows, width]
template <class T, int COUNT>
__global__ void swiglu_forward(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int64_t width) {
  const int64_t packs_a_row = width / COUNT, total = rows * packs_a_row, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t row = i / packs_a_row, column = i % packs_a_row * COUNT;
    const auto gate = load_pack<COUNT>(x + row * 2 * width + column);
    const auto up = load_pack<COUNT>(x + row * 2 * width + width + column);
    Pack<T, COUNT> out;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const float g = to_float(gate.value[k]);
      out.value[k] = from_float<T>(g / (1.0f + expf(-g)) * to_float(up.value[k]));
    }
    store_pack<COUNT>(y + row * width + column, out);
  }
}

// d silu(g) / dg = s (1 + g (1 - s)) with s = sigmoid(g)
template <class T, int COUNT>
__global__ void swiglu_backward(const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ grad_x,
                                int64_t rows, int64_t width) {
  const int64_t packs_a_row = width / COUNT, total = rows * packs_a_row, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t row = i / packs_a_row, column = i % packs_a_row * COUNT, at = row * 2 * width + column;
    const auto dy = load_pack<COUNT>(grad + row * width + column);
    const auto gate = load_pack<COUNT>(x + at);
    const auto up = load_pack<COUNT>(x + at + width);
    Pack<T, COUNT> grad_gate, grad_up;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const float g = to_float(gate.value[k]), d = to_float(dy.value[k]), s = 1.0f / (1.0f + expf(-g));
      grad_gate.value[k] = from_float<T>(d * to_float(up.value[k]) * s * (1.0f + g * (1.0f - s)));
      grad_up.value[k] = from_float<T>(d * g * s);
    }
    store_pack<COUNT>(grad_x + at, grad_gate);
    store_pack<COUNT>(grad_x + at + width, grad_up);
  }
}

inline dim3 swiglu_grid(int64_t packs) {
  const int64_t blocks = (packs + kSwigluThreads - 1) / kSwigluThreads;
  return dim3(unsigned(blocks < kSwigluBlocks ? blocks : kSwigluBlocks));
}

template <class T>
void launch_swiglu_forward(const T* x, T* y, int64_t rows, int64_t width, cudaStream_t stream) {
  if (packs<T>(width, x, y)) {
    TITAN_LAUNCH((swiglu_forward<T, kPack<T>>), swiglu_grid(rows * width / kPack<T>), dim3(kSwigluThreads), 0, stream,
                 x, y, rows, width);
  } else {
    TITAN_LAUNCH((swiglu_forward<T, 1>), swiglu_grid(rows * width), dim3(kSwigluThreads), 0, stream, x, y, rows, width);
  }
}

template <class T>
void launch_swiglu_backward(const T* grad, const T* x, T* grad_x, int64_t rows, int64_t width, cudaStream_t stream) {
  if (packs<T>(width, grad, x, grad_x)) {
    TITAN_LAUNCH((swiglu_backward<T, kPack<T>>), swiglu_grid(rows * width / kPack<T>), dim3(kSwigluThreads), 0, stream,
                 grad, x, grad_x, rows, width);
  } else {
    TITAN_LAUNCH((swiglu_backward<T, 1>), swiglu_grid(rows * width), dim3(kSwigluThreads), 0, stream, grad, x, grad_x,
                 rows, width);
  }
}

}  // namespace titan
