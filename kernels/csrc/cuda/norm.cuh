// RMSNorm and LayerNorm. A warp (short rows) or a block has a row at a time and strides over the rows. Forward, a row
// is read from memory once and kept in shared memory, where each thread only meets what it wrote itself.
#pragma once

#include "binding/norm_rows.h"
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"

namespace titan {

constexpr int64_t kNormWarpWidth = 1024;  // longest row that one warp has alone
constexpr int kNormWarps = 8;             // of a block that shares a row
constexpr int kNormWarpTeams = 4;         // rows at a time in a block of single warps
constexpr int64_t kNormBlocks = 512;      // a few for each multiprocessor; each leaves one sum over its rows behind
constexpr int64_t kNormShared = 48 << 10;
constexpr int kNormScratch = 2 * kNormWarps;  // floats that sums need

// per_width: 1 / width (a division in a kernel is a call, and costs registers). Without the 3, at least three blocks a
// multiprocessor, ptxas saves registers below what the body needs and spills.
// hidden = x + residual;  y = (hidden - mean) * rstd * weight + bias
template <class T, int COUNT, bool WARP, bool LAYER>
__global__ void __launch_bounds__(kNormWarps* kLanes, 3) norm_forward(const NormForward<T> a, bool keep,
                                                                     float per_width) {
  TITAN_SHARED(float, scratch);
  const Team<WARP> team;
  const T* __restrict__ weight = a.weight;
  const T* __restrict__ bias = a.bias;
  T* kept = reinterpret_cast<T*>(scratch + kNormScratch) + team.in_block * a.width;
  const int64_t first = int64_t(team.thread) * COUNT, step = int64_t(team.size) * COUNT;
  for (int64_t row = team.index; row < a.rows; row += team.count) {
    const int64_t at = row * a.width;
    float sum[1] = {0.0f};  // of the elements for LayerNorm, of their squares for RMSNorm
    for (int64_t column = first; column < a.width; column += step) {
      auto pack = load_pack<COUNT>(a.x + at + column);
      if (a.residual) {
        const auto residual = load_pack<COUNT>(a.residual + at + column);
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
          pack.value[k] = from_float<T>(to_float(pack.value[k]) + to_float(residual.value[k]));
        }
        store_pack<COUNT>(a.hidden + at + column, pack);
      }
      if (keep) store_pack<COUNT>(kept + column, pack);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        const float h = to_float(pack.value[k]);
        sum[0] += LAYER ? h : h * h;
      }
    }
    team.sum(sum, scratch);
    const T* hidden = keep ? kept : (a.residual ? a.hidden : a.x) + at;
    float mean = 0.0f, square = sum[0] * per_width;
    if constexpr (LAYER) {
      // Around a first mean, since sum(h^2) - mean^2 would cancel when the mean is large; what is left over of the sum
      // then corrects that mean's own rounding.
      mean = sum[0] * per_width;
      float sums[2] = {};  // of h - mean, and of its square
      for (int64_t column = first; column < a.width; column += step) {
        const auto pack = load_pack<COUNT>(hidden + column);
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
          const float centred = to_float(pack.value[k]) - mean;
          sums[0] += centred;
          sums[1] += centred * centred;
        }
      }
      team.sum(sums, scratch);
      const float left = sums[0] * per_width, variance = sums[1] * per_width - left * left;
      mean += left;
      square = variance < 0.0f ? 0.0f : variance;
    }
    const float rstd = rsqrtf(square + a.eps);
    if (team.thread == 0) {
      if (LAYER) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    for (int64_t column = first; column < a.width; column += step) {
      auto pack = load_pack<COUNT>(hidden + column);
      const auto scale = load_pack<COUNT>(weight + column);
      Pack<T, COUNT> shift{};
      if constexpr (LAYER) shift = load_pack<COUNT>(bias + column);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        const float normed = (to_float(pack.value[k]) - mean) * rstd * to_float(scale.value[k]);
        pack.value[k] = from_float<T>(LAYER ? normed + to_float(shift.value[k]) : normed);
      }
      store_pack<COUNT>(a.y + at + column, pack);
    }
  }
}

// With n = (hidden - mean) * rstd and g = grad * weight:
//   grad_x = rstd (g - mean(g) - n mean(g n)) + grad_hidden,  grad_weight = sum over rows of grad n,  grad_bias of grad
// A team adds its own rows, a thread its own columns, in shared memory where there is room; norm_add_partial adds up
// the teams. No order is left to chance.
template <class T, int COUNT, bool WARP, bool LAYER>
__global__ void __launch_bounds__(kNormWarps* kLanes, 3) norm_backward(const NormBackward<T> a, bool keep,
                                                                      float per_width) {
  TITAN_SHARED(float, scratch);
  constexpr int SUMS = LAYER ? 2 : 1;
  const Team<WARP> team;
  const T* __restrict__ weight = a.weight;
  const T* __restrict__ all_grad = a.grad;
  const T* __restrict__ all_hidden = a.hidden;
  float* total_weight = a.partial + team.index * a.width;
  float* total_bias = total_weight + a.partial_rows * a.width;
  float* sum_weight = keep ? scratch + kNormScratch + team.in_block * SUMS * a.width : total_weight;
  float* sum_bias = keep ? sum_weight + a.width : total_bias;
  const int64_t first = int64_t(team.thread) * COUNT, step = int64_t(team.size) * COUNT;
  for (int64_t column = first; column < a.width; column += step) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      sum_weight[column + k] = 0.0f;
      if (LAYER) sum_bias[column + k] = 0.0f;
    }
  }
  for (int64_t row = team.index; row < a.rows; row += team.count) {
    const int64_t at = row * a.width;
    const float mean = LAYER ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float sums[SUMS] = {};  // of g n, and of g
    for (int64_t column = first; column < a.width; column += step) {
      const auto grad = load_pack<COUNT>(all_grad + at + column);
      const auto hidden = load_pack<COUNT>(all_hidden + at + column);
      const auto scale = load_pack<COUNT>(weight + column);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        const float d = to_float(grad.value[k]), n = (to_float(hidden.value[k]) - mean) * rstd;
        const float g = d * to_float(scale.value[k]);
        sum_weight[column + k] += d * n;
        if (LAYER) sum_bias[column + k] += d;
        sums[0] += g * n;
        if (LAYER) sums[SUMS - 1] += g;
      }
    }
    team.sum(sums, scratch);
    const float mean_gn = sums[0] * per_width, mean_g = LAYER ? sums[SUMS - 1] * per_width : 0.0f;
    for (int64_t column = first; column < a.width; column += step) {  // the row is in the cache now
      const auto grad = load_pack<COUNT>(all_grad + at + column);
      const auto hidden = load_pack<COUNT>(all_hidden + at + column);
      const auto scale = load_pack<COUNT>(weight + column);
      Pack<T, COUNT> beside{}, out;
      if (a.grad_hidden) beside = load_pack<COUNT>(a.grad_hidden + at + column);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        const float n = (to_float(hidden.value[k]) - mean) * rstd;
        const float g = to_float(grad.value[k]) * to_float(scale.value[k]);
        const float through = rstd * (g - mean_g - n * mean_gn);
        out.value[k] = from_float<T>(a.grad_hidden ? through + to_float(beside.value[k]) : through);
      }
      store_pack<COUNT>(a.grad_x + at + column, out);
    }
  }
  if (!keep) return;
  for (int64_t column = first; column < a.width; column += step) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      total_weight[column + k] = sum_weight[column + k];
      if (LAYER) total_bias[column + k] = sum_bias[column + k];
    }
  }
}

// Adds the partial sums of 32 columns with 8 warps, each striding over the rows. y: the weight's sums, or the bias's.
template <class T>
__global__ void __launch_bounds__(kNormWarps* kLanes) norm_add_partial(const NormBackward<T> a) {
  TITAN_SHARED(float, sums);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t column = int64_t(blockIdx.x) * kLanes + lane;
  const float* from = a.partial + blockIdx.y * a.partial_rows * a.width + column;
  float sum = 0.0f;
  if (column < a.width) {
    for (int64_t row = warp; row < a.partial_rows; row += kNormWarps) sum += from[row * a.width];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= a.width) return;
  for (int other = 1; other < kNormWarps; ++other) sum += sums[other * kLanes + lane];
  (blockIdx.y == 0 ? a.grad_weight : a.grad_bias)[column] = sum;
}

inline int norm_teams(int64_t width) { return width <= kNormWarpWidth ? kNormWarpTeams : 1; }
inline dim3 norm_threads(int64_t width) {
  return dim3(width <= kNormWarpWidth ? kNormWarpTeams * kLanes : kNormWarps * kLanes);
}
inline int64_t norm_blocks(int64_t rows, int64_t width) {
  const int64_t blocks = (rows + norm_teams(width) - 1) / norm_teams(width);
  return blocks < kNormBlocks ? blocks : kNormBlocks;
}
inline int64_t norm_partial_rows(int64_t rows, int64_t width) { return norm_blocks(rows, width) * norm_teams(width); }

template <class T, int COUNT, bool WARP, bool LAYER>
void launch_norm_forward_as(const NormForward<T>& a, cudaStream_t stream) {
  const int64_t scratch = kNormScratch * sizeof(float), row = norm_teams(a.width) * a.width * int64_t(sizeof(T));
  const bool keep = scratch + row <= kNormShared;
  TITAN_LAUNCH((norm_forward<T, COUNT, WARP, LAYER>), dim3(unsigned(norm_blocks(a.rows, a.width))),
               norm_threads(a.width), size_t(keep ? scratch + row : scratch), stream, a, keep,
               1.0f / float(a.width));
}

template <class T, int COUNT, bool WARP, bool LAYER>
void launch_norm_backward_as(const NormBackward<T>& a, cudaStream_t stream) {
  const int64_t scratch = kNormScratch * sizeof(float);
  const int64_t sums = norm_teams(a.width) * a.width * (LAYER ? 2 : 1) * int64_t(sizeof(float));
  const bool keep = scratch + sums <= kNormShared;
  TITAN_LAUNCH((norm_backward<T, COUNT, WARP, LAYER>), dim3(unsigned(norm_blocks(a.rows, a.width))),
               norm_threads(a.width), size_t(keep ? scratch + sums : scratch), stream, a, keep,
               1.0f / float(a.width));
  TITAN_LAUNCH((norm_add_partial<T>), dim3(unsigned((a.width + kLanes - 1) / kLanes), LAYER ? 2 : 1),
               dim3(kNormWarps * kLanes), kNormWarps * kLanes * sizeof(float), stream, a);
}

template <class T, bool LAYER>
void launch_norm_forward(const NormForward<T>& a, cudaStream_t stream) {
  const bool wide = packs<T>(a.width, a.x, a.residual, a.weight, a.bias, a.y, a.hidden);
  if (a.width <= kNormWarpWidth) {
    wide ? launch_norm_forward_as<T, kPack<T>, true, LAYER>(a, stream)
         : launch_norm_forward_as<T, 1, true, LAYER>(a, stream);
  } else {
    wide ? launch_norm_forward_as<T, kPack<T>, false, LAYER>(a, stream)
         : launch_norm_forward_as<T, 1, false, LAYER>(a, stream);
  }
}

template <class T, bool LAYER>
void launch_norm_backward(const NormBackward<T>& a, cudaStream_t stream) {
  const bool wide = packs<T>(a.width, a.grad, a.grad_hidden, a.hidden, a.weight, a.grad_x);
  if (a.width <= kNormWarpWidth) {
    wide ? launch_norm_backward_as<T, kPack<T>, true, LAYER>(a, stream)
         : launch_norm_backward_as<T, 1, true, LAYER>(a, stream);
  } else {
    wide ? launch_norm_backward_as<T, kPack<T>, false, LAYER>(a, stream)
         : launch_norm_backward_as<T, 1, false, LAYER>(a, stream);
  }
}

}  // namespace titan
