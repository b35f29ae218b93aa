#include "os/thread.h"

#include <fcntl.h>
#include <link.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <time.h>

#include <algorithm>
#include <climits>
#include <cstring>

#include "base/own_memory.h"
#include "os/mappings.h"
#include "os/own_place.h"
#include "os/pool_file.h"
#include "os/process.h"
#include "os/raw.h"

namespace ksmu::os {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;

// What the C library takes out of a thread's stack for the thread variables of the program and of its libraries.
std::size_t ThreadVariableBytes() {
  // Asked for once, by the first thread that starts one of ours, which is the program's: whoever holds the dynamic
  // linker's lock may be waiting for our threads later. Libraries that are loaded later have their variables elsewhere.
  static std::atomic<std::size_t> known{0};
  std::size_t bytes = known.load(std::memory_order_relaxed);
  if (bytes) return bytes;
  dl_iterate_phdr(
      [](dl_phdr_info* object, std::size_t, void* sum) {
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const auto& header = object->dlpi_phdr[i];
          if (header.p_type == PT_TLS) *static_cast<std::size_t*>(sum) += header.p_memsz + header.p_align;
        }
        return 0;
      },
      &bytes);
  constexpr std::size_t kUnit = 64 * 1024;
  bytes = (bytes / kUnit + 1) * kUnit;  // and what the C library adds: thread descriptor, room for late libraries
  known.store(bytes, std::memory_order_relaxed);
  return bytes;
}

// Stacks of the library's own threads, apart from the program's mappings (own_place.h says why). A forked child has them too:
// libc's list of threads goes through them there.
struct OwnStack {
  std::atomic<void*> base{nullptr};
  std::size_t bytes = 0;
  pthread_t thread{};
};
OwnStack g_stacks[16];

// One of them, with an inaccessible page at its low end; nullptr: libc's own choice has to do.
OwnStack* MakeStack(std::size_t bytes) {
  if (LastingPlace(0) == 0) return nullptr;
  const std::size_t page = SystemPageSize();
  for (OwnStack& stack : g_stacks) {
    void* none = nullptr;
    if (!stack.base.compare_exchange_strong(none, &stack)) continue;
    void* const base = base::MapInheritedPages(bytes);
    if (base && raw::OnRange(SYS_mprotect, reinterpret_cast<Address>(base), page, PROT_NONE) == 0) {
      stack.bytes = bytes;
      stack.base.store(base, std::memory_order_release);
      return &stack;
    }
    if (base) raw::Munmap(reinterpret_cast<Address>(base), bytes);
    stack.base.store(nullptr);
    return nullptr;
  }
  return nullptr;
}
void DropStack(OwnStack* stack) {
  raw::Munmap(reinterpret_cast<Address>(stack->base.load()), stack->bytes);
  stack->base.store(nullptr, std::memory_order_release);
}

}  // namespace

const char* WhyNoThread(int error) {
  switch (error) {
    case -EAGAIN:
      return "no thread could be started: RLIMIT_NPROC, the cgroup's pids.max, or memory or address space (RLIMIT_AS, "
             "mlockall) is exhausted";
    case -ENOMEM:
      return "no thread could be started: no memory";
    case -EINVAL:
      return "no thread could be started: the C library finds a stack of 256 KiB and the program's thread_local variables "
             "too small";
    default:
      return "no thread could be started: clone(2) is refused, by a seccomp filter most likely";
  }
}

int StartThread(pthread_t* thread, void* (*body)(void*), void* argument) {
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  const std::size_t bytes = kStackBytes + ThreadVariableBytes();  // whole units of own memory
  OwnStack* const stack = MakeStack(bytes);
  if (stack) {
    pthread_attr_setstack(&attributes, static_cast<char*>(stack->base.load()) + SystemPageSize(), bytes - SystemPageSize());
  } else {
    pthread_attr_setstacksize(&attributes, bytes);
  }
  pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
  pthread_attr_setschedpolicy(&attributes, SCHED_OTHER);
  const int error = pthread_create(thread, &attributes, body, argument);
  pthread_attr_destroy(&attributes);
  if (stack && error) DropStack(stack);
  if (stack && !error) stack->thread = *thread;
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  return -error;
}

void JoinThread(pthread_t thread) {
  pthread_join(thread, nullptr);
  for (OwnStack& stack : g_stacks) {
    if (stack.base.load(std::memory_order_acquire) && pthread_equal(stack.thread, thread)) return DropStack(&stack);
  }
}

void NameThisThread(const char* name) { prctl(PR_SET_NAME, name, 0, 0, 0); }

int PinThisThread(const char* cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (!cpus) {
    // All CPUs: the kernel leaves out those that the process's cpuset does not have.
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) CPU_SET(cpu, &set);
  } else {
    std::string_view text(cpus);
    do {
      std::uint64_t first, last;
      if (!TakeDecimal(&text, &first)) return -EINVAL;
      last = first;
      if (TakePrefix(&text, "-") && !TakeDecimal(&text, &last)) return -EINVAL;
      if (last < first || last >= CPU_SETSIZE) return -EINVAL;
      for (std::uint64_t cpu = first; cpu <= last; ++cpu) CPU_SET(cpu, &set);
    } while (TakePrefix(&text, ","));
    if (!text.empty()) return -EINVAL;
  }
  return sched_setaffinity(0, sizeof set, &set) == 0 ? 0 : -errno;
}

void SetThisThreadNice(int nice) { setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), nice); }

int FutexWait(const std::atomic<std::uint32_t>* word, std::uint32_t expected, std::int64_t timeout_ns) {
  timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  const long result = syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, timeout_ns < 0 ? nullptr : &timeout, nullptr, 0);
  return result == 0 ? 0 : -errno;
}

void FutexWake(const std::atomic<std::uint32_t>* word, int count) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

std::uint64_t BlockSignals() {
  std::uint64_t all = ~std::uint64_t{0}, old = 0;
  for (const int own : {SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGSYS}) all &= ~(std::uint64_t{1} << (own - 1));
  raw::Direct(SYS_rt_sigprocmask, SIG_SETMASK, reinterpret_cast<long>(&all), reinterpret_cast<long>(&old), sizeof all);
  return old;
}
void RestoreSignals(std::uint64_t mask) {
  raw::Direct(SYS_rt_sigprocmask, SIG_SETMASK, reinterpret_cast<long>(&mask), 0, sizeof mask);
}

void YieldThread() { sched_yield(); }

int ProcessId() { return static_cast<int>(syscall(SYS_getpid)); }

std::size_t SystemPageSize() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

std::uint64_t Entropy() {
  std::uint64_t seed = 0;
  if (getrandom(&seed, sizeof seed, GRND_NONBLOCK) != sizeof seed) {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = static_cast<std::uint64_t>(now.tv_nsec) * 0x9E3779B97F4A7C15ull ^ static_cast<std::uint64_t>(now.tv_sec);
  }
  return seed;
}

void KernelRelease(char* text, std::size_t capacity) {
  utsname name{};
  uname(&name);
  const std::size_t length = std::min(std::strlen(name.release), capacity - 1);
  std::memcpy(text, name.release, length);
  text[length] = 0;
}

}  // namespace ksmu::os
