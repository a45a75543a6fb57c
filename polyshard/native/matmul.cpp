// out = x Wᵀ + bias with weights that were packed once; sums are in float32. For a gate/up projection packed together,
// out may be silu(gate) * up, and a residual may be added. Both use the rounded results while they are in registers, so
// they equal the separate operations bit for bit.
//
// An output is a sum of partial sums over parts of the inputs; within a part, and over the parts, terms are added one
// by one. Its bits depend only on its row and column, not on other rows, the number of threads or the processor.
//
// Packed weights are stored in panels of COLUMNS output features, either adjacent or WIDTH from each half, input by
// input (pair by pair if the processor multiplies pairs of bfloat16). A tile of ROWS rows by one panel stays in
// registers while it is summed (Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication").

#include <algorithm>
#include <cstring>
#include <memory>

#include "registers.h"

namespace {

constexpr int COLUMNS = 2 * WIDTH;
constexpr int ROWS = WIDTH == 16 ? 12 : 6;      // with COLUMNS and one row of a panel this fills the register file
constexpr int64_t DEPTH = 1024;                 // maximum number of inputs of a part
constexpr int64_t MOST_ROWS = 24 * ROWS;        // maximum number of rows of a block
constexpr int64_t BLOCK_TERMS = 100 * 1024;     // maximum number of terms of a block, so that it stays in the L2 cache
constexpr int64_t LINE = 64, FURTHER = 16 * 1024;  // bytes: cache line, prefetch distance

inline float number(float x) { return x; }
inline float number(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
inline float number(Float16 x) { return _cvtsh_ss(x.bits); }

// Memory to prefetch into the L2 cache while a tile is summed: `step` bytes for each term, at most two cache lines.
struct Ahead {
  const char* bytes;
  int64_t step;

  void fetch(int64_t k) const {
    __builtin_prefetch(bytes + k * step, 0, 2);
    if (step > LINE) __builtin_prefetch(bytes + k * step + LINE, 0, 2);
  }
};

// The part of each output row, or residual row, that belongs to a panel. It is prefetched while the panel is summed,
// because the cache lines of consecutive rows are rarely adjacent.
template <int WRITTEN>
struct Touched {
  const char* bytes;  // of the first row; null if there is none, or if further parts are to be summed first
  int64_t stride;     // bytes between rows
  int64_t size;       // bytes of a row

  void fetch(int64_t row, int64_t rows) const {
    if (!bytes) return;
    for (int64_t r = row; r < row + rows; r++)
      for (int64_t i = 0; i < size; i += LINE) __builtin_prefetch(bytes + r * stride + i, WRITTEN, 2);
  }
};

// sums[0..R)[0..COLUMNS) (+)= the tile's rows, stored term by term, times a panel.
template <int R, typename Row, typename Weight>
inline void tile(const Row* __restrict rows, const Weight* __restrict panel, Ahead ahead, int64_t depth,
                 float* __restrict sums, bool add) {
  Vec left[R], right[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) left[r] = right[r] = Vec{};
  for (int64_t k = 0; k < depth; k++) {
    ahead.fetch(k);
    const auto x = load(panel + k * COLUMNS), y = load(panel + k * COLUMNS + WIDTH);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      left[r] = multiply_add(rows[k * R + r], x, left[r]);
      right[r] = multiply_add(rows[k * R + r], y, right[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    float* to = sums + r * COLUMNS;
    store(to, add ? load(to) + left[r] : left[r]);
    store(to + WIDTH, add ? load(to + WIDTH) + right[r] : right[r]);
  }
}

template <int R, typename Row, typename Weight>
void tile_of(int64_t count, const Row* rows, const Weight* panel, Ahead ahead, int64_t depth, float* sums, bool add) {
  if (count == R) return tile<R>(rows, panel, ahead, depth, sums, add);
  if constexpr (R > 1) tile_of<R - 1>(count, rows, panel, ahead, depth, sums, add);
}

// Multiplies a block's rows by `depth` terms of a panel. The first tile loads the panel from memory; if it computes
// long enough to hide the latency, it prefetches the memory FURTHER ahead. The following tiles, up to eight, each
// prefetch a part of the `size` bytes at `next`. Other tiles prefetch what they are about to read: prefetching the same
// address repeatedly was measured to cost a fifth of the time of a tile.
template <typename Row, typename Weight>
void block_of(int64_t count, int64_t height, const Row* rows, int64_t terms, int64_t first, const Weight* panel,
              const void* next, int64_t size, int64_t depth, float* sums, Touched<1> written, Touched<0> read) {
  const char* bytes = static_cast<const char*>(next);
  const int64_t others = (count - 1) / height;
  const int64_t parts = others >= 8 ? 8 : others >= 4 ? 4 : others >= 2 ? 2 : others;
  for (int64_t r = 0, i = 0; r < count; r += height, i++) {
    const int64_t here = std::min(height, count - r);
    const int64_t further = i == 0 && height > 4 ? FURTHER : 0;
    Ahead ahead{reinterpret_cast<const char*>(panel) + further, COLUMNS * sizeof(Weight)};
    if (i > 0 && i <= parts) ahead = {bytes + (i - 1) * size / parts, size / depth / parts};
    written.fetch(r, here);
    read.fetch(r, here);
    tile_of<ROWS>(here, rows + r * terms + first * here, panel, ahead, depth, sums + r * COLUMNS, first > 0);
  }
}

template <typename T>
inline float term(const T* x, int64_t) { return number(*x); }
template <typename T>
inline Vec terms_at(const T* x) { return load(x); }
#ifdef __AVX512BF16__
inline Pair term(const Bfloat16* x, int64_t inputs) { return {inputs > 1 ? x[1] : Bfloat16{}, x[0]}; }
inline Vec terms_at(const Bfloat16* x) { return exchanged(x); }
#endif

// Stores `rows` rows of `x`, at most ROWS, term by term.
template <typename T, typename Row>
inline void lay(const T* x, int64_t stride, int64_t rows, int64_t inputs, Row* out) {
  constexpr int64_t IN = Term<T>::INPUTS;
  const int64_t terms = (inputs + IN - 1) / IN;
  int64_t k = 0;
  // One register at a time. Lanes beyond `rows` are overwritten by the next register; the last one must end here.
  for (; (k + WIDTH) * IN <= inputs && (terms - k - WIDTH + 1) * rows >= WIDTH; k += WIDTH) {
    Vec block[WIDTH] = {};
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
      if (r < rows) block[r] = terms_at(x + r * stride + k * IN);
    transpose_block(block);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) store(reinterpret_cast<float*>(out + (k + i) * rows), block[i]);
  }
  for (; k < terms; k++)
    for (int64_t r = 0; r < rows; r++) out[k * rows + r] = term(x + r * stride + k * IN, inputs - k * IN);
}

// The output features of a panel: the first feature of each of its two registers, and their numbers.
struct Features {
  int64_t left, right, lefts, rights;

  // The first `half` of the outputs are gates; 0 if there are none.
  static Features of(int64_t panel, int64_t outputs, int64_t half) {
    const int64_t left = panel * (half ? WIDTH : COLUMNS), right = left + (half ? half : WIDTH);
    const auto within = [](int64_t first, int64_t end) { return std::clamp<int64_t>(end - first, 0, WIDTH); };
    return {left, right, within(left, half ? half : outputs), within(right, outputs)};
  }
  static int64_t panels(int64_t outputs, int64_t half) {
    return half ? (half + WIDTH - 1) / WIDTH : (outputs + COLUMNS - 1) / COLUMNS;
  }
};

template <typename T>
inline Vec some(const T* from, int64_t count) {
  if (count == WIDTH) return load(from);
  alignas(64) T row[WIDTH] = {};
  memcpy(row, from, count * sizeof(T));
  return load(row);
}

template <typename T>
inline void put(T* to, Vec x, int64_t count) {
  if (count == WIDTH) return store(to, x);
  alignas(64) T row[WIDTH];
  store(row, x);
  memcpy(to, row, count * sizeof(T));
}

template <typename T>
inline Vec rounded(Vec x) {
  alignas(64) T row[WIDTH];
  store(row, x);
  return load(row);
}

// A matrix with `stride` elements between rows.
template <typename T>
struct Matrix {
  T* first;  // null if there is no matrix
  int64_t stride;

  Matrix from(int64_t row) const { return {first ? first + row * stride : nullptr, stride}; }
};

template <typename T>
void write(const float* sums, int64_t rows, Features at, const T* bias, Matrix<const T> residual, bool gated, T* out,
           int64_t stride) {
  const Vec left = bias ? some(bias + at.left, at.lefts) : Vec{}, right = bias ? some(bias + at.right, at.rights) : Vec{};
  for (int64_t r = 0; r < rows; r++, sums += COLUMNS, out += stride) {
    const Vec x = bias ? load(sums) + left : load(sums), y = bias ? load(sums + WIDTH) + right : load(sums + WIDTH);
    if (residual.first) {
      const T* add = residual.from(r).first;
      put(out + at.left, some(add + at.left, at.lefts) + rounded<T>(x), at.lefts);
      put(out + at.right, some(add + at.right, at.rights) + rounded<T>(y), at.rights);
    } else if (gated) {
      put(out + at.left, silu(rounded<T>(x)) * rounded<T>(y), at.lefts);
    } else {
      put(out + at.left, x, at.lefts);
      put(out + at.right, y, at.rights);
    }
  }
}

// Number of inputs of a part, so that parts are of equal size and contain full pairs.
inline int64_t part_of(int64_t inputs) {
  const int64_t parts = (inputs + DEPTH - 1) / DEPTH;
  return ((inputs + parts - 1) / parts + 15) / 16 * 16;
}

template <typename T>
void multiply(const T* x, int64_t stride, const T* weights, const T* bias, Matrix<const T> residual, T* out, int64_t rows,
              int64_t inputs, int64_t outputs, int64_t half, bool gated, int threads) {
  using Row = typename Term<T>::Row;
  using Weight = typename Term<T>::Weight;
  constexpr bool WIDEN = sizeof(Weight) < sizeof(Row);
  const int64_t step = part_of(inputs) / Term<T>::INPUTS;
  const Weight* packed = reinterpret_cast<const Weight*>(weights);
  const int64_t terms = (inputs + Term<T>::INPUTS - 1) / Term<T>::INPUTS;
  const int64_t panels = Features::panels(outputs, half), row_size = gated ? half : outputs;
  const int64_t most = std::clamp<int64_t>(BLOCK_TERMS / terms / ROWS * ROWS, 4 * ROWS, MOST_ROWS);
  const std::unique_ptr<Row[]> laid(new Row[std::min(rows, most) * terms]);
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float sums[MOST_ROWS * COLUMNS];
    alignas(64) float wide[WIDEN ? DEPTH * COLUMNS : 1];
    for (int64_t from = 0; from < rows; from += most) {
      const int64_t count = std::min(most, rows - from), tiles = (count + ROWS - 1) / ROWS;
      const int64_t height = (count + tiles - 1) / tiles;  // tiles of equal size; only the first waits for memory
#pragma omp for schedule(static)
      for (int64_t r = 0; r < count; r += height) {
        const int64_t here = std::min(height, count - r);
        const T* first = x + (from + r) * stride;
        if (here == ROWS)  // a compile-time constant, so that the rows stay in registers
          lay(first, stride, ROWS, inputs, laid.get() + r * terms);
        else
          lay(first, stride, here, inputs, laid.get() + r * terms);
      }
#pragma omp for schedule(static)
      for (int64_t p = 0; p < panels; p++) {
        const Features at = Features::of(p, outputs, half);
        T* to = out + from * row_size;
        for (int64_t k = 0; k < terms; k += step) {
          const int64_t depth = std::min(step, terms - k);
          const Weight* panel = packed + (p * terms + k) * COLUMNS;
          const Weight* next = panel + depth * COLUMNS;
          const int64_t size = depth * COLUMNS * sizeof(Weight);
          const bool last = k + depth == terms;
          const T* add = last && residual.first ? residual.from(from).first + at.left : nullptr;
          const int64_t width = (half ? at.lefts : at.lefts + at.rights) * sizeof(T);
          const Touched<1> written{last ? reinterpret_cast<char*>(to + at.left) : nullptr,
                                   int64_t(row_size * sizeof(T)), width};
          const Touched<0> read{reinterpret_cast<const char*>(add), int64_t(residual.stride * sizeof(T)), width};
          if constexpr (WIDEN) {
            if (count > height) {  // widen once for all tiles
              for (int64_t i = 0; i < depth * COLUMNS; i += WIDTH) store(wide + i, load(panel + i));
              block_of(count, height, laid.get(), terms, k, wide, next, size, depth, sums, written, read);
              continue;
            }
          }
          block_of(count, height, laid.get(), terms, k, panel, next, size, depth, sums, written, read);
        }
        write(sums, count, at, bias, residual.from(from), gated, to, row_size);
      }
    }
  }
}

// Stores a register of terms of WIDTH columns, whose values are exact in T.
template <typename T>
inline void keep(T* to, Vec terms) {
  if constexpr (Term<T>::INPUTS == 1)
    store(to, terms);
  else
    store(reinterpret_cast<float*>(to), terms);
}

template <typename T>
void pack(const T* weight, int64_t stride, T* packed, int64_t inputs, int64_t outputs, int64_t half, int threads) {
  constexpr int64_t IN = Term<T>::INPUTS;
  const int64_t filled = (inputs + IN - 1) / IN * IN;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < Features::panels(outputs, half); p++) {
    const Features at = Features::of(p, outputs, half);
    for (const bool right : {false, true}) {
      const T* from = weight + (right ? at.right : at.left) * stride;
      const int64_t count = right ? at.rights : at.lefts;
      T* to = packed + p * COLUMNS * filled + (right ? WIDTH * IN : 0);
      int64_t done = 0;  // inputs packed a register at a time
      for (; count == WIDTH && done + WIDTH * IN <= inputs; done += WIDTH * IN) {
        Vec block[WIDTH];
        for (int64_t i = 0; i < WIDTH; i++) block[i] = terms_at(from + i * stride + done);
        transpose_block(block);
        for (int64_t i = 0; i < WIDTH; i++) keep(to + (done + i * IN) * COLUMNS, block[i]);
      }
      for (int64_t part = done; part < filled; part += 64)  // so that the written memory stays in the L1 cache
        for (int64_t column = 0; column < WIDTH; column++)
          for (int64_t k = part; k < std::min(filled, part + 64); k++)
            to[k / IN * IN * COLUMNS + column * IN + IN - 1 - k % IN] =
                column < count && k < inputs ? from[column * stride + k] : T{};
    }
  }
}

template <typename T>
void pack_as(const void* weight, int64_t stride, void* packed, int64_t inputs, int64_t outputs, int64_t half,
             int threads) {
  pack(static_cast<const T*>(weight), stride, static_cast<T*>(packed), inputs, outputs, half, threads);
}

template <typename T>
void multiply_as(const void* x, int64_t stride, const void* packed, const void* bias, const void* residual,
                 int64_t residual_stride, void* out, int64_t rows, int64_t inputs, int64_t outputs, int64_t half, int gated,
                 int threads) {
  multiply(static_cast<const T*>(x), stride, static_cast<const T*>(packed), static_cast<const T*>(bias),
           {static_cast<const T*>(residual), residual_stride}, static_cast<T*>(out), rows, inputs, outputs, half, gated,
           threads);
}

}  // namespace

extern "C" {

int polyshard_panel_columns() { return COLUMNS; }

// Number of inputs of a term, by dtype: 0 float32, 1 bfloat16, 2 float16.
int polyshard_term_inputs(int kind) {
  constexpr int kinds[] = {Term<float>::INPUTS, Term<Bfloat16>::INPUTS, Term<Float16>::INPUTS};
  return kinds[kind];
}

// weight [outputs, inputs] with `stride` elements between rows, of which the first `half` are gates of the others (0 if
// there are none); packed [panels, terms, COLUMNS, inputs of a term].
void polyshard_pack(int kind, const void* weight, int64_t stride, void* packed, int64_t inputs, int64_t outputs,
                    int64_t half, int threads) {
  constexpr decltype(&pack_as<float>) kinds[] = {pack_as<float>, pack_as<Bfloat16>, pack_as<Float16>};
  kinds[kind](weight, stride, packed, inputs, outputs, half, threads);
}

// x [rows, inputs] with `stride` elements between rows; out [rows, outputs], or [rows, half] if gated, contiguous;
// bias [outputs] or null; residual [rows, outputs] with `residual_stride` elements between rows, or null; null if
// gated.
void polyshard_product(int kind, const void* x, int64_t stride, const void* packed, const void* bias,
                       const void* residual, int64_t residual_stride, void* out, int64_t rows, int64_t inputs,
                       int64_t outputs, int64_t half, int gated, int threads) {
  constexpr decltype(&multiply_as<float>) kinds[] = {multiply_as<float>, multiply_as<Bfloat16>, multiply_as<Float16>};
  kinds[kind](x, stride, packed, bias, residual, residual_stride, out, rows, inputs, outputs, half, gated, threads);
}

}  // extern "C"
