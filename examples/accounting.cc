#include "accounting.h"

#include <dirent.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

namespace examples {
namespace {

// The sum of the lines "key   1234 kB" of a file in /proc, in bytes.
uint64_t SumOfKeys(const char* path, std::initializer_list<const char*> keys) {
  std::ifstream file(path);
  uint64_t bytes = 0;
  for (std::string line; std::getline(file, line);) {
    for (const char* key : keys) {
      if (line.compare(0, strlen(key), key) == 0) bytes += strtoull(line.c_str() + strlen(key), nullptr, 10) * 1024;
    }
  }
  return bytes;
}

// One number from a cgroup file; "max" and a missing file are no limit.
uint64_t ReadLimit(const std::string& path) {
  std::ifstream file(path);
  uint64_t value;
  return file >> value ? value : std::numeric_limits<uint64_t>::max();
}

double ThreadCpuSeconds(const std::string& stat_path) {
  std::ifstream file(stat_path);
  std::string stat;
  if (!std::getline(file, stat)) return 0;
  // The name, in parentheses, may itself contain anything: fields are counted from the last one.
  const size_t open = stat.find('(');
  const size_t close = stat.rfind(')');
  if (open == std::string::npos || close == std::string::npos || stat.compare(open + 1, 5, "ksmu-") != 0) return 0;
  unsigned long long user = 0, system = 0;
  if (sscanf(stat.c_str() + close + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &user, &system) != 2) {
    return 0;
  }
  return static_cast<double>(user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

}  // namespace

uint64_t ProcessPss() { return SumOfKeys("/proc/self/smaps_rollup", {"Pss:", "SwapPss:"}); }

uint64_t MemAvailable() { return SumOfKeys("/proc/meminfo", {"MemAvailable:"}); }

uint64_t OtherProcessesMemory() {
  DIR* processes = opendir("/proc");
  if (processes == nullptr) return 0;
  uint64_t pages = 0;
  while (const dirent* entry = readdir(processes)) {
    if (entry->d_name[0] < '1' || entry->d_name[0] > '9' || atoi(entry->d_name) == getpid()) continue;
    std::ifstream statm(std::string("/proc/") + entry->d_name + "/statm");
    uint64_t size = 0, resident = 0, of_files = 0;
    if (statm >> size >> resident >> of_files) pages += resident - of_files;
  }
  closedir(processes);
  return pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

uint64_t AllocatableBytes() {
  uint64_t bytes = MemAvailable();
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 3, "0::") != 0) continue;
    const std::string directory = "/sys/fs/cgroup" + line.substr(3);
    const uint64_t limit = ReadLimit(directory + "/memory.max");
    const uint64_t used = ReadLimit(directory + "/memory.current");
    if (limit != std::numeric_limits<uint64_t>::max()) bytes = std::min(bytes, limit > used ? limit - used : 0);
  }
  return bytes;
}

KernelAccount ReadKernelAccount(double max_seconds) {
  const double deadline = NowSeconds() + max_seconds;
  constexpr int kNeeded = 3;  // quiet half seconds in a row: the lists are drained once a second
  int quiet = 0;
  uint64_t available = MemAvailable();
  while (quiet < kNeeded && NowSeconds() < deadline) {
    usleep(500'000);
    const uint64_t now = MemAvailable();
    quiet = std::max(now, available) - std::min(now, available) < (1u << 20) ? quiet + 1 : 0;
    available = now;
  }
  return {ProcessPss(), available, OtherProcessesMemory()};
}

double LibraryCpuSeconds() {
  double seconds = 0;
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return 0;
  while (const dirent* entry = readdir(tasks)) {
    if (entry->d_name[0] != '.') seconds += ThreadCpuSeconds(std::string("/proc/self/task/") + entry->d_name + "/stat");
  }
  closedir(tasks);
  return seconds;
}

double NowSeconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

}  // namespace examples
