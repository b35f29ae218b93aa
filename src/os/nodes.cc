#include "os/nodes.h"

#include <fcntl.h>
#include <linux/mempolicy.h>

#include <algorithm>
#include <string_view>

#include "os/own_place.h"
#include "os/raw.h"
#include "os/text.h"

namespace ksmu::os {
namespace {
constexpr std::size_t kBits = 8 * sizeof(unsigned long);

// The kernel looks at one bit less than it is told.
constexpr long kMaskBits = kMostNodes + 1;

NodeMask MaskOf(int node) {
  NodeMask mask{};
  mask[static_cast<std::size_t>(node) / kBits] = 1ul << static_cast<std::size_t>(node) % kBits;
  return mask;
}
}  // namespace

// "0", "0-1", "0,2-3": the last number is the highest.
int CountNodes() {
  char buffer[256];
  const std::int64_t size = ReadSmallFile(AT_FDCWD, "/sys/devices/system/node/possible", buffer, sizeof buffer);
  // Not to be read, as in a chroot: the pages themselves say where they lie.
  if (size <= 0 || size == sizeof buffer) return size == -ENOENT && access("/sys/devices/system", F_OK) == 0 ? 1 : kMostNodes;
  std::string_view text(buffer, static_cast<std::size_t>(size));
  std::uint64_t highest = 0, number;
  while (!text.empty()) {
    if (TakeDecimal(&text, &number)) highest = number;
    else text.remove_prefix(1);
  }
  return static_cast<int>(std::min<std::uint64_t>(highest + 1, kMostNodes));
}

int QueryPageNodes(const Address* pages, std::size_t count, int* nodes) {
  const long error = raw::RepeatDirect([&] {
    return raw::Direct(SYS_move_pages, 0, static_cast<long>(count), reinterpret_cast<long>(pages), 0, reinterpret_cast<long>(nodes), 0);
  });
  if (error < 0) return static_cast<int>(error);
  for (int* node = nodes; node != nodes + count; ++node) {
    if (*node < 0 || *node >= kMostNodes) *node = kNoNode;
  }
  return 0;
}

// The policy stays with the file, whoever writes to it and by whatever mapping it was set. Preferred, not bound: a copy that
// the kernel makes on the first write to a merged page follows the file's policy too, and where the node is full a bound
// one would end in the OOM killer. Who needs to know where a frame has come to lie asks.
int BindPoolFile(const File& file, std::size_t bytes, int node) {
  const NodeMask mask = MaskOf(node);
  Address at = 0;
  if (int error = raw::Mmap(PassingPlace(), bytes, PROT_READ, MAP_SHARED, file.fd, 0, &at)) return error;
  const long error = raw::Direct(SYS_mbind, static_cast<long>(at), static_cast<long>(bytes), MPOL_PREFERRED,
                                 reinterpret_cast<long>(mask.data()), kMaskBits, 0);
  raw::Munmap(at, bytes);
  return static_cast<int>(error);
}

void ThreadPolicy::Prefer(int node) {
  // What cannot be put back is not changed.
  if (raw::Direct(SYS_get_mempolicy, reinterpret_cast<long>(&mode_), reinterpret_cast<long>(nodes_.data()), kMaskBits, 0, 0) != 0) return;
  const NodeMask mask = MaskOf(node);
  changed_ = raw::Direct(SYS_set_mempolicy, MPOL_PREFERRED, reinterpret_cast<long>(mask.data()), kMaskBits) == 0;
}

void ThreadPolicy::Restore() {
  if (changed_) raw::Direct(SYS_set_mempolicy, mode_, reinterpret_cast<long>(nodes_.data()), kMaskBits);
  changed_ = false;
}

}  // namespace ksmu::os
