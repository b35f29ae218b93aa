// Mapping calls as the program makes them: what is ours is let go of first, what is new is remembered. As the system calls of
// these names: a result, or -errno. `syscall` and the C library's functions both come here.
#pragma once

#include <sys/types.h>

#include <cstddef>

namespace ksmu::preload {

long DoMmap(void* at, size_t bytes, int prot, int flags, int fd, off_t offset);
long DoMunmap(void* at, size_t bytes);
long DoMremap(void* from, size_t bytes, size_t new_bytes, int flags, void* to);
// mprotect; `with_key`: pkey_mprotect
long DoMprotect(void* at, size_t bytes, int prot, int key, bool with_key);
long DoMadvise(void* at, size_t bytes, int advice);
long DoProcessMadvise(int pidfd, const void* vectors, size_t count, int advice, unsigned flags);
// SYS_mlock, SYS_mlock2, SYS_munlock, SYS_mlockall, SYS_munlockall: with the kernel's arguments.
long DoLock(long number, long a, long b, long c);
long DoUnlock(long number, long a, long b);
// Address and length are the arguments `first` and the next. Unmerged first, taken up again afterwards.
long DoOnRange(long number, const long* arguments, int first = 0);

}  // namespace ksmu::preload
