// The messages between members and the broker: what travels in one packet of a SOCK_SEQPACKET socket of this machine.
//
// A packet is a header and `count` entries of the kind's fixed size, in the machine's byte order (both ends are on it).
// Nothing in a packet is believed before Decode has said so: it checks length, kind, counts, reserved bits and the range of
// every number that the other end chose, so that whoever handles a message handles one of those that there are. What only the
// receiver can know (is this frame held, is this place in the ring in use) is the receiver's to check. No allocation, no calls.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace ksmu::broker::wire {

inline constexpr std::uint32_t kVersion = 1;
inline constexpr std::size_t kMaxSettle = 512;    // a segment's pages
inline constexpr std::size_t kMaxHashes = 4096;   // that are wanted
inline constexpr std::size_t kMaxOffers = 2048;
inline constexpr std::size_t kMaxFrames = 4096;
inline constexpr std::uint32_t kFramesPerFile = 65536;
inline constexpr std::uint32_t kFrameLimit = 1u << 28;  // as many as a page word can name
inline constexpr std::uint32_t kRingPages = 512;        // of a member's ring
inline constexpr std::uint32_t kMaxFiles = kFrameLimit / kFramesPerFile;
inline constexpr std::uint32_t kMaxNodes = 1024;        // NUMA nodes: numbers below
inline constexpr std::uint32_t kNoFrame = ~std::uint32_t{0};

enum class Kind : std::uint16_t {
  // from a member
  kJoin = 1,  // one JoinEntry; the ring's descriptor with it. Answered by kJoined or kRefused
  kFile,      // one word: a file's number. Answered by kFileIs
  kSettle,    // SettleEntry. Answered by kSettled, an answer for each
  kOffer,     // hashes of pages that this member has once, all 64 bits of each
  kDrop,      // words: frames whose bytes it needs no more; its mappings cover their places still
  kRelease,   // words: frames that nothing of its own can show any more; dropped or not
  kReport,    // one ReportEntry, now and then
  // from the broker
  kJoined = 64,  // one JoinedEntry; the descriptors of index and canary with it, in this order
  kRefused,      // one word: a Refusal
  kFileIs,       // one word: the file's number; its descriptor with it
  kSettled,      // words: a frame, or kNoFrame, for each entry
  kWanted,       // words: hashes that somebody else has offered, too, 32 bits of each. None: some were lost, offer all again
};

enum class Refusal : std::uint32_t { kVersion = 1, kPageSize, kNotAllowed, kRing, kFull, kCount };
enum class Sender { kMember, kBroker };

struct Header {
  std::uint32_t bytes = 0;  // of the whole packet
  Kind kind = Kind::kJoin;
  std::uint16_t count = 0;
  std::uint32_t number = 0;  // a question's, and of its answer; 0: neither
  std::uint32_t reserved = 0;
};
static_assert(sizeof(Header) == 16);

struct JoinEntry {
  std::uint32_t version = kVersion;
  std::uint32_t page_bytes = 0;
  std::uint32_t ring_pages = 0;
  std::uint32_t reserved = 0;
};
struct JoinedEntry {
  std::uint64_t seed = 0;         // of the domain's hashes
  std::uint64_t index_bytes = 0;  // of the file that holds it, at the most
  std::uint64_t log_entries = 0;  // a power of two
  std::uint32_t member = 0;
  std::uint32_t by_node = 0;      // 1: pages of different NUMA nodes are not merged, and hashes are seeded by node
};

struct SettleEntry {
  enum What : std::uint32_t {
    kPublish = 1,  // the page at `place` in the ring, of this hash: the frame that holds it, new or not
    kReplica,      // the same, but a new one beside those that there are, if they are not many
    kAcquire,      // frame `place`, if it still has this hash
    kWhatCount,
  };
  std::uint32_t what = kPublish;
  std::uint32_t hash = 0;
  std::uint32_t place = 0;
  std::uint32_t node = 0;  // on which the page lies that is published, where nodes are kept apart; else 0
};

// What a member says of itself, for whoever looks at the domain. Pages, but for cpu_ns.
struct ReportEntry {
  std::uint64_t advised = 0, merged = 0, frames = 0, zero = 0, still = 0, changing = 0;
  std::uint64_t breaks = 0, cpu_ns = 0;
};

inline constexpr std::size_t kMaxEntries = kMaxHashes > kMaxFrames ? kMaxHashes : kMaxFrames;
inline constexpr std::size_t kMaxPacket = sizeof(Header) + kMaxEntries * sizeof(std::uint32_t);
static_assert(kMaxPacket >= sizeof(Header) + kMaxSettle * sizeof(SettleEntry));
static_assert(kMaxPacket >= sizeof(Header) + kMaxOffers * sizeof(std::uint64_t));

// A decoded message. What the kind has no use for is left as it was made.
struct Message {
  Header header;
  JoinEntry join;
  JoinedEntry joined;
  ReportEntry report;
  std::array<SettleEntry, kMaxSettle> settle;
  std::array<std::uint64_t, kMaxOffers> offers;
  std::array<std::uint32_t, kMaxEntries> words;  // hashes, frames, a file, a refusal
};

// nullptr: *out is a message that `from` may send. Else what is wrong with it, a sentence's middle for the log; the number of
// the packet is of no use then. Signal- and thread-safe; one copy of the entries.
const char* Decode(const std::byte* packet, std::size_t bytes, Sender from, Message* out);

// Writes the message's packet; its length, at most kMaxPacket. header.bytes is set here, header.count is the caller's.
std::size_t Encode(const Message& message, std::byte* packet);

}  // namespace ksmu::broker::wire
