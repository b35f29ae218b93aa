// Every cell of the fork table: reads, writes, exec, parent exits first, seen and raw discards, in children made by
// libc's fork, by _Fork and by a raw clone; isolation both ways while the parent merges on; frames never recycled under
// a child; forks while merging runs flat out; the engine that wakes in a child.

#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <random>

#include "test_support.h"

extern char** environ;

namespace ksmu::test {
namespace {

using Kind = Child::Kind;

std::size_t AllBytes() { return SIZE_MAX / PageSize() * PageSize(); }
void MergeAll() { EXPECT_OK(ksmu_merge(nullptr, AllBytes())); }

// CAP_SYS_PTRACE: the kernel permits EVENT_FORK.
bool ForkEventsPermitted() {
  const std::string status = ReadFile("/proc/self/status");
  const std::size_t at = status.find("CapEff:");
  return at != std::string::npos && (strtoull(status.c_str() + at + 7, nullptr, 16) >> 19 & 1) != 0;
}

int CountThreads() {
  int n = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) ++n;
  return n;
}

// A region with pages of every kind: duplicates, zeros, unique ones, broken ones, discarded ones, never touched ones.
constexpr std::size_t kPages = 1024;
struct Mixture {
  explicit Mixture(int flags) : memory(kPages), seeds(kPages, 0) {
    Set("run", 0);
    for (std::size_t i = 0; i < kPages - 64; ++i) FillPage(memory.page(i), seeds[i] = Initial(i));
    EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
    MergeAll();
    EXPECT_GT(Get("pages_merged"), static_cast<std::int64_t>(kPages / 3));
    for (std::size_t i = 100; i < 200; i += 3) FillPage(memory.page(i), seeds[i] = 600 + i);  // broken
    // Discarded and not touched since: the child must read zeros too.
    const bool promised = (flags & KSMU_F_NO_RAW_DISCARDS) != 0;
    for (std::size_t i = 300; i < 400; i += 10) {
      if (promised) {
        EXPECT_OK(ksmu_advise(memory.page(i), 3 * PageSize(), KSMU_DISCARD));
      } else {
        EXPECT_EQ(madvise(memory.page(i), 3 * PageSize(), MADV_DONTNEED), 0);
      }
      for (std::size_t k = i; k < i + 3; ++k) seeds[k] = 0;
    }
  }
  static std::uint64_t Initial(std::size_t i) {
    switch (i / 8 % 4) {
      case 0:
        return 1 + i % 16;  // runs of 8
      case 1:
        return 0;  // zeros
      case 2:
        return 2000 + i;  // unique
      default:
        return 20 + i * 7919 % 5;  // scattered
    }
  }
  // In a child: reports what is not as at the fork.
  void Check(Child& self, const char* when) const {
    for (std::size_t i = 0; i < kPages; ++i) {
      const std::ptrdiff_t at = FindWrongByte(memory.page(i), seeds[i]);
      if (at >= 0)
        self.Report("%s: page %zu is wrong at %td (should be %llu%s)", when, i, at,
                    static_cast<unsigned long long>(seeds[i]), FindWrongByte(memory.page(i), 0) < 0 ? ", is zero" : "");
    }
  }
  ::testing::AssertionResult Right() const {
    return PagesAre(memory, [this](std::size_t i) { return seeds[i]; });
  }
  Memory memory;
  std::vector<std::uint64_t> seeds;
};

class Fork : public ::testing::TestWithParam<std::tuple<Kind, int>> {
 protected:
  Kind kind() const { return std::get<0>(GetParam()); }
  int flags() const { return std::get<1>(GetParam()); }
  bool promised() const { return (flags() & KSMU_F_NO_RAW_DISCARDS) != 0; }
};

std::string KindName(Kind kind) {
  return kind == Kind::kFork ? "Fork" : kind == Kind::kRawClone ? "RawClone" : "ForkWithoutHandlers";
}
INSTANTIATE_TEST_SUITE_P(Kinds, Fork,
                         ::testing::Combine(::testing::Values(Kind::kFork, Kind::kRawClone, Kind::kForkWithoutHandlers),
                                            ::testing::Values(0, KSMU_F_NO_RAW_DISCARDS, KSMU_F_SYNC_BREAK)),
                         [](const ::testing::TestParamInfo<Fork::ParamType>& info) {
                           const int flags = std::get<1>(info.param);
                           return KindName(std::get<0>(info.param)) + (flags == 0                        ? "Exact"
                                                                       : flags == KSMU_F_NO_RAW_DISCARDS ? "Promised"
                                                                                                         : "Sync");
                         });

// --- the table ---------------------------------------------------------------------------------------------------

TEST_P(Fork, Reads) {
  RunIsolated([this] {
    Mixture mixture(flags());
    Child child(kind(), [&](Child& self) {
      mixture.Check(self, "at once");
      SleepSeconds(0.05);
      mixture.Check(self, "later");
    });
    child.Join();
    EXPECT_TRUE(mixture.Right());
  });
}

// Each sees only its own writes, whoever writes first.
TEST_P(Fork, Writes) {
  RunIsolated([this] {
    Mixture mixture(flags());
    Child child(kind(), [&](Child& self) {
      for (std::size_t i = 0; i < kPages; i += 2) FillPage(mixture.memory.page(i), 9000 + i);
      self.Signal(1);
      if (!self.Await(2)) self.Report("no step 2");
      for (std::size_t i = 0; i < kPages; ++i) {
        const std::uint64_t seed = i % 2 == 0 ? 9000 + i : mixture.seeds[i];
        if (FindWrongByte(mixture.memory.page(i), seed) >= 0) self.Report("page %zu is wrong in the child", i);
      }
    });
    ASSERT_TRUE(child.Await(1));
    EXPECT_TRUE(mixture.Right());
    std::vector<std::uint64_t> at_fork = mixture.seeds;
    for (std::size_t i = 0; i < kPages; i += 3) {
      // The child was forked with the old seeds in its own copy of the vector.
      FillPage(mixture.memory.page(i), mixture.seeds[i] = 12'000 + i);
    }
    MergeAll();
    child.Signal(2);
    child.Join();
    EXPECT_TRUE(mixture.Right());
  });
}

TEST_P(Fork, Exec) {
  RunIsolated([this] {
    Mixture mixture(flags());
    for (int i = 0; i < 20; ++i) {
      Child child(kind(), [&](Child& self) {
        char* arguments[] = {const_cast<char*>("true"), nullptr};
        if (i % 2 == 1) FillPage(mixture.memory.page(static_cast<std::size_t>(i)), 1);
        execv("/bin/true", arguments);
        self.Report("exec: errno %d", errno);
      });
      child.Join();
    }
    EXPECT_TRUE(mixture.Right());
    Set("remerge_seconds", 0);
    MergeAll();
    EXPECT_TRUE(mixture.Right());
  });
}

// The child goes on when the parent has gone: its bytes, its writes, its discards through the library.
TEST_P(Fork, ParentExitsFirst) {
  for (const bool killed : {false, true}) {
    SCOPED_TRACE(killed ? "killed" : "exits");
    RunIsolated([this, killed] {
      Child parent(Kind::kFork, [&](Child& self) {
        Mixture mixture(flags());
        const pid_t parent_pid = getpid();
        // A raw clone is not waited for: pages that were discarded and not touched since are empty in the child, and when
        // the parent has gone nobody answers for them (docs/limits.md). A touch fills them.
        if (kind() != Kind::kFork) {
          for (std::size_t i = 0; i < kPages; ++i) static_cast<void>(*static_cast<volatile char*>(mixture.memory.page(i)));
        }
        Child child(kind(), [&](Child&) {
          while (getppid() == parent_pid) SleepSeconds(0.002);
          SleepSeconds(0.05);
          mixture.Check(self, "parent gone");
          for (std::size_t i = 0; i < kPages; i += 2) FillPage(mixture.memory.page(i), mixture.seeds[i] = 7000 + i);
          mixture.Check(self, "after writes");
          if (ksmu_advise(mixture.memory.page(64), 128 * PageSize(), KSMU_DISCARD) != 0) {
            self.Report("discard: errno %d %s", errno, ksmu_last_error());
          }
          for (std::size_t i = 64; i < 192; ++i) mixture.seeds[i] = 0;
          mixture.Check(self, "after a seen discard");
          self.Signal(1);
        });
        _exit(killed ? (raise(SIGKILL), 1) : 0);
      });
      if (killed) {
        int status = 0;
        ASSERT_TRUE(WaitUntil([&] { return waitpid(parent.pid(), &status, WNOHANG) == parent.pid(); }, 20));
        EXPECT_TRUE(WIFSIGNALED(status));
        parent.Forget();
      } else {
        parent.Join();
      }
      EXPECT_TRUE(parent.Await(1)) << "the child does not finish";
      parent.ExpectNoReports();
    });
  }
}

TEST_P(Fork, SeenDiscard) {
  RunIsolated([this] {
    Mixture mixture(flags());
    Child child(kind(), [&](Child& self) {
      const auto discard = [&](std::size_t first, std::size_t n) {
        if (ksmu_advise(mixture.memory.page(first), n * PageSize(), KSMU_DISCARD) != 0) {
          self.Report("discard: errno %d %s", errno, ksmu_last_error());
        }
        for (std::size_t i = first; i < first + n; ++i) mixture.seeds[i] = 0;
      };
      discard(0, 50);
      mixture.Check(self, "discarded");
      // Written in the child first, then discarded.
      for (std::size_t i = 500; i < 600; ++i) FillPage(mixture.memory.page(i), mixture.seeds[i] = 3);
      discard(510, 50);
      mixture.Check(self, "written and discarded");
      for (std::size_t i = 0; i < 20; ++i) FillPage(mixture.memory.page(i), mixture.seeds[i] = 5);
      discard(10, 1);
      mixture.Check(self, "in the end");
    });
    child.Join();
    EXPECT_TRUE(mixture.Right());
  });
}

TEST_P(Fork, RawDiscard) {
  if (promised()) GTEST_SKIP() << "the region's promise forbids raw discards";
  if (!ForkEventsPermitted() && kind() != Kind::kFork)
    GTEST_SKIP() << "EVENT_FORK is not permitted (no CAP_SYS_PTRACE): a documented limit";
  RunIsolated([this] {
    Mixture mixture(flags());
    Child child(kind(), [&](Child& self) {
      const auto discard = [&](std::size_t first, std::size_t n, int advice = MADV_DONTNEED) {
        if (madvise(mixture.memory.page(first), n * PageSize(), advice) != 0) self.Report("madvise: errno %d", errno);
        for (std::size_t i = first; i < first + n; ++i) mixture.seeds[i] = 0;
      };
      discard(0, 50);
      mixture.Check(self, "discarded");
      for (std::size_t i = 500; i < 600; ++i) FillPage(mixture.memory.page(i), mixture.seeds[i] = 3);
      discard(510, 50);
      mixture.Check(self, "written and discarded");
      for (std::size_t i = 0; i < 20; ++i) FillPage(mixture.memory.page(i), mixture.seeds[i] = 5);
      discard(10, 1);
      for (std::size_t i = 700; i < 800; i += 2) discard(i, 1);
      mixture.Check(self, "in the end");
    });
    child.Join();
    EXPECT_TRUE(mixture.Right());
  });
}

// --- while the parent goes on ------------------------------------------------------------------------------------

// The child keeps looking at its snapshot while the parent rewrites, discards, merges and unmerges all of it, again and
// again: a frame of the child's that were punched or filled with something else would show.
TEST_P(Fork, FramesAreNotRecycledUnderAChild) {
  RunIsolated(
      [this] {
        Mixture mixture(flags());
        Set("remerge_seconds", 0);
        Child child(kind(), [&](Child& self) {
          while (!self.Await(1, 0.05)) mixture.Check(self, "while the parent merges");
          mixture.Check(self, "in the end");
        });
        const std::vector<std::uint64_t> at_fork = mixture.seeds;
        for (int round = 1; round <= 8; ++round) {
          EXPECT_OK(ksmu_set("run", round % 2 == 0 ? 2 : 0));
          for (std::size_t i = 0; i < kPages; ++i) {
            if (round % 3 == 0 && i % 16 == 0) {
              EXPECT_OK(ksmu_advise(mixture.memory.page(i), 16 * PageSize(), KSMU_DISCARD));
              std::fill_n(mixture.seeds.begin() + static_cast<std::ptrdiff_t>(i), 16, 0);
            }
            if (i % 3 != 0)
              FillPage(mixture.memory.page(i), mixture.seeds[i] = static_cast<std::uint64_t>(round) * 10'000 + i % 64);
          }
          Set("run", 0);
          MergeAll();
          MergeAll();
          ASSERT_TRUE(mixture.Right()) << "round " << round;
        }
        // (With synchronous breaks what was written is not merged again: documented.)
        EXPECT_GT(Get("pages_merged_total"), (flags() & KSMU_F_SYNC_BREAK) != 0 ? 500 : 2000);
        child.Signal(1);
        child.Join();
        EXPECT_TRUE(mixture.Right());
        // With the child gone, and no mapping left that could show them, the frames are free again.
        EXPECT_GT(Get("frames_in_use"), 0);
        EXPECT_OK(ksmu_unmap(mixture.memory.data(), mixture.memory.bytes()));
        mixture.memory.Forget();
        Set("cpu_limit_percent", 100);
        Set("sleep_millisecs", 0);
        Memory other(64);
        FillPages(other, [](std::size_t) { return 3; });
        EXPECT_OK(ksmu_advise(other.data(), other.bytes(), KSMU_MERGEABLE | flags()));
        Set("run", 1);
        EXPECT_TRUE(WaitUntil([&] { return Get("frames_in_use") <= 1; }, 20))
            << Get("frames_in_use") << " frames in use";
        EXPECT_TRUE(PagesAre(other, [](std::size_t) { return 3; }));
      },
      90);
}

// fork, again and again, while the scanner and ksmu_merge run flat out and the region churns.
TEST_P(Fork, WhileMergingRunsFlatOut) {
  if (kind() != Kind::kFork && !ForkEventsPermitted()) {
    GTEST_SKIP() << "EVENT_FORK is not permitted (no CAP_SYS_PTRACE): a child made in mid-merge is a documented limit";
  }
  RunIsolated(
      [this] {
        Mixture mixture(flags());
        Set("remerge_seconds", 0);
        Set("cpu_limit_percent", 100);
        Set("sleep_millisecs", 0);
        Set("run", 1);
        std::atomic<bool> stop = false;
        std::thread merger([&] {
          while (!stop) ksmu_merge(nullptr, AllBytes());
        });
        std::mt19937_64 random(1);
        int forks = 0;
        const double end = Now() + (kSanitized ? 20 : 6);
        // On a busy machine for longer: so many that they meet every step of a merge.
        for (; (Now() < end || (forks <= 20 && Now() < end + 60)) && !::testing::Test::HasFailure(); ++forks) {
          for (int k = 0; k < 60; ++k) {
            const std::size_t i = random() % (kPages - 4);
            if (random() % 8 == 0) {
              if (promised()) {
                EXPECT_OK(ksmu_advise(mixture.memory.page(i), 4 * PageSize(), KSMU_DISCARD));
              } else {
                EXPECT_EQ(madvise(mixture.memory.page(i), 4 * PageSize(), MADV_DONTNEED), 0);
              }
              std::fill_n(mixture.seeds.begin() + static_cast<std::ptrdiff_t>(i), 4, 0);
            } else {
              FillPage(mixture.memory.page(i), mixture.seeds[i] = random() % 30);
            }
          }
          const bool discards = !promised() && random() % 2 == 0;
          Child child(kind(), [&](Child& self) {
            mixture.Check(self, "in the child");
            if (!discards) return;
            madvise(mixture.memory.page(32), 32 * PageSize(), MADV_DONTNEED);
            for (std::size_t i = 32; i < 64; ++i) mixture.seeds[i] = 0;
            mixture.Check(self, "after a raw discard in the child");
          });
          if (forks % 4 == 0) SleepSeconds(0.002);
          EXPECT_TRUE(child.Join());
          EXPECT_TRUE(mixture.Right()) << "in the parent after " << forks << " forks";
        }
        stop = true;
        merger.join();
        printf("%d forks, %lld pages merged, %lld broken\n", forks, static_cast<long long>(Get("pages_merged_total")),
               static_cast<long long>(Get("cow_breaks")));
        EXPECT_GT(forks, 20);
        EXPECT_TRUE(mixture.Right());
        EXPECT_OK(ksmu_stop());
        EXPECT_TRUE(mixture.Right());
      },
      90);
}

// Several generations and siblings, each with its own bytes.
TEST_P(Fork, Grandchildren) {
  RunIsolated([this] {
    Mixture mixture(flags());
    const bool raw_discards = !promised() && ForkEventsPermitted();
    Child child(kind(), [&](Child& self) {
      for (std::size_t i = 0; i < 300; i += 2) FillPage(mixture.memory.page(i), mixture.seeds[i] = 8000 + i);
      for (const Kind again : {Kind::kFork, Kind::kRawClone}) {
        Child grandchild(again, [&](Child&) {
          mixture.Check(self, "grandchild");
          for (std::size_t i = 1; i < 300; i += 2) FillPage(mixture.memory.page(i), mixture.seeds[i] = 8500 + i);
          mixture.Check(self, "grandchild after writes");
          if (raw_discards) {
            madvise(mixture.memory.page(400), 100 * PageSize(), MADV_DONTNEED);
            for (std::size_t i = 400; i < 500; ++i) mixture.seeds[i] = 0;
            mixture.Check(self, "grandchild after a raw discard");
          }
          _exit(0);
        });
        int status = 0;
        const bool ended =
            WaitUntil([&] { return waitpid(grandchild.pid(), &status, WNOHANG) == grandchild.pid(); }, 20);
        if (!ended) self.Report("the grandchild does not end");
        if (ended) grandchild.Forget();
        if (ended && status != 0) self.Report("the grandchild's status is %#x", status);
        mixture.Check(self, "child after its child");
      }
    });
    child.Join();
    EXPECT_TRUE(mixture.Right());
  });
}

// One fork takes "exclusive" off every page. While a child lives they cannot be merged, and say so; afterwards they
// heal.
TEST_P(Fork, MergingGoesOnAfterTheChild) {
  RunIsolated([this] {
    Set("run", 0);
    Memory memory(512);
    const auto seed = [](std::size_t i) { return 1 + i % 32; };
    FillPages(memory, seed);
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags()));
    Child child(kind(), [&](Child& self) {
      while (!self.Await(1, 0.05)) {
        for (std::size_t i = 0; i < 512; ++i) {
          if (FindWrongByte(memory.page(i), seed(i)) >= 0) self.Report("page %zu is wrong in the child", i);
        }
      }
    });
    MergeAll();
    EXPECT_EQ(Get("unmerged_child"), 512) << "shared with a child that lives";
    EXPECT_EQ(Get("pages_merged"), 0);
    ksmu_page_info info;
    ASSERT_OK(ksmu_explain(memory.page(5), &info, sizeof info));
    EXPECT_STREQ(info.reason_name, "child");
    child.Signal(1);
    child.Join();
    MergeAll();
    EXPECT_EQ(Get("pages_merged"), 512);
    EXPECT_EQ(Get("unmerged_child"), 0);
    EXPECT_TRUE(PagesAre(memory, seed));
  });
}

// --- the child's own engine ----------------------------------------------------------------------------------------

// Dormant until the first call; then it merges, breaks, discards and stops like any other, beside the parent's.
TEST_P(Fork, EngineWakesInTheChild) {
  if (kind() != Kind::kFork) GTEST_SKIP() << "only in children of libc's fork can threads be started";
  RunIsolated([this] {
    Mixture mixture(flags());
    const bool sync = (flags() & KSMU_F_SYNC_BREAK) != 0;
    Child child(kind(), [&](Child& self) {
      const auto expect = [&](bool condition, const char* what) {
        if (!condition) self.Report("%s (errno %d: %s)", what, errno, ksmu_last_error());
      };
      std::int64_t value = -1;
      expect(CountThreads() == 1, "a child starts with one thread");
      expect(ksmu_get("run", &value) == 0 && value == 0, "tunables are inherited");
      expect(ksmu_get("pages_merged", &value) == 0 && value == 0, "counters start at 0");
      expect(CountThreads() == 1, "reading wakes nothing");
      expect(ksmu_merge(nullptr, AllBytes()) >= 0, "ksmu_merge");
      expect(CountThreads() == 3, "the engine has two threads");
      mixture.Check(self, "after waking");
      ksmu_stats stats;
      expect(ksmu_read_stats(&stats, sizeof stats) == 0, "ksmu_read_stats");
      expect(stats.regions >= 1 && stats.region_bytes == static_cast<std::int64_t>(mixture.memory.bytes()),
             "the regions are inherited");
      // Its own contents merge in its own pool: what the parent had not merged at once, the rest when it has been
      // discarded through the library (documented).
      for (std::size_t i = 0; i < 512; ++i) FillPage(mixture.memory.page(i), mixture.seeds[i] = 50 + i % 8);
      expect(ksmu_merge(nullptr, AllBytes()) >= 0, "ksmu_merge");
      expect(ksmu_get("pages_merged", &value) == 0 && value >= 100, "what the child writes merges in the child");
      mixture.Check(self, "merged in the child");
      expect(ksmu_advise(mixture.memory.data(), 512 * PageSize(), KSMU_DISCARD) == 0, "discard");
      for (std::size_t i = 0; i < 512; ++i) mixture.seeds[i] = 0;
      mixture.Check(self, "discarded");
      for (std::size_t i = 0; i < 512; ++i) FillPage(mixture.memory.page(i), mixture.seeds[i] = 70 + i % 8);
      expect(ksmu_merge(nullptr, AllBytes()) >= 0, "ksmu_merge");
      expect(ksmu_get("pages_merged", &value) == 0 && value >= (sync ? 100 : 400),
             "what was discarded merges in the child");
      mixture.Check(self, "merged again in the child");
      for (std::size_t i = 0; i < 512; i += 5) FillPage(mixture.memory.page(i), mixture.seeds[i] = 90);
      mixture.Check(self, "broken in the child");
      if (promised()) {
        expect(ksmu_advise(mixture.memory.page(600), 50 * PageSize(), KSMU_DISCARD) == 0, "discard");
      } else {
        expect(madvise(mixture.memory.page(600), 50 * PageSize(), MADV_DONTNEED) == 0, "madvise");
      }
      for (std::size_t i = 600; i < 650; ++i) mixture.seeds[i] = 0;
      mixture.Check(self, "discarded in the child");
      self.Signal(1);
      if (!self.Await(2)) self.Report("no step 2");
      mixture.Check(self, "after the parent has unmerged");
      expect(ksmu_set("run", 2) == 0, "run=2");
      expect(ksmu_get("unmerged_inherited", &value) == 0 && value == 0, "nothing maps the parent's frames");
      mixture.Check(self, "unmerged in the child");
      while (ksmu_stop() == 0) {
      }
      expect(errno == EINVAL, "ksmu_stop");
      expect(WaitUntil([] { return CountThreads() == 1; }, 5), "the threads have ended");
      mixture.Check(self, "stopped in the child");
      if (!promised()) {
        madvise(mixture.memory.data(), mixture.memory.bytes(), MADV_DONTNEED);
        for (auto& s : mixture.seeds) s = 0;
        mixture.Check(self, "discarded after the stop");
      }
    });
    ASSERT_TRUE(child.Await(1));
    EXPECT_TRUE(mixture.Right());
    EXPECT_OK(ksmu_set("run", 2));
    for (std::size_t i = 0; i < kPages; i += 2) FillPage(mixture.memory.page(i), mixture.seeds[i] = 40'000 + i);
    Set("run", 0);
    MergeAll();
    child.Signal(2);
    child.Join();
    EXPECT_TRUE(mixture.Right());
  });
}

// Each call that may be the first wakes it or does without.
TEST_P(Fork, FirstCallsInTheChild) {
  if (kind() != Kind::kFork) GTEST_SKIP() << "only in children of libc's fork can threads be started";
  RunIsolated(
      [this] {
        for (int which = 0; which < 7; ++which) {
          SCOPED_TRACE("first call " + std::to_string(which));
          Mixture mixture(flags());
          Child child(kind(), [&](Child& self) {
            const auto expect = [&](bool condition, const char* what) {
              if (!condition) self.Report("%s (errno %d: %s)", what, errno, ksmu_last_error());
            };
            char* const half = mixture.memory.page(kPages / 2);
            const std::size_t half_bytes = mixture.memory.bytes() / 2;
            switch (which) {
              case 0:
                expect(ksmu_advise(half, half_bytes, KSMU_UNMERGEABLE) == 0, "unmerge");
                break;
              case 1:
                expect(ksmu_advise(half, half_bytes, KSMU_MERGEABLE | flags()) == 0, "advise");
                break;
              case 2:
                expect(ksmu_advise(half, half_bytes, KSMU_RELEASE) == 0, "release");
                mixture.Check(self, "released");
                for (std::size_t i = kPages / 2; i < kPages; i += 2)
                  FillPage(mixture.memory.page(i), mixture.seeds[i] = 4);
                break;
              case 3: {
                void* own = ksmu_map(16 * PageSize(), 0);
                expect(own != MAP_FAILED, "ksmu_map");
                for (std::size_t i = 0; i < 16; ++i) FillPage(static_cast<char*>(own) + i * PageSize(), 3);
                expect(ksmu_merge(own, 16 * PageSize()) == 16, "merge");
                expect(ksmu_unmap(own, 16 * PageSize()) == 0, "ksmu_unmap");
                break;
              }
              case 4:
                expect(ksmu_unmap(half, half_bytes) == 0, "ksmu_unmap");
                expect(mmap(half, half_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
                            -1, 0) == half,
                       "mmap");
                for (std::size_t i = kPages / 2; i < kPages; ++i) mixture.seeds[i] = 0;
                break;
              case 5:
                expect(ksmu_start(nullptr, sizeof(ksmu_options)) == 0, "start");
                break;
              default:
                expect(ksmu_set("run", 2) == 0, "run 2");
                break;
            }
            mixture.Check(self, "after the call");
            for (std::size_t i = 1; i < kPages; i += 2) FillPage(mixture.memory.page(i), mixture.seeds[i] = 60 + i % 4);
            expect(ksmu_merge(nullptr, AllBytes()) >= 0, "merge");
            mixture.Check(self, "merged");
          });
          child.Join();
          EXPECT_TRUE(mixture.Right());
        }
      },
      90);
}

// Where no thread can be started, what needs one says so, and the rest works.
TEST_P(Fork, CallsThatNeedAnEngineFail) {
  if (kind() == Kind::kFork) GTEST_SKIP() << "about children that are not made by libc's fork";
  RunIsolated([this] {
    Mixture mixture(flags());
    Child child(kind(), [&](Child& self) {
      const auto refused = [&](long result, const char* what) {
        if (result != -1 || errno != EAGAIN) self.Report("%s returns %ld, errno %d", what, result, errno);
        if (ksmu_last_error()[0] == 0) self.Report("%s does not say why", what);
      };
      char* const data = mixture.memory.data();
      const std::size_t bytes = mixture.memory.bytes();
      refused(ksmu_merge(data, bytes), "ksmu_merge");
      refused(ksmu_advise(data, bytes, KSMU_MERGEABLE | flags()), "KSMU_MERGEABLE");
      refused(ksmu_advise(data, bytes, KSMU_UNMERGEABLE), "KSMU_UNMERGEABLE");
      refused(ksmu_map(PageSize(), 0) == MAP_FAILED ? -1 : 0, "ksmu_map");
      mixture.Check(self, "after refused calls");
      ksmu_stats stats;
      if (ksmu_read_stats(&stats, sizeof stats) != 0) self.Report("ksmu_read_stats: errno %d", errno);
      if (stats.pages_merged != 0 || stats.pages_merged_total != 0) self.Report("a child's counters start at 0");
      if (ksmu_advise(data, 64 * PageSize(), KSMU_DISCARD) != 0) self.Report("discard: errno %d", errno);
      for (std::size_t i = 0; i < 64; ++i) mixture.seeds[i] = 0;
      mixture.Check(self, "after a discard");
      char* const half = mixture.memory.page(kPages / 2);
      if (ksmu_unmap(half, bytes / 2) != 0) self.Report("ksmu_unmap: errno %d", errno);
      if (mmap(half, bytes / 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) !=
          half) {
        self.Report("mmap: errno %d", errno);
      }
      for (std::size_t i = kPages / 2; i < kPages; ++i) mixture.seeds[i] = 0;
      mixture.Check(self, "after ksmu_unmap");
    });
    child.Join();
    EXPECT_TRUE(mixture.Right());
  });
}

// --- others that make processes -----------------------------------------------------------------------------------

// By itself: no local variable of the caller lives across vfork's second return.
__attribute__((noinline)) pid_t VforkAndExec(char** arguments) {
  const pid_t child = vfork();
  if (child == 0) {
    execv("/bin/true", arguments);
    _exit(127);
  }
  return child;
}

KSMU_ISOLATED_TEST(ForkOthers, VforkSpawnSystem, 60) {
  for (const int flags : {0, static_cast<int>(KSMU_F_NO_RAW_DISCARDS), static_cast<int>(KSMU_F_SYNC_BREAK)}) {
    SCOPED_TRACE(flags);
    Mixture mixture(flags);
    Set("remerge_seconds", 0);
    Set("cpu_limit_percent", 100);
    Set("sleep_millisecs", 0);
    Set("run", 1);
    char* arguments[] = {const_cast<char*>("true"), nullptr};
    for (int i = 0; i < 50; ++i) {
      const pid_t child = VforkAndExec(arguments);
      int status = -1;
      ASSERT_EQ(waitpid(child, &status, 0), child);
      ASSERT_EQ(status, 0);
      pid_t spawned = -1;
      ASSERT_EQ(posix_spawn(&spawned, "/bin/true", nullptr, nullptr, arguments, environ), 0);
      ASSERT_EQ(waitpid(spawned, &status, 0), spawned);
      ASSERT_EQ(status, 0);
      if (i % 10 == 0) {
        ASSERT_EQ(system("true"), 0);
      }
      for (std::size_t k = 0; k < kPages; k += 37)
        FillPage(mixture.memory.page(k), mixture.seeds[k] = static_cast<std::uint64_t>(i) % 5);
    }
    EXPECT_TRUE(mixture.Right());
    // Nothing of this made a child that shares pages: all of it goes on merging.
    Set("run", 0);
    MergeAll();
    EXPECT_EQ(Get("unmerged_child"), 0);
    EXPECT_OK(ksmu_stop());
    EXPECT_TRUE(mixture.Right());
  }
}

// Attributes about fork are kept by merged memory.
KSMU_ISOLATED_TEST(ForkOthers, DontForkAndWipeOnFork, 60) {
  Set("run", 0);
  for (const int flags : {0, static_cast<int>(KSMU_F_NO_RAW_DISCARDS), static_cast<int>(KSMU_F_SYNC_BREAK)}) {
    SCOPED_TRACE(flags);
    Memory not_forked(64), wiped(64), forked(64);
    const auto seed = [](std::size_t i) { return 1 + i % 4; };
    for (const Memory* memory : {&not_forked, &wiped, &forked}) FillPages(*memory, seed);
    ASSERT_EQ(madvise(not_forked.data(), not_forked.bytes(), MADV_DONTFORK), 0);
    ASSERT_EQ(madvise(wiped.data(), wiped.bytes(), MADV_WIPEONFORK), 0);
    for (const Memory* memory : {&not_forked, &wiped, &forked}) {
      ASSERT_OK(ksmu_advise(memory->data(), memory->bytes(), KSMU_MERGEABLE | flags));
    }
    MergeAll();
    EXPECT_GE(Get("pages_merged"), 128) << "MADV_DONTFORK does not keep memory from merging";
    for (const Kind kind : {Kind::kFork, Kind::kRawClone}) {
      Child child(kind, [&](Child& self) {
        unsigned char resident;
        for (std::size_t i = 0; i < 64; ++i) {
          if (mincore(not_forked.page(i), PageSize(), &resident) == 0 || errno != ENOMEM)
            self.Report("page %zu came along", i);
          if (FindWrongByte(wiped.page(i), 0) >= 0) self.Report("page %zu was not wiped", i);
          if (FindWrongByte(forked.page(i), seed(i)) >= 0) self.Report("page %zu is wrong", i);
        }
      });
      child.Join();
    }
    // Also after unmerging.
    EXPECT_OK(ksmu_set("run", 2));
    Set("run", 0);
    Child child(Kind::kFork, [&](Child& self) {
      unsigned char resident;
      for (std::size_t i = 0; i < 64; ++i) {
        if (mincore(not_forked.page(i), PageSize(), &resident) == 0 || errno != ENOMEM)
          self.Report("page %zu came along", i);
      }
    });
    child.Join();
    for (const Memory* memory : {&not_forked, &wiped, &forked}) EXPECT_TRUE(PagesAre(*memory, seed));
  }
}

// Forks from one thread while others are inside every function of the library.
KSMU_ISOLATED_TEST(ForkOthers, ForkWhileOthersCallTheLibrary, 90) {
  Mixture mixture(0);
  Set("cpu_limit_percent", 100);
  Set("sleep_millisecs", 0);
  Set("remerge_seconds", 0);
  Set("run", 1);
  Memory other(256);
  FillPages(other, [](std::size_t i) { return 1 + i % 4; });
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    while (!stop) {
      ksmu_advise(other.data(), other.bytes(), KSMU_MERGEABLE);
      ksmu_merge(other.data(), other.bytes());
      ksmu_advise(other.data(), other.bytes(), KSMU_UNMERGEABLE);
    }
  });
  threads.emplace_back([&] {
    while (!stop) {
      ksmu_stats stats;
      ksmu_read_stats(&stats, sizeof stats);
      std::int64_t value;
      ksmu_get("run", &value);
      ksmu_get("no such name", &value);
      void* mapped = ksmu_map(PageSize(), 0);
      if (mapped != MAP_FAILED) ksmu_unmap(mapped, PageSize());
    }
  });
  int forks = 0;
  for (const double end = Now() + 5; Now() < end && !::testing::Test::HasFailure(); ++forks) {
    const Kind kind = forks % 2 == 0 || !ForkEventsPermitted() ? Kind::kFork : Kind::kRawClone;
    Child child(kind, [&](Child& self) {
      mixture.Check(self, "in the child");
      // The child's first call, whatever locks the parent's threads held.
      if (ksmu_advise(mixture.memory.data(), 16 * PageSize(), KSMU_DISCARD) != 0)
        self.Report("discard: errno %d %s", errno, ksmu_last_error());
      for (std::size_t i = 0; i < 16; ++i) mixture.seeds[i] = 0;
      mixture.Check(self, "after a discard");
    });
    EXPECT_TRUE(child.Join());
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  printf("%d forks\n", forks);
  EXPECT_GT(forks, 10);
  EXPECT_TRUE(mixture.Right());
}

}  // namespace
}  // namespace ksmu::test
