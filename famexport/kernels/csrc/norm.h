// SkipNorm: the residual sum and its norm. A row of FAM takes what is added to, or what is normed, from FAM's state, and
// its sum is given apart as well, where that is wanted.
#pragma once
#include "device.h"

template <class T>
struct NormRows {
  const float* base;
  const T* delta;         // null: nothing is added
  const float* fam_base;  // [b, fam, width], null: rows of FAM are as the others
  const float* fam_next;  // [b, fam, width], likewise
  const T* weight;
  const T* bias;
  float* sum;
  T* normed;
  float* fam_sum;  // [b, fam, width], or null
  int64_t rows, width, fam;
  float epsilon;
  bool centered;

  // Of row r of batch row b: where its sum begins, what is normed in its place if anything is, and where else it goes.
  ANYWHERE const float* summed(int64_t b, int64_t r) const {
    return fam_base && r < fam ? fam_base + (b * fam + r) * width : base + (b * rows + r) * width;
  }
  ANYWHERE const float* replaced(int64_t b, int64_t r) const {
    return fam_next && r < fam ? fam_next + (b * fam + r) * width : nullptr;
  }
  ANYWHERE float* kept(int64_t b, int64_t r) const {
    return fam_sum && r < fam ? fam_sum + (b * fam + r) * width : nullptr;
  }
  ANYWHERE float added(int64_t row, int64_t d) const { return delta ? widened(delta[row * width + d]) : 0.f; }
  ANYWHERE T scaled(float x, int64_t d) const {
    return narrowed<T>(x * widened(weight[d]) + (bias ? widened(bias[d]) : 0.f));
  }
};

template <class T>
void norm_rows(const Cpu&, const NormRows<T>& n, int64_t count) {
  std::vector<float> row(n.width);
  for (int64_t i = 0; i < count; ++i) {
    const float *from = n.summed(i / n.rows, i % n.rows), *instead = n.replaced(i / n.rows, i % n.rows);
    float* kept = n.kept(i / n.rows, i % n.rows);
    double total = 0, squares = 0;
    for (int64_t d = 0; d < n.width; ++d) {
      const float sum = from[d] + n.added(i, d);
      n.sum[i * n.width + d] = sum;
      if (kept) kept[d] = sum;
      row[d] = instead ? instead[d] : sum;
      total += row[d];
    }
    const double mean = n.centered ? total / n.width : 0;
    for (float x : row) squares += (x - mean) * (x - mean);
    const double scale = 1 / std::sqrt(squares / n.width + n.epsilon);
    for (int64_t d = 0; d < n.width; ++d) n.normed[i * n.width + d] = n.scaled(float((row[d] - mean) * scale), d);
  }
}

#ifdef __CUDACC__
// One block a row. V values at a time: 4 where the width allows it.
template <class T, int V>
__global__ void norm_row(NormRows<T> n) {
  extern __shared__ float row[];  // [width]
  __shared__ float sums[WARP];
  struct alignas(4 * V) Wide {
    float item[V];
  };
  struct alignas(sizeof(T) * V) Narrow {
    T item[V];
  };
  let_next_start();
  wait_for_previous();
  const int64_t i = blockIdx.x;
  const float *from = n.summed(i / n.rows, i % n.rows), *instead = n.replaced(i / n.rows, i % n.rows);
  float* kept = n.kept(i / n.rows, i % n.rows);
  float total = 0, squares = 0;
  for (int d = threadIdx.x * V; d < n.width; d += blockDim.x * V) {
    Wide x = *reinterpret_cast<const Wide*>(from + d);
    if (n.delta) {
      const Narrow delta = *reinterpret_cast<const Narrow*>(n.delta + i * n.width + d);
      UNROLL
      for (int k = 0; k < V; ++k) x.item[k] += widened(delta.item[k]);
    }
    *reinterpret_cast<Wide*>(n.sum + i * n.width + d) = x;
    if (kept) *reinterpret_cast<Wide*>(kept + d) = x;
    if (instead) x = *reinterpret_cast<const Wide*>(instead + d);
    *reinterpret_cast<Wide*>(row + d) = x;
    UNROLL
    for (int k = 0; k < V; ++k) total += x.item[k], squares += x.item[k] * x.item[k];
  }
  float mean = 0;
  if (n.centered) {
    mean = block_sum(total, sums) / n.width;
    squares = 0;
    for (int d = threadIdx.x * V; d < n.width; d += blockDim.x * V) {
      UNROLL
      for (int k = 0; k < V; ++k) squares += (row[d + k] - mean) * (row[d + k] - mean);
    }
  }
  const float scale = rsqrtf(block_sum(squares, sums) / n.width + n.epsilon);
  for (int d = threadIdx.x * V; d < n.width; d += blockDim.x * V) {  // each thread reads what it wrote
    Narrow y;
    UNROLL
    for (int k = 0; k < V; ++k) y.item[k] = n.scaled((row[d + k] - mean) * scale, d + k);
    *reinterpret_cast<Narrow*>(n.normed + i * n.width + d) = y;
  }
}

template <class T>
void norm_rows(const Cuda& cuda, const NormRows<T>& n, int64_t count) {
  const int v = n.width % 4 ? 1 : 4;
  const int64_t turns = count < 256 ? 1 : 3;  // of a thread: one where latency counts, three where many blocks wait
  const int threads = int(std::min<int64_t>(512, (n.width + v * turns * WARP - 1) / (v * turns * WARP) * WARP));
  const size_t shared = n.width * sizeof(float);
  ort::need(shared <= 47 * 1024, "SkipNorm is made for rows of up to 12032 values");
  cuda.launch(v == 4 ? norm_row<T, 4> : norm_row<T, 1>, dim3(unsigned(count)), threads, shared, n);
}
#endif

struct SkipNorm {
  static constexpr const char *name = "SkipNorm", *inputs = "fTT?f?f?T?", *outputs = "fTf?";
  explicit SkipNorm(const ort::Attributes& a)
      : fam(a.integer("fam")), epsilon(a.real("epsilon")), centered(a.integer("centered")) {}

  template <class T, class Device>
  void run(ort::Context& context, const Device& device) const {
    const auto base = context.input<float>(0), fam_base = context.input<float>(3), fam_next = context.input<float>(4);
    const auto weight = context.input<T>(1), delta = context.input<T>(2), bias = context.input<T>(5);
    ort::need(base.shape.size() == 3, "SkipNorm: base is not [b, n, D]");
    const int64_t b = base.shape[0], n = base.shape[1], d = base.shape[2];
    weight.sized({d}, "weight of SkipNorm");
    if (bias) bias.sized({d}, "bias of SkipNorm");
    if (delta) delta.sized(base.shape, "delta of SkipNorm");
    ort::need(0 <= fam && fam <= n, "SkipNorm: fam is no number of its rows");
    for (const auto* state : {&fam_base, &fam_next}) {
      if (*state) state->sized({b, fam, d}, "FAM's state of SkipNorm");
    }
    const auto sum = context.output<float>(0, base.shape);
    const auto normed = context.output<T>(1, base.shape);
    const auto fam_sum = context.wanted<float>(2, {b, fam, d});
    NormRows<T> rows{base.data, delta.data, fam_base.data, fam_next.data, weight.data, bias.data, sum.data, normed.data,
                     fam_sum.data, n, d, fam, epsilon, centered != 0};
    norm_rows(device, rows, b * n);
  }

  int64_t fam;
  float epsilon;
  int64_t centered;
};
