// ksmuctl get, set, run, unmerge: the tunables of a domain, or of one of its members.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "engine/tunables.h"
#include "tools/balance.h"
#include "tools/commands.h"
#include "tools/operator.h"
#include "tools/output.h"

namespace ksmu::tools {
namespace {

using broker::control::DomainEntry;
using broker::control::MemberEntry;
using broker::control::SetEntry;

constexpr int kLookMs = 200;

// `--pid`: one member's.
Arguments::Own PidOption(std::string* pid) {
  return [pid](const std::string& option, const Arguments::Value& value) {
    if (option != "--pid") return false;
    *pid = value();
    return true;
  };
}

// What members have answered. The exit status.
int Tell(const OperatorOptions& options, const SetEntry& done) {
  if (options.json) {
    std::printf("{\"done\": %u, \"refused\": %u, \"silent\": %u, \"failures\": [", done.done, done.refused, done.silent);
    for (std::uint32_t i = 0; i < done.named; ++i) {
      std::printf("%s{\"pid\": %u, \"error\": %s}", i ? ", " : "", done.failures[i].pid, JsonString(std::strerror(static_cast<int>(done.failures[i].error))).c_str());
    }
    std::printf("]}\n");
  }
  for (std::uint32_t i = 0; i < done.named; ++i) {
    const auto error = static_cast<int>(done.failures[i].error);
    std::fprintf(stderr, "ksmuctl: process %u: %s\n", done.failures[i].pid, error == ETIMEDOUT ? "does not answer; it is told as soon as it does" : std::strerror(error));
  }
  return done.refused ? kRefused : done.silent ? kNoAnswer : 0;
}

std::int64_t RunOf(Operator& op, std::uint32_t domain, std::uint32_t pid) {
  if (pid) {
    const auto members = op.Members(domain, pid);
    return members.empty() ? 2 : members[0].tunables[engine::kTunable_run];  // who has left has nothing merged
  }
  for (const DomainEntry& entry : op.Domains()) {
    if (entry.domain == domain) return entry.tunables[engine::kTunable_run];
  }
  return 2;
}

// Until nothing of it is merged any more, or it is said why not.
int WaitUntilUnmerged(Operator& op, std::uint32_t domain, std::uint32_t pid) {
  int error;
  while ((error = op.Unmerging(domain, pid)) == EINPROGRESS) usleep(kLookMs * 1000);
  // Somebody else's `run 1` ends it as well.
  if (const std::int64_t run = RunOf(op, domain, pid); run != 2) {
    std::fprintf(stderr, "ksmuctl: run was set to %lld meanwhile: not everything was unmerged\n", static_cast<long long>(run));
    return kRefused;
  }
  const int status = error ? kRefused : 0;
  if (status) {
    for (const MemberEntry& member : op.Members(domain, pid)) {
      if (member.unmerging == 0 || member.unmerging == EINPROGRESS) continue;
      std::fprintf(stderr, "ksmuctl: process %u: %s: the rest stays merged; ask again\n", member.pid,
                   member.unmerging == ENOMEM ? "what is merged would not fit into memory" : std::strerror(static_cast<int>(member.unmerging)));
    }
  }
  return status;
}

// Who sees more than one domain may take this for all of them, as KSM's run is.
void NameOthers(const OperatorOptions& options, Operator& op, const DomainEntry& set) {
  if (options.user >= 0 || !options.domain.empty()) return;
  std::string others;
  for (const DomainEntry& domain : op.Domains()) {
    if (domain.domain != set.domain && domain.members) others += (others.empty() ? "" : ", ") + std::string(NameOf(domain)) + " (" + std::to_string(domain.members) + ")";
  }
  if (others.empty()) return;
  std::fprintf(stderr, "ksmuctl: set for %s alone; members are in %s as well: --user UID, or KSM's file run in ksmu-fs's tree for all\n", std::string(NameOf(set)).c_str(), others.c_str());
}

int Set(const OperatorOptions& options, const Arguments& arguments, const std::string& pid, std::uint32_t tunable, std::int64_t value, bool wait) {
  const std::uint32_t process = pid.empty() ? 0 : ParsePid(arguments, pid);
  Operator op(options);
  const DomainEntry domain = process ? op.DomainOf(process) : op.Domain();
  const int status = Tell(options, op.Set(domain.domain, process, tunable, value));
  if (!process && tunable == engine::kTunable_run) NameOthers(options, op, domain);
  if (status || !wait || tunable != engine::kTunable_run || value != 2) return status;
  return WaitUntilUnmerged(op, domain.domain, process);
}

std::int64_t ParseValue(const Arguments& arguments, std::uint32_t tunable, std::string text) {
  std::int64_t value = 0;
  if (ParseNumber(text, &value)) return value;
  if (text.ends_with('\n')) text.pop_back();
  // KSM's words.
  if (tunable == engine::kTunable_advisor_mode && (text == "none" || text == "scan-time")) return text == "none" ? 0 : 1;
  arguments.Usage(std::string(engine::kTunableRules[tunable].name) + " wants a number from " + std::to_string(engine::kTunableRules[tunable].least) + " on, not \"" + text + "\"");
}

std::uint32_t FindTunable(const std::string& name) {
  const std::size_t tunable = engine::FindTunableNumber(name);
  if (tunable < engine::kTunableCount) return static_cast<std::uint32_t>(tunable);
  const auto& names = CounterNames();
  if (std::find(names.begin(), names.end(), name) != names.end()) throw Failed{kNotPermitted, name + " is a counter: it can only be read"};
  throw Failed{kNotThere, "there is no tunable " + name};
}

template <typename Entry>
void Print(const OperatorOptions& options, const Entry& entry, const std::string& name) {
  std::string json;
  bool found = false;
  const auto one = [&](std::string_view known, std::int64_t value) {
    if (!name.empty() && name != known) return;
    found = true;
    if (options.json) json += (json.empty() ? "" : ", ") + JsonString(known) + ": " + std::to_string(value);
    else if (name.empty()) std::printf("%s %lld\n", std::string(known).c_str(), static_cast<long long>(value));
    else std::printf("%lld\n", static_cast<long long>(value));
  };
  for (std::size_t t = 0; t < engine::kTunableCount; ++t) one(engine::kTunableRules[t].name, entry.tunables[t]);
  for (std::size_t c = 0; c < CounterNames().size(); ++c) one(CounterNames()[c], entry.counters[c]);
  if (!found) throw Failed{kNotThere, "there is no counter and no tunable " + name};
  if (options.json) std::printf("{%s}\n", json.c_str());
}

}  // namespace

int RunGet(int argc, char** argv) {
  OperatorOptions options;
  return Guarded(options, [&] {
    std::string pid;
    const Arguments arguments("usage: ksmuctl get [NAME] [--pid PID] [option...]\nA counter or a tunable of the domain, by KSM's name, or all of them; --pid: of one member.\n", argc,
                              argv, &options, PidOption(&pid));
    if (arguments.help()) return 0;
    if (arguments.rest().size() > 1) arguments.Usage("get takes one name");
    const std::string name = arguments.rest().empty() ? "" : arguments.rest()[0];
    if (!arguments.rest().empty() && name.empty()) arguments.Usage("the name is empty");
    const std::uint32_t process = pid.empty() ? 0 : ParsePid(arguments, pid);
    Operator op(options);
    if (!process) {
      // Members count frames of the broker's as shared by each of them; of a domain each is there once.
      DomainEntry domain = op.Domain();
      const auto put = [&](std::string_view counter, std::int64_t value) {
        const auto& names = CounterNames();
        domain.counters[static_cast<std::size_t>(std::find(names.begin(), names.end(), counter) - names.begin())] = value;
      };
      const auto frames = static_cast<std::int64_t>(domain.frames);
      const std::int64_t merged = CounterOf(domain, "pages_merged"), profit = BalanceOf(domain, op.page_bytes()).net;
      put("pages_shared", frames);
      put("pages_sharing", std::max<std::int64_t>(merged - frames, 0));
      put("general_profit", profit);
      Print(options, domain, name);
      return 0;
    }
    const auto members = op.Members(op.DomainOf(process).domain, process);
    if (members.empty()) throw Failed{kNotThere, "process " + pid + " has just left"};
    Print(options, members[0], name);
    return 0;
  });
}

int RunSet(int argc, char** argv) {
  OperatorOptions options;
  return Guarded(options, [&] {
    std::string pid;
    const Arguments arguments(
        "usage: ksmuctl set NAME VALUE [--pid PID] [option...]\n       ksmuctl set NAME=VALUE [--pid PID] [option...]\n"
        "Sets a tunable, by KSM's name and KSM's rules, of all members of the domain and of those to come; --pid: of one member.\n",
        argc, argv, &options, PidOption(&pid));
    if (arguments.help()) return 0;
    std::vector<std::string> rest = arguments.rest();
    if (const std::size_t equals = rest.size() == 1 ? rest[0].find('=') : std::string::npos; equals != std::string::npos) {
      rest = {rest[0].substr(0, equals), rest[0].substr(equals + 1)};
    }
    if (rest.size() != 2) arguments.Usage("set wants a name and a value");
    const std::uint32_t tunable = FindTunable(rest[0]);
    return Set(options, arguments, pid, tunable, ParseValue(arguments, tunable, rest[1]), false);
  });
}

int RunRun(int argc, char** argv) {
  OperatorOptions options;
  return Guarded(options, [&] {
    std::string pid;
    const Arguments arguments(
        "usage: ksmuctl run 0|1|2 [--pid PID] [option...]\n"
        "0: merge nothing new, keep what is merged. 1: merge. 2: stop, and unmerge everything; it returns when that is done, or says\n"
        "for which process it could not be. --pid: one member alone.\n",
        argc, argv, &options, PidOption(&pid));
    if (arguments.help()) return 0;
    if (arguments.rest().size() != 1) arguments.Usage("run wants 0, 1 or 2");
    const std::int64_t value = ParseValue(arguments, engine::kTunable_run, arguments.rest()[0]);
    return Set(options, arguments, pid, engine::kTunable_run, value, true);
  });
}

int RunUnmerge(int argc, char** argv) {
  OperatorOptions options;
  return Guarded(options, [&] {
    const Arguments arguments(
        "usage: ksmuctl unmerge PID [option...]\n"
        "run 2 for this member alone: everything in it is unmerged, and nothing is merged until run 1, for it or for the domain.\n",
        argc, argv, &options);
    if (arguments.help()) return 0;
    if (arguments.rest().size() != 1) arguments.Usage("unmerge wants a process");
    return Set(options, arguments, arguments.rest()[0], engine::kTunable_run, 2, true);
  });
}

}  // namespace ksmu::tools
