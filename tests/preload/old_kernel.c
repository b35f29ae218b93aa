/*
 * For a kernel that the library cannot work on. Linked with nothing of ours: what there is of it was preloaded.
 *
 *   old_kernel library   the library (preloaded): refuses with ENOSYS and a sentence, what needs no engine works
 *   old_kernel merge     advised memory comes to be merged by the kernel's KSM (which runs), and stays what it was
 *
 * Prints what was wrong; exit status 1 if anything was, 77 if the kernel has no KSM that could be asked.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { kPage = 4096, kPages = 256, kBytes = kPages * kPage, kDiscard = 4, kMergeable = 12, kUnmergeable = 13 };

static int g_wrong;

static void check(int good, const char *format, ...) {
  if (good) return;
  va_list arguments;
  va_start(arguments, format);
  const int error = errno;
  printf("wrong: ");
  vprintf(format, arguments);
  printf(" (errno %d)\n", error);
  va_end(arguments);
  g_wrong = 1;
}

static unsigned char *map(void) {
  unsigned char *memory = mmap(NULL, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) abort();
  madvise(memory, kBytes, MADV_NOHUGEPAGE);
  return memory;
}
static unsigned char byte_of(size_t page, size_t k) { return (unsigned char)(page % 4 * 7 + k * 13 + (k >> 8) + 1); }
static void fill(unsigned char *memory) {
  for (size_t i = 0; i < kBytes; i++) memory[i] = byte_of(i / kPage, i % kPage);
}
/* Pages that are not as they were filled. */
static int different(const unsigned char *memory) {
  int count = 0;
  for (size_t page = 0; page < kPages; page++) {
    size_t k = 0;
    while (k < kPage && memory[page * kPage + k] == byte_of(page, k)) k++;
    count += k < kPage;
  }
  return count;
}

static void *function(const char *name) {
  void *found = dlsym(RTLD_DEFAULT, name);
  if (!found) {
    printf("wrong: there is no %s\n", name);
    exit(1);
  }
  return found;
}

static void library(void) {
  int (*start)(const void *, size_t) = (int (*)(const void *, size_t))function("ksmu_start");
  int (*advise)(void *, size_t, int) = (int (*)(void *, size_t, int))function("ksmu_advise");
  void *(*map_memory)(size_t, int) = (void *(*)(size_t, int))function("ksmu_map");
  int (*unmap)(void *, size_t) = (int (*)(void *, size_t))function("ksmu_unmap");
  ssize_t (*merge)(void *, size_t) = (ssize_t(*)(void *, size_t))function("ksmu_merge");
  int (*get)(const char *, int64_t *) = (int (*)(const char *, int64_t *))function("ksmu_get");
  int (*set)(const char *, int64_t) = (int (*)(const char *, int64_t))function("ksmu_set");
  int (*stop)(void) = (int (*)(void))function("ksmu_stop");
  const char *(*last_error)(void) = (const char *(*)(void))function("ksmu_last_error");
  unsigned char *m = map();
  fill(m);
  for (int round = 0; round < 3; round++) { /* refused again and again, and nothing is used up by it */
    errno = 0;
    check(start(NULL, 0) == -1 && errno == ENOSYS, "ksmu_start");
    if (round == 0) printf("%s\n", last_error());
    check(strstr(last_error(), "Linux 6.8") != NULL, "ksmu_last_error says \"%s\"", last_error());
    errno = 0;
    check(advise(m, kBytes, kMergeable) == -1 && errno == ENOSYS, "ksmu_advise(KSMU_MERGEABLE)");
    errno = 0;
    check(map_memory(kBytes, 0) == MAP_FAILED && errno == ENOSYS, "ksmu_map");
    errno = 0;
    check(merge(m, kBytes) == -1 && errno == ENOSYS, "ksmu_merge");
    int64_t regions = -1, sleep = -1;
    check(get("regions", &regions) == 0 && regions == 0, "ksmu_get of regions");
    check(set("sleep_millisecs", 30 + round) == 0, "ksmu_set");
    check(get("sleep_millisecs", &sleep) == 0 && sleep == 30 + round, "ksmu_get of a tunable");
    check(advise(m, kBytes, kUnmergeable) == 0, "ksmu_advise(KSMU_UNMERGEABLE)");
    check(different(m) == 0, "%d pages changed", different(m));
  }
  check(advise(m, kBytes / 2, kDiscard) == 0, "ksmu_advise(KSMU_DISCARD)");
  for (size_t i = 0; i < kBytes / 2; i++) {
    if (m[i]) check(0, "byte %zu after KSMU_DISCARD", i), i = kBytes;
  }
  check(different(m) == kPages / 2, "%d pages differ after KSMU_DISCARD of half", different(m));
  check(unmap(m, kBytes) == 0, "ksmu_unmap");
  errno = 0;
  check(stop() == -1 && errno == EINVAL, "ksmu_stop of what has not started");
}

static long number_in(const char *path) {
  FILE *f = fopen(path, "r");
  long value = -1;
  if (f && fscanf(f, "%ld", &value) != 1) value = -1;
  if (f) fclose(f);
  return value;
}
/* Pages of this process's that the kernel has merged (Linux 5.19). */
static long merged_by_kernel(void) { return number_in("/proc/self/ksm_merging_pages"); }

/* The kernel books both when it comes by. */
static void wait_until_merged(long pages) {
  for (int i = 0; i < 1200 && merged_by_kernel() != pages; i++) usleep(50000);
  check(merged_by_kernel() == pages, "the kernel has merged %ld pages, and not %ld", merged_by_kernel(), pages);
}

static int merge(void) {
  if (merged_by_kernel() < 0 || number_in("/sys/kernel/mm/ksm/run") != 1) {
    printf("the kernel has no KSM that runs, or does not say what it has merged of a process\n");
    return 77;
  }
  unsigned char *m = map();
  fill(m);
  errno = 4711;
  check(madvise(m, kBytes, MADV_MERGEABLE) == 0 && errno == 4711, "madvise(MADV_MERGEABLE)");
  wait_until_merged(kPages);
  printf("the kernel has merged %ld pages\n", merged_by_kernel());
  check(different(m) == 0, "%d pages changed", different(m));
  pid_t pid = fork();
  if (pid == 0) {
    m[5] ^= 1;
    _exit(different(m) == 1 ? 0 : 1);
  }
  int status = -1;
  check(waitpid(pid, &status, 0) == pid && status == 0, "in the child: status %x", status);
  check(different(m) == 0, "%d pages changed by the child", different(m));
  for (size_t page = 0; page < kPages; page += 8) m[page * kPage] ^= 1;
  check(different(m) == kPages / 8, "%d pages differ", different(m));
  for (size_t page = 0; page < kPages; page += 8) m[page * kPage] ^= 1;
  check(madvise(m, kBytes, MADV_UNMERGEABLE) == 0, "madvise(MADV_UNMERGEABLE)");
  wait_until_merged(0);
  check(different(m) == 0, "%d pages changed by unmerging", different(m));
  check(munmap(m, kBytes) == 0, "munmap");
  return 0;
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  int status = 0;
  if (strcmp(what, "library") == 0) library();
  else if (strcmp(what, "merge") == 0) status = merge();
  else return 2;
  return g_wrong ? 1 : status;
}
