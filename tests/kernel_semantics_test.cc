// Contexts, write protection, shared frames: what Linux does (6.8 and later; measured on 6.18).
#include "kernel_semantics.h"
#include "test_support.h"

namespace ksmu::os {
namespace {

using KernelContexts = KernelTest;
using KernelTracking = KernelTest;
using KernelFrames = KernelTest;

// --- contexts ------------------------------------------------------------------------------------------------------

// A range belongs to one context only: QEMU's own registrations get EBUSY while we hold the memory, and we while it
// does.
TEST_F(KernelContexts, SecondRegistrationIsBusy) {
  Uffd first(kTrackerFeatures), second(kGateFeatures);
  Memory memory(2);
  ASSERT_EQ(first.Register(memory.all(), kWriteProtect), 0);
  EXPECT_EQ(second.Register(memory.span(1, 1), kMissing), -EBUSY);
  EXPECT_EQ(uffd::Unregister(first.fd(), memory.span(1, 1)), 0);
  EXPECT_EQ(second.Register(memory.span(1, 1), kMissing), 0);
}

// The feature set is fixed at UFFDIO_API, and asynchronous protection is a property of the context: both kinds of break
// need two contexts.
TEST_F(KernelContexts, SynchronousAndAsynchronousNeedTwoContexts) {
  Uffd async(kTrackerFeatures), sync(uapi::kFeaturePagefaultFlagWp);
  ASSERT_EQ(async.enabled(), 0);
  EXPECT_NE(uffd::Enable(async.fd(), uapi::kFeaturePagefaultFlagWp), 0);
  Memory a(1), s(1);
  a.Fill();
  s.Fill();
  ASSERT_EQ(async.Register(a.all(), kWriteProtect), 0);
  ASSERT_EQ(async.Protect(a.all()), 0);
  a.Word(0) = 1;  // resolved by the kernel; would wait for ever if it were not
  EXPECT_FALSE(async.HasMessage());
  ASSERT_EQ(sync.Register(s.all(), kWriteProtect), 0);
  ASSERT_EQ(sync.Protect(s.all()), 0);
  Worker writer([&] { s.Word(0) = 1; });
  auto message = sync.Next();
  ASSERT_TRUE(message);
  EXPECT_EQ(message->event, UFFD_EVENT_PAGEFAULT);
  EXPECT_TRUE(message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP);
  EXPECT_EQ(sync.Protect(s.all(), false), 0);
}

// All five of the library's feature sets are accepted as they stand.
TEST_F(KernelContexts, FeatureSetsAreAccepted) {
  EXPECT_EQ(Uffd(kTrackerFeatures).enabled(), 0);
  EXPECT_EQ(Uffd(kGateFeatures).enabled(), 0);
  EXPECT_EQ(Uffd(kStagingFeatures).enabled(), 0);
  EXPECT_EQ(Uffd(kBreakerFeatures).enabled(), 0);
  EXPECT_EQ(Uffd(kSyncBreakerFeatures).enabled(), 0);
}

// A descriptor is non-blocking: reading finds nothing rather than waiting for a waiter that was woken otherwise.
TEST_F(KernelContexts, ReadingFindsNothingAndReturns) {
  Uffd context(kGateFeatures);
  uffd_msg message;
  EXPECT_EQ(uffd::Read(context.fd(), &message, 1), 0);
  EXPECT_FALSE(context.HasMessage());
}

// A user-mode-only context: a system call that touches a protected page fails with EFAULT instead of waiting. This is
// why the library refuses to start that way unless told to.
TEST_F(KernelContexts, UserModeOnlyFailsSystemCalls) {
  Uffd context(uapi::kFeaturePagefaultFlagWp, /*user_mode_only=*/true);
  ASSERT_EQ(context.enabled(), 0);
  Memory memory(1);
  memory.Fill();
  ASSERT_EQ(context.Register(memory.all(), kWriteProtect), 0);
  ASSERT_EQ(context.Protect(memory.all()), 0);
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  ASSERT_EQ(write(ends[1], "x", 1), 1);
  EXPECT_EQ(read(ends[0], memory.Pointer(0), 1), -1);
  EXPECT_EQ(errno, EFAULT);
  close(ends[0]);
  close(ends[1]);
}

// With kernel-mode faults handled, the same call waits and then succeeds.
TEST_F(KernelContexts, SystemCallsWaitAtTheGate) {
  Uffd gate(kGateFeatures);
  Memory memory(1);
  ASSERT_EQ(gate.Register(memory.all(), kMissing), 0);
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  ASSERT_EQ(write(ends[1], "x", 1), 1);
  ssize_t result = 0;
  Worker reader([&] { result = read(ends[0], memory.Pointer(0), 1); });
  auto message = gate.Next();
  ASSERT_TRUE(message);
  EXPECT_EQ(message->arg.pagefault.address & ~(kPage - 1), memory.at(0));
  EXPECT_EQ(uffd::ZeroPage(gate.fd(), memory.all()).error, 0);
  reader.Join();
  EXPECT_EQ(result, 1);
  EXPECT_EQ(memory.Word(0), std::uint64_t{'x'});
  close(ends[0]);
  close(ends[1]);
}

// --- the tracker ---------------------------------------------------------------------------------------------------

// One call returns the written pages and protects them again; pages that nobody has populated are watched as well
// (WP_UNPOPULATED).
TEST_F(KernelTracking, ScanReturnsWrittenPagesAndRearms) {
  Uffd tracker(kTrackerFeatures);
  Memory memory(8);
  for (std::size_t i = 0; i < 4; ++i) memory.Word(i) = 1;  // the other four stay unpopulated
  ASSERT_EQ(tracker.Register(memory.all(), kWriteProtect), 0);
  ASSERT_EQ(tracker.Protect(memory.all()), 0);
  EXPECT_TRUE(TakeWritten(memory.all()).empty());
  memory.Word(1) = 2;
  memory.Word(5) = 2;
  EXPECT_EQ(TakeWritten(memory.all()), (std::vector<std::size_t>{1, 5}));
  EXPECT_TRUE(TakeWritten(memory.all()).empty());
  EXPECT_EQ(memory.Word(0), 1u);  // reading is not writing
  EXPECT_EQ(memory.Word(6), 0u);  // also where it populates the zero page
  EXPECT_TRUE(TakeWritten(memory.all()).empty());
  memory.Word(1) = 3;
  EXPECT_EQ(TakeWritten(memory.all()), (std::vector<std::size_t>{1}));
  EXPECT_FALSE(tracker.HasMessage());
}

// Without the feature, protection of an unpopulated page traps nothing.
TEST_F(KernelTracking, UnpopulatedPagesAreNotWatchedWithoutTheFeature) {
  Uffd plain(uapi::kFeaturePagefaultFlagWp);
  Memory memory(1);
  ASSERT_EQ(plain.Register(memory.all(), kWriteProtect), 0);
  ASSERT_EQ(plain.Protect(memory.all()), 0);
  memory.Word(0) = 1;
  EXPECT_FALSE(plain.HasMessage());
}

// Re-arming touches nothing outside an asynchronous registration, where nobody would resolve the faults: such mappings
// are passed over (or are an error, where the caller asks for that), and the walk goes on behind them.
TEST_F(KernelTracking, RearmingPassesOverOtherMappings) {
  Uffd tracker(kTrackerFeatures), gate(kGateFeatures);
  Memory memory(3);
  memory.Fill();
  ASSERT_EQ(gate.Register(memory.span(1, 1), kMissing | kWriteProtect), 0);
  ASSERT_EQ(tracker.Register(memory.span(2, 1), kWriteProtect), 0);
  EXPECT_EQ(TakeWritten(memory.all()), (std::vector<std::size_t>{2}));
  memory.Word(0) = 1;
  memory.Word(1) = 1;
  EXPECT_FALSE(gate.HasMessage());
  EXPECT_TRUE(TakeWritten(memory.all()).empty());
  uapi::PagemapScan strict{};
  strict.size = sizeof strict;
  strict.start = memory.at(0);
  strict.end = memory.all().end();
  strict.category_mask = strict.return_mask = kWritten;
  strict.flags = uapi::kScanWpMatching | uapi::kScanCheckWpAsync;
  PageRun run;
  strict.vec = reinterpret_cast<std::uint64_t>(&run);
  strict.vec_len = 1;
  int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  EXPECT_EQ(ioctl(fd, uapi::kIocPagemapScan, &strict), -1);
  EXPECT_EQ(errno, EPERM);
  close(fd);
}

// The walk says where to go on when the caller's array is full.
TEST_F(KernelTracking, ScanStopsWhereTheArrayIsFull) {
  Uffd tracker(kTrackerFeatures);
  Memory memory(6);
  memory.Fill();
  ASSERT_EQ(tracker.Register(memory.all(), kWriteProtect), 0);
  ASSERT_EQ(tracker.Protect(memory.all()), 0);
  for (std::size_t i : {0, 2, 4}) memory.Word(i) = 1;
  ScanRequest request;
  request.required = kWritten;
  request.returned = kWritten;
  PageRun runs[2];
  ScanResult result = pagemap_.Scan(memory.all(), request, runs, 2);
  ASSERT_EQ(result.error, 0);
  ASSERT_EQ(result.runs, 2u);
  EXPECT_EQ(runs[1].start, memory.at(2));
  EXPECT_GE(result.walked_to, memory.at(3));
  EXPECT_LE(result.walked_to, memory.at(4));
  result = pagemap_.Scan({result.walked_to, memory.all().end() - result.walked_to}, request, runs, 2);
  ASSERT_EQ(result.runs, 1u);
  EXPECT_EQ(runs[0].start, memory.at(4));
}

// More runs than the kernel collects at a time (512): none is found twice by whoever goes on where a scan has ended.
TEST_F(KernelTracking, ScanOfManyRuns) {
  constexpr std::size_t kPages = 1400;  // with 700 runs
  Memory memory(kPages);
  for (std::size_t i = 0; i < kPages; i += 2) memory.Word(i) = 1;
  ScanRequest request;
  request.required = kPresent;
  request.returned = kPresent;
  std::vector<PageRun> runs(1024);
  std::size_t found = 0, scans = 0;
  for (Address at = memory.at(0); at < memory.all().end() && scans < kPages; ++scans) {
    const ScanResult result = pagemap_.Scan({at, memory.all().end() - at}, request, runs.data(), runs.size());
    ASSERT_EQ(result.error, 0);
    ASSERT_GT(result.walked_to, at);
    for (std::size_t i = 0; i < result.runs; ++i) EXPECT_EQ(runs[i].start, memory.at(2 * found++));
    at = result.walked_to;
  }
  EXPECT_EQ(found, kPages / 2);
}

// Whether there is any is a cheap question, though one run reaches from end to end.
TEST_F(KernelTracking, ScanStopsAfterSoManyPages) {
  Uffd tracker(kTrackerFeatures);
  Memory memory(64);
  memory.Fill();
  ASSERT_EQ(tracker.Register(memory.all(), kWriteProtect), 0);
  for (std::uint32_t returned : {std::uint32_t{kWritten}, kWritten | kPresent}) {
    ScanRequest request;
    request.required = request.returned = returned;
    request.max_pages = 1;
    PageRun run;
    const ScanResult result = pagemap_.Scan(memory.all(), request, &run, 1);
    ASSERT_EQ(result.error, 0);
    ASSERT_EQ(result.runs, 1u);
    EXPECT_EQ(run.start, memory.at(0));
    EXPECT_EQ(run.end, memory.at(1));
    EXPECT_LE(result.walked_to, memory.at(1));
  }
}

// A discarded page counts as written: what was known of it is no longer true.
TEST_F(KernelTracking, DiscardedPageCountsAsWritten) {
  Uffd tracker(kTrackerFeatures);
  Memory memory(2);
  memory.Fill();
  ASSERT_EQ(tracker.Register(memory.all(), kWriteProtect), 0);
  ASSERT_EQ(tracker.Protect(memory.all()), 0);
  ASSERT_EQ(madvise(memory.Pointer(1), kPage, MADV_DONTNEED), 0);  // no events on this context
  memory.Word(1) = 5;
  EXPECT_EQ(TakeWritten(memory.all()), (std::vector<std::size_t>{1}));
}

// A huge page is armed whole; the first write splits the mapping and reports the page it went to.
TEST_F(KernelTracking, HugePageIsSplitByTheFirstWrite) {
  constexpr std::size_t kHugeBytes = 2 << 20;
  Memory memory(2 * kHugeBytes / kPage);
  Address huge = (memory.at(0) + kHugeBytes - 1) & ~(kHugeBytes - 1);
  ASSERT_EQ(madvise(reinterpret_cast<void*>(huge), kHugeBytes, MADV_HUGEPAGE), 0);
  std::memset(reinterpret_cast<void*>(huge), 1, kHugeBytes);
  ScanRequest request;
  request.required = kPresent;
  request.returned = kHuge;
  PageRun run{};
  pagemap_.Scan({huge, kPage}, request, &run, 1);
  if (!(run.categories & kHuge)) GTEST_SKIP() << "no transparent huge page to be had here";
  Uffd tracker(kTrackerFeatures);
  ASSERT_EQ(tracker.Register({huge, kHugeBytes}, kWriteProtect), 0);
  ASSERT_EQ(tracker.Protect({huge, kHugeBytes}), 0);
  EXPECT_TRUE(TakeWritten({huge, kHugeBytes}).empty());
  pagemap_.Scan({huge, kPage}, request, &run, 1);
  EXPECT_TRUE(run.categories & kHuge);
  *reinterpret_cast<volatile char*>(huge + 5 * kPage) = 2;
  EXPECT_EQ(TakeWritten({huge, kHugeBytes}), (std::vector<std::size_t>{5}));
  run = {};
  pagemap_.Scan({huge, kPage}, request, &run, 1);
  EXPECT_FALSE(run.categories & kHuge);
}

// --- frames: private mappings of a memory file under the breaker
// ------------------------------------------------------

// CONTINUE with the write-protect mode fills the page table from the page cache, protected; the first write is then
// resolved by the kernel without a message, and leaves the file's bytes as they were.
TEST_F(KernelFrames, AsynchronousBreakLeavesTheFrame) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(4);
  Memory memory(4, &frames);
  Merge(breaker, memory, memory.all());
  EXPECT_EQ(Look(memory.at(1)), kPresent | kFile);
  EXPECT_EQ(memory.Word(1), FrameFile::Word(1));
  memory.Word(1) = 77;
  EXPECT_FALSE(breaker.HasMessage());
  EXPECT_EQ(memory.Word(1), 77u);
  EXPECT_EQ(frames.Stored(1), FrameFile::Word(1));
  // The next sweep finds it: present, and not the file's.
  EXPECT_EQ(Look(memory.at(1)) & (kPresent | kFile), kPresent);
  EXPECT_EQ(Look(memory.at(2)) & (kPresent | kFile), kPresent | kFile);
  EXPECT_EQ(TakeWritten(memory.all()), (std::vector<std::size_t>{1}));
}

// The synchronous breaker: the write is a message; clearing the protection lets the kernel copy and releases the
// writer.
TEST_F(KernelFrames, SynchronousBreakIsDeliveredAndReleased) {
  Uffd breaker(kSyncBreakerFeatures);
  FrameFile frames(2);
  Memory memory(2, &frames);
  Merge(breaker, memory, memory.all());
  Worker writer([&] { memory.Word(1) = 77; });
  auto message = breaker.Next();
  ASSERT_TRUE(message);
  EXPECT_EQ(message->event, UFFD_EVENT_PAGEFAULT);
  EXPECT_EQ(message->arg.pagefault.flags,
            static_cast<std::uint64_t>(UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_WRITE));
  EXPECT_TRUE(writer.StillWaits());
  ASSERT_EQ(breaker.Protect(memory.span(1, 1), false), 0);
  writer.Join();
  EXPECT_EQ(memory.Word(1), 77u);
  EXPECT_EQ(frames.Stored(1), FrameFile::Word(1));
  EXPECT_EQ(Look(memory.at(1)) & (kPresent | kFile), kPresent);
}

// A page-cache page that is not mapped gives a MINOR fault, a place where the file has none a MISSING one.
TEST_F(KernelFrames, PunchedFrameGivesAMissingFault) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(2);
  Memory memory(2, &frames);
  Merge(breaker, memory, memory.all());
  ASSERT_EQ(PunchPoolFile(frames.file(), 0, kPage), 0);
  std::uint64_t seen = 1;
  Worker reader([&] { seen = memory.Word(0); });
  auto message = breaker.Next();
  ASSERT_TRUE(message);
  EXPECT_EQ(message->event, UFFD_EVENT_PAGEFAULT);
  EXPECT_FALSE(message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
  // CONTINUE has nothing to map there.
  EXPECT_EQ(uffd::Continue(breaker.fd(), memory.span(0, 1), true).error, -EFAULT);
  uffd::WriteProtect(breaker.fd(), memory.span(0, 1), false);
  EXPECT_EQ(uffd::ZeroPage(breaker.fd(), memory.span(0, 1)).error, 0);
  reader.Join();
  EXPECT_EQ(seen, 0u);
  EXPECT_EQ(memory.Word(1), FrameFile::Word(1));
}

// A discard of merged pages: the event first, and the discarding thread waits until it is read; then the pages are gone
// and the next touch is a MINOR fault, because the page cache still has the frame.
TEST_F(KernelFrames, DiscardGivesRemoveThenMinor) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(2);
  Memory memory(2, &frames);
  Merge(breaker, memory, memory.all());
  {
    Worker discard([&] { madvise(memory.Pointer(0), kPage, MADV_DONTNEED); });
    ASSERT_TRUE(WaitFor([&] { return breaker.HasMessage(); }));
    EXPECT_TRUE(discard.StillWaits());
    EXPECT_EQ(Look(memory.at(0)) & kPresent, kPresent);  // not yet zapped
    auto message = breaker.Next();
    ASSERT_TRUE(message);
    EXPECT_EQ(message->event, UFFD_EVENT_REMOVE);
    EXPECT_EQ(message->arg.remove.start, memory.at(0));
    EXPECT_EQ(message->arg.remove.end, memory.at(1));
  }
  EXPECT_EQ(Look(memory.at(0)) & kPresent, 0u);
  std::uint64_t seen = 1;
  Worker reader([&] { seen = memory.Word(0); });
  auto message = breaker.Next();
  ASSERT_TRUE(message);
  EXPECT_EQ(message->event, UFFD_EVENT_PAGEFAULT);
  EXPECT_TRUE(message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
  // Answered with zeros by COPY, which needs no clearing of the mark.
  std::vector<char> zeros(kPage);
  EXPECT_EQ(uffd::Copy(breaker.fd(), memory.at(0), zeros.data(), kPage, true).error, 0);
  reader.Join();
  EXPECT_EQ(seen, 0u);
  EXPECT_EQ(frames.Stored(0), FrameFile::Word(0));
}

// The zap leaves the write-protect mark in the page table. ZEROPAGE does not go over it (EEXIST); with the mark cleared
// it does, and no anonymous mapping is needed to give zeros.
TEST_F(KernelFrames, ZeroPageNeedsTheMarkCleared) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(2);
  Memory memory(2, &frames);
  Merge(breaker, memory, memory.all());
  DiscardAsProgram(breaker, memory.all());
  Partial zeroed = uffd::ZeroPage(breaker.fd(), memory.all());
  EXPECT_EQ(zeroed.error, -EEXIST);
  EXPECT_EQ(zeroed.done, 0u);
  ASSERT_EQ(breaker.Protect(memory.all(), false), 0);
  zeroed = uffd::ZeroPage(breaker.fd(), memory.all());
  EXPECT_EQ(zeroed.error, 0);
  EXPECT_EQ(zeroed.done, 2 * kPage);
  EXPECT_EQ(memory.Word(0), 0u);
  EXPECT_EQ(memory.Word(1), 0u);
  EXPECT_TRUE(Look(memory.at(0)) & kPfnZero);
  memory.Word(0) = 5;  // copied by the kernel, as any write to the zero page
  EXPECT_EQ(memory.Word(0), 5u);
  EXPECT_EQ(frames.Stored(0), FrameFile::Word(0));
  EXPECT_FALSE(breaker.HasMessage());
}

// The same after a broken page was discarded.
TEST_F(KernelFrames, DiscardedBrokenPageCanBeMadeZero) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(1);
  Memory memory(1, &frames);
  Merge(breaker, memory, memory.all());
  memory.Word(0) = 9;
  DiscardAsProgram(breaker, memory.all());
  ASSERT_EQ(breaker.Protect(memory.all(), false), 0);
  ASSERT_EQ(uffd::ZeroPage(breaker.fd(), memory.all()).error, 0);
  EXPECT_EQ(memory.Word(0), 0u);
}

// Without a context a discard of a broken page shows the frame's bytes again, not zeros: the reason for the events.
TEST_F(KernelFrames, UnregisteredDiscardShowsTheFrameAgain) {
  FrameFile frames(1);
  Memory memory(1, &frames);
  memory.Word(0) = 9;
  ASSERT_EQ(madvise(memory.Pointer(0), kPage, MADV_DONTNEED), 0);
  EXPECT_EQ(memory.Word(0), FrameFile::Word(0));
}

// Advice that anonymous memory accepts and a private mapping of a file does not: handled by taking the page out first.
TEST_F(KernelFrames, AdviceThatDiffersFromAnonymousMemory) {
  FrameFile frames(1);
  Memory shared(1, &frames), anonymous(1);
  anonymous.Fill();
  EXPECT_EQ(madvise(anonymous.Pointer(0), kPage, MADV_FREE), 0);
  EXPECT_EQ(madvise(shared.Pointer(0), kPage, MADV_FREE), -1);
  EXPECT_EQ(errno, EINVAL);
  EXPECT_EQ(madvise(anonymous.Pointer(0), kPage, MADV_WIPEONFORK), 0);
  EXPECT_EQ(madvise(shared.Pointer(0), kPage, MADV_WIPEONFORK), -1);
  EXPECT_EQ(errno, EINVAL);
  EXPECT_EQ(madvise(shared.Pointer(0), kPage, MADV_REMOVE), -1);
  EXPECT_EQ(errno, EACCES);
}

// CONTINUE stops at a page that is mapped already; those before it are done.
TEST_F(KernelFrames, ContinueStopsAtAMappedPage) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(4);
  Memory memory(4, &frames);
  ASSERT_EQ(breaker.Register(memory.all(), kWriteProtect | kMinor), 0);
  ASSERT_EQ(uffd::Continue(breaker.fd(), memory.span(2, 1), true).error, 0);
  Partial filled = uffd::Continue(breaker.fd(), memory.all(), true);
  EXPECT_EQ(filled.error, -EEXIST);
  EXPECT_EQ(filled.done, 2 * kPage);
}

// The fast attach: a read between mapping and registration maps the page and its neighbours unprotected. Protecting the
// whole run before filling it catches all of them, mapped or not.
TEST_F(KernelFrames, ProtectingTheRunCatchesWhatAReadMappedBefore) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(16);
  Memory memory(16, &frames);
  EXPECT_EQ(memory.Word(3), FrameFile::Word(3));
  EXPECT_EQ(Look(memory.at(3)), kPresent | kFile | kWritten);
  ASSERT_EQ(breaker.Register(memory.all(), kWriteProtect | kMinor), 0);
  ASSERT_EQ(breaker.Protect(memory.all()), 0);
  for (std::size_t i = 0; i < 16; ++i) {
    int error = uffd::Continue(breaker.fd(), memory.span(i, 1), true).error;
    EXPECT_TRUE(error == 0 || error == -EEXIST) << i << " " << error;
  }
  for (std::size_t i = 0; i < 16; ++i) EXPECT_EQ(Look(memory.at(i)), kPresent | kFile) << i;
  memory.Word(3) = 1;
  memory.Word(9) = 1;
  EXPECT_EQ(TakeWritten(memory.all()), (std::vector<std::size_t>{3, 9}));
}

// Punching frees the frame at once for everybody: a private mapping that had not copied reads zeros, one that had keeps
// its copy.
TEST_F(KernelFrames, PunchedHoleReadsZero) {
  FrameFile frames(2);
  Memory reader(2, &frames), writer(2, &frames);
  EXPECT_EQ(reader.Word(0), FrameFile::Word(0));
  writer.Word(0) = 5;
  ASSERT_EQ(PunchPoolFile(frames.file(), 0, kPage), 0);
  EXPECT_EQ(reader.Word(0), 0u);
  EXPECT_EQ(reader.Word(1), FrameFile::Word(1));
  EXPECT_EQ(writer.Word(0), 5u);
}

// A file that is sealed against writing cannot be punched any more. The pool's files carry no seal: members get
// read-only descriptors instead.
TEST_F(KernelFrames, SealsForbidPunching) {
  FrameFile plain(1);
  EXPECT_EQ(PunchPoolFile(plain.file(), 0, kPage), 0);
  File sealed;
  sealed.fd = memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_GE(sealed.fd, 0);
  ASSERT_EQ(ftruncate(sealed.fd, static_cast<off_t>(kPage)), 0);
  ASSERT_EQ(fcntl(sealed.fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
  EXPECT_EQ(PunchPoolFile(sealed, 0, kPage), -EPERM);
  close(sealed.fd);
}

// What PAGEMAP_SCAN shows of each state, and what it cannot tell apart.
TEST_F(KernelFrames, CategoriesOfEachState) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(5);
  Memory memory(5, &frames), anonymous(2);
  Merge(breaker, memory, memory.all());
  memory.Word(1) = 1;
  DiscardAsProgram(breaker, memory.span(2, 2));
  ASSERT_EQ(breaker.Protect(memory.span(3, 1), false), 0);
  ASSERT_EQ(uffd::ZeroPage(breaker.fd(), memory.span(3, 1)).error, 0);
  anonymous.Word(0) = 1;
  EXPECT_EQ(anonymous.Word(1), 0u);
  EXPECT_EQ(Look(memory.at(0)), kPresent | kFile);                          // merged
  EXPECT_EQ(Look(memory.at(1)), kPresent | kWritten);                       // broken
  EXPECT_EQ(Look(memory.at(2)) & (kPresent | kSwapped | kFile), kSwapped);  // discarded: the mark looks like swap
  EXPECT_EQ(Look(memory.at(3)) & (kPresent | kPfnZero | kFile), kPresent | kPfnZero);  // zero
  EXPECT_EQ(Look(anonymous.at(0)) & (kPresent | kFile), kPresent);
  if (test::KernelHasZeroPage()) {
    EXPECT_EQ(Look(anonymous.at(1)) & (kPresent | kPfnZero), kPresent | kPfnZero);
  }
}

// A frame that was swapped out and came back is a MINOR fault without a discard, to be answered with CONTINUE.
TEST_F(KernelFrames, SwappedFrameGivesMinorWithoutADiscard) {
  std::string swaps;
  if (FILE* file = fopen("/proc/swaps", "r")) {
    char line[256];
    while (fgets(line, sizeof line, file)) swaps += line;
    fclose(file);
  }
  if (std::count(swaps.begin(), swaps.end(), '\n') < 2) GTEST_SKIP() << "no swap on this machine";
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(16);
  Memory memory(16, &frames);
  Merge(breaker, memory, memory.all());
  ASSERT_EQ(madvise(memory.Pointer(0), 16 * kPage, MADV_PAGEOUT), 0);
  if (!WaitFor([&] { return !(Look(memory.at(0)) & kPresent); }, 2000))
    GTEST_SKIP() << "the kernel would not reclaim it";
  std::uint64_t seen = 0;
  Worker reader([&] { seen = memory.Word(0); });
  auto message = breaker.Next(2000);
  if (message) {  // else it was still in the swap cache and came back by itself
    EXPECT_TRUE(message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
    EXPECT_EQ(uffd::Continue(breaker.fd(), memory.span(0, 1), true).error, 0);
  }
  reader.Join();
  EXPECT_EQ(seen, FrameFile::Word(0));
}

}  // namespace
}  // namespace ksmu::os
