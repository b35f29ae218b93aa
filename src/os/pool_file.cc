#include "os/pool_file.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "os/own_place.h"
#include "os/raw.h"
#include "os/uapi.h"

namespace ksmu::os {
namespace {

// The soft limit is what a write is measured against. Looking first spares the SIGXFSZ that the kernel would leave
// pending on our thread.
bool BeyondFileLimit(std::uint64_t end) {
  rlimit limit{};
  return getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && end > limit.rlim_cur;
}

}  // namespace

int CreatePoolFile(std::size_t bytes, File* out) {
  if (BeyondFileLimit(bytes)) return -EFBIG;
  // Not executable: vm.memfd_noexec=2 demands it. EINVAL: a kernel before 6.3.
  int fd = static_cast<int>(
      raw::Repeat([] { return syscall(SYS_memfd_create, "ksmu-frames", MFD_CLOEXEC | uapi::kMfdNoexecSeal); }));
  if (fd == -EINVAL)
    fd = static_cast<int>(raw::Repeat([] { return syscall(SYS_memfd_create, "ksmu-frames", MFD_CLOEXEC); }));
  if (fd < 0) return fd;
  int error = raw::Repeat([&] { return ftruncate(fd, static_cast<off_t>(bytes)); });
  struct stat status {};
  if (error == 0) error = raw::Repeat([&] { return fstat(fd, &status); });
  if (error != 0) {
    close(fd);
    return error;
  }
  out->fd = fd;
  out->device = status.st_dev;
  out->inode = status.st_ino;
  return 0;
}

Partial WritePoolFile(const File& file, std::uint64_t offset, Address from, std::size_t bytes) {
  Partial partial;
  if (BeyondFileLimit(offset + bytes)) {
    partial.error = -EFBIG;
    return partial;
  }
  while (partial.done < bytes) {
    ssize_t written = raw::Repeat([&] {
      return pwrite(file.fd, reinterpret_cast<const void*>(from + partial.done), bytes - partial.done,
                    static_cast<off_t>(offset + partial.done));
    });
    if (written <= 0) {
      partial.error = written < 0 ? static_cast<int>(written) : -EIO;
      break;
    }
    partial.done += static_cast<std::size_t>(written);
  }
  return partial;
}

int PunchPoolFile(const File& file, std::uint64_t offset, std::size_t bytes) {
  const int error = raw::Repeat([&] {
    return fallocate(file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                     static_cast<off_t>(bytes));
  });
  if (error == 0) return 0;
  // Refused by a filter: the same through a mapping. A frame that stays would show again at a discard after the library
  // has been stopped.
  std::uintptr_t address = 0;
  if (raw::Mmap(PassingPlace(), bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd, offset, &address)) return error;
  const int removed = raw::Madvise(address, bytes, MADV_REMOVE);
  raw::Munmap(address, bytes);
  return removed == 0 ? 0 : error;
}

int MapPoolFile(const File& file, std::size_t bytes, const std::byte** out) {
  std::uintptr_t address = 0;
  if (int error = raw::Mmap(LastingPlace(bytes), bytes, PROT_READ, MAP_SHARED, file.fd, 0, &address)) return error;
  // A child has no use for it, and would hold the frames; a core file has the bytes already, where they are merged.
  if (int error = raw::Madvise(address, bytes, MADV_DONTFORK)) {
    raw::Munmap(address, bytes);
    return error;
  }
  raw::Madvise(address, bytes, MADV_DONTDUMP);
  *out = reinterpret_cast<const std::byte*>(address);
  return 0;
}

}  // namespace ksmu::os
