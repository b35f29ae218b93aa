/*
 * A random sequence of memory calls, with a model of what must be where: fuzz SEED STEPS DECISIONS plain|shim [no_kernel_writes]
 *
 * The program works on an arena of its own addresses, keeps a copy of what every page must hold, looks after every call, and prints
 * each call with its result; fuzz_test.py runs the same seed without the shim and with it, and compares what is printed. The
 * memory is in few contents, so that much is merged, and between calls it is merged at once: by ksmu_merge of the library that
 * the shim has brought along.
 *
 *   fuzz race SEED STEPS: two threads at a time, each in an arena of its own; contents are looked at, nothing is printed.
 *
 * no_kernel_writes: what process_vm_writev would write is stored. Under KSMU_REMERGE_SECONDS=0 such writes can be lost (ksmu.h).
 *
 * Left out, each for its reason:
 * - mremap that grows, and DONTUNMAP, of what is several mappings without the shim: the kernel says EFAULT, the shim copies
 *   (docs/preload.md). Whether it is several, the run without the shim knows: it writes it to the file DECISIONS, from which
 *   the other run reads it.
 * - mremap of memory with DONTFORK or WIPEONFORK: where it has to copy, these are not carried over (docs/limits.md).
 * - WIPEONFORK and UFFDIO_REGISTER of locked and of executable memory, where what was written after it was merged cannot leave the
 *   frames' mapping, and in a child that merges itself, where what the parent has merged cannot (docs/limits.md).
 * - DONTUNMAP of locked memory: the kernel unlocks all of the mapping of which a part is moved.
 * - What COLLAPSE says: whether huge pages are to be had is the machine's affair, and how mappings are cut matters.
 * - The pages that mincore counts: dropped zero pages are not there. Its result and errno are compared.
 * - HWPOISON and SOFT_OFFLINE: they break the machine's memory.
 * - MERGEABLE in a child of _Fork and of a raw clone: it starts threads, which no such child may.
 */
#include "fuzz_world.h"

/* --- calls --------------------------------------------------------------------------------------------------------- */

static void do_merge(World *w) {
  if (g_merge && !w->bare) g_merge(w->base, size_of(kPages));
}

static void do_mmap(World *w) {
  static const int kProts[] = {PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ, PROT_NONE};
  int start, count, prot = kProts[below(w, 6)], kind = one_in(w, 12) ? 1 + below(w, 2) : kAnonymous, file_page = below(w, 64);
  if (!pick(w, 0, &start, &count)) return;
  int flags = kind == kFile ? MAP_PRIVATE : (kind == kShared ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS;
  if (one_in(w, 8)) flags |= MAP_POPULATE;
  if (one_in(w, 8)) flags |= MAP_NORESERVE;
  if (one_in(w, 12)) flags |= MAP_STACK;
  const int by_number = one_in(w, 8), manner = below(w, 8);
  flags |= manner == 0 ? MAP_FIXED_NOREPLACE : manner == 1 ? 0 : MAP_FIXED;
  int free_ = 1;
  for (int i = start; i < start + count; i++) free_ &= !w->page[i].mapped;
  if (kind == kFile && count > 256) count = 256;
  int fd = kind == kFile ? g_contents : -1;
  off_t offset = kind == kFile ? (off_t)file_page * kPage : 0;
  void *got = by_number ? (void *)syscall(SYS_mmap, at(w, start), size_of(count), prot, flags, (long)fd, offset)
                        : mmap(at(w, start), size_of(count), prot, flags, fd, offset);
  say(w, "mmap +%x %x prot %d flags %x: %s", start, count, prot, flags, where(w, got));
  if (got == at(w, start)) {
    if (manner <= 1 && !free_) wrong(w, "mapped over what was there");
    mapped(w, start, count, prot, kind, file_page);
  } else if (got != MAP_FAILED) {
    munmap(got, size_of(count));
  }
  look(w, start, count);
}

static void do_munmap(World *w) {
  int start, count;
  if (!one_in(w, 2) || !pick(w, 1, &start, &count)) return;
  if (count > 128 && !one_in(w, 8)) count = 128;
  long r = one_in(w, 8) ? syscall(SYS_munmap, at(w, start), size_of(count)) : munmap(at(w, start), size_of(count));
  say(w, "munmap %x %x: %s", start, count, result(r));
  if (r == 0) unmapped(w, start, count);
  look(w, start, count);
}

static void do_mremap(World *w) {
  int start, count, target;
  if (!pick(w, 0, &start, &count)) return;
  const int form = below(w, 8), by_number = one_in(w, 8);
  int anonymous = 1, plain = 1, holes = 0, locks = 0;
  for (int i = start; i < start + count; i++) {
    Page *p = &w->page[i];
    anonymous &= !p->mapped || p->kind == kAnonymous;
    plain &= !p->dontfork && !p->wipe;
    holes += !p->mapped;
    locks += p->locked;
  }
  if (!plain || (form >= 5 && form <= 6 && locks)) return;
  int new_count = count;
  if (form <= 2) new_count = count + 1 + below(w, 32); /* grows: in its place; where it may; at a place */
  else if (form == 3) new_count = 1 + below(w, count); /* shrinks */
  else if (form == 4) new_count = 1 + below(w, count), new_count = one_in(w, 2) ? new_count : count + below(w, 16); /* to a place */
  if (new_count > count && !anonymous) return;
  if (form >= 5 && form <= 6 && !anonymous) return;
  /* What it would grow over is not to be another thread's. */
  for (int i = start + count; i < start + new_count && i < kPages; i++) if (w->page[i].moving || w->page[i].unknown) return;
  if (form == 0 && start + new_count > kPages) return;
  if (!pick_target(w, new_count > count ? new_count : count, start, new_count > count ? new_count : count, &target)) return;
  const int one = w->raced ? 0 : is_one_mapping(w, start, count);
  /* Several mappings, or a part of them: see above. What begins with a hole is refused whatever comes behind it. */
  if (!one && w->page[start].mapped && !(w->raced && anonymous && !holes)) return;
  int flags = 0;
  void *to = NULL;
  switch (form) {
    case 0: break;
    case 1: flags = MREMAP_MAYMOVE; break;
    case 2: case 4: case 7: flags = MREMAP_MAYMOVE | MREMAP_FIXED, to = at(w, target); break;
    case 3: flags = one_in(w, 2) ? MREMAP_MAYMOVE : 0; break;
    case 5: flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP; break;
    default: flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED, to = at(w, target); break;
  }
  void *got = by_number ? (void *)syscall(SYS_mremap, at(w, start), size_of(count), size_of(new_count), (long)flags, to)
                        : mremap(at(w, start), size_of(count), size_of(new_count), flags, to);
  const int anywhere = flags == MREMAP_MAYMOVE || form == 5;
  say(w, "mremap %x %x to %x flags %d at %x: %s", start, count, new_count, flags, to ? target : 0,
      got != MAP_FAILED && anywhere && new_count > count ? "somewhere" : where(w, got));
  if (got == MAP_FAILED) {
    if (w->raced && to) { /* several mappings, perhaps: before 6.17 what was in their way is gone all the same */
      if (mmap(to, size_of(new_count), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != to) wrong(w, "mmap: %s", result(-1));
      mapped(w, target, new_count, PROT_READ | PROT_WRITE, kAnonymous, 0);
    }
    look(w, start, count);
    look(w, target, new_count);
    return;
  }
  if (holes && new_count >= count) wrong(w, "moved a hole");
  if (new_count <= count && !to && form != 5) {
    unmapped(w, start + new_count, count - new_count);
  } else if (form == 0) {
    if (got != at(w, start)) wrong(w, "moved without leave");
    moved(w, start, count, start, new_count, 0);
  } else if (anywhere) {
    /* Wherever it is, grown in place or not: at the target, in the end. */
    for (int i = 0; i < count && new_count >= count; i++) {
      const Page *p = &w->page[start + i];
      if (may_read(p) && !p->maybe && memcmp((unsigned char *)got + i * kPage, shadow(w, start + i), kPage)) wrong(w, "page %x has lost its bytes on its way", start + i);
    }
    void *put_at = mremap(got, size_of(new_count), size_of(new_count), MREMAP_MAYMOVE | MREMAP_FIXED, at(w, target));
    if (put_at != at(w, target)) wrong(w, "cannot be moved to page %x: %s", target, result(-1));
    unmapped(w, target, new_count);
    moved(w, start, count, target, new_count, form == 5);
  } else {
    if (got != to) wrong(w, "not where it was to go");
    moved(w, start, count, target, new_count, flags & MREMAP_DONTUNMAP);
  }
  look(w, start, count);
  look(w, target, new_count);
}

static void do_mprotect(World *w) {
  static const int kProts[] = {PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ, PROT_NONE, PROT_READ | PROT_EXEC,
                               PROT_READ | PROT_WRITE | PROT_EXEC};
  int start, count, prot = kProts[below(w, 7)];
  if (!pick(w, 1, &start, &count)) return;
  const int how = below(w, 8);
  long r = how == 0   ? syscall(SYS_mprotect, at(w, start), size_of(count), (long)prot)
           : how == 1 ? pkey_mprotect(at(w, start), size_of(count), prot, -1)
                      : mprotect(at(w, start), size_of(count), prot);
  say(w, "mprotect %x %x %d: %s", start, count, prot, result(r));
  for (int i = start; i < start + count && model(w, i)->mapped; i++) w->page[i].prot = (uint8_t)prot;
  look(w, start, count);
}

static const struct { int number; const char *name; int weight; } kAdvice[] = {
    {MADV_MERGEABLE, "MERGEABLE", 12}, {MADV_UNMERGEABLE, "UNMERGEABLE", 3}, {MADV_DONTNEED, "DONTNEED", 8}, {MADV_FREE, "FREE", 5},
    {kDontneedLocked, "DONTNEED_LOCKED", 2}, {MADV_REMOVE, "REMOVE", 1}, {MADV_WIPEONFORK, "WIPEONFORK", 1}, {MADV_KEEPONFORK, "KEEPONFORK", 3},
    {MADV_DONTFORK, "DONTFORK", 1}, {MADV_DOFORK, "DOFORK", 3}, {MADV_HUGEPAGE, "HUGEPAGE", 2}, {MADV_NOHUGEPAGE, "NOHUGEPAGE", 2},
    {kCollapse, "COLLAPSE", 2}, {kPopulateRead, "POPULATE_READ", 2}, {kPopulateWrite, "POPULATE_WRITE", 2}, {kColdAdvice, "COLD", 2},
    {kPageoutAdvice, "PAGEOUT", 2}, {MADV_DONTDUMP, "DONTDUMP", 1}, {MADV_DODUMP, "DODUMP", 2}, {MADV_NORMAL, "NORMAL", 1},
    {MADV_RANDOM, "RANDOM", 1}, {MADV_SEQUENTIAL, "SEQUENTIAL", 1}, {MADV_WILLNEED, "WILLNEED", 1}, {kGuardInstall, "GUARD_INSTALL", 2},
    {kGuardRemove, "GUARD_REMOVE", 4},
};

/* What an advice does, page by page as the kernel goes: until something refuses it. False: it does not go on. */
static int advised(World *w, int page, int advice) {
  Page *p = model(w, page);
  if (!p->mapped) return 1;
  switch (advice) {
    case MADV_DONTNEED:
    case MADV_FREE:
      if (p->locked || (advice == MADV_FREE && p->kind != kAnonymous)) return 0;
      if (p->guard) return 1;
      if (advice == MADV_FREE) p->maybe = !is_zero(shadow(w, page));
      else emptied(w, page);
      return 1;
    case kDontneedLocked:
      emptied(w, page);
      return 1;
    case MADV_REMOVE:
      if (p->locked || p->kind != kShared) return 0;
      memset(shadow(w, page), 0, kPage);
      return 1;
    case MADV_WIPEONFORK:
      if (p->kind != kAnonymous) return 0;
      p->wipe = 1;
      return 1;
    case MADV_KEEPONFORK: p->wipe = 0; return 1;
    case MADV_DONTFORK: p->dontfork = 1; return 1;
    case MADV_DOFORK: p->dontfork = 0; return 1;
    case kGuardInstall:
      if (p->locked) return 0;
      p->guard = 1;
      emptied(w, page);
      return 1;
    case kGuardRemove: p->guard = 0; return 1;
    default: return 1;
  }
}
/* Pages that may have to stay in a frame's mapping. */
static int stuck(World *w, int start, int count) {
  if (w->depth && !w->bare) return 1;
  for (int i = start; i < start + count; i++) if (model(w, i)->locked || (model(w, i)->prot & PROT_EXEC)) return 1;
  return 0;
}
static void do_madvise(World *w) {
  int start, count, all = 0, which = 0;
  if (!pick(w, 1, &start, &count)) return;
  for (size_t i = 0; i < sizeof kAdvice / sizeof *kAdvice; i++) all += kAdvice[i].weight;
  for (int left = below(w, all); left >= kAdvice[which].weight; which++) left -= kAdvice[which].weight;
  const int advice = kAdvice[which].number, how = below(w, 10);
  if ((advice == kGuardInstall || advice == kGuardRemove) && !g_guards) return;
  if (advice == MADV_MERGEABLE && w->bare) return;
  if (advice == MADV_WIPEONFORK && stuck(w, start, count)) return;
  for (int i = start; i < start + count; i++) {
    const Page *p = model(w, i);
    /* Kernels differ in whether it has to be writable. */
    if (advice == MADV_REMOVE && p->kind == kShared && !(p->prot & PROT_WRITE)) return;
    if (advice == kGuardInstall && p->kind != kAnonymous) return; /* from 6.15 on */
  }
  long r;
  if (how == 0) {
    r = syscall(SYS_madvise, at(w, start), size_of(count), (long)advice);
  } else if (how == 1 && advice != kCollapse) {
    /* In two parts, on itself. A part that is refused ends it: what the first did is what it returns. */
    int self = (int)syscall(SYS_pidfd_open, (long)getpid(), 0L), first = below(w, count);
    struct iovec parts[2] = {{at(w, start), size_of(first)}, {at(w, start + first), size_of(count - first)}};
    r = syscall(PROCESS_MADVISE_SYSCALL, (long)self, parts, 2L, (long)advice, 0L);
    int saved = errno;
    close(self);
    errno = saved;
    say(w, "process_madvise %x %x+%x %s: %s", start, first, count - first, kAdvice[which].name, result(r));
    if (r < 0 && (errno == EINVAL || errno == EPERM) && first == 0) { /* an older kernel may not take it at all: ask the memory */
      int refused = 0;
      for (int i = start; i < start + count; i++) refused |= model(w, i)->locked || model(w, i)->kind != kAnonymous;
      if (!refused && advice != MADV_REMOVE) return;
    }
    int begin = start, n = first;
    for (int part = 0; part < 2; part++, begin += n, n = count - first) {
      int ended = 0, holes = 0;
      for (int i = begin; i < begin + n && !ended; i++) {
        holes |= !model(w, i)->mapped;
        ended = !advised(w, i, advice);
      }
      if (part == 0 && n && (ended || holes)) break;
    }
    look(w, start, count);
    return;
  } else {
    r = madvise(at(w, start), size_of(count), advice);
  }
  say(w, "madvise %x %x %s: %s", start, count, kAdvice[which].name, advice == kCollapse ? "-" : result(r));
  for (int i = start; i < start + count && advised(w, i, advice); i++) {
  }
  look(w, start, count);
}

static void do_lock(World *w) {
  int start, count;
  if (!pick(w, 1, &start, &count)) return;
  const int form = below(w, 6), odd = one_in(w, 4) ? 1 + below(w, kPage - 2) : 0; /* locks need no whole pages */
  if (count > 64) count = 64;
  const void *from = at(w, start) + odd;
  const size_t bytes = size_of(count) - (size_t)odd;
  long r;
  if (form == 0 && !w->raced && one_in(w, 4)) { /* the other thread has locks, too */
    r = munlockall();
    say(w, "munlockall: %s", result(r));
    for (int i = 0; i < kPages; i++) w->page[i].locked = 0;
    return;
  }
  const int lock = form <= 2, on_fault = lock && one_in(w, 3);
  r = on_fault ? mlock2(from, bytes, MLOCK_ONFAULT) : lock ? mlock(from, bytes) : munlock(from, bytes);
  say(w, "%s %x+%x %x: %s", on_fault ? "mlock2" : lock ? "mlock" : "munlock", start, odd, count, result(r));
  for (int i = start; i < start + count && model(w, i)->mapped; i++) w->page[i].locked = (uint8_t)lock;
  look(w, start, count);
}

static void do_ask(World *w) {
  int start, count;
  static __thread unsigned char vector[kPages + 2 * kEdge];
  if (!pick(w, 1, &start, &count)) return;
  static const int kFlags[] = {MS_ASYNC, MS_SYNC, MS_INVALIDATE, MS_SYNC | MS_INVALIDATE, MS_SYNC | MS_ASYNC, 64};
  if (one_in(w, 2)) {
    say(w, "mincore %x %x: %s", start, count, result(mincore(at(w, start), size_of(count), vector)));
  } else {
    int flags = kFlags[below(w, 6)];
    say(w, "msync %x %x %d: %s", start, count, flags, result(msync(at(w, start), size_of(count), flags)));
  }
}

/* --- writing ------------------------------------------------------------------------------------------------------- */

static struct { /* another thread, which stores what it is told to, or goes on writing until it is told to stop */
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  int there, work, done;
  unsigned char *to;
  const unsigned char *from;
  size_t bytes;
  atomic_int go_on;
  long lost;
} g_writer = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void keep_writing(void) {
  volatile uint64_t *words = (volatile uint64_t *)g_writer.to;
  const size_t count = g_writer.bytes / sizeof *words;
  uint64_t stamp = 1, last[16] = {0};
  int known = 0;
  do {
    for (int i = 0; i < 16; i++) {
      volatile uint64_t *word = &words[(size_t)i * (count / 16)];
      if (known && *word != last[i]) g_writer.lost++;
      *word = last[i] = stamp++ * 0x9e3779b97f4a7c15u;
    }
    known = 1;
    /* Now and then long enough to be thought still, and to be merged: then in whole contents. */
    if (stamp % 256 == 1) {
      for (size_t page = 0; page < g_writer.bytes / kPage; page++) memcpy(g_writer.to + page * kPage, g_content[1 + page % (kContents - 1)], kPage);
      usleep(300);
      for (size_t page = 0; page < g_writer.bytes / kPage; page++) {
        g_writer.lost += memcmp(g_writer.to + page * kPage, g_content[1 + page % (kContents - 1)], kPage) != 0;
      }
      known = 0;
    }
  } while (atomic_load(&g_writer.go_on));
  memcpy(g_writer.to, g_writer.from, g_writer.bytes);
}
static void *writer(void *unused) {
  (void)unused;
  pthread_mutex_lock(&g_writer.lock);
  for (;;) {
    while (!g_writer.work) pthread_cond_wait(&g_writer.changed, &g_writer.lock);
    int work = g_writer.work;
    pthread_mutex_unlock(&g_writer.lock);
    if (work == 3) return NULL;
    if (work == 2) keep_writing();
    else memcpy(g_writer.to, g_writer.from, g_writer.bytes);
    pthread_mutex_lock(&g_writer.lock);
    g_writer.work = 0, g_writer.done = 1;
    pthread_cond_broadcast(&g_writer.changed);
  }
}
static void begin_writing(int work, void *to, const void *from, size_t bytes) {
  pthread_mutex_lock(&g_writer.lock);
  g_writer.to = to, g_writer.from = from, g_writer.bytes = bytes, g_writer.done = 0, g_writer.work = work;
  atomic_store(&g_writer.go_on, work == 2);
  pthread_cond_broadcast(&g_writer.changed);
  pthread_mutex_unlock(&g_writer.lock);
}
static void end_writing(void) {
  atomic_store(&g_writer.go_on, 0);
  pthread_mutex_lock(&g_writer.lock);
  while (!g_writer.done) pthread_cond_wait(&g_writer.changed, &g_writer.lock);
  pthread_mutex_unlock(&g_writer.lock);
}

/* Whole contents or a few bytes, by one of the ways in which bytes get into memory; the range may have pages that refuse it. */
static void do_write(World *w) {
  int start, count;
  if (!pick(w, 0, &start, &count)) return;
  if (count > 64) count = 64;
  unsigned char *bytes = g_buffer[w - g_worlds];
  size_t offset = 0, length = size_of(count);
  if (one_in(w, 3)) {
    offset = (size_t)below(w, kPage);
    length = 1 + (size_t)below(w, (int)(length - offset > 6000 ? 6000 : length - offset));
    const int value = below(w, 256);
    for (size_t i = 0; i < length; i++) bytes[i] = (unsigned char)(value + i / 97);
  } else {
    const int zeros = one_in(w, 5), first = below(w, 4), same = one_in(w, 6);
    for (int i = 0; i < count; i++) memcpy(bytes + i * kPage, g_content[zeros ? 0 : 1 + (same ? first : first + i) % (kContents - 1)], kPage);
  }
  size_t writable = 0;
  while (writable < length && may_write(model(w, start + (int)((offset + writable) / kPage)))) {
    size_t upto = kPage - (offset + writable) % kPage;
    writable += upto < length - writable ? upto : length - writable;
  }
  int way = below(w, 6);
  const int wrote_by_kernel = way >= 3;
  if (way == 5 && !g_kernel_writes) way = 4;
  unsigned char *to = at(w, start) + offset;
  ssize_t r;
  if (!wrote_by_kernel) {
    if (writable == 0) return;
    if (way == 2 && !w->depth && g_writer.there && !g_writer.work) begin_writing(1, to, bytes, writable), end_writing();
    else memcpy(to, bytes, writable);
    r = (ssize_t)writable;
  } else if (way == 5) {
    struct iovec local = {bytes, length}, remote = {to, length};
    r = process_vm_writev(getpid(), &local, 1, &remote, 1, 0);
  } else {
    off_t place = (off_t)(w - g_worlds) * (off_t)sizeof g_buffer[0];
    if (pwrite(g_memfd, bytes, length, place) != (ssize_t)length) wrong(w, "pwrite");
    if (way == 3 && !w->raced) lseek(g_memfd, place, SEEK_SET), r = read(g_memfd, to, length);
    else r = pread(g_memfd, to, length, place);
  }
  const int kind = wrote_by_kernel;
  say(w, "write %x+%lx %lx by %s: %s", start, offset, length, kind ? "a call" : "storing", result(r));
  if (r != (writable ? (ssize_t)writable : -1)) wrong(w, "%lx bytes can be written, %s were", writable, result(r));
  wrote(w, start, offset, bytes, writable);
  look(w, start, count);
}

/* --- children ------------------------------------------------------------------------------------------------------ */

static void run(World *w, long steps);

static void in_child(World *w, int bare) {
  w->depth++;
  w->bare |= bare;
  memset(w->held, 0, sizeof w->held);
  for (int i = 0; i < kPages; i++) {
    Page *p = &w->page[i];
    p->locked = 0;
    if (p->dontfork) *p = kHole;
    if (p->wipe) {
      p->unknown = p->guard;
      emptied(w, i);
    }
  }
}
static int wait_for(pid_t pid) {
  int status = 0;
  while (waitpid(pid, &status, 0) != pid) {
    if (errno != EINTR) return -1;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}
static void release(World *w, int which) {
  if (!w->held[which].pid) return;
  if (write(w->held[which].wake, "", 1) != 1) wrong(w, "a child has gone");
  close(w->held[which].wake);
  int status = wait_for(w->held[which].pid);
  w->held[which].pid = 0;
  say(w, "a child that waited: %d", status);
  if (status) wrong(w, "a child that waited: status %d", status);
}
static void do_fork(World *w) {
  /* libc's fork takes libc's locks: not where another thread may have had them. */
  const int form = w->raced && w->bare ? 1 + below(w, 2) : below(w, 3), holds = one_in(w, 4), which = below(w, kHeld), steps = one_in(w, 2) ? below(w, 12) : 0;
  if (w->depth >= 2) return;
  if (holds) release(w, which);
  int wake[2] = {-1, -1};
  if (holds && pipe2(wake, O_CLOEXEC)) wrong(w, "pipe");
  pid_t pid = form == 0 ? fork() : form == 1 ? _Fork() : (pid_t)syscall(SYS_clone, (long)SIGCHLD, 0L, 0L, 0L, 0L);
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (holds) close(wake[1]);
    for (int i = 0; i < kHeld; i++) if (w->held[i].pid) close(w->held[i].wake);
    in_child(w, form != 0);
    if (holds) {
      char byte;
      if (read(wake[0], &byte, 1) != 1) _exit(0); /* the parent ended before: its own affair */
      for (int i = 0; i < kPages; i++) if (w->page[i].kind == kShared) w->page[i].unknown = 1; /* written since */
      look_at_all(w);
      _exit(0);
    }
    look_at_all(w);
    run(w, steps);
    look_at_all(w);
    _exit(0);
  }
  if (pid < 0) wrong(w, "fork: %s", result(-1));
  if (holds) {
    close(wake[0]);
    w->held[which].pid = pid, w->held[which].wake = wake[1];
    say(w, "fork %d, which waits", form);
    return;
  }
  /* Written meanwhile: the child is not to see it. What was shared it may write, and is not looked at there any more. */
  int status = wait_for(pid);
  say(w, "fork %d with %d steps: %d", form, steps, status);
  if (status) wrong(w, "a child of form %d: status %d", form, status);
  for (int i = 0; i < kPages; i++) {
    if (w->page[i].kind == kShared && may_read(&w->page[i]) && !w->page[i].moving && !w->page[i].unknown) memcpy(shadow(w, i), at(w, i), kPage);
  }
}

/* --- userfaultfd --------------------------------------------------------------------------------------------------- */

static void do_userfaultfd(World *w) {
  int start, count;
  if (!pick(w, 1, &start, &count) || count > 64) return;
  for (int i = start; i < start + count; i++) if (model(w, i)->mapped && model(w, i)->kind != kAnonymous) return;
  if (stuck(w, start, count)) return;
  const int missing = one_in(w, 2);
  int fd = (int)syscall(SYS_userfaultfd, (long)(O_CLOEXEC | O_NONBLOCK));
  struct uffdio_api api = {UFFD_API, missing ? 0 : UFFD_FEATURE_WP_ASYNC, 0};
  if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) {
    say(w, "userfaultfd: %s", result(-1));
    if (fd >= 0) close(fd);
    return;
  }
  struct uffdio_register range = {{(uintptr_t)at(w, start), size_of(count)}, missing ? UFFDIO_REGISTER_MODE_MISSING : UFFDIO_REGISTER_MODE_WP, 0};
  long r = ioctl(fd, UFFDIO_REGISTER, &range);
  say(w, "register %x %x %s: %s, %llx", start, count, missing ? "missing" : "wp", result(r), r ? 0 : (unsigned long long)range.ioctls);
  int page = start + below(w, count);
  if (r == 0 && missing) {
    /* A page goes, and another one is put in. */
    Page *p = model(w, page);
    if (p->mapped && !p->locked && !p->guard) {
      long discarded = madvise(at(w, page), kPage, MADV_DONTNEED);
      const int content = 1 + below(w, kContents - 1);
      struct uffdio_copy copy = {(uintptr_t)at(w, page), (uintptr_t)g_content[content], kPage, 0, 0};
      long copied = ioctl(fd, UFFDIO_COPY, &copy);
      say(w, "discard %x, copy: %s, %s, %lld", page, result(discarded), result(copied), (long long)copy.copy);
      if (discarded == 0) emptied(w, page);
      if (copied == 0) memcpy(shadow(w, page), g_content[content], kPage), p->maybe = 0;
    }
  } else if (r == 0) {
    struct uffdio_writeprotect protect = {{(uintptr_t)at(w, start), size_of(count)}, UFFDIO_WRITEPROTECT_MODE_WP};
    say(w, "protect: %s", result(ioctl(fd, UFFDIO_WRITEPROTECT, &protect)));
    if (one_in(w, 2)) do_merge(w);
    if (may_write(model(w, page))) {
      at(w, page)[77] = 0x77;
      wrote(w, page, 77, (const unsigned char *)"\x77", 1);
    }
    if (one_in(w, 2)) {
      protect.mode = 0;
      say(w, "unprotect: %s", result(ioctl(fd, UFFDIO_WRITEPROTECT, &protect)));
    }
  }
  /* In MISSING mode an absent page would wait for us. */
  if (one_in(w, 2)) say(w, "unregister: %s", result(ioctl(fd, UFFDIO_UNREGISTER, &range.range)));
  close(fd);
  look(w, start, count);
}

/* --- what is refused ----------------------------------------------------------------------------------------------- */

static void do_bad(World *w) {
  int start, count;
  if (!pick(w, 0, &start, &count)) return;
  static const int kUnknown[] = {-1, 5, 6, 7, 26, 27, 30, 64, 99, 104, 105, 4711, INT32_MIN, INT32_MAX};
  unsigned char *a = at(w, start);
  const size_t bytes = size_of(count), over[] = {SIZE_MAX, SIZE_MAX - kPage + 1, SIZE_MAX - kPage, -(uintptr_t)a, -(uintptr_t)a + kPage},
               far[] = {0xffff800000000000, 1ul << 50, 0x7ffffffff000, 0, 0xfffffffffffff000, 0x800000000000};
  const size_t much = over[below(w, 5)];
  unsigned char *const away = (unsigned char *)far[below(w, 6)];
  int which;
  do which = below(w, (int)(sizeof kAdvice / sizeof *kAdvice));
  while ((w->bare && kAdvice[which].number == MADV_MERGEABLE) || (!g_guards && kAdvice[which].number >= kGuardInstall));
  const int advice = kAdvice[which].number, form = below(w, 44);
  const char *what = "";
  long r = 0;
  unsigned char byte;
  errno = 0;
  switch (form) {
#define BAD(number, call) \
  case number: what = #call, r = (long)(call); break;
    BAD(0, madvise(a + 1, bytes, advice))
    BAD(1, madvise(a, 0, advice))
    BAD(2, madvise(a, much, advice))
    BAD(3, madvise(away, kPage, advice))
    BAD(4, madvise(a, bytes, kUnknown[below(w, 14)]))
    BAD(5, madvise(a + 1, 0, advice))
    BAD(6, munmap(a + 1, kPage))
    BAD(7, munmap(a, 0))
    BAD(8, munmap(a, SIZE_MAX - (size_t)below(w, 3) * kPage))
    BAD(9, munmap((void *)far[0], kPage))
    BAD(10, mprotect(a + 1, kPage, PROT_READ))
    BAD(11, mprotect(a, 0, PROT_NONE))
    BAD(12, mprotect(a, much, PROT_NONE))
    BAD(13, mprotect(a, kPage, 0x4000))
    BAD(14, mprotect(a, kPage, PROT_GROWSDOWN | PROT_GROWSUP | PROT_READ))
    BAD(15, mprotect(away, kPage, PROT_READ))
    BAD(16, pkey_mprotect(a, kPage, PROT_READ, 14))
    BAD(17, mremap(a + 1, bytes, bytes, MREMAP_MAYMOVE))
    BAD(18, mremap(a, bytes, 0, MREMAP_MAYMOVE))
    BAD(19, mremap(a, bytes, bytes, 16))
    BAD(20, mremap(a, bytes, bytes, MREMAP_FIXED, away))
    BAD(21, mremap(a, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, a))
    BAD(22, mremap(a, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, a + bytes - kPage))
    BAD(23, mremap(a, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, w->base + 3))
    BAD(24, mremap(a, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)far[0]))
    BAD(25, mremap(a, bytes, bytes + kPage, MREMAP_MAYMOVE | MREMAP_DONTUNMAP))
    BAD(26, mremap(away, kPage, 2 * kPage, MREMAP_MAYMOVE))
    BAD(27, mremap(a, bytes, 1ul << 60, MREMAP_MAYMOVE))
    BAD(28, mmap(a + 1, kPage, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0))
    BAD(29, mmap(a, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0))
    BAD(30, mmap(a, bytes, PROT_READ, MAP_ANONYMOUS | MAP_FIXED, -1, 0))
    BAD(31, mmap(a, bytes, PROT_READ, MAP_PRIVATE | MAP_FIXED, -1, 0))
    BAD(32, mmap(a, SIZE_MAX - kPage + 1, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0))
    BAD(33, mmap((void *)far[0], kPage, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0))
    BAD(34, mlock(a, SIZE_MAX - kPage))
    BAD(35, mlock2(a, bytes, 16))
    BAD(36, mlock(away, kPage))
    BAD(37, munlock(away, kPage))
    BAD(38, msync(a + 1, kPage, MS_SYNC))
    BAD(39, mincore(a + 1, kPage, &byte))
    BAD(40, mincore(a, kPage, (unsigned char *)16))
    BAD(41, syscall(PROCESS_MADVISE_SYSCALL, -1L, NULL, 0L, (long)advice, 0L))
    BAD(42, posix_madvise(a + 1, bytes, advice % 6))
    BAD(43, mlockall(64))
#undef BAD
  }
  if (form == 4 || (form <= 5 && form != 3)) what = "madvise";
  say(w, "bad %d %s %s: %s", form, what, kAdvice[which].name, form == 3 && advice == kCollapse ? "-" : result(r));
  look(w, start, count);
}

/* --- several things at a time -------------------------------------------------------------------------------------- */

/* Mapped where the kernel likes, filled, advised, and moved into the arena. */
static void do_elsewhere(World *w) {
  int count = 1 + below(w, 64), target;
  if (!pick_target(w, count, 0, 0, &target)) return;
  unsigned char *m = mmap(NULL, size_of(count), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (m == MAP_FAILED) wrong(w, "mmap: %s", result(-1));
  const int first = below(w, kContents);
  long r = w->bare ? 0 : madvise(m, size_of(count), MADV_MERGEABLE);
  for (int i = 0; i < count; i++) memcpy(m + i * kPage, g_content[(first + i) % kContents], kPage);
  if (one_in(w, 2) && g_merge && !w->bare) g_merge(m, size_of(count));
  for (int i = 0; i < count; i++) if (memcmp(m + i * kPage, g_content[(first + i) % kContents], kPage)) wrong(w, "what was just mapped is not what was written, page %d", i);
  if (one_in(w, 3)) {
    say(w, "elsewhere %x: %s, %s", count, result(r), result(munmap(m, size_of(count))));
    return;
  }
  void *got = mremap(m, size_of(count), size_of(count), MREMAP_MAYMOVE | MREMAP_FIXED, at(w, target));
  say(w, "elsewhere %x: %s, %s", count, result(r), where(w, got));
  if (got != at(w, target)) wrong(w, "cannot be moved into the arena");
  mapped(w, target, count, PROT_READ | PROT_WRITE, kAnonymous, 0);
  for (int i = 0; i < count; i++) memcpy(shadow(w, target + i), g_content[(first + i) % kContents], kPage);
  look(w, target, count);
}

static void step(World *w);

/* Another thread goes on writing a few pages while calls are made on the others. */
static void do_meanwhile(World *w) {
  if (w->depth || w->raced || !g_writer.there || g_writer.work) return;
  int start = below(w, kPages - 4), count = 2;
  for (int i = start; i < start + count; i++) {
    const Page *p = &w->page[i];
    if (!may_write(p) || p->kind != kAnonymous) return;
  }
  const int first = below(w, kContents);
  static unsigned char final[2 * kPage];
  for (int i = 0; i < count; i++) {
    memcpy(final + i * kPage, g_content[(first + i) % kContents], kPage);
    w->page[start + i].moving = 1;
  }
  say(w, "meanwhile %x %x", start, count);
  begin_writing(2, at(w, start), final, size_of(count));
  for (int i = 1 + below(w, 6); i > 0; i--) step(w);
  end_writing();
  for (int i = start; i < start + count; i++) {
    w->page[i].moving = w->page[i].maybe = 0;
    memcpy(shadow(w, i), final + (i - start) * kPage, kPage);
  }
  if (g_writer.lost) wrong(w, "another thread's writes to page %x and the next: %ld lost", start, g_writer.lost);
  look(w, start, count);
}

static void do_rest(World *w) {
  const int usecs = one_in(w, 8) ? 3000 : 200;
  if (one_in(w, 2)) do_merge(w);
  else if (g_merge) usleep((useconds_t)usecs);
}

static void step(World *w) {
  static void (*const kCalls[])(World *) = {
      do_mmap, do_mmap, do_munmap, do_mremap, do_mremap, do_mprotect, do_mprotect, do_madvise, do_madvise, do_madvise, do_madvise, do_madvise,
      do_lock, do_ask, do_write, do_write, do_write, do_write, do_write, do_write, do_fork, do_userfaultfd, do_bad, do_bad, do_elsewhere,
      do_meanwhile, do_meanwhile, do_rest, do_rest, do_rest,
  };
  w->step++;
  kCalls[below(w, (int)(sizeof kCalls / sizeof *kCalls))](w);
}
static void run(World *w, long steps) {
  for (long i = 0; i < steps; i++) {
    step(w);
    if (w->step % 32 == 0) look_at_all(w);
    if (w->depth == 0 && one_in(w, 40)) release(w, below(w, kHeld));
    /* Not to run dry: most of it is there, writable and advised. */
    if (w->step % 64 == 1) {
      int start = below(w, kPages - 256), good = 1;
      for (int i = start; i < start + 256; i++) good &= !w->page[i].moving && !w->page[i].unknown;
      if (good) {
        void *got = mmap(at(w, start), size_of(256), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        long r = w->bare ? 0 : madvise(at(w, start), size_of(256), MADV_MERGEABLE);
        say(w, "anew %x: %s, %s", start, where(w, got), result(r));
        mapped(w, start, 256, PROT_READ | PROT_WRITE, kAnonymous, 0);
        for (int i = start; i < start + 256; i++) {
          memcpy(at(w, i), g_content[(i / 8) % kContents], kPage);
          memcpy(shadow(w, i), g_content[(i / 8) % kContents], kPage);
        }
        do_merge(w);
      }
    }
  }
}

/* --- from here on -------------------------------------------------------------------------------------------------- */

static void begin(World *w, uint64_t seed, int raced) {
  const int mine = (int)(w - g_worlds);
  w->seed = seed;
  w->chance = seed * 1000003 + (uint64_t)mine;
  w->raced = raced;
  w->base = (unsigned char *)(kArenas + (uintptr_t)mine * (64ul << 20));
  w->shadow = mmap(NULL, size_of(kPages), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (w->shadow == MAP_FAILED) wrong(w, "no memory");
}
static void end(World *w) {
  for (int i = 0; i < kHeld; i++) release(w, i);
  look_at_all(w);
}
static long counter(const char *name) {
  int (*get)(const char *, int64_t *) = (int (*)(const char *, int64_t *))dlsym(RTLD_DEFAULT, "ksmu_get");
  int64_t value = 0;
  if (get) get(name, &value);
  return value;
}

static long g_steps;
static void *race(void *world) {
  run(world, g_steps);
  end(world); /* here: a child dies with the thread that forked it */
  return NULL;
}

int main(int argc, char **argv) {
  const int raced = argc == 4 && strcmp(argv[1], "race") == 0;
  if (!raced && argc < 5) return 2;
  g_merge = (ssize_t(*)(void *, size_t))dlsym(RTLD_DEFAULT, "ksmu_merge");
  for (int c = 1; c < kContents; c++) {
    for (int k = 0; k < kPage; k++) g_content[c][k] = (unsigned char)(c * 31 + k * 13 + (k >> 8) + 1);
  }
  g_memfd = memfd_create("fuzz", MFD_CLOEXEC);
  g_contents = memfd_create("contents", MFD_CLOEXEC);
  for (int i = 0; i < 1024; i++) {
    if (pwrite(g_contents, g_content[1 + i % (kContents - 1)], kPage, (off_t)i * kPage) != kPage) return 2;
  }
  void *probe = mmap(NULL, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  g_guards = madvise(probe, kPage, kGuardInstall) == 0;
  munmap(probe, kPage);
  if (raced) {
    const uint64_t seed = strtoul(argv[2], NULL, 0);
    g_steps = atol(argv[3]);
    pthread_t threads[kWorlds];
    for (int i = 0; i < kWorlds; i++) begin(&g_worlds[i], seed, 1);
    for (int i = 0; i < kWorlds; i++) pthread_create(&threads[i], NULL, race, &g_worlds[i]);
    for (int i = 0; i < kWorlds; i++) pthread_join(threads[i], NULL);
  } else {
    World *w = &g_worlds[0];
    g_plain = strcmp(argv[4], "plain") == 0;
    g_decisions = open(argv[3], g_plain ? O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC : O_RDONLY | O_CLOEXEC, 0644);
    g_kernel_writes = argc < 6;
    if (g_decisions < 0) return 2;
    g_writer.there = pthread_create(&g_writer.thread, NULL, writer, NULL) == 0;
    begin(w, strtoul(argv[1], NULL, 0), 0);
    run(w, atol(argv[2]));
    end(w);
    begin_writing(3, NULL, NULL, 0);
    pthread_join(g_writer.thread, NULL);
  }
  fprintf(stderr, "merged %ld broken %ld\n", counter("pages_merged_total"), counter("cow_breaks"));
  return 0;
}
