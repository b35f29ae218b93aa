// Little of everything: descriptors, file size, address space, memory cgroup, commit limit, rights. The library merges
// less or says no; the program's bytes, its signals and its own calls are as ever.

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>
#include <random>

#include <gmock/gmock.h>

#include "counts_support.h"
#include "test_support.h"

namespace ksmu::test {
namespace {

std::uint64_t OneOfSixteen(std::size_t i) { return 1 + i % 16; }
std::size_t AllBytes() { return SIZE_MAX / PageSize() * PageSize(); }

void Limit(int resource, rlim_t value) {
  rlimit limit;
  ASSERT_EQ(getrlimit(static_cast<__rlimit_resource>(resource), &limit), 0);
  limit.rlim_cur = value;
  ASSERT_EQ(setrlimit(static_cast<__rlimit_resource>(resource), &limit), 0) << strerror(errno);
}

// A call that meets a limit: success, or one of the errors that the header names.
void ExpectDefined(const char* what, std::int64_t result, std::initializer_list<int> errors) {
  const int error = errno;
  if (result >= 0) return;
  for (const int allowed : errors) {
    if (error == allowed) {
      EXPECT_NE(std::string(ksmu_last_error()), "") << what;
      return;
    }
  }
  ADD_FAILURE() << what << ": errno " << error << " (" << strerror(error) << "), " << ksmu_last_error();
}

void ExpectBalanced() {
  ksmu_stats s;
  ASSERT_OK(ksmu_read_stats(&s, sizeof s));
  std::int64_t sum = s.pages_merged + s.ksm_zero_pages + s.pages_unshared + s.pages_volatile;
#define KSMU_ADD(name, counter) sum += s.unmerged_##counter;
  KSMU_FOR_EACH_REASON(KSMU_ADD)
#undef KSMU_ADD
  EXPECT_EQ(s.pages_tracked, sum);
}

// --- descriptors -----------------------------------------------------------------------------------------------------

// Every number of the program's table is in use: the library has a table of its own.
KSMU_ISOLATED_TEST(Limits, DescriptorsExhausted, 60) {
  Set("run", 0);
  Memory memory(512);
  FillPages(memory, OneOfSixteen);
  Limit(RLIMIT_NOFILE, 64);
  while (dup(1) >= 0) {
  }
  ASSERT_EQ(errno, EMFILE);
  const int result = ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE);
  ExpectDefined("advise", result, {EMFILE});
  if (result == 0) {
    EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 512) << ksmu_last_error();
  }
  EXPECT_TRUE(PagesAre(memory, OneOfSixteen));
  for (std::size_t i = 0; i < memory.pages(); i += 3) FillPage(memory.page(i), 99);
  const auto now = [](std::size_t i) { return i % 3 == 0 ? 99 : OneOfSixteen(i); };
  EXPECT_TRUE(PagesAre(memory, now));
  if (result == 0) {
    EXPECT_OK(ksmu_set("run", 2));
  }
  EXPECT_TRUE(PagesAre(memory, now));
}

KSMU_ISOLATED_TEST(Limits, AllMemoryLocked, 60) {
  rlimit lockable;
  ASSERT_EQ(getrlimit(RLIMIT_MEMLOCK, &lockable), 0);
  if (geteuid() != 0 && lockable.rlim_cur != RLIM_INFINITY) GTEST_SKIP() << "RLIMIT_MEMLOCK lets too little be locked";
  if (mlockall(MCL_FUTURE) != 0) GTEST_SKIP() << "mlockall: " << strerror(errno);
  EXPECT_ERRNO(ENOSYS, ksmu_start(nullptr, sizeof(ksmu_options)));
  EXPECT_THAT(ksmu_last_error(), ::testing::HasSubstr("mlockall"));
  ASSERT_EQ(munlockall(), 0);
  EXPECT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
  EXPECT_OK(ksmu_stop());
}

KSMU_ISOLATED_TEST(Limits, NoDescriptorsAtAll, 60) {
  Set("run", 0);
  Memory memory(512);
  FillPages(memory, OneOfSixteen);
  rlimit old;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
  Limit(RLIMIT_NOFILE, 3);
  for (int i = 0; i < 3; ++i) {
    EXPECT_ERRNO(EMFILE, ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
    EXPECT_THAT(ksmu_last_error(), ::testing::HasSubstr("RLIMIT_NOFILE"));
  }
  EXPECT_TRUE(PagesAre(memory, OneOfSixteen));
  // A failed start changes nothing, and may be tried again.
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &old), 0);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 512) << ksmu_last_error();
  // The limit falls while merging goes on: what needs a descriptor more fails or waits, nothing else.
  Limit(RLIMIT_NOFILE, 3);
  Memory second(512);
  FillPages(second, [](std::size_t i) { return 100 + i % 8; });
  ExpectDefined("advise", ksmu_advise(second.data(), second.bytes(), KSMU_MERGEABLE), {EMFILE, ENOMEM});
  ExpectDefined("merge", ksmu_merge(nullptr, AllBytes()), {EMFILE, ENOMEM});
  EXPECT_TRUE(PagesAre(second, [](std::size_t i) { return 100 + i % 8; }));
  EXPECT_OK(ksmu_set("run", 2));
  EXPECT_TRUE(PagesAre(memory, OneOfSixteen));
  EXPECT_OK(ksmu_stop());
  EXPECT_TRUE(PagesAre(memory, OneOfSixteen));
}

// Broken pages are merged again in place after the shorter time, unless a device may be writing to them: by what is open, and as long
// as the longer time after it was seen.
KSMU_ISOLATED_TEST(Limits, MergesAgainSoonOnlyWithoutDirectIo, 90) {
  for (int fd = 0; fd < 256; ++fd) {
    struct stat status;
    if (fstat(fd, &status) == 0 && (S_ISREG(status.st_mode) || S_ISBLK(status.st_mode))) GTEST_SKIP() << "the test was started with an open file";
  }
  Set("cpu_limit_percent", 100);
  Set("sleep_millisecs", 0);
  Set("remerge_quick_seconds", 1);
  constexpr std::size_t kPages = 64;
  Memory memory(kPages);
  FillPages(memory, OneOfSixteen);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  ASSERT_TRUE(WaitUntil([] { return Get("pages_merged") == kPages; }, 20)) << Text(ReadStats());
  const auto rewrite = [&] {
    for (std::size_t i = 0; i < 8; ++i) FillPage(memory.page(i), OneOfSixteen(i));
  };
  rewrite();
  ASSERT_TRUE(WaitUntil([] { return Get("cow_breaks") == 8; }, 20)) << Text(ReadStats());
  EXPECT_TRUE(WaitUntil([] { return Get("pages_merged") == kPages; }, 20)) << Text(ReadStats());
  EXPECT_EQ(Get("pages_remerged"), 8);
  unsigned long queue = 0;  // of AIO
  if (syscall(SYS_io_setup, 1, &queue) != 0) GTEST_SKIP() << "no AIO here: " << strerror(errno);
  rewrite();
  ASSERT_TRUE(WaitUntil([] { return Get("cow_breaks") == 16; }, 20)) << Text(ReadStats());
  SleepSeconds(4);
  EXPECT_EQ(Get("pages_remerged"), 8) << "a device may be writing";
  ASSERT_EQ(syscall(SYS_io_destroy, queue), 0);
  SleepSeconds(4);
  EXPECT_EQ(Get("pages_remerged"), 8) << "what was asked of it may be under way still";
  Set("remerge_seconds", 1);
  EXPECT_TRUE(WaitUntil([] { return Get("pages_remerged") == 16; }, 20)) << Text(ReadStats());
  EXPECT_TRUE(PagesAre(memory, OneOfSixteen));
}

// The program closes every descriptor, over and over, and reuses the numbers.
KSMU_ISOLATED_TEST(Limits, CloseRangeInALoop, 60) {
  Set("cpu_limit_percent", 100);
  Set("sleep_millisecs", 0);
  Set("remerge_seconds", 0);
  Set("run", 1);
  constexpr std::size_t kPages = 4096;
  Memory memory(kPages);
  std::vector<std::uint64_t> shadow(kPages);
  for (std::size_t i = 0; i < kPages; ++i) FillPage(memory.page(i), shadow[i] = i % 40);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  std::atomic<bool> stop = false;
  std::atomic<int> foreign = 0;
  std::thread closer([&] {
    while (!stop) {
      syscall(SYS_close_range, 3, ~0U, 0);
      // The first free number is ours alone: nobody else's ioctl, pwrite or punch may hit it.
      const int fd = memfd_create("the program's", 0);
      if (fd != 3) ++foreign;
      char byte = 'p';
      if (pwrite(fd, &byte, 1, 0) != 1) ++foreign;
      SleepSeconds(0.0002);
      struct stat status;
      if (fstat(fd, &status) != 0 || status.st_size != 1) ++foreign;
      byte = 0;
      if (pread(fd, &byte, 1, 0) != 1 || byte != 'p') ++foreign;
    }
  });
  std::mt19937_64 random(1);
  std::atomic<int> wrong = 0;
  for (const double end = Now() + 5; Now() < end;) {
    const std::size_t i = random() % kPages;
    if (FindWrongByte(memory.page(i), shadow[i]) >= 0) ++wrong;
    if (random() % 8 == 0) {
      ASSERT_EQ(madvise(memory.page(i), PageSize(), MADV_DONTNEED), 0);
      shadow[i] = 0;
    } else if (random() % 4 == 0) {
      FillPage(memory.page(i), shadow[i] = random() % 40);
    } else {
      SleepSeconds(0.0001);
    }
  }
  stop = true;
  closer.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(foreign, 0);
  EXPECT_GT(Get("pages_merged_total"), static_cast<std::int64_t>(kPages));
  EXPECT_TRUE(PagesAre(memory, [&](std::size_t i) { return shadow[i]; }));
  syscall(SYS_close_range, 3, ~0U, 0);
  EXPECT_OK(ksmu_merge(nullptr, AllBytes()));
  EXPECT_OK(ksmu_stop());
  EXPECT_TRUE(PagesAre(memory, [&](std::size_t i) { return shadow[i]; }));
}

// --- file size, address space, data -------------------------------------------------------------------------------

void MergeUnder(int resource, rlim_t value, bool before_start) {
  Set("run", 0);
  constexpr std::size_t kPages = 1024;
  Memory first(kPages), second(kPages);
  FillPages(first, OneOfSixteen);
  FillPages(second, [](std::size_t i) { return 1000 + i / 2; });
  const auto second_seed = [](std::size_t i) { return 1000 + i / 2; };
  struct sigaction action = {};
  action.sa_handler = SIG_DFL;  // SIGXFSZ must not come at all
  sigaction(SIGXFSZ, &action, nullptr);
  rlimit old;
  ASSERT_EQ(getrlimit(static_cast<__rlimit_resource>(resource), &old), 0);
  const std::initializer_list<int> errors = {ENOMEM, EAGAIN, EMFILE};
  if (before_start) Limit(resource, value);
  ExpectDefined("start", ksmu_start(nullptr, sizeof(ksmu_options)), errors);
  ExpectDefined("advise", ksmu_advise(first.data(), first.bytes(), KSMU_MERGEABLE), errors);
  ExpectDefined("merge", ksmu_merge(first.data(), first.bytes()), errors);
  if (!before_start) Limit(resource, value);
  ExpectDefined("advise", ksmu_advise(second.data(), second.bytes(), KSMU_MERGEABLE | KSMU_F_NO_RAW_DISCARDS), errors);
  ExpectDefined("merge", ksmu_merge(nullptr, AllBytes()), errors);
  Set("cpu_limit_percent", 100);
  Set("sleep_millisecs", 0);
  ExpectDefined("run", ksmu_set("run", 1), errors);
  SleepSeconds(0.2);
  ExpectBalanced();
  EXPECT_TRUE(PagesAre(first, OneOfSixteen));
  EXPECT_TRUE(PagesAre(second, second_seed));
  for (std::size_t i = 0; i < kPages; i += 2) {
    FillPage(first.page(i), 5000 + i);
    FillPage(second.page(i), 6000 + i);
  }
  const auto first_now = [](std::size_t i) { return i % 2 == 0 ? 5000 + i : OneOfSixteen(i); };
  const auto second_now = [](std::size_t i) { return i % 2 == 0 ? 6000 + i : 1000 + i / 2; };
  EXPECT_TRUE(PagesAre(first, first_now));
  EXPECT_TRUE(PagesAre(second, second_now));
  ASSERT_EQ(madvise(first.data(), 100 * PageSize(), MADV_DONTNEED), 0);
  const auto first_later = [&](std::size_t i) { return i < 100 ? 0 : first_now(i); };
  EXPECT_TRUE(PagesAre(first, first_later));
  ExpectDefined("unmerge", ksmu_advise(second.data(), second.bytes(), KSMU_UNMERGEABLE), errors);
  ExpectDefined("run 2", ksmu_set("run", 2), errors);
  EXPECT_TRUE(PagesAre(first, first_later));
  EXPECT_TRUE(PagesAre(second, second_now));
  ExpectBalanced();
  // With the limit gone all is possible again.
  ASSERT_EQ(setrlimit(static_cast<__rlimit_resource>(resource), &old), 0);
  ASSERT_OK(ksmu_set("run", 0));
  ASSERT_OK(ksmu_advise(first.data(), first.bytes(), KSMU_MERGEABLE));
  ASSERT_OK(ksmu_advise(second.data(), second.bytes(), KSMU_MERGEABLE));
  // (What run=2 has unmerged lies in place like any broken page: it may take a few passes.)
  Set("remerge_seconds", 0);
  EXPECT_TRUE(WaitUntil([] { return ksmu_merge(nullptr, AllBytes()) >= 0 && Get("pages_merged") > 400; }, 5))
      << Get("pages_merged");
  EXPECT_OK(ksmu_set("run", 2));
  EXPECT_TRUE(PagesAre(first, first_later));
  EXPECT_TRUE(PagesAre(second, second_now));
}

KSMU_ISOLATED_TEST(Limits, FileSizeZeroBefore, 60) { MergeUnder(RLIMIT_FSIZE, 0, true); }
KSMU_ISOLATED_TEST(Limits, FileSizeSmallBefore, 60) { MergeUnder(RLIMIT_FSIZE, 300'000, true); }
KSMU_ISOLATED_TEST(Limits, FileSizeZeroInTheMiddle, 60) { MergeUnder(RLIMIT_FSIZE, 0, false); }
KSMU_ISOLATED_TEST(Limits, FileSizeSmallInTheMiddle, 60) { MergeUnder(RLIMIT_FSIZE, 300'000, false); }

// The pages that the pool has no room for have a reason.
KSMU_ISOLATED_TEST(Limits, FileSizeIsAReason, 60) {
  Set("run", 0);
  Memory memory(512);
  FillPages(memory, OneOfSixteen);
  Limit(RLIMIT_FSIZE, 0);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 0);
  EXPECT_GT(Get("unmerged_pool"), 0);
  ksmu_page_info info;
  ASSERT_OK(ksmu_explain(memory.page(511), &info, sizeof info));
  EXPECT_NE(info.state, KSMU_PAGE_MERGED);
  ExpectBalanced();
}

rlim_t AddressSpaceNow(const char* field, std::int64_t more) {
  return static_cast<rlim_t>((ReadStatusKilobytes(field) + more / 1024) * 1024);
}

TEST(Limits, AddressSpace) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer's shadow takes all address space";
  // None, a little, and some: each stage of a start fails somewhere.
  for (const std::int64_t more : {-(1 << 20), 0, 64 << 10, 1 << 20, 8 << 20, 64 << 20}) {
    for (const bool before : {true, false}) {
      SCOPED_TRACE("VmSize + " + std::to_string(more) + (before ? ", before the start" : ", in the middle"));
      RunIsolated([=] { MergeUnder(RLIMIT_AS, AddressSpaceNow("VmSize", more + (16 << 20)), before); }, 60);
      RunIsolated([=] { MergeUnder(RLIMIT_AS, AddressSpaceNow("VmSize", more), before); }, 60);
    }
  }
}

TEST(Limits, DataSegment) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer's shadow takes all address space";
  for (const std::int64_t more : {0, 64 << 10, 1 << 20, 17 << 20, 24 << 20, 80 << 20}) {
    for (const bool before : {true, false}) {
      SCOPED_TRACE("VmData + " + std::to_string(more) + (before ? ", before the start" : ", in the middle"));
      RunIsolated([=] { MergeUnder(RLIMIT_DATA, AddressSpaceNow("VmData", more), before); }, 60);
    }
  }
}

// --- the commit limit -----------------------------------------------------------------------------------------------

TEST(Limits, OvercommitNever) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer's shadow does not fit into the commit limit";
  Sysctl overcommit("/proc/sys/vm/overcommit_memory", "2");
  if (!overcommit.set()) GTEST_SKIP() << "vm.overcommit_memory cannot be set here";
  RunIsolated(
      [] {
        Set("run", 0);
        constexpr std::size_t kPages = 4096;
        for (const int flags : {0, static_cast<int>(KSMU_F_NO_RAW_DISCARDS), static_cast<int>(KSMU_F_SYNC_BREAK)}) {
          Memory memory(kPages);
          FillPages(memory, OneOfSixteen);
          ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
          ASSERT_OK(ksmu_merge(nullptr, AllBytes()));
          EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(kPages));
          EXPECT_TRUE(PagesAre(memory, OneOfSixteen));
          for (std::size_t i = 0; i < kPages; i += 2) FillPage(memory.page(i), 100 + i);
          EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return i % 2 == 0 ? 100 + i : OneOfSixteen(i); }));
          ASSERT_OK(ksmu_set("run", 2));
          ASSERT_OK(ksmu_set("run", 0));
          EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return i % 2 == 0 ? 100 + i : OneOfSixteen(i); }));
        }
        // What merging commits is small beside the region: the program's own memory has to go on fitting.
        EXPECT_OK(ksmu_stop());
      },
      60);
}

// --- memory cgroup -----------------------------------------------------------------------------------------------

class MemoryGroup {
 public:
  MemoryGroup() {
    for (const char* root : {"/sys/fs/cgroup/memory", "/sys/fs/cgroup"}) {
      const std::string path = std::string(root) + "/ksmu-test-" + std::to_string(getpid());
      if (mkdir(path.c_str(), 0755) != 0) continue;
      path_ = path;
      v1_ = access((path_ + "/memory.limit_in_bytes").c_str(), W_OK) == 0;
      if (v1_ || access((path_ + "/memory.max").c_str(), W_OK) == 0) return;
      rmdir(path_.c_str());
      path_.clear();
    }
  }
  ~MemoryGroup() {
    if (!path_.empty()) WaitUntil([&] { return rmdir(path_.c_str()) == 0; }, 10);
  }
  bool usable() const { return !path_.empty(); }
  bool Enter() const { return WriteFile(path_ + "/cgroup.procs", std::to_string(getpid())); }
  // Memory, and no swap beside it.
  bool SetLimit(std::size_t bytes) const {
    const std::string text = std::to_string(bytes);
    if (!v1_) {
      WriteFile(path_ + "/memory.swap.max", "0");
      return WriteFile(path_ + "/memory.max", text);
    }
    // The limit with swap is never the lower one: raising begins with it, lowering ends with it.
    WriteFile(path_ + "/memory.memsw.limit_in_bytes", text);
    const bool set = WriteFile(path_ + "/memory.limit_in_bytes", text);
    WriteFile(path_ + "/memory.memsw.limit_in_bytes", text);
    return set;
  }

 private:
  std::string path_;
  bool v1_ = false;
};

// The region nearly fills its cgroup. Merging makes room; it never needs so much first that somebody has to die.
TEST(Limits, MemoryGroupNearlyFull) {
  MemoryGroup group;
  if (!group.usable()) GTEST_SKIP() << "no memory cgroup can be made here";
  RunIsolated(
      [&] {
        ASSERT_TRUE(group.Enter());
        const std::size_t pages = (64 << 20) / PageSize();
        ASSERT_TRUE(group.SetLimit((64 << 20) + (kSanitized ? 60 << 20 : 10 << 20)));
        Memory memory(pages);
        Set("run", 0);
        // Each content twice: as many frames as savings.
        const auto seed = [&](std::size_t i) { return 1 + i % (pages / 2); };
        FillPages(memory, seed);
        ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
        ASSERT_OK(ksmu_merge(nullptr, AllBytes()));
        EXPECT_GT(Get("pages_merged"), static_cast<std::int64_t>(pages / 4));
        ExpectBalanced();
        EXPECT_TRUE(PagesAre(memory, seed));
      },
      120);
}

// Merged memory that does not fit unmerged: ENOMEM, and no OOM killer.
TEST(Limits, MemoryGroupTooSmallToUnmerge) {
  MemoryGroup group;
  if (!group.usable()) GTEST_SKIP() << "no memory cgroup can be made here";
  RunIsolated(
      [&] {
        ASSERT_TRUE(group.Enter());
        const std::size_t limit = (64 << 20) + (kSanitized ? 60 << 20 : 0);
        ASSERT_TRUE(group.SetLimit(limit));
        static std::atomic<int> told = 0;
        ksmu_options options = {};
        options.log = [](int level, const char* message, void*) {
          told += level == KSMU_LOG_WARNING && std::string_view(message).starts_with("unmerging was refused");
        };
        ASSERT_OK(ksmu_start(&options, sizeof options));
        Set("run", 0);
        Set("max_page_sharing", 1'000'000);
        const std::size_t pages = limit * 3 / PageSize();
        const std::size_t piece = (8 << 20) / PageSize();
        Memory memory(pages);
        ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | KSMU_F_NO_RAW_DISCARDS));
        const auto seed = [&](std::size_t i) { return 1 + i % 512; };  // runs of 512 equal pages
        for (std::size_t at = 0; at < pages; at += piece) {
          const std::size_t end = std::min(pages, at + piece);
          for (std::size_t i = at; i < end; ++i) FillPage(memory.page(i), seed(i));
          ASSERT_OK(ksmu_merge(memory.page(at), (end - at) * PageSize()));
        }
        EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(pages));
        EXPECT_GT(Get("unmerge_bytes"), static_cast<std::int64_t>(limit));
        EXPECT_ERRNO(ENOMEM, ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
        EXPECT_NE(std::string(ksmu_last_error()), "");
        EXPECT_TRUE(PagesAre(memory, seed));
        EXPECT_ERRNO(ENOMEM, ksmu_set("run", 2));
        EXPECT_EQ(Get("run"), 2);
        EXPECT_ERRNO(ENOMEM, ksmu_stop());
        EXPECT_TRUE(WaitUntil([] { return told > 0; }, 20));
        EXPECT_EQ(told, 1) << "three refusals within a minute";
        EXPECT_TRUE(PagesAre(memory, seed));
        ExpectBalanced();
        // Room again: it works.
        ASSERT_OK(ksmu_advise(memory.data(), memory.bytes() / 3 * 2 / PageSize() * PageSize(), KSMU_DISCARD));
        ASSERT_TRUE(group.SetLimit(limit * 3));
        EXPECT_OK(ksmu_stop());
        const std::size_t discarded = memory.bytes() / 3 * 2 / PageSize();
        // Reading what was discarded takes memory where the kernel has no zero page.
        if (!KernelHasZeroPage()) {
          ASSERT_TRUE(group.SetLimit(limit * 6));
        }
        EXPECT_TRUE(PagesAre(memory, [&](std::size_t i) { return i < discarded ? 0 : seed(i); }));
      },
      120);
}

// --- rights --------------------------------------------------------------------------------------------------------

constexpr unsigned kNobody = 65534;

// Becomes nobody, in a way that leaves /proc/self readable.
::testing::AssertionResult BecomeNobody(bool keep_proc) {
  if (setgroups(0, nullptr) != 0 || setresgid(kNobody, kNobody, kNobody) != 0 ||
      setresuid(kNobody, kNobody, kNobody) != 0) {
    return ::testing::AssertionFailure() << strerror(errno);
  }
  if (keep_proc && prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) != 0) return ::testing::AssertionFailure() << strerror(errno);
  return ::testing::AssertionSuccess();
}

std::string WhyNotUnprivileged() {
  if (geteuid() != 0) return "not root: cannot become somebody else";
  if (ReadFile("/proc/sys/vm/unprivileged_userfaultfd").substr(0, 1) != "0")
    return "vm.unprivileged_userfaultfd is not 0";
  struct stat status;
  if (stat("/dev/userfaultfd", &status) == 0 && (status.st_mode & 0006) != 0) return "/dev/userfaultfd is everybody's";
  return "";
}

TEST(Rights, NobodyIsRefusedWithAnExplanation) {
  if (const std::string why = WhyNotUnprivileged(); !why.empty()) GTEST_SKIP() << why;
  RunIsolated(
      [] {
        Memory memory(64);
        FillPages(memory, OneOfSixteen);
        ASSERT_TRUE(BecomeNobody(true));
        EXPECT_ERRNO(EPERM, ksmu_start(nullptr, sizeof(ksmu_options)));
        const std::string message = ksmu_last_error();
        printf("%s\n", message.c_str());
        EXPECT_TRUE(message.find("/dev/userfaultfd") != std::string::npos ||
                    message.find("vm.unprivileged_userfaultfd") != std::string::npos)
            << "says which command mends it: " << message;
        EXPECT_ERRNO(EPERM, ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
        EXPECT_ERRNO(EPERM, ksmu_merge(memory.data(), memory.bytes()));
        EXPECT_ERRNO(EPERM, ksmu_map(PageSize(), 0) == MAP_FAILED ? -1 : 0);
        EXPECT_ERRNO(EINVAL, ksmu_stop());
        EXPECT_TRUE(PagesAre(memory, OneOfSixteen));
      },
      30);
}

void MergeAsUserModeOnly() {
  Set("run", 0);
  const auto seed = [](std::size_t i) { return i % 16; };
  for (const int flags : {0, static_cast<int>(KSMU_F_NO_RAW_DISCARDS), static_cast<int>(KSMU_F_SYNC_BREAK)}) {
    SCOPED_TRACE(flags);
    Memory memory(512);
    FillPages(memory, seed);
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
    EXPECT_OK(ksmu_merge(nullptr, AllBytes()));
    EXPECT_EQ(Get("pages_merged"), 512 - 32);
    EXPECT_EQ(Get("ksm_zero_pages"), 32);
    EXPECT_TRUE(PagesAre(memory, seed));
    for (std::size_t i = 0; i < 512; i += 3) FillPage(memory.page(i), 700 + i);
    EXPECT_TRUE(PagesAre(memory, [&](std::size_t i) { return i % 3 == 0 ? 700 + i : seed(i); }));
    if (flags != KSMU_F_NO_RAW_DISCARDS) {
      ASSERT_EQ(madvise(memory.data(), memory.bytes() / 2, MADV_DONTNEED), 0);
      EXPECT_TRUE(PagesAre(memory, [&](std::size_t i) { return i < 256 ? 0 : i % 3 == 0 ? 700 + i : seed(i); }));
    }
    Child child(Child::Kind::kFork, [&](Child& self) {
      if (FindWrongByte(memory.page(511), seed(511)) >= 0) self.Report("the child's page is wrong");
      FillPage(memory.page(511), 1);
    });
    child.Join();
    EXPECT_OK(ksmu_set("run", 2));
    EXPECT_OK(ksmu_set("run", 0));
    EXPECT_TRUE(PageIs(memory.page(511), seed(511)));
  }
}

TEST(Rights, NobodyMayOptIntoUserModeOnly) {
  if (const std::string why = WhyNotUnprivileged(); !why.empty()) GTEST_SKIP() << why;
  RunIsolated(
      [] {
        ASSERT_TRUE(BecomeNobody(true));
        ksmu_options options = {};
        options.flags = KSMU_START_USER_MODE_ONLY;
        ASSERT_OK(ksmu_start(&options, sizeof options));
        MergeAsUserModeOnly();
      },
      60);
}

// A process that gave up its rights is not dumpable, and its /proc/self is root's.
TEST(Rights, NobodyWithoutProcSelf) {
  if (const std::string why = WhyNotUnprivileged(); !why.empty()) GTEST_SKIP() << why;
  RunIsolated(
      [] {
        Memory memory(64);
        FillPages(memory, OneOfSixteen);
        ASSERT_TRUE(BecomeNobody(false));
        ksmu_options options = {};
        options.flags = KSMU_START_USER_MODE_ONLY;
        if (ksmu_start(&options, sizeof options) != 0) {
          EXPECT_TRUE(errno == EPERM || errno == EACCES) << errno;
          EXPECT_NE(std::string(ksmu_last_error()), "");
          printf("%s\n", ksmu_last_error());
        } else {
          EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
          EXPECT_OK(ksmu_merge(nullptr, AllBytes()));
        }
        EXPECT_TRUE(PagesAre(memory, OneOfSixteen));
      },
      30);
}

// A daemon that starts as root and gives up its rights: merging goes on, and setuid does not wait for our threads.
TEST(Rights, RightsGivenUpAfterTheStart) {
  if (geteuid() != 0) GTEST_SKIP() << "not root: nothing to give up";
  RunIsolated(
      [] {
        Set("cpu_limit_percent", 100);
        Set("sleep_millisecs", 0);
        Memory memory(1024);
        FillPages(memory, OneOfSixteen);
        ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
        const double before = Now();
        ASSERT_TRUE(BecomeNobody(false));
        EXPECT_LT(Now() - before, 2);
        Set("run", 0);
        EXPECT_OK(ksmu_merge(nullptr, AllBytes()));
        EXPECT_EQ(Get("pages_merged"), 1024);
        Memory second(1024);
        FillPages(second, OneOfSixteen);
        EXPECT_OK(ksmu_advise(second.data(), second.bytes(), KSMU_MERGEABLE));
        EXPECT_OK(ksmu_merge(nullptr, AllBytes()));
        EXPECT_EQ(Get("pages_merged"), 2048);
        ASSERT_EQ(madvise(memory.data(), memory.bytes() / 2, MADV_DONTNEED), 0);
        EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return i < 512 ? 0 : OneOfSixteen(i); }));
        EXPECT_OK(ksmu_set("run", 2));
        EXPECT_OK(ksmu_stop());
        EXPECT_TRUE(PagesAre(second, OneOfSixteen));
      },
      60);
}

}  // namespace
}  // namespace ksmu::test
