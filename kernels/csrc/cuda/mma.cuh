// Tensor cores of sm_80 and later, a warp at a time: asynchronous copies into shared memory, matrix fragments from there
// into registers, and their product. Under the host shim the same functions follow the fragment layouts that the PTX
// manual documents ("Matrix fragments for mma.m16n8k16" and "ldmatrix"), as collectives of all 32 lanes.
//
// With g = lane / 4 and t = lane % 4, a lane holds
//   A (16 x 16): a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..]
//   B (16 x 8):  b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g]
//   C (16 x 8):  c[0], c[1] = C[g][2t, 2t+1], c[2], c[3] = C[g+8][2t, 2t+1]
// where two bfloat16 share a register, the lower index in the lower half.
#pragma once

#include "cuda/portable.cuh"

namespace titan {

constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
#else
  return __float2bfloat16(low).bits | uint32_t(__float2bfloat16(high).bits) << 16;
#endif
}

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// c += A B
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lanes 8i to 8i+7 point at the rows of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const __nv_bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const __nv_bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes into shared memory, zeros where `valid` is false; there after a commit and a wait.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#else

namespace host {

struct Fragments {
  uint32_t a[4], b[2];
};

inline float half_of(uint32_t pair, int index) {
  return __bfloat162float(__nv_bfloat16{uint16_t(index ? pair >> 16 : pair & 0xffff)});
}
inline float element_a(int row, int k) {
  const auto from = cushim::heard_from<Fragments>(row % 8 * 4 + k % 8 / 2);
  return half_of(from.a[(row >= 8) + 2 * (k >= 8)], k % 2);
}
inline float element_b(int k, int column) {
  const auto from = cushim::heard_from<Fragments>(column * 4 + k % 8 / 2);
  return half_of(from.b[k >= 8], k % 2);
}

// What lane 8 * matrix + row pointed at.
inline uint16_t matrix_element(int matrix, int row, int column) {
  return cushim::heard_from<const __nv_bfloat16*>(8 * matrix + row)[column].bits;
}

inline void load_matrices(uint32_t (&r)[4], const __nv_bfloat16* row, bool transposed) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) cushim::fail("ldmatrix of a row that is not aligned to 16 bytes");
  if (!cushim::in_shared(row, 16)) cushim::fail("ldmatrix outside shared memory");
  cushim::meet(kWholeWarp, transposed ? "ldmatrix.trans" : "ldmatrix", row);
  const int lane = int(cushim::lane()), major = lane / 4, minor = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = transposed ? matrix_element(i, minor, major) : matrix_element(i, major, minor);
    const uint32_t high = transposed ? matrix_element(i, minor + 1, major) : matrix_element(i, major, minor + 1);
    r[i] = low | high << 16;
  }
  __syncwarp();  // nobody may change the rows before all have read them
}

inline void copy(const cushim::Copy& what) {
  if (what.from) {
    std::memcpy(what.to, what.from, what.bytes);
  } else {
    std::memset(what.to, 0, what.bytes);
  }
}

}  // namespace host

inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cushim::meet(kWholeWarp, "mma.sync", host::Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = int(cushim::lane()) / 4, t = int(cushim::lane()) % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) c[i] += host::element_a(row, k) * host::element_b(k, column);
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const __nv_bfloat16* row) { host::load_matrices(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const __nv_bfloat16* row) { host::load_matrices(r, row, true); }

inline void cp_async_16(void* to, const void* from, bool valid) {
  if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0 || (valid && reinterpret_cast<std::uintptr_t>(from) % 16 != 0)) {
    cushim::fail("cp.async of an address that is not aligned to 16 bytes");
  }
  if (!cushim::in_shared(to, 16)) cushim::fail("cp.async outside shared memory");
  cushim::self().open_group.push_back(
      {static_cast<unsigned char*>(to), valid ? static_cast<const unsigned char*>(from) : nullptr, 16});
  if (cushim::reverse_order) host::copy(cushim::self().open_group.back());
}

inline void cp_async_commit() {
  auto& fiber = cushim::self();
  fiber.pending.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

template <int PENDING>
void cp_async_wait() {
  auto& pending = cushim::self().pending;
  while (pending.size() > PENDING) {
    if (!cushim::reverse_order) std::for_each(pending.front().begin(), pending.front().end(), host::copy);
    pending.erase(pending.begin());
  }
}

#endif

}  // namespace titan
