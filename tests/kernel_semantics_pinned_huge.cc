// A huge page that somebody else has a reference to: no page can be taken out of it. Kernels before 6.18 do not say so, but try
// for ever (os/move_watch.h); on them the test is of what ends that.
#include <fcntl.h>
#include <liburing.h>
#include <sys/uio.h>

#include <cstring>

#include "kernel_semantics_system.h"

namespace ksmu::os {
namespace {

constexpr std::size_t kHugeBytes = 2 << 20;
const std::size_t kHugePages = kHugeBytes / kPage;

class PinnedHugePage : public LinuxSystemTest {
 protected:
  void SetUp() override {
    LinuxSystemTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    huge_ = (memory_.at(0) + kHugeBytes - 1) & ~(kHugeBytes - 1);
    ASSERT_EQ(madvise(Pointer(0), kHugeBytes, MADV_HUGEPAGE), 0);
    for (std::size_t i = 0; i < kHugePages; ++i) *Pointer(i) = i + 1;
    if (!IsHuge()) GTEST_SKIP() << "no transparent huge pages here";
    ASSERT_EQ(system_->Register(kStaging, aside_.all(), kWriteProtect), 0);
  }
  std::uint64_t* Pointer(std::size_t page) const { return reinterpret_cast<std::uint64_t*>(huge_ + page * kPage); }
  bool IsHuge() {
    ScanRequest request;
    request.any_of = kPresent;
    request.returned = kHuge;
    PageRun run{};
    const ScanResult found = pagemap_.Scan({huge_, kHugeBytes}, request, &run, 1);
    return found.error == 0 && found.runs == 1 && (run.categories & kHuge);
  }
  Partial Take(std::size_t page, std::size_t count) { return system_->Move(kStaging, aside_.at(0), huge_ + page * kPage, count * kPage); }

  void ExpectBusy() {
    for (const std::size_t count : {std::size_t{1}, std::size_t{4}, std::size_t{300}}) {
      for (int round = 0; round < 3; ++round) {
        const Partial taken = Take(1, count);
        EXPECT_EQ(taken.error, -EBUSY);
        EXPECT_EQ(taken.done, 0u);
        for (std::size_t i = 0; i < count; ++i) ASSERT_EQ(Look(aside_.at(i)) & kPresent, 0u) << "staging is as it was";
      }
    }
    for (std::size_t i = 0; i < kHugePages; ++i) ASSERT_EQ(*Pointer(i), i + 1);
  }
  void ExpectTaken() {
    Partial taken{-EBUSY, 0};
    EXPECT_TRUE(WaitFor([&] { return (taken = Take(1, 300)).error != -EBUSY; }));
    EXPECT_EQ(taken.error, 0);
    EXPECT_EQ(taken.done, 300 * kPage);
    for (std::size_t i = 0; i < 300; ++i) ASSERT_EQ(*static_cast<std::uint64_t*>(aside_.Pointer(i)), i + 2);
  }

  Memory memory_{2 * kHugePages}, aside_{300};
  Address huge_ = 0;
};

TEST_F(PinnedHugePage, OfARegisteredBufferIsBusy) {
  io_uring ring;
  if (int error = io_uring_queue_init(4, &ring, 0)) GTEST_SKIP() << "no io_uring here: " << std::strerror(-error);
  iovec buffer{Pointer(2), kPage};
  if (int error = io_uring_register_buffers(&ring, &buffer, 1)) {
    io_uring_queue_exit(&ring);
    GTEST_SKIP() << "no buffer can be registered here (RLIMIT_MEMLOCK?): " << std::strerror(-error);
  }
  ExpectBusy();
  EXPECT_EQ(io_uring_unregister_buffers(&ring), 0);
  io_uring_queue_exit(&ring);
  ExpectTaken();
}

TEST_F(PinnedHugePage, SplicedIntoAPipeIsBusy) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  iovec part{Pointer(2), kPage};
  ASSERT_EQ(vmsplice(ends[1], &part, 1, 0), static_cast<ssize_t>(kPage));
  ExpectBusy();
  close(ends[0]);
  close(ends[1]);
  ExpectTaken();
}

// Nothing is disturbed that only takes its time.
TEST_F(PinnedHugePage, OthersAreTakenWhileNobodyHasThem) {
  for (int round = 0; round < 50; ++round) {
    const Partial taken = Take(0, 300);
    ASSERT_EQ(taken.error, 0);
    ASSERT_EQ(taken.done, 300 * kPage);
    ASSERT_EQ(madvise(aside_.Pointer(0), 300 * kPage, MADV_DONTNEED), 0);
    for (std::size_t i = 0; i < 300; ++i) *Pointer(i) = i + 1;
  }
}

}  // namespace
}  // namespace ksmu::os
