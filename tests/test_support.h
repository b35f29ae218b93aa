// Helpers shared by the black-box tests: those that know only the public C interface and the kernel.
//
// The library is one per process, and a bug of ours is most likely a thread that nobody woke. So each such test runs
// its body in a forked child: a fresh instance of the library, and a hang becomes a failure that shows where every
// thread of every process of the test stands in the kernel.
#pragma once

#include <ksmu/ksmu.h>

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace ksmu::test {

// True when the program is built with AddressSanitizer or ThreadSanitizer: their shadow memory and interceptors exclude
// some tests (address space limits, huge sparse mappings) and slow down all.
extern const bool kSanitized;

enum class Needs { kNothing, kUserfaultfd };

// Runs the body in a forked child process, in a process group of its own, with a time limit (longer under a sanitizer).
// Failures and skips of the child become the calling test's. What is left of the group afterwards is killed. Call it as
// the last statement of a TEST. Needs::kUserfaultfd skips where the kernel or our rights do not allow userfaultfd.
void RunIsolated(const std::function<void()>& body, int seconds = 60, Needs needs = Needs::kUserfaultfd);

#define KSMU_ISOLATED_TEST(suite, name, seconds)                                   \
  static void suite##_##name##_Body();                                             \
  TEST(suite, name) { ::ksmu::test::RunIsolated(suite##_##name##_Body, seconds); } \
  static void suite##_##name##_Body()

// Why userfaultfd with handling of kernel-mode faults cannot be had here; empty if it can.
std::string WhyNoUserfaultfd();

// For each process of the group: each thread's name, state, wait channel, system call and kernel stack.
std::string DescribeProcessGroup(pid_t group);

// Polls until the condition holds or the time is up; returns whether it holds.
bool WaitUntil(const std::function<bool()>& condition, double seconds, double poll_seconds = 0.005);
double Now();                       // monotonic, in seconds
void SleepSeconds(double seconds);  // not shortened by signals

// --- processes ---------------------------------------------------------------------------------------------------

// A child process of a test body. The body runs with `Report`, which may be called in any child, however it was made
// (it uses no lock and no heap); a report fails the test.
class Child {
 public:
  enum class Kind { kFork, kRawClone, kForkWithoutHandlers };  // fork(), the bare system call, _Fork()
  using Body = std::function<void(Child& self)>;

  Child(Kind kind, const Body& body);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  // In the child: notes a failure (printf-like). The first few hundred bytes are kept.
  void Report(const char* format, ...) __attribute__((format(printf, 2, 3)));
  // Steps that let parent and child take turns: Signal raises the number, Await waits until it is at least that.
  // Await returns false after `seconds`.
  void Signal(int step);
  bool Await(int step, double seconds = 20);
  // In the parent: waits for the end, adds a failure for reports, a non-zero exit or a signal. Returns true if all is
  // well.
  bool Join(double seconds = 30);
  // In the parent: true if nothing has been reported so far; else the reports become a failure.
  bool ExpectNoReports();
  pid_t pid() const { return pid_; }
  // The caller has waited for it.
  void Forget() { joined_ = true; }

 private:
  struct Shared;
  Shared* shared_;
  pid_t pid_ = -1;
  bool joined_ = false;
};

// --- memory ------------------------------------------------------------------------------------------------------

std::size_t PageSize();

// A private anonymous mapping of `pages` pages, read-write, without transparent huge pages, unmapped (KSMU_RELEASE,
// then munmap) at the end of its life. `gap`: inaccessible pages around it keep neighbours from growing together.
class Memory {
 public:
  // `aligned` to so many bytes, a power of two; the page's size at least.
  explicit Memory(std::size_t pages, int extra_mmap_flags = 0, std::size_t aligned = 1);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return data_; }
  std::size_t pages() const { return pages_; }
  std::size_t bytes() const { return pages_ * PageSize(); }
  char* page(std::size_t i) const { return data_ + i * PageSize(); }
  // The mapping has been dealt with by the test.
  void Forget() { data_ = nullptr; }

 private:
  char* whole_;
  char* data_;
  std::size_t pages_;
  std::size_t whole_bytes_;
  std::size_t before_;  // of that, in front of data_
};

// Contents are functions of a seed; seed 0 is all zeros. Different seeds give pages that differ in most bytes.
void FillPage(void* page, std::uint64_t seed);
// The offset of the first wrong byte, or -1. Async-signal-safe.
std::ptrdiff_t FindWrongByte(const void* page, std::uint64_t seed);
::testing::AssertionResult PageIs(const void* page, std::uint64_t seed);
// All pages of the memory: page i has content seed_of(i).
void FillPages(const Memory& memory, const std::function<std::uint64_t(std::size_t)>& seed_of);
::testing::AssertionResult PagesAre(const Memory& memory, const std::function<std::uint64_t(std::size_t)>& seed_of);

// Pages of the range that the kernel holds for the process, by pagemap: present or swapped, without the zero page.
std::size_t CountResident(const void* start, std::size_t bytes);
// False where the kernel has no shared zero page for anonymous memory (s390 with storage keys, some virtual machines): there
// reading memory that was never touched takes memory.
bool KernelHasZeroPage();
// Fields of smaps_rollup and status, in bytes; -1 if unreadable.
std::int64_t ReadPss();
std::int64_t ReadStatusKilobytes(const char* field);
std::string ReadFile(const std::string& path);
bool WriteFile(const std::string& path, std::string_view text);

// A setting of the whole machine, given back whatever happens to the test.
class Sysctl {
 public:
  Sysctl(const char* path, const char* value) : path_(path), old_(ReadFile(path)) { set_ = !old_.empty() && WriteFile(path_, value); }
  ~Sysctl() {
    if (set_ && !WriteFile(path_, old_)) ADD_FAILURE() << path_ << " could not be restored to " << old_;
  }
  Sysctl(const Sysctl&) = delete;
  Sysctl& operator=(const Sysctl&) = delete;
  bool set() const { return set_; }

 private:
  const char* path_;
  std::string old_;
  bool set_ = false;
};

// --- the library --------------------------------------------------------------------------------------------------

// ksmu_get / ksmu_set that fail the test on error.
std::int64_t Get(const char* name);
void Set(const char* name, std::int64_t value);
// "-1 with errno E" as an assertion that prints ksmu_last_error() when it does not hold.
::testing::AssertionResult FailsWith(std::int64_t result, int expected_errno);
::testing::AssertionResult Succeeds(std::int64_t result);

#define EXPECT_ERRNO(expected, call) EXPECT_TRUE(::ksmu::test::FailsWith((errno = 0, (call)), expected)) << #call
#define EXPECT_OK(call) EXPECT_TRUE(::ksmu::test::Succeeds((errno = 0, (call)))) << #call
#define ASSERT_OK(call) ASSERT_TRUE(::ksmu::test::Succeeds((errno = 0, (call)))) << #call

}  // namespace ksmu::test
