// The counters. Gauges of page states are kept by the transitions themselves; any thread may read.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
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
  T gate_count{0}, gate_max_ns{0}, gate_p99_ns{0};
  T gates_undone{0};     // merges that gave at least one page back
  T chains{0}, dups{0};  // contents with several frames, and those frames
  T children{0};

  std::int64_t in(PageState s) const { return pages[static_cast<std::size_t>(s)]; }
};

// What a reader gets: values, at one moment of each.
using CounterValues = CountersOf<std::int64_t>;

struct Counters : CountersOf<Counter> {
  // How long gates were shut: four buckets an octave of nanoseconds.
  std::array<Counter, 4 * 40> gate_times{};
  static std::size_t BucketOf(std::uint64_t ns) {
    if (ns < 4) return 0;
    const int octave = std::bit_width(ns) - 1;
    return std::min<std::size_t>(static_cast<std::size_t>(octave) * 4 + (ns >> (octave - 2) & 3), 4 * 40 - 1);
  }
  void CountGate(std::uint64_t ns) {
    Add(gate_times[BucketOf(ns)], 1);
    if (static_cast<std::int64_t>(ns) > gate_max_ns.load(std::memory_order_relaxed)) {
      gate_max_ns.store(static_cast<std::int64_t>(ns), std::memory_order_relaxed);
    }
  }
  // The upper end of the bucket in which the 99th percentile lies: at most a quarter too much. 0: no gate yet.
  std::int64_t GateP99() const {
    std::int64_t all = 0, above = 0;
    for (const Counter& c : gate_times) all += c.load(std::memory_order_relaxed);
    for (std::size_t i = gate_times.size(); i-- > 0;) {
      above += gate_times[i].load(std::memory_order_relaxed);
      if (above * 100 > all) return static_cast<std::int64_t>((5 + i % 4) << (i / 4) >> 2);
    }
    return 0;
  }
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
    v.gate_max_ns = gate_max_ns, v.gate_p99_ns = std::min(GateP99(), v.gate_max_ns), v.gates_undone = gates_undone, v.chains = chains, v.dups = dups, v.children = children;
    return v;
  }
};

}  // namespace ksmu::engine
