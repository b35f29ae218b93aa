// Why pages are not merged, and what to do about it: docs/stats.md in a line each.
#pragma once

#include <string_view>

namespace ksmu::tools {

struct ReasonText {
  std::string_view name, what, remedy;  // "": nothing to do
};
// In the order of KSMU_REASON_*, from 1 on.
inline constexpr ReasonText kReasonTexts[] = {
    {"pinned", "somebody holds a reference, most likely for DMA", "if it lasts: unregister the buffers, or keep them in memory that is not advised"},
    {"child", "still shared with a forked child", "for a child that lives long: advise after the fork, or MADV_DONTFORK"},
    {"huge", "in huge pages with too few duplicates to be worth splitting", "lower thp_min_duplicates (0 splits all), or MADV_NOHUGEPAGE"},
    {"map_budget", "merging it would take more mappings than there may be", "sysctl vm.max_map_count=1048576, then raise max_maps"},
    {"locked", "locked (mlock) or sealed (mseal)", "unlock it, if that was not meant"},
    {"protection", "not both readable and writable now", ""},
    {"broken", "was merged, and has been written since", "see remerge_seconds; close descriptors of devices that may pin memory"},
    {"hot", "written in pass after pass, and left alone for a while", "usually nothing; or smart_scan 0"},
    {"swapped", "swapped out, and not read back for this", ""},
    {"ksm", "merged by the kernel's own KSM", "use one of the two"},
    {"inherited", "in a forked child, and merged by its parent", ""},
    {"attributes", "its mapping has a property that frames cannot carry, or is executable", "drop the property, or do not advise this memory"},
    {"pool", "the pool of frames could not grow", "ulimit -f unlimited; more memory, or ksmud --max-frames"},
    {"unwaitable", "the kernel writes to it for threads that cannot wait", ""},
    {"foreign", "another userfaultfd holds it", "advise when that one is done"},
    {"failed", "a system call was refused", "the log of the process says which (KSMU_LOG)"},
};

}  // namespace ksmu::tools
