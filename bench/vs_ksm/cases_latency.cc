// What the program feels: first writes to merged pages, shut gates, writing all the time, page faults elsewhere.

#include <ksmu/ksmu.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>

#include "cases.h"
#include "pages.h"
#include "report.h"

namespace bench {
namespace {

constexpr unsigned kBusyThreadsPerCpu = 4;

unsigned BusyCount() { return kBusyThreadsPerCpu * std::max(std::thread::hardware_concurrency(), 1u); }

// All of the heap merged, or an exception: what follows is about merged pages.
void MergeAll(Subject* subject, Side side, const BenchHeap& heap) {
  bool complete;
  if (side == Side::kLibrary) {
    complete = MergeNow(subject, heap).complete;
  } else {
    subject->SetPace(Pace::kFlatOut);
    complete = Converge(subject, heap, NowNs(), subject->CpuNs(), kLongestConvergence).complete;
  }
  if (!complete) throw std::runtime_error("the heap could not be merged completely");
}

// Of this thread so far: page faults, and how often it has gone to sleep by itself, as it does at a gate.
struct Usage {
  int64_t faults, sleeps;
};
Usage OwnUsage() {
  rusage usage;
  getrusage(RUSAGE_THREAD, &usage);
  return {usage.ru_minflt + usage.ru_majflt, usage.ru_nvcsw};
}

// The first write to merged pages, one after the other in address order and at isolated places.
void MeasureBreak(const Options& options, Side side, int flags, bool busy, Metrics* metrics) {
  const auto subject = MakeSubject(side, PagesOf(options.latency_mib), flags);
  subject->Start();
  BenchHeap heap(MergeHeap(options, options.latency_mib, 64, 0, 100), subject.get());
  heap.Fill();
  heap.Advise();
  MergeAll(subject.get(), side, heap);
  subject->SetPace(Pace::kDefault);  // the scanner goes on, as it would

  Scribbler scribbler(heap.memory(), heap.bytes());
  const size_t half = scribbler.pages() / 2;
  std::vector<size_t> isolated(half / 4);
  for (size_t i = 0; i < isolated.size(); ++i) isolated[i] = half + 4 * i;
  std::shuffle(isolated.begin(), isolated.end(), std::mt19937_64(options.seed));
  const size_t sequential = half / 2;
  {
    std::unique_ptr<BusyThreads> busy_threads;
    if (busy) busy_threads = std::make_unique<BusyThreads>(BusyCount());
    Latencies in_order, apart;
    const int64_t faults = OwnUsage().faults;
    for (size_t page = 0; page < sequential; ++page) {
      const uint64_t begun = NowNs();
      scribbler.Write(page);
      in_order.Add(NowNs() - begun);
    }
    for (const size_t page : isolated) {
      const uint64_t begun = NowNs();
      scribbler.Write(page);
      apart.Add(NowNs() - begun);
    }
    (*metrics)["faults"] = static_cast<double>(OwnUsage().faults - faults);
    in_order.Report("sequential", metrics);
    apart.Report("isolated", metrics);
  }
  // Were they what they are taken for? The library books breaks by the next sweep; KSM, by and by.
  const auto expected = static_cast<int64_t>(sequential + isolated.size());
  (*metrics)["breaks_expected"] = static_cast<double>(expected);
  if (side == Side::kLibrary) {
    subject->SetPace(Pace::kFlatOut);
    for (int i = 0; i < 300 && examples::ReadStats().cow_breaks < expected; ++i) usleep(10'000);
    (*metrics)["breaks_booked"] = static_cast<double>(examples::ReadStats().cow_breaks);
  }
  if ((*metrics)["faults"] < 0.98 * static_cast<double>(expected))
    throw std::runtime_error("the pages were not merged");
  subject->SetPace(Pace::kOff);
  (*metrics)["wrong_pages"] += static_cast<double>(scribbler.CheckAndTakeBack());
  heap.Check(metrics);
}

// How long a thread waits that reads a page of a run which is being merged. It reads all over a small heap, so that it
// meets almost every gate within some microseconds of its shutting.
void MeasureGate(const Options& options, int flags, bool busy, Metrics* metrics) {
  constexpr uint64_t kHeapMib = 32;
  const auto subject = MakeSubject(Side::kLibrary, PagesOf(kHeapMib), flags);
  subject->Start();
  BenchHeap heap(MergeHeap(options, kHeapMib, 64, 0, 100), subject.get());
  heap.Fill();
  std::atomic<bool> merging{false}, stop{false};
  Latencies stalls;
  std::thread prober([&] {
    std::minstd_rand random(static_cast<unsigned>(options.seed));
    const uint64_t pages = heap.pages(), page_size = examples::PageSize();
    while (!stop.load(std::memory_order_relaxed)) {
      if (!merging.load(std::memory_order_relaxed)) {
        usleep(50);
        continue;
      }
      const int64_t sleeps = OwnUsage().sleeps;
      const uint64_t begun = NowNs();
      for (int i = 0; i < 32; ++i) {
        (void)*const_cast<volatile unsigned char*>(heap.memory() + random() % pages * page_size);
      }
      const uint64_t waited = NowNs() - begun;
      // Faults without a gate and preemptions take their time too, but are no sleep.
      if (OwnUsage().sleeps != sleeps) stalls.Add(waited);
    }
  });
  {
    std::unique_ptr<BusyThreads> busy_threads;
    if (busy) busy_threads = std::make_unique<BusyThreads>(BusyCount());
    // Beside busy threads both sides get little of a CPU: it takes longer to see as much.
    const uint64_t seconds = options.gate_seconds * (busy && !options.short_form ? 3 : 1);
    const uint64_t deadline = NowNs() + seconds * 1'000'000'000;
    uint64_t cycles = 0;
    do {
      heap.Advise();
      merging = true;
      MergeNow(subject.get(), heap);
      merging = false;
      ++cycles;
      if (cycles == 1) subject->ReportCounters(metrics);
      if (ksmu_advise(heap.memory(), heap.bytes(), KSMU_UNMERGEABLE) != 0) throw examples::LibraryError("ksmu_advise");
    } while (NowNs() < deadline);
    (*metrics)["cycles"] = static_cast<double>(cycles);
  }
  stop = true;
  prober.join();
  stalls.Report("stall", metrics);
  const ksmu_stats stats = examples::ReadStats();
  (*metrics)["gate_count"] = static_cast<double>(stats.gate_count);
  (*metrics)["gate_max_us"] = static_cast<double>(stats.gate_max_us);
  // Where the library counts it itself, that is the figure: it sees all gates, for all of their time.
  int64_t p99;
  if (ksmu_get("gate_p99_us", &p99) == 0) (*metrics)["gate_p99_us"] = static_cast<double>(p99);
  // Of a few stalls there is no 99th percentile.
  constexpr uint64_t kEnough = 100;
  if (metrics->count("gate_p99_us")) {
    (*metrics)["p99_us"] = static_cast<double>(p99);
  } else if (stalls.count() >= kEnough) {
    (*metrics)["p99_us"] = (*metrics)["stall_p99_ns"] / 1000;
  }
  heap.Check(metrics);
}

// A program that writes to pages at random without ever pausing: alone at first, then watched. Both in one process and on
// one heap: where memory happens to lie makes more of a difference between processes (30 % were seen) than what is measured.
void MeasureWriter(const Options& options, Side side, Pace pace, Metrics* metrics) {
  const uint64_t mib = 2 * options.latency_mib;
  const auto subject = MakeSubject(side, PagesOf(mib), 0);
  subject->Start();
  BenchHeap heap(MergeHeap(options, mib, 64), subject.get());
  heap.Fill();
  Scribbler scribbler(heap.memory(), heap.bytes());
  std::mt19937_64 random(options.seed);
  const auto write_for = [&](double seconds, Latencies* latencies) {
    const uint64_t begun = NowNs(), end = begun + static_cast<uint64_t>(seconds * 1e9);
    uint64_t writes = 0, before = begun;
    while (before < end) {
      scribbler.Write(random() % scribbler.pages());
      const uint64_t now = NowNs();
      latencies->Add(now - before);
      before = now;
      ++writes;
    }
    return static_cast<double>(writes) / (static_cast<double>(before - begun) * 1e-9);
  };
  Latencies warm_up, alone, latencies;
  const double warming = options.short_form ? 1 : 3;
  write_for(warming, &warm_up);
  const uint64_t alone_cpu = OwnThreadCpuNs();
  (*metrics)["alone_writes_per_second"] = write_for(static_cast<double>(options.writer_seconds), &alone);
  (*metrics)["alone_writes_per_cpu_second"] =
      static_cast<double>(alone.count()) / (static_cast<double>(OwnThreadCpuNs() - alone_cpu) * 1e-9);
  alone.Report("alone_write", metrics);
  heap.Advise();
  subject->SetPace(pace);
  write_for(warming, &warm_up);
  const uint64_t cpu = subject->CpuNs(), own_cpu = OwnThreadCpuNs();
  const int64_t faults = OwnUsage().faults;
  (*metrics)["writes_per_second"] = write_for(static_cast<double>(options.writer_seconds), &latencies);
  (*metrics)["writes_per_cpu_second"] =
      static_cast<double>(latencies.count()) / (static_cast<double>(OwnThreadCpuNs() - own_cpu) * 1e-9);
  (*metrics)["faults"] = static_cast<double>(OwnUsage().faults - faults);
  (*metrics)["cpu_percent"] =
      static_cast<double>(subject->CpuNs() - cpu) * 1e-7 / static_cast<double>(options.writer_seconds);
  latencies.Report("write", metrics);
  subject->ReportCounters(metrics);
  subject->SetPace(Pace::kOff);
  (*metrics)["wrong_pages"] += static_cast<double>(scribbler.CheckAndTakeBack());
  heap.Check(metrics);
}

// Page faults of memory that nobody has advised, while the heap is being merged.
void MeasureSecondRegion(const Options& options, Side side, bool merge_now, Metrics* metrics) {
  constexpr size_t kBytes = 16 << 20;
  const auto subject = MakeSubject(side, PagesOf(options.size_mib), KSMU_F_NO_RAW_DISCARDS);
  subject->Start();
  BenchHeap heap(MergeHeap(options, options.size_mib, 8), subject.get());
  heap.Fill();
  auto* second =
      static_cast<unsigned char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (second == MAP_FAILED) throw std::runtime_error("no memory");
  madvise(second, kBytes, MADV_NOHUGEPAGE);
  heap.Advise();

  std::atomic<bool> over{false};
  std::thread other([&] {
    if (side == Side::kPlain) {
      usleep(options.short_form ? 1'000'000 : 3'000'000);
    } else if (merge_now) {
      MergeNow(subject.get(), heap);
    } else {
      subject->SetPace(Pace::kFlatOut);
      const uint64_t deadline = NowNs() + 60'000'000'000;
      // Asked rarely: what is measured is the merging.
      while (NowNs() < deadline && subject->SavedPages() * 1000 < heap.attainable() * 995) usleep(100'000);
    }
    over = true;
  });
  Latencies faults;
  while (!over) {
    for (size_t at = 0; at < kBytes && !over; at += examples::PageSize()) {
      const uint64_t begun = NowNs();
      *const_cast<volatile unsigned char*>(second + at) = 1;
      faults.Add(NowNs() - begun);
    }
    madvise(second, kBytes, MADV_DONTNEED);
  }
  other.join();
  faults.Report("fault", metrics);
  subject->ReportCounters(metrics);
  subject->SetPace(Pace::kOff);
  munmap(second, kBytes);
  heap.Check(metrics);
}

}  // namespace

void AddLatencyCases(const Options& o, std::vector<Case>* cases) {
  const auto add = [&](const std::string& row, const char* variant, Side side, std::function<void(Metrics*)> run) {
    cases->push_back({row, row + "/" + variant, side, std::move(run)});
  };
  for (const bool busy : {false, true}) {
    const std::string row = busy ? "break_busy" : "break";
    add(row, "ksm", Side::kKsm, [=](Metrics* m) { MeasureBreak(o, Side::kKsm, 0, busy, m); });
    add(row, "async", Side::kLibrary, [=](Metrics* m) { MeasureBreak(o, Side::kLibrary, 0, busy, m); });
    add(row, "sync", Side::kLibrary, [=](Metrics* m) { MeasureBreak(o, Side::kLibrary, KSMU_F_SYNC_BREAK, busy, m); });
  }
  for (const bool busy : {false, true}) {
    const std::string row = busy ? "gate_busy" : "gate";
    add(row, "promise", Side::kLibrary, [=](Metrics* m) { MeasureGate(o, KSMU_F_NO_RAW_DISCARDS, busy, m); });
    add(row, "exact", Side::kLibrary, [=](Metrics* m) { MeasureGate(o, 0, busy, m); });
  }
  const auto writer = [&](const char* variant, Side side, Pace pace) {
    add("writer", variant, side, [=](Metrics* m) { MeasureWriter(o, side, pace, m); });
  };
  writer("ksm", Side::kKsm, Pace::kFlatOut);
  writer("ksm-default", Side::kKsm, Pace::kDefault);
  writer("library", Side::kLibrary, Pace::kDefault);
  writer("library-flat-out", Side::kLibrary, Pace::kFlatOut);
  add("second_region", "plain", Side::kPlain, [=](Metrics* m) { MeasureSecondRegion(o, Side::kPlain, false, m); });
  add("second_region", "ksm", Side::kKsm, [=](Metrics* m) { MeasureSecondRegion(o, Side::kKsm, false, m); });
  add("second_region", "scan", Side::kLibrary, [=](Metrics* m) { MeasureSecondRegion(o, Side::kLibrary, false, m); });
  add("second_region", "merge", Side::kLibrary, [=](Metrics* m) { MeasureSecondRegion(o, Side::kLibrary, true, m); });
}

}  // namespace bench
