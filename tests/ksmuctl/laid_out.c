// Memory of known contents, for the test of ksmuctl's what-if and map. It lays out what its arguments say, one mapping each, and
// keeps still: all that it uses itself is there before.
//
//   laid_out ITEM:PAGES[:SEED]...
//     unique      pages that no other process has, nor this one twice
//     same        equal pages; the seed says of which content
//     zero        pages of zeros, written
//     read        pages that were only read: the kernel's zero page
//     huge        unique pages in huge pages
//     churn       pages that change all the time
//     forked      pages that a forked child has, too
//     frames      a private mapping of a file that is named as ksmu's; of four pages one is written
//     sparse      of 16 TiB so many pages, evenly spread
//
// It says "ready". A line on stdin, and it lays out one item and answers with its addresses; after the last one it goes on until
// stdin ends.
#define _GNU_SOURCE
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { kPage = 4096, kHuge = 2 << 20 };
static const size_t kSparse = (size_t)16 << 40;
static uint64_t g_unique;
static volatile uint64_t *g_churn;
static size_t g_churn_pages;

static void Fill(char *page, uint64_t seed) {
  for (int i = 0; i < kPage / 8; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    ((uint64_t *)page)[i] = seed ^ seed >> 29;
  }
}

static char *Map(size_t bytes, int flags, int fd) {
  char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | flags, fd, 0);
  if (memory == MAP_FAILED) _exit(3);
  return memory;
}

static char *LayOut(const char *what, size_t pages, uint64_t seed, size_t *bytes) {
  *bytes = pages * kPage;
  if (strcmp(what, "frames") == 0) {
    const int fd = memfd_create("ksmu-frames", MFD_CLOEXEC);
    char page[kPage];
    for (size_t i = 0; i < pages; ++i) {
      Fill(page, ++g_unique);
      if (write(fd, page, kPage) != kPage) _exit(3);
    }
    char *memory = Map(*bytes, 0, fd);
    for (size_t i = 0; i < pages; ++i) {
      volatile char *byte = memory + i * kPage;
      if (i % 4 == 0) *byte = (char)(*byte + 1);
      else (void)*byte;
    }
    return memory;
  }
  const int huge = strcmp(what, "huge") == 0;
  if (strcmp(what, "sparse") == 0) *bytes = kSparse;
  if (huge) *bytes += kHuge;
  char *memory = Map(*bytes, MAP_ANONYMOUS, -1);
  if (huge) {
    memory = (char *)(((uintptr_t)memory + kHuge - 1) & ~(uintptr_t)(kHuge - 1));
    *bytes = pages * kPage;
  }
  madvise(memory, *bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  const size_t stride = strcmp(what, "sparse") == 0 ? kSparse / pages / kPage * kPage : kPage;
  for (size_t i = 0; i < pages; ++i) {
    char *page = memory + i * stride;
    if (strcmp(what, "read") == 0) (void)*(volatile char *)page;
    else if (strcmp(what, "zero") == 0) *(volatile char *)page = 0;
    else Fill(page, strcmp(what, "same") == 0 ? seed : ++g_unique);
  }
  if (strcmp(what, "churn") == 0) {
    g_churn = (volatile uint64_t *)memory;
    g_churn_pages = pages;
  }
  if (strcmp(what, "forked") == 0) {
    const pid_t parent = getpid();
    if (fork() == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      while (getppid() == parent) pause();
      _exit(0);
    }
  }
  return memory;
}

// Still but for what is to change, until there is something to read. 0: the end.
static int Wait(void) {
  for (;;) {
    struct pollfd input = {0, POLLIN, 0};
    if (poll(&input, 1, g_churn_pages ? 5 : -1) > 0) break;
    for (size_t i = 0; i < g_churn_pages; ++i) ++g_churn[i * kPage / 8];
  }
  char line[8];
  return read(0, line, sizeof line) > 0;
}

static void Answer(const char *item, int dry) {
  char what[16], answer[64];
  unsigned long long pages = 0, seed = 0;
  size_t bytes;
  if (sscanf(item, "%15[a-z]:%llu:%llu", what, &pages, &seed) < 2) _exit(2);
  char *memory = LayOut(what, pages, seed, &bytes);
  int length = snprintf(answer, sizeof answer, "%llx %llx\n", (unsigned long long)(uintptr_t)memory, (unsigned long long)bytes);
  if (dry) {
    munmap(memory, bytes);
    length = snprintf(answer, sizeof answer, "ready\n");
  }
  if (write(1, answer, (size_t)length) != length) _exit(3);
}

int main(int argc, char **argv) {
  // On one CPU: its number stands in libc's thread descriptor, where the kernel changes it (rseq).
  cpu_set_t here;
  CPU_ZERO(&here);
  CPU_SET((size_t)sched_getcpu(), &here);
  sched_setaffinity(0, sizeof here, &here);
  // For the test's user without rights, where yama has ptrace_scope 1: who looks is no parent of this process.
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
  g_unique = (uint64_t)getpid() << 32;
  // What this takes of the stack and of libc is there before anybody looks.
  Answer("unique:2", 1);
  for (int i = 1; i < argc && Wait(); ++i) Answer(argv[i], 0);
  while (Wait()) {
  }
  return 0;
}
