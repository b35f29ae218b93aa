#include "frames/pool.h"

#include <algorithm>
#include <cerrno>

#include "base/longest_run.h"
#include "base/test_point.h"

namespace ksmu::frames {

Pool::Pool(os::System& system, ForkWatch& forks)
    : system_(system), forks_(forks), page_size_(system.PageSize()) {}

Pool::~Pool() {
  SetSource(nullptr);
  for (std::size_t i = 0; i < file_count_; ++i) {
    if (files_[i]) Close(i);
  }
}

std::size_t Pool::FreeSlot() const {
  return static_cast<std::size_t>(std::find(files_.begin(), files_.begin() + kMaxFiles, nullptr) - files_.begin());
}

// Takes the file over, into the slot; on failure it is closed.
Pool::PoolFile* Pool::MakeFile(std::size_t slot, const os::File& file, std::size_t frames) {
  PoolFile* made = file_slab_.Make();
  if (made) made->meta = static_cast<FrameMeta*>(base::MapOwnPages(kFramesPerFile * sizeof(FrameMeta)));
  if (!made || !made->meta || system_.MapFile(file, frames * page_size_, &made->bytes) != 0) {
    if (made && made->meta) base::UnmapOwnPages(made->meta, kFramesPerFile * sizeof(FrameMeta));
    if (made) file_slab_.Free(made);
    system_.CloseFile(file);
    return nullptr;
  }
  made->file = file;
  made->frames = frames;
  made->nodes.fill(os::kNoNode);
  files_[slot] = made;
  file_count_ = std::max(file_count_, slot + 1);
  return made;
}

void Pool::Close(std::size_t slot) {
  PoolFile& file = *files_[slot];
  files_[slot] = nullptr;
  system_.UnmapFile(file.bytes, file.frames * page_size_);
  system_.CloseFile(file.file);
  base::UnmapOwnPages(file.meta, kFramesPerFile * sizeof(FrameMeta));
  file_slab_.Free(&file);
}

Pool::Growth* Pool::GrowthOf(int node) {
  if (node == os::kNoNode) return &anywhere_;
  const auto known = std::find_if(of_nodes_.begin(), of_nodes_.end(), [&](const Growth& g) { return g.node == node; });
  if (known != of_nodes_.end()) return known;
  Growth growth;
  growth.node = node;
  return of_nodes_.push_back(growth) ? &of_nodes_.back() : nullptr;
}

bool Pool::AddFile(Growth& growth) {
  const std::size_t slot = FreeSlot();
  if (slot == kMaxFiles) return false;
  // A file as large as RLIMIT_FSIZE lets it be: below one chunk there is no pool worth having.
  std::size_t frames = kFramesPerFile;
  int error = 0;
  os::File file;
  while ((error = system_.CreateFile(frames * page_size_, &file)) == -EFBIG && frames > kChunk) frames /= 2;
  if (error) return false;
  if (growth.node != os::kNoNode && system_.BindFile(file, frames * page_size_, growth.node) != 0) {
    system_.CloseFile(file);
    return false;
  }
  PoolFile* const made = MakeFile(slot, file, frames);
  if (!made) return false;
  made->nodes.fill(static_cast<std::int16_t>(growth.node));
  growth.growing = made;
  growth.growing_slot = slot;
  return true;
}

void Pool::Begin(FrameMeta& meta) {
  meta.sharers.store(0, std::memory_order_relaxed);
  meta.pins.store(0, std::memory_order_relaxed);
  meta.covers = 0;
  meta.hash = 0;
  meta.next = kNoFrame;
  meta.born = forks_.epoch();
  meta.idle.store(kNotIdle, std::memory_order_relaxed);
  meta.state = kLive;
}

Frame Pool::Take(Frame f) {
  PoolFile& file = File(f);
  Begin(Meta(f));
  ++file.busy[f % kFramesPerFile / kChunk];
  ++file.used, ++used_;
  ++file.live, ++live_;
  idle_.fetch_add(1, std::memory_order_relaxed);  // if it is never mapped
  return f;
}

Frame Pool::Allocate(int node) {
  Growth* const from = GrowthOf(node);
  if (!from) return kNoFrame;
  Growth& growth = *from;
  if (growth.extent != growth.extent_end) return Take(growth.extent++);
  // New places first, since they are always consecutive; recycled ones once they are a fair part of the whole, so that
  // merge and break cycles do not grow the pool's address range without end.
  if (growth.recycled >= std::max<std::size_t>(kChunk, used_ / 4) && Recycle(growth)) return Take(growth.extent++);
  if ((growth.growing && growth.growing->bump < growth.growing->frames) || AddFile(growth)) {
    return Take(static_cast<Frame>(growth.growing_slot * kFramesPerFile + growth.growing->bump++));
  }
  return Recycle(growth) ? Take(growth.extent++) : kNoFrame;
}

// Sets the longest run of free places in the next chunk that has any aside as the extent.
bool Pool::Recycle(Growth& growth) {
  if (!growth.recycled) return false;
  std::size_t& cursor = growth.cursor;
  const std::size_t chunks_per_file = kFramesPerFile / kChunk;
  const std::size_t chunks = file_count_ * chunks_per_file;
  for (std::size_t looked = 0; looked < chunks; ++looked, cursor = (cursor + 1) % chunks) {
    if (!files_[cursor / chunks_per_file]) continue;
    PoolFile& file = *files_[cursor / chunks_per_file];
    std::uint16_t& free = file.free[cursor % chunks_per_file];
    if (!free || file.nodes[0] != growth.node) continue;  // none are free of a file that is not ours
    const std::size_t base = (cursor % chunks_per_file) * kChunk;
    const base::Stretch best = base::LongestRun(base, std::min(base + kChunk, file.bump), [&](std::size_t i) { return file.meta[i].state == kFree; });
    if (best.count == 0) continue;
    for (std::size_t i = best.start; i < best.start + best.count; ++i) file.meta[i].state = kSetAside;
    free = static_cast<std::uint16_t>(free - best.count);
    growth.recycled -= best.count;
    growth.extent = static_cast<Frame>(cursor / chunks_per_file * kFramesPerFile + best.start);
    growth.extent_end = static_cast<Frame>(growth.extent + best.count);
    return true;
  }
  return false;
}

std::size_t Pool::Files(os::File* files, std::size_t capacity) const {
  std::size_t n = 0;
  for (std::size_t i = 0; i < file_count_ && n < capacity; ++i) {
    if (files_[i]) files[n++] = files_[i]->file;
  }
  return n;
}

bool Pool::IsPoolMapping(const os::Mapping& mapping) const {
  if (mapping.anonymous || mapping.shared) return false;
  for (std::size_t i = 0; i < file_count_; ++i) {
    if (files_[i] && files_[i]->file.inode == mapping.inode && files_[i]->file.device == mapping.device) return true;
  }
  return false;
}

bool Pool::Shows(const os::Mapping& mapping, os::Address at, Frame f) const {
  const os::File& file = OsFile(f);
  return !mapping.anonymous && !mapping.shared && mapping.start <= at && at < mapping.end &&
         mapping.inode == file.inode && mapping.device == file.device &&
         mapping.offset + (at - mapping.start) == Offset(f);
}

void Pool::Share(Frame f) {
  FrameMeta& meta = Meta(f);
  if (meta.sharers.fetch_add(1, std::memory_order_acq_rel) == 0) shared_.fetch_add(1, std::memory_order_relaxed);
  TakeUp(meta);
}

void Pool::Unshare(Frame f) {
  if (Meta(f).sharers.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    shared_.fetch_sub(1, std::memory_order_relaxed);
    idle_.fetch_add(1, std::memory_order_relaxed);
  }
}

void Pool::Unpin(Frame f) {
  if (Meta(f).pins.fetch_sub(1, std::memory_order_acq_rel) == 1) idle_.fetch_add(1, std::memory_order_relaxed);
}

void Pool::Uncover(Frame f) {
  if (--Meta(f).covers == 0) idle_.fetch_add(1, std::memory_order_relaxed);
}

void Pool::Renumber(const ForkWatch::Epoch* numbers) {
  for (std::size_t n = 0; n < file_count_; ++n) {
    if (!files_[n]) continue;
    PoolFile& file = *files_[n];
    for (FrameMeta* meta = file.meta; meta != file.meta + file.bump; ++meta) {
      meta->born = numbers[meta->born];
      const ForkWatch::Epoch idle = meta->idle.load(std::memory_order_relaxed);
      if (idle != kNotIdle) meta->idle.store(numbers[idle], std::memory_order_relaxed);
    }
  }
}

std::size_t Pool::Reclaim(void (*forget)(void*, Frame), void* cookie) {
  if (!ReclaimDue()) return 0;
  idle_.store(0, std::memory_order_relaxed);
  ForkWatch::Epoch numbers[ForkWatch::kMaxEpochs + 1];
  if (forks_.Refresh(numbers)) Renumber(numbers);
  const ForkWatch::Epoch newest = forks_.epoch(), end_of_all = forks_.end();
  // All epochs but the newest have a child. Of the newest one answer serves the whole call for places, since what covers
  // them changes on this thread alone; what shares a frame does not, and it is asked for again until there is a child.
  const ForkWatch::Epoch end_for_places = forks_.HasChild() ? end_of_all : newest;
  ForkWatch::Epoch end_for_bytes = end_for_places;
  std::size_t punched = 0;
  bool waiting = false, waiting_for_newest = false;
  const auto wait = [&](ForkWatch::Epoch end) {
    waiting = true;
    waiting_for_newest |= end == end_of_all;
  };
  for (std::size_t n = 0; n < file_count_; ++n) {
    if (!files_[n]) continue;
    PoolFile& file = *files_[n];
    std::size_t asked_to = 0;  // idle frames up to here were found idle before the last answer
    const auto may_punch = [&](FrameMeta& meta) {
      ForkWatch::Epoch end = meta.idle.load(std::memory_order_relaxed);
      if (end == kNotIdle) {
        if (meta.born >= end_for_bytes) return true;
        meta.uncovered = meta.covers == 0;
        end = meta.uncovered ? end_for_bytes : end_of_all;
        meta.idle.store(end, std::memory_order_relaxed);
      }
      if (meta.born < end) wait(end);
      return meta.born >= end;
    };
    for (std::size_t i = 0; i < file.bump;) {
      if (i % kChunk == 0 && file.busy[i / kChunk] == 0) {
        i += kChunk;
        continue;
      }
      FrameMeta& meta = file.meta[i];
      if (Idle(meta)) {
        if (i >= asked_to) {
          bool ask = false;
          for (asked_to = i; asked_to < file.bump && Idle(file.meta[asked_to]); ++asked_to) {
            ask |= file.meta[asked_to].idle.load(std::memory_order_relaxed) == kNotIdle;
          }
          if (ask && end_for_bytes != end_of_all && forks_.HasChild()) end_for_bytes = end_of_all;
        }
        if (!may_punch(meta)) {
          ++i;
          continue;
        }
        KSMU_TEST_POINT("reclaim.checked", i * page_size_, page_size_);
        std::size_t end = i + 1;
        while (end < asked_to && may_punch(file.meta[end])) ++end;
        for (std::size_t k = i; k < end; ++k) forget(cookie, static_cast<Frame>(n * kFramesPerFile + k));
        if (Punch(file, i, end - i) != 0) {
          // The bytes stay, and so does the memory; the place is not reused before it can be punched.
          waiting = true;
          i = end;
          continue;
        }
        KSMU_TEST_POINT("reclaim.punched", i * page_size_, (end - i) * page_size_);
        for (std::size_t k = i; k < end; ++k) {
          file.meta[k].state = kPunched;
          // The time that counts for the place was another one, unless nothing covered it then.
          if (!file.meta[k].uncovered) TakeUp(file.meta[k]);
        }
        punched += end - i;
        file.live -= end - i, live_ -= end - i;
      }
      if (meta.state == kPunched && meta.covers == 0) {
        ForkWatch::Epoch end = meta.idle.load(std::memory_order_relaxed);
        if (end == kNotIdle) meta.idle.store(end = end_for_places, std::memory_order_relaxed);
        if (meta.born >= end) {
          meta.state = kFree;
          --file.busy[i / kChunk];
          --file.used, --used_;
          if (file.owner == 0) {
            ++file.free[i / kChunk];
            ++GrowthOf(file.nodes[0])->recycled;
          } else if (file.owner == owner_) {
            source_->Release(static_cast<Frame>(file.number * kFramesPerFile + i));
          }
        } else {
          wait(end);
        }
      }
      ++i;
    }
  }
  if (waiting) idle_.fetch_add(1, std::memory_order_relaxed);
  if (waiting_for_newest) forks_.Begin();
  return punched;
}

// Gives the frames' bytes back. A source's are dropped by us; of an orphan the bytes stay until its file is closed by all.
int Pool::Punch(PoolFile& file, std::size_t first, std::size_t count) {
  if (file.owner == 0) return system_.PunchFile(file.file, first * page_size_, count * page_size_);
  for (std::size_t i = first; file.owner == owner_ && i < first + count; ++i) {
    source_->Drop(static_cast<Frame>(file.number * kFramesPerFile + i));
  }
  return 0;
}

// --- a source's frames -----------------------------------------------------------------------------------------------

void Pool::SetSource(Source* source) {
  if (ring_) {
    base::UnmapOwnPages(ring_->meta, Source::kMaxRing * sizeof(FrameMeta));
    file_slab_.Free(ring_);
    files_[kRingSlot] = ring_ = nullptr;
  }
  slots_.fill(0);
  source_ = source;
  owner_ = source ? ++sources_ : 0;
  idle_.fetch_add(1, std::memory_order_relaxed);  // files that have become orphans may be ready to be closed
  if (!source) return;
  ring_ = file_slab_.Make();
  if (ring_) ring_->meta = static_cast<FrameMeta*>(base::MapOwnPages(Source::kMaxRing * sizeof(FrameMeta)));
  if (ring_ && !ring_->meta) {
    file_slab_.Free(ring_);
    ring_ = nullptr;
  }
  if (!ring_) return;  // no memory: nothing is published
  ring_->bytes = source->ring();
  ring_->frames = std::min(source->ring_pages(), Source::kMaxRing);
  ring_->owner = owner_;
  files_[kRingSlot] = ring_;
}

Frame Pool::Granted(Frame theirs, bool* known) {
  const std::size_t number = theirs / kFramesPerFile;
  *known = false;
  if (number < kMaxFiles && slots_[number] == 0 && !IsRefused(number)) {
    const std::size_t slot = FreeSlot();
    os::File file;
    if (slot != kMaxFiles && source_->OpenFile(number, &file) == 0) {
      if (PoolFile* made = MakeFile(slot, file, kFramesPerFile)) {
        made->owner = owner_;
        made->number = static_cast<std::uint32_t>(number);
        made->bump = kFramesPerFile;
        slots_[number] = static_cast<std::uint16_t>(slot + 1);
      }
    }
  }
  if (number >= kMaxFiles || slots_[number] == 0) {
    const bool again = std::find(refused_.begin(), refused_.end(), theirs) != refused_.end();
    // Without memory to remember it by it stays held, for as long as this process is a member.
    if (!again && refused_.push_back(theirs)) source_->Release(theirs);
    return kNoFrame;
  }
  const auto f = static_cast<Frame>((slots_[number] - 1u) * kFramesPerFile + theirs % kFramesPerFile);
  FrameMeta& meta = Meta(f);
  if (meta.state == kLive) {
    *known = true;
  } else if (meta.state == kFree) {
    Take(f);
  } else {
    // Dropped and found again, while mappings cover it: what counts for its place goes on.
    meta.state = kLive;
    meta.hash = 0;
    meta.next = kNoFrame;
    TakeUp(meta);
    ++File(f).live, ++live_;
    idle_.fetch_add(1, std::memory_order_relaxed);
  }
  return f;
}

// Asked for once in an answer: it has been refused for all of its frames.
bool Pool::IsRefused(std::size_t number) const {
  return std::any_of(refused_.begin(), refused_.end(), [&](Frame theirs) { return theirs / kFramesPerFile == number; });
}

Frame Pool::Provision() {
  if (!ring_ || ring_->bump == ring_->frames || source_->Busy()) return kNoFrame;
  const Frame f = ProvisionAt(ring_->bump++);
  Begin(Meta(f));
  return f;
}

void Pool::CloseOrphans() {
  for (std::size_t i = 0; i < file_count_; ++i) {
    if (files_[i] && files_[i]->owner && files_[i]->owner != owner_ && files_[i]->used == 0) Close(i);
  }
}

void Pool::ForEachLive(void (*visit)(void*, Frame), void* cookie) const {
  for (std::size_t n = 0; n < file_count_; ++n) {
    if (!files_[n]) continue;
    for (std::size_t i = 0; i < files_[n]->bump; ++i) {
      if (i % kChunk == 0 && files_[n]->busy[i / kChunk] == 0) i += kChunk - 1;
      else if (files_[n]->meta[i].state == kLive) visit(cookie, static_cast<Frame>(n * kFramesPerFile + i));
    }
  }
}

std::size_t Pool::UsedOf(std::uint32_t owner) const {
  std::size_t used = 0;
  for (std::size_t i = 0; i < file_count_; ++i) {
    if (files_[i] && files_[i]->owner == owner) used += files_[i]->used;
  }
  return used;
}

std::size_t Pool::strays() const {
  std::size_t strays = 0;
  for (std::size_t i = 0; i < file_count_; ++i) {
    if (files_[i] && files_[i]->owner != owner_) strays += files_[i]->live;
  }
  return strays;
}

std::size_t Pool::metadata_bytes() const {
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < file_count_; ++i) {
    if (!files_[i]) continue;
    const auto& busy = files_[i]->busy;
    const auto chunks = static_cast<std::size_t>(std::count_if(busy.begin(), busy.end(), [](std::uint16_t n) { return n != 0; }));
    bytes += sizeof(PoolFile) + (files_[i]->owner ? chunks * kChunk : files_[i]->bump) * sizeof(FrameMeta);
  }
  return bytes;
}

}  // namespace ksmu::frames
