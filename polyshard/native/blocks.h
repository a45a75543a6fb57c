// Building blocks of attention for a few rows in registers: matmuls, visible keys and softmax.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>

#include "registers.h"

namespace {

constexpr int ROWS = 6;

// Registers per row that a matmul accumulates at the same time: enough independent sums to hide the latency of an
// addition, without exceeding the register file.
constexpr int panel(int rows) {
  if (rows <= 2) return WIDTH == 16 || rows == 1 ? 8 : 4;
  if (WIDTH == 16) return rows == 3 ? 6 : 4;
  return rows <= 4 ? 3 : 2;
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A matrix in memory whose element (row, column) is data[row * rows + column * columns].
template <typename T>
struct StridedOf {
  const T* data;
  int64_t rows, columns;
};

// A prefetch policy: none.
struct Nothing {
  void fetch(int64_t) const {}
  Nothing after(int64_t) const { return {}; }
};

// A prefetch policy: memory that is needed next, `step` bytes for each input.
struct Ahead {
  const char* bytes;
  int64_t step;

  void fetch(int64_t k) const {
    for (int64_t i = 0; i < step; i += 64) __builtin_prefetch(bytes + k * step + i, 0, 2);
  }
  Ahead after(int64_t inputs) const { return {bytes + inputs * step, step}; }
};

// out[0..R)[0..V * WIDTH) (+)= a[0..R)[0..depth) b[0..depth)[0..V * WIDTH), with b of any dtype, or pairs. Terms are
// added one by one, so a sum that continues from `out` equals that of a single matmul, bit for bit.
template <int R, int V, typename T, typename B, typename Wanted>
inline void multiply(StridedOf<T> a, const B* b, int64_t b_row, int64_t depth, float* out, int64_t out_row, bool add,
                     Wanted wanted) {
  Vec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[r][v] = add ? load(out + r * out_row + v * WIDTH) : Vec{};
  for (int64_t k = 0; k < depth; k++) {
    wanted.fetch(k);
    decltype(load(b)) row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) row[v] = load(b + k * b_row + v * WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const T x = a.data[r * a.rows + k * a.columns];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r][v] = multiply_add(x, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(out + r * out_row + v * WIDTH, sum[r][v]);
}

template <int R, int V, typename T, typename B, typename Wanted>
void multiply_rows(StridedOf<T> a, const B* b, int64_t b_row, int64_t depth, float* out, int64_t out_row, bool add,
                   int64_t columns, Wanted wanted) {
  int64_t c = 0;
  for (; c + V * WIDTH <= columns; c += V * WIDTH, wanted = wanted.after(depth))
    multiply<R, V>(a, b + c, b_row, depth, out + c, out_row, add, wanted);
  if constexpr (V > 1)
    if (c < columns) multiply_rows<R, V / 2>(a, b + c, b_row, depth, out + c, out_row, add, columns - c, wanted);
}

// The same for up to ROWS rows and any number of columns that is a multiple of WIDTH.
template <typename T, typename B, typename Wanted = Nothing>
void product(int64_t rows, StridedOf<T> a, const B* b, int64_t b_row, int64_t depth, float* out, int64_t out_row,
             bool add, int64_t columns, Wanted wanted = {}) {
  switch (rows) {
    case 6: return multiply_rows<6, panel(6)>(a, b, b_row, depth, out, out_row, add, columns, wanted);
    case 5: return multiply_rows<5, panel(5)>(a, b, b_row, depth, out, out_row, add, columns, wanted);
    case 4: return multiply_rows<4, panel(4)>(a, b, b_row, depth, out, out_row, add, columns, wanted);
    case 3: return multiply_rows<3, panel(3)>(a, b, b_row, depth, out, out_row, add, columns, wanted);
    case 2: return multiply_rows<2, panel(2)>(a, b, b_row, depth, out, out_row, add, columns, wanted);
    default: return multiply_rows<1, panel(1)>(a, b, b_row, depth, out, out_row, add, columns, wanted);
  }
}

inline float sum_of(Vec x) {
#pragma GCC unroll 4
  for (int half = WIDTH / 2; half > 0; half /= 2) x += __builtin_shuffle(x, lanes() ^ half);
  return x[0];
}

// Adds of(c), for each register of the columns [from, to), to the sums of these columns.
template <typename Of>
inline void add_columns(Sums& sums, int64_t from, int64_t to, Of of) {
  constexpr int PARTS = Sums::PARTS;
  int64_t c = from;
  if (PARTS == 2 && c < to && c / WIDTH % 2) sums.parts[PARTS - 1] += of(c), c += WIDTH;
  for (; c + (PARTS - 1) * WIDTH < to; c += Sums::LANES)
    for (int p = 0; p < PARTS; p++) sums.parts[p] += of(c + p * WIDTH);
  if (c < to) sums.parts[0] += of(c);
}

inline float largest_of(Vec x) {
#pragma GCC unroll 4
  for (int half = WIDTH / 2; half > 0; half /= 2) {
    const Vec other = __builtin_shuffle(x, lanes() ^ half);
    x = x > other ? x : other;
  }
  return x[0];
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer buffer(int64_t floats) {
  void* p = std::aligned_alloc(64, up(std::max<int64_t>(floats, 1) * 4, 64));
  if (!p) {
    std::fprintf(stderr, "polyshard: no memory for %lld floats of attention's scratch\n", (long long)floats);
    std::abort();
  }
  return Buffer(static_cast<float*>(p));
}

}  // namespace

// A packed tensor [tokens, heads, dim] at the first token of a run; the last dimension is contiguous.
template <typename T>
struct PackedOf {
  T* data;
  int64_t token, head;  // strides

  T* at(int64_t tokens, int64_t heads) const { return data + tokens * token + heads * head; }
};
using Packed = PackedOf<float>;

namespace {

struct Seen {
  int64_t low, high;
};

static_assert(ROWS <= WIDTH, "a block of keys spans two registers");

// The keys seen by any of `rows` rows from `first` on: row i sees those in (i + shift - window, i + shift] if causal
// and those in (i + shift - window, i + shift + window) otherwise; a window of 0 means no window.
template <typename Run>
inline Seen seen(const Run& run, int64_t first, int64_t rows = 1) {
  const int64_t from = first + run.shift, last = from + rows - 1;
  int64_t low = 0, high = run.keys;
  if (run.window > 0) low = std::max(low, from - run.window + 1);
  if (run.causal)
    high = std::min(high, last + 1);
  else if (run.window > 0)
    high = std::min(high, last + run.window);
  return low < high ? Seen{low, high} : Seen{0, 0};
}

// The same, starting at a full register.
template <typename Run>
inline Seen seen_by(const Run& run, int64_t first, int64_t rows) {
  const Seen all = seen(run, first, rows);
  return {all.low / WIDTH * WIDTH, all.high};
}

// Mask of the lanes of the register at `column` that a row sees.
inline Int visible(Seen one, int64_t column) {
  return (lanes() >= (int32_t)(one.low - column)) & (lanes() < (int32_t)(one.high - column));
}

inline Vec where(Int keep, Vec x) { return (Vec)((Int)x & keep); }

// Turns the scores of one row, times `factor`, into weights that are not yet normalized; `largest` never decreases.
inline void softmax(float* row, float factor, Seen all, Seen one, float& largest, float& total) {
  // Registers before `begin` and from `end` on are seen in part.
  const int64_t begin = std::min(up(one.low, WIDTH), all.high), end = std::max(one.high / WIDTH * WIDTH, begin);
  const Vec none = Vec{} - std::numeric_limits<float>::infinity();
  Vec top = Vec{} + largest;
  const auto larger = [&](Vec x) { top = x > top ? x : top; };
  const auto larger_in_part = [&](int64_t c) { larger(visible(one, c) ? load(row + c) * factor : none); };
  for (int64_t c = all.low; c < begin; c += WIDTH) larger_in_part(c);
  for (int64_t c = begin; c < end; c += WIDTH) larger(load(row + c) * factor);
  for (int64_t c = end; c < all.high; c += WIDTH) larger_in_part(c);
  largest = largest_of(top);
  Sums sums;
  const auto weight = [&](int64_t c) { return exponential(load(row + c) * factor - largest); };
  const auto kept = [&](int64_t c, Vec x) { return store(row + c, x), x; };
  const auto in_part = [&](int64_t c) { return kept(c, where(visible(one, c), weight(c))); };
  add_columns(sums, all.low, begin, in_part);
  add_columns(sums, begin, end, [&](int64_t c) { return kept(c, weight(c)); });
  add_columns(sums, end, all.high, in_part);
  total = sums.total();
}

// Prefetches `rows` rows of `dim` numbers before they are multiplied.
template <typename T>
inline void prefetch(const T* from, int64_t row, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(from + r * row + d);
}

// Converts rows to contiguous float32.
template <typename T>
inline void widen(const T* from, int64_t row, int64_t rows, int64_t dim, float* to) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t d = 0; d < dim; d += WIDTH) store(to + r * dim + d, load(from + r * row + d));
}

}  // namespace
