#include "broker/wire.h"

#include <algorithm>
#include <cstring>

#include "engine/tunables.h"
#include "ksmu/ksmu.h"

namespace ksmu::broker::wire {
namespace {

struct Form {
  Kind kind;
  Sender from;
  bool numbered;  // a question or an answer
  std::uint16_t least, most;
  std::uint16_t entry_bytes;
};
constexpr std::uint16_t kWord = sizeof(std::uint32_t);
static_assert(engine::kTunableCount <= kTunableSlots && KSMU_REASON_SLOTS == kReasonSlots && sizeof(ksmu_stats) <= kCounterSlots * sizeof(std::int64_t));
constexpr Form kForms[] = {
    {Kind::kJoin, Sender::kMember, true, 1, 1, sizeof(JoinEntry)},
    {Kind::kFile, Sender::kMember, true, 1, 1, kWord},
    {Kind::kSettle, Sender::kMember, true, 1, kMaxSettle, sizeof(SettleEntry)},
    {Kind::kOffer, Sender::kMember, false, 1, kMaxOffers, sizeof(std::uint64_t)},
    {Kind::kDrop, Sender::kMember, false, 1, kMaxFrames, kWord},
    {Kind::kRelease, Sender::kMember, false, 1, kMaxFrames, kWord},
    {Kind::kReport, Sender::kMember, false, 1, 1, sizeof(ReportEntry)},
    {Kind::kTuned, Sender::kMember, true, 1, kTunableSlots, sizeof(TunedEntry)},
    {Kind::kTold, Sender::kMember, true, 0, kMaxRegions, sizeof(RegionEntry)},
    {Kind::kJoined, Sender::kBroker, true, 1, 1, sizeof(JoinedEntry)},
    {Kind::kRefused, Sender::kBroker, true, 1, 1, kWord},
    {Kind::kFileIs, Sender::kBroker, true, 1, 1, kWord},
    {Kind::kSettled, Sender::kBroker, true, 1, kMaxSettle, kWord},
    {Kind::kWanted, Sender::kBroker, false, 0, kMaxHashes, kWord},
    {Kind::kTune, Sender::kBroker, true, 1, kTunableSlots, sizeof(TuneEntry)},
    {Kind::kAsk, Sender::kBroker, true, 1, 1, sizeof(AskEntry)},
};

const Form* FormOf(Kind kind) {
  const auto form = std::find_if(std::begin(kForms), std::end(kForms), [&](const Form& f) { return f.kind == kind; });
  return form == std::end(kForms) ? nullptr : form;
}

// Where a kind's entries lie in a message.
void* Entries(Message& m) {
  switch (m.header.kind) {
    case Kind::kJoin: return &m.join;
    case Kind::kJoined: return &m.joined;
    case Kind::kReport: return &m.report;
    case Kind::kSettle: return m.settle.data();
    case Kind::kOffer: return m.offers.data();
    case Kind::kTune: return m.tune.data();
    case Kind::kTuned: return m.tuned.data();
    case Kind::kAsk: return &m.ask;
    case Kind::kTold: return m.regions.data();
    default: return m.words.data();
  }
}

const char* CheckSettle(const Message& m) {
  for (std::size_t i = 0; i < m.header.count; ++i) {
    const SettleEntry& e = m.settle[i];
    if (e.what == 0 || e.what >= SettleEntry::kWhatCount) return "an unknown request for a frame";
    if (e.node >= (e.what == SettleEntry::kAcquire ? 1 : kMaxNodes)) return "a node out of range";
    if (e.place >= (e.what == SettleEntry::kAcquire ? kFrameLimit : kRingPages)) return "a place out of range";
  }
  return nullptr;
}

const char* CheckWords(const Message& m) {
  std::uint32_t limit = 0;  // none
  bool may_be_none = false;
  switch (m.header.kind) {
    case Kind::kFile:
    case Kind::kFileIs: limit = kMaxFiles; break;
    case Kind::kDrop:
    case Kind::kRelease: limit = kFrameLimit; break;
    case Kind::kSettled: limit = kFrameLimit, may_be_none = true; break;
    case Kind::kRefused:
      return m.words[0] == 0 || m.words[0] >= static_cast<std::uint32_t>(Refusal::kCount) ? "an unknown refusal" : nullptr;
    default: return nullptr;  // any number is a hash
  }
  for (std::size_t i = 0; i < m.header.count; ++i) {
    if (m.words[i] >= limit && !(may_be_none && m.words[i] == kNoFrame)) return "a number out of range";
  }
  return nullptr;
}

constexpr std::uint64_t kSmallestPage = 4096;

bool IsCount(std::int64_t n) { return n >= -kMostCount && n <= kMostCount; }

const char* CheckReport(const ReportEntry& report) {
  if (report.reserved != 0 || report.unmerging > kMostError) return "reserved bits of a report";
  if (report.cpu_ns > std::uint64_t{1} << 62) return "a CPU time out of range";
  for (const std::uint64_t n : {report.advised, report.merged, report.frames, report.zero, report.still, report.changing, report.breaks}) {
    if (n > static_cast<std::uint64_t>(kMostCount)) return "a count out of range";
  }
  const bool sound = std::all_of(report.counters.begin(), report.counters.end(), IsCount) && std::all_of(report.tunables.begin(), report.tunables.end(), IsCount);
  return sound ? nullptr : "a count out of range";
}

const char* CheckTune(const Message& m) {
  for (std::size_t i = 0; i < m.header.count; ++i) {
    const TuneEntry& e = m.tune[i];
    if (e.tunable >= engine::kTunableCount || e.yields > 1) return "an unknown tunable";
    const engine::TunableRule& rule = engine::kTunableRules[e.tunable];
    if (e.value < rule.least || e.value > rule.most) return "a tunable out of range";
  }
  return nullptr;
}

const char* CheckTuned(const Message& m) {
  for (std::size_t i = 0; i < m.header.count; ++i) {
    if (m.tuned[i].tunable >= engine::kTunableCount) return "an unknown tunable";
    if (m.tuned[i].error > kMostError) return "an error out of range";
  }
  return nullptr;
}

const char* CheckEntries(const Message& m) {
  switch (m.header.kind) {
    case Kind::kJoin: return m.join.reserved != 0 ? "reserved bits of a join" : nullptr;
    case Kind::kJoined: {
      const bool power = m.joined.log_entries && (m.joined.log_entries & (m.joined.log_entries - 1)) == 0;
      return m.joined.by_node > 1 ? "reserved bits of an answer" : power ? nullptr : "a log of an odd length";
    }
    case Kind::kSettle: return CheckSettle(m);
    case Kind::kOffer: return nullptr;  // any numbers
    case Kind::kReport: return CheckReport(m.report);
    case Kind::kTune: return CheckTune(m);
    case Kind::kTuned: return CheckTuned(m);
    case Kind::kAsk: return m.ask.from >= kAddressLimit ? "an address out of range" : nullptr;
    case Kind::kTold: return CheckRegions(m.regions.data(), m.header.count);
    default: return CheckWords(m);
  }
}

}  // namespace

// In the order of their addresses; and whoever asks on comes to an end.
const char* CheckRegions(const RegionEntry* regions, std::size_t count) {
  std::uint64_t from = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const RegionEntry& e = regions[i];
    if (e.start < from || e.end <= e.start || e.end > kAddressLimit) return "a region out of order";
    if (e.next != 0 && (e.next < e.end || e.next > kAddressLimit)) return "a region that leads nowhere";
    if (e.next == 0 && i + 1 < count) return "a region behind the last one";
    const std::uint64_t pages = (e.end - e.start) / kSmallestPage;
    if (e.flags & ~std::uint32_t{KSMU_F_NO_RAW_DISCARDS | KSMU_F_SYNC_BREAK}) return "unknown flags of a region";
    if (e.excluded_cause > kMostError || e.excluded_bytes > kAddressLimit) return "a region that excludes what it cannot";
    // Of pages that are read one after the other while they change: no sum is exact, but each is of so many at the most.
    for (const std::uint64_t n : {e.merged, e.still, e.changing, e.zero}) {
      if (n > pages) return "more pages than the region has";
    }
    if (std::any_of(e.unmerged.begin(), e.unmerged.end(), [&](std::uint64_t n) { return n > pages; })) return "more pages than the region has";
    from = e.end;
  }
  return nullptr;
}

const char* Decode(const std::byte* packet, std::size_t bytes, Sender from, Message* out) {
  if (bytes < sizeof(Header)) return "shorter than a header";
  std::memcpy(&out->header, packet, sizeof(Header));
  const Header& header = out->header;
  const Form* const form = FormOf(header.kind);
  if (!form || form->from != from) return "of a kind that is not sent from there";
  if (header.reserved != 0) return "reserved bits of the header";
  if (form->numbered != (header.number != 0)) return "a question without a number, or a number without a question";
  if (header.count < form->least || header.count > form->most) return "too few or too many entries";
  const std::size_t entries = std::size_t{header.count} * form->entry_bytes;
  if (header.bytes != bytes || bytes != sizeof(Header) + entries) return "not of the length that it says";
  std::memcpy(Entries(*out), packet + sizeof(Header), entries);
  return CheckEntries(*out);
}

std::size_t Encode(const Message& message, std::byte* packet) {
  const Form& form = *FormOf(message.header.kind);
  const std::size_t entries = std::size_t{message.header.count} * form.entry_bytes;
  Header header = message.header;
  header.bytes = static_cast<std::uint32_t>(sizeof(Header) + entries);
  std::memcpy(packet, &header, sizeof header);
  std::memcpy(packet + sizeof header, Entries(const_cast<Message&>(message)), entries);
  return header.bytes;
}

}  // namespace ksmu::broker::wire
