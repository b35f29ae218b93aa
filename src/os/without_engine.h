// What can be done for the program where no engine runs: never one, not here, or no more.
#pragma once

#include <cstddef>

#include "os/os.h"

namespace ksmu::os {

// For a child made by a raw clone, in which nothing of the library may be used but the kernel: discards the range, and
// puts anonymous memory where pool mappings of the parent's library would show frames again. 0 or -errno.
int DiscardWithoutEngine(Span span);
// The same in a process whose library has been stopped: on a thread with a descriptor table of its own, since the
// program's may be in any state.
int DiscardAfterStop(Span span);
// Just madvise, where there has never been an engine.
int DiscardPlainly(Span span);
// Private anonymous memory for the program, and munmap; plain.
int MapForProgram(std::size_t bytes, Address* out);
int UnmapWithoutEngine(Span span);

}  // namespace ksmu::os
