// NUMA nodes, by bare system calls: libnuma reads files and allocates before a program's main, and has no place in it.
#pragma once

#include <array>
#include <cstddef>

#include "os/os.h"

namespace ksmu::os {

int CountNodes();
int QueryPageNodes(const Address* pages, std::size_t count, int* nodes);
int BindPoolFile(const File& file, std::size_t bytes, int node);

// Bits by node, as the kernel takes them.
using NodeMask = std::array<unsigned long, kMostNodes / (8 * sizeof(unsigned long))>;

// Where the calling thread's memory is to come from, and what was said of that before: a thread inherits it from the one that
// has made it.
class ThreadPolicy {
 public:
  void Prefer(int node);
  void Restore();

 private:
  int mode_ = 0;
  NodeMask nodes_{};
  bool changed_ = false;
};

}  // namespace ksmu::os
