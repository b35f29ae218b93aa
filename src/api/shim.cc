#include "api/shim.h"

#include <sys/mman.h>

#include <cerrno>

#include "api/state.h"
#include "os/mappings.h"
#include "os/thread.h"
#include "os/without_engine.h"

using namespace ksmu;
using namespace ksmu::api;

namespace {

// Whole pages, as the kernel rounds.
os::Span SpanOf(void* start, std::size_t length) {
  static const std::size_t page = os::SystemPageSize();
  return {reinterpret_cast<os::Address>(start), (length + page - 1) & ~(page - 1)};
}

// None of these sets errno, whatever system calls they make.
class SameErrno {
 public:
  SameErrno() : saved_(errno) {}
  ~SameErrno() { errno = saved_; }
  SameErrno(const SameErrno&) = delete;

 private:
  const int saved_;
};

static_assert(static_cast<int>(EngineState::kNone) == KSMU_SHIM_NONE && static_cast<int>(EngineState::kRunning) == KSMU_SHIM_RUNNING &&
              static_cast<int>(EngineState::kDormant) == KSMU_SHIM_DORMANT && static_cast<int>(EngineState::kRawChild) == KSMU_SHIM_RAW_CHILD);

}  // namespace

extern "C" {

int ksmushim_state(void) { return static_cast<int>(CurrentState()); }

int ksmushim_may_hold(const void* start, size_t length) {
  return presence().MayHold({reinterpret_cast<os::Address>(start), length});
}

void ksmushim_note(const void* start, size_t length) {
  presence().Note({reinterpret_cast<os::Address>(start), length});
}

int ksmushim_call(void* start, size_t length, long number, const long* arguments, long* result) {
  const SameErrno same;
  Use use(Use::kNever);
  if (!use.runtime()) return 0;
  engine::Command command;
  command.kind = engine::Command::kCall;
  command.span = SpanOf(start, length);
  command.number = number;
  for (int i = 0; i < 6; ++i) command.arguments[i] = arguments[i];
  use.runtime()->Execute(&command);
  if (command.result == -EAGAIN) return 0;
  *result = static_cast<long>(command.result);
  return 1;
}

int ksmushim_advise(void* start, size_t length, int advice) {
  const SameErrno same;
  Use use(Use::kNever);
  if (!use.runtime()) return -EAGAIN;
  engine::Command command;
  command.kind = engine::Command::kAdvise;
  command.span = SpanOf(start, length);
  command.promise = advice & KSMU_F_NO_RAW_DISCARDS;
  command.sync_break = advice & KSMU_F_SYNC_BREAK;
  if (command.promise) NotePromise();
  use.runtime()->Execute(&command);
  return static_cast<int>(command.result);
}

int ksmushim_hand_over(void* start, size_t length) {
  const SameErrno same;
  Use use(Use::kNever);
  if (!use.runtime()) return 0;
  engine::Command command;
  command.kind = engine::Command::kHandOver;
  command.span = SpanOf(start, length);
  use.runtime()->Execute(&command);
  return static_cast<int>(command.result);
}

int ksmushim_discard(void* start, size_t length) {
  const SameErrno same;
  const os::Span span = SpanOf(start, length);
  {
    Use use(Use::kNever);
    if (use.runtime()) {
      engine::Command command;
      command.kind = engine::Command::kDiscard;
      command.span = span;
      use.runtime()->Execute(&command);
      if (command.result != -EAGAIN) return static_cast<int>(command.result);
    }
  }
  if (InRawChild() || HasLeftovers()) return os::DiscardWithoutEngine(span);
  return os::DiscardPlainly(span);
}

int ksmushim_raw_discards_are_exact(void) { return !AnyPromise(); }

void ksmushim_forget(void* start, size_t length) {
  const SameErrno same;
  ForgetInherited(SpanOf(start, length));
}

int ksmushim_find_mapping(const void* at, struct ksmushim_mapping* out) {
  const SameErrno same;
  os::Mapping mapping;
  bool frames = false;
  int error = os::QueryFramesOnce(reinterpret_cast<os::Address>(at), &mapping, &frames);
  // No descriptor to be had, or no /proc: an engine has its own.
  Use use(Use::kNever);
  if (error && error != -ENOENT && use.runtime()) {
    engine::Command command;
    command.kind = engine::Command::kFind;
    command.span = {reinterpret_cast<os::Address>(at), 0};
    use.runtime()->Execute(&command);
    error = static_cast<int>(command.result);
    mapping = command.mapping;
    frames = command.frames;
  }
  if (error) return error;
  out->start = reinterpret_cast<void*>(mapping.start);
  out->end = reinterpret_cast<void*>(mapping.end);
  out->prot = (mapping.readable ? PROT_READ : 0) | (mapping.writable ? PROT_WRITE : 0) | (mapping.executable ? PROT_EXEC : 0);
  out->kind = frames ? KSMU_SHIM_FRAMES : mapping.anonymous && !mapping.shared && !mapping.special ? KSMU_SHIM_ANONYMOUS : KSMU_SHIM_OTHER;
  return 0;
}

void ksmushim_begin(void (*when_loaded)(void)) { BeginEarly(when_loaded); }

int ksmushim_fork_prepare(void) {
  const SameErrno same;
  return TryForkPrepare();
}
void ksmushim_fork_parent(void) {
  const SameErrno same;
  AfterForkInParent();
}
void ksmushim_fork_child(void) { AfterForkInChild(); }
void ksmushim_raw_child(void) { AfterRawClone(); }

}  // extern "C"
