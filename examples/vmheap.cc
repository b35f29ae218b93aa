// A synthetic heap like that of virtual machines, its mix set by options: zero pages, pages that the guests have in
// common, in runs, and unique ones. It is merged while threads go on writing to it and checking what they find; at the
// end come the kernel's accounts and a check of every byte against a model.

#include <atomic>
#include <cstdio>
#include <exception>
#include <mutex>
#include <thread>

#include "accounting.h"
#include "command_line.h"
#include "pages.h"
#include "report.h"
#include "vmheap_heap.h"

namespace examples {
namespace {

void PrintTable(const HeapOptions& o, const Attainable& attainable, const Progress& progress, const Savings& savings,
                double cpu_seconds, const Heap& heap) {
  const ksmu_stats& s = savings.stats;
  const auto row = [](const char* name, const std::string& value) { printf("  %-34s %14s\n", name, value.c_str()); };
  const auto number = [&row](const char* name, double value, const char* unit) {
    char text[64];
    snprintf(text, sizeof text, "%.2f %s", value, unit);
    row(name, text);
  };
  const auto count = [&row](const char* name, int64_t value) { row(name, Grouped(static_cast<uint64_t>(value))); };
  count("pages", static_cast<int64_t>(attainable.pages));
  count("pages that can be saved", static_cast<int64_t>(attainable.total()));
  count("pages saved", static_cast<int64_t>(SavedPages(s)));
  count("  by sharing", s.pages_sharing);
  count("  as zeros", s.ksm_zero_pages);
  count("frames shared", s.pages_shared);
  count("mappings", s.maps_used);
  number("the library's memory", Mebibytes(static_cast<double>(s.metadata_bytes)), "MiB");
  number("its CPU time", cpu_seconds, "s");
  if (progress.seconds_to_90_percent >= 0) number("90 % of the savings after", progress.seconds_to_90_percent, "s");
  if (o.churn == 0) number("last growth after", progress.seconds_to_last_growth, "s");
  count("longest shut gate, microseconds", s.gate_max_us);
  count("breaks", s.cow_breaks);
  count("pages written meanwhile", static_cast<int64_t>(heap.writes()));
  count("pages discarded meanwhile", static_cast<int64_t>(heap.discards()));
}

// One object on one line, the last of stdout: options, result, the kernel's accounts, all counters of the library.
void PrintJson(const HeapOptions& o, const Attainable& attainable, const Progress& progress, const Savings& savings,
               double cpu_seconds, const Heap& heap) {
  const auto u = [](uint64_t value) { return static_cast<unsigned long long>(value); };
  printf("{\"guests\":%llu,\"size_mib\":%llu,\"zero\":%llu,\"dup\":%llu,\"contents\":%llu,\"run_length\":%llu,",
         u(o.guests), u(o.size_mib), u(o.zero), u(o.duplicate), u(o.contents), u(o.run_length));
  printf(
      "\"scattered\":%d,\"alike\":%d,\"promise\":%d,\"merge\":%d,\"seed\":%llu,\"churn\":%llu,\"churn_threads\":%llu,",
      o.scattered, o.alike, o.promise, o.merge, u(o.seed), u(o.churn), u(o.churn_threads));
  printf("\"page_bytes\":%zu,\"pages\":%llu,\"attainable_pages\":%llu,\"saved_pages\":%llu,\"wrong_pages\":%llu,",
         PageSize(), u(attainable.pages), u(attainable.total()), u(SavedPages(savings.stats)), u(heap.wrong()));
  printf("\"churn_writes\":%llu,\"churn_discards\":%llu,\"seconds\":%.3f,\"seconds_to_90_percent\":%.3f,",
         u(heap.writes()), u(heap.discards()), progress.seconds, progress.seconds_to_90_percent);
  printf("\"seconds_to_last_growth\":%.3f,\"cpu_seconds\":%.2f,", progress.seconds_to_last_growth, cpu_seconds);
  printf("\"pss_before\":%llu,\"pss_after\":%llu,\"available_before\":%llu,\"available_after\":%llu,",
         u(savings.before.pss_bytes), u(savings.after.pss_bytes), u(savings.before.available_bytes),
         u(savings.after.available_bytes));
  printf("\"others_before\":%llu,\"others_after\":%llu,", u(savings.before.others_bytes),
         u(savings.after.others_bytes));
  printf("\"pss_agrees\":%s,\"available_agrees\":%s,\"stats\":{", savings.pss_agrees() ? "true" : "false",
         savings.available_agrees() ? "true" : "false");
  const char* separator = "";
#define KSMU_PRINT_FIELD(field)                                                            \
  printf("%s\"" #field "\":%lld", separator, static_cast<long long>(savings.stats.field)); \
  separator = ",";
  KSMU_FOR_EACH_COUNTER(KSMU_PRINT_FIELD)
#undef KSMU_PRINT_FIELD
  printf("}}\n");
}

CommandLine::Result ParseOptions(int argc, char** argv, HeapOptions* o) {
  CommandLine line(
      "vmheap",
      "Makes a heap like that of virtual machines, merges it while threads write to it, shows what that saves by the\n"
      "kernel's accounts, and checks every byte against a model. What is neither zero nor duplicate is unique.",
      kExitStatuses);
  line.Number("guests", "N", &o->guests, 1, 4096, "number of guests, each a mapping of its own");
  line.Number("size-mib", "MIB", &o->size_mib, 1, 1 << 24, "memory of a guest");
  line.Number("zero", "PERCENT", &o->zero, 0, 100, "share of pages that are zeros");
  line.Number("dup", "PERCENT", &o->duplicate, 0, 100, "share of pages with a content in common with others");
  line.Number("contents", "N", &o->contents, 1, 1ull << 32, "number of contents that are in common");
  line.Number("run-length", "PAGES", &o->run_length, 1, 1 << 20,
              "pages of one kind, and contents in common, come in runs");
  line.Flag("scattered", &o->scattered, "runs of all kinds in any order, instead of kind after kind");
  line.Flag("alike", &o->alike, "pages differ in their last 8 bytes only");
  line.Number("churn", "PAGES/s", &o->churn, 0, 1ull << 32,
              "pages written a second, by all threads; the run then takes all of --seconds");
  line.Number("churn-threads", "N", &o->churn_threads, 1, 1024, "threads that write");
  line.Number("discard", "PERCENT", &o->discard, 0, 100,
              "of these are discarded instead: raw, or with --promise by the library");
  line.Number("seed", "S", &o->seed, 0, UINT64_MAX, "another seed, other contents and places");
  line.Flag("exact", &o->promise, "advise without flags: raw discards stay exact (default)", false);
  line.Flag("promise", &o->promise, "advise with KSMU_F_NO_RAW_DISCARDS: merging is cheaper");
  line.Flag("merge", &o->merge, "merge by ksmu_merge at once instead of waiting for the scanner");
  line.Flag("huge", &o->huge, "ask for transparent huge pages, as QEMU does");
  line.Flag("no-huge", &o->no_huge, "refuse them; neither: as the system has it");
  line.Number("seconds", "S", &o->seconds, 1, 1 << 20, "wait no longer than this for savings to stop growing");
  line.Number("cpu-limit", "PERCENT", &o->cpu_limit, 0, 100, "the library's cpu_limit_percent; 0: no limit");
  line.Flag("json", &o->json, "end with one line of JSON");
  const CommandLine::Result result = line.Parse(argc, argv);
  if (result != CommandLine::Result::kRun) return result;
  if (o->zero + o->duplicate > 100) {
    fprintf(stderr, "vmheap: --zero and --dup are more than 100 %% together\n");
    return CommandLine::Result::kUsage;
  }
  if (o->guests * o->size_mib > (AllocatableBytes() >> 20) * 9 / 10) {
    fprintf(stderr, "vmheap: %llu MiB do not fit into memory\n",
            static_cast<unsigned long long>(o->guests * o->size_mib));
    return CommandLine::Result::kUsage;
  }
  return result;
}

int Run(const HeapOptions& options) {
  Heap heap(options);
  heap.Fill();
  int64_t max_page_sharing = 256;
  ksmu_get("max_page_sharing", &max_page_sharing);
  Attainable attainable = heap.CountAttainable(static_cast<uint64_t>(max_page_sharing));
  printf("heap: %s guests of %s MiB; of %s pages %s can be saved: %s duplicates and %s zeros\n",
         Grouped(options.guests).c_str(), Grouped(options.size_mib).c_str(), Grouped(attainable.pages).c_str(),
         Grouped(attainable.total()).c_str(), Grouped(attainable.duplicates).c_str(), Grouped(attainable.zero).c_str());
  KernelAccount before = ReadKernelAccount();
  if (!StartLibrary(options.cpu_limit)) return kExitCannotStart;

  LiveLine line(attainable);
  heap.Advise(KSMU_MERGEABLE | (options.promise ? KSMU_F_NO_RAW_DISCARDS : 0));
  std::atomic<bool> stop{false};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  std::vector<std::jthread> threads;
  struct StopChurn {  // before the threads are joined, also when an exception comes
    std::atomic<bool>* stop;
    ~StopChurn() { *stop = true; }
  } stop_churn{&stop};
  for (uint64_t thread = 0; options.churn != 0 && thread < options.churn_threads; ++thread) {
    threads.emplace_back([&, thread] {
      try {
        heap.Churn(thread, &stop);
      } catch (...) {
        const std::lock_guard lock(failure_mutex);
        failure = std::current_exception();
        stop = true;
      }
    });
  }
  Progress progress;
  const double max_seconds = static_cast<double>(options.seconds);
  if (options.merge) {
    if (ksmu_set("run", 0) != 0) throw LibraryError("ksmu_set(run, 0)");
    heap.Merge(&line);
    progress.seconds = progress.seconds_to_last_growth = line.seconds();
    if (ksmu_set("run", 1) != 0) throw LibraryError("ksmu_set(run, 1)");
  }
  if (options.churn != 0) {
    progress = Watch(&line, attainable, max_seconds, [&] { return stop.load(); });
  } else if (!options.merge) {
    progress = Watch(&line, attainable, max_seconds, {});
  }
  stop = true;
  threads.clear();
  if (failure) std::rethrow_exception(failure);
  const double cpu_seconds = LibraryCpuSeconds();
  if (options.churn != 0) {
    // What was written last is to be booked, and to become part of the savings, before they are counted.
    attainable = heap.CountAttainable(static_cast<uint64_t>(max_page_sharing));
    printf("writing has ended; of the pages as they are now %s can be saved: %s duplicates and %s zeros\n",
           Grouped(attainable.total()).c_str(), Grouped(attainable.duplicates).c_str(),
           Grouped(attainable.zero).c_str());
    // The memory that the program discarded is no saving of the library's.
    before.pss_bytes -= heap.discarded_pages() * PageSize();
    before.available_bytes += heap.discarded_pages() * PageSize();
    LiveLine after(attainable);
    Watch(&after, attainable, max_seconds, {});
  }
  const Savings savings = TakeSavings(before);
  PrintSavings(savings, attainable);
  PrintReasons(savings.stats);
  printf("\n");
  PrintTable(options, attainable, progress, savings, cpu_seconds, heap);
  printf("\n");
  heap.CheckAll("merged");
  heap.Advise(KSMU_UNMERGEABLE);
  heap.CheckAll("unmerged");
  if (ksmu_stop() != 0) throw LibraryError("ksmu_stop");

  int status = kExitOk;
  if (heap.wrong() != 0) {
    printf("FAILED: %s wrong pages\n", Grouped(heap.wrong()).c_str());
    status = kExitWrongBytes;
  } else if (SavedPages(savings.stats) == 0) {
    printf("FAILED: nothing was merged\n");
    status = kExitFailed;
  } else {
    printf("every byte was right\n");
  }
  if (options.json) PrintJson(options, attainable, progress, savings, cpu_seconds, heap);
  return status;
}

}  // namespace
}  // namespace examples

int main(int argc, char** argv) {
  using examples::CommandLine;
  setvbuf(stdout, nullptr, _IOLBF, 0);  // each line at once, also into a pipe
  try {
    examples::HeapOptions options;
    switch (examples::ParseOptions(argc, argv, &options)) {
      case CommandLine::Result::kHelp:
        return examples::kExitOk;
      case CommandLine::Result::kUsage:
        return examples::kExitUsage;
      case CommandLine::Result::kRun:
        return examples::Run(options);
    }
  } catch (const std::exception& error) {
    fprintf(stderr, "vmheap: %s\n", error.what());
  }
  return examples::kExitFailed;
}
