#include "content/content.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstring>

#include "content/hash_avx2.h"

namespace ksmu::content {

std::uint64_t Hash(const void* page, std::size_t bytes, std::uint64_t seed) {
#ifdef KSMU_HAVE_AVX2
  if (__builtin_cpu_supports("avx2")) return HashAvx2(page, bytes, seed);
#endif
  return HashPlain(page, bytes, seed);
}

std::uint64_t HashPlain(const void* page, std::size_t bytes, std::uint64_t seed) {
  return XXH3_64bits_withSeed(page, bytes, seed);
}

bool IsZero(const void* page, std::size_t bytes) {
  // Almost every page differs from zero within its first words; memcmp against itself, one word on, does the rest.
  const auto* p = static_cast<const unsigned char*>(page);
  std::uint64_t first;
  std::memcpy(&first, p, sizeof first);
  return first == 0 && std::memcmp(p, p + sizeof first, bytes - sizeof first) == 0;
}

bool Equal(const void* a, const void* b, std::size_t bytes) { return std::memcmp(a, b, bytes) == 0; }

}  // namespace ksmu::content
