// The server and its tuners (tuner.h): once a second each domain's is shown what there is to see, and its plan is told to members as if it had
// been set for each alone, but that it yields to what a member's program has set, which the member knows. What an operator has set for
// one is left alone; and an operator who sets for the domain what the tuner would set ends it there.

#include <algorithm>

#include "broker/server.h"
#include "engine/tunables.h"
#include "ksmu/ksmu.h"

namespace ksmu::broker {

using engine::kTunableRules;

namespace {
std::int64_t CounterAt(const wire::ReportEntry& report, std::size_t offset) { return report.counters[offset / sizeof(std::int64_t)]; }
}  // namespace

bool Server::IsTuned(const Scope& scope) const { return config_.pressure && !scope.tuned_by_others; }

void Server::TendTuners(std::uint64_t* next) {
  if (!config_.pressure) return;
  if (now_ >= tune_at_) {
    tune_at_ = now_ + kSecond;
    Pressure pressure;
    bool known = false;  // asked for where there is somebody to be tuned
    for (auto& [key, home] : homes_) {
      Scope& scope = *home->scope;
      if (!IsTuned(scope)) continue;
      if (!known) pressure = config_.pressure();
      known = true;
      if (!scope.tuner) scope.tuner = std::make_unique<Tuner>(config_.cpus);
      Tuner::Observation seen;
      seen.joined = scope.joined;
      seen.pages_saved = -static_cast<std::int64_t>(home->domain->frames_live());
      for (const Connection* member : home->connected) {
        seen.members += member != nullptr;
        if (!member || !member->reported_at) continue;
        const wire::ReportEntry& report = member->report;
        seen.pages_saved += CounterAt(report, offsetof(ksmu_stats, pages_merged)) + CounterAt(report, offsetof(ksmu_stats, ksm_zero_pages));
        seen.pages_tracked += CounterAt(report, offsetof(ksmu_stats, pages_tracked));
        seen.pages_volatile += CounterAt(report, offsetof(ksmu_stats, pages_volatile));
        seen.region_pages += CounterAt(report, offsetof(ksmu_stats, region_bytes)) / static_cast<std::int64_t>(config_.page_bytes);
        seen.cow_breaks += CounterAt(report, offsetof(ksmu_stats, cow_breaks));
        seen.cpu_ns += report.cpu_ns;
      }
      const Tuner::State before = scope.tuner->plan().state;
      const Tuner::Plan plan = scope.tuner->Decide(now_, seen, pressure);
      if (plan.state != before) Log(Level::kInfo, "domain " + scope.name + ": tuner: " + plan.reason());
      for (Connection* member : home->connected) {
        if (member && member->reported_at) Tune(*member, plan);
      }
    }
  }
  *next = std::min(*next, tune_at_);
}

void Server::Tune(Connection& conn, const Tuner::Plan& plan) {
  Scope& scope = *conn.home->scope;
  if (conn.told > conn.answered) return;  // first it answers to what it has been told
  for (const auto& [tunable, value] : plan.Settings()) {
    const std::uint32_t bit = 1u << tunable;
    const std::int64_t now = conn.tuned & bit ? conn.tuned_values[tunable] : kTunableRules[tunable].preset;
    const bool advised = tunable == engine::kTunable_pages_to_scan && conn.report.tunables[engine::kTunable_advisor_mode] != 0;
    if ((conn.not_tuned & bit) || advised || now == value || scope.version == ~std::uint32_t{0}) continue;
    if (!conn.own) conn.own = std::make_unique<OwnTunables>();
    conn.own->versions[tunable] = ++scope.version;
    conn.own->values[tunable] = conn.tuned_values[tunable] = value;
    conn.own->by_tuner |= bit;
    conn.tuned |= bit;
    QueueTelling(conn);
  }
}

// What it has set is taken back.
void Server::EndTuning(Scope& scope) {
  if (!IsTuned(scope)) return;
  scope.tuned_by_others = true;
  scope.tuner.reset();
  Home* const home = HomeOf(scope);
  if (!home) return;
  Log(Level::kInfo, "domain " + scope.name + ": tuner: off, since an operator sets what it would set");
  for (Connection* member : home->connected) {
    if (!member) continue;
    for (std::uint32_t tunable = 0; tunable < engine::kTunableCount; ++tunable) {
      if (!(member->tuned & ~member->not_tuned & 1u << tunable)) continue;
      member->own->versions[tunable] = ++scope.version;
      member->own->values[tunable] = kTunableRules[tunable].preset;
      QueueTelling(*member);
    }
    member->tuned = 0;
  }
}

}  // namespace ksmu::broker
