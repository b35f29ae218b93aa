// The gate, UFFDIO_MOVE, and the moving of mappings: what Linux does (6.8 and later; measured on 6.18).
#include <liburing.h>

#include "kernel_semantics.h"
#include "os/mappings.h"

namespace ksmu::os {
namespace {

using KernelGate = KernelTest;
using KernelMove = KernelTest;
using KernelRemap = KernelTest;

constexpr int kDontUnmap = MREMAP_MAYMOVE | uapi::kMremapDontUnmap;

// --- the gate and its events -----------------------------------------------------------------------------------------

// A discard behind the gate is an event: the discarding thread waits until it is read, and until it has gone on every
// call that changes pages says EAGAIN. A harmless call tells the same without a page to try it on.
TEST_F(KernelGate, UnreadEventMakesCallsTryAgain) {
  Uffd gate(kGateFeatures), staging(kStagingFeatures);
  Memory memory(4), aside(4);
  memory.Fill();
  ASSERT_EQ(gate.Register(memory.all(), kMissing), 0);
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  ASSERT_EQ(uffd::Move(staging.fd(), aside.at(0), memory.at(0), kPage).error, 0);
  EXPECT_FALSE(uffd::EventPending(gate.fd()));
  Worker discard([&] { madvise(memory.Pointer(1), kPage, MADV_DONTNEED); });
  ASSERT_TRUE(WaitFor([&] { return gate.HasMessage(); }));
  EXPECT_TRUE(uffd::EventPending(gate.fd()));
  EXPECT_FALSE(uffd::EventPending(staging.fd()));
  std::vector<char> bytes(kPage);
  EXPECT_EQ(uffd::Copy(gate.fd(), memory.at(0), bytes.data(), kPage, true).error, -EAGAIN);
  EXPECT_EQ(uffd::ZeroPage(gate.fd(), memory.span(0, 1)).error, -EAGAIN);
  EXPECT_EQ(uffd::WriteProtect(gate.fd(), memory.span(2, 1), true), -EAGAIN);
  Partial moved = uffd::Move(gate.fd(), memory.at(0), aside.at(0), kPage);
  EXPECT_EQ(moved.error, -EAGAIN);
  EXPECT_EQ(moved.done, 0u);
  EXPECT_TRUE(discard.StillWaits());
  ASSERT_TRUE(gate.Next());
  discard.Join();
  EXPECT_TRUE(WaitFor([&] { return !uffd::EventPending(gate.fd()); }));
  EXPECT_EQ(uffd::Move(gate.fd(), memory.at(0), aside.at(0), kPage).error, 0);
  EXPECT_EQ(memory.Word(0), FrameFile::Word(0));
}

// The gate has no EVENT_UNMAP: unmapping or replacing what it holds raises nothing and waits for nobody.
TEST_F(KernelGate, UnmappingRaisesNothing) {
  Uffd gate(kGateFeatures);
  Memory memory(2);
  ASSERT_EQ(gate.Register(memory.all(), kMissing), 0);
  ASSERT_EQ(munmap(memory.Pointer(0), kPage), 0);
  EXPECT_FALSE(gate.HasMessage());
  EXPECT_FALSE(uffd::EventPending(gate.fd()));
}

// Replacing a range does not wake who waits on it; UFFDIO_WAKE does, although the range is no longer registered.
TEST_F(KernelGate, ReplacedRangeIsWokenExplicitly) {
  Uffd gate(kGateFeatures);
  FrameFile frames(1);
  Memory memory(1);
  ASSERT_EQ(gate.Register(memory.all(), kMissing), 0);
  std::uint64_t seen = 0;
  Worker reader([&] { seen = memory.Word(0); });
  ASSERT_TRUE(gate.Next());
  std::uintptr_t placed;
  ASSERT_EQ(raw::Mmap(memory.at(0), kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, frames.fd(), 0, &placed),
            0);
  EXPECT_TRUE(reader.StillWaits());
  EXPECT_EQ(uffd::Wake(gate.fd(), memory.all()), 0);
  reader.Join();
  EXPECT_EQ(seen, FrameFile::Word(0));
}

// The kernel's own unregistering wakes the waiters of a MISSING range but not those of write protection: so the wrapper
// always wakes.
TEST_F(KernelGate, UnregisterWakesThroughTheWrapper) {
  Uffd missing(kGateFeatures), protect(uapi::kFeaturePagefaultFlagWp);
  Memory absent(1), present(1);
  present.Fill();
  ASSERT_EQ(missing.Register(absent.all(), kMissing), 0);
  ASSERT_EQ(protect.Register(present.all(), kWriteProtect), 0);
  ASSERT_EQ(protect.Protect(present.all()), 0);
  Worker reader([&] { absent.Touch(0); });
  Worker writer([&] { present.Word(0) = 1; });
  ASSERT_TRUE(missing.Next());
  ASSERT_TRUE(protect.Next());
  uffdio_range range{absent.at(0), kPage};
  EXPECT_EQ(ioctl(missing.fd(), UFFDIO_UNREGISTER, &range), 0);
  EXPECT_TRUE(reader.FinishesIn(2000));
  EXPECT_EQ(uffd::Unregister(protect.fd(), present.all()), 0);
  EXPECT_TRUE(writer.FinishesIn(2000));
}

// Closing a context wakes everybody, as long as no other process holds it.
TEST_F(KernelGate, ClosingWakesEverybody) {
  Memory memory(1);
  std::optional<Uffd> gate(std::in_place, kGateFeatures);
  ASSERT_EQ(gate->Register(memory.all(), kMissing), 0);
  Worker reader([&] { memory.Touch(0); });
  ASSERT_TRUE(gate->Next());
  gate.reset();
  EXPECT_TRUE(reader.FinishesIn(2000));
}

// Staging has a context without events: its owner discards it without waiting for itself.
TEST_F(KernelGate, StagingIsDiscardedWithoutEvents) {
  Uffd staging(kStagingFeatures);
  Memory aside(2);
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  std::vector<char> bytes(kPage, 1);
  ASSERT_EQ(uffd::Copy(staging.fd(), aside.at(0), bytes.data(), kPage, false).error, 0);
  EXPECT_EQ(madvise(aside.Pointer(0), 2 * kPage, MADV_DONTNEED), 0);  // on this very thread
  EXPECT_EQ(Look(aside.at(0)) & kPresent, 0u);
  EXPECT_FALSE(staging.HasMessage());
}

// --- UFFDIO_MOVE -----------------------------------------------------------------------------------------------------

// Takes pages out and brings them back; the destination's context is the one to name.
TEST_F(KernelMove, TakesPagesOutAndBack) {
  Uffd gate(kGateFeatures), staging(kStagingFeatures);
  Memory memory(3), aside(3);
  memory.Fill();
  ASSERT_EQ(gate.Register(memory.all(), kMissing), 0);
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  Partial moved = uffd::Move(staging.fd(), aside.at(0), memory.at(0), 3 * kPage);
  ASSERT_EQ(moved.error, 0);
  EXPECT_EQ(moved.done, 3 * kPage);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(Look(memory.at(i)) & kPresent, 0u);
    EXPECT_EQ(aside.Word(i), FrameFile::Word(i));
  }
  std::uint64_t seen = 0;
  Worker reader([&] { seen = memory.Word(1); });
  ASSERT_TRUE(gate.Next());
  ASSERT_EQ(uffd::Move(gate.fd(), memory.at(0), aside.at(0), 3 * kPage).error, 0);
  EXPECT_TRUE(reader.StillWaits());  // moved without waking
  uffd::Wake(gate.fd(), memory.all());
  reader.Join();
  EXPECT_EQ(seen, FrameFile::Word(1));
}

// ENOENT: no page there. Part of it done comes back as EAGAIN with a count; the call for the rest tells the reason.
TEST_F(KernelMove, HoleEndsItWithTheReasonInTheSecondCall) {
  Uffd staging(kStagingFeatures);
  Memory memory(4), aside(4);
  memory.Word(0) = 1;
  memory.Word(1) = 2;
  memory.Word(3) = 4;
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  uapi::UffdioMove request{aside.at(0), memory.at(0), 4 * kPage, 0, 0};
  EXPECT_EQ(ioctl(staging.fd(), uapi::kIocMove, &request), -1);
  EXPECT_EQ(errno, EAGAIN);
  EXPECT_EQ(request.move, static_cast<std::int64_t>(2 * kPage));
  EXPECT_EQ(aside.Word(1), 2u);
  request = {aside.at(2), memory.at(2), 2 * kPage, 0, 0};
  EXPECT_EQ(ioctl(staging.fd(), uapi::kIocMove, &request), -1);
  EXPECT_EQ(errno, ENOENT);
  EXPECT_EQ(request.move, -ENOENT);
  Partial wrapped = uffd::Move(staging.fd(), aside.at(2), memory.at(2), 2 * kPage);
  EXPECT_EQ(wrapped.error, -ENOENT);
  EXPECT_EQ(wrapped.done, 0u);
}

// The wrapper turns the two calls into one answer.
TEST_F(KernelMove, WrapperReportsPartAndReason) {
  Uffd staging(kStagingFeatures);
  Memory memory(4), aside(4);
  memory.Word(0) = 1;
  memory.Word(1) = 2;
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  Partial moved = uffd::Move(staging.fd(), aside.at(0), memory.at(0), 4 * kPage);
  EXPECT_EQ(moved.error, -ENOENT);
  EXPECT_EQ(moved.done, 2 * kPage);
}

// Neither end may be a private mapping of a file: a broken page cannot be taken this way.
TEST_F(KernelMove, PrivateFileMappingIsRefused) {
  Uffd staging(kStagingFeatures), breaker(kBreakerFeatures | uapi::kFeatureMove);
  ASSERT_EQ(breaker.enabled(), 0);
  FrameFile frames(1);
  Memory shared(1, &frames), aside(1), anonymous(1);
  shared.Word(0) = 5;
  anonymous.Word(0) = 6;
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(0), shared.at(0), kPage).error, -EINVAL);
  ASSERT_EQ(madvise(shared.Pointer(0), kPage, MADV_DONTNEED), 0);
  ASSERT_EQ(breaker.Register(shared.all(), kMissing | kWriteProtect | kMinor), 0);
  EXPECT_EQ(uffd::Move(breaker.fd(), shared.at(0), anonymous.at(0), kPage).error, -EINVAL);
}

// Both ends have to be readable and writable: a raw mprotect after the take makes the way back impossible by MOVE.
TEST_F(KernelMove, NeedsReadAndWritePermission) {
  Uffd gate(kGateFeatures), staging(kStagingFeatures);
  Memory memory(1), aside(1);
  memory.Fill();
  ASSERT_EQ(gate.Register(memory.all(), kMissing), 0);
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  ASSERT_EQ(mprotect(memory.Pointer(0), kPage, PROT_READ), 0);
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(0), memory.at(0), kPage).error, -EINVAL);
  ASSERT_EQ(mprotect(memory.Pointer(0), kPage, PROT_READ | PROT_WRITE), 0);
  ASSERT_EQ(uffd::Move(staging.fd(), aside.at(0), memory.at(0), kPage).error, 0);
  ASSERT_EQ(mprotect(memory.Pointer(0), kPage, PROT_READ), 0);
  EXPECT_EQ(uffd::Move(gate.fd(), memory.at(0), aside.at(0), kPage).error, -EINVAL);
  // The last way back: move the mapping itself.
  std::uintptr_t moved;
  EXPECT_EQ(raw::Mremap(aside.at(0), kPage, MREMAP_MAYMOVE | MREMAP_FIXED, memory.at(0), &moved), 0);
  EXPECT_EQ(memory.Word(0), FrameFile::Word(0));
}

// Each end lies within one mapping.
TEST_F(KernelMove, SourceHasToBeOneMapping) {
  Uffd staging(kStagingFeatures);
  Memory memory(2), aside(2);
  memory.Fill();
  ASSERT_EQ(madvise(memory.Pointer(1), kPage, MADV_DONTDUMP), 0);  // splits it
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(0), memory.at(0), 2 * kPage).error, -EINVAL);
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(0), memory.at(0), kPage).error, 0);
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(1), memory.at(1), kPage).error, 0);
}

// One page out of a huge page: the huge page is split, the rest stays.
TEST_F(KernelMove, TakesOnePageOutOfAHugePage) {
  constexpr std::size_t kHugeBytes = 2 << 20;
  Uffd staging(kStagingFeatures);
  Memory memory(2 * kHugeBytes / kPage), aside(1);
  Address huge = (memory.at(0) + kHugeBytes - 1) & ~(kHugeBytes - 1);
  ASSERT_EQ(madvise(reinterpret_cast<void*>(huge), kHugeBytes, MADV_HUGEPAGE), 0);
  std::memset(reinterpret_cast<void*>(huge), 7, kHugeBytes);
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(0), huge + 3 * kPage, kPage).error, 0);
  EXPECT_EQ(*static_cast<char*>(aside.Pointer(0)), 7);
  EXPECT_EQ(Look(huge + 3 * kPage) & kPresent, 0u);
  EXPECT_EQ(Look(huge + 4 * kPage) & kPresent, kPresent);
}

// A page that a device may write is refused: here pinned as an io_uring registered buffer.
TEST_F(KernelMove, PinnedPageIsBusy) {
  io_uring ring;
  if (int error = io_uring_queue_init(4, &ring, 0)) GTEST_SKIP() << "no io_uring here: " << std::strerror(-error);
  Uffd staging(kStagingFeatures);
  Memory memory(2), aside(2);
  memory.Fill();
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  iovec buffer{memory.Pointer(0), kPage};
  if (int error = io_uring_register_buffers(&ring, &buffer, 1)) {
    io_uring_queue_exit(&ring);
    GTEST_SKIP() << "no buffer can be registered here (RLIMIT_MEMLOCK?): " << std::strerror(-error);
  }
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(0), memory.at(0), kPage).error, -EBUSY);
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(1), memory.at(1), kPage).error, 0);
  ASSERT_EQ(io_uring_unregister_buffers(&ring), 0);
  int error = -EBUSY;
  EXPECT_TRUE(WaitFor([&] {
    error = uffd::Move(staging.fd(), aside.at(0), memory.at(0), kPage).error;
    return error != -EBUSY;
  }));
  EXPECT_EQ(error, 0);
  io_uring_queue_exit(&ring);
}

// A pin for writing breaks a merged page first: it cannot come unseen, and it holds the program's own copy.
TEST_F(KernelMove, PinBreaksAMergedPage) {
  io_uring ring;
  if (int error = io_uring_queue_init(4, &ring, 0)) GTEST_SKIP() << "no io_uring here: " << std::strerror(-error);
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(2);
  Memory memory(2, &frames);
  Merge(breaker, memory, memory.all());
  iovec buffer{memory.Pointer(0), kPage};
  int error = io_uring_register_buffers(&ring, &buffer, 1);
  if (error == 0) {
    EXPECT_EQ(Look(memory.at(0)) & (kPresent | kFile), kPresent);
    EXPECT_EQ(TakeWritten(memory.all()), (std::vector<std::size_t>{0}));
  }
  io_uring_queue_exit(&ring);
  if (error) GTEST_SKIP() << "no buffer can be registered here (RLIMIT_MEMLOCK?): " << std::strerror(-error);
}

// One fork takes "exclusive" off every anonymous page, for ever: MOVE says EBUSY, also long after the child has gone,
// until the page is written. MADV_POPULATE_WRITE does that without changing a byte; bit 56 of pagemap tells whether a
// child still maps the page, when it would be a copy and not a healing.
TEST_F(KernelMove, ForkMakesPagesBusyUntilHealed) {
  Uffd staging(kStagingFeatures);
  Memory memory(2), aside(2);
  memory.Fill();
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  EXPECT_EQ(SharingOf(memory.at(0)), Sharing::kExclusive);
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  pid_t child = ForkRaw([&] {
    char byte;
    close(ends[1]);
    return read(ends[0], &byte, 1) == 0 ? 0 : 1;
  });
  EXPECT_EQ(SharingOf(memory.at(0)), Sharing::kShared);
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(0), memory.at(0), kPage).error, -EBUSY);
  close(ends[1]);
  EXPECT_EQ(ExitOf(child), 0);
  close(ends[0]);
  EXPECT_TRUE(WaitFor([&] { return SharingOf(memory.at(0)) == Sharing::kExclusive; }));
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(0), memory.at(0), kPage).error, -EBUSY);
  ASSERT_EQ(raw::Madvise(memory.at(0), kPage, uapi::kMadvPopulateWrite), 0);
  EXPECT_EQ(uffd::Move(staging.fd(), aside.at(0), memory.at(0), kPage).error, 0);
  EXPECT_EQ(aside.Word(0), FrameFile::Word(0));
}

// --- mremap ----------------------------------------------------------------------------------------------------------

// Under EVENT_REMAP a filled mapping moves over another place with its registration and its protection: there is no
// moment without a context. The mover waits until the event is read.
TEST_F(KernelRemap, RegistrationMovesAlong) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(2);
  Memory target(2), prepared(2, &frames);
  target.Fill();
  Merge(breaker, prepared, prepared.all());
  std::uintptr_t moved = 0;
  {
    Worker mover([&] { raw::Mremap(prepared.at(0), 2 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, target.at(0), &moved); });
    ASSERT_TRUE(WaitFor([&] { return breaker.HasMessage(); }));
    EXPECT_TRUE(mover.StillWaits());
    EXPECT_TRUE(uffd::EventPending(breaker.fd()));
    // In place while the mover still waits: whoever looks sees the frames.
    EXPECT_EQ(target.Word(1), FrameFile::Word(1));
    auto message = breaker.Next();
    ASSERT_TRUE(message);
    EXPECT_EQ(message->event, UFFD_EVENT_REMAP);
    EXPECT_EQ(message->arg.remap.from, prepared.at(0));
    EXPECT_EQ(message->arg.remap.to, target.at(0));
    EXPECT_EQ(message->arg.remap.len, 2 * kPage);
  }
  EXPECT_EQ(moved, target.at(0));
  target.Word(0) = 5;  // still protected: the break is seen
  EXPECT_EQ(TakeWritten(target.all()), (std::vector<std::size_t>{0}));
  EXPECT_EQ(frames.Stored(0), FrameFile::Word(0));
  DiscardAsProgram(breaker, target.span(1, 1));  // still registered
}

// Without EVENT_REMAP the registration is lost, and the protection with it.
TEST_F(KernelRemap, RegistrationIsLostWithoutTheEvent) {
  Uffd silent(kTrackerFeatures | uapi::kFeatureMinorShmem);
  FrameFile frames(1);
  Memory target(1), prepared(1, &frames);
  Merge(silent, prepared, prepared.all());
  std::uintptr_t moved = 0;
  ASSERT_EQ(raw::Mremap(prepared.at(0), kPage, MREMAP_MAYMOVE | MREMAP_FIXED, target.at(0), &moved), 0);
  EXPECT_EQ(uffd::WriteProtect(silent.fd(), target.all(), true), -ENOENT);
  EXPECT_TRUE(Look(target.at(0)) & kWritten);  // what is not protected counts as written
}

// MREMAP_DONTUNMAP takes the pages of a registered range out in one atomic step. The range stays mapped and registered,
// with nothing present: whoever touches it waits. Broken pages go along, which UFFDIO_MOVE could not take.
TEST_F(KernelRemap, TakingPagesKeepsTheRangeRegistered) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(3);
  Memory memory(3, &frames);
  Merge(breaker, memory, memory.all());
  memory.Word(1) = 55;
  std::uintptr_t taken = 0;
  {
    EventReader reader(breaker);
    ASSERT_EQ(raw::Mremap(memory.at(0), 3 * kPage, kDontUnmap, 0, &taken), 0);
    auto messages = reader.Stop();
    ASSERT_EQ(messages.size(), 1u);
    EXPECT_EQ(messages[0].event, UFFD_EVENT_REMAP);
    EXPECT_EQ(messages[0].arg.remap.from, memory.at(0));
    EXPECT_EQ(messages[0].arg.remap.to, taken);
  }
  auto* words = reinterpret_cast<volatile std::uint64_t*>(taken);
  EXPECT_EQ(words[kPage / 8], 55u);
  EXPECT_EQ(words[0], FrameFile::Word(0));
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(Look(memory.at(i)) & kPresent, 0u);
  // The new place belongs to the context as well: its unmapping raises nothing, a discard of it would.
  EXPECT_EQ(uffd::WriteProtect(breaker.fd(), {taken, 3 * kPage}, true), 0);
  std::uint64_t seen = 0;
  Worker reader([&] { seen = memory.Word(1); });
  auto message = breaker.Next();
  ASSERT_TRUE(message);
  EXPECT_EQ(message->event, UFFD_EVENT_PAGEFAULT);
  EXPECT_TRUE(message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
  EXPECT_TRUE(reader.StillWaits());
  // Merged again in place: the frame beneath is mapped.
  EXPECT_EQ(uffd::Continue(breaker.fd(), memory.all(), true).error, 0);
  reader.Join();
  EXPECT_EQ(seen, FrameFile::Word(1));
  EXPECT_EQ(munmap(reinterpret_cast<void*>(taken), 3 * kPage), 0);
  EXPECT_FALSE(breaker.HasMessage());
}

// A page that was taken so comes back with COPY, contents and all, write-protected or not.
TEST_F(KernelRemap, TakenPageComesBackByCopy) {
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(1);
  Memory memory(1, &frames);
  Merge(breaker, memory, memory.all());
  memory.Word(0) = 55;
  std::uintptr_t taken = 0;
  {
    EventReader reader(breaker);
    ASSERT_EQ(raw::Mremap(memory.at(0), kPage, kDontUnmap, 0, &taken), 0);
  }
  EXPECT_EQ(uffd::Copy(breaker.fd(), memory.at(0), reinterpret_cast<void*>(taken), kPage, true).error, 0);
  EXPECT_EQ(memory.Word(0), 55u);
  memory.Word(0) = 56;
  EXPECT_EQ(memory.Word(0), 56u);
  munmap(reinterpret_cast<void*>(taken), kPage);
}

// Adjacent pages at consecutive offsets are one mapping, and stay one when some of them are broken; at one and the same
// offset they are one each.
TEST_F(KernelRemap, AdjacentFramesAreOneMapping) {
  Mappings mappings;
  ASSERT_EQ(mappings.Open(), 0);
  FrameFile frames(4);
  Memory run(4), replicas(4);
  std::uintptr_t placed;
  constexpr int kReadWrite = PROT_READ | PROT_WRITE, kFlags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
  for (std::size_t i = 0; i < 4; ++i) {
    ASSERT_EQ(raw::Mmap(run.at(i), kPage, kReadWrite, kFlags, frames.fd(), i * kPage, &placed), 0);
    ASSERT_EQ(raw::Mmap(replicas.at(i), kPage, kReadWrite, kFlags, frames.fd(), 0, &placed), 0);
  }
  Mapping mapping;
  ASSERT_EQ(mappings.Query(run.at(1), &mapping), 0);
  EXPECT_EQ(mapping.start, run.at(0));
  EXPECT_EQ(mapping.end, run.all().end());
  run.Word(2) = 1;
  ASSERT_EQ(mappings.Query(run.at(1), &mapping), 0);
  EXPECT_EQ(mapping.end - mapping.start, 4 * kPage);
  EXPECT_EQ(mapping.inode, frames.file().inode);
  EXPECT_EQ(mapping.device, frames.file().device);
  ASSERT_EQ(mappings.Query(replicas.at(1), &mapping), 0);
  EXPECT_EQ(mapping.end - mapping.start, kPage);
  mappings.Close();
}

// Filling a mapping gives it an anon_vma, and mappings with different ones never join. So runs that are attached by
// mremap stay apart, however well their frames follow each other, unless they were prepared as one mapping.
TEST_F(KernelRemap, MovedFramesJoinOnlyIfPreparedTogether) {
  Mappings mappings;
  ASSERT_EQ(mappings.Open(), 0);
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(4);
  Memory apart(4), together(4), left(2, &frames, 0), right(2, &frames, 2), both(4, &frames);
  Merge(breaker, left, left.all());
  Merge(breaker, right, right.all());
  Merge(breaker, both, both.all());
  EventReader reader(breaker);
  auto move = [](Span from, Address to) {
    std::uintptr_t moved;
    return raw::Mremap(from.start, from.bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to, &moved);
  };
  ASSERT_EQ(move(left.all(), apart.at(0)), 0);
  ASSERT_EQ(move(right.all(), apart.at(2)), 0);
  ASSERT_EQ(move(both.span(0, 1), together.at(0)), 0);
  ASSERT_EQ(move(both.span(2, 2), together.at(2)), 0);
  ASSERT_EQ(move(both.span(1, 1), together.at(1)), 0);
  Mapping mapping;
  ASSERT_EQ(mappings.Query(apart.at(0), &mapping), 0);
  EXPECT_EQ(mapping.end - mapping.start, 2 * kPage);
  ASSERT_EQ(mappings.Query(together.at(0), &mapping), 0);
  EXPECT_EQ(mapping.end - mapping.start, 4 * kPage);
  mappings.Close();
}

// A run that is mapped in place and then registered joins the one before it.
TEST_F(KernelRemap, FramesMappedInPlaceJoinTheirNeighbours) {
  Mappings mappings;
  ASSERT_EQ(mappings.Open(), 0);
  Uffd breaker(kBreakerFeatures);
  FrameFile frames(4);
  Memory target(4);
  for (std::size_t half = 0; half < 4; half += 2) {
    std::uintptr_t placed;
    ASSERT_EQ(raw::Mmap(target.at(half), 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
                        frames.fd(), half * kPage, &placed),
              0);
    Merge(breaker, target, target.span(half, 2));
    target.Word(half) = 1;  // broken ones do not stand in the way
  }
  Mapping mapping;
  ASSERT_EQ(mappings.Query(target.at(0), &mapping), 0);
  EXPECT_EQ(mapping.end - mapping.start, 4 * kPage);
  mappings.Close();
}

// Anonymous memory comes back into the mapping that lies beside it: an empty mapping is moved into place under the breaker, a
// page beside it goes under the breaker too, and the two are one before the first page is there. Filled on its own it would
// have an anon_vma of its own, and stay apart for ever.
TEST_F(KernelRemap, EmptyMappingMovedIntoPlaceJoinsWhatLiesBesideIt) {
  Mappings mappings;
  ASSERT_EQ(mappings.Open(), 0);
  constexpr std::uint32_t kModes = kMissing | kWriteProtect;
  for (const bool joined : {true, false}) {
    Uffd breaker(kBreakerFeatures), tracker(kTrackerFeatures);
    EventReader reader(breaker);
    Memory target(6), source(2), landing(2);
    target.Fill();
    ASSERT_EQ(tracker.Register(target.all(), kWriteProtect), 0);
    ASSERT_EQ(breaker.Register(landing.all(), kModes), 0);
    std::uintptr_t moved = 0;
    ASSERT_EQ(raw::Mremap(landing.at(0), 2 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, target.at(2), &moved), 0);
    if (joined) {
      ASSERT_EQ(uffd::Unregister(tracker.fd(), target.span(1, 1)), 0);
      ASSERT_EQ(breaker.Register(target.span(1, 1), kModes), 0);
      Mapping mapping;
      ASSERT_EQ(mappings.Query(target.at(1), &mapping), 0);
      EXPECT_EQ(mapping.end - mapping.start, 3 * kPage);
    }
    source.Fill();
    ASSERT_EQ(uffd::Copy(breaker.fd(), target.at(2), source.Pointer(0), 2 * kPage, true).error, 0);
    const Span held = joined ? target.span(1, 3) : target.span(2, 2);
    ASSERT_EQ(uffd::Unregister(breaker.fd(), held), 0);
    ASSERT_EQ(tracker.Register(held, kWriteProtect), 0);
    EXPECT_EQ(target.Word(2), source.Word(0));
    Mapping mapping;
    ASSERT_EQ(mappings.Query(target.at(2), &mapping), 0);
    EXPECT_EQ(mapping.end - mapping.start, (joined ? 6 : 2) * kPage);
  }
  mappings.Close();
}

}  // namespace
}  // namespace ksmu::os
