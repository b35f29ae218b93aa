#include "broker/shared_index.h"

#include <cstring>

namespace ksmu::broker {
namespace {
constexpr IndexWord kErased = 0xffff'ffff;  // of hash 0, and of no frame: never a pair's word

IndexWord WordOf(std::uint32_t hash, Frame frame) { return static_cast<IndexWord>(hash) << 32 | (frame + 1); }
constexpr std::size_t SlotsOf(std::size_t table) { return table / sizeof(IndexWord); }

// The slot of the first word that `wanted` says yes to, from the hash's home on.
template <typename F>
std::size_t Find(const std::atomic<IndexWord>* slots, std::size_t table, std::uint32_t hash, F&& wanted) {
  const std::size_t mask = SlotsOf(table) - 1;
  std::size_t i = IndexReader::Home(hash) & mask;
  while (!wanted(slots[i].load(std::memory_order_relaxed))) i = (i + 1) & mask;
  return i;
}
}  // namespace

IndexWriter::IndexWriter(void* base, Punch punch, void* cookie) : base_(static_cast<char*>(base)), punch_(punch), cookie_(cookie) {
  table_ = kSmallestTable;
  Header().table_bytes.store(table_, std::memory_order_release);
}

void IndexWriter::Clear(std::size_t table) {
  if (punch_(cookie_, table, table) == 0) return;
  for (std::size_t i = 0; i < SlotsOf(table); ++i) Slots(table)[i].store(0, std::memory_order_relaxed);
}

// Another table, of another size, without what has been erased: half as large where pairs fill less than a quarter, else twice.
bool IndexWriter::MakeRoom() {
  const bool smaller = live_ * 4 < SlotsOf(table_) && table_ > kSmallestTable;
  if (!smaller && table_ == kLargestTable) return live_ * 8 < SlotsOf(table_) * 7;
  const std::size_t next = smaller ? table_ / 2 : table_ * 2;
  for (std::size_t i = 0; i < SlotsOf(table_); ++i) {
    const IndexWord word = Slots(table_)[i].load(std::memory_order_relaxed);
    if (word == 0 || word == kErased) continue;
    const auto hash = static_cast<std::uint32_t>(word >> 32);
    const std::size_t at = Find(Slots(next), next, hash, [](IndexWord w) { return w == 0; });
    Slots(next)[at].store(word, std::memory_order_relaxed);
  }
  Header().table_bytes.store(next, std::memory_order_release);
  Clear(table_);
  table_ = next;
  filled_ = live_;
  return true;
}

bool IndexWriter::Insert(std::uint32_t hash, Frame frame) {
  if (filled_ * 4 >= SlotsOf(table_) * 3 && !MakeRoom()) return false;
  const std::size_t at = Find(Slots(table_), table_, hash, [](IndexWord w) { return w == 0 || w == kErased; });
  if (Slots(table_)[at].load(std::memory_order_relaxed) == 0) ++filled_;
  Slots(table_)[at].store(WordOf(hash, frame), std::memory_order_release);
  ++live_;
  auto* const log = reinterpret_cast<std::atomic<IndexWord>*>(base_ + 4096);
  const std::uint64_t head = Header().log_head.load(std::memory_order_relaxed);
  log[head % kLogEntries].store(WordOf(hash, frame), std::memory_order_release);
  Header().log_head.store(head + 1, std::memory_order_release);
  return true;
}

void IndexWriter::Erase(std::uint32_t hash, Frame frame) {
  const IndexWord word = WordOf(hash, frame);
  const std::size_t at = Find(Slots(table_), table_, hash, [&](IndexWord w) { return w == word || w == 0; });
  if (Slots(table_)[at].load(std::memory_order_relaxed) != word) return;
  Slots(table_)[at].store(kErased, std::memory_order_release);
  --live_;
  if (live_ * 16 < SlotsOf(table_) && table_ > kSmallestTable) MakeRoom();
}

}  // namespace ksmu::broker
