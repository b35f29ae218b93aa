// The counters. Gauges of page states are kept by the transitions themselves; any thread may read.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "engine/page.h"

namespace ksmu::engine {

using Counter = std::atomic<std::int64_t>;

inline void Add(Counter& counter, std::int64_t n) { counter.fetch_add(n, std::memory_order_relaxed); }

template <typename T>
struct CountersOf {
  std::array<T, static_cast<std::size_t>(PageState::kCount)> pages{};   // by state
  std::array<T, static_cast<std::size_t>(Reason::kCount)> unmerged{};   // kUnmerged by reason
  T pages_scanned{0}, pages_skipped{0}, full_scans{0}, pages_swept{0};
  T merged_total{0}, zero_total{0}, cow_breaks{0}, remerged{0}, detached{0}, discards{0};
  T gate_count{0}, gate_max_ns{0};
  T gates_undone{0};     // merges that gave at least one page back
  T chains{0}, dups{0};  // contents with several frames, and those frames
  T children{0};

  std::int64_t in(PageState s) const { return pages[static_cast<std::size_t>(s)]; }
};

// What a reader gets: values, at one moment of each.
using CounterValues = CountersOf<std::int64_t>;

struct Counters : CountersOf<Counter> {
  void Move(Page from, Page to) {
    if (from.state() != to.state()) {
      Add(pages[static_cast<std::size_t>(from.state())], -1);
      Add(pages[static_cast<std::size_t>(to.state())], 1);
    }
    if (from.state() == PageState::kUnmerged) Add(unmerged[static_cast<std::size_t>(from.reason())], -1);
    if (to.state() == PageState::kUnmerged) Add(unmerged[static_cast<std::size_t>(to.reason())], 1);
  }
  CounterValues Read() const {
    CounterValues v;
    for (std::size_t i = 0; i < pages.size(); ++i) v.pages[i] = pages[i];
    for (std::size_t i = 0; i < unmerged.size(); ++i) v.unmerged[i] = unmerged[i];
    v.pages_scanned = pages_scanned, v.pages_skipped = pages_skipped, v.full_scans = full_scans;
    v.pages_swept = pages_swept, v.merged_total = merged_total, v.zero_total = zero_total, v.cow_breaks = cow_breaks;
    v.remerged = remerged, v.detached = detached, v.discards = discards, v.gate_count = gate_count;
    v.gate_max_ns = gate_max_ns, v.gates_undone = gates_undone, v.chains = chains, v.dups = dups, v.children = children;
    return v;
  }
};

}  // namespace ksmu::engine
