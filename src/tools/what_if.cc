// ksmuctl what-if: what would be saved if ksmu merged the memory of these processes, in one domain. Only looks.
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "content/content.h"
#include "os/raw.h"
#include "os/uapi.h"
#include "tools/commands.h"
#include "tools/foreign.h"
#include "tools/output.h"

namespace ksmu::tools {
namespace {

constexpr const char* kUsage =
    "usage: ksmuctl what-if [option...] PID...\n"
    "What ksmu would save by merging the memory of these processes, in one domain. Nothing of theirs is changed, and no page made\n"
    "or swapped in: of private, writable, anonymous memory the pages that are there are read, twice. What has changed in between\n"
    "would not be merged.\n"
    "\n"
    "  --seconds N      between the two looks, 1 by default\n"
    "  --max-pages N    look at no more pages than that: each takes 16 bytes here. 16,777,216 by default (256 MiB, for 64 GiB)\n"
    "  --json           the same, as one object\n"
    "  --help           this text\n"
    "\n"
    "exit status: 0; 1 a process is not there, may not be looked at, or has ended meanwhile; 2 usage.\n";

constexpr std::uint64_t kMostPages = 1ull << 24, kMostPagesEver = 1ull << 36, kMostSeconds = 86'400;
constexpr std::size_t kMostProcesses = 1u << 12;
constexpr std::size_t kBatch = 256;  // pages that are read at once: soon after it was seen that they are there

// What is kept of a page: in the order of addresses until the second look is over.
struct Record {
  std::uint64_t hash;
  std::uint64_t where;  // number of the page, and of the process
  static constexpr int kProcessBits = 12;
  static Record Of(std::uint64_t hash, std::uint64_t page, std::size_t process) { return {hash, page << kProcessBits | process}; }
  std::uint64_t page() const { return where >> kProcessBits; }
  std::size_t process() const { return where & (kMostProcesses - 1); }
};
static_assert(sizeof(Record) == 16 && kMostProcesses == 1u << Record::kProcessBits);

// Room for as many as there may be; what is not used takes no memory.
class Records {
 public:
  explicit Records(std::uint64_t most) : most_(most) {
    void* const memory =
        mmap(nullptr, most * sizeof(Record), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory != MAP_FAILED) data_ = static_cast<Record*>(memory);
  }
  Records(const Records&) = delete;
  ~Records() {
    if (data_) munmap(data_, most_ * sizeof(Record));
  }
  bool ok() const { return data_; }
  bool full() const { return size_ == most_; }
  void Add(Record record) { data_[size_++] = record; }
  Record* begin() { return data_; }
  Record* end() { return data_ + size_; }
  void Shrink(Record* end) { size_ = static_cast<std::uint64_t>(end - data_); }
  std::uint64_t size() const { return size_; }

 private:
  const std::uint64_t most_;
  Record* data_ = nullptr;
  std::uint64_t size_ = 0;
};

// Pages. Looked at: the sum of zero to shared.
struct Counts {
  std::uint64_t looked_at = 0;
  std::uint64_t zero = 0, within = 0, across = 0, unique = 0, changing = 0, shared = 0, ksm = 0;
  std::uint64_t huge = 0;  // of those looked at
  std::uint64_t frames = 0, kernel_zero = 0, swapped = 0, heap_and_stack = 0;  // not looked at
  std::uint64_t saved() const { return zero + within + across; }
};

struct Options {
  std::vector<int> pids;
  std::uint64_t seconds = 1, most_pages = kMostPages;
  bool json = false;
};

class WhatIf {
 public:
  WhatIf(const Options& options, Records* records)
      : options_(options), records_(*records), page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))), buffer_(kBatch * page_) {
    flags_ = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
  }
  ~WhatIf() {
    if (flags_ >= 0) close(flags_);
  }

  // False: *why.
  bool Run(std::string* why) {
    for (const int pid : options_.pids) {
      processes_.emplace_back();
      if (!processes_.back().Open(pid, why)) return false;
    }
    for (std::size_t i = 0; i < processes_.size(); ++i) {
      if (!FirstLook(i, why)) return false;
    }
    timespec rest{static_cast<time_t>(options_.seconds), 0};
    while (clock_nanosleep(CLOCK_MONOTONIC, 0, &rest, &rest) == EINTR) {
    }
    if (!SecondLook(why)) return false;
    for (const Foreign& process : processes_) {
      if (process.HasEnded(why)) return false;
    }
    Count();
    return true;
  }
  const Counts& counts() const { return counts_; }
  bool complete() const { return complete_; }
  bool knows_ksm() const { return knows_ksm_; }
  std::size_t page_bytes() const { return page_; }

 private:
  // What the library refuses to have advised: libc's heap, the stack, what is no plain memory.
  static bool IsMergeable(const ForeignMapping& one) {
    const os::Mapping& mapping = one.mapping;
    return !mapping.shared && mapping.writable &&
           (one.frames || (mapping.anonymous && !mapping.special && !mapping.heap && !mapping.stack));
  }

  bool FirstLook(std::size_t number, std::string* why) {
    const Foreign& process = processes_[number];
    std::vector<ForeignMapping> mappings;
    if (!process.ReadMappings(&mappings, why)) return false;
    std::vector<os::PageRun> runs;
    for (const ForeignMapping& one : mappings) {
      const bool apart = !one.mapping.shared && (one.mapping.heap || one.mapping.stack);
      if (!apart && !IsMergeable(one)) continue;
      for (os::Address at = one.mapping.start; at < one.mapping.end;) {
        process.NextRuns(&at, one.mapping.end, &runs);
        for (const os::PageRun& run : runs) {
          const std::uint64_t pages = (run.end - run.start) / page_;
          if (!(run.categories & os::kPresent)) counts_.swapped += pages;
          else if (run.categories & os::kFile) counts_.frames += pages;
          else if (run.categories & os::kPfnZero) counts_.kernel_zero += pages;
          else if (apart) counts_.heap_and_stack += pages;
          else if (!LookAtRun(number, run, why)) return false;
        }
      }
    }
    return true;
  }

  bool LookAtRun(std::size_t number, const os::PageRun& run, std::string* why) {
    for (os::Address at = run.start; at < run.end && complete_; at += kBatch * page_) {
      const std::size_t pages = std::min<std::size_t>(kBatch, (run.end - at) / page_);
      const auto take = [&](std::size_t i, std::uint64_t entry, const void* bytes) {
        if (records_.full()) return complete_ = false;
        ++counts_.looked_at;
        counts_.huge += (run.categories & os::kHuge) != 0;
        if (IsShared(entry)) NoteShared(entry);
        else if (!bytes) ++counts_.changing;
        else records_.Add(Record::Of(content::Hash(bytes, page_, 0), at / page_ + i, number));
        return true;
      };
      if (!ReadPages(processes_[number], at, pages, take, why)) return false;
    }
    return true;
  }

  static bool IsOwn(std::uint64_t entry) {
    constexpr std::uint64_t kOwn = os::uapi::kPagemapPresent | os::uapi::kPagemapExclusive;
    return (entry & kOwn) == kOwn;
  }
  static bool IsShared(std::uint64_t entry) { return (entry & os::uapi::kPagemapPresent) && !IsOwn(entry); }

  // Calls take(which, its entry, its bytes or null) for each, as long as that says true. Only what is there is read: else reading
  // would make it, or bring it in. And only what is mapped once: process_vm_readv pins, and the kernel then copies an anonymous
  // page that a fork or KSM has shared (seen on 6.18), which would undo what is saved.
  bool ReadPages(const Foreign& process, os::Address start, std::size_t pages,
                 const std::function<bool(std::size_t, std::uint64_t, const void*)>& take, std::string* why) {
    std::uint64_t entries[kBatch];
    process.ReadEntries(start, entries, pages);
    for (std::size_t i = 0; i < pages;) {
      std::size_t own = 0;
      while (i + own < pages && IsOwn(entries[i + own])) ++own;
      const std::ptrdiff_t got = own ? process.Read(start + i * page_, buffer_.data(), own * page_) : 0;
      if (got == -EPERM || got == -EACCES || got == -ENOSYS || got == -ESRCH) {
        if (!process.HasEnded(why)) *why = process.WhyNot(static_cast<int>(got));
        return false;
      }
      const std::size_t whole = got > 0 ? static_cast<std::size_t>(got) / page_ : 0;
      for (std::size_t k = 0; k < whole; ++k) {
        if (!take(i + k, entries[i + k], buffer_.data() + k * page_)) return true;
      }
      i += whole;
      if (whole < own || own == 0) {
        if (!take(i, entries[i], nullptr)) return true;
        ++i;
      }
    }
    return true;
  }

  // By a fork, or by KSM: which of both only root is told.
  void NoteShared(std::uint64_t entry) {
    ++counts_.shared;
    const std::uint64_t frame = entry & os::uapi::kPagemapFrame;
    std::uint64_t flags = 0;
    if (!frame || flags_ < 0) return;
    if (pread(flags_, &flags, sizeof flags, static_cast<off_t>(frame * sizeof flags)) != sizeof flags) return;
    counts_.ksm += (flags & os::uapi::kPageFlagKsm) != 0;
  }

  bool SecondLook(std::string* why) {
    Record* kept = records_.begin();
    for (Record* first = records_.begin(); first < records_.end();) {
      std::size_t pages = 1;
      while (pages < kBatch && first + pages < records_.end() &&
             first[pages].where == first->where + (pages << Record::kProcessBits))
        ++pages;
      const auto take = [&](std::size_t i, std::uint64_t, const void* bytes) {
        const Record record = first[i];
        if (bytes && content::Hash(bytes, page_, 0) == record.hash) *kept++ = record;
        else ++counts_.changing;
        return true;
      };
      if (!ReadPages(processes_[first->process()], first->page() * page_, pages, take, why)) return false;
      first += pages;
    }
    records_.Shrink(kept);
    return true;
  }

  void Count() {
    // Whether it can be told: a page of this process's own, since numbers of frames read as 0 without the right to them.
    std::uint64_t entry = 0, flags = 0;
    if (const int own = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC); own >= 0) {
      const auto address = reinterpret_cast<std::uintptr_t>(buffer_.data());
      if (pread(own, &entry, sizeof entry, static_cast<off_t>(address / page_ * sizeof entry)) != sizeof entry) entry = 0;
      close(own);
    }
    const auto frame = static_cast<off_t>(entry & os::uapi::kPagemapFrame);
    knows_ksm_ =
        frame && flags_ >= 0 && pread(flags_, &flags, sizeof flags, frame * static_cast<off_t>(sizeof flags)) == sizeof flags;

    std::memset(buffer_.data(), 0, page_);
    const std::uint64_t zero = content::Hash(buffer_.data(), page_, 0);
    std::sort(records_.begin(), records_.end(), [](const Record& a, const Record& b) {
      return a.hash != b.hash ? a.hash < b.hash : a.process() < b.process();
    });
    for (const Record* first = records_.begin(); first < records_.end();) {
      const Record* end = first;
      std::uint64_t processes = 0;
      for (; end < records_.end() && end->hash == first->hash; ++end)
        processes += end == first || end->process() != end[-1].process();
      const auto pages = static_cast<std::uint64_t>(end - first);
      if (first->hash == zero) {
        counts_.zero += pages;
      } else {
        ++counts_.unique;
        counts_.across += processes - 1;
        counts_.within += pages - processes;
      }
      first = end;
    }
  }

  const Options& options_;
  Records& records_;
  const std::size_t page_;
  std::vector<char> buffer_;
  std::vector<Foreign> processes_;
  Counts counts_;
  int flags_ = -1;
  bool complete_ = true, knows_ksm_ = false;
};

int Usage(const std::string& what) {
  std::fprintf(stderr, "ksmuctl what-if: %s\n%s", what.c_str(), kUsage);
  return 2;
}

bool ParseNumber(const char* text, std::uint64_t least, std::uint64_t most, std::uint64_t* out) {
  const char* const end = text + std::strlen(text);
  const auto parsed = std::from_chars(text, end, *out);
  return parsed.ec == std::errc() && parsed.ptr == end && *out >= least && *out <= most;
}

void Print(const Options& options, const WhatIf& what_if) {
  const Counts& counts = what_if.counts();
  const auto line = [&](const char* name, std::uint64_t pages, const char* remark) {
    std::printf("%-22s %14s pages %12s MiB  %s\n", name, Grouped(pages).c_str(), MiB(pages * what_if.page_bytes()).c_str(), remark);
  };
  std::string pids;
  for (const int pid : options.pids) pids += " " + std::to_string(pid);
  std::printf("process%s:%s\n", options.pids.size() > 1 ? "es" : "", pids.c_str());
  line("looked at", counts.looked_at, "private, writable, anonymous, and there");
  line("  zero", counts.zero, "all bytes are 0");
  line("  duplicates within", counts.within, "of another page of the same process");
  if (options.pids.size() > 1) line("  duplicates across", counts.across, "of a page of another of these processes");
  line("  unique", counts.unique, "one of each content");
  line("  changing", counts.changing, ("changed, or gone, within " + std::to_string(options.seconds) + " s").c_str());
  const std::string ksm = what_if.knows_ksm() ? Grouped(counts.ksm) + " by KSM" : "by KSM or a fork: which of both, root is told";
  line("  shared already", counts.shared, ksm.c_str());
  line("would be saved", counts.saved(),
       counts.looked_at ? (std::to_string(counts.saved() * 100 / counts.looked_at) + " %").c_str() : "");
  line("in huge pages", counts.huge, "of those looked at: they are split for it");
  std::printf(
      "not looked at: %s pages that ksmu shares, %s of the kernel's zero page, %s swapped, %s of libc's heap and the stack\n",
      Grouped(counts.frames).c_str(), Grouped(counts.kernel_zero).c_str(), Grouped(counts.swapped).c_str(),
      Grouped(counts.heap_and_stack).c_str());
  if (!what_if.complete()) std::printf("the rest neither: --max-pages %s is reached\n", std::to_string(options.most_pages).c_str());
}

void PrintJson(const Options& options, const WhatIf& what_if) {
  const Counts& counts = what_if.counts();
  std::string pids;
  for (const int pid : options.pids) pids += (pids.empty() ? "" : ", ") + std::to_string(pid);
  std::printf("{\"pids\": [%s], \"page_bytes\": %zu, \"seconds\": %s, \"complete\": %s", pids.c_str(), what_if.page_bytes(),
              std::to_string(options.seconds).c_str(), what_if.complete() ? "true" : "false");
  const std::pair<const char*, std::uint64_t> numbers[] = {
      {"looked_at", counts.looked_at},       {"zero", counts.zero},           {"duplicates_within", counts.within},
      {"duplicates_across", counts.across},  {"unique", counts.unique},       {"changing", counts.changing},
      {"shared_already", counts.shared},     {"huge", counts.huge},           {"frames", counts.frames},
      {"kernel_zero", counts.kernel_zero},   {"swapped", counts.swapped},     {"heap_and_stack", counts.heap_and_stack},
      {"saved_pages", counts.saved()},       {"saved_bytes", counts.saved() * what_if.page_bytes()},
  };
  for (const auto& [name, number] : numbers) std::printf(", \"%s\": %s", name, std::to_string(number).c_str());
  // What cannot be told is no 0.
  std::printf(", \"ksm\": %s}\n", what_if.knows_ksm() ? std::to_string(counts.ksm).c_str() : "null");
}

}  // namespace

int RunWhatIf(int argc, char** argv) {
  Options options;
  for (int i = 0; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--help") {
      std::fputs(kUsage, stdout);
      return 0;
    }
    if (argument == "--json") {
      options.json = true;
    } else if (argument == "--seconds" || argument == "--max-pages") {
      if (++i == argc) return Usage(argument + " wants a value");
      const bool good = argument == "--seconds" ? ParseNumber(argv[i], 0, kMostSeconds, &options.seconds)
                                                : ParseNumber(argv[i], 1, kMostPagesEver, &options.most_pages);
      if (!good) return Usage(argument + " " + argv[i] + " is no number, or out of range");
    } else if (argument.compare(0, 2, "--") == 0) {
      return Usage("unknown option " + argument);
    } else {
      int pid;
      std::string why;
      if (!ParsePid(argv[i], &pid, &why)) return Usage(why);
      if (std::find(options.pids.begin(), options.pids.end(), pid) != options.pids.end())
        return Usage(argument + " is named twice");
      options.pids.push_back(pid);
    }
  }
  if (options.pids.empty()) return Usage("no process is named");
  if (options.pids.size() > kMostProcesses) return Usage("no more than " + std::to_string(kMostProcesses) + " processes at a time");
  Records records(options.most_pages);
  std::string why = "there is no room for records of " + std::to_string(options.most_pages) + " pages: less by --max-pages";
  WhatIf what_if(options, &records);
  if (!records.ok() || !what_if.Run(&why)) {
    std::fprintf(stderr, "ksmuctl what-if: %s\n", why.c_str());
    return 1;
  }
  options.json ? PrintJson(options, what_if) : Print(options, what_if);
  return 0;
}

}  // namespace ksmu::tools
