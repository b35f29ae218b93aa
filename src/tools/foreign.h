// Another process's memory, as /proc and process_vm_readv(2) show it. It is looked at, and nothing in it is touched: only pages
// that are there are read, so that none is made or swapped in by that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "os/os.h"
#include "os/pagemap.h"

namespace ksmu::tools {

struct ForeignMapping {
  os::Mapping mapping;
  bool frames;  // of a pool file of ksmu's
  std::string name;
};

// A process's number, from 1 on. False: *why says what is wrong with it.
bool ParsePid(const char* text, int* pid, std::string* why);

class Foreign {
 public:
  Foreign() = default;
  Foreign(const Foreign&) = delete;
  Foreign(Foreign&& other) noexcept;
  ~Foreign();

  // False, here and below: *why says what is wrong, and whose process.
  bool Open(int pid, std::string* why);
  int pid() const { return pid_; }
  // What was read after its end is no process's memory: to be asked when all has been read.
  bool HasEnded(std::string* why) const;
  bool ReadMappings(std::vector<ForeignMapping>* mappings, std::string* why) const;

  // The next runs of pages from *at on that are there or swapped (categories: present, swapped, file, PFN zero, huge), and moves
  // *at on; none are left when *at is `end`. Without PAGEMAP_SCAN (Linux 6.7) neither zero nor huge pages are told.
  void NextRuns(os::Address* at, os::Address end, std::vector<os::PageRun>* runs) const;
  // Entries of pagemap; 0 for those that cannot be read.
  void ReadEntries(os::Address start, std::uint64_t* entries, std::size_t pages) const;
  // How many bytes could be read, up to one that cannot be; or -errno.
  std::ptrdiff_t Read(os::Address from, void* to, std::size_t bytes) const;
  std::string WhyNot(int error) const;  // a sentence about -errno

 private:
  std::string WhyNoMemory() const;

  int pid_ = 0;
  int pidfd_ = -1;
  int entries_fd_ = -1;
  bool scans_ = false;
  os::Pagemap pagemap_;
  std::size_t page_bytes_ = 0;
};

}  // namespace ksmu::tools
