// The same memory under the kernel's KSM, to be put beside what the library did.
#ifndef KSMU_EXAMPLES_BESIDE_KSM_H_
#define KSMU_EXAMPLES_BESIDE_KSM_H_

#include <sys/uio.h>

#include <string>
#include <vector>

#include "accounting.h"

namespace examples {

struct KsmRun {
  double seconds = 0;      // until savings stopped growing
  double cpu_seconds = 0;  // of ksmd, until then
  uint64_t saved_pages = 0;
  KernelAccount before, after;
};

// Why KSM may not be used here; empty: it may.
std::string WhyNoKsm();

// Has KSM merge the areas, flat out, for at most max_seconds; then unmerges everything and puts all of its settings back,
// also when SIGINT, SIGTERM or SIGHUP come, which are raised again afterwards. False: it could not be set up (stderr).
bool MergeByKsm(const std::vector<iovec>& areas, double max_seconds, KsmRun* run);

}  // namespace examples

#endif  // KSMU_EXAMPLES_BESIDE_KSM_H_
