// What makes the library pass each named point.
#include <ksmu/ksmu.h>

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "race_case.h"

namespace ksmu::race {
namespace {

void DriveMerge(Case& c) {
  c.DriveUntilReached(2, [](Case& k) { k.Merge(); });
}

void MergeAll(Case& c) {
  // Twice: what the first call left for some passing reason is taken by the second.
  c.Merge();
  c.Merge();
}

// Frames for the contents exist already when the third run is merged.
void MergeTwoRuns(Case& c) {
  const std::size_t end = Case::kSecond + Case::kRun;
  if (ksmu_merge(c.memory(), end * c.page_size()) < 0) c.Fail("ksmu_merge: %s: %s", strerror(errno), ksmu_last_error());
}

void WriteBetweenHashAndGate(Case& c) { c.WriteAtPoint("merge.untracked"); }
void WriteBetweenHashAndGateOfZeros(Case& c) { c.WriteAtPoint("zero.untracked"); }

// Pages of the second run are written, but not changed: private copies that equal the frame beneath.
void MergeAndBreak(Case& c) {
  MergeAll(c);
  c.SetTunable("remerge_seconds", 0);
  for (std::size_t i = Case::kSecond; i < Case::kSecond + Case::kRun; ++i) {
    volatile unsigned char* byte = c.page(i);
    *byte = *byte;
  }
}

// The same, and then they get the contents of other frames: the first run's, in another order.
void MergeAndChange(Case& c) {
  MergeAll(c);
  c.SetTunable("remerge_seconds", 0);
  for (std::size_t i = 0; i < Case::kRun; ++i) {
    const std::size_t from = Case::kFirst + (i + 3) % Case::kRun;
    memcpy(c.page(Case::kSecond + i), c.shadow(from), c.page_size());
    memcpy(c.shadow(Case::kSecond + i), c.shadow(from), c.page_size());
  }
}

// Written between the look at them and their taking, so that the very pages have to go back.
void MergeBreakAndWrite(Case& c) {
  MergeAndBreak(c);
  c.WriteAtPoint("remerge.begin");
}
void MergeChangeAndWrite(Case& c) {
  MergeAndChange(c);
  c.WriteAtPoint("remerge.begin");
}

void DriveScanner(Case& c) {
  c.SetTunable("cpu_limit_percent", 0);
  c.SetTunable("sleep_millisecs", 0);
  c.SetTunable("run", 1);
  c.DriveUntilReached(3, [](Case& k) { k.Merge(); });
  c.SetTunable("run", 0);
}

void DriveUnadvise(Case& c) {
  if (ksmu_advise(c.memory(), c.bytes(), KSMU_UNMERGEABLE) != 0 && errno != EAGAIN && errno != ENOMEM) {
    c.Fail("KSMU_UNMERGEABLE: %s: %s", strerror(errno), ksmu_last_error());
  }
}

void DriveUnmergeAll(Case& c) {
  if (ksmu_set("run", 2) != 0 && errno != EAGAIN && errno != ENOMEM) {
    c.Fail("run=2: %s: %s", strerror(errno), ksmu_last_error());
  }
}

// Discards of merged pages: the event thread is told. Never the page that the disturbance is for.
void MergeForDiscards(Case& c) {
  MergeAll(c);
  c.ChooseSubject(Case::kSecond + 4);
}

void DriveDiscards(Case& c) {
  for (std::size_t k = 0; k < Case::kRun && !c.Reached(); ++k) {
    const std::size_t i = Case::kSecond + k;
    if (k == 4) continue;
    c.AllowOld(i);
    memset(c.shadow(i), 0, c.page_size());
    const int result = RawDiscardsAllowed(c.mode()) ? madvise(c.page(i), c.page_size(), MADV_DONTNEED)
                                                    : ksmu_advise(c.page(i), c.page_size(), KSMU_DISCARD);
    if (result != 0) c.Fail("discard of page %zu: %s", i, strerror(errno));
    c.EndOld(i);
    c.CheckPage(i, "right after its discard");
  }
}

// Under KSMU_F_SYNC_BREAK a first write is a message to the event thread.
void DriveWrites(Case& c) {
  for (std::size_t k = 0; k < Case::kRun && !c.Reached(); ++k) {
    const std::size_t i = Case::kThird + k;
    if (k == 4) continue;
    c.AllowOld(i);
    c.shadow(i)[9] ^= 0x55;
    c.page(i)[9] = c.shadow(i)[9];
    c.EndOld(i);
    c.CheckPage(i, "right after its first write");
  }
}

void MergeForWrites(Case& c) {
  MergeAll(c);
  c.ChooseSubject(Case::kThird + 4);
}

// Nobody maps the frames any more: everything that was merged is written.
void DriveReclaim(Case& c) {
  for (std::size_t start : {Case::kFirst, Case::kSecond, Case::kThird}) {
    for (std::size_t i = start; i < start + Case::kRun; ++i) {
      c.AllowOld(i);
      c.shadow(i)[5] = static_cast<unsigned char>(i);
      c.page(i)[5] = c.shadow(i)[5];
      c.EndOld(i);
    }
  }
  DriveScanner(c);
}

void DriveFork(Case& c) {
  const pid_t child = fork();
  if (child == 0) {
    // The disturbance at fork.prepare comes before or after the copy is taken: both are right for what it changes.
    const std::string name = c.disturbance_name();
    const bool all = name.size() > 4 && name.compare(name.size() - 4, 4, "_all") == 0;
    for (std::size_t i = 0; i < Case::kPages && c.point() == "fork.prepare"; ++i) {
      if (all || i == c.subject()) c.SetUnreadable(i, true);
    }
    c.CheckAll("in the forked child");
    _exit(0);
  }
  if (child < 0) {
    c.Fail("fork: %s", strerror(errno));
    return;
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) c.Fail("the forked child ended with status %#x", status);
}

bool FastAttach(Mode mode) { return mode == Mode::kPromise || mode == Mode::kMap; }

bool MergePointApplies(Mode mode, const std::string& point) {
  // Frames are either mapped in place and then armed, or prepared elsewhere before the gate is shut, and moved in.
  if (point == "merge.prepared") return !FastAttach(mode);
  if (point == "merge.registered" || point == "merge.protected" || point == "merge.filled") return FastAttach(mode);
  return true;
}

bool OnlySync(Mode mode, const std::string&) { return mode == Mode::kSync; }
// Broken pages of a region with KSMU_F_SYNC_BREAK stay where they are until they are discarded or unmerged.
bool NotSync(Mode mode, const std::string&) { return mode != Mode::kSync; }

const std::vector<const char*> kMergePoints = {
    "publish.begin",    "publish.written", "merge.prepared",   "merge.untracked", "merge.shut",    "merge.taken",
    "merge.proved",     "merge.attach",    "merge.attached",   "merge.registered", "merge.protected", "merge.filled",
    "merge.drained",    "merge.dropped",   "merge.booked",     "merge.opened"};
const std::vector<const char*> kMatchPoints(kMergePoints.begin() + 2, kMergePoints.end());

}  // namespace

const std::vector<Scenario>& Scenarios() {
  static const std::vector<Scenario> scenarios = {
      {"merge", kMergePoints, nullptr, DriveMerge, MergePointApplies, true},
      {"match", kMatchPoints, MergeTwoRuns, DriveMerge, MergePointApplies, false},
      {"zero", {"zero.untracked", "zero.shut", "zero.taken", "zero.proved", "zero.dropped", "zero.mapped", "zero.tracked", "zero.opened"},
       nullptr, DriveMerge, nullptr, true},
      {"undo", {"undo.begin", "undo.moved", "undo.tracked", "undo.opened"}, WriteBetweenHashAndGate, DriveMerge, nullptr,
       true},
      {"undo_zero", {"undo.begin", "undo.moved", "undo.tracked"}, WriteBetweenHashAndGateOfZeros,
       DriveMerge, nullptr, false},
      {"remerge", {"remerge.begin", "remerge.away", "remerge.taken", "remerge.proved", "remerge.continued", "remerge.opened"},
       MergeAndBreak, DriveScanner, NotSync, true},
      {"remerge_back", {"remerge.kept", "remerge.back"}, MergeBreakAndWrite, DriveScanner, NotSync, true},
      {"detach_back", {"remerge.kept", "remerge.back"}, MergeChangeAndWrite, DriveScanner, NotSync, true},
      {"detach", {"detach.begin", "remerge.away", "detach.taken", "detach.copied", "detach.landed", "detach.replaced", "detach.beside", "detach.filled",
        "detach.left", "detach.tracked", "detach.opened"},
       MergeAndChange, DriveScanner, NotSync, true},
      {"unadvise", {"unmerge.begin", "unmerge.populated", "unmerge.booked"}, MergeAll, DriveUnadvise, nullptr, true},
      {"unmerge_all", {"unmerge.begin", "unmerge.populated", "unmerge.booked"}, MergeAll, DriveUnmergeAll, nullptr, false},
      {"discard", {"event.read", "event.handled"}, MergeForDiscards, DriveDiscards, nullptr, true},
      {"sync_write", {"event.read", "event.handled"}, MergeForWrites, DriveWrites, OnlySync, true},
      {"reclaim", {"reclaim.checked", "reclaim.punched"}, MergeForDiscards, DriveReclaim, nullptr, true},
      {"fork", {"fork.prepare", "fork.child"}, MergeForDiscards, DriveFork, nullptr, true},
  };
  return scenarios;
}

bool GateIsShutAt(const std::string& point) {
  for (const char* shut : {"merge.shut", "merge.taken", "merge.proved", "merge.attach", "merge.attached",
                           "merge.registered", "merge.protected", "merge.filled", "merge.drained", "merge.dropped",
                           "merge.booked", "zero.shut", "zero.taken", "zero.proved", "zero.dropped", "zero.mapped", "zero.tracked",
                           "undo.begin", "undo.moved", "undo.tracked", "remerge.away", "remerge.taken", "remerge.proved",
                           "remerge.continued", "remerge.kept", "remerge.back", "detach.taken", "detach.copied",
                           "detach.landed", "detach.replaced",
                           "detach.beside", "detach.filled", "detach.left", "detach.tracked"}) {
    if (point == shut) return true;
  }
  return false;
}

std::string WhyImpossible(const Scenario& scenario, const std::string& point, const Disturbance& disturbance, Mode mode) {
  if (scenario.applies != nullptr && !scenario.applies(mode, point)) return "the point is not on this mode's way";
  if (disturbance.applies != nullptr && !disturbance.applies(mode)) return "against the promise, or not this kind of memory";
  if (strcmp(scenario.name, "discard") == 0 && strcmp(disturbance.name, "unmap_all") == 0) {
    return "the discard under way would be of what lies there next";
  }
  if (strcmp(disturbance.name, "move") == 0) {
    // Moves of merged memory are followed, as long as it is merged; the rest has to be announced (docs/limits.md).
    const bool in_run = point.starts_with("remerge.") || point.starts_with("unmerge.begin") || point.starts_with("detach.");
    if (!in_run || point == "detach.left" || point == "detach.tracked" || point == "detach.opened" || point == "remerge.opened") {
      return "not merged: a move has to be announced";
    }
    if (strcmp(scenario.name, "detach_back") == 0 && point == "remerge.back") {
      return "the run is in two mappings: mremap fails (docs/limits.md)";
    }
  }
  if (strcmp(scenario.name, "sync_write") == 0 && strcmp(disturbance.name, "discard_raw_all") == 0) {
    return "whether the write under way or the discard comes first is open";
  }
  if (strcmp(scenario.name, "fork") == 0 && strcmp(disturbance.name, "no_descriptors") == 0) {
    return "a fork under RLIMIT_NOFILE 3 never returns: docs/limits.md";
  }
  return "";
}

}  // namespace ksmu::race
