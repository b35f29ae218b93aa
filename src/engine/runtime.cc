#include "engine/runtime.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <new>
#include <utility>

#include "engine/tunables.h"
#include "os/mappings.h"
#include "os/thread.h"

namespace ksmu::engine {
namespace {
constexpr std::int64_t kMillisecond = 1'000'000;
constexpr std::int64_t kFirstPassSleep = 100 * kMillisecond;  // the interval in which a page has to be still
constexpr std::int64_t kBurstNs = 1'000'000'000;  // CPU time that cpu_limit_percent lets the scanner save up
constexpr std::int64_t kLongestPassSleep = 2000 * kMillisecond;
// Passes come as fast as they pay: a page saved is worth this much CPU time, which merging pages one by one takes at most. What pays so
// many times over makes the next passes come at once, and is worth waiting for; what barely pays, as the few pages that every guest
// of a fleet writes all the time, only makes them come twice as often. Those that do not pay come ever less often, until they take
// one part in so many of a CPU.
constexpr std::int64_t kWorthOfPageNs = 100'000;
constexpr std::int64_t kRichly = 16, kPromising = 4;
constexpr std::int64_t kFruitlessPart = 4000;
constexpr std::uint64_t kAfterRemergeNs = 5000 * kMillisecond;
constexpr std::uint64_t kForgetSavedNs = 10'000'000'000;
constexpr std::int64_t kFruitlessSleep = 40000 * kMillisecond;
constexpr std::int64_t kHousekeepingSleep = 2000 * kMillisecond;
// Threads of the program wait at the scanner's gates, whatever their priority: so it is not put behind them, and those who
// answer go first where that is permitted. What the scanner may use is bounded by cpu_limit_percent.
constexpr int kScannerNice = 0, kEventNice = -10;
constexpr int kEventWaitMs = 1000;
constexpr std::uint64_t kJoinPatienceNs = 100'000'000;  // of a merge with a broker that is about to let us in
constexpr int kStopPatience = 200;  // times 10 ms
}  // namespace

void Inheritance::ForgetUnmapped() {
  const std::size_t count = file_count.load(std::memory_order_relaxed);
  if (count == 0) return;
  os::Mappings mappings;
  if (mappings.Open() != 0) return;
  std::array<bool, kMaxFiles> shown{};
  os::Mapping mapping;
  int error;
  for (Address at = 0; (error = mappings.Query(at, &mapping)) == 0; at = mapping.end) {
    if (mapping.anonymous) continue;
    for (std::size_t i = 0; i < count; ++i) {
      shown[i] |= files[i].device == mapping.device && files[i].inode == mapping.inode;
    }
  }
  mappings.Close();
  if (error != -ENOENT) return;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (shown[i]) files[kept++] = files[i];
  }
  child_file_count = kept;
  file_count.store(kept, std::memory_order_release);
}

void Inheritance::KeepRegions(const Engine& engine) {
  const std::uint32_t next = 1 - current.load(std::memory_order_relaxed);
  Regions& kept = regions[next];
  kept.count = 0;
  for (const RegionList* list : {&engine.regions(), &engine.excluded()}) {
    for (std::size_t i = 0; i < list->size() && kept.count < kMaxRegions; ++i) {
      const Region& r = (*list)[i];
      if (r.kind == Region::kMergeable) kept.entries[kept.count++] = {r.start, r.end, r.promise, r.sync_break, r.owned, r.cause};
    }
  }
  current.store(next, std::memory_order_release);
}

int Runtime::Start(const Settings& settings, const RuntimeOptions& options, Runtime** out, os::ErrorText* error) {
  void* memory = base::MapOwnPages(sizeof(Runtime));
  if (!memory) {
    error->Set("no memory for the library's own data");
    return -ENOMEM;
  }
  auto* runtime = new (memory) Runtime(settings, options);
  int result = runtime->log_.Start(options.log, options.log_cookie);
  if (!result && (result = os::StartThread(&runtime->scanner_, &Runtime::ScannerMain, runtime))) runtime->log_.Stop();
  if (result) {
    error->Set(os::WhyNoThread(result));
  } else {
    while (runtime->started_.load(std::memory_order_acquire) == 0) os::FutexWait(&runtime->started_, 0, -1);
    if (runtime->started_.load(std::memory_order_acquire) == 1) {
      *out = runtime;
      return 0;
    }
    result = runtime->start_error_;
    *error = runtime->start_text_;
    os::JoinThread(runtime->scanner_);
    runtime->log_.Stop();
  }
  runtime->~Runtime();
  base::UnmapOwnPages(memory, sizeof(Runtime));
  return result;
}

void Runtime::Join(Runtime* runtime) {
  os::JoinThread(runtime->scanner_);
  runtime->log_.Stop();
  // Callers that have just been told so may still be looking at their slots.
  for (Slot& slot : runtime->slots_) {
    while (slot.state.load(std::memory_order_acquire) != kFree) os::FutexWait(&slot.state, slot.state.load(), kMillisecond);
  }
  runtime->~Runtime();
  base::UnmapOwnPages(runtime, sizeof(Runtime));
}

int Runtime::OpenEngine(os::ErrorText* error) {
  if (int result = os::UnshareDescriptors()) {
    error->Set(result == -EMFILE || result == -ENFILE ? "no descriptors: RLIMIT_NOFILE (or fs.file-max) is too low"
               : result == -ENOMEM
                   ? "no memory for a descriptor table"
                   : "close_range(2) with CLOSE_RANGE_UNSHARE is refused: a seccomp filter, or a kernel before 5.9");
    return result;
  }
  os::NameThisThread("ksmu-scan");
  if (os::PinThisThread(options_.cpus[0] ? options_.cpus : nullptr) != 0 && options_.cpus[0]) {
    error->Set("the list of CPUs is malformed, or names none that this process may use");
    return -EINVAL;
  }
  os::LinuxOptions options;
  options.user_mode_only = options_.user_mode_only;
  if (int result = os::LinuxSystem::Open(options, &system_, error)) return result;
  system_->RegisterOwnThread(os::CurrentThread());
  void* memory = base::MapOwnPages(sizeof(Engine));
  if (!memory) {
    error->Set("no memory for the library's own data");
    return -ENOMEM;
  }
  engine_ = new (memory) Engine(*system_, settings_, os::Entropy());
  options_.inheritance->ForgetUnmapped();
  engine_->SetInherited(options_.inheritance->files.data(), options_.inheritance->file_count);
  engine_->SetPresence(&options_.inheritance->presence);
  engine_->SetSeesCalls(options_.sees_calls);
  engine_->SetPoll([](void* self) { static_cast<Runtime*>(self)->RunReadings(); }, this);
  int result = engine_->Start();
  if (result) error->Set("no memory for the library's own data");
  filters_at_start_ = os::SystemCallFilters();
  if (!result) TendDomain();
  if (!result && (result = os::StartThread(&event_, &Runtime::EventMain, this))) {
    error->Set(os::WhyNoThread(result));
  }
  return result;
}

void Runtime::CloseEngine() {
  if (engine_) {
    LeaveDomain();
    ForgetFormers();
    engine_->~Engine();
    base::UnmapOwnPages(engine_, sizeof(Engine));
    engine_ = nullptr;
  }
  if (system_) os::LinuxSystem::Close(system_);
  system_ = nullptr;
}

void* Runtime::ScannerMain(void* self) {
  auto& runtime = *static_cast<Runtime*>(self);
  runtime.start_error_ = runtime.OpenEngine(&runtime.start_text_);
  if (runtime.start_error_) runtime.CloseEngine();
  runtime.started_.store(runtime.start_error_ ? 2 : 1, std::memory_order_release);
  os::FutexWake(&runtime.started_, INT_MAX);
  if (runtime.start_error_) return nullptr;
  os::SetThisThreadNice(kScannerNice);
  runtime.ScannerLoop();
  return nullptr;
}

void* Runtime::EventMain(void* self) {
  auto& runtime = *static_cast<Runtime*>(self);
  os::NameThisThread("ksmu-event");
  os::SetThisThreadNice(kEventNice);
  runtime.system_->RegisterOwnThread(os::CurrentThread());
  runtime.system_->RegisterEventThread();
  std::array<os::Context, ChildList::kMaxChildren + 2> contexts;
  while (!runtime.end_events_.load(std::memory_order_acquire)) {
    const std::size_t n = runtime.engine_->EventContexts(contexts.data(), contexts.size());
    runtime.system_->WaitEvents(contexts.data(), n, runtime.engine_->FillsPending() ? 1 : kEventWaitMs);
    runtime.engine_->HandleEvents();
  }
  return nullptr;
}

void Runtime::TunableChanged() {
  tunables_changed_.store(true, std::memory_order_release);
  Nudge();
}

void Runtime::Nudge() {
  bell_.fetch_add(1, std::memory_order_release);
  os::FutexWake(&bell_, 1);
  if (pause_.load(std::memory_order_seq_cst) == 0) return;
  pause_bell_.fetch_add(1, std::memory_order_seq_cst);
  os::FutexWake(&pause_bell_, INT_MAX);
}

void Runtime::Sleep(std::int64_t ns) {
  const std::uint32_t seen = bell_.load(std::memory_order_acquire);
  // What came before this reading of the bell must be seen by the caller's loop, what comes after ends the wait.
  for (const Slot& slot : slots_) {
    if (slot.state.load(std::memory_order_acquire) == kPosted) return;
  }
  if (pause_.load(std::memory_order_acquire) || tunables_changed_.load(std::memory_order_acquire)) return;
  os::FutexWait(&bell_, seen, ns);
}

void Runtime::Execute(Command* command) {
  Slot* slot = nullptr;
  while (!slot) {
    const std::uint32_t seen = free_slots_.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_acquire)) {
      command->result = -EAGAIN;
      return;
    }
    for (Slot& candidate : slots_) {
      std::uint32_t expected = kFree;
      if (candidate.state.compare_exchange_strong(expected, kClaimed, std::memory_order_seq_cst)) {
        slot = &candidate;
        break;
      }
    }
    if (!slot) os::FutexWait(&free_slots_, seen, 10 * kMillisecond);
  }
  // Either this sees that the engine is ending, or the ending engine sees the claim and answers it.
  if (stopping_.load(std::memory_order_seq_cst)) {
    slot->state.store(kFree, std::memory_order_release);
    command->result = -EAGAIN;
    return;
  }
  slot->command = *command;
  slot->cancelled.store(false, std::memory_order_relaxed);
  slot->ticket = next_ticket_.fetch_add(1, std::memory_order_relaxed);
  slot->state.store(kPosted, std::memory_order_seq_cst);
  Nudge();
  for (;;) {
    const std::uint32_t state = slot->state.load(std::memory_order_acquire);
    if (state == kDone) break;
    const int woken = os::FutexWait(&slot->state, state, -1);
    if (woken == -EINTR && command->kind == Command::kMerge) slot->cancelled.store(true, std::memory_order_release);
  }
  *command = slot->command;
  slot->state.store(kFree, std::memory_order_release);
  free_slots_.fetch_add(1, std::memory_order_release);
  os::FutexWake(&free_slots_, 1);
}

void Runtime::Answer(Slot* slot) {
  slot->state.store(kDone, std::memory_order_release);
  os::FutexWake(&slot->state, INT_MAX);
}

// Carries out what is posted, oldest first. False: the engine has ended.
bool Runtime::RunCommands() {
  for (;;) {
    if (pause_.load(std::memory_order_acquire)) Park();
    Slot* oldest = nullptr;
    for (Slot& slot : slots_) {
      if (slot.state.load(std::memory_order_acquire) == kPosted && (!oldest || slot.ticket < oldest->ticket)) oldest = &slot;
    }
    if (!oldest) return true;
    oldest->state.store(kRunning, std::memory_order_relaxed);
    Run(&oldest->command, oldest);
    const bool stopped = oldest->command.kind == Command::kStop && oldest->command.result == 0;
    if (stopped) {
      // Before anybody is told that there is no engine: discards are not plain ones from then on.
      options_.inheritance->KeepFiles(*engine_);
      options_.inheritance->file_count.store(options_.inheritance->child_file_count, std::memory_order_release);
      stopping_.store(true, std::memory_order_seq_cst);
      end_events_.store(true, std::memory_order_release);
      system_->Notify();
      os::JoinThread(event_);
      options_.inheritance->known().count = 0;
      Report();
      const std::uint64_t now = system_->NowNanoseconds();
      const std::size_t kept = engine_->frames_live();
      CloseEngine();
      options_.inheritance->ForgetUnmapped();
      ReportStop(now, kept);
    }
    Answer(oldest);
    if (!stopped) continue;
    // A fork that is waiting for the scanner to rest has nothing to wait for any more.
    parked_.store(pause_requests_.load(std::memory_order_seq_cst) + (1u << 30), std::memory_order_seq_cst);
    os::FutexWake(&parked_, INT_MAX);
    // Whoever posted in the meantime, or is about to: they are told so until nobody is left who has not seen stopping_.
    free_slots_.fetch_add(1, std::memory_order_release);
    os::FutexWake(&free_slots_, INT_MAX);
    for (bool again = true; again;) {
      again = false;
      for (Slot& slot : slots_) {
        const std::uint32_t state = slot.state.load(std::memory_order_seq_cst);
        if (state == kPosted) {
          slot.command.result = -EAGAIN;
          Answer(&slot);
        } else if (state == kClaimed) {
          again = true;
        }
      }
      if (again) os::FutexWait(&bell_, bell_.load(std::memory_order_acquire), kMillisecond);
    }
    return false;
  }
}

// What need not wait for a long ksmu_merge to end: between two of its portions, everything but another one.
void Runtime::RunOthers() {
  for (Slot& slot : slots_) {
    if (slot.state.load(std::memory_order_acquire) != kPosted) continue;
    const Command::Kind kind = slot.command.kind;
    if (kind == Command::kMerge || kind == Command::kStop || kind == Command::kUnmergeAll) continue;
    slot.state.store(kRunning, std::memory_order_relaxed);
    Run(&slot.command, &slot);
    Answer(&slot);
  }
}

// Those that only read, in the middle of a long command.
void Runtime::RunReadings() {
  for (Slot& slot : slots_) {
    if (slot.state.load(std::memory_order_acquire) != kPosted) continue;
    const Command::Kind kind = slot.command.kind;
    if (kind != Command::kStats && kind != Command::kRegion && kind != Command::kExplain) continue;
    Run(&slot.command, &slot);
    Answer(&slot);
  }
}

void Runtime::Run(Command* command, Slot* slot, bool parked) {
  Engine& engine = *engine_;
  const std::size_t page = engine.page_size();
  switch (command->kind) {
    case Command::kAdvise:
      command->result = engine.Advise(command->span, command->promise, command->sync_break, command->owned);
      pass_sleep_ns_ = 0;
      // Not before what has been used is slept off: who advises all the time would else be scanned without a limit, and then, for what
      // was used ahead of it, not at all for minutes.
      next_scan_at_ = std::min(next_scan_at_, std::max(system_->NowNanoseconds() + kFirstPassSleep, rest_until_));
      break;
    case Command::kExclude: {
      Region part;
      part.start = command->span.start;
      part.end = command->span.end();
      part.promise = command->promise;
      part.sync_break = command->sync_break;
      part.cause = command->cause;
      engine.InheritExcluded(part);
      break;
    }
    case Command::kUnmerge:
      command->result = engine.Unmerge(command->span);
      unmerge_refused_ |= command->result == -ENOMEM;
      if (command->result == 0 && engine.HasHoles(command->span)) {
        command->result = -ENOMEM;
        command->holes = true;
      }
      if (command->result == 0 || command->holes) engine.ForgetPresence(command->span);
      break;
    case Command::kRelease:
      command->result = engine.Release(command->span);
      if (command->result == 0) engine.ForgetPresence(command->span);
      break;
    case Command::kDiscard:
      command->result = engine.Discard(command->span, !parked);
      break;
    case Command::kUnmap:
      // Before: the address can be somebody else's right after.
      options_.inheritance->presence.Forget(command->span);
      command->result = engine.Unmap(command->span);
      if (command->result) options_.inheritance->presence.Note(command->span);
      break;
    case Command::kCall:
      command->result = engine.CallForProgram(command->span, command->number, command->arguments);
      break;
    case Command::kFind:
      command->result = engine.FindMapping(command->span.start, &command->mapping, &command->frames);
      break;
    case Command::kMerge: {
      struct Cookie {
        Runtime* runtime;
        Slot* slot;
      } cookie{this, slot};
      // What is merged before that lies in frames of our own, and has to go back again.
      const std::uint64_t until = system_->NowNanoseconds() + kJoinPatienceNs;
      while (JoiningSoon() && !pause_.load(std::memory_order_acquire) && system_->NowNanoseconds() < until) {
        TendDomain();
        system_->Yield();
      }
      command->result = engine.Merge(
          command->span,
          [](void* c) {
            auto* cookie = static_cast<Cookie*>(c);
            if (cookie->runtime->pause_.load(std::memory_order_acquire)) cookie->runtime->Park();
            cookie->runtime->RunOthers();
            return cookie->slot->cancelled.load(std::memory_order_acquire);
          },
          &cookie);
      break;
    }
    case Command::kUnmergeAll:
      command->result = engine.UnmergeAll(false);
      unmerge_refused_ |= command->result == -ENOMEM;
      break;
    case Command::kRest:
      command->result = 0;  // to be asked is all: the step that was in hand is done, and the next one sees run
      break;
    case Command::kHandOver:
      command->result = engine.HandOver(command->span);
      break;
    case Command::kAcrossNodes:
      command->result = engine.MergeAcrossNodes(command->across);
      break;
    case Command::kStop:
      command->result = engine.UnmergeAll(true);
      unmerge_refused_ |= command->result == -ENOMEM;
      // Frames that a child may still map cannot be given up, and show through raw discards once nobody watches: a child
      // that is about to exit is waited for. With one that stays, see docs/limits.md.
      for (int i = 0; command->result == 0 && i < kStopPatience && engine.ReclaimNow(); ++i) {
        os::FutexWait(&end_, 0, 10 * kMillisecond);
      }
      break;
    case Command::kStats: {
      auto& g = command->gauges;
      g.counters = engine.counters().Read();
      g.shared = engine.pages_shared();
      g.frames_in_use = engine.frames_in_use();
      g.frames_live = engine.frames_live();
      g.metadata = engine.metadata_bytes();
      g.maps = engine.maps_used();
      g.regions = g.region_bytes = 0;
      AdvisedRegion region;
      for (Address at = 0; engine.NextAdvised(at, &region); at = region.whole.end) {
        ++g.regions;
        g.region_bytes += region.whole.span().bytes;
      }
      command->result = 0;
      break;
    }
    case Command::kRegion: {
      command->result = engine.NextAdvised(command->span.start, &command->region) ? 0 : -ENOENT;
      if (command->result == 0) command->counts = engine.CountRegion(command->region.whole.span());
      break;
    }
    case Command::kExplain: {
      const Address a = command->span.start & ~(page - 1);
      const Region* region = engine.regions().Find(a);
      command->in_region = region && region->kind == Region::kMergeable;
      command->page = engine.Explain(a);
      command->sharers = engine.SharersOf(command->page);
      command->heat = engine.HeatOf(a);
      os::ScanRequest request;
      request.any_of = os::kPresent;
      request.returned = os::kHuge;
      os::PageRun run;
      const os::ScanResult scan = system_->Scan({a, page}, request, &run, 1);
      // Sweeps come once a pass; a hot segment's only every 2^heat passes.
      command->next_look_ms = (pass_sleep_ns_ / kMillisecond + 1) << command->heat;
      command->huge = !scan.error && scan.runs == 1 && (run.categories & os::kHuge);
      command->result = 0;
      break;
    }
  }
}

// Every request is answered anew, and only after what was discarded before it has been seen to: parked_ holds the number
// of the request that it answers.
void Runtime::Park() {
  while (pause_.load(std::memory_order_seq_cst) != 0) {
    const std::uint32_t changed = pause_bell_.load(std::memory_order_seq_cst);
    const std::uint32_t request = pause_requests_.load(std::memory_order_seq_cst);
    if (parked_.load(std::memory_order_relaxed) != request) {
      // A child inherits what the page tables say, and may outlive those who answer its faults.
      engine_->FillAllMarked();
      options_.inheritance->KeepRegions(*engine_);
      options_.inheritance->KeepFiles(*engine_);
      parked_.store(request, std::memory_order_seq_cst);
      os::FutexWake(&parked_, INT_MAX);
    }
    if (RunWhileParked()) continue;
    if (pause_.load(std::memory_order_seq_cst) != 0) os::FutexWait(&pause_bell_, changed, -1);
  }
}

bool Runtime::MayRunWhileParked(const Command& command) const {
  switch (command.kind) {
    case Command::kUnmap:
    case Command::kRelease:
    case Command::kDiscard:
    case Command::kCall:
    case Command::kFind:
    case Command::kRest:
    case Command::kExclude:
    case Command::kAcrossNodes:
    case Command::kStats:
    case Command::kRegion:
    case Command::kExplain: return true;
    case Command::kAdvise: return !engine_->ChangesBreaker(command.span, command.sync_break);
    case Command::kUnmerge:
    case Command::kHandOver:
    case Command::kMerge:
    case Command::kUnmergeAll:
    case Command::kStop: return false;
  }
  return false;
}

// One command, if there is one that may run now. What it has changed is what a child inherits from then on.
bool Runtime::RunWhileParked() {
  Slot* oldest = nullptr;
  for (Slot& slot : slots_) {
    if (slot.state.load(std::memory_order_seq_cst) != kPosted || !MayRunWhileParked(slot.command)) continue;
    if (!oldest || slot.ticket < oldest->ticket) oldest = &slot;
  }
  if (!oldest) return false;
  oldest->state.store(kRunning, std::memory_order_relaxed);
  Run(&oldest->command, oldest, true);
  engine_->FillAllMarked();
  options_.inheritance->KeepRegions(*engine_);
  Answer(oldest);
  return true;
}

void Runtime::Pause() {
  const std::uint32_t request = pause_requests_.fetch_add(1, std::memory_order_seq_cst) + 1;
  pause_.fetch_add(1, std::memory_order_seq_cst);
  pause_bell_.fetch_add(1, std::memory_order_seq_cst);
  os::FutexWake(&pause_bell_, INT_MAX);
  Nudge();
  for (;;) {
    const std::uint32_t parked = parked_.load(std::memory_order_seq_cst);
    if (static_cast<std::int32_t>(parked - request) >= 0) break;
    os::FutexWait(&parked_, parked, 100 * kMillisecond);
  }
}

void Runtime::Resume() {
  pause_.fetch_sub(1, std::memory_order_seq_cst);
  pause_bell_.fetch_add(1, std::memory_order_seq_cst);
  os::FutexWake(&pause_bell_, INT_MAX);
}

void Runtime::InheritRegions() {
  const Inheritance::Regions& inherited = options_.inheritance->known();
  for (std::size_t i = 0; i < inherited.count; ++i) {
    const Inheritance::Entry& entry = inherited.entries[i];
    Command command;
    if (entry.start >= entry.end) continue;  // unmapped since
    // Another userfaultfd's hold ends with the fork.
    command.kind = entry.cause && entry.cause != EBUSY ? Command::kExclude : Command::kAdvise;
    command.cause = entry.cause;
    command.span = {entry.start, entry.end - entry.start};
    command.promise = entry.promise;
    command.sync_break = entry.sync_break;
    command.owned = entry.owned;
    Execute(&command);
  }
}

std::int64_t Runtime::NewsSleep() {
  return std::exchange(news_sleep_ns_, std::min(news_sleep_ns_ + news_sleep_ns_ / 8, kLongestNewsSleep));
}

void Runtime::ScannerLoop() {
  ReportStart();
  while (RunCommands()) {
    TendDomain();
    const bool again_at_once = TendWishes();
    Report();
    if (pause_.load(std::memory_order_acquire)) {
      Park();
      continue;
    }
    if (tunables_changed_.exchange(false, std::memory_order_acq_rel)) {
      next_scan_at_ = 0, debt_ns_ = std::min<std::int64_t>(debt_ns_, 0);
      batch_pages_ = 0;  // what was read of a large one is many small ones
    }
    if (settings_.run.load(std::memory_order_relaxed) == 1 && engine_->HasRegions()) {
      const std::uint64_t now = system_->NowNanoseconds();
      if (now >= next_scan_at_) {
        Scan();
        continue;
      }
      if (again_at_once) continue;
      // A gate that could not be opened, and memory that has been moved, do not wait for the next pass.
      bool again = false;
      if (now >= housekeeping_at_) {
        again = engine_->Housekeeping();
        housekeeping_at_ = again ? 0 : now + kHousekeepingSleep;
      }
      const std::int64_t pass = std::min(static_cast<std::int64_t>(next_scan_at_ - now), again ? kMillisecond : kHousekeepingSleep);
      if (source_ == nullptr) {
        Sleep(JoiningSoon() ? std::min(pass, join_look_ns_) : pass);
      } else if (Sleep(std::min(pass, NewsSleep())); engine_->HearNews()) {
        news_sleep_ns_ = kNewsSleep;
        // What others have to say is worth a pass at once where it is worth more than the pass takes; the rest is gathered for a while.
        const bool now_or_never = engine_->NewsPages() < 0 || engine_->NewsPages() * kWorthOfPageNs >= pass_cpu_ns_;
        const std::uint64_t soon = now_or_never ? now : pass_ended_at_ + static_cast<std::uint64_t>(kLongestPassSleep);
        next_scan_at_ = std::min(next_scan_at_, std::max(soon, rest_until_));
      }
      continue;
    }
    const bool again = engine_->Housekeeping();
    if (again_at_once) continue;
    const bool now_and_then = engine_->HasRegions() || engine_->HasForeign() || engine_->ReclaimDue() || formers_[0].source;
    Sleep(again                        ? kMillisecond
          : JoiningSoon()              ? join_look_ns_
          : source_ != nullptr         ? NewsSleep()
          : now_and_then               ? kLongestPassSleep
                                       : -1);
    if (source_) engine_->HearNews();  // an operator's wish is looked for next
  }
}

// KSM's scan-time advisor: a batch of such a size that all tracked pages pass in the target time, within its bounds. KSM
// approaches it pass by pass from how long the last one took; here the sizes are known.
std::int64_t Runtime::AdvisePages() const {
  const auto value_of = [](const std::atomic<std::int64_t>& value) { return value.load(std::memory_order_relaxed); };
  std::int64_t tracked = 0;
  const CounterValues counters = engine_->counters().Read();
  for (PageState state : {PageState::kFresh, PageState::kStill, PageState::kMerged, PageState::kBroken, PageState::kZero,
                          PageState::kUnmerged}) {
    tracked += counters.in(state);
  }
  const std::int64_t least = value_of(settings_.advisor_min_pages_to_scan), most = value_of(settings_.advisor_max_pages_to_scan);
  const std::int64_t target_ms = value_of(settings_.advisor_target_scan_time) * 1000;
  const auto wanted = static_cast<double>(tracked) * static_cast<double>(value_of(settings_.sleep_millisecs)) /
                      static_cast<double>(target_ms);
  return std::max(least, std::min(most, static_cast<std::int64_t>(wanted)));
}

// How many times over the pass that has just ended paid for itself: by what is saved now and was not at any time of the last seconds.
// What the program fills and the scanner drops again and again saves nothing.
std::int64_t Runtime::PassPaid() {
  const CounterValues counters = engine_->counters().Read();
  const std::int64_t saved = counters.in(PageState::kMerged) + counters.in(PageState::kZero);
  const std::uint64_t now = system_->NowNanoseconds();
  const auto since = static_cast<std::int64_t>(std::min(now - paid_at_, kForgetSavedNs));
  paid_at_ = now;
  if (saved < saved_most_) saved_most_ -= (saved_most_ - saved) * (since / kMillisecond) / static_cast<std::int64_t>(kForgetSavedNs / kMillisecond);
  const std::int64_t gain = saved - saved_most_;
  saved_most_ = std::max(saved_most_, saved);
  pass_cpu_ns_ = std::exchange(steps_cpu_ns_, 0);
  const auto worth = [&](std::int64_t pages) { return pages > 0 ? pages * kWorthOfPageNs / std::max<std::int64_t>(pass_cpu_ns_, 1) : 0; };
  // What has just been written or broken may come to rest: then the next passes pay, or those after the time that broken pages
  // are left alone.
  if (worth(counters.cow_breaks - breaks_at_pass_) >= kPromising) {
    promising_until_ = now + engine_->SecondsToRemerge() * std::uint64_t{1000} * kMillisecond + kAfterRemergeNs;
  }
  breaks_at_pass_ = counters.cow_breaks;
  promising_ = now < promising_until_ || worth(counters.in(PageState::kFresh)) >= kRichly;
  return worth(gain);
}

// One step, and when pacing lets the next one come. A command that ends the sleep does not bring the next step forward.
void Runtime::Scan() {
  const std::uint64_t cpu = system_->ThreadCpuNanoseconds();
  const bool advised = settings_.advisor_mode.load(std::memory_order_relaxed) != 0;
  auto limit = settings_.cpu_limit_percent.load(std::memory_order_relaxed);
  // The tighter of the two: an advisor raises no limit.
  if (advised) limit = std::min(limit > 0 ? limit : 100, settings_.advisor_max_cpu.load(std::memory_order_relaxed));
  const Engine::StepResult step = engine_->Step();
  const std::uint64_t now = system_->NowNanoseconds();
  batch_pages_ += static_cast<std::int64_t>(step.pages_read);
  const auto used = static_cast<std::int64_t>(system_->ThreadCpuNanoseconds() - cpu);
  steps_cpu_ns_ += used;
  if (advised && (step.pass_ended || settings_.advised_pages_to_scan.load(std::memory_order_relaxed) == 0)) {
    settings_.advised_pages_to_scan.store(AdvisePages(), std::memory_order_relaxed);
  }
  const auto pages_to_scan =
      (advised ? settings_.advised_pages_to_scan : settings_.pages_to_scan).load(std::memory_order_relaxed);
  const auto sleep_millisecs = settings_.sleep_millisecs.load(std::memory_order_relaxed);
  std::int64_t sleep = 0;
  if (limit > 0 && limit < 100) {
    // Over some seconds: what was not used before may be used at once, and memory that has just come, or a process that has just begun,
    // is what there is to use it for. What was used ahead of the budget is slept off, as soon as it is worth a sleep.
    debt_ns_ = std::max(debt_ns_ + used * 100 / limit - static_cast<std::int64_t>(now - budget_at_), -kBurstNs * 100 / limit);
    sleep = debt_ns_ > kMillisecond ? debt_ns_ : 0;
  } else {
    debt_ns_ = 0;
  }
  budget_at_ = now;
  if (pages_to_scan <= 0) {
    batch_pages_ = 0;
  } else if (const std::int64_t batches = batch_pages_ / pages_to_scan; batches > 0) {
    // A step reads up to 8 MiB: that may be many of them, and a part of the next one.
    batch_pages_ %= pages_to_scan;
    const std::int64_t milliseconds = std::min(batches * sleep_millisecs, kTunableRules[kTunable_sleep_millisecs].most);
    sleep = std::max(sleep, milliseconds * kMillisecond);
  }
  rest_until_ = now + static_cast<std::uint64_t>(sleep);
  if (step.fruitful) news_sleep_ns_ = kNewsSleep;
  if (step.pass_ended) {
    // The length of a pass is the interval in which a page has to be still: not shorter than a tenth of a second, unless
    // somebody wants it flat out. A pass that finds nothing doubles it, and so does one that finds less than it costs.
    const std::int64_t paid = settings_.smart_scan.load(std::memory_order_relaxed) ? PassPaid() : (PassPaid(), kRichly);
    const std::int64_t shortest = std::max(kFirstPassSleep, sleep_millisecs * kMillisecond);
    pass_ended_at_ = now;
    if (sleep_millisecs == 0) {
      pass_sleep_ns_ = step.fruitful ? 0 : std::min(pass_sleep_ns_ + kMillisecond, 20 * kMillisecond);
    } else if ((step.fruitful && paid >= kRichly) || pass_sleep_ns_ == 0) {
      pass_sleep_ns_ = shortest;
    } else if (step.fruitful && paid > 0) {
      pass_sleep_ns_ = std::max(pass_sleep_ns_ / 2, shortest);
    } else {
      const std::int64_t longest = promising_ ? kLongestPassSleep : std::clamp(pass_cpu_ns_ * kFruitlessPart, kLongestPassSleep, kFruitlessSleep);
      pass_sleep_ns_ = std::min(pass_sleep_ns_ * 2, longest);
    }
    // What is to be looked at once more is looked at soon, whatever that says of the passes after it.
    sleep = std::max(sleep, step.eager ? std::min(shortest, pass_sleep_ns_) : pass_sleep_ns_);
  }
  next_scan_at_ = now + static_cast<std::uint64_t>(sleep);
}

}  // namespace ksmu::engine
