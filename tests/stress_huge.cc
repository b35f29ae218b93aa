// Stress test: memory in huge pages that comes and goes. The workers' huge pages are split soon and stay so; here there
// are always some that the library has not seen yet, with nothing, a little, or much in them that can be merged.
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "stress_state.h"
#include "test_support.h"

namespace ksmu::stress {
namespace {

constexpr std::size_t kHuge = std::size_t{2} << 20, kSegments = 4;

// An area owned by one thread, with what has to be in it: a pattern, or one made unique by its first word.
class HugeArea {
 public:
  HugeArea(int slot, Random* random) : slot_(slot), random_(random), expected_(kSegments * kHuge / g.page_size) {
    whole_ = mmap(nullptr, (kSegments + 1) * kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole_ == MAP_FAILED) {
      Fail("mmap for huge pages: %s", strerror(errno));
      return;
    }
    base_ = HugeAligned(whole_);
    madvise(base_, kSegments * kHuge, MADV_HUGEPAGE);
    for (std::size_t i = 0; i < expected_.size(); ++i) {
      // By segment: no duplicates, one in 64 (below every threshold but the lowest), one in 8, all.
      constexpr std::size_t kOneIn[kSegments] = {SIZE_MAX, 64, 8, 1};
      Write(i, random_->OneIn(kOneIn[i / (expected_.size() / kSegments)]));
      if (i % 64 == 0) Step(slot_);
    }
  }
  ~HugeArea() {
    if (base_ == nullptr) return;
    const double end = Now() + 10;
    // While the library is being stopped the memory is not ours to unmap.
    while (ksmu_advise(base_, kSegments * kHuge, KSMU_RELEASE) != 0) {
      if (errno != EAGAIN || g.library_on.load() || Now() > end) {
        Fail("KSMU_RELEASE of huge pages: %s: %s", strerror(errno), ksmu_last_error());
        return;
      }
      Step(slot_);
      test::SleepSeconds(0.001);
    }
    munmap(whole_, (kSegments + 1) * kHuge);
  }
  HugeArea(const HugeArea&) = delete;
  HugeArea& operator=(const HugeArea&) = delete;
  bool there() const { return base_ != nullptr; }
  bool quiet() const { return quiet_; }

  void Advise() {
    promise_ = random_->OneIn(2);
    quiet_ = random_->OneIn(2);
    const int flags = promise_ ? KSMU_F_NO_RAW_DISCARDS : random_->OneIn(4) ? KSMU_F_SYNC_BREAK : 0;
    for (std::size_t s = 0; s < kSegments; ++s) was_huge_[s] = IsHuge(s);
    if (ksmu_advise(base_, kSegments * kHuge, KSMU_MERGEABLE | flags) != 0 && g.library_on.load()) {
      Fail("ksmu_advise(huge pages): %s: %s", strerror(errno), ksmu_last_error());
    }
  }
  void Disturb() {
    const std::size_t i = random_->Below(expected_.size());
    Check(i, "at a read");
    if (quiet_) return;
    if (random_->OneIn(4)) Write(i, random_->OneIn(2));
    else if (random_->OneIn(8)) Discard(i);
    Check(i, "right after a write or a discard");
  }
  void CheckAll(const char* when) {
    for (std::size_t i = 0; i < expected_.size(); ++i) {
      Check(i, when);
      if (i % 64 == 0) Step(slot_);
    }
  }
  // The discard of a page splits its huge page too, and so does a write to one that is watched: without any it was the
  // library.
  void Count() {
    if (!quiet_ || !g.library_on.load()) return;
    for (std::size_t s = 0; s < kSegments; ++s) {
      g.tally.huge.fetch_add(was_huge_[s]);
      g.tally.huge_split.fetch_add(was_huge_[s] && !IsHuge(s));
    }
  }

 private:
  unsigned char* PageOf(std::size_t i) const { return base_ + i * g.page_size; }
  bool IsHuge(std::size_t segment) const {
    ksmu_page_info info = {};
    return ksmu_explain(base_ + segment * kHuge, &info, sizeof info) == 0 && info.huge == 1;
  }
  void Write(std::size_t i, bool duplicate) {
    expected_[i] = {static_cast<std::uint8_t>(1 + i % (kPatterns - 1)), duplicate ? 0 : ++unique_};
    memcpy(PageOf(i) + 8, g.pattern(expected_[i].pattern) + 8, g.page_size - 8);
    const std::uint64_t word = FirstWord(i);
    memcpy(PageOf(i), &word, 8);
  }
  void Discard(std::size_t i) {
    const int result = promise_ ? ksmu_advise(PageOf(i), g.page_size, KSMU_DISCARD)
                                : madvise(PageOf(i), g.page_size, MADV_DONTNEED);
    if (result == 0) expected_[i] = {0, 0};
    else if (errno != EAGAIN || g.library_on.load()) Fail("discard in a huge page: %s", strerror(errno));
  }
  std::uint64_t FirstWord(std::size_t i) const {
    std::uint64_t word;
    memcpy(&word, g.pattern(expected_[i].pattern), 8);
    return word ^ expected_[i].unique;
  }
  void Check(std::size_t i, const char* when) {
    std::uint64_t word;
    memcpy(&word, PageOf(i), 8);
    const unsigned char* want = g.pattern(expected_[i].pattern);
    if (word == FirstWord(i) && memcmp(PageOf(i) + 8, want + 8, g.page_size - 8) == 0) return;
    Fail("WRONG BYTES %s: page %zu of the huge pages (%p), pattern %d, first word %llx, has to be %llx; the library:%s",
         when, i, static_cast<const void*>(PageOf(i)), expected_[i].pattern, static_cast<unsigned long long>(word),
         static_cast<unsigned long long>(FirstWord(i)), PointsOf(PageOf(i)).c_str());
    Write(i, true);
  }

  struct Expected {
    std::uint8_t pattern;
    std::uint64_t unique;  // 0: the pattern's own first word
  };
  const int slot_;
  Random* const random_;
  std::vector<Expected> expected_;
  void* whole_ = nullptr;
  unsigned char* base_ = nullptr;
  std::uint64_t unique_ = 0;
  bool promise_ = false, quiet_ = false;
  bool was_huge_[kSegments] = {};
};

}  // namespace

unsigned char* HugeAligned(void* p) {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(p) + kHuge - 1) & ~(kHuge - 1));
}

void HugePages(int slot) {
  Random random(g.options.seed * 53 + static_cast<std::uint64_t>(g.phase.name));
  while (!g.stop.load()) {
    HugeArea area(slot, &random);
    if (!area.there()) return;
    area.Advise();
    // To be split it has to lie still for two passes, which take most of a second here.
    const double end = Now() + (area.quiet() ? 2 : 0.2) + 0.1 * static_cast<double>(random.Below(10));
    while (Now() < end && !g.stop.load()) {
      Step(slot);
      area.Disturb();
      test::SleepSeconds(0.002);
    }
    area.CheckAll("before it is unmapped");
    area.Count();
  }
}

}  // namespace ksmu::stress
