// A domain for the tuner's tests.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <ostream>

#include "broker/tuner.h"

namespace ksmu::broker {

// For gtest's messages.
inline void PrintTo(Tuner::State state, std::ostream* out) {
  Tuner::Plan plan;
  plan.state = state;
  *out << plan.reason();
}

using State = Tuner::State;
inline constexpr std::uint64_t kSecond = 1'000'000'000, kMinute = 60 * kSecond, kHour = 60 * kMinute;
inline constexpr std::uint64_t kGiB = std::uint64_t{1} << 30;
inline constexpr std::int64_t kTracked = 1 << 20;              // 4 GiB
inline constexpr std::int64_t kSignificant = kTracked / 256;   // pages that count, of so many

inline Pressure Memory(std::uint64_t available_percent, double psi = 0) { return {100 * kGiB, available_percent * kGiB, psi}; }

// A domain, its tuner, and the hours that pass.
struct Fleet {
  explicit Fleet(int cpus = 8) : tuner(cpus) { seen.pages_tracked = kTracked; }

  void Join(std::size_t n = 1) { seen.members += n, seen.joined += n; }
  // One look, `after` the last one.
  State Look(std::uint64_t after = kSecond) {
    now += after;
    const Tuner::Plan before = tuner.plan();
    const Tuner::Plan plan = tuner.Decide(now, seen, pressure);
    EXPECT_EQ(plan, tuner.plan());
    changes += plan.run != before.run || plan.pages_to_scan != before.pages_to_scan || plan.sleep_millisecs != before.sleep_millisecs ||
               plan.cpu_limit_percent != before.cpu_limit_percent;
    moves += plan.state != before.state;
    return plan.state;
  }
  // Looks each second until it is in that state, at most so long. How long it took; ~0: it did not come to it.
  std::uint64_t Until(State state, std::uint64_t most) {
    for (std::uint64_t took = kSecond; took <= most; took += kSecond) {
      if (Look() == state) return took;
    }
    return ~std::uint64_t{0};
  }
  // Each second: true as long as it is in that state.
  testing::AssertionResult Stays(State state, std::uint64_t ns) {
    for (std::uint64_t t = 0; t < ns; t += kSecond) {
      if (Look() != state) return testing::AssertionFailure() << tuner.plan().reason() << " after " << t / kSecond + 1 << " s";
    }
    return testing::AssertionSuccess();
  }
  // Has members since long, and nothing happens.
  void GoCalm() {
    Join();
    ASSERT_EQ(Look(), State::kJoined);
    ASSERT_EQ(Until(State::kCalm, kMinute), 10 * kSecond);
  }
  void GoIdle() {
    GoCalm();
    ASSERT_EQ(Until(State::kIdle, 2 * kMinute), kMinute);
  }
  void GoResting() {
    GoIdle();
    ASSERT_EQ(Until(State::kResting, 11 * kMinute), 10 * kMinute);
  }
  void GoPressed() {
    GoCalm();
    pressure = Memory(19);
    ASSERT_EQ(Look(), State::kPressed);
  }

  Tuner tuner;
  Tuner::Observation seen;
  Pressure pressure = Memory(80);
  std::uint64_t now = 1000 * kSecond;
  int changes = 0, moves = 0;
};

}  // namespace ksmu::broker
