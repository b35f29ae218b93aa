// Huge pages: those with nothing to merge stay huge, those worth it are split, and the counters tell which is which.

#include <sys/mman.h>

#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "counts_support.h"
#include "test_support.h"

namespace ksmu::test {
namespace {

constexpr std::size_t kHuge = std::size_t{2} << 20;
constexpr std::size_t kSegments = 8;

// Private anonymous memory in huge pages, as far as the system has them. A test skips where it has not.
class HugeMemory {
 public:
  HugeMemory() {
    whole_ = static_cast<char*>(mmap(nullptr, kSegments * kHuge + kHuge, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    data_ = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(whole_) + kHuge - 1) & ~(kHuge - 1));
    madvise(data_, kSegments * kHuge, MADV_HUGEPAGE);
    for (std::size_t i = 0; i < kSegments; ++i) data_[i * kHuge] = 1;
  }
  ~HugeMemory() { munmap(whole_, kSegments * kHuge + kHuge); }
  char* data() const { return data_; }
  std::size_t bytes() const { return kSegments * kHuge; }
  std::size_t pages() const { return bytes() / PageSize(); }
  char* page(std::size_t i) const { return data_ + i * PageSize(); }
  // Page i has content seed_of(i).
  template <typename SeedOf>
  void Fill(SeedOf seed_of) const {
    for (std::size_t i = 0; i < pages(); ++i) FillPage(page(i), seed_of(i));
  }
  template <typename SeedOf>
  ::testing::AssertionResult Has(SeedOf seed_of) const {
    for (std::size_t i = 0; i < pages(); ++i) {
      if (auto right = PageIs(page(i), seed_of(i)); !right) return right << ", page " << i;
    }
    return ::testing::AssertionSuccess();
  }
  // Of all the process: the library's own huge page comes and goes, so it is asked for in segments of ours.
  std::size_t HugeSegments() const {
    std::size_t huge = 0;
    for (std::size_t i = 0; i < kSegments; ++i) {
      ksmu_page_info info;
      if (ksmu_explain(data_ + i * kHuge, &info, sizeof info) == 0) huge += info.huge == 1;
    }
    return huge;
  }

 private:
  char* whole_;
  char* data_;
};

void Flat() {
  Set("cpu_limit_percent", 100);
  Set("sleep_millisecs", 0);
}

#define SKIP_WITHOUT_HUGE_PAGES(memory)                                                                        \
  do {                                                                                                         \
    ASSERT_OK(ksmu_start(nullptr, 0));                                                                         \
    if ((memory).HugeSegments() != kSegments) GTEST_SKIP() << "the system gives no transparent huge pages here"; \
  } while (false)

std::uint64_t Unique(std::size_t i) { return 1000 + i; }
// Half of each segment in common with the other segments, at other places.
std::uint64_t Half(std::size_t i) { return i % 2 == 0 ? 10 + (i * 7 + i / 512) % 512 : 1000 + i; }

KSMU_ISOLATED_TEST(Huge, NothingToMergeStaysHuge, 60) {
  HugeMemory memory;
  SKIP_WITHOUT_HUGE_PAGES(memory);
  memory.Fill(Unique);
  Flat();
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  WaitUntil([&] { return Get("unmerged_huge") == static_cast<std::int64_t>(memory.pages()); }, 20);
  const std::int64_t scans = Get("full_scans");
  WaitUntil([&] { return Get("full_scans") >= scans + 20; }, 30);
  EXPECT_EQ(memory.HugeSegments(), kSegments);
  EXPECT_EQ(Get("unmerged_huge"), static_cast<std::int64_t>(memory.pages()));
  EXPECT_EQ(ksmu_merge(memory.data(), memory.bytes()), 0);
  EXPECT_EQ(memory.HugeSegments(), kSegments) << "ksmu_merge heeds huge pages, too";
  EXPECT_TRUE(Balanced(ReadStats()));
  // Written, they stay huge: nothing is armed.
  for (std::size_t i = 0; i < memory.pages(); i += 3) FillPage(memory.page(i), Unique(i));
  EXPECT_EQ(memory.HugeSegments(), kSegments);
  ASSERT_TRUE(memory.Has(Unique));
}

KSMU_ISOLATED_TEST(Huge, WhatIsWorthItIsSplit, 60) {
  HugeMemory memory;
  SKIP_WITHOUT_HUGE_PAGES(memory);
  memory.Fill(Half);
  Flat();
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  WaitUntil([&] { return Get("pages_merged") >= static_cast<std::int64_t>(memory.pages() / 2 - 16); }, 40);
  EXPECT_GE(Get("pages_merged"), static_cast<std::int64_t>(memory.pages() / 2 - 16));
  EXPECT_EQ(memory.HugeSegments(), 0u);
  EXPECT_TRUE(Balanced(ReadStats()));
  ASSERT_TRUE(memory.Has(Half));
}

KSMU_ISOLATED_TEST(Huge, ZerosCountAsWorthIt, 60) {
  HugeMemory memory;
  SKIP_WITHOUT_HUGE_PAGES(memory);
  // One segment of eight has 100 zero pages.
  const auto seed = [](std::size_t i) { return i >= 512 && i < 612 ? 0 : Unique(i); };
  memory.Fill(seed);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  Set("run", 0);
  EXPECT_EQ(ksmu_merge(memory.data(), memory.bytes()), 100);
  EXPECT_EQ(Get("ksm_zero_pages"), 100);
  EXPECT_EQ(memory.HugeSegments(), kSegments - 1);
  ASSERT_TRUE(memory.Has(seed));
}

// Contents are sampled, and one that fills a segment is but one of them: it is counted by itself.
KSMU_ISOLATED_TEST(Huge, WhatOneContentFillsIsSplit, 60) {
  HugeMemory memory;
  SKIP_WITHOUT_HUGE_PAGES(memory);
  // Each of 16 contents in a half of a segment, so that whichever are sampled others are not.
  const auto seed = [](std::size_t i) { return i % 2 == 0 ? 7 + i / 512 + 8 * (i % 4 / 2) : Unique(i); };
  memory.Fill(seed);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  Set("run", 0);
  EXPECT_EQ(ksmu_merge(memory.data(), memory.bytes()), static_cast<std::int64_t>(memory.pages() / 2));
  EXPECT_EQ(memory.HugeSegments(), 0u);
  ASSERT_TRUE(memory.Has(seed));
}

KSMU_ISOLATED_TEST(Huge, WithoutSamplingAllAreSplit, 60) {
  HugeMemory memory;
  SKIP_WITHOUT_HUGE_PAGES(memory);
  const auto seed = [](std::size_t i) { return i == 5 || i == 700 ? 7 : Unique(i); };
  memory.Fill(seed);
  Set("run", 0);
  Set("thp_min_duplicates", 1);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  EXPECT_EQ(ksmu_merge(memory.data(), memory.bytes()), 2);
  EXPECT_LE(memory.HugeSegments(), kSegments - 2);
  ASSERT_TRUE(memory.Has(seed));
}

// Switched off, sampling ends at once, also where the next look was to come after many passes.
KSMU_ISOLATED_TEST(Huge, SwitchedOffSamplingEndsAtOnce, 60) {
  HugeMemory memory;
  SKIP_WITHOUT_HUGE_PAGES(memory);
  memory.Fill(Unique);
  Flat();
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  WaitUntil([&] { return Get("unmerged_huge") == static_cast<std::int64_t>(memory.pages()); }, 20);
  // Looked at again after 1, 3, 7 ... 127 passes.
  const std::int64_t scans = Get("full_scans");
  ASSERT_TRUE(WaitUntil([&] { return Get("full_scans") >= scans + 140; }, 30));
  Set("thp_min_duplicates", 1);
  const std::int64_t off = Get("full_scans");
  WaitUntil([&] { return Get("full_scans") >= off + 4; }, 10);
  EXPECT_EQ(Get("unmerged_huge"), 0) << Text(ReadStats());
  ASSERT_TRUE(memory.Has(Unique));
}

// Memory in small pages that could be huge, and in which there is nothing to merge, is let go of: the kernel can make huge
// pages of it again. What comes to it later is found all the same.
KSMU_ISOLATED_TEST(Huge, WhatIsFruitlessIsLetGo, 90) {
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
  HugeMemory memory;
  SKIP_WITHOUT_HUGE_PAGES(memory);
  ASSERT_EQ(madvise(memory.data(), memory.bytes(), MADV_DONTNEED), 0);
  ASSERT_EQ(madvise(memory.data(), memory.bytes(), MADV_NOHUGEPAGE), 0);
  std::vector<std::uint64_t> seeds(memory.pages());
  for (std::size_t i = 0; i < memory.pages(); ++i) seeds[i] = Unique(i);
  const auto seed = [&](std::size_t i) { return seeds[i]; };
  memory.Fill(seed);
  ASSERT_EQ(madvise(memory.data(), memory.bytes(), MADV_HUGEPAGE), 0);
  ASSERT_EQ(memory.HugeSegments(), 0u);
  Flat();
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  const auto collapses = [&] { return madvise(memory.page(7 * 512), kHuge, MADV_COLLAPSE) == 0; };
  WaitUntil([&] { return Get("pages_unshared") == static_cast<std::int64_t>(memory.pages()); }, 10);
  const std::int64_t scans = Get("full_scans");
  WaitUntil([&] { return Get("full_scans") >= scans + 4; }, 10);
  if (collapses()) GTEST_SKIP() << "this kernel makes huge pages of armed memory, too";
  EXPECT_TRUE(WaitUntil(collapses, 30)) << Text(ReadStats());
  EXPECT_GE(memory.HugeSegments(), 1u);
  EXPECT_EQ(Get("pages_unshared") + Get("unmerged_huge"), static_cast<std::int64_t>(memory.pages()));
  ASSERT_TRUE(memory.Has(seed));
  // A twin of what is remembered there.
  Memory other(64);
  for (std::size_t i = 0; i < 64; ++i) FillPage(other.page(i), i < 16 ? seeds[512 + i] : 90'000 + i);
  ASSERT_OK(ksmu_advise(other.data(), other.bytes(), KSMU_MERGEABLE));
  EXPECT_TRUE(WaitUntil([] { return Get("pages_merged") == 32; }, 20)) << Text(ReadStats());
  // And what has changed.
  for (std::size_t i = 2 * 512; i < 2 * 512 + 100; ++i) FillPage(memory.page(i), seeds[i] = 0);
  EXPECT_TRUE(WaitUntil([] { return Get("ksm_zero_pages") == 100; }, 30)) << Text(ReadStats());
  ASSERT_TRUE(memory.Has(seed));
  // ksmu_merge looks at everything. What the scanner finds first is not left to it.
  Set("run", 0);
  for (std::size_t i = 0; i < 64; ++i) FillPage(memory.page(3 * 512 + i), seeds[3 * 512 + i] = seeds[4 * 512 + i]);
  EXPECT_EQ(ksmu_merge(memory.data(), memory.bytes()), 128);
  EXPECT_TRUE(Balanced(ReadStats()));
  ASSERT_TRUE(memory.Has(seed));
}

// Discarding, unmapping and unadvising memory that is being sampled.
KSMU_ISOLATED_TEST(Huge, SampledMemoryCanGoAway, 60) {
  HugeMemory memory;
  SKIP_WITHOUT_HUGE_PAGES(memory);
  memory.Fill(Unique);
  Flat();
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  WaitUntil([&] { return Get("unmerged_huge") == static_cast<std::int64_t>(memory.pages()); }, 20);
  ASSERT_EQ(madvise(memory.data(), kHuge, MADV_DONTNEED), 0);
  for (std::size_t i = 0; i < 512; ++i) ASSERT_TRUE(PageIs(memory.page(i), 0)) << "page " << i;
  ASSERT_OK(ksmu_advise(memory.data() + kHuge, kHuge, KSMU_UNMERGEABLE));
  EXPECT_LE(Get("unmerged_huge"), static_cast<std::int64_t>(memory.pages() - 512));
  EXPECT_TRUE(Balanced(ReadStats()));
  for (std::size_t i = 512; i < memory.pages(); ++i) ASSERT_TRUE(PageIs(memory.page(i), Unique(i))) << "page " << i;
}

// Pages that are zero, filled, and zero again save nothing: passes that find only such ones come seldom. Those that find
// something come fast again.
KSMU_ISOLATED_TEST(Pacing, PassesComeAsTheyPay, 90) {
  constexpr std::size_t kPages = 16'384, kStride = 128;
  Memory memory(kPages);
  const auto seed = [](std::size_t i) { return i % kStride == 0 ? 0 : Unique(i); };
  FillPages(memory, seed);
  ASSERT_EQ(madvise(memory.data(), memory.bytes(), MADV_NOHUGEPAGE), 0);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  ASSERT_TRUE(WaitUntil([] { return Get("ksm_zero_pages") >= 100; }, 20)) << Text(ReadStats());
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (unsigned turn = 0; !stop; ++turn) {
      // Left alone for long enough to be found still.
      for (std::size_t i = 0; i < kPages; i += kStride) *static_cast<volatile char*>(memory.page(i)) = 0;
      SleepSeconds(0.4);
    }
  });
  SleepSeconds(15);
  const std::int64_t scans = Get("full_scans");
  SleepSeconds(10);
  EXPECT_LE(Get("full_scans") - scans, 12) << Text(ReadStats());
  const double begun = Now();
  Memory other(4096);
  FillPages(other, [](std::size_t i) { return 5 + i % 2; });
  ASSERT_OK(ksmu_advise(other.data(), other.bytes(), KSMU_MERGEABLE));
  EXPECT_TRUE(WaitUntil([] { return Get("pages_merged") >= 4000; }, 20)) << Text(ReadStats());
  std::printf("[          ] merged after %.1f s\n", Now() - begun);
  stop = true;
  writer.join();
  ASSERT_TRUE(PagesAre(memory, seed));
}

// So many pages a batch, so many batches a second; also where a step of the scanner reads many batches at once.
KSMU_ISOLATED_TEST(Pacing, BatchesBoundWhatIsReadInASecond, 60) {
  constexpr std::int64_t kPages = 16'384, kStep = 2048;
  Memory memory(kPages);
  FillPages(memory, Unique);
  ASSERT_EQ(madvise(memory.data(), memory.bytes(), MADV_NOHUGEPAGE), 0);
  Set("cpu_limit_percent", 0);
  Set("pages_to_scan", 100);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  ASSERT_TRUE(WaitUntil([] { return Get("pages_scanned") > 0; }, 20)) << Text(ReadStats());
  const double begun = Now();
  SleepSeconds(1.5);
  const std::int64_t read = Get("pages_scanned");
  // 50 batches a second: that of the first step and of one more may be before their sleep.
  const auto most = static_cast<std::int64_t>((Now() - begun) * 50 * 100) + 2 * kStep;
  EXPECT_LE(read, most) << Text(ReadStats());
  EXPECT_GE(read, kStep / 2) << Text(ReadStats());
  // And no longer than it is set.
  Set("pages_to_scan", 0);
  EXPECT_TRUE(WaitUntil([] { return Get("pages_scanned") >= kPages; }, 10)) << Text(ReadStats());
}

// KSM's advisor: pages_to_scan follows what is tracked.
KSMU_ISOLATED_TEST(Pacing, ScanTimeAdvisor, 60) {
  Memory memory(20'000);
  FillPages(memory, Unique);
  Set("sleep_millisecs", 10);
  Set("advisor_min_pages_to_scan", 100);
  Set("advisor_target_scan_time", 1);
  EXPECT_EQ(Get("pages_to_scan"), 0);
  Set("advisor_mode", 1);
  EXPECT_ERRNO(EINVAL, ksmu_set("pages_to_scan", 50));
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  // 20,000 pages in a second, 100 batches a second.
  EXPECT_TRUE(WaitUntil([] { return Get("pages_to_scan") == 200; }, 20)) << Get("pages_to_scan");
  Set("advisor_max_pages_to_scan", 150);
  EXPECT_TRUE(WaitUntil([] { return Get("pages_to_scan") == 150; }, 20)) << Get("pages_to_scan");
  Set("advisor_mode", 0);
  EXPECT_EQ(Get("pages_to_scan"), 0);
  EXPECT_OK(ksmu_set("pages_to_scan", 50));
  EXPECT_EQ(Get("pages_to_scan"), 50);
}

}  // namespace
}  // namespace ksmu::test
