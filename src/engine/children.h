// Forked children whose memory the parent serves: a child inherits the merged mappings, and where EVENT_FORK is permitted
// its registrations too, with a context that the parent holds. A discard in the child is an event on that context.
#pragma once

#include <cstddef>
#include <array>
#include <cstdint>

#include "base/own_memory.h"
#include "engine/page_table.h"

namespace ksmu::engine {

// Pages of a child that read as zeros although a frame lies beneath: sticky marks, by segment. Open addressing.
class DiscardSet {
 public:
  // False: no memory.
  bool Add(Address page, int page_shift);
  bool Contains(Address page, int page_shift) const;
  bool CopyFrom(const DiscardSet& other);
  bool AddRange(Address start, Address end, int page_shift);
  void Reset() { slots_.Reset(); used_ = 0; }

 private:
  struct Slot {
    std::uint64_t segment_plus_one = 0;
    std::array<std::uint64_t, kMaxSegmentPages / 64> mask{};
  };
  Slot* FindSlot(std::uint64_t segment, bool make);
  bool Grow();
  base::OwnVector<Slot> slots_;
  std::size_t used_ = 0;
};

struct Child {
  os::Context context = -1;
  bool sync = false;
  bool before_settled = false;  // forked while the scanner was taking pages out: it waits for those until it is served
  bool being_served = false;
  DiscardSet discards;
};

class ChildList {
 public:
  static constexpr std::size_t kMaxChildren = 1000;
  ~ChildList();
  Child* Add(os::Context context, bool sync);  // nullptr: no room
  void RemoveAt(std::size_t i);
  std::size_t size() const { return size_; }
  Child* operator[](std::size_t i) { return children_[i]; }

 private:
  std::array<Child*, kMaxChildren> children_{};
  std::size_t size_ = 0;
  base::OwnSlab<Child> slab_;
};

}  // namespace ksmu::engine
