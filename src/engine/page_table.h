// From an address to what is known of its page: a radix tree of segments (2 MiB of addresses), each with blocks of 64
// page words that exist only where pages do, so that a sparse region costs what is populated.
//
// Readers need no lock: pointers are published with release and nothing is freed while the event thread runs. Only the
// scanner adds.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "base/own_memory.h"
#include "engine/page.h"
#include "os/os.h"

namespace ksmu::engine {

using os::Address;
using os::Span;

inline constexpr int kSegmentShift = 21;
inline constexpr std::size_t kSegmentBytes = std::size_t{1} << kSegmentShift;
inline constexpr std::size_t kBlockPages = 64;
inline constexpr std::size_t kMaxSegmentPages = kSegmentBytes / 4096;

struct Block {
  std::array<std::atomic<std::uint64_t>, kBlockPages> words{};
};

// What was seen of a segment that is mapped by a huge page; see huge.cc.
struct Sample {
  std::array<std::uint32_t, 64> hashes{};  // sorted
  std::uint64_t still = 0;                 // which of them were there the last time, too
  std::size_t count = 0, zeros = 0, still_zeros = 0;
  std::size_t alike = 0, still_alike = 0;  // pages whose content a frame has, or another page of the segment
  bool taken = false;
  std::array<std::uint32_t, 4> probes{};   // hashes of a few pages, as last looked at
  bool changed = false;                    // they were different from the time before
  bool heard = false;                      // others have contents of it, too, since it was read
  std::uint8_t restless = 0;               // times that it was seen again soon, since its contents had just come
  void Clear() { *this = Sample(); }
};

struct Segment {
  // kSampling and kLetGo are not armed: huge, or fit to become huge. See huge.cc.
  enum Huge : std::uint8_t { kPlain, kSampling, kApproved, kLetGo };
  Address start = 0;
  std::array<std::atomic<Block*>, kMaxSegmentPages / kBlockPages> blocks{};
  std::uint16_t expected_present = 0;  // pages that the last sweep found present and private; scanner only
  std::uint16_t unsettled = 0;         // pages that the next sweep has to look at whatever it finds; scanner only
  std::uint8_t backoff = 0;            // sweeps to leave out are 2^backoff - 1; scanner only
  std::uint8_t looks = 0;              // complete looks in a row that found every page still and unlike any other
  std::uint8_t quiet = 0;              // sweeps in a row that found nothing written, up to a few
  std::uint8_t let_go = 0;             // times in a row that it was let go of and found unchanged
  std::uint16_t wait = 0;              // sweeps still to be left out
  Huge huge = kPlain;                  // scanner only
  Sample* sample = nullptr;            // kSampling
  bool armed() const { return huge == kPlain || huge == kApproved; }
};

class PageTable {
 public:
  explicit PageTable(std::size_t page_size);
  ~PageTable();
  PageTable(const PageTable&) = delete;

  std::size_t page_size() const { return page_size_; }
  std::size_t pages_per_segment() const { return kSegmentBytes / page_size_; }

  // Addresses at and above this are not served (5-level page tables hand them out only on request).
  static constexpr Address kLimit = Address{1} << 48;

  Segment* FindSegment(Address a) const;
  std::atomic<std::uint64_t>* Find(Address a) const;  // nullptr: nothing known. Any thread
  Page Load(Address a) const {
    const auto* word = Find(a);
    return word ? Page(word->load(std::memory_order_acquire)) : Page();
  }
  std::atomic<std::uint64_t>* Make(Address a);        // nullptr: no memory. Scanner only
  // Makes all words of the range; false: no memory.
  bool MakeRange(Span span);
  // The first segment that ends above `a`, nullptr: none.
  Segment* NextSegment(Address a) const;
  std::atomic<std::uint64_t>* Word(Segment* segment, std::size_t index) const {
    Block* block = segment->blocks[index / kBlockPages].load(std::memory_order_acquire);
    return block ? &block->words[index % kBlockPages] : nullptr;
  }
  std::size_t metadata_bytes() const { return bytes_.load(std::memory_order_relaxed); }

 private:
  static constexpr int kLeafBits = 14, kRootBits = 48 - kSegmentShift - kLeafBits;
  static constexpr std::size_t kLeafMask = (std::size_t{1} << kLeafBits) - 1;
  struct Leaf {
    std::array<std::atomic<Segment*>, std::size_t{1} << kLeafBits> segments;
    // Which of them exist: so that the search for the next one does not read, and so populate, 128 KiB of nothing.
    std::array<std::atomic<std::uint64_t>, (std::size_t{1} << kLeafBits) / 64> known;
  };
  using Root = std::array<std::atomic<Leaf*>, std::size_t{1} << kRootBits>;

  std::size_t page_size_;
  int page_shift_;
  Root* root_ = nullptr;
  base::OwnSlab<Segment> segments_;
  base::OwnSlab<Block> blocks_;
  std::atomic<std::size_t> bytes_{0};
};

}  // namespace ksmu::engine
