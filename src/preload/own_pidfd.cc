#include "preload/own_pidfd.h"

#include <fcntl.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "os/raw.h"

namespace ksmu::preload {

using os::raw::Direct;

bool IsOwnPidfd(int pidfd) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/self/fdinfo/%d", pidfd);
  const long fd = Direct(SYS_openat, AT_FDCWD, reinterpret_cast<long>(path), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  char text[512];
  const long got = Direct(SYS_read, fd, reinterpret_cast<long>(text), sizeof text - 1);
  Direct(SYS_close, fd);
  if (got <= 0) return false;
  text[got] = 0;
  const char* pid = std::strstr(text, "\nPid:\t");
  return pid && std::atol(pid + 6) == Direct(SYS_getpid);
}

}  // namespace ksmu::preload
