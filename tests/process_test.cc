// The process around merged memory: core files, exiting threads, robust and priority-inheriting futexes, locks and
// seals, sparse address space, contents that are hard to tell apart.

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <random>

#include "test_support.h"

#ifndef SYS_mseal
#define SYS_mseal 462
#endif

namespace ksmu::test {
namespace {

constexpr int kAllFlags[] = {0, KSMU_F_NO_RAW_DISCARDS, KSMU_F_SYNC_BREAK};
constexpr int kAsyncFlags[] = {0, KSMU_F_NO_RAW_DISCARDS};

std::size_t AllBytes() { return SIZE_MAX / PageSize() * PageSize(); }
void MergeAll() { EXPECT_OK(ksmu_merge(nullptr, AllBytes())); }
// Pages that were merged before and written since may take more than one look.
void MergeHard() {
  for (int i = 0; i < 4; ++i) MergeAll();
}

void FlatOut() {
  Set("cpu_limit_percent", 100);
  Set("sleep_millisecs", 0);
  Set("remerge_seconds", 0);
  Set("run", 1);
}

// --- core files ------------------------------------------------------------------------------------------------------

// A directory for one core file, with the machine's core_pattern pointing there if its own does not put cores into the
// working directory. Restored at the end.
class CoreDirectory {
 public:
  CoreDirectory() : path_("/tmp/ksmu-core-XXXXXX"), old_(ReadFile("/proc/sys/kernel/core_pattern")) {
    if (mkdtemp(path_.data()) == nullptr) {
      why_not_ = "no directory in /tmp";
      return;
    }
    if (old_.empty() || old_[0] == '|' || old_.find('/') != std::string::npos) {
      changed_ = WriteFile("/proc/sys/kernel/core_pattern", path_ + "/core");
      if (!changed_) why_not_ = "kernel.core_pattern is '" + old_ + "' and cannot be set";
    }
  }
  ~CoreDirectory() {
    if (changed_) WriteFile("/proc/sys/kernel/core_pattern", old_);
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& why_not() const { return why_not_; }
  const std::string& path() const { return path_; }
  std::string Core() const {
    for (const auto& entry : std::filesystem::directory_iterator(path_)) return ReadFile(entry.path());
    return "";
  }

 private:
  std::string path_, old_, why_not_;
  bool changed_ = false;
};

// The bytes of an address range in a core file; shorter where the core leaves them out.
std::string BytesInCore(const std::string& core, std::uintptr_t address, std::size_t bytes) {
  if (core.size() < sizeof(Elf64_Ehdr)) return "";
  Elf64_Ehdr header;
  memcpy(&header, core.data(), sizeof header);
  std::string found;
  while (found.size() < bytes) {
    const std::uintptr_t want = address + found.size();
    const std::size_t before = found.size();
    for (std::size_t i = 0; i < header.e_phnum; ++i) {
      Elf64_Phdr segment;
      const std::size_t at = header.e_phoff + i * sizeof segment;
      if (at + sizeof segment > core.size()) break;
      memcpy(&segment, core.data() + at, sizeof segment);
      if (segment.p_type != PT_LOAD || want < segment.p_vaddr || want >= segment.p_vaddr + segment.p_filesz) continue;
      const std::size_t from = segment.p_offset + (want - segment.p_vaddr);
      const std::size_t length = std::min<std::size_t>(bytes - found.size(), segment.p_vaddr + segment.p_filesz - want);
      if (from + length > core.size()) break;
      found.append(core, from, length);
      break;
    }
    if (found.size() == before) break;
  }
  return found;
}

TEST(Process, CoreFilesContainMergedMemory) {
  CoreDirectory directory;
  if (!directory.why_not().empty()) GTEST_SKIP() << directory.why_not();
  rlimit limit;
  getrlimit(RLIMIT_CORE, &limit);
  if (limit.rlim_max == 0) GTEST_SKIP() << "core files are forbidden (RLIMIT_CORE)";
  constexpr std::size_t kPages = 512;
  const auto seed = [](std::size_t i) -> std::uint64_t {
    return i >= 400 ? 10'000 + i : i % 8 == 7 ? 0 : 1 + i % 16;  // duplicates, zeros, unique pages
  };
  const auto last_seed = [&](std::size_t i) { return i % 50 == 3 ? 777 : seed(i); };  // some broken
  for (const int flags : kAllFlags) {
    SCOPED_TRACE("flags " + std::to_string(flags));
    for (const auto& entry : std::filesystem::directory_iterator(directory.path())) std::filesystem::remove(entry);
    std::atomic<char*>* where = static_cast<std::atomic<char*>*>(
        mmap(nullptr, PageSize(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(where, MAP_FAILED);
    RunIsolated([&] {
      Child dying(Child::Kind::kFork, [&](Child& self) {
        rlimit all = {limit.rlim_max, limit.rlim_max};
        setrlimit(RLIMIT_CORE, &all);
        if (chdir(directory.path().c_str()) != 0) self.Report("chdir: errno %d", errno);
        if (!WriteFile("/proc/self/coredump_filter", "0x33")) self.Report("coredump_filter: errno %d", errno);
        signal(SIGABRT, SIG_DFL);
        ksmu_set("run", 0);
        Memory memory(kPages), not_dumped(16);
        where[0] = memory.data();
        where[1] = not_dumped.data();
        FillPages(memory, seed);
        FillPages(not_dumped, [](std::size_t) { return 5; });
        madvise(not_dumped.data(), not_dumped.bytes(), MADV_DONTDUMP);
        if (ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags) != 0 ||
            ksmu_advise(not_dumped.data(), not_dumped.bytes(), KSMU_MERGEABLE | flags) != 0 ||
            ksmu_merge(nullptr, AllBytes()) < 300) {
          self.Report("advise and merge: errno %d, %s", errno, ksmu_last_error());
        }
        for (std::size_t i = 3; i < kPages; i += 50) FillPage(memory.page(i), 777);
        abort();
      });
      int status = 0;
      ASSERT_TRUE(WaitUntil([&] { return waitpid(dying.pid(), &status, WNOHANG) == dying.pid(); }, 30));
      dying.Forget();
      dying.ExpectNoReports();
      ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) << status;
      ASSERT_TRUE(WCOREDUMP(status)) << "no core file was written";
    });
    char* const memory = where[0];
    char* const not_dumped = where[1];
    munmap(where, PageSize());
    if (::testing::Test::IsSkipped() || ::testing::Test::HasFailure()) return;
    const std::string core = directory.Core();
    ASSERT_FALSE(core.empty());
    // Page by page: a zero page that was dropped need not be there.
    std::size_t missing = 0, wrong = 0;
    for (std::size_t i = 0; i < kPages; ++i) {
      const std::string page = BytesInCore(core, reinterpret_cast<std::uintptr_t>(memory) + i * PageSize(), PageSize());
      if (page.size() < PageSize()) {
        missing += last_seed(i) != 0;
      } else {
        alignas(8) char copy[65536];
        memcpy(copy, page.data(), PageSize());
        wrong += FindWrongByte(copy, last_seed(i)) >= 0;
      }
    }
    EXPECT_EQ(missing, 0u) << "pages that the core file leaves out";
    EXPECT_EQ(wrong, 0u) << "pages with other bytes in the core file";
    EXPECT_EQ(BytesInCore(core, reinterpret_cast<std::uintptr_t>(not_dumped), PageSize()).size(), 0u)
        << "MADV_DONTDUMP is lost in merging";
  }
}

// --- exiting threads, futexes -------------------------------------------------------------------------------------

long Futex(void* word, int operation, int value, const timespec* timeout = nullptr) {
  return syscall(SYS_futex, word, operation, value, timeout, nullptr, 0);
}

std::string DescribePage(const void* page) {
  ksmu_page_info info;
  if (ksmu_explain(page, &info, sizeof info) != 0) return "?";
  std::uint64_t entry = 0;
  const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  const auto at = reinterpret_cast<std::uintptr_t>(page) / PageSize() * 8;
  if (fd < 0 || pread(fd, &entry, 8, static_cast<off_t>(at)) != 8) entry = 0;
  close(fd);
  char text[200];
  snprintf(text, sizeof text, "%s %s, pagemap %#llx", info.state_name, info.reason_name,
           static_cast<unsigned long long>(entry));
  return text;
}

// Waits until the thread has left, without touching its word: a waiter's FUTEX_WAIT breaks the page, and a break by
// another thread at the very moment of the exit is one more case in which the kernel does not wait (docs/limits.md).
bool HasLeft(int tid) {
  const std::string task = "/proc/self/task/" + std::to_string(tid);
  return WaitUntil([&] { return access(task.c_str(), F_OK) != 0; }, 20, 0.0002);
}

std::atomic<int> g_leave;

// Sleeps up to 0.2 ms without libc: a raw thread has its creator's TLS, and with it errno.
__attribute__((no_sanitize("address"))) void NapWithoutLibc() {
  static const timespec kNap = {0, 200'000};
#if defined(__x86_64__)
  long result;
  asm volatile("syscall" : "=a"(result) : "a"(SYS_nanosleep), "D"(&kNap), "S"(0) : "rcx", "r11", "memory");
#elif defined(__aarch64__)
  register long call asm("x8") = SYS_nanosleep;
  register const timespec* nap asm("x0") = &kNap;
  register long none asm("x1") = 0;
  asm volatile("svc 0" : "+r"(nap) : "r"(call), "r"(none) : "memory");
#else
  for (int k = 0; k < 1000; ++k) asm volatile("" ::: "memory");
#endif
}

__attribute__((no_sanitize("address"))) int WaitAndLeave(void* number) {
  const int mine = static_cast<int>(reinterpret_cast<std::intptr_t>(number));
  while (g_leave.load() < mine) NapWithoutLibc();
  return 0;
}

// Raw threads whose CLONE_CHILD_CLEARTID word lies in a page that is merged: its twin has the same bytes, thread id
// included. (In the microseconds in which such a page is being merged the kernel's write is lost; that is documented.
// So the words are merged here before the threads leave, whatever else is being merged meanwhile.)
void ExitingThreads(int flags, bool merge_flat_out, int rounds) {
  constexpr int kThreads = 16;
  Set("run", 0);
  Set("remerge_seconds", 60);
  Memory stacks(kThreads * 4);
  Memory other(2048);
  std::atomic<bool> stop = false;
  std::thread churn;
  if (merge_flat_out) {
    Set("cpu_limit_percent", 100);
    Set("sleep_millisecs", 0);
    Set("run", 1);
    FillPages(other, [](std::size_t i) { return 1000 + i % 20; });
    ASSERT_OK(ksmu_advise(other.data(), other.bytes(), KSMU_MERGEABLE | flags));
    churn = std::thread([&] {
      std::mt19937_64 random(1);
      while (!stop) {
        const std::size_t i = random() % 2040;
        if (random() % 4 == 0) ksmu_advise(other.page(i), 8 * PageSize(), KSMU_DISCARD);
        for (std::size_t k = i; k < i + 8; ++k) FillPage(other.page(k), 1000 + k % 20);
        SleepSeconds(0.0002);
      }
    });
  }
  int joined = 0, merged = 0;
  for (int round = 0; round < rounds && !::testing::Test::HasFailure(); ++round) {
    Memory memory(2 * kThreads);
    FillPages(memory, [](std::size_t i) { return 1 + i / 2; });
    g_leave = 0;
    const auto page = [&](int t) { return memory.page(static_cast<std::size_t>(2 * t)); };
    const auto word = [&](int t) { return reinterpret_cast<std::atomic<int>*>(page(t) + 128); };
    for (int t = 0; t < kThreads; ++t) {
      *word(t) = 1;
      const int flags_of_clone = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
                                 CLONE_CHILD_CLEARTID | CLONE_PARENT_SETTID;
      const int tid = clone(WaitAndLeave, stacks.page(static_cast<std::size_t>(4 * t)) + 4 * PageSize(), flags_of_clone,
                            reinterpret_cast<void*>(static_cast<std::intptr_t>(t + 1)), word(t), nullptr, word(t));
      if (tid <= 0) abort();
      memcpy(page(t) + PageSize(), page(t), PageSize());  // the twin, byte for byte
    }
    EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
    EXPECT_OK(ksmu_merge(memory.data(), memory.bytes()));
    for (int t = 0; t < kThreads; ++t) {
      ksmu_page_info info;
      EXPECT_OK(ksmu_explain(page(t), &info, sizeof info));
      merged += info.state == KSMU_PAGE_MERGED;
      const std::string before = DescribePage(page(t));
      const int tid = word(t)->load();
      g_leave = t + 1;
      EXPECT_TRUE(HasLeft(tid)) << DescribeProcessGroup(getpgrp());
      const bool came = word(t)->load() == 0;
      EXPECT_TRUE(came) << "round " << round << ", thread " << t << ": the kernel's write is lost, the word is "
                        << word(t)->load() << "; " << joined << " joined before; its page was " << before << ", is "
                        << DescribePage(page(t));
      joined += came;
    }
  }
  stop = true;
  if (churn.joinable()) churn.join();
  printf("flags %#x: %d threads joined, %d words in merged pages when their thread left\n", flags, joined, merged);
  EXPECT_GT(merged, joined * 9 / 10);
}

KSMU_ISOLATED_TEST(Process, ExitingThreadsWithWordsInMergedPages, 60) {
  // With KSMU_F_SYNC_BREAK the kernel's write of such a word is lost: documented in docs/limits.md.
  for (const int flags : kAsyncFlags) ExitingThreads(flags, false, 20);
}

KSMU_ISOLATED_TEST(Process, ExitingThreadsWhileMergingFlatOut, 120) {
  for (const int flags : kAsyncFlags) ExitingThreads(flags, true, kSanitized ? 30 : 100);
}

// Threads whose stack, TLS and thread descriptor (tid word, robust list) lie in a region.
KSMU_ISOLATED_TEST(Process, ThreadStacksInARegion, 120) {
  for (const int flags : kAllFlags) {
    SCOPED_TRACE(flags);
    constexpr std::size_t kThreads = 8, kStackPages = 64;
    Memory stacks(kThreads * kStackPages);
    ASSERT_OK(ksmu_advise(stacks.data(), stacks.bytes(), KSMU_MERGEABLE | flags));
    FlatOut();
    std::atomic<bool> stop = false;
    std::thread merger([&] {
      while (!stop) ksmu_merge(stacks.data(), stacks.bytes());
    });
    for (int round = 0; round < (kSanitized ? 15 : 60); ++round) {
      std::vector<pthread_t> threads(kThreads);
      std::atomic<int> wrong = 0;
      for (std::size_t t = 0; t < kThreads; ++t) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        ASSERT_EQ(pthread_attr_setstack(&attributes, stacks.page(t * kStackPages), kStackPages * PageSize()), 0);
        const auto work = [](void* cookie) -> void* {
          // The same bytes on every stack, so that they merge; and checked.
          alignas(4096) char block[3 * 4096];
          for (int i = 0; i < 3; ++i) {
            memset(block, 'A' + i, sizeof block);
            asm volatile("" : : "r"(block) : "memory");
            const timespec step = {0, 700'000};
            nanosleep(&step, nullptr);
            for (const char byte : block) {
              if (byte != 'A' + i) ++*static_cast<std::atomic<int>*>(cookie);
            }
          }
          return nullptr;
        };
        ASSERT_EQ(pthread_create(&threads[t], &attributes, work, &wrong), 0);
        pthread_attr_destroy(&attributes);
      }
      for (std::size_t t = 0; t < kThreads; ++t) {
        timespec limit;
        clock_gettime(CLOCK_REALTIME, &limit);
        limit.tv_sec += kSanitized ? 10 : 2;
        ASSERT_EQ(pthread_timedjoin_np(threads[t], nullptr, &limit), 0) << "round " << round << ", thread " << t;
      }
      ASSERT_EQ(wrong, 0);
    }
    stop = true;
    merger.join();
    Set("run", 0);
    printf("flags %#x: %lld pages merged\n", flags, static_cast<long long>(Get("pages_merged_total")));
    EXPECT_OK(ksmu_stop());
  }
}

// A mutex, alone in its page, with a twin page that is kept equal by hand.
struct MutexPage {
  MutexPage(Memory& memory, std::size_t i) : page(memory.page(i)), twin(memory.page(i + 1)) {}
  pthread_mutex_t* mutex() const { return reinterpret_cast<pthread_mutex_t*>(page + 64); }
  void MakeTwin() const { memcpy(twin, page, PageSize()); }
  void Init(bool robust, bool inherit) const {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    if (robust) pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    if (inherit) pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
    ASSERT_EQ(pthread_mutex_init(mutex(), &attributes), 0);
    pthread_mutexattr_destroy(&attributes);
  }
  char* page;
  char* twin;
};

timespec InSeconds(int seconds) {
  timespec limit;
  clock_gettime(CLOCK_REALTIME, &limit);
  limit.tv_sec += seconds;
  return limit;
}

// The owner of a robust mutex dies: the kernel writes OWNER_DIED into merged memory, the waiter gets EOWNERDEAD.
KSMU_ISOLATED_TEST(Process, RobustMutexesInMergedMemory, 90) {
  for (const int flags : kAllFlags) {
    for (const bool inherit : {false, true}) {
      // Under the synchronous breaker the kernel cannot wait for a break inside FUTEX_LOCK_PI (docs/limits.md).
      if (inherit && flags == KSMU_F_SYNC_BREAK) continue;
      SCOPED_TRACE("flags " + std::to_string(flags) + (inherit ? ", priority inheritance" : ""));
      Set("run", 0);
      Set("remerge_seconds", 0);
      Memory memory(64);
      FillPages(memory, [](std::size_t i) { return 1 + i / 2; });
      for (std::size_t i = 0; i < 64; i += 2) MutexPage(memory, i).Init(true, inherit);
      for (std::size_t i = 0; i < 64; i += 2) MutexPage(memory, i).MakeTwin();
      ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
      MergeHard();
      EXPECT_EQ(Get("pages_merged"), 64);
      for (int round = 0; round < 4; ++round) {
        std::atomic<int> locked = 0;
        std::atomic<bool> die = false;
        std::thread owner([&] {
          for (std::size_t i = 0; i < 64; i += 2) {
            const int result = pthread_mutex_lock(MutexPage(memory, i).mutex());
            if (result == 0) ++locked;
          }
          while (!die) SleepSeconds(0.001);
        });
        ASSERT_TRUE(WaitUntil([&] { return locked == 32; }, 10)) << locked;
        // Merged again while held, where the library dares to: the words are on the owner's robust list.
        for (std::size_t i = 0; i < 64; i += 2) MutexPage(memory, i).MakeTwin();
        MergeHard();
        // Waiters first in some rounds: the kernel then has to find and wake them.
        std::atomic<int> owner_dead = 0, other = 0;
        std::vector<std::thread> waiters;
        if (round % 2 == 1) {
          for (std::size_t i = 0; i < 64; i += 16) {
            waiters.emplace_back([&, i] {
              const timespec limit = InSeconds(20);
              const int result = pthread_mutex_timedlock(MutexPage(memory, i).mutex(), &limit);
              ++(result == EOWNERDEAD ? owner_dead : other);
              if (result == EOWNERDEAD) {
                pthread_mutex_consistent(MutexPage(memory, i).mutex());
                pthread_mutex_unlock(MutexPage(memory, i).mutex());
              }
            });
          }
          SleepSeconds(0.05);
          MergeHard();
        }
        die = true;
        owner.join();
        for (std::thread& waiter : waiters) waiter.join();
        EXPECT_EQ(other, 0);
        EXPECT_EQ(owner_dead, static_cast<int>(waiters.size()));
        for (std::size_t i = 0; i < 64; i += 2) {
          if (!waiters.empty() && i % 16 == 0) continue;
          const timespec limit = InSeconds(1);
          ASSERT_EQ(pthread_mutex_timedlock(MutexPage(memory, i).mutex(), &limit), EOWNERDEAD)
              << "mutex " << i << ", round " << round;
          ASSERT_EQ(pthread_mutex_consistent(MutexPage(memory, i).mutex()), 0);
          ASSERT_EQ(pthread_mutex_unlock(MutexPage(memory, i).mutex()), 0);
        }
        for (std::size_t i = 0; i < 64; i += 2) MutexPage(memory, i).MakeTwin();
        MergeHard();
      }
      EXPECT_OK(ksmu_set("run", 2));
    }
  }
}

// FUTEX_LOCK_PI and FUTEX_UNLOCK_PI write the word themselves: on merged pages they get their own copy.
KSMU_ISOLATED_TEST(Process, PriorityInheritingMutexesInMergedMemory, 60) {
  for (const int flags : kAsyncFlags) {
    SCOPED_TRACE(flags);
    Set("run", 0);
    Set("remerge_seconds", 0);
    Memory memory(32);
    FillPages(memory, [](std::size_t i) { return 1 + i / 2; });
    for (std::size_t i = 0; i < 32; i += 2) MutexPage(memory, i).Init(false, true);
    for (std::size_t i = 0; i < 32; i += 2) MutexPage(memory, i).MakeTwin();
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
    int merged = 0;
    for (int round = 0; round < 20; ++round) {
      const MutexPage page(memory, static_cast<std::size_t>(round % 16) * 2);
      MergeHard();
      ASSERT_EQ(pthread_mutex_lock(page.mutex()), 0);
      page.MakeTwin();
      MergeHard();  // held: the word with the owner's id is in a frame now
      ksmu_page_info info;
      ASSERT_OK(ksmu_explain(page.page, &info, sizeof info));
      merged += info.state == KSMU_PAGE_MERGED;
      std::atomic<int> entered = 0;
      std::vector<std::thread> waiters;
      for (int t = 0; t < 3; ++t) {
        waiters.emplace_back([&] {
          const timespec limit = InSeconds(20);
          const int result = pthread_mutex_timedlock(page.mutex(), &limit);
          if (result != 0) return;
          ++entered;
          pthread_mutex_unlock(page.mutex());
        });
      }
      SleepSeconds(0.01);
      EXPECT_EQ(entered, 0);
      page.MakeTwin();
      MergeHard();  // with waiters
      ASSERT_EQ(pthread_mutex_unlock(page.mutex()), 0);
      for (std::thread& waiter : waiters) waiter.join();
      ASSERT_EQ(entered, 3) << "round " << round;
    }
    EXPECT_GT(merged, 10) << "rounds in which the mutex was merged while it was held";
  }
}

// Waiting and waking on a word that is merged and broken in between.
KSMU_ISOLATED_TEST(Process, FutexWaitOnMergedMemory, 60) {
  for (const int flags : kAllFlags) {
    SCOPED_TRACE(flags);
    Set("run", 0);
    Set("remerge_seconds", 0);
    Memory memory(32);
    FillPages(memory, [](std::size_t) { return 3; });
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
    for (const int private_flag : {0, FUTEX_PRIVATE_FLAG}) {
      for (std::size_t i = 0; i < 8; ++i) {
        MergeHard();
        std::atomic<int>* word = reinterpret_cast<std::atomic<int>*>(memory.page(i) + 64);
        const int value = *word;
        std::atomic<bool> woken = false;
        std::thread waiter([&] {
          while (*word == value) {
            const timespec limit = {20, 0};
            if (Futex(word, FUTEX_WAIT | private_flag, value, &limit) != 0 && errno == ETIMEDOUT) return;
          }
          woken = true;
        });
        SleepSeconds(0.01);
        MergeHard();
        *word = value + 1;
        Futex(word, FUTEX_WAKE | private_flag, 1);
        waiter.join();
        EXPECT_TRUE(woken) << "page " << i;
      }
    }
  }
}

// --- locks and seals ------------------------------------------------------------------------------------------------

std::int64_t LockedBytes() { return ReadStatusKilobytes("VmLck") * 1024; }

KSMU_ISOLATED_TEST(Process, MergedMemoryCanBeLocked, 60) {
  for (const int flags : kAllFlags) {
    SCOPED_TRACE(flags);
    Set("run", 0);
    Memory memory(128);
    const auto seed = [](std::size_t i) { return 1 + i % 4; };
    FillPages(memory, seed);
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
    MergeAll();
    EXPECT_EQ(Get("pages_merged"), 128);
    const std::int64_t before = LockedBytes();
    const std::int64_t half = static_cast<std::int64_t>(memory.bytes() / 2);
    if (mlock(memory.data(), memory.bytes() / 2) != 0) GTEST_SKIP() << "mlock: " << strerror(errno);
    EXPECT_EQ(LockedBytes() - before, half);
    EXPECT_TRUE(PagesAre(memory, seed));
    SleepSeconds(0.6);  // for so long the library may go by what it knew of a mapping's attributes (documented)
    // Nothing that the library does takes the lock away.
    Set("remerge_seconds", 0);
    for (std::size_t i = 0; i < 128; i += 2) FillPage(memory.page(i), seed(i));
    MergeAll();
    FlatOut();
    const std::int64_t scans = Get("full_scans");
    EXPECT_TRUE(WaitUntil([&] { return Get("full_scans") >= scans + 5; }, 20));
    EXPECT_EQ(LockedBytes() - before, half);
    EXPECT_OK(ksmu_set("run", 2));
    EXPECT_EQ(LockedBytes() - before, half) << "unmerging";
    EXPECT_TRUE(PagesAre(memory, seed));
    Set("run", 0);
    EXPECT_EQ(munlock(memory.data(), memory.bytes()), 0);
    EXPECT_EQ(LockedBytes(), before);
    SleepSeconds(0.6);
    MergeHard();
    // (With synchronous breaks what was written is not merged again: documented.)
    if (flags != KSMU_F_SYNC_BREAK) {
      EXPECT_EQ(Get("pages_merged"), 128) << "unlocked memory merges again";
    }
    EXPECT_TRUE(PagesAre(memory, seed));
  }
}

// mlockall(MCL_FUTURE): the library's own reservations must not be filled by it.
// Pages cannot be moved between locked and unlocked memory, and whatever the library maps would be locked and filled: it
// refuses to start, and says so.
KSMU_ISOLATED_TEST(Process, LockedFuture, 60) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer's shadow would be locked and filled";
  Memory memory(512);
  FillPages(memory, [](std::size_t i) { return 1 + i % 4; });
  if (mlockall(MCL_FUTURE) != 0) GTEST_SKIP() << "mlockall: " << strerror(errno);
  EXPECT_EQ(ksmu_start(nullptr, sizeof(ksmu_options)), -1);
  EXPECT_EQ(errno, ENOSYS);
  EXPECT_STRNE(ksmu_last_error(), "");
  EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return 1 + i % 4; }));
  ASSERT_EQ(munlockall(), 0);
  EXPECT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
  EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  MergeAll();
  EXPECT_GT(Get("pages_sharing"), 0);
  EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return 1 + i % 4; }));
}

// Sealed mappings cannot be replaced. Sealed before: left out, with a reason. Sealed while merged: the bytes stay,
// writable.
// Everything that is there, the library's own mappings among it, is populated and locked; merging goes on afterwards.
KSMU_ISOLATED_TEST(Process, LockedWhileItRuns, 60) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer's shadow would be locked and filled";
  Memory memory(512);
  FillPages(memory, [](std::size_t i) { return 1 + i % 4; });
  ASSERT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
  EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  MergeAll();
  EXPECT_EQ(Get("pages_merged"), 512);
  if (mlockall(MCL_CURRENT) != 0) GTEST_SKIP() << "mlockall: " << strerror(errno);
  EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return 1 + i % 4; }));
  for (std::size_t i = 0; i < memory.pages(); i += 3) FillPage(memory.page(i), 1 + i % 4);
  ASSERT_EQ(munlockall(), 0);
  EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return 1 + i % 4; }));
  Memory later(512);
  FillPages(later, [](std::size_t i) { return 1 + i % 4; });
  EXPECT_OK(ksmu_advise(later.data(), later.bytes(), KSMU_MERGEABLE));
  EXPECT_TRUE(WaitUntil(
      [&] {
        MergeAll();
        ksmu_region_stats region;
        return ksmu_read_region(later.data(), &region, sizeof region) == 0 && region.pages_merged == 512;
      },
      20));
  // And while new memory is not locked, but all of the library's is.
  ASSERT_EQ(mlockall(MCL_CURRENT), 0);
  Memory last(512);
  FillPages(last, [](std::size_t i) { return 1 + i % 4; });
  EXPECT_OK(ksmu_advise(last.data(), last.bytes(), KSMU_MERGEABLE));
  EXPECT_TRUE(WaitUntil(
      [&] {
        MergeAll();
        ksmu_region_stats region;
        return ksmu_read_region(last.data(), &region, sizeof region) == 0 && region.pages_merged == 512;
      },
      20));
  ASSERT_EQ(munlockall(), 0);
  for (Memory* m : {&memory, &later, &last}) EXPECT_TRUE(PagesAre(*m, [](std::size_t i) { return 1 + i % 4; }));
}

KSMU_ISOLATED_TEST(Process, SealedMemory, 60) {
  for (const int flags : kAllFlags) {
    SCOPED_TRACE(flags);
    Set("run", 0);
    constexpr std::size_t kPages = 64;
    const auto seed = [](std::size_t i) { return 1 + i % 4; };
    // Sealed mappings last as long as the process: no owner unmaps these.
    char* before = static_cast<char*>(
        mmap(nullptr, 2 * kPages * PageSize(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(before, MAP_FAILED);
    char* after = before + kPages * PageSize();
    for (std::size_t i = 0; i < 2 * kPages; ++i) FillPage(before + i * PageSize(), seed(i));
    if (syscall(SYS_mseal, before, kPages * PageSize(), 0) != 0)
      GTEST_SKIP() << "mseal: " << strerror(errno) << " (Linux 6.10 has it)";
    const int advised = ksmu_advise(before, kPages * PageSize(), KSMU_MERGEABLE | flags);
    if (advised != 0) {
      EXPECT_EQ(errno, EOPNOTSUPP) << ksmu_last_error();
    }
    ASSERT_OK(ksmu_advise(after, kPages * PageSize(), KSMU_MERGEABLE | flags));
    MergeAll();
    EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(kPages)) << "what is sealed is left out";
    if (advised == 0) {
      EXPECT_EQ(Get("unmerged_locked"), static_cast<std::int64_t>(kPages));
    }
    ASSERT_EQ(syscall(SYS_mseal, after, kPages * PageSize() / 2, 0), 0) << strerror(errno);
    Set("remerge_seconds", 0);
    for (std::size_t i = 0; i < kPages; i += 2) FillPage(after + i * PageSize(), 50 + i);
    MergeAll();
    FlatOut();
    const std::int64_t scans = Get("full_scans");
    EXPECT_TRUE(WaitUntil([&] { return Get("full_scans") >= scans + 5; }, 20));
    const auto check = [&](const char* when) {
      for (std::size_t i = 0; i < kPages; ++i) {
        ASSERT_TRUE(PageIs(before + i * PageSize(), seed(i))) << when << ", page " << i;
        ASSERT_TRUE(PageIs(after + i * PageSize(), i % 2 == 0 ? 50 + i : seed(i))) << when << ", page " << i;
      }
    };
    check("merging");
    if (ksmu_set("run", 2) != 0) printf("run=2: %s\n", ksmu_last_error());
    check("unmerged");
    if (ksmu_advise(after, kPages * PageSize(), KSMU_UNMERGEABLE) != 0) printf("unmerge: %s\n", ksmu_last_error());
    for (std::size_t i = 1; i < kPages; i += 2) FillPage(after + i * PageSize(), seed(i));
    check("written");
    while (ksmu_stop() == 0) {
    }
    check("stopped");
  }
}

// --- sparse and hard to tell apart ----------------------------------------------------------------------------------

struct Timing {
  double seconds = 0;
  std::int64_t metadata = 0;
  std::int64_t page_tables = 0;
  std::int64_t resident = 0;
};

// advise + merge + release of memory whose populated pieces the caller names.
Timing Cycle(char* memory, std::size_t bytes, int flags, std::int64_t expected_merged) {
  Timing timing;
  const std::int64_t resident = ReadStatusKilobytes("VmRSS"), tables = ReadStatusKilobytes("VmPTE");
  const double start = Now();
  EXPECT_OK(ksmu_advise(memory, bytes, KSMU_MERGEABLE | flags));
  EXPECT_OK(ksmu_merge(memory, bytes));
  const double merged = Now();
  ksmu_stats stats;
  EXPECT_OK(ksmu_read_stats(&stats, sizeof stats));
  EXPECT_EQ(stats.pages_merged, expected_merged);
  EXPECT_EQ(stats.region_bytes, static_cast<std::int64_t>(bytes));
  timing.metadata = stats.metadata_bytes;
  timing.page_tables = ReadStatusKilobytes("VmPTE") - tables;
  timing.resident = ReadStatusKilobytes("VmRSS") - resident;
  const double release = Now();
  EXPECT_OK(ksmu_advise(memory, bytes, KSMU_RELEASE));
  timing.seconds = Now() - release + (merged - start);
  return timing;
}

KSMU_ISOLATED_TEST(Process, SparseThirtyTwoTebibytes, 120) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer's shadow takes that address space";
  constexpr std::size_t kSparse = std::size_t{32} << 40, kPopulated = 20 << 20;
  ASSERT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
  Set("run", 0);
  Set("max_page_sharing", 1'000'000);
  const std::size_t pages = kPopulated / PageSize();
  const auto fill = [&](char* page, std::size_t i) { FillPage(page, 1 + i % (pages / 4)); };
  // In one piece, and in 80 pieces of 256 KiB all over it.
  for (const std::size_t pieces : {std::size_t{1}, std::size_t{80}}) {
    for (const int flags : kAsyncFlags) {
      SCOPED_TRACE(std::to_string(pieces) + " pieces, flags " + std::to_string(flags));
      Timing plain, sparse;
      // The best of three, or of more where others keep the machine busy.
      const auto close = [&] { return sparse.seconds <= plain.seconds + 0.050; };
      for (int attempt = 0; attempt < 3 || (attempt < 12 && !close()); ++attempt) {
        {
          Memory memory(pages);
          for (std::size_t i = 0; i < pages; ++i) fill(memory.page(i), i);
          const Timing timing = Cycle(memory.data(), memory.bytes(), flags, static_cast<std::int64_t>(pages));
          if (attempt == 0 || timing.seconds < plain.seconds) plain = timing;
        }
        char* memory = static_cast<char*>(
            mmap(nullptr, kSparse, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (memory == MAP_FAILED) GTEST_SKIP() << "no 32 TiB of address space: " << strerror(errno);
        const auto page = [&](std::size_t i) {
          const std::size_t per_piece = pages / pieces;
          return memory + i / per_piece * (kSparse / pieces / (2 << 20) * (2 << 20)) + i % per_piece * PageSize();
        };
        for (std::size_t i = 0; i < pages; ++i) fill(page(i), i);
        const Timing timing = Cycle(memory, kSparse, flags, static_cast<std::int64_t>(pages));
        if (attempt == 0 || timing.seconds < sparse.seconds) sparse = timing;
        for (std::size_t i = 0; i < pages; ++i) ASSERT_TRUE(PageIs(page(i), 1 + i % (pages / 4)));
        ASSERT_EQ(munmap(memory, kSparse), 0);
      }
      printf(
          "%zu pieces, flags %#x: %.1f ms sparse, %.1f ms plain; metadata %lld KiB, %lld KiB; page tables %lld KiB, "
          "%lld KiB\n",
          pieces, flags, sparse.seconds * 1e3, plain.seconds * 1e3, static_cast<long long>(sparse.metadata >> 10),
          static_cast<long long>(plain.metadata >> 10), static_cast<long long>(sparse.page_tables),
          static_cast<long long>(plain.page_tables));
      EXPECT_TRUE(close()) << sparse.seconds << " s, " << plain.seconds << " s";
      EXPECT_LE(sparse.metadata, 4 * plain.metadata + (1 << 20)) << "metadata in proportion to what is populated";
      // The page tables over what is populated exist already; a piece may need some more around it.
      EXPECT_LE(sparse.page_tables, plain.page_tables + static_cast<std::int64_t>(pieces) * 16 + 512) << "KiB";
      EXPECT_LE(sparse.resident, std::max<std::int64_t>(plain.resident, 0) + 8192) << "KiB";
    }
  }
}

double ProcessCpuSeconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

// Pages that differ only in 8 bytes, at the end or at the beginning: a comparison from the front is as good as a hash
// for the ones and hopeless for the others. Neither may cost more.
KSMU_ISOLATED_TEST(Process, PagesThatDifferInTheirLastBytes, 180) {
  Set("run", 0);
  const std::size_t pages = (kSanitized ? 16 << 20 : 64 << 20) / PageSize();
  double cost[2] = {};
  for (int attempt = 0; attempt < 5; ++attempt) {
    for (const bool last : {false, true}) {
      Memory memory(pages);
      for (std::size_t i = 0; i < pages; ++i) {
        FillPage(memory.page(i), 1);
        std::uint64_t* word = reinterpret_cast<std::uint64_t*>(memory.page(i) + (last ? PageSize() - 8 : 0));
        *word = 1'000'000 + i / 2;  // each twice
      }
      ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
      const double before = ProcessCpuSeconds();
      MergeAll();
      const double seconds = ProcessCpuSeconds() - before;
      EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(pages));
      if (cost[last] == 0 || seconds < cost[last]) cost[last] = seconds;
    }
  }
  printf("CPU: %.3f s where the first bytes differ, %.3f s where the last do\n", cost[0], cost[1]);
  EXPECT_LE(cost[1], 1.5 * cost[0]);
}

}  // namespace
}  // namespace ksmu::test
