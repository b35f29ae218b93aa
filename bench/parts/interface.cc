// Through the C interface: merge, break, unmerge, and the counters. Time is that of the caller, by the clock; what the
// library's threads used is the counter cpu_per_page.

#include <benchmark/benchmark.h>
#include <dirent.h>
#include <ksmu/ksmu.h>
#include <time.h>

#include <atomic>
#include <cerrno>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "memory.h"

namespace {

using bench::Mapping;
using bench::PageSize;

constexpr size_t kBytes = 16 << 20;

double Now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

double LibraryCpuSeconds() {
  double seconds = 0;
  DIR* tasks = opendir("/proc/self/task");
  while (const dirent* entry = tasks != nullptr ? readdir(tasks) : nullptr) {
    const std::string task = std::string("/proc/self/task/") + entry->d_name;
    std::string name;
    uint64_t running;
    std::ifstream comm(task + "/comm"), schedstat(task + "/schedstat");
    if (std::getline(comm, name) && name.compare(0, 5, "ksmu-") == 0 && schedstat >> running) {
      seconds += static_cast<double>(running) * 1e-9;
    }
  }
  if (tasks != nullptr) closedir(tasks);
  return seconds;
}

// Nothing is scanned unless it is asked for. False: the library cannot start.
bool Start(benchmark::State& state) {
  if (ksmu_start(nullptr, sizeof(ksmu_options)) != 0 || ksmu_set("run", 0) != 0) {
    state.SkipWithError(ksmu_last_error());
    return false;
  }
  return true;
}

uint64_t NextSeed() {
  static uint64_t seed = 0;
  return ++seed;
}

// Runs of `run` pages: one of the first half's contents again, one of its own, and so on in turn. A fresh seed each
// time: no content of an earlier heap is met again. Returns the pages that can be merged.
size_t FillRuns(const Mapping& memory, size_t run, bool all) {
  const uint64_t seed = NextSeed() << 32;
  const size_t half = memory.pages() / 2;
  size_t merged = 0;
  for (size_t page = 0; page < memory.pages(); ++page) {
    const size_t in_half = page % half;
    const bool shared = all || in_half / run % 2 == 0;
    bench::FillPage(memory.page(page), seed + (shared ? in_half : half + page));
    merged += shared;
  }
  return merged;
}

bool Merge(const Mapping& memory) {
  while (ksmu_merge(memory.memory(), memory.bytes()) < 0) {
    if (errno != EINTR) return false;
  }
  return true;
}

bool Merged(const Mapping& memory, size_t pages) {
  ksmu_region_stats region;
  return ksmu_read_region(memory.memory(), &region, sizeof region) == 0 &&
         static_cast<size_t>(region.pages_merged) * 100 >= pages * 99;
}

void MergeRuns(benchmark::State& state) {
  if (!Start(state)) return;
  const auto run = static_cast<size_t>(state.range(0));
  size_t pages = 0;
  double cpu = 0;
  for (auto _ : state) {
    const Mapping memory(kBytes);
    const size_t mergeable = FillRuns(memory, run, false);
    if (ksmu_advise(memory.memory(), kBytes, KSMU_MERGEABLE | (state.range(1) ? KSMU_F_NO_RAW_DISCARDS : 0)) != 0) {
      return state.SkipWithError(ksmu_last_error());
    }
    const double cpu_before = LibraryCpuSeconds(), before = Now();
    if (!Merge(memory)) return state.SkipWithError(ksmu_last_error());
    state.SetIterationTime(Now() - before);
    cpu += LibraryCpuSeconds() - cpu_before;
    pages += mergeable;
    if (!Merged(memory, mergeable)) return state.SkipWithError("not everything was merged");
    ksmu_advise(memory.memory(), kBytes, KSMU_RELEASE);
  }
  state.SetItemsProcessed(static_cast<int64_t>(pages));
  state.counters["cpu_per_page"] = cpu / static_cast<double>(pages);
  ksmu_stop();
}
BENCHMARK(MergeRuns)
    ->ArgNames({"run", "promise"})
    ->ArgsProduct({{1, 3, 8, 64}, {0, 1}})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

// First writes to merged pages, in address order or every fourth; time is of all of them.
void Break(benchmark::State& state) {
  if (!Start(state)) return;
  const size_t stride = state.range(1) ? 4 : 1;
  size_t writes = 0;
  for (auto _ : state) {
    const Mapping memory(kBytes);
    const size_t mergeable = FillRuns(memory, 64, true);
    if (ksmu_advise(memory.memory(), kBytes, KSMU_MERGEABLE | (state.range(0) ? KSMU_F_SYNC_BREAK : 0)) != 0 ||
        !Merge(memory)) {
      return state.SkipWithError(ksmu_last_error());
    }
    if (!Merged(memory, mergeable)) return state.SkipWithError("not everything was merged");
    const double before = Now();
    for (size_t page = 0; page < memory.pages(); page += stride) {
      *const_cast<volatile unsigned char*>(memory.page(page)) = 1;
    }
    state.SetIterationTime(Now() - before);
    writes += memory.pages() / stride;
    ksmu_advise(memory.memory(), kBytes, KSMU_RELEASE);
  }
  state.SetItemsProcessed(static_cast<int64_t>(writes));
  ksmu_stop();
}
BENCHMARK(Break)
    ->ArgNames({"sync", "isolated"})
    ->ArgsProduct({{0, 1}, {0, 1}})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

// The same beside four busy threads a CPU.
void BreakWithBusyCpus(benchmark::State& state) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> busy;
  for (unsigned i = 0; i < 4 * std::thread::hardware_concurrency(); ++i) {
    busy.emplace_back([&stop] {
      while (!stop.load(std::memory_order_relaxed)) {
      }
    });
  }
  Break(state);
  stop = true;
  for (std::thread& thread : busy) thread.join();
}
BENCHMARK(BreakWithBusyCpus)
    ->ArgNames({"sync", "isolated"})
    ->ArgsProduct({{0, 1}, {0}})
    ->UseManualTime()
    ->Iterations(3)
    ->Unit(benchmark::kMillisecond);

void Unmerge(benchmark::State& state) {
  if (!Start(state)) return;
  const auto run = static_cast<size_t>(state.range(0));
  size_t pages = 0;
  double cpu = 0;
  for (auto _ : state) {
    const Mapping memory(kBytes);
    const size_t mergeable = FillRuns(memory, run, false);
    if (ksmu_advise(memory.memory(), kBytes, KSMU_MERGEABLE | KSMU_F_NO_RAW_DISCARDS) != 0 || !Merge(memory)) {
      return state.SkipWithError(ksmu_last_error());
    }
    if (!Merged(memory, mergeable)) return state.SkipWithError("not everything was merged");
    const double cpu_before = LibraryCpuSeconds(), before = Now();
    if (ksmu_advise(memory.memory(), kBytes, KSMU_UNMERGEABLE) != 0) return state.SkipWithError(ksmu_last_error());
    state.SetIterationTime(Now() - before);
    cpu += LibraryCpuSeconds() - cpu_before;
    pages += mergeable;
  }
  state.SetItemsProcessed(static_cast<int64_t>(pages));
  state.counters["cpu_per_page"] = cpu / static_cast<double>(pages);
  ksmu_stop();
}
BENCHMARK(Unmerge)->ArgName("run")->Arg(1)->Arg(8)->Arg(64)->UseManualTime()->Unit(benchmark::kMillisecond);

void ReadStats(benchmark::State& state) {
  if (!Start(state)) return;
  ksmu_stats stats;
  for (auto _ : state) {
    if (ksmu_read_stats(&stats, sizeof stats) != 0) return state.SkipWithError(ksmu_last_error());
  }
  ksmu_stop();
}
BENCHMARK(ReadStats)->UseRealTime()->Unit(benchmark::kMicrosecond);

void GetTunable(benchmark::State& state) {
  if (!Start(state)) return;
  int64_t value;
  for (auto _ : state) {
    if (ksmu_get("sleep_millisecs", &value) != 0) return state.SkipWithError(ksmu_last_error());
  }
  ksmu_stop();
}
BENCHMARK(GetTunable);

}  // namespace
