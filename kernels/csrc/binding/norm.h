// RMSNorm (arXiv 1910.07467, eq. 4) and LayerNorm (arXiv 1607.06450, eq. 4) on tensors, with the residual added first.
#pragma once

#include "binding/binding.h"
#include "binding/norm_rows.h"

namespace titan {

// What both norms return; RMSNorm leaves out the mean.
struct Normed {
  Tensor y, hidden, mean, rstd;
};
struct NormGradient {
  Tensor x, weight, bias;
};

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

inline std::vector<int64_t> without_last(std::vector<int64_t> sizes) {
  sizes.pop_back();
  return sizes;
}

inline void check_norm_rows(const Arguments& arguments, const Tensor& t, const char* argument) {
  arguments.floating(t, argument);
  arguments.require(t.dim() >= 1 && last_size(t) >= 1, argument,
                    "must be [..., width] with a width of at least 1, got " + shape_text(sizes_of(t)));
}

// Without a bias RMSNorm, with one LayerNorm.
template <class Kernels>
Normed norm(const Arguments& arguments, const Tensor& x_any, const std::optional<Tensor>& residual_any,
            const Tensor& weight_any, const std::optional<Tensor>& bias_any, double eps) {
  check_norm_rows(arguments, x_any, "x");
  const auto sizes = sizes_of(x_any);
  if (residual_any) arguments.like(*residual_any, "residual", sizes, x_any.scalar_type(), x_any);
  arguments.like(weight_any, "weight", {sizes.back()}, x_any.scalar_type(), x_any);
  if (bias_any) arguments.like(*bias_any, "bias", {sizes.back()}, x_any.scalar_type(), x_any);
  arguments.require(eps >= 0.0, "eps", "must be at least 0, got " + std::to_string(eps));

  const Tensor x = dense(x_any), weight = dense(weight_any);
  const auto residual = dense(residual_any), bias = dense(bias_any);
  const auto row_sizes = without_last(sizes);
  const Normed out{torch::stable::new_empty(x, sizes),
                   torch::stable::new_empty(x, residual ? sizes : std::vector<int64_t>{0}),
                   torch::stable::new_empty(x, bias ? row_sizes : std::vector<int64_t>{0}, kFloat),
                   torch::stable::new_empty(x, row_sizes, kFloat)};
  if (x.numel() == 0) return out;
  const typename Kernels::Launch launch(x);
  with_type<Kernels>(x, [&](auto element) {
    using T = decltype(element);
    Kernels::forward(launch, NormForward<T>{read<T>(x), read<T>(residual), read<T>(weight), read<T>(bias),
                                            write<T>(out.y), residual ? write<T>(out.hidden) : nullptr,
                                            bias ? write<float>(out.mean) : nullptr, write<float>(out.rstd),
                                            row_count(x), sizes.back(), float(eps)});
  });
  return out;
}

template <class Kernels>
NormGradient norm_backward(const Arguments& arguments, const Tensor& grad_any,
                           const std::optional<Tensor>& grad_hidden_any, const Tensor& hidden_any,
                           const Tensor& weight_any, const std::optional<Tensor>& mean_any, const Tensor& rstd_any) {
  check_norm_rows(arguments, hidden_any, "hidden");
  const auto sizes = sizes_of(hidden_any);
  const int64_t rows = row_count(hidden_any), width = sizes.back();
  const ScalarType type = hidden_any.scalar_type();
  arguments.like(grad_any, "grad", sizes, type, hidden_any);
  if (grad_hidden_any) arguments.like(*grad_hidden_any, "grad_hidden", sizes, type, hidden_any);
  arguments.like(weight_any, "weight", {width}, type, hidden_any);
  if (mean_any) arguments.like(*mean_any, "mean", without_last(sizes), kFloat, hidden_any);
  arguments.like(rstd_any, "rstd", without_last(sizes), kFloat, hidden_any);

  const Tensor grad = dense(grad_any), hidden = dense(hidden_any), weight = dense(weight_any), rstd = dense(rstd_any);
  const auto grad_hidden = dense(grad_hidden_any), mean = dense(mean_any);
  const std::vector<int64_t> bias_sizes{mean ? width : 0};
  if (rows == 0) {
    return {torch::stable::new_empty(hidden, sizes), torch::stable::new_zeros(hidden, {width}, kFloat),
            torch::stable::new_zeros(hidden, bias_sizes, kFloat)};
  }
  const NormGradient out{torch::stable::new_empty(hidden, sizes), torch::stable::new_empty(hidden, {width}, kFloat),
                         torch::stable::new_empty(hidden, bias_sizes, kFloat)};
  const typename Kernels::Launch launch(hidden);
  with_type<Kernels>(hidden, [&](auto element) {
    using T = decltype(element);
    const int64_t partial_rows = Kernels::template partial_rows<T>(rows, width);
    const Tensor partial = torch::stable::new_empty(hidden, {mean ? 2 : 1, partial_rows, width}, kFloat);
    Kernels::backward(launch, NormBackward<T>{read<T>(grad), read<T>(grad_hidden), read<T>(hidden), read<T>(weight),
                                              read<float>(mean), read<float>(rstd), write<T>(out.x),
                                              write<float>(out.weight), mean ? write<float>(out.bias) : nullptr,
                                              write<float>(partial), partial_rows, rows, width});
  });
  return out;
}

// x, residual: [..., width], weight: [width]  ->  y, hidden: [..., width] (hidden [0] without residual), rstd: [...]
template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                            const Tensor& weight, double eps) {
  const Normed out = norm<Kernels>({"rms_norm"}, x, residual, weight, std::nullopt, eps);
  return {out.y, out.hidden, out.rstd};
}

// grad of y and of hidden: [..., width]  ->  gradient of x (and of residual): [..., width], of weight: [width] float32
template <class Kernels>
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const std::optional<Tensor>& grad_hidden,
                                             const Tensor& hidden, const Tensor& weight, const Tensor& rstd) {
  const NormGradient out =
      norm_backward<Kernels>({"rms_norm_backward"}, grad, grad_hidden, hidden, weight, std::nullopt, rstd);
  return {out.x, out.weight};
}

// As rms_norm, with bias: [width] and mean: [...]
template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                                      const Tensor& weight, const Tensor& bias, double eps) {
  const Normed out = norm<Kernels>({"layer_norm"}, x, residual, weight, bias, eps);
  return {out.y, out.hidden, out.mean, out.rstd};
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const std::optional<Tensor>& grad_hidden,
                                                       const Tensor& hidden, const Tensor& weight, const Tensor& mean,
                                                       const Tensor& rstd) {
  const NormGradient out =
      norm_backward<Kernels>({"layer_norm_backward"}, grad, grad_hidden, hidden, weight, mean, rstd);
  return {out.x, out.weight, out.bias};
}

template <class Kernels>
void implement_norm(torch::stable::detail::StableLibrary& library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm<Kernels>));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward<Kernels>));
  library.impl("layer_norm", TORCH_BOX(&layer_norm<Kernels>));
  library.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward<Kernels>));
}

}  // namespace titan
