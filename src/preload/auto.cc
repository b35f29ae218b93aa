#include "preload/auto.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "api/shim.h"
#include "os/thread.h"
#include "preload/config.h"
#include "preload/seen.h"

namespace ksmu::preload {
namespace {

constexpr std::uint64_t kSecond = 1'000'000'000;
// What is unmapped again within this time is not worth the advice.
constexpr std::uint64_t kSettleNs = kSecond / 5;

std::atomic<std::uint32_t> g_work{0};
std::atomic<bool> g_thread_is_there{false};
std::atomic<bool> g_gave_up{false};

int DefaultAdvice() { return KSMU_MERGEABLE | (g_config.promise ? KSMU_F_NO_RAW_DISCARDS : 0); }

void Forward(int level, const char* message, void*) {
  if (level <= KSMU_LOG_INFO) Log("%s", message);
}

bool AnyIn(Seen::State state, std::size_t least) {
  bool any = false;
  g_seen.ForEach(state, [&](Span span) { any |= span.bytes >= least; });
  return any;
}

// Advises what has been there for a while. Returns how long to sleep, < 0: until something comes.
std::int64_t AdviseSeen() {
  if (!g_config.automatic || g_gave_up.load(std::memory_order_relaxed)) return -1;
  const std::uint64_t now = Seen::Now();
  bool waiting = false;
  Span span;
  if (ksmushim_state() != KSMU_SHIM_RUNNING) {
    // Before anything is marked as being advised: threads are started by it, and so the program's allocator is called, one of
    // whose threads may be waiting to unmap what is marked.
    if (!AnyIn(Seen::kWritable, g_config.auto_min)) return -1;
    if (StartEngine() != 0) {
      g_gave_up.store(true, std::memory_order_relaxed);
      return -1;
    }
  }
  while (g_seen.Take(g_config.auto_min, now - kSettleNs, &span, &waiting)) {
    const int error = ksmushim_advise(reinterpret_cast<void*>(span.start), span.bytes, DefaultAdvice());
    g_seen.Done(span, error == 0 || error == -ENOMEM ? Seen::kAdvised : Seen::kRefused);
    if (error && error != -ENOMEM) Log("%p, %zu bytes: not merged automatically: %s", reinterpret_cast<void*>(span.start), span.bytes, strerrordesc_np(-error));
  }
  return waiting ? static_cast<std::int64_t>(kSettleNs) : -1;
}

void* AutoMain(void*) {
  os::NameThisThread("ksmu-auto");
  std::uint64_t stats_at = Seen::Now() + g_config.stats_seconds * kSecond;
  for (;;) {
    const std::uint32_t seen = g_work.load(std::memory_order_acquire);
    std::int64_t sleep = AdviseSeen();
    if (g_config.stats[0]) {
      const std::uint64_t now = Seen::Now();
      if (now >= stats_at) {
        WriteStats();
        stats_at = now + g_config.stats_seconds * kSecond;
      }
      const auto left = static_cast<std::int64_t>(stats_at - now);
      sleep = sleep < 0 || left < sleep ? left : sleep;
    }
    Lock::Wait(&g_work, seen, static_cast<long>(sleep));
  }
}

// The name with %p replaced by the process's id, and `suffix` behind it.
bool StatsName(const char* suffix, char* out, std::size_t room) {
  const char* at = std::strstr(g_config.stats, "%p");
  const int n = at ? std::snprintf(out, room, "%.*s%d%s%s", static_cast<int>(at - g_config.stats), g_config.stats,
                                   static_cast<int>(getpid()), at + 2, suffix)
                   : std::snprintf(out, room, "%s%s", g_config.stats, suffix);
  return n > 0 && static_cast<std::size_t>(n) < room;
}

}  // namespace

void StartAuto() {
  if (!g_config.automatic && !g_config.stats[0]) return;
  if (g_thread_is_there.load(std::memory_order_relaxed) || g_thread_is_there.exchange(true)) return;
  const int saved = errno;
  pthread_t thread;
  if (const int error = os::StartThread(&thread, &AutoMain, nullptr)) {
    g_thread_is_there.store(false);
    Log("%s", os::WhyNoThread(error));
  }
  errno = saved;
}

void WakeAuto() {
  if (!g_config.automatic || !g_thread_is_there.load(std::memory_order_relaxed)) return;
  g_work.fetch_add(1, std::memory_order_release);
  Lock::Wake(&g_work, 1);
}

int StartEngine() {
  if (ksmushim_state() == KSMU_SHIM_RUNNING) return 0;
  const int saved = errno;
  ksmu_options options{};
  if (g_config.log[0]) options.log = &Forward;
  int error = ksmu_start(&options, sizeof options) == 0 ? 0 : errno;
  if (error == EALREADY) error = 0;  // the program has started it itself
  if (error) Log("not merging here: %s", ksmu_last_error());
  errno = saved;
  return error;
}

int SetMemoryMerge(bool on) {
  if (on) {
    if (const int error = StartEngine()) return error;
    g_config.auto_min = 0;
    g_config.automatic = true;
    setenv("KSMU_MEMORY_MERGE", "1", 1);
    StartAuto();
    WakeAuto();
    return 0;
  }
  g_config.automatic = false;
  unsetenv("KSMU_MEMORY_MERGE");
  g_seen.ForEach(Seen::kAdvised, [](Span span) {
    Advise(span, KSMU_UNMERGEABLE);
    g_seen.Set(span, Seen::kWritable, Seen::kAdvised);
  });
  return 0;
}

bool MemoryMerge() { return g_config.automatic; }

// --- what was locked when it was advised ------------------------------------------------------------------------------

namespace {
struct Locked {
  Span span;
  int advice;
};
Lock g_locked_lock;
Locked g_locked[256];
std::size_t g_locked_count = 0;
}  // namespace

void NoteLockedAdvice(Span span, int advice) {
  const Held held(g_locked_lock);
  if (g_locked_count < sizeof g_locked / sizeof *g_locked) g_locked[g_locked_count++] = {span, advice};
}

void ReadviseUnlocked(Span span) {
  for (;;) {
    Locked found{};
    {
      const Held held(g_locked_lock);
      std::size_t i = 0;
      while (i < g_locked_count && (g_locked[i].span.start >= span.end() || g_locked[i].span.end() <= span.start)) ++i;
      if (i == g_locked_count) return;
      found = g_locked[i];
      g_locked[i] = g_locked[--g_locked_count];
    }
    // What is still locked is passed over by the advice, and is not asked about again.
    Advise(found.span, found.advice);
  }
}

void ForgetLocked(Span span) {
  const Held held(g_locked_lock);
  for (std::size_t i = 0; i < g_locked_count;) {
    const Locked& known = g_locked[i];
    if (known.span.start < span.end() && known.span.end() > span.start) g_locked[i] = g_locked[--g_locked_count];
    else ++i;
  }
}

// --- fork, statistics -------------------------------------------------------------------------------------------------

void AutoInChild() {
  g_seen.ResetInChild();
  if (g_locked_lock.ResetInChild()) g_locked_count = 0;
  // And none is started here: that allocates, and an allocator's own child handler, which gives its locks free, may be still to
  // come. What a child maps is not merged automatically before it executes a program.
  g_thread_is_there.store(false, std::memory_order_relaxed);
}

void WriteStats() {
  if (!g_config.stats[0]) return;
  char name[600], temporary[640];
  if (!StatsName("", name, sizeof name) || !StatsName(".new", temporary, sizeof temporary)) return;
  ksmu_stats stats;
  if (ksmu_read_stats(&stats, sizeof stats) != 0) return;
  char text[8192];
  std::size_t n = 0;
  const auto add = [&](const char* field, std::int64_t value) {
    const int m = std::snprintf(text + n, sizeof text - n, "%s %lld\n", field, static_cast<long long>(value));
    if (m > 0 && static_cast<std::size_t>(m) < sizeof text - n) n += static_cast<std::size_t>(m);
  };
  add("pid", getpid());
#define KSMU_ADD(field) add(#field, stats.field);
  KSMU_FOR_EACH_COUNTER(KSMU_ADD)
#undef KSMU_ADD
  // In a directory for everybody, nobody else's link is to be followed.
  unlink(temporary);
  const int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
  const bool written = fd >= 0 && write(fd, text, n) == static_cast<ssize_t>(n);
  if (fd >= 0) close(fd);
  if (!written || std::rename(temporary, name) != 0) Log("KSMU_STATS: %s cannot be written", name);
}

}  // namespace ksmu::preload
