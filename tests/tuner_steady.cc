// What must not move the tuner: noise, spite, clocks that stand still or leap, totals that fall, numbers that are absurd.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <random>
#include <vector>

#include "broker/tuner.h"
#include "tuner_fleet.h"

namespace ksmu::broker {
namespace {

TEST(TunerSteady, AnIdleDayIsIdleAndSpendsNoMoreThanCalm) {
  Fleet fleet;
  fleet.GoIdle();
  fleet.changes = 0;
  for (int second = 0; second < 24 * 3600; ++second) {
    const State state = fleet.Look();
    ASSERT_TRUE(state == State::kIdle || state == State::kResting);
    ASSERT_LE(fleet.tuner.plan().cpu_limit_percent, 10);
    ASSERT_GE(fleet.tuner.plan().sleep_millisecs, 20);
  }
  // Probes: two changes in 310 seconds.
  EXPECT_LE(fleet.changes, 24 * 3600 * 2 / 310 + 2);
}

// Everything wanders, at several paces, across every threshold.
TEST(TunerSteady, NoiseMovesItNowAndThen) {
  int most = 0;
  std::array<std::uint64_t, 5> seconds{};
  for (std::uint32_t seed = 1; seed <= 40; ++seed) {
    std::mt19937 random(seed);
    const auto step = [&](double size) { return std::normal_distribution<double>(0, size)(random); };
    Fleet fleet;
    fleet.Join(4);
    double available = 22, psi = 5, saved = kTracked / 3, hot = kTracked / 8;
    const double pace = 0.02 * (1 << seed % 6);
    for (int hour = 0; hour < 4; ++hour) {
      const int before = fleet.changes;
      for (int second = 0; second < 3600; ++second) {
        available = std::clamp(available + step(5 * pace), 5.0, seed % 2 ? 35.0 : 95.0);
        psi = std::clamp(psi + step(5 * pace), 0.0, seed % 3 ? 4.0 : 20.0);
        saved = std::clamp(saved + step(pace * kSignificant / 4), 0.0, double{kTracked});
        hot = std::clamp(hot + step(pace * kSignificant / 4), 0.0, double{kTracked});
        fleet.pressure = {100 * kGiB, static_cast<std::uint64_t>(available * static_cast<double>(kGiB)), psi};
        fleet.seen.pages_saved = static_cast<std::int64_t>(saved);
        fleet.seen.pages_volatile = static_cast<std::int64_t>(hot);
        fleet.seen.cow_breaks += static_cast<std::int64_t>(std::abs(step(pace * kSignificant / 60)));
        fleet.seen.cpu_ns += kSecond / 20;
        if (random() % 1200 == 0) fleet.seen.joined += 1;
        ++seconds[static_cast<std::size_t>(fleet.Look())];
      }
      most = std::max(most, fleet.changes - before);
      EXPECT_LE(fleet.changes - before, 60) << "seed " << seed << ", hour " << hour;
    }
    EXPECT_GT(fleet.moves, 3) << "seed " << seed;
  }
  // It was moved to wherever it can go.
  for (State state : {State::kCalm, State::kJoined, State::kPressed, State::kIdle, State::kResting}) {
    EXPECT_GT(seconds[static_cast<std::size_t>(state)], 3600u) << testing::PrintToString(state);
  }
  RecordProperty("most_changes_an_hour", most);
  std::cout << "at most " << most << " changes an hour\n";
}

// The worst that can be made for it: it is told whatever makes it move.
TEST(TunerSteady, SpiteHasBounds) {
  Fleet fleet;
  fleet.GoCalm();
  fleet.changes = 0;
  for (int second = 0; second < 3600; ++second) {
    switch (fleet.tuner.plan().state) {
      case State::kJoined:
      case State::kPressed: fleet.pressure = Memory(90); break;
      case State::kCalm:
      case State::kIdle:
      case State::kResting: fleet.pressure = Memory(5); break;
    }
    fleet.Join(), fleet.seen.members -= 1;
    fleet.seen.pages_saved += kSignificant;  // or it would not heed them for long
    fleet.Look();
  }
  EXPECT_LE(fleet.changes, 3 * 120);  // joined comes every 30 s, calm and pressed after it
  // Without joins.
  fleet.changes = 0;
  for (int second = 0; second < 3600; ++second) {
    fleet.pressure = Memory(fleet.tuner.plan().state == State::kPressed ? 90 : 5);
    fleet.seen.pages_saved += kSignificant;
    fleet.Look();
  }
  EXPECT_LE(fleet.changes, 62);
}

TEST(TunerSteady, NothingMovesWhileTheClockStandsStill) {
  Fleet fleet;
  fleet.GoIdle();
  fleet.moves = 0;
  for (int i = 0; i < 10'000; ++i) ASSERT_EQ(fleet.Look(0), State::kIdle);
  // What comes is heeded all the same, once.
  fleet.seen.cow_breaks += 2 * kSignificant;
  EXPECT_EQ(fleet.Look(0), State::kCalm);
  fleet.pressure = Memory(5);
  EXPECT_EQ(fleet.Look(0), State::kPressed);
  fleet.Join();
  EXPECT_EQ(fleet.Look(0), State::kJoined);
  for (int i = 0; i < 10'000; ++i) {
    fleet.pressure = Memory(i % 2 ? 5 : 90);
    fleet.Join(), fleet.seen.members -= 1;
    ASSERT_EQ(fleet.Look(0), State::kJoined);
  }
  EXPECT_EQ(fleet.moves, 3);
  // Going back is standing still.
  Tuner::Plan plan = fleet.tuner.Decide(0, fleet.seen, fleet.pressure);
  EXPECT_EQ(plan.state, State::kJoined);
  // And it goes on where it stood.
  EXPECT_TRUE(fleet.Stays(State::kJoined, 9 * kSecond));
  EXPECT_NE(fleet.Look(), State::kJoined);
}

TEST(TunerSteady, FromTimeZeroAsFromAnyOther) {
  Fleet zero;
  zero.now = 0;
  zero.Join();
  EXPECT_EQ(zero.Look(0), State::kJoined);
  EXPECT_EQ(zero.Until(State::kCalm, kMinute), 10 * kSecond);
  EXPECT_EQ(zero.Until(State::kIdle, kHour), kMinute);
}

TEST(TunerSteady, ALeapOfTheClockIsNoNews) {
  Fleet fleet;
  fleet.seen.pages_saved = kTracked / 2;
  fleet.GoCalm();
  fleet.Look(10 * kHour);
  EXPECT_EQ(fleet.tuner.plan().state, State::kIdle);  // a calm time, as far as anybody knows
  fleet.Look(10 * kHour);
  EXPECT_EQ(fleet.tuner.plan().state, State::kResting);
  fleet.now = ~std::uint64_t{0} - 2 * kSecond;
  EXPECT_EQ(fleet.Look(), State::kResting);
}

TEST(TunerSteady, TotalsThatFallWithAMemberAreNoNews) {
  Fleet fleet;
  fleet.Join(3);
  fleet.seen.cow_breaks = 50 * kSignificant;
  fleet.seen.cpu_ns = 1000 * kSecond;
  fleet.Look();
  ASSERT_NE(fleet.Until(State::kIdle, kHour), ~std::uint64_t{0});
  fleet.seen.members = 2;
  fleet.seen.cow_breaks = 20 * kSignificant;
  fleet.seen.cpu_ns = 300 * kSecond;
  EXPECT_TRUE(fleet.Stays(State::kIdle, 9 * kMinute));
  // From there they count: not only when they are what they had been.
  fleet.seen.cow_breaks += 3 * kSignificant / 2;
  EXPECT_EQ(fleet.Look(), State::kIdle);
  // Nor is what has been counted undone.
  fleet.seen.members = 1;
  fleet.seen.cow_breaks -= 10 * kSignificant;
  EXPECT_EQ(fleet.Look(0), State::kIdle);
  fleet.seen.cow_breaks += kSignificant / 2;
  EXPECT_EQ(fleet.Look(0), State::kCalm);
}

TEST(TunerSteady, WhatWasSavedBeforeTheLastMinuteIsForgotten) {
  Fleet fleet;
  fleet.seen.pages_saved = kTracked / 2;
  fleet.GoCalm();
  fleet.seen.pages_saved = kTracked / 4;
  EXPECT_EQ(fleet.Look(kHour), State::kIdle);
  fleet.seen.pages_saved += 2 * kSignificant;
  EXPECT_EQ(fleet.Look(), State::kCalm);
}

TEST(TunerSteady, ADipOfWhatIsSavedIsNoGain) {
  // When a member leaves, its pages are gone from the sums before its frames are.
  Fleet fleet;
  fleet.Join(3);
  fleet.seen.pages_saved = kTracked / 2;
  fleet.Look();
  ASSERT_NE(fleet.Until(State::kCalm, kMinute), ~std::uint64_t{0});
  fleet.seen.members = 2;
  ASSERT_TRUE(fleet.Stays(State::kCalm, 20 * kSecond));
  for (std::int64_t saved : {kTracked / 4, kTracked / 3, kTracked / 2 - kSignificant}) {
    fleet.seen.pages_saved = saved;
    ASSERT_TRUE(fleet.Stays(State::kCalm, 5 * kSecond));
  }
  EXPECT_LE(fleet.Until(State::kIdle, kHour), 30 * kSecond);
}

TEST(TunerSteady, AbsurdNumbersDoNotOverflow) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max(), kLeast = std::numeric_limits<std::int64_t>::min();
  std::mt19937 random(7);
  Fleet fleet;
  fleet.Join();
  const auto any = [&]() -> std::int64_t {
    const std::int64_t values[] = {kMost, kLeast, 0, -1, kMost / 2, 1};
    return values[random() % 6];
  };
  for (int second = 0; second < 100'000; ++second) {
    fleet.seen = {random() % 3 ? ~std::size_t{0} : 1, static_cast<std::uint64_t>(any()), any(), any(), any(), any(), any(), static_cast<std::uint64_t>(any())};
    fleet.pressure = {static_cast<std::uint64_t>(any()), static_cast<std::uint64_t>(any()), static_cast<double>(any())};
    fleet.Look(random() % 4 ? kSecond : random() % kHour);
    for (const auto& [tunable, value] : fleet.tuner.plan().Settings()) {
      ASSERT_GE(value, engine::kTunableRules[tunable].least);
      ASSERT_LE(value, engine::kTunableRules[tunable].most);
    }
  }
}

TEST(TunerSteady, TheSameStoryHasTheSameEnd) {
  const auto tell = [] {
    std::mt19937 random(11);
    Fleet fleet;
    std::vector<State> states;
    for (int second = 0; second < 20'000; ++second) {
      if (random() % 2000 == 0) fleet.Join();
      fleet.seen.cow_breaks += static_cast<std::int64_t>(random() % 200);
      fleet.pressure = Memory(random() % 500 ? 70 : 10);
      states.push_back(fleet.Look());
    }
    return states;
  };
  EXPECT_EQ(tell(), tell());
}
}  // namespace
}  // namespace ksmu::broker
