// TokenAttention: what few tokens see of memory and of the open block, read where it lies; and the open slot with them.
#pragma once
#include <algorithm>

#include "memory.h"

template <class T>
struct Tokens {
  const T* qkv;  // [b, chunk, (H+2Hkv)*Dh]
  const int64_t *opened, *length;
  const float *token_cos, *token_sin, *key_cos, *key_sin;
  const T *open_key, *open_value;
  Slots<T> slots;
  T *heads_out, *key, *value;
  float* partial;  // [b*chunk, H, splits, Dh + 2]: weighted values, the largest score, the sum of weights
  Heads heads;
  int batch, chunk, rows, fam, splits, each;

  ANYWHERE int block() const { return rows - fam; }
  ANYWHERE int place(int b, int i) const {  // only padding reaches the limit
    const int64_t p = opened[b] + i;
    return p < 0 ? 0 : p < block() ? int(p) : block() - 1;
  }
  // What a token sees: the tokens of all slots, FAM, and the block's tokens to its own.
  ANYWHERE int seen(int place) const { return slots.count * block() + fam + place + 1; }

  // Of one of these columns: the row of the tables, and where its key and value are in the slots for a kv head.
  ANYWHERE int find(int b, int column, int kv_head, const T*& k, const T*& v) const {
    const bool past = column < slots.count * block();
    const int slot = past ? column / block() : slots.count;
    const int row = past ? fam + column % block() : column - slots.count * block();
    const int64_t at = line(b, row) + kv_head * 2 * heads.half;
    k = (past ? slots.key[slot] : open_key) + at, v = (past ? slots.value[slot] : open_value) + at;
    return slot * rows + row;
  }
  // And whether it is one of the chunk's, which the slots do not have yet.
  ANYWHERE bool find_new(int b, int column, int kv_head, const T*& k, const T*& v) const {
    const int row = column - slots.count * block(), i = row < 0 ? -1 : new_row(b, row);
    if (i >= 0) k = fresh(b, i) + kv_head * 2 * heads.half, v = k + heads.kv_width();
    return i >= 0;
  }

  ANYWHERE int64_t line(int b, int row) const { return (int64_t(b) * rows + row) * heads.kv_width(); }  // of a slot
  ANYWHERE const T* fresh(int b, int i) const {  // the keys of a row of the chunk, before its values
    return qkv + (int64_t(b) * chunk + i) * heads.packed_width() + heads.width();
  }

  // Which row of the chunk stands at a row of the open slot, or -1.
  ANYWHERE int new_row(int b, int row) const {
    const int64_t i = row - fam - opened[b];
    return row >= fam && i >= 0 && i < length[b] && i < chunk ? int(i) : -1;
  }

  // One pack of the open slot.
  ANYWHERE void copy(int unit) const {
    const int packs = heads.kv_width() / Pack<T>::SIZE, at = unit % packs * Pack<T>::SIZE;
    const int b = unit / packs / rows, row = unit / packs % rows, i = new_row(b, row);
    const T *k = open_key + line(b, row), *v = open_value + line(b, row);
    if (i >= 0) k = fresh(b, i), v = k + heads.kv_width();
    stored(key + line(b, row) + at, loaded(k + at));
    stored(value + line(b, row) + at, loaded(v + at));
  }
  ANYWHERE int copies() const { return batch * rows * (heads.kv_width() / Pack<T>::SIZE); }
};

template <class T>
void attend(const Cpu& cpu, const Tokens<T>& t) {
  cpu.each(t.copies(), [&](int64_t unit) { t.copy(int(unit)); });
  const int half = t.heads.half, width = 2 * half;
  std::vector<float> q(width), sum(width);
  for (int64_t line = 0; line < t.batch * t.chunk * t.heads.query; ++line) {
    const int head = int(line % t.heads.query), token = int(line / t.heads.query), b = token / t.chunk;
    const int place = t.place(b, token % t.chunk), seen = t.seen(place);
    const T* from = t.qkv + int64_t(token) * t.heads.packed_width() + head * width;
    const float *cos = t.token_cos + place * half, *sin = t.token_sin + place * half;
    for (int d = 0; d < half; ++d) {
      const float x = widened(from[d]), y = widened(from[d + half]), scale = 1 / std::sqrt(float(width));
      q[d] = (x * cos[d] - y * sin[d]) * scale, q[d + half] = (y * cos[d] + x * sin[d]) * scale;
    }
    float largest = -INFINITY, total = 0;
    std::fill(sum.begin(), sum.end(), 0.f);
    for (int column = 0; column < seen; ++column) {
      const T *k, *v;
      const int row = t.find(b, column, head / t.heads.group(), k, v);
      t.find_new(b, column, head / t.heads.group(), k, v);
      const float *key_cos = t.key_cos + row * half, *key_sin = t.key_sin + row * half;
      float score = 0;
      for (int d = 0; d < half; ++d) {
        const float x = widened(k[d]), y = widened(k[d + half]);
        score += q[d] * (x * key_cos[d] - y * key_sin[d]) + q[d + half] * (y * key_cos[d] + x * key_sin[d]);
      }
      const float now = std::max(largest, score), kept = std::exp(largest - now), weight = std::exp(score - now);
      largest = now, total = total * kept + weight;
      for (int d = 0; d < width; ++d) sum[d] = sum[d] * kept + weight * widened(v[d]);
    }
    for (int d = 0; d < width; ++d) t.heads_out[line * width + d] = narrowed<T>(sum[d] / total);
  }
}

#ifdef __CUDACC__
constexpr int ATTENTION_WARPS = 4, AT_ONCE = 4;

// What a lane holds of some columns: P values of each half of key and value, and of the tables.
template <class T, int P>
struct Columns {
  T k1[AT_ONCE][P], k2[AT_ONCE][P], v1[AT_ONCE][P], v2[AT_ONCE][P];
  float cos[AT_ONCE][P], sin[AT_ONCE][P];

  __device__ __forceinline__ void take(int j, const T* key, const T* value, int at, int half) {
    UNROLL
    for (int k = 0; k < P; ++k) {
      k1[j][k] = key[at + k], k2[j][k] = key[half + at + k];
      v1[j][k] = value[at + k], v2[j][k] = value[half + at + k];
    }
  }
  // From the slots; lanes beyond the head read its first values, which nothing uses.
  __device__ __forceinline__ void load(const Tokens<T>& t, int b, int group, int column, int end, int at) {
    UNROLL
    for (int j = 0; j < AT_ONCE; ++j) {
      const T *key, *value;
      const int row = t.find(b, max(min(column + j, end - 1), 0), group, key, value);
      take(j, key, value, at, t.heads.half);
      UNROLL
      for (int k = 0; k < P; ++k) {
        cos[j][k] = t.key_cos[row * t.heads.half + at + k], sin[j][k] = t.key_sin[row * t.heads.half + at + k];
      }
    }
  }
};

// Block (x, head, token): x < splits attends to its part of the columns, the others copy the open slot. A lane holds P
// values of each half of a head: its first is lane * P. Slots are older than this step: what a warp needs first of them is
// asked for before the kernel before this one has ended.
template <class T, int P>
__global__ void attend_part(Tokens<T> t) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = blockIdx.y;
  const int token = blockIdx.z, half = t.heads.half, b = token / t.chunk, group = head / t.heads.group();
  let_next_start();
  if (blockIdx.x >= t.splits) {
    const int each = gridDim.x - t.splits, blocks = each * gridDim.y * gridDim.z;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * each + blockIdx.x - t.splits;
    const int thread = block * blockDim.x + threadIdx.x, threads = blocks * blockDim.x;
    wait_for_previous();
    for (int unit = thread; unit < t.copies(); unit += threads) t.copy(unit);
    return;
  }
  const bool holds = lane * P < half;
  const int at = holds ? lane * P : 0, place = t.place(b, token % t.chunk);
  const int first = blockIdx.x * t.each, end = min(first + t.each, t.seen(place));
  constexpr int STEP = ATTENTION_WARPS * AT_ONCE;
  Columns<T, P> c;
  int column = first + warp * AT_ONCE;
  c.load(t, b, group, column, end, at);
  wait_for_previous();
  float q1[P], q2[P], sum1[P] = {}, sum2[P] = {};
  const T* from = t.qkv + int64_t(token) * t.heads.packed_width() + head * 2 * half + at;
  UNROLL
  for (int k = 0; k < P; ++k) {
    const float x = widened(from[k]), y = widened(from[half + k]), scale = holds ? rsqrtf(2.f * half) : 0.f;
    const float cos = t.token_cos[place * half + at + k], sin = t.token_sin[place * half + at + k];
    q1[k] = (x * cos - y * sin) * scale, q2[k] = (y * cos + x * sin) * scale;
  }
  float largest = -INFINITY, total = 0;
  while (column < end) {
    float score[AT_ONCE], now = largest;
    UNROLL
    for (int j = 0; j < AT_ONCE; ++j) {
      const T *key, *value;
      if (t.find_new(b, min(column + j, end - 1), group, key, value)) c.take(j, key, value, at, half);
      score[j] = 0;
      UNROLL
      for (int k = 0; k < P; ++k) {
        const float x = widened(c.k1[j][k]), y = widened(c.k2[j][k]);
        score[j] += q1[k] * (x * c.cos[j][k] - y * c.sin[j][k]) + q2[k] * (y * c.cos[j][k] + x * c.sin[j][k]);
      }
      score[j] = warp_sum(holds ? score[j] : 0.f);
      if (column + j >= end) score[j] = -INFINITY;  // the same for the whole warp
      now = fmaxf(now, score[j]);
    }
    const float kept = __expf(largest - now);
    largest = now, total *= kept;
    UNROLL
    for (int k = 0; k < P; ++k) sum1[k] *= kept, sum2[k] *= kept;
    UNROLL
    for (int j = 0; j < AT_ONCE; ++j) {
      const float weight = __expf(score[j] - now);
      total += weight;
      UNROLL
      for (int k = 0; k < P; ++k) sum1[k] += weight * widened(c.v1[j][k]), sum2[k] += weight * widened(c.v2[j][k]);
    }
    column += STEP;
    if (column < end) c.load(t, b, group, column, end, at);
  }
  // The warps' parts become the block's.
  __shared__ float sums[ATTENTION_WARPS][2 * P * WARP], tops[ATTENTION_WARPS], totals[ATTENTION_WARPS];
  if (lane == 0) tops[warp] = largest, totals[warp] = total;
  UNROLL
  for (int k = 0; k < P; ++k) {
    if (holds) sums[warp][at + k] = sum1[k], sums[warp][half + at + k] = sum2[k];
  }
  __syncthreads();
  float top = tops[0], whole = 0;
  for (int w = 1; w < ATTENTION_WARPS; ++w) top = fmaxf(top, tops[w]);
  float share[ATTENTION_WARPS];
  for (int w = 0; w < ATTENTION_WARPS; ++w) {
    share[w] = tops[w] == -INFINITY ? 0.f : __expf(tops[w] - top);
    whole += totals[w] * share[w];
  }
  float* part = t.partial + ((int64_t(token) * t.heads.query + head) * t.splits + blockIdx.x) * (2 * half + 2);
  for (int d = threadIdx.x; d < 2 * half; d += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < ATTENTION_WARPS; ++w) sum += share[w] == 0.f ? 0.f : sums[w][d] * share[w];
    part[d] = sum;
  }
  if (threadIdx.x == 0) part[2 * half] = top, part[2 * half + 1] = whole;
}

constexpr int JOIN_THREADS = 512;

// Block (head, token). Threads of a group each have one value; the groups share the splits between them.
template <class T>
__global__ void join_parts(Tokens<T> t) {
  extern __shared__ float share[];  // [splits]
  __shared__ float sums[JOIN_THREADS], reduced[WARP];
  let_next_start();
  wait_for_previous();
  const int line = blockIdx.y * t.heads.query + blockIdx.x, width = 2 * t.heads.half, groups = JOIN_THREADS / width;
  const float* part = t.partial + int64_t(line) * t.splits * (width + 2);
  float top = -INFINITY, whole = 0;
  for (int s = threadIdx.x; s < t.splits; s += JOIN_THREADS) top = fmaxf(top, part[s * (width + 2) + width]);
  top = block_max(top, reduced);
  for (int s = threadIdx.x; s < t.splits; s += JOIN_THREADS) {
    share[s] = __expf(part[s * (width + 2) + width] - top);
    whole += share[s] * part[s * (width + 2) + width + 1];
  }
  whole = block_sum(whole, reduced);  // and share is written
  const int d = threadIdx.x % width, group = threadIdx.x / width;
  float sum = 0;
  if (group < groups) {
    _Pragma("unroll 8") for (int s = group; s < t.splits; s += groups) sum += share[s] * part[s * (width + 2) + d];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group > 0) return;
  for (int g = 1; g < groups; ++g) sum += sums[g * width + d];
  t.heads_out[int64_t(line) * width + d] = narrowed<T>(sum / whole);
}

template <class T>
void attend(const Cuda& cuda, const Tokens<T>& t) {
  const int threads = ATTENTION_WARPS * WARP;
  const int copying = std::max(1, t.copies() / (t.heads.query * t.batch * t.chunk * threads * 2));
  const dim3 grid(unsigned(t.splits + copying), unsigned(t.heads.query), unsigned(t.batch * t.chunk));
  ort::need(t.heads.half <= 128, "TokenAttention is made for heads of up to 256 values");
  const auto kernel = t.heads.half <= 32 ? attend_part<T, 1> : t.heads.half <= 64 ? attend_part<T, 2> : attend_part<T, 4>;
  cuda.launch(kernel, grid, threads, 0, t);
  const dim3 joined(unsigned(t.heads.query), unsigned(t.batch * t.chunk));
  cuda.launch(join_parts<T>, joined, JOIN_THREADS, t.splits * sizeof(float), t);
}
#endif

struct TokenAttention {
  static constexpr const char *name = "TokenAttention", *inputs = "TiiffffTTT*", *outputs = "TTTf";
  explicit TokenAttention(const ort::Attributes& a)
      : query_heads(a.integer("heads")), kv_heads(a.integer("kv_heads")), fam(a.integer("fam")) {}

  template <class T, class Device>
  void run(ort::Context& context, const Device& device) const {
    const auto qkv = context.input<T>(0), open_key = context.input<T>(7);
    Tokens<T> t{};
    t.heads = packed_heads<T>(qkv.shape, query_heads, kv_heads);
    ort::need(open_key.shape.size() == 3 && open_key.shape[1] > fam && fam >= 0, "TokenAttention: no open slot");
    t.qkv = qkv.data, t.fam = int(fam);
    t.batch = int(qkv.shape[0]), t.chunk = int(qkv.shape[1]), t.rows = int(open_key.shape[1]);
    const ort::Shape slot{t.batch, t.rows, t.heads.kv_width()}, each_row{t.batch};
    ort::need(slot.count() <= INT32_MAX, "TokenAttention: the batch is too large");
    t.opened = context.input<int64_t>(1).sized(each_row, "opened").data;
    t.length = context.input<int64_t>(2).sized(each_row, "length").data;
    t.open_key = open_key.sized(slot, "open_key").data;
    t.open_value = context.input<T>(8).sized(slot, "open_value").data;
    t.slots = slots<T>(context, 9, slot);
    const ort::Shape token_table{t.block(), t.heads.half}, key_table{(t.slots.count + 1) * t.rows, t.heads.half};
    t.token_cos = context.input<float>(3).sized(token_table, "token_cos").data;
    t.token_sin = context.input<float>(4).sized(token_table, "token_sin").data;
    t.key_cos = context.input<float>(5).sized(key_table, "key_cos").data;
    t.key_sin = context.input<float>(6).sized(key_table, "key_sin").data;
    const int columns = t.seen(t.block() - 1);
    t.each = columns > 1024 ? 64 : 16;
    t.splits = (columns + t.each - 1) / t.each;
    ort::need(t.splits <= 8192, "TokenAttention is made for less columns");
    t.heads_out = context.output<T>(0, {t.batch, t.chunk, t.heads.width()}).data;
    t.key = context.output<T>(1, slot).data, t.value = context.output<T>(2, slot).data;
    t.partial = context.output<float>(3, {t.batch * t.chunk, query_heads, t.splits, 2 * t.heads.half + 2}).data;
    attend(device, t);
  }

  int64_t query_heads, kv_heads, fam;
};
