// out = x / sqrt(mean(x²) + eps) * weight and its gradients, computed in float32 and rounded once.
//
// Sums over a row are accumulated in sixteen sums, so the result is the same on every processor.

#include <cmath>
#include <vector>

#include "elementwise.h"

namespace {

template <typename T>
float scale_of(const T* x, int64_t size, float eps) {
  return 1.0f / std::sqrt(sum_over(x, x, size, [](Vec v, Vec) { return v * v; }) / size + eps);
}

template <typename T>
void norm_as(const void* x, int64_t stride, const void* weight, void* out, int64_t rows, int64_t size, float eps,
             int threads) {
  const T* by = static_cast<const T*>(weight);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* from = static_cast<const T*>(x) + r * stride;
    T* to = static_cast<T*>(out) + r * size;
    const float scale = scale_of(from, size, eps);
    combine(from, by, to, size, [scale](Vec v, Vec w) { return v * scale * w; });
  }
}

// With n = x * scale: to_x = scale * (gradient * weight - n * mean(gradient * weight * n)); the gradient of the weight
// gets gradient * n added.
template <typename T>
inline void gradient_of(const T* x, const float* weighted, const T* gradient, T* to_x, float* to_weight, float scale,
                        float mean) {
  const Vec n = load(x) * scale;
  store(to_x, scale * (load(weighted) - n * mean));
  store(to_weight, load(to_weight) + load(gradient) * n);
}

template <typename T>
void backward_of_row(const T* x, const T* weight, const T* gradient, T* to_x, float* to_weight, float* weighted,
                     int64_t size, float eps) {
  const float scale = scale_of(x, size, eps);
  Sums sums;
  int64_t i = 0;
  const auto weigh = [&](const T* v, const T* w, const T* g, float* to) {
    const Vec product = load(g) * load(w);
    store(to, product);
    return product * load(v) * scale;
  };
  for (; i + WIDTH <= size; i += WIDTH)
    sums.parts[i / WIDTH % Sums::PARTS] += weigh(x + i, weight + i, gradient + i, weighted + i);
  const int64_t rest = size - i;
  const Filled<T> last_x(x + i, rest), last_weight(weight + i, rest), last_gradient(gradient + i, rest);
  alignas(64) float last[WIDTH] = {};
  if (rest) sums.parts[i / WIDTH % Sums::PARTS] += weigh(last_x.data, last_weight.data, last_gradient.data, last);
  const float mean = sums.total() / size;
  for (i = 0; i + WIDTH <= size; i += WIDTH)
    gradient_of(x + i, weighted + i, gradient + i, to_x + i, to_weight + i, scale, mean);
  if (!rest) return;
  Filled<T> result;
  alignas(64) float sum[WIDTH] = {};
  std::copy(to_weight + i, to_weight + size, sum);
  gradient_of(last_x.data, last, last_gradient.data, result.data, sum, scale, mean);
  std::copy(result.data, result.data + rest, to_x + i);
  std::copy(sum, sum + rest, to_weight + i);
}

template <typename T>
void norm_backward_as(const void* x, int64_t stride, const void* weight, const void* gradient, int64_t gradient_stride,
                      void* to_x, float* to_weight, int64_t rows, int64_t size, float eps, int threads) {
  // Each thread has a run of rows and sums of its own, added up in the order of the threads.
  std::vector<float> sums(threads * size);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < threads; t++) {
    std::vector<float> weighted(size);
    for (int64_t r = rows * t / threads; r < rows * (t + 1) / threads; r++)
      backward_of_row(static_cast<const T*>(x) + r * stride, static_cast<const T*>(weight),
                      static_cast<const T*>(gradient) + r * gradient_stride, static_cast<T*>(to_x) + r * size,
                      sums.data() + t * size, weighted.data(), size, eps);
  }
  std::copy(sums.begin(), sums.begin() + size, to_weight);
  for (int64_t t = 1; t < threads; t++)
    for (int64_t i = 0; i < size; i++) to_weight[i] += sums[t * size + i];
}

}  // namespace

// x [rows, size] with `stride` elements between rows; weight [size]; out [rows, size], contiguous. kind: the dtype, as
// in matmul.cpp.
extern "C" void polyshard_norm(int kind, const void* x, int64_t stride, const void* weight, void* out, int64_t rows,
                               int64_t size, float eps, int threads) {
  constexpr decltype(&norm_as<float>) kinds[] = {norm_as<float>, norm_as<Bfloat16>, norm_as<Float16>};
  kinds[kind](x, stride, weight, out, rows, size, eps, threads);
}

// gradient as x; to_x [rows, size], contiguous; to_weight float32 [size].
extern "C" void polyshard_norm_backward(int kind, const void* x, int64_t stride, const void* weight,
                                        const void* gradient, int64_t gradient_stride, void* to_x, float* to_weight,
                                        int64_t rows, int64_t size, float eps, int threads) {
  constexpr decltype(&norm_backward_as<float>) kinds[] = {norm_backward_as<float>, norm_backward_as<Bfloat16>,
                                                          norm_backward_as<Float16>};
  kinds[kind](x, stride, weight, gradient, gradient_stride, to_x, to_weight, rows, size, eps, threads);
}
