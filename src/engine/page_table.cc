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
  return leaf ? (*leaf)[number & ((1u << kLeafBits) - 1)].load(std::memory_order_acquire) : nullptr;
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
  auto& segment_slot = (*leaf)[number & ((1u << kLeafBits) - 1)];
  Segment* segment = segment_slot.load(std::memory_order_relaxed);
  if (!segment) {
    segment = segments_.Make();
    if (!segment) return nullptr;
    segment->start = a & ~(kSegmentBytes - 1);
    segment_slot.store(segment, std::memory_order_release);
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
  if (!root_) return nullptr;
  std::size_t number = a >> kSegmentShift;
  constexpr std::size_t leaf_size = std::size_t{1} << kLeafBits;
  while (number < (kLimit >> kSegmentShift)) {
    Leaf* leaf = (*root_)[number >> kLeafBits].load(std::memory_order_acquire);
    if (!leaf) {
      number = ((number >> kLeafBits) + 1) << kLeafBits;
      continue;
    }
    for (std::size_t i = number & (leaf_size - 1); i < leaf_size; ++i, ++number) {
      if (Segment* segment = (*leaf)[i].load(std::memory_order_acquire)) return segment;
    }
  }
  return nullptr;
}

}  // namespace ksmu::engine
