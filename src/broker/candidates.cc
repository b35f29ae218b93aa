#include "broker/candidates.h"

#include "broker/shared_index.h"

namespace ksmu::broker {
namespace {
constexpr std::size_t kSmallest = 1024;
}

// The slot of the hash, or the empty one where it would be.
std::size_t Candidates::Find(std::uint32_t hash) const {
  const std::size_t mask = slots_.size() - 1;
  std::size_t i = IndexReader::Home(hash) & mask;
  for (;; i = (i + 1) & mask) {
    const Slot& slot = slots_[i];
    const bool nobody = slot.owner.member == kNobody;
    if (nobody ? slot.owner.generation == 0 : slot.hash == hash) return i;
  }
}

void Candidates::MakeRoom() {
  std::vector<Slot> old = std::move(slots_);
  std::size_t there = 0;
  for (const Slot& slot : old) there += slot.owner.member != kNobody && is_there_(cookie_, slot.owner);
  std::size_t size = kSmallest;
  while (there * 8 >= size * 3) size *= 2;
  slots_.assign(size, Slot{0, {kNobody, 0}});
  live_ = filled_ = there;
  for (const Slot& slot : old) {
    if (slot.owner.member != kNobody && is_there_(cookie_, slot.owner)) slots_[Find(slot.hash)] = slot;
  }
}

bool Candidates::Offer(std::uint32_t hash, Owner owner, Owner* before) {
  if (filled_ * 4 >= slots_.size() * 3) MakeRoom();
  Slot& slot = slots_[Find(hash)];
  const bool known = slot.owner.member != kNobody;
  *before = slot.owner;
  if (!known) ++live_, ++filled_;
  slot = {hash, owner};
  return known && !(*before == owner) && is_there_(cookie_, *before);
}

void Candidates::Forget(std::uint32_t hash) {
  if (slots_.empty()) return;
  Slot& slot = slots_[Find(hash)];
  if (slot.owner.member == kNobody) return;
  slot.owner = {kNobody, 1};
  --live_;
}

}  // namespace ksmu::broker
