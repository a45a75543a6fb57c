// Attention of a batch of requests over a paged KV cache; forward only, causal, in float32.
//
// The keys of a page are stored transposed, `[dim, tokens]`, as the matmul reads them, and its values as `[tokens,
// dim]`. Keys are processed in blocks that stay in the L2 cache while all queries of a task pass over them; the
// previous sums of a query are rescaled to the largest score so far (Milakov and Gimelshein 2018, "Online normalizer
// calculation for softmax"; FlashAttention-2, arXiv:2307.08691). For few queries, as in decoding, pages are read in
// place.
//
// The result of a query depends only on its sequence, bit for bit, for every register width: blocks are aligned to key
// positions, sums are added key by key, and masked keys contribute zero. Exact mode therefore uses this kernel.
//
// A task is one key/value head of a slab of a request's queries, with all of its query heads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "pages.h"

extern "C" {

// A query sees the last `window` keys up to its own position; 0 means all. A score is `scale` q·k, then bounded by
// `softcap` (0 for none), then reduced by the head's slope times the distance, if there are slopes.
struct Heads {
  int64_t heads, kv_heads, dim, window;
  float scale, softcap;
  const float* slopes;
};
}

namespace {

// Optional arguments of a call, or null: a logit of each head without a value, `[heads]`; the output for the logsumexp,
// `[queries, heads]`.
struct Extras {
  const float* sinks;
  const Packed* logsumexp;
};

constexpr int64_t SLAB = 1536;         // maximum number of rows of a task: queries times heads
constexpr int64_t THIN = 384;          // the same if threads would otherwise be idle
constexpr int64_t BLOCK = 32 * 1024;   // approximate number of elements of a block's keys
constexpr int64_t FEW = 2 * ROWS;      // number of rows up to which blocks are not copied

// A range of queries of a request.
struct Slab {
  int64_t request, first, rows;
};

// The arguments of `seen`.
struct Mask {
  int64_t shift, keys, window, causal;
};

template <typename T>
constexpr bool PAIRS = Term<T>::INPUTS == 2;

// Scratch memory of one thread.
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

// The rows of a slab are (query, head) pairs. A tile of rows has one head, or one query if there are few queries.
struct Tile {
  int64_t query, head, rows;
  bool across;  // whether the rows are heads of one query

  int64_t query_of(int64_t r) const { return across ? query : query + r; }
  int64_t head_of(int64_t r) const { return across ? head + r : head; }
  int64_t row(int64_t r, int64_t group) const { return query_of(r) * group + head_of(r); }
};

template <typename T>
class Task {
 public:
  Task(const Requests& requests, const Heads& heads, const Cache& cache, PackedOf<const T> q, PackedOf<T> out,
       Extras extras, Slab slab, int64_t kv, int64_t columns, Scratch& scratch)
      : heads_(heads),
        slab_(slab),
        scratch_(scratch),
        extras_(extras),
        plain_(heads.softcap == 0 && !heads.slopes),
        kv_(kv),
        columns_(columns),
        group_(heads.heads / heads.kv_heads),
        begin_(requests.bounds[slab.request]),
        pages_{cache, requests.table + slab.request * requests.row, kv, heads.dim} {
    const int64_t keys = requests.seen[slab.request];
    mask_ = {keys - (requests.bounds[slab.request + 1] - begin_), keys, heads.window, 1};
    q_ = {q.at(begin_, kv * group_), q.token, q.head};
    out_ = {out.at(begin_, kv * group_), out.token, out.head};
  }

  void run() {
    const Seen all = seen(mask_, slab_.first, slab_.rows);
    const int64_t rows = slab_.rows * group_;
    std::fill_n(scratch_.largest.get(), rows, -std::numeric_limits<float>::infinity());
    std::fill_n(scratch_.totals.get(), rows, 0.0f);
    end_ = all.high;
    for (int64_t from = all.low / columns_ * columns_; from < all.high; from += columns_) {
      const Seen block{std::max(from, all.low / WHOLE * WHOLE), std::min(from + columns_, all.high)};
      if (rows <= FEW) {
        fetches_ = true;
        pass<float>(block, InPages{});
        continue;
      }
      lay(block);
      if constexpr (PAIRS<T>)
        if (laid_in_pairs()) {
          pass<Row>(block, Laid<Row>{reinterpret_cast<const Row*>(scratch_.keys.get()), scratch_.values.get()});
          continue;
        }
      pass<float>(block, Laid<float>{scratch_.keys.get(), scratch_.values.get()});
    }
  }

 private:
  using Row = typename Term<T>::Row;

  // Sources of a block: keys `[terms, columns]` and values `[keys, dim]` copied together, or read in their pages.
  template <typename B>
  struct Laid {
    const B* keys;
    const float* values;
  };
  struct InPages {};

  bool laid_in_pairs() const { return PAIRS<T> && heads_.dim % (2 * WIDTH) == 0; }

  // Copies a block's keys and values, page by page, into the layout of the matmul; keys up to a full register.
  void lay(Seen block) {
    const int64_t dim = heads_.dim, size = pages_.cache.tokens;
    pages_.by_page(block, [&](int64_t token, int64_t count) {
      const T* keys = pages_.keys_at(token);
      float* laid = scratch_.keys.get() + token - block.low;
      if constexpr (PAIRS<T>)
        for (int64_t d = 0; laid_in_pairs() && d < dim; d += 2)
          for (int64_t i = 0; i < count; i += WIDTH)
            store(laid + d / 2 * columns_ + i, paired(keys + d * size + i, keys + (d + 1) * size + i));
      if (!laid_in_pairs())
        for (int64_t d = 0; d < dim; d++)
          for (int64_t i = 0; i < count; i += WIDTH) store(laid + d * columns_ + i, load(keys + d * size + i));
      widen(pages_.values_at(token), dim, count, dim, scratch_.values.get() + (token - block.low) * dim);
    });
  }

  // Processes all rows over a block.
  template <typename A, typename Source>
  void pass(Seen block, Source source) {
    const bool across = slab_.rows < ROWS && group_ > slab_.rows;
    const int64_t rows = across ? group_ : slab_.rows;
    for (int64_t first = 0; first < rows; first += ROWS)
      for (int64_t other = 0; other < (across ? slab_.rows : group_); other++) {
        const int64_t count = std::min<int64_t>(ROWS, rows - first);
        attend<A>(across ? Tile{other, first, count, true} : Tile{first, other, count, false}, block, source);
      }
  }

  Seen seen_in(Seen block, int64_t query, int64_t rows) const {
    const Seen all = seen(mask_, slab_.first + query, rows);
    return {std::max(all.low, block.low) - block.low, std::min(all.high, block.high) - block.low};
  }

  template <typename A, typename Source>
  void attend(Tile tile, Seen block, Source source) {
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
    score(tile.rows, rows_of<A>(tile), source, block, all);
    float kept[ROWS];
    for (int64_t r = 0; r < tile.rows; r++) {
      const Seen one = seen_in(block, tile.query_of(r), 1);
      float* row = weights + r * columns_;
      if (one.low >= one.high) {
        std::memset(row + all.low, 0, width * 4);
        kept[r] = 1;
        continue;
      }
      float &largest = scratch_.largest.get()[tile.row(r, group_)], &total = scratch_.totals.get()[tile.row(r, group_)];
      const float before = largest;
      if (!plain_)
        finish(row, all, tile.head_of(r), slab_.first + tile.query_of(r) + mask_.shift - block.low);
      float sum;
      softmax(row, plain_ ? heads_.scale : 1, all, one, largest, sum);
      kept[r] = begins ? 0 : exponential(Vec{} + (before - largest))[0];
      total = total * kept[r] + sum;
    }
    add_up(tile.rows, source, block, all);
    fetches_ = false;
    for (int64_t r = 0; r < tile.rows; r++) {
      const int64_t at = tile.row(r, group_);
      float* outs = scratch_.outs.get() + at * dim;
      const auto summed = [&](int64_t d) {
        const Vec more = load(sums + r * dim + d);
        return begins ? more : load(outs + d) * kept[r] + more;
      };
      if (ends) {
        const int64_t head = kv_ * group_ + tile.head_of(r);
        float largest = scratch_.largest.get()[at], total = scratch_.totals.get()[at], factor = 1 / total;
        if (extras_.sinks) {
          const float sink = extras_.sinks[head], top = std::max(largest, sink);
          const Vec ours = exponential(Vec{} + (largest - top)), its = exponential(Vec{} + (sink - top));
          largest = top, total = total * ours[0] + its[0], factor = ours[0] / total;
        }
        T* to = out_.at(slab_.first + tile.query_of(r), tile.head_of(r));
        for (int64_t d = 0; d < dim; d += WIDTH) store(to + d, summed(d) * factor);
        if (extras_.logsumexp)
          *extras_.logsumexp->at(begin_ + slab_.first + tile.query_of(r), head) = largest + std::log(total);
      } else {
        for (int64_t d = 0; d < dim; d += WIDTH) store(outs + d, summed(d));
      }
    }
  }

  // Completes the scores of a row with softcap or slopes; `distance` is that of its query from column 0.
  void finish(float* row, Seen all, int64_t head, int64_t distance) const {
    const float slope = heads_.slopes ? heads_.slopes[kv_ * group_ + head] : 0;
    for (int64_t c = all.low; c < all.high; c += WIDTH) {
      Vec x = load(row + c) * heads_.scale;
      if (heads_.softcap != 0) x = tangent(x / heads_.softcap) * heads_.softcap;
      store(row + c, x - slope * __builtin_convertvector((int32_t)(distance - c) - lanes(), Vec));
    }
  }

  // Computes the scores of columns `all` of a block: queries times keys.
  template <typename B>
  void score(int64_t rows, StridedOf<B> queries, Laid<B> laid, Seen, Seen all) {
    const int64_t terms = std::is_same_v<B, float> ? heads_.dim : heads_.dim / 2;
    product(rows, queries, laid.keys + all.low, columns_, terms, scratch_.weights.get() + all.low, columns_, false,
            up(all.high, WIDTH) - all.low);
  }
  void score(int64_t rows, StridedOf<float> queries, InPages, Seen block, Seen all) {
    const Seen tokens{block.low + all.low, block.low + all.high};
    pages_.by_page(tokens, [&](int64_t token, int64_t count) {
      fetching(rows, token + count, [&](int64_t next) { return pages_.keys_at(next); }, [&](auto ahead) {
        product(rows, queries, pages_.keys_at(token), pages_.cache.tokens, heads_.dim,
                scratch_.weights.get() + token - block.low, columns_, false, up(count, WIDTH), ahead);
      });
    });
  }

  // Sums a block's values with those weights.
  template <typename B>
  void add_up(int64_t rows, Laid<B> laid, Seen, Seen all) {
    product<float>(rows, {scratch_.weights.get() + all.low, columns_, 1}, laid.values + all.low * heads_.dim,
                   heads_.dim, all.high - all.low, scratch_.sums.get(), heads_.dim, false, heads_.dim);
  }
  void add_up(int64_t rows, InPages, Seen block, Seen all) {
    const Seen tokens{block.low + all.low, block.low + all.high};
    pages_.by_page(tokens, [&](int64_t token, int64_t count) {
      fetching(rows, token + count, [&](int64_t next) { return pages_.values_at(next); }, [&](auto ahead) {
        product<float>(rows, {scratch_.weights.get() + token - block.low, columns_, 1}, pages_.values_at(token),
                       heads_.dim, count, scratch_.sums.get(), heads_.dim, token != tokens.low, heads_.dim, ahead);
      });
    });
  }

  // Runs a matmul and prefetches the page of token `next`, unless a tile has already prefetched this block's pages.
  template <typename At, typename Product>
  void fetching(int64_t rows, int64_t next, At at, Product product) const {
    if (!fetches_ || end_ - next <= pages_.cache.tokens / 2) return product(Nothing{});
    product(Ahead{reinterpret_cast<const char*>(at(next)), panel(rows) * WIDTH * (int64_t)sizeof(T)});
  }

  // The queries of a tile in the layout of the matmul.
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

  bool fetches_ = false;  // until a tile has prefetched a block's pages
  int64_t end_ = 0;       // one past the last key that any query sees
  const Heads& heads_;
  Slab slab_;
  Scratch& scratch_;
  Extras extras_;
  bool plain_;
  int64_t kv_, columns_, group_, begin_;
  PagesOf<T> pages_;
  Mask mask_;
  PackedOf<const T> q_;
  PackedOf<T> out_;
};

template <typename T>
void forward(const Requests& requests, const Heads& heads, const Cache& cache, const void* q, const void* out,
             Extras extras, int64_t threads) {
  const int64_t group = heads.heads / heads.kv_heads, tasks = requests.count * heads.kv_heads;
  const int64_t most = std::max<int64_t>((tasks < 4 * threads ? THIN : SLAB) / group / ROWS, 1) * ROWS;
  const int64_t columns = up(BLOCK / heads.dim, WHOLE);
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
      Task<T>(requests, heads, cache, q_of, out_of, extras, slab, task % heads.kv_heads, columns, scratch).run();
    }
  }
}

}  // namespace

extern "C" {

// Writes `out` `[queries, heads, dim]`, packed like q. kind: dtype of both and of the cache: 0 float32, 1 bfloat16,
// 2 float16. `sinks` and `logsumexp`: see Extras.
void polyshard_attention_paged(int kind, const Requests* requests, const Heads* heads, const Cache* cache,
                               const void* q, const void* out, const float* sinks, const Packed* logsumexp,
                               int64_t threads) {
  constexpr decltype(&forward<float>) kinds[] = {forward<float>, forward<Bfloat16>, forward<Float16>};
  kinds[kind](*requests, *heads, *cache, q, out, {sinks, logsumexp}, threads);
}
}
