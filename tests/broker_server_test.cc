// The broker's server: its state, message by message, without sockets. broker_server_socket.cc: ksmud itself.

#include "broker/server.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <random>

#include "broker_server_client.h"
#include "test_support.h"

namespace ksmu::broker {
namespace {

using test::HashOf;
using test::MakePage;
using test::MakeRing;
using test::Mapping;
using test::Packet;
using test::PageOf;
using wire::Kind;
using wire::Message;
using wire::Refusal;
using wire::SettleEntry;
constexpr std::size_t kPage = test::kPage;
constexpr std::uint64_t kSeed = 77;

class FakeOutbox final : public Outbox {
 public:
  struct Peer {
    int takes = 1 << 30;  // packets, until it would block
    std::deque<Packet> packets;
    std::string dropped;  // why
    bool said_more = false;
  };
  bool Send(ConnId conn, const std::byte* bytes, std::size_t size, const int* descriptors, std::size_t count) override {
    Peer& peer = peers[conn];
    peer.said_more |= !peer.dropped.empty();
    if (peer.takes == 0) return false;
    --peer.takes;
    Packet& packet = peer.packets.emplace_back();
    EXPECT_EQ(wire::Decode(bytes, size, wire::Sender::kBroker, &packet.message), nullptr);
    for (std::size_t i = 0; i < count; ++i) packet.descriptors.emplace_back(fcntl(descriptors[i], F_DUPFD_CLOEXEC, 0));
    return true;
  }
  void Drop(ConnId conn, const char* reason) override {
    EXPECT_TRUE(peers[conn].dropped.empty());
    peers[conn].dropped = reason;
  }
  std::map<ConnId, Peer> peers;
};

class BrokerServer : public testing::Test {
 protected:
  BrokerServer() : server_({kPage, kSeed, [this](Level, const std::string& line) { log_.push_back(line); }, nullptr}, outbox_) {
    default_ = server_.AddListener("");
    named_ = server_.AddListener("shared");
  }
  ConnId Connect(std::uint32_t listener, std::uint32_t uid = 1000, std::int32_t pid = 5) {
    const ConnId conn = ++last_;
    return server_.Connected(conn, listener, {uid, pid}) ? conn : 0;
  }
  ConnId Connect() { return Connect(default_); }
  std::string Dropped(ConnId conn) { return outbox_.peers[conn].dropped; }
  void Deliver(ConnId conn, const Message& message, std::vector<Fd> descriptors = {}) {
    std::vector<std::byte> packet(wire::kMaxPacket);
    packet.resize(wire::Encode(message, packet.data()));
    packet.shrink_to_fit();
    server_.Received(conn, packet.data(), packet.size(), std::move(descriptors));
  }
  static std::unique_ptr<Message> Make(Kind kind, std::uint16_t count = 1, std::uint32_t number = 0) {
    auto message = std::make_unique<Message>();
    message->header = {0, kind, count, number, 0};
    return message;
  }
  static std::unique_ptr<Message> MakeJoin(std::uint32_t pages) {
    auto message = Make(Kind::kJoin, 1, 9);
    message->join = {wire::kVersion, kPage, pages, 0};
    return message;
  }
  static std::unique_ptr<Message> MakeWords(Kind kind, std::vector<std::uint32_t> words, std::uint32_t number = 0) {
    auto message = Make(kind, static_cast<std::uint16_t>(words.size()), number);
    if (kind == Kind::kOffer) std::transform(words.begin(), words.end(), message->offers.begin(), [](std::uint32_t w) { return std::uint64_t{w} << 32; });
    else std::copy(words.begin(), words.end(), message->words.begin());
    return message;
  }
  static std::unique_ptr<Message> MakeSettle(std::vector<SettleEntry> entries, std::uint32_t number = 1) {
    auto message = Make(Kind::kSettle, static_cast<std::uint16_t>(entries.size()), number);
    std::copy(entries.begin(), entries.end(), message->settle.begin());
    return message;
  }
  std::unique_ptr<Packet> Next(ConnId conn) {
    auto& packets = outbox_.peers[conn].packets;
    if (packets.empty()) return nullptr;
    auto packet = std::make_unique<Packet>(std::move(packets.front()));
    packets.pop_front();
    return packet;
  }
  static std::vector<Fd> One(Fd fd) {
    std::vector<Fd> all;
    all.push_back(std::move(fd));
    return all;
  }
  struct Member {
    ConnId conn = 0;
    Fd ring;
    std::unique_ptr<Packet> joined;
    Mapping canary, index;
  };
  Member Join(std::uint32_t listener, std::uint32_t uid = 1000, std::uint32_t pages = 16) {
    Member member;
    member.conn = Connect(listener, uid);
    member.ring = MakeRing(pages);
    Deliver(member.conn, *MakeJoin(pages), One(Fd(dup(member.ring.get()))));
    member.joined = Next(member.conn);
    if (!member.joined || member.joined->message.header.kind != Kind::kJoined || member.joined->descriptors.size() != 2) {
      ADD_FAILURE() << "not joined: " << Dropped(member.conn);
      return member;
    }
    member.index = Mapping(member.joined->descriptors[0].get(), 16 << 20, PROT_READ);
    member.canary = Mapping(member.joined->descriptors[1].get(), kPage, PROT_READ | PROT_WRITE);
    member.joined->descriptors.clear();
    EXPECT_TRUE(member.index && member.canary);
    return member;
  }
  // kNoFrame: no answer, too.
  std::uint32_t Publish(const Member& member, std::uint64_t number, std::uint32_t what = SettleEntry::kPublish) {
    const PageOf page = MakePage(number);
    EXPECT_EQ(pwrite(member.ring.get(), page.data(), kPage, 0), static_cast<ssize_t>(kPage));
    Deliver(member.conn, *MakeSettle({{what, HashOf(page, kSeed), 0, 0}}));
    const auto answer = Next(member.conn);
    return answer ? answer->message.words[0] : wire::kNoFrame;
  }
  std::uint32_t Acquire(const Member& member, std::uint32_t frame, std::uint64_t number) {
    Deliver(member.conn, *MakeSettle({{SettleEntry::kAcquire, HashOf(MakePage(number), kSeed), frame, 0}}));
    const auto answer = Next(member.conn);
    return answer ? answer->message.words[0] : wire::kNoFrame;
  }
  std::size_t Frames() {
    std::size_t frames = 0;
    for (const auto& domain : server_.Status()) frames += domain.frames;
    return frames;
  }

  FakeOutbox outbox_;
  std::vector<std::string> log_;
  Server server_;
  std::uint32_t default_ = 0, named_ = 0;
  ConnId last_ = 0;
};

TEST_F(BrokerServer, AMemberGetsWhatItNeedsAndNoMore) {
  const ConnId conn = Connect();
  Deliver(conn, *MakeJoin(8), One(MakeRing(8)));
  const auto joined = Next(conn);
  ASSERT_TRUE(joined);
  ASSERT_EQ(joined->message.header.kind, Kind::kJoined);
  EXPECT_EQ(joined->message.header.number, 9u);
  EXPECT_EQ(joined->message.joined.seed, kSeed);
  EXPECT_EQ(joined->message.joined.index_bytes, kIndexFileBytes);
  EXPECT_EQ(joined->message.joined.log_entries, kLogEntries);
  ASSERT_EQ(joined->descriptors.size(), 2u);
  const int index = joined->descriptors[0].get(), canary = joined->descriptors[1].get();
  struct stat about {};
  ASSERT_EQ(fstat(index, &about), 0);
  EXPECT_EQ(static_cast<std::size_t>(about.st_size), kIndexFileBytes);
  EXPECT_EQ(about.st_mode & 0777u, 0400u);
  EXPECT_EQ(fcntl(index, F_GETFL) & O_ACCMODE, O_RDONLY);
  EXPECT_FALSE(Mapping(index, kPage, PROT_READ | PROT_WRITE));
  EXPECT_EQ(fcntl(canary, F_GETFL) & O_ACCMODE, O_RDWR);
  EXPECT_TRUE(Mapping(canary, kPage, PROT_READ | PROT_WRITE));
}

TEST_F(BrokerServer, WhatOnePublishesAnotherFindsAndReads) {
  const Member a = Join(default_), b = Join(default_);
  const std::uint32_t frame = Publish(a, 1);
  ASSERT_NE(frame, wire::kNoFrame);
  std::uint32_t found = wire::kNoFrame;
  IndexReader(b.index.data(), 16 << 20).Lookup(HashOf(MakePage(1), kSeed), [&](Frame f) { return found = f, false; });
  EXPECT_EQ(found, frame);
  EXPECT_EQ(Acquire(b, frame, 1), frame);
  EXPECT_EQ(Acquire(b, frame, 2), wire::kNoFrame);  // another content
  EXPECT_EQ(Acquire(b, frame + 1, 1), wire::kNoFrame);
  Deliver(b.conn, *MakeWords(Kind::kFile, {0}, 4));
  const auto file = Next(b.conn);
  ASSERT_TRUE(file && file->message.header.kind == Kind::kFileIs && file->descriptors.size() == 1);
  EXPECT_EQ(file->message.header.number, 4u);
  const int fd = file->descriptors[0].get();
  PageOf read(kPage);
  ASSERT_EQ(pread(fd, read.data(), kPage, static_cast<off_t>(frame * kPage)), static_cast<ssize_t>(kPage));
  EXPECT_EQ(read, MakePage(1));
  EXPECT_EQ(pwrite(fd, read.data(), kPage, 0), -1);
  EXPECT_FALSE(Mapping(fd, kPage, PROT_READ | PROT_WRITE));
  EXPECT_EQ(fallocate(fd, 3, 0, kPage), -1);
  EXPECT_EQ(ftruncate(fd, 0), -1);
  const int seals = fcntl(fd, F_GET_SEALS);
  EXPECT_EQ(seals & (F_SEAL_SHRINK | F_SEAL_GROW), F_SEAL_SHRINK | F_SEAL_GROW);
  // Both let go of it.
  Deliver(a.conn, *MakeWords(Kind::kDrop, {frame}));
  EXPECT_EQ(Frames(), 1u);
  Deliver(b.conn, *MakeWords(Kind::kRelease, {frame}));
  EXPECT_EQ(Frames(), 0u);
  Deliver(a.conn, *MakeWords(Kind::kRelease, {frame}));
  EXPECT_EQ(Dropped(a.conn) + Dropped(b.conn), "");
  ASSERT_EQ(pread(fd, read.data(), kPage, static_cast<off_t>(frame * kPage)), static_cast<ssize_t>(kPage));
  EXPECT_EQ(read, PageOf(kPage));
}

TEST_F(BrokerServer, UsersMeetInNamedDomainsOnly) {
  const Member a = Join(default_, 1), b = Join(default_, 2), c = Join(named_, 1), d = Join(named_, 2);
  const std::uint32_t of_a = Publish(a, 1), of_c = Publish(c, 2);
  EXPECT_EQ(Acquire(b, of_a, 1), wire::kNoFrame);
  EXPECT_EQ(Acquire(c, of_a, 1), wire::kNoFrame);
  EXPECT_EQ(Acquire(d, of_c, 2), of_c);
  const auto all = server_.Status();
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[0].name, "default/1");
  EXPECT_EQ(all[1].name, "default/2");
  EXPECT_EQ(all[2].name, "shared");
  EXPECT_EQ(all[2].members, 2u);
  EXPECT_EQ(all[2].frames, 1u);
}

TEST_F(BrokerServer, NothingIsAnsweredBeforeAJoin) {
  for (const Kind kind : {Kind::kFile, Kind::kSettle, Kind::kOffer, Kind::kDrop, Kind::kRelease, Kind::kReport}) {
    const ConnId conn = Connect();
    const bool question = kind == Kind::kFile || kind == Kind::kSettle;
    auto message = Make(kind, 1, question ? 1 : 0);
    message->settle[0] = {SettleEntry::kPublish, 1, 0, 0};
    message->words[0] = 0;
    Deliver(conn, *message);
    EXPECT_EQ(Dropped(conn), "the first message is no join") << static_cast<int>(kind);
    EXPECT_TRUE(outbox_.peers[conn].packets.empty());
    Deliver(conn, *MakeJoin(4), One(MakeRing(4)));  // too late
    EXPECT_FALSE(outbox_.peers[conn].said_more);
  }
  EXPECT_EQ(server_.connections(), 0u);
}

TEST_F(BrokerServer, WhatIsWrongEndsTheMemberAndNothingElse) {
  const Member good = Join(default_);
  const std::uint32_t frame = Publish(good, 1);
  const struct {
    const char* why;
    std::unique_ptr<Message> message;
  } kCases[] = {
      {"a second join", MakeJoin(4)},
      {"a file is asked for that there is not", MakeWords(Kind::kFile, {1}, 3)},
      {"a place that its ring has not", MakeSettle({{SettleEntry::kPublish, 1, 4, 0}})},
      {"a place that its ring has not", MakeSettle({{SettleEntry::kAcquire, 1, 70000, 0}, {SettleEntry::kReplica, 1, 511, 0}})},
      {"a page that has not the hash that was claimed", MakeSettle({{SettleEntry::kPublish, 0xabcdef, 0, 0}})},
      {"a frame is released that is not held", MakeWords(Kind::kRelease, {frame})},
      {"a frame is dropped that is not held", MakeWords(Kind::kDrop, {frame})},
      {"a frame is released that is not held", MakeWords(Kind::kRelease, {wire::kFrameLimit - 1})},
      {"of a kind that is not sent from there", MakeWords(Kind::kWanted, {1})},
      {"of a kind that is not sent from there", MakeWords(Kind::kSettled, {1}, 5)},
      {"a number out of range", MakeWords(Kind::kRelease, {wire::kFrameLimit})},
      {"a question without a number, or a number without a question", MakeWords(Kind::kOffer, {1}, 5)},
  };
  for (const auto& c : kCases) {
    const Member member = Join(default_, 1000, 4);
    Deliver(member.conn, *c.message);
    EXPECT_EQ(Dropped(member.conn), c.why);
    EXPECT_NE(log_.back().find("member 5 (uid 1000) dropped: " + std::string(c.why)), std::string::npos) << log_.back();
  }
  {
    const std::byte bytes[3] = {};
    const Member member = Join(default_);
    server_.Received(member.conn, bytes, 3, {});
    EXPECT_EQ(Dropped(member.conn), "shorter than a header");
  }
  // All of them held nothing and are gone with their canaries.
  server_.Tick(10 * Server::kSecond);
  ASSERT_EQ(server_.Status().size(), 1u);
  EXPECT_EQ(server_.Status()[0].members, 1u);
  EXPECT_EQ(server_.Status()[0].left, 0u);
  EXPECT_EQ(Acquire(good, frame, 1), frame);
}

TEST_F(BrokerServer, WhatIsNoRingIsRefused) {
  const std::size_t before = test::OpenDescriptors();
  const auto attempt = [&](std::unique_ptr<Message> join, std::vector<Fd> descriptors) -> Refusal {
    const ConnId conn = Connect();
    Deliver(conn, *join, std::move(descriptors));
    const auto answer = Next(conn);
    EXPECT_NE(Dropped(conn), "");
    if (!answer || answer->message.header.kind != Kind::kRefused || answer->message.header.number != 9) return Refusal::kCount;
    return static_cast<Refusal>(answer->message.words[0]);
  };
  auto join = MakeJoin(4);
  join->join.version = wire::kVersion + 1;
  EXPECT_EQ(attempt(std::move(join), {}), Refusal::kVersion);
  join = MakeJoin(4);
  join->join.page_bytes = 16384;
  EXPECT_EQ(attempt(std::move(join), One(MakeRing(4))), Refusal::kPageSize);
  EXPECT_EQ(attempt(MakeJoin(4), {}), Refusal::kRing);
  std::vector<Fd> two = One(MakeRing(4));
  two.push_back(MakeRing(4));
  EXPECT_EQ(attempt(MakeJoin(4), std::move(two)), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(0), One(MakeRing(0))), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(wire::kRingPages + 1), One(MakeRing(wire::kRingPages + 1))), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(0x100000), One(MakeRing(4))), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(4), One(MakeRing(3))), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(4), One(MakeRing(5))), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(4), One(test::MakeMemfd(4 * kPage, 0))), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(4), One(test::MakeMemfd(4 * kPage, F_SEAL_GROW))), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(4), One(test::MakeMemfd(4 * kPage, F_SEAL_SHRINK))), Refusal::kRing);
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  EXPECT_EQ(attempt(MakeJoin(4), One(Fd(ends[0]))), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(4), One(Fd(ends[1]))), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(4), One(Fd(open("/dev/zero", O_RDWR)))), Refusal::kRing);
  EXPECT_EQ(attempt(MakeJoin(4), One(Fd(open("/", O_PATH)))), Refusal::kRing);
  {
    const Fd ring = MakeRing(4);
    const std::string path = "/proc/self/fd/" + std::to_string(ring.get());
    EXPECT_EQ(attempt(MakeJoin(4), One(Fd(open(path.c_str(), O_WRONLY)))), Refusal::kRing);
  }
  EXPECT_EQ(server_.connections(), 0u);
  EXPECT_EQ(test::OpenDescriptors(), before);
}

TEST_F(BrokerServer, DescriptorsThatNobodyAskedForAreClosed) {
  for (const Kind kind : {Kind::kOffer, Kind::kRelease, Kind::kReport, Kind::kFile, Kind::kJoin}) {
    Member member = Join(default_);
    const std::size_t before = test::OpenDescriptors();
    auto message = Make(kind, 1, kind == Kind::kFile || kind == Kind::kJoin ? 1 : 0);
    Deliver(member.conn, *message, One(Fd(open("/dev/null", O_RDONLY))));
    EXPECT_NE(Dropped(member.conn), "") << static_cast<int>(kind);
    // The member's ring, and nothing that came.
    EXPECT_LE(test::OpenDescriptors(), before);
  }
  const std::size_t before = test::OpenDescriptors();
  server_.Received(4711, nullptr, 0, One(Fd(open("/dev/null", O_RDONLY))));
  server_.Reject(4711, "unknown", One(Fd(open("/dev/null", O_RDONLY))));
  EXPECT_EQ(test::OpenDescriptors(), before);
}

TEST_F(BrokerServer, ARingThatIsWrittenMeanwhileHarmsNobody) {
  const Member member = Join(default_);
  EXPECT_NE(Publish(member, 1), wire::kNoFrame);
  // Punched: zeros, of another hash.
  const PageOf page = MakePage(2);
  ASSERT_EQ(pwrite(member.ring.get(), page.data(), kPage, 0), static_cast<ssize_t>(kPage));
  ASSERT_EQ(fallocate(member.ring.get(), 3, 0, kPage), 0);
  Deliver(member.conn, *MakeSettle({{SettleEntry::kPublish, HashOf(page, kSeed), 0, 0}}));
  EXPECT_EQ(Dropped(member.conn), "a page that has not the hash that was claimed");
}

// --- answers and what is wanted --------------------------------------------------------------------------------------

TEST_F(BrokerServer, AnAnswerThatDoesNotFitIsKept) {
  const Member member = Join(default_);
  EXPECT_TRUE(server_.MayRead(member.conn));
  EXPECT_FALSE(server_.WantsToWrite(member.conn));
  const std::uint32_t frame = Publish(member, 1);
  outbox_.peers[member.conn].takes = 0;
  Deliver(member.conn, *MakeWords(Kind::kFile, {0}, 21));
  EXPECT_FALSE(server_.MayRead(member.conn));
  EXPECT_TRUE(server_.WantsToWrite(member.conn));
  server_.Writable(member.conn);  // it was not, after all
  EXPECT_FALSE(server_.MayRead(member.conn));
  outbox_.peers[member.conn].takes = 1;
  server_.Writable(member.conn);
  EXPECT_TRUE(server_.MayRead(member.conn));
  EXPECT_FALSE(server_.WantsToWrite(member.conn));
  const auto file = Next(member.conn);
  ASSERT_TRUE(file && file->message.header.kind == Kind::kFileIs && file->descriptors.size() == 1);
  EXPECT_EQ(file->message.header.number, 21u);
  PageOf read(kPage);
  EXPECT_EQ(pread(file->descriptors[0].get(), read.data(), kPage, static_cast<off_t>(frame * kPage)), static_cast<ssize_t>(kPage));
  EXPECT_EQ(read, MakePage(1));
  // Of one that goes before it can be told.
  outbox_.peers[member.conn].takes = 0;
  Deliver(member.conn, *MakeWords(Kind::kFile, {0}, 22));
  server_.Disconnected(member.conn);
  EXPECT_EQ(server_.connections(), 0u);
}

TEST_F(BrokerServer, TheAnswerToAJoinIsKeptWithItsDescriptors) {
  const ConnId conn = Connect();
  outbox_.peers[conn].takes = 0;
  Deliver(conn, *MakeJoin(4), One(MakeRing(4)));
  EXPECT_FALSE(server_.MayRead(conn));
  outbox_.peers[conn].takes = 5;
  server_.Writable(conn);
  const auto joined = Next(conn);
  ASSERT_TRUE(joined && joined->descriptors.size() == 2);
  EXPECT_TRUE(Mapping(joined->descriptors[1].get(), kPage, PROT_READ | PROT_WRITE));
}

TEST_F(BrokerServer, OffersAreTurnedIntoWishes) {
  const Member a = Join(default_), b = Join(default_);
  Deliver(a.conn, *MakeWords(Kind::kOffer, {1, 2, 3}));
  Deliver(b.conn, *MakeWords(Kind::kOffer, {4, 3}));
  Deliver(b.conn, *MakeWords(Kind::kOffer, {1}));
  EXPECT_FALSE(Next(a.conn));
  server_.Flush();
  const auto wanted = Next(a.conn);
  ASSERT_TRUE(wanted && wanted->message.header.kind == Kind::kWanted);
  ASSERT_EQ(wanted->message.header.count, 2u);
  EXPECT_EQ(wanted->message.words[0], 3u);
  EXPECT_EQ(wanted->message.words[1], 1u);
  EXPECT_FALSE(Next(a.conn));
  EXPECT_FALSE(Next(b.conn));
  // Nobody is asked who has gone.
  server_.Disconnected(b.conn);
  Deliver(a.conn, *MakeWords(Kind::kOffer, {4}));
  server_.Flush();
  EXPECT_FALSE(Next(b.conn));
}

TEST_F(BrokerServer, WishesThatDoNotFitAreLostAndCounted) {
  const Member a = Join(default_), b = Join(default_);
  constexpr std::uint32_t kOffers = Server::kMaxWanted + 8 * wire::kMaxOffers;
  const auto offer_all = [&](const Member& member) {
    for (std::uint32_t first = 0; first < kOffers; first += wire::kMaxOffers) {
      std::vector<std::uint32_t> hashes(wire::kMaxOffers);
      for (std::uint32_t i = 0; i < hashes.size(); ++i) hashes[i] = std::rotl(first + i, 12);
      Deliver(member.conn, *MakeWords(Kind::kOffer, hashes));
      server_.Flush();
    }
  };
  outbox_.peers[a.conn].takes = 1;
  offer_all(a);
  offer_all(b);
  // One packet went out, the queue is full, and b was answered all the time.
  EXPECT_EQ(server_.Status()[0].wanted_lost, kOffers - wire::kMaxOffers - Server::kMaxWanted);
  EXPECT_TRUE(server_.MayRead(a.conn));
  EXPECT_TRUE(server_.WantsToWrite(a.conn));
  EXPECT_NE(Publish(b, 1), wire::kNoFrame);
  outbox_.peers[a.conn].takes = 1 << 30;
  server_.Writable(a.conn);
  std::uint32_t next = 0;
  bool told = false;
  while (const auto wanted = Next(a.conn)) {
    ASSERT_EQ(wanted->message.header.kind, Kind::kWanted);
    ASSERT_FALSE(told) << "after all that was kept";
    told = wanted->message.header.count == 0;
    for (std::size_t i = 0; i < wanted->message.header.count; ++i) ASSERT_EQ(wanted->message.words[i], std::rotl(next++, 12));
  }
  EXPECT_TRUE(told) << "that some were lost";
  EXPECT_EQ(next, wire::kMaxOffers + Server::kMaxWanted);
  EXPECT_FALSE(server_.WantsToWrite(a.conn));
}

// --- coming and going ------------------------------------------------------------------------------------------------

TEST_F(BrokerServer, WhatAMemberHoldsIsKeptWhileItsCanaryIsMapped) {
  Member a = Join(default_), b = Join(default_);
  const std::uint32_t frame = Publish(a, 1);
  ASSERT_NE(frame, wire::kNoFrame);
  server_.Disconnected(a.conn);
  for (std::uint64_t t = 1; t < 20; ++t) server_.Tick(t * Server::kSecond);
  EXPECT_EQ(server_.Status()[0].left, 1u);
  EXPECT_EQ(Frames(), 1u);
  EXPECT_EQ(Acquire(b, frame, 1), frame);
  a.canary = Mapping();
  server_.Tick(21 * Server::kSecond);
  EXPECT_EQ(server_.Status()[0].left, 0u);
  EXPECT_EQ(Frames(), 1u);  // b's
  b.canary = Mapping();
  server_.Disconnected(b.conn);
  EXPECT_TRUE(server_.Status().empty());  // asked at once
}

TEST_F(BrokerServer, WhoHasLeftIsAskedSoonAndThenOnceASecond) {
  Member a = Join(default_);
  std::uint64_t now = server_.Tick(50 * Server::kSecond);
  EXPECT_EQ(now, 51 * Server::kSecond);
  server_.Disconnected(a.conn);
  now = 50 * Server::kSecond;
  int asked = 0;
  while (now < 52 * Server::kSecond) {
    const std::uint64_t next = server_.Tick(now);
    ASSERT_GT(next, now);
    ASSERT_LE(next, now + Server::kSecond);
    now = next;
    ++asked;
  }
  EXPECT_GT(asked, 5);
  EXPECT_LT(asked, 15);
  a.canary = Mapping();
  server_.Tick(now + Server::kSecond);
  EXPECT_TRUE(server_.Status().empty());
}

TEST_F(BrokerServer, ACanaryInADescriptorCountsToo) {
  const ConnId conn = Connect();
  Deliver(conn, *MakeJoin(4), One(MakeRing(4)));
  auto joined = Next(conn);
  server_.Disconnected(conn);
  EXPECT_EQ(server_.Status().size(), 1u);
  // Forbidding seals, or growing it, changes nothing.
  EXPECT_NE(ftruncate(joined->descriptors[1].get(), 1 << 30), 0);
  fcntl(joined->descriptors[1].get(), F_ADD_SEALS, F_SEAL_SEAL);
  server_.Tick(Server::kSecond);
  EXPECT_EQ(server_.Status().size(), 1u);
  joined.reset();
  server_.Tick(3 * Server::kSecond);
  EXPECT_TRUE(server_.Status().empty());
}

// A write from memory whose faults nobody answers holds the file's lock. The broker is asked for all that it does with the files
// of such a member, and has to come back.
TEST_F(BrokerServer, AMemberThatHoldsItsFilesLockedIsNotWaitedFor) {
  const std::string why = ::ksmu::test::WhyNoUserfaultfd();
  if (!why.empty()) GTEST_SKIP() << why;
  const ConnId conn = Connect();
  const Fd ring = MakeRing(4);
  Deliver(conn, *MakeJoin(4), One(Fd(dup(ring.get()))));
  auto joined = Next(conn);
  ASSERT_TRUE(joined && joined->descriptors.size() == 2);
  const int canary = joined->descriptors[1].get();
  std::vector<pid_t> writers;
  for (const int file : {canary, ring.get()}) {
    writers.push_back(fork());
    if (writers.back() == 0) test::WriteForEver(file);
  }
  for (const pid_t pid : writers) EXPECT_TRUE(test::WaitUntilStopped(pid));
  const double start = ::ksmu::test::Now();
  const pid_t asker = fork();  // if it hangs, it is not us
  if (asker == 0) {
    Ring taken;
    PageOf page(kPage);
    const bool same = taken.Take(dup(ring.get()), 4, kPage) == nullptr;
    taken.Copy(1, page.data());
    server_.Disconnected(conn);
    server_.Tick(5 * Server::kSecond);
    _exit(same && server_.Status().size() == 1 ? 0 : 1);
  }
  int status = -1;
  EXPECT_TRUE(::ksmu::test::WaitUntil([&] { return waitpid(asker, &status, WNOHANG) == asker; }, 5)) << "it waits";
  EXPECT_EQ(status, 0);
  EXPECT_LT(::ksmu::test::Now() - start, 5);
  for (const pid_t pid : writers) {
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
  }
  if (status == -1) waitpid(asker, &status, 0);
}

TEST_F(BrokerServer, WhoConnectsAndDoesNotJoinIsDropped) {
  server_.Tick(100 * Server::kSecond);
  const ConnId early = Connect();
  const Member member = Join(default_);
  server_.Tick(105 * Server::kSecond);
  const ConnId late = Connect();
  server_.Tick(109 * Server::kSecond);
  EXPECT_EQ(Dropped(early), "");
  server_.Tick(110 * Server::kSecond);
  EXPECT_EQ(Dropped(early), "has connected and not joined");
  EXPECT_EQ(Dropped(late), "");
  server_.Tick(115 * Server::kSecond);
  EXPECT_EQ(Dropped(late), "has connected and not joined");
  EXPECT_EQ(Dropped(member.conn), "");
}

TEST_F(BrokerServer, OfOneUserOnlySoManyConnectWithoutJoining) {
  std::vector<ConnId> conns;
  for (int i = 0; i < Server::kMaxStrangers; ++i) conns.push_back(Connect(default_, 7));
  EXPECT_EQ(std::count(conns.begin(), conns.end(), 0u), 0);
  EXPECT_EQ(Connect(default_, 7), 0u);
  EXPECT_EQ(Connect(named_, 7), 0u);
  EXPECT_NE(Connect(default_, 8), 0u);
  Deliver(conns[0], *MakeJoin(4), One(MakeRing(4)));  // is none any more
  EXPECT_NE(Connect(default_, 7), 0u);
  server_.Disconnected(conns[1]);
  EXPECT_NE(Connect(default_, 7), 0u);
  EXPECT_EQ(Connect(default_, 7), 0u);
}

TEST_F(BrokerServer, ADomainIsFullAtSomeTime) {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit before = limit;
  limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, 8192);
  setrlimit(RLIMIT_NOFILE, &limit);
  if (limit.rlim_cur < 4096) GTEST_SKIP() << "too few descriptors may be open";
  const std::size_t descriptors = test::OpenDescriptors();
  std::vector<Member> members;
  for (int i = 0; i < Domain::kMaxMembers; ++i) members.push_back(Join(named_, static_cast<std::uint32_t>(i)));
  const ConnId conn = Connect(named_);
  Deliver(conn, *MakeJoin(4), One(MakeRing(4)));
  auto answer = Next(conn);
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->message.header.kind, Kind::kRefused);
  EXPECT_EQ(answer->message.words[0], static_cast<std::uint32_t>(Refusal::kFull));
  // Elsewhere there is room; and here, once somebody has gone.
  Join(default_);
  members.back().canary = Mapping();
  server_.Disconnected(members.back().conn);
  members.back() = Join(named_);
  EXPECT_NE(Publish(members.back(), 3), wire::kNoFrame);
  for (const Member& member : members) server_.Disconnected(member.conn);
  members.clear();
  answer.reset();
  server_.Tick(Server::kSecond);
  EXPECT_EQ(server_.Status().size(), 1u);
  outbox_.peers.clear();
  // The one member elsewhere: its canary, and its domain's index twice. (Its ring is the broker's, too.)
  EXPECT_LE(test::OpenDescriptors(), descriptors + 4);
  setrlimit(RLIMIT_NOFILE, &before);
}

TEST_F(BrokerServer, WithoutDescriptorsAJoinIsRefusedAndLeavesNothing) {
  const std::size_t before = test::OpenDescriptors();
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  int refused = 0;
  const auto lowest = static_cast<rlim_t>(Fd(dup(0)).get());
  for (rlim_t more = 1; more < 16; ++more) {
    const ConnId conn = Connect();
    std::vector<Fd> ring = One(MakeRing(4));
    const rlimit little{lowest + more, limit.rlim_max};
    setrlimit(RLIMIT_NOFILE, &little);
    Deliver(conn, *MakeJoin(4), std::move(ring));
    setrlimit(RLIMIT_NOFILE, &limit);
    const auto answer = Next(conn);
    ASSERT_TRUE(answer);
    if (answer->message.header.kind == Kind::kRefused) {
      ++refused;
      EXPECT_EQ(answer->message.words[0], static_cast<std::uint32_t>(Refusal::kFull));
      EXPECT_TRUE(server_.Status().empty());
      EXPECT_EQ(test::OpenDescriptors(), before);
    }
    server_.Disconnected(conn);
  }
  EXPECT_GE(refused, 3);
  EXPECT_LT(refused, 15);
}

// Reports are added up; whoever leaves takes its own along.
TEST_F(BrokerServer, ReportsAreAddedUp) {
  const Member a = Join(default_), b = Join(default_);
  auto report = Make(Kind::kReport);
  report->report.merged = 5;
  report->report.cpu_ns = 100;
  Deliver(a.conn, *report);
  Deliver(a.conn, *report);  // in place of the one before
  report->report.merged = 7;
  Deliver(b.conn, *report);
  EXPECT_EQ(server_.Status()[0].reports.merged, 12u);
  EXPECT_EQ(server_.Status()[0].reports.cpu_ns, 200u);
  server_.Disconnected(b.conn);
  EXPECT_EQ(server_.Status()[0].reports.merged, 5u);
}

// Members that send anything in any order, over sockets that take a packet now and then.
TEST_F(BrokerServer, NothingThatIsSentBreaksIt) {
  const std::size_t descriptors = test::OpenDescriptors();
  std::mt19937_64 random(20261128);
  const auto pick = [&](std::uint64_t n) { return random() % n; };
  std::vector<Member> members;
  std::uint64_t now = 0;
  std::size_t dropped = 0, joined = 0, answers = 0;
  const int steps = std::getenv("KSMU_TEST_LONG") ? 2'000'000 : 60'000;
  for (int step = 0; step < steps; ++step) {
    if (members.size() < 6 || pick(400) == 0) {
      Member fresh;
      fresh.conn = Connect(pick(2) ? named_ : default_, static_cast<std::uint32_t>(pick(3)));
      fresh.ring = MakeRing(8);
      if (pick(8)) {
        Deliver(fresh.conn, *MakeJoin(8), One(Fd(dup(fresh.ring.get()))));
        auto packet = Next(fresh.conn);
        if (packet && packet->descriptors.size() == 2) fresh.canary = Mapping(packet->descriptors[1].get(), kPage, PROT_READ | PROT_WRITE), ++joined;
      }
      members.push_back(std::move(fresh));
    }
    const std::size_t at = pick(members.size());
    Member& m = members[at];
    const auto page_number = [&] { return pick(40); };
    std::unique_ptr<Message> message;
    switch (pick(16)) {
      case 0: message = MakeWords(Kind::kFile, {static_cast<std::uint32_t>(pick(60) ? 0 : 1)}, 1); break;
      case 1: message = MakeWords(Kind::kOffer, {static_cast<std::uint32_t>(pick(50)), static_cast<std::uint32_t>(pick(50))}); break;
      case 2: message = MakeWords(Kind::kRelease, {static_cast<std::uint32_t>(pick(30))}); break;
      case 3: message = MakeWords(Kind::kDrop, {static_cast<std::uint32_t>(pick(30))}); break;
      case 4: message = Make(Kind::kReport); break;
      case 5: message = pick(30) ? nullptr : MakeJoin(8); break;
      case 6:
        server_.Disconnected(m.conn);
        members.erase(members.begin() + static_cast<std::ptrdiff_t>(at));
        continue;
      case 7: server_.Tick(now += pick(Server::kSecond)); continue;
      case 8: outbox_.peers[m.conn].takes = static_cast<int>(pick(4)); continue;
      case 9:
        outbox_.peers[m.conn].takes = 5;
        if (server_.WantsToWrite(m.conn)) server_.Writable(m.conn);
        continue;
      default: {
        std::vector<SettleEntry> entries;
        for (std::uint32_t place = 0; place < 4; ++place) {
          const PageOf page = MakePage(page_number());
          if (pwrite(m.ring.get(), page.data(), kPage, static_cast<off_t>(place * kPage)) != static_cast<ssize_t>(kPage)) ADD_FAILURE();
          const auto what = static_cast<std::uint32_t>(1 + pick(3));
          entries.push_back({what, HashOf(page, kSeed) + (pick(200) == 0), what == SettleEntry::kAcquire ? static_cast<std::uint32_t>(pick(40)) : place, 0});
        }
        message = MakeSettle(std::move(entries));
      }
    }
    if (!message || !server_.MayRead(m.conn)) continue;
    std::vector<std::byte> packet(wire::kMaxPacket);
    packet.resize(wire::Encode(*message, packet.data()));
    if (pick(50) == 0) packet[pick(packet.size())] ^= static_cast<std::byte>(1 << pick(8));
    if (pick(300) == 0) packet.resize(pick(packet.size() + 1));
    server_.Received(m.conn, packet.data(), packet.size(), pick(500) ? std::vector<Fd>() : One(Fd(open("/dev/null", O_RDONLY))));
    if (pick(3) == 0) server_.Flush();
    auto& peer = outbox_.peers[m.conn];
    EXPECT_FALSE(peer.said_more);
    answers += peer.packets.size();
    peer.packets.clear();
    if (!peer.dropped.empty()) {
      ++dropped;
      members.erase(members.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
  EXPECT_GT(dropped, 500u);
  EXPECT_GT(joined, 500u);
  EXPECT_GT(answers, 5000u);
  for (Member& m : members) server_.Disconnected(m.conn);
  members.clear();
  outbox_.peers.clear();
  server_.Tick(now + 60 * Server::kSecond);
  EXPECT_TRUE(server_.Status().empty());
  EXPECT_EQ(server_.connections(), 0u);
  EXPECT_EQ(test::OpenDescriptors(), descriptors);
}

}  // namespace
}  // namespace ksmu::broker
