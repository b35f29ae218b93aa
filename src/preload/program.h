// Reading what a pointer of the program's points at, which may be anywhere.
#pragma once

#include <cstddef>

#include "os/raw.h"

namespace ksmu::preload {

// By the kernel: a bad pointer is an answer, and no signal.
inline bool ReadProgram(const void* from, void* to, size_t bytes) {
  const struct { const void* base; size_t length; } source{from, bytes}, target{to, bytes};
  return os::raw::Direct(SYS_process_vm_readv, os::raw::Direct(SYS_getpid), reinterpret_cast<long>(&target), 1,
                         reinterpret_cast<long>(&source), 1, 0) == static_cast<long>(bytes);
}

}  // namespace ksmu::preload
