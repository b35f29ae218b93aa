// USDT probes (provider ksmu): merge, break, gate, skip. Nops until somebody attaches, e.g.
//   bpftrace -e 'usdt:/usr/lib/libksmu.so:ksmu:gate_open { @us = hist(arg2 / 1000); }'
// gate_open(start, pages, ns) · merge(start, pages, first frame) · zero(start, pages) · cow_break(page, frame) ·
// skip(page, reason) · discard(start, end) · remerge(page, frame)
// cow_break is the break of a region with KSMU_F_SYNC_BREAK, as it happens; what the kernel resolves by itself is found by
// a sweep, and counted there. tests/probes_test.py holds this list to what is in the library.
#pragma once

#if __has_include(<sys/sdt.h>)
#include <sys/sdt.h>
#define KSMU_PROBE2(name, a, b) DTRACE_PROBE2(ksmu, name, a, b)
#define KSMU_PROBE3(name, a, b, c) DTRACE_PROBE3(ksmu, name, a, b, c)
#else
#define KSMU_PROBE2(name, a, b) ((void)0)
#define KSMU_PROBE3(name, a, b, c) ((void)0)
#endif
