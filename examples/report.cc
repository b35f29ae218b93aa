#include "report.h"

#include <sys/ioctl.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace examples {
namespace {

constexpr double kQuietSeconds = 3;  // savings that have not grown for so long, and for so many passes, are final
constexpr int64_t kQuietScans = 3;
constexpr double kPatienceSeconds = 15;  // final whatever the passes: something may keep them from ending

// Differences that are no disagreement: a share of what was saved, and what a process or a machine varies by anyway.
constexpr double kPssTolerance = 0.05, kPssNoise = 4 << 20;
constexpr double kAvailableTolerance = 0.10, kAvailableNoise = 32 << 20;

bool Near(double measured, double claimed, double tolerance, double noise) {
  return std::abs(measured - claimed) <= std::max(std::abs(claimed) * tolerance, noise);
}

void PrintAccount(const char* name, uint64_t before, uint64_t after, double saved, double claimed, bool agrees) {
  const double apart = claimed != 0 ? 100 * std::abs(saved - claimed) / std::abs(claimed) : 0;
  printf("  %-14s %8.1f %8.1f %8.1f %18.1f   %s: %.1f MiB (%.1f %%) apart\n", name,
         Mebibytes(static_cast<double>(before)), Mebibytes(static_cast<double>(after)), Mebibytes(saved),
         Mebibytes(claimed), agrees ? "agree" : "DISAGREE", Mebibytes(std::abs(saved - claimed)), apart);
}

}  // namespace

bool StartLibrary(uint64_t cpu_limit_percent) {
  if (ksmu_start(nullptr, sizeof(ksmu_options)) != 0) {
    fprintf(stderr, "ksmu cannot start: %s (%s)\n", ksmu_last_error(), strerrorname_np(errno));
    return false;
  }
  int64_t before = 0;
  if (ksmu_get("cpu_limit_percent", &before) != 0) throw LibraryError("ksmu_get(cpu_limit_percent)");
  if (ksmu_set("cpu_limit_percent", static_cast<int64_t>(cpu_limit_percent)) != 0) {
    throw LibraryError("ksmu_set(cpu_limit_percent)");
  }
  utsname system;
  uname(&system);
  printf("ksmu %s, Linux %s", ksmu_version(), system.release);
  if (before != static_cast<int64_t>(cpu_limit_percent)) {
    printf("; cpu_limit_percent is %d here instead of %d, to be quick", static_cast<int>(cpu_limit_percent),
           static_cast<int>(before));
  }
  printf("\n");
  return true;
}

void Advise(void* start, size_t bytes, int advice) {
  if (ksmu_advise(start, bytes, advice) != 0) throw LibraryError("ksmu_advise");
}

ksmu_stats ReadStats() {
  ksmu_stats stats;
  if (ksmu_read_stats(&stats, sizeof stats) != 0) throw LibraryError("ksmu_read_stats");
  return stats;
}

uint64_t SavedPages(const ksmu_stats& stats) {
  return static_cast<uint64_t>(stats.pages_sharing + stats.ksm_zero_pages);
}

std::string Explain(const void* page) {
  ksmu_page_info info;
  if (ksmu_explain(page, &info, sizeof info) != 0) return "unexplained";
  return std::string(info.state_name) + (info.reason != KSMU_REASON_NONE ? std::string(", ") + info.reason_name : "");
}

std::string Grouped(uint64_t number) {
  std::string digits = std::to_string(number);
  for (size_t at = digits.size(); at > 3;) digits.insert(at -= 3, 1, ',');
  return digits;
}

double Mebibytes(double bytes) { return bytes / (1 << 20); }

LiveLine::LiveLine(const Attainable& attainable) : attainable_(attainable), terminal_(isatty(STDOUT_FILENO)) {}

void LiveLine::Show(const ksmu_stats& stats) {
  const uint64_t saved = SavedPages(stats);
  const double percent =
      attainable_.total() != 0 ? 100 * static_cast<double>(saved) / static_cast<double>(attainable_.total()) : 0;
  const auto grouped = [](int64_t value) { return Grouped(static_cast<uint64_t>(value)); };
  char text[256];
  snprintf(text, sizeof text,
           "%5.1f s  shared %s  sharing %s  zero %s  volatile %s  maps %s  CPU %.2f s  saved %.1f MiB (%.0f %%)",
           seconds(), grouped(stats.pages_shared).c_str(), grouped(stats.pages_sharing).c_str(),
           grouped(stats.ksm_zero_pages).c_str(), grouped(stats.pages_volatile).c_str(),
           grouped(stats.maps_used).c_str(), LibraryCpuSeconds(), Mebibytes(static_cast<double>(saved * PageSize())),
           percent);
  winsize window = {};
  if (!terminal_) {
    printf("%s\n", text);
  } else if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 1) {
    printf("\r\033[K%.*s", window.ws_col - 1, text);  // a line that wraps cannot be rewritten
  } else {
    printf("\r\033[K%s", text);
  }
  fflush(stdout);
}

void LiveLine::End() {
  if (terminal_) printf("\n");
}

Progress Watch(LiveLine* line, const Attainable& attainable, double max_seconds,
               const std::function<bool()>& finished) {
  constexpr double kLookSeconds = 0.2;
  Progress progress;
  const double start = line->seconds();
  double shown = -1;
  uint64_t best = 0;
  int64_t scans_at_growth = 0;
  for (bool done = false; !done; usleep(static_cast<useconds_t>(kLookSeconds * 1e6))) {
    const ksmu_stats stats = ReadStats();
    const double now = line->seconds();
    const uint64_t saved = SavedPages(stats);
    progress.seconds = now - start;
    if (progress.seconds_to_90_percent < 0 && saved != 0 && saved * 10 >= attainable.total() * 9) {
      progress.seconds_to_90_percent = progress.seconds;
    }
    if (saved > best + best / 1000) {
      best = saved;
      scans_at_growth = stats.full_scans;
      progress.seconds_to_last_growth = progress.seconds;
    }
    const double quiet = progress.seconds - progress.seconds_to_last_growth;
    const bool final_state =
        (best != 0 && quiet >= kQuietSeconds && stats.full_scans >= scans_at_growth + kQuietScans) ||
        quiet >= kPatienceSeconds;
    done = (finished ? finished() : final_state) || progress.seconds >= max_seconds;
    if (done || now - shown >= line->interval_seconds()) {
      line->Show(done ? ReadStats() : stats);
      shown = now;
    }
  }
  line->End();
  return progress;
}

double Savings::pss_claimed() const {
  return static_cast<double>(SavedPages(stats) * PageSize()) - static_cast<double>(stats.metadata_bytes);
}
double Savings::available_claimed() const { return static_cast<double>(stats.general_profit); }
bool Savings::pss_agrees() const { return Near(pss_saved(), pss_claimed(), kPssTolerance, kPssNoise); }
bool Savings::available_agrees() const {
  return Near(available_gained(), available_claimed(), kAvailableTolerance, kAvailableNoise);
}

void WaitForPasses() {
  constexpr int64_t kPasses = 2;  // the one under way may have been there already
  constexpr double kMaxSeconds = 10;
  const double deadline = NowSeconds() + kMaxSeconds;
  const int64_t scans = ReadStats().full_scans;
  while (ReadStats().full_scans < scans + kPasses && NowSeconds() < deadline) usleep(20'000);
}

Savings TakeSavings(const KernelAccount& before) {
  Savings savings{.before = before, .after = {}};
  int64_t run = 1;
  if (ksmu_get("run", &run) != 0 || ksmu_set("run", 0) != 0) throw LibraryError("ksmu_set(run, 0)");
  savings.after = ReadKernelAccount();
  savings.stats = ReadStats();
  if (ksmu_set("run", run) != 0) throw LibraryError("ksmu_set(run)");
  return savings;
}

void PrintSavings(const Savings& savings, const Attainable& attainable) {
  const ksmu_stats& stats = savings.stats;
  const double saved = static_cast<double>(SavedPages(stats) * PageSize());
  printf("\nsaved: %s pages (%s by sharing, %s zero), %.1f MiB of %.1f MiB that can be saved\n",
         Grouped(SavedPages(stats)).c_str(), Grouped(static_cast<uint64_t>(stats.pages_sharing)).c_str(),
         Grouped(static_cast<uint64_t>(stats.ksm_zero_pages)).c_str(), Mebibytes(saved),
         Mebibytes(static_cast<double>(attainable.total() * PageSize())));
  printf("net of the library's memory (%.1f MiB) and of %s mappings (270 bytes each): %.1f MiB\n\n",
         Mebibytes(static_cast<double>(stats.metadata_bytes)), Grouped(static_cast<uint64_t>(stats.maps_used)).c_str(),
         Mebibytes(static_cast<double>(stats.general_profit)));
  printf("  %-14s %8s %8s %8s %18s\n", "the kernel's, in MiB", "before", "after", "saved", "library's count");
  if (savings.before.pss_bytes == 0) {
    printf("  Pss: /proc/self/smaps_rollup cannot be read here\n");
  } else {
    PrintAccount("Pss", savings.before.pss_bytes, savings.after.pss_bytes, savings.pss_saved(), savings.pss_claimed(),
                 savings.pss_agrees());
  }
  PrintAccount("MemAvailable", savings.before.available_bytes, savings.after.available_bytes,
               savings.available_gained(), savings.available_claimed(), savings.available_agrees());
  printf(
      "  Pss is this process's, the library's memory included; MemAvailable is the whole machine's, corrected by "
      "the\n");
  printf("  %+.1f MiB of anonymous memory by which all other processes have grown meanwhile.\n\n",
         Mebibytes(savings.others_grown()));
}

void PrintReasons(const ksmu_stats& stats) {
  std::string text;
  const auto add = [&text](const char* name, int64_t pages) {
    if (pages != 0) text += std::string(text.empty() ? "" : ", ") + name + " " + Grouped(static_cast<uint64_t>(pages));
  };
  add("unique", stats.pages_unshared);
  add("volatile", stats.pages_volatile);
#define KSMU_ADD_REASON(suffix, name) add(#name, stats.unmerged_##name);
  KSMU_FOR_EACH_REASON(KSMU_ADD_REASON)
#undef KSMU_ADD_REASON
  printf("not merged: %s pages\n", text.empty() ? "no" : text.c_str());
}

}  // namespace examples
