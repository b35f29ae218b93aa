// Transparent huge pages: looked at before they are split.
//
// Arming a huge page costs it its huge mapping at the first write, and taking one page out splits it for good. So a
// segment that is found mapped huge is disarmed at once and sampled instead: all of it is read and hashed, and of the
// hashes every sixteenth content is remembered, the same ones in every segment. Sampled twice, an interval apart, it is
// armed if at least thp_min_duplicates of its pages are still and can be expected to merge or are zero; otherwise its
// pages are `unmerged_huge` and it is sampled again ever more rarely. With smart_scan=0 nothing is sampled.
//
// The way back: khugepaged makes no huge page of what is armed. So a segment that could be one, and in which every page has
// been still and unlike any other for a while, is let go of: disarmed, its pages remembered as before, so that another page
// can still find its twin there (which arms it again). It is read again ever more rarely, to see whether it has changed,
// and sampled if it has become huge.

#include <algorithm>
#include <bit>
#include <utility>

#include "content/content.h"
#include "engine/engine.h"

namespace ksmu::engine {
namespace {
constexpr std::uint8_t kMaxSampleBackoff = 7;
constexpr std::uint8_t kLooks = 2;            // complete ones
constexpr std::uint16_t kLetGoPasses = 32;    // until it is looked at again, and twice as many each time
constexpr std::uint8_t kMaxLetGo = 6;
constexpr std::uint8_t kMostRestless = 8;

// Of a segment of so many pages, those by which a change of all of it is noticed.
std::size_t ProbeAt(std::size_t i, std::size_t pages) {
  constexpr std::size_t kProbes = std::tuple_size_v<decltype(Sample::probes)>;
  return pages / kProbes * i + pages / kProbes / 3;
}

std::uint32_t PlaceOf(const Segment& segment) { return static_cast<std::uint32_t>(segment.start >> kSegmentShift); }
}  // namespace

bool Engine::SamplesHuge() const {
  return tunables_.smart_scan.load(std::memory_order_relaxed) &&
         tunables_.thp_min_duplicates.load(std::memory_order_relaxed) > 1 && table_.pages_per_segment() <= kMaxSegmentPages;
}

// Gives every page of the segment that maps no frame this state.
void Engine::SetSegment(const Segment& segment, Page to) {
  for (Address a = segment.start; a < segment.start + kSegmentBytes; a += page_) {
    const Region* region = regions_.Find(a);
    if (!region || region->kind != Region::kMergeable) continue;
    Words* word = table_.Make(a);
    if (!word) return;
    Page page(word->load(std::memory_order_acquire));
    while (!page.covers() && !page.busy() && !Change(word, page, to)) {
    }
  }
}

// The segment at `start` has just been armed and found mapped huge. True: it is sampled from now on, and disarmed again.
bool Engine::BeginSampling(const Region& region, Address start) {
  if (!SamplesHuge() || start < region.start || region.end - start < kSegmentBytes) return false;
  if (!table_.Make(start)) return false;
  Segment* segment = table_.FindSegment(start);
  if (segment->huge == Segment::kApproved) return false;
  if (!segment->sample && !(segment->sample = samples_.Make())) return false;
  // A segment in which something is merged is not huge any more; what is huge there can be one page of two mappings.
  for (std::size_t i = 0; i < table_.pages_per_segment(); ++i) {
    Words* word = table_.Word(segment, i);
    if (word && Page(word->load(std::memory_order_acquire)).covers()) return false;
  }
  system_.WriteProtect(os::kTracker, {start, kSegmentBytes}, false);
  segment->huge = Segment::kSampling;
  segment->sample->Clear();
  segment->wait = segment->backoff = 0;
  SetSegment(*segment, Page().WithState(PageState::kUnmerged).WithReason(Reason::kHuge).WithStamp(pass_));
  return true;
}

void Engine::EndSampling(Segment* segment, bool approved) {
  segment->huge = approved ? Segment::kApproved : Segment::kPlain;
  segment->wait = segment->backoff = segment->looks = 0;
  segment->unsettled = 1;
  // Not of this pass: what the next sweep finds unwritten is still. Armed by now, or everything would count as written.
  system_.WriteProtect(os::kTracker, {segment->start, kSegmentBytes}, true);
  SetSegment(*segment, Page().WithState(PageState::kFresh).WithStamp(pass_ - 1));
  if (segment->sample) samples_.Free(segment->sample);
  segment->sample = nullptr;
}

// Whether all of the segment is there, and by one huge page. Asked before it is read: that would populate what is not there.
bool Engine::IsWhole(const Segment& segment, bool* huge) {
  os::ScanRequest request;
  request.any_of = os::kPresent;
  request.returned = os::kPresent | os::kHuge;
  os::PageRun run;
  const os::ScanResult scan = system_.Scan({segment.start, kSegmentBytes}, request, &run, 1);
  if (scan.error || scan.runs == 0 || run.start != segment.start || run.end != segment.start + kSegmentBytes) return false;
  *huge = run.categories & os::kHuge;
  return true;
}

// Whether a frame, or a candidate that is known here, has this hash.
bool Engine::IsKnown(std::uint32_t hash) {
  bool known = false;
  index_.Lookup(hash, [&](const frames::Index::Entry& entry) {
    std::uint32_t entrys;
    known = HashOfEntry(this, entry, &entrys) && entrys == hash;
    return known ? frames::Index::Visit::kStop : frames::Index::Visit::kNext;
  });
  if (!known && pool_.source()) {
    pool_.source()->Lookup(hash, [](void* cookie, frames::Frame) { return !(*static_cast<bool*>(cookie) = true); }, &known);
  }
  return known;
}

// Reads the segment and remembers what it has seen. False: the segment is not huge any more.
bool Engine::SampleSegment(Segment* segment) {
  if (gate_.LeftShut()) return true;  // not now
  bool huge = false;
  if (!IsWhole(*segment, &huge) || !huge) return false;
  int node = 0;  // of all of it: it is one page
  if (by_node_ && (node = NodeNow(segment->start)) == os::kNoNode) return false;
  Sample now;
  std::array<std::uint32_t, kMaxSegmentPages> seen;
  std::size_t seen_size = 0;
  const std::size_t pages = table_.pages_per_segment();
  std::size_t read = 0;
  std::byte* const bytes = ReadBuffer(kReadPages);
  std::size_t probe = 0;
  for (std::size_t first = 0; first < pages; first += kReadPages) {
    const std::size_t n = std::min(kReadPages, pages - first);
    const std::size_t whole = system_.ReadProgram(segment->start + first * page_, bytes, n * page_) / page_;
    read += whole;
    for (; probe < now.probes.size() && ProbeAt(probe, pages) < first + whole; ++probe) {
      const std::size_t at = ProbeAt(probe, pages);
      if (at >= first) now.probes[probe] = HashOf(bytes + (at - first) * page_, node);  // else it could not be read
    }
    for (std::size_t i = 0; i < whole; ++i) {
      if (content::IsZero(bytes + i * page_, page_)) {
        ++now.zeros;
        continue;
      }
      const std::uint64_t whole_hash = WholeHashOf(bytes + i * page_, node);
      const auto hash = static_cast<std::uint32_t>(whole_hash >> 32);
      seen[seen_size++] = hash;
      if (!frames::SampleTable::Sampled(hash) || now.count == now.hashes.size()) continue;
      now.hashes[now.count++] = hash;
      // Whoever has it too is told so, and tells us: the table then holds it for another place.
      if (pool_.source()) pool_.source()->Offer(whole_hash);
    }
  }
  Add(counters_.pages_scanned, static_cast<std::int64_t>(read));
  // A content that fills half of the segment is one content: the chances are that it is not among those remembered.
  std::sort(seen.begin(), seen.begin() + seen_size);
  for (std::size_t i = 0; i < seen_size;) {
    std::size_t end = i + 1;
    while (end < seen_size && seen[end] == seen[i]) ++end;
    now.alike += IsKnown(seen[i]) ? end - i : end - i - 1;
    i = end;
  }
  std::sort(now.hashes.begin(), now.hashes.begin() + now.count);
  for (std::size_t i = 0; i < now.count; ++i) sample_table_.Insert(now.hashes[i], PlaceOf(*segment));
  Sample& sample = *segment->sample;
  // What was there the last time, too, is still.
  now.still_zeros = std::min(now.zeros, sample.zeros);
  now.still_alike = std::min(now.alike, sample.alike);
  for (std::size_t i = 0; i < now.count; ++i) {
    const bool before = std::binary_search(sample.hashes.begin(), sample.hashes.begin() + sample.count, now.hashes[i]);
    if (sample.taken && before) now.still |= std::uint64_t{1} << i;
  }
  now.taken = true;
  now.restless = sample.restless;
  sample = now;
  return true;
}

// How many of the segment's pages can be expected to merge, or are zero. `now`: whether they are still does not matter.
std::size_t Engine::ExpectedOf(const Segment& segment, bool now) {
  const Sample& sample = *segment.sample;
  std::size_t found = 0;
  for (std::size_t i = 0; i < sample.count; ++i) {
    const std::uint32_t hash = sample.hashes[i];
    if (!now && !(sample.still >> i & 1)) continue;
    bool known = (i > 0 && sample.hashes[i - 1] == hash) || (i + 1 < sample.count && sample.hashes[i + 1] == hash) ||
                 sample_table_.Elsewhere(hash, PlaceOf(segment));
    found += known || IsKnown(hash);
  }
  return std::max(found * frames::SampleTable::kOneIn, now ? sample.alike : sample.still_alike) + (now ? sample.zeros : sample.still_zeros);
}

// Whether the contents of a few pages tell that the segment, which waits to be looked at, is not what it was; and, where it is
// sampled, that it has come to rest. So what is given new contents as a whole need not wait for long.
bool Engine::HasChanged(Segment* segment) {
  bool huge = false;
  if (gate_.LeftShut() || !IsWhole(*segment, &huge)) return false;
  const bool sampled = segment->huge == Segment::kSampling;
  std::array<std::uint32_t, std::tuple_size_v<decltype(Sample::probes)>> seen{};
  for (std::size_t i = 0; i < seen.size(); ++i) {
    const Address at = segment->start + ProbeAt(i, table_.pages_per_segment()) * page_;
    if (system_.ReadProgram(at, scratch_, page_) != page_) return false;
    FindNodes({at, page_});
    seen[i] = HashOf(scratch_, nodes_[0]);
    const Page page = table_.Load(at);
    if (!sampled && page.state() == PageState::kStill && page.value() != seen[i]) return probe_found_ = true;
  }
  if (!sampled || !segment->sample->taken) return false;
  Sample& sample = *segment->sample;
  const bool differs = seen != sample.probes;
  const bool rests = sample.changed && !differs;
  sample.probes = seen;
  sample.changed = differs;
  probe_found_ |= differs;
  if (!rests) return false;
  // From the beginning: what was there before says nothing of what is still.
  sample.taken = false;
  sample.restless = 0;
  segment->backoff = 0;
  return true;
}

// Not armed: it is let go of, being sampled, or waits for its turn; those behind it that wait, too, are passed in one go.
// Returns how far.
Address Engine::TendUnarmed(Segment* segment, Address end, bool now) {
  if (!now && segment->wait && SamplesHuge()) {
    std::size_t passed = 0;
    Address at = segment->start;
    for (; segment && segment->start == at && at < end && segment->wait && !segment->armed();
         segment = table_.NextSegment(at)) {
      const bool heard = segment->sample && std::exchange(segment->sample->heard, false);
      if ((heard && IsWorthIt(*segment, false)) || (probing_ && HasChanged(segment))) {
        segment->wait = 0;
        break;
      }
      segment->wait -= static_cast<std::uint16_t>(std::min<std::uint32_t>(segment->wait, pass_step_));
      at += kSegmentBytes;
      ++passed;
    }
    Add(counters_.pages_skipped, static_cast<std::int64_t>(passed * table_.pages_per_segment()));
    if (passed || !segment || segment->wait) return std::min(at, end);
  }
  if (segment->huge == Segment::kSampling) TendSampled(segment, now);
  else TendLetGo(segment, now);
  return std::min(end, segment->start + kSegmentBytes);
}

// Whatever is known of the segment, look again: something has been done to it.
void Engine::LookAnew(Segment* segment) {
  segment->huge = Segment::kPlain;
  segment->wait = segment->backoff = segment->looks = segment->let_go = segment->quiet = 0;
  segment->unsettled = 1;
}

// The same at the next sweep, without undoing what is known of its heat.
void Engine::LookAgainAt(Segment* segment) {
  if (segment->huge == Segment::kLetGo) return ArmAgain(segment);
  segment->unsettled = 1;
  segment->quiet = 0;
}

void Engine::ArmAgain(Segment* segment) {
  segment->let_go = 0;
  EndSampling(segment, false);
}

// All of the segment is there, nothing in it is merged, and nothing was written since the last look.
void Engine::LetGoIfFruitless(Segment* segment) {
  if (!SamplesHuge() || ++segment->looks < kLooks) return;
  segment->looks = 0;
  const Region* region = regions_.Find(segment->start);
  if (!region || region->end - segment->start < kSegmentBytes) return;
  for (std::size_t i = 0; i < table_.pages_per_segment(); ++i) {
    Words* word = table_.Word(segment, i);
    if (!word || Page(word->load(std::memory_order_acquire)).state() != PageState::kStill) return;
  }
  Address until = 0;
  const os::Attributes attributes = AttributesOf({segment->start, kSegmentBytes}, &until);
  const os::HugePages mode = system_.TransparentHugePages();
  const bool wanted = mode == os::HugePages::kAlways || (mode == os::HugePages::kAdvised && attributes.huge_page);
  if (!wanted || attributes.no_huge_page || until < segment->start + kSegmentBytes) return;
  if (system_.WriteProtect(os::kTracker, {segment->start, kSegmentBytes}, false) != 0) return;
  LetGoOn(segment);
}

// Left alone for as long again, and more.
void Engine::LetGoOn(Segment* segment) {
  segment->huge = Segment::kLetGo;
  segment->let_go = std::min<std::uint8_t>(segment->let_go + 1, kMaxLetGo);
  segment->wait = static_cast<std::uint16_t>(kLetGoPasses << segment->let_go);
}

// Whether every page of the segment still holds what it held. False, too, where something is missing.
bool Engine::IsUnchanged(const Segment& segment, bool* huge) {
  if (!IsWhole(segment, huge)) return false;
  std::byte* const bytes = ReadBuffer(kReadPages);
  const std::size_t pages = table_.pages_per_segment();
  for (std::size_t first = 0; first < pages; first += kReadPages) {
    const Address at = segment.start + first * page_;
    const std::size_t n = std::min(kReadPages, pages - first);
    if (system_.ReadProgram(at, bytes, n * page_) != n * page_) return false;
    Add(counters_.pages_scanned, static_cast<std::int64_t>(n));
    FindNodes({at, n * page_});
    for (std::size_t i = 0; i < n; ++i) {
      const Page page = table_.Load(at + i * page_);
      if (page.state() != PageState::kStill || page.value() != HashOf(bytes + i * page_, nodes_[i])) return false;
    }
  }
  return true;
}

// A segment that was let go of has its turn.
void Engine::TendLetGo(Segment* segment, bool now) {
  if (gate_.LeftShut()) return;  // not now
  bool huge = false;
  if (now || !SamplesHuge() || !IsUnchanged(*segment, &huge)) return ArmAgain(segment);
  const Region* region = regions_.Find(segment->start);
  if (huge && region && BeginSampling(*region, segment->start)) return;
  LetGoOn(segment);
}

// A segment that is being sampled has its turn. What it reads does not keep passes coming: only what it finds does.
void Engine::TendSampled(Segment* segment, bool now) {
  if (!SamplesHuge()) return EndSampling(segment, false);
  const bool first = !segment->sample->taken;
  if (!SampleSegment(segment)) return EndSampling(segment, false);  // somebody else has split it, or discarded a part
  if (now) return;                                // decided when all have been seen: ApproveSampled
  if (ApproveIfWorthIt(segment, false)) return;
  if (first) {
    fruitful_ = eager_ = true;  // one pass later, whether it has stayed
    return;
  }
  // Contents that have just come may be still by the next pass, and others need a moment to say that they have them.
  Sample& sample = *segment->sample;
  const bool just_come = static_cast<std::size_t>(std::popcount(sample.still)) * 2 < sample.count || IsWorthIt(*segment, true);
  if (just_come && sample.restless < kMostRestless) {
    segment->wait = sample.restless++ / 2;
    fruitful_ = eager_ = true;
    return;
  }
  segment->backoff = std::min<std::uint8_t>(segment->backoff + 1, kMaxSampleBackoff);
  segment->wait = static_cast<std::uint16_t>((1u << segment->backoff) - 1);
}

bool Engine::IsWorthIt(const Segment& segment, bool now) {
  return ExpectedOf(segment, now) >= static_cast<std::size_t>(tunables_.thp_min_duplicates.load(std::memory_order_relaxed));
}

bool Engine::ApproveIfWorthIt(Segment* segment, bool now) {
  if (!IsWorthIt(*segment, now)) return false;
  EndSampling(segment, true);
  fruitful_ = eager_ = true;
  return true;
}

// ksmu_merge has looked at all of the span: what is worth splitting, whether it has been still or not. True: something is.
bool Engine::ApproveSampled(Span span) {
  bool any = false;
  for (Segment* segment = table_.NextSegment(span.start); segment && segment->start < span.end();
       segment = table_.NextSegment(segment->start + kSegmentBytes)) {
    if (segment->huge == Segment::kSampling && segment->sample->taken) any |= ApproveIfWorthIt(segment, true);
  }
  return any;
}

}  // namespace ksmu::engine
