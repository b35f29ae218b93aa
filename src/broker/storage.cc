#include "broker/storage.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "broker/nodes.h"
#include "os/uapi.h"

namespace ksmu::broker {
namespace {

template <typename F>
auto Repeat(F&& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

int CreateMemfd(const char* name, std::size_t bytes, unsigned mode, Fd* out) {
  const auto create = [&](unsigned flags) { return static_cast<int>(syscall(SYS_memfd_create, name, MFD_CLOEXEC | flags)); };
  // Not executable: vm.memfd_noexec=2 demands it. EINVAL: a kernel before 6.3.
  int fd = create(os::uapi::kMfdNoexecSeal);
  if (fd < 0 && errno == EINVAL) fd = create(MFD_ALLOW_SEALING);
  if (fd < 0) return -errno;
  Fd made(fd);
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0 || fchmod(fd, mode) != 0) return -errno;
  *out = std::move(made);
  return 0;
}

// Another description of the same file, with its own rights.
int OpenAnew(const Fd& fd, int flags, Fd* out) {
  char path[32];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd.get());
  const int made = Repeat([&] { return open(path, flags | O_CLOEXEC); });
  if (made < 0) return -errno;
  out->Reset(made);
  return 0;
}

int PunchHole(int fd, std::size_t offset, std::size_t bytes) {
  const int result = Repeat(
      [&] { return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset), static_cast<off_t>(bytes)); });
  return result == 0 ? 0 : -errno;
}

}  // namespace

void Fd::Reset(int fd) {
  if (fd_ >= 0) close(fd_);
  fd_ = fd;
}

// --- storage ---------------------------------------------------------------------------------------------------------

Storage::~Storage() {
  if (index_) munmap(index_, kIndexFileBytes);
  for (const File& file : files_) {
    if (file.mapped) munmap(const_cast<std::byte*>(file.mapped), kFramesPerFile * page_bytes_);
  }
}

// Members read it through mappings of their own, which a shorter file would turn into SIGBUS: its length is for good.
int Storage::Open() {
  if (int error = CreateMemfd("ksmu-index", kIndexFileBytes, 0400, &index_own_)) return error;
  if (fcntl(index_own_.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK) != 0) return -errno;
  if (int error = OpenAnew(index_own_, O_RDONLY, &index_read_only_)) return error;
  void* const at = mmap(nullptr, kIndexFileBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, index_own_.get(), 0);
  if (at == MAP_FAILED) return -errno;
  index_ = static_cast<std::byte*>(at);
  return 0;
}

int Storage::PunchIndex(void* self, std::size_t offset, std::size_t bytes) {
  return PunchHole(static_cast<Storage*>(self)->index_own_.get(), offset, bytes);
}

// 0400: another user cannot open what it got once more, for writing. The broker's own user could change the mode; it could
// as well end the broker and take its place.
int Storage::Add() {
  File file;
  if (int error = CreateMemfd("ksmu-frames", kFramesPerFile * page_bytes_, 0400, &file.own)) return error;
  if (fcntl(file.own.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK) != 0) return -errno;
  if (int error = OpenAnew(file.own, O_RDONLY, &file.read_only)) return error;
  files_.push_back(std::move(file));
  return 0;
}

// Into fresh memory: a member that has read the free place has made a page there, of which it may know where it lies.
int Storage::Write(Frame frame, const std::byte* page) {
  if (int error = Punch(frame, 1)) return error;
  std::size_t done = 0;
  while (done < page_bytes_) {
    const off_t at = OffsetOf(frame) + static_cast<long>(done);
    const ssize_t n = Repeat([&] { return pwrite(OwnFile(frame), page + done, page_bytes_ - done, at); });
    if (n < 0) return -errno;
    if (n == 0) return -EIO;
    done += static_cast<std::size_t>(n);
  }
  if (LiesRight(frame)) return 0;
  // Nobody gets it. And whoever maps the file can have changed where its memory comes from.
  Punch(frame, 1);
  Bind(frame / kChunk * kChunk, kChunk, static_cast<std::uint32_t>(files_[frame / kFramesPerFile].nodes[frame % kFramesPerFile / kChunk]));
  return -ENOMEM;
}

int Storage::Punch(Frame first, std::size_t count) {
  return PunchHole(OwnFile(first), static_cast<std::size_t>(OffsetOf(first)), count * page_bytes_);
}

bool Storage::Holds(Frame frame, const std::byte* page) {
  const ssize_t n = Repeat([&] { return pread(OwnFile(frame), looked_at_.data(), page_bytes_, OffsetOf(frame)); });
  return n == static_cast<ssize_t>(page_bytes_) && std::memcmp(looked_at_.data(), page, page_bytes_) == 0;
}

// --- nodes -----------------------------------------------------------------------------------------------------------

bool Storage::HasNode(std::uint32_t node) { return nodes::Has(node); }

int Storage::Bind(Frame first, std::size_t count, std::uint32_t node) {
  File& file = files_[first / kFramesPerFile];
  if (!file.mapped) {
    void* const at = mmap(nullptr, kFramesPerFile * page_bytes_, PROT_READ, MAP_SHARED, file.own.get(), 0);
    if (at == MAP_FAILED) return -errno;
    file.mapped = static_cast<const std::byte*>(at);
    file.nodes.assign(kFramesPerFile / kChunk, -1);
  }
  // By a mapping of its own, since the other one would be cut into as many as there are changes of node.
  void* const part = mmap(nullptr, count * page_bytes_, PROT_READ, MAP_SHARED, file.own.get(), OffsetOf(first));
  if (part == MAP_FAILED) return -errno;
  const int error = nodes::Prefer(part, count * page_bytes_, node);
  munmap(part, count * page_bytes_);
  if (error) return error;
  file.nodes[first % kFramesPerFile / kChunk] = static_cast<int>(node);
  return 0;
}

// A node without free memory is helped out by another one.
bool Storage::LiesRight(Frame frame) const {
  const File& file = files_[frame / kFramesPerFile];
  if (!file.mapped) return true;
  return nodes::NodeOf(file.mapped + OffsetOf(frame)) == file.nodes[frame % kFramesPerFile / kChunk];
}

// --- ring ------------------------------------------------------------------------------------------------------------

const char* Ring::Take(int fd, std::size_t pages, std::size_t page_bytes) {
  if (pages == 0 || pages > wire::kRingPages) return "a ring of no pages, or of too many";
  // Only what is memory has seals; so no read of it waits for another machine or another process.
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0) return "a ring that is no memfd";
  // Grown, it would be ours to free when the member has gone, and no limit to how long that takes.
  constexpr int kWanted = F_SEAL_SHRINK | F_SEAL_GROW;
  if ((seals & kWanted) != kWanted) return "a ring that is not sealed against shrinking and growing";
  // Its length by reading at its end, not by fstat, which takes the inode's lock in some kernels (6.12): its owner can hold that for
  // as long as it likes, by a write from memory whose faults it does not answer.
  const auto size = static_cast<off_t>(pages * page_bytes);
  std::byte last;
  if (Repeat([&] { return pread(fd, &last, 1, size - 1); }) != 1 || Repeat([&] { return pread(fd, &last, 1, size); }) != 0) {
    return "a ring of another length than it says, or that cannot be read";
  }
  fd_.Reset(fd);
  pages_ = pages;
  page_bytes_ = page_bytes;
  return nullptr;
}

void Ring::Copy(std::size_t place, std::byte* page) const {
  const ssize_t n = Repeat([&] { return pread(fd_.get(), page, page_bytes_, static_cast<off_t>(place * page_bytes_)); });
  const auto got = static_cast<std::size_t>(std::max<ssize_t>(n, 0));
  if (got < page_bytes_) std::memset(page + got, 0, page_bytes_ - got);
}

// --- canary ----------------------------------------------------------------------------------------------------------

// Opened anew even for the member: only a description that was opened counts as a writer, memfd_create's own does not.
int Canary::Create(std::size_t page_bytes) {
  Fd made;
  if (int error = CreateMemfd("ksmu-canary", page_bytes, 0600, &made)) return error;
  // Or a member could fill it, for the broker to free.
  if (fcntl(made.get(), F_ADD_SEALS, F_SEAL_GROW) != 0) return -errno;
  if (int error = OpenAnew(made, O_RDONLY, &own_)) return error;
  return OpenAnew(made, O_RDWR, &theirs_);
}

// A read lease is granted when nobody has the file open for writing; a mapping keeps open what it was made from. Not by
// F_SEAL_WRITE, which is refused (EBUSY) for as long as there are such mappings: to add a seal takes the inode's lock, which the
// member can hold for good (measured on 6.18, as above), waits up to 150 ms for pins on pages, and can be forbidden by
// F_SEAL_SEAL.
//
// A member that unmaps its canary while it maps frames harms itself and its own children, who may find other bytes in
// them one day, of the domain that they belong to. Nobody else.
bool Canary::InUse() const {
  if (fcntl(own_.get(), F_SETLEASE, F_RDLCK) == 0) {
    fcntl(own_.get(), F_SETLEASE, F_UNLCK);
    return false;
  }
  if (errno == EAGAIN) return true;
  // No leases here (fs.leases-enable=0): by the seal after all.
  Fd writable;
  if (OpenAnew(own_, O_RDWR, &writable) != 0) return true;
  return fcntl(writable.get(), F_ADD_SEALS, F_SEAL_WRITE) != 0 && errno != EPERM;
}

}  // namespace ksmu::broker
