/* A program that knows ksmu only as installed. It needs no right to use userfaultfd: bad advice is refused before the
 * library starts anything. */
#include <errno.h>
#include <ksmu/ksmu.h>
#include <stdio.h>
#include <string.h>

static int refused(int result, const char *what) {
  if (result == -1 && errno == EINVAL) return 1;
  fprintf(stderr, "%s: result %d, errno %d, expected -1 and EINVAL\n", what, result, errno);
  return 0;
}

int main(int argc, char **argv) {
  static char memory[16384];
  char *page = memory + (4096 - (size_t)memory % 4096) % 4096;
  if (argc != 2 || strcmp(ksmu_version(), argv[1]) != 0) {
    fprintf(stderr, "version %s, expected %s\n", ksmu_version(), argc == 2 ? argv[1] : "one argument");
    return 1;
  }
  errno = 0;
  if (!refused(ksmu_advise(page, 4096, 999), "unknown advice")) return 1;
  errno = 0;
  if (!refused(ksmu_advise(page + 1, 4096, KSMU_MERGEABLE), "address in the middle of a page")) return 1;
  if (strlen(ksmu_last_error()) == 0) {
    fprintf(stderr, "ksmu_last_error() says nothing\n");
    return 1;
  }
  errno = 0;
  if (ksmu_advise(page, 0, KSMU_UNMERGEABLE) != 0) {
    fprintf(stderr, "a length of 0 is refused: errno %d\n", errno);
    return 1;
  }
  puts("ok");
  return 0;
}
