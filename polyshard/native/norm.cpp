// out = x / sqrt(mean(x²) + eps) * weight, computed in float32 and rounded once.
//
// Squares are accumulated in sixteen sums, so the result is the same on every processor.

#include <algorithm>
#include <cmath>

#include "registers.h"

namespace {

constexpr int LANES = Sums::LANES, PARTS = Sums::PARTS;

template <typename T>
float sum_of_squares(const T* x, int64_t size) {
  Sums sums;
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    for (int p = 0; p < PARTS; p++) {
      const Vec v = load(x + i + p * WIDTH);
      sums.parts[p] += v * v;
    }
  if (i < size) {
    alignas(64) T rest[LANES] = {};
    std::copy(x + i, x + size, rest);
    for (int p = 0; p < PARTS; p++) {
      const Vec v = load(rest + p * WIDTH);
      sums.parts[p] += v * v;
    }
  }
  return sums.total();
}

template <typename T>
void norm_as(const void* x, int64_t stride, const void* weight, void* out, int64_t rows, int64_t size, float eps,
             int threads) {
  const T* by = static_cast<const T*>(weight);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* from = static_cast<const T*>(x) + r * stride;
    T* to = static_cast<T*>(out) + r * size;
    const float scale = 1.0f / std::sqrt(sum_of_squares(from, size) / size + eps);
    combine(from, by, to, size, [scale](Vec v, Vec w) { return v * scale * w; });
  }
}

}  // namespace

// x [rows, size] with `stride` elements between rows; weight [size]; out [rows, size], contiguous. kind: the dtype, as
// in matmul.cpp.
extern "C" void polyshard_norm(int kind, const void* x, int64_t stride, const void* weight, void* out, int64_t rows,
                               int64_t size, float eps, int threads) {
  constexpr decltype(&norm_as<float>) kinds[] = {norm_as<float>, norm_as<Bfloat16>, norm_as<Float16>};
  kinds[kind](x, stride, weight, out, rows, size, eps, threads);
}
