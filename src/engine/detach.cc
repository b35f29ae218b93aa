// Broken and discarded pages that lie in a run's mapping: merged again in place, or brought back to anonymous memory.
//
// Such a page cannot be taken by UFFDIO_MOVE (its mapping is a file's), and the breaker must not let go of it for an
// instant: a discard would leave no trace. So its pages are taken out by mremap(MREMAP_DONTUNMAP): the range stays mapped
// and registered as it was, and whoever touches it waits in the breaker. What comes back goes in under events_mutex_,
// while no event can be read: a discarding thread is then either marked already, or still waiting, and its zap is yet to
// come.

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

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
constexpr std::uint32_t kLookedAt = 15;  // Page::tries of a broken page that could not be helped: not tried again every pass
}

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
        if (system_.QueryMapping(at, &mapping) == 0 && mapping.readable && mapping.writable) Detach(region, {at, end - at}, PageState::kDropped);
      }
      at = end;
    }
  }
}

// A page with contents of its own has been left alone for long enough to be taken out of its place.
bool Engine::OldEnough(Page page, std::uint32_t now, std::uint32_t seconds) const {
  const std::uint32_t age = (now - page.stamp()) & Page::kStampMask;
  return age >= (page.discarded() ? std::max(seconds, kZapSeconds) : seconds);
}

// Looks at what lies broken or dropped in [from, to), and does what can be done for it.
void Engine::TendBroken(const Region& region, Address from, Address to) {
  const auto seconds = static_cast<std::uint32_t>(tunables_.remerge_seconds.load(std::memory_order_relaxed));
  const std::uint32_t now = NowSeconds();
  const bool look_again = pass_ % 64 == 0;
  TendDropped(region, {from, to - from});
  for (Address at = from; at < to;) {
    const Page first = table_.Load(at);
    auto ripe = [&](Page page) {
      // Under a synchronous breaker no sweep tells whether a broken page is still.
      return !region.sync_break && page.state() == PageState::kBroken && !page.busy() && !page.unconfirmed() && (page.tries() >= 1 || (now_ && seconds == 0)) &&
             (page.tries() != kLookedAt || look_again) && OldEnough(page, now, seconds);
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
    const Span run{at, end - at};
    // A long-term pin may be older than the break, and a page pinned for DMA must stay where it is. Pins taken after
    // the last sweep had to write to the page first, and then it is not ripe: so one look a sweep is enough.
    if (!no_pins_known_) {
      no_pins_ = system_.NoLongTermPins();
      no_pins_known_ = true;
    }
    if (!no_pins_) return;
    TendRun(region, run);
    at = end;
  }
}

// A run of ripe broken pages: equal to the frames beneath -> again in place; else back to anonymous memory, where it is a
// page like any other, and what it cost in mappings is given back.
void Engine::TendRun(const Region& region, Span run) {
  const std::size_t n = run.bytes / page_;
  const std::size_t read = system_.ReadProgram(run.start, buffer_, run.bytes) / page_;
  enum Verdict : std::uint8_t { kLeave, kInPlace, kElsewhere };
  std::array<Verdict, kMaxRunPages> verdict{};
  for (std::size_t i = 0; i < read; ++i) {
    const Address a = run.start + i * page_;
    const std::byte* bytes = buffer_ + i * page_;
    const Page page = table_.Load(a);
    if (!page.covers()) continue;
    Add(counters_.pages_scanned, 1);
    if (pool_.Live(page.value()) && content::Equal(bytes, pool_.Bytes(page.value()), page_)) {
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

// Takes the pages of a run out of their place: accesses wait in the breaker until LetGo, by when the caller has put
// something there. All pages must be covering and known; false: nothing was changed.
bool Engine::TakeFromRun(Span run, PageState expected) {
  Address until = 0;
  const os::Attributes attributes = FindAttributes(run.start, &until);
  if (!attributes_known_ || attributes.locked || attributes.sealed) return false;
  // Under no breaker nobody would wait, and what is written to the place meanwhile would be lost.
  if (gate_.NeedsRepair() && !gate_.Repair()) return false;
  os::Mapping mapping;
  if (system_.QueryMapping(run.start, &mapping) != 0 || mapping.end < run.end()) return false;
  for (Address a = run.start; a < run.end(); a += page_) {
    if (!pool_.Shows(mapping, a, table_.Load(a).value())) return false;
  }
  KSMU_TEST_POINT("remerge.begin", run.start, run.bytes);
  const std::uint32_t now = NowSeconds();
  {
    std::lock_guard lock(events_mutex_);
    for (Address a = run.start; a < run.end(); a += page_) {
      const Page page = table_.Load(a);
      // What the caller has judged must be what is taken.
      if (page.state() != expected || page.busy()) return false;
      if (expected != PageState::kDropped && page.discarded() && !OldEnough(page, now, 0)) return false;
    }
    std::size_t i = 0;
    for (Address a = run.start; a < run.end(); a += page_, ++i) {
      Words* word = table_.Find(a);
      Page page(word->load(std::memory_order_acquire));
      held_marks_[i] = page.discarded();
      held_moved_[i] = false;
      // From here on the mark means: discarded since it was taken out.
      while (!Change(word, page, page.WithBusy(true).WithDiscarded(false))) {
      }
    }
    hold_.run = run;
    hold_.taken_to = 0;
  }
  Address to = 0;
  own_move_from_.store(run.start, std::memory_order_release);
  const int error = system_.TakePages(run, &to);
  // The event has been read, but only with the mutex is it certain that the event thread has looked at it.
  std::unique_lock lock(events_mutex_);
  own_move_from_.store(0, std::memory_order_release);
  if (error) {
    LetGo();
    return false;
  }
  hold_.taken_to = to;
  KSMU_TEST_POINT("remerge.taken", run.start, run.bytes);
  lock.unlock();
  NoteWritten({to, run.bytes});
  // Where nothing is a mark may lie, and looks like a private page that is swapped out.
  for (os::Context breaker : {os::kBreaker, os::kSyncBreaker}) {
    while (system_.WriteProtect(breaker, {to, run.bytes}, false) == -EAGAIN) system_.Yield();
  }
  return true;
}

// Gives up the place where the pages of a hold were, but for the holes that pages have left which were moved back: those
// may be somebody else's mappings by now.
void Engine::UnmapTaken(Address taken_to, std::size_t bytes) {
  const std::size_t n = bytes / page_;
  for (std::size_t i = 0; i < n;) {
    std::size_t end = i;
    while (end < n && !held_moved_[end]) ++end;
    if (end > i) system_.Unmap({taken_to + i * page_, (end - i) * page_});
    i = end + 1;
  }
}

// Under events_mutex_: the pages that are still busy keep the state they had; everybody who waits tries again.
void Engine::LetGo() {
  const Span run = hold_.run;
  std::size_t i = 0;
  for (Address a = run.start; a < run.end(); a += page_, ++i) {
    Words* word = table_.Find(a);
    Page page(word->load(std::memory_order_acquire));
    if (!page.busy()) continue;
    const bool fresh_mark = page.discarded();
    const bool mark = fresh_mark || held_marks_[i];
    Page to = page.WithBusy(false).WithDiscarded(mark);
    if (fresh_mark && page.state() != PageState::kResidue) to = to.WithState(PageState::kDropped).WithUnconfirmed(false);
    while (!Change(word, page, to)) {
    }
    if (to.state() == PageState::kDropped && page.state() == PageState::kMerged) pool_.Unshare(page.value());
    if (to.state() == PageState::kDropped && page.unconfirmed()) pool_.Unpin(page.value());
  }
  hold_ = Hold{};
  for (std::size_t k = 0; k < children_.size(); ++k) children_[k]->before_move = false;
  system_.Wake(os::kBreaker, run);
  system_.Wake(os::kSyncBreaker, run);
}

// Puts page i of the hold back where it was. Returns when it is there, or known to be discarded.
void Engine::ReturnHeld(std::size_t i) {
  const Address a = hold_.run.start + i * page_;
  const Address from = hold_.taken_to + i * page_;
  for (int attempt = 0;; ++attempt, system_.Yield()) {
    const bool readable = system_.ReadProgram(from, scratch_, page_) == page_;
    {
      std::lock_guard lock(events_mutex_);
      if (table_.Load(a).discarded()) return;
      int error = -EINVAL;
      if (readable) {
        // The copy is refused while an event is unread, so it cannot undo a discard that has already been let through.
        for (os::Context breaker : {os::kBreaker, os::kSyncBreaker}) {
          const os::Partial copied = system_.Copy(breaker, a, scratch_, page_, false);
          if (copied.done == page_ || copied.error == -EEXIST) return;
          if (error == -EINVAL || copied.error == -EAGAIN) error = copied.error;
        }
      }
      if ((error == -EAGAIN && attempt < kCopyTries) || error == -ENOMEM) continue;
    }
    // Neither breaker holds the place any more, or the page cannot be read, or a storm of discards leaves no instant for a
    // copy: it goes back itself. Until it has there is no way out of here, nothing else keeps the bytes; unless the place
    // is gone.
    os::Mapping mapping;
    const int unknown = system_.QueryMapping(a, &mapping);
    if (unknown == -ENOENT || (!unknown && !pool_.Shows(mapping, a, table_.Load(a).value()))) return;
    if (!unknown && MoveBack(i)) return;
  }
}

// The page itself, pins and all, to its place; registered all along. A discard that is let through in the meantime may find
// the place still empty: then it is done over.
bool Engine::MoveBack(std::size_t i) {
  const Address a = hold_.run.start + i * page_;
  const Address from = hold_.taken_to + i * page_;
  own_move_from_.store(from, std::memory_order_release);
  const bool moved = system_.MoveMapping(from, page_, a) == 0;
  bool discarded;
  {
    std::lock_guard lock(events_mutex_);
    own_move_from_.store(0, std::memory_order_release);
    held_moved_[i] = moved;
    discarded = table_.Load(a).discarded();
  }
  if (moved && discarded) system_.Discard({a, page_});
  return moved;
}

// Puts the page itself back, not a copy: somebody may have it pinned.
void Engine::MoveBackHeld(std::size_t i) {
  const Address a = hold_.run.start + i * page_;
  const Address from = hold_.taken_to + i * page_;
  for (const std::uint64_t until = Patience();; system_.Yield()) {
    {
      std::lock_guard lock(events_mutex_);
      if (table_.Load(a).discarded()) return;
      if (EventsPending(until)) continue;
    }
    os::Mapping there;
    const bool known = system_.QueryMapping(a, &there) == 0 && there.start <= a;
    if (known && !(there.readable && there.writable)) {
      system_.Protect({from, page_}, there.readable ? os::Protection::kRead : os::Protection::kNone);
    }
    if (!MoveBack(i)) ReturnHeld(i);  // refused: a copy keeps the bytes at least
    return;
  }
}

// Maps the frames beneath again, where the pages are equal to them and nobody can be writing.
std::size_t Engine::Remerge(Span run) {
  if (!TakeFromRun(run, PageState::kBroken)) return 0;
  const Address taken_to = hold_.taken_to;
  const std::size_t n = run.bytes / page_;
  system_.Protect({taken_to, run.bytes}, os::Protection::kReadWrite);
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
    for (int attempt = 0; equal[i] && attempt < kCopyTries; ++attempt) {
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
    if (held_moved_[i]) continue;
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
  {
    std::lock_guard lock(events_mutex_);
    LetGo();
    UnmapTaken(taken_to, run.bytes);
  }
  KSMU_TEST_POINT("remerge.opened", run.start, run.bytes);
  if (merged) fruitful_ = true;
  return merged;
}

// Brings a run back to anonymous memory with the same contents: what was merged is copied, what was discarded is empty.
int Engine::Detach(const Region& region, Span run, PageState expected) {
  os::Mapping mapping;
  if (int error = system_.QueryMapping(run.start, &mapping)) return error;
  Address until = 0;
  const os::Attributes attributes = FindAttributes(run.start, &until);
  if (mapping.executable || attributes.locked || attributes.sealed || until < run.end()) return -EOPNOTSUPP;
  KSMU_TEST_POINT("detach.begin", run.start, run.bytes);
  Address fresh = 0;
  if (int error = system_.MapAnonymous(0, run.bytes, os::Protection::kReadWrite, &fresh)) return error;
  if (!TakeFromRun(run, expected)) {
    system_.Unmap({fresh, run.bytes});
    return -EAGAIN;
  }
  KSMU_TEST_POINT("detach.taken", run.start, run.bytes);
  const Address taken_to = hold_.taken_to;
  const std::size_t n = run.bytes / page_;
  system_.Protect({taken_to, run.bytes}, os::Protection::kReadWrite);
  std::array<bool, kMaxRunPages> filled{}, written{};
  bool complete = true;
  for (std::size_t i = 0; i < n; ++i) {
    const Page page = table_.Load(run.start + i * page_);
    const Address to = fresh + i * page_;
    if (page.state() == PageState::kBroken ? held_written_[i] : IsPrivate(taken_to + i * page_, true)) {
      // Written since the last sweep, and so perhaps pinned: this very page has to go back.
      written[i] = true;
      complete = false;
      continue;
    }
    // Discarded and not written since: reads as zeros. The rest is read where it is, also what should map its frame: it
    // can have been written, and swapped out, since anybody looked.
    if ((page.state() == PageState::kDropped || held_marks_[i]) && !IsPrivate(taken_to + i * page_, true)) continue;
    if (system_.ReadProgram(taken_to + i * page_, reinterpret_cast<void*>(to), page_) != page_) {
      complete = false;
    }
    filled[i] = true;
  }
  KSMU_TEST_POINT("detach.copied", run.start, run.bytes);
  system_.ApplyAttributes({fresh, run.bytes}, attributes);
  if (!(mapping.readable && mapping.writable)) {
    system_.Protect({fresh, run.bytes}, mapping.readable ? os::Protection::kRead : os::Protection::kNone);
  }
  bool replaced = false, released = false;
  std::uint64_t patience = 0;
  // Under a storm of discards there may be no instant without an unread event: then it is left for another time.
  for (int attempt = 0; complete && !released && (replaced || attempt < 2000); ++attempt) {
    {
      std::lock_guard lock(events_mutex_);
      if (!replaced && !EventsPending(~std::uint64_t{0})) {
        for (std::size_t i = 0; i < n; ++i) {
          if (table_.Load(run.start + i * page_).discarded() && filled[i]) {
            if (system_.Discard({fresh + i * page_, page_}) != 0) {
              std::memset(reinterpret_cast<void*>(fresh + i * page_), 0, page_);  // refused, by a filter
            }
            filled[i] = false;
          }
        }
        // The protection may have been changed since it was looked at: copying takes its time.
        os::Mapping current;
        if (system_.QueryMapping(run.start, &current) != 0 || current.start > run.start || current.end < run.end() ||
            !pool_.IsPoolMapping(current)) {
          break;
        }
        if (current.readable != mapping.readable || current.writable != mapping.writable) {
          mapping = current;
          system_.Protect({fresh, run.bytes}, current.writable   ? os::Protection::kReadWrite
                                              : current.readable ? os::Protection::kRead
                                                                 : os::Protection::kNone);
        }
        if (system_.MoveMapping(fresh, run.bytes, run.start) != 0) break;
        replaced = true;
        patience = Patience();
        KSMU_TEST_POINT("detach.replaced", run.start, run.bytes);
      }
      // A fork that came between the look and the move has copied the place without its pages: its event must still
      // find the hold.
      if (replaced && !EventsPending(patience)) {
        for (std::size_t i = 0; i < n; ++i) {
          const Address a = run.start + i * page_;
          // Announced since it was taken: the zap is yet to come, and finds what is here now.
          if (table_.Load(a).discarded()) NoteInFlight(a);
          ForgetPage(a, table_.Find(a));
          if (filled[i] && region.kind == Region::kMergeable) {
            Set(a, Page().WithState(PageState::kFresh).WithStamp(pass_));
          }
          Add(counters_.detached, 1);
        }
        // Before the waiters go on: what they touch next is ordinary memory.
        LetGo();
        UnmapTaken(taken_to, run.bytes);
        released = true;
      }
    }
    if (!released) system_.Yield();
  }
  if (!replaced) {
    for (std::size_t i = 0; i < n; ++i) {
      if (written[i]) {
        MoveBackHeld(i);
        continue;
      }
      if (IsPrivate(taken_to + i * page_, true)) {
        ReturnHeld(i);
        continue;
      }
      // A frame: the fault that comes next maps it again, or zeros, as the page is marked.
    }
    patience = Patience();
    while (!released) {
      {
        std::lock_guard lock(events_mutex_);
        // As above: the event of a fork must find the hold.
        if (!EventsPending(patience)) {
          LetGo();
          UnmapTaken(taken_to, run.bytes);
          released = true;
        }
      }
      if (!released) system_.Yield();
    }
    system_.Unmap({fresh, run.bytes});
    return -ENOMEM;
  }
  if (region.kind == Region::kMergeable) {
    if (int error = system_.Register(os::kTracker, run, os::kWriteProtect); error && error != -ENOENT) {
      gate_.AddRepair(run, os::kTracker, os::kWriteProtect);
    }
  }
  KSMU_TEST_POINT("detach.tracked", run.start, run.bytes);
  KSMU_TEST_POINT("detach.opened", run.start, run.bytes);
  return 0;
}

// Which of the pages just taken carry no protection mark: written since the last sweep, which judged them.
void Engine::NoteWritten(Span taken) {
  held_written_.fill(false);
  os::ScanRequest request;
  request.required = os::kPresent | os::kWritten;
  request.returned = os::kWritten;
  std::array<os::PageRun, 16> runs;
  for (Address at = taken.start; at < taken.end();) {
    const os::ScanResult scan = system_.Scan({at, taken.end() - at}, request, runs.data(), runs.size());
    if (scan.error || scan.walked_to <= at) return held_written_.fill(true);
    for (std::size_t r = 0; r < scan.runs; ++r) {
      for (Address a = runs[r].start; a < runs[r].end; a += page_) held_written_[(a - taken.start) / page_] = true;
    }
    at = scan.walked_to;
  }
}

// As IsPrivate, for a page that is about to be unmerged anyway: its protection mark, which would look like a page that is
// swapped out where there is none, is taken away. Where discards leave no instant for that, the answer is no.
bool Engine::HasCopy(Address a) {
  if (IsPrivate(a)) return true;
  if (!IsPrivate(a, true)) return false;
  for (os::Context breaker : {os::kBreaker, os::kSyncBreaker}) {
    const std::uint64_t until = Patience();
    while (system_.WriteProtect(breaker, {a, page_}, false) == -EAGAIN) {
      if (system_.NowNanoseconds() >= until) return false;
      system_.Yield();
    }
  }
  return IsPrivate(a, true);
}

// A discarded page: the kernel has carried the discard out. Until it has, the page must stay in its place, where the zap
// will look for it. From then on there is nothing, or the zero page, or what has been written since.
bool Engine::IsZapped(Address a) {
  os::ScanRequest request;
  request.any_of = os::kPresent | os::kSwapped;
  request.returned = os::kPresent | os::kPfnZero;
  os::PageRun run;
  os::ScanResult scan = system_.Scan({a, page_}, request, &run, 1);
  if (!scan.error && scan.runs && !(run.categories & os::kPresent)) {
    // The protection mark that a zap leaves behind looks like a page that is swapped out. Cleared, it is gone.
    for (os::Context breaker : {os::kBreaker, os::kSyncBreaker}) {
      if (system_.WriteProtect(breaker, {a, page_}, false) == -EAGAIN) return false;
    }
    scan = system_.Scan({a, page_}, request, &run, 1);
  }
  return !scan.error && (scan.runs == 0 || (run.categories & os::kPfnZero));
}

// True if the page is the process's own, not a frame: present or swapped out.
bool Engine::IsPrivate(Address a, bool unmarked) {
  os::ScanRequest request;
  request.any_of = os::kPresent | os::kSwapped;
  request.returned = os::kPresent | os::kFile | os::kPfnZero | os::kSwapped;
  os::PageRun run;
  os::ScanResult scan = system_.Scan({a, page_}, request, &run, 1);
  // No memory in the kernel: to be asked again, because bytes hang on the answer.
  for (int attempt = 0; scan.error && attempt < 100; ++attempt) {
    system_.Yield();
    scan = system_.Scan({a, page_}, request, &run, 1);
  }
  if (scan.error || scan.runs == 0) return false;
  return !(run.categories & (os::kFile | os::kPfnZero)) && (run.categories & (unmarked ? os::kPresent | os::kSwapped : os::kPresent));
}

}  // namespace ksmu::engine
