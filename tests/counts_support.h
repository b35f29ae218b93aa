// Reading the counters as a whole, and what must hold between them at every moment.
#pragma once

#include <string.h>

#include <array>
#include <string>

#include "test_support.h"

namespace ksmu::test {

inline ksmu_stats ReadStats() {
  ksmu_stats stats;
  memset(&stats, 0xa5, sizeof stats);
  EXPECT_OK(ksmu_read_stats(&stats, sizeof stats));
  return stats;
}

inline std::int64_t SumUnmerged(const ksmu_stats& s) {
  std::int64_t sum = 0;
#define KSMU_ADD(name, counter) sum += s.unmerged_##counter;
  KSMU_FOR_EACH_REASON(KSMU_ADD)
#undef KSMU_ADD
  return sum;
}

inline std::string Text(const ksmu_stats& s) {
  std::string text;
#define KSMU_PRINT(name) \
  if (s.name != 0) text += " " #name "=" + std::to_string(s.name);
  KSMU_FOR_EACH_COUNTER(KSMU_PRINT)
#undef KSMU_PRINT
  return text;
}

// The balance of design: nothing is hidden, nothing counted twice.
inline ::testing::AssertionResult Balanced(const ksmu_stats& s) {
  const std::int64_t parts = s.pages_merged + s.ksm_zero_pages + s.pages_unshared + s.pages_volatile + SumUnmerged(s);
  if (s.pages_tracked != parts) {
    return ::testing::AssertionFailure() << "tracked " << s.pages_tracked << ", the parts add up to " << parts << ":"
                                         << Text(s);
  }
  if (s.pages_merged != s.pages_shared + s.pages_sharing) {
    return ::testing::AssertionFailure() << "merged is not shared + sharing:" << Text(s);
  }
  const std::int64_t profit = (s.pages_sharing + s.ksm_zero_pages) * static_cast<std::int64_t>(PageSize()) -
                              s.metadata_bytes - 270 * s.maps_used;
  if (s.general_profit != profit) {
    return ::testing::AssertionFailure() << "general_profit should be " << profit << ":" << Text(s);
  }
#define KSMU_NOT_NEGATIVE(name)                   \
  if (s.name < 0 && &s.name != &s.general_profit) \
    return ::testing::AssertionFailure() << #name " is negative:" << Text(s);
  KSMU_FOR_EACH_COUNTER(KSMU_NOT_NEGATIVE)
#undef KSMU_NOT_NEGATIVE
  return ::testing::AssertionSuccess();
}

// What /sys/kernel/mm/ksm calls the state, in LTP's order.
using Quartet = std::array<std::int64_t, 4>;  // shared, sharing, volatile, unshared
inline Quartet QuartetOf(const ksmu_stats& s) { return {s.pages_shared, s.pages_sharing, s.pages_volatile, s.pages_unshared}; }

}  // namespace ksmu::test
