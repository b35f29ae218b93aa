#include "os/channel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstring>
#include <ctime>

#include "os/own_place.h"
#include "os/raw.h"
#include "os/uapi.h"

namespace ksmu::os {

int Channel::Connect(const char* path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::size_t length = std::strlen(path);
  if (length >= sizeof address.sun_path) return -ENAMETOOLONG;
  std::memcpy(address.sun_path, path, length);
  Close();
  const int fd = static_cast<int>(raw::Repeat([] { return socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); }));
  if (fd < 0) return fd;
  const int error = raw::Repeat([&] { return connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address); });
  if (error) {
    close(fd);
    return error;
  }
  fd_ = fd;
  return 0;
}

void Channel::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

int Channel::PeerUser(std::uint32_t* uid) const {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  const int error = raw::Repeat([&] { return getsockopt(fd_, SOL_SOCKET, SO_PEERCRED, &credentials, &size); });
  *uid = credentials.uid;
  return error;
}

int Channel::Send(const void* packet, std::size_t bytes, int descriptor) {
  if (descriptor < 0) {
    const auto sent = raw::Repeat([&] { return send(fd_, packet, bytes, MSG_DONTWAIT | MSG_NOSIGNAL); });
    return sent < 0 ? static_cast<int>(sent) : 0;
  }
  iovec part{const_cast<void*>(packet), bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
  const auto sent = raw::Repeat([&] { return sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL); });
  return sent < 0 ? static_cast<int>(sent) : 0;
}

std::ptrdiff_t Channel::Receive(void* packet, std::size_t bytes, int* descriptors, std::size_t capacity, std::size_t* count) {
  constexpr std::size_t kMost = 4;
  iovec part{packet, bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(kMost * sizeof(int))];
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  *count = 0;
  const auto got = raw::Repeat([&] { return recvmsg(fd_, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC); });
  if (got < 0) return got;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t n = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < n; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
      if (*count < capacity) descriptors[(*count)++] = fd;
      else close(fd);
    }
  }
  if (got == 0) return -EPIPE;
  return message.msg_flags & MSG_TRUNC ? -EMSGSIZE : got;
}

bool Channel::Wait(bool to_send, int timeout_ms) {
  pollfd entry{fd_, static_cast<short>(to_send ? POLLOUT : POLLIN), 0};
  return raw::Repeat([&] { return poll(&entry, 1, timeout_ms); }) > 0;
}

std::uint64_t MonotonicMs() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1000 + static_cast<std::uint64_t>(now.tv_nsec) / 1'000'000;
}

void CloseDescriptor(int fd) { close(fd); }

int CreateRing(std::size_t bytes, int* fd, std::byte** out) {
  int made = static_cast<int>(raw::Repeat([] { return syscall(SYS_memfd_create, "ksmu-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING | uapi::kMfdNoexecSeal); }));
  if (made == -EINVAL)  // before 6.3
    made = static_cast<int>(raw::Repeat([] { return syscall(SYS_memfd_create, "ksmu-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING); }));
  if (made < 0) return made;
  int error = raw::Repeat([&] { return ftruncate(made, static_cast<off_t>(bytes)); });
  if (!error) error = raw::Repeat([&] { return fcntl(made, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW); });
  std::uintptr_t address = 0;
  if (!error) error = raw::Mmap(LastingPlace(bytes), bytes, PROT_READ | PROT_WRITE, MAP_SHARED, made, 0, &address);
  if (!error && (error = raw::Madvise(address, bytes, MADV_DONTFORK))) raw::Munmap(address, bytes);
  if (error) {
    close(made);
    return error;
  }
  raw::Madvise(address, bytes, MADV_DONTDUMP);
  *fd = made;
  *out = reinterpret_cast<std::byte*>(address);
  return 0;
}

int MapReceived(int fd, std::size_t bytes, bool inherited, std::byte** out) {
  std::uintptr_t address = 0;
  const int protection = inherited ? PROT_READ | PROT_WRITE : PROT_READ;
  if (int error = raw::Mmap(LastingPlace(bytes), bytes, protection, MAP_SHARED | MAP_NORESERVE, fd, 0, &address)) return error;
  if (!inherited) {
    if (int error = raw::Madvise(address, bytes, MADV_DONTFORK)) {
      raw::Munmap(address, bytes);
      return error;
    }
  }
  raw::Madvise(address, bytes, MADV_DONTDUMP);
  *out = reinterpret_cast<std::byte*>(address);
  return 0;
}

void UnmapReceived(std::byte* at, std::size_t bytes) { raw::Munmap(reinterpret_cast<std::uintptr_t>(at), bytes); }

void ClearReceived(std::byte* at, std::size_t bytes) { raw::Madvise(reinterpret_cast<std::uintptr_t>(at), bytes, MADV_REMOVE); }

std::size_t SizeOf(int fd) {
  struct stat status {};
  return raw::Repeat([&] { return fstat(fd, &status); }) == 0 && status.st_size > 0 ? static_cast<std::size_t>(status.st_size) : 0;
}

int CheckFramesFile(int fd, std::size_t bytes, File* out) {
  // Nothing but a memfd has seals.
  const int seals = raw::Repeat([&] { return fcntl(fd, F_GET_SEALS); });
  if (seals < 0) return seals;
  struct stat status {};
  if (int error = raw::Repeat([&] { return fstat(fd, &status); })) return error;
  constexpr int kWanted = F_SEAL_SHRINK | F_SEAL_GROW;
  if ((seals & kWanted) != kWanted || static_cast<std::size_t>(status.st_size) != bytes) return -EINVAL;
  out->fd = fd;
  out->device = status.st_dev;
  out->inode = status.st_ino;
  return 0;
}

}  // namespace ksmu::os
