// A vector register of floats, and conversion from and to other dtypes.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

#if defined(__AVX512F__) && !defined(POLYSHARD_WIDTH)
#define POLYSHARD_WIDTH 16
#elif !defined(POLYSHARD_WIDTH)
#define POLYSHARD_WIDTH 8
#endif
constexpr int WIDTH = POLYSHARD_WIDTH;  // floats per register

typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef float VecAnywhere __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t Int __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Word __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Half __attribute__((vector_size(2 * WIDTH), aligned(2)));

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<VecAnywhere*>(p) = x; }

inline Vec load(const Bfloat16* p) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Word) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(Bfloat16* p, Vec x) {
#ifdef __AVX512BF16__
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);  // flushes numbers below 2^-126 to zero
  __builtin_memcpy(p, &rounded, 32);
#else
  const Word bits = (Word)x;
  const Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Word nan = (Word)(x != x);
  *reinterpret_cast<Half*>(p) = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Half);
#endif
}

#ifdef __AVX512F__
inline Vec load(const Float16* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(Float16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec load(const Float16* p) {
  Vec x;
  for (int i = 0; i < WIDTH; i += 8) {
    const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
    __builtin_memcpy(reinterpret_cast<float*>(&x) + i, &part, 32);
  }
  return x;
}
inline void store(Float16* p, Vec x) {
  for (int i = 0; i < WIDTH; i += 8) {
    __m256 part;
    __builtin_memcpy(&part, reinterpret_cast<float*>(&x) + i, 32);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
  }
}
#endif

inline Vec multiply_add(float x, Vec y, Vec sum) { return x * y + sum; }

#ifdef __AVX512BF16__
// Neighbouring elements, stored swapped: the processor adds the product of the upper halves to a sum first, then that
// of the lower, each with one rounding (Intel 64 and IA-32 manual, VDPBF16PS). Swapping restores sequential summation
// order, except that numbers below 2^-126 count as zero.
struct Pair {
  Bfloat16 second, first;
};
typedef __m512i Pairs;

inline Pairs load(const Pair* p) { return _mm512_loadu_si512(p); }
// Loads a register of pairs.
inline Vec exchanged(const Bfloat16* p) { return (Vec)_mm512_rol_epi32(_mm512_loadu_si512(p), 16); }
// The same for elements that are not adjacent.
inline Vec paired(const Bfloat16* first, const Bfloat16* second) {
  const auto word = [](const Bfloat16* p) { return __builtin_convertvector(*reinterpret_cast<const Half*>(p), Word); };
  return (Vec)(word(first) << 16 | word(second));
}
inline Vec multiply_add(Pair x, Pairs y, Vec sum) {
  int32_t both;
  __builtin_memcpy(&both, &x, 4);
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(both), (__m512bh)y);
}
#endif

// The types in which elements are multiplied: `INPUTS` elements of a row form a Row, and those of a weight a Weight.
// One such product is a term.
template <typename T>
struct Term {
  using Row = float;
  using Weight = T;
  static constexpr int64_t INPUTS = 1;
};
#ifdef __AVX512BF16__
template <>
struct Term<Bfloat16> {
  using Row = Pair;
  using Weight = Pair;
  static constexpr int64_t INPUTS = 2;
};
#endif

inline Vec at_least(Vec x, float bound) { return x < bound ? Vec{} + bound : x; }  // NaN stays NaN

// exp(x) for x <= 88, to about one unit in the last place (polynomial of Cephes, expf.c); 0 if the result is below
// 2^-126.
inline Vec exponential(Vec x) {
  const Int least = x < -87.3f;
  x = at_least(x, -87.3f);
  const Vec shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const Vec whole = shifted - 12582912.0f;
  const Vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec y = Vec{} + 1.9875691500e-4f;
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * (rest * rest) + (rest + 1.0f);
  const Vec power = (Vec)((((Int)shifted) << 23) + 0x3f800000);  // the low bits of `shifted` are the integer
  return (Vec)((Int)(y * power) & ~least);  // multiplied last, so that NaN stays NaN
}

// tanh(x), to about one unit in the last place (Cephes, tanhf.c).
inline Vec tangent(Vec x) {
  const Vec square = x * x, bound = Vec{} + 44.0f;
  const Vec far = 1.0f - 2.0f / (exponential(2.0f * (x > bound ? bound : x)) + 1.0f);
  Vec near = Vec{} - 5.70498872745e-3f;
  near = near * square + 2.06390887954e-2f;
  near = near * square - 5.37397155531e-2f;
  near = near * square + 1.33314422036e-1f;
  near = near * square - 3.33332819422e-1f;
  near = near * square * x + x;
  return square < 0.390625f ? near : far;
}

// x * sigmoid(x). Below -88 it returns the value at -88, which is -5e-37.
inline Vec silu(Vec x) {
  x = at_least(x, -88.0f);
  return x / (1.0f + exponential(-x));
}

// 0, 1, 2, ... in the lanes of a register.
inline Int lanes() {
  Int x{};
  for (int i = 0; i < WIDTH; i++) x[i] = i;
  return x;
}

// Sixteen sums for every register width, added pairwise by halves, so the result is the same on every processor.
struct Sums {
  static constexpr int LANES = 16, PARTS = LANES / WIDTH;
  Vec parts[PARTS] = {};

  float total() const {
    float all[LANES];
    for (int p = 0; p < PARTS; p++) store(all + p * WIDTH, parts[p]);
    for (int half = LANES / 2; half > 0; half /= 2)
      for (int k = 0; k < half; k++) all[k] += all[k + half];
    return all[0];
  }
};

// Transposes a square block by exchanging ever larger halves.
inline void transpose_block(Vec (&x)[WIDTH]) {
#pragma GCC unroll 4
  for (int half = 1; half < WIDTH; half *= 2) {
    const Int upper = (lanes() & half) != 0;
    const Int first = upper ? lanes() + (WIDTH - half) : lanes(), second = upper ? lanes() + WIDTH : lanes() + half;
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++)
      if (!(i & half)) {
        const Vec a = x[i], b = x[i + half];
        x[i] = __builtin_shuffle(a, b, first);
        x[i + half] = __builtin_shuffle(a, b, second);
      }
  }
}

// out[0..size) = of(left[0..size), right[0..size)), one register at a time.
template <typename T, typename Of>
inline void combine(const T* left, const T* right, T* out, int64_t size, Of of) {
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) store(out + i, of(load(left + i), load(right + i)));
  if (i == size) return;
  alignas(64) T a[WIDTH] = {}, b[WIDTH] = {};
  std::copy(left + i, left + size, a);
  std::copy(right + i, right + size, b);
  store(a, of(load(a), load(b)));
  std::copy(a, a + (size - i), out + i);
}

}  // namespace
