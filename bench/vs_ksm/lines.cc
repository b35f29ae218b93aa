// The lines of the table: every row of the cost targets (docs/performance.md), with target and floor.

#include <algorithm>
#include <cstdio>

#include "table.h"

namespace bench {
namespace {

Line Ratio(const std::string& row, const std::string& what, const std::string& reference, const std::string& subject,
           const std::string& metric, const std::string& unit, double scale) {
  Line line;
  line.row = row;
  line.what = what;
  line.reference = reference;
  line.subject = subject;
  line.reference_metric = line.subject_metric = metric;
  line.unit = unit;
  line.scale = scale;
  return line;
}

Line Bounded(Line line, std::optional<double> target, std::optional<double> floor) {
  line.target = target;
  line.floor = floor;
  return line;
}

Line As(Line line, Line::Figure figure) {
  line.figure = figure;
  return line;
}

void AddCpu(std::vector<Line>* lines) {
  struct Bound {
    uint64_t run;
    std::optional<double> promise_target, promise_floor, exact_target, exact_floor;
  };
  const Bound bounds[] = {{64, 1.0 / 5, 1.0 / 3, 1.0 / 4, 1.0 / 2},
                          {8, 1.0 / 3, 1.0 / 2, 1.0 / 2, 1.0},
                          {3, {}, {}, {}, {}},
                          {1, 1.25, 2.0, 3.0, 4.0}};
  for (const Bound& b : bounds) {
    const std::string row = "cpu_" + std::to_string(b.run);
    for (const char* variant : {"promise-scan", "promise-merge", "exact-scan", "exact-merge"}) {
      const bool promise = variant[0] == 'p', scan = variant[std::string(variant).size() - 1] == 'n';
      char what[120];
      snprintf(what, sizeof what, "CPU to merge, runs of %u, %s, %s", static_cast<unsigned>(b.run),
               promise ? "promise" : "exact", scan ? "scanner" : "ksmu_merge");
      Line line = Bounded(Ratio(row, what, row + "/ksm", row + "/" + variant, "cpu_seconds", "s", 1),
                          promise ? b.promise_target : b.exact_target, promise ? b.promise_floor : b.exact_floor);
      line.merging = true;
      lines->push_back(line);
    }
  }
}

void AddLatencies(std::vector<Line>* lines) {
  constexpr double kUs = 1e-3;
  for (const char* row : {"break", "break_busy"}) {
    const std::string prefix = row, where = prefix == "break" ? "" : ", busy CPUs";
    for (const char* kind : {"async", "sync"}) {
      // The bounds are for what the kernel does by itself; synchronous breaks are documented as slow.
      const bool bounded = prefix == "break" && kind[0] == 'a';
      const auto line = [&](const char* what, const char* metric) {
        return Ratio(row, std::string("break, ") + kind + ", " + what + where, prefix + "/ksm", prefix + "/" + kind,
                     metric, "us", kUs);
      };
      Line sequential = line("sequential, mean", "sequential_mean_ns"),
           isolated = line("isolated, p50", "isolated_p50_ns");
      if (bounded) sequential = Bounded(sequential, 1.0, 1.5), isolated = Bounded(isolated, 1.2, 2.0);
      lines->push_back(sequential);
      lines->push_back(line("sequential, p50", "sequential_p50_ns"));
      lines->push_back(isolated);
      lines->push_back(line("isolated, p99", "isolated_p99_ns"));
      lines->push_back(line("isolated, p99.9", "isolated_p999_ns"));
    }
  }
  for (const char* row : {"gate", "gate_busy"}) {
    const std::string prefix = row, where = prefix == "gate" ? "" : ", busy CPUs";
    for (const char* kind : {"promise", "exact"}) {
      Line p99 =
          As(Ratio(row, std::string("gate shut, p99, ") + kind + where, "", prefix + "/" + kind, "p99_us", "us", 1),
             Line::kValue);
      if (prefix == "gate") p99 = Bounded(p99, 200, 500);
      lines->push_back(p99);
      lines->push_back(As(Ratio(row, std::string("gate shut, longest, ") + kind + where, "", prefix + "/" + kind,
                                "gate_max_us", "us", 1),
                          Line::kValue));
    }
  }
  for (const char* variant : {"library", "library-flat-out"}) {
    const bool as_it_comes = std::string(variant) == "library";
    const std::string pace = as_it_comes ? "default pace" : "flat out", id = std::string("writer/") + variant;
    Line slowdown =
        As(Ratio("writer", "slowdown of a writer, " + pace, id, id, "writes_per_second", "writes/us", 1e-6),
           Line::kSlowdownPercent);
    slowdown.reference_metric = "alone_writes_per_second";
    if (as_it_comes) slowdown = Bounded(slowdown, 2, 5);
    lines->push_back(slowdown);
    slowdown.what = "the same, by the writer's CPU time, " + pace;
    slowdown.reference_metric = "alone_writes_per_cpu_second";
    slowdown.subject_metric = "writes_per_cpu_second";
    slowdown.target.reset(), slowdown.floor.reset();
    lines->push_back(slowdown);
    for (const char* other : {"ksm", "ksm-default"}) {
      const bool flat = std::string(other) == "ksm";
      Line p99 =
          Ratio("writer", "its p99 write latency, " + pace + ", beside KSM " + (flat ? "flat out" : "at defaults"),
                std::string("writer/") + other, id, "write_p99_ns", "us", kUs);
      if (as_it_comes && flat) p99 = Bounded(p99, 1.0, {});
      lines->push_back(p99);
    }
  }
  for (const char* other : {"ksm", "ksm-default"}) {
    const std::string id = std::string("writer/") + other;
    Line slowdown = As(Ratio("writer",
                             std::string("slowdown of a writer under KSM, ") +
                                 (std::string(other) == "ksm" ? "flat out" : "at defaults"),
                             id, id, "writes_per_second", "writes/us", 1e-6),
                       Line::kSlowdownPercent);
    slowdown.reference_metric = "alone_writes_per_second";
    lines->push_back(slowdown);
  }
  for (const char* variant : {"ksm", "scan", "merge"}) {
    for (const char* metric : {"p50", "p99"}) {
      lines->push_back(Ratio("second_region",
                             std::string("page fault elsewhere, ") + metric + ", " +
                                 (variant[0] == 'k'   ? "KSM"
                                  : variant[0] == 's' ? "scanner"
                                                      : "ksmu_merge") +
                                 " beside nothing",
                             "second_region/plain", std::string("second_region/") + variant,
                             std::string("fault_") + metric + "_ns", "us", kUs));
    }
  }
}

void AddGrowth(const std::vector<Case>& cases, std::vector<Line>* lines) {
  for (const Case& c : cases) {
    if (c.row != "growth" || c.side != Side::kLibrary) continue;
    const size_t slash = c.id.rfind('/');
    const std::string prefix = c.id.substr(0, slash), variant = c.id.substr(slash + 1);
    const size_t size_at = prefix.rfind('/');
    const std::string size = prefix.substr(size_at + 1), run = prefix.substr(10, size_at - 10);
    const std::string what = size + " MiB, runs of " + run + ", limit of " + variant.substr(4) + " mappings";
    lines->push_back(Ratio("growth", "CPU, " + what, prefix + "/ksm", c.id, "cpu_seconds", "s", 1));
    Line saved = Ratio("growth", "saved of what can be, " + what, prefix + "/ksm", c.id, "saved_share", "%", 100);
    saved.higher = true;
    lines->push_back(saved);
  }
}

}  // namespace

std::vector<Line> MakeLines(const Options& options, const std::vector<Case>& cases) {
  std::vector<Line> lines;
  AddCpu(&lines);
  lines.push_back(
      Bounded(Ratio("pass", "CPU of a pass, nothing changed", "pass/ksm", "pass/library", "pass_cpu_ms", "ms", 1),
              1.0 / 500, 1.0 / 100));
  lines.push_back(
      Bounded(As(Ratio("idle", "idle CPU, still, both at defaults", "idle/ksm", "idle/library", "idle_percent", "%", 1),
                 Line::kValue),
              0.1, 0.5));
  for (const char* kind : {"promise", "exact"}) {
    lines.push_back(Bounded(As(Ratio("converge", std::string("90 % of the savings, both at defaults, ") + kind,
                                     "converge/ksm", std::string("converge/") + kind, "seconds_to_90", "s", 1),
                               Line::kValue),
                            10, 30));
  }
  // Of another size: scaled to 1 GiB.
  lines.push_back(
      Bounded(As(Ratio("merge_wall", "wall time of ksmu_merge, 1 GiB, runs of 64, promise", "", "cpu_64/promise-merge",
                       "seconds", "s", 1024 / static_cast<double>(options.size_mib)),
                 Line::kValue),
              1, 2));
  for (const char* run : {"64", "8", "1"}) {
    lines.push_back(Bounded(As(Ratio("metadata", std::string("own metadata a tracked page, runs of ") + run, "",
                                     std::string("cpu_") + run + "/promise-merge", "metadata_per_page", "bytes", 1),
                               Line::kValue),
                            16, 24));
  }
  AddLatencies(&lines);
  for (const char* run : {"64", "8"}) {
    const std::string row = std::string("saved_") + run;
    Line line = Bounded(Ratio(row, std::string("saved, by MemAvailable, runs of ") + run, row + "/ksm",
                              row + "/library", "saved_mib", "MiB", 1),
                        1.0, 0.97);
    line.higher = true;
    lines.push_back(line);
  }
  Line thp =
      Bounded(Ratio("thp", "AnonHugePages kept, nothing to merge", "thp/ksm", "thp/library", "huge_kept", "%", 100),
              0.95, 0.90);
  thp.higher = true;
  lines.push_back(thp);
  AddGrowth(cases, &lines);
  return lines;
}

}  // namespace bench
