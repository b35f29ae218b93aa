// The messages between the broker and an operator: ksmuctl, a file system, a tuner, whatever looks at domains and sets their
// tunables (docs/control.md). On the sockets that members connect to, in packets of the same form as theirs (wire.h), but in kinds
// of their own: what the first packet of a connection is decides what the connection is.
//
// An operator asks, the broker answers, one question at a time. As in wire.h nothing in a packet is believed before Decode has
// said so, at both ends. Lists come in portions of bounded size: the next one is asked for by where the last one has ended.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "broker/wire.h"

namespace ksmu::broker::control {

inline constexpr std::uint32_t kVersion = 2;
inline constexpr std::size_t kMaxDomains = 8, kMaxMembers = 8;  // of one answer
inline constexpr std::size_t kMaxFailures = 64;                 // that are named
inline constexpr std::size_t kNameBytes = 96;
inline constexpr std::uint32_t kNoDomain = 0;                   // their numbers begin with 1; in a kSet: all that there are and will be

enum class Kind : std::uint16_t {
  // from an operator; each is numbered, and answered under its number
  kOperate = 128,  // one OperateEntry, the first of all. Answered by kWelcome, or kRefused
  kDomains,        // one word64: domains after the one of this number. Answered by kDomainsAre
  kMembers,        // one MembersQuestion. Answered by kMembersAre, or kFailed
  kSet,            // one SetQuestion. Answered by kSetDone, or kFailed
  kExplain,        // one ExplainQuestion. Answered by kExplained, or kFailed
  kLimit,          // one word64: the most frames of all domains together, 0 without a limit. Answered by kSetDone, or kFailed
  kDefaults,       // one word64, 0. Answered by kDefaultsAre
  // from the broker
  kWelcome = 192,  // one WelcomeEntry
  kDomainsAre,     // DomainEntry, in the order of their numbers. None: there are no more
  kMembersAre,     // MemberEntry, likewise
  kSetDone,        // one SetEntry, and in failures[] those who have refused: see there
  kExplained,      // wire::RegionEntry; the last one says where to go on. None: there are no more
  kFailed,         // one word64: an errno
  kDefaultsAre,    // one DefaultsEntry
};
enum class Sender { kOperator, kBroker };

struct OperateEntry {
  std::uint32_t version = kVersion;
  std::uint32_t reserved = 0;
};
struct WelcomeEntry {
  std::uint32_t version = kVersion;
  std::uint32_t page_bytes = 0;
  std::uint32_t may_write = 0;  // 1: it may set
  std::uint32_t by_node = 0;
  std::uint32_t counters = 0, tunables = 0;  // how many of the slots mean something
  std::uint32_t own_domain = kNoDomain;      // the one that it would be a member of
  std::uint32_t reserved = 0;
  std::uint64_t most_frames = 0;             // of all domains together
};

// Of the broker as a whole: what a domain begins with.
struct DefaultsEntry {
  std::uint32_t set = 0;  // a bit for each tunable that has been set for all
  std::uint32_t reserved = 0;
  std::uint64_t most_frames = 0, frames = 0;
  std::array<std::int64_t, wire::kTunableSlots> tunables{};
};

struct DomainEntry {
  std::array<char, kNameBytes> name{};  // bytes; zeros behind its end, of which there is one at least
  std::uint32_t domain = kNoDomain;
  std::uint32_t set = 0;                // a bit for each tunable that has been set for it
  std::uint64_t members = 0, left = 0, frames = 0, places = 0, metadata_bytes = 0, wanted_lost = 0, cpu_ns = 0;
  std::uint64_t silent = 0;             // members that have not reported yet
  std::uint32_t tuner = 0;              // 0: off; else what it thinks of the domain: TunerWord
  std::uint32_t reserved = 0;
  std::array<std::int64_t, wire::kTunableSlots> tunables{};  // what has been set, else what members begin with
  std::array<std::int64_t, wire::kCounterSlots> counters{};  // of all its members, added up; the gate's times: the longest
};

struct MembersQuestion {
  std::uint32_t domain = kNoDomain;
  std::uint32_t after = 0;  // 1 + the number of a member; 0: from the first
  std::uint32_t pid = 0;    // 0: all, else the members of this process
  std::uint32_t reserved = 0;
};
struct MemberEntry {
  std::uint32_t member = 0;
  std::uint32_t pid = 0, uid = 0;
  std::uint32_t unmerging = 0;       // as in its report
  std::uint64_t joined_ms = 0;       // since then
  std::uint64_t reported_ms = 0;     // since its last report; ~0: none has come
  std::uint64_t unanswered_ms = 0;   // since it was asked for something that it has not answered; 0: nothing
  std::uint64_t cpu_ns = 0;
  std::array<std::int64_t, wire::kTunableSlots> tunables{};
  std::array<std::int64_t, wire::kCounterSlots> counters{};
};

struct SetQuestion {
  std::uint32_t domain = kNoDomain;
  std::uint32_t pid = 0;  // 0: the domain, those who join later too
  std::uint32_t tunable = 0;
  std::uint32_t reserved = 0;
  std::int64_t value = 0;
};
// Who refused it, or did not answer (ETIMEDOUT).
struct Failure {
  std::uint32_t pid = 0;
  std::uint32_t error = 0;
};
struct SetEntry {
  std::uint32_t done = 0, refused = 0, silent = 0;  // members
  std::uint32_t named = 0;                          // of the failures, the first so many
  std::array<Failure, kMaxFailures> failures{};
};

struct ExplainQuestion {
  std::uint32_t domain = kNoDomain;
  std::uint32_t pid = 0;
  std::uint64_t from = 0;
};

// A decoded message. What the kind has no use for is left as it was.
struct Message {
  wire::Header header;  // its kind: one of ours, by number
  Kind kind() const { return static_cast<Kind>(header.kind); }
  OperateEntry operate;
  WelcomeEntry welcome;
  DefaultsEntry defaults;
  MembersQuestion members_of;
  SetQuestion set;
  SetEntry done;
  ExplainQuestion explain;
  std::uint64_t word = 0;
  std::array<DomainEntry, kMaxDomains> domains;
  std::array<MemberEntry, kMaxMembers> members;
  std::array<wire::RegionEntry, wire::kMaxRegions> regions;
};

inline constexpr std::size_t kMaxPacket = wire::kMaxPacket;
static_assert(sizeof(DomainEntry) * kMaxDomains + sizeof(wire::Header) <= kMaxPacket);
static_assert(sizeof(MemberEntry) * kMaxMembers + sizeof(wire::Header) <= kMaxPacket);
static_assert(sizeof(SetEntry) + sizeof(wire::Header) <= kMaxPacket);

inline bool IsControl(wire::Kind kind) { return static_cast<std::uint16_t>(kind) >= static_cast<std::uint16_t>(Kind::kOperate); }
inline wire::Header MakeHeader(Kind kind, std::size_t count, std::uint32_t number) {
  return {0, static_cast<wire::Kind>(kind), static_cast<std::uint16_t>(count), number, 0};
}
std::string_view NameOf(const DomainEntry& entry);
std::string_view TunerWord(const DomainEntry& entry);
inline constexpr std::uint32_t kTunerWords = 6;

// As wire.h's.
const char* Decode(const std::byte* packet, std::size_t bytes, Sender from, Message* out);
std::size_t Encode(const Message& message, std::byte* packet);

}  // namespace ksmu::broker::control
