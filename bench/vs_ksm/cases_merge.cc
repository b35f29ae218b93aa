// What merging costs, how that grows with size, and what it saves.

#include <ksmu/ksmu.h>

#include <algorithm>
#include <fstream>
#include <stdexcept>
#include <string>

#include "accounting.h"
#include "cases.h"
#include "pages.h"
#include "report.h"

namespace bench {

uint64_t PagesOf(uint64_t mib) { return (mib << 20) / examples::PageSize(); }

examples::HeapOptions MergeHeap(const Options& options, uint64_t size_mib, uint64_t run_length, uint64_t zero,
                                uint64_t duplicate) {
  examples::HeapOptions heap;
  heap.guests = 1;
  heap.size_mib = size_mib;
  heap.zero = zero;
  heap.duplicate = duplicate;
  heap.contents = std::max<uint64_t>(PagesOf(size_mib) * duplicate / 100 / options.copies, run_length);
  heap.run_length = run_length;
  heap.scattered = true;
  heap.seed = options.seed;
  return heap;
}

namespace {

enum class How { kScan, kMergeNow };

void SetMaxMaps(uint64_t maps) {
  if (ksmu_set("max_maps", static_cast<int64_t>(maps)) != 0) throw examples::LibraryError("ksmu_set max_maps");
}

// Merges a fresh heap once and reports what that cost. max_maps: 0 as it comes.
void MeasureMerge(const examples::HeapOptions& heap_options, Side side, int flags, How how, uint64_t max_maps,
                  Metrics* metrics) {
  const auto subject = MakeSubject(side, PagesOf(heap_options.size_mib), flags);
  subject->Start();
  if (max_maps != 0) SetMaxMaps(max_maps);
  BenchHeap heap(heap_options, subject.get());
  heap.Fill();
  const uint64_t cpu = subject->CpuNs(), begun = NowNs();
  heap.Advise();
  Converged converged;
  if (how == How::kMergeNow) {
    converged = MergeNow(subject.get(), heap);
  } else {
    subject->SetPace(Pace::kFlatOut);
    converged = Converge(subject.get(), heap, begun, cpu, kLongestConvergence);
  }
  subject->ReportCounters(metrics);
  subject->SetPace(Pace::kOff);
  converged.Report(heap, metrics);
  if (side == Side::kLibrary) {
    (*metrics)["metadata_per_page"] = (*metrics)["metadata_bytes"] / (*metrics)["pages_tracked"];
  }
  heap.Check(metrics);
}

// Since Linux 6.7 the kernel keeps up to an eighth of memory in per-CPU lists of freed pages, which do not count as
// available, and gives 8 MiB a second of them back. Each reading of stat_refresh does as much as a second. Until they
// hold no more that could be told from what other processes do.
void DrainPerCpuLists() {
  constexpr uint64_t kNoticeable = 2 << 20;
  int quiet = 0;
  for (int i = 0; i < 1000 && quiet < 5; ++i) {
    const uint64_t before = examples::MemAvailable();
    std::ifstream refresh("/proc/sys/vm/stat_refresh");
    std::string nothing;
    std::getline(refresh, nothing);
    quiet = examples::MemAvailable() > before + kNoticeable ? 0 : quiet + 1;
  }
}

examples::KernelAccount ReadAccount() {
  DrainPerCpuLists();
  return examples::ReadKernelAccount();
}

void MeasureSaved(const examples::HeapOptions& heap_options, Side side, Metrics* metrics) {
  const auto subject = MakeSubject(side, PagesOf(heap_options.size_mib), KSMU_F_NO_RAW_DISCARDS);
  subject->Start();
  if (side == Side::kLibrary && ksmu_set("thp_min_duplicates", 1) != 0) throw examples::LibraryError("ksmu_set");
  BenchHeap heap(heap_options, subject.get());
  heap.Fill();
  const examples::KernelAccount before = ReadAccount();
  const uint64_t cpu = subject->CpuNs(), begun = NowNs();
  heap.Advise();
  subject->SetPace(Pace::kFlatOut);
  const Converged converged = Converge(subject.get(), heap, begun, cpu, kLongestConvergence, 1.0);
  subject->SetPace(Pace::kOff);
  const examples::KernelAccount after = ReadAccount();
  subject->ReportCounters(metrics);
  converged.Report(heap, metrics);
  // What other processes took or gave back meanwhile is nobody's gain.
  const double gained = static_cast<double>(after.available_bytes) - static_cast<double>(before.available_bytes) +
                        static_cast<double>(after.others_bytes) - static_cast<double>(before.others_bytes);
  (*metrics)["saved_mib"] = gained / (1 << 20);
  (*metrics)["attainable_mib"] = static_cast<double>(heap.attainable() * examples::PageSize()) / (1 << 20);
  heap.Check(metrics);
}

}  // namespace

void AddMergeCases(const Options& options, std::vector<Case>* cases) {
  const struct {
    const char* name;
    int flags;
    How how;
  } variants[] = {{"promise-scan", KSMU_F_NO_RAW_DISCARDS, How::kScan},
                  {"promise-merge", KSMU_F_NO_RAW_DISCARDS, How::kMergeNow},
                  {"exact-scan", 0, How::kScan},
                  {"exact-merge", 0, How::kMergeNow}};
  for (const uint64_t run : {64, 8, 3, 1}) {
    const std::string row = "cpu_" + std::to_string(run);
    const examples::HeapOptions heap = MergeHeap(options, options.size_mib, run);
    // Short runs take more mappings than the kernel's default limit allows: the cost is that of merging everything.
    cases->push_back({row, row + "/ksm", Side::kKsm,
                      [=](Metrics* m) { MeasureMerge(heap, Side::kKsm, 0, How::kScan, 0, m); }, kLargeMapLimit});
    for (const auto& v : variants) {
      cases->push_back({row, row + "/" + v.name, Side::kLibrary,
                        [=](Metrics* m) { MeasureMerge(heap, Side::kLibrary, v.flags, v.how, 0, m); }, kLargeMapLimit});
    }
  }
  for (const uint64_t run : {64, 8}) {
    const std::string row = "saved_" + std::to_string(run);
    const examples::HeapOptions heap = MergeHeap(options, options.size_mib, run, 25, 50);
    for (const Side side : {Side::kKsm, Side::kLibrary}) {
      cases->push_back({row, row + (side == Side::kKsm ? "/ksm" : "/library"), side,
                        [=](Metrics* m) { MeasureSaved(heap, side, m); }, 0,
                        options.short_form ? uint64_t{1} : uint64_t{0}});
    }
  }
  // As much as three fifths of what is free: copies, metadata and page cache want room too.
  const uint64_t room_mib = (examples::MemAvailable() >> 20) * 3 / 5;
  for (const uint64_t run : {8, 1}) {
    for (uint64_t mib = options.short_form ? 128 : 256; mib <= std::min(options.growth_max_mib, room_mib); mib *= 2) {
      if (!options.short_form && mib == 2048) continue;
      if (options.short_form && mib > 256) break;
      const std::string prefix = "growth/run" + std::to_string(run) + "/" + std::to_string(mib) + "/";
      const examples::HeapOptions heap = MergeHeap(options, mib, run);
      const auto add = [&](const std::string& variant, Side side, uint64_t max_maps, uint64_t map_limit) {
        cases->push_back(
            {"growth", prefix + variant, side,
             [=](Metrics* m) { MeasureMerge(heap, side, KSMU_F_NO_RAW_DISCARDS, How::kScan, max_maps, m); }, map_limit,
             options.short_form ? uint64_t{1} : uint64_t{0}});
      };
      add("ksm", Side::kKsm, 0, 0);
      add("maps65530", Side::kLibrary, kDefaultMapLimit - kDefaultMapLimit / 4, 0);
      add("maps1048576", Side::kLibrary, 0, kLargeMapLimit);
    }
  }
}

std::vector<Case> MakeCases(const Options& options) {
  std::vector<Case> cases;
  AddMergeCases(options, &cases);
  AddStillCases(options, &cases);
  AddLatencyCases(options, &cases);
  return cases;
}

}  // namespace bench
