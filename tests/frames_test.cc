// Frames over the simulated system: which one is given out next, what keeps a frame's bytes and what its place, forked
// children.
#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <set>
#include <vector>

#include "frames/fork_watch.h"
#include "frames/pool.h"
#include "os/fake_system.h"

namespace ksmu::frames {
namespace {

using os::FakeOperation;
constexpr std::size_t kPage = 4096;

class Frames : public ::testing::Test {
 protected:
  void SetUp() override {
    sys.MapProgram(os::FakeSystem::kProgramBase, 64 * kPage);
    thread = sys.AddThread();
    forks.emplace(sys);
    ASSERT_EQ(forks->Start(), 0);
    pool.emplace(sys, *forks);
  }
  void TearDown() override {
    pool.reset();
    forks.reset();
    for (const std::string& v : sys.violations()) ADD_FAILURE() << v;
  }
  os::ProcessId Fork(os::ThreadId by) {
    EXPECT_TRUE(sys.Run(by, {.kind = FakeOperation::kFork}));
    return sys.Outcome(by).child;
  }
  os::ProcessId Fork() { return Fork(thread); }
  // A frame with its bytes written, as the engine publishes it.
  Frame Publish(int value) {
    const Frame f = pool->Allocate();
    if (f == kNoFrame) return f;
    const std::vector<std::byte> bytes(kPage, std::byte(value));
    EXPECT_EQ(sys.WriteFile(pool->OsFile(f), pool->Offset(f), reinterpret_cast<os::Address>(bytes.data()), kPage).done, kPage);
    return f;
  }
  std::vector<Frame> Allocate(std::size_t n) {
    std::vector<Frame> frames;
    for (std::size_t i = 0; i < n; ++i) frames.push_back(pool->Allocate());
    return frames;
  }
  // Frames of which the pool said that they end, in their order.
  std::vector<Frame> Reclaim() {
    forgotten.clear();
    punched = pool->Reclaim(
        [](void* self, Frame f) {
          auto& t = *static_cast<Frames*>(self);
          EXPECT_TRUE(t.pool->Live(f)) << "asked for its hash after its bytes have gone";
          t.forgotten.push_back(f);
        },
        this);
    return forgotten;
  }

  // The new numbers of the epochs and of their end; empty: none has been forgotten.
  std::vector<int> Refresh() {
    const std::size_t end = forks->end();
    ForkWatch::Epoch numbers[ForkWatch::kMaxEpochs + 1];
    return forks->Refresh(numbers) ? std::vector<int>(numbers, numbers + end + 1) : std::vector<int>{};
  }

  os::FakeSystem sys;
  os::ThreadId thread = -1;
  std::optional<ForkWatch> forks;
  std::optional<Pool> pool;
  std::vector<Frame> forgotten;
  std::size_t punched = 0;
};

using PoolTest = Frames;

TEST_F(PoolTest, FramesAreConsecutiveInTheOrderInWhichTheyAreAskedFor) {
  const std::vector<Frame> frames = Allocate(1000);
  for (std::size_t i = 0; i < frames.size(); ++i) {
    ASSERT_EQ(frames[i], frames[0] + i);
    EXPECT_EQ(pool->Offset(frames[i]), pool->Offset(frames[0]) + i * kPage);
    EXPECT_TRUE(pool->SameFile(frames[i], frames[0]));
    EXPECT_TRUE(pool->Live(frames[i]));
  }
  EXPECT_EQ(pool->live(), 1000u);
  EXPECT_EQ(pool->in_use(), 1000u);
  EXPECT_EQ(pool->shared(), 0u);
  os::File file;
  EXPECT_EQ(pool->Files(&file, 1), 1u);
  EXPECT_EQ(file.fd, pool->OsFile(frames[0]).fd);
}

TEST_F(PoolTest, BytesAreThoseWrittenAndGoWithTheLastSharer) {
  const Frame a = Publish(1), b = Publish(2);
  EXPECT_EQ(pool->Bytes(a)[0], std::byte(1));
  EXPECT_EQ(pool->Bytes(b)[kPage - 1], std::byte(2));
  pool->Share(a);
  pool->Share(a);
  pool->Share(b);
  EXPECT_EQ(pool->shared(), 2u);
  EXPECT_EQ(pool->sharers(a), 2u);
  pool->Unshare(a);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{}) << "one sharer is left";
  EXPECT_EQ(pool->Bytes(a)[0], std::byte(1));
  EXPECT_EQ(pool->shared(), 2u);
  pool->Unshare(a);
  EXPECT_TRUE(pool->ReclaimDue());
  EXPECT_EQ(Reclaim(), std::vector<Frame>{a});
  EXPECT_EQ(punched, 1u);
  EXPECT_EQ(sys.FramePages(), 1u);
  EXPECT_FALSE(pool->ReclaimDue());
  EXPECT_FALSE(pool->Live(a));
  EXPECT_EQ(pool->Bytes(b)[0], std::byte(2));
  EXPECT_EQ(pool->shared(), 1u);
  EXPECT_EQ(pool->live(), 1u);
}

TEST_F(PoolTest, PinsKeepTheBytesAndCoversThePlace) {
  const Frame a = Publish(1);
  pool->Pin(a);
  pool->Share(a);
  pool->Cover(a);
  pool->Unshare(a);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{});
  EXPECT_TRUE(pool->Live(a));
  pool->Unpin(a);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{a});
  EXPECT_EQ(pool->live(), 0u);
  EXPECT_EQ(pool->in_use(), 1u) << "a mapping covers the place";
  pool->Uncover(a);
  EXPECT_TRUE(pool->ReclaimDue());
  EXPECT_EQ(Reclaim(), std::vector<Frame>{}) << "it was given up before";
  EXPECT_EQ(pool->in_use(), 0u);
}

TEST_F(PoolTest, WhatIsNeverMappedIsReclaimed) {
  const Frame a = Publish(1), b = Publish(2);
  pool->Pin(b);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{a});
  EXPECT_EQ(pool->in_use(), 1u);
  pool->Unpin(b);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{b});
  EXPECT_EQ(pool->in_use(), 0u);
}

TEST_F(PoolTest, NeighboursArePunchedByOneCall) {
  const std::vector<Frame> frames = Allocate(100);
  pool->Pin(frames[40]);
  std::vector<os::Span> holes;
  sys.hooks.after = [&](const os::FakeCall& call) {
    if (std::string_view(call.name) == "PunchFile") holes.push_back(call.span);
  };
  EXPECT_EQ(Reclaim().size(), 99u);
  ASSERT_EQ(holes.size(), 2u);
  EXPECT_EQ(holes[0].start, pool->Offset(frames[0]));
  EXPECT_EQ(holes[0].bytes, 40 * kPage);
  EXPECT_EQ(holes[1].start, pool->Offset(frames[41]));
  EXPECT_EQ(holes[1].bytes, 59 * kPage);
}

// New places come first; freed ones are used again once they are a chunk and a quarter of the whole, the longest run of a
// chunk before the shorter ones, so that frames stay consecutive.
TEST_F(PoolTest, FreedPlacesComeBackLongestRunFirst) {
  const std::vector<Frame> frames = Allocate(2048);
  for (std::size_t i = 0; i < 2048; ++i) {
    if (i >= 1024 || i == 100 || i == 600) pool->Share(frames[i]);
  }
  EXPECT_EQ(Reclaim().size(), 1022u);
  EXPECT_EQ(pool->in_use(), 1026u);
  std::vector<Frame> expected;
  for (std::size_t i = 101; i < 512; ++i) expected.push_back(frames[i]);
  for (std::size_t i = 0; i < 100; ++i) expected.push_back(frames[i]);
  // 511 are left: too few to be looked for.
  for (std::size_t i = 0; i < 10; ++i) expected.push_back(frames[2047] + 1 + static_cast<Frame>(i));
  EXPECT_EQ(Allocate(expected.size()), expected);
}

// Each node has files of its own, and what is freed in them is the node's again.
TEST_F(PoolTest, NodesHaveFilesOfTheirOwn) {
  sys.nodes = 2;
  const auto allocate = [&](int node, std::size_t n) {
    std::vector<Frame> frames;
    for (std::size_t i = 0; i < n; ++i) frames.push_back(pool->Allocate(node));
    return frames;
  };
  const Frame anywhere = pool->Allocate();
  const std::vector<Frame> first = allocate(0, 1024), second = allocate(1, 1024);
  EXPECT_EQ(pool->node(anywhere), os::kNoNode);
  for (std::size_t i = 0; i < 1024; ++i) {
    ASSERT_EQ(first[i], first[0] + i);
    ASSERT_EQ(second[i], second[0] + i);
    ASSERT_EQ(pool->node(first[i]), 0);
    ASSERT_EQ(pool->node(second[i]), 1);
  }
  const std::vector<std::byte> bytes(kPage, std::byte(7));
  for (const Frame f : {first[0], second[0]}) {
    EXPECT_EQ(sys.WriteFile(pool->OsFile(f), pool->Offset(f), reinterpret_cast<os::Address>(bytes.data()), kPage).done, kPage);
    const auto at = reinterpret_cast<os::Address>(pool->Bytes(f));
    int node = -2;
    EXPECT_EQ(sys.QueryNodes(&at, 1, &node), 0);
    EXPECT_EQ(node, pool->node(f));
  }
  pool->Share(anywhere);
  for (const Frame f : first) pool->Share(f);
  EXPECT_EQ(Reclaim().size(), 1024u);
  // All of one node's are free, and none of the other's.
  EXPECT_GT(allocate(0, 1)[0], first.back());
  EXPECT_EQ(allocate(1, 1024), second);
  EXPECT_GT(allocate(1, 1)[0], second.back());
}

TEST_F(PoolTest, ANodeThatRefusesMemoryHasNoFrames) {
  sys.nodes = 2;
  sys.hooks.before = [](os::FakeCall& call) { return std::strcmp(call.name, "BindFile") == 0 && call.other == 1 ? -ENOMEM : 0; };
  EXPECT_EQ(pool->Allocate(1), kNoFrame);
  EXPECT_NE(pool->Allocate(0), kNoFrame);
  sys.hooks.before = nullptr;
  EXPECT_NE(pool->Allocate(1), kNoFrame);
}

TEST_F(PoolTest, ARecycledFrameStartsAnew) {
  sys.file_size_limit = 512 * kPage;
  const std::vector<Frame> frames = Allocate(512);
  for (const Frame f : frames) {
    pool->set_hash(f, 77);
    pool->set_next(f, frames[0]);
  }
  EXPECT_EQ(Reclaim().size(), 512u);
  const std::set<Frame> before(frames.begin(), frames.end());
  const Frame again = pool->Allocate();
  EXPECT_TRUE(before.count(again));
  EXPECT_EQ(pool->hash(again), 0u);
  EXPECT_EQ(pool->next(again), kNoFrame);
  EXPECT_EQ(pool->sharers(again), 0u);
  EXPECT_EQ(pool->pins(again), 0u);
  EXPECT_EQ(pool->Bytes(again)[0], std::byte(0)) << "the old bytes were given back";
}

TEST_F(PoolTest, AChainIsKeptWhateverHappensToItsFrames) {
  const Frame a = Publish(1), b = Publish(1), c = Publish(1);
  pool->set_next(c, b);
  pool->set_next(b, a);
  for (const Frame f : {a, b, c}) pool->set_hash(f, 0x1234);
  for (const Frame f : {a, c}) pool->Share(f);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{b});
  EXPECT_EQ(pool->next(c), b) << "to be unlinked by whoever is told that it ends";
  EXPECT_EQ(pool->next(b), a);
  EXPECT_EQ(pool->next(a), kNoFrame);
  EXPECT_EQ(pool->hash(a), 0x1234u);
}

TEST_F(PoolTest, NothingIsPunchedThatAChildMayMap) {
  const Frame a = Publish(1);
  pool->Share(a);
  const os::ProcessId child = Fork();
  pool->Unshare(a);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{});
  EXPECT_TRUE(pool->ReclaimDue()) << "it is to be asked again";
  EXPECT_TRUE(pool->Live(a));
  // A newer frame cannot be in a mapping of that child.
  const Frame b = Publish(2);
  pool->Share(b);
  pool->Unshare(b);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{b});
  // The child's own child has what it has.
  const os::ThreadId in_child = sys.AddThread(child);
  const os::ProcessId grandchild = Fork(in_child);
  sys.Exit(child);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{});
  sys.Exit(grandchild);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{a});
  EXPECT_FALSE(pool->ReclaimDue());
}

TEST_F(PoolTest, APlaceIsNotReusedThatAChildMayMap) {
  const Frame a = Publish(1);
  pool->Share(a);
  pool->Cover(a);
  pool->Unshare(a);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{a});
  const os::ProcessId child = Fork();  // inherits the mapping over the empty place
  pool->Uncover(a);
  Reclaim();
  EXPECT_EQ(pool->in_use(), 1u);
  EXPECT_TRUE(pool->ReclaimDue());
  sys.Exit(child);
  Reclaim();
  EXPECT_EQ(pool->in_use(), 0u);
}

// A server whose children overlap: there is always one, and what no living child can map is given back all the same.
TEST_F(PoolTest, ChildrenWithoutAGapDoNotKeepWhatIsOlderThanThey) {
  os::ProcessId last = Fork();
  std::vector<Frame> covered;
  std::size_t most_live = 0, most_in_use = 0;
  for (int generation = 0; generation < 1000; ++generation) {
    const Frame f = Publish(generation);
    pool->Share(f);
    pool->Cover(f);
    const os::ProcessId child = Fork();
    pool->Unshare(f);
    covered.push_back(f);
    if (covered.size() > 3) {  // broken pages lie over their frames for a while
      pool->Uncover(covered.front());
      covered.erase(covered.begin());
    }
    Reclaim();
    sys.Exit(last);
    last = child;
    if (generation % 2) Reclaim();
    most_live = std::max(most_live, pool->live());
    most_in_use = std::max(most_in_use, pool->in_use());
    ASSERT_LE(forks->end(), 8);
  }
  EXPECT_LE(most_live, 8u);
  EXPECT_LE(most_in_use, 12u);
  for (const Frame f : covered) pool->Uncover(f);
  sys.Exit(last);
  Reclaim();
  EXPECT_EQ(pool->in_use(), 0u);
}

// The child that matters is not one of the epoch in which the frame became idle, nor of the one in which it was made.
TEST_F(PoolTest, AnEarlyChildKeepsItsFramesThroughAllLaterEpochs) {
  os::ProcessId last = Fork();
  const Frame before = Publish(1), idle = Publish(2);
  for (const Frame f : {before, idle}) pool->Share(f);
  pool->Unshare(idle);
  Reclaim();
  const os::ProcessId early = Fork();
  std::size_t most_in_use = 0;
  for (int generation = 0; generation < 300; ++generation) {
    const Frame f = Publish(3);
    pool->Share(f);
    const os::ProcessId child = Fork();
    pool->Unshare(f);
    Reclaim();
    sys.Exit(last);
    last = child;
    if (generation == 100) pool->Unshare(before);
    most_in_use = std::max(most_in_use, pool->in_use());
    ASSERT_TRUE(pool->Live(before)) << generation;
    ASSERT_EQ(pool->Bytes(before)[0], std::byte(1));
    ASSERT_LE(forks->end(), 8);
  }
  EXPECT_LE(most_in_use, 12u) << "it keeps only what is older than it is";
  sys.Exit(early);
  Reclaim();
  EXPECT_FALSE(pool->Live(before));
  sys.Exit(last);
  Reclaim();
  EXPECT_EQ(pool->in_use(), 0u);
}

TEST_F(PoolTest, AFrameThatIsTakenUpAgainCountsAnew) {
  for (const int how : {0, 1, 2}) {
    SCOPED_TRACE(how);
    const Frame a = Publish(1);
    pool->Share(a);
    const os::ProcessId first = Fork();
    pool->Unshare(a);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(Reclaim(), std::vector<Frame>{});
    // Mapped again, and inherited by another child.
    if (how == 0) pool->Share(a);
    else if (how == 1) pool->Pin(a);
    else pool->Cover(a), pool->Share(a);
    const os::ProcessId second = Fork();
    if (how == 1) pool->Unpin(a);
    else pool->Unshare(a);
    if (how == 2) pool->Uncover(a);
    sys.Exit(first);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(Reclaim(), std::vector<Frame>{}) << "the second child may map it";
    sys.Exit(second);
    EXPECT_EQ(Reclaim(), std::vector<Frame>{a});
    EXPECT_EQ(pool->in_use(), 0u);
  }
}

// Bytes wait for the children of the time in which somebody shared the frame, the place for those of the time in which
// something covered it.
TEST_F(PoolTest, BytesAndPlaceWaitForDifferentChildren) {
  const Frame a = Publish(1);
  pool->Share(a);
  pool->Cover(a);
  const os::ProcessId shares = Fork();
  pool->Unshare(a);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(Reclaim(), std::vector<Frame>{});
  const os::ProcessId covers = Fork();
  sys.Exit(shares);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{a}) << "the child inherited what the program saw, not the frame";
  pool->Uncover(a);
  for (int i = 0; i < 2; ++i) Reclaim();
  EXPECT_EQ(pool->in_use(), 1u);
  const os::ProcessId neither = Fork();
  Reclaim();
  EXPECT_EQ(pool->in_use(), 1u);
  sys.Exit(covers);
  Reclaim();
  EXPECT_EQ(pool->in_use(), 0u);
  sys.Exit(neither);
}

// A discard is announced before it is done: a child forked a moment after the frame seems idle can have it.
TEST_F(PoolTest, WhatHasToWaitWaitsForChildrenOfThatMomentToo) {
  const Frame a = Publish(1);
  pool->Share(a);
  pool->Cover(a);
  const os::ProcessId first = Fork();
  pool->Unshare(a);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{});
  const os::ProcessId second = Fork();
  sys.Exit(first);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{});
  sys.Exit(second);
  EXPECT_EQ(Reclaim(), std::vector<Frame>{a});
}

TEST_F(PoolTest, APunchThatIsRefusedIsTriedAgain) {
  const Frame a = Publish(1);
  pool->Share(a);
  pool->Unshare(a);
  int refused = 0;
  sys.hooks.before = [&](os::FakeCall& call) {
    if (std::string_view(call.name) != "PunchFile") return 0;
    ++refused;
    return -ENOMEM;
  };
  Reclaim();
  EXPECT_EQ(punched, 0u);
  EXPECT_EQ(refused, 1);
  EXPECT_TRUE(pool->Live(a));
  EXPECT_EQ(pool->in_use(), 1u) << "its bytes are there: not to be reused";
  EXPECT_TRUE(pool->ReclaimDue());
  sys.hooks.before = nullptr;
  Reclaim();
  EXPECT_EQ(punched, 1u);
  EXPECT_EQ(pool->in_use(), 0u);
}

TEST_F(PoolTest, ManyFilesAndTheLimitOfTheirSize) {
  sys.file_size_limit = 512 * kPage;
  const std::vector<Frame> frames = Allocate(1100);
  std::set<int> files;
  for (std::size_t i = 0; i < frames.size(); ++i) {
    ASSERT_NE(frames[i], kNoFrame);
    files.insert(pool->OsFile(frames[i]).fd);
    EXPECT_LT(pool->Offset(frames[i]), 512 * kPage);
    for (const std::size_t k : {0, 512, 1024}) ASSERT_EQ(pool->SameFile(frames[i], frames[k]), i / 512 == k / 512) << i;
  }
  EXPECT_EQ(files.size(), 3u);
  EXPECT_EQ(std::set<Frame>(frames.begin(), frames.end()).size(), frames.size());
}

TEST_F(PoolTest, NoPoolIsAnAnswer) {
  sys.file_size_limit = 512 * kPage - 1;
  EXPECT_EQ(pool->Allocate(), kNoFrame);
  sys.file_size_limit = UINT64_MAX;
  for (const char* refused : {"CreateFile", "MapFile"}) {
    sys.hooks.before = [&](os::FakeCall& call) { return std::string_view(call.name) == refused ? -EMFILE : 0; };
    int open = 0;
    sys.hooks.after = [&](const os::FakeCall& call) {
      open += std::string_view(call.name) == "CreateFile" && std::string_view(refused) != "CreateFile";
      open -= std::string_view(call.name) == "CloseFile";
    };
    EXPECT_EQ(pool->Allocate(), kNoFrame) << refused;
    EXPECT_EQ(open, 0) << "a file has been left behind";
    sys.hooks.after = nullptr;
  }
  EXPECT_EQ(pool->in_use(), 0u);
  sys.hooks.before = nullptr;
  EXPECT_NE(pool->Allocate(), kNoFrame);
}

TEST_F(PoolTest, KnowsItsOwnMappings) {
  const Frame a = pool->Allocate(), b = pool->Allocate();
  os::Mapping m;
  m.start = 0x10000;
  m.end = m.start + 4 * kPage;
  m.device = pool->OsFile(a).device;
  m.inode = pool->OsFile(a).inode;
  m.offset = pool->Offset(a);
  EXPECT_TRUE(pool->IsPoolMapping(m));
  EXPECT_TRUE(pool->Shows(m, m.start, a));
  EXPECT_TRUE(pool->Shows(m, m.start + kPage, b));
  EXPECT_FALSE(pool->Shows(m, m.start, b));
  EXPECT_FALSE(pool->Shows(m, m.end, a + 4));
  EXPECT_FALSE(pool->Shows(m, m.start - kPage, a));
  os::Mapping other = m;
  other.inode++;
  EXPECT_FALSE(pool->IsPoolMapping(other));
  EXPECT_FALSE(pool->Shows(other, m.start, a));
  other = m;
  other.shared = true;
  EXPECT_FALSE(pool->IsPoolMapping(other));
  EXPECT_FALSE(pool->Shows(other, m.start, a));
  other = m;
  other.anonymous = true;
  EXPECT_FALSE(pool->IsPoolMapping(other));
  EXPECT_FALSE(pool->Shows(other, m.start, a));
}

// --- fork watch ------------------------------------------------------------------------------------------------------

using ForkWatchTest = Frames;

TEST_F(ForkWatchTest, AClosedEpochTellsOfItsOwnChildrenAlone) {
  EXPECT_FALSE(forks->HasChild());
  EXPECT_EQ(Refresh(), std::vector<int>{}) << "the newest is never forgotten";
  const os::ProcessId first = Fork();
  EXPECT_TRUE(forks->HasChild());
  EXPECT_TRUE(forks->Begin());
  EXPECT_EQ(forks->epoch(), 1);
  EXPECT_EQ(forks->end(), 2);
  EXPECT_FALSE(forks->HasChild()) << "the child is older";
  EXPECT_EQ(Refresh(), std::vector<int>{});
  const os::ProcessId second = Fork();
  EXPECT_TRUE(forks->HasChild());
  EXPECT_TRUE(forks->Begin());
  EXPECT_EQ(Refresh(), std::vector<int>{});
  sys.Exit(first);
  EXPECT_EQ(Refresh(), (std::vector<int>{0, 0, 1, 2})) << "the second is alive, and was forked after epoch 0 was closed";
  EXPECT_EQ(forks->epoch(), 1);
  sys.Exit(second);
  EXPECT_EQ(Refresh(), (std::vector<int>{0, 0, 1}));
  EXPECT_EQ(forks->epoch(), 0);
}

TEST_F(ForkWatchTest, WhatIsForkedBeforeTheOldEpochIsClosedCountsForBoth) {
  const os::ProcessId first = Fork();
  EXPECT_TRUE(forks->Begin());
  const os::ProcessId second = Fork();
  EXPECT_TRUE(forks->HasChild());
  sys.Exit(first);
  EXPECT_EQ(Refresh(), std::vector<int>{});
  sys.Exit(second);
  EXPECT_FALSE(forks->HasChild());
  EXPECT_EQ(Refresh(), (std::vector<int>{0, 0, 1}));
}

TEST_F(ForkWatchTest, AGrandchildCountsForItsParentsEpoch) {
  const os::ProcessId child = Fork();
  EXPECT_TRUE(forks->Begin());
  EXPECT_EQ(Refresh(), std::vector<int>{});
  const os::ProcessId grandchild = Fork(sys.AddThread(child));  // our advice is not on the child's mapping
  sys.Exit(child);
  EXPECT_EQ(Refresh(), std::vector<int>{});
  EXPECT_FALSE(forks->HasChild());
  sys.Exit(grandchild);
  EXPECT_EQ(Refresh(), (std::vector<int>{0, 0, 1}));
}

TEST_F(ForkWatchTest, AForgottenEpochInTheMiddleLeavesTheOthersInTheirOrder) {
  std::vector<os::ProcessId> children;
  for (int i = 0; i < 4; ++i) {
    children.push_back(Fork());
    EXPECT_TRUE(forks->Begin());
    EXPECT_EQ(Refresh(), std::vector<int>{});
  }
  sys.Exit(children[1]);
  sys.Exit(children[2]);
  EXPECT_EQ(Refresh(), (std::vector<int>{0, 1, 1, 1, 2, 3}));
  sys.Exit(children[0]);
  EXPECT_EQ(Refresh(), (std::vector<int>{0, 0, 1, 2}));
  EXPECT_EQ(forks->epoch(), 1);
}

TEST_F(ForkWatchTest, AnEpochThatCannotBeClosedGoesOnBesideTheOthers) {
  sys.hooks.before = [](os::FakeCall& call) { return std::string_view(call.name) == "ApplyAttributes" ? -ENOMEM : 0; };
  const os::ProcessId first = Fork();
  EXPECT_TRUE(forks->Begin());
  EXPECT_EQ(Refresh(), std::vector<int>{});
  const os::ProcessId second = Fork();
  sys.Exit(first);
  EXPECT_EQ(Refresh(), std::vector<int>{}) << "the second has its canary as well";
  sys.Exit(second);
  EXPECT_EQ(Refresh(), std::vector<int>{}) << "and the next child would have it";
  sys.hooks.before = nullptr;
  EXPECT_EQ(Refresh(), (std::vector<int>{0, 0, 1}));
}

TEST_F(ForkWatchTest, EpochsRunOutAndStaySafe) {
  std::vector<os::ProcessId> children;
  for (std::size_t i = 0; i < ForkWatch::kMaxEpochs + 5; ++i) {
    children.push_back(Fork());
    EXPECT_TRUE(forks->HasChild());
    EXPECT_EQ(forks->Begin(), i + 1 < ForkWatch::kMaxEpochs);
    EXPECT_EQ(Refresh(), std::vector<int>{});
  }
  EXPECT_EQ(forks->end(), ForkWatch::kMaxEpochs);
  for (std::size_t i = 0; i + 1 < children.size(); ++i) sys.Exit(children[i]);
  EXPECT_TRUE(forks->HasChild()) << "the newest child is of the last epoch";
  EXPECT_FALSE(Refresh().empty());
  EXPECT_EQ(forks->epoch(), 0) << "there is room again";
  EXPECT_TRUE(forks->Begin());
  sys.Exit(children.back());
  EXPECT_FALSE(Refresh().empty());
  EXPECT_FALSE(forks->HasChild());
}

TEST_F(ForkWatchTest, WhatCannotBeAskedIsAChild) {
  sys.hooks.before = [](os::FakeCall& call) { return std::string_view(call.name) == "ReadSharing" ? -EPERM : 0; };
  EXPECT_TRUE(forks->HasChild());
  EXPECT_TRUE(forks->Begin());
  EXPECT_EQ(Refresh(), std::vector<int>{});
  sys.hooks.before = nullptr;
  EXPECT_FALSE(forks->HasChild()) << "and is asked again";
  EXPECT_EQ(Refresh(), (std::vector<int>{0, 0, 1}));
}

TEST_F(ForkWatchTest, NoNewEpochIsAnAnswer) {
  sys.hooks.before = [](os::FakeCall& call) { return std::string_view(call.name) == "MapAnonymous" ? -ENOMEM : 0; };
  EXPECT_FALSE(forks->Begin());
  EXPECT_EQ(forks->epoch(), 0);
}

// A child's entry for a swapped page is not counted as a mapping: once a canary has been away it proves nothing any more.
TEST_F(ForkWatchTest, ACanaryThatHasBeenAwayIsNotBelieved) {
  os::Address canary = 0;
  sys.hooks.after = [&](const os::FakeCall& call) {
    if (std::string_view(call.name) == "ReadSharing" && !canary) canary = call.span.start;
  };
  EXPECT_FALSE(forks->HasChild());
  ASSERT_NE(canary, 0u);
  ASSERT_EQ(sys.Discard({canary, kPage}), 0);
  EXPECT_TRUE(forks->HasChild());
  *reinterpret_cast<volatile unsigned char*>(canary) = 1;  // there again, and exclusive
  EXPECT_TRUE(forks->HasChild());
  EXPECT_TRUE(forks->Begin());
  EXPECT_FALSE(forks->HasChild());
  EXPECT_EQ(Refresh(), std::vector<int>{}) << "nor is it forgotten";
}

}  // namespace
}  // namespace ksmu::frames
