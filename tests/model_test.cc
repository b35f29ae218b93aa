// Random runs of the engine over the simulated system, with program threads, failures and the event thread put in
// between any two calls, against a shadow copy of the program's memory.
//
//   model_test --seed=N [--verbose]      one run
//   model_test --seeds=N [--from=M]      many
//   ... --shared                         with a domain beside it: the broker, and another member
//   ... --nodes                          on two NUMA nodes that are kept apart
//   model_test --seeds=N --refused=CALL  with a call that always fails
//   model_test --trace=FILE [--verbose]  a run that was written down
//   model_test --minimise=N              makes a failing seed smaller and prints it
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>

#include "model_minimise.h"
#include "model_trace.h"
#include "model_world.h"

namespace ksmu::model {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kFibers = false;
#else
constexpr bool kFibers = true;
#endif

Result RunSeed(std::uint64_t seed, const os::FakeLies& lies = {}, bool verbose = false) {
  return World::Run(Generate(seed), false, lies, verbose);
}

// With a call that is always refused, as by a seccomp filter.
Result RunRefused(std::uint64_t seed, const std::string& call) {
  Trace trace = Generate(seed);
  trace.config.refused = call;
  trace.config.refused_from = seed % 2 == 0 ? 0 : static_cast<int>(trace.ops.size() / 2);
  trace.config.by_node = call == "QueryNodes" || call == "BindFile";  // nobody else calls these
  if (call == "Continue") trace.config.forks = false;  // a child's frame that was swapped out is mapped by nothing else
  if (call == "Copy") trace.config.forks = false;  // nothing else gives a child what was out of its place when it was forked
  trace.config.fail_percent = 0;
  for (Op& op : trace.ops) {
    // Nothing else than clearing the protection ends a synchronous break.
    if (call == "WriteUnprotect" && op.kind == OpKind::kAdvise) op.c &= ~2;
  }
  return World::Run(trace, false);
}

// What kind of failure it is: the message without its numbers.
std::string Kind(const Result& result) {
  if (!result.failed) return "";
  std::string kind = result.message.substr(result.message.find(':') + 1);
  std::erase_if(kind, [](char c) { return c >= '0' && c <= '9'; });
  const auto colon = kind.find_first_of(":,");
  return colon == std::string::npos ? kind : kind.substr(0, colon);
}

// The recorded form of a failing seed, made smaller.
Trace Smaller(std::uint64_t seed, const os::FakeLies& lies, int budget) {
  Trace trace = Generate(seed);
  const Result first = World::Run(trace, false, lies);
  trace.actions = first.actions;
  const auto fails = [&](const Trace& t) {
    const Result r = World::Run(t, true, lies);
    return r.failed && Kind(r) == Kind(first);
  };
  if (!fails(trace)) {
    std::printf("model: the recorded run of seed %llu does not fail\n", static_cast<unsigned long long>(seed));
    return trace;
  }
  return Minimise(trace, fails, budget);
}

std::string Report(std::uint64_t seed, const Result& result) {
  std::string text = "seed " + std::to_string(seed) + ": " + result.message + "\n";
  const Trace small = Smaller(seed, {}, 1500);
  text += "made smaller (replay: model_test --trace=FILE), " + World::Run(small, true).message + "\n" + small.Text();
  return text;
}

int Long() {
  const char* value = std::getenv("KSMU_TEST_LONG");
  return value != nullptr && std::strcmp(value, "1") == 0 ? 20 : 1;
}

// Many runs, one after the other. A model in which nothing happens proves nothing: `least` a thousand.
void RunMany(int per_run, std::uint64_t from, const Tally& least) {
  const auto start = std::chrono::steady_clock::now();
  Tally tally;
  int failures = 0;
#if defined(__SANITIZE_ADDRESS__)
  per_run /= 2;  // the first of the same: what a sanitizer sees, it sees in these
#endif
  const auto seeds = static_cast<std::uint64_t>(per_run * Long());
  for (std::uint64_t seed = from + 1; seed <= from + seeds && failures < 3; ++seed) {
    const Result result = RunSeed(seed);
    tally.Add(result.tally);
    if (!result.failed) continue;
    ++failures;
    ADD_FAILURE() << Report(seed, result);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf(
      "%llu runs in %.1f s: %lld calls, %lld actions put in, %lld of them failures, %lld forks;\n"
      "  %lld gates, %lld pages merged, %lld zero, %lld breaks, %lld merged again in place, %lld detached, "
      "%lld discards, %lld gates undone\n",
      static_cast<unsigned long long>(seeds), seconds, static_cast<long long>(tally.calls),
      static_cast<long long>(tally.actions), static_cast<long long>(tally.failures),
      static_cast<long long>(tally.forks), static_cast<long long>(tally.gates), static_cast<long long>(tally.merged),
      static_cast<long long>(tally.zero), static_cast<long long>(tally.breaks), static_cast<long long>(tally.remerged),
      static_cast<long long>(tally.detached), static_cast<long long>(tally.discards),
      static_cast<long long>(tally.undone));
  if (failures != 0) return;
  const auto at_least = [&](std::int64_t Tally::* what, const char* name) { EXPECT_GT(tally.*what, least.*what * per_run / 1000) << name; };
  at_least(&Tally::merged, "merged");
  at_least(&Tally::breaks, "breaks");
  at_least(&Tally::zero, "zero");
  at_least(&Tally::remerged, "remerged");
  at_least(&Tally::detached, "detached");
  at_least(&Tally::discards, "discards");
  at_least(&Tally::failures, "failures");
}

TEST(Model, RandomRuns) {
  if (!kFibers) GTEST_SKIP() << "one thread, in fibers that the thread sanitizer does not follow";
  RunMany(4000, 0, {.merged = 1250, .zero = 125, .breaks = 250, .remerged = 25, .detached = 25, .discards = 125, .failures = 250});
}

// The same with a domain: frames come from it, another member publishes and gives up, it dies and comes again.
TEST(Model, RunsInADomain) {
  if (!kFibers) GTEST_SKIP() << "one thread, in fibers that the thread sanitizer does not follow";
  RunMany(2000, kSharedSeeds, {.merged = 1250, .zero = 125, .breaks = 250, .remerged = 25, .detached = 25, .discards = 125, .failures = 250});
}

// On two NUMA nodes: alone, where nothing is merged across them; and in a domain that does merge across, which comes and goes.
TEST(Model, RunsOnTwoNodes) {
  if (!kFibers) GTEST_SKIP() << "one thread, in fibers that the thread sanitizer does not follow";
  RunMany(1500, kNodeSeeds, {.merged = 600, .zero = 125, .breaks = 100, .remerged = 10, .detached = 25, .discards = 125, .failures = 250});
  RunMany(500, kNodeSeeds | kSharedSeeds, {.merged = 600, .zero = 125, .breaks = 100, .remerged = 10, .detached = 10, .discards = 125, .failures = 250});
}

// A call that the system refuses for good may cost savings; never a byte, and never a thread that waits for ever. (Wake
// is not among them: nothing else does what it does.)
TEST(Model, RefusedCalls) {
  if (!kFibers) GTEST_SKIP() << "one thread, in fibers that the thread sanitizer does not follow";
  for (const char* call :
       {"Register",      "Unregister",      "WriteProtect", "WriteUnprotect", "Continue",    "Move",
        "Copy",          "ZeroPage",        "Scan",         "ReadSharing",    "ReadProgram", "Discard",
        "PopulateWrite", "ApplyAttributes", "QueryMapping", "ReadAttributes", "MapFrames",   "MapAnonymous", "MapApart",
        "MoveMapping",   "TakePages",       "Unmap",        "Protect",        "CreateFile",  "WriteFile",
        "PunchFile",     "MapFile",         "QueryNodes",   "BindFile"}) {
    int failures = 0;
    for (std::uint64_t seed = 1; seed <= static_cast<std::uint64_t>(40 * Long()) && failures < 2; ++seed) {
      const Result result = RunRefused(seed, call);
      if (!result.failed) continue;
      ++failures;
      ADD_FAILURE() << call << " refused: model_test --seeds=1 --from=" << seed << " --refused=" << call << ": "
                    << result.message;
    }
  }
}

// Failing runs that were made smaller and kept. Each file says what was wrong.
TEST(Model, Regressions) {
  if (!kFibers) GTEST_SKIP() << "one thread, in fibers that the thread sanitizer does not follow";
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(KSMU_SOURCE_DIR "/tests/regressions")) {
    if (entry.path().extension() != ".trace") continue;
    ++count;
    std::ifstream in(entry.path());
    std::stringstream text;
    text << in.rdbuf();
    Trace trace;
    std::string error;
    ASSERT_TRUE(Trace::Parse(text.str(), &trace, &error)) << entry.path() << ": " << error;
    const Result result = World::Run(trace, true);
    EXPECT_FALSE(result.failed) << entry.path().filename() << ": " << result.message;
  }
  EXPECT_GE(count, 16);
}

// A system that does something wrong is a library that does: whatever the library relies on, the model must notice when
// it is not so. (Three lies change nothing that random runs see, and so are not in the list: UFFDIO_MOVE taking pages
// that a child shares; UFFDIO_CONTINUE leaving out the protection: a break that is not announced is found by the next
// sweep; and pages that never count as written: that is a hint everywhere but for pins taken in the last moment, which
// race_test has.)
struct Lie {
  const char* name;
  bool os::FakeLies::*flag;
};
class ModelNotices : public testing::TestWithParam<Lie> {};

TEST_P(ModelNotices, AnUntrueSystem) {
  if (!kFibers) GTEST_SKIP() << "one thread, in fibers that the thread sanitizer does not follow";
  os::FakeLies lies;
  lies.*GetParam().flag = true;
  constexpr std::uint64_t kSeeds = 3000;
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const Result result = RunSeed(seed, lies);
    if (!result.failed || RunSeed(seed).failed) continue;
    std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed), result.message.c_str());
    return;
  }
  FAIL() << "nothing seemed wrong in " << kSeeds << " runs";
}

INSTANTIATE_TEST_SUITE_P(, ModelNotices,
                         testing::Values(Lie{"WakeWakesNobody", &os::FakeLies::wake_wakes_nobody},
                                         Lie{"MoveIgnoresPins", &os::FakeLies::move_ignores_pins},
                                         Lie{"DiscardRaisesNoEvent", &os::FakeLies::discard_raises_no_event},
                                         Lie{"MoveMappingLosesRegistration",
                                             &os::FakeLies::move_mapping_loses_registration},
                                         Lie{"SharingIsExclusive", &os::FakeLies::sharing_is_exclusive},
                                         Lie{"ZeroPageShowsFrame", &os::FakeLies::zero_page_shows_frame},
                                         Lie{"MoveTakesACopy", &os::FakeLies::move_takes_a_copy},
                                         Lie{"EventsNeverPending", &os::FakeLies::events_never_pending},
                                         Lie{"PinsAreNeverHeld", &os::FakeLies::pins_are_never_held}),
                         [](const testing::TestParamInfo<Lie>& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace ksmu::model

int main(int argc, char** argv) {
  using namespace ksmu::model;
  testing::InitGoogleTest(&argc, argv);
  std::uint64_t seed = 0, seeds = 0, from = 1, minimise = 0;
  std::string file;
  std::string refused;
  bool verbose = false;
  std::uint64_t shared = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    auto number = [&] { return std::strtoull(a.c_str() + a.find('=') + 1, nullptr, 10); };
    if (a.rfind("--seed=", 0) == 0) seed = number();
    if (a.rfind("--seeds=", 0) == 0) seeds = number();
    if (a.rfind("--from=", 0) == 0) from = number();
    if (a.rfind("--minimise=", 0) == 0) minimise = number();
    if (a.rfind("--trace=", 0) == 0) file = a.substr(8);
    if (a.rfind("--refused=", 0) == 0) refused = a.substr(10);
    if (a == "--shared") shared |= kSharedSeeds;
    if (a == "--nodes") shared |= kNodeSeeds;
    if (a == "--verbose") verbose = true;
  }
  seed += seed ? shared : 0;
  minimise += minimise ? shared : 0;
  from += shared;
  if (minimise != 0) {
    const Trace small = Smaller(minimise, {}, 4000);
    std::printf("# %s\n%s", World::Run(small, true).message.c_str(), small.Text().c_str());
    return 0;
  }
  if (!file.empty()) {
    std::ifstream in(file);
    std::stringstream text;
    text << in.rdbuf();
    Trace trace;
    std::string error;
    if (!Trace::Parse(text.str(), &trace, &error)) {
      std::printf("%s\n", error.c_str());
      return 2;
    }
    const Result result = World::Run(trace, true, {}, verbose);
    std::printf("%s\n", result.failed ? result.message.c_str() : "passes");
    return result.failed ? 1 : 0;
  }
  if (seed != 0) {
    const Result result = RunSeed(seed, {}, verbose);
    std::printf("%s\n", result.failed ? result.message.c_str() : "passes");
    return result.failed ? 1 : 0;
  }
  if (seeds != 0) {
    int failed = 0;
    Tally tally;
    for (std::uint64_t s = from; s < from + seeds; ++s) {
      const Result result = refused.empty() ? RunSeed(s) : RunRefused(s, refused);
      tally.Add(result.tally);
      if (!result.failed) continue;
      ++failed;
      std::printf("seed %llu: %s\n", static_cast<unsigned long long>(s), result.message.c_str());
    }
    std::printf("%d of %llu fail; merged %lld breaks %lld remerged %lld detached %lld discards %lld undone %lld\n",
                failed, static_cast<unsigned long long>(seeds), static_cast<long long>(tally.merged),
                static_cast<long long>(tally.breaks), static_cast<long long>(tally.remerged),
                static_cast<long long>(tally.detached), static_cast<long long>(tally.discards),
                static_cast<long long>(tally.undone));
    return failed != 0;
  }
  return RUN_ALL_TESTS();
}
