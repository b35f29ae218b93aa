// Requests that hold pages by a reference only: UFFDIO_MOVE takes such pages, and what the request brings would arrive where nobody
// looks any more.
#include <gtest/gtest.h>

#include <memory>

#include "engine/engine.h"
#include "os/fake_system.h"

namespace ksmu::engine {
namespace {

using os::FakeOperation;

class References : public testing::TestWithParam<bool> {
 protected:
  static constexpr std::size_t kPages = 16, kLent = 3;
  static constexpr os::Address kBase = os::FakeSystem::kProgramBase;

  References() {
    fake_.direct_io_refers = GetParam();
    fake_.MapProgram(kBase, kPages * fake_.PageSize());
    thread_ = fake_.AddThread();
    reader_ = fake_.AddThread();
    engine_ = std::make_unique<Engine>(fake_, tunables_, 1);
    fake_.hooks.other_thread = fake_.hooks.yield = [this] { engine_->HandleEvents(); };
  }
  os::Address At(std::size_t page) const { return kBase + page * fake_.PageSize(); }
  void Write(std::size_t page, std::byte value) {
    ASSERT_TRUE(fake_.Run(thread_, {.kind = FakeOperation::kWrite, .address = At(page), .data = {value}}));
  }
  std::byte Read(std::size_t page) {
    EXPECT_TRUE(fake_.Run(reader_, {.kind = FakeOperation::kRead, .address = At(page), .bytes = 1}));
    return fake_.Outcome(reader_).data.at(0);
  }
  void Passes(int count, std::uint64_t apart) {
    while (count > 0) {
      if (!engine_->Step().pass_ended) continue;
      fake_.AdvanceTime(apart);
      --count;
    }
  }
  std::int64_t Zero() const { return engine_->counters().Read().in(PageState::kZero); }

  Tunables tunables_;
  os::FakeSystem fake_;
  os::ThreadId thread_ = 0, reader_ = 0;
  std::unique_ptr<Engine> engine_;
};

constexpr std::uint64_t kSecond = 1'000'000'000;

// What a request takes its time to bring arrives: the page that waits for it is not taken for one that nobody uses.
TEST_P(References, APageThatIsLentIsLeftAlone) {
  ASSERT_EQ(engine_->Start(), 0);
  ASSERT_EQ(engine_->Advise({kBase, kPages * fake_.PageSize()}, true, false, false), 0);
  for (std::size_t i = 0; i < kPages; ++i) Write(i, std::byte{0});
  fake_.Start(thread_, {.kind = FakeOperation::kDirectWrite, .address = At(kLent), .data = {std::byte{7}}});
  ASSERT_TRUE(fake_.Step(thread_));
  ASSERT_TRUE(fake_.Busy(thread_));
  Passes(100, kSecond / 2);
  // Others are, where the kernel tells which are.
  EXPECT_EQ(Zero(), GetParam() ? 0 : static_cast<std::int64_t>(kPages - 1));
  ASSERT_TRUE(fake_.Step(thread_));
  ASSERT_FALSE(fake_.Busy(thread_));
  EXPECT_EQ(Read(kLent), std::byte{7}) << "what was read has arrived nowhere";
  // The time that any request can take.
  Passes(100, kSecond);
  EXPECT_EQ(Zero(), static_cast<std::int64_t>(kPages - 1));
  EXPECT_EQ(Read(kLent), std::byte{7});
  EXPECT_TRUE(fake_.violations().empty());
}

// Nor by ksmu_merge, which does not ask whether pages are still.
TEST_P(References, NorByAMergeAtOnce) {
  ASSERT_EQ(engine_->Start(), 0);
  ASSERT_EQ(engine_->Advise({kBase, kPages * fake_.PageSize()}, true, false, false), 0);
  for (std::size_t i = 0; i < kPages; ++i) Write(i, std::byte{0});
  fake_.Start(thread_, {.kind = FakeOperation::kDirectWrite, .address = At(kLent), .data = {std::byte{7}}});
  ASSERT_TRUE(fake_.Step(thread_));
  EXPECT_GE(engine_->Merge({kBase, kPages * fake_.PageSize()}, [](void*) { return false; }, nullptr), 0);
  EXPECT_EQ(Zero(), GetParam() ? 0 : static_cast<std::int64_t>(kPages - 1));
  ASSERT_TRUE(fake_.Step(thread_));
  EXPECT_EQ(Read(kLent), std::byte{7}) << "what was read has arrived nowhere";
}

INSTANTIATE_TEST_SUITE_P(, References, testing::Bool(), [](const auto& info) { return info.param ? "Referred" : "Pinned"; });

}  // namespace
}  // namespace ksmu::engine
