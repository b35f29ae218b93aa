// What ksmu-fs shows (docs/ksmu-fs.md): the files of /sys/kernel/mm/ksm with KSM's names, formats and rules, of all domains of a broker or
// of one, and a directory for each member. Without FUSE: nodes have numbers, are listed, read and written, and each answer is an errno.
//
// One thread. What is asked of the broker is waited for, seconds where it is stopped.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tools/operator.h"

namespace ksmu::tools {

class Tree {
 public:
  using Node = std::uint64_t;
  static constexpr Node kRoot = 1;
  static constexpr std::size_t kFileBytes = 4096;  // that a file says it has, as sysfs

  // What is shown and is not the broker's. Plain memory, which can outlive the tree.
  struct Rising {
    std::int64_t shown = 0, last = 0;  // what KSM only counts up, over members that come and go
  };
  struct Kept {
    Rising scanned, skipped;
    std::int64_t full_scans = 0;
    std::int64_t prune_ms = 2000;  // there are no chains that would have to be pruned
  };

  // `uid`: whose the files are that are no member's.
  Tree(const OperatorOptions& options, std::uint32_t uid, Kept* kept);

  struct About {
    bool directory = false;
    std::uint32_t mode = 0, uid = 0;
  };
  // 0 or an errno: ENOENT, and where the broker does not answer ENODEV or ETIMEDOUT.
  int Look(Node node, About* about);
  int Find(Node directory, std::string_view name, Node* found);
  int List(Node directory, std::vector<std::pair<std::string, Node>>* entries);
  // `asker`: the user who reads. What is a member's is for its own user and root; also for one who has opened it when the process of
  // that number was another.
  int Read(Node node, std::uint32_t asker, std::string* text);
  // As KSM's own files: EINVAL, EBUSY, EPERM, ENOMEM. EINPROGRESS: everything is being unmerged, and Unmerging says when that is done.
  int Write(Node node, std::string_view text);
  int Unmerging();

 private:
  // Those that exist whether a broker does or not. Numbers of members' nodes lie above them.
  struct Entry {
    const char* name;
    Node parent;
    std::uint32_t mode;  // 0: a directory
  };
  static const Entry kEntries[];
  struct Member {
    std::uint32_t domain = 0;
    broker::control::MemberEntry entry;
  };
  struct Scans {
    std::int64_t base = 0;
    bool seen = false;
  };

  static std::size_t Count();
  Operator& Broker();
  int Guard(const std::function<int()>& body);
  std::vector<broker::control::DomainEntry> Domains();
  std::int64_t TunableOf(const std::vector<broker::control::DomainEntry>& domains, std::uint32_t tunable);
  static std::int64_t Rise(Rising* rising, std::int64_t now);
  std::int64_t FullScans(const std::vector<broker::control::DomainEntry>& domains);
  Member FindMember(std::uint32_t pid);
  int ReadKsm(std::string_view name, std::string* text);
  int ReadMember(std::uint32_t pid, std::uint32_t file, std::uint32_t asker, std::string* text);
  int WriteKsm(std::string_view name, std::string_view text);

  OperatorOptions options_;
  std::uint32_t uid_;
  Kept* kept_;
  std::unique_ptr<Operator> broker_;
  std::map<std::pair<std::uint32_t, std::uint32_t>, Scans> scans_;  // by domain and number
};

}  // namespace ksmu::tools
