#include "broker/candidates.h"

#include <algorithm>
#include <utility>

namespace ksmu::broker {
namespace {

using Slot = std::uint64_t;
enum State : Slot { kEmpty, kLive, kForgotten };
constexpr int kStateBits = 2, kMemberBits = 10, kTagShift = kStateBits + kMemberBits;
static_assert(std::size_t{1} << kTagShift == Candidates::kShards, "the bits that the shard stands for make room for the rest");
static_assert(1 << kMemberBits == Candidates::kMaxMembers);
constexpr std::size_t kSmallest = 8;  // slots

constexpr Slot SlotOf(std::uint64_t hash, std::uint16_t member) { return hash << kTagShift | Slot{member} << kStateBits | kLive; }
constexpr State StateOf(Slot slot) { return static_cast<State>(slot & ((1u << kStateBits) - 1)); }
constexpr std::uint16_t MemberOf(Slot slot) { return static_cast<std::uint16_t>(slot >> kStateBits & (Candidates::kMaxMembers - 1)); }

// A table of any size, not of a power of two: grown by halves, it is never less than half full, which is 16 bytes an offer.
std::size_t Home(std::uint64_t tag, std::size_t slots) {
  const std::uint64_t mixed = tag * 0x9E3779B97F4A7C15ull >> 32;
  return static_cast<std::size_t>(mixed * slots >> 32);
}

// The slot of the tag, or the empty one where it would be.
std::size_t Find(const std::vector<Slot>& slots, std::uint64_t tag) {
  for (std::size_t i = Home(tag, slots.size());; i = i + 1 == slots.size() ? 0 : i + 1) {
    const State state = StateOf(slots[i]);
    if (state == kEmpty || (state == kLive && slots[i] >> kTagShift == tag)) return i;
  }
}

constexpr std::uint64_t TagOf(std::uint64_t hash) { return hash << kTagShift >> kTagShift; }

}  // namespace

void Candidates::MakeRoom(Shard& shard) {
  std::vector<Slot> old = std::exchange(shard.slots, {});
  shard.slots.assign(std::max<std::size_t>(kSmallest, shard.live + shard.live / 2), kEmpty);
  slots_ += shard.slots.size() - old.size();
  shard.filled = shard.live;
  for (const Slot slot : old) {
    if (StateOf(slot) == kLive) shard.slots[Find(shard.slots, slot >> kTagShift)] = slot;
  }
}

bool Candidates::Offer(std::uint64_t hash, std::uint16_t member, std::uint16_t* before) {
  Shard& shard = shards_[ShardOf(hash)];
  if (shard.live >= kMostInAShard) {
    // An end to it, whoever offers what: all start anew.
    live_ -= std::exchange(shard.live, 0);
    std::fill(shard.slots.begin(), shard.slots.end(), kEmpty);
    shard.filled = 0;
  }
  if (shard.filled * 8 >= shard.slots.size() * 7) MakeRoom(shard);
  Slot& slot = shard.slots[Find(shard.slots, TagOf(hash))];
  const bool known = StateOf(slot) == kLive;
  *before = MemberOf(slot);
  if (!known) ++live_, ++shard.live, ++shard.filled;
  slot = SlotOf(hash, member);
  return known && *before != member;
}

void Candidates::Forget(std::uint64_t hash) {
  Shard& shard = shards_[ShardOf(hash)];
  if (shard.slots.empty()) return;
  Slot& slot = shard.slots[Find(shard.slots, TagOf(hash))];
  if (StateOf(slot) != kLive) return;
  slot = kForgotten;
  --live_, --shard.live;
  if (shard.live * 2 < shard.slots.size() && shard.slots.size() > kSmallest) MakeRoom(shard);
}

std::size_t Candidates::ForgetMember(std::uint16_t member, std::size_t first, std::size_t most) {
  for (std::size_t looked = 0; first < kShards && looked < most; ++first) {
    Shard& shard = shards_[first];
    looked += shard.slots.size();
    for (Slot& slot : shard.slots) {
      if (StateOf(slot) != kLive || MemberOf(slot) != member) continue;
      slot = kForgotten;
      --live_, --shard.live;
    }
    if (shard.live * 2 < shard.slots.size() && shard.slots.size() > kSmallest) MakeRoom(shard);
  }
  return first;
}

void Candidates::Prefetch(std::uint64_t hash) const {
  const std::vector<Slot>& slots = shards_[ShardOf(hash)].slots;
  if (!slots.empty()) __builtin_prefetch(&slots[Home(TagOf(hash), slots.size())], 1);
}

}  // namespace ksmu::broker
