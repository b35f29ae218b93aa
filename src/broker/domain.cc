#include "broker/domain.h"

#include <algorithm>

namespace ksmu::broker {

using wire::SettleEntry;

Domain::Domain(Files& files, IndexWriter& index, const IndexReader& reader, std::size_t page_bytes, std::uint64_t seed, Hash hash)
    : storage_(files), index_(index), reader_(reader), page_bytes_(page_bytes), seed_(seed), hash_(hash),
      candidates_(&Domain::IsThere, this), page_(page_bytes) {}

bool Domain::IsThere(void* self, Owner owner) {
  const auto& members = static_cast<Domain*>(self)->members_;
  return owner.member < members.size() && members[owner.member].state == Member::kHere &&
         members[owner.member].generation == owner.generation;
}

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
  for (; m.next != m.end; ++m.next) Free(m.next);
}

void Domain::Gone(std::uint16_t member) {
  Member& m = members_[member];
  if (m.state == Member::kHere) Leave(member);
  idle_.clear();
  for (std::size_t file = 0; file < m.held.size(); ++file) {
    if (!m.held[file]) continue;
    const Bits& bits = *m.held[file];
    for (std::size_t i = bits._Find_first(); i < bits.size(); i = bits._Find_next(i)) {
      const auto frame = static_cast<Frame>(file * kFramesPerFile + i);
      if (--Info(frame).holders == 0) idle_.push_back(frame);
    }
  }
  GiveUp(idle_);
  const auto next = static_cast<std::uint16_t>(m.generation + 1);
  m = Member{};
  m.generation = next;
}

std::size_t Domain::members() const {
  return static_cast<std::size_t>(std::count_if(members_.begin(), members_.end(), [](const Member& m) { return m.state != Member::kNone; }));
}

bool Domain::Holds(std::uint16_t member, Frame frame) const {
  const auto& held = members_[member].held;
  const std::size_t file = frame / kFramesPerFile;
  return file < held.size() && held[file] && held[file]->test(frame % kFramesPerFile);
}

std::size_t Domain::metadata_bytes() const {
  std::size_t bytes = candidates_.bytes() + files_.size() * sizeof(File) + files_.size() * kFramesPerFile * sizeof(FrameInfo);
  for (const Member& m : members_) {
    bytes += sizeof m;
    for (const auto& bits : m.held) bytes += sizeof bits + (bits ? sizeof(Bits) : 0);
  }
  return bytes;
}

// False: it held it before.
bool Domain::Hold(Member& member, Frame frame) {
  const std::size_t file = frame / kFramesPerFile;
  if (member.held.size() <= file) member.held.resize(file + 1);
  if (!member.held[file]) member.held[file] = std::make_unique<Bits>();
  if (member.held[file]->test(frame % kFramesPerFile)) return false;
  member.held[file]->set(frame % kFramesPerFile);
  ++Info(frame).holders;
  return true;
}

void Domain::Free(Frame frame) {
  Info(frame) = FrameInfo{};
  ++files_[frame / kFramesPerFile]->free[frame % kFramesPerFile / kChunk];
  ++recycled_;
  --given_out_;
}

// Frames without a holder: first nobody finds them, then their bytes go, then their places are free.
void Domain::GiveUp(const std::vector<Frame>& idle) {
  for (std::size_t i = 0; i < idle.size();) {
    std::size_t end = i + 1;
    while (end < idle.size() && idle[end] == idle[end - 1] + 1 && idle[end] / kFramesPerFile == idle[i] / kFramesPerFile) ++end;
    for (std::size_t k = i; k < end; ++k) index_.Erase(Info(idle[k]).hash, idle[k]);
    live_ -= end - i;
    // Refused: the bytes stay until the place is written again.
    storage_.Punch(idle[i], end - i);
    for (std::size_t k = i; k < end; ++k) Free(idle[k]);
    i = end;
  }
}

// A stretch of places for a member to fill: a fresh chunk; or, once a fair part of all has been used before, the longest run of
// free places of a chunk.
bool Domain::Stretch(Member& member) {
  constexpr std::size_t kChunks = kFramesPerFile / kChunk;
  const auto give = [&](Frame first, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) Info(static_cast<Frame>(first + i)).state = FrameInfo::kGivenOut;
    member.next = first;
    member.end = static_cast<Frame>(first + count);
    given_out_ += count;
    return true;
  };
  const auto recycle = [&] {
    for (std::size_t looked = 0; looked < chunks_used_; ++looked, cursor_ = (cursor_ + 1) % chunks_used_) {
      File& file = *files_[cursor_ / kChunks];
      std::uint16_t& free = file.free[cursor_ % kChunks];
      if (free == 0) continue;
      const std::size_t base = cursor_ % kChunks * kChunk;
      std::size_t best = 0, longest = 0;
      for (std::size_t i = base; i < base + kChunk;) {
        std::size_t end = i;
        while (end < base + kChunk && file.frames[end].state == FrameInfo::kFree) ++end;
        if (end - i > longest) best = i, longest = end - i;
        i = end + 1;
      }
      free = static_cast<std::uint16_t>(free - longest);
      recycled_ -= longest;
      return give(static_cast<Frame>(cursor_ / kChunks * kFramesPerFile + best), longest);
    }
    return false;
  };
  if (recycled_ >= std::max(kChunk, given_out_ / 4) && recycle()) return true;
  if (chunks_used_ == files_.size() * kChunks) {
    if (files_.size() == wire::kMaxFiles || storage_.Add() != 0) return recycle();
    files_.push_back(std::make_unique<File>());
  }
  return give(static_cast<Frame>(chunks_used_++ * kChunk), kChunk);
}

// page_ is what is to be published.
Frame Domain::Publish(Member& member, std::uint32_t hash, bool replica) {
  Frame same = wire::kNoFrame;
  int contents = 0, replicas = 0;
  reader_.Lookup(hash, [&](Frame frame) {
    if (!storage_.Holds(frame, page_.data())) return ++contents < kMaxContents;
    same = frame;
    return replica ? ++replicas < kMaxReplicas : false;
  });
  if (contents >= kMaxContents) return wire::kNoFrame;
  // A replica is one beside another; and of those there are enough.
  if (replica && (same == wire::kNoFrame || replicas >= kMaxReplicas)) return same;
  if (!replica && same != wire::kNoFrame) return same;
  if (member.next == member.end && !Stretch(member)) return wire::kNoFrame;
  const Frame frame = member.next;
  if (storage_.Write(frame, page_.data()) != 0 || !index_.Insert(hash, frame)) return wire::kNoFrame;
  ++member.next;
  Info(frame) = {hash, 0, FrameInfo::kLive};
  ++live_;
  candidates_.Forget(hash);
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
      // From here on the member can do to its ring what it likes.
      copy(cookie, entry.place, page_.data());
      if (hash_(page_.data(), page_bytes_, seed_) != entry.hash) return "a page that has not the hash that was claimed";
      frame = Publish(member, entry.hash, entry.what == SettleEntry::kReplica);
    }
    if (frame != wire::kNoFrame) Hold(member, frame);
    answers[i] = frame;
  }
  return nullptr;
}

const char* Domain::Release(std::uint16_t number, const std::uint32_t* frames, std::size_t count) {
  Member& member = members_[number];
  const char* wrong = nullptr;
  idle_.clear();
  for (std::size_t i = 0; i < count && !wrong; ++i) {
    const Frame frame = frames[i];
    if (!Holds(number, frame)) {
      wrong = "a frame is released that is not held";
      break;
    }
    member.held[frame / kFramesPerFile]->reset(frame % kFramesPerFile);
    if (--Info(frame).holders == 0) idle_.push_back(frame);
  }
  std::sort(idle_.begin(), idle_.end());
  GiveUp(idle_);
  return wrong;
}

void Domain::Offer(std::uint16_t member, const std::uint32_t* hashes, std::size_t count,
                   void (*wanted)(void* cookie, std::uint16_t member, std::uint32_t hash), void* cookie) {
  const Owner owner{member, members_[member].generation};
  for (std::size_t i = 0; i < count; ++i) {
    Owner before;
    if (candidates_.Offer(hashes[i], owner, &before)) wanted(cookie, before.member, hashes[i]);
  }
}

}  // namespace ksmu::broker
