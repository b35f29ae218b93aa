// A worker of the stress test: it owns pages in every region and does to them whatever a program can do to its memory.
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "stress_state.h"
#include "test_support.h"

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

namespace ksmu::stress {
namespace {

class WorkerThread {
 public:
  WorkerThread(int slot, int owner)
      : slot_(slot), owner_(owner), random_(g.options.seed * 1000 + static_cast<std::uint64_t>(owner) * 17 +
                                            static_cast<std::uint64_t>(g.phase.name)) {}
  void Run();

 private:
  // Pages [first, first + count) of one region, all ours, none in use by the ring unless said.
  struct Choice {
    Region* region;
    std::size_t first, count;
  };
  Choice Choose(std::size_t most);
  void OneStep();
  void Expect(const Choice& c, std::size_t k, std::size_t pattern, std::size_t value, Op op);
  std::size_t PatternFor(std::size_t page) {
    if (random_.OneIn(12)) return 0;
    const std::size_t half = kPatterns / 2;  // 12: some runs, and some that differ from them in the last bytes
    return 1 + page % kBlock % half + (random_.OneIn(3) ? half : 0);
  }
  bool CheckAll(const Choice& c, const char* when);
  bool Touched(const Choice& c) const;  // a page is pinned or busy

  void WriteWord(const Choice& c);
  void Fill(const Choice& c);
  void Same(const Choice& c);
  void Discard(const Choice& c);
  void ReadPipe(const Choice& c);
  void ReadDirect(const Choice& c);
  void VmWrite(const Choice& c);
  void ProcMem(const Choice& c);
  void Protect(const Choice& c);
  void Remap(const Choice& c);
  void Unadvise(const Choice& c);
  void MakeChild(bool raw_clone);
  [[noreturn]] void ChildMain(bool raw_clone, bool seen);

  void OpenDescriptors();
  void CloseDescriptors();
  void RingStep();
  bool RingSubmit(int fd, std::size_t page_in_buffer, std::uint64_t offset);
  int RingWait();

  const int slot_, owner_;
  Random random_;
  double window_until_ = 0, next_fork_ = 0;
  std::size_t window_ = 0;
  int pipe_[2] = {-1, -1}, ring_pipe_[2] = {-1, -1}, mem_ = -1;
  io_uring ring_ = {};
  bool have_ring_ = false, registered_ = false, in_flight_ = false;
  Choice buffer_ = {};
  std::size_t flight_page_ = 0, flight_pattern_ = 0;
  int uses_left_ = 0;
};

WorkerThread::Choice WorkerThread::Choose(std::size_t most) {
  // A window of one sixteenth moves over the worker's blocks: what it has left lies still for a while.
  const std::size_t blocks = g.options.pages / kBlock / static_cast<std::size_t>(g.options.threads);
  const std::size_t window = std::max<std::size_t>(1, blocks / 16);
  if (Now() > window_until_) {
    window_ = random_.Below(blocks);
    window_until_ = Now() + 0.02 * static_cast<double>(1 + random_.Below(12));
  }
  const std::size_t mine = (window_ + random_.Below(window)) % blocks;
  const std::size_t block = mine * static_cast<std::size_t>(g.options.threads) + static_cast<std::size_t>(owner_);
  const std::size_t in_block = random_.Below(kBlock);
  Choice c;
  c.region = &g.regions[random_.Below(g.regions.size())];
  c.first = block * kBlock + in_block;
  c.count = 1 + random_.Below(std::min(most, kBlock - in_block));
  return c;
}

bool WorkerThread::Touched(const Choice& c) const {
  for (std::size_t i = c.first; i < c.first + c.count; ++i) {
    if (c.region->pages[i].pinned || c.region->pages[i].busy) return true;
  }
  return false;
}

void WorkerThread::Expect(const Choice& c, std::size_t k, std::size_t pattern, std::size_t value, Op op) {
  Page& page = c.region->pages[c.first + k];
  page.pattern = static_cast<std::uint8_t>(pattern);
  page.value = static_cast<std::uint8_t>(value);
  Note(*c.region, c.first + k, op, c.first, c.count);
}

bool WorkerThread::CheckAll(const Choice& c, const char* when) {
  bool good = true;
  for (std::size_t i = c.first; i < c.first + c.count; ++i) good = Check(*c.region, i, when) && good;
  return good;
}

void WorkerThread::WriteWord(const Choice& c) {
  for (std::size_t k = 0; k < c.count; ++k) {
    Page& page = c.region->pages[c.first + k];
    const std::size_t value = random_.OneIn(2) ? 0 : random_.Below(3);
    std::uint64_t word;
    memcpy(&word, g.pattern(page.pattern) + WordOffset(owner_), 8);
    word ^= value;
    memcpy(PageAt(*c.region, c.first + k) + WordOffset(owner_), &word, 8);
    Expect(c, k, page.pattern, value, Op::kWord);
  }
}

void WorkerThread::Fill(const Choice& c) {
  for (std::size_t k = 0; k < c.count; ++k) {
    const std::size_t pattern = PatternFor(c.first + k);
    memcpy(PageAt(*c.region, c.first + k), g.pattern(pattern), g.page_size);
    Expect(c, k, pattern, 0, Op::kFill);
  }
}

void WorkerThread::Same(const Choice& c) {
  for (std::size_t k = 0; k < c.count; ++k) {
    volatile unsigned char* byte = PageAt(*c.region, c.first + k) + random_.Below(g.page_size);
    *byte = *byte;
    Note(*c.region, c.first + k, Op::kSame, c.first, c.count);
  }
}

void WorkerThread::Discard(const Choice& c) {
  const std::size_t bytes = c.count * g.page_size;
  unsigned char* start = PageAt(*c.region, c.first);
  const bool raw = c.region->raw_discards() && !random_.OneIn(8);
  const int result = raw ? madvise(start, bytes, MADV_DONTNEED) : ksmu_advise(start, bytes, KSMU_DISCARD);
  if (result != 0) {
    if (!raw && errno == EAGAIN && !g.library_on.load()) return;  // being stopped: nothing was done
    return Fail("%s discard: %s", raw ? "raw" : "seen", strerror(errno));
  }
  for (std::size_t k = 0; k < c.count; ++k) Expect(c, k, 0, 0, raw ? Op::kDiscard : Op::kSeenDiscard);
  if (random_.OneIn(2)) CheckAll(c, "right after a discard");
  // Most get contents again soon: zero pages do not merge into frames.
  if (!random_.OneIn(4)) Fill(c);
}

void WorkerThread::ReadPipe(const Choice& c) {
  const std::size_t pattern = PatternFor(c.first);
  if (write(pipe_[1], g.pattern(pattern), g.page_size) != static_cast<ssize_t>(g.page_size)) {
    return Fail("write to a pipe: %s", strerror(errno));
  }
  unsigned char* to = PageAt(*c.region, c.first);
  for (std::size_t done = 0; done < g.page_size;) {
    const ssize_t got = read(pipe_[0], to + done, g.page_size - done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return Fail("read(2) into %s memory: %s", KindName(c.region->kind), got < 0 ? strerror(errno) : "end");
    done += static_cast<std::size_t>(got);
  }
  Expect(c, 0, pattern, 0, Op::kPipe);
  Check(*c.region, c.first, "right after read(2)");
}

void WorkerThread::ReadDirect(const Choice& c) {
  if (g.direct_file < 0) return;
  const std::size_t first = random_.Below(kPatterns - c.count);
  const ssize_t want = static_cast<ssize_t>(c.count * g.page_size);
  const ssize_t got = pread(g.direct_file, PageAt(*c.region, c.first), static_cast<std::size_t>(want),
                            static_cast<off_t>(first * g.page_size));
  if (got != want) return Fail("O_DIRECT read into %s memory: %zd: %s", KindName(c.region->kind), got, strerror(errno));
  for (std::size_t k = 0; k < c.count; ++k) Expect(c, k, first + k, 0, Op::kDirect);
  CheckAll(c, "right after an O_DIRECT read");
}

void WorkerThread::VmWrite(const Choice& c) {
  iovec from[kBlock], to[kBlock];
  std::size_t patterns[kBlock];
  for (std::size_t k = 0; k < c.count; ++k) {
    patterns[k] = PatternFor(c.first + k);
    from[k] = {const_cast<unsigned char*>(g.pattern(patterns[k])), g.page_size};
    to[k] = {PageAt(*c.region, c.first + k), g.page_size};
  }
  const ssize_t want = static_cast<ssize_t>(c.count * g.page_size);
  const ssize_t wrote = process_vm_writev(getpid(), from, c.count, to, c.count, 0);
  if (wrote != want) return Fail("process_vm_writev into %s memory: %zd: %s", KindName(c.region->kind), wrote, strerror(errno));
  for (std::size_t k = 0; k < c.count; ++k) Expect(c, k, patterns[k], 0, Op::kVmWrite);
  CheckAll(c, "right after process_vm_writev");
}

void WorkerThread::ProcMem(const Choice& c) {
  const std::size_t pattern = PatternFor(c.first);
  const off_t at = static_cast<off_t>(reinterpret_cast<std::uintptr_t>(PageAt(*c.region, c.first)));
  const ssize_t wrote = pwrite(mem_, g.pattern(pattern), g.page_size, at);
  if (wrote < 0 && errno == EIO) {
    // A documented limit: the kernel does not wait at a gate, nor for a synchronous break, here. Nothing is written.
    g.tally.proc_mem_refused.fetch_add(1);
    Check(*c.region, c.first, "after a refused write to /proc/self/mem");
    return;
  }
  if (wrote != static_cast<ssize_t>(g.page_size)) return Fail("write to /proc/self/mem: %zd: %s", wrote, strerror(errno));
  Expect(c, 0, pattern, 0, Op::kProcMem);
  Check(*c.region, c.first, "right after a write to /proc/self/mem");
}

void WorkerThread::Protect(const Choice& c) {
  unsigned char* start = PageAt(*c.region, c.first);
  const std::size_t bytes = c.count * g.page_size;
  const bool none = random_.OneIn(2);
  if (mprotect(start, bytes, none ? PROT_NONE : PROT_READ) != 0) return Fail("mprotect: %s", strerror(errno));
  for (std::size_t k = 0; k < c.count; ++k) Note(*c.region, c.first + k, Op::kProtect, c.first, c.count);
  if (!none) CheckAll(c, "read-only");
  if (random_.OneIn(3)) test::SleepSeconds(0.0003);
  if (g.phase.descriptors) {
    // The kernel respects the protection like the CPU does: it has to be in force, whatever happened meanwhile.
    if (none) {
      const ssize_t wrote = write(pipe_[1], start, g.page_size);
      if (wrote >= 0 || errno != EFAULT) Fail("PROT_NONE was undone in %s memory: write(2) took %zd bytes from page %zu", KindName(c.region->kind), wrote, c.first);
      unsigned char drain[65536];
      for (ssize_t left = wrote; left > 0;) left -= std::max<ssize_t>(1, read(pipe_[0], drain, sizeof drain));
    } else {
      if (write(pipe_[1], "x", 1) != 1) Fail("write to a pipe: %s", strerror(errno));
      const ssize_t got = read(pipe_[0], start, 1);
      if (got >= 0 || errno != EFAULT) {
        Fail("PROT_READ was undone in %s memory: read(2) wrote page %zu (%zd)", KindName(c.region->kind), c.first, got);
        memcpy(start, g.pattern(c.region->pages[c.first].pattern), 1);
      } else {
        char drain;
        if (read(pipe_[0], &drain, 1) != 1) Fail("read from a pipe: %s", strerror(errno));
      }
    }
  }
  if (mprotect(start, bytes, PROT_READ | PROT_WRITE) != 0) return Fail("mprotect back: %s", strerror(errno));
  CheckAll(c, "after mprotect back");
}

// What a program does that gives memory back and takes new memory at the same place.
void WorkerThread::Remap(const Choice& c) {
  unsigned char* start = PageAt(*c.region, c.first);
  const std::size_t bytes = c.count * g.page_size;
  if (ksmu_advise(start, bytes, KSMU_RELEASE) != 0) {
    if (errno == EAGAIN && !g.library_on.load()) return;  // being stopped: the memory is not ours to replace
    return Fail("KSMU_RELEASE: %s: %s", strerror(errno), ksmu_last_error());
  }
  if (mmap(start, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != start) {
    return Fail("mmap over released memory: %s", strerror(errno));
  }
  for (std::size_t k = 0; k < c.count; ++k) Expect(c, k, 0, 0, Op::kRemap);
  CheckAll(c, "right after mmap over released memory");
  Fill(c);
  Advise(*c.region, c.first, c.count);
}

void WorkerThread::Unadvise(const Choice& c) {
  if (ksmu_advise(PageAt(*c.region, c.first), c.count * g.page_size, KSMU_UNMERGEABLE) != 0 && g.library_on.load()) {
    return Fail("KSMU_UNMERGEABLE: %s: %s", strerror(errno), ksmu_last_error());
  }
  for (std::size_t k = 0; k < c.count; ++k) Note(*c.region, c.first + k, Op::kUnadvise, c.first, c.count);
  CheckAll(c, "right after KSMU_UNMERGEABLE");
  Advise(*c.region, c.first, c.count);
}

// --- children ----------------------------------------------------------------------------------------------------

// Everything of ours as it was at the fork, writes and discards of our own, and nothing of the parent's.
void WorkerThread::ChildMain(bool raw_clone, bool seen) {
  const auto verify = [&](int code) {
    for (std::size_t r = 0; r < g.regions.size(); ++r) {
      for (std::size_t i = 0; i < g.options.pages; ++i) {
        if (OwnerOf(i) != owner_ || IsRight(g.regions[r], i)) continue;
        char line[160];
        const int n = snprintf(line, sizeof line, "in a %s child, step %d: region %s page %zu is wrong (pattern %d expected, %s)\n",
                               raw_clone ? "cloned" : "forked", code, KindName(g.regions[r].kind), i,
                               g.regions[r].pages[i].pattern,
                               memcmp(PageAt(g.regions[r], i), g.pattern(0), g.page_size) == 0 ? "zeros seen" : "not zeros");
        if (write(2, line, static_cast<std::size_t>(n)) < 0) _exit(99);
        _exit(10 * code + static_cast<int>(r));
      }
    }
  };
  verify(1);
  for (int n = 0; n < 12; ++n) {
    Choice c = Choose(4);
    if (Touched(c)) continue;
    for (std::size_t k = 0; k < c.count; ++k) {
      memcpy(PageAt(*c.region, c.first + k), g.pattern(1), g.page_size);
      c.region->pages[c.first + k].pattern = 1;
      c.region->pages[c.first + k].value = 0;
    }
  }
  verify(2);
  for (int n = 0; n < 12; ++n) {
    Choice c = Choose(4);
    if (Touched(c) || (!seen && !c.region->raw_discards())) continue;
    unsigned char* start = PageAt(*c.region, c.first);
    const std::size_t bytes = c.count * g.page_size;
    if ((seen ? ksmu_advise(start, bytes, KSMU_DISCARD) : madvise(start, bytes, MADV_DONTNEED)) != 0) {
      if (seen && errno == EAGAIN) continue;  // forked while the library was being stopped
      _exit(90);
    }
    for (std::size_t k = 0; k < c.count; ++k) {
      c.region->pages[c.first + k].pattern = 0;
      c.region->pages[c.first + k].value = 0;
    }
  }
  verify(3);
  _exit(0);
}

void WorkerThread::MakeChild(bool raw_clone) {
  // A seen discard in a child starts an engine there. GCC 12's sanitizers cannot start threads in a forked child: locks of
  // their own may have been held by other threads at the fork, and stay held for ever.
  const bool seen = !raw_clone && !test::kSanitized && random_.OneIn(3);
  const Op op = raw_clone ? Op::kClone : Op::kFork;
  Step(slot_, op);
  const pid_t child = raw_clone ? static_cast<pid_t>(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)) : fork();
  if (child == 0) ChildMain(raw_clone, seen);
  if (child < 0) return Fail("no child: %s", strerror(errno));
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    Fail("a %s child (%s discards) ended with %s %d", raw_clone ? "cloned" : "forked", seen ? "seen" : "raw",
         WIFSIGNALED(status) ? "signal" : "status", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
  }
  g.tally.children.fetch_add(1);
}

// --- io_uring ------------------------------------------------------------------------------------------------------

bool WorkerThread::RingSubmit(int fd, std::size_t page_in_buffer, std::uint64_t offset) {
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
  if (sqe == nullptr) return false;
  io_uring_prep_read_fixed(sqe, fd, PageAt(*buffer_.region, buffer_.first + page_in_buffer), static_cast<unsigned>(g.page_size),
                           offset, 0);
  int result;
  while ((result = io_uring_submit(&ring_)) == -EINTR) {
  }
  if (result != 1) Fail("io_uring_submit: %d", result);
  return result == 1;
}

int WorkerThread::RingWait() {
  io_uring_cqe* cqe = nullptr;
  int result;
  while ((result = io_uring_wait_cqe(&ring_, &cqe)) == -EINTR) {
  }
  if (result != 0) return result;
  const int got = cqe->res;
  io_uring_cqe_seen(&ring_, cqe);
  return got;
}

void WorkerThread::RingStep() {
  if (!have_ring_) return;
  if (in_flight_) {
    // The read that has been waiting in the kernel since some steps ago gets its data now.
    Step(slot_, Op::kRingComplete);
    if (write(ring_pipe_[1], g.pattern(flight_pattern_), g.page_size) != static_cast<ssize_t>(g.page_size)) {
      return Fail("write to a pipe: %s", strerror(errno));
    }
    const int got = RingWait();
    in_flight_ = false;
    buffer_.region->pages[buffer_.first + flight_page_].busy = 0;
    if (got != static_cast<int>(g.page_size)) return Fail("fixed read from a pipe: %d", got);
    Expect(buffer_, flight_page_, flight_pattern_, 0, Op::kRingComplete);
    Check(*buffer_.region, buffer_.first + flight_page_, "right after a fixed read that had waited");
    return;
  }
  if (!registered_) {
    buffer_ = Choose(4);
    const iovec buffer = {PageAt(*buffer_.region, buffer_.first), buffer_.count * g.page_size};
    if (const int r = io_uring_register_buffers(&ring_, &buffer, 1); r != 0) {
      if (r == -ENOMEM) return;  // RLIMIT_MEMLOCK
      return Fail("io_uring_register_buffers on %s memory: %s", KindName(buffer_.region->kind), strerror(-r));
    }
    registered_ = true;
    uses_left_ = static_cast<int>(2 + random_.Below(10));
    g.tally.ring_registers.fetch_add(1);
    for (std::size_t k = 0; k < buffer_.count; ++k) {
      buffer_.region->pages[buffer_.first + k].pinned = 1;
      Note(*buffer_.region, buffer_.first + k, Op::kRing, buffer_.first, buffer_.count);
    }
    CheckAll(buffer_, "right after io_uring_register_buffers");
    return;
  }
  if (uses_left_-- == 0) {
    CheckAll(buffer_, "before io_uring_unregister_buffers");
    for (std::size_t k = 0; k < buffer_.count; ++k) buffer_.region->pages[buffer_.first + k].pinned = 0;
    io_uring_unregister_buffers(&ring_);
    registered_ = false;
    return;
  }
  const std::size_t k = random_.Below(buffer_.count);
  if (g.direct_file >= 0 && random_.OneIn(2)) {
    const std::size_t pattern = random_.Below(kPatterns);
    if (!RingSubmit(g.direct_file, k, pattern * g.page_size)) return;
    if (const int got = RingWait(); got != static_cast<int>(g.page_size)) return Fail("fixed read from a file: %d", got);
    Expect(buffer_, k, pattern, 0, Op::kRing);
    Check(*buffer_.region, buffer_.first + k, "right after a fixed read");
    return;
  }
  flight_page_ = k;
  flight_pattern_ = PatternFor(buffer_.first + k);
  if (!RingSubmit(ring_pipe_[0], k, 0)) return;
  Note(*buffer_.region, buffer_.first + k, Op::kRingSubmit, buffer_.first + k, 1);
  buffer_.region->pages[buffer_.first + k].busy = 1;
  in_flight_ = true;
}

// --- the loop ------------------------------------------------------------------------------------------------------

void WorkerThread::OpenDescriptors() {
  if (!g.phase.descriptors) return;
  if (pipe2(pipe_, O_CLOEXEC) != 0 || pipe2(ring_pipe_, O_CLOEXEC) != 0) return Fail("pipe: %s", strerror(errno));
  mem_ = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
  if (mem_ < 0) Fail("/proc/self/mem: %s", strerror(errno));
  if (!g.phase.pins || !g.ring_works.load()) return;
  const int r = io_uring_queue_init(4, &ring_, 0);
  have_ring_ = r == 0;
  if (r != 0) {
    g.ring_works.store(false);
    g.why_no_ring = strerror(-r);
  }
}

void WorkerThread::CloseDescriptors() {
  if (!g.phase.descriptors) return;
  if (in_flight_) RingStep();
  if (registered_) {
    for (std::size_t k = 0; k < buffer_.count; ++k) buffer_.region->pages[buffer_.first + k].pinned = 0;
    io_uring_unregister_buffers(&ring_);
    registered_ = false;
  }
  if (have_ring_) io_uring_queue_exit(&ring_);
  have_ring_ = false;
  for (int fd : {pipe_[0], pipe_[1], ring_pipe_[0], ring_pipe_[1], mem_}) close(fd);
}

void WorkerThread::OneStep() {
  struct Weight {
    Op op;
    int weight;
    bool needs_descriptors, pins;
  };
  static constexpr Weight kWeights[] = {
      {Op::kCheck, 300, false, false},   {Op::kWord, 200, false, false},  {Op::kFill, 120, false, false},
      {Op::kSame, 60, false, false},     {Op::kDiscard, 60, false, false}, {Op::kPipe, 60, true, false},
      {Op::kDirect, 12, true, true},     {Op::kVmWrite, 40, false, true},  {Op::kProcMem, 30, true, false},
      {Op::kProtect, 20, false, false},  {Op::kRing, 40, true, true},      {Op::kRemap, 5, false, false},
      {Op::kUnadvise, 3, false, false},  {Op::kExplain, 5, false, false},  {Op::kPageOut, 20, false, false},
  };
  int total = 0;
  for (const Weight& w : kWeights) total += w.weight;
  int draw = static_cast<int>(random_.Below(static_cast<std::size_t>(total)));
  const Weight* chosen = kWeights;
  while (draw >= chosen->weight) draw -= (chosen++)->weight;
  if (chosen->needs_descriptors && !g.phase.descriptors) return;
  if (chosen->pins && !g.phase.pins) return;
  if (g.options.Without(OpName(chosen->op))) return;
  Step(slot_, chosen->op);
  if (chosen->op == Op::kRing) return RingStep();
  Choice c = Choose(chosen->op == Op::kPipe || chosen->op == Op::kProcMem ? 1 : kBlock);
  if (Touched(c)) {
    // A page with a registered buffer may be read and written like any other, unless a read into it is under way.
    const bool stores = chosen->op == Op::kWord || chosen->op == Op::kFill || chosen->op == Op::kCheck || chosen->op == Op::kPipe;
    bool busy = false;
    for (std::size_t i = c.first; i < c.first + c.count; ++i) busy = busy || c.region->pages[i].busy;
    if (!stores || busy) return;
  }
  switch (chosen->op) {
    case Op::kCheck: CheckAll(c, "at a read"); break;
    case Op::kWord: WriteWord(c); break;
    case Op::kFill: Fill(c); break;
    case Op::kSame: Same(c); break;
    case Op::kDiscard: Discard(c); break;
    case Op::kPipe: ReadPipe(c); break;
    case Op::kDirect: ReadDirect(c); break;
    case Op::kVmWrite: VmWrite(c); break;
    case Op::kProcMem: ProcMem(c); break;
    case Op::kProtect: Protect(c); break;
    case Op::kRemap: Remap(c); break;
    case Op::kUnadvise: Unadvise(c); break;
    case Op::kExplain: {
      ksmu_page_info info;
      if (ksmu_explain(PageAt(*c.region, c.first), &info, sizeof info) != 0) Fail("ksmu_explain: %s", strerror(errno));
      break;
    }
    case Op::kPageOut:
      if (g.options.zram && madvise(PageAt(*c.region, c.first), c.count * g.page_size, MADV_PAGEOUT) == 0) {
        g.tally.swapped_out.fetch_add(c.count);
        for (std::size_t k = 0; k < c.count; ++k) Note(*c.region, c.first + k, Op::kPageOut, c.first, c.count);
      }
      break;
    default: break;
  }
}

void WorkerThread::Run() {
  OpenDescriptors();
  next_fork_ = Now() + 0.3 * static_cast<double>(1 + owner_);
  for (std::uint64_t n = 0; !g.stop.load(); ++n) {
    OneStep();
    if (Now() > next_fork_ && g.library_on.load() && !g.options.Without("fork")) {
      MakeChild(random_.OneIn(2));
      next_fork_ = Now() + 0.3 + 0.1 * static_cast<double>(random_.Below(20));
    }
    if (n % 48 == 0) test::SleepSeconds(0.0004);
  }
  CloseDescriptors();
  for (Region& r : g.regions) {
    for (std::size_t i = 0; i < g.options.pages; ++i) {
      if (OwnerOf(i) == owner_) Check(r, i, "at the end of the phase");
    }
    Step(slot_, Op::kCheck);
  }
}

}  // namespace

void Worker(int slot, int owner) { WorkerThread(slot, owner).Run(); }

}  // namespace ksmu::stress
