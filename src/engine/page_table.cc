#include "engine/page_table.h"

#include <bit>

namespace ksmu::engine {

PageTable::PageTable(std::size_t page_size) : page_size_(page_size), page_shift_(std::countr_zero(page_size)) {
  root_ = static_cast<Root*>(base::MapOwnPages(sizeof(Root)));
}

PageTable::~PageTable() {
  if (!root_) return;
  for (auto& leaf : *root_) {
    if (Leaf* l = leaf.load(std::memory_order_relaxed)) base::UnmapOwnPages(l, sizeof(Leaf));
  }
  base::UnmapOwnPages(root_, sizeof(Root));
}

Segment* PageTable::FindSegment(Address a) const {
  if (a >= kLimit || !root_) return nullptr;
  std::size_t number = a >> kSegmentShift;
  Leaf* leaf = (*root_)[number >> kLeafBits].load(std::memory_order_acquire);
  return leaf ? leaf->segments[number & kLeafMask].load(std::memory_order_acquire) : nullptr;
}

std::atomic<std::uint64_t>* PageTable::Find(Address a) const {
  Segment* segment = FindSegment(a);
  return segment ? Word(segment, (a & (kSegmentBytes - 1)) >> page_shift_) : nullptr;
}

std::atomic<std::uint64_t>* PageTable::Make(Address a) {
  if (a >= kLimit || !root_) return nullptr;
  std::size_t number = a >> kSegmentShift;
  auto& leaf_slot = (*root_)[number >> kLeafBits];
  Leaf* leaf = leaf_slot.load(std::memory_order_relaxed);
  if (!leaf) {
    leaf = static_cast<Leaf*>(base::MapOwnPages(sizeof(Leaf)));
    if (!leaf) return nullptr;
    leaf_slot.store(leaf, std::memory_order_release);
  }
  auto& segment_slot = leaf->segments[number & kLeafMask];
  Segment* segment = segment_slot.load(std::memory_order_relaxed);
  if (!segment) {
    segment = segments_.Make();
    if (!segment) return nullptr;
    segment->start = a & ~(kSegmentBytes - 1);
    segment_slot.store(segment, std::memory_order_release);
    const std::size_t place = number & kLeafMask;
    leaf->known[place / 64].fetch_or(std::uint64_t{1} << place % 64, std::memory_order_release);
    bytes_.fetch_add(sizeof(Segment), std::memory_order_relaxed);
  }
  std::size_t index = (a & (kSegmentBytes - 1)) >> page_shift_;
  auto& block_slot = segment->blocks[index / kBlockPages];
  Block* block = block_slot.load(std::memory_order_relaxed);
  if (!block) {
    block = blocks_.Make();
    if (!block) return nullptr;
    block_slot.store(block, std::memory_order_release);
    bytes_.fetch_add(sizeof(Block), std::memory_order_relaxed);
  }
  return &block->words[index % kBlockPages];
}

bool PageTable::MakeRange(Span span) {
  for (Address a = span.start; a < span.end(); a += page_size_) {
    if (!Make(a)) return false;
  }
  return true;
}

Segment* PageTable::NextSegment(Address a) const {
  if (!root_ || a >= kLimit) return nullptr;
  const std::size_t number = a >> kSegmentShift;
  std::size_t place = number & kLeafMask;
  for (std::size_t i = number >> kLeafBits; i < root_->size(); ++i, place = 0) {
    const Leaf* leaf = (*root_)[i].load(std::memory_order_acquire);
    if (!leaf) continue;
    std::uint64_t behind = ~std::uint64_t{0} << place % 64;
    for (std::size_t word = place / 64; word < leaf->known.size(); ++word, behind = ~std::uint64_t{0}) {
      const std::uint64_t known = leaf->known[word].load(std::memory_order_acquire) & behind;
      if (known) return leaf->segments[word * 64 + static_cast<std::size_t>(std::countr_zero(known))].load(std::memory_order_acquire);
    }
  }
  return nullptr;
}

}  // namespace ksmu::engine
