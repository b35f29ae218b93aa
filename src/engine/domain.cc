// The runtime as a member of a domain: it joins when it starts, and again when the broker has gone. Between that it goes on
// alone; nothing that is merged is undone for it.

#include <algorithm>

#include "engine/runtime.h"
#include "ksmu/ksmu.h"
#include "os/process.h"

namespace ksmu::engine {
namespace {
constexpr std::uint64_t kFormersNs = 1'000'000'000;
constexpr std::int64_t kFirstWait = 1'000'000'000, kLongestWait = 16'000'000'000;
constexpr std::int64_t kFirstLook = 1'000'000, kLongestLook = 100'000'000;  // for the answer to having asked to be let in
constexpr std::uint64_t kTellNs = 2'000'000'000;
constexpr std::uint64_t kSoonNs = 100'000'000;
}  // namespace

void Runtime::TendDomain() {
  if (!options_.door) return;
  const std::uint64_t now = system_->NowNanoseconds();
  if (formers_[0].source && now >= formers_at_) {
    formers_at_ = now + kFormersNs;
    ForgetFormers();
  }
  if (source_ && !engine_->SourceIsThere()) {
    LeaveDomain();
    join_wait_ns_ = 0;
    if (log_.on()) {
      Sentence s;
      s << "the broker has gone, or does not answer: what it gave stays merged, and merging goes on in this process alone";
      log_.Say(Log::kDomain, KSMU_LOG_WARNING, s, now);
      warned_of_domain_ = true;
    }
  } else if (source_) {
    if (now >= tell_at_) TellDomain(now);
    return;
  } else if (now < join_at_) {
    return;
  }
  if (!JoiningSoon()) join_wait_ns_ = join_wait_ns_ ? std::min(join_wait_ns_ * 2, kLongestWait) : kFirstWait;
  join_at_ = now + static_cast<std::uint64_t>(join_wait_ns_);
  // No place to remember it by, or a filter of system calls since the start, to which connecting might be news.
  if (formers_.back().source || os::SystemCallFilters() != filters_at_start_) return GiveUpJoining();
  const char* why = nullptr;
  bool soon = false;
  source_ = options_.door->Enter(engine_->page_size(), &why, &soon);
  join_look_ns_ = !soon ? 0 : join_look_ns_ ? std::min(join_look_ns_ * 2, kLongestLook) : kFirstLook;
  if (soon) join_at_ = now + static_cast<std::uint64_t>(join_look_ns_);
  if (source_) {
    engine_->SetSource(source_);
    pass_sleep_ns_ = 0;
    // Soon, but not at once: a page has to be still for as long, and what has been set for the domain is to come before.
    next_scan_at_ = std::min(next_scan_at_, now + kSoonNs);
    if (!engine_->SourceIsThere()) {
      options_.door->Leave(source_);
      options_.door->Forget(source_);
      source_ = nullptr;
      why = "no memory for what is shared with the broker";
    }
  }
  if (!log_.on() || (!source_ && !why)) return;
  Sentence s;
  if (source_) s << "a broker's domain has been joined";
  else s << "merging goes on in this process alone: " << why;
  // Who has been warned is told that it is over.
  log_.Say(Log::kDomain, source_ && !warned_of_domain_ ? KSMU_LOG_INFO : KSMU_LOG_WARNING, s, now);
  warned_of_domain_ = !source_;
}

void Runtime::GiveUpJoining() {
  if (JoiningSoon()) options_.door->GiveUp();
  join_look_ns_ = 0;
}

// What this process has of the domain, for whoever asks the broker. Not said again where nothing has changed.
void Runtime::TellDomain(std::uint64_t now) {
  tell_at_ = now + kTellNs;
  const CounterValues c = engine_->counters().Read();
  const auto pages = [&](PageState state) { return static_cast<std::uint64_t>(std::max<std::int64_t>(c.in(state), 0)); };
  frames::Source::Report report;
  report.merged = pages(PageState::kMerged);
  report.zero = pages(PageState::kZero);
  report.still = pages(PageState::kStill);
  report.changing = pages(PageState::kFresh) + pages(PageState::kBroken);
  report.advised = report.merged + report.zero + report.still + report.changing + pages(PageState::kUnmerged);
  report.frames = engine_->pages_shared();
  report.breaks = static_cast<std::uint64_t>(c.cow_breaks);
  report.unmerging = static_cast<std::uint32_t>(unmerging_);
  if (options_.steward.read) options_.steward.read(*this, &report);
  if (report == told_domain_) return;  // but for the CPU time
  told_domain_ = report;
  report.cpu_ns = system_->ThreadCpuNanoseconds();
  source_->Tell(report);
}

void Runtime::LeaveDomain() {
  GiveUpJoining();
  told_domain_ = {};
  if (!source_) return;
  options_.door->Leave(source_);
  for (Former& former : formers_) {
    if (former.source) continue;
    former = {source_, engine_->SourceNumber()};
    break;
  }
  engine_->SetSource(nullptr);
  source_ = nullptr;
  // Or a domain that rests would leave behind processes that merge nothing, and nobody would tell them to begin again.
  if (options_.steward.leave) options_.steward.leave(*this);
}

void Runtime::ForgetFormers() {
  std::size_t kept = 0;
  for (Former& former : formers_) {
    if (!former.source) continue;
    if (engine_->UsedOf(former.number) == 0) options_.door->Forget(former.source);
    else formers_[kept++] = former;
  }
  while (kept < formers_.size()) formers_[kept++] = {};
}

}  // namespace ksmu::engine
