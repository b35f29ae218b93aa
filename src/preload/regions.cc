#include "preload/regions.h"

#include <cerrno>
#include <cstring>

#include "api/shim.h"
#include "base/own_memory.h"
#include "os/thread.h"
#include "preload/next.h"

namespace ksmu::preload {

Span PagesOf(const void* start, size_t length) {
  static const size_t page = os::SystemPageSize();
  return {reinterpret_cast<Address>(start), (length + page - 1) & ~(page - 1)};
}

bool Concerns(const void* start, size_t length) { return Active() && ksmushim_may_hold(start, length); }

int Advise(Span span, int advice) {
  const int saved = errno;
  const int error = ksmu_advise(reinterpret_cast<void*>(span.start), span.bytes, advice) == 0 ? 0 : -errno;
  errno = saved;
  return error;
}

bool NextRegion(Span span, Address* at, Span* part, int* flags) {
  const int saved = errno;
  ksmu_region_stats region;
  const bool found = *at < span.end() && ksmu_read_region(reinterpret_cast<void*>(*at), &region, sizeof region) == 0;
  errno = saved;
  if (!found) return false;
  Address start = reinterpret_cast<Address>(region.start), end = start + region.length;
  if (start >= span.end()) return false;
  if (start < *at) start = *at;
  if (end > span.end()) end = span.end();
  *part = {start, end - start};
  *flags = static_cast<int>(region.flags);
  *at = end;
  return true;
}

TakenOut::TakenOut(Span span, bool unmerge) : span_(span) {
  // What an engine that sleeps in this child would take up when it wakes: not any more.
  if (span.bytes) ksmushim_forget(reinterpret_cast<void*>(span.start), span.bytes);
  if (span.bytes == 0 || ksmushim_state() != KSMU_SHIM_RUNNING) return;
  Span part;
  int flags;
  for (Address at = span.start; NextRegion(span, &at, &part, &flags);) {
    if (!Add({part.start, part.end(), KSMU_MERGEABLE | flags})) break;
  }
  for (size_t i = 0; i < count_; ++i) {
    const Span part{parts_[i].start, parts_[i].end - parts_[i].start};
    // Where it cannot be unmerged (no memory) nothing is merged there from now on, at least: whoever looks at its pieces must
    // find what he has seen.
    if (!unmerge || Advise(part, KSMU_UNMERGEABLE) != 0) Advise(part, KSMU_RELEASE);
  }
}

TakenOut::~TakenOut() {
  if (parts_ != few_) base::UnmapOwnPages(parts_, capacity_ * sizeof(Part));
}

bool TakenOut::Add(const Part& part) {
  if (count_ == capacity_) {
    auto* more = static_cast<Part*>(base::MapOwnPages(4 * capacity_ * sizeof(Part)));
    if (!more) return false;
    std::memcpy(more, parts_, count_ * sizeof(Part));
    if (parts_ != few_) base::UnmapOwnPages(parts_, capacity_ * sizeof(Part));
    parts_ = more;
    capacity_ *= 4;
  }
  parts_[count_++] = part;
  return true;
}

void TakenOut::PutBack(Address offset, Address end) {
  for (size_t i = 0; i < count_; ++i) {
    const Part& part = parts_[i];
    Address to = part.end + offset;
    if (end && (part.end == span_.end() || to > end)) to = end;
    if (part.start + offset < to) Advise({part.start + offset, to - part.start - offset}, part.advice);
  }
}

}  // namespace ksmu::preload
