/*
 * Allocates, checks, frees and forks with many threads: `mallocs SECONDS`. Every block has its own pattern; blocks of a few
 * kinds, so that whole pages are alike. Prints how much was merged where a library is there to ask. Exit status 1: wrong bytes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { kThreads = 6, kBlocks = 400 };
static double g_until;
static long g_wrong;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}
static void fill(unsigned char *p, size_t bytes, unsigned kind) { memset(p, (int)(kind * 37 + 1), bytes); }
static int check(const unsigned char *p, size_t bytes, unsigned kind) {
  const unsigned char want = (unsigned char)(kind * 37 + 1);
  for (size_t i = 0; i < bytes; i++) {
    if (p[i] != want) return 0;
  }
  return 1;
}
static size_t size_of(unsigned *state) {
  switch (rand_r(state) % 8) {
    case 0: return 1 + (size_t)rand_r(state) % (3 << 20);
    case 1: case 2: return 1 + (size_t)rand_r(state) % 200000;
    default: return 1 + (size_t)rand_r(state) % 9000;
  }
}

static void *work(void *seed) {
  unsigned state = (unsigned)(uintptr_t)seed;
  static __thread struct { unsigned char *p; size_t bytes; unsigned kind; } blocks[kBlocks];
  while (now() < g_until) {
    const int i = rand_r(&state) % kBlocks;
    if (!blocks[i].p) {
      blocks[i].bytes = size_of(&state), blocks[i].kind = rand_r(&state) % 5;
      const int zeroed = rand_r(&state) % 4 == 0;
      blocks[i].p = zeroed ? calloc(1, blocks[i].bytes) : malloc(blocks[i].bytes);
      if (!blocks[i].p) continue;
      if (zeroed) {
        for (size_t k = 0; k < blocks[i].bytes; k += 97) {
          if (blocks[i].p[k]) __atomic_add_fetch(&g_wrong, 1, __ATOMIC_RELAXED);
        }
      }
      fill(blocks[i].p, blocks[i].bytes, blocks[i].kind);
    } else {
      if (!check(blocks[i].p, blocks[i].bytes, blocks[i].kind)) __atomic_add_fetch(&g_wrong, 1, __ATOMIC_RELAXED);
      switch (rand_r(&state) % 3) {
        case 0: {
          const size_t bytes = size_of(&state);
          unsigned char *p = realloc(blocks[i].p, bytes);
          if (!p) break;
          if (!check(p, bytes < blocks[i].bytes ? bytes : blocks[i].bytes, blocks[i].kind)) __atomic_add_fetch(&g_wrong, 1, __ATOMIC_RELAXED);
          fill(p, bytes, blocks[i].kind);
          blocks[i].p = p, blocks[i].bytes = bytes;
          break;
        }
        case 1: fill(blocks[i].p, blocks[i].bytes, blocks[i].kind = rand_r(&state) % 5); break;
        default: free(blocks[i].p), blocks[i].p = NULL;
      }
    }
    if (rand_r(&state) % 64 == 0) usleep(1000);
    if (rand_r(&state) % 4096 == 0) {
      const pid_t pid = fork();
      if (pid == 0) {
        for (int k = 0; k < kBlocks; k++) {
          if (blocks[k].p && !check(blocks[k].p, blocks[k].bytes, blocks[k].kind)) _exit(1);
          if (k % 2) free(blocks[k].p);
        }
        unsigned char *p = calloc(1, 300000);
        for (int k = 0; p && k < 300000; k++) {
          if (p[k]) _exit(1);
        }
        _exit(0);
      }
      int status = 0;
      if (pid > 0 && (waitpid(pid, &status, 0) != pid || status != 0)) {
        fprintf(stderr, "a child ended with status %x\n", status);
        __atomic_add_fetch(&g_wrong, 1, __ATOMIC_RELAXED);
      }
    }
  }
  for (int i = 0; i < kBlocks; i++) free(blocks[i].p);
  return NULL;
}

int main(int argc, char **argv) {
  g_until = now() + (argc > 1 ? atof(argv[1]) : 5);
  pthread_t threads[kThreads];
  for (uintptr_t i = 0; i < kThreads; i++) pthread_create(&threads[i], NULL, work, (void *)(i + 1));
  for (int i = 0; i < kThreads; i++) pthread_join(threads[i], NULL);
  int (*get)(const char *, int64_t *) = (int (*)(const char *, int64_t *))dlsym(RTLD_DEFAULT, "ksmu_get");
  int64_t merged = 0, breaks = 0, zeros = 0;
  if (get) get("pages_merged_total", &merged), get("cow_breaks", &breaks), get("ksm_zero_pages", &zeros);
  printf("merged %ld broken %ld wrong %ld\n", (long)merged, (long)breaks, g_wrong);
  return g_wrong != 0;
}
