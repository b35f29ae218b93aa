// How ksmud starts and ends: its socket, who else is there, what a service manager hands over.

#include <fcntl.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "broker/door.h"
#include "broker_server_process.h"

namespace ksmu::broker::test {
namespace {

constexpr int kFailed = 1, kUsageError = 2, kRunningAlready = 3;
constexpr unsigned kNobody = 65534;

Fd ListenOn(const std::string& path, int type) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  Fd fd(socket(AF_UNIX, type | SOCK_CLOEXEC, 0));
  if (bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 || (type != SOCK_DGRAM && listen(fd.get(), 8) != 0)) return Fd();
  return fd;
}

unsigned ModeOf(const std::string& path) {
  struct stat about {};
  return stat(path.c_str(), &about) == 0 ? about.st_mode & 07777u : 0;
}

std::string Contents(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void BecomeNobody() {
  if (setgroups(0, nullptr) != 0 || setresgid(kNobody, kNobody, kNobody) != 0 || setresuid(kNobody, kNobody, kNobody) != 0) _exit(125);
}

class KsmudStart : public testing::Test {
 protected:
  Broker::Setup On(const std::string& path, std::vector<std::string> more = {}) const {
    Broker::Setup setup;
    setup.arguments = {"--socket", path, "--log", "info"};
    setup.arguments.insert(setup.arguments.end(), more.begin(), more.end());
    return setup;
  }
  // That it ends at once, so, and says this.
  void ExpectEnd(Broker::Setup setup, int status, const std::string& words) {
    Broker broker(std::move(setup));
    EXPECT_EQ(broker.Wait(), status) << broker.said();
    EXPECT_NE(broker.said().find(words), std::string::npos) << broker.said();
  }

  TempDir directory_;
  const std::string socket_ = directory_ / "default.sock";
};

TEST_F(KsmudStart, ASecondOneLeavesTheFirstAlone) {
  Broker first(On(socket_));
  ASSERT_TRUE(first.Ready()) << first.said();
  Client client(socket_);
  ASSERT_TRUE(client.Join());
  for (int i = 0; i < 3; ++i) ExpectEnd(On(socket_), kRunningAlready, "a broker is running there already");
  EXPECT_EQ(client.Publish({MakePage(1)}).size(), 1u);
  EXPECT_TRUE(Client(socket_).Join());
  // Also without the first one's lock.
  unlink((socket_ + ".lock").c_str());
  ExpectEnd(On(socket_), kRunningAlready, "a broker is running there already");
  EXPECT_TRUE(Client(socket_).Join());
  EXPECT_EQ(first.Stop(), 0);
}

TEST_F(KsmudStart, OfManyThatStartTogetherOneStays) {
  std::vector<std::unique_ptr<Broker>> all;
  for (int i = 0; i < 12; ++i) all.push_back(std::make_unique<Broker>(On(socket_)));
  int running = 0;
  for (auto& broker : all) {
    if (broker->Ready()) {
      ++running;
      EXPECT_TRUE(Client(socket_).Join());
      continue;
    }
    EXPECT_EQ(broker->Wait(), kRunningAlready) << broker->said();
  }
  EXPECT_EQ(running, 1);
}

TEST_F(KsmudStart, ASocketThatIsLeftOverIsReplaced) {
  std::string seed;
  for (int i = 0; i < 3; ++i) {
    Broker broker(On(socket_));
    ASSERT_TRUE(broker.Ready()) << broker.said();
    Client client(socket_);
    ASSERT_TRUE(client.Join());
    if (i == 0) seed = Contents(directory_ / "seed");
    EXPECT_EQ(std::strtoull(seed.c_str(), nullptr, 16), client.seed());
    broker.Kill(SIGKILL);
    EXPECT_TRUE(Exists(socket_));
    EXPECT_TRUE(client.IsEnded());
  }
  EXPECT_EQ(ModeOf(directory_ / "seed"), 0600u);
}

TEST_F(KsmudStart, WhatIsNotItsOwnIsLeftAlone) {
  std::ofstream(socket_) << "precious";
  ExpectEnd(On(socket_), kFailed, "is no socket: it is left alone");
  EXPECT_EQ(Contents(socket_), "precious");
  const std::string stream = directory_ / "stream.sock", datagram = directory_ / "datagram.sock", link = directory_ / "link.sock";
  const Fd a = ListenOn(stream, SOCK_STREAM), b = ListenOn(datagram, SOCK_DGRAM);
  ASSERT_TRUE(a && b);
  ExpectEnd(On(stream), kFailed, "another program's socket");
  ExpectEnd(On(datagram), kFailed, "another program's socket");
  ASSERT_EQ(symlink("elsewhere", link.c_str()), 0);
  ExpectEnd(On(link), kFailed, "is no socket: it is left alone");
  EXPECT_TRUE(Exists(stream) && Exists(datagram) && Exists(link));
  EXPECT_FALSE(Exists(directory_ / "elsewhere"));
  // Of what did not start, nothing stays.
  EXPECT_FALSE(Exists(stream + ".lock"));
  // A lock file of somebody's choice is not written through.
  const std::string other = directory_ / "other.sock";
  ASSERT_EQ(symlink("elsewhere", (other + ".lock").c_str()), 0);
  ExpectEnd(On(other), kFailed, "other.sock.lock");
  EXPECT_FALSE(Exists(directory_ / "elsewhere"));
}

TEST_F(KsmudStart, PathsThatCannotBe) {
  ExpectEnd(On(directory_ / std::string(120, 'x')), kFailed, "the path of the socket is longer than 107 bytes");
  ExpectEnd(On(directory_ / "nowhere/x.sock"), kFailed, "No such file or directory");
  // Just as long as can be.
  std::string path = directory_.path() + "/";
  path += std::string(107 - path.size(), 'x');
  Broker broker(On(path));
  ASSERT_TRUE(broker.Ready()) << broker.said();
  EXPECT_TRUE(Client(path).Join());
  EXPECT_EQ(broker.Stop(), 0);
  EXPECT_FALSE(Exists(path));
}

TEST_F(KsmudStart, Options) {
  const auto end = [&](std::vector<std::string> arguments, int status, const std::string& words) {
    Broker::Setup setup;
    setup.arguments = std::move(arguments);
    ExpectEnd(std::move(setup), status, words);
  };
  end({"--nonsense"}, kUsageError, "unknown option --nonsense");
  end({"--socket"}, kUsageError, "--socket wants a value");
  end({"--domain", "../x"}, kUsageError, "a domain's name");
  end({"--domain", "default"}, kUsageError, "each user's own");
  end({"--mode", "999"}, kUsageError, "octal");
  end({"--log", "loud"}, kUsageError, "--log wants");
  end({"--help"}, 0, "usage: ksmud");
  end({"--version"}, 0, "ksmud 0.");
  Broker::Setup quiet;
  quiet.arguments = {"--socket", socket_, "--log", "quiet"};
  Broker broker(quiet);
  EXPECT_TRUE(WaitUntil([&] { return Client(socket_).connected(); }, 5));
  EXPECT_EQ(broker.Stop(), 0);
  EXPECT_EQ(broker.said(), "");
}

TEST_F(KsmudStart, DomainsHaveSocketsOfTheirOwn) {
  umask(0);
  Broker broker(On(socket_, {"--domain", "web", "--domain", "db"}));
  ASSERT_TRUE(broker.Ready()) << broker.said();
  umask(022);
  const bool root = geteuid() == 0;
  EXPECT_EQ(ModeOf(socket_), root ? 0666u : 0600u);
  EXPECT_EQ(ModeOf(directory_ / "web.sock"), root ? 0660u : 0600u);
  Client a(socket_), b(directory_ / "web.sock"), c(directory_ / "db.sock"), d(directory_ / "web.sock");
  ASSERT_TRUE(a.Join() && b.Join() && c.Join() && d.Join());
  const std::uint32_t hash = b.HashOf(MakePage(1));
  ASSERT_EQ(b.Publish({MakePage(1)}).size(), 1u);
  EXPECT_NE(d.Lookup(hash), wire::kNoFrame);
  EXPECT_EQ(a.Lookup(hash), wire::kNoFrame);
  EXPECT_EQ(c.Lookup(hash), wire::kNoFrame);
  broker.Count();
  EXPECT_NE(broker.said().find("domain web: members 2, frames 1,"), std::string::npos) << broker.said();
  EXPECT_NE(broker.said().find("domain db: members 1, frames 0,"), std::string::npos) << broker.said();
  EXPECT_EQ(broker.Stop(), 0);
  for (const char* name : {"default.sock", "web.sock", "db.sock"}) EXPECT_FALSE(Exists(directory_ / name) || Exists(directory_ / (std::string(name) + ".lock")));
  Broker again(On(socket_, {"--domain", "web", "--mode", "640"}));
  ASSERT_TRUE(again.Ready());
  EXPECT_EQ(ModeOf(directory_ / "web.sock"), 0640u);
}

TEST_F(KsmudStart, TheDefaultPlaceIsMade) {
  Broker::Setup setup;
  setup.arguments = {"--log", "info"};
  setup.environment = {"XDG_RUNTIME_DIR=" + directory_.path()};
  {
    Broker broker(setup);
    ASSERT_TRUE(broker.Ready()) << broker.said();
    EXPECT_EQ(ModeOf(directory_ / "ksmu"), 0700u);
    EXPECT_TRUE(Client(directory_ / "ksmu/default.sock").Join());
    EXPECT_EQ(broker.Stop(), 0);
  }
  // Somebody else's is nobody's.
  if (geteuid() == 0) {
    Broker::Setup other = setup;
    other.before = BecomeNobody;
    ASSERT_EQ(chmod(directory_.path().c_str(), 0777), 0);
    ExpectEnd(other, kFailed, "is no directory of this user");
    EXPECT_FALSE(Exists(directory_ / "ksmu/default.sock"));
  }
  // Where others could put a socket in the place of its own, it does not go.
  ASSERT_EQ(chmod((directory_ / "ksmu").c_str(), 0777), 0);
  ExpectEnd(setup, kFailed, "only its owner can write to");
}

// As after `sudo -E`: members and operators are led to the broker of who they are, not of who has called them.
TEST(DefaultSocket, ARuntimeDirectoryCountsForItsOwner) {
  const TempDir directory;
  std::ofstream(directory / "file") << "none\n";
  const auto paths = [](const std::string& runtime, const char* broker = nullptr) {
    BrokerDoor door;
    EXPECT_EQ(door.Choose(broker, "web", runtime.empty() ? nullptr : runtime.c_str()), nullptr);
    return std::vector<std::string>{door.path(0), door.path(1)};
  };
  const std::vector<std::string> own = {directory / "ksmu/web.sock", "/run/ksmu/web.sock"}, none = {"/run/ksmu/web.sock", ""};
  EXPECT_EQ(paths(directory.path()), own);
  for (const std::string& other : {std::string(), directory / "nowhere", directory / "file", std::string("tmp")}) EXPECT_EQ(paths(other), none) << other;
  if (geteuid() == 0) {
    ASSERT_EQ(chown(directory.path().c_str(), kNobody, kNobody), 0);
    EXPECT_EQ(paths(directory.path()), none);
  } else {
    EXPECT_EQ(paths("/"), none);
  }
  // What is named is what is meant.
  EXPECT_EQ(paths(directory.path(), (directory / "x.sock").c_str()), (std::vector<std::string>{directory / "web.sock", ""}));
}

// As a user without rights: what it does with its own /proc/self/fd has to work there, too.
TEST_F(KsmudStart, AsAnotherUser) {
  if (geteuid() != 0) GTEST_SKIP() << "takes root to become another user";
  ASSERT_EQ(chown(directory_.path().c_str(), kNobody, kNobody), 0);
  Broker::Setup setup = On(socket_);
  setup.before = BecomeNobody;
  Broker broker(setup);
  ASSERT_TRUE(broker.Ready()) << broker.said();
  EXPECT_EQ(ModeOf(socket_), 0600u);
  // Not to be attached to, and without a core file.
  struct stat about {};
  ASSERT_EQ(stat(("/proc/" + std::to_string(broker.pid()) + "/fd").c_str(), &about), 0);
  EXPECT_EQ(about.st_uid, 0u);
  Client client(socket_);
  ASSERT_TRUE(client.Join());
  const auto frames = client.Publish({MakePage(1)});
  ASSERT_EQ(frames.size(), 1u);
  EXPECT_EQ(client.Read(frames[0]), MakePage(1));
  client.Close();
  EXPECT_EQ(broker.Stop(), 0);
  Broker::Setup nowhere;
  nowhere.before = BecomeNobody;
  ExpectEnd(nowhere, kFailed, "say where to listen by --socket");
  // A seed that is root's is none.
  unlink((directory_ / "seed").c_str());
  std::ofstream(directory_ / "seed") << "0123456789abcdef\n";
  Broker other(setup);
  ASSERT_TRUE(other.Ready()) << other.said();
  EXPECT_NE(other.said().find("seed cannot be written, or is no seed"), std::string::npos) << other.said();
  EXPECT_TRUE(Client(socket_).Join());
}

// A member that is another user's can read what is its domain's, and not write it by any way.
TEST_F(KsmudStart, AnotherUsersMemberCannotWrite) {
  if (geteuid() != 0) GTEST_SKIP() << "takes root to become another user";
  ASSERT_EQ(chmod(directory_.path().c_str(), 0755), 0);
  Broker broker(On(socket_, {"--domain", "web"}));
  ASSERT_TRUE(broker.Ready()) << broker.said();
  Client ours(socket_);
  ASSERT_TRUE(ours.Join());
  ASSERT_EQ(ours.Publish({MakePage(1)}).size(), 1u);
  const pid_t child = fork();
  if (child == 0) {
    BecomeNobody();
    if (Client(directory_ / "web.sock").connected()) _exit(1);  // 0660
    Client client(socket_);
    if (!client.Join()) _exit(2);
    if (client.Lookup(client.HashOf(MakePage(1))) != wire::kNoFrame) _exit(3);  // root's own domain
    const auto frames = client.Publish({MakePage(2)});
    if (frames.size() != 1 || client.Read(frames[0]) != MakePage(2)) _exit(4);
    const Fd file = client.File(0);
    const std::string again = "/proc/self/fd/" + std::to_string(file.get());
    if (open(again.c_str(), O_RDWR) >= 0 || errno != EACCES) _exit(5);
    if (fchmod(file.get(), 0666) == 0) _exit(6);
    if (fcntl(file.get(), F_ADD_SEALS, F_SEAL_WRITE) == 0) _exit(7);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(broker.Stop(), 0);
}

// --- service manager -------------------------------------------------------------------------------------------------

TEST_F(KsmudStart, SocketsThatAreHandedOver) {
  const Fd first = ListenOn(directory_ / "a", SOCK_SEQPACKET), second = ListenOn(directory_ / "b", SOCK_SEQPACKET), stream = ListenOn(directory_ / "c", SOCK_STREAM);
  ASSERT_TRUE(first && second && stream);
  const auto hand_over = [&](int a, int b, const char* names) {
    Broker::Setup setup;
    setup.arguments = {"--log", "info"};
    setup.before = [=] {
      const int x = fcntl(a, F_DUPFD, 100), y = fcntl(b, F_DUPFD, 100);
      dup2(x, 3);
      dup2(y, 4);
      close(x);
      close(y);
      setenv("LISTEN_PID", std::to_string(getpid()).c_str(), 1);
      setenv("LISTEN_FDS", "2", 1);
      setenv("LISTEN_FDNAMES", names, 1);
    };
    return setup;
  };
  {
    Broker broker(hand_over(first.get(), second.get(), "ksmud.socket:web"));
    ASSERT_TRUE(broker.Ready()) << broker.said();
    Client a(directory_ / "a"), b(directory_ / "b");
    ASSERT_TRUE(a.Join() && b.Join());
    broker.Count();
    EXPECT_NE(broker.said().find("domain default/" + std::to_string(geteuid()) + ": members 1,"), std::string::npos) << broker.said();
    EXPECT_NE(broker.said().find("domain web: members 1,"), std::string::npos) << broker.said();
    EXPECT_TRUE(Exists(directory_ / "seed"));
    EXPECT_EQ(broker.Stop(), 0);
  }
  EXPECT_TRUE(Exists(directory_ / "a"));  // the manager's
  {
    // As is the directory, where it has made another one for us.
    unlink((directory_ / "seed").c_str());
    mkdir((directory_ / "own").c_str(), 0700);
    Broker::Setup setup = hand_over(first.get(), second.get(), "ksmud.socket:web");
    setup.environment = {"RUNTIME_DIRECTORY=" + std::string(directory_ / "own")};
    Broker broker(setup);
    ASSERT_TRUE(broker.Ready()) << broker.said();
    EXPECT_TRUE(Exists(directory_ / "own/seed"));
    EXPECT_FALSE(Exists(directory_ / "seed"));
  }
  ExpectEnd(hand_over(first.get(), stream.get(), ""), kFailed, "descriptor 4 of LISTEN_FDS is no listening SOCK_SEQPACKET Unix socket");
  ExpectEnd(hand_over(first.get(), 0, ""), kFailed, "descriptor 4 of LISTEN_FDS");
  ExpectEnd(hand_over(first.get(), second.get(), "x/y:"), kFailed, "is no domain's");
  // Meant for another process.
  Broker::Setup other = On(socket_);
  other.environment = {"LISTEN_PID=1", "LISTEN_FDS=1"};
  Broker broker(other);
  ASSERT_TRUE(broker.Ready()) << broker.said();
  EXPECT_TRUE(Client(socket_).Join());
}

TEST_F(KsmudStart, TheServiceManagerIsTold) {
  const std::string path = directory_ / "notify", abstract = "@ksmud-test-" + std::to_string(getpid());
  const Fd named = ListenOn(path, SOCK_DGRAM);
  const Fd hidden(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  abstract.copy(address.sun_path + 1, sizeof address.sun_path - 2, 1);
  ASSERT_EQ(bind(hidden.get(), reinterpret_cast<sockaddr*>(&address), static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + abstract.size())), 0);
  for (const auto& [fd, name] : {std::pair<int, std::string>{named.get(), path}, {hidden.get(), abstract}}) {
    const auto told = [fd = fd] {
      char text[512] = {};
      pollfd entry{fd, POLLIN, 0};
      return poll(&entry, 1, 10000) == 1 && recv(fd, text, sizeof text - 1, 0) > 0 ? std::string(text) : std::string();
    };
    Broker::Setup setup = On(socket_);
    setup.environment = {"NOTIFY_SOCKET=" + name};
    Broker broker(setup);
    EXPECT_EQ(told().substr(0, 8), "READY=1\n");
    EXPECT_TRUE(Client(socket_).Join());
    broker.Count();
    EXPECT_NE(told().find("STATUS="), std::string::npos);
    EXPECT_EQ(broker.Stop(), 0);
    EXPECT_EQ(told(), "STOPPING=1");
  }
}

TEST_F(KsmudStart, SignalsThatAreNoneOfItsOwn) {
  Broker broker(On(socket_));
  ASSERT_TRUE(broker.Ready()) << broker.said();
  kill(broker.pid(), SIGHUP);
  kill(broker.pid(), SIGPIPE);
  EXPECT_TRUE(Client(socket_).Join());
  kill(broker.pid(), SIGINT);
  EXPECT_EQ(broker.Wait(), 0);
  EXPECT_FALSE(Exists(socket_));
}

}  // namespace
}  // namespace ksmu::broker::test
