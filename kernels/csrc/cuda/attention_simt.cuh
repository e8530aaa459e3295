// Attention without tensor cores: float32, and widths that attention_mma.cuh does not take. A block holds some rows (of
// queries, or of keys in the backward of keys and values) and walks over tiles of the other side. Each warp owns four of
// the rows; its lanes stand for the 32 entries of a tile while scores are made, and for columns while rows are summed.
#pragma once

#include "cuda/attention_mask.cuh"
#include "cuda/reduce.cuh"

namespace titan {

constexpr int kSimtWarps = 4, kSimtRowsAWarp = 4, kSimtRows = kSimtWarps * kSimtRowsAWarp;
constexpr int kSimtTile = 32, kSimtThreads = 32 * kSimtWarps;

// Rows [first, first + rows) as float32, `pitch` floats apart; zeros beyond `count`.
template <class T>
__device__ void load_rows(float* to, int pitch, HeadRows<const T> from, int first, int rows, int count, int width) {
  for (int i = threadIdx.x; i < rows * width; i += kSimtThreads) {
    const int row = i / width, column = i % width;
    to[row * pitch + column] = first + row < count ? to_float(from.row(first + row)[column]) : 0.0f;
  }
}

__device__ __forceinline__ float dot(const float* a, const float* b, int width) {
  float sum = 0.0f;
  for (int i = 0; i < width; ++i) sum += a[i] * b[i];
  return sum;
}

// row[column] += sum over the tile's entries of weight[j] tile[j][column]; each lane has columns of its own.
__device__ __forceinline__ void add_weighted(float* row, const float* weight, const float* tile, int pitch, int width) {
  for (int column = threadIdx.x % 32; column < width; column += 32) {
    float sum = row[column];
    for (int j = 0; j < kSimtTile; ++j) sum += weight[j] * tile[j * pitch + column];
    row[column] = sum;
  }
}

template <class T>
__device__ void store_rows(HeadRows<T> to, const float* from, int pitch, int first, int count, int width) {
  for (int i = threadIdx.x; i < kSimtRows * width; i += kSimtThreads) {
    const int row = i / width, column = i % width;
    if (first + row < count) to.row(first + row)[column] = from_float<T>(from[row * pitch + column]);
  }
}

inline size_t simt_shared_bytes(int width) {  // the most that one of the kernels needs
  return sizeof(float) * (4 * kSimtRows * width + 2 * kSimtTile * (width + 1) + 2 * kSimtRows * kSimtTile);
}

// grid: (query tiles, batch * query heads)
template <class T>
__global__ void __launch_bounds__(kSimtThreads)
    attention_forward_simt(AttentionShape shape, const T* query, const T* key, const T* value,
                           const int32_t* query_segments, const int32_t* key_segments, T* out, float* log_sum_exp) {
  TITAN_SHARED(float, shared);
  const int width = shape.width, pitch = width + 1;  // odd, so that lanes reading rows use different banks
  float* queries = shared;                           // [rows, width]
  float* sums = queries + kSimtRows * width;         // [rows, width]
  float* keys = sums + kSimtRows * width;            // [tile, pitch]
  float* values = keys + kSimtTile * pitch;          // [tile, pitch]
  float* weights = values + kSimtTile * pitch;       // [rows, tile]
  float* largest = weights + kSimtRows * kSimtTile;  // [rows]: of the scores so far
  float* total = largest + kSimtRows;                // [rows]: of e^(score - largest)
  const int sample = blockIdx.y / shape.query_heads, head = blockIdx.y % shape.query_heads;
  const int key_head = head / (shape.query_heads / shape.key_heads);
  const int first = blockIdx.x * kSimtRows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const AttentionMask mask = attention_mask(shape, sample, query_segments, key_segments);
  const auto query_rows = head_rows(query, shape.batch, shape.query_heads, width, sample, head);
  const auto key_rows = head_rows(key, shape.batch, shape.key_heads, width, sample, key_head);
  const auto value_rows = head_rows(value, shape.batch, shape.key_heads, width, sample, key_head);

  load_rows(queries, width, query_rows, first, kSimtRows, shape.queries, width);
  for (int i = threadIdx.x; i < kSimtRows * width; i += kSimtThreads) sums[i] = 0.0f;
  if (threadIdx.x < kSimtRows) {
    largest[threadIdx.x] = -INFINITY;
    total[threadIdx.x] = 0.0f;
  }
  const int end = mask.end_key(min(first + kSimtRows, shape.queries));
  for (int tile = 0; tile < end; tile += kSimtTile) {
    __syncthreads();
    load_rows(keys, pitch, key_rows, tile, kSimtTile, shape.keys, width);
    load_rows(values, pitch, value_rows, tile, kSimtTile, shape.keys, width);
    __syncthreads();
    for (int r = 0; r < kSimtRowsAWarp; ++r) {
      const int row = warp * kSimtRowsAWarp + r;
      float* weight = weights + row * kSimtTile;
      const bool seen = mask.sees(first + row, tile + lane);
      const float score =
          seen ? dot(queries + row * width, keys + lane * pitch, width) * shape.scale : -INFINITY;
      const float before = largest[row], now = fmaxf(before, warp_max(score));
      const float kept = before == -INFINITY ? 0.0f : expf(before - now);
      const float share = seen ? expf(score - now) : 0.0f, sum = warp_sum(share);
      weight[lane] = share;
      if (lane == 0) {
        total[row] = total[row] * kept + sum;
        largest[row] = now;
      }
      __syncwarp();
      for (int column = lane; column < width; column += 32) sums[row * width + column] *= kept;
      add_weighted(sums + row * width, weight, values, pitch, width);
      __syncwarp();
    }
  }
  __syncthreads();
  for (int r = 0; r < kSimtRowsAWarp; ++r) {
    const int row = warp * kSimtRowsAWarp + r;
    const float inverse = total[row] > 0.0f ? 1.0f / total[row] : 0.0f;  // a query that sees nothing gets zeros
    for (int column = lane; column < width; column += 32) sums[row * width + column] *= inverse;
    if (lane == 0 && first + row < shape.queries) {
      log_sum_exp[int64_t(blockIdx.y) * shape.queries + first + row] =
          total[row] > 0.0f ? largest[row] + logf(total[row]) : -INFINITY;
    }
  }
  __syncthreads();
  store_rows(head_rows(out, shape.batch, shape.query_heads, width, sample, head), sums, width, first, shape.queries,
             width);
}

// row_dot[sample, head, query] = sum of grad * out over a row: one warp a row. grid: (queries, batch * query heads)
template <class T>
__global__ void attention_row_dot(AttentionShape shape, const T* grad, const T* out, float* row_dot) {
  const int sample = blockIdx.y / shape.query_heads, head = blockIdx.y % shape.query_heads;
  const T* a = head_rows(grad, shape.batch, shape.query_heads, shape.width, sample, head).row(blockIdx.x);
  const T* b = head_rows(out, shape.batch, shape.query_heads, shape.width, sample, head).row(blockIdx.x);
  float sum = 0.0f;
  for (int column = threadIdx.x; column < shape.width; column += 32) sum += to_float(a[column]) * to_float(b[column]);
  sum = warp_sum(sum);
  if (threadIdx.x == 0) row_dot[int64_t(blockIdx.y) * shape.queries + blockIdx.x] = sum;
}

// With p = e^(score - log_sum_exp): d score = p (grad . value - row_dot), d query = scale sum d score * key.
// grid: (query tiles, batch * query heads)
template <class T>
__global__ void __launch_bounds__(kSimtThreads)
    attention_grad_query_simt(AttentionShape shape, const T* grad, const T* query, const T* key, const T* value,
                              const int32_t* query_segments, const int32_t* key_segments, const float* log_sum_exp,
                              const float* row_dot, T* grad_query) {
  TITAN_SHARED(float, shared);
  const int width = shape.width, pitch = width + 1;
  float* queries = shared;                      // [rows, width]
  float* grads = queries + kSimtRows * width;   // [rows, width]
  float* sums = grads + kSimtRows * width;      // [rows, width]
  float* keys = sums + kSimtRows * width;       // [tile, pitch]
  float* values = keys + kSimtTile * pitch;     // [tile, pitch]
  float* weights = values + kSimtTile * pitch;  // [rows, tile]
  const int sample = blockIdx.y / shape.query_heads, head = blockIdx.y % shape.query_heads;
  const int key_head = head / (shape.query_heads / shape.key_heads);
  const int first = blockIdx.x * kSimtRows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const AttentionMask mask = attention_mask(shape, sample, query_segments, key_segments);
  const auto key_rows = head_rows(key, shape.batch, shape.key_heads, width, sample, key_head);
  const auto value_rows = head_rows(value, shape.batch, shape.key_heads, width, sample, key_head);

  load_rows(queries, width, head_rows(query, shape.batch, shape.query_heads, width, sample, head), first, kSimtRows,
            shape.queries, width);
  load_rows(grads, width, head_rows(grad, shape.batch, shape.query_heads, width, sample, head), first, kSimtRows,
            shape.queries, width);
  for (int i = threadIdx.x; i < kSimtRows * width; i += kSimtThreads) sums[i] = 0.0f;
  const int end = mask.end_key(min(first + kSimtRows, shape.queries));
  for (int tile = 0; tile < end; tile += kSimtTile) {
    __syncthreads();
    load_rows(keys, pitch, key_rows, tile, kSimtTile, shape.keys, width);
    load_rows(values, pitch, value_rows, tile, kSimtTile, shape.keys, width);
    __syncthreads();
    for (int r = 0; r < kSimtRowsAWarp; ++r) {
      const int row = warp * kSimtRowsAWarp + r;
      const int64_t at = int64_t(blockIdx.y) * shape.queries + first + row;
      float* weight = weights + row * kSimtTile;
      float change = 0.0f;
      if (mask.sees(first + row, tile + lane)) {
        const float score = dot(queries + row * width, keys + lane * pitch, width) * shape.scale;
        const float toward = dot(grads + row * width, values + lane * pitch, width);
        change = expf(score - log_sum_exp[at]) * (toward - row_dot[at]) * shape.scale;
      }
      weight[lane] = change;
      __syncwarp();
      add_weighted(sums + row * width, weight, keys, pitch, width);
      __syncwarp();
    }
  }
  __syncthreads();
  store_rows(head_rows(grad_query, shape.batch, shape.query_heads, width, sample, head), sums, width, first,
             shape.queries, width);
}

// d value = sum p * grad, d key = scale sum d score * query, over the queries of every head that shares the key's.
// grid: (key tiles, batch * key heads)
template <class T>
__global__ void __launch_bounds__(kSimtThreads)
    attention_grad_key_value_simt(AttentionShape shape, const T* grad, const T* query, const T* key, const T* value,
                                  const int32_t* query_segments, const int32_t* key_segments,
                                  const float* log_sum_exp, const float* row_dot, T* grad_key, T* grad_value) {
  TITAN_SHARED(float, shared);
  const int width = shape.width, pitch = width + 1;
  float* keys = shared;                              // [rows, width]
  float* values = keys + kSimtRows * width;          // [rows, width]
  float* key_sums = values + kSimtRows * width;      // [rows, width]
  float* value_sums = key_sums + kSimtRows * width;  // [rows, width]
  float* queries = value_sums + kSimtRows * width;   // [tile, pitch]
  float* grads = queries + kSimtTile * pitch;        // [tile, pitch]
  float* shares = grads + kSimtTile * pitch;         // [rows, tile]
  float* changes = shares + kSimtRows * kSimtTile;   // [rows, tile]
  const int sample = blockIdx.y / shape.key_heads, key_head = blockIdx.y % shape.key_heads;
  const int group = shape.query_heads / shape.key_heads;
  const int first = blockIdx.x * kSimtRows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const AttentionMask mask = attention_mask(shape, sample, query_segments, key_segments);

  load_rows(keys, width, head_rows(key, shape.batch, shape.key_heads, width, sample, key_head), first, kSimtRows,
            shape.keys, width);
  load_rows(values, width, head_rows(value, shape.batch, shape.key_heads, width, sample, key_head), first, kSimtRows,
            shape.keys, width);
  for (int i = threadIdx.x; i < kSimtRows * width; i += kSimtThreads) key_sums[i] = value_sums[i] = 0.0f;
  for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
    const auto query_rows = head_rows(query, shape.batch, shape.query_heads, width, sample, head);
    const auto grad_rows = head_rows(grad, shape.batch, shape.query_heads, width, sample, head);
    const int64_t row_start = (int64_t(sample) * shape.query_heads + head) * shape.queries;
    for (int tile = mask.first_query(first) / kSimtTile * kSimtTile; tile < shape.queries; tile += kSimtTile) {
      __syncthreads();
      load_rows(queries, pitch, query_rows, tile, kSimtTile, shape.queries, width);
      load_rows(grads, pitch, grad_rows, tile, kSimtTile, shape.queries, width);
      __syncthreads();
      for (int r = 0; r < kSimtRowsAWarp; ++r) {
        const int row = warp * kSimtRowsAWarp + r;
        float share = 0.0f, change = 0.0f;
        if (mask.sees(tile + lane, first + row)) {
          const int64_t at = row_start + tile + lane;
          const float score = dot(queries + lane * pitch, keys + row * width, width) * shape.scale;
          share = expf(score - log_sum_exp[at]);
          change = share * (dot(grads + lane * pitch, values + row * width, width) - row_dot[at]) * shape.scale;
        }
        shares[row * kSimtTile + lane] = share;
        changes[row * kSimtTile + lane] = change;
        __syncwarp();
        add_weighted(value_sums + row * width, shares + row * kSimtTile, grads, pitch, width);
        add_weighted(key_sums + row * width, changes + row * kSimtTile, queries, pitch, width);
        __syncwarp();
      }
    }
  }
  __syncthreads();
  store_rows(head_rows(grad_key, shape.batch, shape.key_heads, width, sample, key_head), key_sums, width, first,
             shape.keys, width);
  store_rows(head_rows(grad_value, shape.batch, shape.key_heads, width, sample, key_head), value_sums, width, first,
             shape.keys, width);
}

}  // namespace titan
