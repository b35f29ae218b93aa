// The functions that stand in the program's way to the kernel. Each is a C function of libc's name and answers as libc's does:
// a result, or -1 and errno; on success errno is what it was.
#include <fcntl.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "api/shim.h"
#include "os/raw.h"
#include "preload/auto.h"
#include "preload/config.h"
#include "preload/memory.h"
#include "preload/next.h"
#include "preload/pieces.h"
#include "preload/program.h"
#include "preload/regions.h"
#include "preload/seen.h"

using namespace ksmu::preload;
using ksmu::os::raw::Direct;

namespace {

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif

int AnswerInt(long result) { return static_cast<int>(Answer(result)); }
long L(const void* p) { return reinterpret_cast<long>(p); }

// A filter that goes in while a merge is in hand could forbid what the merge needs next.
template <typename Call>
long WithoutMerges(Call&& call) {
  const bool held = Active() && ksmushim_state() == KSMU_SHIM_RUNNING && ksmushim_fork_prepare();
  const long result = call();
  if (held) ksmushim_fork_parent();
  return result;
}

long DoPrctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d) {
  const auto kernel = [&] {
    return Direct(SYS_prctl, option, static_cast<long>(a), static_cast<long>(b), static_cast<long>(c), static_cast<long>(d));
  };
  if (!Active()) return kernel();
  switch (option) {
    case PR_SET_MEMORY_MERGE:
      if (b || c || d) return -EINVAL;
      // What it never was, the kernel may have inherited; and a kernel before 6.4 knows neither.
      if (a == 0 && !MemoryMerge()) return kernel();
      return SetMemoryMerge(a != 0) == 0 ? 0 : kernel();
    case PR_GET_MEMORY_MERGE:
      if (a || b || c || d) return -EINVAL;
      return MemoryMerge() ? 1 : kernel();
    case PR_SET_SECCOMP:
      // The strict mode allows nothing afterwards, not even to go on.
      return a == 1 ? kernel() : WithoutMerges(kernel);
    case PR_SET_VMA: {
      // A name is for anonymous memory only: a frame's mapping answers EBADF.
      const long arguments[6] = {option, static_cast<long>(a), static_cast<long>(b), static_cast<long>(c), static_cast<long>(d), 0};
      return DoOnRange(SYS_prctl, arguments, 2);
    }
    default:
      return kernel();
  }
}

constexpr int kHandOvers = 100;

// A userfaultfd of the program's own: a postcopy migration, a snapshot, a collector. A range has one owner: it is the program,
// and the library asks from time to time whether the range has become free.
long DoRegister(int fd, uffdio_register* request) {
  const auto kernel = [&] { return Direct(SYS_ioctl, fd, static_cast<long>(UFFDIO_REGISTER), L(request)); };
  uffdio_register copy;
  // What cannot be read is the kernel's to complain about.
  if (!ReadProgram(request, &copy, sizeof copy)) return kernel();
  void* const start = reinterpret_cast<void*>(copy.range.start);
  if (!Concerns(start, copy.range.len)) return kernel();
  const Span span{copy.range.start, copy.range.len};
  for (int attempt = 0;; ++attempt) {
    const bool left = LeaveFrames(span, true);
    TakenOut regions(span, true);
    const long result = kernel();
    // What was broken since stays in a frame's mapping, which is the library's.
    const bool again = result == -EBUSY && left && attempt < kHandOvers && ShapeOf(span).frames;
    regions.PutBack();  // refused as long as the program holds it
    if (!again) return result;
  }
}

long DoShmat(int id, const void* at, int flags) {
  if (Active() && (flags & SHM_REMAP) && at) {
    shmid_ds about;
    if (shmctl(id, IPC_STAT, &about) == 0) {
      const Span span = PagesOf(at, about.shm_segsz);
      g_seen.Remove(span);
      TakenOut regions(Concerns(at, span.bytes) ? span : Span{}, false);
      const long result = Direct(SYS_shmat, id, L(at), flags);
      if (Failed(result)) regions.PutBack();
      return result;
    }
  }
  return Direct(SYS_shmat, id, L(at), flags);
}

// A child with memory of its own, made by a call of which libc knows nothing: `make` answers 0 in it.
template <typename Make>
long RawChild(Make&& make) {
  if (!Active()) return make();
  const bool held = ksmushim_state() == KSMU_SHIM_RUNNING && ksmushim_fork_prepare();
  const long pid = make();
  if (pid == 0) {
    ksmushim_raw_child();
    AutoInChild();
  } else if (held) {
    ksmushim_fork_parent();
  }
  return pid;
}

struct CloneStart {
  int (*run)(void*);
  void* argument;
};
int StartOfClone(void* start) {
  const CloneStart copy = *static_cast<CloneStart*>(start);
  ksmushim_raw_child();
  AutoInChild();
  return copy.run(copy.argument);
}

bool SharesMemory(unsigned long flags) { return flags & CLONE_VM; }

}  // namespace

extern "C" {

#define KSMU_EXPORT __attribute__((visibility("default")))

KSMU_EXPORT void* mmap(void* at, size_t bytes, int prot, int flags, int fd, off_t offset) noexcept {
  return AnswerAddress(DoMmap(at, bytes, prot, flags, fd, offset));
}
KSMU_EXPORT void* mmap64(void* at, size_t bytes, int prot, int flags, int fd, off64_t offset) noexcept {
  return AnswerAddress(DoMmap(at, bytes, prot, flags, fd, offset));
}
KSMU_EXPORT int munmap(void* at, size_t bytes) noexcept { return AnswerInt(DoMunmap(at, bytes)); }
KSMU_EXPORT void* mremap(void* from, size_t bytes, size_t new_bytes, int flags, ...) noexcept {
  void* to = nullptr;
  if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
    va_list arguments;
    va_start(arguments, flags);
    to = va_arg(arguments, void*);
    va_end(arguments);
  }
  return AnswerAddress(DoMremap(from, bytes, new_bytes, flags, to));
}
KSMU_EXPORT int mprotect(void* at, size_t bytes, int prot) noexcept {
  return AnswerInt(DoMprotect(at, bytes, prot, -1, false));
}
KSMU_EXPORT int pkey_mprotect(void* at, size_t bytes, int prot, int key) noexcept {
  return AnswerInt(DoMprotect(at, bytes, prot, key, true));
}

KSMU_EXPORT int madvise(void* at, size_t bytes, int advice) noexcept { return AnswerInt(DoMadvise(at, bytes, advice)); }
// glibc's does nothing for DONTNEED: the standard's says nothing of losing data. Its numbers for the rest are madvise's.
KSMU_EXPORT int posix_madvise(void* at, size_t bytes, int advice) noexcept {
  if (g_next.posix_madvise && (!Active() || advice == POSIX_MADV_DONTNEED)) return g_next.posix_madvise(at, bytes, advice);
  return advice == POSIX_MADV_DONTNEED ? 0 : static_cast<int>(-DoMadvise(at, bytes, advice));
}
KSMU_EXPORT ssize_t process_madvise(int pidfd, const iovec* vectors, size_t count, int advice, unsigned flags) noexcept {
  return Answer(DoProcessMadvise(pidfd, vectors, count, advice, flags));
}

KSMU_EXPORT int mlock(const void* at, size_t bytes) noexcept { return AnswerInt(DoLock(SYS_mlock, L(at), static_cast<long>(bytes), 0)); }
KSMU_EXPORT int mlock2(const void* at, size_t bytes, unsigned flags) noexcept {
  return AnswerInt(DoLock(SYS_mlock2, L(at), static_cast<long>(bytes), static_cast<long>(flags)));
}
KSMU_EXPORT int mlockall(int flags) noexcept { return AnswerInt(DoLock(SYS_mlockall, flags, 0, 0)); }
KSMU_EXPORT int munlock(const void* at, size_t bytes) noexcept { return AnswerInt(DoUnlock(SYS_munlock, L(at), static_cast<long>(bytes))); }
KSMU_EXPORT int munlockall() noexcept { return AnswerInt(DoUnlock(SYS_munlockall, 0, 0)); }

KSMU_EXPORT void* shmat(int id, const void* at, int flags) noexcept { return AnswerAddress(DoShmat(id, at, flags)); }

KSMU_EXPORT int prctl(int option, ...) noexcept {
  va_list arguments;
  va_start(arguments, option);
  const unsigned long a = va_arg(arguments, unsigned long), b = va_arg(arguments, unsigned long),
                      c = va_arg(arguments, unsigned long), d = va_arg(arguments, unsigned long);
  va_end(arguments);
  return AnswerInt(DoPrctl(option, a, b, c, d));
}

KSMU_EXPORT int ioctl(int fd, unsigned long request, ...) noexcept {
  va_list arguments;
  va_start(arguments, request);
  void* const argument = va_arg(arguments, void*);
  va_end(arguments);
  if (request == UFFDIO_REGISTER && Active()) return AnswerInt(DoRegister(fd, static_cast<uffdio_register*>(argument)));
  if (g_next.ioctl) return g_next.ioctl(fd, request, argument);
  return AnswerInt(Direct(SYS_ioctl, fd, static_cast<long>(request), L(argument)));
}

// Memory that is about to be a thread's stack: what the kernel writes there when the thread exits cannot wait at a gate.
KSMU_EXPORT int pthread_attr_setstack(pthread_attr_t* attributes, void* at, size_t bytes) noexcept {
  if (Active()) {
    const Span span{reinterpret_cast<Address>(at), bytes};
    g_seen.Set(span, Seen::kRefused);
    if (Concerns(at, bytes)) TakenOut stack(span, true);
  }
  return g_next.setstack ? g_next.setstack(attributes, at, bytes) : ENOSYS;
}

// fork without its handlers.
KSMU_EXPORT pid_t _Fork() noexcept {
  const auto plain = [] { return g_next._Fork ? g_next._Fork() : static_cast<pid_t>(Answer(Direct(SYS_clone, SIGCHLD))); };
  if (!Active()) return plain();
  const int saved = errno;
  const bool held = ksmushim_fork_prepare();
  const pid_t pid = plain();
  if (pid == 0) {
    ksmushim_fork_child();
    AutoInChild();
  } else if (held) {
    ksmushim_fork_parent();
  }
  if (pid >= 0) errno = saved;
  return pid;
}

// A child with memory of its own is made without handlers, too.
KSMU_EXPORT int clone(int (*run)(void*), void* stack, int flags, void* argument, ...) noexcept {
  va_list arguments;
  va_start(arguments, argument);
  void* const parent_tid = va_arg(arguments, void*);
  void* const tls = va_arg(arguments, void*);
  void* const child_tid = va_arg(arguments, void*);
  va_end(arguments);
  if (!g_next.clone) {
    errno = ENOSYS;
    return -1;
  }
  if (!Active() || SharesMemory(static_cast<unsigned long>(flags))) {
    return g_next.clone(run, stack, flags, argument, parent_tid, tls, child_tid);
  }
  const bool held = ksmushim_state() == KSMU_SHIM_RUNNING && ksmushim_fork_prepare();
  CloneStart start{run, argument};
  const int pid = g_next.clone(&StartOfClone, stack, flags, &start, parent_tid, tls, child_tid);
  if (held) ksmushim_fork_parent();
  return pid;
}

// Programs and runtimes that make their system calls by number.
KSMU_EXPORT long syscall(long number, ...) noexcept {
  va_list arguments;
  va_start(arguments, number);
  long a[6];
  for (long& argument : a) argument = va_arg(arguments, long);
  va_end(arguments);
  void* const at = reinterpret_cast<void*>(a[0]);
  const auto bytes = static_cast<size_t>(a[1]);
  const auto n = [&](int i) { return static_cast<int>(a[i]); };
  switch (number) {
    case SYS_mmap: return Answer(DoMmap(at, bytes, n(2), n(3), n(4), a[5]));
    case SYS_munmap: return Answer(DoMunmap(at, bytes));
    case SYS_mremap: return Answer(DoMremap(at, bytes, static_cast<size_t>(a[2]), n(3), reinterpret_cast<void*>(a[4])));
    case SYS_mprotect: return Answer(DoMprotect(at, bytes, n(2), -1, false));
    case SYS_pkey_mprotect: return Answer(DoMprotect(at, bytes, n(2), n(3), true));
    case SYS_madvise: return Answer(DoMadvise(at, bytes, n(2)));
    case SYS_process_madvise:
      return Answer(DoProcessMadvise(n(0), reinterpret_cast<void*>(a[1]), static_cast<size_t>(a[2]), n(3), static_cast<unsigned>(a[4])));
    case SYS_mlock: return Answer(DoLock(SYS_mlock, a[0], a[1], 0));
    case SYS_mlock2: return Answer(DoLock(SYS_mlock2, a[0], a[1], a[2]));
    case SYS_mlockall: return Answer(DoLock(SYS_mlockall, a[0], 0, 0));
    case SYS_munlock: return Answer(DoUnlock(SYS_munlock, a[0], a[1]));
    case SYS_munlockall: return Answer(DoUnlock(SYS_munlockall, 0, 0));
    case SYS_mbind: return Answer(Active() ? DoOnRange(SYS_mbind, a) : Direct(SYS_mbind, a[0], a[1], a[2], a[3], a[4], a[5]));
    case SYS_shmat: return Answer(DoShmat(n(0), reinterpret_cast<void*>(a[1]), n(2)));
    case SYS_prctl:
      return Answer(DoPrctl(n(0), static_cast<unsigned long>(a[1]), static_cast<unsigned long>(a[2]),
                            static_cast<unsigned long>(a[3]), static_cast<unsigned long>(a[4])));
    case SYS_seccomp: {
      const auto kernel = [&] { return Direct(SYS_seccomp, a[0], a[1], a[2]); };
      return Answer(a[0] == SECCOMP_SET_MODE_STRICT ? kernel() : WithoutMerges(kernel));  // as PR_SET_SECCOMP's
    }
#ifdef SYS_fork
    case SYS_fork: return Answer(RawChild([] { return Direct(SYS_fork); }));
#endif
    case SYS_clone:
      if (SharesMemory(static_cast<unsigned long>(a[0]))) return Answer(Direct(number, a[0], a[1], a[2], a[3], a[4], a[5]));
      return Answer(RawChild([&] { return Direct(SYS_clone, a[0], a[1], a[2], a[3], a[4]); }));
    case SYS_clone3: {
      unsigned long flags;
      if (!ReadProgram(at, &flags, sizeof flags) || SharesMemory(flags)) return Answer(Direct(number, a[0], a[1], a[2], a[3], a[4], a[5]));
      return Answer(RawChild([&] { return Direct(SYS_clone3, a[0], a[1]); }));
    }
    case SYS_ioctl:
      if (static_cast<unsigned long>(a[1]) == UFFDIO_REGISTER && Active()) {
        return Answer(DoRegister(n(0), reinterpret_cast<uffdio_register*>(a[2])));
      }
      [[fallthrough]];
    default: return Answer(Direct(number, a[0], a[1], a[2], a[3], a[4], a[5]));
  }
}

}  // extern "C"
