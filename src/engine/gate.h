// The gate: a short hold on a run. Whoever touches a page that has been taken out waits until the gate opens.
//
//   Shut   the run leaves the tracker and is registered with the gate (MISSING)
//   Take   its pages move to staging, where only the library's threads look
//   ...    the owner compares, attaches frames, or lets pages be dropped
//   GiveBack, Drain, Drop, Open
//
// What could go wrong, and the rule against it:
//   - A discard comes while the gate is shut. Its event must not be read before the frames are attached: the discarding
//     thread goes on as soon as it is read, finds nothing to zap, and would then see the frame's bytes. So the events
//     are read in Drain only, after the attach; the discarding thread then zaps the new mapping itself, and the pages
//     are marked (gone()). A page that was gone is never given back.
//   - An event is on its way: raised under the old registration, not yet queued. Drain goes on until a harmless call on
//     the gate stops saying EAGAIN.
//   - A raw clone copies the address space with the pages in staging: the fork event hands out the child's context, and
//     Drain puts the pages back there (only where EVENT_FORK is permitted; libc's fork waits for the merge in hand).
//   - Replacing a mapping does not wake those who wait on it: Open wakes the whole run, explicitly, always.
//   - Any call can fail: each function says what holds then. Unfinished registrations go to the repair list.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "base/own_memory.h"
#include "engine/counters.h"
#include "os/os.h"

namespace ksmu::engine {

using os::Address;
using os::Span;

inline constexpr std::size_t kMaxRunPages = 128;  // some 100 microseconds of gate
inline constexpr std::size_t kStagingPages = 8 * kMaxRunPages;

class Gate {
 public:
  Gate(os::System& system, Counters& counters) : system_(system), counters_(counters), page_(system.PageSize()) {}
  ~Gate();
  Gate(const Gate&) = delete;

  int Start();  // maps and registers staging

  // 0: the gate is shut. -errno: nothing is changed, but that the run may have lost its tracker (then it is on the repair
  // list and its pages count as written).
  int Shut(Span run, bool zero = false);  // zero: an all-zero run (the names of its test points)
  // Takes pages from the start of the run; returns how many. *error says what stopped it before the end, else 0.
  std::size_t Take(int* error);
  const std::byte* Staged(std::size_t i) const { return staging_ + (base_ + i) * page_; }
  bool taken(std::size_t i) const { return state_[i] == kTaken; }
  bool gone(std::size_t i) const { return gone_[i]; }
  // True if the range is still the mapping that Shut has registered, as far as anybody can tell.
  bool StillOurs(Span part) { return system_.WriteProtect(os::kGate, part, false) == 0; }
  // Moves [from, to) back, except what was discarded meanwhile. Returns only when the pages are back.
  void GiveBack(std::size_t from, std::size_t to);
  // Reads the gate's events until none is on its way. Never between Shut and the attach.
  void Drain();
  // The staged pages that are still in staging are nobody's: FlushStaging frees them, those of many runs in one call (each
  // is a round of interrupts to the other CPUs). Staging is flushed by itself when it is full.
  void Drop();
  void FlushStaging();
  // [attached, end) goes back to the tracker, everybody is woken. Pages before `attached` belong to another mapping now.
  void Open(std::size_t attached);

  // Registrations that failed: tried again; true when none is left.
  bool Repair();
  bool NeedsRepair() const { return !repairs_.empty(); }
  // True once after a repair has taken a range out of a context: what that has announced of it may be zapped later.
  bool LeftContext() { return std::exchange(left_context_, false); }
  // A gate could not be taken back yet: whoever reads what is missing in it waits, the scanner too.
  bool LeftShut() const {
    for (const Registration& r : repairs_) {
      if (r.leave == os::kGate) return true;
    }
    return false;
  }
  // The span is to be under `enter`, and not under `leave` any more.
  void AddRepair(Span span, os::Context enter, std::uint32_t modes, os::Context leave = os::kNoContext) {
    repairs_.push_back({span, enter, modes, leave});
  }

 private:
  int MapStaging();
  void RenewStaging();
  enum PageState : std::uint8_t { kThere, kTaken, kReturned };
  struct Registration {
    Span span;
    os::Context enter;
    std::uint32_t modes;
    os::Context leave;
  };
  void ReadEvents();
  void ServeChild(os::Context child);
  bool ReturnPage(std::size_t i);

  os::System& system_;
  Counters& counters_;
  std::size_t page_;
  std::byte* staging_ = nullptr;
  std::size_t base_ = 0;  // page of staging where the run in hand goes; what lies before it has been dropped
  bool refused_ = false;  // the last move into staging, for a reason that staging itself can have
  std::uint64_t renewed_at_ = 0;
  Span run_;
  bool shut_ = false;
  bool zero_ = false;
  std::size_t pages_ = 0;
  std::array<PageState, kMaxRunPages> state_{};
  std::array<bool, kMaxRunPages> gone_{};
  std::uint64_t shut_at_ = 0;
  base::OwnVector<Registration> repairs_;
  bool left_context_ = false;
};

}  // namespace ksmu::engine
