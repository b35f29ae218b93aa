#include "test_support.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <sstream>
#include <vector>

#include "os/pagemap.h"

// Debian 12's headers are older than the kernels this runs on.
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef UFFD_FEATURE_MOVE
#define UFFD_FEATURE_MOVE (1 << 16)
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

namespace ksmu::test {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kBuiltSanitized = true;
#else
constexpr bool kBuiltSanitized = false;
#endif

constexpr int kSkipped = 77;

std::string ExitText(int status) {
  std::ostringstream out;
  if (WIFSIGNALED(status)) {
    out << "killed by signal " << WTERMSIG(status) << " (" << strsignal(WTERMSIG(status)) << ")";
  } else {
    out << "exit status " << WEXITSTATUS(status);
  }
  return out.str();
}

// Ends what is left of a group that RunIsolated started, and reaps our own child in it.
void EndGroup(pid_t group) {
  kill(-group, SIGKILL);
  kill(-group, SIGCONT);
}

// The body's messages of one kind, as the child's own gtest recorded them.
std::string SkipMessage() {
  const ::testing::TestResult* result = ::testing::UnitTest::GetInstance()->current_test_info()->result();
  for (int i = 0; i < result->total_part_count(); ++i) {
    if (result->GetTestPartResult(i).skipped()) return result->GetTestPartResult(i).message();
  }
  return "";
}

[[noreturn]] void RunBody(const std::function<void()>& body, int skip_pipe) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  int code = 0;
  try {
    body();
  } catch (const std::exception& e) {
    fprintf(stderr, "the body threw: %s\n", e.what());
    code = 2;
  } catch (...) {
    fprintf(stderr, "the body threw\n");
    code = 2;
  }
  const ::testing::TestResult* result = ::testing::UnitTest::GetInstance()->current_test_info()->result();
  if (result->Failed()) {
    code = 1;
  } else if (code == 0 && result->Skipped()) {
    const std::string message = SkipMessage();
    if (write(skip_pipe, message.data(), std::min<std::size_t>(message.size(), 4000)) < 0) code = 2;
    if (code == 0) code = kSkipped;
  }
  fflush(nullptr);
  _exit(code);
}

std::string Trimmed(std::string text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  return text;
}

// The mapping that holds an address, so that a user-space program counter says which library it is in.
std::string DescribeAddress(const std::string& process, std::uint64_t address) {
  std::ifstream maps(process + "/maps");
  std::string line;
  while (std::getline(maps, line)) {
    unsigned long start = 0, end = 0, offset = 0;
    char permissions[8] = "";
    int name_at = 0;
    if (sscanf(line.c_str(), "%lx-%lx %7s %lx %*s %*s %n", &start, &end, permissions, &offset, &name_at) < 4) continue;
    if (address < start || address >= end) continue;
    std::ostringstream out;
    out << line.substr(name_at) << "+0x" << std::hex << address - start + offset;
    return out.str();
  }
  return "?";
}

std::vector<std::string> Numbers(const std::string& directory) {
  std::vector<std::string> names;
  if (DIR* d = opendir(directory.c_str())) {
    while (dirent* e = readdir(d)) {
      if (e->d_name[0] >= '0' && e->d_name[0] <= '9') names.push_back(e->d_name);
    }
    closedir(d);
  }
  return names;
}

}  // namespace

const bool kSanitized = kBuiltSanitized;

std::string WhyNoUserfaultfd() {
  int fd = -1;
  if (int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC); device >= 0) {
    fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    close(device);
  }
  if (fd < 0) fd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  if (fd < 0) return std::string("userfaultfd is not permitted here: ") + strerror(errno);
  uffdio_api api = {};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_MOVE | UFFD_FEATURE_WP_ASYNC;
  const bool usable = ioctl(fd, UFFDIO_API, &api) == 0;
  close(fd);
  return usable ? ""
                : "the kernel's userfaultfd lacks UFFDIO_MOVE or asynchronous write protection (Linux >= 6.8 has them)";
}

std::string DescribeProcessGroup(pid_t group) {
  std::ostringstream out;
  for (const std::string& pid : Numbers("/proc")) {
    const std::string process = "/proc/" + pid;
    if (getpgid(std::stoi(pid)) != group) continue;
    out << "process " << pid << "\n";
    for (const std::string& tid : Numbers(process + "/task")) {
      const std::string task = process + "/task/" + tid + "/";
      const std::string stat = ReadFile(task + "stat");
      const std::size_t paren = stat.rfind(')');
      const std::string call = Trimmed(ReadFile(task + "syscall"));
      out << "  thread " << tid << " " << Trimmed(ReadFile(task + "comm")) << ", state "
          << (paren == std::string::npos || paren + 2 >= stat.size() ? '?' : stat[paren + 2]) << ", waits in "
          << Trimmed(ReadFile(task + "wchan")) << "\n    syscall " << call;
      if (const std::size_t space = call.rfind(' '); space != std::string::npos) {
        out << " in " << DescribeAddress(process, strtoull(call.c_str() + space + 1, nullptr, 16));
      }
      out << "\n";
      std::istringstream stack(ReadFile(task + "stack"));
      for (std::string line; std::getline(stack, line);) out << "    " << line << "\n";
    }
  }
  return out.str();
}

void RunIsolated(const std::function<void()>& body, int seconds, Needs needs) {
  if (needs == Needs::kUserfaultfd) {
    if (const std::string why = WhyNoUserfaultfd(); !why.empty()) GTEST_SKIP() << why;
  }
  // Against hangs, not a measure: on some virtual machines a change of mappings costs ten times as much as elsewhere.
  seconds *= kSanitized ? 8 : 4;
  // For those who hunt a hang: no test may take longer than this.
  if (const char* cap = getenv("KSMU_TEST_MAX_SECONDS")) seconds = std::min(seconds, atoi(cap));
  int skip_pipe[2];
  ASSERT_EQ(pipe2(skip_pipe, O_CLOEXEC), 0) << strerror(errno);
  fflush(nullptr);
  const pid_t child = fork();
  ASSERT_GE(child, 0) << strerror(errno);
  if (child == 0) {
    close(skip_pipe[0]);
    RunBody(body, skip_pipe[1]);
  }
  setpgid(child, child);  // the child does the same: whoever comes first
  close(skip_pipe[1]);

  int status = 0;
  const auto ended = [&] { return waitpid(child, &status, WNOHANG) == child; };
  if (!WaitUntil(ended, seconds)) {
    ADD_FAILURE() << "not finished within " << seconds << " s; the processes of the test:\n"
                  << DescribeProcessGroup(child);
    EndGroup(child);
    if (!WaitUntil(ended, 20)) ADD_FAILURE() << "cannot even be killed:\n" << DescribeProcessGroup(child);
    close(skip_pipe[0]);
    return;
  }
  EndGroup(child);
  char message[4096];
  const ssize_t length = read(skip_pipe[0], message, sizeof message);
  close(skip_pipe[0]);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
  if (WIFEXITED(status) && WEXITSTATUS(status) == kSkipped) {
    GTEST_SKIP() << std::string(message, std::max<ssize_t>(length, 0));
  }
  ADD_FAILURE() << "the body in its own process: " << ExitText(status);
}

double Now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

void SleepSeconds(double seconds) {
  timespec t;
  t.tv_sec = static_cast<time_t>(seconds);
  t.tv_nsec = static_cast<long>((seconds - static_cast<double>(t.tv_sec)) * 1e9);
  while (nanosleep(&t, &t) != 0 && errno == EINTR) {
  }
}

bool WaitUntil(const std::function<bool()>& condition, double seconds, double poll_seconds) {
  for (const double end = Now() + seconds;;) {
    if (condition()) return true;
    if (Now() >= end) return condition();
    SleepSeconds(poll_seconds);
  }
}

// --- processes ---------------------------------------------------------------------------------------------------

struct Child::Shared {
  std::atomic<int> step;
  std::atomic<int> reports;
  std::atomic<std::size_t> used;
  char text[3000];
};

Child::Child(Kind kind, const Body& body) {
  void* page = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) abort();
  shared_ = new (page) Shared();
  fflush(nullptr);
  pid_ = kind == Kind::kFork                  ? fork()
         : kind == Kind::kForkWithoutHandlers ? _Fork()
                                              : static_cast<pid_t>(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
  if (pid_ == 0) {
    body(*this);
    _exit(0);
  }
  if (pid_ < 0) ADD_FAILURE() << "fork: " << strerror(errno);
}

Child::~Child() {
  if (!joined_ && pid_ > 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  munmap(shared_, sizeof(Shared));
}

void Child::Report(const char* format, ...) {
  char line[300];
  va_list arguments;
  va_start(arguments, format);
  const int n = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  shared_->reports.fetch_add(1);
  if (n <= 0) return;
  const std::size_t length = std::min<std::size_t>(static_cast<std::size_t>(n), sizeof line - 1);
  const std::size_t at = shared_->used.fetch_add(length + 1);
  if (at + length + 1 >= sizeof shared_->text) return;
  memcpy(shared_->text + at, line, length);
  shared_->text[at + length] = '\n';
}

void Child::Signal(int step) { shared_->step.store(step); }

bool Child::Await(int step, double seconds) {
  for (const double end = Now() + seconds; shared_->step.load() < step;) {
    if (Now() > end) return false;
    SleepSeconds(0.001);
  }
  return true;
}

bool Child::Join(double seconds) {
  if (pid_ <= 0) return false;
  int status = 0;
  const auto ended = [&] { return waitpid(pid_, &status, WNOHANG) == pid_; };
  bool good = true;
  if (!WaitUntil(ended, kSanitized ? seconds * 5 : seconds, 0.001)) {
    ADD_FAILURE() << "child " << pid_ << " does not end within " << seconds << " s:\n"
                  << DescribeProcessGroup(getpgrp());
    kill(pid_, SIGKILL);
    waitpid(pid_, &status, 0);
    good = false;
  } else if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    ADD_FAILURE() << "child " << pid_ << ": " << ExitText(status);
    good = false;
  }
  joined_ = true;
  return ExpectNoReports() && good;
}

bool Child::ExpectNoReports() {
  const int reports = shared_->reports.load();
  if (reports == 0) return true;
  shared_->text[sizeof shared_->text - 1] = 0;
  ADD_FAILURE() << "child " << pid_ << " reports (" << reports << "):\n" << shared_->text;
  return false;
}

// --- memory ------------------------------------------------------------------------------------------------------

std::size_t PageSize() {
  static const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

Memory::Memory(std::size_t pages, int extra_mmap_flags, std::size_t aligned)
    : pages_(pages), whole_bytes_((pages + 2) * PageSize() + aligned - 1) {
  whole_ = static_cast<char*>(
      mmap(nullptr, whole_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (whole_ == MAP_FAILED) {
    fprintf(stderr, "test memory of %zu pages: %s\n", pages, strerror(errno));
    abort();
  }
  data_ = whole_ + PageSize();
  data_ += -reinterpret_cast<std::uintptr_t>(data_) & (aligned - 1);
  before_ = static_cast<std::size_t>(data_ - whole_);
  if (mmap(data_, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | extra_mmap_flags, -1, 0) !=
      data_) {
    fprintf(stderr, "test memory of %zu pages: %s\n", pages, strerror(errno));
    abort();
  }
  // Where huge pages are for everybody, the exact counts would be about huge pages; elsewhere nothing is to be set.
  if (ReadFile("/sys/kernel/mm/transparent_hugepage/enabled").find("[always]") != std::string::npos) {
    madvise(data_, bytes(), MADV_NOHUGEPAGE);
  }
}

Memory::~Memory() {
  if (data_ != nullptr) {
    ksmu_advise(data_, bytes(), KSMU_RELEASE);
    munmap(data_, bytes());
  }
  munmap(whole_, before_);
  munmap(whole_ + before_ + bytes(), whole_bytes_ - before_ - bytes());
}

namespace {
std::uint64_t Word(std::uint64_t seed, std::uint64_t i) {
  std::uint64_t z = seed * 0x9e3779b97f4a7c15u + i * 0xd1342543de82ef95u + 1;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
}  // namespace

void FillPage(void* page, std::uint64_t seed) {
  std::uint64_t* words = static_cast<std::uint64_t*>(page);
  for (std::size_t i = 0; i < PageSize() / 8; ++i) words[i] = seed == 0 ? 0 : Word(seed, i);
}

std::ptrdiff_t FindWrongByte(const void* page, std::uint64_t seed) {
  const std::uint64_t* words = static_cast<const std::uint64_t*>(page);
  for (std::size_t i = 0; i < PageSize() / 8; ++i) {
    const std::uint64_t expected = seed == 0 ? 0 : Word(seed, i);
    const std::uint64_t seen = words[i];
    if (seen == expected) continue;
    return static_cast<std::ptrdiff_t>(i * 8 + static_cast<std::size_t>(__builtin_ctzll(seen ^ expected)) / 8);
  }
  return -1;
}

::testing::AssertionResult PageIs(const void* page, std::uint64_t seed) {
  const std::ptrdiff_t at = FindWrongByte(page, seed);
  if (at < 0) return ::testing::AssertionSuccess();
  std::uint64_t words[2];
  memcpy(words, page, sizeof words);
  return ::testing::AssertionFailure() << "page " << page << " is not content " << seed << ": byte " << at
                                       << " differs; the page begins " << std::hex << words[0] << " " << words[1]
                                       << (FindWrongByte(page, 0) < 0 ? " (all zeros)" : "");
}

void FillPages(const Memory& memory, const std::function<std::uint64_t(std::size_t)>& seed_of) {
  for (std::size_t i = 0; i < memory.pages(); ++i) FillPage(memory.page(i), seed_of(i));
}

::testing::AssertionResult PagesAre(const Memory& memory, const std::function<std::uint64_t(std::size_t)>& seed_of) {
  std::size_t wrong = 0, first = 0;
  for (std::size_t i = 0; i < memory.pages(); ++i) {
    if (FindWrongByte(memory.page(i), seed_of(i)) >= 0 && wrong++ == 0) first = i;
  }
  if (wrong == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << wrong << " of " << memory.pages() << " pages are wrong, first page " << first
                                       << ": " << PageIs(memory.page(first), seed_of(first)).message();
}

namespace {
// Where PAGEMAP_SCAN says so; nothing where it is not to be had.
std::size_t CountZeroPages(const void* start, std::size_t bytes) {
  os::Pagemap pagemap;
  if (pagemap.Open(PageSize()) != 0) return 0;
  os::ScanRequest request;
  request.required = request.returned = os::kPfnZero;
  std::size_t pages = 0;
  const os::Address end = reinterpret_cast<os::Address>(start) + bytes;
  os::PageRun runs[64];
  for (os::Address at = reinterpret_cast<os::Address>(start); at < end;) {
    const os::ScanResult scan = pagemap.Scan({at, end - at}, request, runs, 64);
    if (scan.error != 0 || scan.walked_to <= at) break;
    for (std::size_t r = 0; r < scan.runs; ++r) pages += (runs[r].end - runs[r].start) / PageSize();
    at = scan.walked_to;
  }
  pagemap.Close();
  return pages;
}
}  // namespace

bool KernelHasZeroPage() {
  void* fresh = mmap(nullptr, PageSize(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fresh == MAP_FAILED) return false;
  const bool has = *static_cast<volatile char*>(fresh) == 0 && CountZeroPages(fresh, PageSize()) == 1;
  munmap(fresh, PageSize());
  return has;
}

std::size_t CountResident(const void* start, std::size_t bytes) {
  // pagemap: bit 63 present, 62 swapped. The kernel's zero page is present, but nobody's memory. The marks that userfaultfd
  // leaves behind where write-protected pages were discarded show as swapped too, on a device (the lowest five bits) that
  // does not exist.
  const std::string swaps = ReadFile("/proc/swaps");
  const auto lines = std::count(swaps.begin(), swaps.end(), '\n');
  const std::uint64_t swap_devices = lines > 1 ? static_cast<std::uint64_t>(lines - 1) : 0;
  const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  std::size_t resident = 0;
  std::vector<std::uint64_t> entries(4096);
  const std::size_t first = reinterpret_cast<std::uintptr_t>(start) / PageSize();
  const std::size_t pages = bytes / PageSize();
  for (std::size_t i = 0; i < pages;) {
    const std::size_t want = std::min(entries.size(), pages - i);
    const ssize_t got = pread(fd, entries.data(), want * 8, static_cast<off_t>((first + i) * 8));
    if (got <= 0) break;
    const std::size_t n = static_cast<std::size_t>(got) / 8;
    for (std::size_t k = 0; k < n; ++k) {
      const bool swapped = ((entries[k] >> 62) & 1) != 0 && (entries[k] & 31) < swap_devices;
      const bool present = (entries[k] >> 63) & 1;
      if (swapped || present) ++resident;
    }
    i += n;
  }
  close(fd);
  return resident - std::min(resident, CountZeroPages(start, bytes));
}

std::string ReadFile(const std::string& path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

bool WriteFile(const std::string& path, std::string_view text) {
  const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool written = write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  close(fd);
  return written;
}

namespace {
std::int64_t KilobytesField(const std::string& text, const std::string& field) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, field.size(), field) == 0 && line[field.size()] == ':') {
      return strtoll(line.c_str() + field.size() + 1, nullptr, 10);
    }
  }
  return -1;
}
}  // namespace

std::int64_t ReadPss() {
  const std::int64_t kilobytes = KilobytesField(ReadFile("/proc/self/smaps_rollup"), "Pss");
  return kilobytes < 0 ? -1 : kilobytes * 1024;
}

std::int64_t ReadStatusKilobytes(const char* field) { return KilobytesField(ReadFile("/proc/self/status"), field); }

// --- the library --------------------------------------------------------------------------------------------------

std::int64_t Get(const char* name) {
  std::int64_t value = -1;
  if (ksmu_get(name, &value) != 0)
    ADD_FAILURE() << "ksmu_get(" << name << "): " << strerror(errno) << ": " << ksmu_last_error();
  return value;
}

void Set(const char* name, std::int64_t value) {
  if (ksmu_set(name, value) != 0) {
    ADD_FAILURE() << "ksmu_set(" << name << ", " << value << "): " << strerror(errno) << ": " << ksmu_last_error();
  }
}

::testing::AssertionResult FailsWith(std::int64_t result, int expected_errno) {
  const int error = errno;
  if (result == -1 && error == expected_errno) return ::testing::AssertionSuccess();
  auto failure = ::testing::AssertionFailure() << "returned " << result;
  if (result == -1) failure << ", errno " << error << " (" << strerror(error) << "), \"" << ksmu_last_error() << "\"";
  return failure << "; expected -1 and errno " << expected_errno << " (" << strerror(expected_errno) << ")";
}

::testing::AssertionResult Succeeds(std::int64_t result) {
  const int error = errno;
  if (result >= 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "returned " << result << ", errno " << error << " (" << strerror(error)
                                       << "), \"" << ksmu_last_error() << "\"";
}

}  // namespace ksmu::test
