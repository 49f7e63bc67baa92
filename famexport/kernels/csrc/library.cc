// The operators of famexport's domain: on the CPU for float32, on CUDA, where nvcc compiles this, for all types.
#include "attention.h"
#include "thin.h"

namespace {

template <class Op, class T, class Device>
void add(void* domain) {
  static const ort::Registered<Op, T, Device> op;
  ort::call(ort::DOMAIN_ADD, domain, static_cast<const ort::CustomOp*>(&op));
}

template <class T, class Device>
void add_all(void* domain) {
  add<SkipNorm, T, Device>(domain);
  add<GatedAct, T, Device>(domain);
  add<Memory<false>, T, Device>(domain);
  add<Memory<true>, T, Device>(domain);
  add<TokenAttention, T, Device>(domain);
  add<ThinProduct<false>, T, Device>(domain);
  add<ThinProduct<true>, T, Device>(domain);
  add<NormedProduct<false>, T, Device>(domain);
  add<NormedProduct<true>, T, Device>(domain);
}

// The domain that all sessions share.
void* make_domain(const void* const* api) {
  ort::api = api;
  void* domain = nullptr;
  ort::call(ort::CREATE_DOMAIN, static_cast<const char*>("famexport"), &domain);
  add_all<float, Cpu>(domain);
#ifdef __CUDACC__
  add_all<float, Cuda>(domain);
  add_all<__half, Cuda>(domain);
  add_all<__nv_bfloat16, Cuda>(domain);
#endif
  return domain;
}

}  // namespace

// What ONNX Runtime calls once for the options of each session.
extern "C" __attribute__((visibility("default"))) ort::Status RegisterCustomOps(void* options,
                                                                               const ort::ApiBase* base) {
  const void* const* api = base->get_api(ort::VERSION);
  if (api == nullptr) return nullptr;  // too old: it will say that it does not know the operators
  return ort::guarded([&] {
    static void* const domain = make_domain(api);
    ort::call(ort::ADD_DOMAIN, options, domain);
  });
}
