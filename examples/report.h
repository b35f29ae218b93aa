// What both examples show: the live line while the library works, and its count beside the kernel's.
#ifndef KSMU_EXAMPLES_REPORT_H_
#define KSMU_EXAMPLES_REPORT_H_

#include <ksmu/ksmu.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "accounting.h"
#include "pages.h"

namespace examples {

// Exit statuses of both examples.
enum ExitStatus {
  kExitOk = 0,
  kExitWrongBytes = 1,
  kExitUsage = 2,
  kExitCannotStart = 3,
  kExitFailed = 4,
};
inline constexpr char kExitStatuses[] =
    "exit status: 0 every byte was right and something was merged; 1 wrong bytes; 2 usage;\n"
    "3 the library cannot start; 4 nothing was merged, or a call failed.";

// A call of the library that has to succeed did not. Caught in main.
struct LibraryError : std::runtime_error {
  explicit LibraryError(const std::string& call) : std::runtime_error(call + ": " + ksmu_last_error()) {}
};

// Starts the library and sets its CPU limit; says on stdout what it is and what was set, or on stderr why it cannot.
bool StartLibrary(uint64_t cpu_limit_percent);

void Advise(void* start, size_t bytes, int advice);
ksmu_stats ReadStats();
uint64_t SavedPages(const ksmu_stats& stats);

// What the library says of one page, in a few words.
std::string Explain(const void* page);

std::string Grouped(uint64_t number);  // 1,234,567
double Mebibytes(double bytes);

// Rewritten in place on a terminal, one line a second otherwise.
class LiveLine {
 public:
  explicit LiveLine(const Attainable& attainable);
  double seconds() const { return NowSeconds() - start_; }
  void Show(const ksmu_stats& stats);
  void End();
  double interval_seconds() const { return terminal_ ? 0.5 : 1.0; }

 private:
  Attainable attainable_;
  double start_ = NowSeconds();
  bool terminal_;
};

// How the savings grew.
struct Progress {
  double seconds = 0;
  double seconds_to_90_percent = -1;  // of what can be saved; -1: never
  double seconds_to_last_growth = 0;
};

// Shows the live line for at most max_seconds: until finished() says so or, if it is empty, savings have stopped
// growing.
Progress Watch(LiveLine* line, const Attainable& attainable, double max_seconds, const std::function<bool()>& finished);

// The kernel's accounts before and after, beside the library's count.
struct Savings {
  KernelAccount before, after;
  ksmu_stats stats = {};
  double pss_saved() const { return static_cast<double>(before.pss_bytes) - static_cast<double>(after.pss_bytes); }
  double others_grown() const {
    return static_cast<double>(after.others_bytes) - static_cast<double>(before.others_bytes);
  }
  // What other processes took or gave back meanwhile is neither gain nor loss of the library's.
  double available_gained() const {
    return static_cast<double>(after.available_bytes) - static_cast<double>(before.available_bytes) + others_grown();
  }
  // Pss sees the library's memory as it sees any other, but not the kernel's for mappings; MemAvailable sees both.
  double pss_claimed() const;
  double available_claimed() const;
  bool pss_agrees() const;
  bool available_agrees() const;
};

// Waits until the scanner has been everywhere again: what was written is booked then. Ten seconds at most.
void WaitForPasses();

// Stops the scanner meanwhile, so that the library's count and the kernel's are of the same moment.
Savings TakeSavings(const KernelAccount& before);

void PrintSavings(const Savings& savings, const Attainable& attainable);

// Pages that are not merged, by reason; only the reasons that there are.
void PrintReasons(const ksmu_stats& stats);

}  // namespace examples

#endif  // KSMU_EXAMPLES_REPORT_H_
