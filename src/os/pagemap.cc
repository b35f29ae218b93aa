#include "os/pagemap.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#include <algorithm>
#include <bit>

#include "os/raw.h"
#include "os/uapi.h"

namespace ksmu::os {

// The kernel writes its runs straight into the caller's: same size, same places, and the upper half of the kernel's
// 64-bit categories falls into the padding.
static_assert(sizeof(PageRun) == sizeof(uapi::PageRegion) &&
              offsetof(PageRun, end) == offsetof(uapi::PageRegion, end) &&
              offsetof(PageRun, categories) == offsetof(uapi::PageRegion, categories));
static_assert(std::endian::native == std::endian::little);

int Pagemap::Open(std::size_t page_bytes, const char* path) {
  page_bytes_ = page_bytes;
  fd_ = raw::Repeat([&] { return open(path, O_RDONLY | O_CLOEXEC); });
  if (fd_ < 0) return fd_;
  uapi::PagemapScan probe{};  // an empty range: nothing is looked at, but the call has to exist
  probe.size = sizeof probe;
  if (int error = raw::Repeat([&] { return ioctl(fd_, uapi::kIocPagemapScan, &probe); }); error == -ENOTTY) {
    Close();
    return -ENOSYS;
  }
  return 0;
}

void Pagemap::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

ScanResult Pagemap::Scan(Span span, const ScanRequest& request, PageRun* runs, std::size_t capacity) const {
  uapi::PagemapScan scan{};
  scan.size = sizeof scan;
  scan.start = span.start;
  scan.end = span.end();
  scan.vec = capacity ? reinterpret_cast<std::uint64_t>(runs) : 0;
  scan.vec_len = capacity;
  scan.category_inverted = request.inverted;
  scan.category_mask = request.required;
  scan.category_anyof_mask = request.any_of;
  scan.return_mask = request.returned;
  scan.max_pages = request.max_pages;
  if (request.write_protect) scan.flags = uapi::kScanWpMatching;
  int found = raw::Repeat([&] { return ioctl(fd_, uapi::kIocPagemapScan, &scan); });
  ScanResult result;
  result.error = found < 0 ? found : 0;
  result.runs = found < 0 ? 0 : static_cast<std::size_t>(found);
  result.walked_to = found < 0 ? span.start : scan.walk_end;
  // The kernel collects 512 runs at a time, and when it comes to the end after having done so once it still names the place where
  // that was (seen on 6.18): from there on all would be found twice.
  if (result.runs) result.walked_to = std::max<Address>(result.walked_to, runs[result.runs - 1].end);
  return result;
}

int Pagemap::ReadSharing(Address start, Sharing* out, std::size_t pages) const {
  constexpr std::size_t kBatch = 128;
  std::uint64_t entries[kBatch];
  while (pages > 0) {
    std::size_t batch = pages < kBatch ? pages : kBatch;
    const iovec vector{entries, batch * sizeof entries[0]};
    const auto offset = static_cast<off_t>(start / page_bytes_ * sizeof entries[0]);
    ssize_t bytes = raw::Repeat([&] { return pread(fd_, vector.iov_base, vector.iov_len, offset); });
    // Refused by a filter: without an answer every frame is taken to have a child that maps it, and is kept.
    if (bytes == -EPERM || bytes == -EACCES) bytes = raw::Repeat([&] { return preadv(fd_, &vector, 1, offset); });
    if (bytes < 0) return static_cast<int>(bytes);
    std::size_t got = static_cast<std::size_t>(bytes) / sizeof entries[0];
    if (got == 0) return -EFAULT;  // beyond the address space
    for (std::size_t i = 0; i < got; ++i) {
      // A swapped page counts as absent: whether a child maps it too is not known, and it is never taken anyway.
      out[i] = !(entries[i] & uapi::kPagemapPresent)    ? Sharing::kAbsent
               : (entries[i] & uapi::kPagemapExclusive) ? Sharing::kExclusive
                                                        : Sharing::kShared;
    }
    out += got;
    pages -= got;
    start += got * page_bytes_;
  }
  return 0;
}

}  // namespace ksmu::os
