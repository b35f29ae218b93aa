// Times, CPU times and what a program does to its memory while they are taken.
#ifndef KSMU_BENCH_VS_KSM_MEASURE_H_
#define KSMU_BENCH_VS_KSM_MEASURE_H_

#include <sys/types.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <map>
#include <string>
#include <thread>
#include <vector>

namespace bench {

// The figures of one repetition, by name.
using Metrics = std::map<std::string, double>;

uint64_t NowNs();  // CLOCK_MONOTONIC

// CPU time in nanoseconds, by schedstat. Of a thread that runs at this moment it can be a timer tick behind.
uint64_t ThreadCpuNs(pid_t thread);  // of another process; 0: gone, or no schedstat
uint64_t LibraryCpuNs();             // of this process's threads named ksmu-*
uint64_t OwnThreadCpuNs();

uint64_t AnonHugeBytes();  // of this process

// Latencies in nanoseconds, in classes of 0.4 %: a hundred million of them take no more room than one.
class Latencies {
 public:
  void Add(uint64_t ns) {
    ++classes_[ClassOf(ns)];
    ++count_;
    sum_ += ns;
    if (ns > max_) max_ = ns;
  }
  uint64_t count() const { return count_; }
  // Sets PREFIX_{mean,p50,p99,p999,max}_ns and PREFIX_count.
  void Report(const std::string& prefix, Metrics* metrics) const;

 private:
  static constexpr int kBits = 8;  // of the mantissa
  static size_t ClassOf(uint64_t ns) {
    if (ns < (1u << kBits)) return ns;
    const int shift = 63 - std::countl_zero(ns) - kBits;
    return (static_cast<size_t>(shift + 1) << kBits) + ((ns >> shift) & ((1u << kBits) - 1));
  }
  double Quantile(double q) const;
  std::vector<uint64_t> classes_ = std::vector<uint64_t>((64 - kBits + 1) << kBits);
  uint64_t count_ = 0, sum_ = 0, max_ = 0;
};

// Threads that do nothing but use CPU time, until it goes out of scope.
class BusyThreads {
 public:
  explicit BusyThreads(unsigned count);
  ~BusyThreads();

 private:
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

// Writes of the program to pages: what was there before and what was written last is remembered, so that each write is
// looked for afterwards, and then taken back.
class Scribbler {
 public:
  Scribbler(unsigned char* memory, size_t bytes);
  void Write(size_t page) {
    const uint64_t value = ++counter_ ^ kPattern;
    *reinterpret_cast<volatile uint64_t*>(memory_ + page * page_size_ + kOffset) = value;
    last_[page] = value;
  }
  size_t pages() const { return last_.size(); }
  // Pages that did not hold what was written last; all get their old bytes back.
  uint64_t CheckAndTakeBack();

 private:
  static constexpr size_t kOffset = 1024;
  static constexpr uint64_t kPattern = 0xa5a5'0000'0000'0000;
  unsigned char* memory_;
  size_t page_size_;
  uint64_t counter_ = 0;
  std::vector<uint64_t> before_, last_;  // last_ 0: not written
};

}  // namespace bench

#endif  // KSMU_BENCH_VS_KSM_MEASURE_H_
