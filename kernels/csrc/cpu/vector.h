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

// e^x by a polynomial of degree 6 on [-ln2/2, ln2/2] (Cephes expf), relative error below 2e-7; 0 below -87.3 and the
// largest finite power above 88; NaN stays NaN. No table and no branch, so loops over it vectorise.
TITAN_INLINE float exp(float x) {
  const float clamped = x < -87.33654f ? -87.33654f : (x > 88.37626f ? 88.37626f : x);
  const float shifted = fma(clamped, 1.44269504088896341f, 12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const float power = shifted - 12582912.0f;
  const float r = fma(power, 2.12194440e-4f, fma(power, -0.693359375f, clamped));
  float p = 1.9875691500e-4f;
  p = fma(p, r, 1.3981999507e-3f);
  p = fma(p, r, 8.3334519073e-3f);
  p = fma(p, r, 4.1665795894e-2f);
  p = fma(p, r, 1.6666665459e-1f);
  p = fma(p, r, 5.0000001201e-1f);
  p = fma(p * r, r, r) + 1.0f;
  const float value = as_float(as_bits(p) + ((as_bits(shifted) - 0x4b400000u) << 23));
  return x < -87.33654f ? 0.0f : (x == x ? value : x);
}

// What a binding needs to know of a device: nothing, on the CPU.
struct Launch {
  explicit Launch(const Tensor&) {}
};

// Rows that are worth a thread of their own, given the elements of one.
inline int64_t grain(int64_t width) { return 1 + 32768 / (width + 1); }

}  // namespace titan::cpu
