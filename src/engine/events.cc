// The event thread's work: discards, faults, forks and moves of memory that maps frames, whoever causes them.
//
// Order matters. A discard's event is read before the discarding thread goes on; a fault that follows it is read later.
// So within what one call has read, events come before faults. Nothing here allocates on the way of a fault, waits for
// the scanner, or writes where the program could be reading. A fault on a page that the scanner has in hand is passed
// over: whoever has it wakes the whole run when done, and the waiter faults again.

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "base/test_point.h"
#include "engine/engine.h"
#include "engine/probes.h"

namespace ksmu::engine {
namespace {
constexpr std::size_t kZeroAround = 64;      // pages mapped to zero at a fault in a discarded range
constexpr std::size_t kContinueAround = 16;  // frames mapped at a fault (one of them came back from swap), as fault-around
constexpr std::uint64_t kChildCheckNs = 1'000'000'000;
constexpr std::uint8_t kMaxFillTries = 100;
constexpr std::uint64_t kForkPatienceNs = 200'000'000;
}  // namespace

std::size_t Engine::EventContexts(os::Context* contexts, std::size_t capacity) {
  std::lock_guard lock(events_mutex_);
  std::size_t n = 0;
  contexts[n++] = os::kBreaker;
  contexts[n++] = os::kSyncBreaker;
  for (std::size_t i = 0; i < children_.size() && n < capacity; ++i) contexts[n++] = children_[i]->context;
  return n;
}

void Engine::HandleEvents() {
  std::lock_guard lock(events_mutex_);
  HandleContext(os::kBreaker, nullptr);
  HandleContext(os::kSyncBreaker, nullptr);
  for (std::size_t i = 0; i < children_.size(); ++i) HandleContext(children_[i]->context, children_[i]);
  FillPending();
  if (children_.size() == 0) return;
  const std::uint64_t now = system_.NowNanoseconds();
  if (now - children_checked_at_ < kChildCheckNs) return;
  children_checked_at_ = now;
  for (std::size_t i = 0; i < children_.size();) {
    if (system_.ContextAlive(children_[i]->context)) {
      ++i;
      continue;
    }
    system_.CloseContext(children_[i]->context);
    children_.RemoveAt(i);
    Add(counters_.children, -1);
  }
}

void Engine::HandleContext(os::Context context, Child* child) {
  os::Event events[32];
  // Bounded, so that one busy context does not starve the others.
  for (int round = 0; round < 16; ++round) {
    const std::size_t n = system_.ReadEvents(context, events, 32);
    if (n == 0) return;
    KSMU_TEST_POINT("event.read", events[0].start, page_);
    for (std::size_t i = 0; i < n; ++i) {
      const os::Event& event = events[i];
      switch (event.kind) {
        case os::Event::kRemove:
          if (child) {
            child->discards.AddRange(event.start, event.end, std::countr_zero(page_));
            FillZeros(context, {event.start, event.end - event.start});
          } else {
            OnRemove(context, event.start, event.end);
          }
          break;
        case os::Event::kRemap:
          if (child) {
            const int shift = std::countr_zero(page_);
            for (Address a = event.start; a < event.end; a += page_) {
              if (child->discards.Contains(a, shift)) child->discards.Add(event.to + (a - event.start), shift);
            }
          } else {
            OnRemap(event);
          }
          break;
        case os::Event::kFork:
          OnFork(context, child, event.child);
          break;
        case os::Event::kFault:
        case os::Event::kUnmap:
          break;
      }
    }
    for (std::size_t i = 0; i < n; ++i) {
      if (events[i].kind == os::Event::kFault) OnFault(context, child, events[i]);
    }
    KSMU_TEST_POINT("event.handled", events[0].start, page_);
  }
}

// A discard of merged memory, seen or raw. The pages are marked, and once the kernel has zapped them (FillPending) the zero
// page is mapped in their place: no fault comes here for them, and a child made afterwards inherits the zeros. Putting anonymous
// memory over the range instead would undo an mprotect that the program may be making at this moment.
void Engine::OnRemove(os::Context context, Address start, Address end) {
  KSMU_PROBE2(discard, start, end);
  // A range that was moved and not yet followed is known by its old addresses.
  Address at = start;
  if (move_count_.load(std::memory_order_relaxed)) {
    for (Address a = start; a < end; a += page_) {
      const Address known = Translate(a);
      if (known == a) continue;
      if (Words* word = table_.Find(known)) MarkDiscarded(word);
    }
  }
  Address fill_from = 0, fill_to = 0;
  auto flush = [&] {
    const Span span{fill_from, fill_to - fill_from};
    if (span.bytes && pending_fills_ < fills_.size()) fills_[pending_fills_++] = {span, context, 0};
    fill_from = fill_to = 0;
  };
  while (Segment* segment = table_.NextSegment(at)) {
    if (segment->start >= end) break;
    const Address low = std::max(at, segment->start), high = std::min(end, segment->start + kSegmentBytes);
    for (Address a = low; a < high; a += page_) {
      Words* word = table_.Word(segment, (a - segment->start) / page_);
      if (!word) continue;
      MarkDiscarded(word);
      const Page page(word->load(std::memory_order_acquire));
      if (page.busy() || !page.covers()) continue;
      if (a != fill_to) {
        flush();
        fill_from = a;
      }
      fill_to = a + page_;
    }
    at = segment->start + kSegmentBytes;
  }
  flush();
}

// Maps the zero page wherever the range has nothing. False: an event is in the way (the discarding thread has not run
// since its event was read, most likely), and it is worth trying again. What is left is answered fault by fault.
bool Engine::FillZeros(os::Context context, Span span) {
  // Protection marks stay behind when protected pages are zapped, and are in the way of the zero page.
  const int error = system_.WriteProtect(context, span, false);
  if (error == -EAGAIN) return false;
  if (error == -ENOENT && span.bytes > page_) {
    // Not all of it is this context's: each page for itself, so that the one that somebody waits for is served.
    bool filled = true;
    for (std::size_t done = 0; done < span.bytes; done += page_) filled &= FillZeros(context, {span.start + done, page_});
    return filled;
  }
  // A filter. A copy of zeros goes over a mark: somebody may be waiting for the page.
  bool copy = error == -EPERM || error == -EACCES;
  if (error && !copy) return true;
  std::size_t most = span.bytes;
  for (std::size_t done = 0; done < span.bytes;) {
    os::Partial zeroed;
    if (!copy) zeroed = system_.ZeroPage(context, {span.start + done, std::min(most, span.bytes - done)});
    copy |= zeroed.error == -EPERM || zeroed.error == -EACCES;
    if (copy) {
      std::memset(event_scratch_, 0, page_);
      zeroed = system_.Copy(context, span.start + done, event_scratch_, page_, false);
    }
    done += zeroed.done;
    if (zeroed.error == -EEXIST) done += page_;
    else if (zeroed.error == -ENOENT && most > page_) most = page_;  // more than one mapping: each page for itself
    else if (zeroed.error == -EAGAIN) return false;
    else if (zeroed.error) return true;
  }
  return true;
}

// Tries again what an event was in the way of, where it is still called for. Under events_mutex_.
void Engine::FillPending() {
  std::size_t left = 0;
  for (std::size_t i = 0; i < pending_fills_; ++i) {
    Fill fill = fills_[i];
    bool done = true;
    for (Address a = fill.span.start; a < fill.span.end();) {
      const auto wanted = [&](Address at) {
        const Page page = table_.Load(at);
        return page.discarded() && page.covers() && !page.busy();
      };
      Address end = a + page_;
      if (wanted(a)) {
        while (end < fill.span.end() && wanted(end)) end += page_;
        done &= FillZeros(fill.context, {a, end - a});
      }
      a = end;
    }
    if (!done && ++fill.tries < kMaxFillTries) fills_[left++] = fill;
  }
  pending_fills_ = left;
}

void Engine::OnFault(os::Context context, Child* child, const os::Event& event) {
  const Address a = event.start & ~(page_ - 1);
  const Span one{a, page_};
  const int shift = std::countr_zero(page_);
  // The scanner (or this thread, for a child) reading what it has taken out of a run: known by the old place.
  const bool held = !child && hold_.taken_to && a >= hold_.taken_to && a - hold_.taken_to < hold_.run.bytes;
  const Address known = child ? a : held ? hold_.run.start + (a - hold_.taken_to) : Translate(a);
  Words* word = child ? nullptr : table_.Find(known);
  Page page(word ? word->load(std::memory_order_acquire) : 0);
  if (page.busy() && !held) return;
  // A child that waits for its copies of the pages in the scanner's hands.
  const bool awaits = child && (child->before_settled || child->being_served);
  if (awaits && hold_.run.contains(a)) return;

  if (event.write_protect) {
    // A synchronous break: book it, then let the kernel copy. The frame is pinned until the copy has been seen.
    while (word && page.state() == PageState::kMerged && !page.busy()) {
      pool_.Pin(page.value());
      if (Change(word, page, page.WithState(PageState::kBroken).WithUnconfirmed(true).WithStamp(NowSeconds()).WithTries(0))) {
        pool_.Unshare(page.value());
        Add(counters_.cow_breaks, 1);
        KSMU_PROBE2(cow_break, a, page.value());
        break;
      }
      pool_.Unpin(page.value());
    }
    if (page.busy()) return;
    if (system_.WriteProtect(context, one, false) != 0) {
      system_.Yield();
      system_.Wake(context, one);  // it faults again, and is then answered
    }
    return;
  }

  // What grows out of a run, or what a program's MREMAP_DONTUNMAP leaves behind, is empty memory: nothing of the pool may
  // show there. The scanner's own place for pages that it has taken out is none of these.
  const bool lost = !child && !page.covers() && lost_moves_.load(std::memory_order_relaxed);
  const bool stray = !child && !page.covers();
  const bool marked = held ? held_marks_[(a - hold_.taken_to) / page_] : page.discarded();
  const bool zeros = child  ? child->discards.Contains(a, shift) || !event.minor
                     : lost ? !event.minor  // where a moved mapping is that could not be followed: its frame
                           : stray || (!held && LeftBehind(a)) || marked || !event.minor ||
                                 (page.state() != PageState::kMerged && !page.unconfirmed());
  Address end = a + page_;
  const std::size_t around = zeros ? kZeroAround : kContinueAround;
  for (std::size_t i = 1; i < around && !held; ++i, end += page_) {
    if (child) {
      if (awaits && hold_.run.contains(end)) break;
      if (zeros != child->discards.Contains(end, shift)) break;
      if (!zeros && !table_.Find(end)) break;
    } else {
      const Page next = table_.Load(Translate(end));
      if (next.busy() || !next.covers()) break;
      if (zeros ? !next.discarded() : next.discarded() || next.state() != PageState::kMerged) break;
    }
  }
  const Span span{a, end - a};
  if (zeros) {
    if (!FillZeros(context, span)) system_.Yield();  // it faults again
  } else {
    std::size_t most = span.bytes;
    bool refused = false;
    for (std::size_t done = 0; done < span.bytes;) {
      // Unmarked where the scanner reads: should the frame be reclaimed, the mark would look like a page that is swapped out.
      const os::Partial filled = system_.Continue(context, {a + done, std::min(most, span.bytes - done)}, !held);
      refused = filled.error == -EPERM || filled.error == -EACCES;
      done += filled.done;
      if (filled.error == -EEXIST) done += page_;
      else if (filled.error == -ENOENT && most > page_) most = page_;  // neighbours need not be of the same run
      else if (filled.error) break;
    }
    if (refused && page.covers() && pool_.Live(page.value())) {
      // A filter: a copy of the frame serves as well, and counts as a break once it is seen.
      system_.Copy(context, a, pool_.Bytes(page.value()), page_, false);
    }
  }
  system_.Wake(context, span);
}

// A fork or a raw clone: from here on the parent serves the child's registrations.
void Engine::OnFork(os::Context context, Child* parent, os::Context child_context) {
  const int shift = std::countr_zero(page_);
  Child* child = children_.Add(child_context, context == os::kSyncBreaker || (parent && parent->sync));
  if (!child) {
    // Its memory stays valid, but for what is out of its place at this moment; raw discards in it are not seen.
    system_.CloseContext(child_context);
    unserved_children_.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  Add(counters_.children, 1);
  if (parent) {
    // Forked before its parent had everything: it is served too, and what it has inherited is there already.
    child->before_settled = parent->before_settled || parent->being_served;
    child->discards.CopyFrom(parent->discards);
    return;
  }
  Address at = 0;
  while (Segment* segment = table_.NextSegment(at)) {
    at = segment->start + kSegmentBytes;
    for (std::size_t i = 0; i < table_.pages_per_segment(); ++i) {
      Words* word = table_.Word(segment, i);
      if (word && Page(word->load(std::memory_order_acquire)).discarded()) {
        child->discards.Add(segment->start + i * page_, shift);
      }
    }
  }
  ServeHold(child);
}

// Pages that the scanner has taken out of their run are not where the child would look: it gets copies. Their marks are
// not in their words for the time being.
void Engine::ServeHold(Child* child) {
  const int shift = std::countr_zero(page_);
  // The scanner's own move may be done and its event still to come, and a page that is swapped out cannot be told from a
  // mark before the marks have been cleared: the child is served then, and what it touches of the run waits.
  child->before_settled = hold_.run.bytes && !hold_.settled;
  if (child->before_settled) return;
  child->being_served = true;
  for (Address a = hold_.run.start; a < hold_.run.end(); a += page_) {
    const Page page = table_.Load(a);
    // What had been discarded when the event was read; a discard since then is the parent's alone.
    if (!page.busy() || child->discards.Contains(a, shift)) continue;
    const std::size_t i = (a - hold_.run.start) / page_;
    ServeHeld(child, i);
    // Not before it is served: what it discards meanwhile has to show.
    if (held_marks_[i]) child->discards.Add(a, shift);
  }
  child->being_served = false;
  system_.Wake(child->context, hold_.run);
  for (std::size_t k = 0; k < children_.size(); ++k) {
    if (children_[k]->before_settled) ServeHold(children_[k]);
  }
}

// Page i of the hold, to the child; not if it has discarded it. A page that is going back itself is in buffer_ before it
// does: looked for in either place, it could be gone by the time it is read, and this thread would wait for itself.
void Engine::ServeHeld(Child* child, std::size_t i) {
  const int shift = std::countr_zero(page_);
  const Address a = hold_.run.start + i * page_, taken = hold_.taken_to + i * page_;
  const bool copied = hold_.copied ? held_filled_[i] : held_kept_[i];
  // A frame, which the child's fault maps, or nothing: to read it here would be a fault for this thread to answer.
  if (!copied && (hold_.copied || held_moved_[i] || !IsPrivate(taken, hold_.settled))) return;
  for (int attempt = 0; attempt < 100; ++attempt) {
    if (copied || system_.ReadProgram(taken, event_scratch_, page_) == page_) {
      const std::byte* const bytes = copied ? buffer_ + i * page_ : event_scratch_;
      int error = system_.Copy(child->context, a, bytes, page_, true).error;
      if (error == -ENOENT && NowAt(a) != a) error = system_.Copy(child->context, NowAt(a), bytes, page_, true).error;
      if (error != -EAGAIN && error != -ENOMEM) return;
    }
    HandleContext(child->context, child);  // it is discarding, moving or forking already
    if (child->discards.Contains(a, shift)) return;
    system_.Yield();
  }
}

void Engine::OnRemap(const os::Event& event) {
  if (event.to == own_move_to_.load(std::memory_order_acquire) &&
      event.start == own_move_from_.load(std::memory_order_relaxed)) {
    return;
  }
  NoteMove({event.start, event.end, event.to});
}

// Of the moves that were noted, the one that was the scanner's own.
void Engine::ForgetMove(const Moved& moved) {
  const std::size_t n = move_count_.load(std::memory_order_relaxed);
  for (std::size_t i = n; i-- > 0;) {
    if ((*moves_)[i].from != moved.from || (*moves_)[i].to != moved.to || (*moves_)[i].end != moved.end) continue;
    for (std::size_t k = i + 1; k < n; ++k) (*moves_)[k - 1] = (*moves_)[k];
    move_count_.store(n - 1, std::memory_order_release);
    return;
  }
}

void Engine::NoteMove(const Moved& moved) {
  const std::size_t n = move_count_.load(std::memory_order_relaxed);
  if (n == kMaxMoves) {
    // Thousands of moves while the scanner did not run once. From here on no frame is given back and nothing is forgotten;
    // what is discarded in the moved mappings may show again.
    lost_moves_.store(true, std::memory_order_relaxed);
    return;
  }
  (*moves_)[n] = moved;
  move_count_.store(n + 1, std::memory_order_release);
}

// In the old place of a move that has not been followed yet.
bool Engine::LeftBehind(Address a) const {
  for (std::size_t n = move_count_.load(std::memory_order_relaxed); n-- > 0;) {
    const Moved& moved = (*moves_)[n];
    if (a >= moved.to && a - moved.to < moved.end - moved.from) return false;  // something was moved here later
    if (a >= moved.from && a < moved.end) return true;
  }
  return false;
}

// The address under which a page is known whose mapping the program has moved, until the scanner has followed.
Address Engine::Translate(Address a) const {
  for (std::size_t n = move_count_.load(std::memory_order_relaxed); n-- > 0;) {
    const Moved& moved = (*moves_)[n];
    if (a >= moved.to && a - moved.to < moved.end - moved.from) a = moved.from + (a - moved.to);
  }
  return a;
}

// Where a page of the hold has been moved to, as far as the events tell that have been read. Under events_mutex_.
Address Engine::NowAt(Address a) const {
  const std::size_t n = move_count_.load(std::memory_order_relaxed);
  for (std::size_t i = 0; i < n; ++i) {
    const Moved& moved = (*moves_)[i];
    if (a >= moved.from && a < moved.end) a = moved.to + (a - moved.from);
  }
  return a;
}

Address Engine::WhereNow(Address a) {
  std::lock_guard lock(events_mutex_);
  return NowAt(a);
}

// A fork whose event has not been handled yet has copied mappings of which only we know what was discarded in them. Called
// when such a mapping is seen to be gone, before what is known of it is forgotten.
void Engine::AwaitForks(std::uint64_t until) {
  while (EventsPending(until)) system_.Yield();
  std::lock_guard lock(events_mutex_);
}

// An event of the breakers has not been read, or whoever raised it has not run since. Where threads discard without a
// pause there is no instant without one: what happened before `until` has been read long ago by then, and that is what
// the callers wait for.
bool Engine::EventsPending(std::uint64_t until) {
  if (!system_.EventPending(os::kBreaker) && !system_.EventPending(os::kSyncBreaker)) return false;
  return system_.NowNanoseconds() < until;
}

std::uint64_t Engine::Patience() const { return system_.NowNanoseconds() + kForkPatienceNs; }

// Follows merged memory that the program has moved: its words, and its region. True: nothing is left to follow.
bool Engine::ApplyMoves() {
  while (move_count_.load(std::memory_order_acquire)) {
    Moved moved;
    {
      std::lock_guard lock(events_mutex_);
      moved = (*moves_)[0];
    }
    const Span to{moved.to, moved.end - moved.from};
    const Region* found = regions_.Find(moved.from);
    Region region = found ? *found : Region{};
    region.start = to.start;
    region.end = to.end();
    region.owned = false;
    if (to.end() > PageTable::kLimit || !table_.MakeRange(to) || !regions_.Set(region)) return false;
    if (presence_) presence_->Note(to);
    excluded_.Erase(to);
    AttributesUnread(to);  // those of the old place have come along
    for (os::Context breaker : {os::kBreaker, os::kSyncBreaker}) system_.Wake(breaker, to);
    // The program's own MREMAP_DONTUNMAP leaves the old mapping: empty, but over the frames still.
    os::Mapping left;
    const bool stays = system_.QueryMapping(moved.from, &left) == 0 && left.start <= moved.from;
    for (Segment* segment = table_.NextSegment(to.start); segment && segment->start < to.end();
         segment = table_.NextSegment(segment->start + kSegmentBytes)) {
      LookAnew(segment);
    }
    std::lock_guard lock(events_mutex_);
    for (Address a = moved.from; a < moved.end; a += page_) {
      Words* old_word = table_.Find(a);
      if (!old_word) continue;
      Page page(old_word->load(std::memory_order_acquire));
      if (!page.covers()) continue;
      Words* new_word = table_.Find(to.start + (a - moved.from));
      ForgetPage(to.start + (a - moved.from), new_word);
      Page before(new_word->load(std::memory_order_acquire));
      const Address new_page = to.start + (a - moved.from);
      const std::size_t starts = RunStartsAt(a) + RunStartsAt(new_page);
      while (!Change(new_word, before, page)) {
      }
      const bool over_frame = stays && pool_.Shows(left, a, page.value());
      if (over_frame) pool_.Cover(page.value());
      const Page after = over_frame ? Page().WithState(PageState::kDropped).WithValue(page.value()).WithDiscarded(true) : Page();
      while (!Change(old_word, page, after)) {
      }
      maps_used_ += RunStartsAt(a) + RunStartsAt(new_page) - starts;
    }
    const std::size_t n = move_count_.load(std::memory_order_relaxed);
    for (std::size_t i = 1; i < n; ++i) (*moves_)[i - 1] = (*moves_)[i];
    move_count_.store(n - 1, std::memory_order_release);
  }
  return true;
}

}  // namespace ksmu::engine
