// The shim is loaded: the functions behind it are found, its environment is read, each function is tried once.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "api/shim.h"
#include "preload/auto.h"
#include "preload/config.h"
#include "preload/next.h"
#include "preload/seen.h"

namespace ksmu::preload {
namespace {

// Without these nothing may be merged: their calls would go unseen.
const char* const kNeeded[] = {"mmap", "mmap64", "munmap", "mremap", "madvise", "mprotect"};
const char* const kWanted[] = {"pkey_mprotect", "posix_madvise", "process_madvise", "mlock", "mlock2", "mlockall", "munlock",
                               "munlockall", "shmat", "prctl", "ioctl", "_Fork", "clone", "syscall", "pthread_attr_setstack"};

// Whether the program's calls of this name come here: another preloaded object may stand before us.
bool IsOurs(const char* name) {
  Dl_info found{}, self{};
  void* const function = dlsym(RTLD_DEFAULT, name);
  if (!function || !dladdr(function, &found) || !dladdr(reinterpret_cast<void*>(&IsOurs), &self)) return false;
  if (found.dli_fbase == self.dli_fbase) return true;
  Log("%s goes to %s and not to the shim", name, found.dli_fname ? found.dli_fname : "another object");
  return false;
}

// On scratch memory, through the functions that the program will call.
const char* FirstThatFails() {
  const long page = sysconf(_SC_PAGESIZE);
  const auto bytes = static_cast<size_t>(page);
  void* at = mmap(nullptr, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return "mmap";
  const char* failed = nullptr;
  const auto check = [&](bool good, const char* name) {
    if (!good && !failed) failed = name;
  };
  *static_cast<volatile char*>(at) = 1;
  check(mprotect(at, bytes, PROT_READ) == 0 && mprotect(at, bytes, PROT_READ | PROT_WRITE) == 0, "mprotect");
  check(madvise(at, bytes, MADV_DONTNEED) == 0 && *static_cast<volatile char*>(at) == 0, "madvise");
  void* const grown = mremap(at, 2 * bytes, 3 * bytes, MREMAP_MAYMOVE);
  check(grown != MAP_FAILED, "mremap");
  if (grown != MAP_FAILED) at = grown;
  check(munmap(at, (grown != MAP_FAILED ? 3 : 2) * bytes) == 0, "munmap");
  return failed;
}

void ResetInChild() {
  if (g_config.active) AutoInChild();
}

// In the library's turn, when libc and the environment are there.
void Load() {
  FindNext();
  ReadConfig();
  if (!g_config.active) return;
  bool complete = true;
  for (const char* name : kNeeded) complete &= IsOurs(name);
  for (const char* name : kWanted) IsOurs(name);
  if (const char* failed = complete ? FirstThatFails() : nullptr) {
    Log("%s does not work through the shim", failed);
    complete = false;
  }
  if (!complete) {
    Log("nothing is merged in this program");
    g_config.active = false;
    return;
  }
  Log("loaded%s", g_config.automatic ? ", merging automatically" : "");
  StartAuto();
  WakeAuto();
}

// Before any other object's (-z initfirst): there is nothing yet but what the loader itself needs.
// The child handlers are the first to run, the prepare handlers the last.
__attribute__((constructor)) void Begin() {
  ksmushim_begin(&Load);
  pthread_atfork(nullptr, nullptr, &ResetInChild);
}

__attribute__((destructor)) void Unload() {
  if (g_config.active) WriteStats();
}

}  // namespace
}  // namespace ksmu::preload
