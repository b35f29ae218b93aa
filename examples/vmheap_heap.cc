#include "vmheap_heap.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <random>

namespace examples {
namespace {

// What a page is to contain: 0 zeros; odd: a content that pages have in common; even: unique.
using Content = uint64_t;
constexpr Content kZeros = 0;
constexpr Content kDiscarded = ~Content{0};  // reads as zeros too, but the program itself has given the memory back
constexpr Content Common(uint64_t number) { return number * 2 + 1; }
constexpr Content Unique(uint64_t number) { return (number + 1) * 2; }

}  // namespace

Heap::Heap(const HeapOptions& options) : options_(options) {
  for (uint64_t guest = 0; guest < options.guests; ++guest) {
    void* memory = mmap(nullptr, options.size_mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the heap");
    // A kernel without huge pages refuses both, and needs neither.
    if (options.huge) madvise(memory, options.size_mib << 20, MADV_HUGEPAGE);
    if (options.no_huge) madvise(memory, options.size_mib << 20, MADV_NOHUGEPAGE);
    memory_.push_back(static_cast<unsigned char*>(memory));
  }
  // Each guest consists of units of run_length pages of one kind: first the zero ones, then the common, then the unique
  // ones, or, scattered, in any order. A common unit is a stretch of the list of common contents.
  const uint64_t unit = options.run_length, units = pages_per_guest() / unit;
  for (uint64_t guest = 0; guest < options.guests; ++guest) {
    std::mt19937_64 random(Mix(options.seed, guest));
    std::vector<char> kinds(units, 'u');
    std::fill_n(kinds.begin(), units * options.zero / 100, 'z');
    std::fill_n(kinds.begin() + static_cast<ptrdiff_t>(units * options.zero / 100), units * options.duplicate / 100,
                'd');
    for (uint64_t i = units; options.scattered && i > 1; --i) std::swap(kinds[i - 1], kinds[random() % i]);
    for (uint64_t i = 0; i < pages_per_guest(); ++i) {
      const char kind = i / unit < units ? kinds[i / unit] : 'u';
      if (kind == 'd' && i % unit == 0) {
        const uint64_t stretches = std::max<uint64_t>(options.contents / unit, 1);
        const uint64_t first = random() % stretches * unit;
        for (uint64_t j = 0; j < unit; ++j) model_.push_back(Common((first + j) % options.contents));
      } else if (kind != 'd') {
        model_.push_back(kind == 'z' ? kZeros : Unique(unique_++));
      }
    }
  }
}

uint64_t Heap::discarded_pages() const {
  return static_cast<uint64_t>(std::count(model_.begin(), model_.end(), kDiscarded));
}

Attainable Heap::CountAttainable(uint64_t max_page_sharing) const {
  std::vector<uint64_t> populated = model_;
  std::erase(populated, kDiscarded);
  return examples::CountAttainable(std::move(populated), max_page_sharing);
}

void Heap::Write(unsigned char* destination, uint64_t content) const {
  if (content == kZeros || content == kDiscarded) {
    memset(destination, 0, PageSize());
  } else if (options_.alike) {
    memset(destination, 0x5a, PageSize() - sizeof content);
    memcpy(destination + PageSize() - sizeof content, &content, sizeof content);
  } else {
    FillPage(destination, Mix(options_.seed, content));
  }
}

void Heap::Fill() {
  for (uint64_t number = 0; number < model_.size(); ++number) Write(page(number), model_[number]);
}

void Heap::Advise(int advice) {
  for (unsigned char* memory : memory_) examples::Advise(memory, options_.size_mib << 20, advice);
}

void Heap::Merge(LiveLine* line) {
  for (unsigned char* memory : memory_) {
    while (ksmu_merge(memory, options_.size_mib << 20) < 0) {
      if (errno != EINTR) throw LibraryError("ksmu_merge");
    }
    line->Show(ReadStats());
  }
  line->End();
}

void Heap::Discard(unsigned char* page) const {
  // With the promise only the library may discard; without it the kernel is asked directly, which is the harder case.
  const int failed =
      options_.promise ? ksmu_advise(page, PageSize(), KSMU_DISCARD) : madvise(page, PageSize(), MADV_DONTNEED);
  if (failed != 0) throw std::runtime_error(std::string("discard: ") + strerror(errno));
}

bool Heap::CheckPage(uint64_t number, unsigned char* scratch) {
  constexpr uint64_t kMaxReports = 5;
  const unsigned char* found = page(number);
  Write(scratch, model_[number]);
  if (memcmp(scratch, found, PageSize()) == 0) return true;
  if (wrong_++ < kMaxReports) {
    size_t at = 0;
    while (found[at] == scratch[at] && at + 1 < PageSize()) ++at;
    fprintf(stderr, "WRONG: page %zu (%p, %s) byte %zu is 0x%02x instead of 0x%02x\n", static_cast<size_t>(number),
            static_cast<const void*>(found), Explain(found).c_str(), at, found[at], scratch[at]);
  }
  return false;
}

void Heap::Churn(uint64_t thread, const std::atomic<bool>* stop) {
  std::mt19937_64 random(Mix(options_.seed ^ 0x636875726e, thread));
  std::vector<unsigned char> scratch(PageSize());
  const double start = NowSeconds();
  const double rate = static_cast<double>(options_.churn) / static_cast<double>(options_.churn_threads);
  const uint64_t pages = (model_.size() - thread + options_.churn_threads - 1) / options_.churn_threads;
  for (uint64_t done = 0; !*stop && pages != 0;) {
    const uint64_t due = static_cast<uint64_t>((NowSeconds() - start) * rate);
    for (; done < due && !*stop; ++done) {
      const uint64_t number = random() % pages * options_.churn_threads + thread;
      CheckPage(number, scratch.data());
      if (random() % 100 < options_.discard) {
        Discard(page(number));
        model_[number] = kDiscarded;
        ++discards_;
      } else {
        // Most of what a guest writes is new; some of it is in other guests too, and some is zeros.
        const uint64_t dice = random() % 4;
        model_[number] = dice == 0 ? kZeros : dice == 1 ? Common(random() % options_.contents) : Unique(unique_++);
        Write(page(number), model_[number]);
        ++writes_;
      }
    }
    usleep(1000);
  }
}

void Heap::CheckAll(const char* when) {
  std::vector<unsigned char> scratch(PageSize());
  const double start = NowSeconds();
  const uint64_t wrong_before = wrong_;
  for (uint64_t number = 0; number < model_.size(); ++number) CheckPage(number, scratch.data());
  const uint64_t wrong = wrong_ - wrong_before;
  printf("checked %s: %s pages right, %s wrong (%.1f MiB, %.1f s)\n", when, Grouped(model_.size() - wrong).c_str(),
         Grouped(wrong).c_str(), Mebibytes(static_cast<double>(model_.size() * PageSize())), NowSeconds() - start);
}

}  // namespace examples
