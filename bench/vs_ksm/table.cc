#include "table.h"

#include <ksmu/ksmu.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <thread>

#include "kernel_ksm.h"

namespace bench {
namespace ksm = examples::ksm;
namespace {

Spread Summarise(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return {n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2, values.front(), values.back(), n};
}

std::vector<double> Values(const Results& results, const std::string& id, const std::string& metric) {
  std::vector<double> values;
  const auto found = results.find(id);
  if (found == results.end()) return values;
  for (const Metrics& metrics : found->second) {
    if (const auto value = metrics.find(metric); value != metrics.end()) values.push_back(value->second);
  }
  return values;
}

bool Any(const Results& results, const std::string& id, const std::string& metric) {
  const std::vector<double> values = Values(results, id, metric);
  return std::any_of(values.begin(), values.end(), [](double v) { return v != 0; });
}

double FigureOf(const Line& line, double reference, double subject) {
  switch (line.figure) {
    case Line::kRatio:
      return subject / reference;
    case Line::kSlowdownPercent:
      return 100 * (reference / subject - 1);  // of a throughput
    case Line::kValue:
      break;
  }
  return subject * line.scale;
}

std::string Format(double value) {
  char text[32];
  const double size = std::fabs(value);
  if (size >= 100) {
    snprintf(text, sizeof text, "%.0f", value);
  } else if (size >= 10) {
    snprintf(text, sizeof text, "%.1f", value);
  } else if (size >= 0.995 || value == 0) {
    snprintf(text, sizeof text, "%.2f", value);
  } else {
    snprintf(text, sizeof text, "%.*g", size < 0.1 ? 2 : 3, value);
  }
  return text;
}

std::string FormatSpread(const std::optional<Spread>& spread, const std::string& unit, bool more_than) {
  if (!spread) return "–";
  std::string text = (more_than ? "> " : "") + Format(spread->median) + (unit.empty() ? "" : " " + unit);
  if (spread->count > 1) text += " (" + Format(spread->low) + "…" + Format(spread->high) + ")";
  return text;
}

std::string Number(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return text;
}

std::string FormatBound(const Line& line, const std::optional<double>& bound) {
  if (!bound) return "";
  std::string text = line.higher ? "≥ " : "≤ ";
  if (line.figure == Line::kRatio && *bound < 0.6) return text + "1/" + Number(std::round(1 / *bound));
  text += Number(*bound);
  if (line.figure == Line::kValue) text += " " + line.unit;
  if (line.figure == Line::kSlowdownPercent) text += " %";
  if (line.figure == Line::kRatio) text += " ×";
  return text;
}

}  // namespace

std::optional<Spread> SpreadOf(const Results& results, const std::string& id, const std::string& metric) {
  std::vector<double> values = Values(results, id, metric);
  if (values.empty()) return std::nullopt;
  return Summarise(std::move(values));
}

Judged Judge(const Line& line, const Results& results) {
  Judged judged;
  const auto scaled = [&line](std::optional<Spread> spread) {
    if (spread) spread->median *= line.scale, spread->low *= line.scale, spread->high *= line.scale;
    return spread;
  };
  if (!line.reference.empty()) judged.reference = scaled(SpreadOf(results, line.reference, line.reference_metric));
  judged.subject = scaled(SpreadOf(results, line.subject, line.subject_metric));
  judged.more_than = Any(results, line.subject, "more_than");
  judged.reference_more_than = !line.reference.empty() && Any(results, line.reference, "more_than");
  if (!judged.subject) return judged.verdict = "not measured", judged;
  if (line.figure == Line::kValue) {
    judged.figure = judged.subject;
  } else {
    if (!judged.reference) return judged.verdict = "nothing to compare with", judged;
    // The median of each side; the extremes are those of the repetitions that ran one after the other.
    Spread figure;
    const double median = FigureOf(line, judged.reference->median, judged.subject->median);
    const std::vector<double> references = Values(results, line.reference, line.reference_metric);
    const std::vector<double> subjects = Values(results, line.subject, line.subject_metric);
    std::vector<double> pairs;
    for (size_t i = 0; i < std::min(references.size(), subjects.size()); ++i) {
      pairs.push_back(FigureOf(line, references[i], subjects[i]));
    }
    figure = Summarise(pairs);
    figure.median = median;
    if (!std::isfinite(median)) return judged.verdict = "nothing to compare with", judged;
    judged.figure = figure;
  }
  const auto holds = [&](double bound) {
    return line.higher ? judged.figure->median >= bound : judged.figure->median <= bound;
  };
  if (line.merging) {
    const auto reference = SpreadOf(results, line.reference, "saved_share");
    const auto subject = SpreadOf(results, line.subject, "saved_share");
    if (reference && subject && subject->median < 0.97 * reference->median) {
      judged.verdict = "incomplete: saved " + Format(100 * subject->median) + " % of what can be, KSM " +
                       Format(100 * reference->median) + " %";
      judged.below_floor = line.floor.has_value();
      return judged;
    }
  }
  if (judged.more_than) {
    judged.verdict = "**not reached in the time allowed**";
    judged.below_floor = line.floor && *line.floor <= judged.figure->median;
  } else if (!line.target && !line.floor) {
    judged.verdict = "reported";
  } else if (line.target && holds(*line.target)) {
    judged.verdict = "target met";
  } else if (!line.floor) {
    judged.verdict = "**target missed**";
  } else if (holds(*line.floor)) {
    judged.verdict = "floor met";
  } else {
    judged.verdict = "**below the floor**";
    judged.below_floor = true;
  }
  return judged;
}

void PrintMarkdown(const std::vector<Line>& lines, const Results& results) {
  printf("\n| row | what | KSM, or nothing | ksmu | figure | target | floor | verdict |\n");
  printf("|---|---|---|---|---|---|---|---|\n");
  for (const Line& line : lines) {
    const Judged judged = Judge(line, results);
    std::string figure = "–";
    if (line.figure == Line::kRatio) figure = FormatSpread(judged.figure, "×", false);
    if (line.figure == Line::kSlowdownPercent) figure = FormatSpread(judged.figure, "%", false);
    if (line.figure == Line::kValue && judged.figure) figure = Format(judged.figure->median) + " " + line.unit;
    printf("| %s | %s | %s | %s | %s | %s | %s | %s |\n", line.row.c_str(), line.what.c_str(),
           FormatSpread(judged.reference, line.unit, judged.reference_more_than).c_str(),
           FormatSpread(judged.subject, line.unit, judged.more_than).c_str(), figure.c_str(),
           FormatBound(line, line.target).c_str(), FormatBound(line, line.floor).c_str(), judged.verdict.c_str());
  }
  fflush(stdout);
}

namespace {

std::string FirstLine(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string ValueOf(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const size_t at = line.find_first_not_of(" \t:", key.size());
    return at == std::string::npos ? "" : line.substr(at);
  }
  return "";
}

std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x20) continue;
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

std::vector<std::pair<std::string, std::string>> Machine() {
  utsname name = {};
  uname(&name);
  char date[32];
  const time_t now = time(nullptr);
  tm parts;
  strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &parts));
  return {{"date", date},
          {"kernel", std::string(name.sysname) + " " + name.release},
          {"architecture", name.machine},
          {"cpu", ValueOf("/proc/cpuinfo", "model name")},
          {"cpus", std::to_string(std::thread::hardware_concurrency())},
          {"memory", ValueOf("/proc/meminfo", "MemTotal")},
          {"page_bytes", std::to_string(sysconf(_SC_PAGESIZE))},
          {"transparent_hugepage", FirstLine("/sys/kernel/mm/transparent_hugepage/enabled")},
          {"max_map_count", FirstLine("/proc/sys/vm/max_map_count")},
          {"load_average", FirstLine("/proc/loadavg")},
          {"ksm", ksm::Available() ? "yes" : "no"},
          {"ksmu", ksmu_version()}};
}

// JSON knows neither infinity nor NaN.
void PrintNumber(FILE* file, double value) {
  if (std::isfinite(value)) {
    fprintf(file, "%.10g", value);
  } else {
    fprintf(file, "null");
  }
}

void PrintSpread(FILE* file, const char* name, const std::optional<Spread>& spread) {
  if (!spread) {
    fprintf(file, ", \"%s\": null", name);
    return;
  }
  fprintf(file, ", \"%s\": {\"median\": ", name);
  PrintNumber(file, spread->median);
  fprintf(file, ", \"low\": ");
  PrintNumber(file, spread->low);
  fprintf(file, ", \"high\": ");
  PrintNumber(file, spread->high);
  fprintf(file, ", \"count\": %zu}", spread->count);
}

void PrintBound(FILE* file, const char* name, const std::optional<double>& bound) {
  fprintf(file, ", \"%s\": ", name);
  if (bound) {
    PrintNumber(file, *bound);
  } else {
    fprintf(file, "null");
  }
}

}  // namespace

std::string MachineAsJson() {
  std::string text;
  for (const auto& [name, value] : Machine()) {
    text += (text.empty() ? "{" : ", ") + Quoted(name) + ": " + Quoted(value);
  }
  return text + "}";
}

std::string MachineAsText() {
  std::string text;
  for (const auto& [name, value] : Machine()) text += (text.empty() ? "" : "; ") + name + " " + value;
  return text;
}

bool WriteJson(const std::string& path, const Options& options, const std::vector<Case>& cases,
               const std::vector<Line>& lines, const Results& results, const std::string& machine) {
  FILE* file = fopen(path.c_str(), "w");
  if (file == nullptr) return false;
  const auto u = [](uint64_t value) { return static_cast<unsigned long long>(value); };
  fprintf(file, "{\n\"machine\": %s,\n", machine.c_str());
  fprintf(file,
          "\"options\": {\"size_mib\": %llu, \"repetitions\": %llu, \"long_repetitions\": %llu, \"copies\": %llu, "
          "\"seed\": %llu, \"latency_mib\": %llu, \"idle_seconds\": %llu, \"thp_seconds\": %llu, "
          "\"writer_seconds\": %llu, \"gate_seconds\": %llu, \"wait_seconds\": %llu, \"short\": %s, "
          "\"keep_map_limit\": %s},\n",
          u(options.size_mib), u(options.repetitions), u(options.long_repetitions), u(options.copies), u(options.seed),
          u(options.latency_mib), u(options.idle_seconds), u(options.thp_seconds), u(options.writer_seconds),
          u(options.gate_seconds), u(options.ksm_wait_seconds), options.short_form ? "true" : "false",
          options.keep_map_limit ? "true" : "false");
  fprintf(file, "\"lines\": [");
  const char* separator = "\n";
  for (const Line& line : lines) {
    static constexpr const char* kFigures[] = {"ratio", "value", "slowdown_percent"};
    const Judged judged = Judge(line, results);
    fprintf(file, "%s{\"row\": %s, \"what\": %s, \"figure_is\": \"%s\", \"unit\": %s, \"higher_is_better\": %s, ",
            separator, Quoted(line.row).c_str(), Quoted(line.what).c_str(), kFigures[line.figure],
            Quoted(line.unit).c_str(), line.higher ? "true" : "false");
    fprintf(file, "\"reference_case\": %s, \"subject_case\": %s, \"metric\": %s", Quoted(line.reference).c_str(),
            Quoted(line.subject).c_str(), Quoted(line.subject_metric).c_str());
    PrintSpread(file, "reference", judged.reference);
    PrintSpread(file, "subject", judged.subject);
    PrintSpread(file, "figure", judged.figure);
    PrintBound(file, "target", line.target);
    PrintBound(file, "floor", line.floor);
    fprintf(file, ", \"reference_more_than\": %s, \"subject_more_than\": %s, \"verdict\": %s}",
            judged.reference_more_than ? "true" : "false", judged.more_than ? "true" : "false",
            Quoted(judged.verdict).c_str());
    separator = ",\n";
  }
  fprintf(file, "\n],\n\"cases\": [");
  separator = "\n";
  for (const Case& c : cases) {
    const auto found = results.find(c.id);
    if (found == results.end()) continue;
    static constexpr const char* kSides[] = {"plain", "ksm", "library"};
    fprintf(file, "%s{\"id\": %s, \"row\": %s, \"side\": \"%s\", \"map_limit\": %llu, \"repetitions\": [", separator,
            Quoted(c.id).c_str(), Quoted(c.row).c_str(), kSides[static_cast<int>(c.side)], u(c.map_limit));
    const char* next = "\n  ";
    for (const Metrics& metrics : found->second) {
      fprintf(file, "%s", next);
      const char* comma = "{";
      for (const auto& [name, value] : metrics) {
        fprintf(file, "%s%s: ", comma, Quoted(name).c_str());
        PrintNumber(file, value);
        comma = ", ";
      }
      fprintf(file, "}");
      next = ",\n  ";
    }
    fprintf(file, "]}");
    separator = ",\n";
  }
  fprintf(file, "\n]\n}\n");
  const bool written = !ferror(file);
  return fclose(file) == 0 && written;
}

}  // namespace bench
