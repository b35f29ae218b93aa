// What the broker asks the kernel for on behalf of a domain: the files of its frames, the file of its index, what a member hands
// over (its ring) and what it is given (its canary). All errors are -errno.
#pragma once

#include <array>
#include <cstddef>
#include <utility>
#include <vector>

#include "broker/domain.h"

namespace ksmu::broker {

// A descriptor, closed when it is forgotten.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) Reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~Fd() { Reset(); }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int Release() { return std::exchange(fd_, -1); }
  void Reset(int fd = -1);

 private:
  int fd_ = -1;
};

class Storage final : public Domain::Files {
 public:
  explicit Storage(std::size_t page_bytes) : page_bytes_(page_bytes), looked_at_(page_bytes) {}
  ~Storage() override;
  Storage(const Storage&) = delete;

  // The index: mapped, all zeros.
  int Open();
  std::byte* index() const { return index_; }
  static int PunchIndex(void* self, std::size_t offset, std::size_t bytes);

  int Add() override;
  int Write(Frame frame, const std::byte* page) override;
  int Punch(Frame first, std::size_t count) override;
  bool Holds(Frame frame, const std::byte* page) override;
  bool HasNode(std::uint32_t node) override;
  int Bind(Frame first, std::size_t count, std::uint32_t node) override;

  // What members get: opened for reading only. -1: there is no such file.
  int index_for_members() const { return index_read_only_.get(); }
  int file_for_members(std::size_t number) const { return number < files_.size() ? files_[number].read_only.get() : -1; }

 private:
  struct File {
    Fd own, read_only;
    // Where nodes are kept apart: mapped, to tell where its pages lie; and to which node each chunk is bound.
    const std::byte* mapped = nullptr;
    std::vector<int> nodes;
  };
  bool LiesRight(Frame frame) const;
  int OwnFile(Frame frame) const { return files_[frame / kFramesPerFile].own.get(); }
  long OffsetOf(Frame frame) const { return static_cast<long>(frame % kFramesPerFile * page_bytes_); }
  static constexpr std::size_t kFramesPerFile = Domain::kFramesPerFile, kChunk = Domain::kChunk;

  const std::size_t page_bytes_;
  std::vector<File> files_;
  Fd index_own_, index_read_only_;
  std::byte* index_ = nullptr;
  std::vector<std::byte> looked_at_;
};

// A member's ring: a memfd of its own, which it writes and the broker reads. Never mapped: whatever the member does to it, a read
// ends at once and nothing is raised.
class Ring {
 public:
  // Null: it is one, and this object's. Else why not, and the descriptor is still the caller's.
  const char* Take(int fd, std::size_t pages, std::size_t page_bytes);
  std::size_t pages() const { return pages_; }
  // Zeros, where nothing can be read.
  void Copy(std::size_t place, std::byte* page) const;

 private:
  Fd fd_;
  std::size_t pages_ = 0, page_bytes_ = 0;
};

// A memfd that a member maps writable and shared, and that its children inherit: as long as any of them has it, they may have
// frames, too.
class Canary {
 public:
  int Create(std::size_t page_bytes);
  int for_member() const { return theirs_.get(); }
  void GivenAway() { theirs_.Reset(); }
  // Whether anybody has what was given away: mapped, as a descriptor, or on its way through a socket. Never waits.
  bool InUse() const;

 private:
  Fd own_, theirs_;
};

}  // namespace ksmu::broker
