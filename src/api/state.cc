#include "api/state.h"

#include <pthread.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>

#include "base/test_point.h"
#include "broker/door.h"
#include "engine/tunables.h"
#include "os/thread.h"

namespace ksmu::api {
namespace {

thread_local char t_last_error[320];

// All of this is there before the first constructor of the program runs: a static initialiser of a program that is linked
// with the archive may come before ours.
constinit engine::Settings g_settings;

// Of which a thread can tell whether it has it, or is about to: a signal handler that forks must not wait for itself.
thread_local int t_in_mutex = 0;
class HeldMutex {
 public:
  void lock() {
    ++t_in_mutex;
    mutex_.lock();
  }
  bool try_lock() {  // with signals blocked
    if (!mutex_.try_lock()) return false;
    ++t_in_mutex;
    return true;
  }
  void unlock() {
    mutex_.unlock();
    if (t_in_mutex) --t_in_mutex;  // in a child that such a handler has made it is none
  }
  bool held_here() const { return t_in_mutex != 0; }

 private:
  std::mutex mutex_;
};

struct State {
  // Held over starting, stopping and fork; never by a library thread, never while a command is carried out but the last.
  HeldMutex mutex;
  std::atomic<engine::Runtime*> runtime{nullptr};
  std::atomic<std::int64_t> users{0};
  std::int64_t starts = 0;        // starts not yet taken back
  std::int64_t starts_total = 0;
  std::atomic<bool> stopping{false};
  std::atomic<bool> has_threads_in_hand{false};
  std::atomic<int> pid{0};        // of the process that the engine belongs to; 0: nobody has asked yet
  std::atomic<bool> inherited{false};  // libc's fork from a process with an engine: the first use wakes one here
  engine::RuntimeOptions options;
  bool by_first_use = false;
};

constinit State g_state;
// Library threads and functions of the interface outlive static destructors.
static_assert(std::is_trivially_destructible_v<State> && std::is_trivially_destructible_v<engine::Settings>);
State& state() { return g_state; }

// Where a forked child finds what it inherits: this memory is copied by fork, the engine's own is not.
constinit engine::Inheritance g_inheritance;
constinit broker::BrokerDoor g_door;
static_assert(std::is_trivially_destructible_v<broker::BrokerDoor>);
constinit std::atomic<bool> g_promise{false};
constinit std::atomic<bool> g_files_unknown{false};  // frames of an engine that was not at rest when this child was forked
constinit std::atomic<const void*> g_inherited_holder{nullptr};  // something of the thread's that has the list

// The list of inherited regions, while it is read or changed. Held over nothing that allocates or starts a thread. A signal
// handler that unmaps, on the very thread that has it, goes on: the reader takes entry by entry, and what the handler has
// taken out of those to come is not advised.
class InheritedList {
 public:
  InheritedList() : again_(g_inherited_holder.load(std::memory_order_relaxed) == &t_last_error) {
    for (const void* nobody = nullptr;
         !again_ && !g_inherited_holder.compare_exchange_weak(nobody, &t_last_error, std::memory_order_acquire); nobody = nullptr) {
      os::YieldThread();
    }
  }
  ~InheritedList() {
    if (!again_) g_inherited_holder.store(nullptr, std::memory_order_release);
  }
  InheritedList(const InheritedList&) = delete;

 private:
  const bool again_;
};
using WhenLoaded = void (*)();
constinit WhenLoaded g_when_loaded = nullptr;

void Construct();

using engine::kTunableCount;
const Tunable kTunables[] = {
#define KSMU_TUNABLE(name, least, most, preset) {#name, &g_settings.name, least, most},
    KSMU_FOR_EACH_TUNABLE(KSMU_TUNABLE)
#undef KSMU_TUNABLE
};

// The environment gives initial values: not to what the program has set, and not again at a later start.
std::atomic<bool> g_set_by_program[kTunableCount];
std::atomic<bool> g_set_by_environment[kTunableCount];
bool g_environment_read = false;  // for a start that succeeded
// What the domain has set, and what was there before: that is there again when the domain has been left.
std::atomic<bool> g_set_by_domain[kTunableCount];
std::atomic<std::int64_t> g_before_domain[kTunableCount];

bool ParseInteger(const char* text, std::int64_t* value) {
  const char* end = text + std::strlen(text);
  const auto result = std::from_chars(text, end, *value);
  return *text && result.ec == std::errc() && result.ptr == end;
}

// Which domain is joined when the library starts: what the program says goes before what the environment says. 0 or EINVAL.
int ChooseDomain(const char* broker, const char* domain, engine::RuntimeOptions* options) {
  if (!broker) broker = secure_getenv("KSMU_BROKER");
  if (!domain) domain = secure_getenv("KSMU_DOMAIN");
  if (const char* wrong = g_door.Choose(broker, domain, secure_getenv("XDG_RUNTIME_DIR"))) {
    Fail(EINVAL, wrong);
    return EINVAL;
  }
  options->door = g_door.has_choice() ? &g_door : nullptr;
  return 0;
}

// Values that the environment gives to tunables, once. 0 or EINVAL with a sentence.
int ReadEnvironment(engine::RuntimeOptions* options) {
  std::int64_t values[kTunableCount];
  bool given[kTunableCount] = {};
  for (std::size_t i = 0; i < kTunableCount; ++i) {
    const Tunable& tunable = kTunables[i];
    char name[64] = "KSMU_";
    std::size_t n = 5;
    for (const char* c = tunable.name; *c; ++c) name[n++] = *c >= 'a' && *c <= 'z' ? static_cast<char>(*c - 32) : *c;
    const char* text = secure_getenv(name);
    if (!text) continue;
    given[i] = true;
    if (!ParseInteger(text, &values[i]) || values[i] < tunable.minimum || values[i] > tunable.maximum) {
      os::ErrorText sentence;
      sentence.Set("a tunable's variable in the environment (KSMU_...) has a value that is not a number or out of range");
      Fail(EINVAL, sentence.text);
      return EINVAL;
    }
  }
  if (const char* cpus = secure_getenv("KSMU_CPUS")) {
    if (std::strlen(cpus) >= sizeof options->cpus) {
      Fail(EINVAL, "KSMU_CPUS is too long");
      return EINVAL;
    }
    std::strcpy(options->cpus, cpus);
  }
  if (const int error = ChooseDomain(nullptr, nullptr, options)) return error;
  if (const char* user = secure_getenv("KSMU_USER_MODE_ONLY")) options->user_mode_only = std::strcmp(user, "1") == 0;
  for (std::size_t i = 0; i < kTunableCount && !g_environment_read; ++i) {
    if (given[i] && !g_set_by_program[i].load(std::memory_order_relaxed)) {
      kTunables[i].value->store(values[i], std::memory_order_relaxed);
      g_set_by_environment[i].store(true, std::memory_order_relaxed);
    }
  }
  return 0;
}

// What this thread's fork handlers have done.
struct ForkInHand {
  int depth = 0;  // of a fork in a handler of another one only the outermost counts
  bool locked = false;
  engine::Runtime* paused = nullptr;
  std::uint64_t signals = 0;  // the mask before
};
thread_local ForkInHand t_fork;

// The scanner comes to rest, whoever has the mutex. libc's fork (`patient`) waits for that, too, so that no start and no stop is
// half done in the child; but not while whoever holds it starts or joins threads: that allocates and frees, and an allocator's
// own fork handler may have taken all its locks before this one. Who may fork in a signal handler waits for nobody: the thread
// that has it may wait, in another fork, for what the interrupted code holds.
//
// Signals wait until the fork is over: a handler that forks would wait for libc's list of fork handlers, which is locked from
// before to after in a process with several threads, as it is one by the library's.
void BeginFork(bool patient) {
  State& s = state();
  if (t_fork.depth++) return;
  t_fork.signals = os::BlockSignals();
  t_fork.locked = false;
  while (!s.mutex.held_here() && !(t_fork.locked = s.mutex.try_lock()) && patient &&
         !s.has_threads_in_hand.load(std::memory_order_acquire)) {
    os::YieldThread();
  }
  s.users.fetch_add(1, std::memory_order_seq_cst);
  engine::Runtime* const runtime = s.runtime.load(std::memory_order_seq_cst);
  if (!runtime || s.pid != os::ProcessId()) {
    s.users.fetch_sub(1, std::memory_order_seq_cst);
    return;
  }
  runtime->Pause();
  t_fork.paused = runtime;
  KSMU_TEST_POINT("fork.prepare", 0, 0);
}
void ForkPrepare() { BeginFork(true); }

void ForkParent() {
  State& s = state();
  if (t_fork.depth == 0 || --t_fork.depth) return;
  if (engine::Runtime* const paused = std::exchange(t_fork.paused, nullptr)) {
    paused->Resume();
    s.users.fetch_sub(1, std::memory_order_seq_cst);
  }
  if (std::exchange(t_fork.locked, false)) s.mutex.unlock();
  os::RestoreSignals(t_fork.signals);
}

// In a child, when all is as it is to be: the fork in hand was the parent's.
void ForgetFork() {
  t_in_mutex = 0;
  if (const ForkInHand fork = std::exchange(t_fork, {}); fork.depth) os::RestoreSignals(fork.signals);
}

// Around what starts or joins threads, under the mutex.
class ThreadsInHand {
 public:
  ThreadsInHand() { state().has_threads_in_hand.store(true, std::memory_order_release); }
  ~ThreadsInHand() { state().has_threads_in_hand.store(false, std::memory_order_release); }
  ThreadsInHand(const ThreadsInHand&) = delete;
};

void ForkChild() {
  State& s = state();
  // The parent's engine, its threads and its tables are not here. What is left: the options, and what it knew.
  const bool had = s.runtime.load(std::memory_order_relaxed) != nullptr;
  s.runtime.store(nullptr, std::memory_order_relaxed);
  s.users.store(0, std::memory_order_relaxed);
  s.stopping.store(false, std::memory_order_relaxed);
  // Forked without a rest, as it was being started: nothing is known of what the engine had done by then.
  const bool rested = t_fork.paused;
  if (!rested) g_inheritance.known().count = 0;
  s.has_threads_in_hand.store(false, std::memory_order_relaxed);
  g_inherited_holder.store(nullptr, std::memory_order_relaxed);
  if (had) {
    s.inherited.store(true, std::memory_order_relaxed);
    if (!rested) g_files_unknown.store(true, std::memory_order_relaxed);
    g_inheritance.file_count.store(g_inheritance.child_file_count, std::memory_order_relaxed);
  }
  s.starts_total = 0;
  g_door.ForgetParent();
  ForgetDomain();  // of which the parent is a member
  s.pid.store(os::ProcessId(), std::memory_order_relaxed);
  KSMU_TEST_POINT("fork.child", 0, 0);
  new (&s.mutex) HeldMutex;
  ForgetFork();
}

}  // namespace

bool TryForkPrepare() {
  if (InRawChild()) return false;
  BeginFork(false);
  return true;
}
void AfterForkInParent() { ForkParent(); }
void AfterForkInChild() { ForkChild(); }
void AfterRawClone() {
  State& s = state();
  s.runtime.store(nullptr, std::memory_order_relaxed);
  s.pid.store(-1, std::memory_order_relaxed);  // whatever number it has: in a namespace of its own, perhaps the parent's
  g_inherited_holder.store(nullptr, std::memory_order_relaxed);
  new (&s.mutex) HeldMutex;
  ForgetFork();
}

EngineState CurrentState() {
  State& s = state();
  if (InRawChild()) return EngineState::kRawChild;
  if (s.runtime.load(std::memory_order_acquire)) return EngineState::kRunning;
  return s.inherited.load(std::memory_order_acquire) ? EngineState::kDormant : EngineState::kNone;
}

void ForgetInherited(os::Span span) {
  State& s = state();
  if (!s.inherited.load(std::memory_order_acquire)) return;
  const InheritedList list;
  engine::Inheritance::Regions& inherited = g_inheritance.known();
  for (std::size_t i = 0; i < inherited.count; ++i) {
    engine::Inheritance::Entry& entry = inherited.entries[i];
    if (entry.end <= span.start || entry.start >= span.end()) continue;
    engine::Inheritance::Entry tail = entry;
    tail.start = span.end();
    entry.end = std::max(entry.start, span.start);  // may leave nothing
    if (tail.start >= tail.end) continue;
    if (entry.start >= entry.end) entry = tail;
    // No room for both parts: one less is merged.
    else if (inherited.count < engine::Inheritance::kMaxRegions) inherited.entries[inherited.count++] = tail;
  }
}

void BeginEarly(void (*when_loaded)()) {
  Construct();
  g_when_loaded = when_loaded;
}

bool AnyPromise() { return g_promise.load(std::memory_order_relaxed) || HasLeftovers(); }
void NotePromise() { g_promise.store(true, std::memory_order_relaxed); }

engine::Presence& presence() { return g_inheritance.presence; }

namespace {
// When the library is loaded, or at the first use before that.
void Construct() {
  int none = 0;
  if (state().pid.compare_exchange_strong(none, os::ProcessId(), std::memory_order_relaxed)) {
    pthread_atfork(&ForkPrepare, &ForkParent, &ForkChild);
  }
}

// The normal order of initialisation has come to the library: libc is there, the environment too.
__attribute__((constructor)) void Constructed() {
  Construct();
  if (g_when_loaded) g_when_loaded();
}

// Under the mutex.
int StartRuntime(const engine::RuntimeOptions& options) {
  State& s = state();
  engine::Runtime* runtime = nullptr;
  os::ErrorText text;
  engine::RuntimeOptions with_inheritance = options;
  with_inheritance.inheritance = &g_inheritance;
  with_inheritance.sees_calls = g_when_loaded != nullptr;  // the shim is there
  with_inheritance.steward = {&SetForDomain, &ReadForDomain, &LeaveDomain};
  const ThreadsInHand threads;
  if (int error = engine::Runtime::Start(g_settings, with_inheritance, &runtime, &text)) {
    Fail(-error, text.text);
    return -error;
  }
  s.options = options;
  g_environment_read = true;
  ++s.starts_total;
  s.pid.store(os::ProcessId(), std::memory_order_relaxed);
  s.runtime.store(runtime, std::memory_order_seq_cst);
  return 0;
}

// A forked child of a process with an engine wakes one of its own.
int WakeInherited() {
  State& s = state();
  if (int error = StartRuntime(s.options)) return error;
  {
    // Whoever unmaps meanwhile is either before this, and its range is not in the list any more, or after it, and unmaps a region.
    const InheritedList list;
    s.runtime.load(std::memory_order_relaxed)->InheritRegions();
  }
  s.inherited.store(false, std::memory_order_release);
  return 0;
}

bool SameOptions(const engine::RuntimeOptions& a, const engine::RuntimeOptions& b) {
  return a.user_mode_only == b.user_mode_only && std::strcmp(a.cpus, b.cpus) == 0 && a.log == b.log &&
         a.log_cookie == b.log_cookie;
}

}  // namespace

int Fail(int error, const char* sentence) {
  const std::size_t length = std::min(std::strlen(sentence), sizeof t_last_error - 1);
  std::memcpy(t_last_error, sentence, length);
  t_last_error[length] = 0;
  errno = error;
  return -1;
}

const char* LastError() { return t_last_error; }
engine::Settings& settings() { return g_settings; }
bool HasLeftovers() {
  return g_inheritance.file_count.load(std::memory_order_acquire) != 0 || g_files_unknown.load(std::memory_order_relaxed);
}
std::int64_t Starts() { return state().starts_total; }
bool InRawChild() {
  int pid = state().pid.load(std::memory_order_relaxed);
  if (pid == 0) {
    Construct();
    pid = state().pid.load(std::memory_order_relaxed);
  }
  return pid != os::ProcessId();
}

const Tunable* FindTunable(const char* name) {
  for (const Tunable& tunable : kTunables) {
    if (std::strcmp(tunable.name, name) == 0) return &tunable;
  }
  return nullptr;
}

const Tunable& TunableOf(std::uint32_t number) { return kTunables[number]; }

void SetByProgram(const Tunable* tunable, std::int64_t value) {
  const auto i = tunable - kTunables;
  g_set_by_program[i].store(true, std::memory_order_seq_cst);
  tunable->value->store(value, std::memory_order_seq_cst);
  g_set_by_domain[i].store(false, std::memory_order_seq_cst);
}

void SetByDomain(const Tunable* tunable, std::int64_t value) {
  const auto i = tunable - kTunables;
  std::int64_t before = tunable->value->load(std::memory_order_seq_cst);
  if (!g_set_by_domain[i].load(std::memory_order_seq_cst)) {
    g_before_domain[i].store(before, std::memory_order_seq_cst);
    g_set_by_domain[i].store(true, std::memory_order_seq_cst);
  }
  // The program may set it at this very moment: after us.
  if (!tunable->value->compare_exchange_strong(before, value, std::memory_order_seq_cst)) g_set_by_domain[i].store(false, std::memory_order_seq_cst);
}

bool IsOwn(const Tunable* tunable) {
  const auto i = tunable - kTunables;
  return g_set_by_program[i].load(std::memory_order_seq_cst) || g_set_by_environment[i].load(std::memory_order_relaxed);
}

bool ForgetDomain() {
  bool any = false;
  for (std::size_t i = 0; i < kTunableCount; ++i) {
    if (!g_set_by_domain[i].exchange(false, std::memory_order_seq_cst)) continue;
    kTunables[i].value->store(g_before_domain[i].load(std::memory_order_seq_cst), std::memory_order_seq_cst);
    any = true;
  }
  return any;
}

Use::Use(Start start) {
  State& s = state();
  if (InRawChild()) {
    error_ = EAGAIN;
    if (start != kNever) {
      Fail(EAGAIN, "this process was made by a raw clone(2): only KSMU_DISCARD and ksmu_unmap work before exec");
    }
    return;
  }
  for (;;) {
    s.users.fetch_add(1, std::memory_order_seq_cst);
    runtime_ = s.runtime.load(std::memory_order_seq_cst);
    if (runtime_) return;
    s.users.fetch_sub(1, std::memory_order_seq_cst);
    const bool inherited = s.inherited.load(std::memory_order_acquire);
    if (start == kNever || (start == kWake && !inherited)) return;
    if (s.stopping.load(std::memory_order_acquire)) {
      error_ = EAGAIN;
      Fail(EAGAIN, "the library is being stopped");
      return;
    }
    std::lock_guard lock(s.mutex);
    if (s.runtime.load(std::memory_order_relaxed)) continue;
    if (inherited) {
      error_ = WakeInherited();
    } else {
      engine::RuntimeOptions options;
      error_ = ReadEnvironment(&options);
      if (!error_) error_ = StartRuntime(options);
      if (!error_) {
        s.starts = 1;
        s.by_first_use = true;
      }
    }
    if (error_) return;
  }
}

Use::~Use() {
  if (runtime_) state().users.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace ksmu::api

using namespace ksmu;
using namespace ksmu::api;

extern "C" {

int ksmu_start(const struct ksmu_options* given, size_t size) {
  State& s = state();
  if (given && size == 0) return Fail(EINVAL, "the size of struct ksmu_options is 0");
  ksmu_options wanted{};
  if (given) std::memcpy(&wanted, given, size < sizeof wanted ? size : sizeof wanted);
  if (wanted.flags & ~static_cast<std::uint32_t>(KSMU_START_USER_MODE_ONLY)) return Fail(EINVAL, "unknown flag in ksmu_options.flags");
  if (wanted.max_maps < 0) return Fail(EINVAL, "ksmu_options.max_maps is negative");
  if (InRawChild()) return Fail(EAGAIN, "this process was made by a raw clone(2): the library cannot be started here");
  std::lock_guard lock(s.mutex);
  engine::RuntimeOptions options;
  const bool running = s.runtime.load(std::memory_order_relaxed) != nullptr;
  if (s.stopping.load(std::memory_order_relaxed)) return Fail(EAGAIN, "the library is being stopped");
  if (!running && ReadEnvironment(&options)) return -1;
  if (running) options.user_mode_only = s.options.user_mode_only && s.by_first_use;
  if (running) {
    broker::BrokerDoor other;
    if (wanted.broker || wanted.domain) {
      if (const char* wrong = other.Choose(wanted.broker, wanted.domain, secure_getenv("XDG_RUNTIME_DIR"))) return Fail(EINVAL, wrong);
      if (!other.SameAs(g_door)) return Fail(EALREADY, "the library has been started with another domain: stop it first");
    }
  } else if (ChooseDomain(wanted.broker, wanted.domain, &options)) {
    return -1;
  }
  if (wanted.flags & KSMU_START_USER_MODE_ONLY) options.user_mode_only = true;
  if (wanted.cpus) {
    if (std::strlen(wanted.cpus) >= sizeof options.cpus) return Fail(EINVAL, "ksmu_options.cpus is too long");
    std::strcpy(options.cpus, wanted.cpus);
  } else if (running && s.by_first_use) {
    std::strcpy(options.cpus, s.options.cpus);
  }
  options.log = wanted.log;
  options.log_cookie = wanted.log_cookie;
  if (running) {
    if (!SameOptions(options, s.options) || (wanted.max_maps && wanted.max_maps != g_settings.max_maps.load())) {
      return Fail(EALREADY, "the library has been started with other options: stop it first");
    }
    ++s.starts;
    return 0;
  }
  if (wanted.max_maps) g_settings.max_maps.store(wanted.max_maps, std::memory_order_relaxed);
  const int saved = errno;
  if (s.inherited.load(std::memory_order_relaxed)) {
    s.options = options;
    if (WakeInherited()) return -1;
  } else if (StartRuntime(options)) {
    return -1;
  }
  s.starts = 1;
  s.by_first_use = false;
  errno = saved;
  return 0;
}

int ksmu_stop(void) {
  State& s = state();
  const int saved = errno;
  if (InRawChild()) return Fail(EINVAL, "the library is not started in this process");
  engine::Runtime* runtime;
  {
    std::lock_guard lock(s.mutex);
    if (s.stopping.load(std::memory_order_relaxed)) return Fail(EAGAIN, "another thread is stopping the library");
    runtime = s.runtime.load(std::memory_order_relaxed);
    if (!runtime) {
      if (!s.inherited.load(std::memory_order_relaxed)) return Fail(EINVAL, "the library is not started");
      s.inherited.store(false, std::memory_order_relaxed);  // a child that never woke it
      return 0;
    }
    if (s.starts > 1) {
      --s.starts;
      return 0;
    }
    s.stopping.store(true, std::memory_order_release);
  }
  // Not under the mutex: unmerging takes its time, and a fork in the meantime shall not have to wait for all of it.
  engine::Command command;
  command.kind = engine::Command::kStop;
  runtime->Execute(&command);
  std::unique_lock lock(s.mutex);
  if (command.result) {
    s.stopping.store(false, std::memory_order_release);
    lock.unlock();
    return Fail(static_cast<int>(-command.result),
                command.result == -ENOMEM
                    ? "unmerging all does not fit into memory: the library goes on. Free memory or add swap, then stop again"
                : command.result == -EAGAIN
                    ? "another thread is moving or changing merged memory, or pages of a broker's domain were written too recently: the library goes on. Stop again"
                    : "the kernel refused to unmerge a part: the library goes on. Its log says which call was refused");
  }
  s.runtime.store(nullptr, std::memory_order_seq_cst);
  s.starts = 0;
  const ThreadsInHand threads;
  // Whoever is still inside a function is being told that it ends.
  while (s.users.load(std::memory_order_seq_cst) != 0) os::YieldThread();
  engine::Runtime::Join(runtime);
  s.stopping.store(false, std::memory_order_release);
  errno = saved;
  return 0;
}

const char* ksmu_last_error(void) { return LastError(); }
const char* ksmu_version(void) { return KSMU_VERSION; }

}  // extern "C"
