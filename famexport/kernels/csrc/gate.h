// GatedAct: act(gate) * up, of rows that hold the gate's values and then up's.
#pragma once
#include "device.h"

enum Activation { SILU, GELU_TANH, GELU, RELU, ACTIVATIONS };

ANYWHERE float activated(int act, float x) {
  switch (act) {
    case SILU:
      return x / (1.f + expf(-x));
    case GELU_TANH:
      return 0.5f * x * (1.f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    case GELU:
      return 0.5f * x * (1.f + erff(x * 0.7071067812f));
    default:
      return x > 0.f ? x : 0.f;
  }
}

inline int activation(const ort::Attributes& attributes) {
  const int64_t act = attributes.integer("act");
  ort::need(act >= 0 && act < ACTIVATIONS, "act is none of 0 (silu), 1 (gelu_tanh), 2 (gelu), 3 (relu)");
  return int(act);
}

template <class T>
struct GateAll {
  const T* from;
  T* to;
  int64_t inner;  // a multiple of a pack
  int act;

  ANYWHERE void operator()(int64_t unit) const {
    constexpr int V = Pack<T>::SIZE;
    const int64_t row = unit / (inner / V), d = unit % (inner / V) * V;
    const Pack<T> gate = loaded(from + row * 2 * inner + d), up = loaded(from + (row * 2 + 1) * inner + d);
    Pack<T> y;
    UNROLL
    for (int k = 0; k < V; ++k) y.item[k] = narrowed<T>(activated(act, widened(gate.item[k])) * widened(up.item[k]));
    stored(to + row * inner + d, y);
  }
};

struct GatedAct {
  static constexpr const char *name = "GatedAct", *inputs = "T", *outputs = "T";
  explicit GatedAct(const ort::Attributes& a) : act(activation(a)) {}

  template <class T, class Device>
  void run(ort::Context& context, const Device& device) const {
    const auto from = context.input<T>(0);
    ort::need(from.shape.size() == 3 && from.shape[2] % (2 * Pack<T>::SIZE) == 0,
              "GatedAct: gate_up is not [b, n, 2I] with I a multiple of 8");
    const int64_t inner = from.shape[2] / 2;
    const auto to = context.output<T>(0, {from.shape[0], from.shape[1], inner});
    device.each(to.shape.count() / Pack<T>::SIZE, GateAll<T>{from.data, to.data, inner, act});
  }

  int act;
};
