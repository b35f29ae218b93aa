// The hash by the machine's wider vectors, where it has them. x86-64 compilers assume SSE2 and no more, and the hash is
// computed in the library's header: half as fast as the machine can.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ksmu::content {

std::uint64_t HashPlain(const void* page, std::size_t bytes, std::uint64_t seed);
#ifdef KSMU_HAVE_AVX2
std::uint64_t HashAvx2(const void* page, std::size_t bytes, std::uint64_t seed);  // the same value
#endif

}  // namespace ksmu::content
