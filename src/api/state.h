// The library's one instance in this process, and how functions of the interface come by it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/runtime.h"
#include "ksmu/ksmu.h"

namespace ksmu::api {

// A failure: sets errno and the thread's last error, returns -1.
int Fail(int error, const char* sentence);
const char* LastError();

engine::Settings& settings();

// Keeps the running engine from ending while a function uses it. runtime() is nullptr where there is none.
class Use {
 public:
  // `start`: start it if need be (by first use). `wake`: start it if this is a forked child whose parent had one.
  enum Start { kNever, kWake, kStart };
  explicit Use(Start start);
  ~Use();
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;
  engine::Runtime* runtime() const { return runtime_; }
  // Why there is none: 0 (it is not running, and was not to be started), or an errno whose sentence has been set.
  int error() const { return error_; }

 private:
  engine::Runtime* runtime_ = nullptr;
  int error_ = 0;
};

// True in a child made by a raw clone, in which threads cannot be started safely and the tables are not there.
bool InRawChild();
enum class EngineState { kNone, kRunning, kDormant, kRawChild };
EngineState CurrentState();

// What libc's fork does by its handlers, for those that run none: see ksmushim_fork_prepare. False: nothing was done.
bool TryForkPrepare();
void AfterForkInParent();
void AfterForkInChild();
void AfterRawClone();  // in a child of which libc knows nothing: InRawChild from now on

// In a forked child whose engine sleeps: the range is not what it was.
void ForgetInherited(os::Span span);
// A region has been advised with KSMU_F_NO_RAW_DISCARDS, ever; or an engine has left pages behind.
bool AnyPromise();
// Before anything else is initialised: fork handlers are registered first, and so run last. `when_loaded` is called in the
// library's own turn.
void BeginEarly(void (*when_loaded)());
void NotePromise();
engine::Presence& presence();
std::int64_t Starts();
// True if pages may lie in the pool mappings of an engine that has been stopped, or of a parent's.
bool HasLeftovers();

// The environment's value of a tunable's variable.
struct Tunable {
  const char* name;
  std::atomic<std::int64_t>* value;
  std::int64_t minimum, maximum;
};
const Tunable* FindTunable(const char* name);
const Tunable& TunableOf(std::uint32_t number);  // in engine/tunables.h
void SetByProgram(const Tunable* tunable, std::int64_t value);  // from now on the environment's value is nothing to it

// Until the domain is left, or the program sets it: what it has been before is kept.
void SetByDomain(const Tunable* tunable, std::int64_t value);
bool IsOwn(const Tunable* tunable);  // the program has set it, or its environment
// What the domain has set is again what it was. True: there was something.
bool ForgetDomain();

// For an operator of the domain: engine::Steward. On the scanner of that runtime.
int SetForDomain(engine::Runtime& runtime, std::uint32_t number, std::int64_t value, bool yields);
void ReadForDomain(engine::Runtime& runtime, frames::Source::Report* report);
void LeaveDomain(engine::Runtime& runtime);

}  // namespace ksmu::api
