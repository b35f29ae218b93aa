// Where regions may be: what somebody who interposes on mmap, munmap and their kind asks before every call. A bit for each
// 2 MiB of addresses. "No" is certain; "yes" can be wrong, and costs the asker a command to the scanner.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "base/own_memory.h"
#include "engine/page_table.h"

namespace ksmu::engine {

// Written by the scanner, before the caller of an advice has its answer, and by who moves what lies in frames; read by any thread,
// without a lock. Forked
// children have it too: their inherited regions are in it.
class Presence {
 public:
  constexpr Presence() = default;
  Presence(const Presence&) = delete;

  // False: no memory; MayHold says yes to everything from now on.
  bool Note(Span span) {
    if (!bits_.load(std::memory_order_relaxed)) {
      auto* mapped = static_cast<std::atomic<std::uint64_t>*>(base::MapInheritedPages(kWords * sizeof(std::uint64_t)));
      if (!mapped) {
        lost_.store(true, std::memory_order_release);
        return false;
      }
      bits_.store(mapped, std::memory_order_release);
    }
    ForEachWord(span, [](std::atomic<std::uint64_t>& word, std::uint64_t mask) {
      word.fetch_or(mask, std::memory_order_release);
      return false;
    });
    return true;
  }
  // Whole units only: what else lies in the others is not known here.
  void Forget(Span span) {
    const Address start = (span.start + kUnit - 1) & ~(kUnit - 1), end = span.end() & ~(kUnit - 1);
    if (start >= end) return;
    ForEachWord({start, end - start}, [](std::atomic<std::uint64_t>& word, std::uint64_t mask) {
      word.fetch_and(~mask, std::memory_order_release);
      return false;
    });
  }
  bool MayHold(Span span) const {
    if (lost_.load(std::memory_order_acquire)) return true;
    return ForEachWord(span, [](const std::atomic<std::uint64_t>& word, std::uint64_t mask) {
      return (word.load(std::memory_order_acquire) & mask) != 0;
    });
  }

 private:
  static constexpr Address kUnit = std::size_t{2} << 20;
  static constexpr std::size_t kWords = PageTable::kLimit / kUnit / 64;

  // Until `f` says true. Addresses beyond the table's are never in a region.
  template <typename F>
  bool ForEachWord(Span span, F&& f) const {
    std::atomic<std::uint64_t>* const bits = bits_.load(std::memory_order_acquire);
    if (!bits || span.bytes == 0 || span.start >= PageTable::kLimit) return false;
    const Address last = (span.bytes < PageTable::kLimit - span.start ? span.end() : PageTable::kLimit) - 1;
    for (std::size_t unit = span.start / kUnit, end = last / kUnit + 1; unit < end;) {
      const std::size_t low = unit % 64, n = end - unit < 64 - low ? end - unit : 64 - low;
      const std::uint64_t mask = (n == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1) << low;
      if (f(bits[unit / 64], mask)) return true;
      unit += n;
    }
    return false;
  }

  std::atomic<std::atomic<std::uint64_t>*> bits_{nullptr};
  std::atomic<bool> lost_{false};
};

}  // namespace ksmu::engine
