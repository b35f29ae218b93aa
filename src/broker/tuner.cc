#include "broker/tuner.h"

#include <fcntl.h>

#include <algorithm>
#include <charconv>
#include <limits>

#include "os/text.h"

namespace ksmu::broker {
namespace {

constexpr std::uint64_t kSecond = 1'000'000'000, kMinute = 60 * kSecond;
constexpr std::uint64_t kSlotNs = 5 * kSecond;  // times kSlots: a minute

// Of all members of a domain together, in percent of the machine: where there are many, each gets less, down to a little.
constexpr std::int64_t kShareOfMachine = 50, kLeastBudget = 2;

constexpr std::uint64_t kJoinedFor = 10 * kSecond;
// From one beginning of `joined` to the next. Twice as long each time that nothing was gained since the one before.
constexpr std::uint64_t kJoinedWait = 30 * kSecond, kLongestJoinedWait = 8 * kMinute;

// In percent of all memory, and of the time.
constexpr std::uint64_t kShortBelow = 20, kNotShortFrom = 25;
constexpr double kPsiShort = 10, kPsiNotShort = 5;
constexpr std::uint64_t kPressedFor = 2 * kMinute;
constexpr std::uint64_t kBarrenFor = 10 * kMinute;
// While memory is short a page saved is worth ten times what members reckon it to be worth otherwise (0.1 ms, engine/runtime.cc).
constexpr double kWorthOfPageNs = 1'000'000;

// Of an idle member, a second: it reads 4 MiB of memory at the most, since nothing is to be gained by it. In batches a second apart.
constexpr std::int64_t kIdlePages = 1000, kIdleSleepMs = 1000;

// What counts: one page in so many of those tracked, 0.4 %, or 1 MiB where there are few. No more than a quarter of what idle members
// read in a minute, 59 MiB each: they could not show more, and would stay idle.
constexpr std::int64_t kPart = 256, kLeastPages = 256, kMostPagesAMember = kIdlePages * 60 / 4;

// Twice as long each time that idle has ended within kSoon.
constexpr std::uint64_t kCalmFor = kMinute, kLongestCalmFor = 16 * kMinute, kSoon = 5 * kMinute;

constexpr std::uint64_t kIdleFor = 10 * kMinute;
constexpr std::uint64_t kRestFrom = 50, kRestAbove = 40;  // available, in percent of all memory
constexpr std::uint64_t kRestNs = 5 * kMinute;  // and then a probe
// Members hear of it within 0.2 s, go over their memory once, and report within 2 s.
constexpr std::uint64_t kProbeNs = 10 * kSecond;

using State = Tuner::State;
struct Row {
  const char* word;
  std::int64_t run, pages_to_scan, sleep_millisecs, cpu_limit_percent;
};
// In the order of State. Calm is what members begin with.
constexpr Row kRows[] = {
    {"calm", 1, 0, 20, 10},
    {"joined", 1, 0, 20, 50},
    {"pressed", 1, 0, 20, 30},
    {"idle", 1, kIdlePages, kIdleSleepMs, 2},
    // A probe has ten seconds for all memory: not in batches.
    {"resting", 0, 0, kIdleSleepMs, 2},
};
const Row& RowOf(State state) { return kRows[static_cast<std::size_t>(state)]; }

constexpr bool IsPreset(const Row& row) {
  const auto preset = [](engine::TunableNumber t) { return engine::kTunableRules[t].preset; };
  return row.run == preset(engine::kTunable_run) && row.pages_to_scan == preset(engine::kTunable_pages_to_scan) &&
         row.sleep_millisecs == preset(engine::kTunable_sleep_millisecs) &&
         row.cpu_limit_percent == preset(engine::kTunable_cpu_limit_percent);
}
static_assert(IsPreset(kRows[0]));

// Members say what they like: so much that nothing overflows.
std::int64_t Pages(std::int64_t n) { return std::clamp<std::int64_t>(n, 0, std::int64_t{1} << 58); }

std::int64_t Significant(const Tuner::Observation& seen) {
  const auto members = static_cast<std::int64_t>(std::min<std::size_t>(seen.members, 1 << 20));
  return std::max(kLeastPages, std::min(seen.pages_tracked / kPart, kMostPagesAMember * members));
}

// available >= percent of total
bool Has(const Pressure& pressure, std::uint64_t percent) {
  const auto available = static_cast<double>(pressure.available_bytes), total = static_cast<double>(pressure.total_bytes);
  return available * 100 >= total * static_cast<double>(percent);
}

// The lines of a text, one by one.
bool TakeLine(std::string_view* text, std::string_view* line) {
  if (text->empty()) return false;
  const std::size_t end = std::min(text->find('\n'), text->size());
  *line = text->substr(0, end);
  text->remove_prefix(std::min(end + 1, text->size()));
  return true;
}

// "   1234 kB", in bytes. False: it is anything else.
bool KibibytesIn(std::string_view text, std::uint64_t* bytes) {
  os::SkipSpaces(&text);
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || value > std::numeric_limits<std::uint64_t>::max() / 1024) return false;
  if (std::string_view(end, static_cast<std::size_t>(text.data() + text.size() - end)) != " kB") return false;
  *bytes = value * 1024;
  return true;
}

}  // namespace

// --- pressure --------------------------------------------------------------------------------------------------------

Pressure ParsePressure(std::string_view meminfo, std::string_view psi) {
  Pressure pressure;
  std::string_view line;
  std::uint64_t total = 0, available = 0, huge = 0;
  bool has_total = false, has_available = false;
  while (TakeLine(&meminfo, &line)) {
    if (os::TakePrefix(&line, "MemTotal:")) has_total = KibibytesIn(line, &total);
    if (os::TakePrefix(&line, "MemAvailable:")) has_available = KibibytesIn(line, &available);
    if (os::TakePrefix(&line, "Hugetlb:") && !KibibytesIn(line, &huge)) huge = 0;
  }
  if (has_total && has_available && available <= total) {
    pressure.total_bytes = huge <= total - available ? total - huge : total;
    pressure.available_bytes = available;
  }
  while (TakeLine(&psi, &line)) {
    if (!os::TakePrefix(&line, "some avg10=")) continue;
    double value = -1;
    const char* const end = line.data() + line.size();
    const auto parsed = std::from_chars(line.data(), end, value, std::chars_format::fixed);
    const bool whole = parsed.ec == std::errc() && (parsed.ptr == end || *parsed.ptr == ' ');
    if (whole && value >= 0 && value <= 100) pressure.psi_some_avg10 = value;
  }
  return pressure;
}

Pressure ReadPressure() {
  std::array<char, 8192> meminfo;
  std::array<char, 512> psi;
  // Without PSI there is no such file, or it cannot be opened or read.
  const auto read = [](const char* path, auto& text) {
    const std::int64_t bytes = os::ReadSmallFile(AT_FDCWD, path, text.data(), text.size());
    return std::string_view(text.data(), bytes > 0 ? static_cast<std::size_t>(bytes) : 0);
  };
  return ParsePressure(read("/proc/meminfo", meminfo), read("/proc/pressure/memory", psi));
}

// What is not known counts as enough memory, but not as plenty.
void Tuner::NotePressure(const Pressure& pressure) {
  const bool known = pressure.total_bytes > 0;
  if ((known && !Has(pressure, kShortBelow)) || pressure.psi_some_avg10 > kPsiShort) {
    short_ = true;
  } else if ((!known || Has(pressure, kNotShortFrom)) && pressure.psi_some_avg10 < kPsiNotShort) {
    short_ = false;
  }
}

// --- yield -----------------------------------------------------------------------------------------------------------

// A gain is what is saved beyond the most that was saved in the last minute: what programs fill and members drop again and again is
// none, nor is what a member's leaving makes the sums look like for a while.
void Tuner::Note(const Observation& seen) {
  const std::uint64_t number = now_ / kSlotNs + 1;
  Slot slot{number, 0, 0, 0, seen.pages_saved, seen.region_pages, seen.pages_volatile, 0};
  std::int64_t most_saved = -1, most_region_pages = -1, least_volatile = seen.pages_volatile;
  for (const Slot& s : slots_) {
    if (s.number == 0 || s.number + kSlots <= number) continue;
    most_saved = std::max(most_saved, s.most_saved);
    most_region_pages = std::max(most_region_pages, s.most_region_pages);
    least_volatile = std::min(least_volatile, s.least_volatile);
    if (s.number != number) continue;
    slot = s;
    slot.most_saved = std::max(s.most_saved, seen.pages_saved);
    slot.most_region_pages = std::max(s.most_region_pages, seen.region_pages);
    slot.least_volatile = std::min(s.least_volatile, seen.pages_volatile);
  }
  if (most_saved >= 0) {
    const std::int64_t gained = std::max<std::int64_t>(seen.pages_saved - most_saved, 0);
    slot.gained = Pages(slot.gained + gained);
    slot.changed = Pages(slot.changed + std::max<std::int64_t>(seen.region_pages - most_region_pages, 0));
    gained_since_joined_ = Pages(gained_since_joined_ + gained);
  }
  // Those that a program writes all the time are no news.
  slot.risen = std::max(slot.risen, seen.pages_volatile - least_volatile);
  // Totals fall when a member leaves: then they count anew from there.
  if (known_) {
    slot.changed = Pages(slot.changed + std::max<std::int64_t>(seen.cow_breaks - breaks_, 0));
    slot.cpu_ns += seen.cpu_ns > cpu_ns_ ? seen.cpu_ns - cpu_ns_ : 0;
  }
  known_ = true;
  breaks_ = seen.cow_breaks;
  cpu_ns_ = seen.cpu_ns;
  slots_[number % kSlots] = slot;
}

Tuner::Minute Tuner::LastMinute() const {
  const std::uint64_t number = now_ / kSlotNs + 1;
  Minute minute;
  std::int64_t risen = 0;
  for (const Slot& s : slots_) {
    if (s.number == 0 || s.number + kSlots <= number) continue;
    minute.gained = Pages(minute.gained + s.gained);
    minute.changed = Pages(minute.changed + s.changed);
    minute.cpu_ns += s.cpu_ns;
    risen = std::max(risen, s.risen);
  }
  minute.changed = Pages(minute.changed + risen);
  return minute;
}

// --- states ----------------------------------------------------------------------------------------------------------

const char* Tuner::Plan::reason() const { return RowOf(state).word; }

void Tuner::NoteJoins(const Observation& seen) {
  if (seen.joined > joined_) {
    // In its first half there is enough left of it.
    const bool has_share = plan_.state == State::kJoined && For() <= kJoinedFor / 2;
    pending_ |= !has_share;
  }
  joined_ = seen.joined;
}

// All members together get their share of the machine, whatever the state: 50 scanners, each with a tenth of a CPU, would be all that
// two CPUs have, and what they merge would have to wait for them.
void Tuner::SetBudget(std::size_t members) {
  budget_for_ = members;
  const auto share = kShareOfMachine * cpus_ / static_cast<std::int64_t>(std::clamp<std::size_t>(members, 1, 1 << 20));
  plan_.cpu_limit_percent = std::min(RowOf(plan_.state).cpu_limit_percent, std::max(share, kLeastBudget));
}

void Tuner::Enter(State state, const Observation& seen) {
  const State before = plan_.state;
  const bool was_quiet = before == State::kIdle || before == State::kResting;
  const bool is_quiet = state == State::kIdle || state == State::kResting;
  if (is_quiet && !was_quiet) {
    quiet_since_ = now_;
    saved_when_quiet_ = seen.pages_saved;
  }
  if (state == State::kJoined) {
    // The first of all has no wait behind it.
    const bool of_use = joined_wait_ == 0 || gained_since_joined_ >= kLeastPages;
    joined_wait_ = of_use ? kJoinedWait : std::min(2 * joined_wait_, kLongestJoinedWait);
    joined_again_at_ = now_ + joined_wait_;
    gained_since_joined_ = 0;
    pending_ = false;
    barren_until_ = 0;
  }
  if (was_quiet && state == State::kCalm) {
    calm_for_ = now_ - quiet_since_ < kSoon ? std::min(2 * calm_for_, kLongestCalmFor) : kCalmFor;
  }
  const Row& row = RowOf(state);
  plan_ = {state, row.run, row.pages_to_scan, row.sleep_millisecs, row.cpu_limit_percent};
  since_ = now_;
  SetBudget(seen.members);
}

// Whether it is not the time of a probe: the last part of each period.
bool Tuner::Rests() const { return For() % (kRestNs + kProbeNs) < kRestNs; }

State Tuner::Next(const Observation& seen, const Pressure& pressure) {
  const State state = plan_.state;
  const Minute minute = LastMinute();
  const std::int64_t significant = Significant(seen);
  const bool quiet = minute.gained + minute.changed < significant;
  const bool lost = saved_when_quiet_ - seen.pages_saved >= 2 * significant;
  const bool busy = minute.gained + minute.changed >= 2 * significant || lost;
  const double worth = static_cast<double>(minute.gained) * kWorthOfPageNs;
  const bool pays = minute.gained >= significant && worth >= static_cast<double>(minute.cpu_ns);
  const bool heeded = short_ && (now_ >= barren_until_ || (pays && minute.gained >= 2 * significant));

  // To more speed, at once.
  if (state == State::kJoined) {
    if (For() < kJoinedFor) return state;
    return heeded ? State::kPressed : State::kCalm;
  }
  if (pending_ && now_ >= joined_again_at_) return State::kJoined;
  if (state == State::kPressed) {
    if (For() < kPressedFor) return state;
    if (!short_) return State::kCalm;
    if (pays) return state;
    barren_until_ = now_ + kBarrenFor;
    return State::kCalm;
  }
  if (heeded) return State::kPressed;
  if (state == State::kCalm) return !pending_ && quiet && For() >= calm_for_ ? State::kIdle : state;
  if (pending_ || busy) return State::kCalm;

  // To less.
  const bool known = pressure.total_bytes > 0;
  if (state == State::kIdle) {
    const bool plenty = known && !short_ && Has(pressure, kRestFrom);
    return quiet && plenty && For() >= kIdleFor ? State::kResting : state;
  }
  return known && !short_ && Has(pressure, kRestAbove) ? state : State::kIdle;
}

Tuner::Plan Tuner::Decide(std::uint64_t now_ns, const Observation& observed, const Pressure& pressure) {
  Observation seen = observed;
  for (std::int64_t* n :
       {&seen.pages_saved, &seen.pages_tracked, &seen.pages_volatile, &seen.region_pages, &seen.cow_breaks}) {
    *n = Pages(*n);
  }
  now_ = std::max(now_, now_ns);
  if (calm_for_ == 0) {
    calm_for_ = kCalmFor;
    since_ = now_;
  }
  NotePressure(pressure);
  NoteJoins(seen);
  if (seen.members == 0) {
    // Nobody hears of it, and who comes next has joined.
    slots_ = {};
    known_ = false;
    pending_ = false;
    if (plan_.state != State::kCalm) Enter(State::kCalm, seen);
    return plan_;
  }
  Note(seen);
  if (const State next = Next(seen, pressure); next != plan_.state) Enter(next, seen);
  // A budget that was reckoned for fewer, or for many more, is not theirs.
  if (seen.members >= 2 * budget_for_ || 2 * seen.members <= budget_for_) SetBudget(seen.members);
  if (plan_.state == State::kResting) plan_.run = Rests() ? 0 : 1;
  return plan_;
}

}  // namespace ksmu::broker
