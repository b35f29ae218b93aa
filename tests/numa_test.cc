// NUMA nodes kept apart: what is merged with merge_across_nodes 0 lies on its own node, in one process and in a domain.
//
// Needs a machine, or a guest, with two nodes.
#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <set>
#include <vector>

#include "domain_support.h"

namespace ksmu::test {
namespace {

constexpr std::size_t kPages = 512;

std::set<int> OnlineNodes() {
  std::set<int> nodes;
  for (int node = 0; node < 64; ++node) {
    const std::string cpus = ReadFile("/sys/devices/system/node/node" + std::to_string(node) + "/meminfo");
    if (cpus.find("MemTotal:") != std::string::npos && cpus.find("MemTotal:              0 kB") == std::string::npos) nodes.insert(node);
  }
  return nodes;
}

#define SKIP_WITHOUT_TWO_NODES() \
  if (OnlineNodes().size() < 2) GTEST_SKIP() << "this machine has one NUMA node"

bool Bind(const Memory& memory, int node) {
  const unsigned long mask = 1ul << node;
  return syscall(SYS_mbind, memory.data(), memory.bytes(), MPOL_BIND, &mask, 64ul, 0u) == 0;
}

// On which nodes the memory's pages lie, each of which is read first; -1: one of which that cannot be told.
std::set<int> NodesOf(const Memory& memory) {
  std::vector<void*> pages;
  for (std::size_t i = 0; i < memory.pages(); ++i) {
    static_cast<void>(*static_cast<volatile char*>(memory.page(i)));
    pages.push_back(memory.page(i));
  }
  std::vector<int> status(pages.size(), -1);
  if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, status.data(), 0) != 0) return {-1};
  std::set<int> nodes;
  for (const int s : status) nodes.insert(s < 0 ? -1 : s);
  return nodes;
}

// Two regions with the same contents, one on each of two nodes.
struct Regions {
  Regions() {
    const std::set<int> online = OnlineNodes();
    first = *online.begin();
    second = *online.rbegin();
    EXPECT_TRUE(Bind(a, first));
    EXPECT_TRUE(Bind(b, second));
  }
  void Fill(const std::function<std::uint64_t(std::size_t)>& seed_of) {
    FillPages(a, seed_of);
    FillPages(b, seed_of);
  }
  int Advise(int flags = 0) const {
    if (int result = ksmu_advise(a.data(), a.bytes(), KSMU_MERGEABLE | flags)) return result;
    return ksmu_advise(b.data(), b.bytes(), KSMU_MERGEABLE | flags);
  }
  Memory a{kPages}, b{kPages};
  int first = 0, second = 0;
};

void MergeBoth(const Regions& regions) {
  ASSERT_GE(ksmu_merge(regions.a.data(), regions.a.bytes()), 0) << ksmu_last_error();
  ASSERT_GE(ksmu_merge(regions.b.data(), regions.b.bytes()), 0) << ksmu_last_error();
}

// Each content is there twice on each node.
std::uint64_t Pairs(std::size_t i) { return 1 + i / 2; }
std::uint64_t Once(std::size_t i) { return 1 + i; }

const int kFlags[] = {0, KSMU_F_NO_RAW_DISCARDS};

KSMU_ISOLATED_TEST(Numa, MergedPagesLieOnTheirOwnNode, 120) {
  SKIP_WITHOUT_TWO_NODES();
  Set("run", 0);
  EXPECT_OK(ksmu_set("merge_across_nodes", 0));
  for (const int flags : kFlags) {
    SCOPED_TRACE(flags);
    Regions regions;
    regions.Fill(Pairs);
    ASSERT_OK(regions.Advise(flags));
    MergeBoth(regions);
    EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(2 * kPages));
    EXPECT_EQ(Get("pages_shared"), static_cast<std::int64_t>(kPages)) << "a frame for each content on each node";
    EXPECT_EQ(NodesOf(regions.a), std::set<int>{regions.first});
    EXPECT_EQ(NodesOf(regions.b), std::set<int>{regions.second});
    EXPECT_TRUE(PagesAre(regions.a, Pairs));
    EXPECT_TRUE(PagesAre(regions.b, Pairs));
    EXPECT_ERRNO(EBUSY, ksmu_set("merge_across_nodes", 1));
    EXPECT_ERRNO(EINVAL, ksmu_set("merge_across_nodes", 2));
    EXPECT_OK(ksmu_set("merge_across_nodes", 0)) << "as it is";
    // Whoever writes, and wherever it runs: the copy comes to lie where the page was.
    for (const int cpu : {0, 1}) {
      cpu_set_t cpus;
      CPU_ZERO(&cpus);
      CPU_SET(cpu, &cpus);
      sched_setaffinity(0, sizeof cpus, &cpus);
      for (std::size_t i = static_cast<std::size_t>(cpu); i < kPages; i += 4) regions.b.page(i)[0] ^= 1;
    }
    EXPECT_EQ(NodesOf(regions.b), std::set<int>{regions.second});
    EXPECT_OK(ksmu_advise(regions.a.data(), regions.a.bytes(), KSMU_UNMERGEABLE));
    EXPECT_OK(ksmu_advise(regions.b.data(), regions.b.bytes(), KSMU_UNMERGEABLE));
    EXPECT_EQ(Get("pages_merged"), 0);
    EXPECT_EQ(NodesOf(regions.a), std::set<int>{regions.first});
    EXPECT_EQ(NodesOf(regions.b), std::set<int>{regions.second});
  }
}

KSMU_ISOLATED_TEST(Numa, WhatIsEqualOnTwoNodesOnlyIsNotMerged, 60) {
  SKIP_WITHOUT_TWO_NODES();
  Set("run", 0);
  EXPECT_OK(ksmu_set("merge_across_nodes", 0));
  Regions regions;
  regions.Fill(Once);
  ASSERT_OK(regions.Advise());
  MergeBoth(regions);
  EXPECT_EQ(Get("pages_merged"), 0);
  EXPECT_EQ(Get("pages_unshared"), static_cast<std::int64_t>(2 * kPages));
  // The other way about: what has been seen is looked at again.
  EXPECT_OK(ksmu_set("merge_across_nodes", 1));
  MergeBoth(regions);
  EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(2 * kPages));
  EXPECT_EQ(Get("pages_shared"), static_cast<std::int64_t>(kPages)) << "one frame for each content";
  EXPECT_EQ(NodesOf(regions.a), NodesOf(regions.b));
  EXPECT_ERRNO(EBUSY, ksmu_set("merge_across_nodes", 0));
  Set("run", 2);
  EXPECT_OK(ksmu_set("merge_across_nodes", 0));
  Set("run", 0);
  MergeBoth(regions);
  // What was merged across lies on one node now, unless it came back to its own.
  EXPECT_TRUE(PagesAre(regions.a, Once));
  EXPECT_TRUE(PagesAre(regions.b, Once));
}

KSMU_ISOLATED_TEST(Numa, ZeroPagesAreTheSameOnAllNodes, 60) {
  SKIP_WITHOUT_TWO_NODES();
  Set("run", 0);
  EXPECT_OK(ksmu_set("merge_across_nodes", 0));
  Regions regions;
  regions.Fill([](std::size_t) { return 0; });
  ASSERT_OK(regions.Advise());
  MergeBoth(regions);
  EXPECT_EQ(Get("ksm_zero_pages"), static_cast<std::int64_t>(2 * kPages));
}

// A candidate that the kernel has moved since it was hashed.
KSMU_ISOLATED_TEST(Numa, ACandidateThatHasMovedIsLookedForOnItsNewNode, 60) {
  SKIP_WITHOUT_TWO_NODES();
  Set("run", 0);
  EXPECT_OK(ksmu_set("merge_across_nodes", 0));
  Regions regions;
  FillPages(regions.a, Once);
  ASSERT_OK(regions.Advise());
  MergeBoth(regions);
  const unsigned long mask = 1ul << regions.second;
  ASSERT_EQ(syscall(SYS_mbind, regions.a.data(), regions.a.bytes(), MPOL_BIND, &mask, 64ul, static_cast<unsigned>(MPOL_MF_MOVE)), 0);
  ASSERT_EQ(NodesOf(regions.a), std::set<int>{regions.second});
  // Equal to what they were seen as: of which there is nothing on that node now.
  Memory here(kPages);
  ASSERT_TRUE(Bind(here, regions.first));
  FillPages(here, Once);
  ASSERT_OK(ksmu_advise(here.data(), here.bytes(), KSMU_MERGEABLE));
  ASSERT_GE(ksmu_merge(here.data(), here.bytes()), 0);
  EXPECT_EQ(Get("pages_merged"), 0);
  FillPages(regions.b, Once);
  ASSERT_GE(ksmu_merge(regions.a.data(), regions.a.bytes()), 0);
  ASSERT_GE(ksmu_merge(regions.b.data(), regions.b.bytes()), 0);
  EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(2 * kPages));
  EXPECT_EQ(NodesOf(regions.a), std::set<int>{regions.second});
  EXPECT_EQ(NodesOf(regions.b), std::set<int>{regions.second});
}

// Two members, each with the same on both nodes: in the domain a frame for each content and node, or for each content.
void InADomain(bool across) {
  Broker broker(across ? "--log debug --merge-across-nodes 1" : "--log debug --merge-across-nodes 0");
  std::vector<std::unique_ptr<Child>> members;
  for (int number = 0; number < 2; ++number) {
    members.push_back(std::make_unique<Child>(Child::Kind::kFork, [&](Child& self) {
      JoinFlatOut(broker.socket());
      // What the process would do alone makes no difference.
      ksmu_set("merge_across_nodes", across ? 0 : 1);
      Regions regions;
      regions.Fill(Once);
      if (regions.Advise() != 0) self.Report("advise: %s\n", ksmu_last_error());
      if (!WaitUntil([] { return Get("pages_merged") == static_cast<std::int64_t>(2 * kPages); }, 60)) {
        self.Report("merged %ld\n", static_cast<long>(Get("pages_merged")));
      }
      self.Signal(1);
      self.Await(2);
      const std::set<int> a = NodesOf(regions.a), b = NodesOf(regions.b);
      if (across ? a != b : a != std::set<int>{regions.first} || b != std::set<int>{regions.second}) {
        self.Report("the first region lies on %zu nodes, from %d, the second on %zu, from %d\n", a.size(), *a.begin(), b.size(), *b.begin());
      }
      for (std::size_t i = 0; i < kPages; ++i) {
        if (FindWrongByte(regions.a.page(i), Once(i)) >= 0 || FindWrongByte(regions.b.page(i), Once(i)) >= 0) self.Report("page %zu is wrong\n", i);
      }
    }));
  }
  for (auto& member : members) EXPECT_TRUE(member->Await(1, 70));
  EXPECT_EQ(broker.Ask().frames, static_cast<std::int64_t>(across ? kPages : 2 * kPages));
  for (auto& member : members) member->Signal(2);
  for (auto& member : members) member->Join();
  broker.WaitForFrames(0, 10);
  EXPECT_EQ(broker.log().find("dropped"), std::string::npos) << broker.log();
}

KSMU_ISOLATED_TEST(Numa, ADomainThatKeepsNodesApart, 180) {
  SKIP_WITHOUT_TWO_NODES();
  InADomain(false);
}

KSMU_ISOLATED_TEST(Numa, ADomainThatDoesNot, 180) {
  SKIP_WITHOUT_TWO_NODES();
  InADomain(true);
}

// On one node there is nothing to keep apart: the option is taken, and merging is what it was.
KSMU_ISOLATED_TEST(Numa, OneNodeIsNoObstacle, 60) {
  Set("run", 0);
  EXPECT_OK(ksmu_set("merge_across_nodes", 0));
  EXPECT_EQ(Get("merge_across_nodes"), 0);
  Memory memory(kPages);
  const std::set<int> online = OnlineNodes();
  if (online.size() > 1) {
    ASSERT_TRUE(Bind(memory, *online.begin()));
  }
  FillPages(memory, Pairs);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  ASSERT_GE(ksmu_merge(memory.data(), memory.bytes()), 0);
  EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(kPages));
  EXPECT_ERRNO(EBUSY, ksmu_set("merge_across_nodes", 1));
  EXPECT_ERRNO(EINVAL, ksmu_set("merge_across_nodes", -1));
}

}  // namespace
}  // namespace ksmu::test
