// Processes that share one pool through ksmud: what is merged across them, who may go when, and what is left.

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <memory>
#include <optional>
#include <random>

#include "domain_support.h"

namespace ksmu::test {
namespace {

using Kind = Child::Kind;

// A line of a process's status, in KiB.
std::int64_t StatusKib(pid_t pid, const std::string& name) {
  std::ifstream status("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(status, line);) {
    if (line.compare(0, name.size(), name) == 0) return std::stoll(line.substr(name.size()));
  }
  return -1;
}

// A page's content by its place, the same in every process.
std::uint64_t Common(std::size_t i) { return 1000 + i; }

struct Member {
  Member(Broker& broker, Board::Entry* entry, const std::function<void(Child&, const std::function<void()>& post)>& body)
      : child(Kind::kFork, [&broker, entry, body](Child& self) {
          JoinFlatOut(broker.socket());
          body(self, [entry] { Post(entry); });
        }) {}
  Child child;
};

// Every page of the memory merged, as this process sees it.
bool AllMerged(std::size_t pages, double seconds) {
  return WaitUntil([&] { return Get("pages_merged") == static_cast<std::int64_t>(pages); }, seconds);
}

void Check(Child& self, const Memory& memory, const std::function<std::uint64_t(std::size_t)>& seed_of, const char* when) {
  for (std::size_t i = 0; i < memory.pages(); ++i) {
    const std::ptrdiff_t wrong = FindWrongByte(memory.page(i), seed_of(i));
    if (wrong >= 0) self.Report("%s: page %zu, byte %td is wrong\n", when, i, wrong);
  }
}

const int kFlags[] = {0, KSMU_F_NO_RAW_DISCARDS, KSMU_F_SYNC_BREAK};

// What neither has twice is one frame for both; written, it is each one's own; and when the last has gone, nothing is left.
KSMU_ISOLATED_TEST(Domain, PagesThatEachHasOnce, 120) {
  for (const int flags : kFlags) {
    SCOPED_TRACE(flags);
    Broker broker;
    Board* const board = Board::Make();
    constexpr std::size_t kPages = 512;
    const auto body = [&](int number) {
      return [=](Child& self, const std::function<void()>& post) {
        Memory memory(kPages);
        FillPages(memory, Common);
        if (ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags) != 0) self.Report("advise: %s\n", ksmu_last_error());
        if (!AllMerged(kPages, 20)) self.Report("merged %ld of %zu\n", static_cast<long>(Get("pages_merged")), kPages);
        Check(self, memory, Common, "merged");
        post();
        self.Signal(1);
        self.Await(2);
        if (number == 0) {
          for (std::size_t i = 0; i < kPages; i += 2) FillPage(memory.page(i), 7777 + i);
        }
        const auto now = [&](std::size_t i) { return number == 0 && i % 2 == 0 ? 7777 + i : Common(i); };
        Check(self, memory, now, "written");
        self.Signal(3);
        self.Await(4);
        Check(self, memory, now, "at the end");
      };
    };
    {
      Member a(broker, &board->members[0], body(0)), b(broker, &board->members[1], body(1));
      EXPECT_TRUE(a.child.Await(1, 30));
      EXPECT_TRUE(b.child.Await(1, 30));
      EXPECT_EQ(broker.Ask().members, 2);
      EXPECT_EQ(broker.Ask().frames, static_cast<std::int64_t>(kPages));
      a.child.Signal(2);
      b.child.Signal(2);
      EXPECT_TRUE(a.child.Await(3));
      EXPECT_TRUE(b.child.Await(3));
      a.child.Signal(4);
      a.child.Join();
      EXPECT_EQ(broker.Ask().frames, static_cast<std::int64_t>(kPages)) << "the other one's";
      b.child.Signal(4);
      b.child.Join();
    }
    broker.WaitForFrames(0, 5);
    EXPECT_EQ(broker.log().find("dropped"), std::string::npos) << broker.log();
  }
}

// The four phases of LTP's KSM tests, over three processes. In the long form they are as large as LTP's: then every page is a mapping of
// its own, 32,768 in each process, and near the preset map limit repeated contents would be spread over replicas.
void LtpPhases() {
  Broker broker;
  Board* const board = Board::Make();
  const std::size_t bytes = (std::getenv("KSMU_TEST_LONG") ? 128u : 16u) << 20;
  const std::size_t pages = bytes / PageSize();
  const auto n = static_cast<std::int64_t>(3 * pages);
  struct Phase {
    char content[3];
    bool odd_last_byte;
    std::int64_t shared, sharing, unshared;
  };
  static const Phase kPhases[] = {
      {{'c', 'a', 'a'}, false, 2, -2, 0},
      {{'c', 'b', 'a'}, false, 3, -3, 0},
      {{'d', 'd', 'd'}, false, 1, -1, 0},
      {{'d', 'd', 'd'}, true, 1, -2, 1},
  };
  std::vector<std::unique_ptr<Member>> members;
  for (int number = 0; number < 3; ++number) {
    members.push_back(std::make_unique<Member>(broker, &board->members[number], [=](Child& self, const std::function<void()>& post) {
      ksmu_set("max_page_sharing", n);
      ksmu_set("remerge_seconds", 0);
      Memory memory(pages);
      if (ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE) != 0) self.Report("advise: %s\n", ksmu_last_error());
      for (int phase = 0; phase < 4; ++phase) {
        if (!self.Await(2 * phase + 1, 200)) return self.Report("nobody began phase %d\n", phase);
        memset(memory.data(), kPhases[phase].content[number], bytes);
        const bool odd = kPhases[phase].odd_last_byte && number == 1;
        if (odd) memory.data()[bytes - 1] = 'e';
        while (board->phase == phase) {
          post();
          SleepSeconds(0.02);
        }
        for (std::size_t i = 0; i < bytes; ++i) {
          const char expected = odd && i == bytes - 1 ? 'e' : kPhases[phase].content[number];
          if (memory.data()[i] == expected) continue;
          self.Report("phase %d: byte %zu is wrong\n", phase, i);
          break;
        }
        self.Signal(2 * phase + 2);
      }
      ksmu_set("run", 2);
      post();
      self.Signal(100);
    }));
  }
  for (int phase = 0; phase < 4; ++phase) {
    SCOPED_TRACE(phase);
    for (auto& member : members) member->child.Signal(2 * phase + 1);
    const Phase& expected = kPhases[phase];
    std::int64_t frames = 0, merged = 0, unshared = 0, changing = 0;
    const bool reached = WaitUntil(
        [&] {
          frames = broker.Ask().frames;
          merged = board->Sum(&Board::Entry::merged);
          unshared = board->Sum(&Board::Entry::unshared);
          changing = board->Sum(&Board::Entry::changing);
          return frames == expected.shared && merged - frames == n + expected.sharing && unshared == expected.unshared && changing == 0;
        },
        60, 0.1);
    EXPECT_TRUE(reached) << "shared " << frames << ", sharing " << merged - frames << " of " << n << ", unshared " << unshared << ", volatile " << changing;
    board->phase = phase + 1;
    for (auto& member : members) EXPECT_TRUE(member->child.Await(2 * phase + 2, 60));
  }
  for (auto& member : members) EXPECT_TRUE(member->child.Await(100, 60));
  EXPECT_EQ(board->Sum(&Board::Entry::merged), 0) << "run 2";
  for (auto& member : members) member->child.Join();
  broker.WaitForFrames(0, 5);
}

TEST(Domain, LtpPhases) {
  std::optional<Sysctl> limit;
  if (std::getenv("KSMU_TEST_LONG") && std::atoll(ReadFile("/proc/sys/vm/max_map_count").c_str()) < 200'000) {
    limit.emplace("/proc/sys/vm/max_map_count", "1048576");
    if (!limit->set()) GTEST_SKIP() << "vm.max_map_count is too low for LTP's own size, and cannot be set here";
  }
  RunIsolated(LtpPhases, 300);
}

// Many processes, each of which has half of its pages in common with the next one: every content is in two of them. Long form: 64
// processes, 8 GiB, a million frames.
KSMU_ISOLATED_TEST(Domain, ManyProcesses, 900) {
  const bool all = std::getenv("KSMU_TEST_LONG");
  const int processes = all ? 64 : 16;
  const std::size_t pages = (all ? std::size_t{128} << 20 : std::size_t{4} << 20) / PageSize();
  const auto frames = static_cast<std::int64_t>(static_cast<std::size_t>(processes) * pages / 2);
  Broker broker;
  Board* const board = Board::Make();
  std::vector<std::unique_ptr<Member>> members;
  const double begun = Now();
  for (int number = 0; number < processes; ++number) {
    members.push_back(std::make_unique<Member>(broker, &board->members[number], [=](Child& self, const std::function<void()>& post) {
      ksmu_set("smart_scan", 1);  // else 64 scanners read all of their memory in every pass
      Memory memory(pages);
      const auto seed = [=](std::size_t i) {
        return 1 + (static_cast<std::size_t>(number) * pages / 2 + i) % (static_cast<std::size_t>(processes) * pages / 2);
      };
      FillPages(memory, seed);
      if (ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE) != 0) self.Report("advise: %s\n", ksmu_last_error());
      while (!board->end) {
        post();
        SleepSeconds(0.2);
      }
      Check(self, memory, seed, "at the end");
      self.Signal(1);
    }));
  }
  EXPECT_TRUE(WaitUntil([&] { return board->Sum(&Board::Entry::merged) == 2 * frames; }, 600, 0.2))
      << board->Sum(&Board::Entry::merged) << " of " << 2 * frames << " merged";
  const Broker::State state = broker.Ask();
  EXPECT_EQ(state.members, processes);
  EXPECT_EQ(state.frames, frames);
  const std::int64_t anonymous = StatusKib(broker.pid(), "RssAnon:");
  std::printf("[          ] %lld frames in %.1f s; ksmud: %lld KiB of its own, %.1f bytes a frame\n", static_cast<long long>(frames), Now() - begun,
              static_cast<long long>(anonymous), static_cast<double>(anonymous) * 1024 / static_cast<double>(frames));
  // One dies. What it had, its neighbours have, too.
  kill(members[1]->child.pid(), SIGKILL);
  const double killed = Now();
  EXPECT_TRUE(WaitUntil([&] { return broker.Ask().members == processes - 1; }, 20, 0.01));
  std::printf("[          ] one of %zu frames dead and forgotten after %.3f s\n", pages, Now() - killed);
  EXPECT_EQ(broker.Ask().frames, frames);
  waitpid(members[1]->child.pid(), nullptr, 0);
  members[1]->child.Forget();
  board->end = true;
  for (int number = 0; number < processes; ++number) {
    if (number == 1) continue;
    EXPECT_TRUE(members[static_cast<std::size_t>(number)]->child.Await(1, 120));
    members[static_cast<std::size_t>(number)]->child.Join();
  }
  EXPECT_TRUE(broker.WaitForFrames(0, 20));
  EXPECT_EQ(broker.log().find("dropped"), std::string::npos) << broker.log();
}

// Whoever is killed loses what it held, but not before its children, which map it still, have gone as well.
KSMU_ISOLATED_TEST(Domain, AKilledMembersChildLivesOn, 60) {
  Broker broker;
  Board* const board = Board::Make();
  constexpr std::size_t kPages = 256;
  int pipes[2];
  ASSERT_EQ(pipe(pipes), 0);
  Member a(broker, &board->members[0], [&](Child& self, const std::function<void()>&) {
    Memory memory(kPages);
    // Twice each: this one needs nobody.
    FillPages(memory, [](std::size_t i) { return 1 + i / 2; });
    ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE);
    if (!AllMerged(kPages, 20)) self.Report("merged %ld\n", static_cast<long>(Get("pages_merged")));
    if (fork() == 0) {
      close(pipes[1]);
      char end;
      if (read(pipes[0], &end, 1) < 0) _exit(3);
      for (std::size_t i = 0; i < kPages; ++i) {
        if (FindWrongByte(memory.page(i), 1 + i / 2) >= 0) self.Report("the child reads something else in page %zu\n", i);
      }
      self.Signal(2);
      _exit(0);
    }
    self.Signal(1);
    pause();
  });
  ASSERT_TRUE(a.child.Await(1, 30));
  close(pipes[0]);
  EXPECT_EQ(broker.Ask().frames, static_cast<std::int64_t>(kPages / 2));
  kill(a.child.pid(), SIGKILL);
  waitpid(a.child.pid(), nullptr, 0);
  a.child.Forget();
  SleepSeconds(3);
  EXPECT_EQ(broker.Ask().frames, static_cast<std::int64_t>(kPages / 2)) << "the child maps them";
  close(pipes[1]);
  EXPECT_TRUE(a.child.Await(2));
  a.child.ExpectNoReports();
  broker.WaitForFrames(0, 6);
}

// Members go on without a broker, and find each other again when there is one.
KSMU_ISOLATED_TEST(Domain, TheBrokerIsKilledAndComesAgain, 120) {
  Broker broker("--log debug");
  Board* const board = Board::Make();
  constexpr std::size_t kPages = 256;
  const auto body = [&](int number) {
    return [=](Child& self, const std::function<void()>& post) {
      ksmu_set("remerge_seconds", 0);
      Memory memory(kPages), alone(kPages);
      FillPages(memory, Common);
      ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE);
      if (!AllMerged(kPages, 20)) self.Report("at first: merged %ld\n", static_cast<long>(Get("pages_merged")));
      self.Signal(1);
      self.Await(2);
      // Without one: what is twice here is merged here.
      Check(self, memory, Common, "alone");
      FillPages(alone, [&](std::size_t i) { return 5000 + 1000 * static_cast<std::size_t>(number) + i / 2; });
      ksmu_advise(alone.data(), alone.bytes(), KSMU_MERGEABLE);
      if (!AllMerged(2 * kPages, 20)) self.Report("alone: merged %ld\n", static_cast<long>(Get("pages_merged")));
      for (std::size_t i = 0; i < kPages; i += 4) FillPage(memory.page(i), Common(i) + 9000);
      self.Signal(3);
      for (int i = 0; i < 400 && board->phase == 0; ++i) {
        post();
        SleepSeconds(0.05);
      }
      Check(self, memory, [](std::size_t i) { return i % 4 ? Common(i) : Common(i) + 9000; }, "joined again");
      Check(self, alone, [&](std::size_t i) { return 5000 + 1000 * static_cast<std::size_t>(number) + i / 2; }, "joined again");
    };
  };
  Member a(broker, &board->members[0], body(0)), b(broker, &board->members[1], body(1));
  EXPECT_TRUE(a.child.Await(1, 30));
  EXPECT_TRUE(b.child.Await(1, 30));
  broker.Kill(SIGKILL);
  a.child.Signal(2);
  b.child.Signal(2);
  EXPECT_TRUE(a.child.Await(3, 30));
  EXPECT_TRUE(b.child.Await(3, 30));
  broker.Start();
  // All that is alike, in a domain again: the common pages, those that both have written alike, and what each has twice.
  const bool all = broker.WaitForFrames(static_cast<std::int64_t>(kPages + kPages), 30);
  for (int i = 0; i < 2 && !all; ++i) {
    const Board::Entry& entry = board->members[i];
    std::printf("%s\n", broker.log().substr(0, 3000).c_str());
    std::printf("member %d: merged %ld, unshared %ld, volatile %ld\n", i, entry.merged.load(), entry.unshared.load(), entry.changing.load());
  }
  EXPECT_EQ(broker.Ask().members, 2);
  board->phase = 1;
  a.child.Join();
  b.child.Join();
  broker.WaitForFrames(0, 5);
}

// A broker that does not answer any more: nobody waits for it for longer than the member's patience, and no writer at all.
KSMU_ISOLATED_TEST(Domain, AStoppedBrokerHoldsNobodyUp, 60) {
  Broker broker;
  Board* const board = Board::Make();
  Member a(broker, &board->members[0], [&](Child& self, const std::function<void()>& post) {
    constexpr std::size_t kPages = 512;
    Memory memory(kPages), more(kPages);
    FillPages(memory, [](std::size_t i) { return 1 + i / 2; });
    ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE);
    if (!AllMerged(kPages, 20)) self.Report("merged %ld\n", static_cast<long>(Get("pages_merged")));
    self.Signal(1);
    self.Await(2);
    FillPages(more, [](std::size_t i) { return 9001 + i / 2; });
    ksmu_advise(more.data(), more.bytes(), KSMU_MERGEABLE);
    double longest = 0;
    std::mt19937 random(3);
    const double begun = Now();
    while (Now() - begun < 6) {
      const double before = Now();
      memory.page(random() % kPages)[0] ^= 1;
      memory.page(random() % kPages)[0] ^= 1;
      longest = std::max(longest, Now() - before);
      SleepSeconds(0.001);
    }
    if (longest > 0.5) self.Report("a write has waited for %.2f s\n", longest);
    if (!WaitUntil([&] { return Get("pages_merged") >= static_cast<std::int64_t>(kPages); }, 20)) {
      self.Report("alone: merged %ld\n", static_cast<long>(Get("pages_merged")));
    }
    Check(self, more, [](std::size_t i) { return 9001 + i / 2; }, "alone");
    post();
  });
  ASSERT_TRUE(a.child.Await(1, 30));
  kill(broker.pid(), SIGSTOP);
  a.child.Signal(2);
  a.child.Join();
  kill(broker.pid(), SIGCONT);
  broker.WaitForFrames(0, 6);
}

// A broker that answers, but long after it was waited for: what it grants is taken then, and nobody leaves for it.
KSMU_ISOLATED_TEST(Domain, ASlowBrokerIsHeardLater, 60) {
  Broker broker;
  Board* const board = Board::Make();
  constexpr int kRounds = 6;
  Member a(broker, &board->members[0], [&](Child& self, const std::function<void()>& post) {
    constexpr std::size_t kPages = 512;
    Memory memory(kRounds * kPages);
    const auto value = [](std::size_t i) { return 1 + i / 2; };
    FillPages(memory, value);
    for (int round = 0; round < kRounds; ++round) {
      self.Await(2 * round + 1);
      ksmu_advise(memory.page(static_cast<std::size_t>(round) * kPages), memory.bytes() / kRounds, KSMU_MERGEABLE);
      self.Signal(2 * round + 2);
    }
    if (!AllMerged(kRounds * kPages, 30)) self.Report("merged %ld\n", static_cast<long>(Get("pages_merged")));
    Check(self, memory, value, "with a slow broker");
    post();
  });
  for (int round = 0; round < kRounds; ++round) {
    kill(broker.pid(), SIGSTOP);
    a.child.Signal(2 * round + 1);
    EXPECT_TRUE(a.child.Await(2 * round + 2, 30));
    SleepSeconds(0.5);
    kill(broker.pid(), SIGCONT);
    SleepSeconds(0.2);
  }
  a.child.Join();
  broker.WaitForFrames(0, 6);
  const std::string log = broker.log();
  std::size_t joined = 0;
  for (std::size_t at = 0; (at = log.find(") joined", at)) != std::string::npos; ++at) ++joined;
  EXPECT_EQ(joined, 1u) << log;
  EXPECT_EQ(log.find("dropped"), std::string::npos) << log;
}

// Members come, merge, write, fork, and are killed at any moment. What the others have stays right, and in the end nothing is left.
KSMU_ISOLATED_TEST(Domain, MembersAreKilledAtAnyMoment, 240) {
  Broker broker;
  Board* const board = Board::Make();
  constexpr std::size_t kPages = 512;
  const int kKills = std::getenv("KSMU_TEST_LONG") ? 600 : 60;
  const auto body = [&](unsigned seed) {
    return [=](Child& self, const std::function<void()>&) {
      std::mt19937 random(seed);
      Memory memory(kPages);
      std::vector<std::uint64_t> seeds(kPages);
      const auto write = [&](std::size_t i) { FillPage(memory.page(i), seeds[i] = 1 + random() % 300); };
      for (std::size_t i = 0; i < kPages; ++i) write(i);
      ksmu_set("remerge_seconds", 0);
      ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | kFlags[seed % 2]);
      while (!board->end) {
        for (int k = 0; k < 8; ++k) write(random() % kPages);
        if (random() % 50 == 0) {
          if (fork() == 0) {
            SleepSeconds(static_cast<double>(random() % 100) / 1000);
            for (std::size_t i = 0; i < kPages; ++i) {
              if (FindWrongByte(memory.page(i), seeds[i]) >= 0) self.Report("in a child: page %zu\n", i);
            }
            _exit(0);
          }
          while (waitpid(-1, nullptr, WNOHANG) > 0) {
          }
        }
        const std::size_t i = random() % kPages;
        if (FindWrongByte(memory.page(i), seeds[i]) >= 0) self.Report("page %zu is wrong\n", i);
        SleepSeconds(0.001);
      }
      Check(self, memory, [&](std::size_t i) { return seeds[i]; }, "at the end");
      while (waitpid(-1, nullptr, 0) > 0) {
      }
    };
  };
  Member stays(broker, &board->members[0], body(1)), too(broker, &board->members[1], body(2));
  std::mt19937 random(17);
  for (int i = 0; i < kKills; ++i) {
    Member victim(broker, &board->members[2], body(static_cast<unsigned>(100 + i)));
    SleepSeconds(static_cast<double>(random() % 400) / 1000);
    victim.child.ExpectNoReports();
    kill(victim.child.pid(), SIGKILL);
    waitpid(victim.child.pid(), nullptr, 0);
    victim.child.Forget();
  }
  board->end = true;
  stays.child.Join();
  too.child.Join();
  broker.WaitForFrames(0, 8);
  EXPECT_EQ(broker.log().find("dropped"), std::string::npos) << broker.log();
}

}  // namespace
}  // namespace ksmu::test
