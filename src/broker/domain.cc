#include "broker/domain.h"

#include <algorithm>

#include "base/longest_run.h"
#include "content/content.h"

namespace ksmu::broker {

using wire::SettleEntry;

namespace {
constexpr std::size_t kSlotsAtOnce = 256 * 1024;  // of offers
constexpr std::size_t kAhead = 8;           // look-ups whose memory is fetched while others are made
}  // namespace

bool Domain::FrameSet::Has(Frame frame) const {
  const std::size_t block = frame / kBlock;
  return block < blocks_.size() && blocks_[block] && blocks_[block]->bits[frame % kBlock];
}

void Domain::FrameSet::Add(Frame frame) {
  const std::size_t block = frame / kBlock;
  if (block >= blocks_.size()) blocks_.resize(block + 1);
  if (!blocks_[block]) blocks_[block] = std::make_unique<Block>();
  blocks_[block]->bits.set(frame % kBlock);
  ++blocks_[block]->count;
}

void Domain::FrameSet::Remove(Frame frame) {
  std::unique_ptr<Block>& block = blocks_[frame / kBlock];
  block->bits.reset(frame % kBlock);
  if (--block->count == 0) block.reset();
}

template <typename F>
bool Domain::FrameSet::TakeBlock(F&& visit) {
  while (!blocks_.empty() && !blocks_.back()) blocks_.pop_back();
  if (blocks_.empty()) return false;
  const auto& bits = blocks_.back()->bits;
  const std::size_t base = (blocks_.size() - 1) * kBlock;
  for (std::size_t i = bits._Find_first(); i < kBlock; i = bits._Find_next(i)) visit(static_cast<Frame>(base + i));
  blocks_.pop_back();
  return true;
}

std::size_t Domain::FrameSet::bytes() const {
  std::size_t bytes = blocks_.size() * sizeof blocks_[0];
  for (const auto& block : blocks_) bytes += block ? sizeof(Block) : 0;
  return bytes;
}

Domain::Domain(Files& files, IndexWriter& index, const IndexReader& reader, std::size_t page_bytes, std::uint64_t seed, Hash hash)
    : storage_(files), index_(index), reader_(reader), page_bytes_(page_bytes), seed_(seed), hash_(hash),
      page_(page_bytes) {}

std::uint16_t Domain::Join() {
  const auto free = std::find_if(members_.begin(), members_.end(), [](const Member& m) { return m.state == Member::kNone; });
  const auto number = static_cast<std::uint16_t>(free - members_.begin());
  if (number >= kMaxMembers) return kMaxMembers;
  if (free == members_.end()) members_.emplace_back();
  members_[number].state = Member::kHere;
  return number;
}

void Domain::Leave(std::uint16_t member) {
  Member& m = members_[member];
  m.state = Member::kLeft;
  // What it has not filled nobody maps.
  for (Stretch& s : m.stretches) {
    for (; s.next != s.end; ++s.next) Free(s.next);
  }
}

bool Domain::Gone(std::uint16_t member, std::size_t most) {
  Member& m = members_[member];
  if (m.state == Member::kHere) Leave(member);
  for (; most > 0; --most) {
    touched_.clear();
    const bool any = m.held.TakeBlock([&](Frame frame) { --Info(frame).holders, touched_.push_back(frame); }) ||
                     m.dropped.TakeBlock([&](Frame frame) { --Info(frame).covers, touched_.push_back(frame); });
    Tend(touched_);
    if (any) continue;
    // Whoever gets the number next has not offered that.
    m.forgotten = candidates_.ForgetMember(member, m.forgotten, kSlotsAtOnce);
    if (m.forgotten < Candidates::kShards) continue;
    m = Member{};
    return true;
  }
  return false;
}

std::size_t Domain::members() const {
  return static_cast<std::size_t>(std::count_if(members_.begin(), members_.end(), [](const Member& m) { return m.state != Member::kNone; }));
}

std::size_t Domain::metadata_bytes() const {
  std::size_t bytes = candidates_.bytes() + files_.size() * sizeof(File) + files_.size() * kFramesPerFile * sizeof(FrameInfo);
  for (const Member& m : members_) {
    bytes += sizeof m + m.held.bytes() + m.dropped.bytes();
  }
  return bytes;
}

void Domain::Hold(Member& member, Frame frame) {
  if (member.held.Has(frame)) return;
  member.held.Add(frame);
  ++Info(frame).holders;
  // Dropped and found again, since another member has held it all the time: the same bytes under the same mappings.
  if (!member.dropped.Has(frame)) return;
  member.dropped.Remove(frame);
  --Info(frame).covers;
}

void Domain::Free(Frame frame) {
  Info(frame) = FrameInfo{};
  ++files_[frame / kFramesPerFile]->free[frame % kFramesPerFile / kChunk];
  ++recycled_;
  --given_out_;
}

// Frames without a holder: first nobody finds them, then their bytes go; and once nothing covers them their places are free.
void Domain::Tend(std::vector<Frame>& touched) {
  std::sort(touched.begin(), touched.end());
  const auto is_idle = [this](Frame frame) { return Info(frame).state == FrameInfo::kLive && Info(frame).holders == 0; };
  for (std::size_t i = 0; i < touched.size();) {
    if (!is_idle(touched[i])) {
      ++i;
      continue;
    }
    std::size_t end = i + 1;
    while (end < touched.size() && touched[end] == touched[end - 1] + 1 && touched[end] / kFramesPerFile == touched[i] / kFramesPerFile &&
           is_idle(touched[end])) {
      ++end;
    }
    for (std::size_t k = i; k < end; ++k) index_.Erase(Info(touched[k]).hash, touched[k]);
    live_ -= end - i;
    // Refused: the bytes stay until the place is written again.
    storage_.Punch(touched[i], end - i);
    for (std::size_t k = i; k < end; ++k) Info(touched[k]).state = FrameInfo::kPunched;
    i = end;
  }
  for (Frame frame : touched) {
    if (Info(frame).state == FrameInfo::kPunched && Info(frame).covers == 0) Free(frame);
  }
}

// A stretch of places for a member to fill: a fresh chunk; or, once a fair part of all has been used before, the longest run of
// free places of a chunk.
bool Domain::Fill(Stretch& stretch) {
  constexpr std::size_t kChunks = kFramesPerFile / kChunk;
  const auto give = [&](Frame first, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) Info(static_cast<Frame>(first + i)).state = FrameInfo::kGivenOut;
    stretch.next = first;
    stretch.end = static_cast<Frame>(first + count);
    given_out_ += count;
    return true;
  };
  // The chunk is the node's from now on. Only where nothing of it is in use.
  const auto take = [&](std::size_t chunk) {
    std::uint16_t& node = files_[chunk / kChunks]->nodes[chunk % kChunks];
    if (by_node_ && storage_.Bind(static_cast<Frame>(chunk * kChunk), kChunk, stretch.node) != 0) return false;
    node = static_cast<std::uint16_t>(stretch.node);
    return true;
  };
  const auto recycle = [&] {
    for (std::size_t looked = 0; looked < chunks_used_; ++looked, cursor_ = (cursor_ + 1) % chunks_used_) {
      File& file = *files_[cursor_ / kChunks];
      std::uint16_t& free = file.free[cursor_ % kChunks];
      if (free == 0) continue;
      if (file.nodes[cursor_ % kChunks] != stretch.node && (free < kChunk || !take(cursor_))) continue;
      const std::size_t base = cursor_ % kChunks * kChunk;
      const base::Stretch best = base::LongestRun(base, base + kChunk, [&](std::size_t i) { return file.frames[i].state == FrameInfo::kFree; });
      free = static_cast<std::uint16_t>(free - best.count);
      recycled_ -= best.count;
      return give(static_cast<Frame>(cursor_ / kChunks * kFramesPerFile + best.start), best.count);
    }
    return false;
  };
  if (recycled_ >= std::max(kChunk, given_out_ / 4) && recycle()) return true;
  if (chunks_used_ == files_.size() * kChunks) {
    if (files_.size() == wire::kMaxFiles || storage_.Add() != 0) return recycle();
    files_.push_back(std::make_unique<File>());
  }
  if (!take(chunks_used_)) return recycle();
  return give(static_cast<Frame>(chunks_used_++ * kChunk), kChunk);
}

Domain::Stretch& Domain::StretchOf(Member& member, std::uint32_t node) {
  for (Stretch& stretch : member.stretches) {
    if (stretch.node == node) return stretch;
  }
  return member.stretches.emplace_back(Stretch{node});
}

// page_ is what is to be published.
Frame Domain::Publish(Member& member, std::uint64_t hash64, std::uint32_t node, bool replica) {
  const auto hash = static_cast<std::uint32_t>(hash64 >> 32);
  Frame same = wire::kNoFrame, next = wire::kNoFrame;
  int contents = 0, replicas = 0;
  reader_.Lookup(hash, [&](Frame frame) {
    // Behind one that is the same all count as such: to compare each would take long, and where the hash is, so is the content.
    if (same != wire::kNoFrame || (NodeOf(frame) == node && storage_.Holds(frame, page_.data()))) {
      if (same == wire::kNoFrame) same = frame;
      if (replicas == turn_) next = frame;
      return replica ? ++replicas < kMaxReplicas : false;
    }
    return ++contents < kMaxContents;
  });
  if (contents >= kMaxContents) return wire::kNoFrame;
  if (same != wire::kNoFrame && !replica) return same;
  if (replicas >= kMaxReplicas) {
    // There are enough. In turn, lest all that comes maps the first one, whatever max_page_sharing its member has.
    turn_ = (turn_ + 1) % kMaxReplicas;
    return next != wire::kNoFrame && NodeOf(next) == node && storage_.Holds(next, page_.data()) ? next : same;
  }
  Stretch& stretch = StretchOf(member, node);
  if (live_ >= most_frames_ || (stretch.next == stretch.end && !Fill(stretch))) return wire::kNoFrame;
  const Frame frame = stretch.next;
  if (storage_.Write(frame, page_.data()) != 0 || !index_.Insert(hash, frame)) return wire::kNoFrame;
  ++stretch.next;
  Info(frame) = {hash, 0, 0, FrameInfo::kLive};
  ++live_;
  candidates_.Forget(hash64);
  return frame;
}

const char* Domain::Settle(std::uint16_t number, const SettleEntry* entries, std::size_t count, Copy copy, void* cookie,
                           std::uint32_t* answers) {
  Member& member = members_[number];
  for (std::size_t i = 0; i < count; ++i) {
    const SettleEntry& entry = entries[i];
    Frame frame = wire::kNoFrame;
    if (entry.what == SettleEntry::kAcquire) {
      const bool is_it = Exists(entry.place) && Info(entry.place).state == FrameInfo::kLive && Info(entry.place).hash == entry.hash;
      if (is_it) frame = entry.place;
    } else {
      if (by_node_ ? !storage_.HasNode(entry.node) : entry.node != 0) return "a page of a node that there is not";
      // From here on the member can do to its ring what it likes.
      copy(cookie, entry.place, page_.data());
      const std::uint64_t hash = hash_(page_.data(), page_bytes_, content::SeedOfNode(seed_, static_cast<int>(entry.node)));
      if (hash >> 32 != entry.hash) return "a page that has not the hash that was claimed";
      frame = Publish(member, hash, entry.node, entry.what == SettleEntry::kReplica);
    }
    if (frame != wire::kNoFrame) Hold(member, frame);
    answers[i] = frame;
  }
  return nullptr;
}

const char* Domain::Drop(std::uint16_t number, const std::uint32_t* frames, std::size_t count) {
  Member& member = members_[number];
  const char* wrong = nullptr;
  touched_.clear();
  for (std::size_t i = 0; i < count && !wrong; ++i) {
    const Frame frame = frames[i];
    if (!member.held.Has(frame)) {
      wrong = "a frame is dropped that is not held";
      break;
    }
    member.held.Remove(frame);
    member.dropped.Add(frame);
    --Info(frame).holders;
    ++Info(frame).covers;
    touched_.push_back(frame);
  }
  Tend(touched_);
  return wrong;
}

const char* Domain::Release(std::uint16_t number, const std::uint32_t* frames, std::size_t count) {
  Member& member = members_[number];
  const char* wrong = nullptr;
  touched_.clear();
  for (std::size_t i = 0; i < count && !wrong; ++i) {
    const Frame frame = frames[i];
    if (member.held.Has(frame)) {
      member.held.Remove(frame);
      --Info(frame).holders;
    } else if (member.dropped.Has(frame)) {
      member.dropped.Remove(frame);
      --Info(frame).covers;
    } else {
      wrong = "a frame is released that is not held";
      break;
    }
    touched_.push_back(frame);
  }
  Tend(touched_);
  return wrong;
}

void Domain::Offer(std::uint16_t member, const std::uint64_t* hashes, std::size_t count,
                   void (*wanted)(void* cookie, std::uint16_t member, std::uint32_t hash), void* cookie) {
  for (std::size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      candidates_.Prefetch(hashes[i + kAhead]);
      reader_.Prefetch(static_cast<std::uint32_t>(hashes[i + kAhead] >> 32));
    }
    const auto hash = static_cast<std::uint32_t>(hashes[i] >> 32);
    // It is there already: its look-up missed it, or was too early. Who publishes what is there is given the frame.
    bool there = false;
    reader_.Lookup(hash, [&](Frame) { return !(there = true); });
    if (there) {
      wanted(cookie, member, hash);
      continue;
    }
    std::uint16_t before;
    if (candidates_.Offer(hashes[i], member, &before) && IsMember(before)) wanted(cookie, before, hash);
  }
}

}  // namespace ksmu::broker
