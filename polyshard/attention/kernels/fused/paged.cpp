// Attention of a batch of requests over the pages of their keys and values, forward alone and causal, in float32.
//
// The keys of a page lie transposed, `[dim, tokens]`, as a product by them wants them, and its values `[tokens, dim]`.
// Keys are taken in blocks that stay in the second cache while all of a task's queries pass over them; what a query has
// summed before is scaled to the largest score so far (Milakov and Gimelshein 2018, "Online normalizer calculation for
// softmax"; FlashAttention-2, arXiv:2307.08691). For few queries, as decoding has them, pages are read where they lie.
//
// One task is a key-value head of a slab of a request's queries, with all of its query heads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "blocks.h"

extern "C" {

// Pages `[pages, kv_heads, ...]` of keys and of values, both with these strides, in numbers.
struct Cache {
  const void *keys, *values;
  int64_t page, head, tokens;  // `tokens` of a page: a multiple of 32
};

// Request i has the queries `bounds[i]..bounds[i + 1]`, the last of its `seen[i]` keys. These lie in the pages of row i
// of `table`.
struct Requests {
  const int32_t *bounds, *seen, *table;
  int64_t count, row;
};

// A query sees the last `window` keys up to itself; 0 for all.
struct Heads {
  int64_t heads, kv_heads, dim, window;
  float scale;
};
}

namespace {

constexpr int64_t SLAB = 1536;         // rows of a task at most: queries times heads
constexpr int64_t THIN = 384;          // the same where threads would be idle
constexpr int64_t BLOCK = 32 * 1024;   // numbers of a block's keys
constexpr int64_t FEW = 2 * ROWS;      // rows for which nothing is laid
constexpr int64_t WHOLE = 32;          // tokens of whole registers in a page

// Queries of a request.
struct Slab {
  int64_t request, first, rows;
};

// What `seen` asks for.
struct Mask {
  int64_t shift, keys, window, causal;
};

template <typename T>
constexpr bool PAIRS = Term<T>::INPUTS == 2;

// A thread's memory.
struct Scratch {
  Buffer keys, values, weights, queries, sums, outs, largest, totals;

  Scratch(const Heads& heads, int64_t columns, int64_t rows, bool lays)
      : keys(buffer(lays ? heads.dim * columns : 0)),
        values(buffer(lays ? heads.dim * columns : 0)),
        weights(buffer(ROWS * columns)),
        queries(buffer(ROWS * heads.dim)),
        sums(buffer(ROWS * heads.dim)),
        outs(buffer(rows * heads.dim)),
        largest(buffer(rows)),
        totals(buffer(rows)) {}
};

// The rows of a slab are (query, head), and a tile of them has one head, or one query where queries are few.
struct Tile {
  int64_t query, head, rows;
  bool across;  // heads

  int64_t row(int64_t r, int64_t group) const {
    return across ? query * group + head + r : (query + r) * group + head;
  }
};

template <typename T>
class Task {
 public:
  Task(const Requests& requests, const Heads& heads, const Cache& cache, PackedOf<const T> q, PackedOf<T> out,
       Slab slab, int64_t kv, int64_t columns, Scratch& scratch)
      : heads_(heads),
        cache_(cache),
        slab_(slab),
        scratch_(scratch),
        kv_(kv),
        columns_(columns),
        group_(heads.heads / heads.kv_heads),
        table_(requests.table + slab.request * requests.row) {
    const int64_t begin = requests.bounds[slab.request], keys = requests.seen[slab.request];
    mask_ = {keys - (requests.bounds[slab.request + 1] - begin), keys, heads.window, 1};
    q_ = {q.at(begin, kv * group_), q.token, q.head};
    out_ = {out.at(begin, kv * group_), out.token, out.head};
  }

  void run() {
    const Seen all = seen(mask_, slab_.first, slab_.rows);
    const int64_t rows = slab_.rows * group_;
    std::fill_n(scratch_.largest.get(), rows, -std::numeric_limits<float>::infinity());
    std::fill_n(scratch_.totals.get(), rows, 0.0f);
    const bool few = rows <= FEW;
    const int64_t step = few ? cache_.tokens : columns_;
    for (int64_t from = all.low / step * step; from < all.high; from += step) {
      if (few) {
        const Seen block{from, std::min(from + step, all.high)};
        next_ = all.high - block.high > step / 2 ? block.high : 0;
        pass<float>(block, page(cache_.keys, from), cache_.tokens, page(cache_.values, from));
        continue;
      }
      const Seen block{std::max(from, all.low / WHOLE * WHOLE), std::min(from + step, all.high)};
      lay(block);
      if constexpr (PAIRS<T>)
        if (laid_in_pairs()) {
          pass<Row>(block, reinterpret_cast<const Row*>(scratch_.keys.get()), columns_, scratch_.values.get());
          continue;
        }
      pass<float>(block, scratch_.keys.get(), columns_, scratch_.values.get());
    }
  }

 private:
  using Row = typename Term<T>::Row;

  bool laid_in_pairs() const { return PAIRS<T> && heads_.dim % (2 * WIDTH) == 0; }

  const T* page(const void* cache, int64_t token) const {
    return static_cast<const T*>(cache) + table_[token / cache_.tokens] * cache_.page + kv_ * cache_.head;
  }

  // A block's keys and values, page by page, as they are multiplied; keys up to a whole register.
  void lay(Seen block) {
    const int64_t dim = heads_.dim, size = cache_.tokens;
    for (int64_t token = block.low; token < block.high;) {
      const int64_t in_page = token % size, to = token - block.low;
      const int64_t count = std::min(size - in_page, block.high - token);
      const T* keys = page(cache_.keys, token) + in_page;
      float* laid = scratch_.keys.get() + to;
      if constexpr (PAIRS<T>)
        for (int64_t d = 0; laid_in_pairs() && d < dim; d += 2)
          for (int64_t i = 0; i < count; i += WIDTH)
            store(laid + d / 2 * columns_ + i, paired(keys + d * size + i, keys + (d + 1) * size + i));
      if (!laid_in_pairs())
        for (int64_t d = 0; d < dim; d++)
          for (int64_t i = 0; i < count; i += WIDTH) store(laid + d * columns_ + i, load(keys + d * size + i));
      widen(page(cache_.values, token) + in_page * dim, dim, count, dim, scratch_.values.get() + to * dim);
      token += count;
    }
  }

  // All rows over a block of keys `[terms, columns]` and values `[keys, dim]`.
  template <typename A, typename B, typename V>
  void pass(Seen block, const B* keys, int64_t columns, const V* values) {
    const bool across = slab_.rows < ROWS && group_ > slab_.rows;
    const int64_t rows = across ? group_ : slab_.rows;
    for (int64_t first = 0; first < rows; first += ROWS)
      for (int64_t other = 0; other < (across ? slab_.rows : group_); other++) {
        const int64_t count = std::min<int64_t>(ROWS, rows - first);
        const Tile tile = across ? Tile{other, first, count, true} : Tile{first, other, count, false};
        attend<A>(tile, block, keys, columns, values);
      }
  }

  Seen seen_in(Seen block, int64_t query, int64_t rows) const {
    const Seen all = seen(mask_, slab_.first + query, rows);
    return {std::max(all.low, block.low) - block.low, std::min(all.high, block.high) - block.low};
  }

  template <typename A, typename B, typename V>
  void attend(Tile tile, Seen block, const B* keys, int64_t columns, const V* values) {
    const int64_t dim = heads_.dim, queries = tile.across ? 1 : tile.rows;
    Seen all = seen_in(block, tile.query, queries);
    if (all.low >= all.high) return;
    const Seen ever = seen(mask_, slab_.first + tile.query, queries);
    const bool begins = ever.low >= block.low, ends = ever.high <= block.high;
    all.low = all.low / WIDTH * WIDTH;
    float *weights = scratch_.weights.get(), *sums = scratch_.sums.get();
    const int64_t width = up(all.high, WIDTH) - all.low;
    if (!tile.across) {
      const int64_t token = slab_.first + tile.query + tile.rows;
      const int64_t next = std::min<int64_t>(ROWS, slab_.rows - tile.query - tile.rows);
      prefetch(q_.at(token, tile.head), q_.token, next, dim);
      if (ends) prefetch(out_.at(token, tile.head), out_.token, next, dim);
    }
    const int64_t terms = std::is_same_v<A, float> ? dim : dim / 2, next = next_;
    next_ = 0;
    with_next<A>(tile.rows, cache_.keys, next, [&](auto ahead) {
      product(tile.rows, rows_of<A>(tile), keys + all.low, columns, terms, weights + all.low, columns_, false, width,
              ahead);
    });
    float kept[ROWS];
    for (int64_t r = 0; r < tile.rows; r++) {
      const Seen one = seen_in(block, tile.query + (tile.across ? 0 : r), 1);
      float* row = weights + r * columns_;
      if (one.low >= one.high) {
        std::memset(row + all.low, 0, width * 4);
        kept[r] = 1;
        continue;
      }
      float &largest = scratch_.largest.get()[tile.row(r, group_)], &total = scratch_.totals.get()[tile.row(r, group_)];
      const float before = largest;
      float sum;
      softmax(row, heads_.scale, all, one, largest, sum);
      kept[r] = begins ? 0 : exponential(Vec{} + (before - largest))[0];
      total = total * kept[r] + sum;
    }
    with_next<A>(tile.rows, cache_.values, next, [&](auto ahead) {
      product<float>(tile.rows, {weights + all.low, columns_, 1}, values + all.low * dim, dim, all.high - all.low,
                     sums, dim, false, dim, ahead);
    });
    for (int64_t r = 0; r < tile.rows; r++) {
      const int64_t at = tile.row(r, group_);
      float* outs = scratch_.outs.get() + at * dim;
      const auto sum = [&](int64_t d) {
        const Vec more = load(sums + r * dim + d);
        return begins ? more : load(outs + d) * kept[r] + more;
      };
      if (ends) {
        T* to = tile.across ? out_.at(slab_.first + tile.query, tile.head + r)
                            : out_.at(slab_.first + tile.query + r, tile.head);
        const float factor = 1 / scratch_.totals.get()[at];
        for (int64_t d = 0; d < dim; d += WIDTH) store(to + d, sum(d) * factor);
      } else {
        for (int64_t d = 0; d < dim; d += WIDTH) store(outs + d, sum(d));
      }
    }
  }

  // A product, which asks for the page of token `next` while it is summed; 0 for none.
  template <typename A, typename Product>
  void with_next(int64_t rows, const void* cache, int64_t next, Product product) const {
    if constexpr (std::is_same_v<A, float>)
      if (next) {
        const char* bytes = reinterpret_cast<const char*>(page(cache, next));
        return product(Ahead{bytes, panel(rows) * WIDTH * (int64_t)sizeof(T)});
      }
    product(Nothing{});
  }

  // A tile's queries as a product takes them.
  template <typename A>
  StridedOf<A> rows_of(Tile tile) {
    const T* first = q_.at(slab_.first + tile.query, tile.head);
    const int64_t row = tile.across ? q_.head : q_.token, dim = heads_.dim;
    float* to = scratch_.queries.get();
    if constexpr (!std::is_same_v<A, float>) {
      for (int64_t r = 0; r < tile.rows; r++)
        for (int64_t d = 0; d < dim; d += 2 * WIDTH) store(to + (r * dim + d) / 2, exchanged(first + r * row + d));
      return {reinterpret_cast<const A*>(to), dim / 2, 1};
    } else if constexpr (std::is_same_v<T, float>) {
      return {first, row, 1};
    } else {
      widen(first, row, tile.rows, dim, to);
      return {to, dim, 1};
    }
  }

  int64_t next_ = 0;  // a token of the page after this one, until a tile has asked for it
  const Heads& heads_;
  const Cache& cache_;
  Slab slab_;
  Scratch& scratch_;
  int64_t kv_, columns_, group_;
  const int32_t* table_;
  Mask mask_;
  PackedOf<const T> q_;
  PackedOf<T> out_;
};

template <typename T>
void forward(const Requests& requests, const Heads& heads, const Cache& cache, const void* q, const void* out,
             int64_t threads) {
  const int64_t group = heads.heads / heads.kv_heads, tasks = requests.count * heads.kv_heads;
  const int64_t most = std::max<int64_t>((tasks < 4 * threads ? THIN : SLAB) / group / ROWS, 1) * ROWS;
  const int64_t columns = up(BLOCK / heads.dim, cache.tokens);
  std::vector<Slab> slabs;
  int64_t rows = 0;
  for (int64_t i = 0; i < requests.count; i++)
    for (int64_t first = 0, all = requests.bounds[i + 1] - requests.bounds[i]; first < all; first += most) {
      slabs.push_back({i, first, std::min(most, all - first)});
      rows = std::max(rows, slabs.back().rows * group);
    }
  const auto q_of = *static_cast<const PackedOf<const T>*>(q);
  const auto out_of = *static_cast<const PackedOf<T>*>(out);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(heads, columns, rows, rows > FEW);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < (int64_t)slabs.size() * heads.kv_heads; task++) {
      const Slab slab = slabs[task / heads.kv_heads];
      Task<T>(requests, heads, cache, q_of, out_of, slab, task % heads.kv_heads, columns, scratch).run();
    }
  }
}

}  // namespace

extern "C" {

// Fills `out` `[queries, heads, dim]`, Packed as q is. kind, of all: 0 float32, 1 bfloat16, 2 float16.
void polyshard_attention_paged(int kind, const Requests* requests, const Heads* heads, const Cache* cache,
                               const void* q, const void* out, int64_t threads) {
  constexpr decltype(&forward<float>) kinds[] = {forward<float>, forward<Bfloat16>, forward<Float16>};
  kinds[kind](*requests, *heads, *cache, q, out, threads);
}
}
