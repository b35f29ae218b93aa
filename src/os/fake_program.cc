// The program's side of FakeSystem: page faults, threads, forks, pins.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "os/fake_system.h"

namespace ksmu::os {

using fake::Pte;
using fake::Vma;

namespace {
constexpr int kPatience = 4096;
constexpr std::size_t kFaultAround = 16;  // pages
}  // namespace

// --- faults ---------------------------------------------------------------------------------------------------------

bool FakeSystem::Permits(const Vma& v, const Pte& pte, Access access) const {
  if (!pte.present()) return false;
  if (access == Access::kRead) return true;
  if (pte.kind != Pte::kAnon || !pte.exclusive) return false;
  return access == Access::kUnshare || !(pte.uffd_wp && v.Is(kWriteProtect));
}

void FakeSystem::BlockAt(Waiter& w, const Vma& v, Address page, bool write_protect, bool minor, bool write) {
  w.state = Waiter::kAtFault;
  w.context = v.context;
  w.told = false;
  w.fault = Event{};
  w.fault.kind = Event::kFault;
  w.fault.write_protect = write_protect;
  w.fault.minor = minor;
  w.fault.write = write;
  w.fault.start = page;
  contexts_[static_cast<std::size_t>(v.context)]->faults.push_back(&w);
}

void FakeSystem::MapFromFile(Process& p, Vma& v, Address page, bool write, bool keep_mark) {
  const std::uint64_t index = v.page_offset + (page - v.start) / page_size_;
  v.file->Fill(index);
  Pte pte;
  if (write) {
    pte = p.space.NewPage(v.file->At(index));
  } else {
    pte.kind = Pte::kFile;
  }
  pte.uffd_wp = keep_mark;
  p.space.Set(page, pte);
  if (write || v.Is(kWriteProtect | kMinor)) return;
  // Fault-around: what the page cache holds nearby is mapped as well.
  const std::size_t window = kFaultAround * page_size_;
  const Address from = std::max(v.start, page / window * window);
  const Address to = std::min(v.end, page / window * window + window);
  for (Address a = from; a < to; a += page_size_) {
    if (p.space.Get(a).kind != Pte::kNone || !v.file->Cached(v.page_offset + (a - v.start) / page_size_)) continue;
    Pte near;
    near.kind = Pte::kFile;
    p.space.Set(a, near);
  }
}

FakeSystem::FaultResult FakeSystem::Fault(Process& p, Address page, Access access, Waiter& w) {
  Vma* v = p.space.Find(page);
  const bool write = access == Access::kWrite;
  if (v == nullptr || !v->readable || (write && !v->writable)) return FaultResult::kSegv;
  Pte pte = p.space.Get(page);
  if (pte.swapped) {
    pte.swapped = false;
    p.space.Set(page, pte);
    return FaultResult::kRetry;
  }
  if (pte.kind == Pte::kMarker && !v->Is(kWriteProtect)) {  // pte_marker_clear(): left over from a registration
    p.space.Set(page, Pte{});
    return FaultResult::kRetry;
  }
  if (!pte.present()) {
    const bool mark = pte.kind == Pte::kMarker;
    if (v->file == nullptr) {
      if (v->Is(kMissing)) {
        BlockAt(w, *v, page, false, false, write);
        return FaultResult::kBlocked;
      }
      Pte fresh;
      if (write) {
        fresh = p.space.NewPage(nullptr);
      } else {
        fresh.kind = Pte::kZero;
      }
      fresh.uffd_wp = mark;
      p.space.Set(page, fresh);
      return FaultResult::kRetry;
    }
    const bool cached = v->file->Cached(v->page_offset + (page - v->start) / page_size_);
    if (cached ? v->Is(kMinor) : v->Is(kMissing)) {
      BlockAt(w, *v, page, false, cached, write);
      return FaultResult::kBlocked;
    }
    MapFromFile(p, *v, page, write, mark);
    return FaultResult::kRetry;
  }
  // Present, and not permitted: a write, or an unsharing pin, of what is shared or protected.
  if (write && pte.uffd_wp && v->Is(kWriteProtect)) {
    if (!contexts_[static_cast<std::size_t>(v->context)]->wp_async) {
      BlockAt(w, *v, page, true, false, true);
      return FaultResult::kBlocked;
    }
    pte.uffd_wp = false;
  }
  if (pte.kind == Pte::kAnon && (pte.exclusive || (pte.page->mappings == 1 && pte.page->pins == 0))) {
    pte.exclusive = true;
    p.space.Set(page, pte);
    return FaultResult::kRetry;
  }
  Pte copy = p.space.NewPage(p.space.Bytes(*v, page));
  copy.uffd_wp = !write && pte.uffd_wp;
  p.space.Set(page, copy);
  return FaultResult::kRetry;
}

bool FakeSystem::FaultIn(Process& p, Address page, Access access, const char* who) {
  for (int i = 0; i < kPatience; ++i) {
    const Vma* v = p.space.Find(page);
    if (v == nullptr || !v->readable || (access == Access::kWrite && !v->writable)) return false;
    if (v->host) p.space.SyncHost(page);
    if (Permits(*v, p.space.Get(page), access)) return true;
    Waiter waiter;
    switch (Fault(p, page, access, waiter)) {
      case FaultResult::kRetry:
        break;
      case FaultResult::kSegv:
        return false;
      case FaultResult::kBlocked:
        for (int j = 0; j < kPatience && waiter.state != Waiter::kRunning; ++j) {
          if (hooks.other_thread) hooks.other_thread();
        }
        if (waiter.state != Waiter::kRunning) {
          char text[160];
          std::snprintf(text, sizeof text, "%s waits for ever at a fault at %#zx (context %d%s%s)", who,
                        static_cast<std::size_t>(page), waiter.context, waiter.fault.write_protect ? ", WP" : "",
                        waiter.fault.minor ? ", MINOR" : "");
          Violation(text);
          std::erase(contexts_[static_cast<std::size_t>(waiter.context)]->faults, &waiter);
          return false;
        }
    }
  }
  Violation(std::string(who) + " faults for ever");
  return false;
}

// --- threads --------------------------------------------------------------------------------------------------------

void FakeSystem::MapProgram(Address at, std::size_t bytes, const std::function<void(Vma&)>& adjust) {
  Vma v;
  v.start = at;
  v.end = at + bytes;
  v.page_offset = at / page_size_;
  if (adjust) adjust(v);
  program().space.Remove({at, bytes});
  program().space.Insert(v);
}

ThreadId FakeSystem::AddThread(ProcessId process) {
  auto thread = std::make_unique<Thread>();
  thread->process = process;
  threads_.push_back(std::move(thread));
  return static_cast<ThreadId>(threads_.size()) - 1;
}

void FakeSystem::Start(ThreadId id, const FakeOperation& op) {
  Thread& t = *threads_[static_cast<std::size_t>(id)];
  t.busy = true;
  t.phase = 0;
  t.cursor = op.address;
  t.op = op;
  t.outcome = FakeOutcome{};
  t.waiter = Waiter{};
  t.raised.clear();
}

bool FakeSystem::Busy(ThreadId id) const { return threads_[static_cast<std::size_t>(id)]->busy; }

bool FakeSystem::Ready(ThreadId id) const {
  const Thread& t = *threads_[static_cast<std::size_t>(id)];
  return t.busy && t.waiter.state == Waiter::kRunning;
}

const FakeOutcome& FakeSystem::Outcome(ThreadId id) const { return threads_[static_cast<std::size_t>(id)]->outcome; }

std::string FakeSystem::Describe(ThreadId id) const {
  static constexpr const char* kNames[] = {"read", "write",   "direct write", "discard", "unmap",
                                           "map",  "protect", "fork",         "pin",     "swap out"};
  const Thread& t = *threads_[static_cast<std::size_t>(id)];
  if (!t.busy) return "idle";
  char text[200];
  std::snprintf(text, sizeof text, "%s of %#zx+%zu in process %d, %s (context %d, phase %d)", kNames[t.op.kind],
                static_cast<std::size_t>(t.op.address), t.op.bytes, t.process,
                t.waiter.state == Waiter::kRunning   ? "running"
                : t.waiter.state == Waiter::kAtFault ? (t.waiter.fault.write_protect ? "waiting at a WP fault"
                                                        : t.waiter.fault.minor       ? "waiting at a MINOR fault"
                                                                                     : "waiting at a MISSING fault")
                                                     : "waiting for its event to be read",
                t.waiter.context, t.phase);
  return text;
}

bool FakeSystem::Step(ThreadId id) {
  if (!Ready(id)) return false;
  return StepThread(*threads_[static_cast<std::size_t>(id)]);
}

bool FakeSystem::Run(ThreadId id, const FakeOperation& op) {
  Start(id, op);
  while (Step(id)) {
  }
  return Outcome(id).done;
}

void FakeSystem::Finish(Thread& t, int error) {
  t.busy = false;
  t.outcome.done = true;
  t.outcome.error = error;
}

bool FakeSystem::StepThread(Thread& t) {
  Process& p = *processes_[static_cast<std::size_t>(t.process)];
  const Span span{t.op.address, t.op.bytes};
  switch (t.op.kind) {
    case FakeOperation::kRead:
    case FakeOperation::kWrite:
      return StepAccess(t);
    case FakeOperation::kPin:
    case FakeOperation::kDirectWrite:
      return StepPin(t);
    case FakeOperation::kDiscard:
      return StepDiscard(t);
    case FakeOperation::kFork:
      return StepFork(t);
    case FakeOperation::kSwapOut:
      StepSwapOut(t);
      return true;
    case FakeOperation::kUnmap:
      Finish(t, UnmapRange(p, span));
      return true;
    case FakeOperation::kProtect:
      Finish(t, ProtectRange(p, span, t.op.protection));
      return true;
    case FakeOperation::kMap: {
      Vma v;
      v.start = span.start;
      v.end = span.end();
      v.page_offset = v.start / page_size_;
      Finish(t, MapRange(p, v));
      return true;
    }
  }
  return false;
}

bool FakeSystem::StepAccess(Thread& t) {
  Process& p = *processes_[static_cast<std::size_t>(t.process)];
  const Address page = t.op.address / page_size_ * page_size_;
  const bool write = t.op.kind == FakeOperation::kWrite;
  const Access access = write ? Access::kWrite : Access::kRead;
  const Vma* v = p.space.Find(page);
  if (v == nullptr || !v->readable || (write && !v->writable)) {
    Finish(t, -EFAULT);
    return true;
  }
  const Pte pte = p.space.Get(page);
  if (!Permits(*v, pte, access)) {
    if (Fault(p, page, access, t.waiter) == FaultResult::kSegv) Finish(t, -EFAULT);
    return true;
  }
  const std::size_t offset = t.op.address - page;
  if (write) {
    std::copy(t.op.data.begin(), t.op.data.end(), pte.page->data + offset);
  } else {
    const std::byte* bytes = p.space.Bytes(*v, page);
    t.outcome.data.assign(t.op.bytes, std::byte{0});
    if (bytes != nullptr) std::copy(bytes + offset, bytes + offset + t.op.bytes, t.outcome.data.begin());
  }
  Finish(t, 0);
  return true;
}

bool FakeSystem::StepPin(Thread& t) {
  Process& p = *processes_[static_cast<std::size_t>(t.process)];
  const bool direct = t.op.kind == FakeOperation::kDirectWrite;
  const Address page = t.op.address / page_size_ * page_size_;
  if (t.phase == 1) {  // the transfer
    std::copy(t.op.data.begin(), t.op.data.end(), t.pinned->data + (t.op.address - page));
    if (!t.refers) --t.pinned->pins;
    t.pinned.reset();
    Finish(t, 0);
    return true;
  }
  const Access access = direct || t.op.write ? Access::kWrite : Access::kUnshare;
  const Vma* v = p.space.Find(page);
  if (v == nullptr || !v->readable || (access == Access::kWrite && !v->writable)) {
    Finish(t, -EFAULT);
    return true;
  }
  const Pte pte = p.space.Get(page);
  if (!Permits(*v, pte, access)) {
    if (Fault(p, page, access, t.waiter) == FaultResult::kSegv) Finish(t, -EFAULT);
    return true;
  }
  t.refers = direct && direct_io_refers;
  if (!t.refers) ++pte.page->pins;
  if (direct) {
    t.pinned = pte.page;
    t.phase = 1;
    return true;
  }
  t.outcome.pin = static_cast<PinId>(pins_.size());
  pins_.push_back({pte.page, t.process, page, true});
  Finish(t, 0);
  return true;
}

void FakeSystem::StepSwapOut(Thread& t) {
  Process& p = *processes_[static_cast<std::size_t>(t.process)];
  const Vma* v = p.space.Find(t.op.address);
  Pte pte = p.space.Get(t.op.address);
  if (v != nullptr && !v->host && !v->attributes.locked) {
    if (pte.kind == Pte::kAnon && pte.page->pins == 0) {
      pte.swapped = true;
      p.space.Set(t.op.address, pte);
    } else if (pte.kind == Pte::kFile) {
      // The frame goes to swap and may come back to the page cache: the entry is gone, a mark stays.
      Pte left;
      if (pte.uffd_wp && v->Is(kWriteProtect)) {
        left.kind = Pte::kMarker;
        left.uffd_wp = true;
      }
      p.space.Set(t.op.address, left);
    }
  }
  Finish(t, 0);
}

void FakeSystem::ZapRange(Process& p, Span span) {
  for (Vma* v : p.space.In(span)) {
    const Address from = std::max(v->start, span.start), to = std::min(v->end, span.end());
    for (Address a = from; v->host && a < to; a += page_size_) p.space.SyncHost(a);
    for (Address a : p.space.Entries({from, to - from})) p.space.Zap(*v, a);
  }
}

bool FakeSystem::StepDiscard(Thread& t) {
  Process& p = *processes_[static_cast<std::size_t>(t.process)];
  const Address end = t.op.address + t.op.bytes;
  enum { kLook, kQueue, kGoOn, kZap };
  switch (t.phase) {
    case kLook: {
      const Vma* v = p.space.FindFrom(t.cursor);
      if (v == nullptr || v->start >= end) {
        Finish(t, t.cursor < end ? -ENOMEM : t.outcome.error);
        return true;
      }
      if (v->start > t.cursor) {
        t.outcome.error = -ENOMEM;  // a hole; what is mapped is discarded all the same
        t.cursor = v->start;
      }
      if (v->attributes.locked || v->attributes.pfn_map) {
        Finish(t, -EINVAL);
        return true;
      }
      const Address to = std::min(v->end, end);
      if (v->context >= 0 && contexts_[static_cast<std::size_t>(v->context)]->event_remove &&
          !lies.discard_raises_no_event) {
        Event event{};
        event.kind = Event::kRemove;
        event.start = t.cursor;
        event.end = to;
        t.raised = {Raise(v->context, event)};
        t.phase = kQueue;
        return true;
      }
      ZapRange(p, {t.cursor, to - t.cursor});
      t.cursor = to;
      if (t.cursor >= end) Finish(t, t.outcome.error);
      return true;
    }
    case kQueue:
      Queue(t.raised[0], t.waiter);
      t.phase = kGoOn;
      return true;
    case kGoOn:
      GoneOn(t.raised[0]);
      t.phase = kZap;
      return true;
    default: {
      // Looked up again: whatever is mapped there now is what is zapped, up to the end of that mapping.
      const Vma* v = p.space.Find(t.cursor);
      if (v == nullptr) {
        Finish(t, -ENOMEM);
        return true;
      }
      const Address to = std::min({t.raised[0].event.end, v->end, end});
      ZapRange(p, {t.cursor, to - t.cursor});
      t.raised.clear();
      t.cursor = to;
      t.phase = kLook;
      if (t.cursor >= end) Finish(t, t.outcome.error);
      return true;
    }
  }
}

// --- fork -----------------------------------------------------------------------------------------------------------

std::shared_ptr<FakeSystem::Process> FakeSystem::CopyProcess(Process& parent, std::vector<Raised>* raised) {
  auto child = std::make_shared<Process>(page_size_);
  child->id = static_cast<ProcessId>(processes_.size());
  parent.space.SyncAllHost();
  std::map<Context, Context> contexts;  // the parent's -> the child's
  for (const auto& [start, v] : parent.space.vmas()) {
    if (v.attributes.dont_fork) continue;
    Vma copy = v;
    copy.host = false;
    if (v.context >= 0) {
      const ContextState* state = contexts_[static_cast<std::size_t>(v.context)].get();
      if (state->event_fork) {
        auto [it, fresh] = contexts.try_emplace(v.context, -1);
        if (fresh) {
          it->second = static_cast<Context>(contexts_.size());
          auto c = std::make_unique<ContextState>(*state);
          c->events.clear();
          c->faults.clear();
          c->changing = 0;
          c->process = child.get();
          contexts_.push_back(std::move(c));
          Event event{};
          event.kind = Event::kFork;
          event.child = it->second;
          raised->push_back(Raise(v.context, event));
        }
        copy.context = it->second;
      } else {
        copy.context = -1;
        copy.modes = 0;
      }
    }
    child->space.Insert(copy);
    const bool marks = copy.Is(kWriteProtect);
    if (v.attributes.wipe_on_fork && !v.file) continue;
    if (!v.anon_vma && !marks) continue;  // vma_needs_copy(): the child faults them in from the file
    for (Address a : parent.space.Entries({v.start, v.end - v.start})) {
      Pte pte = parent.space.Get(a);
      if (pte.kind == Pte::kMarker && !marks) continue;
      if (pte.kind == Pte::kAnon) {
        if (pte.page->pins > 0 && pte.exclusive) {  // a pinned page is copied at once and stays the parent's
          const bool mark = pte.uffd_wp && marks;
          pte = child->space.NewPage(pte.page->data);
          pte.uffd_wp = mark;
          child->space.Set(a, pte);
          continue;
        }
        pte.exclusive = false;
        parent.space.Set(a, pte);
      }
      pte.uffd_wp = pte.uffd_wp && marks;
      child->space.Set(a, pte);
    }
  }
  processes_.push_back(child);
  return child;
}

bool FakeSystem::StepFork(Thread& t) {
  Process& p = *processes_[static_cast<std::size_t>(t.process)];
  // Phases: 0 copy; then for each event one to raise it and one to go on.
  if (t.phase == 0) {
    t.outcome.child = CopyProcess(p, &t.raised)->id;
  } else {
    const auto i = static_cast<std::size_t>(t.phase - 1) / 2;
    if (t.phase % 2 == 1) {
      Queue(t.raised[i], t.waiter);
    } else {
      GoneOn(t.raised[i]);
    }
  }
  ++t.phase;
  if (static_cast<std::size_t>(t.phase - 1) / 2 == t.raised.size()) Finish(t, 0);
  return true;
}

void FakeSystem::Exit(ProcessId id) {
  Process& p = *processes_[static_cast<std::size_t>(id)];
  if (!p.alive) return;
  p.alive = false;
  for (auto& t : threads_) {
    if (t->process != id || !t->busy) continue;
    for (auto& c : contexts_) {
      std::erase(c->faults, &t->waiter);
      std::erase_if(c->events, [&](const Raised& r) { return r.waiter == &t->waiter; });
    }
    if (t->pinned && !t->refers) --t->pinned->pins;
    t->pinned.reset();
    t->busy = false;
  }
  for (PinState& pin : pins_) {
    if (pin.process == id && pin.live) Unpin(static_cast<PinId>(&pin - pins_.data()));
  }
  std::vector<Span> all;
  for (const auto& [start, v] : p.space.vmas()) all.push_back({start, v.end - start});
  for (Span s : all) p.space.Remove(s);
}

bool FakeSystem::Alive(ProcessId id) const { return processes_[static_cast<std::size_t>(id)]->alive; }

// --- pins -----------------------------------------------------------------------------------------------------------

void FakeSystem::PinWrite(PinId id, std::size_t offset, const std::vector<std::byte>& data) {
  std::copy(data.begin(), data.end(), pins_[static_cast<std::size_t>(id)].page->data + offset);
}

std::vector<std::byte> FakeSystem::PinBytes(PinId id) const {
  const auto& page = *pins_[static_cast<std::size_t>(id)].page;
  return {page.data, page.data + page_size_};
}

bool FakeSystem::PinInPlace(PinId id) const {
  const PinState& pin = pins_[static_cast<std::size_t>(id)];
  const Process& p = *processes_[static_cast<std::size_t>(pin.process)];
  return p.space.Get(pin.address).page == pin.page;
}

void FakeSystem::Unpin(PinId id) {
  PinState& pin = pins_[static_cast<std::size_t>(id)];
  if (!pin.live) return;
  pin.live = false;
  --pin.page->pins;
}

}  // namespace ksmu::os
