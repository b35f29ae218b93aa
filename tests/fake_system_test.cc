// The fake itself: each of Linux's semantics that the merge protocol leans on (docs: kernel facts), as the fake has it.
#include "os/fake_system.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <vector>

namespace ksmu::os {
namespace {

using Op = FakeOperation;
constexpr std::size_t kPage = 4096;
constexpr Address kBase = FakeSystem::kProgramBase;

std::vector<std::byte> Bytes(std::size_t n, int value) { return std::vector<std::byte>(n, std::byte(value)); }

class FakeTest : public testing::Test {
 protected:
  FakeTest() { Use({}); }
  void TearDown() override {
    for (const std::string& v : sys->violations()) ADD_FAILURE() << v;
  }
  void Use(const FakeOptions& options) {
    sys = std::make_unique<FakeSystem>(options);
    sys->MapProgram(kBase, 64 * kPage);
    t = sys->AddThread();
    u = sys->AddThread();
  }
  Address P(std::size_t page) const { return kBase + page * kPage; }
  Span S(std::size_t page, std::size_t pages) const { return {P(page), pages * kPage}; }

  bool Write(Address a, int value, ThreadId by = 0) {
    return sys->Run(by, {.kind = Op::kWrite, .address = a, .data = Bytes(1, value)}) && sys->Outcome(by).error == 0;
  }
  // The byte, -1: waits, -2: SIGSEGV.
  int Read(Address a, ThreadId by = 0) {
    if (!sys->Run(by, {.kind = Op::kRead, .address = a, .bytes = 1})) return -1;
    return sys->Outcome(by).error != 0 ? -2 : static_cast<int>(sys->Outcome(by).data[0]);
  }
  void Resume(ThreadId by) {
    while (sys->Step(by)) {
    }
  }
  int Done(ThreadId by) { return static_cast<int>(sys->Outcome(by).data.at(0)); }
  Event One(Context c) {
    Event e{};
    EXPECT_EQ(sys->ReadEvents(c, &e, 1), 1u);
    return e;
  }
  std::uint32_t Categories(Address a) {
    PageRun run{};
    const ScanRequest request{.required = 0, .inverted = 0, .any_of = 0, .returned = 0x7f, .write_protect = false};
    const ScanResult r = sys->Scan({a, kPage}, request, &run, 1);
    EXPECT_EQ(r.error, 0);
    return r.runs != 0 ? run.categories : 0;
  }
  File NewFile(std::size_t pages, int first_value) {
    File f;
    EXPECT_EQ(sys->CreateFile(pages * kPage, &f), 0);
    for (std::size_t i = 0; i < pages; ++i) {
      auto bytes = Bytes(kPage, first_value + static_cast<int>(i));
      EXPECT_EQ(sys->WriteFile(f, i * kPage, reinterpret_cast<Address>(bytes.data()), kPage).done, kPage);
    }
    return f;
  }
  // A filled private mapping of the file at page `at`, under the breaker.
  void Attach(const File& f, std::size_t at, std::size_t pages, Context breaker = kBreaker) {
    Address a = 0;
    ASSERT_EQ(sys->MapFrames(0, pages * kPage, f, 0, Protection::kReadWrite, &a), 0);
    ASSERT_EQ(sys->Register(breaker, {a, pages * kPage}, kMissing | kWriteProtect | kMinor), 0);
    ASSERT_EQ(sys->Continue(breaker, {a, pages * kPage}, true).error, 0);
    sys->hooks.other_thread = [this, breaker] {
      Event e[4];
      sys->ReadEvents(breaker, e, 4);
    };
    ASSERT_EQ(sys->MoveMapping(a, pages * kPage, P(at)), 0);
    sys->hooks.other_thread = nullptr;
  }
  Address Staging(std::size_t pages) {
    Address a = 0;
    EXPECT_EQ(sys->MapAnonymous(0, pages * kPage, Protection::kReadWrite, &a), 0);
    EXPECT_EQ(sys->ApplyAttributes({a, pages * kPage}, {.dont_fork = true}), 0);
    EXPECT_EQ(sys->Register(kStaging, {a, pages * kPage}, kMissing), 0);
    return a;
  }
  ProcessId Fork(ThreadId by = 0) {
    EXPECT_TRUE(sys->Run(by, {.kind = Op::kFork}));
    return sys->Outcome(by).child;
  }

  std::unique_ptr<FakeSystem> sys;
  ThreadId t = 0, u = 0;
};

TEST_F(FakeTest, AnonymousMemoryReadsZerosAndKeepsWrites) {
  EXPECT_EQ(Read(P(0)), 0);
  EXPECT_EQ(Categories(P(0)), kPresent | kWritten | kPfnZero);
  EXPECT_TRUE(Write(P(0) + 7, 42));
  EXPECT_EQ(Read(P(0) + 7), 42);
  EXPECT_EQ(Read(P(0) + 8), 0);
  EXPECT_EQ(Categories(P(0)), kPresent | kWritten);
  EXPECT_EQ(Categories(P(1)), 0u);
  EXPECT_EQ(Read(kBase - kPage), -2);
}

TEST_F(FakeTest, DiscardZeroesAndProtectionIsChecked) {
  Write(P(0), 1);
  EXPECT_TRUE(sys->Run(t, {.kind = Op::kDiscard, .address = P(0), .bytes = kPage}));
  EXPECT_EQ(Read(P(0)), 0);
  sys->Run(t, {.kind = Op::kProtect, .address = P(0), .bytes = kPage, .protection = Protection::kRead});
  EXPECT_FALSE(Write(P(0), 1));
  EXPECT_EQ(sys->Outcome(t).error, -EFAULT);
  EXPECT_EQ(Read(P(0)), 0);
  sys->Run(t, {.kind = Op::kProtect, .address = P(0), .bytes = kPage, .protection = Protection::kNone});
  EXPECT_EQ(Read(P(0)), -2);
  std::byte b[kPage];
  EXPECT_EQ(sys->ReadProgram(P(0), b, kPage), 0u);
  EXPECT_EQ(sys->QueryMapping(P(64), nullptr), -ENOENT);
}

TEST_F(FakeTest, TrackerReportsWritesAndRearms) {
  Write(P(0), 1);
  ASSERT_EQ(sys->Register(kTracker, S(0, 8), kWriteProtect), 0);
  ASSERT_EQ(sys->WriteProtect(kTracker, S(0, 8), true), 0);
  PageRun runs[4];
  const ScanRequest written{.required = kWritten | kPresent, .returned = kWritten | kPresent, .write_protect = true};
  EXPECT_EQ(sys->Scan(S(0, 8), written, runs, 4).runs, 0u);
  EXPECT_TRUE(Write(P(0), 2));  // resolved in place, nobody waits
  EXPECT_TRUE(Write(P(3), 2));  // not populated before: the marker catches it
  ScanResult r = sys->Scan(S(0, 8), written, runs, 4);
  ASSERT_EQ(r.runs, 2u);
  EXPECT_EQ(runs[0].start, P(0));
  EXPECT_EQ(runs[1].start, P(3));
  EXPECT_EQ(r.walked_to, P(8));
  EXPECT_EQ(sys->Scan(S(0, 8), written, runs, 4).runs, 0u);
  EXPECT_EQ(Read(P(5)), 0);  // a read of a marked page leaves it marked
  EXPECT_EQ(Categories(P(5)), kWpAllowed | kPresent | kPfnZero);
  EXPECT_TRUE(Write(P(7), 2));
  EXPECT_TRUE(Write(P(9), 2));
  r = sys->Scan(S(7, 3), written, runs, 4);  // what is not registered is passed over
  ASSERT_EQ(r.runs, 1u);
  EXPECT_EQ(runs[0].start, P(7));
  EXPECT_EQ(r.walked_to, P(10));
  EXPECT_EQ(sys->Register(kGate, S(0, 1), kMissing), -EBUSY);
}

TEST_F(FakeTest, DiscardedPageCountsAsWrittenOnlyWhereNothingElseIsAsked) {
  Write(P(0), 1);
  Write(P(1), 1);
  ASSERT_EQ(sys->Register(kTracker, S(0, 2), kWriteProtect), 0);
  ASSERT_EQ(sys->WriteProtect(kTracker, S(0, 2), true), 0);
  sys->Run(t, {.kind = Op::kDiscard, .address = P(0), .bytes = kPage});
  PageRun run;
  EXPECT_EQ(sys->Scan(S(0, 2), {.required = kWritten, .returned = kWritten}, &run, 1).runs, 1u);
  EXPECT_EQ(sys->Scan(S(0, 2), {.required = kWritten, .returned = kWritten | kPresent}, &run, 1).runs, 0u);
}

TEST_F(FakeTest, ScanStopsAtCapacityAndInverts) {
  for (std::size_t i = 0; i < 6; i += 2) Write(P(i), 1);
  PageRun runs[2];
  ScanResult r = sys->Scan(S(0, 6), {.required = kPresent, .returned = kPresent}, runs, 2);
  EXPECT_EQ(r.runs, 2u);
  EXPECT_EQ(r.walked_to, P(4));
  r = sys->Scan(S(0, 6), {.required = kPresent, .inverted = kPresent, .returned = 0}, runs, 2);
  EXPECT_EQ(r.runs, 2u);
  EXPECT_EQ(runs[0].start, P(1));
  EXPECT_EQ(runs[1].start, P(3));
  r = sys->Scan(S(0, 6), {.required = kPresent, .inverted = kPresent, .returned = 0, .max_pages = 1}, runs, 2);
  EXPECT_EQ(r.runs, 1u);
  EXPECT_EQ(r.walked_to, P(2));
}

TEST_F(FakeTest, GateBlocksAccessToWhatIsMissing) {
  Write(P(0), 1);
  const Address staging = Staging(4);
  ASSERT_EQ(sys->Register(kGate, S(0, 2), kMissing), 0);
  EXPECT_EQ(Read(P(0)), 1);  // still there
  ASSERT_EQ(sys->Move(kStaging, staging, P(0), kPage).error, 0);
  EXPECT_EQ(*reinterpret_cast<unsigned char*>(staging), 1);
  EXPECT_EQ(Read(P(0)), -1);
  Event e = One(kGate);
  EXPECT_EQ(e.kind, Event::kFault);
  EXPECT_EQ(e.start, P(0));
  EXPECT_FALSE(e.write_protect || e.minor || e.write);
  EXPECT_FALSE(sys->Ready(t));
  EXPECT_EQ(sys->ReadEvents(kGate, &e, 1), 0u);  // told once
  ASSERT_EQ(sys->Move(kGate, P(0), staging, kPage).error, 0);
  EXPECT_FALSE(sys->Ready(t));  // MOVE does not wake here
  sys->Wake(kGate, S(0, 1));
  Resume(t);
  EXPECT_EQ(Done(t), 1);
}

TEST_F(FakeTest, ReplacingARangeWakesNobodyButAnExplicitWakeDoes) {
  ASSERT_EQ(sys->Register(kGate, S(0, 1), kMissing), 0);
  EXPECT_EQ(Read(P(0)), -1);
  Address a;
  ASSERT_EQ(sys->MapAnonymous(P(0), kPage, Protection::kReadWrite, &a), 0);
  EXPECT_FALSE(sys->Ready(t));
  EXPECT_EQ(sys->RegisteredPages(kGate), 0u);
  sys->Wake(kGate, S(0, 1));
  Resume(t);
  EXPECT_EQ(Done(t), 0);
}

TEST_F(FakeTest, UnregisterWakes) {
  ASSERT_EQ(sys->Register(kGate, S(0, 1), kMissing), 0);
  EXPECT_EQ(Read(P(0)), -1);
  ASSERT_EQ(sys->Unregister(kGate, S(0, 1)), 0);
  Resume(t);
  EXPECT_EQ(Done(t), 0);
}

TEST_F(FakeTest, MessageOfOneWhoWasWokenIsGone) {
  ASSERT_EQ(sys->Register(kGate, S(0, 1), kMissing), 0);
  EXPECT_EQ(Read(P(0)), -1);
  EXPECT_TRUE(sys->EventsUnread());
  sys->Wake(kGate, S(0, 1));
  Event e;
  EXPECT_EQ(sys->ReadEvents(kGate, &e, 1), 0u);
  Resume(t);  // faults again
  EXPECT_EQ(sys->ReadEvents(kGate, &e, 1), 1u);
}

TEST_F(FakeTest, MoveRefusesWhatIsPinnedSharedMissingOrElsewhere) {
  const Address staging = Staging(8);
  for (std::size_t i = 0; i < 8; ++i) Write(P(i), 1 + static_cast<int>(i));
  sys->Run(t, {.kind = Op::kPin, .address = P(2), .write = true});
  const PinId pin = sys->Outcome(t).pin;
  Partial r = sys->Move(kStaging, staging, P(0), 4 * kPage);
  EXPECT_EQ(r.error, -EBUSY);
  EXPECT_EQ(r.done, 2 * kPage);
  r = sys->Move(kStaging, staging + 2 * kPage, P(2), kPage);
  EXPECT_EQ(r.error, -EBUSY);
  sys->Unpin(pin);
  EXPECT_EQ(sys->Move(kStaging, staging + 2 * kPage, P(2), kPage).error, 0);
  EXPECT_EQ(sys->Move(kStaging, staging + 2 * kPage, P(3), kPage).error, -EEXIST);
  EXPECT_EQ(sys->Move(kStaging, staging + 3 * kPage, P(2), kPage).error, -ENOENT);
  EXPECT_EQ(sys->Move(kGate, staging + 3 * kPage, P(3), kPage).error, -EINVAL);  // not the context of `to`
  sys->Run(t, {.kind = Op::kProtect, .address = P(3), .bytes = kPage, .protection = Protection::kRead});
  EXPECT_EQ(sys->Move(kStaging, staging + 3 * kPage, P(3), kPage).error, -EINVAL);
  EXPECT_EQ(sys->Move(kStaging, staging + 3 * kPage, P(4), 6 * kPage).error, -EINVAL);  // beyond staging's mapping
}

TEST_F(FakeTest, ForkTakesExclusivityForEverAndPopulateHeals) {
  const Address staging = Staging(2);
  Write(P(0), 1);
  Sharing s;
  sys->ReadSharing(P(0), &s, 1);
  EXPECT_EQ(s, Sharing::kExclusive);
  const ProcessId child = Fork();
  sys->ReadSharing(P(0), &s, 1);
  EXPECT_EQ(s, Sharing::kShared);
  EXPECT_EQ(sys->Move(kStaging, staging, P(0), kPage).error, -EBUSY);
  sys->Exit(child);
  sys->ReadSharing(P(0), &s, 1);
  EXPECT_EQ(s, Sharing::kExclusive);
  EXPECT_EQ(sys->Move(kStaging, staging, P(0), kPage).error, -EBUSY);  // also long after
  ASSERT_EQ(sys->PopulateWrite(S(0, 1)), 0);
  EXPECT_EQ(sys->Move(kStaging, staging, P(0), kPage).error, 0);
}

TEST_F(FakeTest, ForkIsolatesAndLeavesOut) {
  Write(P(0), 1);
  Write(P(1), 1);
  const Address staging = Staging(1);
  Address canary;
  ASSERT_EQ(sys->MapAnonymous(0, kPage, Protection::kReadWrite, &canary), 0);
  *reinterpret_cast<unsigned char*>(canary) = 9;  // a plain store
  const ProcessId child = Fork();
  const ThreadId c = sys->AddThread(child);
  Write(P(0), 2);
  EXPECT_EQ(Read(P(0), c), 1);
  Write(P(1), 3, c);
  EXPECT_EQ(Read(P(1)), 1);
  EXPECT_EQ(Read(staging, c), -2);  // DONTFORK
  EXPECT_EQ(Read(canary, c), 9);
  Sharing s;
  sys->ReadSharing(canary, &s, 1);
  EXPECT_EQ(s, Sharing::kShared);
  *reinterpret_cast<unsigned char*>(canary) = 8;  // written: a page of our own again, the child keeps its
  sys->ReadSharing(canary, &s, 1);
  EXPECT_EQ(s, Sharing::kExclusive);
  EXPECT_EQ(Read(canary, c), 9);
}

TEST_F(FakeTest, ForkCopiesPinnedPagesAtOnce) {
  Write(P(0), 1);
  sys->Run(t, {.kind = Op::kPin, .address = P(0), .write = true});
  const PinId pin = sys->Outcome(t).pin;
  const ThreadId c = sys->AddThread(Fork());
  sys->PinWrite(pin, 0, Bytes(1, 5));
  EXPECT_EQ(Read(P(0)), 5);
  EXPECT_EQ(Read(P(0), c), 1);
  EXPECT_TRUE(sys->PinInPlace(pin));
  sys->Unpin(pin);
}

TEST_F(FakeTest, AsynchronousBreakCopiesInPlace) {
  const File f = NewFile(4, 10);
  Attach(f, 0, 4);
  EXPECT_EQ(Categories(P(1)), kWpAllowed | kPresent | kFile);
  EXPECT_EQ(Read(P(1)), 11);
  EXPECT_TRUE(Write(P(1), 99));
  EXPECT_EQ(Read(P(1)), 99);
  EXPECT_EQ(Read(P(1) + 1), 11);
  EXPECT_EQ(Categories(P(1)), kWpAllowed | kPresent | kWritten);
  EXPECT_EQ(Categories(P(2)), kWpAllowed | kPresent | kFile);
  const std::byte* bytes;
  ASSERT_EQ(sys->MapFile(f, 4 * kPage, &bytes), 0);
  EXPECT_EQ(bytes[kPage], std::byte{11});  // the frame has not changed
}

TEST_F(FakeTest, SynchronousBreakWaitsForTheProtectionToBeCleared) {
  const File f = NewFile(1, 10);
  Attach(f, 0, 1, kSyncBreaker);
  EXPECT_FALSE(Write(P(0), 99));
  const Event e = One(kSyncBreaker);
  EXPECT_TRUE(e.write_protect && e.write);
  EXPECT_EQ(Read(P(0), u), 10);
  ASSERT_EQ(sys->WriteProtect(kSyncBreaker, S(0, 1), false), 0);
  Resume(t);
  EXPECT_EQ(Read(P(0)), 99);
}

TEST_F(FakeTest, RawDiscardOfMergedPagesIsAnEventThenAZapThenAMinorFault) {
  const File f = NewFile(2, 10);
  Attach(f, 0, 2);
  EXPECT_FALSE(sys->Run(t, {.kind = Op::kDiscard, .address = P(0), .bytes = 2 * kPage}));
  EXPECT_TRUE(sys->EventPending(kBreaker));
  EXPECT_EQ(sys->WriteProtect(kBreaker, S(0, 1), false), -EAGAIN);
  EXPECT_EQ(sys->ZeroPage(kBreaker, S(0, 1)).error, -EAGAIN);
  EXPECT_EQ(Read(P(0), u), 10);  // not zapped yet
  const Event e = One(kBreaker);
  EXPECT_EQ(e.kind, Event::kRemove);
  EXPECT_EQ(e.start, P(0));
  EXPECT_EQ(e.end, P(2));
  EXPECT_TRUE(sys->EventPending(kBreaker));  // read, but its raiser has not gone on
  EXPECT_TRUE(sys->Step(t));
  EXPECT_FALSE(sys->EventPending(kBreaker));
  EXPECT_EQ(Read(P(0), u), 10);  // and zaps later still
  EXPECT_TRUE(sys->Step(t));
  EXPECT_TRUE(sys->Outcome(t).done);
  EXPECT_EQ(Categories(P(0)), kWpAllowed | kSwapped);  // the mark is left
  EXPECT_EQ(Read(P(0), u), -1);
  const Event m = One(kBreaker);
  EXPECT_TRUE(m.minor);
  EXPECT_EQ(sys->ZeroPage(kBreaker, S(0, 1)).error, -EEXIST);  // the mark is in the way
  ASSERT_EQ(sys->WriteProtect(kBreaker, S(0, 1), false), 0);
  ASSERT_EQ(sys->ZeroPage(kBreaker, S(0, 1)).error, 0);
  Resume(u);
  EXPECT_EQ(Done(u), 0);
  EXPECT_FALSE(Write(P(1), 7));  // MINOR, not WP: nothing is there
  auto zeros = Bytes(kPage, 0);
  ASSERT_EQ(sys->Copy(kBreaker, P(1), zeros.data(), kPage, true).error, 0);  // over the mark
  Resume(t);
  EXPECT_EQ(Read(P(1)), 7);
}

TEST_F(FakeTest, DiscardZapsWhateverIsThereLater) {
  const File f = NewFile(1, 10);
  Attach(f, 0, 1);
  EXPECT_FALSE(sys->Run(t, {.kind = Op::kDiscard, .address = P(0), .bytes = kPage}));
  One(kBreaker);
  Address a;
  ASSERT_EQ(sys->MapAnonymous(P(0), kPage, Protection::kReadWrite, &a), 0);
  EXPECT_TRUE(Write(P(0), 5, u));
  Resume(t);
  EXPECT_EQ(Read(P(0)), 0);
}

TEST_F(FakeTest, FaultsAreReadBeforeEvents) {
  const File f = NewFile(2, 10);
  Attach(f, 0, 2);
  sys->Run(t, {.kind = Op::kDiscard, .address = P(0), .bytes = kPage});
  One(kBreaker);
  Resume(t);
  sys->Run(t, {.kind = Op::kDiscard, .address = P(1), .bytes = kPage});
  EXPECT_EQ(Read(P(0), u), -1);
  Event e[2];
  ASSERT_EQ(sys->ReadEvents(kBreaker, e, 2), 2u);
  EXPECT_EQ(e[0].kind, Event::kFault);
  EXPECT_EQ(e[1].kind, Event::kRemove);
}

TEST_F(FakeTest, BrokenPageDiscardedShowsTheFrameAgainAndPunchedOnesZeros) {
  const File f = NewFile(3, 10);
  Address a;
  ASSERT_EQ(sys->MapFrames(P(0), 3 * kPage, f, 0, Protection::kReadWrite, &a), 0);  // under no context
  EXPECT_EQ(Read(P(0)), 10);
  EXPECT_EQ(Categories(P(1)), kPresent | kWritten | kFile);  // fault-around
  EXPECT_TRUE(Write(P(0), 50));
  EXPECT_TRUE(sys->Run(t, {.kind = Op::kDiscard, .address = P(0), .bytes = kPage}));
  EXPECT_EQ(Read(P(0)), 10);
  Write(P(0), 50);
  ASSERT_EQ(sys->PunchFile(f, 0, 2 * kPage), 0);
  EXPECT_EQ(Read(P(0)), 50);
  EXPECT_EQ(Read(P(1)), 0);
  EXPECT_EQ(Read(P(2)), 12);
}

TEST_F(FakeTest, PunchedUnderTheBreakerIsAMissingFault) {
  const File f = NewFile(1, 10);
  Attach(f, 0, 1);
  ASSERT_EQ(sys->PunchFile(f, 0, kPage), 0);
  EXPECT_EQ(Read(P(0)), -1);
  const Event e = One(kBreaker);
  EXPECT_FALSE(e.minor || e.write_protect);
  EXPECT_EQ(sys->Continue(kBreaker, S(0, 1), true).error, -EFAULT);
}

TEST_F(FakeTest, ContinueStopsAtWhatIsMapped) {
  const File f = NewFile(4, 10);
  Address a;
  ASSERT_EQ(sys->MapFrames(P(0), 4 * kPage, f, 0, Protection::kReadWrite, &a), 0);
  ASSERT_EQ(sys->Register(kBreaker, S(0, 4), kWriteProtect | kMinor), 0);
  ASSERT_EQ(sys->Continue(kBreaker, S(2, 1), true).error, 0);
  const Partial r = sys->Continue(kBreaker, S(0, 4), true);
  EXPECT_EQ(r.error, -EEXIST);
  EXPECT_EQ(r.done, 2 * kPage);
  EXPECT_EQ(sys->Continue(kBreaker, S(3, 2), true).error, -ENOENT);  // beyond the mapping
}

TEST_F(FakeTest, MoveMappingKeepsTheRegistrationAndWaitsForItsEvent) {
  const File f = NewFile(2, 10);
  Attach(f, 8, 2);
  EXPECT_EQ(sys->RegisteredPages(kBreaker), 2u);
  EXPECT_EQ(Read(P(8)), 10);
  EXPECT_EQ(Read(P(7)), 0);
  // Nobody reads: the library would hang, and the fake says so.
  EXPECT_EQ(sys->MoveMapping(P(8), 2 * kPage, P(20)), 0);
  ASSERT_EQ(sys->violations().size(), 1u);
  const_cast<std::vector<std::string>&>(sys->violations()).clear();
  EXPECT_EQ(Read(P(8)), -2);  // a hole
  EXPECT_EQ(Read(P(20)), 10);
}

TEST_F(FakeTest, MoveMappingWithoutTheEventLosesRegistrationAndMarks) {
  Write(P(0), 1);
  ASSERT_EQ(sys->Register(kTracker, S(0, 4), kWriteProtect), 0);
  ASSERT_EQ(sys->WriteProtect(kTracker, S(0, 4), true), 0);
  ASSERT_EQ(sys->MoveMapping(P(0), 4 * kPage, P(20)), 0);
  EXPECT_EQ(sys->RegisteredPages(kTracker), 0u);
  EXPECT_EQ(Categories(P(20)), kPresent | kWritten);
  EXPECT_EQ(Categories(P(21)), 0u);
  EXPECT_EQ(sys->MoveMapping(P(62), 4 * kPage, P(30)), -EFAULT);
}

TEST_F(FakeTest, TakePagesLeavesTheRangeRegisteredAndEmpty) {
  const File f = NewFile(4, 10);
  Attach(f, 0, 4);
  Write(P(1), 77);
  sys->hooks.other_thread = [this] {
    Event e[4];
    sys->ReadEvents(kBreaker, e, 4);
  };
  Address taken;
  ASSERT_EQ(sys->TakePages(S(1, 2), &taken), 0);
  sys->hooks.other_thread = nullptr;
  EXPECT_EQ(Read(P(1)), -1);
  EXPECT_TRUE(One(kBreaker).minor);
  unsigned char b[2 * kPage];
  ASSERT_EQ(sys->ReadProgram(taken, b, sizeof b), sizeof b);
  EXPECT_EQ(b[0], 77);
  EXPECT_EQ(b[1], 11);
  EXPECT_EQ(b[kPage], 12);
  ASSERT_EQ(sys->Continue(kBreaker, S(1, 2), true).error, 0);
  Resume(t);
  EXPECT_EQ(Done(t), 11);
  ASSERT_EQ(sys->Unmap({taken, 2 * kPage}), 0);
}

TEST_F(FakeTest, ReadProgramOnAShutGateIsAViolation) {
  ASSERT_EQ(sys->Register(kGate, S(0, 1), kMissing), 0);
  std::byte b;
  EXPECT_EQ(sys->ReadProgram(P(0), &b, 1), 0u);
  ASSERT_EQ(sys->violations().size(), 1u);
  const_cast<std::vector<std::string>&>(sys->violations()).clear();
}

TEST_F(FakeTest, ForkEventHandsOutTheChildsContext) {
  const File f = NewFile(2, 10);
  Attach(f, 0, 2);
  EXPECT_FALSE(sys->Run(t, {.kind = Op::kFork}));
  EXPECT_EQ(sys->WriteProtect(kBreaker, S(0, 1), false), -EAGAIN);
  const Event e = One(kBreaker);
  ASSERT_EQ(e.kind, Event::kFork);
  ASSERT_GE(e.child, kFirstChild);
  Resume(t);
  const ProcessId child = sys->Outcome(t).child;
  const ThreadId c = sys->AddThread(child);
  EXPECT_EQ(Read(P(0), c), 10);
  EXPECT_TRUE(Write(P(1), 3, c));
  EXPECT_EQ(Read(P(1)), 11);
  EXPECT_FALSE(sys->Run(c, {.kind = Op::kDiscard, .address = P(0), .bytes = kPage}));
  EXPECT_EQ(One(e.child).kind, Event::kRemove);
  Resume(c);
  EXPECT_EQ(Read(P(0), c), -1);
  EXPECT_TRUE(One(e.child).minor);
  auto zeros = Bytes(kPage, 0);
  ASSERT_EQ(sys->Copy(e.child, P(0), zeros.data(), kPage, true).error, 0);
  Resume(c);
  EXPECT_EQ(Done(c), 0);
  EXPECT_TRUE(sys->ContextAlive(e.child));
  sys->Exit(child);
  EXPECT_FALSE(sys->ContextAlive(e.child));
  EXPECT_EQ(sys->Copy(e.child, P(0), zeros.data(), kPage, true).error, -ESRCH);
  sys->CloseContext(e.child);
}

TEST_F(FakeTest, ClosingAContextLetsEverybodyGoOnAndDropsUnreadForks) {
  const File f = NewFile(2, 10);
  Attach(f, 0, 2);
  EXPECT_FALSE(sys->Run(t, {.kind = Op::kFork}));
  const Event e = One(kBreaker);
  Resume(t);
  const ThreadId c = sys->AddThread(sys->Outcome(t).child);
  const ThreadId d = sys->AddThread(sys->Outcome(t).child);
  EXPECT_FALSE(sys->Run(c, {.kind = Op::kFork}));  // a grandchild, whose event nobody reads
  EXPECT_FALSE(sys->Run(d, {.kind = Op::kDiscard, .address = P(0), .bytes = kPage}));
  sys->CloseContext(e.child);
  Resume(c);
  Resume(d);
  EXPECT_TRUE(sys->Outcome(c).done);
  EXPECT_TRUE(sys->Outcome(d).done);
  EXPECT_EQ(sys->RegisteredPages(e.child), 0u);
  const ThreadId g = sys->AddThread(sys->Outcome(c).child);
  EXPECT_TRUE(sys->Run(g, {.kind = Op::kDiscard, .address = P(1), .bytes = kPage}));  // under no context
}

TEST_F(FakeTest, PinsAreKnown) {
  Write(P(0), 1);
  EXPECT_TRUE(sys->NoLongTermPins());
  sys->Run(t, {.kind = Op::kPin, .address = P(0), .write = true});
  EXPECT_FALSE(sys->NoLongTermPins());
  sys->Unpin(sys->Outcome(t).pin);
  EXPECT_TRUE(sys->NoLongTermPins());
}

TEST_F(FakeTest, WithoutTheForkEventTheChildIsUnregisteredAndMarksAreGone) {
  FakeOptions options;
  options.fork_events = false;
  Use(options);
  const File f = NewFile(2, 10);
  Attach(f, 0, 2);
  sys->Run(t, {.kind = Op::kDiscard, .address = P(0), .bytes = kPage});
  One(kBreaker);
  Resume(t);
  const ThreadId c = sys->AddThread(Fork());
  EXPECT_EQ(Read(P(0), c), 10);  // the parent's discarded page shows the old bytes
  EXPECT_EQ(Read(P(0)), -1);
  EXPECT_TRUE(sys->Run(c, {.kind = Op::kDiscard, .address = P(1), .bytes = kPage}));
  EXPECT_EQ(Read(P(1), c), 11);
}

TEST_F(FakeTest, DirectWriteGoesThroughItsPin) {
  Write(P(0), 1);
  const Address staging = Staging(1);
  sys->Start(t, {.kind = Op::kDirectWrite, .address = P(0), .data = Bytes(2, 8)});
  EXPECT_TRUE(sys->Step(t));
  EXPECT_FALSE(sys->Outcome(t).done);
  EXPECT_EQ(sys->Move(kStaging, staging, P(0), kPage).error, -EBUSY);
  EXPECT_TRUE(sys->Step(t));
  EXPECT_EQ(Read(P(0)), 8);
  EXPECT_EQ(sys->Move(kStaging, staging, P(0), kPage).error, 0);
}

TEST_F(FakeTest, ReadOnlyPinUnsharesWithoutAWrite) {
  const File f = NewFile(1, 10);
  Attach(f, 0, 1);
  ASSERT_TRUE(sys->Run(t, {.kind = Op::kPin, .address = P(0)}));
  EXPECT_EQ(Categories(P(0)), kWpAllowed | kPresent);  // private, and still protected
  EXPECT_TRUE(sys->PinInPlace(sys->Outcome(t).pin));
  Write(P(0), 3, u);
  EXPECT_EQ(sys->PinBytes(sys->Outcome(t).pin)[0], std::byte{3});
}

TEST_F(FakeTest, SwappedFrameIsAMinorFaultAndSwappedPagesMove) {
  const File f = NewFile(1, 10);
  Attach(f, 0, 1);
  sys->Run(t, {.kind = Op::kSwapOut, .address = P(0)});
  EXPECT_EQ(Categories(P(0)), kWpAllowed | kSwapped);
  EXPECT_EQ(Read(P(0)), -1);
  EXPECT_TRUE(One(kBreaker).minor);
  ASSERT_EQ(sys->Continue(kBreaker, S(0, 1), true).error, 0);
  Resume(t);
  EXPECT_EQ(Done(t), 10);
  Write(P(4), 6);
  sys->Run(t, {.kind = Op::kSwapOut, .address = P(4)});
  EXPECT_EQ(Categories(P(4)), kSwapped | kWritten);
  EXPECT_EQ(Read(P(4)), 6);
}

TEST_F(FakeTest, MapLimitFailsWhatWouldSplit) {
  FakeOptions options;
  options.max_mappings = 3;
  Use(options);
  EXPECT_EQ(sys->Register(kTracker, S(0, 64), kWriteProtect), 0);
  EXPECT_EQ(sys->CountMappings(), 1u);
  EXPECT_EQ(sys->Unregister(kTracker, S(1, 1)), 0);
  EXPECT_EQ(sys->CountMappings(), 3u);
  EXPECT_EQ(sys->Unregister(kTracker, S(5, 1)), -ENOMEM);
  Address a;
  EXPECT_EQ(sys->MapAnonymous(0, kPage, Protection::kReadWrite, &a), -ENOMEM);
  EXPECT_EQ(sys->Register(kTracker, S(1, 1), kWriteProtect), 0);
  EXPECT_EQ(sys->CountMappings(), 1u);
}

TEST_F(FakeTest, FramesOfOneFileGrowTogether) {
  const File f = NewFile(4, 10);
  Address a;
  ASSERT_EQ(sys->MapFrames(P(1), kPage, f, 0, Protection::kReadWrite, &a), 0);
  EXPECT_EQ(sys->CountMappings(), 3u);
  ASSERT_EQ(sys->MapFrames(P(2), kPage, f, kPage, Protection::kReadWrite, &a), 0);
  EXPECT_EQ(sys->CountMappings(), 3u);
  ASSERT_EQ(sys->MapFrames(P(3), kPage, f, kPage, Protection::kReadWrite, &a), 0);  // the same offset
  EXPECT_EQ(sys->CountMappings(), 4u);
}

TEST_F(FakeTest, WritingAFrameThatIsMappedIsAViolation) {
  const File f = NewFile(1, 10);
  Attach(f, 0, 1);
  auto bytes = Bytes(kPage, 1);
  sys->WriteFile(f, 0, reinterpret_cast<Address>(bytes.data()), kPage);
  ASSERT_EQ(sys->violations().size(), 1u);
  const_cast<std::vector<std::string>&>(sys->violations()).clear();
}

TEST_F(FakeTest, InjectedFailuresCanLeaveAPrefixDone) {
  Write(P(0), 1);
  Write(P(1), 2);
  const Address staging = Staging(2);
  sys->hooks.before = [](FakeCall& call) {
    if (std::string_view(call.name) != "Move") return 0;
    call.do_first = kPage;
    return -EBUSY;
  };
  Partial r = sys->Move(kStaging, staging, P(0), 2 * kPage);
  EXPECT_EQ(r.error, -EBUSY);
  EXPECT_EQ(r.done, kPage);
  sys->hooks.before = [](FakeCall&) { return -ENOMEM; };
  EXPECT_EQ(sys->Register(kGate, S(0, 1), kMissing), -ENOMEM);
  EXPECT_EQ(sys->RegisteredPages(kGate), 0u);
  sys->hooks.before = nullptr;
  EXPECT_EQ(Read(P(1)), 2);
}

TEST_F(FakeTest, WhatTheLibraryWroteByPlainStoresMovesWithItsMapping) {
  Address own;
  ASSERT_EQ(sys->MapAnonymous(0, 2 * kPage, Protection::kReadWrite, &own), 0);
  std::memset(reinterpret_cast<void*>(own + kPage), 6, kPage);
  ASSERT_EQ(sys->MoveMapping(own, 2 * kPage, P(3)), 0);
  EXPECT_EQ(Read(P(3)), 0);
  EXPECT_EQ(Read(P(4)), 6);
}

TEST_F(FakeTest, WhatTheLibraryWroteByPlainStoresIsDiscarded) {
  Address own;
  ASSERT_EQ(sys->MapAnonymous(0, kPage, Protection::kReadWrite, &own), 0);
  auto* byte = reinterpret_cast<volatile unsigned char*>(own);
  *byte = 6;
  ASSERT_EQ(sys->Discard({own, kPage}), 0);
  EXPECT_EQ(*byte, 0);
}

TEST_F(FakeTest, StagingThatIsMissingIsNotReadable) {
  Write(P(0), 1);
  const Address staging = Staging(1);
  ASSERT_EQ(sys->Move(kStaging, staging, P(0), kPage).error, 0);
  EXPECT_EQ(*reinterpret_cast<volatile unsigned char*>(staging), 1);
  ASSERT_EQ(sys->Discard({staging, kPage}), 0);
  EXPECT_DEATH({ (void)*reinterpret_cast<volatile unsigned char*>(staging); }, "");
}

}  // namespace
}  // namespace ksmu::os
