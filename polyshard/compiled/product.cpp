// out = x Wᵀ + bias by weights that were packed once. Sums are taken in float32.
//
// An output is the sum, in their order, of the sums of DEPTH inputs each, added up one by one: its bits depend on its
// row and its column alone, and on neither the other rows, nor the threads, nor the width of the registers.
//
// Packed weights lie in panels of COLUMNS output features, input by input, so that a tile of ROWS rows and a panel
// stays in registers while it is summed (Goto and van de Geijn 2008, "Anatomy of high-performance matrix
// multiplication").

#include <algorithm>
#include <cstring>
#include <memory>

#include "registers.h"

namespace {

constexpr int COLUMNS = 2 * WIDTH;
constexpr int ROWS = WIDTH == 16 ? 12 : 6;      // with COLUMNS and a panel's row it fills the register file
constexpr int64_t DEPTH = 256;                  // inputs of a panel that stay in the first cache
constexpr int64_t MOST_ROWS = 24 * ROWS;        // of a block
constexpr int64_t BLOCK_FLOATS = 100 * 1024;    // of a block of rows, which stays in the second cache

inline float number(float x) { return x; }
inline float number(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
inline float number(Float16 x) { return _cvtsh_ss(x.bits); }

// Memory to be fetched while a tile is summed: `step` bytes further with each input.
struct Ahead {
  const char* bytes;
  int64_t step;
};

// sums[0..R)[0..COLUMNS) (+)= the tile's rows, laid input by input, by a panel.
template <int R, typename T>
inline void tile(const float* __restrict rows, const T* __restrict panel, Ahead ahead, int64_t depth,
                 float* __restrict sums, bool add) {
  Vec left[R], right[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) left[r] = right[r] = Vec{};
  for (int64_t k = 0; k < depth; k++) {
    __builtin_prefetch(ahead.bytes + k * ahead.step);
    const Vec x = load(panel + k * COLUMNS), y = load(panel + k * COLUMNS + WIDTH);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      left[r] += rows[k * R + r] * x;
      right[r] += rows[k * R + r] * y;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    float* to = sums + r * COLUMNS;
    store(to, add ? load(to) + left[r] : left[r]);
    store(to + WIDTH, add ? load(to + WIDTH) + right[r] : right[r]);
  }
}

template <int R, typename T>
void tile_of(int64_t count, const float* rows, const T* panel, Ahead ahead, int64_t depth, float* sums, bool add) {
  if (count == R) return tile<R>(rows, panel, ahead, depth, sums, add);
  if constexpr (R > 1) tile_of<R - 1>(count, rows, panel, ahead, depth, sums, add);
}

// A block's rows by DEPTH inputs of a panel. The first tile brings the panel from memory; the tiles after it, up to
// eight, fetch in parts the `size` bytes at `next` that follow. The others name what they are about to read: one
// address over and over was measured to cost a fifth in a tile alone.
template <typename T>
void block_of(int64_t count, const float* rows, int64_t inputs, int64_t first, const T* panel, const void* next,
              int64_t size, int64_t depth, float* sums) {
  const char* bytes = static_cast<const char*>(next);
  const int64_t others = (count - 1) / ROWS;
  const int64_t parts = others >= 8 ? 8 : others >= 4 ? 4 : others >= 2 ? 2 : others;
  for (int64_t r = 0, i = 0; r < count; r += ROWS, i++) {
    const int64_t height = std::min<int64_t>(ROWS, count - r);
    Ahead ahead{reinterpret_cast<const char*>(panel), COLUMNS * sizeof(T)};
    if (i > 0 && i <= parts) ahead = {bytes + (i - 1) * size / parts, size / depth / parts};
    tile_of<ROWS>(height, rows + r * inputs + first * height, panel, ahead, depth, sums + r * COLUMNS, first > 0);
  }
}

// Rows of `x` in tiles, each input by input, as float32.
template <typename T>
void lay(const T* x, int64_t stride, int64_t rows, int64_t inputs, float* out) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t height = std::min<int64_t>(ROWS, rows - first);
    float* to = out + first * inputs;
    for (int64_t k = 0; k < inputs; k++)
      for (int64_t r = 0; r < height; r++) *to++ = number(x[(first + r) * stride + k]);
  }
}

template <typename T>
void write(const float* sums, int64_t rows, const T* bias, T* out, int64_t outputs, int64_t columns) {
  alignas(64) T row[COLUMNS] = {};
  if (bias) memcpy(row, bias, columns * sizeof(T));
  const Vec left = load(row), right = load(row + WIDTH);
  for (int64_t r = 0; r < rows; r++, sums += COLUMNS, out += outputs) {
    const Vec x = bias ? load(sums) + left : load(sums), y = bias ? load(sums + WIDTH) + right : load(sums + WIDTH);
    T* to = columns == COLUMNS ? out : row;
    store(to, x);
    store(to + WIDTH, y);
    if (to == row) memcpy(out, row, columns * sizeof(T));
  }
}

template <typename T>
void multiply(const T* x, int64_t stride, const T* packed, const T* bias, T* out, int64_t rows,
              int64_t inputs, int64_t outputs, int threads) {
  const int64_t panels = (outputs + COLUMNS - 1) / COLUMNS;
  const int64_t block = std::clamp<int64_t>(BLOCK_FLOATS / inputs / ROWS * ROWS, 4 * ROWS, MOST_ROWS);
  const int64_t blocks = (rows + block - 1) / block;
  const std::unique_ptr<float[]> laid(new float[rows * inputs]);
#pragma omp parallel num_threads(threads)
  {
    lay(x, stride, rows, inputs, laid.get());
    alignas(64) float sums[MOST_ROWS * COLUMNS];
    alignas(64) float wide[sizeof(T) == 4 ? 1 : DEPTH * COLUMNS];
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t p = 0; p < panels; p++) {
        const int64_t count = std::min(block, rows - b * block);
        const float* block_rows = laid.get() + b * block * inputs;
        for (int64_t k = 0; k < inputs; k += DEPTH) {
          const int64_t depth = std::min(DEPTH, inputs - k);
          const T* panel = packed + (p * inputs + k) * COLUMNS;
          const int64_t size = depth * COLUMNS * sizeof(T);
          if (sizeof(T) == 4 || count <= ROWS) {
            block_of(count, block_rows, inputs, k, panel, panel + depth * COLUMNS, size, depth, sums);
          } else {  // widened once for all tiles
            for (int64_t i = 0; i < depth * COLUMNS; i += WIDTH) store(wide + i, load(panel + i));
            block_of(count, block_rows, inputs, k, wide, panel + depth * COLUMNS, size, depth, sums);
          }
        }
        const int64_t column = p * COLUMNS;
        write(sums, count, bias ? bias + column : nullptr, out + b * block * outputs + column, outputs,
              std::min<int64_t>(COLUMNS, outputs - column));
      }
  }
}

template <typename T>
void pack(const T* weight, int64_t stride, T* packed, int64_t inputs, int64_t outputs, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < outputs; first += COLUMNS) {
    T* panel = packed + first * inputs;
    for (int64_t part = 0; part < inputs; part += 64)  // what is written stays in the first cache
      for (int64_t column = 0; column < COLUMNS; column++)
        for (int64_t k = part; k < std::min(inputs, part + 64); k++)
          panel[k * COLUMNS + column] = first + column < outputs ? weight[(first + column) * stride + k] : T{};
  }
}

template <typename T>
void pack_as(const void* weight, int64_t stride, void* packed, int64_t inputs, int64_t outputs, int threads) {
  pack(static_cast<const T*>(weight), stride, static_cast<T*>(packed), inputs, outputs, threads);
}

template <typename T>
void multiply_as(const void* x, int64_t stride, const void* packed, const void* bias, void* out,
                 int64_t rows, int64_t inputs, int64_t outputs, int threads) {
  multiply(static_cast<const T*>(x), stride, static_cast<const T*>(packed), static_cast<const T*>(bias),
           static_cast<T*>(out), rows, inputs, outputs, threads);
}

}  // namespace

extern "C" {

int polyshard_panel_columns() { return COLUMNS; }

// kind: 0 float32, 1 bfloat16, 2 float16. weight [outputs, inputs] with `stride` elements between rows; packed
// [panels, inputs, COLUMNS].
void polyshard_pack(int kind, const void* weight, int64_t stride, void* packed, int64_t inputs, int64_t outputs,
                    int threads) {
  constexpr decltype(&pack_as<float>) kinds[] = {pack_as<float>, pack_as<Bfloat16>, pack_as<Float16>};
  kinds[kind](weight, stride, packed, inputs, outputs, threads);
}

// x [rows, inputs] with `stride` elements between rows; out [rows, outputs] without gaps; bias [outputs], or null.
void polyshard_product(int kind, const void* x, int64_t stride, const void* packed, const void* bias,
                       void* out, int64_t rows, int64_t inputs, int64_t outputs, int threads) {
  constexpr decltype(&multiply_as<float>) kinds[] = {multiply_as<float>, multiply_as<Bfloat16>, multiply_as<Float16>};
  kinds[kind](x, stride, packed, bias, out, rows, inputs, outputs, threads);
}

}  // extern "C"
