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

inline constexpr std::uint32_t kVersion = 3;
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
inline constexpr std::size_t kCounterSlots = 64;  // of struct ksmu_stats, in its order; those that it has not are 0
inline constexpr std::size_t kTunableSlots = 32;  // of engine/tunables.h, in its order; likewise
inline constexpr std::size_t kReasonSlots = 32;   // KSMU_REASON_SLOTS
inline constexpr std::size_t kMaxRegions = 16;    // told at a time
inline constexpr std::int64_t kMostCount = std::int64_t{1} << 48;  // of any counter; those of all members fit into 64 bits
inline constexpr std::uint64_t kAddressLimit = std::uint64_t{1} << 57;
inline constexpr std::uint32_t kMostError = 4095;

enum class Kind : std::uint16_t {
  // from a member
  kJoin = 1,  // one JoinEntry; the ring's descriptor with it. Answered by kJoined or kRefused
  kFile,      // one word: a file's number. Answered by kFileIs
  kSettle,    // SettleEntry. Answered by kSettled, an answer for each
  kOffer,     // hashes of pages that this member has once, all 64 bits of each
  kDrop,      // words: frames whose bytes it needs no more; its mappings cover their places still
  kRelease,   // words: frames that nothing of its own can show any more; dropped or not
  kReport,    // one ReportEntry, now and then
  kTuned,     // TunedEntry: what has come of kTune, all that there were up to the one of this number
  kTold,      // RegionEntry: the answer to kAsk. None: there are no more
  // from the broker
  kJoined = 64,  // one JoinedEntry; the descriptors of index and canary with it, in this order
  kRefused,      // one word: a Refusal
  kFileIs,       // one word: the file's number; its descriptor with it
  kSettled,      // words: a frame, or kNoFrame, for each entry
  kWanted,       // words: hashes that somebody else has offered, too, 32 bits of each. None: some were lost, offer all again
  // by the wish of an operator (control.h); no member waits for them, nor the broker for the answers
  kTune,         // TuneEntry: tunables, to be set
  kAsk,          // one AskEntry: which regions there are
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
  std::array<std::int64_t, kCounterSlots> counters{};
  std::array<std::int64_t, kTunableSlots> tunables{};  // as they are in this process
  std::uint32_t unmerging = 0;  // for run=2: 0 nothing is left to do; EINPROGRESS; else the errno that it has ended with
  std::uint32_t reserved = 0;
};

struct TuneEntry {
  std::uint32_t tunable = 0;
  std::uint32_t yields = 0;  // 1: not where the program, or its environment, has set it: then EEXIST
  std::int64_t value = 0;
};
struct TunedEntry {
  std::uint32_t tunable = 0;
  std::uint32_t error = 0;  // an errno of ksmu_set's, or 0
};
struct AskEntry {
  std::uint64_t from = 0;  // an address: regions that end above it
};
// A region, or the part of it from `start` on that has been counted so far. Pages, but for the addresses and excluded_bytes.
struct RegionEntry {
  std::uint64_t start = 0, end = 0;
  std::uint64_t next = 0;  // from where to ask on; 0: nothing follows
  std::uint32_t flags = 0, excluded_cause = 0;
  std::uint64_t excluded_bytes = 0;
  std::uint64_t merged = 0, still = 0, changing = 0, zero = 0;
  std::array<std::uint64_t, kReasonSlots> unmerged{};
};

inline constexpr std::size_t kMaxEntries = kMaxHashes > kMaxFrames ? kMaxHashes : kMaxFrames;
inline constexpr std::size_t kMaxPacket = sizeof(Header) + kMaxEntries * sizeof(std::uint32_t);
static_assert(kMaxPacket >= sizeof(Header) + kMaxSettle * sizeof(SettleEntry));
static_assert(kMaxPacket >= sizeof(Header) + kMaxOffers * sizeof(std::uint64_t));
static_assert(kMaxPacket >= sizeof(Header) + kMaxRegions * sizeof(RegionEntry));
static_assert(sizeof(TuneEntry) == 16 && sizeof(RegionEntry) == 72 + 8 * kReasonSlots, "no holes: they are sent whole");
static_assert(sizeof(ReportEntry) == 72 + 8 * (kCounterSlots + kTunableSlots));

// A decoded message. What the kind has no use for is left as it was made.
struct Message {
  Header header;
  JoinEntry join;
  JoinedEntry joined;
  ReportEntry report;
  AskEntry ask;
  std::array<TuneEntry, kTunableSlots> tune;
  std::array<TunedEntry, kTunableSlots> tuned;
  std::array<RegionEntry, kMaxRegions> regions;
  std::array<SettleEntry, kMaxSettle> settle;
  std::array<std::uint64_t, kMaxOffers> offers;
  std::array<std::uint32_t, kMaxEntries> words;  // hashes, frames, a file, a refusal
};

// nullptr: *out is a message that `from` may send. Else what is wrong with it, a sentence's middle for the log; the number of
// the packet is of no use then. Signal- and thread-safe; one copy of the entries.
const char* Decode(const std::byte* packet, std::size_t bytes, Sender from, Message* out);

// What is wrong with regions that a member has told; Decode asks. nullptr: they are in the order of their addresses, and whoever asks
// on from where the last one leads comes to an end.
const char* CheckRegions(const RegionEntry* regions, std::size_t count);

// Writes the message's packet; its length, at most kMaxPacket. header.bytes is set here, header.count is the caller's.
std::size_t Encode(const Message& message, std::byte* packet);

}  // namespace ksmu::broker::wire
