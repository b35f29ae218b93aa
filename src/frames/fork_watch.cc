#include "frames/fork_watch.h"

#include <cerrno>

namespace ksmu::frames {

ForkWatch::~ForkWatch() {
  for (std::size_t i = 0; i < count_; ++i) system_.Unmap({canaries_[i].page, system_.PageSize()});
}

int ForkWatch::Start() { return AddCanary(); }

bool ForkWatch::Begin() { return count_ < kMaxEpochs && AddCanary() == 0; }

int ForkWatch::AddCanary() {
  os::Address page = 0;
  if (int error = system_.MapAnonymous(0, system_.PageSize(), os::Protection::kReadWrite, &page)) return error;
  // Nothing may give it to the child, or to us, as a copy: no huge page collapses it, and its content is its own, so that
  // KSM merges it with no other canary.
  system_.ApplyAttributes({page, system_.PageSize()}, {.no_huge_page = true});
  *reinterpret_cast<volatile std::uint64_t*>(page) = system_.NowNanoseconds() | 1;
  const bool locked = system_.Lock({page, system_.PageSize()}) == 0;
  // Without it the epoch that is on goes on. The first has to be.
  if (!locked && count_) {
    system_.Unmap({page, system_.PageSize()});
    return -ENOMEM;
  }
  canaries_[count_++] = {.page = page, .lost = !locked};
  return 0;
}

bool ForkWatch::Exclusive(std::size_t i) {
  if (canaries_[i].lost) return false;
  os::Sharing sharing = os::Sharing::kAbsent;
  if (system_.ReadSharing(canaries_[i].page, &sharing, 1) < 0) return false;
  // A child's entry for a swapped page is not counted as a mapping: brought back here it would look exclusive. The page
  // is locked to keep this from happening; where it could not be, the epoch is taken to have a child for ever.
  if (sharing == os::Sharing::kAbsent) canaries_[i].lost = true;
  return sharing == os::Sharing::kExclusive;
}

bool ForkWatch::Refresh(Epoch (&numbers)[kMaxEpochs + 1]) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < count_; ++i) {
    // A first in a forgotten epoch becomes the one after it, an end behind it that of the one before: the same number.
    numbers[i] = static_cast<Epoch>(kept);
    Canary& canary = canaries_[i];
    if (i + 1 < count_) {
      // Where it is refused (a filter, the map limit) the epoch goes on beside the newer ones, and is taken to have a child.
      if (!canary.closed) {
        canary.closed = system_.ApplyAttributes({canary.page, system_.PageSize()}, {.dont_fork = true}) == 0;
      }
      if (canary.closed && Exclusive(i) && system_.Unmap({canary.page, system_.PageSize()}) == 0) continue;
    }
    canaries_[kept++] = canary;
  }
  numbers[count_] = static_cast<Epoch>(kept);
  const bool changed = kept != count_;
  count_ = kept;
  return changed;
}

}  // namespace ksmu::frames
