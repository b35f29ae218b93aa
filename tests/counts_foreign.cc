// Counts: memory that another userfaultfd holds, before the advice and after it.

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "counts_case.h"

namespace ksmu::test {
namespace {

int OpenForeignUserfaultfd() {
  int fd = -1;
  if (const int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC); device >= 0) {
    fd = ioctl(device, _IO(0xAA, 0x00), O_CLOEXEC | O_NONBLOCK);
    close(device);
  }
  if (fd < 0) fd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  uffdio_api api = {};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP;
  if (fd >= 0 && ioctl(fd, UFFDIO_API, &api) != 0) {
    close(fd);
    fd = -1;
  }
  return fd;
}

// Pages that another userfaultfd write-protects: never ours, and it goes on getting its faults.
TEST_P(Counts, ForeignUserfaultfd) {
  RunIsolated([this] {
    Prepare();
    constexpr std::size_t kPages = 256;
    Memory memory(kPages);
    FillPages(memory, [](std::size_t) { return 9; });
    const int fd = OpenForeignUserfaultfd();
    ASSERT_GE(fd, 0);
    uffdio_register reg = {};
    reg.range = {reinterpret_cast<std::uintptr_t>(memory.data()), memory.bytes() / 2};
    reg.mode = UFFDIO_REGISTER_MODE_WP;
    ASSERT_EQ(ioctl(fd, UFFDIO_REGISTER, &reg), 0) << strerror(errno);
    uffdio_writeprotect protect = {};
    protect.range = reg.range;
    protect.mode = UFFDIO_WRITEPROTECT_MODE_WP;
    ASSERT_EQ(ioctl(fd, UFFDIO_WRITEPROTECT, &protect), 0) << strerror(errno);

    EXPECT_ERRNO(EBUSY, ksmu_advise(memory.data(), memory.bytes() / 2, KSMU_MERGEABLE | flags()));
    // The free half can be merged: a mixed range succeeds.
    EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags()));
    MergeUntil([](const ksmu_stats& s) { return s.pages_merged == kPages / 2; });
    ksmu_region_stats region;
    ASSERT_OK(ksmu_read_region(memory.data(), &region, sizeof region));
    EXPECT_EQ(region.start, memory.data());
    EXPECT_EQ(region.excluded_bytes, static_cast<std::int64_t>(memory.bytes() / 2));
    EXPECT_EQ(region.excluded_cause, EBUSY);
    EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 9; }));
    EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
    EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 9; }));

    // A write still waits for the other's handler.
    std::atomic<bool> written = false;
    std::thread writer([&] {
      memory.page(3)[0] = 'w';
      written = true;
    });
    pollfd ready = {fd, POLLIN, 0};
    EXPECT_EQ(poll(&ready, 1, 10'000), 1);
    EXPECT_FALSE(written);
    protect.mode = 0;
    EXPECT_EQ(ioctl(fd, UFFDIO_WRITEPROTECT, &protect), 0);
    writer.join();
    EXPECT_EQ(memory.page(3)[0], 'w');
    close(fd);
  });
}

// What it has let go of becomes a region: not what has been unmapped or mapped anew meanwhile, nor what is not wanted any more.
TEST_P(Counts, ForeignUserfaultfdLetsGo) {
  RunIsolated([this] {
    Prepare();
    constexpr std::size_t kPages = 96, kPart = kPages / 6;
    Memory memory(kPages);
    FillPages(memory, [](std::size_t) { return 9; });
    const int fd = OpenForeignUserfaultfd();
    ASSERT_GE(fd, 0);
    uffdio_register reg = {};
    reg.range = {reinterpret_cast<std::uintptr_t>(memory.data()), memory.bytes()};
    reg.mode = UFFDIO_REGISTER_MODE_WP;
    ASSERT_EQ(ioctl(fd, UFFDIO_REGISTER, &reg), 0) << strerror(errno);
    EXPECT_ERRNO(EBUSY, ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags()));
    EXPECT_EQ(Get("regions"), 0);
    const std::size_t part = kPart * PageSize();
    char* at = memory.data();
    ASSERT_EQ(munmap(at + part, part), 0);  // a hole
    ASSERT_NE(mmap(at + 2 * part, part, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0), MAP_FAILED);
    EXPECT_OK(ksmu_advise(at + 3 * part, part, KSMU_UNMERGEABLE));
    // A part of it is let go of first.
    uffdio_range range = {reinterpret_cast<std::uintptr_t>(at), part};
    ASSERT_EQ(ioctl(fd, UFFDIO_UNREGISTER, &range), 0) << strerror(errno);
    EXPECT_TRUE(WaitUntil([&] { return Get("region_bytes") == static_cast<std::int64_t>(part); }, 20)) << Get("region_bytes");
    MergeUntilCounts(1, kPart - 1);
    close(fd);
    EXPECT_TRUE(WaitUntil([&] { return Get("region_bytes") >= static_cast<std::int64_t>(3 * part); }, 20)) << Get("region_bytes");
    MergeUntilCounts(1, 3 * kPart - 1);
    ksmu_region_stats region;
    ASSERT_OK(ksmu_read_region(at + 4 * part, &region, sizeof region));
    EXPECT_EQ(region.excluded_bytes, 0);
    EXPECT_EQ(region.pages_merged, static_cast<std::int64_t>(2 * kPart));
    for (std::size_t i = 0; i < kPages; ++i) {
      if (i / kPart == 1) continue;
      EXPECT_TRUE(PageIs(memory.page(i), i / kPart == 2 ? 0 : 9)) << i;
    }
    // And the other may have it again.
    EXPECT_OK(ksmu_advise(at + 4 * part, 2 * part, KSMU_UNMERGEABLE));
    const int again = OpenForeignUserfaultfd();
    reg.range = {reinterpret_cast<std::uintptr_t>(at + 4 * part), 2 * part};
    EXPECT_EQ(ioctl(again, UFFDIO_REGISTER, &reg), 0) << strerror(errno);
    close(again);
    EXPECT_OK(ksmu_unmap(memory.data(), part));
    EXPECT_OK(ksmu_unmap(at + 2 * part, 4 * part));
    memory.Forget();
  });
}

// While we hold a region the other gets EBUSY, and nothing changes for us.
TEST_P(Counts, ForeignUserfaultfdComesLater) {
  RunIsolated([this] {
    Prepare();
    Memory memory(64);
    FillPages(memory, [](std::size_t) { return 9; });
    Advise(memory);
    MergeUntilCounts(1, 63);
    const int fd = OpenForeignUserfaultfd();
    ASSERT_GE(fd, 0);
    uffdio_register reg = {};
    reg.range = {reinterpret_cast<std::uintptr_t>(memory.data()), memory.bytes()};
    reg.mode = UFFDIO_REGISTER_MODE_WP;
    EXPECT_EQ(ioctl(fd, UFFDIO_REGISTER, &reg), -1);
    EXPECT_EQ(errno, EBUSY);
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
    EXPECT_EQ(ioctl(fd, UFFDIO_REGISTER, &reg), 0) << "unmerged memory is in nobody's hands: " << strerror(errno);
    close(fd);
    EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 9; }));
  });
}

}  // namespace
}  // namespace ksmu::test
