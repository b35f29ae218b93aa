// Stress test: words that the kernel writes for threads that cannot wait, in merged memory: robust mutexes whose owners
// die, priority-inheriting futexes, and the words that are cleared when a thread exits.
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <fstream>
#include <memory>
#include <string>
#include <thread>

#include "stress_state.h"
#include "test_support.h"

namespace ksmu::stress {
namespace {

// One object at the start of each page, the rest a pattern: at rest, pages of one kind are all equal.
constexpr std::size_t kRobustPages = 32, kPriorityPages = 8, kExitPages = 32;
constexpr std::size_t kPages = kRobustPages + kPriorityPages + kExitPages;
constexpr std::size_t kObject = 128;  // bytes reserved for it
unsigned char* g_locks = nullptr;

unsigned char* LockPage(std::size_t i) { return g_locks + i * g.page_size; }
pthread_mutex_t* Robust(std::size_t i) { return reinterpret_cast<pthread_mutex_t*>(LockPage(i)); }
std::uint32_t* Priority(std::size_t i) { return reinterpret_cast<std::uint32_t*>(LockPage(kRobustPages + i)); }
std::uint32_t* Exit(std::size_t i) { return reinterpret_cast<std::uint32_t*>(LockPage(kRobustPages + kPriorityPages + i)); }

void CheckRest(std::size_t i, const char* when) {
  if (memcmp(LockPage(i) + kObject, g.pattern(9) + kObject, g.page_size - kObject) != 0) {
    Fail("WRONG BYTES %s: beside the lock on page %zu", when, i);
    memcpy(LockPage(i) + kObject, g.pattern(9) + kObject, g.page_size - kObject);
  }
}

timespec In(clockid_t clock, double seconds) {
  timespec t;
  clock_gettime(clock, &t);
  t.tv_sec += static_cast<time_t>(seconds);
  return t;
}

}  // namespace

void SetUpLocks() {
  void* p = mmap(nullptr, kPages * g.page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) abort();
  madvise(p, kPages * g.page_size, MADV_NOHUGEPAGE);
  g_locks = static_cast<unsigned char*>(p);
  static_assert(sizeof(pthread_mutex_t) <= kObject);
  for (std::size_t i = 0; i < kPages; ++i) {
    memcpy(LockPage(i), g.pattern(9), g.page_size);
    memset(LockPage(i), 0, kObject);
  }
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
  for (std::size_t i = 0; i < kRobustPages; ++i) pthread_mutex_init(Robust(i), &attributes);
  pthread_mutexattr_destroy(&attributes);
}

void AdviseLocks() {
  if (ksmu_advise(g_locks, kPages * g.page_size, KSMU_MERGEABLE) != 0) {
    Fail("ksmu_advise(locks): %s: %s", strerror(errno), ksmu_last_error());
  }
}

// A thread locks and dies; the next to lock has to be told.
void RobustOwners(int slot) {
  Random random(g.options.seed * 41 + static_cast<std::uint64_t>(g.phase.name));
  while (!g.stop.load()) {
    Step(slot);
    const std::size_t i = random.Below(kRobustPages);
    const double hold = 0.0005 * static_cast<double>(random.Below(8));
    bool locked = false;
    std::thread([&] {
      locked = pthread_mutex_lock(Robust(i)) == 0;
      test::SleepSeconds(hold);
    }).join();
    if (!locked) {
      Fail("a robust mutex that nobody holds cannot be locked (page %zu)", i);
      continue;
    }
    const timespec limit = In(CLOCK_MONOTONIC, 5);
    const int result = pthread_mutex_clocklock(Robust(i), CLOCK_MONOTONIC, &limit);
    if (result != EOWNERDEAD) {
      Fail("a robust mutex whose owner died (page %zu): %s, not EOWNERDEAD", i, result == 0 ? "locked" : strerror(result));
      memset(Robust(i), 0, kObject);
      pthread_mutexattr_t attributes;
      pthread_mutexattr_init(&attributes);
      pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
      pthread_mutex_init(Robust(i), &attributes);
      continue;
    }
    if (pthread_mutex_consistent(Robust(i)) != 0 || pthread_mutex_unlock(Robust(i)) != 0) Fail("robust mutex %zu", i);
    CheckRest(i, "at a robust mutex");
    g.tally.robust.fetch_add(1);
  }
}

namespace {
std::atomic<int> g_priority_owner[kPriorityPages];
}

// Contended, so that the kernel writes the words. Where it cannot wait for the page it says EFAULT (a documented limit
// for the time that a gate is shut); then the caller tries again. Never may two hold one lock.
void PriorityFutexes(int slot, int index) {
  Random random(g.options.seed * 43 + static_cast<std::uint64_t>(index) + static_cast<std::uint64_t>(g.phase.name) * 3);
  const std::uint32_t tid = static_cast<std::uint32_t>(syscall(SYS_gettid));
  for (std::uint64_t n = 0; !g.stop.load(); ++n) {
    Step(slot);
    const std::size_t i = (n / 64 + random.Below(2)) % kPriorityPages;
    std::uint32_t* word = Priority(i);
    std::uint32_t free_word = 0;
    if (!__atomic_compare_exchange_n(word, &free_word, tid, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
      for (;;) {
        const timespec limit = In(CLOCK_REALTIME, 5);
        if (syscall(SYS_futex, word, FUTEX_LOCK_PI_PRIVATE, 0, &limit, nullptr, 0) == 0) break;
        if (errno == EINTR || errno == EAGAIN) continue;
        if (errno == EFAULT) {
          g.tally.priority_refused.fetch_add(1);
          continue;
        }
        Fail("FUTEX_LOCK_PI on page %zu: %s; the word is %x", i, strerror(errno), __atomic_load_n(word, __ATOMIC_RELAXED));
        return;
      }
    }
    if ((__atomic_load_n(word, __ATOMIC_RELAXED) & FUTEX_TID_MASK) != tid) Fail("a priority-inheriting futex (page %zu) is held, and not by its owner", i);
    if (g_priority_owner[i].exchange(static_cast<int>(tid)) != 0) Fail("two threads hold the futex of page %zu", i);
    if (random.OneIn(4)) test::SleepSeconds(0.0002);
    g_priority_owner[i].store(0);
    std::uint32_t mine = tid;
    if (!__atomic_compare_exchange_n(word, &mine, 0, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {
      while (syscall(SYS_futex, word, FUTEX_UNLOCK_PI_PRIVATE, 0, nullptr, nullptr, 0) != 0) {
        if (errno == EFAULT) g.tally.priority_refused.fetch_add(1);
        if (errno == EFAULT || errno == EINTR || errno == EAGAIN) continue;
        Fail("FUTEX_UNLOCK_PI on page %zu: %s", i, strerror(errno));
        return;
      }
    }
    CheckRest(kRobustPages + i, "at a priority-inheriting futex");
    g.tally.priority.fetch_add(1);
    if (n % 8 == 0) test::SleepSeconds(0.001);
  }
}

namespace {

struct Exiting {
  std::uint32_t* word;
  bool holds_tid;
  double lives;
};

// What the kernel says of a thread, for a report: its state, and what it waits for.
std::string ThreadState(int tid) {
  std::string text;
  for (const char* file : {"stat", "syscall", "wchan", "stack"}) {
    std::ifstream in("/proc/self/task/" + std::to_string(tid) + "/" + file);
    for (std::string line; std::getline(in, line);) text += line + "; ";
  }
  return text;
}

void* ExitingMain(void* argument) {
  const Exiting e = *static_cast<Exiting*>(argument);
  // As the kernel's own CLONE_CHILD_SETTID does; or a word that nobody can know for what it is.
  const std::uint32_t value = e.holds_tid ? static_cast<std::uint32_t>(syscall(SYS_gettid)) : 1;
  __atomic_store_n(e.word, value, __ATOMIC_RELEASE);
  syscall(SYS_set_tid_address, e.word);
  test::SleepSeconds(e.lives);
  return nullptr;
}

}  // namespace

// The kernel clears the word when the thread has gone; who joins it waits for that. Stacks are ours, and the threads
// detached: libc would wait for the words that these take the place of.
void ExitWords(int slot) {
  Random random(g.options.seed * 47 + static_cast<std::uint64_t>(g.phase.name));
  constexpr std::size_t kStack = 1 << 20;
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstack(&attributes, stack, kStack);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  while (!g.stop.load()) {
    Step(slot);
    const std::size_t i = random.Below(kExitPages);
    Exiting e = {Exit(i), random.OneIn(2), 0.0005 * static_cast<double>(random.Below(12))};
    std::atomic<bool> begun{false};
    struct Start {
      Exiting* exiting;
      std::atomic<bool>* begun;
      std::atomic<int> tid;
    } start = {&e, &begun, 0};
    pthread_t thread;
    const auto main = [](void* argument) -> void* {
      Start* s = static_cast<Start*>(argument);
      Exiting mine = *s->exiting;
      s->tid.store(static_cast<int>(syscall(SYS_gettid)));
      s->begun->store(true);
      return ExitingMain(&mine);
    };
    if (const int r = pthread_create(&thread, &attributes, main, &start); r != 0) {
      Fail("pthread_create: %s", strerror(r));
      break;
    }
    while (!begun.load()) test::SleepSeconds(0.0001);
    const int tid = start.tid.load();
    // On its way out it takes mmap_lock, behind everybody who maps, faults and forks here: seen to take seconds beside
    // compilers, on two CPUs. A hold that keeps pages away for as long would show here, too.
    const double begun_to_wait = Now(), end = begun_to_wait + (test::kSanitized ? 10 : 3);
    while (syscall(SYS_tgkill, getpid(), tid, 0) == 0 && Now() < end) test::SleepSeconds(0.0002);
    const auto waited = static_cast<std::int64_t>((Now() - begun_to_wait) * 1000);
    if (waited > g.tally.longest_exit_ms.load()) g.tally.longest_exit_ms.store(waited);
    if (Now() >= end) {
      Fail("an exiting thread does not go (page %zu): %s", i, ThreadState(tid).c_str());
      const double longer = Now() + 60;
      while (syscall(SYS_tgkill, getpid(), tid, 0) == 0 && Now() < longer) test::SleepSeconds(0.1);
      Fail("it %s", Now() >= longer ? "does not go at all" : "has gone late");
      break;
    }
    // The thread has gone, and with it the kernel's write.
    const std::uint32_t seen = __atomic_load_n(e.word, __ATOMIC_ACQUIRE);
    if (seen != 0 && e.holds_tid) {
      Fail("an exiting thread's word (its id, on page %zu) was not cleared: %u", i, seen);
    } else if (seen != 0) {
      g.tally.unmarked_exit_words_lost.fetch_add(1);
    }
    if (seen != 0) __atomic_store_n(e.word, 0, __ATOMIC_RELEASE);
    CheckRest(kRobustPages + kPriorityPages + i, "at an exit word");
    g.tally.exit_words.fetch_add(1);
    test::SleepSeconds(0.0005);
  }
  pthread_attr_destroy(&attributes);
  test::SleepSeconds(0.01);  // the last one has left its stack when its id is gone
  munmap(stack, kStack);
}

void CheckLocks(const char* when) {
  for (std::size_t i = 0; i < kPages; ++i) CheckRest(i, when);
  for (std::size_t i = 0; i < kPriorityPages; ++i) {
    if (*Priority(i) != 0) Fail("%s: a free futex is %x", when, *Priority(i));
  }
  for (std::size_t i = 0; i < kRobustPages; ++i) {
    if (pthread_mutex_trylock(Robust(i)) != 0) Fail("%s: a free mutex cannot be locked", when);
    else pthread_mutex_unlock(Robust(i));
  }
}

}  // namespace ksmu::stress
