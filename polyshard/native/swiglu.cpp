// out = silu(gate) * up, computed in float32 and rounded once, in one pass over memory.

#include "registers.h"

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

}  // namespace

// gate_up [rows, 2 * size] with `stride` elements between rows; out [rows, size], contiguous. kind: as in matmul.cpp.
extern "C" void polyshard_swiglu(int kind, const void* gate_up, int64_t stride, void* out, int64_t rows, int64_t size,
                                 int threads) {
  constexpr decltype(&swiglu_as<float>) kinds[] = {swiglu_as<float>, swiglu_as<Bfloat16>, swiglu_as<Float16>};
  kinds[kind](gate_up, stride, out, rows, size, threads);
}
