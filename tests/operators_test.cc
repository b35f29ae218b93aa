// Operators of a broker, message by message: their wire, and the server's answers, beside members that are silent or lie.

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "broker/control.h"
#include "broker/server.h"
#include "broker_server_client.h"
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
  Operators()
      : server_({.page_bytes = test::kPage, .seed = 1, .log = nullptr, .dispose = nullptr, .owner = kOwner}, box_), default_(server_.AddListener("")),
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
    FromMember(conn, *join, std::move(ring));
    EXPECT_EQ(HearMember(conn)->header.kind, wire::Kind::kJoined);
    return conn;
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
    EXPECT_EQ(SetFails(conn, engine::kTunable_merge_across_nodes, 0), EOPNOTSUPP);
  }
  EXPECT_EQ(SetFails(owner, engine::kTunable_advisor_mode, 1), 0);
  EXPECT_EQ(SetFails(owner, engine::kTunable_pages_to_scan, 5), EINVAL);
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

}  // namespace
}  // namespace ksmu::broker
