// What is done to the page that the library has in its hands.
#include <ksmu/ksmu.h>

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "race_case.h"
#include "test_support.h"

namespace ksmu::race {
namespace {

unsigned char* Scratch(Case& c, std::uint64_t seed) {
  static thread_local unsigned char buffer[65536];
  FillContent(buffer, c.page_size(), seed);
  return buffer;
}

// --- loads and stores --------------------------------------------------------------------------------------------

void Write(Case& c) {
  const unsigned char* content = Scratch(c, 501);
  c.AllowOld(c.subject());
  memcpy(c.shadow(c.subject()) + 128, content, 64);
  memcpy(c.subject_page() + 128, content, 64);
  c.EndOld(c.subject());
  c.CheckPage(c.subject(), "right after the write");
}

void WriteNothingNew(Case& c) {
  volatile unsigned char* byte = c.subject_page() + 64;
  *byte = c.shadow(c.subject())[64];
  c.CheckPage(c.subject(), "right after the write");
}

void Read(Case& c) { c.CheckAll("read at the point"); }

// --- writes by the kernel ----------------------------------------------------------------------------------------

void ReadFromPipe(Case& c) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return c.Fail("pipe: %s", strerror(errno));
  const unsigned char* content = Scratch(c, 502);
  if (write(ends[1], content, c.page_size()) != static_cast<ssize_t>(c.page_size())) c.Fail("write to a pipe");
  const ssize_t got = read(ends[0], c.subject_page(), c.page_size());
  if (got != static_cast<ssize_t>(c.page_size())) c.Fail("read(2) returned %zd: %s", got, strerror(errno));
  if (got > 0) memcpy(c.shadow(c.subject()), content, static_cast<std::size_t>(got));
  close(ends[0]);
  close(ends[1]);
  c.CheckPage(c.subject(), "right after read(2)");
}

void ProcessVmWrite(Case& c) {
  unsigned char* content = Scratch(c, 503);
  iovec from = {content, 700}, to = {c.subject_page() + 300, 700};
  const ssize_t wrote = process_vm_writev(getpid(), &from, 1, &to, 1, 0);
  if (wrote != 700) c.Fail("process_vm_writev returned %zd: %s", wrote, strerror(errno));
  if (wrote > 0) memcpy(c.shadow(c.subject()) + 300, content, static_cast<std::size_t>(wrote));
  c.CheckPage(c.subject(), "right after process_vm_writev");
}

void ProcMemWrite(Case& c) {
  const int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
  if (fd < 0) return c.Fail("/proc/self/mem: %s", strerror(errno));
  const unsigned char* content = Scratch(c, 504);
  const ssize_t wrote = pwrite(fd, content, 900, static_cast<off_t>(reinterpret_cast<std::uintptr_t>(c.subject_page() + 1000)));
  // The kernel does not wait here: behind a shut gate, and under a synchronous break, it says EIO and writes nothing.
  const bool may_fail = c.gate_shut() || c.mode() == Mode::kSync;
  if (wrote != 900 && !(may_fail && wrote < 0 && errno == EIO)) c.Fail("/proc/self/mem: %zd: %s", wrote, strerror(errno));
  if (wrote > 0) memcpy(c.shadow(c.subject()) + 1000, content, static_cast<std::size_t>(wrote));
  close(fd);
  c.CheckPage(c.subject(), "right after the write to /proc/self/mem");
}

// --- discards ----------------------------------------------------------------------------------------------------

bool DiscardRaw(Case& c) {
  c.AllowOld(c.subject());
  memset(c.shadow(c.subject()), 0, c.page_size());
  const int result = madvise(c.subject_page(), c.page_size(), MADV_DONTNEED);
  c.EndOld(c.subject());
  if (result != 0) c.Fail("MADV_DONTNEED: %s", strerror(errno));
  return result == 0;
}

void RawDiscard(Case& c) { DiscardRaw(c); }
void RawDiscardThenRead(Case& c) {
  if (DiscardRaw(c)) c.CheckPage(c.subject(), "right after MADV_DONTNEED");
}
void RawDiscardThenWrite(Case& c) {
  if (DiscardRaw(c)) Write(c);
}
void RawDiscardOfAll(Case& c) {
  for (std::size_t i = 0; i < Case::kPages; ++i) {
    c.AllowOld(i);
    memset(c.shadow(i), 0, c.page_size());
  }
  const int result = madvise(c.memory(), c.bytes(), MADV_DONTNEED);
  for (std::size_t i = 0; i < Case::kPages; ++i) c.EndOld(i);
  if (result != 0) c.Fail("MADV_DONTNEED: %s", strerror(errno));
  c.CheckAll("right after MADV_DONTNEED");
}

void SeenDiscard(Case& c) {
  c.AllowOld(c.subject());
  memset(c.shadow(c.subject()), 0, c.page_size());
  const int result = ksmu_advise(c.subject_page(), c.page_size(), KSMU_DISCARD);
  c.EndOld(c.subject());
  if (result != 0) return c.Fail("KSMU_DISCARD: %s: %s", strerror(errno), ksmu_last_error());
  c.CheckPage(c.subject(), "right after KSMU_DISCARD");
}

// --- memory that goes away: what comes to lie there next belongs to somebody else ---------------------------------

void MapStranger(Case& c, std::size_t first, std::size_t pages) {
  void* p = mmap(c.page(first), pages * c.page_size(), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (p != c.page(first)) {
    if (p != MAP_FAILED) munmap(p, pages * c.page_size());
    for (std::size_t i = first; i < first + pages; ++i) c.SetUnreadable(i, true);
    return c.Fail("the addresses are not free: %s", strerror(errno));
  }
  for (std::size_t i = first; i < first + pages; ++i) {
    FillContent(c.page(i), c.page_size(), 600 + i);
    FillContent(c.shadow(i), c.page_size(), 600 + i);
    c.SetUnreadable(i, false);
  }
}

void Release(Case& c) {
  c.SetUnreadable(c.subject(), true);
  if (ksmu_advise(c.subject_page(), c.page_size(), KSMU_RELEASE) != 0) {
    c.Fail("KSMU_RELEASE: %s: %s", strerror(errno), ksmu_last_error());
  }
  if (munmap(c.subject_page(), c.page_size()) != 0) c.Fail("munmap: %s", strerror(errno));
  MapStranger(c, c.subject(), 1);
}

void UnmapPage(Case& c) {
  c.SetUnreadable(c.subject(), true);
  if (ksmu_unmap(c.subject_page(), c.page_size()) != 0) return c.Fail("ksmu_unmap: %s: %s", strerror(errno), ksmu_last_error());
  MapStranger(c, c.subject(), 1);
}

void UnmapAll(Case& c) {
  for (std::size_t i = 0; i < Case::kPages; ++i) c.SetUnreadable(i, true);
  if (ksmu_unmap(c.memory(), c.bytes()) != 0) return c.Fail("ksmu_unmap: %s: %s", strerror(errno), ksmu_last_error());
  MapStranger(c, 0, Case::kPages);
}

void Unadvise(Case& c) {
  const std::size_t first = c.subject() - 2;
  if (ksmu_advise(c.page(first), 5 * c.page_size(), KSMU_UNMERGEABLE) != 0) {
    c.Fail("KSMU_UNMERGEABLE: %s: %s", strerror(errno), ksmu_last_error());
  }
  c.CheckAll("right after KSMU_UNMERGEABLE");
}

// --- children ----------------------------------------------------------------------------------------------------

enum class Discard { kNone, kRaw, kSeen };

void MakeChild(Case& c, bool raw_clone, Discard discard) {
  const pid_t child = raw_clone ? static_cast<pid_t>(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)) : fork();
  if (child == 0) {
    const char* who = raw_clone ? "in the cloned child" : "in the forked child";
    bool good = c.CheckAll(who);
    FillContent(c.shadow(c.subject()), c.page_size(), 700);
    FillContent(c.subject_page(), c.page_size(), 700);
    good = c.CheckPage(c.subject(), "written in the child") && good;
    if (discard != Discard::kNone) {
      for (std::size_t i : {c.subject(), Case::kFirst + 1, Case::kThird + 2}) {
        const int result = discard == Discard::kRaw ? madvise(c.page(i), c.page_size(), MADV_DONTNEED)
                                                    : ksmu_advise(c.page(i), c.page_size(), KSMU_DISCARD);
        if (result != 0) c.Fail("discard in the child: %s: %s", strerror(errno), ksmu_last_error());
        memset(c.shadow(i), 0, c.page_size());
        good = c.CheckPage(i, "discarded in the child") && good;
      }
      good = c.CheckAll("in the child, after its discards") && good;
    }
    _exit(good ? 0 : 1);
  }
  if (child < 0) return c.Fail("no child: %s", strerror(errno));
  c.ActorPhase(kWaiting);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  c.ActorPhase(kActing);
  if (WIFSIGNALED(status)) c.Fail("the child died of signal %d", WTERMSIG(status));
  if (WIFEXITED(status) && WEXITSTATUS(status) > 1) c.Fail("the child ended with %d", WEXITSTATUS(status));
  c.CheckAll("in the parent, after its child");
}

void Fork(Case& c) { MakeChild(c, false, Discard::kNone); }
void ForkSeen(Case& c) { MakeChild(c, false, Discard::kSeen); }
void ForkRaw(Case& c) { MakeChild(c, false, Discard::kRaw); }
void Clone(Case& c) { MakeChild(c, true, Discard::kNone); }
void CloneRaw(Case& c) { MakeChild(c, true, Discard::kRaw); }

// --- pins --------------------------------------------------------------------------------------------------------

struct Pin {
  io_uring ring;
  int ends[2];
  bool ready = false;
};

void PreparePin(Case& c) {
  Pin* pin = new Pin;
  c.data = pin;
  if (const int r = io_uring_queue_init(4, &pin->ring, 0); r != 0) return c.Skip("no io_uring: %s", strerror(-r));
  // Not open while the point is being reached: a ring in the process alone keeps broken pages from being merged again.
  io_uring_queue_exit(&pin->ring);
  if (pipe2(pin->ends, O_CLOEXEC) != 0) c.Fail("pipe: %s", strerror(errno));
}

void FixedRead(Case& c, std::uint64_t seed, const char* when) {
  Pin* pin = static_cast<Pin*>(c.data);
  const unsigned char* content = Scratch(c, seed);
  if (write(pin->ends[1], content, c.page_size()) != static_cast<ssize_t>(c.page_size())) c.Fail("write to a pipe");
  io_uring_sqe* sqe = io_uring_get_sqe(&pin->ring);
  io_uring_prep_read_fixed(sqe, pin->ends[0], c.subject_page(), static_cast<unsigned>(c.page_size()), 0, 0);
  io_uring_cqe* cqe = nullptr;
  int result = 0;
  do {
    result = io_uring_submit_and_wait(&pin->ring, 1);
  } while (result == -EINTR);
  if (io_uring_peek_cqe(&pin->ring, &cqe) != 0) return c.Fail("io_uring: %d", result);
  const int got = cqe->res;
  io_uring_cqe_seen(&pin->ring, cqe);
  if (got != static_cast<int>(c.page_size())) c.Fail("%s: fixed read: %s", when, got < 0 ? strerror(-got) : "short");
  if (got > 0) memcpy(c.shadow(c.subject()), content, static_cast<std::size_t>(got));
  c.CheckPage(c.subject(), when);
}

void TakePin(Case& c) {
  Pin* pin = static_cast<Pin*>(c.data);
  const iovec buffer = {c.subject_page(), c.page_size()};
  if (const int r = io_uring_queue_init(4, &pin->ring, 0); r != 0) return c.Fail("io_uring: %s", strerror(-r));
  if (const int r = io_uring_register_buffers(&pin->ring, &buffer, 1); r != 0) {
    return c.Fail("io_uring_register_buffers: %s", strerror(-r));
  }
  pin->ready = true;
  FixedRead(c, 505, "right after a fixed read");
}

void UsePinAgain(Case& c) {
  Pin* pin = static_cast<Pin*>(c.data);
  if (!pin->ready) return;
  // The page is equal to others in the region now, and pinned: it must be left alone.
  memcpy(c.subject_page(), c.shadow(Case::kFirst), c.page_size());
  memcpy(c.shadow(c.subject()), c.shadow(Case::kFirst), c.page_size());
  c.Merge();
  FixedRead(c, 506, "fixed read after merging");
  c.Merge();
  FixedRead(c, 507, "fixed read after merging again");
  io_uring_queue_exit(&pin->ring);
}

// --- protection --------------------------------------------------------------------------------------------------

// "rw-p" of the mapping at the address; empty if there is none.
std::string Permissions(const void* address) {
  FILE* maps = fopen("/proc/self/maps", "re");
  if (maps == nullptr) return "?";
  std::string found;
  char line[512], permissions[8];
  unsigned long start, end;
  while (fgets(line, sizeof line, maps) != nullptr) {
    if (sscanf(line, "%lx-%lx %7s", &start, &end, permissions) != 3) continue;
    if (reinterpret_cast<std::uintptr_t>(address) >= start && reinterpret_cast<std::uintptr_t>(address) < end) found = permissions;
  }
  fclose(maps);
  return found;
}

void Protect(Case& c, int protection) {
  if (protection == PROT_NONE) c.SetUnreadable(c.subject(), true);
  if (mprotect(c.subject_page(), c.page_size(), protection) != 0) c.Fail("mprotect: %s", strerror(errno));
  if ((protection & PROT_READ) != 0) c.SetUnreadable(c.subject(), false);
}

void FlipReadOnly(Case& c) {
  Protect(c, PROT_READ);
  c.CheckPage(c.subject(), "read-only");
  Protect(c, PROT_READ | PROT_WRITE);
  Write(c);
}

void FlipNone(Case& c) {
  Protect(c, PROT_NONE);
  Protect(c, PROT_READ | PROT_WRITE);
  Write(c);
}

void HoldReadOnly(Case& c) {
  Protect(c, PROT_READ);
  c.CheckPage(c.subject(), "read-only");
}
void HoldNone(Case& c) { Protect(c, PROT_NONE); }

void EndHold(Case& c, const char* expected) {
  const std::string seen = Permissions(c.subject_page());
  // The last look at the mapping is before merge.attach, and no call attaches "unless the protection has changed": a raw
  // mprotect between the two is undone (docs/limits.md). The bytes are right all the same.
  if (seen != expected && c.point() != "merge.attach") c.Fail("mprotect was undone: the page is %s, not %s", seen.c_str(), expected);
  c.Merge();
  Protect(c, PROT_READ | PROT_WRITE);
  Write(c);
}
void EndHoldReadOnly(Case& c) { EndHold(c, "r--p"); }
void EndHoldNone(Case& c) { EndHold(c, "---p"); }

// Away and back again, a look at it in between.
void MoveRun(Case& c) {
  const auto start = c.control().address.load();
  const std::size_t first = (start - reinterpret_cast<std::uintptr_t>(c.memory())) / c.page_size();
  const std::size_t pages = c.control().bytes.load() / c.page_size();
  if (first >= Case::kPages || pages == 0 || first + pages > Case::kPages) return c.Fail("the point's run is no run");
  const std::size_t bytes = pages * c.page_size();
  void* away = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for (std::size_t i = first; i < first + pages; ++i) c.SetUnreadable(i, true);
  if (mremap(c.page(first), bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, away) == MAP_FAILED) {
    return c.Fail("mremap: %s", strerror(errno));
  }
  for (std::size_t i = 0; i < pages; ++i) {
    if (memcmp(static_cast<unsigned char*>(away) + i * c.page_size(), c.shadow(first + i), c.page_size()) != 0) {
      c.Fail("page %zu is wrong where it was moved to", first + i);
    }
  }
  // Where pages came to lie in mappings of their own, each goes back by itself.
  for (std::size_t i = 0; i < pages; ++i) {
    char* from = static_cast<char*>(away) + i * c.page_size();
    if (mremap(from, c.page_size(), c.page_size(), MREMAP_MAYMOVE | MREMAP_FIXED, c.page(first + i)) == MAP_FAILED) {
      return c.Fail("mremap back: %s", strerror(errno));
    }
  }
  for (std::size_t i = first; i < first + pages; ++i) c.SetUnreadable(i, false);
  c.CheckAll("moved back");
}

// --- the process around --------------------------------------------------------------------------------------------

std::atomic<int> g_signals{0};
volatile unsigned char* g_signal_byte = nullptr;
unsigned char g_sink;

void OnSignal(int) {
  if (g_signal_byte != nullptr) g_sink = *g_signal_byte;
  g_signals.fetch_add(1);
}

void PrepareSignal(Case&) {
  struct sigaction action = {};
  action.sa_handler = OnSignal;  // no SA_RESTART: calls end with EINTR
  sigaction(SIGUSR1, &action, nullptr);
}

void Signals(Case& c) {
  g_signal_byte = c.subject_page();
  for (int i = 0; i < 5; ++i) {
    pthread_kill(c.driver_thread(), SIGUSR1);
    kill(getpid(), SIGUSR1);
    raise(SIGUSR1);
  }
  c.CheckPage(c.subject(), "right after signals");
}

void EndSignals(Case& c) {
  if (g_signals.load() < 5) c.Fail("only %d signals were handled", g_signals.load());
}

constexpr int kOpened = 24;
int g_opened[kOpened];  // not always 3, 4, 5 ...: libc opens a file of its own for an instant when a thread first allocates

void CloseEverything(Case& c) {
  close_range(3, ~0U, 0);
  // The numbers are used again at once. Were one of them the library's, it would now work on these.
  for (int& fd : g_opened) {
    fd = memfd_create("reused", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, 8192) != 0 || pwrite(fd, "mine", 4, 4096) != 4) c.Fail("memfd: %s", strerror(errno));
  }
  c.CheckAll("after close_range");
}

void EndCloseEverything(Case& c) {
  for (const int fd : g_opened) {
    char text[5] = {};
    if (pread(fd, text, 4, 4096) != 4 || strcmp(text, "mine") != 0 || lseek(fd, 0, SEEK_END) != 8192) {
      char link[64], target[256] = "closed";
      snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
      const ssize_t n = readlink(link, target, sizeof target - 1);
      if (n >= 0) target[n] = 0;
      c.Fail("descriptor %d of the program is not what it was, but: %s", fd, target);
    }
  }
}

void Stop(Case& c) {
  c.set_stopped();
  if (ksmu_stop() != 0) c.Fail("ksmu_stop: %s: %s", strerror(errno), ksmu_last_error());
  c.CheckAll("after ksmu_stop at the point");
}

rlimit g_limit;

void LowerLimit(Case& c, __rlimit_resource what, rlim_t to) {
  getrlimit(what, &g_limit);
  const rlimit low = {to, g_limit.rlim_max};
  if (setrlimit(what, &low) != 0) c.Fail("setrlimit: %s", strerror(errno));
}
void NoAddressSpace(Case& c) {
  LowerLimit(c, RLIMIT_AS, static_cast<rlim_t>(test::ReadStatusKilobytes("VmSize")) * 1024);
}
void EndNoAddressSpace(Case&) { setrlimit(RLIMIT_AS, &g_limit); }
void PrepareNoAddressSpace(Case& c) {
  if (test::kSanitized) c.Skip("a sanitizer's shadow memory excludes RLIMIT_AS");
}
void NoDescriptors(Case& c) { LowerLimit(c, RLIMIT_NOFILE, 3); }
void EndNoDescriptors(Case&) { setrlimit(RLIMIT_NOFILE, &g_limit); }
void NoFileSize(Case& c) { LowerLimit(c, RLIMIT_FSIZE, 0); }
void EndNoFileSize(Case&) { setrlimit(RLIMIT_FSIZE, &g_limit); }

// --- threads that exit -------------------------------------------------------------------------------------------

void ThreadExits(Case& c) {
  std::thread([&c] {
    c.shadow(c.subject())[2000] ^= 0x0f;
    c.subject_page()[2000] = c.shadow(c.subject())[2000];
  }).join();
  c.CheckPage(c.subject(), "written by a thread that has exited");
}

// A thread whose exit word (set_tid_address) the kernel has to clear in the page in hand. It runs already when the point
// is reached, and its own bookkeeping lies elsewhere.
struct ExitWord {
  std::atomic<std::uint32_t*> word{nullptr};
  std::atomic<int> tid{0};
};

void* ExitWordMain(void* argument) {
  ExitWord* e = static_cast<ExitWord*>(argument);
  e->tid.store(static_cast<int>(syscall(SYS_gettid)));
  while (e->word.load() == nullptr) test::SleepSeconds(0.0002);
  syscall(SYS_set_tid_address, e->word.load());
  return nullptr;
}

void PrepareExitWord(Case& c) {
  ExitWord* e = new ExitWord;
  c.data = e;
  // Its stack is ours: libc would wait for the thread's own exit word before it frees one of its own.
  constexpr std::size_t kStack = 1 << 20;
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstack(&attributes, stack, kStack);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_t thread;
  if (const int r = pthread_create(&thread, &attributes, ExitWordMain, e); r != 0) c.Fail("pthread_create: %s", strerror(r));
  pthread_attr_destroy(&attributes);
  while (e->tid.load() == 0) test::SleepSeconds(0.0002);
}

void ExitWordCleared(Case& c) {
  ExitWord* e = static_cast<ExitWord*>(c.data);
  constexpr std::size_t kOffset = 256;
  c.SetUnreadable(c.subject(), true);  // nobody else judges it before the thread has gone
  e->word.store(reinterpret_cast<std::uint32_t*>(c.subject_page() + kOffset));
  const double end = Seconds() + 1.5;
  while (syscall(SYS_tgkill, getpid(), e->tid.load(), 0) == 0 && Seconds() < end) test::SleepSeconds(0.0002);
  if (Seconds() >= end) c.Fail("the thread has not gone");
  c.SetUnreadable(c.subject(), false);
  std::uint32_t seen = 0;
  memcpy(&seen, c.subject_page() + kOffset, sizeof seen);
  if (seen == 0) {
    memset(c.shadow(c.subject()) + kOffset, 0, sizeof seen);
  } else if (!c.gate_shut() && c.mode() != Mode::kSync) {
    // Behind a shut gate, and under a synchronous break, the kernel does not wait for such a word: docs/limits.md.
    c.Fail("the exiting thread's word was not cleared: %08x", seen);
  }
  c.CheckPage(c.subject(), "after a thread's exit");
}

bool RawAllowed(Mode mode) { return RawDiscardsAllowed(mode); }
bool OnlyMap(Mode mode) { return mode == Mode::kMap; }

}  // namespace

const std::vector<Disturbance>& Disturbances() {
  static const std::vector<Disturbance> disturbances = {
      {"write", Write, nullptr, nullptr, nullptr, false},
      {"write_same", WriteNothingNew, nullptr, nullptr, nullptr, false},
      {"read", Read, nullptr, nullptr, nullptr, false},
      {"read2", ReadFromPipe, nullptr, nullptr, nullptr, false},
      {"process_vm_writev", ProcessVmWrite, nullptr, nullptr, nullptr, false},
      {"proc_mem", ProcMemWrite, nullptr, nullptr, nullptr, false},
      {"discard_seen", SeenDiscard, nullptr, nullptr, nullptr, false},
      {"discard_raw", RawDiscard, nullptr, nullptr, RawAllowed, false},
      {"discard_raw_read", RawDiscardThenRead, nullptr, nullptr, RawAllowed, false},
      {"discard_raw_write", RawDiscardThenWrite, nullptr, nullptr, RawAllowed, false},
      {"discard_raw_all", RawDiscardOfAll, nullptr, nullptr, RawAllowed, false},
      {"release", Release, nullptr, nullptr, nullptr, false},
      {"unadvise", Unadvise, nullptr, nullptr, nullptr, false},
      {"unmap", UnmapPage, nullptr, nullptr, OnlyMap, false},
      {"unmap_all", UnmapAll, nullptr, nullptr, OnlyMap, false},
      {"fork", Fork, nullptr, nullptr, nullptr, false},
      {"fork_discard_seen", ForkSeen, nullptr, nullptr, nullptr, false},
      {"fork_discard_raw", ForkRaw, nullptr, nullptr, RawAllowed, false},
      {"clone", Clone, nullptr, nullptr, nullptr, false},
      {"clone_discard_raw", CloneRaw, nullptr, nullptr, RawAllowed, false},
      {"pin", TakePin, PreparePin, UsePinAgain, nullptr, false},
      {"protect_read", FlipReadOnly, nullptr, nullptr, nullptr, false},
      {"protect_none", FlipNone, nullptr, nullptr, nullptr, false},
      {"protect_read_held", HoldReadOnly, nullptr, EndHoldReadOnly, nullptr, false},
      {"protect_none_held", HoldNone, nullptr, EndHoldNone, nullptr, false},
      {"move", MoveRun, nullptr, nullptr, RawAllowed, false},
      {"signal", Signals, PrepareSignal, EndSignals, nullptr, false},
      {"close_range", CloseEverything, nullptr, EndCloseEverything, nullptr, false},
      {"stop", Stop, nullptr, nullptr, nullptr, false},
      {"no_address_space", NoAddressSpace, PrepareNoAddressSpace, EndNoAddressSpace, nullptr, true},
      {"no_descriptors", NoDescriptors, nullptr, EndNoDescriptors, nullptr, true},  // not with fork: docs/limits.md
      {"no_file_size", NoFileSize, nullptr, EndNoFileSize, nullptr, true},
      {"thread_exit", ThreadExits, nullptr, nullptr, nullptr, false},
      {"exit_word", ExitWordCleared, PrepareExitWord, nullptr, nullptr, false},
  };
  return disturbances;
}

}  // namespace ksmu::race
