// The server's other side: operators, who look at domains and set their tunables (docs/control.md).
//
// What is set is the domain's, and each member is told of it in its turn, a few in a round; one that has not answered is not told
// anew until it has, and then of all that has been set meanwhile. So an operator that sets without end makes no more messages than
// its members take. A question to a member waits for the answer to the one before. Who waits is the operator, for a second.

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "broker/nodes.h"
#include "broker/server.h"
#include "engine/tunables.h"
#include "ksmu/ksmu.h"

namespace ksmu::broker {

using control::Kind;
using engine::kTunableCount;
using engine::kTunableRules;

namespace {
constexpr std::uint64_t kLookEvery = 5'000'000;  // for answers that somebody waits for
constexpr std::size_t kMembersALook = 1024;      // whose counters are added up for one answer
constexpr std::size_t kMembers = Domain::kMaxMembers;
static_assert(kMembers <= kMembersALook);

std::uint64_t Milliseconds(std::uint64_t ns) { return ns / 1'000'000; }
bool IsLongest(std::size_t counter) {
  constexpr std::size_t kMax = offsetof(ksmu_stats, gate_max_us) / sizeof(std::int64_t), kP99 = offsetof(ksmu_stats, gate_p99_us) / sizeof(std::int64_t);
  return counter == kMax || counter == kP99;
}
// Two tuners are one too many.
bool IsTuners(std::uint32_t tunable) {
  return tunable == engine::kTunable_run || tunable == engine::kTunable_pages_to_scan || tunable == engine::kTunable_sleep_millisecs ||
         tunable == engine::kTunable_cpu_limit_percent || tunable == engine::kTunable_advisor_mode;
}
}  // namespace

// --- who asks --------------------------------------------------------------------------------------------------------

void Server::ReceivedFromOperator(Connection& conn, const std::byte* packet, std::size_t bytes, bool descriptors) {
  const char* const wrong = control::Decode(packet, bytes, control::Sender::kOperator, question_.get());
  if (wrong) return Drop(conn, wrong);
  if (descriptors) return Drop(conn, "descriptors with a message that has none");
  const Kind kind = question_->kind();
  if ((kind == Kind::kOperate) == (conn.op != nullptr)) return Drop(conn, conn.op ? "an operator's first message again" : "not an operator's first message");
  if (conn.op && conn.op->asks != Kind{}) return Drop(conn, "a question before the last one has been answered");
  switch (kind) {
    case Kind::kOperate: return Operate(conn);
    case Kind::kDomains: return ListDomains(conn);
    case Kind::kMembers: return ListMembers(conn);
    case Kind::kSet: return SetTunable(conn);
    case Kind::kLimit: return SetLimit(conn);
    case Kind::kDefaults: return TellDefaults(conn);
    default: return BeginExplaining(conn);
  }
}

void Server::Operate(Connection& conn) {
  const auto mine = std::count_if(operators_.begin(), operators_.end(), [&](ConnId id) { return connections_.at(id)->who.uid == conn.who.uid; });
  const int error = question_->operate.version != control::kVersion ? EPROTONOSUPPORT : mine >= kMaxOperators ? EAGAIN : 0;
  if (error) {
    FailOperator(conn, question_->header.number, error);
    return Drop(conn, error == EAGAIN ? "too many operators of its user" : "an operator of another version");
  }
  NoLongerStranger(conn);
  conn.op = std::make_unique<Operator>();
  operators_.push_back(conn.id);
  const bool known = config_.unknown_user != std::int64_t{conn.who.uid};
  conn.op->may_write = known && (conn.who.uid == 0 || config_.owner == std::int64_t{conn.who.uid});
  conn.op->own = KeyOf(conn);
  reply_->header = control::MakeHeader(Kind::kWelcome, 1, question_->header.number);
  reply_->welcome = {control::kVersion, static_cast<std::uint32_t>(config_.page_bytes), conn.op->may_write, by_node_,
                     sizeof(ksmu_stats) / sizeof(std::int64_t), kTunableCount, control::kNoDomain, 0, most_frames_};
  if (known || !listeners_[conn.listener].empty()) reply_->welcome.own_domain = ScopeFor(conn.op->own, NameOf(conn)).number;
  AnswerOperator(conn);
}

// Sends reply_.
void Server::AnswerOperator(Connection& conn) {
  const std::size_t bytes = control::Encode(*reply_, packet_.data());
  if (outbox_.Send(conn.id, packet_.data(), bytes, nullptr, 0)) return;
  conn.blocked = true;
  conn.kept_since = now_;
  conn.kept.assign(packet_.begin(), packet_.begin() + static_cast<std::ptrdiff_t>(bytes));
  conn.kept_descriptors.clear();
}

void Server::FailOperator(Connection& conn, std::uint32_t number, int error) {
  reply_->header = control::MakeHeader(Kind::kFailed, 1, number);
  reply_->word = static_cast<std::uint64_t>(error);
  AnswerOperator(conn);
}

// --- domains ---------------------------------------------------------------------------------------------------------

Server::Scope& Server::ScopeFor(const HomeKey& key, const std::string& name) {
  if (const auto found = numbers_.find(key); found != numbers_.end()) return scopes_.at(found->second);
  Scope& scope = scopes_[++last_scope_];
  scope.number = last_scope_;
  scope.key = key;
  scope.name = name;
  scope.values = defaults_.values;
  for (std::size_t t = 0; t < kTunableCount; ++t) scope.versions[t] = defaults_.versions[t] ? 1 : 0;
  scope.version = defaults_.version ? 1 : 0;
  scope.tuned_by_others = defaults_.tuned_by_others;
  numbers_[key] = last_scope_;
  return scope;
}

// Unless it is needed: by members, by what was set for those to come, by operators whose own it is.
void Server::ForgetScope(const HomeKey& key) {
  const auto found = numbers_.find(key);
  if (found == numbers_.end() || homes_.count(key) || scopes_.at(found->second).own) return;
  const auto is_its = [&](const std::unique_ptr<Home>& home) { return home->scope->number == found->second; };
  if (std::any_of(retired_.begin(), retired_.end(), is_its)) return;
  if (std::any_of(operators_.begin(), operators_.end(), [&](ConnId id) { return connections_.at(id)->op->own == key; })) return;
  scopes_.erase(found->second);
  numbers_.erase(found);
}

// All of them are shown to who may set; others see the one that they could join.
bool Server::MayAsk(const Connection& conn, const Scope& scope) const { return conn.op->may_write || scope.key == conn.op->own; }

Server::Scope* Server::FindScope(const Connection& conn, std::uint32_t number) {
  const auto found = scopes_.find(number);
  return found != scopes_.end() && MayAsk(conn, found->second) ? &found->second : nullptr;
}

Server::Home* Server::HomeOf(const Scope& scope) const {
  const auto found = homes_.find(scope.key);
  return found == homes_.end() ? nullptr : found->second.get();
}

// A process can have more connections than one: by a second copy of the library, or when the end of an earlier one has not been seen yet.
std::vector<Server::Connection*> Server::FindMembers(const Scope& scope, std::uint32_t pid) const {
  std::vector<Connection*> found;
  Home* const home = HomeOf(scope);
  if (!home || pid == 0) return found;
  for (Connection* member : home->connected) {
    if (member && static_cast<std::uint32_t>(member->who.pid) == pid) found.push_back(member);
  }
  return found;
}

// The one that has joined last.
Server::Connection* Server::FindMember(const Scope& scope, std::uint32_t pid) const {
  const std::vector<Connection*> found = FindMembers(scope, pid);
  const auto latest = std::max_element(found.begin(), found.end(), [](const Connection* a, const Connection* b) { return a->id < b->id; });
  return latest == found.end() ? nullptr : *latest;
}

void Server::FillDomain(const Scope& scope, control::DomainEntry* entry) const {
  *entry = {};
  std::copy_n(scope.name.data(), std::min(scope.name.size(), entry->name.size() - 1), entry->name.data());
  entry->domain = scope.number;
  for (std::size_t t = 0; t < kTunableCount; ++t) {
    if (scope.versions[t]) entry->set |= 1u << t;
    entry->tunables[t] = scope.versions[t] ? scope.values[t] : t == engine::kTunable_merge_across_nodes ? !by_node_ : kTunableRules[t].preset;
  }
  if (IsTuned(scope)) {
    const Tuner::Plan plan = scope.tuner ? scope.tuner->plan() : Tuner::Plan{};
    entry->tuner = 1 + static_cast<std::uint32_t>(plan.state);
    for (const auto& [tunable, value] : plan.Settings()) entry->tunables[tunable] = value;
  }
  const Home* const home = HomeOf(scope);
  if (!home) return;
  entry->left = home->left.size();
  entry->members = home->domain->members() - home->left.size();
  entry->frames = home->domain->frames_live();
  entry->places = home->domain->frames_given_out();
  entry->metadata_bytes = home->domain->metadata_bytes();
  entry->wanted_lost = home->wanted_lost;
  for (const Connection* member : home->connected) {
    if (!member) continue;
    entry->silent += member->reported_at == 0;
    entry->cpu_ns += member->report.cpu_ns;
    for (std::size_t c = 0; c < wire::kCounterSlots; ++c) {
      const std::int64_t n = member->report.counters[c];
      // Bounded by the decoder, and there are no more members than fit (wire.h).
      entry->counters[c] = IsLongest(c) ? std::max(entry->counters[c], n) : entry->counters[c] + n;
    }
  }
}

void Server::ListDomains(Connection& conn) {
  const auto after = static_cast<std::uint32_t>(question_->word);
  std::size_t count = 0, members = 0;
  for (auto at = scopes_.upper_bound(after); conn.op->may_write && at != scopes_.end() && count < control::kMaxDomains; ++at) {
    if (const Home* const home = HomeOf(at->second)) members += home->connected.size();
    if (count && members > kMembersALook) break;
    FillDomain(at->second, &reply_->domains[count++]);
  }
  if (const auto own = numbers_.find(conn.op->own); !conn.op->may_write && own != numbers_.end() && own->second > after) {
    FillDomain(scopes_.at(own->second), &reply_->domains[count++]);
  }
  reply_->header = control::MakeHeader(Kind::kDomainsAre, count, question_->header.number);
  AnswerOperator(conn);
}

void Server::FillMember(const Connection& member, control::MemberEntry* entry) const {
  *entry = {};
  entry->member = member.member;
  entry->pid = static_cast<std::uint32_t>(member.who.pid);
  entry->uid = member.who.uid;
  entry->unmerging = member.report.unmerging;
  entry->joined_ms = Milliseconds(now_ - member.joined_at);
  entry->reported_ms = member.reported_at ? Milliseconds(now_ - member.reported_at) : ~std::uint64_t{0};
  std::uint64_t since = now_;
  if (member.told > member.answered) since = std::min(since, member.told_at);
  if (member.ask_open) since = std::min(since, member.ask_at);
  entry->unanswered_ms = Milliseconds(now_ - since);
  entry->cpu_ns = member.report.cpu_ns;
  entry->tunables = member.report.tunables;
  entry->counters = member.report.counters;
}

void Server::ListMembers(Connection& conn) {
  const control::MembersQuestion& about = question_->members_of;
  const Scope* const scope = FindScope(conn, about.domain);
  if (!scope) return FailOperator(conn, question_->header.number, ENOENT);
  std::size_t count = 0;
  if (const Home* const home = HomeOf(*scope)) {
    for (std::size_t i = about.after; i < home->connected.size() && count < control::kMaxMembers; ++i) {
      const Connection* const member = home->connected[i];
      if (!member || (about.pid && static_cast<std::uint32_t>(member->who.pid) != about.pid)) continue;
      FillMember(*member, &reply_->members[count++]);
    }
  }
  reply_->header = control::MakeHeader(Kind::kMembersAre, count, question_->header.number);
  AnswerOperator(conn);
}

// --- setting ---------------------------------------------------------------------------------------------------------

// KSM's rules, as far as they can be told from here. 0 or an errno.
int Server::MaySet(const Scope& scope, std::uint32_t tunable, std::int64_t value) const {
  if (tunable >= kTunableCount) return ENOENT;
  if (value < kTunableRules[tunable].least || value > kTunableRules[tunable].most) return EINVAL;
  const auto now = [&](std::uint32_t t) { return scope.versions[t] ? scope.values[t] : kTunableRules[t].preset; };
  switch (tunable) {
    case engine::kTunable_pages_to_scan: return now(engine::kTunable_advisor_mode) ? EINVAL : 0;
    case engine::kTunable_max_page_sharing: {
      const Home* const home = HomeOf(scope);
      return value != now(tunable) && home && home->domain->frames_live() ? EBUSY : 0;
    }
    default: return scope.version == ~std::uint32_t{0} ? EOVERFLOW : 0;
  }
}

int Server::MaySetForAll(std::uint32_t tunable, std::int64_t value) const {
  if (const int error = MaySet(defaults_, tunable, value)) return error;
  for (const auto& [number, scope] : scopes_) {
    if (const int error = MaySet(scope, tunable, value)) return error;
  }
  return 0;
}

// Of all domains, whichever it was set for: frames of two rules in one file would lie on the wrong nodes, and hashes of two rules
// would never meet. As KSM it changes while nothing is shared; members are let go, and join anew, which they do by themselves. 0 or an errno.
int Server::KeepNodesApart(bool apart) {
  if (apart == by_node_) return 0;
  if (FramesLive() != 0) return EBUSY;
  if (apart && nodes::WhyNot()) return EOPNOTSUPP;
  by_node_ = apart;
  Log(Level::kInfo, std::string("pages of different nodes are ") + (apart ? "kept apart" : "merged") + " from now on; members join anew");
  for (auto& [key, home] : homes_) retired_.push_back(std::move(home));
  homes_.clear();
  for (std::size_t i = 0; i < retired_.size(); ++i) {
    // Drop leaves an empty place behind, and changes nothing else of these.
    const std::vector<Connection*> members = retired_[i]->connected;
    for (Connection* member : members) {
      if (member) Drop(*member, "its domain is begun anew");
    }
  }
  return 0;
}

// The question is answered when members have: its state, from the beginning.
Server::Operator& Server::Await(Connection& conn, Kind asks, std::uint32_t number) {
  Operator& op = *conn.op;
  op.asks = asks;
  op.number = number;
  op.until = now_ + kAnswerWithin;
  op.look_at = 0;
  return op;
}

// What is set, under the number that it gets.
std::uint32_t Server::Note(Scope& scope, Connection* one, std::uint32_t tunable, std::int64_t value) {
  if (one) one->not_tuned |= 1u << tunable;
  else if (IsTuners(tunable)) EndTuning(scope);
  const std::uint32_t version = ++scope.version;
  if (one && !one->own) one->own = std::make_unique<OwnTunables>();
  auto& versions = one ? one->own->versions : scope.versions;
  (one ? one->own->values : scope.values)[tunable] = value;
  if (one) one->own->by_tuner &= ~(1u << tunable);
  versions[tunable] = version;
  // As KSM: whatever the mode, it begins anew.
  if (tunable == engine::kTunable_advisor_mode) {
    versions[engine::kTunable_pages_to_scan] = 0;
    if (one) one->tuned &= ~(1u << engine::kTunable_pages_to_scan);
  }
  if (one) {
    QueueTelling(*one);
  } else if (Home* const home = HomeOf(scope)) {
    for (Connection* member : home->connected) {
      if (member) QueueTelling(*member);
    }
  }
  return version;
}

void Server::SetTunable(Connection& conn) {
  const control::SetQuestion wish = question_->set;
  const std::uint32_t number = question_->header.number;
  const bool all = wish.domain == control::kNoDomain;
  Scope* const scope = all ? nullptr : FindScope(conn, wish.domain);
  if (!conn.op->may_write) return FailOperator(conn, number, EPERM);
  if (!all && !scope) return FailOperator(conn, number, ENOENT);
  const std::vector<Connection*> ones = all ? std::vector<Connection*>() : FindMembers(*scope, wish.pid);
  if (wish.pid && ones.empty()) return FailOperator(conn, number, ESRCH);
  if (wish.pid && wish.tunable == engine::kTunable_merge_across_nodes) return FailOperator(conn, number, EINVAL);  // the broker's
  if (const int error = all ? MaySetForAll(wish.tunable, wish.value) : MaySet(*scope, wish.tunable, wish.value)) return FailOperator(conn, number, error);
  LogMember(Level::kInfo, all ? "(all)" : scope->name, conn.who,
            "as its operator: " + std::string(kTunableRules[wish.tunable].name) + " is " + std::to_string(wish.value) + (wish.pid ? " for member " + std::to_string(wish.pid) : ""));
  if (wish.tunable == engine::kTunable_merge_across_nodes) {
    // Members are told when they join.
    if (const int error = KeepNodesApart(wish.value == 0)) return FailOperator(conn, number, error);
    return SetDone(conn, number);
  }
  Operator& op = Await(conn, Kind::kSet, number);
  op.pid = wish.pid;
  op.tunable = wish.tunable;
  op.versions.clear();
  op.refused.clear();
  if (all) {
    Note(defaults_, nullptr, wish.tunable, wish.value);
    for (auto& [other, each] : scopes_) op.versions[other] = Note(each, nullptr, wish.tunable, wish.value);
  } else {
    scope->own = true;
    // Of several the last: none of them is told of less.
    for (Connection* one : ones) op.versions[wish.domain] = Note(*scope, one, wish.tunable, wish.value);
    if (!wish.pid) op.versions[wish.domain] = Note(*scope, nullptr, wish.tunable, wish.value);
  }
  if (TendSetting(conn, false)) op.asks = {};
}

// True: it has been answered, since all members have; or it is late, and those who have not are silent.
bool Server::TendSetting(Connection& conn, bool late) {
  const Operator& op = *conn.op;
  control::SetEntry done{};
  for (const auto& [number, version] : op.versions) {
    const auto found = scopes_.find(number);
    const Home* const home = found == scopes_.end() ? nullptr : HomeOf(found->second);
    for (std::size_t i = 0; home && i < home->connected.size(); ++i) {
      const Connection* const member = home->connected[i];
      const auto pid = member ? static_cast<std::uint32_t>(member->who.pid) : 0;
      if (!member || (op.pid && pid != op.pid)) continue;
      const bool silent = member->answered < version;
      if (silent && !late) return false;
      const auto refusal = op.refused.find(member->id);
      const std::uint32_t error = silent ? ETIMEDOUT : refusal != op.refused.end() ? refusal->second : 0;
      ++(silent ? done.silent : error ? done.refused : done.done);
      if (error && done.named < control::kMaxFailures) done.failures[done.named++] = {pid, error};
    }
  }
  reply_->header = control::MakeHeader(Kind::kSetDone, 1, op.number);
  reply_->done = done;
  AnswerOperator(conn);
  return true;
}

// Done, and no member has to do with it.
void Server::SetDone(Connection& conn, std::uint32_t number) {
  reply_->header = control::MakeHeader(Kind::kSetDone, 1, number);
  reply_->done = {};
  AnswerOperator(conn);
}

// --- of the broker as a whole ----------------------------------------------------------------------------------------

// What lives on above a lower limit stays; there is nothing new until there is less.
void Server::SetLimit(Connection& conn) {
  const std::uint32_t number = question_->header.number;
  if (!conn.op->may_write) return FailOperator(conn, number, EPERM);
  most_frames_ = question_->word ? static_cast<std::size_t>(std::min<std::uint64_t>(question_->word, wire::kFrameLimit)) : std::size_t{wire::kFrameLimit};
  LogMember(Level::kInfo, "(all)", conn.who, "as its operator: no more than " + std::to_string(most_frames_) + " frames");
  SetDone(conn, number);
}

void Server::TellDefaults(Connection& conn) {
  control::DefaultsEntry& entry = reply_->defaults;
  entry = {};
  for (std::size_t t = 0; t < kTunableCount; ++t) {
    if (defaults_.versions[t]) entry.set |= 1u << t;
    entry.tunables[t] = t == engine::kTunable_merge_across_nodes ? !by_node_ : defaults_.versions[t] ? defaults_.values[t] : kTunableRules[t].preset;
  }
  entry.most_frames = most_frames_;
  entry.frames = conn.op->may_write ? FramesLive() : 0;
  reply_->header = control::MakeHeader(Kind::kDefaultsAre, 1, question_->header.number);
  AnswerOperator(conn);
}

void Server::QueueTelling(Connection& conn) {
  if (conn.to_be_told || conn.told >= conn.home->scope->version) return;
  conn.to_be_told = true;
  telling_.push_back(conn.id);
}

// All that has been set since it was told last. When it has answered, or its socket takes something again, it is its turn anew.
void Server::TellTunables(Connection& conn) {
  conn.to_be_told = false;
  if (conn.blocked || conn.told > conn.answered) return;
  const Scope& scope = *conn.home->scope;
  std::size_t count = 0;
  for (std::uint32_t t = 0; t < kTunableCount; ++t) {
    const bool own = conn.own && conn.own->versions[t] > scope.versions[t];
    if ((own ? conn.own->versions[t] : scope.versions[t]) <= conn.told) continue;
    out_.tune[count++] = {t, own ? conn.own->by_tuner >> t & 1 : 0, own ? conn.own->values[t] : scope.values[t]};
  }
  if (count == 0) {
    conn.told = conn.answered = scope.version;
    return;
  }
  out_.header = {0, wire::Kind::kTune, static_cast<std::uint16_t>(count), scope.version, 0};
  if (!outbox_.Send(conn.id, packet_.data(), wire::Encode(out_, packet_.data()), nullptr, 0)) {
    conn.blocked = true;
    return;
  }
  conn.told = scope.version;
  conn.told_at = now_;
}

// For those who wait for this very answer, and neither for an earlier one nor for a later one about the same tunable.
void Server::NoteRefusal(const Connection& conn, std::uint32_t tunable, std::uint32_t error) {
  for (const ConnId id : operators_) {
    Operator& op = *connections_.at(id)->op;
    if (op.asks != Kind::kSet || op.tunable != tunable) continue;
    const auto version = op.versions.find(conn.home->scope->number);
    if (version != op.versions.end() && version->second > conn.answered && version->second <= conn.told) op.refused[conn.id] = error;
  }
}

const char* Server::NoteTuned(Connection& conn) {
  if (in_.header.number != conn.told || conn.answered >= conn.told) return "an answer about tunables that it was not told of";
  for (std::size_t i = 0; i < in_.header.count; ++i) {
    const auto& [tunable, error] = in_.tuned[i];
    if (error) NoteRefusal(conn, tunable, error);
    // Its program's own wish.
    if (error == EEXIST && conn.own && (conn.own->by_tuner >> tunable & 1)) conn.not_tuned |= 1u << tunable;
    // Its advisor, which the last report did not know of: it has set 0, and nothing else is there to be taken back.
    if (error == EINVAL && tunable == engine::kTunable_pages_to_scan) conn.tuned &= ~(1u << tunable);
  }
  conn.answered = conn.told;
  QueueTelling(conn);
  return nullptr;
}

// --- explaining ------------------------------------------------------------------------------------------------------

// Where a program's memory lies is not for everybody to know who shares pages with it.
void Server::BeginExplaining(Connection& conn) {
  const control::ExplainQuestion& about = question_->explain;
  const std::uint32_t number = question_->header.number;
  const Scope* const scope = FindScope(conn, about.domain);
  if (!scope) return FailOperator(conn, number, ENOENT);
  const Connection* const member = FindMember(*scope, about.pid);
  if (!member) return FailOperator(conn, number, ESRCH);
  if (!conn.op->may_write && (member->who.uid != conn.who.uid || config_.unknown_user == std::int64_t{conn.who.uid})) return FailOperator(conn, number, EPERM);
  Operator& op = Await(conn, Kind::kExplain, number);
  op.from = about.from;
  op.member = member->id;
  if (TendExplaining(conn, false)) op.asks = {};
}

// Asks the member as soon as nobody else's question is before it. True: it has been answered that there is no answer.
bool Server::TendExplaining(Connection& conn, bool late) {
  Operator& op = *conn.op;
  const auto found = connections_.find(op.member);
  if (found == connections_.end() || late) {
    FailOperator(conn, op.number, late ? ETIMEDOUT : ESRCH);
    return true;
  }
  Connection& member = *found->second;
  if (member.ask_open || member.blocked) return false;
  member.ask_number = member.ask_number == ~std::uint32_t{0} ? 1 : member.ask_number + 1;
  out_.header = {0, wire::Kind::kAsk, 1, member.ask_number, 0};
  out_.ask.from = op.from;
  if (!outbox_.Send(member.id, packet_.data(), wire::Encode(out_, packet_.data()), nullptr, 0)) {
    member.blocked = true;
    return false;
  }
  member.ask_open = true;
  member.ask_at = now_;
  member.ask_from = op.from;
  member.asker = conn.id;
  return false;
}

const char* Server::NoteTold(Connection& conn) {
  if (!conn.ask_open || in_.header.number != conn.ask_number) return "an answer about regions that it was not asked for";
  const std::size_t count = in_.header.count;
  if (count && in_.regions[0].end <= conn.ask_from) return "regions that lie before what it was asked for";
  conn.ask_open = false;
  const auto found = connections_.find(conn.asker);
  // Who has asked may have given up, and even ask for something else.
  if (found == connections_.end() || !found->second->op || found->second->op->asks != Kind::kExplain || found->second->op->member != conn.id ||
      found->second->op->from != conn.ask_from) {
    return nullptr;
  }
  Connection& asker = *found->second;
  asker.op->asks = {};
  reply_->header = control::MakeHeader(Kind::kExplained, count, asker.op->number);
  std::copy_n(in_.regions.begin(), count, reply_->regions.begin());
  AnswerOperator(asker);
  return nullptr;
}

// --- time ------------------------------------------------------------------------------------------------------------

void Server::TendOperators(std::uint64_t* next) {
  for (std::size_t i = 0; i < operators_.size();) {
    Connection& conn = *connections_.at(operators_[i]);
    Operator& op = *conn.op;
    if (!conn.kept.empty() && now_ >= conn.kept_since + kTakesWithin) {
      Drop(conn, "does not take its answers");
      continue;  // another is in its place
    }
    ++i;
    if (op.asks == Kind{}) continue;
    const bool late = now_ >= op.until;
    if (late || now_ >= op.look_at) {
      op.look_at = now_ + kLookEvery;
      if (op.asks == Kind::kSet ? TendSetting(conn, late) : TendExplaining(conn, late)) op.asks = {};
    }
    if (op.asks != Kind{}) *next = std::min(*next, std::min(op.look_at, op.until));
  }
}

}  // namespace ksmu::broker
