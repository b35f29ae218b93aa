// The tuner: what the members of a domain may spend on merging, from how short the machine's memory is and from what merging has
// gained lately. docs/tuner.md has its states and their thresholds in a table.
//
// It decides, and does nothing: it is told the time and what there is to see, once a second or so, and says what the tunables are to
// be. Moves to more speed are made at once, moves to less only after the least time that each state has; for every change costs
// each member a message and a pass over its memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "engine/tunables.h"

namespace ksmu::broker {

struct Pressure {
  std::uint64_t total_bytes = 0;     // without what is set aside for hugetlb, which nothing else can use; 0: not known
  std::uint64_t available_bytes = 0;
  double psi_some_avg10 = -1;        // of the last ten seconds, in percent: somebody waited for memory; below 0: PSI is off
};
// From the texts of /proc/meminfo and /proc/pressure/memory. What is missing, malformed or absurd is not known.
Pressure ParsePressure(std::string_view meminfo, std::string_view psi);
Pressure ReadPressure();

class Tuner {
 public:
  // What is seen of a domain. Sums over the members that are connected: they may fall when one leaves.
  struct Observation {
    std::size_t members = 0;
    std::uint64_t joined = 0;          // total: members that have joined so far
    std::int64_t pages_saved = 0;      // gauge: pages merged and zero, less the frames
    std::int64_t pages_tracked = 0;    // gauge
    std::int64_t pages_volatile = 0;   // gauge
    std::int64_t region_pages = 0;     // gauge: regions' length. Of all these the one that is seen to change also at run 0
    std::int64_t cow_breaks = 0;       // total
    std::uint64_t cpu_ns = 0;          // total, of the members' scanners
  };

  enum class State : std::uint8_t { kCalm, kJoined, kPressed, kIdle, kResting };

  struct Plan {
    State state = State::kCalm;
    std::int64_t run = 1, pages_to_scan = 0, sleep_millisecs = 20, cpu_limit_percent = 10;

    struct Setting {
      std::uint32_t tunable;  // engine::TunableNumber
      std::int64_t value;
    };
    std::array<Setting, 4> Settings() const {
      return {{{engine::kTunable_run, run},
               {engine::kTunable_pages_to_scan, pages_to_scan},
               {engine::kTunable_sleep_millisecs, sleep_millisecs},
               {engine::kTunable_cpu_limit_percent, cpu_limit_percent}}};
    }
    const char* reason() const;  // one word, for operators: the state's
    bool operator==(const Plan&) const = default;
  };

  // The number of CPUs that members run on.
  explicit Tuner(int cpus) : cpus_(cpus < 1 ? 1 : cpus) {}

  // A time before one that it has been told already counts as that one.
  Plan Decide(std::uint64_t now_ns, const Observation& seen, const Pressure& pressure);
  const Plan& plan() const { return plan_; }

 private:
  // The last minute, in slots.
  struct Slot {
    std::uint64_t number = 0;  // 1 + the time in slots; 0: never used
    std::int64_t gained = 0, changed = 0, risen = 0;  // risen: the volatile pages, at the most
    std::int64_t most_saved = 0, most_region_pages = 0, least_volatile = 0;
    std::uint64_t cpu_ns = 0;
  };
  struct Minute {
    std::int64_t gained = 0;   // pages saved that were not saved at any time of the minute before
    std::int64_t changed = 0;  // pages broken, advised, or volatile that were not all the time
    std::uint64_t cpu_ns = 0;
  };
  static constexpr std::size_t kSlots = 12;

  void Note(const Observation& seen);
  Minute LastMinute() const;
  void NotePressure(const Pressure& pressure);
  void NoteJoins(const Observation& seen);
  State Next(const Observation& seen, const Pressure& pressure);
  void Enter(State state, const Observation& seen);
  void SetBudget(std::size_t members);
  bool Rests() const;
  std::uint64_t For() const { return now_ - since_; }

  const int cpus_;
  Plan plan_;
  std::uint64_t now_ = 0, since_ = 0;  // of the state
  std::size_t budget_for_ = 0;         // members that there were when the budget was reckoned
  std::array<Slot, kSlots> slots_{};
  bool known_ = false;  // there is an observation before this one
  std::int64_t breaks_ = 0;
  std::uint64_t cpu_ns_ = 0;

  std::uint64_t joined_ = 0;             // of the last observation
  bool pending_ = false;                 // somebody has joined who has not had his share yet
  std::uint64_t joined_wait_ = 0, joined_again_at_ = 0;
  std::int64_t gained_since_joined_ = 0;
  bool short_ = false;                   // of memory
  std::uint64_t barren_until_ = 0;       // pressure is not heeded until then: it was of no use
  std::uint64_t calm_for_ = 0;           // the least time of calm
  std::uint64_t quiet_since_ = 0;        // when idle began; resting comes after it
  // Then. Idle members must not lose, little by little, more than they merge.
  std::int64_t saved_when_quiet_ = 0;
};

}  // namespace ksmu::broker
