// Page contents: seeded fills, and how much of a set of contents can be saved at all.
#ifndef KSMU_EXAMPLES_PAGES_H_
#define KSMU_EXAMPLES_PAGES_H_

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace examples {

inline size_t PageSize() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

// SplitMix64: one step. Good enough to derive independent seeds from a seed and a number.
inline uint64_t Mix(uint64_t seed, uint64_t number) {
  uint64_t z = seed + (number + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Different seeds give different pages: the first word is a bijection of the seed.
inline void FillPage(unsigned char* page, uint64_t seed) {
  uint64_t state = Mix(seed, 0) | 1;  // xorshift must not start from 0
  memcpy(page, &seed, sizeof seed);
  for (size_t i = sizeof seed; i < PageSize(); i += sizeof state) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    memcpy(page + i, &state, sizeof state);
  }
}

// A key of the content for Attainable(): 0 for a page of zeros.
inline uint64_t ContentKey(const unsigned char* page) {
  if (page[0] == 0 && memcmp(page, page + 1, PageSize() - 1) == 0) return 0;
  return std::hash<std::string_view>{}({reinterpret_cast<const char*>(page), PageSize()}) | 1;
}

struct Attainable {
  uint64_t pages = 0;       // in all
  uint64_t zero = 0;        // reads as zeros: needs no memory
  uint64_t duplicates = 0;  // one copy of each content (for max_page_sharing places each) subtracted
  uint64_t total() const { return zero + duplicates; }
};

// What merging could save at best. One key a page, equal if and only if the content is; 0: zeros.
inline Attainable CountAttainable(std::vector<uint64_t> keys, uint64_t max_page_sharing) {
  Attainable result{.pages = keys.size()};
  std::sort(keys.begin(), keys.end());
  for (size_t i = 0, end; i < keys.size(); i = end) {
    end = static_cast<size_t>(std::upper_bound(keys.begin() + static_cast<ptrdiff_t>(i), keys.end(), keys[i]) -
                              keys.begin());
    const uint64_t count = end - i;
    if (keys[i] == 0) {
      result.zero += count;
    } else {
      result.duplicates += count - (count + max_page_sharing - 1) / max_page_sharing;
    }
  }
  return result;
}

}  // namespace examples

#endif  // KSMU_EXAMPLES_PAGES_H_
