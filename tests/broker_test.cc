// The broker's parts that need no socket: the decoder, the index that members read, the candidates.

#include "broker/candidates.h"
#include "broker/shared_index.h"
#include "broker/wire.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <thread>
#include <vector>

namespace ksmu::broker {
namespace {

// --- wire ----------------------------------------------------------------------------------------------------------

using wire::Kind;
using wire::Message;
using wire::Sender;

struct Packet {
  std::vector<std::byte> bytes = std::vector<std::byte>(wire::kMaxPacket);
  std::unique_ptr<Message> message = std::make_unique<Message>();

  explicit Packet(Kind kind, std::uint16_t count = 1, std::uint32_t number = 0) {
    message->header.kind = kind;
    message->header.count = count;
    message->header.number = number;
    message->words.fill(0);
    message->join.page_bytes = 4096;
    message->joined.log_entries = kLogEntries;
    if (kind == Kind::kRefused) message->words[0] = 1;
    Pack();
  }
  void Pack() {
    bytes.resize(wire::kMaxPacket);
    bytes.resize(wire::Encode(*message, bytes.data()));
  }
  // In memory of its very size: a sanitizer sees every byte that is read behind it.
  static const char* Decode(const std::vector<std::byte>& packet, Sender from, Message* out) {
    const std::unique_ptr<std::byte[]> exact(new std::byte[packet.size()]);
    std::copy(packet.begin(), packet.end(), exact.get());
    return wire::Decode(exact.get(), packet.size(), from, out);
  }
};

const struct {
  Kind kind;
  Sender from;
  bool numbered;
  std::uint16_t most;
} kKinds[] = {
    {Kind::kJoin, Sender::kMember, true, 1},
    {Kind::kFile, Sender::kMember, true, 1},
    {Kind::kSettle, Sender::kMember, true, wire::kMaxSettle},
    {Kind::kOffer, Sender::kMember, false, wire::kMaxOffers},
    {Kind::kRelease, Sender::kMember, false, wire::kMaxFrames},
    {Kind::kJoined, Sender::kBroker, true, 1},
    {Kind::kRefused, Sender::kBroker, true, 1},
    {Kind::kFileIs, Sender::kBroker, true, 1},
    {Kind::kSettled, Sender::kBroker, true, wire::kMaxSettle},
    {Kind::kWanted, Sender::kBroker, false, wire::kMaxHashes},
};

TEST(Wire, EveryKindComesBackAsItWent) {
  for (const auto& k : kKinds) {
    for (const std::uint16_t count : {std::uint16_t{1}, k.most}) {
      Packet packet(k.kind, count, k.numbered ? 77 : 0);
      for (std::size_t i = 0; i < count; ++i) {
        if (k.kind == Kind::kSettle) packet.message->settle[i] = {static_cast<std::uint32_t>(1 + i % 3), static_cast<std::uint32_t>(i * 977), static_cast<std::uint32_t>(i), 0};
        else if (k.kind == Kind::kOffer) packet.message->offers[i] = i * 0x9E3779B97F4A7C15u;
        else if (k.kind == Kind::kWanted) packet.message->words[i] = static_cast<std::uint32_t>(i * 2654435761u);
        else if (k.kind == Kind::kRelease) packet.message->words[i] = static_cast<std::uint32_t>(i * 65521);
        else if (k.kind == Kind::kSettled) packet.message->words[i] = i % 3 ? static_cast<std::uint32_t>(i) : wire::kNoFrame;
      }
      packet.Pack();
      const auto out = std::make_unique<Message>();
      EXPECT_EQ(Packet::Decode(packet.bytes, k.from, out.get()), nullptr) << static_cast<int>(k.kind) << " x " << count;
      std::vector<std::byte> again(wire::kMaxPacket);
      again.resize(wire::Encode(*out, again.data()));
      EXPECT_EQ(again, packet.bytes);
      // Nobody sends what is the other's to send.
      EXPECT_NE(Packet::Decode(packet.bytes, k.from == Sender::kMember ? Sender::kBroker : Sender::kMember, out.get()), nullptr);
    }
  }
}

TEST(Wire, LengthsCountsAndNumbersAreChecked) {
  const auto out = std::make_unique<Message>();
  for (const auto& k : kKinds) {
    const Packet good(k.kind, 1, k.numbered ? 5 : 0);
    for (std::size_t n = 0; n < good.bytes.size(); ++n) {
      const std::vector<std::byte> part(good.bytes.begin(), good.bytes.begin() + static_cast<std::ptrdiff_t>(n));
      EXPECT_NE(Packet::Decode(part, k.from, out.get()), nullptr) << n;
    }
    auto longer = good.bytes;
    longer.push_back(std::byte{0});
    EXPECT_NE(Packet::Decode(longer, k.from, out.get()), nullptr);
    // Each field of the header, to whatever it must not be.
    const auto with = [&](auto change) {
      auto bytes = good.bytes;
      wire::Header header;
      std::memcpy(&header, bytes.data(), sizeof header);
      change(header);
      std::memcpy(bytes.data(), &header, sizeof header);
      return Packet::Decode(bytes, k.from, out.get());
    };
    EXPECT_NE(with([](auto& h) { h.bytes += 4; }), nullptr);
    EXPECT_NE(with([](auto& h) { h.bytes = 0xffffffff; }), nullptr);
    EXPECT_NE(with([](auto& h) { h.kind = static_cast<Kind>(0); }), nullptr);
    EXPECT_NE(with([](auto& h) { h.kind = static_cast<Kind>(63); }), nullptr);
    EXPECT_NE(with([](auto& h) { h.count = 0; }), nullptr);
    EXPECT_NE(with([](auto& h) { h.count = 2; }), nullptr);
    EXPECT_NE(with([&](auto& h) { h.count = static_cast<std::uint16_t>(k.most + 1); }), nullptr);
    EXPECT_NE(with([](auto& h) { h.count = 0xffff; }), nullptr);
    EXPECT_NE(with([](auto& h) { h.reserved = 1; }), nullptr);
    EXPECT_NE(with([](auto& h) { h.number = h.number ? 0 : 9; }), nullptr);
  }
}

TEST(Wire, NumbersOutOfRangeAreRefused) {
  const auto out = std::make_unique<Message>();
  const auto refused = [&](Packet& packet, Sender from) {
    packet.Pack();
    return Packet::Decode(packet.bytes, from, out.get()) != nullptr;
  };
  {
    Packet p(Kind::kSettle, 2, 1);
    p.message->settle[1] = {0, 1, 1, 0};
    EXPECT_TRUE(refused(p, Sender::kMember));
    p.message->settle[1] = {wire::SettleEntry::kWhatCount, 1, 1, 0};
    EXPECT_TRUE(refused(p, Sender::kMember));
    p.message->settle[1] = {wire::SettleEntry::kPublish, 1, wire::kRingPages, 0};
    EXPECT_TRUE(refused(p, Sender::kMember));
    p.message->settle[1] = {wire::SettleEntry::kAcquire, 1, wire::kFrameLimit, 0};
    EXPECT_TRUE(refused(p, Sender::kMember));
    p.message->settle[1] = {wire::SettleEntry::kAcquire, 1, wire::kFrameLimit - 1, 0};
    EXPECT_FALSE(refused(p, Sender::kMember));
    p.message->settle[1].node = 1;
    EXPECT_TRUE(refused(p, Sender::kMember));
    p.message->settle[1] = {wire::SettleEntry::kPublish, 1, 0, wire::kMaxNodes - 1};
    EXPECT_FALSE(refused(p, Sender::kMember));
    p.message->settle[1].node = wire::kMaxNodes;
    EXPECT_TRUE(refused(p, Sender::kMember));
  }
  for (const auto& [kind, from, number, wrong] :
       {std::tuple{Kind::kRelease, Sender::kMember, 0u, wire::kFrameLimit}, {Kind::kRelease, Sender::kMember, 0u, wire::kNoFrame},
        {Kind::kFile, Sender::kMember, 1u, wire::kMaxFiles}, {Kind::kFileIs, Sender::kBroker, 1u, wire::kMaxFiles},
        {Kind::kSettled, Sender::kBroker, 1u, wire::kFrameLimit}, {Kind::kRefused, Sender::kBroker, 1u, 0u},
        {Kind::kRefused, Sender::kBroker, 1u, static_cast<std::uint32_t>(wire::Refusal::kCount)}}) {
    Packet p(kind, 1, number);
    p.message->words[0] = wrong;
    EXPECT_TRUE(refused(p, from)) << static_cast<int>(kind) << " " << wrong;
  }
  Packet join(Kind::kJoin, 1, 1), joined(Kind::kJoined, 1, 1);
  join.message->join.reserved = 1;
  EXPECT_TRUE(refused(join, Sender::kMember));
  joined.message->joined.log_entries = 0;
  EXPECT_TRUE(refused(joined, Sender::kBroker));
  joined.message->joined.log_entries = 48;
  EXPECT_TRUE(refused(joined, Sender::kBroker));
  joined.message->joined.log_entries = 64;
  joined.message->joined.by_node = 1;
  EXPECT_FALSE(refused(joined, Sender::kBroker));
  joined.message->joined.by_node = 2;
  EXPECT_TRUE(refused(joined, Sender::kBroker));
}

// Whatever comes: it is refused, or it is a message that encodes to the same bytes.
TEST(Wire, RandomBytes) {
  std::mt19937_64 random(1);
  const auto out = std::make_unique<Message>();
  int taken = 0;
  for (int round = 0; round < 50'000; ++round) {
    const auto& k = kKinds[random() % std::size(kKinds)];
    Packet packet(k.kind, static_cast<std::uint16_t>(1 + random() % std::min<std::size_t>(k.most, 9)), k.numbered ? 3 : 0);
    for (std::uint64_t flips = random() % 4; flips > 0; --flips) {
      packet.bytes[random() % packet.bytes.size()] ^= static_cast<std::byte>(1u << random() % 8);
    }
    if (random() % 8 == 0) packet.bytes.resize(random() % (packet.bytes.size() + 1));
    if (Packet::Decode(packet.bytes, k.from, out.get())) continue;
    ++taken;
    std::vector<std::byte> again(wire::kMaxPacket);
    again.resize(wire::Encode(*out, again.data()));
    ASSERT_EQ(again, packet.bytes);
  }
  EXPECT_GT(taken, 5'000);
  EXPECT_LT(taken, 45'000);
}

// --- the index -----------------------------------------------------------------------------------------------------

struct IndexFile {
  void* base = mmap(nullptr, kIndexFileBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  bool may_punch = true;
  std::size_t punched = 0;
  ~IndexFile() { munmap(base, kIndexFileBytes); }
  static int Punch(void* self, std::size_t offset, std::size_t bytes) {
    auto& file = *static_cast<IndexFile*>(self);
    if (!file.may_punch) return -1;
    file.punched += bytes;
    return madvise(static_cast<char*>(file.base) + offset, bytes, MADV_REMOVE);
  }
};

std::multiset<Frame> Found(const IndexReader& reader, std::uint32_t hash) {
  std::multiset<Frame> frames;
  reader.Lookup(hash, [&](Frame f) { return frames.insert(f), true; });
  return frames;
}

TEST(SharedIndex, AgreesWithAMap) {
  for (const bool may_punch : {true, false}) {
    IndexFile file;
    file.may_punch = may_punch;
    IndexWriter writer(file.base, &IndexFile::Punch, &file);
    const IndexReader reader(file.base, kIndexFileBytes);
    std::mt19937 random(7);
    std::multimap<std::uint32_t, Frame> model;
    std::vector<std::pair<std::uint32_t, Frame>> pairs;
    std::size_t largest = 0;
    bool became_smaller = false;
    // It grows to some hundred thousand, shrinks to nothing, over and over with tombstones.
    for (int round = 0; round < 900'000; ++round) {
      const bool grows = round % 600'000 < 300'000;
      if (pairs.empty() || random() % 8 < (grows ? 7u : 1u)) {
        const std::uint32_t hash = random() % 16 ? random() : random() % 64;
        const Frame frame = random() % wire::kFrameLimit;
        ASSERT_TRUE(writer.Insert(hash, frame));
        model.emplace(hash, frame);
        pairs.emplace_back(hash, frame);
      } else {
        std::swap(pairs[random() % pairs.size()], pairs.back());
        writer.Erase(pairs.back().first, pairs.back().second);
        for (auto [i, end] = model.equal_range(pairs.back().first); i != end; ++i) {
          if (i->second == pairs.back().second) {
            model.erase(i);
            break;
          }
        }
        pairs.pop_back();
      }
      largest = std::max(largest, writer.table_bytes());
      became_smaller |= writer.table_bytes() * 4 <= largest;
      if (round % 64 == 0) {
        const std::uint32_t hash = pairs.empty() || random() % 2 ? random() % 64 : pairs[random() % pairs.size()].first;
        std::multiset<Frame> expected;
        for (auto [i, end] = model.equal_range(hash); i != end; ++i) expected.insert(i->second);
        ASSERT_EQ(Found(reader, hash), expected) << round;
      }
      ASSERT_EQ(writer.size(), model.size());
    }
    EXPECT_GE(largest, 4 * kSmallestTable);
    EXPECT_TRUE(became_smaller);
    EXPECT_EQ(file.punched > 0, may_punch);
  }
}

TEST(SharedIndex, TheLogTellsWhatWasPublished) {
  IndexFile file;
  IndexWriter writer(file.base, &IndexFile::Punch, &file);
  const IndexReader reader(file.base, kIndexFileBytes);
  std::uint64_t position = 0;
  std::uint32_t next = 0;
  const auto read = [&] {
    return reader.ReadLog(&position, [&](std::uint32_t hash, Frame frame) {
      EXPECT_EQ(hash, next * 3);
      EXPECT_EQ(frame, next);
      ++next;
    });
  };
  std::uint32_t published = 0;
  const auto publish = [&](std::uint32_t n) {
    for (; n > 0; --n, ++published) ASSERT_TRUE(writer.Insert(published * 3, published));
  };
  EXPECT_TRUE(read());
  for (std::uint32_t n : {1u, 5u, 1000u, static_cast<std::uint32_t>(kLogEntries - 1)}) {
    publish(n);
    EXPECT_TRUE(read());
    EXPECT_EQ(next, published);
  }
  publish(kLogEntries + 10);
  next += 10;  // lost
  EXPECT_FALSE(read());
  EXPECT_EQ(next, published);
  EXPECT_TRUE(read());
}

// A reader that does not trust the writer stays within its mapping.
TEST(SharedIndex, AHostileHeader) {
  IndexFile file;
  IndexWriter writer(file.base, &IndexFile::Punch, &file);
  ASSERT_TRUE(writer.Insert(5, 6));
  auto* const header = static_cast<IndexHeader*>(file.base);
  const IndexReader reader(file.base, 4 * kSmallestTable);
  EXPECT_EQ(Found(reader, 5), std::multiset<Frame>{6});
  for (const std::uint64_t table : {std::uint64_t{0}, std::uint64_t{8}, std::uint64_t{kSmallestTable + 8}, std::uint64_t{kSmallestTable} * 4, ~std::uint64_t{0},
                                    std::uint64_t{1} << 63}) {
    header->table_bytes.store(table);
    EXPECT_TRUE(Found(reader, 5).empty()) << table;
  }
  // A table without an empty word ends, too.
  header->table_bytes.store(kSmallestTable);
  auto* const words = reinterpret_cast<std::uint64_t*>(static_cast<char*>(file.base) + kSmallestTable);
  std::fill_n(words, kSmallestTable / 8, 0xffff'ffff'ffff'ffff);
  EXPECT_TRUE(Found(reader, 0xffffffff).empty());
  header->log_head.store(~std::uint64_t{0} - 3);
  std::uint64_t position = 0;
  std::size_t seen = 0;
  EXPECT_FALSE(reader.ReadLog(&position, [&](std::uint32_t, Frame) { ++seen; }));
  EXPECT_LE(seen, kLogEntries);
}

// Beside a writer that grows and shrinks: what is found was published with that hash, and what stays is found in the end.
TEST(SharedIndex, ReadersBesideTheWriter) {
  IndexFile file;
  IndexWriter writer(file.base, &IndexFile::Punch, &file);
  const IndexReader reader(file.base, kIndexFileBytes);
  std::atomic<bool> done{false}, begun{false};
  std::atomic<std::uint64_t> wrong{0}, found{0}, published{0};
  std::thread other([&] {
    std::mt19937 random(3);
    std::uint64_t position = 0;
    begun.store(true);
    while (!done.load()) {
      const std::uint32_t n = random() % 200'000;
      reader.Lookup(n * 7, [&](Frame f) {
        ++found;
        wrong += f != n;
        return true;
      });
      reader.ReadLog(&position, [&](std::uint32_t hash, Frame f) {
        ++published;
        wrong += hash != f * 7;
      });
    }
  });
  while (!begun.load()) std::this_thread::yield();
  for (int round = 0; round < 3; ++round) {
    for (std::uint32_t n = 0; n < 200'000; ++n) ASSERT_TRUE(writer.Insert(n * 7, n));
    for (std::uint32_t n = 0; n < 200'000; ++n) writer.Erase(n * 7, n);
  }
  for (std::uint32_t n = 0; n < 1000; ++n) ASSERT_TRUE(writer.Insert(n * 7, n));
  done.store(true);
  other.join();
  EXPECT_EQ(wrong.load(), 0u);
  EXPECT_GT(found.load(), 0u);
  EXPECT_GT(published.load(), 0u);
  for (std::uint32_t n = 0; n < 1000; ++n) EXPECT_EQ(Found(reader, n * 7), std::multiset<Frame>{n});
}

// --- candidates ----------------------------------------------------------------------------------------------------

TEST(Candidates, TheOlderIsAskedAndTheNewerStays) {
  Candidates candidates;
  std::uint16_t before;
  EXPECT_FALSE(candidates.Offer(9, 1, &before));
  EXPECT_FALSE(candidates.Offer(9, 1, &before)) << "one's own offer again";
  EXPECT_TRUE(candidates.Offer(9, 2, &before));
  EXPECT_EQ(before, 1);
  EXPECT_TRUE(candidates.Offer(9, 1023, &before));
  EXPECT_EQ(before, 2) << "who was asked once and did not publish is asked no more";
  EXPECT_EQ(candidates.ForgetMember(1023, 0, 1 << 20), Candidates::kShards);
  EXPECT_EQ(candidates.size(), 0u);
  EXPECT_FALSE(candidates.Offer(9, 1, &before)) << "the number is used again, by another member";
  candidates.Forget(9);
  EXPECT_EQ(candidates.size(), 0u);
  EXPECT_FALSE(candidates.Offer(9, 2, &before));
}

// Each bit of the hash counts: who guesses a part of it learns nothing.
TEST(Candidates, AllBitsAreCompared) {
  constexpr std::uint64_t kHash = 0x123456789abcdef0;
  Candidates candidates;
  std::uint16_t before;
  EXPECT_FALSE(candidates.Offer(kHash, 1, &before));
  for (int bit = 0; bit < 64; ++bit) EXPECT_FALSE(candidates.Offer(kHash ^ std::uint64_t{1} << bit, 2, &before)) << bit;
  EXPECT_TRUE(candidates.Offer(kHash, 2, &before));
  EXPECT_EQ(before, 1);
}

TEST(Candidates, AgreesWithAMapAndForgetsTheDead) {
  Candidates candidates;
  std::map<std::uint64_t, std::uint16_t> model;
  std::mt19937 random(11);
  const auto hash_of = [](std::uint64_t n) { return n * 0x9E3779B97F4A7C15u; };
  for (int round = 0; round < 800'000; ++round) {
    const std::uint64_t hash = hash_of(random() % 200'000);
    const auto member = static_cast<std::uint16_t>(random() % 8);
    const auto known = model.find(hash);
    if (random() % 8 == 0) {
      candidates.Forget(hash);
      model.erase(hash);
    } else {
      std::uint16_t before;
      const bool asked = candidates.Offer(hash, member, &before);
      ASSERT_EQ(asked, known != model.end() && known->second != member) << round;
      if (asked) {
        ASSERT_EQ(before, known->second);
      }
      model[hash] = member;
    }
  }
  EXPECT_EQ(candidates.size(), model.size());
  const std::size_t empty = Candidates().bytes();
  EXPECT_LE(candidates.bytes() - empty, candidates.size() * 16);
  for (std::uint16_t member = 0; member < 8; ++member) {
    std::size_t steps = 0;
    for (std::size_t shard = 0; shard < Candidates::kShards; ++steps) shard = candidates.ForgetMember(member, shard, 1000);
    EXPECT_GT(steps, 1u);
    std::erase_if(model, [&](const auto& one) { return one.second == member; });
    ASSERT_EQ(candidates.size(), model.size());
  }
  EXPECT_EQ(candidates.size(), 0u);
}

TEST(Candidates, ThereIsAnEndToThem) {
  Candidates candidates;
  std::uint16_t before;
  for (std::uint64_t n = 0; n < 3 * Candidates::kMostInAShard; ++n) candidates.Offer(n, 1, &before);
  EXPECT_LE(candidates.size(), Candidates::kMostInAShard);
  EXPECT_LE(candidates.bytes() - Candidates().bytes(), Candidates::kMostInAShard * 16 * 2);
}

}  // namespace
}  // namespace ksmu::broker
