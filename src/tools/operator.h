// A connection to a broker as its operator (broker/control.h), and what the commands that have one share: their options, exit
// statuses and errors. What does not work ends the command by an exception of ours, Failed, caught in Guarded.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "broker/control.h"
#include "os/channel.h"

namespace ksmu::tools {

// Exit statuses.
inline constexpr int kRefused = 1, kUsage = 2, kNoBroker = 3, kNotPermitted = 4, kNotThere = 5, kNoAnswer = 6;
inline constexpr const char* kOptionsText =
    "  --socket PATH   the broker's socket: $XDG_RUNTIME_DIR/ksmu/default.sock or /run/ksmu/default.sock unless told otherwise,\n"
    "                  or what KSMU_BROKER says\n"
    "  --domain NAME   a named domain, as ksmud has it: its socket is NAME.sock beside that (KSMU_DOMAIN)\n"
    "  --user UID      of the domains that each user has, this one's; one's own unless told otherwise\n"
    "  --json          for programs\n"
    "  --help          this text\n";
inline constexpr const char* kStatusText =
    "exit status: 0 done; 1 refused, by the broker or by a member; 2 usage; 3 no broker listens there; 4 not permitted;\n"
    "5 no such domain, process or name; 6 no answer in time.\n";

struct Failed {
  int status;
  std::string what;
  int error = 0;  // the errno that the broker has given as its reason
};

struct OperatorOptions {
  std::string socket, domain;
  std::int64_t user = -1;
  bool json = false;
  int patience_ms = 10'000;  // with a broker, for each answer; that members are silent it says after a second
};

// A command's arguments: what is not an option, in order; its own options go to `own`, which takes what it knows and its value by
// `value`. Ends the command at --help.
class Arguments {
 public:
  using Value = std::function<std::string()>;
  using Own = std::function<bool(const std::string& option, const Value& value)>;
  Arguments(const char* usage, int argc, char** argv, OperatorOptions* options, const Own& own = nullptr);
  const std::vector<std::string>& rest() const { return rest_; }
  bool help() const { return help_; }  // it has been printed
  [[noreturn]] void Usage(const std::string& what) const;

 private:
  std::string usage_;
  std::vector<std::string> rest_;
  bool help_ = false;
};

// As KSM's files take numbers: digits, a plus sign before them, a newline behind them. False: it is none, or does not fit.
bool ParseNumber(std::string_view text, std::int64_t* value);
std::uint32_t ParsePid(const Arguments& arguments, const std::string& text);

class Operator {
 public:
  explicit Operator(const OperatorOptions& options);

  const std::string& path() const { return path_; }
  const broker::control::WelcomeEntry& welcome() const { return welcome_; }
  std::uint64_t page_bytes() const { return welcome_.page_bytes; }
  // All that are shown to this user; or, with --user or --domain, the one.
  std::vector<broker::control::DomainEntry> Domains();
  // The one that is meant where there can be but one.
  broker::control::DomainEntry Domain();
  std::vector<broker::control::MemberEntry> Members(std::uint32_t domain, std::uint32_t pid = 0);
  // The domain in which this process is a member.
  broker::control::DomainEntry DomainOf(std::uint32_t pid);
  // Without a domain (kNoDomain): of all that there are and will be.
  broker::control::SetEntry Set(std::uint32_t domain, std::uint32_t pid, std::uint32_t tunable, std::int64_t value);
  // The most frames of all domains together; 0: no limit.
  void SetLimit(std::uint64_t frames);
  broker::control::DefaultsEntry Defaults();
  // Of what run 2 has begun, in members that answer: EINPROGRESS, 0, or the errno that it has ended with in one of them.
  int Unmerging(std::uint32_t domain, std::uint32_t pid = 0);
  // A member that lies can go on telling for ever: whoever cannot wait says how many are wanted at the most, and for how long.
  std::vector<broker::wire::RegionEntry> Explain(std::uint32_t domain, std::uint32_t pid, std::size_t most = ~std::size_t{0}, std::uint64_t within_ms = ~std::uint64_t{0});

 private:
  // The answer, which is of this kind; Failed with the errno that came instead, whose words are made by `words`.
  const broker::control::Message& Ask(broker::control::Kind answer, const std::function<std::string(int)>& words);
  std::vector<broker::control::DomainEntry> All();

  OperatorOptions options_;
  std::string path_;
  os::Channel channel_;
  std::uint32_t number_ = 0;
  broker::control::WelcomeEntry welcome_;
  std::unique_ptr<broker::control::Message> out_, in_;
};

// Runs it; a failure becomes a sentence on stderr, and as JSON {"error": ...} on stdout where that is wanted.
int Guarded(const OperatorOptions& options, const std::function<int()>& body);

// Names of what the slots hold, in order.
const std::vector<std::string>& CounterNames();
std::int64_t CounterOf(const broker::control::DomainEntry& domain, std::string_view name);
std::int64_t CounterOf(const broker::control::MemberEntry& member, std::string_view name);
std::string ProcessName(std::uint32_t pid);  // "" where there is none to be seen

}  // namespace ksmu::tools
