// The merge: shut, take, prove, attach, drain, drop, book, open. docs/protocol.md goes through it step by step.

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
// How old attributes may be, in ns: a raw madvise in between is seen late; see docs/limits.md.
constexpr std::uint64_t kAttributesLive = 500'000'000, kAttributesOldest = 600'000'000'000;
constexpr std::uint64_t kAttributesWall = 50, kAttributesCpu = 10, kAttributesIdle = 10'000;  // one part in so many
constexpr std::uint64_t kAttributesOfMapping = 2'500;     // ns, to read one more
constexpr std::uint64_t kUnwaitableLive = 2'000'000;
constexpr std::size_t kMaxUnread = 256;
constexpr std::uint64_t kInFlightNs = 2'000'000'000;
constexpr int kZeroTries = 16;
}  // namespace

// Reading smaps costs some microseconds a mapping, of the whole process: it is done rarely, and only what is out of the
// ordinary is kept. A mapping without an entry has no attributes; those that merging itself makes take over what was
// there.
void Engine::RefreshAttributes() {
  attributes_.clear();
  const std::uint64_t cpu = system_.ThreadCpuNanoseconds();
  const int read = system_.ReadAttributes(
      {0, PageTable::kLimit},
      [](void* cookie, const os::AttributedMapping& m) {
        const os::Attributes& a = m.attributes;
        if (a.dont_fork || a.dont_dump || a.huge_page || a.no_huge_page || a.wipe_on_fork || a.locked || a.mergeable ||
            a.sealed || a.hugetlb || a.pfn_map || a.grows_down || a.protection_key || (a.no_reserve && m.mapping.anonymous)) {
          auto& engine = *static_cast<Engine*>(cookie);
          os::AttributedMapping kept = m;
          kept.attributes.no_reserve &= m.mapping.anonymous;  // mappings of frames always have it
          engine.attributes_lost_ |= !engine.attributes_.push_back(kept);
        }
      },
      this);
  // An unreadable smaps is not an empty one.
  attributes_known_ = read >= 0 && !attributes_lost_;
  attributes_lost_ = false;
  if (attributes_known_) not_read_.clear();
  // From its end: where many wait for a CPU, a reading can take longer than it is good for, and would be out of date at once.
  const std::uint64_t now = system_.NowNanoseconds(), cpu_now = system_.ThreadCpuNanoseconds();
  attributes_cost_ = cpu_now - cpu;
  attributes_until_ = now + std::max(kAttributesLive, kAttributesWall * attributes_cost_);
  const std::uint64_t longest = sees_calls_ ? std::min(kAttributesOldest, kAttributesIdle * attributes_cost_) : 0;
  attributes_oldest_ = std::max(attributes_until_, now + longest);
  attributes_cpu_ = cpu_now + kAttributesCpu * attributes_cost_;
  attributes_maps_ = maps_used_;
}

// At most 2 % of the time goes into it, and a tenth of the scanner's own: of fifty processes that share a CPU, each has no more than
// 2 % of it. A scanner with little to do does without for longer, where calls that change attributes are told to us and nobody waits for
// what they have changed. What has been merged since the last reading makes the next one dearer.
bool Engine::AttributesDue(bool awaited) const {
  if (attributes_until_ == 0) return true;
  const std::uint64_t now = system_.NowNanoseconds();
  const std::uint64_t dearer = maps_used_ > attributes_maps_ ? (maps_used_ - attributes_maps_) * kAttributesOfMapping : 0;
  if (now < attributes_until_ + kAttributesWall * dearer) return false;
  return awaited || now >= attributes_oldest_ || system_.ThreadCpuNanoseconds() >= attributes_cpu_ + kAttributesCpu * dearer;
}

// Memory that came after the last reading, or may have been mapped anew since, is not merged before the next one.
void Engine::AttributesUnread(Span span) {
  if (attributes_cost_ < kCheapAttributes) return RefreshAttributes();
  if (not_read_.size() < kMaxUnread && not_read_.push_back(span)) return;
  attributes_until_ = 0;  // too many to remember
  attributes_known_ = false;
}

bool Engine::AttributesUnreadAt(Address a) const {
  return std::any_of(not_read_.begin(), not_read_.end(), [a](const Span& span) { return span.contains(a); });
}

bool Engine::AttributesKnown(Address a) {
  if (AttributesDue(!attributes_known_ || AttributesUnreadAt(a))) RefreshAttributes();
  return attributes_known_ && !AttributesUnreadAt(a);
}

os::Attributes Engine::FindAttributes(Address a, Address* until) {
  if (AttributesDue(false)) RefreshAttributes();
  return LastAttributes(a, until);
}

// The attributes at an address, as they were when smaps was read last; *until: how far they reach.
os::Attributes Engine::LastAttributes(Address a, Address* until) const {
  auto after = std::upper_bound(attributes_.begin(), attributes_.end(), a,
                                [](Address at, const os::AttributedMapping& m) { return at < m.mapping.start; });
  *until = after == attributes_.end() ? PageTable::kLimit : after->mapping.start;
  if (after == attributes_.begin() || (after - 1)->mapping.end <= a) return {};
  *until = (after - 1)->mapping.end;
  return (after - 1)->attributes;
}

// For a mapping that is to take the run's place: not as they were before a call that is known to have changed them.
os::Attributes Engine::AttributesOf(Span run, Address* until) {
  const bool unread = std::any_of(not_read_.begin(), not_read_.end(), [&](const Span& span) {
    return span.start < run.end() && run.start < span.end();
  });
  if (unread || !attributes_known_) RefreshAttributes();
  return FindAttributes(run.start, until);
}

void Engine::RefreshUnwaitable() {
  unwaitable_.clear();
  const std::uint64_t begun = system_.NowNanoseconds();
  system_.VisitUnwaitableWords(
      [](void* cookie, Address word) {
        auto& engine = *static_cast<Engine*>(cookie);
        const Address page = word & ~(engine.page_ - 1);
        if (!engine.unwaitable_.empty() && engine.unwaitable_.back() == page) return true;
        return engine.unwaitable_.push_back(page);
      },
      this);
  std::sort(unwaitable_.begin(), unwaitable_.end());
  // With thousands of threads the look takes its time: not more than a fifth of all.
  const std::uint64_t now = system_.NowNanoseconds();
  unwaitable_until_ = now + std::max(kUnwaitableLive, 4 * (now - begun));
}

bool Engine::Unwaitable(Address page) const {
  return std::binary_search(unwaitable_.begin(), unwaitable_.end(), page);
}

// A discard was announced at a gate, and its page was not taken: the kernel zaps it at a moment of its own, when the
// discarding thread runs next. Merged before that, the page would look like a frame that came back from swap, and show the
// old bytes again. So it is left alone for longer than a thread that is about to run is ever kept waiting.
void Engine::NoteDiscards(Span run, std::size_t from) {
  for (std::size_t i = from; i < run.bytes / page_; ++i) {
    if (gate_.gone(i)) NoteInFlight(run.start + i * page_);
  }
}

void Engine::NoteInFlight(Address page) {
  const std::uint64_t now = system_.NowNanoseconds();
  InFlight& place = in_flight_[in_flight_next_++ % in_flight_.size()];
  if (place.until > now) all_in_flight_until_ = std::max(all_in_flight_until_, place.until);
  place = {page, now + kInFlightNs};
  in_flight_until_ = now + kInFlightNs;
}

bool Engine::DiscardInFlight(Address page, std::uint64_t now) const {
  if (now >= in_flight_until_) return false;
  if (now < all_in_flight_until_) return true;
  for (const InFlight& f : in_flight_) {
    if (f.page == page && now < f.until) return true;
  }
  return false;
}

// What is in the pages from `start` on, for this run and for those of the same batch that follow: to the end of the
// segment, or of the mapping. It is some milliseconds old at most.
void Engine::LookAtPages(Address start, Address limit) {
  const os::ScanRequest request = os::PrivatePages(os::kPresent | os::kWritten | os::kPfnZero);
  const Address end = std::min(limit, (start & ~(kSegmentBytes - 1)) + kSegmentBytes);
  const os::ScanResult scan = system_.Scan({start, end - start}, request, look_runs_, kLookRuns);
  look_.runs = scan.error ? 0 : scan.runs;
  look_.scanned = {start, std::max(scan.error ? end : std::min(scan.walked_to, end), start + page_) - start};
}

// What must hold before a gate is shut on these pages. Every answer can be out of date a moment later; what then happens
// is in docs/limits.md (raw mprotect) or is caught under the gate.
std::size_t Engine::Fit(const Region& region, Address start, std::size_t pages, os::Attributes* attributes,
                        Reason* reason) {
  *reason = Reason::kFailed;
  if (gate_.NeedsRepair()) return 0;
  if (gate_.LeftContext()) all_in_flight_until_ = in_flight_until_ = system_.NowNanoseconds() + kInFlightNs;
  const std::uint64_t now = system_.NowNanoseconds();
  if (now > unwaitable_until_) RefreshUnwaitable();

  if (!(look_.mapping.start <= start && start < look_.mapping.end)) {
    look_ = Look{};
    if (system_.QueryMapping(start, &look_.mapping) != 0 || look_.mapping.start > start) {
      look_ = Look{};
      ForgetRange({start, page_});
      *reason = Reason::kNone;
      return 0;
    }
  }
  const os::Mapping& mapping = look_.mapping;
  if (!mapping.anonymous || mapping.shared || mapping.stack || mapping.special) {
    *reason = IsInherited(mapping) ? Reason::kInherited : Reason::kNone;
    return 0;
  }
  if (!mapping.readable || !mapping.writable) {
    *reason = Reason::kProtection;
    return 0;
  }
  if (mapping.executable) {
    *reason = Reason::kAttributes;
    return 0;
  }
  pages = std::min(pages, static_cast<std::size_t>(std::min(mapping.end, region.end) - start) / page_);

  // Pages that only leave a mapping, which stays as it is, need no fresh look at smaps: what must not be taken, the kernel does
  // not let go.
  if ((attributes || !attributes_known_) && !AttributesKnown(start)) {
    *reason = attributes_known_ ? Reason::kNone : Reason::kAttributes;
    return 0;
  }
  Address until = 0;
  const os::Attributes a = attributes ? FindAttributes(start, &until) : LastAttributes(start, &until);
  pages = std::min(pages, static_cast<std::size_t>(until - start) / page_);
  *reason = a.locked || a.sealed ? Reason::kLocked
            : a.hugetlb || a.pfn_map || a.grows_down || a.wipe_on_fork || a.protection_key ? Reason::kAttributes
                                                                                            : Reason::kNone;
  if (*reason != Reason::kNone) return 0;
  if (attributes) *attributes = a;

  // Pages that are gone, or were written since they were found still, would only make the gate shut for nothing; and a
  // page that somebody has just written may hold a word that the kernel is about to need (a robust mutex).
  if (!(look_.scanned.start <= start && start < look_.scanned.end())) LookAtPages(start, std::min(mapping.end, region.end));
  auto r = static_cast<std::size_t>(
      std::upper_bound(look_runs_, look_runs_ + look_.runs, start,
                       [](Address at, const os::PageRun& run) { return at < run.end; }) - look_runs_);
  const auto fit = [&](const os::PageRun& run) {
    return !(run.categories & os::kPfnZero) && ((now_ && !references_) || !(run.categories & os::kWritten));
  };
  if (r == look_.runs || look_runs_[r].start > start || !fit(look_runs_[r])) {
    *reason = Reason::kNone;  // not there any more: the next sweep sees what is
    return 0;
  }
  Address end = look_runs_[r].end;
  while (++r < look_.runs && look_runs_[r].start == end && fit(look_runs_[r])) end = look_runs_[r].end;
  pages = std::min(pages, static_cast<std::size_t>(end - start) / page_);

  for (std::size_t i = 0; i < pages; ++i) {
    const Page page = table_.Load(start + i * page_);
    const bool in_flight = DiscardInFlight(start + i * page_, now);
    if (!page.busy() && !page.covers() && !in_flight && !Unwaitable(start + i * page_)) continue;
    *reason = page.busy() || page.covers() ? Reason::kNone : in_flight ? Reason::kHot : Reason::kUnwaitable;
    return i;
  }
  *reason = Reason::kNone;
  return pages;
}

bool Engine::MarkBusy(Span run) {
  for (Address a = run.start; a < run.end(); a += page_) {
    Words* word = table_.Make(a);
    if (!word) {
      ClearBusy({run.start, a - run.start});
      return false;
    }
    Page page(word->load(std::memory_order_acquire));
    while (!Change(word, page, page.WithBusy(true).WithDiscarded(false))) {
    }
  }
  return true;
}

void Engine::ClearBusy(Span run) {
  for (Address a = run.start; a < run.end(); a += page_) {
    Words* word = table_.Find(a);
    if (!word) continue;
    Page page(word->load(std::memory_order_acquire));
    while (page.busy() && !Change(word, page, page.WithBusy(false))) {
    }
  }
}

// Exact attach: a mapping of the frames at a free address, registered with the breaker and filled, to be moved over the
// run. The registration moves along, so that the run is never without a context: no discard passes unseen.
int Engine::Prepare(const Region& region, Span run, Frame first, const os::Attributes& attributes, Address* at) {
  if (int error = system_.MapFrames(0, run.bytes, pool_.OsFile(first), pool_.Offset(first), os::Protection::kReadWrite, at)) {
    return error;
  }
  const Span span{*at, run.bytes};
  const os::Context breaker = BreakerOf(region);
  int error = system_.ApplyAttributes(span, attributes);
  if (!error) error = system_.Register(breaker, span, os::kMissing | os::kWriteProtect | os::kMinor);
  for (std::size_t done = 0; !error && done < span.bytes;) {
    const os::Partial filled = system_.Continue(breaker, {span.start + done, span.bytes - done}, true);
    done += filled.done;
    if (filled.error == -EAGAIN) system_.Yield();  // somebody's event is unread: the event thread is at it
    else if (filled.error == -EEXIST) done += page_;
    else error = filled.error;
  }
  if (error) {
    system_.Unmap(span);
    return error;
  }
  KSMU_TEST_POINT("merge.prepared", run.start, run.bytes);
  return 0;
}

// Fast attach, for memory whose discards all go through the library: the frames are mapped in place and armed there.
// Between the mapping and the registration a reader can map frames unprotected, and a writer break them unseen: what is
// there already is passed over and protected afterwards, and the next sweep tells what was broken.
int Engine::AttachFast(const Region& region, Span run, Frame first, const os::Attributes& attributes) {
  Address at = 0;
  if (int error = system_.MapFrames(run.start, run.bytes, pool_.OsFile(first), pool_.Offset(first), os::Protection::kReadWrite, &at)) {
    return error;
  }
  const os::Context breaker = BreakerOf(region);
  constexpr std::uint32_t modes = os::kMissing | os::kWriteProtect | os::kMinor;
  system_.ApplyAttributes(run, attributes);
  KSMU_TEST_POINT("merge.attached", run.start, run.bytes);
  // Without the registration the run is an ordinary private mapping: a writer still gets its own copy. It is repaired.
  const bool registered = system_.Register(breaker, run, modes) == 0;
  if (!registered) {
    gate_.AddRepair(run, breaker, modes);
    return 0;
  }
  KSMU_TEST_POINT("merge.registered", run.start, run.bytes);
  // An unread event can be that of a fork which waits for the gate's first. The gate may be read now: the frames are there.
  bool mapped_already = false;
  for (std::size_t done = 0; done < run.bytes;) {
    const os::Partial filled = system_.Continue(breaker, {run.start + done, run.bytes - done}, true);
    done += filled.done;
    mapped_already |= filled.error == -EEXIST;
    if (filled.error == -EAGAIN) gate_.Drain(), system_.Yield();
    else if (filled.error) done += page_;  // mapped already, or left to a MINOR fault
  }
  KSMU_TEST_POINT("merge.filled", run.start, run.bytes);
  // Somebody came between the mapping and the registration: a reader has an unprotected frame, a writer its own copy.
  while (mapped_already && system_.WriteProtect(breaker, run, true) == -EAGAIN) gate_.Drain(), system_.Yield();
  KSMU_TEST_POINT("merge.protected", run.start, run.bytes);
  return 0;
}

// The pages of the run map frames now: from here on they are merged, or dropped where a discard came in the meantime. One
// that was written already is found broken by the next sweep, as any other.
void Engine::Book(Span run, Frame first) {
  const std::size_t pages = run.bytes / page_;
  for (std::size_t i = 0; i < pages; ++i) {
    const Address a = run.start + i * page_;
    const Frame frame = first + static_cast<Frame>(i);
    Words* word = table_.Find(a);
    pool_.Cover(frame);
    pool_.Share(frame);
    Page from(word->load(std::memory_order_acquire));
    const std::size_t before = RunStartsAt(a);
    for (;;) {
      const bool gone = gate_.gone(i) || from.discarded();
      Page to = Page().WithValue(frame).WithDiscarded(gone);
      to = to.WithState(gone ? PageState::kDropped : PageState::kMerged);
      if (!Change(word, from, to)) continue;
      if (gone) pool_.Unshare(frame);
      Add(counters_.merged_total, 1);
      break;
    }
    maps_used_ += RunStartsAt(a) - before;
  }
  KSMU_PROBE3(merge, run.start, pages, first);
}

// Why the gate could not take the page. Heals what a fork has left non-exclusive: for the rest of the run at once.
Reason Engine::WhyNotTaken(Address page, int error, Span rest, bool* healed) {
  switch (error) {
    case -ENOENT:
      Set(page, Page());
      return Reason::kNone;
    case -EBUSY:
      break;
    case -EAGAIN:
    case 0:
      return Reason::kNone;
    case -EINVAL:
      return Reason::kProtection;
    default:
      return Reason::kFailed;
  }
  const Page known = table_.Load(page);
  std::array<os::Sharing, kMaxRunPages> sharing;
  const std::size_t count = std::min(rest.bytes / page_, sharing.size());
  if (system_.ReadSharing(page, sharing.data(), count) < 0) return Reason::kFailed;
  if (sharing[0] == os::Sharing::kShared) return Reason::kChild;
  if (sharing[0] == os::Sharing::kAbsent) return Reason::kNone;
  if (known.healed()) return Reason::kPinned;  // healed before, and still not to be had
  if (gate_.LeftShut()) return Reason::kNone;
  // One fork takes "exclusive" off every page, for ever, also when the child has long gone; a write brings it back.
  for (std::size_t i = 0; i < count;) {
    std::size_t end = i;
    while (end < count && sharing[end] == os::Sharing::kExclusive) ++end;
    if (end > i) {
      system_.PopulateWrite({page + i * page_, (end - i) * page_});
      *healed = true;
    }
    i = end + 1;
  }
  Set(page, known.WithState(PageState::kFresh).WithReason(Reason::kNone).WithIndexed(false).WithStamp(pass_).WithHealed(true));
  return Reason::kNone;
}

// The page could not be taken this time, for a reason that will have passed: hashed and looked up again in the next pass.
void Engine::LookAgain(Address page) {
  const Page known = table_.Load(page);
  if (known.state() == PageState::kStill) Set(page, Page().WithState(PageState::kFresh).WithStamp(pass_));
}

// Merges pages with the frames from `first` on. Returns how many came to map their frame; the others have a reason.
std::size_t Engine::MergeRun(const Region& region, Address start, std::size_t pages, Frame first) {
  std::size_t merged = 0;
  int heals = 0;
  for (std::size_t i = 0; i < pages;) {
    const Address at = start + i * page_;
    os::Attributes attributes;
    Reason reason;
    const std::size_t n = Fit(region, at, pages - i, &attributes, &reason);
    if (n == 0) {
      if (reason != Reason::kNone) Leave(at, reason);
      else LookAgain(at);
      ++i;
      continue;
    }
    if (const Budget budget = BudgetFor(at, n); budget != Budget::kThere) {
      short_runs_wait_ |= budget == Budget::kNotYet;
      const std::size_t turned_away = budget == Budget::kNotYet ? i + n : pages;
      for (; i < turned_away; ++i) Leave(start + i * page_, Reason::kMapBudget);
      continue;
    }
    const Span run{at, n * page_};
    const Frame frame = first + static_cast<Frame>(i);
    auto leave_run = [&](std::size_t count, int error) {
      for (std::size_t k = 0; k < count; ++k) {
        Leave(at + k * page_, error == -ENOMEM ? Reason::kMapBudget : error == -EBUSY ? Reason::kForeign : Reason::kFailed);
      }
    };
    int attach_error = -EPERM;
    Address prepared = 0;
    if (!region.promise) {
      if (int error = Prepare(region, run, frame, attributes, &prepared)) {
        leave_run(n, error);
        i += n;
        continue;
      }
    }
    if (!MarkBusy(run)) {
      if (prepared) system_.Unmap({prepared, run.bytes});
      break;
    }
    if (int error = gate_.Shut(run)) {
      ClearBusy(run);
      NoteDiscards(run, 0);
      if (prepared) system_.Unmap({prepared, run.bytes});
      leave_run(n, error);
      i += n;
      continue;
    }
    int take_error = 0;
    const std::size_t got = gate_.Take(&take_error);
    std::size_t equal = 0;
    while (equal < got && content::Equal(gate_.Staged(equal), pool_.Bytes(frame + static_cast<Frame>(equal)), page_)) ++equal;
    KSMU_TEST_POINT("merge.proved", run.start, run.bytes);
    std::size_t attached = 0;
    const Span part{at, equal * page_};
    os::Mapping still;
    const bool ours = equal && gate_.StillOurs(part) && system_.QueryMapping(at, &still) == 0 && still.start <= at &&
                      still.end >= part.end() && still.anonymous && still.readable && still.writable && !still.executable;
    if (ours) {
      KSMU_TEST_POINT("merge.attach", run.start, run.bytes);
      if (prepared) {
        attach_error = MoveOwn(prepared, part.bytes, at);
        if (attach_error == 0) attached = equal;
        KSMU_TEST_POINT("merge.attached", run.start, run.bytes);
      } else {
        attach_error = AttachFast(region, part, frame, attributes);
        if (attach_error == 0) attached = equal;
      }
    }
    gate_.Drain();
    KSMU_TEST_POINT("merge.drained", run.start, run.bytes);
    if (attached < got) {
      Add(counters_.gates_undone, 1);
      gate_.GiveBack(attached, got);
    }
    gate_.Drop();
    KSMU_TEST_POINT("merge.dropped", run.start, run.bytes);
    if (attached) Book({at, attached * page_}, frame);
    ClearBusy({at + attached * page_, (n - attached) * page_});
    KSMU_TEST_POINT("merge.booked", run.start, run.bytes);
    gate_.Open(attached);
    NoteDiscards(run, attached);
    if (attached) system_.Wake(BreakerOf(region), {at, attached * page_});
    KSMU_TEST_POINT("merge.opened", run.start, run.bytes);
    if (attached < got) KSMU_TEST_POINT("undo.opened", run.start, run.bytes);
    if (prepared && attached < n) {
      system_.Unmap({prepared + attached * page_, (n - attached) * page_});
    }
    merged += attached;
    i += attached;
    if (attached == n) continue;
    if (attached < equal) {  // the attach itself was refused
      if (ours) {
        leave_run(equal, attach_error);
      } else {  // a discard is under way, or the mapping is not what it was
        for (std::size_t k = 0; k < equal; ++k) LookAgain(at + k * page_);
      }
      i += equal;
    } else if (equal < got) {  // written since it was looked up: another content
      const Page known = table_.Load(start + i * page_);
      if (!known.covers()) {
        Set(start + i * page_, Page().WithState(PageState::kFresh).WithStamp(pass_).WithHealed(known.healed()));
      }
      ++i;
    } else {
      bool healed = false;
      const Address page = start + i * page_;
      reason = WhyNotTaken(page, take_error, {page, (pages - i) * page_}, &healed);
      if (reason != Reason::kNone) Leave(page, reason);
      if (healed && now_ && ++heals < 3) continue;  // ksmu_merge does not wait for the next pass
      ++i;
    }
  }
  if (merged) fruitful_ = true;
  return merged;
}

// The kernel's zero page where zeros were dropped, as its own KSM does (use_zero_pages): the page is there, as it was. To a
// userfaultfd that the program registers later for what is missing, an empty place would be a page that was never written.
// Not where the program has discarded since. Best effort: empty reads the same.
void Engine::MapZeroPage(Span run) {
  Address at = run.start;
  for (int tries = 0; at < run.end() && tries < kZeroTries; ++tries) {
    {
      std::lock_guard lock(events_mutex_);
      while (at < run.end() && table_.Load(at).discarded()) at += page_;
      Address end = at;
      while (end < run.end() && !table_.Load(end).discarded()) end += page_;
      if (at == end) continue;
      const os::Partial mapped = system_.ZeroPage(os::kGate, {at, end - at});
      at += mapped.done;
      if (mapped.error == 0) continue;
      if (mapped.error != -EAGAIN) at += page_;
    }
    gate_.Drain();
  }
}

// All-zero pages need no frame: they are taken out and dropped, and read as zeros again.
std::size_t Engine::DropZeroRun(const Region& region, Address start, std::size_t pages) {
  std::size_t dropped = 0;
  int heals = 0;
  for (std::size_t i = 0; i < pages;) {
    const Address at = start + i * page_;
    Reason reason;
    const std::size_t n = Fit(region, at, pages - i, nullptr, &reason);
    if (n == 0) {
      if (reason != Reason::kNone) Leave(at, reason);
      else LookAgain(at);
      ++i;
      continue;
    }
    const Span run{at, n * page_};
    if (!MarkBusy(run)) break;
    if (int error = gate_.Shut(run, true)) {
      ClearBusy(run);
      NoteDiscards(run, 0);
      for (std::size_t k = 0; k < n; ++k) {
        Leave(at + k * page_, error == -ENOMEM ? Reason::kMapBudget : error == -EBUSY ? Reason::kForeign : Reason::kFailed);
      }
      i += n;
      continue;
    }
    int take_error = 0;
    const std::size_t got = gate_.Take(&take_error);
    std::array<bool, kMaxRunPages> zero{};
    for (std::size_t k = 0; k < got; ++k) zero[k] = content::IsZero(gate_.Staged(k), page_);
    KSMU_TEST_POINT("zero.proved", run.start, run.bytes);
    for (std::size_t k = 0; k < got; ++k) {
      if (!zero[k]) gate_.GiveBack(k, k + 1);
    }
    gate_.Drain();  // a clone made meanwhile gets its pages from staging: before they are dropped
    gate_.Drop();
    KSMU_TEST_POINT("zero.dropped", run.start, run.bytes);
    for (std::size_t k = 0; k < got;) {
      std::size_t end = k + 1;
      while (end < got && zero[end] == zero[k]) ++end;
      if (zero[k]) MapZeroPage({at + k * page_, (end - k) * page_});
      k = end;
    }
    KSMU_TEST_POINT("zero.mapped", run.start, run.bytes);
    for (std::size_t k = 0; k < n; ++k) {
      const Address page = at + k * page_;
      if (k < got && zero[k]) {
        Set(page, Page().WithState(PageState::kZero));
        Add(counters_.zero_total, 1);
        ++dropped;
      } else {
        const Page known = table_.Load(page);
        Set(page, known.WithState(PageState::kFresh).WithReason(Reason::kNone).WithStamp(pass_).WithBusy(false).WithDiscarded(false));
      }
    }
    KSMU_TEST_POINT("zero.tracked", run.start, run.bytes);
    gate_.Open(0);
    NoteDiscards(run, 0);
    KSMU_TEST_POINT("zero.opened", run.start, run.bytes);
    KSMU_PROBE2(zero, run.start, got);
    i += got;
    if (got == n) continue;
    bool healed = false;
    const Address page = start + i * page_;
    reason = WhyNotTaken(page, take_error, {page, (pages - i) * page_}, &healed);
    if (reason != Reason::kNone) Leave(page, reason);
    if (healed && now_ && ++heals < 3) continue;
    ++i;
  }
  if (dropped) fruitful_ = true;
  return dropped;
}

}  // namespace ksmu::engine
