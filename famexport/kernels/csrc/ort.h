// What this library needs of ONNX Runtime's C interface for custom operators, declared by itself: ONNX Runtime only ever
// appends to its table of functions and to OrtCustomOp, so that places are as good as names, and no header is needed.
#pragma once
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace ort {

using Status = void*;  // null: success
constexpr uint32_t VERSION = 17;  // the first with all that is used here: onnxruntime 1.17
constexpr int INVALID_ARGUMENT = 2;
enum ElementType { FLOAT = 1, INT64 = 7, FLOAT16 = 10, BFLOAT16 = 16 };
enum Characteristic { REQUIRED, OPTIONAL, VARIADIC };

struct CustomOp {
  uint32_t version;
  void* (*create)(const CustomOp*, const void*, const void*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, void*);
  void (*destroy)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_minimum)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_minimum)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status (*create_v2)(const CustomOp*, const void*, const void*, void**);
  Status (*compute_v2)(void*, void*);
  Status (*infer_shape)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
};

// OrtApi as a table; each function by its place.
enum Place {
  CREATE_STATUS = 0,
  CREATE_DOMAIN = 26,
  DOMAIN_ADD = 27,
  ADD_DOMAIN = 28,
  TENSOR_DATA = 51,
  DIMENSIONS_COUNT = 61,
  DIMENSIONS = 62,
  TYPE_AND_SHAPE = 65,
  ATTRIBUTE_FLOAT = 85,
  ATTRIBUTE_INT64 = 86,
  INPUT_COUNT = 88,
  OUTPUT_COUNT = 89,
  INPUT = 90,
  OUTPUT = 91,
  RELEASE_TYPE_AND_SHAPE = 99,
  GPU_STREAM = 193,
};
inline const void* const* api = nullptr;
struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version)();
};

template <class Result, class... Args>
Result raw(Place place, Args... args) {
  return reinterpret_cast<Result (*)(Args...)>(const_cast<void*>(api[place]))(args...);
}

struct Failed : std::runtime_error {  // a call of ONNX Runtime's failed: its own status says more than this one would
  explicit Failed(Status status) : std::runtime_error("onnxruntime"), status(status) {}
  Status status;
};

template <class... Args>
void call(Place place, Args... args) {
  if (Status status = raw<Status>(place, args...)) throw Failed(status);
}

inline void need(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// Runs what may throw where a status is wanted.
template <class F>
Status guarded(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& error) {
    return raw<Status>(CREATE_STATUS, INVALID_ARGUMENT, error.what());
  }
}

struct Shape : std::vector<int64_t> {
  using std::vector<int64_t>::vector;
  int64_t count() const {
    int64_t n = 1;
    for (int64_t d : *this) n *= d;
    return n;
  }
  std::string text() const {
    std::string found = "[";
    for (int64_t d : *this) found += (found.size() > 1 ? ", " : "") + std::to_string(d);
    return found + "]";
  }
};

template <class T>
struct Tensor {
  T* data = nullptr;
  Shape shape;
  explicit operator bool() const { return data != nullptr; }
  // Throws unless the shape is this one.
  const Tensor& sized(const Shape& expected, const char* name) const {
    if (shape != expected) {
      throw std::invalid_argument(std::string(name) + " is " + shape.text() + ", expected " + expected.text());
    }
    return *this;
  }
};

struct Attributes {
  const void* info;
  int64_t integer(const char* name) const {
    int64_t value = 0;
    call(ATTRIBUTE_INT64, info, name, &value);
    return value;
  }
  float real(const char* name) const {
    float value = 0;
    call(ATTRIBUTE_FLOAT, info, name, &value);
    return value;
  }
};

// One call of a kernel.
class Context {
 public:
  explicit Context(void* context) : context_(context) {}

  size_t inputs() const {
    size_t count = 0;
    call(INPUT_COUNT, static_cast<const void*>(context_), &count);
    return count;
  }

  // Without data where an optional input is absent.
  template <class T>
  Tensor<const T> input(size_t index) const {
    const void* value = nullptr;
    if (index < inputs()) call(INPUT, static_cast<const void*>(context_), index, &value);
    if (value == nullptr) return {};
    return {static_cast<const T*>(data(const_cast<void*>(value))), shape(value)};
  }

  template <class T>
  Tensor<T> output(size_t index, const Shape& shape) {
    const Tensor<T> given = wanted<T>(index, shape);
    need(bool(given), "an output is not wanted that this operator always gives");
    return given;
  }

  // Without data where an optional output is not wanted.
  template <class T>
  Tensor<T> wanted(size_t index, const Shape& shape) {
    size_t count = 0;
    call(OUTPUT_COUNT, static_cast<const void*>(context_), &count);
    void* value = nullptr;
    if (index < count) call(OUTPUT, context_, index, shape.data(), shape.size(), &value);
    if (value == nullptr) return {};
    return {static_cast<T*>(data(value)), shape};
  }

  void* stream() const {
    void* stream = nullptr;
    call(GPU_STREAM, static_cast<const void*>(context_), &stream);
    return stream;
  }

 private:
  static void* data(void* value) {
    void* found = nullptr;
    call(TENSOR_DATA, value, &found);
    return found;
  }

  static Shape shape(const void* value) {
    void* info = nullptr;
    call(TYPE_AND_SHAPE, value, &info);
    size_t rank = 0;
    Status status = raw<Status>(DIMENSIONS_COUNT, static_cast<const void*>(info), &rank);
    Shape found(rank);
    if (!status) status = raw<Status>(DIMENSIONS, static_cast<const void*>(info), found.data(), rank);
    raw<void>(RELEASE_TYPE_AND_SHAPE, info);
    if (status) throw Failed(status);
    return found;
  }

  void* context_;
};

template <class T>
constexpr int element_type() {
#ifdef __CUDACC__
  if (std::is_same_v<T, __half>) return FLOAT16;
  if (std::is_same_v<T, __nv_bfloat16>) return BFLOAT16;
#endif
  return FLOAT;
}

// An operator for weights of type T on a device. `Op` names its inputs and outputs by letters: T, f (float32), i (int64);
// a '?' after a letter makes it optional, a '*' after the last input's variadic.
template <class Op, class T, class Device>
struct Registered : CustomOp {
  Registered() : CustomOp{} {
    version = VERSION;
    get_name = [](const CustomOp*) { return Op::name; };
    get_provider = [](const CustomOp*) { return Device::provider; };
    input_type = [](const CustomOp*, size_t i) { return type(Op::inputs, i); };
    input_count = [](const CustomOp*) { return letters(Op::inputs); };
    output_type = [](const CustomOp*, size_t i) { return type(Op::outputs, i); };
    output_count = [](const CustomOp*) { return letters(Op::outputs); };
    input_characteristic = [](const CustomOp*, size_t i) { return characteristic(Op::inputs, i); };
    output_characteristic = [](const CustomOp*, size_t i) { return characteristic(Op::outputs, i); };
    input_memory = [](const CustomOp*, size_t) { return 0; };  // the device's
    variadic_input_minimum = [](const CustomOp*) { return 0; };
    variadic_input_homogeneous = variadic_output_homogeneous = variadic_output_minimum = [](const CustomOp*) {
      return 1;
    };
    start_version = [](const CustomOp*) { return 1; };
    end_version = [](const CustomOp*) { return 1; };
    create_v2 = [](const CustomOp*, const void*, const void* info, void** kernel) {
      return guarded([&] {
        Device::check();
        *kernel = new Op(Attributes{info});
      });
    };
    compute_v2 = [](void* kernel, void* context) {
      return guarded([&] {
        Context found(context);
        static_cast<const Op*>(kernel)->template run<T>(found, Device(found));
      });
    };
    destroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  }

 private:
  static bool letter(char c) { return c == 'T' || c == 'f' || c == 'i'; }
  static size_t letters(const char* spec) {
    size_t n = 0;
    for (; *spec; ++spec) n += letter(*spec);
    return n;
  }
  static size_t place(const char* spec, size_t index) {
    size_t at = 0;
    for (;; ++at) {
      if (letter(spec[at]) && index-- == 0) return at;
    }
  }
  static int characteristic(const char* spec, size_t index) {
    const char mark = spec[place(spec, index) + 1];
    return mark == '?' ? OPTIONAL : mark == '*' ? VARIADIC : REQUIRED;
  }
  static int type(const char* spec, size_t index) {
    const char c = spec[place(spec, index)];
    return c == 'f' ? FLOAT : c == 'i' ? INT64 : element_type<T>();
  }
};

}  // namespace ort
