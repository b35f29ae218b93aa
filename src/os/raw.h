// The conventions of this directory around a raw system call: -errno, and EINTR repeated.
#pragma once

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

namespace ksmu::os::raw {

// Calls until the answer is not EINTR; returns the result, or -errno.
template <typename Call>
auto Repeat(Call call) -> decltype(call()) {
  for (;;) {
    auto result = call();
    if (result >= 0) return result;
    if (errno != EINTR) return -errno;
  }
}

// mmap and mremap return addresses; an error is one of the last 4095 values. Through syscall(2), because the C
// library's mremap hands the kernel whatever lies on the stack as new_address unless MREMAP_FIXED is given, and
// Linux 6.18 refuses an unaligned hint together with MREMAP_DONTUNMAP.
inline int MapResult(long result, std::uintptr_t* out) {
  if (result == -1) return -errno;
  *out = static_cast<std::uintptr_t>(result);
  return 0;
}
inline int Mmap(std::uintptr_t at, std::size_t bytes, int prot, int flags, int fd, std::uint64_t offset,
                std::uintptr_t* out) {
  return MapResult(syscall(SYS_mmap, at, bytes, prot, flags, fd, offset), out);
}
inline int Mremap(std::uintptr_t from, std::size_t bytes, int flags, std::uintptr_t to, std::uintptr_t* out) {
  return MapResult(syscall(SYS_mremap, from, bytes, bytes, flags, to), out);
}
inline int Madvise(std::uintptr_t start, std::size_t bytes, int advice) {
  return static_cast<int>(Repeat([&] { return syscall(SYS_madvise, start, bytes, advice); }));
}

}  // namespace ksmu::os::raw
