#include "race_case.h"

#include <ksmu/ksmu.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/test_point.h"
#include "test_support.h"

namespace ksmu::race {
namespace {

Case* g_case = nullptr;

void FutexWait(std::atomic<std::uint32_t>* word, std::uint32_t seen, long nanoseconds) {
  const timespec limit = {0, nanoseconds};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

void FutexWakeAll(std::atomic<std::uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, 0x7fffffff, nullptr, nullptr, 0);
}

void Hook(const char* point, std::uintptr_t address, std::size_t bytes) {
  const int saved = errno;
  if (g_case != nullptr) g_case->OnPoint(point, address, bytes);
  errno = saved;
}

// The state letter of a thread of ours; '?' when it cannot be read (the disturbance may just have closed the file).
char ThreadState(int tid) {
  char path[64], text[512];
  snprintf(path, sizeof path, "/proc/self/task/%d/stat", tid);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return '?';
  const ssize_t n = read(fd, text, sizeof text - 1);
  close(fd);
  if (n <= 0) return '?';
  text[n] = 0;
  const char* paren = strrchr(text, ')');
  return paren != nullptr && paren[1] != 0 ? paren[2] : '?';
}

}  // namespace

const char* ModeName(Mode mode) {
  switch (mode) {
    case Mode::kExact: return "exact";
    case Mode::kPromise: return "promise";
    case Mode::kSync: return "sync";
    case Mode::kMap: return "map";
  }
  return "?";
}

double Seconds() { return test::Now(); }

void FillContent(unsigned char* page, std::size_t bytes, std::uint64_t seed) {
  if (seed == 0) {
    memset(page, 0, bytes);
    return;
  }
  std::uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
  for (std::size_t i = 0; i < bytes; i += 8) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    memcpy(page + i, &x, 8);
  }
}

Case::Case(Control* control, Mode mode, const Scenario& scenario, std::string point, const Disturbance& disturbance,
           unsigned nth)
    : control_(control), mode_(mode), scenario_(scenario), point_(std::move(point)), disturbance_(disturbance), nth_(nth),
      page_size_(test::PageSize()) {}

void Case::SetUpMemory() {
  const auto map = [&](std::size_t size) {
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) abort();
    return static_cast<unsigned char*>(p);
  };
  shadow_ = map(bytes());
  old_ = map(bytes());
  if (mode_ == Mode::kMap) {
    void* p = ksmu_map(bytes(), 0);
    if (p == MAP_FAILED) {
      Fail("ksmu_map: %s: %s", strerror(errno), ksmu_last_error());
      return;
    }
    memory_ = static_cast<unsigned char*>(p);
  } else {
    // A page that nobody can touch on both sides keeps the mapping to itself.
    unsigned char* whole = map(bytes() + 2 * page_size_);
    mprotect(whole, page_size_, PROT_NONE);
    mprotect(whole + bytes() + page_size_, page_size_, PROT_NONE);
    memory_ = whole + page_size_;
  }
  for (std::size_t i = 0; i < kPages; ++i) {
    std::uint64_t seed = 1000 + i;
    for (std::size_t start : {kFirst, kSecond, kThird}) {
      if (i >= start && i < start + kRun) seed = 1 + i - start;
    }
    if (i >= kZeros && i < kZeros + kRun) {
      page(i)[0] = 1;  // populated
      seed = 0;
    }
    FillContent(shadow(i), page_size_, seed);
    memcpy(page(i), shadow(i), page_size_);
  }
  if (mode_ != Mode::kMap) {
    int advice = KSMU_MERGEABLE;
    if (mode_ == Mode::kPromise) advice |= KSMU_F_NO_RAW_DISCARDS;
    if (mode_ == Mode::kSync) advice |= KSMU_F_SYNC_BREAK;
    if (ksmu_advise(memory_, bytes(), advice) != 0) Fail("ksmu_advise: %s: %s", strerror(errno), ksmu_last_error());
  }
}

bool Case::InRegion(std::uintptr_t address) const {
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(memory_);
  return address >= start && address < start + bytes();
}

void Case::OnPoint(const char* point, std::uintptr_t address, std::size_t bytes) {
  if (control_->stage.load() != kArmed) return;
  if (write_at_point_ != nullptr && strcmp(point, write_at_point_) == 0 && InRegion(address)) {
    // The range is under no context here: the store cannot wait.
    // In the middle of the run, so that part of it can be merged and part has to go back.
    const std::size_t i = (address + bytes / 2 - reinterpret_cast<std::uintptr_t>(memory_)) / page_size_;
    page(i)[77] = shadow(i)[77] = static_cast<unsigned char>(shadow(i)[77] + 1);
    write_at_point_ = nullptr;
    return;
  }
  if (point_ != point) return;
  if (control_->hits.fetch_add(1) != nth_) return;
  control_->address.store(address);
  control_->bytes.store(bytes);
  if (InRegion(address) && !subject_is_chosen_) {
    std::size_t first = (address - reinterpret_cast<std::uintptr_t>(memory_)) / page_size_;
    std::size_t pages = bytes / page_size_;
    if (pages == 0) pages = 1;
    if (first + pages > kPages) pages = kPages - first;
    subject_ = first + pages / 2;
  }
  control_->stage.store(kParked);
  FutexWakeAll(&control_->stage);
  // The coordinator lets go; the limit is for the case that it cannot (its own failure is reported by the runner).
  for (int i = 0; i < 200 && control_->stage.load() == kParked; ++i) FutexWait(&control_->stage, kParked, 10'000'000);
}

void* Case::ActorMain(void* self) {
  Case& c = *static_cast<Case*>(self);
  c.actor_tid_.store(static_cast<int>(syscall(SYS_gettid)));
  while (c.control_->stage.load() < kParked) {
    FutexWait(&c.control_->stage, c.control_->stage.load() < kParked ? c.control_->stage.load() : kUnarmed, 20'000'000);
  }
  c.control_->phase.store(kActing);
  c.disturbance_.act(c);
  c.control_->phase.store(kDone);
  return nullptr;
}

void* Case::DriverMain(void* self) {
  Case& c = *static_cast<Case*>(self);
  c.driver_self_.store(pthread_self());
  c.scenario_.drive(c);
  c.driver_done_.store(true);
  return nullptr;
}

void Case::DriveUntilReached(double seconds, void (*step)(Case&)) {
  if (test::kSanitized) seconds *= 3;
  for (const double end = Seconds() + seconds; !Reached() && Seconds() < end;) {
    step(*this);
    if (!Reached()) test::SleepSeconds(0.001);
  }
}

// Lets the parked thread go when the disturbance is over, or when it waits: then it waits for the parked thread, and
// what follows is exactly what the case is about.
void Case::Coordinate() {
  while (control_->stage.load() == kArmed && !driver_done_.load()) FutexWait(&control_->stage, kArmed, 5'000'000);
  if (control_->stage.load() == kArmed) return;  // never reached
  control_->step.store(3);
  int asleep = 0;
  for (const double start = Seconds();;) {
    const std::uint32_t phase = control_->phase.load();
    if (phase == kDone) break;
    const double waited = Seconds() - start;
    if (waited > 0.2) break;
    if (phase == kActing) {
      const char state = ThreadState(actor_tid_.load());
      asleep = state == 'S' || state == 'D' ? asleep + 1 : 0;
      if (asleep >= 4) break;
    } else {
      asleep = 0;
    }
    test::SleepSeconds(0.0005);
  }
  if (control_->phase.load() != kDone) control_->blocked.store(1);
  control_->stage.store(kReleased);
  FutexWakeAll(&control_->stage);
}

void Case::Run() {
  g_case = this;
  control_->step.store(1);
  if (disturbance_.prepare != nullptr) disturbance_.prepare(*this);
  if (skipped()) return;
  if (ksmu_start(nullptr, sizeof(ksmu_options)) != 0) {
    Fail("ksmu_start: %s: %s", strerror(errno), ksmu_last_error());
    return;
  }
  SetTunable("run", 0);
  SetUpMemory();
  if (control_->failures.load() != 0) return;
  if (scenario_.prepare != nullptr) scenario_.prepare(*this);
  CheckAll("before the point");
  if (control_->failures.load() != 0) return;

  control_->step.store(2);
  pthread_t actor, driver;
  pthread_create(&actor, nullptr, ActorMain, this);
  while (actor_tid_.load() == 0) test::SleepSeconds(0.0001);
  base::g_test_hook.store(Hook);
  control_->stage.store(kArmed);
  FutexWakeAll(&control_->stage);
  pthread_create(&driver, nullptr, DriverMain, this);
  Coordinate();
  control_->step.store(4);
  pthread_join(driver, nullptr);
  if (control_->stage.load() == kArmed) {
    Fail("the point was never reached (%u times before the %u. asked for)", control_->hits.load(), nth_ + 1);
    return;
  }
  control_->step.store(5);
  pthread_join(actor, nullptr);
  base::g_test_hook.store(nullptr);
  control_->step.store(6);
  if (disturbance_.finish != nullptr) disturbance_.finish(*this);
  finished_ = true;
  control_->step.store(7);
  CheckAfterwards();
}

void Case::CheckAfterwards() {
  CheckAll("after the point");
  // The memory stays mergeable and writable, whatever happened in it.
  Merge();
  CheckAll("merged again");
  for (std::size_t i = 0; i < kPages; ++i) {
    if (unreadable_[i].load()) continue;
    page(i)[3] = shadow(i)[3] = static_cast<unsigned char>(i + 1);
  }
  CheckAll("written everywhere");
  Merge();
  control_->step.store(8);
  if (ksmu_stop() != 0 && !(stopped_.load() && errno == EINVAL)) {
    Fail("ksmu_stop: %s: %s", strerror(errno), ksmu_last_error());
  }
  control_->step.store(9);
  CheckAll("after ksmu_stop");
  for (std::size_t i = 0; i < kPages; ++i) {
    if (unreadable_[i].load()) continue;
    FillContent(page(i), page_size_, 77777 + i);
    FillContent(shadow(i), page_size_, 77777 + i);
  }
  CheckAll("written after ksmu_stop");
}

void Case::AllowOld(std::size_t i) {
  memcpy(old_ + i * page_size_, shadow(i), page_size_);
  old_allowed_[i].store(true);
  changes_[i].fetch_add(1);
}

void Case::EndOld(std::size_t i) {
  old_allowed_[i].store(false);
  changes_[i].fetch_add(1);
}

void Case::SetUnreadable(std::size_t i, bool unreadable) { unreadable_[i].store(unreadable); }

bool Case::IsRight(std::size_t i) const {
  for (std::uint32_t before = changes_[i].load();;) {
    if (unreadable_[i].load()) return true;
    if (memcmp(page(i), shadow(i), page_size_) == 0) return true;
    if (old_allowed_[i].load() && memcmp(page(i), old_ + i * page_size_, page_size_) == 0) return true;
    const std::uint32_t after = changes_[i].load();
    if (after == before) return false;
    before = after;
  }
}

bool Case::CheckPage(std::size_t i, const char* when) {
  if (IsRight(i)) return true;
  const unsigned char* seen = page(i);
  const unsigned char* want = shadow(i);
  std::size_t at = 0, wrong = 0;
  for (std::size_t k = page_size_; k-- > 0;) {
    if (seen[k] != want[k]) at = k, ++wrong;
  }
  if (wrong == 0) {
    Fail("%s: page %zu differed and does no more", when, i);
    return false;
  }
  // What the kernel has there now: read once the bytes have been, so that it is what they came from.
  std::uint64_t entry = 0;
  if (const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC); fd >= 0) {
    if (pread(fd, &entry, 8, static_cast<off_t>(reinterpret_cast<std::uintptr_t>(seen) / page_size_ * 8)) != 8) entry = 0;
    close(fd);
  }
  bool zeros = true;
  for (std::size_t k = 0; k < page_size_; ++k) zeros = zeros && seen[k] == 0;
  Fail("%s: page %zu%s: %zu wrong bytes, the first at %zu is %02x, should be %02x%s; %s%s%s%s", when, i,
       i == subject_ ? " (the disturbed one)" : "", wrong, at, seen[at], want[at], zeros ? "; the page is all zeros" : "",
       entry >> 63 & 1 ? "present" : "absent", entry >> 62 & 1 ? ", swapped" : "", entry >> 61 & 1 ? ", a frame" : "",
       entry >> 57 & 1 ? ", write-protected" : "");
  return false;
}

bool Case::CheckAll(const char* when) {
  bool good = true;
  int reported = 0;
  for (std::size_t i = 0; i < kPages; ++i) {
    if (!CheckPage(i, when)) good = false, ++reported;
    if (reported == 4) break;
  }
  return good;
}

long Case::Merge() {
  for (int i = 0; i < 1000; ++i) {
    const long merged = ksmu_merge(memory_, bytes());
    if (merged >= 0) return merged;
    if (errno == EINTR) continue;
    if (stopped_.load() && errno == EAGAIN) return -1;
    if (disturbance_.calls_may_fail && !finished_ && errno == ENOMEM) return -1;
    Fail("ksmu_merge: %s: %s", strerror(errno), ksmu_last_error());
    return -1;
  }
  Fail("ksmu_merge: a thousand times EINTR");
  return -1;
}

void Case::SetTunable(const char* name, std::int64_t value) {
  if (ksmu_set(name, value) == 0 || (stopped_.load() && errno == EAGAIN)) return;
  Fail("ksmu_set(%s): %s: %s", name, strerror(errno), ksmu_last_error());
}

void Case::Fail(const char* format, ...) {
  char line[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  control_->failures.fetch_add(1);
  const std::size_t length = strlen(line);
  const std::size_t at = control_->used.fetch_add(static_cast<std::uint32_t>(length + 1));
  if (at + length + 2 > sizeof control_->text) return;
  memcpy(control_->text + at, line, length);
  control_->text[at + length] = '\n';
}

void Case::Skip(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(control_->skip, sizeof control_->skip, format, arguments);
  va_end(arguments);
}

}  // namespace ksmu::race
