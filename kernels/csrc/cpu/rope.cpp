// Rotary position embedding on the CPU: one pass, one row of the table for all heads of a position.
#include "binding/rope.h"

#include "cpu/vector.h"

namespace titan::cpu {
namespace {

// Positions begin..end are those of (sequence, batch), the batch running fastest.
template <class T>
TITAN_INLINE void turn_positions(const RopeHeads<T>& a, int64_t begin, int64_t end) {
  const int64_t half = a.half;
  const float sign = a.sign;
  for (int64_t position = begin; position < end; ++position) {
    const int64_t s = position / a.batch, b = position % a.batch;
    const float* __restrict cos = a.cos + s * half;
    const float* __restrict sin = a.sin + s * half;
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* __restrict x = a.x + s * a.sequence_stride + b * a.batch_stride + h * a.head_stride;
      T* __restrict y = a.y + (position * a.heads + h) * 2 * half;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float x1 = load(x[i]), x2 = load(x[half + i]), turn = sign * sin[i];
        store(&y[i], x1 * cos[i] - x2 * turn);
        store(&y[half + i], x2 * cos[i] + x1 * turn);
      }
    }
  }
}

TITAN_CLONES void turn_range(const RopeHeads<float>& a, int64_t begin, int64_t end) { turn_positions(a, begin, end); }
TITAN_CLONES void turn_range(const RopeHeads<Bf16>& a, int64_t begin, int64_t end) { turn_positions(a, begin, end); }

struct Rope {
  using Bf16 = cpu::Bf16;
  using Launch = cpu::Launch;

  template <class T>
  static void turn(const Launch&, const RopeHeads<T>& a) {
    torch::stable::parallel_for(0, a.sequence * a.batch, grain(a.heads * a.half * 2), [&](int64_t begin, int64_t end) {
      turn_range(a, begin, end);
    });
  }
};

}  // namespace
}  // namespace titan::cpu

STABLE_TORCH_LIBRARY_IMPL(titan, CPU, m) { titan::implement_rope<titan::cpu::Rope>(m); }
