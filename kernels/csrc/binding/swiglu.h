// SwiGLU on tensors (arXiv 2002.05202): y = silu(gate) * up, with gate and up side by side in the last dimension.
#pragma once

#include "binding/binding.h"

namespace titan {

// x: [..., 2F]  ->  [..., F]
template <class Kernels>
Tensor swiglu(const Tensor& x_any) {
  const Arguments arguments{"swiglu"};
  arguments.floating(x_any, "x");
  arguments.require(x_any.dim() >= 1 && last_size(x_any) % 2 == 0, "x",
                    "must be [..., gate and up], an even number, got " + shape_text(sizes_of(x_any)));
  const Tensor x = dense(x_any);
  auto sizes = sizes_of(x);
  sizes.back() /= 2;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  const typename Kernels::Launch launch(x);
  with_type<Kernels>(x, [&](auto element) {
    using T = decltype(element);
    Kernels::forward(launch, read<T>(x), write<T>(y), row_count(y), last_size(y));
  });
  return y;
}

// grad: [..., F], x: [..., 2F]  ->  gradient of x
template <class Kernels>
Tensor swiglu_backward(const Tensor& grad_any, const Tensor& x_any) {
  const Arguments arguments{"swiglu_backward"};
  arguments.floating(x_any, "x");
  auto sizes = sizes_of(x_any);
  sizes.back() /= 2;
  arguments.like(grad_any, "grad", sizes, x_any.scalar_type(), x_any);
  const Tensor grad = dense(grad_any), x = dense(x_any);
  Tensor grad_x = torch::stable::empty_like(x);
  if (x.numel() == 0) return grad_x;
  const typename Kernels::Launch launch(x);
  with_type<Kernels>(x, [&](auto element) {
    using T = decltype(element);
    Kernels::backward(launch, read<T>(grad), read<T>(x), write<T>(grad_x), row_count(x), last_size(x) / 2);
  });
  return grad_x;
}

template <class Kernels>
void implement_swiglu(torch::stable::detail::StableLibrary& library) {
  library.impl("swiglu", TORCH_BOX(&swiglu<Kernels>));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward<Kernels>));
}

}  // namespace titan
