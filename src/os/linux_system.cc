#include "os/linux_system.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/uio.h>
#include <time.h>

#include <algorithm>
#include <csignal>
#include <new>

#include "base/own_memory.h"
#include "os/pool_file.h"
#include "os/own_place.h"
#include "os/raw.h"
#include "os/thread.h"
#include "os/uapi.h"
#include "os/uffd.h"

namespace ksmu::os {
namespace {

int ProtectionBits(Protection protection) {
  switch (protection) {
    case Protection::kNone:
      return PROT_NONE;
    case Protection::kRead:
      return PROT_READ;
    case Protection::kReadWrite:
      return PROT_READ | PROT_WRITE;
  }
  return PROT_NONE;
}

std::uint64_t ReadClock(clockid_t clock) {
  timespec now{};
  clock_gettime(clock, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

}  // namespace

// --- opening -------------------------------------------------------------------------------------------------------

int LinuxSystem::Open(const LinuxOptions& options, LinuxSystem** out, ErrorText* error) {
  static_assert(SIGURG == kBellSignal);
  void* place = base::MapOwnPages(sizeof(LinuxSystem));
  if (!place) {
    error->Set("No memory for the library's own tables.");
    return -ENOMEM;
  }
  auto* system = new (place) LinuxSystem;
  if (int failed = system->OpenAll(options, error)) {
    Close(system);
    return failed;
  }
  *out = system;
  return 0;
}

void LinuxSystem::Close(LinuxSystem* system) {
  system->CloseAll();
  system->~LinuxSystem();
  base::UnmapOwnPages(system, sizeof(LinuxSystem));
}

int LinuxSystem::OpenDescriptor(const LinuxOptions& options, ErrorText* error) {
  uffd::Door door;
  int fd = uffd::Open(options.user_mode_only, options.refuse_kernel_faults, &door);
  if (fd == -EPERM) {
    error->Set(
        "This process may not use userfaultfd. As root run `sysctl vm.unprivileged_userfaultfd=1`, or give its user "
        "access to the device (`setfacl -m u:USER:rw /dev/userfaultfd`), or start it with CAP_SYS_PTRACE; in a "
        "container "
        "the seccomp profile has to allow userfaultfd too.");
  } else if (fd == -ENOSYS) {
    error->Set("This kernel is built without userfaultfd (CONFIG_USERFAULTFD).");
  } else if (fd < 0) {
    error->Set("No descriptor or no memory for a userfaultfd: raise RLIMIT_NOFILE.");
  } else if (door == uffd::Door::kUserModeOnly) {
    features_.kernel_faults = false;
  }
  return fd;
}

int LinuxSystem::OpenContext(const LinuxOptions& options, std::uint64_t features, int* out, ErrorText* error) {
  int fd = OpenDescriptor(options, error);
  if (fd < 0) return fd;
  int result = uffd::Enable(fd, features);
  if (result == -EPERM && (features & uapi::kFeatureEventFork)) {
    // EVENT_FORK needs CAP_SYS_PTRACE; without it children that a raw clone makes are out of our sight.
    features_.fork_events = false;
    result = uffd::Enable(fd, features & ~uapi::kFeatureEventFork);
  }
  if (result != 0) {
    error->Set("This kernel refuses a combination of userfaultfd features; Linux 6.8 or later is needed.");
    close(fd);
    return result == -EINVAL ? -ENOSYS : result;
  }
  *out = fd;
  return 0;
}

int LinuxSystem::OpenAll(const LinuxOptions& options, ErrorText* error) {
  page_bytes_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  pid_ = static_cast<int>(getpid());
  pins_ = options.pins;
  features_.kernel_faults = true;
  features_.fork_events = true;

  // First of all, so that its number is as low as can be: see ReadEvents.
  spare_fd_ = raw::Repeat([] { return open("/proc/self/maps", O_RDONLY | O_CLOEXEC); });
  if (spare_fd_ < 0) {
    error->Set(spare_fd_ == -EMFILE ? "No descriptors: raise RLIMIT_NOFILE."
                                    : "/proc/self/maps cannot be opened: is /proc mounted?");
    return spare_fd_;
  }
  int scratch = OpenDescriptor(options, error);
  if (scratch < 0) return scratch;
  std::uint64_t offered = 0;
  uffd::QueryFeatures(scratch, &offered);
  close(scratch);
  if (int failed = CheckFeatures(offered, error)) return failed;

  constexpr std::uint64_t kProtecting = uapi::kFeaturePagefaultFlagWp | uapi::kFeatureWpHugetlbfsShmem;
  constexpr std::uint64_t kBreaking = kProtecting | uapi::kFeatureMinorShmem | uapi::kFeatureEventRemove |
                                      uapi::kFeatureEventRemap | uapi::kFeatureEventFork;
  constexpr std::uint64_t kFeaturesOf[kNamedContexts] = {
      /* kTracker */ kProtecting | uapi::kFeatureWpAsync | uapi::kFeatureWpUnpopulated,
      /* kGate */ uapi::kFeaturePagefaultFlagWp | uapi::kFeatureMove | uapi::kFeatureEventRemove |
          uapi::kFeatureEventFork,
      /* kStaging */ uapi::kFeatureMove,
      /* kBreaker */ kBreaking | uapi::kFeatureWpAsync,
      /* kSyncBreaker */ kBreaking,
  };
  for (int context = 0; context < kNamedContexts; ++context) {
    if (int failed = OpenContext(options, kFeaturesOf[context], &contexts_[context], error)) return failed;
  }

  if (int failed = pagemap_.Open(page_bytes_)) {
    error->Set(failed == -ENOSYS
                   ? "The kernel is too old; Linux 6.8 or later is needed. It lacks PAGEMAP_SCAN (Linux 6.7)."
                   : "/proc/self/pagemap cannot be opened: is /proc mounted?");
    return failed;
  }
  if (int failed = mappings_.Open()) {
    error->Set("/proc/self/maps cannot be opened: is /proc mounted?");
    return failed;
  }
  features_.mapping_query = mappings_.has_query();
  memory_.Open();
  if (options.io_uring_batches) features_.io_uring = batch_.OpenRing() == 0;

  if (int failed =
          raw::Mmap(LastingPlace(page_bytes_), page_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0, &idle_page_)) {
    error->Set("No memory for the library's own tables.");
    return failed;
  }
  raw::Madvise(idle_page_, page_bytes_, MADV_DONTFORK);

  sigset_t bell;
  sigemptyset(&bell);
  sigaddset(&bell, kBellSignal);
  bell_fd_ = raw::Repeat([&] { return signalfd(-1, &bell, SFD_CLOEXEC | SFD_NONBLOCK); });
  if (bell_fd_ < 0) {
    error->Set("No descriptor for a signalfd: raise RLIMIT_NOFILE.");
    return bell_fd_;
  }

  if (MoveWatch::IsNeeded()) {
    const auto registers = [](void* self, int thread) { static_cast<LinuxSystem*>(self)->RegisterOwnThread(thread); };
    if (int failed = move_watch_.Start(page_bytes_, registers, this)) {
      error->Set(WhyNoThread(failed));
      return failed;
    }
  }

  ProbeContexts contexts{contexts_[kTracker], contexts_[kGate],       contexts_[kStaging],
                         contexts_[kBreaker], options.user_mode_only, options.refuse_kernel_faults};
  const int failed = ProbeKernel(contexts, pagemap_, page_bytes_, error);
  if (failed == -ENOSYS) {
    bool locked = false;
    mappings_.ReadAttributes(
        {idle_page_, page_bytes_},
        [](void* found, const AttributedMapping& mapping) { *static_cast<bool*>(found) |= mapping.attributes.locked; }, &locked);
    if (locked) {
      error->Set(
          "New memory is locked in this process (mlockall with MCL_FUTURE), and pages cannot be moved between locked and "
          "unlocked memory: start the library before that, or lock what needs it by mlock.");
    }
  }
  return failed;
}

void LinuxSystem::CloseAll() {
  move_watch_.Stop();
  children_.CloseAll();
  GiveUpSpare();
  for (int& fd : contexts_) {
    if (fd >= 0) close(fd);
    fd = -1;
  }
  pagemap_.Close();
  mappings_.Close();
  batch_.Close();
  if (bell_fd_ >= 0) close(bell_fd_);
  bell_fd_ = -1;
  if (idle_page_) raw::Munmap(idle_page_, page_bytes_);
  idle_page_ = 0;
}

// --- userfaultfd ---------------------------------------------------------------------------------------------------

class LinuxSystem::Use {
 public:
  Use(LinuxSystem* system, Context context) : system_(system), child_(context) {
    if (context >= 0 && context < kNamedContexts) {
      fd_ = system->contexts_[context];
    } else {
      fd_ = system->children_.Acquire(context);
      held_ = fd_ >= 0;
    }
  }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;
  ~Use() {
    if (held_) system_->children_.Release(child_);
  }
  // A child whose context has been closed is a process that has gone: ESRCH, as the kernel says.
  bool gone() const { return fd_ < 0; }
  int fd() const { return fd_; }

 private:
  LinuxSystem* system_;
  Context child_;
  int fd_ = -1;
  bool held_ = false;
};

int LinuxSystem::Register(Context context, Span span, std::uint32_t modes) {
  Use use(this, context);
  return use.gone() ? -ESRCH : refusals_.Note(Refusals::kRegister, uffd::Register(use.fd(), span, modes));
}

int LinuxSystem::Unregister(Context context, Span span) {
  Use use(this, context);
  // Nobody ever waits at the tracker: the kernel answers its faults.
  return use.gone() ? -ESRCH : refusals_.Note(Refusals::kUnregister, uffd::Unregister(use.fd(), span, context == kTracker));
}

int LinuxSystem::WriteProtect(Context context, Span span, bool protect) {
  Use use(this, context);
  return use.gone() ? -ESRCH : refusals_.Note(Refusals::kWriteProtect, uffd::WriteProtect(use.fd(), span, protect));
}

Partial LinuxSystem::Continue(Context context, Span span, bool protect) {
  Use use(this, context);
  return use.gone() ? Partial{-ESRCH, 0} : Noted(Refusals::kContinue, uffd::Continue(use.fd(), span, protect));
}

Partial LinuxSystem::Move(Context context, Address to, Address from, std::size_t bytes) {
  Use use(this, context);
  if (use.gone()) return {-ESRCH, 0};
  const bool watched = context == kStaging && move_watch_.started();
  return Noted(Refusals::kMove, watched ? move_watch_.Move(use.fd(), to, from, bytes) : uffd::Move(use.fd(), to, from, bytes));
}

Partial LinuxSystem::Copy(Context context, Address to, const void* from, std::size_t bytes, bool wake) {
  Use use(this, context);
  return use.gone() ? Partial{-ESRCH, 0} : Noted(Refusals::kCopy, uffd::Copy(use.fd(), to, from, bytes, wake));
}

Partial LinuxSystem::ZeroPage(Context context, Span span) {
  Use use(this, context);
  return use.gone() ? Partial{-ESRCH, 0} : Noted(Refusals::kZeroPage, uffd::ZeroPage(use.fd(), span));
}

int LinuxSystem::Wake(Context context, Span span) {
  Use use(this, context);
  if (use.gone()) return -ESRCH;
  const int error = refusals_.Note(Refusals::kWake, uffd::Wake(use.fd(), span));
  if (Refused(error)) GiveUp(context);
  return error;
}

// A system call filter that came after the start refuses what somebody is waiting for: the context is closed, which lets
// everybody go. Memory stays as it is; what the context was for (discards, gates) is at an end.
void LinuxSystem::GiveUp(Context context) {
  if (context < 0 || context >= kNamedContexts || contexts_[context] < 0) return;
  const int fd = contexts_[context];
  contexts_[context] = -1;
  close(fd);
  given_up_.fetch_or(1u << context, std::memory_order_release);
}

bool LinuxSystem::EventPending(Context context) {
  Use use(this, context);
  return !use.gone() && uffd::EventPending(use.fd());
}

std::size_t LinuxSystem::ReadEvents(Context context, Event* events, std::size_t capacity) {
  Use use(this, context);
  if (use.gone()) return 0;
  constexpr std::size_t kBatch = 16;
  uffd_msg messages[kBatch];
  std::size_t count = 0;
  while (count < capacity) {
    int got = uffd::Read(use.fd(), messages, std::min(kBatch, capacity - count));
    if (got == -EMFILE || got == -ENFILE) {
      // A fork waits until its message is read, and that takes a descriptor: the oldest child's gives way (what its
      // process discards from now on behaves as where EVENT_FORK is not permitted). Else the fork would wait for ever.
      // The spare is for a program that has lowered RLIMIT_NOFILE below what we have open.
      if (children_.EvictOldest() || GiveUpSpare()) continue;
      break;
    }
    if (got < 0) refusals_.Note(Refusals::kRead, got);
    if (Refused(got)) GiveUp(context);
    if (got <= 0) break;
    for (int i = 0; i < got; ++i) {
      const uffd_msg& message = messages[i];
      Event event{};
      switch (message.event) {
        case UFFD_EVENT_PAGEFAULT:
          event.kind = Event::kFault;
          event.write_protect = message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP;
          event.minor = message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR;
          event.write = message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE;
          event.start = message.arg.pagefault.address & ~(page_bytes_ - 1);
          event.end = event.start + page_bytes_;
          break;
        case UFFD_EVENT_REMOVE:
        case UFFD_EVENT_UNMAP:
          event.kind = message.event == UFFD_EVENT_REMOVE ? Event::kRemove : Event::kUnmap;
          event.start = message.arg.remove.start;
          event.end = message.arg.remove.end;
          break;
        case UFFD_EVENT_REMAP:
          event.kind = Event::kRemap;
          event.start = message.arg.remap.from;
          event.end = message.arg.remap.from + message.arg.remap.len;
          event.to = message.arg.remap.to;
          break;
        case UFFD_EVENT_FORK: {
          event.kind = Event::kFork;
          int child = static_cast<int>(message.arg.fork.ufd);
          while ((event.child = children_.Add(child)) < 0 && children_.EvictOldest()) {
          }
          break;
        }
        default:
          continue;
      }
      events[count++] = event;
    }
  }
  return count;
}

bool LinuxSystem::GiveUpSpare() {
  int spare = spare_fd_.exchange(-1);
  if (spare >= 0) close(spare);
  return spare >= 0;
}

void LinuxSystem::CloseContext(Context child) { children_.Close(child); }

bool LinuxSystem::ContextAlive(Context child) {
  Use use(this, child);
  return !use.gone() && uffd::Alive(use.fd(), idle_page_, page_bytes_);
}

// --- page tables, the program's memory -----------------------------------------------------------------------------

ScanResult LinuxSystem::Scan(Span span, const ScanRequest& request, PageRun* runs, std::size_t capacity) {
  const ScanResult result = pagemap_.Scan(span, request, runs, capacity);
  refusals_.Note(Refusals::kScan, result.error);
  return result;
}

int LinuxSystem::ReadSharing(Address start, Sharing* out, std::size_t pages) {
  return pagemap_.ReadSharing(start, out, pages);
}

std::size_t LinuxSystem::ReadProgram(Address from, void* to, std::size_t bytes) {
  // process_vm_writev into our own buffer, not readv from the program's memory: readv pins what it reads, and pinning
  // an anonymous page that a forked child shares (or that KSM holds) makes the kernel copy it. Measured on 6.18:
  // reading 64 MiB with a child alive took 64 MiB. As the local side, the program's memory is read as by any system
  // call.
  std::size_t done = 0;
  while (done < bytes) {
    iovec source{reinterpret_cast<void*>(from + done), bytes - done};
    iovec target{static_cast<char*>(to) + done, bytes - done};
    ssize_t copied = raw::Repeat([&] { return process_vm_writev(pid_, &source, 1, &target, 1, 0); });
    if (copied <= 0) break;
    done += static_cast<std::size_t>(copied);
  }
  return done;
}

int LinuxSystem::Discard(Span span) {
  return refusals_.Note(Refusals::kMadvise, raw::Madvise(span.start, span.bytes, MADV_DONTNEED));
}

int LinuxSystem::PopulateWrite(Span span) {
  return refusals_.Note(Refusals::kMadvise, raw::Madvise(span.start, span.bytes, uapi::kMadvPopulateWrite));
}

int LinuxSystem::ApplyAttributes(Span span, const Attributes& attributes) {
  int first_error = 0;
  auto apply = [&](bool wanted, int advice) {
    if (!wanted) return;
    int error = raw::Madvise(span.start, span.bytes, advice);
    if (first_error == 0) first_error = error;
  };
  apply(attributes.dont_fork, MADV_DONTFORK);
  apply(attributes.dont_dump, MADV_DONTDUMP);
  apply(attributes.huge_page, MADV_HUGEPAGE);
  apply(attributes.no_huge_page, MADV_NOHUGEPAGE);
  apply(attributes.wipe_on_fork, MADV_WIPEONFORK);  // EINVAL on a file's mapping
  apply(attributes.mergeable, MADV_MERGEABLE);
  return first_error;
}

// --- mappings ------------------------------------------------------------------------------------------------------

int LinuxSystem::QueryMapping(Address address, Mapping* out) { return mappings_.Query(address, out); }

int LinuxSystem::ReadAttributes(Span span, void (*each)(void* cookie, const AttributedMapping&), void* cookie) {
  return mappings_.ReadAttributes(span, each, cookie);
}

std::size_t LinuxSystem::CountMappings() { return mappings_.Count(); }

std::size_t LinuxSystem::MaxMappings() { return Mappings::Max(); }

int LinuxSystem::MapFrames(Address at, std::size_t bytes, const File& file, std::uint64_t offset, Protection protection,
                           Address* out) {
  // No reservation: what counts against the commit limit is what the program's own mapping stood for already.
  int flags = MAP_PRIVATE | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  return refusals_.Note(Refusals::kMmap, raw::Mmap(at ? at : PassingPlace(), bytes, ProtectionBits(protection), flags, file.fd, offset, out));
}

int LinuxSystem::MapAnonymous(Address at, std::size_t bytes, Protection protection, Address* out) {
  // Accounted, as the program's own memory is: mappings that differ in this never become one again.
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0);
  return refusals_.Note(Refusals::kMmap, raw::Mmap(at ? at : LastingPlace(bytes), bytes, ProtectionBits(protection), flags, -1, 0, out));
}

int LinuxSystem::MapApart(std::size_t bytes, bool no_reserve, Address* out) {
  // Where the kernel puts a mapping it joins it to what lies there, and with that to its anon_vma. Between two inaccessible
  // pages there is nothing to join.
  const std::size_t page = PageSize();
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (no_reserve ? MAP_NORESERVE : 0);
  Address around = 0;
  if (int error = raw::Mmap(PassingPlace(), bytes + 2 * page, PROT_NONE, flags, -1, 0, &around)) {
    return refusals_.Note(Refusals::kMmap, error);
  }
  if (int error = Protect({around + page, bytes}, Protection::kReadWrite)) {
    Unmap({around, bytes + 2 * page});
    return error;
  }
  Unmap({around, page});
  Unmap({around + page + bytes, page});
  *out = around + page;
  return 0;
}

int LinuxSystem::MoveMapping(Address from, std::size_t bytes, Address to) {
  Address moved;
  return refusals_.Note(Refusals::kMremap, raw::Mremap(from, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to, &moved));
}

int LinuxSystem::TakePages(Span span, Address* out) {
  constexpr int kFlags = MREMAP_MAYMOVE | uapi::kMremapDontUnmap;
  return refusals_.Note(Refusals::kMremap, raw::Mremap(span.start, span.bytes, kFlags, PassingPlace(), out));
}

int LinuxSystem::Unmap(Span span) {
  return refusals_.Note(Refusals::kMunmap, raw::Munmap(span.start, span.bytes));
}

long LinuxSystem::CallForProgram(long number, const long* arguments) {
  return raw::Direct(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
}

int LinuxSystem::Lock(Span span) { return raw::OnRange(SYS_mlock, span.start, span.bytes); }

int LinuxSystem::Protect(Span span, Protection protection) {
  return refusals_.Note(Refusals::kMprotect, raw::OnRange(SYS_mprotect, span.start, span.bytes, ProtectionBits(protection)));
}

// --- NUMA nodes ----------------------------------------------------------------------------------------------------

int LinuxSystem::CountNodes() { return os::CountNodes(); }

int LinuxSystem::QueryNodes(const Address* pages, std::size_t count, int* nodes) {
  return refusals_.Note(Refusals::kMovePages, QueryPageNodes(pages, count, nodes));
}

int LinuxSystem::BindFile(const File& file, std::size_t bytes, int node) {
  return refusals_.Note(Refusals::kBindFile, BindPoolFile(file, bytes, node));
}

void LinuxSystem::PreferNode(int node) {
  if (node == kNoNode) thread_policy_.Restore();
  else thread_policy_.Prefer(node);
}

// --- pool files ----------------------------------------------------------------------------------------------------

int LinuxSystem::CreateFile(std::size_t bytes, File* out) {
  return refusals_.Note(Refusals::kCreateFile, CreatePoolFile(bytes, out));
}

void LinuxSystem::CloseFile(const File& file) { close(file.fd); }

Partial LinuxSystem::WriteFile(const File& file, std::uint64_t offset, Address from, std::size_t bytes) {
  return Noted(Refusals::kWriteFile, WritePoolFile(file, offset, from, bytes));
}

int LinuxSystem::PunchFile(const File& file, std::uint64_t offset, std::size_t bytes) {
  return refusals_.Note(Refusals::kPunchFile, PunchPoolFile(file, offset, bytes));
}

std::size_t LinuxSystem::PunchFiles(Hole* holes, std::size_t count) { return batch_.Punch(holes, count); }

std::size_t LinuxSystem::WriteFiles(FrameWrite* writes, std::size_t count) { return batch_.Write(writes, count); }

int LinuxSystem::MapFile(const File& file, std::size_t bytes, const std::byte** out) {
  return refusals_.Note(Refusals::kMapFile, MapPoolFile(file, bytes, out));
}

void LinuxSystem::UnmapFile(const std::byte* view, std::size_t bytes) {
  raw::Munmap(reinterpret_cast<Address>(view), bytes);
}

// --- the process ---------------------------------------------------------------------------------------------------

void LinuxSystem::VisitUnwaitableWords(bool (*each)(void* cookie, Address), void* cookie) {
  os::VisitUnwaitableWords(*this, own_threads_, each, cookie);
}

Pins LinuxSystem::PossiblePins() {
  Span rings[2];
  std::size_t count = batch_.RingMappings(rings);
  return os::PossiblePins(own_threads_, pins_, rings, count);
}

bool LinuxSystem::PossibleReferences() { return os::PossibleReferences(own_threads_); }

std::uint64_t LinuxSystem::AvailableMemory() { return memory_.Available(); }

std::uint64_t LinuxSystem::NowNanoseconds() { return ReadClock(CLOCK_MONOTONIC); }

std::uint64_t LinuxSystem::ThreadCpuNanoseconds() { return ReadClock(CLOCK_THREAD_CPUTIME_ID); }

void LinuxSystem::RegisterEventThread() {
  if (sched_getaffinity(0, sizeof event_cpus_, &event_cpus_) != 0) return;
  event_thread_.store(CurrentThread(), std::memory_order_release);
}

void LinuxSystem::KeepEventThreadNear(bool near) {
  const int thread = event_thread_.load(std::memory_order_acquire);
  const int cpu = near ? sched_getcpu() : -1;
  if (!thread || cpu == event_cpu_) return;
  cpu_set_t one;
  CPU_ZERO(&one);
  if (cpu >= 0 && cpu < CPU_SETSIZE && CPU_ISSET(cpu, &event_cpus_)) CPU_SET(cpu, &one);
  else if (cpu >= 0) return;
  sched_setaffinity(thread, sizeof one, cpu >= 0 ? &one : &event_cpus_);
  event_cpu_ = cpu;
}

void LinuxSystem::Yield() { sched_yield(); }

// --- waiting -------------------------------------------------------------------------------------------------------

// A program's thread cannot ring through a descriptor: it has another table than ours. A signal needs none. It goes to
// the waiting thread alone, which has it blocked, so that no handler runs whatever the program has installed; a blocked
// signal is kept even where it is ignored; and a signalfd in our table makes it something to poll for.
void LinuxSystem::Notify() {
  rung_.store(true);
  if (int waiter = waiter_.load()) syscall(SYS_tgkill, pid_, waiter, kBellSignal);
}

void LinuxSystem::WaitEvents(const Context* contexts, std::size_t count, int timeout_ms) {
  constexpr std::size_t kMost = kNamedContexts + ChildContexts::kCapacity;
  pollfd polled[kMost + 1];
  int self = CurrentThread();
  if (waiter_.load() != self) {
    sigset_t bell;
    sigemptyset(&bell);
    sigaddset(&bell, kBellSignal);
    pthread_sigmask(SIG_BLOCK, &bell, nullptr);
    waiter_.store(self);
  }
  polled[0] = {bell_fd_, POLLIN, 0};
  std::size_t filled = 1;
  for (std::size_t i = 0; i < count && filled <= kMost; ++i) {
    Use use(this, contexts[i]);
    // Not held while waiting: a child closed meanwhile costs a wake-up for nothing at worst.
    if (!use.gone()) polled[filled++] = {use.fd(), POLLIN, 0};
  }
  if (rung_.load()) timeout_ms = 0;
  // An interruption (a debugger, a stop signal) ends the wait like any other news: the caller looks and comes back.
  poll(polled, filled, timeout_ms);
  // In this order: a ring between the two leaves the flag set, and costs one more round.
  rung_.store(false);
  signalfd_siginfo drained;
  while (read(bell_fd_, &drained, sizeof drained) > 0) {
  }
}

}  // namespace ksmu::os
