// What the library knows of one page of the program: a state and a few bits in one atomic word of 8 bytes.
//
// Two threads change the words. The scanner makes every transition; the event thread makes only those of a page that
// maps a frame and is not busy: merged -> broken (a synchronous break) and merged or broken -> dropped (a discard). Both
// use compare-and-swap, and a page that the scanner has in hand carries kBusy: the event thread then only notes the
// discard and leaves the rest to the scanner, which wakes the waiters when it is done.
#pragma once

#include <atomic>
#include <cstdint>

namespace ksmu::engine {

enum class PageState : std::uint8_t {
  kAbsent,    // nothing there, or nothing known: not counted
  kFresh,     // content not known to be still (KSM: volatile)
  kStill,     // unwritten for one interval, hashed, no other page like it (KSM: unshared)
  kMerged,    // maps a frame
  kBroken,    // in a run's mapping, but written since: a private page
  kDropped,   // in a run's mapping, but discarded: reads as zeros. Not counted
  kZero,      // taken out as all zeros: reads as zeros
  kUnmerged,  // left alone, with a reason
  kResidue,   // in a run's mapping of memory that is advised no more; private or released. Not counted
  kCount,
};

enum class Reason : std::uint8_t {
  kNone, kPinned, kChild, kHuge, kMapBudget, kLocked, kProtection, kBroken, kHot, kSwapped, kKsm, kInherited,
  kAttributes, kPool, kUnwaitable, kForeign, kFailed, kCount,
};

class Page {
 public:
  constexpr Page() = default;
  constexpr explicit Page(std::uint64_t word) : word_(word) {}

  PageState state() const { return static_cast<PageState>(Get<kStateShift, 4>()); }
  Reason reason() const { return static_cast<Reason>(Get<kReasonShift, 5>()); }
  // kStill: the upper half of the hash. kMerged, kBroken, kDropped, kResidue: the frame beneath.
  std::uint32_t value() const { return static_cast<std::uint32_t>(word_); }
  // kFresh, kUnmerged: the pass in which it was last looked at; kBroken: the second in which it was last seen written.
  std::uint32_t stamp() const { return static_cast<std::uint32_t>(Get<kStampShift, 12>()); }
  std::uint32_t tries() const { return static_cast<std::uint32_t>(Get<kTriesShift, 4>()); }
  bool busy() const { return word_ & kBusy; }
  bool discarded() const { return word_ & kDiscarded; }    // sticky: a fault that finds no page is answered with zeros
  bool indexed() const { return word_ & kIndexed; }        // kStill: the index has a candidate entry for it
  bool unconfirmed() const { return word_ & kUnconfirmed; }  // a synchronous break whose copy has not been seen yet
  bool healed() const { return word_ & kHealed; }  // written for its exclusiveness' sake since it could not be taken
  bool covers() const {
    PageState s = state();
    return s == PageState::kMerged || s == PageState::kBroken || s == PageState::kDropped || s == PageState::kResidue;
  }

  Page WithState(PageState s) const { return Page(Set<kStateShift, 4>(static_cast<std::uint64_t>(s))); }
  Page WithReason(Reason r) const { return Page(Set<kReasonShift, 5>(static_cast<std::uint64_t>(r))); }
  Page WithValue(std::uint32_t v) const { return Page((word_ & ~0xffffffffull) | v); }
  Page WithStamp(std::uint32_t s) const { return Page(Set<kStampShift, 12>(s & 0xfff)); }
  Page WithTries(std::uint32_t n) const { return Page(Set<kTriesShift, 4>(n > 15 ? 15 : n)); }
  Page WithBusy(bool b) const { return Page(b ? word_ | kBusy : word_ & ~kBusy); }
  Page WithDiscarded(bool b) const { return Page(b ? word_ | kDiscarded : word_ & ~kDiscarded); }
  Page WithIndexed(bool b) const { return Page(b ? word_ | kIndexed : word_ & ~kIndexed); }
  Page WithUnconfirmed(bool b) const { return Page(b ? word_ | kUnconfirmed : word_ & ~kUnconfirmed); }

  Page WithHealed(bool b) const { return Page(b ? word_ | kHealed : word_ & ~kHealed); }

  std::uint64_t word() const { return word_; }
  static constexpr std::uint32_t kStampMask = 0xfff;

 private:
  static constexpr int kStateShift = 32, kReasonShift = 36, kStampShift = 41, kTriesShift = 53;
  static constexpr std::uint64_t kBusy = 1ull << 57, kDiscarded = 1ull << 58, kIndexed = 1ull << 59,
                                 kUnconfirmed = 1ull << 60, kHealed = 1ull << 61;
  template <int shift, int bits>
  std::uint64_t Get() const { return (word_ >> shift) & ((1ull << bits) - 1); }
  template <int shift, int bits>
  std::uint64_t Set(std::uint64_t v) const {
    constexpr std::uint64_t mask = ((1ull << bits) - 1) << shift;
    return (word_ & ~mask) | ((v << shift) & mask);
  }
  std::uint64_t word_ = 0;
};

}  // namespace ksmu::engine
