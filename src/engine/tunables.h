// The tunables that there are: name, the least and the greatest that each may be, and what it is where nobody has said anything.
// Their numbers, which travel between broker and members, are their places in this list: append only. What they mean: ksmu.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace ksmu::engine {

#define KSMU_FOR_EACH_TUNABLE(X) \
  X(run, 0, 2, 1) \
  X(pages_to_scan, 0, std::int64_t{1} << 40, 0) \
  X(sleep_millisecs, 0, std::int64_t{1} << 40, 20) \
  X(cpu_limit_percent, 0, 100, 10) \
  X(use_zero_pages, 0, 1, 1) \
  X(max_page_sharing, 2, std::int64_t{1} << 40, 256) \
  X(smart_scan, 0, 1, 1) \
  X(remerge, 0, 1, 1) \
  X(remerge_seconds, 0, 4000, 60) \
  X(remerge_quick_seconds, 0, 4000, 10) \
  X(max_maps, 0, std::int64_t{1} << 40, 0) \
  X(advisor_mode, 0, 1, 0) \
  X(advisor_max_cpu, 1, 100, 70) \
  X(advisor_min_pages_to_scan, 1, std::int64_t{1} << 40, 500) \
  X(advisor_max_pages_to_scan, 1, std::int64_t{1} << 40, 30000) \
  X(advisor_target_scan_time, 1, std::int64_t{1} << 40, 200) \
  X(merge_across_nodes, 0, 1, 1) \
  X(thp_min_duplicates, 0, 512, 64)

struct TunableRule {
  std::string_view name;
  std::int64_t least, most, preset;
};
inline constexpr TunableRule kTunableRules[] = {
#define KSMU_TUNABLE_RULE(name, least, most, preset) {#name, least, most, preset},
    KSMU_FOR_EACH_TUNABLE(KSMU_TUNABLE_RULE)
#undef KSMU_TUNABLE_RULE
};
inline constexpr std::size_t kTunableCount = sizeof kTunableRules / sizeof *kTunableRules;

enum TunableNumber : std::uint32_t {
#define KSMU_TUNABLE_NUMBER(name, least, most, preset) kTunable_##name,
  KSMU_FOR_EACH_TUNABLE(KSMU_TUNABLE_NUMBER)
#undef KSMU_TUNABLE_NUMBER
};

// kTunableCount: none of this name.
constexpr std::size_t FindTunableNumber(std::string_view name) {
  std::size_t i = 0;
  while (i < kTunableCount && kTunableRules[i].name != name) ++i;
  return i;
}

}  // namespace ksmu::engine
