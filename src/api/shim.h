// What the preloaded shim needs of the library besides ksmu.h. Exported under a version of its own, for the shim of the
// same release and for nobody else.
#pragma once

#include <cstddef>

#include "ksmu/ksmu.h"

extern "C" {

// To be called by an object that is initialised before all others (-z initfirst). The library's fork handlers are then the
// last that run before a fork: whatever lock an allocator's handler waits for, nobody holds it who waits for the library.
// `when_loaded` is called when libc and the library are there.
KSMU_API void ksmushim_begin(void (*when_loaded)(void));

// KSMU_SHIM_DORMANT: a forked child of a process with an engine; whatever wakes it starts threads.
enum { KSMU_SHIM_NONE = 0, KSMU_SHIM_RUNNING = 1, KSMU_SHIM_DORMANT = 2, KSMU_SHIM_RAW_CHILD = 3 };
KSMU_API int ksmushim_state(void);

// Whether part of the range may be a region. "No" is certain. Without a lock or a system call; any thread, any moment.
KSMU_API int ksmushim_may_hold(const void* start, size_t length);

// What was part of a region, or may lie in mappings of frames, has been moved there: may_hold says yes from now on. Any thread.
KSMU_API void ksmushim_note(const void* start, size_t length);

// Makes a system call on the scanner's thread, with no merge in hand: for calls that change protection or attributes of
// regions, which a merge would carry over from before. False: no engine is running, nothing was done.
KSMU_API int ksmushim_call(void* start, size_t length, long number, const long* arguments, long* result);

// Before KSMU_UNMERGEABLE of a range in which the program registers a userfaultfd of its own: pages that were written since
// they were merged leave the frames' mappings, too. 0; -EAGAIN: some may not yet, ask again; -EPERM: pinned, perhaps.
KSMU_API int ksmushim_hand_over(void* start, size_t length);

// As ksmu_advise(KSMU_MERGEABLE | flags), where an engine runs; never starts one. 0 or -errno (-EAGAIN: none runs).
KSMU_API int ksmushim_advise(void* start, size_t length, int advice);

// Discards the range as KSMU_DISCARD does, and never starts anything: what an allocator's madvise needs. -errno.
KSMU_API int ksmushim_discard(void* start, size_t length);
// Whether raw discards are exact everywhere: no region was advised with KSMU_F_NO_RAW_DISCARDS.
KSMU_API int ksmushim_raw_discards_are_exact(void);

// The range is being unmapped in a dormant child: not to become a region when it wakes.
KSMU_API void ksmushim_forget(void* start, size_t length);

// Around a fork that runs no atfork handlers (_Fork, clone), and around what must not meet a merge (a seccomp filter). Waits for
// the step that the scanner has in hand, and for nobody else: safe in a signal handler. The thread's signals wait from `prepare` to
// `fork_parent`, or in the child to `fork_child` or `raw_child`: one of them must follow. A false `prepare` did nothing.
KSMU_API int ksmushim_fork_prepare(void);
KSMU_API void ksmushim_fork_parent(void);
KSMU_API void ksmushim_fork_child(void);
// In a child that a clone by number, or with a stack of its own, has made: after a `prepare` or without one.
KSMU_API void ksmushim_raw_child(void);

// The first mapping that ends behind `at`. 0; -ENOENT where there is none; else another -errno: it cannot be looked at (no
// descriptor, no /proc, and no engine that has its own). Any thread, not in a signal handler: it can wait for the engine. Two system
// calls where the kernel has PROCMAP_QUERY (6.11), else a reading of the list. KSMU_SHIM_FRAMES: of a pool's file, the
// parent's in a forked child included; KSMU_SHIM_ANONYMOUS: private, and no stack or special mapping.
enum { KSMU_SHIM_OTHER = 0, KSMU_SHIM_ANONYMOUS = 1, KSMU_SHIM_FRAMES = 2 };
struct ksmushim_mapping {
  void* start;
  void* end;
  int prot;
  int kind;
};
KSMU_API int ksmushim_find_mapping(const void* at, struct ksmushim_mapping* out);

}  // extern "C"
