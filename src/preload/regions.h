// Regions in a range, taken out for a call that could not be made on them (mremap, a lock, somebody else's userfaultfd), and
// advised again afterwards with the flags they had.
#pragma once

#include <cstddef>

#include "ksmu/ksmu.h"
#include "os/os.h"

namespace ksmu::preload {

using os::Address;
using os::Span;

// Whole pages, as the kernel rounds.
Span PagesOf(const void* start, size_t length);

// Whether a call on the range concerns the library at all. Costs two loads where it does not.
bool Concerns(const void* start, size_t length);

// The first part of the range that is a region, from *at on; *at goes on behind it.
bool NextRegion(Span span, Address* at, Span* part, int* flags);

class TakenOut {
 public:
  // `unmerge`: pages get copies of their own and the range is plain memory afterwards; else it is only let go of, to be
  // unmapped or replaced. Does not fail: what does not fit into memory stays merged (and the caller's call may fail).
  TakenOut(Span span, bool unmerge);
  ~TakenOut();
  TakenOut(const TakenOut&) = delete;

  bool any() const { return count_ != 0; }
  // Advises again, everything moved by `offset`; the last part, if it reached the end of the range, up to `end`.
  void PutBack(Address offset = 0, Address end = 0);
  // Calls each(span, advice).
  template <typename F>
  void ForEach(F&& each) const {
    for (size_t i = 0; i < count_; ++i) each(Span{parts_[i].start, parts_[i].end - parts_[i].start}, parts_[i].advice);
  }

 private:
  struct Part {
    Address start, end;
    int advice;
  };
  static constexpr size_t kFew = 16;
  bool Add(const Part& part);

  Span span_;
  Part few_[kFew];
  Part* parts_ = few_;
  size_t count_ = 0, capacity_ = kFew;
};

// As ksmu_advise, with errno left alone: 0 or -errno.
int Advise(Span span, int advice);

}  // namespace ksmu::preload
