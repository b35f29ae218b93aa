// A domain against a model of it: random members, contents, deaths; hash collisions, hostile messages, storage that refuses.

#include "broker/domain.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "content/content.h"

namespace ksmu::broker {
namespace {

using wire::SettleEntry;

constexpr std::size_t kPage = 64;
using Content = std::uint32_t;
using PageBytes = std::array<std::byte, kPage>;

PageBytes PageOf(Content content) {
  PageBytes page;
  for (std::size_t i = 0; i < kPage; ++i) page[i] = static_cast<std::byte>(content >> (i % 4 * 8) ^ i);
  return page;
}
Content ContentOf(const std::byte* page) {
  Content content = 0;
  for (std::size_t i = 0; i < 4; ++i) content |= static_cast<Content>(static_cast<std::uint8_t>(page[i]) ^ i) << (i * 8);
  return content;
}
// Three contents in a hundred share their hash with others.
std::uint32_t HashOf(const std::byte* page, std::size_t, std::uint64_t seed) {
  const Content content = ContentOf(page);
  return (content % 100 < 3 ? content % 7 : content * 2654435761u) + static_cast<std::uint32_t>(seed);
}

std::uint64_t WholeHashOf(const std::byte* page, std::size_t bytes, std::uint64_t seed) {
  return std::uint64_t{HashOf(page, bytes, seed)} << 32 | ContentOf(page);
}

// Fails the test where a frame is written that somebody may be looking at.
class FakeFiles : public Domain::Files {
 public:
  int Add() override {
    if (may_add == 0) return -ENOSPC;
    --may_add;
    ++files;
    return 0;
  }
  int Write(Frame frame, const std::byte* page) override {
    if (may_write == 0) return -ENOSPC;
    EXPECT_LT(frame / Domain::kFramesPerFile, files);
    EXPECT_FALSE(bytes.contains(frame)) << "written twice";
    EXPECT_FALSE(covered && covered->contains(frame)) << "written where a mapping is";
    std::copy(page, page + kPage, bytes[frame].begin());
    return 0;
  }
  int Punch(Frame first, std::size_t count) override {
    EXPECT_EQ(first / Domain::kFramesPerFile, (first + count - 1) / Domain::kFramesPerFile);
    for (Frame f = first; f < first + count; ++f) {
      EXPECT_EQ(bytes.erase(f), 1u);
      EXPECT_FALSE(held && held->contains(f)) << "punched while it is held";
    }
    return 0;
  }
  bool Holds(Frame frame, const std::byte* page) override { return bytes.contains(frame) && std::memcmp(bytes[frame].data(), page, kPage) == 0; }

  bool HasNode(std::uint32_t node) override { return node < 3; }
  int Bind(Frame first, std::size_t count, std::uint32_t node) override {
    if (node == 2) return -ENOMEM;
    EXPECT_EQ(first % Domain::kChunk, 0u);
    EXPECT_EQ(count, Domain::kChunk);
    for (Frame f = first; f < first + count; ++f) EXPECT_FALSE(bytes.contains(f) || (covered && covered->contains(f))) << "bound while in use";
    nodes[first / Domain::kChunk] = node;
    return 0;
  }

  std::map<Frame, PageBytes> bytes;
  std::map<Frame, std::uint32_t> nodes;  // of chunks
  std::multiset<Frame>*held = nullptr, *covered = nullptr;
  std::size_t files = 0;
  int may_add = 100, may_write = 1;
};

struct World {
  void* memory = mmap(nullptr, kIndexFileBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  FakeFiles files;
  IndexWriter index{memory, [](void* self, std::size_t offset, std::size_t bytes) { return madvise(static_cast<char*>(static_cast<World*>(self)->memory) + offset, bytes, MADV_REMOVE); }, this};
  IndexReader reader{memory, kIndexFileBytes};
  Domain domain{files, index, reader, kPage, 5, &WholeHashOf};
  std::vector<PageBytes> ring = std::vector<PageBytes>(wire::kRingPages);
  ~World() { munmap(memory, kIndexFileBytes); }

  std::vector<std::uint32_t> Settle(std::uint16_t member, const std::vector<SettleEntry>& entries, bool hostile = false) {
    std::vector<std::uint32_t> answers(entries.size(), wire::kNoFrame);
    const char* wrong = domain.Settle(
        member, entries.data(), entries.size(),
        [](void* self, std::uint32_t place, std::byte* page) {
          const PageBytes& from = static_cast<World*>(self)->ring[place];
          std::copy(from.begin(), from.end(), page);
        },
        this, answers.data());
    EXPECT_EQ(wrong != nullptr, hostile) << (wrong ? wrong : "");
    return answers;
  }
  std::vector<std::uint32_t> Publish(std::uint16_t member, const std::vector<Content>& contents, SettleEntry::What what = SettleEntry::kPublish, int node = 0) {
    std::vector<SettleEntry> entries;
    for (std::size_t i = 0; i < contents.size(); ++i) {
      ring[i] = PageOf(contents[i]);
      const std::uint64_t seed = content::SeedOfNode(5, node);
      entries.push_back({what, HashOf(ring[i].data(), kPage, seed), static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(node)});
    }
    return Settle(member, entries);
  }
};

TEST(Domain, OneFrameAContentAndStretchesOfOnesOwn) {
  World world;
  const std::uint16_t a = world.domain.Join(), b = world.domain.Join();
  const auto first = world.Publish(a, {1000, 1001, 1002, 1000});
  EXPECT_EQ(first[3], first[0]);
  EXPECT_EQ(first[1], first[0] + 1);
  EXPECT_EQ(first[2], first[0] + 2);
  const auto others = world.Publish(b, {2000, 1001, 2001});
  EXPECT_EQ(others[1], first[1]);
  EXPECT_EQ(others[2], others[0] + 1) << "beside what another member publishes";
  EXPECT_EQ(world.Publish(a, {1003})[0], first[0] + 3);
  EXPECT_EQ(world.domain.frames_live(), 6u);
  // A replica lies beside; of what nobody has it is the first.
  const auto replicas = world.Publish(a, {1000, 1000, 7777}, SettleEntry::kReplica);
  EXPECT_EQ(replicas[0], first[0] + 4);
  EXPECT_EQ(replicas[1], first[0] + 5);
  EXPECT_EQ(replicas[2], first[0] + 6);
  for (int i = 0; i < 200; ++i) world.Publish(a, {1000}, SettleEntry::kReplica);
  EXPECT_LE(world.domain.frames_live(), 7u + Domain::kMaxReplicas);
  world.domain.Gone(a);
  EXPECT_TRUE(world.domain.Holds(b, first[1]));
  world.domain.Gone(b);
  EXPECT_EQ(world.domain.frames_live(), 0u);
  EXPECT_EQ(world.domain.frames_given_out(), 0u);
  EXPECT_TRUE(world.files.bytes.empty());
  EXPECT_EQ(world.index.size(), 0u);
}

TEST(Domain, WhoHasLeftHoldsUntilItIsGone) {
  World world;
  const std::uint16_t a = world.domain.Join(), b = world.domain.Join();
  const Frame frame = world.Publish(a, {1})[0];
  world.domain.Leave(a);
  EXPECT_FALSE(world.domain.IsMember(a));
  EXPECT_EQ(world.files.bytes.size(), 1u) << "its children may map it";
  EXPECT_NE(world.domain.Join(), a) << "its number is still in use";
  EXPECT_EQ(world.Publish(b, {1})[0], frame);
  world.domain.Gone(a);
  EXPECT_TRUE(world.domain.Holds(b, frame));
  EXPECT_EQ(world.domain.Join(), a);
}

TEST(Domain, AcquiringNeedsTheHash) {
  World world;
  const std::uint16_t a = world.domain.Join(), b = world.domain.Join();
  const Frame frame = world.Publish(a, {50})[0];
  const std::uint32_t hash = HashOf(PageOf(50).data(), kPage, 5);
  EXPECT_EQ(world.Settle(b, {{SettleEntry::kAcquire, hash + 1, frame, 0}})[0], wire::kNoFrame);
  EXPECT_EQ(world.Settle(b, {{SettleEntry::kAcquire, hash, frame + 1, 0}})[0], wire::kNoFrame) << "given out, not written";
  EXPECT_EQ(world.Settle(b, {{SettleEntry::kAcquire, hash, wire::kFrameLimit - 1, 0}})[0], wire::kNoFrame);
  EXPECT_EQ(world.Settle(b, {{SettleEntry::kAcquire, hash, frame, 0}})[0], frame);
  EXPECT_EQ(world.domain.Release(a, &frame, 1), nullptr);
  EXPECT_EQ(world.files.bytes.size(), 1u);
  EXPECT_NE(world.domain.Release(a, &frame, 1), nullptr) << "it is not a's any more";
  EXPECT_EQ(world.domain.Release(b, &frame, 1), nullptr);
  EXPECT_TRUE(world.files.bytes.empty());
  EXPECT_EQ(world.Settle(b, {{SettleEntry::kAcquire, hash, frame, 0}})[0], wire::kNoFrame) << "free";
}

TEST(Domain, WhatIsDroppedIsPunchedAndItsPlaceKept) {
  World world;
  const std::uint16_t a = world.domain.Join(), b = world.domain.Join();
  const Frame frame = world.Publish(a, {50})[0];
  const std::uint32_t hash = HashOf(PageOf(50).data(), kPage, 5);
  EXPECT_EQ(world.Settle(b, {{SettleEntry::kAcquire, hash, frame, 0}})[0], frame);
  EXPECT_EQ(world.domain.Drop(a, &frame, 1), nullptr);
  EXPECT_NE(world.domain.Drop(a, &frame, 1), nullptr) << "once is enough";
  EXPECT_EQ(world.files.bytes.size(), 1u) << "the other one's";
  // Found again while it is there.
  EXPECT_EQ(world.Settle(a, {{SettleEntry::kAcquire, hash, frame, 0}})[0], frame);
  EXPECT_EQ(world.domain.Drop(a, &frame, 1), nullptr);
  EXPECT_EQ(world.domain.Release(b, &frame, 1), nullptr);
  EXPECT_TRUE(world.files.bytes.empty());
  EXPECT_EQ(world.index.size(), 0u);
  EXPECT_EQ(world.Settle(a, {{SettleEntry::kAcquire, hash, frame, 0}})[0], wire::kNoFrame) << "punched";
  EXPECT_GT(world.domain.frames_given_out(), Domain::kChunk - 1) << "a's mapping covers the place";
  EXPECT_NE(world.Publish(b, {50})[0], frame);
  EXPECT_EQ(world.domain.Release(a, &frame, 1), nullptr);
  EXPECT_NE(world.domain.Release(a, &frame, 1), nullptr);
  // Who has gone covers nothing.
  const Frame other = world.Publish(a, {51})[0];
  EXPECT_EQ(world.domain.Drop(a, &other, 1), nullptr);
  world.domain.Gone(a);
  world.domain.Gone(b);
  EXPECT_EQ(world.domain.frames_given_out(), 0u);
}

TEST(Domain, HostileMembersAndShortages) {
  World world;
  const std::uint16_t a = world.domain.Join();
  world.ring[0] = PageOf(1);
  world.Settle(a, {{SettleEntry::kPublish, HashOf(PageOf(2).data(), kPage, 5), 0, 0}}, true);
  EXPECT_EQ(world.domain.frames_live(), 0u);
  // Many contents of one hash: bounded, and the others go on.
  std::size_t taken = 0;
  for (Content c = 0; c < 70'000; c += 700) taken += world.Publish(a, {c})[0] != wire::kNoFrame;
  EXPECT_EQ(taken, static_cast<std::size_t>(Domain::kMaxContents));
  EXPECT_NE(world.Publish(a, {55})[0], wire::kNoFrame);
  for (int i = 1; i < Domain::kMaxMembers; ++i) EXPECT_LT(world.domain.Join(), Domain::kMaxMembers);
  EXPECT_EQ(world.domain.Join(), Domain::kMaxMembers);
  const auto live = world.domain.frames_live();
  world.files.may_write = 0;
  EXPECT_EQ(world.Publish(a, {56})[0], wire::kNoFrame);
  EXPECT_EQ(world.domain.frames_live(), live);
  world.files.may_write = 1;
  EXPECT_NE(world.Publish(a, {56})[0], wire::kNoFrame);
  // No more files: what is free is used to the last place.
  world.files.may_add = 0;
  std::size_t got = 0;
  for (Content c = 1'000'050; got < 2 * Domain::kFramesPerFile; c += 100) {
    if (world.Publish(a, {c})[0] == wire::kNoFrame) break;
    ++got;
  }
  EXPECT_EQ(world.domain.frames_live(), Domain::kFramesPerFile);
}

TEST(Domain, NodesAreKeptApart) {
  World world;
  world.domain.KeepNodesApart();
  const std::uint16_t a = world.domain.Join(), b = world.domain.Join();
  constexpr auto kPublish = SettleEntry::kPublish;
  const auto here = world.Publish(a, {1000, 1001}, kPublish, 0), there = world.Publish(a, {1000, 1001}, kPublish, 1);
  EXPECT_EQ(world.domain.frames_live(), 4u);
  EXPECT_EQ(here[1], here[0] + 1) << "a stretch on each node";
  EXPECT_EQ(there[1], there[0] + 1);
  const auto node_of = [&](Frame f) { return world.files.nodes.at(f / Domain::kChunk); };
  EXPECT_EQ(node_of(here[0]), 0u);
  EXPECT_EQ(node_of(there[0]), 1u);
  EXPECT_EQ(world.Publish(b, {1001}, kPublish, 1)[0], there[1]);
  EXPECT_EQ(world.Publish(b, {1001}, kPublish, 0)[0], here[1]);
  // The hash says of which node it is; a page of one does not pass for a page of the other.
  world.ring[0] = PageOf(1002);
  world.Settle(a, {{kPublish, HashOf(world.ring[0].data(), kPage, 5), 0, 1}}, true);
  world.Settle(a, {{kPublish, HashOf(world.ring[0].data(), kPage, content::SeedOfNode(5, 3)), 0, 3}}, true);
  EXPECT_EQ(world.Publish(a, {1002}, kPublish, 2)[0], wire::kNoFrame) << "a node that gives no memory";
  EXPECT_NE(world.Publish(a, {1002}, kPublish, 1)[0], wire::kNoFrame);
  world.domain.Gone(a);
  world.domain.Gone(b);
  EXPECT_EQ(world.domain.frames_given_out(), 0u);
  // Chunks that nobody uses change their node when they are used again.
  const std::uint16_t c = world.domain.Join();
  std::set<Frame> chunks;
  std::vector<std::uint32_t> got;
  for (Content i = 0; i < 4 * Domain::kChunk; ++i) {
    const Frame f = world.Publish(c, {10'050 + 100 * i}, kPublish, 1)[0];
    ASSERT_NE(f, wire::kNoFrame);
    ASSERT_EQ(node_of(f), 1u);
    chunks.insert(f / Domain::kChunk);
    got.push_back(f);
  }
  EXPECT_TRUE(chunks.contains(here[0] / Domain::kChunk));
  EXPECT_EQ(world.domain.Release(c, got.data(), got.size()), nullptr);
  for (Content i = 0; i < 4 * Domain::kChunk; ++i) ASSERT_EQ(node_of(world.Publish(c, {10'050 + 100 * i}, kPublish, 0)[0]), 0u);
}

TEST(Domain, WithoutNodesThereIsNone) {
  World world;
  const std::uint16_t a = world.domain.Join();
  world.ring[0] = PageOf(1);
  world.Settle(a, {{SettleEntry::kPublish, HashOf(world.ring[0].data(), kPage, content::SeedOfNode(5, 1)), 0, 1}}, true);
}

TEST(Domain, OffersMeet) {
  World world;
  const std::uint16_t a = world.domain.Join(), b = world.domain.Join();
  std::vector<std::pair<std::uint16_t, std::uint32_t>> wanted;
  const auto offer = [&](std::uint16_t member, std::vector<std::uint64_t> hashes) {
    wanted.clear();
    for (std::uint64_t& hash : hashes) hash = hash << 32 | hash;
    world.domain.Offer(
        member, hashes.data(), hashes.size(),
        [](void* out, std::uint16_t who, std::uint32_t hash) { static_cast<decltype(wanted)*>(out)->emplace_back(who, hash); }, &wanted);
    return wanted;
  };
  EXPECT_TRUE(offer(a, {1, 2, 3}).empty());
  EXPECT_EQ(offer(b, {2, 9}), (std::vector<std::pair<std::uint16_t, std::uint32_t>>{{a, 2}}));
  world.domain.Leave(a);
  EXPECT_TRUE(offer(b, {1, 3}).empty()) << "who has left is not asked";
}

TEST(Domain, AgreesWithAModel) {
  for (unsigned seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE(seed);
    World world;
    std::mt19937 random(seed);
    std::map<std::uint16_t, std::set<Frame>> holds, dropped;  // of members that are here, or have left
    std::set<std::uint16_t> here;
    std::multiset<Frame> held, covered;
    std::map<Frame, Content> content_of;
    world.files.held = &held;
    world.files.covered = &covered;
    const auto got = [&](std::uint16_t member, Frame f) {
      if (holds[member].insert(f).second) held.insert(f);
      if (dropped[member].erase(f)) covered.erase(covered.find(f));
    };
    const Content contents = seed % 3 ? 3000 : 40;
    for (int round = 0; round < 4000; ++round) {
      const unsigned what = random() % 100;
      if (here.empty() || (what < 4 && here.size() < 12)) {
        const std::uint16_t member = world.domain.Join();
        ASSERT_TRUE(here.insert(member).second);
        ASSERT_TRUE(holds[member].empty());
        continue;
      }
      const std::uint16_t member = *std::next(here.begin(), static_cast<std::ptrdiff_t>(random() % here.size()));
      if (what < 6) {
        world.domain.Leave(member);
        here.erase(member);
      } else if (what < 9) {
        // Somebody who has left is gone at last; or one that is here dies at once.
        std::vector<std::uint16_t> left;
        for (const auto& [m, unused] : holds) if (!here.contains(m)) left.push_back(m);
        const std::uint16_t who = left.empty() ? member : left[random() % left.size()];
        for (Frame f : holds[who]) held.erase(held.find(f));
        for (Frame f : dropped[who]) covered.erase(covered.find(f));
        holds.erase(who);
        dropped.erase(who);
        here.erase(who);
        world.domain.Gone(who);
      } else if (what < 60) {
        std::vector<Content> some(1 + random() % 40);
        for (Content& c : some) c = random() % contents;
        const auto frames = world.Publish(member, some, random() % 16 ? SettleEntry::kPublish : SettleEntry::kReplica);
        for (std::size_t i = 0; i < some.size(); ++i) {
          if (frames[i] == wire::kNoFrame) continue;
          ASSERT_EQ(world.files.bytes.at(frames[i]), PageOf(some[i]));
          got(member, frames[i]);
          content_of[frames[i]] = some[i];
        }
      } else if (what < 75) {
        // By the index, as a member does.
        const Content c = random() % contents;
        const PageBytes page = PageOf(c);
        const std::uint32_t hash = HashOf(page.data(), kPage, 5);
        std::vector<SettleEntry> entries;
        world.reader.Lookup(hash, [&](Frame f) { return entries.push_back({SettleEntry::kAcquire, hash, f, 0}), entries.size() < 8; });
        if (random() % 8 == 0) entries.push_back({SettleEntry::kAcquire, hash, static_cast<std::uint32_t>(random() % 4096), 0});
        if (entries.empty()) continue;
        for (const Frame f : world.Settle(member, entries)) {
          if (f == wire::kNoFrame) continue;
          ASSERT_TRUE(world.files.bytes.contains(f));
          got(member, f);
        }
      } else {
        const bool drops = what < 85;
        std::vector<std::uint32_t> some;
        for (Frame f : holds[member]) if (random() % 3 == 0) some.push_back(f);
        for (Frame f : dropped[member]) if (!drops && random() % 3 == 0) some.push_back(f);
        std::shuffle(some.begin(), some.end(), random);
        if (some.size() > wire::kMaxFrames) some.resize(wire::kMaxFrames);
        for (Frame f : some) {
          if (holds[member].erase(f)) held.erase(held.find(f));
          if (dropped[member].erase(f)) covered.erase(covered.find(f));
          if (drops) dropped[member].insert(f), covered.insert(f);
        }
        ASSERT_EQ(drops ? world.domain.Drop(member, some.data(), some.size()) : world.domain.Release(member, some.data(), some.size()), nullptr);
      }
      if (round % 16 == 0) {
        const std::set<Frame> live(held.begin(), held.end());
        ASSERT_EQ(world.domain.frames_live(), live.size());
        ASSERT_EQ(world.files.bytes.size(), live.size());
        ASSERT_EQ(world.index.size(), live.size());
        for (const auto& [m, frames] : holds) {
          for (Frame f : frames) ASSERT_TRUE(world.domain.Holds(m, f));
        }
      }
      if (::testing::Test::HasFailure()) return;
    }
    const std::size_t used = world.files.files;
    held.clear();
    covered.clear();
    for (const auto& [m, unused] : holds) world.domain.Gone(m);
    EXPECT_EQ(world.domain.frames_live(), 0u);
    EXPECT_EQ(world.domain.frames_given_out(), 0u);
    EXPECT_EQ(world.domain.members(), 0u);
    EXPECT_EQ(world.index.size(), 0u);
    EXPECT_LE(used, 1u) << "places are used again";
  }
}

}  // namespace
}  // namespace ksmu::broker
