// A number u in (0, 1) for each entry of the vocabulary, another one for every token. Readers of labels compute it too
// (titan.distill.codec.priority), so it is the same bits on every device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TITAN_INLINE_EVERYWHERE __host__ __device__ __forceinline__
#else
#define TITAN_INLINE_EVERYWHERE inline __attribute__((always_inline))
#endif

namespace titan {

constexpr float kLeastExponent = -87.0f;  // e^x has all its digits down to there, below it counts as 0

// u(v) = (r + (f + 1/2) / 2^24) / 2^w with f = floor((c v + d) mod 2^32 / 2^8) and, x being taken mod 2^w,
// r = s(c s(a v + b)) with s(x) = x xor floor(x / 2^h) and h = ceil(w / 2).
struct Turn {
  uint32_t a, b, c, d, mask, half;
  float unit;  // 2^-w

  // turn: a, b, c and d, of which the lower 32 bits count; size: of the vocabulary, below 2^31
  TITAN_INLINE_EVERYWHERE Turn(const int64_t* turn, int64_t size)
      : a(uint32_t(turn[0])), b(uint32_t(turn[1])), c(uint32_t(turn[2])), d(uint32_t(turn[3])), mask(0), half(0), unit(1.0f) {
    uint32_t width = 0;
    for (; int64_t(mask) + 1 < size; ++width) {
      mask = mask << 1 | 1;
      unit *= 0.5f;
    }
    half = (width + 1) / 2;
  }

  TITAN_INLINE_EVERYWHERE float uniform(uint32_t id) const {
    const uint32_t once = (a * id + b) & mask, twice = (c * (once ^ once >> half)) & mask;
    const int32_t place = int32_t(twice ^ twice >> half), fraction = int32_t((c * id + d) >> 8);
    return (float(place) + (float(fraction) + 0.5f) * 5.9604644775390625e-8f) * unit;  // 2^-24
  }
};

}  // namespace titan
