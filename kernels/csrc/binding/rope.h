// Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34) on tensors, in Llama's order: feature i turns with
// feature i + D/2.
#pragma once

#include "binding/binding.h"
#include "binding/rope_heads.h"

namespace titan {

// x: [S, B, H, D], cos, sin: [S, D/2] float32  ->  [S, B, H, D]. inverse turns back, which is also the gradient.
template <class Kernels>
Tensor rope(const Tensor& x_any, const Tensor& cos_any, const Tensor& sin_any, bool inverse) {
  const Arguments arguments{"rope"};
  arguments.floating(x_any, "x");
  const auto sizes = sizes_of(x_any);
  arguments.require(sizes.size() == 4 && sizes[3] % 2 == 0, "x",
                    "must be [sequence, batch, heads, an even number], got " + shape_text(sizes));
  arguments.like(cos_any, "cos", {sizes[0], sizes[3] / 2}, kFloat, x_any);
  arguments.like(sin_any, "sin", {sizes[0], sizes[3] / 2}, kFloat, x_any);
  // Queries and keys are cut from one projection: only their features need to be side by side.
  const Tensor x = x_any.stride(3) == 1 ? x_any : dense(x_any);
  const Tensor cos = dense(cos_any), sin = dense(sin_any);
  const Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  const typename Kernels::Launch launch(x);
  with_type<Kernels>(x, [&](auto element) {
    using T = decltype(element);
    Kernels::turn(launch, RopeHeads<T>{read<T>(x), x.stride(0), x.stride(1), x.stride(2), read<float>(cos),
                                       read<float>(sin), write<T>(y), sizes[0], sizes[1], sizes[2], sizes[3] / 2,
                                       inverse ? -1.0f : 1.0f});
  });
  return y;
}

template <class Kernels>
void implement_rope(torch::stable::detail::StableLibrary& library) {
  library.impl("rope", TORCH_BOX(&rope<Kernels>));
}

}  // namespace titan
