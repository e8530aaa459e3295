// What every tensor-facing function needs: checks that name the argument, and one switch over element types.
//
// A file of this folder turns tensors into raw pointers for one family of operations. It is a template over the kernels
// it calls, so that CPU, CUDA and the host shim share every check and every allocation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#ifndef TITAN_LIBRARY
#define TITAN_LIBRARY titan  // the host shim registers the CUDA kernels as titan_shim, for CPU tensors
#endif

namespace titan {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

constexpr ScalarType kFloat = ScalarType::Float;
constexpr ScalarType kBf16 = ScalarType::BFloat16;
constexpr ScalarType kInt64 = ScalarType::Long;
constexpr ScalarType kInt32 = ScalarType::Int;

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

inline const char* type_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    default: return "another dtype";
  }
}

// Checks of one operation's arguments; every message begins "operation: argument ...".
struct Arguments {
  const char* operation;

  void require(bool ok, const char* argument, const std::string& problem) const {
    if (!ok) throw std::runtime_error(std::string(operation) + ": " + argument + " " + problem);
  }
  void shape(const Tensor& t, const char* argument, const std::vector<int64_t>& expected) const {
    require(sizes_of(t) == expected, argument,
            "must be " + shape_text(expected) + ", got " + shape_text(sizes_of(t)));
  }
  void type(const Tensor& t, const char* argument, ScalarType expected) const {
    require(t.scalar_type() == expected, argument,
            std::string("must be ") + type_text(expected) + ", got " + type_text(t.scalar_type()));
  }
  void floating(const Tensor& t, const char* argument) const {
    require(t.scalar_type() == kFloat || t.scalar_type() == kBf16, argument,
            std::string("must be float32 or bfloat16, got ") + type_text(t.scalar_type()));
  }
  void same_device(const Tensor& t, const char* argument, const Tensor& first) const {
    require(t.is_cpu() == first.is_cpu() && (t.is_cpu() || t.get_device_index() == first.get_device_index()), argument,
            "must be on the device of the first argument");
  }
  // Shape, dtype and device of an argument at once.
  void like(const Tensor& t, const char* argument, const std::vector<int64_t>& expected, ScalarType expected_type,
            const Tensor& first) const {
    same_device(t, argument, first);
    type(t, argument, expected_type);
    shape(t, argument, expected);
  }
};

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Length of the last dimension, and how many rows of it there are.
inline int64_t last_size(const Tensor& t) { return t.size(t.dim() - 1); }
inline int64_t row_count(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* read(const std::optional<Tensor>& t) {
  return t ? read<T>(*t) : nullptr;
}
template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f with a value of the element type of t, as the kernels know it. Checked to be float32 or bfloat16 before.
template <class Kernels, class F>
void with_type(const Tensor& t, const F& f) {
  if (t.scalar_type() == kFloat) {
    f(float{});
  } else {
    f(typename Kernels::Bf16{});
  }
}

}  // namespace titan
