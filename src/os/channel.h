// Packets to and from a process that is trusted no further than its messages: the broker. A SOCK_SEQPACKET socket, never waited
// on but in Wait. All of the calling thread's descriptor table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "os/os.h"

namespace ksmu::os {

class Channel {
 public:
  Channel() = default;
  Channel(const Channel&) = delete;
  ~Channel() { Close(); }

  // 0 or -errno: -ENOENT nothing there, -ECONNREFUSED nobody listens, -ENAMETOOLONG, -EAGAIN too many are waiting already.
  int Connect(const char* path);
  bool open() const { return fd_ >= 0; }
  void Close();
  // The user at the other end, as of when it began to listen.
  int PeerUser(std::uint32_t* uid) const;

  // 0; -EAGAIN: it does not fit now; else the other end has gone.
  int Send(const void* packet, std::size_t bytes, int descriptor = -1);
  // Bytes; -EAGAIN: nothing is there; -EPIPE: the other end has gone; -EMSGSIZE: longer than the buffer. Of descriptors at most
  // `capacity` are taken, and *count says how many; the others are closed.
  std::ptrdiff_t Receive(void* packet, std::size_t bytes, int* descriptors, std::size_t capacity, std::size_t* count);
  // Until something can be received (or sent), or the time is over. False: it is over.
  bool Wait(bool to_send, int timeout_ms);

 private:
  int fd_ = -1;
};

std::uint64_t MonotonicMs();
void CloseDescriptor(int fd);
// A memfd of that size, which nobody can shrink, mapped shared; not inherited over fork. 0 or -errno.
int CreateRing(std::size_t bytes, int* fd, std::byte** out);
// Maps what came by a channel. `inherited`: forked children have it too, and it is writable.
int MapReceived(int fd, std::size_t bytes, bool inherited, std::byte** out);
void UnmapReceived(std::byte* at, std::size_t bytes);
// Gives the memory of a mapped ring back: it is all zeros then, for both sides.
void ClearReceived(std::byte* at, std::size_t bytes);
// What a frames' file has to be: a memfd of that length, which nobody can change. 0 or -errno.
int CheckFramesFile(int fd, std::size_t bytes, File* out);
std::size_t SizeOf(int fd);  // 0: it cannot be told

}  // namespace ksmu::os
