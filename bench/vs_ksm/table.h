// From figures to a table: medians, spreads, ratios, and what they are worth beside target and floor.
#ifndef KSMU_BENCH_VS_KSM_TABLE_H_
#define KSMU_BENCH_VS_KSM_TABLE_H_

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cases.h"

namespace bench {

// All repetitions that were measured, by the id of the case.
using Results = std::map<std::string, std::vector<Metrics>>;

struct Spread {
  double median = 0, low = 0, high = 0;
  size_t count = 0;
};
std::optional<Spread> SpreadOf(const Results& results, const std::string& id, const std::string& metric);

// A line of the table: a figure of one case, alone or beside that of another.
struct Line {
  enum Figure { kRatio, kValue, kSlowdownPercent };

  std::string row, what;
  Figure figure = kRatio;
  std::string reference, reference_metric;  // id; "": none
  std::string subject, subject_metric;
  std::string unit;
  double scale = 1;     // from the metric's unit to this one
  bool higher = false;  // more is better
  std::optional<double> target, floor;
  bool merging = false;  // the figure counts only if the subject saved as much
};
std::vector<Line> MakeLines(const Options& options, const std::vector<Case>& cases);

struct Judged {
  std::optional<Spread> reference, subject;  // in the line's unit
  std::optional<Spread> figure;              // its ends: the extremes of the pairs of repetitions
  std::string verdict;
  bool below_floor = false;
  bool more_than = false;            // the subject's value is a lower bound
  bool reference_more_than = false;  // and the reference's
};
Judged Judge(const Line& line, const Results& results);

void PrintMarkdown(const std::vector<Line>& lines, const Results& results);
bool WriteJson(const std::string& path, const Options& options, const std::vector<Case>& cases,
               const std::vector<Line>& lines, const Results& results, const std::string& machine);
std::string MachineAsJson();
std::string MachineAsText();

}  // namespace bench

#endif  // KSMU_BENCH_VS_KSM_TABLE_H_
