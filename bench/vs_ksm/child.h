// One repetition of a case in a process of its own.
#ifndef KSMU_BENCH_VS_KSM_CHILD_H_
#define KSMU_BENCH_VS_KSM_CHILD_H_

#include <csignal>
#include <functional>
#include <string>

#include "measure.h"

namespace bench {

// Set by SIGINT, SIGTERM and SIGHUP: which one.
extern volatile std::sig_atomic_t g_interrupted;
void CatchSignals();

struct Outcome {
  bool ok = false;
  Metrics metrics;    // also of a case that failed, as far as it went
  std::string error;  // why it is not ok
};

// Forks; the child measures, and reports through a pipe. It is ended when it takes longer, or when a signal has come.
Outcome RunInChild(const std::function<void(Metrics*)>& run, double max_seconds);

}  // namespace bench

#endif  // KSMU_BENCH_VS_KSM_CHILD_H_
