#include "preload/next.h"

#include <dlfcn.h>
#include <gnu/libc-version.h>

#include <initializer_list>

#include "os/raw.h"

namespace ksmu::preload {

using os::raw::Direct;

Next g_next;
thread_local int t_forwarding = 0;
bool g_next_is_libc = true;

namespace {
template <typename F>
void Find(F* pointer, const char* name) {
  *pointer = reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}
long L(const void* p) { return reinterpret_cast<long>(p); }
}  // namespace

void FindNext() {
  Find(&g_next.mmap, "mmap");
  Find(&g_next.munmap, "munmap");
  Find(&g_next.mremap, "mremap");
  Find(&g_next.mprotect, "mprotect");
  Find(&g_next.pkey_mprotect, "pkey_mprotect");
  Find(&g_next.madvise, "madvise");
  Find(&g_next.posix_madvise, "posix_madvise");
  Find(&g_next.ioctl, "ioctl");
  Find(&g_next._Fork, "_Fork");
  Find(&g_next.clone, "clone");
  Find(&g_next.setstack, "pthread_attr_setstack");
  // libc is where a function is that nobody interposes.
  Dl_info libc{}, next{};
  if (!dladdr(reinterpret_cast<void*>(&gnu_get_libc_version), &libc)) return;
  for (void* function : {reinterpret_cast<void*>(g_next.mmap), reinterpret_cast<void*>(g_next.munmap), reinterpret_cast<void*>(g_next.mremap),
                         reinterpret_cast<void*>(g_next.mprotect), reinterpret_cast<void*>(g_next.madvise)}) {
    g_next_is_libc &= !function || (dladdr(function, &next) && next.dli_fbase == libc.dli_fbase);
  }
}

void* NextMmap(void* at, size_t bytes, int prot, int flags, int fd, off_t offset) {
  if (g_next.mmap && t_forwarding == 0) {
    const Forwarding forwarding;
    return g_next.mmap(at, bytes, prot, flags, fd, offset);
  }
  return AnswerAddress(Direct(SYS_mmap, L(at), static_cast<long>(bytes), prot, flags, fd, offset));
}

int NextMunmap(void* at, size_t bytes) {
  if (g_next.munmap && t_forwarding == 0) {
    const Forwarding forwarding;
    return g_next.munmap(at, bytes);
  }
  return static_cast<int>(Answer(Direct(SYS_munmap, L(at), static_cast<long>(bytes))));
}

void* NextMremap(void* from, size_t bytes, size_t new_bytes, int flags, void* to) {
  if (g_next.mremap && t_forwarding == 0) {
    const Forwarding forwarding;
    return g_next.mremap(from, bytes, new_bytes, flags, to);
  }
  return AnswerAddress(Direct(SYS_mremap, L(from), static_cast<long>(bytes), static_cast<long>(new_bytes), flags, L(to)));
}

int NextMprotect(void* at, size_t bytes, int prot) {
  if (g_next.mprotect && t_forwarding == 0) {
    const Forwarding forwarding;
    return g_next.mprotect(at, bytes, prot);
  }
  return static_cast<int>(Answer(Direct(SYS_mprotect, L(at), static_cast<long>(bytes), prot)));
}

int NextPkeyMprotect(void* at, size_t bytes, int prot, int key) {
  if (g_next.pkey_mprotect && t_forwarding == 0) {
    const Forwarding forwarding;
    return g_next.pkey_mprotect(at, bytes, prot, key);
  }
  return static_cast<int>(Answer(Direct(SYS_pkey_mprotect, L(at), static_cast<long>(bytes), prot, key)));
}

int NextMadvise(void* at, size_t bytes, int advice) {
  if (g_next.madvise && t_forwarding == 0) {
    const Forwarding forwarding;
    return g_next.madvise(at, bytes, advice);
  }
  return static_cast<int>(Answer(Direct(SYS_madvise, L(at), static_cast<long>(bytes), advice)));
}

}  // namespace ksmu::preload
