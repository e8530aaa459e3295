// Losses and labels on CUDA tensors; compiled by g++ against the host shim, on CPU tensors of the library titan_shim.
#include "cuda/vocab.cuh"

#include "binding/vocab.h"
#include "cuda/launch.h"
#include "cuda/vocab_tail.cuh"

namespace titan::cuda {
namespace {

static_assert(kVocabTailBlock == kTailBlock, "the binding allocates the blocks");

struct Vocab {
  using Bf16 = __nv_bfloat16;
  using Launch = cuda::Launch;
  static constexpr int64_t kLargestTopK = 1024;  // found one after the other
  static constexpr int64_t kMostIds = 8192;      // held in shared memory

  template <class T>
  static void statistics(const Launch& launch, const T* logits, int64_t tokens, int64_t columns, int64_t real,
                         float inverse_temperature, const int64_t* ids, int64_t id_count, int64_t start, int64_t size,
                         float* sums, float* picked, float* top_values, int64_t* top_ids, int64_t top_k) {
    const auto run = packs<T>(columns, logits) ? launch_statistics<T, kPack<T>> : launch_statistics<T, 1>;
    run(logits, tokens, columns, real, inverse_temperature, ids, id_count, start, size, sums, picked, top_values,
        top_ids, top_k, launch.stream);
  }

  template <class T>
  static void gradient(const Launch& launch, T* logits, int64_t tokens, int64_t columns, int64_t real,
                       float inverse_temperature, const float* coefficient, const float* log_sum_exp,
                       const int64_t* ids, const float* values, int64_t id_count, int64_t start) {
    const auto run = packs<T>(columns, logits) ? launch_gradient<T, kPack<T>> : launch_gradient<T, 1>;
    run(logits, tokens, columns, real, inverse_temperature, coefficient, log_sum_exp, ids, values, id_count, start,
        launch.stream);
  }

  template <class T>
  static void tail_blocks(const Launch& launch, const T* logits, int64_t tokens, int64_t columns, int64_t real,
                          float inverse_temperature, const int64_t* head_ids, int64_t head_count,
                          const float* threshold, int64_t start, double* sums, int64_t blocks) {
    TITAN_LAUNCH((vocab_tail_blocks_rows<T>), dim3(unsigned(tokens)), dim3(kVocabThreads), 0, launch.stream, logits,
                 columns, real, inverse_temperature, head_ids, head_count, threshold, start, sums, blocks);
  }

  template <class T>
  static void tail_draws(const Launch& launch, const T* logits, int64_t tokens, int64_t columns, int64_t real,
                         float inverse_temperature, const int64_t* head_ids, int64_t head_count,
                         const float* threshold, int64_t start, const double* blocks, int64_t block_count,
                         const double* targets, int64_t draws, int64_t* ids, float* drawn) {
    TITAN_LAUNCH((vocab_tail_draws_rows<T>), dim3(unsigned(tokens)), dim3(kVocabThreads), 0, launch.stream, logits, columns,
                 real, inverse_temperature, head_ids, head_count, threshold, start, blocks, block_count, targets, draws,
                 ids, drawn);
  }

  template <class T>
  static void tail_priorities(const Launch& launch, const T* logits, int64_t tokens, int64_t columns, int64_t real,
                              float inverse_temperature, const int64_t* head_ids, int64_t head_count,
                              const float* threshold, const int64_t* turns, int64_t start, int64_t size, int64_t* ids,
                              float* drawn, float* priorities, int64_t count) {
    const auto run = packs<T>(columns, logits) ? launch_tail_priorities<T, kPack<T>> : launch_tail_priorities<T, 1>;
    run(logits, tokens, columns, real, inverse_temperature, head_ids, head_count, threshold, turns, start, size, ids,
        drawn, priorities, count, launch.stream);
  }

  static void uniform(const Launch& launch, uint64_t seed, const int64_t* sample, const int64_t* position,
                      int64_t tokens, int64_t draws, double* out) {
    const unsigned grid = unsigned((tokens * draws + kVocabThreads - 1) / kVocabThreads);
    TITAN_LAUNCH((counter_uniform_elements), dim3(grid), dim3(kVocabThreads), 0, launch.stream, seed, sample, position, tokens,
                 draws, out);
  }
};

}  // namespace
}  // namespace titan::cuda

TITAN_IMPLEMENT(TITAN_LIBRARY, TITAN_DEVICE, m) { titan::implement_vocab<titan::cuda::Vocab>(m); }
