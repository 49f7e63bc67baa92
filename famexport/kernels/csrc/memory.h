// BlockMemory: from a block's projections and the slots of memory, all that attention takes, in one pass over it.
#pragma once
#include "device.h"

constexpr int MAX_SEGMENTS = 32;

// Rotates pairs (i, i + Dh/2) of one pack each, by one row of the tables.
template <class T>
ANYWHERE void rotated(Pack<T>& a, Pack<T>& b, const float* cos, const float* sin) {
  UNROLL
  for (int k = 0; k < Pack<T>::SIZE; ++k) {
    const float x = widened(a.item[k]), y = widened(b.item[k]);
    a.item[k] = narrowed<T>(x * cos[k] - y * sin[k]);
    b.item[k] = narrowed<T>(y * cos[k] + x * sin[k]);
  }
}

// What a row of attention's inputs is made of.
struct Heads {
  int query, kv, half;  // heads, heads, Dh/2
  ANYWHERE int width() const { return query * 2 * half; }
  ANYWHERE int kv_width() const { return kv * 2 * half; }
  ANYWHERE int packed_width() const { return width() + 2 * kv_width(); }
  ANYWHERE int group() const { return query / kv; }
};

template <class T>
struct Slots {
  const T* key[MAX_SEGMENTS];
  const T* value[MAX_SEGMENTS];
  int count;
};

// The variadic inputs from `first` on: M slots of keys, then M of values, all [b, R, Hkv*Dh].
template <class T>
Slots<T> slots(const ort::Context& context, size_t first, const ort::Shape& shape) {
  const size_t count = context.inputs() - first;
  ort::need(count % 2 == 0 && count / 2 <= MAX_SEGMENTS, "slots are not M keys and M values with M <= 32");
  Slots<T> found{};
  found.count = int(count / 2);
  for (size_t i = 0; i < count; ++i) {
    auto& kind = i < count / 2 ? found.key : found.value;
    kind[i % (count / 2)] = context.input<T>(first + i).sized(shape, "a slot").data;
  }
  return found;
}

template <class T>
struct Assembly {
  const T* qkv;
  const float *query_cos, *query_sin, *key_cos, *key_sin;
  Slots<T> slots;
  T *own_key, *own_value, *query, *keys, *values;
  T *fam_query, *fam_keys, *fam_values;  // null: FAM's rows are in query, its keys in keys
  Heads heads;
  int rows, fam;

  ANYWHERE int slot_columns() const { return fam_query ? rows - fam : rows; }  // of a slot in keys
  ANYWHERE int columns() const { return slots.count * slot_columns() + rows; }
  // A unit is two packs of one head's row: R rows as queries, then all columns as keys and values.
  ANYWHERE int64_t units() const {
    return int64_t(slots.count + 2) * rows * heads.query * (heads.half / Pack<T>::SIZE);
  }
  // Of n rows, each of a width: where one begins.
  ANYWHERE static int64_t line(int b, int n, int row, int width) { return (int64_t(b) * n + row) * width; }

  ANYWHERE void operator()(int64_t unit) const {
    const unsigned packs = heads.half / Pack<T>::SIZE, rest = unsigned(unit) / packs, lines = (slots.count + 2) * rows;
    const int at = unsigned(unit) % packs * Pack<T>::SIZE, head = rest % heads.query;
    const int b = rest / heads.query / lines, row = rest / heads.query % lines;
    if (row < rows) {
      turn_query(b, row, head, at);
    } else {
      place_column(b, (row - rows) / rows, (row - rows) % rows, head, at);
    }
  }

  ANYWHERE void turn_query(int b, int row, int head, int at) const {
    const int inside = head * 2 * heads.half + at;
    const T* from = qkv + line(b, rows, row, heads.packed_width()) + inside;
    Pack<T> x = loaded(from), y = loaded(from + heads.half);
    rotated(x, y, query_cos + row * heads.half + at, query_sin + row * heads.half + at);
    T* to;
    if (!fam_query) {
      to = query + line(b, rows, row, heads.width());
    } else if (row < fam) {
      to = fam_query + line(b, fam, row, heads.width());
    } else {
      to = query + line(b, rows - fam, row - fam, heads.width());
    }
    stored(to + inside, x);
    stored(to + inside + heads.half, y);
  }

  ANYWHERE void place_column(int b, int slot, int row, int head, int at) const {
    const bool own = slot == slots.count, apart = fam_query != nullptr;
    if (apart && !own && row < fam) return;
    const int from = head / heads.group() * 2 * heads.half + at, to = head * 2 * heads.half + at;
    const T *key, *value;
    if (own) {
      key = qkv + line(b, rows, row, heads.packed_width()) + heads.width() + from;
      value = key + heads.kv_width();
    } else {
      key = slots.key[slot] + line(b, rows, row, heads.kv_width()) + from;
      value = slots.value[slot] + line(b, rows, row, heads.kv_width()) + from;
    }
    Pack<T> k1 = loaded(key), k2 = loaded(key + heads.half);
    const Pack<T> v1 = loaded(value), v2 = loaded(value + heads.half);
    if (own && head % heads.group() == 0) {
      const int64_t place = line(b, rows, row, heads.kv_width()) + from;
      stored(own_key + place, k1), stored(own_key + place + heads.half, k2);
      stored(own_value + place, v1), stored(own_value + place + heads.half, v2);
    }
    const int column = slot * rows + row;  // the tables have all rows of slots
    rotated(k1, k2, key_cos + column * heads.half + at, key_sin + column * heads.half + at);
    const int seen = slot * slot_columns() + (apart && !own ? row - fam : row);
    const int64_t among = line(b, columns(), seen, heads.width()) + to;
    stored(keys + among, k1), stored(keys + among + heads.half, k2);
    stored(values + among, v1), stored(values + among + heads.half, v2);
    if (apart && own) {
      const int64_t beside = line(b, rows, row, heads.width()) + to;
      stored(fam_keys + beside, k1), stored(fam_keys + beside + heads.half, k2);
      stored(fam_values + beside, v1), stored(fam_values + beside + heads.half, v2);
    }
  }
};

// The heads of packed projections [b, n, (H+2Hkv)*Dh], which must be of that width, and fit packs.
template <class T>
Heads packed_heads(const ort::Shape& qkv, int64_t query, int64_t kv) {
  ort::need(qkv.size() == 3 && query > 0 && kv > 0 && query % kv == 0, "qkv is not [b, n, (H+2Hkv)*Dh]");
  const int64_t width = qkv[2] / (query + 2 * kv);
  ort::need(width * (query + 2 * kv) == qkv[2] && width % (2 * Pack<T>::SIZE) == 0,
            "qkv has no width of (H+2Hkv)*Dh with Dh a multiple of 16");
  return {int(query), int(kv), int(width / 2)};
}

template <bool Apart>
struct Memory {
  static constexpr const char* name = Apart ? "BlockMemorySplit" : "BlockMemory";
  static constexpr const char* inputs = "TffffT*";
  static constexpr const char* outputs = Apart ? "TTTTTTTT" : "TTTTT";
  explicit Memory(const ort::Attributes& a)
      : query_heads(a.integer("heads")), kv_heads(a.integer("kv_heads")), fam(a.integer("fam")) {}

  template <class T, class Device>
  void run(ort::Context& context, const Device& device) const {
    const auto qkv = context.input<T>(0);
    Assembly<T> a{};
    a.heads = packed_heads<T>(qkv.shape, query_heads, kv_heads);
    const int64_t b = qkv.shape[0], rows = qkv.shape[1];
    ort::need(fam >= (Apart ? 1 : 0) && fam < rows, "BlockMemory: fam does not fit the rows");
    a.qkv = qkv.data, a.rows = int(rows), a.fam = int(fam);
    const ort::Shape slot{b, rows, a.heads.kv_width()};
    a.slots = slots<T>(context, 5, slot);
    const ort::Shape query_table{rows, a.heads.half}, key_table{(a.slots.count + 1) * rows, a.heads.half};
    a.query_cos = context.input<float>(1).sized(query_table, "query_cos").data;
    a.query_sin = context.input<float>(2).sized(query_table, "query_sin").data;
    a.key_cos = context.input<float>(3).sized(key_table, "key_cos").data;
    a.key_sin = context.input<float>(4).sized(key_table, "key_sin").data;
    const auto out = [&](size_t index, int64_t lines) {
      return context.output<T>(index, {b, lines, a.heads.width()}).data;
    };
    a.own_key = context.output<T>(0, slot).data, a.own_value = context.output<T>(1, slot).data;
    if constexpr (Apart) {
      a.query = out(2, rows - fam), a.fam_query = out(3, fam);
      a.keys = out(4, a.columns()), a.values = out(5, a.columns());
      a.fam_keys = out(6, rows), a.fam_values = out(7, rows);
    } else {
      a.query = out(2, rows), a.keys = out(3, a.columns()), a.values = out(4, a.columns());
    }
    ort::need(b * a.units() <= INT32_MAX, "BlockMemory: the batch is too large");
    device.each(b * a.units(), a);
  }

  int64_t query_heads, kv_heads, fam;
};
