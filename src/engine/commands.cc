// What the program asks for. Carried out by the scanner between two steps: no merge is in hand.

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "base/test_point.h"
#include "engine/engine.h"

namespace ksmu::engine {
namespace {
constexpr std::uint64_t kMemoryReserve = std::uint64_t{64} << 20;  // left free while unmerging
constexpr std::size_t kPopulatePages = 64;
constexpr std::size_t kManyExcluded = 1024;
constexpr std::uint64_t kForeignRetryNs = 1'000'000'000;

// Calls f(part, mapping) for each mapped part of the span; returns true if there were holes.
template <typename F>
bool ForEachMapping(os::System& system, Span span, F&& f) {
  bool holes = false;
  for (Address at = span.start; at < span.end();) {
    os::Mapping mapping;
    if (system.QueryMapping(at, &mapping) != 0 || mapping.start >= span.end()) return true;
    holes |= mapping.start > at;
    const Address start = std::max(at, mapping.start), end = std::min(span.end(), mapping.end);
    f(Span{start, end - start}, mapping);
    at = end;
  }
  return holes;
}
}  // namespace

// The part of the next region in the span, from *at on; *at goes on behind it. The list may change in between.
bool Engine::NextIn(Span span, Address* at, Region* part) const {
  const Region* found = *at < span.end() ? regions_.Next(*at) : nullptr;
  if (!found || found->start >= span.end()) return false;
  *part = *found;
  part->start = std::max(found->start, *at);
  *at = part->end = std::min(found->end, span.end());
  return true;
}

bool Engine::ChangesBreaker(Span span, bool sync_break) const {
  Region part;
  for (Address at = span.start; NextIn(span, &at, &part);) {
    if (part.kind == Region::kMergeable && part.sync_break != sync_break) return true;
  }
  return false;
}

int Engine::Advise(Span span, bool promise, bool sync_break, bool owned) {
  ApplyMoves();
  // Old knowledge about addresses that have been released, or unmapped without a word, must not be taken for the new.
  Region old;
  for (Address at = span.start; NextIn(span, &at, &old);) {
    Audit(old);
    // A run stays with the breaker under which it was attached: to change breakers it is unmerged first.
    if (old.kind == Region::kMergeable && old.sync_break != sync_break) {
      if (int error = UnmergeRange(old, old.span())) return error;
    }
  }
  // Memory may have been locked a moment ago; but where reading costs much, not for every single call.
  AttributesUnread(span);
  bool any = false, ineligible = false, foreign = false;
  int failure = 0;
  base::OwnVector<Region> left_out;
  auto leave_out = [&](Address start, Address end, int cause) {
    Region part;
    part.start = start;
    part.end = end;
    part.promise = promise;
    part.sync_break = sync_break;
    part.cause = static_cast<std::uint8_t>(cause);
    if (start < end && !left_out.push_back(part)) failure = -ENOMEM;
  };
  Address looked_at = span.start;
  const bool holes = ForEachMapping(system_, span, [&](Span part, const os::Mapping& mapping) {
    leave_out(looked_at, part.start, ENOMEM);
    looked_at = part.end();
    if (failure) return;
    const bool ours = pool_.IsPoolMapping(mapping);
    bool eligible = ours || IsInherited(mapping) || (mapping.anonymous && !mapping.shared && !mapping.stack && !mapping.heap && !mapping.special);
    if (part.end() > PageTable::kLimit) eligible = false;
    if (eligible && mapping.anonymous && !AttributesUnreadAt(part.start)) {  // else it is seen when they are read
      Address until = 0;
      const os::Attributes a = FindAttributes(part.start, &until);
      eligible = !(a.locked || a.hugetlb || a.pfn_map || a.grows_down || a.sealed);
    }
    if (!eligible) {
      ineligible = true;
      leave_out(part.start, part.end(), EOPNOTSUPP);
      return;
    }
    if (mapping.anonymous) {
      if (int error = system_.Register(os::kTracker, part, os::kWriteProtect)) {
        if (error == -EBUSY) {
          foreign = true;
          if (presence_) presence_->Note(part);  // it is asked about again: its unmapping must not go unseen
        } else if (error == -EINVAL) ineligible = true;
        else failure = error;
        leave_out(part.start, part.end(), error == -EBUSY ? EBUSY : EOPNOTSUPP);
        return;
      }
    }
    Region region;
    region.start = part.start;
    region.end = part.end();
    region.promise = promise;
    region.sync_break = sync_break;
    const Region* before = regions_.Find(part.start);
    region.owned = owned || (before && before->owned && before->end >= part.end());
    if (presence_) presence_->Note(part);
    if (!regions_.Set(region)) {
      failure = -ENOMEM;
      return;
    }
    any = true;
    // Pages that were released and not unmapped after all are merged pages again.
    for (Segment* segment = table_.NextSegment(part.start); segment && segment->start < part.end();
         segment = table_.NextSegment(segment->start + kSegmentBytes)) {
      LookAgainAt(segment);
      const Address low = std::max(part.start, segment->start), high = std::min(part.end(), segment->start + kSegmentBytes);
      for (Address a = low; a < high; a += page_) {
        Words* word = table_.Word(segment, (a - segment->start) / page_);
        if (!word) continue;
        Page page(word->load(std::memory_order_acquire));
        // The audit puts off what moves that have not been followed may explain: of that nothing is known here.
        if (page.covers() && !page.busy() && !pool_.Shows(mapping, a, page.value())) {
          ForgetPage(a, word);
          continue;
        }
        if (page.state() != PageState::kResidue || !page.unconfirmed()) continue;
        if (page.discarded()) {  // shows its frame no more
          if (Change(word, page, page.WithState(PageState::kDropped).WithUnconfirmed(false))) pool_.Unpin(page.value());
          continue;
        }
        if (IsPrivate(a)) {
          const Page broken = page.WithState(PageState::kBroken).WithUnconfirmed(false).WithStamp(NowSeconds()).WithTries(0);
          if (Change(word, page, broken)) pool_.Unpin(page.value());
          continue;
        }
        pool_.Share(page.value());
        if (Change(word, page, page.WithState(PageState::kMerged).WithUnconfirmed(false))) {
          pool_.Unpin(page.value());
        } else {
          pool_.Unshare(page.value());
        }
      }
    }
  });
  leave_out(looked_at, span.end(), ENOMEM);
  if (failure) return failure == -ENOMEM || failure == -EAGAIN ? -ENOMEM : failure;
  // What somebody else's userfaultfd holds is asked about again: see RetryForeign.
  if ((any || foreign) && !Exclude(span, left_out)) return -ENOMEM;
  if (foreign) foreign_at_ = system_.NowNanoseconds() + kForeignRetryNs;
  if (any) return holes ? -ENOMEM : 0;
  if (foreign) return -EBUSY;
  if (ineligible) return -EOPNOTSUPP;
  return -ENOMEM;
}

// Memory that another userfaultfd held when it was advised: a postcopy migration, a snapshot, a collector. It becomes a
// region when its owner has let go.
void Engine::RetryForeign() {
  if (foreign_at_ == 0 || system_.NowNanoseconds() < foreign_at_) return;
  foreign_at_ = 0;
  for (std::size_t i = 0; i < excluded_.size(); ++i) {
    const Region part = excluded_[i];
    if (part.cause != EBUSY) continue;
    // What of it is still held, or a hole by now, is written down anew by the advice. Nothing at all: it is gone, or something
    // else's.
    const std::uint64_t asked_for = std::exchange(foreign_at_, 0);
    if (Advise(part.span(), part.promise, part.sync_break, part.owned) && foreign_at_ == 0) excluded_.Erase(part.span());
    if (foreign_at_ == 0) foreign_at_ = asked_for;
    // The list has changed under this: on behind the part.
    i = 0;
    while (i < excluded_.size() && excluded_[i].end <= part.end) ++i;
    --i;
  }
}

// What of the span was advised in vain, in place of what was known of it: shown by ksmu_read_region. False: no memory.
bool Engine::Exclude(Span span, const base::OwnVector<Region>& parts) {
  if (!excluded_.Erase(span)) return false;
  for (const Region& part : parts) {
    // What is a region already stays one; its pages have their own reasons.
    for (Address at = part.start; at < part.end;) {
      const Region* region = regions_.Next(at);
      Region gap = part;
      gap.start = at;
      gap.end = region ? std::min(std::max(region->start, at), part.end) : part.end;
      if (gap.start < gap.end && !excluded_.Set(gap)) return false;
      at = region ? std::max(region->end, gap.end) : part.end;
    }
  }
  // A program that unmaps what was around them leaves them without a region: not to be kept for ever.
  AdvisedRegion next;
  for (Address at = 0; excluded_.size() > kManyExcluded && at < PageTable::kLimit; at = next.whole.end) {
    const bool more = NextAdvised(at, &next);
    const Address until = more ? next.whole.start : PageTable::kLimit;
    if (at < until) excluded_.Erase({at, until - at});
    if (!more) break;
  }
  return true;
}

// The tracker lets go of the anonymous part of the span.
void Engine::Untrack(Span span) {
  gate_.Repair();
  ForEachMapping(system_, span, [&](Span part, const os::Mapping& mapping) {
    if (!mapping.anonymous || mapping.shared) return;
    // Only what is ours: a range in no region was never registered.
    for (const Region* region = regions_.Next(part.start); region && region->start < part.end();
         region = regions_.Next(region->end)) {
      const Address low = std::max(part.start, region->start), high = std::min(part.end(), region->end);
      system_.Unregister(os::kTracker, {low, high - low});
    }
  });
}

// Gives every merged page of the run a copy of its own: as anonymous memory again, which can be discarded, made huge or
// merged like any other. Where that is refused (the map limit, a page that was written a moment ago), the kernel is made
// to copy in place: the contents are private then, but stay in the run's mapping.
int Engine::UnmergeRun(const Region& region, Span run) {
  // A raw mprotect may have cut the run's mapping in pieces: each for itself.
  os::Mapping mapping;
  if (system_.QueryMapping(run.start, &mapping) == 0 && mapping.start <= run.start && mapping.end < run.end()) {
    const std::size_t bytes = mapping.end - run.start;
    const int error = UnmergeRun(region, {run.start, bytes});
    return error ? error : UnmergeRun(region, {mapping.end, run.bytes - bytes});
  }
  KSMU_TEST_POINT("unmerge.begin", run.start, run.bytes);
  // With few mappings left the copies are made in place, which needs none.
  if (LeavesMappings(kUnmergingLeaves) && Detach(region, run, PageState::kMerged) == 0) {
    KSMU_TEST_POINT("unmerge.populated", run.start, run.bytes);
    for (Address a = run.start; a < run.end(); a += page_) {
      if (!table_.Load(a).covers()) Set(a, Page());
    }
    KSMU_TEST_POINT("unmerge.booked", run.start, run.bytes);
    return 0;
  }
  const int error = system_.PopulateWrite(run);
  KSMU_TEST_POINT("unmerge.populated", run.start, run.bytes);
  for (Address a = run.start; a < run.end(); a += page_) {
    Words* word = table_.Find(a);
    Page page(word->load(std::memory_order_acquire));
    // Under a synchronous breaker the event thread has booked the copy as a break, and pinned the frame until it is seen.
    while (page.covers() && (page.state() == PageState::kMerged || page.unconfirmed()) && HasCopy(a)) {
      if (!Change(word, page, page.WithState(PageState::kResidue).WithUnconfirmed(false))) continue;
      if (page.state() == PageState::kMerged) pool_.Unshare(page.value());
      if (page.unconfirmed()) pool_.Unpin(page.value());
      break;
    }
  }
  KSMU_TEST_POINT("unmerge.booked", run.start, run.bytes);
  for (Address a = run.start; a < run.end(); a += page_) {
    if (table_.Load(a).state() != PageState::kMerged || HasCopy(a)) continue;
    // Not writable at the moment (PROT_NONE, PROT_READ), or the populating was refused: replace what is left.
    Address end = a + page_;
    while (end < run.end() && table_.Load(end).state() == PageState::kMerged) end += page_;
    const int unknown = system_.QueryMapping(a, &mapping);
    // No further than this mapping, or this hole, goes.
    if (!unknown) end = std::min(end, mapping.start <= a ? mapping.end : mapping.start);
    if (int failed = Detach(region, {a, end - a}, PageState::kMerged)) {
      AwaitForks(Patience());
      if (move_count_.load(std::memory_order_acquire)) return -EAGAIN;
      if (unknown == -ENOENT || (!unknown && (mapping.start > a || !pool_.Shows(mapping, a, table_.Load(a).value())))) {
        ForgetRange({a, end - a});  // unmapped without a word
      } else {
        return error ? error : failed;
      }
    }
    a = end - page_;
  }
  return 0;
}

// Un-merges what is merged in the span, and forgets what is known of the rest. The regions stay as they are.
int Engine::UnmergeRange(const Region& region, Span span) {
  CountMappings(true);
  std::uint64_t allowance = 0;
  for (Segment* segment = table_.NextSegment(span.start); segment && segment->start < span.end();
       segment = table_.NextSegment(segment->start + kSegmentBytes)) {
    const Address low = std::max(span.start, segment->start), high = std::min(span.end(), segment->start + kSegmentBytes);
    ConfirmBreaks({low, high - low});  // what was written since the last sweep may be pinned: it is not to be replaced
    for (Address a = low; a < high;) {
      Words* word = table_.Word(segment, (a - segment->start) / page_);
      Page page(word ? word->load(std::memory_order_acquire) : 0);
      if (page.state() != PageState::kMerged) {
        if (page.covers()) {
          const bool seen = page.unconfirmed() && page.state() == PageState::kBroken && IsPrivate(a);
          Page to = page.WithState(PageState::kResidue);
          if (seen) to = to.WithUnconfirmed(false);
          if (!page.busy() && !Change(word, page, to)) continue;
          if (seen && !page.busy()) pool_.Unpin(page.value());
        } else if (word && page.state() != PageState::kAbsent) {
          if (!Change(word, page, Page())) continue;
        }
        a += page_;
        continue;
      }
      Address end = a + page_;
      while (end < high && (end - a) / page_ < kPopulatePages && table_.Load(end).state() == PageState::kMerged &&
             table_.Load(end).value() == page.value() + (end - a) / page_) {
        end += page_;
      }
      if (allowance < end - a) {
        // Never provoke the OOM killer: ask, take at most half of what is free, ask again.
        const std::uint64_t available = system_.AvailableMemory();
        allowance = available > kMemoryReserve ? (available - kMemoryReserve) / 2 : 0;
        if (allowance < end - a) return -ENOMEM;
      }
      allowance -= end - a;
      if (int error = UnmergeRun(region, {a, end - a})) return error;
      a = end;
    }
    LookAnew(segment);
    FillMarked({low, high - low});
  }
  return 0;
}

// Discarded pages that are still empty would be answered with zeros at their first fault. That must not depend on anybody
// being there to answer: once the library has stopped, a frame that a forked child keeps alive would show.
void Engine::FillMarked(Span span) {
  constexpr int kTries = 20;
  for (Address a = span.start; a < span.end();) {
    if (!table_.Load(a).discarded()) {
      a += page_;
      continue;
    }
    Address end = a;
    while (end < span.end() && table_.Load(end).discarded()) end += page_;
    for (int attempt = 0; attempt < kTries; ++attempt) {
      bool filled;
      {
        std::lock_guard lock(events_mutex_);
        filled = FillZeros(os::kBreaker, {a, end - a});
        filled &= FillZeros(os::kSyncBreaker, {a, end - a});
      }
      if (filled) break;
      system_.Yield();  // the event thread has to read what is in the way
    }
    a = end;
  }
}

void Engine::ForgetPresence(Span span) {
  Address begun = span.start;
  Region kept;
  for (Address at = span.start; NextIn(span, &at, &kept); begun = at) {
    if (begun < kept.start) presence_->Forget({begun, kept.start - begun});
  }
  if (begun < span.end()) presence_->Forget({begun, span.end() - begun});
}

long Engine::CallForProgram(Span span, long number, const long* arguments) {
  for (int attempt = 0; attempt < 100 && !gate_.Repair(); ++attempt) system_.Yield();
  const long result = system_.CallForProgram(number, arguments);
  AttributesUnread(span);
  return result;
}

bool Engine::HasHoles(Span span) {
  return ForEachMapping(system_, span, [](Span, const os::Mapping&) {});
}

int Engine::FindMapping(Address a, os::Mapping* out, bool* frames) {
  const int error = system_.QueryMapping(a, out);
  *frames = !error && (pool_.IsPoolMapping(*out) || IsInherited(*out));
  return error;
}

void Engine::FillAllMarked() {
  for (Segment* segment = table_.NextSegment(0); segment; segment = table_.NextSegment(segment->start + kSegmentBytes)) {
    FillMarked({segment->start, kSegmentBytes});
  }
}

int Engine::Unmerge(Span span) {
  ApplyMoves();
  Region region;
  for (Address at = span.start; NextIn(span, &at, &region);) {
    const Span part = region.span();
    if (region.kind == Region::kMergeable) {
      Region retired = region;
      retired.kind = Region::kRetired;
      if (int error = UnmergeRange(retired, part)) return error;
      Untrack(part);
      if (!regions_.Set(retired)) return -ENOMEM;
      Audit(retired);  // nothing of it lies in a run's mapping: forgotten at once
    }
  }
  if (!excluded_.Erase(span)) return -ENOMEM;
  ReclaimFrames(true);
  return 0;
}

// What a sweep does about broken pages, where none comes by any more, or not in time.
void Engine::LookAtCovering(Span span) {
  os::ScanRequest look = os::PrivatePages(os::kPresent | os::kWritten | os::kPfnZero);
  look.write_protect = true;
  std::array<os::PageRun, 64> runs;
  for (Address at = span.start; at < span.end();) {
    const os::ScanResult scan = system_.Scan({at, span.end() - at}, look, runs.data(), runs.size());
    if (scan.error || scan.walked_to <= at) return;
    for (std::size_t r = 0; r < scan.runs; ++r) {
      for (Address a = runs[r].start; a < runs[r].end; a += page_) {
        Words* word = table_.Find(a);
        Page page(word ? word->load(std::memory_order_acquire) : 0);
        if (page.busy() || (runs[r].categories & os::kPfnZero)) continue;
        if (page.unconfirmed() && !ConfirmCopy(word, &page)) continue;
        if (page.state() == PageState::kDropped) {  // used again
          Change(word, page, page.WithState(PageState::kResidue).WithStamp(NowSeconds()).WithTries(0));
          continue;
        }
        if (page.state() != PageState::kBroken && page.state() != PageState::kResidue) continue;
        if (runs[r].categories & os::kWritten) Change(word, page, page.WithStamp(NowSeconds()).WithTries(0));
        else if (page.tries() == 0) Change(word, page, page.WithTries(1));
      }
    }
    at = scan.walked_to;
  }
}

// What is merged is left to Unmerge, whose copies are made from frames. What was written since must not be replaced while a
// write of the kernel's can be under way, and so the rule for merging again holds: unwritten for so many seconds, by the
// sweeps; by looks of its own where none comes by any more, or that is 0.
int Engine::HandOver(Span span) {
  ApplyMoves();
  std::uint32_t seconds = QuickSeconds();
  const std::uint32_t now = NowSeconds();
  const auto may = [&](Address a) {
    const Page page = table_.Load(a);
    if (page.busy() || page.unconfirmed()) return false;
    if (IsEmptied(a, page)) return true;
    if (page.state() != PageState::kBroken && page.state() != PageState::kResidue) return false;
    return (page.tries() >= 1 || seconds == 0) && OldEnough(page, now, seconds);
  };
  CountMappings(true);
  int result = 0;
  bool looked = false;
  Region region;
  for (Address at = span.start; NextIn(span, &at, &region);) {
    if (region.kind == Region::kMergeable) ConfirmBreaks(region.span());
    if (region.kind == Region::kRetired) LookAtCovering(region.span());
    for (Segment* segment = table_.NextSegment(region.start); segment && segment->start < region.end;
         segment = table_.NextSegment(segment->start + kSegmentBytes)) {
      const Address high = std::min(region.end, segment->start + kSegmentBytes);
      for (Address a = std::max(region.start, segment->start); a < high;) {
        const Page first = table_.Load(a);
        if (!first.covers() || first.state() == PageState::kMerged) {
          a += page_;
          continue;
        }
        os::Mapping mapping;
        const bool known = system_.QueryMapping(a, &mapping) == 0 && mapping.start <= a;
        if (!known || region.kind == Region::kReleased || region.sync_break || !may(a)) {
          // A stranger's by now, or nothing: forgotten when the region is audited.
          if (known && pool_.Shows(mapping, a, first.value())) result = result ? result : -EAGAIN;
          a += page_;
          continue;
        }
        Address end = a + page_;
        while (end < std::min(high, mapping.end) && (end - a) / page_ < kMaxRunPages && may(end) &&
               table_.Load(end).state() == first.state() && table_.Load(end).value() == first.value() + (end - a) / page_) {
          end += page_;
        }
        if (first.state() != PageState::kDropped) {
          if (!looked && LookForPins() == os::Pins::kForLong) return -EPERM;
          looked = true;
          if (const std::uint32_t needed = SecondsToRemerge(); needed > seconds) {
            seconds = needed;
            continue;
          }
        }
        const Span run{a, end - a};
        a = end;
        // What is written from here on is seen when the run has been taken, and goes back itself.
        if (seconds == 0) LookAtCovering(run);
        if (!LeavesMappings(kUnmergingLeaves) || Detach(region, run, first.state()) != 0) result = -EAGAIN;
      }
    }
  }
  return result;
}

int Engine::UnmergeAll(bool forget) {
  if (forget) {
    // What stays in a run's mapping is watched by nobody from now on: as little as possible.
    DetachEverything();
    // What was released and is unmapped by now keeps no frames.
    Region region;
    for (Address at = 0; NextIn({0, PageTable::kLimit}, &at, &region);) {
      if (region.kind != Region::kMergeable) Audit(region);
    }
    if (int error = Unmerge({0, PageTable::kLimit})) return error;
    SettlePins();
    ReclaimFrames(true);
    return LeaveForeign();
  }
  ApplyMoves();
  for (std::size_t i = 0; i < regions_.size(); ++i) {
    const Region region = regions_[i];
    if (region.kind != Region::kMergeable) continue;
    if (int error = UnmergeRange(region, region.span())) return error;
  }
  ReclaimFrames(true);
  return 0;
}

int Engine::UnmergePart(Address* at) {
  if (*at == 0) ApplyMoves();
  for (std::size_t i = 0; i < regions_.size(); ++i) {
    const Region region = regions_[i];
    if (region.kind != Region::kMergeable || region.end <= *at) continue;
    const Address from = std::max(region.start, *at);
    const Segment* const segment = table_.NextSegment(from);
    if (!segment || segment->start >= region.end) continue;
    const Address low = std::max(from, segment->start), high = std::min(region.end, segment->start + kSegmentBytes);
    const int error = UnmergeRange(region, {low, high - low});
    if (error == 0) *at = high;
    return error;
  }
  ReclaimFrames(true);
  *at = PageTable::kLimit;
  return 0;
}

// Frames that are kept although nobody shares them: for memory that was released and is still there, and for breaks whose
// copy has not been seen. Other pages lie in the same frames' mappings, and would show them at a raw discard once nobody
// watches: so the copies are made now. Best effort: what cannot be written stays as it is, see docs/limits.md.
void Engine::SettlePins() {
  const auto pinned = [&](Address a) {
    const Page page = table_.Load(a);
    return page.covers() && page.unconfirmed() && !page.busy();
  };
  for (Segment* segment = table_.NextSegment(0); segment; segment = table_.NextSegment(segment->start + kSegmentBytes)) {
    const Address end_of_segment = segment->start + kSegmentBytes;
    for (Address a = segment->start; a < end_of_segment;) {
      if (!pinned(a)) {
        a += page_;
        continue;
      }
      os::Mapping mapping;
      const bool shown = system_.QueryMapping(a, &mapping) == 0 && pool_.Shows(mapping, a, table_.Load(a).value());
      Address end = a + page_;
      while (end < end_of_segment && shown && end < mapping.end && (end - a) / page_ < kPopulatePages && pinned(end) &&
             table_.Load(end).discarded() == table_.Load(a).discarded()) {
        end += page_;
      }
      // A page that was discarded needs no copy: with its frame gone it reads as zeros.
      const bool copy = shown && !table_.Load(a).discarded();
      if (copy && system_.AvailableMemory() > kMemoryReserve) system_.PopulateWrite({a, end - a});
      for (; a < end; a += page_) {
        Words* word = table_.Find(a);
        Page page(word->load(std::memory_order_acquire));
        while (page.covers() && page.unconfirmed() && (page.discarded() || (copy && HasCopy(a)))) {
          if (!Change(word, page, page.WithState(PageState::kResidue).WithUnconfirmed(false))) continue;
          pool_.Unpin(page.value());
          break;
        }
      }
    }
  }
}

// Brings back to anonymous memory whatever can be: merged and discarded pages always (nobody can have them pinned for
// writing), broken ones under the rule for merging again.
void Engine::DetachEverything() {
  const bool no_pins = LookForPins() != os::Pins::kForLong;
  const std::uint32_t seconds = SecondsToRemerge();
  CountMappings(true);
  const std::uint32_t now = NowSeconds();
  auto may = [&](Address a) {
    const Page page = table_.Load(a);
    if (page.busy() || page.unconfirmed()) return false;
    // Written, and perhaps pinned, since the last sweep: not known as broken yet.
    if (IsEmptied(a, page)) return true;
    if (page.state() == PageState::kMerged) return !IsPrivate(a);
    return (page.state() == PageState::kBroken || page.state() == PageState::kResidue) && no_pins && page.tries() >= 1 &&
           OldEnough(page, now, seconds);
  };
  for (Segment* segment = table_.NextSegment(0); segment; segment = table_.NextSegment(segment->start + kSegmentBytes)) {
    const Address end_of_segment = segment->start + kSegmentBytes;
    for (Address a = segment->start; a < end_of_segment;) {
      const Page first = table_.Load(a);
      if (!may(a)) {
        a += page_;
        continue;
      }
      const Region* region = regions_.Find(a);
      const Address limit = region ? std::min(end_of_segment, region->end) : end_of_segment;
      Address end = a + page_;
      while (end < limit && (end - a) / page_ < kMaxRunPages && may(end) &&
             table_.Load(end).state() == first.state() &&
             table_.Load(end).value() == first.value() + (end - a) / page_) {
        end += page_;
      }
      if (region && region->kind != Region::kReleased && LeavesMappings(kUnmergingLeaves) &&
          system_.AvailableMemory() > kMemoryReserve) {
        const Region copy = *region;
        Detach(copy, {a, end - a}, first.state());
      }
      a = end;
    }
  }
}

int Engine::Release(Span span) {
  ApplyMoves();
  Region region;
  for (Address at = span.start; NextIn(span, &at, &region);) {
    const Span part = region.span();
    if (region.kind == Region::kMergeable) {
      Untrack(part);
      bool covers = false;
      for (Segment* segment = table_.NextSegment(part.start); segment && segment->start < part.end();
           segment = table_.NextSegment(segment->start + kSegmentBytes)) {
        const Address low = std::max(part.start, segment->start), high = std::min(part.end(), segment->start + kSegmentBytes);
        for (Address a = low; a < high; a += page_) {
          Words* word = table_.Word(segment, (a - segment->start) / page_);
          if (!word) continue;
          Page page(word->load(std::memory_order_acquire));
          for (;;) {
            const bool shares = page.state() == PageState::kMerged;
            // The frame must stay as long as the mapping may show it: until the audit sees the mapping gone.
            if (shares) pool_.Pin(page.value());
            const Page to = page.covers() ? page.WithState(PageState::kResidue).WithUnconfirmed(shares || page.unconfirmed())
                                          : Page();
            if (Change(word, page, to)) {
              if (shares) pool_.Unshare(page.value());
              covers |= to.covers();
              break;
            }
            if (shares) pool_.Unpin(to.value());
          }
        }
        segment->expected_present = segment->unsettled = 0;
      }
      Region released = region;
      released.kind = Region::kReleased;
      if (covers ? !regions_.Set(released) : !regions_.Erase(part)) return -ENOMEM;
    }
  }
  return excluded_.Erase(span) ? 0 : -ENOMEM;
}

bool Engine::IsInherited(const os::Mapping& mapping) const {
  if (mapping.anonymous || mapping.shared) return false;
  for (std::size_t i = 0; i < inherited_count_; ++i) {
    if (inherited_[i].inode == mapping.inode && inherited_[i].device == mapping.device) return true;
  }
  return false;
}

int Engine::Discard(Span span, bool tend) {
  ApplyMoves();
  // Under a gate that could not be taken back, the discard would wait for this very thread.
  for (int attempt = 0; attempt < 100 && !gate_.Repair(); ++attempt) system_.Yield();
  if (gate_.LeftShut()) return -ENOMEM;
  const int error = system_.Discard(span);
  // The event has been read, but only with the mutex is it certain that the pages are marked.
  { std::lock_guard lock(events_mutex_); }
  if (inherited_count_ && !error) {
    // Frames of the parent's pool would show again: anonymous memory takes their place, and can be merged from now on.
    ForEachMapping(system_, span, [&](Span part, const os::Mapping& mapping) {
      if (!IsInherited(mapping)) return;
      const os::Protection protection = mapping.writable   ? os::Protection::kReadWrite
                                        : mapping.readable ? os::Protection::kRead
                                                           : os::Protection::kNone;
      Address at = 0;
      if (system_.MapAnonymous(part.start, part.bytes, protection, &at) != 0) return;
      if (regions_.Find(part.start)) system_.Register(os::kTracker, part, os::kWriteProtect);
    });
  }
  for (const Region* region = regions_.Next(span.start); region && region->start < span.end();
       region = regions_.Next(region->end)) {
    const Address from = std::max(span.start, region->start), to = std::min(span.end(), region->end);
    for (Segment* segment = table_.NextSegment(from); segment && segment->start < to;
         segment = table_.NextSegment(segment->start + kSegmentBytes)) {
      const Address low = std::max(from, segment->start), high = std::min(to, segment->start + kSegmentBytes);
      for (Address a = low; a < high; a += page_) {
        Words* word = table_.Word(segment, (a - segment->start) / page_);
        if (!word) continue;
        Page page(word->load(std::memory_order_acquire));
        // Merged and broken pages are the event thread's: the discard was an event. The rest is simply not there now,
        // unless the program has already written to it again: the next sweep tells.
        if (page.covers() || page.busy() || error) continue;
        if (page.state() == PageState::kZero) Add(counters_.discards, 1);
        Change(word, page, Page());
      }
      LookAgainAt(segment);
    }
  }
  CountMappings(true);
  Region part;
  for (Address at = span.start; !error && tend && NextIn(span, &at, &part);) {
    if (part.kind == Region::kMergeable) TendDropped(part, part.span());
  }
  return error;
}

int Engine::Unmap(Span span) {
  ApplyMoves();
  const int error = system_.Unmap(span);
  if (error) return error;
  AwaitForks(Patience());
  ForgetRange(span);
  regions_.Erase(span);
  excluded_.Erase(span);
  ReclaimFrames(false);
  return 0;
}

constexpr std::uint64_t kMergePatienceNs = 1'000'000'000;

std::int64_t Engine::Merge(Span span, bool (*cancelled)(void*), void* cookie) {
  const auto done = [&] {
    return counters_.merged_total.load(std::memory_order_relaxed) + counters_.zero_total.load(std::memory_order_relaxed);
  };
  const std::int64_t before = done();
  ApplyMoves();
  gate_.Repair();
  CountMappings(true);
  if (attributes_cost_ < kCheapAttributes || !not_read_.empty()) attributes_until_ = 0;
  // Pages that went back to anonymous memory on the way are merged by another round.
  std::int64_t detached = -1;
  bool approved = false;
  short_runs_wait_ = false;
  const std::uint64_t patient_until = system_.NowNanoseconds() + kMergePatienceNs;
  // So are those whose frames the broker was asked for and did not answer in time, for as long as the caller's patience lasts.
  put_off_ = false;
  const auto again = [&](int round) {
    if (put_off_ && SourceIsThere() && system_.NowNanoseconds() < patient_until) return true;
    return round < 3 && (approved || short_runs_wait_ || detached != counters_.detached.load(std::memory_order_relaxed));
  };
  for (int round = 0; again(round); ++round) {
    put_off_ = false;
    // Long runs have had their turn.
    long_runs_first_ = !short_runs_wait_;
    short_runs_wait_ = false;
    detached = counters_.detached.load(std::memory_order_relaxed);
    // Found anew for each portion: other commands are carried out in between.
    for (Address at = span.start; at < span.end();) {
      if (cancelled(cookie)) return -EINTR;
      if (pool_.source()) HearNews();
      // The caller wants it now: a broker that takes its time is waited for.
      if (SourceIsThere() && pool_.source()->Busy() && system_.NowNanoseconds() < patient_until) {
        system_.Yield();
        continue;
      }
      Region region;
      Address region_end = at;
      if (!NextIn(span, &region_end, &region)) break;
      at = region.start;
      if (region.kind != Region::kMergeable) {
        at = region.end;
        continue;
      }
      const Address chunk_end = chunk_ < region.end - at ? at + chunk_ : region.end;
      Address swept_to = chunk_end;
      Sweep(region, at, chunk_end, true, &swept_to);
      at = swept_to > at ? swept_to : chunk_end;
    }
    approved = ApproveSampled(span);
  }
  ReclaimFrames(false);
  now_ = false;
  ForgetReadBuffer();
  return done() - before;
}

std::size_t Engine::metadata_bytes() const {
  // Scratch memory counts as far as it has been used.
  return table_.metadata_bytes() + regions_.metadata_bytes() + excluded_.metadata_bytes() + pool_.metadata_bytes() +
         index_.metadata_bytes() + buffer_used_ + huge_used_ + sample_table_.metadata_bytes() + samples_.bytes();
}

}  // namespace ksmu::engine
