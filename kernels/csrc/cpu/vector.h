// Loops that the compiler turns into vector instructions, and what they need: bfloat16 as float, and exp.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstring>

#include "binding/binding.h"

// One body, compiled for plain x86-64, AVX2 and AVX-512; the loader picks. Works on plain functions, not on templates,
// so kernels are inline templates called from small functions that carry the attribute.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TITAN_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TITAN_CLONES
#endif
#define TITAN_INLINE static inline __attribute__((always_inline))

namespace titan::cpu {

struct Bf16 {
  uint16_t bits;
};

TITAN_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
TITAN_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

TITAN_INLINE float load(float value) { return value; }
TITAN_INLINE float load(Bf16 value) { return as_float(uint32_t(value.bits) << 16); }
TITAN_INLINE void store(float* to, float value) { *to = value; }
// Round to nearest even; a NaN stays one (its payload would otherwise overflow into infinity).
TITAN_INLINE void store(Bf16* to, float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// One rounding, on every processor: where there is no instruction for it the compiler calls a function, which is slow.
TITAN_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// e^x = 2^power * e^r with |r| <= ln2/2. `shifted` holds power in its lowest mantissa bits, plus `bias`.
struct Reduced {
  float shifted, r;
};
TITAN_INLINE Reduced reduced(float x, float bias) {
  const float to_integer = 12582912.0f + bias;  // 1.5 * 2^23: floats there are whole
  const float shifted = fma(x, 1.44269504088896341f, to_integer), power = shifted - to_integer;
  return {shifted, fma(power, 2.12194440e-4f, fma(power, -0.693359375f, x))};
}
// Best polynomial of degree 5 that is 1 at 0, relative error below 1.7e-7.
TITAN_INLINE float exp_reduced(float r) {
  float p = fma(0.008290272206f, r, 0.041898161173f);
  p = fma(p, r, 0.166676387191f);
  p = fma(p, r, 0.499991476536f);
  p = fma(p, r, 0.999999701977f);
  return fma(p, r, 1.0f);
}

// e^x, relative error below 2e-7; 0 below -87.3 and the largest finite power above 88; NaN stays NaN. No table and no
// branch, so loops over it vectorise.
TITAN_INLINE float exp(float x) {
  const Reduced part = reduced(x < -87.33654f ? -87.33654f : (x > 88.37626f ? 88.37626f : x), 0.0f);
  const float value = as_float(as_bits(exp_reduced(part.r)) + ((as_bits(part.shifted) - 0x4b400000u) << 23));
  return x < -87.33654f ? 0.0f : (x == x ? value : x);
}

// 2^SCALE e^x for x <= 0 in half the instructions; 2^SCALE e^-87.3 below -87.3, and NaN stays NaN.
template <int SCALE = 0>
TITAN_INLINE float exp_negative(float x) {
  const Reduced part = reduced(-87.33654f > x ? -87.33654f : x, 127.0f + SCALE);  // an exponent's bits, after a shift
  return exp_reduced(part.r) * as_float(as_bits(part.shifted) << 23);
}

// What a binding needs to know of a device: nothing, on the CPU.
struct Launch {
  explicit Launch(const Tensor&) {}
};

// Rows that are worth a thread of their own, given the elements of one.
inline int64_t grain(int64_t width) { return 1 + 32768 / (width + 1); }

}  // namespace titan::cpu
