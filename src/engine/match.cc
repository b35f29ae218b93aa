// From a still page to a decision: zero, a frame to map, a twin to publish a frame with, or a candidate.

#include <algorithm>
#include <array>
#include <bitset>

#include "base/test_point.h"
#include "content/content.h"
#include "engine/engine.h"
#include "engine/probes.h"

namespace ksmu::engine {

using frames::Frame;
using frames::kNoFrame;

namespace {
constexpr int kChainLook = 1024;
}  // namespace

// The next sweep is to look at the page's segment, which need not be the one in hand.
void Engine::Unsettle(Address a) {
  if (Segment* segment = table_.FindSegment(a); segment && segment->unsettled == 0) segment->unsettled = 1;
}

// The next sweep looks at it as at one that it has not seen.
void Engine::MakeFresh(Address a, Page known) {
  Set(a, Page().WithState(PageState::kFresh).WithStamp(known.stamp()));
  Unsettle(a);
}

void Engine::Leave(Address a, Reason reason) {
  const Page page = table_.Load(a);
  if (page.covers()) return;
  KSMU_PROBE2(skip, a, static_cast<int>(reason));
  Set(a, Page()
             .WithState(PageState::kUnmerged)
             .WithReason(reason)
             .WithStamp(pass_)
             .WithTries(page.state() == PageState::kUnmerged ? page.tries() + 1 : std::max(page.tries(), 1u)));
  Unsettle(a);
}

// Reads the pages to `into`, page i at place i. Where nothing can be read (unmapped, PROT_NONE) the page is left. Through
// the kernel, not by plain loads: a hole is an error value here and would be a signal there.
std::size_t Engine::ReadPages(const Address* pages, std::size_t count, std::byte* into) {
  std::size_t read = 0;
  unread_.fill(0);
  for (std::size_t i = 0; i < count;) {
    std::size_t end = i + 1;
    while (end < count && pages[end] == pages[end - 1] + page_) ++end;
    std::size_t done = 0;
    while (i + done < end) {
      const std::size_t bytes = system_.ReadProgram(pages[i + done], into + (i + done) * page_, (end - i - done) * page_);
      const std::size_t whole = bytes / page_;
      read += whole;
      done += whole;
      if (i + done < end) {
        Leave(pages[i + done], Reason::kProtection);
        unread_[(i + done) / 64] |= std::uint64_t{1} << (i + done) % 64;
        ++done;
      }
    }
    i = end;
  }
  return read;
}

// Where pages are read to. The kernel pins what it writes to, page by page: a huge page spares it half of the work, but is
// worth its memory only when there is much to read; it is given back at the end of each pass (ForgetScratch): what a few thousand
// pages are read to would else be there for good in every process of a fleet, whose passes find a little again and again.
std::byte* Engine::ReadBuffer(std::size_t count) {
  if (count >= kReadPages && !huge_) huge_ = static_cast<std::byte*>(base::MapOwnHugePages((kReadPages + kTwinPages) * page_));
  if (count >= kReadPages && huge_) {
    huge_used_ = kHugeBytes;
    return huge_;
  }
  buffer_used_ = std::max(buffer_used_, std::min(count, kReadPages) * page_);
  return buffer_;
}

void Engine::ForgetReadBuffer() {
  if (huge_used_) base::ForgetOwnPages(huge_, kHugeBytes);
  huge_used_ = 0;
}

// What only one pass needs. It is as much again as all that a process of some 100 MiB needs for good.
void Engine::ForgetScratch() {
  ForgetReadBuffer();
  base::ForgetOwnPages(buffer_, kReadPages * page_);  // not what lies behind it: that is the event thread's
  buffer_used_ = 0;
  look_ = Look{};
  base::ForgetOwnPages(runs_, kRuns * sizeof(os::PageRun));
  base::ForgetOwnPages(look_runs_, kLookRuns * sizeof(os::PageRun));
  base::ForgetOwnPages(plan_, 2 * kMaxSegmentPages * sizeof(Planned));
  base::ForgetOwnPages(zeros_, 2 * kMaxSegmentPages * sizeof(Address));
}

// Gives back what the index does not need any more. To look at every entry takes its time, and commands wait: only where most must be stale.
void Engine::TrimIndex() {
  trim_pass_ = pass_;
  const auto still = static_cast<std::size_t>(std::max<std::int64_t>(counters_.Read().in(PageState::kStill), 0));
  index_.Trim(still + pool_.live());
}

std::size_t Engine::HashAndMatch(const Region& region, const Address* pages, std::size_t count) {
  // Under a gate that the last merge could not take back, this thread would wait for itself.
  if (gate_.LeftShut() && !gate_.Repair() && gate_.LeftShut()) return 0;
  plan_size_ = twins_size_ = zeros_size_ = 0;
  look_ = Look{};
  std::size_t read = 0;
  std::byte* const bytes = ReadBuffer(count);
  twins_read_ = {};
  // In portions that stay in the cache between the reading, the hashing and the comparing.
  for (std::size_t first = 0; first < count; first += kReadPages) {
    const std::size_t n = std::min(kReadPages, count - first);
    read += ReadPages(pages + first, n, bytes);
    FindNodes(pages + first, n);
    std::array<std::uint32_t, kReadPages> hashes;
    PortionBits leave;
    for (std::size_t i = 0; i < n; ++i) {
      leave[i] = unread_[i / 64] >> i % 64 & 1;  // left as it is, with its reason
      if (leave[i]) continue;
      if (tunables_.use_zero_pages.load(std::memory_order_relaxed) && content::IsZero(bytes + i * page_, page_)) {
        zeros_[zeros_size_++] = pages[first + i];
        leave[i] = true;
        continue;
      }
      if (nodes_[i] == os::kNoNode) {
        leave[i] = true;
        Leave(pages[first + i], Reason::kFailed);
        continue;
      }
      hashes[i] = HashOf(bytes + i * page_, nodes_[i]);
      index_.Prefetch(hashes[i]);
    }
    if (pool_.source()) AcquireKnown(hashes.data(), n, leave);
    for (std::size_t i = 0; i < n; ++i) {
      if (!leave[i]) MatchPage(pages[first + i], hashes[i], bytes + i * page_, nodes_[i], false);
    }
    SettleProvisions();
  }
  Add(counters_.pages_scanned, static_cast<std::int64_t>(read));
  for (std::size_t i = 0; i < zeros_size_;) {
    std::size_t end = i + 1;
    while (end < zeros_size_ && zeros_[end] == zeros_[end - 1] + page_ && end - i < kMaxRunPages) ++end;
    DropZeroRun(region, zeros_[i], end - i);
    i = end;
  }
  // Each exact attach waits until the event thread has read its event.
  const bool near = !region.promise && plan_size_ + twins_size_ > kMaxRunPages / 16;
  if (near) system_.KeepEventThreadNear(true);
  MergePlanned(plan_, plan_size_);
  std::sort(twins_, twins_ + twins_size_, [](const Planned& a, const Planned& b) { return a.page < b.page; });
  MergePlanned(twins_, twins_size_);
  gate_.FlushStaging();
  if (near) system_.KeepEventThreadNear(false);
  return read;
}

std::uint64_t Engine::WholeHashOf(const std::byte* bytes, int node) const {
  return content::Hash(bytes, page_, content::SeedOfNode(seed_, node));
}

// The half of a hash that is kept.
std::uint32_t Engine::HashOf(const std::byte* bytes, int node) const {
  return static_cast<std::uint32_t>(WholeHashOf(bytes, node) >> 32);
}

// A frame of this hash and content that may have one more sharer. Where the page continues a run and the frame is the one
// that would continue it, the hash is believed here: that just this frame has the same 32 bits by chance does not happen,
// and the gate compares every byte in any case.
Frame Engine::FrameWithRoom(Frame head, Address page, const std::byte* bytes) {
  const Planned* last = plan_size_ ? &plan_[plan_size_ - 1] : nullptr;
  const Frame expected = last && last->page + page_ == page ? last->frame + 1 : kNoFrame;
  // Far: the head has room unless it was filled just now, and then the rest is looked at once in max_page_sharing pages. What
  // was passed over would keep its room for good.
  int looked = 0;
  for (Frame f = head; f != kNoFrame && looked < kChainLook; f = pool_.next(f), ++looked) {
    if (HasRoom(f) && !IsLeftAlone(f) && (f == expected || content::Equal(pool_.Bytes(f), bytes, page_))) return f;
  }
  return kNoFrame;
}

// What a candidate held a moment ago, null if it cannot be read. Duplicates come in runs: where the one before was its
// neighbour the next ones are read with it. What is read early may be old when it is compared; the gate proves what is new.
const std::byte* Engine::ReadTwin(Address candidate) {
  if (twins_read_.contains(candidate)) return twin_bytes_ + (candidate - twins_read_.start);
  if (huge_used_ == 0) return system_.ReadProgram(candidate, scratch_, page_) == page_ ? scratch_ : nullptr;
  std::size_t pages = 1;
  if (candidate == twins_read_.end()) {
    // Only what is known to be there: to read a page that is not would make it.
    while (pages < kTwinPages && table_.Load(candidate + pages * page_).state() == PageState::kStill) ++pages;
  }
  twin_bytes_ = huge_ + kReadPages * page_;
  twins_read_ = {candidate, system_.ReadProgram(candidate, twin_bytes_, pages * page_) / page_ * page_};
  return twins_read_.bytes ? twin_bytes_ : nullptr;
}

// `wanted`: another member of the domain has such a page; it is worth a frame although we have it once.
void Engine::MatchPage(Address page, std::uint32_t hash, const std::byte* bytes, int node, bool wanted) {
  Frame frame = kNoFrame, full = kNoFrame;
  Address twin = 0;
  using Visit = frames::Index::Visit;
  index_.Lookup(hash, [&](const frames::Index::Entry& entry) {
    if (entry.is_frame) {
      if (pool_.hash(entry.frame) != hash || !LiesOn(entry.frame, node)) return Visit::kNext;
      frame = FrameWithRoom(entry.frame, page, bytes);
      if (frame != kNoFrame) return Visit::kStop;
      if (content::Equal(pool_.Bytes(entry.frame), bytes, page_)) full = entry.frame;
      return Visit::kNext;
    }
    const Address candidate = entry.page * page_;
    const Page known = table_.Load(candidate);
    if (candidate == page || known.state() != PageState::kStill || !known.indexed()) return Visit::kEraseNext;
    if (known.value() != hash) return Visit::kNext;
    if (by_node_ && NodeNow(candidate) != node) {
      SeeAgain(candidate);
      return Visit::kEraseNext;
    }
    const std::byte* const held = ReadTwin(candidate);
    if (!held) return Visit::kEraseNext;
    if (!content::Equal(held, bytes, page_)) return Visit::kNext;
    twin = candidate;
    return Visit::kEraseStop;
  });
  if (frame == kNoFrame && !twin && wanted) {
    frame = Publish(hash, bytes, node, full);
    if (frame == kNoFrame) return LeaveUnpublished(page);
  }
  if (twin) {
    if (Segment* segment = table_.FindSegment(twin); segment->huge == Segment::kLetGo) {
      ArmAgain(segment);  // and merged by the next sweep, if nobody has written to it by then
    }
    Set(twin, table_.Load(twin).WithIndexed(false));
    frame = Publish(hash, bytes, node, full);
    if (frame == kNoFrame) {
      LeaveUnpublished(twin);
      LeaveUnpublished(page);
      return;
    }
    pool_.Pin(frame);
    twins_[twins_size_++] = {twin, frame};
  }
  if (frame != kNoFrame) {
    pool_.Pin(frame);
    plan_[plan_size_++] = {page, frame};
    return;
  }
  const Page old = table_.Load(page);
  const bool indexed = index_.Insert(hash, {false, kNoFrame, page / page_});
  Set(page, Page().WithState(PageState::kStill).WithValue(hash).WithIndexed(indexed).WithStamp(old.stamp()));
  // All of the hash, of which half has been kept: made once more, from bytes that are in the cache.
  if (frames::Source* const source = pool_.source(); source && indexed) source->Offer(WholeHashOf(bytes, node));
}

// A frame of this content. It may be planned with from now on, and mapped once it is no provision any more (share.cc).
// `chain`: a full frame of the same content.
Frame Engine::Publish(std::uint32_t hash, const std::byte* bytes, int node, Frame chain) {
  if (node == os::kNoNode) return kNoFrame;  // it lies nowhere that could be told
  if (pool_.source() && !source_gone_) return Provide(hash, bytes, node, chain);
  KSMU_TEST_POINT("publish.begin", reinterpret_cast<Address>(bytes), page_);
  const Frame frame = WriteFrame(bytes, node);
  if (frame == kNoFrame) return kNoFrame;
  Enter(frame, hash, chain);
  KSMU_TEST_POINT("publish.written", reinterpret_cast<Address>(bytes), page_);
  return frame;
}

// Writes a frame of our own. It never changes again.
Frame Engine::WriteFrame(const std::byte* bytes, int node) {
  const Frame frame = pool_.Allocate(by_node_ ? node : os::kNoNode);
  if (frame == kNoFrame) return kNoFrame;
  const os::Partial written =
      system_.WriteFile(pool_.OsFile(frame), pool_.Offset(frame), reinterpret_cast<Address>(bytes), page_);
  // If not, it has no sharer: the next Reclaim takes it back.
  if (written.done != page_) return kNoFrame;
  if (!by_node_) return frame;
  // A node without free memory is helped out by another one. What lies there is no frame of this node.
  static_cast<void>(*static_cast<const volatile std::byte*>(pool_.Bytes(frame)));
  return NodeNow(reinterpret_cast<Address>(pool_.Bytes(frame))) == node ? frame : kNoFrame;
}

// Makes the frame known, at the head of the chain of those that hold the same.
void Engine::Enter(Frame frame, std::uint32_t hash, Frame chain) {
  pool_.set_hash(frame, hash);
  pool_.set_next(frame, chain);
  using Visit = frames::Index::Visit;
  if (chain != kNoFrame) {
    index_.Lookup(hash, [&](const frames::Index::Entry& entry) {
      return entry.is_frame && entry.frame == chain ? Visit::kEraseStop : Visit::kNext;
    });
    if (pool_.next(chain) == kNoFrame) Add(counters_.chains, 1), Add(counters_.dups, 1);
    Add(counters_.dups, 1);
  }
  index_.Insert(hash, {true, frame, 0});  // no memory: the frame is mapped by who asked for it, and not found by others
}

void Engine::ForgetFrame(void* self, Frame frame) {
  auto& engine = *static_cast<Engine*>(self);
  using Visit = frames::Index::Visit;
  Frame new_head = kNoFrame;
  const std::uint32_t hash = engine.pool_.hash(frame);
  bool in_chain = false, was_pair = false;
  engine.index_.Lookup(hash, [&](const frames::Index::Entry& entry) {
    if (!entry.is_frame || engine.pool_.hash(entry.frame) != hash) return Visit::kNext;
    if (entry.frame == frame) {
      new_head = engine.pool_.next(frame);
      in_chain = new_head != kNoFrame;
      was_pair = in_chain && engine.pool_.next(new_head) == kNoFrame;
      return Visit::kEraseStop;
    }
    for (Frame f = entry.frame; engine.pool_.next(f) != kNoFrame; f = engine.pool_.next(f)) {
      if (engine.pool_.next(f) != frame) continue;
      engine.pool_.set_next(f, engine.pool_.next(frame));
      in_chain = true;
      was_pair = f == entry.frame && engine.pool_.next(f) == kNoFrame;
      return Visit::kStop;
    }
    return Visit::kNext;
  });
  if (new_head != kNoFrame) engine.index_.Insert(hash, {true, new_head, 0});
  if (in_chain) {
    Add(engine.counters_.dups, was_pair ? -2 : -1);
    if (was_pair) Add(engine.counters_.chains, -1);
  }
}

bool Engine::HashOfEntry(void* self, const frames::Index::Entry& entry, std::uint32_t* hash) {
  auto& engine = *static_cast<Engine*>(self);
  if (entry.is_frame) {
    *hash = engine.pool_.hash(entry.frame);
    return true;
  }
  const Page page = engine.table_.Load(entry.page * engine.page_);
  *hash = page.value();
  return page.state() == PageState::kStill && page.indexed();
}

// Merges what was planned, in runs: consecutive pages that are to map consecutive frames.
void Engine::MergePlanned(Planned* plan, std::size_t count) {
  SpreadRepeats(plan, count);
  for (std::size_t i = 0; i < count;) {
    if (poll_) poll_(poll_cookie_);
    const Region* region = regions_.Find(plan[i].page);
    std::size_t end = i + 1;
    while (end < count && end - i < kMaxRunPages && plan[end].page == plan[end - 1].page + page_ &&
           plan[end].frame == plan[end - 1].frame + 1 && pool_.SameFile(plan[end].frame, plan[i].frame) &&
           region && plan[end].page < region->end) {
      ++end;
    }
    if (region && region->kind == Region::kMergeable) {
      const Region copy = *region;
      MergeRun(copy, plan[i].page, end - i, plan[i].frame);
      // A twin's segment is another one, and may have been quiet: what could not be merged there is to be tried again.
      for (Address a = plan[i].page & ~(kSegmentBytes - 1); a <= plan[end - 1].page; a += kSegmentBytes) Unsettle(a);
    }
    for (std::size_t k = i; k < end; ++k) pool_.Unpin(plan[k].frame);
    i = end;
  }
}

}  // namespace ksmu::engine
