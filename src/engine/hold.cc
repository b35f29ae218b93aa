// The hold: pages that lie in a run's mapping are taken out of their place, and what comes back goes in.
//
// Such a page cannot be taken by UFFDIO_MOVE (its mapping is a file's), and the breaker must not let go of it for an
// instant: a discard would leave no trace. So its pages are taken out by mremap(MREMAP_DONTUNMAP): the range stays mapped
// and registered as it was, and whoever touches it waits in the breaker. What comes back goes in under events_mutex_,
// while no event can be read: a discarding thread is then either marked already, or still waiting, and its zap is yet to
// come.

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>

#include "base/test_point.h"
#include "engine/engine.h"

namespace ksmu::engine {

namespace {
constexpr int kCopyTries = 1000;
}

// Moves a mapping that is registered with a breaker: waits until the event has been read.
int Engine::MoveOwn(Address from, std::size_t bytes, Address to) {
  own_move_from_.store(from, std::memory_order_relaxed);
  own_move_to_.store(to, std::memory_order_release);
  const int error = system_.MoveMapping(from, bytes, to);
  // The event has been read, but only with the mutex is it certain that the event thread has looked at it.
  std::lock_guard lock(events_mutex_);
  own_move_to_.store(0, std::memory_order_release);
  return error;
}

// Takes the pages of a run out of their place: accesses wait in the breaker until LetGo, by when the caller has put
// something there. All pages must be covering and known; false: nothing was changed.
bool Engine::TakeFromRun(Span run, PageState expected) {
  Address until = 0;
  const os::Attributes attributes = AttributesOf(run, &until);
  if (!attributes_known_ || attributes.locked || attributes.sealed) return false;
  // Under no breaker nobody would wait, and what is written to the place meanwhile would be lost.
  if (gate_.NeedsRepair() && !gate_.Repair()) return false;
  os::Mapping mapping;
  if (system_.QueryMapping(run.start, &mapping) != 0 || mapping.end < run.end() || mapping.executable) return false;
  // A word on it that the kernel has to write for a thread which cannot wait would not be written.
  if (system_.NowNanoseconds() > unwaitable_until_) RefreshUnwaitable();
  for (Address a = run.start; a < run.end(); a += page_) {
    if (!pool_.Shows(mapping, a, table_.Load(a).value()) || Unwaitable(a)) return false;
  }
  // What is read into it while the run is away must find memory there: it is given back after each pass.
  for (std::size_t i = 0; i < run.bytes; i += page_) {
    volatile std::byte& byte = buffer_[i];
    byte = byte;
  }
  KSMU_TEST_POINT("remerge.begin", run.start, run.bytes);
  const std::uint32_t now = NowSeconds();
  {
    std::lock_guard lock(events_mutex_);
    for (Address a = run.start; a < run.end(); a += page_) {
      const Page page = table_.Load(a);
      // What the caller has judged must be what is taken.
      if (page.state() != expected || page.busy()) return false;
      // Used and discarded again since: that its zap is still to come shows in what is there.
      const bool may_wait = expected == PageState::kDropped || (page.discarded() && !OldEnough(page, now, 0));
      if (may_wait && !IsZapped(a)) return false;
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
    held_kept_.fill(false);
    held_gone_ = {};
  }
  held_since_ = system_.NowNanoseconds();
  hold_until_ = Patience();
  // Where the pages go is not known before they are there: until then this move is noted like one of the program's, whose
  // own moves of the emptied mapping must be noted at once and in their order. For these pages it makes no difference, they
  // are busy.
  Address to = 0;
  const int error = system_.TakePages(run, &to);
  KSMU_TEST_POINT("remerge.away", run.start, run.bytes);
  std::unique_lock lock(events_mutex_);
  if (error) {
    LetGo();
    return false;
  }
  ForgetMove({run.start, run.end(), to});
  hold_.taken_to = to;
  KSMU_TEST_POINT("remerge.taken", run.start, run.bytes);
  lock.unlock();
  NoteWritten({to, run.bytes});
  // Also where the program may not read them: children are served from here.
  system_.Protect({to, run.bytes}, os::Protection::kReadWrite);
  // Where nothing is a mark may lie, and looks like a private page that is swapped out.
  bool cleared = true;
  for (os::Context breaker : {os::kBreaker, os::kSyncBreaker}) {
    while (system_.WriteProtect(breaker, {to, run.bytes}, false) == -EAGAIN && cleared) {
      cleared = system_.NowNanoseconds() < hold_until_;
      system_.Yield();
    }
  }
  if (!cleared) {
    // Where threads discard without a pause there is no instant without an event: the pages go back as they are.
    for (std::size_t i = 0; i < run.bytes / page_; ++i) {
      if (IsPrivate(to + i * page_, true)) MoveBackHeld(i);  // or a mark: that does no harm
    }
    EndHold();
    return false;
  }
  lock.lock();
  Settle();
  return true;
}

// From here on it can be told which of the pages are private, and who was forked since they were taken is served. Under
// events_mutex_.
void Engine::Settle() {
  hold_.settled = true;
  const std::size_t known = children_.size();
  for (std::size_t k = 0; k < children_.size(); ++k) {
    if (children_[k]->before_settled) ServeHold(children_[k]);
  }
  // A grandchild was found on the way: the event thread is to wait for its events, too.
  if (children_.size() != known) system_.Notify();
}

// Ends a hold whose pages are back in their place. A fork or a move of the program's that came before they were may not have
// been read yet: its event must still find the hold.
void Engine::EndHold() {
  const std::size_t n = hold_.run.bytes / page_;
  for (const std::uint64_t patience = Patience();; system_.Yield()) {
    std::unique_lock lock(events_mutex_);
    if (EventsPending(patience)) continue;
    std::size_t lost = 0;
    while (lost < n && !(held_moved_[lost] && NowAt(hold_.run.start + lost * page_) != held_put_[lost])) ++lost;
    if (lost < n) {
      lock.unlock();
      FollowHeld(lost);
      continue;
    }
    if (!hold_.settled) Settle();
    const Address taken_to = hold_.taken_to;
    const std::size_t bytes = hold_.run.bytes;
    LetGo();
    UnmapTaken(taken_to, bytes);
    return;
  }
}

// The program has moved the run since page i went back. Either the page has moved along, or it came to the old place an
// instant too late, and lies there in a mapping of its own.
void Engine::FollowHeld(std::size_t i) {
  const Address a = hold_.run.start + i * page_;
  const Address at = WhereNow(a), put = held_put_[i];
  os::Mapping there;
  const bool too_late = system_.QueryMapping(put, &there) == 0 && there.start <= put &&
                        pool_.Shows(there, put, table_.Load(a).value()) && IsPrivate(put, true);
  if (too_late && MoveOwn(put, page_, at) == 0) {
    if (table_.Load(a).discarded()) system_.Discard({at, page_});
  } else if (too_late) {
    // Refused: a copy keeps the bytes. What lies at the old place is the last of them until there is one.
    {
      std::lock_guard lock(events_mutex_);
      if (!table_.Load(a).discarded() && !(held_kept_[i] && CopyBack(at, buffer_ + i * page_) == 0)) return;
    }
    system_.Unmap({put, page_});
  }
  held_put_[i] = at;
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
  if (hold_.taken_to) counters_.CountGate(system_.NowNanoseconds() - held_since_);
  hold_ = Hold{};
  for (std::size_t k = 0; k < children_.size(); ++k) {
    if (!children_[k]->before_settled) continue;
    children_[k]->before_settled = false;
    for (i = 0; i < run.bytes / page_; ++i) {
      if (held_marks_[i]) children_[k]->discards.Add(run.start + i * page_, std::countr_zero(page_));
    }
    system_.Wake(children_[k]->context, run);
  }
  WakeRun(run);
}

// Those who wait on the run, also where the program has moved it meanwhile.
void Engine::WakeRun(Span run) {
  for (os::Context breaker : {os::kBreaker, os::kSyncBreaker}) {
    system_.Wake(breaker, run);
    if (move_count_.load(std::memory_order_relaxed) == 0) continue;
    for (Address a = run.start; a < run.end(); a += page_) {
      if (NowAt(a) != a) system_.Wake(breaker, {NowAt(a), page_});
    }
  }
}

// True if the program has taken page i's place away or put something else there, and not only moved it.
bool Engine::PlaceIsGone(std::size_t i, Address at) {
  const Address a = hold_.run.start + i * page_;
  os::Mapping there;
  const int unknown = system_.QueryMapping(at, &there);
  if (unknown ? unknown != -ENOENT : there.start <= at && pool_.Shows(there, at, table_.Load(a).value())) return false;
  // The event of a move may still be on its way. Once for a whole hole: it will not be moved any more.
  if (!held_gone_.contains(at)) AwaitForks(Patience());
  if (WhereNow(a) != at) return false;
  if (unknown || there.start > at) held_gone_ = {at, (unknown ? PageTable::kLimit : there.start) - at};
  return true;
}

// A copy into a page's place, whichever breaker holds it. 0: something is there now. Under events_mutex_: it is refused while
// an event is unread, so it cannot undo a discard that has already been let through.
int Engine::CopyBack(Address at, const std::byte* bytes) {
  int error = -EINVAL;
  for (os::Context breaker : {os::kBreaker, os::kSyncBreaker}) {
    const os::Partial copied = system_.Copy(breaker, at, bytes, page_, false);
    if (copied.done == page_ || copied.error == -EEXIST) return 0;
    if (error == -EINVAL || copied.error == -EAGAIN) error = copied.error;
  }
  return error;
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
      const int error = readable ? CopyBack(NowAt(a), scratch_) : -EINVAL;
      if (error == 0) return;
      const bool again = attempt < kCopyTries && system_.NowNanoseconds() < hold_until_;
      if ((error == -EAGAIN && again) || error == -ENOMEM) continue;
    }
    // Neither breaker holds the place any more, or the page cannot be read, or a storm of discards leaves no instant for a
    // copy: it goes back itself. Until it has there is no way out of here, nothing else keeps the bytes.
    KeepCopy(i);
    if (MoveBack(i) == Went::kBack) return;
  }
}

// What a child gets of page i that was forked while the page was out of its place, and whose event is read when it is back.
void Engine::KeepCopy(std::size_t i) {
  const Address from = hold_.taken_to + i * page_;
  // An empty place is not read: that would be a fault, in a storm of discards one that nobody can answer.
  const bool kept = IsPrivate(from, hold_.settled) && system_.ReadProgram(from, buffer_ + i * page_, page_) == page_;
  std::lock_guard lock(events_mutex_);
  held_kept_[i] = kept;
}

// The page itself, pins and all, to its place; registered all along. kBack: it is there, or known to be discarded, or the
// place is gone.
Engine::Went Engine::MoveBack(std::size_t i) {
  const Address a = hold_.run.start + i * page_;
  const Address from = hold_.taken_to + i * page_;
  Address at;
  {
    std::lock_guard lock(events_mutex_);
    if (table_.Load(a).discarded()) return Went::kBack;
    at = NowAt(a);
  }
  if (PlaceIsGone(i, at)) return Went::kBack;
  os::Mapping there;
  const int unknown = system_.QueryMapping(at, &there);
  if (unknown == -ENOENT || (!unknown && !pool_.Shows(there, at, table_.Load(a).value()))) return Went::kAgain;
  // Moved, it would lose the right to execute, which can only have come since it was taken: a copy, if one can be had.
  if (!unknown && there.executable && system_.NowNanoseconds() < hold_until_) return Went::kRefused;
  const bool narrow = !unknown && !(there.readable && there.writable);
  if (narrow) system_.Protect({from, page_}, there.readable ? os::Protection::kRead : os::Protection::kNone);
  bool ready;
  {
    std::lock_guard lock(events_mutex_);
    if (table_.Load(a).discarded()) return Went::kBack;
    ready = NowAt(a) == at && !EventsPending(hold_until_);
  }
  const bool moved = ready && MoveOwn(from, page_, at) == 0;
  if (!moved) {
    if (narrow) system_.Protect({from, page_}, os::Protection::kReadWrite);
    return ready ? Went::kRefused : Went::kAgain;
  }
  {
    std::lock_guard lock(events_mutex_);
    held_moved_[i] = true;
    held_put_[i] = at;
  }
  KSMU_TEST_POINT("remerge.back", hold_.run.start, hold_.run.bytes);
  // A discard that was let through in the meantime may have found the place still empty: it is done over.
  if (table_.Load(a).discarded()) system_.Discard({at, page_});
  return Went::kBack;
}

// Puts the page itself back, not a copy: somebody may have it pinned.
void Engine::MoveBackHeld(std::size_t i) {
  KeepCopy(i);
  KSMU_TEST_POINT("remerge.kept", hold_.run.start, hold_.run.bytes);
  for (;; system_.Yield()) {
    const Went went = MoveBack(i);
    if (went == Went::kBack) return;
    if (went == Went::kRefused) return ReturnHeld(i);  // a copy keeps the bytes at least
  }
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

// Discarded, and not used since.
bool Engine::IsEmptied(Address a, Page page) {
  return (page.state() == PageState::kDropped || (page.state() == PageState::kResidue && page.discarded())) && IsZapped(a);
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
