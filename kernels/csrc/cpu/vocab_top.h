// The largest numbers of a row: maxima of its tiles say where they can be.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "cpu/vector.h"

namespace titan::cpu {
namespace {

constexpr int64_t kTile = 64;  // columns whose maximum is remembered, to find the top k without looking twice at most

// Maxima of tiles of kTile columns; returns the largest.
template <class T>
TITAN_INLINE float tile_maxima(const T* __restrict z, int64_t columns, float* __restrict maxima) {
  float largest = -INFINITY;
  for (int64_t tile = 0; tile * kTile < columns; ++tile) {
    const T* at = z + tile * kTile;
    const int64_t count = columns - tile * kTile < kTile ? columns - tile * kTile : kTile;
    float m = -INFINITY;
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < count; ++i) {
      const float v = load(at[i]);
      m = v > m ? v : m;
    }
    maxima[tile] = m;
    largest = m > largest ? m : largest;
  }
  return largest;
}

using Candidate = std::pair<float, int64_t>;

bool before(const Candidate& a, const Candidate& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

// The k-th largest tile maximum bounds the k-th largest logit from below, so only tiles that reach it are looked into.
template <class T>
void top_of_row(const T* z, int64_t columns, const std::vector<float>& maxima, int64_t k, std::vector<float>& largest,
                std::vector<Candidate>& candidates, float* values, int64_t* ids, int64_t start) {
  const int64_t tiles = (columns + kTile - 1) / kTile;
  float bound = -INFINITY;
  if (tiles > k) {
    largest.assign(maxima.begin(), maxima.begin() + k);  // a heap of the k largest, the least of them in front
    std::make_heap(largest.begin(), largest.end(), std::greater<float>());
    for (int64_t tile = k; tile < tiles; ++tile) {
      if (!(maxima[tile] > largest.front())) continue;
      std::pop_heap(largest.begin(), largest.end(), std::greater<float>());
      largest.back() = maxima[tile];
      std::push_heap(largest.begin(), largest.end(), std::greater<float>());
    }
    bound = largest.front();
  }
  candidates.clear();
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (maxima[tile] < bound) continue;
    const int64_t end = std::min(columns, (tile + 1) * kTile);
    for (int64_t i = tile * kTile; i < end; ++i) {
      const float v = load(z[i]);
      if (v >= bound) candidates.emplace_back(v, start + i);
    }
  }
  const int64_t found = std::min<int64_t>(k, candidates.size());
  std::partial_sort(candidates.begin(), candidates.begin() + found, candidates.end(), before);
  for (int64_t i = 0; i < k; ++i) {
    values[i] = i < found ? candidates[i].first : -INFINITY;
    ids[i] = i < found ? candidates[i].second : 0;
  }
}

}  // namespace
}  // namespace titan::cpu
