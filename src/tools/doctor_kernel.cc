// ksmuctl doctor: the kernel, its configuration, its limits, its KSM.
#include <dirent.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <sstream>

#include "os/pool_file.h"
#include "os/text.h"
#include "tools/doctor.h"
#include "tools/output.h"

extern char** environ;

namespace ksmu::tools {
namespace {

constexpr int kGetMemoryMerge = 68;  // PR_GET_MEMORY_MERGE, 6.4
// The kernel's own default; below it an administrator has lowered it.
constexpr std::uint64_t kDefaultMaps = 65'530;
// What Debian 13, Ubuntu 24.04 and Fedora set.
constexpr std::uint64_t kGoodMaps = 1'048'576;
constexpr std::size_t kMostNamed = 5;  // processes

std::string HowToGetKernel(const Tree& tree) {
  const std::string system = tree.Field("/etc/os-release", "ID") + "-" + tree.Field("/etc/os-release", "VERSION_ID");
  if (system == "debian-12") {
    return "as root, with bookworm-backports among the sources: apt-get install -t bookworm-backports "
           "linux-image-$(dpkg --print-architecture) && reboot";
  }
  if (system == "ubuntu-22.04") return "as root: apt-get install linux-generic-hwe-22.04 && reboot";
  return "boot Linux 6.8 or newer";
}

std::string Unpacked(const std::string& path) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return "";
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  const char* const arguments[] = {"gzip", "-dcq", "--", path.c_str(), nullptr};
  pid_t child;
  const int error = posix_spawnp(&child, "gzip", &actions, nullptr, const_cast<char**>(arguments), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  std::string text;
  char buffer[65536];
  for (ssize_t n; !error && (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<std::size_t>(n));
  close(ends[0]);
  int status = 0;
  if (!error) waitpid(child, &status, 0);
  return error || status ? "" : text;
}

// "y", "m", or "n" where it is not set.
std::string Option(const std::string& config, const std::string& name) {
  const std::string line = "\n" + name + "=";
  const std::size_t at = config.find(line);
  return at == config.npos ? "n" : config.substr(at + line.size(), config.find('\n', at + 1) - at - line.size());
}

// Processes that use ksmu, and that KSM merges, too.
std::vector<std::string> MergedTwice(const Tree& tree) {
  std::vector<std::string> processes;
  DIR* const directory = opendir(tree.Path("/proc").c_str());
  if (!directory) return processes;
  while (const dirent* const entry = readdir(directory)) {
    const std::string pid = entry->d_name;
    if (pid.empty() || !std::all_of(pid.begin(), pid.end(), [](unsigned char c) { return std::isdigit(c); })) continue;
    const std::string stat = "/proc/" + pid + "/ksm_stat";
    const std::string items = tree.Field(stat, "ksm_rmap_items");
    if ((items.empty() || items == "0") && tree.Field(stat, "ksm_merge_any") != "yes" &&
        tree.Field(stat, "ksm_mergeable") != "yes")
      continue;
    const std::string maps = tree.Read("/proc/" + pid + "/maps").value_or("");
    if (maps.find("/libksmu") == maps.npos && maps.find(os::kPoolFileLinkPrefix) == maps.npos) continue;
    processes.push_back(pid);
  }
  closedir(directory);
  return processes;
}

std::string Named(const std::vector<std::string>& processes) {
  std::string text;
  for (std::size_t i = 0; i < std::min(processes.size(), kMostNamed); ++i) text += (i ? ", " : "") + processes[i];
  if (processes.size() > kMostNamed) text += " and " + std::to_string(processes.size() - kMostNamed) + " more";
  return text;
}

}  // namespace

void CheckKernel(const Tree& tree, Findings* findings) {
  const std::string release = tree.Release();
  std::string_view rest = release;
  std::uint64_t major_number = 0, minor_number = 0;
  if (!os::TakeDecimal(&rest, &major_number) || !os::TakePrefix(&rest, ".") || !os::TakeDecimal(&rest, &minor_number)) {
    findings->push_back({"kernel", Level::kProblem,
                         "it cannot be told which kernel this is: there is no /proc/sys/kernel/osrelease",
                         tree.is_copy() ? "copy /proc/sys/kernel/osrelease, too" : "mount -t proc proc /proc"});
    return;
  }
  if (major_number < 6 || (major_number == 6 && minor_number < 8)) {
    findings->push_back(
        {"kernel", Level::kProblem, "Linux " + release + " is too old: 6.8 is needed, for UFFDIO_MOVE", HowToGetKernel(tree)});
    return;
  }
  findings->push_back({"kernel", Level::kOk, "Linux " + release + " (6.8 is needed)", ""});
}

void CheckConfig(const Tree& tree, Findings* findings) {
  std::string path = "/boot/config-" + tree.Release();
  std::string config = tree.Read(path).value_or("");
  if (config.empty()) {
    path = "/proc/config.gz";
    if (access(tree.Path(path).c_str(), R_OK) == 0) config = Unpacked(tree.Path(path));
  }
  if (config.empty()) {
    findings->push_back({"config", Level::kWarning,
                         "neither /boot/config-" + tree.Release() +
                             " nor /proc/config.gz can be read: whether "
                             "CONFIG_USERFAULTFD and CONFIG_KSM are set is not known",
                         "grep -E 'CONFIG_(KSM|USERFAULTFD)=' /boot/config-$(uname -r), outside of the container, or as root"});
    return;
  }
  config.insert(0, "\n");
  std::string missing;
  for (const char* name : {"CONFIG_USERFAULTFD", "CONFIG_PTE_MARKER_UFFD_WP", "CONFIG_PROC_PAGE_MONITOR", "CONFIG_MEMFD_CREATE",
                           "CONFIG_CROSS_MEMORY_ATTACH"}) {
    if (Option(config, name) != "y") missing += (missing.empty() ? "" : ", ") + std::string(name);
  }
  const std::string ksm = "CONFIG_KSM=" + Option(config, "CONFIG_KSM");
  if (!missing.empty()) {
    findings->push_back({"config", Level::kProblem, path + ": the kernel is built without " + missing + "; " + ksm,
                         "boot a kernel with " + missing + ", as distributions' kernels for x86-64 and arm64 have it"});
    return;
  }
  findings->push_back(
      {"config", Level::kOk, path + ": CONFIG_USERFAULTFD=y and what it takes; " + ksm + ", which ksmu does not need", ""});
}

void CheckMaps(const Tree& tree, Findings* findings) {
  const auto most = tree.ReadNumber("/proc/sys/vm/max_map_count");
  const std::string mend =
      "as root: sysctl -w vm.max_map_count=" + std::to_string(kGoodMaps) + " (to keep it: a line in /etc/sysctl.d/ksmu.conf)";
  if (!most) {
    findings->push_back({"maps", Level::kWarning, "/proc/sys/vm/max_map_count cannot be read", "mount -t proc proc /proc"});
    return;
  }
  const std::string is = "vm.max_map_count is " + Grouped(*most);
  if (*most < kDefaultMaps) {
    findings->push_back({"maps", Level::kProblem, is + ", less than the kernel's default of " + Grouped(kDefaultMaps) +
                         ": merging takes up to two mappings a page, and stops at three quarters of that", mend});
  } else if (*most < kGoodMaps) {
    findings->push_back({"maps", Level::kWarning, is + ": enough for some " + Grouped(*most * 3 / 8) +
                         " merged pages that lie apart, or as many runs, in a process; guests of many GiB need more", mend});
  } else {
    findings->push_back({"maps", Level::kOk, is, ""});
  }
}

void CheckKsm(const Tree& tree, Findings* findings) {
  const auto run = tree.ReadNumber("/sys/kernel/mm/ksm/run");
  const bool all_of_this = !tree.is_copy() && prctl(kGetMemoryMerge, 0, 0, 0, 0) == 1;
  if (!run) {
    findings->push_back({"ksm", Level::kOk, "there is no /sys/kernel/mm/ksm (CONFIG_KSM): ksmu does not need it", ""});
    return;
  }
  const std::string state = "KSM: run " + std::to_string(*run) + ", " +
                            Grouped(tree.ReadNumber("/sys/kernel/mm/ksm/pages_shared").value_or(0)) + " pages shared, " +
                            Grouped(tree.ReadNumber("/sys/kernel/mm/ksm/pages_sharing").value_or(0)) + " sharing";
  const std::string stop =
      "as root: echo 2 > /sys/kernel/mm/ksm/run; where a service starts it: systemctl disable --now ksm ksmtuned";
  if (all_of_this) {
    findings->push_back(
        {"ksm", *run == 1 ? Level::kProblem : Level::kWarning,
         state + (*run == 1 ? "; it merges" : "; as soon as it runs, it merges") +
             " all memory of what is started from here, the same that ksmu merges (PR_SET_MEMORY_MERGE, which is inherited)",
         "MemoryKSM=no in the service's unit, or do not start it under what has set PR_SET_MEMORY_MERGE"});
    return;
  }
  if (*run != 1) {
    findings->push_back({"ksm", Level::kOk, state + ": not in the way", ""});
    return;
  }
  const auto processes = MergedTwice(tree);
  if (!processes.empty()) {
    findings->push_back(
        {"ksm", Level::kProblem, state + "; it merges the same memory as ksmu, in process " + Named(processes), stop});
  } else {
    findings->push_back({"ksm", Level::kWarning,
                         state + "; it merges beside ksmu, in no process with ksmu that can be seen from here: "
                                 "memory that is advised to both would be scanned twice",
                         stop});
  }
}

}  // namespace ksmu::tools
