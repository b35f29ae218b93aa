// The C interface: checks arguments, hands commands to the scanner, turns results into errno. See include/ksmu/ksmu.h.

#include "ksmu/ksmu.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <type_traits>

#include "api/state.h"
#include "engine/tunables.h"
#include "os/thread.h"
#include "os/without_engine.h"

using namespace ksmu;
using namespace ksmu::api;
using engine::Command;
using engine::PageState;
using engine::Reason;

namespace {

constexpr const char* kDiscardHoles = "part of the range is not mapped: what is mapped has been discarded";
constexpr const char* kOutOfRange = "the value is out of the tunable's range";
constexpr std::int64_t kBytesPerMapping = 270;  // of kernel memory

// On success errno is what it was.
class KeepErrno {
 public:
  KeepErrno() : saved_(errno) {}
  int Succeed() const {
    errno = saved_;
    return 0;
  }
  template <typename T>
  T Return(T value) const {
    errno = saved_;
    return value;
  }

 private:
  int saved_;
};

std::size_t PageSize() {
  static const std::size_t page = os::SystemPageSize();
  return page;
}

// Checks and rounds; false: EINVAL has been set.
bool MakeSpan(const void* addr, std::size_t length, os::Span* span) {
  const std::size_t page = PageSize();
  const auto start = reinterpret_cast<os::Address>(addr);
  if (start & (page - 1)) {
    Fail(EINVAL, "the address is not aligned to the page size");
    return false;
  }
  const std::size_t bytes = (length + page - 1) & ~(page - 1);
  if (bytes < length || start + bytes < start) {
    Fail(EINVAL, "address and length overflow");
    return false;
  }
  *span = {start, bytes};
  return true;
}

const char* SentenceFor(int error, const Command& command) {
  const bool unmerging = command.kind == Command::kUnmerge || command.kind == Command::kUnmergeAll;
  switch (error) {
    case ENOMEM:
      if (command.holes) return "part of the range is not mapped: what is mapped has been unmerged";
      if (unmerging) {
        return "unmerging all of it does not fit into memory: what is left stays merged. Free memory or add swap, then ask "
               "again";
      }
      if (command.kind == Command::kDiscard) return kDiscardHoles;
      if (command.kind == Command::kUnmap) return "unmapping would split a mapping, and the process has as many as it may";
      return "part of the range is not mapped (what is mapped has been advised), or there is no memory";
    case EOPNOTSUPP:
      return "nothing in the range can be merged: it is shared, file-backed, hugetlb, locked, a stack, libc's heap or special";
    case EBUSY:
      return "another userfaultfd holds the range: its owner has to unregister it first";
    case EAGAIN:
      return unmerging ? "the memory is being moved or changed by another thread, or the library is being stopped: what is "
                         "left stays merged, ask again"
                       : "the library is being stopped";
    case EINTR:
      return "interrupted by a signal: what has been merged is merged, ask again for the rest";
    default:
      return "the kernel refused it";
  }
}

int Finish(const KeepErrno& keep, const Command& command) {
  if (command.result >= 0) return keep.Succeed();
  const auto error = static_cast<int>(-command.result);
  return Fail(error, SentenceFor(error, command));
}

template <typename T>
int CopyOut(const KeepErrno& keep, const T& value, T* out, std::size_t size) {
  std::memcpy(static_cast<void*>(out), &value, std::min(size, sizeof value));
  if (size > sizeof value) std::memset(reinterpret_cast<char*>(out) + sizeof value, 0, size - sizeof value);
  return keep.Succeed();
}

// All values from one command, so that the balance holds: the sums are made of what was read once.
void FillStats(const Command& command, ksmu_stats* stats) {
  const auto page = static_cast<std::int64_t>(PageSize());
  const auto& g = command.gauges;
  const engine::CounterValues& c = g.counters;
  ksmu_stats& s = *stats;
  s.pages_merged = c.in(PageState::kMerged);
  s.pages_shared = std::min(static_cast<std::int64_t>(g.shared), s.pages_merged);
  s.pages_sharing = s.pages_merged - s.pages_shared;
  s.pages_unshared = c.in(PageState::kStill);
  s.pages_volatile = c.in(PageState::kFresh);
  s.ksm_zero_pages = c.in(PageState::kZero);
  s.pages_scanned = c.pages_scanned;
  s.pages_skipped = c.pages_skipped;
  s.full_scans = c.full_scans;
  s.stable_node_chains = c.chains;
  s.stable_node_dups = c.dups;
  s.pages_merged_total = c.merged_total;
  s.cow_breaks = c.cow_breaks;
  s.pages_remerged = c.remerged;
  s.pages_swept = c.pages_swept;
  s.discards = c.discards;
  s.metadata_bytes = static_cast<std::int64_t>(g.metadata);
  s.maps_used = static_cast<std::int64_t>(g.maps);
  s.general_profit = (s.pages_sharing + s.ksm_zero_pages) * page - s.metadata_bytes - kBytesPerMapping * s.maps_used;
  s.gate_max_us = (c.gate_max_ns + 999) / 1000;
  s.gate_p99_us = (c.gate_p99_ns + 999) / 1000;
  s.gate_count = c.gate_count;
  s.unmerge_bytes = s.pages_merged * page;
  s.regions = static_cast<std::int64_t>(g.regions);
  s.region_bytes = static_cast<std::int64_t>(g.region_bytes);
  s.frames_in_use = static_cast<std::int64_t>(g.frames_in_use);
  s.pool_bytes = static_cast<std::int64_t>(g.frames_live) * page;
  s.children = c.children;
  auto unmerged = [&](Reason reason) { return c.unmerged[static_cast<std::size_t>(reason)]; };
#define KSMU_COPY_REASON(NAME, name) s.unmerged_##name = unmerged(static_cast<Reason>(KSMU_REASON_##NAME));
  KSMU_FOR_EACH_REASON(KSMU_COPY_REASON)
#undef KSMU_COPY_REASON
  s.unmerged_broken = c.in(PageState::kBroken);
  s.pages_tracked = s.pages_merged + s.ksm_zero_pages + s.pages_unshared + s.pages_volatile;
#define KSMU_ADD_REASON(NAME, name) s.pages_tracked += s.unmerged_##name;
  KSMU_FOR_EACH_REASON(KSMU_ADD_REASON)
#undef KSMU_ADD_REASON
}

// How a command comes to the scanner: from whatever thread it is, or from the scanner itself.
using Way = void (engine::Runtime::*)(Command*);

ksmu_stats ReadStatsOf(engine::Runtime* runtime, Way way) {
  ksmu_stats stats{};
  stats.starts = InRawChild() ? 0 : Starts();
  if (!runtime) return stats;
  Command command;
  command.kind = Command::kStats;
  (runtime->*way)(&command);
  if (command.result == 0) FillStats(command, &stats);
  return stats;
}

ksmu_stats ReadStats() {
  Use use(Use::kNever);
  return ReadStatsOf(use.runtime(), &engine::Runtime::Execute);
}

std::int64_t ValueOf(const Tunable& tunable) {
  const bool advised = tunable.value == &settings().pages_to_scan && settings().advisor_mode.load() != 0;
  return (advised ? settings().advised_pages_to_scan : *tunable.value).load(std::memory_order_relaxed);
}

// What ksmu_set does but for making `run` come true. `runtime`: nullptr where there is none. `set`: whose wish it is.
using Setter = void (*)(const Tunable*, std::int64_t);
int SetTunable(engine::Runtime* runtime, Way way, Setter set, const Tunable* tunable, std::int64_t value) {
  if (value < tunable->minimum || value > tunable->maximum) return Fail(EINVAL, kOutOfRange);
  if (tunable->value == &settings().max_page_sharing && value != settings().max_page_sharing.load() && runtime) {
    if (ReadStatsOf(runtime, way).pages_merged != 0) return Fail(EBUSY, "pages are shared: set run to 2 first");
  }
  if (tunable->value == &settings().pages_to_scan && settings().advisor_mode.load() != 0) {
    return Fail(EINVAL, "the advisor sets pages_to_scan: set advisor_mode to 0 first");
  }
  if (tunable->value == &settings().merge_across_nodes && runtime) {
    Command command;
    command.kind = Command::kAcrossNodes;
    command.across = value != 0;
    (runtime->*way)(&command);
    if (command.result == -EBUSY) return Fail(EBUSY, "pages are shared: set run to 2 first");
    if (command.result == -EOPNOTSUPP) return Fail(EOPNOTSUPP, "the kernel does not tell on which node a page lies: a filter refuses move_pages(2)");
    if (command.result < 0) return Fail(static_cast<int>(-command.result), SentenceFor(static_cast<int>(-command.result), command));
  }
  set(tunable, value);
  if (tunable->value == &settings().advisor_mode) {
    // As KSM: whatever the mode, pages_to_scan begins anew.
    settings().advised_pages_to_scan.store(0, std::memory_order_relaxed);
    set(FindTunable("pages_to_scan"), 0);
  }
  return 0;
}

const char* const kStateNames[] = {"untracked", "absent", "fresh", "still", "merged", "broken", "zero", "unmerged"};

#define KSMU_REASON_NAME(NAME, name) #name,
const char* const kReasonNames[] = {"", KSMU_FOR_EACH_REASON(KSMU_REASON_NAME)};
#undef KSMU_REASON_NAME

static_assert(static_cast<int>(Reason::kFailed) == KSMU_REASON_FAILED);
static_assert(static_cast<int>(Reason::kBroken) == KSMU_REASON_BROKEN);
static_assert(static_cast<int>(Reason::kCount) == KSMU_REASON_COUNT);
static_assert(KSMU_REASON_COUNT <= KSMU_REASON_SLOTS);

int StateOf(PageState state) {
  switch (state) {
    case PageState::kFresh: return KSMU_PAGE_FRESH;
    case PageState::kStill: return KSMU_PAGE_STILL;
    case PageState::kMerged: return KSMU_PAGE_MERGED;
    case PageState::kBroken: return KSMU_PAGE_BROKEN;
    case PageState::kZero: return KSMU_PAGE_ZERO;
    case PageState::kUnmerged: return KSMU_PAGE_UNMERGED;
    case PageState::kAbsent:
    case PageState::kDropped:
    case PageState::kResidue:
    case PageState::kCount: break;
  }
  return KSMU_PAGE_ABSENT;
}

}  // namespace

namespace ksmu::api {

int SetForDomain(engine::Runtime& runtime, std::uint32_t number, std::int64_t value, bool yields) {
  const Tunable& tunable = TunableOf(number);
  if (yields && IsOwn(&tunable)) return EEXIST;
  const std::int64_t before = tunable.value->load(std::memory_order_relaxed);
  // A domain's rule about nodes comes with joining it, and another one with another domain.
  const Setter set = tunable.value == &settings().merge_across_nodes ? &SetByProgram : &SetByDomain;
  if (SetTunable(&runtime, &engine::Runtime::ExecuteHere, set, &tunable, value) != 0) return errno;
  if (value != before) runtime.TunableChanged();
  return 0;
}

void ReadForDomain(engine::Runtime& runtime, frames::Source::Report* report) {
  const ksmu_stats stats = ReadStatsOf(&runtime, &engine::Runtime::ExecuteHere);
  static_assert(sizeof stats <= sizeof report->counters && std::is_trivially_copyable_v<ksmu_stats>);
  std::memcpy(report->counters.data(), &stats, sizeof stats);
  for (std::uint32_t i = 0; i < engine::kTunableCount; ++i) report->tunables[i] = ValueOf(TunableOf(i));
}

void LeaveDomain(engine::Runtime& runtime) {
  if (ForgetDomain()) runtime.TunableChanged();
}

}  // namespace ksmu::api

extern "C" {

int ksmu_advise(void* addr, size_t length, int advice) {
  const KeepErrno keep;
  constexpr int kFlags = KSMU_F_NO_RAW_DISCARDS | KSMU_F_SYNC_BREAK;
  const int flags = advice & kFlags, plain = advice & ~kFlags;
  if (plain != KSMU_DISCARD && plain != KSMU_MERGEABLE && plain != KSMU_UNMERGEABLE && plain != KSMU_RELEASE) {
    return Fail(EINVAL, "unknown advice or flag");
  }
  if (flags && plain != KSMU_MERGEABLE) return Fail(EINVAL, "flags go with KSMU_MERGEABLE only");
  os::Span span;
  if (!MakeSpan(addr, length, &span)) return -1;
  if (span.bytes == 0) return keep.Succeed();

  const auto discard = [&]() {
    const int error = InRawChild() ? os::DiscardWithoutEngine(span) : HasLeftovers() ? os::DiscardAfterStop(span) : os::DiscardPlainly(span);
    if (error) return Fail(-error, error == -ENOMEM ? kDiscardHoles : "the kernel refused the discard");
    return keep.Succeed();
  };
  if (plain == KSMU_DISCARD && InRawChild()) return discard();
  Use use(plain == KSMU_MERGEABLE ? Use::kStart : Use::kWake);
  if (use.error()) return -1;
  if (!use.runtime()) {
    return plain == KSMU_DISCARD ? discard() : keep.Succeed();  // there are no regions
  }
  Command command;
  command.span = span;
  command.kind = plain == KSMU_MERGEABLE     ? Command::kAdvise
                 : plain == KSMU_UNMERGEABLE ? Command::kUnmerge
                 : plain == KSMU_RELEASE     ? Command::kRelease
                                             : Command::kDiscard;
  command.promise = flags & KSMU_F_NO_RAW_DISCARDS;
  command.sync_break = flags & KSMU_F_SYNC_BREAK;
  if (command.promise) NotePromise();
  use.runtime()->Execute(&command);
  if (command.result == -EAGAIN && command.kind == Command::kDiscard) return discard();
  return Finish(keep, command);
}

void* ksmu_map(size_t length, unsigned flags) {
  const KeepErrno keep;
  void* const failed = reinterpret_cast<void*>(-1);  // MAP_FAILED
  if (flags & ~static_cast<unsigned>(KSMU_F_NO_RAW_DISCARDS | KSMU_F_SYNC_BREAK)) {
    Fail(EINVAL, "unknown flag");
    return failed;
  }
  os::Span span;
  if (length == 0) {
    Fail(EINVAL, "the length is 0");
    return failed;
  }
  if (!MakeSpan(nullptr, length, &span)) return failed;
  Use use(Use::kStart);
  if (use.error()) return failed;
  os::Address at = 0;
  if (int error = os::MapForProgram(span.bytes, &at)) {
    Fail(-error, "no memory, or no address space, for the mapping");
    return failed;
  }
  Command command;
  command.kind = Command::kAdvise;
  command.span = {at, span.bytes};
  command.promise = command.owned = true;
  NotePromise();
  command.sync_break = flags & KSMU_F_SYNC_BREAK;
  use.runtime()->Execute(&command);
  if (command.result < 0) {
    os::UnmapWithoutEngine(command.span);
    Finish(keep, command);
    return failed;
  }
  return keep.Return(reinterpret_cast<void*>(at));
}

int ksmu_unmap(void* addr, size_t length) {
  const KeepErrno keep;
  os::Span span;
  if (!MakeSpan(addr, length, &span)) return -1;
  if (span.bytes == 0) return Fail(EINVAL, "the length is 0");
  Command command;
  command.kind = Command::kUnmap;
  command.span = span;
  if (!InRawChild()) {
    Use use(Use::kWake);
    if (use.error()) return -1;
    if (use.runtime()) {
      use.runtime()->Execute(&command);
      if (command.result != -EAGAIN) return Finish(keep, command);
    }
  }
  command.result = os::UnmapWithoutEngine(span);
  return Finish(keep, command);
}

ssize_t ksmu_merge(void* addr, size_t length) {
  const KeepErrno keep;
  os::Span span;
  if (!MakeSpan(addr, length, &span)) return -1;
  if (span.bytes == 0) return keep.Return(ssize_t{0});
  Use use(Use::kStart);
  if (use.error()) return -1;
  Command command;
  command.kind = Command::kMerge;
  command.span = span;
  use.runtime()->Execute(&command);
  if (command.result < 0) return Finish(keep, command);
  return keep.Return(static_cast<ssize_t>(command.result));
}

int ksmu_read_stats(struct ksmu_stats* stats, size_t size) {
  const KeepErrno keep;
  if (!stats || size == 0) return Fail(EINVAL, "no struct ksmu_stats, or its size is 0");
  return CopyOut(keep, ReadStats(), stats, size);
}

int ksmu_get(const char* name, int64_t* value) {
  const KeepErrno keep;
  if (!name || !value) return Fail(EINVAL, "the name or the place for the value is NULL");
  if (const Tunable* tunable = FindTunable(name)) {
    *value = ValueOf(*tunable);
    return keep.Succeed();
  }
#define KSMU_GET_COUNTER(field)           \
  if (std::strcmp(name, #field) == 0) {   \
    *value = ReadStats().field;           \
    return keep.Succeed();                \
  }
  KSMU_FOR_EACH_COUNTER(KSMU_GET_COUNTER)
#undef KSMU_GET_COUNTER
  return Fail(ENOENT, "there is no counter and no tunable of this name");
}

int ksmu_set(const char* name, int64_t value) {
  const KeepErrno keep;
  if (!name) return Fail(EINVAL, "the name is NULL");
  const Tunable* tunable = FindTunable(name);
  if (!tunable) {
#define KSMU_IS_COUNTER(field) \
  if (std::strcmp(name, #field) == 0) return Fail(EACCES, "this is a counter: it can only be read");
    KSMU_FOR_EACH_COUNTER(KSMU_IS_COUNTER)
#undef KSMU_IS_COUNTER
    return Fail(ENOENT, "there is no tunable of this name");
  }
  // Before anything is started for it.
  if (value < tunable->minimum || value > tunable->maximum) return Fail(EINVAL, kOutOfRange);
  Use use(Use::kWake);
  if (use.error()) return -1;
  if (SetTunable(use.runtime(), &engine::Runtime::Execute, &SetByProgram, tunable, value) != 0) return -1;
  if (!use.runtime()) return keep.Succeed();
  if (tunable->value == &settings().run && value != 1) {
    // 0: as KSM's, which waits for the batch in hand.
    Command command;
    command.kind = value == 2 ? Command::kUnmergeAll : Command::kRest;
    use.runtime()->Execute(&command);
    return Finish(keep, command);
  }
  use.runtime()->TunableChanged();
  return keep.Succeed();
}

int ksmu_read_region(const void* addr, struct ksmu_region_stats* stats, size_t size) {
  const KeepErrno keep;
  if (!stats || size == 0) return Fail(EINVAL, "no struct ksmu_region_stats, or its size is 0");
  Use use(Use::kNever);
  if (!use.runtime()) return Fail(ENOENT, "no region ends above this address");
  Command command;
  command.kind = Command::kRegion;
  command.span = {reinterpret_cast<os::Address>(addr), 1};
  use.runtime()->Execute(&command);
  if (command.result < 0) return Fail(ENOENT, "no region ends above this address");
  ksmu_region_stats s{};
  const engine::Region& region = command.region.whole;
  s.start = reinterpret_cast<void*>(region.start);
  s.length = region.end - region.start;
  s.flags = (region.promise ? KSMU_F_NO_RAW_DISCARDS : 0) | (region.sync_break ? KSMU_F_SYNC_BREAK : 0);
  s.excluded_bytes = static_cast<std::int64_t>(command.region.excluded_bytes);
  s.excluded_cause = command.region.excluded_cause;
  auto in = [&](PageState state) { return command.counts.pages[static_cast<std::size_t>(state)]; };
  s.pages_merged = in(PageState::kMerged);
  s.pages_unshared = in(PageState::kStill);
  s.pages_volatile = in(PageState::kFresh);
  s.pages_zero = in(PageState::kZero);
  for (int reason = 1; reason < KSMU_REASON_COUNT; ++reason) s.unmerged[reason] = command.counts.unmerged[static_cast<std::size_t>(reason)];
  s.unmerged[KSMU_REASON_BROKEN] = in(PageState::kBroken);
  for (std::int64_t count : s.unmerged) s.pages_unmerged += count;
  s.pages_tracked = s.pages_merged + s.pages_unshared + s.pages_volatile + s.pages_zero + s.pages_unmerged;
  return CopyOut(keep, s, stats, size);
}

int ksmu_explain(const void* addr, struct ksmu_page_info* info, size_t size) {
  const KeepErrno keep;
  if (!info || size == 0) return Fail(EINVAL, "no struct ksmu_page_info, or its size is 0");
  ksmu_page_info i{};
  i.state = KSMU_PAGE_UNTRACKED;
  i.next_look_ms = -1;
  Use use(Use::kNever);
  if (use.runtime()) {
    Command command;
    command.kind = Command::kExplain;
    command.span = {reinterpret_cast<os::Address>(addr), 1};
    use.runtime()->Execute(&command);
    if (command.result == 0) {
      i.huge = command.huge;
      if (command.in_region) {
        i.state = StateOf(command.page.state());
        if (i.state == KSMU_PAGE_BROKEN) i.reason = KSMU_REASON_BROKEN;
        if (i.state == KSMU_PAGE_UNMERGED) i.reason = static_cast<int>(command.page.reason());
        i.sharers = command.sharers;
        i.heat = command.heat;
        if (settings().run.load(std::memory_order_relaxed) == 1) i.next_look_ms = command.next_look_ms;
      }
    }
  }
  i.state_name = kStateNames[i.state];
  i.reason_name = kReasonNames[i.reason];
  return CopyOut(keep, i, info, size);
}

}  // extern "C"
