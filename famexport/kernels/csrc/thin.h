// Products of few rows, whose time is that of reading the weights: ThinMatMul, and ThinGated with the gate applied. Both
// also with the residual sum and its RMSNorm before (SkipNorm without FAM), which every block computes for itself.
#pragma once
#include "gate.h"
#include "norm.h"

constexpr int THIN_ROWS = 8;
constexpr int64_t NORMED_BYTES = 44 * 1024;  // of all rows, at the most: a block has 48 KB, and needs some itself

template <class T>
struct Thin {
  const T *x, *weight, *bias;  // [rows, width], [out, width] (gated: [2 out, width]), [out] or null
  T* y;                        // [rows, out]
  int64_t rows, width, out;
  int act;           // below 0: no gate
  NormRows<T> norm;  // NORMED: gives x

  ANYWHERE void store(int64_t row, int64_t n, float sum, float up) const {
    if (act >= 0) sum = activated(act, sum) * up;
    y[row * out + n] = narrowed<T>(sum + (bias ? widened(bias[n]) : 0.f));
  }
};

template <bool NORMED, class T>
void thin(const Cpu& cpu, Thin<T> p) {
  std::vector<T> x;
  if (NORMED) {
    x.resize(p.rows * p.width);
    p.x = p.norm.normed = x.data();
    norm_rows(cpu, p.norm, p.rows);
  }
  const auto dot = [&](const T* x, int64_t n) {
    double sum = 0;
    for (int64_t k = 0; k < p.width; ++k) sum += double(widened(x[k])) * widened(p.weight[n * p.width + k]);
    return float(sum);
  };
  cpu.each(p.rows * p.out, [&](int64_t unit) {
    const int64_t row = unit / p.out, n = unit % p.out;
    const T* x = p.x + row * p.width;
    p.store(row, n, dot(x, n), p.act >= 0 ? dot(x, p.out + n) : 0.f);
  });
}

#ifdef __CUDACC__
constexpr int THIN_WARPS = 8;

template <class T>
__device__ __forceinline__ void multiplied(float& sum, const Pack<T>& w, const Pack<T>& x) {
  UNROLL
  for (int k = 0; k < Pack<T>::SIZE; ++k) sum += widened(w.item[k]) * widened(x.item[k]);
}

// One row by a whole block, RMSNorm without FAM; `x` is shared memory. The first block writes the sum.
template <class T>
__device__ __forceinline__ void norm_one(const NormRows<T>& n, int row, T* x) {
  __shared__ float sums[WARP];
  constexpr int V = 4;
  const auto value = [&](int d) {
    float4 v = *reinterpret_cast<const float4*>(n.base + row * n.width + d);
    if (n.delta) {
      v.x += n.added(row, d), v.y += n.added(row, d + 1), v.z += n.added(row, d + 2), v.w += n.added(row, d + 3);
    }
    return v;
  };
  float squares = 0;
  for (int d = threadIdx.x * V; d < n.width; d += blockDim.x * V) {
    const float4 v = value(d);
    squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  const float scale = rsqrtf(block_sum(squares, sums) / n.width + n.epsilon);
  for (int d = threadIdx.x * V; d < n.width; d += blockDim.x * V) {
    const float4 v = value(d);
    if (blockIdx.x == 0) *reinterpret_cast<float4*>(n.sum + row * n.width + d) = v;
    x[d] = n.scaled(v.x * scale, d), x[d + 1] = n.scaled(v.y * scale, d + 1);
    x[d + 2] = n.scaled(v.z * scale, d + 2), x[d + 3] = n.scaled(v.w * scale, d + 3);
  }
}

// SHARE warps a row of the weights, with GATED of gate's and of up's: each has a part of its width. A lane asks for AHEAD
// packs of weights before it needs the first, and for the first of them before the kernel before this one has ended.
template <class T, int ROWS, bool GATED, int SHARE, bool NORMED>
__global__ void thin_row(Thin<T> p) {
  extern __shared__ __align__(16) unsigned char room[];  // NORMED: x
  constexpr int V = Pack<T>::SIZE, STEP = V * WARP, STREAMS = GATED ? 2 : 1, AHEAD = 8 / STREAMS;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, part = warp % SHARE;
  const int64_t n = int64_t(blockIdx.x) * (THIN_WARPS / SHARE) + warp / SHARE;
  const int each = (int(p.width) + SHARE * STEP - 1) / (SHARE * STEP) * STEP;
  const int first = part * each + lane * V, end = min(int(p.width), (part + 1) * each);
  const T* weight[STREAMS];
  UNROLL
  for (int s = 0; s < STREAMS; ++s) weight[s] = p.weight + (min(n, p.out - 1) + s * p.out) * p.width;
  Pack<T> w[STREAMS][AHEAD];
  const auto ask = [&](int at) {
    UNROLL
    for (int i = 0; i < AHEAD; ++i) {
      UNROLL
      for (int s = 0; s < STREAMS; ++s) {
        w[s][i] = at + i * STEP < end ? streamed(weight[s] + at + i * STEP) : Pack<T>{};
      }
    }
  };
  float sum[STREAMS][ROWS] = {};
  let_next_start();
  ask(first);
  wait_for_previous();
  const T* x_rows = p.x;
  if (NORMED) {
    T* x = reinterpret_cast<T*>(room);
    for (int r = 0; r < p.rows; ++r) norm_one(p.norm, r, x + r * p.width);
    __syncthreads();
    x_rows = x;
  }
  for (int at = first; at < end; at += AHEAD * STEP) {
    if (at != first) ask(at);
    UNROLL
    for (int i = 0; i < AHEAD; ++i) {
      if (at + i * STEP >= end) continue;
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const Pack<T> x = loaded(x_rows + min(int64_t(r), p.rows - 1) * p.width + at + i * STEP);
        UNROLL
        for (int s = 0; s < STREAMS; ++s) multiplied(sum[s][r], w[s][i], x);
      }
    }
  }
  __shared__ float parts[THIN_WARPS][STREAMS][ROWS];
  UNROLL
  for (int s = 0; s < STREAMS; ++s) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      sum[s][r] = warp_sum(sum[s][r]);
      if (SHARE > 1 && lane == 0) parts[warp][s][r] = sum[s][r];
    }
  }
  if (SHARE > 1) __syncthreads();
  if (part > 0 || lane > 0 || n >= p.out) return;
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    if (r >= p.rows) break;
    for (int other = 1; other < SHARE; ++other) {
      for (int s = 0; s < STREAMS; ++s) sum[s][r] += parts[warp + other][s][r];
    }
    p.store(r, n, sum[0][r], sum[STREAMS - 1][r]);
  }
}

template <bool NORMED, class T, int ROWS, bool GATED>
void thin_share(const Cuda& cuda, const Thin<T>& p) {
  // Enough warps to have all of the memory's bandwidth asked for, as long as each still has two packs for a lane.
  constexpr int64_t WARPS = 4096, LEAST = 2 * WARP * Pack<T>::SIZE;
  int share = 1;
  while (share < 4 && p.out * share < WARPS && p.width >= 2 * share * LEAST) share *= 2;
  const auto kernel = share == 1   ? thin_row<T, ROWS, GATED, 1, NORMED>
                      : share == 2 ? thin_row<T, ROWS, GATED, 2, NORMED>
                                   : thin_row<T, ROWS, GATED, 4, NORMED>;
  const int64_t rows = THIN_WARPS / share;  // of a block
  const size_t shared = NORMED ? p.rows * p.width * sizeof(T) : 0;
  cuda.launch(kernel, dim3(unsigned((p.out + rows - 1) / rows)), THIN_WARPS * WARP, shared, p);
}

template <bool NORMED, class T, int ROWS>
void thin_rows(const Cuda& cuda, const Thin<T>& p) {
  ort::need(p.width < INT32_MAX / 2, "ThinMatMul: the width is too large");
  return p.act >= 0 ? thin_share<NORMED, T, ROWS, true>(cuda, p) : thin_share<NORMED, T, ROWS, false>(cuda, p);
}

template <bool NORMED, class T>
void thin(const Cuda& cuda, const Thin<T>& p) {
  if (p.rows == 1) return thin_rows<NORMED, T, 1>(cuda, p);
  if (p.rows <= 4) return thin_rows<NORMED, T, 4>(cuda, p);
  return thin_rows<NORMED, T, THIN_ROWS>(cuda, p);
}
#endif

template <class T>
struct ThinSizes {
  ThinSizes(const ort::Shape& x, const ort::Tensor<const T>& weight, const ort::Tensor<const T>& bias, bool gated) {
    ort::need(x.size() == 3 && weight.shape.size() == 2, "ThinMatMul takes x [b, c, K] and weight [N, K]");
    rows = x[0] * x[1], width = x[2], out = weight.shape[0] / (gated ? 2 : 1);
    weight.sized({gated ? 2 * out : out, width}, "weight of ThinMatMul");
    if (bias) bias.sized({out}, "bias of ThinMatMul");
    ort::need(rows >= 1 && rows <= THIN_ROWS && width % Pack<T>::SIZE == 0,
              "ThinMatMul takes 1 to 8 rows of a multiple of 8 values");
  }
  int64_t rows, width, out;
};

template <bool Gated>
struct ThinProduct {
  static constexpr const char *name = Gated ? "ThinGated" : "ThinMatMul", *inputs = Gated ? "TT" : "TTT?";
  static constexpr const char* outputs = "T";
  explicit ThinProduct(const ort::Attributes& a) : act(Gated ? activation(a) : -1) {}

  template <class T, class Device>
  void run(ort::Context& context, const Device& device) const {
    const auto x = context.input<T>(0), weight = context.input<T>(1), bias = context.input<T>(2);
    const ThinSizes<T> n(x.shape, weight, bias, Gated);
    const auto y = context.output<T>(0, {x.shape[0], x.shape[1], n.out});
    thin<false>(device, Thin<T>{x.data, weight.data, bias.data, y.data, n.rows, n.width, n.out, act, {}});
  }

  int act;
};

template <bool Gated>
struct NormedProduct {
  static constexpr const char* name = Gated ? "NormThinGated" : "NormThinMatMul";
  static constexpr const char *inputs = Gated ? "fTTT?" : "fTTT?T?", *outputs = "fT";
  explicit NormedProduct(const ort::Attributes& a) : act(Gated ? activation(a) : -1), epsilon(a.real("epsilon")) {}

  template <class T, class Device>
  void run(ort::Context& context, const Device& device) const {
    const auto base = context.input<float>(0);
    const auto scale = context.input<T>(1), weight = context.input<T>(2), delta = context.input<T>(3);
    const auto bias = context.input<T>(4);
    const ThinSizes<T> n(base.shape, weight, bias, Gated);
    scale.sized({n.width}, "norm of NormThinMatMul");
    if (delta) delta.sized(base.shape, "delta of NormThinMatMul");
    ort::need(n.rows * n.width * int64_t(sizeof(T)) <= NORMED_BYTES, "NormThinMatMul takes rows of 44 KB in all");
    const auto sum = context.output<float>(0, base.shape);
    const auto y = context.output<T>(1, {base.shape[0], base.shape[1], n.out});
    NormRows<T> norm{};
    norm.base = base.data, norm.delta = delta.data, norm.weight = scale.data, norm.sum = sum.data;
    norm.rows = n.rows, norm.width = n.width, norm.epsilon = epsilon;
    thin<true>(device, Thin<T>{nullptr, weight.data, bias.data, y.data, n.rows, n.width, n.out, act, norm});
  }

  int act;
  float epsilon;
};
