// What an operator of the domain wishes of this process (docs/control.md): tunables set, everything unmerged, regions told. Between
// two steps, with no gate shut, and in portions, between which the program's own commands are carried out.

#include <algorithm>
#include <cerrno>

#include "engine/runtime.h"
#include "engine/tunables.h"
#include "ksmu/ksmu.h"

namespace ksmu::engine {
namespace {
constexpr std::size_t kBytesAPortion = std::size_t{256} << 20;  // of which pages are counted: a tenth of a millisecond or two
constexpr int kPortionsAnAnswer = 64;                           // then what has been counted is told, and the rest is to be asked for
// One comes after another where that says what the other may be; and what is set by `run` finds the others as they are to be.
constexpr std::uint32_t kFirst = kTunable_advisor_mode, kLast = kTunable_run;
}  // namespace

// True: there is more to be done, at once.
bool Runtime::TendWishes() {
  if (settings_.run.load(std::memory_order_relaxed) != 2) StopUnmerging(0);
  if (source_ && TakeWishes()) {
    engine_->HearNews();  // the answer goes out with it: an operator waits
    news_sleep_ns_ = kNewsSleep;
  }
  if (telling_.active && source_) TellRegions();
  else telling_.active = false;
  if (unmerging_ == EINPROGRESS) UnmergePortion();
  return telling_.active || unmerging_ == EINPROGRESS;
}

bool Runtime::TakeWishes() {
  frames::Source::Wishes wishes;
  if (!options_.steward.set || !source_->TakeWishes(&wishes)) return false;
  const auto set = [&](std::uint32_t tunable) {
    if (!(wishes.tunables >> tunable & 1)) return;
    const int error = options_.steward.set(*this, tunable, wishes.values[tunable], wishes.yielding >> tunable & 1);
    if (tunable == kTunable_run && error == 0) StopUnmerging(wishes.values[tunable] == 2 ? EINPROGRESS : 0);
    source_->AnswerTunable(tunable, error);
  };
  set(kFirst);
  for (std::uint32_t tunable = 0; tunable < kTunableCount; ++tunable) {
    if (tunable != kFirst && tunable != kLast) set(tunable);
  }
  set(kLast);
  if (wishes.regions) {
    telling_ = {};
    telling_.active = true;
    telling_.at = wishes.regions_from & ~static_cast<Address>(engine_->page_size() - 1);
  }
  // Before the answer goes out, and in place of what was to be told from before it: whoever has the answer finds it done.
  TellDomain(system_->NowNanoseconds());
  return true;
}

// 0: nothing of that kind is under way.
void Runtime::StopUnmerging(int now) {
  unmerging_ = now;
  unmerged_to_ = 0;
}

void Runtime::UnmergePortion() {
  const int error = engine_->UnmergePart(&unmerged_to_);
  if (error == 0 && unmerged_to_ < PageTable::kLimit) return;
  unmerge_refused_ |= error == -ENOMEM;
  StopUnmerging(-error);
  tell_at_ = 0;
}

void Runtime::TellRegions() {
  Telling& t = telling_;
  ++t.portions;
  AdvisedRegion region;
  const bool found = engine_->NextAdvised(t.at, &region);
  // What has been counted of one that is not there any more is told all the same.
  if (t.count < t.regions.size() && t.regions[t.count].end != 0 && (!found || region.whole.start > t.at)) ++t.count;
  if (found && t.count < t.regions.size()) {
    const Span whole = region.whole.span();
    frames::Source::RegionReport& to = t.regions[t.count];
    if (to.end == 0) {
      // From its beginning, or from where the question leads into it.
      to.start = std::max<std::uint64_t>(whole.start, t.at);
      to.flags = static_cast<std::uint32_t>((region.whole.promise ? KSMU_F_NO_RAW_DISCARDS : 0) | (region.whole.sync_break ? KSMU_F_SYNC_BREAK : 0));
      // Of the whole: told with the part that has its beginning.
      if (to.start == whole.start) to.excluded_bytes = region.excluded_bytes, to.excluded_cause = static_cast<std::uint32_t>(region.excluded_cause);
    }
    const Address from = std::max<Address>(whole.start, t.at), end = std::min<Address>(whole.end(), from + kBytesAPortion);
    const RegionCounts counts = engine_->CountRegion({from, end - from});
    const auto in = [&](PageState state) { return static_cast<std::uint64_t>(counts.pages[static_cast<std::size_t>(state)]); };
    to.merged += in(PageState::kMerged), to.still += in(PageState::kStill), to.changing += in(PageState::kFresh), to.zero += in(PageState::kZero);
    for (std::size_t reason = 0; reason < counts.unmerged.size(); ++reason) to.unmerged[reason] += static_cast<std::uint64_t>(counts.unmerged[reason]);
    to.unmerged[static_cast<std::size_t>(Reason::kBroken)] += in(PageState::kBroken);
    t.at = to.end = to.next = end;
    if (end == whole.end()) ++t.count;
    if (t.count < t.regions.size() && t.portions < kPortionsAnAnswer) return;
    if (end != whole.end()) ++t.count;
  }
  if (!found && t.count) t.regions[t.count - 1].next = 0;
  source_->AnswerRegions(t.regions.data(), t.count);
  t.active = false;
}

}  // namespace ksmu::engine
