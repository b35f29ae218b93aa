// NUMA nodes kept apart (merge_across_nodes 0): a page is merged with pages of its own node alone, in frames of that node.
//
// A page's hash is seeded by the node on which it lies, and so is a frame's: what is equal on two nodes has two hashes, and is
// two contents for all that goes by hashes, here and at a broker. Pages are asked where they lie when they are hashed, a
// portion at a time. Zero pages have no frame, and are the same on every node.
//
// The kernel can move a page to another node at any time. Of a candidate it is asked again before it is merged.

#include <algorithm>
#include <cerrno>

#include "content/content.h"
#include "engine/engine.h"

namespace ksmu::engine {

using frames::Frame;
using frames::Pool;

int Engine::MergeAcrossNodes(bool across) {
  if (across == across_nodes_) return 0;
  if (pool_.shared() != 0) return -EBUSY;
  if (!across && system_.CountNodes() > 1) {
    const auto own = reinterpret_cast<Address>(buffer_);
    int node;
    if (system_.QueryNodes(&own, 1, &node) != 0) return -EOPNOTSUPP;
  }
  across_nodes_ = across;
  Adopt(seed_);
  return 0;
}

// From now on hashes are made by this seed, and by node where the domain says so or, alone, the tunable.
void Engine::Adopt(std::uint64_t seed) {
  const bool across = pool_.source() ? pool_.source()->merges_across_nodes() : across_nodes_;
  const bool by_node = !across && system_.CountNodes() > 1;
  if (seed == seed_ && by_node == by_node_) return;
  seed_ = seed;
  by_node_ = by_node;
  nodes_.fill(0);
  ForgetSeen();
}

// Other hashes: what has been seen is looked at again, and frames get what they would have got. Nothing else in a page's word
// depends on it, and samples of huge pages find nothing until they are taken anew.
void Engine::ForgetSeen() {
  index_.Clear();
  replicas_.fill({});
  for (Segment* segment = table_.NextSegment(0); segment; segment = table_.NextSegment(segment->start + kSegmentBytes)) {
    for (std::size_t i = 0; i < table_.pages_per_segment(); ++i) {
      Words* const word = table_.Word(segment, i);
      if (!word) continue;
      Page page(word->load(std::memory_order_acquire));
      if (page.state() != PageState::kStill) continue;
      Change(word, page, Page().WithState(PageState::kFresh).WithStamp(page.stamp()));
      if (segment->unsettled == 0) segment->unsettled = 1;
    }
  }
  Add(counters_.chains, -counters_.chains.load(std::memory_order_relaxed));
  Add(counters_.dups, -counters_.dups.load(std::memory_order_relaxed));
  pool_.ForEachLive([](void* self, Frame frame) {
    auto& engine = *static_cast<Engine*>(self);
    const int node = engine.by_node_ ? engine.NodeOf(frame) : 0;
    // Written when nobody asked for a node: found by none from now on.
    if (node == os::kNoNode) return engine.pool_.set_next(frame, frames::kNoFrame);
    const std::uint32_t hash = engine.HashOf(engine.pool_.Bytes(frame), node);
    engine.Enter(frame, hash, engine.HeadOf(hash, frame));
  }, this);
}

// Where the pages of the portion in hand lie, into nodes_.
void Engine::FindNodes(const Address* pages, std::size_t count) {
  if (by_node_ && system_.QueryNodes(pages, count, nodes_.data()) != 0) std::fill_n(nodes_.begin(), count, os::kNoNode);
}

void Engine::FindNodes(Span span) {
  if (!by_node_) return;
  std::array<Address, kReadPages> pages;
  const std::size_t count = span.bytes / page_;
  for (std::size_t i = 0; i < count; ++i) pages[i] = span.start + i * page_;
  FindNodes(pages.data(), count);
}

int Engine::NodeNow(Address page) {
  int node;
  return system_.QueryNodes(&page, 1, &node) == 0 ? node : os::kNoNode;
}

// A candidate that does not lie any more where it was hashed.
void Engine::SeeAgain(Address page) {
  const Page known = table_.Load(page);
  if (known.state() == PageState::kStill) MakeFresh(page, known);
}

// 0 where nodes are not kept apart, as for pages: what is told to a broker is a node that there is.
int Engine::NodeOf(Frame frame) const {
  if (!by_node_) return 0;
  return Pool::IsProvision(frame) ? provided_for_[Pool::RingPlace(frame)] : pool_.node(frame);
}

}  // namespace ksmu::engine
