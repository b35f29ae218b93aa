#include "engine/gate.h"

#include <cerrno>

#include "base/test_point.h"
#include "engine/probes.h"

namespace ksmu::engine {

namespace {
constexpr std::uint64_t kRenewNs = 1'000'000'000;
}

Gate::~Gate() {
  if (staging_) system_.Unmap({reinterpret_cast<Address>(staging_), kStagingPages * page_});
}

int Gate::Start() {
  if (!repairs_.reserve(64)) return -ENOMEM;
  return MapStaging();
}

int Gate::MapStaging() {
  Address at = 0;
  if (int error = system_.MapAnonymous(0, kStagingPages * page_, os::Protection::kReadWrite, &at)) return error;
  const Span span{at, kStagingPages * page_};
  // Not inherited: a child must not hold the pages of a merge in hand. Never huge: pages come and go one by one.
  os::Attributes attributes;
  attributes.dont_fork = attributes.dont_dump = attributes.no_huge_page = true;
  system_.ApplyAttributes(span, attributes);
  // UFFDIO_MOVE asks that its target is registered, not for what. Not for missing pages: nobody answers for them here, and
  // mlockall populates all mappings of the process.
  if (int error = system_.Register(os::kStaging, span, os::kWriteProtect)) {
    system_.Unmap(span);
    return error;
  }
  if (staging_) system_.Unmap({reinterpret_cast<Address>(staging_), kStagingPages * page_});
  staging_ = reinterpret_cast<std::byte*>(at);
  base_ = 0;
  return 0;
}

// Populated and locked by mlockall, it takes no page any more (UFFDIO_MOVE: EINVAL, EEXIST): another one does.
void Gate::RenewStaging() {
  const std::uint64_t now = system_.NowNanoseconds();
  refused_ = false;
  if (now < renewed_at_ + kRenewNs) return;
  renewed_at_ = now;
  MapStaging();
}

int Gate::Shut(Span run, bool zero) {
  zero_ = zero;
  run_ = run;
  pages_ = run.bytes / page_;
  if (refused_) RenewStaging();
  if (base_ + pages_ > kStagingPages) FlushStaging();
  for (std::size_t i = 0; i < pages_; ++i) state_[i] = kThere, gone_[i] = false;
  if (int error = system_.Unregister(os::kTracker, run)) return error;
  KSMU_TEST_POINT(zero_ ? "zero.untracked" : "merge.untracked", run.start, run.bytes);
  shut_at_ = system_.NowNanoseconds();
  if (int error = system_.Register(os::kGate, run, os::kMissing | os::kWriteProtect)) {
    // Part of the run may be registered all the same.
    const bool left = system_.Unregister(os::kGate, run) == 0;
    Drain();
    if (!left) {
      AddRepair(run, os::kTracker, os::kWriteProtect, os::kGate);
    } else if (system_.Register(os::kTracker, run, os::kWriteProtect) != 0) {
      AddRepair(run, os::kTracker, os::kWriteProtect);
    }
    system_.Wake(os::kGate, run);
    return error;
  }
  shut_ = true;
  Add(counters_.gate_count, 1);
  KSMU_TEST_POINT(zero_ ? "zero.shut" : "merge.shut", run.start, run.bytes);
  return 0;
}

std::size_t Gate::Take(int* error) {
  *error = 0;
  std::size_t taken = 0;
  for (int attempt = 0; taken < pages_;) {
    const os::Partial moved = system_.Move(os::kStaging, reinterpret_cast<Address>(Staged(taken)),
                                           run_.start + taken * page_, (pages_ - taken) * page_);
    for (std::size_t i = taken; i < taken + moved.done / page_; ++i) state_[i] = kTaken;
    taken += moved.done / page_;
    if (moved.done) attempt = 0;
    if (!moved.error) {
      if (!moved.done) break;
      continue;
    }
    // EAGAIN with something moved is how a partial move ends: the next call gives the reason. Without progress the page
    // is contended (folio lock, migration); a few tries, then it is left.
    if (moved.error == -EAGAIN && (moved.done || ++attempt < 4)) continue;
    *error = moved.error;
    refused_ = moved.error == -EINVAL || moved.error == -EEXIST;
    break;
  }
  KSMU_TEST_POINT(zero_ ? "zero.taken" : "merge.taken", run_.start, run_.bytes);
  return taken;
}

bool Gate::ReturnPage(std::size_t i) {
  const Address to = run_.start + i * page_;
  const Address from = reinterpret_cast<Address>(Staged(i));
  os::Partial moved = system_.Move(os::kGate, to, from, page_);
  if (moved.done == page_) return true;
  if (moved.error == -EAGAIN) return false;  // an event is unread: Drain, then the page may be gone
  // The mapping is not readable and writable any more (a raw mprotect): a copy goes in whatever the protection. That the
  // page could be taken has shown that nobody has it pinned, and nobody but us can reach it in staging.
  moved = system_.Copy(os::kGate, to, Staged(i), page_, false);
  if (moved.error == -EAGAIN) return false;
  // ENOENT: unmapped by somebody without a word; there is nothing to give it back to.
  if (moved.done == page_ || moved.error == -EEXIST || moved.error == -ENOENT) {
    system_.Discard({from, page_});
    return true;
  }
  if (moved.error == -EPERM || moved.error == -EACCES || moved.error == -ESRCH) {
    // A filter refuses the ioctl, or has made us close the gate (ESRCH): the mapping itself can still be moved. What it
    // loses is replayed by the next pass.
    os::Mapping mapping;
    const bool known = system_.QueryMapping(to, &mapping) == 0 && mapping.start <= to;
    if (system_.MoveMapping(from, page_, to) == 0) {
      if (known && !(mapping.readable && mapping.writable)) {
        system_.Protect({to, page_}, mapping.readable ? os::Protection::kRead : os::Protection::kNone);
      }
      Address again = 0;
      if (system_.MapAnonymous(from, page_, os::Protection::kReadWrite, &again) == 0) {
        system_.Register(os::kStaging, {from, page_}, os::kWriteProtect);
      }
      return true;
    }
  }
  return false;  // no memory: it is tried again until there is some. Nothing else would keep the bytes
}

void Gate::GiveBack(std::size_t from, std::size_t to) {
  KSMU_TEST_POINT("undo.begin", run_.start, run_.bytes);
  for (std::size_t i = from; i < to; ++i) {
    if (state_[i] != kTaken) continue;
    while (!gone_[i] && !ReturnPage(i)) {
      Drain();
      system_.Yield();
    }
    if (!gone_[i]) state_[i] = kReturned;
  }
  KSMU_TEST_POINT("undo.moved", run_.start, run_.bytes);
}

void Gate::ReadEvents() {
  os::Event events[16];
  while (std::size_t n = system_.ReadEvents(os::kGate, events, 16)) {
    for (std::size_t e = 0; e < n; ++e) {
      const os::Event& event = events[e];
      switch (event.kind) {
        case os::Event::kRemove:
        case os::Event::kUnmap:
          for (std::size_t i = 0; i < pages_; ++i) {
            const Address page = run_.start + i * page_;
            if (event.start <= page && page < event.end) gone_[i] = true;
          }
          break;
        case os::Event::kFork:
          ServeChild(event.child);
          break;
        case os::Event::kFault:
          // Waiters are woken by Open. A fault outside the run in hand: a registration that could not be taken back.
          if (!run_.contains(event.start) || !shut_) {
            system_.ZeroPage(os::kGate, {event.start, page_});
            system_.Wake(os::kGate, {event.start, page_});
          }
          break;
        case os::Event::kRemap:
          break;
      }
    }
  }
}

void Gate::ServeChild(os::Context child) {
  std::array<bool, kMaxRunPages> gone = gone_;
  for (std::size_t i = 0; i < pages_; ++i) {
    if (state_[i] != kTaken) continue;
    for (int attempt = 0; attempt < 100 && !gone[i]; ++attempt) {
      const os::Partial copied = system_.Copy(child, run_.start + i * page_, Staged(i), page_, true);
      // EEXIST: it has the page. ENOENT: its mapping is not the gate's (the fork came after the attach).
      if (copied.done == page_ || copied.error == -EEXIST || copied.error == -ENOENT || copied.error == -ESRCH) break;
      // It may be discarding, or forking, already: that is what EAGAIN says.
      os::Event events[8];
      const std::size_t n = system_.ReadEvents(child, events, 8);
      for (std::size_t e = 0; e < n; ++e) {
        if (events[e].kind == os::Event::kFork) ServeChild(events[e].child);
        if (events[e].kind != os::Event::kRemove) continue;
        for (std::size_t k = 0; k < pages_; ++k) {
          const Address page = run_.start + k * page_;
          if (events[e].start <= page && page < events[e].end) gone[k] = true;
        }
      }
      system_.Yield();
    }
  }
  system_.Unregister(child, run_);
  system_.Wake(child, run_);
  system_.CloseContext(child);
}

// Every event but a fault holds the gate's changes up until it has been read; faults need no reading, Open wakes them.
void Gate::Drain() {
  while (system_.EventPending(os::kGate)) {
    ReadEvents();
    system_.Yield();
  }
}

void Gate::Drop() {
  std::size_t used = 0;
  for (std::size_t i = 0; i < pages_; ++i) {
    if (state_[i] != kTaken) continue;
    state_[i] = kReturned;
    used = i + 1;
  }
  base_ += used;
}

void Gate::FlushStaging() {
  if (base_ == 0) return;
  system_.Discard({reinterpret_cast<Address>(staging_), base_ * page_});
  base_ = 0;
}

void Gate::Open(std::size_t attached) {
  const Span tail{run_.start + attached * page_, (pages_ - attached) * page_};
  if (tail.bytes) {
    if (system_.Unregister(os::kGate, tail) == 0) {
      Drain();  // events raised under the registration that has just ended
      if (int error = system_.Register(os::kTracker, tail, os::kWriteProtect); error && error != -ENOENT) {
        AddRepair(tail, os::kTracker, os::kWriteProtect);
      }
    } else {
      AddRepair(tail, os::kTracker, os::kWriteProtect, os::kGate);
    }
    KSMU_TEST_POINT("undo.tracked", run_.start, run_.bytes);
  }
  system_.Wake(os::kGate, run_);
  shut_ = false;
  const auto held = static_cast<std::int64_t>(system_.NowNanoseconds() - shut_at_);
  counters_.CountGate(static_cast<std::uint64_t>(held));
  KSMU_PROBE3(gate_open, run_.start, pages_, held);
}

bool Gate::Repair() {
  for (std::size_t i = 0; i < repairs_.size();) {
    const Registration& r = repairs_[i];
    int error = 0;
    if (r.leave != os::kNoContext) {
      error = system_.Unregister(r.leave, r.span);
      if (error == -EINVAL) {
        // Part of it is another context's by now, which refuses the whole: each page for itself.
        error = 0;
        for (std::size_t done = 0; done < r.span.bytes; done += page_) {
          if (system_.Unregister(r.leave, {r.span.start + done, page_}) == -ENOMEM) error = -ENOMEM;
        }
      }
      if (r.leave == os::kGate) {
        run_ = r.span;
        pages_ = 0;
        ReadEvents();
        Drain();
      }
      left_context_ = true;
      system_.Wake(r.leave, r.span);
    }
    if (!error && r.enter != os::kNoContext) error = system_.Register(r.enter, r.span, r.modes);
    // No memory: later. Anything else (gone, replaced, held by somebody else): it is not ours to repair.
    if (error == -ENOMEM || error == -EAGAIN) {
      ++i;
    } else {
      repairs_.erase(i);
    }
  }
  return repairs_.empty();
}

}  // namespace ksmu::engine
