// Tells whether a forked child may still map what this process mapped once.
//
// A frame must be neither punched nor reused while a child maps it, whichever call made the child, and no interface
// lists children's mappings. So for each fork epoch there is a canary: one private page, written once. A fork shares it
// with the child, and the kernel then says so (pagemap bit 56 is 0) until the last child and grandchild that maps it
// has exited or executed another program. A child made by vfork or CLONE_VM has our address space itself and shows
// nothing, rightly. A check costs about a microsecond.
#pragma once

#include <cstddef>
#include <cstdint>

#include "os/os.h"

namespace ksmu::frames {

class ForkWatch {
 public:
  static constexpr std::size_t kMaxEpochs = 64;
  explicit ForkWatch(os::System& system) : system_(system) {}
  ~ForkWatch();
  ForkWatch(const ForkWatch&) = delete;

  // 0 or -errno. Must succeed before anything else is called.
  int Start();
  // The epoch to stamp on what is mapped from now on. Frames of a newer epoch do not wait for children of an older one.
  std::uint16_t epoch() const { return static_cast<std::uint16_t>(count_ - 1); }
  // True if no living child was forked in or after that epoch. To be asked after the last mapping of the thing is gone:
  // a later fork cannot inherit it any more. Begins a new epoch when the current one has children.
  bool NoChildSince(std::uint16_t epoch);

 private:
  bool Exclusive(std::size_t i);
  int AddCanary();

  os::System& system_;
  os::Address canaries_[kMaxEpochs] = {};
  bool lost_[kMaxEpochs] = {};  // swapped out once: what bit 56 says of it afterwards is nothing to go by
  std::size_t count_ = 0;
};

}  // namespace ksmu::frames
