// A domain: its frames, who holds them, and what its members have offered. No sockets, no clock: what comes in are decoded
// messages, what goes out are answers. One thread.
//
// A frame's life: free -> live (written once, entered into the index, held by whoever published it) -> punched when its last
// holder has dropped it (taken out of the index; its place may lie in mappings still, under what a program has written since)
// -> free again when the last one has released the place. A member holds a frame or does not, however many of its pages map
// it: a bit; and a bit for the places that it has dropped and not released, which are few. It has all that it has ever got
// until it says otherwise, or is gone: its process and every child that it has forked (the caller knows, see docs/broker.md).
// So no frame is punched that anybody can show, and no place is written that anybody's mapping covers.
//
// Frames are numbered in the order of publishing within a stretch that is the member's own, so that what it publishes in address
// order is one mapping, whoever publishes beside it.
//
// Where NUMA nodes are kept apart a chunk of places belongs to a node, from which its memory is taken, and a member has a stretch
// on each; a chunk of which nothing is in use can be given to another node. Hashes are seeded by node, and so all that goes by
// them is apart by itself.
#pragma once

#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "broker/candidates.h"
#include "broker/shared_index.h"
#include "broker/wire.h"

namespace ksmu::broker {

class Domain {
 public:
  static constexpr std::size_t kFramesPerFile = wire::kFramesPerFile;
  static constexpr std::size_t kChunk = 512;
  static constexpr std::uint16_t kMaxMembers = Candidates::kMaxMembers;
  static constexpr int kMaxContents = 16;  // of one hash: more is an accident that does not happen, or an attack
  static constexpr int kMaxReplicas = 64;  // of one content

  // Where frames lie. 0 or -errno.
  class Files {
   public:
    virtual ~Files() = default;
    virtual int Add() = 0;  // one more of kFramesPerFile
    virtual int Write(Frame frame, const std::byte* page) = 0;
    virtual int Punch(Frame first, std::size_t count) = 0;  // within one file
    virtual bool Holds(Frame frame, const std::byte* page) = 0;
    // NUMA nodes: whether there is such a one; what is written to these frames from now on is taken from it, or Write fails.
    virtual bool HasNode(std::uint32_t) { return false; }
    virtual int Bind(Frame, std::size_t, std::uint32_t) { return -1; }
  };
  // Its upper half names contents, in the index and in messages; all of it tells offers apart.
  using Hash = std::uint64_t (*)(const std::byte* page, std::size_t bytes, std::uint64_t seed);

  Domain(Files& files, IndexWriter& index, const IndexReader& reader, std::size_t page_bytes, std::uint64_t seed, Hash hash);

  // A number for a new member; kMaxMembers: there are too many.
  std::uint16_t Join();
  bool IsMember(std::uint16_t member) const { return member < members_.size() && members_[member].state == Member::kHere; }
  // Its connection has ended: it gets nothing any more, and keeps what it holds until Gone.
  void Leave(std::uint16_t member);
  // Nobody can map any more what it held: it is given up, `most` blocks of frames or of offers in a call, since a large member's
  // take longer than others are to wait. True: that was all, and its number is free.
  bool Gone(std::uint16_t member, std::size_t most = ~std::size_t{0});
  // From the beginning on, pages of different NUMA nodes are not merged.
  void KeepNodesApart() { by_node_ = true; }
  bool by_node() const { return by_node_; }
  // No more live frames than that: what would be one more is refused.
  void LimitTo(std::size_t frames) { most_frames_ = frames; }

  // Answers each entry with a frame that the member holds from now on, or kNoFrame. `copy(cookie, place, page)` brings the page
  // out of the member's ring. Not nullptr: the member has broken the protocol, and why.
  using Copy = void (*)(void* cookie, std::uint32_t place, std::byte* page);
  const char* Settle(std::uint16_t member, const wire::SettleEntry* entries, std::size_t count, Copy copy, void* cookie,
                     std::uint32_t* answers);
  // The member needs the bytes no more, and nobody finds a frame that nobody needs. Its place stays taken.
  const char* Drop(std::uint16_t member, const std::uint32_t* frames, std::size_t count);
  const char* Release(std::uint16_t member, const std::uint32_t* frames, std::size_t count);
  // `wanted(cookie, member, hash)`: that member is to publish, if it still has the page.
  void Offer(std::uint16_t member, const std::uint64_t* hashes, std::size_t count,
             void (*wanted)(void* cookie, std::uint16_t member, std::uint32_t hash), void* cookie);

  std::size_t frames_live() const { return live_; }
  std::size_t frames_given_out() const { return given_out_; }  // places that are not free: live, or a member's to fill
  std::size_t members() const;
  bool Holds(std::uint16_t member, Frame frame) const { return members_[member].held.Has(frame); }
  // Of the bookkeeping, but for the index.
  std::size_t metadata_bytes() const;

 private:
  struct FrameInfo {
    std::uint32_t hash = 0;
    std::uint16_t holders = 0;  // members that need the bytes
    std::uint16_t covers = 0;   // members that do not, and whose mappings may cover the place
    enum : std::uint8_t { kFree, kGivenOut, kLive, kPunched } state = kFree;
  };
  struct File {
    std::vector<FrameInfo> frames = std::vector<FrameInfo>(kFramesPerFile);
    std::array<std::uint16_t, kFramesPerFile / kChunk> free{};  // of the frames of each chunk that is in use
    std::array<std::uint16_t, kFramesPerFile / kChunk> nodes{};
  };
  // A set of frames: bits, in blocks that are there where there are any.
  class FrameSet {
   public:
    bool Has(Frame frame) const;
    void Add(Frame frame);
    void Remove(Frame frame);
    // Takes the last block out, and calls visit(frame) for what was in it. False: it was empty.
    template <typename F>
    bool TakeBlock(F&& visit);
    std::size_t bytes() const;

   private:
    static constexpr std::size_t kBlock = 4096;  // frames
    struct Block {
      std::bitset<kBlock> bits;
      std::uint16_t count = 0;
    };
    std::vector<std::unique_ptr<Block>> blocks_;
  };
  // Places for a member to fill.
  struct Stretch {
    std::uint32_t node = 0;
    Frame next = 0, end = 0;
  };
  struct Member {
    enum State : std::uint8_t { kNone, kHere, kLeft } state = kNone;
    std::size_t forgotten = 0;       // shards of the offers that have none of its any more
    std::vector<Stretch> stretches;  // one for each node that it has published from
    FrameSet held, dropped;          // disjoint
  };

  FrameInfo& Info(Frame frame) { return files_[frame / kFramesPerFile]->frames[frame % kFramesPerFile]; }
  bool Exists(Frame frame) const { return frame / kFramesPerFile < files_.size(); }
  void Hold(Member& member, Frame frame);
  void Free(Frame frame);
  void Tend(std::vector<Frame>& touched);
  std::uint32_t NodeOf(Frame frame) const { return files_[frame / kFramesPerFile]->nodes[frame % kFramesPerFile / kChunk]; }
  Stretch& StretchOf(Member& member, std::uint32_t node);
  bool Fill(Stretch& stretch);
  Frame Publish(Member& member, std::uint64_t hash, std::uint32_t node, bool replica);

  Files& storage_;
  IndexWriter& index_;
  const IndexReader& reader_;
  std::size_t page_bytes_;
  std::uint64_t seed_;
  Hash hash_;
  Candidates candidates_;
  std::vector<std::unique_ptr<File>> files_;
  std::vector<Member> members_;
  std::size_t chunks_used_ = 0;  // chunks below have been given out before
  int turn_ = 0;  // which replica is granted next, where there are enough
  std::size_t cursor_ = 0;
  bool by_node_ = false;
  std::size_t most_frames_ = wire::kFrameLimit;
  std::size_t live_ = 0, given_out_ = 0, recycled_ = 0;
  std::vector<std::byte> page_;  // the broker's own copy of what is being published
  std::vector<Frame> touched_;  // frames that lost a holder or a cover just now
};

}  // namespace ksmu::broker
