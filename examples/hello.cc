// Duplicate pages become one, and a write makes them two again. Needs Linux 6.8 and the right to userfaultfd.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <ksmu/ksmu.hpp>

int main() try {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t pages = 1024;
  const ksmu::Region region(pages * page);  // unmapped at the end of its life
  const auto page_of = [&](std::size_t i) { return region.bytes().subspan(i * page, page); };

  // Four contents, each 256 times.
  for (std::size_t i = 0; i < pages; ++i) std::ranges::fill(page_of(i), static_cast<std::byte>('a' + i % 4));

  const std::size_t merged = region.merge();
  const ksmu_stats stats = ksmu::stats();
  std::printf("%zu of %zu pages merged: %lld are kept, %lld are saved (%lld KiB)\n", merged, pages,
              static_cast<long long>(stats.pages_shared), static_cast<long long>(stats.pages_sharing),
              static_cast<long long>(stats.pages_sharing) * static_cast<long long>(page) / 1024);

  page_of(0)[0] = std::byte{'X'};  // page 0 gets its own copy back; page 4 was its twin
  const bool written = page_of(0)[0] == std::byte{'X'} && page_of(0)[1] == std::byte{'a'};
  const bool twin_kept = page_of(4)[0] == std::byte{'a'} && std::ranges::equal(page_of(4), page_of(8));
  std::printf("after a write to page 0: it reads %s, its twin is %s\n", written ? "as written" : "WRONG",
              twin_kept ? "unchanged" : "CHANGED");
  return written && twin_kept && stats.pages_sharing > 0 ? 0 : 1;
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());  // includes the sentence of ksmu_last_error()
  return 1;
}
