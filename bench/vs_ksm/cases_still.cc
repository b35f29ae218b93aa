// What it costs to watch memory that is not written, and how long a fresh heap takes at default settings.

#include <ksmu/ksmu.h>
#include <unistd.h>

#include <stdexcept>

#include "cases.h"
#include "report.h"

namespace bench {
namespace {

void Sleep(double seconds) { usleep(static_cast<useconds_t>(seconds * 1e6)); }

// CPU time of a full scan over a heap in which there is nothing left to do.
void MeasurePass(const Options& options, Side side, Metrics* metrics) {
  const auto subject = MakeSubject(side, PagesOf(options.size_mib), KSMU_F_NO_RAW_DISCARDS);
  subject->Start();
  BenchHeap heap(MergeHeap(options, options.size_mib, 64), subject.get());
  heap.Fill();
  heap.Advise();
  subject->SetPace(Pace::kFlatOut);
  const Converged converged = Converge(subject.get(), heap, NowNs(), subject->CpuNs(), kLongestConvergence);
  const auto next_scan = [&subject](uint64_t scans, double max_seconds) {
    const uint64_t deadline = NowNs() + static_cast<uint64_t>(max_seconds * 1e9);
    while (subject->FullScans() < scans && NowNs() < deadline) usleep(1000);
    return subject->FullScans();
  };
  double scans = 0, cpu_ms = 0;
  if (side == Side::kKsm) {
    // Its smart scan leaves pages out for up to eight scans: the mean of two such rounds, after one has gone by.
    constexpr uint64_t kRound = 8;
    const uint64_t from = next_scan(subject->FullScans() + kRound, 120);
    const uint64_t cpu = subject->CpuNs();
    const uint64_t to = next_scan(from + 2 * kRound, 120);
    scans = static_cast<double>(to - from);
    cpu_ms = static_cast<double>(subject->CpuNs() - cpu) * 1e-6;
  } else {
    // Nobody asks anything of the library meanwhile: its answers take CPU time too.
    // Back-off and pacing come to rest over some passes.
    constexpr uint64_t kRest = 32;
    const uint64_t rested = subject->FullScans() + kRest, deadline = NowNs() + 10'000'000'000;
    while (subject->FullScans() < rested && NowNs() < deadline) Sleep(0.1);
    const uint64_t from = subject->FullScans(), cpu = subject->CpuNs();
    Sleep(options.short_form ? 1 : 4);
    cpu_ms = static_cast<double>(subject->CpuNs() - cpu) * 1e-6;
    scans = static_cast<double>(subject->FullScans() - from);
  }
  subject->ReportCounters(metrics);
  subject->SetPace(Pace::kOff);
  converged.Report(heap, metrics);
  (*metrics)["passes"] = scans;
  if (scans != 0) (*metrics)["pass_cpu_ms"] = cpu_ms / scans;
  heap.Check(metrics);
}

void MeasureIdle(const Options& options, Side side, Metrics* metrics) {
  const auto subject = MakeSubject(side, PagesOf(options.size_mib), 0);
  subject->Start();
  BenchHeap heap(MergeHeap(options, options.size_mib, 64), subject.get());
  heap.Fill();
  heap.Advise();
  // At its defaults KSM would take minutes to come to rest.
  subject->SetPace(side == Side::kKsm ? Pace::kFlatOut : Pace::kDefault);
  const Converged converged = Converge(subject.get(), heap, NowNs(), subject->CpuNs(), kLongestConvergence);
  subject->SetPace(Pace::kDefault);
  Sleep(options.short_form ? 2 : 5);
  const uint64_t cpu = subject->CpuNs(), begun = NowNs();
  Sleep(static_cast<double>(options.idle_seconds));
  const double used = static_cast<double>(subject->CpuNs() - cpu);
  (*metrics)["idle_percent"] = 100 * used / static_cast<double>(NowNs() - begun);
  subject->SetPace(Pace::kOff);
  converged.Report(heap, metrics);
  heap.Check(metrics);
}

void MeasureConverge(const Options& options, Side side, int flags, Metrics* metrics) {
  const auto subject = MakeSubject(side, PagesOf(options.size_mib), flags);
  subject->Start();
  BenchHeap heap(MergeHeap(options, options.size_mib, 64), subject.get());
  heap.Fill();
  subject->SetPace(Pace::kDefault);
  const uint64_t cpu = subject->CpuNs(), begun = NowNs();
  heap.Advise();
  const auto patience = static_cast<double>(options.ksm_wait_seconds);
  const Converged converged = Converge(subject.get(), heap, begun, cpu, patience, 0.9);
  subject->ReportCounters(metrics);
  subject->SetPace(Pace::kOff);
  converged.Report(heap, metrics);
  // Not seen in the time allowed: the figure is that time, and the table says "more than".
  (*metrics)["more_than"] = converged.seconds_to_90 < 0;
  if (converged.seconds_to_90 < 0) (*metrics)["seconds_to_90"] = patience;
  heap.Check(metrics);
}

// A heap without any duplicates, in huge pages: how many of them are left after a while.
void MeasureHuge(const Options& options, Side side, Metrics* metrics) {
  const auto subject = MakeSubject(side, PagesOf(options.size_mib), 0);
  subject->Start();
  examples::HeapOptions heap_options = MergeHeap(options, options.size_mib, 64, 0, 0);
  heap_options.huge = true;
  BenchHeap heap(heap_options, subject.get());
  heap.Fill();
  const double before = static_cast<double>(AnonHugeBytes());
  heap.Advise();
  // KSM as the table has it, the library as it comes.
  subject->SetPace(side == Side::kKsm ? Pace::kFlatOut : Pace::kDefault);
  Sleep(static_cast<double>(options.thp_seconds));
  const double after = static_cast<double>(AnonHugeBytes());
  subject->ReportCounters(metrics);
  subject->SetPace(Pace::kOff);
  (*metrics)["huge_before_mib"] = before / (1 << 20);
  (*metrics)["huge_after_mib"] = after / (1 << 20);
  if (before != 0) (*metrics)["huge_kept"] = after / before;
  heap.Check(metrics);
}

}  // namespace

void AddStillCases(const Options& o, std::vector<Case>* cases) {
  const auto both = [&](const std::string& row, uint64_t repetitions, auto measure) {
    for (const Side side : {Side::kKsm, Side::kLibrary}) {
      cases->push_back({row, row + (side == Side::kKsm ? "/ksm" : "/library"), side,
                        [=](Metrics* m) { measure(o, side, m); }, 0, repetitions});
    }
  };
  both("pass", 0, MeasurePass);
  both("idle", o.short_form ? 1 : 0, MeasureIdle);
  const auto converge = [&](const char* variant, Side side, int flags) {
    cases->push_back({"converge", std::string("converge/") + variant, side,
                      [=](Metrics* m) { MeasureConverge(o, side, flags, m); }, 0,
                      o.short_form ? uint64_t{1} : uint64_t{0}});
  };
  converge("ksm", Side::kKsm, 0);
  converge("promise", Side::kLibrary, KSMU_F_NO_RAW_DISCARDS);
  converge("exact", Side::kLibrary, 0);
  both("thp", o.long_repetitions, MeasureHuge);
}

}  // namespace bench
