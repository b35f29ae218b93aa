// bench/vs_ksm: the same seeded heap under the kernel's KSM and under the library, alternating.

#include <ksmu/ksmu.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "cases.h"
#include "child.h"
#include "command_line.h"
#include "kernel_ksm.h"
#include "table.h"

namespace bench {
namespace ksm = examples::ksm;
namespace {

enum ExitStatus { kOk = 0, kWrongBytes = 1, kUsage = 2, kCannotStart = 3, kFailed = 4, kBelowFloor = 5 };
constexpr char kExitStatuses[] =
    "exit status: 0 everything asked for was measured, whatever the verdicts; 1 wrong bytes in a heap; 2 usage;\n"
    "3 not possible here (no root, KSM in use, the library cannot start); 4 a case failed, or a setting could not be\n"
    "put back; 5 with --check: something is below its floor; 128 + N after signal N.";

examples::CommandLine::Result ParseOptions(int argc, char** argv, Options* o) {
  // The short form changes the defaults, so it has to be known before they are named.
  for (int i = 1; i < argc; ++i) o->short_form = o->short_form || strcmp(argv[i], "--short") == 0;
  if (o->short_form) {
    o->size_mib = 128, o->repetitions = 2, o->latency_mib = 64, o->idle_seconds = 5, o->thp_seconds = 8;
    o->writer_seconds = 2, o->gate_seconds = 2, o->ksm_wait_seconds = 10, o->growth_max_mib = 256;
  }
  examples::CommandLine line(
      "vs_ksm",
      "Measures the library beside the kernel's KSM: the same seeded heap under either, alternating, each repetition "
      "in\n"
      "a process of its own, every heap checked byte by byte afterwards. A table goes to stdout. Needs root: it sets\n"
      "KSM up and puts all its settings back at the end, also after an error or a signal. Without KSM in the kernel\n"
      "only the library is measured.",
      kExitStatuses);
  line.Flag("short", &o->short_form, "a small heap, one or two repetitions: five minutes; fixes the defaults below");
  line.Text("row", "NAME,...", &o->rows, "only these rows; a trailing * stands for anything");
  line.Flag("list", &o->list, "names the rows and what they are made of");
  line.Text("json", "FILE", &o->json, "all raw figures, and the machine");
  line.Number("repetitions", "N", &o->repetitions, 1, 1000, "of each case");
  line.Number("long-repetitions", "N", &o->long_repetitions, 1, 1000, "of the huge pages' row, minutes each");
  line.Number("size", "MIB", &o->size_mib, 16, 1 << 24, "the heap");
  line.Number("latency-size", "MIB", &o->latency_mib, 16, 1 << 20, "the heap of the rows of latencies");
  line.Number("growth-max", "MIB", &o->growth_max_mib, 16, 1 << 24, "the largest heap of the row growth");
  line.Number("copies", "N", &o->copies, 2, 1 << 20, "how often a content that is no one's own appears, on average");
  line.Number("seed", "S", &o->seed, 0, UINT64_MAX, "another seed, other contents and places");
  line.Number("idle-seconds", "S", &o->idle_seconds, 1, 3600, "how long to watch a still heap");
  line.Number("thp-seconds", "S", &o->thp_seconds, 1, 86400, "how long huge pages are to be kept");
  line.Number("writer-seconds", "S", &o->writer_seconds, 1, 3600, "how long a program writes");
  line.Number("gate-seconds", "S", &o->gate_seconds, 1, 3600, "how long gates are watched");
  line.Number("wait", "S", &o->ksm_wait_seconds, 1, 86400, "for 90 % of the savings at default settings");
  line.Flag("keep-map-limit", &o->keep_map_limit, "leave vm.max_map_count alone (some rows want 1,048,576)");
  line.Flag("take-over", &o->take_over, "although KSM is in use: what it has merged for others is unmerged");
  line.Flag("check", &o->check, "exit status 5 if anything is below its floor");
  return line.Parse(argc, argv);
}

bool Matches(const std::string& row, const std::string& names) {
  if (names.empty()) return true;
  std::istringstream list(names);
  for (std::string name; std::getline(list, name, ',');) {
    if (name == row) return true;
    if (!name.empty() && name.back() == '*' && row.compare(0, name.size() - 1, name, 0, name.size() - 1) == 0)
      return true;
  }
  return false;
}

// The rows' cases, and those of other rows that their lines refer to. False: a name that is no row's.
bool Select(const Options& options, std::vector<Case>* cases, std::vector<Line>* lines) {
  std::istringstream list(options.rows);
  for (std::string name; std::getline(list, name, ',');) {
    if (std::none_of(lines->begin(), lines->end(), [&](const Line& line) { return Matches(line.row, name); })) {
      fprintf(stderr, "vs_ksm: there is no row %s; see vs_ksm --list\n", name.c_str());
      return false;
    }
  }
  std::erase_if(*lines, [&](const Line& line) { return !Matches(line.row, options.rows); });
  std::set<std::string> wanted;
  for (const Line& line : *lines) wanted.insert({line.reference, line.subject});
  std::erase_if(*cases, [&](const Case& c) { return !wanted.count(c.id); });
  return true;
}

void List(const std::vector<Case>& cases, const std::vector<Line>& lines) {
  std::string last;
  for (const Line& line : lines) {
    if (line.row != last) printf("%s%s\n", last.empty() ? "" : "\n", line.row.c_str());
    last = line.row;
    printf("  %s: %s%s%s\n", line.what.c_str(), line.subject.c_str(), line.reference.empty() ? "" : " beside ",
           line.reference.c_str());
  }
  printf("\n%zu cases a repetition\n", cases.size());
}

// In a child: this process has to stay without threads, and without anything that a fork would have to consider.
std::string TryLibrary() {
  const Outcome outcome = RunInChild(
      [](Metrics*) {
        if (ksmu_start(nullptr, sizeof(ksmu_options)) != 0) throw std::runtime_error(ksmu_last_error());
      },
      30);
  return outcome.ok ? "" : outcome.error;
}

struct Tally {
  bool failed = false, wrong = false;
};

void RunCase(const Case& c, const Options& options, bool have_ksm, ksm::Settings* settings, Results* results,
             Tally* tally) {
  constexpr double kMaxSeconds = 1800;
  const bool raise = c.map_limit != 0 && !options.keep_map_limit;
  if (raise && !settings->SetMaxMapCount(c.map_limit)) {
    fprintf(stderr, "vs_ksm: vm.max_map_count: %s\n", strerror(errno));
  }
  // What the one before has left behind is no concern of this one.
  if (have_ksm && !ksm::Reset()) fprintf(stderr, "vs_ksm: KSM could not be reset: %s\n", strerror(errno));
  Outcome outcome = RunInChild(c.run, kMaxSeconds);
  if (have_ksm) ksm::Reset();
  if (raise) settings->RestoreMaxMapCount();
  const auto wrong = outcome.metrics.find("wrong_pages");
  if (wrong != outcome.metrics.end() && wrong->second != 0) {
    fprintf(stderr, "vs_ksm: %s: %.0f PAGES ARE WRONG\n", c.id.c_str(), wrong->second);
    tally->wrong = true;
  }
  if (!outcome.ok) {
    if (!g_interrupted) fprintf(stderr, "vs_ksm: %s: %s\n", c.id.c_str(), outcome.error.c_str());
    tally->failed = true;
    return;
  }
  std::ifstream load("/proc/loadavg");
  load >> outcome.metrics["load_average"];
  (*results)[c.id].push_back(std::move(outcome.metrics));
}

int Run(int argc, char** argv) {
  Options options;
  switch (ParseOptions(argc, argv, &options)) {
    case examples::CommandLine::Result::kHelp:
      return kOk;
    case examples::CommandLine::Result::kUsage:
      return kUsage;
    case examples::CommandLine::Result::kRun:
      break;
  }
  std::vector<Case> cases = MakeCases(options);
  std::vector<Line> lines = MakeLines(options, cases);
  if (!Select(options, &cases, &lines)) return kUsage;
  if (options.list) return List(cases, lines), kOk;

  const bool have_ksm = ksm::Available();
  if (geteuid() != 0) {
    fprintf(stderr, "vs_ksm: needs root, to set KSM up and vm.max_map_count\n");
    return kCannotStart;
  }
  if (!have_ksm) {
    fprintf(stderr, "vs_ksm: this kernel has no KSM (/sys/kernel/mm/ksm): only the library is measured\n");
    std::erase_if(cases, [](const Case& c) { return c.side == Side::kKsm; });
  } else if (!ksm::Claim()) {
    fprintf(stderr, "vs_ksm: another comparison with KSM is running (vs_ksm or pagecache)\n");
    return kCannotStart;
  } else if (ksm::InUse() && !options.take_over) {
    fprintf(stderr,
            "vs_ksm: KSM is in use here (run is %lld, pages_shared %lld): --take-over unmerges it meanwhile and puts\n"
            "its settings back at the end\n",
            static_cast<long long>(ksm::Read("run")), static_cast<long long>(ksm::Read("pages_shared")));
    return kCannotStart;
  }
  if (const std::string error = TryLibrary(); !error.empty()) {
    fprintf(stderr, "vs_ksm: the library cannot start: %s\n", error.c_str());
    return kCannotStart;
  }

  CatchSignals();
  ksm::Settings settings;
  std::string error;
  if (have_ksm && !settings.Save(&error)) {
    fprintf(stderr, "vs_ksm: KSM's settings: %s\n", error.c_str());
    return kCannotStart;
  }
  const std::string machine = MachineAsJson(), machine_text = MachineAsText();
  Results results;
  Tally tally;
  // Row by row, so that the two sides of a figure are measured close to each other.
  const uint64_t begun = NowNs();
  for (size_t from = 0, to; from < cases.size() && !g_interrupted; from = to) {
    for (to = from; to < cases.size() && cases[to].row == cases[from].row; ++to) {
    }
    for (uint64_t repetition = 0; repetition < options.repetitions && !g_interrupted; ++repetition) {
      // The short form is to stay short on a slow machine too: once for every case, and again while there is time.
      constexpr uint64_t kShortNs = 180'000'000'000;
      if (options.short_form && repetition > 0 && NowNs() - begun > kShortNs) break;
      for (size_t i = from; i < to && !g_interrupted; ++i) {
        if (cases[i].repetitions != 0 && repetition >= cases[i].repetitions) continue;
        fprintf(stderr, "%6.0f s  %s  %llu/%llu\n", static_cast<double>(NowNs() - begun) * 1e-9, cases[i].id.c_str(),
                static_cast<unsigned long long>(repetition + 1),
                static_cast<unsigned long long>(cases[i].repetitions != 0
                                                    ? std::min(cases[i].repetitions, options.repetitions)
                                                    : options.repetitions));
        RunCase(cases[i], options, have_ksm, &settings, &results, &tally);
      }
    }
  }
  tally.failed = !settings.Restore() || tally.failed;

  printf("%s\n", machine_text.c_str());
  PrintMarkdown(lines, results);
  if (!options.json.empty() && !WriteJson(options.json, options, cases, lines, results, machine)) {
    fprintf(stderr, "vs_ksm: %s: %s\n", options.json.c_str(), strerror(errno));
    tally.failed = true;
  }
  if (g_interrupted) return 128 + g_interrupted;
  if (tally.wrong) return kWrongBytes;
  if (tally.failed) return kFailed;
  const auto below = [&](const Line& line) { return Judge(line, results).below_floor; };
  return options.check && std::any_of(lines.begin(), lines.end(), below) ? kBelowFloor : kOk;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  try {
    return bench::Run(argc, argv);
  } catch (const std::exception& e) {
    // Whatever was set has been put back while this came up.
    fprintf(stderr, "vs_ksm: %s\n", e.what());
    return bench::kFailed;
  }
}
