// The map budget: the kernel allows a process 65,530 mappings by default, and every run is one (and cuts its neighbours').
//
// In bytes every run pays: a page saved is 4,096, and two mappings cost 540. So it is the number that is short. As it runs
// out, it goes to long runs first: runs that are shorter than ShortestRun are turned away (`unmerged_map_budget`), and get
// what the longer ones have left once they have been turned away kWaits times. And neighbours that hold the same content,
// which would take a mapping each, are spread over replicas of the frame, side by side in the pool: one mapping for all.

#include <algorithm>
#include <bit>

#include "content/content.h"
#include "engine/engine.h"

namespace ksmu::engine {

using frames::Frame;
using frames::kNoFrame;

namespace {
constexpr std::size_t kWhole = 16;   // the budget is reckoned in sixteenths
constexpr std::size_t kScarce = 9;   // spent: from here on repeated content gets replicas
constexpr std::size_t kShort = 12;   // from here on long runs go first
constexpr std::uint32_t kWaits = 2;
constexpr std::size_t kMaxReplicas = 64;
constexpr std::size_t kPagesAReplica = 8;  // one page in so many at most goes into replicas

std::size_t ShortestRun(std::size_t spent) { return spent < kShort ? 1 : std::size_t{2} << (spent - kShort); }
}  // namespace

// Counts the process's mappings, once a pass; a command's count is good for as long as it is cheap to have made.
void Engine::CountMappings(bool again) {
  if (again && system_.NowNanoseconds() > mappings_until_) mappings_at_pass_ = 0;
  if (mappings_at_pass_) return;
  max_mappings_ = system_.MaxMappings();
  const std::uint64_t begun = system_.NowNanoseconds();
  mappings_at_pass_ = system_.CountMappings();
  const std::uint64_t counted = system_.NowNanoseconds();
  mappings_until_ = counted + 20 * (counted - begun);
  maps_at_pass_ = maps_used_.load(std::memory_order_relaxed);
}

std::size_t Engine::MappingsNow() const {
  // What has ended since may have left its mappings behind.
  const std::size_t used = maps_used_.load(std::memory_order_relaxed);
  const std::size_t since = used > maps_at_pass_ ? used - maps_at_pass_ : 0;
  return mappings_at_pass_ + 2 * since + 4;
}

// That a part of the kernel's limit, 1/part of it, stays the program's.
bool Engine::LeavesMappings(std::size_t part) const { return MappingsNow() < max_mappings_ - max_mappings_ / part; }

// How much of what merging may have is spent, in sixteenths: of the kernel's limit or of max_maps, whichever is nearer. The
// tunable bounds what merging adds: a run in the middle of a mapping makes three of it.
// `runs`: were so many added.
std::size_t Engine::BudgetSpent(std::size_t runs) {
  CountMappings(false);
  const std::size_t limit = std::max<std::size_t>(max_mappings_ - max_mappings_ / kMergingLeaves, 1);
  const std::size_t now = MappingsNow() + 2 * runs;
  if (now >= limit) return kWhole;
  std::size_t spent = kWhole * now / limit;
  if (const auto wanted = tunables_.max_maps.load(std::memory_order_relaxed); wanted > 0) {
    const std::size_t adds = 2 * (maps_used_.load(std::memory_order_relaxed) + runs) + 2;
    if (adds > static_cast<std::size_t>(wanted)) return kWhole;
    spent = std::max(spent, kWhole * adds / static_cast<std::size_t>(wanted));
  }
  return std::min(spent, kWhole - 1);
}

Engine::Budget Engine::BudgetFor(Address start, std::size_t pages) {
  const std::size_t spent = BudgetSpent(0);
  if (spent == kWhole) return Budget::kNone;
  if ((long_runs_first_ || !now_) && pages < ShortestRun(spent)) {
    const Page page = table_.Load(start);
    const bool waited = page.state() == PageState::kUnmerged && page.reason() == Reason::kMapBudget && page.tries() >= kWaits;
    if (!waited) return Budget::kNotYet;
  }
  return Budget::kThere;
}

// Frames side by side that hold what `frame` holds: those that there are, or new ones. `pages`: how many neighbours want them.
const Engine::Replicas* Engine::ReplicasOf(Frame frame, std::size_t pages) {
  const std::uint32_t hash = pool_.hash(frame);
  const std::size_t count = std::bit_floor(std::min(kMaxReplicas, (pages + pool_.sharers(frame)) / kPagesAReplica));
  if (count < 2) return nullptr;
  for (Replicas& known : replicas_) {
    if (known.count < count / 2 || known.hash != hash || !LiesOn(known.first, NodeOf(frame))) continue;
    bool there = true;
    for (Frame f = known.first; there && f < known.first + known.count; ++f) {
      there = pool_.Live(f) && pool_.hash(f) == hash && HasRoom(f);
    }
    if (there && content::Equal(pool_.Bytes(known.first), pool_.Bytes(frame), page_)) return &known;
  }
  using Visit = frames::Index::Visit;
  Frame chain = kNoFrame;
  index_.Lookup(hash, [&](const frames::Index::Entry& entry) {
    if (!entry.is_frame || pool_.hash(entry.frame) != hash || !LiesOn(entry.frame, NodeOf(frame))) return Visit::kNext;
    if (!content::Equal(pool_.Bytes(entry.frame), pool_.Bytes(frame), page_)) return Visit::kNext;
    chain = entry.frame;
    return Visit::kStop;
  });
  Replicas made{kNoFrame, hash, 0}, stretch = made;
  // Where the pool is in pieces they are not side by side at once: the longest stretch counts, and the others are frames
  // like any other.
  for (std::size_t tries = 2 * count; made.count < count && tries; --tries) {
    const Frame next = PublishNow(hash, pool_.Bytes(frame), NodeOf(frame), chain);
    if (next == kNoFrame) break;
    chain = next;
    if (stretch.count && (next != stretch.first + stretch.count || !pool_.SameFile(next, stretch.first))) stretch.count = 0;
    if (stretch.count++ == 0) stretch.first = next;
    if (stretch.count > made.count) made = stretch;
  }
  if (made.count < 2) return nullptr;
  Replicas& place = replicas_[replicas_next_++ % replicas_.size()];
  place = made;
  return &place;
}

bool Engine::HasRoom(Frame frame) const {
  return pool_.sharers(frame) + pool_.pins(frame) <
         static_cast<std::uint32_t>(tunables_.max_page_sharing.load(std::memory_order_relaxed));
}

// Where mappings are short, neighbours that are to map the same content get replicas of it, side by side.
void Engine::SpreadRepeats(Planned* plan, std::size_t count) {
  if (count < 2 || BudgetSpent(count) < kScarce) return;
  const auto same = [&](Frame a, Frame b) {
    return a == b || (pool_.hash(a) == pool_.hash(b) && LiesOn(a, NodeOf(b)) && content::Equal(pool_.Bytes(a), pool_.Bytes(b), page_));
  };
  for (std::size_t i = 0; i < count;) {
    std::size_t end = i + 1;
    while (end < count && plan[end].page == plan[end - 1].page + page_ && same(plan[end].frame, plan[i].frame)) ++end;
    if (end - i >= 2) {
      // What the plan has pinned is no sharer yet, and will not be one if it gets another frame. Nothing is reclaimed here.
      for (std::size_t k = i; k < end; ++k) pool_.Unpin(plan[k].frame);
      const Replicas* replicas = ReplicasOf(plan[i].frame, end - i);
      for (std::size_t k = i; k < end; ++k) {
        const Frame frame = replicas ? replicas->first + static_cast<Frame>((k - i) % replicas->count) : plan[k].frame;
        if (HasRoom(frame)) plan[k].frame = frame;
        pool_.Pin(plan[k].frame);
      }
    }
    i = end;
  }
}

}  // namespace ksmu::engine
