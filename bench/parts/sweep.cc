// PAGEMAP_SCAN over tracked memory: which pages were written, and armed again, by one call.

#include <benchmark/benchmark.h>

#include "memory.h"
#include "os/linux_system.h"

namespace {

using bench::Mapping;
using bench::PageSize;
using ksmu::os::Address;
using ksmu::os::Span;

enum Written : int64_t { kNone, kEverySeventh, kAll };
// What is asked of each page. The kernel has a short way for the first; the last makes it look at each page's folio.
enum Asked : int64_t { kWrittenOnly, kWrittenAndPresent, kPrivate };

ksmu::os::ScanRequest RequestOf(int64_t asked) {
  ksmu::os::ScanRequest request;
  request.write_protect = true;
  switch (asked) {
    case kWrittenOnly:
      request.required = request.returned = ksmu::os::kWritten;
      break;
    case kWrittenAndPresent:
      request.required = ksmu::os::kPresent | ksmu::os::kWritten;
      request.returned = ksmu::os::kPresent | ksmu::os::kWritten | ksmu::os::kPfnZero;
      break;
    default:
      request.required = ksmu::os::kPresent | ksmu::os::kFile;
      request.inverted = ksmu::os::kFile;
      request.returned = ksmu::os::kPresent | ksmu::os::kWritten | ksmu::os::kPfnZero;
  }
  return request;
}

// Second argument: which pages are written between two sweeps (not timed).
void Sweep(benchmark::State& state) {
  ksmu::os::LinuxSystem* system = nullptr;
  ksmu::os::ErrorText error;
  if (ksmu::os::LinuxSystem::Open({}, &system, &error) != 0) return state.SkipWithError(error.text);
  {
    const Mapping memory(static_cast<size_t>(state.range(0)) << 20);
    memory.FillUnique(1);
    const Span span = {reinterpret_cast<Address>(memory.memory()), memory.bytes()};
    if (system->Register(ksmu::os::kTracker, span, ksmu::os::kWriteProtect) != 0) {
      return state.SkipWithError("the tracker cannot be registered");
    }
    const ksmu::os::ScanRequest request = RequestOf(state.range(2));
    ksmu::os::PageRun runs[512];
    const auto sweep = [&] {
      size_t written = 0;
      for (Address at = span.start; at < span.end();) {
        const ksmu::os::ScanResult result = system->Scan({at, span.end() - at}, request, runs, std::size(runs));
        if (result.error != 0) break;
        for (size_t r = 0; r < result.runs; ++r) {
          if (runs[r].categories & ksmu::os::kWritten) written += (runs[r].end - runs[r].start) / PageSize();
        }
        at = result.walked_to;
      }
      return written;
    };
    sweep();  // arms
    const int64_t mode = state.range(1);
    const size_t stride = mode == kAll ? 1 : 7;
    const size_t expected = mode == kNone ? 0 : (memory.pages() + stride - 1) / stride;
    for (auto _ : state) {
      if (mode != kNone) {
        state.PauseTiming();
        for (size_t page = 0; page < memory.pages(); page += stride) *memory.page(page) += 1;
        state.ResumeTiming();
      }
      if (sweep() != expected) return state.SkipWithError("a written page was missed, or an unwritten one found");
    }
    state.SetItemsProcessed(state.iterations() * static_cast<int64_t>(memory.pages()));
    system->Unregister(ksmu::os::kTracker, span);
  }
  ksmu::os::LinuxSystem::Close(system);
}
BENCHMARK(Sweep)
    ->ArgNames({"MiB", "written", "asked"})
    ->ArgsProduct({{64, 512}, {kNone, kEverySeventh, kAll}, {kWrittenOnly, kWrittenAndPresent, kPrivate}})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
