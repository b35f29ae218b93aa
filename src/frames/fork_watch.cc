#include "frames/fork_watch.h"

namespace ksmu::frames {

ForkWatch::~ForkWatch() {
  for (std::size_t i = 0; i < count_; ++i) system_.Unmap({canaries_[i], system_.PageSize()});
}

int ForkWatch::Start() { return AddCanary(); }

int ForkWatch::AddCanary() {
  os::Address page = 0;
  if (int error = system_.MapAnonymous(0, system_.PageSize(), os::Protection::kReadWrite, &page)) return error;
  *reinterpret_cast<volatile unsigned char*>(page) = 1;
  system_.Lock({page, system_.PageSize()});
  canaries_[count_++] = page;
  return 0;
}

bool ForkWatch::Exclusive(std::size_t i) {
  if (lost_[i]) return false;
  os::Sharing sharing = os::Sharing::kAbsent;
  if (system_.ReadSharing(canaries_[i], &sharing, 1) < 0) return false;
  // A child's entry for a swapped page is not counted as a mapping: brought back here it would look exclusive. The page
  // is locked to keep this from happening; where it could not be, the epoch is taken to have a child for ever.
  if (sharing == os::Sharing::kAbsent) lost_[i] = true;
  return sharing == os::Sharing::kExclusive;
}

bool ForkWatch::NoChildSince(std::uint16_t epoch) {
  if (epoch >= count_) return false;
  if (!Exclusive(count_ - 1)) {
    // All epochs in use: what is stamped from now on waits with the last one. They are not given back: that would take a
    // look at every frame's stamp.
    if (count_ < kMaxEpochs) AddCanary();
  }
  return Exclusive(epoch);
}

}  // namespace ksmu::frames
