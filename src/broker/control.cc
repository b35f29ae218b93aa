#include "broker/control.h"

#include <algorithm>
#include <cstring>

#include "engine/tunables.h"

namespace ksmu::broker::control {
namespace {

struct Form {
  Kind kind;
  Sender from;
  std::uint16_t least, most;
  std::size_t entry_bytes;
};
constexpr Form kForms[] = {
    {Kind::kOperate, Sender::kOperator, 1, 1, sizeof(OperateEntry)},
    {Kind::kDomains, Sender::kOperator, 1, 1, sizeof(std::uint64_t)},
    {Kind::kMembers, Sender::kOperator, 1, 1, sizeof(MembersQuestion)},
    {Kind::kSet, Sender::kOperator, 1, 1, sizeof(SetQuestion)},
    {Kind::kExplain, Sender::kOperator, 1, 1, sizeof(ExplainQuestion)},
    {Kind::kLimit, Sender::kOperator, 1, 1, sizeof(std::uint64_t)},
    {Kind::kDefaults, Sender::kOperator, 1, 1, sizeof(std::uint64_t)},
    {Kind::kWelcome, Sender::kBroker, 1, 1, sizeof(WelcomeEntry)},
    {Kind::kDomainsAre, Sender::kBroker, 0, kMaxDomains, sizeof(DomainEntry)},
    {Kind::kMembersAre, Sender::kBroker, 0, kMaxMembers, sizeof(MemberEntry)},
    {Kind::kSetDone, Sender::kBroker, 1, 1, sizeof(SetEntry)},
    {Kind::kExplained, Sender::kBroker, 0, wire::kMaxRegions, sizeof(wire::RegionEntry)},
    {Kind::kFailed, Sender::kBroker, 1, 1, sizeof(std::uint64_t)},
    {Kind::kDefaultsAre, Sender::kBroker, 1, 1, sizeof(DefaultsEntry)},
};
// Whole entries are sent: there is nothing in them that nobody has written.
static_assert(sizeof(DomainEntry) == kNameBytes + 80 + 8 * (wire::kTunableSlots + wire::kCounterSlots));
static_assert(sizeof(MemberEntry) == 48 + 8 * (wire::kTunableSlots + wire::kCounterSlots));
static_assert(sizeof(DefaultsEntry) == 24 + 8 * wire::kTunableSlots);
static_assert(sizeof(WelcomeEntry) == 40 && sizeof(SetQuestion) == 24 && sizeof(ExplainQuestion) == 16 && sizeof(SetEntry) == 16 + 8 * kMaxFailures);

const Form* FormOf(Kind kind) {
  const auto form = std::find_if(std::begin(kForms), std::end(kForms), [&](const Form& f) { return f.kind == kind; });
  return form == std::end(kForms) ? nullptr : form;
}

void* Entries(Message& m) {
  switch (m.kind()) {
    case Kind::kOperate: return &m.operate;
    case Kind::kWelcome: return &m.welcome;
    case Kind::kDefaultsAre: return &m.defaults;
    case Kind::kMembers: return &m.members_of;
    case Kind::kSet: return &m.set;
    case Kind::kSetDone: return &m.done;
    case Kind::kExplain: return &m.explain;
    case Kind::kDomainsAre: return m.domains.data();
    case Kind::kMembersAre: return m.members.data();
    case Kind::kExplained: return m.regions.data();
    default: return &m.word;
  }
}

const char* CheckDomains(const Message& m) {
  std::uint32_t last = kNoDomain;
  for (std::size_t i = 0; i < m.header.count; ++i) {
    const DomainEntry& e = m.domains[i];
    if (e.domain <= last) return "domains out of order";
    if (e.tuner >= kTunerWords || e.reserved) return "a tuner out of range";
    if (e.name.back() != 0 || std::any_of(std::find(e.name.begin(), e.name.end(), 0), e.name.end(), [](char c) { return c != 0; })) {
      return "a name without an end";
    }
    last = e.domain;
  }
  return nullptr;
}

const char* CheckMembers(const Message& m) {
  for (std::size_t i = 0; i < m.header.count; ++i) {
    if (i && m.members[i].member <= m.members[i - 1].member) return "members out of order";
    if (m.members[i].unmerging > wire::kMostError) return "an error out of range";
  }
  return nullptr;
}

const char* CheckSetDone(const SetEntry& e) {
  if (e.named > kMaxFailures) return "more failures than there is room for";
  for (std::size_t i = 0; i < kMaxFailures; ++i) {
    if (e.failures[i].error > wire::kMostError) return "an error out of range";
  }
  return nullptr;
}

const char* CheckEntries(const Message& m) {
  switch (m.kind()) {
    case Kind::kOperate: return m.operate.reserved ? "reserved bits of an operator's first message" : nullptr;
    case Kind::kDomains: return m.word > ~std::uint32_t{0} ? "a domain out of range" : nullptr;
    case Kind::kLimit: return nullptr;
    case Kind::kDefaults: return m.word ? "reserved bits of a question" : nullptr;
    case Kind::kDefaultsAre: return m.defaults.reserved ? "reserved bits of an answer" : nullptr;
    case Kind::kMembers: return m.members_of.reserved ? "reserved bits of a question" : nullptr;
    case Kind::kSet:
      if (m.set.reserved) return "reserved bits of a question";
      return m.set.tunable >= wire::kTunableSlots ? "an unknown tunable" : nullptr;
    case Kind::kExplain: return m.explain.from >= wire::kAddressLimit ? "an address out of range" : nullptr;
    case Kind::kWelcome: {
      const WelcomeEntry& e = m.welcome;
      const bool sound = e.may_write <= 1 && e.by_node <= 1 && !e.reserved && e.counters <= wire::kCounterSlots && e.tunables <= wire::kTunableSlots;
      return sound ? nullptr : "a welcome out of range";
    }
    case Kind::kDomainsAre: return CheckDomains(m);
    case Kind::kMembersAre: return CheckMembers(m);
    case Kind::kSetDone: return CheckSetDone(m.done);
    case Kind::kExplained: return wire::CheckRegions(m.regions.data(), m.header.count);
    case Kind::kFailed: return m.word == 0 || m.word > wire::kMostError ? "an error out of range" : nullptr;
  }
  return nullptr;
}

}  // namespace

std::string_view NameOf(const DomainEntry& entry) {
  return {entry.name.data(), static_cast<std::size_t>(std::find(entry.name.begin(), entry.name.end(), 0) - entry.name.begin())};
}

std::string_view TunerWord(const DomainEntry& entry) {
  // In the order of Tuner::State.
  static constexpr std::string_view kWords[kTunerWords] = {"off", "calm", "joined", "pressed", "idle", "resting"};
  return kWords[entry.tuner];
}

const char* Decode(const std::byte* packet, std::size_t bytes, Sender from, Message* out) {
  if (bytes < sizeof(wire::Header)) return "shorter than a header";
  std::memcpy(&out->header, packet, sizeof(wire::Header));
  const wire::Header& header = out->header;
  const Form* const form = FormOf(out->kind());
  if (!form || form->from != from) return "of a kind that is not sent from there";
  if (header.reserved != 0) return "reserved bits of the header";
  if (header.number == 0) return "a question without a number";
  if (header.count < form->least || header.count > form->most) return "too few or too many entries";
  const std::size_t entries = header.count * form->entry_bytes;
  if (header.bytes != bytes || bytes != sizeof header + entries) return "not of the length that it says";
  std::memcpy(Entries(*out), packet + sizeof header, entries);
  return CheckEntries(*out);
}

std::size_t Encode(const Message& message, std::byte* packet) {
  const std::size_t entries = message.header.count * FormOf(message.kind())->entry_bytes;
  wire::Header header = message.header;
  header.bytes = static_cast<std::uint32_t>(sizeof header + entries);
  std::memcpy(packet, &header, sizeof header);
  std::memcpy(packet + sizeof header, Entries(const_cast<Message&>(message)), entries);
  return header.bytes;
}

}  // namespace ksmu::broker::control
