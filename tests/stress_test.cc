// Everything at once, for seconds or hours: the scanner flat out, every byte checked against a shadow copy.
//
//   phase A  all that writes memory, pins included, remerge_seconds = 2
//   phase B  merging again in place at once (remerge_seconds = 0), so without writes that the kernel has in flight
//   phase C  the program closes every descriptor above 2, in a loop
//
// In all of them huge pages come and go (split for fewer duplicates from phase to phase), and max_maps is tight at
// times.
//
//   stress_test [--seconds N] [--seed S] [--threads N] [--pages N] [--phase A|B|C|AB...] [--dir D] [--zram] [--keep-going]
//               [--without NAME,...] [--regions KIND,...]   (operations and threads to leave out, kinds of memory to use)
//
// Exit: 0 passed, 1 failed (a byte, a call, too few merges), 3 a thread made no progress, 77 not possible here.
// --zram wants swap to be on: tests/zram_swap.sh gives it for the time of a command.
#include "stress_state.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <thread>

#include "test_support.h"

namespace ksmu::stress {

namespace {

struct Totals {
  std::int64_t merged = 0, broken = 0, remerged = 0, zero = 0, discards = 0, scans = 0, gates = 0, gate_max = 0;
};
Totals g_totals;

int Usage() {
  fprintf(stderr, "usage: stress_test [--seconds N] [--seed S] [--threads N] [--pages N] [--phase LETTERS] [--dir D] [--zram] [--keep-going] [--without NAME,...] [--regions KIND,...]\n");
  return 2;
}

bool ParseArguments(int argc, char** argv) {
  Options& o = g.options;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "--zram") {
      o.zram = true;
      continue;
    }
    if (a == "--keep-going") {
      o.keep_going = true;
      continue;
    }
    if (i + 1 >= argc) return false;
    const char* value = argv[++i];
    if (a == "--seconds") o.seconds = atof(value);
    else if (a == "--seed") o.seed = strtoull(value, nullptr, 0);
    else if (a == "--threads") o.threads = atoi(value);
    else if (a == "--pages") o.pages = strtoull(value, nullptr, 0);
    else if (a == "--phase") o.phases = value;
    else if (a == "--dir") o.directory = value;
    else if (a == "--without") o.without = value;
    else if (a == "--regions") o.regions = value;
    else return false;
  }
  return o.seconds > 0 && o.threads >= 1 && o.threads <= 40 && o.pages >= kBlock * static_cast<std::size_t>(o.threads) * 16 &&
         o.phases.find_first_not_of("ABC") == std::string::npos && !o.phases.empty();
}

// The patterns in a file on a real file system, for O_DIRECT.
void OpenDirectFile() {
  std::string path = g.options.directory + "/ksmu_stress_XXXXXX";
  const int fd = mkostemp(path.data(), O_CLOEXEC);
  if (fd < 0) {
    g.why_no_direct = path + ": " + strerror(errno);
    return;
  }
  const ssize_t size = static_cast<ssize_t>(kPatterns * g.page_size);
  if (pwrite(fd, g.patterns, static_cast<std::size_t>(size), 0) != size || fsync(fd) != 0) g.why_no_direct = strerror(errno);
  g.direct_file = open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (g.direct_file < 0) g.why_no_direct = "O_DIRECT in " + g.options.directory + ": " + strerror(errno);
  unlink(path.c_str());
  close(fd);
  if (g.direct_file < 0) return;
  void* try_page = aligned_alloc(g.page_size, g.page_size);
  if (pread(g.direct_file, try_page, g.page_size, 0) != static_cast<ssize_t>(g.page_size)) {
    g.why_no_direct = std::string("O_DIRECT read: ") + strerror(errno);
    close(g.direct_file);
    g.direct_file = -1;
  }
  free(try_page);
}

class Threads {
 public:
  // `main` gets the thread's slot. The watchdog looks at all slots that have a name.
  void Start(const char* name, std::function<void(int)> main) {
    if (g.options.Without(name)) return;
    const int slot = static_cast<int>(threads_.size());
    g.progress[slot].steps.store(0);
    g.progress[slot].name.store(name);
    threads_.emplace_back([slot, name, main = std::move(main)] {
      pthread_setname_np(pthread_self(), name);
      main(slot);
      g.progress[slot].name.store(nullptr);
    });
  }
  std::vector<unsigned long> Handles() {
    std::vector<unsigned long> handles;
    for (std::thread& t : threads_) handles.push_back(static_cast<unsigned long>(t.native_handle()));
    return handles;
  }
  void Join() {
    for (std::thread& t : threads_) t.join();
    threads_.clear();
  }

 private:
  std::vector<std::thread> threads_;
};

// Every thread has to move. One that does not within the limit is waiting for a page that nobody gives back.
void Watchdog(const std::atomic<bool>* over) {
  const double limit = test::kSanitized ? 40 : g.options.zram ? 30 : 10;
  std::uint64_t seen[kMaxThreads] = {};
  double since[kMaxThreads] = {};
  while (!over->load()) {
    test::SleepSeconds(0.25);
    for (int i = 0; i < kMaxThreads; ++i) {
      const char* name = g.progress[i].name.load();
      const std::uint64_t steps = g.progress[i].steps.load();
      if (name == nullptr || steps != seen[i] || since[i] == 0) {
        seen[i] = steps;
        since[i] = Now();
        continue;
      }
      if (Now() - since[i] < limit) continue;
      fprintf(stderr, "FAILED (phase %c): thread %d (%s) has made no progress for %.0f s; last step: %s. All threads:\n%s\n",
              g.phase.name, i, name, limit, OpName(static_cast<Op>(g.progress[i].op.load())),
              test::DescribeProcessGroup(getpgrp()).c_str());
      fflush(stderr);
      _exit(3);
    }
  }
}

// The main thread's own slot, for calls that must come back.
constexpr int kMainSlot = kMaxThreads - 1;
void Guarded(const char* name, const std::function<void()>& call) {
  g.progress[kMainSlot].steps.fetch_add(1);
  g.progress[kMainSlot].name.store(name);
  call();
  g.progress[kMainSlot].name.store(nullptr);
}

void SetTunable(const char* name, std::int64_t value) {
  if (ksmu_set(name, value) != 0) Fail("ksmu_set(%s, %lld): %s: %s", name, static_cast<long long>(value), strerror(errno), ksmu_last_error());
}

void AddTotals(const char* when) {
  ksmu_stats s = {};
  if (ksmu_read_stats(&s, sizeof s) != 0) return Fail("ksmu_read_stats: %s", ksmu_last_error());
  printf("phase %c, %s:", g.phase.name, when);
#define KSMU_PRINT(field) \
  if (s.field != 0) printf(" " #field " %lld", static_cast<long long>(s.field));
  KSMU_FOR_EACH_COUNTER(KSMU_PRINT)
#undef KSMU_PRINT
  printf("\n");
  fflush(stdout);
  g_totals.merged += s.pages_merged_total;
  g_totals.broken += s.cow_breaks;
  g_totals.remerged += s.pages_remerged;
  g_totals.discards += s.discards;
  g_totals.scans += s.full_scans;
  g_totals.gates += s.gate_count;
  g_totals.gate_max = std::max(g_totals.gate_max, s.gate_max_us);
}

void CheckEverything(const char* when) {
  for (Region& r : g.regions) {
    for (std::size_t i = 0; i < g.options.pages; ++i) Check(r, i, when);
  }
  CheckShared(when);
  CheckLocks(when);
}

void RunPhase(const Phase& phase) {
  g.phase = phase;
  g.phase_start = Now();
  g.stop.store(false);
  Guarded("start", [&] {
    if (ksmu_start(nullptr, sizeof(ksmu_options)) != 0) Fail("ksmu_start: %s: %s", strerror(errno), ksmu_last_error());
    SetTunable("cpu_limit_percent", 100);
    SetTunable("sleep_millisecs", 0);
    SetTunable("remerge_seconds", phase.remerge_seconds);
    SetTunable("thp_min_duplicates", phase.thp_min_duplicates);
  });
  if (g.failed.load() && !g.options.keep_going) return;
  g.library_on.store(true);
  Guarded("advise", [&] {
    for (Region& r : g.regions) Advise(r, 0, g.options.pages);
    AdviseShared();
    AdviseLocks();
  });

  std::atomic<bool> over{false};
  std::thread watchdog(Watchdog, &over);
  Threads threads;
  for (int i = 0; i < g.options.threads; ++i) threads.Start("worker", [i](int slot) { Worker(slot, i); });
  for (int i = 0; i < 2; ++i) threads.Start("shared", [i](int slot) { SharedWords(slot, i); });
  for (int i = 0; i < 2; ++i) threads.Start("futex-pi", [i](int slot) { PriorityFutexes(slot, i); });
  const std::vector<unsigned long> targets = threads.Handles();
  threads.Start("robust", RobustOwners);
  threads.Start("exit-words", ExitWords);
  threads.Start("merger", Merger);
  threads.Start("observer", Observer);
  threads.Start("closer", Closer);
  threads.Start("budget", MapBudget);
  threads.Start("thp", HugePages);

  // Its targets have to be there until the last signal is sent: it is joined before they are.
  std::thread signaller([&] {
    const int slot = kMainSlot - 1;
    g.progress[slot].name.store("signaller");
    if (!g.options.Without("signals")) Signaller(slot, targets);
    g.progress[slot].name.store(nullptr);
  });

  const double end = Now() + phase.seconds;
  while (Now() < end && !g.stop.load()) test::SleepSeconds(0.05);
  Guarded("counters", [] { AddTotals("before the stop"); });
  const auto join = [&] {
    g.stop.store(true);
    Guarded("join", [&] {
      signaller.join();
      threads.Join();
    });
  };
  // With everybody in the middle of something, and 0.1 s to find out what the stop has left behind.
  const bool stop_amid = !g.options.Without("stop");
  if (!stop_amid) join();
  g.library_on.store(false);
  Guarded("stop", [] {
    if (ksmu_stop() != 0) Fail("ksmu_stop: %s: %s", strerror(errno), ksmu_last_error());
  });
  if (stop_amid) {
    if (!g.stop.load()) test::SleepSeconds(0.1);
    join();
  }
  // A merge, or an advice of a worker's, may have started the library again in the meantime.
  Guarded("stop again", [] {
    while (ksmu_stop() == 0) {
    }
  });
  over.store(true);
  watchdog.join();
  CheckEverything("after the phase");
}

int Report(double seconds) {
  const Tally& t = g.tally;
  printf("stress_test: %.1f s, seed %llu; did:", seconds, static_cast<unsigned long long>(g.options.seed));
  for (int i = 1; i < static_cast<int>(Op::kCount); ++i) {
    if (t.ops[i].load() != 0) printf(" %s %llu", OpName(static_cast<Op>(i)), static_cast<unsigned long long>(t.ops[i].load()));
  }
  const auto print = [](const char* name, const std::atomic<std::uint64_t>& n) {
    printf(" %s %llu", name, static_cast<unsigned long long>(n.load()));
  };
  print("children", t.children), print("signals", t.signals), print("close_range", t.closed);
  print("merge_calls", t.merge_calls), print("merge_results", t.merge_results), print("ring_registers", t.ring_registers);
  print("huge_pages", t.huge), print("huge_pages_split", t.huge_split);
  print("max_maps_changes", t.budget_changes), print("map_budget_met", t.budget_met);
  print("robust", t.robust), print("futex_pi", t.priority), print("exit_words", t.exit_words), print("paged_out", t.swapped_out);
  printf("\nstress_test: documented limits met:");
  print("proc_mem_EIO", t.proc_mem_refused), print("futex_pi_EFAULT", t.priority_refused);
  print("unmarked_exit_words_lost", t.unmarked_exit_words_lost);
  printf(" longest_exit_ms %lld", static_cast<long long>(t.longest_exit_ms.load()));
  printf("\n");
  if (g.direct_file < 0) printf("stress_test: without O_DIRECT: %s\n", g.why_no_direct.c_str());
  if (!g.ring_works.load()) printf("stress_test: without io_uring: %s\n", g.why_no_ring.c_str());
  printf("stress_test: merges %lld, breaks %lld, merged again in place %lld, discards %lld, passes %lld, gates %lld, longest %lld us\n",
         static_cast<long long>(g_totals.merged), static_cast<long long>(g_totals.broken),
         static_cast<long long>(g_totals.remerged), static_cast<long long>(g_totals.discards),
         static_cast<long long>(g_totals.scans), static_cast<long long>(g_totals.gates), static_cast<long long>(g_totals.gate_max));
  // Of ten minutes: 50,000 merges, 20,000 breaks, 1,000 merged again in place, 100 refusals, 20 huge pages split;
  // of less, its part; a sanitizer's fifth.
  const double share = std::min(1.0, g.options.seconds / 600) * (test::kSanitized ? 0.2 : 1);
  const bool all_phases = g.options.phases.find('B') != std::string::npos;
  const auto enough = [&](const char* what, std::int64_t have, double want) {
    const std::int64_t least = std::max<std::int64_t>(1, static_cast<std::int64_t>(want * share));
    if (have >= least) return;
    Fail("too few %s: %lld, at least %lld should have been possible", what, static_cast<long long>(have), static_cast<long long>(least));
  };
  if (!g.failed.load()) {
    enough("merges", g_totals.merged, 50000);
    enough("breaks", g_totals.broken, 20000);
    if (all_phases) enough("merges again in place", g_totals.remerged, 1000);
    if (t.budget_changes != 0) enough("refusals for want of mappings", static_cast<std::int64_t>(t.budget_met), 100);
    if (t.huge != 0) enough("huge pages split", static_cast<std::int64_t>(t.huge_split), 20);
  }
  printf("stress_test: %s\n", g.failed.load() ? "FAILED" : "passed");
  return g.failed.load() ? 1 : 0;
}

bool SwapIsOn() { return test::ReadFile("/proc/swaps").find('/') != std::string::npos; }

int Main(int argc, char** argv) {
  if (!ParseArguments(argc, argv)) return Usage();
  if (const std::string why = test::WhyNoUserfaultfd(); !why.empty()) {
    printf("SKIPPED: %s\n", why.c_str());
    return 77;
  }
  if (g.options.zram && !SwapIsOn()) {
    printf("SKIPPED: no swap is on; tests/zram_swap.sh puts it on for the time of a command\n");
    return 77;
  }
  setvbuf(stdout, nullptr, _IOLBF, 0);
  RecordPoints();
  SetUpPatterns();
  SetUpShared();
  SetUpLocks();
  OpenDirectFile();
  SetUpRegions();
  // Each phase starts the library for itself.
  while (ksmu_stop() == 0) {
  }
  const double start = Now();
  const bool all = g.options.phases == "ABC";
  for (char name : g.options.phases) {
    const double part = all ? (name == 'A' ? 0.5 : name == 'B' ? 0.35 : 0.15) : 1.0 / static_cast<double>(g.options.phases.size());
    Phase phase = {name, g.options.seconds * part, 2, true, true, 64};
    if (name == 'B') phase = {name, g.options.seconds * part, 0, false, true, 8};
    if (name == 'C') {
      if (g.direct_file >= 0) close(g.direct_file);
      phase = {name, g.options.seconds * part, 2, false, false, 2};
    }
    RunPhase(phase);
    if (g.failed.load() && !g.options.keep_going) break;
  }
  return Report(Now() - start);
}

}  // namespace
}  // namespace ksmu::stress

int main(int argc, char** argv) { return ksmu::stress::Main(argc, argv); }
