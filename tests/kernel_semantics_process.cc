// Forks, descriptors, threads and limits: what Linux does (6.8 and later; measured on 6.18).
#include <linux/futex.h>
#include <sys/resource.h>
#include <sys/uio.h>

#include <cerrno>

#include "kernel_semantics.h"
#include "os/process.h"

namespace ksmu::os {
namespace {

using KernelFork = KernelTest;
using KernelProcess = KernelTest;

std::uint64_t Pss() {
  FILE* file = fopen("/proc/self/smaps_rollup", "r");
  if (!file) return 0;
  char line[256];
  unsigned long kib = 0;
  while (fgets(line, sizeof line, file)) {
    if (sscanf(line, "Pss: %lu", &kib) == 1) break;
  }
  fclose(file);
  return kib;
}

// --- fork ------------------------------------------------------------------------------------------------------------

// Without EVENT_FORK a child's copies of registered ranges belong to nobody and are unprotected.
TEST_F(KernelFork, ChildIsUnregisteredWithoutTheEvent) {
  Uffd sync(kSyncBreakerFeatures);
  FrameFile frames(1);
  Memory memory(1, &frames);
  Merge(sync, memory, memory.all());
  pid_t child = ForkRaw([&] {
    if (memory.Word(0) != FrameFile::Word(0)) return 1;
    memory.Word(0) = 9;  // would wait for ever if it were protected
    if (memory.Word(0) != 9) return 2;
    madvise(memory.Pointer(0), kPage, MADV_DONTNEED);
    return memory.Word(0) == FrameFile::Word(0) ? 0 : 3;  // the limit: old bytes after a raw discard
  });
  EXPECT_EQ(ExitOf(child), 0);
  EXPECT_FALSE(sync.HasMessage());
  EXPECT_EQ(memory.Word(0), FrameFile::Word(0));
}

// EVENT_FORK (CAP_SYS_PTRACE): the fork, by whatever call, waits until the event is read; the message carries a context
// of the child's own, through which pages are put where the child finds none.
TEST_F(KernelFork, GateHandsOutTheChildsContext) {
  Uffd gate(kGateFeatures | uapi::kFeatureEventFork), staging(kStagingFeatures);
  if (gate.enabled() == -EPERM) GTEST_SKIP() << "EVENT_FORK is not permitted (CAP_SYS_PTRACE)";
  Memory memory(2), aside(2);
  memory.Fill();
  ASSERT_EQ(gate.Register(memory.all(), kMissing), 0);
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  ASSERT_EQ(uffd::Move(staging.fd(), aside.at(0), memory.at(0), 2 * kPage).error, 0);
  pid_t child = -1;
  Worker forker([&] { child = ForkRaw([&] { return memory.Word(1) == FrameFile::Word(1) ? 0 : 1; }); });
  ASSERT_TRUE(WaitFor([&] { return gate.HasMessage(); }));
  EXPECT_TRUE(forker.StillWaits());
  auto message = gate.Next();
  ASSERT_TRUE(message);
  ASSERT_EQ(message->event, UFFD_EVENT_FORK);
  int context = static_cast<int>(message->arg.fork.ufd);
  EXPECT_TRUE(fcntl(context, F_GETFD) & FD_CLOEXEC);
  EXPECT_TRUE(fcntl(context, F_GETFL) & O_NONBLOCK);
  forker.Join();
  EXPECT_TRUE(uffd::Alive(context, aside.at(0), kPage));
  EXPECT_EQ(uffd::Copy(context, memory.at(0), aside.Pointer(0), 2 * kPage, true).error, 0);
  EXPECT_EQ(ExitOf(child), 0);
  // The parent's pages are as they were, and the child's context dies with the child.
  EXPECT_EQ(Look(memory.at(1)) & kPresent, 0u);
  EXPECT_TRUE(WaitFor([&] { return !uffd::Alive(context, aside.at(0), kPage); }));
  EXPECT_EQ(uffd::Copy(context, memory.at(0), aside.Pointer(0), kPage, true).error, -ESRCH);
  close(context);
}

// The breaker's: the child's copies are registered and protected like the parent's, its discards are events of its
// context, and its faults are answered from here.
TEST_F(KernelFork, BreakerServesTheChildsDiscards) {
  Uffd breaker(kBreakerFeatures | uapi::kFeatureEventFork);
  if (breaker.enabled() == -EPERM) GTEST_SKIP() << "EVENT_FORK is not permitted (CAP_SYS_PTRACE)";
  FrameFile frames(2);
  Memory memory(2, &frames);
  Merge(breaker, memory, memory.all());
  pid_t child = -1;
  Worker forker([&] {
    child = ForkRaw([&] {
      if (memory.Word(0) != FrameFile::Word(0)) return 1;
      memory.Word(1) = 9;  // broken by the kernel, in the child alone
      if (memory.Word(1) != 9) return 2;
      madvise(memory.Pointer(0), kPage, MADV_DONTNEED);
      return memory.Word(0) == 0 ? 0 : 3;
    });
  });
  auto message = breaker.Next();
  ASSERT_TRUE(message);
  ASSERT_EQ(message->event, UFFD_EVENT_FORK);
  forker.Join();
  int context = static_cast<int>(message->arg.fork.ufd);
  uffd_msg event;
  ASSERT_TRUE(WaitFor([&] { return uffd::Read(context, &event, 1) == 1; }));
  EXPECT_EQ(event.event, UFFD_EVENT_REMOVE);
  EXPECT_EQ(event.arg.remove.start, memory.at(0));
  ASSERT_TRUE(WaitFor([&] { return uffd::Read(context, &event, 1) == 1; }));
  EXPECT_EQ(event.event, UFFD_EVENT_PAGEFAULT);
  EXPECT_TRUE(event.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
  EXPECT_EQ(uffd::WriteProtect(context, memory.span(0, 1), false), 0);
  EXPECT_EQ(uffd::ZeroPage(context, memory.span(0, 1)).error, 0);
  EXPECT_EQ(ExitOf(child), 0);
  close(context);
  EXPECT_EQ(memory.Word(0), FrameFile::Word(0));
  EXPECT_EQ(memory.Word(1), FrameFile::Word(1));
}

// The canary: a written private page is mapped more than once exactly as long as some child or grandchild, however
// made, has it: until the last of them exits or execs.
TEST_F(KernelFork, CanaryTellsWhetherAChildHasTheMemory) {
  Memory canary(1);
  canary.Word(0) = 1;
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  pid_t child = ForkRaw([&] {
    close(ends[1]);
    pid_t grandchild = static_cast<pid_t>(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
    char byte;
    if (grandchild == 0) _exit(read(ends[0], &byte, 1) == 0 ? 0 : 1);
    return 0;
  });
  EXPECT_EQ(ExitOf(child), 0);
  EXPECT_EQ(SharingOf(canary.at(0)), Sharing::kShared);  // the grandchild lives
  close(ends[1]);
  close(ends[0]);
  EXPECT_TRUE(WaitFor([&] { return SharingOf(canary.at(0)) == Sharing::kExclusive; }));
  // vfork shares the address space and leaves no copy.
  pid_t borrowed = vfork();
  if (borrowed == 0) _exit(0);
  EXPECT_EQ(SharingOf(canary.at(0)), Sharing::kExclusive);
  EXPECT_EQ(ExitOf(borrowed), 0);
}

// process_vm_readv pins what it reads, and pinning a page that a child shares makes the kernel copy it. With the
// program's memory as the local side of process_vm_writev nothing is copied but the bytes: so that is how the library
// reads.
TEST_F(KernelFork, ReadingByWritevDoesNotCopySharedPages) {
  constexpr std::size_t kPages = 1024;
  Memory memory(kPages), buffer(kPages);
  memory.Fill();
  buffer.Fill();
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  pid_t child = ForkRaw([&] {
    char byte;
    close(ends[1]);
    return read(ends[0], &byte, 1) == 0 ? 0 : 1;
  });
  iovec theirs{memory.Pointer(0), kPages * kPage}, ours{buffer.Pointer(0), kPages * kPage};
  EXPECT_EQ(process_vm_writev(getpid(), &theirs, 1, &ours, 1, 0), static_cast<ssize_t>(kPages * kPage));
  std::vector<Sharing> sharing(kPages);
  ASSERT_EQ(pagemap_.ReadSharing(memory.at(0), sharing.data(), kPages), 0);
  for (Sharing page : sharing) ASSERT_EQ(page, Sharing::kShared);
  EXPECT_EQ(process_vm_readv(getpid(), &ours, 1, &theirs, 1, 0), static_cast<ssize_t>(kPages * kPage));
  ASSERT_EQ(pagemap_.ReadSharing(memory.at(0), sharing.data(), kPages), 0);
  std::size_t copied = 0;
  for (Sharing page : sharing) copied += page == Sharing::kExclusive;
  // Should a kernel stop doing this, readv would be the simpler and slightly faster call.
  EXPECT_EQ(copied, kPages);
  close(ends[1]);
  close(ends[0]);
  EXPECT_EQ(ExitOf(child), 0);
}

// --- reading the program's memory ------------------------------------------------------------------------------------

// A hole or PROT_NONE is an error value and no signal; what lies before it has been copied.
TEST_F(KernelProcess, ReadingAHoleIsAnError) {
  Memory memory(4), buffer(4);
  memory.Fill();
  buffer.Fill();
  ASSERT_EQ(mprotect(memory.Pointer(2), kPage, PROT_NONE), 0);
  auto read = [&](std::size_t page, std::size_t pages) {
    iovec from{memory.Pointer(page), pages * kPage}, to{buffer.Pointer(0), pages * kPage};
    return process_vm_writev(getpid(), &from, 1, &to, 1, 0);
  };
  EXPECT_EQ(read(0, 4), static_cast<ssize_t>(2 * kPage));
  EXPECT_EQ(read(2, 1), -1);
  EXPECT_EQ(errno, EFAULT);
  ASSERT_EQ(munmap(memory.Pointer(3), kPage), 0);
  EXPECT_EQ(read(3, 1), -1);
  EXPECT_EQ(errno, EFAULT);
  EXPECT_EQ(buffer.Word(1), FrameFile::Word(1));
  // The same for a file's write from the program's memory.
  FrameFile frames(4);
  Partial written = WritePoolFile(frames.file(), 0, memory.at(1), 2 * kPage);
  EXPECT_EQ(written.error, -EFAULT);
  EXPECT_EQ(written.done, kPage);
}

// --- descriptors -----------------------------------------------------------------------------------------------------

// A descriptor table of its own: the program may close every number, the library's contexts go on working; and the
// program's pipes come to their end although the library's threads were started while they were open.
TEST_F(KernelProcess, OwnDescriptorTableSurvivesClosing) {
  // In a process of its own: the test closes everything.
  pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);
    int result = [] {
      Memory memory(1);
      int ends[2];
      if (pipe(ends) != 0) return 10;
      std::atomic<int> step{0};
      int failure = 0;
      Worker library([&] {
        if (UnshareDescriptors() != 0) failure = 11;
        Uffd gate(kGateFeatures);
        if (gate.Register(memory.all(), kMissing) != 0) failure = 12;
        step = 1;
        while (step != 2) SleepMilliseconds(1);
        if (uffd::ZeroPage(gate.fd(), memory.all()).error != 0) failure = 13;
        // Nothing of ours goes to the program's standard output.
        char seen = 'x';
        if (write(1, &seen, 1) < 0) failure = 14;
        step = 3;
      });
      while (step != 1) SleepMilliseconds(1);
      dup2(ends[1], 1);
      close(ends[1]);
      syscall(SYS_close_range, 3u, ~0u, 0u);
      int again[2];
      if (pipe(again) != 0) return 15;  // takes the numbers that the library's descriptors have in its table
      step = 2;
      while (step != 3) SleepMilliseconds(1);
      library.Join();
      if (failure) return failure;
      return memory.Word(0) == 0 ? 0 : 16;
    }();
    _exit(result);
  }
  EXPECT_EQ(ExitOf(child), 0);
}

// The end of a pipe is seen although a thread with a table of its own was made while it was open.
TEST_F(KernelProcess, OwnDescriptorTableHoldsNoPipes) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  std::atomic<bool> unshared{false}, stop{false};
  int failed = -1;
  Worker library([&] {
    failed = UnshareDescriptors();
    unshared = true;
    while (!stop) SleepMilliseconds(1);
  });
  ASSERT_TRUE(WaitFor([&] { return unshared.load(); }));
  EXPECT_EQ(failed, 0);
  close(ends[1]);
  pollfd end{ends[0], POLLIN, 0};
  EXPECT_EQ(poll(&end, 1, 2000), 1);
  EXPECT_TRUE(end.revents & POLLHUP);
  stop = true;
  close(ends[0]);
}

// --- threads that cannot wait ----------------------------------------------------------------------------------------

// Starts a thread whose clear_child_tid word is at `word`, lets it exit, and tells whether the kernel cleared the word.
bool ExitClearsWord(volatile int* word, const std::function<void()>& before_exit) {
  constexpr std::size_t kStack = 64 * 1024;
  Memory stack(kStack / kPage);
  *word = 1;
  static std::atomic<bool> may_exit;
  static std::atomic<int> state;
  may_exit = false;
  state = 0;
  int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_CHILD_CLEARTID;
  int thread = clone(
      [](void*) {
        state = 1;
        while (!may_exit) sched_yield();
        syscall(SYS_exit, 0);
        return 0;
      },
      static_cast<char*>(stack.Pointer(0)) + kStack, flags, nullptr, nullptr, nullptr, const_cast<int*>(word));
  EXPECT_GT(thread, 0);
  EXPECT_TRUE(WaitFor([] { return state == 1; }));
  before_exit();
  may_exit = true;
  std::string task = "/proc/self/task/" + std::to_string(thread);
  EXPECT_TRUE(WaitFor([&] { return access(task.c_str(), F_OK) != 0; }));
  SleepMilliseconds(10);
  return true;
}

// A thread that exits is not served by userfaultfd: behind a shut gate the kernel's clearing of its word is lost, and a
// join would wait for ever. So pages that hold such words are left out. Under the asynchronous breaker it is right.
TEST_F(KernelProcess, ExitingThreadsWordIsLostBehindTheGateOnly) {
  Uffd gate(kGateFeatures), staging(kStagingFeatures), breaker(kBreakerFeatures);
  Memory gated(1), aside(1);
  ASSERT_EQ(staging.Register(aside.all(), kMissing), 0);
  ExitClearsWord(static_cast<volatile int*>(gated.Pointer(0)), [&] {
    ASSERT_EQ(gate.Register(gated.all(), kMissing), 0);
    ASSERT_EQ(uffd::Move(staging.fd(), aside.at(0), gated.at(0), kPage).error, 0);
  });
  ASSERT_EQ(uffd::Move(gate.fd(), gated.at(0), aside.at(0), kPage).error, 0);
  EXPECT_EQ(*static_cast<volatile int*>(gated.Pointer(0)), 1);  // lost

  FrameFile frames(1);
  Memory merged(1, &frames);
  ExitClearsWord(static_cast<volatile int*>(merged.Pointer(0)), [&] {
    // As merged again with the word set: the frame holds it, the page is mapped protected.
    ASSERT_EQ(WritePoolFile(frames.file(), 0, merged.at(0), kPage).error, 0);
    ASSERT_EQ(madvise(merged.Pointer(0), kPage, MADV_DONTNEED), 0);
    Merge(breaker, merged, merged.all());
  });
  EXPECT_EQ(*static_cast<volatile int*>(merged.Pointer(0)), 0);
}

// --- limits ----------------------------------------------------------------------------------------------------------

// A file beyond RLIMIT_FSIZE: EFBIG, and SIGXFSZ, which has to be blocked.
TEST_F(KernelProcess, FileSizeLimit) {
  pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, nullptr);
    rlimit limit{2 * kPage, 2 * kPage};
    setrlimit(RLIMIT_FSIZE, &limit);
    int fd = memfd_create("limited", MFD_CLOEXEC);
    if (fd < 0) _exit(1);
    if (ftruncate(fd, static_cast<off_t>(2 * kPage)) != 0) _exit(2);
    if (ftruncate(fd, static_cast<off_t>(3 * kPage)) != -1 || errno != EFBIG) _exit(3);
    sigset_t pending;
    sigpending(&pending);
    if (!sigismember(&pending, SIGXFSZ)) _exit(4);
    // The library looks first and raises nothing.
    timespec none{};
    while (sigtimedwait(&all, nullptr, &none) > 0) {
    }
    File file;
    if (CreatePoolFile(3 * kPage, &file) != -EFBIG) _exit(5);
    if (CreatePoolFile(2 * kPage, &file) != 0) _exit(6);
    static char bytes[4096];
    if (WritePoolFile(file, 2 * kPage, reinterpret_cast<Address>(bytes), 1).error != -EFBIG) _exit(7);
    sigpending(&pending);
    if (sigismember(&pending, SIGXFSZ)) _exit(8);
    _exit(0);
  }
  EXPECT_EQ(ExitOf(child), 0);
}

// At the map limit whatever has to split a mapping fails with ENOMEM: a registration or its end in the middle of a
// range, and an attach. Nothing has changed then.
TEST_F(KernelProcess, MapLimit) {
  char text[32] = {};
  std::int64_t size = ReadSmallFile(AT_FDCWD, "/proc/sys/vm/max_map_count", text, sizeof text - 1);
  ASSERT_GT(size, 0);
  if (std::stoul(text) > 200000) GTEST_SKIP() << "vm.max_map_count is " << text << ": too many mappings to make";
  pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);
    int result = [] {
      Uffd tracker(kTrackerFeatures);
      FrameFile frames(1);
      Memory memory(9), prepared(1, &frames);
      memory.Fill();
      if (tracker.Register(memory.all(), kWriteProtect) != 0) return 1;
      std::uintptr_t place;
      // Mappings of alternating protection never join.
      std::size_t made = 0;
      while (raw::Mmap(0, kPage, made % 2 ? PROT_READ : PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0,
                       &place) == 0) {
        ++made;
      }
      if (made < 1000) return 2;
      if (uffd::Unregister(tracker.fd(), memory.span(4, 1)) != -ENOMEM) return 3;
      if (raw::Mremap(prepared.at(0), kPage, MREMAP_MAYMOVE | MREMAP_FIXED, memory.at(4), &place) != -ENOMEM) return 4;
      for (std::size_t i = 0; i < 9; ++i) {
        if (memory.Word(i) != FrameFile::Word(i)) return 5;
      }
      return tracker.Protect(memory.all()) == 0 ? 0 : 6;
    }();
    _exit(result);
  }
  EXPECT_EQ(ExitOf(child), 0);
}

// mremap with MREMAP_DONTUNMAP and no wish for a place has to be given 0: the raw call, not the C library's, which
// passes on whatever is on its stack.
TEST_F(KernelProcess, TakingToAnyPlace) {
  Memory memory(2);
  memory.Fill();
  for (int i = 0; i < 100; ++i) {
    std::uintptr_t taken = 0;
    ASSERT_EQ(raw::Mremap(memory.at(0), kPage, MREMAP_MAYMOVE | uapi::kMremapDontUnmap, 0, &taken), 0);
    EXPECT_EQ(*reinterpret_cast<volatile std::uint64_t*>(taken),
              i == 0 ? FrameFile::Word(0) : static_cast<std::uint64_t>(i));
    EXPECT_EQ(memory.Word(0), 0u);
    memory.Word(0) = static_cast<std::uint64_t>(i) + 1;
    ASSERT_EQ(munmap(reinterpret_cast<void*>(taken), kPage), 0);
  }
}

// Frames that many map are counted once between them: the saving as the kernel accounts it.
TEST_F(KernelProcess, SharedFramesCountOnce) {
  constexpr std::size_t kPages = 512;
  FrameFile frames(kPages);
  std::uint64_t before = Pss();
  std::vector<std::unique_ptr<Memory>> mappings;
  for (int i = 0; i < 8; ++i) {
    mappings.push_back(std::make_unique<Memory>(kPages, &frames));
    for (std::size_t page = 0; page < kPages; ++page) ASSERT_EQ(mappings.back()->Word(page), FrameFile::Word(page));
  }
  std::uint64_t grown = Pss() - before;
  EXPECT_LT(grown, 2 * kPages * kPage / 1024);
}

}  // namespace
}  // namespace ksmu::os
