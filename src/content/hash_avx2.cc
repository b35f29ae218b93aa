// Compiled with -mavx2, and so without any header whose inline functions other files share: the linker would be free to
// choose this file's copy of one for machines that have no AVX2.
#include "content/hash_avx2.h"

#ifdef KSMU_HAVE_AVX2
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace ksmu::content {

std::uint64_t HashAvx2(const void* page, std::size_t bytes, std::uint64_t seed) {
  return XXH3_64bits_withSeed(page, bytes, seed);
}

}  // namespace ksmu::content
#endif
