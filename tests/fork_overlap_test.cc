// A server whose children overlap: from the first fork on there is always one alive. Frames are given back all the same,
// and none that a living child maps: each looks at its snapshot until it ends.

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <vector>

#include "test_support.h"

namespace ksmu::test {
namespace {

using Kind = Child::Kind;
constexpr std::size_t kPages = 512, kContents = kPages / 2;

void Check(Child& self, const Memory& memory, const std::vector<std::uint64_t>& seeds, const char* who) {
  for (std::size_t i = 0; i < kPages; ++i) {
    if (FindWrongByte(memory.page(i), seeds[i]) < 0) continue;
    self.Report("%s: page %zu is not as at the fork%s", who, i, FindWrongByte(memory.page(i), 0) < 0 ? ", is zero" : "");
    return;
  }
}

class Overlap : public ::testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Kinds, Overlap, ::testing::Values(Kind::kFork, Kind::kRawClone),
                         [](const auto& info) { return info.param == Kind::kFork ? "Fork" : "RawClone"; });

TEST_P(Overlap, FramesAreGivenBackBesideChildrenThatOverlap) {
  RunIsolated(
      [kind = GetParam()] {
        Memory memory(kPages);
        std::vector<std::uint64_t> seeds(kPages, 0);
        Set("run", 0);
        Set("remerge_seconds", 0);
        ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
        std::unique_ptr<Child> early, last;
        constexpr int kRounds = 40;
        std::int64_t most = 0, merged = 0;
        for (int round = 0; round < kRounds && !::testing::Test::HasFailure(); ++round) {
          // All of it discarded, through the library and raw, and filled with contents that were never there before.
          const std::size_t half = kPages / 2 * PageSize();
          ASSERT_OK(ksmu_advise(memory.data(), half, KSMU_DISCARD));
          ASSERT_EQ(madvise(memory.data() + half, half, MADV_DONTNEED), 0);
          ASSERT_GE(ksmu_merge(memory.data(), memory.bytes()), 0);  // back to anonymous memory
          const std::uint64_t base = 1'000u * static_cast<std::uint64_t>(round + 1);
          for (std::size_t i = 0; i < kPages; ++i) FillPage(memory.page(i), seeds[i] = base + i % kContents);
          for (int i = 0; i < 3; ++i) ASSERT_GE(ksmu_merge(memory.data(), memory.bytes()), 0);
          merged = Get("pages_merged_total");
          for (std::size_t i = round % 3; i < kPages; i += 5) FillPage(memory.page(i), seeds[i] = 500 + i);  // breaks
          auto next = std::make_unique<Child>(kind, [&](Child& self) {
            // The early one is forked while the pages of the first rounds are merged, and its child outlives it.
            pid_t grandchild = -1;
            if (round == 2 && kind == Kind::kFork && (grandchild = fork()) == 0) {
              do Check(self, memory, seeds, "grandchild");
              while (!self.Await(2, 0.05));
              Check(self, memory, seeds, "grandchild, in the end");
              _exit(0);
            }
            do Check(self, memory, seeds, "child");
            while (!self.Await(1, 0.02));
            Check(self, memory, seeds, "child, in the end");
            if (grandchild <= 0) return;
            int status = 0;
            if (waitpid(grandchild, &status, 0) != grandchild || status != 0) self.Report("the grandchild failed");
          });
          if (round == 2) {
            early = std::move(next);
          } else {
            if (last) {
              last->Signal(1);
              EXPECT_TRUE(last->Join());
            }
            last = std::move(next);
          }
          SleepSeconds(0.12);  // what waits for a child is asked about every 0.1 seconds
          if (round > 8) most = std::max(most, Get("frames_in_use"));
        }
        EXPECT_GT(merged, kRounds * static_cast<std::int64_t>(kPages) / 4);
        printf("%lld pages merged, at most %lld frames in use\n", static_cast<long long>(merged),
               static_cast<long long>(most));
        // Those that the early child keeps, and what the last few rounds have left; without an end it would be all of
        // them, 128 or more a round.
        EXPECT_LT(most, 10 * static_cast<std::int64_t>(kContents));
        EXPECT_TRUE(PagesAre(memory, [&](std::size_t i) { return seeds[i]; }));
        early->Signal(2);
        EXPECT_TRUE(early->Join());
        last->Signal(1);
        EXPECT_TRUE(last->Join());
      },
      120);
}

}  // namespace
}  // namespace ksmu::test
