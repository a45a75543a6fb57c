// The parts of a softmax's cross-entropy that read all logits, without a float32 copy of them.

#include <limits>

#include "elementwise.h"

namespace {

constexpr int64_t BLOCK = 1024;

template <typename T>
void largest_as(const void* logits, int64_t stride, float* out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* x = static_cast<const T*>(logits) + r * stride;
    Vec top[4];
    for (Vec& part : top) part = Vec{} - std::numeric_limits<float>::infinity();
    int64_t i = 0;
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH)
      for (int p = 0; p < 4; p++) {
        const Vec v = load(x + i + p * WIDTH);
        top[p] = v > top[p] ? v : top[p];
      }
    float largest = -std::numeric_limits<float>::infinity();
    const auto over = [&](Vec v, int64_t count) {
      for (int64_t k = 0; k < count; k++) largest = v[k] > largest ? v[k] : largest;
    };
    for (const Vec& part : top) over(part, WIDTH);
    for (; i < size; i += WIDTH) {
      const int64_t count = std::min<int64_t>(WIDTH, size - i);
      over(load(Filled<T>(x + i, count).data), count);
    }
    out[r] = largest;
  }
}

template <typename T>
void sum_exp_as(const void* logits, int64_t stride, const float* top, float* out, int64_t rows, int64_t size,
                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* x = static_cast<const T*>(logits) + r * stride;
    const int64_t full = size / Sums::LANES * Sums::LANES;
    const float largest = top[r];
    double sum = 0;  // of blocks: in float32, thousands of additions to one sum would lose digits
    for (int64_t i = 0; i < full; i += BLOCK) {
      const auto of = [largest](Vec v, Vec) { return exponential(v - largest); };
      sum += sum_over(x + i, x + i, std::min(BLOCK, full - i), of);
    }
    for (int64_t i = full; i < size; i += WIDTH) {
      const int64_t count = std::min<int64_t>(WIDTH, size - i);
      const Vec v = exponential(load(Filled<T>(x + i, count).data) - largest);
      for (int64_t k = 0; k < count; k++) sum += v[k];
    }
    out[r] = static_cast<float>(sum);
  }
}

template <typename T>
void gradient_as(const void* logits, int64_t stride, const float* top, const float* sum, const float* scale,
                 const int64_t* target, void* out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* x = static_cast<const T*>(logits) + r * stride;
    T* to = static_cast<T*>(out) + r * size;
    const float largest = top[r], share = 1.0f / sum[r], by = scale[r];
    combine(x, x, to, size, [=](Vec v, Vec) { return exponential(v - largest) * share * by; });
    if (const int64_t t = target[r]; t >= 0) {
      Filled<T> one(x + t, 1);
      store(one.data, (exponential(load(one.data) - largest) * share - 1.0f) * by);
      to[t] = one.data[0];
    }
  }
}

}  // namespace

// All: logits [rows, size] with `stride` elements between rows; kind: as in matmul.cpp.

// out [rows]: the largest logit of each row; NaN is not considered.
extern "C" void polyshard_largest(int kind, const void* logits, int64_t stride, float* out, int64_t rows, int64_t size,
                                  int threads) {
  constexpr decltype(&largest_as<float>) kinds[] = {largest_as<float>, largest_as<Bfloat16>, largest_as<Float16>};
  kinds[kind](logits, stride, out, rows, size, threads);
}

// out [rows]: the sum of exp(logit - top).
extern "C" void polyshard_sum_exp(int kind, const void* logits, int64_t stride, const float* top, float* out,
                                  int64_t rows, int64_t size, int threads) {
  constexpr decltype(&sum_exp_as<float>) kinds[] = {sum_exp_as<float>, sum_exp_as<Bfloat16>, sum_exp_as<Float16>};
  kinds[kind](logits, stride, top, out, rows, size, threads);
}

// out [rows, size], contiguous: (exp(logit - top) / sum - [column is the target]) * scale; a target of -1 is none.
extern "C" void polyshard_cross_entropy_gradient(int kind, const void* logits, int64_t stride, const float* top,
                                                 const float* sum, const float* scale, const int64_t* target,
                                                 void* out, int64_t rows, int64_t size, int threads) {
  constexpr decltype(&gradient_as<float>) kinds[] = {gradient_as<float>, gradient_as<Bfloat16>, gradient_as<Float16>};
  kinds[kind](logits, stride, top, sum, scale, target, out, rows, size, threads);
}
