// The metrics of Prometheus: names, types, units, help (docs/metrics.md has the same), and the two forms of text.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "broker/control.h"

namespace ksmu::tools {

enum class MetricsForm {
  kOpenMetrics,  // 1.0.0
  kPrometheus,   // text 0.0.4, which is also what node_exporter's textfile collector reads
};

// Of one moment, or as near to one as asking comes.
struct MetricsSnapshot {
  bool up = false;  // a broker has answered; else nothing of it is told
  std::uint64_t page_bytes = 0, most_frames = 0;
  std::vector<broker::control::DomainEntry> domains;
  std::vector<std::vector<broker::control::MemberEntry>> members;  // of each domain, or of none
};

std::string MetricsText(const MetricsSnapshot& snapshot, MetricsForm form);

}  // namespace ksmu::tools
