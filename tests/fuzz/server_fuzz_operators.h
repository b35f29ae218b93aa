// The model of what operators ask and are answered, for server_fuzz.cc: what was asked, what has been set, and what an answer may be.
#pragma once

#include <array>
#include <cerrno>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "broker/control.h"
#include "broker/server.h"
#include "check.h"
#include "engine/tunables.h"

namespace ksmu::broker::fuzzing {

using control::Kind;

inline constexpr std::uint32_t kOwner = 1;  // the user who may set, besides root
inline bool MayWrite(std::uint32_t uid) { return uid == 0 || uid == kOwner; }

// Set by the tuner, unless an operator has set one of these.
inline bool IsTuners(std::uint32_t tunable) {
  return tunable == engine::kTunable_run || tunable == engine::kTunable_pages_to_scan || tunable == engine::kTunable_sleep_millisecs ||
         tunable == engine::kTunable_cpu_limit_percent;
}

// A question that has not been answered.
struct Asked {
  Kind kind{};
  std::uint32_t number = 0;
  std::uint64_t since = 0;
  std::uint32_t pid = 0, after = 0;
  bool must_fail = false;
};

// What domains have been told to have: whatever was set last, for the domain or for all.
class Wishes {
 public:
  void Note(const control::SetQuestion& set) {
    // That one is the broker's. What is set for one is not shown as the domain's.
    if (set.tunable == engine::kTunable_merge_across_nodes || set.pid) return;
    auto& wishes = set.domain == control::kNoDomain ? of_all_ : of_domain_[set.domain];
    wishes[set.tunable] = {++last_, true, set.value};
    if (set.tunable == engine::kTunable_advisor_mode) wishes[engine::kTunable_pages_to_scan] = {last_, false, 0};
  }
  void Check(const control::DomainEntry& entry) const {
    const auto own = of_domain_.find(entry.domain);
    for (std::uint32_t t = 0; t < engine::kTunableCount; ++t) {
      Wish wish = of_all_[t];
      if (own != of_domain_.end() && own->second[t].at > wish.at) wish = own->second[t];
      FUZZ_CHECK((entry.set >> t & 1) == wish.is_set, "what has been set is shown as set, and nothing else");
      FUZZ_CHECK(!wish.is_set || entry.tunables[t] == wish.value, "the value that was set last");
      FUZZ_CHECK(!wish.is_set || !entry.tuner || !(IsTuners(t) || t == engine::kTunable_advisor_mode), "two tuners are one too many");
      const engine::TunableRule& rule = engine::kTunableRules[t];
      FUZZ_CHECK(entry.tunables[t] >= rule.least && entry.tunables[t] <= rule.most, "a value within its bounds");
    }
  }

 private:
  struct Wish {
    std::uint64_t at = 0;
    bool is_set = false;
    std::int64_t value = 0;
  };
  using OfEach = std::array<Wish, wire::kTunableSlots>;
  OfEach of_all_{};
  std::map<std::uint32_t, OfEach> of_domain_;
  std::uint64_t last_ = 0;
};

// What operators have to ask about: domains that they have seen, in the order in which they have.
class Domains {
 public:
  void Note(std::uint32_t domain) {
    for (const std::uint32_t known : known_) {
      if (known == domain) return;
    }
    known_.push_back(domain);
  }
  std::uint32_t Pick(std::uint8_t how) const {
    if (how >= 0xf0 || known_.empty()) return how & 1 ? how : control::kNoDomain;
    return known_[how % known_.size()];
  }

 private:
  std::vector<std::uint32_t> known_;
};

// `kind`: one of those after kOperate.
inline void MakeQuestion(control::Message* m, Kind kind, std::uint32_t number, std::uint32_t pid, const Domains& domains, fuzz::Input& input) {
  m->header = control::MakeHeader(kind, 1, number);
  const std::uint8_t how = input.Byte();
  switch (kind) {
    case Kind::kMembers: m->members_of = {domains.Pick(how), how >> 6 == 2 ? how & 7u : 0, how >> 6 == 1 ? pid : 0, 0}; return;
    case Kind::kSet: {
      const std::uint8_t what = input.Byte();
      m->set = {domains.Pick(how), what >> 6 == 3 ? pid : 0, what % (std::uint32_t{engine::kTunableCount} + 1), 0, input.Byte()};
      // Mostly something that may be.
      if (m->set.value < 0xf0) m->set.value %= 3;
      else if (m->set.value == 0xff) m->set.value = -1;
      return;
    }
    case Kind::kExplain: m->explain = {domains.Pick(how), pid, std::uint64_t{input.Byte()} << 12}; return;
    case Kind::kDefaults: m->word = how == 255; return;
    case Kind::kLimit: m->word = how; return;
    default: m->word = how & 7; return;
  }
}

// What is known of the answer already. `explained`: the user of the member that the question is about, if there is one.
inline Asked NoteQuestion(const control::Message& m, std::uint32_t uid, std::optional<std::uint32_t> explained, std::uint64_t now) {
  Asked asked{m.kind(), m.header.number, now, 0, 0, false};
  switch (m.kind()) {
    case Kind::kOperate: asked.must_fail = m.operate.version != control::kVersion; break;
    case Kind::kDomains: asked.after = static_cast<std::uint32_t>(m.word); break;
    case Kind::kMembers: asked.after = m.members_of.after, asked.pid = m.members_of.pid; break;
    case Kind::kLimit: asked.must_fail = !MayWrite(uid); break;
    case Kind::kSet: {
      const bool fits = m.set.tunable < engine::kTunableCount && m.set.value >= engine::kTunableRules[m.set.tunable].least &&
                        m.set.value <= engine::kTunableRules[m.set.tunable].most;
      asked.must_fail = !MayWrite(uid) || !fits;
      break;
    }
    // Addresses are not for everybody.
    case Kind::kExplain: asked.must_fail = !explained || (!MayWrite(uid) && *explained != uid); break;
    default: break;
  }
  return asked;
}

// An answer to what was asked, of the right kind and for who may have it.
inline void CheckAnswer(const Asked& asked, bool may_write, std::uint32_t own, const control::Message& m, std::uint64_t now) {
  FUZZ_CHECK(m.header.number == asked.number, "an answer is to the question that was asked");
  if (m.kind() == Kind::kFailed) {
    const bool changes = asked.kind == Kind::kSet || asked.kind == Kind::kLimit;
    FUZZ_CHECK(may_write || !changes || m.word == EPERM, "who may not set is told so");
    FUZZ_CHECK(asked.kind != Kind::kDomains && asked.kind != Kind::kDefaults, "what everybody may ask is answered");
    return;
  }
  FUZZ_CHECK(!asked.must_fail, "what must not be is refused");
  switch (m.kind()) {
    case Kind::kWelcome:
      FUZZ_CHECK(asked.kind == Kind::kOperate && m.welcome.may_write == may_write && m.welcome.own_domain != control::kNoDomain, "who he is");
      return;
    case Kind::kDomainsAre:
      FUZZ_CHECK(asked.kind == Kind::kDomains, "an answer about domains");
      for (std::size_t i = 0; i < m.header.count; ++i) {
        FUZZ_CHECK(m.domains[i].domain > asked.after, "domains that come after");
        FUZZ_CHECK(may_write || m.domains[i].domain == own, "others' domains are not for everybody");
      }
      return;
    case Kind::kMembersAre:
      FUZZ_CHECK(asked.kind == Kind::kMembers, "an answer about members");
      for (std::size_t i = 0; i < m.header.count; ++i) {
        FUZZ_CHECK(m.members[i].member >= asked.after && (!asked.pid || m.members[i].pid == asked.pid), "members that come after, of this process");
      }
      return;
    case Kind::kSetDone:
      FUZZ_CHECK((asked.kind == Kind::kSet || asked.kind == Kind::kLimit) && may_write, "an answer to what was set");
      FUZZ_CHECK(m.done.silent == 0 || now >= asked.since + Server::kAnswerWithin, "members have their time to answer");
      FUZZ_CHECK(m.done.named <= m.done.refused + m.done.silent, "failures are counted");
      return;
    case Kind::kExplained:
      FUZZ_CHECK(asked.kind == Kind::kExplain, "an answer about regions");
      return;
    default:
      FUZZ_CHECK(m.kind() == Kind::kDefaultsAre && asked.kind == Kind::kDefaults, "an answer to the question");
      FUZZ_CHECK(may_write || m.defaults.frames == 0, "what others have is not for everybody");
      return;
  }
}

}  // namespace ksmu::broker::fuzzing
