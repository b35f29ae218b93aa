// ksmud itself: processes of it in directories of their own, and members that keep to the protocol or do not.

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <csignal>
#include <random>

#include "broker/server.h"
#include "broker_server_process.h"

namespace ksmu::broker::test {
namespace {

using wire::Kind;

class Ksmud : public testing::TestWithParam<const char*> {
 protected:
  Broker::Setup Setup(std::vector<std::string> more = {}) const {
    Broker::Setup setup;
    setup.arguments = {"--socket", socket_, "--log", "info"};
    if (!IsUring()) setup.arguments.push_back("--no-io-uring");
    setup.arguments.insert(setup.arguments.end(), more.begin(), more.end());
    return setup;
  }
  static bool IsUring() { return std::string(GetParam()) == "io_uring"; }

  TempDir directory_;
  const std::string socket_ = directory_ / "default.sock";
};

INSTANTIATE_TEST_SUITE_P(By, Ksmud, testing::Values("io_uring", "poll"), [](const auto& info) { return std::string(info.param); });

TEST_P(Ksmud, TwoMembersShareAPage) {
  Broker broker(Setup());
  ASSERT_TRUE(broker.Ready()) << broker.said();
  Client a(socket_), b(socket_);
  ASSERT_TRUE(a.Join() && b.Join());
  EXPECT_EQ(a.seed(), b.seed());
  EXPECT_NE(a.member(), b.member());
  const std::vector<PageOf> pages{MakePage(1), MakePage(2), MakePage(3), MakePage(2)};
  const auto frames = a.Publish(pages);
  ASSERT_EQ(frames.size(), 4u);
  EXPECT_EQ(frames[1], frames[0] + 1);
  EXPECT_EQ(frames[3], frames[1]);
  const std::uint32_t hash = b.HashOf(pages[1]);
  EXPECT_EQ(b.Lookup(hash), frames[1]);
  EXPECT_EQ(b.Acquire(frames[1], hash), frames[1]);
  EXPECT_EQ(b.Read(frames[1]), pages[1]);
  const Fd file = b.File(0);
  ASSERT_TRUE(file);
  EXPECT_EQ(pwrite(file.get(), pages[0].data(), kPage, 0), -1);
  EXPECT_FALSE(Mapping(file.get(), kPage, PROT_READ | PROT_WRITE));
  struct stat about {};
  ASSERT_EQ(fstat(file.get(), &about), 0);
  EXPECT_EQ(about.st_mode & 0777u, 0400u);
  // b has it, too.
  EXPECT_TRUE(a.SendWords(Kind::kRelease, {frames[0], frames[1], frames[2]}));
  broker.ComesTo(1, 2, 1);
  EXPECT_EQ(b.Read(frames[1]), pages[1]);
  // What one has offered and another offers, the first is asked for.
  EXPECT_TRUE(a.SendWords(Kind::kOffer, {5, 6}));
  EXPECT_TRUE(a.File(0));  // has been read
  EXPECT_TRUE(b.SendWords(Kind::kOffer, {6}));
  EXPECT_TRUE(WaitUntil([&] { return a.File(0) && !a.wanted().empty(); }, 5));
  EXPECT_EQ(a.wanted(), std::vector<std::uint32_t>{6});
  const auto counts = broker.Count();
  EXPECT_EQ(counts.connections, 2);
  EXPECT_EQ(counts.by, GetParam());
  a.Close();
  b.Close();
  // Their canaries are this process's still.
  broker.ComesTo(1, 0, 1);
  EXPECT_EQ(broker.Stop(), 0);
  EXPECT_FALSE(Exists(socket_));
  EXPECT_FALSE(Exists(socket_ + ".lock"));
}

TEST_P(Ksmud, WhatAKilledMembersChildMapsStays) {
  Broker broker(Setup());
  ASSERT_TRUE(broker.Ready()) << broker.said();
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const Fd read_end(ends[0]);
  Process member([&] {
    Client client(socket_);
    if (!client.Join() || client.Publish({MakePage(1), MakePage(2)}).size() != 2) _exit(1);
    const pid_t child = fork();
    if (child == 0) {
      client.Close();  // has the mappings only
      for (;;) pause();
    }
    if (write(ends[1], &child, sizeof child) != sizeof child) _exit(1);
    for (;;) pause();
  });
  close(ends[1]);
  pid_t child = 0;
  ASSERT_EQ(read(read_end.get(), &child, sizeof child), static_cast<ssize_t>(sizeof child));
  EXPECT_TRUE(broker.ComesTo(1, 1, 2));
  member.Kill();
  EXPECT_TRUE(broker.ComesTo(1, 0, 2));
  ::ksmu::test::SleepSeconds(1.5);
  EXPECT_TRUE(broker.ComesTo(1, 0, 2));
  Client other(socket_);
  ASSERT_TRUE(other.Join());
  EXPECT_EQ(other.Read(other.Lookup(other.HashOf(MakePage(2)))), MakePage(2));
  kill(child, SIGKILL);
  EXPECT_TRUE(broker.ComesTo(1, 1, 0, 3));
  EXPECT_EQ(other.Lookup(other.HashOf(MakePage(2))), wire::kNoFrame);
}

TEST_P(Ksmud, KilledMembersLeaveNothing) {
  Broker broker(Setup());
  ASSERT_TRUE(broker.Ready()) << broker.said();
  EXPECT_TRUE(broker.ComesTo(0, 0, 0));
  const std::size_t descriptors = broker.Descriptors();
  std::mt19937 random(20261128);
  std::vector<std::unique_ptr<Process>> members;
  const auto exchange = [&](unsigned seed) {
    std::mt19937 own(seed);
    for (;;) {
      Client client(socket_);
      if (!client.Join(8)) continue;
      std::vector<std::uint32_t> held;
      for (int i = 0; i < 200; ++i) {
        std::vector<PageOf> pages;
        for (int k = 0; k < 8; ++k) pages.push_back(MakePage(own() % 500));
        for (const std::uint32_t frame : client.Publish(pages)) {
          if (frame != wire::kNoFrame && std::find(held.begin(), held.end(), frame) == held.end()) held.push_back(frame);
        }
        client.SendWords(Kind::kOffer, {static_cast<std::uint32_t>(own() % 100), static_cast<std::uint32_t>(own() % 100)});
        if (own() % 4 == 0) client.File(0);
        if (!held.empty() && own() % 2) {
          if (own() % 2) client.SendWords(Kind::kDrop, {held.back()});
          client.SendWords(Kind::kRelease, {held.back()});
          held.pop_back();
        }
        if (own() % 50 == 0) break;
      }
    }
  };
  const int kills = ::ksmu::test::kSanitized ? 40 : 200;  // a fork takes long there
  long most_frames = 0;
  for (int killed = 0; killed < kills; ++killed) {
    while (members.size() < 8) members.push_back(std::make_unique<Process>([&, seed = random()] { exchange(static_cast<unsigned>(seed)); }));
    usleep(random() % 12000);
    if (killed % 8 == 0) most_frames = std::max(most_frames, broker.Count().frames);
    members.erase(members.begin() + static_cast<std::ptrdiff_t>(random() % members.size()));
  }
  EXPECT_GT(most_frames, 0);
  members.clear();
  EXPECT_TRUE(broker.ComesTo(0, 0, 0));
  EXPECT_EQ(broker.Count().connections, 0);
  EXPECT_TRUE(WaitUntil([&] { return broker.Descriptors() == descriptors; }, 5)) << broker.Descriptors() << " are open, not " << descriptors;
  EXPECT_EQ(broker.said().find("dropped"), std::string::npos) << broker.said();
  EXPECT_EQ(broker.Stop(), 0);
}

// Without reading anything, a member asks, and is asked for what it has offered, until nothing fits any more.
TEST_P(Ksmud, WhoDoesNotReadHoldsUpNobody) {
  Broker broker(Setup());
  ASSERT_TRUE(broker.Ready()) << broker.said();
  Client slow(socket_), asks(socket_), other(socket_);
  ASSERT_TRUE(slow.Join() && asks.Join() && other.Join());
  const auto frames = other.Publish({MakePage(1)});
  ASSERT_EQ(frames.size(), 1u);
  // Questions, until the broker takes none.
  fcntl(asks.fd(), F_SETFL, O_NONBLOCK);
  auto question = std::make_unique<wire::Message>();
  int sent = 0;
  for (int quiet = 0; quiet < 50;) {
    question->header = {0, Kind::kFile, 1, static_cast<std::uint32_t>(sent + 1), 0};
    question->words[0] = 0;
    if (asks.Send(*question)) ++sent, quiet = 0;
    else ++quiet, usleep(2000);
    ASSERT_LT(sent, 100000);
  }
  // What is wanted of the slow one, more than is kept for it.
  std::vector<std::uint32_t> hashes(wire::kMaxOffers);
  for (int round = 0; round < 600; ++round) {
    for (std::uint32_t i = 0; i < hashes.size(); ++i) hashes[i] = std::rotl(static_cast<std::uint32_t>(round) << 11 | i, 12);
    ASSERT_TRUE(slow.SendWords(Kind::kOffer, hashes));
  }
  double longest = 0;
  for (int round = 0; round < 600; ++round) {
    for (std::uint32_t i = 0; i < hashes.size(); ++i) hashes[i] = std::rotl(static_cast<std::uint32_t>(round) << 11 | i, 12);
    ASSERT_TRUE(other.SendWords(Kind::kOffer, hashes));
    const double start = Now();
    ASSERT_EQ(other.Publish({MakePage(2)}).size(), 1u);
    longest = std::max(longest, Now() - start);
  }
  EXPECT_LT(longest, 0.5 * Patience());
  broker.Count();
  const std::size_t lost = broker.said().rfind("wanted lost ");
  ASSERT_NE(lost, std::string::npos);
  EXPECT_GT(std::atol(broker.said().c_str() + lost + 12), 0);
  // And nothing of it costs time while nothing moves.
  const double cpu = broker.CpuSeconds();
  ::ksmu::test::SleepSeconds(0.5);
  EXPECT_LT(broker.CpuSeconds() - cpu, 0.1);
  // Every answer comes, in order, with its descriptor.
  fcntl(asks.fd(), F_SETFL, 0);
  for (int i = 0; i < sent; ++i) {
    const auto answer = asks.Receive();
    ASSERT_TRUE(answer) << i << " of " << sent;
    ASSERT_EQ(answer->message.header.kind, Kind::kFileIs);
    ASSERT_EQ(answer->message.header.number, static_cast<std::uint32_t>(i + 1));
    ASSERT_EQ(answer->descriptors.size(), 1u);
  }
  std::size_t wanted = 0;
  while (const auto packet = slow.Receive(300)) wanted += packet->message.header.count;
  // What is kept for it, and what its socket has taken.
  EXPECT_GE(wanted, Server::kMaxWanted);
  EXPECT_LT(wanted, Server::kMaxWanted + 96 * 1024);
  EXPECT_EQ(slow.Publish({MakePage(1)}), frames);
}

TEST_P(Ksmud, GarbageEndsWhoSendsIt) {
  Broker broker(Setup());
  ASSERT_TRUE(broker.Ready()) << broker.said();
  Client good(socket_);
  ASSERT_TRUE(good.Join());
  const auto frames = good.Publish({MakePage(1)});
  const std::size_t descriptors = broker.Descriptors();
  std::mt19937 random(7);
  std::vector<std::byte> bytes(3 * wire::kMaxPacket);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  const Fd null(open("/dev/null", O_RDONLY | O_CLOEXEC));
  const auto expect_end = [&](bool join, const std::function<void(Client&)>& act, const char* why) {
    Client client(socket_);
    if (join) {
      ASSERT_TRUE(client.Join());
    }
    act(client);
    EXPECT_TRUE(client.IsEnded()) << why;
    if (*why) {
      EXPECT_TRUE(broker.WaitFor("(uid " + std::to_string(geteuid()) + ") dropped: " + why)) << why << ":\n" << broker.said();
    }
  };
  for (const bool join : {false, true}) {
    for (int i = 0; i < 20; ++i) expect_end(join, [&](Client& c) { c.SendRaw(bytes.data() + i, 1 + random() % wire::kMaxPacket); }, "");
    expect_end(join, [&](Client& c) { c.SendRaw(bytes.data(), 10); }, "shorter than a header");
    expect_end(join, [&](Client& c) { c.SendRaw(bytes.data(), 0); }, "");
    expect_end(join, [&](Client& c) { c.SendRaw(bytes.data(), wire::kMaxPacket + 1); }, "a packet that is longer than any message");
    expect_end(join, [&](Client& c) { c.SendRaw(bytes.data(), bytes.size(), {null.get()}); }, "a packet that is longer than any message");
    expect_end(join, [&](Client& c) { c.SendRaw(bytes.data(), 0, {null.get()}); }, "");
    expect_end(join, [&](Client& c) { c.SendRaw(bytes.data(), 16, std::vector<int>(253, null.get())); }, "");
  }
  auto message = std::make_unique<wire::Message>();
  message->header = {0, Kind::kOffer, 1, 0, 0};
  expect_end(true, [&](Client& c) { c.Send(*message, std::vector<int>(253, null.get())); }, "descriptors with a message that has none");
  // Messages in one go, of which the first is wrong; with descriptors that nobody reads.
  expect_end(true, [&](Client& c) {
    for (int i = 0; i < 20; ++i) c.Send(*message, {null.get(), good.fd()});
  }, "descriptors with a message that has none");
  EXPECT_EQ(good.Publish({MakePage(1)}), frames);
  EXPECT_TRUE(broker.ComesTo(1, 1, 1));
  EXPECT_TRUE(WaitUntil([&] { return broker.Descriptors() == descriptors; }, 5)) << broker.Descriptors() << " are open, not " << descriptors;
}

// A TCP socket that lingers takes as long to close as its other end likes, if the broker is the last who has it.
TEST_P(Ksmud, AFileThatIsSlowToCloseHoldsUpNobody) {
  Broker broker(Setup());
  ASSERT_TRUE(broker.Ready()) << broker.said();
  Client good(socket_);
  ASSERT_TRUE(good.Join());
  const Fd listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (bind(listener.get(), reinterpret_cast<sockaddr*>(&address), size) != 0) GTEST_SKIP() << "no loopback";
  listen(listener.get(), 1);
  getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &size);
  std::vector<Client> strangers;
  std::vector<Fd> ends;
  // Not to be taken out of the queue while they are this process's, too.
  kill(broker.pid(), SIGSTOP);
  for (int i = 0; i < 3; ++i) {
    Fd lingers(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(connect(lingers.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
    ends.emplace_back(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    const linger wait{1, 60};
    setsockopt(lingers.get(), SOL_SOCKET, SO_LINGER, &wait, sizeof wait);
    fcntl(lingers.get(), F_SETFL, O_NONBLOCK);
    std::vector<char> much(1 << 20);
    while (write(lingers.get(), much.data(), much.size()) > 0) continue;
    fcntl(lingers.get(), F_SETFL, 0);
    Client& stranger = strangers.emplace_back(socket_);
    wire::Message join{};
    join.header = {0, Kind::kJoin, 1, 1, 0};
    join.join = {wire::kVersion, kPage, 4, 0};
    if (i == 2) join.header.reserved = 1;
    ASSERT_TRUE(stranger.Send(join, {lingers.get()}));
  }
  kill(broker.pid(), SIGCONT);
  for (Client& stranger : strangers) EXPECT_TRUE(stranger.IsEnded());
  const double start = Now();
  EXPECT_EQ(good.Publish({MakePage(1)}).size(), 1u);
  EXPECT_LT(Now() - start, 1);
  EXPECT_EQ(broker.Stop(), 0);
}

// The limit is low: those who do not get in are told, and the broker does not spin.
TEST_P(Ksmud, WithoutDescriptorsWhoConnectsIsTurnedAway) {
  Broker::Setup setup = Setup();
  setup.before = [] {
    closefrom(3);
    const rlimit limit{24, 24};
    setrlimit(RLIMIT_NOFILE, &limit);
  };
  Broker broker(setup);
  ASSERT_TRUE(broker.Ready()) << broker.said();
  Client good(socket_);
  ASSERT_TRUE(good.Join());
  std::vector<Client> more;
  for (int i = 0; i < 40; ++i) more.emplace_back(socket_);
  EXPECT_TRUE(broker.WaitFor("no more descriptors")) << broker.said();
  EXPECT_TRUE(more.back().IsEnded());
  const double cpu = broker.CpuSeconds();
  ::ksmu::test::SleepSeconds(0.5);
  EXPECT_LT(broker.CpuSeconds() - cpu, 0.1);
  Client late(socket_);
  EXPECT_FALSE(late.Join());
  // There is none for the file either: kept, or this member ended; the others go on.
  more.clear();
  EXPECT_TRUE(WaitUntil([&] {
    Client again(socket_);
    return again.Join() && again.Publish({MakePage(1)}).size() == 1;
  }, 5)) << broker.said();
  EXPECT_EQ(good.Publish({MakePage(2)}).size(), 1u);
}

TEST_P(Ksmud, AStoppedBrokerGoesOnWhereItWas) {
  Broker broker(Setup());
  ASSERT_TRUE(broker.Ready()) << broker.said();
  Client a(socket_);
  ASSERT_TRUE(a.Join());
  kill(broker.pid(), SIGSTOP);
  auto offers = std::make_unique<wire::Message>();
  for (std::uint32_t i = 0; i < 10; ++i) EXPECT_TRUE(a.SendWords(Kind::kOffer, {i}));
  Client b(socket_);  // waits in the queue
  EXPECT_TRUE(b.connected());
  kill(broker.pid(), SIGCONT);
  EXPECT_EQ(a.Publish({MakePage(1)}).size(), 1u);
  EXPECT_TRUE(b.Join());
}

// --- io_uring that is refused ----------------------------------------------------------------------------------------

class KsmudRefused : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Call, KsmudRefused, testing::Values(SYS_io_uring_setup, SYS_io_uring_enter),
                         [](const auto& info) { return std::string(info.param == SYS_io_uring_setup ? "setup" : "enter"); });

TEST_P(KsmudRefused, PollIsUsed) {
  const TempDir directory;
  Broker::Setup setup;
  setup.arguments = {"--socket", directory / "x.sock", "--log", "info"};
  setup.before = [] { Refuse(GetParam()); };
  Broker broker(setup);
  ASSERT_TRUE(broker.Ready()) << broker.said();
  Client client(directory / "x.sock");
  ASSERT_TRUE(client.Join());
  EXPECT_EQ(client.Publish({MakePage(1)}).size(), 1u);
  EXPECT_EQ(broker.Count().by, "poll");
  EXPECT_NE(broker.said().find("poll is used"), std::string::npos);
  EXPECT_EQ(broker.Stop(), 0);
}

}  // namespace
}  // namespace ksmu::broker::test
