// Race tests: a thread of the library is parked at a named point of the protocol (src/base/test_point.h), something
// hostile is done to the very page in its hands, it is let go, and every byte is compared with a shadow copy.
//
// A case = mode (how the memory was advised) x point x disturbance. Each runs in a process of its own with a fresh
// library (race_test.cc). In that process:
//   driver       one thread that makes the protocol pass the point (race_scenarios.cc)
//   hook         on the thread that reaches the point; parks it until the disturbance is done or is itself waiting
//   actor        one thread that does the disturbance (race_disturbances.cc)
//   coordinator  the main thread: decides when the hook lets go, then checks (race_case.cc)
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ksmu::race {

enum class Mode { kExact, kPromise, kSync, kMap };  // plain, KSMU_F_NO_RAW_DISCARDS, KSMU_F_SYNC_BREAK, from ksmu_map
constexpr Mode kModes[] = {Mode::kExact, Mode::kPromise, Mode::kSync, Mode::kMap};
const char* ModeName(Mode mode);
constexpr bool RawDiscardsAllowed(Mode mode) { return mode == Mode::kExact || mode == Mode::kSync; }

class Case;

struct Disturbance {
  const char* name;
  void (*act)(Case&);            // on the actor's thread, while the library is parked (or beyond, if it has to wait)
  void (*prepare)(Case&);        // before the library starts; may be null
  void (*finish)(Case&);         // when the point is behind and the driver done, before all bytes are checked; may be null
  bool (*applies)(Mode);         // null: to every mode
  bool calls_may_fail;           // the library's calls may say ENOMEM until `finish`
};
const std::vector<Disturbance>& Disturbances();

struct Scenario {
  const char* name;
  std::vector<const char*> points;
  void (*prepare)(Case&);        // with the library running, before the hook is armed; may be null
  void (*drive)(Case&);          // on the driver's thread, the hook armed
  bool (*applies)(Mode, const std::string& point);  // null: to all
  bool in_short_form;
};
const std::vector<Scenario>& Scenarios();

// Why a combination is left out; empty if it is run.
std::string WhyImpossible(const Scenario&, const std::string& point, const Disturbance&, Mode);
// While a point is passed the pages are where the kernel cannot wait for them: what it does for threads that cannot wait
// (/proc/self/mem, an exiting thread's word) fails there, and docs/limits.md says so.
bool GateIsShutAt(const std::string& point);

// Shared between the processes of one case, and with the runner.
struct Control {
  std::atomic<std::uint32_t> stage;    // kArmed, kParked, kReleased; the hook's futex
  std::atomic<std::uint32_t> hits;     // times the point was reached with the hook armed
  std::atomic<std::uint32_t> phase;    // of the actor: kBefore, kActing, kWaiting, kDone
  std::atomic<std::uintptr_t> address; // what the hook was called with
  std::atomic<std::size_t> bytes;
  std::atomic<std::uint32_t> blocked;  // the disturbance had to wait for the library (it was let go early)
  std::atomic<std::uint32_t> failures;
  std::atomic<std::uint32_t> used;
  std::atomic<std::uint32_t> step;     // which part of the case is running, for the report of a hang
  char skip[160];
  char text[6000];
};
enum : std::uint32_t { kUnarmed, kArmed, kParked, kReleased };
enum : std::uint32_t { kBefore, kActing, kWaiting, kDone };  // kWaiting: waits for something other than the library

class Case {
 public:
  static constexpr std::size_t kPages = 96;
  static constexpr std::size_t kRun = 8;         // pages in one run of equal pages
  static constexpr std::size_t kFirst = 8;       // pages [8, 16) and [32, 40) and [56, 64) have the same contents
  static constexpr std::size_t kSecond = 32;
  static constexpr std::size_t kThird = 56;
  static constexpr std::size_t kZeros = 72;      // pages [72, 80): populated, all zeros

  Case(Control* control, Mode mode, const Scenario& scenario, std::string point, const Disturbance& disturbance,
       unsigned nth);
  // Everything; failures are noted in Control. Does not return while threads of the case are stuck.
  void Run();

  // --- for scenarios and disturbances -----------------------------------------------------------------------------
  Mode mode() const { return mode_; }
  const std::string& point() const { return point_; }
  Control& control() { return *control_; }
  unsigned char* page(std::size_t i) const { return memory_ + i * page_size_; }
  unsigned char* memory() const { return memory_; }
  std::size_t page_size() const { return page_size_; }
  std::size_t bytes() const { return kPages * page_size_; }
  // The page that the disturbance is for: in the middle of what the hook was called with, where that is the program's.
  std::size_t subject() const { return subject_; }
  unsigned char* subject_page() const { return page(subject_); }
  void ChooseSubject(std::size_t page) {
    subject_ = page;
    subject_is_chosen_ = true;
  }

  // The shadow copy: what every byte has to be. Write to it when the program's write has returned.
  unsigned char* shadow(std::size_t i) const { return shadow_ + i * page_size_; }
  // While page i is being changed to what the shadow says, its old bytes are right as well (as a whole).
  void AllowOld(std::size_t i);
  void EndOld(std::size_t i);
  // The page is not looked at (the program cannot read it at the moment, or gave it away).
  void SetUnreadable(std::size_t i, bool unreadable);

  // Async-signal-safe, takes no lock, allocates nothing: for children too.
  void Fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
  void Skip(const char* format, ...) __attribute__((format(printf, 2, 3)));
  const char* disturbance_name() const { return disturbance_.name; }
  bool skipped() const { return control_->skip[0] != 0; }
  bool CheckPage(std::size_t i, const char* when);
  bool CheckAll(const char* when);
  // The library's call must succeed, unless a disturbance has taken the memory or the library away; EINTR is tried again.
  long Merge();
  bool Reached() const { return control_->stage.load() >= kParked; }
  // Runs the driver's step until the point is reached or the time is up.
  void DriveUntilReached(double seconds, void (*step)(Case&));
  void SetTunable(const char* name, std::int64_t value);
  // The library has been stopped by the disturbance: its calls may say so.
  void set_stopped() { stopped_ = true; }
  pthread_t driver_thread() const { return driver_self_.load(); }
  void ActorPhase(std::uint32_t phase) { control_->phase.store(phase); }
  // A store of the hook's own thread at `point`, before the scenario's point is reached (a write between hash and gate).
  void WriteAtPoint(const char* point) { write_at_point_ = point; }
  bool gate_shut() const { return GateIsShutAt(point_); }
  std::uint64_t salt() const { return salt_; }
  void* data = nullptr;  // the disturbance's own

  void OnPoint(const char* point, std::uintptr_t address, std::size_t bytes);

 private:
  void SetUpMemory();
  void Coordinate();
  void CheckAfterwards();
  bool InRegion(std::uintptr_t address) const;
  bool IsRight(std::size_t i) const;
  static void* ActorMain(void* self);
  static void* DriverMain(void* self);

  Control* control_;
  Mode mode_;
  const Scenario& scenario_;
  std::string point_;
  const Disturbance& disturbance_;
  unsigned nth_;
  std::size_t page_size_;
  unsigned char* memory_ = nullptr;
  unsigned char* shadow_ = nullptr;
  unsigned char* old_ = nullptr;
  std::atomic<bool> old_allowed_[kPages] = {};
  std::atomic<bool> unreadable_[kPages] = {};
  std::atomic<std::uint32_t> changes_[kPages] = {};  // counts AllowOld and EndOld: who compares meanwhile looks again
  std::size_t subject_ = kFirst + kRun / 2;
  bool subject_is_chosen_ = false;
  const char* write_at_point_ = nullptr;
  std::atomic<bool> stopped_{false};
  std::atomic<bool> driver_done_{false};
  std::atomic<int> actor_tid_{0};
  std::atomic<pthread_t> driver_self_{};
  bool finished_ = false;
  std::uint64_t salt_ = 1;
};

double Seconds();
void FillContent(unsigned char* page, std::size_t bytes, std::uint64_t seed);

}  // namespace ksmu::race
