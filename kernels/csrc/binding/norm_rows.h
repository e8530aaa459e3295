// What the kernels of RMSNorm and LayerNorm are handed, on every device.
#pragma once

#include <cstdint>

namespace titan {

// y = (hidden - mean) * rstd * weight + bias, hidden = x + residual. RMSNorm has neither mean nor bias.
template <class T>
struct NormForward {
  const T *x, *residual, *weight, *bias;  // residual may be null: then hidden is null too, and x takes its place
  T *y, *hidden;
  float *mean, *rstd;
  int64_t rows, width;
  float eps;
};

template <class T>
struct NormBackward {
  const T *grad, *grad_hidden, *hidden, *weight;  // grad_hidden may be null: zero
  const float *mean, *rstd;
  T* grad_x;
  float *grad_weight, *grad_bias;
  float* partial;  // [one or, with a bias, two][partial_rows][width]: sums over some of the rows
  int64_t partial_rows, rows, width;
};

}  // namespace titan
