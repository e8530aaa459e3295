// Philox 4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011):
// the same (key, counter) gives the same bits on every device, in any order.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TITAN_EVERYWHERE __host__ __device__ inline
#else
#define TITAN_EVERYWHERE inline
#endif

namespace titan {

struct PhiloxBits {
  uint32_t word[4];
};

TITAN_EVERYWHERE PhiloxBits philox(uint64_t key, const PhiloxBits& counter) {
  uint32_t key_low = uint32_t(key), key_high = uint32_t(key >> 32);
  PhiloxBits c = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t(0xD2511F53u) * c.word[0], right = uint64_t(0xCD9E8D57u) * c.word[2];
    c = {{uint32_t(right >> 32) ^ c.word[1] ^ key_low, uint32_t(right), uint32_t(left >> 32) ^ c.word[3] ^ key_high,
          uint32_t(left)}};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return c;
}

// In [0, 1), 53 bits. Samples are counted in 64 bits, positions and draws in 32.
TITAN_EVERYWHERE double philox_uniform(uint64_t seed, int64_t sample, int64_t position, int64_t draw) {
  const PhiloxBits bits = philox(seed, {{uint32_t(draw), uint32_t(position), uint32_t(uint64_t(sample)),
                                         uint32_t(uint64_t(sample) >> 32)}});
  const uint64_t mantissa = (uint64_t(bits.word[0]) << 21) ^ (bits.word[1] >> 11);
  return double(mantissa) * (1.0 / 9007199254740992.0);
}

}  // namespace titan
