#include "frames/sample_table.h"

namespace ksmu::frames {
namespace {
constexpr std::uint64_t kThere = std::uint64_t{1} << 32;
std::uint64_t Encode(std::uint32_t hash, std::uint64_t rest) { return std::uint64_t{hash} << 32 | kThere | rest; }
}  // namespace

SampleTable::~SampleTable() {
  if (slots_) base::UnmapOwnPages(slots_, size_ * sizeof *slots_);
}

std::size_t SampleTable::Find(std::uint32_t hash) const {
  std::size_t i = (hash * 0x9E3779B97F4A7C15ull >> 32) & (size_ - 1);
  while (slots_[i] && slots_[i] >> 33 != hash >> 1) i = (i + 1) & (size_ - 1);
  return i;
}

bool SampleTable::Grow() {
  const std::size_t size = size_ ? size_ * 2 : kSmallest;
  std::uint64_t* const old = slots_;
  const std::size_t old_size = size_;
  if (size > kLargest) {
    base::ForgetOwnPages(slots_, size_ * sizeof *slots_);
    used_ = 0;
    return true;
  }
  auto* grown = static_cast<std::uint64_t*>(base::MapOwnPages(size * sizeof(std::uint64_t)));
  if (!grown) return false;
  slots_ = grown;
  size_ = size;
  for (std::size_t i = 0; i < old_size; ++i) {
    if (old[i]) slots_[Find(static_cast<std::uint32_t>(old[i] >> 33 << 1))] = old[i];
  }
  if (old) base::UnmapOwnPages(old, old_size * sizeof *old);
  return true;
}

void SampleTable::Insert(std::uint32_t hash, std::uint32_t place) {
  if (used_ >= size_ / 4 * 3 && !Grow()) return;
  std::uint64_t& slot = slots_[Find(hash)];
  if (!slot) {
    slot = Encode(hash, place);
    ++used_;
  } else if ((slot & (kMany - 1)) != place) {
    slot |= kMany;
  }
}

bool SampleTable::Elsewhere(std::uint32_t hash, std::uint32_t place) const {
  if (!slots_) return false;
  const std::uint64_t slot = slots_[Find(hash)];
  return slot && ((slot & kMany) || (slot & (kMany - 1)) != place);
}

std::uint32_t SampleTable::PlaceOf(std::uint32_t hash) const {
  if (!slots_) return kNowhere;
  const std::uint64_t slot = slots_[Find(hash)];
  return slot && !(slot & kMany) ? static_cast<std::uint32_t>(slot & (kMany - 1)) : kNowhere;
}

}  // namespace ksmu::frames
