// The cases: what one fresh process measures in one repetition. A row of the table is made of one or more cases.
#ifndef KSMU_BENCH_VS_KSM_CASES_H_
#define KSMU_BENCH_VS_KSM_CASES_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "measure.h"
#include "subject.h"

namespace bench {

struct Options {
  uint64_t size_mib = 1024, repetitions = 5, long_repetitions = 1, copies = 8, seed = 1;
  uint64_t latency_mib = 256;  // heap of the rows that measure latencies
  uint64_t idle_seconds = 25, thp_seconds = 300, writer_seconds = 10, gate_seconds = 8, ksm_wait_seconds = 60;
  uint64_t growth_max_mib = 8192;
  bool short_form = false, take_over = false, keep_map_limit = false, list = false, check = false;
  std::string rows, json;
};

inline constexpr uint64_t kDefaultMapLimit = 65'530, kLargeMapLimit = 1'048'576;

struct Case {
  std::string row, id;  // id: ROW/VARIANT
  Side side;
  std::function<void(Metrics*)> run;  // in the child; throws if it cannot
  uint64_t map_limit = 0;             // vm.max_map_count meanwhile; 0: as it is
  uint64_t repetitions = 0;           // at most; 0: no less than others
};

// In the order in which they are to be run: sides alternate.
std::vector<Case> MakeCases(const Options& options);

// Used by the files that make cases.
examples::HeapOptions MergeHeap(const Options& options, uint64_t size_mib, uint64_t run_length, uint64_t zero = 0,
                                uint64_t duplicate = 50);
uint64_t PagesOf(uint64_t mib);
inline constexpr double kLongestConvergence = 300;                       // seconds, of anything that runs flat out
void AddMergeCases(const Options& options, std::vector<Case>* cases);    // cpu_*, merge_wall, saved_*, growth
void AddStillCases(const Options& options, std::vector<Case>* cases);    // pass, idle, converge, thp
void AddLatencyCases(const Options& options, std::vector<Case>* cases);  // break*, gate*, writer, second_region

}  // namespace bench

#endif  // KSMU_BENCH_VS_KSM_CASES_H_
