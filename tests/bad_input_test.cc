// Bad input and bad manners: the errno table of the interface, advice in every shape, memory that vanishes without a
// word. The result is always a defined one: never a crash, a hang or a changed byte.

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <string>

#include <gmock/gmock.h>

#include "test_support.h"

namespace ksmu::test {
namespace {

ksmu_region_stats RegionAt(const void* address) {
  ksmu_region_stats region = {};
  EXPECT_OK(ksmu_read_region(address, &region, sizeof region));
  return region;
}

std::uint64_t Seven(std::size_t) { return 7; }

void MergeAll() { EXPECT_OK(ksmu_merge(nullptr, SIZE_MAX / PageSize() * PageSize())); }

// --- the errno table ------------------------------------------------------------------------------------------------

KSMU_ISOLATED_TEST(BadInput, EinvalOfAdvise, 30) {
  Memory memory(8);
  const std::size_t page = PageSize();
  FillPages(memory, Seven);
  EXPECT_ERRNO(EINVAL, ksmu_advise(memory.data() + 1, page, KSMU_MERGEABLE));
  EXPECT_ERRNO(EINVAL, ksmu_advise(memory.data() + page / 2, page, KSMU_UNMERGEABLE));
  EXPECT_ERRNO(EINVAL, ksmu_advise(memory.data() + 8, 0, KSMU_MERGEABLE));
  for (const int advice :
       {-1, 0, 1, 3, 5, 8, 11, 14, 15, 21, 0x1001, 0x2000, 0x10000, 0x30000, 0x40000 | 12, 0x1000 | 12, 1 << 30}) {
    EXPECT_ERRNO(EINVAL, ksmu_advise(memory.data(), memory.bytes(), advice)) << "advice " << advice;
    EXPECT_ERRNO(EINVAL, ksmu_advise(memory.data(), 0, advice)) << "advice " << advice;
  }
  for (const int advice : {KSMU_DISCARD, KSMU_UNMERGEABLE, KSMU_RELEASE}) {
    for (const int flag : {KSMU_F_NO_RAW_DISCARDS, KSMU_F_SYNC_BREAK}) {
      EXPECT_ERRNO(EINVAL, ksmu_advise(memory.data(), memory.bytes(), advice | flag)) << advice << " with " << flag;
    }
    EXPECT_ERRNO(EINVAL, ksmu_advise(memory.data() + 1, page, advice)) << advice;
  }
  for (const int advice : {KSMU_DISCARD, KSMU_MERGEABLE, KSMU_UNMERGEABLE, KSMU_RELEASE}) {
    EXPECT_ERRNO(EINVAL, ksmu_advise(memory.data(), SIZE_MAX, advice)) << advice << ": rounding up overflows";
    EXPECT_ERRNO(EINVAL, ksmu_advise(memory.data(), SIZE_MAX / page * page, advice)) << advice << ": the end overflows";
    EXPECT_ERRNO(EINVAL, ksmu_advise(reinterpret_cast<void*>(SIZE_MAX / page * page), 2 * page, advice)) << advice;
  }
  EXPECT_ERRNO(EINVAL, ksmu_merge(memory.data() + 1, page));
  EXPECT_ERRNO(EINVAL, ksmu_merge(memory.data(), SIZE_MAX / page * page));
  EXPECT_ERRNO(EINVAL, ksmu_unmap(memory.data() + 1, page));
  EXPECT_ERRNO(EINVAL, ksmu_unmap(memory.data(), 0));
  EXPECT_ERRNO(EINVAL, ksmu_unmap(memory.data(), SIZE_MAX / page * page));
  EXPECT_ERRNO(EINVAL, ksmu_map(0, 0) == MAP_FAILED ? -1 : 0);
  EXPECT_ERRNO(EINVAL, ksmu_map(SIZE_MAX, 0) == MAP_FAILED ? -1 : 0);
  EXPECT_ERRNO(EINVAL, ksmu_map(page, 1) == MAP_FAILED ? -1 : 0);
  EXPECT_ERRNO(EINVAL, ksmu_map(page, 0x40000) == MAP_FAILED ? -1 : 0);
  EXPECT_NE(std::string(ksmu_last_error()), "");
  EXPECT_TRUE(PagesAre(memory, Seven));
}

KSMU_ISOLATED_TEST(BadInput, LengthIsRoundedUpAndZeroSucceeds, 30) {
  Set("run", 0);
  Memory memory(8);
  FillPages(memory, Seven);
  for (const int advice : {KSMU_DISCARD, KSMU_MERGEABLE, KSMU_UNMERGEABLE, KSMU_RELEASE}) {
    EXPECT_OK(ksmu_advise(memory.data(), 0, advice));
    EXPECT_OK(ksmu_advise(nullptr, 0, advice));
  }
  EXPECT_TRUE(PagesAre(memory, Seven));
  EXPECT_OK(ksmu_advise(memory.page(2), 1, KSMU_MERGEABLE));
  ksmu_region_stats region = RegionAt(nullptr);
  EXPECT_EQ(region.start, memory.page(2));
  EXPECT_EQ(region.length, PageSize());
  EXPECT_OK(ksmu_advise(memory.page(2), PageSize() + 1, KSMU_MERGEABLE));
  region = RegionAt(nullptr);
  EXPECT_EQ(region.start, memory.page(2));
  EXPECT_EQ(region.length, 2 * PageSize());
  EXPECT_OK(ksmu_merge(memory.data(), 0));
  EXPECT_EQ(ksmu_merge(memory.data(), 3 * PageSize() + 1), 2) << ksmu_last_error();
  EXPECT_OK(ksmu_advise(memory.page(2), 1, KSMU_DISCARD));
  EXPECT_TRUE(PagesAre(memory, [](std::size_t i) { return i == 2 ? 0 : 7; }));
}

KSMU_ISOLATED_TEST(BadInput, HolesGiveEnomemAndTheRestIsAdvised, 30) {
  Set("run", 0);
  Memory memory(64);
  FillPages(memory, Seven);
  ASSERT_EQ(munmap(memory.page(20), 4 * PageSize()), 0);
  for (const int flags : {0, static_cast<int>(KSMU_F_NO_RAW_DISCARDS)}) {
    EXPECT_ERRNO(ENOMEM, ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
    EXPECT_NE(std::string(ksmu_last_error()), "");
    MergeAll();
    EXPECT_EQ(Get("pages_merged"), 60);
    for (std::size_t i = 0; i < 64; ++i) {
      if (i < 20 || i >= 24) {
        EXPECT_TRUE(PageIs(memory.page(i), 7));
      }
    }
    EXPECT_ERRNO(ENOMEM, ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE));
    EXPECT_THAT(ksmu_last_error(), ::testing::AllOf(::testing::HasSubstr("not mapped"), ::testing::HasSubstr("has been unmerged")));
    EXPECT_EQ(Get("pages_merged"), 0);
    EXPECT_EQ(Get("pages_tracked"), 0);
  }
  // Nothing there at all.
  EXPECT_ERRNO(ENOMEM, ksmu_advise(memory.page(20), 4 * PageSize(), KSMU_MERGEABLE));
  EXPECT_ERRNO(ENOMEM, ksmu_advise(memory.page(20), 4 * PageSize(), KSMU_DISCARD));
  EXPECT_THAT(ksmu_last_error(), ::testing::AllOf(::testing::HasSubstr("not mapped"), ::testing::HasSubstr("discarded")));
  EXPECT_ERRNO(ENOMEM, ksmu_advise(nullptr, PageSize(), KSMU_MERGEABLE));
  EXPECT_EQ(Get("regions"), 0);
}

// What cannot be merged whatever it contains.
KSMU_ISOLATED_TEST(BadInput, EopnotsuppKinds, 60) {
  Set("run", 0);
  const std::size_t bytes = 16 * PageSize();
  const auto refused = [&](const char* what, void* address, std::size_t length) {
    for (const int flags : {0, static_cast<int>(KSMU_F_NO_RAW_DISCARDS), static_cast<int>(KSMU_F_SYNC_BREAK)}) {
      EXPECT_ERRNO(EOPNOTSUPP, ksmu_advise(address, length, KSMU_MERGEABLE | flags)) << what << ", flags " << flags;
      EXPECT_NE(std::string(ksmu_last_error()), "") << what;
    }
  };
  void* shared = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(shared, MAP_FAILED);
  refused("shared anonymous", shared, bytes);
  const int exe = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  void* file = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, exe, 0);
  ASSERT_NE(file, MAP_FAILED);
  static_cast<volatile char*>(file)[0] = 1;
  refused("private file", file, bytes);
  const int memfd = memfd_create("ksmu-test", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(memfd, static_cast<off_t>(bytes)), 0);
  for (const int kind : {MAP_PRIVATE, MAP_SHARED}) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kind, memfd, 0);
    ASSERT_NE(mapped, MAP_FAILED);
    refused("memfd", mapped, bytes);
  }
  Memory locked(16);
  FillPages(locked, Seven);
  if (mlock(locked.data(), locked.bytes()) == 0) {
    refused("locked", locked.data(), locked.bytes());
    ASSERT_EQ(munlock(locked.data(), locked.bytes()), 0);
    EXPECT_OK(ksmu_advise(locked.data(), locked.bytes(), KSMU_MERGEABLE)) << "unlocked again";
  }
  char here = 0;
  char* stack = reinterpret_cast<char*>(reinterpret_cast<std::uintptr_t>(&here) / PageSize() * PageSize());
  refused("the main thread's stack", stack, PageSize());
  char* heap = static_cast<char*>(sbrk(static_cast<intptr_t>(4 * PageSize())));
  ASSERT_NE(heap, reinterpret_cast<char*>(-1));
  heap = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(heap) + PageSize() - 1) / PageSize() * PageSize());
  refused("libc's heap", heap, 2 * PageSize());
  if (const unsigned long vdso = getauxval(AT_SYSINFO_EHDR); vdso != 0)
    refused("vdso", reinterpret_cast<void*>(vdso), PageSize());
  void* huge = mmap(nullptr, 2 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
  if (huge != MAP_FAILED) {
    refused("hugetlb", huge, 2 << 20);
  } else {
    printf("not tested: hugetlb (no huge pages reserved)\n");
  }
  void* growing = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, -1, 0);
  if (growing != MAP_FAILED) refused("a stack that grows", growing, bytes);
  EXPECT_TRUE(PagesAre(locked, Seven));
}

KSMU_ISOLATED_TEST(BadInput, MixedRangeSucceedsAndShowsTheRest, 30) {
  Set("run", 0);
  Memory memory(64);
  FillPages(memory, Seven);
  ASSERT_NE(
      mmap(memory.page(16), 8 * PageSize(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
      MAP_FAILED);
  for (std::size_t i = 16; i < 24; ++i) FillPage(memory.page(i), 7);
  EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  MergeAll();
  EXPECT_EQ(Get("pages_merged"), 56);
  EXPECT_EQ(Get("pages_tracked"), 56);
  const auto expect_region = [&](const void* at, std::size_t first, std::size_t pages, std::size_t excluded, int cause) {
    ksmu_region_stats region;
    ASSERT_OK(ksmu_read_region(at, &region, sizeof region));
    EXPECT_EQ(region.start, memory.page(first));
    EXPECT_EQ(region.length, pages * PageSize());
    EXPECT_EQ(region.excluded_bytes, static_cast<std::int64_t>(excluded * PageSize()));
    EXPECT_EQ(region.excluded_cause, cause);
  };
  // One region, whichever of its addresses is asked for.
  for (const std::size_t i : {0, 15, 16, 20, 24, 63}) {
    SCOPED_TRACE(i);
    expect_region(memory.page(i), 0, 64, 8, EOPNOTSUPP);
  }
  EXPECT_EQ(Get("regions"), 1);
  EXPECT_EQ(Get("region_bytes"), static_cast<std::int64_t>(memory.bytes()));
  ksmu_region_stats none;
  EXPECT_ERRNO(ENOENT, ksmu_read_region(memory.page(64), &none, sizeof none));
  // Refused once more, on its own: nothing has changed.
  EXPECT_ERRNO(EOPNOTSUPP, ksmu_advise(memory.page(18), 2 * PageSize(), KSMU_MERGEABLE));
  expect_region(nullptr, 0, 64, 8, EOPNOTSUPP);
  // A hole before it, as part of the same advice: the first cause is the hole's.
  ASSERT_EQ(munmap(memory.page(14), 2 * PageSize()), 0);
  EXPECT_ERRNO(ENOMEM, ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  expect_region(nullptr, 0, 64, 10, ENOMEM);
  ASSERT_EQ(mmap(memory.page(14), 2 * PageSize(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
            memory.page(14));
  for (const std::size_t i : {14, 15}) FillPage(memory.page(i), 7);
  EXPECT_OK(ksmu_advise(memory.page(8), 48 * PageSize(), KSMU_MERGEABLE));
  expect_region(nullptr, 0, 64, 8, EOPNOTSUPP);
  // In a forked child.
  {
    Child child(Child::Kind::kFork, [&](Child& self) {
      if (ksmu_merge(memory.data(), memory.bytes()) < 0) self.Report("ksmu_merge: errno %d", errno);
      ksmu_region_stats region;
      if (ksmu_read_region(nullptr, &region, sizeof region) != 0) self.Report("no region");
      if (region.start != memory.data() || region.length != memory.bytes() ||
          region.excluded_bytes != static_cast<std::int64_t>(8 * PageSize()) || region.excluded_cause != EOPNOTSUPP) {
        self.Report("%p + %zu, %ld excluded, cause %d", region.start, region.length,
                    static_cast<long>(region.excluded_bytes), static_cast<int>(region.excluded_cause));
      }
    });
    child.Join();
  }
  // What is let go of takes its share of them along, and none stays behind alone.
  EXPECT_OK(ksmu_advise(memory.page(20), 44 * PageSize(), KSMU_UNMERGEABLE));
  expect_region(nullptr, 0, 20, 4, EOPNOTSUPP);
  EXPECT_OK(ksmu_advise(memory.data(), 16 * PageSize(), KSMU_UNMERGEABLE));
  EXPECT_ERRNO(ENOENT, ksmu_read_region(nullptr, &none, sizeof none));
  EXPECT_EQ(Get("regions"), 0);
  EXPECT_EQ(Get("region_bytes"), 0);
  EXPECT_TRUE(PagesAre(memory, Seven));
  memory.page(20)[5] ^= 1;  // shared memory stays shared memory
  memory.page(20)[5] ^= 1;
  EXPECT_TRUE(PagesAre(memory, Seven));
}

KSMU_ISOLATED_TEST(BadInput, SuccessLeavesErrnoAlone, 30) {
  Set("run", 0);
  Memory memory(16);
  FillPages(memory, Seven);
  errno = 4711;
  EXPECT_EQ(ksmu_start(nullptr, sizeof(ksmu_options)), 0);
  EXPECT_EQ(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE), 0);
  EXPECT_EQ(ksmu_merge(memory.data(), memory.bytes()), 16);
  ksmu_stats stats;
  EXPECT_EQ(ksmu_read_stats(&stats, sizeof stats), 0);
  ksmu_page_info info;
  EXPECT_EQ(ksmu_explain(memory.data(), &info, sizeof info), 0);
  EXPECT_EQ(ksmu_set("sleep_millisecs", 5), 0);
  EXPECT_EQ(ksmu_advise(memory.data(), memory.bytes() / 2, KSMU_DISCARD), 0);
  EXPECT_EQ(ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE), 0);
  void* mapped = ksmu_map(PageSize(), 0);
  EXPECT_EQ(ksmu_unmap(mapped, PageSize()), 0);
  (void)ksmu_last_error();
  (void)ksmu_version();
  EXPECT_EQ(ksmu_stop(), 0);
  EXPECT_EQ(errno, 4711);
}

// --- structs, names ------------------------------------------------------------------------------------------------

// An older program's struct is shorter, a newer one's longer.
KSMU_ISOLATED_TEST(BadInput, StructsOfOtherSizes, 30) {
  Set("run", 0);
  Memory memory(16);
  FillPages(memory, Seven);
  ksmu_options options = {};
  options.flags = 0;
  ASSERT_OK(ksmu_start(&options, sizeof options.flags));
  char larger_options[sizeof options + 64] = {};
  EXPECT_OK(ksmu_start(reinterpret_cast<ksmu_options*>(larger_options), sizeof larger_options));
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  MergeAll();

  const auto check = [](const char* what, std::size_t size, const std::function<int(void*, std::size_t)>& read) {
    std::vector<unsigned char> whole(size), buffer(size + 256);
    ASSERT_EQ(read(whole.data(), size), 0) << what;
    for (const std::size_t given : {std::size_t{1}, std::size_t{8}, size / 2, size - 8, size, size + 8, size + 200}) {
      std::fill(buffer.begin(), buffer.end(), 0xa5);
      ASSERT_EQ(read(buffer.data(), given), 0) << what << " of size " << given;
      EXPECT_EQ(memcmp(buffer.data(), whole.data(), std::min(given, std::size_t{8})), 0)
          << what << " of size " << given;
      for (std::size_t i = size; i < given; ++i) ASSERT_EQ(buffer[i], 0) << what << ": what it does not know is 0";
      for (std::size_t i = given; i < buffer.size(); ++i)
        ASSERT_EQ(buffer[i], 0xa5) << what << " of size " << given << ": wrote at " << i;
    }
    EXPECT_ERRNO(EINVAL, read(buffer.data(), 0)) << what;
    EXPECT_ERRNO(EINVAL, read(nullptr, size)) << what;
  };
  check("ksmu_stats", sizeof(ksmu_stats),
        [](void* p, std::size_t n) { return ksmu_read_stats(static_cast<ksmu_stats*>(p), n); });
  check("ksmu_region_stats", sizeof(ksmu_region_stats),
        [&](void* p, std::size_t n) { return ksmu_read_region(memory.data(), static_cast<ksmu_region_stats*>(p), n); });
  check("ksmu_page_info", sizeof(ksmu_page_info),
        [&](void* p, std::size_t n) { return ksmu_explain(memory.data(), static_cast<ksmu_page_info*>(p), n); });
}

KSMU_ISOLATED_TEST(BadInput, NamesAndValues, 30) {
  for (const bool started : {false, true}) {
    SCOPED_TRACE(started ? "started" : "not started");
    Memory memory(16);
    FillPages(memory, Seven);
    if (started) {
      ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
      MergeAll();
    }
    std::int64_t value = 4711;
    EXPECT_ERRNO(ENOENT, ksmu_get("no_such_counter", &value));
    EXPECT_ERRNO(ENOENT, ksmu_get("", &value));
    EXPECT_ERRNO(ENOENT, ksmu_get("pages_sharedx", &value));
    EXPECT_ERRNO(ENOENT, ksmu_get("pages_share", &value));
    EXPECT_ERRNO(ENOENT, ksmu_get("RUN", &value));
    EXPECT_ERRNO(EINVAL, ksmu_get(nullptr, &value));
    EXPECT_ERRNO(EINVAL, ksmu_get("run", nullptr));
    EXPECT_EQ(value, 4711) << "a failed read writes nothing";
    const std::string long_name(100'000, 'x');
    EXPECT_ERRNO(ENOENT, ksmu_get(long_name.c_str(), &value));
    EXPECT_ERRNO(ENOENT, ksmu_set(long_name.c_str(), 1));
    EXPECT_ERRNO(ENOENT, ksmu_set("no_such_tunable", 1));
    EXPECT_ERRNO(EINVAL, ksmu_set(nullptr, 1));
    EXPECT_ERRNO(EACCES, ksmu_set("pages_shared", 0));
    EXPECT_ERRNO(EACCES, ksmu_set("unmerged_pinned", 0));
    EXPECT_NE(std::string(ksmu_last_error()), "");
    const struct {
      const char* name;
      std::int64_t low, high;  // the last good ones; high -1: no upper limit
    } ranges[] = {{"run", 0, 2},
                  {"pages_to_scan", 0, -1},
                  {"sleep_millisecs", 0, -1},
                  {"cpu_limit_percent", 0, 100},
                  {"use_zero_pages", 0, 1},
                  {"smart_scan", 0, 1},
                  {"remerge", 0, 1},
                  {"remerge_seconds", 0, -1},
                  {"max_maps", 0, -1},
                  {"thp_min_duplicates", 0, 512}};
    for (const auto& range : ranges) {
      const std::int64_t old = Get(range.name);
      EXPECT_ERRNO(EINVAL, ksmu_set(range.name, range.low - 1)) << range.name;
      EXPECT_ERRNO(EINVAL, ksmu_set(range.name, INT64_MIN)) << range.name;
      if (range.high >= 0) {
        EXPECT_ERRNO(EINVAL, ksmu_set(range.name, range.high + 1)) << range.name;
        EXPECT_ERRNO(EINVAL, ksmu_set(range.name, INT64_MAX)) << range.name;
      }
      EXPECT_EQ(Get(range.name), old) << range.name << ": a refused value changes nothing";
      EXPECT_OK(ksmu_set(range.name, range.low));
      EXPECT_EQ(Get(range.name), range.low) << range.name;
      EXPECT_OK(ksmu_set(range.name, old));
    }
    EXPECT_ERRNO(EINVAL, ksmu_set("max_page_sharing", 1));
    EXPECT_ERRNO(EINVAL, ksmu_set("max_page_sharing", -5));
    EXPECT_ERRNO(EINVAL, ksmu_set("merge_across_nodes", 2));
    EXPECT_ERRNO(EINVAL, ksmu_set("merge_across_nodes", -1));
    EXPECT_OK(ksmu_set("merge_across_nodes", 1));
    if (started) EXPECT_ERRNO(EBUSY, ksmu_set("merge_across_nodes", 0)) << "pages are shared";
    else EXPECT_OK(ksmu_set("merge_across_nodes", 0));
    EXPECT_EQ(Get("merge_across_nodes"), started ? 1 : 0);
    EXPECT_OK(ksmu_set("merge_across_nodes", 1));
#define KSMU_READABLE(name) EXPECT_OK(ksmu_get(#name, &value));
    KSMU_FOR_EACH_COUNTER(KSMU_READABLE)
#undef KSMU_READABLE
    EXPECT_TRUE(PagesAre(memory, Seven));
  }
}

// --- advice in every shape ------------------------------------------------------------------------------------------

KSMU_ISOLATED_TEST(BadInput, RepeatedAndOverlappingAdvice, 60) {
  Set("run", 0);
  constexpr std::size_t kPages = 256;
  Memory memory(kPages);
  FillPages(memory, Seven);
  for (int i = 0; i < 3; ++i) EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  EXPECT_EQ(Get("regions"), 1);
  EXPECT_EQ(Get("region_bytes"), static_cast<std::int64_t>(memory.bytes()));
  MergeAll();
  EXPECT_EQ(Get("pages_tracked"), static_cast<std::int64_t>(kPages)) << "nothing is counted twice";
  EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(kPages));
  // Again over what is merged, with other flags, over parts: merged pages stay merged, every region's flags are the
  // last given.
  EXPECT_OK(ksmu_advise(memory.page(64), 64 * PageSize(), KSMU_MERGEABLE | KSMU_F_SYNC_BREAK));
  EXPECT_OK(ksmu_advise(memory.page(32), 64 * PageSize(), KSMU_MERGEABLE | KSMU_F_NO_RAW_DISCARDS));
  EXPECT_EQ(RegionAt(memory.page(0)).flags, 0);
  EXPECT_EQ(RegionAt(memory.page(32)).flags, KSMU_F_NO_RAW_DISCARDS);
  EXPECT_EQ(RegionAt(memory.page(95)).flags, KSMU_F_NO_RAW_DISCARDS);
  EXPECT_EQ(RegionAt(memory.page(96)).flags, KSMU_F_SYNC_BREAK);
  EXPECT_EQ(RegionAt(memory.page(128)).flags, 0);
  EXPECT_TRUE(PagesAre(memory, Seven));
  MergeAll();  // what had to be unmerged for other flags' sake is merged again
  EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(kPages));
  EXPECT_EQ(Get("pages_tracked"), static_cast<std::int64_t>(kPages));
  EXPECT_EQ(Get("region_bytes"), static_cast<std::int64_t>(memory.bytes()));
  EXPECT_TRUE(PagesAre(memory, Seven));
  for (std::size_t i = 0; i < kPages; i += 5) FillPage(memory.page(i), 100 + i % 3);
  const auto seed = [](std::size_t i) { return i % 5 == 0 ? 100 + i % 3 : 7; };
  EXPECT_TRUE(PagesAre(memory, seed));
  Set("remerge_seconds", 0);
  MergeAll();
  EXPECT_TRUE(PagesAre(memory, seed));
  EXPECT_EQ(Get("pages_tracked"), static_cast<std::int64_t>(kPages));
  // The promise was taken back with the flags: raw discards are exact again.
  EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  EXPECT_EQ(RegionAt(memory.page(40)).flags, 0);
  MergeAll();
  ASSERT_EQ(madvise(memory.data(), memory.bytes(), MADV_DONTNEED), 0);
  EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 0; }));
}

KSMU_ISOLATED_TEST(BadInput, HalfARegionUnadvisedReleasedUnmapped, 60) {
  Set("run", 0);
  constexpr std::size_t kPages = 256;
  const auto seed = [](std::size_t i) { return 1 + i % 16; };
  for (const int flags : {0, static_cast<int>(KSMU_F_NO_RAW_DISCARDS), static_cast<int>(KSMU_F_SYNC_BREAK)}) {
    for (const int how : {static_cast<int>(KSMU_UNMERGEABLE), static_cast<int>(KSMU_RELEASE), 0}) {
      SCOPED_TRACE("flags " + std::to_string(flags) + ", how " + std::to_string(how));
      Memory memory(kPages);
      FillPages(memory, seed);
      ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
      MergeAll();
      EXPECT_EQ(Get("pages_merged"), static_cast<std::int64_t>(kPages));
      // An odd piece in the middle, then one that overlaps it.
      for (const std::size_t first : {std::size_t{77}, std::size_t{90}}) {
        if (how == 0) {
          ASSERT_OK(ksmu_unmap(memory.page(first), 50 * PageSize()));
          // The addresses are free: what somebody else maps there is his.
          void* stranger = mmap(memory.page(first), 50 * PageSize(), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
          ASSERT_EQ(stranger, memory.page(first)) << strerror(errno);
          for (std::size_t i = first; i < first + 50; ++i) FillPage(memory.page(i), seed(i));
        } else {
          ASSERT_OK(ksmu_advise(memory.page(first), 50 * PageSize(), how));
        }
        EXPECT_TRUE(PagesAre(memory, seed));
      }
      EXPECT_EQ(Get("pages_tracked"), static_cast<std::int64_t>(kPages) - 63);
      EXPECT_EQ(Get("region_bytes"), static_cast<std::int64_t>((kPages - 63) * PageSize()));
      // Writable as before, and merging of the rest goes on.
      for (std::size_t i = 0; i < kPages; i += 3) FillPage(memory.page(i), 500);
      const auto now = [&](std::size_t i) { return i % 3 == 0 ? 500 : seed(i); };
      MergeAll();
      EXPECT_TRUE(PagesAre(memory, now));
      if (how == KSMU_RELEASE) {
        // What the release was for.
        ASSERT_EQ(munmap(memory.page(77), 63 * PageSize()), 0);
        void* again = mmap(memory.page(77), 63 * PageSize(), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        ASSERT_EQ(again, memory.page(77));
        for (std::size_t i = 77; i < 140; ++i) {
          EXPECT_TRUE(PageIs(memory.page(i), 0));
          FillPage(memory.page(i), now(i));
        }
        MergeAll();
        EXPECT_TRUE(PagesAre(memory, now));
      }
      EXPECT_EQ(Get("pages_tracked"), static_cast<std::int64_t>(kPages) - 63);
    }
    EXPECT_EQ(Get("regions"), 0);
  }
}

// Memory that is unmapped without a word while nothing is being merged: noticed and forgotten, and what others map
// there afterwards is never touched, whatever the library is told to do next.
KSMU_ISOLATED_TEST(BadInput, UnmappedWithoutAWord, 120) {
  constexpr std::size_t kPages = 512;
  const auto seed = [](std::size_t i) { return 1 + i % 16; };
  enum { kHole, kAnonymous, kShared, kProtNone, kReadOnly };
  enum { kMerge, kRunTwo, kUnmergeable, kRelease, kDiscardElsewhere, kStop, kScan };
  for (const int flags : {0, static_cast<int>(KSMU_F_NO_RAW_DISCARDS), static_cast<int>(KSMU_F_SYNC_BREAK)}) {
    for (const int stranger : {kHole, kAnonymous, kShared, kProtNone, kReadOnly}) {
      for (const int next : {kMerge, kRunTwo, kUnmergeable, kRelease, kDiscardElsewhere, kStop, kScan}) {
        SCOPED_TRACE("flags " + std::to_string(flags) + ", stranger " + std::to_string(stranger) + ", next " +
                     std::to_string(next));
        Set("run", 0);
        Memory memory(kPages);
        FillPages(memory, seed);
        ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
        MergeAll();
        constexpr std::size_t kFirst = 101, kGone = 200;
        ASSERT_EQ(munmap(memory.page(kFirst), kGone * PageSize()), 0);
        const std::size_t gone_bytes = kGone * PageSize();
        if (stranger != kHole) {
          const int kind = stranger == kShared ? MAP_SHARED : MAP_PRIVATE;
          ASSERT_EQ(mmap(memory.page(kFirst), gone_bytes, PROT_READ | PROT_WRITE,
                         kind | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0),
                    memory.page(kFirst));
          for (std::size_t i = kFirst; i < kFirst + kGone; ++i) FillPage(memory.page(i), 9000 + i % 8);
          if (stranger == kProtNone) {
            ASSERT_EQ(mprotect(memory.page(kFirst), gone_bytes, PROT_NONE), 0);
          }
          if (stranger == kReadOnly) {
            ASSERT_EQ(mprotect(memory.page(kFirst), gone_bytes, PROT_READ), 0);
          }
        }
        switch (next) {
          case kMerge:
            MergeAll();
            MergeAll();
            break;
          case kRunTwo:
            EXPECT_OK(ksmu_set("run", 2));
            break;
          case kUnmergeable:
            // ENOMEM tells of the hole.
            if (ksmu_advise(memory.data(), memory.bytes(), KSMU_UNMERGEABLE) != 0) {
              EXPECT_EQ(errno, ENOMEM);
            }
            break;
          case kRelease:
            if (ksmu_advise(memory.data(), memory.bytes(), KSMU_RELEASE) != 0) {
              EXPECT_EQ(errno, ENOMEM);
            }
            break;
          case kDiscardElsewhere:
            EXPECT_OK(ksmu_advise(memory.page(400), 20 * PageSize(), KSMU_DISCARD));
            break;
          case kStop:
            EXPECT_OK(ksmu_stop());
            break;
          case kScan: {
            Set("cpu_limit_percent", 100);
            Set("sleep_millisecs", 0);
            Set("run", 1);
            const std::int64_t scans = Get("full_scans");
            EXPECT_TRUE(WaitUntil([&] { return Get("full_scans") > scans + 3; }, 20));
            Set("run", 0);
            break;
          }
        }
        if (stranger == kProtNone) {
          ASSERT_EQ(mprotect(memory.page(kFirst), gone_bytes, PROT_READ | PROT_WRITE), 0);
        }
        for (std::size_t i = 0; i < kPages; ++i) {
          if (i >= kFirst && i < kFirst + kGone) {
            if (stranger != kHole) {
              ASSERT_TRUE(PageIs(memory.page(i), 9000 + i % 8)) << "the stranger's page " << i;
            }
          } else {
            const bool discarded = next == kDiscardElsewhere && i >= 400 && i < 420;
            ASSERT_TRUE(PageIs(memory.page(i), discarded ? 0 : seed(i))) << "page " << i;
          }
        }
        if (stranger == kHole) {
          // The kernel may have handed the addresses out again, but nobody may have put our pages back there.
          std::vector<char> copy(PageSize());
          for (std::size_t i = kFirst; i < kFirst + kGone; ++i) {
            const iovec to = {copy.data(), copy.size()}, from = {memory.page(i), PageSize()};
            if (process_vm_readv(getpid(), &to, 1, &from, 1, 0) != static_cast<ssize_t>(PageSize())) continue;
            EXPECT_GE(FindWrongByte(copy.data(), seed(i)), 0) << "page " << i << " is back from the dead";
          }
        }
        if (stranger != kHole && stranger != kReadOnly) {
          FillPage(memory.page(kFirst + 7), 31337);
          EXPECT_TRUE(PageIs(memory.page(kFirst + 7), 31337));
        }
      }
    }
  }
}

// A protection change, a replacing mmap and an mremap of the program's own, raw, over merged memory.
KSMU_ISOLATED_TEST(BadInput, RawReplaceAndMove, 60) {
  Set("run", 0);
  constexpr std::size_t kPages = 128;
  const auto seed = [](std::size_t i) { return 1 + i % 16; };
  for (const int flags : {0, static_cast<int>(KSMU_F_NO_RAW_DISCARDS), static_cast<int>(KSMU_F_SYNC_BREAK)}) {
    SCOPED_TRACE("flags " + std::to_string(flags));
    Memory memory(kPages);
    FillPages(memory, seed);
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE | flags));
    MergeAll();
    // Replaced in place.
    ASSERT_NE(
        mmap(memory.page(10), 10 * PageSize(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
        MAP_FAILED);
    const auto replaced = [&](std::size_t i) { return i >= 10 && i < 20 ? 0 : seed(i); };
    EXPECT_TRUE(PagesAre(memory, replaced));
    MergeAll();
    EXPECT_TRUE(PagesAre(memory, replaced));
    // Moved away: the bytes move along, writable, and the old place is a hole.
    char* target = static_cast<char*>(mmap(nullptr, 8 * PageSize(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    const std::size_t first = 32;
    ASSERT_EQ(mremap(memory.page(first), PageSize(), PageSize(), MREMAP_MAYMOVE | MREMAP_FIXED, target), target)
        << strerror(errno);
    EXPECT_TRUE(PageIs(target, seed(first)));
    MergeAll();
    EXPECT_TRUE(PageIs(target, seed(first)));
    FillPage(target, 12345);
    EXPECT_TRUE(PageIs(target, 12345));
    EXPECT_OK(ksmu_set("run", 2));
    Set("run", 0);
    EXPECT_TRUE(PageIs(target, 12345));
    ASSERT_EQ(mmap(memory.page(first), PageSize(), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0),
              memory.page(first))
        << "the old place is free: " << strerror(errno);
    FillPage(memory.page(first), seed(first));
    MergeAll();
    EXPECT_TRUE(PagesAre(memory, replaced));
    EXPECT_TRUE(PageIs(target, 12345));
    EXPECT_OK(ksmu_unmap(target, 8 * PageSize()));
  }
}

}  // namespace
}  // namespace ksmu::test
