#include "os/uffd.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/uio.h>

#include "os/raw.h"
#include "os/uapi.h"

namespace ksmu::os::uffd {
namespace {

template <typename Argument>
int Ioctl(int fd, unsigned long request, Argument* argument) {
  // A shim that watches for the program's registrations has nothing to do with ours.
  return static_cast<int>(raw::RepeatDirect([&] { return raw::Direct(SYS_ioctl, fd, static_cast<long>(request), reinterpret_cast<long>(argument)); }));
}

// UFFDIO_CONTINUE, MOVE, COPY and ZEROPAGE report how far they came in a field of their argument. Part of the work done
// comes back as EAGAIN whatever the reason was; the call for the rest tells the reason. An EAGAIN with nothing done is
// an event that has not been read.
template <typename Step>
Partial Advance(std::size_t bytes, Step step) {
  Partial partial;
  while (partial.done < bytes) {
    std::int64_t moved = 0;
    int error = step(partial.done, &moved);
    if (moved > 0) partial.done += static_cast<std::size_t>(moved);
    if (error == 0 && moved <= 0) error = -EIO;  // cannot be; but never go round for ever
    if (error != 0 && moved <= 0) {
      partial.error = error;
      break;
    }
  }
  return partial;
}

}  // namespace

int Open(bool allow_user_mode_only, bool refuse_kernel_faults, Door* door) {
  constexpr int kFlags = O_CLOEXEC | O_NONBLOCK;
  int error = -EPERM;
  if (!refuse_kernel_faults) {
    // The device first: it is governed by file permissions alone, and so is what an administrator would hand out.
    int device = raw::Repeat([] { return open("/dev/userfaultfd", O_RDWR | O_CLOEXEC); });
    if (device >= 0) {
      int fd = raw::Repeat([&] { return ioctl(device, uapi::kIocNew, kFlags); });
      close(device);
      if (fd >= 0) {
        *door = Door::kDevice;
        return fd;
      }
    }
    error = static_cast<int>(raw::Repeat([] { return syscall(SYS_userfaultfd, kFlags); }));
    if (error >= 0) {
      *door = Door::kSystemCall;
      return error;
    }
  }
  if (allow_user_mode_only && error == -EPERM) {
    error = static_cast<int>(raw::Repeat([] { return syscall(SYS_userfaultfd, kFlags | uapi::kUserModeOnly); }));
    *door = Door::kUserModeOnly;
  }
  return error;
}

int Enable(int fd, std::uint64_t features) {
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = features;
  return Ioctl(fd, UFFDIO_API, &api);
}

int QueryFeatures(int fd, std::uint64_t* features) {
  uffdio_api api{};
  api.api = UFFD_API;
  int error = Ioctl(fd, UFFDIO_API, &api);
  *features = api.features;
  return error;
}

int Register(int fd, Span span, std::uint32_t modes) {
  uffdio_register request{};
  request.range = {span.start, span.bytes};
  if (modes & kMissing) request.mode |= UFFDIO_REGISTER_MODE_MISSING;
  if (modes & kWriteProtect) request.mode |= UFFDIO_REGISTER_MODE_WP;
  if (modes & kMinor) request.mode |= UFFDIO_REGISTER_MODE_MINOR;
  return Ioctl(fd, UFFDIO_REGISTER, &request);
}

int Unregister(int fd, Span span, bool nobody_waits) {
  uffdio_range range{span.start, span.bytes};
  const int error = Ioctl(fd, UFFDIO_UNREGISTER, &range);
  if (!nobody_waits) Wake(fd, span);
  return error;
}

int WriteProtect(int fd, Span span, bool protect) {
  uffdio_writeprotect request{};
  request.range = {span.start, span.bytes};
  request.mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0;
  return Ioctl(fd, UFFDIO_WRITEPROTECT, &request);
}

Partial Continue(int fd, Span span, bool protect) {
  return Advance(span.bytes, [&](std::size_t done, std::int64_t* mapped) {
    uffdio_continue request{};
    request.range = {span.start + done, span.bytes - done};
    request.mode = protect ? uapi::kContinueModeWp : 0;
    int error = Ioctl(fd, UFFDIO_CONTINUE, &request);
    *mapped = request.mapped;
    return error;
  });
}

Partial Move(int fd, Address to, Address from, std::size_t bytes) {
  return Advance(bytes, [&](std::size_t done, std::int64_t* moved) {
    uapi::UffdioMove request{to + done, from + done, bytes - done, uapi::kMoveModeDontWake, 0};
    int error = Ioctl(fd, uapi::kIocMove, &request);
    *moved = request.move;
    return error;
  });
}

Partial Copy(int fd, Address to, const void* from, std::size_t bytes, bool wake) {
  return Advance(bytes, [&](std::size_t done, std::int64_t* copied) {
    uffdio_copy request{};
    request.dst = to + done;
    request.src = reinterpret_cast<std::uint64_t>(from) + done;
    request.len = bytes - done;
    request.mode = wake ? 0 : UFFDIO_COPY_MODE_DONTWAKE;
    int error = Ioctl(fd, UFFDIO_COPY, &request);
    *copied = request.copy;
    return error;
  });
}

Partial ZeroPage(int fd, Span span) {
  return Advance(span.bytes, [&](std::size_t done, std::int64_t* mapped) {
    uffdio_zeropage request{};
    request.range = {span.start + done, span.bytes - done};
    int error = Ioctl(fd, UFFDIO_ZEROPAGE, &request);
    *mapped = request.zeropage;
    return error;
  });
}

int Wake(int fd, Span span) {
  uffdio_range range{span.start, span.bytes};
  return Ioctl(fd, UFFDIO_WAKE, &range);
}

bool EventPending(int fd) {
  uffdio_writeprotect request{};
  return Ioctl(fd, UFFDIO_WRITEPROTECT, &request) == -EAGAIN;
}

bool Alive(int fd, Address page, std::size_t page_bytes) {
  // ESRCH is the only answer that the call gives of a process that has gone. Protecting, not clearing: should the child
  // have moved a registered mapping of its own to this address, one more asynchronous fault is all it gets.
  return WriteProtect(fd, {page, page_bytes}, true) != -ESRCH;
}

int Read(int fd, uffd_msg* messages, std::size_t capacity) {
  iovec vector{messages, capacity * sizeof(uffd_msg)};
  ssize_t bytes = raw::Repeat([&] { return read(fd, messages, vector.iov_len); });
  // Who refuses the one system call, by a filter, may not have thought of the other; and somebody waits for an answer.
  if (bytes == -EPERM || bytes == -EACCES) bytes = raw::Repeat([&] { return readv(fd, &vector, 1); });
  if (bytes == -EAGAIN) return 0;
  return static_cast<int>(bytes < 0 ? bytes : bytes / static_cast<ssize_t>(sizeof(uffd_msg)));
}

}  // namespace ksmu::os::uffd
