// What members have offered: pages that each has once. Hash -> who offered it last. The broker's own; 8 bytes a slot.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ksmu::broker {

// A member, told apart from an earlier one of the same number.
struct Owner {
  std::uint16_t member = 0;
  std::uint16_t generation = 0;
  bool operator==(const Owner&) const = default;
};

class Candidates {
 public:
  static constexpr std::size_t kMost = std::size_t{1} << 25;  // 128 GiB of pages, each once; 512 MiB of slots at the most
  // `is_there(cookie, owner)`: the member has not gone. Asked when the table grows: offers of those that have are left behind.
  using IsThere = bool (*)(void* cookie, Owner);
  Candidates(IsThere is_there, void* cookie) : is_there_(is_there), cookie_(cookie) {}

  // The hash is this owner's from now on. True: *before is another one, who offered it before and is there still. One that
  // offers and never publishes is so asked once for each offer of another's, and can deny nobody else's.
  bool Offer(std::uint32_t hash, Owner owner, Owner* before);
  // It has been published, or nobody wants it.
  void Forget(std::uint32_t hash);
  std::size_t size() const { return live_; }
  std::size_t bytes() const { return slots_.size() * sizeof(Slot); }

 private:
  struct Slot {
    std::uint32_t hash;
    Owner owner;  // member 0xffff: empty, or forgotten if the generation is not 0
  };
  static constexpr std::uint16_t kNobody = 0xffff;
  std::size_t Home(std::uint32_t hash) const;
  std::size_t Find(std::uint32_t hash) const;
  void MakeRoom();

  IsThere is_there_;
  void* cookie_;
  std::vector<Slot> slots_;
  std::size_t live_ = 0, filled_ = 0;
};

}  // namespace ksmu::broker
