// What the tests of the broker's server share: rings and canaries as a member has them, and a member that speaks the protocol by
// hand over a socket, so that it can break every rule of it.
#pragma once

#include <sys/mman.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "broker/shared_index.h"
#include "broker/storage.h"
#include "broker/wire.h"

namespace ksmu::broker::test {

inline constexpr std::size_t kPage = 4096;
using PageOf = std::vector<std::byte>;

PageOf MakePage(std::uint64_t number);
std::uint32_t HashOf(const PageOf& page, std::uint64_t seed);
std::size_t OpenDescriptors();
// In a directory of the test's own, which goes with it.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// A memfd with these seals; SHRINK and GROW are what a ring has.
Fd MakeMemfd(std::size_t bytes, int seals);
Fd MakeRing(std::size_t pages);

// Writes to the file from memory whose faults nobody answers: holds the file's lock in the kernel until it is killed.
[[noreturn]] void WriteForEver(int fd);
bool WaitUntilStopped(pid_t pid);  // in the kernel

class Mapping {
 public:
  Mapping() = default;
  Mapping(int fd, std::size_t bytes, int protection) : bytes_(bytes), at_(mmap(nullptr, bytes, protection, MAP_SHARED | MAP_NORESERVE, fd, 0)) {}
  Mapping(Mapping&& other) noexcept { *this = std::move(other); }
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(at_, other.at_);
    return *this;
  }
  ~Mapping() {
    if (*this) munmap(at_, bytes_);
  }
  explicit operator bool() const { return at_ != MAP_FAILED; }
  std::byte* data() const { return static_cast<std::byte*>(at_); }

 private:
  std::size_t bytes_ = 0;
  void* at_ = MAP_FAILED;
};

struct Packet {
  wire::Message message;
  std::vector<Fd> descriptors;
};

// A member over a socket. Functions return false, or nothing, where the broker has ended the connection or does not answer
// within some seconds.
class Client {
 public:
  explicit Client(const std::string& path);
  bool connected() const { return static_cast<bool>(fd_); }
  int fd() const { return fd_.get(); }
  void Close() { fd_.Reset(); }

  bool SendRaw(const void* bytes, std::size_t count, const std::vector<int>& descriptors = {});
  bool Send(const wire::Message& message, const std::vector<int>& descriptors = {});
  std::unique_ptr<Packet> Receive(int timeout_ms = 10000);
  // What comes meanwhile by itself is kept in wanted().
  std::unique_ptr<Packet> Ask(wire::Message& message, const std::vector<int>& descriptors = {});
  // The connection has ended, or does within this time.
  bool IsEnded(int timeout_ms = 5000);

  bool Join(std::size_t ring_pages = 64);
  std::uint64_t seed() const { return seed_; }
  std::uint32_t member() const { return member_; }
  const std::vector<std::uint32_t>& wanted() const { return wanted_; }

  std::uint32_t HashOf(const PageOf& page) const { return test::HashOf(page, seed_); }
  // Frames, or kNoFrame each; empty: no answer.
  std::vector<std::uint32_t> Publish(const std::vector<PageOf>& pages);
  std::uint32_t Acquire(std::uint32_t frame, std::uint32_t hash);
  bool SendWords(wire::Kind kind, const std::vector<std::uint32_t>& words);
  // By the index. kNoFrame: it is not there.
  std::uint32_t Lookup(std::uint32_t hash) const;
  Fd File(std::uint32_t number);
  // Of a frame; empty: it cannot be had.
  PageOf Read(std::uint32_t frame);

 private:
  Fd fd_;
  std::uint32_t number_ = 0, member_ = 0;
  std::uint64_t seed_ = 0;
  Fd ring_fd_;
  Mapping ring_, canary_, index_;
  std::vector<std::uint32_t> wanted_;
};

}  // namespace ksmu::broker::test
