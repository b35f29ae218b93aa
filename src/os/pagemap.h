// /proc/self/pagemap, or another process's: PAGEMAP_SCAN and the bits of its entries.
#pragma once

#include <cstddef>
#include <cstdint>

#include "os/os.h"

namespace ksmu::os {

class Pagemap {
 public:
  // -ENOENT and the like where /proc is not mounted; -ENOSYS: no PAGEMAP_SCAN (Linux 6.7).
  int Open(std::size_t page_bytes) { return Open(page_bytes, "/proc/self/pagemap"); }
  int Open(std::size_t page_bytes, const char* path);
  void Close();

  ScanResult Scan(Span span, const ScanRequest& request, PageRun* runs, std::size_t capacity) const;
  int ReadSharing(Address start, Sharing* out, std::size_t pages) const;

 private:
  int fd_ = -1;
  std::size_t page_bytes_ = 0;
};

}  // namespace ksmu::os
