// The process around us: descriptors, threads, memory limits.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "os/os.h"
#include "os/text.h"

namespace ksmu::os {

// Gives the calling thread, and the threads that it will start, a descriptor table of its own, in which nothing of the
// program's is left: neither can the program's closing of descriptors touch ours, nor do we keep its pipes from their
// end of file. Numbers 0 to 2 stay taken (by /dev/null), so that no descriptor of ours is ever written to as stderr.
// To be called first of all on the library's first thread. 0 or -errno.
int UnshareDescriptors();

int CurrentThread();  // its thread id
// How many filters of system calls are upon the calling thread; -1: it cannot be told.
int SystemCallFilters();

// The threads of the library itself. Threads register before they do anything else; a handful of them.
class OwnThreads {
 public:
  static constexpr std::size_t kCapacity = 16;
  bool Add(int thread);
  void Remove(int thread);
  bool Contains(int thread) const;

 private:
  std::atomic<int> threads_[kCapacity] = {};
};

// Calls each(thread id) for the threads of this process until it returns false. Without allocating. 0 or -errno.
int ForEachThread(bool (*each)(void* cookie, int thread), void* cookie);
// Calls each(name) for the entries of a directory that are numbers.
int ForEachNumber(int directory, bool (*each)(void* cookie, int number), void* cookie);

// See System::VisitUnwaitableWords.
void VisitUnwaitableWords(System& system, const OwnThreads& own, bool (*each)(void* cookie, Address), void* cookie);

// Free memory: MemAvailable and swap, bounded by the memory cgroups above us (version 2, or version 1).
class MemoryBudget {
 public:
  // Finds the cgroup's directories. Never fails: what cannot be read does not bound.
  void Open();
  std::uint64_t Available() const;

 private:
  // Headroom of one cgroup; UINT64_MAX where it is unlimited or unreadable.
  static std::uint64_t Headroom(const PathBuffer& directory, bool version2, std::uint64_t free_swap);

  PathBuffer directory_;          // of the innermost cgroup that can be read
  std::size_t mount_length_ = 0;  // of the part that is the mount point
  bool version2_ = false;
};

}  // namespace ksmu::os
