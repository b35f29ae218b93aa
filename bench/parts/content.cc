// What is done to every page that is looked at: hash it, see whether it is zero, compare it.

#include "content/content.h"

#include <benchmark/benchmark.h>

#include "memory.h"

namespace {

using bench::Mapping;
using bench::PageSize;

// Argument: MiB that are gone through again and again; 1 stays in the cache, 256 comes from memory.
void Hash(benchmark::State& state) {
  const Mapping memory(static_cast<size_t>(state.range(0)) << 20);
  memory.FillUnique(1);
  size_t page = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(ksmu::content::Hash(memory.page(page), PageSize(), 42));
    page = page + 1 == memory.pages() ? 0 : page + 1;
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(PageSize()));
}
BENCHMARK(Hash)->ArgName("MiB")->Arg(1)->Arg(256);

void CompareEqual(benchmark::State& state) {
  const Mapping a(static_cast<size_t>(state.range(0)) << 20), b(a.bytes());
  a.FillUnique(1);
  b.FillUnique(1);
  size_t page = 0;
  for (auto _ : state) {
    if (!ksmu::content::Equal(a.page(page), b.page(page), PageSize())) state.SkipWithError("equal pages differ");
    page = page + 1 == a.pages() ? 0 : page + 1;
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(PageSize()));
}
BENCHMARK(CompareEqual)->ArgName("MiB")->Arg(1)->Arg(256);

void ZeroTest(benchmark::State& state) {
  const Mapping memory(static_cast<size_t>(state.range(0)) << 20);
  memory.FillZero();
  size_t page = 0;
  for (auto _ : state) {
    if (!ksmu::content::IsZero(memory.page(page), PageSize())) state.SkipWithError("zeros are not zero");
    page = page + 1 == memory.pages() ? 0 : page + 1;
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(PageSize()));
}
BENCHMARK(ZeroTest)->ArgName("MiB")->Arg(1)->Arg(256);

void ZeroTestOfOtherContent(benchmark::State& state) {
  const Mapping memory(1 << 20);
  memory.FillUnique(1);
  size_t page = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(ksmu::content::IsZero(memory.page(page), PageSize()));
    page = page + 1 == memory.pages() ? 0 : page + 1;
  }
}
BENCHMARK(ZeroTestOfOtherContent);

}  // namespace
