// userfaultfd: one function for each call, no policy. Addresses and lengths are pages' multiples; errors are -errno.
#pragma once

#include <cstddef>
#include <cstdint>

#include "os/os.h"

struct uffd_msg;

namespace ksmu::os::uffd {

// Which door a context came through: tried in this order.
enum class Door : std::uint8_t { kDevice, kSystemCall, kUserModeOnly };

// A descriptor (non-blocking, close-on-exec) on which Enable has not been called. `door` says how far to go:
// kUserModeOnly is the last resort, taken only where the caller allows it. -EPERM: no door is open.
int Open(bool allow_user_mode_only, bool refuse_kernel_faults, Door* door);
// UFFDIO_API. -EINVAL: a feature that this kernel does not have. -EPERM: EVENT_FORK without CAP_SYS_PTRACE.
int Enable(int fd, std::uint64_t features);
// What the kernel offers, by UFFDIO_API on a descriptor that is of no use afterwards. -errno.
int QueryFeatures(int fd, std::uint64_t* features);

int Register(int fd, Span span, std::uint32_t modes);
// Wakes the waiters itself, unless nobody can wait there: UFFDIO_UNREGISTER does not, where only write protection was
// registered.
int Unregister(int fd, Span span, bool nobody_waits = false);
int WriteProtect(int fd, Span span, bool protect);
Partial Continue(int fd, Span span, bool protect);
Partial Move(int fd, Address to, Address from, std::size_t bytes);
Partial Copy(int fd, Address to, const void* from, std::size_t bytes, bool wake);
Partial ZeroPage(int fd, Span span);
int Wake(int fd, Span span);
// The kernel looks at its count of raised events before it looks at the request: an empty range does no harm and takes
// no lock.
bool EventPending(int fd);
// Whether the address space behind a context still exists. `page` is a page that is registered with no context.
bool Alive(int fd, Address page, std::size_t page_bytes);
// Up to `capacity` messages, 0 when there is none; -errno. -EMFILE and the like: a fork's message waits for a
// descriptor.
int Read(int fd, uffd_msg* messages, std::size_t capacity);

}  // namespace ksmu::os::uffd
