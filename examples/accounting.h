// What the kernel says about memory and time: the examples put it beside what the library says of itself.
#ifndef KSMU_EXAMPLES_ACCOUNTING_H_
#define KSMU_EXAMPLES_ACCOUNTING_H_

#include <cstdint>

namespace examples {

struct KernelAccount {
  uint64_t pss_bytes = 0;        // Pss + SwapPss of this process; 0: /proc/self/smaps_rollup cannot be read
  uint64_t available_bytes = 0;  // MemAvailable of the whole machine
  uint64_t others_bytes = 0;     // anonymous memory of all other processes, which moves MemAvailable as well
};

// Pss counts a page that is mapped n times as n times 1/n page: one frame, however many places of this process map it.
uint64_t ProcessPss();

uint64_t MemAvailable();

// As far as this user may see them; forked processes that share pages count each page as often.
uint64_t OtherProcessesMemory();

// What this process may still allocate: MemAvailable, or less if its cgroup (version 2) has a limit.
uint64_t AllocatableBytes();

// Reads them once they hold still. The kernel keeps freed pages in per-CPU lists for a second or two, where they do not
// count as available: this waits, at most max_seconds, until MemAvailable varies by less than 1 MiB for over a second.
KernelAccount ReadKernelAccount(double max_seconds = 5.0);

// User and system time of this process's threads named ksmu-*. The kernel reports it in steps of 10 ms.
double LibraryCpuSeconds();

// CLOCK_MONOTONIC.
double NowSeconds();

}  // namespace examples

#endif  // KSMU_EXAMPLES_ACCOUNTING_H_
