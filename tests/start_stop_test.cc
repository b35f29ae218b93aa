// Starts and stops: what works before a start, options, starts counted, what a stop leaves behind, stops in the middle
// of everything, signals.

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>

#include "api/state.h"
#include "test_support.h"

namespace ksmu::test {
namespace {

std::vector<std::string> ThreadNames() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name = ReadFile(entry.path() / "comm");
    if (!name.empty()) name.pop_back();
    names.push_back(name);
  }
  return names;
}

// A thread that has been joined can still be seen for a moment.
::testing::AssertionResult OneThreadIsLeft() {
  if (WaitUntil([] { return ThreadNames().size() == 1; }, 5)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << ThreadNames().size() << " threads";
}

std::size_t CountMaps() {
  std::ifstream maps("/proc/self/maps");
  std::size_t lines = 0;
  for (std::string line; std::getline(maps, line);) ++lines;
  return lines;
}

std::set<std::string> Descriptors() {
  std::set<std::string> names;
  for (int fd = 0; fd < 1024; ++fd) {
    char target[256];
    const ssize_t n = readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), target, sizeof target);
    if (n > 0) names.insert(std::to_string(fd) + " " + std::string(target, static_cast<std::size_t>(n)));
  }
  return names;
}

std::uint64_t Seven(std::size_t) { return 7; }

void MergeAll() { EXPECT_OK(ksmu_merge(nullptr, SIZE_MAX / PageSize() * PageSize())); }

// --- before the start, options ---------------------------------------------------------------------

KSMU_ISOLATED_TEST(StartStop, BeforeTheStart, 30) {
  ksmu_stats stats;
  EXPECT_OK(ksmu_read_stats(&stats, sizeof stats));
#define KSMU_IS_ZERO(name) EXPECT_EQ(stats.name, 0) << #name;
  KSMU_FOR_EACH_COUNTER(KSMU_IS_ZERO)
#undef KSMU_IS_ZERO
  EXPECT_EQ(Get("run"), 1);
  EXPECT_EQ(Get("cpu_limit_percent"), 10);
  EXPECT_EQ(Get("sleep_millisecs"), 20);
  EXPECT_EQ(Get("max_page_sharing"), 256);
  EXPECT_EQ(Get("use_zero_pages"), 1);
  EXPECT_EQ(Get("smart_scan"), 1);
  EXPECT_EQ(Get("remerge"), 1);
  EXPECT_EQ(Get("remerge_seconds"), 60);
  EXPECT_EQ(Get("thp_min_duplicates"), 64);
  Memory memory(4);
  FillPages(memory, Seven);
  ksmu_region_stats region;
  EXPECT_ERRNO(ENOENT, ksmu_read_region(nullptr, &region, sizeof region));
  ksmu_page_info info;
  EXPECT_OK(ksmu_explain(memory.data(), &info, sizeof info));
  EXPECT_EQ(info.state, KSMU_PAGE_UNTRACKED);
  EXPECT_STREQ(info.reason_name, "");
  EXPECT_OK(ksmu_explain(nullptr, &info, sizeof info));
  EXPECT_ERRNO(EINVAL, ksmu_stop());
  EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
  EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_RELEASE));
  EXPECT_OK(ksmu_advise(memory.data(), PageSize(), KSMU_DISCARD));
  EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return i == 0 ? 0 : 7; }));
  Set("sleep_millisecs", 123);
  Set("run", 0);
  EXPECT_TRUE(OneThreadIsLeft()) << "none of these starts the library";
  EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  EXPECT_EQ(Get("sleep_millisecs"), 123) << "kept for the start";
  EXPECT_EQ(Get("run"), 0);
  EXPECT_EQ(Get("starts"), 1);
}

KSMU_ISOLATED_TEST(StartStop, OptionsOfStart, 30) {
  ksmu_options options = {};
  EXPECT_ERRNO(EINVAL, ksmu_start(&options, 0));
  options.flags = 0x80;
  EXPECT_ERRNO(EINVAL, ksmu_start(&options, sizeof options));
  options = {};
  for (const char* cpus : {"x", "1-", "-", "3-1", "0,,1", "99999999999999999999", "0-3,"}) {
    options.cpus = cpus;
    EXPECT_ERRNO(EINVAL, ksmu_start(&options, sizeof options)) << cpus;
    EXPECT_NE(std::string(ksmu_last_error()), "");
  }
  options = {};
  options.max_maps = -1;
  EXPECT_ERRNO(EINVAL, ksmu_start(&options, sizeof options));
  setenv("KSMU_PAGES_TO_SCAN", "many", 1);
  EXPECT_ERRNO(EINVAL, ksmu_start(nullptr, sizeof options));
  EXPECT_NE(std::string(ksmu_last_error()).find("KSMU_"), std::string::npos) << ksmu_last_error();
  setenv("KSMU_PAGES_TO_SCAN", "-1", 1);
  EXPECT_ERRNO(EINVAL, ksmu_start(nullptr, sizeof options));
  setenv("KSMU_PAGES_TO_SCAN", "321", 1);
  EXPECT_TRUE(OneThreadIsLeft()) << "a failed start changes nothing";

  options = {};
  options.max_maps = 1000;
  ASSERT_OK(ksmu_start(&options, sizeof options));
  EXPECT_EQ(Get("pages_to_scan"), 321);
  EXPECT_OK(ksmu_start(&options, sizeof options));
  options.max_maps = 1001;
  EXPECT_ERRNO(EALREADY, ksmu_start(&options, sizeof options));
  EXPECT_NE(std::string(ksmu_last_error()), "");
  EXPECT_OK(ksmu_stop());
  EXPECT_OK(ksmu_stop());
  EXPECT_ERRNO(EINVAL, ksmu_stop());
  // A start by first use is one with defaults.
  Memory memory(4);
  EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  EXPECT_OK(ksmu_start(nullptr, sizeof options));
  EXPECT_ERRNO(EALREADY, ksmu_start(&options, sizeof options));
  EXPECT_OK(ksmu_stop());
  EXPECT_EQ(Get("regions"), 1) << "counted per start";
  EXPECT_OK(ksmu_stop());
  EXPECT_EQ(Get("regions"), 0);
}

// The environment gives initial values: what the program has set is kept for the start, and over a stop.
KSMU_ISOLATED_TEST(StartStop, TheEnvironmentIsAskedOnce, 30) {
  setenv("KSMU_PAGES_TO_SCAN", "321", 1);
  setenv("KSMU_SLEEP_MILLISECS", "654", 1);
  setenv("KSMU_SMART_SCAN", "7", 1);
  Set("pages_to_scan", 11);
  EXPECT_ERRNO(EINVAL, ksmu_start(nullptr, sizeof(ksmu_options)));
  EXPECT_EQ(Get("sleep_millisecs"), 20) << "a failed start changes nothing";
  setenv("KSMU_SMART_SCAN", "0", 1);
  ASSERT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
  EXPECT_EQ(Get("pages_to_scan"), 11);
  EXPECT_EQ(Get("sleep_millisecs"), 654);
  EXPECT_EQ(Get("smart_scan"), 0);
  Set("smart_scan", 1);
  ASSERT_OK(ksmu_stop());
  setenv("KSMU_SLEEP_MILLISECS", "1", 1);
  ASSERT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
  EXPECT_EQ(Get("pages_to_scan"), 11);
  EXPECT_EQ(Get("sleep_millisecs"), 654);
  EXPECT_EQ(Get("smart_scan"), 1);
  EXPECT_OK(ksmu_stop());
}

// --- stop and start --------------------------------------------------------------------------------------------------

void StopLeavesNothingButTheMemory(int flags) {
  Memory memory(1024);
  const auto seed = [](std::size_t i) { return i % 8; };
  FillPages(memory, seed);
  const std::set<std::string> descriptors = Descriptors();
  (void)ThreadNames();
  std::size_t maps_before = 0;
  for (int round = 0; round < 4; ++round) {
    ASSERT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
    ASSERT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
    Set("run", 0);
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
    MergeAll();
    EXPECT_EQ(Get("pages_merged"), 1024 - 128);
    EXPECT_EQ(Descriptors(), descriptors) << "the program's table holds none of ours";
    const std::vector<std::string> names = ThreadNames();
    EXPECT_EQ(std::count(names.begin(), names.end(), "ksmu-scan"), 1);
    EXPECT_EQ(std::count(names.begin(), names.end(), "ksmu-event"), 1);
    EXPECT_OK(ksmu_stop());
    EXPECT_EQ(Get("pages_merged"), 1024 - 128) << "counted per start";
    EXPECT_OK(ksmu_stop());
    EXPECT_TRUE(OneThreadIsLeft());
    EXPECT_EQ(Descriptors(), descriptors);
    EXPECT_EQ(Get("pages_merged"), 0);
    EXPECT_EQ(Get("regions"), 0);
    EXPECT_TRUE(PagesAre(memory, seed));
    CountMaps();  // the reading itself, and a first round, populate a sanitizer's heap
    if (round <= 1) maps_before = CountMaps();
    EXPECT_LE(CountMaps(), maps_before + 2) << "round " << round << ": mappings leak";
    // Plain memory again.
    ASSERT_EQ(madvise(memory.data(), memory.bytes(), MADV_DONTNEED), 0);
    EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 0; }));
    FillPages(memory, seed);
    EXPECT_ERRNO(EINVAL, ksmu_stop());
  }
  EXPECT_GE(Get("starts"), 3);
}

KSMU_ISOLATED_TEST(StartStop, StopLeavesNothingExact, 60) { StopLeavesNothingButTheMemory(0); }
KSMU_ISOLATED_TEST(StartStop, StopLeavesNothingPromised, 60) { StopLeavesNothingButTheMemory(KSMU_F_NO_RAW_DISCARDS); }
KSMU_ISOLATED_TEST(StartStop, StopLeavesNothingSync, 60) { StopLeavesNothingButTheMemory(KSMU_F_SYNC_BREAK); }

// Pool files of earlier starts are remembered only while something is mapped from them: there is room for so many.
KSMU_ISOLATED_TEST(StartStop, PoolFilesAreForgottenWhenNothingShowsThem, 60) {
  Memory memory(256);
  for (int round = 0; round < 5; ++round) {
    FillPages(memory, [](std::size_t i) { return i % 8; });
    ASSERT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
    Set("run", 0);
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
    MergeAll();
    // Stays in its run's mapping over the stop.
    if (round % 2) FillPage(memory.page(100), 1000);
    ASSERT_OK(ksmu_stop());
    if (ReadFile("/proc/self/maps").find("/memfd:") != std::string::npos) {
      EXPECT_TRUE(api::HasLeftovers());
      EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_DISCARD));
      EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 0; }));
      ASSERT_EQ(mmap(memory.data(), memory.bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
                memory.data());
      ASSERT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
      ASSERT_OK(ksmu_stop());
    }
    EXPECT_FALSE(api::HasLeftovers()) << "round " << round;
  }
}

// ksmu_stop, restarts and advice while threads write, merge, discard, read counters: calls succeed or fail as
// documented, and every writer finds what it wrote.
KSMU_ISOLATED_TEST(StartStop, StopInTheMiddleOfEverything, 120) {
  constexpr std::size_t kPages = 2048, kThreads = 3;
  Set("cpu_limit_percent", 100);
  Set("sleep_millisecs", 0);
  Set("remerge_seconds", 0);
  Memory memory(kPages);
  std::atomic<bool> stop = false;
  std::atomic<int> wrong = 0;
  std::atomic<long> operations = 0;
  std::vector<std::uint64_t> shadow(kPages, 0);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(t);
      while (!stop) {
        const std::size_t i = random() % (kPages / kThreads) * kThreads + t;
        if (i >= kPages) continue;
        if (FindWrongByte(memory.page(i), shadow[i]) >= 0) ++wrong;
        const std::uint64_t what = random() % 10;
        if (what == 0) {
          if (ksmu_advise(memory.page(i), PageSize(), KSMU_DISCARD) == 0) shadow[i] = 0;
          // A refused discard has discarded nothing, and only a stop under way refuses it.
          else if (errno != EAGAIN)
            ++wrong;
        } else if (what == 1) {
          if (madvise(memory.page(i), PageSize(), MADV_DONTNEED) == 0) shadow[i] = 0;
        } else {
          shadow[i] = random() % 12;
          FillPage(memory.page(i), shadow[i]);
        }
        ++operations;
      }
    });
  }
  threads.emplace_back([&] {
    while (!stop) {
      // Starts the library if it is stopped, like any first use.
      if (ksmu_merge(memory.data(), memory.bytes()) < 0 && errno != EAGAIN) {
        printf("ksmu_merge: errno %d %s\n", errno, ksmu_last_error());
        ++wrong;
      }
    }
  });
  threads.emplace_back([&] {
    while (!stop) {
      ksmu_stats stats;
      ksmu_read_stats(&stats, sizeof stats);
      ksmu_page_info info;
      ksmu_explain(memory.page(5), &info, sizeof info);
      ksmu_region_stats region;
      ksmu_read_region(nullptr, &region, sizeof region);
    }
  });
  int stops = 0;
  long merged = 0;
  // For ten seconds, and on a slow machine until enough has happened for the test to mean something.
  for (const double begin = Now(); Now() < begin + 10 || ((stops <= 20 || merged <= 100) && Now() < begin + 90);) {
    if (ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE) != 0) {
      EXPECT_EQ(errno, EAGAIN) << ksmu_last_error();
      continue;
    }
    SleepSeconds(0.003 * (stops % 20));
    std::int64_t total = 0;
    if (ksmu_get("pages_merged_total", &total) == 0) merged += total;
    if (ksmu_stop() == 0) {
      ++stops;
    } else {
      EXPECT_EQ(errno, EINVAL) << ksmu_last_error();
    }
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  while (ksmu_stop() == 0) {
  }
  EXPECT_EQ(errno, EINVAL);
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(PagesAre(memory, [&](std::size_t i) { return shadow[i]; }));
  EXPECT_TRUE(OneThreadIsLeft());
  printf("%d stops, %ld operations, %ld pages merged\n", stops, operations.load(), merged);
  EXPECT_GT(stops, 20);
  EXPECT_GT(merged, 100);
}

// --- signals ---------------------------------------------------------------------------------------------------------

void CountSignal(int) {}

// ksmu_merge interrupted: EINTR with nothing half done, and calling again goes on.
KSMU_ISOLATED_TEST(StartStop, MergeInterruptedBySignals, 60) {
  Set("run", 0);
  constexpr std::size_t kPages = 16384;
  Memory memory(kPages);
  const auto seed = [](std::size_t i) { return 1 + i % 100; };
  FillPages(memory, seed);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  struct sigaction action = {};
  action.sa_handler = CountSignal;
  ASSERT_EQ(sigaction(SIGUSR1, &action, nullptr), 0);
  const pthread_t self = pthread_self();
  std::atomic<bool> stop = false;
  std::thread sender([&] {
    while (!stop) {
      pthread_kill(self, SIGUSR1);
      SleepSeconds(0.002);
    }
  });
  int interrupted = 0;
  std::int64_t merged = 0;
  for (int i = 0; i < 2000; ++i) {
    const ssize_t n = ksmu_merge(memory.data(), memory.bytes());
    if (n >= 0) {
      merged += n;
      break;
    }
    ASSERT_EQ(errno, EINTR) << ksmu_last_error();
    ++interrupted;
  }
  stop = true;
  sender.join();
  printf("interrupted %d times\n", interrupted);
  MergeAll();
  EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(kPages));
  EXPECT_TRUE(PagesAre(memory, seed));
}

}  // namespace
}  // namespace ksmu::test
