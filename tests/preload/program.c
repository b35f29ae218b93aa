/*
 * A program that knows nothing of the library: it says MADV_MERGEABLE, does one thing to that memory, and prints what it got:
 * results, errno, sums of bytes. preload_test.py runs each case without the shim and with it; the two must print the same.
 *
 * Preloaded, memory is merged at the points marked by merge(): by ksmu_merge of the library that the shim has brought along.
 * There a case in which nothing was merged says so, and so fails.
 */
#include "program.h"

static void case_write(void) {
  unsigned char *m = merged();
  say_sum("merged", m, kBytes);
  for (int i = 0; i < kPages; i += 3) m[i * kPage + 100] ^= 0x55;
  say_sum("written", m, kBytes);
  int zero = open("/dev/zero", O_RDONLY);
  say("read(2)", read(zero, m + 5 * kPage + 10, 3 * kPage));
  say_sum("read into", m, kBytes);
  merge_at_least(m, kBytes, 0);
  say_sum("again", m, kBytes);
}

static void case_discard(void) {
  unsigned char *m = merged();
  say("dontneed of a part", madvise(m + 4 * kPage, 8 * kPage, MADV_DONTNEED));
  say_sum("then", m, kBytes);
  m[5 * kPage] = 1;
  merge_at_least(m, kBytes, 0);
  say_sum("merged again", m, kBytes);
  say("free", madvise(m + 20 * kPage, 4 * kPage, MADV_FREE));
  for (int i = 20; i < 24; i++) { /* either what it was, or zeros; whole */
    uint64_t now = sum(m + i * kPage, kPage);
    static unsigned char zeros[kPage], old[4 * kPage];
    fill(old, 4, 1);
    if (now != sum(zeros, kPage) && now != sum(old + i % 4 * kPage, kPage)) printf("page %d is neither old nor zero\n", i);
  }
  memset(m + 20 * kPage, 9, 4 * kPage);
  say("free of all", madvise(m, kBytes, MADV_DONTNEED));
  say_sum("all", m, kBytes);
  say("across the end", madvise(m + (kPages - 1) * kPage, 2 * kPage, MADV_DONTNEED));
  say("odd address", madvise(m + 1, kPage, MADV_DONTNEED));
  say("nothing", madvise(m, 0, MADV_DONTNEED));
  say("posix dontneed", posix_madvise(m, kBytes, POSIX_MADV_DONTNEED));
  say("posix nonsense", posix_madvise(m, kBytes, 77));
}

static void case_remove(void) {
  unsigned char *m = merged();
  say("remove", madvise(m, kBytes, MADV_REMOVE));
  say_sum("then", m, kBytes);
  unsigned char *shared = mmap(NULL, 8 * kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  memset(shared, 1, 8 * kPage);
  say("remove of shared memory", madvise(shared, 8 * kPage, MADV_REMOVE));
  say_sum("then", shared, 8 * kPage);
}

static void case_wipe(void) {
  unsigned char *m = merged();
  say("wipeonfork", madvise(m + 8 * kPage, 8 * kPage, MADV_WIPEONFORK));
  merge_at_least(m, kBytes, 0);
  say_sum("parent", m, kBytes);
  fflush(stdout);
  pid_t pid = fork();
  if (pid == 0) {
    say_sum("child", m, kBytes);
    fflush(stdout);
    _exit(0);
  }
  say("child's end", wait_for(pid));
  say("keeponfork", madvise(m, kBytes, MADV_KEEPONFORK));
  say_sum("parent", m, kBytes);
}

static void case_collapse(void) {
  const size_t huge = 2 << 20;
  unsigned char *whole = map(2 * huge);
  unsigned char *m = (unsigned char *)(((uintptr_t)whole + huge - 1) & ~(huge - 1));
  madvise(m, huge, MADV_NOHUGEPAGE);
  fill(m, huge / kPage, 3);
  madvise(m, huge, MADV_MERGEABLE);
  merge_at_least(m, huge, 256);
  say("hugepage", madvise(m, huge, MADV_HUGEPAGE));
  int result = -1;
  for (int i = 0; i < 50 && result != 0; i++) {
    result = madvise(m, huge, MADV_COLLAPSE);
    if (result && errno != EAGAIN && errno != EBUSY) break;
    usleep(10000);
  }
  say("collapse", result);
  say_sum("then", m, huge);
}

static void case_guard(void) {
  unsigned char *m = merged();
  int result = madvise(m + 8 * kPage, 4 * kPage, MADV_GUARD_INSTALL_);
  say("guard", result);
  if (result) return;
  printf("readable: %d %d %d\n", readable(m + 7 * kPage), readable(m + 8 * kPage), readable(m + 12 * kPage));
  merge_at_least(m, kBytes, 0);
  printf("readable: %d %d %d\n", readable(m + 7 * kPage), readable(m + 11 * kPage), readable(m + 12 * kPage));
  say("unguard", madvise(m + 8 * kPage, 4 * kPage, MADV_GUARD_REMOVE_));
  merge_at_least(m, kBytes, 0);
  say_sum("then", m, kBytes);
}

static void case_dontfork(void) {
  unsigned char *m = merged();
  say("dontfork", madvise(m + 8 * kPage, 8 * kPage, MADV_DONTFORK));
  say("dontdump", madvise(m, kBytes, MADV_DONTDUMP));
  merge_at_least(m, kBytes, 0);
  fflush(stdout);
  pid_t pid = fork();
  if (pid == 0) _exit(readable(m) | readable(m + 8 * kPage) << 1 | readable(m + 15 * kPage) << 2 | readable(m + 16 * kPage) << 3);
  say("child sees", wait_for(pid));
  say("dofork", madvise(m, kBytes, MADV_DOFORK));
  pid = fork();
  if (pid == 0) _exit(sum(m, kBytes) != 0 && readable(m + 8 * kPage));
  say("child sees", wait_for(pid));
  say_sum("then", m, kBytes);
}

static void case_protect(void) {
  unsigned char *m = merged();
  say("read only", mprotect(m, kBytes / 2, PROT_READ));
  printf("writable: %d %d\n", writable(m + 3 * kPage), writable(m + kBytes / 2));
  merge_at_least(m, kBytes, 0);
  printf("writable: %d %d\n", writable(m), writable(m + kBytes / 2));
  say_sum("then", m, kBytes);
  say("none", mprotect(m, kBytes, PROT_NONE));
  printf("readable: %d\n", readable(m + 5 * kPage));
  say("all", mprotect(m, kBytes, PROT_READ | PROT_WRITE));
  say_sum("then", m, kBytes);
  m[0] = 3;
  say("code", mprotect(m, kBytes, PROT_READ | PROT_EXEC));
  say_sum("then", m, kBytes);
  say("odd", mprotect(m + 1, kPage, PROT_READ));
  say("beyond", mprotect(m, kBytes + kPage, PROT_READ | PROT_WRITE));
  m[1] = 4;
  say("pkey", pkey_mprotect(m, kBytes, PROT_READ | PROT_WRITE, -1));
  say_sum("then", m, kBytes);
}

static void case_lock(void) {
  unsigned char *m = merged();
  say("mlock", mlock(m, kBytes / 2));
  say("locked", locked(m, kBytes));
  merge_at_least(m, kBytes, 0);
  if (g_get && counter("pages_merged") > kPages / 2) printf("locked pages are merged\n");
  say("locked", locked(m, kBytes));
  say_sum("then", m, kBytes);
  say("munlock", munlock(m, kBytes / 2));
  say("locked", locked(m, kBytes));
  merge_at_least(m, kBytes, kPages / 4);
  say_sum("then", m, kBytes);
  say("mlock2", mlock2(m, kPage, MLOCK_ONFAULT));
  say("bad flags", mlock2(m, kPage, 64));
  say("munlockall", munlockall());
  say("locked", locked(m, kBytes));
}

static void case_unmap(void) {
  unsigned char *m = merged();
  say("part", munmap(m + 8 * kPage, 4 * kPage));
  printf("readable: %d %d %d\n", readable(m + 7 * kPage), readable(m + 8 * kPage), readable(m + 12 * kPage));
  merge_at_least(m, kBytes, 0);
  say_sum("before the hole", m, 8 * kPage);
  say_sum("behind it", m + 12 * kPage, kBytes - 12 * kPage);
  say("across holes", munmap(m - kPage, kBytes + 2 * kPage));
  say("odd", munmap(m + 1, kPage));
  say("nothing", munmap(m, 0));
  printf("readable: %d\n", readable(m));
}

static void case_replace(void) {
  unsigned char *m = merged();
  say_address("over a part", mmap(m + 8 * kPage, 8 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
  say_sum("then", m, kBytes);
  m[9 * kPage] = 1;
  merge_at_least(m, kBytes, 0);
  say_sum("merged again", m, kBytes);
  say_address("not over it", mmap(m, kPage, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0));
  say_address("refused", mmap(m, kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, -1, 0));
  say_sum("then", m, kBytes);
  for (int i = 0; i < kPages; i++) m[i * kPage + 9] = 1;
  merge_at_least(m, kBytes, 0);
  say_sum("written", m, kBytes);
}

static void case_move(void) {
  unsigned char *m = merged();
  unsigned char *to = map(4 * kBytes);
  memset(to, 1, 4 * kBytes);
  unsigned char *n = mremap(m, kBytes, kBytes, MREMAP_MAYMOVE | MREMAP_FIXED, to);
  say_address("moved", n);
  say_sum("then", n, kBytes);
  printf("readable: %d %d\n", readable(m), readable(n));
  merge_at_least(n, kBytes, kPages / 2);
  n[4 * kPage] = 1;
  say_sum("written", n, kBytes);
  unsigned char *grown = mremap(n, kBytes, 2 * kBytes, MREMAP_MAYMOVE);
  say_address("grown", grown);
  say_sum("then", grown, 2 * kBytes);
  fill(grown + kBytes, kPages, 1);
  merge_at_least(grown, 2 * kBytes, kPages / 2);
  say_sum("filled", grown, 2 * kBytes);
  unsigned char *shrunk = mremap(grown, 2 * kBytes, kBytes / 2, 0);
  say_address("shrunk", shrunk);
  printf("same: %d readable: %d\n", shrunk == grown, readable(grown + kBytes / 2));
  say_sum("then", shrunk, kBytes / 2);
  unsigned char *left = mremap(shrunk, kBytes / 2, kBytes / 2, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
  say_address("left", left);
  say_sum("old", shrunk, kBytes / 2);
  say_sum("new", left, kBytes / 2);
  say_address("odd", mremap(left + 1, kPage, 2 * kPage, MREMAP_MAYMOVE));
  say_address("a hole", mremap(m, kBytes, 2 * kBytes, MREMAP_MAYMOVE));
}

/* A move that is refused in the middle, where it is one of several pieces: whether it moves is not the same, but nothing is lost. */
static void case_move_refused(void) {
  unsigned char *m = merged(), *to = mmap((void *)0x300000000000, 2 * kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const unsigned low = (unsigned)(uintptr_t)to;
  struct sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mremap, 0, 4),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[4])),
      BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, low + 20 * kPage, 0, 2),
      BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, low + 2 * kBytes, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOMEM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  say("filter", prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0));
  for (int form = 0; form < 3; form++) {
    const size_t bytes = 48 * kPage, more = form == 2 ? bytes + 8 * kPage : bytes;
    unsigned char *from = m + 8 * kPage, *got;
    merge_at_least(m, kBytes, 0);
    for (int i = 8; i < 56; i += 2) ((volatile unsigned char *)m)[i * kPage] = m[i * kPage]; /* stays where it is */
    got = mremap(from, bytes, more, MREMAP_MAYMOVE | MREMAP_FIXED | (form == 1 ? MREMAP_DONTUNMAP : 0), to);
    if (g_get && got != MAP_FAILED) printf("form %d: one mapping only\n", form);
    say_sum("then", got == MAP_FAILED ? from : got, bytes);
    if (got == MAP_FAILED) continue;
    if (mremap(got, more, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, from) != from) printf("no way back\n");
  }
  say_sum("in the end", m, kBytes);
}

static void case_unmergeable(void) {
  unsigned char *m = merged();
  say("unmergeable", madvise(m, kBytes / 2, MADV_UNMERGEABLE));
  if (g_get && counter("pages_merged") > kPages / 2) printf("still merged\n");
  say_sum("then", m, kBytes);
  say("all", madvise(m - kPage, kBytes + 2 * kPage, MADV_UNMERGEABLE));
  if (g_get && counter("pages_merged") > 0) printf("still merged\n");
  say("mergeable across holes", madvise(m - kPage, kBytes + 2 * kPage, MADV_MERGEABLE));
  say("odd", madvise(m + 1, kBytes, MADV_MERGEABLE));
  unsigned char *shared = mmap(NULL, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  say("shared memory", madvise(shared, kBytes, MADV_MERGEABLE));
  say("nonsense", madvise(m, kBytes, 4711));
  say_sum("then", m, kBytes);
}

static void case_fork(void) {
  unsigned char *m = merged();
  fflush(stdout);
  for (int kind = 0; kind < 2; kind++) {
    pid_t pid = kind ? _Fork() : fork();
    if (pid == 0) {
      int wrong = 0;
      static unsigned char want[4 * kPage];
      fill(want, 4, 1);
      for (int i = 0; i < kPages; i++) wrong += memcmp(m + i * kPage, want + i % 4 * kPage, kPage) != 0;
      m[0] ^= 1;
      m[0] ^= 1;
      wrong += memcmp(m, want, kPage) != 0;
      wrong += madvise(m + 4 * kPage, 4 * kPage, MADV_DONTNEED) != 0;
      for (int i = 0; i < 4 * kPage; i++) wrong += m[4 * kPage + i] != 0;
      wrong += munmap(m + 8 * kPage, 4 * kPage) != 0;
      wrong += readable(m + 8 * kPage);
      wrong += mprotect(m + 12 * kPage, 4 * kPage, PROT_READ) != 0;
      wrong += writable(m + 12 * kPage);
      unsigned char *moved = mremap(m + 16 * kPage, 4 * kPage, 8 * kPage, MREMAP_MAYMOVE);
      wrong += moved == MAP_FAILED || memcmp(moved, want, 4 * kPage) != 0;
      pid_t grandchild = fork();
      if (grandchild == 0) _exit(memcmp(m + 24 * kPage, want, 4 * kPage) != 0 || m[4 * kPage] != 0);
      wrong += wait_for(grandchild);
      _exit(wrong > 100 ? 100 : wrong);
    }
    say(kind ? "_Fork" : "fork", wait_for(pid));
    say_sum("parent", m, kBytes);
    m[kPage * (kind + 1)] ^= 0x11;
    merge_at_least(m, kBytes, 0);
  }
  say_sum("parent", m, kBytes);
}

static unsigned char *g_memory;
static int clone_child(void *expected) { return sum(g_memory, kBytes) != *(uint64_t *)expected; }
static int forking_child(void *expected) {
  pid_t pid = fork();
  if (pid == 0) {
    unsigned char *own = map(kBytes);
    own[0] = 1;
    munmap(own, kBytes);
    _exit(madvise(g_memory, kPage, MADV_DONTNEED) != 0 || g_memory[0] != 0);
  }
  int status;
  if (pid < 0 || waitpid(pid, &status, 0) != pid || status) return 1;
  munmap(g_memory + 4 * kPage, 4 * kPage);
  return sum(g_memory + 8 * kPage, kPage) != sum((unsigned char *)expected, kPage);
}
static void case_clone(void) {
  unsigned char *m = g_memory = merged();
  static char stack[65536] __attribute__((aligned(16)));
  uint64_t expected = sum(m, kBytes);
  int pid = clone(clone_child, stack + sizeof stack, SIGCHLD, &expected);
  say("clone", pid > 0 ? wait_for(pid) : pid);
  static unsigned char want[4 * kPage];
  fill(want, 4, 1);
  pid = clone(forking_child, stack + sizeof stack, SIGCHLD, want);
  say("clone that forks", pid > 0 ? wait_for(pid) : pid);
  pid = clone(clone_child, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, &expected);
  say("clone with the same memory", pid > 0 ? wait_for(pid) : pid);
  char *arguments[] = {"true", NULL}, *environment[] = {NULL};
  pid_t spawned;
  say("posix_spawn", posix_spawnp(&spawned, "true", NULL, NULL, arguments, environment));
  say("its end", wait_for(spawned));
  say("system", system("exit 3"));
  fflush(stdout);
  pid = (int)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
  if (pid == 0) _exit(sum(m, kBytes) != expected || forking_child(want));
  say("raw clone", wait_for(pid));
  merge_at_least(m, kBytes, 0);
  say_sum("then", m, kBytes);
}

static void *answer(void *descriptor) {
  int fd = (int)(intptr_t)descriptor;
  struct uffd_msg message;
  static unsigned char page[kPage] __attribute__((aligned(4096)));
  memset(page, 0x5a, sizeof page);
  for (int i = 0; i < 4; i++) {
    struct pollfd wait = {fd, POLLIN, 0};
    if (poll(&wait, 1, 5000) != 1 || read(fd, &message, sizeof message) != sizeof message) return (void *)1;
    struct uffdio_copy copy = {message.arg.pagefault.address & ~(uint64_t)(kPage - 1), (uintptr_t)page, kPage, 0, 0};
    if (ioctl(fd, UFFDIO_COPY, &copy)) return (void *)2;
  }
  return NULL;
}
/* Written since it was merged, unmergeable since then, inherited: what is discarded is zero. */
static void case_leftovers(void) {
  unsigned char *m = merged();
  for (int i = 0; i < kPages; i += 2) m[i * kPage + 3] ^= 1;
  say("unmergeable", madvise(m, kBytes, MADV_UNMERGEABLE));
  fflush(stdout);
  pid_t pid = fork();
  if (pid == 0) {
    int wrong = madvise(m, kBytes / 2, MADV_DONTNEED) != 0;
    for (int i = 0; i < kBytes / 2; i++) wrong += m[i] != 0;
    _exit(wrong > 100 ? 100 : wrong);
  }
  say("child", wait_for(pid));
  say("free", madvise(m + kBytes / 2, kBytes / 4, MADV_FREE));
  memset(m + kBytes / 2, 3, kBytes / 4);
  unsigned char *grown = mremap(m, kBytes, 2 * kBytes, MREMAP_MAYMOVE);
  say_address("grown", grown);
  if (grown != MAP_FAILED) say_sum("then", grown, 2 * kBytes);
}

/* What the kernel refuses is refused. */
static void case_refused(void) {
  unsigned char *m = merged();
  say_address("unknown flag", mremap(m, kBytes, kBytes, 8));
  say_address("odd", mremap(m + 1, kBytes, kBytes, MREMAP_MAYMOVE));
  say_address("over itself", mremap(m, kBytes, kBytes, MREMAP_MAYMOVE | MREMAP_FIXED, m + kPage));
  say_sum("then", m, kBytes);
  int self = (int)syscall(SYS_pidfd_open, getpid(), 0);
  say("bad vector", syscall(SYS_process_madvise, self, (void *)16, 1L, MADV_DONTNEED, 0L));
  say("bad flags", syscall(SYS_process_madvise, self, (void *)16, 1L, MADV_DONTNEED, 7L));
  /* A region, and shared memory right behind it: not one mapping, and not to be moved as one. */
  unsigned char *two = map(2 * kBytes);
  fill(two, kPages, 1);
  mmap(two + kBytes, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  madvise(two, kBytes, MADV_MERGEABLE);
  merge(two);
  say_address("two mappings", mremap(two, 2 * kBytes, 3 * kBytes, MREMAP_MAYMOVE));
  printf("readable: %d %d\n", readable(two), readable(two + kBytes));
  say_sum("then", two, kBytes);
}

static void on_alarm(int number) { (void)number; }
/* errno stays what it was, whatever interrupts the wait for the library. */
static void case_errno(void) {
  unsigned char *m = merged();
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_alarm;
  sigaction(SIGALRM, &action, NULL);
  struct itimerval often = {{0, 200}, {0, 200}}, never = {{0, 0}, {0, 0}};
  setitimer(ITIMER_REAL, &often, NULL);
  int changed = 0, failed = 0;
  for (int i = 0; i < 300; i++) {
    errno = 4711;
    failed += mprotect(m, kBytes, PROT_READ | PROT_WRITE) != 0;
    failed += madvise(m, kBytes, i % 2 ? MADV_DONTDUMP : MADV_DODUMP) != 0;
    failed += madvise(m, kPage, MADV_DONTNEED) != 0;
    failed += munmap(map(kPage), kPage) != 0;
    changed += errno != 4711;
  }
  setitimer(ITIMER_REAL, &never, NULL);
  printf("failed %d, changed %d\n", failed, changed);
}

static void case_userfaultfd(void) {
  unsigned char *m = merged();
  int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  struct uffdio_api api = {UFFD_API, 0, 0};
  say("api", ioctl(fd, UFFDIO_API, &api));
  struct uffdio_register range = {{(uintptr_t)m, kBytes}, UFFDIO_REGISTER_MODE_MISSING, 0};
  say("register", ioctl(fd, UFFDIO_REGISTER, &range));
  say_sum("registered", m, kBytes);
  merge_at_least(m, kBytes, 0);
  say("discard", madvise(m + 4 * kPage, 4 * kPage, MADV_DONTNEED));
  pthread_t thread;
  pthread_create(&thread, NULL, answer, (void *)(intptr_t)fd);
  for (int i = 4; i < 8; i++) printf("%x", m[i * kPage]);
  printf("\n");
  void *result;
  pthread_join(thread, &result);
  say("handler", (long)(intptr_t)result);
  struct uffdio_range all = {(uintptr_t)m, kBytes};
  say("unregister", ioctl(fd, UFFDIO_UNREGISTER, &all));
  close(fd);
  say_sum("then", m, kBytes);
  if (g_merge) { /* taken up again, without being asked */
    long again = 0;
    for (int i = 0; i < 100 && again < kPages / 2; i++) {
      usleep(50000);
      again += g_merge(m, kBytes);
    }
    if (again < kPages / 2) printf("not taken up again: %ld\n", again);
  }
  say_sum("then", m, kBytes);
}

static void case_syscall(void) {
  unsigned char *m = merged();
  unsigned char *n = (unsigned char *)syscall(SYS_mmap, NULL, (long)kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1L, 0L);
  fill(n, kPages, 1);
  say("mergeable", syscall(SYS_madvise, n, (long)kBytes, MADV_MERGEABLE));
  merge(n);
  say("dontneed", syscall(SYS_madvise, m, 8L * kPage, MADV_DONTNEED));
  say_sum("then", m, kBytes);
  say("munmap", syscall(SYS_munmap, m, (long)kBytes));
  printf("readable: %d %d\n", readable(m), readable(n));
  say("mprotect", syscall(SYS_mprotect, n, (long)kPage, PROT_READ));
  unsigned char *moved = (unsigned char *)syscall(SYS_mremap, n + kPage, (long)kBytes - kPage, (long)kBytes, MREMAP_MAYMOVE, 0L);
  say_sum("moved", moved, kBytes);
  int self = (int)syscall(SYS_pidfd_open, getpid(), 0L);
  struct iovec part = {moved, 4 * kPage};
  long result = syscall(SYS_process_madvise, self, &part, 1L, MADV_COLD, 0L);
  say("process_madvise", result);
  say("no such call", syscall(100000L));
  say("getpid", syscall(SYS_getpid) == getpid());
  say_sum("then", moved, kBytes);
}

static void *on_stack(void *argument) {
  volatile char local[1000];
  memset((char *)local, 1, sizeof local);
  return (char *)argument + local[7];
}
static void case_stack(void) {
  const size_t bytes = 64 * 1024;
  unsigned char *m = map(bytes);
  fill(m, bytes / kPage, 1);
  madvise(m, bytes, MADV_MERGEABLE);
  merge_at_least(m, bytes, 8);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  say("setstack", pthread_attr_setstack(&attributes, m, bytes));
  say("odd", pthread_attr_setstack(&attributes, m, 5) == EINVAL);
  for (int i = 0; i < 20; i++) {
    pthread_t thread;
    void *result = NULL;
    if (pthread_create(&thread, &attributes, on_stack, (void *)6)) printf("no thread\n");
    merge_at_least(m, bytes, 0);
    pthread_join(thread, &result);
    if (result != (void *)7) printf("wrong\n");
  }
}

static void case_memory_merge(void) {
  unsigned char *before = map(kBytes);
  fill(before, kPages, 1);
  say("get", prctl(PR_GET_MEMORY_MERGE_, 0, 0, 0, 0));
  say("bad", prctl(PR_SET_MEMORY_MERGE_, 1, 1, 0, 0));
  say("set", prctl(PR_SET_MEMORY_MERGE_, 1, 0, 0, 0));
  say("get", prctl(PR_GET_MEMORY_MERGE_, 0, 0, 0, 0));
  unsigned char *after = map(kBytes);
  fill(after, kPages, 1);
  if (g_merge) {
    for (int i = 0; i < 100 && counter("pages_merged") < 2 * kPages; i++) {
      usleep(50000);
      g_merge(before, kBytes), g_merge(after, kBytes);
    }
    if (counter("pages_merged") < 2 * kPages) printf("merged only %ld\n", (long)counter("pages_merged"));
  }
  say_sum("before", before, kBytes);
  say_sum("after", after, kBytes);
  fflush(stdout);
  pid_t pid = fork();
  if (pid == 0) {
    execl("/proc/self/exe", "program", "memory_merge_inherited", NULL);
    _exit(99);
  }
  say("after exec", wait_for(pid));
  say("unset", prctl(PR_SET_MEMORY_MERGE_, 0, 0, 0, 0));
  if (g_get && counter("pages_merged") > 0) printf("still merged: %ld\n", (long)counter("pages_merged"));
  say("get", prctl(PR_GET_MEMORY_MERGE_, 0, 0, 0, 0));
  say_sum("before", before, kBytes);
}
static void case_memory_merge_inherited(void) { exit(10 + prctl(PR_GET_MEMORY_MERGE_, 0, 0, 0, 0)); }

/* Whether somebody merges here at all. */
static void case_is_merging(void) {
  unsigned char *m = map(kBytes);
  fill(m, kPages, 1);
  madvise(m, kBytes, MADV_MERGEABLE);
  if (g_merge && counter("regions") > 0) g_merge(m, kBytes);
  printf("%d\n", counter("pages_merged_total") >= kPages);
}
/* Whether the kernel has been told: "mg" in smaps. */
static void case_kernel(void) {
  unsigned char *m = map(kBytes);
  fill(m, kPages, 1);
  say("mergeable", madvise(m, kBytes, MADV_MERGEABLE));
  FILE *f = fopen("/proc/self/smaps", "r");
  char line[512];
  int inside = 0, told = 0;
  while (fgets(line, sizeof line, f)) {
    unsigned long start, end;
    if (sscanf(line, "%lx-%lx ", &start, &end) == 2) inside = start < (uintptr_t)m + kBytes && end > (uintptr_t)m;
    else if (inside && strncmp(line, "VmFlags:", 8) == 0) told |= strstr(line, " mg") != NULL;
  }
  fclose(f);
  printf("told: %d\n", told);
  say("unmergeable", madvise(m, kBytes, MADV_UNMERGEABLE));
}

/* Many threads do all of it at once, each on memory of its own, while the scanner merges. */
static void *churn(void *seed) {
  unsigned state = (unsigned)(uintptr_t)seed;
  long wrong = 0;
  static const int kRounds = 150;
  for (int round = 0; round < kRounds; round++) {
    size_t pages = 16 + rand_r(&state) % 48, bytes = pages * kPage;
    unsigned char *m = map(bytes);
    madvise(m, bytes, MADV_MERGEABLE);
    fill(m, pages, 1);
    static __thread unsigned char want[4 * kPage];
    fill(want, 4, 1);
    if (rand_r(&state) % 2) usleep(rand_r(&state) % 3000);
    if (g_merge && rand_r(&state) % 2) g_merge(m, bytes);
    unsigned from = rand_r(&state) % pages, count = 1 + rand_r(&state) % (pages - from);
    int zero = 0;
    switch (rand_r(&state) % 7) {
      case 0: madvise(m + from * kPage, count * kPage, MADV_DONTNEED), zero = 1; break;
      case 1: memset(m + from * kPage, 0, count * kPage), zero = 1; break;
      case 2: mprotect(m, bytes, PROT_READ); break;
      case 3: {
        unsigned char *n = mremap(m, bytes, bytes + kBytes, MREMAP_MAYMOVE);
        if (n == MAP_FAILED) wrong++;
        else m = n, bytes += kBytes;
        break;
      }
      case 4: mmap(m + from * kPage, count * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), zero = 1; break;
      case 5: munmap(m + from * kPage, count * kPage), zero = 2; break;
      default: break;
    }
    if (rand_r(&state) % 2) usleep(rand_r(&state) % 2000);
    if (round % 3 == 2) { /* what has been merged is written, and is what it was again */
      if (g_merge) g_merge(m, pages * kPage);
      mprotect(m, from * kPage, PROT_READ | PROT_WRITE);
      for (unsigned i = 0; i < from; i++) m[i * kPage + 5] ^= 9;
      usleep(1000);
      for (unsigned i = 0; i < from; i++) m[i * kPage + 5] ^= 9;
    }
    for (unsigned i = 0; i < pages; i++) {
      int inside = i >= from && i < from + count;
      if (zero == 2 && inside) continue;
      if (zero && inside) {
        for (int k = 0; k < kPage; k++) wrong += m[i * kPage + k] != 0;
      } else {
        wrong += memcmp(m + i * kPage, want + i % 4 * kPage, kPage) != 0;
      }
    }
    if (zero == 2) { /* the hole may be somebody else's by now */
      munmap(m, from * kPage);
      munmap(m + (from + count) * kPage, bytes - (from + count) * kPage);
    } else {
      munmap(m, bytes);
    }
  }
  return (void *)wrong;
}
static void case_churn(void) {
  if (g_set) g_set("sleep_millisecs", 0), g_set("cpu_limit_percent", 100);
  pthread_t threads[6];
  long wrong = 0;
  for (uintptr_t i = 0; i < 6; i++) pthread_create(&threads[i], NULL, churn, (void *)(i + 1));
  for (int i = 0; i < 6; i++) {
    void *result;
    pthread_join(threads[i], &result);
    wrong += (long)result;
  }
  printf("wrong: %ld\n", wrong);
  if (g_get && (counter("pages_merged_total") < 1000 || counter("cow_breaks") < 100)) {
    printf("merged %ld, broken %ld\n", (long)counter("pages_merged_total"), (long)counter("cow_breaks"));
  }
}

/* Automatic: nothing is advised. */
static void case_automatic(void) {
  const size_t bytes = 4 << 20;
  unsigned char *big = map(bytes), *small = map(kBytes + 2 * kPage), *refused = map(bytes), *reserved;
  /* Not beside another one: the two would be one mapping, for the kernel as for the shim. */
  munmap(small, kPage), munmap(small + kPage + kBytes, kPage);
  small += kPage;
  reserved = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  unsigned char *stack = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
  unsigned char *code = mmap(NULL, bytes, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  say("unmergeable", madvise(refused, bytes, MADV_UNMERGEABLE));
  say("commit", mprotect(reserved, bytes, PROT_READ | PROT_WRITE));
  unsigned char *of_libc = malloc(8 << 20); /* mapped inside libc */
  unsigned char *all[] = {big, refused, reserved, stack, code, of_libc};
  for (int i = 0; i < 6; i++) fill(all[i], bytes / kPage, 1);
  fill(small, kPages, 1);
  if (g_get) {
    for (int i = 0; i < 200 && counter("pages_merged") < 2 * (long)(bytes / kPage); i++) usleep(50000);
    usleep(500000);
    long merged = counter("pages_merged"), tracked = counter("pages_tracked");
    if (merged != 2 * (long)(bytes / kPage) || tracked != merged) printf("merged %ld, tracked %ld\n", merged, tracked);
  }
  for (int i = 0; i < 6; i++) say_sum("bytes", all[i], bytes);
  for (size_t i = 0; i < bytes; i += 5 * kPage) big[i + 7] = 1, reserved[i + 3] = 2;
  for (int i = 0; i < 6; i++) say_sum("bytes", all[i], bytes);
  say("unmap", munmap(big, bytes));
  say("unmap", munmap(reserved, bytes));
  fflush(stdout);
  /* A forked child has what it maps to itself. */
  pid_t pid = fork();
  if (pid == 0) {
    unsigned char *own = map(bytes);
    fill(own, bytes / kPage, 2);
    int enough = 1;
    usleep(400000);
    static unsigned char want[4 * kPage];
    fill(want, 4, 2);
    for (size_t i = 0; i < bytes / kPage; i++) enough &= memcmp(own + i * kPage, want + i % 4 * kPage, kPage) == 0;
    _exit(enough);
  }
  say("child", wait_for(pid));
}

/* A userfaultfd for what is missing, on memory of which everything can be said: merged, written since, all zeros, discarded, and
   used again. What was ever written is there; what was discarded is missing. KSMU_REMERGE_SECONDS=0: no device writes here. */
static void case_handed_over(void) {
  unsigned char *m = merged();
  memset(m + 16 * kPage, 0, 8 * kPage);
  merge(m);
  for (int i = 0; i < 8; i++) m[i * 2 * kPage] ^= 1;
  say("discard", madvise(m + 24 * kPage, 4 * kPage, MADV_DONTNEED));
  say("discard zeros", madvise(m + 18 * kPage, kPage, MADV_DONTNEED));
  fill(m + 25 * kPage, 1, 3);
  int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  struct uffdio_api api = {UFFD_API, 0, 0};
  say("api", ioctl(fd, UFFDIO_API, &api));
  struct uffdio_register range = {{(uintptr_t)m, kBytes}, UFFDIO_REGISTER_MODE_MISSING, 0};
  say("register", ioctl(fd, UFFDIO_REGISTER, &range));
  /* By the kernel: a page that is missing is filled if it is (EEXIST: it is not). */
  for (size_t i = 0; i < kPages; i++) {
    struct uffdio_zeropage zero = {{(uintptr_t)m + i * kPage, kPage}, UFFDIO_ZEROPAGE_MODE_DONTWAKE, 0};
    if (ioctl(fd, UFFDIO_ZEROPAGE, &zero) == 0) printf("page %zu was missing\n", i);
    else if (errno != EEXIST) printf("page %zu: %s\n", i, strerrorname_np(errno));
  }
  say_sum("then", m, kBytes);
  close(fd);
  say_sum("closed", m, kBytes);
}

/* Names of anonymous memory, where the kernel has them; and where the memory is bound, which is a range's too. */
static void case_name(void) {
#ifdef PR_SET_VMA
  unsigned char *memory = merged();
  say("name", prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, memory, kBytes, "equal pages"));
  say("no name", prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, memory + kPage, kPage, NULL));
  say("bad name", prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, memory, kBytes, "$"));
  say("unaligned", prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, memory + 1, kPage, "equal"));
  merge(memory);
  say_sum("named", memory, kBytes);
  memory[5 * kPage] ^= 1;
  say_sum("written", memory, kBytes);
  say("mbind", syscall(SYS_mbind, memory, kBytes, 0 /* MPOL_DEFAULT */, NULL, 0, 0));
  merge(memory);
  say_sum("bound", memory, kBytes);
#endif
}

static const struct {
  const char *name;
  void (*run)(void);
} kCases[] = {
    {"write", case_write},       {"discard", case_discard},         {"remove", case_remove},     {"wipe", case_wipe},
    {"collapse", case_collapse}, {"guard", case_guard},             {"dontfork", case_dontfork}, {"protect", case_protect},
    {"lock", case_lock},         {"unmap", case_unmap},             {"replace", case_replace},   {"move", case_move},
    {"move_refused", case_move_refused},
    {"unmergeable", case_unmergeable}, {"fork", case_fork},         {"clone", case_clone},       {"userfaultfd", case_userfaultfd},
    {"syscall", case_syscall}, {"leftovers", case_leftovers}, {"refused", case_refused}, {"errno", case_errno},   {"stack", case_stack},             {"memory_merge", case_memory_merge},
    {"memory_merge_inherited", case_memory_merge_inherited},        {"handed_over", case_handed_over}, {"name", case_name},         {"churn", case_churn},       {"automatic", case_automatic},
    {"is_merging", case_is_merging}, {"kernel", case_kernel},
};

enum { kAsked = 2 }; /* at the end: not cases, but what the test asks about */

int main(int argc, char **argv) {
  find_library();
  for (size_t i = 0; i < sizeof kCases / sizeof *kCases; i++) {
    if (argc > 1 && strcmp(argv[1], kCases[i].name) == 0) {
      kCases[i].run();
      return 0;
    }
    if (argc == 1 && i < sizeof kCases / sizeof *kCases - kAsked && kCases[i].run != case_memory_merge_inherited) puts(kCases[i].name);
  }
  return argc > 1 ? 2 : 0;
}
