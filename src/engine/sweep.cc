// Sweeping: which pages are there, which were written since the last sweep, which have been still for one interval.

#include <algorithm>
#include <bit>
#include <cerrno>

#include "engine/engine.h"

namespace ksmu::engine {
namespace {
constexpr std::size_t kChunkBytes = std::size_t{8} << 20;  // what a command waits for, and PAGEMAP_SCAN holds mmap_lock for reading
constexpr std::uint32_t kAuditEvery = 64;                   // passes
constexpr std::uint32_t kTrimPasses = 64;                   // from one trimming of the index to the next
constexpr std::uint8_t kMaxBackoff = 4;
constexpr std::size_t kQuietBytes = std::size_t{256} << 20;
constexpr std::uint32_t kLookPasses = 64;                   // and kLookNs, whichever is later
constexpr std::uint64_t kLookNs = 4'000'000'000;
constexpr std::uint8_t kCold = 8;                           // quiet sweeps
constexpr std::uint32_t kColdPasses = 8;                    // as many as KSM's smart scan leaves out at most
constexpr std::uint64_t kColdNs = 4'000'000'000;
constexpr std::uint32_t kMostPasses = 64;                  // that one pass can count for
constexpr std::uint64_t kProbeNs = 4'000'000'000, kLongestProbeNs = 32'000'000'000;
constexpr std::uint64_t kReclaimRetryNs = 100'000'000;
constexpr std::uint64_t kAuditReleasedNs = 1'000'000'000;

void MarkBits(std::array<std::uint64_t, kMaxSegmentPages / 64>& bits, std::size_t low, std::size_t high) {
  while (low < high) {
    const std::size_t n = std::min(high - low, 64 - low % 64);
    bits[low / 64] |= (n == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1) << low % 64;
    low += n;
  }
}
bool Bit(const std::array<std::uint64_t, kMaxSegmentPages / 64>& bits, std::size_t i) {
  return bits[i / 64] >> i % 64 & 1;
}
}  // namespace

Engine::Engine(os::System& system, const Tunables& tunables, std::uint64_t seed)
    : system_(system), tunables_(tunables), seed_(seed), page_(system.PageSize()), table_(page_), forks_(system),
      pool_(system, forks_), gate_(system, counters_), chunk_(kChunkBytes) {}

Engine::~Engine() {
  if (buffer_) base::UnmapOwnPages(buffer_, (kReadPages + 2) * page_);
  if (huge_) base::UnmapOwnPages(huge_, ((kReadPages + kTwinPages) * page_ + kHugeBytes - 1) & ~(kHugeBytes - 1));
  if (runs_) base::UnmapOwnPages(runs_, kRuns * sizeof(os::PageRun));
  if (look_runs_) base::UnmapOwnPages(look_runs_, kLookRuns * sizeof(os::PageRun));
  if (plan_) base::UnmapOwnPages(plan_, 2 * kMaxSegmentPages * sizeof(Planned));
  if (wants_) base::UnmapOwnPages(wants_, frames::Source::kMaxWants * sizeof *wants_);
  if (zeros_) base::UnmapOwnPages(zeros_, 2 * kMaxSegmentPages * sizeof(Address));
  if (moves_) base::UnmapOwnPages(moves_, sizeof(*moves_));
}

int Engine::Start() {
  buffer_ = static_cast<std::byte*>(base::MapOwnPages((kReadPages + 2) * page_));
  runs_ = static_cast<os::PageRun*>(base::MapOwnPages(kRuns * sizeof(os::PageRun)));
  look_runs_ = static_cast<os::PageRun*>(base::MapOwnPages(kLookRuns * sizeof(os::PageRun)));
  plan_ = static_cast<Planned*>(base::MapOwnPages(2 * kMaxSegmentPages * sizeof(Planned)));
  zeros_ = static_cast<Address*>(base::MapOwnPages(2 * kMaxSegmentPages * sizeof(Address)));
  moves_ = static_cast<std::array<Moved, kMaxMoves>*>(base::MapOwnPages(sizeof(*moves_)));
  if (!buffer_ || !runs_ || !look_runs_ || !plan_ || !zeros_ || !moves_) return -ENOMEM;
  scratch_ = buffer_ + kReadPages * page_;
  event_scratch_ = scratch_ + page_;
  twins_ = plan_ + kMaxSegmentPages;
  if (int error = forks_.Start()) return error;
  index_.SetHashOf(&Engine::HashOfEntry, this);
  across_nodes_ = tunables_.merge_across_nodes.load(std::memory_order_relaxed) != 0;
  Adopt(seed_);
  return gate_.Start();
}

// The pass that has ended: what waits for passes waits for seconds where they take longer. And what the next one looks at.
void Engine::CountPass(std::uint64_t now) {
  const std::uint64_t seconds = pass_at_ ? (now - pass_at_) / 1'000'000'000 : 0;
  pass_step_ = static_cast<std::uint32_t>(std::clamp<std::uint64_t>(seconds, 1, kMostPasses));
  pass_at_ = now;
  audits_ = (pass_ + pass_step_) / kAuditEvery != pass_ / kAuditEvery;
  pass_ += pass_step_;
  const auto second = static_cast<std::uint32_t>(now / 1'000'000'000);
  const std::size_t times = pass_times_.size();
  const auto apart = static_cast<std::uint32_t>(tunables_.remerge_seconds.load(std::memory_order_relaxed)) / (times / 2) + 1;
  if (pass_times_next_ == 0 || second - pass_times_[(pass_times_next_ - 1) % times].second >= apart) {
    pass_times_[pass_times_next_++ % times] = {second, pass_};
  }
  if (probing_) {
    probe_sleep_ = probe_found_ ? kProbeNs : std::clamp(probe_sleep_ * 2, kProbeNs, kLongestProbeNs);
    probe_at_ = now + probe_sleep_;
  }
  probing_ = now >= probe_at_;
  probe_found_ = false;
}

Engine::StepResult Engine::Step() {
  StepResult result;
  Housekeeping();
  now_ = false;
  if (pool_.source()) TendShared();
  const Region* found = regions_.Next(cursor_);
  if (!found) {
    result.pass_ended = true;
    result.fruitful = fruitful_;
    result.eager = eager_;
    eager_ = false;
    heard_ = 0;
    ForgetScratch();
    if (pool_.source() && pool_.provisions() == 0 && !pool_.source()->Busy()) pool_.source()->ClearRing();
    fruitful_ = false;
    cursor_ = 0;
    const std::uint64_t now = system_.NowNanoseconds();
    CountPass(now);
    if (pass_ - trim_pass_ >= kTrimPasses) TrimIndex();
    if (!skip_cold_) cold_pass_ = pass_, cold_at_ = now;
    skip_cold_ = tunables_.smart_scan.load(std::memory_order_relaxed) && pass_ - cold_pass_ < kColdPasses - 1 &&
                 now - cold_at_ < kColdNs;
    if (looking_) look_pass_ = pass_, look_at_ = now;
    looking_ = pass_ - look_pass_ >= kLookPasses && now - look_at_ >= kLookNs;
    Add(counters_.full_scans, 1);
    mappings_at_pass_ = 0;
    pins_known_ = references_known_ = false;
    return result;
  }
  const Region region = *found;  // by value: the list may change under the merge of a moved range
  if (region.kind != Region::kMergeable) {
    Audit(region);
    cursor_ = region.end;
    return result;
  }
  if (cursor_ <= region.start && audits_) {
    Audit(region);
    if (regions_.Find(region.start) == nullptr) return result;
  }
  const Address from = std::max(cursor_, region.start);
  const Address to = chunk_ < region.end - from ? from + chunk_ : region.end;
  Address swept_to = to;
  result.pages_read = Sweep(region, from, to, false, &swept_to);
  if (result.pages_read) fruitful_ = true;
  cursor_ = swept_to;
  return result;
}

// Gives back what can be. What waits for a child is not asked about all the time.
void Engine::ReclaimFrames(bool at_once) {
  // Where moves were lost nobody knows which places show a frame.
  if (!pool_.ReclaimDue() || lost_moves_.load(std::memory_order_relaxed)) return;
  const std::uint64_t now = system_.NowNanoseconds();
  if (!at_once && now < reclaim_at_) return;
  pool_.Reclaim(&Engine::ForgetFrame, this);
  {
    std::lock_guard lock(events_mutex_);  // the event thread pins before it knows that the page is still there
    pool_.CloseOrphans();
  }
  if (pool_.ReclaimDue()) reclaim_at_ = now + kReclaimRetryNs;
}

bool Engine::Housekeeping() {
  const bool moved = ApplyMoves();
  const bool repaired = gate_.Repair();
  ReclaimFrames(false);
  if (pool_.source()) HearNews();
  RetryForeign();
  // Whose memory was released and unmapped is seen also when nothing is scanned.
  if (const std::uint64_t now = system_.NowNanoseconds(); now >= audit_at_) {
    audit_at_ = now + kAuditReleasedNs;
    Region region;
    for (Address at = 0; NextIn({0, PageTable::kLimit}, &at, &region);) {
      if (region.kind == Region::kReleased) Audit(region);
    }
  }
  return !moved || !repaired;
}

// How far, in whole segments, nothing has been written and nothing waits to be looked at. To ask for written pages alone is
// thirty times cheaper than to ask also whether they are frames, for which the kernel looks at every page's folio. What
// this does not see (pages that are gone, copies made for a pin that only reads) a complete look does, now and then. And what has
// been quiet many times in a row is not asked about in every pass, if they come fast: a scan costs by the mapping, too.
Address Engine::QuietUntil(const Region& region, Address from) {
  Address limit = std::min(region.end, from + kQuietBytes);
  std::size_t cold = 0;  // bytes
  for (const Segment* segment = table_.NextSegment(from); segment && segment->start < limit;
       segment = table_.NextSegment(segment->start + kSegmentBytes)) {
    if (segment->unsettled || segment->wait || !segment->armed()) {
      limit = std::max(from, segment->start);
      break;
    }
    if (segment->quiet >= kCold) cold += std::min(limit, segment->start + kSegmentBytes) - std::max(from, segment->start);
  }
  if (limit <= from) return from;
  // Where not everything is known something may have come.
  if (skip_cold_ && cold >= limit - from) {
    Add(counters_.pages_skipped, static_cast<std::int64_t>((limit - from) / page_));
    return limit;
  }
  // Written alone is cheaper still, but holes count as written where memory is populated in parts.
  os::ScanRequest request;
  request.required = request.returned = os::kWritten;
  request.max_pages = 1;  // the first is enough: fresh memory is one run from end to end
  os::PageRun written;
  os::ScanResult scan = system_.Scan({from, limit - from}, request, &written, 1);
  if (!scan.error && scan.runs) {
    request.required = request.returned = os::kPresent | os::kWritten;
    scan = system_.Scan({from, limit - from}, request, &written, 1);
  }
  if (scan.error) return from;
  const Address quiet = scan.runs ? std::max(from, written.start & ~(kSegmentBytes - 1)) : std::min(limit, scan.walked_to);
  for (Segment* segment = table_.NextSegment(from); segment && std::min(region.end, segment->start + kSegmentBytes) <= quiet && segment->start < quiet;
       segment = table_.NextSegment(segment->start + kSegmentBytes)) {
    if (segment->quiet < kCold) ++segment->quiet;
  }
  return quiet;
}

// One scan of [from, to), and what follows from it. With `now`, pages need not have been still. Returns pages read.
std::size_t Engine::Sweep(const Region& region, Address from, Address to, bool now, Address* swept_to) {
  now_ = now;
  // Whole segments, as far as the region goes.
  if (to < region.end && (to & ~(kSegmentBytes - 1)) > from) to &= ~(kSegmentBytes - 1);
  *swept_to = to;
  if (gate_.LeftShut() && !gate_.Repair() && gate_.LeftShut()) return 0;
  {
    // Segments that keep being written are not armed for a while, so that the program does not pay for being watched; those
    // mapped by huge pages not before it is known to be worth it.
    Segment* segment = table_.NextSegment(from);
    while (segment && segment->start < to && (segment->wait == 0 || now) && segment->armed()) {
      segment = table_.NextSegment(segment->start + kSegmentBytes);
    }
    if (segment && segment->start < to) {
      const Address end = std::min(to, segment->start + kSegmentBytes);
      if (segment->start <= from) {
        if (!segment->armed()) {
          *swept_to = TendUnarmed(segment, std::min(region.end, from + kQuietBytes), now);
          if (!segment->armed() || !now) return 0;
          to = end;  // ksmu_merge: it is an ordinary one now
        }
      } else {
        to = *swept_to = segment->start;
      }
      if (segment->start <= from && segment->wait && !now) {  // armed, but hot
        segment->wait -= static_cast<std::uint16_t>(std::min<std::uint32_t>(segment->wait, pass_step_));
        Add(counters_.pages_skipped, static_cast<std::int64_t>((end - from) / page_));
        *swept_to = end;
        // Not armed, but its breaks are booked: what is saved is not to be overstated.
        ConfirmBreaks({from, end - from});
        return 0;
      }
    }
  }
  if (const Address quiet = now || looking_ ? from : QuietUntil(region, from); quiet > from) {
    *swept_to = quiet;
    return 0;
  }
  os::ScanRequest request = os::PrivatePages(os::kPresent | os::kWritten | os::kPfnZero | os::kHuge);
  request.write_protect = true;
  const os::ScanResult scan = system_.Scan({from, to - from}, request, runs_, kRuns);
  if (scan.error) return 0;
  if (now) pins_known_ = false;
  const Address walked = std::min(scan.walked_to, to);
  *swept_to = walked;
  // Sparse ranges are crossed in growing strides.
  Segment* next = table_.NextSegment(from);
  const bool nothing = scan.runs == 0 && (!next || next->start >= walked);
  chunk_ = nothing ? std::min(chunk_ * 2, std::size_t{1} << 46) : kChunkBytes;
  if (region.sync_break) ConfirmBreaks({from, walked - from});

  std::size_t read = 0;
  std::size_t r = 0;
  Address at = from;
  while (at < walked) {
    const Address next_run = r < scan.runs ? std::max(runs_[r].start, at) : walked;
    Segment* segment = table_.NextSegment(at);
    const Address next_segment = segment ? std::max(segment->start, at) : walked;
    at = std::min(next_run, next_segment);
    if (at >= walked) break;
    const Address start = at & ~(kSegmentBytes - 1);
    const Address end = std::min(start + kSegmentBytes, walked);
    if (poll_) poll_(poll_cookie_);
    if (r < scan.runs && runs_[r].start <= start && runs_[r].end >= end && (runs_[r].categories & os::kHuge) &&
        end - start == kSegmentBytes && BeginSampling(region, start)) {
      Add(counters_.pages_swept, static_cast<std::int64_t>((end - at) / page_));
      TendSampled(table_.FindSegment(start), now);
      while (r < scan.runs && runs_[r].end <= end) ++r;
      at = end;
      continue;
    }
    Bitmaps bits;
    for (; r < scan.runs && runs_[r].start < end; ++r) {
      const std::size_t low = (std::max(runs_[r].start, at) - start) / page_;
      const std::size_t high = (std::min(runs_[r].end, end) - start) / page_;
      MarkBits(bits.present, low, high);
      if (runs_[r].categories & os::kWritten) MarkBits(bits.written, low, high);
      if (runs_[r].categories & os::kPfnZero) MarkBits(bits.zero, low, high);
      Add(counters_.pages_swept, static_cast<std::int64_t>(high - low));
      if (runs_[r].end > end) break;
    }
    read += SweepPart(region, start, (at - start) / page_, (end - start) / page_, bits, now);
    at = end;
  }
  return read;
}

bool Engine::Later(Page page) const {
  if (!tunables_.smart_scan.load(std::memory_order_relaxed)) return false;
  if (page.reason() == Reason::kHot) return false;  // its segment has waited already
  const std::uint32_t waited = (pass_ - page.stamp()) & Page::kStampMask;
  return waited < (1u << std::min<std::uint32_t>(page.tries(), 6));
}

// By its stamp: not since the pass in which it was seen written last, and remerge_seconds have passed since the one after that.
bool Engine::WrittenLongAgo(Page page) const {
  const auto seconds = static_cast<std::uint32_t>(tunables_.remerge_seconds.load(std::memory_order_relaxed));
  const std::uint32_t passes = (pass_ - page.stamp()) & Page::kStampMask;
  for (std::size_t i = 1; i <= std::min(pass_times_next_, pass_times_.size()); ++i) {
    const PassTime& begun = pass_times_[(pass_times_next_ - i) % pass_times_.size()];
    if (NowSeconds() - begun.second > seconds) return passes > pass_ - begun.pass + 1;
  }
  return false;
}

// Whether what a request is to bring may be on its way to the page, of which UFFDIO_MOVE knows nothing: to NFS the kernel lends pages
// by a reference, and no pin. So where such a request is possible pages are left alone for as long as it can take. Before it began it
// had to write to the page, and it is found so by the sweep after that: so one look a pass is enough.
bool Engine::MayBeReferredTo(Page page) {
  if (tunables_.remerge_seconds.load(std::memory_order_relaxed) == 0) return false;
  if (!references_known_) {
    const std::uint64_t begun = system_.NowNanoseconds();
    // With thousands of descriptors the look takes its time: not more than one part in fifty of all.
    if (begun < references_until_) {
      if (!now_) return !WrittenLongAgo(page);
    } else {
      references_ = system_.PossibleReferences();
      references_known_ = !now_;
      const std::uint64_t now = system_.NowNanoseconds();
      references_until_ = now + 50 * (now - begun);
    }
  }
  return references_ && !WrittenLongAgo(page);
}

std::size_t Engine::SweepPart(const Region& region, Address start, std::size_t low, std::size_t high,
                              const Bitmaps& bits, bool now) {
  Segment* segment = table_.FindSegment(start);
  const bool whole = low == 0 && high == table_.pages_per_segment();
  std::size_t present = 0;
  bool written = false;
  for (std::size_t i = 0; i < bits.present.size(); ++i) {
    present += static_cast<std::size_t>(std::popcount(bits.present[i] & ~bits.zero[i]));
    written |= (bits.written[i] & ~bits.zero[i]) != 0;
  }
  if (whole && !now && segment && !written && segment->unsettled == 0 && segment->expected_present == present) {
    if (looking_ && present == table_.pages_per_segment()) LetGoIfFruitless(segment);
    return 0;
  }
  if (segment) segment->looks = segment->quiet = 0;
  std::array<Address, kMaxSegmentPages> to_hash;
  std::size_t hash_count = 0, rewritten = 0, broken = 0;
  for (std::size_t i = low; i < high; ++i) {
    const Address a = start + i * page_;
    const bool zero = Bit(bits.zero, i);
    const bool there = Bit(bits.present, i) && !zero;
    const bool dirty = there && Bit(bits.written, i);
    Words* word = segment ? table_.Word(segment, i) : nullptr;
    if (!word) {
      if (!there) {
        // Nothing is known of the rest of the block either: on to the first page of it that is there, if any.
        const std::uint64_t rest = (bits.present[i / 64] & ~bits.zero[i / 64]) >> i % 64;
        i += rest ? static_cast<std::size_t>(std::countr_zero(rest)) - 1 : 63 - i % 64;
        continue;
      }
      word = table_.Make(a);
      if (!word) continue;  // no memory: not tracked
      segment = table_.FindSegment(start);
    }
    Page page(word->load(std::memory_order_acquire));
    if (page.busy()) continue;
    const Page fresh = page.WithState(PageState::kFresh).WithReason(Reason::kNone).WithIndexed(false).WithStamp(pass_);
    switch (page.state()) {
      case PageState::kAbsent:
      case PageState::kCount:
        if (there) Change(word, page, Page().WithState(PageState::kFresh).WithStamp(pass_));
        if (there && now && !MayBeReferredTo(fresh)) to_hash[hash_count++] = a;
        break;
      case PageState::kFresh:
        if (!there) {
          Change(word, page, Page());
        } else if (now || (!dirty && page.stamp() != (pass_ & Page::kStampMask))) {
          if (!MayBeReferredTo(dirty ? fresh : page)) to_hash[hash_count++] = a;
        } else if (dirty && page.stamp() != (pass_ & Page::kStampMask)) {
          ++rewritten;
          Change(word, page, fresh);
        }
        break;
      case PageState::kStill:
        if (!there) {
          Change(word, page, Page());
        } else if (dirty) {
          ++rewritten;
          if (Change(word, page, fresh) && now && !MayBeReferredTo(fresh)) to_hash[hash_count++] = a;
        }
        break;
      case PageState::kUnmerged:
        if (!there) {
          Change(word, page, Page());
        } else if (dirty && !now) {
          ++rewritten;
          Change(word, page, fresh.WithTries(page.tries()));
        } else if (now || !Later(page)) {
          if (!MayBeReferredTo(dirty ? fresh : page)) to_hash[hash_count++] = a;
        }
        break;
      case PageState::kZero:
        if (there && Change(word, page, fresh) && now && !MayBeReferredTo(fresh)) to_hash[hash_count++] = a;
        break;
      case PageState::kMerged:
        // The scan may be older than the merge: a page of a later segment is merged as the twin of one of an earlier one.
        if (!there || !IsPrivate(a)) break;
        // Written, or unshared by a long-term read pin: the kernel has given the writer its own copy.
        if (Change(word, page, page.WithState(PageState::kBroken).WithStamp(NowSeconds()).WithTries(0))) {
          pool_.Unshare(page.value());
          Add(counters_.cow_breaks, 1);
          ++broken;
          ++rewritten;  // where merging does not last, the segment is left alone for longer and longer
        }
        break;
      case PageState::kBroken:
        ++broken;
        // The scan may be older than this merge.
        if (there && page.unconfirmed() && IsPrivate(a) && !ConfirmCopy(word, &page)) break;
        // Found present in the instant between a discard's event and the discard itself, and empty ever since.
        if (!there && page.discarded() && !page.unconfirmed() && !IsPrivate(a, true)) {
          Change(word, page, page.WithState(PageState::kDropped));
          break;
        }
        // tries: sweeps that found it unwritten, as far as that matters.
        if (dirty) {
          ++rewritten;
          Change(word, page, page.WithStamp(NowSeconds()).WithTries(0));
        } else if (page.tries() == 0) {
          Change(word, page, page.WithTries(1));
        }
        break;
      case PageState::kDropped:
        ++broken;
        if (there && IsPrivate(a)) Change(word, page, page.WithState(PageState::kBroken).WithStamp(NowSeconds()).WithTries(0));
        break;
      case PageState::kResidue:
        // Memory that is advised again.
        ++broken;
        if (there) {
          if (page.unconfirmed() && !(IsPrivate(a) && ConfirmCopy(word, &page))) break;
          Change(word, page, page.WithState(PageState::kBroken).WithStamp(NowSeconds()).WithTries(0));
        }
        break;
    }
  }
  if (!segment) return 0;
  const std::size_t read = hash_count ? HashAndMatch(region, to_hash.data(), hash_count) : 0;
  if (broken && tunables_.remerge.load(std::memory_order_relaxed)) {
    TendBroken(region, start + low * page_, start + high * page_);
  }

  // What is to be expected of a quiet segment, and whether this one is quiet.
  std::size_t expected = 0, unsettled = 0;
  const bool hot = tunables_.smart_scan.load(std::memory_order_relaxed) && !now && rewritten * 4 > present;
  for (std::size_t i = 0; i < table_.pages_per_segment(); ++i) {
    Words* word = table_.Word(segment, i);
    if (!word) {
      i |= kBlockPages - 1;
      continue;
    }
    Page page(word->load(std::memory_order_acquire));
    const PageState s = page.state();
    if (hot && s == PageState::kFresh) {
      Change(word, page, page.WithState(PageState::kUnmerged).WithReason(Reason::kHot));
    }
    expected += s == PageState::kFresh || s == PageState::kStill || s == PageState::kUnmerged || s == PageState::kBroken;
    unsettled += s == PageState::kFresh || s == PageState::kUnmerged || s == PageState::kBroken ||
                 s == PageState::kDropped || s == PageState::kResidue;
  }
  segment->expected_present = static_cast<std::uint16_t>(expected);
  segment->unsettled = static_cast<std::uint16_t>(unsettled);
  if (hot) {
    segment->backoff = std::min<std::uint8_t>(segment->backoff + 1, kMaxBackoff);
    segment->wait = static_cast<std::uint16_t>((1u << segment->backoff) - 1);
  } else if (!now) {
    segment->backoff = 0;
  }
  return read;
}

// The copy of a page that was booked as broken before there was one has been seen: its frame need not be kept for it any more.
// False: the word has changed.
bool Engine::ConfirmCopy(Words* word, Page* page) {
  if (!Change(word, *page, page->WithUnconfirmed(false))) return false;
  pool_.Unpin(page->value());
  *page = page->WithUnconfirmed(false);
  return true;
}

// Under a synchronous breaker the arming scan passes merged runs over: look at them separately.
void Engine::ConfirmBreaks(Span span) {
  const os::ScanRequest request = os::PrivatePages(os::kPresent | os::kPfnZero);
  os::PageRun runs[64];
  for (Address at = span.start; at < span.end();) {
    const os::ScanResult scan = system_.Scan({at, span.end() - at}, request, runs, 64);
    if (scan.error) return;
    for (std::size_t r = 0; r < scan.runs; ++r) {
      if (runs[r].categories & os::kPfnZero) continue;
      for (Address a = runs[r].start; a < runs[r].end; a += page_) {
        Words* word = table_.Find(a);
        if (!word) continue;
        Page page(word->load(std::memory_order_acquire));
        if (page.busy() || !page.covers()) continue;
        if (page.state() == PageState::kMerged) {
          if (Change(word, page, page.WithState(PageState::kBroken).WithStamp(NowSeconds()).WithTries(0))) {
            pool_.Unshare(page.value());
            Add(counters_.cow_breaks, 1);
          }
        } else if (page.unconfirmed() && page.state() == PageState::kBroken) {
          ConfirmCopy(word, &page);
        } else if (page.state() == PageState::kDropped || page.state() == PageState::kResidue) {
          if (Change(word, page, page.WithState(PageState::kBroken).WithUnconfirmed(false).WithStamp(NowSeconds()).WithTries(0)) &&
              page.unconfirmed()) {
            pool_.Unpin(page.value());
          }
        }
      }
    }
    if (scan.walked_to <= at) return;
    at = scan.walked_to;
  }
}

// Compares what is known of a region with the mappings that are there, and forgets what is gone: the second half of a
// release, and all that can be done about memory that was unmapped without a word.
void Engine::Audit(const Region& region) {
  Address at = region.start;
  bool covers = false;
  std::uint64_t patient_until = 0;  // for all of it together: somebody may discard without a pause
  while (at < region.end) {
    os::Mapping mapping;
    const int error = system_.QueryMapping(at, &mapping);
    if (error && error != -ENOENT) return;  // refused: that is not to be taken for a hole
    const bool found = error == 0;
    // What is not as it was may have been moved: that is followed, not forgotten. A move that this look has seen has raised its event.
    bool awaited = false;
    const auto moved = [&] {
      if (!patient_until) patient_until = Patience();
      if (!std::exchange(awaited, true)) AwaitForks(patient_until);
      return move_count_.load(std::memory_order_acquire) || lost_moves_.load(std::memory_order_relaxed);
    };
    const Address start = found ? std::max(mapping.start, at) : region.end;
    if (start > at) {
      if (moved()) return;
      const Span hole{at, std::min(start, region.end) - at};
      ForgetRange(hole);
      regions_.Erase(hole);
    }
    if (!found || start >= region.end) break;
    const Address end = std::min(mapping.end, region.end);
    const bool ours = pool_.IsPoolMapping(mapping);
    if (!ours && !IsInherited(mapping) && !(mapping.anonymous && !mapping.shared)) {
      if (moved()) return;
      ForgetRange({start, end - start});
      regions_.Erase({start, end - start});
    } else {
      Address next = start;
      while (Segment* segment = table_.NextSegment(next)) {
        if (segment->start >= end) break;
        const Address low = std::max(next, segment->start), high = std::min(end, segment->start + kSegmentBytes);
        for (Address a = low; a < high; a += page_) {
          Words* word = table_.Word(segment, (a - segment->start) / page_);
          if (!word) continue;
          const Page page(word->load(std::memory_order_acquire));
          if (!page.covers()) continue;
          if (ours && pool_.Shows(mapping, a, page.value())) {
            covers = true;
            continue;
          }
          if (moved()) return;
          ForgetPage(a, word);
        }
        next = segment->start + kSegmentBytes;
      }
    }
    at = end;
  }
  if (region.kind != Region::kMergeable && !covers) {
    ForgetRange(region.span());
    regions_.Erase(region.span());
  }
}

}  // namespace ksmu::engine
