// Attention of packed sequences in float32, forward and backward, in blocks of rows that stay in registers.
//
// Meant for short sequences: a BLAS library takes longer to start a 64 x 64 matmul, and torch to write its result, than
// the matmul itself takes. Here the scores of a few rows are multiplied, masked, exponentiated and multiplied again
// before they leave the L1 cache, and blocks that are masked completely are skipped.
//
// The backward pass recomputes the weights from the logsumexp (FlashAttention, arXiv:2205.14135, appendix B).
// A task is one key/value head of one sequence with all of its query heads, so tasks share no output memory.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "blocks.h"

namespace {

constexpr int64_t TILE = 16 * ROWS;  // queries whose weights the backward pass keeps at the same time

}  // namespace

extern "C" {

// `count` consecutive sequences of equal lengths; `seen` defines which keys a query sees.
struct Run {
  int64_t count, rows, keys, shift, heads, kv_heads, dim, value_dim, causal, window, threads;
  float scale;
};
}

namespace {

// `[keys, dim]` to `[dim, columns]`, multiplied by `factor` and padded with zeros.
void transpose(const float* from, int64_t row, int64_t keys, int64_t dim, float factor, float* to, int64_t columns) {
  for (int64_t k = 0; k < keys; k += WIDTH)
    for (int64_t d = 0; d < dim; d += WIDTH) {
      Vec block[WIDTH];
      for (int64_t i = 0; i < WIDTH; i++) block[i] = k + i < keys ? load(from + (k + i) * row + d) * factor : Vec{};
      transpose_block(block);
      for (int64_t i = 0; i < WIDTH; i++) store(to + (d + i) * columns + k, block[i]);
    }
}

// Scratch memory of one thread in the forward pass.
struct Forward {
  Buffer keys, weights, sums;

  explicit Forward(const Run& run)
      : keys(buffer(run.dim * up(run.keys, WIDTH))),
        weights(buffer(ROWS * up(run.keys, WIDTH))),
        sums(buffer(ROWS * run.value_dim)) {}
};

void forward_task(const Run& run, Packed q, Packed k, Packed v, Packed out, Packed lse, int64_t sequence, int64_t kv,
                  Forward& scratch) {
  const int64_t columns = up(run.keys, WIDTH), group = run.heads / run.kv_heads, key = sequence * run.keys;
  transpose(k.at(key, kv), k.token, run.keys, run.dim, run.scale, scratch.keys.get(), columns);
  const float* values = v.at(key, kv);
  float *weights = scratch.weights.get(), *weighted = scratch.sums.get();
  for (int64_t first = 0; first < run.rows; first += ROWS) {
    const int64_t rows = std::min<int64_t>(ROWS, run.rows - first), token = sequence * run.rows + first;
    const Seen all = seen_by(run, first, rows);
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
      float *to = out.at(token, head), *sums = lse.at(token, head);
      if (!all.high) {
        for (int64_t r = 0; r < rows; r++) {
          std::memset(to + r * out.token, 0, run.value_dim * 4);
          sums[r * lse.token] = -std::numeric_limits<float>::infinity();
        }
        continue;
      }
      const int64_t width = up(all.high, WIDTH) - all.low;
      product<float>(rows, {q.at(token, head), q.token, 1}, scratch.keys.get() + all.low, columns, run.dim,
                     weights + all.low, columns, false, width);
      const int64_t next = std::min<int64_t>(ROWS, run.rows - first - rows);
      prefetch(q.at(token + rows, head), q.token, next, run.dim);
      prefetch(to + rows * out.token, out.token, next, run.value_dim);
      float factor[ROWS];
      for (int64_t r = 0; r < rows; r++) {
        const Seen one = seen(run, first + r);
        float largest = -std::numeric_limits<float>::infinity(), total = 0;
        if (one.high)
          softmax(weights + r * columns, 1, all, one, largest, total);
        else
          std::memset(weights + r * columns + all.low, 0, width * 4);
        factor[r] = one.high ? 1 / total : 0;
        sums[r * lse.token] = one.high ? largest + std::log(total) : -std::numeric_limits<float>::infinity();
      }
      product<float>(rows, {weights + all.low, columns, 1}, values + all.low * v.token, v.token, all.high - all.low,
                     weighted, run.value_dim, false, run.value_dim);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < run.value_dim; d += WIDTH)
          store(to + r * out.token + d, load(weighted + r * run.value_dim + d) * factor[r]);
    }
  }
}

struct Scratch {
  Buffer keys, values, weights, gradients;
};

void backward_task(const Run& run, Packed grad, Packed q, Packed k, Packed v, Packed out, Packed lse, Packed grad_q,
                   Packed grad_k, Packed grad_v, int64_t sequence, int64_t kv, Scratch& scratch) {
  const int64_t columns = up(run.keys, WIDTH), group = run.heads / run.kv_heads, token = sequence * run.keys;
  const float* keys = k.data + token * k.token + kv * k.head;
  const float* values = v.data + token * v.token + kv * v.head;
  float* to_k = grad_k.data + token * grad_k.token + kv * grad_k.head;
  float* to_v = grad_v.data + token * grad_v.token + kv * grad_v.head;
  const auto clear = [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j++) {
      std::memset(to_k + j * grad_k.token, 0, run.dim * 4);
      std::memset(to_v + j * grad_v.token, 0, run.value_dim * 4);
    }
  };
  transpose(keys, k.token, run.keys, run.dim, run.scale, scratch.keys.get(), columns);
  transpose(values, v.token, run.keys, run.value_dim, 1, scratch.values.get(), columns);
  for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
    for (int64_t tile = 0; tile < run.rows; tile += TILE) {
      const int64_t end = std::min(run.rows, tile + TILE);
      int64_t low = run.keys, high = 0;
      for (int64_t first = tile; first < end; first += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, end - first), at = sequence * run.rows + first;
        const Seen all = seen_by(run, first, rows);
        const float* queries = q.data + at * q.token + head * q.head;
        const float* grads = grad.data + at * grad.token + head * grad.head;
        const float* outs = out.data + at * out.token + head * out.head;
        float* to_q = grad_q.data + at * grad_q.token + head * grad_q.head;
        if (!all.high) {
          for (int64_t r = 0; r < rows; r++) std::memset(to_q + r * grad_q.token, 0, run.dim * 4);
          continue;
        }
        low = std::min(low, all.low), high = std::max(high, all.high);
        const int64_t next = std::min<int64_t>(ROWS, end - first - rows);
        const int64_t width = up(all.high, WIDTH) - all.low;
        float* weights = scratch.weights.get() + (first - tile) * columns;
        float* gradients = scratch.gradients.get() + (first - tile) * columns;
        prefetch(queries + rows * q.token, q.token, next, run.dim);
        product<float>(rows, {queries, q.token, 1}, scratch.keys.get() + all.low, columns, run.dim,
                       weights + all.low, columns, false, width);
        prefetch(grads + rows * grad.token, grad.token, next, run.value_dim);
        product<float>(rows, {grads, grad.token, 1}, scratch.values.get() + all.low, columns, run.value_dim,
                gradients + all.low, columns, false, width);
        for (int64_t r = 0; r < rows; r++) {
          const Seen one = seen(run, first + r);
          float *p = weights + r * columns, *g = gradients + r * columns;
          if (!one.high) {
            std::memset(p + all.low, 0, width * 4);
            std::memset(g + all.low, 0, width * 4);
            continue;
          }
          Vec dot{};
          for (int64_t d = 0; d < run.value_dim; d += WIDTH)
            dot += load(grads + r * grad.token + d) * load(outs + r * out.token + d);
          const float delta = sum_of(dot), total = lse.data[(at + r) * lse.token + head * lse.head];
          for (int64_t c = all.low; c < all.high; c += WIDTH) {
            const Vec x = where(visible(one, c), exponential(load(p + c) - total));
            store(p + c, x);
            store(g + c, (load(g + c) - delta) * x * run.scale);
          }
          // A block of keys may extend into the adjacent register, which must therefore be zero.
          for (const int64_t c : {all.low - WIDTH, up(all.high, WIDTH)})
            if (c >= 0 && c < columns) store(p + c, Vec{}), store(g + c, Vec{});
        }
        prefetch(outs + rows * out.token, out.token, next, run.value_dim);
        product<float>(rows, {gradients + all.low, columns, 1}, keys + all.low * k.token, k.token,
                       all.high - all.low, to_q, grad_q.token, false, run.dim);
      }
      // Both gradients of a key are sums over the rows that see it; the first tile of the first head overwrites them.
      const bool add = head != kv * group || tile != 0;
      if (!add) clear(0, std::min(low, run.keys)), clear(std::max(low, high), run.keys);
      for (int64_t j = low; j < high; j += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, high - j);
        int64_t from = tile, to = end;
        if (run.causal) from = std::max(from, j - run.shift);
        else if (run.window > 0) from = std::max(from, j - run.shift - run.window + 1);
        if (run.window > 0) to = std::min(to, j + rows - 1 - run.shift + run.window);
        if (from >= to) {
          if (!add) clear(j, j + rows);
          continue;
        }
        const float* p = scratch.weights.get() + (from - tile) * columns + j;
        const float* g = scratch.gradients.get() + (from - tile) * columns + j;
        const int64_t at = sequence * run.rows + from;
        product<float>(rows, {p, 1, columns}, grad.data + at * grad.token + head * grad.head, grad.token, to - from,
                to_v + j * grad_v.token, grad_v.token, add, run.value_dim);
        product<float>(rows, {g, 1, columns}, q.data + at * q.token + head * q.head, q.token, to - from,
                to_k + j * grad_k.token, grad_k.token, add, run.dim);
      }
    }
  }
}

}  // namespace

extern "C" {

// Writes `out` and `lse`.
void polyshard_attention_forward(const Run* run, const Packed* q, const Packed* k, const Packed* v, const Packed* out,
                                 const Packed* lse) {
#pragma omp parallel num_threads(run->threads)
  {
    Forward scratch(*run);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < run->count * run->kv_heads; task++)
      forward_task(*run, *q, *k, *v, *out, *lse, task / run->kv_heads, task % run->kv_heads, scratch);
  }
}

// Writes the three gradients; `out` and `lse` are those of the full softmax, of which these keys may be a part.
void polyshard_attention_backward(const Run* run, const Packed* grad, const Packed* q, const Packed* k, const Packed* v,
                                  const Packed* out, const Packed* lse, const Packed* grad_q, const Packed* grad_k,
                                  const Packed* grad_v) {
  const int64_t columns = up(run->keys, WIDTH);
#pragma omp parallel num_threads(run->threads)
  {
    Scratch scratch{buffer(run->dim * columns), buffer(run->value_dim * columns), buffer(TILE * columns),
                    buffer(TILE * columns)};
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < run->count * run->kv_heads; task++)
      backward_task(*run, *grad, *q, *k, *v, *out, *lse, *grad_q, *grad_k, *grad_v, task / run->kv_heads,
                    task % run->kv_heads, scratch);
  }
}
}
