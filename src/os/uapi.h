// The kernel's newer constants and structures, under names of our own: distribution headers are older than the kernels
// we run on (Debian 12 compiles against 6.1), and later headers must not collide with what stands here. The values are
// the kernel's stable interface.
#pragma once

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#include <cstddef>
#include <cstdint>

namespace ksmu::os::uapi {

// --- userfaultfd(2) ------------------------------------------------------------------------------------------------
inline constexpr std::uint64_t kFeaturePagefaultFlagWp = 1u << 0;
inline constexpr std::uint64_t kFeatureEventFork = 1u << 1;
inline constexpr std::uint64_t kFeatureEventRemap = 1u << 2;
inline constexpr std::uint64_t kFeatureEventRemove = 1u << 3;
inline constexpr std::uint64_t kFeatureEventUnmap = 1u << 6;
inline constexpr std::uint64_t kFeatureMinorShmem = 1u << 10;
inline constexpr std::uint64_t kFeatureWpHugetlbfsShmem = 1u << 12;  // 5.19
inline constexpr std::uint64_t kFeatureWpUnpopulated = 1u << 13;     // 6.4
inline constexpr std::uint64_t kFeatureWpAsync = 1u << 15;           // 6.7
inline constexpr std::uint64_t kFeatureMove = 1u << 16;              // 6.8

inline constexpr int kUserModeOnly = 1;  // flag of userfaultfd(2), 5.11

inline constexpr unsigned long kIocNew = _IO(0xAA, 0x00);  // of /dev/userfaultfd, 6.1

inline constexpr std::uint64_t kContinueModeWp = 1u << 1;  // 6.4

struct UffdioMove {
  std::uint64_t dst, src, len, mode;
  std::int64_t move;
};
inline constexpr unsigned long kIocMove = _IOWR(0xAA, 0x05, UffdioMove);
inline constexpr std::uint64_t kMoveModeDontWake = 1u << 0;
inline constexpr std::uint64_t kMoveModeAllowSourceHoles = 1u << 1;

// --- PAGEMAP_SCAN (6.7) --------------------------------------------------------------------------------------------
struct PageRegion {
  std::uint64_t start, end, categories;
};
struct PagemapScan {
  std::uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  std::uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
inline constexpr unsigned long kIocPagemapScan = _IOWR('f', 16, PagemapScan);
inline constexpr std::uint64_t kScanWpMatching = 1u << 0;
inline constexpr std::uint64_t kScanCheckWpAsync = 1u << 1;

// Bits of an entry of /proc/self/pagemap.
inline constexpr std::uint64_t kPagemapFrame = (1ull << 55) - 1;  // its number, for CAP_SYS_ADMIN; where it is present
inline constexpr std::uint64_t kPagemapExclusive = 1ull << 56;  // mapped exactly once
inline constexpr std::uint64_t kPagemapFile = 1ull << 61;  // or shared memory
inline constexpr std::uint64_t kPagemapSwapped = 1ull << 62;
inline constexpr std::uint64_t kPagemapPresent = 1ull << 63;
inline constexpr std::uint64_t kPageFlagKsm = 1u << 21;  // of /proc/kpageflags

// --- PROCMAP_QUERY (6.11) ------------------------------------------------------------------------------------------
struct ProcmapQuery {
  std::uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
  std::uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
  std::uint64_t vma_name_addr, build_id_addr;
};
static_assert(sizeof(ProcmapQuery) == 104);
inline constexpr unsigned long kIocProcmapQuery = _IOWR('f', 17, ProcmapQuery);
inline constexpr std::uint64_t kProcmapReadable = 1, kProcmapWritable = 2, kProcmapExecutable = 4, kProcmapShared = 8;
inline constexpr std::uint64_t kProcmapCoveringOrNext = 0x10;

// --- the rest ------------------------------------------------------------------------------------------------------
inline constexpr int kMremapDontUnmap = 4;     // 5.7
inline constexpr int kMadvPopulateRead = 22;   // 5.14
inline constexpr int kMadvPopulateWrite = 23;  // 5.14
inline constexpr int kMadvCollapse = 25;       // 6.1
inline constexpr unsigned kMfdNoexecSeal = 8;  // 6.3
inline constexpr unsigned kCloseRangeUnshare = 2;
inline constexpr unsigned kPidfdThread = 0200;  // O_EXCL; 6.9
inline constexpr int kKcmpFiles = 2;

// Socket families that the C library may not name.
inline constexpr int kAfVsock = 40;

}  // namespace ksmu::os::uapi
