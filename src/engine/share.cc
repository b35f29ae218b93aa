// Frames of other processes: a source (frames/source.h) grants them; the merge itself is the same.
//
// Three ways lead to one:
//   known      a still page's hash is in the domain's index: the frame is acquired, and found by the comparison that follows
//   wanted     what is a candidate here is one elsewhere: published by who offered it first
//   published  what is a candidate here has got a frame: acquired as soon as that is heard of
//
// Contents that are to be published are put into the ring as they are met, and count as frames for the rest of the portion in
// hand: provisions. Asked for is once a portion, before anything of it is merged, with no gate shut; each provision is then
// replaced by the frame that it has become: a new one, another one that was there already, or, where the source has gone
// meanwhile, one of our own.

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "content/content.h"
#include "engine/engine.h"

namespace ksmu::engine {

using frames::Frame;
using frames::kNoFrame;
using frames::Pool;
using frames::Source;

namespace {
constexpr std::size_t kMostOfAHash = 4;        // frames of one hash that are acquired to be compared
constexpr std::size_t kNewsAStep = 2048;       // pages
constexpr std::size_t kMostNews = 64 * 1024;   // what comes later waits in the socket
constexpr std::size_t kLookUpsAStep = 4096;
constexpr std::size_t kLookUpSegments = 1024;
constexpr std::size_t kStraysAStep = 512;      // pages
constexpr std::size_t kStraySegments = 64;     // looked at in a step
constexpr std::uint32_t kElsewhere = (1u << 31) - 1;  // as a place in the table of samples: no segment of this process
constexpr std::uint64_t kStraysRetryNs = 200'000'000;
constexpr std::uint64_t kStraysLeave = std::uint64_t{64} << 20;  // bytes of free memory
}  // namespace

void Engine::SetSource(Source* source) {
  if (source && !wants_) wants_ = static_cast<Source::Want*>(base::MapOwnPages(Source::kMaxWants * sizeof *wants_));
  if (source && !wants_) return;  // no memory: alone
  source_gone_ = false;
  news_.clear();
  news_at_ = 0;
  pool_.SetSource(source);
  if (source && !pool_.CanPublish()) {  // no memory: alone
    pool_.SetSource(nullptr);
    source = nullptr;
  }
  replicas_.fill({});
  looking_up_ = source != nullptr;
  looked_up_to_ = strays_at_ = 0;
  strays_after_ = 0;
  Adopt(source ? source->seed() : seed_);
}

// Asks for all of them. False: nothing has been granted: not yet, or not any more (source_gone_).
bool Engine::Ask(Source::Want* wants, std::size_t count) {
  if (source_gone_) return false;
  const Source::Answer answer = pool_.source()->Settle(wants, count);
  pool_.AnswerBegins();
  source_gone_ = answer == Source::Answer::kGone;
  return answer == Source::Answer::kGranted;
}

// A page that was to be merged, and for which there is no frame. Where the broker only takes its time it is looked at again as
// soon as there is an answer; what a broker refuses is left alone for a while: a frame of our own would have to go back again.
void Engine::LeaveUnpublished(Address a) {
  if (!pool_.source() || source_gone_ || !pool_.source()->Busy()) return Leave(a, Reason::kPool);
  const Page page = table_.Load(a);
  if (page.covers()) return;
  MakeFresh(a, page);
  put_off_ = true;
}

// The first of the frames in the index that hold what this one holds.
Frame Engine::HeadOf(std::uint32_t hash, Frame frame) {
  Frame head = kNoFrame;
  index_.Lookup(hash, [&](const frames::Index::Entry& entry) {
    if (!entry.is_frame || pool_.hash(entry.frame) != hash) return frames::Index::Visit::kNext;
    if (!LiesOn(entry.frame, NodeOf(frame)) || !content::Equal(pool_.Bytes(entry.frame), pool_.Bytes(frame), page_)) {
      return frames::Index::Visit::kNext;
    }
    head = entry.frame;
    return frames::Index::Visit::kStop;
  });
  return head;
}

Frame Engine::TakeGranted(std::uint32_t hash, Frame theirs, int node) {
  bool known;
  const Frame frame = pool_.Granted(theirs, &known);
  if (frame == kNoFrame || known) return frame;
  // By the hash for which it was granted, which only a frame of that node has.
  pool_.set_node(frame, by_node_ ? node : os::kNoNode);
  Enter(frame, hash, HeadOf(hash, frame));
  return frame;
}

// Frames that the domain's index has for these hashes, where we know none: held from now on, and found by MatchPage.
void Engine::AcquireKnown(const std::uint32_t* hashes, std::size_t count, const PortionBits& leave) {
  struct Found {
    Engine* engine;
    std::uint32_t hash;
    int node;
    std::size_t of_this_hash, count;
  } found{this, 0, 0, 0, 0};
  if (source_gone_ || pool_.source()->Busy()) return;
  for (std::size_t i = 0; i < count; ++i) pool_.source()->Prefetch(hashes[i]);
  for (std::size_t i = 0; i < count && found.count + kMostOfAHash <= Source::kMaxWants; ++i) {
    if (leave[i]) continue;
    bool known = false;
    index_.Lookup(hashes[i], [&](const frames::Index::Entry& entry) {
      known = entry.is_frame && pool_.hash(entry.frame) == hashes[i] && !IsLeftAlone(entry.frame);
      return known ? frames::Index::Visit::kStop : frames::Index::Visit::kNext;
    });
    if (known) continue;
    found.hash = hashes[i];
    found.node = nodes_[i];
    found.of_this_hash = 0;
    pool_.source()->Lookup(hashes[i], [](void* cookie, Frame theirs) {
      Found& f = *static_cast<Found*>(cookie);
      Source::Want* const wants = f.engine->wants_;
      // Once for all pages of the portion that hold the same.
      for (std::size_t k = 0; k < f.count; ++k) {
        if (wants[k].theirs == theirs) return true;
      }
      wants[f.count++] = {Source::Want::kAcquire, f.hash, 0, theirs, f.node};
      return ++f.of_this_hash < kMostOfAHash;
    }, &found);
  }
  if (found.count == 0 || !Ask(wants_, found.count)) return;
  for (std::size_t i = 0; i < found.count; ++i) {
    if (wants_[i].theirs != kNoFrame) TakeGranted(wants_[i].hash, wants_[i].theirs, wants_[i].node);
  }
}

Frame Engine::Provide(std::uint32_t hash, const std::byte* bytes, int node, Frame chain) {
  const Frame provision = pool_.Provision();
  if (provision == kNoFrame) return kNoFrame;
  provided_for_[Pool::RingPlace(provision)] = node;
  std::memcpy(pool_.ProvisionBytes(provision), bytes, page_);
  Enter(provision, hash, chain);
  return provision;
}

void Engine::SettleProvisions() {
  const std::size_t count = pool_.provisions();
  if (count == 0) return;
  for (std::size_t i = 0; i < count; ++i) {
    const Frame provision = Pool::ProvisionAt(i);
    Frame beside = pool_.next(provision);
    while (beside != kNoFrame && IsLeftAlone(beside)) beside = pool_.next(beside);
    const auto kind = beside == kNoFrame ? Source::Want::kPublish : Source::Want::kReplica;
    wants_[i] = {kind, pool_.hash(provision), static_cast<std::uint32_t>(i), kNoFrame, provided_for_[i]};
  }
  // The chains as they were without them.
  for (std::size_t i = count; i-- > 0;) ForgetFrame(this, Pool::ProvisionAt(i));
  const bool there = Ask(wants_, count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::byte* const bytes = pool_.Bytes(Pool::ProvisionAt(i));
    Frame frame = there && wants_[i].theirs != kNoFrame ? TakeGranted(wants_[i].hash, wants_[i].theirs, wants_[i].node) : kNoFrame;
    if (frame == kNoFrame && source_gone_) {
      frame = WriteFrame(bytes, wants_[i].node);
      if (frame != kNoFrame) Enter(frame, wants_[i].hash, HeadOf(wants_[i].hash, frame));
    }
    settled_[i] = frame;
  }
  ReplaceProvisions(plan_, &plan_size_);
  ReplaceProvisions(twins_, &twins_size_);
  pool_.ForgetProvisions();
}

// Their pins are theirs, and are forgotten with them.
void Engine::ReplaceProvisions(Planned* plan, std::size_t* count) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < *count; ++i) {
    Planned planned = plan[i];
    if (Pool::IsProvision(planned.frame)) {
      planned.frame = settled_[Pool::RingPlace(planned.frame)];
      if (planned.frame == kNoFrame) {
        LeaveUnpublished(planned.page);
        continue;
      }
      pool_.Pin(planned.frame);
    }
    plan[kept++] = planned;
  }
  *count = kept;
}

Frame Engine::PublishNow(std::uint32_t hash, const std::byte* bytes, int node, Frame chain) {
  const Frame frame = Publish(hash, bytes, node, chain);
  if (frame == kNoFrame || !Pool::IsProvision(frame)) return frame;
  SettleProvisions();
  return settled_[0];
}

// --- news ------------------------------------------------------------------------------------------------------------

// Sends what is to be sent, and hears what others have.
bool Engine::HearNews() {
  if (!source_gone_ && news_.size() < kMostNews) {
    Source::News news;
    news.cookie = this;
    news.wanted = [](void* self, std::uint32_t hash) { static_cast<Engine*>(self)->NoteNews(hash, true); };
    news.published = [](void* self, std::uint32_t hash, Frame) { static_cast<Engine*>(self)->NoteNews(hash, false); };
    pool_.AnswerBegins();
    news.granted = [](void* self, const Source::Want& asked) { static_cast<Engine*>(self)->TakeGranted(asked.hash, asked.theirs, asked.node); };
    news.missed = [](void* self) {
      auto& engine = *static_cast<Engine*>(self);
      engine.looking_up_ = true;
      engine.looked_up_to_ = 0;
    };
    source_gone_ = !pool_.source()->Serve(news);
  }
  return looking_up_ || heard_ != 0 || news_at_ < news_.size();
}

void Engine::TendShared() {
  if (source_gone_) return;
  if (looking_up_) LookUpKnown();
  if (news_at_ < news_.size()) MatchNews();
  ReturnStrays();
}

// The candidates of this hash are matched at the next occasion.
void Engine::NoteNews(std::uint32_t hash, bool wanted) {
  if (wanted && frames::SampleTable::Sampled(hash)) {
    const std::uint32_t place = sample_table_.PlaceOf(hash);
    Segment* const segment = place == frames::SampleTable::kNowhere ? nullptr : table_.FindSegment(Address{place} << kSegmentShift);
    if (segment && segment->sample) {
      segment->sample->heard = true;
      heard_ += frames::SampleTable::kOneIn;
    }
    sample_table_.Insert(hash, kElsewhere);
  }
  index_.Lookup(hash, [&](const frames::Index::Entry& entry) {
    if (!entry.is_frame && table_.Load(entry.page * page_).value() == hash) news_.push_back({entry.page * page_, hash, wanted});
    return frames::Index::Visit::kNext;
  });
}

// Offers candidates that were there before the source was, and looks for those of whose frames nobody has told us.
void Engine::LookUpKnown() {
  std::array<Address, kReadPages> unknown;
  std::size_t count = 0, looked = 0, segments = 0;
  const auto offer = [&] {
    if (count == 0) return;
    std::byte* const bytes = ReadBuffer(count);
    Add(counters_.pages_scanned, static_cast<std::int64_t>(ReadPages(unknown.data(), count, bytes)));
    FindNodes(unknown.data(), count);
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint64_t hash = WholeHashOf(bytes + i * page_, nodes_[i]);
      const bool same = !(unread_[i / 64] >> i % 64 & 1) && hash >> 32 == table_.Load(unknown[i]).value();
      if (same) pool_.source()->Offer(hash);
      else if (by_node_) SeeAgain(unknown[i]);
    }
    count = 0;
  };
  Segment* segment = table_.NextSegment(looked_up_to_);
  for (; segment && looked < kLookUpsAStep && segments < kLookUpSegments && news_.size() < kMostNews; ++segments) {
    for (std::size_t i = 0; i < table_.pages_per_segment(); ++i) {
      Words* const word = table_.Word(segment, i);
      if (!word) continue;
      const Page page(word->load(std::memory_order_acquire));
      if (page.state() != PageState::kStill || !page.indexed()) continue;
      ++looked;
      bool found = false;
      pool_.source()->Lookup(page.value(), [](void* cookie, Frame) {
        *static_cast<bool*>(cookie) = true;
        return false;
      }, &found);
      if (found) news_.push_back({segment->start + i * page_, page.value(), false});
      else unknown[count++] = segment->start + i * page_;
      if (count == kReadPages) offer();
    }
    looked_up_to_ = segment->start + kSegmentBytes;
    segment = table_.NextSegment(looked_up_to_);
  }
  offer();
  if (!segment) looking_up_ = false;
}

void Engine::MatchNews() {
  if (gate_.LeftShut() && !gate_.Repair() && gate_.LeftShut()) return;
  std::array<Address, kReadPages> pages;
  std::array<std::uint32_t, kReadPages> hashes;
  PortionBits wanted;
  for (std::size_t done = 0; done < kNewsAStep && news_at_ < news_.size();) {
    std::size_t count = 0;
    for (; news_at_ < news_.size() && count < kReadPages; ++news_at_) {
      const News& news = news_[news_at_];
      const Page page = table_.Load(news.page);
      if (page.state() != PageState::kStill || !page.indexed() || page.value() != news.hash) continue;  // by now another one
      if (Segment* segment = table_.FindSegment(news.page); !segment->armed()) {
        if (segment->huge == Segment::kLetGo) ArmAgain(segment);  // and offered anew by its next sweep
        continue;
      }
      pages[count] = news.page;
      hashes[count] = news.hash;
      wanted[count++] = news.wanted;
    }
    done += count;
    plan_size_ = twins_size_ = zeros_size_ = 0;
    look_ = Look{};
    twins_read_ = {};
    std::byte* const bytes = ReadBuffer(count);
    Add(counters_.pages_scanned, static_cast<std::int64_t>(ReadPages(pages.data(), count, bytes)));
    FindNodes(pages.data(), count);
    PortionBits leave;
    for (std::size_t i = 0; i < count; ++i) {
      // Written since, or not there: its sweep will see to it.
      leave[i] = (unread_[i / 64] >> i % 64 & 1) || HashOf(bytes + i * page_, nodes_[i]) != hashes[i];
      // Not if it has been moved to another node, which no sweep sees.
      if (by_node_ && leave[i]) SeeAgain(pages[i]);
    }
    AcquireKnown(hashes.data(), count, leave);
    for (std::size_t i = 0; i < count; ++i) {
      if (!leave[i]) MatchPage(pages[i], hashes[i], bytes + i * page_, nodes_[i], wanted[i]);
    }
    SettleProvisions();
    const auto by_page = [](const Planned& a, const Planned& b) { return a.page < b.page; };
    std::sort(plan_, plan_ + plan_size_, by_page);
    std::sort(twins_, twins_ + twins_size_, by_page);
    MergePlanned(plan_, plan_size_);
    MergePlanned(twins_, twins_size_);
    if (plan_size_) fruitful_ = true;
  }
  gate_.FlushStaging();
  if (news_at_ < news_.size()) return;
  news_.clear();
  news_at_ = 0;
}

// What is merged in frames that no other process can have goes back to anonymous memory, where it is a page like any other.
void Engine::ReturnStrays() {
  if (pool_.strays() == 0 || system_.NowNanoseconds() < strays_after_) return;
  std::size_t left = kStraysAStep, looked = 0;
  for (Segment* segment = table_.NextSegment(strays_at_); left && looked < kStraySegments; segment = table_.NextSegment(strays_at_), ++looked) {
    if (!segment) {
      // What could not be returned is not tried again at once.
      strays_at_ = 0;
      strays_after_ = system_.NowNanoseconds() + kStraysRetryNs;
      return;
    }
    const Address start = segment->start;
    for (Address a = std::max(start, strays_at_); a < start + kSegmentBytes && left; a = strays_at_) {
      strays_at_ = a + page_;
      const Page page = table_.Load(a);
      if (page.state() != PageState::kMerged || page.busy() || !pool_.IsStray(page.value())) continue;
      const Region* region = regions_.Find(a);
      if (!region || region->kind != Region::kMergeable) continue;
      Address end = a + page_;
      while (end < std::min(start + kSegmentBytes, region->end) && end - a < left * page_ && end - a < kMaxRunPages * page_ &&
             table_.Load(end).state() == PageState::kMerged && table_.Load(end).value() == page.value() + (end - a) / page_) {
        end += page_;
      }
      os::Mapping mapping;  // each for itself
      if (system_.QueryMapping(a, &mapping) == 0 && mapping.start <= a) end = std::min(end, mapping.end);
      strays_at_ = end;
      left -= (end - a) / page_;
      if (system_.AvailableMemory() < kStraysLeave + (end - a)) return;
      ConfirmBreaks({a, end - a});  // what was written since the last sweep may be pinned: it is not to be replaced
      CountMappings(false);
      const Region copy = *region;
      if (LeavesMappings(kUnmergingLeaves) && Detach(copy, {a, end - a}, PageState::kMerged) == 0) {
        for (Address p = a; p < end; p += page_) {
          if (!table_.Load(p).covers()) Set(p, Page());
        }
      }
      if (Segment* now = table_.FindSegment(start)) LookAgainAt(now);
    }
    if (strays_at_ < start + kSegmentBytes && left) strays_at_ = start + kSegmentBytes;
  }
}

// Whether the page is there, in a mapping of which PAGEMAP_SCAN can tell what was written.
bool Engine::TellsWrites(Address a) {
  os::ScanRequest request;
  request.any_of = os::kPresent | os::kSwapped;
  request.returned = os::kWpAllowed;
  os::PageRun run;
  const os::ScanResult scan = system_.Scan({a, page_}, request, &run, 1);
  return scan.error != 0 || scan.runs == 0 || (run.categories & os::kWpAllowed);
}

// Frames of our own are punched when the library stops, and what is discarded in their mappings from then on reads as zeros.
// Others' stay, for others, and would show: so nothing may be left in their mappings. 0; -EAGAIN: pages that were written a
// moment ago have to be left alone for a while yet (remerge_seconds); -EPERM: they may be pinned for good.
int Engine::LeaveForeign() {
  const auto is_any_left = [this] {
    for (Segment* segment = table_.NextSegment(0); segment; segment = table_.NextSegment(segment->start + kSegmentBytes)) {
      for (std::size_t i = 0; i < table_.pages_per_segment(); ++i) {
        Words* const word = table_.Word(segment, i);
        if (!word) continue;
        const Page page(word->load(std::memory_order_acquire));
        const Address a = segment->start + i * page_;
        if (!page.covers() || !pool_.IsForeign(page.value())) continue;
        // What was released is about to be unmapped, by whoever said so; and of what was broken synchronously nobody can tell
        // when it was written last (docs/limits.md).
        const Region* const region = regions_.Find(a);
        os::Mapping mapping;
        if ((region && region->kind == Region::kReleased) || !TellsWrites(a)) continue;
        if (system_.QueryMapping(a, &mapping) == 0 && pool_.Shows(mapping, a, page.value())) return true;
      }
    }
    return false;
  };
  if (!is_any_left()) return 0;
  const int error = HandOver({0, PageTable::kLimit});
  if (!is_any_left()) {
    ReclaimFrames(true);
    return 0;
  }
  return error ? error : -EAGAIN;
}

}  // namespace ksmu::engine
