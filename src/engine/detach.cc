// Back to anonymous memory: a run's pages leave the frames' mapping, contents kept, and what it cost in mappings is given
// back.
//
//   copy    what the pages held is read, page by page, while nobody can reach them (hold.cc)
//   land    an empty anonymous mapping, registered with the breaker, is moved over the run: who comes waits, as before
//   join    the page beside the run goes under the breaker too, for as long as the filling takes: the mappings become one
//           before the first page is there, and with it a page comes into its neighbours' anon_vma. Filled anywhere else
//           it would have one of its own, and the kernel would never join it to what lies around it
//   fill    the contents are copied in; refused while an event is unread, so that no discard is undone
//   leave   the breaker lets go of the range, then the waiters go on, and the tracker takes over: one mapping with its
//           neighbours again

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "base/test_point.h"
#include "engine/engine.h"

namespace ksmu::engine {

namespace {
constexpr int kFillTries = 1000;
constexpr std::size_t kFillPages = 16;  // at a time: events are read by nobody meanwhile
constexpr int kLeaveTries = 8;
constexpr std::uint32_t kLandingModes = os::kMissing | os::kWriteProtect;

os::Protection ProtectionOf(const os::Mapping& mapping) {
  return mapping.writable ? os::Protection::kReadWrite : mapping.readable ? os::Protection::kRead : os::Protection::kNone;
}
}  // namespace

// A page beside the run whose mapping the run can become part of again: one of the same region that is there. 0: none.
Address Engine::PageBeside(const Region& region, Span run, const os::Mapping& mapping) {
  const os::ScanRequest request = os::PrivatePages(os::kHuge);
  for (const Address at : {run.start - page_, run.end()}) {
    const Region* owner = regions_.Find(at);
    const Page page = table_.Load(at);
    if (!owner || owner->kind != region.kind || page.covers() || page.busy()) continue;
    // It gets a boundary on either side for a moment, which would split a huge page.
    os::PageRun there;
    const os::ScanResult scan = system_.Scan({at, page_}, request, &there, 1);
    if (scan.error || scan.runs == 0 || (there.categories & os::kHuge)) continue;
    os::Mapping beside;
    if (system_.QueryMapping(at, &beside) != 0 || beside.start > at || !beside.anonymous || beside.shared) continue;
    if (ProtectionOf(beside) == ProtectionOf(mapping) && !beside.executable) return at;
  }
  return 0;
}

// Reads what the taken pages held into buffer_, for those that are not to read as zeros. False: not all of it can go, and
// held_written_ tells which pages have to go back themselves.
bool Engine::CopyHeld() {
  const std::size_t n = hold_.run.bytes / page_;
  const Address taken_to = hold_.taken_to;
  held_filled_.fill(false);
  bool complete = true;
  for (std::size_t i = 0; i < n; ++i) {
    const Page page = table_.Load(hold_.run.start + i * page_);
    const bool own = IsPrivate(taken_to + i * page_, true);
    // Written since the last look at it, and so perhaps pinned: this very page has to go back.
    const bool looked_at = page.state() == PageState::kBroken || page.state() == PageState::kResidue;
    held_written_[i] = looked_at ? held_written_[i] : own;
    // Discarded and not written since: reads as zeros. The rest is read where it is, also what should map its frame: it
    // can have been written, and swapped out, since anybody looked.
    held_filled_[i] = own || !(page.state() == PageState::kDropped || held_marks_[i]);
    complete &= !held_written_[i];
  }
  for (std::size_t i = 0; complete && i < n;) {
    std::size_t end = i + 1;
    while (end < n && held_filled_[end] == held_filled_[i]) ++end;
    const std::size_t bytes = (end - i) * page_;
    if (held_filled_[i]) complete = system_.ReadProgram(taken_to + i * page_, buffer_ + i * page_, bytes) == bytes;
    i = end;
  }
  KSMU_TEST_POINT("detach.copied", hold_.run.start, hold_.run.bytes);
  return complete;
}

bool Engine::IsEmpty(Span span) {
  os::ScanRequest request;
  request.any_of = request.returned = os::kPresent | os::kSwapped;
  os::PageRun found;
  const os::ScanResult scan = system_.Scan(span, request, &found, 1);
  return !scan.error && scan.runs == 0 && scan.walked_to >= span.end();
}

// Moves the empty mapping into the run's place. It is empty and registered all along: whatever is discarded or touched in
// the meantime is marked, or waits, as before.
bool Engine::Land(Span landing, bool* used) {
  *used = false;
  const Span run = hold_.run;
  // The protection may have been changed since it was looked at: copying takes its time.
  os::Mapping current;
  if (system_.QueryMapping(run.start, &current) != 0 || current.start > run.start || current.end < run.end() ||
      current.executable || !pool_.IsPoolMapping(current)) {
    return false;
  }
  if (ProtectionOf(current) != os::Protection::kReadWrite) system_.Protect(landing, ProtectionOf(current));
  {
    std::lock_guard lock(events_mutex_);
    if (NowAt(run.start) != run.start) return false;
    // A child that is forked from here on may find no frame in its place, and gets copies of all.
    hold_.copied = true;
  }
  *used = MoveOwn(landing.start, landing.bytes, run.start) == 0;
  bool landed = *used;
  KSMU_TEST_POINT("detach.landed", run.start, run.bytes);
  AwaitForks(Patience());
  // The program can have moved the run away at this very moment. Then the mapping of the frames is where it has gone to, and
  // what has landed is in nobody's place.
  const Address now = WhereNow(run.start);
  if (landed && now != run.start && (system_.QueryMapping(now, &current) != 0 || current.start > now || pool_.IsPoolMapping(current))) {
    system_.Unmap(run);
    landed = false;
  }
  std::lock_guard lock(events_mutex_);
  hold_.copied = landed;
  return landed;
}

// Puts the page beside the run under the breaker: the two become one mapping. Busy until LetGoOfBeside, so that a discard
// which the breaker announces leaves its mark.
bool Engine::JoinBeside(Address beside, os::Context breaker, bool tracked) {
  const Span page{beside, page_};
  if (!MarkBusy(page)) return false;
  if (!tracked || system_.Unregister(os::kTracker, page) == 0) {
    KSMU_TEST_POINT("detach.beside", hold_.run.start, hold_.run.bytes);
    if (system_.Register(breaker, page, kLandingModes) == 0) return true;
    if (tracked && system_.Register(os::kTracker, page, os::kWriteProtect) != 0) {
      gate_.AddRepair(page, os::kTracker, os::kWriteProtect);
    }
  }
  ClearBusy(page);
  return false;
}

void Engine::LetGoOfBeside(Address beside, os::Context breaker) {
  Words* word = table_.Find(beside);
  Page page(word->load(std::memory_order_acquire));
  while (!Change(word, page, page.WithBusy(false).WithDiscarded(false))) {
  }
  // Announced, and zapped when the discarding thread runs next.
  if (page.discarded()) NoteInFlight(beside);
  system_.Wake(breaker, {beside, page_});
}

// Copies the contents into the place. Returns when each page is there, or known to be discarded, or its place is gone.
void Engine::FillHeld(os::Context breaker) {
  const Span run = hold_.run;
  const std::size_t n = run.bytes / page_;
  const auto wanted = [&](std::size_t i) { return held_filled_[i] && !table_.Load(run.start + i * page_).discarded(); };
  int tries = 0;
  std::size_t most = kFillPages;
  for (std::size_t i = 0, end = 0; i < n;) {
    int error = 0;
    std::size_t asked;
    {
      std::lock_guard lock(events_mutex_);
      while (i < n && !wanted(i)) ++i;
      for (end = i; end < n && end - i < most && wanted(end);) ++end;
      if (i == n) break;
      const Address at = NowAt(run.start + i * page_);
      if (move_count_.load(std::memory_order_relaxed)) end = i + 1;
      const os::Partial copied = system_.Copy(breaker, at, buffer_ + i * page_, (end - i) * page_, false);
      asked = end - i;
      if (copied.done) tries = 0;
      i += copied.done / page_;
      error = copied.error;
    }
    if (error == 0) continue;
    if (error == -EEXIST) {
      ++i;  // the breaker is closed, and somebody has come in between
      continue;
    }
    if (error == -ENOENT) {
      // More than one mapping, or part of it gone: each page for itself. One that is not the breaker's is not ours any more.
      if (asked == 1) ++i;
      most = 1;
      continue;
    }
    // An event is unread, or there is no memory. Where discards leave no instant, and where no breaker holds the place any
    // more, the pages come in a mapping of their own.
    const bool in_time = ++tries < kFillTries && system_.NowNanoseconds() < hold_until_;
    const bool again = error == -ENOMEM || (error == -EAGAIN && in_time);
    if (!again) {
      if (FillByMoving(i, end)) i = end;
      else most = 1;
    }
    system_.Yield();
  }
}

// As a copy, but in a mapping that nobody watches: under events_mutex_, so that no discard is let through before it is there.
bool Engine::FillByMoving(std::size_t first, std::size_t end) {
  const Address place = hold_.run.start + first * page_;
  const Span part{WhereNow(place), (end - first) * page_};
  os::Mapping there;
  const int unknown = system_.QueryMapping(part.start, &there);
  // Gone, or a stranger's by now: there is nothing to fill. Unless it has only been moved, and the event is on its way.
  if (unknown == -ENOENT || (!unknown && (there.start > part.start || !there.anonymous))) {
    AwaitForks(Patience());
    return end - first == 1 && WhereNow(place) == part.start;  // of several the others may be there
  }
  Address from = 0;
  if (unknown || there.end < part.end() || system_.MapAnonymous(0, part.bytes, os::Protection::kReadWrite, &from) != 0) return false;
  auto* const bytes = reinterpret_cast<std::byte*>(from);
  std::memcpy(bytes, buffer_ + first * page_, part.bytes);
  Address until = 0;
  system_.ApplyAttributes({from, part.bytes}, AttributesOf(part, &until));
  bool moved;
  {
    std::lock_guard lock(events_mutex_);
    for (std::size_t i = first; i < end; ++i) {
      const std::size_t offset = (i - first) * page_;
      if (table_.Load(place + offset).discarded()) std::memset(bytes + offset, 0, page_);
    }
    if (ProtectionOf(there) != os::Protection::kReadWrite) system_.Protect({from, part.bytes}, ProtectionOf(there));
    moved = system_.MoveMapping(from, part.bytes, part.start) == 0;
  }
  if (!moved) system_.Unmap({from, part.bytes});
  return moved;
}

// The run is anonymous memory, and under no breaker any more: books it as that, and lets go of the waiters. Not earlier: a
// discard that the breaker announces must find the pages busy, and leave its mark. Its zap can come long after it has been
// announced, and would else find what has been merged there in the meantime.
void Engine::LetGoOfDetached(const Region& region, Address beside, os::Context breaker) {
  const Span run = hold_.run;
  // A fork that came before the pages were there has copied the place without them: its event must still find the hold.
  for (const std::uint64_t patience = Patience();; system_.Yield()) {
    std::lock_guard lock(events_mutex_);
    if (EventsPending(patience)) continue;
    for (std::size_t i = 0; i < run.bytes / page_; ++i) {
      const Address a = run.start + i * page_;
      // Announced since it was taken: the zap is yet to come, and finds what is here now.
      if (table_.Load(a).discarded()) NoteInFlight(a);
      ForgetPage(a, table_.Find(a));
      if (held_filled_[i] && region.kind == Region::kMergeable) {
        Set(a, Page().WithState(PageState::kFresh).WithStamp(pass_));
      }
      Add(counters_.detached, 1);
    }
    const Address taken_to = hold_.taken_to;
    LetGo();
    UnmapTaken(taken_to, run.bytes);
    if (beside) LetGoOfBeside(beside, breaker);
    return;
  }
}

// What was taken goes back, and the run stays what it was.
void Engine::UndoDetach() {
  const Span run = hold_.run;
  for (std::size_t i = 0; i < run.bytes / page_; ++i) {
    // A frame: the fault that comes next maps it again, or zeros, as the page is marked.
    if (!held_written_[i] && !IsPrivate(hold_.taken_to + i * page_, true)) continue;
    if (held_written_[i]) MoveBackHeld(i);
    else ReturnHeld(i);
  }
  EndHold();
}

// Brings a run back to anonymous memory with the same contents: what was merged is copied, what was discarded is empty.
int Engine::Detach(const Region& region, Span run, PageState expected) {
  os::Mapping mapping;
  if (int error = system_.QueryMapping(run.start, &mapping)) return error;
  Address until = 0;
  const os::Attributes attributes = AttributesOf(run, &until);
  if (mapping.executable || attributes.locked || attributes.sealed || attributes.protection_key || until < run.end()) {
    return -EOPNOTSUPP;
  }
  KSMU_TEST_POINT("detach.begin", run.start, run.bytes);
  const Region* owner = regions_.Find(run.start);
  // A region that is being given up is still tracked.
  const bool tracked = owner && owner->kind == Region::kMergeable;
  const Address beside = owner ? PageBeside(*owner, run, mapping) : 0;
  const bool no_reserve = beside && AttributesOf({beside, page_}, &until).no_reserve;
  const os::Context breaker = BreakerOf(region);
  Address fresh = 0;
  if (int error = system_.MapApart(run.bytes, no_reserve, &fresh)) return error;
  const Span landing{fresh, run.bytes};
  system_.ApplyAttributes(landing, attributes);
  int error = system_.Register(breaker, landing, kLandingModes);
  // Where new memory is locked (mlockall), it is not empty.
  if (!error && !IsEmpty(landing)) error = -EOPNOTSUPP;
  if (!error && !TakeFromRun(run, expected)) error = -EAGAIN;
  if (error) {
    system_.Unmap(landing);
    return error;
  }
  KSMU_TEST_POINT("detach.taken", run.start, run.bytes);
  bool used = false;
  if (!CopyHeld() || !Land(landing, &used)) {
    UndoDetach();
    if (!used) system_.Unmap(landing);
    return -ENOMEM;
  }
  KSMU_TEST_POINT("detach.replaced", run.start, run.bytes);
  const bool any = std::any_of(held_filled_.begin(), held_filled_.begin() + static_cast<std::ptrdiff_t>(run.bytes / page_), [](bool b) { return b; });
  // What stays empty needs no neighbour: the tracker's registration joins it.
  const bool joined = any && beside && JoinBeside(beside, breaker, tracked);
  const Span around = joined ? Span{std::min(beside, run.start), run.bytes + page_} : run;
  // Where the pages lay before they were merged, and not where this thread happens to run.
  if (by_node_) system_.PreferNode(pool_.node(table_.Load(run.start).value()));
  FillHeld(breaker);
  if (by_node_) system_.PreferNode(os::kNoNode);
  KSMU_TEST_POINT("detach.filled", run.start, run.bytes);
  // The program may have moved it since.
  const Span gone{WhereNow(run.start), run.bytes};
  os::Mapping there;
  const bool moved = gone.start != run.start && system_.QueryMapping(gone.start, &there) == 0 && there.start <= gone.start &&
                     there.anonymous;
  int left = -ENOMEM;
  for (int attempt = 0; left == -ENOMEM && attempt < kLeaveTries; ++attempt) left = system_.Unregister(breaker, around);
  if (moved) system_.Unregister(breaker, gone);
  KSMU_TEST_POINT("detach.left", run.start, run.bytes);
  LetGoOfDetached(region, joined ? beside : 0, breaker);
  if (left != 0) {
    const Span still = moved ? Span{beside, joined ? page_ : 0} : around;
    if (still.bytes) gate_.AddRepair(still, tracked ? os::kTracker : os::kNoContext, os::kWriteProtect, breaker);
  } else if (tracked) {
    if (int refused = system_.Register(os::kTracker, around, os::kWriteProtect); refused && refused != -ENOENT) {
      gate_.AddRepair(around, os::kTracker, os::kWriteProtect);
    }
  }
  if (tracked && moved) system_.Register(os::kTracker, gone, os::kWriteProtect);
  KSMU_TEST_POINT("detach.tracked", run.start, run.bytes);
  KSMU_TEST_POINT("detach.opened", run.start, run.bytes);
  return 0;
}

}  // namespace ksmu::engine
