// Losses and labels on the CPU: a row of logits at a time, which stays in a core's cache over its passes.
#include "binding/vocab.h"

#include "binding/philox.h"
#include "binding/turn.h"
#include "cpu/vocab_top.h"

namespace titan::cpu {
namespace {

constexpr float kLeast = -100.0f;  // below it e^x counts for nothing
constexpr int kTailScale = 35;  // weights of up to 2^35: a row of 2^17 such still sums exactly in float64

// sums[1..3] as in the binding, given the maximum.
template <class T>
TITAN_INLINE void exponential_sums(const T* __restrict z, int64_t columns, float maximum, float inverse_temperature,
                                   float* __restrict sums) {
  float total = 0.0f, moment = 0.0f, tempered = 0.0f;
  if (inverse_temperature == 1.0f) {
#pragma omp simd reduction(+ : total, moment)
    for (int64_t i = 0; i < columns; ++i) {
      const float d = load(z[i]) - maximum, e = exp_negative(d);
      total += e;
      moment += (d < kLeast ? kLeast : d) * e;  // a logit of -inf adds as good as 0, not NaN
    }
    tempered = total;
  } else {
#pragma omp simd reduction(+ : total, moment, tempered)
    for (int64_t i = 0; i < columns; ++i) {
      const float d = load(z[i]) - maximum, e = exp_negative(d);
      total += e;
      tempered += exp_negative(d * inverse_temperature);
      moment += (d < kLeast ? kLeast : d) * e;
    }
  }
  sums[1] = total;
  sums[2] = tempered;
  sums[3] = moment;
}

template <class T>
TITAN_INLINE void dense_gradient(T* __restrict z, int64_t columns, float inverse_temperature,
                                 const float* __restrict coefficient, const float* __restrict log_sum_exp) {
  const float c = coefficient[0], l = log_sum_exp[0], tempered_c = coefficient[1], tempered_l = log_sum_exp[1];
  if (inverse_temperature == 1.0f) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) store(&z[i], c * exp(load(z[i]) - l));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      const float v = load(z[i]);
      store(&z[i], c * exp(v - l) + tempered_c * exp(v * inverse_temperature - tempered_l));
    }
  }
}

// Weight of a tail entry: a whole number, 0 for what is no tail. Adding and taking away 2^23 rounds to the nearest one
// below 2^23; larger floats are whole anyway.
TITAN_INLINE float tail_weight(float z, float threshold, float inverse_temperature) {
  const float scaled = exp_negative<kTailScale>((z - threshold) * inverse_temperature);
  const float whole = scaled < 8388608.0f ? (scaled + 8388608.0f) - 8388608.0f : scaled;
  return z <= threshold ? whole : 0.0f;
}

template <class T>
TITAN_INLINE void tail_weights(const T* __restrict z, int64_t columns, float threshold, float inverse_temperature,
                               float* __restrict weights) {
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) weights[i] = tail_weight(load(z[i]), threshold, inverse_temperature);
}

template <class T>
TITAN_INLINE void block_sums(const T* __restrict z, int64_t columns, float threshold, float inverse_temperature,
                             double* __restrict sums) {
  for (int64_t block = 0; block * kTailBlock < columns; ++block) {
    const T* at = z + block * kTailBlock;
    const int64_t count = columns - block * kTailBlock < kTailBlock ? columns - block * kTailBlock : kTailBlock;
    float weights[kTailBlock];
    tail_weights(at, count, threshold, inverse_temperature, weights);
    double sum = 0.0;  // in a loop of its own, or every step would be as narrow as the doubles
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += weights[i];
    sums[block] = sum;
  }
}

// 0 for what is no tail.
template <class T>
TITAN_INLINE void tail_priorities(const T* __restrict z, int64_t columns, uint32_t start, float threshold,
                                  float inverse_temperature, const Turn turn, float* __restrict priorities) {
#pragma omp simd
  for (int32_t i = 0; i < int32_t(columns); ++i) {  // counted in as many bits as its vectors have
    const float v = load(z[i]), exponent = (v - threshold) * inverse_temperature;
    const float priority = exp_negative(exponent) / turn.uniform(start + uint32_t(i));
    priorities[i] = v <= threshold && exponent >= kLeastExponent ? priority : 0.0f;
  }
}

#define TITAN_VOCAB(T)                                                                                                 \
  TITAN_CLONES float row_maxima(const T* z, int64_t columns, float* maxima) { return tile_maxima(z, columns, maxima); } \
  TITAN_CLONES void row_sums(const T* z, int64_t columns, float maximum, float inverse_temperature, float* sums) {     \
    exponential_sums(z, columns, maximum, inverse_temperature, sums);                                                  \
  }                                                                                                                    \
  TITAN_CLONES void row_gradient(T* z, int64_t columns, float inverse_temperature, const float* coefficient,           \
                                 const float* log_sum_exp) {                                                           \
    dense_gradient(z, columns, inverse_temperature, coefficient, log_sum_exp);                                         \
  }                                                                                                                    \
  TITAN_CLONES void row_blocks(const T* z, int64_t columns, float threshold, float inverse_temperature, double* sums) { \
    block_sums(z, columns, threshold, inverse_temperature, sums);                                                      \
  }                                                                                                                    \
  TITAN_CLONES void block_weights(const T* z, int64_t columns, float threshold, float inverse_temperature,             \
                                  float* weights) {                                                                    \
    tail_weights(z, columns, threshold, inverse_temperature, weights);                                                 \
  }                                                                                                                    \
  TITAN_CLONES void row_priorities(const T* z, int64_t columns, uint32_t start, float threshold,                       \
                                   float inverse_temperature, const Turn& turn, float* priorities) {                   \
    tail_priorities(z, columns, start, threshold, inverse_temperature, turn, priorities);                              \
  }
TITAN_VOCAB(float)
TITAN_VOCAB(Bf16)
#undef TITAN_VOCAB

struct Vocab {
  using Bf16 = cpu::Bf16;
  using Launch = cpu::Launch;
  static constexpr int64_t kLargestTopK = 1 << 20;
  static constexpr int64_t kMostIds = 1 << 20;

  template <class T>
  static void statistics(const Launch&, const T* logits, int64_t tokens, int64_t columns, int64_t real,
                         float inverse_temperature, const int64_t* ids, int64_t id_count, int64_t start, int64_t,
                         float* sums, float* picked, float* top_values, int64_t* top_ids, int64_t top_k) {
    torch::stable::parallel_for(0, tokens, grain(columns), [&](int64_t begin, int64_t end) {
      std::vector<float> maxima(real / kTile + 1), largest;
      std::vector<Candidate> candidates;
      for (int64_t row = begin; row < end; ++row) {
        const T* z = logits + row * columns;
        float* out = sums + row * 4;
        out[0] = row_maxima(z, real, maxima.data());
        row_sums(z, real, out[0], inverse_temperature, out);
        for (int64_t j = 0; j < id_count; ++j) {
          const int64_t local = ids[row * id_count + j] - start;
          picked[row * id_count + j] = local >= 0 && local < real ? load(z[local]) : 0.0f;
        }
        if (top_k > 0) {
          top_of_row(z, real, maxima, top_k, largest, candidates, top_values + row * top_k, top_ids + row * top_k, start);
        }
      }
    });
  }

  template <class T>
  static void gradient(const Launch&, T* logits, int64_t tokens, int64_t columns, int64_t real,
                       float inverse_temperature, const float* coefficient, const float* log_sum_exp,
                       const int64_t* ids, const float* values, int64_t id_count, int64_t start) {
    torch::stable::parallel_for(0, tokens, grain(columns), [&](int64_t begin, int64_t end) {
      std::vector<float> sparse(id_count);
      for (int64_t row = begin; row < end; ++row) {
        T* z = logits + row * columns;
        const float *c = coefficient + row * 2, *l = log_sum_exp + row * 2, *value = values + row * id_count;
        const int64_t* id = ids + row * id_count;
        for (int64_t j = 0; j < id_count; ++j) {
          const int64_t local = id[j] - start;
          if (local < 0 || local >= real) continue;
          float at = load(z[local]);
          dense_gradient(&at, 1, inverse_temperature, c, l);
          for (int64_t i = 0; i < id_count; ++i) at += id[i] == id[j] ? value[i] : 0.0f;
          sparse[j] = at;
        }
        row_gradient(z, real, inverse_temperature, c, l);
        for (int64_t i = real; i < columns; ++i) store(&z[i], 0.0f);
        for (int64_t j = 0; j < id_count; ++j) {
          const int64_t local = id[j] - start;
          if (local >= 0 && local < real) store(&z[local], sparse[j]);
        }
      }
    });
  }

  template <class T>
  static void tail_blocks(const Launch&, const T* logits, int64_t tokens, int64_t columns, int64_t real,
                          float inverse_temperature, const int64_t* head_ids, int64_t head_count,
                          const float* threshold, int64_t start, double* sums, int64_t blocks) {
    torch::stable::parallel_for(0, tokens, grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* z = logits + row * columns;
        double* out = sums + row * blocks;
        std::fill(out, out + blocks, 0.0);
        row_blocks(z, real, threshold[row], inverse_temperature, out);
        for (int64_t j = 0; j < head_count; ++j) {
          const int64_t local = head_ids[row * head_count + j] - start;
          if (local < 0 || local >= real) continue;
          out[local / kTailBlock] -= tail_weight(load(z[local]), threshold[row], inverse_temperature);
        }
      }
    });
  }

  template <class T>
  static void tail_draws(const Launch&, const T* logits, int64_t tokens, int64_t columns, int64_t real,
                         float inverse_temperature, const int64_t* head_ids, int64_t head_count,
                         const float* threshold, int64_t start, const double* blocks, int64_t block_count,
                         const double* targets, int64_t draws, int64_t* ids, float* drawn) {
    torch::stable::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* z = logits + row * columns;
        const int64_t* head = head_ids + row * head_count;
        for (int64_t j = 0; j < draws; ++j) {
          int64_t& id = ids[row * draws + j];
          float& value = drawn[row * draws + j];
          id = 0;
          value = 0.0f;
          double left = targets[row * draws + j];
          if (!(left >= 0)) continue;
          int64_t block = 0;
          while (block < block_count && left >= blocks[row * block_count + block]) {
            left -= blocks[row * block_count + block++];
          }
          const int64_t first = block * kTailBlock, count = std::min(real - first, kTailBlock);
          if (count <= 0) continue;
          float weights[kTailBlock];
          block_weights(z + first, count, threshold[row], inverse_temperature, weights);
          for (int64_t k = 0; k < head_count; ++k) {
            const int64_t local = head[k] - start - first;
            if (local >= 0 && local < count) weights[local] = 0.0f;
          }
          int64_t i = 0;
          while (i < count && left >= weights[i]) left -= weights[i++];
          if (i == count) continue;
          id = start + first + i;
          value = load(z[first + i]);
        }
      }
    });
  }

  template <class T>
  static void tail_priorities(const Launch&, const T* logits, int64_t tokens, int64_t columns, int64_t real,
                              float inverse_temperature, const int64_t* head_ids, int64_t head_count,
                              const float* threshold, const int64_t* turns, int64_t start, int64_t size, int64_t* ids,
                              float* drawn, float* priorities, int64_t count) {
    torch::stable::parallel_for(0, tokens, grain(columns), [&](int64_t begin, int64_t end) {
      std::vector<float> of_row(real), maxima(real / kTile + 1), largest;
      std::vector<Candidate> candidates;
      for (int64_t row = begin; row < end; ++row) {
        const T* z = logits + row * columns;
        int64_t* id = ids + row * count;
        float *value = drawn + row * count, *priority = priorities + row * count;
        const Turn turn(turns + row * 4, size);
        row_priorities(z, real, uint32_t(start), threshold[row], inverse_temperature, turn, of_row.data());
        for (int64_t j = 0; j < head_count; ++j) {
          const int64_t local = head_ids[row * head_count + j] - start;
          if (local >= 0 && local < real) of_row[local] = 0.0f;
        }
        row_maxima(of_row.data(), real, maxima.data());
        top_of_row(of_row.data(), real, maxima, count, largest, candidates, priority, id, start);
        for (int64_t j = 0; j < count; ++j) {
          const bool there = priority[j] > 0.0f;
          value[j] = there ? load(z[id[j] - start]) : -INFINITY;
          if (!there) id[j] = 0, priority[j] = 0.0f;
        }
      }
    });
  }

  static void uniform(const Launch&, uint64_t seed, const int64_t* sample, const int64_t* position, int64_t tokens,
                      int64_t draws, double* out) {
    for (int64_t row = 0; row < tokens; ++row) {
      for (int64_t j = 0; j < draws; ++j) out[row * draws + j] = philox_uniform(seed, sample[row], position[row], j);
    }
  }
};

}  // namespace
}  // namespace titan::cpu

STABLE_TORCH_LIBRARY_IMPL(titan, CPU, m) { titan::implement_vocab<titan::cpu::Vocab>(m); }
