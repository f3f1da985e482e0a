// What kernels need of the machine beyond C++: launches, shared memory, asynchronous copies and the warp's matrix
// instructions, as PTX. tests/emulator/cuda.h has the twins of all that is here, and of CUDA's own names, for g++.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core.h"

#if defined(__CUDACC__)

#define SSO_DEVICE __device__ __forceinline__

namespace sso {

// Of the block, poisoned or old: nothing is zero at the start.
template <class T>
SSO_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

SSO_DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// 16 bytes from global to shared memory, both aligned to 16; there after copies_wait and __syncthreads.
SSO_DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
SSO_DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8×8 matrices of 16 bits. Lane 8i + j names the row j of the matrix i; lane l gets, of each, the elements
// (l / 4, 2 (l % 4)) and the one to its right, of the transpose where that is asked for.
template <bool transposed>
SSO_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// C (16, 8) += A (16, 16) B (16, 8), or a depth of 8 for float, of which tf32 is read. In the lane l = 4g + t:
//   c  (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
//   a  16 bits, two a register: (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8);  tf32: (g, t) (g+8, t) (g, t+4) (g+8, t+4)
//   b  16 bits, two a register: (2t, g) (2t+8, g);                        tf32: (t, g) (t+4, g)
#define SSO_MMA(shape, type)                                                                       \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                             \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
SSO_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Bfloat16>) SSO_MMA("m16n8k16", "bf16");
  if constexpr (std::is_same_v<T, Float16>) SSO_MMA("m16n8k16", "f16");
  if constexpr (std::is_same_v<T, float>) SSO_MMA("m16n8k8", "tf32");
}
#undef SSO_MMA

// Returns CUDA's error code. Nothing is waited for.
template <class... P>
int launch(void (*kernel)(P...), dim3 grid, int threads, int shared, void* stream, std::type_identity_t<P>... given) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > 48 * 1024) {
    const auto error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {static_cast<void*>(&given)...};
  return cudaLaunchKernel(function, grid, dim3(threads), arguments, shared, static_cast<cudaStream_t>(stream));
}

// CUDA's error code if the driver is too old or there is no code for the current device.
template <class... P>
int usable(void (*kernel)(P...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

}  // namespace sso
#endif
