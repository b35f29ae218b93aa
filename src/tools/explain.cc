// ksmuctl explain: each region of a member, how much of it is merged, and why the rest is not.
#include <cinttypes>
#include <cstdio>

#include "ksmu/ksmu.h"
#include "tools/commands.h"
#include "tools/operator.h"
#include "tools/output.h"
#include "tools/reasons.h"

namespace ksmu::tools {
namespace {

using broker::wire::RegionEntry;

void Print(const RegionEntry& r, std::uint64_t page) {
  std::printf("%" PRIx64 "-%" PRIx64 "  %s MiB%s%s\n", r.start, r.end, MiB(r.end - r.start).c_str(),
              r.flags & KSMU_F_NO_RAW_DISCARDS ? ", no raw discards" : "", r.flags & KSMU_F_SYNC_BREAK ? ", synchronous breaks" : "");
  const auto line = [&](std::string_view name, std::uint64_t pages, std::string_view what, std::string_view remedy) {
    if (pages == 0) return;
    std::printf("  %-12s %10s MiB  %s%s%s\n", std::string(name).c_str(), MiB(pages * page).c_str(), std::string(what).c_str(), remedy.empty() ? "" : "; do: ",
                std::string(remedy).c_str());
  };
  line("merged", r.merged, "maps frames of the domain", "");
  line("zero", r.zero, "was all zeros, and takes no memory", "");
  line("unique", r.still, "still, and without a twin so far", "");
  line("changing", r.changing, "written since the last look, or not looked at yet", "");
  for (std::size_t i = 1; i < KSMU_REASON_COUNT; ++i) line(kReasonTexts[i - 1].name, r.unmerged[i], kReasonTexts[i - 1].what, kReasonTexts[i - 1].remedy);
  if (r.excluded_bytes) line("excluded", r.excluded_bytes / page, "could not be merged when it was advised", "mend the cause, then advise it again");
}

std::string Json(const RegionEntry& r) {
  std::string reasons;
  for (std::size_t i = 1; i < KSMU_REASON_COUNT; ++i) reasons += (i > 1 ? ", " : "") + JsonString(kReasonTexts[i - 1].name) + ": " + std::to_string(r.unmerged[i]);
  return "{\"start\": " + std::to_string(r.start) + ", \"end\": " + std::to_string(r.end) + ", \"flags\": " + std::to_string(r.flags) + ", \"pages_merged\": " +
         std::to_string(r.merged) + ", \"pages_zero\": " + std::to_string(r.zero) + ", \"pages_unshared\": " + std::to_string(r.still) + ", \"pages_volatile\": " +
         std::to_string(r.changing) + ", \"excluded_bytes\": " + std::to_string(r.excluded_bytes) + ", \"excluded_cause\": " + std::to_string(r.excluded_cause) +
         ", \"unmerged\": {" + reasons + "}}";
}

}  // namespace

int RunExplain(int argc, char** argv) {
  OperatorOptions options;
  return Guarded(options, [&] {
    const Arguments arguments("usage: ksmuctl explain PID [option...]\nEach region of a member, how much of it is merged, and why the rest is not.\n", argc, argv, &options);
    if (arguments.help()) return 0;
    if (arguments.rest().size() != 1) arguments.Usage("explain wants a process");
    const std::uint32_t pid = ParsePid(arguments, arguments.rest()[0]);
    Operator op(options);
    const auto regions = op.Explain(op.DomainOf(pid).domain, pid);
    if (options.json) {
      std::string list;
      for (const RegionEntry& region : regions) list += (list.empty() ? "" : ", ") + Json(region);
      std::printf("{\"pid\": %u, \"page_bytes\": %" PRIu64 ", \"regions\": [%s]}\n", pid, op.page_bytes(), list.c_str());
      return 0;
    }
    std::printf("process %u (%s): %zu regions\n", pid, ProcessName(pid).c_str(), regions.size());
    for (const RegionEntry& region : regions) Print(region, op.page_bytes());
    return 0;
  });
}

}  // namespace ksmu::tools
