// The library's own memory: growth, its failure, reuse; and the points at which tests stop the protocol.
#include "base/own_memory.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "base/test_point.h"

// The same code over an mmap whose result is aligned to pages and no further, as it is where the kernel does not align
// large mappings for huge pages; behind it lies memory of somebody else.
#include <sys/mman.h>

#include <atomic>
namespace ksmu::base::misaligned {
namespace {
char* g_stranger = nullptr;
constexpr std::size_t kStrangerBytes = 64 * 1024;

void* MapMisaligned(void*, std::size_t bytes, int protection, int flags, int fd, off_t offset) {
  constexpr std::size_t kHuge = std::size_t{2} << 20;
  char* room = static_cast<char*>(mmap(nullptr, bytes + 2 * kHuge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (room == MAP_FAILED) return MAP_FAILED;
  char* at = room + (kHuge - reinterpret_cast<std::uintptr_t>(room) % kHuge) + 5 * 4096;
  void* pages = mmap(at, bytes, protection, flags | MAP_FIXED, fd, offset);
  g_stranger = static_cast<char*>(
      mmap(at + bytes, kStrangerBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
  std::memset(g_stranger, 7, kStrangerBytes);
  return pages;
}
}  // namespace
void* MapOwnPages(std::size_t bytes);
void UnmapOwnPages(void* pages, std::size_t bytes);
void* MapOwnHugePages(std::size_t bytes);
void* MapInheritedPages(std::size_t bytes);
void ForgetOwnPages(void* pages, std::size_t bytes);
std::size_t OwnBytesMapped();
}  // namespace ksmu::base::misaligned
#define base base::misaligned
#define mmap MapMisaligned
#include "os/own_memory.cc"  // NOLINT: its own copy
#undef mmap
#undef base

namespace ksmu::base {
namespace {

constexpr std::size_t kImpossible = std::size_t{1} << 50;  // more than there are addresses

TEST(OwnPages, AreZeroedAlignedAndCounted) {
  const std::size_t before = OwnBytesMapped();
  auto* pages = static_cast<unsigned char*>(MapOwnPages(10'000));
  ASSERT_NE(pages, nullptr);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pages) % 4096, 0u);
  EXPECT_GE(OwnBytesMapped(), before + 10'000);
  for (std::size_t i = 0; i < 10'000; ++i) ASSERT_EQ(pages[i], 0) << i;
  std::memset(pages, 0xff, 10'000);
  UnmapOwnPages(pages, 10'000);
  EXPECT_EQ(OwnBytesMapped(), before);
  EXPECT_EQ(MapOwnPages(kImpossible), nullptr);
  EXPECT_EQ(OwnBytesMapped(), before);
}

TEST(OwnPages, HugeOnesAreAlignedAndNothingIsLeftAroundThem) {
  constexpr std::size_t kHuge = std::size_t{2} << 20;
  constexpr std::size_t kUnit = 64 * 1024;  // what lengths are rounded up to
  const std::size_t before = OwnBytesMapped();
  for (const std::size_t bytes : {std::size_t{1}, kHuge, kHuge + 1}) {
    const std::size_t rounded = (bytes + kHuge - 1) / kHuge * kHuge;
    auto* pages = static_cast<unsigned char*>(MapOwnHugePages(bytes));
    ASSERT_NE(pages, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pages) % kHuge, 0u);
    EXPECT_EQ(OwnBytesMapped(), before + rounded);
    for (std::size_t i = 0; i < rounded; i += 512) {
      ASSERT_EQ(pages[i], 0);
      pages[i] = 1;
    }
    ForgetOwnPages(pages + kUnit, kUnit);
    EXPECT_EQ(pages[0], 1);
    EXPECT_EQ(pages[kUnit], 0) << "given back";
    EXPECT_EQ(pages[kUnit - 512], 1);
    EXPECT_EQ(pages[2 * kUnit], 1);
    UnmapOwnPages(pages, rounded);
    EXPECT_EQ(OwnBytesMapped(), before);
  }
  EXPECT_EQ(MapOwnHugePages(kImpossible), nullptr);
  EXPECT_EQ(OwnBytesMapped(), before);
}

TEST(OwnPages, HugeOnesLeaveTheirNeighboursAlone) {
  if (sysconf(_SC_PAGESIZE) != 4096) GTEST_SKIP() << "written for pages of 4 KiB";
  constexpr std::size_t kBytes = std::size_t{2} << 20;
  auto* pages = static_cast<unsigned char*>(misaligned::MapOwnHugePages(kBytes));
  ASSERT_NE(pages, nullptr);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pages) % kBytes, 0u);
  EXPECT_EQ(misaligned::OwnBytesMapped(), kBytes);
  unsigned char resident[kBytes / 4096];
  EXPECT_EQ(mincore(misaligned::g_stranger, misaligned::kStrangerBytes, resident), 0) << "the neighbour's memory is gone";
  EXPECT_EQ(mincore(pages, kBytes, resident), 0) << "some of its own is gone";
  misaligned::UnmapOwnPages(pages, kBytes);
  EXPECT_EQ(misaligned::OwnBytesMapped(), 0u);
}

TEST(OwnVector, GrowsAndKeepsItsElements) {
  const std::size_t before = OwnBytesMapped();
  {
    OwnVector<std::uint64_t> v;
    EXPECT_TRUE(v.empty());
    for (std::uint64_t i = 0; i < 100'000; ++i) ASSERT_TRUE(v.push_back(i * i));
    ASSERT_EQ(v.size(), 100'000u);
    for (std::uint64_t i = 0; i < v.size(); ++i) ASSERT_EQ(v[i], i * i);
    EXPECT_EQ(v.end() - v.begin(), 100'000);
    EXPECT_EQ(v.back(), std::uint64_t{99'999} * 99'999);
    EXPECT_GT(OwnBytesMapped(), before);
  }
  EXPECT_EQ(OwnBytesMapped(), before) << "growing, or the end, has left something behind";
}

TEST(OwnVector, InsertsAndErasesAnywhere) {
  OwnVector<int> v;
  std::vector<int> expected;
  std::uint32_t random = 1;
  for (int i = 0; i < 5000; ++i) {
    random = random * 1664525 + 1013904223;
    const std::size_t at = (random >> 8) % (expected.size() + 1);
    if (random >> 30 || at == expected.size()) {
      ASSERT_TRUE(v.insert(at, i));
      expected.insert(expected.begin() + static_cast<std::ptrdiff_t>(at), i);
    } else {
      v.erase(at);
      expected.erase(expected.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
  ASSERT_GT(expected.size(), 2048u) << "has grown on the way";
  EXPECT_EQ(std::vector<int>(v.begin(), v.end()), expected);
  v.pop_back();
  expected.pop_back();
  EXPECT_EQ(std::vector<int>(v.begin(), v.end()), expected);
}

TEST(OwnVector, FailureToGrowChangesNothing) {
  OwnVector<std::uint64_t> v;
  EXPECT_FALSE(v.reserve(kImpossible));
  EXPECT_EQ(v.data(), nullptr);
  for (std::uint64_t i = 0; i < 10; ++i) ASSERT_TRUE(v.push_back(i));
  const auto* data = v.data();
  const std::size_t mapped = OwnBytesMapped();
  EXPECT_FALSE(v.reserve(kImpossible));
  EXPECT_EQ(v.data(), data);
  EXPECT_EQ(v.size(), 10u);
  EXPECT_EQ(OwnBytesMapped(), mapped);
  for (std::uint64_t i = 0; i < 10; ++i) EXPECT_EQ(v[i], i);
  EXPECT_TRUE(v.push_back(10)) << "what fits goes on";
}

TEST(OwnVector, ClearKeepsTheMemoryAndResetGivesItBack) {
  const std::size_t before = OwnBytesMapped();
  OwnVector<int> v;
  ASSERT_TRUE(v.reserve(5000));
  const auto* data = v.data();
  ASSERT_TRUE(v.push_back(1));
  v.clear();
  EXPECT_TRUE(v.empty());
  for (int i = 0; i < 5000; ++i) ASSERT_TRUE(v.push_back(i));
  EXPECT_EQ(v.data(), data) << "reserved, and moved all the same";
  v.Reset();
  EXPECT_EQ(v.size(), 0u);
  EXPECT_EQ(OwnBytesMapped(), before);
  ASSERT_TRUE(v.push_back(3));
  EXPECT_EQ(v[0], 3);
}

struct Counted {
  static int alive;
  Counted() { ++alive; }
  ~Counted() { --alive; }
  alignas(32) std::uint64_t words[11] = {};
};
int Counted::alive = 0;

TEST(OwnSlab, ObjectsAreApartAlignedAndFresh) {
  const std::size_t before = OwnBytesMapped();
  {
    OwnSlab<Counted> slab;
    std::set<Counted*> objects;
    // Several chunks of them.
    constexpr std::size_t kObjects = 10'000;
    for (std::size_t i = 0; i < kObjects; ++i) {
      Counted* object = slab.Make();
      ASSERT_NE(object, nullptr);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(object) % alignof(Counted), 0u);
      for (const std::uint64_t word : object->words) ASSERT_EQ(word, 0u);
      std::memset(object->words, 0xff, sizeof object->words);  // would show in a neighbour
      if (!objects.empty()) {
        const auto next = objects.lower_bound(object);
        if (next != objects.end()) {
          ASSERT_LE(object + 1, *next);
        }
        if (next != objects.begin()) {
          ASSERT_GE(object, *std::prev(next) + 1);
        }
      }
      objects.insert(object);
    }
    EXPECT_EQ(objects.size(), kObjects);
    EXPECT_EQ(slab.live(), kObjects);
    EXPECT_EQ(Counted::alive, static_cast<int>(kObjects));
    EXPECT_GE(slab.bytes(), kObjects * sizeof(Counted));
    EXPECT_GE(OwnBytesMapped() - before, slab.bytes());
    for (Counted* object : objects) slab.Free(object);
    EXPECT_EQ(slab.live(), 0u);
    EXPECT_EQ(Counted::alive, 0);
  }
  EXPECT_EQ(OwnBytesMapped(), before);
}

TEST(OwnSlab, FreedPlacesAreUsedAgainLastFirst) {
  OwnSlab<Counted> slab;
  Counted* a = slab.Make();
  Counted* b = slab.Make();
  Counted* c = slab.Make();
  std::memset(a->words, 0xaa, sizeof a->words);
  std::memset(c->words, 0xcc, sizeof c->words);
  const std::size_t mapped = OwnBytesMapped();
  slab.Free(a);
  slab.Free(c);
  EXPECT_EQ(slab.live(), 1u);
  EXPECT_EQ(slab.Make(), c);
  Counted* again = slab.Make();
  EXPECT_EQ(again, a);
  for (const std::uint64_t word : again->words) EXPECT_EQ(word, 0u) << "what was there before shows";
  for (const std::uint64_t word : b->words) EXPECT_EQ(word, 0u) << "the neighbour has been written";
  EXPECT_EQ(OwnBytesMapped(), mapped);
  Counted* d = slab.Make();
  EXPECT_TRUE(d != a && d != b && d != c);
  for (Counted* object : {a, b, c, d}) slab.Free(object);
}

struct Reached {
  std::string point;
  std::uintptr_t address;
  std::size_t bytes;
};
std::vector<Reached> g_reached;

TEST(TestPoint, CallsTheHookThatIsSet) {
  g_reached.clear();
  KSMU_TEST_POINT("nobody.listens", 1, 2);
  g_test_hook = [](const char* point, std::uintptr_t address, std::size_t bytes) { g_reached.push_back({point, address, bytes}); };
  KSMU_TEST_POINT("some.point", 4096, 8192);
  g_test_hook = nullptr;
  KSMU_TEST_POINT("nobody.listens", 1, 2);
  ASSERT_EQ(g_reached.size(), 1u);
  EXPECT_EQ(g_reached[0].point, "some.point");
  EXPECT_EQ(g_reached[0].address, 4096u);
  EXPECT_EQ(g_reached[0].bytes, 8192u);
}

}  // namespace
}  // namespace ksmu::base
