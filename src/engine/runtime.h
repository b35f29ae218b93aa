// The engine's two threads, the program's commands, and pacing.
//
//   ksmu-scan    opens the system in a descriptor table of its own, carries out commands, scans in between
//   ksmu-event   waits for the breakers' messages and hands them to the engine
//   (ksmu-log    hands messages to the program, where it wants them: log.h)
//
// A command lies in a slot of the library's own memory while its caller waits on a futex: nothing of it is on the
// caller's stack, which may lie in merged memory.
#pragma once

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "engine/engine.h"
#include "engine/log.h"
#include "os/linux_system.h"

namespace ksmu::engine {

// Tunables of pacing besides the engine's own.
struct Settings : Tunables {
  std::atomic<std::int64_t> run{1};
  std::atomic<std::int64_t> pages_to_scan{0};
  std::atomic<std::int64_t> sleep_millisecs{20};
  std::atomic<std::int64_t> cpu_limit_percent{10};
  std::atomic<std::int64_t> advisor_mode{0};  // 1: scan-time
  std::atomic<std::int64_t> advisor_max_cpu{70};
  std::atomic<std::int64_t> advisor_min_pages_to_scan{500};
  std::atomic<std::int64_t> advisor_max_pages_to_scan{30000};
  std::atomic<std::int64_t> advisor_target_scan_time{200};
  mutable std::atomic<std::int64_t> advised_pages_to_scan{0};  // what the advisor has last come to
};

// What an engine leaves behind for those after it, in this process or in a forked child; kept where a child finds it.
struct Inheritance {
  Presence presence;
  static constexpr std::size_t kMaxRegions = 4096;
  static constexpr std::size_t kMaxFiles = 8192;  // as many as a pool can have, twice
  struct Entry {
    Address start, end;
    bool promise, sync_break, owned;
    std::uint8_t cause;  // not 0: excluded
  };
  // Written by the scanner into the one that is not current: a fork may come at any moment once it rests.
  struct Regions {
    std::size_t count = 0;
    std::array<Entry, kMaxRegions> entries{};
  };
  std::array<Regions, 2> regions{};
  std::atomic<std::uint32_t> current{0};
  Regions& known() { return regions[current.load(std::memory_order_acquire)]; }
  void KeepRegions(const Engine& engine);
  // Pool files of engines that are no more, or not here: the parent's, and those of this process that were stopped. Pages
  // may lie in their mappings still. The first `file_count` are known; a forked child knows `child_file_count`.
  std::atomic<std::size_t> file_count{0};
  std::size_t child_file_count = 0;
  std::array<os::File, kMaxFiles> files;
  void KeepFiles(const Engine& engine) {
    const std::size_t known = file_count.load(std::memory_order_relaxed);
    child_file_count = known + engine.PoolFiles(files.data() + known, kMaxFiles - known);
  }
  // Forgets the files that no mapping of this process shows any more. While no engine is there.
  void ForgetUnmapped();
};

class Runtime;

// How the tunables and counters of this process are come by, for the domain's sake. On the scanner, between two steps.
struct Steward {
  // By its number in tunables.h, by the rules of ksmu_set, but that nothing is unmerged by it; until `leave`. 0 or an errno; `yields`:
  // EEXIST where the program or its environment have set it.
  int (*set)(Runtime& runtime, std::uint32_t tunable, std::int64_t value, bool yields) = nullptr;
  void (*read)(Runtime& runtime, frames::Source::Report* report) = nullptr;  // its counters and tunables
  void (*leave)(Runtime& runtime) = nullptr;  // tunables are again what they were before the domain has set them
};

struct RuntimeOptions {
  bool user_mode_only = false;
  bool sees_calls = false;  // see Engine::SetSeesCalls
  char cpus[128] = {};  // "": all
  Log::Callback log = nullptr;
  void* log_cookie = nullptr;
  Inheritance* inheritance = nullptr;  // never nullptr
  frames::Door* door = nullptr;        // to the domain that is to be joined; nullptr: none
  Steward steward;
};

struct Command {
  enum Kind : std::uint8_t { kAdvise, kExclude, kUnmerge, kRelease, kDiscard, kUnmap, kMerge, kUnmergeAll, kRest, kHandOver, kAcrossNodes, kCall, kFind, kStats, kRegion, kExplain, kStop };
  Kind kind = kStats;
  Span span;
  bool promise = false, sync_break = false, owned = false;
  std::uint8_t cause = 0;  // kExclude
  bool across = false;     // kAcrossNodes
  long number = 0;         // kCall: a system call that changes the mappings of the span, to be made for the program
  long arguments[6] = {};
  std::int64_t result = 0;  // 0 or a count, or -errno
  // Results of the reading commands.
  AdvisedRegion region;
  RegionCounts counts;
  Page page;
  os::Mapping mapping;  // kFind: the first that ends behind span.start; its start decides what of it there is
  bool frames = false;
  bool holes = false;  // kUnmerge: all is done, and -ENOMEM says that part of the span is not mapped
  bool in_region = false, huge = false;
  std::uint32_t sharers = 0, heat = 0;
  std::int64_t next_look_ms = -1;
  struct Gauges {
    std::size_t shared = 0, frames_in_use = 0, frames_live = 0, metadata = 0, maps = 0, regions = 0, region_bytes = 0;
    CounterValues counters;
  } gauges;
};

class Runtime {
 public:
  // Starts the threads. 0, or -errno with a sentence in *error.
  static int Start(const Settings& settings, const RuntimeOptions& options, Runtime** out, os::ErrorText* error);
  // To be called once, after a kStop command has succeeded: ends the threads.
  static void Join(Runtime* runtime);

  // Carries out the command on the scanner. False: the runtime is ending (-EAGAIN).
  // An interrupted kMerge answers -EINTR; other commands go on whatever signals come.
  void Execute(Command* command);
  // The same where the caller is on the scanner; not for kMerge, which asks its slot whether it is to end.
  void ExecuteHere(Command* command) { Run(command, nullptr); }

  // fork: the scanner comes to rest between two steps, with no merge in hand, until Resume. The event thread goes on, and so
  // do commands that take no page out of its place: whoever waits for one may hold an allocator's lock, for which the thread
  // that forks waits in another fork handler.
  void Pause();
  void Resume();
  void TunableChanged();
  // In a child: what it has inherited. Before anything else.
  void InheritRegions();

 private:
  static constexpr std::size_t kSlots = 64;
  enum SlotState : std::uint32_t { kFree, kClaimed, kPosted, kRunning, kDone };
  struct Slot {
    std::atomic<std::uint32_t> state{kFree};
    std::atomic<bool> cancelled{false};
    std::uint64_t ticket = 0;
    Command command;
  };

  Runtime(const Settings& settings, const RuntimeOptions& options) : settings_(settings), options_(options) {}
  static void* ScannerMain(void* self);
  static void* EventMain(void* self);
  int OpenEngine(os::ErrorText* error);
  void CloseEngine();
  void ScannerLoop();
  bool RunCommands();
  std::int64_t AdvisePages() const;
  void RunReadings();
  void RunOthers();
  void Run(Command* command, Slot* slot, bool parked = false);
  void Park();
  bool RunWhileParked();
  bool MayRunWhileParked(const Command& command) const;
  void Sleep(std::int64_t ns);
  void Scan();
  std::int64_t NewsSleep();
  std::int64_t PassPaid();
  void Answer(Slot* slot);
  void Nudge();
  // domain.cc
  void TendDomain();
  void LeaveDomain();
  bool JoiningSoon() const { return join_look_ns_ != 0; }
  void GiveUpJoining();
  void TellDomain(std::uint64_t now);
  void ForgetFormers();
  // wishes.cc
  bool TendWishes();
  bool TakeWishes();
  void StopUnmerging(int now);
  void UnmergePortion();
  void TellRegions();
  // report.cc
  void ReportStart();
  void ReportStop(std::uint64_t now, std::size_t kept);
  void Report();

  const Settings& settings_;
  RuntimeOptions options_;
  os::LinuxSystem* system_ = nullptr;
  Engine* engine_ = nullptr;
  pthread_t scanner_{}, event_{};
  std::array<Slot, kSlots> slots_;
  std::atomic<std::uint64_t> next_ticket_{0};
  std::atomic<std::uint32_t> bell_{0};        // the scanner sleeps on it
  std::atomic<std::uint32_t> free_slots_{0};  // changes when a slot becomes free
  std::atomic<std::uint32_t> started_{0};     // 0 not yet, 1 yes, 2 failed
  int start_error_ = 0;
  os::ErrorText start_text_;
  std::atomic<bool> stopping_{false};
  std::atomic<std::uint32_t> pause_{0}, parked_{0}, pause_requests_{0}, pause_bell_{0};
  std::atomic<bool> end_events_{false};
  std::atomic<std::uint32_t> end_{0};  // never changes: something to wait on for a while

  // Pacing.
  // What a broker and other members have to say waits so long; longer, where nothing has been heard for a while.
  static constexpr std::int64_t kNewsSleep = 200'000'000, kLongestNewsSleep = 500'000'000;
  std::int64_t news_sleep_ns_ = kNewsSleep;
  std::uint64_t housekeeping_at_ = 0;  // between two passes
  std::int64_t pass_sleep_ns_ = 0;
  std::int64_t pass_cpu_ns_ = 0;    // of the last whole pass: of its steps, not of commands and news in between
  std::int64_t steps_cpu_ns_ = 0;   // of the present one, so far
  std::int64_t saved_most_ = 0;     // pages merged and zero, the most of late
  std::uint64_t paid_at_ = 0;       // when that was looked at, ns
  std::int64_t breaks_at_pass_ = 0;
  bool promising_ = false;          // the next passes may pay, though this one did not
  std::uint64_t promising_until_ = 0;
  std::int64_t batch_pages_ = 0;  // read since the last sleep between batches, and not slept off
  std::int64_t debt_ns_ = INT64_MIN / 2;  // wall time still to be slept off for CPU time used; below 0: saved up
  std::uint64_t budget_at_ = 0;      // when that was reckoned last, ns
  std::uint64_t next_scan_at_ = 0, pass_ended_at_ = 0;
  std::uint64_t rest_until_ = 0;     // of that sleep, what is for the CPU time used
  std::atomic<bool> tunables_changed_{false};

  // The domain. Those that have been left, and whose frames are in use still.
  struct Former {
    frames::Source* source = nullptr;
    std::uint32_t number = 0;
  };
  frames::Source* source_ = nullptr;
  std::array<Former, 8> formers_{};
  std::uint64_t join_at_ = 0, formers_at_ = 0;
  bool warned_of_domain_ = false;
  std::int64_t join_wait_ns_ = 0, join_look_ns_ = 0;
  std::uint64_t tell_at_ = 0;
  frames::Source::Report told_domain_;
  int filters_at_start_ = 0;

  // What an operator wants. Scanner.
  int unmerging_ = 0;        // EINPROGRESS, up to here; else 0 or the errno that it has ended with
  Address unmerged_to_ = 0;
  struct Telling {
    bool active = false;
    Address at = 0;
    int portions = 0;
    std::size_t count = 0;  // regions that are counted; the one after them may be in part
    std::array<frames::Source::RegionReport, frames::Source::kMaxRegions> regions{};
  } telling_;

  // Messages, and what has been said already. Scanner.
  Log log_;
  std::array<bool, Log::kKindCount> told_{};
  std::array<std::uint64_t, os::Refusals::kCallCount> told_refused_{};
  std::uint32_t told_given_up_ = 0;
  bool unmerge_refused_ = false;
};

}  // namespace ksmu::engine
