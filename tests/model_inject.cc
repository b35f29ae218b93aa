// What is put in between the library's calls.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <string_view>

#include "model_world.h"

namespace ksmu::model {

namespace {

constexpr std::uint64_t kMaxCalls = 60000;  // in one operation

struct Failure {
  const char* call;
  int error;
  bool partial;  // part of it may be done first
};
// The contract's error values, those of memory and of the map limit above all.
constexpr Failure kFailures[] = {
    {"Register", ENOMEM, true},
    {"Unregister", ENOMEM, false},
    {"WriteProtect", EAGAIN, false},
    {"WriteUnprotect", EAGAIN, false},
    {"Continue", EAGAIN, true},
    {"Continue", ENOMEM, true},
    {"Move", EBUSY, true},
    {"Move", EAGAIN, true},
    {"Move", ENOMEM, true},
    {"Copy", ENOMEM, true},
    {"Copy", EAGAIN, true},
    {"ZeroPage", EAGAIN, true},
    {"ZeroPage", ENOMEM, true},
    {"PopulateWrite", ENOMEM, false},
    {"ApplyAttributes", ENOMEM, false},
    {"MapFrames", ENOMEM, false},
    {"MapAnonymous", ENOMEM, false},
    {"MapApart", ENOMEM, false},
    {"MoveMapping", ENOMEM, false},
    {"MoveMapping", EPERM, false},
    {"TakePages", ENOMEM, false},
    {"TakePages", EPERM, false},
    {"Unmap", ENOMEM, false},
    {"Protect", ENOMEM, false},
    {"CreateFile", EMFILE, false},
    {"CreateFile", ENOMEM, false},
    {"WriteFile", ENOMEM, false},
    {"PunchFile", ENOMEM, false},
    {"MapFile", ENOMEM, false},
    {"Scan", ENOMEM, false},
    {"ReadSharing", ENOMEM, false},
    {"ReadProgram", EFAULT, true},
    {"QueryMapping", ENOMEM, false},
    {"ReadAttributes", ENOMEM, false},
};
constexpr int kFailureCount = static_cast<int>(sizeof kFailures / sizeof kFailures[0]);

}  // namespace

int World::Boundary(os::FakeCall& call, bool after) {
  if (after) {
    // Comes from a destructor: nothing may be thrown.
  } else if (fibers_ && !fibers_->in_events() && !fibers_->failure().empty()) {
    throw Livelock(fibers_->failure());
  } else if (!endless_ && fake_.calls() - calls_at_op_ > kMaxCalls) {
    settling_ = endless_ = true;  // thrown once; what unwinds may call
    throw Livelock(std::string("no end of calls; the last one is ") + call.name);
  }
  const bool event_thread = fibers_ && fibers_->in_events();
  if (verbose_ && !after && fibers_) {
    std::printf("      %s %s context %d %d+%zu -> %#zx\n", event_thread ? "event:" : "scan: ", call.name, call.context,
                static_cast<int>(static_cast<std::intptr_t>(call.span.start - base_) / static_cast<int>(page_size_)),
                call.span.bytes / page_size_, static_cast<std::size_t>(call.other));
  }
  int error = 0;
  const bool from_here = op_ < 0 ? fibers_ && started_ : op_ >= trace_.config.refused_from;
  if (!after && from_here && trace_.config.refused == call.name) error = -EPERM;
  if (settling_ || result_.failed) return error;
  const int op = op_;  // the event thread can be interrupted here, and go on in a later operation
  const int occurrence = after ? occurrences_[{event_thread, call.name}]++ : occurrences_[{event_thread, call.name}];
  if (replay_) {
    for (const Action& action : trace_.actions) {
      if (action.op == op && action.event_thread == event_thread && action.after == after &&
          action.occurrence == occurrence && action.call == call.name) {
        if (int e = Apply(action, call)) error = e;
      }
    }
    return error;
  }
  for (int i = 0; i < 6 && Pick(100) < trace_.config.act_percent; ++i) {
    Action action;
    action.op = op;
    action.event_thread = event_thread;
    action.call = call.name;
    action.occurrence = occurrence;
    action.after = after;
    if (!MakeUp(&action, call)) continue;
    result_.actions.push_back(action);
    if (int e = Apply(action, call)) error = e;
  }
  return error;
}

bool World::MakeUp(Action* action, const os::FakeCall& call) {
  const Config& c = trace_.config;
  if (!action->after && Pick(100) < c.fail_percent) {
    if (Pick(8) == 0) {
      for (const char* partial : {"Move", "Continue", "Copy", "ZeroPage"}) {
        if (std::string_view(partial) != call.name || call.span.bytes <= page_size_) continue;
        action->kind = ActionKind::kShort;
        action->a = Pick(static_cast<int>(call.span.bytes / page_size_));
        return true;
      }
    }
    // Not in the table: that would make other runs of all seeds.
    if (std::string_view("QueryNodes") == call.name || std::string_view("BindFile") == call.name) {
      action->kind = ActionKind::kFail;
      action->a = ENOMEM;
      return true;
    }
    const int start = Pick(kFailureCount);
    for (int i = 0; i < kFailureCount; ++i) {
      const Failure& f = kFailures[(start + i) % kFailureCount];
      if (std::string_view(f.call) != call.name) continue;
      // With a page pinned the page tables must be readable: else a pin is not to be told from a merged page.
      if (!pins_.empty() && std::string_view(f.call) == "Scan") break;
      action->kind = ActionKind::kFail;
      action->a = f.error;
      if (f.partial && Pick(3) == 0) action->b = Pick(static_cast<int>(call.span.bytes / page_size_) + 1);
      return true;
    }
  }
  const int r = Pick(100);
  if (r < 30) {
    action->kind = ActionKind::kStart;
    action->a = Pick(static_cast<int>(slots_.size()));
    static constexpr ProgramKind kinds[] = {ProgramKind::kRead,     ProgramKind::kRead,    ProgramKind::kFill,
                                            ProgramKind::kPoke,     ProgramKind::kPoke,    ProgramKind::kDirectPoke,
                                            ProgramKind::kDiscard,  ProgramKind::kDiscard, ProgramKind::kFork,
                                            ProgramKind::kPinWrite, ProgramKind::kPinRead, ProgramKind::kSwapOut,
                                            ProgramKind::kProtect};
    action->b = static_cast<int>(kinds[Pick(13)]);
    // Half of the time what the call is about.
    action->c = Pick(c.pages);
    const auto at = static_cast<std::intptr_t>(call.span.start - base_) / static_cast<std::intptr_t>(page_size_);
    const auto n = static_cast<std::intptr_t>(call.span.bytes / page_size_);
    if (Pick(2) == 0 && at >= 0 && at < c.pages && n > 0) {
      action->c = static_cast<int>(std::min<std::intptr_t>(at + Pick(static_cast<int>(n)), c.pages - 1));
    }
    action->d = 1 + Pick(4);
    action->e = Pick(5);
    return true;
  }
  if (r < 80) {
    action->kind = ActionKind::kStep;
    action->a = Pick(static_cast<int>(slots_.size()));
    return slots_[static_cast<std::size_t>(action->a)].busy;
  }
  if (fibers_->in_events()) {
    action->kind = ActionKind::kBack;
    return in_call_;
  }
  action->kind = ActionKind::kEvents;
  return true;
}

int World::Apply(const Action& action, os::FakeCall& call) {
  ++result_.tally.actions;
  switch (action.kind) {
    case ActionKind::kStart:
      if (StartProgram(action.a, static_cast<ProgramKind>(action.b), action.c, action.d, action.e)) StepSlot(action.a);
      return 0;
    case ActionKind::kStep:
      if (action.a < static_cast<int>(slots_.size())) StepSlot(action.a);
      return 0;
    case ActionKind::kFail:
      ++result_.tally.failures;
      call.do_first = static_cast<std::size_t>(action.b) * page_size_;
      return -action.a;
    case ActionKind::kShort:
      call.do_only = static_cast<std::size_t>(action.a) * page_size_;
      return 0;
    case ActionKind::kEvents:
      if (!fibers_->in_events()) fibers_->RunEvents();
      return 0;
    case ActionKind::kBack:
      if (fibers_->in_events() && in_call_) fibers_->Interrupt();
      return 0;
    case ActionKind::kCount:
      break;
  }
  return 0;
}

// The thread that runs cannot go on: everybody else gets a turn.
void World::GiveWay() {
  StepEverybody();
  if (fibers_->in_events()) {
    if (in_call_) fibers_->Interrupt();
  } else {
    fibers_->RunEvents();
  }
}

}  // namespace ksmu::model
