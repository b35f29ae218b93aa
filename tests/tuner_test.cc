// The tuner: every move from state to state. Time is what it is told.
#include "broker/tuner.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "tuner_fleet.h"

namespace ksmu::broker {
namespace {

void ExpectValues(const Tuner::Plan& plan, std::int64_t run, std::int64_t pages, std::int64_t sleep, std::int64_t cpu) {
  EXPECT_EQ(plan.run, run) << plan.reason();
  EXPECT_EQ(plan.pages_to_scan, pages) << plan.reason();
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
  ExpectValues(fleet.tuner.plan(), 1, 0, 20, 50);
  ASSERT_NE(fleet.Until(State::kCalm, kMinute), ~std::uint64_t{0});
  check();
  ExpectValues(fleet.tuner.plan(), 1, 0, 20, 10);
  ASSERT_NE(fleet.Until(State::kIdle, kHour), ~std::uint64_t{0});
  check();
  ExpectValues(fleet.tuner.plan(), 1, 1000, 1000, 2);
  ASSERT_NE(fleet.Until(State::kResting, kHour), ~std::uint64_t{0});
  check();
  ExpectValues(fleet.tuner.plan(), 0, 0, 1000, 2);
  fleet.pressure = Memory(10);
  fleet.Look();
  check();
  ExpectValues(fleet.tuner.plan(), 1, 0, 20, 30);
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
  EXPECT_EQ(joined(8, 100), 4);  // less than what they have in calm where there are few
  EXPECT_EQ(joined(8, 1000), 2);
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
  // In calm it is ten at the most, and for so many less.
  ASSERT_NE(fleet.Until(State::kCalm, kMinute), ~std::uint64_t{0});
  fleet.seen.members *= 4;
  EXPECT_EQ(fleet.Look(), State::kCalm);
  ExpectValues(fleet.tuner.plan(), 1, 0, 20, 6);
  fleet.seen.members /= 4;
  fleet.Look();
  ExpectValues(fleet.tuner.plan(), 1, 0, 20, 10);
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

// Idle members read so little that a share of much memory would be more than they can show.
TEST(TunerIdle, LargeMembersWakeByWhatTheyCanRead) {
  const auto wakes_after = [](std::size_t members) {
    Fleet fleet;
    fleet.seen.pages_tracked = 64 * kTracked;
    fleet.Join(members - 1);
    fleet.GoIdle();
    const std::int64_t a_second = fleet.tuner.plan().pages_to_scan * static_cast<std::int64_t>(members);
    for (int second = 1; second <= 60; ++second) {
      fleet.seen.pages_saved += a_second;
      if (fleet.Look() == State::kCalm) return second;
    }
    return 0;
  };
  EXPECT_EQ(wakes_after(1), 30);
  EXPECT_EQ(wakes_after(4), 30);
  // Where there are many a share of all is the less.
  EXPECT_EQ(wakes_after(64), 9);
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
    ExpectValues(fleet.tuner.plan(), second % 310 >= 300, 0, 1000, 2);
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

}  // namespace
}  // namespace ksmu::broker
