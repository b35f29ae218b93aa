// Mappings: merging cuts the program's memory into several, and the kernel limits how many a process may have. They
// must not become more with every cycle, memory that is unmerged must be one mapping again, and at the limit it is
// merging that stops, not the program.

#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <optional>
#include <random>

#include "counts_support.h"
#include "test_support.h"

namespace ksmu::test {
namespace {

std::uint64_t OneOfSixteen(std::size_t i) { return 1 + i % 16; }
std::size_t AllBytes() { return SIZE_MAX / PageSize() * PageSize(); }

// Lines of /proc/self/maps. Read into a place of its own: a buffer from malloc could be a mapping more.
std::int64_t CountMappings() {
  static std::array<char, 1 << 16> buffer;
  const int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  std::int64_t lines = 0;
  for (ssize_t got; (got = read(fd, buffer.data(), buffer.size())) > 0;) {
    lines += std::count(buffer.data(), buffer.data() + got, '\n');
  }
  close(fd);
  return lines;
}

std::int64_t MapLimit() { return std::atoll(ReadFile("/proc/sys/vm/max_map_count").c_str()); }

// --- a thousand cycles -----------------------------------------------------------------------------------------------

enum class Back { kUnmerge, kWrite, kDiscard, kUnmap };

constexpr int kCycles = 1000, kSettled = 20;
// What comes and goes anyway: the library's scratch memory, and where the last cycle's duplicates happened to lie.
constexpr std::int64_t kSlack = 24;
constexpr std::size_t kSegment = std::size_t{2} << 20;
constexpr std::size_t kPages = 128, kWindow = 8;

// Half of the pages of a window are duplicates, at random, and are merged; then all goes back. The window moves by a
// page a cycle: a place that stays cut is a mapping more, and after 20 cycles most places have not been in the window.
void Cycle(Back back) {
  Set("run", 0);
  Set("remerge", 1);
  Set("remerge_seconds", 0);
  std::optional<Memory> memory;
  std::vector<std::uint64_t> seeds(kPages);
  const auto seed = [&](std::size_t i) { return seeds[i]; };
  const auto fill = [&](std::size_t i, std::uint64_t content) { FillPage(memory->page(i), seeds[i] = content); };
  std::uint64_t unique = 1'000'000;
  const auto map_anew = [&] {
    memory.emplace(kPages);
    for (std::size_t i = 0; i < kPages; ++i) fill(i, unique++);
  };
  map_anew();
  std::mt19937_64 random(1);
  std::int64_t settled = 0, merged = 0, possible = 0;
  std::vector<std::size_t> duplicates;
  for (int cycle = 1; cycle <= kCycles; ++cycle) {
    const std::size_t first = static_cast<std::size_t>(cycle) % (kPages - kWindow);
    duplicates.clear();
    for (std::size_t i = first; i < first + kWindow; ++i) {
      if (random() % 2 == 0) duplicates.push_back(i);
    }
    if (duplicates.size() % 2 == 1) duplicates.pop_back();
    const auto content = static_cast<std::uint64_t>(cycle) * kWindow;
    for (std::size_t k = 0; k < duplicates.size(); ++k) fill(duplicates[k], content + k / 2);
    const int flags = cycle % 2 == 0 ? 0 : static_cast<int>(KSMU_F_NO_RAW_DISCARDS);
    ASSERT_OK(ksmu_advise(memory->data(), memory->bytes(), KSMU_MERGEABLE | flags));
    // What lies in a run's mapping takes more than one: one finds it written, one finds it still and brings it back.
    std::size_t now = 0;
    for (int i = 0; i < 4 && now < duplicates.size(); ++i) {
      ASSERT_OK(ksmu_merge(memory->data(), memory->bytes()));
      now = static_cast<std::size_t>(Get("pages_merged"));
    }
    merged += static_cast<std::int64_t>(now), possible += static_cast<std::int64_t>(duplicates.size());
    if (back == Back::kUnmerge) {
      ASSERT_OK(ksmu_advise(memory->data(), memory->bytes(), KSMU_UNMERGEABLE));
    } else if (back == Back::kDiscard) {
      ASSERT_OK(ksmu_advise(memory->page(first), kWindow * PageSize(), KSMU_DISCARD));
      std::fill_n(seeds.begin() + static_cast<std::ptrdiff_t>(first), kWindow, 0);
    }
    for (std::size_t i = first; i < first + kWindow; ++i) {
      ASSERT_TRUE(PageIs(memory->page(i), seeds[i])) << "cycle " << cycle;
    }
    if (back == Back::kUnmap) {
      map_anew();
    } else {
      for (std::size_t i = first; i < first + kWindow; ++i) fill(i, unique++);
    }
    if (cycle == kSettled) settled = CountMappings();
  }
  // A page that was discarded stays in its place for some seconds at least.
  std::int64_t after = 0;
  const auto few = [&] { return (after = CountMappings()) <= settled + kSlack; };
  WaitUntil([&] { return ksmu_merge(nullptr, AllBytes()) < 0 || few(); }, 6, 0.1);
  printf("%lld mappings after cycle %d, %lld after cycle %d; %lld of %lld merged\n", static_cast<long long>(settled),
         kSettled, static_cast<long long>(after), kCycles, static_cast<long long>(merged),
         static_cast<long long>(possible));
  EXPECT_LE(after, settled + kSlack) << Text(ReadStats());
  EXPECT_GT(merged, possible / 2);
  EXPECT_TRUE(PagesAre(*memory, seed));
  EXPECT_TRUE(Balanced(ReadStats()));
}

KSMU_ISOLATED_TEST(Cycles, Unmerge, 120) { Cycle(Back::kUnmerge); }
KSMU_ISOLATED_TEST(Cycles, Write, 120) { Cycle(Back::kWrite); }
KSMU_ISOLATED_TEST(Cycles, Discard, 120) { Cycle(Back::kDiscard); }
KSMU_ISOLATED_TEST(Cycles, Unmap, 120) { Cycle(Back::kUnmap); }

// --- one mapping again -----------------------------------------------------------------------------------------------

KSMU_ISOLATED_TEST(Mappings, MremapOfWhatWasUnmerged, 60) {
  Set("run", 0);
  for (const int flags : {0, static_cast<int>(KSMU_F_NO_RAW_DISCARDS)}) {
    SCOPED_TRACE(flags);
    Memory memory(256);
    // Every other page a duplicate: cut at every page.
    const auto seed = [](std::size_t i) { return i % 2 == 0 ? 1 + i % 8 : 1000 + i; };
    FillPages(memory, seed);
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
    ASSERT_EQ(ksmu_merge(memory.data(), memory.bytes()), 128);
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
    void* grown = mremap(memory.data(), memory.bytes(), 2 * memory.bytes(), MREMAP_MAYMOVE);
    if (grown == MAP_FAILED) {
      ADD_FAILURE() << "mremap: " << strerror(errno);
      EXPECT_TRUE(PagesAre(memory, seed));
      continue;
    }
    memory.Forget();
    char* bytes = static_cast<char*>(grown);
    for (std::size_t i = 0; i < 512; ++i) ASSERT_TRUE(PageIs(bytes + i * PageSize(), i < 256 ? seed(i) : 0)) << i;
    for (std::size_t i = 0; i < 512; ++i) FillPage(bytes + i * PageSize(), 5000 + i);
    for (std::size_t i = 0; i < 512; ++i) ASSERT_TRUE(PageIs(bytes + i * PageSize(), 5000 + i)) << i;
    ASSERT_EQ(munmap(grown, 512 * PageSize()), 0);
  }
}

// --- the limit -------------------------------------------------------------------------------------------------------

// Mappings of alternating protection, which never join, until the process has `wanted`.
class Filler {
 public:
  explicit Filler(std::int64_t wanted) {
    const std::int64_t missing = wanted - CountMappings();
    if (missing < 3) return;
    pages_ = static_cast<std::size_t>(missing);
    base_ = static_cast<char*>(
        mmap(nullptr, pages_ * PageSize(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (std::size_t i = 1; i + 1 < pages_; i += 2) mprotect(base_ + i * PageSize(), PageSize(), PROT_READ);
  }
  ~Filler() { munmap(base_, pages_ * PageSize()); }
  Filler(const Filler&) = delete;
  Filler& operator=(const Filler&) = delete;

 private:
  char* base_ = nullptr;
  std::size_t pages_ = 0;
};

void* SetFlag(void* flag) {
  static_cast<std::atomic<bool>*>(flag)->store(true);
  return nullptr;
}

// What a program does that needs mappings: one of a protection that joins no neighbour, and a thread's stack.
void ExpectProgramCanMap(int line = __builtin_LINE()) {
  SCOPED_TRACE(line);
  void* p = mmap(nullptr, PageSize(), PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(p, MAP_FAILED) << strerror(errno);
  FillPage(p, 1);
  EXPECT_TRUE(PageIs(p, 1));
  // As libc makes a stack, but given back: libc keeps its own for the next thread.
  constexpr std::size_t kStack = 1 << 20;
  void* stack = mmap(nullptr, kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0);
  ASSERT_NE(stack, MAP_FAILED) << strerror(errno);
  ASSERT_EQ(mprotect(static_cast<char*>(stack) + PageSize(), kStack - PageSize(), PROT_READ | PROT_WRITE), 0)
      << strerror(errno);
  std::atomic<bool> ran = false;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstack(&attributes, static_cast<char*>(stack) + PageSize(), kStack - PageSize());
  pthread_t thread;
  const int error = pthread_create(&thread, &attributes, SetFlag, &ran);
  pthread_attr_destroy(&attributes);
  EXPECT_EQ(error, 0) << strerror(error);
  if (error == 0) pthread_join(thread, nullptr);
  EXPECT_EQ(ran.load(), error == 0);
  EXPECT_EQ(munmap(stack, kStack), 0);
  EXPECT_EQ(munmap(p, PageSize()), 0);
}

TEST(Limit, ReachedByTheProgram) {
  const std::int64_t limit = MapLimit();
  if (limit > 200'000) GTEST_SKIP() << "vm.max_map_count is " << limit << ": too many mappings to make";
  RunIsolated(
      [=] {
        Set("run", 0);
        constexpr std::size_t kPages = 1024;
        Memory memory(kPages), second(kPages);
        std::vector<std::uint64_t> seeds(kPages);
        for (std::size_t i = 0; i < kPages; ++i) FillPage(memory.page(i), seeds[i] = OneOfSixteen(i));
        const auto seed = [&](std::size_t i) { return seeds[i]; };
        const auto second_seed = [](std::size_t i) { return 100 + i % 32; };
        FillPages(second, second_seed);
        ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
        ASSERT_EQ(ksmu_merge(memory.data(), memory.bytes()), static_cast<ssize_t>(kPages));
        ASSERT_OK(ksmu_advise(second.data(), second.bytes(), KSMU_MERGEABLE));
        {
          const Filler filler(limit - 8);
          ASSERT_GE(CountMappings(), limit - 12);
          ASSERT_NO_FATAL_FAILURE(ExpectProgramCanMap());
          EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 0) << ksmu_last_error();
          EXPECT_EQ(Get("unmerged_map_budget"), static_cast<std::int64_t>(kPages));
          ASSERT_NO_FATAL_FAILURE(ExpectProgramCanMap());
          EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(kPages));
          for (std::size_t i = 0; i < kPages; i += 3) FillPage(memory.page(i), seeds[i] = 5000 + i);
          ASSERT_EQ(madvise(memory.page(512), 64 * PageSize(), MADV_DONTNEED), 0);
          std::fill_n(seeds.begin() + 512, 64, 0);
          EXPECT_TRUE(PagesAre(memory, seed));
          EXPECT_TRUE(PagesAre(second, second_seed));
          // Where there is no mapping to be had for a copy, the copy is made in place.
          EXPECT_OK(ksmu_advise(memory.page(100), 100 * PageSize(), KSMU_UNMERGEABLE));
          EXPECT_OK(ksmu_advise(memory.page(580), 100 * PageSize(), KSMU_DISCARD));
          std::fill_n(seeds.begin() + 580, 100, 0);
          EXPECT_TRUE(PagesAre(memory, seed));
          ASSERT_NO_FATAL_FAILURE(ExpectProgramCanMap());
          Set("cpu_limit_percent", 100);
          Set("sleep_millisecs", 0);
          Set("remerge_seconds", 0);
          Set("run", 1);
          SleepSeconds(0.5);
          Set("run", 0);
          ASSERT_NO_FATAL_FAILURE(ExpectProgramCanMap());
          EXPECT_TRUE(PagesAre(memory, seed));
          EXPECT_TRUE(PagesAre(second, second_seed));
          EXPECT_GT(Get("unmerged_map_budget"), 0);
          EXPECT_TRUE(Balanced(ReadStats()));
        }
        const auto merged_of_second = [&] {
          ksmu_merge(nullptr, AllBytes());
          ksmu_region_stats stats;
          return ksmu_read_region(second.data(), &stats, sizeof stats) == 0 ? stats.pages_merged : -1;
        };
        EXPECT_TRUE(WaitUntil([&] { return merged_of_second() == static_cast<std::int64_t>(kPages); }, 10))
            << Text(ReadStats());
        EXPECT_EQ(Get("unmerged_map_budget"), 0);
        EXPECT_TRUE(PagesAre(memory, seed));
        EXPECT_TRUE(PagesAre(second, second_seed));
        EXPECT_OK(ksmu_stop());
        EXPECT_TRUE(PagesAre(memory, seed));
        EXPECT_TRUE(PagesAre(second, second_seed));
      },
      90);
}

KSMU_ISOLATED_TEST(Limit, MaxMaps, 60) {
  Set("run", 0);
  constexpr std::size_t kPages = 4096;
  constexpr std::int64_t kDuplicates = kPages / 2, kTight = 600;
  Memory memory(kPages);
  std::vector<std::uint64_t> seeds(kPages);
  for (std::size_t i = 0; i < kPages; ++i) FillPage(memory.page(i), seeds[i] = i % 2 == 0 ? 1 + i % 32 : 1000 + i);
  const auto seed = [&](std::size_t i) { return seeds[i]; };
  const std::int64_t before = CountMappings();
  Set("max_maps", kTight);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  for (int i = 0; i < 5; ++i) {
    ASSERT_OK(ksmu_merge(nullptr, AllBytes()));
    const ksmu_stats s = ReadStats();
    EXPECT_GT(s.maps_used, 0);
    EXPECT_LE(s.maps_used, kTight);
    EXPECT_LE(CountMappings(), before + kTight + kSlack);
    EXPECT_GT(s.pages_merged, 0);
    EXPECT_EQ(s.pages_merged + s.unmerged_map_budget, kDuplicates) << Text(s);
    EXPECT_TRUE(Balanced(s));
    SleepSeconds(0.1);
  }
  ksmu_page_info info;
  ASSERT_OK(ksmu_explain(memory.page(kPages - 2), &info, sizeof info));
  EXPECT_EQ(info.reason, KSMU_REASON_MAP_BUDGET);
  EXPECT_TRUE(PagesAre(memory, seed));
  Set("max_maps", 0);
  EXPECT_TRUE(WaitUntil([] { return ksmu_merge(nullptr, AllBytes()) >= 0 && Get("pages_merged") == kDuplicates; }, 10))
      << Text(ReadStats());
  EXPECT_EQ(Get("unmerged_map_budget"), 0);
  // Lowering it takes nothing back, and breaks need no mapping.
  Set("max_maps", kTight);
  ASSERT_OK(ksmu_merge(nullptr, AllBytes()));
  EXPECT_EQ(Get("pages_merged"), kDuplicates);
  const std::int64_t full = CountMappings();
  for (std::size_t i = 0; i < kPages; i += 6) FillPage(memory.page(i), seeds[i] = 9000 + i);
  EXPECT_TRUE(PagesAre(memory, seed));
  EXPECT_LE(CountMappings(), full);
  EXPECT_OK(ksmu_stop());
  EXPECT_TRUE(PagesAre(memory, seed));
}

// Neighbours with one content would take a mapping each. Where mappings are short they map replicas, side by side.
KSMU_ISOLATED_TEST(Limit, RepeatedContentGetsReplicas, 60) {
  Set("run", 0);
  constexpr std::size_t kPages = 8192;
  constexpr std::int64_t kTight = 1200;
  const Memory memory(kPages, 0, kSegment);  // the sets depend on how many neighbours a segment has
  // Two patterns, 512 pages of the one after 512 of the other, as freed memory that is filled with a pattern looks.
  std::vector<std::uint64_t> seeds(kPages);
  for (std::size_t i = 0; i < kPages; ++i) FillPage(memory.page(i), seeds[i] = 1 + i / 512 % 2);
  const auto seed = [&](std::size_t i) { return seeds[i]; };
  const std::int64_t before = CountMappings();
  Set("max_maps", kTight);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  for (int i = 0; i < 3; ++i) ASSERT_OK(ksmu_merge(nullptr, AllBytes()));
  ksmu_stats s = ReadStats();
  EXPECT_EQ(s.pages_merged, static_cast<std::int64_t>(kPages)) << Text(s);
  EXPECT_EQ(s.unmerged_map_budget, 0);
  EXPECT_LE(s.maps_used, kTight);
  EXPECT_LE(CountMappings(), before + kTight + kSlack);
  // Few pages go into replicas, and they are counted as KSM counts a frame's duplicates.
  EXPECT_GT(s.pages_shared, 2);
  EXPECT_LE(s.pages_shared, 2 * (64 + 16 + 2));  // each content's sets, the second for all, and what was there before
  EXPECT_EQ(s.stable_node_chains, 2) << Text(s);
  EXPECT_GE(s.stable_node_dups, s.pages_shared);
  EXPECT_TRUE(Balanced(s));
  EXPECT_TRUE(PagesAre(memory, seed));
  for (std::size_t i = 0; i < kPages; i += 2) FillPage(memory.page(i), seeds[i] = 9000 + i);
  EXPECT_TRUE(PagesAre(memory, seed));
  ASSERT_EQ(madvise(memory.page(0), 1024 * PageSize(), MADV_DONTNEED), 0);
  std::fill_n(seeds.begin(), 1024, 0);
  EXPECT_TRUE(PagesAre(memory, seed));
  ASSERT_OK(ksmu_merge(nullptr, AllBytes()));
  EXPECT_TRUE(Balanced(ReadStats()));
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
  EXPECT_TRUE(WaitUntil([] { return Get("pages_shared") == 0; }, 5));
  EXPECT_TRUE(WaitUntil([] { return Get("stable_node_dups") == 0 && Get("stable_node_chains") == 0; }, 10)) << Text(ReadStats());
  EXPECT_TRUE(PagesAre(memory, seed));
}

// As long as there is room, nothing is spread: a frame has max_page_sharing sharers, as in KSM.
KSMU_ISOLATED_TEST(Limit, NoReplicasWhileThereIsRoom, 60) {
  Set("run", 0);
  constexpr std::size_t kPages = 4096;
  Memory memory(kPages);
  for (std::size_t i = 0; i < kPages; ++i) FillPage(memory.page(i), 1);
  Set("max_page_sharing", 1 << 20);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  ASSERT_OK(ksmu_merge(nullptr, AllBytes()));
  EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(kPages));
  EXPECT_EQ(Get("pages_shared"), 1);
}

// What mappings there are save more in long runs: these go first, wherever they lie, and short ones get the rest.
void ExpectLongRunsFirst(bool by_command) {
  Set("run", 0);
  constexpr std::size_t kShortRuns = 1024, kLongRuns = 64, kLong = 16, kPages = 2 * kShortRuns + kLongRuns * kLong;
  constexpr std::int64_t kTight = 600;  // as many isolated pages as there are would take 2,048
  // Whole segments: a run that lies across two is two, of which one can be short.
  const Memory memory(kPages, 0, kSegment);
  std::vector<std::uint64_t> seeds(kPages);
  for (std::size_t i = 0; i < kPages; ++i) {
    const bool isolated = i < 2 * kShortRuns;
    seeds[i] = isolated ? (i % 2 ? 10'000 + i : 2 + i / 2 % 512) : 1000 + (i - 2 * kShortRuns) % (kLongRuns / 2 * kLong);
    FillPage(memory.page(i), seeds[i]);
  }
  const auto seed = [&](std::size_t i) { return seeds[i]; };
  Set("max_maps", kTight);
  Set("thp_min_duplicates", 1);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  // The pairs of the long runs are found last. Isolated pages have taken what they may by then, and no more.
  const auto merged_long = [&] {
    std::size_t merged = 0;
    for (std::size_t i = 2 * kShortRuns; i < kPages; ++i) {
      ksmu_page_info info;
      merged += ksmu_explain(memory.page(i), &info, sizeof info) == 0 && info.state == KSMU_PAGE_MERGED;
    }
    return merged;
  };
  if (by_command) {
    ASSERT_OK(ksmu_merge(nullptr, AllBytes()));
    EXPECT_EQ(merged_long(), kLongRuns * kLong) << Text(ReadStats());
  } else {
    Set("cpu_limit_percent", 100);
    Set("sleep_millisecs", 0);
    Set("run", 1);
    EXPECT_TRUE(WaitUntil([&] { return merged_long() == kLongRuns * kLong; }, 10)) << Text(ReadStats());
  }
  // And what they leave is not kept from the short ones for ever.
  EXPECT_TRUE(WaitUntil(
      [&] {
        if (by_command) ksmu_merge(nullptr, AllBytes());
        return Get("maps_used") >= kTight / 2 - kSlack;
      },
      10))
      << Text(ReadStats());
  EXPECT_GT(Get("unmerged_map_budget"), 0);
  Set("run", 0);
  EXPECT_TRUE(Balanced(ReadStats()));
  EXPECT_TRUE(PagesAre(memory, seed));
}

KSMU_ISOLATED_TEST(Limit, LongRunsFirstInAMerge, 60) { ExpectLongRunsFirst(true); }
KSMU_ISOLATED_TEST(Limit, LongRunsFirstInTheScanner, 60) { ExpectLongRunsFirst(false); }

}  // namespace
}  // namespace ksmu::test
