// The frames: pages of a few memfds of moderate size (every mapping of a file sits in one tree under one lock), with
// their counts. Frames are numbered in the order in which they are asked for, so that pages which are published in
// address order map to consecutive frames, and a run of them is one mapping.
//
// A frame's life: free -> live (written once, then immutable) -> punched (nobody shares it: its memory is given back, but
// some mapping still covers its place) -> free. Punching and reuse both wait for forked children (fork_watch.h).
//
// Which children. Those forked before the frame was given out cannot map it: `born` is the epoch of that moment. Those
// forked after it has become idle do not need it either, and `idle` is the end of the epochs that count; it is set when
// Reclaim finds the frame idle, and forgotten when the frame is taken up again. Idle means two things:
//   - For the bytes: no sharer and no pin. Pages may cover the frame still, and a child forked from now on inherits that
//     mapping; but it inherits it with what the program saw in it, a private copy or a zero page. What such a child can be
//     shown of the frame is what lies under a page that it discards, and there zeros are right, bytes are not: to punch is
//     better for it than to wait.
//   - For the place: no cover. A child forked while a mapping covered it shows whatever comes to lie in it, so the time
//     counts up to the moment when the last mapping was gone. No later mapping can show it.
// A page counts as a sharer no more when its discard is announced, which is an instant before the kernel discards it, and
// a fork in that instant inherits the frame. Therefore the bytes of a frame that has to wait anyway wait for the children
// of the whole epoch in which it was found idle, and the epoch is closed by a later Reclaim than the one that found it.
//
// Frames of a source (source.h) lie in files of the source's, and have the same life: to punch one is to drop it, to free its
// place is to release it. While a source is there no frame of our own is made. Once it is gone its frames are orphans, which
// nobody here can punch; a file of them is closed when nothing covers it any more.
//
// Where NUMA nodes are kept apart each node has files of its own, whose memory comes from it.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "base/own_memory.h"
#include "frames/fork_watch.h"
#include "frames/source.h"
#include "os/os.h"

namespace ksmu::frames {

class Pool {
 public:
  Pool(os::System& system, ForkWatch& forks);
  ~Pool();
  Pool(const Pool&) = delete;

  // A free frame, now live: the one after the last one given out wherever that is free. kNoFrame: the pool is full
  // (RLIMIT_FSIZE, memory, descriptors). The caller pins it or maps it before the next Reclaim. Scanner only.
  // `node`: of a file whose memory comes from there; os::kNoNode: from wherever the kernel takes it.
  Frame Allocate(int node = os::kNoNode);
  int node(Frame f) const { return File(f).nodes[f % kFramesPerFile / kChunk]; }
  // Of a source's, which knows it. All of a chunk are of one.
  void set_node(Frame f, int node) { File(f).nodes[f % kFramesPerFile / kChunk] = static_cast<std::int16_t>(node); }

  // Null: it is gone, and its frames are orphans. Scanner only, as all that follows.
  void SetSource(Source* source);
  Source* source() const { return source_; }
  bool CanPublish() const { return ring_ != nullptr; }  // false: there was no memory for it
  // Ours for a frame that the source has granted, and whether it was held before. kNoFrame: its file cannot be had; it has
  // been released, once, however often the same answer grants it.
  Frame Granted(Frame theirs, bool* known);
  void AnswerBegins() { refused_.clear(); }
  // A place in the source's ring, for contents that are about to be published: a frame that is good for planning, not for
  // mapping. kNoFrame: there is no place. They are forgotten all at once, when they have been settled.
  Frame Provision();
  static bool IsProvision(Frame f) { return f / kFramesPerFile == kRingSlot; }
  static std::uint32_t RingPlace(Frame f) { return f % kFramesPerFile; }
  static Frame ProvisionAt(std::size_t place) { return static_cast<Frame>(kRingSlot * kFramesPerFile + place); }
  std::byte* ProvisionBytes(Frame f) { return source_->ring() + RingPlace(f) * page_size_; }
  std::size_t provisions() const { return ring_ ? ring_->bump : 0; }
  void ForgetProvisions() { ring_->bump = 0; }
  // Live frames that are not of the source that there is now: what is shared in them is not shared with others.
  bool IsStray(Frame f) const { return File(f).owner != owner_; }
  bool IsForeign(Frame f) const { return File(f).owner != 0; }  // a source's, whether it is there or not
  std::size_t strays() const;
  // Closes files of sources that have gone and of which nothing is in use. Nobody may be looking at a page's frame meanwhile.
  void CloseOrphans();
  std::uint32_t owner() const { return owner_; }
  // Places that are not free in the files of that source.
  std::size_t UsedOf(std::uint32_t owner) const;
  void ForEachLive(void (*visit)(void* cookie, Frame), void* cookie) const;

  const std::byte* Bytes(Frame f) const { return File(f).bytes + Offset(f); }
  const os::File& OsFile(Frame f) const { return File(f).file; }
  std::uint64_t Offset(Frame f) const { return static_cast<std::uint64_t>(f & (kFramesPerFile - 1)) * page_size_; }
  bool SameFile(Frame a, Frame b) const { return a / kFramesPerFile == b / kFramesPerFile; }
  // True for a mapping that shows the pool's frame `f` at its address: who can tell a stranger's mapping from ours.
  bool Shows(const os::Mapping& mapping, os::Address at, Frame f) const;
  std::size_t Files(os::File* files, std::size_t capacity) const;
  bool IsPoolMapping(const os::Mapping& mapping) const;

  // False: its bytes have been given back. They must not be looked at: that would bring empty pages into the pool.
  bool Live(Frame f) const { return Meta(f).state == kLive; }

  // Sites that map the frame. Any thread.
  std::uint32_t pins(Frame f) const { return Meta(f).pins.load(std::memory_order_relaxed); }
  std::uint32_t sharers(Frame f) const { return Meta(f).sharers.load(std::memory_order_acquire); }
  void Share(Frame f);
  void Unshare(Frame f);
  // Keeps the bytes although nobody shares: a batch in hand, a break whose copy has not been seen, a released mapping.
  void Pin(Frame f) {
    FrameMeta& meta = Meta(f);
    meta.pins.fetch_add(1, std::memory_order_relaxed);
    TakeUp(meta);
  }
  void Unpin(Frame f);
  // Pages in whose mapping the frame lies, whatever they show now. Keeps the place from being reused. Scanner only.
  void Cover(Frame f) {
    FrameMeta& meta = Meta(f);
    ++meta.covers;
    TakeUp(meta);
  }
  void Uncover(Frame f);

  std::uint32_t hash(Frame f) const { return Meta(f).hash; }
  void set_hash(Frame f, std::uint32_t h) { Meta(f).hash = h; }
  Frame next(Frame f) const { return Meta(f).next; }  // another frame of the same content (KSM: stable_node_dup)
  void set_next(Frame f, Frame n) { Meta(f).next = n; }

  // Gives back what can be: punches frames without sharers and pins, frees the places that nothing covers.
  // `forget(cookie, frame)` is called before a live frame is given up: take it out of the index. Returns frames punched.
  std::size_t Reclaim(void (*forget)(void* cookie, Frame), void* cookie);
  bool ReclaimDue() const { return idle_.load(std::memory_order_relaxed) != 0; }

  std::size_t live() const { return live_; }                // frames whose bytes exist
  std::size_t in_use() const { return used_; }              // places that cannot be reused yet
  std::size_t shared() const { return shared_.load(std::memory_order_relaxed); }  // frames with at least one sharer
  std::size_t metadata_bytes() const;
  std::size_t page_size() const { return page_size_; }

 private:
  enum State : std::uint8_t { kFree, kLive, kPunched, kSetAside };
  struct FrameMeta {
    std::atomic<std::uint32_t> sharers;
    std::atomic<std::uint32_t> pins;
    std::uint32_t covers;
    std::uint32_t hash;
    Frame next;
    ForkWatch::Epoch born;               // the first epoch whose children may map it
    std::atomic<ForkWatch::Epoch> idle;  // the end of these epochs, or kNotIdle
    bool uncovered;                      // nothing covered it when `idle` was set, nor has anything since
    State state;
  };
  static constexpr ForkWatch::Epoch kNotIdle = 0xff;
  static_assert(ForkWatch::kMaxEpochs < kNotIdle);
  static constexpr std::size_t kFramesPerFile = Source::kFramesPerFile;  // 256 MiB of 4 KiB frames
  static constexpr std::size_t kMaxFiles = 4095;
  static constexpr std::size_t kRingSlot = kMaxFiles;  // of provisions
  static constexpr std::size_t kChunk = 512;
  struct PoolFile {
    os::File file;
    const std::byte* bytes = nullptr;
    FrameMeta* meta = nullptr;
    std::size_t frames = 0;  // the file's length in frames: less than kFramesPerFile under a small RLIMIT_FSIZE
    std::size_t bump = 0;    // frames below have been used before
    std::array<std::uint16_t, kFramesPerFile / kChunk> free{};  // recycled frames in each chunk
    std::array<std::uint16_t, kFramesPerFile / kChunk> busy{};  // frames in each chunk that are live or punched
    std::array<std::int16_t, kFramesPerFile / kChunk> nodes;    // of each chunk
    std::size_t live = 0, used = 0;    // live; live or punched
    std::uint32_t owner = 0;   // 0: ours, else the number of a source of this pool's; an orphan's has gone
    std::uint32_t number = 0;  // by which the source knows the file
  };

  // Where frames of our own come from: those of a node, or of no node in particular.
  struct Growth {
    int node = os::kNoNode;
    PoolFile* growing = nullptr;  // the last file
    std::size_t growing_slot = 0;
    std::size_t recycled = 0;     // free places below the bumps
    std::size_t cursor = 0;       // where Recycle goes on, in chunks
    Frame extent = 0, extent_end = 0;  // recycled places set aside, to be given out one after the other
  };

  PoolFile& File(Frame f) const { return *files_[f / kFramesPerFile]; }
  FrameMeta& Meta(Frame f) const { return File(f).meta[f & (kFramesPerFile - 1)]; }
  static void TakeUp(FrameMeta& meta) {
    if (meta.idle.load(std::memory_order_relaxed) != kNotIdle) meta.idle.store(kNotIdle, std::memory_order_relaxed);
  }
  static bool Idle(const FrameMeta& meta) {
    return meta.state == kLive && meta.sharers.load(std::memory_order_acquire) == 0 &&
           meta.pins.load(std::memory_order_acquire) == 0;
  }
  void Renumber(const ForkWatch::Epoch* numbers);
  std::size_t FreeSlot() const;  // kMaxFiles: none
  PoolFile* MakeFile(std::size_t slot, const os::File& file, std::size_t frames);
  void Close(std::size_t slot);
  Growth* GrowthOf(int node);  // null: no memory for a new one
  bool AddFile(Growth& growth);
  bool Recycle(Growth& growth);
  Frame Take(Frame f);
  bool IsRefused(std::size_t number) const;
  void Begin(FrameMeta& meta);
  int Punch(PoolFile& file, std::size_t first, std::size_t count);

  os::System& system_;
  ForkWatch& forks_;
  std::size_t page_size_;
  std::array<PoolFile*, kMaxFiles + 1> files_{};  // null: none there
  std::size_t file_count_ = 0;                    // those behind are null, but for the ring
  Growth anywhere_;
  base::OwnVector<Growth> of_nodes_;
  Source* source_ = nullptr;
  std::uint32_t owner_ = 0, sources_ = 0;         // the number of source_, 0 without; how many there have been
  std::array<std::uint16_t, kMaxFiles> slots_{};  // of the source's files, by their numbers there: 0 none, else slot + 1
  base::OwnVector<Frame> refused_;  // of the source's frames, while one answer is in hand: released, since we cannot map them
  PoolFile* ring_ = nullptr;
  base::OwnSlab<PoolFile> file_slab_;
  std::size_t live_ = 0, used_ = 0;
  std::atomic<std::size_t> shared_{0};
  std::atomic<std::size_t> idle_{0};  // frames that lost their last sharer, pin or cover since Reclaim last looked
};

}  // namespace ksmu::frames
