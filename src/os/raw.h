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

// A system call past the C library: errno is left alone, and nobody's interposed mmap, munmap or ioctl (our own preloaded
// shim's first of all) takes the library's own for the program's. -errno.
inline long Direct(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0, long f = 0) {
#if defined(__x86_64__)
  long result;
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = f;
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  return result;
#elif defined(__aarch64__)
  register long x8 asm("x8") = number;
  register long x0 asm("x0") = a;
  register long x1 asm("x1") = b;
  register long x2 asm("x2") = c;
  register long x3 asm("x3") = d;
  register long x4 asm("x4") = e;
  register long x5 asm("x5") = f;
  asm volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
  return x0;
#else
  const int saved = errno;
  const long result = syscall(number, a, b, c, d, e, f);
  const long answer = result == -1 ? -errno : result;
  errno = saved;
  return answer;
#endif
}
template <typename Call>
long RepeatDirect(Call call) {
  for (;;) {
    if (const long result = call(); result != -EINTR) return result;
  }
}

// mmap and mremap return addresses; an error is one of the last 4095 values. Not by the C library's mremap, which hands
// the kernel whatever lies on the stack as new_address unless MREMAP_FIXED is given, and Linux 6.18 refuses an unaligned
// hint together with MREMAP_DONTUNMAP.
inline int MapResult(long result, std::uintptr_t* out) {
  if (result < 0 && result >= -4095) return static_cast<int>(result);
  *out = static_cast<std::uintptr_t>(result);
  return 0;
}
inline int Mmap(std::uintptr_t at, std::size_t bytes, int prot, int flags, int fd, std::uint64_t offset,
                std::uintptr_t* out) {
  return MapResult(Direct(SYS_mmap, static_cast<long>(at), static_cast<long>(bytes), prot, flags, fd, static_cast<long>(offset)), out);
}
inline int Mremap(std::uintptr_t from, std::size_t bytes, int flags, std::uintptr_t to, std::uintptr_t* out) {
  return MapResult(Direct(SYS_mremap, static_cast<long>(from), static_cast<long>(bytes), static_cast<long>(bytes), flags, static_cast<long>(to)), out);
}
// Any that takes a range and at most one more argument: munmap, madvise, mprotect, mlock. EINTR is repeated.
inline int OnRange(long number, std::uintptr_t start, std::size_t bytes, int argument = 0) {
  return static_cast<int>(RepeatDirect([&] { return Direct(number, static_cast<long>(start), static_cast<long>(bytes), argument); }));
}
inline int Madvise(std::uintptr_t start, std::size_t bytes, int advice) { return OnRange(SYS_madvise, start, bytes, advice); }
inline int Munmap(std::uintptr_t start, std::size_t bytes) { return OnRange(SYS_munmap, start, bytes); }

}  // namespace ksmu::os::raw
