// Exact counts: the cases of the kernel's ksm_tests and ksm_functional_tests, LTP's four phases, the balance of the
// counters, and their agreement with what the kernel itself reports. Each by ksmu_merge and by the scanner, and for
// each way to attach and to break.

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <memory>
#include <random>
#include <tuple>

#include "counts_case.h"
#include "test_support.h"

namespace ksmu::test {
namespace {

std::string ModeName(const ::testing::TestParamInfo<Counts::ParamType>& info) {
  const int flags = std::get<1>(info.param);
  return std::string(std::get<0>(info.param) == Driver::kMergeCall ? "Call" : "Scanner") +
         (flags == 0                        ? "Exact"
          : flags == KSMU_F_NO_RAW_DISCARDS ? "Promised"
          : flags == KSMU_F_SYNC_BREAK      ? "Sync"
                                            : "PromisedSync");
}
INSTANTIATE_TEST_SUITE_P(Modes, Counts,
                         ::testing::Combine(::testing::Values(Driver::kMergeCall, Driver::kScanner),
                                            ::testing::Values(0, KSMU_F_NO_RAW_DISCARDS, KSMU_F_SYNC_BREAK,
                                                              KSMU_F_NO_RAW_DISCARDS | KSMU_F_SYNC_BREAK)),
                         ModeName);

// --- ksm_tests ----------------------------------------------------------------------------------------------------

// -M: N equal pages, with the arithmetic of max_page_sharing.
TEST_P(Counts, EqualPages) {
  RunIsolated(
      [this] {
        Prepare();
        for (const std::int64_t m : {2, 3, 10, 256}) {
          for (const std::int64_t n : {2, 3, 4, 10, 21, 100, 257, 512, 1000}) {
            SCOPED_TRACE("N " + std::to_string(n) + ", max_page_sharing " + std::to_string(m));
            Set("max_page_sharing", m);
            Memory memory(static_cast<std::size_t>(n));
            FillPages(memory, [](std::size_t) { return 7; });
            Advise(memory);
            const bool even = n % m == 0 || n % m == 1;
            const std::int64_t shared = even ? n / m : n / m + 1;
            const std::int64_t sharing = even ? shared * (m - 1) : n - shared;
            // A frame that nobody came to share (its page could not be taken that moment) is there until it is given back.
            const std::int64_t dups = shared > 1 ? shared : 0;
            MergeUntil([=](const ksmu_stats& s) {
              return s.pages_shared == shared && s.pages_sharing == sharing && s.stable_node_dups == dups;
            });
            const ksmu_stats stats = ReadStats();
            EXPECT_EQ(stats.pages_tracked, n);
            EXPECT_EQ(stats.pages_unshared, n - shared - sharing)
                << "the one page left over is looked at again and again";
            EXPECT_EQ(stats.stable_node_chains, shared > 1 ? 1 : 0);
            EXPECT_EQ(stats.stable_node_dups, dups);
            EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 7; }));
            EXPECT_ERRNO(EBUSY, ksmu_set("max_page_sharing", m + 1));
            Set("run", 2);
            EXPECT_EQ(QuartetOf(ReadStats())[0], 0);
            EXPECT_EQ(QuartetOf(ReadStats())[1], 0);
            EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 7; }));
            Set("run", 0);
            if (::testing::Test::HasFailure()) return;
          }
        }
      },
      180);
}

// -U: two equal pages merge; one byte changed in each: nothing is shared.
TEST_P(Counts, ChangedPagesPart) {
  RunIsolated([this] {
    Prepare();
    Memory memory(2);
    FillPages(memory, [](std::size_t) { return 3; });
    Advise(memory);
    MergeUntilCounts(1, 1);
    memory.page(0)[0] = '-';
    memory.page(1)[0] = '+';
    ExpectSoon([](const ksmu_stats& s) { return s.pages_shared == 0 && s.pages_sharing == 0; });
    EXPECT_EQ(Get("cow_breaks"), 2);
    EXPECT_EQ(memory.page(0)[0], '-');
    EXPECT_EQ(memory.page(1)[0], '+');
    for (int i : {0, 1}) {
      char copy[2][65536];
      ASSERT_LE(PageSize(), sizeof copy[0]);
      FillPage(copy[0], 3);
      EXPECT_EQ(memcmp(memory.page(i) + 1, copy[0] + 1, PageSize() - 1), 0) << "page " << i;
    }
  });
}

// One of three equal pages changes: the other two go on sharing.
TEST_P(Counts, OneOfThreeParts) {
  RunIsolated([this] {
    Prepare();
    Memory memory(3);
    FillPages(memory, [](std::size_t) { return 3; });
    Advise(memory);
    MergeUntilCounts(1, 2);
    FillPage(memory.page(1), 4);
    ExpectSoon([](const ksmu_stats& s) { return s.pages_shared == 1 && s.pages_sharing == 1; });
    EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return i == 1 ? 4 : 3; }));
    if (sync()) {
      // Documented: with synchronous breaks a page is not merged again in place.
      EXPECT_EQ(Get("unmerged_broken"), 1);
      return;
    }
    // And back: the same content as the others' frame again.
    FillPage(memory.page(1), 3);
    MergeUntilCounts(1, 2);
    EXPECT_EQ(Get("unmerged_broken"), 0);
    EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 3; }));
  });
}

// -Z: zero pages, dropped or merged like any other content.
TEST_P(Counts, ZeroPages) {
  RunIsolated([this] {
    Prepare();
    constexpr std::int64_t kPages = 600;
    for (const int use : {1, 0, 1}) {
      SCOPED_TRACE("use_zero_pages " + std::to_string(use));
      Set("use_zero_pages", use);
      Memory memory(kPages);
      FillPages(memory, [](std::size_t) { return 0; });
      Advise(memory);
      if (use == 1) {
        MergeUntil([](const ksmu_stats& s) { return s.ksm_zero_pages == kPages; });
        EXPECT_EQ(Get("pages_shared"), 0);
        EXPECT_EQ(Get("pages_sharing"), 0);
        EXPECT_EQ(CountResident(memory.data(), memory.bytes()), 0u);
        // Reading them takes no memory, and leaves them what they are.
        EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 0; }));
        MergeUntil([](const ksmu_stats& s) { return s.ksm_zero_pages == kPages; });
        // Writing takes them out.
        for (std::size_t i = 0; i < 100; ++i) FillPage(memory.page(i), 1000 + i);
        MergeUntil([](const ksmu_stats& s) { return s.ksm_zero_pages == kPages - 100; });
        EXPECT_EQ(CountResident(memory.data(), memory.bytes()), 100u);
        EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return i < 100 ? 1000 + i : 0; }));
      } else {
        MergeUntilCounts(3, kPages - 3);  // 600 pages, 256 to a frame
        EXPECT_EQ(Get("ksm_zero_pages"), 0);
        EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 0; }));
      }
      Set("run", 2);
      EXPECT_EQ(Get("ksm_zero_pages"), 0) << "unmerged";
      EXPECT_TRUE(PagesAre(memory, [&](std::size_t i) { return use == 1 && i < 100 ? 1000 + i : 0; }));
      Set("run", 0);
    }
  });
}

// --- ksm_functional_tests -----------------------------------------------------------------------------------------

TEST_P(Counts, Unmerge) {
  RunIsolated([this] {
    Prepare();
    constexpr std::size_t kPages = 512;
    const auto seed = [](std::size_t i) { return 1 + i % 128; };
    Memory memory(kPages);
    FillPages(memory, seed);
    Advise(memory);
    MergeUntilCounts(128, kPages - 128);
    // The middle half: what remains at both ends stays merged.
    ASSERT_OK(ksmu_advise(memory.page(128), 256 * PageSize(), KSMU_UNMERGEABLE));
    ksmu_stats stats = ReadStats();
    EXPECT_TRUE(Balanced(stats));
    EXPECT_EQ(stats.pages_tracked, 256);
    EXPECT_EQ(stats.pages_shared, 128);
    EXPECT_EQ(stats.pages_sharing, 128);
    EXPECT_EQ(stats.regions, 2);
    EXPECT_TRUE(PagesAre(memory, seed));
    EXPECT_EQ(CountResident(memory.data(), memory.bytes()), kPages);
    FillPage(memory.page(200), 5000);
    FillPage(memory.page(10), 5001);
    const auto changed = [&](std::size_t i) { return i == 200 ? 5000 : i == 10 ? 5001 : seed(i); };
    EXPECT_TRUE(PagesAre(memory, changed));
    // And the rest.
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
    stats = ReadStats();
    EXPECT_TRUE(Balanced(stats));
    EXPECT_EQ(stats.pages_tracked, 0) << Text(stats);
    EXPECT_EQ(stats.regions, 0);
    EXPECT_EQ(stats.region_bytes, 0);
    EXPECT_TRUE(PagesAre(memory, changed));
    // The memory is plain again: a raw discard reads as zeros.
    ASSERT_EQ(madvise(memory.data(), memory.bytes(), MADV_DONTNEED), 0);
    EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 0; }));
  });
}

TEST_P(Counts, UnmergeZeroPages) {
  RunIsolated([this] {
    Prepare();
    constexpr std::size_t kPages = 512;
    Memory memory(kPages);
    FillPages(memory, [](std::size_t) { return 0; });
    Advise(memory);
    MergeUntil([](const ksmu_stats& s) { return s.ksm_zero_pages == kPages; });
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes() / 2, KSMU_UNMERGEABLE));
    EXPECT_EQ(Get("ksm_zero_pages"), kPages / 2);
    FillPage(memory.page(kPages - 1), 1);
    MergeUntil([](const ksmu_stats& s) { return s.ksm_zero_pages == kPages / 2 - 1; });
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
    EXPECT_EQ(Get("ksm_zero_pages"), 0);
    EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return i == kPages - 1 ? 1 : 0; }));
  });
}

TEST_P(Counts, UnmergeDiscarded) {
  RunIsolated([this] {
    Prepare();
    constexpr std::size_t kPages = 512;
    Memory memory(kPages);
    FillPages(memory, [](std::size_t) { return 9; });
    Advise(memory);
    MergeUntilCounts(2, kPages - 2);
    if (promised()) {
      ASSERT_OK(ksmu_advise(memory.data(), memory.bytes() / 2, KSMU_DISCARD));
    } else {
      ASSERT_EQ(madvise(memory.data(), memory.bytes() / 2, MADV_DONTNEED), 0);
      // The event is read before madvise returns, and booked a moment later. Unmerging in between is right, but takes
      // memory.
      EXPECT_TRUE(WaitUntil([] { return Get("pages_tracked") == kPages / 2; }, 5));
    }
    const auto seed = [](std::size_t i) { return i < kPages / 2 ? 0 : 9; };
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
    EXPECT_EQ(CountResident(memory.data(), memory.bytes() / 2), 0u) << "unmerging brings back no discarded page";
    EXPECT_TRUE(PagesAre(memory, seed));
    const ksmu_stats stats = ReadStats();
    EXPECT_EQ(stats.pages_tracked, 0) << Text(stats);
    EXPECT_TRUE(Balanced(stats));
  });
}

TEST_P(Counts, DiscardedPagesReadZero) {
  RunIsolated([this] {
    Prepare();
    constexpr std::size_t kPages = 512;
    Memory memory(kPages);
    const auto seed = [](std::size_t i) { return 20 + i % 16; };
    FillPages(memory, seed);
    Advise(memory);
    MergeUntilCounts(16, kPages - 16);
    for (std::size_t i = 0; i < 64; ++i) memory.page(i)[1] ^= 1;  // broken pages among them
    const bool raw = !promised();
    const auto discard = [&](std::size_t first, std::size_t pages) {
      if (raw) {
        ASSERT_EQ(madvise(memory.page(first), pages * PageSize(), MADV_DONTNEED), 0);
      } else {
        ASSERT_OK(ksmu_advise(memory.page(first), pages * PageSize(), KSMU_DISCARD));
      }
      EXPECT_TRUE(PageIs(memory.page(first), 0));
    };
    discard(0, 256);
    EXPECT_TRUE(PagesAre(memory, [&](std::size_t i) { return i < 256 ? 0 : seed(i); }));
    discard(400, 1);
    // Half of the discarded pages get content again, and merge again; the others were only read.
    for (std::size_t i = 0; i < 128; ++i) FillPage(memory.page(i), seed(i));
    const auto now = [&](std::size_t i) { return (i >= 128 && i < 256) || i == 400 ? 0 : seed(i); };
    EXPECT_TRUE(PagesAre(memory, now));
    // What is discarded raw and written at once stays where it is until three seconds after it has been found written: the
    // discard may still be under way.
    if (raw && driver() == Driver::kMergeCall) {
      ASSERT_OK(ksmu_merge(AllMemory(), AllBytes()));
      SleepSeconds(4.1);
    }
    if (!sync()) {
      MergeUntil([](const ksmu_stats& s) { return s.pages_merged == 512 - 128 - 1; });
    } else {
      MergeUntil([](const ksmu_stats& s) { return s.pages_merged >= 512 - 256 - 1; });
    }
    EXPECT_EQ(Get("pages_shared"), 16);
    EXPECT_TRUE(PagesAre(memory, now));
    EXPECT_GT(Get("discards"), 0);
  });
}

TEST_P(Counts, ProtNone) {
  RunIsolated([this] {
    Prepare();
    constexpr std::size_t kPages = 256;
    Memory memory(kPages);
    FillPages(memory, [](std::size_t) { return 9; });
    ASSERT_EQ(mprotect(memory.data(), memory.bytes(), PROT_NONE), 0);
    Advise(memory);  // accepted, and merged when it can be
    MergeUntil([](const ksmu_stats& s) { return s.unmerged_protection == kPages; });
    // Readable only: looked at, and left. (The first of a content waits for another like it.)
    ASSERT_EQ(mprotect(memory.data(), memory.bytes(), PROT_READ), 0);
    MergeUntil([](const ksmu_stats& s) {
      return s.pages_merged == 0 && s.unmerged_protection >= static_cast<std::int64_t>(kPages) - 1;
    });
    ASSERT_EQ(mprotect(memory.data(), memory.bytes(), PROT_READ | PROT_WRITE), 0);
    MergeUntilCounts(1, kPages - 1);
    // Merged memory may be given any protection, and loses nothing.
    ASSERT_EQ(mprotect(memory.data(), memory.bytes(), PROT_NONE), 0);
    MergeUntil([](const ksmu_stats& s) { return s.pages_merged + s.unmerged_protection == kPages; });
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
    EXPECT_EQ(Get("pages_tracked"), 0);
    const int mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
    ASSERT_GE(mem, 0);
    char byte = 'x';
    EXPECT_EQ(pwrite(mem, &byte, 1, static_cast<off_t>(reinterpret_cast<std::uintptr_t>(memory.page(100)))), 1)
        << strerror(errno);
    close(mem);
    ASSERT_EQ(mprotect(memory.data(), memory.bytes(), PROT_READ | PROT_WRITE), 0);
    EXPECT_EQ(memory.page(100)[0], 'x');
    FillPage(memory.page(100), 9);
    EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 9; }));
  });
}

// A child's counters start at 0; what it unmerges is its own copy, the parent's stays merged.
TEST_P(Counts, ForkedChildCountsFromZero) {
  RunIsolated([this] {
    Prepare();
    constexpr std::size_t kPages = 256;
    Memory memory(kPages);
    const auto seed = [](std::size_t i) { return 1 + i % 4; };
    FillPages(memory, seed);
    Advise(memory);
    MergeUntilCounts(4, kPages - 4);
    Set("run", 0);
    Child child(Child::Kind::kFork, [&](Child& self) {
      ksmu_stats stats;
      if (ksmu_read_stats(&stats, sizeof stats) != 0) self.Report("ksmu_read_stats: errno %d", errno);
      const auto count = [&](const char* name, std::int64_t value) {
        if (value != 0) self.Report("%s is %lld in the child", name, static_cast<long long>(value));
      };
      count("pages_shared", stats.pages_shared);
      count("pages_sharing", stats.pages_sharing);
      count("pages_merged_total", stats.pages_merged_total);
      count("cow_breaks", stats.cow_breaks);
      count("pages_scanned", stats.pages_scanned);
      count("full_scans", stats.full_scans);
      if (ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE) != 0) {
        self.Report("unmerge: errno %d, %s", errno, ksmu_last_error());
      }
      if (ksmu_read_stats(&stats, sizeof stats) != 0) self.Report("ksmu_read_stats: errno %d", errno);
      count("pages_merged", stats.pages_merged);
      count("unmerged_inherited", stats.unmerged_inherited);
      for (std::size_t i = 0; i < kPages; ++i) {
        if (FindWrongByte(memory.page(i), seed(i)) >= 0) self.Report("page %zu is wrong", i);
      }
      // Its own from now on: a raw discard shows zeros, not the parent's frame.
      madvise(memory.data(), memory.bytes(), MADV_DONTNEED);
      for (std::size_t i = 0; i < kPages; ++i) {
        if (FindWrongByte(memory.page(i), 0) >= 0) self.Report("page %zu is not zero after unmerge and discard", i);
      }
      for (std::size_t i = 0; i < kPages; ++i) FillPage(memory.page(i), 77);
    });
    child.Join();
    EXPECT_TRUE(PagesAre(memory, seed));
    const ksmu_stats stats = ReadStats();
    EXPECT_EQ(stats.pages_shared, 4);
    EXPECT_EQ(stats.pages_sharing, static_cast<std::int64_t>(kPages) - 4);
  });
}

// run=2 unmerges everything, and the regions stay: run=1 merges them again.
TEST_P(Counts, RunTwoAndAgain) {
  RunIsolated([this] {
    Prepare();
    constexpr std::int64_t kPages = 1024;
    Memory memory(kPages);
    const auto seed = [](std::size_t i) { return i % 8 == 0 ? 0 : i % 8; };
    FillPages(memory, seed);
    Advise(memory);
    for (int round = 0; round < 3; ++round) {
      // What was dropped as zeros stays dropped when all is unmerged: it reads as zeros and takes no memory; unless the kernel
      // gives a page of its own to whoever reads it.
      const std::int64_t zeros = round == 0 || !KernelHasZeroPage() ? kPages / 8 : 0;
      MergeUntil(
          [=](const ksmu_stats& s) { return s.pages_merged == kPages - kPages / 8 && s.ksm_zero_pages == zeros; });
      EXPECT_EQ(Get("pages_shared"), 7);
      Set("run", 2);
      const ksmu_stats stats = ReadStats();
      EXPECT_EQ(stats.pages_merged, 0);
      EXPECT_EQ(stats.ksm_zero_pages, 0);
      EXPECT_EQ(stats.regions, 1);
      EXPECT_EQ(Get("run"), 2);
      EXPECT_TRUE(Balanced(stats));
      EXPECT_TRUE(PagesAre(memory, seed));
    }
  });
}

// --- LTP ------------------------------------------------------------------------------------------------------------

// Three "processes" of 16 MiB, four phases, each byte checked in each, then run=2.
TEST_P(Counts, LtpPhases) {
  RunIsolated(
      [this] {
        constexpr std::size_t kBytes = 16 << 20;
        const std::size_t pages = kBytes / PageSize();
        const std::int64_t n = static_cast<std::int64_t>(3 * pages);
        Prepare();
        Set("max_page_sharing", n);
        std::vector<std::unique_ptr<Memory>> memories;
        const auto map_memories = [&] {
          memories.clear();
          for (int i = 0; i < 3; ++i) {
            memories.push_back(std::make_unique<Memory>(pages));
            Advise(*memories.back());
          }
        };
        map_memories();
        struct Phase {
          char content[3];
          bool odd_last_byte;
          Quartet expected;
        };
        const Phase phases[] = {
            {{'c', 'a', 'a'}, false, {2, n - 2, 0, 0}},
            {{'c', 'b', 'a'}, false, {3, n - 3, 0, 0}},
            {{'d', 'd', 'd'}, false, {1, n - 1, 0, 0}},
            {{'d', 'd', 'd'}, true, {1, n - 2, 0, 1}},
        };
        const auto verify = [&](const Phase& phase) {
          for (int i = 0; i < 3; ++i) {
            const char* data = memories[i]->data();
            const bool odd = phase.odd_last_byte && i == 1;
            std::size_t at = 0;
            while (at < kBytes && data[at] == (odd && at == kBytes - 1 ? 'e' : phase.content[i])) ++at;
            EXPECT_EQ(at, kBytes) << "region " << i << ": wrong byte at " << at;
          }
        };
        int number = 0;
        for (const Phase& phase : phases) {
          SCOPED_TRACE("phase " + std::to_string(++number));
          // With synchronous breaks a page that was written is not merged again (documented): memory of its own for
          // each phase. Otherwise the same memory is written over, as LTP's processes do.
          if (sync() && number > 1) map_memories();
          for (int i = 0; i < 3; ++i) memset(memories[i]->data(), phase.content[i], kBytes);
          if (phase.odd_last_byte) memories[1]->data()[kBytes - 1] = 'e';
          MergeUntilQuartet(phase.expected);
          EXPECT_EQ(Get("pages_tracked"), n);
          verify(phase);
          if (::testing::Test::HasFailure()) return;
        }
        Set("run", 2);
        const ksmu_stats stats = ReadStats();
        EXPECT_EQ(stats.pages_shared, 0);
        EXPECT_EQ(stats.pages_sharing, 0);
        EXPECT_EQ(stats.pages_merged, 0);
        EXPECT_TRUE(Balanced(stats));
        verify(phases[3]);
      },
      300);
}

// --- balance, agreement with the kernel ---------------------------------------------------------------------------

// Random operations; after each the counters add up, the regions' add up to the whole, and when everything has been
// looked at, what is tracked is what the kernel holds.
TEST_P(Counts, BalanceAfterEachOperation) {
  RunIsolated(
      [this] {
        Prepare();
        if (driver() == Driver::kScanner) Set("run", 1);
        constexpr std::size_t kPages = 3000;
        Memory a(kPages), b(kPages);
        std::vector<std::uint64_t> shadow(2 * kPages, 0);
        std::vector<bool> advised(2 * kPages, false);
        const auto page = [&](std::size_t i) { return i < kPages ? a.page(i) : b.page(i - kPages); };
        const std::uint64_t seed = std::random_device{}();
        SCOPED_TRACE("seed " + std::to_string(seed));
        std::mt19937_64 random(seed);
        for (int step = 0; step < 400; ++step) {
          std::size_t first = random() % (2 * kPages);
          const std::size_t end = first < kPages ? kPages : 2 * kPages;
          const std::size_t length = std::min<std::size_t>(1 + random() % (random() % 4 == 0 ? 1500 : 40), end - first);
          const int operation = static_cast<int>(random() % 8);
          SCOPED_TRACE("step " + std::to_string(step) + ": operation " + std::to_string(operation) + " at " +
                       std::to_string(first) + " + " + std::to_string(length));
          switch (operation) {
            case 0:
            case 1:
            case 2:
              for (std::size_t i = first; i < first + length; ++i) {
                shadow[i] = random() % 4 == 0 ? 0 : 1 + random() % 50;
                FillPage(page(i), shadow[i]);
              }
              break;
            case 3:
              EXPECT_OK(ksmu_advise(page(first), length * PageSize(), KSMU_MERGEABLE | flags()));
              std::fill_n(advised.begin() + static_cast<std::ptrdiff_t>(first), length, true);
              break;
            case 4:
              if (step % 3 != 0) break;
              EXPECT_OK(ksmu_advise(page(first), length * PageSize(), KSMU_UNMERGEABLE));
              std::fill_n(advised.begin() + static_cast<std::ptrdiff_t>(first), length, false);
              break;
            case 5:
              if (promised() || random() % 2 == 0) {
                EXPECT_OK(ksmu_advise(page(first), length * PageSize(), KSMU_DISCARD));
              } else {
                EXPECT_EQ(madvise(page(first), length * PageSize(), MADV_DONTNEED), 0);
              }
              std::fill_n(shadow.begin() + static_cast<std::ptrdiff_t>(first), length, 0);
              break;
            default:
              EXPECT_OK(ksmu_merge(page(first), length * PageSize()));
              break;
          }
          const ksmu_stats stats = ReadStats();
          ASSERT_TRUE(Balanced(stats));
          if (step % 20 != 19) continue;
          for (std::size_t i = 0; i < 2 * kPages; ++i) ASSERT_TRUE(PageIs(page(i), shadow[i])) << "page " << i;
          // Everything looked at, nothing written meanwhile.
          Set("run", 0);
          EXPECT_OK(ksmu_merge(AllMemory(), AllBytes()));
          const ksmu_stats now = ReadStats();
          std::size_t resident = 0;
          for (std::size_t i = 0; i < 2 * kPages;) {
            std::size_t k = i;
            while (k < 2 * kPages && k != kPages && advised[k] == advised[i]) ++k;
            if (k == i) ++k;
            if (advised[i]) resident += CountResident(page(i), (k - i) * PageSize());
            i = k;
          }
          EXPECT_EQ(now.pages_tracked - now.ksm_zero_pages, static_cast<std::int64_t>(resident)) << Text(now);
          std::int64_t sums[6] = {};
          std::int64_t regions = 0;
          ksmu_region_stats region;
          const void* at = nullptr;
          while (ksmu_read_region(at, &region, sizeof region) == 0) {
            ASSERT_GE(region.start, at);
            at = static_cast<char*>(region.start) + region.length;
            ++regions;
            std::int64_t unmerged = 0;
            for (std::int64_t count : region.unmerged) unmerged += count;
            EXPECT_EQ(unmerged, region.pages_unmerged);
            EXPECT_EQ(region.pages_tracked, region.pages_merged + region.pages_unshared + region.pages_volatile +
                                                region.pages_zero + region.pages_unmerged);
            const std::int64_t parts[6] = {region.pages_tracked,  region.pages_merged, region.pages_unshared,
                                           region.pages_volatile, region.pages_zero,   region.pages_unmerged};
            for (int k = 0; k < 6; ++k) sums[k] += parts[k];
          }
          EXPECT_EQ(errno, ENOENT);
          EXPECT_EQ(regions, now.regions);
          EXPECT_EQ(sums[0], now.pages_tracked);
          EXPECT_EQ(sums[1], now.pages_merged);
          EXPECT_EQ(sums[2], now.pages_unshared);
          EXPECT_EQ(sums[3], now.pages_volatile);
          EXPECT_EQ(sums[4], now.ksm_zero_pages);
          EXPECT_EQ(sums[5], SumUnmerged(now));
          if (driver() == Driver::kScanner) Set("run", 1);
        }
      },
      180);
}

// The same while threads write, discard and merge: each reading is consistent in itself.
TEST_P(Counts, BalanceUnderLoad) {
  RunIsolated([this] {
    Prepare();
    Set("run", 1);
    constexpr std::size_t kPages = 4096;
    Memory memory(kPages);
    FillPages(memory, [](std::size_t i) { return i % 32; });
    Advise(memory);
    std::atomic<bool> stop = false;
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937_64 random(static_cast<std::uint64_t>(t));
        while (!stop) {
          const std::size_t i = random() % kPages;
          if (t == 2) {
            if (promised()) {
              ksmu_advise(memory.page(i), PageSize(), KSMU_DISCARD);
            } else {
              madvise(memory.page(i), PageSize(), MADV_DONTNEED);
            }
            SleepSeconds(0.0002);
          } else {
            FillPage(memory.page(i), random() % 32);
          }
        }
      });
    }
    threads.emplace_back([&] {
      while (!stop) ksmu_merge(memory.data(), memory.bytes());
    });
    // At least four seconds; on a machine that has more to do than this, as long as it takes to see enough.
    int readings = 0;
    std::int64_t merged = 0;
    for (const double begun = Now(); Now() < begun + 4 || ((readings <= 50 || merged <= 1000) && Now() < begun + 50);
         ++readings) {
      const ksmu_stats stats = ReadStats();
      merged = stats.pages_merged_total;
      ASSERT_TRUE(Balanced(stats));
      SleepSeconds(0.001);
    }
    stop = true;
    for (std::thread& thread : threads) thread.join();
    EXPECT_GT(readings, 50);
    EXPECT_GT(merged, 1000);
  });
}

// What the library says it saves is what the kernel no longer counts.
TEST_P(Counts, SavingsAgreeWithPss) {
  RunIsolated(
      [this] {
        Prepare();
        const std::size_t pages = (64 << 20) / PageSize();
        Memory memory(pages);
        FillPages(memory, [&](std::size_t i) -> std::uint64_t {
          if (i < pages / 4) return 0;                           // zeros
          if (i < pages / 2) return 1 + i % 64;                  // runs of 64 equal pages
          if (i < pages * 5 / 8) return 1000 + (i * 7919) % 97;  // scattered duplicates
          return 100'000 + i;                                    // unique
        });
        Advise(memory);
        const std::int64_t page = static_cast<std::int64_t>(PageSize());
        // What the process takes, without what the library says it takes itself.
        const auto program_pss = [] { return ReadPss() - Get("metadata_bytes"); };
        if (ReadPss() < 0) GTEST_SKIP() << "no /proc/self/smaps_rollup";
        const std::int64_t before = program_pss();
        const std::int64_t duplicates = static_cast<std::int64_t>(pages / 4 + pages / 8);
        MergeUntil([&](const ksmu_stats& s) {
          return s.ksm_zero_pages == static_cast<std::int64_t>(pages / 4) && s.pages_merged == duplicates;
        });
        const std::int64_t after = program_pss();
        const ksmu_stats stats = ReadStats();
        const std::int64_t saved = (stats.pages_sharing + stats.ksm_zero_pages) * page;
        EXPECT_NEAR(static_cast<double>(before - after), static_cast<double>(saved), 0.02 * static_cast<double>(saved))
            << Text(stats);
        EXPECT_EQ(stats.pages_tracked - stats.ksm_zero_pages,
                  static_cast<std::int64_t>(CountResident(memory.data(), memory.bytes())));
        // And back: all but the zero pages, which stay as untouched memory.
        Set("run", 2);
        EXPECT_NEAR(static_cast<double>(program_pss()), static_cast<double>(before - stats.ksm_zero_pages * page),
                    0.02 * static_cast<double>(before));
      },
      120);
}

}  // namespace
}  // namespace ksmu::test
