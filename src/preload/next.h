// The functions behind ours: those of the next object in the program's search order (libc's, as a rule; an allocator's or a
// profiler's own interposition where there is one). Until the shim has been initialised, the kernel itself; so also for
// what nobody is known to interpose (locks, prctl, shmat, process_madvise).
#pragma once

#include <pthread.h>
#include <sys/types.h>

#include <cerrno>
#include <cstddef>

#include "preload/config.h"

namespace ksmu::preload {

struct Next {
  void* (*mmap)(void*, size_t, int, int, int, off_t);
  int (*munmap)(void*, size_t);
  void* (*mremap)(void*, size_t, size_t, int, ...);
  int (*mprotect)(void*, size_t, int);
  int (*pkey_mprotect)(void*, size_t, int, int);
  int (*madvise)(void*, size_t, int);
  int (*posix_madvise)(void*, size_t, int);
  int (*ioctl)(int, unsigned long, void*);
  pid_t (*_Fork)();
  int (*clone)(int (*)(void*), void*, int, void*, ...);
  int (*setstack)(pthread_attr_t*, void*, size_t);
};
extern Next g_next;

// Set while a function behind ours is running, which may be an interposer itself and come back by another name (tcmalloc's
// mmap makes its call by `syscall`): what it does is part of a call that is being seen to.
// Not where what comes next is libc: a signal handler that runs on the way back from the call is then seen to like any other.
extern thread_local int t_forwarding __attribute__((tls_model("initial-exec")));
extern bool g_next_is_libc;
class Forwarding {
 public:
  Forwarding() : counts_(!g_next_is_libc) { t_forwarding += counts_; }
  ~Forwarding() { t_forwarding -= counts_; }
  Forwarding(const Forwarding&) = delete;

 private:
  const bool counts_;
};

void FindNext();  // by dlsym; once, from the constructor

// Of the result of a system call, which may be an address.
inline bool Failed(long result) { return result < 0 && result >= -4095; }
// -errno results as the C library gives them.
inline long Answer(long result) {
  if (!Failed(result)) return result;
  errno = static_cast<int>(-result);
  return -1;
}
inline void* AnswerAddress(long result) { return reinterpret_cast<void*>(Answer(result)); }

// As the functions of these names; errno is set on failure.
void* NextMmap(void* at, size_t bytes, int prot, int flags, int fd, off_t offset);
int NextMunmap(void* at, size_t bytes);
void* NextMremap(void* from, size_t bytes, size_t new_bytes, int flags, void* to);
int NextMprotect(void* at, size_t bytes, int prot);
int NextPkeyMprotect(void* at, size_t bytes, int prot, int key);
int NextMadvise(void* at, size_t bytes, int advice);

// Whether a call is to be looked at.
inline bool Active() { return g_config.active && t_forwarding == 0; }

}  // namespace ksmu::preload
