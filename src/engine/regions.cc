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

namespace {

// Whether two parts that adjoin belong together: two mergeable ones only if the list would have joined them.
bool Together(const Region& a, const Region& b) {
  if (a.promise != b.promise || a.sync_break != b.sync_break) return false;
  return a.cause || b.cause || a.owned == b.owned;
}

// The mergeable or excluded part at the address, nullptr: neither.
const Region* PartAt(const RegionList& regions, const RegionList& excluded, Address a) {
  const Region* part = regions.Find(a);
  if (part && part->kind == Region::kMergeable) return part;
  return part ? nullptr : excluded.Find(a);
}

}  // namespace

bool NextAdvised(const RegionList& regions, const RegionList& excluded, Address a, AdvisedRegion* out) {
  for (;;) {
    const Region* first = regions.Next(a);
    while (first && first->kind != Region::kMergeable) first = regions.Next(first->end);
    if (const Region* other = excluded.Next(a); other && (!first || other->start < first->start)) first = other;
    if (!first) return false;
    // Back to where it begins: `a` can lie in the middle of it.
    for (const Region* left; first->start > 0 && (left = PartAt(regions, excluded, first->start - 1)) && Together(*left, *first);) {
      first = left;
    }
    *out = {};
    out->whole = *first;
    bool mergeable = false;
    for (const Region* part = first; part;) {
      out->whole.end = part->end;
      if (part->cause) {
        out->excluded_bytes += part->span().bytes;
        if (!out->excluded_cause) out->excluded_cause = part->cause;
      } else {
        mergeable = true;
      }
      const Region* next = PartAt(regions, excluded, part->end);
      part = next && Together(*part, *next) ? next : nullptr;
    }
    if (mergeable) return true;
    a = out->whole.end;
  }
}

}  // namespace ksmu::engine
