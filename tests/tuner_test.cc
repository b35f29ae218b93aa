// The tuner: every move from state to state, and what must not move it. Time is what it is told.
#include "broker/tuner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace ksmu::broker {

// For gtest's messages.
void PrintTo(Tuner::State state, std::ostream* out);
void PrintTo(Tuner::State state, std::ostream* out) {
  Tuner::Plan plan;
  plan.state = state;
  *out << plan.reason();
}

namespace {

using State = Tuner::State;
constexpr std::uint64_t kSecond = 1'000'000'000, kMinute = 60 * kSecond, kHour = 60 * kMinute;
constexpr std::uint64_t kGiB = std::uint64_t{1} << 30;
constexpr std::int64_t kTracked = 1 << 20;              // 4 GiB
constexpr std::int64_t kSignificant = kTracked / 256;   // pages that count, of so many

Pressure Memory(std::uint64_t available_percent, double psi = 0) { return {100 * kGiB, available_percent * kGiB, psi}; }

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

void ExpectValues(const Tuner::Plan& plan, std::int64_t run, std::int64_t sleep, std::int64_t cpu) {
  EXPECT_EQ(plan.run, run) << plan.reason();
  EXPECT_EQ(plan.pages_to_scan, 0) << plan.reason();
  EXPECT_EQ(plan.sleep_millisecs, sleep) << plan.reason();
  EXPECT_EQ(plan.cpu_limit_percent, cpu) << plan.reason();
}

// --- values ----------------------------------------------------------------------------------------------------------

TEST(TunerPlan, CalmIsWhatMembersBeginWith) {
  const Tuner::Plan calm;
  EXPECT_STREQ(calm.reason(), "calm");
  EXPECT_EQ(calm, Tuner(4).plan());
  for (const auto& [tunable, value] : calm.Settings()) {
    EXPECT_EQ(value, engine::kTunableRules[tunable].preset) << engine::kTunableRules[tunable].name;
  }
}

TEST(TunerPlan, EveryStateHasValuesWithinBounds) {
  Fleet fleet;
  std::vector<std::string> words;
  const auto check = [&] {
    const Tuner::Plan plan = fleet.tuner.plan();
    words.emplace_back(plan.reason());
    for (const auto& [tunable, value] : plan.Settings()) {
      EXPECT_GE(value, engine::kTunableRules[tunable].least);
      EXPECT_LE(value, engine::kTunableRules[tunable].most);
    }
    // Nothing but run 0 and 1: merging is never undone to save CPU time.
    EXPECT_LE(plan.run, 1);
  };
  fleet.Join();
  fleet.Look();
  check();
  ExpectValues(fleet.tuner.plan(), 1, 20, 50);
  ASSERT_NE(fleet.Until(State::kCalm, kMinute), ~std::uint64_t{0});
  check();
  ExpectValues(fleet.tuner.plan(), 1, 20, 10);
  ASSERT_NE(fleet.Until(State::kIdle, kHour), ~std::uint64_t{0});
  check();
  ExpectValues(fleet.tuner.plan(), 1, 1000, 2);
  ASSERT_NE(fleet.Until(State::kResting, kHour), ~std::uint64_t{0});
  check();
  ExpectValues(fleet.tuner.plan(), 0, 1000, 2);
  fleet.pressure = Memory(10);
  fleet.Look();
  check();
  ExpectValues(fleet.tuner.plan(), 1, 20, 30);
  EXPECT_EQ(words, (std::vector<std::string>{"joined", "calm", "idle", "resting", "pressed"}));
}

TEST(TunerPlan, ManyMembersShareHalfOfTheMachine) {
  const auto joined = [](int cpus, std::size_t members) {
    Fleet fleet(cpus);
    fleet.Join(members);
    EXPECT_EQ(fleet.Look(), State::kJoined);
    return fleet.tuner.plan().cpu_limit_percent;
  };
  EXPECT_EQ(joined(8, 1), 50);
  EXPECT_EQ(joined(8, 8), 50);
  EXPECT_EQ(joined(8, 16), 25);
  EXPECT_EQ(joined(8, 40), 10);
  EXPECT_EQ(joined(8, 1000), 10);  // no less than they have in calm
  EXPECT_EQ(joined(1, 1), 50);
  EXPECT_EQ(joined(0, 1), 50);
  EXPECT_EQ(joined(-3, 4), 12);
  EXPECT_EQ(joined(4096, 1), 50);
}

TEST(TunerPlan, ABudgetIsReckonedAnewWhenMembersHaveDoubled) {
  Fleet fleet(8);
  fleet.Join(8);
  fleet.Look();
  EXPECT_EQ(fleet.tuner.plan().cpu_limit_percent, 50);
  fleet.Join(7);
  fleet.Look();
  EXPECT_EQ(fleet.tuner.plan().cpu_limit_percent, 50);
  fleet.Join(1);
  EXPECT_EQ(fleet.Look(), State::kJoined);
  EXPECT_EQ(fleet.tuner.plan().cpu_limit_percent, 25);
  // In calm it is what it is.
  ASSERT_NE(fleet.Until(State::kCalm, kMinute), ~std::uint64_t{0});
  fleet.seen.members *= 4;
  EXPECT_EQ(fleet.Look(), State::kCalm);
  ExpectValues(fleet.tuner.plan(), 1, 20, 10);
}

// --- joined ----------------------------------------------------------------------------------------------------------

TEST(TunerJoined, LastsTenSecondsFromAnyState) {
  Fleet calm, idle, resting, pressed;
  calm.GoCalm();
  ASSERT_TRUE(calm.Stays(State::kCalm, 30 * kSecond));
  idle.GoIdle();
  resting.GoResting();
  pressed.GoPressed();
  ASSERT_TRUE(pressed.Stays(State::kPressed, 30 * kSecond));
  for (Fleet* fleet : {&calm, &idle, &resting, &pressed}) {
    fleet->Join();
    EXPECT_EQ(fleet->Look(), State::kJoined);
    EXPECT_EQ(fleet->tuner.plan().run, 1);
    EXPECT_TRUE(fleet->Stays(State::kJoined, 9 * kSecond));
    EXPECT_EQ(fleet->Look(), fleet == &pressed ? State::kPressed : State::kCalm);
  }
}

TEST(TunerJoined, JoinsWithoutEndDoNotMakeItLast) {
  Fleet fleet;
  fleet.Join();
  fleet.Look();
  std::uint64_t joined = 0;
  // All of them gain something: a third of the time.
  for (int second = 0; second < 600; ++second) {
    fleet.Join();
    fleet.seen.pages_saved += 300;
    joined += fleet.Look() == State::kJoined;
  }
  EXPECT_GE(joined, 195u);
  EXPECT_LE(joined, 205u);
  // None of them does: less and less.
  joined = 0;
  for (int second = 0; second < 3600; ++second) {
    fleet.Join();
    joined += fleet.Look() == State::kJoined;
  }
  EXPECT_LE(joined, 120u);
  EXPECT_GE(joined, 60u);
  // And as before when they do again.
  fleet.seen.pages_saved += 300;
  joined = 0;
  for (int second = 0; second < 1200; ++second) {
    fleet.Join();
    fleet.seen.pages_saved += 300;
    joined += fleet.Look() == State::kJoined;
  }
  EXPECT_GE(joined, 200u);
}

TEST(TunerJoined, WhoJoinsLateInItHasItsTurn) {
  Fleet early, late;
  for (Fleet* fleet : {&early, &late}) {
    fleet->Join();
    ASSERT_EQ(fleet->Look(), State::kJoined);
  }
  ASSERT_TRUE(early.Stays(State::kJoined, 4 * kSecond));
  early.Join();
  ASSERT_EQ(early.Until(State::kCalm, kMinute), 6 * kSecond);
  EXPECT_TRUE(early.Stays(State::kCalm, 55 * kSecond));
  ASSERT_TRUE(late.Stays(State::kJoined, 7 * kSecond));
  late.Join();
  ASSERT_EQ(late.Until(State::kCalm, kMinute), 3 * kSecond);
  EXPECT_EQ(late.Until(State::kJoined, kMinute), 20 * kSecond);
}

TEST(TunerJoined, AJoinWakesAlsoWhoMustWaitForItsBudget) {
  Fleet fleet;
  fleet.GoIdle();
  // Barren ones: the wait becomes longer than the way to idle.
  while (fleet.now < 2 * kHour) {
    fleet.Join();
    fleet.Look();
  }
  ASSERT_NE(fleet.Until(State::kJoined, kHour), ~std::uint64_t{0});
  ASSERT_NE(fleet.Until(State::kIdle, 5 * kMinute), ~std::uint64_t{0});
  fleet.Join();
  EXPECT_EQ(fleet.Look(), State::kCalm);
  const std::uint64_t waited = fleet.Until(State::kJoined, kHour);
  EXPECT_GE(waited, kMinute);
  EXPECT_LE(waited, 8 * kMinute);
}

TEST(TunerJoined, WithoutMembersAllIsForgotten) {
  Fleet fleet;
  fleet.GoPressed();
  fleet.seen = {};
  fleet.seen.joined = 1;
  EXPECT_EQ(fleet.Look(), State::kCalm);
  EXPECT_TRUE(fleet.Stays(State::kCalm, 3 * kHour));  // pressed or not, there is nobody
  fleet.seen.pages_tracked = kTracked;
  fleet.Join();
  EXPECT_EQ(fleet.Look(), State::kJoined);
  // One that comes and goes between two looks.
  Fleet other;
  other.seen.joined = 1;
  EXPECT_TRUE(other.Stays(State::kCalm, kMinute));
  EXPECT_EQ(other.changes, 0);
}

// --- pressed ---------------------------------------------------------------------------------------------------------

TEST(TunerPressed, ByAvailableMemoryWithHysteresis) {
  Fleet fleet;
  fleet.GoCalm();
  fleet.pressure = Memory(20);
  EXPECT_EQ(fleet.Look(), State::kCalm);
  fleet.pressure = Memory(19);
  EXPECT_EQ(fleet.Look(), State::kPressed);
  fleet.pressure = Memory(24);
  for (int i = 0; i < 300; ++i) {
    fleet.seen.pages_saved += kSignificant / 30;
    ASSERT_EQ(fleet.Look(), State::kPressed);
  }
  fleet.pressure = Memory(25);
  EXPECT_EQ(fleet.Look(), State::kCalm);
  fleet.pressure = Memory(20);
  EXPECT_EQ(fleet.Look(), State::kCalm);
}

TEST(TunerPressed, ByPsiWithHysteresis) {
  Fleet fleet;
  fleet.GoCalm();
  fleet.pressure = Memory(80, 10);
  EXPECT_EQ(fleet.Look(), State::kCalm);
  fleet.pressure = Memory(80, 10.5);
  EXPECT_EQ(fleet.Look(), State::kPressed);
  fleet.pressure = Memory(80, 5);
  for (int i = 0; i < 300; ++i) {
    fleet.seen.pages_saved += kSignificant / 30;
    ASSERT_EQ(fleet.Look(), State::kPressed);
  }
  fleet.pressure = Memory(80, 4.9);
  EXPECT_EQ(fleet.Look(), State::kCalm);
}

TEST(TunerPressed, LastsTwoMinutesAtLeast) {
  Fleet fleet;
  fleet.GoPressed();
  fleet.pressure = Memory(80);
  EXPECT_TRUE(fleet.Stays(State::kPressed, 119 * kSecond));
  EXPECT_EQ(fleet.Look(), State::kCalm);
}

TEST(TunerPressed, AtOnceFromIdleAndResting) {
  Fleet idle, resting;
  idle.GoIdle();
  idle.pressure = Memory(10);
  EXPECT_EQ(idle.Look(), State::kPressed);
  resting.GoResting();
  resting.pressure = Memory(60, 30);
  EXPECT_EQ(resting.Look(), State::kPressed);
  EXPECT_EQ(resting.tuner.plan().run, 1);
}

TEST(TunerPressed, WithoutGainItIsGivenUpForTenMinutes) {
  Fleet fleet;
  fleet.GoPressed();
  EXPECT_TRUE(fleet.Stays(State::kPressed, 119 * kSecond));
  EXPECT_EQ(fleet.Look(), State::kCalm);
  // It goes to less still, though memory is short; but never rests.
  EXPECT_EQ(fleet.Until(State::kIdle, 5 * kMinute), kMinute);
  EXPECT_EQ(fleet.Until(State::kPressed, kHour), 9 * kMinute);
  EXPECT_EQ(fleet.Until(State::kCalm, kHour), 2 * kMinute);
  // That memory is short anew does not bring it back either.
  fleet.pressure = Memory(80);
  fleet.Look();
  fleet.pressure = Memory(5, 90);
  EXPECT_EQ(fleet.Look(), State::kCalm);
}

TEST(TunerPressed, GivenUpUntilThereIsAGain) {
  Fleet fleet;
  fleet.GoPressed();
  ASSERT_EQ(fleet.Until(State::kCalm, 3 * kMinute), 2 * kMinute);
  // What only changes is none.
  fleet.seen.cow_breaks += 10 * kSignificant;
  EXPECT_EQ(fleet.Look(), State::kCalm);
  fleet.seen.pages_saved += 2 * kSignificant - 1;
  EXPECT_EQ(fleet.Look(), State::kCalm);
  fleet.seen.pages_saved += 1;
  EXPECT_EQ(fleet.Look(), State::kPressed);
}

TEST(TunerPressed, GivenUpUntilSomebodyJoins) {
  Fleet fleet;
  fleet.GoPressed();
  ASSERT_EQ(fleet.Until(State::kCalm, 3 * kMinute), 2 * kMinute);
  fleet.Join();
  EXPECT_EQ(fleet.Look(), State::kJoined);
  EXPECT_EQ(fleet.Until(State::kPressed, kMinute), 10 * kSecond);
}

TEST(TunerPressed, AGainThatCostsTooMuchIsNone) {
  // A page a millisecond of CPU time is the price.
  const auto stays = [](double ms_a_page) {
    Fleet fleet;
    fleet.GoPressed();
    for (int second = 0; second < 600; ++second) {
      fleet.seen.pages_saved += kSignificant / 20;
      fleet.seen.cpu_ns += static_cast<std::uint64_t>(static_cast<double>(kSignificant / 20) * ms_a_page * 1e6);
      if (fleet.Look() != State::kPressed) return second;
    }
    return 600;
  };
  EXPECT_EQ(stays(0.9), 600);
  EXPECT_EQ(stays(1.1), 119);
}

TEST(TunerPressed, AfterAGainThatCostTooMuchItDoesNotComeBackAtOnce) {
  Fleet fleet;
  fleet.GoPressed();
  for (int second = 0; second < 3600; ++second) {
    fleet.seen.pages_saved += kSignificant / 10;
    fleet.seen.cpu_ns += kSecond * 2;
    fleet.Look();
  }
  EXPECT_LE(fleet.moves, 14);
}

TEST(TunerPressed, WhatIsNotKnownIsNoPressureAndNoPlenty) {
  Fleet fleet;
  fleet.pressure = {};
  fleet.GoIdle();
  EXPECT_TRUE(fleet.Stays(State::kIdle, 3 * kHour));
  fleet.pressure.psi_some_avg10 = 50;
  EXPECT_EQ(fleet.Look(), State::kPressed);
  fleet.pressure.psi_some_avg10 = -1;
  EXPECT_EQ(fleet.Until(State::kCalm, 3 * kMinute), 2 * kMinute);
  // Available, of nothing.
  fleet.pressure = {0, 10 * kGiB, -1};
  EXPECT_NE(fleet.Until(State::kIdle, 10 * kMinute), ~std::uint64_t{0});
  EXPECT_TRUE(fleet.Stays(State::kIdle, kHour));
  fleet.pressure = {1, 0, -1};
  EXPECT_NE(fleet.Look(), State::kResting);
  fleet.pressure = {std::numeric_limits<std::uint64_t>::max(), 0, std::numeric_limits<double>::infinity()};
  EXPECT_EQ(fleet.Look(), State::kPressed);
}

// --- idle ------------------------------------------------------------------------------------------------------------

TEST(TunerIdle, ComesAfterAMinuteOfNothing) {
  Fleet fleet;
  fleet.GoCalm();
  // One page in 256, once a minute, is not nothing.
  for (int minute = 0; minute < 30; ++minute) {
    fleet.seen.pages_saved += kSignificant;
    ASSERT_TRUE(fleet.Stays(State::kCalm, 55 * kSecond));
  }
  // A little less is.
  fleet.seen.pages_saved += kSignificant - 1;
  EXPECT_LE(fleet.Until(State::kIdle, kHour), 2 * kMinute);
  EXPECT_TRUE(fleet.Stays(State::kIdle, 5 * kMinute));
}

TEST(TunerIdle, NotWhilePagesAreWritten) {
  Fleet breaks, written, advised;
  for (Fleet* fleet : {&breaks, &written, &advised}) fleet->GoCalm();
  for (int second = 0; second < 1800; ++second) {
    breaks.seen.cow_breaks += kSignificant / 40;
    written.seen.pages_volatile = second % 20 * kSignificant / 10;
    advised.seen.region_pages += kSignificant / 40;
    ASSERT_EQ(breaks.Look(), State::kCalm);
    ASSERT_EQ(written.Look(), State::kCalm);
    ASSERT_EQ(advised.Look(), State::kCalm);
  }
}

TEST(TunerIdle, WhatIsWrittenAllTheTimeIsNoNews) {
  Fleet fleet;
  fleet.GoCalm();
  // A fifth of all memory, give or take, and a mapping that comes and goes.
  for (int second = 0; second < 1800; ++second) {
    fleet.seen.pages_volatile = kTracked / 5 + second % 7 * kSignificant / 8;
    fleet.seen.region_pages = kTracked + second / 15 % 2 * kTracked / 2;
    const State state = fleet.Look();
    ASSERT_TRUE(second <= 150 || state == State::kIdle || state == State::kResting) << second;
  }
}

TEST(TunerIdle, WhatIsFilledAndDroppedAgainAndAgainIsNoGain) {
  Fleet fleet;
  fleet.GoCalm();
  fleet.changes = 0;
  for (int second = 0; second < 4 * 3600; ++second) {
    fleet.seen.pages_saved = second / 10 % 2 * kTracked / 4;
    fleet.Look();
    ASSERT_LE(fleet.tuner.plan().cpu_limit_percent, 10);
  }
  EXPECT_LE(fleet.changes, 4 * 30);
  // Under pressure it is none either.
  fleet.pressure = Memory(10);
  std::uint64_t pressed = 0;
  for (int second = 0; second < 3600; ++second) {
    fleet.seen.pages_saved = second / 10 % 2 * kTracked / 4;
    pressed += fleet.Look() == State::kPressed;
  }
  EXPECT_LE(pressed, 12u * 60);
}

TEST(TunerIdle, WakesAtOnce) {
  const auto wakes = [](auto&& change) {
    Fleet fleet;
    fleet.seen.pages_saved = kTracked / 2;
    fleet.seen.pages_volatile = kTracked / 10;
    fleet.GoIdle();
    change(fleet.seen);
    return fleet.Look() == State::kCalm;
  };
  using Seen = Tuner::Observation;
  EXPECT_TRUE(wakes([](Seen& seen) { seen.pages_saved += 2 * kSignificant; }));
  EXPECT_TRUE(wakes([](Seen& seen) { seen.cow_breaks += 2 * kSignificant; }));
  EXPECT_TRUE(wakes([](Seen& seen) { seen.pages_volatile += 2 * kSignificant; }));
  EXPECT_TRUE(wakes([](Seen& seen) { seen.region_pages += 2 * kSignificant; }));
  EXPECT_TRUE(wakes([](Seen& seen) { seen.pages_saved -= 2 * kSignificant; }));
  EXPECT_TRUE(wakes([](Seen& seen) { seen.pages_saved += kSignificant, seen.cow_breaks += kSignificant; }));
  // Hysteresis: what would not let it begin does not end it.
  EXPECT_FALSE(wakes([](Seen& seen) { seen.pages_saved += 2 * kSignificant - 1; }));
  EXPECT_FALSE(wakes([](Seen& seen) { seen.cow_breaks += 2 * kSignificant - 1; }));
  EXPECT_FALSE(wakes([](Seen& seen) { seen.pages_volatile -= 2 * kSignificant; }));
  EXPECT_FALSE(wakes([](Seen& seen) { seen.region_pages -= 2 * kSignificant; }));
  EXPECT_FALSE(wakes([](Seen& seen) { seen.cpu_ns += 100 * kSecond; }));
}

TEST(TunerIdle, LittleLossesAddUp) {
  Fleet fleet;
  fleet.seen.pages_saved = kTracked / 2;
  fleet.GoIdle();
  int minutes = 0;
  for (; minutes < 30 && fleet.tuner.plan().state != State::kCalm; ++minutes) {
    fleet.seen.pages_saved -= kSignificant / 4;
    for (int second = 0; second < 60; ++second) fleet.Look();
  }
  EXPECT_EQ(minutes, 8);
}

TEST(TunerIdle, SmallDomainsCountInMegabytes) {
  Fleet fleet;
  fleet.seen.pages_tracked = 1000;
  fleet.GoIdle();
  fleet.seen.cow_breaks += 511;
  EXPECT_EQ(fleet.Look(), State::kIdle);
  fleet.seen.cow_breaks += 1;
  EXPECT_EQ(fleet.Look(), State::kCalm);
}

TEST(TunerIdle, CalmLastsTwiceAsLongWhereIdleDoesNotLast) {
  Fleet fleet;
  fleet.GoIdle();
  std::vector<std::uint64_t> calm;
  for (int i = 0; i < 7; ++i) {
    fleet.Look();
    fleet.seen.cow_breaks += 2 * kSignificant;
    ASSERT_EQ(fleet.Look(), State::kCalm);
    calm.push_back(fleet.Until(State::kIdle, kHour) / kMinute);
  }
  EXPECT_EQ(calm, (std::vector<std::uint64_t>{2, 4, 8, 16, 16, 16, 16}));
  ASSERT_TRUE(fleet.Stays(State::kIdle, 6 * kMinute));
  fleet.seen.cow_breaks += 2 * kSignificant;
  ASSERT_EQ(fleet.Look(), State::kCalm);
  EXPECT_LE(fleet.Until(State::kIdle, kHour), 65 * kSecond);
}

// --- resting ---------------------------------------------------------------------------------------------------------

TEST(TunerResting, ProbesForTenSecondsEveryFiveMinutes) {
  Fleet fleet;
  fleet.GoResting();
  EXPECT_EQ(fleet.tuner.plan().run, 0);
  for (int second = 1; second < 3 * 310; ++second) {
    ASSERT_EQ(fleet.Look(), State::kResting);
    ExpectValues(fleet.tuner.plan(), second % 310 >= 300, 1000, 2);
  }
}

TEST(TunerResting, OnlyWhereMemoryIsPlentiful) {
  Fleet fleet;
  fleet.GoIdle();
  fleet.pressure = Memory(49);
  EXPECT_TRUE(fleet.Stays(State::kIdle, kHour));
  fleet.pressure = Memory(50);
  EXPECT_EQ(fleet.Look(), State::kResting);
  fleet.pressure = Memory(40);
  EXPECT_TRUE(fleet.Stays(State::kResting, 5 * kMinute));
  fleet.pressure = Memory(39);
  EXPECT_EQ(fleet.Look(), State::kIdle);
  EXPECT_EQ(fleet.tuner.plan().run, 1);
  fleet.pressure = Memory(90);
  EXPECT_EQ(fleet.Until(State::kResting, kHour), 10 * kMinute);
}

TEST(TunerResting, WakesOnWhatAProbeShows) {
  Fleet breaks, losses, small;
  for (Fleet* fleet : {&breaks, &losses, &small}) {
    fleet->seen.pages_saved = kTracked / 2;
    fleet->GoResting();
    while (fleet->tuner.plan().run == 0) ASSERT_EQ(fleet->Look(), State::kResting);
  }
  breaks.seen.cow_breaks += 2 * kSignificant;
  EXPECT_EQ(breaks.Look(), State::kCalm);
  losses.seen.pages_saved -= 2 * kSignificant;
  EXPECT_EQ(losses.Look(), State::kCalm);
  small.seen.cow_breaks += kSignificant;
  EXPECT_TRUE(small.Stays(State::kResting, kHour));
}

TEST(TunerResting, WakesOnMemoryThatIsAdvisedWhileNothingIsScanned) {
  Fleet fleet;
  fleet.GoResting();
  fleet.seen.region_pages += 2 * kSignificant;
  EXPECT_EQ(fleet.Look(), State::kCalm);
  EXPECT_EQ(fleet.tuner.plan().run, 1);
}

// --- what must not move it -------------------------------------------------------------------------------------------

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
  fleet.seen.cow_breaks += 2 * kSignificant;
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
