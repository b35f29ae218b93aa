// The index of a domain: hash -> frame, and the log of what was published, in memory that the broker writes and members read.
//
// One file, sparse: a header, the log, and the table at the offset that equals its own size, so that tables of different sizes
// never lie over each other:
//
//   0        4 KiB            kLogEntries * 8         B                2 B
//   | header | log of entries |        ...            | table of B bytes |
//
// A table that has to grow (or has too many tombstones) is built beside the one in use, then announced by one store, and the old
// one is punched: who still reads it finds it empty. A reader therefore can miss an entry while a table is replaced, and can
// see one that has been erased since. Both are hints: what is found is asked for (acquire) and proved; what is missed comes
// by the log, or with the next look-up.
//
// Entries are single 64-bit words, stored and loaded at once. No locks, on either side.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "broker/wire.h"

namespace ksmu::broker {

using Frame = std::uint32_t;

inline constexpr std::size_t kLogEntries = 64 * 1024;
inline constexpr std::size_t kSmallestTable = std::size_t{1} << 20;  // bytes: header and log lie below
inline constexpr std::size_t kLargestTable = std::size_t{1} << 33;   // room for four times as many frames as there can be
static_assert(4096 + kLogEntries * 8 <= kSmallestTable);
inline constexpr std::size_t kIndexFileBytes = 2 * kLargestTable;

struct IndexHeader {
  std::atomic<std::uint64_t> table_bytes;  // 0: none yet
  std::atomic<std::uint64_t> log_head;     // entries ever appended
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && sizeof(IndexHeader) <= 4096);

// hash << 32 | frame + 1. 0: empty; the low half all ones: erased.
using IndexWord = std::uint64_t;

class IndexReader {
 public:
  // `bytes` of the file are mapped at `base`, at least kSmallestTable; what would lie behind them is not looked at.
  IndexReader(const void* base, std::size_t bytes) : base_(static_cast<const char*>(base)), bytes_(bytes) {}

  // Calls `visit(frame)` for the frames of this hash until it answers false. Any thread.
  template <typename F>
  void Lookup(std::uint32_t hash, F&& visit) const {
    const std::size_t table = Header().table_bytes.load(std::memory_order_acquire);
    // The broker is another process: what it says is a hint here, too.
    if (table < kSmallestTable || table > bytes_ / 2 || (table & (table - 1))) return;
    const std::size_t mask = table / sizeof(IndexWord) - 1;
    const auto* const slots = reinterpret_cast<const std::atomic<IndexWord>*>(base_ + table);
    for (std::size_t i = Home(hash) & mask, looked = 0; looked < kMaxProbes; i = (i + 1) & mask, ++looked) {
      const IndexWord word = slots[i].load(std::memory_order_acquire);
      if (word == 0) return;
      if (word >> 32 == hash && FrameOf(word) < wire::kFrameLimit && !visit(FrameOf(word))) return;
    }
  }

  // Brings what Lookup is about to look at near: it lies anywhere in a table that is larger than any cache.
  void Prefetch(std::uint32_t hash) const {
    const std::size_t table = Header().table_bytes.load(std::memory_order_relaxed);
    if (table < kSmallestTable || table > bytes_ / 2 || (table & (table - 1))) return;
    __builtin_prefetch(base_ + table + (Home(hash) & (table / sizeof(IndexWord) - 1)) * sizeof(IndexWord));
  }

  std::uint64_t log_head() const { return Header().log_head.load(std::memory_order_acquire); }
  std::size_t table_bytes() const { return Header().table_bytes.load(std::memory_order_acquire); }

  // Calls `visit(hash, frame)` for what has been published since *position (0: from the beginning), and moves it on. False: some
  // of it is lost, because the log holds only the last kLogEntries; everything has to be looked up.
  template <typename F>
  bool ReadLog(std::uint64_t* position, F&& visit) const {
    const std::uint64_t head = Header().log_head.load(std::memory_order_acquire);
    bool complete = head - *position <= kLogEntries;
    if (!complete) *position = head - kLogEntries;
    const auto* const log = reinterpret_cast<const std::atomic<IndexWord>*>(base_ + 4096);
    for (; *position != head; ++*position) {
      const IndexWord word = log[*position % kLogEntries].load(std::memory_order_acquire);
      // Overwritten in the meantime: another entry, and this one is lost.
      complete &= Header().log_head.load(std::memory_order_acquire) - *position < kLogEntries;
      if (word && FrameOf(word) < wire::kFrameLimit) visit(static_cast<std::uint32_t>(word >> 32), FrameOf(word));
    }
    return complete;
  }

  static std::size_t Home(std::uint32_t hash) { return static_cast<std::size_t>((hash * 0x9E3779B97F4A7C15ull) >> 20); }
  static Frame FrameOf(IndexWord word) { return static_cast<Frame>(word) - 1; }
  static constexpr std::size_t kMaxProbes = 4096;

 private:
  const IndexHeader& Header() const { return *reinterpret_cast<const IndexHeader*>(base_); }

  const char* base_;
  std::size_t bytes_;
};

// The broker's side. One thread.
class IndexWriter {
 public:
  // `base`: kIndexFileBytes of the file, all zeros. `punch(cookie, offset, bytes)` gives a part of it back, which then
  // reads as zeros; where it cannot (not 0), the part is overwritten.
  using Punch = int (*)(void* cookie, std::size_t offset, std::size_t bytes);
  IndexWriter(void* base, Punch punch, void* cookie);

  // False: the table is as large as can be, and full. Also appended to the log.
  bool Insert(std::uint32_t hash, Frame frame);
  // The pair must be there.
  void Erase(std::uint32_t hash, Frame frame);
  std::size_t size() const { return live_; }
  std::size_t table_bytes() const { return table_; }

 private:
  IndexHeader& Header() { return *reinterpret_cast<IndexHeader*>(base_); }
  std::atomic<IndexWord>* Slots(std::size_t table) { return reinterpret_cast<std::atomic<IndexWord>*>(base_ + table); }
  bool MakeRoom();
  void Clear(std::size_t table);

  char* base_;
  Punch punch_;
  void* cookie_;
  std::size_t table_ = 0;
  std::size_t live_ = 0, filled_ = 0;  // filled: live and erased
};

}  // namespace ksmu::broker
