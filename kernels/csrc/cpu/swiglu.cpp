// SwiGLU on the CPU: one pass forward, one pass backward.
#include "binding/swiglu.h"

#include "cpu/vector.h"

namespace titan::cpu {
namespace {

template <class T>
TITAN_INLINE void forward_rows(const T* __restrict x, T* __restrict y, int64_t begin, int64_t end, int64_t width) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = x + row * 2 * width;
    const T* up = gate + width;
    T* out = y + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float g = load(gate[i]);
      store(&out[i], g / (1.0f + exp(-g)) * load(up[i]));
    }
  }
}

// d silu(g) / dg = s (1 + g (1 - s)) with s = sigmoid(g)
template <class T>
TITAN_INLINE void backward_rows(const T* __restrict grad, const T* __restrict x, T* __restrict grad_x, int64_t begin,
                                int64_t end, int64_t width) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = x + row * 2 * width;
    const T* up = gate + width;
    const T* dy = grad + row * width;
    T* grad_gate = grad_x + row * 2 * width;
    T* grad_up = grad_gate + width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float g = load(gate[i]), d = load(dy[i]), s = 1.0f / (1.0f + exp(-g));
      store(&grad_gate[i], d * load(up[i]) * s * (1.0f + g * (1.0f - s)));
      store(&grad_up[i], d * g * s);
    }
  }
}

#define TITAN_SWIGLU(T)                                                                                            \
  TITAN_CLONES void forward_range(const T* x, T* y, int64_t begin, int64_t end, int64_t width) {                   \
    forward_rows(x, y, begin, end, width);                                                                         \
  }                                                                                                                \
  TITAN_CLONES void backward_range(const T* grad, const T* x, T* grad_x, int64_t begin, int64_t end, int64_t width) { \
    backward_rows(grad, x, grad_x, begin, end, width);                                                             \
  }
TITAN_SWIGLU(float)
TITAN_SWIGLU(Bf16)
#undef TITAN_SWIGLU

struct Swiglu {
  using Bf16 = cpu::Bf16;
  using Launch = cpu::Launch;

  template <class T>
  static void forward(const Launch&, const T* x, T* y, int64_t rows, int64_t width) {
    torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      forward_range(x, y, begin, end, width);
    });
  }
  template <class T>
  static void backward(const Launch&, const T* grad, const T* x, T* grad_x, int64_t rows, int64_t width) {
    torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      backward_range(grad, x, grad_x, begin, end, width);
    });
  }
};

}  // namespace
}  // namespace titan::cpu

STABLE_TORCH_LIBRARY_IMPL(titan, CPU, m) { titan::implement_swiglu<titan::cpu::Swiglu>(m); }
