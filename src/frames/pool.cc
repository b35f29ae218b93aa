#include "frames/pool.h"

#include <algorithm>
#include <cerrno>

#include "base/test_point.h"

namespace ksmu::frames {

Pool::Pool(os::System& system, ForkWatch& forks)
    : system_(system), forks_(forks), page_size_(system.PageSize()) {}

Pool::~Pool() {
  for (std::size_t i = 0; i < file_count_; ++i) {
    PoolFile& file = *files_[i];
    system_.UnmapFile(file.bytes, file.frames * page_size_);
    system_.CloseFile(file.file);
    base::UnmapOwnPages(file.meta, kFramesPerFile * sizeof(FrameMeta));
  }
}

bool Pool::AddFile() {
  if (file_count_ == kMaxFiles) return false;
  PoolFile* file = file_slab_.Make();
  if (!file) return false;
  // A file as large as RLIMIT_FSIZE lets it be: below one chunk there is no pool worth having.
  std::size_t frames = kFramesPerFile;
  int error = 0;
  while ((error = system_.CreateFile(frames * page_size_, &file->file)) == -EFBIG && frames > kChunk) frames /= 2;
  if (error) {
    file_slab_.Free(file);
    return false;
  }
  file->frames = frames;
  file->meta = static_cast<FrameMeta*>(base::MapOwnPages(kFramesPerFile * sizeof(FrameMeta)));
  if (!file->meta || system_.MapFile(file->file, frames * page_size_, &file->bytes) != 0) {
    if (file->meta) base::UnmapOwnPages(file->meta, kFramesPerFile * sizeof(FrameMeta));
    system_.CloseFile(file->file);
    file_slab_.Free(file);
    return false;
  }
  files_[file_count_++] = file;
  return true;
}

Frame Pool::Take(Frame f) {
  FrameMeta& meta = Meta(f);
  meta.sharers.store(0, std::memory_order_relaxed);
  meta.pins.store(0, std::memory_order_relaxed);
  meta.covers = 0;
  meta.hash = 0;
  meta.next = kNoFrame;
  meta.born = forks_.epoch();
  meta.idle.store(kNotIdle, std::memory_order_relaxed);
  meta.state = kLive;
  ++live_;
  ++used_;
  idle_.fetch_add(1, std::memory_order_relaxed);  // if it is never mapped
  return f;
}

Frame Pool::Allocate() {
  if (extent_ != extent_end_) return Take(extent_++);
  // New places first, since they are always consecutive; recycled ones once they are a fair part of the whole, so that
  // merge and break cycles do not grow the pool's address range without end.
  if (recycled_ >= std::max<std::size_t>(kChunk, used_ / 4) && Recycle()) return Take(extent_++);
  for (int attempt = 0; attempt < 2; ++attempt) {
    if (file_count_) {
      PoolFile& file = *files_[file_count_ - 1];
      if (file.bump < file.frames) {
        return Take(static_cast<Frame>((file_count_ - 1) * kFramesPerFile + file.bump++));
      }
    }
    if (attempt == 0 && !AddFile()) break;
  }
  return Recycle() ? Take(extent_++) : kNoFrame;
}

// Sets the longest run of free places in the next chunk that has any aside as the extent.
bool Pool::Recycle() {
  if (!recycled_) return false;
  const std::size_t chunks_per_file = kFramesPerFile / kChunk;
  const std::size_t chunks = file_count_ * chunks_per_file;
  for (std::size_t looked = 0; looked < chunks; ++looked, cursor_ = (cursor_ + 1) % chunks) {
    PoolFile& file = *files_[cursor_ / chunks_per_file];
    std::uint16_t& free = file.free[cursor_ % chunks_per_file];
    if (!free) continue;
    std::size_t base = (cursor_ % chunks_per_file) * kChunk, best = 0, best_length = 0;
    const std::size_t end = std::min(base + kChunk, file.bump);
    for (std::size_t i = base; i < end;) {
      if (file.meta[i].state != kFree) { ++i; continue; }
      std::size_t from = i;
      while (i < end && file.meta[i].state == kFree) ++i;
      if (i - from > best_length) best = from, best_length = i - from;
    }
    if (!best_length) continue;
    for (std::size_t i = best; i < best + best_length; ++i) file.meta[i].state = kSetAside;
    free = static_cast<std::uint16_t>(free - best_length);
    recycled_ -= best_length;
    extent_ = static_cast<Frame>(cursor_ / chunks_per_file * kFramesPerFile + best);
    extent_end_ = static_cast<Frame>(extent_ + best_length);
    return true;
  }
  return false;
}

std::size_t Pool::Files(os::File* files, std::size_t capacity) const {
  const std::size_t n = std::min(capacity, file_count_);
  for (std::size_t i = 0; i < n; ++i) files[i] = files_[i]->file;
  return n;
}

bool Pool::IsPoolMapping(const os::Mapping& mapping) const {
  if (mapping.anonymous || mapping.shared) return false;
  for (std::size_t i = 0; i < file_count_; ++i) {
    if (files_[i]->file.inode == mapping.inode && files_[i]->file.device == mapping.device) return true;
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
        if (system_.PunchFile(file.file, i * page_size_, (end - i) * page_size_) != 0) {
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
        live_ -= end - i;
      }
      if (meta.state == kPunched && meta.covers == 0) {
        ForkWatch::Epoch end = meta.idle.load(std::memory_order_relaxed);
        if (end == kNotIdle) meta.idle.store(end = end_for_places, std::memory_order_relaxed);
        if (meta.born >= end) {
          meta.state = kFree;
          ++file.free[i / kChunk];
          ++recycled_;
          --used_;
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

std::size_t Pool::metadata_bytes() const {
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < file_count_; ++i) bytes += sizeof(PoolFile) + files_[i]->bump * sizeof(FrameMeta);
  return bytes;
}

}  // namespace ksmu::frames
