// The longest run of places of [from, end) for which `is_free(place)`: where it starts and how long it is; the first of equal ones.
#pragma once

#include <cstddef>

namespace ksmu::base {

struct Stretch {
  std::size_t start = 0, count = 0;
};

template <typename F>
Stretch LongestRun(std::size_t from, std::size_t end, F&& is_free) {
  Stretch best;
  for (std::size_t i = from; i < end;) {
    if (!is_free(i)) {
      ++i;
      continue;
    }
    const std::size_t start = i;
    while (i < end && is_free(i)) ++i;
    if (i - start > best.count) best = {start, i - start};
  }
  return best;
}

}  // namespace ksmu::base
