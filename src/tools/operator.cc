#include "tools/operator.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "broker/door.h"
#include "engine/tunables.h"
#include "ksmu/ksmu.h"
#include "tools/output.h"

namespace ksmu::tools {

using namespace broker::control;  // NOLINT: the protocol's names are what this file is about

namespace {

int StatusOf(int error) {
  switch (error) {
    case EPERM: return kNotPermitted;
    case ENOENT:
    case ESRCH: return kNotThere;
    case ETIMEDOUT: return kNoAnswer;
    default: return kRefused;
  }
}

std::string WordsFor(int error) {
  switch (error) {
    case EPERM: return "not permitted: only root and the broker's own user may do this";
    case ENOENT: return "there is no such domain";
    case ESRCH: return "this process is no member of the domain";
    case ETIMEDOUT: return "the process does not answer";
    case EAGAIN: return "this user has as many connections to the broker as one may have";
    case EPROTONOSUPPORT: return "the broker speaks another version of the protocol";
    default: return std::strerror(error);
  }
}

template <typename Entry>
std::int64_t CounterIn(const Entry& entry, std::string_view name) {
  const auto& names = CounterNames();
  const auto found = std::find(names.begin(), names.end(), name);
  return found == names.end() ? 0 : entry.counters[static_cast<std::size_t>(found - names.begin())];
}

}  // namespace

// --- arguments -------------------------------------------------------------------------------------------------------

Arguments::Arguments(const char* usage, int argc, char** argv, OperatorOptions* options, const Own& own) : usage_(usage) {
  bool options_end = false;
  for (int i = 0; i < argc; ++i) {
    const std::string argument = argv[i];
    const Value value = [&]() -> std::string {
      if (i + 1 == argc) Usage(argument + " wants a value");
      return argv[++i];
    };
    // What looks like a negative number is none of ours.
    const bool is_option = !options_end && argument.size() > 1 && argument[0] == '-' && !(argument[1] >= '0' && argument[1] <= '9');
    if (!is_option) {
      rest_.push_back(argument);
    } else if (argument == "--") {
      options_end = true;
    } else if (argument == "--help") {
      std::printf("%s\n%s\n%s", usage, kOptionsText, kStatusText);
      help_ = true;
      return;
    } else if (argument == "--json") {
      options->json = true;
    } else if (argument == "--socket") {
      options->socket = value();
      if (options->socket.empty()) Usage("--socket wants a path");
    } else if (argument == "--domain") {
      options->domain = value();
      if (options->domain.empty()) Usage("--domain wants a name");
    } else if (argument == "--user") {
      const std::string text = value();
      if (!ParseNumber(text, &options->user) || options->user > ~std::uint32_t{0}) Usage("--user wants a user's number, not " + text);
    } else if (!own || !own(argument, value)) {
      Usage("unknown option " + argument);
    }
  }
}

void Arguments::Usage(const std::string& what) const { throw Failed{kUsage, what + "\n" + usage_}; }

bool ParseNumber(std::string_view text, std::int64_t* value) {
  if (text.ends_with('\n')) text.remove_suffix(1);
  if (text.starts_with('+')) text.remove_prefix(1);
  if (text.empty() || text[0] < '0' || text[0] > '9') return false;
  const auto end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, *value);
  return result.ec == std::errc() && result.ptr == end;
}

std::uint32_t ParsePid(const Arguments& arguments, const std::string& text) {
  std::int64_t pid = 0;
  if (!ParseNumber(text, &pid) || pid < 1 || pid > INT32_MAX) arguments.Usage("a process's number is wanted, not " + text);
  return static_cast<std::uint32_t>(pid);
}

// --- the connection --------------------------------------------------------------------------------------------------

Operator::Operator(const OperatorOptions& options) : options_(options), out_(std::make_unique<Message>()), in_(std::make_unique<Message>()) {
  const char* const socket = options.socket.empty() ? std::getenv("KSMU_BROKER") : options.socket.c_str();
  const char* const domain = options.domain.empty() ? std::getenv("KSMU_DOMAIN") : options.domain.c_str();
  broker::BrokerDoor door;
  // The library wants it absolute, for it may be looked up later and elsewhere; here it is now.
  std::string path = socket ? socket : "";
  if (!options.socket.empty() && path[0] != '/') {
    char here[4096];
    if (getcwd(here, sizeof here)) path = std::string(here) + "/" + path;
  }
  if (const char* wrong = door.Choose(socket ? path.c_str() : nullptr, domain, std::getenv("XDG_RUNTIME_DIR"))) throw Failed{kUsage, wrong};
  if (!door.has_choice()) throw Failed{kNoBroker, "KSMU_BROKER is \"none\": say which by --socket"};
  int error = -ENOENT;
  std::string nowhere;
  for (std::size_t i = 0; i < broker::BrokerDoor::kCandidates && door.path(i)[0] && (error == -ENOENT || error == -ECONNREFUSED); ++i) {
    path_ = door.path(i);
    error = channel_.Connect(door.path(i));
    if (error) nowhere += (nowhere.empty() ? "" : "; ") + path_ + ": no broker listens there (" + std::strerror(-error) + ")";
  }
  if (error == -EACCES || error == -EPERM) throw Failed{kNotPermitted, path_ + ": this user may not connect to it"};
  if (error) throw Failed{kNoBroker, nowhere + "; ksmuctl doctor says how to mend it"};
  out_->header = MakeHeader(Kind::kOperate, 1, 0);
  out_->operate = {kVersion, 0};
  welcome_ = Ask(Kind::kWelcome, WordsFor).welcome;
  if (welcome_.version != kVersion || welcome_.page_bytes == 0) throw Failed{kRefused, path_ + ": the broker speaks another version of the protocol"};
}

const Message& Operator::Ask(Kind answer, const std::function<std::string(int)>& words) {
  alignas(8) static std::array<std::byte, kMaxPacket> packet;
  out_->header.number = ++number_;
  const std::uint64_t end = os::MonotonicMs() + static_cast<std::uint64_t>(options_.patience_ms);
  int error = 0;
  while ((error = channel_.Send(packet.data(), Encode(*out_, packet.data()))) == -EAGAIN) {
    if (os::MonotonicMs() >= end || !channel_.Wait(true, options_.patience_ms)) throw Failed{kNoAnswer, path_ + ": the broker does not answer"};
  }
  std::ptrdiff_t got = error;
  while (!error) {
    std::size_t descriptors = 0;
    got = channel_.Receive(packet.data(), packet.size(), nullptr, 0, &descriptors);
    if (got != -EAGAIN) break;
    const std::uint64_t now = os::MonotonicMs();
    if (now >= end || !channel_.Wait(false, static_cast<int>(end - now))) throw Failed{kNoAnswer, path_ + ": the broker does not answer"};
  }
  if (got <= 0) throw Failed{kNoBroker, path_ + ": the broker has gone, or takes no operators"};
  const char* const wrong = Decode(packet.data(), static_cast<std::size_t>(got), Sender::kBroker, in_.get());
  if (wrong || in_->header.number != number_) throw Failed{kRefused, path_ + ": the broker's answer is not as a broker's is: " + (wrong ? wrong : "of another question")};
  if (in_->kind() == Kind::kFailed) throw Failed{StatusOf(static_cast<int>(in_->word)), words(static_cast<int>(in_->word)), static_cast<int>(in_->word)};
  if (in_->kind() != answer) throw Failed{kRefused, path_ + ": the broker's answer is to another question"};
  return *in_;
}

std::vector<DomainEntry> Operator::All() {
  std::vector<DomainEntry> all;
  for (std::uint32_t after = kNoDomain;;) {
    out_->header = MakeHeader(Kind::kDomains, 1, 0);
    out_->word = after;
    const Message& answer = Ask(Kind::kDomainsAre, WordsFor);
    if (answer.header.count == 0) return all;
    if (answer.domains[0].domain <= after) throw Failed{kRefused, path_ + ": the broker's answer is not as a broker's is: domains out of order"};
    all.insert(all.end(), answer.domains.begin(), answer.domains.begin() + answer.header.count);
    after = all.back().domain;
  }
}

std::vector<DomainEntry> Operator::Domains() {
  // A named domain has a socket of its own.
  if (options_.user >= 0 || !options_.domain.empty()) return {Domain()};
  return All();
}

DomainEntry Operator::Domain() {
  const std::string name = "default/" + std::to_string(options_.user);
  for (const DomainEntry& domain : All()) {
    if (options_.user >= 0 ? NameOf(domain) == name : domain.domain == welcome_.own_domain) return domain;
  }
  throw Failed{kNotThere, path_ + ": " + (options_.user >= 0 ? "there is no domain " + name + ", or it is not shown to this user" : "this user has no domain there")};
}

std::vector<MemberEntry> Operator::Members(std::uint32_t domain, std::uint32_t pid) {
  std::vector<MemberEntry> all;
  for (std::uint32_t after = 0;;) {
    out_->header = MakeHeader(Kind::kMembers, 1, 0);
    out_->members_of = {domain, after, pid, 0};
    const Message& answer = Ask(Kind::kMembersAre, WordsFor);
    if (answer.header.count == 0) return all;
    if (answer.members[0].member < after) throw Failed{kRefused, path_ + ": the broker's answer is not as a broker's is: members out of order"};
    all.insert(all.end(), answer.members.begin(), answer.members.begin() + answer.header.count);
    after = all.back().member + 1;
    if (after == 0) return all;
  }
}

DomainEntry Operator::DomainOf(std::uint32_t pid) {
  for (const DomainEntry& domain : Domains()) {
    if (!Members(domain.domain, pid).empty()) return domain;
  }
  throw Failed{kNotThere, "process " + std::to_string(pid) + " is no member of a domain of " + path_ + " that is shown to this user"};
}

SetEntry Operator::Set(std::uint32_t domain, std::uint32_t pid, std::uint32_t tunable, std::int64_t value) {
  out_->header = MakeHeader(Kind::kSet, 1, 0);
  out_->set = {domain, pid, tunable, 0, value};
  const engine::TunableRule& rule = engine::kTunableRules[tunable];
  const std::string name(rule.name);
  return Ask(Kind::kSetDone, [&](int error) -> std::string {
    switch (error) {
      case EINVAL:
        if (tunable == engine::kTunable_pages_to_scan && value >= rule.least) return "the advisor sets pages_to_scan: set advisor_mode to 0 first";
        return name + " is " + std::to_string(rule.least) + " at the least" + (rule.most < std::int64_t{1} << 40 ? ", and " + std::to_string(rule.most) + " at the most" : "");
      case EBUSY: return name + " cannot be changed while pages are shared: run 2 first";
      case EOPNOTSUPP: return name + ": the broker cannot keep nodes apart here (ksmud --merge-across-nodes 0 says why)";
      case ENOENT: return "there is no such domain any more";
      default: return WordsFor(error);
    }
  }).done;
}

void Operator::SetLimit(std::uint64_t frames) {
  out_->header = MakeHeader(Kind::kLimit, 1, 0);
  out_->word = frames;
  Ask(Kind::kSetDone, WordsFor);
}

DefaultsEntry Operator::Defaults() {
  out_->header = MakeHeader(Kind::kDefaults, 1, 0);
  out_->word = 0;
  return Ask(Kind::kDefaultsAre, WordsFor).defaults;
}

int Operator::Unmerging(std::uint32_t domain, std::uint32_t pid) {
  constexpr std::uint64_t kSilentMs = 1000, kReportWithinMs = 5000;
  int error = 0;
  for (const MemberEntry& member : Members(domain, pid)) {
    if (member.unanswered_ms >= kSilentMs || member.reported_ms == ~std::uint64_t{0}) continue;
    // What it has answered to it has reported before. So where run is something else, its program has set that since, and is obeyed.
    if (member.tunables[engine::kTunable_run] != 2) continue;
    if (member.unmerging != EINPROGRESS) error = member.unmerging ? static_cast<int>(member.unmerging) : error;
    else if (member.reported_ms < kReportWithinMs) return EINPROGRESS;
  }
  return error;
}

std::vector<broker::wire::RegionEntry> Operator::Explain(std::uint32_t domain, std::uint32_t pid, std::size_t most, std::uint64_t within_ms) {
  std::vector<broker::wire::RegionEntry> all;
  const std::uint64_t begun = os::MonotonicMs();
  for (std::uint64_t from = 0;;) {
    if (all.size() > most || os::MonotonicMs() - begun > within_ms) throw Failed{kNoAnswer, "the process has more regions than can be waited for", ETIMEDOUT};
    out_->header = MakeHeader(Kind::kExplain, 1, 0);
    out_->explain = {domain, pid, from};
    const Message& answer = Ask(Kind::kExplained, [&](int error) {
      return error == EPERM ? "not permitted: a process's regions are shown to root, to the broker's user and to its own" : WordsFor(error);
    });
    if (answer.header.count && answer.regions[0].end <= from) throw Failed{kRefused, path_ + ": the broker's answer is not as a broker's is: regions out of order"};
    for (std::size_t i = 0; i < answer.header.count; ++i) {
      const auto& next = answer.regions[i];
      // The rest of what was told in part.
      if (all.empty() || all.back().end != next.start || all.back().flags != next.flags || next.excluded_bytes || i != 0) {
        all.push_back(next);
        continue;
      }
      auto& to = all.back();
      to.end = next.end;
      to.merged += next.merged, to.still += next.still, to.changing += next.changing, to.zero += next.zero;
      for (std::size_t r = 0; r < to.unmerged.size(); ++r) to.unmerged[r] += next.unmerged[r];
    }
    from = answer.header.count ? answer.regions[answer.header.count - 1].next : 0;
    if (from == 0 || from >= broker::wire::kAddressLimit) return all;
  }
}

// --- what commands share ---------------------------------------------------------------------------------------------

int Guarded(const OperatorOptions& options, const std::function<int()>& body) {
  try {
    return body();
  } catch (const Failed& failed) {
    std::fflush(stdout);
    if (options.json && failed.status != kUsage) std::printf("{\"error\": %s, \"status\": %d}\n", JsonString(failed.what).c_str(), failed.status);
    std::fprintf(stderr, "ksmuctl: %s%s", failed.what.c_str(), failed.what.ends_with('\n') ? "" : "\n");
    return failed.status;
  }
}

const std::vector<std::string>& CounterNames() {
  static const std::vector<std::string> names = {
#define KSMU_NAME_OF_COUNTER(name) #name,
      KSMU_FOR_EACH_COUNTER(KSMU_NAME_OF_COUNTER)
#undef KSMU_NAME_OF_COUNTER
  };
  return names;
}

std::int64_t CounterOf(const DomainEntry& domain, std::string_view name) { return CounterIn(domain, name); }
std::int64_t CounterOf(const MemberEntry& member, std::string_view name) { return CounterIn(member, name); }

std::string ProcessName(std::uint32_t pid) {
  char name[32];
  const int fd = open(("/proc/" + std::to_string(pid) + "/comm").c_str(), O_RDONLY | O_CLOEXEC);
  const ssize_t n = fd < 0 ? 0 : read(fd, name, sizeof name);
  if (fd >= 0) close(fd);
  std::string text(name, static_cast<std::size_t>(std::max<ssize_t>(n, 0)));
  if (text.ends_with('\n')) text.pop_back();
  // Whatever a program calls itself: nothing of it steers a terminal.
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return text;
}

}  // namespace ksmu::tools
