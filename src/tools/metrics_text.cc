#include "tools/metrics_text.h"

#include <functional>
#include <optional>
#include <string_view>

#include "engine/tunables.h"
#include "tools/balance.h"
#include "tools/operator.h"
#include "tools/reasons.h"

namespace ksmu::tools {
namespace {

using broker::control::DomainEntry;
using broker::control::MemberEntry;

// A total of the members that are there falls by a part of itself when one of them leaves. As a counter that would be read as a
// restart from 0, and what is left as new: so over a domain they are gauges, and counters of single members only.
enum class Type { kGauge, kCounter, kInfo };

// n / 10^decimals, written exactly.
struct Number {
  std::int64_t n = 0;
  int decimals = 0;
};
using Value = std::optional<Number>;  // none: no sample

template <typename Entry>
struct Seen {
  const Entry& entry;
  std::int64_t page;
  Value Count(std::string_view counter) const { return Number{CounterOf(entry, counter)}; }
  Value Pages(std::string_view counter) const { return Number{CounterOf(entry, counter) * page}; }
  Value Micros(std::string_view counter) const { return Number{CounterOf(entry, counter), 6}; }
  Value Tunable(std::size_t tunable, int decimals = 0) const { return Number{entry.tunables[tunable], decimals}; }
};
using Domain = Seen<DomainEntry>;
using Member = Seen<MemberEntry>;

template <typename Of>
struct Family {
  const char* name;  // without _total
  Type type;
  const char* unit;  // with which the name ends; "": none
  const char* help;
  Value (*value)(const Of&);
};

Value Whole(std::uint64_t n) { return Number{static_cast<std::int64_t>(n)}; }
bool HasReported(const MemberEntry& member) { return member.reported_ms != ~std::uint64_t{0}; }

constexpr Family<MetricsSnapshot> kUp = {"ksmu_up", Type::kGauge, "", "1 if the broker answers, else 0.", [](const MetricsSnapshot& s) { return Whole(s.up); }};
constexpr Family<MetricsSnapshot> kLimit = {"ksmu_frames_limit_bytes", Type::kGauge, "bytes", "The most that frames of all domains together may take.",
                                            [](const MetricsSnapshot& s) { return Whole(s.most_frames * s.page_bytes); }};

constexpr Family<Domain> kOfDomains[] = {
    {"ksmu_domain_members", Type::kGauge, "", "Members of the domain.", [](const Domain& d) { return Whole(d.entry.members); }},
    {"ksmu_domain_unreported_members", Type::kGauge, "", "Members that have not reported yet, and so are in no other sum.",
     [](const Domain& d) { return Whole(d.entry.silent); }},
    {"ksmu_domain_left_members", Type::kGauge, "", "Members that have gone, with children that still map frames.", [](const Domain& d) { return Whole(d.entry.left); }},
    {"ksmu_run", Type::kGauge, "", "The domain's run, as KSM's: 0 nothing new is merged, 1 merging, 2 everything is unmerged.",
     [](const Domain& d) { return d.Tunable(engine::kTunable_run); }},
    {"ksmu_cpu_limit_ratio", Type::kGauge, "ratio", "CPU time that each member's scanner may take, of one CPU; 0: no limit.",
     [](const Domain& d) { return d.Tunable(engine::kTunable_cpu_limit_percent, 2); }},
    {"ksmu_saved_bytes", Type::kGauge, "bytes", "Memory saved: merged and zero pages, less the frames.",
     [](const Domain& d) -> Value { return Number{BalanceOf(d.entry, static_cast<std::uint64_t>(d.page)).saved}; }},
    {"ksmu_net_saved_bytes", Type::kGauge, "bytes", "Memory saved, less what the members, the broker and the kernel keep books in; can be negative.",
     [](const Domain& d) -> Value { return Number{BalanceOf(d.entry, static_cast<std::uint64_t>(d.page)).net}; }},
    {"ksmu_tracked_bytes", Type::kGauge, "bytes", "Advised memory that is there: the sum of merged, zero, unique, changing and unmerged.",
     [](const Domain& d) { return d.Pages("pages_tracked"); }},
    {"ksmu_merged_bytes", Type::kGauge, "bytes", "Members' pages that map a frame.", [](const Domain& d) { return d.Pages("pages_merged"); }},
    {"ksmu_frames_bytes", Type::kGauge, "bytes", "Memory that frames take: each once, whoever maps it.",
     [](const Domain& d) { return Whole(d.entry.frames * static_cast<std::uint64_t>(d.page)); }},
    {"ksmu_zero_bytes", Type::kGauge, "bytes", "Pages of zeros that were dropped, and take no memory.", [](const Domain& d) { return d.Pages("ksm_zero_pages"); }},
    {"ksmu_unique_bytes", Type::kGauge, "bytes", "Pages that stay still, and have no twin so far.", [](const Domain& d) { return d.Pages("pages_unshared"); }},
    {"ksmu_changing_bytes", Type::kGauge, "bytes", "Pages written since the last look, or not looked at yet.", [](const Domain& d) { return d.Pages("pages_volatile"); }},
    {"ksmu_unmerge_needs_bytes", Type::kGauge, "bytes", "Memory that unmerging everything would take; the frames that it frees are not taken off.",
     [](const Domain& d) { return d.Count("unmerge_bytes"); }},
    {"ksmu_region_bytes", Type::kGauge, "bytes", "Length of the advised regions, untouched parts included.", [](const Domain& d) { return d.Count("region_bytes"); }},
    {"ksmu_regions", Type::kGauge, "", "Advised regions.", [](const Domain& d) { return d.Count("regions"); }},
    {"ksmu_metadata_bytes", Type::kGauge, "bytes", "Memory that the members keep books in.", [](const Domain& d) { return d.Count("metadata_bytes"); }},
    {"ksmu_broker_metadata_bytes", Type::kGauge, "bytes", "Memory that the broker keeps books in for the domain.", [](const Domain& d) { return Whole(d.entry.metadata_bytes); }},
    {"ksmu_mappings", Type::kGauge, "", "Mappings of the members that merging costs.", [](const Domain& d) { return d.Count("maps_used"); }},
    {"ksmu_children", Type::kGauge, "", "Forked children whose faults the members answer.", [](const Domain& d) { return d.Count("children"); }},
    {"ksmu_gate_max_seconds", Type::kGauge, "seconds", "The longest time that a gate was shut, since its member has started.",
     [](const Domain& d) { return d.Micros("gate_max_us"); }},
    {"ksmu_gate_p99_seconds", Type::kGauge, "seconds", "Time within which 99 of 100 gates are open again, in the member where it is longest.",
     [](const Domain& d) { return d.Micros("gate_p99_us"); }},
    {"ksmu_members_cpu_seconds", Type::kGauge, "seconds", "CPU time of the library's threads, of the present members: it falls when one leaves.",
     [](const Domain& d) -> Value { return Number{static_cast<std::int64_t>(d.entry.cpu_ns), 9}; }},
    {"ksmu_members_cow_breaks", Type::kGauge, "", "Merged pages that were written, of the present members: it falls when one leaves.",
     [](const Domain& d) { return d.Count("cow_breaks"); }},
    {"ksmu_members_full_scans", Type::kGauge, "", "Passes over all regions, of the present members: it falls when one leaves.",
     [](const Domain& d) { return d.Count("full_scans"); }},
    {"ksmu_members_pages_scanned", Type::kGauge, "", "Pages that were read, of the present members: it falls when one leaves.",
     [](const Domain& d) { return d.Count("pages_scanned"); }},
    {"ksmu_members_pages_merged", Type::kGauge, "", "Pages that came to map a frame, of the present members: it falls when one leaves.",
     [](const Domain& d) { return d.Count("pages_merged_total"); }},
    {"ksmu_members_gates", Type::kGauge, "", "Gates that were shut, of the present members: it falls when one leaves.", [](const Domain& d) { return d.Count("gate_count"); }},
};
constexpr const char* kUnmerged = "ksmu_unmerged_bytes";
constexpr const char* kUnmergedHelp = "Pages that are not merged, by reason (docs/stats.md).";

constexpr Family<Member> kOfMembers[] = {
    {"ksmu_member_unanswered_seconds", Type::kGauge, "seconds", "Time for which the member owes an answer; 0: it owes none.",
     [](const Member& m) -> Value { return Number{static_cast<std::int64_t>(m.entry.unanswered_ms), 3}; }},
    {"ksmu_member_report_age_seconds", Type::kGauge, "seconds", "Time since the member's last report; it sends none while nothing changes.",
     [](const Member& m) -> Value { return Number{static_cast<std::int64_t>(m.entry.reported_ms), 3}; }},
    {"ksmu_member_run", Type::kGauge, "", "The member's run, as KSM's.", [](const Member& m) { return m.Tunable(engine::kTunable_run); }},
    {"ksmu_member_tracked_bytes", Type::kGauge, "bytes", "Advised memory of the member that is there.", [](const Member& m) { return m.Pages("pages_tracked"); }},
    {"ksmu_member_merged_bytes", Type::kGauge, "bytes", "Its pages that map a frame.", [](const Member& m) { return m.Pages("pages_merged"); }},
    {"ksmu_member_zero_bytes", Type::kGauge, "bytes", "Its pages of zeros that were dropped.", [](const Member& m) { return m.Pages("ksm_zero_pages"); }},
    {"ksmu_member_unique_bytes", Type::kGauge, "bytes", "Its pages that have no twin so far.", [](const Member& m) { return m.Pages("pages_unshared"); }},
    {"ksmu_member_changing_bytes", Type::kGauge, "bytes", "Its pages written since the last look, or not looked at yet.", [](const Member& m) { return m.Pages("pages_volatile"); }},
    {"ksmu_member_unmerge_needs_bytes", Type::kGauge, "bytes", "Memory that unmerging the member would take.", [](const Member& m) { return m.Count("unmerge_bytes"); }},
    {"ksmu_member_metadata_bytes", Type::kGauge, "bytes", "Memory that it keeps books in.", [](const Member& m) { return m.Count("metadata_bytes"); }},
    {"ksmu_member_mappings", Type::kGauge, "", "Its mappings that merging costs.", [](const Member& m) { return m.Count("maps_used"); }},
    {"ksmu_member_gate_max_seconds", Type::kGauge, "seconds", "The longest time that a gate of its was shut.", [](const Member& m) { return m.Micros("gate_max_us"); }},
    {"ksmu_member_gate_p99_seconds", Type::kGauge, "seconds", "Time within which 99 of 100 of its gates are open again.", [](const Member& m) { return m.Micros("gate_p99_us"); }},
    {"ksmu_member_cpu_seconds", Type::kCounter, "seconds", "CPU time of the library's threads in it.",
     [](const Member& m) -> Value { return Number{static_cast<std::int64_t>(m.entry.cpu_ns), 9}; }},
    {"ksmu_member_cow_breaks", Type::kCounter, "", "Its merged pages that were written.", [](const Member& m) { return m.Count("cow_breaks"); }},
    {"ksmu_member_full_scans", Type::kCounter, "", "Its passes over all regions.", [](const Member& m) { return m.Count("full_scans"); }},
    {"ksmu_member_pages_scanned", Type::kCounter, "", "Its pages that were read.", [](const Member& m) { return m.Count("pages_scanned"); }},
    {"ksmu_member_pages_swept", Type::kCounter, "", "Its pages whose written-mark was looked at.", [](const Member& m) { return m.Count("pages_swept"); }},
    {"ksmu_member_pages_skipped", Type::kCounter, "", "Its pages that passes went by.", [](const Member& m) { return m.Count("pages_skipped"); }},
    {"ksmu_member_pages_merged", Type::kCounter, "", "Its pages that came to map a frame.", [](const Member& m) { return m.Count("pages_merged_total"); }},
    {"ksmu_member_pages_remerged", Type::kCounter, "", "Its broken pages that were merged again in place.", [](const Member& m) { return m.Count("pages_remerged"); }},
    {"ksmu_member_discards", Type::kCounter, "", "Its merged, broken and zero pages that were discarded.", [](const Member& m) { return m.Count("discards"); }},
    {"ksmu_member_gates", Type::kCounter, "", "Its gates that were shut.", [](const Member& m) { return m.Count("gate_count"); }},
};
constexpr std::size_t kOfSilentMembers = 1;  // the first so many are the broker's to tell; the rest is in a report
constexpr const char* kMember = "ksmu_member";
constexpr const char* kMemberHelp = "Who a member is; 1.";

std::string TextOf(const Number& number) {
  const bool negative = number.n < 0;
  std::string text = std::to_string(negative ? 0 - static_cast<std::uint64_t>(number.n) : static_cast<std::uint64_t>(number.n));
  const auto decimals = static_cast<std::size_t>(number.decimals);
  if (text.size() <= decimals) text.insert(0, decimals + 1 - text.size(), '0');
  if (decimals) text.insert(text.size() - decimals, 1, '.');
  return (negative ? "-" : "") + text;
}

// name="value". As in JsonString, bytes that are no ASCII are taken for Latin-1: what scrapes takes nothing but UTF-8.
std::string Label(std::string_view name, std::string_view value) {
  std::string text(name);
  text += "=\"";
  for (const char c : value) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      text += "\\n";
    } else if (c == '"' || c == '\\') {
      text += '\\';
      text += c;
    } else if (byte >= 0x80) {
      text += static_cast<char>(0xc0 | byte >> 6);
      text += static_cast<char>(0x80 | (byte & 0x3f));
    } else {
      text += c;
    }
  }
  return text + "\"";
}

class Writer {
 public:
  explicit Writer(MetricsForm form) : open_(form == MetricsForm::kOpenMetrics) {}

  void Begin(const char* name, Type type, const char* unit, const char* help) {
    sample_ = name;
    if (type == Type::kCounter) sample_ += "_total";
    if (type == Type::kInfo) sample_ += "_info";
    // What OpenMetrics calls by the family's name, the older form calls by the sample's; and it has no type for info.
    const std::string family = open_ ? name : sample_;
    const char* const kind = type == Type::kCounter ? "counter" : type == Type::kInfo && open_ ? "info" : "gauge";
    head_ = "# HELP " + family + " " + help + "\n# TYPE " + family + " " + kind + "\n";
    if (open_ && *unit) head_ += "# UNIT " + family + " " + unit + "\n";
  }
  // A family without samples is left out.
  void Sample(const std::string& labels, const Value& value) {
    if (!value) return;
    text_ += head_;
    head_.clear();
    text_ += sample_;
    if (!labels.empty()) text_ += "{" + labels + "}";
    text_ += " " + TextOf(*value) + "\n";
  }
  template <typename Of>
  void Begin(const Family<Of>& family) {
    Begin(family.name, family.type, family.unit, family.help);
  }
  std::string End() { return text_ + (open_ ? "# EOF\n" : ""); }

 private:
  bool open_;
  std::string text_, head_, sample_;
};

void WriteMembers(Writer& writer, const MetricsSnapshot& snapshot) {
  const auto each = [&](const std::function<void(const Member&, const std::string&)>& body) {
    for (std::size_t d = 0; d < snapshot.members.size(); ++d) {
      for (const MemberEntry& member : snapshot.members[d]) {
        // A process can be a member more than once, and those of other PID namespaces have no number: the broker's tells them apart.
        body({member, static_cast<std::int64_t>(snapshot.page_bytes)}, Label("domain", NameOf(snapshot.domains[d])) + "," + Label("pid", std::to_string(member.pid)) + "," +
                                                                         Label("member", std::to_string(member.member)));
      }
    }
  };
  writer.Begin(kMember, Type::kInfo, "", kMemberHelp);
  each([&](const Member& m, const std::string& labels) {
    writer.Sample(labels + "," + Label("uid", std::to_string(m.entry.uid)) + "," + Label("name", ProcessName(m.entry.pid)), Whole(1));
  });
  for (const auto& family : kOfMembers) {
    writer.Begin(family);
    // Zeros before the first report would be counters that begin with a leap, where a member has joined another broker.
    const bool by_broker = &family < kOfMembers + kOfSilentMembers;
    each([&](const Member& m, const std::string& labels) {
      if (by_broker || HasReported(m.entry)) writer.Sample(labels, family.value(m));
    });
  }
}

}  // namespace

std::string MetricsText(const MetricsSnapshot& snapshot, MetricsForm form) {
  Writer writer(form);
  writer.Begin(kUp);
  writer.Sample("", kUp.value(snapshot));
  if (!snapshot.up) return writer.End();
  writer.Begin(kLimit);
  writer.Sample("", kLimit.value(snapshot));
  const auto page = static_cast<std::int64_t>(snapshot.page_bytes);
  for (const auto& family : kOfDomains) {
    writer.Begin(family);
    for (const DomainEntry& domain : snapshot.domains) writer.Sample(Label("domain", NameOf(domain)), family.value({domain, page}));
  }
  writer.Begin(kUnmerged, Type::kGauge, "bytes", kUnmergedHelp);
  for (const DomainEntry& domain : snapshot.domains) {
    for (const ReasonText& reason : kReasonTexts) {
      writer.Sample(Label("domain", NameOf(domain)) + "," + Label("reason", reason.name), Domain{domain, page}.Pages("unmerged_" + std::string(reason.name)));
    }
  }
  WriteMembers(writer, snapshot);
  return writer.End();
}

}  // namespace ksmu::tools
