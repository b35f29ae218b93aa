/*
 * ksmu: same-page merging in user space. This header is the manual of the C interface.
 *
 * A program advises private anonymous memory as mergeable. Pages of it with the same content become one shared copy (a
 * frame); the first write to such a page gives the writer its own copy back. Beyond timing and /proc/self/maps the
 * program cannot tell: bytes, zeros after a discard, return codes, errno and isolation after fork stay those of private
 * anonymous memory.
 *
 * THREE RULES
 *
 * 1. MEMORY FROM LIBC'S malloc, calloc, realloc, posix_memalign OR new MUST NOT BE ADVISED, NOR THREAD STACKS, NOR ANY
 *    OTHER MEMORY THAT SOMEBODY ELSE MAY UNMAP. libc unmaps inside libc, unseen; the kernel may hand the address to
 *    another mapping at once, and no interface lets the library replace a mapping only if it is still the same. Take
 *    ksmu_map, ksmu::memory_resource, or mmap of your own.
 * 2. EVERY munmap, mmap(MAP_FIXED) AND mremap OF ADVISED MEMORY MUST BE ANNOUNCED before it is done: by KSMU_RELEASE or
 *    KSMU_UNMERGEABLE, or done by ksmu_unmap, or seen by the preloaded shim. A range that vanishes unannounced while it
 *    is not being merged is noticed and forgotten; do not build on it.
 * 3. Discards (MADV_DONTNEED, MADV_FREE ...) need no announcement, unless KSMU_F_NO_RAW_DISCARDS promised otherwise.
 *    After ksmu_stop, while a child forked before is alive, discard by KSMU_DISCARD: a raw discard of a page that was
 *    written since it was merged shows the old bytes then.
 *
 * What else limits merging (each is counted, see struct ksmu_stats, and explained by ksmu_explain): pages pinned for
 * DMA, shared with a forked child, locked, hugetlb, held by another userfaultfd. After a raw clone(2) (not libc's fork)
 * and where the kernel does not permit EVENT_FORK, a discard in the child of memory merged in the parent can show the
 * old bytes; libc's fork is exact if the child discards through the library. Where pages are merged, the kernel refuses
 * raw madvise(MADV_FREE) and MADV_WIPEONFORK with EINVAL, and MADV_GUARD_INSTALL MUST NOT BE USED (it can spin in the
 * kernel): unmerge first. Executable memory is not merged. docs/limits.md (installed in share/doc/ksmu/docs) has the
 * whole list.
 *
 * CONVENTIONS, valid for every function unless its own text says otherwise
 *
 * Result       0 (or a count) on success; -1 with errno set on failure, and ksmu_last_error() has a sentence about it.
 *              On success errno is left as it was. No C++ exception and no signal ever crosses this interface.
 * Units        Addresses are aligned to the page size (sysconf(_SC_PAGESIZE)); lengths are bytes, rounded up to whole
 *              pages. Counters named pages_* and unmerged_* are pages of that size, *_bytes bytes, *_us microseconds.
 * Structs      are passed with their size as the caller compiled it. The library fills what both know; fields that it
 *              does not know are set to 0. Fields are only ever appended. A size of 0 is EINVAL.
 * Start        The first ksmu_advise(KSMU_MERGEABLE), ksmu_map or ksmu_merge starts the library if ksmu_start has not.
 *              No other function starts it: without it there are no regions, counters read 0, ksmu_set is kept for the
 *              start. So each of these three can also fail with the errors of ksmu_start.
 * Threads      Every function may be called from any thread at any time, concurrently with any other.
 * Signals      No function is async-signal-safe, except ksmu_version. A handler that interrupts one may do everything
 *              but call this library; it may read and write advised memory. The library's threads take no signals.
 * Fork         The library waits for the merge in hand before libc's fork, and the thread's signals (but those that it
 *              raises itself) wait until the fork is over. The child has the same memory, its regions
 *              and tunables, and no threads; its first ksmu_advise, ksmu_map, ksmu_unmap, ksmu_merge or ksmu_set wakes
 *              an engine of its own. In a child that shares the parent's memory (vfork), call nothing here before exec.
 * Memory       No function calls malloc; allocators may call this library under their own locks.
 * Cost         "call": a few microseconds of the caller plus a hand-over to the thread ksmu-scan and back (10 to 100
 *              microseconds, longer while it finishes the batch in hand: at most some 200 microseconds on an idle
 *              machine). Functions that say "local" only read memory of the library.
 *
 * Requires Linux 6.8 or newer and the right to handle page faults of the kernel by userfaultfd (see ksmu_start).
 */
#ifndef KSMU_KSMU_H_
#define KSMU_KSMU_H_

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The interface's version: a program compiled with a newer one must not be linked with an older library. */
#define KSMU_VERSION_MAJOR 0
#define KSMU_VERSION_MINOR 1
#define KSMU_VERSION_PATCH 0

#if defined(__GNUC__)
#define KSMU_API __attribute__((visibility("default")))
#else
#define KSMU_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Advice: exactly one of them, with flags or-ed in where it says so. The values are madvise's own (KSMU_RELEASE has no
 * counterpart), so a call of madvise compiles by substitution.
 */
enum {
  /*
   * Like madvise(MADV_DONTNEED): the range reads as zeros afterwards, and its share in frames is given up. Regions in
   * it stay regions. Any private anonymous memory, advised or not. No flags.
   */
  KSMU_DISCARD = 4,
  /*
   * Like madvise(MADV_MERGEABLE): the range becomes a region (or part of one). With flags; advising again replaces the
   * flags. Adjacent ranges with the same flags may be joined. PROT_NONE and read-only memory is accepted, and merged
   * while it is readable and writable. Pages that were never touched stay untouched and cost nothing.
   */
  KSMU_MERGEABLE = 12,
  /*
   * Like madvise(MADV_UNMERGEABLE): every merged page in the range gets a copy of its own again, and the range is no
   * region any more. Part of a region is fine. Memory that is in no region: success, nothing is done. No flags.
   * Mappings that merging has cut stay cut for a while, and pages written since the merge stay in the run's mapping:
   * see KSMU_RELEASE about mremap, and docs/limits.md.
   */
  KSMU_UNMERGEABLE = 13,
  /*
   * The range is about to be unmapped, replaced or moved: the library lets go of it. Nothing is copied, and nothing in
   * it is merged any more. Until it is unmapped the contents stay readable and writable as they are: merged pages stay
   * shared copy-on-write, and their frames stay in use. A raw discard of what stays merged may then show the old bytes
   * instead of zeros: unmap it, or use KSMU_UNMERGEABLE instead. No flags.
   * Unmapping and replacing work on any range. MOVING OR GROWING by mremap does not: memory that was merged, unmerged
   * or not, can consist of several mappings, and the kernel refuses a range of several with EFAULT (growing: on every
   * kernel; moving: before Linux 6.17, and of registered memory also after). Map anew and copy where mremap fails.
   */
  KSMU_RELEASE = 0x1000,

  /* Flags of KSMU_MERGEABLE and ksmu_map. (In one enum with the advice: C++20 deprecates or-ing two enums.) */

  /*
   * A promise: nobody discards pages of the region but through KSMU_DISCARD (or the shim): no raw madvise
   * (MADV_DONTNEED, MADV_FREE, MADV_REMOVE), no process_madvise, until the range is unmerged or released. Merging is
   * then several times cheaper. If the promise is broken, a discarded page can show its old bytes instead of zeros.
   */
  KSMU_F_NO_RAW_DISCARDS = 0x10000,
  /*
   * First writes to merged pages are reported to the library's event thread before they happen: cow_breaks and the page
   * states are exact at every moment instead of after the next sweep. A first write then takes 15 to 65 microseconds
   * instead of some 2, and follows the limits of synchronous userfaultfd (docs/limits.md).
   */
  KSMU_F_SYNC_BREAK = 0x20000
};

/* Flags of ksmu_start (struct ksmu_options.flags). */
enum {
  /*
   * Go on although only faults of user mode can be handled (vm.unprivileged_userfaultfd=0 and neither the right to
   * /dev/userfaultfd nor CAP_SYS_PTRACE). THE PROGRAM THEN PROMISES that no system call (read, recv, io_uring ...) and
   * no other process touches advised memory: one that meets a page in the middle of a merge fails with EFAULT.
   */
  KSMU_START_USER_MODE_ONLY = 0x1
};

/* Levels of the log callback: those of syslog(3). */
enum { KSMU_LOG_ERROR = 3, KSMU_LOG_WARNING = 4, KSMU_LOG_INFO = 6, KSMU_LOG_DEBUG = 7 };

/* Page states. pages_volatile counts FRESH, pages_unshared STILL, and unmerged_* BROKEN and UNMERGED by reason. */
enum ksmu_page_state {
  KSMU_PAGE_UNTRACKED = 0, /* in no region */
  KSMU_PAGE_ABSENT = 1,    /* in a region, never touched or discarded: nothing to merge, not counted as tracked */
  KSMU_PAGE_FRESH = 2,     /* not known to be still: written since the last look, or not looked at yet */
  KSMU_PAGE_STILL = 3,     /* unwritten for one interval, hashed, no other page like it so far */
  KSMU_PAGE_MERGED = 4,    /* maps a frame */
  KSMU_PAGE_BROKEN = 5,    /* was merged, written since: a private page in a run's mapping; reason BROKEN */
  KSMU_PAGE_ZERO = 6,      /* was all zeros: dropped, reads as zeros, takes no memory */
  KSMU_PAGE_UNMERGED = 7   /* cannot or shall not be merged now; see the reason */
};
#define KSMU_PAGE_STATE_COUNT 8

/* Why a page is not merged. docs/stats.md has a paragraph on each: what it means and what to do. */
enum ksmu_reason {
  KSMU_REASON_NONE = 0,       /* every state but BROKEN and UNMERGED */
  KSMU_REASON_PINNED = 1,     /* pinned, probably for DMA */
  KSMU_REASON_CHILD = 2,      /* shared with a forked child */
  KSMU_REASON_HUGE = 3,       /* in a transparent huge page with too few duplicates to be worth splitting */
  KSMU_REASON_MAP_BUDGET = 4, /* it would cost a mapping that max_maps does not allow, or that does not pay */
  KSMU_REASON_LOCKED = 5,     /* mlock, mlockall or mseal */
  KSMU_REASON_PROTECTION = 6, /* not readable and writable at the moment */
  KSMU_REASON_BROKEN = 7,     /* written after merging, and not merged again (yet): see "remerge" */
  KSMU_REASON_HOT = 8,        /* its segment keeps being written and is left alone for a while */
  KSMU_REASON_SWAPPED = 9,    /* swapped out: not read back for the scanner's sake */
  KSMU_REASON_KSM = 10,       /* the kernel's KSM has merged it */
  KSMU_REASON_INHERITED = 11, /* in a forked child: maps a frame of the parent's pool */
  KSMU_REASON_ATTRIBUTES = 12, /* its mapping has properties that a mapping of frames cannot carry */
  KSMU_REASON_POOL = 13,      /* the pool cannot grow: RLIMIT_FSIZE or memory */
  KSMU_REASON_UNWAITABLE = 14, /* a thread's robust list or exit word lies on it: the kernel would not wait at a gate */
  KSMU_REASON_FOREIGN = 15,   /* another userfaultfd holds it */
  KSMU_REASON_FAILED = 16     /* a system call was refused: the log says which */
};
#define KSMU_REASON_COUNT 17
#define KSMU_REASON_SLOTS 32 /* length of arrays by reason; those from KSMU_REASON_COUNT on are 0 */

/* X(KSMU_REASON_ suffix, counter and reason_name): for those who print them all. NONE has no counter. */
#define KSMU_FOR_EACH_REASON(X) \
  X(PINNED, pinned) \
  X(CHILD, child) \
  X(HUGE, huge) \
  X(MAP_BUDGET, map_budget) \
  X(LOCKED, locked) \
  X(PROTECTION, protection) \
  X(BROKEN, broken) \
  X(HOT, hot) \
  X(SWAPPED, swapped) \
  X(KSM, ksm) \
  X(INHERITED, inherited) \
  X(ATTRIBUTES, attributes) \
  X(POOL, pool) \
  X(UNWAITABLE, unwaitable) \
  X(FOREIGN, foreign) \
  X(FAILED, failed)

/* Options of ksmu_start. All zero is the default of each. */
struct ksmu_options {
  uint32_t flags;     /* KSMU_START_* */
  /*
   * The socket of a broker (ksmud), whose domain this process joins: it shares frames with the other members. NULL: KSMU_BROKER;
   * without that the default socket, $XDG_RUNTIME_DIR/ksmu/default.sock or /run/ksmu/default.sock, if a broker listens there. A
   * directory that is not the effective user's is not looked into.
   * "none": no broker. No broker that may be joined is no error: merging goes on in this process alone, log says why, and it is
   * tried again.
   */
  const char *broker;
  const char *domain; /* a named domain: its socket is NAME.sock in the directory of the broker's. NULL: KSMU_DOMAIN, or none */
  const char *cpus;   /* CPUs for the library's threads, like "0-3,8"; NULL: KSMU_CPUS, or all it may use */
  int64_t max_maps;   /* the tunable max_maps; 0: KSMU_MAX_MAPS, or its default */
  /*
   * Receives messages (a sentence without newline, valid during the call): the start and the stop, and what a user
   * should know of in between, each kind at most once a minute. Called on a thread of the library's own, ksmu-log, which
   * has the program's descriptors and holds nothing that others wait for. It must not throw, nor call ksmu_stop, which
   * waits for it. NULL: no messages, and no such thread.
   */
  void (*log)(int level, const char *message, void *cookie);
  void *log_cookie;
};

/*
 * All counters. Names are KSM's where KSM has one, with KSM's meaning; ksmu_get reads each by its name.
 * "Gauge": the state now; "total": since the start. The balance, true at every reading:
 *
 *   pages_tracked = pages_merged + ksm_zero_pages + pages_unshared + pages_volatile + sum of unmerged_*
 *   pages_merged  = pages_shared + pages_sharing
 *
 * Asynchronous breaks are booked by the sweep after them; KSMU_F_SYNC_BREAK books them at once.
 */
struct ksmu_stats {
  /* KSM's */
  int64_t pages_shared;       /* gauge: frames in use */
  int64_t pages_sharing;      /* gauge: further pages that map them: pages saved, zero pages apart */
  int64_t pages_unshared;     /* gauge: still, hashed, unique so far */
  int64_t pages_volatile;     /* gauge: written since the last look, or not looked at yet */
  int64_t pages_scanned;      /* total: pages read (hashed or compared) */
  int64_t pages_skipped;      /* total: pages passed over because of back-off or smart_scan */
  int64_t full_scans;         /* total: passes over all regions */
  int64_t stable_node_chains; /* gauge: contents that have more than one frame */
  int64_t stable_node_dups;   /* gauge: frames of such contents */
  int64_t ksm_zero_pages;     /* gauge: pages dropped because all zero, and unwritten since */
  int64_t general_profit;     /* gauge, bytes: (pages_sharing + ksm_zero_pages) x page size
                                 - metadata_bytes - 270 x maps_used; can be negative */

  /* ksmu's own */
  int64_t pages_tracked;      /* gauge: populated pages of all regions, merged and zero ones included */
  int64_t pages_merged;       /* gauge: pages that map a frame: pages_shared + pages_sharing */
  int64_t pages_merged_total; /* total: pages that came to map a frame */
  int64_t cow_breaks;         /* total: merged pages that were written */
  int64_t pages_remerged;     /* total: broken pages merged again in place */
  int64_t pages_swept;        /* total: pages whose written-mark was looked at (not read) */
  int64_t discards;           /* total: merged, broken and zero pages that were discarded */
  int64_t metadata_bytes;     /* gauge: the library's own memory */
  int64_t maps_used;          /* gauge: mappings of the process that merging costs */
  int64_t gate_max_us;        /* the longest time that a gate was shut, or a run's pages were out of their place */
  int64_t gate_count;         /* total: gates shut */
  int64_t unmerge_bytes;      /* gauge: memory that unmerging everything would take */
  int64_t regions;            /* gauge */
  int64_t region_bytes;       /* gauge: their length, untouched pages included */
  int64_t frames_in_use;      /* gauge: places of the pool not reusable yet: pages_shared, and those whose frame is gone
                                 but which a mapping, or a forked child, may still show */
  int64_t pool_bytes;         /* gauge: memory that the pool takes */
  int64_t children;           /* gauge: forked children whose contexts are served */
  int64_t starts;             /* total: how often the library was started in this process */

  /* gauges: pages not merged, by reason; see enum ksmu_reason */
  int64_t unmerged_pinned;
  int64_t unmerged_child;
  int64_t unmerged_huge;
  int64_t unmerged_map_budget;
  int64_t unmerged_locked;
  int64_t unmerged_protection;
  int64_t unmerged_broken;
  int64_t unmerged_hot;
  int64_t unmerged_swapped;
  int64_t unmerged_ksm;
  int64_t unmerged_inherited;
  int64_t unmerged_attributes;
  int64_t unmerged_pool;
  int64_t unmerged_unwaitable;
  int64_t unmerged_foreign;
  int64_t unmerged_failed;
  int64_t gate_p99_us;        /* the 99th percentile of such times, at most a quarter too much */
};

/* X(field) for every field of struct ksmu_stats, in its order. */
#define KSMU_FOR_EACH_COUNTER(X) \
  X(pages_shared) \
  X(pages_sharing) \
  X(pages_unshared) \
  X(pages_volatile) \
  X(pages_scanned) \
  X(pages_skipped) \
  X(full_scans) \
  X(stable_node_chains) \
  X(stable_node_dups) \
  X(ksm_zero_pages) \
  X(general_profit) \
  X(pages_tracked) \
  X(pages_merged) \
  X(pages_merged_total) \
  X(cow_breaks) \
  X(pages_remerged) \
  X(pages_swept) \
  X(discards) \
  X(metadata_bytes) \
  X(maps_used) \
  X(gate_max_us) \
  X(gate_count) \
  X(unmerge_bytes) \
  X(regions) \
  X(region_bytes) \
  X(frames_in_use) \
  X(pool_bytes) \
  X(children) \
  X(starts) \
  X(unmerged_pinned) \
  X(unmerged_child) \
  X(unmerged_huge) \
  X(unmerged_map_budget) \
  X(unmerged_locked) \
  X(unmerged_protection) \
  X(unmerged_broken) \
  X(unmerged_hot) \
  X(unmerged_swapped) \
  X(unmerged_ksm) \
  X(unmerged_inherited) \
  X(unmerged_attributes) \
  X(unmerged_pool) \
  X(unmerged_unwaitable) \
  X(unmerged_foreign) \
  X(unmerged_failed) \
  X(gate_p99_us)

/* One region. pages_tracked = pages_merged + pages_zero + pages_unshared + pages_volatile + pages_unmerged. */
struct ksmu_region_stats {
  void *start;
  size_t length; /* bytes */
  int64_t flags; /* KSMU_F_* */
  int64_t pages_tracked;
  int64_t pages_merged;
  int64_t pages_unshared;
  int64_t pages_volatile;
  int64_t pages_zero;
  int64_t pages_unmerged;              /* the sum of unmerged[] */
  int64_t unmerged[KSMU_REASON_SLOTS]; /* pages by KSMU_REASON_* */
  int64_t excluded_bytes; /* bytes of [start, start + length) that could not be merged, whatever they contain, when they
                             were advised; they are left alone until they are advised again, but for what another
                             userfaultfd held: that is asked about once a second */
  int64_t excluded_cause; /* why, for the first of them, as ksmu_advise has it: EOPNOTSUPP, ENOMEM, EBUSY; else 0 */
};

/* One page. */
struct ksmu_page_info {
  int state;               /* KSMU_PAGE_* */
  int reason;              /* KSMU_REASON_* */
  const char *state_name;  /* "fresh", "merged" ...; static, never NULL */
  const char *reason_name; /* "pinned", "map_budget" ...; static; "" if the reason is NONE */
  int64_t sharers;         /* merged: pages that map its frame, this one included; else 0 */
  int64_t heat;            /* its segment (2 MiB) is looked at every 2^heat passes: 0 calm */
  int64_t next_look_ms;    /* until it is looked at again, at the present pace; -1: not foreseen (run=0, not tracked) */
  int64_t huge;            /* 1: mapped by a huge page; 0: not */
};

/*
 * Gives advice about [addr, addr + length): see KSMU_DISCARD, KSMU_MERGEABLE, KSMU_UNMERGEABLE, KSMU_RELEASE. Stands in
 * for madvise(2) with these values; passes no other advice on.
 * Units     addr page-aligned; length in bytes, rounded up to pages; 0 succeeds without doing anything.
 * Lifetime  a region lasts until it is unmerged, released, or unmapped by ksmu_unmap, or until ksmu_stop. Rules 1 and 2
 *           at the top of this file apply from KSMU_MERGEABLE on.
 * Errors    EINVAL      addr not aligned, overflow; unknown advice or flag, a flag without KSMU_MERGEABLE.
 *           ENOMEM      holes in the range: what is mapped has been advised (unmerged, discarded) all the same, as
 *                       madvise does; ksmu_last_error() tells this from the next. Or no memory for the library's data.
 *                       KSMU_UNMERGEABLE: the copies would not fit into free memory, swap and the cgroup's limit; what
 *                       was copied back stays so, the rest stays merged, and a region.
 *           EOPNOTSUPP  KSMU_MERGEABLE: nothing in the range can be merged: shared, file-backed, hugetlb, locked, a
 *                       stack, libc's heap, special. A mixed range succeeds; ksmu_read_region shows the rest.
 *           EBUSY       KSMU_MERGEABLE: another userfaultfd holds all of it that could be merged. The advice stands: what
 *                       the other has let go of becomes a region a second or two later, until it is KSMU_UNMERGEABLE.
 *           EAGAIN      the library is being stopped. KSMU_UNMERGEABLE: or another thread is moving the memory; ask
 *                       again.
 *           KSMU_DISCARD also has those of madvise(MADV_DONTNEED); KSMU_MERGEABLE those of ksmu_start.
 * Safety    threads yes; signals no; fork yes. The program may go on using the memory meanwhile.
 * Cost      MERGEABLE: a call, and a few system calls for each mapping in the range, whatever its length; nothing is
 *           read. UNMERGEABLE: for each merged page some 5 microseconds in runs of 64, 7 in runs of 16, 46 if it is
 *           alone. RELEASE, DISCARD: a call, and the kernel's cost; memory in no region: the kernel's cost alone.
 */
KSMU_API int ksmu_advise(void *addr, size_t length, int advice);

/*
 * Maps zeroed private anonymous memory, readable and writable, that is a region from birth, with KSMU_F_NO_RAW_DISCARDS
 * implied: discard it by KSMU_DISCARD only. Returns its address, or MAP_FAILED (sys/mman.h) with errno set.
 * Units     length in bytes, rounded up to pages. flags: 0 or KSMU_F_* or-ed.
 * Lifetime  the mapping is the caller's until ksmu_unmap. After ksmu_stop it stays mapped, with its contents.
 * Errors    EINVAL length 0 or overflow, unknown flag; ENOMEM; EAGAIN being stopped; those of ksmu_start.
 * Safety    threads yes; signals no; fork yes: the child inherits it as its own copy.
 * Cost      a call and an mmap.
 */
KSMU_API void *ksmu_map(size_t length, unsigned flags);

/*
 * Unmaps [addr, addr + length): KSMU_RELEASE and munmap(2) in one. Any memory: from ksmu_map, advised, or neither; part
 * of a mapping is fine.
 * Units     addr page-aligned; length in bytes, rounded up to pages.
 * Lifetime  the addresses are free afterwards, and nothing of the library points to them.
 * Errors    EINVAL addr not aligned, length 0, overflow; ENOMEM as munmap (the map limit; nothing is unmapped then).
 * Safety    threads yes; signals no; fork yes.
 * Cost      a call and a munmap; nothing is copied.
 */
KSMU_API int ksmu_unmap(void *addr, size_t length);

/*
 * Merges now: on return, what in the range can be merged, with other pages of it or with any other region, is. Needs no
 * stillness (the gate proves that nobody writes), and obeys neither run=0 nor cpu_limit_percent nor the back-off of hot
 * pages. Huge pages and the map budget are heeded as always, and broken pages (merged and written since) stay as they
 * are until remerge_seconds have passed.
 * Units     addr page-aligned; length in bytes, rounded up to pages. Memory in no region is passed over; so (NULL,
 *           SIZE_MAX rounded down to pages) is all regions. Returns the number of pages that came to share a
 *           frame (the first of its content included) or were dropped as zero; not those that were merged before.
 * Lifetime  what is merged stays so until written, discarded, unmerged or unmapped.
 * Errors    EINVAL addr not aligned, overflow; ENOMEM no memory for the library's data; EINTR a signal came: what is
 *           merged is merged, nothing is half done, call again; EAGAIN being stopped; those of ksmu_start.
 *           A page that cannot be merged is no error: it has a reason.
 * Safety    threads yes, one after another; signals no; fork yes. Threads that touch a page under work wait for it, at
 *           most some 200 microseconds on an idle machine.
 * Cost      with the promise of KSMU_F_NO_RAW_DISCARDS about 1 second for 1 GiB in runs of 64 equal pages; some 0.2
 *           microseconds for each page that has no twin.
 */
KSMU_API ssize_t ksmu_merge(void *addr, size_t length);

/*
 * Reads a counter (a field of struct ksmu_stats) or a tunable (see ksmu_set) by name.
 * Units     as the field or the table says.
 * Lifetime  name and value are used during the call only.
 * Errors    EINVAL name or value is NULL; ENOENT no such name.
 * Safety    threads yes; signals no; fork yes: a child's counters start at 0.
 * Cost      a counter: as ksmu_read_stats; a tunable: local.
 */
KSMU_API int ksmu_get(const char *name, int64_t *value);

/*
 * Sets a tunable. Before the start the value is kept for it. Initial values come from the environment where it has them
 * (the name in capitals after KSMU_, like KSMU_PAGES_TO_SCAN; not read in setuid programs).
 *
 *   name               default range     meaning
 *   run                1       0, 1, 2   0: stop scanning, keep what is merged; the call returns when nothing is being
 *                                        merged any more, but by ksmu_merge. 1: scan. 2: stop and unmerge all;
 *                                        regions stay regions; the call returns when all is unmerged
 *   pages_to_scan      0       0 ..      pages read in a batch; 0: as many as cpu_limit_percent allows. Up to 8 MiB are read at a
 *                                        time; where that is many batches, their sleeps come as one
 *   sleep_millisecs    20      0 ..      sleep between two batches, milliseconds
 *   cpu_limit_percent  10      0 .. 100  CPU time of the scanner, percent of one CPU; 0: no limit. What was not used is saved
 *                                        up, to one second of CPU time: for a process that begins, or new memory
 *   use_zero_pages     1       0, 1      1: drop pages that are all zeros. 0: merge them like any other content
 *   max_page_sharing   256     2 ..      pages that map one frame; beyond it the content gets a further frame. EBUSY
 *                                        while anything is shared
 *   smart_scan         1       0, 1      1: back off from memory that keeps being written, sample huge pages. 0:
 *                                        look at all memory in every pass; what is unchanged for three passes is merged
 *   remerge            1       0, 1      1: merge broken pages again in place, where no pin can be on them
 *   remerge_seconds    60      0 ..      but not before they have been unwritten for so long, seconds. IT MUST EXCEED
 *                                        THE LONGEST TIME FOR WHICH ANY WRITE BY THE KERNEL OR A DEVICE INTO THE
 *                                        PROGRAM'S MEMORY CAN BE UNDER WAY (direct I/O, process_vm_writev): the
 *                                        page that such a write claimed would be replaced under it, the write lost.
 *                                        Where files of NFS, Ceph (O_DIRECT) or 9p are open no page is merged
 *                                        that was written less than so long ago
 *   remerge_quick_seconds 10   0 ..      the same, where no open descriptor can have a device write into the program's memory, and
 *                                        none could for the last remerge_seconds: no O_DIRECT, block device, io_uring,
 *                                        AIO, KVM, no file but on ext4, XFS, Btrfs, tmpfs, procfs and the like. The
 *                                        smaller of the two is used
 *   advisor_mode       0       0, 1      1: scan-time, KSM's advisor: pages_to_scan follows what is tracked, so that all of it
 *                                        passes in advisor_target_scan_time, and cannot be set (EINVAL). Changing
 *                                        the mode sets pages_to_scan to 0. cpu_limit_percent holds all the same
 *   advisor_max_cpu    70      1 .. 100  with the advisor: no more of one CPU than this, percent
 *   advisor_min_pages_to_scan 500, advisor_max_pages_to_scan 30000
 *                              1 ..      with the advisor: bounds of pages_to_scan
 *   advisor_target_scan_time 200 1 ..    with the advisor: seconds
 *   merge_across_nodes 1       0, 1      0: pages are merged with pages of the same NUMA node only, in memory of that
 *                                        node; zero pages on all. 1: with any. EBUSY while anything is shared. On a
 *                                        machine with one node both are the same. In a domain the broker's setting holds
 *                                        (ksmud --merge-across-nodes), and this one from when the process is alone again.
 *                                        EOPNOTSUPP a filter of system calls refuses move_pages(2)
 *   max_maps           0       0 ..      mappings that merging may add to the process; 0: from vm.max_map_count, less a
 *                                        reserve for the program. Lowering it unmerges nothing
 *   thp_min_duplicates 64      0 .. 512  split a huge page if so many of its 512 are expected to merge or to be zero,
 *                                        by a sample of one content in 16. 0 and 1 split all, without sampling,
 *                                        as does smart_scan 0
 *
 * Units     as the table says.
 * Lifetime  until set again; kept over ksmu_stop and a later start; a forked child inherits it.
 * Errors    EINVAL name is NULL, value out of range; ENOENT no such name; EACCES the name is a counter; EBUSY see
 *           max_page_sharing; EOPNOTSUPP see merge_across_nodes; ENOMEM run=2: would not fit into memory (as for
 *           KSMU_UNMERGEABLE; run is 2 then, the rest stays merged, set it again to go on); EAGAIN being stopped.
 * Safety    threads yes; signals no; fork yes.
 * Cost      a call; run=0: and what the scanner has in hand, milliseconds; run=2: as KSMU_UNMERGEABLE, for each merged
 *           page.
 */
KSMU_API int ksmu_set(const char *name, int64_t value);

/*
 * Reads all counters at one moment, consistent with each other: the balance holds.
 * Units     see struct ksmu_stats. size is sizeof(struct ksmu_stats).
 * Lifetime  *stats is written during the call only.
 * Errors    EINVAL stats is NULL or size is 0.
 * Safety    threads yes; signals no; fork yes: a child's counters start at 0.
 * Cost      a call.
 */
KSMU_API int ksmu_read_stats(struct ksmu_stats *stats, size_t size);

/*
 * Reads the first region that ends above addr; so that a loop which starts with NULL and goes on with start + length
 * reads all. addr needs no alignment and need not be in a region.
 * Units     see struct ksmu_region_stats. size is sizeof(struct ksmu_region_stats).
 * Lifetime  *stats is written during the call only; the region can be gone when it returns.
 * Errors    ENOENT no such region; EINVAL stats is NULL or size is 0.
 * Safety    threads yes; signals no; fork yes.
 * Cost      a call; in proportion to the populated part of the region.
 */
KSMU_API int ksmu_read_region(const void *addr, struct ksmu_region_stats *stats, size_t size);

/*
 * Explains one page: its state, why it is not merged, when it will be looked at again. addr needs no alignment. Memory
 * in no region succeeds: KSMU_PAGE_UNTRACKED. The page itself is not touched.
 * Units     see struct ksmu_page_info. size is sizeof(struct ksmu_page_info).
 * Lifetime  *info is written during the call only; the names are static.
 * Errors    EINVAL info is NULL or size is 0.
 * Safety    threads yes; signals no; fork yes.
 * Cost      a call and a system call.
 */
KSMU_API int ksmu_explain(const void *addr, struct ksmu_page_info *info, size_t size);

/*
 * Starts the library: probes the kernel, opens its userfaultfd contexts in a descriptor table of its own, starts the
 * threads ksmu-scan and ksmu-event (and ksmu-log for a log callback). Optional: the first use starts it with defaults
 * and the environment: the tunables (see ksmu_set), KSMU_BROKER, KSMU_DOMAIN, KSMU_CPUS, and KSMU_USER_MODE_ONLY=1 for
 * KSMU_START_USER_MODE_ONLY.
 * Starts are counted (a start by first use is one): each successful call asks for one ksmu_stop. Started already by
 * ksmu_start with the same options or by first use with what these options ask for: one more is counted.
 * Units     options may be NULL: defaults. size is sizeof(struct ksmu_options).
 * Lifetime  *options and its strings are copied; log and log_cookie stay in use until the last ksmu_stop has returned.
 * Errors    EALREADY   started with other options.
 *           EINVAL     unknown flag, malformed cpus, negative max_maps, size 0, a bad value in the environment; a broker's
 *                      path that does not begin with '/' (and is not "none"), or is too long; a malformed domain name.
 *           EPERM      no right to userfaultfd: ksmu_last_error() says which command mends it.
 *           ENOSYS     the kernel is too old: ksmu_last_error() names the missing feature. Or mlockall(MCL_FUTURE) is
 *                      in force.
 *           ENOMEM, EMFILE, ENFILE, EAGAIN  no memory, descriptors or threads; EAGAIN also: being stopped.
 *           A failed start changes nothing, and may be tried again.
 * Safety    threads yes; signals no; fork yes: the child's engine starts with the same options.
 * Cost      some milliseconds, most of it probing.
 */
KSMU_API int ksmu_start(const struct ksmu_options *options, size_t size);

/*
 * Takes one start back. The last one unmerges everything (as run=2), forgets all regions and ends the threads; memory
 * stays mapped, with its contents. A program that just exits need not call it. Pages written since they were merged
 * stay in a mapping of the pool; while a child forked before is alive, a raw discard of one shows the old bytes, not
 * zeros: discard by KSMU_DISCARD, which works after the stop too.
 * Lifetime  after the last no thread and no descriptor of the library is left, and of its mappings but a few pages. It
 *           may be started again.
 * Errors    EINVAL not started; ENOMEM unmerging would not fit into memory: the rest stays merged, the library goes on
 *           running, the start is not taken back; EAGAIN another thread is in the last ksmu_stop, or is moving merged
 *           memory, or pages merged in a broker's domain were written less than remerge_seconds ago; EPERM such pages may
 *           be pinned: as for ENOMEM, stop again.
 * Safety    threads yes, also with others in the middle of any function: these finish or fail with EAGAIN; signals no;
 *           fork yes.
 * Cost      the last: as KSMU_UNMERGEABLE for each merged page, and some milliseconds.
 */
KSMU_API int ksmu_stop(void);

/*
 * The calling thread's last failure in this library: one sentence, and what to do about it. "" if there was none.
 * Lifetime  valid until the thread's next call that fails, or its end. Never NULL.
 * Errors    none; errno is left alone.
 * Safety    threads: each has its own; signals no; fork yes.
 * Cost      local.
 */
KSMU_API const char *ksmu_last_error(void);

/*
 * The library's version, like "0.1.0", as linked at run time (KSMU_VERSION_* is the header's).
 * Lifetime  static.
 * Errors    none; errno is left alone.
 * Safety    threads, signals and fork yes.
 * Cost      local.
 */
KSMU_API const char *ksmu_version(void);

#ifdef __cplusplus
}
#endif

#endif /* KSMU_KSMU_H_ */
