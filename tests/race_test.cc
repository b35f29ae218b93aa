// Every gap of the protocol x every disturbance (race_case.h). Each case runs in a process of its own, two at a time,
// with a budget of a few seconds; one that does not end in time fails with the kernel stacks of all its threads.
//
//   race_test                        the short form: each point x each disturbance once, where the modes differ in each
//   race_test --long                 all modes, all scenarios, several passings of the point, several rounds
//   race_test --filter merge.taken/write     cases whose name contains the text; --one NAME: in this process, for gdb
//
// Exit: 0 passed, 1 failed, 77 userfaultfd is not permitted here.
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "race_case.h"
#include "test_support.h"

namespace ksmu::race {
namespace {

struct Entry {
  Mode mode;
  const Scenario* scenario;
  std::string point;
  const Disturbance* disturbance;
  unsigned nth;

  std::string Name() const {
    return std::string(ModeName(mode)) + "/" + scenario->name + "/" + point + "/" + disturbance->name +
           (nth == 0 ? "" : "/" + std::to_string(nth));
  }
};

struct Settings {
  bool long_form = false;
  bool list = false;
  bool verbose = false;
  int jobs = 2;
  int rounds = 1;
  double budget = 6;
  std::string filter, one;
};

constexpr int kBodyDone = 0;

// What the short form leaves to the long one: combinations that walk the same code as one that it has.
bool InShortForm(const Entry& e) {
  if (!e.scenario->in_short_form || e.nth != 0) return false;
  const std::string d = e.disturbance->name;
  if (e.mode == Mode::kMap) return d == "unmap" || d == "unmap_all";
  if (e.mode == Mode::kSync) {
    // The way in is that of exact attach; breaks, discards and children go through a context of their own.
    return e.point.rfind("event.", 0) == 0 || d == "write" || d == "read2" || d == "discard_raw_read" || d == "clone_discard_raw" ||
           d == "pin" || d == "stop";
  }
  if (e.mode == Mode::kPromise && (e.point.rfind("zero.", 0) == 0 || e.point.rfind("reclaim.", 0) == 0 ||
                                   e.point.rfind("publish.", 0) == 0)) {
    return d == "write" || d == "discard_seen" || d == "release";
  }
  return true;
}

std::vector<Entry> AllEntries(const Settings& s, std::map<std::string, int>* impossible) {
  std::vector<Entry> entries;
  const unsigned passings = s.long_form ? 3 : 1;
  for (Mode mode : kModes) {
    for (const Scenario& scenario : Scenarios()) {
      for (const char* point : scenario.points) {
        for (const Disturbance& disturbance : Disturbances()) {
          if (const std::string why = WhyImpossible(scenario, point, disturbance, mode); !why.empty()) {
            ++(*impossible)[why];
            continue;
          }
          for (unsigned nth = 0; nth < passings; ++nth) {
            // Only a merge passes its points several times for certain: there are several runs.
            if (nth > 0 && strcmp(scenario.name, "merge") != 0) continue;
            Entry e{mode, &scenario, point, &disturbance, nth};
            if (!s.long_form && s.filter.empty() && s.one.empty() && !InShortForm(e)) continue;
            if (!s.filter.empty() && e.Name().find(s.filter) == std::string::npos) continue;
            entries.push_back(e);
          }
        }
      }
    }
  }
  return entries;
}

void RunBody(const Entry& e, Control* control) {
  // Left alive on purpose: stuck threads may still look at it.
  Case* c = new Case(control, e.mode, *e.scenario, e.point, *e.disturbance, e.nth);
  c->Run();
}

struct Job {
  pid_t pid = -1;
  const Entry* entry = nullptr;
  Control* control = nullptr;
  double started = 0;
};

const char* StepName(std::uint32_t step) {
  static const char* const names[] = {"start", "preparation", "driving", "disturbance", "driver's end", "actor's end",
                                      "finish", "check", "ksmu_stop", "check after ksmu_stop"};
  return step < sizeof names / sizeof *names ? names[step] : "?";
}

class Runner {
 public:
  explicit Runner(const Settings& settings) : settings_(settings) {}

  int Run() {
    std::map<std::string, int> impossible;
    const std::vector<Entry> entries = AllEntries(settings_, &impossible);
    if (settings_.list) {
      for (const Entry& e : entries) printf("%s\n", e.Name().c_str());
      return 0;
    }
    if (entries.empty()) {
      fprintf(stderr, "race_test: no case has this name\n");
      return 1;
    }
    const double start = Seconds();
    std::vector<Job> jobs(static_cast<std::size_t>(settings_.jobs));
    for (Job& job : jobs) {
      job.control = static_cast<Control*>(
          mmap(nullptr, sizeof(Control), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    }
    std::size_t next = 0;
    const std::size_t total = entries.size() * static_cast<std::size_t>(settings_.rounds);
    for (std::size_t running = 0; next < total || running > 0;) {
      running = 0;
      bool moved = false;
      for (Job& job : jobs) {
        if (job.pid < 0 && next < total) {
          Start(job, entries[next++ % entries.size()]);
          moved = true;
        }
        if (job.pid >= 0) moved = Look(job) || moved;
        if (job.pid >= 0) ++running;
      }
      if (!moved) test::SleepSeconds(0.0005);
    }
    printf("race_test: %zu cases in %.1f s: %d passed, %d failed, %d skipped; in %d the disturbance had to wait for the library\n",
           total, Seconds() - start, passed_, failed_, skipped_, blocked_);
    for (const auto& [why, count] : skips_) printf("  skipped %d: %s\n", count, why.c_str());
    for (const auto& [why, count] : impossible) printf("  left out %d: %s\n", count, why.c_str());
    for (const std::string& name : failures_) printf("  FAILED %s\n", name.c_str());
    if (passed_ == 0 && failed_ == 0) return 77;
    return failed_ == 0 ? 0 : 1;
  }

 private:
  void Start(Job& job, const Entry& entry) {
    memset(static_cast<void*>(job.control), 0, sizeof(Control));
    job.entry = &entry;
    job.started = Seconds();
    fflush(nullptr);
    job.pid = fork();
    if (job.pid == 0) {
      setpgid(0, 0);
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      RunBody(entry, job.control);
      _exit(kBodyDone);
    }
    if (job.pid < 0) {
      perror("fork");
      exit(1);
    }
    setpgid(job.pid, job.pid);
  }

  // True if the job ended.
  bool Look(Job& job) {
    int status = 0;
    const bool ended = waitpid(job.pid, &status, WNOHANG) == job.pid;
    if (!ended && Seconds() - job.started < settings_.budget) return false;
    std::string report;
    if (!ended) {
      report = "not finished within " + std::to_string(settings_.budget) + " s, in step \"" +
               StepName(job.control->step.load()) + "\"; all threads:\n" + test::DescribeProcessGroup(job.pid);
    }
    kill(-job.pid, SIGKILL);  // children that a failing case left behind, too
    if (!ended) {
      if (!test::WaitUntil([&] { return waitpid(job.pid, &status, WNOHANG) == job.pid; }, 20)) {
        report += "cannot even be killed:\n" + test::DescribeProcessGroup(job.pid);
      }
    } else if (WIFSIGNALED(status)) {
      report = "died of signal " + std::to_string(WTERMSIG(status)) + " in step \"" + StepName(job.control->step.load()) + "\"\n";
    } else if (WEXITSTATUS(status) != kBodyDone) {
      report = "ended with status " + std::to_string(WEXITSTATUS(status)) + "\n";
    }
    job.control->text[sizeof job.control->text - 1] = 0;
    if (job.control->failures.load() != 0) report = job.control->text + report;
    Book(job, report);
    job.pid = -1;
    return true;
  }

  void Book(const Job& job, const std::string& report) {
    const double seconds = Seconds() - job.started;
    const Control& c = *job.control;
    const char* outcome = "ok";
    if (!report.empty()) {
      outcome = "FAILED";
      ++failed_;
      failures_.push_back(job.entry->Name());
    } else if (c.skip[0] != 0) {
      outcome = "skipped";
      ++skipped_;
      ++skips_[c.skip];
    } else {
      ++passed_;
    }
    if (c.blocked.load() != 0) ++blocked_;
    if (!report.empty() || settings_.verbose) {
      printf("%-7s %s (%.0f ms%s)\n%s", outcome, job.entry->Name().c_str(), seconds * 1e3,
             c.blocked.load() != 0 ? ", waited" : "", report.c_str());
      fflush(stdout);
    }
  }

  const Settings settings_;
  int passed_ = 0, failed_ = 0, skipped_ = 0, blocked_ = 0;
  std::map<std::string, int> skips_;
  std::vector<std::string> failures_;
};

int RunOne(const std::string& name) {
  Settings all;
  all.long_form = true;
  std::map<std::string, int> impossible;
  for (const Entry& e : AllEntries(all, &impossible)) {
    if (e.Name() != name) continue;
    Control* control = static_cast<Control*>(
        mmap(nullptr, sizeof(Control), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    RunBody(e, control);
    printf("%s%s%s\n", control->text, control->skip, control->failures.load() == 0 ? "ok" : "FAILED");
    return control->failures.load() == 0 ? 0 : 1;
  }
  fprintf(stderr, "race_test: no case is called %s\n", name.c_str());
  return 1;
}

int Main(int argc, char** argv) {
  Settings s;
  const char* long_form = getenv("KSMU_TEST_LONG");
  s.long_form = long_form != nullptr && strcmp(long_form, "0") != 0 && *long_form != 0;
  if (test::kSanitized) s.budget *= 5;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    const auto value = [&]() -> const char* {
      if (i + 1 < argc) return argv[++i];
      fprintf(stderr, "race_test: %s needs a value\n", a.c_str());
      exit(2);
    };
    if (a == "--long") s.long_form = true;
    else if (a == "--list") s.list = true;
    else if (a == "--verbose") s.verbose = true;
    else if (a == "--jobs") s.jobs = std::max(1, atoi(value()));
    else if (a == "--rounds") s.rounds = std::max(1, atoi(value()));
    else if (a == "--budget") s.budget = atof(value());
    else if (a == "--filter") s.filter = value();
    else if (a == "--one") s.one = value();
    else {
      fprintf(stderr, "usage: race_test [--long] [--rounds N] [--jobs N] [--budget SECONDS] [--filter TEXT] [--one NAME] [--list] [--verbose]\n");
      return 2;
    }
  }
  if (!s.list) {
    if (const std::string why = test::WhyNoUserfaultfd(); !why.empty()) {
      printf("SKIPPED: %s\n", why.c_str());
      return 77;
    }
  }
  if (!s.one.empty()) return RunOne(s.one);
  return Runner(s).Run();
}

}  // namespace
}  // namespace ksmu::race

int main(int argc, char** argv) { return ksmu::race::Main(argc, argv); }
