// The layout of requests' keys and values in a paged KV cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "blocks.h"

extern "C" {

// Pages `[pages, kv_heads, ...]` of keys and of values, both with these strides, in elements.
struct Cache {
  const void *keys, *values;
  int64_t page, head, tokens;  // `tokens` per page: a multiple of 32
};

// Request i has queries `bounds[i]..bounds[i + 1]`, which are the last of its `seen[i]` keys. Its keys are in the pages
// of row i of `table`.
struct Requests {
  const int32_t *bounds, *seen, *table;
  int64_t count, row;
};
}

namespace {

constexpr int64_t WHOLE = 32;  // number of tokens in a page is a multiple of this, which fills whole registers

// One key/value head in the pages of one request.
template <typename T>
struct PagesOf {
  const Cache& cache;
  const int32_t* table;
  int64_t head, dim;

  const T* keys_at(int64_t token) const { return page(cache.keys, token) + token % cache.tokens; }
  const T* values_at(int64_t token) const { return page(cache.values, token) + token % cache.tokens * dim; }

  // Calls each(token, count) for the part of `tokens` in each page.
  template <typename Each>
  void by_page(Seen tokens, Each each) const {
    for (int64_t token = tokens.low; token < tokens.high;) {
      const int64_t count = std::min(cache.tokens - token % cache.tokens, tokens.high - token);
      each(token, count);
      token += count;
    }
  }

 private:
  const T* page(const void* all, int64_t token) const {
    return static_cast<const T*>(all) + table[token / cache.tokens] * cache.page + head * cache.head;
  }
};

}  // namespace
