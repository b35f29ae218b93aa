// ksmuctl status, members, top: what is saved, by whom, at what cost, and why the rest is not.
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "engine/tunables.h"
#include "ksmu/ksmu.h"
#include "tools/balance.h"
#include "tools/commands.h"
#include "tools/operator.h"
#include "tools/output.h"
#include "tools/reasons.h"

namespace ksmu::tools {
namespace {

using broker::control::DomainEntry;
using broker::control::MemberEntry;

static_assert(sizeof kReasonTexts / sizeof *kReasonTexts == KSMU_REASON_COUNT - 1);

std::uint64_t Positive(std::int64_t n) { return n > 0 ? static_cast<std::uint64_t>(n) : 0; }

std::string Signed(std::int64_t bytes) { return bytes < 0 ? "-" + MiB(static_cast<std::uint64_t>(-bytes)) : MiB(static_cast<std::uint64_t>(bytes)); }

template <typename Entry>
std::string JsonCounters(const Entry& entry) {
  std::string json = "{";
  for (std::size_t i = 0; i < CounterNames().size(); ++i) json += (i ? ", \"" : "\"") + CounterNames()[i] + "\": " + std::to_string(entry.counters[i]);
  return json + "}";
}

template <typename Entry>
std::string JsonTunables(const Entry& entry) {
  std::string json = "{";
  for (std::size_t t = 0; t < engine::kTunableCount; ++t) {
    json += (t ? ", \"" : "\"") + std::string(engine::kTunableRules[t].name) + "\": " + std::to_string(entry.tunables[t]);
  }
  return json + "}";
}

std::string JsonMember(const MemberEntry& m) {
  const bool reported = m.reported_ms != ~std::uint64_t{0};
  return "{\"pid\": " + std::to_string(m.pid) + ", \"uid\": " + std::to_string(m.uid) + ", \"name\": " + JsonString(ProcessName(m.pid)) +
         ", \"joined_ms\": " + std::to_string(m.joined_ms) + ", \"reported_ms\": " + (reported ? std::to_string(m.reported_ms) : "null") +
         ", \"unanswered_ms\": " + std::to_string(m.unanswered_ms) + ", \"unmerging\": " + std::to_string(m.unmerging) + ", \"cpu_ns\": " + std::to_string(m.cpu_ns) +
         ", \"tunables\": " + JsonTunables(m) + ", \"counters\": " + JsonCounters(m) + "}";
}

std::string JsonMembers(const std::vector<MemberEntry>& members) {
  std::string json = "[";
  for (const MemberEntry& member : members) json += (json.size() > 1 ? ", " : "") + JsonMember(member);
  return json + "]";
}

std::string JsonDomain(Operator& op, const DomainEntry& d) {
  const Balance balance = BalanceOf(d, op.page_bytes());
  std::string set;
  for (std::size_t t = 0; t < engine::kTunableCount; ++t) {
    if (d.set >> t & 1) set += (set.empty() ? "" : ", ") + JsonString(engine::kTunableRules[t].name);
  }
  return "{\"domain\": " + JsonString(NameOf(d)) + ", \"socket\": " + JsonString(op.path()) + ", \"page_bytes\": " + std::to_string(op.page_bytes()) +
         ", \"saved_bytes\": " + std::to_string(balance.saved) + ", \"net_bytes\": " + std::to_string(balance.net) + ", \"tuner\": " + JsonString(broker::control::TunerWord(d)) + ", \"frames\": " + std::to_string(d.frames) +
         ", \"left\": " + std::to_string(d.left) + ", \"broker_bytes\": " + std::to_string(d.metadata_bytes) + ", \"cpu_ns\": " + std::to_string(d.cpu_ns) +
         ", \"set\": [" + set + "], \"tunables\": " + JsonTunables(d) + ", \"counters\": " + JsonCounters(d) +
         ", \"members\": " + JsonMembers(op.Members(d.domain)) + "}";
}

void PrintMembers(const std::vector<MemberEntry>& members, std::uint64_t page) {
  std::printf("  %8s %-16s %12s %12s %10s %12s %12s %9s  %s\n", "PID", "NAME", "TRACKED MiB", "MERGED MiB", "ZERO MiB", "UNIQUE MiB", "CHANGING MiB", "CPU s", "");
  for (const MemberEntry& m : members) {
    const auto mib = [&](const char* name) { return MiB(Positive(CounterOf(m, name)) * page); };
    std::string note;
    if (m.reported_ms == ~std::uint64_t{0}) note = "has not reported yet";
    else if (m.unanswered_ms >= 1000) note = "has not answered for " + std::to_string(m.unanswered_ms / 1000) + " s";
    else if (m.tunables[engine::kTunable_run] != 1) note = "run " + std::to_string(m.tunables[engine::kTunable_run]);
    std::printf("  %8u %-16s %12s %12s %10s %12s %12s %9.2f  %s\n", m.pid, ProcessName(m.pid).c_str(), mib("pages_tracked").c_str(), mib("pages_merged").c_str(),
                mib("ksm_zero_pages").c_str(), mib("pages_unshared").c_str(), mib("pages_volatile").c_str(), static_cast<double>(m.cpu_ns) / 1e9, note.c_str());
  }
}

void PrintReasons(const DomainEntry& d, std::uint64_t page) {
  const auto line = [&](std::string_view name, std::int64_t pages, std::string_view what, std::string_view remedy) {
    if (pages <= 0) return;
    std::printf("  %-12s %10s MiB  %.*s%s%.*s\n", std::string(name).c_str(), MiB(Positive(pages) * page).c_str(), static_cast<int>(what.size()), what.data(),
                remedy.empty() ? "" : "; do: ", static_cast<int>(remedy.size()), remedy.data());
  };
  line("unique", CounterOf(d, "pages_unshared"), "still, and without a twin so far", "");
  line("changing", CounterOf(d, "pages_volatile"), "written since the last look, or not looked at yet", "");
  for (const ReasonText& reason : kReasonTexts) line(reason.name, CounterOf(d, "unmerged_" + std::string(reason.name)), reason.what, reason.remedy);
}

void PrintDomain(Operator& op, const DomainEntry& d) {
  const std::uint64_t page = op.page_bytes();
  const Balance balance = BalanceOf(d, page);
  const std::uint64_t tracked = Positive(CounterOf(d, "pages_tracked")) * page;
  std::printf("domain %s, %s: %" PRIu64 " members%s\n", std::string(NameOf(d)).c_str(), op.path().c_str(), d.members,
              d.tunables[engine::kTunable_run] == 1 ? "" : d.tunables[engine::kTunable_run] == 0 ? "; run 0: nothing new is merged" : "; run 2: everything is unmerged");
  if (d.members == 0) return;
  std::printf("saved %s MiB of %s MiB tracked (%.0f %%): %s pages in %s frames, %s zero\n", Signed(balance.saved).c_str(), MiB(tracked).c_str(),
              tracked ? 100 * static_cast<double>(balance.saved) / static_cast<double>(tracked) : 0.0, Grouped(Positive(CounterOf(d, "pages_merged"))).c_str(),
              Grouped(d.frames).c_str(), Grouped(Positive(CounterOf(d, "ksm_zero_pages"))).c_str());
  std::printf("cost: %.2f s of CPU, %s MiB of the members' memory, %s MiB of the broker's, %s mappings, %s copies at first writes; net %s MiB\n",
              static_cast<double>(d.cpu_ns) / 1e9, MiB(Positive(CounterOf(d, "metadata_bytes"))).c_str(), MiB(d.metadata_bytes).c_str(),
              Grouped(Positive(CounterOf(d, "maps_used"))).c_str(), Grouped(Positive(CounterOf(d, "cow_breaks"))).c_str(), Signed(balance.net).c_str());
  std::printf("tuner: %s\n", std::string(broker::control::TunerWord(d)).c_str());
  if (d.silent) std::printf("%" PRIu64 " members have not reported yet\n", d.silent);
  std::printf("by whom:\n");
  PrintMembers(op.Members(d.domain), page);
  std::printf("not merged:\n");
  PrintReasons(d, page);
}

// All domains that are shown, once.
void Show(Operator& op, bool json, const char* separator) {
  std::string list;
  bool first = true;
  for (const DomainEntry& domain : op.Domains()) {
    if (json) {
      list += (first ? "" : ", ") + JsonDomain(op, domain);
    } else {
      std::fputs(first ? "" : separator, stdout);
      PrintDomain(op, domain);
    }
    first = false;
  }
  if (json) std::printf("[%s]\n", list.c_str());
  else if (first) std::printf("no domain has members\n");
  std::fflush(stdout);
}

}  // namespace

int RunStatus(int argc, char** argv) {
  OperatorOptions options;
  return Guarded(options, [&] {
    const Arguments arguments("usage: ksmuctl status [option...]\nWhat is saved, by whom, at what cost, and why the rest is not.\n", argc, argv, &options);
    if (arguments.help()) return 0;
    if (!arguments.rest().empty()) arguments.Usage("status takes no arguments, and not " + arguments.rest()[0]);
    Operator op(options);
    Show(op, options.json, "\n");
    return 0;
  });
}

int RunMembers(int argc, char** argv) {
  OperatorOptions options;
  return Guarded(options, [&] {
    const Arguments arguments("usage: ksmuctl members [option...]\nThe processes of a domain, as they have reported, at most two seconds ago.\n", argc, argv, &options);
    if (arguments.help()) return 0;
    if (!arguments.rest().empty()) arguments.Usage("members takes no arguments, and not " + arguments.rest()[0]);
    Operator op(options);
    std::vector<MemberEntry> all;
    for (const DomainEntry& domain : op.Domains()) {
      const std::vector<MemberEntry> members = op.Members(domain.domain);
      all.insert(all.end(), members.begin(), members.end());
    }
    if (options.json) std::printf("%s\n", JsonMembers(all).c_str());
    else PrintMembers(all, op.page_bytes());
    return 0;
  });
}

int RunTop(int argc, char** argv) {
  OperatorOptions options;
  return Guarded(options, [&] {
    std::int64_t seconds = 2, count = 0;
    const Arguments::Own own = [&](const std::string& option, const Arguments::Value& value) {
      std::int64_t* const to = option == "--interval" ? &seconds : option == "--count" ? &count : nullptr;
      if (!to) return false;
      const std::string text = value();
      if (!ParseNumber(text, to) || *to < 1 || *to > 86400) throw Failed{kUsage, option + " wants a number from 1 to 86400, not " + text};
      return true;
    };
    const Arguments arguments("usage: ksmuctl top [--interval SECONDS] [--count N] [option...]\nThe status again and again, every 2 seconds; N times, or until it is interrupted.\n",
                              argc, argv, &options, own);
    if (arguments.help()) return 0;
    if (!arguments.rest().empty()) arguments.Usage("top takes no arguments, and not " + arguments.rest()[0]);
    Operator op(options);
    for (std::int64_t i = 0;;) {
      if (!options.json && isatty(STDOUT_FILENO)) std::fputs("\033[H\033[2J", stdout);
      Show(op, options.json, "\n");
      if (++i == count || std::ferror(stdout)) return 0;
      sleep(static_cast<unsigned>(seconds));
    }
  });
}

}  // namespace ksmu::tools
