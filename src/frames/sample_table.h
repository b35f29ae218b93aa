// Hashes seen in more than one place, without the pages: what the sampling of huge pages remembers. Of all contents only
// those are kept whose hash ends in zeros, so that two copies of a page are either both in it or both not, wherever in
// their huge pages they lie. Hints only: entries go stale, and all are dropped when the table is full at its largest.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/own_memory.h"

namespace ksmu::frames {

class SampleTable {
 public:
  ~SampleTable();
  SampleTable() = default;
  SampleTable(const SampleTable&) = delete;

  static constexpr std::uint32_t kOneIn = 16;
  static bool Sampled(std::uint32_t hash) { return hash % kOneIn == 0; }
  // `place`: below 2^31, the number of the segment.
  void Insert(std::uint32_t hash, std::uint32_t place);
  // True if the hash was inserted for another place.
  bool Elsewhere(std::uint32_t hash, std::uint32_t place) const;
  // The one place that the hash was inserted for; kNowhere: none, or several.
  static constexpr std::uint32_t kNowhere = ~std::uint32_t{0};
  std::uint32_t PlaceOf(std::uint32_t hash) const;
  std::size_t metadata_bytes() const { return used_ * sizeof(std::uint64_t); }

 private:
  static constexpr std::size_t kSmallest = 4096, kLargest = std::size_t{1} << 22;
  static constexpr std::uint64_t kMany = std::uint64_t{1} << 31;
  std::size_t Find(std::uint32_t hash) const;
  bool Grow();

  std::uint64_t* slots_ = nullptr;  // hash, many, place; the hash's last bits are zeros, so its first is used as "there"
  std::size_t size_ = 0, used_ = 0;
};

}  // namespace ksmu::frames
