#include "kernel_ksm.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

namespace examples::ksm {
namespace {

constexpr char kDirectory[] = "/sys/kernel/mm/ksm/";
constexpr char kMaxMapCount[] = "/proc/sys/vm/max_map_count";

bool WriteFile(const std::string& path, const std::string& value) {
  const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const ssize_t written = write(fd, value.data(), value.size());
  const int error = errno;
  close(fd);
  errno = error;
  return written == static_cast<ssize_t>(value.size());
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  // "[none] scan-time": what stands in brackets is what is chosen.
  const size_t open = line.find('['), close = line.find(']');
  if (open != std::string::npos && close != std::string::npos) return line.substr(open + 1, close - open - 1);
  return line;
}

bool SetAll(std::initializer_list<std::pair<const char*, std::string>> settings) {
  for (const auto& [name, value] : settings) {
    if (access((std::string(kDirectory) + name).c_str(), W_OK) != 0) continue;  // an older kernel has fewer
    if (ReadFile(std::string(kDirectory) + name) == value) continue;
    if (!Write(name, value)) {
      fprintf(stderr, "KSM: /sys/kernel/mm/ksm/%s = %s: %s\n", name, value.c_str(), strerror(errno));
      return false;
    }
  }
  return true;
}

}  // namespace

bool Available() { return access((std::string(kDirectory) + "run").c_str(), R_OK) == 0; }

int64_t Read(const char* name) {
  std::ifstream file(std::string(kDirectory) + name);
  int64_t value;
  return file >> value ? value : -1;
}

uint64_t SavedPages() {
  return static_cast<uint64_t>(std::max<int64_t>(Read("pages_sharing"), 0) + std::max<int64_t>(Read("ksm_zero_pages"), 0));
}

bool Write(const char* name, const std::string& value) { return WriteFile(std::string(kDirectory) + name, value); }

bool InUse() { return Read("run") != 0 || Read("pages_shared") != 0; }

pid_t Thread() {
  DIR* processes = opendir("/proc");
  if (processes == nullptr) return -1;
  pid_t found = -1;
  while (const dirent* entry = readdir(processes)) {
    if (entry->d_name[0] < '1' || entry->d_name[0] > '9') continue;
    std::ifstream file(std::string("/proc/") + entry->d_name + "/stat");
    std::string stat;
    // A kernel thread: the child of kthreadd, which is 2. Anybody can call himself ksmd.
    int parent = 0;
    if (!std::getline(file, stat) || stat.find("(ksmd) ") == std::string::npos) continue;
    if (sscanf(stat.c_str() + stat.rfind(')') + 1, " %*c %d", &parent) == 1 && parent == 2) found = atoi(entry->d_name);
  }
  closedir(processes);
  return found;
}

bool Claim() {
  // Open until the end; children share it, and the kernel lets go of it with the last of them.
  const int fd = open((std::string(kDirectory) + "run").c_str(), O_RDONLY | O_CLOEXEC);
  return fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0;
}

bool Reset() {
  if (!Write("run", "2")) return false;
  for (int i = 0; i < 500 && Read("pages_shared") != 0; ++i) usleep(10'000);
  return Write("run", "0") && Read("pages_shared") == 0;
}

namespace {
// What is the same in both.
bool SetPace(const std::string& sleep_millisecs, const std::string& pages) {
  return SetAll({{"advisor_mode", "none"},
                 {"max_page_sharing", "256"},
                 {"use_zero_pages", "1"},
                 {"smart_scan", "1"},
                 {"merge_across_nodes", "1"},
                 {"stable_node_chains_prune_millisecs", "2000"},
                 {"sleep_millisecs", sleep_millisecs},
                 {"pages_to_scan", pages}});
}
}  // namespace

bool SetFlatOut(uint64_t pages) { return SetPace("0", std::to_string(pages)); }

bool SetDefaults() { return SetPace("20", "100"); }

bool Settings::Save(std::string* error) {
  DIR* directory = opendir(kDirectory);
  if (directory == nullptr) return *error = std::string(kDirectory) + ": " + strerror(errno), false;
  while (const dirent* entry = readdir(directory)) {
    const std::string path = std::string(kDirectory) + entry->d_name;
    struct stat status;
    if (stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode) || !(status.st_mode & S_IWUSR)) continue;
    saved_.emplace_back(entry->d_name, ReadFile(path));
  }
  closedir(directory);
  if (saved_.empty()) *error = "nothing in /sys/kernel/mm/ksm can be set";
  return !saved_.empty();
}

bool Settings::Restore() {
  bool restored = RestoreMaxMapCount();
  if (saved_.empty()) return restored;
  // Some cannot be set while anything is shared, pages_to_scan not under the advisor, and nothing may run half set: so
  // stop first, the advisor second to last, run last.
  if (!Reset()) fprintf(stderr, "KSM: KSM could not be stopped: %s\n", strerror(errno));
  SetAll({{"advisor_mode", "none"}});
  const auto turn = [](const std::string& name) { return name == "run" ? 2 : name == "advisor_mode" ? 1 : 0; };
  std::stable_sort(saved_.begin(), saved_.end(),
                   [&turn](const auto& a, const auto& b) { return turn(a.first) < turn(b.first); });
  for (const auto& [name, value] : saved_) {
    if (ReadFile(kDirectory + name) == value || Write(name.c_str(), value)) continue;
    fprintf(stderr, "KSM: /sys/kernel/mm/ksm/%s could not be set back to %s: %s\n", name.c_str(), value.c_str(),
            strerror(errno));
    restored = false;
  }
  saved_.clear();
  return restored;
}

bool Settings::SetMaxMapCount(uint64_t value) {
  if (max_map_count_ < 0) max_map_count_ = atoll(ReadFile(kMaxMapCount).c_str());
  return WriteFile(kMaxMapCount, std::to_string(value));
}

bool Settings::RestoreMaxMapCount() {
  if (max_map_count_ < 0) return true;
  const std::string value = std::to_string(max_map_count_);
  if (ReadFile(kMaxMapCount) != value && !WriteFile(kMaxMapCount, value)) {
    fprintf(stderr, "KSM: vm.max_map_count could not be set back to %s: %s\n", value.c_str(), strerror(errno));
    return false;
  }
  max_map_count_ = -1;
  return true;
}

}  // namespace examples::ksm
