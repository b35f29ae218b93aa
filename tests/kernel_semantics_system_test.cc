// LinuxSystem keeps the contract of os.h, beyond what the kernel does by itself.
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <memory>

#include "kernel_semantics.h"
#include "kernel_semantics_system.h"
#include "os/child_contexts.h"
#include "os/io_batch.h"
#include "os/mappings.h"
#include "os/text.h"

namespace ksmu::os {
namespace {

// --- opening ---------------------------------------------------------------------------------------------------------

TEST_F(LinuxSystemTest, WithoutKernelFaultsItRefusesUnlessTold) {
  LinuxOptions options;
  options.refuse_kernel_faults = true;
  LinuxSystem* system = nullptr;
  ErrorText error;
  EXPECT_EQ(LinuxSystem::Open(options, &system, &error), -EPERM);
  EXPECT_NE(std::string(error.text).find("sysctl vm.unprivileged_userfaultfd=1"), std::string::npos) << error.text;
  options.user_mode_only = true;
  SystemPointer told = OpenSystem(options);
  ASSERT_TRUE(told);
  EXPECT_FALSE(told->features().kernel_faults);
  EXPECT_TRUE(system_->features().kernel_faults);
}

// Somebody without rights gets the sentence; told to make do with user-mode faults, a system without fork events.
TEST_F(LinuxSystemTest, UnprivilegedUser) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to become somebody else";
  if (access("/proc/sys/vm/unprivileged_userfaultfd", R_OK) != 0) GTEST_SKIP() << "no vm.unprivileged_userfaultfd";
  char setting[8] = {};
  ReadSmallFile(AT_FDCWD, "/proc/sys/vm/unprivileged_userfaultfd", setting, sizeof setting - 1);
  struct stat device {};
  bool open_to_all = stat("/dev/userfaultfd", &device) == 0 && (device.st_mode & 006);
  if (setting[0] != '0' || open_to_all) GTEST_SKIP() << "everybody may use userfaultfd here";
  pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (setresgid(65534, 65534, 65534) != 0 || setresuid(65534, 65534, 65534) != 0) _exit(1);
    prctl(PR_SET_DUMPABLE, 1);
    LinuxSystem* system = nullptr;
    ErrorText error;
    if (LinuxSystem::Open({}, &system, &error) != -EPERM) _exit(2);
    if (!std::strstr(error.text, "sysctl")) _exit(3);
    LinuxOptions options;
    options.user_mode_only = true;
    if (LinuxSystem::Open(options, &system, &error) != 0) _exit(4);
    if (system->features().kernel_faults || system->features().fork_events) _exit(5);
    _exit(0);
  }
  EXPECT_EQ(ExitOf(child), 0);
}

TEST_F(LinuxSystemTest, OutOfDescriptorsIsAnError) {
  pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    syscall(SYS_close_range, 3u, ~0u, 0u);
    for (rlim_t most = 3; most < 24; ++most) {
      rlimit limit{most, 4096};
      setrlimit(RLIMIT_NOFILE, &limit);
      LinuxSystem* system = nullptr;
      ErrorText error;
      int result = LinuxSystem::Open({}, &system, &error);
      if (result != 0 && result != -EMFILE) _exit(static_cast<int>(most));
      if (result != 0 && error.text[0] == 0) _exit(100 + static_cast<int>(most));
      if (result == 0) LinuxSystem::Close(system);
      if (access("/proc/self/fd/3", F_OK) == 0) _exit(150);  // nothing is left open
      if (result == 0) _exit(0);
    }
    _exit(200);
  }
  EXPECT_EQ(ExitOf(child), 0);
}

// --- text ------------------------------------------------------------------------------------------------------------

TEST(Text, LinesLongerThanTheBufferAreCut) {
  int fd = memfd_create("text", 0);
  std::string text = "short\n" + std::string(100, 'a') + "\nnext\n\n" + std::string(16, 'b') + "\nlast";
  ASSERT_EQ(write(fd, text.data(), text.size()), static_cast<ssize_t>(text.size()));
  lseek(fd, 0, SEEK_SET);
  char buffer[16];
  LineReader lines(fd, buffer, sizeof buffer);
  std::vector<std::string> got;
  std::string_view line;
  while (lines.Next(&line)) got.emplace_back(line);
  close(fd);
  EXPECT_EQ(got, (std::vector<std::string>{"short", std::string(16, 'a'), "next", "", std::string(16, 'b'), "last"}));
  EXPECT_EQ(lines.error(), 0);
}

TEST(Text, MapsLine) {
  Mapping mapping;
  std::string_view name;
  ASSERT_TRUE(ParseMapsLine(
      "7f0000001000-7f0000003000 rw-p 0000a000 00:01 1234                       /memfd:x (deleted)", &mapping, &name));
  EXPECT_EQ(mapping.start, 0x7f0000001000u);
  EXPECT_EQ(mapping.end, 0x7f0000003000u);
  EXPECT_TRUE(mapping.readable && mapping.writable && !mapping.executable && !mapping.shared && !mapping.anonymous);
  EXPECT_EQ(mapping.offset, 0xa000u);
  EXPECT_EQ(mapping.inode, 1234u);
  EXPECT_EQ(name, "/memfd:x (deleted)");
  ASSERT_TRUE(ParseMapsLine("55d000-55e000 rw-p 00000000 00:00 0                          [heap]", &mapping, &name));
  EXPECT_TRUE(mapping.heap && mapping.anonymous && !mapping.special);
  ASSERT_TRUE(ParseMapsLine("55d000-55e000 r-xp 00000000 00:00 0                          [vdso]", &mapping, &name));
  EXPECT_TRUE(mapping.special && !mapping.anonymous);
  ASSERT_TRUE(ParseMapsLine("55d000-55e000 rw-p 00000000 00:00 0 [anon:arena]", &mapping, &name));
  EXPECT_TRUE(mapping.anonymous && !mapping.special);
  ASSERT_TRUE(ParseMapsLine("55d000-55e000 ---p 00000000 00:00 0 ", &mapping, &name));
  EXPECT_TRUE(mapping.anonymous && !mapping.readable);
  EXPECT_FALSE(ParseMapsLine("Rss:                   4 kB", &mapping, &name));
  EXPECT_FALSE(ParseMapsLine("VmFlags: rd wr mr mw me ac", &mapping, &name));
}

// --- mappings --------------------------------------------------------------------------------------------------------

// PROCMAP_QUERY and /proc/self/maps say the same of every mapping.
TEST_F(LinuxSystemTest, QueryAgreesWithText) {
  if (!system_->features().mapping_query) GTEST_SKIP() << "no PROCMAP_QUERY before Linux 6.11";
  sbrk(static_cast<intptr_t>(kPage));  // not every allocator keeps a heap there
  FrameFile frames(2);
  Memory file_backed(2, &frames), anonymous(3);
  prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, anonymous.at(1), kPage, "a name");  // EINVAL without CONFIG_ANON_VMA_NAME
  Mappings query, text;
  ASSERT_EQ(query.Open(), 0);
  ASSERT_EQ(text.Open(), 0);
  text.ForgetQuery();
  Address at = 0;
  Mapping a, b;
  std::size_t count = 0, heaps = 0, stacks = 0, specials = 0;
  for (;; ++count) {
    int error = query.Query(at, &a);
    EXPECT_EQ(text.Query(at, &b), error);
    if (error) {
      EXPECT_EQ(error, -ENOENT);
      break;
    }
    EXPECT_EQ(a.start, b.start);
    EXPECT_EQ(a.end, b.end);
    EXPECT_EQ(a.readable, b.readable);
    EXPECT_EQ(a.writable, b.writable);
    EXPECT_EQ(a.executable, b.executable);
    EXPECT_EQ(a.shared, b.shared);
    EXPECT_EQ(a.anonymous, b.anonymous) << std::hex << a.start;
    EXPECT_EQ(a.stack, b.stack);
    EXPECT_EQ(a.heap, b.heap);
    EXPECT_EQ(a.special, b.special);
    EXPECT_EQ(a.offset, b.offset);
    EXPECT_EQ(a.device, b.device);
    EXPECT_EQ(a.inode, b.inode);
    heaps += a.heap;
    stacks += a.stack;
    specials += a.special;
    at = a.end;
  }
  EXPECT_EQ(count, query.Count());
  EXPECT_LE(count, text.Count());  // the text has [vsyscall] as well
  EXPECT_LE(text.Count(), count + 1);
  EXPECT_GE(heaps, 1u);
  EXPECT_EQ(stacks, 1u);
  EXPECT_GE(specials, 1u);
  ASSERT_EQ(query.Query(file_backed.at(1), &a), 0);
  EXPECT_EQ(a.inode, frames.file().inode);
  EXPECT_EQ(a.device, frames.file().device);
  EXPECT_FALSE(a.anonymous);
  ASSERT_EQ(query.Query(anonymous.at(1), &a), 0);
  EXPECT_TRUE(a.anonymous);
  query.Close();
  text.Close();
}

TEST_F(LinuxSystemTest, AttributesAreReadAndReplayed) {
  Memory memory(6), fresh(1);
  memory.Fill();
  ASSERT_EQ(madvise(memory.Pointer(1), kPage, MADV_DONTFORK), 0);
  ASSERT_EQ(madvise(memory.Pointer(2), kPage, MADV_DONTDUMP), 0);
  ASSERT_EQ(madvise(memory.Pointer(3), kPage, MADV_WIPEONFORK), 0);
  bool locked = syscall(SYS_mlock, memory.Pointer(4), kPage) == 0;  // sanitizers make nothing of mlock
  ASSERT_EQ(system_->Register(kTracker, memory.span(5, 1), kWriteProtect), 0);
  std::vector<AttributedMapping> found;
  auto collect = [](void* cookie, const AttributedMapping& mapping) {
    static_cast<std::vector<AttributedMapping>*>(cookie)->push_back(mapping);
  };
  ASSERT_EQ(system_->ReadAttributes(memory.all(), collect, &found), 6);
  ASSERT_EQ(found.size(), 6u);
  for (std::size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(found[i].mapping.start, memory.at(i));
    EXPECT_EQ(found[i].attributes.dont_fork, i == 1);
    EXPECT_EQ(found[i].attributes.dont_dump, i == 2);
    EXPECT_EQ(found[i].attributes.wipe_on_fork, i == 3);
    EXPECT_EQ(found[i].attributes.locked, locked && i == 4);
    EXPECT_EQ(found[i].attributes.userfault, i == 5);
    EXPECT_TRUE(found[i].attributes.no_huge_page);
    EXPECT_FALSE(found[i].attributes.hugetlb || found[i].attributes.pfn_map || found[i].attributes.sealed);
  }
  Attributes wanted;
  wanted.dont_fork = wanted.dont_dump = wanted.wipe_on_fork = true;
  ASSERT_EQ(system_->ApplyAttributes(fresh.all(), wanted), 0);
  found.clear();
  ASSERT_EQ(system_->ReadAttributes(fresh.all(), collect, &found), 1);
  EXPECT_TRUE(found[0].attributes.dont_fork && found[0].attributes.dont_dump && found[0].attributes.wipe_on_fork);
  found.clear();
  Memory hole(3);
  ASSERT_EQ(munmap(hole.Pointer(1), kPage), 0);
  EXPECT_EQ(system_->ReadAttributes(hole.span(1, 1), collect, &found), 0);
  EXPECT_EQ(system_->ReadAttributes(hole.all(), collect, &found), 2);
}

TEST_F(LinuxSystemTest, CountsMappings) {
  std::size_t before = system_->CountMappings();
  Memory memory(20);
  for (std::size_t i = 0; i < 20; i += 2) ASSERT_EQ(mprotect(memory.Pointer(i), kPage, PROT_READ), 0);
  EXPECT_GE(system_->CountMappings(), before + 20);
  EXPECT_GE(system_->MaxMappings(), 1000u);
}

// --- calls -----------------------------------------------------------------------------------------------------------

// A whole merge, break and detach through the contract alone.
TEST_F(LinuxSystemTest, MergesAndBreaksThroughTheContract) {
  File file;
  ASSERT_EQ(system_->CreateFile(16 * kPage, &file), 0);
  const std::byte* view = nullptr;
  ASSERT_EQ(system_->MapFile(file, 16 * kPage, &view), 0);
  Memory memory(4);
  Address staging = 0;
  ASSERT_EQ(system_->MapAnonymous(0, 4 * kPage, Protection::kReadWrite, &staging), 0);
  ASSERT_EQ(system_->Register(kStaging, {staging, 4 * kPage}, kMissing), 0);
  memory.Fill();
  Partial written = system_->WriteFile(file, 4 * kPage, memory.at(0), 4 * kPage);
  ASSERT_EQ(written.error, 0);
  EXPECT_EQ(std::memcmp(view + 4 * kPage, memory.Pointer(0), 4 * kPage), 0);

  ASSERT_EQ(system_->Register(kGate, memory.all(), kMissing), 0);
  ASSERT_EQ(system_->Move(kStaging, staging, memory.at(0), 4 * kPage).error, 0);
  EXPECT_EQ(std::memcmp(view + 4 * kPage, reinterpret_cast<void*>(staging), 4 * kPage), 0);
  Address prepared = 0;
  ASSERT_EQ(system_->MapFrames(0, 4 * kPage, file, 4 * kPage, Protection::kReadWrite, &prepared), 0);
  ASSERT_EQ(system_->Register(kBreaker, {prepared, 4 * kPage}, kMissing | kWriteProtect | kMinor), 0);
  ASSERT_EQ(system_->Continue(kBreaker, {prepared, 4 * kPage}, true).error, 0);
  std::vector<Event> events;
  std::atomic<bool> stop{false};
  {
    Worker reader([&] {
      while (!stop) {
        Context context = kBreaker;
        system_->WaitEvents(&context, 1, 100);
        Event batch[8];
        std::size_t count = system_->ReadEvents(kBreaker, batch, 8);
        events.insert(events.end(), batch, batch + count);
      }
    });
    EXPECT_EQ(system_->MoveMapping(prepared, 4 * kPage, memory.at(0)), 0);
    stop = true;
    system_->Notify();
  }
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].kind, Event::kRemap);
  EXPECT_EQ(events[0].start, prepared);
  EXPECT_EQ(events[0].end, prepared + 4 * kPage);
  EXPECT_EQ(events[0].to, memory.at(0));
  ASSERT_EQ(system_->Discard({staging, 4 * kPage}), 0);
  system_->Wake(kGate, memory.all());
  Mapping mapping;
  ASSERT_EQ(system_->QueryMapping(memory.at(2), &mapping), 0);
  EXPECT_EQ(mapping.inode, file.inode);
  EXPECT_EQ(mapping.device, file.device);
  EXPECT_EQ(mapping.offset, 4 * kPage);
  memory.Word(1) = 5;
  EXPECT_EQ(TakeWritten(memory.all()), (std::vector<std::size_t>{1}));
  EXPECT_EQ(memory.Word(0), FrameFile::Word(0));

  std::uint64_t words[2] = {};
  EXPECT_EQ(system_->ReadProgram(memory.at(1), words, sizeof words), sizeof words);
  EXPECT_EQ(words[0], 5u);
  EXPECT_EQ(system_->Unregister(kBreaker, memory.all()), 0);
  EXPECT_EQ(system_->PunchFile(file, 4 * kPage, kPage), 0);
  EXPECT_EQ(memory.Word(0), 0u);
  system_->UnmapFile(view, 16 * kPage);
  system_->CloseFile(file);
  EXPECT_EQ(system_->Unmap({staging, 4 * kPage}), 0);
}

// The library's view of a file is not inherited.
TEST_F(LinuxSystemTest, FileViewIsNotInherited) {
  File file;
  ASSERT_EQ(system_->CreateFile(kPage, &file), 0);
  const std::byte* view = nullptr;
  ASSERT_EQ(system_->MapFile(file, kPage, &view), 0);
  pid_t child = ForkRaw([&] {
    unsigned char resident;
    return mincore(const_cast<std::byte*>(view), kPage, &resident) == -1 && errno == ENOMEM ? 0 : 1;
  });
  EXPECT_EQ(ExitOf(child), 0);
  system_->UnmapFile(view, kPage);
  system_->CloseFile(file);
}

// A batch does the same through a ring and without one.
TEST_F(LinuxSystemTest, BatchesAgree) {
  for (bool with_ring : {false, true}) {
    IoBatch batch;
    if (with_ring) {
      if (int error = batch.OpenRing()) GTEST_SKIP() << "no io_uring here: " << std::strerror(-error);
    }
    constexpr std::size_t kPages = 150;  // more than a ring takes at once
    File file;
    ASSERT_EQ(CreatePoolFile(kPages * kPage, &file), 0);
    Memory memory(kPages + 1);
    memory.Fill();
    ASSERT_EQ(mprotect(memory.Pointer(kPages - 1), kPage, PROT_NONE), 0);
    std::vector<FrameWrite> writes;
    for (std::size_t i = 0; i + 1 < kPages; ++i) writes.push_back({file, i * kPage, memory.at(i), kPage, {}});
    writes.push_back({file, (kPages - 2) * kPage, memory.at(kPages - 2), 2 * kPage, {}});  // runs into PROT_NONE
    EXPECT_EQ(batch.Write(writes.data(), writes.size()), kPages - 1);
    EXPECT_EQ(writes[7].result.error, 0);
    EXPECT_EQ(writes[7].result.done, kPage);
    EXPECT_EQ(writes.back().result.error, -EFAULT);
    EXPECT_EQ(writes.back().result.done, kPage);
    auto stored = [&](std::size_t page) {
      std::uint64_t word = 0;
      EXPECT_EQ(pread(file.fd, &word, sizeof word, static_cast<off_t>(page * kPage)),
                static_cast<ssize_t>(sizeof word));
      return word;
    };
    for (std::size_t i = 0; i + 1 < kPages; ++i) EXPECT_EQ(stored(i), FrameFile::Word(i));
    std::vector<Hole> holes;
    for (std::size_t i = 0; i + 1 < kPages; i += 2) holes.push_back({file, i * kPage, kPage, 0});
    holes.push_back({File{-1, 0, 0}, 0, kPage, 0});
    EXPECT_EQ(batch.Punch(holes.data(), holes.size()), holes.size() - 1);
    EXPECT_EQ(holes.back().error, -EBADF);
    for (std::size_t i = 0; i + 1 < kPages; ++i) EXPECT_EQ(stored(i), i % 2 ? FrameFile::Word(i) : 0u);
    close(file.fd);
  }
}

TEST_F(LinuxSystemTest, ClocksAdvance) {
  std::uint64_t start = system_->NowNanoseconds(), cpu = system_->ThreadCpuNanoseconds();
  SleepMilliseconds(20);
  EXPECT_GE(system_->NowNanoseconds() - start, 20'000'000u);
  EXPECT_LT(system_->ThreadCpuNanoseconds() - cpu, 20'000'000u);
}

// --- children's contexts
// -----------------------------------------------------------------------------------------------

TEST(ChildContextsTest, HandlesAreNotReused) {
  auto table = std::make_unique<ChildContexts>();
  int fd = eventfd(0, EFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  Context first = table->Add(fd);
  ASSERT_GE(first, static_cast<Context>(kFirstChild));
  EXPECT_EQ(table->Acquire(first), fd);
  table->Close(first);
  EXPECT_EQ(table->Acquire(first), -1);       // nobody comes in any more
  EXPECT_EQ(fcntl(fd, F_GETFD), FD_CLOEXEC);  // but it is in use still
  table->Release(first);
  EXPECT_EQ(fcntl(fd, F_GETFD), -1);
  Context second = table->Add(eventfd(0, EFD_CLOEXEC));
  EXPECT_NE(second, first);
  EXPECT_EQ(table->Acquire(first), -1);
  table->Close(first);  // names nobody
  EXPECT_GE(table->Acquire(second), 0);
  table->Release(second);
  table->CloseAll();
  EXPECT_EQ(table->Acquire(second), -1);
}

TEST(ChildContextsTest, FullTableGivesUpItsOldest) {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  rlimit raised{limit.rlim_max, limit.rlim_max};
  if (limit.rlim_max < ChildContexts::kCapacity + 64 || setrlimit(RLIMIT_NOFILE, &raised) != 0) {
    GTEST_SKIP() << "RLIMIT_NOFILE is too low";
  }
  auto table = std::make_unique<ChildContexts>();
  std::vector<Context> handles;
  for (unsigned i = 0; i < ChildContexts::kCapacity; ++i) handles.push_back(table->Add(eventfd(0, EFD_CLOEXEC)));
  int one_more = eventfd(0, EFD_CLOEXEC);
  EXPECT_EQ(table->Add(one_more), -1);
  EXPECT_TRUE(table->EvictOldest());
  EXPECT_EQ(table->Acquire(handles[0]), -1);
  EXPECT_GE(table->Acquire(handles[1]), 0);
  table->Release(handles[1]);
  EXPECT_GE(table->Add(one_more), static_cast<Context>(kFirstChild));
  table->CloseAll();
  setrlimit(RLIMIT_NOFILE, &limit);
}

// Fork events give handles; a handle's process can be told to live or not; closed ones answer ESRCH.
TEST_F(LinuxSystemTest, ForkEventGivesAHandle) {
  if (!system_->features().fork_events) GTEST_SKIP() << "EVENT_FORK is not permitted (CAP_SYS_PTRACE)";
  Memory memory(1), source(1);
  source.Fill();
  ASSERT_EQ(system_->Register(kGate, memory.all(), kMissing), 0);
  pid_t child = -1;
  Worker forker([&] { child = ForkRaw([&] { return memory.Word(0) == FrameFile::Word(0) ? 0 : 1; }); });
  Event event;
  ASSERT_TRUE(WaitFor([&] { return system_->ReadEvents(kGate, &event, 1) == 1; }));
  ASSERT_EQ(event.kind, Event::kFork);
  forker.Join();
  EXPECT_TRUE(system_->ContextAlive(event.child));
  EXPECT_EQ(system_->Copy(event.child, memory.at(0), source.Pointer(0), kPage, true).error, 0);
  EXPECT_EQ(ExitOf(child), 0);
  EXPECT_TRUE(WaitFor([&] { return !system_->ContextAlive(event.child); }));
  system_->CloseContext(event.child);
  EXPECT_EQ(system_->Wake(event.child, memory.all()), -ESRCH);
  EXPECT_EQ(system_->Copy(event.child, memory.at(0), source.Pointer(0), kPage, true).error, -ESRCH);
  EXPECT_EQ(system_->ReadEvents(event.child, &event, 1), 0u);
  EXPECT_EQ(system_->Unregister(kGate, memory.all()), 0);
}

// A fork is let go on when there is no descriptor for its message: a spare one, then the oldest child's makes room.
TEST_F(LinuxSystemTest, ForkEventFindsRoomAtTheDescriptorLimit) {
  if (!system_->features().fork_events) GTEST_SKIP() << "EVENT_FORK is not permitted (CAP_SYS_PTRACE)";
  Memory memory(1);
  ASSERT_EQ(system_->Register(kGate, memory.all(), kMissing), 0);
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  std::vector<Event> forks;
  std::vector<pid_t> children;
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  for (int i = 0; i < 3; ++i) {
    pid_t child = -1;
    Worker forker([&] {
      child = ForkRaw([&] {
        char byte;
        close(ends[1]);
        return read(ends[0], &byte, 1) == 0 ? 0 : 1;
      });
    });
    if (i != 1) {
      // Nothing free below the limit from here on. The first time a spare descriptor is given up.
      int next = dup(0);
      close(next);
      rlimit none{static_cast<rlim_t>(next), limit.rlim_max};
      setrlimit(RLIMIT_NOFILE, &none);
    }
    Event event;
    ASSERT_TRUE(WaitFor([&] { return system_->ReadEvents(kGate, &event, 1) == 1; }));
    setrlimit(RLIMIT_NOFILE, &limit);
    forks.push_back(event);
    forker.Join();
    children.push_back(child);
  }
  EXPECT_FALSE(system_->ContextAlive(forks[0].child));  // gave way
  EXPECT_TRUE(system_->ContextAlive(forks[1].child));
  EXPECT_TRUE(system_->ContextAlive(forks[2].child));
  close(ends[1]);
  for (pid_t child : children) EXPECT_EQ(ExitOf(child), 0);
  for (const Event& event : forks) system_->CloseContext(event.child);
  close(ends[0]);
  EXPECT_EQ(system_->Unregister(kGate, memory.all()), 0);
}

// --- waiting ---------------------------------------------------------------------------------------------------------

volatile sig_atomic_t g_urgent_signals;

// Notify needs no descriptor, so that any thread of the program can ring; no handler of the program's runs.
TEST_F(LinuxSystemTest, NotifyEndsTheWaitWithoutDisturbingSignals) {
  g_urgent_signals = 0;
  struct sigaction action {
  }, before{};
  action.sa_handler = [](int) { g_urgent_signals = g_urgent_signals + 1; };
  ASSERT_EQ(sigaction(SIGURG, &action, &before), 0);
  for (auto disposition : {action.sa_handler, SIG_IGN}) {
    action.sa_handler = disposition;
    sigaction(SIGURG, &action, nullptr);
    std::atomic<int> waits{0};
    Worker waiter([&] {
      Context contexts[] = {kGate, kBreaker};
      for (int i = 0; i < 3; ++i) {
        system_->WaitEvents(contexts, 2, 20'000);
        ++waits;
      }
    });
    SleepMilliseconds(50);
    EXPECT_EQ(waits, 0);
    for (int i = 1; i <= 3; ++i) {
      system_->Notify();
      EXPECT_TRUE(WaitFor([&] { return waits == i; }));
      SleepMilliseconds(5);
      EXPECT_EQ(waits, i);
    }
  }
  EXPECT_EQ(g_urgent_signals, 0);
  sigaction(SIGURG, &before, nullptr);
}

TEST_F(LinuxSystemTest, NotifyBeforeTheWaitIsKept) {
  system_->Notify();
  Worker waiter([&] { system_->WaitEvents(nullptr, 0, 20'000); });
  EXPECT_TRUE(waiter.FinishesIn(2000));
}

TEST_F(LinuxSystemTest, WaitEndsAtAMessageOrTheTimeout) {
  Worker patient([&] { system_->WaitEvents(nullptr, 0, 30); });
  EXPECT_TRUE(patient.FinishesIn(2000));
  Memory memory(1);
  ASSERT_EQ(system_->Register(kGate, memory.all(), kMissing), 0);
  Worker toucher([&] { memory.Touch(0); });
  Context context = kGate;
  Worker waiter([&] { system_->WaitEvents(&context, 1, 20'000); });
  EXPECT_TRUE(waiter.FinishesIn(2000));
  Event event;
  ASSERT_EQ(system_->ReadEvents(kGate, &event, 1), 1u);
  EXPECT_EQ(event.kind, Event::kFault);
  EXPECT_FALSE(event.write || event.minor || event.write_protect);
  EXPECT_EQ(event.start, memory.at(0));
  EXPECT_EQ(system_->ZeroPage(kGate, memory.all()).error, 0);
}

// --- the process -----------------------------------------------------------------------------------------------------

// The robust list of every thread, and the neighbourhood of its head, where the C library keeps the word that is
// cleared at the thread's end.
TEST_F(LinuxSystemTest, FindsRobustMutexesAndThreadWords) {
  Memory memory(1);
  auto* mutex = static_cast<pthread_mutex_t*>(memory.Pointer(0));
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
  ASSERT_EQ(pthread_mutex_init(mutex, &attributes), 0);
  std::atomic<int> step{0};
  Address head = 0;
  int thread_id = 0;
  Worker owner([&] {
    pthread_mutex_lock(mutex);
    std::size_t bytes = 0;
    thread_id = static_cast<int>(syscall(SYS_gettid));
    syscall(SYS_get_robust_list, 0, &head, &bytes);
    step = 1;
    while (step != 2) SleepMilliseconds(1);
    pthread_mutex_unlock(mutex);
  });
  ASSERT_TRUE(WaitFor([&] { return step == 1; }));
  struct Found {
    std::vector<Address> words;
  } found;
  auto collect = [](void* cookie, Address word) {
    static_cast<Found*>(cookie)->words.push_back(word);
    return true;
  };
  system_->VisitUnwaitableWords(collect, &found);
  auto in_mutex = [&](Address word) { return word >= memory.at(0) && word < memory.at(0) + sizeof *mutex; };
  EXPECT_GE(std::count_if(found.words.begin(), found.words.end(), in_mutex), 2);  // the entry, and its futex
  EXPECT_EQ(std::count(found.words.begin(), found.words.end(), head), 1);
  // glibc: the thread's id is that word. It lies between the words reported around the head.
  bool near = false;
  for (Address word = head - 256; word < head + 256; word += sizeof(int))
    near |= *reinterpret_cast<int*>(word) == thread_id;
  EXPECT_TRUE(near);
  // The visitor may stop it.
  int visits = 0;
  system_->VisitUnwaitableWords([](void* cookie, Address) { return ++*static_cast<int*>(cookie) < 2; }, &visits);
  EXPECT_EQ(visits, 2);
  // The library's own threads have nothing in the program's memory.
  system_->RegisterOwnThread(thread_id);
  found.words.clear();
  system_->VisitUnwaitableWords(collect, &found);
  EXPECT_EQ(std::count_if(found.words.begin(), found.words.end(), in_mutex), 0);
  system_->ForgetOwnThread(thread_id);
  step = 2;
}

TEST_F(LinuxSystemTest, AvailableMemoryIsPlausible) {
  std::uint64_t available = system_->AvailableMemory();
  EXPECT_GT(available, 1u << 20);
  EXPECT_LE(available, static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES)) * kPage + (std::uint64_t{1} << 40));
}

// A memory cgroup above the process bounds it.
TEST_F(LinuxSystemTest, CgroupBoundsAvailableMemory) {
  std::string path, mount;
  if (FILE* file = fopen("/proc/self/cgroup", "r")) {
    char line[512], controllers[256], group[256];
    while (fgets(line, sizeof line, file)) {
      if (sscanf(line, "%*d:%255[^:]:%255s", controllers, group) == 2 && std::string(controllers) == "memory")
        path = group;
    }
    fclose(file);
  }
  mount = "/sys/fs/cgroup/memory";
  std::string directory = mount + path + "/ksmu-test-" + std::to_string(getpid());
  if (path.empty() || access((mount + path + "/memory.limit_in_bytes").c_str(), F_OK) != 0) {
    GTEST_SKIP() << "no memory cgroup of version 1 at " << mount << " to make one in";
  }
  if (mkdir(directory.c_str(), 0755) != 0)
    GTEST_SKIP() << "no memory cgroup can be made here: " << std::strerror(errno);
  auto put = [&](const char* file, const std::string& value) {
    int fd = open((directory + file).c_str(), O_WRONLY);
    bool good = fd >= 0 && write(fd, value.data(), value.size()) == static_cast<ssize_t>(value.size());
    close(fd);
    return good;
  };
  pid_t child = fork();
  if (child == 0) {
    if (!put("/memory.limit_in_bytes", "67108864") || !put("/cgroup.procs", std::to_string(getpid()))) _exit(1);
    LinuxSystem* system = nullptr;
    ErrorText error;
    if (LinuxSystem::Open({}, &system, &error) != 0) _exit(2);
    std::uint64_t before = system->AvailableMemory();
    if (before > 64u << 20 || before < 32u << 20) _exit(3);
    Memory memory(4096);
    for (std::size_t i = 0; i < 4096; ++i) memory.Word(i) = i;
    std::uint64_t after = system->AvailableMemory();
    _exit(after + (12u << 20) < before ? 0 : 4);
  }
  EXPECT_EQ(ExitOf(child), 0);
  EXPECT_EQ(rmdir(directory.c_str()), 0);
}

}  // namespace
}  // namespace ksmu::os
