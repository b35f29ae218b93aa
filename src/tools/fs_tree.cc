#include "tools/fs_tree.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <limits>

#include "engine/tunables.h"
#include "ksmu/ksmu.h"
#include "tools/balance.h"
#include "tools/reasons.h"

namespace ksmu::tools {

using broker::control::DomainEntry;
using broker::control::MemberEntry;

namespace {

constexpr Tree::Node kKernel = 2, kMm = 3, kKsm = 4, kMembers = 5, kFirstFile = 6;
// A member's directory and files: its process's number, and which of them.
constexpr Tree::Node kMemberNodes = Tree::Node{1} << 32;
constexpr std::uint32_t kDirectory = 0;
struct MemberFile {
  const char* name;
  std::uint32_t mode;
};
// As /proc/PID/ksm_stat: what a program has merged, and where its memory lies, is for its own user to know.
constexpr MemberFile kMemberFiles[] = {{"ksm_stat", 0400}, {"regions", 0400}, {"unmerged", 0400}};
// Of one member: as many as it can have mappings (vm.max_map_count), and less than whoever answers may be silent for. Any user can have
// a member that tells ever more, or nothing, and all readers wait meanwhile: for others than root there is a moment.
constexpr std::size_t kMostRegions = 65536;
constexpr std::uint64_t kRootsPatienceMs = 15'000, kPatienceMs = 1000;
constexpr std::uint32_t kStat = 1, kRegions = 2, kUnmerged = 3;
constexpr Tree::Node MemberNode(std::uint32_t pid, std::uint32_t which) { return kMemberNodes + (Tree::Node{pid} << 3) + which; }
constexpr bool IsMembers(Tree::Node node) { return node >= kMemberNodes; }
constexpr std::uint32_t PidOf(Tree::Node node) { return static_cast<std::uint32_t>((node - kMemberNodes) >> 3); }
constexpr std::uint32_t WhichOf(Tree::Node node) { return node & 7; }

std::string Line(std::int64_t value) { return std::to_string(value) + "\n"; }

// As the kernel's kstrtouint and its like in base 10, whose caller turns every error into EINVAL: digits, a plus sign before them, a
// newline behind them.
bool ParseUnsigned(std::string_view text, std::int64_t most, std::int64_t* value) { return ParseNumber(text, value) && *value <= most; }

// kstrtobool.
bool ParseBool(std::string_view text, std::int64_t* value) {
  if (text.empty()) return false;
  switch (text[0]) {
    case 'y': case 'Y': case 't': case 'T': case '1': *value = 1; return true;
    case 'n': case 'N': case 'f': case 'F': case '0': *value = 0; return true;
    case 'o': case 'O':
      if (text.size() < 2) return false;
      if (text[1] == 'n' || text[1] == 'N') *value = 1;
      else if (text[1] == 'f' || text[1] == 'F') *value = 0;
      else return false;
      return true;
    default: return false;
  }
}

int ErrnoOf(const Failed& failed) {
  if (failed.error) return failed.error;
  switch (failed.status) {
    case kNotPermitted: return EPERM;
    case kNoAnswer: return ETIMEDOUT;
    case kNotThere: return ENOENT;
    case kNoBroker: return ENODEV;
    default: return EIO;
  }
}

}  // namespace

const Tree::Entry Tree::kEntries[] = {
    // In the order of their numbers, from kRoot on.
    {"", 0, 0},
    {"kernel", kRoot, 0},
    {"mm", kKernel, 0},
    {"ksm", kMm, 0},
    {"members", kKsm, 0},
    {"run", kKsm, 0644},
    {"pages_to_scan", kKsm, 0644},
    {"sleep_millisecs", kKsm, 0644},
    {"merge_across_nodes", kKsm, 0644},
    {"use_zero_pages", kKsm, 0644},
    {"max_page_sharing", kKsm, 0644},
    {"max_kernel_pages", kKsm, 0644},
    {"stable_node_chains_prune_millisecs", kKsm, 0644},
    {"smart_scan", kKsm, 0644},
    {"advisor_mode", kKsm, 0644},
    {"advisor_max_cpu", kKsm, 0644},
    {"advisor_min_pages_to_scan", kKsm, 0644},
    {"advisor_max_pages_to_scan", kKsm, 0644},
    {"advisor_target_scan_time", kKsm, 0644},
    {"pages_shared", kKsm, 0444},
    {"pages_sharing", kKsm, 0444},
    {"pages_unshared", kKsm, 0444},
    {"pages_volatile", kKsm, 0444},
    {"pages_scanned", kKsm, 0444},
    {"pages_skipped", kKsm, 0444},
    {"full_scans", kKsm, 0444},
    {"stable_node_chains", kKsm, 0444},
    {"stable_node_dups", kKsm, 0444},
    {"ksm_zero_pages", kKsm, 0444},
    {"general_profit", kKsm, 0444},
};
static_assert(kFirstFile == kMembers + 1);

std::size_t Tree::Count() { return sizeof kEntries / sizeof *kEntries; }

Tree::Tree(const OperatorOptions& options, std::uint32_t uid, Kept* kept) : options_(options), uid_(uid), kept_(kept) {}

// --- the broker ------------------------------------------------------------------------------------------------------

Operator& Tree::Broker() {
  if (!broker_) broker_ = std::make_unique<Operator>(options_);
  return *broker_;
}

// The broker may have been started anew since the last time: one that has gone is looked for once more.
int Tree::Guard(const std::function<int()>& body) {
  for (int attempt = 0;; ++attempt) {
    const bool fresh = !broker_;
    try {
      return body();
    } catch (const Failed& failed) {
      // Answers to questions may still come on a connection that has been given up on.
      if (failed.error == 0) broker_.reset();
      if (attempt > 0 || fresh || failed.error != 0 || failed.status == kNoAnswer) return ErrnoOf(failed);
    }
  }
}

// Those that are shown: all of them, or the one; none of them may be there yet.
std::vector<DomainEntry> Tree::Domains() {
  try {
    return Broker().Domains();
  } catch (const Failed& failed) {
    if (failed.status == kNotThere && failed.error == 0) return {};
    throw;
  }
}

Tree::Member Tree::FindMember(std::uint32_t pid) {
  for (const DomainEntry& domain : Domains()) {
    const auto members = Broker().Members(domain.domain, pid);
    if (!members.empty()) return {domain.domain, members[0]};
  }
  throw Failed{kNotThere, "no such member", ENOENT};
}

// --- nodes -----------------------------------------------------------------------------------------------------------

int Tree::Look(Node node, About* about) {
  if (!IsMembers(node)) {
    if (node < kRoot || node >= kRoot + Count()) return ENOENT;
    const Entry& entry = kEntries[node - kRoot];
    *about = {entry.mode == 0, entry.mode ? entry.mode : 0555u, uid_};
    return 0;
  }
  return Guard([&] {
    const Member member = FindMember(PidOf(node));
    const std::uint32_t which = WhichOf(node);
    *about = {which == kDirectory, which == kDirectory ? 0555u : kMemberFiles[which - 1].mode, member.entry.uid};
    return 0;
  });
}

int Tree::Find(Node directory, std::string_view name, Node* found) {
  if (IsMembers(directory)) {
    for (std::uint32_t i = 0; i < std::size(kMemberFiles); ++i) {
      if (name == kMemberFiles[i].name) return *found = directory + 1 + i, 0;
    }
    return ENOENT;
  }
  if (directory == kMembers) {
    std::int64_t pid = 0;
    if (!ParseNumber(name, &pid) || pid < 1 || pid > INT32_MAX || name != std::to_string(pid)) return ENOENT;
    *found = MemberNode(static_cast<std::uint32_t>(pid), kDirectory);
    return 0;
  }
  for (std::size_t i = 1; i < Count(); ++i) {
    if (kEntries[i].parent == directory && name == kEntries[i].name) return *found = kRoot + i, 0;
  }
  return ENOENT;
}

int Tree::List(Node directory, std::vector<std::pair<std::string, Node>>* entries) {
  entries->clear();
  if (IsMembers(directory)) {
    for (std::uint32_t i = 0; i < std::size(kMemberFiles); ++i) entries->emplace_back(kMemberFiles[i].name, directory + 1 + i);
    return 0;
  }
  if (directory != kMembers) {
    for (std::size_t i = 1; i < Count(); ++i) {
      if (kEntries[i].parent == directory) entries->emplace_back(kEntries[i].name, kRoot + i);
    }
    return 0;
  }
  return Guard([&] {
    entries->clear();
    std::vector<std::uint32_t> pids;
    for (const DomainEntry& domain : Domains()) {
      for (const MemberEntry& member : Broker().Members(domain.domain)) {
        if (member.pid) pids.push_back(member.pid);  // 0: of another PID namespace
      }
    }
    // A process can be in two domains.
    std::sort(pids.begin(), pids.end());
    pids.erase(std::unique(pids.begin(), pids.end()), pids.end());
    for (const std::uint32_t pid : pids) entries->emplace_back(std::to_string(pid), MemberNode(pid, kDirectory));
    return 0;
  });
}

// --- reading ---------------------------------------------------------------------------------------------------------

int Tree::Read(Node node, std::uint32_t asker, std::string* text) {
  text->clear();
  if (IsMembers(node)) {
    return Guard([&] {
      text->clear();
      return ReadMember(PidOf(node), WhichOf(node), asker, text);
    });
  }
  if (node < kFirstFile || node >= kRoot + Count()) return EISDIR;
  return Guard([&] { return ReadKsm(kEntries[node - kRoot].name, text); });
}

// What all domains agree on; else what those to come begin with.
std::int64_t Tree::TunableOf(const std::vector<DomainEntry>& domains, std::uint32_t tunable) {
  const auto differs = [&](const DomainEntry& d) { return d.tunables[tunable] != domains[0].tunables[tunable]; };
  if (!domains.empty() && std::none_of(domains.begin(), domains.end(), differs)) return domains[0].tunables[tunable];
  return Broker().Defaults().tunables[tunable];
}

// A member that leaves takes its counts with it.
std::int64_t Tree::Rise(Rising* rising, std::int64_t now) {
  rising->shown += std::max<std::int64_t>(now - rising->last, 0);
  rising->last = now;
  return rising->shown;
}

// A scan of the whole is one in which every member has scanned once: what tools wait for when they want all of it to have been seen. Who has
// nothing to scan, or does not scan, or does not answer, is not waited for.
std::int64_t Tree::FullScans(const std::vector<DomainEntry>& domains) {
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  std::map<std::pair<std::uint32_t, std::uint32_t>, Scans> now;
  for (const DomainEntry& domain : domains) {
    for (const MemberEntry& member : Broker().Members(domain.domain)) {
      const std::int64_t scans = CounterOf(member, "full_scans");
      const auto known = scans_.find({domain.domain, member.member});
      Scans s = known == scans_.end() ? Scans{} : known->second;
      // Another process in its place has scanned less.
      if (!s.seen || scans < s.base) s = {s.seen ? 0 : scans, true};
      now[{domain.domain, member.member}] = s;
      if (CounterOf(member, "regions") == 0 || member.tunables[engine::kTunable_run] != 1 || member.unanswered_ms >= 1000) continue;
      least = std::min(least, scans - s.base);
    }
  }
  if (least == std::numeric_limits<std::int64_t>::max()) least = 0;
  for (auto& [key, s] : now) s.base += least;
  scans_ = std::move(now);
  return kept_->full_scans += least;
}

int Tree::ReadKsm(std::string_view name, std::string* text) {
  const std::vector<DomainEntry> domains = Domains();
  const auto sum = [&](std::string_view counter) {
    std::int64_t total = 0;
    for (const DomainEntry& domain : domains) total += BoundedPages(CounterOf(domain, counter));
    return total;
  };
  std::int64_t frames = 0;
  for (const DomainEntry& domain : domains) frames += static_cast<std::int64_t>(domain.frames);
  // Frames are of now, reports of members up to two seconds old.
  const std::int64_t sharing = std::max<std::int64_t>(sum("pages_merged") - frames, 0);
  if (name == "max_kernel_pages") {
    *text = Line(static_cast<std::int64_t>(Broker().Defaults().most_frames));
  } else if (name == "stable_node_chains_prune_millisecs") {
    *text = Line(kept_->prune_ms);
  } else if (name == "advisor_mode") {
    *text = TunableOf(domains, engine::kTunable_advisor_mode) ? "none [scan-time]\n" : "[none] scan-time\n";
  } else if (const std::size_t tunable = engine::FindTunableNumber(name); tunable < engine::kTunableCount) {
    *text = Line(TunableOf(domains, static_cast<std::uint32_t>(tunable)));
  } else if (name == "pages_shared") {
    *text = Line(frames);
  } else if (name == "pages_sharing") {
    *text = Line(sharing);
  } else if (name == "full_scans") {
    *text = Line(FullScans(domains));
  } else if (name == "pages_scanned" || name == "pages_skipped") {
    *text = Line(Rise(name == "pages_scanned" ? &kept_->scanned : &kept_->skipped, sum(name)));
  } else if (name == "general_profit") {
    std::int64_t profit = 0;
    for (const DomainEntry& domain : domains) {
      if (__builtin_add_overflow(profit, BalanceOf(domain, Broker().page_bytes()).net, &profit)) profit = std::numeric_limits<std::int64_t>::max();
    }
    *text = Line(profit);
  } else {
    *text = Line(sum(name));
  }
  return 0;
}

int Tree::ReadMember(std::uint32_t pid, std::uint32_t file, std::uint32_t asker, std::string* text) {
  if (file == kDirectory) return EISDIR;
  const Member member = FindMember(pid);
  if (asker != 0 && asker != uid_ && asker != member.entry.uid) return EACCES;
  const auto counter = [&](std::string_view name) { return CounterOf(member.entry, name); };
  const auto line = [&](std::string_view name, std::int64_t value) { *text += std::string(name) + " " + std::to_string(value) + "\n"; };
  if (file == kStat) {
    // As /proc/PID/ksm_stat. A process's profit counts all that it maps merged, whoever made the frames: as the kernel reckons it.
    const auto profit = BoundedPages(counter("pages_merged") + counter("ksm_zero_pages")) * static_cast<std::int64_t>(Broker().page_bytes()) - CostOf(member.entry);
    line("ksm_rmap_items", counter("pages_tracked"));
    line("ksm_zero_pages", counter("ksm_zero_pages"));
    line("ksm_merging_pages", counter("pages_merged"));
    line("ksm_process_profit", profit);
    *text += "ksm_merge_any: no\n";
    *text += counter("regions") ? "ksm_mergeable: yes\n" : "ksm_mergeable: no\n";
  } else if (file == kUnmerged) {
    for (const ReasonText& reason : kReasonTexts) line(reason.name, counter("unmerged_" + std::string(reason.name)));
  } else {
    for (const broker::wire::RegionEntry& r : Broker().Explain(member.domain, pid, kMostRegions, asker == 0 ? kRootsPatienceMs : kPatienceMs)) {
      char range[48];
      std::snprintf(range, sizeof range, "%llx-%llx", static_cast<unsigned long long>(r.start), static_cast<unsigned long long>(r.end));
      *text += range;
      const auto word = [&](std::string_view name, std::uint64_t value) { *text += " " + std::string(name) + " " + std::to_string(value); };
      word("merged", r.merged), word("zero", r.zero), word("unshared", r.still), word("volatile", r.changing);
      for (std::size_t i = 0; i < std::size(kReasonTexts); ++i) {
        if (r.unmerged[i + 1]) word(kReasonTexts[i].name, r.unmerged[i + 1]);
      }
      if (r.excluded_bytes) word("excluded", r.excluded_bytes / Broker().page_bytes());
      *text += "\n";
    }
  }
  return 0;
}

// --- writing ---------------------------------------------------------------------------------------------------------

int Tree::Write(Node node, std::string_view text) {
  if (IsMembers(node) || node < kFirstFile || node >= kRoot + Count()) return EACCES;
  const Entry& entry = kEntries[node - kRoot];
  if (!(entry.mode & 0200)) return EACCES;
  if (text.size() >= kFileBytes) return EINVAL;
  text = text.substr(0, text.find('\0'));
  return Guard([&] { return WriteKsm(entry.name, text); });
}

int Tree::WriteKsm(std::string_view name, std::string_view text) {
  constexpr std::int64_t kUint = std::numeric_limits<std::uint32_t>::max(), kMost = std::int64_t{1} << 40;
  std::int64_t value = 0;
  if (name == "stable_node_chains_prune_millisecs") {
    if (!ParseUnsigned(text, kUint, &value)) return EINVAL;
    kept_->prune_ms = value;
    return 0;
  }
  if (name == "max_kernel_pages") {
    if (!ParseUnsigned(text, kMost, &value)) return EINVAL;
    Broker().SetLimit(static_cast<std::uint64_t>(value));
    return 0;
  }
  const auto tunable = static_cast<std::uint32_t>(engine::FindTunableNumber(name));
  if (name == "advisor_mode") {
    // sysfs_streq.
    const std::string_view word = text.ends_with('\n') ? text.substr(0, text.size() - 1) : text;
    if (word != "none" && word != "scan-time") return EINVAL;
    value = word == "scan-time";
  } else if (name == "use_zero_pages" || name == "smart_scan") {
    if (!ParseBool(text, &value)) return EINVAL;
  } else if (!ParseUnsigned(text, name == "run" || name == "pages_to_scan" || name == "sleep_millisecs" ? kUint : kMost, &value)) {
    return EINVAL;
  }
  std::uint32_t domain = broker::control::kNoDomain;
  if (options_.user >= 0 || !options_.domain.empty()) {
    const auto domains = Domains();
    if (domains.empty()) return ENODEV;
    domain = domains[0].domain;
  }
  const broker::control::SetEntry done = Broker().Set(domain, 0, tunable, value);
  // Members that are silent are told as soon as they answer.
  for (std::uint32_t i = 0; i < done.named; ++i) {
    if (done.failures[i].error != ETIMEDOUT) return static_cast<int>(done.failures[i].error);
  }
  return tunable == engine::kTunable_run && value == 2 && done.done ? EINPROGRESS : 0;
}

int Tree::Unmerging() {
  return Guard([&] {
    int error = 0;
    for (const DomainEntry& domain : Domains()) {
      const int one = Broker().Unmerging(domain.domain);
      if (one == EINPROGRESS) return one;
      if (one) error = one;
    }
    return error;
  });
}

}  // namespace ksmu::tools
