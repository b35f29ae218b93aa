/* What the cases of program.c share: how they say what they see, and memory that is merged. */
#pragma once
#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define MADV_GUARD_INSTALL_ 102
#define MADV_GUARD_REMOVE_ 103
#define PR_SET_MEMORY_MERGE_ 67
#define PR_GET_MEMORY_MERGE_ 68

enum { kPage = 4096, kPages = 64, kBytes = kPages * kPage };

static ssize_t (*g_merge)(void *, size_t);
static int (*g_get)(const char *, int64_t *);
static int (*g_set)(const char *, int64_t);

static void find_library(void) {
  g_merge = (ssize_t(*)(void *, size_t))dlsym(RTLD_DEFAULT, "ksmu_merge");
  g_get = (int (*)(const char *, int64_t *))dlsym(RTLD_DEFAULT, "ksmu_get");
  g_set = (int (*)(const char *, int64_t))dlsym(RTLD_DEFAULT, "ksmu_set");
}

static int64_t counter(const char *name) {
  int64_t value = -1;
  if (g_get) g_get(name, &value);
  return value;
}

/* Result and errno; addresses are told apart from errors only. */
static void say(const char *what, long result) {
  if (result == -1) printf("%s: %s\n", what, strerrorname_np(errno));
  else printf("%s: %ld\n", what, result);
}
static void say_address(const char *what, void *result) {
  if (result == MAP_FAILED) printf("%s: %s\n", what, strerrorname_np(errno));
  else printf("%s: an address\n", what);
}

/* Contents that every fourth page has in common. */
static void fill(unsigned char *memory, size_t pages, unsigned seed) {
  for (size_t i = 0; i < pages; i++) {
    for (size_t k = 0; k < kPage; k++) memory[i * kPage + k] = (unsigned char)(seed * 31 + i % 4 * 7 + k * 13 + (k >> 8) + 1);
  }
}
static uint64_t sum(const unsigned char *memory, size_t bytes) {
  uint64_t h = 1469598103934665603u;
  for (size_t i = 0; i < bytes; i++) h = (h ^ memory[i]) * 1099511628211u;
  return h;
}
static void say_sum(const char *what, const void *memory, size_t bytes) {
  printf("%s: %016lx\n", what, sum(memory, bytes));
}

static void merge_at_least(void *memory, size_t bytes, long least) {
  if (!g_merge) return;
  long merged = g_merge(memory, bytes);
  /* The scanner may have been here first. */
  if (merged < least && counter("pages_merged") < least) printf("MERGED ONLY %ld of %ld\n", merged, least);
}
static void merge(void *memory) { merge_at_least(memory, kBytes, kPages / 2); }

static unsigned char *map(size_t bytes) {
  unsigned char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) abort();
  return memory;
}
/* With a hole on either side: what a case does at its edges does not meet anybody else's memory. */
static unsigned char *merged(void) {
  unsigned char *memory = map(kBytes + 2 * kPage);
  munmap(memory, kPage);
  munmap(memory + kPage + kBytes, kPage);
  memory += kPage;
  madvise(memory, kBytes, MADV_NOHUGEPAGE);
  fill(memory, kPages, 1);
  errno = 4711;
  say("mergeable", madvise(memory, kBytes, MADV_MERGEABLE));
  if (errno != 4711) printf("errno was changed\n");
  merge(memory);
  return memory;
}
__attribute__((unused)) static int readable(const void *at) {
  char byte;
  struct iovec to = {&byte, 1}, from = {(void *)at, 1};
  return process_vm_readv(getpid(), &to, 1, &from, 1, 0) == 1;
}
__attribute__((unused)) static int writable(void *at) {
  int zero = open("/dev/zero", O_RDONLY);
  int written = read(zero, at, 1) == 1;
  close(zero);
  return written;
}
static int wait_for(pid_t pid) {
  int status;
  if (waitpid(pid, &status, 0) != pid) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}
__attribute__((unused)) static long locked(const void *memory, size_t bytes) { /* kB of it, by smaps */
  FILE *f = fopen("/proc/self/smaps", "r");
  char line[512];
  long kb = 0;
  int inside = 0;
  while (fgets(line, sizeof line, f)) {
    unsigned long start, end;
    if (sscanf(line, "%lx-%lx ", &start, &end) == 2) inside = start < (uintptr_t)memory + bytes && end > (uintptr_t)memory;
    else if (inside && strncmp(line, "Locked:", 7) == 0) kb += atol(line + 7);
  }
  fclose(f);
  return kb;
}
