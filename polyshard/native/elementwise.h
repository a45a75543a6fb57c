// Rows that are computed one register at a time; the last register of a row may be filled in part.
#pragma once

#include <algorithm>

#include "registers.h"

namespace {

// A register of a row, filled up with zeros, in memory of its own.
template <typename T>
struct Filled {
  alignas(64) T data[WIDTH] = {};

  Filled() = default;
  Filled(const T* from, int64_t count) { std::copy(from, from + count, data); }
};

// Sums of(load(a + i), load(b + i)) over a row; zeros must contribute zero.
template <typename T, typename Of>
float sum_over(const T* a, const T* b, int64_t size, Of of) {
  constexpr int LANES = Sums::LANES, PARTS = Sums::PARTS;
  Sums sums;
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    for (int p = 0; p < PARTS; p++) sums.parts[p] += of(load(a + i + p * WIDTH), load(b + i + p * WIDTH));
  for (int p = 0; i < size; i += WIDTH, p++) {
    const Filled<T> left(a + i, std::min<int64_t>(WIDTH, size - i)), right(b + i, std::min<int64_t>(WIDTH, size - i));
    sums.parts[p] += of(load(left.data), load(right.data));
  }
  return sums.total();
}

}  // namespace
