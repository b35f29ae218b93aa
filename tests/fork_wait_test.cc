// What other threads' calls do while a fork has the scanner at rest, and forks while the library's threads come and go.
// Whoever waits for a call may hold an allocator's lock for which the forking thread waits in another fork handler: so what
// takes no page out of its place is carried out, and what it changes is what the child inherits.

#include <errno.h>
#include <malloc.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include <memory>

#include "api/shim.h"
#include "base/test_point.h"
#include "test_support.h"

namespace ksmu::test {
namespace {

using Kind = Child::Kind;
constexpr std::size_t kPages = 256;
constexpr double kCallsEndWithin = 10;

std::uint64_t Seed(std::size_t i) { return 1 + i / 8 % 4; }

// Called by the thread that forks, when the scanner rests. Points are reached by all threads: the first fork takes it.
std::function<void()>* g_at_rest = nullptr;
void AtRest(const char* point, std::uintptr_t, std::size_t) {
  if (strcmp(point, "fork.prepare") != 0 || !g_at_rest) return;
  (*std::exchange(g_at_rest, nullptr))();
}

struct Regions {
  explicit Regions(int flags) {
    Set("run", 0);
    for (Memory* memory : {&discarded, &unmapped, &released, &kept}) {
      FillPages(*memory, Seed);
      EXPECT_OK(ksmu_advise(memory->data(), memory->bytes(), KSMU_MERGEABLE | flags));
    }
    FillPages(added, Seed);
    EXPECT_OK(ksmu_merge(nullptr, SIZE_MAX / PageSize() * PageSize()));
    EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(4 * kPages));
  }
  Memory discarded{kPages}, unmapped{kPages}, released{kPages}, kept{kPages}, added{kPages};
};

void CallsWhileAForkWaits(int flags) {
  Regions r(flags);
  const auto seed_of_discarded = [](std::size_t i) { return i % 2 == 0 && i < 32 ? std::uint64_t{0} : Seed(i); };
  std::thread others;
  bool ended = false;
  std::function<void()> at_rest = [&] {
    std::atomic<bool> done = false;
    others = std::thread([&] {
      for (std::size_t i = 0; i < 32; i += 2) EXPECT_OK(ksmu_advise(r.discarded.page(i), PageSize(), KSMU_DISCARD));
      EXPECT_OK(ksmu_unmap(r.unmapped.data(), r.unmapped.bytes()));
      EXPECT_OK(ksmu_advise(r.released.data(), r.released.bytes(), KSMU_RELEASE));
      EXPECT_OK(ksmu_advise(r.added.data(), r.added.bytes(), KSMU_MERGEABLE | flags));
      ksmu_stats stats;
      EXPECT_OK(ksmu_read_stats(&stats, sizeof stats));
      EXPECT_EQ(stats.region_bytes, static_cast<std::int64_t>(3 * kPages * PageSize()));
      ksmu_page_info info;
      EXPECT_OK(ksmu_explain(r.kept.data(), &info, sizeof info));
      EXPECT_EQ(info.state, KSMU_PAGE_MERGED);
      EXPECT_OK(ksmu_set("run", 0));
      done = true;
    });
    ended = WaitUntil([&] { return done.load(); }, kCallsEndWithin);
  };
  g_at_rest = &at_rest;
  base::g_test_hook.store(&AtRest);
  Child child(Kind::kFork, [&](Child& self) {
    for (std::size_t i = 0; i < kPages; ++i) {
      if (FindWrongByte(r.discarded.page(i), seed_of_discarded(i)) >= 0) self.Report("discarded: page %zu is wrong", i);
      for (Memory* memory : {&r.released, &r.kept, &r.added}) {
        if (FindWrongByte(memory->page(i), Seed(i)) >= 0) self.Report("page %zu is wrong", i);
      }
    }
    if (msync(r.unmapped.data(), PageSize(), MS_ASYNC) == 0 || errno != ENOMEM) self.Report("what was unmapped is there");
    // Regions here: what the parent's were when the fork went on. Written, so that its pages are the child's own.
    for (std::size_t i = 0; i < kPages; ++i) FillPage(r.added.page(i), Seed(i));
    if (ksmu_merge(r.added.data(), r.added.bytes()) != static_cast<std::int64_t>(kPages)) {
      self.Report("the region that was added is none here: %s", ksmu_last_error());
    }
    ksmu_region_stats region;
    if (ksmu_read_region(r.released.data(), &region, sizeof region) == 0 &&
        region.start <= r.released.data()) {
      self.Report("what was released is a region here");
    }
    for (std::size_t i = 0; i < kPages; ++i) {
      if (FindWrongByte(r.discarded.page(i), seed_of_discarded(i)) >= 0) self.Report("discarded: page %zu is wrong at the end", i);
      if (FindWrongByte(r.added.page(i), Seed(i)) >= 0) self.Report("added: page %zu is wrong at the end", i);
    }
  });
  base::g_test_hook.store(nullptr);
  EXPECT_TRUE(ended) << "calls wait for the fork";
  others.join();
  r.unmapped.Forget();
  EXPECT_TRUE(child.Join());
  EXPECT_TRUE(PagesAre(r.discarded, seed_of_discarded));
  for (Memory* memory : {&r.released, &r.kept, &r.added}) EXPECT_TRUE(PagesAre(*memory, Seed));
  EXPECT_OK(ksmu_merge(nullptr, SIZE_MAX / PageSize() * PageSize()));
  EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(3 * kPages - 16));
}

KSMU_ISOLATED_TEST(ForkWait, CallsAreCarriedOutExact, 60) { CallsWhileAForkWaits(0); }
KSMU_ISOLATED_TEST(ForkWait, CallsAreCarriedOutPromised, 60) { CallsWhileAForkWaits(KSMU_F_NO_RAW_DISCARDS); }

// What takes pages out of their place: not before the child has been made.
KSMU_ISOLATED_TEST(ForkWait, UnmergingAndMergingComeAfterTheFork, 60) {
  Regions r(0);
  for (std::size_t i = 0; i < kPages; i += 2) FillPage(r.added.page(i), 9);
  std::atomic<int> done = 0;
  std::vector<std::thread> others;
  int before = -1;
  std::function<void()> at_rest = [&] {
    others.emplace_back([&] {
      EXPECT_OK(ksmu_advise(r.kept.data(), r.kept.bytes(), KSMU_UNMERGEABLE));
      ++done;
    });
    others.emplace_back([&] {
      EXPECT_OK(ksmu_merge(r.discarded.data(), r.discarded.bytes()));
      ++done;
    });
    SleepSeconds(0.3);
    before = done;
  };
  g_at_rest = &at_rest;
  base::g_test_hook.store(&AtRest);
  Child child(Kind::kFork, [&](Child& self) {
    for (std::size_t i = 0; i < kPages; ++i) {
      for (Memory* memory : {&r.discarded, &r.released, &r.kept}) {
        if (FindWrongByte(memory->page(i), Seed(i)) >= 0) self.Report("page %zu is wrong", i);
      }
    }
    ksmu_region_stats region;
    if (ksmu_set("run", 0) != 0) self.Report("%s", ksmu_last_error());  // wakes the library here
    if (ksmu_read_region(r.kept.data(), &region, sizeof region) != 0) self.Report("unmerged before the fork");
  });
  base::g_test_hook.store(nullptr);
  EXPECT_EQ(before, 0) << "carried out while the fork waited";
  for (std::thread& other : others) other.join();
  EXPECT_TRUE(child.Join());
  for (Memory* memory : {&r.discarded, &r.released, &r.kept}) EXPECT_TRUE(PagesAre(*memory, Seed));
  EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(3 * kPages));
}

// A fork does not wait for whoever starts or joins the library's threads: that one may wait for an allocator's lock, which
// the forking thread has taken in a handler of the allocator's.
KSMU_ISOLATED_TEST(ForkWait, ForksWhileTheLibraryStartsAndStops, 120) {
  Memory memory(kPages);
  FillPages(memory, Seed);
  std::atomic<bool> stop = false;
  long starts = 0;
  std::thread other([&] {
    for (; !stop; ++starts) {
      EXPECT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
      EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
      EXPECT_OK(ksmu_merge(memory.data(), memory.bytes()));
      EXPECT_OK(ksmu_stop());
    }
  });
  int forks = 0, with_region = 0;
  for (const double end = Now() + 4; Now() < end && !::testing::Test::HasFailure(); ++forks) {
    Child child(Kind::kFork, [&](Child& self) {
      for (std::size_t i = 0; i < kPages; ++i) {
        if (FindWrongByte(memory.page(i), Seed(i)) >= 0) self.Report("page %zu is wrong", i);
      }
      // The parent's threads, and what they held, are not here.
      Memory own(kPages);
      FillPages(own, Seed);
      if (ksmu_advise(own.data(), own.bytes(), KSMU_MERGEABLE) != 0) self.Report("advise: %s", ksmu_last_error());
      const std::int64_t merged = ksmu_merge(own.data(), own.bytes());
      if (merged != static_cast<std::int64_t>(kPages)) self.Report("merged %ld: %s", long(merged), ksmu_last_error());
      for (std::size_t i = 0; i < kPages; ++i) {
        if (FindWrongByte(memory.page(i), Seed(i)) >= 0) self.Report("page %zu is wrong at the end", i);
      }
    });
    with_region += ksmushim_state() == KSMU_SHIM_RUNNING;
    EXPECT_TRUE(child.Join());
  }
  stop = true;
  other.join();
  printf("%d forks, %d of them beside a running engine; %ld starts\n", forks, with_region, starts);
  EXPECT_GT(forks, 10);
  EXPECT_GT(starts, 10);
  EXPECT_TRUE(PagesAre(memory, Seed));
}

// The list of what a child inherits is read by the thread that wakes the library there. A signal on that very thread whose
// handler unmaps must not wait for it.
std::atomic<char*> g_forget{nullptr};
std::atomic<long> g_forgotten{0};
void Forget(int) {
  ksmushim_forget(g_forget, PageSize());
  ++g_forgotten;
}

KSMU_ISOLATED_TEST(ForkWait, SignalsUnmapOnTheThreadThatWakesTheChild, 60) {
  constexpr std::size_t kRegions = 200;
  Set("run", 0);
  std::vector<std::unique_ptr<Memory>> regions;
  for (std::size_t i = 0; i < kRegions; ++i) {
    regions.push_back(std::make_unique<Memory>(4));
    FillPages(*regions.back(), Seed);
    ASSERT_OK(ksmu_advise(regions.back()->data(), regions.back()->bytes(), KSMU_MERGEABLE));
  }
  for (int round = 0; round < 20 && !::testing::Test::HasFailure(); ++round) {
    Child child(Kind::kFork, [&](Child& self) {
      g_forget = regions[kRegions - 1]->data();
      struct sigaction action = {};
      action.sa_handler = &Forget;
      action.sa_flags = SA_RESTART;
      sigaction(SIGALRM, &action, nullptr);
      const itimerval every = {{0, 100}, {0, 100}}, never = {};
      setitimer(ITIMER_REAL, &every, nullptr);
      ksmu_stats stats;
      if (ksmu_read_stats(&stats, sizeof stats) != 0) self.Report("stats: %s", ksmu_last_error());
      std::int64_t regions_here = 0;
      // A call that wakes.
      if (ksmu_set("run", 0) != 0) self.Report("set: %s", ksmu_last_error());
      setitimer(ITIMER_REAL, &never, nullptr);
      if (ksmu_get("regions", &regions_here) != 0 || regions_here < static_cast<std::int64_t>(kRegions) - 1) {
        self.Report("%ld regions", long(regions_here));
      }
      if (g_forgotten == 0) self.Report("no signal came");
    });
    EXPECT_TRUE(child.Join(20));
  }
}

// --- a place of its own ------------------------------------------------------------------------------------------------

// A program with one thread may unmap in the middle of what it has reserved, and map there with MAP_FIXED later: nothing of the
// library's is in the hole, whatever it has mapped meanwhile.
KSMU_ISOLATED_TEST(OwnPlace, NothingOfTheLibrarysIsInTheProgramsHoles, 60) {
  if (kSanitized) GTEST_SKIP() << "sanitizers place mappings themselves";
  // The arena of its heap that libc makes for the first allocation of a thread, which is the start of another thread, goes where
  // libc puts it: see limits.md.
  ASSERT_EQ(mallopt(M_ARENA_MAX, 1), 1);
  constexpr std::size_t kReserved = std::size_t{512} << 20, kHole = std::size_t{256} << 20;
  Memory memory(4096);  // enough for tables, buffers and pool files to grow
  FillPages(memory, [](std::size_t i) { return 1 + i % 700; });
  char* reserved = static_cast<char*>(mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  ASSERT_NE(reserved, MAP_FAILED);
  char* hole = reserved + (kReserved - kHole) / 2;
  ASSERT_EQ(munmap(hole, kHole), 0);
  const auto hole_is_empty = [&](const char* when) {
    void* mapped = mmap(hole, kHole, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    EXPECT_EQ(mapped, hole) << when << ": " << strerror(errno) << "\n" << ReadFile("/proc/self/maps");
    if (mapped != MAP_FAILED) munmap(mapped, kHole);
  };
  for (int round = 0; round < 2; ++round) {
    ASSERT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
    Set("run", 1);
    Set("remerge_seconds", 0);
    Set("cpu_limit_percent", 100);
    Set("sleep_millisecs", 0);
    hole_is_empty("started");
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
    ASSERT_OK(ksmu_merge(memory.data(), memory.bytes()));
    hole_is_empty("merged");
    for (std::size_t i = 0; i < memory.pages(); i += 3) FillPage(memory.page(i), 1 + i % 700);
    const std::int64_t scans = Get("full_scans");
    EXPECT_TRUE(WaitUntil([&] { return Get("full_scans") >= scans + 5; }, 20));
    hole_is_empty("broken and merged again");
    EXPECT_OK(ksmu_set("run", 2));
    hole_is_empty("unmerged");
    Child child(Kind::kFork, [&](Child& self) {
      if (ksmu_set("run", 1) != 0 || ksmu_merge(memory.data(), memory.bytes()) < 0) self.Report("%s", ksmu_last_error());
      void* mapped = mmap(hole, kHole, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
      if (mapped != hole) self.Report("in a child, something is in the hole");
    });
    EXPECT_TRUE(child.Join());
    ASSERT_OK(ksmu_stop());
    hole_is_empty("stopped");
  }
  EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return 1 + i % 700; }));
  munmap(reserved, kReserved);
}

}  // namespace
}  // namespace ksmu::test
