#include "frames/index.h"

#include <algorithm>
#include <bit>

namespace ksmu::frames {
namespace {
constexpr std::size_t kFewest = 4096;  // slots
}  // namespace

Index::~Index() { Clear(); }

void Index::Clear() {
  if (slots_) base::UnmapOwnPages(slots_, (mask_ + 1) * sizeof(std::uint64_t));
  slots_ = nullptr;
  mask_ = live_ = filled_ = 0;
}

void Index::Put(std::uint32_t hash, std::uint64_t slot) {
  std::size_t i = Home(hash);
  while (slots_[i] != kEmpty && slots_[i] != kTombstone) i = (i + 1) & mask_;
  if (slots_[i] == kEmpty) ++filled_;
  slots_[i] = slot;
  ++live_;
}

// An entry of a page that has had other contents since is stale, though the page may be still again: by its tag.
bool Index::IsAlive(std::uint64_t slot, std::uint32_t* hash) const {
  return slot != kEmpty && slot != kTombstone && hash_of_(cookie_, Decode(slot), hash) && Tag(*hash) == slot >> kTagShift;
}

// Slots for what is alive, and one entry more: half of them full at most.
std::size_t Index::Wanted() const {
  std::size_t count = 1;
  std::uint32_t hash;
  for (std::size_t i = 0; slots_ && i <= mask_; ++i) count += IsAlive(slots_[i], &hash);
  return std::max(kFewest, std::bit_ceil(count * 2));
}

bool Index::Grow() { return Rebuild(Wanted()); }

void Index::Trim(std::size_t most) {
  if (!slots_ || mask_ < kFewest || std::bit_ceil((most + 1) * 2) > mask_) return;
  if (const std::size_t wanted = Wanted(); wanted <= mask_) Rebuild(wanted);
}

bool Index::Rebuild(std::size_t wanted) {
  const std::size_t capacity = slots_ ? mask_ + 1 : 0;
  auto* grown = static_cast<std::uint64_t*>(base::MapOwnPages(wanted * sizeof(std::uint64_t)));
  if (!grown) return false;
  std::uint64_t* old = slots_;
  slots_ = grown;
  mask_ = wanted - 1;
  live_ = filled_ = 0;
  std::uint32_t hash;
  for (std::size_t i = 0; i < capacity; ++i) {
    if (!IsAlive(old[i], &hash)) continue;
    std::size_t at = Home(hash);
    while (slots_[at] != kEmpty && slots_[at] != old[i]) at = (at + 1) & mask_;
    if (slots_[at] == kEmpty) Put(hash, old[i]);  // else it is there twice
  }
  if (old) base::UnmapOwnPages(old, capacity * sizeof(std::uint64_t));
  return true;
}

bool Index::Insert(std::uint32_t hash, const Entry& entry) {
  if ((!slots_ || (filled_ + 1) * 4 > (mask_ + 1) * 3) && !Grow()) {
    if (!slots_ || filled_ + 2 > mask_) return false;  // one empty slot must stay, or lookups would not end
  }
  std::uint64_t ref = entry.is_frame ? (entry.frame | kFrameBit) : (entry.page & kRefMask);
  Put(hash, Tag(hash) << kTagShift | ref);
  return true;
}

}  // namespace ksmu::frames
