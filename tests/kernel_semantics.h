// What the kernel-semantics tests share: contexts with any set of features, scratch memory, threads that may block.
//
// Each test states one fact about Linux that the protocol leans on. They use the same thin wrappers as the library
// (os/uffd.h), and no policy of it: a kernel that differs fails here, by name, and not as a wrong byte somewhere above.
#pragma once

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "os/os.h"
#include "os/pagemap.h"
#include "os/pool_file.h"
#include "os/raw.h"
#include "os/uapi.h"
#include "os/uffd.h"

namespace ksmu::os {

inline const std::size_t kPage = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));

// The feature sets of the library's contexts (linux_system.cc), without EVENT_FORK unless a test adds it.
inline constexpr std::uint64_t kTrackerFeatures = uapi::kFeatureWpAsync | uapi::kFeatureWpUnpopulated |
                                                  uapi::kFeaturePagefaultFlagWp | uapi::kFeatureWpHugetlbfsShmem;
inline constexpr std::uint64_t kGateFeatures =
    uapi::kFeatureMove | uapi::kFeaturePagefaultFlagWp | uapi::kFeatureEventRemove;
inline constexpr std::uint64_t kStagingFeatures = uapi::kFeatureMove;
inline constexpr std::uint64_t kSyncBreakerFeatures = uapi::kFeatureWpHugetlbfsShmem | uapi::kFeatureMinorShmem |
                                                      uapi::kFeatureEventRemove | uapi::kFeatureEventRemap |
                                                      uapi::kFeaturePagefaultFlagWp;
inline constexpr std::uint64_t kBreakerFeatures = kSyncBreakerFeatures | uapi::kFeatureWpAsync;

inline void SleepMilliseconds(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

inline bool WaitFor(const std::function<bool()>& condition, int ms = 20000) {
  for (auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(ms);
       std::chrono::steady_clock::now() < end;) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return condition();
}

// One userfaultfd, closed at the end: that wakes whoever still waits.
class Uffd {
 public:
  explicit Uffd(std::uint64_t features, bool user_mode_only = false) {
    uffd::Door door;
    fd_ = uffd::Open(user_mode_only, user_mode_only, &door);
    if (fd_ < 0) {
      enabled_ = fd_;
    } else {
      enabled_ = uffd::Enable(fd_, features);
    }
  }
  Uffd(const Uffd&) = delete;
  Uffd& operator=(const Uffd&) = delete;
  ~Uffd() {
    if (fd_ >= 0) close(fd_);
  }
  int fd() const { return fd_; }
  int enabled() const { return enabled_; }  // 0, or why not
  int Register(Span span, std::uint32_t modes) { return uffd::Register(fd_, span, modes); }
  int Protect(Span span, bool protect = true) { return uffd::WriteProtect(fd_, span, protect); }
  // One message, waiting for it; nothing after `ms`.
  std::optional<uffd_msg> Next(int ms = 20000) {
    uffd_msg message;
    for (auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(ms);;) {
      if (uffd::Read(fd_, &message, 1) == 1) return message;
      if (std::chrono::steady_clock::now() >= end) return std::nullopt;
      pollfd ready{fd_, POLLIN, 0};
      poll(&ready, 1, 20);
    }
  }
  bool HasMessage() {
    pollfd ready{fd_, POLLIN, 0};
    return poll(&ready, 1, 0) == 1 && (ready.revents & POLLIN);
  }

 private:
  int fd_ = -1;
  int enabled_ = 0;
};

// A memory file whose page i is filled with the word (i + 1) * 1000.
class FrameFile {
 public:
  explicit FrameFile(std::size_t pages) {
    EXPECT_EQ(CreatePoolFile(pages * kPage, &file_), 0);
    std::vector<std::uint64_t> words(kPage / sizeof(std::uint64_t));
    for (std::size_t i = 0; i < pages; ++i) {
      for (auto& word : words) word = Word(i);
      EXPECT_EQ(pwrite(file_.fd, words.data(), kPage, static_cast<off_t>(i * kPage)), static_cast<ssize_t>(kPage));
    }
  }
  FrameFile(const FrameFile&) = delete;
  FrameFile& operator=(const FrameFile&) = delete;
  ~FrameFile() { close(file_.fd); }
  static std::uint64_t Word(std::size_t page) { return (page + 1) * 1000; }
  std::uint64_t Stored(std::size_t page) const {
    std::uint64_t word = ~std::uint64_t{0};
    EXPECT_EQ(pread(file_.fd, &word, sizeof word, static_cast<off_t>(page * kPage)), static_cast<ssize_t>(sizeof word));
    return word;
  }
  const File& file() const { return file_; }
  int fd() const { return file_.fd; }

 private:
  File file_;
};

// A private mapping, between two inaccessible pages so that it never joins a neighbour.
class Memory {
 public:
  explicit Memory(std::size_t pages, const FrameFile* frames = nullptr, std::size_t first_frame = 0) : pages_(pages) {
    std::uintptr_t around = 0;
    EXPECT_EQ(raw::Mmap(0, (pages + 2) * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0, &around),
              0);
    start_ = around + kPage;
    std::uintptr_t placed = 0;
    int flags = MAP_PRIVATE | MAP_FIXED | (frames ? MAP_NORESERVE : MAP_ANONYMOUS);
    EXPECT_EQ(raw::Mmap(start_, pages * kPage, PROT_READ | PROT_WRITE, flags, frames ? frames->fd() : -1,
                        first_frame * kPage, &placed),
              0);
    madvise(Pointer(0), pages * kPage, MADV_NOHUGEPAGE);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { syscall(SYS_munmap, start_ - kPage, (pages_ + 2) * kPage); }

  Address at(std::size_t page) const { return start_ + page * kPage; }
  void* Pointer(std::size_t page) const { return reinterpret_cast<void*>(at(page)); }
  volatile std::uint64_t& Word(std::size_t page) const { return *reinterpret_cast<volatile std::uint64_t*>(at(page)); }
  Span span(std::size_t page, std::size_t count) const { return {at(page), count * kPage}; }
  Span all() const { return span(0, pages_); }
  void Touch(std::size_t page) const { [[maybe_unused]] std::uint64_t read = Word(page); }
  void Fill() const {
    for (std::size_t i = 0; i < pages_; ++i) Word(i) = FrameFile::Word(i);
  }

 private:
  std::size_t pages_;
  Address start_ = 0;
};

// A thread that does something which may wait. Joined at the end: whatever it waits for has to be gone by then.
class Worker {
 public:
  explicit Worker(std::function<void()> work)
      : thread_([this, work = std::move(work)] {
          thread_id_ = static_cast<int>(syscall(SYS_gettid));
          work();
          done_ = true;
        }) {}
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() { Join(); }
  void Join() {
    if (thread_.joinable()) thread_.join();
  }
  bool done() const { return done_; }
  bool FinishesIn(int ms) const {
    return WaitFor([this] { return done(); }, ms);
  }
  // Still waiting after a time in which it would long have finished.
  bool StillWaits() const {
    SleepMilliseconds(50);
    return !done();
  }

 private:
  std::atomic<bool> done_{false};
  std::atomic<int> thread_id_{0};
  std::thread thread_;
};

// Reads a context's messages on a thread of its own, for calls that wait until their event has been read.
class EventReader {
 public:
  explicit EventReader(Uffd& context)
      : context_(context), thread_([this] {
          while (!stop_) {
            auto message = context_.Next(20);
            if (!message) continue;
            std::lock_guard hold(mutex_);
            messages_.push_back(*message);
          }
        }) {}
  ~EventReader() { Stop(); }
  std::vector<uffd_msg> Stop() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
    return messages_;
  }

 private:
  Uffd& context_;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::vector<uffd_msg> messages_;
  std::thread thread_;
};

inline std::string WhyNoUserfaultfdHere() {
  uffd::Door door;
  int fd = uffd::Open(false, false, &door);
  if (fd < 0) return std::string("userfaultfd is not permitted here: ") + std::strerror(-fd);
  std::uint64_t features = 0;
  uffd::QueryFeatures(fd, &features);
  close(fd);
  constexpr std::uint64_t kAll = kTrackerFeatures | kGateFeatures | kBreakerFeatures;
  if ((features & kAll) != kAll) return "this kernel's userfaultfd lacks features (Linux 6.8 is needed)";
  return {};
}

class KernelTest : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kAllCategories =
      kWpAllowed | kWritten | kFile | kPresent | kSwapped | kPfnZero | kHuge;

  void SetUp() override {
    if (std::string why = WhyNoUserfaultfdHere(); !why.empty()) GTEST_SKIP() << why;
    ASSERT_EQ(pagemap_.Open(kPage), 0);
    // A kernel that differs may well leave a thread waiting: end the program then, by the name of the test.
    static std::string name;
    name = std::string("still waiting after 60 seconds: ") +
           ::testing::UnitTest::GetInstance()->current_test_info()->name() + "\n";
    signal(SIGALRM, [](int) {
      (void)!write(2, name.data(), name.size());
      _exit(1);
    });
    alarm(60);
  }
  void TearDown() override {
    alarm(0);
    pagemap_.Close();
  }

  // Those of WRITTEN, FILE, PRESENT, SWAPPED, PFNZERO that hold for one page.
  std::uint32_t Look(Address page) {
    ScanRequest request;
    request.any_of = kPresent | kSwapped | kWritten | kFile | kWpAllowed;
    request.returned = kWritten | kFile | kPresent | kSwapped | kPfnZero;
    PageRun run{};
    ScanResult result = pagemap_.Scan({page, kPage}, request, &run, 1);
    EXPECT_EQ(result.error, 0);
    return result.runs ? run.categories : 0;
  }
  // The written pages of a span, as offsets from `start`, protected again.
  std::vector<std::size_t> TakeWritten(Span span) {
    ScanRequest request;
    request.required = kWritten;
    request.returned = kWritten;
    request.write_protect = true;
    PageRun runs[64];
    ScanResult result = pagemap_.Scan(span, request, runs, 64);
    EXPECT_EQ(result.error, 0);
    EXPECT_EQ(result.walked_to, span.end());
    std::vector<std::size_t> pages;
    for (std::size_t i = 0; i < result.runs; ++i) {
      for (Address at = runs[i].start; at < runs[i].end; at += kPage) pages.push_back((at - span.start) / kPage);
    }
    return pages;
  }
  Sharing SharingOf(Address page) {
    Sharing sharing = Sharing::kAbsent;
    EXPECT_EQ(pagemap_.ReadSharing(page, &sharing, 1), 0);
    return sharing;
  }
  // Fills a private mapping of frames as a merge does: registered with the breaker, mapped write-protected.
  void Merge(Uffd& breaker, const Memory& memory, Span span) {
    (void)memory;
    ASSERT_EQ(breaker.Register(span, kMissing | kWriteProtect | kMinor), 0);
    Partial filled = uffd::Continue(breaker.fd(), span, true);
    ASSERT_EQ(filled.error, 0);
    ASSERT_EQ(filled.done, span.bytes);
  }
  // madvise(MADV_DONTNEED) as another thread of the program does it, its event read.
  void DiscardAsProgram(Uffd& context, Span span) {
    Worker discard([span] { madvise(reinterpret_cast<void*>(span.start), span.bytes, MADV_DONTNEED); });
    auto message = context.Next();
    ASSERT_TRUE(message);
    EXPECT_EQ(message->event, UFFD_EVENT_REMOVE);
    EXPECT_EQ(message->arg.remove.start, span.start);
    EXPECT_EQ(message->arg.remove.end, span.end());
  }

  Pagemap pagemap_;
};

// Forks in the middle of a multi-threaded test: the child only makes system calls. Exits with the body's result.
template <typename Body>
pid_t ForkRaw(Body body) {
  pid_t child = static_cast<pid_t>(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
  if (child == 0) _exit(body());
  return child;
}
inline int ExitOf(pid_t child) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

}  // namespace ksmu::os
