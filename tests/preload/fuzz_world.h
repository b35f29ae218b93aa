/* The arena of fuzz.c: what it should hold, page by page; what is said about it, and how it is looked at. */
#pragma once
#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
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

/* Newer than some headers. */
enum {
  kColdAdvice = 20, kPageoutAdvice = 21, kPopulateRead = 22, kPopulateWrite = 23, kDontneedLocked = 24, kCollapse = 25,
  kGuardInstall = 102, kGuardRemove = 103
};
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef PROCESS_MADVISE_SYSCALL
#define PROCESS_MADVISE_SYSCALL 440
#endif

enum { kPage = 4096, kPages = 1024, kEdge = 16, kContents = 6, kHeld = 3, kWorlds = 2 };
static const uintptr_t kArenas = 0x200000000000; /* where the kernel puts nothing by itself */

enum { kAnonymous, kShared, kFile };
typedef struct {
  uint8_t mapped, prot, kind, locked, dontfork, wipe, guard;
  uint8_t maybe;  /* after MADV_FREE: what it was, or zeros */
  uint8_t moving; /* another thread is writing it: not to be touched */
  uint8_t unknown; /* a guarded page that was wiped: kernels differ */
  uint32_t file_page;
} Page;

typedef struct {
  unsigned char *base, *shadow;
  Page page[kPages];
  uint64_t chance, seed;
  int depth, raced, bare; /* bare: a child of _Fork or a raw clone */
  long step;
  struct { pid_t pid; int wake; } held[kHeld];
} World;

static World g_worlds[kWorlds];
static ssize_t (*g_merge)(void *, size_t);
static int g_plain, g_decisions = -1, g_kernel_writes = 1, g_guards, g_memfd, g_contents;
static unsigned char g_content[kContents][kPage]; /* the first is zeros */
static unsigned char g_buffer[kWorlds][64 * kPage];

/* --- saying -------------------------------------------------------------------------------------------------------- */

static void put(const char *text, size_t length) {
  while (length) {
    ssize_t n = write(1, text, length);
    if (n < 0 && errno != EINTR) _exit(9);
    if (n > 0) text += n, length -= (size_t)n;
  }
}
__attribute__((format(printf, 2, 3))) static void say(World *w, const char *format, ...) {
  char line[400];
  if (w->raced) return;
  int n = snprintf(line, sizeof line, "%d.%ld ", w->depth, w->step);
  va_list arguments;
  va_start(arguments, format);
  n += vsnprintf(line + n, sizeof line - (size_t)n - 1, format, arguments);
  va_end(arguments);
  if (n > (int)sizeof line - 2) n = sizeof line - 2;
  line[n++] = '\n';
  int saved = errno;
  put(line, (size_t)n);
  errno = saved;
}
__attribute__((format(printf, 2, 3), noreturn)) static void wrong(World *w, const char *format, ...) {
  char line[600];
  int n = snprintf(line, sizeof line, "WRONG seed %lu step %d.%ld: ", w->seed, w->depth, w->step);
  va_list arguments;
  va_start(arguments, format);
  n += vsnprintf(line + n, sizeof line - (size_t)n - 1, format, arguments);
  va_end(arguments);
  if (n > (int)sizeof line - 2) n = sizeof line - 2;
  line[n++] = '\n';
  put(line, (size_t)n);
  _exit(3);
}
/* A result and its errno as text, in turn in a few buffers. */
static const char *result(long value) {
  static __thread char text[4][32];
  static __thread int turn;
  char *out = text[turn = (turn + 1) % 4];
  if (value == -1) snprintf(out, 32, "%s", strerrorname_np(errno) ? strerrorname_np(errno) : "?");
  else snprintf(out, 32, "%ld", value);
  return out;
}
static const char *where(World *w, const void *at) {
  static __thread char text[32];
  if (at == MAP_FAILED) return result(-1);
  long offset = (const unsigned char *)at - w->base;
  if (offset < -kEdge * kPage || offset > (kPages + kEdge) * kPage) return "elsewhere";
  snprintf(text, sizeof text, "+%lx", offset);
  return text;
}

/* --- chance -------------------------------------------------------------------------------------------------------- */

static uint64_t next(World *w) {
  uint64_t z = (w->chance += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
static int below(World *w, int n) { return (int)(next(w) % (unsigned)n); }
static int one_in(World *w, int n) { return below(w, n) == 0; }

/* A range, mostly small; `outside`: it may begin before the arena and end behind it. False: another thread has it. */
static int pick(World *w, int outside, int *start, int *count) {
  int most = one_in(w, 4) ? (one_in(w, 4) ? kPages : 256) : 24;
  *start = below(w, kPages);
  *count = 1 + below(w, most);
  if (outside && one_in(w, 10)) *start = *start < kPages / 2 ? -1 - below(w, kEdge) : kPages - 1 - below(w, 8);
  int end = outside ? kPages + kEdge : kPages;
  if (*start + *count > end) *count = end - *start;
  for (int i = 0; i < *count; i++) {
    int p = *start + i;
    if (p >= 0 && p < kPages && (w->page[p].moving || w->page[p].unknown)) {
      *count = i;
      break;
    }
  }
  return *count > 0;
}
static unsigned char *at(World *w, int page) { return w->base + (long)page * kPage; }
static unsigned char *shadow(World *w, int page) { return w->shadow + (long)page * kPage; }
static size_t size_of(int pages) { return (size_t)pages * kPage; }
static const Page kHole;
static Page *model(World *w, int page) {
  static __thread Page hole;
  hole = kHole;
  return page >= 0 && page < kPages ? &w->page[page] : &hole;
}

/* --- looking ------------------------------------------------------------------------------------------------------- */

static int is_zero(const void *page) { return memcmp(page, g_content[0], kPage) == 0; }
static int readable(const void *address) {
  char byte;
  struct iovec to = {&byte, 1}, from = {(void *)address, 1};
  return process_vm_readv(getpid(), &to, 1, &from, 1, 0) == 1;
}
static int may_read(const Page *p) { return p->mapped && !p->guard && (p->prot & PROT_READ); }
static int may_write(const Page *p) { return p->mapped && !p->guard && (p->prot & PROT_WRITE); }

static void look(World *w, int start, int count) {
  for (int i = start; i < start + count; i++) {
    if (i < 0 || i >= kPages) continue;
    Page *p = &w->page[i];
    if (p->moving || p->unknown) continue;
    if (!may_read(p)) {
      if (readable(at(w, i))) wrong(w, "page %x can be read: mapped %d prot %d guard %d", i, p->mapped, p->prot, p->guard);
      continue;
    }
    const unsigned char *is = at(w, i), *want = shadow(w, i);
    if (memcmp(is, want, kPage) == 0) continue;
    if (p->maybe && is_zero(is)) {
      memset(shadow(w, i), 0, kPage);
      p->maybe = 0;
      continue;
    }
    int k = 0, differing = 0, now = -1;
    while (k < kPage - 1 && is[k] == want[k]) k++;
    for (int j = 0; j < kPage; j++) differing += is[j] != want[j];
    for (int c = 0; c < kContents; c++) if (memcmp(is, g_content[c], kPage) == 0) now = c;
    wrong(w, "page %x: %d bytes differ, from %x on: %02x and not %02x (content %d now, a second look %s); kind %d prot %d locked %d maybe %d", i,
          differing, k, is[k], want[k], now, memcmp(is, want, kPage) ? "the same" : "right", p->kind, p->prot, p->locked, p->maybe);
  }
}
static void look_at_all(World *w) { look(w, 0, kPages); }

/* Bytes that have been written; a page that was freed is known again. */
static void wrote(World *w, int page, size_t offset, const unsigned char *bytes, size_t length) {
  while (length) {
    size_t n = length < kPage - offset ? length : kPage - offset;
    Page *p = &w->page[page];
    memcpy(shadow(w, page) + offset, bytes, n);
    if (p->maybe && p->prot & PROT_READ) {
      if (memcmp(at(w, page), shadow(w, page), kPage) != 0) {
        memset(shadow(w, page), 0, kPage);
        memcpy(shadow(w, page) + offset, bytes, n);
      }
      p->maybe = 0;
    }
    bytes += n, length -= n, offset = 0, page++;
  }
}
/* As after a discard. */
static void emptied(World *w, int page) {
  Page *p = &w->page[page];
  if (p->kind == kShared) return;
  memcpy(shadow(w, page), p->kind == kFile ? g_content[1 + p->file_page % (kContents - 1)] : g_content[0], kPage);
  p->maybe = 0;
}
static void unmapped(World *w, int start, int count) {
  for (int i = start; i < start + count; i++) {
    if (i >= 0 && i < kPages) w->page[i] = kHole;
  }
}
static void mapped(World *w, int start, int count, int prot, int kind, int file_page) {
  for (int i = start; i < start + count; i++) {
    w->page[i] = kHole;
    w->page[i].mapped = 1, w->page[i].prot = (uint8_t)prot, w->page[i].kind = (uint8_t)kind, w->page[i].file_page = (uint32_t)(file_page + i - start);
    memset(shadow(w, i), 0, kPage);
    emptied(w, i);
  }
}

/* --- ranges -------------------------------------------------------------------------------------------------------- */

/* Whether a range is one mapping where no shim merges. */
static int is_one_mapping(World *w, int start, int count) {
  char answer = '0';
  if (g_decisions < 0) return 0;
  if (!g_plain) {
    if (read(g_decisions, &answer, 1) != 1) wrong(w, "the file of decisions has ended");
    return answer == '1';
  }
  static char text[1 << 18];
  int fd = open("/proc/self/maps", O_RDONLY);
  size_t n = 0;
  for (ssize_t got; fd >= 0 && n < sizeof text - 1 && (got = read(fd, text + n, sizeof text - 1 - n)) > 0;) n += (size_t)got;
  text[n] = 0;
  close(fd);
  for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
    char *end;
    unsigned long from = strtoul(line, &end, 16), to = strtoul(end + 1, NULL, 16);
    if (from <= (uintptr_t)at(w, start) && to >= (uintptr_t)at(w, start + count)) answer = '1';
  }
  if (write(g_decisions, &answer, 1) != 1) _exit(9);
  return answer == '1';
}

/* Where `count` pages may go that nobody is using at the moment: away from `not_start`. */
static int pick_target(World *w, int count, int not_start, int not_count, int *target) {
  if (count > kPages) return 0;
  for (int tries = 0; tries < 20; tries++) {
    int t = below(w, kPages - count + 1), good = t + count <= not_start || t >= not_start + not_count;
    for (int i = t; good && i < t + count; i++) good = !w->page[i].moving && !w->page[i].unknown;
    *target = t;
    if (good) return 1;
  }
  return 0;
}
static void moved(World *w, int from, int count, int to, int new_count, int left) {
  static Page pages[kWorlds][kPages];
  static unsigned char bytes[kWorlds][kPages * (long)kPage];
  const int mine = (int)(w - g_worlds), kept = count < new_count ? count : new_count;
  Page *p = pages[mine];
  memcpy(p, &w->page[from], (size_t)count * sizeof(Page));
  memcpy(bytes[mine], shadow(w, from), size_of(count));
  if (left) {
    for (int i = from; i < from + count; i++) {
      w->page[i].locked = w->page[i].guard = w->page[i].maybe = 0;
      emptied(w, i);
    }
  } else {
    unmapped(w, from, count);
  }
  memcpy(&w->page[to], p, (size_t)kept * sizeof(Page));
  memcpy(shadow(w, to), bytes[mine], size_of(kept));
  for (int i = kept; i < new_count; i++) {
    w->page[to + i] = p[0];
    w->page[to + i].guard = w->page[to + i].maybe = 0;
    memset(shadow(w, to + i), 0, kPage);
  }
}
