// Transitions of page words, with the counters and the counts of frames that go with them.

#include "engine/engine.h"
#include "engine/probes.h"

namespace ksmu::engine {

bool Engine::Change(Words* word, Page& from, Page to) {
  std::uint64_t expected = from.word();
  if (!word->compare_exchange_strong(expected, to.word(), std::memory_order_acq_rel)) {
    from = Page(expected);
    return false;
  }
  counters_.Move(from, to);
  return true;
}

void Engine::Set(Address a, Page to) {
  Words* word = table_.Make(a);
  if (!word) return;
  Page from(word->load(std::memory_order_acquire));
  while (!Change(word, from, to)) {
  }
}

// A discard was announced. The mark is sticky: from now on a fault that finds no page here is answered with zeros,
// whatever happens to the page in between, until the page is attached anew. So marking twice, early or late does no harm.
void Engine::MarkDiscarded(Words* word) {
  Page from(word->load(std::memory_order_acquire));
  for (;;) {
    if (!from.covers() && !from.busy()) return;
    Page to = from.WithDiscarded(true);
    if (from.covers()) to = to.WithStamp(NowSeconds());  // see OldEnough
    // A page in the scanner's hands is only marked; the scanner looks at the mark when it lets go.
    const bool counted = !from.busy() && (from.state() == PageState::kMerged || from.state() == PageState::kBroken);
    if (counted) to = to.WithState(PageState::kDropped).WithUnconfirmed(false);
    if (to.word() == from.word()) return;
    if (!Change(word, from, to)) continue;
    if (counted) {
      Add(counters_.discards, 1);
      if (from.state() == PageState::kMerged) pool_.Unshare(from.value());
      if (from.unconfirmed()) pool_.Unpin(from.value());
    }
    return;
  }
}

std::size_t Engine::RunStartsAt(Address a) const {
  std::size_t starts = 0;
  for (Address at : {a, a + page_}) {
    const Page page = table_.Load(at), left = table_.Load(at - page_);
    starts += page.covers() && !(left.covers() && left.value() + 1 == page.value());
  }
  return starts;
}

// The page's mapping of a frame is gone (unmapped, moved, replaced by anonymous memory).
void Engine::ForgetPage(Address a, Words* word) {
  Page from(word->load(std::memory_order_acquire));
  const std::size_t before = from.covers() ? RunStartsAt(a) : 0;
  while (!Change(word, from, Page())) {
  }
  if (from.covers()) maps_used_ += RunStartsAt(a) - before;
  if (!from.covers()) return;
  if (from.state() == PageState::kMerged) pool_.Unshare(from.value());
  if (from.unconfirmed()) pool_.Unpin(from.value());
  pool_.Uncover(from.value());
}

void Engine::ForgetRange(Span span) {
  Address at = span.start;
  while (Segment* segment = table_.NextSegment(at)) {
    if (segment->start >= span.end()) break;
    const Address low = at > segment->start ? at : segment->start;
    const Address high = span.end() < segment->start + kSegmentBytes ? span.end() : segment->start + kSegmentBytes;
    for (Address a = low; a < high; a += page_) {
      if (Words* word = table_.Word(segment, (a - segment->start) / page_)) ForgetPage(a, word);
    }
    LookAnew(segment);
    at = segment->start + kSegmentBytes;
  }
}

RegionCounts Engine::CountRegion(Span span) const {
  RegionCounts counts;
  Address at = span.start;
  while (Segment* segment = table_.NextSegment(at)) {
    if (segment->start >= span.end()) break;
    const Address low = at > segment->start ? at : segment->start;
    const Address high = span.end() < segment->start + kSegmentBytes ? span.end() : segment->start + kSegmentBytes;
    for (Address a = low; a < high; a += page_) {
      Words* word = table_.Word(segment, (a - segment->start) / page_);
      if (!word) continue;
      const Page page(word->load(std::memory_order_acquire));
      ++counts.pages[static_cast<std::size_t>(page.state())];
      if (page.state() == PageState::kUnmerged) ++counts.unmerged[static_cast<std::size_t>(page.reason())];
    }
    at = segment->start + kSegmentBytes;
  }
  return counts;
}

}  // namespace ksmu::engine
