// What kernels share: where they run, number types, vectors of 16 bytes, sums over a warp.
#pragma once
#include <algorithm>
#include <cmath>

#include "ort.h"

#ifdef __CUDACC__
#define ANYWHERE __host__ __device__ __forceinline__
#else
#define ANYWHERE inline
#endif
#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

struct Cpu {
  static constexpr const char* provider = "CPUExecutionProvider";
  explicit Cpu(const ort::Context&) {}
  static void check() {}

  // Calls f(unit) for each unit < count.
  template <class F>
  void each(int64_t count, const F& f) const {
    for (int64_t unit = 0; unit < count; ++unit) f(unit);
  }
};

ANYWHERE float widened(float x) { return x; }
template <class T>
ANYWHERE T narrowed(float x);
template <>
ANYWHERE float narrowed<float>(float x) {
  return x;
}

template <class T>
struct alignas(16) Pack {
  static constexpr int SIZE = 16 / sizeof(T);
  T item[SIZE];
};

#ifdef __CUDACC__
ANYWHERE float widened(__half x) { return __half2float(x); }
ANYWHERE float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
template <>
ANYWHERE __half narrowed<__half>(float x) {
  return __float2half(x);
}
template <>
ANYWHERE __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

inline void fine(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// From compute capability 9.0 on, a kernel may start while the one before it still runs (programmatic dependent launch).
// Each kernel here says at once that the next may, and all its threads wait before they write anything, or read what a
// node of the same graph gives: what they wait for has waited itself, so all that came earlier is done as well. Inputs of
// the graph may be read before: a graph begins when what came before it has ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__global__ void nothing() {}

template <class F>
__global__ void each_unit(int64_t count, F f) {
  let_next_start();
  wait_for_previous();
  const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit < count) f(unit);
}

struct Cuda {
  static constexpr const char* provider = "CUDAExecutionProvider";
  cudaStream_t stream;
  explicit Cuda(const ort::Context& context) : stream(static_cast<cudaStream_t>(context.stream())) {}

  // Throws where this library was compiled for other GPUs, or for another driver.
  static void check() {
    cudaFuncAttributes found;
    fine(cudaFuncGetAttributes(&found, nothing));
  }

  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Parameters... parameters) const {
    cudaFuncAttributes found;
    fine(cudaFuncGetAttributes(&found, kernel));
    int driver = 0;
    fine(cudaDriverGetVersion(&driver));
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(unsigned(threads)), config.dynamicSmemBytes = shared;
    config.stream = stream, config.attrs = &early;
    // A kernel compiled for less has no wait in it; drivers before 12.3 cannot capture such launches.
    config.numAttrs = found.ptxVersion >= 90 && driver >= 12030 ? 1 : 0;
    fine(cudaLaunchKernelEx(&config, kernel, parameters...));
  }

  template <class F>
  void each(int64_t count, const F& f) const {
    constexpr int THREADS = 256;
    if (count == 0) return;
    launch(each_unit<F>, dim3(unsigned((count + THREADS - 1) / THREADS)), THREADS, 0, count, f);
  }
};

constexpr int WARP = 32;

__device__ __forceinline__ float plus(float a, float b) { return a + b; }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

template <float combined(float, float)>
__device__ __forceinline__ float warp_reduced(float x) {
  UNROLL
  for (int apart = WARP / 2; apart; apart /= 2) x = combined(x, __shfl_xor_sync(~0u, x, apart));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) { return warp_reduced<plus>(x); }

// Over a block of up to 1024 threads; every thread has the result. `shared` has room for 32.
template <float combined(float, float)>
__device__ __forceinline__ float block_reduced(float x, float nothing, float* shared) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = (blockDim.x + WARP - 1) / WARP;
  x = warp_reduced<combined>(x);
  __syncthreads();  // of an earlier one
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  return warp_reduced<combined>(lane < warps ? shared[lane] : nothing);
}
__device__ __forceinline__ float block_sum(float x, float* shared) { return block_reduced<plus>(x, 0.f, shared); }
__device__ __forceinline__ float block_max(float x, float* shared) {
  return block_reduced<larger>(x, -INFINITY, shared);
}

// Weights are read once: they shall not push out of the cache what is read again.
template <class T>
__device__ __forceinline__ Pack<T> streamed(const T* from) {
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
  return *reinterpret_cast<const Pack<T>*>(&raw);
}
#endif

template <class T>
ANYWHERE Pack<T> loaded(const T* from) {
  return *reinterpret_cast<const Pack<T>*>(from);
}
template <class T>
ANYWHERE void stored(T* to, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(to) = pack;
}
