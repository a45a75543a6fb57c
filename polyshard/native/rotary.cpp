// Rotation of pairs (i, i + half) of the elements of heads, in float32 and rounded once, in one pass over memory.
//
// The same bits as torch's operators: products are rounded before they are added.

#include "registers.h"

namespace {

// Keeps the compiler from fusing a product with the following addition.
inline Vec rounded(Vec x) {
#if POLYSHARD_WIDTH == 16
  asm("" : "+v"(x));
#else
  asm("" : "+x"(x));
#endif
  return x;
}

template <typename T>
void rotate_as(const void* x, int64_t token, int64_t head, const void* cos, const void* sin, void* out, int64_t tokens,
               int64_t heads, int64_t dim, int64_t half, float sign, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; t++) {
    const T *c = static_cast<const T*>(cos) + t * half, *s = static_cast<const T*>(sin) + t * half;
    for (int64_t h = 0; h < heads; h++) {
      const T* from = static_cast<const T*>(x) + t * token + h * head;
      T* to = static_cast<T*>(out) + (t * heads + h) * dim;
      for (int64_t i = 0; i < half; i += WIDTH) {
        const Vec first = load(from + i), second = load(from + half + i);
        const Vec cosine = load(c + i), sine = load(s + i) * sign;
        store(to + i, rounded(first * cosine) - rounded(second * sine));
        store(to + half + i, rounded(second * cosine) + rounded(first * sine));
      }
      std::copy(from + 2 * half, from + dim, to + 2 * half);
    }
  }
}

}  // namespace

// x [tokens, heads, dim] with the given strides and contiguous heads; cos and sin [tokens, half], contiguous, with half
// a multiple of the register's width; out [tokens, heads, dim], contiguous. sign: 1, or -1 for the opposite direction.
// kind: as in matmul.cpp.
extern "C" void polyshard_rotate(int kind, const void* x, int64_t token, int64_t head, const void* cos,
                                 const void* sin, void* out, int64_t tokens, int64_t heads, int64_t dim, int64_t half,
                                 float sign, int threads) {
  constexpr decltype(&rotate_as<float>) kinds[] = {rotate_as<float>, rotate_as<Bfloat16>, rotate_as<Float16>};
  kinds[kind](x, token, head, cos, sin, out, tokens, heads, dim, half, sign, threads);
}
