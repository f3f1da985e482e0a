// CUDA on a CPU: included before csrc/cuda/library.cu by g++, one fiber a CUDA thread.
//
// Barriers and warp-wide instructions are real rendezvous; threads run in one of three orders between them. What
// hardware would punish, or silently corrupt, is punished here:
//   a barrier or warp instruction that not all threads reach       the launch fails and says who waits where
//   shared memory read before it is written                        it is NaN at the start of every block
//   an asynchronous copy used before it is waited for              it moves no byte until then, and its target is NaN
//   addresses that are not aligned or not in shared memory         abort, and the sanitizers where they are compiled in
// Not modelled: time, caches, the order of memory between threads that no barrier separates.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../csrc/core.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(begin, size)
#endif

#if !defined(__x86_64__)
#error "the fibers switch stacks in x86-64 assembly"
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#define SSO_DEVICE inline

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { kSuccess, kBadLaunch, kDeadlock };
inline const char* cudaGetErrorString(cudaError_t error) {
  const char* texts[] = {"success", "invalid configuration of a launch", "threads wait for each other for ever"};
  return texts[error];
}

namespace emulator {

constexpr size_t kStack = 96 * 1024;
constexpr unsigned kWarp = 32;

enum class State { ready, at_block, at_warp, done };

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::ready;
  const char* where = "";
  dim3 index;
  unsigned parity = 0;             // which slot its warp exchanges values in; no lane can be two exchanges ahead
  alignas(16) uint32_t slots[2][8];
  std::vector<Copy> copies;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> stacks;
  size_t stack_count = 0;
  void* scheduler = nullptr;
  unsigned current = 0;
  dim3 block, grid, threads;
  std::unique_ptr<char[]> shared;
  size_t shared_bytes = 0;
  std::function<void()> body;
  int order = 0;  // forward, backward, random
  std::mt19937 random{12345};
};

inline Machine machine;
inline Fiber& self() { return machine.fibers[machine.current]; }
inline unsigned lane() { return machine.current % kWarp; }
inline Fiber& lane(unsigned l) { return machine.fibers[machine.current / kWarp * kWarp + l]; }

[[noreturn]] inline void fault(const char* what) {
  std::fprintf(stderr, "emulator: block (%u, %u), thread %u: %s\n", machine.block.x, machine.block.y, machine.current,
               what);
  std::abort();
}

// Saves what a call must preserve, changes stacks, restores it.
__attribute__((naked, noinline)) inline void change_stack(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline void yield() { change_stack(&self().stack_pointer, machine.scheduler); }

inline void wait(State state, const char* where) {
  self().state = state;
  self().where = where;
  yield();
}

inline void run_fiber() {
  machine.body();
  if (!self().copies.empty()) fault("ends with copies that it has not waited for");
  self().state = State::done;
  yield();
}

inline void start_fibers(unsigned count) {
  if (machine.stack_count < count) {
    machine.stacks.reset(new char[count * kStack]);
    machine.stack_count = count;
  }
  ASAN_UNPOISON_MEMORY_REGION(machine.stacks.get(), count * kStack);  // the last call on a stack never returns
  machine.fibers.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.state = State::ready;
    fiber.index = dim3(i % machine.threads.x, i / machine.threads.x);
    auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(machine.stacks.get() + (i + 1) * kStack) & ~15ul);
    *--top = nullptr;  // as if run_fiber had been called: the stack is 8 beyond a multiple of 16
    *--top = reinterpret_cast<void*>(&run_fiber);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
  }
}

// The threads of [begin, end), if all of them wait at the same place.
inline bool release(unsigned begin, unsigned end, State state) {
  const auto first = machine.fibers.begin() + begin, last = machine.fibers.begin() + end;
  const char* where = first->where;
  const auto waits = [=](const Fiber& f) { return f.state == state && !std::strcmp(f.where, where); };
  if (!std::all_of(first, last, waits)) return false;
  for (auto fiber = first; fiber != last; ++fiber) fiber->state = State::ready;
  return true;
}

inline bool run_block() {
  const auto count = static_cast<unsigned>(machine.fibers.size());
  std::vector<unsigned> turns(count);
  std::iota(turns.begin(), turns.end(), 0u);
  if (machine.order == 1) std::reverse(turns.begin(), turns.end());
  for (;;) {
    if (machine.order == 2) std::shuffle(turns.begin(), turns.end(), machine.random);
    for (unsigned i : turns) {
      if (machine.fibers[i].state != State::ready) continue;
      machine.current = i;
      change_stack(&machine.scheduler, machine.fibers[i].stack_pointer);
    }
    const auto done = [](const Fiber& f) { return f.state == State::done; };
    if (std::all_of(machine.fibers.begin(), machine.fibers.end(), done)) return true;
    bool released = release(0, count, State::at_block);
    for (unsigned warp = 0; warp < count; warp += kWarp) {
      released |= release(warp, std::min(count, warp + kWarp), State::at_warp);
    }
    if (released) continue;
    std::fprintf(stderr, "emulator: no thread of block (%u, %u) can go on:", machine.block.x, machine.block.y);
    for (unsigned i = 0; i < count; ++i) {
      const Fiber& f = machine.fibers[i];
      const char* where = f.state == State::done ? "the end" : f.where;
      const Fiber* before = i ? &machine.fibers[i - 1] : nullptr;
      const char* last = !before ? "" : before->state == State::done ? "the end" : before->where;
      if (std::strcmp(where, last)) std::fprintf(stderr, " from thread %u at %s", i, where);
    }
    std::fprintf(stderr, "\n");
    return false;
  }
}

// Deposits the words of this lane and waits for those of its warp.
template <size_t count>
unsigned exchange(const uint32_t (&words)[count], const char* where) {
  static_assert(count <= 8);
  const unsigned slot = self().parity ^= 1;
  std::memcpy(self().slots[slot], words, sizeof(words));
  wait(State::at_warp, where);
  return slot;
}

inline void check_shared(const void* at) {
  const auto* byte = static_cast<const char*>(at);
  if (reinterpret_cast<uintptr_t>(at) % 16) fault("an address that is not a multiple of 16");
  if (byte < machine.shared.get() || byte + 16 > machine.shared.get() + machine.shared_bytes) {
    fault("an address beyond shared memory");
  }
}

template <char axis, dim3 Machine::* which>
struct Coordinate {
  operator unsigned() const { return axis == 'x' ? (machine.*which).x : (machine.*which).y; }
};
struct ThreadCoordinate {
  operator unsigned() const { return self().index.x; }
};

inline float element(uint32_t word, sso::Bfloat16, unsigned half) {
  return sso::widen(sso::Bfloat16{static_cast<uint16_t>(word >> 16 * half)});
}
inline float element(uint32_t word, sso::Float16, unsigned half) {
  return sso::widen(sso::Float16{static_cast<uint16_t>(word >> 16 * half)});
}
inline float element(uint32_t word, float, unsigned) { return sso::bits<float>(word & 0xFFFFE000u); }  // tf32

}  // namespace emulator

inline struct {
  emulator::ThreadCoordinate x;
} threadIdx;
inline struct {
  emulator::Coordinate<'x', &emulator::Machine::block> x;
  emulator::Coordinate<'y', &emulator::Machine::block> y;
} blockIdx;
inline struct {
  emulator::Coordinate<'x', &emulator::Machine::grid> x;
} gridDim;

using std::max;
using std::min;

inline void __syncthreads() { emulator::wait(emulator::State::at_block, "__syncthreads"); }

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int other) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  if (mask != 0xFFFFFFFFu) emulator::fault("a shuffle of part of a warp");
  const unsigned slot = emulator::exchange({sso::bits<uint32_t>(x)}, "__shfl_xor_sync");
  return sso::bits<T>(emulator::lane(emulator::lane() ^ other).slots[slot][0]);
}

template <class T>
T atomicAdd(T* at, T x) {
  return std::exchange(*at, *at + x);
}
template <class T>
T atomicMax(T* at, T x) {
  return std::exchange(*at, std::max(*at, x));
}

namespace sso {

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::machine.shared.get());
}

inline void copy16(void* to, const void* from) {
  emulator::check_shared(to);
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fault("a source that is not a multiple of 16");
  std::memset(to, 0xFF, 16);
  emulator::self().copies.push_back({to, from});
}
inline void copies_wait() {
  for (const auto& copy : emulator::self().copies) std::memcpy(copy.to, copy.from, 16);
  emulator::self().copies.clear();
}

template <bool transposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  emulator::check_shared(row);
  const auto address = bits<uint64_t>(row);
  const unsigned slot =
      emulator::exchange({static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)}, "load_matrices");
  const unsigned l = emulator::lane();
  for (unsigned i = 0; i < 4; ++i) {
    const auto at = [=](unsigned r, unsigned column) -> uint32_t {
      const uint32_t* words = emulator::lane(8 * i + r).slots[slot];
      return bits<const uint16_t*>(words[0] | static_cast<uint64_t>(words[1]) << 32)[column];
    };
    const unsigned r = l / 4, c = l % 4 * 2;
    to[i] = transposed ? at(c, r) | at(c + 1, r) << 16 : at(r, c) | at(r, c + 1) << 16;
  }
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned slot = emulator::exchange({a[0], a[1], a[2], a[3], b[0], b[1]}, "mma");
  constexpr unsigned in_word = 4 / sizeof(T), depth = 8 * in_word;
  const unsigned group = emulator::lane() / 4, pair = emulator::lane() % 4;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = group + e / 2 * 8, column = 2 * pair + e % 2;
    for (unsigned k = 0; k < depth; ++k) {
      const unsigned half = k % in_word, within = k / in_word % 4, upper = k / in_word / 4;
      const uint32_t x = emulator::lane(row % 8 * 4 + within).slots[slot][row / 8 + 2 * upper];
      const uint32_t y = emulator::lane(column * 4 + within).slots[slot][4 + upper];
      c[e] += emulator::element(x, T(), half) * emulator::element(y, T(), half);
    }
  }
}

template <class... P>
int launch(void (*kernel)(P...), dim3 grid, int threads, int shared, void*, std::type_identity_t<P>... given) {
  auto& machine = emulator::machine;
  if (threads < 1 || threads > 1024 || threads % 32 || grid.x < 1 || grid.y < 1 || grid.y > 65535) return kBadLaunch;
  machine.grid = grid;
  machine.threads = dim3(threads);
  machine.body = [&] { kernel(given...); };
  machine.shared_bytes = shared;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      machine.block = dim3(x, y);
      machine.shared.reset(new char[shared]);
      std::memset(machine.shared.get(), 0xFF, shared);
      emulator::start_fibers(threads);
      if (!emulator::run_block()) return kDeadlock;
    }
  }
  return kSuccess;
}

template <class... P>
int usable(void (*)(P...)) {
  return kSuccess;
}

}  // namespace sso

extern "C" __attribute__((visibility("default"))) void emulator_order(int order) { emulator::machine.order = order; }
