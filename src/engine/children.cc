#include "engine/children.h"

namespace ksmu::engine {

DiscardSet::Slot* DiscardSet::FindSlot(std::uint64_t segment, bool make) {
  if (make && (used_ + 1) * 2 > slots_.size() && !Grow()) return nullptr;
  if (slots_.empty()) return nullptr;
  const std::size_t mask = slots_.size() - 1;
  for (std::size_t i = (segment * 0x9E3779B97F4A7C15ull >> 20) & mask;; i = (i + 1) & mask) {
    if (slots_[i].segment_plus_one == segment + 1) return &slots_[i];
    if (slots_[i].segment_plus_one == 0) {
      if (!make) return nullptr;
      slots_[i].segment_plus_one = segment + 1;
      ++used_;
      return &slots_[i];
    }
  }
}

bool DiscardSet::Grow() {
  base::OwnVector<Slot> old;
  for (const Slot& slot : slots_) {
    if (slot.segment_plus_one && !old.push_back(slot)) return false;
  }
  const std::size_t size = slots_.empty() ? 16 : slots_.size() * 2;
  if (!slots_.reserve(size)) return false;
  slots_.clear();
  for (std::size_t i = 0; i < size; ++i) slots_.push_back(Slot{});
  used_ = 0;
  for (const Slot& slot : old) FindSlot(slot.segment_plus_one - 1, true)->mask = slot.mask;
  return true;
}

bool DiscardSet::Add(Address page, int page_shift) {
  Slot* slot = FindSlot(page >> kSegmentShift, true);
  if (!slot) return false;
  const std::size_t index = (page & (kSegmentBytes - 1)) >> page_shift;
  slot->mask[index / 64] |= std::uint64_t{1} << index % 64;
  return true;
}

bool DiscardSet::AddRange(Address start, Address end, int page_shift) {
  for (Address a = start; a < end; a += Address{1} << page_shift) {
    if (!Add(a, page_shift)) return false;
  }
  return true;
}

bool DiscardSet::Contains(Address page, int page_shift) const {
  Slot* slot = const_cast<DiscardSet*>(this)->FindSlot(page >> kSegmentShift, false);
  if (!slot) return false;
  const std::size_t index = (page & (kSegmentBytes - 1)) >> page_shift;
  return slot->mask[index / 64] >> index % 64 & 1;
}

bool DiscardSet::CopyFrom(const DiscardSet& other) {
  Reset();
  for (const Slot& slot : other.slots_) {
    if (!slot.segment_plus_one) continue;
    Slot* mine = FindSlot(slot.segment_plus_one - 1, true);
    if (!mine) return false;
    mine->mask = slot.mask;
  }
  return true;
}

ChildList::~ChildList() {
  while (size_) RemoveAt(size_ - 1);
}

Child* ChildList::Add(os::Context context, bool sync) {
  if (size_ == kMaxChildren) return nullptr;
  Child* child = slab_.Make();
  if (!child) return nullptr;
  child->context = context;
  child->sync = sync;
  return children_[size_++] = child;
}

void ChildList::RemoveAt(std::size_t i) {
  slab_.Free(children_[i]);
  children_[i] = children_[--size_];
}

}  // namespace ksmu::engine
