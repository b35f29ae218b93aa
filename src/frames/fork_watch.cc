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
  canaries_[count_++] = page;
  return 0;
}

bool ForkWatch::Exclusive(std::size_t i) {
  os::Sharing sharing = os::Sharing::kAbsent;
  // Swapped out: look at it, which brings it back, and ask again.
  for (int attempt = 0; attempt < 3 && sharing == os::Sharing::kAbsent; ++attempt) {
    (void)*reinterpret_cast<volatile unsigned char*>(canaries_[i]);
    if (system_.ReadSharing(canaries_[i], &sharing, 1) < 0) return false;
  }
  return sharing == os::Sharing::kExclusive;
}

bool ForkWatch::NoChildSince(std::uint16_t epoch) {
  if (epoch >= count_) return false;
  if (!Exclusive(count_ - 1) && count_ < kMaxEpochs) AddCanary();
  return Exclusive(epoch);
}

}  // namespace ksmu::frames
