// Attention on tensor cores: bfloat16, heads of 64 or 128, sums in float32 (after arXiv 2307.08691).
//
// A block of four warps holds 64 rows of one side, 16 a warp, and walks over tiles of the other side, which arrive by
// asynchronous copies while the tile before is used. Every product is a warp's 16 rows times a tile: scores, then the
// sum of the tile's rows weighted by them. Two kernels walk over keys (forward, gradient of queries), one over queries
// (gradients of keys and values), with the same parts.
#pragma once

#include "cuda/attention_mask.cuh"
#include "cuda/mma.cuh"

namespace titan {

constexpr int kMmaWarps = 4, kMmaRows = 16 * kMmaWarps, kMmaThreads = 32 * kMmaWarps;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Rows of a tile that a block walks over: as many as registers allow.
template <int D>
constexpr int kMmaTile = D == 64 ? 64 : 32;

// A tile of rows of D bfloat16 in shared memory. The 16-byte chunks of a row are permuted by its number, so that eight
// rows at the same column lie in different banks.
template <int D>
struct SharedTile {
  __nv_bfloat16* start;

  __device__ __forceinline__ __nv_bfloat16* at(int row, int column) const {
    return start + row * D + ((column / 8) ^ (row & 7)) * 8;
  }
};

// Two tiles one after the other: one is used while the other arrives.
template <int D>
struct TilePair {
  __nv_bfloat16* start;

  __device__ __forceinline__ SharedTile<D> operator[](int stage) const { return {start + stage * kMmaTile<D> * D}; }
};

// Starts copying rows [first, first + ROWS), zeros beyond `count`.
template <int D, int ROWS>
__device__ __forceinline__ void copy_tile(SharedTile<D> to, HeadRows<const __nv_bfloat16> from, int first, int count) {
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * D / 8; i += kMmaThreads) {
    const int row = i / (D / 8), column = i % (D / 8) * 8;
    const bool valid = first + row < count;
    cp_async_16(to.at(row, column), from.row(valid ? first + row : 0) + column, valid);
  }
}

// Fragment A of rows [row, row + 16), columns [column, column + 16).
template <int D>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], SharedTile<D> tile, int row, int column) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4(a, tile.at(row + lane % 16, column + lane / 16 * 8));
}

// Two fragments B whose columns are the tile's rows: b[0], b[1] of rows [row, row + 8), b[2], b[3] of the next eight.
template <int D>
__device__ __forceinline__ void load_b_rows(uint32_t (&b)[4], SharedTile<D> tile, int row, int column) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4(b, tile.at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
}

// Two fragments B whose columns are the tile's columns: b[0], b[1] of [column, column + 8), b[2], b[3] of the next eight.
template <int D>
__device__ __forceinline__ void load_b_columns(uint32_t (&b)[4], SharedTile<D> tile, int row, int column) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(b, tile.at(row + lane % 8 + lane / 8 % 2 * 8, column + lane / 16 * 8));
}

// products[j] = a warp's 16 rows times rows [8j, 8j + 8) of a tile, as fragments C.
template <int D, int TILE>
__device__ __forceinline__ void multiply_rows(float (&products)[TILE / 8][4], SharedTile<D> rows, int first,
                                              SharedTile<D> tile) {
#pragma unroll
  for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[j][i] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t a[4];
    load_a(a, rows, first, k);
#pragma unroll
    for (int j = 0; j < TILE / 8; j += 2) {
      uint32_t b[4];
      load_b_rows(b, tile, 8 * j, k);
      mma_m16n8k16(products[j], a, b[0], b[1]);
      mma_m16n8k16(products[j + 1], a, b[2], b[3]);
    }
  }
}

// sums += weights times the rows of a tile. The weights are fragments C; side by side they are fragments A.
template <int D, int TILE>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[D / 8][4], const float (&weights)[TILE / 8][4],
                                                  SharedTile<D> tile) {
#pragma unroll
  for (int j = 0; j < TILE / 8; j += 2) {
    const uint32_t a[4] = {pack_bf16(weights[j][0], weights[j][1]), pack_bf16(weights[j][2], weights[j][3]),
                           pack_bf16(weights[j + 1][0], weights[j + 1][1]),
                           pack_bf16(weights[j + 1][2], weights[j + 1][3])};
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t b[4];
      load_b_columns(b, tile, 8 * j, 8 * n);
      mma_m16n8k16(sums[n], a, b[0], b[1]);
      mma_m16n8k16(sums[n + 1], a, b[2], b[3]);
    }
  }
}

template <int D>
__device__ __forceinline__ void clear(float (&sums)[D / 8][4]) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }
}

// Row of element i of a lane's fragment C, from the warp's first; and its column from the fragment's first.
__device__ __forceinline__ int fragment_row(int i) { return threadIdx.x % 32 / 4 + (i >= 2 ? 8 : 0); }
__device__ __forceinline__ int fragment_column(int i) { return threadIdx.x % 4 * 2 + i % 2; }

// Writes a warp's rows [first, first + 16), each times its factor.
template <int D>
__device__ __forceinline__ void store_fragments(HeadRows<__nv_bfloat16> to, const float (&sums)[D / 8][4],
                                                const float (&factor)[2], int first, int count) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + fragment_row(2 * half);
    if (row >= count) continue;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const uint32_t pair = pack_bf16(sums[n][2 * half] * factor[half], sums[n][2 * half + 1] * factor[half]);
      *reinterpret_cast<uint32_t*>(to.row(row) + 8 * n + fragment_column(0)) = pair;
    }
  }
}

// grid: (query tiles, batch * query heads)
template <int D>
__global__ void __launch_bounds__(kMmaThreads)
    attention_forward_mma(AttentionShape shape, const __nv_bfloat16* query, const __nv_bfloat16* key,
                          const __nv_bfloat16* value, const int32_t* query_segments, const int32_t* key_segments,
                          __nv_bfloat16* out, float* log_sum_exp) {
  constexpr int TILE = kMmaTile<D>;
  TITAN_SHARED(__nv_bfloat16, shared);
  const SharedTile<D> queries{shared};
  const TilePair<D> keys{shared + kMmaRows * D}, values{shared + (kMmaRows + 2 * TILE) * D};
  const int sample = blockIdx.y / shape.query_heads, head = blockIdx.y % shape.query_heads;
  const int key_head = head / (shape.query_heads / shape.key_heads);
  const int first = blockIdx.x * kMmaRows, warp_row = threadIdx.x / 32 * 16;
  const AttentionMask mask = attention_mask(shape, sample, query_segments, key_segments);
  const auto key_rows = head_rows(key, shape.batch, shape.key_heads, D, sample, key_head);
  const auto value_rows = head_rows(value, shape.batch, shape.key_heads, D, sample, key_head);
  const int end = mask.end_key(min(first + kMmaRows, shape.queries));

  copy_tile<D, kMmaRows>(queries, head_rows(query, shape.batch, shape.query_heads, D, sample, head), first,
                         shape.queries);
  copy_tile<D, TILE>(keys[0], key_rows, 0, shape.keys);
  copy_tile<D, TILE>(values[0], value_rows, 0, shape.keys);
  cp_async_commit();

  // Scores are kept in units of ln 2, so that 2^x takes the place of e^x.
  const float scale = shape.scale * kLog2E;
  float sums[D / 8][4], largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  clear<D>(sums);
  for (int tile = 0, stage = 0; tile < end; tile += TILE, stage ^= 1) {
    if (tile + TILE < end) {
      copy_tile<D, TILE>(keys[stage ^ 1], key_rows, tile + TILE, shape.keys);
      copy_tile<D, TILE>(values[stage ^ 1], value_rows, tile + TILE, shape.keys);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    float scores[TILE / 8][4];
    multiply_rows<D, TILE>(scores, queries, warp_row, keys[stage]);
    float now[2] = {largest[0], largest[1]};
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool seen = mask.sees(first + warp_row + fragment_row(i), tile + 8 * j + fragment_column(i));
        scores[j][i] = seen ? scores[j][i] * scale : -INFINITY;
        now[i / 2] = fmaxf(now[i / 2], scores[j][i]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // a row lies in four neighbouring lanes
      now[half] = fmaxf(now[half], __shfl_xor_sync(kWholeWarp, now[half], 1));
      now[half] = fmaxf(now[half], __shfl_xor_sync(kWholeWarp, now[half], 2));
      const float kept = largest[half] == -INFINITY ? 0.0f : exp2f(largest[half] - now[half]);
      largest[half] = now[half];
      total[half] *= kept;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        sums[n][2 * half] *= kept;
        sums[n][2 * half + 1] *= kept;
      }
    }
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[j][i] = scores[j][i] == -INFINITY ? 0.0f : exp2f(scores[j][i] - largest[i / 2]);
        total[i / 2] += scores[j][i];
      }
    }
    add_weighted_rows<D, TILE>(sums, scores, values[stage]);
    __syncthreads();
  }

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(kWholeWarp, total[half], 1);
    total[half] += __shfl_xor_sync(kWholeWarp, total[half], 2);
    factor[half] = total[half] > 0.0f ? 1.0f / total[half] : 0.0f;  // a query that sees nothing gets zeros
    const int row = first + warp_row + fragment_row(2 * half);
    if (threadIdx.x % 4 == 0 && row < shape.queries) {
      log_sum_exp[int64_t(blockIdx.y) * shape.queries + row] =
          total[half] > 0.0f ? largest[half] * kLn2 + logf(total[half]) : -INFINITY;
    }
  }
  store_fragments<D>(head_rows(out, shape.batch, shape.query_heads, D, sample, head), sums, factor, first + warp_row,
                     shape.queries);
}

// With p = e^(score - log_sum_exp): d score = p (grad . value - row_dot), d query = scale sum d score * key.
// grid: (query tiles, batch * query heads)
template <int D>
__global__ void __launch_bounds__(kMmaThreads)
    attention_grad_query_mma(AttentionShape shape, const __nv_bfloat16* grad, const __nv_bfloat16* query,
                             const __nv_bfloat16* key, const __nv_bfloat16* value, const int32_t* query_segments,
                             const int32_t* key_segments, const float* log_sum_exp, const float* row_dot,
                             __nv_bfloat16* grad_query) {
  constexpr int TILE = kMmaTile<D>;
  TITAN_SHARED(__nv_bfloat16, shared);
  const SharedTile<D> queries{shared}, grads{shared + kMmaRows * D};
  const TilePair<D> keys{shared + 2 * kMmaRows * D}, values{shared + 2 * (kMmaRows + TILE) * D};
  const int sample = blockIdx.y / shape.query_heads, head = blockIdx.y % shape.query_heads;
  const int key_head = head / (shape.query_heads / shape.key_heads);
  const int first = blockIdx.x * kMmaRows, warp_row = threadIdx.x / 32 * 16;
  const AttentionMask mask = attention_mask(shape, sample, query_segments, key_segments);
  const auto key_rows = head_rows(key, shape.batch, shape.key_heads, D, sample, key_head);
  const auto value_rows = head_rows(value, shape.batch, shape.key_heads, D, sample, key_head);
  const int end = mask.end_key(min(first + kMmaRows, shape.queries));

  copy_tile<D, kMmaRows>(queries, head_rows(query, shape.batch, shape.query_heads, D, sample, head), first,
                         shape.queries);
  copy_tile<D, kMmaRows>(grads, head_rows(grad, shape.batch, shape.query_heads, D, sample, head), first,
                         shape.queries);
  copy_tile<D, TILE>(keys[0], key_rows, 0, shape.keys);
  copy_tile<D, TILE>(values[0], value_rows, 0, shape.keys);
  cp_async_commit();

  float norm[2], taken[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + warp_row + fragment_row(2 * half);
    const int64_t at = int64_t(blockIdx.y) * shape.queries + (row < shape.queries ? row : 0);
    norm[half] = log_sum_exp[at] * kLog2E;
    taken[half] = row_dot[at];
  }
  float sums[D / 8][4];
  clear<D>(sums);
  for (int tile = 0, stage = 0; tile < end; tile += TILE, stage ^= 1) {
    if (tile + TILE < end) {
      copy_tile<D, TILE>(keys[stage ^ 1], key_rows, tile + TILE, shape.keys);
      copy_tile<D, TILE>(values[stage ^ 1], value_rows, tile + TILE, shape.keys);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    float scores[TILE / 8][4], toward[TILE / 8][4];
    multiply_rows<D, TILE>(scores, queries, warp_row, keys[stage]);
    multiply_rows<D, TILE>(toward, grads, warp_row, values[stage]);
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool seen = mask.sees(first + warp_row + fragment_row(i), tile + 8 * j + fragment_column(i));
        const float share = seen ? exp2f(scores[j][i] * shape.scale * kLog2E - norm[i / 2]) : 0.0f;
        scores[j][i] = share * (toward[j][i] - taken[i / 2]);
      }
    }
    add_weighted_rows<D, TILE>(sums, scores, keys[stage]);
    __syncthreads();
  }
  const float factor[2] = {shape.scale, shape.scale};
  store_fragments<D>(head_rows(grad_query, shape.batch, shape.query_heads, D, sample, head), sums, factor,
                     first + warp_row, shape.queries);
}

// d value = sum p * grad, d key = scale sum d score * query, over the queries of every head that shares the key's.
// Here a warp's rows are keys and the tile's are queries. grid: (key tiles, batch * key heads)
template <int D>
__global__ void __launch_bounds__(kMmaThreads)
    attention_grad_key_value_mma(AttentionShape shape, const __nv_bfloat16* grad, const __nv_bfloat16* query,
                                 const __nv_bfloat16* key, const __nv_bfloat16* value, const int32_t* query_segments,
                                 const int32_t* key_segments, const float* log_sum_exp, const float* row_dot,
                                 __nv_bfloat16* grad_key, __nv_bfloat16* grad_value) {
  constexpr int TILE = kMmaTile<D>;
  TITAN_SHARED(__nv_bfloat16, shared);
  const SharedTile<D> keys{shared}, values{shared + kMmaRows * D};
  const TilePair<D> queries{shared + 2 * kMmaRows * D}, grads{shared + 2 * (kMmaRows + TILE) * D};
  const int sample = blockIdx.y / shape.key_heads, key_head = blockIdx.y % shape.key_heads;
  const int group = shape.query_heads / shape.key_heads;
  const int first = blockIdx.x * kMmaRows, warp_row = threadIdx.x / 32 * 16;
  const AttentionMask mask = attention_mask(shape, sample, query_segments, key_segments);
  const int begin = mask.first_query(first) / TILE * TILE;
  const int tiles_a_head = max(0, (shape.queries - begin + TILE - 1) / TILE), tiles = group * tiles_a_head;

  const auto copy_step = [&](int step, int stage) {  // step: a tile of queries of one of the group's heads
    const int head = key_head * group + step / tiles_a_head, tile = begin + step % tiles_a_head * TILE;
    copy_tile<D, TILE>(queries[stage], head_rows(query, shape.batch, shape.query_heads, D, sample, head), tile,
                       shape.queries);
    copy_tile<D, TILE>(grads[stage], head_rows(grad, shape.batch, shape.query_heads, D, sample, head), tile,
                       shape.queries);
  };
  copy_tile<D, kMmaRows>(keys, head_rows(key, shape.batch, shape.key_heads, D, sample, key_head), first, shape.keys);
  copy_tile<D, kMmaRows>(values, head_rows(value, shape.batch, shape.key_heads, D, sample, key_head), first,
                         shape.keys);
  if (tiles > 0) copy_step(0, 0);
  cp_async_commit();

  float key_sums[D / 8][4], value_sums[D / 8][4];
  clear<D>(key_sums);
  clear<D>(value_sums);
  for (int step = 0; step < tiles; ++step) {
    const int stage = step % 2;
    if (step + 1 < tiles) copy_step(step + 1, stage ^ 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const int head = key_head * group + step / tiles_a_head, tile = begin + step % tiles_a_head * TILE;
    const int64_t rows = (int64_t(sample) * shape.query_heads + head) * shape.queries;
    float shares[TILE / 8][4], changes[TILE / 8][4];
    multiply_rows<D, TILE>(shares, keys, warp_row, queries[stage]);
    multiply_rows<D, TILE>(changes, values, warp_row, grads[stage]);
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = tile + 8 * j + fragment_column(i);
        const bool seen = mask.sees(row, first + warp_row + fragment_row(i));
        const int64_t at = rows + (seen ? row : 0);
        shares[j][i] = seen ? exp2f((shares[j][i] * shape.scale - log_sum_exp[at]) * kLog2E) : 0.0f;
        changes[j][i] = seen ? shares[j][i] * (changes[j][i] - row_dot[at]) : 0.0f;
      }
    }
    add_weighted_rows<D, TILE>(value_sums, shares, grads[stage]);
    add_weighted_rows<D, TILE>(key_sums, changes, queries[stage]);
    __syncthreads();
  }
  const float as_is[2] = {1.0f, 1.0f}, factor[2] = {shape.scale, shape.scale};
  store_fragments<D>(head_rows(grad_value, shape.batch, shape.key_heads, D, sample, key_head), value_sums, as_is,
                     first + warp_row, shape.keys);
  store_fragments<D>(head_rows(grad_key, shape.batch, shape.key_heads, D, sample, key_head), key_sums, factor,
                     first + warp_row, shape.keys);
}

}  // namespace titan
