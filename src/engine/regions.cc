#include "engine/regions.h"

namespace ksmu::engine {

std::size_t RegionList::LowerBound(Address a) const {
  std::size_t low = 0, high = regions_.size();
  while (low < high) {
    std::size_t middle = (low + high) / 2;
    if (regions_[middle].end <= a) low = middle + 1;
    else high = middle;
  }
  return low;
}

const Region* RegionList::Next(Address a) const {
  std::size_t i = LowerBound(a);
  return i < regions_.size() ? &regions_[i] : nullptr;
}

const Region* RegionList::Find(Address a) const {
  const Region* region = Next(a);
  return region && region->start <= a ? region : nullptr;
}

bool RegionList::Erase(Span span) {
  if (!regions_.reserve(regions_.size() + 1)) return false;
  std::size_t i = LowerBound(span.start);
  while (i < regions_.size() && regions_[i].start < span.end()) {
    Region& region = regions_[i];
    if (region.start < span.start && region.end > span.end()) {
      Region tail = region;
      tail.start = span.end();
      region.end = span.start;
      regions_.insert(i + 1, tail);
      return true;
    }
    if (region.start < span.start) {
      region.end = span.start;
      ++i;
    } else if (region.end > span.end()) {
      region.start = span.end();
      ++i;
    } else {
      regions_.erase(i);
    }
  }
  return true;
}

bool RegionList::Set(const Region& region) {
  if (!regions_.reserve(regions_.size() + 2)) return false;  // then nothing below can fail
  Erase(region.span());
  std::size_t i = LowerBound(region.start);
  bool joins_left = i > 0 && regions_[i - 1].end == region.start && regions_[i - 1].SameAs(region);
  bool joins_right = i < regions_.size() && regions_[i].start == region.end && regions_[i].SameAs(region);
  if (joins_left && joins_right) {
    regions_[i - 1].end = regions_[i].end;
    regions_.erase(i);
  } else if (joins_left) {
    regions_[i - 1].end = region.end;
  } else if (joins_right) {
    regions_[i].start = region.start;
  } else {
    regions_.insert(i, region);
  }
  return true;
}

}  // namespace ksmu::engine
