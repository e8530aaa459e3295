// Runs CUDA kernels on the CPU, to test their logic where there is no GPU.
//
// Each CUDA thread is a fiber (a stack of its own in one host thread); the blocks of a grid run one after another. A fiber
// runs until it waits: at a warp collective for the lanes of its mask, at __syncthreads for its block. What a GPU would
// leave undefined is an error here: a barrier that not all threads reach, a collective that lanes of its mask never
// reach, a shuffle from outside the mask, shared memory used before it is written (it is filled with NaN) or beyond its
// end. What the shim cannot see: data races that the order of fibers hides (tests run both orders), the memory model,
// bank conflicts, and anything between blocks.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

namespace cushim {

constexpr size_t kStack = 64 << 10, kGuard = 256, kLargestShared = 227 << 10;
constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr unsigned char kPoison = 0xFF, kGuardByte = 0xA5;  // four bytes of 0xFF are a float NaN and the integer -1

enum class State { kReady, kBarrier, kCollective, kDone };

// What one lane tells the others in a collective; large enough for the fragments of a matrix instruction.
struct Post {
  alignas(8) unsigned char bytes[64];
};

// An asynchronous copy. It happens when it is waited for, so that reading before finds poison; or, in reverse order, at
// once, so that what others still read is overwritten. A GPU may do either.
struct Copy {
  unsigned char* to;
  const unsigned char* from;  // nullptr fills with zeros
  size_t bytes;
};

struct Fiber {
  State state;
  bool started;
  dim3 thread;
  unsigned mask;          // lanes that take part in the collective it waits for
  const char* operation;  // its name
  Post post;              // what it says in it
  Post heard;             // what it said in the last one that was complete: others read this copy
  jmp_buf where;
  ucontext_t entry;
  std::vector<Copy> open_group;            // asynchronous copies since the last commit
  std::vector<std::vector<Copy>> pending;  // groups that were committed and not yet waited for
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> stacks, shared;
  size_t shared_bytes = 0;
  unsigned current = 0;
  dim3 index, dimensions, grid;
  std::function<void()> kernel;
  jmp_buf scheduler;
  std::string failure;
};

inline Block block;
inline bool reverse_order = false;  // run the fibers from last to first, and copy at once instead of when waited for

inline Fiber& self() { return block.fibers[block.current]; }
inline unsigned lane() { return block.current % kWarp; }

// Back to the scheduler; returns when it resumes this fiber.
inline void __attribute__((noinline)) leave(State state) {
  self().state = state;
  if (!_setjmp(self().where)) _longjmp(block.scheduler, 1);
}

// Ends the launch with an error. Fibers that are left on their stacks hold nothing that needs destroying.
[[noreturn]] inline void fail(const std::string& what) {
  block.failure = what;
  _longjmp(block.scheduler, 1);
}

inline void entry() {
  block.kernel();
  leave(State::kDone);
}

inline void __attribute__((noinline)) resume(unsigned index) {
  block.current = index;
  Fiber& fiber = self();
  if (_setjmp(block.scheduler)) return;
  if (fiber.started) _longjmp(fiber.where, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

inline void start_fibers(unsigned threads) {
  block.fibers.resize(threads);
  if (block.stacks.size() < threads * kStack) block.stacks.resize(threads * kStack);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.pending.clear();
    fiber.open_group.clear();
    const dim3 d = block.dimensions;
    fiber.thread = dim3(i % d.x, i / d.x % d.y, i / (d.x * d.y));
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = block.stacks.data() + i * kStack;
    fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, entry, 0);
  }
}

// Lets the lanes of a warp go on whose collective is complete. Returns whether any was.
inline bool release_collectives(unsigned first, unsigned end) {
  bool released = false;
  for (unsigned i = first; i < end; ++i) {
    const Fiber& asking = block.fibers[i];
    if (asking.state != State::kCollective) continue;
    bool complete = true;
    for (unsigned j = 0; j < kWarp && complete; ++j) {
      if (!(asking.mask >> j & 1) || first + j >= end) continue;
      const Fiber& other = block.fibers[first + j];
      complete = other.state == State::kCollective;
      if (complete && (other.mask != asking.mask || std::strcmp(other.operation, asking.operation) != 0)) {
        block.failure = std::string("lanes of a warp meet in ") + asking.operation + " and " + other.operation +
                        " with masks that differ or different operations";
        return false;
      }
    }
    if (!complete) continue;
    const unsigned mask = asking.mask;
    for (unsigned j = 0; first + j < end && j < kWarp; ++j) {
      if (!(mask >> j & 1)) continue;
      Fiber& fiber = block.fibers[first + j];
      fiber.heard = fiber.post;
      fiber.state = State::kReady;
    }
    released = true;
  }
  return released;
}

// Runs one warp as far as it comes without the others.
inline void run_warp(unsigned first, unsigned end) {
  do {
    for (unsigned step = first; step < end && block.failure.empty(); ++step) {
      const unsigned i = reverse_order ? first + end - 1 - step : step;
      if (block.fibers[i].state == State::kReady) resume(i);
    }
  } while (block.failure.empty() && release_collectives(first, end));
}

// Lets everyone go on whom a barrier held, if all are there. Returns whether the block is finished.
inline bool release_barrier() {
  const unsigned threads = block.fibers.size();
  unsigned done = 0, at_barrier = 0;
  for (const Fiber& fiber : block.fibers) {
    done += fiber.state == State::kDone;
    at_barrier += fiber.state == State::kBarrier;
  }
  if (done == threads) return true;
  if (at_barrier == threads) {
    for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
    return false;
  }
  block.failure = at_barrier + done == threads ? "__syncthreads() is not reached by all threads of the block"
                                               : "a warp collective is not reached by every lane of its mask";
  return true;
}

// Warp by warp, each as far as it comes: a missing barrier then shows as a warp that is far ahead of another.
inline void run_block() {
  const unsigned threads = block.dimensions.x * block.dimensions.y * block.dimensions.z;
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  start_fibers(threads);
  do {
    for (unsigned step = 0; step < warps && block.failure.empty(); ++step) {
      const unsigned first = (reverse_order ? warps - 1 - step : step) * kWarp;
      run_warp(first, std::min(first + kWarp, threads));
    }
  } while (block.failure.empty() && !release_barrier());
}

inline unsigned char* shared_memory() {
  const auto start = reinterpret_cast<std::uintptr_t>(block.shared.data()) + kGuard;
  return reinterpret_cast<unsigned char*>((start + 127) / 128 * 128);
}

inline bool in_shared(const void* at, size_t bytes) {
  const auto* start = static_cast<const unsigned char*>(at);
  return start >= shared_memory() && start + bytes <= shared_memory() + block.shared_bytes;
}

inline void poison_shared(size_t bytes) {
  block.shared_bytes = bytes;
  block.shared.assign(bytes + 2 * kGuard + 128, kGuardByte);
  std::memset(shared_memory(), kPoison, bytes);
}

inline bool guards_hold() {
  const unsigned char* end = shared_memory() + block.shared_bytes;
  return std::all_of(end, end + kGuard, [](unsigned char byte) { return byte == kGuardByte; });
}

// Runs kernel() once a thread. Throws std::runtime_error for what a GPU would leave undefined.
inline void launch(dim3 grid, dim3 dimensions, size_t shared_bytes, std::function<void()> kernel) {
  block.failure.clear();
  block.grid = grid;
  block.dimensions = dimensions;
  block.kernel = std::move(kernel);
  if (dimensions.x * dimensions.y * dimensions.z > kMostThreads) block.failure = "more than 1024 threads a block";
  if (shared_bytes > kLargestShared) block.failure = "more than 227 KiB of shared memory a block";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) block.failure = "an empty grid";
  if (grid.y > 65535 || grid.z > 65535) block.failure = "more than 65535 blocks in y or z";
  for (unsigned z = 0; z < grid.z && block.failure.empty(); ++z) {
    for (unsigned y = 0; y < grid.y && block.failure.empty(); ++y) {
      for (unsigned x = 0; x < grid.x && block.failure.empty(); ++x) {
        block.index = dim3(x, y, z);
        poison_shared(shared_bytes);
        run_block();
        if (block.failure.empty() && !guards_hold()) block.failure = "a write beyond the end of shared memory";
      }
    }
  }
  if (!block.failure.empty()) throw std::runtime_error("cuda shim: " + block.failure);
}

// Meets the other lanes of the mask; afterwards `heard` of each has what it posted.
template <class T>
void meet(unsigned mask, const char* operation, const T& said) {
  static_assert(sizeof(T) <= sizeof(Post));
  Fiber& fiber = self();
  if (!(mask >> lane() & 1)) fail(std::string(operation) + " is called by a lane that its mask leaves out");
  std::memcpy(fiber.post.bytes, &said, sizeof(T));
  fiber.mask = mask;
  fiber.operation = operation;
  leave(State::kCollective);
}

template <class T>
T heard_from(unsigned source) {
  T value;
  std::memcpy(&value, block.fibers[block.current - lane() + source].heard.bytes, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, const char* operation, T value, unsigned source) {
  meet(mask, operation, value);
  const unsigned threads = block.fibers.size(), first = block.current - lane();
  if (!(mask >> source & 1) || first + source >= threads) fail(std::string(operation) + " reads a lane outside its mask");
  return heard_from<T>(source);
}

}  // namespace cushim

#define threadIdx (cushim::self().thread)
#define blockIdx (cushim::block.index)
#define blockDim (cushim::block.dimensions)
#define gridDim (cushim::block.grid)
#define warpSize 32

inline void __syncthreads() { cushim::leave(cushim::State::kBarrier); }
inline void __syncwarp(unsigned mask = ~0u) { cushim::meet(mask, "__syncwarp", 0); }

// The device clamps nothing: a source beyond the warp's width is the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cushim::shuffle(mask, "__shfl_sync", value, unsigned(source) % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cushim::shuffle(mask, "__shfl_xor_sync", value, cushim::lane() ^ unsigned(bits));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned source = cushim::lane() + delta;
  return cushim::shuffle(mask, "__shfl_down_sync", value, source < 32 ? source : cushim::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return cushim::shuffle(mask, "__shfl_up_sync", value,
                         cushim::lane() >= delta ? cushim::lane() - delta : cushim::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  cushim::meet(mask, "__ballot_sync", predicate);
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (mask >> i & 1) votes |= unsigned(cushim::heard_from<int>(i) != 0) << i;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t wide = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}
inline __nv_bfloat16 __float2bfloat16(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {0x7fc0};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;
