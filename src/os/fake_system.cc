#include "os/fake_system.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "os/fake_scope.h"

namespace ksmu::os {

using fake::Pte;
using fake::Vma;

namespace {
constexpr int kPatience = 4096;  // rounds of the other thread before the library is said to hang
}

FakeSystem::FakeSystem(const FakeOptions& options)
    : lies(options.lies),
      max_mappings(options.max_mappings),
      page_size_(options.page_size),
      fork_events_(options.fork_events) {
  features_ = {.kernel_faults = true, .fork_events = fork_events_, .mapping_query = true, .io_uring = false};
  processes_.push_back(std::make_shared<Process>(page_size_));
  for (int i = 0; i < kFirstChild; ++i) {
    auto c = std::make_unique<ContextState>();
    c->process = processes_[0].get();
    contexts_.push_back(std::move(c));
  }
  contexts_[kTracker]->wp_async = contexts_[kTracker]->wp_unpopulated = true;
  contexts_[kGate]->event_remove = true;
  contexts_[kBreaker]->wp_async = true;
  for (Context c : {kBreaker, kSyncBreaker}) contexts_[c]->event_remove = contexts_[c]->event_remap = true;
  for (Context c : {kGate, kBreaker, kSyncBreaker}) contexts_[c]->event_fork = fork_events_;
}

FakeSystem::~FakeSystem() = default;

FakeSystem::ContextState* FakeSystem::Open(Context c) {
  if (c < 0 || static_cast<std::size_t>(c) >= contexts_.size()) return nullptr;
  ContextState* state = contexts_[static_cast<std::size_t>(c)].get();
  return state->open ? state : nullptr;
}

void FakeSystem::WakeRange(Context c, Span span, bool lie) {
  if (lie) return;
  ContextState& state = *contexts_[static_cast<std::size_t>(c)];
  std::erase_if(state.faults, [&](Waiter* w) {
    if (!span.contains(w->fault.start)) return false;
    w->state = Waiter::kRunning;
    return true;
  });
}

// --- registration ---------------------------------------------------------------------------------------------------

int FakeSystem::Register(Context c, Span span, std::uint32_t modes) {
  Scope scope(*this, "Register", c, span);
  if (scope.error != 0) {
    if (scope.call.do_first == 0) return scope.error;
    span.bytes = std::min(span.bytes, scope.call.do_first);
  }
  ContextState* state = Open(c);
  if (state == nullptr || !state->process->alive) return -ESRCH;
  auto& space = state->process->space;
  const auto in = space.In(span);
  if (in.empty()) return -EINVAL;
  for (const Vma* v : in) {
    if (v->context >= 0 && v->context != c) return -EBUSY;
    if (v->shared || v->special || v->attributes.hugetlb || v->attributes.pfn_map) return -EINVAL;
    if ((modes & kMinor) != 0 && v->file == nullptr) return -EINVAL;
  }
  const bool same =
      std::all_of(in.begin(), in.end(), [&](const Vma* v) { return v->context == c && v->modes == modes; });
  if (!same && space.count() + space.SplitsFor(span) > max_mappings) return -ENOMEM;
  space.Change(span, [&](Vma& v) {
    v.context = c;
    v.modes = modes;
  });
  space.RefreshHost(span);
  return scope.error;
}

int FakeSystem::Unregister(Context c, Span span) {
  Scope scope(*this, "Unregister", c, span);
  ContextState* state = Open(c);
  if (state == nullptr || !state->process->alive) return -ESRCH;
  WakeRange(c, span, lies.unregister_wakes_nobody);  // also when it fails
  if (scope.error != 0) return scope.error;
  auto& space = state->process->space;
  const auto in = space.In(span);
  if (in.empty()) return -EINVAL;
  bool any = false;
  for (const Vma* v : in) {
    if (v->context >= 0 && v->context != c) return -EINVAL;
    any |= v->context == c;
  }
  if (any && space.count() + space.SplitsFor(span) > max_mappings) return -ENOMEM;
  space.Change(span, [&](Vma& v) {
    if (v.context != c) return;
    if (v.Is(kWriteProtect)) space.ClearMarks({v.start, v.end - v.start});
    v.context = -1;
    v.modes = 0;
  });
  space.RefreshHost(span);
  return 0;
}

int FakeSystem::WriteProtect(Context c, Span span, bool protect) {
  Scope scope(*this, protect ? "WriteProtect" : "WriteUnprotect", c, span);
  if (scope.error != 0) return scope.error;
  ContextState* state = Open(c);
  if (state == nullptr || !state->process->alive) return -ESRCH;
  if (state->changing > 0) return -EAGAIN;
  auto& space = state->process->space;
  const auto in = space.In(span);
  if (in.empty()) return -ENOENT;
  for (Vma* v : in) {
    if (v->context != c || !v->Is(kWriteProtect)) return -ENOENT;
    const Address from = std::max(v->start, span.start), to = std::min(v->end, span.end());
    if (protect) {
      const bool markers = v->file != nullptr || state->wp_unpopulated;
      for (Address a = from; a < to; a += page_size_) {
        Pte pte = space.Get(a);
        if (pte.kind == Pte::kNone) {
          if (!markers) continue;
          pte.kind = Pte::kMarker;
        }
        pte.uffd_wp = true;
        space.Set(a, pte);
      }
    } else {
      space.ClearMarks({from, to - from});
    }
  }
  if (!protect) WakeRange(c, span, lies.wake_wakes_nobody);
  return 0;
}

// --- filling --------------------------------------------------------------------------------------------------------

Partial FakeSystem::Continue(Context c, Span span, bool protect) {
  Scope scope(*this, "Continue", c, span);
  return scope.Do(span.bytes, [&](std::size_t limit) -> Partial {
    ContextState* state = Open(c);
    if (state == nullptr || !state->process->alive) return {-ESRCH, 0};
    if (state->changing > 0) return {-EAGAIN, 0};
    auto& space = state->process->space;
    Vma* v = space.Find(span.start);
    if (v == nullptr || v->end < span.end() || v->context != c) return {-ENOENT, 0};
    if (v->file == nullptr || (protect && !v->Is(kWriteProtect))) return {-EINVAL, 0};
    v->anon_vma = true;
    Partial result;
    for (; result.done < limit; result.done += page_size_) {
      const Address a = span.start + result.done;
      if (space.Get(a).kind > Pte::kMarker) {
        result.error = -EEXIST;
        break;
      }
      const std::uint64_t index = v->page_offset + (a - v->start) / page_size_;
      if (!v->file->Cached(index)) {
        result.error = -EFAULT;
        break;
      }
      Pte pte;
      pte.kind = Pte::kFile;
      pte.uffd_wp = protect && !lies.continue_forgets_protection;
      space.Set(a, pte);
    }
    if (result.done != 0) WakeRange(c, {span.start, result.done}, lies.wake_wakes_nobody);
    return result;
  });
}

Partial FakeSystem::Move(Context c, Address to, Address from, std::size_t bytes) {
  Scope scope(*this, "Move", c, {from, bytes}, to);
  return scope.Do(bytes, [&](std::size_t limit) -> Partial {
    ContextState* state = Open(c);
    if (state == nullptr || state->process != &program()) return {-EINVAL, 0};
    if (state->changing > 0) return {-EAGAIN, 0};
    auto& space = program().space;
    const Vma *src = space.Find(from), *dst = space.Find(to);
    if (src == nullptr || dst == nullptr || src->end < from + bytes || dst->end < to + bytes) return {-EINVAL, 0};
    if (src->file || dst->file || src->shared || dst->shared || dst->context != c) return {-EINVAL, 0};
    if (!src->readable || !src->writable || src->readable != dst->readable || src->writable != dst->writable ||
        src->executable != dst->executable || src->attributes.locked != dst->attributes.locked ||
        src->attributes.protection_key != dst->attributes.protection_key)
      return {-EINVAL, 0};
    Partial result;
    for (; result.done < limit; result.done += page_size_) {
      const Address s = from + result.done, d = to + result.done;
      if (src->host) space.SyncHost(s);
      Pte pte = space.Get(s);
      if (space.Get(d).kind != Pte::kNone) {
        result.error = -EEXIST;
      } else if (pte.kind == Pte::kNone) {
        result.error = -ENOENT;
      } else if (pte.kind == Pte::kMarker) {
        result.error = -EFAULT;
      } else if (pte.kind == Pte::kAnon &&
                 ((!pte.exclusive && !lies.move_ignores_children) || (pte.page->pins > 0 && !lies.move_ignores_pins))) {
        result.error = -EBUSY;
      }
      if (result.error != 0) break;
      if (lies.move_takes_a_copy && pte.kind == Pte::kAnon) {
        pte = space.NewPage(pte.page->data);
      } else {
        space.Take(s);
      }
      pte.uffd_wp = false;
      space.Set(d, pte);
    }
    return result;
  });
}

Partial FakeSystem::Copy(Context c, Address to, const void* from, std::size_t bytes, bool wake) {
  Scope scope(*this, "Copy", c, {to, bytes});
  return scope.Do(bytes, [&](std::size_t limit) -> Partial {
    ContextState* state = Open(c);
    if (state == nullptr || !state->process->alive) return {-ESRCH, 0};
    if (state->changing > 0) return {-EAGAIN, 0};
    auto& space = state->process->space;
    Vma* v = space.Find(to);
    if (v == nullptr || v->end < to + bytes || v->context != c) return {-ENOENT, 0};
    v->anon_vma = true;
    Partial result;
    for (; result.done < limit; result.done += page_size_) {
      const Address a = to + result.done;
      if (space.Get(a).kind > Pte::kMarker) {  // pte_none_mostly(): a marker is no obstacle
        result.error = -EEXIST;
        break;
      }
      space.Set(a, space.NewPage(static_cast<const std::byte*>(from) + result.done));
    }
    if (wake && result.done != 0) WakeRange(c, {to, result.done}, lies.wake_wakes_nobody);
    return result;
  });
}

Partial FakeSystem::ZeroPage(Context c, Span span) {
  Scope scope(*this, "ZeroPage", c, span);
  return scope.Do(span.bytes, [&](std::size_t limit) -> Partial {
    ContextState* state = Open(c);
    if (state == nullptr || !state->process->alive) return {-ESRCH, 0};
    if (state->changing > 0) return {-EAGAIN, 0};
    auto& space = state->process->space;
    Vma* v = space.Find(span.start);
    if (v == nullptr || v->end < span.end() || v->context != c) return {-ENOENT, 0};
    v->anon_vma = true;
    Partial result;
    for (; result.done < limit; result.done += page_size_) {
      const Address a = span.start + result.done;
      if (space.Get(a).kind != Pte::kNone) {  // pte_none(): a marker is one
        result.error = -EEXIST;
        break;
      }
      Pte pte;
      pte.kind = Pte::kZero;
      if (lies.zero_page_shows_frame && v->file != nullptr) pte.kind = Pte::kFile;
      space.Set(a, pte);
    }
    if (result.done != 0) WakeRange(c, {span.start, result.done}, lies.wake_wakes_nobody);
    return result;
  });
}

int FakeSystem::Wake(Context c, Span span) {
  Scope scope(*this, "Wake", c, span);
  if (scope.error == 0 && Open(c) != nullptr) WakeRange(c, span, lies.wake_wakes_nobody);
  return scope.error;
}

// --- events ---------------------------------------------------------------------------------------------------------

FakeSystem::Raised FakeSystem::Raise(Context c, const Event& event) {
  ++contexts_[static_cast<std::size_t>(c)]->changing;
  return {c, event, nullptr, nullptr};
}

void FakeSystem::Queue(const Raised& raised, Waiter& waiter) {
  if (!contexts_[static_cast<std::size_t>(raised.context)]->open) {  // nobody waits for a context that is closed
    if (raised.event.kind == Event::kFork) {
      Release(*contexts_[static_cast<std::size_t>(raised.event.child)], raised.event.child);
    }
    return;
  }
  waiter.state = Waiter::kForEvent;
  waiter.context = raised.context;
  Raised queued = raised;
  queued.waiter = &waiter;
  contexts_[static_cast<std::size_t>(raised.context)]->events.push_back(queued);
}

void FakeSystem::GoneOn(const Raised& raised) { --contexts_[static_cast<std::size_t>(raised.context)]->changing; }

void FakeSystem::RaiseRemap(Process& process, Span from, Address to, std::vector<Raised>* out) {
  const Vma* v = process.space.Find(from.start);
  if (v->context < 0 || !contexts_[static_cast<std::size_t>(v->context)]->event_remap) return;
  Event event{};
  event.kind = Event::kRemap;
  event.start = from.start;
  event.end = from.end();
  event.to = to;
  out->push_back(Raise(v->context, event));
}

void FakeSystem::WaitRaised(std::vector<Raised>& raised, const char* who) {
  for (const Raised& r : raised) {
    Waiter waiter;
    Queue(r, waiter);
    for (int i = 0; i < kPatience && waiter.state != Waiter::kRunning; ++i) {
      if (hooks.other_thread) hooks.other_thread();
    }
    if (waiter.state != Waiter::kRunning) {
      Violation(std::string(who) + " waits for ever for its event to be read");
      auto& events = contexts_[static_cast<std::size_t>(r.context)]->events;
      std::erase_if(events, [&](const Raised& e) { return e.waiter == &waiter; });
    }
    GoneOn(r);
  }
}

bool FakeSystem::EventPending(Context c) {
  Scope scope(*this, "EventPending", c);
  ContextState* state = Open(c);
  return state != nullptr && state->changing > 0 && !lies.events_never_pending;
}

std::size_t FakeSystem::ReadEvents(Context c, Event* events, std::size_t capacity) {
  Scope scope(*this, "ReadEvents", c);
  ContextState* state = Open(c);
  if (state == nullptr) return 0;
  std::size_t n = 0;
  for (Waiter* w : state->faults) {  // the kernel hands out faults before events
    if (n == capacity) return n;
    if (w->told) continue;
    w->told = true;
    events[n++] = w->fault;
  }
  while (n < capacity && !state->events.empty()) {
    Raised raised = state->events.front();
    state->events.pop_front();
    events[n++] = raised.event;
    if (raised.waiter != nullptr) raised.waiter->state = Waiter::kRunning;
  }
  return n;
}

// The kernel's release of a context: registrations end, everybody goes on. The context of a fork whose event has not
// been read is released with it.
void FakeSystem::Release(ContextState& state, Context c) {
  state.open = false;
  if (state.process->alive) {
    auto& space = state.process->space;
    std::vector<Span> held;
    for (const auto& [start, v] : space.vmas()) {
      if (v.context == c) held.push_back({start, v.end - start});
    }
    for (Span s : held) {
      space.ClearMarks(s);
      space.Change(s, [&](Vma& v) {
        v.context = -1;
        v.modes = 0;
      });
    }
  }
  for (Waiter* w : state.faults) w->state = Waiter::kRunning;
  state.faults.clear();
  for (Raised& r : state.events) {
    if (r.waiter != nullptr) r.waiter->state = Waiter::kRunning;
    if (r.event.kind == Event::kFork) Release(*contexts_[static_cast<std::size_t>(r.event.child)], r.event.child);
  }
  state.events.clear();
}

void FakeSystem::EndLibrary() {
  for (std::size_t i = 0; i < contexts_.size(); ++i) {
    if (contexts_[i]->open) Release(*contexts_[i], static_cast<Context>(i));
  }
}

void FakeSystem::CloseContext(Context child) {
  Scope scope(*this, "CloseContext", child);
  ContextState* state = Open(child);
  if (state != nullptr && child >= kFirstChild) Release(*state, child);
}

bool FakeSystem::ContextAlive(Context child) {
  Scope scope(*this, "ContextAlive", child);
  ContextState* state = Open(child);
  return state != nullptr && state->process->alive;
}

bool FakeSystem::EventsUnread() const {
  for (const auto& c : contexts_) {
    if (c->open && (!c->events.empty() ||
                    std::any_of(c->faults.begin(), c->faults.end(), [](const Waiter* w) { return !w->told; })))
      return true;
  }
  return false;
}

void FakeSystem::Yield() {
  Scope scope(*this, "Yield");
  if (hooks.yield) hooks.yield();
}

void FakeSystem::WaitEvents(const Context*, std::size_t, int) {
  Scope scope(*this, "WaitEvents");
  if (hooks.yield) hooks.yield();
}

}  // namespace ksmu::os
