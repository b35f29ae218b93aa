// A seccomp filter refuses (EPERM) each of our system calls in turn: installed before the start, in the middle for the
// program's thread only, and in the middle for all threads at once (TSYNC), while merges, writes and discards go on.
// Calls succeed or fail as documented; nothing crashes, nobody waits for ever, no byte changes.

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <random>
#include <set>

#include "test_support.h"

namespace ksmu::test {
namespace {

enum class When { kBeforeStart, kMiddleThisThread, kMiddleAllThreads };

struct Call {
  const char* name;
  std::vector<int> numbers;
};

const std::vector<Call>& Calls() {
  static const std::vector<Call> calls = {
      {"userfaultfd", {SYS_userfaultfd}},
      {"ioctl", {SYS_ioctl}},
      {"mremap", {SYS_mremap}},
      {"mmap", {SYS_mmap}},
      {"munmap", {SYS_munmap}},
      {"madvise", {SYS_madvise}},
      {"mprotect", {SYS_mprotect}},
      {"memfd_create", {SYS_memfd_create}},
      {"ftruncate", {SYS_ftruncate}},
      {"fallocate", {SYS_fallocate}},
      {"fcntl", {SYS_fcntl}},
      {"pwrite64", {SYS_pwrite64}},
      {"pread64", {SYS_pread64}},
      {"process_vm_readv", {SYS_process_vm_readv}},
      {"openat", {SYS_openat}},
      {"read", {SYS_read}},
      {"write", {SYS_write}},
      {"close", {SYS_close}},
      {"fstat", {SYS_fstat, SYS_newfstatat, SYS_statx}},
      {"poll", {SYS_poll, SYS_ppoll, SYS_epoll_wait, SYS_epoll_pwait, SYS_select, SYS_pselect6}},
      {"close_range", {SYS_close_range}},
      {"unshare", {SYS_unshare}},
      {"clone", {SYS_clone, SYS_clone3}},
      {"io_uring", {SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register}},
      {"eventfd2", {SYS_eventfd2}},
      {"getdents64", {SYS_getdents64}},
      {"readlinkat", {SYS_readlinkat, SYS_readlink}},
      {"mincore", {SYS_mincore}},
      {"prctl", {SYS_prctl}},
      {"get_robust_list", {SYS_get_robust_list}},
      {"scheduling",
       {SYS_setpriority, SYS_sched_setscheduler, SYS_sched_setaffinity, SYS_sched_getaffinity, SYS_sched_setattr}},
      {"sched_yield", {SYS_sched_yield}},
      {"nanosleep", {SYS_nanosleep, SYS_clock_nanosleep}},
      {"sysinfo", {SYS_sysinfo}},
      {"rt_sigprocmask", {SYS_rt_sigprocmask}},
      {"membarrier", {SYS_membarrier}},
  };
  return calls;
}

// The filter: EPERM for the calls, but for those whose first argument is one of the standard descriptors (the test
// reports through them).
class Filter {
 public:
  explicit Filter(const Call& call) {
    const auto add = [&](std::uint16_t code, std::uint32_t k, std::uint8_t yes, std::uint8_t no) {
      program_.push_back({code, yes, no, k});
    };
    add(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr), 0, 0);
    const std::size_t n = call.numbers.size();
    for (std::size_t i = 0; i < n; ++i) {
      add(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(call.numbers[i]), static_cast<std::uint8_t>(n - i), 0);
    }
    add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
    if (call.numbers[0] == SYS_write || call.numbers[0] == SYS_ioctl || call.numbers[0] == SYS_fstat) {
      add(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[0]), 0, 0);
      add(BPF_JMP | BPF_JGT | BPF_K, 2, 1, 0);
      add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
    }
    add(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM, 0, 0);
  }
  bool Install(bool all_threads) {
    sock_fprog program = {static_cast<unsigned short>(program_.size()), program_.data()};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return false;
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, all_threads ? SECCOMP_FILTER_FLAG_TSYNC : 0, &program) == 0;
  }

 private:
  std::vector<sock_filter> program_;
};

class Seccomp : public ::testing::TestWithParam<std::tuple<std::size_t, When, int>> {};

constexpr std::size_t kPages = 1024;

struct Worker {
  char* data;
  std::vector<std::uint64_t> shadow = std::vector<std::uint64_t>(kPages, 0);
  std::atomic<bool> stop = false;
  std::atomic<long> wrong = 0;
  std::atomic<long> rounds = 0;
  std::atomic<bool> raw_discards = false;
  char* page(std::size_t i) const { return data + i * PageSize(); }

  // Writes and discards; no system call but madvise, and that one may be refused.
  void Run() {
    std::mt19937_64 random(1);
    while (!stop) {
      const std::size_t i = random() % kPages;
      if (FindWrongByte(page(i), shadow[i]) >= 0) ++wrong;
      if (raw_discards && random() % 16 == 0) {
        if (madvise(page(i), PageSize(), MADV_DONTNEED) == 0) shadow[i] = 0;
      } else if (random() % 4 == 0) {
        FillPage(page(i), shadow[i] = random() % 20);
      }
      ++rounds;
      for (int k = 0; k < 2000; ++k) asm volatile("" ::: "memory");
    }
  }
};

void ExpectDefined(const char* what, std::int64_t result) {
  static const std::set<int> allowed = {EPERM, ENOMEM, EAGAIN, EMFILE, ENOSYS, EBUSY, EACCES};
  if (result >= 0) return;
  const int error = errno;
  EXPECT_TRUE(allowed.count(error) != 0) << what << ": errno " << error << " (" << strerror(error) << ")";
  EXPECT_STRNE(ksmu_last_error(), "") << what;
  printf("%s: %s: %s\n", what, strerror(error), ksmu_last_error());
}

// How often the worker has to get on while the filter is there.
void LetWork(Worker& worker, long rounds) {
  const long target = worker.rounds + rounds;
  for (const double end = Now() + 20; worker.rounds < target && Now() < end;) {
    for (int k = 0; k < 1000; ++k) asm volatile("" ::: "memory");
  }
  EXPECT_GE(worker.rounds, target) << "the program's thread does not get on";
}

TEST_P(Seccomp, RefusesOneCall) {
  const Call& call = Calls()[std::get<0>(GetParam())];
  const When when = std::get<1>(GetParam());
  const int flags = std::get<2>(GetParam());
  RunIsolated(
      [&] {
        // No test code below may need memory of the heap's that is not there yet, files or new threads.
        const std::size_t bytes = kPages * PageSize();
        char* memory =
            static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        char* second =
            static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        ASSERT_NE(memory, MAP_FAILED);
        ASSERT_NE(second, MAP_FAILED);
        Worker worker;
        worker.data = memory;
        for (std::size_t i = 0; i < kPages; ++i) {
          FillPage(memory + i * PageSize(), worker.shadow[i] = i % 20);
          FillPage(second + i * PageSize(), i % 30);
        }
        Set("cpu_limit_percent", 100);
        Set("sleep_millisecs", 0);
        Set("remerge_seconds", 0);
        Filter filter(call);
        if (when != When::kBeforeStart) {
          ASSERT_OK(ksmu_advise(memory, bytes, KSMU_MERGEABLE | flags));
          ASSERT_OK(ksmu_merge(memory, bytes));
        }
        std::thread thread([&] { worker.Run(); });
        worker.raw_discards = (flags & KSMU_F_NO_RAW_DISCARDS) == 0;
        if (when != When::kBeforeStart) LetWork(worker, 500);
        if (call.numbers[0] == SYS_ioctl && when == When::kMiddleAllThreads) {
          // Documented: without ioctl nobody answers for raw discards of merged memory any more, and its context is closed.
          // Nor is a page that is being worked on at that moment safe: so nothing is.
          worker.raw_discards = false;
          Set("run", 0);
          LetWork(worker, 2);
          for (std::size_t i = 0; i < kPages; ++i) static_cast<volatile char*>(memory)[i * PageSize()];
        }
        if (!filter.Install(when == When::kMiddleAllThreads)) {
          worker.stop = true;
          thread.join();
          GTEST_SKIP() << "seccomp filters are not permitted here: " << strerror(errno);
        }
        ExpectDefined("start", ksmu_start(nullptr, sizeof(ksmu_options)));
        ExpectDefined("advise", ksmu_advise(memory, bytes, KSMU_MERGEABLE | flags));
        ExpectDefined("merge", ksmu_merge(memory, bytes));
        LetWork(worker, 1500);
        ExpectDefined("advise", ksmu_advise(second, bytes, KSMU_MERGEABLE | flags));
        ExpectDefined("merge", ksmu_merge(second, bytes));
        LetWork(worker, 500);
        ksmu_stats stats;
        ExpectDefined("read_stats", ksmu_read_stats(&stats, sizeof stats));
        ksmu_region_stats region;
        if (ksmu_read_region(memory, &region, sizeof region) != 0 && errno != ENOENT) ExpectDefined("read_region", -1);
        ksmu_page_info info;
        ExpectDefined("explain", ksmu_explain(memory, &info, sizeof info));
        const int discarded = ksmu_advise(second, bytes / 4, KSMU_DISCARD);
        ExpectDefined("discard", discarded);
        ExpectDefined("unmerge", ksmu_advise(second, bytes / 2, KSMU_UNMERGEABLE));
        LetWork(worker, 500);
        ExpectDefined("run 2", ksmu_set("run", 2));
        ExpectDefined("run 1", ksmu_set("run", 1));
        LetWork(worker, 500);
        ExpectDefined("release", ksmu_advise(second, bytes, KSMU_RELEASE));
        for (int i = 0; i < 3; ++i) {
          if (ksmu_stop() != 0) {
            if (errno != EINVAL) ExpectDefined("stop", -1);
            break;
          }
        }
        LetWork(worker, 500);
        worker.stop = true;
        thread.join();
        EXPECT_EQ(worker.wrong, 0);
        for (std::size_t i = 0; i < kPages; ++i) {
          ASSERT_TRUE(PageIs(memory + i * PageSize(), worker.shadow[i])) << "page " << i;
          const bool gone = discarded == 0 && i < kPages / 4;
          // A discard that failed may have discarded a part.
          if (discarded != 0 && i < kPages / 4 && FindWrongByte(second + i * PageSize(), 0) < 0) continue;
          ASSERT_TRUE(PageIs(second + i * PageSize(), gone ? 0 : i % 30)) << "second, page " << i;
        }
        for (std::size_t i = 0; i < kPages; i += 2) FillPage(memory + i * PageSize(), 4000 + i);
        for (std::size_t i = 0; i < kPages; ++i) {
          ASSERT_TRUE(PageIs(memory + i * PageSize(), i % 2 == 0 ? 4000 + i : worker.shadow[i])) << "page " << i;
        }
      },
      60);
}

// All ways to attach and to break in the long run only.
std::vector<int> FlagsToTry() {
  const char* all = getenv("KSMU_TEST_LONG");
  if (all != nullptr && all[0] == '1') return {0, KSMU_F_NO_RAW_DISCARDS, KSMU_F_SYNC_BREAK};
  return {0};
}

INSTANTIATE_TEST_SUITE_P(Calls, Seccomp,
                         ::testing::Combine(::testing::Range<std::size_t>(0, Calls().size()),
                                            ::testing::Values(When::kBeforeStart, When::kMiddleThisThread,
                                                              When::kMiddleAllThreads),
                                            ::testing::ValuesIn(FlagsToTry())),
                         [](const ::testing::TestParamInfo<Seccomp::ParamType>& info) {
                           const int flags = std::get<2>(info.param);
                           std::string name = Calls()[std::get<0>(info.param)].name;
                           name += std::get<1>(info.param) == When::kBeforeStart        ? "BeforeStart"
                                   : std::get<1>(info.param) == When::kMiddleThisThread ? "MiddleThisThread"
                                                                                        : "MiddleAllThreads";
                           return name + (flags == 0 ? "Exact" : flags == KSMU_F_NO_RAW_DISCARDS ? "Promised" : "Sync");
                         });

}  // namespace
}  // namespace ksmu::test
