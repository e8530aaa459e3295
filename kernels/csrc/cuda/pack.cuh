// 16-byte memory accesses: eight bfloat16 or four float at once, with a fall back to single elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/portable.cuh"

namespace titan {

// COUNT elements that are loaded and stored as one access when their address is a multiple of their size.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T)) Pack {
  T value[COUNT];
};

template <int COUNT, class T>
__device__ __forceinline__ Pack<T, COUNT> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, COUNT>*>(from);
}

template <int COUNT, class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, COUNT>& pack) {
  *reinterpret_cast<Pack<T, COUNT>*>(to) = pack;
}

template <class T>
constexpr int kPack = 16 / sizeof(T);

// Whether rows of this width at these addresses can be read 16 bytes at a time.
template <class T, class... Pointers>
bool packs(int64_t width, const Pointers*... pointers) {
  return width % kPack<T> == 0 && ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace titan
