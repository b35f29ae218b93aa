/* Duplicate pages become one, and a write makes them two again. Needs Linux 6.8 and the right to userfaultfd. */
#include <ksmu/ksmu.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int fail(const char *what) {
  perror(what);
  fprintf(stderr, "%s\n", ksmu_last_error());
  return 1;
}

int main(void) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = 1024, length = pages * page;
  char *const memory = ksmu_map(length, 0);
  if (memory == MAP_FAILED) return fail("ksmu_map");

  /* Four contents, each 256 times. */
  for (size_t i = 0; i < pages; ++i) memset(memory + i * page, 'a' + (int)(i % 4), page);

  const ssize_t merged = ksmu_merge(memory, length);
  if (merged < 0) return fail("ksmu_merge");
  struct ksmu_stats stats;
  if (ksmu_read_stats(&stats, sizeof stats) != 0) return fail("ksmu_read_stats");
  printf("%zd of %zu pages merged: %lld are kept, %lld are saved (%lld KiB)\n", merged, pages,
         (long long)stats.pages_shared, (long long)stats.pages_sharing,
         (long long)(stats.pages_sharing * (int64_t)page / 1024));

  memory[0] = 'X'; /* page 0 gets its own copy back; page 4 was its twin */
  const int written = memory[0] == 'X' && memory[1] == 'a' && memory[page - 1] == 'a';
  const int twin_kept = memory[4 * page] == 'a' && memcmp(memory + 4 * page, memory + 8 * page, page) == 0;
  printf("after a write to page 0: it reads %s, its twin is %s\n", written ? "as written" : "WRONG",
         twin_kept ? "unchanged" : "CHANGED");

  if (ksmu_unmap(memory, length) != 0) return fail("ksmu_unmap");
  return written && twin_kept && stats.pages_sharing > 0 ? 0 : 1;
}
