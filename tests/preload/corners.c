/*
 * Corners of the preloaded shim, each of which lost bytes, hung or died once: signals and forks, threads beside a call, and what
 * the process cannot have any more. As program.c: without arguments it prints its cases, with one it runs that, and what it
 * prints is the same without the shim and with it.
 */
#include "program.h"

#include <linux/seccomp.h>
#include <sys/resource.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
/* Written since it was merged: stays in the frames' mapping. */
static void write_all(unsigned char *m) {
  for (int i = 0; i < kPages; i++) ((volatile unsigned char *)m)[i * kPage] = m[i * kPage];
}
static volatile int g_stop, g_count;

/* A thread goes into strict mode by number: it lives, and the others can fork. */
static void *strict(void *pipe_end) {
  if (syscall(SYS_seccomp, SECCOMP_SET_MODE_STRICT, 0, 0)) return NULL;
  write(*(int *)pipe_end, "x", 1);
  syscall(SYS_exit, 0);
  return NULL;
}
static void case_strict_mode(void) {
  int ends[2];
  char byte;
  merged();
  if (pipe(ends)) abort();
  pthread_t thread;
  pthread_create(&thread, NULL, strict, &ends[1]);
  struct pollfd ready = {ends[0], POLLIN, 0};
  printf("it went on: %d\n", poll(&ready, 1, 5000) == 1 && read(ends[0], &byte, 1) == 1);
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) _exit(7);
  printf("fork: %d\n", wait_for(child));
}

/* What would have to be looked at cannot be. */
static void case_no_descriptors(void) {
  unsigned char *m = merged();
  write_all(m);
  const struct rlimit none = {3, 3};
  setrlimit(RLIMIT_NOFILE, &none);
  say_sum("before", m, kBytes);
  unsigned char *grown = mremap(m, kBytes, 2 * kBytes, MREMAP_MAYMOVE);
  say_address("grown", grown);
  say_sum("then", grown, 2 * kBytes);
  unsigned char *shrunk = mremap(grown, 2 * kBytes, kBytes / 2, MREMAP_MAYMOVE);
  say_address("shrunk", shrunk);
  say_sum("then", shrunk, kBytes / 2);
  say("free", madvise(shrunk, kBytes / 2, MADV_FREE));
}

/* A child that cannot look at its mappings, and whose parent, who would answer for them, has gone: a discard may fail, but never
 * shows old bytes as if it had not. */
static void case_no_proc(void) {
  unsigned char *m = merged();
  const pid_t parent = getpid();
  fflush(stdout);
  if (fork() != 0) _exit(0);
  for (int i = 0; i < 5000 && getppid() == parent; i++) usleep(1000);
  if (chroot("/sys") && errno != EPERM) printf("chroot: %s\n", strerrorname_np(errno));
  const int r = madvise(m, kBytes, MADV_DONTNEED);
  int old = 0;
  for (int i = 0; i < kBytes; i++) old += m[i] != 0;
  printf("old bytes: %d\n", r == 0 ? old : 0);
}

/* A forked child with threads: what one of them writes while another names the memory. */
static void *counts(void *memory) {
  unsigned char *m = memory;
  static uint64_t last[kPages];
  for (uint64_t v = 1; !g_stop; v++) {
    for (int i = 0; i < kPages; i++) {
      volatile uint64_t *word = (volatile uint64_t *)(void *)(m + i * kPage + 64);
      if (last[i] && *word != last[i]) g_count++;
      *word = last[i] = v;
    }
  }
  return NULL;
}
static void case_threads_in_a_child(void) {
  unsigned char *m = merged();
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    pthread_t thread;
    pthread_create(&thread, NULL, counts, m);
    for (int i = 0; i < 50; i++) {
      usleep(2000);
      prctl(0x53564d41 /* PR_SET_VMA */, 0, m, kBytes, "named");
      madvise(m, kBytes, MADV_WIPEONFORK);
    }
    g_stop = 1;
    pthread_join(thread, NULL);
    printf("lost in the child: %d\n", g_count);
    fflush(stdout);
    _exit(7);
  }
  printf("child: %d\n", wait_for(child));
}

/* While memory is moved away and its place stays, nobody else's mapping comes to lie there. */
static void *maps(void *unused) {
  while (!g_stop) {
    volatile unsigned char *p = mmap(NULL, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    p[5] = 77;
    for (volatile int k = 0; k < 3000; k++) {
    }
    g_count += p[5] != 77;
    munmap((void *)p, kPage);
  }
  return unused;
}
static void case_strangers(void) {
  unsigned char *m = merged(), *to = map(kBytes);
  write_all(m);
  /* The highest hole is taken first: there is to be none above. */
  while ((unsigned char *)mmap(NULL, kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) > m) {
  }
  pthread_t thread;
  pthread_create(&thread, NULL, maps, NULL);
  const double end = now() + 1;
  while (now() < end) {
    if (mremap(m, kBytes, kBytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) != to) printf("not moved: %s\n", strerrorname_np(errno));
    if (mremap(to, kBytes, kBytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, m) != m) printf("not back: %s\n", strerrorname_np(errno));
  }
  g_stop = 1;
  pthread_join(thread, NULL);
  printf("strangers' bytes lost: %d\n", g_count);
  say_sum("then", m, kBytes);
}

/* A signal whose handler forks, on the thread that forks, and on one that is in the middle of malloc while another forks. */
static void forks(int number) {
  (void)number;
  const int saved = errno;
  const pid_t child = _Fork();
  if (child == 0) _exit(0);
  if (child > 0) waitpid(child, NULL, 0);
  g_count++;
  errno = saved;
}
static void *allocates(void *unused) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGUSR2);
  pthread_sigmask(SIG_UNBLOCK, &signals, NULL);
  while (!g_stop) {
    void *some[64];
    for (int i = 0; i < 64; i++) some[i] = malloc(2000 + (size_t)i * 97);
    for (int i = 0; i < 64; i++) free(some[i]);
  }
  return unused;
}
static void case_forks_in_handlers(void) {
  unsigned char *m = merged();
  struct sigaction action = {.sa_handler = forks, .sa_flags = SA_RESTART};
  sigaction(SIGUSR2, &action, NULL);
  sigaction(SIGALRM, &action, NULL);
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGUSR2);
  pthread_sigmask(SIG_BLOCK, &signals, NULL);
  pthread_t thread;
  pthread_create(&thread, NULL, allocates, NULL);
  const struct itimerval often = {{0, 30000}, {0, 30000}};
  setitimer(ITIMER_REAL, &often, NULL);
  int made = 0;
  const double end = now() + 60;
  for (; made < 40 && now() < end; made++) {
    pthread_kill(thread, SIGUSR2);
    const pid_t child = fork();
    if (child == 0) _exit(7);
    int status;
    while (waitpid(child, &status, 0) != child) {
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 7) printf("a child: %x\n", status);
    m[made * kPage]++;
    usleep(5000);
  }
  const struct itimerval never = {{0, 0}, {0, 0}};
  setitimer(ITIMER_REAL, &never, NULL);
  g_stop = 1;
  pthread_join(thread, NULL);
  printf("forks: %d, in handlers: %d\n", made, g_count > 0);
  say_sum("then", m, kBytes);
}

static const struct {
  const char *name;
  void (*run)(void);
} kCases[] = {
    {"strict_mode", case_strict_mode}, {"no_descriptors", case_no_descriptors}, {"no_proc", case_no_proc},
    {"threads_in_a_child", case_threads_in_a_child}, {"strangers", case_strangers}, {"forks_in_handlers", case_forks_in_handlers},
};

int main(int argc, char **argv) {
  find_library();
  for (size_t i = 0; i < sizeof kCases / sizeof *kCases; i++) {
    if (argc < 2) puts(kCases[i].name);
    else if (strcmp(argv[1], kCases[i].name) == 0) return kCases[i].run(), 0;
  }
  return argc < 2 ? 0 : 2;
}
