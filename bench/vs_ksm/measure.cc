#include "measure.h"

#include <dirent.h>
#include <time.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>

#include "pages.h"

namespace bench {
namespace {

uint64_t ClockNs(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

uint64_t SchedstatNs(const std::string& path) {
  std::ifstream file(path);
  uint64_t running;
  return file >> running ? running : 0;
}

}  // namespace

uint64_t NowNs() { return ClockNs(CLOCK_MONOTONIC); }
uint64_t OwnThreadCpuNs() { return ClockNs(CLOCK_THREAD_CPUTIME_ID); }

uint64_t ThreadCpuNs(pid_t thread) { return SchedstatNs("/proc/" + std::to_string(thread) + "/schedstat"); }

uint64_t LibraryCpuNs() {
  uint64_t sum = 0;
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return 0;
  while (const dirent* entry = readdir(tasks)) {
    if (entry->d_name[0] == '.') continue;
    const std::string task = std::string("/proc/self/task/") + entry->d_name;
    std::ifstream file(task + "/comm");
    std::string name;
    if (std::getline(file, name) && name.compare(0, 5, "ksmu-") == 0) sum += SchedstatNs(task + "/schedstat");
  }
  closedir(tasks);
  return sum;
}

uint64_t AnonHugeBytes() {
  std::ifstream file("/proc/self/smaps_rollup");
  constexpr char kKey[] = "AnonHugePages:";
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, strlen(kKey), kKey) == 0) return strtoull(line.c_str() + strlen(kKey), nullptr, 10) * 1024;
  }
  return 0;
}

// The lower end of the class in which the smallest value lies that at least the share q of all do not exceed.
double Latencies::Quantile(double q) const {
  const auto rank = static_cast<uint64_t>(std::ceil(q * static_cast<double>(count_)));
  uint64_t below = 0;
  size_t i = 0;
  while (i + 1 < classes_.size() && (below += classes_[i]) < rank) ++i;
  const size_t octave = i >> kBits, mantissa = i & ((1u << kBits) - 1);
  if (octave == 0) return static_cast<double>(mantissa);
  return std::ldexp(static_cast<double>((1u << kBits) + mantissa), static_cast<int>(octave) - 1);
}

void Latencies::Report(const std::string& prefix, Metrics* metrics) const {
  (*metrics)[prefix + "_count"] = static_cast<double>(count_);
  if (count_ == 0) return;
  (*metrics)[prefix + "_mean_ns"] = static_cast<double>(sum_) / static_cast<double>(count_);
  (*metrics)[prefix + "_p50_ns"] = Quantile(0.5);
  (*metrics)[prefix + "_p99_ns"] = Quantile(0.99);
  (*metrics)[prefix + "_p999_ns"] = Quantile(0.999);
  (*metrics)[prefix + "_max_ns"] = static_cast<double>(max_);
}

BusyThreads::BusyThreads(unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    threads_.emplace_back([this] {
      while (!stop_.load(std::memory_order_relaxed)) {
      }
    });
  }
}

BusyThreads::~BusyThreads() {
  stop_ = true;
  for (std::thread& thread : threads_) thread.join();
}

Scribbler::Scribbler(unsigned char* memory, size_t bytes)
    : memory_(memory), page_size_(examples::PageSize()), before_(bytes / page_size_), last_(bytes / page_size_) {
  for (size_t page = 0; page < before_.size(); ++page) {
    memcpy(&before_[page], memory_ + page * page_size_ + kOffset, sizeof before_[page]);
  }
}

uint64_t Scribbler::CheckAndTakeBack() {
  uint64_t wrong = 0;
  for (size_t page = 0; page < last_.size(); ++page) {
    if (last_[page] == 0) continue;
    unsigned char* at = memory_ + page * page_size_ + kOffset;
    wrong += memcmp(at, &last_[page], sizeof last_[page]) != 0;
    memcpy(at, &before_[page], sizeof before_[page]);
    last_[page] = 0;
  }
  return wrong;
}

}  // namespace bench
