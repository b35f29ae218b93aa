// What the library has to tell the program's log. The scanner looks between two steps: what happens elsewhere (in the
// event thread, while a gate is shut) only leaves numbers behind.

#include "engine/runtime.h"

#include "ksmu/ksmu.h"
#include "os/thread.h"

namespace ksmu::engine {
namespace {

// What a context that had to be closed was for, by its handle.
const char* LossOf(int context) {
  switch (context) {
    case os::kTracker: return "what is written is not seen any more, and nothing new is merged";
    case os::kGate:
    case os::kStaging: return "nothing new is merged";
    case os::kBreaker: return "discards of merged memory that do not go through the library are not seen any more";
    default: return "the same goes for regions with KSMU_F_SYNC_BREAK";
  }
}

}  // namespace

void Runtime::ReportStart() {
  if (!log_.on()) return;
  char release[64];
  os::KernelRelease(release, sizeof release);
  const os::Features& features = system_->features();
  Sentence s;
  s << "ksmu " KSMU_VERSION " runs on Linux " << release;
  const char* between = "; not available: ";
  auto missing = [&](bool there, const char* what) {
    if (there) return;
    s << between << what;
    between = ", ";
  };
  missing(features.kernel_faults, "page faults of system calls (user mode only: no system call may touch advised memory)");
  missing(features.fork_events, "fork events (they take CAP_SYS_PTRACE)");
  missing(features.mapping_query, "queries of single mappings (Linux 6.11)");
  log_.Say(Log::kStarted, features.kernel_faults ? KSMU_LOG_INFO : KSMU_LOG_WARNING, s, system_->NowNanoseconds());
}

// After the engine has gone: `kept` frames of it could not be given up.
void Runtime::ReportStop(std::uint64_t now, std::size_t kept) {
  if (!log_.on()) return;
  Sentence s;
  s << "ksmu has stopped";
  if (kept) {
    s << "; " << static_cast<std::int64_t>(kept)
      << " frames are kept for forked children: raw discards of memory that was merged can show old bytes, "
         "KSMU_DISCARD does not";
  }
  log_.Say(Log::kStopped, kept ? KSMU_LOG_WARNING : KSMU_LOG_INFO, s, now);
}

void Runtime::Report() {
  if (!log_.on()) return;
  const std::uint64_t now = system_->NowNanoseconds();
  const Counters& counters = engine_->counters();
  const os::Refusals& refusals = system_->refusals();
  auto pages = [&](Reason reason) { return counters.unmerged[static_cast<std::size_t>(reason)].load(std::memory_order_relaxed); };
  auto last_refusal = [&](Sentence& s) {
    const auto call = refusals.last();
    if (call < os::Refusals::kCallCount) s << "; the last that failed: " << os::Refusals::Name(call) << ", " << os::ErrorName(refusals.error(call));
  };
  // A gauge is news when it leaves 0, not for as long as it stays.
  auto rises = [&](Log::Kind kind, std::int64_t gauge) {
    bool& told = told_[kind];
    if (gauge == 0) told = false;
    if (gauge == 0 || told || !log_.May(kind, now)) return false;
    return told = true;
  };

  if (const std::uint32_t given_up = system_->given_up() & ~told_given_up_; given_up && log_.May(Log::kContext, now)) {
    const int context = __builtin_ctz(given_up);
    told_given_up_ |= 1u << context;
    Sentence s;
    s << "a system call filter refuses what somebody was waiting for, and a userfaultfd has been closed so that nobody "
         "hangs: memory is right, but " << LossOf(context) << "; stop and start the library where the filter allows";
    log_.Say(Log::kContext, KSMU_LOG_ERROR, s, now);
  }
  if (log_.May(Log::kRefused, now)) {
    for (int c = 0; c < os::Refusals::kCallCount; ++c) {
      const auto call = static_cast<os::Refusals::Call>(c);
      const std::uint64_t count = refusals.forbidden(call);
      if (count == told_refused_[call]) continue;
      Sentence s;
      s << os::Refusals::Name(call) << " has been refused with " << os::ErrorName(refusals.error(call)) << ", "
        << static_cast<std::int64_t>(count - told_refused_[call]) << " times: a filter, a limit or a security module";
      told_refused_[call] = count;
      log_.Say(Log::kRefused, KSMU_LOG_WARNING, s, now);
      break;
    }
  }
  if (const auto n = pages(Reason::kFailed); rises(Log::kFailed, n)) {
    Sentence s;
    s << n << " pages cannot be merged because a system call was refused";
    last_refusal(s);
    log_.Say(Log::kFailed, KSMU_LOG_WARNING, s, now);
  }
  if (const auto n = pages(Reason::kMapBudget); rises(Log::kMaps, n)) {
    Sentence s;
    s << n << " pages are not merged for want of mappings: merging uses " << static_cast<std::int64_t>(engine_->maps_used())
      << ", vm.max_map_count is " << static_cast<std::int64_t>(system_->MaxMappings()) << " and max_maps "
      << settings_.max_maps.load(std::memory_order_relaxed) << " (0: three quarters of it)";
    log_.Say(Log::kMaps, KSMU_LOG_WARNING, s, now);
  }
  if (const auto n = pages(Reason::kPool); rises(Log::kPool, n)) {
    Sentence s;
    s << "the pool of frames cannot grow, and " << n
      << " pages are not merged: RLIMIT_FSIZE, memory or descriptors are short";
    last_refusal(s);
    log_.Say(Log::kPool, KSMU_LOG_WARNING, s, now);
  }
  if (unmerge_refused_ && log_.May(Log::kMemory, now)) {
    unmerge_refused_ = false;
    Sentence s;
    s << "unmerging was refused, since it would not fit into free memory: "
      << counters.pages[static_cast<std::size_t>(PageState::kMerged)].load(std::memory_order_relaxed) << " pages stay merged";
    log_.Say(Log::kMemory, KSMU_LOG_WARNING, s, now);
  }
  if (rises(Log::kMoves, engine_->lost_moves())) {
    Sentence s;
    s << "mappings of merged memory were moved faster than they could be followed: discards of what was moved can show old "
         "bytes";
    log_.Say(Log::kMoves, KSMU_LOG_ERROR, s, now);
  }
  if (rises(Log::kChildren, engine_->unserved_children())) {
    Sentence s;
    s << "more than " << static_cast<std::int64_t>(ChildList::kMaxChildren)
      << " forked children at a time: raw discards in those beyond can show old bytes";
    log_.Say(Log::kChildren, KSMU_LOG_WARNING, s, now);
  }
}

}  // namespace ksmu::engine
