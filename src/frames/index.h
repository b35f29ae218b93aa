// Content hash -> frame, or -> candidate: a page seen once. Open addressing, 8 bytes an entry.
//
// An entry holds 26 bits of the hash and a reference; the home slot comes from the 32 bits of hash that the page word or
// the frame remembers, so that the table can grow without reading memory. Entries of candidates that have been written
// since are not hunted down: whoever meets one drops it, and growing leaves them behind.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/own_memory.h"
#include "frames/pool.h"
#include "os/os.h"

namespace ksmu::frames {

class Index {
 public:
  struct Entry {
    bool is_frame;
    Frame frame;           // is_frame: head of the chain of frames of this content
    std::uint64_t page;    // else: page number (address / page size) of the candidate
  };

  Index() = default;
  ~Index();
  Index(const Index&) = delete;

  // Calls `visit(entry)` for each entry that may be of this hash. It answers what becomes of the entry and the walk.
  enum class Visit { kNext, kStop, kEraseNext, kEraseStop };
  template <typename F>
  void Lookup(std::uint32_t hash, F&& visit) {
    if (!slots_) return;
    for (std::size_t i = Home(hash);; i = (i + 1) & mask_) {
      std::uint64_t slot = slots_[i];
      if (slot == kEmpty) return;
      if (slot == kTombstone || (slot >> kTagShift) != Tag(hash)) continue;
      Visit answer = visit(Decode(slot));
      if (answer == Visit::kEraseNext || answer == Visit::kEraseStop) Erase(i);
      if (answer == Visit::kStop || answer == Visit::kEraseStop) return;
    }
  }
  // A lookup of this hash is to come soon.
  void Prefetch(std::uint32_t hash) const {
    if (slots_) __builtin_prefetch(&slots_[Home(hash)]);
  }
  // `hash_of(cookie, entry, &hash)`: the hash of an entry, false if it is stale; called while the table grows.
  using HashOf = bool (*)(void* cookie, const Entry&, std::uint32_t* hash);
  void SetHashOf(HashOf hash_of, void* cookie) { hash_of_ = hash_of, cookie_ = cookie; }
  bool Insert(std::uint32_t hash, const Entry& entry);  // false: no memory
  // Gives back what it does not need any more. `most`: so many entries are alive at most.
  void Trim(std::size_t most);
  void Clear();
  std::size_t size() const { return live_; }
  std::size_t metadata_bytes() const { return slots_ ? (mask_ + 1) * sizeof(std::uint64_t) : 0; }

 private:
  static constexpr std::uint64_t kEmpty = 0, kTombstone = 1;
  static constexpr int kTagShift = 38;
  static constexpr std::uint64_t kFrameBit = 1ull << 37, kRefMask = kFrameBit - 1;
  // The tag is never 0, so that no entry looks like kEmpty or kTombstone.
  static std::uint64_t Tag(std::uint32_t hash) { return (hash >> 6) | 1; }
  std::size_t Home(std::uint32_t hash) const {
    return static_cast<std::size_t>((hash * 0x9E3779B97F4A7C15ull) >> 20) & mask_;
  }
  static Entry Decode(std::uint64_t slot) {
    bool is_frame = slot & kFrameBit;
    std::uint64_t ref = slot & kRefMask;
    return {is_frame, is_frame ? static_cast<Frame>(ref) : kNoFrame, is_frame ? 0 : ref};
  }
  void Erase(std::size_t i) {
    slots_[i] = kTombstone;
    --live_;
  }
  void Put(std::uint32_t hash, std::uint64_t slot);
  bool Grow();
  bool IsAlive(std::uint64_t slot, std::uint32_t* hash) const;
  std::size_t Wanted() const;
  bool Rebuild(std::size_t capacity);

  std::uint64_t* slots_ = nullptr;
  std::size_t mask_ = 0;
  std::size_t live_ = 0, filled_ = 0;  // filled_: live and tombstones
  HashOf hash_of_ = nullptr;
  void* cookie_ = nullptr;
};

}  // namespace ksmu::frames
