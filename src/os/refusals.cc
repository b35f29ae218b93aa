#include "os/refusals.h"

#include <cstring>

namespace ksmu::os {

const char* Refusals::Name(Call call) {
  static const char* const kNames[] = {
      "UFFDIO_REGISTER", "UFFDIO_UNREGISTER", "UFFDIO_WRITEPROTECT", "UFFDIO_CONTINUE", "UFFDIO_MOVE",
      "UFFDIO_COPY", "UFFDIO_ZEROPAGE", "UFFDIO_WAKE", "read of a userfaultfd", "PAGEMAP_SCAN", "madvise", "mmap",
      "mremap", "munmap", "mprotect", "memfd_create or ftruncate", "pwrite to the pool", "fallocate of the pool",
      "mmap of the pool", "move_pages", "mbind of the pool",
  };
  static_assert(sizeof kNames / sizeof *kNames == kCallCount);
  return call < kCallCount ? kNames[call] : "none";
}

const char* ErrorName(int error) {
  const char* name = strerrorname_np(error < 0 ? -error : error);
  return name ? name : "an unknown error";
}

}  // namespace ksmu::os
