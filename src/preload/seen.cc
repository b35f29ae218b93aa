#include "preload/seen.h"

#include <time.h>

#include <cstring>

#include "base/own_memory.h"

namespace ksmu::preload {

constinit Seen g_seen;

std::uint64_t Seen::Now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

// Address space for all; memory for what is used.
bool Seen::Ready() {
  if (!ranges_) ranges_ = static_cast<Range*>(base::MapInheritedPages(kCapacity * sizeof(Range)));
  return ranges_ != nullptr;
}

std::size_t Seen::LowerBound(Address a) const {
  std::size_t low = 0, high = count_;
  while (low < high) {
    const std::size_t middle = (low + high) / 2;
    if (ranges_[middle].end <= a) low = middle + 1;
    else high = middle;
  }
  return low;
}

bool Seen::Erase(Span span) {
  std::size_t i = LowerBound(span.start);
  if (i < count_ && ranges_[i].start < span.start) {
    Range& cut = ranges_[i];
    if (cut.end > span.end()) {
      if (count_ == kCapacity) {
        // The tail is forgotten: it is not merged automatically.
        cut.end = span.start;
        return false;
      }
      Range tail = cut;
      tail.start = span.end();
      cut.end = span.start;
      std::memmove(ranges_ + i + 2, ranges_ + i + 1, (count_ - i - 1) * sizeof(Range));
      ranges_[i + 1] = tail;
      ++count_;
      return true;
    }
    cut.end = span.start;
    ++i;
  }
  std::size_t last = i;
  while (last < count_ && ranges_[last].end <= span.end()) ++last;
  std::memmove(ranges_ + i, ranges_ + last, (count_ - last) * sizeof(Range));
  count_ -= last - i;
  if (i < count_ && ranges_[i].start < span.end()) ranges_[i].start = span.end();
  return true;
}

// Neighbours in one state are one range, as they are one mapping.
void Seen::Insert(const Range& range) {
  const std::size_t i = LowerBound(range.start);
  const bool before = i > 0 && ranges_[i - 1].end == range.start && ranges_[i - 1].state == range.state;
  const bool after = i < count_ && ranges_[i].start == range.end && ranges_[i].state == range.state;
  if (before && after) {
    ranges_[i - 1].end = ranges_[i].end;
    ranges_[i - 1].since = range.since;
    std::memmove(ranges_ + i, ranges_ + i + 1, (count_ - i - 1) * sizeof(Range));
    --count_;
  } else if (before) {
    ranges_[i - 1].end = range.end;
    ranges_[i - 1].since = range.since;
  } else if (after) {
    ranges_[i].start = range.start;
    ranges_[i].since = range.since;
  } else if (count_ < kCapacity) {
    std::memmove(ranges_ + i + 1, ranges_ + i, (count_ - i) * sizeof(Range));
    ranges_[i] = range;
    ++count_;
  }  // else it is not known, and not merged automatically
}

// The thread that advises holds no lock and allocates nothing meanwhile: it takes no longer than the library's scanner does.
void Seen::AwaitAdvice(Span span, std::uint64_t* mask) {
  for (;;) {
    const std::uint32_t seen = advices_.load(std::memory_order_acquire);
    bool busy = false;
    for (std::size_t i = LowerBound(span.start); i < count_ && ranges_[i].start < span.end(); ++i) {
      busy |= ranges_[i].state == kAdvising;
    }
    if (!busy) return;
    lock_.Release(*mask);
    Lock::Wait(&advices_, seen, 10'000'000);
    *mask = lock_.Acquire();
  }
}

void Seen::Add(Span span, State state) {
  std::uint64_t mask = lock_.Acquire();
  if (Ready()) {
    AwaitAdvice(span, &mask);
    Erase(span);
    Insert({span.start, span.end(), Now(), state});
  }
  lock_.Release(mask);
}

void Seen::Remove(Span span) {
  std::uint64_t mask = lock_.Acquire();
  if (count_) {
    AwaitAdvice(span, &mask);
    Erase(span);
  }
  lock_.Release(mask);
}

void Seen::Set(Span span, State state, int only) {
  std::uint64_t mask = lock_.Acquire();
  if (count_) {
    AwaitAdvice(span, &mask);
    for (Address at = span.start; at < span.end();) {
      const std::size_t i = LowerBound(at);
      if (i == count_ || ranges_[i].start >= span.end()) break;
      Range part = ranges_[i];
      if (part.start < span.start) part.start = span.start;
      if (part.end > span.end()) part.end = span.end();
      at = part.end;
      if (part.state == state || (only >= 0 && part.state != only)) continue;
      part.state = state;
      part.since = Now();
      if (Erase({part.start, part.end - part.start})) Insert(part);
    }
  }
  lock_.Release(mask);
}

Seen::State Seen::TakeOut(Span span) {
  std::uint64_t mask = lock_.Acquire();
  State state = kUnknown;
  if (count_) {
    AwaitAdvice(span, &mask);
    std::size_t i = LowerBound(span.start);
    if (i < count_ && ranges_[i].start <= span.start && ranges_[i].end >= span.end()) state = ranges_[i].state;
    else if (i < count_ && ranges_[i].start < span.end()) state = kRefused;
    Erase(span);
  }
  lock_.Release(mask);
  return state;
}

bool Seen::Take(std::size_t least, std::uint64_t before, Span* out, bool* waiting) {
  const Held held(lock_);
  *waiting = false;
  for (std::size_t i = 0; i < count_; ++i) {
    Range& range = ranges_[i];
    if (range.state != kWritable || range.end - range.start < least) continue;
    if (range.since > before) {
      *waiting = true;
      continue;
    }
    range.state = kAdvising;
    *out = {range.start, range.end - range.start};
    return true;
  }
  return false;
}

void Seen::Done(Span span, State state) {
  {
    const Held held(lock_);
    for (std::size_t i = LowerBound(span.start); i < count_ && ranges_[i].start < span.end(); ++i) {
      if (ranges_[i].state == kAdvising) ranges_[i].state = state;
    }
  }
  advices_.fetch_add(1, std::memory_order_release);
  Lock::Wake(&advices_, 1 << 30);
}

bool Seen::NextIn(State state, Address at, Span* out) {
  const Held held(lock_);
  for (std::size_t i = LowerBound(at); i < count_; ++i) {
    if (ranges_[i].state != state) continue;
    const Address start = ranges_[i].start < at ? at : ranges_[i].start;
    *out = {start, ranges_[i].end - start};
    return true;
  }
  return false;
}

}  // namespace ksmu::preload
