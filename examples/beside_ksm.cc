#include "beside_ksm.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "kernel_ksm.h"
#include "pages.h"

namespace examples {
namespace {

constexpr double kQuietSeconds = 3;  // savings that have not grown for so long, and for so many scans, are final
constexpr int64_t kQuietScans = 3;

double KsmdCpuSeconds(pid_t thread) {
  std::ifstream file("/proc/" + std::to_string(thread) + "/schedstat");
  uint64_t nanoseconds = 0;
  return file >> nanoseconds ? static_cast<double>(nanoseconds) * 1e-9 : 0;
}

// Holds SIGINT, SIGTERM and SIGHUP up for as long as it lives.
class SignalsHeld {
 public:
  SignalsHeld() {
    sigemptyset(&held_);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&held_, signal);
    sigprocmask(SIG_BLOCK, &held_, &before_);
  }
  ~SignalsHeld() {
    if (came_ != 0) raise(came_);
    sigprocmask(SIG_SETMASK, &before_, nullptr);
  }
  // Waits; true: one of them has come.
  bool Wait(double seconds) {
    const timespec time = {0, static_cast<long>(seconds * 1e9)};
    const int signal = sigtimedwait(&held_, nullptr, &time);
    if (signal > 0) came_ = signal;
    return came_ != 0;
  }

 private:
  sigset_t held_, before_;
  int came_ = 0;
};

}  // namespace

std::string WhyNoKsm() {
  if (!ksm::Available()) return "this kernel has no KSM";
  if (access("/sys/kernel/mm/ksm/run", W_OK) != 0) return "to set the kernel's KSM takes root";
  if (ksm::InUse()) return "KSM is in use on this machine";
  return "";
}

bool MergeByKsm(const std::vector<iovec>& areas, double max_seconds, KsmRun* run) {
  SignalsHeld signals;
  ksm::Settings settings;  // put back before the signals are let through
  std::string error;
  uint64_t pages = 0;
  for (const iovec& area : areas) pages += area.iov_len / PageSize();
  const pid_t ksmd = ksm::Thread();
  bool set = ksm::Claim() && settings.Save(&error) && ksm::Reset() && ksm::SetFlatOut(pages);
  run->before = ReadKernelAccount();
  for (const iovec& area : areas) set = set && madvise(area.iov_base, area.iov_len, MADV_MERGEABLE) == 0;
  const double start = NowSeconds(), cpu_start = KsmdCpuSeconds(ksmd);
  if (!set || !ksm::Write("run", "1")) {
    fprintf(stderr, "KSM could not be set up: %s\n", error.empty() ? strerror(errno) : error.c_str());
    return false;
  }
  int64_t scans_at_growth = 0;
  for (bool done = false; !done;) {
    if (signals.Wait(0.1)) return false;
    const double now = NowSeconds() - start;
    const uint64_t saved = ksm::SavedPages();
    const int64_t scans = ksm::Read("full_scans");
    if (saved > run->saved_pages + run->saved_pages / 1000) {
      *run = {now, KsmdCpuSeconds(ksmd) - cpu_start, saved, run->before, {}};
      scans_at_growth = scans;
    }
    const bool quiet = now - run->seconds >= kQuietSeconds && scans >= scans_at_growth + kQuietScans;
    done = (run->saved_pages != 0 && quiet) || now >= max_seconds;
  }
  ksm::Write("run", "0");
  run->saved_pages = ksm::SavedPages();
  run->after = ReadKernelAccount();
  for (const iovec& area : areas) madvise(area.iov_base, area.iov_len, MADV_UNMERGEABLE);
  return true;
}

}  // namespace examples
