// The regions: sorted, disjoint ranges of addresses with their flags.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/own_memory.h"
#include "engine/page_table.h"

namespace ksmu::engine {

struct Region {
  enum Kind : std::uint8_t {
    kMergeable,  // advised
    kReleased,   // about to be unmapped: its frames are kept until the mapping is seen to be gone
    kRetired,    // advised no more; its pages are private again, but some lie in mappings of frames still
  };
  Address start = 0;
  Address end = 0;
  bool promise = false;     // KSMU_F_NO_RAW_DISCARDS
  bool sync_break = false;  // KSMU_F_SYNC_BREAK
  bool owned = false;       // made by ksmu_map
  Kind kind = kMergeable;
  std::uint8_t cause = 0;  // in the list of what was advised and cannot be merged: why, an errno; else 0

  Span span() const { return {start, end - start}; }
  bool SameAs(const Region& r) const {
    return promise == r.promise && sync_break == r.sync_break && owned == r.owned && kind == r.kind && cause == r.cause;
  }
};

class RegionList {
 public:
  // Puts `region` in place of whatever lies in its range; neighbours of the same properties are joined. False: no memory,
  // nothing changed.
  bool Set(const Region& region);
  // Takes the range out. False: no memory (a region had to be split), nothing changed.
  bool Erase(Span span);
  const Region* Find(Address a) const;
  // The first region that ends above `a`, or nullptr. Pointers are valid until the next change.
  const Region* Next(Address a) const;
  std::size_t size() const { return regions_.size(); }
  const Region& operator[](std::size_t i) const { return regions_[i]; }
  std::size_t metadata_bytes() const { return regions_.size() * sizeof(Region); }

 private:
  std::size_t LowerBound(Address a) const;  // the first region that ends above `a`
  base::OwnVector<Region> regions_;
};

// What the program is shown as one region: a mergeable part with the excluded parts of its advice around and within it.
struct AdvisedRegion {
  Region whole;
  std::size_t excluded_bytes = 0;
  int excluded_cause = 0;  // of the first of them
};
// The first one that ends above `a`; false: none. Excluded parts beside which nothing mergeable is left are passed over.
bool NextAdvised(const RegionList& regions, const RegionList& excluded, Address a, AdvisedRegion* out);

}  // namespace ksmu::engine
