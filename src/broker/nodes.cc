#include "broker/nodes.h"

#ifdef KSMU_HAVE_NUMA
#include <numa.h>
#include <numaif.h>
#endif

#include <unistd.h>

#include <cerrno>
#include <cstdio>

namespace ksmu::broker::nodes {

#ifdef KSMU_HAVE_NUMA

const char* WhyNot() {
  return numa_available() < 0 ? "the kernel knows no NUMA nodes, or a filter of system calls refuses get_mempolicy" : nullptr;
}

bool Has(std::uint32_t node) {
  if (node < numa_nodes_ptr->size && numa_bitmask_isbitset(numa_nodes_ptr, node)) return true;
  // Of those that have come since this process began libnuma says nothing.
  char path[64];
  std::snprintf(path, sizeof path, "/sys/devices/system/node/node%u", node);
  return access(path, F_OK) == 0;
}

int Prefer(void* start, std::size_t bytes, std::uint32_t node) {
  bitmask* const mask = numa_allocate_nodemask();
  numa_bitmask_setbit(mask, node);
  // The kernel looks at one bit less than it is told.
  const long result = mbind(start, bytes, MPOL_PREFERRED, mask->maskp, mask->size + 1, 0);
  const int error = result == 0 ? 0 : -errno;
  numa_bitmask_free(mask);
  return error;
}

int NodeOf(const std::byte* page) {
  // The kernel looks into the page table, where it is once it has been read.
  static_cast<void>(*const_cast<const volatile std::byte*>(page));
  void* address = const_cast<std::byte*>(page);
  int node = -1;
  return numa_move_pages(0, 1, &address, nullptr, &node, 0) == 0 && node >= 0 ? node : -1;
}

#else

const char* WhyNot() { return "this ksmud was built without libnuma"; }
bool Has(std::uint32_t) { return false; }
int Prefer(void*, std::size_t, std::uint32_t) { return -ENOSYS; }
int NodeOf(const std::byte*) { return -1; }

#endif

}  // namespace ksmu::broker::nodes
