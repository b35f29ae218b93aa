// The index, and the pool: what it costs to remember a page, to find its twin, and to publish a frame.

#include <benchmark/benchmark.h>

#include <string>

#include "frames/fork_watch.h"
#include "frames/index.h"
#include "frames/pool.h"
#include "memory.h"
#include "os/linux_system.h"

namespace {

using bench::Mapping;
using bench::PageSize;
using ksmu::frames::Frame;
using ksmu::frames::Index;
using ksmu::frames::Pool;

uint32_t HashOf(uint64_t number) { return static_cast<uint32_t>(number * 0x9e3779b97f4a7c15 >> 32); }

void SetUp(Index* index) {
  // Entries are pages whose number is that from which their hash is made.
  index->SetHashOf(
      [](void*, const Index::Entry& entry, uint32_t* hash) {
        *hash = HashOf(entry.page);
        return true;
      },
      nullptr);
}

void IndexInsert(benchmark::State& state) {
  const auto entries = static_cast<uint64_t>(state.range(0));
  for (auto _ : state) {
    Index index;
    SetUp(&index);
    for (uint64_t i = 1; i <= entries; ++i) {
      if (!index.Insert(HashOf(i), {false, ksmu::frames::kNoFrame, i})) state.SkipWithError("no memory");
    }
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(IndexInsert)->ArgName("entries")->Arg(1 << 12)->Arg(1 << 18)->Unit(benchmark::kMicrosecond);

// Second argument: whether the hash is there.
void IndexLookup(benchmark::State& state) {
  const auto entries = static_cast<uint64_t>(state.range(0));
  Index index;
  SetUp(&index);
  for (uint64_t i = 1; i <= entries; ++i) {
    if (!index.Insert(HashOf(i), {false, ksmu::frames::kNoFrame, i})) state.SkipWithError("no memory");
  }
  uint64_t number = 0, found = 0;
  for (auto _ : state) {
    number = (number + 0x9e3779b1) % entries;
    const uint64_t wanted = state.range(1) ? number + 1 : number + 1 + entries;
    index.Lookup(HashOf(wanted), [&](const Index::Entry& entry) {
      if (entry.page != wanted) return Index::Visit::kNext;
      ++found;
      return Index::Visit::kStop;
    });
  }
  if (state.range(1) && found != static_cast<uint64_t>(state.iterations()))
    state.SkipWithError("an entry was not found");
}
BENCHMARK(IndexLookup)->ArgNames({"entries", "there"})->ArgsProduct({{1 << 12, 1 << 18, 1 << 22}, {0, 1}});

// Argument: frames written by one call.
void PublishFrames(benchmark::State& state) {
  ksmu::os::LinuxSystem* system = nullptr;
  ksmu::os::ErrorText error;
  if (ksmu::os::LinuxSystem::Open({}, &system, &error) != 0) return state.SkipWithError(error.text);
  {
    ksmu::frames::ForkWatch forks(*system);
    if (forks.Start() != 0) return state.SkipWithError("no canary");
    Pool pool(*system, forks);
    constexpr size_t kBatch = 1024;
    const auto run = static_cast<size_t>(state.range(0));
    const Mapping memory(kBatch * PageSize());
    memory.FillUnique(1);
    for (auto _ : state) {
      Frame frames[kBatch];
      size_t taken = 0;
      for (; taken < kBatch; taken += run) {
        for (size_t i = 0; i < run; ++i) {
          frames[taken + i] = pool.Allocate();
          if (frames[taken + i] == ksmu::frames::kNoFrame) return state.SkipWithError("the pool is full");
          pool.Pin(frames[taken + i]);
        }
        const Frame first = frames[taken];
        const bool together =
            frames[taken + run - 1] == first + run - 1 && pool.SameFile(first, frames[taken + run - 1]);
        const size_t at_once = together ? run : 1;
        for (size_t i = 0; i < run; i += at_once) {
          const Frame f = frames[taken + i];
          const ksmu::os::Partial written =
              system->WriteFile(pool.OsFile(f), pool.Offset(f),
                                reinterpret_cast<ksmu::os::Address>(memory.page(taken + i)), at_once * PageSize());
          if (written.error != 0) return state.SkipWithError("a frame could not be written");
        }
      }
      state.PauseTiming();
      for (const Frame f : frames) pool.Unpin(f);
      pool.Reclaim([](void*, Frame) {}, nullptr);
      state.ResumeTiming();
    }
    state.SetItemsProcessed(state.iterations() * static_cast<int64_t>(kBatch));
  }
  ksmu::os::LinuxSystem::Close(system);
}
BENCHMARK(PublishFrames)->ArgName("run")->Arg(1)->Arg(8)->Arg(64)->Unit(benchmark::kMicrosecond);

}  // namespace
