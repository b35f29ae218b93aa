// Stress test: pages that several threads write at once (each its own words), and the threads beside the workers.
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "stress_state.h"
#include "test_support.h"

namespace ksmu::stress {
namespace {

constexpr std::size_t kSharedPages = 256;
constexpr int kWriters = 2;
unsigned char* g_shared = nullptr;
std::uint8_t g_values[kWriters][kSharedPages];

// Words 8 * writer, 64 bytes apart; all pages of eight look the same while the words are 0.
std::size_t Offset(int writer) { return 512 + 64 * static_cast<std::size_t>(writer); }
std::size_t PatternOf(std::size_t page) { return 1 + page % 8; }

std::uint64_t Expected(std::size_t page, int writer, std::uint8_t value) {
  std::uint64_t word;
  memcpy(&word, g.pattern(PatternOf(page)) + Offset(writer), 8);
  return word ^ value;
}

bool CheckSharedPage(std::size_t page, int writer, const char* when) {
  const unsigned char* have = g_shared + page * g.page_size;
  const unsigned char* want = g.pattern(PatternOf(page));
  std::uint64_t word;
  memcpy(&word, have + Offset(writer), 8);
  const std::size_t after = Offset(kWriters);
  if (word == Expected(page, writer, g_values[writer][page]) && memcmp(have, want, Offset(0)) == 0 &&
      memcmp(have + after, want + after, g.page_size - after) == 0) {
    return true;
  }
  Fail("WRONG BYTES %s: shared page %zu (%p): writer %d's word is %llx, has to be %llx; the rest is %s", when, page,
       static_cast<const void*>(have), writer, static_cast<unsigned long long>(word),
       static_cast<unsigned long long>(Expected(page, writer, g_values[writer][page])),
       memcmp(have, want, Offset(0)) == 0 && memcmp(have + after, want + after, g.page_size - after) == 0 ? "right" : "wrong");
  word = Expected(page, writer, g_values[writer][page]);
  memcpy(g_shared + page * g.page_size + Offset(writer), &word, 8);
  return false;
}

}  // namespace

void SetUpShared() {
  void* p = mmap(nullptr, kSharedPages * g.page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) abort();
  madvise(p, kSharedPages * g.page_size, MADV_NOHUGEPAGE);
  g_shared = static_cast<unsigned char*>(p);
  for (std::size_t i = 0; i < kSharedPages; ++i) memcpy(g_shared + i * g.page_size, g.pattern(PatternOf(i)), g.page_size);
}

void AdviseShared() {
  if (ksmu_advise(g_shared, kSharedPages * g.page_size, KSMU_MERGEABLE) != 0) {
    Fail("ksmu_advise(shared words): %s: %s", strerror(errno), ksmu_last_error());
  }
}

void SharedWords(int slot, int index) {
  Random random(g.options.seed * 31 + static_cast<std::uint64_t>(index) + static_cast<std::uint64_t>(g.phase.name) * 7);
  int ends[2] = {-1, -1};
  if (g.phase.descriptors && pipe2(ends, O_CLOEXEC) != 0) return Fail("pipe: %s", strerror(errno));
  for (std::uint64_t n = 0; !g.stop.load(); ++n) {
    Step(slot);
    const std::size_t page = (n / 512 * 16 + random.Below(32)) % kSharedPages;
    if (!CheckSharedPage(page, index, "at a read")) continue;
    const std::uint8_t value = static_cast<std::uint8_t>(random.OneIn(2) ? 0 : random.Below(4));
    const std::uint64_t word = Expected(page, index, value);
    unsigned char* at = g_shared + page * g.page_size + Offset(index);
    const std::size_t how = random.Below(8);
    if (how == 0 && g.phase.descriptors) {
      if (write(ends[1], &word, 8) != 8) Fail("write to a pipe: %s", strerror(errno));
      ssize_t got;
      while ((got = read(ends[0], at, 8)) < 0 && errno == EINTR) {
      }
      if (got != 8) Fail("read(2) of a shared word: %zd: %s", got, strerror(errno));
    } else if (how == 1 && g.phase.pins) {
      iovec from = {const_cast<std::uint64_t*>(&word), 8}, to = {at, 8};
      if (process_vm_writev(getpid(), &from, 1, &to, 1, 0) != 8) Fail("process_vm_writev of a shared word: %s", strerror(errno));
    } else {
      memcpy(at, &word, 8);
    }
    g_values[index][page] = value;
    CheckSharedPage(page, index, "right after a write");
    if (n % 32 == 0) test::SleepSeconds(0.0005);
  }
  if (ends[0] >= 0) close(ends[0]), close(ends[1]);
  for (std::size_t i = 0; i < kSharedPages; ++i) CheckSharedPage(i, index, "at the end of the phase");
}

void CheckShared(const char* when) {
  for (int writer = 0; writer < kWriters; ++writer) {
    for (std::size_t i = 0; i < kSharedPages; ++i) CheckSharedPage(i, writer, when);
  }
}

// Merges by force what the scanner would find too hot.
void Merger(int slot) {
  Random random(g.options.seed * 77 + static_cast<std::uint64_t>(g.phase.name));
  while (!g.stop.load()) {
    Step(slot);
    const Region& r = g.regions[random.Below(g.regions.size())];
    const std::size_t first = random.Below(g.options.pages);
    const std::size_t pages = 1 + random.Below(std::min<std::size_t>(random.OneIn(4) ? g.options.pages : 128, g.options.pages - first));
    const ssize_t merged = ksmu_merge(PageAt(r, first), pages * g.page_size);
    g.tally.merge_calls.fetch_add(1);
    if (merged > 0) g.tally.merge_results.fetch_add(static_cast<std::uint64_t>(merged));
    if (merged < 0 && errno != EINTR && g.library_on.load()) Fail("ksmu_merge: %s: %s", strerror(errno), ksmu_last_error());
    test::SleepSeconds(0.001 * static_cast<double>(random.Below(20)));
  }
}

// The books have to balance at every moment.
void Observer(int slot) {
  while (!g.stop.load()) {
    Step(slot);
    ksmu_stats s = {};
    if (ksmu_read_stats(&s, sizeof s) != 0) {
      if (g.library_on.load()) Fail("ksmu_read_stats: %s: %s", strerror(errno), ksmu_last_error());
    } else {
      std::int64_t unmerged = 0;
#define KSMU_ADD(NAME, name) unmerged += s.unmerged_##name;
      KSMU_FOR_EACH_REASON(KSMU_ADD)
#undef KSMU_ADD
      const std::int64_t sum = s.pages_merged + s.ksm_zero_pages + s.pages_unshared + s.pages_volatile + unmerged;
      if (s.pages_tracked != sum || s.pages_merged != s.pages_shared + s.pages_sharing) {
        Fail("the books do not balance: tracked %lld = merged %lld (shared %lld + sharing %lld) + zero %lld + unshared %lld + volatile %lld + unmerged %lld",
             static_cast<long long>(s.pages_tracked), static_cast<long long>(s.pages_merged),
             static_cast<long long>(s.pages_shared), static_cast<long long>(s.pages_sharing),
             static_cast<long long>(s.ksm_zero_pages), static_cast<long long>(s.pages_unshared),
             static_cast<long long>(s.pages_volatile), static_cast<long long>(unmerged));
      }
    }
    test::SleepSeconds(0.02);
  }
}

// Takes mappings away from merging, and gives them back: what is refused in between has to be found again.
void MapBudget(int slot) {
  Random random(g.options.seed * 59 + static_cast<std::uint64_t>(g.phase.name));
  const auto set = [](std::int64_t value) {
    if (ksmu_set("max_maps", value) != 0 && g.library_on.load()) {
      Fail("ksmu_set(max_maps, %lld): %s: %s", static_cast<long long>(value), strerror(errno), ksmu_last_error());
    }
  };
  while (!g.stop.load()) {
    Step(slot);
    std::int64_t used = 0, without = 0;
    ksmu_get("maps_used", &used);
    // From nothing at all to a little more than there is.
    set(1 + static_cast<std::int64_t>(random.Below(static_cast<std::size_t>(used) + 200)));
    test::SleepSeconds(0.01 * static_cast<double>(1 + random.Below(8)));
    ksmu_get("unmerged_map_budget", &without);
    g.tally.budget_met.fetch_add(without > 0);
    set(0);
    g.tally.budget_changes.fetch_add(1);
    test::SleepSeconds(0.01 * static_cast<double>(10 + random.Below(40)));
  }
}

namespace {
unsigned char g_sink;
void OnSignal(int) {
  // Handlers may use advised memory: this read can find the page behind a gate.
  static std::atomic<std::size_t> turn{0};
  const int saved = errno;
  g_sink = g_shared[turn.fetch_add(7) % kSharedPages * g.page_size];
  g.tally.signals.fetch_add(1);
  errno = saved;
}
}  // namespace

void Signaller(int slot, std::vector<unsigned long> targets) {
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  sigaction(SIGUSR1, &action, nullptr);
  Random random(g.options.seed * 5);
  while (!g.stop.load()) {
    Step(slot);
    pthread_kill(static_cast<pthread_t>(targets[random.Below(targets.size())]), SIGUSR1);
    if (random.OneIn(8)) kill(getpid(), SIGUSR1);
    test::SleepSeconds(0.0008);
  }
}

// The program's right: to close every number there is. Where the test itself keeps descriptors, those beyond its own.
void Closer(int slot) {
  while (!g.stop.load()) {
    Step(slot);
    if (g.phase.descriptors) {
      close_range(900, ~0U, 0);
    } else {
      close_range(3, ~0U, 0);
      int fds[8];
      for (int& fd : fds) {
        fd = memfd_create("reused", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, 16384) != 0 || pwrite(fd, "mine", 4, 4096) != 4) Fail("memfd: %s", strerror(errno));
      }
      test::SleepSeconds(0.0005);
      for (int fd : fds) {
        char text[5] = {};
        if (pread(fd, text, 4, 4096) != 4 || strcmp(text, "mine") != 0 || lseek(fd, 0, SEEK_END) != 16384) {
          Fail("descriptor %d of the program is not what it was", fd);
        }
      }
    }
    g.tally.closed.fetch_add(1);
    test::SleepSeconds(0.001);
  }
}

}  // namespace ksmu::stress
