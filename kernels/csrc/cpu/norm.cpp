// RMSNorm and LayerNorm on the CPU. Each row is read from memory once: later passes over it find it in the L1 cache.
//
// What costs time at 4096 x 1024 is memory, and then the page faults of new outputs: bfloat16 forward and backward take
// 2.3 ms without faults and 10 ms with the 6100 of fresh memory. Whether there are any is up to the C library, which
// keeps or returns freed memory by a threshold that moves; MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_, set high
// and together, make it keep all. So only compare times of calls with as many faults.
#include "binding/norm.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/vector.h"

namespace titan::cpu {
namespace {

// Rows that one thread takes at a time, and whose weight gradients are summed in float32 before the sums are added up
// in float64: at most 64, fewer where that would leave threads without work. It follows from the tensor alone, so the
// result does not depend on the number of threads.
int64_t block_rows(int64_t rows) { return std::clamp<int64_t>(rows / 32, 1, 64); }

template <class T, bool RESIDUAL, bool LAYER>
TITAN_INLINE void forward_rows(const NormForward<T>& a, int64_t begin, int64_t end) {
  const int64_t width = a.width;
  const T* __restrict weight = a.weight;
  const T* __restrict bias = a.bias;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict x = a.x + row * width;
    if (RESIDUAL) {
      const T* __restrict residual = a.residual + row * width;
      T* __restrict sum = a.hidden + row * width;
      // Apart from the reductions: 16-bit stores and a reduction in one loop take 1.25 times as long, and with the
      // stored value in a local variable g++ does not vectorise the loop at all (4 times).
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) store(&sum[i], load(x[i]) + load(residual[i]));
    }
    const T* hidden = RESIDUAL ? a.hidden + row * width : x;
    T* __restrict y = a.y + row * width;
    if (LAYER) {
      // Moments around the mean of the first eighth: sum(h^2) - mean^2 would cancel when the mean is large, while such
      // a sample is at most sqrt(7) standard deviations away, whatever the row, and costs an eighth of a pass.
      const int64_t sampled = 1 + (width - 1) / 8;
      float sample = 0.0f;
#pragma omp simd reduction(+ : sample)
      for (int64_t i = 0; i < sampled; ++i) sample += load(hidden[i]);
      sample /= float(sampled);
      float first = 0.0f, second = 0.0f;
#pragma omp simd reduction(+ : first, second)
      for (int64_t i = 0; i < width; ++i) {
        const float away = load(hidden[i]) - sample;
        first += away;
        second += away * away;
      }
      first /= float(width);
      const float mean = sample + first, variance = std::max(second / float(width) - first * first, 0.0f);
      const float rstd = 1.0f / std::sqrt(variance + a.eps);
      a.mean[row] = mean;
      a.rstd[row] = rstd;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        store(&y[i], (load(hidden[i]) - mean) * rstd * load(weight[i]) + load(bias[i]));
      }
    } else {
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) squares += load(hidden[i]) * load(hidden[i]);
      const float rstd = 1.0f / std::sqrt(squares / float(width) + a.eps);
      a.rstd[row] = rstd;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) store(&y[i], load(hidden[i]) * rstd * load(weight[i]));
    }
  }
}

// With n = (hidden - mean) * rstd and g = grad * weight:
//   grad_x = rstd (g - mean(g) - n mean(g n)) + grad_hidden,  grad_weight = sum over rows of grad n,  grad_bias of grad
template <class T, bool GRAD_HIDDEN, bool LAYER>
TITAN_INLINE void backward_rows(const NormBackward<T>& a, float* __restrict grad_weight, float* __restrict grad_bias,
                                int64_t begin, int64_t end) {
  const int64_t width = a.width;
  const T* __restrict weight = a.weight;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict grad = a.grad + row * width;
    const T* __restrict hidden = a.hidden + row * width;
    const T* __restrict grad_hidden = GRAD_HIDDEN ? a.grad_hidden + row * width : nullptr;
    T* __restrict grad_x = a.grad_x + row * width;
    const float mean = LAYER ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float sum_g = 0.0f, sum_gn = 0.0f;
#pragma omp simd reduction(+ : sum_g, sum_gn)
    for (int64_t i = 0; i < width; ++i) {
      const float d = load(grad[i]), n = (load(hidden[i]) - mean) * rstd, g = d * load(weight[i]);
      grad_weight[i] += d * n;
      if (LAYER) grad_bias[i] += d;
      if (LAYER) sum_g += g;
      sum_gn += g * n;
    }
    const float mean_g = sum_g / float(width), mean_gn = sum_gn / float(width);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float n = (load(hidden[i]) - mean) * rstd, g = load(grad[i]) * load(weight[i]);
      const float through = rstd * (g - mean_g - n * mean_gn);
      store(&grad_x[i], GRAD_HIDDEN ? through + load(grad_hidden[i]) : through);
    }
  }
}

// Adds up one column range of the partial sums.
TITAN_CLONES void add_partial_range(const float* partial, float* total, int64_t rows, int64_t width, int64_t begin,
                                    int64_t end) {
  constexpr int64_t kColumns = 64;
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t columns = std::min(kColumns, end - first);
    double sums[kColumns] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = partial + row * width + first;
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) sums[i] += double(from[i]);
    }
    for (int64_t i = 0; i < columns; ++i) total[first + i] = float(sums[i]);
  }
}

#define TITAN_NORM(T, LAYER, name)                                                                                    \
  TITAN_CLONES void name##_range(const NormForward<T>& a, int64_t begin, int64_t end) {                               \
    a.residual ? forward_rows<T, true, LAYER>(a, begin, end) : forward_rows<T, false, LAYER>(a, begin, end);          \
  }                                                                                                                   \
  TITAN_CLONES void name##_backward_range(const NormBackward<T>& a, float* grad_weight, float* grad_bias,             \
                                          int64_t begin, int64_t end) {                                               \
    a.grad_hidden ? backward_rows<T, true, LAYER>(a, grad_weight, grad_bias, begin, end)                              \
                  : backward_rows<T, false, LAYER>(a, grad_weight, grad_bias, begin, end);                            \
  }
TITAN_NORM(float, false, rms)
TITAN_NORM(Bf16, false, rms)
TITAN_NORM(float, true, layer)
TITAN_NORM(Bf16, true, layer)
#undef TITAN_NORM

// Runs f(block, first row, end) for every block, each thread taking the next one when it is done.
template <class F>
void each_block(int64_t rows, int64_t width, const F& f) {
  const int64_t height = block_rows(rows), blocks = (rows + height - 1) / height;
  const int64_t threads = std::min<int64_t>({blocks, torch::stable::get_num_threads(), 1 + rows * width / 32768});
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t block = next++; block < blocks; block = next++) {
      f(block, block * height, std::min((block + 1) * height, rows));
    }
  });
}

struct Norm {
  using Bf16 = cpu::Bf16;
  using Launch = cpu::Launch;

  template <class T>
  static int64_t partial_rows(int64_t rows, int64_t) {
    return (rows + block_rows(rows) - 1) / block_rows(rows);
  }
  template <class T>
  static void forward(const Launch&, const NormForward<T>& a) {
    each_block(a.rows, a.width, [&](int64_t, int64_t begin, int64_t end) {
      a.bias ? layer_range(a, begin, end) : rms_range(a, begin, end);
    });
  }
  template <class T>
  static void backward(const Launch&, const NormBackward<T>& a) {
    float* partial_bias = a.partial + a.partial_rows * a.width;
    each_block(a.rows, a.width, [&](int64_t block, int64_t begin, int64_t end) {
      float *grad_weight = a.partial + block * a.width, *grad_bias = partial_bias + block * a.width;
      std::fill_n(grad_weight, a.width, 0.0f);
      if (a.mean) std::fill_n(grad_bias, a.width, 0.0f);
      a.mean ? layer_backward_range(a, grad_weight, grad_bias, begin, end)
             : rms_backward_range(a, grad_weight, nullptr, begin, end);
    });
    torch::stable::parallel_for(0, a.width, grain(a.partial_rows), [&](int64_t begin, int64_t end) {
      add_partial_range(a.partial, a.grad_weight, a.partial_rows, a.width, begin, end);
      if (a.mean) add_partial_range(partial_bias, a.grad_bias, a.partial_rows, a.width, begin, end);
    });
  }
};

}  // namespace
}  // namespace titan::cpu

STABLE_TORCH_LIBRARY_IMPL(titan, CPU, m) { titan::implement_norm<titan::cpu::Norm>(m); }
