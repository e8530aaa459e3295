// What the kernels of the rotary embedding are handed, on every device.
#pragma once

#include <cstdint>

namespace titan {

// y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, where x1 and x2 are the halves of a head's features.
template <class T>
struct RopeHeads {
  const T* x;
  int64_t sequence_stride, batch_stride, head_stride;  // of x, in elements; y is contiguous
  const float *cos, *sin;                              // [sequence, half]
  T* y;
  int64_t sequence, batch, heads, half;
  float sign;  // of sin: -1 turns back
};

}  // namespace titan
