// Operators of a broker, message by message: their wire, and the server's answers, beside members that are silent or lie.

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "broker/control.h"
#include "broker/nodes.h"
#include "broker/server.h"
#include "broker_server_client.h"
#include "content/content.h"
#include "engine/tunables.h"

namespace ksmu::broker {
namespace {

using control::Kind;
using control::Message;
constexpr std::uint32_t kOwner = 1000, kOther = 1001;
constexpr std::uint64_t kMs = 1'000'000;

class Box final : public Outbox {
 public:
  bool Send(ConnId conn, const std::byte* bytes, std::size_t size, const int*, std::size_t) override {
    if (full[conn]) return false;
    sent[conn].emplace_back(bytes, bytes + size);
    return true;
  }
  void Drop(ConnId conn, const char* reason) override { dropped[conn] = reason; }
  std::map<ConnId, std::deque<std::vector<std::byte>>> sent;
  std::map<ConnId, std::string> dropped;
  std::map<ConnId, bool> full;
};

class Operators : public testing::Test {
 protected:
  explicit Operators(std::function<Pressure()> pressure = nullptr)
      : server_({.page_bytes = test::kPage, .seed = 1, .log = nullptr, .dispose = nullptr, .owner = kOwner, .pressure = std::move(pressure), .cpus = 4}, box_), default_(server_.AddListener("")),
        shared_(server_.AddListener("shared")) {
    server_.Tick(now_);
  }
  ConnId Join(std::uint32_t listener, std::uint32_t uid, std::int32_t pid) {
    const ConnId conn = ++last_;
    EXPECT_TRUE(server_.Connected(conn, listener, {uid, pid}));
    auto join = std::make_unique<wire::Message>();
    join->header = {0, wire::Kind::kJoin, 1, 9, 0};
    join->join = {wire::kVersion, test::kPage, 4, 0};
    std::vector<Fd> ring;
    ring.push_back(test::MakeRing(4));
    const test::Mapping pages(ring[0].get(), 4 * test::kPage, PROT_READ | PROT_WRITE);
    for (std::size_t i = 0; i < 4; ++i) std::memcpy(pages.data() + i * test::kPage, test::MakePage(i).data(), test::kPage);
    FromMember(conn, *join, std::move(ring));
    const auto joined = HearMember(conn);
    EXPECT_EQ(joined->header.kind, wire::Kind::kJoined);
    joined_by_node_ = joined->joined.by_node != 0;
    return conn;
  }
  // The frame that it gets for what lies at `place` in its ring, which is another page at every place; or none.
  std::uint32_t Publish(ConnId conn, std::uint32_t place) {
    auto settle = std::make_unique<wire::Message>();
    settle->header = {0, wire::Kind::kSettle, 1, ++settled_, 0};
    settle->settle[0] = {wire::SettleEntry::kPublish, test::HashOf(test::MakePage(place), content::SeedOfNode(1, 0)), place, 0};
    FromMember(conn, *settle);
    const auto answer = HearMember(conn);
    EXPECT_EQ(answer->header.kind, wire::Kind::kSettled);
    return answer->words[0];
  }
  void FromMember(ConnId conn, const wire::Message& message, std::vector<Fd> descriptors = {}) {
    std::vector<std::byte> packet(wire::kMaxPacket);
    packet.resize(wire::Encode(message, packet.data()));
    server_.Received(conn, packet.data(), packet.size(), std::move(descriptors));
  }
  std::unique_ptr<wire::Message> HearMember(ConnId conn) {
    server_.Flush();
    auto message = std::make_unique<wire::Message>();
    auto& packets = box_.sent[conn];
    if (packets.empty()) return message;
    EXPECT_EQ(wire::Decode(packets.front().data(), packets.front().size(), wire::Sender::kBroker, message.get()), nullptr);
    packets.pop_front();
    return message;
  }
  void AnswerTuned(ConnId conn, const wire::Message& told, std::uint32_t error) {
    auto tuned = std::make_unique<wire::Message>();
    tuned->header = {0, wire::Kind::kTuned, told.header.count, told.header.number, 0};
    for (std::size_t i = 0; i < told.header.count; ++i) tuned->tuned[i] = {told.tune[i].tunable, error};
    FromMember(conn, *tuned);
  }
  ConnId Operate(std::uint32_t listener, std::uint32_t uid) {
    const ConnId conn = ++last_;
    EXPECT_TRUE(server_.Connected(conn, listener, {uid, 7}));
    out_.header = control::MakeHeader(Kind::kOperate, 1, 1);
    out_.operate = {};
    Ask(conn);
    EXPECT_TRUE(Hear(conn) && in_.kind() == Kind::kWelcome);
    own_ = in_.welcome.own_domain;
    return conn;
  }
  void Ask(ConnId conn) {
    std::vector<std::byte> packet(control::kMaxPacket);
    packet.resize(control::Encode(out_, packet.data()));
    server_.Received(conn, packet.data(), packet.size(), {});
  }
  bool Hear(ConnId conn) {
    auto& packets = box_.sent[conn];
    if (packets.empty()) return false;
    EXPECT_EQ(control::Decode(packets.front().data(), packets.front().size(), control::Sender::kBroker, &in_), nullptr);
    packets.pop_front();
    return true;
  }
  void AskToSet(ConnId conn, std::uint32_t tunable, std::int64_t value, std::uint32_t pid = 0) {
    out_.header = control::MakeHeader(Kind::kSet, 1, 2);
    out_.set = {own_, pid, tunable, 0, value};
    Ask(conn);
  }
  int Failure(ConnId conn) { return Hear(conn) && in_.kind() == Kind::kFailed ? static_cast<int>(in_.word) : 0; }
  int SetFails(ConnId conn, std::uint32_t tunable, std::int64_t value, std::uint32_t pid = 0) {
    AskToSet(conn, tunable, value, pid);
    return Failure(conn);
  }
  void AskToExplain(ConnId conn, std::uint32_t pid, std::uint64_t from = 0) {
    out_.header = control::MakeHeader(Kind::kExplain, 1, 3);
    out_.explain = {own_, pid, from};
    Ask(conn);
  }
  void Tell(ConnId conn, std::uint32_t number, std::vector<wire::RegionEntry> regions) {
    auto told = std::make_unique<wire::Message>();
    told->header = {0, wire::Kind::kTold, static_cast<std::uint16_t>(regions.size()), number, 0};
    std::copy(regions.begin(), regions.end(), told->regions.begin());
    FromMember(conn, *told);
  }
  void Pass(std::uint64_t ms) { server_.Tick(now_ += ms * kMs); }

  Box box_;
  Server server_;
  std::uint64_t now_ = kMs;
  std::uint32_t default_, shared_, own_ = 0;
  ConnId last_ = 0;
  std::uint32_t settled_ = 0;
  bool joined_by_node_ = false;
  Message out_, in_;
};

wire::RegionEntry Region(std::uint64_t start, std::uint64_t end, std::uint64_t next) {
  wire::RegionEntry region;
  region.start = start, region.end = end, region.next = next;
  return region;
}

// Every byte of the header and every length.
TEST(ControlWire, IsChecked) {
  auto message = std::make_unique<Message>(), out = std::make_unique<Message>();
  message->header = control::MakeHeader(Kind::kSet, 1, 5);
  message->set = {1, 2, 3, 0, 4};
  std::vector<std::byte> good(control::kMaxPacket);
  good.resize(control::Encode(*message, good.data()));
  ASSERT_EQ(control::Decode(good.data(), good.size(), control::Sender::kOperator, out.get()), nullptr);
  EXPECT_EQ(out->set.value, 4);
  EXPECT_NE(control::Decode(good.data(), good.size(), control::Sender::kBroker, out.get()), nullptr);
  for (std::size_t n = 0; n < good.size(); ++n) EXPECT_NE(control::Decode(good.data(), n, control::Sender::kOperator, out.get()), nullptr) << n;
  for (const std::size_t at : {0u, 4u, 6u, 12u, 28u}) {
    auto bad = good;
    bad[at] ^= std::byte{0x40};
    EXPECT_NE(control::Decode(bad.data(), bad.size(), control::Sender::kOperator, out.get()), nullptr) << at;
  }
  message->header.number = 0;
  good.resize(control::Encode(*message, good.data()));
  EXPECT_NE(control::Decode(good.data(), good.size(), control::Sender::kOperator, out.get()), nullptr);
}

TEST(ControlWire, RegionsLeadOn) {
  const std::vector<wire::RegionEntry> good = {Region(4096, 8192, 8192), Region(8192, 16384, 0)};
  EXPECT_EQ(wire::CheckRegions(good.data(), good.size()), nullptr);
  const auto bad = [&](auto change) {
    auto regions = good;
    change(regions);
    return wire::CheckRegions(regions.data(), regions.size()) != nullptr;
  };
  EXPECT_TRUE(bad([](auto& r) { r[1].start = 4096; }));
  EXPECT_TRUE(bad([](auto& r) { r[0].end = r[0].start; }));
  EXPECT_TRUE(bad([](auto& r) { r[0].next = 0; }));
  EXPECT_TRUE(bad([](auto& r) { r[1].next = 12288; }));
  EXPECT_TRUE(bad([](auto& r) { r[1].end = ~std::uint64_t{0}; }));
  EXPECT_TRUE(bad([](auto& r) { r[0].merged = 2; }));
  EXPECT_TRUE(bad([](auto& r) { r[0].unmerged[31] = ~std::uint64_t{0}; }));
  EXPECT_TRUE(bad([](auto& r) { r[0].flags = 1; }));
}

TEST_F(Operators, WhatMayBeSetIsByRulesAndRights) {
  const ConnId owner = Operate(default_, kOwner), root = Operate(default_, 0);
  const ConnId other = Operate(default_, kOther);
  EXPECT_EQ(SetFails(other, engine::kTunable_run, 0), EPERM);
  EXPECT_EQ(SetFails(other, engine::kTunable_run, 99), EPERM);
  Operate(default_, kOwner);  // own_
  for (const ConnId conn : {owner, root}) {
    EXPECT_EQ(SetFails(conn, engine::kTunable_run, 3), EINVAL);
    EXPECT_EQ(SetFails(conn, engine::kTunable_run, -1), EINVAL);
    EXPECT_EQ(SetFails(conn, engine::kTunableCount, 1), ENOENT);
    EXPECT_EQ(SetFails(conn, engine::kTunable_run, 1, 5), ESRCH);
  }
  EXPECT_EQ(SetFails(owner, engine::kTunable_advisor_mode, 1), 0);
  EXPECT_EQ(SetFails(owner, engine::kTunable_pages_to_scan, 5), EINVAL);
}

// What is set for all is in every domain, and in those to come; and says so for all in one answer.
TEST_F(Operators, SetForAllDomains) {
  const ConnId one = Join(default_, kOwner, 50), two = Join(shared_, kOther, 51), owner = Operate(default_, kOwner), other = Operate(default_, kOther);
  const auto for_all = [&](ConnId conn, std::uint32_t tunable, std::int64_t value) {
    out_.header = control::MakeHeader(Kind::kSet, 1, 2);
    out_.set = {control::kNoDomain, 0, tunable, 0, value};
    Ask(conn);
  };
  for_all(other, engine::kTunable_smart_scan, 0);
  EXPECT_EQ(Failure(other), EPERM);
  for_all(owner, engine::kTunable_smart_scan, 2);
  EXPECT_EQ(Failure(owner), EINVAL);
  for_all(owner, engine::kTunable_smart_scan, 0);
  EXPECT_FALSE(Hear(owner));
  for (const ConnId member : {one, two}) {
    const auto told = HearMember(member);
    ASSERT_EQ(told->header.kind, wire::Kind::kTune);
    ASSERT_EQ(told->header.count, 1);
    EXPECT_EQ(told->tune[0].tunable, engine::kTunable_smart_scan);
    EXPECT_EQ(told->tune[0].value, 0);
    EXPECT_FALSE(Hear(owner)) << "answered before all have";
    AnswerTuned(member, *told, member == two ? EBUSY : 0);
    Pass(10);
  }
  ASSERT_TRUE(Hear(owner));
  EXPECT_EQ(in_.done.done, 1u);
  EXPECT_EQ(in_.done.refused, 1u);
  EXPECT_EQ(in_.done.failures[0].pid, 51u);
  // One that comes later, to a domain that there was not.
  const ConnId later = Join(default_, 1234, 52);
  const auto told = HearMember(later);
  ASSERT_EQ(told->header.kind, wire::Kind::kTune);
  EXPECT_EQ(told->tune[0].tunable, engine::kTunable_smart_scan);
  out_.header = control::MakeHeader(Kind::kDefaults, 1, 3);
  out_.word = 0;
  Ask(owner);
  ASSERT_TRUE(Hear(owner) && in_.kind() == Kind::kDefaultsAre);
  EXPECT_EQ(in_.defaults.set, 1u << engine::kTunable_smart_scan);
  EXPECT_EQ(in_.defaults.tunables[engine::kTunable_smart_scan], 0);
  EXPECT_EQ(in_.defaults.tunables[engine::kTunable_run], 1);
}

// Domains that have got nothing of their own are forgotten all the same.
TEST_F(Operators, DomainsAreForgottenAfterSomethingWasSetForAll) {
  const ConnId owner = Operate(default_, kOwner);
  out_.header = control::MakeHeader(Kind::kSet, 1, 2);
  out_.set = {control::kNoDomain, 0, engine::kTunable_smart_scan, 0, 0};
  Ask(owner);
  ASSERT_TRUE(Hear(owner) && in_.kind() == Kind::kSetDone);
  const ConnId member = Join(default_, 1234, 52);
  const auto count = [&] {
    out_.header = control::MakeHeader(Kind::kDomains, 1, 4);
    out_.word = 0;
    Ask(owner);
    EXPECT_TRUE(Hear(owner));
    return in_.header.count;
  };
  EXPECT_EQ(count(), 2);
  server_.Disconnected(member);
  Pass(2000);
  Pass(2000);
  EXPECT_EQ(count(), 1);
}

TEST_F(Operators, TheLimitOfFramesIsOfNow) {
  const ConnId member = Join(default_, kOwner, 50), owner = Operate(default_, kOwner), other = Operate(default_, kOther);
  const auto limit = [&](ConnId conn, std::uint64_t frames) {
    out_.header = control::MakeHeader(Kind::kLimit, 1, 2);
    out_.word = frames;
    Ask(conn);
    return Failure(conn);
  };
  EXPECT_EQ(limit(other, 5), EPERM);
  EXPECT_EQ(limit(owner, 1), 0);
  EXPECT_NE(Publish(member, 0), wire::kNoFrame);
  EXPECT_EQ(Publish(member, 1), wire::kNoFrame);
  EXPECT_EQ(limit(owner, 0), 0);
  EXPECT_NE(Publish(member, 1), wire::kNoFrame);
}

// While nothing is shared: members are let go, and what they join then is another domain, by another rule.
TEST_F(Operators, NodesAreKeptApartFromNowOn) {
  const ConnId member = Join(default_, kOwner, 50), owner = Operate(default_, kOwner);
  const std::uint32_t frame = Publish(member, 0);
  ASSERT_NE(frame, wire::kNoFrame);
  EXPECT_EQ(SetFails(owner, engine::kTunable_merge_across_nodes, 0), EBUSY);
  EXPECT_EQ(SetFails(owner, engine::kTunable_merge_across_nodes, 1), 0) << "as it is";
  EXPECT_EQ(SetFails(owner, engine::kTunable_merge_across_nodes, 0, 50), EINVAL) << "of one member";
  auto drop = std::make_unique<wire::Message>();
  for (const auto kind : {wire::Kind::kDrop, wire::Kind::kRelease}) {
    drop->header = {0, kind, 1, 0, 0};
    drop->words[0] = frame;
    FromMember(member, *drop);
  }
  Pass(10);
  if (const char* why = nodes::WhyNot()) {
    EXPECT_EQ(SetFails(owner, engine::kTunable_merge_across_nodes, 0), EOPNOTSUPP);
    GTEST_SKIP() << why;
  }
  EXPECT_EQ(SetFails(owner, engine::kTunable_merge_across_nodes, 0), 0);
  EXPECT_FALSE(box_.dropped[member].empty());
  const ConnId again = Join(default_, kOwner, 50);
  EXPECT_TRUE(joined_by_node_);
  EXPECT_NE(Publish(again, 0), wire::kNoFrame);
  EXPECT_EQ(SetFails(owner, engine::kTunable_merge_across_nodes, 1), EBUSY);
  // What was there before goes when nobody can have it mapped any more, and takes nothing of the new one with it.
  for (int i = 0; i < 5; ++i) Pass(1000);
  EXPECT_EQ(server_.Status().size(), 1u);
  EXPECT_EQ(server_.Status()[0].frames, 1u);
}

TEST_F(Operators, OthersAreShownTheirOwnDomainAlone) {
  Join(default_, kOwner, 50);
  Join(default_, kOther, 51);
  Join(shared_, kOther, 52);
  const auto names = [&](ConnId conn) {
    out_.header = control::MakeHeader(Kind::kDomains, 1, 4);
    out_.word = 0;
    Ask(conn);
    EXPECT_TRUE(Hear(conn));
    std::vector<std::string> all;
    for (std::size_t i = 0; i < in_.header.count; ++i) all.emplace_back(NameOf(in_.domains[i]));
    return all;
  };
  const ConnId other = Operate(default_, kOther);
  EXPECT_EQ(names(other), std::vector<std::string>{"default/1001"});
  const std::uint32_t others = own_;
  AskToExplain(other, 51);
  EXPECT_FALSE(Hear(other));  // it is asked
  const ConnId owner = Operate(default_, kOwner);
  EXPECT_EQ(names(owner).size(), 3u);
  const ConnId third = Operate(default_, 1002);
  own_ = others;
  AskToExplain(third, 51);
  EXPECT_EQ(Failure(third), ENOENT);
  // In a domain that several users share, each is shown the regions of its own processes alone.
  const ConnId guest = Operate(shared_, 1002);
  AskToExplain(guest, 52);
  EXPECT_EQ(Failure(guest), EPERM);
}

TEST_F(Operators, MembersAreToldAndAnswered) {
  const ConnId a = Join(default_, kOwner, 50), b = Join(default_, kOwner, 51), op = Operate(default_, kOwner);
  AskToSet(op, engine::kTunable_run, 0);
  EXPECT_FALSE(Hear(op));
  const auto to_a = HearMember(a), to_b = HearMember(b);
  ASSERT_EQ(to_a->header.kind, wire::Kind::kTune);
  EXPECT_EQ(to_a->tune[0].tunable, engine::kTunable_run);
  EXPECT_EQ(to_a->tune[0].value, 0);
  EXPECT_EQ(to_a->tune[0].yields, 0u) << "an operator's wish goes before the program's";
  AnswerTuned(a, *to_a, 0);
  Pass(10);
  EXPECT_FALSE(Hear(op));
  AnswerTuned(b, *to_b, ENOMEM);
  Pass(10);
  ASSERT_TRUE(Hear(op));
  EXPECT_EQ(in_.done.done, 1u);
  EXPECT_EQ(in_.done.refused, 1u);
  EXPECT_EQ(in_.done.failures[0].pid, 51u);
  EXPECT_EQ(in_.done.failures[0].error, std::uint32_t{ENOMEM});
  // Who comes later is told, too.
  const ConnId c = Join(default_, kOwner, 52);
  EXPECT_EQ(HearMember(c)->tune[0].value, 0);
}

// Who is silent is told once, whatever is set meanwhile; and of all of it when it has answered.
TEST_F(Operators, ASilentMemberHoldsUpNobody) {
  const ConnId a = Join(default_, kOwner, 50), op = Operate(default_, kOwner);
  for (int value = 5; value < 8; ++value) {
    AskToSet(op, engine::kTunable_sleep_millisecs, value);
    server_.Flush();
    Pass(999);
    EXPECT_FALSE(Hear(op));
    Pass(2);
    ASSERT_TRUE(Hear(op));
    EXPECT_EQ(in_.done.silent, 1u);
    EXPECT_EQ(in_.done.failures[0].error, std::uint32_t{ETIMEDOUT});
  }
  const auto first = HearMember(a);
  EXPECT_EQ(first->tune[0].value, 5);
  EXPECT_TRUE(box_.sent[a].empty());
  AnswerTuned(a, *first, 0);
  EXPECT_EQ(HearMember(a)->tune[0].value, 7);
  // An answer to nothing.
  AnswerTuned(a, *first, 0);
  EXPECT_EQ(box_.dropped[a], "an answer about tunables that it was not told of");
}

TEST_F(Operators, RegionsAreAskedForOneQuestionAtATime) {
  const ConnId a = Join(default_, kOwner, 50), one = Operate(default_, kOwner), two = Operate(default_, 0);
  Operate(default_, kOwner);  // own_
  AskToExplain(one, 50, 4096);
  AskToExplain(two, 50, 0);
  const auto asked = HearMember(a);
  ASSERT_EQ(asked->header.kind, wire::Kind::kAsk);
  EXPECT_EQ(asked->ask.from, 4096u);
  EXPECT_TRUE(box_.sent[a].empty());
  Tell(a, asked->header.number, {Region(4096, 8192, 0)});
  ASSERT_TRUE(Hear(one));
  EXPECT_EQ(in_.regions[0].end, 8192u);
  Pass(10);
  const auto again = HearMember(a);
  EXPECT_EQ(again->ask.from, 0u);
  Pass(1001);
  EXPECT_EQ(Failure(two), ETIMEDOUT);
  // Late: for nobody. And what lies before the question is no answer.
  Tell(a, again->header.number, {});
  EXPECT_FALSE(Hear(two));
  AskToExplain(one, 50, 1 << 20);
  Tell(a, HearMember(a)->header.number, {Region(4096, 8192, 8192)});
  EXPECT_EQ(box_.dropped[a], "regions that lie before what it was asked for");
  Pass(10);
  EXPECT_EQ(Failure(one), ESRCH);
}

TEST_F(Operators, NumbersThatCannotBeAreNotBelieved) {
  const ConnId a = Join(default_, kOwner, 50);
  auto report = std::make_unique<wire::Message>();
  report->header = {0, wire::Kind::kReport, 1, 0, 0};
  report->report.counters[3] = std::int64_t{1} << 60;
  FromMember(a, *report);
  EXPECT_EQ(box_.dropped[a], "a count out of range");
}

TEST_F(Operators, WhoTakesNoAnswersIsDropped) {
  const ConnId op = Operate(default_, kOwner);
  box_.full[op] = true;
  out_.header = control::MakeHeader(Kind::kDomains, 1, 4);
  Ask(op);
  EXPECT_FALSE(server_.MayRead(op));
  Pass(9000);
  EXPECT_EQ(box_.dropped[op], "");
  Pass(1001);
  EXPECT_NE(box_.dropped[op], "");
  for (int i = 0; i < Server::kMaxOperators; ++i) Operate(default_, kOther);
  const ConnId more = ++last_;
  ASSERT_TRUE(server_.Connected(more, default_, {kOther, 7}));
  out_.header = control::MakeHeader(Kind::kOperate, 1, 1);
  out_.operate = {};
  Ask(more);
  EXPECT_EQ(Failure(more), EAGAIN);
  EXPECT_NE(box_.dropped[more], "");
}

// Each is told what was made of its own wish, also when another's has been answered before all have answered to it.
class TwoWishes : public Operators {
 protected:
  // One of two members is asked by both operators before the other has answered to the first.
  void Try(std::uint32_t first_error, std::uint32_t second_error) {
    const ConnId quick = Join(default_, kOwner, 50), slow = Join(default_, kOwner, 51), one = Operate(default_, kOwner), two = Operate(default_, kOwner);
    const auto answer = [&](ConnId member, std::int64_t value, std::uint32_t error) {
      const auto told = HearMember(member);
      ASSERT_EQ(told->header.kind, wire::Kind::kTune);
      ASSERT_EQ(told->tune[0].value, value);
      AnswerTuned(member, *told, error);
    };
    const auto is_done = [&](ConnId op, bool refused) {
      Pass(10);
      ASSERT_TRUE(Hear(op) && in_.kind() == Kind::kSetDone);
      EXPECT_EQ(in_.done.done, refused ? 1u : 2u);
      EXPECT_EQ(in_.done.refused, refused ? 1u : 0u);
      EXPECT_EQ(in_.done.silent, 0u);
    };
    AskToSet(one, engine::kTunable_remerge_seconds, 70);
    answer(quick, 70, first_error);
    AskToSet(two, engine::kTunable_remerge_seconds, 71);
    answer(quick, 71, second_error);
    answer(slow, 70, 0);
    is_done(one, first_error != 0);
    answer(slow, 71, 0);
    is_done(two, second_error != 0);
  }
};
TEST_F(TwoWishes, ARefusalStaysOne) { Try(EBUSY, 0); }
TEST_F(TwoWishes, AnothersRefusalIsNone) { Try(0, EBUSY); }

// What is set for a process is set in all of its connections, and in nobody else's.
TEST_F(Operators, AProcessCanHaveMoreConnectionsThanOne) {
  const ConnId old = Join(default_, kOwner, 50), other = Join(default_, kOwner, 51), now = Join(default_, kOwner, 50), op = Operate(default_, kOwner);
  AskToSet(op, engine::kTunable_smart_scan, 0, 50);
  for (const ConnId member : {old, now}) {
    EXPECT_FALSE(Hear(op)) << "answered before all have";
    const auto told = HearMember(member);
    ASSERT_EQ(told->header.kind, wire::Kind::kTune);
    EXPECT_EQ(told->tune[0].tunable, engine::kTunable_smart_scan);
    AnswerTuned(member, *told, 0);
    Pass(10);
  }
  EXPECT_NE(HearMember(other)->header.kind, wire::Kind::kTune);
  ASSERT_TRUE(Hear(op) && in_.kind() == Kind::kSetDone);
  EXPECT_EQ(in_.done.done, 2u);
  EXPECT_EQ(in_.done.silent, 0u);
  // Of an earlier one the process may know nothing any more.
  AskToExplain(op, 50);
  EXPECT_NE(HearMember(old)->header.kind, wire::Kind::kAsk);
  EXPECT_EQ(HearMember(now)->header.kind, wire::Kind::kAsk);
}

// With a tuner, on a machine that has memory enough.
class Tuned : public Operators {
 protected:
  Tuned() : Operators([] { return Pressure{100u << 20, 90u << 20, -1}; }) {}
  // What it reports: everything as it is at first, but for this.
  void Report(ConnId conn, std::map<std::uint32_t, std::int64_t> but = {}) {
    auto report = std::make_unique<wire::Message>();
    report->header = {0, wire::Kind::kReport, 1, 0, 0};
    for (std::size_t t = 0; t < engine::kTunableCount; ++t) report->report.tunables[t] = engine::kTunableRules[t].preset;
    for (const auto& [tunable, value] : but) report->report.tunables[tunable] = value;
    FromMember(conn, *report);
  }
  // What it has been told since the last time, by tunable; it has done it, or not.
  std::map<std::uint32_t, std::int64_t> Told(ConnId conn, std::uint32_t error = 0) {
    std::map<std::uint32_t, std::int64_t> told;
    for (;;) {
      const auto message = HearMember(conn);
      if (message->header.kind != wire::Kind::kTune) return told;
      for (std::size_t i = 0; i < message->header.count; ++i) {
        told[message->tune[i].tunable] = message->tune[i].value;
        yields_ = message->tune[i].yields != 0;
      }
      AnswerTuned(conn, *message, error);
    }
  }
  std::uint32_t TunerOf(ConnId op) {
    out_.header = control::MakeHeader(Kind::kDomains, 1, 4);
    out_.word = own_ - 1;
    Ask(op);
    EXPECT_TRUE(Hear(op) && in_.kind() == Kind::kDomainsAre);
    return in_.domains[0].tuner;
  }
  bool yields_ = false;  // the last of what somebody was told
};
using TunedValues = std::map<std::uint32_t, std::int64_t>;

TEST_F(Tuned, WhoJoinsMaySpendMoreForAWhile) {
  const ConnId member = Join(default_, kOwner, 50);
  Pass(1000);
  EXPECT_EQ(Told(member), TunedValues{}) << "nothing before it has said what it has";
  Report(member);
  Pass(1000);
  EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_cpu_limit_percent, 50}}));
  Report(member, {{engine::kTunable_cpu_limit_percent, 50}});
  for (int i = 0; i < 15; ++i) Pass(1000);
  EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_cpu_limit_percent, 10}}));
  // Two minutes in which nothing happens.
  for (int i = 0; i < 120; ++i) Pass(1000);
  EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_cpu_limit_percent, 2}, {engine::kTunable_pages_to_scan, 1000}, {engine::kTunable_sleep_millisecs, 1000}}));
}

TEST_F(Tuned, AProgramsOwnWishIsLeftAlone) {
  const ConnId own = Join(default_, kOwner, 50), later = Join(default_, kOwner, 51);
  for (const ConnId conn : {own, later}) Report(conn);
  Pass(1000);
  // The program knows what it has set a moment ago, and so it is the member that says so.
  EXPECT_EQ(Told(own, EEXIST), (TunedValues{{engine::kTunable_cpu_limit_percent, 50}}));
  EXPECT_TRUE(yields_);
  EXPECT_EQ(Told(later), (TunedValues{{engine::kTunable_cpu_limit_percent, 50}}));
  // It has another idea after all.
  Pass(10);
  Report(later, {{engine::kTunable_cpu_limit_percent, 44}});
  for (int i = 0; i < 20; ++i) Pass(1000);
  EXPECT_EQ(Told(own), TunedValues{});
  EXPECT_EQ(Told(later, EEXIST), (TunedValues{{engine::kTunable_cpu_limit_percent, 10}}));
  for (int i = 0; i < 120; ++i) Pass(1000);
  for (const ConnId conn : {own, later}) EXPECT_EQ(Told(conn), (TunedValues{{engine::kTunable_pages_to_scan, 1000}, {engine::kTunable_sleep_millisecs, 1000}}));
}

// A report can have been made before what was told just now, and come after the answer: that says nothing of anybody's wishes.
TEST_F(Tuned, AReportThatComesLateIsNoWish) {
  const ConnId member = Join(default_, kOwner, 50);
  Report(member);
  Pass(1000);
  EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_cpu_limit_percent, 50}}));
  Pass(10);
  Report(member);
  for (int i = 0; i < 15; ++i) Pass(1000);
  EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_cpu_limit_percent, 10}}));
}

// What an operator sets for one does not yield, also where the tuner has set it before.
TEST_F(Tuned, AnOperatorsWishDoesNotYield) {
  const ConnId member = Join(default_, kOwner, 50), op = Operate(default_, kOwner);
  Report(member);
  Pass(1000);
  EXPECT_EQ(Told(member, EEXIST), (TunedValues{{engine::kTunable_cpu_limit_percent, 50}}));
  AskToSet(op, engine::kTunable_cpu_limit_percent, 70, 50);
  EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_cpu_limit_percent, 70}}));
  EXPECT_FALSE(yields_);
  Pass(10);
  ASSERT_TRUE(Hear(op));
  EXPECT_EQ(in_.done.done, 1u);
  EXPECT_EQ(in_.done.refused, 0u);
}

// Batches are for idle members alone.
TEST_F(Tuned, IdleMembersReadInBatchesUntilItEnds) {
  const ConnId member = Join(default_, kOwner, 50);
  Report(member);
  for (int i = 0; i < 120; ++i) {
    Pass(1000);
    Told(member);
  }
  const TunedValues idle = {{engine::kTunable_cpu_limit_percent, 2}, {engine::kTunable_pages_to_scan, 1000}, {engine::kTunable_sleep_millisecs, 1000}};
  Report(member, idle);
  const ConnId op = Operate(default_, kOwner);
  EXPECT_EQ(TunerOf(op), 1 + static_cast<std::uint32_t>(Tuner::State::kIdle));
  for (const auto& [tunable, value] : idle) EXPECT_EQ(in_.domains[0].tunables[tunable], value);
  const ConnId other = Join(default_, kOwner, 51);
  Report(other);
  Pass(1000);
  EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_cpu_limit_percent, 50}, {engine::kTunable_pages_to_scan, 0}, {engine::kTunable_sleep_millisecs, 20}}));
  EXPECT_EQ(Told(other), (TunedValues{{engine::kTunable_cpu_limit_percent, 50}}));
}

// pages_to_scan is the advisor's where that is on, and 0 when it has been.
TEST_F(Tuned, AMembersAdvisorHasItsPagesToScan) {
  const ConnId member = Join(default_, kOwner, 50), op = Operate(default_, kOwner);
  const auto pass = [&](int seconds) {
    TunedValues told;
    for (int i = 0; i < seconds; ++i) {
      Pass(1000);
      for (const auto& [tunable, value] : Told(member)) told[tunable] = value;
    }
    return told;
  };
  const auto set_advisor = [&](std::int64_t mode) {
    AskToSet(op, engine::kTunable_advisor_mode, mode, 50);
    EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_advisor_mode, mode}}));
    Pass(10);
    EXPECT_TRUE(Hear(op) && in_.kind() == Kind::kSetDone);
  };
  Report(member);
  EXPECT_EQ(pass(120).count(engine::kTunable_pages_to_scan), 1u);
  // It is idle, and stays so.
  set_advisor(1);
  // The report that says so is late: it is told, refuses, and is asked no more.
  Pass(1000);
  EXPECT_EQ(Told(member, EINVAL), (TunedValues{{engine::kTunable_pages_to_scan, 1000}}));
  Report(member, {{engine::kTunable_advisor_mode, 1}});
  EXPECT_EQ(pass(60), TunedValues{});
  set_advisor(0);
  Report(member);
  EXPECT_EQ(pass(5), (TunedValues{{engine::kTunable_pages_to_scan, 1000}}));
}

TEST_F(Tuned, AnOperatorEndsIt) {
  const ConnId member = Join(default_, kOwner, 50), other = Join(default_, kOwner, 51), op = Operate(default_, kOwner);
  for (const ConnId conn : {member, other}) Report(conn);
  Pass(1000);
  for (const ConnId conn : {member, other}) EXPECT_EQ(Told(conn), (TunedValues{{engine::kTunable_cpu_limit_percent, 50}}));
  EXPECT_EQ(control::kTunerWords > TunerOf(op) ? TunerOf(op) : 0, 1 + static_cast<std::uint32_t>(Tuner::State::kJoined));
  EXPECT_EQ(in_.domains[0].tunables[engine::kTunable_cpu_limit_percent], 50);
  // For one: that one keeps it.
  AskToSet(op, engine::kTunable_cpu_limit_percent, 70, 51);
  EXPECT_EQ(Told(other), (TunedValues{{engine::kTunable_cpu_limit_percent, 70}}));
  Pass(10);
  ASSERT_TRUE(Hear(op));
  for (int i = 0; i < 15; ++i) Pass(1000);
  EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_cpu_limit_percent, 10}}));
  EXPECT_EQ(Told(other), TunedValues{});
  for (int i = 0; i < 120; ++i) Pass(1000);
  EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_cpu_limit_percent, 2}, {engine::kTunable_pages_to_scan, 1000}, {engine::kTunable_sleep_millisecs, 1000}}));
  EXPECT_EQ(Told(other), (TunedValues{{engine::kTunable_pages_to_scan, 1000}, {engine::kTunable_sleep_millisecs, 1000}}));
  // Something that is none of its business.
  AskToSet(op, engine::kTunable_smart_scan, 0);
  for (const ConnId conn : {member, other}) EXPECT_EQ(Told(conn), (TunedValues{{engine::kTunable_smart_scan, 0}}));
  Pass(10);
  ASSERT_TRUE(Hear(op));
  EXPECT_NE(TunerOf(op), 0u);
  // For the domain: all of it is taken back, but what is set.
  AskToSet(op, engine::kTunable_sleep_millisecs, 77);
  EXPECT_EQ(Told(member), (TunedValues{{engine::kTunable_cpu_limit_percent, 10}, {engine::kTunable_pages_to_scan, 0}, {engine::kTunable_sleep_millisecs, 77}}));
  EXPECT_EQ(Told(other), (TunedValues{{engine::kTunable_pages_to_scan, 0}, {engine::kTunable_sleep_millisecs, 77}}));
  Pass(10);
  ASSERT_TRUE(Hear(op));
  EXPECT_EQ(TunerOf(op), 0u);
  for (int i = 0; i < 300; ++i) Pass(1000);
  EXPECT_EQ(Told(member), TunedValues{});
  const ConnId later = Join(default_, kOwner, 52);
  Report(later);
  Pass(1000);
  EXPECT_EQ(Told(later), (TunedValues{{engine::kTunable_sleep_millisecs, 77}, {engine::kTunable_smart_scan, 0}}));
}

}  // namespace
}  // namespace ksmu::broker
