// What a domain saves, as every command reckons it. Each frame is there once, whoever maps it. Reports of members are up to two
// seconds old, frames are of now.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tools/operator.h"

namespace ksmu::tools {

inline constexpr std::int64_t kBytesPerMapping = 270;  // of kernel memory, as in general_profit

struct Balance {
  std::int64_t saved = 0, net = 0;  // bytes; net: less what merging takes
};
// Members say what they like: so much that nothing overflows, and more than any machine has.
inline std::int64_t BoundedPages(std::int64_t n) { return std::clamp<std::int64_t>(n, -(std::int64_t{1} << 44), std::int64_t{1} << 44); }
// What merging takes in the members: of one, or of all of a domain.
template <typename Entry>
std::int64_t CostOf(const Entry& entry) {
  return CounterOf(entry, "metadata_bytes") + kBytesPerMapping * BoundedPages(CounterOf(entry, "maps_used"));
}
inline Balance BalanceOf(const broker::control::DomainEntry& domain, std::uint64_t page) {
  const auto bytes = static_cast<std::int64_t>(page);
  Balance balance;
  balance.saved = BoundedPages(CounterOf(domain, "pages_merged") - static_cast<std::int64_t>(domain.frames) + CounterOf(domain, "ksm_zero_pages")) * bytes;
  balance.net = balance.saved - CostOf(domain) - static_cast<std::int64_t>(domain.metadata_bytes);
  return balance;
}

}  // namespace ksmu::tools
