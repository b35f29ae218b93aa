#include "broker/candidates.h"

#include <algorithm>

namespace ksmu::broker {
namespace {
constexpr std::size_t kSmallest = 1024;  // slots
}

// A table of any size, not of a power of two: grown by halves, it is never less than half full, which is 16 bytes an offer.
std::size_t Candidates::Home(std::uint32_t hash) const {
  const std::uint64_t mixed = hash * 0x9E3779B97F4A7C15ull >> 32;
  return static_cast<std::size_t>(mixed * slots_.size() >> 32);
}

// The slot of the hash, or the empty one where it would be.
std::size_t Candidates::Find(std::uint32_t hash) const {
  std::size_t i = Home(hash);
  for (;; i = i + 1 == slots_.size() ? 0 : i + 1) {
    const Slot& slot = slots_[i];
    const bool nobody = slot.owner.member == kNobody;
    if (nobody ? slot.owner.generation == 0 : slot.hash == hash) return i;
  }
}

void Candidates::MakeRoom() {
  std::vector<Slot> old = std::move(slots_);
  std::size_t there = 0;
  for (const Slot& slot : old) there += slot.owner.member != kNobody && is_there_(cookie_, slot.owner);
  slots_.assign(std::max(kSmallest, there + there / 2), Slot{0, {kNobody, 0}});
  live_ = filled_ = there;
  for (const Slot& slot : old) {
    if (slot.owner.member != kNobody && is_there_(cookie_, slot.owner)) slots_[Find(slot.hash)] = slot;
  }
}

bool Candidates::Offer(std::uint32_t hash, Owner owner, Owner* before) {
  // An end to it, whoever offers what: all start anew.
  if (live_ >= kMost) slots_.clear();
  if (filled_ * 8 >= slots_.size() * 7 || slots_.empty()) MakeRoom();
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
  if (live_ * 2 < slots_.size() && slots_.size() > kSmallest) MakeRoom();
}

}  // namespace ksmu::broker
