// out = silu(gate) * up and its gradient, computed in float32 and rounded once, each in one pass over memory.

#include "elementwise.h"

namespace {

template <typename T>
void swiglu_as(const void* gate_up, int64_t stride, void* out, int64_t rows, int64_t size, int threads) {
  const T* from = static_cast<const T*>(gate_up);
  T* to = static_cast<T*>(out);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* gate = from + r * stride;
    combine(gate, gate + size, to + r * size, size, [](Vec x, Vec up) { return silu(x) * up; });
  }
}

template <typename T>
inline void gradient_of(const T* gate, const T* up, const T* gradient, T* to_gate, T* to_up) {
  const Vec x = at_least(load(gate), -88.0f), g = load(gradient);
  const Vec sigmoid = 1.0f / (1.0f + exponential(-x));
  store(to_gate, g * load(up) * sigmoid * (1.0f + x * (1.0f - sigmoid)));
  store(to_up, g * x * sigmoid);
}

template <typename T>
void swiglu_backward_as(const void* gate_up, int64_t stride, const void* gradient, int64_t gradient_stride, void* out,
                        int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T *gate = static_cast<const T*>(gate_up) + r * stride, *up = gate + size;
    const T* g = static_cast<const T*>(gradient) + r * gradient_stride;
    T *to_gate = static_cast<T*>(out) + r * 2 * size, *to_up = to_gate + size;
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) gradient_of(gate + i, up + i, g + i, to_gate + i, to_up + i);
    if (const int64_t rest = size - i; rest > 0) {
      const Filled<T> x(gate + i, rest), y(up + i, rest), z(g + i, rest);
      Filled<T> to_x, to_y;
      gradient_of(x.data, y.data, z.data, to_x.data, to_y.data);
      std::copy(to_x.data, to_x.data + rest, to_gate + i);
      std::copy(to_y.data, to_y.data + rest, to_up + i);
    }
  }
}

}  // namespace

// gate_up [rows, 2 * size] with `stride` elements between rows; out [rows, size], contiguous. kind: as in matmul.cpp.
extern "C" void polyshard_swiglu(int kind, const void* gate_up, int64_t stride, void* out, int64_t rows, int64_t size,
                                 int threads) {
  constexpr decltype(&swiglu_as<float>) kinds[] = {swiglu_as<float>, swiglu_as<Bfloat16>, swiglu_as<Float16>};
  kinds[kind](gate_up, stride, out, rows, size, threads);
}

// gradient [rows, size] with `gradient_stride` elements between rows; out [rows, 2 * size], contiguous.
extern "C" void polyshard_swiglu_backward(int kind, const void* gate_up, int64_t stride, const void* gradient,
                                          int64_t gradient_stride, void* out, int64_t rows, int64_t size, int threads) {
  constexpr decltype(&swiglu_backward_as<float>) kinds[] = {swiglu_backward_as<float>, swiglu_backward_as<Bfloat16>,
                                                            swiglu_backward_as<Float16>};
  kinds[kind](gate_up, stride, gradient, gradient_stride, out, rows, size, threads);
}
