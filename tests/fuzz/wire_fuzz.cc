// The decoder of messages, on whatever bytes: the first says who sends (its lowest bit: the broker), the rest is the packet.
//
// What wire.h promises is written here a second time, as a table and plain comparisons, and Decode has to agree with it in both
// directions. Who changes a limit or adds a kind changes it here as well.

#include "broker/wire.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>

#include "check.h"

namespace ksmu::broker::wire {
namespace {

std::uint32_t WordAt(const std::byte* at) {
  std::uint32_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}
void SetWord(std::byte* at, std::uint32_t word) { std::memcpy(at, &word, sizeof word); }

// --- what may be sent ----------------------------------------------------------------------------------------------

bool AnyGood(const std::byte*) { return true; }
bool JoinGood(const std::byte* e) { return WordAt(e + 12) == 0; }
bool JoinedGood(const std::byte* e) {
  std::uint64_t log;
  std::memcpy(&log, e + 16, sizeof log);
  int bits = 0;
  for (; log; log >>= 1) bits += log & 1;
  return bits == 1 && WordAt(e + 28) < 2;
}
bool SettleGood(const std::byte* e) {
  const std::uint32_t what = WordAt(e), place = WordAt(e + 8);
  const bool in_range = what == 3 ? place < 268'435'456 : place < 512;
  return what >= 1 && what <= 3 && in_range && WordAt(e + 12) < (what == 3 ? 1 : 1024);
}
bool FileGood(const std::byte* e) { return WordAt(e) < 4096; }
bool FrameGood(const std::byte* e) { return WordAt(e) < 268'435'456; }
bool AnswerGood(const std::byte* e) { return FrameGood(e) || WordAt(e) == 0xffff'ffff; }
bool RefusalGood(const std::byte* e) { return WordAt(e) >= 1 && WordAt(e) < static_cast<std::uint32_t>(Refusal::kCount); }

std::uint64_t LongAt(const std::byte* at) {
  std::uint64_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}
constexpr std::uint64_t kMost = 1ull << 48;
bool ReportGood(const std::byte* e) {
  for (int i = 0; i < 7; ++i) {
    if (LongAt(e + 8 * i) > kMost) return false;
  }
  for (int i = 8; i < 8 + 64 + 32; ++i) {
    if (LongAt(e + 8 * i) + kMost > 2 * kMost) return false;  // either sign
  }
  return LongAt(e + 56) <= 1ull << 62 && WordAt(e + 832) <= 4095 && WordAt(e + 836) == 0;
}
// Of all tunables but these the least is 0 and the most 2^40.
bool TuneGood(const std::byte* e) {
  struct {
    std::uint64_t least, most;
  } ranges[18];
  for (auto& range : ranges) range = {0, 1ull << 40};
  for (const int i : {4, 6, 7, 11, 16}) ranges[i].most = 1;
  ranges[0].most = 2, ranges[3].most = ranges[12].most = 100, ranges[8].most = ranges[9].most = 4000, ranges[17].most = 512;
  for (const int i : {12, 13, 14, 15}) ranges[i].least = 1;
  ranges[5].least = 2;
  const std::uint32_t which = WordAt(e);
  return which < 18 && WordAt(e + 4) <= 1 && LongAt(e + 8) >= ranges[which].least && LongAt(e + 8) <= ranges[which].most;
}
bool TunedGood(const std::byte* e) { return WordAt(e) < 18 && WordAt(e + 4) <= 4095; }
bool AskGood(const std::byte* e) { return LongAt(e) < 1ull << 57; }
// By itself; for the order see MayBeSent.
bool RegionGood(const std::byte* e) {
  const std::uint64_t start = LongAt(e), end = LongAt(e + 8), next = LongAt(e + 16);
  if (start >= end || end > 1ull << 57 || (next && (next < end || next > 1ull << 57))) return false;
  for (int i = 5; i < 9 + 32; ++i) {
    if (LongAt(e + 8 * i) > (end - start) / 4096) return false;
  }
  return (WordAt(e + 24) & ~0x30000u) == 0 && WordAt(e + 28) <= 4095 && LongAt(e + 32) <= 1ull << 57;
}

struct Rule {
  Kind kind;
  Sender from;
  bool numbered;
  std::size_t most, entry_bytes;
  std::size_t where;  // its entries in a Message
  bool (*good)(const std::byte* entry);
};
constexpr std::size_t kWords = offsetof(Message, words);
constexpr Rule kRules[] = {
    {Kind::kJoin, Sender::kMember, true, 1, 16, offsetof(Message, join), &JoinGood},
    {Kind::kFile, Sender::kMember, true, 1, 4, kWords, &FileGood},
    {Kind::kSettle, Sender::kMember, true, 512, 16, offsetof(Message, settle), &SettleGood},
    {Kind::kOffer, Sender::kMember, false, 2048, 8, offsetof(Message, offers), &AnyGood},
    {Kind::kDrop, Sender::kMember, false, 4096, 4, kWords, &FrameGood},
    {Kind::kRelease, Sender::kMember, false, 4096, 4, kWords, &FrameGood},
    {Kind::kReport, Sender::kMember, false, 1, 840, offsetof(Message, report), &ReportGood},
    {Kind::kTuned, Sender::kMember, true, 32, 8, offsetof(Message, tuned), &TunedGood},
    {Kind::kTold, Sender::kMember, true, 16, 328, offsetof(Message, regions), &RegionGood},
    {Kind::kJoined, Sender::kBroker, true, 1, 32, offsetof(Message, joined), &JoinedGood},
    {Kind::kRefused, Sender::kBroker, true, 1, 4, kWords, &RefusalGood},
    {Kind::kFileIs, Sender::kBroker, true, 1, 4, kWords, &FileGood},
    {Kind::kSettled, Sender::kBroker, true, 512, 4, kWords, &AnswerGood},
    {Kind::kWanted, Sender::kBroker, false, 4096, 4, kWords, &AnyGood},
    {Kind::kTune, Sender::kBroker, true, 32, 16, offsetof(Message, tune), &TuneGood},
    {Kind::kAsk, Sender::kBroker, true, 1, 8, offsetof(Message, ask), &AskGood},
};
constexpr std::size_t kHeader = 16;

const Rule* RuleOf(std::uint16_t kind) {
  for (const Rule& rule : kRules) {
    if (static_cast<std::uint16_t>(rule.kind) == kind) return &rule;
  }
  return nullptr;
}

struct Head {
  std::uint32_t bytes;
  std::uint16_t kind, count;
  std::uint32_t number, reserved;
};
Head HeadOf(const std::byte* packet) {
  Head head;
  std::memcpy(&head, packet, kHeader);
  return head;
}

bool MayBeSent(const std::byte* packet, std::size_t bytes, Sender from) {
  if (bytes < kHeader) return false;
  const Head head = HeadOf(packet);
  const Rule* const rule = RuleOf(head.kind);
  if (!rule || rule->from != from || head.bytes != bytes || head.reserved) return false;
  if (rule->numbered ? head.number == 0 : head.number != 0) return false;
  if (head.count < (rule->kind == Kind::kWanted || rule->kind == Kind::kTold ? 0 : 1) || head.count > rule->most || kHeader + head.count * rule->entry_bytes != bytes) return false;
  for (std::size_t i = 0; i < head.count; ++i) {
    const std::byte* const entry = packet + kHeader + i * rule->entry_bytes;
    if (!rule->good(entry)) return false;
    // Each but the last leads on, and they do not overlap.
    if (rule->kind == Kind::kTold && i && (LongAt(entry - 328 + 16) == 0 || LongAt(entry) < LongAt(entry - 328 + 8))) return false;
  }
  return true;
}

// --- what Decode makes of it ---------------------------------------------------------------------------------------

Message message;
// What is in it before: twice, since what is there must not matter.
struct Filling {
  std::byte bytes[sizeof(Message)];
};
Filling FilledWith(int value) {
  Filling filling;
  std::memset(filling.bytes, value, sizeof filling.bytes);
  return filling;
}
const Filling kFillings[] = {FilledWith(0), FilledWith(0xa5)};

void CheckLeftAlone(const Filling& filling, std::size_t from, std::size_t end) {
  const auto* const bytes = reinterpret_cast<const std::byte*>(&message);
  FUZZ_CHECK(std::memcmp(bytes + from, filling.bytes + from, end - from) == 0, "what a kind has no use for is left as it was");
}

void CheckPacket(const std::byte* data, std::size_t bytes, Sender from) {
  // Of its very size: the address sanitizer sees every byte that is read behind it.
  const std::unique_ptr<std::byte[]> packet(new std::byte[bytes]);
  std::copy(data, data + bytes, packet.get());
  const bool good = MayBeSent(packet.get(), bytes, from);
  for (const Filling& filling : kFillings) {
    std::memcpy(static_cast<void*>(&message), filling.bytes, sizeof message);
    const char* const wrong = Decode(packet.get(), bytes, from, &message);
    if (wrong) FUZZ_CHECK(wrong[0] != 0, "a refusal has a reason");
    FUZZ_CHECK((wrong == nullptr) == good, "what may be sent is accepted, and nothing else");
    FUZZ_CHECK(std::equal(packet.get(), packet.get() + bytes, data), "a packet is read only");
    if (wrong) continue;
    const Rule& rule = *RuleOf(HeadOf(packet.get()).kind);
    const std::size_t end = rule.where + bytes - kHeader;
    CheckLeftAlone(filling, kHeader, rule.where);
    CheckLeftAlone(filling, end, sizeof message);
    const auto* const entries = reinterpret_cast<const std::byte*>(&message) + rule.where;
    FUZZ_CHECK(std::memcmp(entries, packet.get() + kHeader, bytes - kHeader) == 0, "entries arrive as they were sent");
    // The length is Encode's to set.
    message.header.bytes = 0xdddddddd;
    const std::unique_ptr<std::byte[]> again(new std::byte[bytes]);
    FUZZ_CHECK(Encode(message, again.get()) == bytes, "what was accepted encodes to as many bytes");
    FUZZ_CHECK(std::memcmp(again.get(), packet.get(), bytes) == 0, "what was accepted encodes to the same bytes");
    const Sender other = from == Sender::kMember ? Sender::kBroker : Sender::kMember;
    FUZZ_CHECK(Decode(packet.get(), bytes, other, &message) != nullptr, "nobody sends what is the other's to send");
  }
}

// --- mutations that reach behind the header ------------------------------------------------------------------------

// Makes one entry of the kind acceptable, near what it was.
void Tame(const Rule& rule, std::byte* e) {
  switch (rule.kind) {
    case Kind::kJoin: SetWord(e + 12, 0); break;
    case Kind::kJoined: {
      const std::uint64_t log = std::uint64_t{1} << (WordAt(e + 16) & 63);
      std::memcpy(e + 16, &log, sizeof log);
      SetWord(e + 28, WordAt(e + 28) % 2);
      break;
    }
    case Kind::kSettle:
      SetWord(e, 1 + WordAt(e) % 3);
      SetWord(e + 8, WordAt(e + 8) % (WordAt(e) == 3 ? kFrameLimit : kRingPages));
      SetWord(e + 12, WordAt(e + 12) % (WordAt(e) == 3 ? 1 : kMaxNodes));
      break;
    case Kind::kFile:
    case Kind::kFileIs: SetWord(e, WordAt(e) % kMaxFiles); break;
    case Kind::kDrop:
    case Kind::kRelease: SetWord(e, WordAt(e) % kFrameLimit); break;
    case Kind::kSettled: SetWord(e, WordAt(e) % 4 ? WordAt(e) % kFrameLimit : kNoFrame); break;
    case Kind::kRefused: SetWord(e, 1 + WordAt(e) % (static_cast<std::uint32_t>(Refusal::kCount) - 1)); break;
    default: break;
  }
}

constexpr std::uint32_t kBorders[] = {0, 1, 2, 3, 4, 5, 6, 511, 512, 4095, 4096, kFrameLimit - 1, kFrameLimit, kNoFrame - 1, kNoFrame};

std::size_t Mend(std::byte* data, std::size_t bytes, std::size_t most_bytes, std::minstd_rand& random) {
  const auto one_of = [&](unsigned n) { return random() / 8 % n == 0; };
  if (bytes < 1 + kHeader) {
    std::fill(data + bytes, data + 1 + kHeader, std::byte{0});
    bytes = 1 + kHeader;
  }
  std::byte* const packet = data + 1;
  Head head = HeadOf(packet);
  const Rule* rule = RuleOf(head.kind);
  if (!rule || one_of(16)) rule = &kRules[random() / 8 % std::size(kRules)];
  const std::size_t room = (most_bytes - 1 - kHeader) / rule->entry_bytes;
  if (room == 0) return bytes;
  std::size_t count = std::clamp<std::size_t>((bytes - 1 - kHeader) / rule->entry_bytes, 1, rule->most);
  // On both sides of the limit.
  if (one_of(64)) count = rule->most + random() / 8 % 2;
  count = std::min(count, room);
  const std::size_t end = 1 + kHeader + count * rule->entry_bytes;
  if (end > bytes) std::fill(data + bytes, data + end, std::byte{0});
  std::byte* const entries = packet + kHeader;
  if (!one_of(4)) {
    for (std::size_t i = 0; i < count; ++i) Tame(*rule, entries + i * rule->entry_bytes);
  }
  if (one_of(3)) {
    const std::size_t words = count * rule->entry_bytes / 4;
    SetWord(entries + random() / 8 % words * 4, kBorders[random() / 8 % std::size(kBorders)]);
  }
  data[0] = static_cast<std::byte>((rule->from == Sender::kBroker) != one_of(64));
  head.bytes = static_cast<std::uint32_t>(end - 1);
  head.kind = static_cast<std::uint16_t>(rule->kind);
  head.count = static_cast<std::uint16_t>(count);
  if (rule->numbered == (head.number == 0)) head.number = rule->numbered ? 1 : 0;
  head.reserved = 0;
  // One thing wrong at a time: what is checked last is seen to be checked.
  switch (random() / 8 % 64) {
    case 0: head.bytes += 1; break;
    case 1: head.count += 1; break;
    case 2: head.number = head.number ? 0 : 1; break;
    case 3: head.reserved = 1u << random() / 8 % 32; break;
    case 4: head.kind ^= static_cast<std::uint16_t>(1u << random() / 8 % 16); break;
    case 5:
      head.count = 0;
      head.bytes = kHeader;
      break;
    default: break;
  }
  std::memcpy(packet, &head, kHeader);
  return head.count ? end : 1 + kHeader;
}

}  // namespace
}  // namespace ksmu::broker::wire

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t bytes, std::size_t most_bytes);

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t bytes, std::size_t most_bytes, unsigned seed) {
  std::minstd_rand random(seed);
  bytes = LLVMFuzzerMutate(data, bytes, most_bytes);
  // Some stay as they fell: the header's checks are to be met as well.
  if (random() / 8 % 8 == 0 || most_bytes < 64) return bytes;
  return ksmu::broker::wire::Mend(reinterpret_cast<std::byte*>(data), bytes, most_bytes, random);
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  if (bytes == 0) return 0;
  const auto from = data[0] & 1 ? ksmu::broker::wire::Sender::kBroker : ksmu::broker::wire::Sender::kMember;
  ksmu::broker::wire::CheckPacket(reinterpret_cast<const std::byte*>(data) + 1, bytes - 1, from);
  return 0;
}
