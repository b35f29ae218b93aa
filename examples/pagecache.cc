// The main job on real input: the page caches of several guests, as the hypervisor that holds them in its memory sees
// them. Files are read page by page into anonymous memory, the memory is advised, and the pages that the guests have in
// common become one. Then everything is checked: the savings by the kernel's accounts, the bytes against the files.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <exception>
#include <optional>
#include <thread>

#include "accounting.h"
#include "beside_ksm.h"
#include "command_line.h"
#include "pagecache_input.h"
#include "pages.h"
#include "report.h"

namespace examples {
namespace {

struct Options {
  LayoutOptions layout;
  uint64_t limit_mib = 0;
  uint64_t seconds = 120;
  uint64_t cpu_limit = 100;
  std::string paths = "/usr/lib:/usr/bin";
  bool promise = false;
  bool merge = false;
  bool huge = false;     // MADV_HUGEPAGE
  bool no_huge = false;  // MADV_NOHUGEPAGE; neither: as the system has it
  bool no_ksm = false;
};

// One guest: an anonymous mapping, as QEMU makes it, with the pages of files in it.
struct Guest {
  unsigned char* memory = nullptr;
  uint64_t pages = 0;
  std::vector<Extent> extents;
  unsigned char* page(uint64_t number) const { return memory + number * PageSize(); }
  size_t bytes() const { return pages * PageSize(); }
};

// What a page in the tenth that is rewritten gets. Each way of writing breaks a merged page on a path of its own.
enum class Rewrite { kNone, kWhole, kSomeBytes, kBySystemCall };

class PageCache {
 public:
  PageCache(const Options& options, std::vector<InputFile> files)
      : options_(options), files_(std::move(files)), expected_(PageSize()) {}
  ~PageCache() {
    for (const Guest& guest : guests_) munmap(guest.memory, guest.bytes());
  }
  PageCache(const PageCache&) = delete;

  void Load();
  Attainable CountAttainable(uint64_t max_page_sharing) const;
  void AdviseAll(int advice);
  void MergeAll(LiveLine* line);
  void RewriteATenth();
  uint64_t Check(const char* when);  // returns the number of wrong pages
  uint64_t pages() const;
  std::vector<iovec> areas() const;

 private:
  Rewrite RewriteOf(uint64_t guest, uint64_t page) const;
  uint64_t ContentSeed(uint64_t guest, uint64_t page) const {
    return Mix(options_.layout.seed ^ 0x6f776e, guest << 40 | page);
  }
  // Replaces all or some bytes of a page by the guest's own.
  void Apply(Rewrite rewrite, uint64_t guest, uint64_t page, unsigned char* destination) const;

  Options options_;
  std::vector<InputFile> files_;
  std::vector<Guest> guests_;
  std::vector<unsigned char> expected_;
  bool rewritten_ = false;
};

void PageCache::Load() {
  const double start = NowSeconds();
  FileReader reader(&files_);
  for (std::vector<Extent>& extents : LayOut(files_, options_.layout)) {
    Guest guest{.extents = std::move(extents)};
    if (!guest.extents.empty()) guest.pages = guest.extents.back().position + guest.extents.back().pages;
    if (guest.pages == 0) throw std::runtime_error("the files are too few or too small for so many guests");
    void* memory = mmap(nullptr, guest.bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the guests");
    guest.memory = static_cast<unsigned char*>(memory);
    // A kernel without huge pages refuses both, and needs neither.
    if (options_.huge) madvise(memory, guest.bytes(), MADV_HUGEPAGE);
    if (options_.no_huge) madvise(memory, guest.bytes(), MADV_NOHUGEPAGE);
    for (const Extent& extent : guest.extents) {
      for (uint64_t i = 0; i < extent.pages; ++i) {
        reader.ReadPage(extent.file, extent.first_page + i, guest.page(extent.position + i));
      }
    }
    guests_.push_back(std::move(guest));
  }
  std::vector<bool> used(files_.size());
  uint64_t files = 0;
  for (const Guest& guest : guests_) {
    for (const Extent& extent : guest.extents) {
      if (!used[extent.file]) ++files;
      used[extent.file] = true;
    }
  }
  printf("input: %zu guests of %.1f MiB, with %s of the %s files in %s, read in %.1f s\n", guests_.size(),
         Mebibytes(static_cast<double>(guests_[0].bytes())), Grouped(files).c_str(), Grouped(files_.size()).c_str(),
         options_.paths.c_str(), NowSeconds() - start);
}

uint64_t PageCache::pages() const {
  uint64_t pages = 0;
  for (const Guest& guest : guests_) pages += guest.pages;
  return pages;
}

std::vector<iovec> PageCache::areas() const {
  std::vector<iovec> areas;
  for (const Guest& guest : guests_) areas.push_back({guest.memory, guest.bytes()});
  return areas;
}

Attainable PageCache::CountAttainable(uint64_t max_page_sharing) const {
  std::vector<uint64_t> keys;
  keys.reserve(pages());
  for (const Guest& guest : guests_) {
    for (uint64_t page = 0; page < guest.pages; ++page) keys.push_back(ContentKey(guest.page(page)));
  }
  return examples::CountAttainable(std::move(keys), max_page_sharing);
}

void PageCache::AdviseAll(int advice) {
  for (const Guest& guest : guests_) Advise(guest.memory, guest.bytes(), advice);
}

void PageCache::MergeAll(LiveLine* line) {
  for (const Guest& guest : guests_) {
    while (ksmu_merge(guest.memory, guest.bytes()) < 0) {
      if (errno != EINTR) throw LibraryError("ksmu_merge");
    }
    line->Show(ReadStats());
  }
  line->End();
}

Rewrite PageCache::RewriteOf(uint64_t guest, uint64_t page) const {
  const uint64_t dice = Mix(options_.layout.seed ^ 0x64696365, guest << 40 | page);
  if (dice % 10 != 0) return Rewrite::kNone;
  constexpr Rewrite kWays[] = {Rewrite::kWhole, Rewrite::kSomeBytes, Rewrite::kBySystemCall};
  return kWays[dice / 10 % 3];
}

void PageCache::Apply(Rewrite rewrite, uint64_t guest, uint64_t page, unsigned char* destination) const {
  const uint64_t seed = ContentSeed(guest, page);
  if (rewrite == Rewrite::kSomeBytes) {
    memcpy(destination + seed % (PageSize() - sizeof seed), &seed, sizeof seed);
  } else {
    FillPage(destination, seed);
  }
}

void PageCache::RewriteATenth() {
  int ends[2];
  if (pipe(ends) != 0) throw std::runtime_error("no pipe");
  std::vector<unsigned char> own(PageSize());
  uint64_t count = 0;
  for (uint64_t guest = 0; guest < guests_.size(); ++guest) {
    for (uint64_t page = 0; page < guests_[guest].pages; ++page) {
      const Rewrite rewrite = RewriteOf(guest, page);
      unsigned char* destination = guests_[guest].page(page);
      if (rewrite == Rewrite::kNone) continue;
      ++count;
      if (rewrite != Rewrite::kBySystemCall) {
        Apply(rewrite, guest, page, destination);
        continue;
      }
      Apply(rewrite, guest, page, own.data());
      const ssize_t size = static_cast<ssize_t>(PageSize());
      if (write(ends[1], own.data(), PageSize()) != size || read(ends[0], destination, PageSize()) != size) {
        throw std::runtime_error(std::string("read(2) into a merged page: ") + strerror(errno));
      }
    }
  }
  close(ends[0]);
  close(ends[1]);
  rewritten_ = true;
  printf("rewrote %s pages: whole, some bytes, or by read(2)\n", Grouped(count).c_str());
}

uint64_t PageCache::Check(const char* when) {
  constexpr uint64_t kMaxReports = 5;
  const double start = NowSeconds();
  FileReader reader(&files_);
  uint64_t right = 0, wrong = 0, unchecked = 0;
  for (uint64_t g = 0; g < guests_.size(); ++g) {
    const Guest& guest = guests_[g];
    for (const Extent& extent : guest.extents) {
      for (uint64_t i = 0; i < extent.pages; ++i) {
        const uint64_t page = extent.position + i;
        const Rewrite rewrite = rewritten_ ? RewriteOf(g, page) : Rewrite::kNone;
        const bool needs_file = rewrite == Rewrite::kNone || rewrite == Rewrite::kSomeBytes;
        std::fill(expected_.begin(), expected_.end(), 0);
        if (needs_file && !reader.ReadPage(extent.file, extent.first_page + i, expected_.data())) {
          ++unchecked;
          continue;
        }
        if (rewrite != Rewrite::kNone) Apply(rewrite, g, page, expected_.data());
        if (memcmp(expected_.data(), guest.page(page), PageSize()) == 0) {
          ++right;
        } else if (needs_file && !reader.StillTheSame(extent.file)) {
          ++unchecked;
        } else if (++wrong <= kMaxReports) {
          size_t at = 0;
          while (expected_[at] == guest.page(page)[at] && at + 1 < PageSize()) ++at;
          fprintf(stderr, "WRONG: guest %zu page %zu (%p, %s) byte %zu is 0x%02x instead of 0x%02x (%s)\n",
                  static_cast<size_t>(g), static_cast<size_t>(page), static_cast<void*>(guest.page(page)),
                  Explain(guest.page(page)).c_str(), at, guest.page(page)[at], expected_[at],
                  files_[extent.file].path.c_str());
        }
      }
    }
  }
  printf("checked %s: %s pages right, %s wrong (%.1f MiB, %.1f s)\n", when, Grouped(right).c_str(),
         Grouped(wrong).c_str(), Mebibytes(static_cast<double>(right * PageSize())), NowSeconds() - start);
  if (unchecked != 0) {
    printf("  %s pages could not be checked: their files have changed meanwhile:\n", Grouped(unchecked).c_str());
    for (const InputFile& file : files_) {
      if (file.changed) printf("    %s\n", file.path.c_str());
    }
  }
  return wrong;
}

CommandLine::Result ParseOptions(int argc, char** argv, Options* options) {
  CommandLine line(
      "pagecache",
      "Reads files into the anonymous memory of several \"guests\", as their page caches would hold them, merges it,\n"
      "shows what that saves by the kernel's accounts, and checks every byte: merged, rewritten in part, unmerged.",
      kExitStatuses);
  LayoutOptions& layout = options->layout;
  line.Number("guests", "N", &layout.guests, 1, 4096, "number of guests");
  line.Number("limit-mib", "MIB", &options->limit_mib, 0, 1 << 24,
              "memory of all guests together; 0: 256 MiB a guest, at most a third of what is available");
  line.Text("paths", "DIR[:DIR...]", &options->paths, "where the files are");
  line.Number("seed", "S", &layout.seed, 0, UINT64_MAX, "another seed, other guests");
  line.Number("overlap", "PERCENT", &layout.overlap_percent, 0, 100,
              "of the common files are in each guest; the rest of a guest is files of its own");
  line.Number("chunk", "PAGES", &layout.chunk_pages, 0, 1 << 20,
              "files lie in pieces of this size, in any order; 32: read-ahead's 128 KiB; 0: whole files");
  line.Flag("exact", &options->promise, "advise without flags: raw discards stay exact (default)", false);
  line.Flag("promise", &options->promise, "advise with KSMU_F_NO_RAW_DISCARDS: merging is cheaper");
  line.Flag("merge", &options->merge, "merge by ksmu_merge at once instead of waiting for the scanner");
  line.Flag("huge", &options->huge, "ask for transparent huge pages, as QEMU does");
  line.Flag("no-huge", &options->no_huge, "refuse them; neither: as the system has it");
  line.Flag("no-ksm", &options->no_ksm, "do not have the kernel's KSM do the same afterwards (as root, where nobody uses it)");
  line.Number("seconds", "S", &options->seconds, 1, 1 << 20, "wait no longer than this for savings to stop growing");
  line.Number("cpu-limit", "PERCENT", &options->cpu_limit, 0, 100, "the library's cpu_limit_percent; 0: no limit");
  const CommandLine::Result result = line.Parse(argc, argv);
  if (result != CommandLine::Result::kRun) return result;

  // Files that are new to the system's page cache do not count: it gives them up again.
  const uint64_t available_mib = AllocatableBytes() >> 20;
  if (options->limit_mib == 0)
    options->limit_mib = std::min(layout.guests * 256, std::max<uint64_t>(available_mib / 3, 1));
  if (options->limit_mib * 10 > available_mib * 9) {
    fprintf(stderr, "pagecache: --limit-mib %zu, but only %zu MiB of memory are available\n",
            static_cast<size_t>(options->limit_mib), static_cast<size_t>(available_mib));
    return CommandLine::Result::kUsage;
  }
  layout.pages_per_guest = (options->limit_mib << 20) / PageSize() / layout.guests;
  return result;
}

// The same files in memory of their own, under the kernel's KSM: what it saves, how soon, and for how much CPU time.
void CompareWithKsm(const Options& options, const std::vector<InputFile>& files, const Savings& savings, double seconds,
                    double cpu_seconds) {
  if (const std::string why = WhyNoKsm(); !why.empty()) {
    printf("\nnot put beside the kernel's KSM: %s\n", why.c_str());
    return;
  }
  printf("\nthe same under the kernel's KSM, flat out; its settings are put back\n");
  KsmRun ksm;
  {
    PageCache cache(options, files);
    cache.Load();
    if (!MergeByKsm(cache.areas(), static_cast<double>(options.seconds), &ksm)) return;
  }
  printf("  %-6s %12s %14s %20s %10s %10s\n", "", "pages saved", "Pss saved, MiB", "MemAvailable, MiB", "after", "CPU");
  const auto print = [](const char* name, const Savings& s, uint64_t pages, double after, double cpu) {
    printf("  %-6s %12s %14.1f %20.1f %8.1f s %8.2f s\n", name, Grouped(pages).c_str(), Mebibytes(s.pss_saved()),
           Mebibytes(s.available_gained()), after, cpu);
  };
  print("ksmu", savings, SavedPages(savings.stats), seconds, cpu_seconds);
  const Savings kernels{.before = ksm.before, .after = ksm.after};
  print("KSM", kernels, ksm.saved_pages, ksm.seconds, ksm.cpu_seconds);
}

int Run(const Options& options) {
  uint64_t unreadable = 0;
  std::vector<InputFile> files = ListFiles(options.paths, &unreadable);
  if (unreadable != 0) printf("%s files may not be read by this user: left out\n", Grouped(unreadable).c_str());
  if (files.empty()) {
    fprintf(stderr, "pagecache: no readable files in %s\n", options.paths.c_str());
    return kExitUsage;
  }
  std::optional<PageCache> guests(std::in_place, options, files);
  PageCache& cache = *guests;
  cache.Load();

  // Before the start: what the library itself takes is to show.
  int64_t max_page_sharing = 256;
  ksmu_get("max_page_sharing", &max_page_sharing);
  const Attainable attainable = cache.CountAttainable(static_cast<uint64_t>(max_page_sharing));
  printf("of %s pages %s can be saved: %s duplicates and %s that are all zeros\n", Grouped(attainable.pages).c_str(),
         Grouped(attainable.total()).c_str(), Grouped(attainable.duplicates).c_str(), Grouped(attainable.zero).c_str());
  const KernelAccount before = ReadKernelAccount();
  if (!StartLibrary(options.cpu_limit)) return kExitCannotStart;

  LiveLine line(attainable);
  cache.AdviseAll(KSMU_MERGEABLE | (options.promise ? KSMU_F_NO_RAW_DISCARDS : 0));
  printf("advised%s; %s\n\n", options.promise ? " with KSMU_F_NO_RAW_DISCARDS" : "",
         options.merge ? "merging by ksmu_merge" : "the scanner does the rest");
  Progress progress;
  if (options.merge) {
    if (ksmu_set("run", 0) != 0) throw LibraryError("ksmu_set(run, 0)");
    const double start = line.seconds();
    cache.MergeAll(&line);
    progress.seconds_to_last_growth = line.seconds() - start;
    if (ksmu_set("run", 1) != 0) throw LibraryError("ksmu_set(run, 1)");
  } else {
    progress = Watch(&line, attainable, static_cast<double>(options.seconds), {});
  }
  const Savings savings = TakeSavings(before);
  PrintSavings(savings, attainable);
  PrintReasons(savings.stats);
  const double cpu_seconds = LibraryCpuSeconds();
  printf("it took %.1f s, and %.2f s of CPU\n", progress.seconds_to_last_growth, cpu_seconds);

  uint64_t wrong = cache.Check("merged");
  cache.RewriteATenth();
  wrong += cache.Check("rewritten in part");
  WaitForPasses();
  const ksmu_stats stats = ReadStats();
  printf("  %s pages got their own copy back, %s are merged or zero now\n",
         Grouped(static_cast<uint64_t>(stats.cow_breaks)).c_str(),
         Grouped(static_cast<uint64_t>(stats.pages_merged + stats.ksm_zero_pages)).c_str());
  const double unmerge_start = NowSeconds();
  cache.AdviseAll(KSMU_UNMERGEABLE);
  const double unmerge_seconds = NowSeconds() - unmerge_start;
  wrong += cache.Check("unmerged");
  printf("  that took %.1f s; Pss is %.1f MiB again, after %.1f MiB at first\n", unmerge_seconds,
         Mebibytes(static_cast<double>(ProcessPss())), Mebibytes(static_cast<double>(before.pss_bytes)));
  if (ksmu_stop() != 0) throw LibraryError("ksmu_stop");

  if (wrong != 0) {
    printf("FAILED: %s wrong pages\n", Grouped(wrong).c_str());
    return kExitWrongBytes;
  }
  if (SavedPages(savings.stats) == 0) {
    printf("FAILED: nothing was merged\n");
    return kExitFailed;
  }
  printf("every byte was right\n");
  guests.reset();
  if (!options.no_ksm) CompareWithKsm(options, files, savings, progress.seconds_to_last_growth, cpu_seconds);
  return kExitOk;
}

}  // namespace
}  // namespace examples

int main(int argc, char** argv) {
  using examples::CommandLine;
  setvbuf(stdout, nullptr, _IOLBF, 0);  // each line at once, also into a pipe
  try {
    examples::Options options;
    switch (examples::ParseOptions(argc, argv, &options)) {
      case CommandLine::Result::kHelp:
        return examples::kExitOk;
      case CommandLine::Result::kUsage:
        return examples::kExitUsage;
      case CommandLine::Result::kRun:
        return examples::Run(options);
    }
  } catch (const std::exception& error) {
    fprintf(stderr, "pagecache: %s\n", error.what());
  }
  return examples::kExitFailed;
}
