// Tells whether a forked child may still map what this process mapped once.
//
// A frame must be neither punched nor reused while a child maps it, whichever call made the child, and no interface
// lists children's mappings. So time is cut into epochs, and each has a canary: one private page, written once. A fork
// shares it with the child, and the kernel then says so (pagemap bit 56 is 0) until the last child and grandchild that
// maps it has exited or executed another program. A child made by vfork or CLONE_VM has our address space itself and
// shows nothing, rightly. A check costs about a microsecond.
//
// An epoch that is over is closed: MADV_DONTFORK keeps later children from inheriting its canary, so that it tells of
// those of its own time alone. Children that overlap without a gap would else keep every canary shared for ever.
//   - A child has the canary of the epoch in which it was forked, and perhaps that of the next one: the next canary is
//     there before this one is closed, and fork and madvise both hold mmap_lock for writing. There is no instant in which
//     a fork inherits none.
//   - Its own children have what it has: the advice is on our mapping, made after theirs was copied.
//   - So what was mapped in the epochs [first, end) and at no other time is in no child's mapping, if none of these
//     epochs has a child. It is not enough to look at the last of them: a child that was forked early and lives on has an
//     old canary only.
//   - Once closed, an epoch can only lose children. One without is forgotten, and the others are numbered anew: all that
//     are left have a child, except the newest. "No child" is then the comparison first >= end.
#pragma once

#include <cstddef>
#include <cstdint>

#include "os/os.h"

namespace ksmu::frames {

class ForkWatch {
 public:
  using Epoch = std::uint8_t;
  // As many times, far enough apart, from which a child can be alive. With more of them the newest epoch goes on, and
  // what was mapped in it waits until no child of it is left: later, but safe.
  static constexpr std::size_t kMaxEpochs = 128;
  explicit ForkWatch(os::System& system) : system_(system) {}
  ~ForkWatch();
  ForkWatch(const ForkWatch&) = delete;

  // 0 or -errno. Must succeed before anything else is called.
  int Start();
  // The newest epoch. What is mapped from now on is in no child of an older one.
  Epoch epoch() const { return static_cast<Epoch>(count_ - 1); }
  Epoch end() const { return static_cast<Epoch>(count_); }
  // Whether a child was forked in the newest epoch and lives. To be asked after the last mapping of the thing in question
  // is gone: a later fork cannot inherit it any more.
  bool HasChild() { return !Exclusive(count_ - 1); }
  // Closes the epochs that are over and forgets those that have no child. True: the numbers have changed, and every number
  // that is kept anywhere, a first or an end, is to be replaced by numbers[it] (up to and including the old end()).
  bool Refresh(Epoch (&numbers)[kMaxEpochs + 1]);
  // Begins an epoch. The one before is closed by the next Refresh, not at once: a fork that comes in between counts for
  // both. False: it could not be done, and the newest one goes on.
  bool Begin();

 private:
  struct Canary {
    os::Address page = 0;
    bool closed = false;
    bool lost = false;  // swapped out once: what bit 56 says of it afterwards is nothing to go by
  };
  bool Exclusive(std::size_t i);
  int AddCanary();

  os::System& system_;
  Canary canaries_[kMaxEpochs];
  std::size_t count_ = 0;
};

}  // namespace ksmu::frames
