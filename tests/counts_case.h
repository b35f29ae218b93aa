// A case of the count tests: how merging is brought about, and until when.
#pragma once

#include <functional>
#include <string>
#include <tuple>

#include "counts_support.h"
#include "test_support.h"

namespace ksmu::test {

enum class Driver { kMergeCall, kScanner };

inline void* AllMemory() { return nullptr; }
inline std::size_t AllBytes() { return SIZE_MAX / PageSize() * PageSize(); }

class Counts : public ::testing::TestWithParam<std::tuple<Driver, int>> {
 protected:
  Driver driver() const { return std::get<0>(GetParam()); }
  int flags() const { return std::get<1>(GetParam()); }
  bool sync() const { return (flags() & KSMU_F_SYNC_BREAK) != 0; }
  bool promised() const { return (flags() & KSMU_F_NO_RAW_DISCARDS) != 0; }

  // The scanner as fast as it goes; broken pages merge again at once (nothing here does direct I/O).
  void Prepare() const {
    Set("run", 0);
    Set("cpu_limit_percent", 100);
    Set("sleep_millisecs", 0);
    Set("remerge_seconds", 0);
    Set("thp_min_duplicates", 0);  // also where the system makes everything huge
  }
  void Advise(const Memory& memory) const {
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags()));
  }

  // Lets everything merge that can, and waits until `settled` holds. With the scanner it also has to stay so for some
  // more passes: what merges and parts again in turn is not settled.
  void MergeUntil(const std::function<bool(const ksmu_stats&)>& settled) const {
    if (driver() == Driver::kMergeCall) {
      ASSERT_OK(ksmu_merge(AllMemory(), AllBytes()));
    } else {
      Set("run", 1);
      WaitUntil([&] { return settled(ReadStats()); }, 60);
      const std::int64_t scans = Get("full_scans");
      // Passes that come fast leave out, up to seven times in a row, what has been quiet for long: breaks are booked late.
      WaitUntil([&] { return Get("full_scans") >= scans + 12; }, 60);
    }
    const ksmu_stats stats = ReadStats();
    EXPECT_TRUE(settled(stats)) << Text(stats);
    EXPECT_TRUE(Balanced(stats));
  }
  void MergeUntilCounts(std::int64_t shared, std::int64_t sharing) const {
    SCOPED_TRACE("expected: shared " + std::to_string(shared) + ", sharing " + std::to_string(sharing));
    MergeUntil([=](const ksmu_stats& s) { return s.pages_shared == shared && s.pages_sharing == sharing; });
  }
  void MergeUntilQuartet(const Quartet& expected) const {
    MergeUntil([&](const ksmu_stats& s) { return QuartetOf(s) == expected; });
    EXPECT_EQ(QuartetOf(ReadStats()), expected);
  }
  // A broken page is booked at the next sweep: at once with synchronous breaks.
  void ExpectSoon(const std::function<bool(const ksmu_stats&)>& settled) const {
    if (sync()) {
      const ksmu_stats stats = ReadStats();
      EXPECT_TRUE(settled(stats)) << "at once, for breaks are synchronous:" << Text(stats);
    }
    MergeUntil(settled);
  }
};

}  // namespace ksmu::test
