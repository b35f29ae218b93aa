/*
 * What the kernel tests of its own KSM, asked of the shim: memory is merged, one thing is done to it, and what must hold then is
 * printed. functional_test.py runs each case without the shim and with it; the two must print the same. What program.c asks
 * already is not asked again. Whether pages are merged is seen from outside the library where that is permitted: by the frames
 * that /proc/self/pagemap names, of which merged pages have fewer than there are pages.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
  kPage = 4096, kPages = 64, kBytes = kPages * kPage, kSetMemoryMerge = 67, kGetMemoryMerge = 68, kGuardInstall = 102, kGuardRemove = 103,
  kProcessMadvise = 440, kAlarmSeconds = 30
};

static ssize_t (*g_merge)(void *, size_t);
static int (*g_get)(const char *, int64_t *);

static long counter(const char *name) {
  int64_t value = -1;
  if (g_get) g_get(name, &value);
  return value;
}
static void say(const char *what, long result) {
  if (result == -1) printf("%s: %s\n", what, strerrorname_np(errno));
  else printf("%s: %ld\n", what, result);
}
/* Where there is no library, what is asked of it holds. */
static void expect(const char *what, int good) {
  if (g_merge && !good) printf("WRONG: %s (merged %ld, zero pages %ld)\n", what, counter("pages_merged"), counter("ksm_zero_pages"));
}
static uint64_t entry_of(const void *address) {
  uint64_t entry = 0;
  int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)address / kPage * sizeof entry)) != sizeof entry) entry = 0;
  close(fd);
  return entry;
}
/* Different frames under a range; -1 where they may not be seen. */
static int frames(const unsigned char *memory, int pages) {
  static uint64_t seen[kPages * 4];
  int count = 0;
  for (int i = 0; i < pages; i++) {
    uint64_t frame = entry_of(memory + i * kPage) & ((1ull << 55) - 1);
    int k = 0;
    if (frame == 0) return -1;
    while (k < count && seen[k] != frame) k++;
    if (k == count) seen[count++] = frame;
  }
  return count;
}
static void expect_merged(const char *what, const unsigned char *memory, int pages, int most) {
  int now = frames(memory, pages);
  char text[200];
  snprintf(text, sizeof text, "%s: %d frames for %d pages", what, now, pages);
  if (now >= 0) expect(text, now <= most);
}
static void expect_own(const char *what, const unsigned char *memory, int pages) {
  int now = frames(memory, pages);
  if (now >= 0 && now != pages) printf("WRONG: %s: %d frames for %d pages\n", what, now, pages);
}
static int all_are(const unsigned char *memory, size_t bytes, int value) {
  for (size_t i = 0; i < bytes; i++) if (memory[i] != value) return 0;
  return 1;
}
static int in_order(const unsigned char *memory, int from, int count) {
  for (int i = from; i < from + count; i++) if (!all_are(memory + i * kPage, kPage, 1 + i % 4)) return 0;
  return 1;
}
static int readable(const void *address) {
  char byte;
  struct iovec to = {&byte, 1}, from = {(void *)address, 1};
  return process_vm_readv(getpid(), &to, 1, &from, 1, 0) == 1;
}
static unsigned char *map(size_t bytes) {
  /* Room around it, into which it can grow, and away from what else there is. */
  static uintptr_t place = 0x240000000000;
  unsigned char *memory = mmap((void *)place, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  place += 16ul << 20;
  if (memory == MAP_FAILED) abort();
  return memory;
}
/* Four contents, or one, `value`. */
static unsigned char *merged_of(int value) {
  unsigned char *m = map(kBytes);
  for (int i = 0; i < kPages; i++) memset(m + i * kPage, value < 0 ? 1 + i % 4 : value, kPage);
  if (madvise(m, kBytes, MADV_MERGEABLE)) printf("mergeable: %s\n", strerrorname_np(errno));
  if (g_merge) g_merge(m, kBytes);
  if (value != 0) expect_merged("at first", m, kPages, kPages / 4);
  return m;
}
static unsigned char *merged(void) { return merged_of(-1); }
static unsigned char *merged_and_written(void) {
  unsigned char *m = merged();
  for (int i = 0; i < kPages; i += 3) m[i * kPage] ^= 0x80;
  for (int i = 0; i < kPages; i += 3) m[i * kPage] ^= 0x80;
  return m;
}
static int wait_for(pid_t pid) {
  int status;
  if (waitpid(pid, &status, 0) != pid) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}
/* A child's value, by a call of its own. */
static void in_child(const char *what, int (*run)(unsigned char *), unsigned char *memory) {
  fflush(stdout);
  pid_t pid = fork();
  if (pid == 0) {
    alarm(kAlarmSeconds); /* the parent's is not the child's */
    _exit(run(memory));
  }
  say(what, wait_for(pid));
}

/* --- the kernel's list --------------------------------------------------------------------------------------------- */

static void case_unmerge(void) {
  unsigned char *m = merged_of(0x42);
  say("unmergeable", madvise(m, kBytes, MADV_UNMERGEABLE));
  expect_own("unmerged", m, kPages);
  printf("whole: %d\n", all_are(m, kBytes, 0x42));
}
static void case_zero_pages(void) {
  unsigned char *m = merged_of(0);
  expect("zero pages are dropped", counter("ksm_zero_pages") >= kPages / 2);
  say("half unmergeable", madvise(m, kBytes / 2, MADV_UNMERGEABLE));
  expect("half of them are counted no more", counter("ksm_zero_pages") <= kPages / 2);
  m[5 * kPage + 9] = 7; /* of a half that is written, only that page */
  m[(kPages - 1) * kPage] = 7;
  expect("and none that was written", counter("ksm_zero_pages") <= kPages / 2);
  say("unmergeable", madvise(m, kBytes, MADV_UNMERGEABLE));
  expect("none is left", counter("ksm_zero_pages") == 0);
  m[5 * kPage + 9] = m[(kPages - 1) * kPage] = 0;
  printf("zeros: %d\n", all_are(m, kBytes, 0));
}
static void case_unmerge_discarded(void) {
  unsigned char *m = merged();
  say("dontneed", madvise(m + kBytes / 2, kBytes / 2, MADV_DONTNEED));
  say("unmergeable", madvise(m, kBytes, MADV_UNMERGEABLE));
  printf("kept: %d zeros: %d\n", in_order(m, 0, kPages / 2), all_are(m + kBytes / 2, kBytes / 2, 0));
  expect_own("what is kept", m, kPages / 2);
}
static void case_write_protected(void) {
  unsigned char *m = merged();
  int fd = (int)syscall(SYS_userfaultfd, (long)(O_CLOEXEC | O_NONBLOCK));
  struct uffdio_api api = {UFFD_API, UFFD_FEATURE_PAGEFAULT_FLAG_WP, 0};
  if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) {
    printf("no userfaultfd: %s\n", strerrorname_np(errno));
    return;
  }
  struct uffdio_register range = {{(uintptr_t)m, kBytes}, UFFDIO_REGISTER_MODE_WP, 0};
  say("register", ioctl(fd, UFFDIO_REGISTER, &range));
  struct uffdio_writeprotect protect = {{(uintptr_t)m, kBytes}, UFFDIO_WRITEPROTECT_MODE_WP};
  say("protect", ioctl(fd, UFFDIO_WRITEPROTECT, &protect));
  int before = 0, after = 0;
  for (int i = 0; i < kPages; i++) before += entry_of(m + i * kPage) >> 57 & 1;
  say("unmergeable", madvise(m, kBytes, MADV_UNMERGEABLE));
  for (int i = 0; i < kPages; i++) after += entry_of(m + i * kPage) >> 57 & 1;
  printf("protected: %d, then %d; whole: %d\n", before, after, in_order(m, 0, kPages));
  protect.mode = 0;
  say("unprotect", ioctl(fd, UFFDIO_WRITEPROTECT, &protect));
  m[0] ^= 1, m[0] ^= 1;
  close(fd);
  printf("whole: %d\n", in_order(m, 0, kPages));
}
/* What may not be touched is unmerged all the same; and written past its protection, as a debugger does. */
static void case_protected(void) {
  unsigned char *m = merged();
  say("none", mprotect(m, kBytes, PROT_NONE));
  say("unmergeable", madvise(m, kBytes, MADV_UNMERGEABLE));
  int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
  for (int i = 0; i < kPages; i++) {
    if (pwrite(fd, "x", 1, (off_t)(uintptr_t)m + i * kPage) != 1) {
      printf("past its protection: %s\n", strerrorname_np(errno));
      break;
    }
  }
  close(fd);
  say("again", mprotect(m, kBytes, PROT_READ | PROT_WRITE));
  int written = 0;
  for (int i = 0; i < kPages; i++) written += m[i * kPage] == 'x' && m[i * kPage + 1] == 1 + i % 4;
  printf("written: %d\n", written);
  expect_own("unmerged", m, kPages);
}

static int asks(unsigned char *memory) {
  (void)memory;
  return 10 + prctl(kGetMemoryMerge, 0, 0, 0, 0);
}
static int unsets(unsigned char *memory) {
  (void)memory;
  return prctl(kSetMemoryMerge, 0, 0, 0, 0) ? 1 : 10 + prctl(kGetMemoryMerge, 0, 0, 0, 0);
}
static void case_switch(void) {
  say("two", prctl(kSetMemoryMerge, 2, 0, 0, 0));
  say("third argument", prctl(kSetMemoryMerge, 1, 0, 0, 1));
  say("asked with an argument", prctl(kGetMemoryMerge, 1, 0, 0, 0));
  say("asked", prctl(kGetMemoryMerge, 0, 0, 0, 0));
  in_child("a child before", asks, NULL);
  say("on", prctl(kSetMemoryMerge, 1, 0, 0, 0));
  say("on again", prctl(kSetMemoryMerge, 1, 0, 0, 0));
  in_child("a child", asks, NULL);
  in_child("a child that turns it off", unsets, NULL);
  say("asked", prctl(kGetMemoryMerge, 0, 0, 0, 0));
  fflush(stdout);
  pid_t pid = fork();
  if (pid == 0) {
    unsets(NULL);
    execl("/proc/self/exe", "functional", "asked", NULL);
    _exit(99);
  }
  say("executed by a child that turned it off", wait_for(pid));
  say("off", prctl(kSetMemoryMerge, 0, 0, 0, 0));
  say("off again", prctl(kSetMemoryMerge, 0, 0, 0, 0));
  in_child("a child after", asks, NULL);
}
static void case_asked(void) { exit(asks(NULL)); }
/* Turned off, everything is unmerged: what was merged because it was on. */
static void case_switched_off(void) {
  unsigned char *m = map(kBytes);
  say("on", prctl(kSetMemoryMerge, 1, 0, 0, 0));
  memset(m, 0x42, kBytes);
  for (int i = 0; i < 100 && g_merge && frames(m, kPages) > kPages / 4; i++) {
    usleep(50000);
    g_merge(m, kBytes);
  }
  expect_merged("on", m, kPages, kPages / 4);
  say("off", prctl(kSetMemoryMerge, 0, 0, 0, 0));
  expect_own("off", m, kPages);
  printf("whole: %d\n", all_are(m, kBytes, 0x42));
}

static int counts(unsigned char *memory) {
  /* A child has merged nothing itself, and what it sees is what there was. */
  if (g_get && counter("pages_merged") > 0) return 2;
  return in_order(memory, 0, kPages) ? 0 : 3;
}
static int unmerges(unsigned char *memory) {
  if (madvise(memory, kBytes, MADV_UNMERGEABLE)) return 2;
  if (!in_order(memory, 0, kPages)) return 3;
  for (int i = 0; i < kPages; i++) memory[i * kPage]++;
  return in_order(memory, 0, kPages) ? 4 : 0;
}
static int merges_its_own(unsigned char *memory) {
  (void)memory;
  unsigned char *m = merged();
  if (!in_order(m, 0, kPages)) return 2;
  return madvise(m, kBytes, MADV_UNMERGEABLE) || !in_order(m, 0, kPages) ? 3 : 0;
}
static void case_child(void) {
  unsigned char *m = merged();
  in_child("counts", counts, m);
  in_child("unmerges", unmerges, m);
  in_child("merges memory of its own", merges_its_own, m);
  expect_merged("the parent", m, kPages, kPages / 4);
  printf("whole: %d\n", in_order(m, 0, kPages));
}

/* --- beyond it: what the calls do where pages were written since, were inherited, or are not there ------------------- */

static int guards(unsigned char *memory) {
  if (madvise(memory + 8 * kPage, 8 * kPage, kGuardInstall)) return 2;
  if (readable(memory + 8 * kPage) || readable(memory + 15 * kPage) || !readable(memory + 16 * kPage)) return 3;
  if (madvise(memory + 8 * kPage, 8 * kPage, kGuardRemove)) return 4;
  return all_are(memory + 8 * kPage, 8 * kPage, 0) && in_order(memory, 16, kPages - 16) ? 0 : 5;
}
static void case_guards(void) {
  void *probe = map(kPage);
  if (madvise(probe, kPage, kGuardInstall)) {
    printf("no guard pages: %s\n", strerrorname_np(errno));
    return;
  }
  in_child("in a child", guards, merged());
  in_child("in a child, of what was written", guards, merged_and_written());
  unsigned char *m = merged_and_written();
  fflush(stdout);
  pid_t pid = (pid_t)syscall(SYS_clone, (long)SIGCHLD, 0L, 0L, 0L, 0L);
  if (pid == 0) {
    alarm(kAlarmSeconds);
    _exit(guards(m));
  }
  say("in a raw child", wait_for(pid));
  say("of what was written", guards(m));
}
static int wipes(unsigned char *memory) { return madvise(memory, kBytes / 2, MADV_WIPEONFORK) ? errno : 0; }
static int is_wiped(unsigned char *memory) { return all_are(memory, kBytes / 2, 0) && in_order(memory, kPages / 2, kPages / 2); }
static void case_wipe_written(void) {
  unsigned char *m = merged_and_written();
  say("wipeonfork", wipes(m));
  in_child("wiped", is_wiped, m);
  printf("whole: %d\n", in_order(m, 0, kPages));
  in_child("in a child", wipes, merged());
}
static void case_grow_written(void) {
  unsigned char *m = merged_and_written();
  say("in its place", mremap(m, kBytes, 2 * kBytes, 0) == m);
  printf("whole: %d and zeros: %d\n", in_order(m, 0, kPages), readable(m + kBytes) && all_are(m + kBytes, kBytes, 0));
  m = merged_and_written();
  say("read only", mprotect(m, kBytes, PROT_READ));
  unsigned char *grown = mremap(m, kBytes, 2 * kBytes, MREMAP_MAYMOVE);
  if (grown == MAP_FAILED) say("grown", -1);
  else printf("whole: %d\n", in_order(grown, 0, kPages));
  m = merged_and_written();
  say("none", mprotect(m, kBytes, PROT_NONE));
  grown = mremap(m, kBytes, kBytes, MREMAP_MAYMOVE | MREMAP_FIXED, m + 4 * kBytes);
  if (grown == MAP_FAILED) say("moved", -1);
  else {
    printf("none there: %d\n", !readable(grown));
    say("readable", mprotect(grown, kBytes, PROT_READ));
    printf("whole: %d\n", in_order(grown, 0, kPages));
  }
}
static void case_grow_guarded(void) {
  unsigned char *m = merged();
  if (madvise(m + 8 * kPage, kPage, kGuardInstall)) {
    printf("no guard pages: %s\n", strerrorname_np(errno));
    return;
  }
  unsigned char *grown = mremap(m, kBytes, 2 * kBytes, MREMAP_MAYMOVE);
  if (grown == MAP_FAILED) say("grown", -1);
  else printf("guarded: %d, whole: %d\n", !readable(grown + 8 * kPage), in_order(grown, 9, kPages - 9));
}
static void case_hole(void) {
  unsigned char *m = merged();
  say("unmapped", munmap(m, 4 * kPage));
  say("shrunk, from the hole on", (long)mremap(m, kBytes, 8 * kPage, 0));
  printf("there: %d %d\n", readable(m + 4 * kPage), readable(m + 20 * kPage));
  if (readable(m + 8 * kPage)) printf("whole: %d\n", in_order(m, 4, kPages - 4));
}
static void case_other_ways(void) {
  int self = (int)syscall(SYS_pidfd_open, (long)getpid(), 0L);
  static const int kAdvice[] = {MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_DONTFORK, MADV_DOFORK, MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_HUGEPAGE,
                                MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP, MADV_WIPEONFORK, MADV_KEEPONFORK, 20, 21, 22, 23, 24, 102, 103, 4711};
  for (size_t i = 0; i < sizeof kAdvice / sizeof *kAdvice; i++) {
    struct iovec part = {merged(), kBytes};
    printf("%d ", kAdvice[i]);
    say("process_madvise", syscall(kProcessMadvise, (long)self, &part, 1L, (long)kAdvice[i], 0L));
  }
  merged();
  void *const far[] = {NULL, (void *)0xffff800000000000, (void *)(1ul << 50)};
  for (size_t i = 0; i < sizeof kAdvice / sizeof *kAdvice; i++) {
    for (int k = 0; k < 3; k++) {
      printf("%d at %p ", kAdvice[i], far[k]);
      say("all there is", madvise(far[k], SIZE_MAX, kAdvice[i]));
      printf("%d at %p ", kAdvice[i], far[k]);
      say("a page", madvise(far[k], kPage, kAdvice[i]));
    }
  }
}
/* Not all of a lock's first page, and all that is there. */
static long locked(void) {
  FILE *f = fopen("/proc/self/smaps", "r");
  char line[512];
  long kb = 0;
  int inside = 0;
  while (fgets(line, sizeof line, f)) {
    unsigned long start, end;
    if (sscanf(line, "%lx-%lx ", &start, &end) == 2) inside = start >= 0x240000000000 && end < 0x250000000000;
    else if (inside && strncmp(line, "Locked:", 7) == 0) kb += atol(line + 7);
  }
  fclose(f);
  return kb;
}
static void case_lock_all(void) {
  unsigned char *m = merged();
  say("from within a page", mlock(m + 100, kBytes / 2 - 100));
  say("locked", locked());
  say("to within a page", munlock(m + 100, kBytes / 2 - 200));
  say("locked", locked());
  say("all", mlockall(MCL_CURRENT));
  say("locked", locked());
  printf("whole: %d\n", in_order(m, 0, kPages));
  say("unlocked", munlockall());
  say("locked", locked());
  if (g_merge) g_merge(m, kBytes);
  printf("whole: %d\n", in_order(m, 0, kPages));
}

static const struct {
  const char *name;
  void (*run)(void);
} kCases[] = {
    {"unmerge", case_unmerge}, {"zero_pages", case_zero_pages}, {"unmerge_discarded", case_unmerge_discarded},
    {"write_protected", case_write_protected}, {"protected", case_protected}, {"switch", case_switch},
    {"switched_off", case_switched_off}, {"child", case_child}, {"guards", case_guards}, {"wipe_written", case_wipe_written},
    {"grow_written", case_grow_written}, {"grow_guarded", case_grow_guarded}, {"hole", case_hole}, {"other_ways", case_other_ways},
    {"lock_all", case_lock_all},
    {"asked", case_asked}, /* not a case: executed by one */
};

int main(int argc, char **argv) {
  g_merge = (ssize_t(*)(void *, size_t))dlsym(RTLD_DEFAULT, "ksmu_merge");
  g_get = (int (*)(const char *, int64_t *))dlsym(RTLD_DEFAULT, "ksmu_get");
  setvbuf(stdout, NULL, _IOLBF, 0);
  alarm(kAlarmSeconds); /* a call that does not return is what some of them are about */
  for (size_t i = 0; i < sizeof kCases / sizeof *kCases; i++) {
    if (argc > 1 && strcmp(argv[1], kCases[i].name) == 0) {
      kCases[i].run();
      return 0;
    }
    if (argc == 1 && i + 1 < sizeof kCases / sizeof *kCases) puts(kCases[i].name);
  }
  return argc > 1 ? 2 : 0;
}
