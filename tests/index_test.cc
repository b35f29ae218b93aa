// The index: what is found by a hash, what is stale, how it grows and gives back.
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "frames/index.h"

namespace ksmu::frames {
namespace {

using Visit = Index::Visit;

// The index remembers 26 bits of a hash; the rest is the owner's. Here the owner is a map.
class IndexTest : public ::testing::Test {
 protected:
  IndexTest() {
    index.SetHashOf(
        [](void* self, const Index::Entry& entry, std::uint32_t* hash) {
          auto& hashes = static_cast<IndexTest*>(self)->hashes;
          const auto it = hashes.find(entry.is_frame ? entry.frame : entry.page << 32);
          if (it == hashes.end()) return false;
          *hash = it->second;
          return true;
        },
        this);
  }
  void InsertPage(std::uint32_t hash, std::uint64_t page) {
    hashes[page << 32] = hash;
    ASSERT_TRUE(index.Insert(hash, {false, kNoFrame, page}));
  }
  void InsertFrame(std::uint32_t hash, Frame frame) {
    hashes[frame] = hash;
    ASSERT_TRUE(index.Insert(hash, {true, frame, 0}));
  }
  std::multiset<std::uint64_t> Pages(std::uint32_t hash) {
    std::multiset<std::uint64_t> found;
    index.Lookup(hash, [&](const Index::Entry& e) {
      if (!e.is_frame) found.insert(e.page);
      return Visit::kNext;
    });
    return found;
  }
  void Erase(std::uint32_t hash, std::uint64_t page) {
    int erased = 0;
    index.Lookup(hash, [&](const Index::Entry& e) {
      if (e.is_frame || e.page != page) return Visit::kNext;
      ++erased;
      return Visit::kEraseStop;
    });
    EXPECT_EQ(erased, 1);
  }
  Index index;
  std::map<std::uint64_t, std::uint32_t> hashes;
};

TEST_F(IndexTest, EmptyFindsNothing) {
  EXPECT_TRUE(Pages(0).empty());
  EXPECT_EQ(index.size(), 0u);
  EXPECT_EQ(index.metadata_bytes(), 0u);
}

TEST_F(IndexTest, WhatIsNotNeededAnyMoreIsGivenBack) {
  constexpr std::uint64_t kPages = 50'000;
  for (std::uint64_t page = 0; page < kPages; ++page) InsertPage(static_cast<std::uint32_t>(page * 2654435761u), page);
  const std::size_t full = index.metadata_bytes();
  index.Trim(kPages);
  EXPECT_EQ(index.metadata_bytes(), full) << "all of it is alive";
  // All but every hundredth have been written since.
  for (std::uint64_t page = 0; page < kPages; ++page) {
    if (page % 100) hashes.erase(page << 32);
  }
  index.Trim(kPages / 100);
  EXPECT_LE(index.metadata_bytes(), full / 16);
  EXPECT_EQ(index.size(), kPages / 100);
  for (std::uint64_t page = 0; page < kPages; page += 100) {
    const auto hash = static_cast<std::uint32_t>(page * 2654435761u);
    EXPECT_EQ(Pages(hash), std::multiset<std::uint64_t>{page});
  }
  // And it grows again.
  for (std::uint64_t page = kPages; page < 2 * kPages; ++page) InsertPage(static_cast<std::uint32_t>(page * 2654435761u), page);
  EXPECT_EQ(Pages(static_cast<std::uint32_t>((2 * kPages - 1) * 2654435761u)), std::multiset<std::uint64_t>{2 * kPages - 1});
}

TEST_F(IndexTest, PagesAndFramesAreToldApart) {
  constexpr std::uint64_t kHighPage = (std::uint64_t{1} << 36) - 1;  // the last below 2^48
  InsertPage(5, kHighPage);
  InsertFrame(5, 0xfffffffe);
  InsertFrame(0, 0);
  int frames = 0, pages = 0;
  index.Lookup(5, [&](const Index::Entry& e) {
    if (e.is_frame) {
      ++frames;
      EXPECT_EQ(e.frame, 0xfffffffeu);
    } else {
      ++pages;
      EXPECT_EQ(e.page, kHighPage);
    }
    return Visit::kNext;
  });
  EXPECT_EQ(frames, 1);
  EXPECT_EQ(pages, 1);
  int zero = 0;
  index.Lookup(0, [&](const Index::Entry& e) { return zero += e.is_frame && e.frame == 0, Visit::kNext; });
  EXPECT_EQ(zero, 1) << "frame 0 of hash 0 is not an empty slot";
  InsertPage(1, 0);
  InsertPage(2, 1);
  EXPECT_EQ(Pages(1).count(0), 1u) << "nor is page 0";
  EXPECT_EQ(Pages(2).count(1), 1u) << "nor is page 1 an erased one";
}

TEST_F(IndexTest, EqualHashesAreAllVisitedUntilTheVisitorHasEnough) {
  for (std::uint64_t page = 1; page <= 50; ++page) InsertPage(0xdeadbeef, page);
  EXPECT_EQ(Pages(0xdeadbeef).size(), 50u);
  int visited = 0;
  index.Lookup(0xdeadbeef, [&](const Index::Entry&) { return ++visited == 7 ? Visit::kStop : Visit::kNext; });
  EXPECT_EQ(visited, 7);
  // An erased one in the middle does not hide those behind it.
  std::multiset<std::uint64_t> expected;
  for (std::uint64_t page = 1; page <= 50; ++page) {
    if (page % 3) expected.insert(page);
    else Erase(0xdeadbeef, page);
  }
  EXPECT_EQ(Pages(0xdeadbeef), expected);
  EXPECT_EQ(index.size(), expected.size());
  index.Lookup(0xdeadbeef, [&](const Index::Entry&) { return Visit::kEraseNext; });
  EXPECT_TRUE(Pages(0xdeadbeef).empty());
  EXPECT_EQ(index.size(), 0u);
}

TEST_F(IndexTest, OtherHashesAreNotVisited) {
  for (std::uint64_t page = 1; page <= 2000; ++page) InsertPage(static_cast<std::uint32_t>(page << 7), page);
  for (std::uint64_t page = 1; page <= 2000; ++page) {
    EXPECT_EQ(Pages(static_cast<std::uint32_t>(page << 7)), std::multiset<std::uint64_t>{page});
    EXPECT_TRUE(Pages(static_cast<std::uint32_t>(page << 7 | 1u << 31)).empty());
  }
}

TEST_F(IndexTest, GrowingKeepsWhatIsAliveAndLeavesTheRestBehind) {
  constexpr std::uint64_t kPages = 20'000;
  std::size_t largest = 0;
  for (std::uint64_t page = 1; page <= kPages; ++page) {
    // Three pages of each hash, spread by a multiplication.
    InsertPage(static_cast<std::uint32_t>(page / 3 * 2654435761u), page);
    if (page == 3000) {
      for (std::uint64_t stale = 1; stale <= 1000; ++stale) hashes.erase(stale << 32);
    }
    EXPECT_GE(index.metadata_bytes(), largest);
    largest = index.metadata_bytes();
  }
  EXPECT_GT(largest, 4096 * sizeof(std::uint64_t)) << "it has grown";
  EXPECT_EQ(index.size(), kPages - 1000);
  for (std::uint64_t page = 1; page <= kPages; ++page) {
    const auto found = Pages(static_cast<std::uint32_t>(page / 3 * 2654435761u));
    EXPECT_EQ(found.count(page), page > 1000 ? 1u : 0u) << page;
  }
}

TEST_F(IndexTest, InsertingAndErasingForEverNeitherFillsNorGrowsIt) {
  for (std::uint64_t page = 1; page <= 100; ++page) InsertPage(static_cast<std::uint32_t>(page * 2654435761u), page);
  const std::size_t bytes = index.metadata_bytes();
  for (std::uint64_t page = 101; page <= 100'000; ++page) {
    InsertPage(static_cast<std::uint32_t>(page * 2654435761u), page);
    Erase(static_cast<std::uint32_t>((page - 100) * 2654435761u), page - 100);
    hashes.erase((page - 100) << 32);
  }
  EXPECT_EQ(index.metadata_bytes(), bytes);
  EXPECT_EQ(index.size(), 100u);
  for (std::uint64_t page = 99'901; page <= 100'000; ++page) {
    EXPECT_EQ(Pages(static_cast<std::uint32_t>(page * 2654435761u)).count(page), 1u);
  }
  index.Clear();
  EXPECT_EQ(index.size(), 0u);
  EXPECT_EQ(index.metadata_bytes(), 0u);
  EXPECT_TRUE(Pages(5).empty());
}

}  // namespace
}  // namespace ksmu::frames
