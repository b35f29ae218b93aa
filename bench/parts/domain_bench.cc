// The broker's state machine at 10^4, 10^5 and 10^6 frames: what a look-up, an offer, an acquire, a publish and a member's death
// cost, each per frame; and the bookkeeping's bytes. No sockets, and frames of 64 bytes: what is measured is what grows.

#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <cerrno>
#include <array>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "broker/domain.h"

namespace ksmu::broker {
namespace {

using wire::SettleEntry;
constexpr std::size_t kPage = 64;

std::uint64_t HashOf(const std::byte* page, std::size_t, std::uint64_t) {
  std::uint64_t content;
  std::memcpy(&content, page, sizeof content);
  content = (content ^ content >> 31) * 0x9E3779B97F4A7C15u;
  return content ^ content >> 29;
}

class Memory final : public Domain::Files {
 public:
  int Add() override { return bytes_.resize(bytes_.size() + Domain::kFramesPerFile * kPage), 0; }
  int Write(Frame frame, const std::byte* page) override { return std::memcpy(&bytes_[frame * kPage], page, kPage), 0; }
  int Punch(Frame, std::size_t) override { return 0; }
  bool Holds(Frame frame, const std::byte* page) override { return std::memcmp(&bytes_[frame * kPage], page, kPage) == 0; }

 private:
  std::vector<std::byte> bytes_;
};

// A domain of so many frames, published by one member and held by another as well.
struct World {
  explicit World(std::size_t frames) {
    a = domain.Join();
    b = domain.Join();
    for (std::uint64_t c = 0; c < frames;) {
      std::vector<SettleEntry> entries;
      first = c;
      for (; c < frames && entries.size() < wire::kMaxSettle; ++c) entries.push_back({SettleEntry::kPublish, HashOfContent(c), static_cast<std::uint32_t>(entries.size()), 0});
      Settle(a, entries);
      for (std::size_t i = 0; i < entries.size(); ++i) acquires.push_back({SettleEntry::kAcquire, entries[i].hash, answers[i], 0});
    }
    AcquireAll(b);
  }
  ~World() { munmap(memory, kIndexFileBytes); }

  static std::uint64_t WholeHashOf(std::uint64_t content) {
    std::byte page[kPage] = {};
    std::memcpy(page, &content, sizeof content);
    return HashOf(page, kPage, 0);
  }
  static std::uint32_t HashOfContent(std::uint64_t content) { return static_cast<std::uint32_t>(WholeHashOf(content) >> 32); }
  void Settle(std::uint16_t member, const std::vector<SettleEntry>& entries) {
    answers.resize(entries.size());
    domain.Settle(
        member, entries.data(), entries.size(),
        [](void* self, std::uint32_t place, std::byte* page) {
          const std::uint64_t content = static_cast<World*>(self)->first + place;
          std::memset(page, 0, kPage);
          std::memcpy(page, &content, sizeof content);
        },
        this, answers.data());
  }
  void AcquireAll(std::uint16_t member) {
    for (std::size_t i = 0; i < acquires.size(); i += wire::kMaxSettle) {
      const std::size_t n = std::min(acquires.size() - i, wire::kMaxSettle);
      answers.resize(n);
      domain.Settle(member, &acquires[i], n, nullptr, nullptr, answers.data());
    }
  }

  void* memory = mmap(nullptr, kIndexFileBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  Memory files;
  IndexWriter index{memory, [](void* m, std::size_t offset, std::size_t bytes) { return madvise(static_cast<char*>(m) + offset, bytes, MADV_REMOVE); }, memory};
  IndexReader reader{memory, kIndexFileBytes};
  Domain domain{files, index, reader, kPage, 0, &HashOf};
  std::uint16_t a, b;
  std::uint64_t first = 0;
  std::vector<std::uint32_t> answers;
  std::vector<SettleEntry> acquires;
};

World& WorldOf(std::size_t frames) {
  static std::map<std::size_t, std::unique_ptr<World>> worlds;
  auto& world = worlds[frames];
  if (!world) world = std::make_unique<World>(frames);
  return *world;
}

void LookUp(benchmark::State& state) {
  World& world = WorldOf(static_cast<std::size_t>(state.range(0)));
  std::mt19937_64 random(1);
  std::size_t found = 0;
  // As the engine looks up: a portion of hashes at a time, whose places are fetched first.
  std::array<std::uint32_t, 64> hashes;
  for (auto _ : state) {
    for (auto& hash : hashes) hash = world.acquires[random() % world.acquires.size()].hash;
    const auto begun = std::chrono::steady_clock::now();
    for (const std::uint32_t hash : hashes) world.reader.Prefetch(hash);
    for (const std::uint32_t hash : hashes) world.reader.Lookup(hash, [&](Frame) { return ++found, false; });
    state.SetIterationTime(std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
  }
  benchmark::DoNotOptimize(found);
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * hashes.size()));
  state.counters["index_bytes_per_frame"] = static_cast<double>(world.index.table_bytes()) / static_cast<double>(world.index.size());
  state.counters["all_bytes_per_frame"] = static_cast<double>(world.index.table_bytes() + world.domain.metadata_bytes()) / static_cast<double>(world.index.size());
}
BENCHMARK(LookUp)->UseManualTime()->Arg(10'000)->Arg(100'000)->Arg(1'000'000);

// Of hashes that nobody has, and that somebody has, in turn: the table holds as many as there are frames.
void Offer(benchmark::State& state) {
  const auto count = static_cast<std::size_t>(state.range(0));
  World& world = WorldOf(count);
  std::mt19937_64 random(2);
  std::vector<std::uint64_t> hashes(wire::kMaxOffers);
  const auto offer = [&] {
    for (auto& hash : hashes) hash = World::WholeHashOf(1'000'000'000 + random() % count);
    std::size_t wanted = 0;
    world.domain.Offer(random() % 2 ? world.a : world.b, hashes.data(), hashes.size(), [](void* n, std::uint16_t, std::uint32_t) { ++*static_cast<std::size_t*>(n); }, &wanted);
  };
  for (std::size_t i = 0; i < 4 * count / hashes.size() + 1; ++i) offer();
  for (auto _ : state) offer();
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * hashes.size()));
}
BENCHMARK(Offer)->Arg(10'000)->Arg(100'000)->Arg(1'000'000);

// A member that acquires everything, in questions of 512, and dies.
void AcquireAndDie(benchmark::State& state) {
  World& world = WorldOf(static_cast<std::size_t>(state.range(0)));
  for (auto _ : state) {
    const std::uint16_t member = world.domain.Join();
    world.AcquireAll(member);
    world.domain.Gone(member);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()) * state.range(0));
}
BENCHMARK(AcquireAndDie)->Arg(10'000)->Arg(100'000)->Arg(1'000'000)->Unit(benchmark::kMillisecond);

void Publish(benchmark::State& state) {
  for (auto _ : state) {
    World world(static_cast<std::size_t>(state.range(0)));
    benchmark::DoNotOptimize(&world);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()) * state.range(0));
}
BENCHMARK(Publish)->Arg(10'000)->Arg(100'000)->Arg(1'000'000)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace ksmu::broker
