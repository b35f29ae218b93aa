// Broken and discarded pages that lie in a run's mapping: what is done for them, and merging them again in place.
// How their pages are taken out of their place is in hold.cc, how they come back to anonymous memory in detach.cc.

#include <algorithm>
#include <array>
#include <cerrno>

#include "base/test_point.h"
#include "content/content.h"
#include "engine/engine.h"
#include "engine/probes.h"

namespace ksmu::engine {

using frames::Frame;

namespace {
// A discard is announced before the kernel carries it out. A page whose mark is younger may still be waiting for its zap,
// which would find nothing if the page had been taken out of its place: the discard would be lost.
constexpr std::uint32_t kZapSeconds = 3;
constexpr int kCopyTries = 1000;
constexpr std::uint64_t kPinsLive = 1'000'000'000;  // ns
constexpr std::uint32_t kLookedAt = 15;  // Page::tries of a broken page that could not be helped: not tried again every pass
}  // namespace

// Discarded pages go back to anonymous memory, where what the program puts there next can be merged like any other page.
void Engine::TendDropped(const Region& region, Span span) {
  for (Segment* segment = table_.NextSegment(span.start); segment && segment->start < span.end();
       segment = table_.NextSegment(segment->start + kSegmentBytes)) {
    const Address high = std::min(span.end(), segment->start + kSegmentBytes);
    for (Address at = std::max(span.start, segment->start); at < high;) {
      const Page first = table_.Load(at);
      Address end = at + page_;
      if (first.state() == PageState::kDropped && !first.busy()) {
        // Being used again already, and perhaps pinned: a broken page like any other.
        if (IsPrivate(at)) {
          Words* word = table_.Find(at);
          Page page = first;
          Change(word, page, first.WithState(PageState::kBroken).WithStamp(NowSeconds()).WithTries(0));
          at = end;
          continue;
        }
        if (!IsZapped(at)) {
          at = end;
          continue;
        }
        while (end < high && (end - at) / page_ < kMaxRunPages) {
          const Page next = table_.Load(end);
          if (next.state() != PageState::kDropped || next.busy() || !IsZapped(end) || next.value() != first.value() + (end - at) / page_) break;
          end += page_;
        }
        os::Mapping mapping;
        if (system_.QueryMapping(at, &mapping) == 0 && mapping.readable && mapping.writable) {
          CountMappings(false);
          if (!LeavesMappings(kTendingLeaves)) return;
          Detach(region, {at, end - at}, PageState::kDropped);
        }
      }
      at = end;
    }
  }
}

std::uint32_t Engine::QuickSeconds() const {
  const auto seconds = tunables_.remerge_seconds.load(std::memory_order_relaxed);
  return static_cast<std::uint32_t>(std::min(seconds, tunables_.remerge_quick_seconds.load(std::memory_order_relaxed)));
}

os::Pins Engine::LookForPins() {
  const std::uint64_t begun = system_.NowNanoseconds();
  pins_ = system_.PossiblePins();
  pins_known_ = true;
  const std::uint64_t now = system_.NowNanoseconds();
  pins_until_ = now + std::max(kPinsLive, 50 * (now - begun));
  if (pins_ != os::Pins::kBrief) requests_seen_ = true, requests_at_ = NowSeconds();
  return pins_;
}

// By the last look. What was asked of a device may outlive the descriptor that it was asked through.
std::uint32_t Engine::SecondsToRemerge() const {
  const auto seconds = static_cast<std::uint32_t>(tunables_.remerge_seconds.load(std::memory_order_relaxed));
  if (pins_ != os::Pins::kBrief || (requests_seen_ && NowSeconds() - requests_at_ < seconds)) return seconds;
  return QuickSeconds();
}

// A page with contents of its own has been left alone for long enough to be taken out of its place.
bool Engine::OldEnough(Page page, std::uint32_t now, std::uint32_t seconds) const {
  const std::uint32_t age = (now - page.stamp()) & Page::kStampMask;
  return age >= (page.discarded() ? std::max(seconds, kZapSeconds) : seconds);
}

// Looks at what lies broken or dropped in [from, to), and does what can be done for it.
void Engine::TendBroken(const Region& region, Address from, Address to) {
  std::uint32_t seconds = QuickSeconds();
  const std::uint32_t now = NowSeconds();
  TendDropped(region, {from, to - from});
  for (Address at = from; at < to;) {
    const Page first = table_.Load(at);
    auto ripe = [&](Page page) {
      // Under a synchronous breaker no sweep tells whether a broken page is still.
      return !region.sync_break && page.state() == PageState::kBroken && !page.busy() && !page.unconfirmed() && (page.tries() >= 1 || (now_ && seconds == 0)) &&
             (page.tries() != kLookedAt || audits_) && OldEnough(page, now, seconds);
    };
    if (!ripe(first)) {
      at += page_;
      continue;
    }
    Address end = at + page_;
    while (end < to && (end - at) / page_ < kMaxRunPages) {
      const Page next = table_.Load(end);
      if (next.value() != first.value() + (end - at) / page_) break;
      if (!ripe(next)) break;
      end += page_;
    }
    // Neighbours that map consecutive frames need not be one mapping.
    os::Mapping mapping;
    if (system_.QueryMapping(at, &mapping) == 0 && mapping.start <= at) end = std::min(end, mapping.end);
    const Span run{at, end - at};
    // A long-term pin may be older than the break, and a page pinned for DMA must stay where it is. Pins taken after
    // the last sweep had to write to the page first, and then it is not ripe: so one look a pass is enough. But for those that a device
    // only reads by (a memory region of RDMA's that others may read): they leave no trace, and a pass can take a minute.
    if (!pins_known_ || system_.NowNanoseconds() >= pins_until_) LookForPins();
    if (pins_ == os::Pins::kForLong) return;
    if (const std::uint32_t needed = SecondsToRemerge(); needed > seconds) {
      seconds = needed;
      continue;
    }
    CountMappings(false);
    if (!LeavesMappings(kTendingLeaves)) return;
    TendRun(region, run);
    at = end;
  }
}

// A run of ripe broken pages: equal to the frames beneath -> again in place; else back to anonymous memory, where it is a
// page like any other, and what it cost in mappings is given back.
void Engine::TendRun(const Region& region, Span run) {
  const std::size_t n = run.bytes / page_;
  const std::size_t read = system_.ReadProgram(run.start, buffer_, run.bytes) / page_;
  FindNodes(run);
  enum Verdict : std::uint8_t { kLeave, kInPlace, kElsewhere };
  std::array<Verdict, kMaxRunPages> verdict{};
  for (std::size_t i = 0; i < read; ++i) {
    const Address a = run.start + i * page_;
    const std::byte* bytes = buffer_ + i * page_;
    const Page page = table_.Load(a);
    if (!page.covers()) continue;
    Add(counters_.pages_scanned, 1);
    if (pool_.Live(page.value()) && LiesOn(page.value(), nodes_[i]) && content::Equal(bytes, pool_.Bytes(page.value()), page_)) {
      verdict[i] = kInPlace;
    } else {
      verdict[i] = kElsewhere;
    }
  }
  for (std::size_t i = 0; i < n;) {
    std::size_t end = i + 1;
    while (end < n && verdict[end] == verdict[i]) ++end;
    const Span part{run.start + i * page_, (end - i) * page_};
    if (verdict[i] == kInPlace) {
      Remerge(part);
    } else if (verdict[i] == kElsewhere) {
      if (Detach(region, part, PageState::kBroken) != 0) verdict[i] = kLeave;
    }
    if (verdict[i] == kLeave) {
      for (Address a = part.start; a < part.end(); a += page_) {
        Words* word = table_.Find(a);
        Page page(word->load(std::memory_order_acquire));
        if (page.state() == PageState::kBroken) Change(word, page, page.WithTries(kLookedAt));
      }
    }
    i = end;
  }
}

// Maps the frames beneath again, where the pages are equal to them and nobody can be writing.
std::size_t Engine::Remerge(Span run) {
  if (!TakeFromRun(run, PageState::kBroken)) return 0;
  const Address taken_to = hold_.taken_to;
  const std::size_t n = run.bytes / page_;
  const std::size_t read = system_.ReadProgram(taken_to, buffer_, run.bytes) / page_;
  std::size_t merged = 0;
  std::array<bool, kMaxRunPages> equal{};
  for (std::size_t i = 0; i < read; ++i) {
    const Frame frame = table_.Load(run.start + i * page_).value();
    // Written since it was found ripe: somebody may have pinned it, and this very page has to go back.
    if (held_written_[i]) {
      MoveBackHeld(i);
      continue;
    }
    // Only what the program has written: an empty place would be read as the frame that the fault maps there.
    equal[i] = IsPrivate(taken_to + i * page_, true) && pool_.Live(frame) && content::Equal(buffer_ + i * page_, pool_.Bytes(frame), page_);
  }
  KSMU_TEST_POINT("remerge.proved", run.start, run.bytes);
  for (std::size_t i = 0; i < n; ++i) {
    const Address a = run.start + i * page_;
    bool mapped = false;
    for (int attempt = 0; equal[i] && attempt < kCopyTries && system_.NowNanoseconds() < hold_until_; ++attempt) {
      {
        std::lock_guard lock(events_mutex_);
        Words* word = table_.Find(a);
        Page page(word->load(std::memory_order_acquire));
        if (page.discarded()) break;
        const os::Partial filled = system_.Continue(os::kBreaker, {a, page_}, true);
        if (filled.done == page_) {
          pool_.Share(page.value());
          while (!Change(word, page, Page().WithState(PageState::kMerged).WithValue(page.value()))) {
          }
          Add(counters_.remerged, 1);
          Add(counters_.merged_total, 1);
          KSMU_PROBE2(remerge, a, page.value());
          mapped = true;
          ++merged;
          break;
        }
        if (filled.error != -EAGAIN) break;
      }
      system_.Yield();
    }
    if (held_moved_[i] || (i < read && held_written_[i])) continue;  // back already
    if (!mapped && !IsPrivate(taken_to + i * page_, true)) continue;  // discarded before it was taken: nothing to return
    if (!mapped) {
      ReturnHeld(i);
      Words* word = table_.Find(a);
      Page page(word->load(std::memory_order_acquire));
      while (!Change(word, page, page.WithStamp(NowSeconds()).WithTries(0))) {
      }
    }
  }
  KSMU_TEST_POINT("remerge.continued", run.start, run.bytes);
  EndHold();
  KSMU_TEST_POINT("remerge.opened", run.start, run.bytes);
  if (merged) fruitful_ = true;
  return merged;
}

}  // namespace ksmu::engine
