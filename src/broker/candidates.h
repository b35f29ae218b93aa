// What members have offered: pages that each has once. Hash -> who offered it last. The broker's own; 8 bytes a slot.
//
// By all 64 bits of the hash: who is asked for a page that it has once publishes it for all to see. Of 32 bits a member could
// guess every one, and so see every still page of every other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ksmu::broker {

class Candidates {
 public:
  static constexpr std::uint16_t kMaxMembers = 1024;                 // numbers below
  static constexpr std::size_t kMost = std::size_t{1} << 25;         // 128 GiB of pages, each once; 512 MiB of slots at the most
  static constexpr std::size_t kShards = 4096;                       // a table each: none takes long to grow
  static constexpr std::size_t kMostInAShard = kMost / kShards;

  Candidates() : shards_(kShards) {}

  // The hash is this member's from now on. True: *before is another one, who offered it before. One that offers and never
  // publishes is so asked once for each offer of another's, and can deny nobody else's.
  bool Offer(std::uint64_t hash, std::uint16_t member, std::uint16_t* before);
  // It has been published, or nobody wants it.
  void Forget(std::uint64_t hash);
  // Forgets what the member has offered, from the shard `first` on, until `most` slots have been looked at. The shard where to go
  // on; kShards: that was all.
  std::size_t ForgetMember(std::uint16_t member, std::size_t first, std::size_t most);
  // Brings the hash's slot near, for a call that is about to come.
  void Prefetch(std::uint64_t hash) const;
  std::size_t size() const { return live_; }
  std::size_t bytes() const { return slots_ * sizeof(Slot) + kShards * sizeof(Shard); }

 private:
  // The hash without the bits that name its shard, the member, and whether it is one: kEmpty, kLive, kForgotten.
  using Slot = std::uint64_t;
  struct Shard {
    std::vector<Slot> slots;
    std::uint32_t live = 0, filled = 0;
  };
  static std::size_t ShardOf(std::uint64_t hash) { return static_cast<std::size_t>(hash / (~std::uint64_t{0} / kShards + 1)); }
  void MakeRoom(Shard& shard);

  std::vector<Shard> shards_;
  std::size_t live_ = 0, slots_ = 0;
};

}  // namespace ksmu::broker
